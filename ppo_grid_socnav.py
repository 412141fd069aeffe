"""PPO for social navigation from an occupancy grid and a set of pedestrians, in one file (PyTorch).

The PPO of ppo_continuous.py (Schulman et al. 2017) learns to drive through crowds, doorways and corridors. New are the
features and the encoder between observation and network:

    grid          64 x 64 cells around the robot -> proximity along rays (1 = next to the robot, 0 = free), or a CNN
    pedestrians   a set: a shared MLP embeds each pedestrian; max and sum pooling combine them (Deep Sets)
    robot         unchanged: speeds and the last action
    goal          waypoint and route direction, clipped and rescaled
    symmetry      the mean action is mu(o) = (f(o) + M f(M o)) / 2, where M mirrors features or actions

Rays are read through an index table and are nearly free on a CPU; the CNN is for GPUs. Symmetry is built
in rather than learned (Abdolhosseini et al. 2019), which lowers the failure rate in unseen places. The features without
parameters are in envs/socnav/features.py.

    train      python ppo_grid_socnav.py                             10 million steps
    resume     python ppo_grid_socnav.py --resume runs/<run>
    2 ranks    torchrun --standalone --nproc-per-node 2 ppo_grid_socnav.py --threads 1
    evaluate   python tools/evaluate.py runs/<run> --episodes 270
    one map    python tools/evaluate.py runs/<run> --env-kwargs scenario francis2023_blind_corner
    rewards    python ppo_grid_socnav.py --reward snqi_step [--reward-weights FILE.json]
    deploy     runs/<run>/policy.onnx maps robot, goal, pedestrians, count and grid to an action inside the action space
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil, inf, log, pi, sqrt
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from gymnasium.spaces import Dict
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

from envs import UserError, float32_bounds
from envs import distributed as dist
from envs.cli import Steps, main
from envs.evaluation import DeterministicPolicy, Policy, check_finite, check_update, episode_result
from envs.run import Run, RunArgs, compile_fn, load_agent, make_envs, policy_contents, restore, rng_state, setup
from envs.socnav import features


@dataclass(kw_only=True)
class Args(RunArgs):  # RunArgs: run directory, evaluation, device, ...; steps_per_iteration, num_iterations
    env_id: str = "SocNavGrid-v0"  # environment with the observations of SocNavGrid-v0
    total_timesteps: Steps = 10_000_000  # environment steps, summed over all environments
    num_envs: int | Literal["auto"] = "auto"  # number of parallel environments; auto = 256 on CPU, 2048 on GPU
    num_steps: int = 32  # rollout length per environment

    grid_encoder: Literal["rays", "cnn"] = "rays"  # proximity along rays (fast), or a CNN over the grid
    num_rays: int = 36  # rays: number of rays per grid channel (even)
    cnn_channels: tuple[int, ...] = (8, 16, 16)  # cnn: channels of its three layers
    num_pedestrians: int = 8  # number of nearest pedestrians that the policy observes
    pedestrian_hidden: int = 16  # hidden units of the per-pedestrian MLP
    reward: str = "route_completion"  # training reward: simple, punish_action, snqi_step, route_completion
    reward_weights: str | None = None  # JSON file {term: weight} that overrides the weights of the reward

    learning_rate: float = 1e-3  # learning rate of Adam; usually 1e-4 to 1e-3
    anneal_lr: bool = True  # decay the learning rate linearly to zero
    weight_decay: float = 0.0  # decoupled weight decay (AdamW); 0 is Adam
    minibatch_size: int = 1024  # transitions per gradient step; must divide num_envs * num_steps
    update_epochs: int = 3  # passes over the rollout per update; usually 3 to 10
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE: 0 is one-step TD, 1 is Monte Carlo
    clip_coef: float = 0.2  # clipping range of the probability ratio; usually 0.1 to 0.3
    clip_vloss: bool = False  # also clip the value estimate to within clip_coef of its old value
    ent_coef: float = 0.0  # entropy bonus coefficient
    vf_coef: float = 0.5  # value loss coefficient
    max_grad_norm: float = 0.5  # maximum gradient norm
    target_kl: float | None = None  # stop an update early when the approximate KL divergence exceeds this
    norm_reward: bool = True  # divide rewards by the running standard deviation of the discounted return
    norm_adv: bool = True  # normalize advantages within each minibatch
    init_log_std: float = -0.7  # initial log standard deviation of the policy
    final_log_std: float | None = None  # anneal the log standard deviation linearly to this instead of learning it
    hidden_sizes: tuple[int, ...] = (96, 96)  # hidden layer sizes of actor and critic
    critic_warmup_updates: int = 0  # number of initial updates that train only the critic (for --pretrained)

    threads: int = 2  # CPU threads of PyTorch, which the simulator uses too; at most the number of idle cores
    eval_every: int = 500_000  # environment steps between evaluations; doubled after 3 million; 0 = only at the end
    checkpoint_every: int = 500_000  # environment steps between checkpoints; 0 = none

    preset_key: ClassVar = "grid_encoder"  # setting that names the preset, without --preset


# Channel `near` holds the obstacles in cells of a quarter of the side length, so with a quarter of the range.
# training_margin (m) is added to the robot's radius in training.
COMMON = {"env_kwargs": {"grid_channels": "near", "training_margin": 0.1}, "final_log_std": -2.0}
# {name: values that replace the defaults above}. --grid-encoder X --help shows the result.
PRESETS: dict[str, dict] = {
    "rays": COMMON,
    "cnn": {
        **COMMON, "grid_encoder": "cnn", "total_timesteps": 1_000_000, "update_epochs": 2, "learning_rate": 5e-4,
        "minibatch_size": 256,  # a sample takes less than half the time that it takes in a minibatch of 1,024
    },
}  # fmt: skip
Args.presets = PRESETS


class Normalizer(nn.Module):
    """Normalizes with a running mean and variance. They are buffers, so that the state_dict and the ONNX file of a
    module with a normalizer include them. Only update() changes them."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge the mean and variance of a batch (batch, *shape) into the running ones (Chan et al. 1979)."""
        n, total = len(x), self.count + len(x)
        batch_var, batch_mean = torch.var_mean(x, dim=0, correction=0)
        delta = batch_mean - self.mean
        sum_of_squares = self.var * self.count + batch_var * n + delta.square() * self.count * n / total
        self.var.copy_(sum_of_squares / total)
        self.mean.add_(delta * n / total)
        self.count.add_(n)


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return R <- gamma R + r. The statistics are
    updated once per rollout."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.stats = Normalizer()
        self.register_buffer("returns", torch.zeros(num_envs))

    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """Scale rewards; all arguments and the result have shape (T, N)."""
        returns, running_return = [], self.returns
        for t in range(len(reward)):
            returns.append(self.gamma * running_return + reward[t])
            running_return = returns[-1] * ~done[t]  # the next episode starts from zero
        self.returns.copy_(running_return)
        self.stats.update(torch.cat(returns))
        return (reward * torch.rsqrt(self.stats.var + 1e-8)).clamp(-10, 10)


