"""The ballbot's eyes: two depth cameras without OpenGL, and the network that encodes their images."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from envs.ballbot_terrain import POINTS, SIDE, SPACING
from envs.evaluation import read_pt

FAR = 1.0  # m: depths are cut off here
BALL_RADIUS = 0.09  # m
# In the frame of the base: where the cameras are, and their right, up and back. Both look down and inward at the place
# where ball and ground meet, 90 degrees wide.
POSITIONS = np.array([[0.17, -0.01, -0.06], [-0.17, -0.01, -0.06]])
TILT = np.array([0.5, 0.5 * 3**0.5])
AXES = np.array(
    [
        [[-TILT[1], 0, TILT[0]], [0, -1, 0], [TILT[0], 0, TILT[1]]],
        [[TILT[1], 0, TILT[0]], [0, 1, 0], [-TILT[0], 0, TILT[1]]],
    ]
)
MARCH = 16  # steps along a ray before the secant


class DepthCameras:
    """Casts rays at a ball and at height fields.

    Args:
        size: pixels along each side of an image.
    """

    def __init__(self, size: int):
        self.size = size
        line = ((2 * np.arange(size) + 1) / size - 1).astype(np.float64)
        right, down = np.meshgrid(line, line)
        pixels = np.stack([right.ravel(), -down.ravel(), np.full(size * size, -1.0)])  # one metre deep
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
        """Depth along the view axis, as of an ideal camera, cut off at 1 m.

        Args:
            position, rotation: of the base, (N, 3) m and (N, 3, 3).
            ball: its centre, (N, 3) m.
            ground: height at the points of all fields, (M, 293, 293) float32, m.
            fields: which of them each robot stands on, (N,).
            steepest: a bound of the slope there, (N,).

        Returns:
            (N, 2, size, size) float32, m.
        """
        n, pixels = len(position), self.size * self.size
        rays = rotation @ self.directions  # (N, 3, 2 size^2)
        eyes = position[:, :, None] + rotation @ POSITIONS.T  # (N, 3, 2)

        # |eye + depth ray - ball|^2 = radius^2, of which the nearer solution
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
    """How far along each ray the ground is, at most 1.

    A ray that is `gap` above the ground cannot meet it before it has come gap / (fall + steepest * way) further, where
    fall and way are its vertical and horizontal speeds: steps of this length come near without ever passing through.

    Args:
        origin, ray: (N, 3, P), m.
        ground: (M, 293, 293), m.
        fields, steepest: (N,).

    Returns:
        (N, P) multiples of the ray.
    """
    # in points of the field, from its first one
    x, y = (((origin[:, i] + SIDE / 2) / SPACING).astype(np.float32) for i in (0, 1))
    dx, dy = ((ray[:, i] / SPACING).astype(np.float32) for i in (0, 1))
    z, dz = origin[:, 2].astype(np.float32), ray[:, 2].astype(np.float32)
    closing = np.hypot(dx, dy) * (steepest[:, None] * SPACING).astype(np.float32) - dz
    closing = np.maximum(closing, 1e-6)
    first = (fields.astype(np.int32) * POINTS * POINTS)[:, None]  # of each robot's field
    flat = ground.reshape(-1)

    def gap_at(depth: np.ndarray) -> np.ndarray:
        """Height above the ground, interpolated between its four nearest points."""
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


CODE = 20  # numbers that stand for an image


class DepthEncoder(nn.Module):
    """Images (B, 1, size, size) to codes (B, 20) in [-1, 1]: two convolutions and a linear layer.

    Args:
        size: pixels along each side of an image, a multiple of 4.

    Raises:
        ValueError: size is not such a multiple.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 4 or size % 4:
            raise ValueError(f"depth_size must be a multiple of 4, for two halvings, not {size}")
        self.size = size
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(),
            nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, CODE), nn.Tanh(),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def save_encoder(path: Path, encoder: DepthEncoder, **about: float | int | str) -> None:
    """Write an encoder with what is to be known of it, such as the error of its reconstructions."""
    state = {"kind": "encoder", "depth_size": encoder.size, "encoder": encoder.state_dict(), **about}
    torch.save(state, path)


def load_encoder(path: str) -> dict:
    """What save_encoder wrote.

    Raises:
        ValueError: the file is missing, damaged or no encoder.
    """
    content = read_pt(path)
    if content.get("kind") != "encoder":
        raise ValueError(f"{path}: holds no encoder; tools/pretrain_encoder.py makes one")
    return content


class FrozenEncoder:
    """An encoder from a file, in evaluation mode for good: neither weights nor batch statistics move.

    It computes in float64 and rounds, or else the last bits of a code would depend on how many images share its batch.

    Args:
        path: what tools/pretrain_encoder.py wrote.
        size: pixels along each side of the images that it will get.

    Raises:
        ValueError: the file is missing, damaged, no encoder, or one for another size.
    """

    def __init__(self, path: str, size: int):
        content = load_encoder(path)
        if content["depth_size"] != size:
            raise ValueError(f"{path}: encodes images of depth_size {content['depth_size']}, not {size}")
        network = DepthEncoder(size)
        try:
            network.load_state_dict(content["encoder"])
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}; tools/pretrain_encoder.py makes another") from error
        self.network = network.double().eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image: (N, 2, size, size), m -> codes (N, 40) float32."""
        codes = self.network(torch.as_tensor(image, dtype=torch.float64).flatten(0, 1).unsqueeze(1))
        return codes.reshape(len(image), -1).numpy().astype(np.float32)
