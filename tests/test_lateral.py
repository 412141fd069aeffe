"""LateralControl-v0: the official simulator bit for bit, its controllers deployed, and what the environment adds."""

import csv
import hashlib
import json
from collections import namedtuple
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import ppo_continuous as ppo
from envs import evaluation, lateral, run
from envs.lateral import EMBEDDED, ChallengeController, LateralControl, LateralControlEnv, Road, Simulator
from envs.lateral_model import Dynamics, distribution, last_position_only, random_batch
from envs.lateral_segments import Segment, load_segment, synthetic

DATA = Path(__file__).parents[2] / "shared" / "data" / "lateral"  # the challenge's own model and segments
MODEL = DATA / "tinyphysics.onnx"
needs_data = pytest.mark.skipif(not MODEL.is_file(), reason=f"the challenge's files are not in {DATA}")

State = namedtuple("State", ["roll_lataccel", "v_ego", "a_ego"])
FuturePlan = namedtuple("FuturePlan", ["lataccel", "roll_lataccel", "v_ego", "a_ego"])


def session_of(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def official_random(name):
    return np.random.RandomState(int(hashlib.md5(f"data/{name}".encode()).hexdigest(), 16) % 10**4)


class OfficialPID:
    p, i, d = 0.195, 0.100, -0.053

    def __init__(self):
        self.error_integral = self.prev_error = 0

    def update(self, target_lataccel, current_lataccel, state, future_plan):
        error = target_lataccel - current_lataccel
        self.error_integral += error
        error_diff = error - self.prev_error
        self.prev_error = error
        return self.p * error + self.i * self.error_integral + self.d * error_diff


def official_costs(segment, model, controller):
    """The challenge's simulator for one car, in its own scalar way, to the end of the segment.

    Returns lataccel_cost, jerk_cost, total_cost and the lateral accelerations and steering of all rows."""
    session, random, rows = session_of(model), official_random(segment.name), len(segment.target)
    states = list(zip(segment.roll.tolist(), segment.v.tolist(), segment.a.tolist()))
    target = segment.target.tolist()
    lat, steer = target[:20], segment.steer[:20].tolist()
    for t in range(20, rows):
        plan = FuturePlan(target[t + 1 : t + 50], *([s[k] for s in states[t + 1 : t + 50]] for k in range(3)))
        action = controller.update(target[t], lat[-1], State(*states[t]), plan)
        steer.append(float(np.clip(action if t >= 100 else segment.steer[t], -2, 2)))
        inputs = np.column_stack([steer[-20:], states[t - 19 : t + 1]])[None].astype(np.float32)
        tokens = np.digitize(np.clip(lat[-20:], -5, 5), np.linspace(-5, 5, 1024), right=True)[None].astype(np.int64)
        logits = session.run(None, {"states": inputs, "tokens": tokens})[0] / 0.8
        e = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
        sample = random.choice(1024, p=(e / np.sum(e, axis=-1, keepdims=True))[0, -1])
        new = float(np.clip(np.linspace(-5, 5, 1024)[sample], lat[-1] - 0.5, lat[-1] + 0.5))
        lat.append(new if t >= 100 else target[t])
    wanted, got = np.array(target)[100:500], np.array(lat)[100:500]
    lataccel, jerk = np.mean((wanted - got) ** 2) * 100, np.mean((np.diff(got) / 0.1) ** 2) * 100
    costs = {"lataccel_cost": lataccel, "jerk_cost": jerk, "total_cost": lataccel * 50 + jerk}
    return costs, np.array(lat), np.array(steer)


def play_pid(segments, model, rows, threads, first):
    """Lateral accelerations (S, 400) with the official controller in our simulator, `rows` cars at a time; up to step
    100, the car is put back on its target after each step."""
    road, dynamics, found = Road(segments), Dynamics(model, threads), {}
    for start in range(0, len(segments), rows):
        cars = np.arange(start, start + rows) % len(segments)
        sim = Simulator(rows, road, dynamics)
        sim.start(np.arange(rows), cars, first)
        noise = np.stack([lateral.official_noise(road.names[k], first) for k in cars])
        pids, history = [OfficialPID() for _ in cars], []
        for t in range(20, 500):
            target = road.target[cars, t]
            current = road.target[cars, t - 1] if t <= first else sim.lat[:, -1]
            steer = np.array([pid.update(*known, None, None) for pid, *known in zip(pids, target, current)])
            if t >= first:
                lat = sim.step(steer if t >= 100 else road.steer[cars, t], noise[:, t - first])
                if t < 100:
                    sim.lat[:, -1] = target
                else:
                    history.append(lat)
        found.update(zip(cars.tolist(), np.stack(history, 1)))
    return np.stack([found[k] for k in range(len(segments))])


def costs_of(segment, lat):
    lataccel = np.mean((segment.target[100:500] - lat) ** 2) * 100
    jerk = np.mean((np.diff(lat) / 0.1) ** 2) * 100
    return {"lataccel_cost": lataccel, "jerk_cost": jerk, "total_cost": lataccel * 50 + jerk}


def write_csv(folder, segment):
    """A segment as a log; the bank loses its last bits on the way through the angle."""
    angle = np.arcsin(np.clip(segment.roll / 9.81, -1, 1)).tolist()
    columns = segment.v.tolist(), segment.a.tolist(), angle, segment.target.tolist()
    steer = [*(-segment.steer).tolist(), *[""] * (len(angle) - 100)]
    with open(folder / f"{segment.name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t", "vEgo", "aEgo", "roll", "targetLateralAcceleration", "steerCommand"])
        writer.writerows([0.1 * t, *row] for t, row in enumerate(zip(*columns, steer)))


