"""Behavioral cloning in one file: record an expert's demonstrations and train a network to imitate them.

A demonstration is a sequence of pairs (obs_t, action_t). The network has the architecture of the environment's PPO
script, so that PPO can start from the clone. Cloning is supervised regression on the expert's actions,

    L = E[|mu(obs) - action|^2]        or, with --loss nll,        L = -E[log pi(action | obs)]

The critic is trained on the returns-to-go of the recorded episodes, G_t = r_t + gamma G_t+1. An expert without errors
never demonstrates how to recover from one. With --action-noise the executed action is perturbed, but the intended one
is recorded. With --dagger-policy another policy, such as an earlier clone, acts in every other environment while the
expert labels its states, as in DAgger (Ross et al. 2011) but in a dataset of its own.

    expert     python ppo_continuous.py --env-id Ballbot-v0                         or a controller of the environment
    collect    python bc_pretrain.py collect --policy runs/<run> --dataset ballbot --action-noise 0.1
    validate   python bc_pretrain.py validate ballbot
    inspect    python bc_pretrain.py inspect ballbot --episode 3 --render human
    train      python bc_pretrain.py train --dataset ballbot
    fine-tune  python ppo_continuous.py --env-id Ballbot-v0 --pretrained runs/<clone> --critic-warmup-updates 3
    evaluate   python tools/evaluate.py runs/<clone>
"""

import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import inf, log, pi, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gymnasium.spaces import Dict
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

from envs import UserError, check_flat_box, demonstrations, evaluation, float32_bounds, make_vec
from envs.cli import one_line_errors, parse
from envs.demonstrations import Dataset, read_dataset
from envs.evaluation import DeterministicPolicy, Policy, check_same_kwargs, check_update
from envs.run import BaseArgs, EnvKwargs, Run, Thresholds, check_args, check_evaluation, load_agent, policy_contents


@dataclass(kw_only=True)
class CollectArgs:
    dataset: str  # dataset name: writes <run-root>/datasets/NAME.npz and its metadata NAME.json
    policy: str = "feedforward"  # expert: policy file, run (its best.pt), controller of the environment or PATH.onnx
    env_id: str | None = None  # environment; default: that of the policy file; feedforward: LateralControl-v0
    env_kwargs: EnvKwargs = field(default_factory=dict)  # keyword arguments for the environment, added to the policy's
    episodes: int = 200  # total number of episodes, divided among the seeds
    seeds: tuple[int, ...] = (42,)  # seeds of the episodes and of the noise
    only_successes: bool = False  # keep only successful episodes
    action_noise: float = 0.0  # standard deviation of the noise as a fraction of half the action range; often 0.05-0.1
    dagger_policy: str | None = None  # DAgger: policy file or run that acts in every other environment
    threads: int | None = None  # CPU threads of the bundled simulators; None = one per core with MuJoCo, else one
    run_root: str = "runs"  # parent directory of datasets/ and of all run directories


@dataclass(kw_only=True)
class ValidateArgs:
    dataset: tyro.conf.Positional[str]  # dataset name, or path to its .npz
    env_id: str | None = None  # repeat it if your own module registers the environment (MODULE:ID)
    run_root: str = "runs"  # parent directory of datasets/


@dataclass(kw_only=True)
class InspectArgs(ValidateArgs):
    episode: int | None = None  # show one episode, an index from 0
    video: bool = False  # with --episode: replay it to a video beside the dataset
    render: Literal["human"] | None = None  # with --episode: replay it in a window


