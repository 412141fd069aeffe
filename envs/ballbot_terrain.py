"""Uneven ground for the ballbot: height fields of simplex noise."""

from itertools import combinations, product

import numpy as np

POINTS = 293  # per side of the height field
SIDE = 10.0  # m
SPACING = SIDE / (POINTS - 1)
FEATURE = 25  # length scale of the coarsest octave, in points
OCTAVES, PERSISTENCE, LACUNARITY = 4, 0.2, 2
PARTS = 6  # parts in which a field is computed: with the CPU cache it takes two thirds of the time

# Gustavson, "Simplex noise demystified" (2005): from the square grid to the simplex grid, and back
SKEW, UNSKEW = np.float32((5**0.5 - 1) / 4), np.float32((5 - 5**0.5) / 20)
GRADIENTS = np.array([g for g in product((-1, 0, 1), repeat=4) if np.abs(g).sum() == 3], np.float32).T  # (4, 32)


def simplex_noise(x: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """Four-dimensional simplex noise (Perlin 2001).

    Args:
        x: points, (4, P) float32.
        permutation: (768,) int32, a permutation of 0..255, repeated three times.

    Returns:
        (P,) float32, about in [-1, 1], with mean zero.
    """
    cell = np.floor(x + SKEW * x.sum(0))
    x = x - cell + UNSKEW * cell.sum(0)  # from the cell's corner
    rank = np.zeros(x.shape, np.int8)  # the order of the components determines the simplex
    for a, b in combinations(range(4), 2):
        larger = x[a] > x[b]
        rank[a] += larger
        rank[b] += ~larger
    cell = cell.astype(np.int32) & 255
    noise = np.zeros(x.shape[1], np.float32)
    for corner in range(5):
        offset = rank >= 4 - corner
        d = x - offset + corner * UNSKEW
        i, j, k, m = cell + offset
        # `take` gathers three times as fast as an index
        hashed = permutation.take(permutation.take(permutation.take(permutation.take(i) + j) + k) + m)
        slope = (GRADIENTS.take(hashed & 31, axis=1) * d).sum(0)
        noise += np.square(np.square(np.maximum(np.float32(0.6) - (d * d).sum(0), 0))) * slope
    return 27 * noise


def heights(seed: int) -> np.ndarray:
    """Uneven ground, (293, 293) float32 from 0 to 1, with rows along y and columns along x.

    It has four octaves of a plane in four-dimensional noise, like the published ground, whose noise function is
    periodic. Two-dimensional noise would be 1.5 times as steep.
    """
    rng = np.random.default_rng(seed)
    permutation = np.tile(rng.permutation(256), 3).astype(np.int32)
    line = np.arange(POINTS) / FEATURE
    plane = np.zeros((4, POINTS, POINTS))
    plane[0], plane[1] = line, line[:, None]
    plane = (plane.reshape(4, -1) + rng.uniform(0, 256, (4, 1))).astype(np.float32)
    parts = []
    for part in np.array_split(plane, PARTS, axis=1):
        octaves = (PERSISTENCE**n * simplex_noise(part * LACUNARITY**n, permutation) for n in range(OCTAVES))
        parts.append(sum(octaves))
    ground = np.concatenate(parts).reshape(POINTS, POINTS).astype(np.float32)
    low, high = ground.min(), ground.max()
    return (ground - low) / (high - low)
