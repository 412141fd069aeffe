"""Compare runs: a table of their results, learning curves, and fine-tuning against training from scratch.

    python tools/compare_runs.py runs/<run> runs/<run> ...                           a Markdown table
    python tools/compare_runs.py runs/<run> ... --png curves.png --losses            also of runs in progress
    python tools/compare_runs.py --baseline runs/<run> ... --pretrained runs/<run> ... \\
        --criterion mean_return 86 success_rate 0.99                                 steps to a result

Needs pip install -e ".[plots]". Test results are those of `tools/evaluate.py runs/<run> --json runs/<run>/test.json`.

With --baseline and --pretrained, a run has converged at the first of three consecutive validation evaluations that meet
the criterion. A run that never converged counts with all of its steps, and the mean is marked as a bound. Fine-tuned
runs are also charged with the steps of their demonstrations and of their experts.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError
from envs.cli import one_line_errors
from envs.evaluation import LOWER_IS_BETTER, converged_at, figures, read_json
from envs.run import Thresholds, read_jsonl

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    from scipy import stats
except ImportError as error:
    sys.exit(f"error: {error}; pip install -e '.[plots]'")

# Arguments in which compared runs must not differ
SAME = ("env_id", "env_kwargs", "eval_env_kwargs", "total_timesteps", "eval_every", "eval_episodes", "eval_seed")
CURVES = {
    "success": ("rollout/success_rate_100", "eval/success_rate"),
    "return": ("rollout/ep_reward", "eval/mean_reward"),
    "episode length": ("rollout/ep_length", "eval/mean_ep_length"),
}
LOSSES = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "explained_variance")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run directories
    baseline: tuple[str, ...] = ()  # runs from scratch
    pretrained: tuple[str, ...] = ()  # runs that started from a policy
    criterion: Thresholds = field(default_factory=dict)  # METRIC THRESHOLD ... that an evaluation must meet
    png: str | None = None  # draw the learning curves in this file
    losses: bool = False  # with --png: also draw losses and other statistics of the updates


def read_run(path: str) -> dict:
    """Config, summary and test (None if missing), progress and evaluations of a run. Raises UserError if it is none."""
    folder = Path(path)
    run = {"path": path, "evaluations": read_jsonl(folder / "evaluations.jsonl")}
    for name in ("config", "summary", "test"):
        file = folder / f"{name}.json"
        run[name] = read_json(file) if file.is_file() or name == "config" else None
    if run["test"] and run["summary"] and run["test"].get("sha256") != run["summary"]["sha256"].get("best.pt"):
        print(f"{path}: test.json is of another best.pt; evaluate again", file=sys.stderr)
        run["test"] = None
    progress = folder / "progress.csv"
    run["progress"] = pd.read_csv(progress) if progress.is_file() else pd.DataFrame({"step": []})
    return run


def table(runs: list[dict]) -> pd.DataFrame:
    """One line per run, and the mean with its 95 % interval (Student's t)."""
    rows = []
    for run in runs:
        summary, test = run["summary"] or {}, run["test"] or {}
        row = {"seed": run["config"]["args"]["seed"], "steps": run["progress"]["step"].max()}
        row["best step"] = summary.get("best", {}).get("step")
        if "converged_at_step" in summary:
            row["converged at"] = summary["converged_at_step"]
        if test:
            row |= {f"test {name}": x for name, x in figures(test).items()}
        if "gain" in test:
            row |= {"base success": test["base"]["success_rate"], "paired gain": test["gain"]["gain"]}
        row["wall time (s)"] = None if run["config"]["resumed"] else summary.get("wall_time_s")
        rows.append(row)
    frame = pd.DataFrame(rows, index=[run["path"] for run in runs]).dropna(axis=1, how="all")
    numbers, frame = frame.drop(columns="seed").astype(float), frame.astype(object)
    frame.loc["mean"] = numbers.mean(skipna=False)
    if len(runs) > 1:
        frame.loc["+- (95 %)"] = stats.t.ppf(0.975, len(runs) - 1) * numbers.sem(skipna=False)
    return frame


def welch(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Difference of the means and its 95 % interval for unequal variances."""
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return float(np.mean(ours) - np.mean(theirs)), float(interval.low), float(interval.high)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of the means and its 95 % interval, of a percentile bootstrap over the runs."""

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.mean(axis=axis) / y.mean(axis=axis)

    found = stats.bootstrap((ours, theirs), statistic, method="percentile", rng=np.random.default_rng(1))
    interval = found.confidence_interval
    return float(np.mean(ours) / np.mean(theirs)), float(interval.low), float(interval.high)


def charged_steps(run: dict) -> tuple[int, int]:
    """Environment steps of the demonstrations and of the training of the experts that a run started from.

    Raises:
        UserError: the run started from scratch, or a file does not say how many steps it took.
    """
    steps, seen = {"demonstrations": 0, "experts": 0}, set()

    def add(parents: dict) -> None:
        for path, parent in parents.items():
            config = parent["config"]
            if not path.endswith((".pt", ".npz")) or parent["sha256"] in seen:
                continue  # other files, such as the model of the dynamics, took no environment steps
            seen.add(parent["sha256"])
            if config is None:
                raise UserError(f"{run['path']}: the steps of {path} are unknown; keep it in its run directory")
            if path.endswith(".npz"):
                steps["demonstrations"] += config["totals"]["env_steps"]
            elif config["script"] != "bc_pretrain":  # the steps of cloning are epochs
                if parent.get("steps") is None:
                    raise UserError(f"{run['path']}: the run of {path} has no summary.json; complete it")
                steps["experts"] += parent["steps"]
            add(config.get("parents", {}))

    add(run["config"]["parents"])
    if not seen:
        raise UserError(f"{run['path']}: started from scratch; list it under --baseline")
    return steps["demonstrations"], steps["experts"]


def compare(baseline: list[dict], pretrained: list[dict], criterion: dict[str, float]) -> str:
    """Steps until the runs of both groups converged, their ratios, and the difference of the final results."""
    runs = [*baseline, *pretrained]
    for run in runs:
        if run["summary"] is None or run["summary"]["status"] != "completed":
            raise UserError(f"{run['path']}: not completed; finish it with --resume")
        for name in SAME:
            ours, theirs = (x["config"]["args"].get(name) for x in (run, runs[0]))
            if ours != theirs:
                raise UserError(f"{run['path']}: {name} is {ours}, but {theirs} in {runs[0]['path']}")
    lines, steps, censored = [], {}, {}
    for label, group in (("baseline", baseline), ("pretrained", pretrained)):
        reached = [converged_at(run["evaluations"], criterion) for run in group]
        budgets = [run["summary"]["steps"] for run in group]
        steps[label] = np.array([budget if step is None else step for step, budget in zip(reached, budgets)], float)
        censored[label] = None in reached
        each = ", ".join(f"> {budget:,}" if step is None else f"{step:,}" for step, budget in zip(reached, budgets))
        bound = ">= " if censored[label] else ""
        lines.append(f"{label}: converged after {each} steps; mean {bound}{steps[label].mean():,.0f}")

    demonstrations, experts = (np.array(x) for x in zip(*map(charged_steps, pretrained)))
    sign = {(0, 0): "=", (1, 0): "<=", (0, 1): ">=", (1, 1): "unknown, about"}[
        (int(censored["baseline"]), int(censored["pretrained"]))
    ]
    for label, charge in (
        ("fine-tuning alone", 0 * demonstrations),
        (f"with {demonstrations.mean():,.0f} steps of demonstrations", demonstrations),
        (f"and with {experts.mean():,.0f} steps of the experts", demonstrations + experts),
    ):
        ours, theirs = steps["pretrained"] + charge, steps["baseline"]
        if min(len(ours), len(theirs)) > 1:
            value, low, high = ratio(ours, theirs)
            lines.append(f"ratio of steps, {label}: {sign} {value:.2f} (95 % interval {low:.2f} to {high:.2f})")
        else:
            lines.append(f"ratio of steps, {label}: {sign} {ours.mean() / theirs.mean():.2f}")

    tested = all(run["test"] for run in runs)
    results = [
        [figures(run["test"] if tested else run["summary"]["best"]) for run in x] for x in (pretrained, baseline)
    ]
    for name in results[0][0]:
        ours, theirs = ([result[name] for result in group] for group in results)
        line = (
            f"{'test' if tested else 'validation'} {name}: {np.mean(ours):.4g} and {np.mean(theirs):.4g} from scratch"
        )
        if min(len(ours), len(theirs)) > 1 and np.ptp([*ours, *theirs]) > 0:
            line += ", difference {:.3g} (95 % interval {:.3g} to {:.3g})".format(*welch(ours, theirs))
        lines.append(line)
    wanted = ", ".join(f"{name} {'<=' if name in LOWER_IS_BETTER else '>='} {x:g}" for name, x in criterion.items())
    return "\n".join([f"criterion: {wanted} in three consecutive evaluations", *lines])


def draw(groups: dict[str, list[dict]], path: str, losses: bool) -> None:
    """Draw mean, minimum and maximum of each group over the environment steps."""
    panels = {**CURVES, **({name: (f"train/{name}",) for name in LOSSES} if losses else {})}
    frames = {label: [run["progress"].set_index("step") for run in runs] for label, runs in groups.items()}
    known = {name for group in frames.values() for frame in group for name in frame.dropna(axis=1, how="all").columns}
    panels = {title: [name for name in names if name in known] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        raise UserError("--png: the runs have no progress.csv yet")
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 3.2 * rows), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for k, (label, group) in enumerate(frames.items()):
            for name in names:
                columns = [frame[name].dropna() for frame in group if name in frame]
                curves = pd.concat(columns, axis=1).sort_index().interpolate(limit_area="inside").dropna()
                evaluation = name.startswith("eval/")
                style = {"color": f"C{k}", "ls": "-" if evaluation or len(names) == 1 else ":"}
                axis.plot(curves.index, curves.mean(axis=1), label=f"{label}{', evaluation' * evaluation}", **style)
                axis.fill_between(curves.index, curves.min(axis=1), curves.max(axis=1), color=f"C{k}", alpha=0.15, lw=0)
        axis.set(title=title, xlabel="environment steps")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def origin(runs: list[dict]) -> str:
    """Commit, hardware and versions of the runs."""
    values = [{str(run["config"][name]) for run in runs} for name in ("git_commit", "hardware", "packages")]
    return "; ".join(" or ".join(sorted(value)) for value in values)


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        if bool(args.runs) == bool(args.baseline and args.pretrained and args.criterion):
            raise UserError("give run directories, or --baseline, --pretrained and --criterion")
        names = {"baseline": args.baseline, "pretrained": args.pretrained} if args.baseline else {"runs": args.runs}
        groups = {label: [read_run(path) for path in paths] for label, paths in names.items()}
        if args.runs:
            text = table(groups["runs"]).map(lambda x: "-" if pd.isna(x) else f"{x:,.0f}" if x >= 1000 else f"{x:.4g}")
            print(text.to_markdown(disable_numparse=True))
        else:
            print(compare(groups["baseline"], groups["pretrained"], args.criterion))
        print(origin([run for group in groups.values() for run in group]))
        if args.png:
            draw(groups, args.png, args.losses)


if __name__ == "__main__":
    main()
