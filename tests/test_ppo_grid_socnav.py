"""ppo_grid_socnav.py: its features, the policy over them, what it collects, and what is its own in a run.

test_ppo.py proves the functions that all scripts share, test_resume.py that a run continues bit for bit."""

import functools
import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import lines, make_quick, placeholder_export
from torch.distributions import Independent, Normal

import envs
import ppo_continuous
import ppo_grid_socnav as ppo
from envs import evaluation, run
from envs.socnav import environment, features, metrics

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
    agent = ppo.GridAgent(environment.observation_space(channels, size), -high, high, channels, 2.0, args).double()
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


def test_route_by_hand():
    """The waypoint in units of 5 m and at most one, the point 3 m ahead in units of 3 m; nothing else."""
    waypoints = {(4.0, 3.0): (0.8, 0.6), (8.0, -6.0): (0.8, -0.6), (0.0, 1.0): (0.0, 0.2), (0.0, 0.0): (0.0, 0.0)}
    for (x, y), waypoint in waypoints.items():
        for other in (0.0, 0.7):  # the next waypoint, and the rest of the route
            goal = torch.tensor([[x / 10, y / 10, other, other, 0.3, -0.15, other]])
            assert features.route_features(goal)[0].tolist() == pytest.approx([*waypoint, 1.0, -0.5])


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


def test_rays_start_ahead_and_turn_left():
    """Four rays along the diagonals, 0.7 cells a step; walls 3 cells ahead, 5 to the left, 2 to the right."""
    grid, indices = torch.zeros(1, 1, 32, 32, dtype=torch.uint8), features.ray_indices(32, 4)
    grid[..., 19:] = 1
    grid[..., 21:, :] = 1
    grid[..., :14, :] = 1
    assert features.ray_proximity(grid, indices)[0].tolist() == pytest.approx([12 / 16, 9 / 16, 13 / 16, 13 / 16])


@pytest.mark.parametrize(("size", "packed_size"), [(64, 8), (36, 5)])
def test_packing_loses_nothing(size, packed_size):
    cells = (torch.rand(3, 5, size) < 0.5).to(torch.uint8)
    packed = features.pack_bits(cells)
    assert packed.shape == (3, 5, packed_size)
    assert 0 <= packed.min() < packed.max() <= 255
    assert torch.equal(features.unpack_bits(packed.float(), size), cells.float())


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


@pytest.mark.parametrize("encoder", ENCODERS)
def test_pedestrians_are_a_set(encoder):
    """Their order, empty slots, room for more of them and those behind the nearest make no difference."""
    agent, large = make_agent(encoder), make_agent(encoder, num_pedestrians=9)
    large.load_state_dict(agent.state_dict())
    for count in range(PEDESTRIANS + 1):
        obs = observations(6, count=count)
        expected = outputs(agent, obs)
        torch.testing.assert_close(outputs(large, obs), expected)
        junk = observations(6, seed=1, count=64)["pedestrians"]
        junk[:, :count] = obs["pedestrians"][:, :count].flip(1)
        torch.testing.assert_close(outputs(agent, {**obs, "pedestrians": junk}), expected)
    junk[:, 0, 0] += 0.01
    assert (outputs(agent, {**obs, "pedestrians": junk}) != expected).any(1).all()
    more = {**obs, "count": torch.full((6, 1), 64, dtype=torch.uint8), "pedestrians": junk}
    assert torch.equal(outputs(agent, more), outputs(agent, {**obs, "pedestrians": junk}))
    assert make_agent(encoder, num_pedestrians=1000).num_pedestrians == 64


@pytest.mark.parametrize(
    ("encoder", "read"), [("rays", {"obstacles", "near"}), ("cnn", {"obstacles", "near", "pedestrians"})]
)
def test_channels_that_an_encoder_reads(encoder, read):
    agent, obs = make_agent(encoder), observations(6)
    matter = set()
    for k, name in enumerate(CHANNELS):
        grid = obs["grid"].clone()
        grid[:, k] = 1 - grid[:, k]
        if (outputs(agent, {**obs, "grid": grid}) != outputs(agent, obs)).any():
            matter.add(name)
    assert matter == read


