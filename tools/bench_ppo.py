"""Training beside Stable-Baselines3: how fast, and what is learned."""

import contextlib
import io
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_envs import make_policy
from bench_results import Row, grouped, measured, number, place, spread, student_t, table

import ppo_continuous
import ppo_residual
from envs import BUNDLED, UserError, check_flat_box, make_vec
from envs.evaluation import Policy, evaluate, figures, read_json
from envs.run import Run, setup


@dataclass
class Ppo:
    env_id: tuple[str, ...] = ("SO101Paper-v0", "LateralControl-v0", "Ballbot-v0")
    """environments to train in"""
    repeats: int = 3
    """speed: measurements of each, alternating, of which the median counts"""
    rollouts: int = 30
    """speed: rollouts of a measurement, after the warm-up"""
    learn: bool = False
    """compare what is learned instead of the speed"""
    seeds: int = 3
    """--learn: runs of each, with seeds 1000, 2000, ..."""
    total_timesteps: int | None = None
    """--learn: environment steps of a run, if not as many as its script takes (300,000 in Gymnasium's)"""
    processes: int = 1
    """--learn: runs at a time"""
    out: str = "runs/bench"
    """folder with one JSON file a measurement; what is there is not measured again"""
    png: str | None = None
    """--learn: where to draw the learning curves"""


OURS, COMPILED, TUNED, SB3 = "ours", "ours, --compile", "ours as tuned", "Stable-Baselines3"
# Gymnasium's environments: Stable-Baselines3's own defaults, with as many environments as ours have
SETTINGS = {
    "num_envs": 8, "num_steps": 256, "minibatch_size": 64, "update_epochs": 10, "learning_rate": 3e-4,
    "anneal_lr": False, "weight_decay": 0.0, "gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.2, "clip_vloss": True,
    "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None, "norm_obs": True, "norm_reward": True,
    "norm_adv": True, "init_log_std": 0.0, "hidden_sizes": (64, 64), "total_timesteps": 300_000,
}  # fmt: skip
# Ours: as tuned, but without what Stable-Baselines3 has no counterpart of, and the policy of the last step
SHARED = {"group_size": 1, "final_log_std": None, "eval_every": 0, "eval_episodes": 1}
# What counts in an evaluation on the test split; elsewhere the return
MEASURES = {
    "SO101Paper-v0": ("success_rate", "mean_return"),
    "LateralControl-v0": ("total_cost",),
    "Ballbot-v0": ("mean_return", "success_rate"),
}
WARM_UP = 3  # rollouts, the first of which compiles
EPISODES = 200  # of the test split, in which each policy is measured
LAST_100 = "last 100 training episodes"


def settings(env_id: str, contender: str, seed: int, total: int | None = None) -> Any:
    """The Args of one run, of the script whose task it is."""
    if env_id not in BUNDLED:
        args = ppo_continuous.Args(env_id=env_id, **SETTINGS)
    elif env_id == "SO101Paper-v0":
        args = ppo_residual.Args.from_preset()
    else:
        args = ppo_continuous.Args.from_preset(env_id=env_id)
    if contender != TUNED:
        args = replace(args, **{name: x for name, x in SHARED.items() if hasattr(args, name)})
    total = args.total_timesteps if total is None else total
    return replace(args, seed=seed, total_timesteps=total, compile=contender == COMPILED, checkpoint_every=0)


def changed(args: Any, other: Any) -> list[str]:
    """Names of the fields in which two Args differ."""
    return [field.name for field in fields(args) if getattr(args, field.name) != getattr(other, field.name)]


def contenders(env_id: str) -> tuple[str, ...]:
    """Who learns in an environment: ours as tuned only where that is more than the settings that both sides have."""
    shared, tuned = (settings(env_id, contender, seed=0) for contender in (OURS, TUNED))
    extras = [name for name in changed(shared, tuned) if name not in ("eval_every", "eval_episodes")]
    return (OURS, SB3, TUNED) if extras else (OURS, SB3)


def train(contender: str, args: Any) -> tuple[list, list, Policy]:
    """One run.

    Returns:
        marks: CPU time and wall clock (s) after each iteration.
        episodes: of training, (step, return, length).
        policy: the deterministic one at the end; of ours as tuned, the best by validation.
    """
    torch.set_num_threads(1)
    if contender == SB3:
        from bench_sb3 import train_sb3  # which needs Stable-Baselines3

        return train_sb3(args)
    return train_ours(args)


def train_ours(args: Any) -> tuple[list, list, Policy]:
    """The script's own train(), files and all."""
    marks, episodes = [], []

    class Marked(Run):
        def log(self, step: int, stats: dict, finished: list[dict], *others: Any) -> None:
            super().log(step, stats, finished, *others)
            marks.append((time.process_time(), time.perf_counter()))
            episodes.extend((episode["step"], episode["return"], episode["length"]) for episode in finished)

    script = ppo_residual if isinstance(args, ppo_residual.Args) else ppo_continuous
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        patch.object(script, "Run", Marked),
    ):
        summary = script.train(replace(args, run_root=folder))
        policy = make_policy(summary["run"], make_vec(args.env_id, 1, **args.env_kwargs))
    return marks, episodes, policy


