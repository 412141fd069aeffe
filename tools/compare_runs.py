"""Compare runs: a table of results, learning curves, and differences between groups of runs.

    python tools/compare_runs.py runs/<run> runs/<run> ...                           a Markdown table
    python tools/compare_runs.py runs/<run> ... --png curves.png --losses            also of runs in progress
    python tools/compare_runs.py runs/<run> ... --baseline runs/<run> ...            differences to the baseline
    python tools/compare_runs.py --baseline runs/<run> ... --pretrained runs/<run> ... \\
        --criterion mean_return 86 success_rate 0.99                                 steps to a result

Needs pip install -e ".[plots]". Runs with the same settings and different seeds are a group. Test results are those of
`tools/evaluate.py runs/<run> --json runs/<run>/test.json`.

A run has converged at the first of three consecutive validation evaluations that meet the criterion. A run that never
converged counts with all of its steps, and the mean is marked as a bound. Runs that start from a policy are also
charged with the steps of their demonstrations and of their experts.
"""

import sys
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError
from envs.cli import NOT_INHERITED, one_line_errors
from envs.evaluation import LOWER_IS_BETTER, converged_at, figures, paired_gain, read_json
from envs.run import Thresholds, read_jsonl

with one_line_errors():
    try:
        import matplotlib.pyplot as plt
        import pandas as pd
        import tabulate  # noqa: F401 (DataFrame.to_markdown needs it)
        from scipy import stats
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[plots]'") from None

# Settings in which the runs of a group may differ, and settings in which compared groups must not
NOT_GROUPED = (*NOT_INHERITED, "seed", "threads", "device", "preset")
SAME = ("env_id", "env_kwargs", "eval_env_kwargs", "total_timesteps", "eval_every", "eval_episodes", "eval_seed")
MIN_RUNS = 3  # runs per group for a bootstrap
CURVES = {
    "success rate": ["rollout/success_rate_100", "eval/success_rate"],
    "return": ["rollout/ep_reward", "eval/mean_reward"],
    "episode length (steps)": ["rollout/ep_length", "eval/mean_ep_length"],
}
LOSSES = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "explained_variance")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run directories, grouped by their settings
    baseline: tuple[str, ...] = ()  # runs that all other groups are compared with
    pretrained: tuple[str, ...] = ()  # a further group: runs that start from a policy
    criterion: Thresholds = field(default_factory=dict)  # METRIC THRESHOLD ...: report the steps until they are met
    target: float | None = None  # with --criterion: say whether the ratio of steps is at most this, such as 0.70
    png: str | None = None  # draw the learning curves in this file
    losses: bool = False  # with --png: also draw losses and other statistics of the updates


