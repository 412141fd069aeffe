"""Evaluate policies: networks, scripted controllers and ONNX files; success rates, paired gains, videos."""

import hashlib
import importlib.util
import json
import math
import re
import sys
import tomllib
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from envs import BUNDLED, UserError, check_flat_box, constructor_parameters, make_vec
from envs.batch_env import MAX_FPS

# A policy maps batched observations (N, ...) to actions (N, A). A policy with state also has reset(indices, envs),
# called when episodes begin in these environments. A controller may name the env_kwargs that it requires.
Policy = Callable[[Any], np.ndarray]

EVAL_ENVS = 100  # environments that an evaluation steps together at most
EVAL_GYM_ENVS = 24  # fewer of Gymnasium's, which are stepped one after the other and may take long to make
MAX_EPISODE_STEPS = 100_000
ACTION_KWARGS = ("action_mode", "action_repeat")  # environment arguments that define what an action means
OBS_KWARGS = ("grid_channels", "grid_size", "grid_resolution")  # and those that define what an observation means
LOWER_IS_BETTER = {
    *("failure_rate", "collision_rate", "pedestrian_collision", "obstacle_collision", "timeout", "near_misses"),
    *("force_exceed", "comfort_exposure", "jerk", "time_to_goal"),
    *("total_cost", "lataccel_cost", "jerk_cost", "position_error", "yaw_error"),
}


class NonFiniteError(FloatingPointError):
    """An observation, action, reward, loss or parameter is NaN or infinite."""


def check_finite(what: str, x: Any, where: str) -> None:
    """Raises NonFiniteError, which names the environment, unless all of x (N, ...) is finite."""
    finite = np.isfinite(to_numpy(x))
    if not finite.all():
        env = int(finite.reshape(len(finite), -1).all(1).argmin())
        raise NonFiniteError(f"{what} is not finite at {where} in environment {env}")


def check_update(agent: nn.Module, stats: dict[str, float], step: int) -> None:
    """Raises NonFiniteError if a statistic or a parameter is not finite after an update."""
    wrong = [name for name, x in stats.items() if name != "explained_variance" and not math.isfinite(x)]
    wrong += [name for name, parameter in agent.named_parameters() if not parameter.isfinite().all()]
    if wrong:
        raise NonFiniteError(f"{wrong[0]} is not finite after step {step}; try a lower --learning-rate")


def to_numpy(x: Any) -> np.ndarray:
    return x.cpu().numpy() if torch.is_tensor(x) else x


def rollout(
    policy: Policy, envs: Any, episodes: int, seed: int, on_step: Callable | None = None, first: int = 0,
    on_episode: Callable | None = None,
) -> list[dict]:  # fmt: skip
    """Run a policy for a number of episodes. Episode i is seeded with SeedSequence([seed, i]), so it begins in the same
    way for every policy and number of environments.

    Args:
        on_step: called after each step with (episode index, reward, terminated, done) of all environments, each (N,).
        first: index of the first episode.
        on_episode: called with (episode index, result) at the end of each episode.

    Returns:
        One dict per episode with return, length, success and failure (None if the task has none) and its metrics.

    Raises:
        FloatingPointError: an action or a reward is not finite.
        UserError: the split has fewer episodes, or an episode does not end.
    """
    last = first + episodes
    if envs.num_episodes is not None and last > envs.num_episodes:
        raise UserError(f"the {envs.split} split has {envs.num_episodes} episodes, not {last}; ask for fewer")
    running = first + np.arange(envs.num_envs)  # episode index of each environment; those >= last are not counted
    steps = np.zeros(envs.num_envs, int)
    results: dict[int, dict] = {}
    next_episode = first + envs.num_envs
    envs.autoreset = False  # the next episode is one of the list
    obs, _ = envs.reset(seed=[[seed, int(i)] for i in running])
    if hasattr(policy, "reset"):
        policy.reset(np.arange(envs.num_envs), envs)
    while True:
        action = policy(obs)
        check_finite("action", action, f"a step of the episodes {running.tolist()}")
        obs, reward, terminated, truncated, info = envs.step(action)
        check_finite("reward", reward, f"a step of the episodes {running.tolist()}")
        done = to_numpy(terminated | truncated)
        if on_step is not None:
            on_step(running, to_numpy(reward), to_numpy(terminated), done)
        steps = np.where(done, 0, steps + 1)
        if steps.max() >= MAX_EPISODE_STEPS:
            advice = "register the environment with max_episode_steps"
            raise UserError(f"an evaluation episode did not end within {MAX_EPISODE_STEPS:,} steps; {advice}")
        if not done.any():
            continue
        done = done & (running < last)
        for i in np.flatnonzero(done):
            results[int(running[i])] = episode_result(info, i)
            if on_episode is not None:
                on_episode(int(running[i]), results[int(running[i])])
        if len(results) == episodes:
            return [results[i] for i in range(first, last)]
        running = running.copy()
        running[done] = next_episode + np.arange(done.sum())
        next_episode += done.sum()
        begin = done & (running < last)
        if begin.any():
            obs, _ = envs.reset(seed=[[seed, int(i)] for i in running], options={"reset_mask": begin})
            if hasattr(policy, "reset"):
                policy.reset(np.flatnonzero(begin), envs)


