"""The scenarios, and their mirrored, scaled and cluttered variants.

A scenario is a map of axis-aligned rectangles, a route for the robot, and pedestrians: crowds along a route or in a
zone, and single ones with a path and a role. docs/own_maps.md describes the files, in m and s, x right, y up.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from envs.evaluation import read_json
from envs.socnav.dynamics import DT, PEDESTRIAN_RADIUS

FILE = str(Path(__file__).parents[1] / "assets" / "socnav_scenarios.json")
NOMINAL_SPEED = 0.5  # m/s of a pedestrian
LANE = 3.0  # m, width of a route, for its density
GATES, CLUTTER = 4, 6  # largest numbers of gate boxes and of all boxes in a cluttered scenario
TRAINING_VARIANTS = [(mirror, scale) for scale in (1.0, 0.85, 1.15) for mirror in (False, True)]
VALIDATION_VARIANTS = [(True, 0.92), (False, 1.25), (True, 1.08)]  # of every third training scenario in turn

ROBOT_RADIUS, ROBOT_SPEED = 0.6, 2.0  # m and m/s of the default robot, for the checks of a file
ROLES = (None, "wait", "follow", "lead", "accompany", "join", "leave")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Point = tuple[float, float]


@dataclass(frozen=True)
class Stream:
    """A crowd that walks along a route again and again, or between random points of a zone."""

    density: float  # pedestrians per m^2
    route: tuple[Point, ...] = ()
    start: Box | None = None  # where pedestrians of a route reappear
    zone: Box | None = None
    spread: bool = False  # evenly spaced single pedestrians instead of groups

    @property
    def count(self) -> int:
        if self.zone is not None:
            x0, y0, x1, y1 = self.zone
            area = (x1 - x0) * (y1 - y0)
        else:
            area = sum(np.hypot(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.route)) * LANE
        return int(np.ceil(area * self.density - 1e-9))


@dataclass(frozen=True)
class Single:
    """One pedestrian, from path[0] along the rest of its path."""

    path: tuple[Point, ...]
    speed: float = NOMINAL_SPEED  # nominal; the desired speed is 1.3 times this
    wait: tuple[tuple[int, float], ...] = ()  # (index of a waypoint, seconds there)
    delay: float = 0.0  # s before it starts
    role: str | None = None
    offset: Point = (0.0, 0.0)  # forward and left of the robot, for follow, lead and accompany
    group: str | None = None


@dataclass(frozen=True)
class Scenario:
    name: str
    size: Point
    time_limit: int  # steps
    start: Box
    goal: Box
    split: str | None = None  # None: in all splits
    via: tuple[Point, ...] = ()
    obstacles: tuple[Box, ...] = ()
    border: float = 1.0  # thickness of the surrounding wall, m
    crowds: tuple[Stream, ...] = ()
    pedestrians: tuple[Single, ...] = ()

    @property
    def count(self) -> int:
        return len(self.pedestrians) + sum(crowd.count for crowd in self.crowds)

    def rectangles(self) -> np.ndarray:
        """Walls and obstacles (R, 4)."""
        (w, h), b = self.size, self.border
        walls = [(0, 0, w, b), (0, h - b, w, h), (0, 0, b, h), (w - b, 0, w, h)]
        return np.array([*walls, *self.obstacles], float)


def frozen(x: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(frozen(item) for item in x) if isinstance(x, list) else x


SHAPES = {  # of entries that are numbers; -1 is any length
    **dict.fromkeys(("time_limit", "border", "density", "speed", "delay"), ()),
    **dict.fromkeys(("size", "offset"), (2,)), **dict.fromkeys(("start", "goal", "zone"), (4,)),
    **dict.fromkeys(("via", "route", "path", "wait"), (-1, 2)), "obstacles": (-1, 4),
}  # fmt: skip


def has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    try:
        found = np.array(value, float).shape
    except (TypeError, ValueError):
        return False
    empty = value == [] and shape[:1] == (-1,)
    return empty or (len(found) == len(shape) and all(n in (-1, m) for n, m in zip(shape, found)))


def parse(kind: type, entry: dict, where: str) -> Any:
    """An entry of the file as a dataclass. Raises ValueError for unknown, missing and malformed values."""
    known = {field.name: field.default is MISSING for field in fields(kind)}
    for name, value in entry.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}; choose from {', '.join(known)}")
        if name in SHAPES and not has_shape(value, SHAPES[name]):
            shape = str(SHAPES[name]).replace("-1", "n") if SHAPES[name] else ""
            raise ValueError(f"{where}: {name} must be {f'numbers of shape {shape}' if shape else 'a number'}")
    if missing := [name for name, required in known.items() if required and name not in entry]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return kind(**{name: frozen(value) for name, value in entry.items()})


def check(scenario: Scenario) -> None:
    """Raises ValueError for a scenario that cannot be solved, or whose pedestrians are inside obstacles."""
    size, obstacles = np.array(scenario.size), scenario.rectangles()

    def free(points: Sequence[Point], clearance: float, what: str) -> None:
        points = np.array(points)
        near = np.min([to_box(points, box) for box in obstacles], axis=0) < clearance
        near |= ((points < 0) | (points > size)).any(1)
        if near.any():
            place = points[near][0].round(1).tolist()
            raise ValueError(f"{what} is inside an obstacle, or less than {clearance} m from it, at {place}")

    if any(x0 > x1 or y0 > y1 for x0, y0, x1, y1 in [scenario.start, scenario.goal, *scenario.obstacles]):
        raise ValueError("a box must be [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1")
    free(corners(scenario.start), ROBOT_RADIUS, "the robot's start")
    free(corners(scenario.goal), ROBOT_RADIUS, "the robot's goal")
    free(robot_ways(scenario), ROBOT_RADIUS, "the robot's route")
    route = [np.mean(corners(scenario.start), 0), *scenario.via, np.mean(corners(scenario.goal), 0)]
    steps = np.hypot(*np.diff(route, axis=0).T).sum() / ROBOT_SPEED / DT
    if scenario.time_limit < steps:
        raise ValueError(f"time_limit is {scenario.time_limit}, but the route takes at least {steps:.0f} steps")
    for k, crowd in enumerate(scenario.crowds):
        if (len(crowd.route) < 2) == (crowd.zone is None):
            raise ValueError(f"crowds[{k}]: give either a route of at least two points or a zone")
        middle = [np.reshape(crowd.zone, (2, 2)).mean(0)] if crowd.zone is not None else dense(crowd.route)
        free(middle, PEDESTRIAN_RADIUS, f"crowds[{k}]")
    for k, one in enumerate(scenario.pedestrians):
        if one.role not in ROLES:
            raise ValueError(f"pedestrians[{k}]: unknown role {one.role!r}; choose from {', '.join(ROLES[1:])}")
        if not one.path or any(not 0 <= index < len(one.path) for index, _ in one.wait):
            raise ValueError(f"pedestrians[{k}]: path needs a point, and wait the indices of its points")
        free(dense(one.path), PEDESTRIAN_RADIUS, f"pedestrians[{k}]: path")


@functools.cache
def load_scenarios(file: str = FILE) -> dict[str, Scenario]:
    """All scenarios of a file by name.

    Raises:
        ValueError: the file cannot be read or contains an invalid scenario.
    """
    found: dict[str, Scenario] = {}
    for k, entry in enumerate(read_json(file).get("scenarios", ())):
        name = entry.get("name", k) if isinstance(entry, dict) else k
        try:
            parts = {"crowds": Stream, "pedestrians": Single}
            people = {key: tuple(parse(part, one, key) for one in entry.get(key, ())) for key, part in parts.items()}
            rest = {key: value for key, value in entry.items() if key not in ("robot", *parts)}
            scenario = replace(parse(Scenario, rest | entry.get("robot", {}), "scenario"), **people)
            if scenario.split not in (None, "train", "validation", "test"):
                raise ValueError(f"split must be train, validation or test, not {scenario.split!r}")
            if name in found:
                raise ValueError("another scenario has the same name")
            if file != FILE:
                check(scenario)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, scenario {name}: {error}") from None
        found[name] = scenario
    return found


def variant(scenario: Scenario, mirror: bool, scale: float) -> Scenario:
    """The scenario mirrored (y -> -y) and scaled, with as many pedestrians."""
    height = scenario.size[1]

    def point(p: Point) -> Point:
        return (p[0] * scale, (height - p[1] if mirror else p[1]) * scale)

    def box(b: Box | None) -> Box | None:
        if b is None:
            return None
        (x0, ya), (x1, yb) = point(b[:2]), point(b[2:])
        return (x0, min(ya, yb), x1, max(ya, yb))

    def points(path: tuple[Point, ...]) -> tuple[Point, ...]:
        return tuple(point(p) for p in path)

    crowds = tuple(
        replace(c, route=points(c.route), start=box(c.start), zone=box(c.zone), density=c.density / scale**n)
        for c in scenario.crowds
        for n in [2 if c.zone is not None else 1]
    )
    singles = tuple(
        replace(one, path=points(one.path), offset=(one.offset[0], -one.offset[1] if mirror else one.offset[1]))
        for one in scenario.pedestrians
    )
    name = scenario.name + ("/mirrored" if mirror else "") + (f"/{scale:g}" if scale != 1 else "")
    return replace(
        scenario,
        name=name,
        size=(scenario.size[0] * scale, height * scale),
        border=scenario.border * scale,
        time_limit=int(scenario.time_limit * max(scale, 1)),
        start=box(scenario.start),
        goal=box(scenario.goal),
        via=points(scenario.via),
        obstacles=tuple(box(b) for b in scenario.obstacles),
        crowds=crowds,
        pedestrians=singles,
    )


def corners(box: Box) -> list[Point]:
    return [(x, y) for x in box[::2] for y in box[1::2]]


def robot_ways(scenario: Scenario) -> np.ndarray:
    """Points (n, 2) along the routes from each corner of the robot's start to each corner of its goal."""
    ends = [(a, b) for a in corners(scenario.start) for b in corners(scenario.goal)]
    return np.concatenate([dense([a, *scenario.via, b]) for a, b in ends])


