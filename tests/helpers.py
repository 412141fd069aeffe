"""Functions that several test files use."""

import copy
import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from envs import run
from envs.evaluation import read_pt
from envs.socnav import environment


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(x: Any, y: Any, where: str = "") -> None:
    """Equal to the last bit, whatever is nested in whatever; NaN equals NaN."""
    assert type(x) is type(y), where
    if isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for name in x:
            same(x[name], y[name], f"{where}/{name}")
    elif isinstance(x, list | tuple):
        assert len(x) == len(y), where
        for i, pair in enumerate(zip(x, y)):
            same(*pair, f"{where}/{i}")
    elif isinstance(x, torch.Tensor):
        assert x.dtype == y.dtype, where
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), where
    else:
        assert x == y or (isinstance(x, float) and math.isnan(x) and math.isnan(y)), where


def rows(path: Path) -> list[dict]:
    """A progress.csv without what depends on the machine."""
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "time/sps"} for row in table]


def same_runs(folder: Path, other: Path, final: tuple[str, ...] = ("final.pt", "best.pt")) -> None:
    """All that training did; the arguments differ in where the runs lie, and the times in what they took."""
    for name in final:
        ours, theirs = read_pt(folder / name), read_pt(other / name)
        same({**ours, "args": None}, {**theirs, "args": None}, name)
    for name in ("evaluations.jsonl", "episodes.jsonl"):
        assert lines(folder / name) == lines(other / name)
    assert rows(folder / "progress.csv") == rows(other / "progress.csv")


def files() -> dict[Path, bytes | None]:
    """The content of every file below the working directory."""
    found = (path for path in Path().rglob("*") if path.name != "MUJOCO_LOG.TXT")  # MuJoCo's own warnings
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def assert_refused(status: int | str, lines: list[str], message: str) -> None:
    """One line that says it, and status 2."""
    assert status == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])


def placeholder_export(agent: Any, envs: Any, policy: dict, path: Path) -> None:
    """In place of run.export_onnx, which takes longer than a tiny run."""
    run.write_file(path, b"onnx")


def make_quick(patch: Any) -> None:
    """No export, and episodes of at most 25 steps in the social navigation task."""

    def short_world(*args: Any, **kwargs: Any) -> Any:
        world = copy.copy(load_world(*args, **kwargs))
        world.limit = world.limit.clamp(max=25)
        return world

    load_world = environment.load_world
    patch.setattr(environment, "load_world", short_world)
    patch.setattr(run, "export_onnx", placeholder_export)
