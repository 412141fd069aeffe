"""The data of LateralControl-v0: logs and synthetic segments, and the dynamics that comes with it."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import envs
from envs import lateral_segments
from envs.evaluation import make_scripted_policy, rollout
from envs.lateral import EMBEDDED, MAX_JUMP
from envs.lateral_model import BINS, tokens_of
from envs.lateral_segments import CONTEXT, FIRST, MIN_ROWS, SYNTHETIC, load_folder, load_segment, split_of, synthetic

ARRAYS = ("target", "roll", "v", "a", "steer")
HEADER = ["t", "vEgo", "aEgo", "roll", "targetLateralAcceleration", "steerCommand"]


# Logs


def log(rows: int = MIN_ROWS) -> list[list[str]]:
    """Header and rows of a log; numbers with all their digits, steerCommand empty from row 100 on."""
    numbers = np.random.default_rng(1).normal(size=(rows, len(HEADER)))
    lines = [[repr(float(x)) for x in row] for row in numbers]
    for line in lines[FIRST:]:
        line[-1] = ""
    return [HEADER, *lines]


def write(path: Path, lines: list[list[str]], separator: str = ",", end: str = "\n") -> Path:
    path.write_text("".join(separator.join(line) + end for line in lines), newline="")
    return path


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def test_a_log_gives_exactly_the_numbers_that_python_reads(tmp_path):
    lines = log(MIN_ROWS + 3)
    segment = load_segment(write(tmp_path / "00012.csv", lines))
    columns = {name: [line[i] for line in lines[1:]] for i, name in enumerate(HEADER)}
    assert segment.name == "00012.csv"
    assert segment.v.tolist() == [float(x) for x in columns["vEgo"]]
    assert segment.a.tolist() == [float(x) for x in columns["aEgo"]]
    assert segment.target.tolist() == [float(x) for x in columns["targetLateralAcceleration"]]
    assert np.array_equal(segment.roll, np.sin(np.array([float(x) for x in columns["roll"]])) * 9.81)
    assert segment.steer.tolist() == [-float(x) for x in columns["steerCommand"][:FIRST]]
    assert {getattr(segment, name).dtype for name in ARRAYS} == {np.dtype(np.float64)}


def test_a_log_may_be_written_in_other_ways(tmp_path):
    lines = log()
    segment = load_segment(write(tmp_path / "plain.csv", lines))
    order = [3, 5, 1, 0, 4, 2]
    assert same(segment, load_segment(write(tmp_path / "order.csv", [[line[i] for i in order] for line in lines])))
    assert same(segment, load_segment(write(tmp_path / "windows.csv", lines, end="\r\n")))
    marked = [line[1:] for line in lines]  # vEgo comes first, behind a byte order mark
    assert same(segment, load_segment(write(tmp_path / "bom.csv", [["\ufeffvEgo", *marked[0][1:]], *marked[1:]])))
    assert same(segment, load_segment(write(tmp_path / "quoted.csv", [[f'"{x}"' for x in line] for line in lines])))
    assert same(segment, load_segment(write(tmp_path / "extra.csv", [[*line, "x"] for line in lines])))
    assert same(segment, load_segment(write(tmp_path / "blank.csv", [*lines, [], []])))
    filled = [lines[0], *([*line[:-1], line[-1] or "1.5"] for line in lines[1:])]  # steerCommand from row 100 on
    assert same(segment, load_segment(write(tmp_path / "filled.csv", filled)))


def with_cell(row: int, column: str, cell: str) -> list[list[str]]:
    """A log with another cell in row 0, 1, ... of the data."""
    lines = log()
    lines[1 + row][HEADER.index(column)] = cell
    return lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no column vEgo, aEgo, roll, targetLateralAcceleration, steerCommand;"),
        ([line[:3] + line[4:5] for line in log()], "no column roll, steerCommand;"),
        (log(MIN_ROWS - 1), f"{MIN_ROWS - 1} rows of data; at least {MIN_ROWS} are needed"),
        (with_cell(7, "aEgo", ""), "line 9: column aEgo is empty"),
        (with_cell(MIN_ROWS - 1, "roll", "nan"), f"line {MIN_ROWS + 1}: column roll holds 'nan' instead of"),
        (with_cell(0, "vEgo", "-inf"), "line 2: column vEgo holds '-inf'"),
        (with_cell(3, "targetLateralAcceleration", "1,2"), "line 5: 7 cells for 6 columns"),
        (with_cell(3, "targetLateralAcceleration", "fast"), "line 5: column targetLateralAcceleration holds 'fast'"),
        (with_cell(FIRST - 1, "steerCommand", ""), f"line {FIRST + 1}: column steerCommand is empty"),
        ([*log(), ["1.0", "2.0"]], f"line {MIN_ROWS + 2}: 2 cells for 6 columns"),
    ],
)
def test_a_log_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, lines, message):
    path = write(tmp_path / "bad.csv", lines)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_segment(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_log_with_another_separator_lacks_all_columns(tmp_path):
    with pytest.raises(ValueError, match=r"no column vEgo, aEgo.*the first line must name"):
        load_segment(write(tmp_path / "semicolons.csv", log(), separator=";"))


@pytest.mark.parametrize("content", [bytes(range(256)) * 40, b"\x00" * 5000, b"\x1f\x8b\x08" + b"\xff" * 500, b'"' * 3])
def test_a_binary_file_is_refused(tmp_path, content):
    path = tmp_path / "00001.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001\.csv: (damaged|no column)"):
        load_segment(path)


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder; give"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no CSV file in this folder; give"):
        load_folder(tmp_path)
    names = [f"{i:05d}.csv" for i in (10, 2, 31, 4, 23, 11, 1, 15)]
    for name in [*names, "notes.txt"]:
        write(tmp_path / name, log())
    assert [segment.name for segment in load_folder(tmp_path)] == sorted(names)
    with pytest.raises(ValueError, match=r"notes\.txt: no such folder"):
        load_folder(tmp_path / "notes.txt")
    (tmp_path / "00003.csv").mkdir()
    with pytest.raises(ValueError, match=r"00003\.csv: cannot be read"):
        load_folder(tmp_path)


def test_a_data_folder_is_divided_by_name():
    segments = synthetic("train", 17)
    train, validation = split_of(segments[::-1], "train"), split_of(segments[::-1], "validation")
    assert [s.name for s in train + validation] == [s.name for s in segments]
    assert len(train) == 14  # 17 * 7 // 8
    with pytest.raises(ValueError, match="train and validation"):
        split_of(segments, "test")
    with pytest.raises(ValueError, match="more files"):
        split_of(segments[:1], "train")


# Synthetic segments


@pytest.fixture(scope="module")
def segments() -> dict[str, list]:
    return {split: synthetic(split, count) for split, count in SYNTHETIC.items()}


def stacked(segments: list, name: str) -> np.ndarray:
    return np.stack([getattr(segment, name) for segment in segments])


def test_synthetic_segments_have_the_shape_of_a_log(segments):
    for split, count in SYNTHETIC.items():
        assert len(segments[split]) == count
        assert segments[split][3].name == f"{split}_00003"
        for name in ARRAYS:
            array = stacked(segments[split], name)
            assert array.shape == (count, FIRST if name == "steer" else 600)
            assert array.dtype == np.float64
            assert np.isfinite(array).all()
    assert MIN_ROWS <= 600
    assert synthetic("test", 0) == []
    with pytest.raises(ValueError, match="train, validation, test"):
        synthetic("tset", 1)


def test_a_synthetic_segment_depends_on_its_split_and_number_alone(segments):
    for count in (1, 7, 33):
        assert all(same(a, b) for a, b in zip(synthetic("validation", count), segments["validation"]))
    assert not same(*segments["validation"][:2])


def test_synthetic_splits_share_nothing(segments):
    every = [segment for split in segments.values() for segment in split]
    for name in ("target", "roll", "v"):
        assert len({getattr(segment, name).tobytes() for segment in every}) == len(every)


def test_synthetic_segments_resemble_the_logs(segments):
    """Bounds around the figures of 800 logs, which stand beside them."""
    target, roll, v, a = (stacked(segments["train"], name) for name in ARRAYS[:4])
    assert 21.5 < v.mean() < 24.5  # 23.3 m/s
    assert v.min() == 0
    assert v.max() < 45
    assert 0.1 < (v.min(axis=1) < 1).mean() < 0.2  # 0.14 of them stop
    assert 0.35 < a.std() < 0.55  # 0.45 m/s^2
    assert np.abs(np.diff(v) / 0.1 - a[:, 1:]).max() < 0.5  # speed is the integral of acceleration
    assert 0.08 < roll.mean() < 0.18  # 0.13 m/s^2
    assert 0.2 < roll.std() < 0.3  # 0.27 m/s^2
    assert 0.4 < target.std() < 0.6  # 0.48 m/s^2
    assert np.abs(target).max() < 5
    deviation = (target - target.mean(axis=1, keepdims=True)).std(axis=1)
    assert 0.2 < np.median(deviation) < 0.3  # 0.23 m/s^2
    jerk = np.square(np.diff(target[:, 100:500]) / 0.1).mean(axis=1) * 100
    assert 4 < np.median(jerk) < 9  # 5.7, the cost of following the target exactly
    assert 8 < jerk.mean() < 16  # 11.5
    correlation = [np.mean(target[:, :-k] * target[:, k:]) / np.mean(target**2) for k in (1, 5, 10, 20)]
    assert correlation == pytest.approx([0.996, 0.963, 0.901, 0.762], abs=0.06)
    assert np.abs(target[v < 0.5]).max() < 0.05  # no lateral acceleration without speed


def test_the_first_steering_is_what_the_road_needs(segments):
    for split in segments.values():
        target, roll, v, steer = (stacked(split, name) for name in ("target", "roll", "v", "steer"))
        fast = v[:, :FIRST].min(axis=1) > 15
        needed = (target[:, 3 : FIRST + 3] - roll[:, :FIRST])[fast]
        assert 0.5 < np.polyfit(needed.ravel(), steer[fast].ravel(), 1)[0] < 0.6  # 0.54 in the logs
        assert np.abs(steer).max() <= 2


# The dynamics that comes with the environment


def moments(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd (n,) of what the simulator samples."""
    weights = np.exp(logits.astype(float) / 0.8)
    weights /= weights.sum(axis=1, keepdims=True)
    mean = weights @ BINS
    return mean, np.sqrt((weights * np.square(BINS - mean[:, None])).sum(axis=1))


