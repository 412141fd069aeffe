"""Road segments for LateralControl-v0: logs in the CSV format of the comma controls challenge, or synthetic ones.

A segment holds the target lateral acceleration, speed, acceleration and road roll of each step of 0.1 s. Synthetic
segments need no file and resemble the logs in their statistics.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

DT = 0.1  # s
CONTEXT = 20  # steps in the input of the dynamics
FIRST = 100  # first controlled step
LAST = 500  # costs are computed over steps FIRST..LAST-1
MIN_ROWS = LAST + 49  # complete preview of the last controlled step
GRAVITY = 9.81  # m/s^2

COLUMNS = ("vEgo", "aEgo", "roll", "targetLateralAcceleration", "steerCommand")
SYNTHETIC = {"train": 600, "validation": 100, "test": 200}  # segments of each synthetic split
ROWS = 600  # of a synthetic segment


@dataclass(frozen=True)
class Segment:
    """A segment of T steps of 0.1 s."""

    name: str
    """file name, or split and number of a synthetic segment"""
    target: np.ndarray
    """(T,) target lateral acceleration, m/s^2, with the sign of the steering"""
    roll: np.ndarray
    """(T,) lateral acceleration due to the road roll, sin(roll angle) * 9.81, m/s^2"""
    v: np.ndarray
    """(T,) speed, m/s"""
    a: np.ndarray
    """(T,) longitudinal acceleration, m/s^2"""
    steer: np.ndarray
    """(100,) steering of the first steps, -steerCommand"""


def load_segment(path: str | Path) -> Segment:
    """Read a log. Other columns are ignored, as is steerCommand from row 100 on.

    Raises:
        ValueError: a column is missing, too short or not finite.
    """
    path = Path(path)
    try:
        table = np.genfromtxt(path, delimiter=",", names=True, autostrip=True, encoding="utf-8-sig", usecols=COLUMNS)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a log with columns {', '.join(COLUMNS)} ({error}); remove it") from error
    if table.ndim == 0 or len(table) < MIN_ROWS:
        raise ValueError(f"{path}: {table.size} rows, but at least {MIN_ROWS} are needed; remove it")
    for name in COLUMNS:
        values = table[name][:FIRST] if name == "steerCommand" else table[name]
        if not np.isfinite(values).all():
            line = int(np.isfinite(values).argmin()) + 2
            raise ValueError(f"{path}, line {line}: {name} is not a finite number; correct or remove the file")
    return Segment(
        name=path.name,
        target=table["targetLateralAcceleration"].copy(),
        roll=np.sin(table["roll"]) * GRAVITY,
        v=table["vEgo"].copy(),
        a=table["aEgo"].copy(),
        steer=-table["steerCommand"][:FIRST],
    )


def load_folder(path: str | Path) -> list[Segment]:
    """All *.csv files of a folder, sorted by name."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder that holds the CSV files")
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"{path}: no CSV file in this folder; give the folder that holds them (not the one above it)")
    return [load_segment(file) for file in files]


def split_of(segments: list[Segment], split: str) -> list[Segment]:
    """The segments of a data folder for a split: the first 7/8 by name are train, the rest validation."""
    ordered = sorted(segments, key=lambda segment: segment.name)
    cut = len(ordered) * 7 // 8
    parts = {"train": ordered[:cut], "validation": ordered[cut:]}
    if split not in parts:
        raise ValueError(f"split {split!r}: a data folder is divided into train and validation; choose one of them")
    if not parts[split]:
        raise ValueError(f"{len(ordered)} segment(s) leave none for the split {split}; give a folder with more files")
    return parts[split]


def steady_gain(v: np.ndarray) -> np.ndarray:
    """Gain from steering and roll to lateral acceleration at speed v (m/s)."""
    return v**2 / (v**2 + 6.0**2)


def synthetic(split: str, count: int) -> list[Segment]:
    """The first `count` synthetic segments of a split; segment i depends on the split and i alone."""
    if split not in SYNTHETIC:
        raise ValueError(f"split {split!r}: choose one of {', '.join(SYNTHETIC)}")
    key = list(SYNTHETIC).index(split)
    draws = [_draw(np.random.default_rng(np.random.SeedSequence(2024, spawn_key=(key, i)))) for i in range(count)]
    if not draws:
        return []
    # Arrays are (T, n): the recursions below loop over time only
    noise, uniform, traits, chances = (np.stack(parts, axis=-1) for parts in zip(*draws))
    v, a = _speeds(noise[:3], traits[:3], chances)
    target = _targets(noise[3:6], uniform, traits[3:5], v)
    roll = _banks(noise[6], traits[5:7], v, target)
    # Steering that anticipates the response of the car 3 steps later; the floor is for a standing car
    needed = target[3 : FIRST + 3] / np.maximum(steady_gain(v[:FIRST]), 0.05) - roll[:FIRST]
    steer = np.clip(0.53 * needed + 0.05 * traits[7] + 0.02 * _ou(noise[7, :FIRST], 1.0), -2, 2)
    columns = (np.ascontiguousarray(x.T) for x in (target, roll, v, a, steer))
    return [Segment(f"{split}_{i:05d}", *arrays) for i, arrays in enumerate(zip(*columns))]


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """All random numbers of one segment: noise (8, T), uniform (T,), traits (8,) normal, chances (4,) uniform."""
    return rng.standard_normal((8, ROWS)), rng.random(ROWS), rng.standard_normal(8), rng.random(4)


