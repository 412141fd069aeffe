"""LateralControl-v0: the official simulator bit for bit, its controllers deployed, and what the environment adds."""

import csv
import hashlib
import json
from collections import namedtuple
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import envs
import ppo_continuous as ppo
from envs import UserError, evaluation, lateral, raster, run
from envs.lateral import EMBEDDED, ChallengeController, LateralControl, LateralControlEnv, Road, Simulator
from envs.lateral_model import BINS, Dynamics, distribution, draw, last_position_only, tokens_of
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


@pytest.mark.parametrize(("rows", "first"), [(1, 20), (2, 100), (3, 20)])
def test_the_simulator_equals_the_official_loop(twin, rows, first):
    segments, expected = twin
    for (costs, lat, _), segment, ours in zip(expected, segments, play_pid(segments, EMBEDDED, rows, 1, first)):
        assert np.array_equal(ours, lat[100:500])
        assert costs_of(segment, ours) == costs
    assert len({costs["total_cost"] for costs, _, _ in expected}) == 3


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


def test_draw_is_numpys_choice():
    rng = np.random.default_rng(0)
    sharpness = rng.choice([0.0, 0.1, 1.0, 10.0, 300.0], size=(400, 1))
    logits = (sharpness * rng.normal(size=(400, 1024)) + rng.normal(0, 50, size=(400, 1))).astype(np.float32)
    uniform = np.array([np.random.RandomState(seed).random_sample() for seed in range(400)])
    e = np.exp(logits / 0.8 - np.max(logits / 0.8, axis=1, keepdims=True))
    chances = e / np.sum(e, axis=1, keepdims=True)
    expected = [np.random.RandomState(seed).choice(1024, p=chances[seed]) for seed in range(400)]
    assert np.array_equal(distribution(logits), chances)
    assert distribution(logits).dtype == np.float32
    assert draw(distribution(logits), uniform).tolist() == expected
    even = distribution(np.zeros((1024, 1024), np.float32))  # a draw on the border of two bins is the upper one's
    assert draw(even, np.arange(1024) / 1024).tolist() == list(range(1024))


def test_tokens_are_the_official_ones():
    lat = np.array([-9, -5, -4.9999, -0.001, 0, 0.004, 0.005, 4.9999, 5, 9, *BINS[100:200], *(BINS[100:200] + 1e-9)])
    expected = [np.digitize(np.clip(x, -5, 5), np.linspace(-5, 5, 1024), right=True) for x in lat]
    assert tokens_of(lat[None])[0].tolist() == expected
    assert tokens_of(BINS).tolist() == list(range(1024))
    assert BINS[0] == -5
    assert BINS[-1] == 5


@pytest.mark.parametrize("model", [EMBEDDED, pytest.param(MODEL, marks=needs_data)], ids=["embedded", "official"])
def test_steering_more_turns_more(model):
    """Three seconds of steady steering, on roads that are driven at 15 m/s or faster."""
    segments = [segment for segment in synthetic("train", 20) if segment.v[80:150].min() > 15][:4]
    means = []
    for steer in (-0.6, 0.0, 0.6):
        sim = Simulator(4, Road(segments), Dynamics(model))
        sim.start(np.arange(4), np.arange(4))
        lat = [sim.step(np.full(4, steer), np.full(4, 0.5)) for _ in range(30)]
        means.append(np.mean(lat[10:], axis=0))
    assert (means[0] + 0.1 < means[1]).all()
    assert (means[1] + 0.1 < means[2]).all()


def test_a_car_that_is_pushed_hard_stays_within_the_simulators_limits(roads):
    road = Road(synthetic("train", 4))
    sim = Simulator(4, road, Dynamics(EMBEDDED))
    sim.start(np.arange(4), np.arange(4))
    rng = np.random.default_rng(0)
    for t in range(100, 500):
        before = sim.lat[:, -1].copy()
        lat = sim.step(rng.choice([-1e6, -2.0, 2.0, 1e6], 4), rng.choice([0.0, 1 - 2**-53], 4))
        assert (np.abs(sim.steer) <= 2).all()
        assert (np.abs(lat) <= 5).all()
        assert (np.abs(lat - before) <= 0.5).all()
        assert (sim.t == t + 1).all()


