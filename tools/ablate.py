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

Runs are ordinary ones, runs/ablations/<file>/<variant>__seed<seed>, each with its test.json (tools/evaluate.py, of
the best policy by validation); summary.md beside them is the table, of the seeds that all variants have. A difference
is the mean over the seeds of what a variant gains in the same episodes; its interval, of Student's t over the seeds,
holds how training scatters.
"""

import contextlib
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import filelock
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_results import student_t
from compare_runs import origin
from tune import OURS, ROOT, flags, from_content, stop, types_of

from envs import UserError, matches
from envs.cli import one_line_errors, parse
from envs.evaluation import paired_gain, read_json, sha256
from envs.run import read_checkpoint, setup, to_json, write_file

POLL = 0.2  # s between two looks at the running processes
NOT_A_VARIANT = (*OURS, "seed")  # settings that are not for the file to say
THE_TASK = ("env_id", "eval_env_kwargs")  # settings that all variants share, or else they play other episodes


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
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; --help shows how one is written") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML that can be read ({error}); --help shows how it is written") from None
    for name in ("script", "variants"):
        if name not in content:
            raise UserError(f"{path}: {name} is missing; --help shows how it is written")
    ablation = from_content(Ablation, content, path)
    require_possible(ablation, path)
    return ablation


def require_possible(ablation: Ablation, path: str) -> None:
    """Raises UserError unless variants and seeds differ, and all settings are the script's, with values it takes."""
    if len(ablation.variants) < 2:
        raise UserError(f"{path}: variants must be two or more, the first of which the others are weighed against")
    if len({folder_name(variant, 0) for variant in ablation.variants}) < len(ablation.variants):
        raise UserError(f"{path}: two variants would share their directories; name them differently")
    if ablation.eval_episodes < 0:
        raise UserError(f"{path}: eval_episodes must be 0, for all there are, or more, not {ablation.eval_episodes}")
    if not ablation.seeds or len({*ablation.seeds}) < len(ablation.seeds):
        raise UserError(f"{path}: seeds must be one or more, and all different")
    for seed in ablation.seeds:
        if seed < 0 or not 0 <= ablation.eval_seed + seed < 2**31:
            raise UserError(f"{path}: a seed, and with eval_seed added, must be 0 or more, and below 2**31: not {seed}")
    types = types_of(ablation.script)
    for given in (ablation.args, *ablation.variants.values()):
        for name, value in given.items():
            if name not in types or name in NOT_A_VARIANT or (name in THE_TASK and given is not ablation.args):
                raise UserError(f"{path}: {name} is no setting of {ablation.script} for a variant; see its --help")
            if not matches(value, types[name]):
                raise UserError(f"{path}: {name} cannot be {value!r}; see {ablation.script}.py --help")


def settings_of(ablation: Ablation, variant: dict) -> dict:
    """All settings of a variant. As on the command line, arguments of the environment add to those there already."""
    both = {name: {**ablation.args.get(name, {}), **x} for name, x in variant.items() if isinstance(x, dict)}
    return {**ablation.args, **variant, **both}


