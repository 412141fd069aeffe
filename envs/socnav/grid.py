"""The occupancy grid: what is solid and who stands where, in cells around the robot.

The robot is at the centre and looks along growing columns; rows grow to its left. A grid of 64 cells of 0.5 m covers
32 x 32 m, and the robot stands at the corner of the four cells in its middle. Channels:

    obstacles    cells whose centre is solid; what lies outside a map is solid
    pedestrians  cells that a pedestrian's disc touches
    combined     either of the two
    near         obstacles again in cells a quarter as long, so a fine crop of the surroundings
"""

import torch
from torch import Tensor

from envs.socnav.dynamics import PEDESTRIAN_RADIUS
from envs.socnav.starts import COARSE, World

CHANNELS = ("obstacles", "pedestrians", "combined", "near")
NEARER = 4  # times finer than the others is the plane `near`
FRACTION = 16  # bits behind the point of the fixed-point numbers that a raster is read with


class OccupancyGrid:
    """Draws the grids of robots in a world: at most `num_envs`, `size` x `size` cells of `resolution` m."""

    def __init__(self, world: World, num_envs: int, channels: tuple[str, ...], size: int, resolution: float):
        self.world, self.channels, self.size, self.resolution = world, channels, size, resolution
        self.device = world.map.device
        self.centres = torch.arange(size, device=self.device) + 0.5 - size / 2  # of cells, in units of a cell
        # Asked for in each step, a megabyte of memory comes fresh from the system, and that costs more than the sums
        self.work = torch.empty(2, num_envs, size, size, dtype=torch.int32, device=self.device)

    def __call__(self, maps: Tensor, pose: Tensor, position: Tensor) -> Tensor:
        """uint8 (n, channels, size, size) for robots on these maps (n,) at pose (3, n), with pedestrians at position
        (2, n, P) in the robots' frame."""
        grid = torch.empty(len(maps), len(self.channels), self.size, self.size, dtype=torch.uint8, device=self.device)
        obstacles = (
            self.obstacles(maps, pose, self.resolution) if {"obstacles", "combined"} & {*self.channels} else None
        )
        touched = self.touched(position) if {"pedestrians", "combined"} & {*self.channels} else None
        for k, name in enumerate(self.channels):
            if name == "near":
                grid[:, k] = self.obstacles(maps, pose, self.resolution / NEARER)
            else:
                grid[:, k] = 0 if name == "pedestrians" else obstacles
            if name in ("pedestrians", "combined"):
                row_of, row, column = touched
                grid.view(-1).index_fill_(
                    0, ((row_of * len(self.channels) + k) * self.size + row) * self.size + column, 1
                )
        return grid

    def obstacles(self, maps: Tensor, pose: Tensor, resolution: float) -> Tensor:
        """Which cells have a solid centre, uint8 (n, size, size).

        A cell's place in the map's raster is the sum of a part for its row and one for its column, in fixed-point
        arithmetic, so that there is no rounding and no trigonometry for each cell."""
        raster, n = self.world.coarse if resolution >= COARSE else self.world.fine, len(maps)
        cos, sin, unit = torch.cos(pose[2]), torch.sin(pose[2]), 2**FRACTION / raster.cell
        # Of the raster's row and column: what a cell's row adds to each, and what its column does
        parts = (unit * torch.stack([cos, -sin, sin, cos]))[..., None] * (resolution * self.centres)
        parts[2:] += (unit * pose[:2].flip(0))[..., None]
        of_row, of_column = parts.to(torch.int32).split(2)  # (2, n, size)
        place = torch.add(of_row[..., None], of_column[:, :, None], out=self.work[:, :n])
        shape = raster.shape.index_select(1, maps)[..., None, None]
        row, column = torch.minimum(place.bitwise_right_shift_(FRACTION).clamp_(min=0), shape - 1, out=place)
        place = row.mul_(shape[1]).add_(column).add_(raster.begin.index_select(0, maps)[:, None, None])
        return raster.solid.index_select(0, place.flatten()).view(-1, self.size, self.size)

    def touched(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Robot, row and column, (K,) each, of the cells that the pedestrians' discs of 0.4 m touch.

        A disc's bounding square spans at most `span` cells each way; of those, the ones whose nearest point lies inside
        the disc count."""
        span = int(2 * PEDESTRIAN_RADIUS / self.resolution) + 2
        radius = PEDESTRIAN_RADIUS / self.resolution
        cells = position / self.resolution + self.size / 2  # in units of a cell, from the corner of the grid
        robot, person = ((cells > -radius) & (cells < self.size + radius)).all(0).nonzero().unbind(1)
        cells = cells[:, robot, person]  # (2, M): those who are near enough
        index = (cells - radius).floor()[..., None] + torch.arange(span, device=self.device)  # (2, M, span)
        x, y = (cells[..., None] - cells[..., None].clamp(index, index + 1)).square()
        touches = x[:, None, :] + y[:, :, None] <= radius**2  # (M, rows, columns)
        inside = (index >= 0) & (index < self.size)
        touches &= inside[0][:, None, :] & inside[1][:, :, None]
        one, row, column = touches.nonzero().unbind(1)
        column_of, row_of = index.long()
        return robot[one], row_of[one, row], column_of[one, column]