@dataclass(kw_only=True)
class Args(BaseArgs):  # BaseArgs: environment, evaluation, run directory, tracking
    dataset: str = tyro.MISSING  # dataset name, or path to its .npz; required
    env_id: str | None = None  # environment; default: that of the dataset
    loss: Literal["mse", "nll"] = "mse"  # mse: of the mean action; nll: also learns the standard deviation
    epochs: int = 40  # maximum number of epochs
    patience: int = 8  # stop after this many epochs without a smaller validation loss; 1 or more
    val_fraction: float = 0.1  # fraction of the episodes held out for validation
    minibatch_size: int = 256  # samples per gradient step
    learning_rate: float = 1e-3  # learning rate of Adam, decayed linearly to zero
    weight_decay: float = 0.0  # decoupled weight decay (AdamW); 0 is Adam
    critic: bool = True  # also train the critic on the returns-to-go
    init_log_std: float = -0.5  # log standard deviation of the policy; not trained with --loss mse

    # None: from DEFAULTS below, which repeats the PPO presets; PPO should fine-tune with the same values
    gamma: float | None = None  # discount factor of the returns-to-go
    norm_obs: bool | None = None  # normalize observations with the statistics of the training episodes
    hidden_sizes: tuple[int, ...] | None = None  # hidden layer sizes of actor and critic
    eval_episodes: int | None = None  # episodes of the evaluation; 0 = all, if the environment has a fixed number
    eval_every: int = 0  # epochs between evaluations, which then select best.pt; 0 = by validation loss, evaluated last
    best_metric: str = "auto"  # with --eval-every: metric that selects best.pt
    stop_at_convergence: Thresholds | None = (
        None  # with --eval-every: stop when three evaluations meet METRIC THRESHOLD
    )

    grid_encoder: Literal["rays", "cnn"] = "rays"  # encoder of occupancy grids: fixed rays (fast) or a CNN
    num_rays: int = 36  # rays per grid channel; even
    cnn_channels: tuple[int, ...] = (8, 16, 16)  # channels of the three convolutions
    num_pedestrians: int = 8  # nearest pedestrians that the policy observes
    pedestrian_hidden: int = 16  # hidden units of the pedestrian network


# Values of settings left at None, by environment
DEFAULTS: dict[str, dict] = {
    "LateralControl-v0": {"gamma": 0.9, "norm_obs": False, "eval_episodes": 0},
    "Ballbot-v0": {"gamma": 0.998, "eval_episodes": 72},
    "BallbotDepth-v0": {"gamma": 0.998, "eval_episodes": 72},
    "SocNavGrid-v0": {"norm_obs": False, "hidden_sizes": (96, 96)},
}
OTHER_DEFAULTS = {"gamma": 0.99, "norm_obs": True, "hidden_sizes": (64, 64), "eval_episodes": 100}


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


def make_agent(envs: VectorEnv, args: Args) -> Agent:
    check_flat_box(envs)
    low, high = float32_bounds(envs.single_action_space)
    return Agent(envs.single_observation_space.shape[0], low, high, args)


def make_clone(envs: VectorEnv, args: Args) -> nn.Module:
    """The network of the PPO script for this environment."""
    if isinstance(envs.single_observation_space, Dict):
        from ppo_grid_socnav import make_grid_agent

        if args.norm_obs:
            raise UserError("a grid policy does not normalize observations; set --norm-obs False")
        return make_grid_agent(envs, args)
    return make_agent(envs, args)


