"""Residual reinforcement learning with PPO in one file (PyTorch + Gymnasium).

A base policy (inverse kinematics, a controller, a cloned network) solves most of the task. It is frozen, and a small
network learns a correction, so training starts from the performance of the base policy (Silver et al. 2018; Johannink
et al. 2019):

    action = clip(base(obs) + alpha * residual_scale * clip(residual(obs), -1, 1), low, high)
    reward = task reward - residual_penalty * |clip(residual, -1, 1)|^2              in training only

The residual is a Gaussian policy trained with standard PPO (Schulman et al. 2017).

    train      python ppo_residual.py                                50,000 steps, half a minute
    resume     python ppo_residual.py --resume runs/<run>
    evaluate   python tools/evaluate.py runs/<run> --compare-base --episodes 200
    base only  python tools/evaluate.py ik --env-id SO101Paper-v0
    no base    python ppo_residual.py --base-policy zero             500,000 steps, three minutes
    deploy     runs/<run>/policy.onnx maps a raw observation to a residual in [-1, 1]; add it to the base as above
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from math import log, pi, sqrt
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

from envs import check_flat_box
from envs.cli import Steps, main
from envs.evaluation import DeterministicPolicy, Policy, check_finite, check_update, episode_result, make_base_policy
from envs.run import Run, RunArgs, compile_fn, load_agent, make_envs, policy_contents, restore, rng_state, setup


@dataclass(kw_only=True)
class Args(RunArgs):  # RunArgs: run directory, evaluation, device, ...; steps_per_iteration, num_iterations
    env_id: str = "SO101Paper-v0"  # environment with flat Box observations and actions
    total_timesteps: Steps = 50_000  # total environment steps; with action repeat k, one action counts as k steps
    num_envs: int = 64  # number of parallel environments
    num_steps: int = 32  # rollout length per environment

    base_policy: str = "ik"  # zero, a controller of the environment, PATH.onnx, or blend:A:B:w for w A + (1 - w) B
    alpha: float = 1.0  # factor on residual_scale; only their product has an effect
    residual_scale: float = 0.02  # action (rad) per unit of residual at alpha = 1
    residual_penalty: float = 0.001  # cost of |clipped residual|^2 per action, in training only

    learning_rate: float = 1e-3  # learning rate of Adam; usually 1e-4 to 1e-3
    anneal_lr: bool = True  # decay the learning rate linearly to zero
    weight_decay: float = 0.0  # decoupled weight decay (AdamW); 0 is Adam
    minibatch_size: int = 512  # transitions per gradient step; must divide num_envs * num_steps
    update_epochs: int = 15  # passes over the rollout per update; usually 3 to 20
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE: 0 is one-step TD, 1 is Monte Carlo
    clip_coef: float = 0.2  # clipping range of the probability ratio; usually 0.1 to 0.3
    clip_vloss: bool = False  # also clip the value estimate to within clip_coef of its old value
    ent_coef: float = 0.005  # entropy bonus coefficient
    vf_coef: float = 0.5  # value loss coefficient
    max_grad_norm: float = 0.5  # maximum gradient norm
    target_kl: float | None = None  # stop an update early when the approximate KL divergence exceeds this
    norm_obs: bool = True  # normalize observations with running statistics
    norm_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    norm_adv: bool = True  # normalize advantages within each minibatch
    init_log_std: float = -0.5  # initial log standard deviation of the policy
    final_log_std: float | None = None  # anneal the log standard deviation linearly to this instead of learning it
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layer sizes of actor and critic
    critic_warmup_updates: int = 0  # number of initial updates that train only the critic (for --pretrained)
    freeze_obs_stats: bool = False  # do not update the observation statistics loaded by --pretrained

    eval_every: int = 12_500  # environment steps between evaluations on the validation split; 0 = only at the end
    checkpoint_every: int = 10_000  # environment steps between checkpoints; 0 = none

    preset_key: ClassVar = "base_policy"  # setting that names the preset, without --preset


# The defaults are tuned for ik; docs/results/so101.md lists what was tried. A larger init_log_std gives policies whose
# noisy actions succeed where their mean action fails.
# {name: values that replace the defaults above}. --base-policy X --help shows the result.
PRESETS: dict[str, dict] = {
    # Without a base policy the residual must move the arm by as much per step as a base would. These settings were
    # chosen on seeds 1 to 5.
    "zero": {
        "env_kwargs": {"reach_weight": 60.0, "yaw_weight": 9.0, "success_reward": 3.0},
        "base_policy": "zero", "alpha": 0.7, "residual_scale": 0.04, "total_timesteps": 500_000, "num_envs": 32,
        "num_steps": 128, "update_epochs": 10, "gamma": 0.98, "gae_lambda": 0.8, "eval_every": 50_000,
        "checkpoint_every": 50_000,
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


class Agent(nn.Module):
    """Gaussian policy and value function of raw observations (..., obs_dim)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, args: Args):
        super().__init__()
        self.normalizer = Normalizer((obs_dim,)) if args.norm_obs else nn.Identity()
        self.actor = mlp([obs_dim, *args.hidden_sizes, len(low)], gain=0.01)  # the initial mean action is near zero
        self.critic = mlp([obs_dim, *args.hidden_sizes, 1], gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.init_log_std))
        self.register_buffer("action_low", torch.as_tensor(low))
        self.register_buffer("action_high", torch.as_tensor(high))
        self.register_buffer("action_bias", torch.as_tensor((high + low) / 2))
        self.register_buffer("action_scale", torch.as_tensor((high - low) / 2))

    def forward(self, obs: Tensor) -> Tensor:
        """Deterministic policy: the mean action, scaled and clipped to the action space."""
        return self.scale_action(self.action_mean(obs))

    def action_mean(self, obs: Tensor) -> Tensor:
        """Mean of the Gaussian policy (..., action_dim)."""
        return self.actor(self.normalizer(obs))

    def scale_action(self, action: Tensor) -> Tensor:
        """Map [-1, 1] to [low, high]. Clipping comes last, so that rounding cannot leave the action space."""
        return torch.clamp(self.action_bias + self.action_scale * action, self.action_low, self.action_high)

    def sample(self, obs: Tensor) -> Tensor:
        """Sample an action before scaling and clipping. Log-probabilities refer to it, not to the clipped action."""
        mean = self.action_mean(obs)
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.normalizer(obs)).squeeze(-1)

    def evaluate_actions(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi(action | obs), the entropy of the policy and V(obs), of shapes (...), () and (...)."""
        obs = self.normalizer(obs)
        # log N(a; mu, sigma) = -z^2 / 2 - log sigma - log(2 pi) / 2, summed over dimensions, with z = (a - mu) / sigma
        z = (action - self.actor(obs)) / self.log_std.exp()
        log_scale = (self.log_std + 0.5 * log(2 * pi)).sum()
        logprob = -0.5 * z.square().sum(-1) - log_scale
        # The entropy of a Gaussian is log sigma + log(2 pi e) / 2 per dimension, whatever the state
        entropy = log_scale + 0.5 * len(self.log_std)
        return logprob, entropy, self.critic(obs).squeeze(-1)


def apply_residual(base_action: np.ndarray, residual: np.ndarray, scale: float, space: Box) -> np.ndarray:
    """Residual policy: the base action plus a small, bounded correction."""
    return np.clip(base_action + scale * np.clip(residual, -1, 1), space.low, space.high)


class ResidualPolicy:
    """Base policy plus residual policy; scale is alpha * residual_scale."""

    def __init__(self, residual_policy: Policy, base_policy: Policy, scale: float, space: Box):
        self.residual_policy, self.base_policy, self.scale, self.space = residual_policy, base_policy, scale, space

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return apply_residual(self.base_policy(obs), self.residual_policy(obs), self.scale, self.space)


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
    agent: Agent, base_policy: Policy, envs: VectorEnv, obs: np.ndarray, step: int, args: Args
) -> tuple[Rollout, np.ndarray, list[dict]]:
    """Step all environments num_steps times. Return the rollout, the observation to continue from and the episodes that
    ended.

    The environments reset in the step that ends an episode (SAME_STEP autoreset); info["final_obs"] (N, obs_dim) is its
    last observation. So each transition has its true successor, and the last step needs no special case.
    """
    device = agent.log_std.device
    transitions, episodes = [], []
    for _ in range(args.num_steps):
        base_action = base_policy(obs)
        check_finite("base action", base_action, f"step {step}")
        residual = agent.sample(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
        env_action = apply_residual(base_action, residual, args.alpha * args.residual_scale, envs.single_action_space)
        next_obs, reward, terminated, truncated, info = envs.step(env_action)
        step += envs.num_envs * envs.action_repeat
        check_finite("observation", next_obs, f"step {step}")
        check_finite("reward", reward, f"step {step}")
        reward = reward - args.residual_penalty * np.square(np.clip(residual, -1, 1)).sum(1)

        done, real_next_obs = terminated | truncated, next_obs
        if done.any():
            real_next_obs = np.where(done[:, None], info["final_obs"], next_obs)
            check_finite("final observation", real_next_obs, f"step {step}")
            for i in np.flatnonzero(done):
                episodes.append({"step": step, **episode_result(info, i)})
        transitions.append((obs, residual, real_next_obs, reward, terminated, done))  # the agent's action: the residual
        obs = next_obs

    def stack(arrays: tuple[np.ndarray, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(np.stack(arrays), dtype=dtype, device=device)

    obs_list, residuals, next_obs_list, rewards, terminated_list, done_list = zip(*transitions)
    floats = (stack(obs_list), stack(residuals), stack(next_obs_list), stack(rewards))
    return Rollout(*floats, stack(terminated_list, torch.bool), stack(done_list, torch.bool)), obs, episodes


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


def make_residual_agent(envs: VectorEnv, args: Args) -> Agent:
    """The agent's actions are residuals: its action space is [-1, 1], and scale_action only clips."""
    check_flat_box(envs)
    bound = np.ones(envs.single_action_space.shape, np.float32)
    return Agent(envs.single_observation_space.shape[0], -bound, bound, args)


def train(args: Args, on_evaluation: Callable[[int, dict], bool | None] | None = None) -> dict:
    """Train PPO and return the contents of summary.json. on_evaluation(step, evaluation) is called after each
    evaluation; if it returns True, the run ends.

    Raises:
        UserError: invalid arguments, an unreadable file or an unsupported environment.
        FloatingPointError: a non-finite observation, reward, statistic or parameter.
    """
    args, device = setup(args)
    envs = make_envs(args)
    agent = make_residual_agent(envs, args).to(device)
    base_policy = make_base_policy(args.base_policy, envs)
    if args.final_log_std is not None:
        agent.log_std.requires_grad_(False)
    adam = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(agent.parameters(), **adam)
    reward_scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    backward_fn = compile_fn(backward) if args.compile else backward
    step, best = 0, None
    obs, _ = envs.reset(seed=args.seed)

    # --resume also restores the random generators and returns a checkpoint; --pretrained only loads the agent
    checkpoint = restore(args, "residual", agent, optimizer=optimizer, reward_scaler=reward_scaler)
    if checkpoint:
        obs = envs.load_state_dict(checkpoint["envs"])  # returns the observations
        step, best = checkpoint["step"], checkpoint["best"]

    def policy_state() -> dict:
        return policy_contents("residual", Path(__file__).stem, args, agent, step)

    def checkpoint_state() -> dict:
        """The contents of a checkpoint: the policy and everything else that --resume needs."""
        return {
            **policy_state(), "best": best, "optimizer": optimizer.state_dict(), "envs": envs.state_dict(),
            "reward_scaler": reward_scaler.state_dict(), "rng": rng_state(),
        }  # fmt: skip

    with Run(Path(__file__).stem, args, args.num_iterations * args.steps_per_iteration, checkpoint) as run:
        for iteration in range(step // args.steps_per_iteration + 1, args.num_iterations + 1):
            if run.converged:  # --stop-at-convergence; tested here so that resuming a converged run ends it
                break
            progress = (iteration - 1) / args.num_iterations
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            if args.final_log_std is not None:
                agent.log_std.fill_((1 - progress) * args.init_log_std + progress * args.final_log_std)

            rollout, obs, episodes = collect_rollout(agent, base_policy, envs, obs, step, args)
            step += args.steps_per_iteration
            if args.norm_reward:
                rollout.reward = reward_scaler(rollout.reward, rollout.done)
            # The first rollout fills the normalizer before the update, so that the networks never train on raw
            # observations. That makes it slightly off-policy, which is harmless: the initial mean action is near zero.
            normalizer_is_empty = args.norm_obs and agent.normalizer.count.item() == 0
            if normalizer_is_empty:
                agent.normalizer.update(rollout.obs.flatten(0, 1))
            critic_only = iteration <= args.critic_warmup_updates
            batch = make_batch(agent, rollout, args)
            stats = ppo_update(agent, optimizer, backward_fn, batch, args, critic_only)
            stats["learning_rate"] = optimizer.param_groups[0]["lr"]
            stats["residual_magnitude"] = rollout.action.clamp(-1, 1).norm(dim=-1).mean().item()
            # Later updates of the normalizer come after the epochs, so that old and new log-probabilities use the same
            # normalization. There are none during the critic warm-up, in which the mean action must not change.
            if args.norm_obs and not (normalizer_is_empty or critic_only or args.freeze_obs_stats):
                agent.normalizer.update(rollout.obs.flatten(0, 1))
            check_update(agent, stats, step)  # raises FloatingPointError unless all is finite

            evaluation = None
            if iteration == args.num_iterations or args.is_due(args.eval_every, step):
                scale, space = args.alpha * args.residual_scale, envs.single_action_space
                residual_policy = ResidualPolicy(DeterministicPolicy(agent), base_policy, scale, space)
                evaluation = run.evaluate(residual_policy, step)
                if run.is_best(evaluation, best):
                    best = {"step": step, "agent": deepcopy(agent.state_dict()), "evaluation": evaluation}
                    run.save("best.pt", policy_state())
            run.log(step, stats, episodes, evaluation)
            if evaluation and on_evaluation and on_evaluation(step, evaluation):
                break
            if run.stop_requested and iteration < args.num_iterations:  # Ctrl-C, SIGTERM or SIGUSR1
                return run.interrupted(checkpoint_state())
            run.save_checkpoint_if_due(checkpoint_state, step)

        return run.finish(checkpoint_state(), agent, best, envs)  # final.pt; the best policy becomes policy.onnx


def load_policy(checkpoint: dict, envs: VectorEnv) -> Policy:
    """Build the deterministic policy of a policy file, base included, for evaluation and as an expert for cloning."""
    args = Args.from_checkpoint(checkpoint)
    agent = make_residual_agent(envs, args)
    load_agent(agent, checkpoint, args)
    base_policy = make_base_policy(args.base_policy, envs)
    scale, space = args.alpha * args.residual_scale, envs.single_action_space
    return ResidualPolicy(DeterministicPolicy(agent), base_policy, scale, space)


if __name__ == "__main__":
    main(train, Args)
