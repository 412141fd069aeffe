"""PPO that corrects a frozen base policy (residual reinforcement learning), in one file: PyTorch + Gymnasium.

A base policy does most of a task: inverse kinematics, a controller, a cloned network. It stays as it is; a small
network learns what to add to it, so learning starts from the base's behaviour instead of from nothing:

    action = clip(base(obs) + alpha * act_scale * residual(obs)),    residual(obs) in [-1, 1]
    reward = task reward - residual_penalty * |residual|^2           while training

The residual is an ordinary Gaussian policy, so the PPO below (Schulman et al. 2017) is ordinary PPO.

  train     python ppo_residual.py                                   (50,000 steps, half a minute)
  resume    python ppo_residual.py --resume runs/<run>
  evaluate  python ppo_residual.py --evaluate runs/<run> --compare-base --eval-episodes 200
  base only python ppo_residual.py --evaluate ik
  no base   python ppo_residual.py --base-policy zero                (500,000 steps, three minutes)
  other base  --base-policy ik | clone.onnx | blend:ik:zero:0.5
  deploy    runs/<run>/policy.onnx: raw observation -> residual in [-1, 1]; add it to the base as above
"""

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import log, pi, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.optim import Optimizer

import envs
from envs import command, rollout, run
from envs.rollout import Deployed, Policy
from envs.run import require_finite


