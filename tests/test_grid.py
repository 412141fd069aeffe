"""tools/grid.py, once from end to end, and its table."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import grid

from envs import UserError
from envs.cli import parse
from envs.evaluation import read_json

GRID = """
script = "ppo_residual"
seeds = [1, 2]
eval_episodes = 2
[args]
total_timesteps = 64
num_envs = 2
num_steps = 32
minibatch_size = 32
eval_episodes = 2
env_kwargs = { frame_margin = 0.1 }
[variants]
"defaults" = {}
"alpha 0" = { alpha = 0.0 }
"""


def result(successes):
    episodes = [{"success": bool(x), "return": float(x)} for x in successes]
    return {"success_rate": sum(successes) / len(successes), "per_episode": episodes}


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "tools" / "grids").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_settings_of_a_grid_are_those_of_its_runs(path):
    """As flags they are parsed to the same values."""
    content = read_json(path)
    for variant in content["variants"].values():
        settings = {**content.get("args", {}), **variant}
        args = parse(importlib.import_module(content["script"]).Args, grid.flags(settings))
        for name, value in settings.items():
            parsed = getattr(args, name)
            assert {**parsed, **value} == parsed if isinstance(value, dict) else parsed == value


def test_table_by_hand():
    """Gains of 0.5, 0.25 and 0: mean 0.25, standard error 0.25 / sqrt(3), t with 2 degrees of freedom 4.303."""
    reference = [result([1, 0, 0, 0])] * 3
    other = [result([1, 1, 1, 0]), result([1, 1, 0, 0]), result([0, 0, 0, 1])]
    lines = grid.table({"defaults": reference, "other": other}).splitlines()
    assert lines[2] == "| defaults | 0.250 | 0.250 |  |"
    assert lines[3] == "| other | 0.500 | 0.250 | +0.250 (-0.371 to +0.871) |"


@pytest.mark.slow
def test_from_end_to_end(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(GRID)
    args = grid.Args(str(file), jobs=2, run_root=str(tmp_path))
    text = grid.run(args)
    folder = tmp_path / "grids" / "small"
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert runs == ["alpha_0__seed1", "alpha_0__seed2", "defaults__seed1", "defaults__seed2"]
    assert json.loads((folder / "alpha_0__seed2" / "config.json").read_text())["args"]["alpha"] == 0
    test = json.loads((folder / "defaults__seed2" / "test.json").read_text())
    assert (test["episodes"], test["seed"]) == (2, 900_002)
    times = {run: (folder / run / "summary.json").stat().st_mtime for run in runs}
    assert grid.run(args) == text  # nothing is trained again
    assert times == {run: (folder / run / "summary.json").stat().st_mtime for run in runs}


def test_errors(tmp_path):
    (tmp_path / "a.toml").write_text("script = 1")
    with pytest.raises(UserError, match=r"a\.toml: not a grid \(KeyError\('seeds'\)\)"):
        grid.run(grid.Args(str(tmp_path / "a.toml")))
