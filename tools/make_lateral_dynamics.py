"""Train the bundled dynamics of LateralControl-v0.

    python tools/make_lateral_dynamics.py                           writes envs/assets/lateral_dynamics.onnx
    python tools/make_lateral_dynamics.py --output other.onnx --seed 1

1. `Cars` simulates cars with tires, a steering motor and gusts; `Drivers` steers them in many ways.
2. `Network` predicts the next lateral acceleration y_t from the last 6 steps, in units of the noise:
       mu_t = y_{t-1} + f(steer, bank, v, a of t-5..t, y of t-6..t-1),    loss = Huber((y_t - mu_t) / sd(v_t))
3. `export` writes it with the inputs and outputs of the challenge's model. The output is logits over 1024 values y_k,
   which the simulator divides by 0.8 before it samples:
       logit_k = -0.4 ((y_k - mu) / sd)^2,    softmax(logit / 0.8)_k ~ exp(-(y_k - mu)^2 / (2 sd^2))

It is derived from the single-track model of textbooks, not from the challenge's model or data.
"""

import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
from envs import UserError
from envs.cli import one_line_errors
from envs.evaluation import rollout
from envs.lateral import CONTROLLERS, EMBEDDED, MAX_JUMP, MAX_STEER
from envs.lateral_model import BINS
from envs.lateral_segments import CONTEXT, DT, SYNTHETIC
from envs.run import write_file

Values = TypeVar("Values", float, np.ndarray, torch.Tensor)

LAGS = 6  # past steps in the input of the network
WILD, TAME = (0.03, 0.1, 0.3, 0.6, 1.2, 2.0, 2.0), (0.03, 0.1)  # amplitudes of steering


@dataclass
class Args:
    seed: int = 0  # seed of cars, roads and network
    cars: int = 1024  # number of simulated cars, each a little different
    steps: int = 500  # steps of 0.1 s per car
    hidden: int = 64  # units of both hidden layers
    epochs: int = 40  # passes over the data
    batch_size: int = 1024  # samples per gradient step
    learning_rate: float = 4e-3  # maximum learning rate of the one-cycle schedule
    threads: int = 1  # CPU threads
    output: str = str(EMBEDDED)  # file of the network


def noise_sd(v: Values) -> Values:
    """Standard deviation of the noise of the lateral acceleration (m/s^2) at speed v (m/s)."""
    return 0.004 + 0.036 * v / 36