@contextlib.contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A fresh process for every call, `processes` at a time; when something fails or stops it, they end at once."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


# Speed


def speed(contender: str, args: Any) -> dict[str, float]:
    """Steps a second of CPU time and of wall clock, warm-up and evaluation left out."""
    marks = np.array(train(contender, args)[0])
    steps = args.steps_per_iteration * (len(marks) - 2 - WARM_UP)  # our last iteration ends with an evaluation
    cpu, wall = steps / (marks[-2] - marks[WARM_UP])
    return {"cpu": cpu, "wall": wall}


def speed_in_a_fresh_process(contender: str, args: Any) -> dict[str, float]:
    with workers(1) as pool:
        return pool.submit(speed, contender, args).result()


def bench_speed(args: Ppo) -> None:
    results = []
    for env_id in args.env_id:
        for repeat in range(args.repeats):
            for contender in (SB3, OURS, COMPILED):
                one = settings(env_id, contender, seed=repeat)
                # two more: ours mark the end of an iteration, the first after the warm-up; and the last one evaluates
                total = (WARM_UP + 2 + args.rollouts) * one.steps_per_iteration
                # without a target both sides make the same number of gradient steps, whatever they learn
                one = replace(one, total_timesteps=total, target_kl=None)
                asked = {"env_id": env_id, "contender": contender, "rollouts": args.rollouts, "args": asdict(one)}
                file = place(args.out, "speed", f"{env_id}__{contender}__{repeat}", asked)
                results.append(measured(file, asked, partial(speed_in_a_fresh_process, contender, one)))
    print(table(speed_rows(results), results))


def speed_rows(results: list[dict]) -> list[Row]:
    """Ours beside Stable-Baselines3 in each environment: medians, and the ratios of CPU time and of wall clock."""
    rows = []
    for (env_id, rollouts), group in grouped(results, "env_id", "rollouts").items():
        cpu, wall = (
            {who: [result[clock] for result in those] for (who,), those in grouped(group, "contender").items()}
            for clock in ("cpu", "wall")
        )
        for who in (OURS, COMPILED):
            if who in cpu and SB3 in cpu:
                by_cpu, by_wall = (statistics.median(x[who]) / statistics.median(x[SB3]) for x in (cpu, wall))
                figure, beside = spread(cpu[who], statistics.median), spread(cpu[SB3], statistics.median)
                where = f"{env_id}, {who}, {rollouts} rollouts, median of {len(cpu[who])}"
                ratio = f"{by_cpu:.2f} (wall clock {by_wall:.2f})"
                rows.append(Row("training, steps/s of CPU time", where, figure, f"{SB3} {beside}", ratio))
    return rows


# Learning


def learn(contender: str, args: Any) -> dict[str, Any]:
    """What a run came to: its CPU time, its training episodes, and its policy on the test split, where all contenders
    of one seed play the same episodes."""
    begin = time.process_time()
    _, episodes, policy = train(contender, args)
    cpu_s = time.process_time() - begin
    evaluation = evaluate(policy, replace(args, eval_episodes=EPISODES, eval_seed=900_000 + args.seed), "test")
    batch = args.steps_per_iteration
    return {
        "steps": args.total_timesteps // batch * batch,
        "cpu_s": round(cpu_s, 1),
        "evaluation": figures(evaluation),
        "episodes": episodes,
    }


def bench_learn(args: Ppo) -> None:
    runs = {}
    for env_id in args.env_id:
        for seed in (1000 * (i + 1) for i in range(args.seeds)):
            for contender in contenders(env_id):
                one = settings(env_id, contender, seed, args.total_timesteps)
                asked = {"env_id": env_id, "contender": contender, "seed": seed, "args": asdict(one)}
                file = place(args.out, "learn", f"{env_id}__{contender}__seed{seed}", asked)
                runs[file] = (asked, partial(learn, contender, one))
    absent = {file: how for file, how in runs.items() if not file.exists()}
    if len(absent) < len(runs):
        print(f"{len(runs) - len(absent)} of {len(runs)} runs lie in {args.out}/learn already", file=sys.stderr)
    with workers(args.processes) as pool:
        missing = {pool.submit(measured, file, *how): file for file, how in absent.items()}
        for done, future in enumerate(as_completed(missing), start=1):
            future.result()
            print(f"{done}/{len(missing)}: {missing[future]}", file=sys.stderr, flush=True)
    results = [read_json(file) for file in runs]
    for group in grouped(results, "env_id").values():
        print(learning_table(group) + "\n")
    print(table(learn_rows(results), results))
    if args.png is not None:
        draw(args.png, results)


