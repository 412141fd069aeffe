"""What row 0 of a SocNavGrid looks like: its map from above, and beside it the occupancy grid that the robot sees."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from envs.raster import GRID, INK, PAPER
from envs.socnav.dynamics import DT, PEDESTRIAN_RADIUS
from envs.socnav.grid import NEARER
from envs.socnav.starts import FAR

WIDTH, HEIGHT = 900, 520  # px, of a frame
MARGIN, TOP, INSET = 12, 54, 192  # px: around everything, above the map, side of the picture of a grid
SMOOTH = 2  # pixels drawn for each one shown, along each side
AHEAD = 1.5  # s of a pedestrian's motion that its line shows
FADES, SHADES = 60, 6  # points after which a pedestrian's trail has faded away, and in how many shades
JUMP = 2.0  # m between two points of a trail, above which somebody has appeared elsewhere

Colour = tuple[int, int, int]
ROBOT, PERSON, WALL, GOAL = (30, 90, 200), (200, 40, 40), (150, 150, 150), (20, 130, 60)
ROUTE, DRIVEN, ZONE, MOTION = (120, 185, 145), (140, 175, 235), (226, 242, 231), (110, 10, 10)
# of the occupancy grid; later ones cover earlier ones
PLANES: dict[str, Colour] = {"combined": (150, 110, 180), "obstacles": WALL, "pedestrians": PERSON, "near": WALL}


class Plan(NamedTuple):
    """Where a map lies in a frame, as large as fits and in the middle; y grows upwards in the world."""

    scale: float  # px/m
    left: float  # px, where x is 0
    bottom: float  # px, where y is 0

    @classmethod
    def of(cls, width: float, height: float) -> "Plan":
        """For a map of this size, m."""
        across, down = WIDTH - INSET - 3 * MARGIN, HEIGHT - TOP - MARGIN
        scale = min(across / width, down / height)
        return cls(scale, MARGIN + (across - scale * width) / 2, TOP + (down + scale * height) / 2)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points (2, ...) in m as pixels (..., 2), x to the right and y down."""
        return np.stack([self.left + self.scale * points[0], self.bottom - self.scale * points[1]], -1)


font = functools.cache(ImageFont.load_default)  # size in px


