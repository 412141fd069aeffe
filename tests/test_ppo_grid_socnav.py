"""ppo_grid_socnav.py: its features, the policy over them, what it collects, and what is its own in a run.

test_ppo.py proves the functions that all scripts share, test_resume.py that a run continues bit for bit."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import lines

import envs
import ppo_grid_socnav as ppo
from envs import evaluation
from envs.socnav import environment, features

SCRIPT = ppo
ENCODERS = ("rays", "cnn")
CHANNELS = ("obstacles", "pedestrians", "combined", "near")
SIZE, PEDESTRIANS, RAYS = 16, 4, 12
PLACE = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
MIRROR = torch.tensor([1.0, -1.0])
BATCH = 128  # steps of an iteration of a tiny run


def observations(n, channels=CHANNELS, size=SIZE, seed=0, count=None):
    """Random observations in float64; pedestrians are up to 8 m away."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    counts = torch.randint(65, (n, 1), generator=generator) if count is None else torch.full((n, 1), count)
    pedestrians = uniform(n, 64, 4) * torch.tensor([0.3, 0.3, 1, 1]) * (torch.arange(64) < counts)[..., None]
    grid = torch.rand(n, len(channels), size, size, generator=generator) < 0.2
    return {
        "robot": uniform(n, 4), "goal": uniform(n, 7), "pedestrians": pedestrians, "count": counts.to(torch.uint8),
        "grid": grid.to(torch.uint8),
    }  # fmt: skip


def mirrored(obs):
    """What the robot would observe if left and right were swapped."""
    return {
        "robot": obs["robot"] * MIRROR.repeat(2),
        "goal": obs["goal"] * torch.cat([MIRROR.repeat(3), torch.ones(1)]),
        "pedestrians": obs["pedestrians"] * MIRROR.repeat(2),
        "count": obs["count"],
        "grid": obs["grid"].flip(2),
    }


def make_agent(encoder="rays", channels=CHANNELS, size=SIZE, num_pedestrians=PEDESTRIANS):
    """An agent in float64 whose actions reach their bounds."""
    torch.manual_seed(0)
    args = ppo.Args(
        grid_encoder=encoder, cnn_channels=(4, 4, 4), num_rays=RAYS, num_pedestrians=num_pedestrians,
        pedestrian_hidden=8, hidden_sizes=(16,),
    )  # fmt: skip
    high = np.array([1.0, 0.5], np.float32)
    agent = ppo.GridAgent(environment.observation_space(channels, size), -high, high, 2.0, args).double()
    with torch.no_grad():
        agent.actor[1][-1].weight.mul_(1 / outputs(agent, observations(50, channels, size, seed=9))[:, :2].std())
        agent.log_std.copy_(torch.tensor([-0.3, 0.4]))
    return agent


@torch.no_grad()
def outputs(agent, obs):
    """Mean action and value, (n, 3)."""
    encoded = agent.encode_obs(obs)
    return torch.cat([agent.action_mean(encoded), agent.value(encoded)[:, None]], dim=1)


# Features


def test_pedestrians_equal_a_plain_loop():
    """The closest approach within 4 s is searched in steps of 1 ms. Absent pedestrians, whose slots may hold anything,
    and those more than 8 m away are zero."""
    rng, present = np.random.default_rng(0), 0
    obs, count = rng.uniform(-1, 1, (20, 5, 4)) * [0.5, 0.5, 1, 1], rng.integers(0, 6, (20, 1))
    robot_speed = rng.uniform(0, 2, (20, 1))
    found = features.pedestrian_features(*(torch.as_tensor(x) for x in (obs, count, robot_speed))).numpy()
    times = np.arange(0, 4.0005, 0.001)
    for i in range(20):
        for k in range(5):
            position, velocity = 16 * obs[i, k, :2], 2 * obs[i, k, 2:] - [robot_speed[i, 0], 0]  # m, m/s
            if k >= count[i, 0] or np.hypot(*position) >= 8:
                assert not found[i, k].any()
                continue
            present += 1
            distances = np.hypot(*(position[:, None] + velocity[:, None] * times))
            closest = distances.argmin()
            proximity = [np.exp(-distances[0] / 2), np.exp(-distances[closest]), times[closest] / 4]
            expected = [*position / 4, *velocity, *proximity, 1]
            np.testing.assert_allclose(found[i, k], expected, atol=1e-3)
    assert present > 20