def test_convolutions_read_the_grid_and_its_mirror_image():
    agent, obs, images = make_agent("cnn"), observations(2), []
    agent.actor[0].cnn.register_forward_pre_hook(lambda module, inputs: images.append(inputs[0]))
    outputs(agent, obs)
    planes = obs["grid"][:, [0, 1, 3]].double()
    assert torch.equal(images[0], torch.cat([planes, planes.flip(2)]))


def test_the_agent_is_a_normal_distribution():
    agent = make_agent()
    encoded, action = agent.encode_obs(observations(20)), torch.randn(20, 2).double()
    policy = Independent(Normal(agent.action_mean(encoded), agent.log_std.exp()), 1)
    logprob, entropy, value = agent.evaluate_actions(encoded, action)
    torch.testing.assert_close(logprob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy()[0])
    assert torch.equal(value, agent.value(encoded))
    with torch.no_grad():
        samples = agent.sample(encoded[:1].expand(40_000, -1))
    torch.testing.assert_close(samples.mean(0), policy.mean[0].detach(), rtol=0, atol=0.05)
    torch.testing.assert_close(samples.std(0), agent.log_std.detach().exp(), rtol=0.03, atol=0)


def test_actions_are_scaled_to_the_bounds_of_the_robot():
    vec = envs.make_vec("SocNavGrid-v0", 4, seed=0, robot="bicycle", **PLACE)
    agent = ppo.make_grid_agent(vec, ppo.Args(init_log_std=-1.5))
    assert agent.scale_action(torch.tensor([5.0, -5.0])).tolist() == pytest.approx([1.0, -0.78])
    assert agent.scale_action(torch.tensor([0.5, 0.5])).tolist() == pytest.approx([0.5, 0.39])
    assert agent.log_std.tolist() == [-1.5, -1.5]
    assert evaluation.DeterministicPolicy(agent)(vec.reset(seed=1)[0]) == pytest.approx(0, abs=0.1)  # untrained
    agent.action_bias.fill_(1.0)
    agent.action_high.fill_(1.2)
    assert agent.scale_action(torch.tensor([0.1, 0.5])).tolist() == pytest.approx([1.1, 1.2])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_action_does_not_depend_on_its_batch(encoder):
    agent, obs = make_agent(encoder).float(), observations(33)
    obs = {name: x.numpy().astype(np.float32 if x.is_floating_point() else np.uint8) for name, x in obs.items()}
    policy = evaluation.DeterministicPolicy(agent)
    whole = policy(obs)
    assert whole.dtype == np.float32
    for size in (1, 5):
        parts = [policy({name: x[i : i + size] for name, x in obs.items()}) for i in range(0, 33, size)]
        assert np.array_equal(whole, np.concatenate(parts))


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


@pytest.fixture
def quick(monkeypatch):
    """No export, and episodes of at most 25 steps."""
    make_quick(monkeypatch)


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


