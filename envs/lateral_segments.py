"""Segments of driving for LateralControl-v0: logs in the CSV format of the comma controls challenge, or made-up roads.

A segment says, for each step of 0.1 s, which lateral acceleration the car should have and what it meets on the way
(speed, acceleration, bank of the road). Synthetic segments need no file: they resemble the logs in their statistics.
"""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from envs.run import UserError

DT = 0.1  # s
CONTEXT = 20  # rows that the dynamics looks back
FIRST = 100  # first controlled row
LAST = 500  # costs are taken over rows FIRST..LAST-1
MIN_ROWS = LAST + 49  # the preview of the last controlled row is complete
GRAVITY = 9.81  # m/s^2

COLUMNS = ("vEgo", "aEgo", "roll", "targetLateralAcceleration", "steerCommand")
SYNTHETIC = {"train": 600, "validation": 100, "test": 200}  # segments of each synthetic split
ROWS = 600  # of a synthetic segment


@dataclass(frozen=True)
class Segment:
    """A drive of T rows, one each 0.1 s."""

    name: str
    """file name, or split and number of a synthetic segment"""
    target: np.ndarray
    """(T,) lateral acceleration wanted, m/s^2, left is positive"""
    roll: np.ndarray
    """(T,) lateral acceleration that the bank of the road gives, sin(roll angle) * 9.81, m/s^2"""
    v: np.ndarray
    """(T,) speed, m/s"""
    a: np.ndarray
    """(T,) longitudinal acceleration, m/s^2"""
    steer: np.ndarray
    """(100,) steering of the first rows in the simulator's sign, minus the log's steerCommand"""


def load_segment(path: str | Path) -> Segment:
    """Read one log. Columns beyond the five that a segment needs are ignored, as is steerCommand from row 100 on."""
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: damaged or not a CSV file ({error}); copy it anew or remove it") from error
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    header = [name.strip() for name in rows[0]] if rows else []
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(f"{path}: no column {', '.join(missing)}; the first line must name {', '.join(COLUMNS)}")
    if len(rows) - 1 < MIN_ROWS:
        raise UserError(f"{path}: {len(rows) - 1} rows of data; at least {MIN_ROWS} are needed, so remove the file")
    for line, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: {len(row)} cells for {len(header)} columns; mend or remove the file")
    cells = dict(zip(header, zip(*rows[1:])))
    read = partial(_column, path, cells)
    return Segment(
        name=path.name,
        target=read("targetLateralAcceleration"),
        roll=np.sin(read("roll")) * GRAVITY,
        v=read("vEgo"),
        a=read("aEgo"),
        steer=-read("steerCommand", FIRST),
    )


def _column(path: Path, cells: dict[str, tuple[str, ...]], name: str, rows: int | None = None) -> np.ndarray:
    """The first rows of a column (None: all) as float64."""
    try:
        values = np.array(list(map(float, cells[name][:rows])))
        if np.isfinite(values).all():
            return values
    except ValueError:  # the search below names the cell
        pass
    for line, cell in enumerate(cells[name], start=2):
        try:
            finite = np.isfinite(float(cell))
        except ValueError:
            finite = False
        if not finite:
            what = "is empty" if not cell.strip() else f"holds {cell[:20]!r}, not a finite number"
            raise UserError(f"{path}, line {line}: column {name} {what}; mend or remove the file")
    raise AssertionError("a cell was refused, then accepted")


