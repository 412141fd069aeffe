"""Show runs side by side: a Markdown table of their figures, and their learning curves as a picture.

    python tools/compare_runs.py runs/<run> runs/<run> ...
    python tools/compare_runs.py runs/<run> ... --png curves.png          needs pip install -e ".[plots]"

Or weigh runs that began from a clone against runs from scratch: what both reached, and how many steps they took.

    python tools/compare_runs.py --baseline runs/<run> ... --pretrained runs/<run> ... \\
        --criterion mean_return 86 success_rate 0.99 --group ballbot      writes runs/comparisons/ballbot.{json,md,png}

A run has converged at the first of `--window` validation evaluations in a row that meet the criterion. One that never
does has taken more than its budget: it stays in the mean with its budget, which is then a bound and marked as such.

A run's test figures are those of `tools/evaluate.py runs/<run> --json runs/<run>/test.json`.
"""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError
from envs.cli import one_line_errors
from envs.evaluation import LOWER_IS_BETTER, figures, read_json
from envs.run import read_jsonl, write_file, write_json

RESAMPLES = 10_000  # of a bootstrap
FEWEST = 3  # runs of which one says anything
# Settings in which runs that are compared must not differ
JUDGED = ("env_id", "env_kwargs", "eval_env_kwargs", "total_timesteps", "eval_every", "eval_episodes", "eval_seed")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run directories to show, without a comparison"""
    baseline: tuple[str, ...] = ()
    """runs from scratch, one for each seed"""
    pretrained: tuple[str, ...] = ()
    """runs that began from a clone"""
    criterion: dict[str, float] = field(default_factory=dict)
    """METRIC BOUND ... that an evaluation must meet to count: at least, or at most where less is better"""
    window: int = 3
    """evaluations in a row that must meet it"""
    group: str | None = None
    """name of the comparison: its report goes to <run-root>/comparisons/NAME.json, .md and .png"""
    run_root: str = "runs"
    """directory that holds comparisons/"""
    png: str | None = None
    """where to draw the learning curves, over the steps that all runs have: mean, shaded from lowest to highest"""
    training: bool = True
    """with --png: also draw the training episodes, whose reward may be another than that of the published task"""


def read_run(path: str) -> dict:
    """config, summary, test (or None), progress and evaluations of a run.

    Raises:
        UserError: it has not ended, or one of its files holds something else.
    """
    folder = Path(path)
    if not (folder / "summary.json").is_file():
        raise UserError(f"{path}: not a finished run (it has no summary.json)")
    files = {name: folder / f"{name}.json" for name in ("config", "summary", "test")}
    if not files["config"].is_file():
        raise UserError(f"{path}: has no config.json, which says what it ran with")
    run = {name: read_json(file) if file.exists() else None for name, file in files.items()}
    if run["test"] is not None and run["test"].get("sha256") != run["summary"]["sha256"].get("best.pt"):
        print(f"{path}: test.json is of another best.pt; evaluate again", file=sys.stderr)
        run["test"] = None
    with open(folder / "progress.csv", newline="", encoding="utf-8") as file:
        progress = list(csv.DictReader(file))
    return {**run, "progress": progress, "evaluations": read_jsonl(folder / "evaluations.jsonl")}


def table(runs: list[dict]) -> str:
    """One row a run, and one for the mean."""
    columns = {
        "seed": lambda run: str(run["config"]["args"]["seed"]),
        "steps": lambda run: run["summary"]["steps"],
        "best at": lambda run: run["summary"]["best"]["step"],
        "test success": lambda run: run["test"]["success_rate"],
        "base alone": lambda run: run["test"]["base"]["success_rate"],
        "paired gain": lambda run: run["test"]["gain"]["gain"],
        "test return": lambda run: run["test"]["mean_return"],
        "total_cost": lambda run: run["test"]["metrics"]["total_cost"],
        "median": lambda run: float(np.median([episode["total_cost"] for episode in run["test"]["per_episode"]])),
        "contact": lambda run: sum(run["test"]["metrics"][f"{what}_collision"] for what in ("pedestrian", "obstacle")),
        "time-outs": lambda run: run["test"]["metrics"]["timeout"],
        "SNQI": lambda run: run["test"]["metrics"]["snqi"],
        "converged at": lambda run: run["summary"]["converged_at_step"],
        "yaw error": lambda run: run["test"]["metrics"]["yaw_error"],
        "base yaw error": lambda run: run["test"]["base"]["metrics"]["yaw_error"],
        # that of a resumed run is of its last part only
        "wall time (s)": lambda run: None if run["config"]["resumed"] else run["summary"]["wall_time_s"],
    }
    rows = []
    for run in runs:
        rows.append([])
        for value in columns.values():
            try:
                rows[-1].append(value(run))
            except (KeyError, TypeError):  # a figure that this run or task does not have
                rows[-1].append(None)
    kept = [(name, values) for name, values in zip(columns, zip(*rows)) if any(x is not None for x in values)]
    means = ["mean", *(np.mean(values) if None not in values else None for _, values in kept[1:])]
    rows = [*zip(*(values for _, values in kept)), means]
    lines = [[name for name, _ in kept], ["---"] * len(kept), *([show(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(x: object) -> str:
    if x is None:
        return "-"
    if isinstance(x, str):
        return x
    return f"{x:.3f}" if isinstance(x, float) and abs(x) < 10 else f"{x:.1f}" if abs(x) < 100 else f"{x:,.0f}"


def origin(runs: list[dict]) -> str:
    """Commit, versions and hardware, from the first run; a warning if another run differs."""
    first = runs[0]["config"]
    packages = ", ".join(f"{name} {version}" for name, version in first["packages"].items())
    text = f"commit {(first['git_commit'] or 'unknown')}; {first['hardware']}; Python {first['python']}, {packages}"
    differ = [run for run in runs if any(run["config"][k] != first[k] for k in ("git_commit", "hardware", "packages"))]
    return text + (f" (not the same for {len(differ)} of {len(runs)} runs)" if differ else "")


# Against scratch


def meets(evaluation: dict, criterion: dict[str, float]) -> bool:
    """Whether an evaluation keeps all bounds.

    Raises:
        UserError: it has no such figure.
    """
    found = figures(evaluation)
    for name, bound in criterion.items():
        if name not in found:
            raise UserError(f"--criterion {name}: evaluations have no such figure; there are {', '.join(found)}")
        if found[name] > bound if name in LOWER_IS_BETTER else found[name] < bound:
            return False
    return True


def converged_at(run: dict, criterion: dict[str, float], window: int) -> int | None:
    """The step of the first of `window` evaluations in a row that meet the criterion; None without."""
    row: list[int] = []
    for evaluation in run["evaluations"]:
        row = [*row, evaluation["step"]] if meets(evaluation, criterion) else []
        if len(row) == window:
            return row[0]
    return None


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of a bootstrap."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def resampled_means(values: list[float], seed: int) -> np.ndarray:
    """Means of RESAMPLES samples of the same size, drawn with replacement."""
    values = np.asarray(values, float)
    return values[np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))].mean(1)


def charges(run: dict) -> tuple[int, int]:
    """Steps that a fine-tuned run owes: all that were played for demonstrations, and all that training its experts
    took. Each file that it came from counts once.

    Raises:
        UserError: its config.json does not say what it came from, or how many steps that took.
    """
    owed, seen, name = {"demonstrations": 0, "experts": 0}, set(), run["summary"]["run"]

    def add(parents: dict) -> None:
        for path, parent in parents.items():
            about = parent["config"]
            if not path.endswith((".pt", ".npz")) or parent["sha256"] in seen:
                continue  # files that are no policy of ours, such as a model that the environment runs on
            seen.add(parent["sha256"])
            if about is None:
                raise UserError(f"{name}: nothing says how many steps {path} took; keep it in its run directory")
            if path.endswith(".npz"):
                owed["demonstrations"] += about["totals"]["env_steps"]
            elif about["script"] != "bc_pretrain":  # a clone's own steps are passes over demonstrations
                if parent.get("steps") is None:
                    raise UserError(f"{name}: {path} is of a run without a summary.json; let it finish")
                owed["experts"] += parent["steps"]
            add(about.get("parents", {}))

    add(run["config"]["parents"])
    if not seen:
        raise UserError(f"{name}: began from scratch, so it is no run for --pretrained")
    return owed["demonstrations"], owed["experts"]


def arm(runs: list[dict], criterion: dict[str, float], window: int) -> dict:
    """Where each run of an arm converged, and the steps it is charged: its budget where it never did."""
    reached = [converged_at(run, criterion, window) for run in runs]
    budget = [run["summary"]["steps"] for run in runs]
    steps = [most if at is None else at for at, most in zip(reached, budget)]
    names = [run["summary"]["run"] for run in runs]
    return {"runs": names, "converged_at": reached, "budget": budget, "steps": steps, "censored": reached.count(None)}


def ratio(baseline: dict, pretrained: dict, owed: list[int]) -> dict:
    """Mean steps of the pretrained runs, each with what it owes on top, as a share of the baseline's, and the 95 %
    interval of a bootstrap over runs, from three on.

    bound: "<=" if a baseline never converged, so that it would have taken longer; ">=" if a pretrained run did not;
    "?" if both, when nothing can be said."""
    ours, theirs = np.add(pretrained["steps"], owed), baseline["steps"]
    censored = (bool(baseline["censored"]), bool(pretrained["censored"]))
    bound = {(False, False): "=", (True, False): "<=", (False, True): ">=", (True, True): "?"}[censored]
    low, high = interval(resampled_means(ours, 1) / resampled_means(theirs, 2))
    known = min(len(ours), len(theirs)) >= FEWEST and bound != "?"
    spread = {"low": low, "high": high} if known else {"low": None, "high": None}
    return {"value": float(np.mean(ours) / np.mean(theirs)), **spread, "bound": bound}


def finals(runs: list[dict], of: str) -> dict[str, dict]:
    """{figure: mean over the runs with the 95 % interval of a bootstrap, and each} of their test, or of the best
    validation."""
    results = [run["test"] if of == "test" else run["summary"]["best"] for run in runs]
    found = {}
    for name in ("success_rate", "failure_rate", "mean_return", "mean_length", *results[0]["metrics"]):
        values = [figures(result).get(name) for result in results]
        if None not in values:
            low, high = interval(resampled_means(values, 3)) if len(values) >= FEWEST else (None, None)
            found[name] = {"mean": float(np.mean(values)), "low": low, "high": high, "each": values}
    return found


def require_alike(baseline: list[dict], pretrained: list[dict]) -> None:
    """Raises UserError unless all runs are complete, differ from one another, and were judged alike."""
    runs = [*baseline, *pretrained]
    names = [str(Path(run["summary"]["run"])) for run in runs]
    for run, name in zip(runs, names):
        if run["summary"]["status"] != "completed":
            raise UserError(f"{name}: {run['summary']['status']}; compare complete runs, or finish it with --resume")
        if names.count(name) > 1:
            raise UserError(f"{name}: named more than once")
    for run, name in zip(baseline, names):
        if run["config"]["args"].get("pretrained") is not None:
            raise UserError(f"{name}: began from a policy, so it is no run for --baseline")
    for setting in JUDGED:
        values = {name: run["config"]["args"].get(setting) for run, name in zip(runs, names)}
        for name, value in values.items():
            if value != values[names[0]]:
                raise UserError(
                    f"{name}: has {setting} {value}, and {names[0]} {values[names[0]]}; compare like with like"
                )


def compare(baseline: list[dict], pretrained: list[dict], args: Args) -> dict:
    """What the report says of two arms."""
    require_alike(baseline, pretrained)
    arms = {
        name: arm(runs, args.criterion, args.window)
        for name, runs in (("baseline", baseline), ("pretrained", pretrained))
    }
    demonstrations, experts = (np.array(x) for x in zip(*map(charges, pretrained)))
    owed = {
        "fine_tuning": 0 * demonstrations,
        "with_demonstrations": demonstrations,
        "with_expert": demonstrations + experts,
    }
    of = "test" if all(run["test"] is not None for run in (*baseline, *pretrained)) else "validation"
    return {
        "group": args.group,
        "criterion": args.criterion,
        "window": args.window,
        **arms,
        "demonstration_steps": float(demonstrations.mean()),
        "expert_steps": float(experts.mean()),
        "ratio": {name: ratio(arms["baseline"], arms["pretrained"], steps) for name, steps in owed.items()},
        "final_of": of,
        "final": {"baseline": finals(baseline, of), "pretrained": finals(pretrained, of)},
    }


def describe(found: dict) -> str:
    """The comparison in Markdown."""
    wanted = ", ".join(
        f"{name} {'<=' if name in LOWER_IS_BETTER else '>='} {bound:g}" for name, bound in found["criterion"].items()
    )
    lines = [f"Criterion: {wanted}, in {found['window']} evaluations in a row.", ""]
    lines += ["| arm | steps to the criterion, each run | mean | never |", "| --- | --- | --- | --- |"]
    for name in ("baseline", "pretrained"):
        one = found[name]
        each = [f"{at:,}" if at is not None else f"> {most:,}" for at, most in zip(one["converged_at"], one["budget"])]
        mean = f"{'>= ' if one['censored'] else ''}{np.mean(one['steps']):,.0f}"
        lines.append(f"| {name} | {', '.join(each)} | {mean} | {one['censored']} of {len(each)} |")
    lines += [
        "",
        "| steps of the pretrained arm as a share of the baseline's | ratio | 95 % interval |",
        "| --- | --- | --- |",
    ]
    labels = {
        "fine_tuning": "fine-tuning alone",
        "with_demonstrations": f"with {found['demonstration_steps']:,.0f} steps of demonstrations",
        "with_expert": f"and with {found['expert_steps']:,.0f} steps of the expert's training",
    }
    for name, label in labels.items():
        one = found["ratio"][name]
        sign = "" if one["bound"] == "=" else f"{one['bound']} "
        spread = "-" if one["low"] is None else f"{sign}{one['low']:.2f} to {sign}{one['high']:.2f}"
        lines.append(f"| {label} | {sign}{one['value']:.2f} | {spread} |")
    lines += ["", f"| final ({found['final_of']}) | baseline | pretrained |", "| --- | --- | --- |"]
    for name in found["final"]["baseline"]:
        cells = []
        for which in ("baseline", "pretrained"):
            one = found["final"][which].get(name)
            spread = "" if one is None or one["low"] is None else f" ({one['low']:.4g} to {one['high']:.4g})"
            cells.append("-" if one is None else f"{one['mean']:.4g}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Intervals are those of a bootstrap over runs, which are few: read them as rough."])


def draw(groups: dict[str, list[dict]], path: Path, with_training: bool) -> None:
    """Success where there is one, return and episode length over steps: a curve for each group of runs, its mean over
    them, shaded from lowest to highest."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('a picture needs matplotlib: pip install -e ".[plots]"') from None
    panels = (
        ("success", "rollout/success_rate_100", "success_rate"),
        ("return", "rollout/ep_reward", "mean_return"),
        ("episode length (steps)", "rollout/ep_length", "mean_length"),
    )
    every = [run for runs in groups.values() for run in runs]
    panels = [  # those in which there is something to see
        panel for panel in panels if len({row[panel[2]] for run in every for row in run["evaluations"]}) > 1
    ]
    if not panels:
        raise UserError("--png: no run has evaluations that differ, so there is nothing to draw; leave it out")
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (title, scalar, name) in zip(axes[0], panels):
        shown = []
        for group, colour in zip(groups, ("tab:blue", "tab:orange")):
            training = [
                {int(row["step"]): float(row[scalar]) for row in run["progress"] if row.get(scalar)}
                for run in groups[group]
            ]
            evaluation = [{row["step"]: row[name] for row in run["evaluations"]} for run in groups[group]]
            if with_training:
                shown.append((training, "training", "tab:grey"))
            shown.append((evaluation, group, colour))
        for curves, label, colour in shown:
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not steps:  # nothing that all runs have
                continue
            values = np.array([[curve[step] for step in steps] for curve in curves])
            axis.plot(steps, values.mean(0), color=colour, label=label, marker=None if label == "training" else "o")
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="environment steps")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3)
        if title == "success":
            axis.set_ylim(0, 1)
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