def test_auto_is_a_number_of_environments_that_suits_the_device(monkeypatch):
    """Seen in the settings that setup() gets."""
    seen = []

    def setup(args, distributed):
        seen.append(args.num_envs)
        raise RuntimeError("stop")

    monkeypatch.setattr(ppo, "setup", setup)
    for args, on_gpu in (({}, False), ({}, True), ({"device": "auto"}, True), ({"num_envs": 512}, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        with pytest.raises(RuntimeError, match="stop"):
            ppo.train(ppo.Args(**args))
    assert seen == [256, 256, 2048, 512]


def test_presets():
    rays, cnn = ppo.Args.from_preset(), ppo.Args.from_preset(grid_encoder="cnn", seed=3)
    assert (rays.grid_encoder, rays.final_log_std, rays.env_kwargs["grid_channels"]) == ("rays", -2.0, "near")
    assert (cnn.grid_encoder, cnn.learning_rate, cnn.total_timesteps, cnn.seed) == ("cnn", 5e-4, 1_000_000, 3)
    assert ppo.Args.from_preset("cnn", learning_rate=1e-4) == replace(cnn, learning_rate=1e-4, seed=1)


@pytest.fixture
def made(monkeypatch):
    """Environments by (training, split), as a run makes them."""
    made, init = {}, environment.SocNavGrid.__init__

    @functools.wraps(init)
    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made[self.training, self.split] = self

    monkeypatch.setattr(environment.SocNavGrid, "__init__", remember)
    return made


def test_the_reward_is_of_training_alone(quick, made, tmp_path):
    """A file overrides its weights; evaluation pays `simple`, and so a policy is evaluated without the file."""
    for name in ("simple", "punish_action", "route_completion"):
        ppo.train(tiny(tmp_path / name, reward=name))
        assert made[True, "train"].weights == metrics.REWARDS[name]
        assert made[False, "validation"].weights == metrics.REWARDS["simple"]
    file = tmp_path / "weights.json"
    weights = {**metrics.REWARDS["simple"], "goal": 7.0, "stagnation": -0.5}
    file.write_text(json.dumps(weights))
    ppo.train(tiny(tmp_path / "run", reward="simple", reward_weights=str(file)))
    assert made[True, "train"].weights == weights
    assert made[False, "validation"].weights == metrics.REWARDS["simple"]
    parent = json.loads((tmp_path / "run/config.json").read_text())["parents"][str(file)]
    assert parent["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()
    args = ppo.Args.from_checkpoint(evaluation.read_policy(str(tmp_path / "run")))
    assert evaluation.evaluate(evaluation.ZeroPolicy(2), args)["episodes"] == 2


def test_evaluations_are_twice_as_far_apart_after_three_million_steps(quick, tmp_path, monkeypatch):
    def skip(agent, vec, obs, step, args):
        return ppo.Rollout(*[torch.zeros(1, 1)] * 6), obs, []

    monkeypatch.setattr(ppo, "collect_rollout", skip)
    monkeypatch.setattr(ppo, "make_batch", lambda *args: {})
    monkeypatch.setattr(ppo, "ppo_update", lambda *args: {})
    settings = {"num_steps": 31_250, "minibatch_size": 10, "total_timesteps": 5_500_000, "checkpoint_every": 0}
    ppo.train(tiny(tmp_path / "run", eval_every=500_000, norm_reward=False, eval_episodes=1, **settings))
    steps = [evaluation["step"] for evaluation in lines(tmp_path / "run/evaluations.jsonl")]
    assert [step / 1e6 for step in steps] == [0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 5.5]


def test_metrics_are_declared_and_known_to_be_better_when_small():
    vec = envs.make_vec("SocNavGrid-v0", 2, seed=0, **PLACE)
    vec.episode_length[:] = 10_000  # the next step is the last
    info = vec.step(np.zeros((2, 2), np.float32))[-1]
    ours = {name for name in info if f"_{name}" in info} - {"final_obs", "episode", "is_success", "is_failure"}
    assert ours - {"scenario"} == {*vec.measures} - {"collision_rate"}
    assert {*vec.measures} - {"path_efficiency", "snqi"} <= evaluation.LOWER_IS_BETTER
    assert not {"path_efficiency", "snqi"} & evaluation.LOWER_IS_BETTER


# Mistakes


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Policy files of other settings, and the run of a policy."""
    folder = tmp_path_factory.mktemp("policies")
    others = {
        "channels": {"env_kwargs": {**PLACE, "grid_channels": "obstacles"}},
        "size": {"env_kwargs": {**PLACE, "grid_size": 32}},
        "bicycle": {"env_kwargs": {**PLACE, "robot": "bicycle"}},
        "rays": {"num_rays": 24},
        "cnn": {"grid_encoder": "cnn"},
    }
    for name, settings in others.items():
        args = tiny(folder / name, **settings)
        agent = ppo.make_grid_agent(envs.make_vec(args.env_id, 1, **args.env_kwargs), args)
        run.save_pt(folder / f"{name}.pt", run.policy_contents("policy", "ppo_grid_socnav", args, agent, 0))
    args = ppo_continuous.Args(env_id="Pendulum-v1")
    agent = ppo_continuous.make_agent(envs.make_vec("Pendulum-v1", 1), args)
    run.save_pt(folder / "pendulum.pt", run.policy_contents("policy", "ppo_continuous", args, agent, 0))
    (folder / "lacking.json").write_text('{"time": 0.0}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "export_onnx", placeholder_export)
        ppo.train(tiny(folder / "run"))
    return folder


MISTAKES = {
    "--pretrained bicycle.pt": r"bicycle\.pt: its actions have another range; give the --env-kwargs",
    "--pretrained channels.pt": r"channels\.pt: was trained with grid_channels obstacles, not near; set it with --env",
    "--pretrained size.pt": r"size\.pt: was trained with grid_size 32, not (64|the default); set it with --env-kwargs",
    "--pretrained rays.pt": r"rays\.pt: does not fit this agent .*actor\.1\.0\.weight.*; use the settings",
    "--pretrained cnn.pt": r"cnn\.pt: does not fit this agent .*actor\.1\.0\.weight.*; use the settings",
    "--pretrained pendulum.pt": r"pendulum\.pt: a policy for Pendulum-v1, not SocNavGrid-v0; give its --env-id",
    "--env-kwargs grid_channels combined": r"needs a grid channel obstacles or near, not combined",
    "--env-kwargs scenario francis2023_blind_corner": r"francis2023_blind_corner is kept for the test split",
    "--env-kwargs device cpu": r"--env-kwargs device: use --device",
    "--reward speed": r"SocNavGrid-v0: reward must be one of simple, .*snqi_step, not 'speed'",
    "--reward-weights missing.json": r"missing\.json: cannot be read as a JSON object \(.*No such file",
    "--reward simple --reward-weights lacking.json": r"lacking\.json: .*must have pedestrian_contact, .*goal; add what",
    "--eval-episodes 0": r"0 evaluation episodes means all, but SocNavGrid-v0 has an unlimited number; give a number",
    "--cnn-channels 4 4 4 4": r"--num-rays must be even, .* and --cnn-channels three numbers",
    "--num-envs auto --minibatch-size 100": r"--minibatch-size must .*divide num_envs \* num_steps = 4096",
    "--resume run --total-timesteps 256 --reward simple": r"--reward was 'route_completion' in run and cannot change",
    "--resume run --total-timesteps 256 --grid-encoder cnn": r"--grid-encoder was 'rays' in run and cannot change",
    "--resume run --total-timesteps 4096 --num-envs auto": r"--num-envs was 8 in run and cannot change",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_what_cannot_work_is_refused_in_one_line(line, refused, policies, tmp_path, monkeypatch):
    shutil.copytree(policies, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    args = tiny(tmp_path / "new")
    Path("tiny.json").write_text(json.dumps(asdict(args)))
    refused(line if "--resume" in line else f"--config tiny.json {line}", MISTAKES[line])


@pytest.mark.slow
def test_it_learns_to_drive(tmp_path):
    """500,000 steps on the whole training split with the default settings, a twentieth of the default: the last 100
    episodes. What does not learn stays near 0."""
    args = ppo.Args.from_preset(total_timesteps=500_000, eval_every=0, eval_episodes=27, checkpoint_every=0, threads=1)
    ppo.train(replace(args, run_root=str(tmp_path), run_name="run"))
    success = [episode["success"] for episode in lines(tmp_path / "run/episodes.jsonl")[-100:]]
    assert np.mean(success) >= 0.4
