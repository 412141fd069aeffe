"""tools/compare_runs.py: the table of runs, from the files that they left."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import compare_runs

from envs.run import UserError

SOCNAV = {"pedestrian_collision": 0.03, "obstacle_collision": 0.02, "timeout": 0.01, "snqi": 0.5}


def write_run(folder, seed, test=None, sha="a", **summary):
    """What a finished run leaves, as far as a table needs it."""
    config = {"args": {"seed": seed}, "resumed": False, "git_commit": "c0ffee", "hardware": "a computer", "python": "3"}
    found = {"steps": 1000, "best": {"step": 500}, "wall_time_s": 12.0, "sha256": {"best.pt": "a"}, **summary}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "packages": {"torch": "2"}}))
    (folder / "summary.json").write_text(json.dumps(found))
    (folder / "progress.csv").write_text("step\n")
    (folder / "evaluations.jsonl").write_text("")
    if test is not None:
        (folder / "test.json").write_text(json.dumps({"sha256": sha, **test}))
    return str(folder)


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_a_row_for_each_run_and_their_mean(tmp_path):
    tests = [{"success_rate": rate, "mean_return": 0.5, "metrics": SOCNAV} for rate in (0.9, 1.0)]
    runs = [write_run(tmp_path / str(s), s, test, converged_at_step=400) for s, test in zip((1000, 2000), tests)]
    header, _, first, second, mean = cells(compare_runs.table([compare_runs.read_run(run) for run in runs]))
    assert header == [
        "seed", "steps", "best at", "test success", "test return", "contact", "time-outs", "SNQI", "converged at",
        "wall time (s)",
    ]  # fmt: skip
    assert first == ["1000", "1,000", "500", "0.900", "0.500", "0.050", "0.010", "0.500", "400", "12.0"]
    assert second[3] == "1.000"
    assert mean == ["mean", "1,000", "500", "0.950", "0.500", "0.050", "0.010", "0.500", "400", "12.0"]


def test_what_a_run_lacks_is_a_dash_and_has_no_mean(tmp_path):
    converged = write_run(tmp_path / "one", 1, converged_at_step=400)
    never = write_run(tmp_path / "two", 2, converged_at_step=None)
    *_, first, second, mean = cells(compare_runs.table([compare_runs.read_run(run) for run in (converged, never)]))
    assert (first[3], second[3], mean[3]) == ("400", "-", "-")


def test_a_test_of_another_policy_does_not_count(tmp_path, capsys):
    run = write_run(tmp_path / "run", 1, {"success_rate": 0.9, "metrics": SOCNAV}, sha="b")
    assert compare_runs.read_run(run)["test"] is None
    assert "test.json is of another best.pt; evaluate again" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: not a finished run \(it has no summary.json\)"):
        compare_runs.read_run(str(tmp_path / "nowhere"))