def load_folder(path: str | Path) -> list[Segment]:
    """All *.csv files of a folder, sorted by name."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the folder that holds the CSV files")
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(f"{path}: no CSV file in this folder; give the folder that holds them (not the one above it)")
    return [load_segment(file) for file in files]


def split_of(segments: list[Segment], split: str) -> list[Segment]:
    """The part of a data folder that a split uses: by name the first 7/8 to train, the rest for validation."""
    ordered = sorted(segments, key=lambda segment: segment.name)
    cut = len(ordered) * 7 // 8
    parts = {"train": ordered[:cut], "validation": ordered[cut:]}
    if split not in parts:
        raise UserError(f"split {split!r}: a data folder is divided into train and validation; choose one of them")
    if not parts[split]:
        raise UserError(f"{len(ordered)} segment(s) leave none for the split {split}; give a folder with more files")
    return parts[split]


def steady_gain(v: np.ndarray) -> np.ndarray:
    """Share of steering and bank that becomes lateral acceleration at speed v: a slow car answers less."""
    return v**2 / (v**2 + 6.0**2)


def synthetic(split: str, count: int) -> list[Segment]:
    """The first `count` synthetic segments of a split; segment i depends on the split and i alone."""
    key = list(SYNTHETIC).index(split)
    draws = [_draw(np.random.default_rng(np.random.SeedSequence(2024, spawn_key=(key, i)))) for i in range(count)]
    if not draws:
        return []
    # Rows are time, columns are segments: the recursions below loop over time only
    noise, uniform, traits, chances = (np.stack(parts, axis=-1) for parts in zip(*draws))
    v, a = _speeds(noise[0], noise[1], traits[:3], chances)
    target = _targets(noise[2:5], uniform, traits[3:5], v)
    roll = _banks(noise[5], traits[5], v, target)
    ahead = np.concatenate([target[3:], np.repeat(target[-1:], 3, axis=0)])  # the car answers 3 rows later
    steer = 0.53 * (ahead / np.maximum(steady_gain(v), 0.05) - roll) + 0.05 * traits[6] + 0.02 * _ou(noise[6], 1.0)
    columns = (np.ascontiguousarray(x.T) for x in (target, roll, v, a, np.clip(steer[:FIRST], -2, 2)))
    return [Segment(f"{split}_{i:05d}", *arrays) for i, arrays in enumerate(zip(*columns))]


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """All random numbers of one segment: noise (7, T), uniform (T,), traits (7,) normal, chances (4,) uniform."""
    return rng.standard_normal((7, ROWS)), rng.random(ROWS), rng.standard_normal(7), rng.random(4)


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


def _speeds(bumps: np.ndarray, drift: np.ndarray, traits: np.ndarray, chances: np.ndarray) -> tuple[np.ndarray, ...]:
    """Speed and acceleration (T, n) of a driver who follows a slowly changing wish and sometimes stops."""
    highway, town = chances[0] < 0.64, (chances[0] >= 0.64) & (chances[0] < 0.87)
    cruise = np.where(highway, 30 + 3.2 * traits[0], np.where(town, 11 + 13 * chances[1], 3 + 8 * chances[1]))
    restless = np.where(highway, 0.15, 0.4) * np.exp(0.5 * traits[1])  # sd of the acceleration, m/s^2
    stops = chances[2] < np.where(highway, 0.01, np.where(town, 0.3, 0.6))
    begin, end = (ROWS * (chances[3] * 0.9 - 0.1), ROWS * (chances[3] * 0.9 - 0.1) + 80 * np.exp(0.5 * traits[2]))
    wish = np.maximum(cruise * (1 + 0.07 * _ou(drift, 15.0)), 0)
    bumps = restless * _lag(_ou(bumps, 1.5), 0.3)
    v, a = np.empty_like(wish), np.empty_like(wish)
    v[0], a[0] = wish[0], 0
    for t in range(1, len(wish)):
        goal = np.where(stops & (t >= begin) & (t < end), -1.0, wish[t])
        pull = np.clip((goal - v[t - 1]) / 4, -2.0, 1.5)
        a[t] = a[t - 1] + 0.15 * (pull - a[t - 1]) + 0.3 * (bumps[t] - bumps[t - 1])
        v[t] = np.maximum(v[t - 1] + DT * a[t], 0)
        a[t] = (v[t] - v[t - 1]) / DT
    return v, a


def _targets(noise: np.ndarray, uniform: np.ndarray, traits: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Lateral acceleration (T, n) of a road whose bends begin at random, with the wobble of a planner on top."""
    start = np.where(uniform < DT / 4, np.arange(ROWS)[:, None], 0)  # a new bend every 4 s on average
    size = 0.36 * np.exp(0.7 * np.clip(traits[0], -2, 1.7))  # of the segment's bends, m/s^2
    bend = size * np.take_along_axis(np.clip(noise[0], -2, 2), np.maximum.accumulate(start), axis=0)
    tau = 0.4 * np.exp(0.25 * traits[1])
    road = _lag(_lag(_lag(bend, tau), tau), tau)
    wobble = np.sqrt(size) * (0.11 * _lag(_ou(noise[1], 1.0), 0.1) + 0.02 * _ou(noise[2], 0.1))
    return np.clip((road + wobble) * steady_gain(v), -4.5, 4.5)


def _banks(noise: np.ndarray, offset: np.ndarray, v: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Lateral acceleration (T, n) of a road's bank: it changes with the distance driven, and bends are banked."""
    keep = np.exp(-v * DT / 100)  # correlation length 100 m
    bank = np.empty_like(v)
    bank[0] = noise[0]
    for t in range(1, len(v)):
        bank[t] = keep[t] * bank[t - 1] + np.sqrt(1 - keep[t] ** 2) * noise[t]
    return 0.13 + 0.18 * offset + 0.13 * _lag(_lag(bank, 0.5), 0.5) + 0.22 * _lag(_lag(target, 0.4), 0.4)
