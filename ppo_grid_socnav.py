"""PPO for a robot among people, in one file: PyTorch, an occupancy grid and a set of pedestrians.

The same PPO as in ppo_continuous.py (Schulman et al. 2017) learns to drive through crowds, doorways and corridors. What
is new is what stands between the observation and the network:

    grid          64 x 64 cells around the robot -> ranges along rays, or convolutions
    pedestrians   a set: the same small network looks at each, and max and sum make its answers one vector
    robot, goal   as they are
    left, right   the policy is symmetric: pi(mirrored obs) = mirrored pi(obs), as mu(o) = (f(o) + M f(M o)) / 2

Ranges are read from the grid by a fixed table, so on a CPU they cost next to nothing; convolutions are the published
design, for a GPU and long runs. Symmetry is not left to be learned (Abdolhosseini et al. 2019): in places that training
did not show, the policy fails less.

  train     python ppo_grid_socnav.py                               (10 million steps)
  resume    python ppo_grid_socnav.py --resume runs/<run>
  2 cores   torchrun --standalone --nproc-per-node 2 ppo_grid_socnav.py --threads 1         (each with half of the work)
  evaluate  python ppo_grid_socnav.py --evaluate runs/<run> --eval-episodes 270        (or: --evaluate pursuit-stop)
  one place python ppo_grid_socnav.py --evaluate runs/<run> --env-kwargs scenario francis2023_blind_corner
  rewards   python ppo_grid_socnav.py --reward snqi_step [--reward-weights FILE]
  deploy    runs/<run>/policy.onnx: robot, goal, pedestrians, count, grid -> action in the environment's units
"""

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from math import ceil, inf, log, pi, sqrt
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Dict
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

import envs
from envs import command, ranks, rollout, run
from envs.files import UserError
from envs.rollout import Deployed, as_numpy
from envs.run import require_finite
from envs.socnav import GOAL_RANGE, PEDESTRIAN_RANGE, PEDESTRIAN_SPEED