def returns_to_go(reward: np.ndarray, episode_starts: np.ndarray, terminated: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_t+1 within each of m episodes; reward (n,), episode_starts (m + 1,), terminated (m,) -> (n,).

    Terminated episodes end with value 0. Truncated ones are assumed to keep earning their mean reward, which is worth
    mean(r) / (1 - gamma)."""
    returns = np.zeros(len(reward))
    for start, end, is_terminal in zip(episode_starts[:-1], episode_starts[1:], terminated):
        next_return = 0.0 if is_terminal else reward[start:end].mean() / max(1 - gamma, 1e-3)
        for t in reversed(range(start, end)):
            next_return = reward[t] + gamma * next_return
            returns[t] = next_return
    return returns


def training_data(agent: nn.Module, dataset: Dataset, args: Args) -> dict[str, Tensor]:
    """Features obs (n, obs_dim), actions scaled to [-1, 1] (n, action_dim) and returns-to-go divided by their standard
    deviation (n,). PPO scales its rewards differently; a few --critic-warmup-updates adapt the critic."""
    features = []
    for start in range(0, len(dataset["reward"]), 4096):
        obs = dataset.obs(slice(start, start + 4096))
        if isinstance(obs, dict):
            obs = agent.encode_obs({name: torch.as_tensor(x) for name, x in obs.items()})  # no trainable parameters
        features.append(torch.as_tensor(obs))
    action = (torch.as_tensor(dataset["action"]) - agent.action_bias) / agent.action_scale
    returns = returns_to_go(dataset["reward"], dataset["episode_starts"], dataset["terminated"], args.gamma)
    returns = torch.as_tensor(returns / (returns.std() + 1e-8))
    return {"obs": torch.cat(features).float(), "action": action, "returns": returns.float()}


def bc_loss(agent: nn.Module, batch: dict[str, Tensor], args: Args) -> Tensor:
    """Cloning loss of a batch, (). Actions are scaled to [-1, 1]."""
    if args.loss == "nll":
        logprob, _, _ = agent.evaluate_actions(batch["obs"], batch["action"])
        return -logprob.mean()
    error = agent.action_mean(batch["obs"]) - batch["action"]
    return error.square().sum(-1).mean()


def train_epoch(agent: nn.Module, optimizer: Optimizer, data: dict[str, Tensor], args: Args) -> float:
    """Take a gradient step on each shuffled minibatch. Returns the mean cloning loss."""
    indices = torch.randperm(len(data["obs"]))
    minibatches = {name: x[indices].split(args.minibatch_size) for name, x in data.items()}
    losses = []
    for i in range(len(minibatches["obs"])):
        optimizer.zero_grad()
        minibatch = {name: x[i] for name, x in minibatches.items()}
        loss = bc_loss(agent, minibatch, args)
        losses.append(loss.detach())
        if args.critic:  # actor and critic have no parameters in common, so the losses can be added
            value_error = agent.value(minibatch["obs"]) - minibatch["returns"]
            loss = loss + value_error.square().mean()
        loss.backward()
        optimizer.step()
    return torch.stack(losses).mean().item()


def split_episodes(episode_starts: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split whole episodes at random into training and validation. Returns the indices of their steps."""
    num_episodes = len(episode_starts) - 1
    num_val = min(max(1, round(val_fraction * num_episodes)), num_episodes - 1)
    is_val = np.zeros(num_episodes, bool)
    is_val[np.random.default_rng(seed).permutation(num_episodes)[:num_val]] = True
    is_val_step = np.repeat(is_val, np.diff(episode_starts))
    return np.flatnonzero(~is_val_step), np.flatnonzero(is_val_step)


def load_dataset(args: Args) -> tuple[Dataset, Args]:
    """Read the dataset and fill in the settings that depend on it."""
    dataset = read_dataset(args)
    if dataset.metadata.get("quality") == "quarantined" or not dataset.is_unchanged():
        raise UserError(f"{dataset.file}: does not pass its checks, see validate; collect it again")
    if len(dataset) < 2:
        raise UserError(f"{dataset.file}: one episode cannot be split into training and validation; collect more")
    args = replace(args, env_id=args.env_id or dataset.env_id, env_kwargs=dataset.env_kwargs | args.env_kwargs)
    defaults = OTHER_DEFAULTS | DEFAULTS.get(args.env_id, {})
    args = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    return dataset, replace(args, epochs=1, eval_episodes=2) if args.dry_run else args


def train(args: Args) -> dict:
    """Clone an expert and return the contents of summary.json.

    Raises:
        UserError: invalid arguments or dataset.
        FloatingPointError: a loss or parameter is not finite.
    """
    check_args(args)
    if args.minibatch_size < 1 or args.val_fraction >= 1:
        raise UserError("--minibatch-size must be 1 or more, and --val-fraction below 1")
    dataset, args = load_dataset(args)
    check_evaluation(args)
    if args.stop_at_convergence and args.eval_every == 0:
        raise UserError("--stop-at-convergence needs --eval-every, a number of epochs")
    torch.set_num_threads(1)  # for layers of 64 units more threads cost more than they save
    torch.manual_seed(args.seed)
    envs = make_vec(args.env_id, 1, **args.env_kwargs)
    agent = make_clone(envs, args)
    check_same_kwargs(str(dataset.file), dataset.env_kwargs, args.env_kwargs, envs)
    if mismatch := demonstrations.shape_mismatch(dataset, envs):
        raise UserError(f"{dataset.file}: its shapes do not fit {args.env_id}: {mismatch}")
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    data = training_data(agent, dataset, args)
    train_idx, val_idx = split_episodes(dataset["episode_starts"], args.val_fraction, args.seed)
    train_data = {name: x[train_idx] for name, x in data.items()}
    val_data = {name: x[val_idx] for name, x in data.items()}
    if args.norm_obs:
        agent.normalizer.update(train_data["obs"])
    script, best = Path(__file__).stem, None

    def policy_state() -> dict:
        """The contents of a policy file: the best epoch."""
        return policy_contents("policy", script, args, agent, best["step"]) | {"agent": best["agent"]}

    with Run(script, args, args.epochs) as run:
        for epoch in range(1, args.epochs + 1):
            progress = (epoch - 1) / args.epochs
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            stats = {"loss": train_epoch(agent, optimizer, train_data, args)}
            with torch.no_grad():
                stats["validation/loss"] = bc_loss(agent, val_data, args).item()
                value_error = agent.value(val_data["obs"]) - val_data["returns"]
                stats["validation/critic_loss"] = value_error.square().mean().item()
            check_update(agent, stats, epoch)
            # Cloning cannot be resumed: Ctrl-C, SIGTERM or SIGUSR1 make this epoch the last one
            is_last, evaluation = epoch == args.epochs or run.stop_requested, None
            if args.eval_every == 0:
                improved = best is None or stats["validation/loss"] < best["loss"]
            elif improved := is_last or epoch % args.eval_every == 0:
                evaluation = run.evaluate(DeterministicPolicy(agent), epoch)
                improved = run.is_best(evaluation, best)
            if improved:
                about = {"step": epoch, "loss": stats["validation/loss"], "evaluation": evaluation}
                best = {**about, "agent": deepcopy(agent.state_dict())}
                run.save("best.pt", policy_state())
            is_last = is_last or run.converged or (best is not None and epoch - best["step"] >= args.patience)
            if is_last and args.eval_every == 0:
                agent.load_state_dict(best["agent"])  # the best epoch is evaluated and logged with the last one
                evaluation = best["evaluation"] = run.evaluate(DeterministicPolicy(agent), epoch)
            run.log(epoch, stats, evaluation=evaluation)
            if is_last:
                break
        return run.finish(policy_state(), agent, best, envs)


class Recorder:
    """Wraps the expert: records observations and intended actions, adds noise with standard deviation noise_std
    (action_dim,) to the executed actions, and lets the DAgger policy, if any, act in every other environment."""

    def __init__(self, expert: Policy, dagger_policy: Policy | None, noise_std: np.ndarray, packed: dict, seed: int):
        self.expert, self.dagger_policy, self.noise_std, self.packed = expert, dagger_policy, noise_std, packed
        self.rng = np.random.default_rng(seed)
        self.running: dict[int, list[dict]] = {}  # {episode index: its steps so far}
        self.episodes: dict[int, dict] = {}  # {episode index: its arrays (T, ...)}

    def reset(self, indices: np.ndarray, envs: VectorEnv) -> None:
        for policy in (self.expert, self.dagger_policy):
            if hasattr(policy, "reset"):
                policy.reset(indices, envs)

    def __call__(self, obs: Any) -> np.ndarray:
        action = np.asarray(self.expert(obs), np.float32)
        executed_action = action + self.noise_std * self.rng.standard_normal(action.shape)
        if self.dagger_policy is not None:
            executed_action[1::2] = self.dagger_policy(obs)[1::2]
        executed_action = executed_action.astype(np.float32)  # which the environment clips
        obs = demonstrations.pack_obs(obs, self.packed)
        self.step = {**obs, "action": action, "executed_action": executed_action}
        return executed_action

    def on_step(self, episodes: np.ndarray, reward: np.ndarray, terminated: np.ndarray, done: np.ndarray) -> None:
        """Called after each step. Environment i is in episode episodes[i]; its last `terminated` is kept."""
        step = {**self.step, "reward": reward.astype(np.float32), "terminated": terminated}
        for i, episode in enumerate(episodes.tolist()):
            self.running.setdefault(episode, []).append({name: x[i].copy() for name, x in step.items()})

    def on_episode(self, episode: int, result: dict) -> None:
        steps = self.running.pop(episode)
        self.episodes[episode] = {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def collect(args: CollectArgs) -> Path:
    """Record the expert on the training split and return the dataset file. training=False turns off what makes the task
    easier to learn, such as shorter episodes. Raises UserError if there is no such expert or no successful episode."""
    for seed in args.seeds:
        check_args(BaseArgs(seed=seed, env_kwargs=args.env_kwargs, threads=args.threads))
    if not 1 <= len(set(args.seeds)) == len(args.seeds) <= args.episodes or args.episodes < 2:
        raise UserError("--seeds must be different, and --episodes at least 2 and one per seed")
    if not 0 <= args.action_noise < inf:
        raise UserError(f"--action-noise must be 0 or more, not {args.action_noise}")
    env_id = args.env_id or ("LateralControl-v0" if args.policy == "feedforward" else None)
    expert, env_id, env_kwargs, file = evaluation.resolve_policy(args.policy, env_id, args.env_kwargs, "train")
    num_envs = evaluation.num_eval_envs(env_id, args.episodes)
    envs = make_vec(env_id, num_envs, training=False, split="train", threads=args.threads, **env_kwargs)
    dagger_policy, policies = None, [file]
    if args.dagger_policy is not None:
        dagger_policy, _, _, dagger_file = evaluation.resolve_policy(args.dagger_policy, env_id, env_kwargs, "train")
        policies.append(dagger_file)
    file = demonstrations.new_file(args)

    space, packed = envs.single_action_space, demonstrations.packed_sizes(envs.single_observation_space)
    noise_std = args.action_noise * (space.high - space.low) / 2
    results, kept, episodes = [], [], []
    for seed, indices in zip(args.seeds, np.array_split(np.arange(args.episodes), len(args.seeds))):
        recorder = Recorder(expert, dagger_policy, noise_std, packed, seed)
        hooks = {"on_step": recorder.on_step, "on_episode": recorder.on_episode}
        results += evaluation.rollout(recorder, envs, len(indices), seed, first=len(results), **hooks)
        for i in indices.tolist():
            if results[i]["success"] is True or not args.only_successes:
                kept.append({**results[i], "seed": (seed, i)})
                episodes.append(recorder.episodes[i])
        print(f"{len(results):,}/{args.episodes:,} episodes", file=sys.stderr)
    if not kept:
        raise UserError(f"{args.policy}: none of {len(results)} episodes was successful; leave --only-successes out")
    totals = {"episodes": len(results), "env_steps": sum(result["length"] for result in results)}  # all, kept or not
    about = {"env_id": env_id, "env_kwargs": env_kwargs, "collected_with": asdict(args), "totals": totals}
    dataset = demonstrations.write_dataset(file, episodes, kept, {**about, "packed": packed}, policies)
    quality = demonstrations.write_quality(dataset, demonstrations.run_checks(dataset))
    print(f"{args.policy}: {evaluation.describe(dataset.metadata)}\n{file}: {quality}")
    return file


def load_policy(checkpoint: dict, envs: VectorEnv) -> Policy:
    """Build the deterministic policy of a policy file, for evaluation and as an expert for cloning."""
    args = Args.from_checkpoint(checkpoint)
    agent = make_clone(envs, args)
    load_agent(agent, checkpoint, args)
    return DeterministicPolicy(agent)


def main() -> None:
    with one_line_errors():
        if sys.argv[1:2] == ["train"]:  # its settings may come from --config
            train(parse(Args, sys.argv[2:], "bc_pretrain.py train"))
            return
        commands = {"collect": CollectArgs, "validate": ValidateArgs, "inspect": InspectArgs, "train": Args}
        args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        if isinstance(args, CollectArgs):
            collect(args)
        elif isinstance(args, InspectArgs):
            demonstrations.inspect(args)
        elif not demonstrations.validate(args):
            sys.exit(1)


if __name__ == "__main__":
    main()
