"""Small legal Gymnasium environments that a training script may stumble over."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

F = np.float32


class Base(gym.Env):
    """Random observations, a cost for large actions, 20 steps. Refuses actions outside its space or its dtype."""

    observation_space = Box(-np.inf, np.inf, (3,), F)
    action_space = Box(-1, 1, (2,), F)
    limit = 20
    executed: ClassVar[list] = []  # the actions of all environments

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def obs(self):
        return self.np_random.normal(size=3).astype(F)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        assert action.dtype == self.action_space.dtype
        self.executed.append(action)
        self.t += 1
        return self.obs(), -float(np.square(action).sum()), False, self.t >= self.limit, {}


class IntObs(Base):
    observation_space = Box(0, 10, (3,), np.int64)

    def obs(self):
        return self.np_random.integers(0, 10, 3)


class ByteObs(Base):
    observation_space = Box(0, 255, (3,), np.uint8)

    def obs(self):
        return self.np_random.integers(0, 256, 3).astype(np.uint8)


class Asymmetric(Base):
    """In float32, bias + scale rounds to a number beyond these bounds."""

    action_space = Box(np.array([-0.05, -0.7], F), np.array([0.1, 0.3], F))


class Float64(Base):
    """The nearest float32 of -0.7 and 0.3 lie outside these bounds."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    action_space = Box(np.array([0.0, -0.7]), np.array([5.0, 0.3]), dtype=np.float64)

    def obs(self):
        return self.np_random.normal(size=3)


class Tuples(Base):
    """A tuple argument, like healthy_z_range of Hopper-v5."""

    def __init__(self, render_mode=None, gains=(0.0, 0.0)):
        super().__init__(render_mode)
        low, high = gains
        assert (low, high) == (1.0, 2.0)


class Lucky(Base):
    """Half of the episodes succeed, and info["is_success"] tells it."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.lucky = self.np_random.random() < 0.5
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"is_success": self.lucky and truncated}


class Raises(Base):
    def step(self, action):
        if self.t == 7:
            raise OSError("lost the connection to the robot")
        return super().step(action)


class Endless(Base):
    limit = np.inf


class DiscreteActions(Base):
    action_space = Discrete(3)


class IntActions(Base):
    action_space = Box(-2, 2, (2,), np.int64)


NAMES = (
    *("IntObs", "ByteObs", "Asymmetric", "Float64", "Tuples", "Lucky", "Raises", "Endless"),
    *("DiscreteActions", "IntActions"),
)
for name in NAMES:
    gym.register(f"{name}-v0", f"{__name__}:{name}")