def proximity_by_plain_loop(plane, num_rays):
    """Ray by ray and cell by cell from the robot outward, up to the first occupied one."""
    reach, found = len(plane) // 2, []
    for k in range(num_rays):
        angle, proximity = 2 * math.pi * (k + 0.5) / num_rays, 0.0
        for step in range(reach):
            x, y = ((step + 0.5) * f(angle) + reach for f in (math.cos, math.sin))
            if plane[math.floor(y), math.floor(x)]:
                proximity = 1 - step / reach
                break
        found.append(proximity)
    return found


@pytest.mark.parametrize(("size", "num_rays", "density"), [(8, 4, 0.2), (16, 12, 0.1), (64, 36, 0.03), (600, 4, 0.003)])
def test_rays_equal_a_plain_loop(size, num_rays, density):
    """Also where a ray has more cells than a byte can count."""
    grid = (np.random.default_rng(0).random((6, 2, size, size)) < density).astype(np.uint8)
    found = features.ray_proximity(torch.as_tensor(grid), features.ray_indices(size, num_rays))
    expected = [[*proximity_by_plain_loop(a, num_rays), *proximity_by_plain_loop(b, num_rays)] for a, b in grid]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0.1 < np.mean(expected) < 0.9


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_grid_channel_is_read(encoder):
    channels = ("pedestrians", "combined", "near")
    agent, obs = make_agent(encoder, channels), observations(50, channels)
    before = outputs(agent, obs)
    for k in range(3):
        grid = obs["grid"].clone()
        grid[:, k] = 0
        assert (outputs(agent, {**obs, "grid": grid}) - before).abs().amax() > 1e-3