def episode_result(info: dict, i: int) -> dict:
    """Return, length, success, failure and metrics of the episode that ended in environment i."""
    result = {"return": float(info["episode"]["r"][i]), "length": int(info["episode"]["l"][i])}
    for name in ("success", "failure"):
        known = f"is_{name}" in info and info[f"_is_{name}"][i]
        result[name] = bool(info[f"is_{name}"][i]) if known else None
    for name in info:
        if f"_{name}" in info and name not in ("final_obs", "episode", "is_success", "is_failure"):
            result[name] = info[name][i].item()
    return result


def num_eval_envs(env_id: str, episodes: int) -> int:
    """Number of environments that evaluate this number of episodes together; 0 episodes means all."""
    most = EVAL_ENVS if env_id in BUNDLED else EVAL_GYM_ENVS
    return min(most, episodes or most)


def make_eval_envs(args: Any, num_envs: int, split: str, **kwargs: Any) -> Any:
    """The published task (training=False) with the environment arguments of args.

    Raises:
        UserError: an argument is invalid, or the split has fewer than args.eval_episodes episodes.
    """
    env_kwargs = {**args.env_kwargs, **args.eval_env_kwargs, **kwargs}
    env_kwargs["vectorization"] = getattr(args, "vectorization", "sync")
    envs = make_vec(args.env_id, num_envs, training=False, split=split, threads=args.threads, **env_kwargs)
    limit = envs.num_episodes
    if args.eval_episodes == 0 and limit is None:
        raise UserError(f"0 evaluation episodes means all, but {args.env_id} has an unlimited number; give a number")
    if limit is not None and args.eval_episodes > limit:
        raise UserError(f"{args.eval_episodes} evaluation episodes: the {split} split has {limit}; 0 evaluates all")
    return envs


def evaluate(
    policy: Policy, args: Any, split: str = "test", video: Path | None = None, render_mode: str | None = None,
    on_episode: Callable | None = None,
) -> dict:  # fmt: skip
    """Evaluate a policy on the published task (training=False).

    Args:
        args: has env_id, env_kwargs, eval_env_kwargs, eval_episodes (0 for the whole split), eval_seed and threads.
        split: train, validation or test.
        video: file for a video of the first episode, .mp4 or .gif.
        render_mode: human shows the episodes in a window.
        on_episode: called with (episode index, result) at the end of each episode.

    Returns:
        Mean and standard deviation of return and length, success_rate and failure_rate (None if the task has none),
        the mean of every metric of the task, and the result of each episode.
    """
    render_mode = "rgb_array" if video else render_mode
    rendering = {} if render_mode is None else {"render_mode": render_mode}
    num_envs = 1 if render_mode == "human" else num_eval_envs(args.env_id, args.eval_episodes)
    required = getattr(policy, "env_kwargs", {})
    envs = make_eval_envs(args, num_envs, split, **required, **rendering)
    try:
        if video:
            policy = VideoRecorder(policy, envs)
        episodes = args.eval_episodes or envs.num_episodes
        results = rollout(policy, envs, episodes, args.eval_seed, on_episode=on_episode)
        if video:
            policy.save(video)
    finally:
        envs.close()
    about = {"env_id": args.env_id, "env_kwargs": args.env_kwargs | args.eval_env_kwargs | required}
    return {**about, "episodes": episodes, "seed": args.eval_seed, **summarize(results)}