# The dynamics from a file


def transformer(width=16, seed=0, tail=()):
    """A small model with the challenge's signature: embeddings, one layer of attention, one of perceptrons, a head.
    tail: (operator, inputs after the first, attributes) nodes that come after the head; an input is a constant, or
    (operator, attributes) that make it from what the node before gives, or (operator, attributes, constant)."""
    rng = np.random.default_rng(seed)
    nodes, constants = [], []

    def constant(name, value):
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(name, *shape):
        return constant(name, rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32))

    def node(kind, name, *inputs, **attributes):
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def norm(name, x):
        mean = node("ReduceMean", f"{name}/mean", x, axes=[-1])
        centred = node("Sub", f"{name}/centred", x, mean)
        square = node("Pow", f"{name}/square", centred, constant(f"{name}/two", np.float32(2)))
        variance = node("ReduceMean", f"{name}/variance", square, axes=[-1])
        plus = node("Add", f"{name}/plus", variance, constant(f"{name}/eps", np.float32(1e-5)))
        return node("Div", name, centred, node("Sqrt", f"{name}/sd", plus))

    def linear(name, x, n_in, n_out):
        return node(
            "Add", name, node("MatMul", f"{name}/x", x, weight(f"{name}/w", n_in, n_out)), weight(f"{name}/b", n_out)
        )

    token = node("Gather", "token", weight("table", 1024, width), "tokens")
    x = node("Add", "sum", token, linear("state", "states", 4, width))
    x = node("Add", "input", x, weight("position", 20, width))
    q, k, v = (linear(name, norm(f"norm_{name}", x), width, width) for name in "qkv")
    attention = node(
        "Softmax", "attention", node("MatMul", "qk", q, node("Transpose", "kt", k, perm=[0, 2, 1])), axis=-1
    )
    x = node("Add", "attended", x, linear("mixed", node("MatMul", "av", attention, v), width, width))
    hidden = node("Tanh", "hidden", linear("up", norm("norm_up", x), width, 2 * width))
    x = node("Add", "perceived", x, linear("down", hidden, 2 * width, width))
    x = linear("head", norm("norm_head", x), width, 1024)
    for i, (kind, inputs, attributes) in enumerate(tail):
        made = []
        for j, value in enumerate(inputs):
            name = f"tail_{i}/{j}"
            if isinstance(value, tuple):
                operator, settings, *of = value
                made.append(node(operator, name, constant(f"{name}/of", of[0]) if of else x, **settings))
            else:
                made.append(constant(name, value))
        x = node(kind, f"tail_{i}", x, *made, **attributes)
    nodes[-1].output[0] = "output"
    inputs = [
        helper.make_tensor_value_info("states", TensorProto.FLOAT, ["batch", 20, 4]),
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", 20]),
    ]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 20, 1024])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def some_input(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "states": rng.normal(0, [0.5, 0.3, 20, 1], size=(rows, 20, 4)).astype(np.float32),
        "tokens": rng.integers(0, 1024, (rows, 20)),
    }


@pytest.mark.parametrize("model", ["small", pytest.param("official", marks=needs_data)])
def test_the_last_position_alone_is_the_same_to_the_last_bit(model):
    whole = transformer() if model == "small" else onnx.load(MODEL)
    before = whole.SerializeToString()
    cut = last_position_only(whole)
    assert whole.SerializeToString() == before
    one, other = session_of(whole), session_of(cut)
    for rows in (1, 2, 7):
        expected, found = (session.run(None, some_input(rows))[0] for session in (one, other))
        assert found.shape == (rows, 1, 1024)
        assert np.array_equal(found[:, 0], expected[:, -1])
        assert not np.array_equal(expected[:, -2], expected[:, -1])
    # all after the attention is cut: what flows in are the attention's rows and the residual stream
    assert sum(node.op_type == "Slice" for node in cut.graph.node) == 2
    assert last_position_only(cut) is cut