@pytest.fixture
def folder(tmp_path):
    """Five logs."""
    for segment in synthetic("train", 5):
        write_csv(tmp_path, segment)
    return str(tmp_path)


@pytest.fixture
def roads(monkeypatch):
    """roads(segments): every environment made from now on drives on these."""

    def use(segments):
        monkeypatch.setattr(lateral, "load_road", lambda *args: Road(segments))

    return use


def shortened(segment, rows):
    columns = (getattr(segment, name)[:rows] for name in ("target", "roll", "v", "a"))
    return Segment(f"{segment.name}_{rows}", *columns, segment.steer)


# The simulator


def official_rollouts():
    content = json.loads((DATA / "official_pid_rollouts.json").read_text())["rollouts"]
    return content, [load_segment(DATA / "segments" / "train" / Path(r["path"]).name) for r in content]


@needs_data
@pytest.mark.parametrize(
    ("rows", "threads", "first", "segments"),
    [
        *[(8, 1, 100, slice(8)), (3, 2, 20, slice(3, 6)), (1, 1, 20, slice(6, 7))],
        *[pytest.param(*case, slice(8), marks=pytest.mark.slow) for case in product([1, 3, 8], [1, 2], [20, 100])],
    ],
)
def test_the_official_rollouts_bit_for_bit(rows, threads, first, segments):
    expected, segments = (x[segments] for x in official_rollouts())
    found = play_pid(segments, MODEL, rows, threads, first)
    for result, segment, lat in zip(expected, segments, found, strict=True):
        assert lat[:20].tolist() == result["lataccel_first_control_steps"]
        assert lat[-1] == result["lataccel_step_499"]
        assert costs_of(segment, lat) == {name: result[name] for name in ("lataccel_cost", "jerk_cost", "total_cost")}


@needs_data
@pytest.mark.parametrize(
    ("rows", "threads", "segments"),
    [(3, 2, 3), *[pytest.param(*x, 8, marks=pytest.mark.slow) for x in [(1, 1), (3, 2)]]],
)
def test_the_environment_reports_the_official_costs(rows, threads, segments, roads):
    expected, segments = (x[:segments] for x in official_rollouts())
    roads(segments)
    vec = LateralControl(rows, training=False, split="test", action_mode="absolute", model_path=MODEL, threads=threads)
    results = evaluation.rollout(lateral.PID(), vec, len(segments), seed=3)
    for ours, official in zip(results, expected, strict=True):
        assert ours["return"] == pytest.approx(-official["total_cost"], rel=1e-9)
        for name in ("lataccel_cost", "jerk_cost", "total_cost"):
            assert ours[name] == official[name]


@pytest.fixture(scope="module")
def twin():
    """Three synthetic segments and what the official simulator makes of them with the embedded dynamics."""
    segments = synthetic("validation", 3)
    return segments, [official_costs(segment, EMBEDDED, OfficialPID()) for segment in segments]