def summarize(results: list[dict]) -> dict:
    """Means and standard deviations over episodes, the episodes themselves, and rates per scenario if there are any."""

    def mean(name: str, results: list[dict] = results) -> float | None:
        values = [float(result[name]) for result in results if result[name] is not None]
        return float(np.mean(values)) if values else None

    known = ("return", "length", "success", "failure")
    metrics = [name for name, x in results[0].items() if name not in known and not isinstance(x, str)]
    summary = {
        "mean_return": mean("return"),
        "std_return": float(np.std([result["return"] for result in results])),
        "mean_length": mean("length"),
        "std_length": float(np.std([result["length"] for result in results])),
        "success_rate": mean("success"),
        "failure_rate": mean("failure"),
        "metrics": {name: mean(name) for name in metrics},
        "per_episode": results,
    }
    if "pedestrian_collision" in metrics:
        collisions = summary["metrics"]["pedestrian_collision"] + summary["metrics"]["obstacle_collision"]
        summary["metrics"]["collision_rate"] = collisions
    if "scenario" in results[0]:
        summary["per_scenario"] = {}
        for name in sorted({result["scenario"] for result in results}):
            episodes = [result for result in results if result["scenario"] == name]
            rates = {"success_rate": mean("success", episodes), "failure_rate": mean("failure", episodes)}
            summary["per_scenario"][name] = {"episodes": len(episodes), **rates}
    return summary


def figures(evaluation: dict) -> dict[str, float]:
    """All figures of an evaluation by name: rates, mean_return, mean_length and the task's metrics."""
    names = ("success_rate", "failure_rate", "mean_return", "mean_length")
    values = {name: evaluation[name] for name in names} | evaluation["metrics"]
    return {name: value for name, value in values.items() if value is not None}


def selection_key(evaluation: dict, metric: str = "auto") -> tuple[float, ...]:
    """What best.pt is selected by, larger is better. auto is success rate, then the task's score or mean return."""
    auto = (evaluation["success_rate"] or 0.0, evaluation["metrics"].get("score", evaluation["mean_return"]))
    if metric == "auto":
        return auto
    value = figures(evaluation)[metric]
    return (-value if metric in LOWER_IS_BETTER else value, *auto)


def meets(values: dict[str, float], thresholds: dict[str, float]) -> bool:
    """Whether metrics reach their thresholds; metrics in LOWER_IS_BETTER must not exceed theirs."""
    signs = {name: -1 if name in LOWER_IS_BETTER else 1 for name in thresholds}
    return all(sign * values[name] >= sign * thresholds[name] for name, sign in signs.items())


def converged_at(evaluations: list[dict], criterion: dict[str, float] | None) -> int | None:
    """Step of the first of three consecutive evaluations that meet a criterion such as {"success_rate": 0.9,
    "failure_rate": 0.05}, or None."""
    consecutive: list[int] = []
    for evaluation in evaluations if criterion else []:
        values = figures(evaluation)
        if missing := [name for name in criterion if name not in values]:
            raise UserError(f"{missing[0]} is not a metric of these evaluations; choose from {', '.join(values)}")
        consecutive = [*consecutive, evaluation["step"]] if meets(values, criterion) else []
        if len(consecutive) == 3:
            return consecutive[0]
    return None


def describe(evaluation: dict) -> str:
    """An evaluation in one line."""
    parts = [f"return {evaluation['mean_return']:.2f} +- {evaluation['std_return']:.2f}"]
    for name, value in figures(evaluation).items():
        if name != "mean_return":
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return f"{evaluation['episodes']} episodes: " + ", ".join(parts)


def paired_gain(evaluation: dict, base: dict) -> dict:
    """Mean difference to another policy on the same episodes, in success or, if the task has none, in return.

    Returns:
        of (success or return), gain, and its normal 95 % interval low to high (None for a single episode).
    """
    of = "return" if evaluation["success_rate"] is None else "success"
    pairs = zip(evaluation["per_episode"], base["per_episode"], strict=True)
    difference = np.array([float(ours[of]) - float(theirs[of]) for ours, theirs in pairs])
    gain, low, high = float(difference.mean()), None, None
    if len(difference) > 1:
        margin = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
        low, high = gain - margin, gain + margin
    return {"of": of, "gain": gain, "low": low, "high": high}