@dataclass
class Args:
    env_id: str = "SocNavGrid-v0"
    """environment, with the observations of SocNavGrid-v0"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..."""
    eval_env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments for evaluation only, on top of --env-kwargs"""
    seed: int = 1
    """seed of the networks, the environments and the minibatch order"""
    total_timesteps: int = 10_000_000
    """environment steps, counted over all environments; an action repeat makes several with one action"""
    num_envs: int | Literal["auto"] = "auto"
    """environments stepped in parallel; auto is 256, on a GPU 2048"""
    num_steps: int = 32
    """steps per environment between two updates"""

    grid_encoder: Literal["rays", "cnn"] = "rays"
    """what reads the grid: a fixed table of rays (fast), or a convolutional network (the published design)"""
    rays: int = 36
    """with rays: ranges read from each plane of obstacles, an even number"""
    cnn_channels: tuple[int, ...] = (8, 16, 16)
    """with cnn: channels of its three layers; 32 64 64 is the published size, for a GPU"""
    people: int = 8
    """nearest pedestrians that the policy looks at"""
    set_units: int = 16
    """units of the network that looks at each of them"""
    reward: str = "route_completion"
    """reward of training: simple, punish_action, snqi_step or route_completion; evaluations pay simple"""
    reward_weights: str | None = None
    """JSON file {term: weight} that changes the weights of the reward"""

    learning_rate: float = 1e-3
    """learning rate of Adam; usually 1e-4 to 1e-3"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the run"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW); 0 is Adam"""
    minibatch_size: int = 1024
    """transitions per gradient step; must divide num_envs * num_steps"""
    update_epochs: int = 3
    """passes over each batch; usually 3 to 10"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; 0 is one-step TD, 1 is Monte Carlo"""
    clip_coef: float = 0.2
    """how far the probability ratio may move before its gradient is cut; usually 0.1 to 0.3"""
    clip_value: bool = False
    """also clip the change of the value estimate"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """stop an update once the policy has moved further than this; usually 0.01 to 0.05"""
    norm_obs: bool = False
    """normalise observations by their running mean and standard deviation"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    norm_adv: bool = True
    """normalise advantages within each minibatch"""
    group_size: int = 1
    """environments in the same situation, whose mean advantage is subtracted; 1 for none"""
    init_log_std: float = -0.7
    """logarithm of the initial standard deviation of the policy"""
    final_log_std: float | None = None
    """move the log standard deviation linearly to this over the run, instead of learning it"""
    hidden_sizes: tuple[int, ...] = (96, 96)
    """units in the hidden layers of actor and critic"""
    critic_warmup: int = 0
    """first updates that change the critic alone, for a policy that starts from --pretrained"""
    freeze_normalizer: bool = False
    """keep the observation statistics that --pretrained brings, instead of following those of the new policy"""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """where the networks live; auto takes a GPU if there is one, but for networks this small the CPU is faster"""
    threads: int = 2
    """CPU threads of PyTorch, in which the simulator is written too; no more than there are idle cores"""
    compile: bool = False
    """compile the gradient step with torch.compile (needs a C++ compiler)"""
    deterministic: bool = False
    """refuse GPU operations whose result may differ between runs"""

    eval_every: int = 500_000
    """steps between two evaluations on the validation split; the best one gives best.pt; 0 for only one at the end"""
    eval_first: int = 0
    """also evaluate before each of the first updates, so many, into first_evaluations.jsonl: does a clone get worse?"""
    eval_episodes: int = 100
    """episodes of an evaluation; 0 for all, where a split has a fixed number"""
    eval_slow_after: int = 3_000_000
    """step from which evaluations are twice as far apart"""
    eval_seed: int = 1
    """seed of the evaluation episodes; those of training and of the three splits never coincide"""
    best_metric: str = "success_rate"
    """what best.pt is chosen by: success_rate, failure_rate, mean_return, or a metric of the task such as snqi"""
    stop_at_convergence: bool = False
    """end the run once three evaluations in a row had success >= 0.9 and failure <= 0.05"""
    checkpoint_every: int = 500_000
    """steps between two files in checkpoints/; 0 for none"""
    run_root: str = "runs"
    """directory that holds the runs"""
    run_name: str | None = None
    """name of the run's directory instead of <script>__<environment>__seed<seed>__<time>"""
    config: str | None = None
    """JSON file of settings to start from, such as a run's config.json"""
    resume: str | None = None
    """checkpoint or run directory to continue, bit for bit; only the total may grow and the place may change"""
    pretrained: str | None = None
    """policy file or run to start from, such as a clone: actor, critic and normaliser; the optimiser starts fresh"""
    track: bool = False
    """also log to Weights & Biases (offline without a login)"""
    capture_video: bool = False
    """record the first episode of each evaluation as videos/*.mp4"""
    dry_run: bool = False
    """one rollout, one update, one evaluation of two episodes, all files"""

    evaluate: str | None = None
    """no training: measure a policy file, a run (its best.pt), pursuit, pursuit-stop or PATH.onnx on the test split"""
    json: str | None = None
    """with --evaluate: write the result to this file"""
    render: Literal["human"] | None = None
    """with --evaluate: watch it in a window"""

    @classmethod
    def tuned(cls, grid_encoder: str = "rays", **overrides: Any) -> "Args":
        """The settings tuned for an encoder, as the command line takes them; overrides win."""
        return cls(**{"grid_encoder": grid_encoder, **TUNED.get(grid_encoder, {}), **overrides})


# {encoder: settings that differ from the defaults above}; --grid-encoder X --help shows the values in force.
TUNED: dict[str, dict] = {
    "rays": {"env_kwargs": {"grid_channels": "near", "training_margin": 0.1}, "final_log_std": -2.0},
    "cnn": {
        "env_kwargs": {"grid_channels": "near", "training_margin": 0.1}, "final_log_std": -2.0,
        # a sample of a minibatch of 256 takes less than half the time of one of 1,024, presumably for the cache's sake
        "total_timesteps": 1_000_000, "minibatch_size": 256, "update_epochs": 2, "learning_rate": 5e-4,
    },
}  # fmt: skip


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


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return so far, R <- gamma R + r."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma, self.stats = gamma, Normalizer()
        self.register_buffer("returns", torch.zeros(num_envs))

    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """reward, done: (T, N) -> scaled reward (T, N)."""
        returns, following = [], self.returns
        for r, ended in zip(reward, done):
            returns.append(self.gamma * following + r)
            following = returns[-1] * ~ended  # the next episode starts from zero
        self.returns.copy_(following)
        self.stats.update(torch.cat(returns))
        return (reward * torch.rsqrt(self.stats.var + 1e-8)).clamp(-10, 10)


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


