"""tools/compare_runs.py: the table of runs, from the files that they left."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import compare_runs

from envs import UserError

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


EXPERT = {"sha256": "e", "steps": 200, "config": {"script": "ppo_continuous", "parents": {}}}
DATASET = {"totals": {"env_steps": 50}, "parents": {"runs/expert/best.pt": EXPERT}}
DEMONSTRATIONS = {"runs/datasets/x.npz": {"sha256": "d", "steps": None, "config": DATASET}}
CLONE = {"sha256": "c", "steps": 40, "config": {"script": "bc_pretrain", "parents": DEMONSTRATIONS}}
LINEAGE = {"runs/clone/best.pt": CLONE}


def write_arm(folder, curves, parents, status="completed", **settings):
    """Runs with these validation returns: their directories."""
    runs = []
    for seed, curve in enumerate(curves):
        best = {"step": 100, **evaluations(5)[0]}
        name = f"{folder.name} {seed}"
        run = write_run(folder / str(seed), seed, steps=400, run=name, best=best, status=status)
        config = json.loads((Path(run) / "config.json").read_text())
        begun = {"pretrained": "runs/clone" if parents else None, "total_timesteps": 400, **settings}
        config = {**config, "parents": parents, "args": {**config["args"], **begun}}
        (Path(run) / "config.json").write_text(json.dumps(config))
        lines = [json.dumps(evaluation) for evaluation in evaluations(*curve)]
        (Path(run) / "evaluations.jsonl").write_text("\n".join(lines))
        runs.append(run)
    return tuple(runs)


def two_arms(tmp_path, baseline, pretrained, **settings):
    """The comparison of runs with these curves."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    arms = write_arm(tmp_path / "a", baseline, {}), write_arm(tmp_path / "b", pretrained, LINEAGE)
    args = compare_runs.Args(baseline=arms[0], pretrained=arms[1], criterion={"mean_return": 5.0}, **settings)
    return compare_runs.compare(*([compare_runs.read_run(run) for run in arm] for arm in arms), args)


def test_steps_of_both_arms_and_their_ratio_three_ways(tmp_path):
    found = two_arms(tmp_path, [(1, 1, 5, 5), (1, 5, 5, 5), (1, 5, 5, 5)], [(5, 5, 5, 5)] * 3, window=1)
    assert (found["baseline"]["converged_at"], found["pretrained"]["converged_at"]) == ([300, 200, 200], [100] * 3)
    ratios = {name: one["value"] for name, one in found["ratio"].items()}
    # 100 steps beside 233; with 50 of demonstrations; with 200 of the expert's training as well
    expected = {"fine_tuning": 300 / 700, "with_demonstrations": 450 / 700, "with_expert": 1050 / 700}
    assert ratios == pytest.approx(expected)
    one = found["ratio"]["fine_tuning"]
    assert one["bound"] == "="
    # of three draws from 300, 200, 200 all are 300 in 1 of 27 samples, and all are 200 in 8
    assert (one["low"], one["high"]) == pytest.approx((100 / 300, 100 / 200))


def test_two_runs_have_no_interval(tmp_path):
    found = two_arms(tmp_path, [(1, 5), (5, 5)], [(5, 5), (5, 5)], window=1)
    assert found["ratio"]["fine_tuning"]["low"] is None
    assert "| fine-tuning alone | 0.67 | - |" in compare_runs.describe(found)


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


def run_with(parents):
    return {"summary": {"run": "run"}, "config": {"parents": parents}}


