"""The base of our vector environments, its view as a single environment, and Gymnasium's own in the same shape."""

from copy import deepcopy
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, create_empty_array

from envs import UserError

FASTEST_FILM = 60  # frames a second: of faster environments, films and windows leave frames out
SPLITS = ("train", "validation", "test")
Array = np.ndarray | torch.Tensor


def sequence(seed: int | list[int], split: str = "train") -> np.random.SeedSequence:
    """The random stream of one environment; the splits draw from different streams of one seed."""
    return np.random.SeedSequence(seed, spawn_key=() if split == "train" else (SPLITS.index(split),))


def seed_of_each(seed: int | list, num_envs: int) -> list:
    """An int s gives environment i the seed [s, i], so nearby seeds share nothing; a list is taken as it is."""
    seeds = [[int(seed), i] for i in range(num_envs)] if np.isscalar(seed) else list(seed)
    if len(seeds) != num_envs:
        raise ValueError(f"{len(seeds)} seeds for {num_envs} environments")
    return seeds


class BatchEnv(gym.vector.VectorEnv):
    """Steps all environments of a batch together; a finished episode starts anew in the same step (SAME_STEP).

    A subclass holds the simulator, whatever it is made of, and gives four methods (`rows` are ascending row numbers):

        start(rows)       begin an episode in these rows, drawing from self.rngs[row] only
        advance(action)   one step of every row: reward (N,), terminated (N,), metrics {name: (N,)}
        observe(rows)     the observation of these rows: an array, or a dict of arrays
        state()           {name: array} of all it carries from step to step, live: restoring writes into these arrays

    Arrays are numpy's, or with `device` torch tensors on that device. Rows do not influence one another, so on the CPU
    row i equals, bit for bit, an environment alone with the same seed and actions.

    Args:
        num_envs: rows of the batch, N.
        observation_space, action_space: of one row.
        max_episode_steps: the step after which an unfinished episode is truncated.
        training: True adds what only training has (shaping, easier starts); False is the published task.
        split: train, validation or test: where episodes come from; the three never overlap.
        render_mode: None, rgb_array or human; what is drawn is row 0.
        device: None for numpy arrays, or the torch device of the tensors.
    """

    metadata: ClassVar = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array", "human"]}
    controllers: ClassVar[dict] = {}  # the task's scripted policies by name, each made without arguments
    measures: ClassVar[tuple[str, ...]] = ()  # names of the metrics of an episode, besides return, length and success

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
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode must be one of {', '.join(self.metadata['render_modes'])}, not {render_mode!r}"
            )
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.action_repeat = 1  # steps of the task that one call of step() makes ...
        self.steps_made: int | Array = 1  # ... and that the last one made in each row, if not all
        self.limit: int | Array = max_episode_steps  # a subclass may give each row's episode its own, (N,)
        self.num_episodes: int | None = None  # with training=False: how many different ones the split has, if limited
        self.training, self.split, self.render_mode = training, split, render_mode
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self.episode_return, self.episode_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        if device is not None:
            self.episode_return = torch.as_tensor(self.episode_return, device=device)
            self.episode_length = torch.as_tensor(self.episode_length, device=device)

    def start(self, rows: Array) -> None:
        raise NotImplementedError

    def advance(self, action: Array) -> tuple[Array, Array, dict[str, Array]]:
        raise NotImplementedError

    def observe(self, rows: Array) -> Array | dict[str, Array]:
        raise NotImplementedError

    def state(self) -> dict[str, Array]:
        raise NotImplementedError

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Begin an episode in every row, or in those where options["reset_mask"] (N,) is True.

        seed: an int s gives row i the generator of SeedSequence([s, i]); a list gives row i that of
        SeedSequence(seed[i]); with None the generators run on.
        """
        rows = self.rows_to_reset(options)
        if seed is not None:
            seeds = seed_of_each(seed, self.num_envs)
            for i in rows:
                self.rngs[i] = np.random.default_rng(sequence(seeds[i], self.split))
        self._begin(rows)
        return self.observe(np.arange(self.num_envs)), {}

    def rows_to_reset(self, options: dict | None) -> np.ndarray:
        """Indices of the rows that reset is asked to begin anew, all without options["reset_mask"] (num_envs,) bool."""
        return np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array, dict]:
        """One step of every row.

        In a step that ends episodes, info holds final_obs, episode = {"r": return, "l": length} and the task's metrics,
        each over all rows, and under the same name with an underscore the mask of the rows that ended.
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
            rows = np.flatnonzero(done) if isinstance(done, np.ndarray) else done.nonzero().flatten()
            self._begin(rows)
            write(obs, rows, self.observe(rows))
        if self.render_mode == "human":
            self.render()
        return obs, reward, terminated, truncated, info

    def _begin(self, rows: Array) -> None:
        self.episode_return[rows], self.episode_length[rows] = 0, 0
        self.start(rows)

    def _everything(self) -> dict[str, Array]:
        return {**self.state(), "episode_return": self.episode_return, "episode_length": self.episode_length}

    def state_dict(self) -> dict:
        """A snapshot from which stepping continues bit for bit."""
        return {"arrays": deepcopy(self._everything()), "rngs": [rng.bit_generator.state for rng in self.rngs]}

    def load_state_dict(self, state: dict) -> Any:
        """Go back to a snapshot. Returns the observation of that moment.

        Raises:
            UserError: the snapshot is from another number of environments or another version.
        """
        for name, array in self._everything().items():
            saved = state["arrays"].get(name)
            if saved is None or tuple(saved.shape) != tuple(array.shape):
                there = "absent" if saved is None else tuple(saved.shape)
                raise UserError(f"--resume: the shape of {name} in the checkpoint is {there}, not {tuple(array.shape)}")
            array[:] = saved
        for rng, rng_state in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state
        return self.observe(np.arange(self.num_envs))