@dataclass
class Args:
    env_id: str = "SO101Paper-v0"
    """environment: one of ours, or any of Gymnasium's with flat Box observations and actions"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..."""
    eval_env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments for evaluation only, on top of --env-kwargs"""
    seed: int = 1
    """seed of the networks, the environments and the minibatch order"""
    total_timesteps: int = 50_000
    """environment steps, counted over all environments; an action repeat makes several with one action"""
    num_envs: int = 8
    """environments stepped in parallel"""
    num_steps: int = 256
    """steps per environment between two updates"""

    base_policy: str = "ik"
    """what the residual corrects: zero, a scripted controller of the environment (ik), PATH.onnx or blend:A:B:w"""
    alpha: float = 0.7
    """weight of the residual; 0 is the base alone"""
    act_scale: float = 0.02
    """action that a residual of 1 stands for, in the units of the action (rad)"""
    residual_penalty: float = 0.001
    """cost of |residual|^2 in each training step"""

    learning_rate: float = 3e-4
    """learning rate of Adam; usually 1e-4 to 1e-3"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the run"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW); 0 is Adam"""
    minibatch_size: int = 256
    """transitions per gradient step; must divide num_envs * num_steps"""
    update_epochs: int = 10
    """passes over each batch; usually 3 to 10"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; 0 is one-step TD, 1 is Monte Carlo"""
    clip_coef: float = 0.2
    """how far the probability ratio may move before its gradient is cut; usually 0.1 to 0.3"""
    clip_value: bool = False
    """also clip the change of the value estimate"""
    ent_coef: float = 0.005
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """stop an update once the policy has moved further than this; usually 0.01 to 0.05"""
    norm_obs: bool = True
    """normalise observations by their running mean and standard deviation"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return"""
    norm_adv: bool = True
    """normalise advantages within each minibatch"""
    group_size: int = 1
    """environments in the same situation, whose mean advantage is subtracted; 1 for none"""
    init_log_std: float = -0.5
    """logarithm of the initial standard deviation of the policy"""
    final_log_std: float | None = None
    """move the log standard deviation linearly to this over the run, instead of learning it"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """units in the hidden layers of actor and critic"""
    critic_warmup: int = 0
    """first updates that change the critic alone, for a policy that starts from --pretrained"""
    freeze_normalizer: bool = False
    """keep the observation statistics that --pretrained brings, instead of following those of the new policy"""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """where the networks live; auto takes a GPU if there is one, but for networks this small the CPU is faster"""
    threads: int = 1
    """CPU threads of our simulators; PyTorch keeps to one, with which networks this small are fastest"""
    compile: bool = False
    """compile the gradient step with torch.compile (needs a C++ compiler)"""
    deterministic: bool = False
    """refuse GPU operations whose result may differ between runs"""

    eval_every: int = 10_000
    """steps between two evaluations on the validation split; the best one gives best.pt; 0 for only one at the end"""
    eval_first: int = 0
    """also evaluate before each of the first updates, so many, into first_evaluations.jsonl: does a clone get worse?"""
    eval_episodes: int = 100
    """episodes of an evaluation; 0 for all, where a split has a fixed number"""
    eval_seed: int = 1
    """seed of the evaluation episodes; those of training and of the three splits never coincide"""
    checkpoint_every: int = 10_000
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
    """residual policy file or run to start from: actor, critic and normaliser; the optimiser starts fresh"""
    track: bool = False
    """also log to Weights & Biases (offline without a login)"""
    capture_video: bool = False
    """record the first episode of each evaluation as videos/*.mp4"""
    dry_run: bool = False
    """one rollout, one update, one evaluation of two episodes, all files"""

    evaluate: str | None = None
    """no training: measure a policy file, a run (its best.pt), zero, ik or PATH.onnx on the test split"""
    compare_base: bool = False
    """with --evaluate: also play the same episodes with the base policy alone"""
    json: str | None = None
    """with --evaluate: write the result to this file"""
    render: Literal["human"] | None = None
    """with --evaluate: watch it in a window"""

    @classmethod
    def tuned(cls, base_policy: str = "ik", env_id: str = "SO101Paper-v0", **overrides: Any) -> "Args":
        """The settings tuned for a base policy of SO101Paper-v0, as the command line takes them; overrides win."""
        row = TUNED.get(base_policy, {}) if env_id == "SO101Paper-v0" else {}
        return cls(**{"base_policy": base_policy, "env_id": env_id, **row, **overrides})


# {base policy: settings that differ from the defaults above}; --base-policy X --help shows the values in force.
# The defaults are tuned for ik. Three differ from usual ones by measurement (seeds 1 to 8, 50,000 steps, success in 300
# validation episodes, mean and worst seed): as they are .995, .977; with clip_value .942, .863; with norm_reward .988,
# .970; with init_log_std 0 .983, .907, for much noise does in training what the mean then cannot do.
# Without a base the residual must move the arm about as far in a step as a base would, and short episodes show it more
# starts; chosen on seeds 1 to 5. The README has runs with one or another of these settings put back.
TUNED: dict[str, dict] = {
    "zero": {
        "env_kwargs": {"reach_weight": 60.0, "yaw_weight": 9.0, "success_reward": 3.0, "training_steps": 150},
        "act_scale": 0.04, "total_timesteps": 500_000, "num_envs": 32, "num_steps": 128, "minibatch_size": 512,
        "learning_rate": 1e-3, "gamma": 0.98, "gae_lambda": 0.8, "eval_every": 50_000, "checkpoint_every": 50_000,
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


def correct(base: np.ndarray, residual: np.ndarray, args: Args, space: Box) -> np.ndarray:
    """The idea of residual learning: the base's action plus a small, bounded correction."""
    return np.clip(base + args.alpha * args.act_scale * np.clip(residual, -1, 1), space.low, space.high)


class Corrected:
    """The deployed policy: base plus residual."""

    def __init__(self, agent: Agent, base_policy: Policy, args: Args, space: Box):
        self.residual, self.base_policy, self.args, self.space = Deployed(agent), base_policy, args, space

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return correct(self.base_policy(obs), self.residual(obs), self.args, self.space)


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
    agent: Agent, vec: VectorEnv, base_policy: Policy, args: Args, obs: np.ndarray, step: int, device: torch.device
) -> tuple[Transitions, np.ndarray, list[dict]]:
    """Play num_steps steps in every environment from obs on. Returns the batch, the next obs, finished episodes."""
    transitions, episodes, space = [], [], vec.single_action_space
    for _ in range(args.num_steps):
        base = base_policy(obs)
        require_finite("base action", base, step)
        residual = agent.sample(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
        new_obs, reward, terminated, truncated, info = vec.step(correct(base, residual, args, space))
        step += vec.num_envs * vec.action_repeat
        require_finite("observation", new_obs, step)
        require_finite("reward", reward, step)
        reward = reward - args.residual_penalty * np.square(np.clip(residual, -1, 1)).sum(1)

        done, next_obs = terminated | truncated, new_obs
        if done.any():
            next_obs = np.where(done[:, None], info["final_obs"], new_obs)
            require_finite("final observation", next_obs, step)
            episodes += [{"step": step, **rollout.episode_result(info, i)} for i in np.flatnonzero(done)]
        transitions.append((obs, residual, next_obs, reward, terminated, done))
        obs = new_obs
    fields = (torch.as_tensor(np.stack(x), device=device) for x in zip(*transitions))  # each (T, N, ...)
    return Transitions(*(x.float() if x.is_floating_point() else x for x in fields)), obs, episodes


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


def residual_agent(vec: VectorEnv, args: Args) -> Agent:
    bound = np.ones(vec.single_action_space.shape, np.float32)
    return Agent(vec.single_observation_space.shape[0], -bound, bound, args)


def train(args: Args) -> dict:
    """Run PPO as args say. Returns what summary.json holds.

    Raises:
        UserError: args, a file they name or the environment cannot work.
        FloatingPointError: observations, rewards, losses or parameters are not finite.
    """
    args = command.checked(args)
    batch_size = command.steps_per_rollout(args)
    iterations = args.total_timesteps // batch_size
    resumed = command.load_to_resume(args, iterations * batch_size, kind="residual")
    device = run.prepare_torch(args)
    vec = envs.make_training(args)
    base_policy = rollout.frozen(args.base_policy, vec)
    agent = residual_agent(vec, args).to(device)
    adam = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(agent.parameters(), **adam)
    scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    gradient = run.compiled(compute_gradient) if args.compile else compute_gradient
    obs, _ = vec.reset(seed=args.seed)
    step, best, recent = 0, None, deque(maxlen=100)

    if resumed is not None:
        run.load_agent(agent, resumed, args, args.resume)
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["reward_scaler"])
        step, best = resumed["step"], resumed["best"]
        recent.extend(resumed["recent"])
        obs = vec.load_state_dict(resumed["envs"])
        run.set_rng_state(resumed["rng"])
    elif args.pretrained is not None:
        run.load_agent(agent, run.load_policy(args.pretrained, kind="residual"), args, args.pretrained)

    def checkpoint() -> dict:
        return {
            # this part is a policy file
            "kind": "residual", "env_id": args.env_id, "env_kwargs": args.env_kwargs, "args": asdict(args),
            "agent": agent.state_dict(), "step": step,
            # and the rest is what resuming needs
            "optimizer": optimizer.state_dict(), "reward_scaler": scaler.state_dict(),
            "envs": vec.state_dict(), "recent": list(recent), "best": best, "rng": run.rng_state(),
        }  # fmt: skip

    with run.Run("ppo_residual", args, device, resumed, iterations * batch_size) as record:
        for iteration in range(step // batch_size + 1, iterations + 1):
            record.snapshot = deepcopy(checkpoint())
            if iteration <= args.eval_first:
                policy = Corrected(agent, base_policy, args, vec.single_action_space)
                record.look(step, rollout.evaluate(policy, args, "validation"))
            progress = (iteration - 1) / iterations
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            if args.final_log_std is not None:
                log_std = (1 - progress) * args.init_log_std + progress * args.final_log_std
                agent.log_std.requires_grad_(False).fill_(log_std)
            batch, obs, episodes = collect(agent, vec, base_policy, args, obs, step, device)
            recent.extend(episodes)
            if args.norm_reward:
                batch = batch._replace(reward=scaler(batch.reward, batch.done))
            scalars = learn(agent, optimizer, gradient, args, batch, critic_only=iteration <= args.critic_warmup)
            scalars["train/residual_magnitude"] = batch.action.clamp(-1, 1).norm(dim=-1).mean().item()
            step += batch_size
            run.require_finite_update(agent, scalars, step)

            evaluation = None
            if iteration == iterations or run.due(args.eval_every, step, batch_size):
                policy = Corrected(agent, base_policy, args, vec.single_action_space)
                evaluation = rollout.evaluate(policy, args, "validation", record.video(step))
                if best is None or rollout.score(evaluation) > rollout.score(best["evaluation"]):
                    best = {"step": step, "agent": deepcopy(agent.state_dict()), "evaluation": evaluation}
                    record.save_policy("best.pt", checkpoint())
            record.log(step, recent, episodes, scalars, evaluation)
            if run.due(args.checkpoint_every, step, batch_size):
                record.save(f"checkpoints/step_{step:09d}.pt", checkpoint())

        record.save("final.pt", checkpoint())
        agent.load_state_dict(best["agent"])
        run.export_onnx(agent, obs.shape[1], record.folder / "policy.onnx", "residual", args.env_kwargs)
        return record.finish(step, best)


def evaluate(args: Args) -> dict:
    """Measure the policy that args.evaluate names; see rollout.measure."""
    command.checked(args)
    run.prepare_torch(args)
    vec = envs.make_vec(args.env_id, 1, **args.env_kwargs)
    envs.require_flat_box(vec)
    if not run.is_policy_path(args.evaluate):
        return rollout.measure(rollout.scripted(args.evaluate, vec), None, args)
    base_policy, agent = rollout.frozen(args.base_policy, vec), residual_agent(vec, args)
    run.load_agent(agent, run.load_policy(args.evaluate, kind="residual"), args, args.evaluate)
    return rollout.measure(Corrected(agent, base_policy, args, vec.single_action_space), base_policy, args)


@command.command_line()
def main() -> None:
    args = command.parse(Args, Args.tuned, with_policy=("base_policy", "alpha", "act_scale"))
    evaluate(args) if args.evaluate is not None else train(args)


if __name__ == "__main__":
    main()