def _lag(x: np.ndarray, tau: np.ndarray | float) -> np.ndarray:
    """First-order lag with time constant tau (s); x: (T, n)."""
    keep = np.exp(-DT / np.asarray(tau))
    y = np.empty_like(x)
    y[0] = x[0]
    for t in range(1, len(x)):
        y[t] = keep * y[t - 1] + (1 - keep) * x[t]
    return y


def _ou(noise: np.ndarray, tau: float) -> np.ndarray:
    """Ornstein-Uhlenbeck process of unit variance with time constant tau (s); noise: (T, n) white."""
    keep = np.exp(-DT / tau)
    y = np.empty_like(noise)
    y[0] = noise[0]
    for t in range(1, len(noise)):
        y[t] = keep * y[t - 1] + np.sqrt(1 - keep**2) * noise[t]
    return y


def _speeds(noise: np.ndarray, traits: np.ndarray, chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Speed and acceleration (T, n) of drivers that follow a slowly changing desired speed and sometimes stop."""
    # 58 % of the segments are on a highway, 29 % in town, the rest in slow streets
    highway, town = chances[0] < 0.58, (chances[0] >= 0.58) & (chances[0] < 0.87)
    cruise = np.where(highway, 30 + 2.6 * traits[0], np.where(town, 11 + 13 * chances[1], 4 + 7 * chances[1]))
    wish = np.maximum(cruise * (1 + np.where(highway, 0.05, 0.15) * _ou(noise[0], 15.0)), 0)
    bumps = np.where(highway, 0.1, 0.3) * np.exp(0.5 * traits[1]) * _lag(_ou(noise[1], 1.5), 0.3)  # m/s^2
    stops = chances[2] < np.where(highway, 0.03, np.where(town, 0.27, 0.55))
    begin = ROWS * (0.8 * chances[3] - 0.1)
    end = begin + 120 * np.exp(0.5 * traits[2])
    v, a = np.empty_like(wish), np.zeros_like(wish)
    v[0] = wish[0]
    for t in range(1, ROWS):
        goal = np.where(stops & (begin <= t) & (t < end), -1.0, wish[t])
        pull = np.clip((goal - v[t - 1]) / 3, -2.2, 1.6)
        a[t] = a[t - 1] + 0.2 * (pull - a[t - 1]) + bumps[t] - bumps[t - 1]
        v[t] = np.maximum(v[t - 1] + DT * a[t], 0)
        a[t] = (v[t] - v[t - 1]) / DT  # none while the car stands
    return v, a + 0.06 * noise[2]  # the sensor's noise


def _targets(noise: np.ndarray, uniform: np.ndarray, traits: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Target lateral acceleration (T, n): bends that begin at random, and the noise of a planner."""
    start = np.where(uniform < DT / 4, np.arange(ROWS)[:, None], 0)  # a new bend every 4 s on average
    size = 0.44 * np.exp(0.8 * np.clip(traits[0], -2.5, 1.4))  # of the segment's bends, m/s^2
    bend = size * np.take_along_axis(np.clip(noise[0], -2, 2), np.maximum.accumulate(start), axis=0)
    tau = 0.4 * np.exp(0.25 * traits[1])
    road = _lag(_lag(_lag(bend, tau), tau), tau)
    wobble = np.sqrt(size) * (0.115 * _lag(_ou(noise[1], 1.0), 0.1) + 0.022 * _ou(noise[2], 0.1))
    return np.clip((road + wobble) * steady_gain(v), -4.5, 4.5)


def _banks(noise: np.ndarray, traits: np.ndarray, v: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Lateral acceleration (T, n) due to road roll, which changes with the distance and in bends."""
    keep = np.exp(-v * DT / 100)  # correlation length 100 m
    bank = np.empty_like(v)
    bank[0] = noise[0]
    for t in range(1, ROWS):
        bank[t] = keep[t] * bank[t - 1] + np.sqrt(1 - keep[t] ** 2) * noise[t]
    hilly = 0.1 * np.exp(0.5 * traits[1])
    return 0.13 + 0.18 * traits[0] + hilly * _lag(_lag(bank, 0.5), 0.5) + 0.22 * _lag(_lag(target, 0.4), 0.4)
