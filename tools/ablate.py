"""Train a script with several settings over several seeds, and weigh each against the first on the same test episodes.

    python tools/ablate.py tools/ablations/so101.toml --jobs 2       stopped, it goes on when it is started again

The file says what to train:

    script = "ppo_residual"              # or ppo_continuous, ppo_grid_socnav
    seeds = [1000, 2000, 3000]           # of training
    eval_episodes = 200                  # of the test split, the same for all runs of a seed: evaluation seed
    eval_seed = 900_000                  # this + training seed

    [args]                               # the settings of every run
    total_timesteps = 50_000

    [variants]                           # what each changes; the first is what the others are weighed against
    "as it comes" = {}
    "no normalisation" = { norm_obs = false }

Runs are ordinary ones, runs/ablations/<file>/<variant>__seed<seed>, each with its test.json (--evaluate, which plays
the best policy by validation); summary.md beside them is the table. A difference is the mean over the seeds of what the
variant gains in the same episodes; its interval, of Student's t over the seeds, holds how training scatters.
"""

import math
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_results import student_t
from tune import OURS, ROOT, flags, types_of

from envs import command
from envs.contents import shown
from envs.files import UserError, lock, read_json, require, write_json, write_whole
from envs.rollout import paired_gain

POLL = 0.2  # s between two looks at the running processes
PLAYED = {"success_rate": float | None, "mean_return": float}
TESTED = {**PLAYED, "per_episode": [{"return": float}], "episodes": int, "seed": int, "base?": PLAYED}


@dataclass
class Args:
    ablation: tyro.conf.Positional[str]
    """TOML file that says what to train"""
    jobs: int = 1
    """runs at a time; no more than there are idle cores"""
    run_root: str = "runs"
    """directory that holds the runs and ablations/"""


@dataclass
class Ablation:
    """What the TOML file holds."""

    script: Literal["ppo_continuous", "ppo_residual", "ppo_grid_socnav"]
    variants: dict[str, dict]
    seeds: tuple[int, ...] = (1000, 2000, 3000)
    eval_episodes: int = 200
    eval_seed: int = 900_000
    args: dict = field(default_factory=dict)


