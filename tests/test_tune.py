"""tools/tune.py: objectives and constraints by hand, and studies of a small residual policy."""

import sys
from pathlib import Path

import optuna
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import tune

import ppo_residual
from envs import UserError

SWEEP = """
script = "ppo_residual"
trials = 3
metric = "mean_return"
objective = "{objective}"
infeasible = "{infeasible}"
[args]
num_envs = 2
num_steps = 32
minibatch_size = 32
total_timesteps = 128
eval_every = 64
eval_episodes = 1
env_kwargs = {{ frame_margin = 0.1 }}
[space.learning_rate]
low = 1e-4
high = 1e-3
log = true
[space.update_epochs]
low = 1
high = 2
[space.hidden_sizes]
choices = [[8], [8, 8]]
[constraints]
{constraint}
"""
EVALUATIONS = [{"step": 100, "score": 1.0}, {"step": 200, "score": 3.0}, {"step": 400, "score": 4.0}]


@pytest.mark.parametrize(
    ("objective", "value"),
    [("best_checkpoint", 5.0), ("final_eval", 4.0), ("last_n_mean", 8 / 3), ("auc", (2 * 100 + 3.5 * 200) / 300)],
)
def test_objectives_by_hand(objective, value):
    assert tune.objective_value(objective, "score", EVALUATIONS, {"score": 5.0}) == pytest.approx(value)


def test_episodic_snqi():
    episodes = {"per_episode": [{"snqi": 0.5}, {"snqi": -1.0}]}
    assert tune.objective_value("episodic_snqi", "score", [EVALUATIONS[-1] | episodes], {}) == -0.25
    with pytest.raises(UserError, match="objective 'mean': choose best_checkpoint, "):
        tune.objective_value("mean", "score", EVALUATIONS, {})


def test_constraints():
    evaluation = {"failure_rate": 0.2, "success_rate": 0.7}
    limits = {"failure_rate_max": 0.05, "success_rate_min": 0.9}
    assert tune.violations(limits, evaluation) == pytest.approx({"failure_rate_max": 0.15, "success_rate_min": 0.2})
    assert tune.violations({"failure_rate_max": 0.2}, evaluation) == {}
    with pytest.raises(UserError, match="constraint snqi_min: must be METRIC_max or METRIC_min of failure_rate"):
        tune.violations({"snqi_min": 0}, evaluation)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(**settings): run a sweep with these settings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.setattr("envs.run.export_onnx", lambda agent, envs, policy, path: path.touch())

    def study(**settings):
        settings = {"objective": "final_eval", "infeasible": "penalize", "constraint": ""} | settings
        (tmp_path / "small.toml").write_text(SWEEP.format(**settings))
        return tune.run(tune.Args(str(tmp_path / "small.toml"), run_root=str(tmp_path)))

    return study


def test_a_stopped_study_goes_on(study, monkeypatch):
    train, calls = ppo_residual.train, []

    def stopped(args, on_evaluation):
        calls.append(args)
        summary = train(args, on_evaluation)
        return summary | {"status": "interrupted"} if len(calls) == 2 else summary

    monkeypatch.setattr(ppo_residual, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        study()
    found = study()
    states = [trial.state.name for trial in found.trials]
    assert (states.count("COMPLETE"), len(calls)) == (3, 4)
    assert {len(args.hidden_sizes) for args in calls} <= {1, 2}
    assert all(trial.user_attrs["feasible"] for trial in found.trials if trial.state.name == "COMPLETE")
    # mean_return is maximized, and Optuna minimizes
    assert found.best_value == -max(trial.user_attrs["value"] for trial in found.trials if trial.values)


@pytest.mark.parametrize("infeasible", ["penalize", "prune"])
def test_infeasible_trials(study, infeasible):
    trials = study(infeasible=infeasible, constraint="mean_length_max = 0").trials
    assert not any(trial.user_attrs["feasible"] for trial in trials)
    if infeasible == "prune":
        assert {trial.state.name for trial in trials} == {"PRUNED"}
    else:
        assert all(trial.value > tune.PENALTY for trial in trials)