class VideoRecorder:
    """Wraps a policy and records environment 0 before each action, until its first episode ends."""

    def __init__(self, policy: Policy, envs: Any):
        self.policy, self.envs = policy, envs
        self.every = math.ceil(envs.metadata.get("render_fps", 30) / MAX_FPS)
        self.fps = envs.metadata.get("render_fps", 30) / self.every
        self.frames: list[np.ndarray] = []
        self.calls, self.episodes = 0, 0

    def reset(self, indices: np.ndarray, envs: Any) -> None:
        self.episodes += 0 in indices
        if hasattr(self.policy, "reset"):
            self.policy.reset(indices, envs)

    def __call__(self, obs: Any) -> np.ndarray:
        if self.episodes == 1 and self.calls % self.every == 0:
            self.frames.append(self.envs.render())
        self.calls += 1
        return self.policy(obs)

    def save(self, path: Path) -> None:
        """Write an .mp4, or a .gif with at most 12 frames per second and 400 pixels wide."""
        import imageio.v2 as imageio  # slow to import
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gif":
            skip = math.ceil(self.fps / 12)
            images = [Image.fromarray(frame) for frame in self.frames[::skip]]
            images = [image.resize((400, round(400 * image.height / image.width))) for image in images]
            images = [image.quantize(128, Image.Quantize.MAXCOVERAGE) for image in images]  # half the size
            duration = 1000 * skip / self.fps  # ms
            images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
        else:
            imageio.mimwrite(path, self.frames, fps=self.fps, macro_block_size=2)
        print(f"recorded {path}", file=sys.stderr)


# Policies


class DeterministicPolicy:
    """The deterministic policy of an agent. It copies the agent: build a new one for each evaluation.

    It computes in float64 and rounds to float32, because in float32 the last bits would depend on the batch size."""

    def __init__(self, agent: nn.Module):
        self.agent = deepcopy(agent).cpu().double()

    @torch.no_grad()
    def __call__(self, obs: Any) -> np.ndarray:
        obs = {name: torch.as_tensor(x) for name, x in (obs if isinstance(obs, dict) else {"obs": obs}).items()}
        obs = {name: x.double() if x.is_floating_point() else x for name, x in obs.items()}
        return self.agent(**obs).numpy().astype(np.float32)


class ZeroPolicy:
    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def __call__(self, obs: Any) -> np.ndarray:
        num_envs = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        return np.zeros((num_envs, self.action_dim), np.float32)


def onnx_session(path: str) -> Any:
    """An ONNX file, ready to run on one thread. Raises UserError if it is missing or damaged."""
    import onnxruntime  # slow to import

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a policy.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise UserError(f"{path}: cannot be read as an ONNX file ({error})") from error


class OnnxPolicy:
    """A policy from an ONNX file. Its input is an observation (N, obs_dim), or the parts of a dict observation by name.

    Args:
        path: the file.
        obs: an example observation with batch size 2.
        action_dim: number of actions.

    Raises:
        UserError: the file cannot be read or run, or does not fit the environment.
    """

    def __init__(self, path: str, obs: Any, action_dim: int):
        self.session = onnx_session(path)
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        if "kind" in self.metadata:
            raise UserError(f"{path}: made by the first edition; train again")
        dtypes = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}
        try:
            self.inputs = {i.name: dtypes[i.type] for i in self.session.get_inputs()}
            shape = self(obs).shape
        except Exception as error:
            raise UserError(f"{path}: does not run on observations of this environment ({error})") from error
        if shape != (2, action_dim):
            raise UserError(f"{path}: returns actions of shape {shape} for two observations, not {(2, action_dim)}")

    def __call__(self, obs: Any) -> np.ndarray:
        obs = obs if isinstance(obs, dict) else dict.fromkeys(self.inputs, obs)
        return self.session.run(None, {name: np.asarray(obs[name], dtype) for name, dtype in self.inputs.items()})[0]


class BlendPolicy:
    """weight * a + (1 - weight) * b."""

    def __init__(self, a: Policy, b: Policy, weight: float):
        self.a, self.b, self.weight = a, b, np.float32(weight)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self.weight * self.a(obs) + (1 - self.weight) * self.b(obs)


BLEND = re.compile(r"blend:(.+\.onnx|[\w-]+):(.+\.onnx|[\w-]+):(\d+\.?\d*)")  # paths may contain colons


