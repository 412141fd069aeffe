"""Metrics of an episode, and the terms of the rewards.

SNQI, the social navigation quality index, is one number for an episode:

    SNQI = w_s success - w_t time - w_c N(collisions) - w_n N(near misses) - w_d comfort - w_f N(force) - w_j N(jerk)
    N(x) = clip((x - median) / (p95 - median), 0, 1)

with medians and 95th percentiles of a baseline policy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.evaluation import read_json

FILE = Path(__file__).parents[1] / "assets" / "socnav_snqi.json"
WEIGHTS = ("success", "time", "collisions", "near_misses", "comfort_exposure", "force_exceed", "jerk")
NORMALIZED = ("collisions", "near_misses", "force_exceed", "jerk")

MEASURES = (  # of an episode, beside return, length, success and failure
    *("pedestrian_collision", "obstacle_collision", "timeout", "near_misses", "force_exceed", "comfort_exposure"),
    *("jerk", "path_efficiency", "time_to_goal", "snqi"),
)

NEAR = 0.5  # m of clearance to a pedestrian below which a step is a near miss
NEAR_WALL = 0.3  # m of clearance to a wall below which it counts as near


class Step(NamedTuple):
    """Events and distances of a step, (N,) each."""

    progress: Tensor  # m along the route
    goal: Tensor  # bool: reached, and without contact
    pedestrian: Tensor  # bool: contact with a pedestrian
    wall: Tensor  # bool: contact with an obstacle
    timeout: Tensor  # bool: the time is up
    near: Tensor  # bool: within half a metre of a pedestrian
    to_pedestrian: Tensor  # m of clearance to the nearest one
    to_wall: Tensor  # m of clearance to the nearest obstacle
    felt: Tensor  # pedestrians that felt more than 2 m/s^2
    share: Tensor  # the same as a share of all pedestrians
    change: Tensor  # |a - a of the last step|, in units of half the action's range
    way: Tensor  # m driven
    limit: Tensor  # steps, the time limit


# Terms of the rewards
TERMS: dict[str, Callable[[Step], Tensor]] = {
    "step": lambda s: torch.ones_like(s.way),
    "time": lambda s: 1 / s.limit,  # adds up to at most 1
    "progress": lambda s: s.progress.clamp(-1, 1),
    "goal": lambda s: s.goal,
    "pedestrian_contact": lambda s: s.pedestrian,
    "obstacle_contact": lambda s: s.wall,
    "timeout": lambda s: s.timeout,
    "near_miss": lambda s: (1 - s.to_pedestrian / NEAR).clamp(0, 1),  # 1 at contact
    "near_wall": lambda s: (1 - s.to_wall / NEAR_WALL).clamp(0, 1),  # 1 at contact
    "near_step": lambda s: s.near,
    "force_exceed": lambda s: s.felt,
    "comfort": lambda s: s.share,
    "action_change": lambda s: s.change,
    "action_change_squared": lambda s: s.change.square(),
    "stagnation": lambda s: s.progress <= 0,
}
REWARDS: dict[str, dict[str, float]] = {
    "simple": {"time": -0.1, "pedestrian_contact": -5.0, "obstacle_contact": -2.0, "goal": 1.0},
    "punish_action": {
        "time": -0.1, "pedestrian_contact": -5.0, "obstacle_contact": -2.0, "goal": 1.0, "action_change": -0.1,
    },
    "route_completion": {
        "step": -0.01, "progress": 1.0, "goal": 5.0, "pedestrian_contact": -10.0, "obstacle_contact": -10.0,
        "near_miss": -0.1, "near_wall": -0.1, "stagnation": -0.05, "action_change_squared": -0.01,
    },
}  # fmt: skip
NAMES = (*REWARDS, "snqi_step")


def load_snqi(path: str | None) -> dict[str, dict]:
    """{"weights": {...}, "baselines": {metric: {"median", "p95"}}} from a file, by default the bundled one.

    Raises:
        ValueError: an entry is missing.
    """
    content = read_json(path or FILE)
    try:
        weights = {name: float(content["weights"][name]) for name in WEIGHTS}
        keys = ("median", "p95")
        baselines = {name: {key: float(content["baselines"][name][key]) for key in keys} for name in NORMALIZED}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path or FILE}: not weights and baselines of the SNQI ({error!r})") from error
    return {"weights": weights, "baselines": baselines}


def span(baseline: dict) -> float:
    """p95 - median; 1 where they are equal."""
    return (baseline["p95"] - baseline["median"]) or 1.0


def snqi(metrics: dict[str, np.ndarray], settings: dict[str, dict]) -> np.ndarray:
    """SNQI (N,) of episodes with these metrics (N,): success, time (share of the limit), and those of NORMALIZED."""
    w, baselines = settings["weights"], settings["baselines"]
    cost = w["time"] * metrics["time"] + w["comfort_exposure"] * metrics["comfort_exposure"]
    for name in NORMALIZED:
        x = (metrics[name] - baselines[name]["median"]) / span(baselines[name])
        cost = cost + w[name] * np.clip(x, 0, 1)
    return w["success"] * metrics["success"] - cost


def snqi_baseline(episodes: list[dict], weights: dict[str, float]) -> dict[str, dict]:
    """The contents of a file for `snqi`, with medians and 95th percentiles of these episodes."""
    values = {name: [episode[name] for episode in episodes] for name in ("near_misses", "force_exceed", "jerk")}
    values["collisions"] = [float(episode["failure"]) for episode in episodes]
    quantiles = {name: np.quantile(x, [0.5, 0.95]).tolist() for name, x in values.items()}
    return {"weights": weights, "baselines": {name: {"median": x[0], "p95": x[1]} for name, x in quantiles.items()}}


def reward_weights(reward: str, path: str | None, snqi_settings: dict[str, dict], steps: float) -> dict[str, float]:
    """{term: weight} of a reward, or the weights of a file, which must have the same terms and may have others.

    snqi_step is the contribution of each step to the SNQI of an episode of `steps` steps, before clipping.

    Raises:
        ValueError: there is no such reward, or the file lacks a term or has an unknown one.
    """
    if reward not in NAMES:
        raise ValueError(f"reward must be one of {', '.join(NAMES)}, not {reward!r}")
    if reward == "snqi_step":
        w, spans = snqi_settings["weights"], {n: span(snqi_settings["baselines"][n]) for n in NORMALIZED}
        weights = {
            "goal": w["success"], "time": -w["time"],
            "pedestrian_contact": -w["collisions"] / spans["collisions"],
            "obstacle_contact": -w["collisions"] / spans["collisions"],
            "near_step": -w["near_misses"] / spans["near_misses"], "comfort": -w["comfort_exposure"] / steps,
            "force_exceed": -w["force_exceed"] / spans["force_exceed"],
            "action_change": -w["jerk"] / spans["jerk"] / steps,
        }  # fmt: skip
    else:
        weights = REWARDS[reward]
    if path is None:
        return weights
    given = read_json(path)
    if missing := [name for name in weights if name not in given]:
        raise ValueError(f"{path}: weights for reward {reward} must have {', '.join(missing)}; add what is missing")
    if unknown := [name for name in given if name not in TERMS]:
        raise ValueError(f"{path}: no term {unknown[0]}; choose from {', '.join(TERMS)}")
    return {name: float(value) for name, value in given.items()}