class Transitions(NamedTuple):
    """The transitions of one rollout, each field (T, N, ...); index t holds transition t only."""

    obs: Tensor
    action: Tensor  # as it was drawn, unclipped: that is what its log-probability belongs to
    next_obs: Tensor  # where the action led, never the first observation of the next episode
    reward: Tensor
    terminated: Tensor
    done: Tensor  # terminated or truncated


@torch.no_grad()
def collect(
    agent: GridAgent, vec: VectorEnv, args: Args, obs: Tensor, step: int, device: torch.device
) -> tuple[Transitions, Tensor, list[dict]]:
    """Play num_steps steps in every environment from what it sees, obs (N, obs_dim), on. Returns the batch, the next
    obs, finished episodes."""
    transitions, episodes = [], []
    for _ in range(args.num_steps):
        action = agent.sample(obs)
        bounded = agent.bounded(action)
        new, reward, terminated, truncated, info = vec.step(bounded if vec.on_gpu else bounded.cpu().numpy())
        new_obs = agent.see(tensors(new, device))
        step += args.num_envs
        require_finite("observation", as_numpy(new_obs), step)
        require_finite("reward", as_numpy(reward), step)

        reward, terminated, truncated = (torch.as_tensor(x, device=device) for x in (reward, terminated, truncated))
        done, next_obs = terminated | truncated, new_obs
        if done.any():
            ended = done.nonzero().flatten()
            final_obs = {name: x[ended] for name, x in tensors(info["final_obs"], device).items()}
            next_obs = new_obs.index_copy(0, ended, agent.see(final_obs))
            require_finite("final observation", as_numpy(next_obs), step)
            episodes += [{"step": step, **rollout.episode_result(info, i)} for i in ended.tolist()]
        transitions.append((obs, action, next_obs, reward, terminated, done))
        obs = new_obs
    return Transitions(*map(torch.stack, zip(*transitions))), obs, episodes