def make_scripted_policy(name: str, envs: Any) -> Policy:
    """The policy with this name: zero, a controller of the environment, PATH.onnx, or blend:A:B:w for w A + (1 - w) B.

    Raises:
        UserError: there is no such policy, or it does not fit the environment.
    """
    action_dim = envs.single_action_space.shape[0]
    if name == "zero":
        return ZeroPolicy(action_dim)
    if name in envs.controllers:
        return envs.controllers[name]()
    if blend := BLEND.fullmatch(name):
        a, b, weight = blend.groups()
        if not 0 <= float(weight) <= 1:
            raise UserError(f"{name}: the weight must be from 0 to 1")
        return BlendPolicy(make_base_policy(a, envs), make_base_policy(b, envs), float(weight))
    if not name.endswith(".onnx"):
        known = ", ".join(["zero", *envs.controllers])
        raise UserError(f"unknown policy {name!r}; choose {known}, PATH.onnx or blend:A:B:w, such as blend:ik:zero:0.5")
    policy = OnnxPolicy(name, example_obs(envs), action_dim)
    if policy.metadata.get("policy_type") != "residual":
        return policy
    base_policy = make_base_policy(locate(policy.metadata["base_policy"], Path(name).parent), envs)
    scale = float(policy.metadata["alpha"]) * float(policy.metadata["residual_scale"])
    return load_script(policy.metadata["script"]).ResidualPolicy(policy, base_policy, scale, envs.single_action_space)


def make_base_policy(name: str, envs: Any) -> Policy:
    """A scripted policy that depends on the observation alone, as base policies and the parts of a blend must."""
    policy = make_scripted_policy(name, envs)
    if hasattr(policy, "reset") or hasattr(policy, "base_policy"):
        what = "needs more than the observation" if hasattr(policy, "reset") else "is a residual policy"
        raise UserError(f"{name} {what}; clone it with bc_pretrain.py and use the policy.onnx of the clone")
    return policy


def example_obs(envs: Any) -> Any:
    """Two observations of zeros, with float32 for floats."""
    space = envs.single_observation_space
    parts = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
    dtypes = {name: np.float32 if part.dtype.kind == "f" else part.dtype for name, part in parts.items()}
    obs = {name: np.zeros((2, *part.shape), dtypes[name]) for name, part in parts.items()}
    return obs if isinstance(space, gym.spaces.Dict) else obs["obs"]