def load_ablation(path: str) -> Ablation:
    """Raises UserError for a file that is missing or says what cannot be done."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --help shows how one is written") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not TOML ({error}); --help shows how it is written") from None
    for name in ("script", "variants"):
        if name not in content:
            raise UserError(f"{path}: {name} is missing; --help shows how it is written")
    known = [f.name for f in fields(Ablation)]
    for name in content:
        if name not in known:
            raise UserError(f"{path}: unknown {shown(name)}; there are {', '.join(known)}")
    ablation = command.args_from(Ablation, content, path)
    if len(ablation.variants) < 2:
        raise UserError(f"{path}: variants must be two or more, the first of which the others are weighed against")
    if len({folder_name(variant, 0) for variant in ablation.variants}) < len(ablation.variants):
        raise UserError(f"{path}: two variants would share their directories; name them differently")
    if ablation.eval_episodes < 1:
        raise UserError(f"{path}: eval_episodes must be at least 1, not {ablation.eval_episodes}")
    if not ablation.seeds or len({*ablation.seeds}) < len(ablation.seeds):
        raise UserError(f"{path}: seeds must be one or more, and all different")
    types = types_of(ablation.script)
    for variant in ({}, *ablation.variants.values()):
        for name, value in settings_of(ablation, variant).items():
            if name not in types or name in (*OURS, "seed"):
                raise UserError(f"{path}: {name} is no setting of {ablation.script} for a variant; see its --help")
            if not command.fits(tuple(value) if isinstance(value, list) else value, types[name]):
                raise UserError(f"{path}: {name} cannot be {shown(value)}; see {ablation.script}.py --help")
    return ablation


def settings_of(ablation: Ablation, variant: dict) -> dict:
    """All settings of a variant. As on the command line, arguments of the environment add to those there already."""
    both = {name: {**ablation.args.get(name, {}), **x} for name, x in variant.items() if isinstance(x, dict)}
    return {**ablation.args, **variant, **both}


def folder_name(variant: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', variant)}__seed{seed}"


class Job:
    """A run: trained first, evaluated then, each in a process of its own."""

    def __init__(self, ablation: Ablation, variant: str, seed: int, folder: Path):
        self.ablation, self.seed, self.folder = ablation, seed, folder / folder_name(variant, seed)
        self.test = self.folder / "test.json"
        self.settings = settings_of(ablation, ablation.variants[variant])
        self.process: subprocess.Popen | None = None

    def next_command(self) -> list[str] | None:
        """What is still to do; None if nothing is.

        Raises:
            UserError: the run that is there has other settings.
        """
        settings = self.folder.with_name(f"{self.folder.name}.json")
        script = [sys.executable, str(ROOT / f"{self.ablation.script}.py")]
        if settings.exists() and read_json(settings) != self.settings:
            raise UserError(f"{self.folder}: is of other settings; remove it with its .json, or rename the variant")
        write_json(settings, self.settings)
        if not self.trained():
            shutil.rmtree(self.folder, ignore_errors=True)  # what was cut off begins anew
            place = {"seed": self.seed, "run_root": str(self.folder.parent), "run_name": self.folder.name}
            return [*script, *flags({**self.settings, **place}, types_of(self.ablation.script))]
        if not self.test.exists():
            seed, episodes = self.ablation.eval_seed + self.seed, self.ablation.eval_episodes
            line = [*script, "--evaluate", str(self.folder), "--json", str(self.test), "--eval-seed", str(seed)]
            residual = ["--compare-base"] * (self.ablation.script == "ppo_residual")
            return [*line, "--eval-episodes", str(episodes), *residual]
        return None

    def trained(self) -> bool:
        summary = self.folder / "summary.json"
        return summary.exists() and read_json(summary).get("status") == "completed"

    def start(self, line: list[str]) -> None:
        self.log = open(self.folder.with_name(f"{self.folder.name}.log"), "ab")  # noqa: SIM115 (open while it runs)
        self.process = subprocess.Popen(line, stdout=self.log, stderr=subprocess.STDOUT)

    def settle(self) -> None:
        """Raises UserError if the process, which has ended, failed."""
        self.log.close()
        if self.process.returncode != 0:
            lines = Path(self.log.name).read_text(errors="replace").splitlines()
            said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError([f"exit status {self.process.returncode}; see {self.log.name}", *said][-1])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def run_all(jobs: list[Job], at_a_time: int) -> None:
    """Train and evaluate what is not there yet."""
    waiting, running = jobs[::-1], []
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop()
                line = job.next_command()
                if line is not None:
                    job.start(line)
                    running.append(job)
            time.sleep(POLL)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                job.settle()
                waiting.append(job)  # its evaluation comes next
                print(f"{job.folder}: {'evaluated' if job.test.exists() else 'trained'}", file=sys.stderr)
    finally:
        for job in running:
            job.stop()


def difference(ours: list[dict], reference: list[dict]) -> tuple[float, float]:
    """Mean over the seeds of the gain in the same episodes, and half of its 95 % interval (Student's t over seeds)."""
    gains = [paired_gain(*pair)["gain"] for pair in zip(ours, reference, strict=True)]
    if len(gains) < 2:
        return gains[0], math.inf
    half = student_t(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.fmean(gains), half


def report(ablation: Ablation, tests: dict[str, list[dict]]) -> str:
    """The table, {variant: its test of each seed} in Markdown."""
    first = next(iter(tests.values()))
    succeeds = first[0]["success_rate"] is not None
    figure, form = ("success_rate", ".3f") if succeeds else ("mean_return", ".4g")
    with_base = all("base" in test for those in tests.values() for test in those)
    header = ["settings", *map(str, ablation.seeds), "mean", *["base alone"] * with_base, "difference, 95 % interval"]
    header[1] = f"{'success' if succeeds else 'return'}, seed {header[1]}"
    lines = [header, ["---"] * len(header)]
    for variant, those in tests.items():
        figures = [test[figure] for test in those]
        cells = [variant, *(f"{x:{form}}" for x in figures), f"{statistics.fmean(figures):{form}}"]
        if with_base:
            cells.append(f"{statistics.fmean(test['base'][figure] for test in those):{form}}")
        if those is first:
            cells.append("")
        else:
            middle, half = difference(those, first)
            low, high = (f"{x:+{form}}" for x in (middle - half, middle + half))
            cells.append(f"{middle:+{form}}" + (f" ({low} to {high})" if math.isfinite(half) else ""))
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ablate(args: Args) -> str:
    """Train and evaluate what is missing. Returns the table."""
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    ablation = load_ablation(args.ablation)
    folder = Path(args.run_root) / "ablations" / Path(args.ablation).stem
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {variant: [Job(ablation, variant, seed, folder) for seed in ablation.seeds] for variant in ablation.variants}
    with lock(folder / ".lock", f"{folder}: another process trains there; wait for it, or stop it"):
        # Seed by seed, so that what was stopped half-way has all variants of the first seeds
        run_all([job for those in zip(*jobs.values()) for job in those], args.jobs)
    tests: dict[str, list[dict]] = {}
    for variant, those in jobs.items():
        tests[variant] = []
        for job in those:
            test = read_json(job.test)
            require(test, TESTED, job.test, "remove it, and it is made again")
            if test["episodes"] != ablation.eval_episodes or test["seed"] != ablation.eval_seed + job.seed:
                raise UserError(f"{job.test}: is of other episodes; remove it, and it is made again")
            tests[variant].append(test)
    table = report(ablation, tests)
    write_whole(folder / "summary.md", table.encode())
    return table


@command.command_line()
def main() -> None:
    print(ablate(tyro.cli(Args, description=__doc__)), end="")


if __name__ == "__main__":
    main()