class Car:
    """Cars of the embedded dynamics, each at a constant speed."""

    def __init__(self, v: np.ndarray):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(EMBEDDED), options, providers=["CPUExecutionProvider"])
        self.states = np.zeros((len(v), CONTEXT, 4), np.float32)
        self.states[:, :, 2] = v[:, None]
        self.y = np.zeros((len(v), CONTEXT))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"states": self.states, "tokens": tokens})[0][:, -1]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sd of the next lateral acceleration."""
        nearest = np.round((self.y - BINS[0]) / (BINS[1] - BINS[0])).astype(np.int64)
        return moments(self.logits(nearest))

    def step(self, steer: np.ndarray | float, normal: np.ndarray | float = 0.0) -> np.ndarray:
        self.states[:, :-1, 0] = self.states[:, 1:, 0]
        self.states[:, -1, 0] = steer
        mean, sd = self.moments()
        new = np.clip(mean + sd * normal, self.y[:, -1] - MAX_JUMP, self.y[:, -1] + MAX_JUMP)
        self.y = np.clip(np.concatenate([self.y[:, 1:], new[:, None]], axis=1), BINS[0], BINS[-1])
        return new


def answer(v: list[float], steer: float, bank: float, steps: int = 80) -> np.ndarray:
    """Change of the lateral acceleration (steps, n) after a change of steering or bank; averaged over noise, without
    which the bins would hold a car where it is."""
    rng, copies = np.random.default_rng(0), 64
    car = Car(np.repeat(v, copies))
    for _ in range(30):
        car.step(0, rng.standard_normal(len(car.y)))
    start = car.y.mean(axis=1).reshape(len(v), copies).mean(axis=1)
    car.states[:, :, 1] = bank
    return np.stack(
        [
            car.step(steer, rng.standard_normal(len(car.y))).reshape(len(v), copies).mean(axis=1) - start
            for _ in range(steps)
        ]
    )


def test_the_dynamics_has_the_signature_of_the_challenge():
    car = Car(np.zeros(3))
    inputs = {i.name: (i.type, i.shape[1:], isinstance(i.shape[0], str)) for i in car.session.get_inputs()}
    assert inputs == {"states": ("tensor(float)", [20, 4], True), "tokens": ("tensor(int64)", [20], True)}
    (output,) = car.session.get_outputs()
    assert (output.name, output.type, output.shape[1:]) == ("output", "tensor(float)", [1, 1024])


def test_the_dynamics_is_small_and_says_nothing_of_where_it_was_made():
    content = EMBEDDED.read_bytes()
    assert len(content) < 100_000
    assert b"site-packages" not in content
    assert b".py" not in content


def test_the_dynamics_gives_each_car_the_same_numbers_in_any_batch():
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(130, CONTEXT, 4)) * [0.5, 0.3, 9, 0.5] + [0, 0, 22, 0]).astype(np.float32)
    tokens = np.clip(512 + rng.normal(size=(130, 1)) * 60 + rng.normal(size=(130, CONTEXT)) * 8, 0, 1023)
    session, tokens = Car(np.zeros(1)).session, tokens.astype(np.int64)
    every = session.run(None, {"states": states, "tokens": tokens})[0]
    for n in (1, 2, 5, 64):
        parts = [
            session.run(None, {"states": states[i : i + n], "tokens": tokens[i : i + n]})[0] for i in range(0, 130, n)
        ]
        assert np.array_equal(np.concatenate(parts), every)


def test_noise_rises_with_speed():
    v = np.array([0.0, 6, 12, 18, 24, 30, 36])
    car, rng = Car(np.repeat(v, 50)), np.random.default_rng(0)
    sds = []
    for _ in range(40):
        car.step(0.1, rng.standard_normal(len(car.y)))
        sds.append(car.moments()[1])
    sd = np.mean(sds, axis=0).reshape(len(v), -1).mean(axis=1)
    assert 0.002 < sd[0] < 0.005  # a standing car stays in its bin nearly always
    assert sd[1:] == pytest.approx(0.004 + 0.036 * v[1:] / 36, rel=0.1)


def test_steering_acts_after_two_steps_and_with_the_gain_of_a_real_car():
    v = [20.0, 25, 30, 35]
    gain = answer(v, steer=0.3, bank=0.0) / 0.3
    steady = gain[-30:].mean(axis=0)
    assert ((steady > 1.6) & (steady < 2.4)).all()
    assert np.abs(gain[:2]).max() < 0.1
    assert (gain[2] > 0.25).all()
    assert (gain[5] > 0.75 * steady).all()
    assert (gain[5, 1:] > 0.85 * steady[1:]).all()
    assert gain.max() < 1.35 * steady.max()
    assert answer(v, steer=-0.3, bank=0.0)[-30:].mean(axis=0) == pytest.approx(-0.3 * steady, rel=0.15)


def test_a_slow_car_answers_less_and_a_standing_one_not_at_all():
    gain = answer([0.0, 4, 8, 30], steer=0.3, bank=0.0)[-30:].mean(axis=0) / 0.3
    assert abs(gain[0]) < 0.05
    assert (np.diff(gain) > 0.2).all()


def test_bank_pushes_the_car():
    v = np.array([10.0, 20, 30])
    push = answer(list(v), steer=0.0, bank=0.5)[-30:].mean(axis=0) / 0.5
    assert push == pytest.approx(lateral_segments.steady_gain(v), abs=0.15)


def test_logits_are_finite_and_in_order_everywhere():
    rng, n = np.random.default_rng(0), 3000
    car = Car(np.zeros(n))
    ends = np.array([[-2.0, 2.0], [-9.8, 9.8], [0.0, 60.0], [-12.0, 12.0]])
    extreme = rng.integers(0, 2, (n, 1, 1)).astype(bool)
    states = np.where(
        extreme,
        ends[np.arange(4), rng.integers(0, 2, (n, CONTEXT, 4))],
        rng.uniform(ends[:, 0], ends[:, 1], (n, CONTEXT, 4)),
    )
    car.states = states.astype(np.float32)
    tokens = np.where(extreme[:, :, 0], 1023 * rng.integers(0, 2, (n, CONTEXT)), rng.integers(0, 1024, (n, CONTEXT)))
    logits = car.logits(tokens)
    assert np.isfinite(logits).all()
    assert np.isfinite(np.exp(logits - logits.max(axis=1, keepdims=True))).all()
    peak = BINS[logits.argmax(axis=1)]
    rising = np.sign(np.diff(logits, axis=1)) * np.sign(peak[:, None] - (BINS[1:] + BINS[:-1]) / 2)
    assert (rising >= 0).all()  # one peak, falling on both sides


@pytest.mark.parametrize("manner", ["alternate", "slow alternate", "random", "full lock"])
def test_wild_steering_does_not_upset_the_car_for_good(manner):
    """A minute of it from any speed and any lateral acceleration, then ten seconds of none."""
    v, start = (x.ravel() for x in np.meshgrid([0.0, 2, 5, 10, 20, 30, 40], [-5.0, -2, 0, 2, 5]))
    car, rng = Car(v), np.random.default_rng(0)
    car.y[:] = start[:, None]
    lateral = []
    for t in range(600):
        steer = {
            "alternate": 2 * (-1) ** t,
            "slow alternate": 2 * (-1) ** (t // 7),
            "random": 2 * rng.choice([-1, 1], len(v)),
            "full lock": 2,
        }[manner]
        lateral.append(car.step(steer, rng.standard_normal(len(v))))
    lateral = np.stack(lateral[100:])
    assert np.abs(lateral).max() < 4.8
    assert np.abs(lateral[:, v == 0]).max() < 0.3
    if manner == "full lock":
        middle = lateral.mean(axis=0)
        assert (middle[v >= 20] > 2).all()
    else:
        assert np.abs(lateral.mean(axis=0)).max() < 1  # the simulator's limit lets fast cars drift a little
    for _ in range(100):
        last = car.step(0, rng.standard_normal(len(v)))
    assert np.abs(last).max() < 0.5


def test_the_task_is_as_hard_as_the_real_one():
    """Mean cost of the challenge's PID 95 to 115 (95.2 on 200 logs); feed-forward takes about half of it."""
    costs = {}
    for name in ("pid", "feedforward"):
        mode = "absolute" if name == "pid" else "delta"
        count = SYNTHETIC["test"]
        vec = envs.make_vec("LateralControl-v0", count, training=False, split="test", action_mode=mode)
        results = rollout(make_scripted_policy(name, vec), vec, count, seed=0)
        costs[name] = np.array([result["total_cost"] for result in results])
    assert 95 < costs["pid"].mean() < 115
    assert 0.3 < costs["feedforward"].mean() / costs["pid"].mean() < 0.55


