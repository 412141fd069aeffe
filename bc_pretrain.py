"""Behavioural cloning, in one file: an expert's demonstrations, and a network that imitates them.

Demonstrations are pairs (obs_t, action_t) of the same step. The network is the policy of ppo_continuous.py, so that PPO
can go on from the clone, and cloning is regression on it:

    minimise E[|mu(obs) - action|^2]        or, with --loss nll,        -E[log pi(action | obs)]

An expert that never errs never shows how to come back. With --action-noise it is disturbed while it drives, and what is
recorded is still the action that it meant.

  collect    python bc_pretrain.py collect --policy feedforward --dataset lateral --action-noise 0.05
  train      python bc_pretrain.py train --dataset lateral
  fine-tune  python ppo_continuous.py --pretrained runs/<run> --critic-warmup 5
"""

import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import log, pi, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

import envs
from envs import command, rollout, run
from envs.rollout import Deployed, Policy
from envs.run import UserError


@dataclass
class CollectArgs:
    dataset: str
    """name of the demonstrations: runs/datasets/NAME.npz and, beside it, NAME.json that says where they are from"""
    policy: str = "feedforward"
    """the expert: a scripted controller of the environment or PATH.onnx"""
    env_id: str = "LateralControl-v0"
    """environment to play"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..."""
    episodes: int = 200
    """episodes in all, shared out over the seeds"""
    seeds: tuple[int, ...] = (42,)
    """seeds of the episodes and of the noise"""
    action_noise: float = 0.0
    """standard deviation of the noise on the expert's actions, as a share of half their range; 0.05 is usual"""
    threads: int = 1
    """CPU threads of our simulators"""
    run_root: str = "runs"
    """directory that holds the runs and datasets/"""