def tensors(obs: dict, device: torch.device) -> dict[str, Tensor]:
    """An observation as tensors on the device; without a copy where they are already."""
    return {name: torch.as_tensor(x, device=device) for name, x in obs.items()}


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) (T, N) from fields (T, N).

    next_value[t] is V of the state that action t led to, also at the end of an episode: a time limit bootstraps like
    any other step, and only a terminal state is worth zero."""
    # delta_t = r_t + gamma V(s_t+1) - V(s_t), with V = 0 after a terminal state
    delta = reward + gamma * next_value * ~terminated - value
    # A_t = delta_t + gamma lambda A_t+1, cut where the episode ended
    decay = gamma * gae_lambda * (~done).to(delta)
    advantage, following = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage[t] = following = delta[t] + decay[t] * following
    return advantage


def group_mean(advantage: Tensor, group_size: int) -> Tensor:
    """At each step the mean over the group_size neighbours that are in the same situation, (T, N) -> (T, N).

    Without it an advantage says what one's own actions made better than the others' did: what befalls all goes out."""
    return advantage.unflatten(1, (-1, group_size)).mean(2).repeat_interleave(group_size, dim=1)


STATS = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction")


def ppo_loss(agent: nn.Module, args: Args, critic_only: bool, *minibatch: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one minibatch, and the statistics named in STATS. With critic_only it is the critic's part alone."""
    obs, action, old_logprob, advantage, target, old_value = minibatch
    logprob, entropy, value = agent.evaluate_actions(obs, action)
    # r = pi(a | s) / pi_old(a | s)
    log_ratio = logprob - old_logprob
    ratio = log_ratio.exp()

    # L_clip = E[min(r A, clip(r, 1 - eps, 1 + eps) A)]
    if args.norm_adv:
        std, mean = torch.std_mean(advantage)
        advantage = (advantage - mean) / (std + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(advantage * ratio, advantage * clipped_ratio).mean()

    # L_value = E[(V - target)^2] / 2; with clipping the larger of the errors with V and with V kept near its old value
    value_error = (value - target).square()
    if args.clip_value:
        clipped_value = value.clamp(old_value - args.clip_coef, old_value + args.clip_coef)
        value_error = torch.max(value_error, (clipped_value - target).square())
    value_loss = 0.5 * value_error.mean()

    # L = L_policy + c_v L_value - c_e H[pi]
    loss = args.vf_coef * value_loss
    if not critic_only:
        loss = loss + policy_loss
        if args.ent_coef > 0:
            loss = loss - args.ent_coef * entropy
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()  # unbiased and never negative: http://joschu.net/blog/kl-approx.html
        clip_fraction = (ratio != clipped_ratio).float().mean()
        return loss, torch.stack([policy_loss, value_loss, -entropy, approx_kl, clip_fraction])


def compute_gradient(agent: nn.Module, args: Args, critic_only: bool, *minibatch: Tensor) -> Tensor:
    """Leaves the clipped gradient of the loss in the agent's parameters. --compile compiles this function."""
    loss, stats = ppo_loss(agent, args, critic_only, *minibatch)
    loss.backward()
    nn.utils.clip_grad_norm_(agent.weights, args.max_grad_norm, foreach=False)  # the loop compiles to faster code
    return stats


def joint_gradient(gradient: Callable, agent: nn.Module, args: Args, critic_only: bool, *minibatch: Tensor) -> Tensor:
    """compute_gradient on the minibatches of all processes as if they were one: the moments of the advantages, the
    gradient before it is clipped and the statistics are taken over all of them."""
    obs, action, old_logprob, advantage, target, old_value = minibatch
    if args.norm_adv:
        std, mean = torch.std_mean(ranks.joined(advantage))
        advantage = (advantage - mean) / (std + 1e-8)
    own = replace(args, norm_adv=False, max_grad_norm=inf)  # both are done here, for all
    stats = gradient(agent, own, critic_only, obs, action, old_logprob, advantage, target, old_value)
    gradients = [weight.grad for weight in agent.weights if weight.grad is not None]
    joint = ranks.mean(nn.utils.parameters_to_vector([*gradients, stats]))
    nn.utils.vector_to_parameters(joint[: -len(STATS)], gradients)
    nn.utils.clip_grad_norm_(agent.weights, args.max_grad_norm, foreach=False)
    return joint[-len(STATS) :]


def update(
    agent: nn.Module, optimizer: Optimizer, gradient: Callable, args: Args, critic_only: bool, data: tuple[Tensor, ...]
) -> Tensor:
    """All epochs over one batch. Returns the mean of STATS over its minibatches."""
    history = []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(data[0]), device=data[0].device)
        for minibatch in zip(*(x[order].split(args.minibatch_size) for x in data)):
            optimizer.zero_grad()
            stats = gradient(agent, args, critic_only, *minibatch)
            history.append(stats)
            if args.target_kl is not None and stats[STATS.index("approx_kl")] > args.target_kl:
                return torch.stack(history).mean(0)
            optimizer.step()
    return torch.stack(history).mean(0)


