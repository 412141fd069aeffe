"""Play a policy and measure it: evaluation, comparison, video. And policies to play: scripted, ONNX, blends."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import envs
from envs.batch_env import FASTEST_FILM
from envs.contents import misfit, shown
from envs.files import UserError, replacing, sha256, write_json
from envs.run import MEANING, is_policy_path, policy_file, require_same_files, video_path

# Batched observations (N, ...) -> actions (N, A). A policy with state also has reset(rows, vec), called as episodes
# begin in these rows of the vector environment. One that needs other arguments of the environment than a learned
# policy, such as an action mode, has them in env_kwargs.
Policy = Callable[[Any], np.ndarray]
RATES = ("success_rate", "failure_rate", "mean_return", "mean_length")
LOWER_IS_BETTER = {
    *("failure_rate", "pedestrian_collision", "obstacle_collision", "timeout", "near_misses", "force_exceed"),
    *("comfort_exposure", "jerk", "time_to_goal", "total_cost", "lataccel_cost", "jerk_cost"),
    *("collision_rate", "position_error", "yaw_error"),
}
ROWS = 24  # environments that an evaluation steps together; more would stand idle while the last episodes end


def rollout(
    policy: Policy, vec: Any, episodes: int, seed: int, on_step: Callable | None = None, first: int = 0,
    on_episode: Callable | None = None,
) -> list[dict]:  # fmt: skip
    """Play `episodes` episodes, numbered from `first` on, in the rows of the vector environment `vec`.

    Episode i starts from SeedSequence([seed, i]) whatever row it is played in, so it has the same start and the same
    random draws however many rows there are. on_step(playing, reward, terminated, done) is called after every step,
    each (N,): the episode that a row played, what it got, whether it ended, of itself or by the time limit;
    on_episode(number, result) after the last step of each.

    Returns:
        One dict an episode: return, length, success (None where the task has none) and the task's own metrics.

    Raises:
        FloatingPointError: an action or a reward is not finite.
    """
    limit, last = getattr(vec, "num_episodes", None), first + episodes
    if limit is not None and last > limit:
        raise UserError(f"{last} episodes of the {vec.split} split, which has {limit}; ask for at most so many")
    playing = first + np.arange(vec.num_envs)  # the episode in each row; one >= last is played but not counted
    results: list[dict | None] = [None] * episodes
    missing, started = episodes, first + vec.num_envs
    obs, _ = vec.reset(seed=[[seed, int(i)] for i in playing])
    if hasattr(policy, "reset"):
        policy.reset(np.arange(vec.num_envs), vec)
    while missing:
        action = policy(obs)
        require_finite_episodes("action", action, playing)
        obs, reward, terminated, truncated, info = vec.step(action)
        require_finite_episodes("reward", reward, playing)
        done = as_numpy(terminated | truncated)
        if on_step is not None:
            on_step(playing, as_numpy(reward), as_numpy(terminated), done)
        if not done.any():
            continue
        for i in np.flatnonzero(done):
            if playing[i] < last:
                results[playing[i] - first] = result = episode_result(info, i)
                missing -= 1
                if on_episode is not None:
                    on_episode(int(playing[i]), result)
        playing = playing.copy()
        playing[done] = started + np.arange(done.sum())
        started += done.sum()
        if missing:  # the row has begun an episode of its own choice: replace it by the one whose turn it is
            obs, _ = vec.reset(seed=[[seed, int(i)] for i in playing], options={"reset_mask": done})
            if hasattr(policy, "reset"):
                policy.reset(np.flatnonzero(done), vec)
    return results


def as_numpy(x: Any) -> np.ndarray:
    """An array, or a tensor on whatever device, as a numpy array."""
    return x.cpu().numpy() if torch.is_tensor(x) else x


def require_finite_episodes(what: str, x: Any, playing: np.ndarray) -> None:
    """Raises FloatingPointError, naming the episode that a row plays, unless all of x (N, ...) is finite."""
    finite = np.isfinite(as_numpy(x)).reshape(len(playing), -1).all(1)
    if not finite.all():
        raise FloatingPointError(f"the {what} is not finite in episode {playing[~finite][0]}")


def episode_result(info: dict, i: int) -> dict:
    """What row i's step says of the episode that it ended."""
    ours = ("final_obs", "episode", "is_success", "is_failure")
    metrics = {name: info[name][i].item() for name in info if f"_{name}" in info and name not in ours}
    return {
        "return": float(info["episode"]["r"][i]),
        "length": int(info["episode"]["l"][i]),
        "success": bool(info["is_success"][i]) if "is_success" in info else None,
        "failure": bool(info["is_failure"][i]) if "is_failure" in info else None,
        **metrics,
    }


