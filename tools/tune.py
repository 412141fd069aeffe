"""Search for settings of a script with Optuna (pip install -e ".[tune]").

    python tools/tune.py sweep.toml --jobs 2        a stopped study goes on when it is started again

sweep.toml says what to try, and what counts:

    script = "ppo_continuous"            # ppo_residual, ppo_grid_socnav, bc_pretrain
    trials = 12
    metric = "mean_return"               # success_rate, failure_rate, collision_rate, or one of the task such as snqi
    objective = "best_checkpoint"        # its value at best.pt; final_eval, last_n_mean, auc: over the evaluations
    # direction = "maximize"             # if not given, as the metric has it: costs and contacts are minimized
    # infeasible = "penalize"            # or "prune": how a trial that breaks a constraint is told to the sampler

    [args]                               # the settings of every trial
    env_id = "Ballbot-v0"
    total_timesteps = 500_000

    [space.learning_rate]                # the settings to search
    low = 1e-5
    high = 1e-3
    log = true

    [space.minibatch_size]
    choices = [128, 256, 512]

    [constraints]                        # METRIC_max or METRIC_min, on the evaluation that the objective looks at
    failure_rate_max = 0.1

    [pruning]                            # stop a trial whose evaluations are worse than the median of the others'
    first_trials = 4                     # not before so many have ended
    first_evaluations = 3                # nor before so many evaluations

Evaluations are those of the validation split. Each trial is an ordinary run, runs/studies/<file>/trial_000 and so on;
beside them lie study.db (SQLite, which optuna-dashboard reads) and summary.md, the table of all trials.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError, matches
from envs.cli import one_line_errors
from envs.evaluation import LOWER_IS_BETTER, figures, read_json
from envs.run import read_jsonl, write_file

ROOT = Path(__file__).resolve().parents[1]
PENALTY, PER_VIOLATION = 1e6, 1e3  # worse than any figure that a feasible trial can have
OURS = ("run_root", "run_name", "resume", "config", "dry_run", "capture_video")
POLL = 0.5  # s between two looks at the running trials


@dataclass
class Args:
    sweep: tyro.conf.Positional[str]
    """TOML file that says what to try"""
    jobs: int = 1
    """trials at a time; no more than there are idle cores"""
    run_root: str = "runs"
    """directory that holds the runs and studies/"""


@dataclass
class Sweep:
    """What the TOML file holds."""

    script: Literal["ppo_continuous", "ppo_residual", "ppo_grid_socnav", "bc_pretrain"]
    metric: str
    space: dict[str, dict]
    trials: int = 12
    objective: Literal["best_checkpoint", "final_eval", "last_n_mean", "auc"] = "best_checkpoint"
    last_n: int = 3
    direction: Literal["maximize", "minimize"] | None = None
    infeasible: Literal["penalize", "prune"] = "penalize"
    seed: int = 1
    args: dict = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)
    pruning: dict[str, int] = field(default_factory=dict)

    @property
    def sign(self) -> int:
        """1 where more is better, or else -1."""
        given = self.direction or ("minimize" if self.metric in LOWER_IS_BETTER else "maximize")
        return 1 if given == "maximize" else -1


def load_sweep(path: str) -> Sweep:
    """Raises UserError for a file that is missing or says what cannot be done."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --help shows how one is written") from None
    except RecursionError:
        raise UserError(
            f"{path}: not TOML that can be read (nested too deep); --help shows how it is written"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error}); --help shows how it is written") from None
    for name in ("script", "metric", "space"):
        if name not in content:
            raise UserError(f"{path}: {name} is missing; --help shows how it is written")
    sweep = from_content(Sweep, content, path)
    require_settings(sweep, path)
    for name, ends in (("trials", 1), ("last_n", 1)):
        if getattr(sweep, name) < ends:
            raise UserError(f"{path}: {name} must be at least {ends}, not {getattr(sweep, name)}")
    for name in sweep.constraints:
        if not name.endswith(("_max", "_min")):
            raise UserError(f"{path}: a constraint is METRIC_max or METRIC_min, not {name!r}")
    if not 0 <= sweep.seed < 2**31:
        raise UserError(f"{path}: seed must be 0 or more, and below 2**31, not {sweep.seed!r}")
    for name, value in sweep.pruning.items():
        if name not in ("first_trials", "first_evaluations"):
            raise UserError(f"{path}: unknown pruning.{name}; there are first_trials and first_evaluations")
        if value < 0:
            raise UserError(f"{path}: pruning.{name} must be 0 or more, not {value}")
    return sweep