def mlp(sizes: list[int], gain: float) -> nn.Sequential:
    """MLP with tanh activations and orthogonal initialization; `gain` scales the last layer."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layer = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(layer.weight, sqrt(2))
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    nn.init.orthogonal_(layer.weight, gain)
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """Encodes a feature vector (..., obs_dim) from GridAgent.encode_obs. Actor and critic have separate encoders."""

    def __init__(self, sizes: list[int], channels: int, grid_size: int, args: Args):
        super().__init__()
        self.sizes, self.channels, self.grid_size = sizes, channels, grid_size
        units = args.pedestrian_hidden
        pedestrian_layers = (nn.Linear(features.PEDESTRIAN_DIM, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU())
        self.pedestrian_mlp = nn.Sequential(*pedestrian_layers)
        self.output_dim = sizes[0] + 2 * units
        self.cnn: nn.Module | None = None
        if args.grid_encoder == "cnn":
            layers, in_channels = [], channels
            for out_channels, kernel in zip(args.cnn_channels, (5, 3, 3)):
                layers += [nn.Conv2d(in_channels, out_channels, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
                in_channels = out_channels
            self.cnn = nn.Sequential(*layers, nn.Flatten())
            self.output_dim += self.cnn(torch.zeros(1, channels, grid_size, grid_size)).shape[1]

    def forward(self, obs: Tensor) -> Tensor:
        dense_features, pedestrians, packed_grid = obs.split(self.sizes, dim=-1)
        # Permutation-invariant: a shared MLP, masked, then max and sum over the pedestrians
        pedestrians = pedestrians.unflatten(-1, (-1, features.PEDESTRIAN_DIM))
        mask = pedestrians[..., -1:]  # 0 if absent; embeddings are >= 0 (ReLU), so zeros change neither max nor sum
        embeddings = self.pedestrian_mlp(pedestrians) * mask
        parts = [dense_features, embeddings.max(-2).values, embeddings.sum(-2)]
        if self.cnn is not None:
            packed_grid = packed_grid.unflatten(-1, (self.channels, self.grid_size, -1))
            images = features.unpack_bits(packed_grid, self.grid_size)  # (..., channels, grid_size, grid_size)
            image_features = self.cnn(images.flatten(0, -4))  # Conv2d takes one batch dimension
            parts.append(image_features.reshape(*obs.shape[:-1], -1))
        return torch.cat(parts, dim=-1)


class GridAgent(nn.Module):
    """Gaussian policy and value function over the features (..., obs_dim) that encode_obs computes.

    Args:
        space: observation space of SocNavGrid-v0.
        low, high: bounds of the actions.
        max_speed: m/s of the robot.
    """

    def __init__(self, space: Dict, low: np.ndarray, high: np.ndarray, max_speed: float, args: Args):
        super().__init__()
        self.use_cnn, self.max_speed = args.grid_encoder == "cnn", max_speed
        self.num_pedestrians = min(args.num_pedestrians, space["pedestrians"].shape[0])
        channels, grid_size, _ = space["grid"].shape
        num_rays = 0 if self.use_cnn else args.num_rays
        packed_dim = channels * grid_size * ceil(grid_size / 8) if self.use_cnn else 0
        dense_dim = features.ROBOT_DIM + features.ROUTE_DIM + channels * num_rays
        sizes = [dense_dim, self.num_pedestrians * features.PEDESTRIAN_DIM, packed_dim]
        mirror_index, mirror_sign = features.mirror_permutation(
            num_rays, self.num_pedestrians, channels, grid_size, packed_dim
        )
        self.register_buffer("ray_indices", features.ray_indices(grid_size, args.num_rays), persistent=False)
        self.register_buffer("mirror_index", mirror_index, persistent=False)
        self.register_buffer("mirror_sign", mirror_sign, persistent=False)
        # Mirroring keeps the forward acceleration and negates the turn
        self.register_buffer("action_mirror", torch.tensor([1.0, -1.0]), persistent=False)

        def network(output_dim: int, gain: float) -> nn.Sequential:
            encoder = Encoder(sizes, channels, grid_size, args)
            return nn.Sequential(encoder, mlp([encoder.output_dim, *args.hidden_sizes, output_dim], gain))

        self.actor = network(len(low), gain=0.01)  # the initial mean action is near zero
        self.critic = network(1, gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.init_log_std))
        self.register_buffer("action_low", torch.as_tensor(low))
        self.register_buffer("action_high", torch.as_tensor(high))
        self.register_buffer("action_bias", torch.as_tensor((high + low) / 2))
        self.register_buffer("action_scale", torch.as_tensor((high - low) / 2))

    def forward(self, robot: Tensor, goal: Tensor, pedestrians: Tensor, count: Tensor, grid: Tensor) -> Tensor:
        """Deterministic policy: the mean action for a raw observation, scaled and clipped to the action space."""
        raw_obs = {"robot": robot, "goal": goal, "pedestrians": pedestrians, "count": count, "grid": grid}
        return self.scale_action(self.action_mean(self.encode_obs(raw_obs)))

    def encode_obs(self, raw_obs: dict[str, Tensor]) -> Tensor:
        """Convert a raw observation to features (N, obs_dim). This has no trainable parameters, so the rollout stores
        the result and all epochs reuse it."""
        robot, grid = raw_obs["robot"], raw_obs["grid"]
        route = features.route_features(raw_obs["goal"])
        nearest = raw_obs["pedestrians"][:, : self.num_pedestrians]
        pedestrians = features.pedestrian_features(nearest, raw_obs["count"], robot[:, :1] * self.max_speed).flatten(1)
        if self.use_cnn:
            # Eight cells in the forward direction share a number, so that mirroring permutes numbers but never bits
            return torch.cat([robot, route, pedestrians, features.pack_bits(grid).flatten(1).to(robot)], dim=1)
        return torch.cat([robot, route, features.ray_proximity(grid, self.ray_indices).to(robot), pedestrians], dim=1)

    def action_mean(self, obs: Tensor) -> Tensor:
        """Mean action (..., 2), symmetrized: (f(o) + M f(M o)) / 2."""
        both = torch.stack([obs, obs[..., self.mirror_index] * self.mirror_sign])
        action, mirrored = self.actor(both)
        return (action + mirrored * self.action_mirror) / 2

    def scale_action(self, action: Tensor) -> Tensor:
        """Map [-1, 1] to [low, high]. Clipping comes last, so that rounding cannot leave the action space."""
        return torch.clamp(self.action_bias + self.action_scale * action, self.action_low, self.action_high)

    def sample(self, obs: Tensor) -> Tensor:
        """Sample an action before scaling and clipping. Log-probabilities refer to it, not to the clipped action."""
        mean = self.action_mean(obs)
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(obs).squeeze(-1)

    def evaluate_actions(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi(action | obs), the entropy of the policy and V(obs), of shapes (...), () and (...)."""
        # log N(a; mu, sigma) = -z^2 / 2 - log sigma - log(2 pi) / 2, summed over dimensions, with z = (a - mu) / sigma
        z = (action - self.action_mean(obs)) / self.log_std.exp()
        log_scale = (self.log_std + 0.5 * log(2 * pi)).sum()
        logprob = -0.5 * z.square().sum(-1) - log_scale
        # The entropy of a Gaussian is log sigma + log(2 pi e) / 2 per dimension, whatever the state
        entropy = log_scale + 0.5 * len(self.log_std)
        return logprob, entropy, self.value(obs)