def write(obs: Any, rows: Array, new: Any) -> None:
    """obs[rows] = new, for an array or a dict of arrays."""
    if isinstance(obs, dict):
        for name, array in obs.items():
            array[rows] = new[name]
    else:
        obs[rows] = new


class SingleEnv(gym.Env):
    """A BatchEnv of one row as an ordinary Gymnasium environment; a subclass names the class in `batch_env`."""

    batch_env: type[BatchEnv]
    metadata: ClassVar = BatchEnv.metadata

    def __init__(self, **kwargs: Any):
        self.batch = self.batch_env(num_envs=1, **kwargs)
        self.observation_space, self.action_space = self.batch.single_observation_space, self.batch.single_action_space
        self.render_mode, self.metadata = self.batch.render_mode, self.batch.metadata
        self.next_obs = None  # the first observation of the episode that the batch began when the last one ended

    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """seed: an int s gives the generator of SeedSequence([s, 0]), as in row 0 of a batch; a list that of
        SeedSequence(seed); with None the generator runs on."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        obs, self.next_obs = self.next_obs, None
        if obs is None or seed is not None:
            obs = row(self.batch.reset(seed=[seed] if isinstance(seed, list) else seed)[0], 0)
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.next_obs = None
        obs, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        obs = row(obs, 0)
        if terminated[0] or truncated[0]:
            self.next_obs, obs = obs, row(info["final_obs"], 0)
            names = [name for name in info if f"_{name}" in info and name not in ("final_obs", "episode")]
            info = {name: info[name][0].item() for name in names}
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:
        return self.batch.render()

    def close(self) -> None:
        self.batch.close()


def row(obs: Any, i: int) -> Any:
    """Row i of a batched observation, as numpy."""
    return {name: np.asarray(array[i]) for name, array in obs.items()} if isinstance(obs, dict) else np.asarray(obs[i])


class GymVec(gym.vector.VectorEnv):
    """Gymnasium's own environments, one after the other, with the seeds, the info and the autoreset of a BatchEnv.

    Observations are cast to float32 and actions to the dtype of the action space. SyncVectorEnv, which also gathers
    the info of every step, takes a fifth longer on HalfCheetah.
    """

    controllers: ClassVar[dict] = {}
    measures: ClassVar[tuple[str, ...]] = ()
    num_episodes = None
    action_repeat = 1

    def __init__(self, env_id: str, num_envs: int, split: str = "train", **kwargs: Any):
        self.envs = [gym.make(env_id, **kwargs) for _ in range(num_envs)]
        first = self.envs[0]
        self.num_envs, self.render_mode = num_envs, first.render_mode
        self.metadata = {**first.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        if isinstance(first.observation_space, gym.spaces.Box):
            low, high = (
                bound.astype(np.float32) for bound in (first.observation_space.low, first.observation_space.high)
            )
            self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.obs = create_empty_array(self.single_observation_space, num_envs)  # the current observations
        self.split, self.steps, self.seed = split, 0, 0
        self.episode_return, self.episode_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """As in a BatchEnv; other options than reset_mask go to the environments."""
        options = dict(options or {})
        rows = np.flatnonzero(options.pop("reset_mask", np.ones(self.num_envs, bool)))
        seeds = [None] * self.num_envs
        if seed is not None:  # one integer for each, as Gymnasium's environments take no other seed
            self.seed = seed if np.isscalar(seed) else 0
            sequences = [sequence(s, self.split) for s in seed_of_each(seed, self.num_envs)]
            seeds = [int(s.generate_state(1)[0]) for s in sequences]
        for i in rows:
            self._begin(i, seed=seeds[i], options=options or None)
        return self.obs.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        actions, successes = np.asarray(actions, self.single_action_space.dtype), {}
        for i, env in enumerate(self.envs):
            self.obs[i], reward[i], terminated[i], truncated[i], env_info = env.step(actions[i])
            if "is_success" in env_info:
                successes[i] = bool(env_info["is_success"])
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
            for i in np.flatnonzero(done):
                self._begin(i)
        return self.obs.copy(), reward, terminated, truncated, info

    def _begin(self, i: int, **how: Any) -> None:
        self.episode_return[i], self.episode_length[i] = 0, 0
        self.obs[i], _ = self.envs[i].reset(**how)

    def state_dict(self) -> dict:
        """Gymnasium's environments have no snapshot; this says where fresh episodes are to begin instead."""
        return {"fresh_episodes": True, "seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: dict) -> np.ndarray:
        """Begin fresh episodes from a part of the seed's stream that was not used yet. Returns their observations."""
        obs, _ = self.reset(seed=[[state["seed"], i, state["steps"]] for i in range(self.num_envs)])
        self.seed, self.steps = state["seed"], state["steps"]
        return obs

    def render(self) -> np.ndarray | None:
        return self.envs[0].render()

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()
