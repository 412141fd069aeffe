"""LateralControl-v0: steer simulated cars so that their lateral acceleration follows a target smoothly.

This is the comma controls challenge (github.com/commaai/controls_challenge) for many cars at once. The simulator is a
learned model in an ONNX file: from the last 20 steps of steering, speed, acceleration, road roll and lateral
acceleration it computes a distribution over the next lateral acceleration, from which one value is drawn. With the
model and segments of the challenge the results equal those of the official simulator bit for bit. Without these files
the environment uses its own small model (tools/make_lateral_dynamics.py) and synthetic segments.

An episode is one segment, steps 100 to 499 of 0.1 s each, with the cost of the challenge:

    lataccel_cost = 100 mean((target - lat)^2)      jerk_cost = 100 mean((diff(lat) / 0.1)^2)
    total_cost = 50 lataccel_cost + jerk_cost

As in the challenge, a controller knows the target, the last lateral acceleration, the state and a preview of 49 steps.
It does not know the steering before step 100, which estimate_steer estimates here and in the deployed controller
(ChallengeController).
"""

import functools
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np

from envs import UserError
from envs.batch_env import BatchEnv, SingleEnv, env_seeds
from envs.disturbances import Disturbances, Float, Int, delayed
from envs.lateral_model import BINS, Dynamics, distribution, draw, tokens_of
from envs.lateral_segments import (
    CONTEXT,
    DT,
    FIRST,
    LAST,
    MIN_ROWS,
    SYNTHETIC,
    Segment,
    load_folder,
    split_of,
    synthetic,
)
from envs.render import FigureRenderer

EMBEDDED = Path(__file__).parent / "assets" / "lateral_dynamics.onnx"
STEPS = LAST - FIRST  # steps of an episode
MAX_JUMP = 0.5  # largest change of the lateral acceleration in a step, m/s^2
MAX_STEER = 2.0
MAX_DELTA = 0.2  # change of the steering per unit of action
STANDING = 1.0  # m/s; below it the steering does not change
WORST_COST = 200.0  # policies are compared by costs clipped to this, so that a few extreme roads do not dominate
WARM_UP = 20  # the official simulator calls the controller from this step on, and uses its output from FIRST on

PAST, AHEAD = 7, 40  # steps before and after the current one that a controller uses
CLIP = 10.0  # of the observations
MEMORY = 6  # past steps of steering and lateral acceleration that it uses


# The simulator


def noise_seed(name: str) -> int:
    """Seed of the official simulator for the segment data/<name>."""
    return int(hashlib.md5(f"data/{name}".encode()).hexdigest(), 16) % 10**4


def official_noise(name: str, first: int = FIRST) -> np.ndarray:
    """Uniform draws of the official simulator for steps first..LAST-1; it draws one per step from WARM_UP on."""
    return np.random.RandomState(noise_seed(name)).random_sample(LAST - WARM_UP)[first - WARM_UP :]


class Road:
    """Segments in arrays: target, roll, v and a (S, MIN_ROWS), steer (S, FIRST), float64."""

    def __init__(self, segments: list[Segment]):
        self.names = [segment.name for segment in segments]
        stack = functools.partial(np.stack, axis=0)
        self.target = stack([segment.target[:MIN_ROWS] for segment in segments])
        self.roll = stack([segment.roll[:MIN_ROWS] for segment in segments])
        self.v = stack([segment.v[:MIN_ROWS] for segment in segments])
        self.a = stack([segment.a[:MIN_ROWS] for segment in segments])
        self.steer = stack([segment.steer[:FIRST] for segment in segments])
        self.states = np.stack([self.roll, self.v, self.a], axis=-1).astype(np.float32)  # input of the dynamics
        self.checksum = zlib.crc32(self.target.tobytes())

    def window(self, segment: np.ndarray, t: np.ndarray, before: int, after: int) -> tuple[np.ndarray, ...]:
        """target, roll, v, a (n, before + 1 + after) of steps t - before .. t + after; segment, t: (n,)."""
        where = segment[:, None], t[:, None] + np.arange(-before, after + 1)
        return self.target[where], self.roll[where], self.v[where], self.a[where]