def from_content(cls: type, content: dict, path: str) -> Any:
    """An instance of a dataclass. Raises UserError for an unknown name or a value of the wrong type."""
    types = {f.name: f.type for f in fields(cls)}
    for name, value in content.items():
        if name not in types:
            raise UserError(f"{path}: unknown {name!r}; there are {', '.join(types)}")
        if not matches(value, types[name]):
            raise UserError(f"{path}: {name} cannot be {value!r}")
    return cls(**content)


def require_settings(sweep: Sweep, path: str) -> None:
    """Raises UserError unless [args] sets, and [space] searches, settings of the script, with values that it takes."""
    types = types_of(sweep.script)
    for name, space in sweep.space.items():
        if name in sweep.args:
            raise UserError(f"{path}: {name} stands in [args] and in [space]; keep one")
        if {*space} not in ({"choices"}, {"low", "high"}, {"low", "high", "log"}, {"low", "high", "step"}):
            raise UserError(f"{path}: space.{name} must have choices, or low and high and perhaps log or step")
        if "choices" in space and not (isinstance(space["choices"], list) and space["choices"]):
            raise UserError(f"{path}: space.{name}.choices must be a list of values")
        ends = [space[end] for end in ("low", "high", "step") if end in space]
        numbers = all(matches(end, float) and math.isfinite(end) for end in ends) and matches(
            space.get("log", True), bool
        )
        if not numbers or (ends and not ends[0] < ends[1]) or (space.get("log") and ends[0] <= 0):
            raise UserError(f"{path}: space.{name} must have numbers, low below high, and with log both above 0")
        if not space.get("step", 1) > 0:
            raise UserError(f"{path}: space.{name}.step must be above 0, not {space['step']!r}")
        if types.get(name) is int and not all(isinstance(end, int) for end in ends):
            raise UserError(f"{path}: space.{name} must have whole numbers")
    values = [(name, value) for name, value in sweep.args.items()]
    for name, space in sweep.space.items():
        values += [(name, value) for value in space.get("choices", [space.get("low"), space.get("high")])]
    for name, value in values:
        if name not in types or name in OURS:
            raise UserError(f"{path}: {name} is no setting of {sweep.script} that a study can set; see its --help")
        if not matches(value, types[name]):
            raise UserError(f"{path}: {name} cannot be {value!r}; {sweep.script}.py --help says what it takes")


def suggest(trial: Any, name: str, space: dict, whole: bool) -> Any:
    """The value of a setting in a trial; whole: an integer."""
    if "choices" in space:  # what Optuna stores must be plain: a list of layers goes as its text
        chosen = trial.suggest_categorical(name, [json.dumps(choice) for choice in space["choices"]])
        return json.loads(chosen)
    return trial.suggest_int(name, **space) if whole else trial.suggest_float(name, **space)


def types_of(script: str) -> dict[str, Any]:
    """{setting: its type} of a script."""
    args_class = importlib.import_module(script).Args
    hints = get_type_hints(args_class)  # without Annotated
    return {f.name: hints[f.name] for f in fields(args_class)}


