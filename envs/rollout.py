"""Play a policy and measure it: evaluation, comparison, video. And the policies that are played: scripted, ONNX, blends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs.run import UserError

# Batched observations (N, ...) -> actions (N, A). A policy with state also has reset(rows), called as episodes begin.
Policy = Callable[[Any], np.ndarray]
ROWS = 64  # environments that an evaluation steps together; its result does not depend on it


def rollout(policy: Policy, vec: Any, episodes: int, seed: int, on_step: Callable[[], None] | None = None) -> list[dict]:
    """Play `episodes` episodes in the rows of the vector environment `vec`.

    Episode i starts from SeedSequence([seed, i]) whatever row it is played in, so it has the same start and the same
    random draws however many rows there are.

    Returns:
        One dict an episode: return, length, success (None where the task has none) and the task's own metrics.

    Raises:
        FloatingPointError: the policy gave an action that is not finite.
    """
    playing = np.arange(vec.num_envs)  # the episode in each row; one >= episodes is played but not counted
    results: list[dict | None] = [None] * episodes
    missing, started = episodes, vec.num_envs
    obs, _ = vec.reset(seed=[[seed, int(i)] for i in playing])
    if hasattr(policy, "reset"):
        policy.reset(np.arange(vec.num_envs))
    while missing:
        action = policy(obs)
        if not np.isfinite(action).all():
            raise FloatingPointError(f"the policy's action is not finite in episode {playing[~np.isfinite(action).all(1)][0]}")
        obs, _, terminated, truncated, info = vec.step(action)
        if on_step is not None:
            on_step()
        done = terminated | truncated
        if not done.any():
            continue
        for i in np.flatnonzero(done):
            if playing[i] < episodes:
                results[playing[i]] = episode_result(info, i)
                missing -= 1
        playing[done] = started + np.arange(done.sum())
        started += done.sum()
        if missing:  # the row has begun an episode of its own choice: replace it by the one whose turn it is
            obs, _ = vec.reset(seed=[[seed, int(i)] for i in playing], options={"reset_mask": done})
            if hasattr(policy, "reset"):
                policy.reset(np.flatnonzero(done))
    return results


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


def evaluate(
    policy: Policy,
    env_id: str,
    env_kwargs: dict,
    episodes: int,
    seed: int,
    split: str = "test",
    rows: int = ROWS,
    on_step: Callable[[Any], None] | None = None,
) -> dict:
    """Measure a policy on the published task (training=False).

    Returns:
        mean_return, std_return, mean_length, std_length, success_rate, failure_rate, metrics (means over the episodes)
        and per_episode; what the task does not define is None.
    """
    vec = envs.make_vec(env_id, min(rows, episodes), **{**env_kwargs, "training": False, "split": split})
    try:
        results = rollout(policy, vec, episodes, seed, on_step and (lambda: on_step(vec)))
    finally:
        vec.close()
    return summarize(results)


def summarize(results: list[dict]) -> dict:
    """Means and standard deviations over episodes."""

    def column(name: str) -> np.ndarray:
        return np.array([result[name] for result in results], float)  # None becomes NaN

    def mean(name: str) -> float | None:
        return None if results[0][name] is None else float(column(name).mean())

    return {
        "episodes": len(results),
        "mean_return": mean("return"),
        "std_return": float(column("return").std()),
        "mean_length": mean("length"),
        "std_length": float(column("length").std()),
        "success_rate": mean("success"),
        "failure_rate": mean("failure"),
        "metrics": {name: mean(name) for name in results[0] if name not in ("return", "length", "success", "failure")},
        "per_episode": results,
    }


def describe(result: dict) -> str:
    """An evaluation in one line."""
    parts = [f"return {result['mean_return']:.2f} +- {result['std_return']:.2f}", f"length {result['mean_length']:.1f}"]
    for name in ("success_rate", "failure_rate"):
        if result[name] is not None:
            parts.append(f"{name.replace('_rate', '')} {result[name]:.3f}")
    parts += [f"{name} {value:.4g}" for name, value in result["metrics"].items()]
    return f"{result['episodes']} episodes: " + ", ".join(parts)


class Zero:
    """No action at all."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return np.zeros((len(obs), self.action_dim), np.float32)


class OnnxPolicy:
    """A frozen policy from an ONNX file: input (N, observations), output (N, actions)."""

    def __init__(self, path: str, obs_dim: int, action_dim: int):
        import onnxruntime

        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a base policy is zero, a scripted controller, PATH.onnx or blend:A:B:w")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise UserError(f"{path}: not a readable ONNX model; export it again") from error
        if self.session.get_modelmeta().custom_metadata_map.get("kind") == "residual":
            raise UserError(f"{path}: holds a residual, which is only half an action; give a whole policy")
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shapes = [list(inputs[0].shape), list(outputs[0].shape)] if len(inputs) == 1 else []
        if [shape[-1:] for shape in shapes] != [[obs_dim], [action_dim]]:
            found = f"{[i.shape for i in inputs]} -> {[o.shape for o in outputs]}"
            raise UserError(f"{path}: maps {found}, but this environment needs (N, {obs_dim}) -> (N, {action_dim})")
        self.path, self.input = path, inputs[0].name

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        action = self.session.run(None, {self.input: obs.astype(np.float32)})[0]
        if not np.isfinite(action).all():
            raise UserError(f"{self.path}: returned NaN or infinity for a finite observation; export a working policy")
        return action


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
        return OnnxPolicy(name, vec.single_observation_space.shape[0], action_dim)
    if name.startswith("blend:"):
        parts = name.split(":")
        try:
            a, b, weight = parts[1], parts[2], float(parts[3])
        except (IndexError, ValueError):
            raise UserError(f"{name}: a blend is written blend:A:B:w, such as blend:ik:zero:0.5") from None
        if len(parts) > 4 or not 0 <= weight <= 1:
            raise UserError(f"{name}: a blend is blend:A:B:w with two policies and a weight w of A between 0 and 1")
        return Blend(scripted(a, vec), scripted(b, vec), weight)
    known = ", ".join(["zero", *controllers])
    raise UserError(f"unknown policy {name!r}: choose {known}, PATH.onnx or blend:A:B:w")