@pytest.mark.parametrize("size", [SIZE, 10])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_mirrored_features_are_those_of_the_mirrored_observation(encoder, size):
    agent, obs = make_agent(encoder, size=size), observations(20, size=size)
    encoded, expected = agent.encode_obs(obs), agent.encode_obs(mirrored(obs))
    assert encoded.shape == (20, sum(agent.actor[0].sizes))
    torch.testing.assert_close(encoded[:, agent.mirror_index] * agent.mirror_sign, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(encoded, expected)


# The policy


@pytest.mark.parametrize("size", [SIZE, 10])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_mirrored_situation_gets_the_mirrored_action(encoder, size):
    agent, obs = make_agent(encoder, size=size), observations(20, size=size)
    action = agent(*obs.values())
    assert (action.abs() > 1e-3).all()
    torch.testing.assert_close(agent(*mirrored(obs).values()), action * MIRROR)
    # which the network alone does not do
    asymmetric = agent.actor(agent.encode_obs(mirrored(obs))) - agent.actor(agent.encode_obs(obs)) * MIRROR
    assert asymmetric.abs().max() > 0.1


# Rollouts


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_rollout_equals_a_plain_loop(encoder, monkeypatch):
    """With the same actions in a twin of the environments, step by step and environment by environment. Episodes end
    in step 10, so that final and first observations are among it."""
    look_up = environment.SocNavGrid._look_up

    def short(self):
        look_up(self)
        self.place = self.place._replace(limit=self.place.limit.clamp(max=10))
        self.limit = self.place.limit.numpy()

    monkeypatch.setattr(environment.SocNavGrid, "_look_up", short)
    args = ppo.Args(grid_encoder=encoder, cnn_channels=(4, 4, 4), num_envs=8, num_steps=16, init_log_std=0.5)
    vec, twin = (envs.make_vec("SocNavGrid-v0", 8, seed=3, **PLACE) for _ in range(2))
    agent = ppo.make_grid_agent(vec, args)
    raw_obs = twin.reset(seed=3)[0]
    start = ppo.to_tensors(vec.reset(seed=3)[0], torch.device("cpu"))
    rollout, last_obs, episodes = ppo.collect_rollout(agent, vec, agent.encode_obs(start), 1000, args)

    def encode(raw, i):
        return agent.encode_obs({name: torch.as_tensor(x[i : i + 1]) for name, x in raw.items()})[0]

    ended = []
    for t in range(16):
        before = raw_obs
        action = (rollout.action[t] * agent.action_scale).clamp(agent.action_low, agent.action_high)  # its bias is 0
        raw_obs, reward, terminated, truncated, info = twin.step(action.numpy())
        assert torch.equal(rollout.reward[t], torch.as_tensor(reward))
        for i in range(8):
            done = bool(terminated[i] or truncated[i])
            assert torch.equal(rollout.obs[t, i], encode(before, i))
            assert torch.equal(rollout.next_obs[t, i], encode(info["final_obs"] if done else raw_obs, i))
            assert (rollout.terminated[t, i], rollout.done[t, i]) == (terminated[i], done)
            if done:
                ended.append((1000 + 8 * (t + 1), info["episode"]["r"][i], info["scenario"][i]))
                assert not torch.equal(rollout.next_obs[t, i], encode(raw_obs, i))
    assert torch.equal(last_obs, torch.stack([encode(raw_obs, i) for i in range(8)]))
    assert [(e["step"], e["return"], e["scenario"]) for e in episodes] == ended
    assert len(ended) >= 8
    assert rollout.action.abs().max() > 1.5  # as sampled, before clipping


# Runs


def tiny(folder, **kwargs):
    """Settings of a run of one iteration in `folder`."""
    settings = {
        "env_kwargs": PLACE, "num_envs": 8, "num_steps": 16, "minibatch_size": 64, "update_epochs": 1, "threads": 1,
        "hidden_sizes": (16,), "cnn_channels": (4, 4, 4), "pedestrian_hidden": 8, "total_timesteps": BATCH,
        "eval_episodes": 2, "run_root": str(folder.parent), "run_name": folder.name,
    }  # fmt: skip
    return ppo.Args(**{**settings, **kwargs})


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_dry_run_and_its_policy_files(encoder, tmp_path, command, monkeypatch):
    """One iteration, an evaluation of two episodes and all files. best.pt and policy.onnx act alike."""

    def sharpen(agent, stats, step):
        agent.actor[1][-1].weight.data.mul_(50)  # an untrained policy hardly acts

    monkeypatch.setattr(ppo, "check_update", sharpen)
    settings = asdict(tiny(tmp_path / "run", grid_encoder=encoder, total_timesteps=10_000, eval_episodes=50))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    status, _ = command(f"--config {tmp_path}/settings.json --run-root {tmp_path} --run-name run --dry-run")
    assert status == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["best"]["episodes"]) == ("completed", BATCH, 2)
    assert {*summary["sha256"]} == {"best.pt", "final.pt", "policy.onnx", f"checkpoints/step_{BATCH:09d}.pt"}

    checkpoint = evaluation.read_policy(str(tmp_path / "run"))
    vec = envs.make_vec("SocNavGrid-v0", 8, seed=5, **PLACE)
    policy = ppo.load_policy(checkpoint, vec)
    exported = evaluation.make_scripted_policy(str(tmp_path / "run/policy.onnx"), vec)
    rng, actions = np.random.default_rng(0), []
    for _ in range(20):
        obs = vec.step(rng.uniform(-1, 1, (8, 2)).astype(np.float32))[0]
        actions.append(policy(obs))
        np.testing.assert_allclose(exported(obs), actions[-1], rtol=0, atol=1e-5)
    assert np.std(actions, axis=(0, 1)).min() > 0.02
    inputs = onnxruntime.InferenceSession(tmp_path / "run/policy.onnx").get_inputs()
    types = {name: "tensor(uint8)" if name in ("count", "grid") else "tensor(float)" for name in obs}
    assert {x.name: x.type for x in inputs} == types


# Mistakes


@pytest.mark.slow
def test_it_learns_to_drive(tmp_path):
    """500,000 steps on the whole training split with the default settings, a twentieth of the default: the last 100
    episodes. What does not learn stays near 0."""
    args = ppo.Args.from_preset(total_timesteps=500_000, eval_every=0, eval_episodes=27, checkpoint_every=0, threads=1)
    ppo.train(replace(args, run_root=str(tmp_path), run_name="run"))
    success = [episode["success"] for episode in lines(tmp_path / "run/episodes.jsonl")[-100:]]
    assert np.mean(success) >= 0.4