def folder_name(variant: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', variant)}__seed{seed}"


@contextlib.contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Raises UserError with this message if another process holds the lock."""
    try:
        with filelock.FileLock(path, timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(busy) from None


class Job:
    """A run: trained first, evaluated then, each in a process of its own."""

    def __init__(self, ablation: Ablation, variant: str, seed: int, folder: Path):
        """Raises UserError if its settings cannot work."""
        self.ablation, self.seed, self.folder = ablation, seed, folder / folder_name(variant, seed)
        self.script = [sys.executable, str(ROOT / f"{ablation.script}.py")]
        place = {"seed": seed, "run_root": str(folder), "run_name": self.folder.name}
        self.line = flags({**settings_of(ablation, ablation.variants[variant]), **place}, types_of(ablation.script))
        module = import_module(ablation.script)
        try:
            self.args, _ = setup(parse(module.Args, self.line))
        except UserError as error:
            raise UserError(f"{variant}: {error}") from error

    def next_command(self) -> list[str] | None:
        """What is still to do; None if nothing is.

        Raises:
            UserError: the run that is there is another, or still goes on.
        """
        if not (self.folder / "config.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # begun, and not come far
            return [*self.script, *self.line]
        self.require_ours()
        if not self.trained():
            with lock(self.folder / ".lock", f"{self.folder}: still being trained; wait for its end, or stop it"):
                try:
                    read_checkpoint(str(self.folder), quiet=True)
                except UserError:
                    shutil.rmtree(self.folder)
                    return [*self.script, *self.line]
            return [*self.script, "--resume", str(self.folder)]
        if self.result() is None:
            seed, episodes = self.ablation.eval_seed + self.seed, self.ablation.eval_episodes
            line = [sys.executable, str(ROOT / "tools" / "evaluate.py"), str(self.folder)]
            line += ["--json", str(self.folder / "test.json"), "--seed", str(seed), "--episodes", str(episodes)]
            line += ["--env-id", self.args.env_id] if ":" in self.args.env_id else []
            if self.args.eval_env_kwargs:
                line += flags({"env_kwargs": self.args.eval_env_kwargs}, {"env_kwargs": dict})
            return [*line, *["--compare-base"] * (self.ablation.script == "ppo_residual")]
        return None

    def require_ours(self) -> None:
        """Raises UserError if the run that is there is of another script or of other settings than are asked now."""
        config, wanted = read_json(self.folder / "config.json"), json.loads(json.dumps(to_json(asdict(self.args))))
        found = config.get("args", {})
        names = [name for name in wanted if name not in OURS and found.get(name) != wanted[name]]
        if config.get("script") != self.ablation.script or names:
            differ = ", ".join(f"{name} {found.get(name)!r}" for name in names) or config.get("script")
            raise UserError(f"{self.folder}: is of other settings ({differ}); remove it, or rename the variant")

    def trained(self) -> bool:
        summary = self.folder / "summary.json"
        return summary.exists() and read_json(summary).get("status") == "completed"

    def result(self) -> dict | None:
        """Its test.json, if it is of this policy and of the episodes that are asked."""
        file, policy = self.folder / "test.json", self.folder / "best.pt"
        if not (file.exists() and policy.exists()):
            return None
        test = read_json(file)
        asked = self.ablation.eval_episodes or test["episodes"]
        ours = (self.ablation.eval_seed + self.seed, asked, asked, sha256(policy))
        return test if (test["seed"], test["episodes"], len(test["per_episode"]), test["sha256"]) == ours else None

    def start(self, line: list[str]) -> None:
        self.log = open(self.folder.with_name(f"{self.folder.name}.log"), "wb")  # noqa: SIM115 (open while it runs)
        self.process = subprocess.Popen(line, stdout=self.log, stderr=subprocess.STDOUT)

    def failure(self) -> str | None:
        """What was wrong, if the process, which has ended, failed."""
        self.log.close()
        if self.process.returncode == 0:
            return None
        lines = Path(self.log.name).read_text(errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return f"{self.folder}: {[f'exit status {self.process.returncode}', *said][-1]} (see {self.log.name})"


def run_all(jobs: list[Job], at_a_time: int, tell: Callable[[], None]) -> list[str]:
    """Train and evaluate what is not there yet, and tell after each evaluation. Returns what failed."""
    waiting, running, failed = jobs[::-1], [], []
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
                failure = job.failure()
                if failure is not None:
                    failed.append(failure)
                    print(failure, file=sys.stderr)
                elif job.result() is None:
                    waiting.append(job)  # its evaluation comes next
                    print(f"{job.folder}: trained", file=sys.stderr)
                else:
                    print(f"{job.folder}: evaluated", file=sys.stderr)
                    tell()
    finally:
        stop([job.process for job in running])
    return failed


def difference(ours: list[dict], reference: list[dict]) -> tuple[float, float]:
    """Mean over the seeds of the gain in the same episodes, and half of its 95 % interval (Student's t over seeds)."""
    gains = [paired_gain(*pair)["gain"] for pair in zip(ours, reference, strict=True)]
    if len(gains) < 2:
        return gains[0], math.inf
    half = student_t(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.fmean(gains), half


def report(seeds: list[int], tests: dict[str, list[dict]]) -> str:
    """The table in Markdown, {variant: its test of each seed}."""
    first = next(iter(tests.values()))
    succeeds = first[0]["success_rate"] is not None
    figure, form = ("success_rate", ".3f") if succeeds else ("mean_return", ".4g")
    with_base = all("base" in test for those in tests.values() for test in those)
    header = ["settings", *map(str, seeds), "mean", *["base alone"] * with_base, "difference, 95 % interval"]
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


def summary(ablation: Ablation, jobs: dict[str, list[Job]]) -> str:
    """The table of the seeds that all variants have so far, and with what it was made; empty if there is none yet."""
    results = {variant: [job.result() for job in those] for variant, those in jobs.items()}
    complete = [i for i in range(len(ablation.seeds)) if all(those[i] is not None for those in results.values())]
    if not complete:
        return ""
    configs = [{"config": read_json(those[i].folder / "config.json")} for i in complete for those in jobs.values()]
    table = report(
        [ablation.seeds[i] for i in complete],
        {variant: [those[i] for i in complete] for variant, those in results.items()},
    )
    return f"{table}\n{results[next(iter(results))][complete[0]]['episodes']} episodes each; {origin(configs)}\n"


def ablate(args: Args) -> str:
    """Train and evaluate what is missing. Returns the table.

    Raises:
        UserError: the file says what cannot be done, or a run failed; the others were made all the same.
    """
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    ablation = load_ablation(args.ablation)
    folder = Path(args.run_root) / "ablations" / Path(args.ablation).stem
    jobs = {variant: [Job(ablation, variant, seed, folder) for seed in ablation.seeds] for variant in ablation.variants}
    folder.mkdir(parents=True, exist_ok=True)

    def tell() -> None:
        write_file(folder / "summary.md", summary(ablation, jobs).encode())

    with lock(folder / ".lock", f"{folder}: another process trains there; wait for its end, or stop it"):
        # Seed by seed, so that there is a table of the first seeds soon
        failed = run_all([job for those in zip(*jobs.values()) for job in those], args.jobs, tell)
        tell()
    if failed:
        raise UserError("\n".join(failed))
    return summary(ablation, jobs)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are stopped
    with one_line_errors():
        print(ablate(tyro.cli(Args, description=__doc__)), end="")


if __name__ == "__main__":
    main()