@dataclass
class Args:
    dataset: str
    """name of the demonstrations that collect recorded"""
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
    norm_obs: bool | None = None
    """normalise observations by their mean and standard deviation, as the PPO run to come; as tuned if not given"""
    init_log_std: float = -0.5
    """logarithm of the policy's standard deviation, which mse leaves as it is"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """units in the hidden layers, as in the PPO run to come"""
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
TUNED: dict[str, dict] = {"LateralControl-v0": {"norm_obs": False, "eval_episodes": 0}}
UNTUNED = {"norm_obs": True, "eval_episodes": 100}


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
        return self.bounded(self.actor(self.normalizer(obs)))

    def bounded(self, action: Tensor) -> Tensor:
        """The Gaussian's own units, where [-1, 1] is the whole range, to the environment's, inside its bounds."""
        return self.center + self.scale * action.clamp(-1, 1)

    def sample(self, obs: Tensor) -> Tensor:
        mean = self.actor(self.normalizer(obs))
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


class Recorder:
    """An expert as a policy that writes down what it sees and means to do, while noise disturbs what it does."""

    def __init__(self, expert: Policy, scale: np.ndarray, seed: int):
        self.expert, self.scale, self.rng = expert, scale, np.random.default_rng(seed)
        self.env_kwargs = getattr(expert, "env_kwargs", {})
        self.episodes: dict[int, list[tuple]] = {}

    def reset(self, rows: np.ndarray, vec: VectorEnv) -> None:
        if hasattr(self.expert, "reset"):
            self.expert.reset(rows, vec)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.obs, self.action = obs, np.asarray(self.expert(obs), np.float32)
        return self.action + self.scale * self.rng.standard_normal(self.action.shape)

    def record(self, playing: np.ndarray, reward: np.ndarray, done: np.ndarray) -> None:
        """Called after each step: row i played episode playing[i]."""
        for i, episode in enumerate(playing):
            self.episodes.setdefault(int(episode), []).append((self.obs[i], self.action[i], reward[i]))


def collect(args: CollectArgs) -> Path:
    """Play the expert on the published task's training split and write its demonstrations. Returns their file.

    The .npz holds flat arrays over all steps, obs (n, obs_dim), action (n, action_dim) as the expert meant it and
    reward (n,); `start` (episodes + 1,) says where each episode begins and the last one ends; returns and successes
    are one for each episode.

    Raises:
        UserError: no such expert or environment, or too few episodes.
    """
    if args.episodes < 2 or not 0 <= args.action_noise < np.inf or args.threads < 1 or min(args.seeds, default=-1) < 0:
        least = "--episodes must be 2 or more, --action-noise 0 or more, --threads 1 or more"
        raise UserError(f"{least}, --seeds not empty and each 0 or more")
    command.check_env_kwargs(args.env_kwargs)
    file = run.dataset_file(args)
    if file.exists():
        raise UserError(f"{file} exists; choose another --dataset name, or remove it")
    settings = {"training": False, "split": "train", "threads": args.threads, **args.env_kwargs}
    vec = envs.make_vec(args.env_id, 1, **settings)
    envs.require_flat_box(vec)
    limit = getattr(vec, "num_episodes", None)
    if limit is not None and args.episodes > limit:
        raise UserError(f"{args.episodes} episodes of the train split, which has {limit}; ask for at most so many")
    expert = rollout.scripted(args.policy, vec)
    settings |= getattr(expert, "env_kwargs", {})
    vec = envs.make_vec(args.env_id, min(rollout.ROWS, args.episodes), **settings)

    scale = args.action_noise * (vec.single_action_space.high - vec.single_action_space.low) / 2
    first, results, episodes = 0, [], []
    for seed, count in zip(args.seeds, shared_out(args.episodes, len(args.seeds))):
        recorder = Recorder(expert, scale, seed)
        results += rollout.rollout(recorder, vec, count, seed, recorder.record, first)
        episodes += [recorder.episodes[first + i] for i in range(count)]
        first += count
        print(f"{first:>6,}/{args.episodes:,} episodes", file=sys.stderr)
    obs, action, reward = (np.stack(x).astype(np.float32) for x in zip(*(step for e in episodes for step in e)))
    run.write_npz(
        file,
        obs=obs,
        action=action,
        reward=reward,
        start=np.cumsum([0, *(len(e) for e in episodes)]),
        returns=np.array([result["return"] for result in results]),
        successes=np.array([result["success"] is True for result in results]),
    )
    summary = {"episodes": len(results), **rollout.summarize(results)}
    env_kwargs = {**args.env_kwargs, **getattr(expert, "env_kwargs", {})}
    manifest = {
        "env_id": args.env_id,
        "env_kwargs": env_kwargs,
        "collected_with": asdict(args),
        **summary,
        "per_episode": None,
    }
    parent = {"policy_sha256": run.sha256(Path(args.policy))} if args.policy.endswith(".onnx") else {}
    origin = {"git_commit": run.git_commit(), "sha256": run.sha256(file), **parent}
    run.write_json(file.with_suffix(".json"), {**manifest, "steps": len(obs), **origin})
    print(f"{args.policy}: {rollout.describe(summary)}\n{file}")
    return file


def shared_out(total: int, parts: int) -> list[int]:
    """total in equal parts; the first ones take what is left over."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def load_demonstrations(args: Args) -> tuple[dict, dict[str, np.ndarray]]:
    """The manifest and the arrays that collect wrote.

    Raises:
        UserError: there are none of this name, or they are damaged.
    """
    file = run.dataset_file(args)
    manifest, arrays = run.read_json(file.with_suffix(".json")), run.read_npz(file)
    names = ("obs", "action", "start")
    if not {"env_id", "env_kwargs"} <= manifest.keys() or not set(names) <= arrays.keys():
        raise UserError(f"{file}: not demonstrations of this project; record them anew with collect")
    obs, action, start = (arrays[name] for name in names)
    whole = (obs.ndim, action.ndim, start.ndim) == (2, 2, 1) and len(start) > 2 and (np.diff(start) > 0).all()
    whole = whole and len(obs) == len(action) == start[-1]
    if not whole or not np.isfinite(obs).all() or not np.isfinite(action).all():
        raise UserError(f"{file}: its arrays do not fit together or are not finite; record them anew with collect")
    return manifest, arrays


def bc_loss(agent: Agent, args: Args, obs: Tensor, action: Tensor) -> Tensor:
    """action: in the Gaussian's own units."""
    if args.loss == "nll":
        return -agent.evaluate_actions(obs, action)[0].mean()
    return (agent.actor(agent.normalizer(obs)) - action).square().sum(-1).mean()