def test_what_a_run_owes():
    assert compare_runs.charges(run_with(LINEAGE)) == (50, 200)
    # fine-tuned from a run that was itself fine-tuned from the clone: its steps count too, and nothing twice
    tuned = {"sha256": "t", "steps": 30, "config": {"script": "ppo_continuous", "parents": LINEAGE}}
    assert compare_runs.charges(run_with({"runs/tuned/best.pt": tuned, **LINEAGE})) == (50, 230)
    # a scripted expert took no training
    scripted = {**DATASET, "parents": {}}
    clone = {**CLONE, "config": {"script": "bc_pretrain", "parents": {"x.npz": {"sha256": "d", "config": scripted}}}}
    assert compare_runs.charges(run_with({"runs/clone/best.pt": clone})) == (50, 0)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({}, "began from scratch"),
        ({"model.onnx": {"sha256": "m", "steps": None, "config": None}}, "began from scratch"),
        ({"expert.pt": {"sha256": "x", "steps": None, "config": None}}, "nothing says how many steps expert.pt took"),
        ({"runs/x/best.pt": {**EXPERT, "steps": None}}, "of a run without a summary.json"),
    ],
)
def test_what_a_run_owes_must_be_known(parents, message):
    with pytest.raises(UserError, match=message):
        compare_runs.charges(run_with(parents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "interrupted"}, "interrupted; compare complete runs"),
        ({"eval_every": 50}, "has eval_every 50, and .* None; compare like with like"),
        ({"total_timesteps": 500}, "has total_timesteps 500, and .* 400"),
        ({"pretrained": None}, None),
    ],
)
def test_runs_that_were_not_judged_alike(tmp_path, change, message):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    scratch = [compare_runs.read_run(run) for run in write_arm(tmp_path / "a", [(5, 5)], {})]
    tuned = [compare_runs.read_run(run) for run in write_arm(tmp_path / "b", [(5, 5)], LINEAGE, **change)]
    if message is None:
        compare_runs.require_alike(scratch, tuned)
        return
    with pytest.raises(UserError, match=message):
        compare_runs.require_alike(scratch, tuned)


def test_a_run_counts_once_and_on_its_side(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (scratch,) = (compare_runs.read_run(run) for run in write_arm(tmp_path / "a", [(5, 5)], {}))
    (tuned,) = (compare_runs.read_run(run) for run in write_arm(tmp_path / "b", [(5, 5)], LINEAGE))
    with pytest.raises(UserError, match="named more than once"):
        compare_runs.require_alike([scratch, scratch], [tuned])
    with pytest.raises(UserError, match="began from a policy, so it is no run for --baseline"):
        compare_runs.require_alike([tuned], [scratch])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "name run directories, or those of both"),
        ({"baseline": ("a",)}, "both --baseline and --pretrained"),
        ({"runs": ("a",), "baseline": ("a",), "pretrained": ("a",)}, "name run directories, or"),
        ({"runs": ("a",), "group": "x"}, "--group names a comparison"),
        ({"baseline": ("a",), "pretrained": ("a",)}, "say what counts as converged"),
        ({"runs": ("a",), "window": 2}, "--criterion and --window are for a comparison"),
        (
            {"baseline": ("a",), "pretrained": ("a",), "criterion": {"x": 1.0}, "window": 0},
            "--window must be at least 1",
        ),
    ],
)
def test_what_does_not_go_together(args, message):
    with pytest.raises(UserError, match=message):
        compare_runs.check(compare_runs.Args(**args))


def test_a_named_comparison_leaves_its_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    for name in "ab":
        (tmp_path / name).mkdir()
    baseline = write_arm(tmp_path / "a", [(1, 5, 5)], {})
    pretrained = write_arm(tmp_path / "b", [(5, 5, 5)], LINEAGE)
    line = ["compare", "--baseline", *baseline, "--pretrained", *pretrained, "--criterion", "mean_return", "5"]
    line += ["--window", "2", "--group", "pendulum", "--run-root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    compare_runs.main()
    folder = tmp_path / "comparisons"
    assert json.loads((folder / "pendulum.json").read_text())["ratio"]["fine_tuning"]["value"] == 0.5
    assert (folder / "pendulum.md").read_text().count("fine-tuning alone | 0.50") == 1
    assert (folder / "pendulum.png").stat().st_size > 1000
    assert "fine-tuning alone" in capsys.readouterr().out