@functools.lru_cache(maxsize=8)
def load_road(split: str, data_path: str | None, test_path: str | None) -> Road:
    """The segments of a split. They are cached, because every evaluation needs them."""
    if split == "test" and test_path is not None:
        segments = load_folder(test_path)
        seen = {file.name for file in Path(data_path).glob("*.csv")} if data_path is not None else set()
        if shared := sorted(seen & {segment.name for segment in segments}):
            raise ValueError(f"test_path and data_path both hold {shared[0]}; give a test its own segments")
        return Road(segments)
    if split == "test" and data_path is not None:
        raise ValueError("the test split of a data_path needs a test_path too: a folder of other segments")
    if data_path is not None:
        return Road(split_of(load_folder(data_path), split))
    return Road(synthetic(split, SYNTHETIC[split]))


class Simulator:
    """N cars, each on a segment at its own step t.

    Attributes:
        segment, t: (N,) segment and step of each car.
        lat: (N, 20) lateral accelerations of steps t-20..t-1, m/s^2.
        steer: (N, 20) steering of these steps, in [-2, 2], with the sign of the lateral acceleration.
    """

    def __init__(self, num_cars: int, road: Road, dynamics: Dynamics):
        self.road, self.dynamics = road, dynamics
        self.segment, self.t = np.zeros(num_cars, np.int64), np.full(num_cars, FIRST)
        self.lat, self.steer = np.zeros((num_cars, CONTEXT)), np.zeros((num_cars, CONTEXT))

    def start(self, indices: np.ndarray, segment: np.ndarray, first: int = FIRST) -> None:
        """Place cars at step `first` of their segments, with the logged steering and on the target before it."""
        self.segment[indices], self.t[indices] = segment, first
        self.lat[indices] = self.road.target[segment, first - CONTEXT : first]
        self.steer[indices] = self.road.steer[segment, first - CONTEXT : first]

    def step(self, steer: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Simulate step t with this steering (N,). Returns its lateral acceleration (N,)."""
        push(self.steer, np.clip(steer, -MAX_STEER, MAX_STEER))
        where = self.segment[:, None], self.t[:, None] + np.arange(1 - CONTEXT, 1)
        states = np.concatenate([self.steer[:, :, None].astype(np.float32), self.road.states[where]], axis=2)
        self.probability = distribution(self.dynamics.logits(states, tokens_of(self.lat)))
        if wrong := np.flatnonzero(~np.isfinite(self.probability).all(1)).tolist():
            name = self.road.names[self.segment[wrong[0]]]
            raise FloatingPointError(f"the car's model returns NaN or infinity at step {self.t[wrong[0]]} of {name}")
        bins, last = draw(self.probability, uniform), self.lat[:, -1]
        lat = np.clip(BINS[bins], last - MAX_JUMP, last + MAX_JUMP)
        push(self.lat, lat)
        self.t += 1
        return lat

    def expected_cost(self, target: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[(target - lat)^2] and E[(lat - last)^2] (N,) over the distribution of the last step."""
        change = np.clip(BINS.astype(np.float32) - last[:, None].astype(np.float32), -MAX_JUMP, MAX_JUMP)
        mean = (self.probability * change).sum(1)
        square = (self.probability * change**2).sum(1)
        gap = target - last
        return gap**2 - 2 * gap * mean + square, square


def push(history: np.ndarray, new: np.ndarray) -> None:
    """Remove the oldest column of (N, K) and append a new one (N,)."""
    history[:, :-1] = history[:, 1:]
    history[:, -1] = new


# The input of a controller


class Knowledge(NamedTuple):
    """The input of a controller at step t."""

    target: np.ndarray  # (N, 48) m/s^2, steps t-7 .. t+40, like the next three
    roll: np.ndarray  # m/s^2
    v: np.ndarray  # m/s
    a: np.ndarray  # m/s^2
    lat: np.ndarray  # (N, 6) lateral accelerations of steps t-6 .. t-1, m/s^2
    steer: np.ndarray  # (N, 6) steering of these steps; estimated before step 100
    integral: np.ndarray  # (N,) leaky sum of the errors since step 100


def estimate_steer(target: np.ndarray, roll: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Estimate the steering (n, K) of steps t..t+K-1 of cars on the target; arrays (n, K + 4) of steps t-1..t+K+2.

    It is a least-squares fit to the logged steering of 612 segments. The residual (standard deviation 0.09) is mostly
    an offset per segment, which a controller cannot know."""
    n = target.shape[1] - 4
    needed = np.stack([(target - roll)[:, k : k + n] for k in range(5)]).mean(0)
    steer = (0.64 - 0.067 * (v[:, 1 : 1 + n] - 25) / 10) * needed - 0.076 * needed * np.abs(needed)
    return np.clip(steer, -MAX_STEER, MAX_STEER)


def steer_per_lataccel(needed: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Change of the steering per change of the lateral acceleration (m/s^2) at `needed` m/s^2: the slope of the fit in
    estimate_steer. It decreases with speed and in sharp bends."""
    return np.maximum(0.64 - 0.067 * (v - 25) / 10 - 2 * 0.076 * np.abs(needed), 0.2)


def observation(known: Knowledge) -> np.ndarray:
    """The observation (N, 46) float32, scaled to order 1 and clipped to +-10: tracking errors, last changes of lateral
    acceleration and steering, current state, and future changes of target, roll and speed."""
    target, roll, v, a = (x[:, PAST:] for x in known[:4])  # from step t on
    last = known.steer[:, -1]
    error = known.target[:, PAST - 2 : PAST + 1] - known.lat[:, -3:]
    slope, bank_slope = np.diff(target[:, :21], axis=1), np.diff(roll[:, :8], axis=1)
    far = np.array([11, 15, 20, 30, 40])
    columns = [
        4 * error[:, ::-1],
        10 * np.diff(known.lat[:, -5:], axis=1)[:, ::-1],
        20 * np.diff(known.steer, axis=1)[:, ::-1],
        target[:, 0] / 2,
        2 * (last - 0.53 * (target[:, 0] - roll[:, 0])),
        v[:, 0] / 10 - 2.3,
        a[:, 0],
        2 * roll[:, 0],
        last,
        known.integral,
        10 * slope[:, :9],
        2 * (target[:, far] - target[:, [8]]),
        20 * bank_slope,
        4 * (roll[:, 12] - roll[:, 6]),
        (v[:, 5] - v[:, 0]) / 1.5,
        (v[:, 15] - v[:, 5]) / 3,
        10 * np.sqrt(np.square(slope[:, :5]).mean(1)),
        10 * np.sqrt(np.square(slope[:, :20]).mean(1)),
        20 * np.square(error[:, -1]),
    ]
    x = np.concatenate([c if c.ndim == 2 else c[:, None] for c in columns], axis=1)
    return np.clip(x, -CLIP, CLIP).astype(np.float32)


OBSERVATIONS = 46


def leaky(integral: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Add an error to the leaky sum."""
    return np.clip(0.95 * integral + 0.1 * error, -3, 3)


# Controllers: policies that use a Knowledge instead of the observation


class PID:
    """The controller of the challenge. It is also called in steps 20 to 99, in which the car follows the target, so its
    integral does not start from zero."""

    env_kwargs: ClassVar = {"action_mode": "absolute"}
    p, i, d = 0.195, 0.100, -0.053

    def __init__(self):
        self.integral = self.previous = np.zeros(0)

    def reset(self, indices: np.ndarray, source: Any) -> None:
        self.source = source
        if len(self.integral) != source.num_envs:
            self.integral, self.previous = np.zeros(source.num_envs), np.zeros(source.num_envs)
        self.integral[indices] = 0
        errors = np.diff(source.target_before(indices), axis=1)  # the car is at the last target
        for error in errors.T:
            self.integral[indices] += error
        self.previous[indices] = errors[:, -1]

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        known = self.source.knowledge()
        error = known.target[:, PAST] - known.lat[:, -1]
        self.integral += error
        slope, self.previous = error - self.previous, error
        return (self.p * error + self.i * self.integral + self.d * slope)[:, None]


class Incremental:
    """A controller whose action is a change of the steering, which a subclass computes."""

    env_kwargs: ClassVar = {"action_mode": "delta"}

    def reset(self, indices: np.ndarray, source: Any) -> None:
        self.source = source

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        change = self.change(self.source.knowledge())
        return np.clip(change / MAX_DELTA, -1, 1)[:, None].astype(np.float32)

    def change(self, known: Knowledge) -> np.ndarray:
        raise NotImplementedError


class VelocityPID(Incremental):
    """The official gains in velocity form, du = p (e - e1) + i e + d (e - 2 e1 + e2), which cannot wind up."""

    def change(self, known: Knowledge) -> np.ndarray:
        e2, e1, e = (known.target[:, PAST - 2 : PAST + 1] - known.lat[:, -3:]).T
        return PID.p * (e - e1) + PID.i * e + PID.d * (e - 2 * e1 + e2)


class FeedForward(Incremental):
    """Feedforward of target and roll three steps ahead, which is the delay of the car, and a velocity PI for the
    remaining error. Both are scaled with steer_per_lataccel."""

    def change(self, known: Knowledge) -> np.ndarray:
        weights = 0.5 ** np.abs(np.arange(-6, 7))
        weights /= weights.sum()

        def smooth(k: int) -> np.ndarray:  # target k steps ahead
            return known.target[:, PAST + k - 6 : PAST + k + 7] @ weights

        (bank, bank_ahead), v = known.roll[:, [PAST + 2, PAST + 3]].T, known.v[:, PAST]
        ahead = steer_per_lataccel(known.target[:, PAST + 3] - bank_ahead, v)
        now = steer_per_lataccel(known.lat[:, -1] - known.roll[:, PAST], v)
        e, e1 = smooth(0) - known.lat[:, -1], smooth(-1) - known.lat[:, -2]
        return 0.8 * ahead * (smooth(3) - smooth(2) - (bank_ahead - bank)) + now * (0.27 * (e - e1) + 0.24 * e)


class ChallengeController:
    """A controller with the interface of the challenge: update(target_lataccel, current_lataccel, state, future_plan).

    Args:
        policy: pid, velocity-pid, feedforward, or an exported policy.onnx.
    """

    num_envs = 1

    def __init__(self, policy: str):
        from envs.evaluation import OnnxPolicy

        if policy in CONTROLLERS:
            self.policy: Callable = CONTROLLERS[policy]()
            self.absolute = self.policy.env_kwargs["action_mode"] == "absolute"
        else:
            self.policy = OnnxPolicy(policy, np.zeros((2, OBSERVATIONS), np.float32), 1)
            self.absolute = "absolute" in self.policy.metadata.get("action_mode", "")
        self.rows: list[tuple] = []  # target, roll, v, a of all calls
        self.lat: list[float] = []
        self.steer, self.integral = np.zeros(MEMORY), np.zeros(1)

    def update(self, target_lataccel: float, current_lataccel: float, state: Any, future_plan: Any) -> float:
        """The steering of this step. state has roll_lataccel, v_ego and a_ego; future_plan has lists of these and of
        lataccel. The simulator ignores the result before step 100."""
        self.rows.append((target_lataccel, state.roll_lataccel, state.v_ego, state.a_ego))
        self.lat.append(current_lataccel)
        self.plan = [future_plan.lataccel, future_plan.roll_lataccel, future_plan.v_ego, future_plan.a_ego]
        step = WARM_UP + len(self.rows) - 1
        if step < FIRST:
            return 0.0
        if step == FIRST:
            self.steer = estimate_steer(*(x[:, : MEMORY + 4] for x in self._window(MEMORY + 1)[:3]))[0]
            if hasattr(self.policy, "reset"):
                self.policy.reset(np.zeros(1, np.int64), self)
        self.integral = leaky(self.integral, np.array([target_lataccel - current_lataccel]))
        action = self.policy(observation(self.knowledge()))[:, 0]
        steer = steer_of(action, self.steer[-1:], np.array([state.v_ego]), self.absolute)
        self.steer = np.append(self.steer[1:], steer)
        return float(steer[0])

    def _window(self, before: int) -> list[np.ndarray]:
        """target, roll, v, a (1, before + 1 + AHEAD) around this step; the last value of the plan is repeated."""
        window = []
        for past, plan in zip(zip(*self.rows[-before - 1 :]), self.plan):
            values = [*past, *plan[:AHEAD]]
            window.append(np.array([values + values[-1:] * (before + 1 + AHEAD - len(values))]))
        return window

    def knowledge(self) -> Knowledge:
        return Knowledge(*self._window(PAST), np.array([self.lat[-MEMORY:]]), self.steer[None], self.integral)

    def target_before(self, indices: np.ndarray) -> np.ndarray:
        """Targets of steps 19..99 (1, 81), which the car follows."""
        return np.array([self.lat])


CONTROLLERS: dict[str, type] = {"pid": PID, "velocity-pid": VelocityPID, "feedforward": FeedForward}


def steer_of(action: np.ndarray, last: np.ndarray, v: np.ndarray, absolute: bool) -> np.ndarray:
    """Steering (N,) after the steering `last` at speed v (m/s). In delta mode the steering of a standing car does not
    change: it would have no effect until the car moves, and small actions would add up without feedback."""
    action = np.asarray(action, np.float64)
    steer = action if absolute else last + MAX_DELTA * np.clip(action, -1, 1) * (v >= STANDING)
    return np.clip(steer, -MAX_STEER, MAX_STEER)


# The environment


class LateralControl(BatchEnv):
    """N cars on segments of the comma controls challenge, steps 100 to 499.

    Action: in delta mode the change of the steering in units of 0.2, in [-1, 1], which has no effect below 1 m/s; in
    absolute mode the steering, in [-2, 2], with the sign of the lateral acceleration. Observation: see `observation`.

    With training=False environment i goes through the segments i, i + N, ... of the split (an episode with seed [s, k]
    is segment k) with the noise of the official simulator, and rewards add up to minus the official total_cost. With
    training=True segments and noise are random, and the reward is

        -w E[5000 (target - lat)^2 + 10000 (change of lat)^2] / 100,    w = 100 / (100 + jerk_cost of the target itself)

    where w limits the influence of extreme roads, and the expectation is over the distribution of the step, which has
    less variance than the drawn value. The first episode after a seeded reset ends at a random step, so that cars are
    in different phases. Episodes are always truncated. Metrics: lataccel_cost, jerk_cost, total_cost, and score, which
    is -total_cost clipped to -200 and selects policies.

    Args:
        num_envs: number of cars, N.
        training, split, render_mode: see BatchEnv.
        action_mode: delta or absolute.
        steering_gain: factor on the steering that the car receives.
        steering_delay: delay of the steering in steps. Both may be ranges (low, high), from which each episode draws.
        copies: in training, so many neighboring environments have the same segment, phase and noise (common random
            numbers).
        model_path: tinyphysics.onnx of the challenge; None for the bundled model.
        data_path: folder of CSV files of the challenge: the first 7/8 by name are train, the rest validation; None for
            synthetic segments.
        test_path: folder of CSV files for the test split.
        threads: CPU threads of the dynamics.

    Raises:
        ValueError: an invalid argument or file.
    """

    metadata: ClassVar = {**BatchEnv.metadata, "render_fps": 10}
    controllers: ClassVar = CONTROLLERS
    measures: ClassVar = ("lataccel_cost", "jerk_cost", "total_cost", "score")

    def __init__(
        self,
        num_envs: int = 1,
        training: bool = True,
        split: str = "train",
        action_mode: str = "delta",
        steering_gain: Float = 1.0,
        steering_delay: Int = 0,
        copies: int = 1,
        model_path: str | None = None,
        data_path: str | None = None,
        test_path: str | None = None,
        threads: int = 1,
        render_mode: str | None = None,
    ):
        if action_mode not in ("delta", "absolute"):
            raise ValueError(f"action_mode must be delta or absolute, not {action_mode!r}")
        bound = 1.0 if action_mode == "delta" else MAX_STEER
        box = gym.spaces.Box(-CLIP, CLIP, (OBSERVATIONS,), np.float32)
        super().__init__(
            num_envs, box, gym.spaces.Box(-bound, bound, (1,), np.float32), STEPS, training, split, render_mode
        )
        self.absolute, self.copies = action_mode == "absolute", copies if training else 1
        self.road = load_road(split, data_path, test_path)
        self.num_episodes = None if training else len(self.road.names)
        self.sim = Simulator(num_envs, self.road, Dynamics(model_path or EMBEDDED, threads))
        jerk = np.square(np.diff(self.road.target[:, FIRST:LAST], axis=1) / DT).mean(1) * 100
        self.weight = 100 / (100 + jerk)
        self.upcoming = np.arange(num_envs)  # segment of each environment's next episode, if training=False
        self.limit = np.full(num_envs, STEPS)  # steps of each episode
        self.staggered = False
        ranges = {"steering_gain": steering_gain, "steering_delay": steering_delay}
        self.disturbances = Disturbances(num_envs, ranges)
        self.commands = np.zeros((num_envs, self.disturbances.highest("steering_delay") + 1, 1))  # oldest first
        self.uniform, self.lat, self.steer = (np.zeros((num_envs, STEPS)) for _ in range(3))
        self.known_steer, self.integral = np.zeros((num_envs, MEMORY)), np.zeros(num_envs)
        self.renderer: FigureRenderer | None = None

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            seeds = env_seeds(seed, self.num_envs)
            indices = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
            self.upcoming[indices] = np.array([np.ravel(s)[-1] for s in seeds])[indices]
        self.staggered = self.training and seed is not None
        result = super().reset(seed=seed, options=options)
        self.staggered = False
        return result

    def start(self, indices: np.ndarray) -> None:
        segment = self.sim.segment.copy()
        for i in indices:
            leader = i // self.copies * self.copies
            if not self.training:
                segment[i] = self.upcoming[i] % len(self.road.names)
                self.uniform[i] = official_noise(self.road.names[segment[i]])
                self.disturbances.draw(i, self.rngs[i])
                continue
            if i == leader:
                self.disturbances.draw(i, self.rngs[i])
                segment[i] = self.rngs[i].integers(len(self.road.names))
                self.limit[i] = self.rngs[i].integers(2, STEPS + 1) if self.staggered else STEPS
                self.uniform[i] = self.rngs[i].random(STEPS)
            segment[i], self.limit[i], self.uniform[i] = segment[leader], self.limit[leader], self.uniform[leader]
            self.disturbances.copy(leader, i)
        self.upcoming[indices] += self.num_envs
        self.sim.start(indices, segment[indices])
        before = self.road.window(segment[indices], np.full(len(indices), FIRST), MEMORY + 1, 2)
        self.known_steer[indices] = estimate_steer(*before[:3])
        self.commands[indices] = self.known_steer[indices, -1, None, None]
        target = self.road.target[segment[indices], FIRST]
        self.integral[indices] = leaky(np.zeros(len(indices)), target - self.sim.lat[indices, -1])

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        sim, every = self.sim, np.arange(self.num_envs)
        sim.t[self.ended] -= 1  # cars that wait for a reset repeat their last step
        i, before = sim.t - FIRST, sim.lat[:, -1].copy()
        steer = steer_of(action[:, 0], self.known_steer[:, -1], self.road.v[sim.segment, sim.t], self.absolute)
        received = delayed(self.commands, steer[:, None], self.disturbances["steering_delay"])[:, 0]
        lat = sim.step(self.disturbances["steering_gain"] * received, self.uniform[every, i])
        self.lat[every, i], self.steer[every, i] = lat, steer
        push(self.known_steer, steer)
        self.integral = leaky(self.integral, self.road.target[sim.segment, sim.t] - lat)

        target = self.road.target[sim.segment, sim.t - 1]
        if self.training:
            error, change = sim.expected_cost(target, before)
            reward = -self.weight[sim.segment] * (5000 * error + 10000 * change * (i > 0)) / 100
        else:  # the official jerk begins with the second step
            error, change = np.square(target - lat), np.square(lat - before) * (i > 0)
            reward = -(5000 / STEPS * error + 10000 / (STEPS - 1) * change)
        ended = np.flatnonzero(self.episode_length + 1 >= self.limit)
        return reward, np.zeros(self.num_envs, bool), self._costs(ended) if len(ended) else {}

    def _costs(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The official costs of the episodes that end in these environments, with the official arithmetic."""
        costs = {name: np.zeros(self.num_envs) for name in ("lataccel_cost", "jerk_cost", "total_cost", "score")}
        for i in indices:
            n = self.limit[i]
            target, lat = self.road.target[self.sim.segment[i], FIRST : FIRST + n], self.lat[i, :n]
            costs["lataccel_cost"][i] = np.mean((target - lat) ** 2) * 100
            costs["jerk_cost"][i] = np.mean((np.diff(lat) / DT) ** 2) * 100
        costs["total_cost"] = 50 * costs["lataccel_cost"] + costs["jerk_cost"]
        costs["score"] = -np.minimum(costs["total_cost"], WORST_COST)
        return costs

    def knowledge(self, indices: np.ndarray | None = None) -> Knowledge:
        """Input of a controller in these environments, by default in all."""
        indices = np.arange(self.num_envs) if indices is None else indices
        window = self.road.window(self.sim.segment[indices], self.sim.t[indices], PAST, AHEAD)
        return Knowledge(*window, self.sim.lat[indices, -MEMORY:], self.known_steer[indices], self.integral[indices])

    def target_before(self, indices: np.ndarray) -> np.ndarray:
        """Targets of steps 19..99 (n, 81), which the car follows."""
        return self.road.target[self.sim.segment[indices], WARM_UP - 1 : FIRST]

    def observe(self, indices: np.ndarray) -> np.ndarray:
        return observation(self.knowledge(indices))

    def render(self) -> np.ndarray | None:
        """Charts of environment 0's episode so far, uint8 (480, 720, 3); None in human mode, which opens a window."""
        self.renderer = self.renderer or FigureRenderer(self.render_mode, 720, 480)
        figure, n, segment = self.renderer.figure, self.sim.t[0] - FIRST, self.sim.segment[0]
        figure.clear()
        target, speed = (getattr(self.road, name)[segment, FIRST : FIRST + n] for name in ("target", "v"))
        lataccel, steer, speeds = figure.subplots(3, sharex=True)
        lataccel.plot(target, "gray", label="target")
        lataccel.plot(self.lat[0, :n], "tab:red", label="actual")
        lataccel.set(title=self.road.names[segment], ylabel="lat. acc. (m/s²)", xlim=(0, STEPS))
        lataccel.legend(loc="upper right", ncols=2)
        steer.plot(self.steer[0, :n], "tab:blue")
        steer.set(ylabel="steering")
        speeds.plot(speed, "tab:green")
        speeds.set(ylabel="speed (m/s)", xlabel="step (0.1 s)")
        return self.renderer.show()

    def close_extras(self, **kwargs: Any) -> None:
        if self.renderer is not None:
            self.renderer.close()

    def state(self) -> dict[str, np.ndarray]:
        return {
            **{"segment": self.sim.segment, "t": self.sim.t, "sim_lat": self.sim.lat, "sim_steer": self.sim.steer},
            **{"upcoming": self.upcoming, "limit": self.limit, "uniform": self.uniform},
            **{"lat": self.lat, "steer": self.steer, "known_steer": self.known_steer, "integral": self.integral},
            **({"commands": self.commands} if self.commands.shape[1] > 1 else {}),
            **self.disturbances.state(),
            "road": np.array([self.road.checksum]),
        }

    def load_state_dict(self, state: dict) -> np.ndarray:
        if int(state["arrays"]["road"][0]) != self.road.checksum:
            raise UserError("the run used other segments; give data_path the files that it had")
        return super().load_state_dict(state)


class LateralControlEnv(SingleEnv):
    batch_env = LateralControl