def flags(values: dict[str, Any], types: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    line: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if types[name] is bool:
            line.append(f"--{'' if value else 'no-'}{flag}")
        elif isinstance(value, dict):
            line += [f"--{flag}", *(str(x) for pair in value.items() for x in pair)]
        elif isinstance(value, list | tuple):
            line += [f"--{flag}", *map(str, value)]
        else:
            line += [f"--{flag}", str(value)]
    return line


def measured(evaluation: dict, metric: str) -> float:
    """A figure of an evaluation.

    Raises:
        UserError: it has none of that name.
    """
    found = figures(evaluation)
    if metric not in found:
        raise UserError(f"evaluations have no figure {metric!r}; there are {', '.join(found)}")
    return float(found[metric])


def objective(sweep: Sweep, evaluations: list[dict], best: dict) -> float:
    """What a finished trial is worth; `best` is the evaluation of its best.pt."""
    if sweep.objective == "best_checkpoint":
        return measured(best, sweep.metric)
    steps = np.array([e["step"] for e in evaluations], float)
    values = np.array([measured(e, sweep.metric) for e in evaluations])
    if sweep.objective == "auc" and len(values) > 1:  # the mean over the steps, by the trapezoidal rule
        return float((np.diff(steps) * (values[1:] + values[:-1]) / 2).sum() / (steps[-1] - steps[0]))
    return float(values[-sweep.last_n :].mean() if sweep.objective == "last_n_mean" else values[-1])


def violations(sweep: Sweep, evaluations: list[dict], best: dict) -> dict[str, float]:
    """{constraint: by how much it is broken}, on the evaluation of best.pt or on the last one."""
    looked_at = best if sweep.objective == "best_checkpoint" else evaluations[-1]
    broken = {}
    for name, bound in sweep.constraints.items():
        excess = measured(looked_at, name[:-4]) - bound
        excess = excess if name.endswith("_max") else -excess
        if excess > 0:
            broken[name] = excess
    return broken


def stop(processes: list[subprocess.Popen]) -> None:
    """End them as a user would: they save what they have. All are told before the first is waited for."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


class Trial:
    """A trial that runs: its process and what its evaluations have said so far."""

    def __init__(self, sweep: Sweep, trial: Any, folder: Path):
        self.trial, self.sweep, self.folder, self.seen = trial, sweep, folder / f"trial_{trial.number:03d}", 0
        types = types_of(sweep.script)
        values = {name: suggest(trial, name, space, types[name] is int) for name, space in sweep.space.items()}
        line = [sys.executable, str(ROOT / f"{sweep.script}.py"), *["train"] * (sweep.script == "bc_pretrain")]
        line += flags({**sweep.args, **values, "run_root": str(folder), "run_name": self.folder.name}, types)
        self.log = open(folder / f"{self.folder.name}.log", "wb")  # noqa: SIM115 (open while the trial runs)
        self.process = subprocess.Popen(line, stdout=self.log, stderr=subprocess.STDOUT)
        trial.set_user_attr("pid", self.process.pid)

    def poll(self) -> bool:
        """Tell the study of new evaluations, and stop the trial if it is not worth going on. Whether it has ended."""
        ended = self.process.poll() is not None  # asked first: what was written before is read below
        evaluations = read_jsonl(self.folder / "evaluations.jsonl")
        for evaluation in evaluations[self.seen :]:
            violations(self.sweep, [evaluation], evaluation)  # a misspelt name shows here, not at the end of the trial
            self.trial.report(measured(evaluation, self.sweep.metric), evaluation["step"])
        new, self.seen = len(evaluations) > self.seen, len(evaluations)
        due = self.sweep.pruning and new and self.seen >= self.sweep.pruning.get("first_evaluations", 1)
        if not ended and due and self.trial.should_prune():
            self.stop()
            self.trial.set_user_attr("stopped_at", evaluations[-1]["step"])
            return True
        return ended

    def stop(self) -> None:
        stop([self.process])

    def close(self) -> None:
        self.log.close()

    def error(self) -> str:
        """What the script said was wrong."""
        lines = Path(self.log.name).read_text(errors="replace").strip().splitlines()
        ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return [f"exit status {self.process.returncode}; see {self.log.name}", *ours][-1]


def open_study(sweep: Sweep, path: Path, folder: Path) -> Any:
    """The study of a sweep, new or as far as it had come; trials that were cut off are tried again.

    Raises:
        UserError: Optuna is missing, or the study in the folder is another.
    """
    try:
        import optuna
    except ImportError:
        raise UserError('a study needs Optuna: pip install -e ".[tune]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=sweep.pruning.get("first_trials", 5))
    about = {"storage": f"sqlite:///{folder / 'study.db'}", "study_name": path.stem, "pruner": pruner}
    direction = "maximize" if sweep.sign == 1 else "minimize"
    settings = {name: value for name, value in asdict(sweep).items() if name != "trials"}
    try:
        require_sound(folder / "study.db")
        study = optuna.create_study(**about, direction=direction, load_if_exists=True)
        # The sampler's generator is not stored: one that goes on draws anew
        study.sampler = optuna.samplers.TPESampler(seed=sweep.seed + len(study.trials))
        if ended(study) and study.user_attrs["sweep"] != json.loads(json.dumps(settings)):
            raise UserError(f"{folder} holds a study of other settings; rename {path.name}, or remove that folder")
        study.set_user_attr("sweep", settings)
        for old in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            stop_orphan(old.user_attrs.get("pid"), folder / f"trial_{old.number:03d}")
            study.tell(old.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(old.params)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy's, SQLite's and Optuna's exceptions have no common base
        raise UserError(f"{folder / 'study.db'}: damaged, or no study; restore it, or remove that folder") from error
    return study


def require_sound(file: Path) -> None:
    """Raises sqlite3.DatabaseError for a database that is damaged, on whose pages SQLite might go round in circles."""
    if not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file.resolve().as_uri() + "?mode=ro", uri=True)) as database:
        if database.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
            raise sqlite3.DatabaseError("damaged")


def stop_orphan(pid: int | None, folder: Path) -> None:
    """Stop the process of a trial whose study was killed, if it still runs."""
    shown = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout if pid else ""
    if f"--run-name {folder.name}" in shown and str(folder.parent) in shown:
        os.kill(pid, signal.SIGTERM)


def settle(study: Any, trial: Trial) -> None:
    """Tell the study how a trial ended.

    Raises:
        UserError: the script refused its settings, and had not yet taken any.
    """
    from optuna.trial import TrialState

    ours, sweep = trial.trial, trial.sweep
    trial.close()
    if "stopped_at" in ours.user_attrs:
        study.tell(ours, state=TrialState.PRUNED)
        return
    if trial.process.returncode != 0:
        ours.set_user_attr("error", trial.error())
        study.tell(ours, state=TrialState.FAIL)
        if trial.process.returncode == 2 and not any("value" in other.user_attrs for other in ended(study)):
            raise UserError(f"{trial.folder.name}: {trial.error()}")  # nothing has worked so far, so nothing may ever
        return
    best = read_json(trial.folder / "summary.json")["best"]
    evaluations = read_jsonl(trial.folder / "evaluations.jsonl")
    value, broken = objective(sweep, evaluations, best), violations(sweep, evaluations, best)
    ours.set_user_attr("value", value)
    ours.set_user_attr("violations", broken)
    if broken and sweep.infeasible == "prune":
        study.tell(ours, state=TrialState.PRUNED)
    else:
        penalty = PENALTY + PER_VIOLATION * sum(broken.values()) if broken else 0.0
        study.tell(ours, value - sweep.sign * penalty)


def ended(study: Any) -> list[Any]:
    """The trials that count: those that ended by themselves or were pruned, not those that were cut off."""
    return [
        trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED") or "error" in trial.user_attrs
    ]


def outcome(trial: Any) -> str:
    """What became of a trial, in a few words."""
    about = trial.user_attrs
    if "error" in about:
        return f"failed: {about['error']}"
    if "stopped_at" in about:
        return f"stopped at step {about['stopped_at']:,}"
    broken = ", ".join(f"{name} by {excess:.3g}" for name, excess in about["violations"].items())
    return f"infeasible: {broken}" if broken else "feasible"


def best_of(study: Any, sweep: Sweep) -> Any | None:
    """The best trial that keeps all constraints; None if there is none."""
    feasible = [trial for trial in ended(study) if trial.user_attrs.get("violations") == {}]
    return max(feasible, key=lambda trial: sweep.sign * trial.user_attrs["value"], default=None)


def report(study: Any, sweep: Sweep) -> str:
    """A Markdown table of the trials and what they found."""
    names = [*sweep.space]
    lines = [["trial", f"{sweep.metric} ({sweep.objective})", "outcome", *names]]
    lines.append(["---"] * len(lines[0]))
    best = best_of(study, sweep)
    for trial in ended(study):
        value = trial.user_attrs.get("value")
        chosen = [trial.params.get(name, "-") for name in names]
        number = f"**{trial.number}**" if best is not None and trial.number == best.number else str(trial.number)
        shown = "-" if value is None else f"{value:.4g}"
        lines.append([number, shown, outcome(trial), *(x if isinstance(x, str) else f"{x:.4g}" for x in chosen)])
    count = sum(trial.user_attrs.get("violations") == {} for trial in ended(study))
    found = f"{len(ended(study))} trials, {count} of them feasible. "
    if best is None:
        found += "No trial keeps all constraints: search elsewhere, or loosen them."
    else:
        found += f"Best: trial {best.number}, {sweep.metric} {best.user_attrs['value']:.4g}."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{found}\n"


def tune(args: Args) -> Any | None:
    """Run a study to its end. Returns its best feasible trial."""
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    path = Path(args.sweep)
    sweep = load_sweep(args.sweep)
    folder = Path(args.run_root) / "studies" / path.stem
    study = open_study(sweep, path, folder)
    running: list[Trial] = []
    try:
        while running or len(ended(study)) < sweep.trials:
            while len(running) < args.jobs and len(ended(study)) + len(running) < sweep.trials:
                running.append(Trial(sweep, study.ask(), folder))
            time.sleep(POLL)
            for trial in [trial for trial in running if trial.poll()]:
                running.remove(trial)
                settle(study, trial)
                known = study.trials[trial.trial.number]
                print(f"trial {known.number}: {known.user_attrs.get('value', '-')}, {outcome(known)}", file=sys.stderr)
                write_file(folder / "summary.md", report(study, sweep).encode())
    finally:
        stop([trial.process for trial in running])
        for trial in running:
            trial.close()
    write_file(folder / "summary.md", report(study, sweep).encode())
    print(report(study, sweep), end="")
    return best_of(study, sweep)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the trials are stopped
    with one_line_errors():
        tune(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