class Cars:
    """n single-track (bicycle) models with a steering motor, steered ten times a second.

        m (vy' + v r) = Ff + Fr + m bank             Ff = grip(Cf (delta - (vy + lf r) / v))
        Iz r'         = lf Ff - lr Fr                Fr = grip(Cr (lr r - vy) / v)
        D delta'      = G motor - Ff L / (m lr) - delta V^2 / L

    In the last line the motor acts against the aligning torque of the tires, a damper and a centering spring, all in
    units of lateral acceleration. In a steady bend v r = v^2 / (v^2 + V^2) (G motor + bank).
    """

    substeps = 20
    dead_time = 2  # steps from a command to the motor
    motor_lag = 0.05  # s
    motor_limit = 2.4  # soft saturation of the motor, units of steer
    mass, lf, lr = 1500.0, 1.3, 1.5  # kg, m, m
    gust_tau = 1.5  # s
    white = 0.25  # fraction of the noise variance that is white; the rest are gusts

    def __init__(self, n: int, rng: np.random.Generator):
        def vary(value: float, sd: float) -> np.ndarray:
            return value * np.exp(sd * rng.standard_normal(n))

        self.rng = rng
        self.stiff_front, self.stiff_rear = vary(200e3, 0.05), vary(350e3, 0.05)  # Cf, Cr, N/rad
        self.grip = vary(8.5, 0.05) * self.mass / 2  # N per axle
        self.gain = vary(2.05, 0.03)  # G, m/s^2 per unit of steer
        self.centering = vary(6.0, 0.05)  # V, m/s
        self.damping = vary(10.0, 0.05)  # D, m/s^2 per rad/s
        self.commands = np.zeros((self.dead_time, n))
        self.motor, self.delta, self.vy, self.r, self.gust = np.zeros((5, n))

    def step(self, steer: np.ndarray, bank: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Lateral acceleration (n,), v r and gusts, 0.1 s after the command `steer` (n,)."""
        command, self.commands = self.commands[0], np.concatenate([self.commands[1:], steer[None]])
        command = self.motor_limit * np.tanh(command / self.motor_limit)
        base, h = self.lf + self.lr, DT / self.substeps
        rolling = np.maximum(v, 1.5)  # a standing wheel has no slip angle
        for _ in range(self.substeps):
            self.motor += h * (command - self.motor) / self.motor_lag
            slip_front = self.delta - (self.vy + self.lf * self.r) / rolling
            slip_rear = (self.lr * self.r - self.vy) / rolling
            front = self.grip * np.tanh(self.stiff_front * slip_front / self.grip)
            rear = self.grip * np.tanh(self.stiff_rear * slip_rear / self.grip)
            aligning = front * base / (self.mass * self.lr)
            torque = self.gain * self.motor - aligning - self.delta * self.centering**2 / base
            self.vy += h * ((front + rear) / self.mass + bank - v * self.r)
            self.r += h * (self.lf * front - self.lr * rear) / (self.mass * self.lf * self.lr)  # Iz = m lf lr
            self.delta += h * torque / self.damping
        # With this size of the gusts the best one-step prediction, a Kalman filter, has an error of noise_sd
        variance, keep = noise_sd(v) ** 2, np.exp(-DT / self.gust_tau)
        innovation = (1 - self.white) * (1 - keep**2 * self.white) * variance
        normal = self.rng.standard_normal((2, len(v)))
        self.gust = keep * self.gust + np.sqrt(innovation) * normal[0]
        return v * self.r + self.gust + np.sqrt(self.white * variance) * normal[1]


def roads(n: int, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bank (m/s^2), speed and acceleration, each (steps, n): up to 42 m/s, stops, hard braking, steep banks."""
    bank, v, a = np.zeros((3, steps, n))
    bank[0], v[0] = 0.5 * rng.standard_normal(n), rng.uniform(0, 40, n)
    goal, hilly = v[0].copy(), rng.uniform(0, 0.08, n)
    for t in range(1, steps):
        goal = np.where(rng.random(n) < DT / 10, np.maximum(rng.uniform(-10, 42, n), 0), goal)
        pull = np.clip((goal - v[t - 1]) / 3, -3, 2.5)
        v[t] = np.maximum(v[t - 1] + DT * (0.8 * a[t - 1] + 0.2 * pull + 0.05 * rng.standard_normal(n)), 0)
        a[t] = (v[t] - v[t - 1]) / DT
        bank[t] = 0.995 * bank[t - 1] + hilly * rng.standard_normal(n)
    return np.clip(bank, -2, 2), v, a + 0.06 * rng.standard_normal(a.shape)


class Drivers:
    """n ways of steering, each changed every few seconds."""

    def __init__(self, n: int, rng: np.random.Generator, sizes: tuple[float, ...]):
        self.n, self.rng, self.sizes = n, rng, sizes
        self.kind, self.size, self.level, self.slope, self.count, self.sum = np.zeros((6, n))
        self.period = np.ones(n)

    def steer(self, y: np.ndarray, bank: np.ndarray) -> np.ndarray:
        """Commands (n,) from the last lateral accelerations y (n,)."""
        rng, n = self.rng, self.n
        new = rng.random(n) < DT / 4
        self.kind = np.where(new, rng.integers(0, 8, n), self.kind)
        self.size = np.where(new, rng.choice(self.sizes, n), self.size)
        self.level = np.where(new, self.size * rng.standard_normal(n), self.level)
        self.slope = np.where(new, 0.1 * self.size * rng.standard_normal(n), self.slope)
        self.period = np.where(new, rng.integers(1, 7, n), self.period)
        self.count = np.where(new, 0, self.count + 1)
        error = self.level - y
        self.sum = np.where(new, 0, np.clip(self.sum + error, -20, 20))
        normal, sign = rng.standard_normal(n), np.where(self.count // self.period % 2, 1, -1)
        manners = [
            self.level,
            self.level + self.slope * np.minimum(self.count, 15),
            0.5 * self.level + self.size * normal,
            0.5 * self.level + self.size * sign,  # square wave, at its fastest a new sign each step
            self.size * rng.choice([-1, 1], n),
            self.size * np.sin(1.3 * self.count / self.period),
            0.2 * error + 0.1 * self.sum + 0.02 * normal,  # PI feedback
            0.5 * (self.level - bank) + self.size * (0.4 * error + 0.05 * normal),  # feed-forward and eager feedback
        ]
        return np.clip(np.choose(self.kind.astype(int), manners), -MAX_STEER, MAX_STEER)


def drive(args: Args, rng: np.random.Generator, wild: bool) -> tuple[torch.Tensor, ...]:
    """Samples for the network: states (m, LAGS, 4), lateral accelerations before (m, LAGS) and next (m,)."""
    cars, drivers = Cars(args.cars, rng), Drivers(args.cars, rng, WILD if wild else TAME)
    bank, v, a = roads(args.cars, args.steps, rng)
    steer, y, seen = np.zeros((3, args.steps, args.cars))
    foreseeable = np.ones((args.steps, args.cars), bool)
    for t in range(1, args.steps):
        # Rare disturbances, which are not predicted, give samples far from the usual states
        shoved = (rng.random(args.cars) < DT / 30) & wild
        cars.gust += shoved * 2.5 * rng.standard_normal(args.cars)
        foreseeable[t] = ~shoved
        steer[t] = drivers.steer(seen[t - 1], bank[t])
        y[t] = np.clip(cars.step(steer[t], bank[t], v[t]), BINS[0], BINS[-1])
        seen[t] = np.clip(y[t], seen[t - 1] - MAX_JUMP, seen[t - 1] + MAX_JUMP)
    width = BINS[1] - BINS[0]
    seen = BINS[0] + width * np.round((seen - BINS[0]) / width)
    states = np.stack([steer, bank, v, a], axis=-1)
    samples = range(CONTEXT, args.steps)
    past = np.concatenate([states[t - LAGS + 1 : t + 1].swapaxes(0, 1) for t in samples])
    before = np.concatenate([seen[t - LAGS : t].T for t in samples])
    keep = foreseeable[CONTEXT:].ravel()
    return tuple(torch.tensor(x[keep], dtype=torch.float32) for x in (past, before, y[CONTEXT:].ravel()))


class Network(nn.Module):
    """Predicts the next lateral acceleration."""

    def __init__(self, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(5 * LAGS, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        )
        self.register_buffer("bins", torch.tensor(BINS, dtype=torch.float32))

    def mean(self, past: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """past: (b, LAGS, 4), before: (b, LAGS) -> mu (b,)."""
        steer, bank, v, a = past.unbind(2)
        answer = v**2 / (v**2 + 36)  # a standing car does not respond
        last = before[:, -1:]
        inputs = [2 * steer * answer, 2 * bank * answer, v / 10 - 2, a, 5 * (before[:, :-1] - last), last]
        return (last + 0.1 * self.net(torch.cat(inputs, dim=1))).clamp(-5, 5)[:, 0]

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """states: (b, 20, 4), tokens: (b, 20) -> logits (b, 1, 1024)."""
        mu = self.mean(states[:, -LAGS:], self.bins[tokens[:, -LAGS:]])
        sd = noise_sd(states[:, -1, 2])
        return (-0.4 * ((self.bins - mu[:, None]) / sd[:, None]) ** 2).unsqueeze(1)


def train(args: Args, data: tuple[torch.Tensor, ...]) -> Network:
    """Minimize the Huber loss of the errors in units of the noise, which limits the influence of wild steering."""
    network = Network(args.hidden)
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate)
    batches = len(data[0]) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.epochs * batches)
    for _ in range(args.epochs):
        for indices in torch.randperm(len(data[0]))[: batches * args.batch_size].view(batches, -1):
            past, before, after = (x[indices] for x in data)
            sd = noise_sd(past[:, -1, 2])
            loss = nn.functional.huber_loss(network.mean(past, before) / sd, after / sd, delta=2.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return network


def export(network: Network, path: Path) -> None:
    """Write an ONNX file with inputs states, tokens, output `output` and any batch size."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    example = (torch.zeros(2, CONTEXT, 4), torch.zeros(2, CONTEXT, dtype=torch.int64))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            example,
            input_names=["states", "tokens"],
            output_names=["output"],
            dynamic_shapes=({0: batch}, {0: batch}),
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for part in [model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]:
        part.ClearField("metadata_props")  # source lines of the exporter, half of the file
    write_file(path, model.SerializeToString())


def report(path: Path, network: Network, unseen: tuple[torch.Tensor, ...]) -> None:
    """Print the one-step error for cars that were not trained on, and the costs of the scripted controllers."""
    past, before, after = unseen
    with torch.no_grad():
        rmse = (after - network.mean(past, before)).square().mean().sqrt().item()
    floor = noise_sd(past[:, -1, 2]).square().mean().sqrt().item()
    print(f"one-step RMSE {rmse:.4f} m/s^2, noise {floor:.4f} m/s^2")
    episodes = SYNTHETIC["test"]
    for name, controller in CONTROLLERS.items():
        options = {"training": False, "split": "test", "model_path": str(path), **controller.env_kwargs}
        vec = envs.make_vec("LateralControl-v0", episodes, **options)
        costs = [result["total_cost"] for result in rollout(controller(), vec, episodes, seed=0)]
        print(f"{name}: mean total_cost {np.mean(costs):.1f}, median {np.median(costs):.1f}")


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        path = Path(args.output)
        if not path.parent.is_dir():
            raise UserError(f"{path.parent}: no such folder; choose another --output")
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        begin = time.perf_counter()
        data = drive(args, np.random.default_rng([args.seed, 0]), wild=True)
        network = train(args, data)
        export(network, path)
        print(f"{path} from {len(data[0])} samples in {time.perf_counter() - begin:.0f} s")
        report(path, network, drive(args, np.random.default_rng([args.seed, 1]), wild=False))


if __name__ == "__main__":
    main()
