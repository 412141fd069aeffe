"""ppo_grid_socnav.py: what the network sees, the Gaussian policy on it, and a run from its first file to its last.

Functions that the scripts share letter by letter are tested in test_ppo.py. Runs here have episodes of 25 steps in one
scenario, unless they ask for `full_length`."""

import copy
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import helpers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import lines, same
from torch.distributions import Independent, Normal

import envs
import ppo_grid_socnav as ppo
from envs import command, rollout, run
from envs.files import UserError
from envs.socnav import controllers, environment, metrics

ENCODERS = ("rays", "cnn")
CHANNELS = ("obstacles", "pedestrians", "combined", "near")
SIZE, PEOPLE, RAYS = 16, 4, 12
PLACE = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
BATCH, HALF, FULL = 128, 256, 512  # steps
LIMIT = 25  # steps of an episode
load_world = environment.load_world


def short_world(*args, **kwargs):
    world = copy.copy(load_world(*args, **kwargs))
    world.limit = world.limit.clamp(max=LIMIT)
    return world


def placeholder(agent, obs, path, *about):
    path.write_bytes(b"onnx")


def make_quick(patch):
    """Short episodes; and in place of the export, which takes longer than a tiny run, a file that says nothing."""
    patch.setattr(environment, "load_world", short_world)
    patch.setattr(run, "export_onnx", placeholder)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "full_length" not in request.fixturenames:
        make_quick(monkeypatch)


@pytest.fixture
def full_length():
    """Asked for by tests that need episodes, and the export, as they are."""


# An agent and observations without an environment


def make_agent(encoder="rays", channels=CHANNELS, size=SIZE, bound=(1.0, 0.5), seed=0, **kwargs):
    """An agent in float64 whose actions reach their bounds."""
    torch.manual_seed(seed)
    small = {"cnn_channels": (4, 4, 4), "rays": RAYS, "people": PEOPLE, "set_units": 8, "hidden_sizes": (16,)}
    args = ppo.Args(grid_encoder=encoder, **{**small, **kwargs})
    space, high = environment.observation_space(channels, size), np.array(bound, np.float32)
    agent = ppo.GridAgent(space, -high, high, channels, 2.0, args).double()
    obs = observations(50, channels, size, seed=9)
    if args.norm_obs:
        agent.normalizer.update(agent.see(obs))
    with torch.no_grad():
        agent.actor[1][-1].weight.mul_(1 / outputs(agent, obs)[:, :2].std())
        agent.log_std.copy_(torch.tensor([-0.3, 0.4]))
    return agent


def observations(n, channels=CHANNELS, size=SIZE, seed=0, count=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)

    counts = torch.randint(65, (n, 1), generator=generator) if count is None else torch.full((n, 1), count)
    nearby = torch.tensor([0.3, 0.3, 1.0, 1.0])  # within 8 m
    pedestrians = uniform(n, 64, 4) * nearby.to(dtype) * (torch.arange(64) < counts)[..., None]
    grid = torch.rand(n, len(channels), size, size, generator=generator) < 0.2
    parts = uniform(n, 4), uniform(n, 7), pedestrians, counts.to(torch.uint8), grid.to(torch.uint8)
    return dict(zip(ppo.SEEN, parts))


@torch.no_grad()
def outputs(agent, obs):
    """What actor and critic say, (n, 3)."""
    row = agent.see(obs)
    return torch.cat([agent.mean(row), agent.value(row)[:, None]], dim=1)


def rows_of(obs, rows):
    return {name: x[rows] for name, x in obs.items()}


