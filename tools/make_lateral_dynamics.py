"""Make the dynamics that LateralControl-v0 uses when no other file is given.

    python tools/make_lateral_dynamics.py                        writes envs/assets/lateral_dynamics.onnx and a report
    python tools/make_lateral_dynamics.py --output other.onnx --seed 1

1. `Cars` simulates cars with tyres, a steering motor and a bumpy road, driven in every manner: tame, wild, standing.
2. `Dynamics`, a small network, learns to foresee a car's next lateral acceleration y_t from its last 6 steps:
       y_t ~ N(mu, sd^2),  mu = y_{t-1} + f(steer, bank, speed, acceleration, y),  loss = log sd + (y_t - mu)^2 / (2 sd^2)
3. It is written with the inputs and the output of the comma controls challenge, logits over 1024 values of y, so that
   either file fits the simulator. Sampling divides logits by 0.8, which makes the written ones a normal distribution:
       logit_k = -0.4 ((y_k - mu) / sd)^2,   softmax(logit / 0.8) ~ exp(-(y_k - mu)^2 / (2 sd^2))

All is made here from the textbook's single-track model; no weights and no data of the challenge have a part in it.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from envs.lateral_segments import CONTEXT, DT, FIRST, LAST, SYNTHETIC, Segment, synthetic

LAGS = 6  # steps that the network looks back
BINS = np.linspace(-5, 5, 1024)  # m/s^2, the values that lateral acceleration may take
MAX_CHANGE = 0.5  # m/s^2 per step, the simulator's limit


@dataclass
class Args:
    seed: int = 0
    """seed of the cars, of what they meet and of the network"""
    cars: int = 1024
    """simulated cars, each a little different"""
    steps: int = 500
    """steps of 0.1 s that each car drives"""
    hidden: int = 64
    """units of each of the two hidden layers"""
    epochs: int = 30
    """passes over the data"""
    batch_size: int = 1024
    """samples per gradient step"""
    learning_rate: float = 4e-3
    """initial learning rate of Adam, annealed to 0"""
    threads: int = 1
    """CPU threads"""
    output: Path = ROOT / "envs" / "assets" / "lateral_dynamics.onnx"
    """where to write the network"""


def noise_sd(v: np.ndarray) -> np.ndarray:
    """Sd (m/s^2) of what cannot be foreseen of the next lateral acceleration: a fast car is shaken more."""
    return 0.003 + 0.037 * v / 36


class Cars:
    """n single-track (bicycle) models with a steering motor, steered ten times a second.

        m (vy' + v r) = Ff + Fr + m bank           Ff = grip(Cf (delta - (vy + lf r) / v))
        Iz r'         = lf Ff - lr Fr              Fr = grip(-Cr (vy - lr r) / v)
        D delta'      = G motor - Ff L / (m lr) - (V^2 / L) delta

    In the last line the motor works against the tyres' aligning torque, a damper and a centring spring, all in units of
    lateral acceleration. In a steady bend lateral acceleration = v r = v^2 / (v^2 + V^2) (G motor + bank): G at speed,
    less when slow, nothing when standing.
    """

    substeps = 20
    dead_time = 2  # steps from a command to the motor
    motor_lag = 0.05  # s
    motor_limit = 2.4  # the motor saturates softly here, units of steer
    mass, lf, lr = 1500.0, 1.3, 1.5  # kg, m, m
    gust_tau = 2.0  # s
    white = 0.2  # share of the unforeseeable variance that does not last

    def __init__(self, n: int, rng: np.random.Generator):
        def vary(value: float, sd: float) -> np.ndarray:
            return value * np.exp(sd * rng.standard_normal(n))

        self.rng = rng
        self.stiff_front, self.stiff_rear = vary(200e3, 0.05), vary(350e3, 0.05)  # N/rad
        self.grip = vary(8.5, 0.05) * self.mass / 2  # N per axle
        self.gain = vary(2.05, 0.03)  # G, m/s^2 per unit of steer
        self.centring = vary(6.0, 0.05)  # V, m/s
        self.damping = vary(10.0, 0.05)  # D, m/s^2 per rad/s
        self.commands = np.zeros((self.dead_time, n))
        self.motor, self.delta, self.vy, self.r, self.gust = np.zeros((5, n))

    def step(self, steer: np.ndarray, bank: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Lateral acceleration (n,) that is measured 0.1 s after the command `steer`."""
        command, self.commands = self.commands[0], np.concatenate([self.commands[1:], steer[None]])
        command = self.motor_limit * np.tanh(command / self.motor_limit)
        base, h = self.lf + self.lr, DT / self.substeps
        rolling = np.maximum(v, 1.5)  # slip angles are undefined at rest
        for _ in range(self.substeps):
            self.motor += h * (command - self.motor) / self.motor_lag
            slip_front = self.delta - (self.vy + self.lf * self.r) / rolling
            slip_rear = -(self.vy - self.lr * self.r) / rolling
            front = self.grip * np.tanh(self.stiff_front * slip_front / self.grip)
            rear = self.grip * np.tanh(self.stiff_rear * slip_rear / self.grip)
            aligning = front * base / (self.mass * self.lr)
            torque = self.gain * self.motor - aligning - self.centring**2 / base * self.delta
            self.vy += h * ((front + rear) / self.mass + bank - v * self.r)
            self.r += h * (self.lf * front - self.lr * rear) / (self.mass * self.lf * self.lr)  # Iz = m lf lr
            self.delta += h * torque / self.damping
        # The gusts' innovation is such that the best one-step forecast (a steady Kalman filter) errs by noise_sd
        variance, keep = noise_sd(v) ** 2, np.exp(-DT / self.gust_tau)
        innovation = (1 - self.white) * (1 - keep**2 * self.white) * variance
        normal = self.rng.standard_normal((2, len(v)))
        self.gust = keep * self.gust + np.sqrt(innovation) * normal[0]
        return v * self.r + self.gust + np.sqrt(self.white * variance) * normal[1]


def surroundings(n: int, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bank (m/s^2), speed and acceleration (steps, n): any speed up to 42 m/s, stops, hard braking, steep banks."""
    bank, v, a = np.zeros((3, steps, n))
    bank[0], v[0] = 0.5 * rng.standard_normal(n), rng.uniform(0, 40, n)
    goal, hilly = v[0].copy(), rng.uniform(0, 0.15, n)
    for t in range(1, steps):
        renew = rng.random(n) < DT / 10
        goal = np.where(renew, np.maximum(rng.uniform(-10, 42, n), 0), goal)
        wish = np.clip((goal - v[t - 1]) / 3, -3, 2.5) * (rng.random(n) < 0.9)
        v[t] = np.maximum(v[t - 1] + DT * (0.8 * a[t - 1] + 0.2 * wish + 0.05 * rng.standard_normal(n)), 0)
        a[t] = (v[t] - v[t - 1]) / DT
        bank[t] = bank[t - 1] * 0.995 + hilly * rng.standard_normal(n) * 0.5
    return np.clip(bank, -2, 2), v, a + 0.05 * rng.standard_normal(a.shape)


class Drivers:
    """n ways to steer, each changed every few seconds, so that no controller finds a manner the network never saw."""

    def __init__(self, n: int, rng: np.random.Generator):
        self.rng, self.n = rng, n
        self.kind, self.size, self.level, self.slope, self.count, self.sum = np.zeros((6, n))
        self.period = np.ones(n)

    def steer(self, y: np.ndarray, bank: np.ndarray) -> np.ndarray:
        """Commands in [-2, 2] from the lateral acceleration y (n,) measured last."""
        rng, n = self.rng, self.n
        new = rng.random(n) < DT / 4
        self.kind = np.where(new, rng.integers(0, 8, n), self.kind)
        self.size = np.where(new, rng.choice([0.03, 0.1, 0.3, 0.6, 1.2, 2.0, 2.0], n), self.size)
        self.level = np.where(new, self.size * rng.standard_normal(n), self.level)
        self.slope = np.where(new, 0.1 * self.size * rng.standard_normal(n), self.slope)
        self.period = np.where(new, rng.integers(1, 7, n), self.period)
        self.count = np.where(new, 0, self.count + 1)
        error = self.level - y
        self.sum = np.where(new, 0, np.clip(self.sum + error, -20, 20))
        normal = rng.standard_normal(n)
        ways = [
            self.level,  # step
            self.level + self.slope * np.minimum(self.count, 15),  # ramp
            0.5 * self.level + self.size * normal,  # white noise
            0.5 * self.level
            + self.size * np.where(self.count // self.period % 2, 1, -1),  # square wave, down to one step
            self.size * rng.choice([-1, 1], n),  # random signs
            self.size * np.sin(self.count * 1.3 / self.period),  # sine
            0.2 * error + 0.1 * self.sum + 0.02 * normal,  # feedback, gentle
            (self.level - bank) * 0.5 + 0.4 * error * self.size + 0.05 * normal * self.size,  # feedforward, eager
        ]
        return np.clip(np.choose(self.kind.astype(int), ways), -2, 2)


def drive(args: Args, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples for the network: states (m, LAGS, 4), lateral accelerations before (m, LAGS) and next (m,)."""
    cars, drivers = Cars(args.cars, rng), Drivers(args.cars, rng)
    bank, v, a = surroundings(args.cars, args.steps, rng)
    steer, y, car, keep = np.zeros((4, args.steps, args.cars))
    for t in range(1, args.steps):
        shove = rng.random(args.cars) < DT / 30
        cars.gust += shove * 2.5 * rng.standard_normal(args.cars)
        steer[t] = drivers.steer(y[t - 1], bank[t])
        car[t] = np.clip(cars.step(steer[t], bank[t], v[t]), -5, 5)
        y[t] = np.clip(car[t], y[t - 1] - MAX_CHANGE, y[t - 1] + MAX_CHANGE)  # what the simulator would record
        keep[t] = ~shove
    states = np.stack([steer, bank, v, a], axis=-1)
    seen = BINS[0] + np.round((y - BINS[0]) / (BINS[1] - BINS[0])) * (BINS[1] - BINS[0])  # to the nearest bin
    samples = range(CONTEXT, args.steps)
    keep = np.concatenate([keep[t] for t in samples]).astype(bool)
    past = np.concatenate([states[t - LAGS + 1 : t + 1].swapaxes(0, 1) for t in samples])[keep]
    before = np.concatenate([seen[t - LAGS : t].T for t in samples])[keep]
    after = np.concatenate([car[t] for t in samples])[keep]
    return tuple(torch.tensor(x, dtype=torch.float32) for x in (past, before, after))


class Dynamics(nn.Module):
    """mu and sd of the next lateral acceleration, and the logits that the simulator samples from."""

    def __init__(self, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(5 * LAGS, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        )
        self.register_buffer("bins", torch.tensor(BINS, dtype=torch.float32))

    def moments(self, past: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """past: (b, LAGS, 4), before: (b, LAGS) -> mu, log sd (b, 1)."""
        steer, bank, v, a = past.unbind(2)
        answer = v**2 / (v**2 + 36)  # neither steering nor bank moves a car that stands
        last = before[:, -1:]
        history = torch.cat([5 * (before[:, :-1] - last), last], dim=1)
        features = torch.cat([2 * steer * answer, 2 * bank * answer, v / 10 - 2, a, history], dim=1)
        return (last + 0.1 * self.net(features)).clamp(-5, 5), noise_sd(v[:, -1:])

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """states: (b, 20, 4), tokens: (b, 20) -> logits of the next token (b, 1, 1024)."""
        mu, sd = self.moments(states[:, -LAGS:], self.bins[tokens[:, -LAGS:]])
        return (-0.4 * ((self.bins - mu) / sd) ** 2).unsqueeze(1)


def train(args: Args, data: tuple[torch.Tensor, ...]) -> Dynamics:
    """Maximum likelihood by Adam."""
    model = Dynamics(args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate)
    batches = len(data[0]) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.epochs * batches)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(data[0]))[: batches * args.batch_size].view(batches, -1):
            past, before, after = (x[rows] for x in data)
            mu, sd = model.moments(past, before)
            loss = nn.functional.huber_loss(mu / sd, after[:, None] / sd, delta=2.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


def export(model: Dynamics, path: Path) -> None:
    """Write an ONNX file whose batch size is free."""
    example = (torch.zeros(2, CONTEXT, 4), torch.zeros(2, CONTEXT, dtype=torch.int64))
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model.eval(),
        example,
        path,
        input_names=["states", "tokens"],
        output_names=["output"],
        dynamic_shapes=({0: batch}, {0: batch}),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


class Simulator:
    """The loop of the challenge's simulator over many segments at once, for the report."""

    def __init__(self, path: Path, segments: list[Segment]):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.segments = segments
        rows = min(len(segment.target) for segment in segments)
        self.target, self.roll, self.v, self.a = (
            np.stack([getattr(segment, name)[:rows] for segment in segments]) for name in ("target", "roll", "v", "a")
        )
        self.logged = np.stack([segment.steer for segment in segments])
        seeds = [int(hashlib.md5(f"data/{segment.name}".encode()).hexdigest(), 16) % 10**4 for segment in segments]
        self.uniforms = np.stack([np.random.RandomState(seed).random_sample(LAST) for seed in seeds])

    def forecast(self, steer: np.ndarray, y: np.ndarray, t: int) -> np.ndarray:
        """Cumulative probabilities (n, 1024) of the lateral acceleration at step t."""
        window = slice(t - CONTEXT + 1, t + 1)
        states = np.stack([steer[:, window], self.roll[:, window], self.v[:, window], self.a[:, window]], axis=-1)
        tokens = np.digitize(np.clip(y[:, t - CONTEXT : t], -5, 5), BINS, right=True)
        logits = self.session.run(None, {"states": states.astype(np.float32), "tokens": tokens})[0][:, -1] / 0.8
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
        return cumulative / cumulative[:, -1:]

    def run(self, controller: Callable) -> np.ndarray:
        """Total cost (n,) of controller(t, y, steer) -> steer (n,)."""
        y, steer = self.target[:, :LAST].copy(), np.zeros_like(self.target[:, :LAST])
        steer[:, :FIRST] = self.logged
        for t in range(CONTEXT, LAST):
            action = np.clip(controller(t, y, steer), -2, 2)
            if t < FIRST:  # the log drives; what the car would do is thrown away
                continue
            steer[:, t] = action
            drawn = BINS[(self.forecast(steer, y, t) <= self.uniforms[:, t - CONTEXT, None]).sum(axis=1)]
            y[:, t] = np.clip(drawn, y[:, t - 1] - MAX_CHANGE, y[:, t - 1] + MAX_CHANGE)
        error, jerk = (
            (self.target - np.pad(y, ((0, 0), (0, self.target.shape[1] - LAST))))[:, FIRST:LAST],
            np.diff(y[:, FIRST:], axis=1) / DT,
        )
        return 50 * 100 * (error**2).mean(axis=1) + 100 * (jerk**2).mean(axis=1)

    def pid(self) -> Callable:
        """The challenge's PID, which is also called while the log drives."""
        total, last = np.zeros((2, len(self.segments)))

        def control(t: int, y: np.ndarray, steer: np.ndarray) -> np.ndarray:
            nonlocal total, last
            error = self.target[:, t] - y[:, t - 1]
            total, change, last = total + error, error - last, error
            return 0.195 * error + 0.1 * total - 0.053 * change

        return control

    def expert(self) -> Callable:
        """Feed-forward of the target and the bank 3 steps ahead, and a PI controller in velocity form."""
        kernel = 0.5 ** np.abs(np.arange(-6, 7))
        padded = np.pad(self.target, ((0, 0), (6, 6)), mode="edge")
        smooth = np.stack([np.convolve(row, kernel / kernel.sum(), mode="valid") for row in padded])

        def control(t: int, y: np.ndarray, steer: np.ndarray) -> np.ndarray:
            ahead = np.diff(smooth[:, t + 2 : t + 4] - self.roll[:, t + 2 : t + 4], axis=1)[:, 0]
            error, before = smooth[:, t] - y[:, t - 1], smooth[:, t - 1] - y[:, t - 2]
            return steer[:, t - 1] + 0.4 * ahead + 0.1 * (error - before) + 0.1 * error

        return control


def report(path: Path, model: Dynamics, data: tuple[torch.Tensor, ...]) -> None:
    """Print how well the network foresees cars that it never saw, and how hard the task is that it makes."""
    with torch.no_grad():
        mu, _ = model.moments(*data[:2])
    error, v = (data[2] - mu[:, 0]).numpy(), data[0][:, -1, 2].numpy()
    floor = noise_sd(v)
    print(f"{path.stat().st_size / 1024:.0f} KB, {sum(p.numel() for p in model.parameters())} parameters")
    print(f"one-step rmse {np.sqrt((error**2).mean()):.4f}, noise floor {np.sqrt((floor**2).mean()):.4f} m/s^2")
    for low in range(0, 40, 5):
        m = (v >= low) & (v < low + 5)
        print(
            f"  {low:2d}-{low + 5} m/s: rmse {np.sqrt((error[m] ** 2).mean()):.4f}, median |e| x 1.48 "
            f"{1.48 * np.median(np.abs(error[m])):.4f}, floor {floor[m].mean():.4f}"
        )
    for v0 in (0, 5, 10, 15, 20, 25, 30, 35):
        print(f"  step response at {v0} m/s: " + " ".join(f"{x:.2f}" for x in step_response(model, v0)))
    simulator = Simulator(path, synthetic("test", SYNTHETIC["test"]))
    for name, controller in (("PID", simulator.pid()), ("expert", simulator.expert())):
        cost = simulator.run(controller)
        print(f"{name} on the synthetic test split: mean {cost.mean():.1f}, median {np.median(cost):.1f}")


def step_response(model: Dynamics, v: float, size: float = 0.2, steps: int = 20) -> np.ndarray:
    """Gain (m/s^2 per unit of steer) at each step after a step of steer, without noise; the last is the steady one."""
    past, y = torch.zeros(1, 100 + steps, 4), torch.zeros(1, 100 + steps)
    past[:, :, 2] = v
    past[:, 100:, 0] = size
    with torch.no_grad():
        for t in range(LAGS, 100 + steps):
            y[:, t] = model.moments(past[:, t - LAGS + 1 : t + 1], y[:, t - LAGS : t])[0]
    return ((y[0, 100:] - y[0, 99]) / size).numpy()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    data, unseen = (drive(args, np.random.default_rng([args.seed, part])) for part in range(2))
    print(f"{len(data[0])} samples in {time.perf_counter() - begin:.0f} s")
    model = train(args, data)
    export(model, args.output)
    print(f"{args.output} after {time.perf_counter() - begin:.0f} s")
    report(args.output, model, unseen)


if __name__ == "__main__":
    main()
