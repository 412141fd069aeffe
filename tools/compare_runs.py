"""Show runs side by side: a Markdown table of their figures, and their learning curves as a picture.

    python tools/compare_runs.py runs/<run> runs/<run> ...
    python tools/compare_runs.py runs/<run> ... --png curves.png          needs pip install -e ".[plots]"

A run's test figures are those of `--evaluate runs/<run> --json runs/<run>/test.json`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.command import command_line
from envs.run import UserError, read_json, read_jsonl, read_progress


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run directories"""
    png: str | None = None
    """where to draw the learning curves, over the steps that all runs have: mean, shaded from lowest to highest"""
    training: bool = True
    """with --png: also draw the training episodes, whose reward may be another than that of the published task"""


def read_run(path: str) -> dict:
    """config, summary, test (or None), progress and evaluations of a run."""
    folder = Path(path)
    if not (folder / "summary.json").is_file():
        raise UserError(f"{path}: not a finished run (it has no summary.json)")
    files = {name: folder / f"{name}.json" for name in ("config", "summary", "test")}
    run = {name: read_json(file) if file.exists() else None for name, file in files.items()}
    if run["test"] is not None and run["test"].get("sha256") != run["summary"]["sha256"]["best.pt"]:
        print(f"{path}: test.json is of another best.pt; evaluate again", file=sys.stderr)
        run["test"] = None
    progress, evaluations = read_progress(folder / "progress.csv"), read_jsonl(folder / "evaluations.jsonl")
    return {**run, "progress": progress, "evaluations": evaluations}


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


def draw(runs: list[dict], path: str, with_training: bool) -> None:
    """Success where there is one, return and episode length over steps."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('--png needs matplotlib: pip install -e ".[plots]"') from None
    panels = (
        ("success", "rollout/success_rate_100", "success_rate"),
        ("return", "rollout/ep_reward", "mean_return"),
        ("episode length (steps)", "rollout/ep_length", "mean_length"),
    )
    panels = [  # those in which there is something to see
        panel for panel in panels if len({row[panel[2]] for run in runs for row in run["evaluations"]}) > 1
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (title, scalar, name) in zip(axes[0], panels):
        training = [{int(row["step"]): float(row[scalar]) for row in run["progress"] if row[scalar]} for run in runs]
        evaluation = [{row["step"]: row[name] for row in run["evaluations"]} for run in runs]
        shown = [(evaluation, "evaluation", "tab:blue")]
        if with_training:
            shown.insert(0, (training, "training", "tab:grey"))
        for curves, label, colour in shown:
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not steps:  # nothing that all runs have
                continue
            values = np.array([[curve[step] for step in steps] for curve in curves])
            axis.plot(steps, values.mean(0), color=colour, label=label, marker="o" if label == "evaluation" else None)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="environment steps")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3)
        if title == "success":
            axis.set_ylim(0, 1)
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    with command_line():
        args = tyro.cli(Args, description=__doc__)
        if not args.runs:
            raise UserError("name at least one run directory")
        runs = [read_run(path) for path in args.runs]
        print(f"{table(runs)}\n\n{origin(runs)}")
        if args.png is not None:
            draw(runs, args.png, args.training)


if __name__ == "__main__":
    main()
