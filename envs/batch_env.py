"""Base class of the bundled vector environments, their single-environment view, and a wrapper for Gymnasium's own."""

import multiprocessing
import os
import signal
from copy import deepcopy
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, create_empty_array

MAX_FPS = 60  # frames per second of videos and windows; faster environments skip frames
SPLITS = ("train", "validation", "test")
Array = np.ndarray | torch.Tensor


def seed_sequence(seed: int | list[int], split: str = "train") -> np.random.SeedSequence:
    """The random stream of one environment. The splits use disjoint streams of one seed."""
    return np.random.SeedSequence(seed, spawn_key=() if split == "train" else (SPLITS.index(split),))


def env_seeds(seed: int | list, num_envs: int) -> list:
    """One seed per environment: an int s gives environment i the seed [s, i]; a list holds the seeds themselves."""
    seeds = [[int(seed), i] for i in range(num_envs)] if np.isscalar(seed) else list(seed)
    if len(seeds) != num_envs:
        raise ValueError(f"{len(seeds)} seeds for {num_envs} environments")
    return seeds


def cpu_threads(num_envs: int) -> int:
    """One thread per CPU core or environment, whichever are fewer, and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, num_envs, 8)


class BatchEnv(gym.vector.VectorEnv):
    """Steps N environments together. An episode that ends is reset in the same step (SAME_STEP autoreset).

    A subclass contains the simulator and defines four methods; `indices` are the environments, in ascending order:

        start(indices)    begin an episode in these environments, drawing from self.rngs[i] only
        advance(action)   one step of all environments: reward (N,), terminated (N,), metrics {name: (N,)}
        observe(indices)  the observations of these environments: an array or a dict of arrays
        state()           {name: array} of everything that changes during a step; load_state_dict writes into the arrays

    Evaluations set `autoreset` to False. Environments whose episode has ended then wait for a reset. advance() may skip
    them (see `running`); their results are ignored.

    Arrays are NumPy arrays or, with `device`, torch tensors. Environments do not influence each other, so on the CPU
    environment i equals, bit for bit, a single one with the same seed and actions.

    Args:
        num_envs: number of environments, N.
        observation_space, action_space: of a single environment.
        max_episode_steps: the step after which an unfinished episode is truncated.
        training: True adds what helps learning (reward shaping, easier starts); False is the published task.
        split: train, validation or test; no two have an episode in common.
        render_mode: None, rgb_array or human; environment 0 is rendered.
        device: None for NumPy arrays, or the torch device of the tensors.

    Raises:
        ValueError: unknown split or render_mode.
    """

    metadata: ClassVar = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array", "human"]}
    controllers: ClassVar[dict] = {}  # {name: class} of scripted policies, made without arguments
    measures: ClassVar[tuple[str, ...]] = ()  # names of the metrics of an episode besides return, length and success

    def __init__(
        self,
        num_envs: int,
        observation_space: gym.Space,
        action_space: gym.Space,
        max_episode_steps: int,
        training: bool = True,
        split: str = "train",
        render_mode: str | None = None,
        device: str | None = None,
    ):
        for name, value, known in (
            ("split", split, SPLITS),
            ("render_mode", render_mode, (None, *self.metadata["render_modes"])),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, not {value!r}")
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.action_repeat = 1  # steps of the task per call of step() ...
        self.steps_made: int | Array = 1  # ... and how many the last call made, which may differ between environments
        self.limit: int | Array = max_episode_steps  # a subclass may give each environment its own, (N,)
        self.autoreset, self.ended = True, np.zeros(num_envs, bool)  # ended: waits for a reset
        self.num_episodes: int | None = None  # with training=False: number of episodes of the split, None if unlimited
        self.training, self.split, self.render_mode = training, split, render_mode
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self.episode_return, self.episode_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        if device is not None:
            self.episode_return = torch.as_tensor(self.episode_return, device=device)
            self.episode_length = torch.as_tensor(self.episode_length, device=device)

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Begin an episode in all environments or, with options["reset_mask"] (N,), in those where it is True.

        seed: an int s seeds environment i with SeedSequence([s, i]), a list with SeedSequence(seed[i]); with None the
        generators continue.
        """
        indices = self.indices_to_reset(options)
        if seed is not None:
            seeds = env_seeds(seed, self.num_envs)
            for i in indices:
                self.rngs[i] = np.random.default_rng(seed_sequence(seeds[i], self.split))
        self.ended[indices] = False
        self._begin(indices)
        return self.observe(np.arange(self.num_envs)), {}

    def indices_to_reset(self, options: dict | None) -> np.ndarray:
        return np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array, dict]:
        """Step all environments.

        When episodes end, info has final_obs, episode = {"r": return, "l": length} and the metrics of the task, each
        over all environments, and under the same name with an underscore the mask (N,) of those that ended.
        """
        reward, terminated, metrics = self.advance(actions)
        self.episode_return += reward
        self.episode_length += self.steps_made
        truncated = ~terminated & (self.episode_length >= self.limit)
        done = terminated | truncated
        obs, info = self.observe(np.arange(self.num_envs)), {}
        if done.any():
            episode = {"r": deepcopy(self.episode_return), "l": deepcopy(self.episode_length)}
            info = {"final_obs": deepcopy(obs), "episode": episode, **metrics}
            info |= {f"_{name}": done for name in info}
            indices = np.flatnonzero(done) if isinstance(done, np.ndarray) else done.nonzero().flatten()
            if self.autoreset:
                self._begin(indices)
                new_obs = self.observe(indices)
                if isinstance(obs, dict):
                    for name, x in obs.items():
                        x[indices] = new_obs[name]
                else:
                    obs[indices] = new_obs
            else:
                self.ended |= torch.as_tensor(done).cpu().numpy()
        if self.render_mode == "human":
            self.render()
        return obs, reward, terminated, truncated, info

    @property
    def running(self) -> np.ndarray | None:
        """Indices of the environments whose episode has not ended; None for all."""
        return np.flatnonzero(~self.ended) if self.ended.any() else None

    def _begin(self, indices: Array) -> None:
        self.episode_return[indices], self.episode_length[indices] = 0, 0
        self.start(indices)

    def _arrays(self) -> dict[str, Array]:
        return {**self.state(), "episode_return": self.episode_return, "episode_length": self.episode_length}

    def state_dict(self) -> dict:
        """A snapshot from which stepping continues bit for bit."""
        return {"arrays": deepcopy(self._arrays()), "rngs": [rng.bit_generator.state for rng in self.rngs]}

    def load_state_dict(self, state: dict) -> Any:
        """Restore a snapshot. Returns the observations."""
        for name, x in self._arrays().items():
            x[:] = state["arrays"][name]
        for rng, rng_state in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state
        return self.observe(np.arange(self.num_envs))


