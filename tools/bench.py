"""Measure our environments, our training beside Stable-Baselines3, its memory, and how it scales; and make one table.

    python tools/bench.py envs                       steps/s of 8, 16, 64, 256 arms under a policy, one thread
    python tools/bench.py envs --threads 2 --policy runs/<run>
    python tools/bench.py envs --env-id LateralControl-v0 --policy zero --num-envs 1 8 64 128
        [--env-kwargs model_path tinyphysics.onnx data_path segments]      beside a plain loop as the official one
    python tools/bench.py envs --env-id Ballbot-v0 --policy pid            beside a plain loop as the published one
    python tools/bench.py envs --env-id SocNavGrid-v0 --policy runs/<run> --num-envs 1 16 64 256
        [--env-kwargs scenario classic_station_platform_medium]                               its busiest scenario
    python tools/bench.py ppo                        steps/s of training in our environments, also with --compile,
                                                     and of Stable-Baselines3 in the same ones
    python tools/bench.py ppo --learn --processes 2  what both learn there with the same settings, three runs each
    python tools/bench.py ppo --learn --seeds 10 --env-id HalfCheetah-v5 Hopper-v5            and in Gymnasium's
    python tools/bench.py scaling                    steps/s of social navigation with environments and ranks
    python tools/bench.py memory --minutes 30        resident memory of each training script
    python tools/bench.py report                     one table of all that was measured

Each measurement leaves a JSON file in --out, runs/bench, and is not made again while it is there: stopped, a command
goes on where it was. `ppo` needs Stable-Baselines3 (pip install -e ".[bench]"). Compare CPU time where the machine has
other work; wall clock, which all but `ppo` tell, says something on an idle one only.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_envs import Envs, bench_envs, env_rows
from bench_ppo import Ppo, bench_ppo, learn_rows, speed_rows
from bench_results import finished, table
from bench_runs import Memory, Scaling, bench_memory, bench_scaling, memory_rows, scaling_rows

from envs import UserError
from envs.cli import one_line_errors

ROWS = {"envs": env_rows, "speed": speed_rows, "learn": learn_rows, "scaling": scaling_rows, "memory": memory_rows}


@dataclass
class Report:
    out: str = "runs/bench"
    """folder in which the other commands have left their measurements"""


def bench_report(args: Report) -> None:
    """Raises UserError if nothing was measured yet."""
    found = {kind: finished(args.out, kind) for kind in ROWS}
    results = [result for kind in found.values() for result in kind]
    if not results:
        raise UserError(f"{args.out}: no measurements there; run the other commands first, or give their --out")
    print(table([row for kind, rows in ROWS.items() for row in rows(found[kind])], results))


def main() -> None:
    benches: dict[type, Callable] = {
        Envs: bench_envs, Memory: bench_memory, Ppo: bench_ppo, Report: bench_report, Scaling: bench_scaling
    }  # fmt: skip
    with one_line_errors():
        args = tyro.cli(Envs | Memory | Ppo | Report | Scaling, description=__doc__)
        benches[type(args)](args)


if __name__ == "__main__":
    main()
