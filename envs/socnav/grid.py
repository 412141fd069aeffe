"""Occupancy grids around the robots.

The robot is at the corner of the four middle cells. Columns increase forward and rows to the left. A grid of 64 cells
of 0.5 m covers 32 x 32 m. Channels:

    obstacles    cells whose center is in an obstacle or outside the map
    pedestrians  cells that a pedestrian's disc touches
    combined     the union of both
    near         obstacles in cells a quarter as long: a finer crop
"""

import torch
from torch import Tensor

from envs.socnav.dynamics import PEDESTRIAN_RADIUS
from envs.socnav.starts import COARSE, World

CHANNELS = ("obstacles", "pedestrians", "combined", "near")
NEARER = 4  # how many times finer the channel `near` is
FRACTION = 16  # fractional bits of the fixed-point indices


class OccupancyGrid:
    """Computes the grids of up to num_envs robots, size x size cells of `resolution` m."""

    def __init__(self, world: World, num_envs: int, channels: tuple[str, ...], size: int, resolution: float):
        self.world, self.channels, self.size, self.resolution = world, channels, size, resolution
        self.device = world.map.device
        self.centers = torch.arange(size, device=self.device) + 0.5 - size / 2  # of cells, in units of a cell
        # Allocating this in each step would take longer than the computation
        self.work = torch.empty(2, num_envs, size, size, dtype=torch.int32, device=self.device)

    def __call__(self, maps: Tensor, pose: Tensor, position: Tensor) -> Tensor:
        """uint8 (n, channels, size, size) for robots on these maps (n,) at pose (3, n), with pedestrians at position
        (2, n, P) in the robots' frame."""
        grid = torch.empty(len(maps), len(self.channels), self.size, self.size, dtype=torch.uint8, device=self.device)
        if {"obstacles", "combined"} & {*self.channels}:
            obstacles = self.obstacles(maps, pose, self.resolution)
        if {"pedestrians", "combined"} & {*self.channels}:
            env, row, column = self.touched(position)
        for k, name in enumerate(self.channels):
            if name == "near":
                grid[:, k] = self.obstacles(maps, pose, self.resolution / NEARER)
            else:
                grid[:, k] = 0 if name == "pedestrians" else obstacles
            if name in ("pedestrians", "combined"):
                index = ((env * len(self.channels) + k) * self.size + row) * self.size + column
                grid.view(-1).index_fill_(0, index, 1)
        return grid

    def obstacles(self, maps: Tensor, pose: Tensor, resolution: float) -> Tensor:
        """Cells whose center is in an obstacle, uint8 (n, size, size).

        The index of a cell in the raster of the map is the sum of a part that depends on its row and one that depends
        on its column, in fixed-point arithmetic."""
        raster, n = self.world.coarse if resolution >= COARSE else self.world.fine, len(maps)
        cos, sin, unit = torch.cos(pose[2]), torch.sin(pose[2]), 2**FRACTION / raster.cell
        # Contributions of a cell's row, then of its column, to row and column of the raster
        parts = (unit * torch.stack([cos, -sin, sin, cos]))[..., None] * (resolution * self.centers)
        parts[2:] += (unit * pose[:2].flip(0))[..., None]
        of_row, of_column = parts.to(torch.int32).split(2)  # (2, n, size)
        place = torch.add(of_row[..., None], of_column[:, :, None], out=self.work[:, :n])
        shape = raster.shape.index_select(1, maps)[..., None, None]
        row, column = torch.minimum(place.bitwise_right_shift_(FRACTION).clamp_(min=0), shape - 1, out=place)
        place = row.mul_(shape[1]).add_(column).add_(raster.begin.index_select(0, maps)[:, None, None])
        return raster.solid.index_select(0, place.flatten()).view(-1, self.size, self.size)

    def touched(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Robot, row and column (K,) of the cells that the pedestrians' discs touch.

        The bounding square of a disc spans at most `span` cells per axis; the disc touches those whose nearest point is
        inside it."""
        span = int(2 * PEDESTRIAN_RADIUS / self.resolution) + 2
        radius = PEDESTRIAN_RADIUS / self.resolution
        cells = position / self.resolution + self.size / 2  # in units of a cell, from the corner of the grid
        robot, person = ((cells > -radius) & (cells < self.size + radius)).all(0).nonzero().unbind(1)
        cells = cells[:, robot, person]  # (2, M), pedestrians near the grid
        index = (cells - radius).floor()[..., None] + torch.arange(span, device=self.device)  # (2, M, span)
        x, y = (cells[..., None] - cells[..., None].clamp(index, index + 1)).square()
        touches = x[:, None, :] + y[:, :, None] <= radius**2  # (M, rows, columns)
        inside = (index >= 0) & (index < self.size)
        touches &= inside[0][:, None, :] & inside[1][:, :, None]
        one, row, column = touches.nonzero().unbind(1)
        column_of, row_of = index.long()
        return robot[one], row_of[one, row], column_of[one, column]
