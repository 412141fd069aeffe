"""LateralControl-v0: steer a simulated car so that its lateral acceleration follows a target, smoothly.

This is the comma controls challenge (github.com/commaai/controls_challenge) for many cars at once. The simulator is a
learned model in an ONNX file: from the last 20 steps of steering, speed, acceleration, road bank and lateral
acceleration it gives a distribution over the next lateral acceleration, from which one value is drawn. With the
challenge's own model and segments its arithmetic equals the official simulator's bit for bit; without any file it runs
on small dynamics of our own (tools/make_lateral_dynamics.py) and on synthetic segments.

An episode is one segment, steps 100 to 499 of 0.1 s each. Its cost is the challenge's:

    lataccel_cost = 100 mean((target - lat)^2)      jerk_cost = 100 mean((diff(lat) / 0.1)^2)
    total_cost = 50 lataccel_cost + jerk_cost

A controller may know only what the challenge tells one: at each step the target, the last lateral acceleration, the
state and a preview of 49 steps. The steering before step 100 is not told, so it is estimated (`estimate_steer`), here
and in the deployed controller (`ChallengeController`) by the same code.
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
from envs.batch_env import BatchEnv, SingleEnv, seed_of_each
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
from envs.raster import Window, charts

EMBEDDED = Path(__file__).parent / "assets" / "lateral_dynamics.onnx"
STEPS = LAST - FIRST  # of an episode
MAX_JUMP = 0.5  # largest change of the lateral acceleration in a step, m/s^2
MAX_STEER = 2.0
MAX_DELTA = 0.2  # steering change that an action of 1 stands for
STANDING = 1.0  # m/s; below it a change of the steering is not carried out
WORST_COST = 200.0  # policies are compared with each segment's cost cut off here: a few extreme roads say little
WARM_UP = 20  # the official simulator begins to ask the controller at this step; its answers count from FIRST on

PAST, AHEAD = 7, 40  # rows before and after the present one that a controller looks at
CLIP = 10.0  # of the observations
MEMORY = 6  # steps of its own steering and of the car's response that it remembers


# The simulator


def noise_seed(name: str) -> int:
    """The official simulator's seed for a segment that it finds as data/<name>."""
    return int(hashlib.md5(f"data/{name}".encode()).hexdigest(), 16) % 10**4


def official_noise(name: str, first: int = FIRST) -> np.ndarray:
    """Its uniform draws for steps first..LAST-1; it makes one in each step from WARM_UP on."""
    return np.random.RandomState(noise_seed(name)).random_sample(LAST - WARM_UP)[first - WARM_UP :]


class Road:
    """Segments side by side: target, roll, v and a (S, MIN_ROWS), steer (S, FIRST), all float64; names."""

    def __init__(self, segments: list[Segment]):
        self.names = [segment.name for segment in segments]
        stack = functools.partial(np.stack, axis=0)
        self.target = stack([segment.target[:MIN_ROWS] for segment in segments])
        self.roll = stack([segment.roll[:MIN_ROWS] for segment in segments])
        self.v = stack([segment.v[:MIN_ROWS] for segment in segments])
        self.a = stack([segment.a[:MIN_ROWS] for segment in segments])
        self.steer = stack([segment.steer[:FIRST] for segment in segments])
        self.states = np.stack([self.roll, self.v, self.a], axis=-1).astype(np.float32)  # as the dynamics reads them
        self.checksum = zlib.crc32(self.target.tobytes())

    def window(self, segment: np.ndarray, t: np.ndarray, before: int, after: int) -> tuple[np.ndarray, ...]:
        """target, roll, v, a (n, before + 1 + after) of rows t - before .. t + after; segment, t: (n,)."""
        where = segment[:, None], t[:, None] + np.arange(-before, after + 1)
        return self.target[where], self.roll[where], self.v[where], self.a[where]


