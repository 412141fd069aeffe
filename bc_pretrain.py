"""Behavioural cloning, in one file: an expert's demonstrations, and a network that imitates them.

Demonstrations are pairs (obs_t, action_t) of the same step. The network is the policy of the environment's PPO script,
so that PPO can go on from the clone, and cloning is regression on it:

    minimise E[|mu(obs) - action|^2]        or, with --loss nll,        -E[log pi(action | obs)]

The critic learns beside it what the expert's actions led to, G_t = r_t + gamma G_t+1. An expert that never errs never
shows how to come back. With --action-noise it is disturbed while it drives, and what is recorded is still the action
that it meant; with --dagger a clone drives every other row, and the expert says what it would have done (Ross et al.
2011).

  expert     python ppo_continuous.py --env-id Ballbot-v0
  collect    python bc_pretrain.py collect --policy runs/<run> --dataset ballbot --action-noise 0.1
  look       python bc_pretrain.py validate ballbot;   python bc_pretrain.py inspect ballbot --episode 3 --render human
  clone      python bc_pretrain.py train --dataset ballbot
  fine-tune  python ppo_continuous.py --env-id Ballbot-v0 --pretrained runs/<run> --freeze-normalizer --critic-warmup 3
  compare    python tools/compare_runs.py --baseline runs/<run> ... --pretrained runs/<run> ... --criterion ...
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import ceil, log, pi, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gymnasium.spaces import Dict
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

import envs
from envs import command, demonstrations, ranks, rollout, run
from envs.demonstrations import Demonstrations, Writer, named
from envs.files import UserError
from envs.rollout import Deployed, Policy
from envs.socnav import GOAL_RANGE, PEDESTRIAN_RANGE, PEDESTRIAN_SPEED


@dataclass
class CollectArgs:
    dataset: str
    """name of the demonstrations: runs/datasets/NAME.npz and, beside it, NAME.json that says where they are from"""
    policy: str = "feedforward"
    """the expert: a policy file, a run (its best.pt), a scripted controller of the environment or PATH.onnx"""
    env_id: str | None = None
    """environment to play; if not given, that of the policy file, or else LateralControl-v0"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..., on top of those that the policy was trained with"""
    episodes: int = 200
    """episodes in all, shared out over the seeds"""
    seeds: tuple[int, ...] = (42,)
    """seeds of the episodes and of the noise"""
    only_successes: bool = False
    """leave out the episodes that did not succeed"""
    action_noise: float = 0.0
    """standard deviation of the noise on the expert's actions, as a share of half their range; 0.05 is usual"""
    dagger: str | None = None
    """a policy file or run that drives in every other row, while the expert says what it would have done"""
    threads: int = 1
    """CPU threads of our simulators"""
    run_root: str = "runs"
    """directory that holds the runs and datasets/"""


@dataclass
class ValidateArgs:
    dataset: tyro.conf.Positional[str]
    """name of the demonstrations; ends with status 1 if something is wrong with them"""
    env_id: str | None = None
    """their environment, needed only where a module of yours has it: MODULE:ID"""
    run_root: str = "runs"
    """directory that holds the runs and datasets/"""


@dataclass
class InspectArgs:
    dataset: tyro.conf.Positional[str]
    """name of the demonstrations"""
    episode: int | None = None
    """one of them, from 0"""
    video: bool = False
    """with --episode: play it again and record it beside the demonstrations"""
    render: Literal["human"] | None = None
    """with --episode: play it again in a window"""
    env_id: str | None = None
    """their environment, needed only where a module of yours has it: MODULE:ID"""
    run_root: str = "runs"
    """directory that holds the runs and datasets/"""


@dataclass
class Args:
    dataset: str
    """name of the demonstrations that collect recorded, or the path of their .npz"""
    env_id: str | None = None
    """environment to clone for, if not the one that the demonstrations are from"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, on top of those that the demonstrations were recorded with"""
    eval_env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments for evaluation only, on top of --env-kwargs"""
    seed: int = 1
    """seed of the network, the minibatch order and the split into training and validation episodes"""
    loss: Literal["mse", "nll"] = "mse"
    """mse: squared error of the mean action; nll: negative log-likelihood, which also learns the standard deviation"""
    epochs: int = 40
    """passes over the demonstrations, at most"""
    patience: int = 8
    """stop after so many epochs without a smaller validation loss"""
    validation_share: float = 0.1
    """share of the episodes that training does not see"""
    minibatch_size: int = 256
    """pairs per gradient step"""
    learning_rate: float = 1e-3
    """learning rate of Adam, lowered linearly to zero"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW); 0 is Adam"""
    critic: bool = True
    """also train the critic, on what the expert's actions led to"""
    gamma: float | None = None
    """discount factor of the critic's targets, as in the PPO run to come; as tuned if not given"""
    norm_obs: bool | None = None
    """normalise observations by their mean and standard deviation, as the PPO run to come; as tuned if not given"""
    init_log_std: float = -0.5
    """logarithm of the policy's standard deviation, which mse leaves as it is"""
    hidden_sizes: tuple[int, ...] | None = None
    """units in the hidden layers, as in the PPO run to come; as tuned if not given"""
    grid_encoder: Literal["rays", "cnn"] = "rays"
    """what reads a grid: a fixed table of rays (fast), or a convolutional network (the published design)"""
    rays: int = 36
    """with rays: ranges read from each plane of obstacles, an even number"""
    cnn_channels: tuple[int, ...] = (8, 16, 16)
    """with cnn: channels of its three layers; 32 64 64 is the published size, for a GPU"""
    people: int = 8
    """nearest pedestrians that the policy looks at"""
    set_units: int = 16
    """units of the network that looks at each of them"""
    threads: int = 1
    """CPU threads of our simulators; PyTorch keeps to one, with which networks this small are fastest"""
    eval_episodes: int | None = None
    """episodes of the evaluation in closed loop; 0 for all, where a split has a fixed number; as tuned if not given"""
    eval_seed: int = 1
    """seed of the evaluation episodes"""
    run_root: str = "runs"
    """directory that holds the runs and datasets/"""
    run_name: str | None = None
    """name of the run's directory instead of <script>__<environment>__seed<seed>__<time>"""
    track: bool = False
    """also log to Weights & Biases (offline without a login)"""
    capture_video: bool = False
    """record the first episode of the evaluation as videos/*.mp4"""


