"""The data of LateralControl-v0: logs and synthetic segments, and the dynamics that comes with it."""

from pathlib import Path

import numpy as np
import pytest

import envs
from envs.evaluation import make_scripted_policy, rollout
from envs.lateral_segments import FIRST, MIN_ROWS, SYNTHETIC, load_folder, load_segment, split_of, synthetic

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
    with pytest.raises(ValueError, match=r"00003\.csv: not a log"):
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


# The dynamics that comes with the environment


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