# Policy files


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_pt(path: str | Path) -> dict:
    """A .pt file that holds a dict. Raises UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a .pt file, or a run directory that holds one")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # what torch.load raises has no common base class
        raise UserError(f"{path}: damaged or not a checkpoint ({error}); use another file") from error


def read_json(path: str | Path) -> dict:
    """A JSON file that holds one object, or a .toml file. Raises UserError if it is missing or not such a file."""
    kind, parse = ("TOML", tomllib.loads) if Path(path).suffix == ".toml" else ("JSON", json.loads)
    try:
        return {**parse(Path(path).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a {kind} object ({error})") from None


def resolve_policy(
    name: str, env_id: str | None = None, env_kwargs: dict | None = None, split: str = "test"
) -> tuple[Policy, str, dict, str]:
    """Load a policy and determine its environment.

    Args:
        name: run directory (its best.pt), .pt or .onnx file, or scripted controller.
        env_id: environment; a file names its own.
        env_kwargs: keyword arguments for the environment, added to the policy's.

    Returns:
        The policy, the id and arguments of its environment, and its file or name.

    Raises:
        UserError: there is no such policy or environment, or they do not fit together.
    """
    recorded: dict[str, Any] = {"file": name}
    if name.endswith(".pt") or Path(name).is_dir():
        recorded = read_policy(name)
    elif name.endswith(".onnx"):
        metadata = onnx_session(name).get_modelmeta().custom_metadata_map
        if "env_id" in metadata:
            kwargs = {key: json.loads(metadata[key]) for key in ACTION_KWARGS + OBS_KWARGS if key in metadata}
            recorded |= {"env_id": metadata["env_id"], "env_kwargs": kwargs}
    if "env_id" in recorded:
        check_env_module(recorded["env_id"], env_id, name)
        if env_id not in (None, recorded["env_id"]):
            raise UserError(f"{name}: a policy for {recorded['env_id']}, not {env_id}; leave --env-id out")
    elif env_id is None:
        raise UserError(f"{name}: no run or file that names its environment; a scripted controller needs --env-id")
    env_id, env_kwargs = recorded.get("env_id", env_id), recorded.get("env_kwargs", {}) | (env_kwargs or {})
    envs = make_vec(env_id, 1, training=False, split=split, **env_kwargs)
    if not isinstance(envs.single_observation_space, gym.spaces.Dict):
        check_flat_box(envs)
    if "env_id" in recorded:
        check_same_kwargs(name, recorded["env_kwargs"], env_kwargs, envs)
    if "agent" in recorded:
        policy = load_script(recorded["script"]).load_policy(recorded | {"env_kwargs": env_kwargs}, envs)
    else:
        policy = make_scripted_policy(name, envs)
        required = getattr(policy, "env_kwargs", {})
        env_kwargs = required | env_kwargs
        check_same_kwargs(name, env_kwargs | required, env_kwargs, envs)
    envs.close()
    return policy, env_id, env_kwargs, recorded["file"]


def check_same_kwargs(source: str, theirs: dict, ours: dict, envs: Any) -> None:
    """Raises UserError if environment arguments differ that define what an observation or an action means."""
    parameters = constructor_parameters(type(envs))
    for name in ACTION_KWARGS + OBS_KWARGS:
        default = parameters[name].default if name in parameters else None
        there, here = theirs.get(name, default), ours.get(name, default)
        if there != here:
            raise UserError(f"{source}: is for {name} {there}, not {here}; change --env-kwargs")


def read_policy(path: str, policy_type: str | None = None) -> dict:
    """A policy file, or best.pt of a run directory. Files that it depends on are looked for at their recorded path and
    then beside it.

    Raises:
        UserError: the file is missing, damaged or of another type, or a file it depends on is missing or has changed.
    """
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    policy = read_pt(file)
    if "kind" in policy:
        raise UserError(f"{file}: made by the first edition; train again")
    if not {"policy_type", "script", "args", "env_id", "env_kwargs", "agent", "files"} <= policy.keys():
        raise UserError(f"{file}: not a policy file; give best.pt, final.pt or a checkpoint of a run")
    if policy_type not in (None, policy["policy_type"]):
        raise UserError(f"{file}: holds a {policy['policy_type']}, but a {policy_type} is needed")
    found = {name: locate(name, file.parent) for name in policy["files"]}
    for name, digest in policy["files"].items():
        if not Path(found[name]).is_file() or sha256(found[name]) != digest:
            raise UserError(f"{found[name]} is missing or not the file that {file} was trained with; put it back")
    policy["env_kwargs"] = {k: found.get(x, x) if isinstance(x, str) else x for k, x in policy["env_kwargs"].items()}
    if "base_policy" in policy["args"]:
        policy["args"]["base_policy"] = locate(policy["args"]["base_policy"], file.parent)
    policy["file"] = str(file)
    return policy


def locate(name: str, folder: Path) -> str:
    """A file at its recorded path or else in a folder. The files of a blend are located too."""
    if blend := BLEND.fullmatch(name):
        a, b, weight = blend.groups()
        return f"blend:{locate(a, folder)}:{locate(b, folder)}:{weight}"
    beside = folder / Path(name).name
    return str(beside) if not Path(name).is_file() and beside.is_file() else name


def load_script(name: str) -> ModuleType:
    """Import the training script that wrote a policy, from beside envs/ or from the working directory.

    Raises:
        UserError: there is no such script, or it defines no load_policy.
    """
    folders = [Path(__file__).resolve().parents[1], Path.cwd()]
    files = [folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file()]
    if not str(name).isidentifier() or not files:
        raise UserError(f"there is no training script {name}.py in {folders[0]} or {folders[1]}; copy it there")
    module = sys.modules.get(name)
    if module is None or Path(getattr(module, "__file__", None) or "").resolve() != files[0].resolve():
        spec = importlib.util.spec_from_file_location(f"_script_{name}", files[0])
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
    if not hasattr(module, "load_policy"):
        raise UserError(f"{files[0]} does not define load_policy(checkpoint, envs)")
    return module


def check_env_module(env_id: str, given: str | None, source: str) -> None:
    """Raises UserError if a file, but not the command line, names an environment MODULE:ID: importing it runs code."""
    module = env_id.rpartition(":")[0]
    if module and env_id != given and module not in sys.modules:
        raise UserError(f"{source}: would import the module {module}; if you trust it, give --env-id {env_id}")