def fit_epoch(agent: Agent, optimizer: Optimizer, args: Args, data: tuple[Tensor, Tensor]) -> float:
    """One epoch. Returns the mean loss of its minibatches."""
    order, losses = torch.randperm(len(data[0])), []
    for minibatch in zip(*(x[order].split(args.minibatch_size) for x in data)):
        optimizer.zero_grad()
        loss = bc_loss(agent, args, *minibatch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
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
    least = dict.fromkeys(("epochs", "patience", "minibatch_size", "threads", "hidden_sizes"), 1)
    least |= dict.fromkeys(("seed", "eval_seed", "weight_decay"), 0)
    wrong = [name for name, value in least.items() if not np.min(getattr(args, name), initial=value) >= value]
    wrong += [name for name in ("seed", "eval_seed") if getattr(args, name) >= 2**32]
    wrong += ["init_log_std"] * (not np.isfinite(args.init_log_std))
    wrong += ["learning_rate"] * (not 0 < args.learning_rate < np.inf)
    wrong += ["validation_share"] * (not 0 < args.validation_share < 1)
    if wrong:
        raise UserError(f"--{wrong[0].replace('_', '-')} is out of range; see --help")


def train(args: Args) -> dict:
    """Clone an expert from its demonstrations. Returns what summary.json holds.

    Raises:
        UserError: args, or the demonstrations they name, cannot work.
        FloatingPointError: the loss is not finite.
    """
    check(args)
    manifest, arrays = load_demonstrations(args)
    env_id = args.env_id or manifest["env_id"]
    args = replace(args, env_id=env_id, env_kwargs={**manifest["env_kwargs"], **args.env_kwargs})
    tuned = TUNED.get(env_id, UNTUNED).items()
    args = replace(args, **{name: value for name, value in tuned if getattr(args, name) is None})
    envs.check_evaluation(args)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    vec = envs.make_vec(args.env_id, 1, **args.env_kwargs)
    envs.require_flat_box(vec)
    agent = make_agent(vec, args)
    fits = (vec.single_observation_space.shape[0], vec.single_action_space.shape[0])
    if (arrays["obs"].shape[1], arrays["action"].shape[1]) != fits:
        raise UserError(
            f"--dataset {args.dataset}: {args.env_id} now has other observations or actions; record it anew"
        )
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    obs, action = torch.as_tensor(arrays["obs"]), torch.as_tensor(arrays["action"])
    action = (action - agent.center) / agent.scale  # the environment's units to the Gaussian's own
    trains, validates = split_episodes(arrays["start"], args.validation_share, args.seed)
    if args.norm_obs:
        agent.normalizer.update(obs[trains])
    best, since_best = None, 0

    with run.Run("bc_pretrain", args, torch.device("cpu"), None, args.epochs) as record:
        for epoch in range(1, args.epochs + 1):
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (epoch - 1) / args.epochs)
            train_loss = fit_epoch(agent, optimizer, args, (obs[trains], action[trains]))
            with torch.no_grad():
                loss = bc_loss(agent, args, obs[validates], action[validates]).item()
            run.require_finite("loss", np.array([[train_loss + loss]]), epoch)
            since_best += 1
            if best is None or loss < best["loss"]:
                best, since_best = {"step": epoch, "loss": loss, "agent": deepcopy(agent.state_dict())}, 0
            last = epoch == args.epochs or since_best == args.patience
            if last:
                agent.load_state_dict(best["agent"])
                best["evaluation"] = rollout.evaluate(Deployed(agent), args, "validation", record.video(epoch))
            scalars = {"train/loss": train_loss, "validation/loss": loss}
            record.log(epoch, [], [], scalars, best["evaluation"] if last else None)
            if last:
                break

        networks = ("env_id", "env_kwargs", "seed", "norm_obs", "init_log_std", "hidden_sizes")
        policy = {
            "kind": "policy", "env_id": args.env_id, "env_kwargs": args.env_kwargs,
            "args": {name: getattr(args, name) for name in networks}, "agent": agent.state_dict(), "step": best["step"],
        }  # fmt: skip
        record.save_policy("best.pt", policy)
        run.export_onnx(agent, obs.shape[1], record.folder / "policy.onnx", "policy", args.env_kwargs)
        return record.finish(epoch, best)


def main() -> None:
    with command.command_line():
        commands = {"collect": CollectArgs, "train": Args}
        args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        collect(args) if isinstance(args, CollectArgs) else train(args)


if __name__ == "__main__":
    main()
