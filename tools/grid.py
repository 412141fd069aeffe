"""Train several settings over several seeds and compare each with the first one on the same test episodes.

    python tools/grid.py tools/grids/so101.toml --jobs 2          the same command resumes stopped runs

The TOML file:

    script = "ppo_residual"              # any PPO script
    seeds = [1000, 2000, 3000]
    eval_episodes = 200                  # episodes of the test split
    eval_seed = 900_000                  # the seed of the episodes is eval_seed + training seed

    [args]                               # settings of all runs
    total_timesteps = 50_000

    [variants]                           # they replace those of [args]; the first variant is the reference
    "defaults" = {}
    "no observation normalization" = { norm_obs = false }

Runs are in runs/grids/<file>/<variant>__seed<seed>, their test results in test.json beside summary.json. The table
shows the mean over the seeds and the paired difference to the reference with a 95 % interval (Student's t over seeds).
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError
from envs.cli import one_line_errors
from envs.evaluation import paired_gain, read_json
from envs.run import checkpoint_files, flag

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    grid: tyro.conf.Positional[str]  # TOML file
    jobs: int = 1  # number of runs at a time; at most the number of idle cores
    run_root: str = "runs"  # directory of grids/


def flags(settings: dict) -> list[str]:
    """Settings as command-line flags."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, dict):
            words += [flag(name), *(str(word) for pair in value.items() for word in pair)]
        else:
            words += [flag(name), *(str(x) for x in (value if isinstance(value, list) else [value]))]
    return words


def run_name(variant: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', variant)}__seed{seed}"


def run_one(grid: dict, folder: Path, variant: str, seed: int) -> str:
    """Train, or resume, and evaluate one run. Returns an error message or an empty string."""
    name = run_name(variant, seed)
    run = folder / name
    summary = run / "summary.json"
    commands = []
    if not summary.is_file() or read_json(summary)["status"] != "completed":
        command = [sys.executable, str(ROOT / f"{grid['script']}.py")]
        settings = {**grid.get("args", {}), **grid["variants"][variant], "seed": seed}
        if checkpoint_files(run):
            commands.append([*command, "--resume", str(run)])
        else:
            commands.append([*command, "--run-root", str(folder), "--run-name", name, *flags(settings)])
    if not (run / "test.json").is_file():
        episodes = ["--episodes", str(grid["eval_episodes"]), "--seed", str(grid.get("eval_seed", 900_000) + seed)]
        evaluate = [sys.executable, str(ROOT / "tools" / "evaluate.py"), str(run)]
        commands.append([*evaluate, *episodes, "--json", str(run / "test.json")])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    print(name, file=sys.stderr)
    return ""


def table(results: dict[str, list[dict]]) -> str:
    """Markdown table of {variant: test results, one per seed}."""
    from scipy import stats  # slow to import

    reference = next(iter(results.values()))
    of = paired_gain(reference[0], reference[0])["of"]
    lines = [f"| variant | mean {of} | worst seed | difference, 95 % interval |", "|---|---|---|---|"]
    for variant, runs in results.items():
        values = [run["success_rate"] if of == "success" else run["mean_return"] for run in runs]
        gains = [paired_gain(run, base)["gain"] for run, base in zip(runs, reference)]
        interval = ""
        if runs is not reference:
            margin = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains) if len(gains) > 1 else np.nan
            interval = f"{np.mean(gains):+.3f} ({np.mean(gains) - margin:+.3f} to {np.mean(gains) + margin:+.3f})"
        lines.append(f"| {variant} | {np.mean(values):.3f} | {min(values):.3f} | {interval} |")
    return "\n".join(lines)


def run(args: Args) -> str:
    """Make the runs that are missing. Returns the table."""
    try:
        grid = read_json(args.grid)
        pairs = [(variant, seed) for seed in grid["seeds"] for variant in grid["variants"]]
        grid["script"], grid["eval_episodes"]
    except KeyError as error:
        raise UserError(f"{args.grid}: not a grid ({error!r}); --help shows an example") from None
    folder = Path(args.run_root) / "grids" / Path(args.grid).stem
    with ThreadPoolExecutor(args.jobs) as pool:
        errors = [error for error in pool.map(lambda pair: run_one(grid, folder, *pair), pairs) if error]
    if errors:
        raise UserError(f"{'; '.join(errors)}; run the same command to try again")
    results: dict[str, list[dict]] = {variant: [] for variant in grid["variants"]}
    for variant, seed in pairs:
        results[variant].append(read_json(folder / run_name(variant, seed) / "test.json"))
    text = table(results)
    (folder / "table.md").write_text(text + "\n")
    return text


def main() -> None:
    with one_line_errors():
        print(run(tyro.cli(Args, description=__doc__)))


if __name__ == "__main__":
    main()