@functools.lru_cache(maxsize=8)
def load_road(split: str, data_path: str | None, test_path: str | None) -> Road:
    """The segments of a split; kept, since each evaluation of a run asks anew."""
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
        segment, t: (N,) where each car is.
        lat: (N, 20) its lateral accelerations of steps t-20..t-1, m/s^2.
        steer: (N, 20) its steering of those steps, in [-2, 2]; more of it gives more lateral acceleration.
    """

    def __init__(self, num_cars: int, road: Road, dynamics: Dynamics):
        self.road, self.dynamics = road, dynamics
        self.segment, self.t = np.zeros(num_cars, np.int64), np.full(num_cars, FIRST)
        self.lat, self.steer = np.zeros((num_cars, CONTEXT)), np.zeros((num_cars, CONTEXT))

    def start(self, rows: np.ndarray, segment: np.ndarray, first: int = FIRST) -> None:
        """Put cars at step `first` of their segments; up to there they steered as logged and followed the target."""
        self.segment[rows], self.t[rows] = segment, first
        self.lat[rows] = self.road.target[segment, first - CONTEXT : first]
        self.steer[rows] = self.road.steer[segment, first - CONTEXT : first]

    def step(self, steer: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Steer (N,) at t, which then becomes t + 1. Returns the lateral acceleration (N,) of step t."""
        push(self.steer, np.clip(steer, -MAX_STEER, MAX_STEER))
        where = self.segment[:, None], self.t[:, None] + np.arange(1 - CONTEXT, 1)
        states = np.concatenate([self.steer[:, :, None].astype(np.float32), self.road.states[where]], axis=2)
        self.probability = distribution(self.dynamics.logits(states, tokens_of(self.lat)))
        if wrong := np.flatnonzero(~np.isfinite(self.probability).all(1)).tolist():
            name = self.road.names[self.segment[wrong[0]]]
            raise FloatingPointError(f"the car's model gives no number at step {self.t[wrong[0]]} of {name}")
        bins, last = draw(self.probability, uniform), self.lat[:, -1]
        lat = np.clip(BINS[bins], last - MAX_JUMP, last + MAX_JUMP)
        push(self.lat, lat)
        self.t += 1
        return lat

    def expected_cost(self, target: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[(target - lat)^2] and E[(lat - last)^2] (N,) of the step just made, over all that it could have drawn."""
        change = np.clip(BINS.astype(np.float32) - last[:, None].astype(np.float32), -MAX_JUMP, MAX_JUMP)
        mean = (self.probability * change).sum(1)
        square = (self.probability * change**2).sum(1)
        gap = target - last
        return gap**2 - 2 * gap * mean + square, square


def push(history: np.ndarray, new: np.ndarray) -> None:
    """Forget the oldest column of (N, K) and add a newest."""
    history[:, :-1] = history[:, 1:]
    history[:, -1] = new


# What a controller knows, and what it makes of it


class Knowledge(NamedTuple):
    """What a controller knows at step t; one row for each car."""

    target: np.ndarray  # (N, 48) m/s^2, rows t-7 .. t+40, as the next three
    roll: np.ndarray  # m/s^2
    v: np.ndarray  # m/s
    a: np.ndarray  # m/s^2
    lat: np.ndarray  # (N, 6) lateral accelerations of steps t-6 .. t-1, m/s^2
    steer: np.ndarray  # (N, 6) its own steering of those steps; before step 100 what it estimates
    integral: np.ndarray  # (N,) leaky sum of the errors since step 100


def estimate_steer(target: np.ndarray, roll: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What somebody steered in rows t..t+K-1 who followed the target; arrays (n, K + 4) of rows t-1..t+K+2 -> (n, K).

    A least-squares fit to the logged steering of 612 segments. What it misses (standard deviation .09) is nearly all an
    offset that differs from segment to segment and that nothing told to a controller reveals."""
    n = target.shape[1] - 4
    needed = np.stack([(target - roll)[:, k : k + n] for k in range(5)]).mean(0)
    steer = (0.64 - 0.067 * (v[:, 1 : 1 + n] - 25) / 10) * needed - 0.076 * needed * np.abs(needed)
    return np.clip(steer, -MAX_STEER, MAX_STEER)


def steer_per_lataccel(needed: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much more steering one m/s^2 more takes where the steering makes `needed` of them: the slope of the fit in
    `estimate_steer`. It falls with speed and in sharp bends, so the same steering does more there."""
    return np.maximum(0.64 - 0.067 * (v - 25) / 10 - 2 * 0.076 * np.abs(needed), 0.2)


def observation(known: Knowledge) -> np.ndarray:
    """The policy's 46 inputs (N, 46) float32, each of order 1, clipped to +-10: tracking errors, the car's and the
    controller's own last moves, the present state, and how target, bank and speed will change."""
    target, roll, v, a = (x[:, PAST:] for x in known[:4])  # from the present row on
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
    """The next leaky sum of errors."""
    return np.clip(0.95 * integral + 0.1 * error, -3, 3)


# Controllers: policies that look at what is known instead of at the observation


class PID:
    """The challenge's own controller. It is also asked in steps 20 to 99, where the car follows the target whatever it
    says, so its integral does not start from zero."""

    env_kwargs: ClassVar = {"action_mode": "absolute"}
    p, i, d = 0.195, 0.100, -0.053

    def __init__(self):
        self.integral = self.previous = np.zeros(0)

    def reset(self, rows: np.ndarray, source: Any) -> None:
        self.source = source
        if len(self.integral) != source.num_envs:
            self.integral, self.previous = np.zeros(source.num_envs), np.zeros(source.num_envs)
        self.integral[rows] = 0
        errors = np.diff(source.target_before(rows), axis=1)  # the target, less the one before, where the car is
        for error in errors.T:
            self.integral[rows] += error
        self.previous[rows] = errors[:, -1]

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        known = self.source.knowledge()
        error = known.target[:, PAST] - known.lat[:, -1]
        self.integral += error
        slope, self.previous = error - self.previous, error
        return (self.p * error + self.i * self.integral + self.d * slope)[:, None]


class Incremental:
    """A controller that changes the steering from where it is; a subclass says by how much."""

    env_kwargs: ClassVar = {"action_mode": "delta"}

    def reset(self, rows: np.ndarray, source: Any) -> None:
        self.source = source

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        change = self.change(self.source.knowledge())
        return np.clip(change / MAX_DELTA, -1, 1)[:, None].astype(np.float32)

    def change(self, known: Knowledge) -> np.ndarray:
        raise NotImplementedError


class VelocityPID(Incremental):
    """The official gains in velocity form, du = p (e - e1) + i e + d (e - 2 e1 + e2): no integral to wind up."""

    def change(self, known: Knowledge) -> np.ndarray:
        e2, e1, e = (known.target[:, PAST - 2 : PAST + 1] - known.lat[:, -3:]).T
        return PID.p * (e - e1) + PID.i * e + PID.d * (e - 2 * e1 + e2)


class FeedForward(Incremental):
    """Moves the steering with the target and the bank three steps ahead, the time that the car takes to answer, and
    corrects what error is left by a velocity PI; both as strongly as the car needs at this speed and in this bend."""

    def change(self, known: Knowledge) -> np.ndarray:
        weights = 0.5 ** np.abs(np.arange(-6, 7))
        weights /= weights.sum()

        def smooth(k: int) -> np.ndarray:  # the target k steps ahead
            return known.target[:, PAST + k - 6 : PAST + k + 7] @ weights

        (bank, bank_ahead), v = known.roll[:, [PAST + 2, PAST + 3]].T, known.v[:, PAST]
        ahead = steer_per_lataccel(known.target[:, PAST + 3] - bank_ahead, v)
        now = steer_per_lataccel(known.lat[:, -1] - known.roll[:, PAST], v)
        e, e1 = smooth(0) - known.lat[:, -1], smooth(-1) - known.lat[:, -2]
        return 0.8 * ahead * (smooth(3) - smooth(2) - (bank_ahead - bank)) + now * (0.27 * (e - e1) + 0.24 * e)


class ChallengeController:
    """A controller in the challenge's own interface: update(target_lataccel, current_lataccel, state, future_plan).

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
        self.rows: list[tuple] = []  # target, roll, v, a of the steps it was asked in
        self.lat: list[float] = []
        self.steer, self.integral = np.zeros(MEMORY), np.zeros(1)

    def update(self, target_lataccel: float, current_lataccel: float, state: Any, future_plan: Any) -> float:
        """The steering of this step; state has roll_lataccel, v_ego, a_ego and future_plan lists of those and of
        lataccel. What it returns before step 100 does not count."""
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
        """target, roll, v, a (1, before + 1 + AHEAD) around this step; beyond the plan's end its last value."""
        window = []
        for past, plan in zip(zip(*self.rows[-before - 1 :]), self.plan):
            values = [*past, *plan[:AHEAD]]
            window.append(np.array([values + values[-1:] * (before + 1 + AHEAD - len(values))]))
        return window

    def knowledge(self) -> Knowledge:
        return Knowledge(*self._window(PAST), np.array([self.lat[-MEMORY:]]), self.steer[None], self.integral)

    def target_before(self, rows: np.ndarray) -> np.ndarray:
        """(1, 81) targets of steps 19..99, where the car is as long as no controller counts."""
        return np.array([self.lat])


CONTROLLERS: dict[str, type] = {"pid": PID, "velocity-pid": VelocityPID, "feedforward": FeedForward}


def steer_of(action: np.ndarray, last: np.ndarray, v: np.ndarray, absolute: bool) -> np.ndarray:
    """The steering that an action means, after the steering `last`, at v m/s; all (N,).

    Nobody turns the wheel of a standing car. Here it would have no effect until the car moves off: a policy that is
    never quite zero would drift for as long as it stands, and nothing would tell it so."""
    action = np.asarray(action, np.float64)
    steer = action if absolute else last + MAX_DELTA * np.clip(action, -1, 1) * (v >= STANDING)
    return np.clip(steer, -MAX_STEER, MAX_STEER)


# The environment


class LateralControl(BatchEnv):
    """N cars on segments of the comma controls challenge, steps 100 to 499.

    Action: in "delta" mode one number in [-1, 1], the change of the steering in units of 0.2, of which nothing comes
    while the car stands (below 1 m/s); in "absolute" mode the steering itself, in [-2, 2]. Positive steering and
    positive lateral acceleration are to the same side. Observation: see `observation`.

    With training=False row i plays the segments i, i + N, ... of the split in order (an episode's seed [s, k] means
    segment k), with the official simulator's noise, and the reward sums to minus the official total_cost. With
    training=True segments and noise are random, and the reward is

        -w E[5000 (target - lat)^2 + 10000 (change of lat)^2] / 100,    w = 100 / (100 + jerk_cost of the target itself)

    where w keeps extreme roads from dominating, and the expectation is over what the simulator could have drawn in this
    step: the same on average as the cost of what it drew, but without that draw's noise. The first episode after a
    seeded reset ends at a random step, so that cars are not all in the same phase. An episode's end is always a time
    limit. Its info has lataccel_cost, jerk_cost, total_cost, and score, minus total_cost but at least -200, by which
    policies are chosen.

    Args:
        num_envs: cars, N.
        training, split, render_mode: see BatchEnv.
        action_mode: delta or absolute.
        copies: while training, this many neighbouring rows drive the same segment in the same phase with the same
            noise, so that what differs between them is of their own making (common random numbers).
        model_path: the challenge's tinyphysics.onnx; None for the embedded dynamics.
        data_path: a folder of the challenge's CSV files: by name the first 7/8 train, the rest validate; None for
            synthetic segments.
        test_path: a folder of CSV files for the test split.
        threads: CPU threads of the dynamics.
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
        copies: int = 1,
        model_path: str | None = None,
        data_path: str | None = None,
        test_path: str | None = None,
        threads: int = 1,
        render_mode: str | None = None,
    ):
        if action_mode not in ("delta", "absolute"):
            raise ValueError(f"action_mode must be delta or absolute, not {action_mode!r}")
        if copies < 1:
            raise ValueError(f"copies must be at least 1, not {copies}")
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
        self.upcoming = np.arange(num_envs)  # the segment that the row's next episode is on, with training=False
        self.limit = np.full(num_envs, STEPS)  # steps of the row's episode
        self.staggered = False
        self.uniform, self.lat, self.steer = (np.zeros((num_envs, STEPS)) for _ in range(3))
        self.known_steer, self.integral = np.zeros((num_envs, MEMORY)), np.zeros(num_envs)
        self.window: Window | None = None

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            seeds = seed_of_each(seed, self.num_envs)
            rows = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
            self.upcoming[rows] = np.array([np.ravel(s)[-1] for s in seeds])[rows]
        self.staggered = self.training and seed is not None
        result = super().reset(seed=seed, options=options)
        self.staggered = False
        return result

    def start(self, rows: np.ndarray) -> None:
        segment = self.sim.segment.copy()
        for i in rows:
            leader = i // self.copies * self.copies
            if not self.training:
                segment[i] = self.upcoming[i] % len(self.road.names)
                self.uniform[i] = official_noise(self.road.names[segment[i]])
                continue
            if i == leader:
                segment[i] = self.rngs[i].integers(len(self.road.names))
                self.limit[i] = self.rngs[i].integers(2, STEPS + 1) if self.staggered else STEPS
                self.uniform[i] = self.rngs[i].random(STEPS)
            segment[i], self.limit[i], self.uniform[i] = segment[leader], self.limit[leader], self.uniform[leader]
        self.upcoming[rows] += self.num_envs
        self.sim.start(rows, segment[rows])
        before = self.road.window(segment[rows], np.full(len(rows), FIRST), MEMORY + 1, 2)
        self.known_steer[rows] = estimate_steer(*before[:3])
        target = self.road.target[segment[rows], FIRST]
        self.integral[rows] = leaky(np.zeros(len(rows)), target - self.sim.lat[rows, -1])

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        sim, every = self.sim, np.arange(self.num_envs)
        i, before = sim.t - FIRST, sim.lat[:, -1].copy()
        steer = steer_of(action[:, 0], self.known_steer[:, -1], self.road.v[sim.segment, sim.t], self.absolute)
        lat = sim.step(steer, self.uniform[every, i])
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

    def _costs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The official costs of the episodes that end in these rows, with the official arithmetic."""
        costs = {name: np.zeros(self.num_envs) for name in ("lataccel_cost", "jerk_cost", "total_cost", "score")}
        for i in rows:
            n = self.limit[i]
            target, lat = self.road.target[self.sim.segment[i], FIRST : FIRST + n], self.lat[i, :n]
            costs["lataccel_cost"][i] = np.mean((target - lat) ** 2) * 100
            costs["jerk_cost"][i] = np.mean((np.diff(lat) / DT) ** 2) * 100
        costs["total_cost"] = 50 * costs["lataccel_cost"] + costs["jerk_cost"]
        costs["score"] = -np.minimum(costs["total_cost"], WORST_COST)
        return costs

    def knowledge(self, rows: np.ndarray | None = None) -> Knowledge:
        """What a controller knows of these rows (None: of all)."""
        rows = np.arange(self.num_envs) if rows is None else rows
        window = self.road.window(self.sim.segment[rows], self.sim.t[rows], PAST, AHEAD)
        return Knowledge(*window, self.sim.lat[rows, -MEMORY:], self.known_steer[rows], self.integral[rows])

    def target_before(self, rows: np.ndarray) -> np.ndarray:
        """(n, 81) targets of steps 19..99, where the car is as long as no controller counts."""
        return self.road.target[self.sim.segment[rows], WARM_UP - 1 : FIRST]

    def observe(self, rows: np.ndarray) -> np.ndarray:
        return observation(self.knowledge(rows))

    def render(self) -> np.ndarray | None:
        """Charts of row 0's episode so far; None in human mode, where a window shows them."""
        n, segment = self.sim.t[0] - FIRST, self.sim.segment[0]
        road = {name: getattr(self.road, name)[segment, FIRST : FIRST + n] for name in ("target", "v")}
        lat = [("target", (120, 120, 120), road["target"]), ("actual", (200, 40, 40), self.lat[0, :n])]
        frame = charts(
            [
                (f"lateral acceleration (m/s^2), {self.road.names[segment]}", lat),
                ("steering", [("steer", (30, 90, 200), self.steer[0, :n])]),
                ("speed (m/s)", [("speed", (20, 130, 60), road["v"])]),
            ],
            STEPS,
        )
        if self.render_mode != "human":
            return frame
        self.window = self.window or Window("LateralControl-v0")
        self.window.show(frame)
        return None

    def close_extras(self, **kwargs: Any) -> None:
        if self.window is not None:
            self.window.close()

    def state(self) -> dict[str, np.ndarray]:
        return {
            **{"segment": self.sim.segment, "t": self.sim.t, "sim_lat": self.sim.lat, "sim_steer": self.sim.steer},
            **{"upcoming": self.upcoming, "limit": self.limit, "uniform": self.uniform},
            **{"lat": self.lat, "steer": self.steer, "known_steer": self.known_steer, "integral": self.integral},
            "road": np.array([self.road.checksum]),
        }

    def load_state_dict(self, state: dict) -> np.ndarray:
        if int(state["arrays"]["road"][0]) != self.road.checksum:
            raise UserError("the run used other segments; give data_path the files that it had")
        return super().load_state_dict(state)


class LateralControlEnv(SingleEnv):
    batch_env = LateralControl
