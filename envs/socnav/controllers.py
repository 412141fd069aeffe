"""Scripted controllers: one follows its route, the other also stops for pedestrians. They get the observation of a
policy and know the robot."""

from typing import Any

import numpy as np

from envs.socnav import PEDESTRIAN_RANGE
from envs.socnav.dynamics import DT, WHEELBASE

CRUISE = 1.5  # m/s
TURNING = 2.0  # 1/s, turn rate for each radian off course
STOP_AHEAD, STOP_BESIDE = 4.0, 2.0  # m; the robot stops for a pedestrian within this box


class Pursuit:
    """Drives at 1.5 m/s towards the point of the route 3 m ahead, slower in bends."""

    def reset(self, indices: np.ndarray, envs: Any) -> None:
        self.robot = envs.robot

    def speed(self, obs: dict[str, np.ndarray], bearing: np.ndarray) -> np.ndarray:
        """The speed (N,) that the robot should have, m/s."""
        return CRUISE * np.clip(np.cos(bearing), 0.1, 1) ** 2

    def __call__(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        obs = {name: np.asarray(x, np.float64) for name, x in obs.items() if name != "grid"}
        v, turn = obs["robot"][:, 0] * self.robot.max_speed, obs["robot"][:, 1] * self.robot.max_turn_rate
        bearing = np.arctan2(obs["goal"][:, 5], obs["goal"][:, 4])
        wanted = np.clip(TURNING * bearing, -1, 1)
        faster = (self.speed(obs, bearing) - v) / DT
        if self.robot.name == "bicycle":
            second = np.arctan(WHEELBASE * wanted / np.maximum(v, 0.3))
        else:
            second = (wanted - turn) / DT
        return np.clip(np.stack([faster, second], 1), self.robot.low, self.robot.high).astype(np.float32)


class PursuitStop(Pursuit):
    """Stops while a pedestrian is within 4 m ahead and 2 m to either side."""

    def speed(self, obs: dict[str, np.ndarray], bearing: np.ndarray) -> np.ndarray:
        x, y = np.moveaxis(obs["pedestrians"][..., :2] * PEDESTRIAN_RANGE, -1, 0)
        present = np.arange(x.shape[1]) < obs["count"]
        blocked = (present & (x > 0) & (x < STOP_AHEAD) & (np.abs(y) < STOP_BESIDE)).any(1)
        return np.where(blocked, 0.0, super().speed(obs, bearing))


CONTROLLERS = {"pursuit": Pursuit, "pursuit-stop": PursuitStop}