def blocks_nobody(scenario: Scenario) -> Callable[[np.ndarray], bool]:
    """A function that tells whether a box (4,) is inside the map and leaves all routes, zones, start and goal free."""
    driven = robot_ways(scenario)
    paths = [*(c.route for c in scenario.crowds), *(p.path for p in scenario.pedestrians)]
    walked = np.concatenate([dense(path) for path in paths if path] or [np.full((1, 2), np.inf)])
    kept_free = [c.zone for c in scenario.crowds if c.zone is not None]
    kept_free += [(x0 - 1, y0 - 1, x1 + 1, y1 + 1) for x0, y0, x1, y1 in (scenario.start, scenario.goal)]

    def test(box: np.ndarray) -> bool:
        free = to_box(driven, box).min() >= 1.0 and to_box(walked, box).min() >= 1.4
        outside = (box < 0).any() or (box > [*scenario.size, *scenario.size]).any()
        return free and not outside and not any(overlap(box, zone) for zone in kept_free)

    return test


def gate(ahead: np.ndarray, place: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Two boxes 2 to 2.8 m apart, left and right of a point (2,) of a route with direction `ahead` (2,)."""
    along = ahead / max(np.hypot(*ahead), 1e-6)
    across, half = np.array([-along[1], along[0]]), rng.uniform(0.3, 1.2, 2)
    apart = rng.uniform(1.0, 1.4) + np.abs(across) @ half
    return [around(place + side * apart * across, half) for side in (-1, 1)]


def cluttered(scenario: Scenario, rng: np.random.Generator) -> Scenario:
    """The scenario with boxes near the route: up to two gates and single boxes that block no route."""
    fits, ways, boxes = blocks_nobody(scenario), robot_ways(scenario), []
    middle = dense([np.mean(corners(scenario.start), 0), *scenario.via, np.mean(corners(scenario.goal), 0)])
    for _ in range(40):
        k = rng.integers(len(middle) - 1)
        pair = gate(middle[k + 1] - middle[k], middle[k], rng)
        boxes += pair if len(boxes) < GATES and all(fits(box) for box in pair) else []
    for _ in range(60):
        if len(boxes) == CLUTTER:
            break
        box = around(rng.choice(ways) + rng.uniform(-3.5, 3.5, 2), rng.uniform(0.3, 1.2, 2))
        boxes += [box] if fits(box) else []
    obstacles = (*scenario.obstacles, *(tuple(box.tolist()) for box in boxes))
    return replace(scenario, name=f"{scenario.name}/cluttered", obstacles=obstacles)


def around(centre: np.ndarray, half: np.ndarray) -> np.ndarray:
    """The box (4,) with this center (2,) and half size (2,)."""
    return np.concatenate([centre - half, centre + half])


def dense(path: Sequence[Point]) -> np.ndarray:
    """Points along a path, at most 0.3 m apart, (n, 2)."""
    points = [np.array(path[:1], float)]
    for a, b in pairwise(np.array(path, float)):
        n = int(np.ceil(np.hypot(*(b - a)) / 0.3)) + 1
        points.append(np.linspace(a, b, n))
    return np.concatenate(points)


def to_box(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Distances (n,) of points (n, 2) from a box."""
    x, y = points.T
    return np.hypot(x - np.minimum(np.maximum(x, box[0]), box[2]), y - np.minimum(np.maximum(y, box[1]), box[3]))


def overlap(a: Box, b: Box) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def choose(split: str, training: bool, scenario: str | None, file: str = FILE) -> list[Scenario]:
    """The scenarios of a split, or the one of that name.

    Training adds mirrored, scaled and cluttered variants. Validation has its own scenarios and other variants of
    the training scenarios.

    Raises:
        ValueError: there is no such scenario, or it is kept for the test split.
    """
    every = load_scenarios(file)
    if scenario is not None:
        if scenario not in every:
            raise ValueError(f"no scenario {scenario!r}; there are {', '.join(every)}")
        if every[scenario].split == "test" and split != "test":
            raise ValueError(f"scenario {scenario} is kept for the test split, for reports; train on another")
        chosen = [every[scenario]]
    else:
        chosen = [one for one in every.values() if one.split in (split, None)]
    if training:
        varied = [variant(one, mirror, scale) for one in chosen for mirror, scale in TRAINING_VARIANTS]
        return varied + [cluttered(one, np.random.default_rng(i)) for i, one in enumerate(varied)]
    if split == "validation" and scenario is None:
        third = [one for one in every.values() if one.split == "train"][::3]
        chosen += [variant(one, *VALIDATION_VARIANTS[i % 3]) for i, one in enumerate(third)]
    if not chosen:
        raise ValueError(f"{file} has no scenario for the {split} split")
    return chosen