@dataclass
class Rollout:
    """T steps in N environments. Every field has shape (T, N, ...); index t is one complete transition."""

    obs: Tensor
    action: Tensor  # the sampled action before scaling and clipping
    next_obs: Tensor  # the true successor, also at the end of an episode
    reward: Tensor
    terminated: Tensor
    done: Tensor  # terminated or truncated


@torch.no_grad()
def collect_rollout(
    agent: GridAgent, envs: VectorEnv, obs: Tensor, step: int, args: Args
) -> tuple[Rollout, Tensor, list[dict]]:
    """Step all environments num_steps times from the features obs (N, obs_dim). Return the rollout, the next features
    and the finished episodes.

    The environments reset in the step that ends an episode (SAME_STEP autoreset), and info["final_obs"] holds the last
    observation of the episode. So each transition has its true successor, and the last step needs no special case.
    """
    device = agent.log_std.device
    transitions, episodes = [], []
    for _ in range(args.num_steps):
        action = agent.sample(obs)
        scaled_action = agent.scale_action(action)
        env_action = scaled_action if envs.on_gpu else scaled_action.cpu().numpy()
        raw_obs, reward, terminated, truncated, info = envs.step(env_action)
        next_obs = agent.encode_obs(to_tensors(raw_obs, device))
        step += args.num_envs  # over all ranks
        check_finite("observation", next_obs, f"step {step}")
        check_finite("reward", reward, f"step {step}")

        reward, terminated, truncated = (torch.as_tensor(x, device=device) for x in (reward, terminated, truncated))
        done, real_next_obs = terminated | truncated, next_obs
        if done.any():
            ended = done.nonzero().flatten()
            final_obs = {name: x[ended] for name, x in to_tensors(info["final_obs"], device).items()}
            real_next_obs = next_obs.index_copy(0, ended, agent.encode_obs(final_obs))
            check_finite("final observation", real_next_obs, f"step {step}")
            for i in ended.tolist():
                episodes.append({"step": step, **episode_result(info, i)})
        transitions.append((obs, action, real_next_obs, reward, terminated, done))
        obs = next_obs
    return Rollout(*map(torch.stack, zip(*transitions))), obs, episodes


