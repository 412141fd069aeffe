"""Measure speed and memory.

    python tools/bench.py envs --env-id Ballbot-v0 --policy pid      environment steps/s, in batches and one by one
    python tools/bench.py ppo --env-id HalfCheetah-v5                training steps/s, with Stable-Baselines3 (.[bench])
    python tools/bench.py ranks --num-envs 256                       social navigation in one process and under torchrun
    python tools/bench.py speedrun --tasks so101                     seconds until a policy is good
    python tools/bench.py memory ppo_residual.py --minutes 30        resident memory of a training script

`ppo` alternates the contenders on one CPU core and compares them round by round, because the speed of a shared machine
changes within minutes. `speedrun --beside DIR` does so with another checkout of this repository. --json FILE appends
the results with hardware, versions and commit.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError, make_vec
from envs.cli import one_line_errors
from envs.evaluation import figures, meets, resolve_policy
from envs.run import EnvKwargs, cpu_name, git_commit, read_jsonl, to_json

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3  # rollouts before a measurement
SETTLING = 60.0  # seconds before memory is compared
# {task: script and flags, and the metrics that an evaluation of 100 validation episodes must reach}
SPEEDRUNS: dict[str, tuple[str, dict[str, float]]] = {
    "so101": ("ppo_residual.py", {"success_rate": 0.95}),
    "lateral": ("ppo_continuous.py", {"total_cost": 50.8}),  # 45 % of the 112.8 of PID
    "ballbot": ("ppo_continuous.py --env-id Ballbot-v0", {"mean_return": 86, "success_rate": 0.99}),
    "socnav": ("ppo_grid_socnav.py --eval-every 250000", {"success_rate": 0.9}),
    "halfcheetah": ("ppo_continuous.py --env-id HalfCheetah-v5 --eval-every 50000", {"mean_return": 3000}),
}
CONTENDERS = {  # {name: script and flags}
    "eager": ["ppo_continuous.py"],
    "compile": ["ppo_continuous.py", "--compile"],
    "sb3": ["tools/bench_sb3.py"],
    "sbx": ["tools/bench_sb3.py", "--library", "sbx"],
}
PEERS = {"sb3": "stable_baselines3", "sbx": "sbx"}  # {contender: its package}


@dataclass
class Common:
    json: str | None = None  # append the results to this file, one JSON object per line


@dataclass
class Envs(Common):
    env_id: str = "SO101Paper-v0"  # environment
    env_kwargs: EnvKwargs = field(default_factory=dict)  # its keyword arguments, as KEY VALUE pairs
    policy: str = "zero"  # controller, policy file, ONNX file or run
    num_envs: tuple[int, ...] = (1, 16, 64)  # numbers of environments
    steps: int = 500  # steps per measurement
    threads: int = 1  # CPU threads of the simulator
    vectorization: Literal["sync", "async"] = "sync"  # async: Gymnasium's environments in worker processes


@dataclass
class Ppo(Common):
    env_id: str = "HalfCheetah-v5"  # environment
    contenders: tuple[str, ...] = ("eager", "compile", "sb3")  # eager, compile, sb3, sbx; ratios to the last one
    rounds: int = 7  # rounds in which each contender trains once
    rollouts: int = 10  # rollouts per measurement


@dataclass
class Ranks(Common):
    num_envs: int = 256  # environments, over all ranks
    ranks: tuple[int, ...] = (1, 2)  # numbers of processes, with one thread each
    rounds: int = 3  # rounds in which each number of processes trains once
    rollouts: int = 20  # rollouts per measurement


@dataclass
class Speedrun(Common):
    tasks: tuple[str, ...] = tuple(SPEEDRUNS)  # tasks
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds
    beside: str | None = None  # another checkout, which takes turns


@dataclass
class Memory(Common):
    command: tyro.conf.Positional[tuple[str, ...]] = ("ppo_residual.py",)  # script and flags (after --)
    minutes: float = 3.0  # duration; the first minute is not compared


def bench_envs(args: Envs) -> list[dict]:
    """Environment steps/s without the time of the policy, in batches and as a loop over single environments."""
    torch.set_num_threads(args.threads)
    policy, env_id, env_kwargs, _ = resolve_policy(args.policy, args.env_id, args.env_kwargs)

    def rate(batches: list, steps: int) -> float:
        seconds = 0.0
        observations = [envs.reset(seed=1)[0] for envs in batches]
        if hasattr(policy, "reset"):
            policy.reset(np.arange(batches[0].num_envs), batches[0])
        for step in range(steps):
            actions = [policy(obs) for obs in observations]
            begin = time.perf_counter()
            observations = [envs.step(action)[0] for envs, action in zip(batches, actions)]
            seconds += (time.perf_counter() - begin) * (step > 0)
        return (steps - 1) * sum(envs.num_envs * envs.action_repeat for envs in batches) / seconds

    results = []
    for num_envs in args.num_envs:
        kwargs = {"training": False, "split": "test", "vectorization": args.vectorization, **env_kwargs}
        envs = make_vec(env_id, num_envs, threads=args.threads, **kwargs)
        result = {"env_id": env_id, "num_envs": num_envs, "steps/s": rate([envs], args.steps)}
        if not hasattr(policy, "reset") and num_envs > 1:  # one controller keeps the state of one batch only
            loop = [make_vec(env_id, 1, training=False, split="test", **env_kwargs) for _ in range(num_envs)]
            result["loop steps/s"] = rate(loop, max(args.steps // num_envs, 20))
        results.append(result)
    return results


@contextmanager
def started(command: list[str], folder: str) -> Iterator[subprocess.Popen]:
    """A Python process with one thread, which writes to a file in the folder and is terminated at the end."""
    with open(Path(folder) / "output", "w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def check_status(process: subprocess.Popen, folder: str) -> None:
    """Raises UserError with the last line of its output if a process failed."""
    if process.returncode:
        lines = (Path(folder) / "output").read_text().split("\n")
        errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
        raise UserError(f"{' '.join(process.args[1:])} failed: {errors[-1] if errors else process.returncode}")


def steady_rate(folder: Path) -> float:
    """Steps/s of a run between its warm-up and its last iteration but one; the last one includes an evaluation."""
    with open(folder / "progress.csv", newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), int(row["step"]) / float(row["time/sps"])) for row in csv.DictReader(file)]
    (first, begin), (last, end) = rows[WARM_UP - 1], rows[-2]
    return (last - first) / (end - begin)


def train_rate(command: list[str], rollouts: int, rollout_size: int) -> float:
    """Training steps/s of a script, without start-up and evaluation."""
    steps = (WARM_UP + 1 + rollouts) * rollout_size
    flags = ["--total-timesteps", str(steps), "--eval-every", "0", "--eval-episodes", "1", "--checkpoint-every", "0"]
    with tempfile.TemporaryDirectory() as folder:
        with started([*command, *flags, "--run-root", folder, "--run-name", "bench"], folder) as process:
            process.wait()
            check_status(process, folder)
        return steady_rate(Path(folder) / "bench")


def ratios(rates: dict[str, list[float]], reference: str) -> list[dict]:
    """Median rates, and the ratio to the reference round by round with its median and quartiles."""
    results = []
    for name, values in rates.items():
        ratio = sorted(x / y for x, y in zip(values, rates[reference]))
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        result = {"contender": name, "steps/s": statistics.median(values), f"ratio to {reference}": float(middle)}
        results.append(result | {"first quartile": float(low), "third quartile": float(high)})
    return results


def bench_ppo(args: Ppo) -> list[dict]:
    """Training steps/s of ppo_continuous.py, Stable-Baselines3 and SBX with the same settings, on one core."""
    if unknown := [name for name in args.contenders if name not in CONTENDERS]:
        raise UserError(f"--contenders {unknown[0]}: choose from {', '.join(CONTENDERS)}")
    if missing := [PEERS[name] for name in args.contenders if name in PEERS and find_spec(PEERS[name]) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install -e '.[bench]'")
    from ppo_continuous import Args

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # child processes inherit it
    size = Args.from_preset(env_id=args.env_id).steps_per_iteration
    rates: dict[str, list[float]] = {name: [] for name in args.contenders}
    for _ in range(args.rounds):
        for name, values in rates.items():
            script, *flags = CONTENDERS[name]
            command = [str(ROOT / script), "--env-id", args.env_id, *flags]
            values.append(train_rate(command, args.rollouts, size))
            print(f"{name}: {values[-1]:,.0f} steps/s", file=sys.stderr)
    return ratios(rates, args.contenders[-1])


def bench_ranks(args: Ranks) -> list[dict]:
    """Training steps/s of ppo_grid_socnav.py in one process and under torchrun."""
    size, minibatch = 32 * args.num_envs, 4 * args.num_envs
    flags = [
        "--num-envs",
        str(args.num_envs),
        "--num-steps",
        "32",
        "--minibatch-size",
        str(minibatch),
        "--threads",
        "1",
    ]
    rates: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for ranks in args.ranks:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [*(launch if ranks > 1 else []), str(ROOT / "ppo_grid_socnav.py"), *flags]
            rate = train_rate(command, args.rollouts, size)
            rates.setdefault(f"{ranks} processes", []).append(rate)
            print(f"{ranks} processes: {rate:,.0f} steps/s", file=sys.stderr)
    return ratios(rates, f"{args.ranks[0]} processes")


def seconds_to_threshold(root: Path, command: list[str], thresholds: dict[str, float]) -> float:
    """Wall time from the start of a script to its first evaluation that meets the thresholds; nan if none does."""
    script, *flags = command
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "bench" / "evaluations.jsonl"
        begin = time.monotonic()
        with started([str(root / script), *flags, "--run-root", folder, "--run-name", "bench"], folder) as process:
            while process.poll() is None:
                time.sleep(0.02)
                if any(meets(figures(evaluation), thresholds) for evaluation in read_jsonl(log)):
                    return time.monotonic() - begin
            check_status(process, folder)
    return float("nan")


def bench_speedrun(args: Speedrun) -> list[dict]:
    """Seconds until an evaluation of 100 validation episodes meets the threshold of a task, evaluations included."""
    if unknown := [task for task in args.tasks if task not in SPEEDRUNS]:
        raise UserError(f"--tasks {unknown[0]}: choose from {', '.join(SPEEDRUNS)}")
    checkouts = {git_commit(): ROOT} | ({args.beside: Path(args.beside)} if args.beside else {})
    results = []
    for task in args.tasks:
        command, thresholds = SPEEDRUNS[task]
        seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        for seed in args.seeds:
            flags = [*command.split(), "--eval-episodes", "100", "--seed", str(seed)]
            for name, root in checkouts.items():
                seconds[name].append(seconds_to_threshold(root, flags, thresholds))
                print(f"{task}, seed {seed}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        for name, values in seconds.items():
            result = {"task": task, "thresholds": str(thresholds), "checkout": name}
            results.append(result | {"median, s": float(np.median(values)), "all, s": [round(x, 1) for x in values]})
    return results


def resident(pid: int) -> float:
    """Resident memory of a process, MB, from /proc or else from ps."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], check=True, capture_output=True).stdout) / 1024