class Pen:
    """Draws in units of the frame's pixels on an image that is finer, so that the edges come out smooth."""

    def __init__(self):
        self.image = Image.new("RGB", (SMOOTH * WIDTH, SMOOTH * HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def frame(self) -> np.ndarray:
        return np.asarray(self.image.reduce(SMOOTH))

    def line(self, points: np.ndarray, colour: Colour, width: float = 1) -> None:
        """points: (K, 2)."""
        self.draw.line((SMOOTH * points).ravel().tolist(), colour, round(SMOOTH * width), joint="curve")

    def disc(self, centre: np.ndarray, radius: float, fill: Colour | None, outline: Colour | None = None) -> None:
        self.draw.circle((SMOOTH * centre).tolist(), SMOOTH * radius, fill, outline, SMOOTH)

    def rectangle(self, corners: Sequence[float], fill: Colour | None, outline: Colour | None = None) -> None:
        """corners: left, top, right, bottom."""
        self.draw.rectangle([SMOOTH * x for x in corners], fill, outline, SMOOTH)

    def text(self, at: tuple[float, float], text: str, colour: Colour = INK, size: int = 12) -> float:
        """Returns where the text ends, px."""
        self.draw.text((SMOOTH * at[0], SMOOTH * at[1]), text, colour, font(SMOOTH * size))
        return at[0] + font(SMOOTH * size).getlength(text) / SMOOTH

    def robot(self, centre: np.ndarray, radius: float, heading: float) -> None:
        """A disc with a line towards where it looks; heading in rad anticlockwise from the right."""
        radius = max(radius, 3)
        self.disc(centre, radius, ROBOT)
        tip = centre + radius * np.array([np.cos(heading), -np.sin(heading)])
        self.line(np.array([centre, tip]), PAPER, max(radius / 3, 1.5))


class Drawing:
    """Draws row 0, with the trails of the moments that it was asked to draw before.

    Args:
        goal_radius: m from the goal, within which it is reached.
    """

    def __init__(self, goal_radius: float):
        self.goal_radius, self.start = goal_radius, -1
        self.trail: list[tuple[int, np.ndarray]] = []  # step of the episode; (2, 1 + P) m, robot and pedestrians

    def __call__(self, vec: Any) -> np.ndarray:
        """vec: a SocNavGrid. Returns uint8 (520, 900, 3)."""
        plan, pen = Plan.of(*array(vec.world.size[:, vec.place.maps[0]])), Pen()
        people = int(vec.place.people[0])
        robot, position = array(vec.pose[:, 0]), array(vec.crowd.position[:, 0, :people])
        self._remember(vec, np.concatenate([robot[:2, None], position], 1))

        self._map(pen, plan, vec)
        self._trails(pen, plan)
        velocity = array(vec.crowd.velocity[:, 0, :people])
        for place, tip in zip(plan(position), plan(position + AHEAD * velocity)):
            pen.disc(place, plan.scale * PEDESTRIAN_RADIUS, PERSON, MOTION)
            pen.line(np.array([place, tip]), MOTION, 1.5)
        pen.robot(plan(robot[:2]), plan.scale * vec.radius, robot[2])

        pen.rectangle((WIDTH - INSET - 2 * MARGIN, 0, WIDTH, HEIGHT), PAPER)  # what walked off the map
        self._title(pen, vec, np.hypot(*(position - robot[:2, None])))
        grids = dict(zip(vec.grid.channels, array(vec.observe(np.array([0]))["grid"][0])))
        self._insets(pen, vec, grids)
        return pen.frame()

    def _remember(self, vec: Any, points: np.ndarray) -> None:
        """Add to the trails. What is not before now belongs to another episode, or to a future that was taken back."""
        step, start = int(vec.episode_length[0]), int(vec.crowd.start[0])
        self.trail = [one for one in self.trail if one[0] < step and start == self.start]
        self.trail.append((step, points))
        self.start = start

    def _map(self, pen: Pen, plan: Plan, vec: Any) -> None:
        route, end = plan(array(vec.place.waypoints[:, 0])), plan.scale * self.goal_radius
        pen.disc(route[-1], end, ZONE, GOAL)
        for x0, y0, x1, y1 in array(vec.place.rectangles[:, 0]).T:
            if x0 < FAR:  # a map with fewer of them than others has the rest far away
                pen.rectangle([*plan(np.array([x0, y1])), *plan(np.array([x1, y0]))], WALL)
        pen.line(route, ROUTE, 1.5)
        for waypoint in route:
            pen.disc(waypoint, 3, PAPER, GOAL)

    def _trails(self, pen: Pen, plan: Plan) -> None:
        points = np.stack([points for _, points in self.trail])  # (T, 2, 1 + P)
        pen.line(plan(points[..., 0].T), DRIVEN, 2)
        recent = points[-FADES - 1 :, :, 1:]
        each = FADES // SHADES
        for person in np.moveaxis(recent, -1, 0):  # (T, 2)
            jumps = np.flatnonzero(np.hypot(*np.diff(person, axis=0).T) > JUMP)
            way = plan(person[jumps[-1] + 1 if len(jumps) else 0 :].T)[::-1]  # the newest first
            for k in range(SHADES):
                piece = way[k * each : (k + 1) * each + 1]
                if len(piece) > 1:
                    pen.line(piece, faded(PERSON, 0.4 + 0.6 * k / SHADES), 1.5)

    def _title(self, pen: Pen, vec: Any, distance: np.ndarray) -> None:
        """distance: (P,) m from the robot to the pedestrians."""
        name, steps = vec.names[int(vec.place.maps[0])], int(vec.episode_length[0])
        x = pen.text((MARGIN, 8), name, size=16)
        pen.text((x + 16, 11), f"{DT * steps:.1f} of {DT * int(vec.limit[0]):.0f} s", size=13)
        told = [
            f"speed {float(vec.speed[0, 0]):.1f} m/s",
            f"route {float(vec.arc[0]):.0f} of {float(vec.place.arc[0, -1]):.0f} m",
        ]
        if len(distance):
            clear = max(float(distance.min()) - vec.radius - PEDESTRIAN_RADIUS, 0)
            told += [f"nearest pedestrian {clear:.1f} m", f"near misses {int(vec.sums[0, 0])}"]
        x = MARGIN
        for text in told:
            x = pen.text((x, 30), text) + 20

    def _insets(self, pen: Pen, vec: Any, grids: dict[str, np.ndarray]) -> None:
        """grids: {channel: (size, size)}."""
        left, top = WIDTH - INSET - MARGIN, 30
        near = grids.pop("near", None)
        if {"obstacles", "pedestrians"} <= {*grids}:
            grids.pop("combined", None)  # of which nothing would be seen
        pictures = [(grids, vec.grid.resolution)] if grids else []
        if near is not None:
            pictures.append(({"near": near}, vec.grid.resolution / NEARER))
        for planes, cell in pictures:
            side = vec.grid.size * cell
            pen.text((left, top - 22), f"grid, {side:g} x {side:g} m, forward is up")
            self._inset(pen, left, top, planes, vec.radius / side * INSET)
            x = left
            for name in planes:
                pen.rectangle((x, top + INSET + 8, x + 8, top + INSET + 16), PLANES[name])
                x = pen.text((x + 12, top + INSET + 5), name) + 12
            top += INSET + 58

    def _inset(self, pen: Pen, left: float, top: float, planes: dict[str, np.ndarray], radius: float) -> None:
        """A grid with the robot in its middle, looking up; radius: of the robot, px."""
        picture, side = Image.fromarray(seen_from_above(planes)), SMOOTH * INSET
        pen.image.paste(picture.resize((side, side), Image.Resampling.NEAREST), (SMOOTH * left, SMOOTH * top))
        pen.rectangle((left, top, left + INSET, top + INSET), None, GRID)
        pen.robot(np.array([left, top]) + INSET / 2, radius, np.pi / 2)


def seen_from_above(planes: dict[str, np.ndarray]) -> np.ndarray:
    """Planes of an occupancy grid (size, size) as one picture, uint8 (size, size, 3); forward is up, left is left."""
    size = len(next(iter(planes.values())))
    picture = np.full((size, size, 3), PAPER, np.uint8)
    for name in PLANES:
        if name in planes:
            picture[planes[name].T[::-1, ::-1] > 0] = PLANES[name]
    return picture


def faded(colour: Colour, share: float) -> Colour:
    """Mixed with this share of paper."""
    red, green, blue = (round((1 - share) * c + share * p) for c, p in zip(colour, PAPER))
    return red, green, blue


def array(x: Any) -> np.ndarray:
    """A tensor on whatever device, or an array, as a numpy array."""
    return torch.as_tensor(x).cpu().numpy()
