"""Hyperparameter search with Optuna (pip install -e ".[tune]").

    python tools/tune.py tools/sweeps/lateral_scratch.toml --jobs 2         the same command resumes a stopped study

The TOML file:

    script = "ppo_continuous"            # ppo_residual or ppo_grid_socnav
    trials = 12
    metric = "total_cost"                # any metric of the evaluation
    objective = "auc"                    # best_checkpoint, final_eval, last_n_mean, auc or episodic_snqi
    infeasible = "penalize"              # or prune: what happens to a trial that violates a constraint

    [args]                               # settings of all trials
    total_timesteps = 600_000

    [space.learning_rate]                # settings to search: low, high and log, or choices
    low = 1e-4
    high = 3e-3
    log = true

    [constraints]                        # METRIC_max or METRIC_min
    jerk_cost_max = 20.0

    [pruning]                            # arguments of Optuna's MedianPruner
    n_startup_trials = 4
    n_warmup_steps = 10

Trials are evaluated on the validation split. Each is a run in runs/studies/<file>/, beside study.log, the storage.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError
from envs.cli import one_line_errors
from envs.evaluation import LOWER_IS_BETTER, NonFiniteError, figures, read_json

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
except ImportError as error:
    sys.exit(f"error: {error}; pip install -e '.[tune]'")

PENALTY = 1e6  # worse than the value of any feasible trial
LAST_N = 3  # evaluations of last_n_mean


@dataclass
class Args:
    sweep: tyro.conf.Positional[str]  # TOML file
    jobs: int = 1  # number of processes; at most the number of idle cores
    run_root: str = "runs"  # directory of studies/


def objective_value(objective: str, metric: str, evaluations: list[dict], best: dict) -> float:
    """The value of a trial from its evaluations, {"step", metrics ...} each, and the evaluation of best.pt.

    auc is the mean over steps by the trapezoidal rule; episodic_snqi the mean over the episodes of the last evaluation.
    """
    values, steps = [e[metric] for e in evaluations], [e["step"] for e in evaluations]
    if objective == "best_checkpoint":
        return best[metric]
    if objective == "final_eval":
        return values[-1]
    if objective == "last_n_mean":
        return float(np.mean(values[-LAST_N:]))
    if objective == "auc":
        return float(np.trapezoid(values, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else values[0]
    if objective == "episodic_snqi":
        return float(np.mean([episode["snqi"] for episode in evaluations[-1]["per_episode"]]))
    raise UserError(f"objective {objective!r}: choose best_checkpoint, final_eval, last_n_mean, auc or episodic_snqi")


def violations(constraints: dict[str, float], evaluation: dict) -> dict[str, float]:
    """{constraint: by how much the evaluation violates it}, for the violated ones."""
    found = {}
    for name, bound in constraints.items():
        metric, sign = name[:-4], {"_max": 1, "_min": -1}.get(name[-4:])
        if sign is None or metric not in evaluation:
            raise UserError(f"constraint {name}: must be METRIC_max or METRIC_min of {', '.join(evaluation)}")
        if sign * (evaluation[metric] - bound) > 0:
            found[name] = sign * (evaluation[metric] - bound)
    return found


def suggest(trial: optuna.Trial, name: str, space: dict) -> Any:
    if "choices" in space:  # lists are not storable, so the choices are suggested as JSON
        choice = json.loads(trial.suggest_categorical(name, [json.dumps(x) for x in space["choices"]]))
        return tuple(choice) if isinstance(choice, list) else choice
    is_int = isinstance(space["low"], int) and isinstance(space["high"], int)
    return (trial.suggest_int if is_int else trial.suggest_float)(name, **space)


def run_trial(trial: optuna.Trial, sweep: dict, folder: Path) -> float:
    """Train with suggested settings. Returns the value of the objective, or raises optuna.TrialPruned."""
    script = importlib.import_module(sweep["script"])
    settings = {name: suggest(trial, name, space) for name, space in sweep["space"].items()}
    place = {"run_root": str(folder), "run_name": f"trial_{trial.number:03d}"}
    args = script.Args.from_preset(sweep.get("preset"), **sweep.get("args", {}) | settings | place)
    evaluations: list[dict] = []
    metric, sign = sweep["metric"], 1 if sweep["metric"] in LOWER_IS_BETTER else -1

    def on_evaluation(step: int, evaluation: dict) -> bool:
        if metric not in figures(evaluation):
            raise UserError(f"metric {metric!r}: choose from {', '.join(figures(evaluation))}")
        evaluations.append(figures(evaluation) | {"step": step, "per_episode": evaluation["per_episode"]})
        trial.report(sign * evaluations[-1][metric], len(evaluations))
        return trial.should_prune()

    try:
        summary = script.train(args, on_evaluation)
    except NonFiniteError as error:  # an unstable setting
        raise optuna.TrialPruned(str(error)) from error
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    if trial.should_prune():
        raise optuna.TrialPruned("worse than the median")
    best = figures(summary["best"])
    judged = best if sweep["objective"] == "best_checkpoint" else evaluations[-1]
    violated = violations(sweep.get("constraints", {}), {k: x for k, x in judged.items() if k != "per_episode"})
    value = objective_value(sweep["objective"], metric, evaluations, best)
    trial.set_user_attr("feasible", not violated)
    trial.set_user_attr("violations", violated)
    trial.set_user_attr("value", value)
    if violated and sweep.get("infeasible", "penalize") == "prune":
        raise optuna.TrialPruned(f"violates {violated}")
    sign = -1 if sweep["objective"] == "episodic_snqi" else sign
    return sign * value + (PENALTY * (1 + sum(violated.values())) if violated else 0.0)


def run(args: Args) -> optuna.Study:
    """Run the trials that are missing. Returns the study."""
    try:
        sweep = read_json(args.sweep)
        sweep["script"], sweep["metric"], sweep["objective"], sweep["space"]
    except KeyError as error:
        raise UserError(f"{args.sweep}: not a sweep ({error!r}); --help shows an example") from None
    folder = Path(args.run_root) / "studies" / Path(args.sweep).stem
    folder.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        command = [sys.executable, __file__, args.sweep, "--run-root", args.run_root]
        processes = [subprocess.Popen(command) for _ in range(args.jobs)]
        if any([process.wait() for process in processes]):
            raise UserError("a process failed or was stopped; run the same command to go on")
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name=Path(args.sweep).stem,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(**sweep["pruning"]) if "pruning" in sweep else optuna.pruners.NopPruner(),
    )
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    limit = optuna.study.MaxTrialsCallback(sweep.get("trials", 12), states=ended)
    if args.jobs == 1 and len(study.get_trials(states=ended)) < sweep.get("trials", 12):
        study.optimize(lambda trial: run_trial(trial, sweep, folder), callbacks=[limit])
    return study


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        study = run(args)
        columns = ("number", "state", "value", "params", "user_attrs")
        trials = study.trials_dataframe(columns).sort_values("value")
        print(trials.to_string(index=False, max_colwidth=40))


if __name__ == "__main__":
    main()
