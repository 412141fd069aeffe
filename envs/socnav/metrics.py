"""What an episode is judged by, and what rewards are made of.

SNQI, the social navigation quality index, is one number for an episode:

    SNQI = w_s success - w_t time - w_c N(collisions) - w_n N(near misses) - w_d comfort - w_f N(force) - w_j N(jerk)
    N(x) = clip((x - median) / (p95 - median), 0, 1)

with medians and 95th percentiles of a baseline policy, so that 1 is as bad as its worst twentieth.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.evaluation import read_json
from envs.socnav.dynamics import DT

FILE = Path(__file__).parents[1] / "assets" / "socnav_snqi.json"
WEIGHTS = ("success", "time", "collisions", "near_misses", "comfort_exposure", "force_exceed", "jerk")
NORMALISED = ("collisions", "near_misses", "force_exceed", "jerk")

MEASURES = (  # of an episode, beside return, length, success and failure
    *("pedestrian_collision", "obstacle_collision", "timeout", "near_misses", "force_exceed", "comfort_exposure"),
    *("jerk", "path_efficiency", "time_to_goal", "snqi"),
)

LARGEST = 1e12  # weight or figure in a file

NEAR = 0.5  # m of clearance to a pedestrian below which a step is a near miss
NEAR_WALL = 0.3  # m of clearance to a wall below which it counts as near


class Step(NamedTuple):
    """What a step did, a number for each of N rows."""

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
    speed: Tensor  # m/s, forward
    limit: Tensor  # steps, the time limit


# What a step can be rewarded or charged for
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
    "backwards": lambda s: -(DT * s.speed).clamp(max=0),  # m
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
    """{"weights": {...}, "baselines": {metric: {"median", "p95"}}} from a file, or ours.

    Raises:
        ValueError: something is missing.
    """
    content = read_json(path if path is not None else FILE)
    given = {"weights": WEIGHTS, "baselines": NORMALISED}
    for part, names in given.items():
        require_keys(f"{path or FILE.name}: {part}", content.get(part, {}), names)
    require_numbers(f"{path or FILE.name}: weights", content["weights"], WEIGHTS)
    for name in NORMALISED:
        where, baseline = f"{path or FILE.name}: baselines of {name}", content["baselines"][name]
        require_keys(where, baseline, ("median", "p95"))
        require_numbers(where, baseline, ("median", "p95"))
        if span(baseline) < 1 / LARGEST:
            raise ValueError(f"{where}: p95 must be above the median, or equal to it; mend it")
    return content


def require_keys(where: str, content: Any, names: tuple[str, ...]) -> None:
    """Raises ValueError unless content is a dict that has all of these names."""
    missing = [name for name in names if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{where} must have {', '.join(missing)}; add what is missing")


def require_numbers(where: str, content: dict, names: Iterable[str]) -> None:
    """Raises ValueError unless these are finite numbers, small enough to be multiplied."""
    for name in names:
        value = content[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < np.inf:
            raise ValueError(f"{where}: {name} must be a number, not {value}; mend it")
        if abs(value) > LARGEST:
            raise ValueError(f"{where}: {name} must be at most {LARGEST:g}, not {value}; mend it")


def span(baseline: dict) -> float:
    """p95 - median; 1 where they are equal."""
    return (baseline["p95"] - baseline["median"]) or 1.0


def snqi(metrics: dict[str, np.ndarray], settings: dict[str, dict]) -> np.ndarray:
    """SNQI (N,) of episodes with these metrics (N,): success, time (share of the limit), and those of NORMALISED."""
    w, baselines = settings["weights"], settings["baselines"]
    cost = w["time"] * metrics["time"] + w["comfort_exposure"] * metrics["comfort_exposure"]
    for name in NORMALISED:
        x = (metrics[name] - baselines[name]["median"]) / span(baselines[name])
        cost = cost + w[name] * np.clip(x, 0, 1)
    return w["success"] * metrics["success"] - cost


def reward_weights(reward: str, path: str | None, snqi_settings: dict[str, dict], steps: float) -> dict[str, float]:
    """{term: weight} of a reward by name, or from a file that weighs the same terms, and others if it likes.

    snqi_step pays in each step what the step adds to the SNQI of an episode of `steps` steps, before clipping.

    Raises:
        ValueError: there is no such reward.
        ValueError: the file lacks a term, or has one that does not exist.
    """
    if reward not in NAMES:
        raise ValueError(f"reward must be one of {', '.join(NAMES)}, not {reward!r}")
    if reward == "snqi_step":
        w, spans = snqi_settings["weights"], {n: span(snqi_settings["baselines"][n]) for n in NORMALISED}
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
    require_keys(f"{path}: weights for reward {reward}", given, tuple(weights))
    for name in given:
        if name not in TERMS:
            raise ValueError(f"{path}: no term {name}; there are {', '.join(TERMS)}")
    require_numbers(path, given, given)
    return {name: float(value) for name, value in given.items()}