# What is not given: {environment: settings as its PPO run has them}, and those of all other environments
TUNED: dict[str, dict] = {
    "LateralControl-v0": {"gamma": 0.9, "norm_obs": False, "eval_episodes": 0},
    "Ballbot-v0": {"gamma": 0.998, "eval_episodes": 72},
    "BallbotDepth-v0": {"gamma": 0.998, "eval_episodes": 72},
    "SocNavGrid-v0": {"norm_obs": False, "hidden_sizes": (96, 96)},
}
UNTUNED = {"gamma": 0.99, "norm_obs": True, "hidden_sizes": (64, 64), "eval_episodes": 100}
# Settings that say what network a policy is, and those of one that looks at a grid
NETWORK = ("norm_obs", "init_log_std", "hidden_sizes")
SIGHT = ("grid_encoder", "rays", "cnn_channels", "people", "set_units")


class Normalizer(nn.Module):
    """Shifts and scales by a running mean and variance. They are buffers: the state_dict, the policy files and the ONNX
    file contain them, and they stand still unless update is called."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge a batch's mean and variance into the running ones (Chan et al. 1979); x: (batch, *shape)."""
        n, total = len(x), self.count + len(x)
        var, mean = torch.var_mean(x, dim=0, correction=0)
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.add_(n)


class VectorNormalizer(Normalizer):
    """Normalises the first part of a row (robot, goal, ranges); pedestrians and cells have their scale."""

    def __init__(self, sizes: list[int]):
        super().__init__((sum(sizes),))
        self.size = sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)[..., : self.size], x[..., self.size :]], dim=-1)

    def update(self, x: Tensor) -> None:
        super().update(ranks.joined(x))  # what all processes have seen, if several train together


