"""Disturbances of an environment, such as a factor on its masses: constants, or ranges that are drawn per episode."""

from typing import Any

import numpy as np

Float = float | tuple[float, ...]  # a constant or (low, high)
Int = int | tuple[int, ...]  # a constant or (low, high), both included


class Disturbances:
    """The present values of disturbances in N environments.

    Args:
        ranges: {name: constant or (low, high)}.

    Raises:
        ValueError: a range is not (low, high).
    """

    def __init__(self, num_envs: int, ranges: dict[str, Float]):
        self.ranges = {name: x if isinstance(x, tuple) else (x, x) for name, x in ranges.items()}
        for name, limits in self.ranges.items():
            if len(limits) != 2 or limits[0] > limits[1]:
                raise ValueError(f"{name} must be a number or (low, high), not {limits}")
        self.drawn = [name for name, x in ranges.items() if isinstance(x, tuple)]
        self.values = {name: np.full(num_envs, low) for name, (low, _) in self.ranges.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Values (N,)."""
        return self.values[name]

    def highest(self, name: str) -> Any:
        return self.ranges[name][1]

    def draw(self, i: int, rng: np.random.Generator) -> None:
        """Draw the values of environment i that have a range."""
        for name in self.drawn:
            low, high = self.ranges[name]
            whole = isinstance(low, int) and isinstance(high, int)
            self.values[name][i] = rng.integers(low, high + 1) if whole else rng.uniform(low, high)

    def copy(self, source: int, i: int) -> None:
        """Give environment i the values of another one."""
        for x in self.values.values():
            x[i] = x[source]

    def state(self) -> dict[str, np.ndarray]:
        """The drawn values, for snapshots."""
        return {name: self.values[name] for name in self.drawn}


def delayed(history: np.ndarray, new: np.ndarray, delay: np.ndarray) -> np.ndarray:
    """Append `new` (N, k) to the history (N, D + 1, k), oldest first. Returns the entries of `delay` (N,) steps ago."""
    history[:, :-1] = history[:, 1:]
    history[:, -1] = new
    return history[np.arange(len(history)), history.shape[1] - 1 - delay]