def learn(
    agent: nn.Module, optimizer: Optimizer, gradient: Callable, args: Args, batch: Transitions, critic_only: bool
) -> dict[str, float]:
    """Values, advantages and targets of a batch, then the update with them. Returns the train/ scalars."""
    # The first batch was sampled without statistics. Take them before the update, so that the networks never train on
    # raw scales; the policy that sampled was near zero all the same (its last layer begins with gain 0.01).
    first = args.norm_obs and agent.normalizer.count == 0
    if first:
        agent.normalizer.update(batch.obs.flatten(0, 1))

    with torch.no_grad():
        logprob, _, value = agent.evaluate_actions(batch.obs, batch.action)
        next_value = agent.value(batch.next_obs)
    advantage = gae(batch.reward, value, next_value, batch.terminated, batch.done, args.gamma, args.gae_lambda)
    target = advantage + value
    if args.group_size > 1:
        advantage = advantage - group_mean(advantage, args.group_size)
    data = tuple(x.flatten(0, 1) for x in (batch.obs, batch.action, logprob, advantage, target, value))
    stats = update(agent, optimizer, gradient, args, critic_only, data)

    # Only now, so that old and new log-probabilities saw the same observations; not while the policy must stand still
    if args.norm_obs and not (first or critic_only or args.freeze_normalizer):
        agent.normalizer.update(batch.obs.flatten(0, 1))
    return {
        **{f"train/{name}": x for name, x in zip(STATS, stats.tolist(), strict=True)},
        "train/explained_variance": 1 - ((target - value).var() / target.var()).item(),
        "train/learning_rate": optimizer.param_groups[0]["lr"],
    }


def make_grid_agent(vec: VectorEnv, args: Args) -> GridAgent:
    envs.require_grid(vec)
    space = vec.single_action_space
    if not {"obstacles", "near"} & {*vec.grid.channels}:
        raise UserError(f"the policy reads obstacles or near, not {', '.join(vec.grid.channels)}; add to grid_channels")
    return GridAgent(vec.single_observation_space, space.low, space.high, vec.grid.channels, vec.robot.max_speed, args)


