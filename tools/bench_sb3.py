"""Training with Stable-Baselines3 as our scripts train: the same environments, the same settings, the same evaluation.

What it calls otherwise is translated in `sb3_settings`, and where it means something else by a name, so that both sides
minimize the same loss and stop at the same point. What remains different is how the two are made: it normalizes
observations and rewards step by step (VecNormalize), ours once a rollout; and with --clip-vloss it takes the clipped
error, ours the larger of both.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import ppo_residual
from envs.batch_env import BatchEnv, GymVec
from envs.evaluation import Policy, make_base_policy
from envs.run import make_envs

Act = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (obs (N, O), action (N, A)) -> the environment's action (N, A)


class NativeVecEnv(VecEnv):
    """A batch of ours as Stable-Baselines3 knows environments; both start episodes anew in the step that ends them.

    Its actions are those of our own Gaussian, where [-1, 1] is the whole range: a policy of Stable-Baselines3 begins
    with a standard deviation in these units too. Infos hold what it looks for: `terminal_observation` and
    `TimeLimit.truncated`, by which it bootstraps a time limit, and `episode`.

    Args:
        vec: the batch.
        act: makes an action for the batch of one in [-1, 1] and of the observations.
        penalty: cost of |action|^2 in each step, which is no part of the episode's return.
    """

    def __init__(self, vec: BatchEnv, act: Act, penalty: float = 0.0):
        self.vec, self.act, self.penalty, self.first_seed = vec, act, penalty, None
        bound = np.ones(vec.single_action_space.shape, np.float32)
        super().__init__(vec.num_envs, vec.single_observation_space, Box(-bound, bound))

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """For the next reset, which gives row i the generator that a training script gives it."""
        self.first_seed = seed
        return [seed] * self.num_envs

    def reset(self) -> np.ndarray:
        self.obs, _ = self.vec.reset(seed=self.first_seed)
        self.first_seed = None
        return self.obs

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = np.clip(actions, -1, 1)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        self.obs, reward, terminated, truncated, info = self.vec.step(self.act(self.obs, self.actions))
        if self.penalty:
            reward = reward - self.penalty * np.square(self.actions).sum(1)
        done = terminated | truncated
        infos: list[dict] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            episode = {"r": float(info["episode"]["r"][i]), "l": int(info["episode"]["l"][i])}
            end = {"terminal_observation": info["final_obs"][i], "TimeLimit.truncated": bool(truncated[i])}
            infos[i] = {**end, "episode": episode}
        return self.obs, reward, done, infos

    def close(self) -> None:
        self.vec.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list:
        return [getattr(self.vec, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("the rows of a batch have no attributes of their own")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list:
        raise NotImplementedError("the rows of a batch have no methods of their own")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def unit_actions(vec: BatchEnv, args: Any) -> Act:
    """What an action in [-1, 1] means: a share of the environment's range, or a correction of the base policy."""
    space = vec.single_action_space
    if isinstance(args, ppo_residual.Args):
        base_policy, scale = make_base_policy(args.base_policy, vec), args.alpha * args.residual_scale
        return lambda obs, action: ppo_residual.apply_residual(base_policy(obs), action, scale, space)
    center, scale = (space.high + space.low) / 2, (space.high - space.low) / 2
    return lambda obs, action: center + scale * np.clip(action, -1, 1)


def iterations(args: Any) -> int:
    """Whole rollouts, as our scripts take them."""
    return args.num_iterations


def sb3_settings(args: Any) -> dict[str, Any]:
    """A script's settings under Stable-Baselines3's names, for those that it has a counterpart of."""
    count = iterations(args)

    def annealed(remaining: float) -> float:
        """It asks after each rollout, ours before: the share that was left then."""
        return args.learning_rate * min(1.0, remaining + 1 / count)

    return {
        "learning_rate": annealed if args.anneal_lr else args.learning_rate,
        "n_steps": args.num_steps,
        "batch_size": args.minibatch_size,
        "n_epochs": args.update_epochs,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "clip_range": args.clip_coef,
        "clip_range_vf": args.clip_coef if args.clip_vloss else None,
        "normalize_advantage": args.norm_adv,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef / 2,  # of the squared error; ours is of its half
        "max_grad_norm": args.max_grad_norm,
        "target_kl": None if args.target_kl is None else args.target_kl / 1.5,  # it stops at 1.5 times as much
        "policy_kwargs": {"net_arch": list(args.hidden_sizes), "log_std_init": args.init_log_std},
        "seed": args.seed,
        "device": "cpu",
    }


def make_env(args: Any) -> tuple[VecNormalize, Act]:
    """The environments, normalized as args say, and what their actions mean."""
    vec = make_envs(args)
    if isinstance(vec, GymVec):  # as a user of Stable-Baselines3 makes them
        vec.close()
        env, act = make_vec_env(args.env_id, args.num_envs, seed=args.seed), lambda obs, action: action
    else:
        act = unit_actions(vec, args)
        env = NativeVecEnv(vec, act, getattr(args, "residual_penalty", 0.0))
    return VecNormalize(env, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma), act


class Marked(BaseCallback):
    """Writes down CPU time and wall clock (s) as each rollout begins, and the episodes: (step, return, length)."""

    def __init__(self, action_repeat: int):
        super().__init__()
        self.action_repeat, self.marks, self.episodes = action_repeat, [], []

    def _on_rollout_start(self) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                step, episode = self.num_timesteps * self.action_repeat, info["episode"]
                self.episodes.append((step, float(episode["r"]), int(episode["l"])))
        return True


def train_sb3(args: Any) -> tuple[list, list, Policy]:
    """A run with the settings of one of our scripts.

    Returns:
        What Marked wrote down, marks and episodes, and the deterministic policy at the end.
    """
    env, act = make_env(args)
    ppo = PPO("MlpPolicy", env, **sb3_settings(args))
    marked = Marked(args.steps_per_iteration // (args.num_envs * args.num_steps))
    # whole rollouts, or it would end with one more
    ppo.learn(iterations(args) * args.num_envs * args.num_steps, callback=marked)

    def policy(obs: np.ndarray) -> np.ndarray:
        return act(obs, ppo.predict(env.normalize_obs(obs), deterministic=True)[0])

    return marked.marks, marked.episodes, policy
