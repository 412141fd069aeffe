"""Draws environment 0 of a SocNavGrid with matplotlib: its map from above, and the occupancy grids of the robot."""

from typing import Any

import numpy as np
import torch

from envs.render import FigureRenderer
from envs.socnav.dynamics import DT, PEDESTRIAN_RADIUS
from envs.socnav.grid import NEARER
from envs.socnav.starts import FAR

WIDTH, HEIGHT = 900, 520  # pixels
LOOK_AHEAD = 1.5  # s of motion that a pedestrian's line shows
TRAIL = 60  # steps of a pedestrian's trail
JUMP = 2.0  # m; a pedestrian that moves farther in a step has been placed elsewhere
COLORS = {"obstacles": "darkgray", "near": "darkgray", "pedestrians": "tab:red", "combined": "mediumpurple"}


class Drawing:
    """Draws environment 0, with the trails since the episode began or since it was first drawn.

    Args:
        render_mode: human or rgb_array.
        goal_radius: distance from the goal within which it counts as reached, m.
    """

    def __init__(self, render_mode: str, goal_radius: float):
        self.renderer, self.goal_radius, self.start = FigureRenderer(render_mode, WIDTH, HEIGHT), goal_radius, -1
        self.trail: list[tuple[int, np.ndarray]] = []  # step, and positions (2, 1 + P) m of robot and pedestrians

    def draw(self, envs: Any) -> np.ndarray | None:
        """Return uint8 (520, 900, 3) or, in human mode, update the window."""
        pose, count = to_numpy(envs.pose[:, 0]), int(envs.place.people[0])
        position, velocity = (to_numpy(x[:, 0, :count]) for x in (envs.crowd.position, envs.crowd.velocity))
        self._remember(envs, np.concatenate([pose[:2, None], position], axis=1))
        figure = self.renderer.figure
        figure.clear()
        layout = figure.add_gridspec(2, 2, width_ratios=(3.4, 1), left=0.01, right=0.99, top=0.84, bottom=0.02)
        axes = figure.add_subplot(layout[:, 0], aspect="equal", xticks=[], yticks=[])
        self._draw_map(axes, envs)
        self._draw_trails(axes)
        for center, tip in zip(position.T, (position + LOOK_AHEAD * velocity).T):
            axes.add_patch(circle(center, PEDESTRIAN_RADIUS, "tab:red"))
            axes.plot(*np.stack([center, tip], axis=1), color="darkred", lw=1.2)
        draw_robot(axes, pose, envs.radius)
        self._title(figure, envs, np.hypot(*(position - pose[:2, None])))
        self._draw_grids(figure, layout, envs)
        return self.renderer.show()

    def _remember(self, envs: Any, positions: np.ndarray) -> None:
        """Add to the trails, after removing those of another episode or of a later step."""
        step, start = int(envs.episode_length[0]), int(envs.crowd.start[0])
        self.trail = [entry for entry in self.trail if entry[0] < step and start == self.start]
        self.trail.append((step, positions))
        self.start = start

    def _draw_map(self, axes: Any, envs: Any) -> None:
        from matplotlib.patches import Rectangle

        width, height = to_numpy(envs.world.size[:, envs.place.maps[0]])
        axes.set(xlim=(0, width), ylim=(0, height))
        route = to_numpy(envs.place.waypoints[:, 0])
        axes.add_patch(circle(route[:, -1], self.goal_radius, "honeydew", edgecolor="tab:green"))
        for x0, y0, x1, y1 in to_numpy(envs.place.rectangles[:, 0]).T:
            if x0 < FAR:  # maps with fewer rectangles than others are filled up with distant ones
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color="darkgray", lw=0))
        axes.plot(*route, color="tab:green", lw=1, marker="o", ms=4, mfc="white")

    def _draw_trails(self, axes: Any) -> None:
        positions = np.stack([positions for _, positions in self.trail])  # (T, 2, 1 + P)
        axes.plot(*positions[..., 0].T, color="cornflowerblue", lw=1.5)
        for points in np.moveaxis(positions[-TRAIL:, :, 1:], -1, 0):  # (T, 2)
            jumps = np.flatnonzero(np.hypot(*np.diff(points, axis=0).T) > JUMP)
            axes.plot(*points[jumps[-1] + 1 if len(jumps) else 0 :].T, color="tab:red", lw=1, alpha=0.4)

    def _title(self, figure: Any, envs: Any, distance: np.ndarray) -> None:
        """distance: from the robot to the pedestrians (P,), m."""
        name, steps = envs.names[int(envs.place.maps[0])], int(envs.episode_length[0])
        lines = [
            f"speed {float(envs.speed[0, 0]):.1f} m/s",
            f"route {float(envs.arc[0]):.0f} of {float(envs.place.arc[0, -1]):.0f} m",
        ]
        if len(distance):
            clearance = max(float(distance.min()) - envs.radius - PEDESTRIAN_RADIUS, 0)
            lines += [f"nearest pedestrian {clearance:.1f} m", f"near misses {int(envs.sums[0, 0])}"]
        figure.text(0.01, 0.94, f"{name}    {DT * steps:.1f} of {DT * int(envs.limit[0]):.0f} s", size=12)
        figure.text(0.01, 0.88, "    ".join(lines), size=9)

    def _draw_grids(self, figure: Any, layout: Any, envs: Any) -> None:
        grids = dict(zip(envs.grid.channels, to_numpy(envs.observe(np.array([0]))["grid"][0])))
        near = {"near": grids.pop("near")} if "near" in grids else {}
        if {"obstacles", "pedestrians"} <= grids.keys():
            grids.pop("combined", None)  # it would hide both
        pairs = ((grids, envs.grid.resolution), (near, envs.grid.resolution / NEARER))
        for k, (channels, cell) in enumerate((channels, cell) for channels, cell in pairs if channels):
            half = envs.grid.size * cell / 2
            axes = figure.add_subplot(layout[k, 1], xticks=[], yticks=[])
            axes.set_title(f"{', '.join(channels)}: {2 * half:g} x {2 * half:g} m", size=8)
            axes.imshow(grid_image(channels), extent=(-half, half, -half, half))
            draw_robot(axes, np.array([0, 0, np.pi / 2]), envs.radius)


def draw_robot(axes: Any, pose: np.ndarray, radius: float) -> None:
    """A disc with a line toward its heading. pose: x, y, heading (rad)."""
    axes.add_patch(circle(pose[:2], radius, "royalblue"))
    tip = pose[:2] + radius * np.array([np.cos(pose[2]), np.sin(pose[2])])
    axes.plot(*np.stack([pose[:2], tip], axis=1), color="white", lw=2)


def circle(center: np.ndarray, radius: float, color: str, **kwargs: Any) -> Any:
    from matplotlib.patches import Circle

    return Circle(tuple(center), radius, facecolor=color, zorder=2, **kwargs)


def grid_image(channels: dict[str, np.ndarray]) -> np.ndarray:
    """Grid channels (size, size) as one RGB image (size, size, 3): forward is up, left is left."""
    from matplotlib.colors import to_rgb

    image = np.ones((*next(iter(channels.values())).shape, 3))
    for name, cells in channels.items():
        image[cells.T[::-1, ::-1] > 0] = to_rgb(COLORS[name])
    return image


def to_numpy(x: Any) -> np.ndarray:
    return torch.as_tensor(x).cpu().numpy()