@pytest.mark.parametrize("rows", [1, 3])
def test_an_episode_equals_the_official_loop(twin, roads, rows):
    segments, expected = twin
    roads(segments)
    vec, lat = LateralControl(rows, training=False, action_mode="absolute"), {}

    def look(playing, reward, terminated, done):
        for i in np.flatnonzero(done):
            lat[playing[i]] = vec.lat[i].copy(), vec.steer[i].copy()

    results = evaluation.rollout(lateral.PID(), vec, 3, 0, look)
    for k, (costs, official_lat, official_steer) in enumerate(expected):
        assert np.array_equal(lat[k][0], official_lat[100:500])
        assert np.array_equal(lat[k][1], official_steer[100:500])
        assert {name: results[k][name] for name in costs} == costs
        assert results[k]["score"] == -min(costs["total_cost"], 200)
        assert results[k]["return"] == pytest.approx(-costs["total_cost"], rel=1e-9)
        assert results[k]["length"] == 400


# The dynamics from a file


@needs_data
def test_the_last_position_alone_is_the_same_to_the_last_bit():
    whole = onnx.load(MODEL)
    cut = last_position_only(whole)
    assert [node.op_type for node in cut.graph.node].count("Slice") == 1
    for size in (1, 7):
        states, tokens = random_batch(size)
        expected, found = (session_of(m).run(None, {"states": states, "tokens": tokens})[0] for m in (whole, cut))
        assert found.shape == (size, 1, 1024)
        assert np.array_equal(found[:, 0], expected[:, -1])
        assert not np.array_equal(expected[:, -2], expected[:, -1])


# Controllers in the challenge's own loop


