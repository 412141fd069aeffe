"""Measure steps per second of the environments under a trained policy, and the memory of a training run.

    python tools/bench.py envs                       8, 16, 64, 256 simulations, one thread
    python tools/bench.py envs --threads 2 --policy runs/<run>
    python tools/bench.py memory                     resident memory of a training run

The figures are wall clock: leave the machine to the benchmark.
"""

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
import ppo_residual
from envs import command, rollout, run


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["envs", "memory"]]
    """environment speed, or the memory of a training run"""
    env_id: str = "SO101Paper-v0"
    """environment to measure"""
    policy: str = "runs/reference/so101"
    """policy that acts while it is measured, a file, a run or a scripted controller"""
    num_envs: tuple[int, ...] = (8, 16, 64, 256)
    """sizes of the batch"""
    threads: int = 1
    """CPU threads of the simulator"""
    seconds: float = 4.0
    """how long each measurement lasts"""
    repeats: int = 3
    """measurements of each size, of which the median counts"""


def make_policy(name: str, vec) -> rollout.Policy:
    """A scripted controller, or the policy in a file with its base."""
    if not run.is_policy_path(name):
        return rollout.scripted(name, vec)
    policy = run.load_policy(name)
    args = command.args_from(ppo_residual.Args, policy["args"], name)
    agent = ppo_residual.make_agent(vec, args)
    run.load_agent(agent, policy, args, name)
    return ppo_residual.Corrected(agent, rollout.scripted(args.base_policy, vec), args, vec.single_action_space)


def steps_per_second(args: Args, num_envs: int) -> tuple[float, float]:
    """Wall clock over base policy, observation, reward, autoreset and physics; and the same without the policy."""
    vec = envs.make_vec(args.env_id, num_envs, threads=args.threads, training=True)
    policy = make_policy(args.policy, vec)
    obs, _ = vec.reset(seed=0)
    for _ in range(50):  # past the start, where nothing touches yet
        obs, *_ = vec.step(policy(obs))
    steps, stepping, begin = 0, 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < args.seconds:
        action = policy(obs)
        before = time.perf_counter()
        obs, *_ = vec.step(action)
        stepping += time.perf_counter() - before
        steps += num_envs
    return steps / elapsed, steps / stepping


def bench_envs(args: Args) -> None:
    torch.set_num_threads(1)
    print(
        f"{args.env_id}, {args.threads} thread(s), policy {args.policy}; {run.cpu_name()}; commit {run.git_commit()}\n"
    )
    print("| simulations | env steps/s, policy included | env steps/s, environment alone |\n|---|---|---|")
    for num_envs in args.num_envs:
        rates = np.median([steps_per_second(args, num_envs) for _ in range(args.repeats)], axis=0)
        print(f"| {num_envs} | {rates[0]:,.0f} | {rates[1]:,.0f} |", flush=True)


def bench_memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, ppo_residual.__file__, "--run-root", folder, "--total-timesteps", "20480"]
        subprocess.run(line, check=True, capture_output=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"ppo_residual.py, 20,480 steps with evaluations and export: {peak:,.0f} MB resident at most")


def main() -> None:
    with command.command_line():
        args = tyro.cli(Args, description=__doc__)
        bench_envs(args) if args.what == "envs" else bench_memory()


if __name__ == "__main__":
    main()