def with_reward(args: Args) -> Args:
    """With the reward among the arguments of the environment.

    Raises:
        UserError: a setting of this script's own that cannot work.
    """
    if args.rays < 2 or args.rays % 2:
        raise UserError(f"--rays must be an even number, half of them on either side, not {args.rays}")
    for name in ("people", "set_units"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if len(args.cnn_channels) != 3 or min(args.cnn_channels) < 1:
        raise UserError(f"--cnn-channels must be three numbers above 0, not {args.cnn_channels}")
    for name in ("reward", "reward_weights", "device"):
        if name in {**args.env_kwargs, **args.eval_env_kwargs} and args.resume is None:
            raise UserError(f"{name} is not for --env-kwargs: --{name.replace('_', '-')} sets it; leave it out")
    if args.env_id != "SocNavGrid-v0":
        envs.require_grid(envs.make_vec(args.env_id, 1, training=False))
    weights = {} if args.reward_weights is None else {"reward_weights": args.reward_weights}
    return replace(args, env_kwargs={**args.env_kwargs, "reward": args.reward, **weights})


def train(args: Args) -> dict:
    """Run PPO as args say. Returns what summary.json holds.

    Raises:
        UserError: args, a file they name or the environment cannot work.
        FloatingPointError: observations, rewards, losses or parameters are not finite.
    """
    args = ranks.join(command.checked(with_reward(args)))
    own_args = ranks.own_part(args)  # of several processes each has its share of the environments and minibatches
    batch_size = command.steps_per_rollout(args)
    iterations = args.total_timesteps // batch_size
    resumed = command.load_to_resume(args, iterations * batch_size, kind="policy")
    device = run.prepare_torch(args)
    torch.set_num_threads(args.threads)
    vec = envs.make_training(own_args, flat=False, device=device.type)
    agent = make_grid_agent(vec, args).to(device)
    rollout.require_metric(args.best_metric, vec)
    adam = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(agent.parameters(), **adam)
    scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    gradient = run.compiled(compute_gradient) if args.compile else compute_gradient
    if ranks.count() > 1:
        gradient = partial(joint_gradient, gradient)
        ranks.draw_apart(args.seed)  # networks begin alike, what follows is each process's own
    first, _ = vec.reset(seed=ranks.seeds(args))
    step, best, recent, evaluations = 0, None, deque(maxlen=100), []

    if resumed is not None:
        run.load_agent(agent, resumed, args, args.resume)
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["reward_scaler"])
        step, best, evaluations = resumed["step"], resumed["best"], resumed.get("evaluations", [])
        recent.extend(resumed["recent"])
        own_state = ranks.own_state(resumed, args.resume)
        first = vec.load_state_dict(own_state["envs"])
        run.set_rng_state(own_state["rng"])
    elif args.pretrained is not None:
        run.load_agent(agent, run.load_policy(args.pretrained, kind="policy"), args, args.pretrained)
    obs = agent.see(tensors(first, device))

    def checkpoint() -> dict:
        own, *others = ranks.gather({"envs": vec.state_dict(), "rng": run.rng_state()})
        return {
            # this part is a policy file
            "kind": "policy", "env_id": args.env_id, "env_kwargs": args.env_kwargs, "args": asdict(args),
            "agent": agent.state_dict(), "step": step,
            # and the rest is what resuming needs
            "optimizer": optimizer.state_dict(), "reward_scaler": scaler.state_dict(), "evaluations": evaluations,
            "recent": list(recent), "best": best, **own, "other_ranks": others,
        }  # fmt: skip

    about = "ppo_grid_socnav", args, device, resumed, iterations * batch_size
    # All processes do the same; the first one evaluates and writes
    with run.Run(*about) if ranks.rank() == 0 else ranks.Unwritten() as record:
        for iteration in range(step // batch_size + 1, iterations + 1):
            record.snapshot = deepcopy(checkpoint())
            if iteration <= args.eval_first:
                record.look(step, ranks.once(rollout.evaluate, Deployed(agent), args, "validation"))
            progress = (iteration - 1) / iterations
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            if args.final_log_std is not None:
                log_std = (1 - progress) * args.init_log_std + progress * args.final_log_std
                agent.log_std.requires_grad_(False).fill_(log_std)
            batch, obs, episodes = collect(agent, vec, args, obs, step, device)
            episodes = sorted(chain(*ranks.gather(episodes)), key=itemgetter("step"))  # those of all processes
            recent.extend(episodes)
            if args.norm_reward:  # one scaler for all, equal in each process
                reward = scaler(ranks.joined(batch.reward, dim=1), ranks.joined(batch.done, dim=1))
                batch = batch._replace(reward=ranks.own(reward, dim=1))
            scalars = learn(agent, optimizer, gradient, own_args, batch, critic_only=iteration <= args.critic_warmup)
            step += batch_size
            run.require_finite_update(agent, scalars, step)

            evaluation = None
            every = args.eval_every * (1 + (step > args.eval_slow_after))
            if iteration == iterations or run.due(every, step, batch_size):
                evaluation = ranks.once(rollout.evaluate, Deployed(agent), args, "validation", record.video(step))
                evaluations.append(
                    {"step": step, **{name: evaluation[name] for name in ("success_rate", "failure_rate")}}
                )
                if best is None or rollout.better(evaluation, best["evaluation"], args.best_metric):
                    best = {"step": step, "agent": deepcopy(agent.state_dict()), "evaluation": evaluation}
                    record.save_policy("best.pt", checkpoint())
            record.log(step, recent, episodes, scalars, evaluation)
            if run.due(args.checkpoint_every, step, batch_size):
                record.save(f"checkpoints/step_{step:09d}.pt", checkpoint())
            if args.stop_at_convergence and run.converged_at(evaluations) is not None:
                break

        record.save("final.pt", checkpoint())
        if ranks.rank() > 0:  # nothing is left to do but the export
            return {}
        agent.load_state_dict(best["agent"])
        run.export_onnx(agent, first, record.folder / "policy.onnx", "policy", args.env_kwargs)
        return record.finish(step, best, converged_at_step=run.converged_at(evaluations))


def evaluate(args: Args) -> dict:
    """Measure the policy that args.evaluate names; see rollout.measure."""
    command.checked(args)
    run.prepare_torch(args)
    vec = envs.make_vec(args.env_id, 1, training=False, split="test", **args.env_kwargs)
    if not run.is_policy_path(args.evaluate):
        return rollout.measure(rollout.scripted(args.evaluate, vec), None, args)
    agent = make_grid_agent(vec, args)
    run.load_agent(agent, run.load_policy(args.evaluate, kind="policy"), args, args.evaluate)
    return rollout.measure(Deployed(agent), None, args)


@command.command_line(processes=True)
def main() -> None:
    args = command.parse(Args, Args.tuned)
    evaluate(args) if args.evaluate is not None else train(args)


if __name__ == "__main__":
    main()