def evaluate(policy: Policy, args: Any, split: str = "test", video: Path | None = None) -> dict:
    """Measure a policy on the published task (training=False), as a script's args say.

    Args:
        policy: what plays.
        args: env_id, env_kwargs, eval_env_kwargs, eval_episodes, eval_seed, threads, render.
        split: train, validation or test.
        video: where to record the first episode, if anywhere.

    Returns:
        What --json writes, without the policy's name; what the task does not define is None.
    """
    asked, needed = {**args.env_kwargs, **args.eval_env_kwargs}, getattr(policy, "env_kwargs", {})
    for name, value in needed.items():
        if asked.get(name, value) != value:
            raise UserError(f"this policy plays with {name} {value}, not {asked[name]}; leave {name} out")
    played = {**asked, **needed}
    window = getattr(args, "render", None)
    render_mode = window or ("rgb_array" if video else None)
    rows = 1 if window else min(ROWS, args.eval_episodes or ROWS)  # a window shows row 0: let all be played there
    drawing = {} if render_mode is None else {"render_mode": render_mode}  # which not every environment knows
    vec = envs.make_vec(args.env_id, rows, training=False, split=split, threads=args.threads, **played, **drawing)
    try:
        film = Film(vec, video) if video else None
        episodes = envs.evaluation_episodes(args, vec)
        results = rollout(policy, vec, episodes, args.eval_seed, film)
    finally:
        vec.close()
    about = {"env_id": args.env_id, "env_kwargs": played, "episodes": len(results), "seed": args.eval_seed}
    return {**about, **summarize(results)}


class Film:
    """Records row 0 until its first episode ends."""

    def __init__(self, vec: Any, path: Path):
        from moviepy import ImageSequenceClip

        self.vec, self.path, self.clip, self.frames = vec, path, ImageSequenceClip, []
        fps = vec.metadata.get("render_fps", 30)
        self.every, self.calls = math.ceil(fps / FASTEST_FILM), 0
        self.fps = fps / self.every

    def __call__(self, playing: np.ndarray, reward: np.ndarray, terminated: np.ndarray, done: np.ndarray) -> None:
        if self.frames is None:
            return
        if not done[0]:  # at the end of an episode the row already shows the next one
            if self.calls % self.every == 0:
                self.frames.append(self.vec.render())
            self.calls += 1
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, f".tmp{self.path.suffix}") as temporary:  # its ending says what it is
            self.clip(self.frames, fps=self.fps).write_videofile(str(temporary), logger=None)
        print(f"recorded {self.path}", file=sys.stderr)
        self.frames = None


def summarize(results: list[dict]) -> dict:
    """Means and standard deviations over episodes."""

    def column(name: str) -> np.ndarray:
        return np.array([result[name] for result in results], float)  # None becomes NaN

    def mean(name: str) -> float | None:
        return None if results[0][name] is None else float(column(name).mean())

    own = [name for name in results[0] if name not in ("return", "length", "success", "failure")]
    summary = {
        "mean_return": mean("return"),
        "std_return": float(column("return").std()),
        "mean_length": mean("length"),
        "std_length": float(column("length").std()),
        "success_rate": mean("success"),
        "failure_rate": mean("failure"),
        "metrics": {name: mean(name) for name in own if not isinstance(results[0][name], str)},
        "per_episode": results,
    }
    if "scenario" in own:
        summary["per_scenario"] = by_scenario(results)
    return summary


def by_scenario(results: list[dict]) -> dict[str, dict]:
    """{scenario: episodes, success and failure rate}, in the order of their names."""
    table = {}
    for name in sorted({result["scenario"] for result in results}):
        those = [result for result in results if result["scenario"] == name]
        rates = {f"{of}_rate": float(np.mean([result[of] for result in those])) for of in ("success", "failure")}
        table[name] = {"episodes": len(those), **rates}
    return table


def figures(evaluation: dict) -> dict[str, float]:
    """{name: value} of an evaluation's numbers, those of the task included, and collision_rate: contacts of all
    kinds."""
    values = {**evaluation, **evaluation["metrics"]}
    if {"pedestrian_collision", "obstacle_collision"} <= values.keys():
        values["collision_rate"] = values["pedestrian_collision"] + values["obstacle_collision"]
    return {name: x for name, x in values.items() if isinstance(x, int | float) and name not in ("step", "seed")}


def describe(result: dict) -> str:
    """An evaluation in one line."""
    parts = [f"return {result['mean_return']:.2f} +- {result['std_return']:.2f}", f"length {result['mean_length']:.1f}"]
    for name in ("success_rate", "failure_rate"):
        if result[name] is not None:
            parts.append(f"{name.replace('_', ' ')} {result[name]:.3f}")
    parts += [f"{name} {value:.4g}" for name, value in result["metrics"].items()]
    return f"{result['episodes']} episodes: " + ", ".join(parts)


