"""Training scripts as they run: their memory over time, and their speed with environments and ranks."""

import csv
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_results import Row, grouped, measured, number, place, spread, table

from envs import UserError

ROOT = Path(__file__).resolve().parents[1]
# An evaluation has environments of its own: several of them come within the first minute, which does not count
EARLY = "--eval-every 16384 --eval-episodes 24"
RUNS = {
    "ppo_residual": "ppo_residual.py",
    "ppo_continuous": "ppo_continuous.py",
    "ppo_continuous-Ballbot": f"ppo_continuous.py --env-id Ballbot-v0 {EARLY}",
    "ppo_grid_socnav": f"ppo_grid_socnav.py --threads 1 {EARLY}",
    "bc_pretrain": "bc_pretrain.py train --dataset bench --epochs 16384 --patience 16384",
}
DEMONSTRATIONS = "bc_pretrain.py collect --dataset bench --policy ik --env-id SO101Paper-v0 --episodes 50"
WARM_UP = 3  # rollouts that scaling leaves out
SETTLING = 60.0  # seconds that memory leaves out


@dataclass
class Memory:
    scripts: tuple[str, ...] = tuple(RUNS)
    """what trains, one after the other"""
    minutes: float = 3.0
    """how long each trains; the first minute does not count"""
    out: str = "runs/bench"
    """folder with one JSON file a measurement; what is there is not measured again"""


@dataclass
class Scaling:
    num_envs: tuple[int, ...] = (64, 256, 1024)
    """environments, over all ranks"""
    ranks: tuple[int, ...] = (1, 2)
    """processes of torchrun, each with one thread; beside them always one plain process"""
    rollouts: int = 20
    """rollouts of a measurement, after the warm-up"""
    repeats: int = 3
    """measurements of each, alternating, of which the median counts"""
    out: str = "runs/bench"
    """folder with one JSON file a measurement; what is there is not measured again"""


def command_of(line: str, folder: str) -> list[str]:
    """A script's command line, its runs and datasets in this folder."""
    script, *flags = shlex.split(line)
    return [str(ROOT / script), *flags, "--run-root", folder]


@contextmanager
def started(arguments: list[str], folder: str) -> Iterator[subprocess.Popen]:
    """A Python process with one thread, stopped on leaving if it still runs: torchrun then ends its ranks. What it says
    goes to a file in this folder."""
    with open(Path(folder) / "said", "w") as said:
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=said, env=one_thread)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def ended(line: str, process: subprocess.Popen, folder: str) -> UserError:
    """What is wrong when a script has ended as it should not: its own error, which torchrun follows with a report."""
    said = [text for text in (Path(folder) / "said").read_text().splitlines() if text.strip()] or ["it said nothing"]
    errors = [text for text in said if text.startswith("error: ")] or said[-1:]
    return UserError(f"{line} ended with status {process.returncode}: {errors[0]}")


# Memory