@pytest.mark.parametrize(("encoder", "vector", "cells"), [("rays", 8 + 2 * RAYS, 0), ("cnn", 8, 3 * SIZE**2 // 8)])
def test_shapes(encoder, vector, cells):
    agent, obs = make_agent(encoder), observations(5)
    row = agent.see(obs)
    assert agent.sizes == [vector, PEOPLE * ppo.PERSON, cells]
    assert row.shape == (5, sum(agent.sizes))
    action = agent(*obs.values())
    assert action.shape == (5, 2)
    assert (action.abs() <= torch.tensor([1.0, 0.5])).all()
    assert agent.sample(row).shape == (5, 2)
    assert agent.value(row).shape == (5,)
    logprob, entropy, value = agent.evaluate_actions(row.expand(3, 5, -1), torch.zeros(3, 5, 2))
    assert (logprob.shape, entropy.shape, value.shape) == ((3, 5), (), (3, 5))
    torch.testing.assert_close(value[1], agent.value(row))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_row_holds_all_that_there_is_to_see(encoder):
    agent, obs = make_agent(encoder), observations(5, count=64)
    vector, people, cells = agent.see(obs).split(agent.sizes, dim=1)
    assert torch.equal(vector[:, :4], obs["robot"])
    planes = obs["grid"][:, agent.planes]
    if encoder == "rays":
        torch.testing.assert_close(vector[:, 8:], agent.closeness(planes).double())
    else:
        unpacked = ppo.unpack(cells, planes[0].numel())
        assert torch.equal(unpacked.unflatten(1, planes.shape[1:]), planes.to(unpacked))
    position = people.unflatten(1, (PEOPLE, -1))[..., :2]
    torch.testing.assert_close(position, 4 * obs["pedestrians"][:, :PEOPLE, :2])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_way_by_hand(encoder):
    """The waypoint in units of 5 m and no farther than that, the point 3 m ahead in units of 3 m; nothing else."""
    agent, obs = make_agent(encoder), observations(1)
    ways = {(4.0, 3.0): (0.8, 0.6), (8.0, -6.0): (0.8, -0.6), (0.0, 1.0): (0.0, 0.2), (0.0, 0.0): (0.0, 0.0)}
    for (x, y), waypoint in ways.items():
        for rest in (0.0, 0.7):  # the next waypoint, and what is left to drive
            obs["goal"] = torch.tensor([[x / 10, y / 10, rest, rest, 0.3, -0.15, rest]], dtype=torch.float64)
            assert agent.see(obs)[0, 4:8].tolist() == pytest.approx([*waypoint, 1.0, -0.5])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_environment_fits_the_agent(encoder):
    vec = envs.make_vec("SocNavGrid-v0", 3, seed=0, **PLACE)
    agent = ppo.make_grid_agent(vec, ppo.Args(grid_encoder=encoder, hidden_sizes=(16,), cnn_channels=(4, 4, 4)))
    assert agent.max_speed == vec.robot.max_speed
    obs = vec.reset(seed=1)[0]
    assert tuple(obs) == ppo.SEEN
    assert agent(*ppo.tensors(obs, torch.device("cpu")).values()).shape == (3, 2)


@pytest.mark.parametrize("norm_obs", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_action_is_the_bounded_mean_for_a_raw_observation(encoder, norm_obs):
    agent, obs = make_agent(encoder, norm_obs=norm_obs), observations(40)
    mean = outputs(agent, obs)[:, :2]
    assert (mean.abs() > 1).any()
    torch.testing.assert_close(agent(*obs.values()).detach(), mean.clamp(-1, 1) * torch.tensor([1.0, 0.5]))


def test_actions_are_scaled_to_bounds_that_are_not_symmetric():
    agent = make_agent()
    agent.center.copy_(torch.tensor([1.0, 0.0]))
    agent.scale.copy_(torch.tensor([3.0, 0.78]))
    action = agent.bounded(torch.tensor([[0.5, -0.5], [4.0, -4.0]]))
    assert action.flatten().tolist() == pytest.approx([2.5, -0.39, 4.0, -0.78])


def test_the_bicycle_gets_angles_up_to_its_own():
    vec = envs.make_vec("SocNavGrid-v0", 1, robot="bicycle", **PLACE)
    agent = ppo.make_grid_agent(vec, ppo.Args())
    assert agent.bounded(torch.tensor([5.0, -5.0])).tolist() == pytest.approx([1.0, -0.78])


# Pedestrians


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("count", [PEOPLE, PEOPLE - 1])
def test_pedestrians_have_no_order(encoder, count):
    agent, obs = make_agent(encoder), observations(6, count=count)
    expected = outputs(agent, obs)
    for order in (list(range(count))[::-1], [1, 0, *range(2, count)]):
        shuffled = obs["pedestrians"].clone()
        shuffled[:, :count] = obs["pedestrians"][:, order]
        torch.testing.assert_close(outputs(agent, {**obs, "pedestrians": shuffled}), expected, rtol=1e-12, atol=1e-12)
    shuffled[:, 0, 0] += 0.01
    assert (outputs(agent, {**obs, "pedestrians": shuffled}) != expected).all()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("count", range(PEOPLE + 1))
def test_slots_of_absent_pedestrians_may_hold_anything(encoder, count):
    agent, obs = make_agent(encoder), observations(6, count=count)
    junk = observations(6, seed=1, count=64)["pedestrians"]
    junk[:, :count] = obs["pedestrians"][:, :count]
    assert torch.equal(outputs(agent, {**obs, "pedestrians": junk}), outputs(agent, obs))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_matters_how_many_pedestrians_there_are(encoder):
    agent, obs = make_agent(encoder), observations(6, count=64)
    said = [outputs(agent, {**obs, "count": torch.full((6, 1), k, dtype=torch.uint8)}) for k in (0, 1, PEOPLE, 64)]
    assert (said[0] != said[1]).all()
    assert (said[1] != said[2]).all()
    assert torch.equal(said[2], said[3])  # but not those behind the nearest


@pytest.mark.parametrize("encoder", ENCODERS)
def test_only_the_nearest_pedestrians_are_looked_at(encoder):
    agent, obs = make_agent(encoder), observations(6, count=64)
    others = obs["pedestrians"].clone()
    others[:, PEOPLE:] = 0.5
    assert torch.equal(outputs(agent, {**obs, "pedestrians": others}), outputs(agent, obs))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_empty_slots_count_nothing(encoder):
    """A policy that could look at more people says the same where there are few."""
    few, many = make_agent(encoder, people=3), make_agent(encoder, people=9)
    many.load_state_dict(few.state_dict())
    for count in range(4):
        obs = observations(6, count=count)
        torch.testing.assert_close(outputs(many, obs), outputs(few, obs), rtol=1e-12, atol=1e-12)
    alone = few.actor[0](few.see(observations(6, count=0)))[:, few.sizes[0] :]
    assert not alone[:, :16].any()  # what max and sum over nobody leave


def test_more_people_than_an_observation_has_are_all_that_it_has():
    assert make_agent(people=1000).people == 64


MEETINGS = {  # position and velocity over the ground (m, m/s), the robot's speed; when and how near they come (s, m)
    "head-on": ((6, 0), (-1, 0), 1, 3, 0),
    "crossing, and they would touch": ((3, -3), (0, 1), 1, 3, 0),
    "crossing ahead": ((3, -1), (0, 1), 1, 2, math.sqrt(2)),
    "standing beside the way": ((2, 1), (0, 0), 1, 2, 1),
    "both stand": ((3, 4), (0, 0), 0, 0, 5),
    "going away": ((3, 4), (2, 2), 1, 0, 5),
    "side by side": ((0, 2), (1, 0), 1, 0, 2),
    "too far ahead in time": ((7, 3), (0, 0), 1, 4, math.sqrt(3**2 + 3**2)),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_features_of_a_pedestrian_by_hand(name):
    """The robot's largest speed is 2 m/s; an observation has positions / 16 m and velocities / 2 m/s."""
    (x, y), (vx, vy), speed, when, nearest = MEETINGS[name]
    near = [math.exp(-math.hypot(x, y) / 2), math.exp(-nearest), when / ppo.HORIZON]
    assert ppo.HORIZON == 4
    first, *others = people_seen((x, y), (vx, vy), speed)
    assert first.tolist() == pytest.approx([x / 4, y / 4, vx - speed, vy, *near, 1], abs=1e-5)
    assert not any(one.any() for one in others)


def people_seen(position, velocity, speed=0.0):
    """What a row says of PEOPLE pedestrians, of whom there is one."""
    agent, obs = make_agent(), observations(1, count=1)
    obs["robot"][:, 0] = speed / 2
    obs["pedestrians"][0, 0] = torch.tensor([*(x / 16 for x in position), *(v / 2 for v in velocity)])
    return agent.see(obs).split(agent.sizes, dim=1)[1].unflatten(1, (PEOPLE, -1))[0]


def test_people_far_away_are_not_seen():
    assert people_seen((7.9, 0), (1, 0))[0].any()
    assert not people_seen((8.1, 0), (1, 0)).any()
    assert not people_seen((-6, 6), (0, 0)).any()


# Grid


def closeness_by_brute_force(plane, rays):
    """Ray by ray and cell by cell from the middle outwards, the first solid one."""
    size, found = len(plane), []
    for k in range(rays):
        angle, reach = 2 * math.pi * (k + 0.5) / rays, size // 2
        cells = [size / 2 + (i + 0.5) * np.array([math.sin(angle), math.cos(angle)]) for i in range(reach)]
        solid = [i for i, cell in enumerate(cells) if plane[tuple(np.floor(cell).astype(int))]]
        found.append((reach - solid[0]) / reach if solid else 0.0)
    return found


def test_rays_stop_at_the_first_solid_cell():
    agent, grid = make_agent(), observations(8)["grid"]
    seen = agent.closeness(grid[:, [0, 3]])
    expected = [[*closeness_by_brute_force(one[0], RAYS), *closeness_by_brute_force(one[3], RAYS)] for one in grid]
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    assert 0 < np.mean(expected) < 1


def test_rays_by_hand():
    """Four rays along the diagonals, 0.7 cells a step; walls 3 cells ahead, 5 to the left, 2 to the right."""
    agent, middle = make_agent(rays=4, size=32), 16
    grid = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    grid[..., middle + 3 :] = 1
    grid[..., middle + 5 :, :] = 1
    grid[..., : middle - 2, :] = 1
    assert agent.closeness(grid).flatten().tolist() == pytest.approx([12 / 16, 9 / 16, 13 / 16, 13 / 16])
    assert agent.closeness(torch.ones_like(grid)).tolist() == [[1.0] * 4]
    assert agent.closeness(torch.zeros_like(grid)).tolist() == [[0.0] * 4]


def test_rays_read_a_large_grid_as_well():
    """Where 600 / 2 cells are more than a byte can count."""
    agent = make_agent(rays=4, size=600, channels=("near",))
    grid = torch.zeros(1, 1, 600, 600, dtype=torch.uint8)
    grid[..., 310:] = 1
    assert agent.closeness(grid).flatten().tolist() == pytest.approx([286 / 300, 0, 0, 286 / 300])


@pytest.mark.parametrize(
    ("encoder", "read"), [("rays", {"obstacles", "near"}), ("cnn", {"obstacles", "near", "pedestrians"})]
)
def test_planes_that_an_encoder_reads(encoder, read):
    agent, obs = make_agent(encoder), observations(6)
    matters = set()
    for k, name in enumerate(CHANNELS):
        grid = obs["grid"].clone()
        grid[:, k] = 1 - grid[:, k]
        if (outputs(agent, {**obs, "grid": grid}) != outputs(agent, obs)).any():
            matters.add(name)
    assert matters == read


@pytest.mark.parametrize(("number", "numbers"), [(64, 8), (36, 5)])
def test_packed_cells_are_the_same_cells(number, numbers):
    cells = (torch.rand(3, 5, number) < 0.5).to(torch.uint8)
    packed = ppo.pack(cells)
    assert packed.shape == (3, 5, numbers)
    assert 0 <= packed.min() < packed.max() <= 255
    for dtype in (torch.uint8, torch.float32, torch.float64):
        assert torch.equal(ppo.unpack(packed.to(dtype), number).int(), cells.int())


def test_convolutions_see_the_grid_as_it_is():
    """Unpacked again, plane by plane, in the same places; and mirrored, left and right swapped."""
    agent, obs = make_agent("cnn"), observations(2)
    images = []
    encoder = agent.actor[0]
    encoder.cnn.register_forward_pre_hook(lambda module, inputs: images.append(inputs[0]))
    outputs(agent, obs)
    planes = obs["grid"][:, [0, 1, 3]].double()
    assert torch.equal(images[0], torch.cat([planes, planes.flip(2)]))


@pytest.mark.parametrize("size", [6, 10])
def test_convolutions_work_on_grids_of_any_even_size(size):
    agent = make_agent("cnn", channels=("near",), size=size)
    assert outputs(agent, observations(2, ("near",), size)).shape == (2, 3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_row_does_not_depend_on_its_batch(encoder):
    agent, obs = make_agent(encoder).float(), observations(37, dtype=torch.float32)
    whole = agent.see(obs)
    for i in range(37):
        assert torch.equal(agent.see(rows_of(obs, slice(i, i + 1)))[0], whole[i])
    assert torch.equal(agent.see(rows_of(obs, slice(3, 16))), whole[3:16])


# The policy


def test_the_normaliser_leaves_pedestrians_and_cells_alone():
    normalizer = ppo.VectorNormalizer([2, 3, 4])
    x = torch.randn(50, 9) * 3 + 5
    normalizer.update(x)
    out = normalizer(x)
    assert torch.equal(out[:, 2:], x[:, 2:])
    expected = (x[:, :2] - x[:, :2].mean(0)) / x[:, :2].std(0, correction=0)
    torch.testing.assert_close(out[:, :2], expected, rtol=1e-4, atol=1e-4)
    assert normalizer(x.expand(2, 50, 9)).shape == (2, 50, 9)


@pytest.mark.parametrize("size", [SIZE, 10])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("norm_obs", [False, True])
def test_a_mirrored_situation_is_answered_with_the_mirrored_action(encoder, norm_obs, size):
    agent, obs = make_agent(encoder, size=size, norm_obs=norm_obs), observations(20, size=size)
    mirrored = {
        "robot": obs["robot"] * torch.tensor([1, -1, 1, -1]),
        "goal": obs["goal"] * torch.tensor([1, -1, 1, -1, 1, -1, 1]),
        "pedestrians": obs["pedestrians"] * torch.tensor([1, -1, 1, -1]),
        "count": obs["count"],
        "grid": obs["grid"].flip(2),
    }
    action = agent.mean(agent.see(obs))
    assert (action.abs() > 1e-3).all()
    torch.testing.assert_close(agent.mean(agent.see(mirrored)), action * torch.tensor([1, -1]))
    torch.testing.assert_close(agent(*mirrored.values()), agent(*obs.values()) * torch.tensor([1, -1]))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("norm_obs", [False, True])
def test_log_probability_and_entropy_are_those_of_a_normal_distribution(encoder, norm_obs):
    agent = make_agent(encoder, norm_obs=norm_obs)
    row, action = agent.see(observations(20)), torch.randn(20, 2).double()
    logprob, entropy, value = agent.evaluate_actions(row, action)
    policy = Independent(Normal(agent.mean(row), agent.log_std.exp()), 1)
    torch.testing.assert_close(logprob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy()[0])
    torch.testing.assert_close(value, agent.value(row))
    torch.testing.assert_close(value, agent.critic(agent.normalizer(row))[:, 0])


def test_samples_have_the_mean_and_the_deviation_of_the_policy():
    agent = make_agent(norm_obs=True)
    row = agent.see(observations(1))
    with torch.no_grad():
        mean, samples = agent.mean(row)[0], agent.sample(row.expand(40_000, -1))
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(samples.std(0), agent.log_std.detach().exp(), rtol=0.03, atol=0)


def test_a_new_policy_does_nothing_yet_with_the_deviation_asked_for():
    vec = envs.make_vec("SocNavGrid-v0", 4, seed=0, **PLACE)
    agent = ppo.make_grid_agent(vec, ppo.Args(init_log_std=-1.5))
    assert agent.log_std.tolist() == [-1.5, -1.5]
    assert rollout.Deployed(agent)(vec.reset(seed=1)[0]) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_actor_and_critic_share_nothing(encoder):
    agent = make_agent(encoder)
    actor, critic = ({id(x) for x in part.parameters()} for part in (agent.actor, agent.critic))
    assert actor
    assert not actor & critic
    assert {id(x) for x in agent.parameters()} == actor | critic | {id(agent.log_std)}
    assert [id(x) for x in agent.weights] == [id(x) for x in agent.parameters()]


def batch_of(agent, steps=4, rows=8):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(steps, rows, *shape, generator=generator).double()

    row, new_row = (agent.see(observations(steps * rows, seed=s)).unflatten(0, (steps, rows)) for s in (1, 2))
    return ppo.Transitions(row, normal(2), new_row, normal(), normal() > 1.5, normal() > 1)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("norm_obs", [False, True])
def test_learning_of_the_critic_alone_leaves_the_actor_as_it_is(encoder, norm_obs):
    agent = make_agent(encoder, norm_obs=norm_obs)
    args = ppo.Args(minibatch_size=16, update_epochs=2, norm_obs=norm_obs)
    batch = batch_of(agent)
    optimizer = torch.optim.AdamW(agent.parameters(), 1e-2, weight_decay=0.1)

    def learn(critic_only):
        """Names of the parameters that it changes, and whether it changes the actor's output and the critic's."""
        before = {name: x.clone() for name, x in agent.named_parameters()}
        said = outputs_of_rows()
        ppo.learn(agent, optimizer, ppo.compute_gradient, args, batch, critic_only)
        changed = {name for name, x in agent.named_parameters() if not torch.equal(x, before[name])}
        return changed, [not torch.equal(x, y) for x, y in zip(said, outputs_of_rows())]

    def outputs_of_rows():
        with torch.no_grad():
            return agent.mean(batch.obs), agent.log_std.clone(), agent.value(batch.obs)

    names = {name for name, _ in agent.named_parameters()}
    critic = {name for name in names if name.startswith("critic")}
    assert learn(critic_only=True) == (critic, [False, False, True])
    assert learn(critic_only=False) == (names, [True, True, True])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_deployed_action_does_not_depend_on_its_batch(encoder):
    agent = make_agent(encoder).float()
    policy, obs = rollout.Deployed(agent), observations(33, dtype=torch.float32)
    obs = {name: x.numpy() for name, x in obs.items()}
    whole = policy(obs)
    assert whole.dtype == np.float32
    assert np.array_equal(whole, np.concatenate([policy(rows_of(obs, slice(i, i + 1))) for i in range(33)]))
    assert np.array_equal(whole, np.concatenate([policy(rows_of(obs, slice(i, i + 5))) for i in range(0, 33, 5)]))
    with torch.no_grad():
        expected = agent(*(torch.as_tensor(x) for x in obs.values()))
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    assert agent.log_std.dtype == torch.float32  # it is a copy that computes in float64


@pytest.mark.parametrize("encoder", ENCODERS)
def test_onnx_has_five_inputs_and_the_actions_of_the_network(encoder, full_length, tmp_path):
    agent, path = make_agent(encoder, norm_obs=True).float(), tmp_path / "policy.onnx"
    first = {name: x.numpy() for name, x in observations(3, dtype=torch.float32).items()}
    run.export_onnx(agent, first, path, "policy", {"action_repeat": 2, "scenario": "any"})
    session = onnxruntime.InferenceSession(str(path))
    types = ["tensor(float)"] * 3 + ["tensor(uint8)"] * 2
    assert [(x.name, x.type) for x in session.get_inputs()] == list(zip(ppo.SEEN, types))
    for n in (1, 5):
        obs = observations(n, seed=n, dtype=torch.float32)
        obs["count"][0] = 0
        action = session.run(["action"], {name: x.numpy() for name, x in obs.items()})[0]
        np.testing.assert_allclose(action, agent(*obs.values()).detach(), rtol=0, atol=1e-5)
    assert action.std() > 0.1
    meta = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert meta == {"kind": "policy", "action_repeat": "2"}


# What a run is judged by


def evaluations(*rates):
    return [{"step": 1000 * (k + 1), "success_rate": s, "failure_rate": f} for k, (s, f) in enumerate(rates)]


GOOD, POOR, HITS = (0.9, 0.05), (0.89, 0.0), (0.94, 0.06)


@pytest.mark.parametrize(
    ("rates", "step"),
    [
        ([], None),
        ([GOOD, GOOD], None),
        ([GOOD, GOOD, GOOD], 1000),
        ([(1.0, 0.0)] * 3, 1000),
        ([GOOD, GOOD, POOR, GOOD, GOOD], None),
        ([GOOD, GOOD, HITS, GOOD, GOOD], None),
        ([GOOD, POOR, GOOD, GOOD, GOOD, GOOD], 3000),
        ([POOR, HITS, GOOD, GOOD, GOOD, POOR, HITS], 3000),
        ([GOOD, GOOD, GOOD, POOR, GOOD, GOOD, GOOD], 1000),
    ],
)
def test_convergence_is_the_first_of_three_good_evaluations_in_a_row(rates, step):
    assert run.converged_at(evaluations(*rates)) == step


def evaluation(success=0.5, failure=0.1, mean_return=1.0, **others):
    return {
        "success_rate": success, "failure_rate": failure, "mean_return": mean_return, "mean_length": 30.0,
        "metrics": others,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [
        ("success_rate", evaluation(0.5), evaluation(0.6, 0.4, -9)),
        ("failure_rate", evaluation(0.9, 0.2), evaluation(0.1, 0.1)),
        ("mean_return", evaluation(0.9, mean_return=-1), evaluation(0.1, mean_return=2)),
        ("snqi", evaluation(0.9, snqi=0.1), evaluation(0.1, snqi=0.2)),
        ("path_efficiency", evaluation(0.9, path_efficiency=0.1), evaluation(0.1, path_efficiency=0.2)),
        ("jerk", evaluation(0.9, jerk=0.2), evaluation(0.1, jerk=0.1)),
        ("near_misses", evaluation(0.9, near_misses=3.0), evaluation(0.1, near_misses=2.0)),
        ("time_to_goal", evaluation(0.9, time_to_goal=30.0), evaluation(0.1, time_to_goal=20.0)),
        # where the metric is equal: success, then return
        ("failure_rate", evaluation(0.5, 0.1, 9), evaluation(0.6, 0.1, 1)),
        ("success_rate", evaluation(0.5, 0.1, 1), evaluation(0.5, 0.2, 2)),
        ("snqi", evaluation(0.5, 0.1, 1, snqi=0.2), evaluation(0.5, 0.1, 2, snqi=0.2)),
    ],
)
def test_better(metric, low, high):
    assert rollout.better(high, low, metric)
    assert not rollout.better(low, high, metric)
    assert not rollout.better(high, high, metric)
    assert not rollout.better(low, low, metric)


def test_every_metric_of_the_task_that_should_be_small_is_better_when_small():
    vec = envs.make_vec("SocNavGrid-v0", 2, seed=0, **PLACE)
    for _ in range(LIMIT):
        info = vec.step(np.zeros((2, 2), np.float32))[-1]
    ours = {name for name in info if f"_{name}" in info} - {"final_obs", "episode", "is_success", "is_failure"}
    large = {"scenario", "path_efficiency", "snqi"}
    assert large < ours
    assert ours - large <= rollout.LOWER_IS_BETTER
    assert not large & rollout.LOWER_IS_BETTER


@pytest.mark.parametrize("metric", ["sucess_rate", "per_episode", "metrics", "scenario", "cost", ""])
def test_an_unknown_metric_is_named_with_those_that_there_are(metric):
    vec = envs.make_vec("SocNavGrid-v0", 1, **PLACE)
    with pytest.raises(UserError, match=r"such metric; there are success_rate, failure_rate, .*snqi") as error:
        rollout.require_metric(metric, vec)
    assert f"--best-metric {metric}:" in str(error.value)
    assert "\n" not in str(error.value)


def test_every_metric_of_an_evaluation_can_choose_the_best_policy(whole):
    vec = envs.make_vec("SocNavGrid-v0", 1, **PLACE)
    best = whole[2]["best"]
    for metric in ("success_rate", "failure_rate", "mean_return", "mean_length", *best["metrics"]):
        rollout.require_metric(metric, vec)
        assert not rollout.better(best, best, metric)


def test_by_scenario_by_hand():
    def result(scenario, success, failure):
        return {"scenario": scenario, "success": success, "failure": failure}

    played = [("door", 1, 0), ("alley", 0, 1), ("door", 0, 0), ("door", 1, 0), ("door", 0, 1)]
    table = rollout.by_scenario([result(name, bool(success), bool(failure)) for name, success, failure in played])
    assert list(table) == ["alley", "door"]
    assert table["alley"] == {"episodes": 1, "success_rate": 0.0, "failure_rate": 1.0}
    assert table["door"] == {"episodes": 4, "success_rate": 0.5, "failure_rate": 0.25}


def test_auto_is_as_many_environments_as_suit_the_device(monkeypatch):
    assert command.checked(ppo.Args()).num_envs == command.SOME
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.checked(ppo.Args()).num_envs == command.SOME
    assert command.checked(ppo.Args(device="auto")).num_envs == command.MANY
    assert command.checked(ppo.Args(device="cuda", num_envs=512)).num_envs == 512


# Runs


def tiny(folder, **kwargs):
    """Settings of a run of four updates that lies in `folder`."""
    settings = {
        "env_kwargs": PLACE, "num_envs": 8, "num_steps": 16, "minibatch_size": 64, "update_epochs": 2,
        "hidden_sizes": (16,), "cnn_channels": (4, 4, 4), "set_units": 8, "threads": 1, "total_timesteps": FULL,
        "eval_every": HALF, "eval_episodes": 2, "checkpoint_every": BATCH, "norm_reward": False, "final_log_std": None,
        "run_root": str(folder.parent), "run_name": folder.name,
    }  # fmt: skip
    return ppo.Args(**{**settings, **kwargs})


SETTINGS = {  # of the runs that are compared
    "rays": {"norm_obs": True, "norm_reward": True, "reward": "punish_action"},
    "cnn": {"grid_encoder": "cnn", "final_log_std": -2.0, "best_metric": "snqi", "critic_warmup": 1},
}


@pytest.fixture(scope="module", params=ENCODERS)
def whole(request, tmp_path_factory):
    """Directory, settings and summary of an uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    args = tiny(folder, **SETTINGS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        summary = ppo.train(args)
    return folder, args, summary


def same_runs(folder, other):
    """All that training did, and what the summary says of it."""
    helpers.same_runs(folder, other, ("best.pt", "final.pt", f"checkpoints/step_{FULL:09d}.pt"))
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    assert {name: ours[name] for name in ("steps", "best")} == {name: theirs[name] for name in ("steps", "best")}


def test_a_run_writes_all_files(whole):
    folder, _, summary = whole
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    checkpoints = {f"checkpoints/step_{step:09d}.pt" for step in range(BATCH, FULL + 1, BATCH)}
    logs = {"progress.csv", "evaluations.jsonl", "episodes.jsonl"}
    assert names - events - {".lock"} == checkpoints | logs | {
        "config.json", "best.pt", "final.pt", "policy.onnx", "summary.json",
    }  # fmt: skip
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["converged_at_step"]) == ("completed", FULL, None)
    assert "converged_at_step" in summary
    for name in ("final.pt", "best.pt", "policy.onnx"):
        assert summary["sha256"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_run_logs_what_happened(whole):
    folder, args, summary = whole
    assert [int(row["step"]) for row in run.read_progress(folder / "progress.csv")] == list(range(BATCH, FULL + 1, 128))
    played = lines(folder / "evaluations.jsonl")
    assert [line["step"] for line in played] == [HALF, FULL]
    for line in played:
        assert (line["episodes"], line["seed"]) == (2, args.eval_seed)
        assert line["per_scenario"][PLACE["scenario"]]["episodes"] == 2
        assert "snqi" in line["metrics"]
    episodes = lines(folder / "episodes.jsonl")
    steps = [line["step"] for line in episodes]
    assert min(steps) <= HALF < max(steps)
    assert {line["length"] for line in episodes} <= {*range(1, LIMIT + 1)}
    assert all(line["scenario"].startswith(PLACE["scenario"]) for line in episodes)
    evaluated = run.load(folder / "final.pt")["evaluations"]
    assert [line["step"] for line in evaluated] == [HALF, FULL]
    assert summary["best"]["step"] in (HALF, FULL)


def test_policy_files_hold_what_their_environment_needs(whole):
    folder, args, _ = whole
    for name in ("best.pt", "final.pt", f"checkpoints/step_{BATCH:09d}.pt"):
        content = torch.load(folder / name, weights_only=True)
        assert content["kind"] == "policy"
        assert content["env_id"] == "SocNavGrid-v0"
        assert content["env_kwargs"] == {**PLACE, "reward": args.reward}
        assert ("optimizer" in content) == (name != "best.pt")
    first, last = (run.load(folder / name)["agent"] for name in (f"checkpoints/step_{BATCH:09d}.pt", "final.pt"))
    assert {name for name in first if not torch.equal(first[name], last[name])} == {
        name for name in first if name not in ("center", "scale")
    }


def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path):
    folder, args, _ = whole
    path = folder / f"checkpoints/step_{HALF:09d}.pt"
    summary = ppo.train(replace(args, resume=str(path), run_name="resumed"))
    assert (summary["status"], summary["resumed_from_step"]) == ("completed", HALF)
    same_runs(folder.parent / "resumed", folder)


class Countdown:
    """Wraps a function: its k-th call that counts is interrupted by a signal."""

    def __init__(self, function, k, counts=lambda *args: True):
        self.function, self.left, self.counts = function, k, counts

    def __get__(self, instance, owner):
        return lambda *args: self(instance, *args)

    def __call__(self, *args, **kwargs):
        self.left -= self.counts(*args)
        if self.left == 0:
            self.left = -1
            os.kill(os.getpid(), signal.SIGTERM)
        return self.function(*args, **kwargs)


def in_rollout(patch):
    env = environment.SocNavGrid
    patch.setattr(env, "advance", Countdown(env.advance, 2 * 16 + 5, lambda self, action: self.training))


def in_update(patch):
    patch.setattr(ppo, "ppo_loss", Countdown(ppo.ppo_loss, 2 * 4 + 3))


def in_evaluation(patch):
    patch.setattr(rollout.Deployed, "__call__", Countdown(rollout.Deployed.__call__, 7))


@pytest.fixture
def main(monkeypatch):
    """Runs the script in this process: command line -> status."""

    def main(line):
        monkeypatch.setattr(sys, "argv", ["ppo_grid_socnav.py", *(line.split() if isinstance(line, str) else line)])
        with pytest.raises(SystemExit) as end:
            sys.exit(ppo.main())
        return end.value.code or 0

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield main
    for s, handler in before.items():
        signal.signal(s, handler)


def flags(args):
    """The command line of these settings, whatever is tuned."""
    config = Path(args.run_root) / f"{args.run_name}.json"
    run.write_json(config, asdict(args))
    return ["--config", str(config), "--run-root", args.run_root, "--run-name", args.run_name]


@pytest.mark.parametrize("where", [in_rollout, in_update, in_evaluation])
def test_a_run_that_a_signal_stopped_continues_as_if_nothing_had_been(whole, tmp_path, main, where):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        where(patch)
        assert main(flags(replace(whole[1], run_root=str(tmp_path), run_name="run"))) == 143
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    snapshot = run.load_checkpoint(folder / "interrupted.pt")
    assert snapshot["step"] == {in_rollout: HALF, in_update: HALF, in_evaluation: BATCH}[where]
    assert not (folder / "final.pt").exists()
    assert main(f"--resume {folder}") == 0
    same_runs(folder, whole[0])


def test_the_seed_decides_everything(tmp_path):
    def agent_of(name, seed):
        ppo.train(tiny(tmp_path / name, total_timesteps=HALF, checkpoint_every=0, seed=seed))
        return run.load(tmp_path / name / "final.pt")

    first, again, other = agent_of("first", 1), agent_of("again", 1), agent_of("other", 2)
    same({**first, "args": None}, {**again, "args": None})
    name = "actor.0.person.0.weight"
    assert not torch.equal(first["agent"][name], other["agent"][name])
    arrays = (one["envs"]["arrays"]["pose"] for one in (first, other))
    assert not torch.equal(*arrays)


def test_training_does_not_depend_on_how_it_is_watched(whole, tmp_path):
    folder, args, _ = whole
    watched = {"eval_every": BATCH, "eval_episodes": 1, "eval_seed": 7, "checkpoint_every": 0, "best_metric": "jerk"}
    ppo.train(replace(args, **watched, run_root=str(tmp_path), run_name="run"))
    ours, theirs = run.load(tmp_path / "run/final.pt"), run.load(folder / "final.pt")
    for name in ("agent", "optimizer", "reward_scaler", "envs", "rng"):
        same(ours[name], theirs[name], name)


class StopHereError(Exception):
    pass


@pytest.fixture
def batches(monkeypatch):
    """What the first rollout gave learn, and the agent; there training stops."""
    seen = {}

    def look(agent, optimizer, gradient, args, batch, critic_only):
        seen.update(agent=agent, optimizer=optimizer, batch=batch)
        raise StopHereError

    monkeypatch.setattr(ppo, "learn", look)
    return seen


def test_a_batch_keeps_what_was_seen_played_and_where_it_led(batches, tmp_path, monkeypatch):
    """Against what the environment itself said; episodes end in step 10, so final and first observations are among
    it."""
    played, made, step = [], [], environment.SocNavGrid.step

    def spy(self, action):
        result = step(self, action)
        if self.training:
            played.append(copy.deepcopy((action, *result)))
        return result

    def short(*args, **kwargs):
        world = short_world(*args, **kwargs)
        world.limit = world.limit.clamp(max=10)
        return world

    def make_training(*args, **kwargs):
        vec = make(*args, **kwargs)
        made.append(copy.deepcopy(vec.reset(seed=1)[0]))
        return vec

    make = envs.make_training
    monkeypatch.setattr(envs, "make_training", make_training)
    monkeypatch.setattr(environment, "load_world", short)
    monkeypatch.setattr(environment.SocNavGrid, "step", spy)
    with pytest.raises(StopHereError):
        ppo.train(tiny(tmp_path / "run", init_log_std=0.5))
    agent, batch = batches["agent"], batches["batch"]

    def see(obs):
        return agent.see(ppo.tensors(obs, torch.device("cpu")))

    before, done_at = made[0], []
    for t, (action, obs, reward, terminated, truncated, info) in enumerate(played):
        done = terminated | truncated
        assert torch.equal(batch.obs[t], see(before))
        led_to = see(obs)
        if done.any():
            done_at.append(t)
            led_to[done] = see(info["final_obs"])[done]
            assert not torch.equal(led_to, see(obs))
        assert torch.equal(batch.next_obs[t], led_to)
        assert batch.reward[t].tolist() == reward.tolist()
        assert batch.terminated[t].tolist() == terminated.tolist()
        assert batch.done[t].tolist() == done.tolist()
        np.testing.assert_allclose(action, agent.bounded(batch.action[t]), atol=1e-6)
        before = obs
    assert len(played) == len(batch.obs) == 16
    assert 9 in done_at
    assert batch.action.abs().max() > 1.5  # as it was drawn, unclipped


def test_rewards_are_scaled_if_asked_for(batches, tmp_path):
    rewards = {}
    for scaled in (False, True):
        with pytest.raises(StopHereError):
            ppo.train(tiny(tmp_path / str(scaled), norm_reward=scaled, gamma=0.9))
        rewards[scaled] = batches["batch"].reward
    expected = ppo.RewardScaler(8, 0.9)(rewards[False], batches["batch"].done)
    torch.testing.assert_close(rewards[True], expected)
    assert not torch.allclose(expected, rewards[False])


def test_episodes_are_counted_where_they_ended(whole):
    for episode in lines(whole[0] / "episodes.jsonl"):
        assert episode["step"] % 8 == 0
        assert 0 < episode["step"] <= FULL
        assert episode["success"] in (True, False)


@pytest.mark.parametrize("name", ["simple", "punish_action", "route_completion"])
def test_reward_reaches_training(name, batches, tmp_path, main, monkeypatch):
    made, make = [], envs.make_training
    monkeypatch.setattr(envs, "make_training", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[0])
    with pytest.raises(StopHereError):
        main([*flags(tiny(tmp_path / "run")), "--reward", name])
    assert made[0].weights == metrics.REWARDS[name]
    args = json.loads((tmp_path / "run/config.json").read_text())["args"]
    assert (args["reward"], args["env_kwargs"]["reward"]) == (name, name)


def test_reward_weights_reach_training_and_not_evaluation(batches, tmp_path, main, monkeypatch):
    weights = {**metrics.REWARDS["simple"], "goal": 7.0, "stagnation": -0.5}
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(weights))
    made, init = {}, environment.SocNavGrid.__init__

    @functools.wraps(init)
    def spy(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made[self.training, self.split] = self.weights

    monkeypatch.setattr(environment.SocNavGrid, "__init__", spy)
    with pytest.raises(StopHereError):
        main([*flags(tiny(tmp_path / "run")), "--reward", "simple", "--reward-weights", str(file)])
    assert made[True, "train"] == weights
    assert made[False, "validation"] == metrics.REWARDS["simple"]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["args"]["reward_weights"] == config["args"]["env_kwargs"]["reward_weights"] == str(file)
    assert config["parents"][str(file)]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_policy_is_measured_without_the_weights_of_its_training(tmp_path, main):
    """Evaluations pay `simple` whatever training paid."""
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(metrics.REWARDS["simple"]))
    settings = {"reward": "simple", "reward_weights": str(file), "total_timesteps": BATCH}
    ppo.train(tiny(tmp_path / "run", **settings))
    file.unlink()
    assert main(f"--evaluate {tmp_path}/run --eval-episodes 1") == 0


@pytest.fixture
def judged(monkeypatch):
    """Evaluations play nothing and say what is in the list, one after the other."""
    rates = []

    def evaluate(policy, args, split, video):
        assert split == "validation"
        success, failure = rates.pop(0)
        about = {"episodes": 2, "mean_return": 0.0, "mean_length": 9.0, "metrics": {}, "per_episode": []}
        return {**about, "success_rate": success, "failure_rate": failure}

    monkeypatch.setattr(rollout, "evaluate", evaluate)
    return rates


STOPPING = [GOOD, GOOD, POOR, GOOD, GOOD, GOOD, GOOD, GOOD, GOOD]


@pytest.mark.parametrize(("stop", "updates"), [(True, 6), (False, 9)])
def test_a_run_ends_at_convergence_if_asked_to(judged, tmp_path, stop, updates):
    judged += STOPPING
    settings = {"total_timesteps": 9 * BATCH, "eval_every": BATCH, "update_epochs": 1, "checkpoint_every": 0}
    summary = ppo.train(tiny(tmp_path / "run", stop_at_convergence=stop, **settings))
    assert (summary["status"], summary["steps"]) == ("completed", updates * BATCH)
    assert summary["converged_at_step"] == 4 * BATCH
    assert len(lines(tmp_path / "run/evaluations.jsonl")) == updates
    assert run.load(tmp_path / "run/final.pt")["step"] == updates * BATCH


def test_convergence_counts_evaluations_from_before_a_resume(judged, tmp_path):
    judged += STOPPING
    settings = {"eval_every": BATCH, "update_epochs": 1, "stop_at_convergence": True}
    args = tiny(tmp_path / "run", **settings, total_timesteps=5 * BATCH)
    assert ppo.train(args)["converged_at_step"] is None
    summary = ppo.train(replace(args, resume=str(tmp_path / "run"), run_name=None, total_timesteps=9 * BATCH))
    assert (summary["steps"], summary["converged_at_step"]) == (6 * BATCH, 4 * BATCH)


def test_a_run_that_converged_is_complete(judged, tmp_path):
    judged += [GOOD] * 9
    args = tiny(tmp_path / "run", total_timesteps=9 * BATCH, eval_every=BATCH, stop_at_convergence=True)
    assert ppo.train(args)["steps"] == 3 * BATCH
    with pytest.raises(UserError, match="complete"):
        ppo.train(replace(args, resume=str(tmp_path / "run"), run_name=None))


@pytest.mark.parametrize("num_steps", [13, 31, 62, 100])
def test_evaluations_are_twice_as_far_apart_after_a_while(judged, tmp_path, monkeypatch, num_steps):
    """Every 500 steps until 3,000, then every 1,000, and at the end; a thousandth of the defaults."""
    args = ppo.Args()
    assert (args.eval_every, args.eval_slow_after) == (500_000, 3_000_000)
    judged += [POOR] * 100
    monkeypatch.setattr(ppo, "collect", lambda agent, vec, args, obs, *others: (None, obs, []))
    monkeypatch.setattr(ppo, "learn", lambda *args, **kwargs: {})
    batch = 8 * num_steps
    settings = {"num_steps": num_steps, "minibatch_size": 8, "total_timesteps": 6_400, "checkpoint_every": 0}
    ppo.train(tiny(tmp_path / "run", eval_every=500, eval_slow_after=3_000, **settings))
    last = 6_400 // batch * batch
    marks = [500, 1_000, 1_500, 2_000, 2_500, 3_000, 4_000, 5_000, 6_000, last]
    expected = dict.fromkeys(math.ceil(mark / batch) * batch for mark in marks if mark <= last)
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == list(expected)


def test_without_an_interval_only_the_end_is_evaluated(judged, tmp_path):
    judged += [POOR]
    ppo.train(tiny(tmp_path / "run", eval_every=0, total_timesteps=HALF))
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [HALF]


@pytest.mark.parametrize(("metric", "best"), [("success_rate", 2), ("failure_rate", 3)])
def test_the_best_policy_is_kept_and_exported(judged, tmp_path, monkeypatch, metric, best):
    judged += [(0.5, 0.5), (0.6, 0.4), (0.5, 0.1), (0.5, 0.3)]
    exported = {}

    def export(agent, obs, path, kind, env_kwargs):
        weights = {name: x.clone() for name, x in agent.state_dict().items()}
        exported.update(agent=weights, inputs=tuple(obs), kind=kind, path=path)
        path.write_bytes(b"onnx")

    monkeypatch.setattr(run, "export_onnx", export)
    summary = ppo.train(tiny(tmp_path / "run", eval_every=BATCH, best_metric=metric))
    kept = run.load(tmp_path / "run/best.pt")
    assert kept["step"] == summary["best"]["step"] == best * BATCH
    same(kept["agent"], run.load(tmp_path / f"run/checkpoints/step_{best * BATCH:09d}.pt")["agent"])
    same(dict(exported["agent"]), dict(kept["agent"]))
    assert exported["inputs"] == ppo.SEEN
    assert (exported["kind"], exported["path"]) == ("policy", tmp_path / "run/policy.onnx")
    assert not torch.equal(kept["agent"]["log_std"], run.load(tmp_path / "run/final.pt")["agent"]["log_std"])


def test_a_run_starts_from_a_pretrained_policy(whole, batches, tmp_path):
    folder, args, _ = whole
    with pytest.raises(StopHereError):
        ppo.train(replace(args, pretrained=str(folder), seed=5, run_root=str(tmp_path), run_name="run"))
    ours, best = batches["agent"].state_dict(), run.load(folder / "best.pt")["agent"]
    for name in {*best} - ({"log_std"} if args.final_log_std is not None else set()):
        assert torch.equal(ours[name], best[name]), name
    assert batches["optimizer"].state_dict()["state"] == {}


def test_the_learning_rate_falls_and_a_scheduled_deviation_follows(whole):
    folder, args, _ = whole
    rates = [float(row["train/learning_rate"]) for row in run.read_progress(folder / "progress.csv")]
    assert rates == pytest.approx([args.learning_rate * share for share in (1, 0.75, 0.5, 0.25)])
    steps = [run.load(folder / f"checkpoints/step_{step:09d}.pt")["agent"] for step in range(BATCH, FULL + 1, BATCH)]
    if args.final_log_std is not None:
        expected = [args.init_log_std + k / 4 * (args.final_log_std - args.init_log_std) for k in range(4)]
        assert [agent["log_std"][0].item() for agent in steps] == pytest.approx(expected)
    if args.critic_warmup:
        torch.manual_seed(args.seed)
        vec = envs.make_vec("SocNavGrid-v0", 8, **PLACE)
        start = ppo.make_grid_agent(vec, args).state_dict()
        changed = {name for name in start if name != "log_std" and not torch.equal(start[name], steps[0][name])}
        assert changed == {name for name in start if name.startswith("critic")}
        assert not torch.equal(steps[0]["actor.1.0.weight"], steps[1]["actor.1.0.weight"])


def test_the_bicycle_trains(tmp_path, main):
    args = tiny(tmp_path / "run", total_timesteps=BATCH, env_kwargs={**PLACE, "robot": "bicycle"})
    assert main(flags(args)) == 0
    agent = run.load(tmp_path / "run/final.pt")["agent"]
    assert agent["scale"].tolist() == pytest.approx([1.0, 0.78])
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"


def test_a_dry_run_is_one_update_with_all_files(tmp_path, main):
    args = tiny(tmp_path / "run", total_timesteps=9 * BATCH, eval_episodes=50, checkpoint_every=0)
    assert main([*flags(args), "--dry-run"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["best"]["episodes"]) == (BATCH, 2)
    assert {*summary["sha256"]} == {"best.pt", "final.pt", "policy.onnx", f"checkpoints/step_{BATCH:09d}.pt"}


# Measuring


def test_evaluating_a_run_prints_and_writes_what_each_scenario_saw(whole, tmp_path, main, capsys):
    folder, args, _ = whole
    assert main(f"--evaluate {folder} --eval-episodes 3 --json {tmp_path}/result.json") == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "result.json").read_text())
    assert printed[0].startswith(f"{folder}: 3 episodes: return ")
    ((name, row),) = result["per_scenario"].items()
    assert (name, row["episodes"]) == (PLACE["scenario"], 3)
    rates = rf"success {row['success_rate']:.3f}, failure {row['failure_rate']:.3f}"
    assert printed[1].split() == f"{name} 3 episodes, {rates}".split()
    assert result["success_rate"] == row["success_rate"]
    assert result["sha256"] == hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest()
    assert [one["scenario"] for one in result["per_episode"]] == [name] * 3

    policy = run.load(folder / "best.pt")
    vec = envs.make_vec("SocNavGrid-v0", 5, training=False, split="test", **PLACE)
    agent = ppo.make_grid_agent(vec, args)
    agent.load_state_dict(policy["agent"])
    expected = rollout.rollout(rollout.Deployed(agent), vec, 3, args.eval_seed)
    assert result["per_episode"] == json.loads(json.dumps(expected))


def test_scripted_controllers_are_measured(full_length, tmp_path, main, capsys):
    """In a street with one pedestrian who comes towards them."""
    success = {}
    for name in controllers.CONTROLLERS:
        place = "--eval-episodes 4 --env-kwargs scenario francis2023_frontal_approach"
        assert main(f"--evaluate {name} {place} --json {tmp_path}/{name}.json") == 0
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert (result["policy"], result["env_kwargs"]) == (name, {"scenario": "francis2023_frontal_approach"})
        assert result["per_scenario"]["francis2023_frontal_approach"]["episodes"] == 4
        success[name] = [one["success"] for one in result["per_episode"]]
        assert result["metrics"]["jerk"] > 0
    assert {*success} == {"pursuit", "pursuit-stop"}


def test_doing_nothing_is_measured(tmp_path, main):
    line = f"--evaluate zero --eval-episodes 2 --env-kwargs scenario {PLACE['scenario']} --json {tmp_path}/zero.json"
    assert main(line) == 0
    result = json.loads((tmp_path / "zero.json").read_text())
    assert (result["success_rate"], result["mean_length"], result["metrics"]["jerk"]) == (0, LIMIT, 0)


def test_an_exported_policy_is_measured(full_length, tmp_path, main, monkeypatch):
    """--help says that --evaluate takes PATH.onnx: it plays as the policy file that it came from."""
    monkeypatch.setattr(environment, "load_world", short_world)
    ppo.train(tiny(tmp_path / "run", total_timesteps=BATCH))
    place = "".join(f" {name} {value}" for name, value in PLACE.items())
    results = []
    for path in ("best.pt", "policy.onnx"):
        line = f"--evaluate {tmp_path}/run/{path} --eval-episodes 2 --json {tmp_path}/result.json --env-kwargs{place}"
        assert main(line) == 0
        results.append(json.loads((tmp_path / "result.json").read_text()))
    assert results[0]["mean_return"] == pytest.approx(results[1]["mean_return"], abs=1e-3)


ONE_PLACE = "--eval-episodes 1 --env-kwargs scenario francis2023_blind_corner"  # as the script's docstring has it


def test_a_run_is_measured_in_one_place_of_the_test_split(whole, main, capsys):
    assert main(f"--evaluate {whole[0]} {ONE_PLACE}") == 0
    assert "francis2023_blind_corner" in capsys.readouterr().out


def test_a_controller_is_measured_in_one_place_of_the_test_split(main, capsys):
    assert main(f"--evaluate pursuit {ONE_PLACE}") == 0
    assert "francis2023_blind_corner" in capsys.readouterr().out


def test_settings_for_evaluation_alone_are_for_evaluation_alone(tmp_path):
    ours = {"robot_radius": 0.5}
    ppo.train(tiny(tmp_path / "run", total_timesteps=BATCH, eval_env_kwargs=ours))
    (line,) = lines(tmp_path / "run/evaluations.jsonl")
    assert line["env_kwargs"] == {**PLACE, "reward": "route_completion", **ours}
    assert run.load(tmp_path / "run/final.pt")["env_kwargs"] == {**PLACE, "reward": "route_completion"}


def test_a_run_in_another_directory_still_resumes(whole, tmp_path, main):
    folder = tmp_path / "moved"
    shutil.copytree(whole[0], folder)
    for name in ("final.pt", f"checkpoints/step_{FULL:09d}.pt", "summary.json"):
        (folder / name).unlink()
    assert main(f"--resume {folder}") == 0
    same_runs(folder, whole[0])


@pytest.mark.slow
def test_it_learns_to_drive(full_length, tmp_path):
    """500,000 steps on the whole training split with the settings as they are, a twentieth of the default: the last 100
    episodes. What does not learn stays near 0."""
    args = ppo.Args.tuned(total_timesteps=500_000, eval_every=0, eval_episodes=27, checkpoint_every=0, threads=1)
    ppo.train(replace(args, run_root=str(tmp_path), run_name="run"))
    success = [line["success"] for line in lines(tmp_path / "run/episodes.jsonl")[-100:]]
    print(f"success rate of the last 100 episodes: {np.mean(success):.2f}", file=sys.stderr)
    assert np.mean(success) >= 0.4