def test_a_model_that_is_cut_already_is_left_as_it_is():
    model = onnx.load(EMBEDDED)
    before = model.SerializeToString()
    assert last_position_only(model) is model
    assert model.SerializeToString() == before


def at_each_position(seed):
    return np.random.default_rng(seed).normal(size=(20, 1024)).astype(np.float32)


@pytest.mark.parametrize(
    "tail",
    [
        [("Softmax", (), {"axis": 1})],
        [("CumSum", (np.int64(1),), {})],
        [("Add", (at_each_position(0),), {})],
        [("Add", (("Tanh", {}, at_each_position(0)),), {})],
        [("ReduceMean", (), {"axes": [1]}), ("Expand", (np.array([1, 20, 1]),), {})],
        [("Transpose", (), {"perm": [0, 2, 1]}), ("Tanh", (), {}), ("Transpose", (), {"perm": [0, 2, 1]})],
    ],
    ids=[
        "softmax over time",
        "sum over time",
        "positions differ",
        "by a computed number",
        "mean over time",
        "transposed",
    ],
)
def test_a_model_that_mixes_positions_at_its_end_is_used_as_a_whole(tail, tmp_path):
    model = transformer(tail=tail)
    with pytest.raises(ValueError, match="position by position"):
        last_position_only(model)
    onnx.save(model, tmp_path / "model.onnx")
    x = some_input(3)
    expected = session_of(model).run(None, x)[0][:, -1]
    assert np.array_equal(Dynamics(tmp_path / "model.onnx").logits(**x), expected)


@pytest.mark.parametrize(
    "tail",
    [
        [("Sub", (("ReduceMean", {"axes": [1]}),), {}), ("Tanh", (), {})],
        [("Mul", (("Softmax", {"axis": 1}),), {})],
        [("Sub", (("ReduceMean", {"axes": [-1]}),), {})],
        [("Add", (("Transpose", {"perm": [0, 1, 2]}),), {})],
        [("Mul", (np.float32(2),), {}), ("Add", (at_each_position(1)[0],), {})],
    ],
    ids=["less its mean over time", "times a softmax over time", "centred", "twice", "scaled"],
)
def test_whatever_comes_after_the_head_the_last_position_stays_the_same(tail):
    model = transformer(tail=tail)
    cut = session_of(last_position_only(model)).run(None, some_input(3))[0]
    assert cut.shape == (3, 1, 1024)
    assert np.array_equal(cut[:, 0], session_of(model).run(None, some_input(3))[0][:, -1])


def save_model(path, output=(20, 1024), **inputs):
    """An ONNX file with these inputs {name: (type, shape)} whose output does not depend on them."""
    inputs = [helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, (kind, shape) in inputs.items()]
    zeros = numpy_helper.from_array(np.zeros((2, *output), np.float32), "zeros")
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [2, *output])]
    graph = helper.make_graph([helper.make_node("Identity", ["zeros"], ["output"])], "model", inputs, outputs, [zeros])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)