def to_tensors(obs: dict, device: torch.device) -> dict[str, Tensor]:
    """Convert an observation to tensors on the device, without a copy if they are there already."""
    return {name: torch.as_tensor(x, device=device) for name, x in obs.items()}


def gae(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, args: Args) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016). All tensors and the result have shape (T, N).

    next_value[t] is V(next_obs[t]). Truncated episodes bootstrap from it; terminated episodes do not.
    """
    # delta_t = r_t + gamma V(s_{t+1}) - V(s_t), with V = 0 after a terminal state
    delta = reward + args.gamma * next_value * ~terminated - value
    not_done = (~done).to(delta.dtype)
    advantage = torch.zeros_like(delta)
    last_advantage = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        # A_t = delta_t + gamma lambda A_{t+1} within an episode
        last_advantage = delta[t] + args.gamma * args.gae_lambda * not_done[t] * last_advantage
        advantage[t] = last_advantage
    return advantage


Batch = dict[str, Tensor]  # every entry has shape (batch, ...)


@torch.no_grad()
def make_batch(agent: nn.Module, rollout: Rollout, args: Args) -> Batch:
    """Compute advantages, returns and the log-probabilities of the policy before the update, with batch size T * N."""
    logprob, _, value = agent.evaluate_actions(rollout.obs, rollout.action)
    next_value = agent.value(rollout.next_obs)
    advantage = gae(rollout.reward, value, next_value, rollout.terminated, rollout.done, args)
    returns = advantage + value
    return {
        "obs": rollout.obs.flatten(0, 1),
        "action": rollout.action.flatten(0, 1),
        "logprob": logprob.flatten(),
        "advantage": advantage.flatten(),
        "returns": returns.flatten(),
        "value": value.flatten(),
    }


def ppo_loss(agent: nn.Module, minibatch: Batch, args: Args, critic_only: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one minibatch and its statistics. With critic_only, the loss is the value loss alone."""
    logprob, entropy, value = agent.evaluate_actions(minibatch["obs"], minibatch["action"])
    log_ratio = logprob - minibatch["logprob"]
    ratio = log_ratio.exp()

    # L_policy = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)]
    advantage = minibatch["advantage"]
    if args.norm_adv:
        std, mean = torch.std_mean(advantage)
        advantage = (advantage - mean) / (std + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(advantage * ratio, advantage * clipped_ratio).mean()

    # L_value = E[(V - R)^2] / 2; with clipping, the larger of the errors of V and of V clipped around its old value
    value_error = (value - minibatch["returns"]).square()
    if args.clip_vloss:
        old_value = minibatch["value"]
        clipped_value = value.clamp(old_value - args.clip_coef, old_value + args.clip_coef)
        value_error = torch.max(value_error, (clipped_value - minibatch["returns"]).square())
    value_loss = 0.5 * value_error.mean()

    # L = L_policy + c_v L_value - c_e H[pi]
    loss = args.vf_coef * value_loss
    if not critic_only:
        loss = loss + policy_loss - args.ent_coef * entropy
    stats = {
        "policy_gradient_loss": policy_loss,
        "value_loss": value_loss,
        "entropy_loss": -entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean(),  # http://joschu.net/blog/kl-approx.html
        "clip_fraction": (ratio != clipped_ratio).float().mean(),
    }
    return loss, {name: x.detach() for name, x in stats.items()}


def backward(
    agent: nn.Module, parameters: list[Tensor], minibatch: Batch, args: Args, critic_only: bool
) -> dict[str, Tensor]:
    """Compute the gradient and clip its norm; the result is in each parameter's .grad. --compile compiles this."""
    loss, stats = ppo_loss(agent, minibatch, args, critic_only)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=False)  # foreach=False compiles to faster code
    return stats


