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


# Against scratch


def evaluations(*returns, every=100):
    """Validation evaluations with these returns."""
    figures = {"success_rate": 1.0, "failure_rate": 0.0, "mean_length": 9.0, "metrics": {"total_cost": 5.0}}
    return [{"step": every * (i + 1), "mean_return": x, **figures} for i, x in enumerate(returns)]


@pytest.mark.parametrize(
    ("returns", "window", "at"),
    [
        ((1, 5, 5, 5), 3, 200),
        ((5, 5, 1, 5, 5, 5, 1), 3, 400),  # begun anew after a worse one
        ((5, 5, 1, 5, 5), 3, None),
        ((5, 5, 1, 5, 5), 2, 100),
        ((), 1, None),
    ],
)
def test_converged_at_the_first_of_a_window(returns, window, at):
    run = {"evaluations": evaluations(*returns)}
    assert compare_runs.converged_at(run, {"mean_return": 5.0}, window) == at


@pytest.mark.parametrize(
    ("criterion", "met"),
    [
        ({"mean_return": 5.0}, True),
        ({"mean_return": 5.1}, False),
        ({"total_cost": 5.0}, True),  # of costs less is better
        ({"total_cost": 4.9}, False),
        ({"mean_return": 5.0, "total_cost": 4.9}, False),
    ],
)
def test_bounds_know_which_way_is_better(criterion, met):
    assert compare_runs.meets(evaluations(5)[0], criterion) is met


def test_a_criterion_that_does_not_exist():
    with pytest.raises(UserError, match=r"--criterion speed: evaluations have no such figure; there are .*total_cost"):
        compare_runs.meets(evaluations(5)[0], {"speed": 1.0})


DATASET = {"steps": 50, "parents": {"runs/expert/best.pt": {"steps": 200}}}
LINEAGE = {"runs/clone/best.pt": {"config": {"parents": {"runs/datasets/x.npz": {"config": DATASET}}}}}


def write_arm(folder, seeds, curves, parents):
    runs = []
    for seed, curve in zip(seeds, curves):
        best = {"step": 100, **evaluations(5)[0]}
        run = write_run(folder / str(seed), seed, steps=400, run=f"run {seed}", best=best)
        config = json.loads((Path(run) / "config.json").read_text())
        (Path(run) / "config.json").write_text(json.dumps({**config, "parents": parents}))
        lines = [json.dumps(evaluation) for evaluation in evaluations(*curve)]
        (Path(run) / "evaluations.jsonl").write_text("\n".join(lines))
        runs.append(run)
    return tuple(runs)


def two_arms(tmp_path, baseline, pretrained, **settings):
    """The comparison of runs with these curves."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    arms = (
        write_arm(tmp_path / "a", range(len(baseline)), baseline, {}),
        write_arm(tmp_path / "b", range(len(pretrained)), pretrained, LINEAGE),
    )
    args = compare_runs.Args(baseline=arms[0], pretrained=arms[1], criterion={"mean_return": 5.0}, **settings)
    return compare_runs.compare(*([compare_runs.read_run(run) for run in arm] for arm in arms), args)


def test_steps_of_both_arms_and_their_ratio_three_ways(tmp_path):
    found = two_arms(tmp_path, [(1, 1, 5, 5), (1, 5, 5, 5)], [(5, 5, 5, 5), (5, 5, 5, 5)], window=1)
    assert (found["baseline"]["converged_at"], found["pretrained"]["converged_at"]) == ([300, 200], [100, 100])
    ratios = {name: one["value"] for name, one in found["ratio"].items()}
    # 100 steps beside 250; with 50 of demonstrations; with 200 of the expert's training as well
    assert ratios == pytest.approx({"fine_tuning": 0.4, "with_demonstrations": 0.6, "with_expert": 1.4})
    one = found["ratio"]["fine_tuning"]
    assert one["bound"] == "="
    # a resample of the baseline has a mean of 200, 250 or 300; both extremes come up a quarter of the time
    assert (one["low"], one["high"]) == pytest.approx((100 / 300, 100 / 200))


@pytest.mark.parametrize(
    ("baseline", "pretrained", "bound", "value"),
    [
        ((1, 1, 1, 1), (5, 5, 5, 5), "<=", 0.25),  # scratch took more than its 400 steps
        ((5, 5, 5, 5), (1, 1, 1, 1), ">=", 4.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), "?", 1.0),
    ],
)
def test_a_run_that_never_converges_counts_with_its_budget(tmp_path, baseline, pretrained, bound, value):
    found = two_arms(tmp_path, [baseline], [pretrained], window=2)
    assert (found["ratio"]["fine_tuning"]["bound"], found["ratio"]["fine_tuning"]["value"]) == (bound, value)
    text = compare_runs.describe(found)
    assert "> 400" in text
    assert f"{bound} {value:.2f}" in text


def test_interval_of_final_figures_by_bootstrap():
    values = [0.0] * 50 + [1.0] * 50  # a mean of .5 with a standard error of .05
    low, high = compare_runs.interval(compare_runs.resampled_means(values, 1))
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.015)


def test_a_run_from_scratch_among_the_pretrained_ones(tmp_path):
    (run,) = write_arm(tmp_path, [1], [(5,)], {})
    with pytest.raises(UserError, match="no clone among its parents"):
        compare_runs.charges(compare_runs.read_run(run))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "name run directories, or those of both"),
        ({"baseline": ("a",)}, "both --baseline and --pretrained"),
        ({"runs": ("a",), "baseline": ("a",), "pretrained": ("a",)}, "name run directories, or"),
        ({"runs": ("a",), "group": "x"}, "--group names a comparison"),
        ({"baseline": ("a",), "pretrained": ("a",)}, "say what counts as converged"),
        ({"runs": ("a",), "window": 0}, "--window must be at least 1, not 0"),
    ],
)
def test_what_does_not_go_together(args, message):
    with pytest.raises(UserError, match=message):
        compare_runs.check(compare_runs.Args(**args))


def test_a_named_comparison_leaves_its_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    for name in "ab":
        (tmp_path / name).mkdir()
    baseline = write_arm(tmp_path / "a", [1], [(1, 5, 5)], {})
    pretrained = write_arm(tmp_path / "b", [1], [(5, 5, 5)], LINEAGE)
    line = ["compare", "--baseline", *baseline, "--pretrained", *pretrained, "--criterion", "mean_return", "5"]
    line += ["--window", "2", "--group", "pendulum", "--run-root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    compare_runs.main()
    folder = tmp_path / "comparisons"
    assert json.loads((folder / "pendulum.json").read_text())["ratio"]["fine_tuning"]["value"] == 0.5
    assert (folder / "pendulum.md").read_text().count("fine-tuning alone | 0.50") == 1
    assert (folder / "pendulum.png").stat().st_size > 1000
    assert "fine-tuning alone" in capsys.readouterr().out