def resident(pid: int) -> float:
    """Resident memory of a process, MB: from /proc, and where there is none, as on macOS, from ps."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], check=True, capture_output=True).stdout) / 1024


def memory(line: str, minutes: float) -> dict[str, Any]:
    """One sample a second of a training script that would run on without end.

    Raises:
        UserError: it ended by itself.
    """
    samples, endless = [], ["--total-timesteps", "1000000000"]
    with tempfile.TemporaryDirectory() as folder:
        if line.startswith("bc_pretrain"):
            endless = []
            subprocess.run([sys.executable, *command_of(DEMONSTRATIONS, folder)], check=True, capture_output=True)
        with started([*command_of(line, folder), *endless], folder) as process:
            begin = time.monotonic()
            while (elapsed := time.monotonic() - begin) < 60 * minutes and process.poll() is None:
                samples.append((round(elapsed, 2), round(resident(process.pid), 2)))
                time.sleep(1)
            if process.poll() is not None:
                raise ended(line, process, folder)
    return {**flatness(samples), "samples": samples}


def flatness(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Of (s, MB): the highest of all; after the first minute the lowest, highest and last; drift: how far the mean of
    the last tenth is above that of the first tenth, in percent, since evaluations come and go."""
    settled = [megabytes for seconds, megabytes in samples if seconds >= SETTLING]
    tenth = max(1, len(settled) // 10)
    first, last = statistics.fmean(settled[:tenth]), statistics.fmean(settled[-tenth:])
    figures = {"peak": max(megabytes for _, megabytes in samples), "low": min(settled), "high": max(settled)}
    return {**figures, "last": settled[-1], "first_tenth": first, "last_tenth": last, "drift": 100 * (last / first - 1)}


def bench_memory(args: Memory) -> None:
    """Raises UserError for scripts that there are not, or a time that is too short."""
    for name in args.scripts:
        if name not in RUNS:
            raise UserError(f"--scripts {name}: choose {', '.join(RUNS)}")
    if args.minutes * 60 < SETTLING + 2:
        raise UserError(f"--minutes must be more than {SETTLING / 60:.0f}, which do not count, not {args.minutes}")
    results = []
    for name in args.scripts:
        asked = {"script": name, "line": RUNS[name], "minutes": args.minutes}
        file = place(args.out, "memory", name, asked)
        results.append(measured(file, asked, partial(memory, RUNS[name], args.minutes)))
    print(table(memory_rows(results), results))


def memory_rows(results: list[dict]) -> list[Row]:
    """Resident memory after the first minute: its range, and how it moved."""
    return [
        Row(
            "resident memory after the first minute, MB",
            f"`{result['line']}`, {result['minutes']:g} minutes, at most {number(result['peak'])}",
            f"{result['low']:.1f} to {result['high']:.1f}, last {result['last']:.1f}",
            f"mean of the last tenth {result['last_tenth']:.1f}, of the first {result['first_tenth']:.1f}",
            f"{result['drift']:+.1f} %",
        )
        for result in results
    ]


# Scaling


def scaling(num_envs: int, ranks: int, rollouts: int) -> dict[str, float]:
    """Steps a second of wall clock in training; ranks 0 is one plain process. A minibatch is an eighth of a rollout, as
    in the defaults: with more environments each gradient step has more to do, not the rollout more steps.

    Raises:
        UserError: the run failed.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    steps = (WARM_UP + 1 + rollouts) * num_envs * 32  # one rollout more: the last ends with an evaluation
    line = f"ppo_grid_socnav.py --num-envs {num_envs} --num-steps 32 --minibatch-size {4 * num_envs} --threads 1"
    rest = f"--total-timesteps {steps} --eval-every 0 --eval-episodes 1 --checkpoint-every 0 --run-name bench"
    with tempfile.TemporaryDirectory() as folder:
        with started([*launch, *command_of(f"{line} {rest}", folder)], folder) as process:
            if process.wait() != 0:
                raise ended(f"{line} on {ranks} ranks" if ranks else line, process, folder)
        with open(Path(folder) / "bench" / "progress.csv", newline="", encoding="utf-8") as file:
            return {"wall": steady_rate(list(csv.DictReader(file)))}


def steady_rate(progress: list[dict]) -> float:
    """Steps a second of a run between the end of its warm-up and its last iteration but one; each row's time/sps is
    the steps so far by the seconds so far."""
    (first, begin), (last, end) = (
        (int(row["step"]), int(row["step"]) / float(row["time/sps"])) for row in (progress[WARM_UP - 1], progress[-2])
    )
    return (last - first) / (end - begin)


def bench_scaling(args: Scaling) -> None:
    """Raises UserError for settings that cannot be measured, or a run that failed."""
    if min(args.rollouts, args.repeats, *args.ranks, *args.num_envs) < 1:
        raise UserError("--num-envs, --ranks, --rollouts and --repeats must be at least 1")
    for num_envs in args.num_envs:
        for ranks in args.ranks:
            if num_envs % ranks:
                raise UserError(f"--num-envs {num_envs} cannot be shared out over {ranks} ranks")
    results = []
    for num_envs in args.num_envs:
        for repeat in range(args.repeats):
            for ranks in (0, *args.ranks):
                asked = {"num_envs": num_envs, "ranks": ranks, "rollouts": args.rollouts, "repeat": repeat}
                file = place(args.out, "scaling", f"SocNavGrid-v0__{num_envs}_envs__{ranks}_ranks__{repeat}", asked)
                results.append(measured(file, asked, partial(scaling, num_envs, ranks, args.rollouts)))
    print(table(scaling_rows(results), results))


def scaling_rows(results: list[dict]) -> list[Row]:
    """For each number of environments and ranks, medians beside one plain process with one thread."""
    rows = []
    for (num_envs, _), group in grouped(results, "num_envs", "rollouts").items():
        rates = {ranks: [result["wall"] for result in those] for (ranks,), those in grouped(group, "ranks").items()}
        for ranks in sorted(rates):
            where = f"SocNavGrid-v0, {num_envs} environments, {f'{ranks} rank(s)' if ranks else 'one plain process'}"
            figure, beside, ratio = spread(rates[ranks], statistics.median), "", ""
            if ranks and 0 in rates:
                beside = f"one plain process {spread(rates[0], statistics.median)}"
                ratio = f"{statistics.median(rates[ranks]) / statistics.median(rates[0]):.2f}"
            rows.append(Row("training, steps/s, one thread a process", where, figure, beside, ratio))
    return rows
