"""Features of the grid policy without parameters: route, pedestrians, rays, packed grids and the left-right mirror."""

from math import pi

import torch
from torch import Tensor, nn

from envs.socnav import GOAL_RANGE, PEDESTRIAN_RANGE, PEDESTRIAN_SPEED

ROBOT_DIM = 4  # forward speed, turn rate and the last action (2)
ROUTE_DIM = 4  # current waypoint (2) and the point of the route 3 m ahead (2)
PEDESTRIAN_DIM = 8  # position (2), velocity (2), proximity now and at closest approach, time to closest approach, mask
HORIZON = 4.0  # prediction horizon, s
# With longer ranges the policy memorizes the maps and crowds of training instead of generalizing
MAX_WAYPOINT_DISTANCE = 5.0  # m
MAX_PEDESTRIAN_DISTANCE = 8.0  # m


def route_features(goal: Tensor) -> Tensor:
    """The waypoint, shortened to at most 5 m, and the point of the route 3 m ahead: (N, 7) to (N, ROUTE_DIM)."""
    waypoint, ahead = GOAL_RANGE * goal[:, :2], GOAL_RANGE * goal[:, 4:6]  # m
    waypoint = waypoint / waypoint.square().sum(1, keepdim=True).sqrt().clamp(min=MAX_WAYPOINT_DISTANCE)
    return torch.cat([waypoint, ahead / 3], dim=1)


def pedestrian_features(pedestrians: Tensor, count: Tensor, robot_speed: Tensor) -> Tensor:
    """Position, velocity relative to the robot, and proximity and time of the closest approach at constant velocities.

    Args:
        pedestrians: the observation of P pedestrians (N, P, 4), nearest first.
        count: number of pedestrians that are present (N, 1).
        robot_speed: forward speed of the robot (N, 1), m/s.

    Returns:
        (N, P, PEDESTRIAN_DIM), zero for pedestrians that are absent or more than 8 m away.
    """
    position, velocity = PEDESTRIAN_RANGE * pedestrians[..., :2], PEDESTRIAN_SPEED * pedestrians[..., 2:]
    velocity = velocity - torch.stack([robot_speed, torch.zeros_like(robot_speed)], dim=-1)
    distance = position.square().sum(-1, keepdim=True).sqrt()
    time_to_closest = -(position * velocity).sum(-1, keepdim=True) / (velocity.square().sum(-1, keepdim=True) + 1e-6)
    time_to_closest = time_to_closest.clamp(0.0, HORIZON)  # s
    closest_distance = (position + time_to_closest * velocity).square().sum(-1, keepdim=True).sqrt()
    proximity = [torch.exp(-distance / 2), torch.exp(-closest_distance), time_to_closest / HORIZON]
    features = torch.cat([position / 4, velocity, *proximity, torch.ones_like(distance)], dim=-1)
    present = torch.arange(pedestrians.shape[1], device=count.device).unsqueeze(-1) < count.unsqueeze(-1)
    return features * (present & (distance < MAX_PEDESTRIAN_DISTANCE))


def ray_indices(size: int, num_rays: int) -> Tensor:
    """Flat indices of the grid cells along each ray, from the robot outward: int64 (num_rays, size / 2).

    The robot is in the middle of size x size cells. Angles run from straight ahead to the left; the second half of the
    rays mirrors the first."""
    angle = 2 * pi * (torch.arange(num_rays // 2, dtype=torch.float64)[:, None] + 0.5) / num_rays
    distance = torch.arange(size // 2, dtype=torch.float64) + 0.5  # in cells
    column = (size / 2 + distance * angle.cos()).floor().long()
    row = (size / 2 + distance * angle.sin()).floor().long()
    mirrored = (size - 1 - row) * size + column
    return torch.cat([row * size + column, mirrored.flip(0)])


def ray_proximity(grid: Tensor, indices: Tensor) -> Tensor:
    """Proximity of the first occupied cell along each ray: 1 next to the robot, 0 if there is none.

    Args:
        grid: uint8 (N, channels, size, size).
        indices: from ray_indices.

    Returns:
        (N, channels * num_rays)
    """
    num_rays, ray_length = indices.shape
    flat_indices = indices.flatten().expand(*grid.shape[:2], -1)
    cells_on_ray = grid.flatten(2).gather(2, flat_indices).unflatten(2, (num_rays, ray_length))
    # The nearest cell has the largest weight, so the maximum belongs to the first occupied one
    dtype = torch.uint8 if ray_length < 256 else torch.int16
    weight = torch.arange(ray_length, 0, -1, dtype=dtype, device=grid.device)
    return (cells_on_ray * weight).amax(-1).flatten(1) / ray_length


def pack_bits(cells: Tensor) -> Tensor:
    """Pack binary cells (..., size) into numbers from 0 to 255 (..., ceil(size / 8)), to store rollouts compactly."""
    cells = nn.functional.pad(cells, (0, -cells.shape[-1] % 8))
    return (cells.unflatten(-1, (-1, 8)) * 2 ** torch.arange(8, device=cells.device)).sum(-1)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Inverse of pack_bits, for float tensors."""
    shifted = packed.unsqueeze(-1) / 2 ** torch.arange(8, device=packed.device)
    return shifted.floor().remainder(2).flatten(-2)[..., :size]


def mirror_permutation(
    num_rays: int, num_pedestrians: int, channels: int, grid_size: int, packed_dim: int
) -> tuple[Tensor, Tensor]:
    """Index permutation and signs that mirror a feature vector left-right: mirrored = features[..., index] * sign.

    The vector holds robot, route, rays of each channel, pedestrians and packed grid rows of each channel.

    Args:
        num_rays, num_pedestrians: of the policy; num_rays is 0 if it has no rays.
        channels: number of grid channels that it reads.
        grid_size: cells per side.
        packed_dim: number of packed values of all channels; 0 if the policy reads no grid.
    """
    sizes = [ROBOT_DIM + ROUTE_DIM, channels * num_rays, num_pedestrians * PEDESTRIAN_DIM, packed_dim]
    robot_route, rays, pedestrians, grid = torch.arange(sum(sizes)).split(sizes)
    rays = rays.reshape(channels, num_rays).flip(1)  # reversing the rays mirrors them
    grid = grid.reshape(channels, grid_size, packed_dim // (channels * grid_size)).flip(1)  # rows grow to the left
    forward_left = torch.tensor([1.0, -1.0])
    sign = torch.ones(sum(sizes))
    sign[robot_route] = forward_left.repeat(len(robot_route) // 2)
    sign[pedestrians] = torch.cat([forward_left.repeat(2), torch.ones(PEDESTRIAN_DIM - 4)]).repeat(num_pedestrians)
    return torch.cat([robot_route, rays.flatten(), pedestrians, grid.flatten()]), sign