def read_run(path: str) -> dict:
    """Config, summary and test (None if missing), progress and evaluations of a run. Raises UserError if it is none."""
    folder = Path(path)
    run = {"path": path, "evaluations": read_jsonl(folder / "evaluations.jsonl")}
    for name in ("config", "summary", "test"):
        file = folder / f"{name}.json"
        run[name] = read_json(file) if file.is_file() or name == "config" else None
    evaluated_file = (run["summary"] or {}).get("sha256", {}).get("best.pt")
    if run["test"] and run["test"].get("sha256") != evaluated_file:
        print(f"{path}: test.json is not of the final best.pt; evaluate again", file=sys.stderr)
        run["test"] = None
    progress = folder / "progress.csv"
    run["progress"] = pd.read_csv(progress) if progress.is_file() else pd.DataFrame({"step": []})
    return run


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Groups of runs with the same settings. The labels are the settings that differ between groups."""
    settings = pd.DataFrame([{"script": run["config"]["script"], **run["config"]["args"]} for run in runs])
    settings = settings.drop(columns=[*NOT_GROUPED], errors="ignore").astype(str)
    settings = settings.loc[:, settings.nunique() > 1]
    groups: dict[str, list[dict]] = {}
    for run, values in zip(runs, settings.to_dict("records")):
        label = ", ".join(f"{name} {value}" for name, value in values.items()) or "runs"
        groups.setdefault(label, []).append(run)
    return groups


def results(runs: list[dict]) -> pd.DataFrame:
    """One line per run. Without test.json the results are those of the best validation evaluation, or of the last
    one if the run is in progress."""
    rows = []
    for run in runs:
        summary, test = run["summary"] or {}, run["test"]
        row = {"seed": run["config"]["args"]["seed"], "steps": run["progress"]["step"].max()}
        row["best step"] = summary.get("best", {}).get("step")
        if test:
            row |= {f"test {name}": x for name, x in figures(test).items()}
        elif summary.get("best") or run["evaluations"]:
            evaluation = summary.get("best") or run["evaluations"][-1]
            row |= {f"validation {name}": x for name, x in figures(evaluation).items()}
        if test and "gain" in test:
            row |= {"base success": test["base"]["success_rate"], "paired gain": test["gain"]["gain"]}
        row["wall time (s)"] = None if run["config"]["resumed"] else summary.get("wall_time_s")
        rows.append(row)
    return pd.DataFrame(rows, index=[run["path"] for run in runs], dtype=float)


def margin(values: pd.DataFrame | pd.Series) -> pd.Series | float:
    """Half the 95 % interval of the mean of each column (Student's t)."""
    return stats.t.ppf(0.975, len(values) - 1) * values.sem(skipna=False)


def table(groups: dict[str, list[dict]]) -> str:
    """Markdown table of all runs with the mean of each group and its 95 % interval. A group has no mean of a result
    that one of its runs lacks."""
    frames = []
    for label, runs in groups.items():
        frame = results(runs)
        if len(runs) > 1:
            numbers, name = frame.drop(columns="seed"), textwrap.shorten(label, 60)
            frame.loc[f"mean, {name}"] = numbers.mean(skipna=False)
            frame.loc[f"+- (95 %), {name}"] = margin(numbers)
        frames.append(frame)
    whole = pd.concat(frames).dropna(axis=1, how="all")
    text = whole.map(lambda x: "-" if np.isnan(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}")
    return text.to_markdown(disable_numparse=True)


def welch(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Difference of the means and its 95 % interval for unequal variances."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # a success rate of 1 in all runs
        interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return float(np.mean(ours) - np.mean(theirs)), float(interval.low), float(interval.high)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of the means and its 95 % interval, of a percentile bootstrap over the runs."""

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.mean(axis=axis) / y.mean(axis=axis)

    found = stats.bootstrap((ours, theirs), statistic, method="percentile", rng=np.random.default_rng(1))
    interval = found.confidence_interval
    return float(np.mean(ours) / np.mean(theirs)), float(interval.low), float(interval.high)


def paired_gains(ours: list[dict], theirs: list[dict]) -> list[float]:
    """Gains in success or return over the runs with the same training seeds, where the test episodes are the same."""
    tests = {run["config"]["args"]["seed"]: run["test"] for run in theirs if run["test"]}
    gains = []
    for run in ours:
        test, base = run["test"], tests.get(run["config"]["args"]["seed"])
        if test and base and (test["seed"], test["episodes"]) == (base["seed"], base["episodes"]):
            gains.append(paired_gain(test, base)["gain"])
    return gains


def charged_steps(run: dict) -> tuple[int, int]:
    """Environment steps of the demonstrations and of the training of the experts that a run started from; 0 and 0 for a
    run from scratch. Raises UserError if a file does not say how many steps it took."""
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
    return steps["demonstrations"], steps["experts"]


def steps_to(criterion: dict[str, float], runs: list[dict]) -> pd.DataFrame:
    """Steps until each run met the criterion; a run that never did is censored and has all of its steps."""
    reached = pd.Series([converged_at(run["evaluations"], criterion) for run in runs], dtype=float)
    total = pd.Series([run["progress"]["step"].max() for run in runs], dtype=float)
    return pd.DataFrame({"steps": reached.fillna(total), "censored": reached.isna()})


def verdict(value: float, bound: str, target: float | None) -> str:
    """Whether a ratio, or a bound of it, meets the target."""
    if target is None:
        return ""
    unknown = bound == (">= " if value <= target else "<= ")
    return f", target {target:g} {'unknown' if unknown else 'met' if value <= target else 'missed'}"


def compare_steps(
    ours: list[dict], theirs: list[dict], criterion: dict[str, float], target: float | None = None
) -> list[str]:
    """Ratios of the steps to the criterion, with and without the steps of demonstrations and experts."""
    if any(sum(charged_steps(run)) for run in theirs):
        raise UserError("the runs of --baseline must start from scratch; list the others under --pretrained")
    mine, base = steps_to(criterion, ours), steps_to(criterion, theirs)
    if mine["censored"].any() and base["censored"].any():
        return ["ratio of steps: unknown, because runs of both groups never converged"]
    bound = ">= " if mine["censored"].any() else "<= " if base["censored"].any() else ""
    demonstrations, experts = np.array([charged_steps(run) for run in ours]).T
    charges = {"ratio of steps": 0}
    if any(demonstrations + experts):
        charges[f"with {demonstrations.mean():,.0f} steps of demonstrations"] = demonstrations
        charges[f"and with {experts.mean():,.0f} steps of the experts"] = demonstrations + experts
    lines = []
    for label, charge in charges.items():
        value, low, high = ratio(mine["steps"] + charge, base["steps"])
        interval = f" (95 % interval {bound}{low:.2f} to {bound}{high:.2f})"
        known = min(len(ours), len(theirs)) >= MIN_RUNS
        lines.append(f"{label}: {bound}{value:.2f}{interval if known else ''}{verdict(value, bound, target)}")
    return lines


def compare(
    ours: list[dict], theirs: list[dict], criterion: dict[str, float], target: float | None = None
) -> list[str]:
    """Lines that compare a group of runs with the baseline.

    Raises:
        UserError: a run is not completed, or its task, budget or evaluations differ.
    """
    for run in [*ours, *theirs]:
        if run["summary"] is None or run["summary"]["status"] != "completed":
            raise UserError(f"{run['path']}: not completed, so it cannot be compared; finish it with --resume")
        for name in SAME:
            value, other = (x["config"]["args"].get(name) for x in (run, theirs[0]))
            if value != other:
                raise UserError(f"{run['path']}: {name} is {value}, but {other} in {theirs[0]['path']}")
    lines = compare_steps(ours, theirs, criterion, target) if criterion else []
    gains = pd.Series(paired_gains(ours, theirs))
    if not all(run["test"] for run in [*ours, *theirs]):  # compare all of them on the validation split
        ours, theirs = ([run | {"test": None} for run in runs] for runs in (ours, theirs))
    mine, base = (results(runs).filter(regex="^(test|validation) ").dropna(axis=1) for runs in (ours, theirs))
    for name in mine.columns.intersection(base.columns):
        line = f"{name}: {mine[name].mean():.4g}, baseline {base[name].mean():.4g}"
        if min(len(ours), len(theirs)) > 1:
            difference, low, high = welch(mine[name], base[name])
            line += f", difference {difference:+.3g} (95 % interval {low:+.3g} to {high:+.3g})"
        lines.append(line)
    if len(gains) > 1:
        mean, half = gains.mean(), margin(gains)
        interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}"
        lines.append(f"paired gain on the same test episodes, {len(gains)} pairs: {mean:+.3f} ({interval})")
    return lines


def draw(groups: dict[str, list[dict]], path: str, losses: bool) -> None:
    """Draw every run over the environment steps, and the mean of each group over the steps that all its runs have."""
    frames = {(label, run["path"]): run["progress"].set_index("step") for label, x in groups.items() for run in x}
    progress = pd.concat(frames, names=["group", "run", "step"]).dropna(axis=1, how="all")
    panels = CURVES | ({name: [f"train/{name}"] for name in LOSSES} if losses else {})
    panels = {title: progress.columns.intersection(names) for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if len(names)}
    if not panels:
        raise UserError("--png: the runs have no progress.csv yet")
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 3.2 * rows + 0.5), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for k, label in enumerate(progress.index.unique("group")):
            for name in names:
                curves = progress.loc[label][name].unstack("run").dropna(axis=1, how="all")
                curves = curves.interpolate("index", limit_area="inside")
                mean = curves.dropna().mean(axis=1)
                if name.startswith("rollout/") and len(names) > 1:
                    axis.plot(mean, ":", color=f"C{k}")
                else:
                    axis.plot(curves.index, curves, color=f"C{k}", lw=0.8, alpha=0.6)
                    axis.plot(mean, color=f"C{k}", lw=2, label=textwrap.shorten(label, 60))
        axis.set(title=title, xlabel="environment steps")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    title = "bold: mean of the group, thin: each run, dotted: training episodes"
    figure.legend(*axes[0, 0].get_legend_handles_labels(), title=title, loc="outside upper center", ncols=2)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {path}: cannot be written ({error})") from None


def origin(runs: list[dict]) -> str:
    """Commit, hardware and versions of the runs."""
    values = [{str(run["config"][name]) for run in runs} for name in ("git_commit", "hardware", "packages")]
    return "; ".join(" or ".join(sorted(value)) for value in values)


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        named = {"baseline": args.baseline, "pretrained": args.pretrained}
        groups = {label: [read_run(path) for path in paths] for label, paths in named.items() if paths}
        groups |= group_runs([read_run(path) for path in args.runs])
        if not groups or (args.losses and not args.png) or (args.target and not args.criterion):
            raise UserError("give at least one run directory, --png with --losses, and --criterion with --target")
        print(table(groups))
        print(f"\n{origin([run for group in groups.values() for run in group])}")
        if args.png:
            draw(groups, args.png, args.losses)
        if args.criterion:
            names = [f"{x} {'<=' if x in LOWER_IS_BETTER else '>='} {y:g}" for x, y in args.criterion.items()]
            print(f"\nsteps to {', '.join(names)} in three consecutive evaluations")
            for label, runs in groups.items():
                steps = steps_to(args.criterion, runs)
                each = ", ".join(f"{'> ' * censored}{x:,.0f}" for x, censored in steps.values)
                bound = ">= " if steps["censored"].any() else ""
                print(f"{label}: {each}; mean {bound}{steps['steps'].mean():,.0f}")
        baseline = groups.pop("baseline", None)
        for label, runs in groups.items() if baseline else ():
            print(
                f"\n{label}, compared with the baseline",
                *compare(runs, baseline, args.criterion, args.target),
                sep="\n",
            )


if __name__ == "__main__":
    main()
