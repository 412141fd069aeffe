"""Start states of episodes. They are drawn once; an episode selects one and is deterministic from there.

Each scenario has a number of starts: pose and goal of the robot, and position, path and group of each pedestrian.
`World` holds them as tensors.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.socnav.dynamics import PEDESTRIAN_RADIUS
from envs.socnav.scenarios import NOMINAL_SPEED, ROLES, Box, Point, Scenario, Single, Stream

SPEED_CAP = 1.3  # desired and maximum speed, relative to the nominal speed
GROUP_SIZES = np.array([1.0, 0.3, 0.09]) / 1.39  # probabilities of groups of one, two and three
SPREAD = 0.75  # m, standard deviation of a group around its anchor, truncated at two
TURNED = 0.6  # rad, largest angle between robot and route at the start, in training
PASSERS_BY = (0.4, 0.2, 0.2, 0.1, 0.1)  # probabilities of 0, 1, ... additional pedestrians in training
STANDING = 0.3  # fraction of them that stand on the route
PASSING = 1.9  # m from the walls, so that the robot can pass
ROOM = 2.5  # m between the robot and a pedestrian of a crowd at the start
LAPS = 8  # waypoints of a pedestrian in a zone
GROUP_ARRIVES, SINGLE_ARRIVES = 1.0, 0.2  # m; distance at which a waypoint counts as reached
STOP, RESPAWN, LOOP = range(3)  # at the end of a path
FAR = 1e4  # m, position of unused rectangles and pedestrians
# Cell sizes (m) of the rasters from which occupancy grids are read; the coarse one fits into the CPU cache
COARSE, FINE = 0.25, 0.1


class Start:
    """One start of a scenario, drawn from rng. Lists have one entry per pedestrian."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator, pedestrians: bool, varied: bool):
        self.rng, self.size = rng, scenario.size
        low, high = np.split(scenario.rectangles().T[..., None], 2)  # corners of the walls, (2, R, 1)
        self.walls = low, high
        begin, end = inside(scenario.start, rng), inside(scenario.goal, rng)
        self.route, self.turn = np.array([begin, *scenario.via, end]), 0.0
        if varied:
            self._vary(scenario)
        self.position, self.path, self.pauses, self.speed = [], [], [], []
        self.first, self.end, self.respawn, self.arrives = [], [], [], []
        self.group, self.member, self.role, self.offset = [], [], [], []
        if not pedestrians:
            return
        for crowd in scenario.crowds:
            self._crowd(crowd)
        names: dict[str, int] = {}
        for one in scenario.pedestrians:
            self._single(one, names)
        self._send_to_their_group()
        if varied:
            self._passers_by()

    def _vary(self, scenario: Scenario) -> None:
        """For training: reverse the route, start anywhere on it, and turn the robot."""
        self.turn = self.rng.uniform(-TURNED, TURNED)
        route = self.route[::-1] if self.rng.random() < 0.5 else self.route
        begin, passed = on_route(route, self.rng.choice([0, self.rng.uniform(0, 0.7)]))
        taken = [np.hypot(*(begin - one.path[0])) < ROOM for one in scenario.pedestrians]
        beside = [one.role in ("follow", "lead", "accompany") for one in scenario.pedestrians]
        if not any(taken) and not any(beside):
            self.route = np.vstack([begin, route[passed + 1 :]])

    def _passers_by(self) -> None:
        """For training: add pedestrians that cross the robot's route or stand on it."""
        for _ in range(self.rng.choice(len(PASSERS_BY), p=PASSERS_BY)):
            appear = self._stand if self.rng.random() < STANDING else self._cross
            for _ in range(20):
                if appear():
                    break

    def _cross(self) -> bool:
        """Add a pedestrian that crosses the route. Returns False if there is no room."""
        meeting, _ = on_route(self.route, self.rng.uniform(0.1, 1))
        angle, before, after = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(1, 10), self.rng.uniform(2, 10)
        along = np.array([np.cos(angle), np.sin(angle)])
        between = meeting + np.arange(-before, after, 0.3)[:, None] * along
        if not self.free(between[0]) or self.off_walls(between) < PEDESTRIAN_RADIUS:
            return False
        self._add(between[0], between[-1:], len(self.group), speed=NOMINAL_SPEED * self.rng.uniform(0.6, 1.6))
        return True

    def _stand(self) -> bool:
        """Add a pedestrian that stands near the route, where the robot can pass. Returns False if there is no room."""
        place = on_route(self.route, self.rng.uniform(0.2, 0.9))[0] + self.rng.normal(0, 0.7, 2)
        if not self.free(place) or self.off_walls(place[None]) < PASSING:
            return False
        self._add(place, [], len(self.group), pauses=np.array([np.inf]), role="wait")
        return True

    def off_walls(self, places: np.ndarray) -> float:
        """Smallest distance of any of these points (n, 2) from a wall, m."""
        low, high = self.walls
        places = places.T[:, None]  # (2, 1, n)
        x, y = np.maximum(np.maximum(low - places, places - high), 0)
        return float(np.hypot(x, y).min())

    def _add(self, position: Point, path: np.ndarray, group: int, **more: Any) -> None:
        self.position.append(np.asarray(position))
        self.path.append(np.asarray(path, float).reshape(-1, 2))
        self.group.append(group)
        defaults = {
            "pauses": np.zeros(len(path) + 1), "speed": NOMINAL_SPEED, "first": 0, "end": STOP, "respawn": position,
            "arrives": GROUP_ARRIVES, "member": True, "role": None, "offset": (0.0, 0.0),
        }  # fmt: skip
        for name, value in {**defaults, **more}.items():
            getattr(self, name).append(value)

    def _crowd(self, crowd: Stream) -> None:
        missing = crowd.count
        if crowd.spread:
            sizes = [1] * missing
        else:
            sizes = []
            while sum(sizes) < missing:
                sizes.append(min(1 + self.rng.choice(3, p=GROUP_SIZES), missing - sum(sizes)))
        for k, size in enumerate(sizes):
            leader = len(self.group)
            if crowd.zone is not None:
                anchor, path = inside(crowd.zone, self.rng), [inside(crowd.zone, self.rng) for _ in range(LAPS)]
                how = {"end": LOOP}
            else:
                share = (k + self.rng.uniform(0.4, 0.6)) / len(sizes) if crowd.spread else self.rng.uniform()
                anchor, passed = on_route(np.array(crowd.route), share)
                path, how = crowd.route[1:], {"end": RESPAWN, "first": passed}
            back = inside(crowd.start, self.rng) if crowd.start is not None else anchor
            for _ in range(size):
                again = self._near(back, size == 1, lambda place: self.off_walls(place[None]) > PEDESTRIAN_RADIUS)
                self._add(self._near(anchor, size == 1, self.free), path, leader, respawn=again, **how)

    def _near(self, anchor: np.ndarray, alone: bool, free: Callable[[np.ndarray], bool]) -> np.ndarray:
        """A free position near the anchor of a group; every 50 attempts the search radius grows."""
        for attempt in range(200):
            wide = 0.0 if alone and attempt == 0 else SPREAD * (1 + attempt // 50)
            place = anchor + np.clip(self.rng.normal(0, 1, 2), -2, 2) * wide
            if free(place):
                return place
        raise ValueError(f"no room for a pedestrian near {anchor.round(1).tolist()}: the crowd is too dense")

    def free(self, place: np.ndarray) -> bool:
        """Whether a pedestrian can stand there: away from walls, other pedestrians and the robot."""
        (x, y), (width, height), (robot_x, robot_y) = place.tolist(), self.size, self.route[0]
        if not (0 <= x <= width and 0 <= y <= height) or np.hypot(x - robot_x, y - robot_y) < ROOM:
            return False
        if self.off_walls(place[None]) < PEDESTRIAN_RADIUS + 0.1:
            return False
        if not self.position:
            return True
        others = np.concatenate(self.position).reshape(-1, 2) - place
        return bool(np.hypot(others[:, 0], others[:, 1]).min() > PEDESTRIAN_RADIUS)

    def _single(self, one: Single, names: dict[str, int]) -> None:
        position = np.array(one.path[0]) + self.rng.uniform(-0.25, 0.25, 2)
        path = np.array(one.path[1:]).reshape(-1, 2)
        pauses = np.zeros(len(path) + 1)
        pauses[0] = np.inf if one.role == "wait" else one.delay
        for index, seconds in one.wait:
            pauses[index] += seconds
        group = names.setdefault(one.group, len(self.group)) if one.group is not None else len(self.group)
        self._add(
            position, path, group, pauses=pauses, speed=one.speed, arrives=SINGLE_ARRIVES, member=one.role != "join",
            role=one.role, offset=one.offset,
        )  # fmt: skip

    def _send_to_their_group(self) -> None:
        """Pedestrians with the role join walk to the center of their group."""
        for i, role in enumerate(self.role):
            if role == "join":
                others = [p for k, p in enumerate(self.position) if self.group[k] == self.group[i] and self.member[k]]
                self.path[i] = np.vstack([self.path[i], np.mean(others, axis=0)])
                self.pauses[i] = np.append(self.pauses[i], 0.0)


def inside(box: Box, rng: np.random.Generator) -> np.ndarray:
    x0, y0, x1, y1 = box
    return np.array([rng.uniform(x0, x1), rng.uniform(y0, y1)])  # many times faster than one call with arrays


def on_route(route: np.ndarray, share: float) -> tuple[np.ndarray, int]:
    """The point at a fraction of the route, and how many waypoints after the first are behind it."""
    along = route[1:] - route[:-1]
    steps = np.hypot(along[:, 0], along[:, 1])
    end = np.cumsum(steps)
    s = share * end[-1]
    k = min(int(np.searchsorted(end, s, side="right")), len(steps) - 1)
    begin = end[k - 1] if k > 0 else 0.0
    return route[k] + (s - begin) / steps[k] * along[k], k


class Raster(NamedTuple):
    """Cells of M maps whose center is in an obstacle. Positions outside a map read its rim, which is wall."""

    cell: float  # m
    solid: Tensor  # uint8, flat: all maps, each rows x columns
    begin: Tensor  # (M,) int32, where each map begins
    shape: Tensor  # (2, M) int32, its rows, along y, and its columns, along x


def rasterize(scenario: Scenario, cell: float) -> np.ndarray:
    """The cells of one map, uint8 (rows, columns)."""
    columns, rows = (int(np.ceil(length / cell - 1e-9)) for length in scenario.size)
    x, y = (np.arange(columns) + 0.5) * cell, (np.arange(rows) + 0.5) * cell
    solid = np.zeros((rows, columns), np.uint8)
    for x0, y0, x1, y1 in scenario.rectangles():
        solid[np.ix_((y >= y0) & (y <= y1), (x >= x0) & (x <= x1))] = 1
    solid[[0, -1]] = solid[:, [0, -1]] = 1
    return solid


def padded(lists: list[list], shape: tuple[int, ...], fill: float = 0.0) -> np.ndarray:
    """Lists of unequal length, each entry of `shape` or shorter along its first axis, as one array (S, P, *shape)."""
    most = max(1, *(len(one) for one in lists))
    out = np.full((len(lists), most, *shape), fill)
    for i, one in enumerate(lists):
        for k, entry in enumerate(one):
            entry = np.asarray(entry, float)
            out[(i, k, slice(len(entry))) if shape and entry.shape != shape else (i, k)] = entry
    return out


class World:
    """Maps and starts of some scenarios as tensors; M maps, S starts, P pedestrians at most, W waypoints, K legs of a
    route, R rectangles.

    Attributes:
        names: of the M scenarios; starts_each: start k of scenario m has index m * starts_each + k.
        rectangles (4, M, R), size (2, M), coarse and fine (rasters): the maps.
        map, limit (S,), pose (3, S): the map of each start, its time limit in steps, the robot's pose.
        waypoints (2, S, K + 1), along (2, S, K), leg_length (S, K), arc (S, K + 1): the routes, m.
        pedestrians: {name: (S, P, ...)}, vectors component-first; count (S,).
    """

    def __init__(
        self, scenarios: list[Scenario], starts_each: int, pedestrians: bool, varied: bool, stream: str, device: str
    ):
        self.names, self.starts_each = [one.name for one in scenarios], starts_each
        starts = [
            Start(one, np.random.default_rng([zlib.crc32(f"{stream} {one.name}".encode()), k]), pedestrians, varied)
            for one in scenarios
            for k in range(starts_each)
        ]
        which = np.repeat(np.arange(len(scenarios)), starts_each)

        def tensor(x: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(x), device=device).to(dtype)

        def components_first(x: np.ndarray) -> Tensor:
            return tensor(np.moveaxis(x, -1, 0))

        self._maps(scenarios, tensor, components_first)
        self.map = tensor(which, torch.int64)
        self.limit = tensor([scenarios[m].time_limit for m in which], torch.int64)
        self._routes(starts, tensor, components_first)
        self._pedestrians(starts, tensor, components_first)

    def _maps(self, scenarios: list[Scenario], tensor: Any, components_first: Any) -> None:
        self.rectangles = components_first(padded([list(one.rectangles()) for one in scenarios], (4,), FAR))
        self.coarse, self.fine = (self._raster(scenarios, cell, tensor) for cell in (COARSE, FINE))
        self.size = tensor(np.array([one.size for one in scenarios]).T)

    def _raster(self, scenarios: list[Scenario], cell: float, tensor: Any) -> Raster:
        maps = [rasterize(one, cell) for one in scenarios]
        begin = np.cumsum([0, *(m.size for m in maps[:-1])])
        shape = np.array([m.shape for m in maps]).T
        solid = tensor(np.concatenate([m.ravel() for m in maps]), torch.uint8)
        return Raster(cell, solid, *(tensor(x, torch.int32) for x in (begin, shape)))

    def _routes(self, starts: list[Start], tensor: Any, components_first: Any) -> None:
        routes = [s.route for s in starts]
        most = max(len(r) for r in routes)  # shorter ones get legs of length zero at the goal
        routes = np.array([np.vstack([r, np.repeat(r[-1:], most - len(r), 0)]) for r in routes])
        along = np.diff(routes, axis=1)
        steps = np.hypot(along[..., 0], along[..., 1])
        self.waypoints = components_first(routes)
        self.along, self.leg_length = components_first(along), tensor(steps)
        self.arc = tensor(np.concatenate([np.zeros((len(starts), 1)), np.cumsum(steps, 1)], 1))
        heading = np.arctan2(along[:, 0, 1], along[:, 0, 0]) + [s.turn for s in starts]
        self.pose = tensor(np.stack([*routes[:, 0].T, heading]))

    def _pedestrians(self, starts: list[Start], tensor: Any, components_first: Any) -> None:
        def column(name: str, *shape: int) -> np.ndarray:
            return padded([getattr(s, name) for s in starts], shape)

        waypoints = max([len(path) for s in starts for path in s.path], default=1) or 1
        self.count = tensor([len(s.position) for s in starts], torch.int64)
        self.slots = max(1, int(self.count.max()))
        last = padded([[len(path) - 1 for path in s.path] for s in starts], ())
        codes = padded([[ROLES.index(role) for role in s.role] for s in starts], ())
        absent = np.arange(self.slots) >= self.count.cpu().numpy()[:, None]
        position = np.where(absent[..., None], FAR, column("position", 2))
        self.pedestrians = {
            "position": components_first(position),
            **{name: components_first(column(name, 2)) for name in ("respawn", "offset")},
            "path": components_first(column("path", waypoints, 2)),
            "pauses": tensor(column("pauses", waypoints + 1)),
            "speed": tensor(SPEED_CAP * column("speed")),
            "arrives": tensor(column("arrives")),
            **{name: tensor(column(name), torch.int64) for name in ("first", "end", "group")},
            "last": tensor(last, torch.int64),
            "role": tensor(codes, torch.int64),
            "member": tensor(column("member"), torch.bool),
        }