class Spy:
    """A policy that remembers what it saw."""

    def __init__(self, policy):
        self.policy, self.seen = policy, []

    def reset(self, rows, source):
        if hasattr(self.policy, "reset"):
            self.policy.reset(rows, source)

    def __call__(self, obs):
        self.seen.append(obs.copy())
        return self.policy(obs)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A network that steers about, as a run exports it."""
    torch.manual_seed(0)
    vec = LateralControl()
    agent = ppo.make_agent(vec, ppo.Args(norm_obs=True))
    obs = [vec.reset(seed=k)[0] for k in range(50)]
    agent.normalizer.update(torch.as_tensor(np.concatenate(obs)))
    with torch.no_grad():
        agent.actor[-1].weight.mul_(20)
    path = tmp_path_factory.mktemp("learned") / "policy.onnx"
    policy = {"policy_type": "policy", "script": "ppo_continuous", "env_id": "LateralControl-v0", "env_kwargs": {}}
    run.export_onnx(agent, vec, policy, path)
    return str(path)


def deployed_and_ours(policy, segment, model):
    """The costs of the official loop with our controller in it, and of our environment; what the policy saw."""
    controller = ChallengeController(policy)
    controller.policy = theirs = Spy(controller.policy)
    costs, lat, steer = official_costs(segment, model, controller)
    assert np.isfinite(steer).all()

    scripted = evaluation.make_scripted_policy(policy, LateralControl())
    mode = getattr(scripted, "env_kwargs", {})
    vec = LateralControl(1, training=False, model_path=model, **mode)
    ours = Spy(scripted)
    (result,) = evaluation.rollout(ours, vec, 1, seed=0)
    assert np.ptp(lat[100:500]) > 0.05
    return costs, result, np.concatenate(theirs.seen[:400]), np.concatenate(ours.seen)


@pytest.mark.parametrize("policy", ["pid", "velocity-pid", "feedforward", "policy.onnx"])
@pytest.mark.parametrize("rows", [600, 549])
def test_a_deployed_controller_costs_what_the_environment_says(policy, rows, learned, roads):
    segment = shortened(synthetic("test", 9)[3 if rows == 600 else 8], rows)
    roads([segment])
    costs, result, theirs, ours = deployed_and_ours(learned if policy == "policy.onnx" else policy, segment, EMBEDDED)
    assert np.array_equal(theirs, ours)
    assert {name: result[name] for name in costs} == costs
    assert ours.shape == (400, 46)


@needs_data
@pytest.mark.parametrize("policy", ["feedforward", "policy.onnx"])
def test_a_deployed_controller_costs_what_the_environment_says_with_the_official_model(policy, learned, roads):
    name = {"feedforward": "00701.csv", "policy.onnx": "00710.csv"}[policy]
    segment = load_segment(DATA / "segments" / "val" / name)
    roads([segment])
    costs, result, theirs, ours = deployed_and_ours(learned if policy == "policy.onnx" else policy, segment, MODEL)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert result["total_cost"] == pytest.approx(costs["total_cost"], abs=0.1)
    assert result["lataccel_cost"] == pytest.approx(costs["lataccel_cost"], abs=0.01)


def test_a_deployed_controller_steers_as_its_policy_learned_to(learned, tmp_path):
    """The export records whether actions are changes of the steering or the steering itself."""
    envs = LateralControl(action_mode="absolute")
    args = ppo.Args(env_kwargs={"action_mode": "absolute"})
    agent = ppo.make_agent(envs, args)
    policy = run.policy_contents("policy", "ppo_continuous", args, agent, 0)
    run.export_onnx(agent, envs, policy, tmp_path / "absolute.onnx")
    assert ChallengeController(str(tmp_path / "absolute.onnx")).absolute
    assert not ChallengeController(learned).absolute
    assert ChallengeController("pid").absolute
    assert not ChallengeController("feedforward").absolute
    _, env_id, env_kwargs, _ = evaluation.resolve_policy(str(tmp_path / "absolute.onnx"))
    assert (env_id, env_kwargs) == ("LateralControl-v0", {"action_mode": "absolute"})


def test_feedforward_beats_velocity_pid_and_that_beats_the_official_pid(roads):
    roads(synthetic("train", 20))
    scores = []
    for policy in (lateral.FeedForward(), lateral.VelocityPID(), lateral.PID()):
        vec = LateralControl(20, training=False, **policy.env_kwargs)
        scores.append(np.mean([result["score"] for result in evaluation.rollout(policy, vec, 20, seed=0)]))
    assert scores[0] > scores[1] > scores[2]


# The environment


def test_observation_by_hand():
    """The pieces that stand for the present: the rest are differences of the same arrays."""
    vec = LateralControl(3, training=False)
    vec.reset(seed=0)
    for action in ([[0.5], [-0.5], [0.0]], [[0.1], [0.7], [-1.0]]):
        obs, *_ = vec.step(np.array(action, np.float32))
    road, t = vec.road, 102
    for i in range(3):
        target, roll, v, a = (getattr(road, name)[i] for name in ("target", "roll", "v", "a"))
        lat = np.concatenate([target[:100], vec.lat[i, :2]])
        steer = vec.steer[i, :2]
        e = [target[t - k] - lat[t - 1 - k] for k in range(3)]
        integral = 0.0
        for s in (100, 101, 102):
            integral = 0.95 * integral + 0.1 * (target[s] - lat[s - 1])
        expected = {
            **{k: 4 * e[k] for k in range(3)},
            **{3 + k: 10 * (lat[t - 1 - k] - lat[t - 2 - k]) for k in range(4)},
            7: 20 * (steer[1] - steer[0]),
            12: target[t] / 2,
            13: 2 * (steer[1] - 0.53 * (target[t] - roll[t])),
            14: v[t] / 10 - 2.3,
            15: a[t],
            16: 2 * roll[t],
            17: steer[1],
            18: integral,
            **{19 + k: 10 * (target[t + k + 1] - target[t + k]) for k in range(9)},
            **{28 + j: 2 * (target[t + k] - target[t + 8]) for j, k in enumerate((11, 15, 20, 30, 40))},
            **{33 + k: 20 * (roll[t + k + 1] - roll[t + k]) for k in range(7)},
            40: 4 * (roll[t + 12] - roll[t + 6]),
            41: (v[t + 5] - v[t]) / 1.5,
            42: (v[t + 15] - v[t + 5]) / 3,
            43: 10 * np.sqrt(np.mean(np.diff(target[t : t + 6]) ** 2)),
            44: 10 * np.sqrt(np.mean(np.diff(target[t : t + 21]) ** 2)),
            45: 20 * e[0] ** 2,
        }
        numbers = np.clip([expected[k] for k in expected], -10, 10)
        np.testing.assert_allclose(obs[i, list(expected)], numbers, rtol=1e-5, atol=1e-6)


def test_the_reward_while_training_is_the_expected_cost_by_hand(roads, monkeypatch):
    segments, chances = synthetic("train", 3), []

    def spy(logits):
        chances.append(distribution(logits))
        return chances[-1]

    monkeypatch.setattr(lateral, "distribution", spy)
    roads(segments)
    vec = LateralControl(6)
    vec.reset(seed=2)
    driven = [segments[k] for k in vec.sim.segment]
    jerk = [np.mean((np.diff(segment.target[100:500]) / 0.1) ** 2) * 100 for segment in driven]
    rng, rewards, costs = np.random.default_rng(0), [], []
    for t in range(100, 99 + vec.limit.min()):
        last = vec.sim.lat[:, -1].copy()
        rewards.append(vec.step(rng.uniform(-1, 1, (6, 1)).astype(np.float32))[1])
        could = np.clip(np.linspace(-5, 5, 1024), last[:, None] - 0.5, last[:, None] + 0.5)  # (6, 1024)
        target = np.array([segment.target[t] for segment in driven])[:, None]
        cost = 5000 * (target - could) ** 2 + 10000 * (could - last[:, None]) ** 2 * (t > 100)
        costs.append(np.sum(chances[-1].astype(float) * cost, axis=1))
    expected = -np.array(costs) / 100 * 100 / (100 + np.array(jerk))
    np.testing.assert_allclose(rewards, expected, rtol=1e-3, atol=1e-4)
    assert len(rewards) > 2
    assert len(set(jerk)) == len(set(vec.sim.segment)) > 1


def first_observation(roads, segment):
    roads([segment])
    return LateralControl(training=False).reset(seed=0)[0][0]


@pytest.mark.parametrize("name", ["target", "roll", "v", "a", "steer"])
def test_an_observation_knows_only_what_the_challenge_tells(roads, name):
    """At step 100 neither the logged steering nor what lies beyond the preview, of which it looks at 40 rows."""
    segment = synthetic("train", 4)[3]

    def observed_with(rows):
        column = getattr(segment, name).copy()
        column[rows] += 0.01
        return first_observation(roads, Segment(**{**segment.__dict__, name: column}))

    obs = first_observation(roads, segment)
    if name == "steer":
        assert np.array_equal(observed_with(slice(None)), obs)
    else:
        assert np.array_equal(observed_with(slice(141, None)), obs)
        assert not np.array_equal(observed_with(100), obs)
        assert np.array_equal(observed_with(140), obs) == (name != "target")


# Where episodes come from


@pytest.mark.parametrize(("rows", "seed"), [(1, 0), (3, 7), (8, 2**32 - 1)])
def test_an_evaluation_plays_each_segment_once_and_in_order(folder, rows, seed):
    vec = LateralControl(rows, training=False, split="test", test_path=folder)
    played = {}

    def look(playing, reward, terminated, done):
        for i in np.flatnonzero(~done & (playing < 5)):
            assert played.setdefault(playing[i], vec.sim.segment[i]) == vec.sim.segment[i]

    results = evaluation.rollout(lateral.FeedForward(), vec, 5, seed, look)
    assert played == {k: k for k in range(5)}
    assert vec.road.names == sorted(vec.road.names)
    single = LateralControlEnv(training=False, split="test", test_path=folder)
    policy = lateral.FeedForward()
    for k in (0, 4):
        obs, done = single.reset(seed=[99, k])[0], False
        policy.reset(np.zeros(1, int), single.batch)
        while not done:
            obs, _, _, done, info = single.step(policy(obs[None])[0])
        assert {name: results[k][name] for name in info} == info


def test_copies_share_segment_phase_and_noise():
    """What differs between them is of their own making: the last copy of each four steers, the others hold still."""
    vec = LateralControl(8, copies=4)
    vec.reset(seed=6)
    whole = False
    for _ in range(3):
        segment, limit, uniform = (x.reshape(2, 4, -1) for x in (vec.sim.segment, vec.limit, vec.uniform))
        assert all((x == x[:, :1]).all() for x in (segment, limit, uniform))
        assert not np.isin(uniform[0], uniform[1]).any()
        whole |= (limit == 400).any()
        truncated, differ = np.zeros(8, bool), np.zeros(2, bool)
        while not truncated.any():
            _, _, _, truncated, _ = vec.step(np.float32([0, 0, 0, 0.1] * 2)[:, None])
            phase, lat = vec.sim.t.reshape(2, 4), vec.sim.lat[:, -1].reshape(2, 4)
            assert (phase == phase[:, :1]).all()
            assert (lat[:, :3] == lat[:, :1]).all()
            differ |= lat[:, 3] != lat[:, 0]
        assert differ.all()
    assert whole
    assert len(set(vec.sim.segment)) == 2


# Pictures
