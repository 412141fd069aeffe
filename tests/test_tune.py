"""tools/tune.py: what a sweep may say, what a trial is worth, and a study from end to end."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import tune

from envs import UserError

ROOT = Path(__file__).parents[1]
SWEEP = """
script = "ppo_continuous"
trials = 3
metric = "mean_return"

[args]
env_id = "Pendulum-v1"
total_timesteps = 256
num_envs = 2
num_steps = 64
minibatch_size = 64
eval_every = 128
eval_episodes = 1

[space.learning_rate]
low = 1e-4
high = 1e-2
log = true

[space.hidden_sizes]
choices = [[8], [8, 8]]
"""


def write(folder, text=SWEEP, name="sweep.toml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_what_a_sweep_says(tmp_path):
    sweep = tune.load_sweep(write(tmp_path))
    assert (sweep.trials, sweep.sign, sweep.objective) == (3, 1, "best_checkpoint")
    assert tune.load_sweep(write(tmp_path, SWEEP.replace("mean_return", "total_cost"))).sign == -1
    chosen = SWEEP.replace('metric = "mean_return"', 'metric = "snqi"\ndirection = "minimize"')
    assert tune.load_sweep(write(tmp_path, chosen)).sign == -1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"ppo_continuous"', '"ppo"', r"script cannot be 'ppo'"),
        ("trials = 3", "trials = 0", "trials must be at least 1, not 0"),
        ("trials = 3", "tries = 3", "unknown 'tries'; there are .*trials"),
        ("trials = 3", "trials =", "not TOML"),
        ("trials = 3", 'objective = "area"', "objective cannot be 'area'"),
        ('metric = "mean_return"', "", "metric is missing"),
        ("[space.learning_rate]", "[space.learnin_rate]", "learnin_rate is no setting of ppo_continuous"),
        ("[space.learning_rate]", "[space.run_name]", "run_name is no setting of ppo_continuous that a study can set"),
        ("low = 1e-4", 'low = "small"', "space.learning_rate must have numbers, low below high"),
        ("low = 1e-4", "low = 0.0", "low below high, and with log both above 0"),
        ("low = 1e-4", "low = 1", "space.learning_rate must have numbers, low below high"),
        ("low = 1e-4", "lowest = 1e-4", "space.learning_rate must have choices, or low and high"),
        ("[space.learning_rate]", "[space.update_epochs]", "space.update_epochs must have whole numbers"),
        ("[[8], [8, 8]]", "[8]", "hidden_sizes cannot be 8"),
        ("[[8], [8, 8]]", "[]", "choices must be a list of values"),
        ("num_envs = 2", 'num_envs = "two"', "num_envs cannot be 'two'"),
        ("num_envs = 2", "learning_rate = 1e-3", "learning_rate stands in .args. and in .space.; keep one"),
        ("[args]", "[constraints]\nfailure_rate = 0.1\n[args]", "a constraint is METRIC_max or METRIC_min"),
        ("[args]", "[pruning]\nafter = 3\n[args]", "unknown pruning.after"),
    ],
)
def test_a_sweep_that_cannot_work_is_one_line(tmp_path, old, new, message):
    assert old in SWEEP
    with pytest.raises(UserError, match=message) as error:
        tune.load_sweep(write(tmp_path, SWEEP.replace(old, new)))
    assert str(tmp_path / "sweep.toml") in str(error.value)


def test_a_sweep_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no such file; --help shows"):
        tune.load_sweep(str(tmp_path / "none.toml"))


def evaluation(step, value, **metrics):
    figures = {"mean_return": value, "mean_length": 9.0, "success_rate": None, "failure_rate": 0.2}
    return {"step": step, **figures, "metrics": metrics}


CURVE = [evaluation(100, 1.0), evaluation(200, 5.0), evaluation(400, 3.0), evaluation(500, 4.0)]


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("best_checkpoint", 5.0),
        ("final_eval", 4.0),
        ("last_n_mean", 3.5),
        ("auc", (100 * 3 + 200 * 4 + 100 * 3.5) / 400),
    ],
)
def test_what_a_trial_is_worth(tmp_path, objective, value):
    sweep = tune.load_sweep(write(tmp_path, f'objective = "{objective}"\nlast_n = 2\n{SWEEP}'))
    assert tune.objective(sweep, CURVE, best=CURVE[1]) == pytest.approx(value)


def test_constraints_are_read_off_the_evaluation_that_counts(tmp_path):
    bounds = "[constraints]\nfailure_rate_max = 0.1\njerk_max = 2.0\nmean_return_min = 4.5\n"
    sweep = tune.load_sweep(write(tmp_path, f"{SWEEP}\n{bounds}"))
    curve = [evaluation(1, 5.0, jerk=1.0), evaluation(2, 4.0, jerk=3.0)]
    assert tune.violations(sweep, curve, best=curve[0]) == pytest.approx({"failure_rate_max": 0.1})
    sweep = tune.load_sweep(write(tmp_path, f'objective = "final_eval"\n{SWEEP}\n{bounds}'))
    broken = {"failure_rate_max": 0.1, "jerk_max": 1.0, "mean_return_min": 0.5}
    assert tune.violations(sweep, curve, best=curve[0]) == pytest.approx(broken)


def test_a_figure_that_an_evaluation_does_not_have():
    with pytest.raises(UserError, match=r"no figure 'success_rate'; there are failure_rate, mean_return"):
        tune.measured(evaluation(1, 1.0), "success_rate")


def test_settings_become_a_command_line():
    values = {"learning_rate": 1e-3, "norm_obs": False, "anneal_lr": True, "hidden_sizes": [8, 4]}
    types = {**tune.types_of("ppo_continuous"), "norm_obs": bool}
    line = tune.flags({**values, "env_kwargs": {"terrain": "flat", "speed": 2}}, types)
    assert line == [
        *("--learning-rate", "0.001", "--no-norm-obs", "--anneal-lr", "--hidden-sizes", "8", "4"),
        *("--env-kwargs", "terrain", "flat", "speed", "2"),
    ]
    assert tune.flags({"norm_obs": False}, tune.types_of("bc_pretrain")) == ["--norm-obs", "False"]


def test_a_study_from_end_to_end(tmp_path):
    """Two trials at a time; a study that is complete goes on to a larger number of trials."""
    path = write(tmp_path, SWEEP.replace("trials = 3", "trials = 2"))
    args = tune.Args(sweep=path, jobs=2, run_root=str(tmp_path / "runs"))
    best = tune.tune(args)
    folder = tmp_path / "runs" / "studies" / "sweep"
    values = [json.loads((folder / f"trial_{i:03d}" / "summary.json").read_text())["best"] for i in range(2)]
    returns = [value["mean_return"] for value in values]
    assert best.user_attrs["value"] == max(returns)
    table = (folder / "summary.md").read_text()
    assert "2 trials, 2 of them feasible" in table
    assert f"**{best.number}**" in table
    config = json.loads((folder / f"trial_{best.number:03d}" / "config.json").read_text())
    assert config["args"]["learning_rate"] == best.params["learning_rate"]

    with pytest.raises(UserError, match="holds a study of other settings"):
        tune.tune(tune.Args(sweep=write(tmp_path, SWEEP.replace("high = 1e-2", "high = 1e-3")), run_root=args.run_root))
    write(tmp_path, SWEEP)
    tune.tune(args)
    assert "3 trials" in (folder / "summary.md").read_text()
    assert sorted(entry.name for entry in folder.glob("trial_*[0-9]")) == [f"trial_{i:03d}" for i in range(3)]


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_project_say_what_can_be_done(path):
    sweep = tune.load_sweep(str(path))
    assert sweep.trials >= 12
    assert sweep.constraints


class Ended:
    """A trial as `settle` sees it, with these evaluations, the best of them the first."""

    def __init__(self, sweep, study, folder, evaluations):
        self.sweep, self.trial, self.folder = sweep, study.ask(), folder
        for name, space in sweep.space.items():
            tune.suggest(self.trial, name, space, whole=False)
        self.process = type("Process", (), {"returncode": 0})
        folder.mkdir(exist_ok=True)
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
        (folder / "summary.json").write_text(json.dumps({"best": evaluations[0]}))

    def close(self):
        pass


@pytest.mark.parametrize("infeasible", ["penalize", "prune"])
@pytest.mark.parametrize(("direction", "best"), [("maximize", 1), ("minimize", 2)])
def test_an_infeasible_trial_is_never_the_best(tmp_path, infeasible, direction, best):
    """Values 9, 5, 3, 0, of which the first and the last break the constraint."""
    options = f'infeasible = "{infeasible}"\ndirection = "{direction}"\n'
    sweep = tune.load_sweep(write(tmp_path, f"{options}{SWEEP}\n[constraints]\njerk_max = 1.0\n"))
    study = tune.open_study(sweep, tmp_path / "sweep.toml", tmp_path / "studies")
    for value, jerk in ((9.0, 1.5), (5.0, 1.0), (3.0, 0.0), (0.0, 2.0)):
        tune.settle(study, Ended(sweep, study, tmp_path / "trial", [evaluation(1, value, jerk=jerk)]))
    assert tune.best_of(study, sweep).number == best
    told = [trial.value for trial in study.trials]
    assert told[1:3] == [5.0, 3.0]
    if infeasible == "prune":
        assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE", "COMPLETE", "PRUNED"]
    else:
        sign = 1 if direction == "maximize" else -1
        assert (told[0], told[3]) == (9.0 - sign * (1e6 + 500), 0.0 - sign * (1e6 + 1000))
    assert "infeasible: jerk_max by 0.5" in tune.report(study, sweep)


def test_a_study_without_a_feasible_trial_says_so(tmp_path):
    sweep = tune.load_sweep(write(tmp_path, f"{SWEEP}\n[constraints]\njerk_max = 1.0\n"))
    study = tune.open_study(sweep, tmp_path / "sweep.toml", tmp_path / "studies")
    tune.settle(study, Ended(sweep, study, tmp_path / "trial", [evaluation(1, 1.0, jerk=2.0)]))
    assert tune.best_of(study, sweep) is None
    assert "1 trials, 0 of them feasible. No trial keeps all constraints" in tune.report(study, sweep)


def test_a_trial_that_was_cut_off_is_tried_again_with_its_settings(tmp_path):
    sweep, again = tune.load_sweep(write(tmp_path, SWEEP)), (tmp_path / "sweep.toml", tmp_path / "studies")
    study = tune.open_study(sweep, *again)
    cut_off = study.ask()
    values = {name: tune.suggest(cut_off, name, space, whole=False) for name, space in sweep.space.items()}
    study = tune.open_study(sweep, *again)  # as if the first had been killed
    next_one = study.ask()
    assert next_one.number == cut_off.number + 1
    assert {name: tune.suggest(next_one, name, space, whole=False) for name, space in sweep.space.items()} == values
    assert tune.ended(study) == []


def test_a_trial_worse_than_the_median_of_the_others_is_stopped(tmp_path):
    sweep = tune.load_sweep(write(tmp_path, f"{SWEEP}\n[pruning]\nfirst_trials = 2\nfirst_evaluations = 2\n"))
    study = tune.open_study(sweep, tmp_path / "sweep.toml", tmp_path / "studies")
    for value in (5.0, 6.0):
        good = study.ask()
        for name, space in sweep.space.items():
            tune.suggest(good, name, space, whole=False)
        for step in (100, 200):
            good.report(value, step)
        study.tell(good, value)
    bad = tune.Trial.__new__(tune.Trial)
    bad.trial, bad.sweep, bad.folder, bad.seen = study.ask(), sweep, tmp_path, 0
    bad.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    log = tmp_path / "evaluations.jsonl"
    log.write_text(json.dumps(evaluation(100, 1.0)) + "\n")
    assert not bad.poll()  # its second evaluation decides
    log.write_text("".join(json.dumps(evaluation(step, 1.0)) + "\n" for step in (100, 200)))
    assert bad.poll()
    assert bad.process.poll() is not None
    bad.close = lambda: None
    tune.settle(study, bad)
    assert tune.outcome(study.trials[2]) == "stopped at step 200"


def test_a_metric_that_does_not_exist_shows_at_the_first_evaluation(tmp_path):
    path = write(tmp_path, SWEEP.replace("mean_return", "snqi"))
    args = tune.Args(sweep=path, run_root=str(tmp_path / "runs"))
    with pytest.raises(UserError, match="evaluations have no figure 'snqi'"):
        tune.tune(args)


def test_a_script_that_refuses_its_settings_ends_the_study(tmp_path):
    path = write(tmp_path, SWEEP.replace("minibatch_size = 64", "minibatch_size = 100"))
    with pytest.raises(UserError, match=r"trial_000: --minibatch-size must be .* divide num_envs"):
        tune.tune(tune.Args(sweep=path, run_root=str(tmp_path / "runs")))


@pytest.mark.slow
def test_a_killed_study_with_a_constraint_goes_on_to_a_best_feasible_trial(tmp_path):
    bound = "\n[constraints]\nmean_return_min = -1080\n"
    path = write(tmp_path, SWEEP.replace("trials = 3", "trials = 12") + bound)
    line = [sys.executable, str(ROOT / "tools/tune.py"), path, "--jobs", "2", "--run-root", str(tmp_path / "runs")]
    folder = tmp_path / "runs" / "studies" / "sweep"
    process = subprocess.Popen(line)
    while not (folder / "trial_004" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "12 trials" in said
    rows = [line.split(" | ") for line in (folder / "summary.md").read_text().splitlines()[2:-2]]
    feasible = {row[0].strip("| *"): float(row[1]) for row in rows if row[2] == "feasible"}
    assert 0 < len(feasible) < 12
    assert feasible[re.search(r"Best: trial (\d+),", said)[1]] == max(feasible.values())