class SingleEnv(gym.Env):
    """A BatchEnv with num_envs=1 as a Gymnasium environment. A subclass sets its class in `batch_env`."""

    batch_env: type[BatchEnv]
    metadata: ClassVar = BatchEnv.metadata

    def __init__(self, **kwargs: Any):
        self.batch = self.batch_env(num_envs=1, **kwargs)
        self.observation_space, self.action_space = self.batch.single_observation_space, self.batch.single_action_space
        self.render_mode, self.metadata = self.batch.render_mode, self.batch.metadata
        self.next_obs = None  # the first observation of the next episode, which the batch has begun already

    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """An int s seeds like environment 0 of a batch, a list with SeedSequence(seed); with None the generator
        continues."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        obs, self.next_obs = self.next_obs, None
        if obs is None or seed is not None:
            obs = first(self.batch.reset(seed=[seed] if isinstance(seed, list) else seed)[0])
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.next_obs = None
        obs, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        obs = first(obs)
        if terminated[0] or truncated[0]:
            self.next_obs, obs = obs, first(info["final_obs"])
        info = {name: x for name, x in info.items() if name not in ("final_obs", "episode")}
        each_step = {name: x for name, x in info.items() if isinstance(x, dict)}
        info = {name: x[0].item() for name, x in info.items() if f"_{name}" in info}
        info |= {name: {key: x[0].item() for key, x in terms.items()} for name, terms in each_step.items()}
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:
        return self.batch.render()

    def close(self) -> None:
        self.batch.close()


def first(obs: Any) -> Any:
    """The observation of environment 0 as NumPy arrays."""
    return {name: np.asarray(x[0]) for name, x in obs.items()} if isinstance(obs, dict) else np.asarray(obs[0])


class GymVec(gym.vector.VectorEnv):
    """Gymnasium environments with the seeds, info and autoreset of a BatchEnv, stepped one after the other.

    Observations are cast to float32 and actions to the dtype of the action space. On HalfCheetah SyncVectorEnv, which
    also collects the info of every step, takes a fifth longer.
    """

    controllers: ClassVar[dict] = {}
    measures: ClassVar[tuple[str, ...]] = ()
    num_episodes = None
    action_repeat = 1

    def __init__(self, env_id: str, num_envs: int, split: str = "train", **kwargs: Any):
        self.envs = [gym.make(env_id, **kwargs) for _ in range(num_envs)]
        self._set_up(self.envs[0], self.envs[0].observation_space, self.envs[0].action_space, num_envs, split)

    def _set_up(self, env: Any, obs_space: gym.Space, action_space: gym.Space, num_envs: int, split: str) -> None:
        self.num_envs, self.render_mode = num_envs, env.render_mode
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = obs_space, action_space
        if isinstance(obs_space, gym.spaces.Box):
            low, high = obs_space.low.astype(np.float32), obs_space.high.astype(np.float32)
            self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.obs = create_empty_array(self.single_observation_space, num_envs)  # the current observations
        self.split, self.steps, self.seed = split, 0, 0
        self.autoreset, self.ended = True, np.zeros(num_envs, bool)  # as in a BatchEnv
        self.episode_return, self.episode_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """As in a BatchEnv; other options than reset_mask go to the environments."""
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, bool))
        seeds = [None] * self.num_envs
        if seed is not None:  # Gymnasium's environments take an int
            self.seed = seed if np.isscalar(seed) else 0
            sequences = [seed_sequence(s, self.split) for s in env_seeds(seed, self.num_envs)]
            seeds = [int(s.generate_state(1)[0]) for s in sequences]
        self.episode_return[mask], self.episode_length[mask], self.ended[mask] = 0, 0, False
        self._reset_envs(mask, seeds, options or None)
        return self.obs.copy(), {}

    def _reset_envs(self, mask: np.ndarray, seeds: list, options: dict | None) -> None:
        for i in np.flatnonzero(mask):
            self.obs[i], _ = self.envs[i].reset(seed=seeds[i], options=options)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        actions = np.asarray(actions, self.single_action_space.dtype)
        reward, terminated, truncated, successes = self._step_envs(actions)
        self.steps += 1
        self.episode_return += reward
        self.episode_length += 1
        done, info = terminated | truncated, {}
        if done.any():
            episode = {"r": self.episode_return.copy(), "l": self.episode_length.copy()}
            info = {"final_obs": self.obs.copy(), "_final_obs": done, "episode": episode, "_episode": done}
            if successes:
                known = np.array([i in successes for i in range(self.num_envs)])
                info["is_success"] = np.array([successes.get(i, False) for i in range(self.num_envs)])
                info["_is_success"] = done & known
            self.episode_return[done], self.episode_length[done] = 0, 0
            if self.autoreset:
                self._reset_ended(done)
            else:
                self.ended |= done
        return self.obs.copy(), reward, terminated, truncated, info

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, bool]]:
        """Step all environments; self.obs becomes their observations before any reset. Returns rewards, terminations,
        truncations and {index: success}."""
        reward, successes = np.zeros(self.num_envs), {}
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for i in np.flatnonzero(~self.ended):
            self.obs[i], reward[i], terminated[i], truncated[i], env_info = self.envs[i].step(actions[i])
            if "is_success" in env_info:
                successes[i] = bool(env_info["is_success"])
        return reward, terminated, truncated, successes

    def _reset_ended(self, done: np.ndarray) -> None:
        self._reset_envs(done, [None] * self.num_envs, None)

    def state_dict(self) -> dict:
        """Gymnasium's environments cannot be saved; load_state_dict begins fresh episodes instead."""
        return {"fresh_episodes": True, "seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: dict) -> np.ndarray:
        """Begin episodes with seeds that were not used before. Returns the observations."""
        obs, _ = self.reset(seed=[[state["seed"], i, state["steps"]] for i in range(self.num_envs)])
        self.seed, self.steps = state["seed"], state["steps"]
        return obs

    def render(self) -> np.ndarray | None:
        return self.envs[0].render()

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()


class SameStepVec(GymVec):
    """A vector environment with SAME_STEP autoreset, with the seeds and info of a BatchEnv. Its reset takes a list of
    seeds and options["reset_mask"], as that of Gymnasium's AsyncVectorEnv."""

    def __init__(self, envs: gym.vector.VectorEnv, split: str = "train"):
        self.vec = envs
        self._set_up(envs, envs.single_observation_space, envs.single_action_space, envs.num_envs, split)

    def _reset_envs(self, mask: np.ndarray, seeds: list, options: dict | None) -> None:
        obs, _ = self.vec.reset(seed=seeds, options={**(options or {}), "reset_mask": mask})
        self.obs[mask] = obs[mask]

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, bool]]:
        self.next_obs, reward, terminated, truncated, info = self.vec.step(actions)
        self.obs[:] = self.next_obs
        for i in np.flatnonzero(terminated | truncated):
            self.obs[i] = info["final_obs"][i]
        final_info = info.get("final_info", {})
        known = np.flatnonzero(final_info.get("_is_success", ()))
        return reward, terminated, truncated, {i: bool(final_info["is_success"][i]) for i in known.tolist()}

    def _reset_ended(self, done: np.ndarray) -> None:
        self.obs[done] = self.next_obs[done]

    def render(self) -> np.ndarray | None:
        frames = self.vec.render()
        return None if frames is None else frames[0]

    def close_extras(self, **kwargs: Any) -> None:
        self.vec.close()


def make_async(env_id: str, num_envs: int, **kwargs: Any) -> gym.vector.AsyncVectorEnv:
    """One environment per worker process. Workers ignore Ctrl-C, so that the script can finish its iteration."""

    def make() -> gym.Env:
        if multiprocessing.parent_process() is not None:
            for name in {"SIGINT", "SIGUSR1"} & {*dir(signal)}:
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        return gym.make(env_id, **kwargs)

    return gym.vector.AsyncVectorEnv([make] * num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