# How it is made


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[1] / "tools" / "make_lateral_dynamics.py"
    spec = importlib.util.spec_from_file_location("make_lateral_dynamics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Still(np.random.Generator):
    """Draws no noise."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def standard_normal(self, size):
        return np.zeros(size)


def test_the_single_track_model_settles_where_theory_says(tool):
    v, bank = np.array([3.0, 10.0, 20.0, 35.0]), np.array([0.0, 0.3, -0.5, 0.2])
    cars = tool.Cars(len(v), Still())
    y = np.array([cars.step(np.full(len(v), 0.4), bank, v) for _ in range(120)])
    motor = 2.4 * np.tanh(0.4 / 2.4)
    assert y[-1] == pytest.approx(v**2 / (v**2 + 36) * (2.05 * motor + bank), abs=0.025)
    still = tool.Cars(2, Still())
    assert np.abs([still.step(np.full(2, 2.0), np.full(2, 1.0), np.zeros(2)) for _ in range(50)]).max() == 0


def test_the_logits_are_a_normal_distribution_at_the_simulators_temperature(tool):
    torch.manual_seed(0)
    network, rng = tool.Network(16), np.random.default_rng(0)
    states = torch.tensor(rng.uniform(-1, 1, (3, CONTEXT, 4)), dtype=torch.float32)
    states[:, :, 2] = torch.tensor([5.0, 20.0, 36.0])[:, None]
    tokens = torch.tensor(tokens_of(np.cumsum(0.1 * rng.standard_normal((3, CONTEXT)), axis=1)))
    with torch.no_grad():
        logits = network(states, tokens)
        foreseen = network.mean(states[:, -6:], torch.tensor(BINS[tokens[:, -6:]], dtype=torch.float32))
    assert logits.shape == (3, 1, 1024)
    mean, sd = moments(logits[:, -1].numpy())
    assert mean == pytest.approx(foreseen.numpy(), abs=1e-4)
    assert sd == pytest.approx(tool.noise_sd(states[:, -1, 2]).numpy(), rel=0.02)