def bench_memory(args: Memory) -> list[dict]:
    """Memory of a training script, sampled every second: largest, and mean of the first and last tenth after a
    minute."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        script, *flags = args.command
        flags += [] if script.startswith("bc_pretrain") else ["--total-timesteps", "1e9"]
        with started([str(ROOT / script), *flags, "--run-root", folder], folder) as process:
            begin = time.monotonic()
            while (seconds := time.monotonic() - begin) < 60 * args.minutes and process.poll() is None:
                samples.append((seconds, resident(process.pid)))
                time.sleep(1)
            check_status(process, folder)
    settled = [x for seconds, x in samples if seconds >= SETTLING] or [x for _, x in samples]
    tenth = max(1, len(settled) // 10)
    first, last = statistics.fmean(settled[:tenth]), statistics.fmean(settled[-tenth:])
    result = {"command": " ".join(args.command), "largest, MB": max(x for _, x in samples)}
    return [result | {"first tenth, MB": first, "last tenth, MB": last, "growth, %": 100 * (last / first - 1)}]


def main() -> None:
    commands = {"envs": Envs, "ppo": Ppo, "ranks": Ranks, "speedrun": Speedrun, "memory": Memory}
    functions = {Envs: bench_envs, Ppo: bench_ppo, Ranks: bench_ranks, Speedrun: bench_speedrun, Memory: bench_memory}
    with one_line_errors():
        args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        results = functions[type(args)](args)
        columns = list(dict.fromkeys(name for result in results for name in result))
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for result in results:
            values = [result.get(name, "") for name in columns]
            print("| " + " | ".join(f"{x:,.4g}" if isinstance(x, float) else str(x) for x in values) + " |")
        if args.json:
            about = {"commit": git_commit(), "hardware": cpu_name(), "python": platform.python_version()}
            with open(args.json, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(to_json(result | about)) + "\n" for result in results)


if __name__ == "__main__":
    main()