def paired_gain(result: dict, base: dict) -> dict:
    """How much better one policy is than another on the same episodes, in success or, without it, in return.

    Returns:
        of, gain and its 95 % interval (low, high) from the paired differences.
    """
    of = "return" if result["success_rate"] is None else "success"
    pairs = zip(result["per_episode"], base["per_episode"], strict=True)
    difference = np.array([float(ours[of]) - float(theirs[of]) for ours, theirs in pairs])
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
    gain = difference.mean()
    return {"of": of, "gain": float(gain), "low": float(gain - half), "high": float(gain + half)}


def score(result: dict) -> tuple[float, float]:
    """What best.pt is chosen by: success where the task has it, then its own metric `score`, or else return."""
    return result["success_rate"] or 0.0, result["metrics"].get("score", result["mean_return"])


def better(result: dict, best: dict, metric: str) -> bool:
    """Whether an evaluation is better than the best so far by success_rate, failure_rate, mean_return or one of the
    task's metrics; where they are equal, by `score`."""

    def key(evaluation: dict) -> tuple:
        value = figures(evaluation)[metric]
        return (-value if metric in LOWER_IS_BETTER else value), score(evaluation)

    return key(result) > key(best)


def require_metric(metric: str, vec: Any) -> None:
    """Raises UserError unless a vector environment's evaluations have this metric."""
    known = (*RATES, *vec.measures)
    if metric not in known:
        raise UserError(f"--best-metric {metric}: no such metric; there are {', '.join(known)}")


def measure(policy: Policy, base_policy: Policy | None, args: Any) -> dict:
    """What --evaluate does: play the test split, with --compare-base also by the base alone, print, write --json."""
    compare_base = getattr(args, "compare_base", False)
    if compare_base and base_policy is None:
        raise UserError(f"--compare-base needs a policy file or a run, and {args.evaluate} has no base; leave it out")
    if args.json is not None and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise UserError(f"--json {args.json}: no file can be written there; give a file's name in an existing folder")
    learned = is_policy_path(args.evaluate)
    if learned:
        require_same_files(args.evaluate, args.env_kwargs)
    file = {"sha256": sha256(policy_file(args.evaluate))} if learned else {}
    result = {"policy": args.evaluate, **file, **evaluate(policy, args, "test", video_path(args))}
    if compare_base:
        result["base"] = evaluate(base_policy, args, "test")
        result["gain"] = paired_gain(result, result["base"])
    report(result)
    if args.json is not None:
        write_json(Path(args.json), result)
    return result


def report(result: dict) -> None:
    """Print an evaluation, and the comparison in it if there is one."""
    print(f"{result['policy']}: {describe(result)}")
    for name, row in result.get("per_scenario", {}).items():
        rates = f"success {row['success_rate']:.3f}, failure {row['failure_rate']:.3f}"
        print(f"  {name:45} {row['episodes']:4} episodes, {rates}")
    if "base" in result:
        gain = result["gain"]
        print(f"base alone: {describe(result['base'])}")
        interval = f"95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}"
        print(f"paired gain in {gain['of']}: {gain['gain']:+.3f}, {interval}")


class Deployed:
    """A trained network as a policy: its most likely actions. It computes in float64 and rounds, or else the last bits
    of an action would depend on how many observations share its batch."""

    def __init__(self, agent: nn.Module):
        self.agent = deepcopy(agent).cpu().double()

    @torch.no_grad()
    def __call__(self, obs: Any) -> np.ndarray:
        def exact(x: Any) -> torch.Tensor:
            x = torch.as_tensor(x)
            return x.double() if x.is_floating_point() else x

        several = isinstance(obs, dict)
        action = self.agent(**{name: exact(x) for name, x in obs.items()}) if several else self.agent(exact(obs))
        return action.numpy().astype(np.float32)