def all_reduce_backward(
    backward_fn: Callable, agent: nn.Module, parameters: list[Tensor], minibatch: Batch, args: Args, critic_only: bool
) -> dict[str, Tensor]:
    """Data-parallel backward: advantages are normalized, and gradients and statistics averaged, over all ranks."""
    if args.norm_adv:
        std, mean = torch.std_mean(dist.all_gather(minibatch["advantage"]))
        minibatch = {**minibatch, "advantage": (minibatch["advantage"] - mean) / (std + 1e-8)}
    plain_args = replace(args, norm_adv=False, max_grad_norm=inf)  # normalization and clipping are done here
    stats = backward_fn(agent, parameters, minibatch, plain_args, critic_only)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # One exchange for all: the gradients, then the statistics
    average = dist.all_reduce_mean(nn.utils.parameters_to_vector([*gradients, *stats.values()]))
    nn.utils.vector_to_parameters(average[: -len(stats)], gradients)
    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=False)
    return dict(zip(stats, average[-len(stats) :]))


def ppo_update(
    agent: nn.Module, optimizer: Optimizer, backward_fn: Callable, batch: Batch, args: Args, critic_only: bool
) -> dict[str, float]:
    """Run update_epochs passes over the batch in shuffled minibatches. Return the mean statistics."""
    parameters = list(agent.parameters())
    stats_list: list[dict[str, Tensor]] = []
    kl_exceeded = False
    for _ in range(args.update_epochs):
        indices = torch.randperm(len(batch["obs"]), device=batch["obs"].device)
        minibatches = {name: x[indices].split(args.minibatch_size) for name, x in batch.items()}
        for i in range(len(minibatches["obs"])):
            optimizer.zero_grad()
            minibatch = {name: x[i] for name, x in minibatches.items()}
            stats = backward_fn(agent, parameters, minibatch, args, critic_only)
            stats_list.append(stats)
            kl_exceeded = args.target_kl is not None and stats["approx_kl"].item() > args.target_kl
            if kl_exceeded:
                break
            optimizer.step()
        if kl_exceeded:
            break
    mean_stats = {name: torch.stack([stats[name] for stats in stats_list]).mean().item() for name in stats_list[0]}
    unexplained = (batch["returns"] - batch["value"]).var() / batch["returns"].var()
    return {**mean_stats, "explained_variance": 1 - unexplained.item()}