def mlp(sizes: list[int], gain: float) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights, scaled by `gain` in the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layer = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(layer.weight, sqrt(2))
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    nn.init.orthogonal_(layer.weight, gain)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """A Gaussian policy and a value function; every method takes raw observations (..., obs_dim)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, args: Args):
        super().__init__()
        self.normalizer = Normalizer((obs_dim,)) if args.norm_obs else nn.Identity()
        self.actor = mlp([obs_dim, *args.hidden_sizes, len(low)], gain=0.01)  # starts near zero
        self.critic = mlp([obs_dim, *args.hidden_sizes, 1], gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.init_log_std))
        self.weights = list(self.parameters())  # listed once: to search the modules takes 3 % of a gradient step
        self.register_buffer("center", torch.as_tensor((high + low) / 2))
        self.register_buffer("scale", torch.as_tensor((high - low) / 2))

    def forward(self, obs: Tensor) -> Tensor:
        """The deployed policy: the most likely action, inside the environment's bounds."""
        return self.bounded(self.mean(obs))

    def mean(self, obs: Tensor) -> Tensor:
        """The middle of the Gaussian (..., action_dim)."""
        return self.actor(self.normalizer(obs))

    def bounded(self, action: Tensor) -> Tensor:
        """The Gaussian's own units, where [-1, 1] is the whole range, to the environment's, inside its bounds."""
        return self.center + self.scale * action.clamp(-1, 1)

    def sample(self, obs: Tensor) -> Tensor:
        mean = self.mean(obs)
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.normalizer(obs)).squeeze(-1)

    def evaluate_actions(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi(action | obs) (...), the policy's entropy () and V(obs) (...)."""
        obs = self.normalizer(obs)
        # log N(a; mu, sigma) = -z^2 / 2 - log sigma - log(2 pi) / 2 with z = (a - mu) / sigma, summed over components
        z = (action - self.actor(obs)) / self.log_std.exp()
        log_scale = (self.log_std + 0.5 * log(2 * pi)).sum()
        logprob = -0.5 * z.square().sum(-1) - log_scale
        entropy = log_scale + 0.5 * len(self.log_std)
        return logprob, entropy, self.critic(obs).squeeze(-1)


def make_agent(vec: VectorEnv, args: Args) -> Agent:
    space = vec.single_action_space
    return Agent(vec.single_observation_space.shape[0], space.low, space.high, args)


class Encoder(nn.Module):
    """What actor and critic, each with one of its own, make of a row (..., obs_dim) that GridAgent.see has written."""

    def __init__(self, agent: "GridAgent", args: Args):
        super().__init__()
        self.sizes, self.planes, self.size = agent.sizes, agent.planes, agent.size
        units = args.set_units
        self.person = nn.Sequential(nn.Linear(PERSON, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU())
        features = self.sizes[0] + 2 * units
        if args.grid_encoder == "cnn":
            layers, channels = [], len(self.planes)
            for out, kernel in zip(args.cnn_channels, (5, 3, 3)):
                layers += [nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
                channels = out
            self.cnn = nn.Sequential(*layers, nn.Flatten())
            features += self.cnn(torch.zeros(1, len(self.planes), self.size, self.size)).shape[1]
        self.features = features

    def forward(self, row: Tensor) -> Tensor:
        vector, people, cells = row.split(self.sizes, dim=-1)
        people = people.unflatten(-1, (-1, PERSON))
        # A set has no order: the same for each, then the largest and the sum; those who are not there count nothing
        each = self.person(people) * people[..., -1:]
        parts = [vector, each.max(-2).values, each.sum(-2)]
        if cells.shape[-1]:
            images = unpack(cells.unflatten(-1, (len(self.planes), self.size, -1)), self.size).flatten(0, -4)
            parts.append(self.cnn(images).reshape(*row.shape[:-1], -1))
        return torch.cat(parts, dim=-1)


def pack(cells: Tensor) -> Tensor:
    """Rows of 0 and 1 (..., size), eight cells to a number from 0 to 255: (..., size / 8). A rollout keeps a grid that
    way."""
    cells = nn.functional.pad(cells, (0, -cells.shape[-1] % 8))
    return (cells.unflatten(-1, (-1, 8)) * 2 ** torch.arange(8, device=cells.device)).sum(-1)


def unpack(numbers: Tensor, size: int) -> Tensor:
    """The cells again (..., size): the bits of each number."""
    halved = numbers.unsqueeze(-1) / 2 ** torch.arange(8, device=numbers.device)
    return halved.floor().remainder(2).flatten(-2)[..., :size]


def ray_table(size: int, rays: int) -> Tensor:
    """Cells that each ray crosses, from the middle outwards: int64 (rays, size / 2), indices into a plane. Rays turn
    from ahead to the left; the second half mirrors the first."""
    angle = 2 * pi * (torch.arange(rays // 2, dtype=torch.float64)[:, None] + 0.5) / rays
    distance = torch.arange(size // 2, dtype=torch.float64) + 0.5  # in cells
    column, row = ((size / 2 + distance * part).floor().long() for part in (angle.cos(), angle.sin()))
    mirrored = (size - 1 - row) * size + column
    return torch.cat([row * size + column, mirrored.flip(0)])


SEEN = ("robot", "goal", "pedestrians", "count", "grid")
ROBOT = 4  # numbers about the robot: forward speed, turn rate, the last action
WAY = 4  # numbers about the route: the current waypoint and the point 3 m ahead
PERSON = 8  # numbers about a pedestrian: position (2), velocity (2), distances now and at its nearest, when, presence
HORIZON = 4.0  # s that it looks ahead
# What the policy sees ends at 5 m (waypoints) and 8 m (people). Whoever sees more recognises the maps and the crowds of
# training, and does there by heart what it should do by looking.
WAY_RANGE, PEOPLE_RANGE = 5.0, 8.0


class GridAgent(nn.Module):
    """A Gaussian policy and a value function of what `see` makes of an observation, a row (..., obs_dim)."""

    def __init__(
        self, space: Dict, low: np.ndarray, high: np.ndarray, channels: tuple[str, ...], max_speed: float,
        args: Args,
    ):  # fmt: skip
        super().__init__()
        self.max_speed = max_speed
        self.people, self.size = min(args.people, space["pedestrians"].shape[0]), space["grid"].shape[-1]
        # Rays read each plane of obstacles; convolutions all planes but `combined`, which is two others in one
        rays = args.grid_encoder == "rays"
        kinds = ("obstacles", "near") if rays else ("obstacles", "near", "pedestrians")
        self.planes = [k for k, name in enumerate(channels) if name in kinds]
        self.register_buffer("table", ray_table(self.size, args.rays), persistent=False)
        vector = ROBOT + WAY + rays * args.rays * len(self.planes)
        cells = 0 if rays else len(self.planes) * self.size * ceil(self.size / 8)
        self.sizes = [vector, self.people * PERSON, cells]
        self.normalizer = VectorNormalizer(self.sizes) if args.norm_obs else nn.Identity()
        self.actor = self.network(args, len(low), gain=0.01)  # starts near zero
        self.critic = self.network(args, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.init_log_std))
        for name, values in zip(("source", "sign"), self.mirrored_row()):
            self.register_buffer(name, values, persistent=False)
        self.weights = list(self.parameters())  # listed once: to search the modules takes 3 % of a gradient step
        self.register_buffer("center", torch.as_tensor((high + low) / 2))
        self.register_buffer("scale", torch.as_tensor((high - low) / 2))

    def network(self, args: Args, outputs: int, gain: float) -> nn.Sequential:
        encoder = Encoder(self, args)
        return nn.Sequential(encoder, mlp([encoder.features, *args.hidden_sizes, outputs], gain))

    def mirrored_row(self) -> tuple[Tensor, Tensor]:
        """Where each number of a row comes from, and with which sign, when left and right are swapped."""
        vector, people, cells = torch.arange(sum(self.sizes)).split(self.sizes)
        ours, ranges = vector.split([ROBOT + WAY, len(vector) - ROBOT - WAY])
        ranges = ranges.reshape(len(self.planes), -1).flip(1)  # the last ray is the first one mirrored
        cells = cells.reshape(len(self.planes), self.size, -1).flip(1)  # rows grow to the left
        forward_left = torch.tensor([1.0, -1.0])
        person = torch.cat([forward_left.repeat(2), torch.ones(PERSON - 4)])
        sign = torch.ones(sum(self.sizes))
        sign[: len(ours)] = forward_left.repeat(len(ours) // 2)
        sign[people] = person.repeat(self.people)
        return torch.cat([ours, ranges.flatten(), people, cells.flatten()]), sign

    def mean(self, obs: Tensor) -> Tensor:
        """The middle of the Gaussian (..., 2). The actor looks at each situation and at its mirror image."""
        both = torch.stack([obs, obs[..., self.source] * self.sign])
        action, mirrored = self.actor(self.normalizer(both))
        return (action + mirrored * self.sign[:2]) / 2  # forward keeps its sign, left changes it

    def see(self, obs: dict[str, Tensor]) -> Tensor:
        """What the policy looks at, as one row (N, obs_dim). Nothing here is learned, so it is done once, as an
        observation arrives."""
        robot, goal, pedestrians, count, grid = (obs[name] for name in SEEN)
        waypoint, ahead = GOAL_RANGE * goal[:, :2], GOAL_RANGE * goal[:, 4:6]  # m
        waypoint = waypoint / waypoint.square().sum(1, keepdim=True).sqrt().clamp(min=WAY_RANGE)
        people = self.people_features(pedestrians[:, : self.people], count, robot[:, :1]).flatten(1)
        planes = grid[:, self.planes]
        if self.sizes[2]:
            return torch.cat([robot, waypoint, ahead / 3, people, pack(planes).flatten(1).to(robot)], dim=1)
        return torch.cat([robot, waypoint, ahead / 3, self.closeness(planes).to(robot), people], dim=1)

    def people_features(self, pedestrians: Tensor, count: Tensor, speed: Tensor) -> Tensor:
        """PERSON numbers (N, people, PERSON) about each: where it is, how it moves as seen from the robot, and how near
        it will come, and when, if both go on as they do. Zeros for those who are not there, or too far away."""
        position, velocity = PEDESTRIAN_RANGE * pedestrians[..., :2], PEDESTRIAN_SPEED * pedestrians[..., 2:]
        velocity = velocity - torch.stack([speed * self.max_speed, torch.zeros_like(speed)], dim=-1)
        distance = position.square().sum(-1, keepdim=True).sqrt()
        meeting = -(position * velocity).sum(-1, keepdim=True) / (velocity.square().sum(-1, keepdim=True) + 1e-6)
        meeting = meeting.clamp(0.0, HORIZON)  # s
        nearest = (position + meeting * velocity).square().sum(-1, keepdim=True).sqrt()
        near = [torch.exp(-distance / 2), torch.exp(-nearest), meeting / HORIZON]
        present = torch.arange(self.people, device=count.device).unsqueeze(-1) < count.unsqueeze(-1)
        features = torch.cat([position / 4, velocity, *near, torch.ones_like(distance)], dim=-1)
        return features * (present & (distance < PEOPLE_RANGE))

    def closeness(self, planes: Tensor) -> Tensor:
        """Along each ray of each plane, 1 for a solid cell beside the robot down to 0 for none: (N, planes * rays)."""
        reach = self.table.shape[1]
        planes = planes.flatten(2)
        crossed = planes.gather(2, self.table.flatten().expand(*planes.shape[:2], -1)).unflatten(2, self.table.shape)
        dtype = torch.uint8 if reach < 256 else torch.int16
        first = (crossed * torch.arange(reach, 0, -1, dtype=dtype, device=planes.device)).amax(-1)
        return first.flatten(1) / reach

    def forward(self, robot: Tensor, goal: Tensor, pedestrians: Tensor, count: Tensor, grid: Tensor) -> Tensor:
        """The deployed policy: the most likely action for a raw observation, inside the environment's bounds."""
        row = self.see(dict(zip(SEEN, (robot, goal, pedestrians, count, grid))))
        return self.bounded(self.mean(row))

    def bounded(self, action: Tensor) -> Tensor:
        """The Gaussian's own units, where [-1, 1] is the whole range, to the environment's, inside its bounds."""
        return self.center + self.scale * action.clamp(-1, 1)

    def sample(self, obs: Tensor) -> Tensor:
        mean = self.mean(obs)
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.normalizer(obs)).squeeze(-1)

    def evaluate_actions(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi(action | obs) (...), the policy's entropy () and V(obs) (...)."""
        # log N(a; mu, sigma) = -z^2 / 2 - log sigma - log(2 pi) / 2 with z = (a - mu) / sigma, summed over components
        z = (action - self.mean(obs)) / self.log_std.exp()
        log_scale = (self.log_std + 0.5 * log(2 * pi)).sum()
        logprob = -0.5 * z.square().sum(-1) - log_scale
        entropy = log_scale + 0.5 * len(self.log_std)
        return logprob, entropy, self.value(obs)


def tensors(obs: dict, device: torch.device) -> dict[str, Tensor]:
    """An observation as tensors on the device; without a copy where they are already."""
    return {name: torch.as_tensor(x, device=device) for name, x in obs.items()}


def make_grid_agent(vec: VectorEnv, args: Args) -> GridAgent:
    envs.require_grid(vec)
    space = vec.single_action_space
    if not {"obstacles", "near"} & {*vec.grid.channels}:
        raise UserError(f"the policy reads obstacles or near, not {', '.join(vec.grid.channels)}; add to grid_channels")
    return GridAgent(vec.single_observation_space, space.low, space.high, vec.grid.channels, vec.robot.max_speed, args)


def agent_for(vec: VectorEnv, args: Args) -> Agent | GridAgent:
    """The network of the PPO script that learns this environment."""
    if isinstance(vec.single_observation_space, Dict):
        return make_grid_agent(vec, args)
    envs.require_flat_box(vec)
    return make_agent(vec, args)


def trained(path: str, env_id: str | None = None) -> tuple[Policy, dict]:
    """A policy from a file or a run as it is deployed, and the contents of the file. env_id: what the user has named.

    Raises:
        UserError: there is none, or it is a residual.
    """
    policy = run.load_policy(path, kind="policy")
    command.require_named(policy["env_id"], env_id, path)
    command.check_env_kwargs(policy["env_kwargs"])
    networks = {name: policy["args"][name] for name in (*NETWORK, *SIGHT) if name in policy["args"]}
    args = command.args_from(Args, {"dataset": "", **networks}, path)  # of which only the network's settings count
    args = replace(args, env_id=policy["env_id"], env_kwargs=policy["env_kwargs"])
    vec = envs.make_vec(args.env_id, 1, training=False, split="train", **args.env_kwargs)
    agent = agent_for(vec, args)
    run.load_agent(agent, policy, args, path)
    return Deployed(agent), policy


class Recorder:
    """An expert as a policy that writes down what it sees and means to do, while noise disturbs what it does and a
    clone, if there is one, drives in every other row."""

    def __init__(
        self, expert: Policy, clone: Policy | None, scale: np.ndarray, seed: int, keeps: Callable[[dict], bool],
        writer: Writer,
    ):  # fmt: skip
        self.expert, self.clone, self.scale, self.keeps, self.writer = expert, clone, scale, keeps, writer
        self.rng, self.episodes, self.terminated = np.random.default_rng(seed), {}, {}

    def reset(self, rows: np.ndarray, vec: VectorEnv) -> None:
        if hasattr(self.expert, "reset"):
            self.expert.reset(rows, vec)

    def __call__(self, obs: Any) -> np.ndarray:
        action = np.asarray(self.expert(obs), np.float32)
        played = action + self.scale * self.rng.standard_normal(action.shape)
        if self.clone is not None:
            played[1::2] = self.clone(obs)[1::2]
        self.now = {**named(obs), "action": action, "played": played.astype(np.float32)}
        return self.now["played"]

    def on_step(self, playing: np.ndarray, reward: np.ndarray, terminated: np.ndarray, done: np.ndarray) -> None:
        """Row i played episode playing[i]."""
        step = {**self.now, "reward": np.asarray(reward, np.float32)}
        for i, episode in enumerate(playing.tolist()):
            self.episodes.setdefault(episode, []).append({name: x[i].copy() for name, x in step.items()})
            self.terminated[episode] = bool(terminated[i])

    def on_episode(self, episode: int, result: dict) -> None:
        """An episode that has ended goes to the disk."""
        steps = self.episodes.pop(episode)
        arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
        self.writer.add(episode, arrays if self.keeps(result) else None)


def collect(args: CollectArgs) -> Path:
    """Play the expert on the published task's training split and write its demonstrations; see envs/demonstrations.py.
    Returns their file.

    Raises:
        UserError: no such expert or environment, too few episodes, or none that succeeded.
    """
    check_collecting(args)
    file = run.dataset_file(args)
    expert, clone, env_id, settings = who_plays(args)
    vec = envs.make_vec(env_id, min(rollout.ROWS, args.episodes), **settings)
    scale = args.action_noise * (vec.single_action_space.high - vec.single_action_space.low) / 2

    def keeps(result: dict) -> bool:
        return result["success"] is True or not args.only_successes

    played, seeds, terminated = [], [], []
    with Writer(file) as writer:
        for seed, count in zip(args.seeds, shared_out(args.episodes, len(args.seeds))):
            recorder, first = Recorder(expert, clone, scale, seed, keeps, writer), len(played)
            played += rollout.rollout(recorder, vec, count, seed, recorder.on_step, first, recorder.on_episode)
            seeds += [(seed, first + i) for i in range(count)]
            terminated += [recorder.terminated[first + i] for i in range(count)]
            print(f"{len(played):>6,}/{args.episodes:,} episodes", file=sys.stderr)
        which = [i for i, result in enumerate(played) if keeps(result)]
        kept = [played[i] for i in which]
        if not kept:
            raise UserError(f"{args.policy} succeeded in none of {len(played)} episodes; leave --only-successes out")
        writer.finish(
            seed=np.array(seeds)[which],
            returns=np.array([result["return"] for result in kept]),
            successes=np.array([result["success"] is True for result in kept]),
            terminated=np.array(terminated)[which],
            **({"scenario": np.array([result["scenario"] for result in kept])} if "scenario" in kept[0] else {}),
        )
    summary = {"episodes": len(kept), **rollout.summarize(kept), "per_episode": None}
    files = [run.policy_file(path) for path in (args.policy, args.dagger) if path and run.is_policy_path(path)]
    manifest = {
        "env_id": env_id,
        "env_kwargs": {name: value for name, value in settings.items() if name not in ("training", "split", "threads")},
        "collected_with": asdict(args),
        "steps": writer.start[-1],
        "played": {"episodes": len(played), "env_steps": sum(result["length"] for result in played)},
        **summary,
        "git_commit": run.git_commit(),
        "sha256": run.sha256(file),
        "parents": run.origins([*files, *run.onnx_files(args.policy), *run.files_among(settings)]),
    }
    run.write_json(file.with_suffix(".json"), manifest)
    found = Demonstrations(file)
    checks = demonstrations.problems(found, envs.make_vec(env_id, 1, **settings))
    manifest["quality"] = demonstrations.quality(checks, len(found))
    run.write_json(file.with_suffix(".json"), manifest)
    print(f"{args.policy}: {rollout.describe(summary)}\n{file}: {manifest['quality']}")
    return file


def check_collecting(args: CollectArgs) -> None:
    """Raises UserError for settings that cannot work, or a name that is taken."""
    if args.episodes < 2 or not 0 <= args.action_noise < np.inf or args.threads < 1 or min(args.seeds, default=-1) < 0:
        least = "--episodes must be 2 or more, --action-noise 0 or more, --threads 1 or more"
        raise UserError(f"{least}, --seeds not empty and each 0 or more")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must differ from one another")
    command.check_env_kwargs(args.env_kwargs)
    file = run.dataset_file(args)
    if file.exists():
        raise UserError(f"{file} exists; choose another --dataset name, or remove it")


def who_plays(args: CollectArgs) -> tuple[Policy, Policy | None, str, dict]:
    """Expert, clone or None, environment and its arguments.

    Raises:
        UserError: there are none of these, or they do not go together.
    """
    learned, env_id, own = run.is_policy_path(args.policy), args.env_id, {}
    if learned:
        expert, policy = trained(args.policy, env_id)
        env_id, own = policy["env_id"], policy["env_kwargs"]
        if args.env_id not in (None, env_id):
            raise UserError(f"{args.policy}: a policy for {env_id}, not {args.env_id}; leave --env-id out")
    env_id = env_id or "LateralControl-v0"
    settings = {"training": False, "split": "train", "threads": args.threads, **own, **args.env_kwargs}
    vec = envs.make_vec(env_id, 1, **settings)
    if not isinstance(vec.single_observation_space, Dict):
        envs.require_flat_box(vec)
    limit = getattr(vec, "num_episodes", None)
    if limit is not None and args.episodes > limit:
        raise UserError(f"{args.episodes} episodes of the train split, which has {limit}; ask for at most so many")
    if not learned:
        expert = rollout.scripted(args.policy, vec)
        own = getattr(expert, "env_kwargs", {})
        settings = {**settings, **own, **args.env_kwargs}
    sense = {*run.MEANING, *run.SIGHT}  # what says what a policy sees, and what its actions mean
    run.require_alike(args.policy, own, settings, sense if learned else {*own})
    clone = None
    if args.dagger is not None:
        clone, policy = trained(args.dagger, env_id)
        if policy["env_id"] != env_id:
            raise UserError(f"{args.dagger}: a policy for {policy['env_id']}, not {env_id}; give another")
        run.require_alike(args.dagger, policy["env_kwargs"], settings, sense)
    return expert, clone, env_id, settings


def shared_out(total: int, parts: int) -> list[int]:
    """total in equal parts; the first ones take what is left over."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def validate(args: ValidateArgs) -> bool:
    """Print what is right and wrong with demonstrations, and note it in their manifest. Whether nothing is wrong."""
    return demonstrations.validate(Demonstrations(run.dataset_file(args), args.env_id))


def inspect(args: InspectArgs) -> None:
    """Statistics of demonstrations, or of one episode, which is played again if that is asked for.

    Raises:
        UserError: there is no such episode, or no way to show it.
    """
    found = Demonstrations(run.dataset_file(args), args.env_id)
    if args.episode is None and (args.video or args.render):
        raise UserError("--video and --render show one episode; say which with --episode")
    if args.video and args.render:
        raise UserError("--render human and --video exclude each other; leave one out")
    command.require_extras({"--video": args.video})
    if args.episode is None:
        print(demonstrations.describe(found))
        return
    print(demonstrations.describe_episode(found, args.episode))
    if args.video or args.render:
        demonstrations.show(found, args.episode, args.render)


def returns_to_go(reward: np.ndarray, start: np.ndarray, terminated: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_t+1 within each episode, (n,); reward (n,), start (episodes + 1,), terminated (episodes,).

    A terminal state is worth zero. An episode that the time limit cut off would have gone on; its end is worth what the
    episode paid on average, for ever: mean(r) / (1 - gamma)."""
    found = np.zeros(len(reward))
    for begin, end, terminal in zip(start[:-1], start[1:], terminated):
        following = 0.0 if terminal else reward[begin:end].mean() / max(1 - gamma, 1e-3)
        for t in reversed(range(begin, end)):
            found[t] = following = reward[t] + gamma * following
    return found


def pairs(agent: nn.Module, found: Demonstrations, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """What the network learns from: its view of each step (n, obs_dim), the expert's action in the Gaussian's own units
    (n, action_dim), and the return to go in units of its standard deviation (n,).

    That is about the scale of PPO's rewards, but not theirs: they are those of training, and scaled as they come. A few
    updates with --critic-warmup put it right."""
    views = []
    for obs in found.chunks():
        several = isinstance(obs, dict)
        views.append(agent.see(tensors(obs, torch.device("cpu"))) if several else torch.as_tensor(obs))
    action = (torch.as_tensor(found.action) - agent.center) / agent.scale
    target = returns_to_go(found.reward, found.start, found.terminated, args.gamma)
    return torch.cat(views).float(), action, torch.as_tensor(target / (target.std() + 1e-8)).float()


def bc_loss(agent: nn.Module, args: Args, obs: Tensor, action: Tensor) -> Tensor:
    """action: in the Gaussian's own units."""
    if args.loss == "nll":
        return -agent.evaluate_actions(obs, action)[0].mean()
    return (agent.mean(obs) - action).square().sum(-1).mean()


def fit_epoch(agent: nn.Module, optimizer: Optimizer, args: Args, data: tuple[Tensor, ...]) -> float:
    """One epoch over (obs, action, return to go). Returns the mean cloning loss of its minibatches."""
    order, losses = torch.randperm(len(data[0])), []
    for obs, action, target in zip(*(x[order].split(args.minibatch_size) for x in data)):
        optimizer.zero_grad()
        loss = bc_loss(agent, args, obs, action)
        losses.append(loss.detach())
        if args.critic:  # its parameters are its own, so that neither loss moves the other's network
            loss = loss + (agent.value(obs) - target).square().mean()
        loss.backward()
        optimizer.step()
    return torch.stack(losses).mean().item()


def split_episodes(start: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which steps train and which validate, whole episodes each; start: (episodes + 1,)."""
    episodes = len(start) - 1
    held_out = np.zeros(episodes, bool)
    count = min(max(1, round(share * episodes)), episodes - 1)
    held_out[np.random.default_rng(seed).permutation(episodes)[:count]] = True
    validates = np.repeat(held_out, np.diff(start))
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def check(args: Args) -> None:
    """Raises UserError for a value that cannot work."""
    command.check_env_kwargs(args.env_kwargs, args.eval_env_kwargs)
    least = dict.fromkeys(("epochs", "patience", "minibatch_size", "threads", "people", "set_units", "cnn_channels"), 1)
    least |= dict.fromkeys(("seed", "eval_seed", "weight_decay"), 0)
    wrong = [name for name, value in least.items() if not np.min(getattr(args, name), initial=value) >= value]
    wrong += ["hidden_sizes"] * (args.hidden_sizes is not None and min(args.hidden_sizes, default=1) < 1)
    wrong += ["gamma"] * (args.gamma is not None and not 0 <= args.gamma <= 1)
    wrong += [name for name in command.WIDTHS if command.no_width(name, getattr(args, name))]
    wrong += ["rays"] * (args.rays < 2 or args.rays % 2 == 1)
    wrong += ["cnn_channels"] * (len(args.cnn_channels) != 3)
    wrong += [name for name in ("seed", "eval_seed") if getattr(args, name) >= 2**32]
    wrong += ["init_log_std"] * (not np.isfinite(args.init_log_std))
    wrong += ["learning_rate"] * (not 0 < args.learning_rate < np.inf)
    wrong += ["validation_share"] * (not 0 < args.validation_share < 1)
    if wrong:
        raise UserError(f"--{wrong[0].replace('_', '-')} is out of range; see --help")


def load_demonstrations(args: Args) -> tuple[Demonstrations, Args]:
    """The demonstrations that args name, and args with what they leave open.

    Raises:
        UserError: there are none, or something is wrong with them.
    """
    found = Demonstrations(run.dataset_file(args), args.env_id)
    if "quality" not in found.manifest:
        raise UserError(f"{found.file}: collecting was cut short before it was checked; do so with validate")
    checks = (demonstrations.other_file, demonstrations.not_finite, demonstrations.not_finite_actions)
    if found.manifest.get("quality") == "quarantined" or any(wrong(found) for wrong in checks):
        raise UserError(f"{found.file}: something is wrong with it, and validate says what; record it anew")
    if len(found) < 2:
        raise UserError(f"{found.file}: one episode is too few to train and to validate; record more")
    env_id, env_kwargs = args.env_id or found.manifest["env_id"], found.manifest["env_kwargs"]
    run.require_alike(str(found.file), env_kwargs, {**env_kwargs, **args.env_kwargs}, {*run.MEANING, *run.SIGHT})
    args = replace(args, env_id=env_id, env_kwargs={**env_kwargs, **args.env_kwargs})
    tuned = {**UNTUNED, **TUNED.get(env_id, {})}.items()
    return found, replace(args, **{name: value for name, value in tuned if getattr(args, name) is None})


def train(args: Args) -> dict:
    """Clone an expert from its demonstrations. Returns what summary.json holds.

    Raises:
        UserError: args, or the demonstrations they name, cannot work.
        FloatingPointError: the loss is not finite.
    """
    check(args)
    command.require_extras({"--track": args.track, "--capture-video": args.capture_video})
    found, args = load_demonstrations(args)
    envs.check_evaluation(args)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    vec = envs.make_vec(args.env_id, 1, **args.env_kwargs)
    agent = agent_for(vec, args)
    if demonstrations.misfits(found, vec):
        raise UserError(
            f"--dataset {args.dataset}: {args.env_id} now has other observations or actions; record it anew"
        )
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    data = pairs(agent, found, args)
    trains, validates = split_episodes(found.start, args.validation_share, args.seed)
    training, validation = ([x[rows] for x in data] for rows in (trains, validates))
    if args.norm_obs:
        agent.normalizer.update(training[0])
    best, since_best = None, 0

    with run.Run("bc_pretrain", args, torch.device("cpu"), None, args.epochs) as record:
        for epoch in range(1, args.epochs + 1):
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (epoch - 1) / args.epochs)
            train_loss = fit_epoch(agent, optimizer, args, training)
            with torch.no_grad():
                loss = bc_loss(agent, args, *validation[:2]).item()
                critic_loss = (agent.value(validation[0]) - validation[2]).square().mean().item()
            run.require_finite("loss", np.array([[train_loss + loss + critic_loss]]), epoch)
            since_best += 1
            if best is None or loss < best["loss"]:
                best, since_best = {"step": epoch, "loss": loss, "agent": deepcopy(agent.state_dict())}, 0
            last = epoch == args.epochs or since_best == args.patience
            if last:
                agent.load_state_dict(best["agent"])
                best["evaluation"] = rollout.evaluate(Deployed(agent), args, "validation", record.video(epoch))
            scalars = {"train/loss": train_loss, "validation/loss": loss, "validation/critic_loss": critic_loss}
            record.log(epoch, [], [], scalars, best["evaluation"] if last else None)
            if last:
                break

        settings = ("env_id", "env_kwargs", "seed", *NETWORK, *(SIGHT if isinstance(agent, GridAgent) else ()))
        policy = {
            "kind": "policy", "env_id": args.env_id, "env_kwargs": args.env_kwargs,
            "args": {name: getattr(args, name) for name in settings},
            "agent": agent.state_dict(), "step": best["step"],
        }  # fmt: skip
        record.save_policy("best.pt", policy)
        first, _ = vec.reset(seed=args.seed)
        sight = first if isinstance(first, dict) else first.shape[1]
        run.export_onnx(agent, sight, record.folder / "policy.onnx", "policy", args.env_kwargs)
        return record.finish(epoch, best)


@command.command_line()
def main() -> None:
    commands = {"collect": CollectArgs, "validate": ValidateArgs, "inspect": InspectArgs, "train": Args}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    does = {CollectArgs: collect, ValidateArgs: validate, InspectArgs: inspect, Args: train}
    if does[type(args)](args) is False:
        sys.exit(1)


if __name__ == "__main__":
    main()