def check(args: Args) -> None:
    """Raises UserError for what does not go together."""
    arms = bool(args.baseline) + bool(args.pretrained)
    if arms == 1 or bool(args.runs) == bool(arms):
        raise UserError("name run directories, or those of both --baseline and --pretrained")
    if args.group is not None and not arms:
        raise UserError("--group names a comparison of --baseline and --pretrained; leave it out")
    if not arms and (args.criterion or args.window != Args().window):
        raise UserError("--criterion and --window are for a comparison of --baseline and --pretrained; leave them out")
    if arms and not args.criterion:
        raise UserError("say what counts as converged: --criterion METRIC BOUND, such as success_rate 0.9")
    if args.window < 1:
        raise UserError(f"--window must be at least 1, not {args.window}")


def run(args: Args) -> None:
    """Print the table or the comparison, and write its files."""
    check(args)
    if args.runs:
        runs = [read_run(path) for path in args.runs]
        print(f"{table(runs)}\n\n{origin(runs)}")
        if args.png is not None:
            draw({"evaluation": runs}, Path(args.png), args.training)
        return
    baseline, pretrained = ([read_run(path) for path in paths] for paths in (args.baseline, args.pretrained))
    found = compare(baseline, pretrained, args)
    text = f"{describe(found)}\n\n{origin([*baseline, *pretrained])}"
    print(text)
    arms = {"from scratch": baseline, "from the clone": pretrained}
    if args.png is not None:
        draw(arms, Path(args.png), with_training=False)
    if args.group is not None:
        folder = Path(args.run_root) / "comparisons"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{args.group}.json", found)
        write_file(folder / f"{args.group}.md", f"# {args.group}\n\n{text}\n".encode())
        draw(arms, folder / f"{args.group}.png", with_training=False)


def main() -> None:
    with one_line_errors():
        run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
