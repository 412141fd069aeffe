"""tools/compare_runs.py, on runs made by hand and on a run in progress."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import compare_runs

from envs import UserError

# Steps to the criterion of the published comparisons, and their ratios and intervals as first computed, by a bootstrap
# written out in NumPy
BALLBOT = ([327680, 327680, 196608, 327680, 327680], [589824, 786432, 1048576, 655360, 1114112], (0.36, 0.27, 0.47))
LATERAL = ([38400, 38400, 38400, 51200, 38400], [115200, 499200, 153600, 140800, 179200], (0.19, 0.11, 0.32))
ARGS = {"env_id": "Toy-v0", "total_timesteps": 1000, "eval_episodes": 10}


@pytest.mark.parametrize(("ours", "theirs", "expected"), [BALLBOT, LATERAL])
def test_ratio_of_the_published_runs(ours, theirs, expected):
    assert compare_runs.ratio(ours, theirs) == pytest.approx(expected, abs=0.01)


def test_welch_by_hand():
    """Variances 2.5 and 10, so the standard error is sqrt(2.5); 5.88 degrees of freedom, t = 2.459."""
    difference = compare_runs.welch([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert difference == pytest.approx((-3, -3 - 2.459 * np.sqrt(2.5), -3 + 2.459 * np.sqrt(2.5)), abs=1e-3)


def write_run(folder, seed, returns, parents=None, best=None, **summary):
    """A completed run with an evaluation every 100 steps."""
    folder.mkdir(parents=True)
    config = {"args": {**ARGS, "seed": seed}, "script": "ppo_continuous", "parents": parents or {}, "resumed": []}
    about = {"git_commit": "c0ffee", "hardware": "a computer", "packages": {"torch": "2"}}
    evaluations = [
        {
            **{"step": 100 * (k + 1), "mean_return": x, "mean_length": 5.0, "success_rate": None, "failure_rate": None},
            "metrics": {},
        }
        for k, x in enumerate(returns)
    ]
    (folder / "config.json").write_text(json.dumps(config | about))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    results = {"status": "completed", "steps": 1000, "best": best or evaluations[-1], "sha256": {"best.pt": "a"}}
    (folder / "summary.json").write_text(json.dumps(results | summary))
    return str(folder)


def test_steps_to_the_criterion_and_charges(tmp_path):
    """From scratch 400 steps and never; from a clone 100 and 200, with 60 steps of demonstrations and an expert of
    300."""
    expert = {"runs/expert/best.pt": {"sha256": "e", "steps": 300, "config": {"script": "ppo_continuous"}}}
    data = {"d.npz": {"sha256": "d", "steps": None, "config": {"totals": {"env_steps": 60}, "parents": expert}}}
    clone = {"runs/clone/best.pt": {"sha256": "c", "steps": 9, "config": {"script": "bc_pretrain", "parents": data}}}
    scratch = [
        write_run(tmp_path / "s1", 1, [0, 9, 0, 9, 9, 9, 0]),
        write_run(tmp_path / "s2", 2, [9, 9, 0, 9, 9, 0]),
    ]
    tuned = [write_run(tmp_path / f"t{k}", k, [0] * (k - 1) + [9, 9, 9], clone) for k in (1, 2)]
    runs = [[compare_runs.read_run(path) for path in paths] for paths in (scratch, tuned)]
    assert compare_runs.charged_steps(runs[1][0]) == (60, 300)
    text = compare_runs.compare(*runs, {"mean_return": 8.0})
    assert "baseline: converged after 400, > 1,000 steps; mean >= 700" in text
    assert "pretrained: converged after 100, 200 steps; mean 150" in text
    assert f"fine-tuning alone: <= {150 / 700:.2f} (95 % interval" in text
    assert f"with 60 steps of demonstrations: <= {210 / 700:.2f}" in text
    assert f"and with 300 steps of the experts: <= {510 / 700:.2f}" in text
    with pytest.raises(UserError, match="started from scratch; list it under --baseline"):
        compare_runs.compare(runs[0], runs[0], {"mean_return": 8.0})
    interrupted = write_run(tmp_path / "i", 3, [9], status="interrupted")
    with pytest.raises(UserError, match="not completed; finish it with --resume"):
        compare_runs.compare([compare_runs.read_run(interrupted)], runs[1], {"mean_return": 8.0})


def test_table_and_curves_of_runs_in_progress(tmp_path, monkeypatch, capsys):
    done, live = (write_run(tmp_path / name, k, [1.0, 2.0]) for k, name in enumerate(("done", "live")))
    Path(live, "summary.json").unlink()
    columns = ["step", "rollout/ep_reward", "eval/mean_reward", "train/value_loss", "train/approx_kl"]
    for run in (done, live):
        Path(run, "progress.csv").write_text(",".join(columns) + "\n100,1,,3,4\n200,2,5,2,\n300,2.5,,1,1\n")
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", done, live, "--png", str(tmp_path / "a.png"), "--losses"])
    compare_runs.main()
    output = capsys.readouterr().out
    assert "| mean" in output
    assert "done |" in output
    assert compare_runs.plt.imread(tmp_path / "a.png").std() > 0.05
