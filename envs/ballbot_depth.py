"""Depth cameras of the ballbot, which do not need OpenGL, and the network that encodes their images."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from envs.ballbot_terrain import POINTS, SIDE, SPACING
from envs.evaluation import read_pt

FAR = 1.0  # m, largest depth
BALL_RADIUS = 0.09  # m
# Positions of the cameras in the frame of the base, and their right, up and back axes. Both look down and inward at the
# contact of ball and ground, with a field of view of 90 degrees.
POSITIONS = np.array([[0.17, -0.01, -0.06], [-0.17, -0.01, -0.06]])
TILT = np.array([0.5, 0.5 * 3**0.5])
AXES = np.array(
    [
        [[-TILT[1], 0, TILT[0]], [0, -1, 0], [TILT[0], 0, TILT[1]]],
        [[TILT[1], 0, TILT[0]], [0, 1, 0], [-TILT[0], 0, TILT[1]]],
    ]
)
MARCH = 16  # steps along a ray before the secant step


class DepthCameras:
    """Casts rays at a ball and at height fields.

    Args:
        size: pixels per side of an image.
    """

    def __init__(self, size: int):
        self.size = size
        line = ((2 * np.arange(size) + 1) / size - 1).astype(np.float64)
        right, down = np.meshgrid(line, line)
        pixels = np.stack([right.ravel(), -down.ravel(), np.full(size * size, -1.0)])  # at a depth of 1 m
        self.directions = np.concatenate([axes.T @ pixels for axes in AXES], axis=1)  # (3, 2 size^2) in the base frame

    def __call__(
        self,
        position: np.ndarray,
        rotation: np.ndarray,
        ball: np.ndarray,
        ground: np.ndarray,
        fields: np.ndarray,
        steepest: np.ndarray,
    ) -> np.ndarray:
        """Depth along the view axis of ideal cameras, clipped to 1 m.

        Args:
            position, rotation: of the base, (N, 3) m and (N, 3, 3).
            ball: its center, (N, 3) m.
            ground: heights of all fields, (M, 293, 293) float32, m.
            fields: index of each robot's field, (N,).
            steepest: upper bound of its slope, (N,).

        Returns:
            (N, 2, size, size) float32, m.
        """
        n, pixels = len(position), self.size * self.size
        rays = rotation @ self.directions  # (N, 3, 2 size^2)
        eyes = position[:, :, None] + rotation @ POSITIONS.T  # (N, 3, 2)

        # The nearer solution of |eye + depth ray - ball|^2 = radius^2
        offset = eyes - ball[:, :, None]
        a = np.square(rays).sum(1).reshape(n, 2, pixels)
        b = np.einsum("nck,nckp->nkp", offset, rays.reshape(n, 3, 2, pixels))
        c = (np.square(offset).sum(1) - BALL_RADIUS**2)[:, :, None]
        root = np.square(b) - a * c
        on_ball = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, FAR)

        on_ground = march(np.repeat(eyes, pixels, axis=2), rays, ground, fields, steepest)
        depth = np.minimum(on_ball.reshape(n, -1), on_ground).clip(0, FAR)
        return depth.reshape(n, 2, self.size, self.size).astype(np.float32)


def march(
    origin: np.ndarray, ray: np.ndarray, ground: np.ndarray, fields: np.ndarray, steepest: np.ndarray
) -> np.ndarray:
    """Distance of the ground along each ray, at most 1.

    A ray that is `gap` above the ground cannot hit it within gap / (vertical speed + steepest * horizontal speed).
    Steps of this length approach the ground without passing through it.

    Args:
        origin, ray: (N, 3, P), m.
        ground: (M, 293, 293), m.
        fields, steepest: (N,).

    Returns:
        (N, P), in units of the ray's length.
    """
    # In grid points from the corner of the field
    x, y = (((origin[:, i] + SIDE / 2) / SPACING).astype(np.float32) for i in (0, 1))
    dx, dy = ((ray[:, i] / SPACING).astype(np.float32) for i in (0, 1))
    z, dz = origin[:, 2].astype(np.float32), ray[:, 2].astype(np.float32)
    closing = np.hypot(dx, dy) * (steepest[:, None] * SPACING).astype(np.float32) - dz
    closing = np.maximum(closing, 1e-6)
    first = (fields.astype(np.int32) * POINTS * POINTS)[:, None]  # offset of each robot's field
    flat = ground.reshape(-1)

    def gap_at(depth: np.ndarray) -> np.ndarray:
        """Height above the ground, with bilinear interpolation."""
        u = (x + depth * dx).clip(0, POINTS - 1.001)
        v = (y + depth * dy).clip(0, POINTS - 1.001)
        i, j = u.astype(np.int32), v.astype(np.int32)
        u, v, corner = u - i, v - j, first + j * POINTS + i
        near = flat.take(corner) * (1 - u) + flat.take(corner + 1) * u
        far = flat.take(corner + POINTS) * (1 - u) + flat.take(corner + POINTS + 1) * u
        return z + depth * dz - (near * (1 - v) + far * v)

    before, depth = np.zeros_like(z), np.zeros_like(z)
    gap_before = gap = gap_at(depth)
    for _ in range(MARCH):
        before, gap_before = depth, gap
        depth = np.minimum(depth + np.maximum(gap, 0) / closing, FAR)
        gap = gap_at(depth)
    slope = gap_before - gap
    secant = depth + gap * (depth - before) / np.where(slope > 0, slope, np.inf)
    return np.minimum(secant, FAR)


CODE = 20  # size of an encoded image


class DepthEncoder(nn.Module):
    """Images (B, 1, size, size) to codes (B, 20) in [-1, 1]: two convolutions and a linear layer.

    Args:
        size: pixels per side of an image.

    Raises:
        ValueError: size is not a multiple of 4.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 4 or size % 4:
            raise ValueError(f"depth_size must be a multiple of 4 for the encoder, not {size}")
        self.size = size
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(),
            nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, CODE), nn.Tanh(),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def save_encoder(path: Path, encoder: DepthEncoder, **about: float | int | str) -> None:
    """Save an encoder with information such as its reconstruction error."""
    state = {"kind": "encoder", "depth_size": encoder.size, "encoder": encoder.state_dict(), **about}
    torch.save(state, path)


def load_encoder(path: str) -> dict:
    """Load what save_encoder saved. Raises ValueError if the file is missing, damaged or not an encoder."""
    content = read_pt(path)
    if content.get("kind") != "encoder":
        raise ValueError(f"{path}: not an encoder; tools/pretrain_encoder.py trains one")
    return content


class FrozenEncoder:
    """An encoder from a file with fixed weights and batch statistics.

    It computes in float64 and rounds, because in float32 the last bits would depend on the batch size.

    Args:
        path: file of tools/pretrain_encoder.py.
        size: pixels per side of an image.

    Raises:
        ValueError: the file is missing, damaged, not an encoder, or for another size.
    """

    def __init__(self, path: str, size: int):
        content = load_encoder(path)
        if content["depth_size"] != size:
            raise ValueError(f"{path}: encodes images of depth_size {content['depth_size']}, not {size}")
        network = DepthEncoder(size)
        try:
            network.load_state_dict(content["encoder"])
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}; train another with tools/pretrain_encoder.py") from error
        self.network = network.double().eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image: (N, 2, size, size), m -> codes (N, 40) float32."""
        codes = self.network(torch.as_tensor(image, dtype=torch.float64).flatten(0, 1).unsqueeze(1))
        return codes.reshape(len(image), -1).numpy().astype(np.float32)