def measures(result: dict) -> dict[str, float]:
    """What counts of a run: figures of its evaluation, and in Gymnasium's environments its last training episodes."""
    last = {LAST_100: statistics.fmean(episode[1] for episode in result["episodes"][-100:])}
    own = MEASURES.get(result["env_id"], ("mean_return",))
    return {**({} if result["env_id"] in BUNDLED else last), **{name: result["evaluation"][name] for name in own}}


def by_contender(results: list[dict]) -> dict[str, list[dict]]:
    """Those of one environment, each contender's by seed."""
    groups = grouped(sorted(results, key=lambda result: result["seed"]), "contender")
    return {who: groups[who,] for who in (OURS, SB3, TUNED) if (who,) in groups}


def learning_table(results: list[dict]) -> str:
    """Each seed's figures in one environment, and their means."""
    by = by_contender(results)
    columns = {
        f"{who}, {name}": [measures(result)[name] for result in those]
        for name in measures(results[0])
        for who, those in by.items()
    }
    seeds = sorted({result["seed"] for result in results})
    lines = [f"| {results[0]['env_id']}, seed | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for i, seed in enumerate(seeds):
        lines.append(f"| {seed} | " + " | ".join(number(values[i]) for values in columns.values()) + " |")
    lines.append("| mean | " + " | ".join(number(statistics.fmean(values)) for values in columns.values()) + " |")
    return "\n".join(lines)


def learn_rows(results: list[dict]) -> list[Row]:
    """Ours beside Stable-Baselines3 in each environment: means over the seeds, and the difference with its interval."""
    rows = []
    for (env_id, steps), group in grouped(results, "env_id", "steps").items():
        by = by_contender(group)
        for who in [who for who in by if who != SB3 and SB3 in by]:
            for name in measures(group[0]):
                ours, theirs = ([measures(result)[name] for result in by[x]] for x in (who, SB3))
                where = f"{env_id}, {who}, mean of {len(ours)}"
                figure, beside = spread(ours, statistics.fmean), spread(theirs, statistics.fmean)
                rows.append(Row(f"{name} after {steps:,} steps", where, figure, f"{SB3} {beside}", gap(ours, theirs)))
    return rows


def gap(ours: list[float], theirs: list[float]) -> str:
    """The difference of the means and, from two runs each on, its 95 % interval."""
    difference = number(statistics.fmean(ours) - statistics.fmean(theirs), "+")
    if min(len(ours), len(theirs)) < 2:
        return difference
    low, high = welch(ours, theirs)
    return f"{difference} ({number(low, '+')} to {number(high, '+')})"


def welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """The 95 % interval of mean(a) - mean(b), for samples whose variances may differ (Welch 1947)."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    middle = statistics.fmean(a) - statistics.fmean(b)
    if va + vb == 0:  # as where every run succeeds always
        return middle, middle
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = student_t(0.975, freedom) * math.sqrt(va + vb)
    return middle - half, middle + half


def draw(path: str, results: list[dict]) -> None:
    """Return of the training episodes that end in each thirtieth of the run: mean over the seeds, each seed thin."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('--png needs matplotlib: pip install -e ".[plots]"') from None
    groups = grouped(results, "env_id")
    figure, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False)
    for axis, ((env_id,), group) in zip(axes[0], groups.items()):
        for who, those in by_contender(group).items():
            colour = {OURS: "tab:blue", SB3: "tab:orange", TUNED: "tab:green"}[who]
            width = those[0]["steps"] / 30
            curves = [curve(result["episodes"], width) for result in those]
            middle = (np.arange(30) + 0.5) * width
            axis.plot(middle, np.transpose(curves), color=colour, linewidth=0.5, alpha=0.5)
            axis.plot(middle, np.mean(curves, axis=0), color=colour, linewidth=2, label=who)
        axis.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def curve(episodes: list, width: float) -> list[float]:
    """Mean return of the episodes that end in each of thirty windows, NaN where none does."""
    step, returns, _ = np.array(episodes).T
    window = (step // width).astype(int)
    return [returns[window == k].mean() if (window == k).any() else np.nan for k in range(30)]


def bench_ppo(args: Ppo) -> None:
    """Raises UserError if Stable-Baselines3 is missing, or a setting of the other comparison was given."""
    try:
        version("stable-baselines3")
    except PackageNotFoundError:
        raise UserError('tools/bench.py ppo needs Stable-Baselines3: pip install -e ".[bench]"') from None
    args = replace(args, env_id=tuple(env_id.removeprefix("envs:") for env_id in args.env_id))
    other = ("repeats", "rollouts") if args.learn else ("seeds", "total_timesteps", "processes", "png")
    for name in changed(args, Ppo()):
        if name in other:
            where = "without" if args.learn else "with"
            raise UserError(f"--{name.replace('_', '-')} works only {where} --learn; leave it out")
    for name in ("repeats", "rollouts", "seeds", "processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for env_id in args.env_id:  # before any process starts
        setup(settings(env_id, OURS, 0, args.total_timesteps))
        check_flat_box(make_vec(env_id, 1))
    bench_learn(args) if args.learn else bench_speed(args)