@pytest.fixture
def wrong_files(tmp_path, monkeypatch):
    """Files and folders that a user may take for a model or for data; the present directory."""
    monkeypatch.chdir(tmp_path)
    states, tokens = (TensorProto.FLOAT, (20, 4)), (TensorProto.INT64, (20,))
    save_model("policy.onnx", obs=(TensorProto.FLOAT, (46,)))
    save_model("length.onnx", states=(TensorProto.FLOAT, (10, 4)), tokens=(TensorProto.INT64, (10,)))
    save_model("type.onnx", states=states, tokens=(TensorProto.INT32, (20,)))
    save_model("bins.onnx", output=(20, 512), states=states, tokens=tokens)
    onnx.save(transformer(), "good.onnx")
    content = Path("good.onnx").read_bytes()
    Path("cut.onnx").write_bytes(content[: len(content) // 2])
    Path("text.onnx").write_text("not a model\n")
    Path("nothing.onnx").write_bytes(b"")
    for name in ("empty", "above", "above/logs", "one"):
        Path(name).mkdir()
    write_csv(Path("above/logs"), synthetic("train", 1)[0])
    write_csv(Path("one"), synthetic("train", 1)[0])


MISTAKES = {
    "model_path missing.onnx": r"missing\.onnx: no such file; model_path is",
    "model_path text.onnx": r"text\.onnx: not a readable ONNX model \(.*\); model_path is",
    "model_path cut.onnx": r"cut\.onnx: .*ONNX.*; model_path is",
    "model_path nothing.onnx": r"nothing\.onnx: .*; model_path is",
    "model_path empty": r"empty: no such file; model_path is",
    "model_path policy.onnx": r"policy\.onnx: takes .*obs.* instead of .*states.*; model_path is",
    "model_path length.onnx": r"length\.onnx: takes .*10.* instead of .*20.*; model_path is",
    "model_path type.onnx": r"type\.onnx: takes .*int32.* instead of .*int64.*; model_path is",
    "model_path bins.onnx": r"bins\.onnx: gives .*512.* instead of .*1024.*; model_path is",
    "data_path missing": r"missing: no such folder; give the folder that holds the CSV files",
    "data_path empty": r"empty: no CSV file in this folder",
    "data_path above": r"above: no CSV file in this folder; .*not the one above it",
    "data_path above/logs split train": r"1 segment\(s\) leave none for the split train",
    "data_path one split test": r"test_path too: a folder of other segments",
    "data_path one split validation test_path empty split test": r"empty: no CSV file",
    "test_path missing split test": r"missing: no such folder",
    "action_mode relative": r"action_mode must be delta or absolute, not 'relative'",
    "copies 0": r"copies must be at least 1, not 0",
    "modelpath good.onnx": r"unknown argument 'modelpath'; it takes .*model_path",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_explained_in_one_line(wrong_files, words):
    words_, numbers = words.split(), {"0": 0}
    arguments = dict(zip(words_[::2], [numbers.get(word, word) for word in words_[1::2]]))
    with pytest.raises(UserError, match=MISTAKES[words]) as error:
        envs.make_vec("LateralControl-v0", 1, **arguments)
    assert "\n" not in str(error.value)


def test_the_good_file_beside_them_is_accepted(wrong_files):
    vec = envs.make_vec("LateralControl-v0", 2, seed=1, model_path="good.onnx", test_path="one", split="test")
    assert vec.observation_space.contains(vec.step(np.zeros((2, 1), np.float32))[0])


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


def test_a_standing_car_keeps_its_steering(roads):
    """In changes of the steering; who says the steering itself is obeyed. Two cars, of which one stands."""
    standing, driving = synthetic("train", 2)
    standing.v[100:103], driving.v[100:103] = 0.9, 1.0
    roads([standing, driving])
    for mode, expected in {"delta": [[0, 0.2], [0, 0.4]], "absolute": [[1, 1], [1, 1]]}.items():
        vec = LateralControl(2, training=False, action_mode=mode)
        vec.reset(seed=0)
        before = vec.known_steer[:, -1].copy() * (mode == "delta")
        for steer in expected:
            vec.step(np.ones((2, 1), np.float32))
            np.testing.assert_allclose(vec.sim.steer[:, -1], np.clip(before + steer, -2, 2), atol=1e-12)


@pytest.mark.parametrize("policy", ["velocity-pid", "policy.onnx"])
def test_a_deployed_controller_costs_what_the_environment_says_where_the_car_stands(policy, learned, roads):
    segment = synthetic("test", 9)[3]
    segment.v[150:200] = 0
    roads([segment])
    costs, result, theirs, ours = deployed_and_ours(learned if policy == "policy.onnx" else policy, segment, EMBEDDED)
    assert np.array_equal(theirs, ours)
    assert {name: result[name] for name in costs} == costs
    assert not ours[51:100, 7].any()  # its own last move


def test_feedforward_beats_velocity_pid_and_that_beats_the_official_pid(roads):
    roads(synthetic("train", 20))
    scores = []
    for policy in (lateral.FeedForward(), lateral.VelocityPID(), lateral.PID()):
        vec = LateralControl(20, training=False, **policy.env_kwargs)
        scores.append(np.mean([result["score"] for result in evaluation.rollout(policy, vec, 20, seed=0)]))
    assert scores[0] > scores[1] > scores[2]


def test_velocity_pid_is_the_change_of_a_pid_that_never_winds_up():
    """By hand: errors 1, 2 and then 4."""
    known = lateral.Knowledge(*np.zeros((4, 1, 48)), np.zeros((1, 6)), np.zeros((1, 6)), np.zeros(1))
    known.target[0, 5:8] = 1, 2, 5
    known.lat[0, -3:] = 0, 0, 1
    assert lateral.VelocityPID().change(known) == pytest.approx([0.195 * 2 + 0.1 * 4 - 0.053 * (4 - 2 * 2 + 1)])


def test_feedforward_moves_with_the_target_and_corrects_as_much_as_the_car_needs():
    """By hand, at 25 m/s: the target rises by .02 a step and is .9 three steps ahead, .84 now; the car follows .1
    below. It takes .64 - .152 * .9 of steering per m/s^2 there and .64 - .152 * .72 where the car last was."""
    known = lateral.Knowledge(*np.zeros((4, 1, 48)), np.zeros((1, 6)), np.zeros((1, 6)), np.zeros(1))
    known.target[0] = 0.84 + 0.02 * np.arange(-7, 41)
    known.lat[0] = known.target[0, 1:7] - 0.1
    known.v[:] = 25
    error = 0.1 + 0.02
    by_hand = 0.8 * (0.64 - 0.152 * 0.9) * 0.02 + (0.64 - 0.152 * 0.72) * 0.24 * error
    assert lateral.FeedForward().change(known) == pytest.approx([by_hand])


def test_the_steering_that_one_more_lataccel_takes_is_the_slope_of_the_estimate():
    needed, v, h = np.array([-2.0, -0.5, 0.1, 1.5, 0.0]), np.array([8.0, 33.0, 20.0, 15.0, 25.0]), 1e-6
    window = [np.repeat(x[:, None], 5, axis=1) for x in (needed, needed + h, np.zeros(5), v)]
    before, after = (lateral.estimate_steer(target, *window[2:])[:, 0] for target in window[:2])
    np.testing.assert_allclose(lateral.steer_per_lataccel(needed, v), (after - before) / h, atol=1e-5)
    assert lateral.steer_per_lataccel(np.array([5.0]), np.array([30.0])) == 0.2  # it never reverses


def test_a_controller_that_cannot_be_deployed():
    with pytest.raises(UserError, match=r"missing\.onnx: no such file"):
        ChallengeController("missing.onnx")


def test_a_deployed_controller_steers_as_its_policy_learned_to(learned, tmp_path):
    """The file says whether its actions are changes of the steering or the steering itself."""
    model = onnx.load(learned)
    model.metadata_props.add(key="action_mode", value='"absolute"')  # as the export of such a run writes it
    onnx.save(model, tmp_path / "absolute.onnx")
    assert ChallengeController(str(tmp_path / "absolute.onnx")).absolute
    assert not ChallengeController(learned).absolute
    assert ChallengeController("pid").absolute
    assert not ChallengeController("feedforward").absolute
    _, env_id, env_kwargs, _ = evaluation.resolve_policy(str(tmp_path / "absolute.onnx"))
    assert (env_id, env_kwargs) == ("LateralControl-v0", {"action_mode": "absolute"})


def test_a_model_that_gives_no_number_stops_the_episode(monkeypatch):
    vec = LateralControl(3, training=False)
    vec.reset(seed=0)
    vec.step(np.zeros((3, 1), np.float32))
    logits = vec.sim.dynamics.logits

    def broken(states, tokens):
        return np.where(np.arange(3)[:, None] == 1, np.nan, logits(states, tokens))

    monkeypatch.setattr(vec.sim.dynamics, "logits", broken)
    with pytest.raises(FloatingPointError, match=r"no number at step 101 of test_00001|validation_00001|train_00001"):
        vec.step(np.zeros((3, 1), np.float32))


def test_a_model_for_one_car_only_is_explained(tmp_path):
    model = onnx.load(str(EMBEDDED))
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(tmp_path / "one.onnx"))
    with pytest.raises(ValueError, match=r"one\.onnx: cannot run two cars at once; model_path is"):
        Dynamics(tmp_path / "one.onnx")


# The environment


def play(vec, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [vec.step(rng.uniform(-1, 1, (vec.num_envs, 1)).astype(np.float32)) for _ in range(steps)]


def extreme_segments():
    """Roads that no car could follow, standing cars, rockets."""
    rng, segments = np.random.default_rng(0), []
    for k, v in enumerate([0.0, 1e-3, 80.0, 30.0]):
        target = rng.choice([-12.0, 0.0, 12.0], 600) if k % 2 else 11 * np.sign(np.sin(np.arange(600) / 7))
        a = rng.choice([-20.0, 20.0], 600)
        roll, steer = rng.uniform(-9.81, 9.81, 600), rng.choice([-5.0, 5.0], 100)
        segments.append(Segment(f"extreme_{k}", target, roll, v * rng.random(600), a, steer))
    return segments


@pytest.mark.parametrize("action_mode", ["delta", "absolute"])
@pytest.mark.parametrize("training", [True, False])
def test_observations_stay_inside_their_space(roads, training, action_mode):
    roads([*extreme_segments(), *synthetic("train", 4)])
    vec, rng = LateralControl(8, training=training, action_mode=action_mode), np.random.default_rng(0)
    obs, _ = vec.reset(seed=0)
    assert vec.observation_space.contains(obs)
    bound, finished = vec.single_action_space.high[0], 0
    for t in range(410):
        action = rng.choice([-1e9, -bound, -1e-9, 0.3, bound, 1e9], (8, 1)) if t % 3 else vec.action_space.sample()
        obs, reward, terminated, truncated, info = vec.step(action)
        assert vec.observation_space.contains(obs)
        assert np.isfinite(reward).all()
        assert (reward <= 1e-3).all()
        assert not terminated.any()
        if truncated.any():
            finished += truncated.sum()
            assert vec.observation_space.contains(info["final_obs"])
            assert all(np.isfinite(info[name][truncated]).all() for name in ("total_cost", "score"))
    assert finished >= 8


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


def test_the_reward_of_an_evaluation_by_hand():
    vec = LateralControl(4, training=False)
    vec.reset(seed=0)
    before = vec.sim.lat[:, -1].copy()
    rewards = np.stack([step[1] for step in play(vec, 30)], 1)
    lat = vec.lat[:, :30]
    change = np.diff(lat, axis=1, prepend=before[:, None])
    change[:, 0] = 0  # the official jerk begins with the second step
    expected = -(50 * 100 / 400 * (vec.road.target[:4, 100:130] - lat) ** 2 + 100 / 0.1**2 / 399 * change**2)
    np.testing.assert_allclose(rewards, expected, rtol=1e-9)


def test_action_modes(roads):
    roads(synthetic("train", 2))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.5, 1.5, (30, 2, 1))
    delta, absolute = (LateralControl(2, training=False, action_mode=mode) for mode in ("delta", "absolute"))
    assert delta.single_action_space.high == 1
    assert absolute.single_action_space.high == 2
    for vec in (delta, absolute):
        vec.reset(seed=0)
    steer = delta.known_steer[:, -1].copy()
    for t, action in enumerate(actions):
        delta.step(action)
        absolute.step(2 * action)
        steer = np.clip(steer + 0.2 * np.clip(action[:, 0], -1, 1), -2, 2)
        np.testing.assert_array_equal(delta.steer[:, t], steer)
        np.testing.assert_array_equal(delta.sim.steer[:, -1], steer)
        np.testing.assert_array_equal(delta.known_steer[:, -1], steer)
        np.testing.assert_array_equal(absolute.steer[:, t], np.clip(2 * action[:, 0], -2, 2))


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


def test_the_estimate_of_the_steering_is_one_and_close_to_the_log(roads, learned):
    segments = synthetic("train", 30)
    roads(segments)
    vec = LateralControl(30, training=False)
    vec.reset(seed=0)
    for k in (0, 7):
        controller = ChallengeController(learned)
        controller.policy = lambda obs: np.zeros((1, 1))  # holds on to the estimate
        _, _, steer = official_costs(segments[k], EMBEDDED, controller)
        assert steer[100] == vec.known_steer[k, -1]
    logged = np.stack([segment.steer[94:] for segment in segments])
    assert np.sqrt(np.mean((vec.known_steer - logged) ** 2)) < 0.25
    assert np.std(logged) > 0.1


# Where episodes come from


def test_an_episode_uses_the_official_draws_one_a_step(roads, monkeypatch):
    used, segments = [], synthetic("test", 3)
    roads(segments)

    def spy(probability, uniform):
        used.append(uniform.copy())
        return draw(probability, uniform)

    monkeypatch.setattr(lateral, "draw", spy)
    vec = LateralControl(3, training=False)
    vec.reset(seed=11)
    for _ in range(400):
        vec.step(np.zeros((3, 1), np.float32))
    for segment, uniforms in zip(segments, np.stack(used, 1)):
        random = official_random(segment.name)
        assert uniforms.tolist() == [random.random_sample() for _ in range(480)][80:]


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


def evaluation_args(**changes):
    args = {"env_id": "LateralControl-v0", "env_kwargs": {}, "eval_env_kwargs": {}, "eval_episodes": 0, "eval_seed": 5}
    return SimpleNamespace(**{**args, "threads": 1, **changes})


def test_eval_episodes_0_plays_them_all(folder):
    result = evaluation.evaluate(lateral.FeedForward(), evaluation_args(env_kwargs={"test_path": folder}))
    assert result["episodes"] == len(result["per_episode"]) == 5
    assert len({episode["total_cost"] for episode in result["per_episode"]}) == 5
    assert result["metrics"]["total_cost"] == pytest.approx(-result["mean_return"])
    assert result["success_rate"] is None


def test_more_episodes_than_segments_are_refused(folder):
    args = evaluation_args(env_kwargs={"test_path": folder}, eval_episodes=6)
    with pytest.raises(UserError, match=r"6.* the test split has 5"):
        evaluation.evaluate(lateral.FeedForward(), args)
    assert evaluation.evaluate(lateral.FeedForward(), evaluation_args(eval_episodes=2))["episodes"] == 2


def test_the_splits_share_no_segment(folder):
    for data, splits in (({}, ("train", "validation", "test")), ({"data_path": folder}, ("train", "validation"))):
        names = [LateralControl(split=split, training=False, **data).road.names for split in splits]
        if data:
            assert [len(part) for part in names] == [4, 1]
        assert len({name for part in names for name in part}) == sum(len(part) for part in names)


def test_a_test_shares_no_file_with_the_rest(folder):
    with pytest.raises(ValueError, match=r"test_path and data_path both hold .*\.csv; give a test its own segments"):
        LateralControl(training=False, split="test", data_path=folder, test_path=folder)


def test_a_snapshot_is_of_its_own_roads(folder):
    state = LateralControl(data_path=folder).state_dict()
    LateralControl(data_path=folder).load_state_dict(state)
    with pytest.raises(UserError, match="the run used other segments; give data_path the files that it had"):
        LateralControl().load_state_dict(state)


def test_a_run_notes_the_model_that_it_drove(folder):
    kwargs = {"model_path": str(EMBEDDED), "data_path": str(folder), "action_mode": "delta"}
    sha256 = hashlib.sha256(EMBEDDED.read_bytes()).hexdigest()
    assert run.parents(ppo.Args(env_kwargs=kwargs)) == {
        str(EMBEDDED): {"sha256": sha256, "config": None, "steps": None}
    }


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


def test_without_copies_every_row_has_its_own_noise():
    vec = LateralControl(8)
    vec.reset(seed=6)
    assert len(np.unique(vec.uniform)) == 8 * 400


def test_an_evaluation_has_no_copies():
    with_copies, without = (LateralControl(4, copies=copies, training=False) for copies in (4, 1))
    assert np.array_equal(with_copies.reset(seed=0)[0], without.reset(seed=0)[0])
    assert with_copies.sim.segment.tolist() == [0, 1, 2, 3]


def test_the_first_episodes_after_a_seed_end_at_different_steps():
    vec = LateralControl(16)
    vec.reset(seed=0)
    first, lengths = vec.limit.copy(), [[] for _ in range(16)]
    assert len(set(first)) > 12
    assert first.min() >= 2
    assert first.max() <= 400
    while min(len(own) for own in lengths) < 2:
        *_, truncated, info = vec.step(np.zeros((16, 1), np.float32))
        for i in np.flatnonzero(truncated):
            lengths[i].append(info["episode"]["l"][i].item())
    assert [own[0] for own in lengths] == first.tolist()
    assert {own[1] for own in lengths} == {400}
    vec.reset()
    assert set(vec.limit) == {400}
    evaluation = LateralControl(16, training=False)
    evaluation.reset(seed=0)
    assert set(evaluation.limit) == {400}


def test_training_draws_from_its_own_seed():
    def drawn(seed):
        vec = LateralControl(4)
        vec.reset(seed=seed)
        return vec.sim.segment.tolist(), vec.uniform.copy()

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert one[0] == same[0]
    assert np.array_equal(one[1], same[1])
    assert one[0] != other[0]
    assert not np.isin(one[1], other[1]).any()


# Pictures


def test_render_draws_the_episode():
    vec = LateralControl(2, training=False, render_mode="rgb_array")
    vec.reset(seed=0)
    frames = [vec.render()]
    for steps in (1, 1, 1, 50):
        for _ in range(steps):
            vec.step(np.ones((2, 1), np.float32))
        frames.append(vec.render())
    assert all(frame.dtype == np.uint8 and frame.shape == frames[0].shape for frame in frames)
    assert frames[0].ndim == 3
    for before, after in pairwise(frames):
        assert not np.array_equal(before, after)
    for colour in ((120, 120, 120), (200, 40, 40), (30, 90, 200), (20, 130, 60)):  # target, actual, steering, speed
        begun, later = ((frame == colour).all(2).sum() for frame in (frames[1], frames[-1]))
        assert later > begun + 20, colour


def test_a_window_shows_every_step_and_closes(monkeypatch):
    shown = []

    class Window:
        def __init__(self, title):
            assert title == "LateralControl-v0"

        def show(self, frame):
            shown.append(frame)

        def close(self):
            shown.append("closed")

    monkeypatch.setattr(lateral, "Window", Window)
    vec = LateralControl(1, training=False, render_mode="human")
    vec.reset(seed=0)
    for _ in range(3):
        vec.step(np.ones((1, 1), np.float32))
    assert vec.render() is None
    vec.close()
    assert [isinstance(frame, np.ndarray) for frame in shown] == [True] * 4 + [False]


def test_no_window_where_there_is_no_display(monkeypatch):
    import tkinter

    def refuse():
        raise tkinter.TclError("no display name and no $DISPLAY environment variable")

    monkeypatch.setattr(tkinter, "Tk", refuse)
    with pytest.raises(UserError, match="no display"):
        raster.Window("LateralControl-v0")