class Zero:
    """No action at all."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        return np.zeros((rows, self.action_dim), np.float32)


class OnnxPolicy:
    """A frozen policy from an ONNX file: input (N, observations), or those of a dict by name; output (N, actions).

    obs: how many observations there are, or {name: shape} of a dict of them."""

    def __init__(self, path: str, obs: int | dict[str, tuple[int, ...]], action_dim: int):
        from envs.onnx_file import open_session, read_model  # slow to import

        if not Path(path).is_file():
            raise UserError(
                f"{path}: no such file; a base policy is zero, a scripted controller, PATH.onnx or blend:A:B:w"
            )
        model = read_model(path, "export it again")
        self.session = open_session(path, model, 1, "export it again")
        about = {entry.key: entry.value for entry in model.metadata_props}
        self.env_kwargs = meaning(path, about)
        if about.get("kind") == "residual":
            raise UserError(f"{path}: holds a residual, which is only half an action; give a whole policy")
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        needed = {inputs[0].name: (obs,)} if isinstance(obs, int) else obs
        if {i.name: tuple(i.shape[1:]) for i in inputs} != needed or [o.shape[-1:] for o in outputs] != [[action_dim]]:
            found = f"{[i.shape for i in inputs]} -> {[o.shape for o in outputs]}"
            wanted = f"(N, {obs})" if isinstance(obs, int) else ", ".join(f"{k} (N, *{x})" for k, x in obs.items())
            raise UserError(f"{path}: maps {found}, but this environment needs {wanted} -> (N, {action_dim})")
        for i in inputs:
            if i.type not in ("tensor(float)", "tensor(uint8)") or isinstance(i.shape[0], int):
                advice = "export it for float32 and any number of observations (batch axis)"
                raise UserError(f"{path}: takes {i.type} {i.shape}; {advice}")
        self.path, self.inputs = path, {i.name: np.float32 if i.type == "tensor(float)" else np.uint8 for i in inputs}
        self.action_dim = action_dim

    def __call__(self, obs: Any) -> np.ndarray:
        obs = obs if isinstance(obs, dict) else dict.fromkeys(self.inputs, obs)
        seen = {name: obs[name].astype(kind) for name, kind in self.inputs.items()}
        try:
            action = self.session.run(None, seen)[0]
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise UserError(f"{self.path}: onnxruntime cannot run it; export it again") from error
        needed = (len(next(iter(seen.values()))), self.action_dim)
        if not isinstance(action, np.ndarray) or action.dtype != np.float32 or action.shape != needed:
            what = f"{action.dtype} {action.shape}" if isinstance(action, np.ndarray) else "no array"
            raise UserError(f"{self.path}: returned {what}, not float32 {needed}; export a working policy")
        if not np.isfinite(action).all():
            raise UserError(f"{self.path}: returned NaN or infinity for a finite observation; export a working policy")
        return action


def meaning(path: str, about: dict[str, str]) -> dict[str, Any]:
    """The arguments of the environment that an ONNX file's metadata name.

    Raises:
        UserError: they are no such values.
    """
    found = {}
    for name in sorted(MEANING & {*about}):
        with contextlib.suppress(ValueError, RecursionError):
            found[name] = json.loads(about[name])
        if misfit(found, {name: int | float | bool | str}):
            raise UserError(f"{path}: its metadata say {name} {shown(about[name])}, which cannot be; export it again")
    return found


class Blend:
    """w A + (1 - w) B."""

    def __init__(self, a: Policy, b: Policy, weight: float):
        self.a, self.b, self.weight = a, b, np.float32(weight)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self.weight * self.a(obs) + (1 - self.weight) * self.b(obs)


def scripted(name: str, vec: Any) -> Policy:
    """The policy of that name for a vector environment: zero, one of its own controllers, PATH.onnx or blend:A:B:w.

    Raises:
        UserError: there is no such policy, or it does not fit the environment.
    """
    controllers = getattr(vec, "controllers", {})
    action_dim = vec.single_action_space.shape[0]
    if name == "zero":
        return Zero(action_dim)
    if name in controllers:
        return controllers[name]()
    if name.endswith(".onnx"):
        space = vec.single_observation_space
        shapes = {k: x.shape for k, x in space.items()} if isinstance(space, gym.spaces.Dict) else space.shape[0]
        return OnnxPolicy(name, shapes, action_dim)
    if name.startswith("blend:"):
        parts = name.split(":")
        try:
            a, b, weight = parts[1], parts[2], float(parts[3])
        except (IndexError, ValueError):
            raise UserError(f"{name}: a blend is written blend:A:B:w, such as blend:ik:zero:0.5") from None
        if len(parts) > 4 or not 0 <= weight <= 1:
            raise UserError(f"{name}: a blend is blend:A:B:w with two policies and a weight w of A between 0 and 1")
        return Blend(frozen(a, vec), frozen(b, vec), weight)
    known = ", ".join(["zero", *controllers])
    raise UserError(f"unknown policy {name!r}: choose {known}, PATH.onnx or blend:A:B:w")


def frozen(name: str, vec: Any) -> Policy:
    """The policy of that name, if the observation is all that it looks at: a base policy, or a part of a blend."""
    policy = scripted(name, vec)
    if hasattr(policy, "reset"):
        advice = "clone it to an ONNX file, or choose one that needs no more"
        raise UserError(f"{name} looks at more than the observation; {advice}")
    return policy