def make_grid_agent(envs: VectorEnv, args: Args) -> GridAgent:
    """Raises UserError if the observations are not those of SocNavGrid-v0, or for invalid encoder settings."""
    space = envs.single_observation_space
    if not isinstance(space, Dict) or "grid" not in space.spaces:
        raise UserError("observations must be those of SocNavGrid-v0; ppo_continuous.py takes flat ones")
    if args.num_rays % 2 or len(args.cnn_channels) != 3:
        raise UserError("--num-rays must be even, half of the rays on either side, and --cnn-channels three numbers")
    low, high = float32_bounds(envs.single_action_space)
    return GridAgent(space, low, high, envs.robot.max_speed, args)


def train(args: Args, on_evaluation: Callable[[int, dict], bool | None] | None = None) -> dict:
    """Train PPO and return the contents of summary.json. on_evaluation(step, evaluation) is called after each
    evaluation; if it returns True, the run ends. torchrun starts several processes (ranks) that divide the environments
    and minibatches among them.

    Raises:
        UserError: invalid arguments, an unreadable file or an unsupported environment.
        FloatingPointError: a non-finite observation, reward, statistic or parameter.
    """
    if args.num_envs == "auto":
        args = replace(args, num_envs=2048 if args.device != "cpu" and torch.cuda.is_available() else 256)
    args, device = setup(args, distributed=True)
    torch.set_num_threads(1 if args.dry_run else args.threads)  # on busy cores, waiting threads use CPU time
    dist.init_process_group(args)
    args = dist.same_checkpoint(args)  # --resume: all ranks use the file that rank 0 finds
    local_args = dist.local_args(args)  # num_envs and minibatch_size of this rank; args has the totals over all ranks
    reward_kwargs = {"reward": args.reward} | ({"reward_weights": args.reward_weights} if args.reward_weights else {})
    envs = make_envs(local_args, device=device.type, **reward_kwargs)
    agent = make_grid_agent(envs, args).to(device)
    if args.final_log_std is not None:
        agent.log_std.requires_grad_(False)
    adam = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(agent.parameters(), **adam)
    reward_scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    backward_fn = compile_fn(backward) if args.compile else backward
    if dist.world_size() > 1:
        backward_fn = partial(all_reduce_backward, backward_fn)
    dist.seed_rank(args.seed)  # all ranks have the same initial weights; from here on their random numbers differ
    step, best = 0, None
    raw_obs, _ = envs.reset(seed=dist.local_seeds(args))

    # --resume also restores the random generators and returns a checkpoint; --pretrained only loads the agent
    checkpoint = restore(args, "policy", agent, optimizer=optimizer, reward_scaler=reward_scaler)
    if checkpoint:
        step, best = checkpoint["step"], checkpoint["best"]
        raw_obs = envs.load_state_dict(dist.restore_local(checkpoint))
    obs = agent.encode_obs(to_tensors(raw_obs, device))

    def policy_state() -> dict:
        return policy_contents("policy", Path(__file__).stem, args, agent, step)

    def checkpoint_state() -> dict:
        """The contents of a checkpoint: the policy and what else --resume needs. All ranks must call this."""
        local_states = dist.all_gather_object({"envs": envs.state_dict(), "rng": rng_state()})
        return {
            **policy_state(), "best": best, "optimizer": optimizer.state_dict(),
            "reward_scaler": reward_scaler.state_dict(), **local_states[0], "other_ranks": local_states[1:],
        }  # fmt: skip

    # Every rank trains; only rank 0 evaluates and writes files
    script, total_steps = Path(__file__).stem, args.num_iterations * args.steps_per_iteration
    with Run(script, args, total_steps, checkpoint) if dist.rank() == 0 else dist.NullRun() as run:
        stop = dist.broadcast_from_rank0(lambda: run.converged)  # a resumed run may have converged before
        for iteration in range(step // args.steps_per_iteration + 1, args.num_iterations + 1):
            if stop:
                break
            progress = (iteration - 1) / args.num_iterations
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            if args.final_log_std is not None:
                agent.log_std.fill_((1 - progress) * args.init_log_std + progress * args.final_log_std)

            rollout, obs, episodes = collect_rollout(agent, envs, obs, step, args)
            step += args.steps_per_iteration
            if args.norm_reward:  # with statistics over all ranks, so that they stay identical
                reward = reward_scaler(dist.all_gather(rollout.reward, dim=1), dist.all_gather(rollout.done, dim=1))
                rollout.reward = dist.local_shard(reward, dim=1)
            critic_only = iteration <= args.critic_warmup_updates
            batch = make_batch(agent, rollout, args)
            stats = ppo_update(agent, optimizer, backward_fn, batch, local_args, critic_only)
            stats["learning_rate"] = optimizer.param_groups[0]["lr"]
            check_update(agent, stats, step)  # raises FloatingPointError unless all is finite

            evaluation = None
            eval_interval = args.eval_every * (2 if step > 3_000_000 else 1)
            if iteration == args.num_iterations or args.is_due(eval_interval, step):
                evaluation = dist.broadcast_from_rank0(run.evaluate, DeterministicPolicy(agent), step)
                if run.is_best(evaluation, best):
                    best = {"step": step, "agent": deepcopy(agent.state_dict()), "evaluation": evaluation}
                    run.save("best.pt", policy_state())
                stop = bool(on_evaluation and on_evaluation(step, evaluation)) or run.converged
            # Rank 0 logs the episodes of all ranks, and decides for all whether to stop and to write latest.pt
            gathered = dist.all_gather_object((episodes, stop, run.stop_requested, run.latest_due))
            _, stop, stop_requested, latest_due = gathered[0]
            episodes = sorted((episode for rank in gathered for episode in rank[0]), key=lambda e: e["step"])
            run.log(step, stats, episodes, evaluation)
            if stop_requested and iteration < args.num_iterations:  # Ctrl-C, SIGTERM or SIGUSR1
                return run.interrupted(checkpoint_state())
            if args.is_due(args.checkpoint_every, step):
                run.save(f"checkpoints/step_{step:09d}.pt", checkpoint_state())
            elif latest_due:
                run.save("checkpoints/latest.pt", checkpoint_state())

        return run.finish(checkpoint_state(), agent, best, envs)  # final.pt; the best policy becomes policy.onnx


def load_policy(checkpoint: dict, envs: VectorEnv) -> Policy:
    """Build the deterministic policy of a policy file, for evaluation and as an expert for cloning."""
    args = Args.from_checkpoint(checkpoint)
    agent = make_grid_agent(envs, args)
    load_agent(agent, checkpoint, args)
    return DeterministicPolicy(agent)


if __name__ == "__main__":
    main(train, Args)
