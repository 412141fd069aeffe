"""tools/compare_runs.py, on runs made by hand and on a run in progress."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import compare_runs

from envs import UserError

ARGS = {"env_id": "Toy-v0", "total_timesteps": 1000, "eval_episodes": 10, "alpha": 0.7}

# What the first edition computed, with a bootstrap and Student's t written out in NumPy: value, low and high
RATIOS = {
    "published, ballbot": ([327680] * 4 + [196608], [589824, 786432, 1048576, 655360, 1114112], (0.359, 0.274, 0.469)),
    "published, lateral": ([38400] * 4 + [51200], [115200, 499200, 153600, 140800, 179200], (0.188, 0.111, 0.316)),
    "unequal numbers": ([300, 200, 200], [600, 500, 700, 650, 900], (0.348, 0.267, 0.462)),
}
DIFFERENCES = {
    "published, so101": ([0.955, 1.0, 1.0], [0.990, 1.0, 0.985], (-0.007, -0.065, 0.052)),
    "published, lateral": ([35.2, 36.6, 35.4], [36.5, 38.1, 36.6], (-1.333, -3.235, 0.568)),
    "unequal numbers": ([1.0, 2.5, 3.1, 0.4, 2.2], [2.0, 4.8, 5.5], (-2.26, -6.095, 1.575)),
    "constant": ([1.0, 1.0, 1.0], [0.95, 0.97, 0.99], (0.03, -0.020, 0.080)),
}


@pytest.mark.parametrize(("ours", "theirs", "expected"), RATIOS.values(), ids=RATIOS)
def test_ratio(ours, theirs, expected):
    assert compare_runs.ratio(ours, theirs) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("ours", "theirs", "expected"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_welch(ours, theirs, expected):
    assert compare_runs.welch(ours, theirs) == pytest.approx(expected, abs=0.001)


def test_margin_of_paired_gains():
    assert compare_runs.margin(pd.Series([0.395, 0.44, 0.44, 0.37, 0.35])) == pytest.approx(0.0505, abs=1e-4)


def write_run(folder, seed, returns=(1, 2), successes=None, parents=None, status="completed", **args):
    """A run with an evaluation every 100 steps, and a test with these successes of its episodes."""
    folder.mkdir(parents=True)
    config = {"args": ARGS | {"seed": seed} | args, "script": "ppo_continuous", "parents": parents or {}, "resumed": []}
    about = {"git_commit": "c0ffee", "hardware": "a computer", "packages": {"torch": "2"}}
    rates = {"success_rate": None, "failure_rate": None, "mean_length": 5.0, "metrics": {}}
    evaluations = [{"step": 100 * (k + 1), "mean_return": x, **rates} for k, x in enumerate(returns)]
    summary = {"status": status, "best": evaluations[-1], "sha256": {"best.pt": "a"}}
    (folder / "config.json").write_text(json.dumps(config | about))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "progress.csv").write_text("step,rollout/ep_reward,train/value_loss\n500,1,9\n1000,2,8\n")
    if successes:
        rates |= {"success_rate": sum(successes) / len(successes), "seed": 900_000 + seed, "episodes": len(successes)}
        episodes = [{"success": x} for x in successes]
        test = {**rates, "mean_return": 0.0, "per_episode": episodes, "sha256": "a"}
        (folder / "test.json").write_text(json.dumps(test))
    return str(folder)


def output(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *argv])
    compare_runs.main()
    return capsys.readouterr().out


def test_steps_to_the_criterion_and_charges(tmp_path, monkeypatch, capsys):
    """A run from scratch never converges, so 1 / 3 is a bound. Demonstrations took 60 steps; the expert, listed
    twice, took 300."""
    expert = {"runs/expert/best.pt": {"sha256": "e", "steps": 300, "config": {"script": "ppo_continuous"}}}
    data = {"d.npz": {"sha256": "d", "steps": None, "config": {"totals": {"env_steps": 60}, "parents": expert}}}
    clone = {"runs/clone/best.pt": {"sha256": "c", "steps": 9, "config": {"script": "bc_pretrain", "parents": data}}}
    curves = ([0, 9, 0, 9, 9, 9, 0], [9, 9, 0, 9, 9, 0], [0, 0, 0, 9, 9, 9])
    scratch = [write_run(tmp_path / f"s{k}", k, curve) for k, curve in enumerate(curves)]
    tuned = [write_run(tmp_path / f"t{k}", k, [0] * k + [9, 9, 9], parents=clone | expert) for k in range(3)]
    line = ["--criterion", "mean_return", "8", "--pretrained", *tuned, "--baseline"]
    text = output(monkeypatch, capsys, *line, *scratch)
    assert "baseline: 400, > 1,000, 400; mean >= 600" in text
    assert "pretrained: 100, 200, 300; mean 200" in text
    assert f"ratio of steps: <= {200 / 600:.2f} (95 % interval <= " in text
    assert f"with 60 steps of demonstrations: <= {260 / 600:.2f}" in text
    assert f"and with 300 steps of the experts: <= {560 / 600:.2f}" in text
    ours, theirs = ([compare_runs.read_run(path) for path in paths] for paths in (tuned, scratch))
    two = compare_runs.compare_steps(ours, theirs[::2], {"mean_return": 8.0})
    assert two[0] == "ratio of steps: 0.50"  # two runs are too few for an interval
    assert compare_runs.compare_steps(theirs, theirs[::2], {"mean_return": 8.0}) == ["ratio of steps: >= 1.50"]
    for target, outcome in ((0.5, "met"), (0.3, "missed")):
        assert compare_runs.compare_steps(ours, theirs[::2], {"mean_return": 8.0}, target)[0].endswith(outcome)
    for value, bound, outcome in ((0.8, ">= ", "missed"), (0.6, ">= ", "unknown"), (0.8, "<= ", "unknown")):
        assert compare_runs.verdict(value, bound, 0.7) == f", target 0.7 {outcome}"
    never = compare_runs.compare_steps(ours, theirs, {"mean_return": 10.0})
    assert never == ["ratio of steps: unknown, because runs of both groups never converged"]
    with pytest.raises(UserError, match="baseline must start from scratch"):
        compare_runs.compare(ours, ours, {"mean_return": 8.0})
    for change, message in (
        ({"status": "interrupted"}, "not completed"),
        ({"eval_episodes": 5}, "eval_episodes is 10"),
    ):
        other = compare_runs.read_run(write_run(tmp_path / message, 3, **change))
        with pytest.raises(UserError, match=message):
            compare_runs.compare(ours, [other], {})


def test_groups_and_paired_gains(tmp_path, monkeypatch, capsys):
    """Gains of .5 and .25 on the same episodes: mean .375, t of one degree of freedom 12.706."""
    successes = {0.7: ([0, 0, 1, 1], [0, 1, 1, 1]), 0.3: ([1, 1, 1, 1], [1, 1, 1, 1])}
    runs = {
        alpha: [write_run(tmp_path / f"{alpha} {seed}", seed, successes=x, alpha=alpha) for seed, x in enumerate(tests)]
        for alpha, tests in successes.items()
    }
    lines = output(monkeypatch, capsys, *runs[0.7], *runs[0.3]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rate = {row[0].replace(str(tmp_path), ""): row[cells[0].index("test success_rate")] for row in cells[2:]}
    assert rate["mean, alpha 0.7"] == "0.625"
    assert float(rate["+- (95 %), alpha 0.7"]) == pytest.approx(12.706 * 0.125, abs=1e-3)
    assert rate["mean, alpha 0.3"] == "1"
    text = output(monkeypatch, capsys, *runs[0.3], "--baseline", *runs[0.7])
    low, high = 0.375 - 12.706 * 0.125, 0.375 + 12.706 * 0.125
    assert f"2 pairs: +0.375 (95 % interval {low:+.3f} to {high:+.3f})" in text
    assert "test success_rate: 1, baseline 0.625, difference +0.375" in text
    Path(runs[0.7][1], "test.json").unlink()
    text = output(monkeypatch, capsys, *runs[0.3], "--baseline", *runs[0.7])
    assert "validation mean_return: 2, baseline 2, difference +0 " in text


def test_runs_in_progress(tmp_path, monkeypatch, capsys):
    """The mean ends where the shorter run does; a run without summary.json has its last evaluation."""
    done, live = write_run(tmp_path / "done", 1), write_run(tmp_path / "live", 2, successes=[1])
    Path(live, "summary.json").unlink()
    Path(live, "progress.csv").write_text("step,rollout/ep_reward,train/value_loss\n500,3,5\n")
    text = output(monkeypatch, capsys, done, live, "--png", str(tmp_path / "curves.png"), "--losses")
    assert "| 500 " in text
    assert "| validation mean_return " in text
    assert "test success" not in text  # test.json is of a policy that may not become the final one
    assert compare_runs.plt.imread(tmp_path / "curves.png").std() > 0.05
    axes = {axis.get_title(): axis for axis in compare_runs.plt.gcf().axes}
    assert list(axes) == ["return", "value_loss"]
    assert axes["value_loss"].lines[-1].get_xydata().tolist() == [[500, 7]]


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "compare_runs")
    with pytest.raises(SystemExit, match="2"):
        __import__("compare_runs")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("pip install -e '.[plots]'")
