"""Measure training beside Stable-Baselines3, its speed and what it learns; our environments' speed; a run's memory.

    python tools/bench.py ppo                        steps/s of ppo_continuous.py, also with --compile, and of SB3
    python tools/bench.py ppo --learn --processes 2  what both learn, ten runs each; stopped, it goes on where it was
    python tools/bench.py envs                       steps/s of 8, 16, 64, 256 simulations under a policy, one thread
    python tools/bench.py envs --threads 2 --policy runs/<run>
    python tools/bench.py envs --env-id LateralControl-v0 --policy zero --num-envs 1 8 64 128
        [--env-kwargs model_path tinyphysics.onnx data_path segments]      beside a plain loop as the official one
    python tools/bench.py envs --env-id Ballbot-v0 --policy pid            beside a plain loop as the published one
    python tools/bench.py envs --env-id SocNavGrid-v0 --policy runs/<run> --num-envs 1 16 64 256
        [--env-kwargs scenario classic_station_platform_medium]                               its busiest scenario
    python tools/bench.py memory                     resident memory of a training run

Both sides of `ppo` run with SETTINGS below (pip install -e ".[bench]" brings Stable-Baselines3). Compare CPU time where
the machine has other work; wall clock says something on an idle one only.
"""

import contextlib
import io
import math
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mujoco
import numpy as np
import onnxruntime
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
import ppo_continuous
import ppo_grid_socnav
import ppo_residual
from envs import ballbot, command, lateral, lateral_model, rollout, run
from envs.run import UserError
from envs.socnav.dynamics import rotate
from envs.socnav.environment import SocNavGrid
from envs.socnav.grid import OccupancyGrid


@dataclass
class Ppo:
    env_id: tuple[str, ...] = ("HalfCheetah-v5", "Hopper-v5")
    """environments to train in"""
    repeats: int = 3
    """speed: measurements of each, alternating, of which the median counts"""
    steps: int = 61_440
    """speed: environment steps of a measurement, after the warm-up"""
    learn: bool = False
    """compare what is learned instead of the speed"""
    seeds: int = 10
    """--learn: runs of each, with seeds 1000, 2000, ..."""
    total_timesteps: int = 300_000
    """--learn: environment steps of a run"""
    processes: int = 1
    """--learn: runs at a time"""
    out: str = "runs/bench_learn"
    """--learn: folder with one JSON file a run; what is there is not run again"""
    png: str | None = None
    """--learn: where to draw the learning curves"""


@dataclass
class Envs:
    env_id: str = "SO101Paper-v0"
    """environment to measure"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..."""
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


@dataclass
class Memory:
    """A training run of ppo_residual.py."""


# Training

OURS, COMPILED, SB3 = "ppo_continuous.py", "ppo_continuous.py --compile", "Stable-Baselines3"
SETTINGS = {
    "num_envs": 8, "num_steps": 256, "minibatch_size": 64, "update_epochs": 10, "learning_rate": 3e-4,
    "anneal_lr": False, "weight_decay": 0.0, "gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.2, "clip_value": True,
    "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None, "norm_obs": True, "norm_reward": True,
    "norm_adv": True, "init_log_std": 0.0, "hidden_sizes": (64, 64),
}  # fmt: skip
BATCH = SETTINGS["num_envs"] * SETTINGS["num_steps"]
WARM_UP = 3  # rollouts, the first of which compiles


def train(contender: str, env_id: str, seed: int, total: int) -> dict:
    """One run.

    Returns:
        marks: CPU time and wall clock (s) after each iteration.
        episodes: of training, (step, return, length).
        evaluation: the deterministic policy's mean return at the end, in the same ten episodes for all.
    """
    torch.set_num_threads(1)
    places = {"eval_every": 0, "checkpoint_every": 0, "compile": contender == COMPILED}
    args = ppo_continuous.Args(env_id=env_id, seed=seed, total_timesteps=total, **SETTINGS, **places)
    return train_sb3(args) if contender == SB3 else train_ours(args)


def train_ours(args: ppo_continuous.Args) -> dict:
    """The script's own train(), files and all."""
    marks, episodes = [], []

    class Marked(run.Run):
        def log(self, step: int, recent: Any, finished: list[dict], *others: Any) -> None:
            super().log(step, recent, finished, *others)
            marks.append((time.process_time(), time.perf_counter()))
            episodes.extend((episode["step"], episode["return"], episode["length"]) for episode in finished)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        patch.object(run, "Run", Marked),
    ):
        summary = ppo_continuous.train(replace(args, run_root=folder))
    return {"marks": marks, "episodes": episodes, "evaluation": summary["best"]["mean_return"]}


def train_sb3(args: ppo_continuous.Args) -> dict:
    """The same settings under Stable-Baselines3's names."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    marks, episodes = [], []

    class Marked(BaseCallback):
        def _on_rollout_start(self) -> None:
            marks.append((time.process_time(), time.perf_counter()))

        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    episodes.append((self.num_timesteps, float(info["episode"]["r"]), int(info["episode"]["l"])))
            return True

    vec = make_vec_env(args.env_id, args.num_envs, seed=args.seed)
    vec = VecNormalize(vec, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma)
    ppo = PPO(
        "MlpPolicy",
        vec,
        learning_rate=args.learning_rate,
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef if args.clip_value else None,
        normalize_advantage=args.norm_adv,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        target_kl=args.target_kl,
        policy_kwargs={"net_arch": list(args.hidden_sizes), "log_std_init": args.init_log_std},
        seed=args.seed,
        device="cpu",
    )
    ppo.learn(args.total_timesteps // BATCH * BATCH, callback=Marked())  # or it would end with a whole rollout more

    def policy(obs: np.ndarray) -> np.ndarray:
        return ppo.predict(vec.normalize_obs(obs), deterministic=True)[0]

    evaluation = rollout.evaluate(policy, args, "validation")["mean_return"]
    return {"marks": marks, "episodes": episodes, "evaluation": evaluation}


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


def about() -> str:
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{run.cpu_name()}, one thread; Python {platform.python_version()}, {versions}; commit {run.git_commit()}"


def bench_speed(args: Ppo) -> None:
    total = (WARM_UP + 1) * BATCH + args.steps  # one more rollout: our last iteration ends with an evaluation
    print("| environment | training with | steps/s of CPU time | lowest to highest | steps/s | times SB3 |")
    print("|---|---|---|---|---|---|")
    for env_id in args.env_id:
        rates = {contender: [] for contender in (SB3, OURS, COMPILED)}
        for repeat in range(args.repeats):
            for contender, measured in rates.items():
                with workers(1) as pool:
                    marks = np.array(pool.submit(train, contender, env_id, repeat, total).result()["marks"])
                steps = BATCH * (len(marks) - 2 - WARM_UP)
                measured.append(steps / (marks[-2] - marks[WARM_UP]))
        medians = {contender: np.median(measured, axis=0) for contender, measured in rates.items()}
        for contender, (cpu, wall) in medians.items():
            spread = f"{np.min(rates[contender], 0)[0]:,.0f} to {np.max(rates[contender], 0)[0]:,.0f}"
            times = cpu / medians[SB3][0]
            print(f"| {env_id} | {contender} | {cpu:,.0f} | {spread} | {wall:,.0f} | {times:.2f} |", flush=True)
    print(f"\nmedians of {args.repeats} runs of {args.steps:,} steps after the warm-up; {about()}")


def learn_one(file: Path, contender: str, env_id: str, seed: int, total: int) -> None:
    """Run and write down."""
    begin = time.process_time()
    result = train(contender, env_id, seed, total)
    del result["marks"]
    asked = {"contender": contender, "env_id": env_id, "seed": seed, "total_timesteps": total}
    run.write_json(file, {**asked, "about": about(), "cpu_s": round(time.process_time() - begin, 1), **result})


def bench_learn(args: Ppo) -> None:
    folder, seeds = Path(args.out), [1000 * (i + 1) for i in range(args.seeds)]
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(env_id, seed, contender) for env_id in args.env_id for seed in seeds for contender in (OURS, SB3)]
    files = {key: folder / f"{key[0]}__{'sb3' if key[2] == SB3 else 'ours'}__seed{key[1]}.json" for key in runs}
    with workers(args.processes) as pool:
        missing = {
            pool.submit(learn_one, file, contender, env_id, seed, args.total_timesteps): file
            for (env_id, seed, contender), file in files.items()
            if not file.exists()
        }
        for done, future in enumerate(as_completed(missing), start=1):
            future.result()
            print(f"{done}/{len(missing)}: {missing[future]}", file=sys.stderr, flush=True)
    results = {key: run.read_json(file) for key, file in files.items()}
    for key, result in results.items():
        if result["total_timesteps"] != args.total_timesteps:
            raise UserError(f"{files[key]}: has {result['total_timesteps']:,} steps; give another --out")
    for env_id in args.env_id:
        print(learning_table(env_id, {key[1:]: result for key, result in results.items() if key[0] == env_id}))
    print("trained with", ", ".join(sorted({result["about"] for result in results.values()})))
    if args.png is not None:
        draw(args, results)


def last_100(result: dict) -> float:
    """Mean return of the last 100 training episodes."""
    return statistics.fmean(episode[1] for episode in result["episodes"][-100:])


def learning_table(env_id: str, results: dict[tuple[int, str], dict]) -> str:
    """Each seed's figures, their means and the difference of these; results: {(seed, contender): result}."""
    seeds = sorted({seed for seed, _ in results})
    measures = {"last 100 episodes": last_100, "deterministic": lambda result: result["evaluation"]}
    columns = {
        (name, contender): [measure(results[seed, contender]) for seed in seeds]
        for name, measure in measures.items()
        for contender in (OURS, SB3)
    }
    lines = [f"| {env_id}, seed | " + " | ".join(f"{contender}, {name}" for name, contender in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for i, seed in enumerate(seeds):
        lines.append(f"| {seed} | " + " | ".join(f"{values[i]:,.0f}" for values in columns.values()) + " |")
    lines.append("| mean | " + " | ".join(f"{np.mean(values):,.0f}" for values in columns.values()) + " |\n")
    for name in measures:
        ours, theirs = columns[name, OURS], columns[name, SB3]
        low, high = welch(ours, theirs)
        difference = f"{np.mean(ours) - np.mean(theirs):+,.0f}, 95 % interval {low:+,.0f} to {high:+,.0f} (Welch)"
        lines.append(f"{name}: ours minus SB3 {difference}  ")
    return "\n".join(lines) + "\n"


def welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """The 95 % interval of mean(a) - mean(b), for samples whose variances may differ (Welch 1947)."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = student_t(0.975, freedom) * math.sqrt(va + vb)
    middle = statistics.fmean(a) - statistics.fmean(b)
    return middle - half, middle + half


def student_t(p: float, freedom: float) -> float:
    """Quantile of Student's t distribution: where t = sqrt(freedom) tan(x), x has density ~ cos(x)^(freedom - 1)."""
    x = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(x) ** (freedom - 1)
    cumulative = np.cumsum(density) - density / 2
    return math.sqrt(freedom) * math.tan(np.interp(p, cumulative / cumulative[-1], x))


def draw(args: Ppo, results: dict[tuple[str, int, str], dict]) -> None:
    """Return of the training episodes that end in each thirtieth of the run: mean over the seeds, each seed thin."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('--png needs matplotlib: pip install -e ".[plots]"') from None
    width = args.total_timesteps / 30
    figure, axes = plt.subplots(1, len(args.env_id), figsize=(6 * len(args.env_id), 4), squeeze=False)
    for axis, env_id in zip(axes[0], args.env_id):
        for contender, colour in ((OURS, "tab:blue"), (SB3, "tab:orange")):
            curves = []
            for (its_env, _, its_contender), result in results.items():
                if (its_env, its_contender) == (env_id, contender):
                    step, returns, _ = np.array(result["episodes"]).T
                    window = (step // width).astype(int)
                    curves.append([returns[window == k].mean() if (window == k).any() else np.nan for k in range(30)])
            middle = (np.arange(30) + 0.5) * width
            axis.plot(middle, np.transpose(curves), color=colour, linewidth=0.5, alpha=0.5)
            axis.plot(middle, np.mean(curves, axis=0), color=colour, linewidth=2, label=contender)
        axis.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(args.png, dpi=100)


def bench_ppo(args: Ppo) -> None:
    """Raises UserError if Stable-Baselines3 is missing, or a setting of the other comparison was given."""
    try:
        version("stable-baselines3")
    except ImportError:
        raise UserError('tools/bench.py ppo needs Stable-Baselines3: pip install -e ".[bench]"') from None
    other = ("repeats", "steps") if args.learn else ("seeds", "total_timesteps", "processes", "out", "png")
    for name in command.changed(args, Ppo()):
        if name in other:
            where = "without" if args.learn else "with"
            raise UserError(f"--{name.replace('_', '-')} works only {where} --learn; leave it out")
    for name, least in (("repeats", 1), ("steps", BATCH), ("seeds", 2), ("total_timesteps", BATCH), ("processes", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for env_id in args.env_id:  # before any process starts
        envs.require_flat_box(envs.make_vec(env_id, 1))
    bench_learn(args) if args.learn else bench_speed(args)


# Environments and memory


def make_policy(name: str, vec) -> rollout.Policy:
    """A scripted controller, or the policy in a file with its base."""
    if not run.is_policy_path(name):
        return rollout.scripted(name, vec)
    policy = run.load_policy(name)
    if isinstance(vec, SocNavGrid):
        return SocNavPolicy(policy, vec, name)
    script = ppo_residual if policy["kind"] == "residual" else ppo_continuous
    args = replace(script.Args(env_id=policy["env_id"]), **policy["args"])
    agent = script.residual_agent(vec, args) if script is ppo_residual else script.make_agent(vec, args)
    run.load_agent(agent, policy, args, name)
    if script is ppo_continuous:
        return rollout.Deployed(agent)
    return ppo_residual.Corrected(agent, rollout.scripted(args.base_policy, vec), args, vec.single_action_space)


class SocNavPolicy:
    """A trained policy beside an environment whose grid may have other channels than its own: it gets its own one."""

    def __init__(self, policy: dict, vec: SocNavGrid, name: str):
        args = command.args_from(ppo_grid_socnav.Args, policy["args"], name)
        own = envs.make_vec(args.env_id, 1, training=False, split="test", **args.env_kwargs)
        agent = ppo_grid_socnav.make_grid_agent(own, args)
        run.load_agent(agent, policy, args, name)
        self.deployed, self.vec = rollout.Deployed(agent), vec
        self.grid = OccupancyGrid(vec.world, vec.num_envs, own.grid.channels, own.grid.size, own.grid.resolution)

    def __call__(self, obs: dict) -> np.ndarray:
        position = self.vec.crowd.position - self.vec.pose[:2, :, None]
        position = rotate(position, torch.cos(self.vec.pose[2])[:, None], -torch.sin(self.vec.pose[2])[:, None])
        return self.deployed({**obs, "grid": self.grid(self.vec.place.maps, self.vec.pose, position).numpy()})


def steps_per_second(args: Envs, num_envs: int) -> tuple[float, float]:
    """Wall clock over base policy, observation, reward, autoreset and physics; and the same without the policy."""
    vec = envs.make_vec(args.env_id, num_envs, threads=args.threads, training=True, **args.env_kwargs)
    policy = make_policy(args.policy, vec)
    obs, _ = vec.reset(seed=0)
    if hasattr(policy, "reset"):
        policy.reset(np.arange(num_envs), vec)
    for _ in range(50):  # past the start, where nothing touches yet
        obs, *_ = vec.step(policy(obs))
    steps, stepping, begin = 0, 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < args.seconds:
        action = policy(obs)
        before = time.perf_counter()
        obs, *_ = vec.step(action)
        stepping += time.perf_counter() - before
        steps += num_envs * vec.action_repeat
    return steps / elapsed, steps / stepping


def bench_envs(args: Envs) -> None:
    """Raises UserError for settings that cannot be measured."""
    command.check_env_kwargs(args.env_kwargs)
    if min(args.repeats, args.threads, *args.num_envs) < 1 or not args.seconds > 0:
        raise UserError("--repeats, --threads and --num-envs must be at least 1, and --seconds above 0")
    vec = envs.make_vec(args.env_id, 1, **args.env_kwargs)
    if not isinstance(vec, SocNavGrid):
        envs.require_flat_box(vec)
    torch.set_num_threads(args.threads if isinstance(vec, SocNavGrid) else 1)
    print(
        f"{args.env_id}, {args.threads} thread(s), policy {args.policy}; {run.cpu_name()}; commit {run.git_commit()}\n"
    )
    print("| simulations | env steps/s, policy included | env steps/s, environment alone |\n|---|---|---|")
    for num_envs in args.num_envs:
        rates = np.median([steps_per_second(args, num_envs) for _ in range(args.repeats)], axis=0)
        print(f"| {num_envs} | {rates[0]:,.0f} | {rates[1]:,.0f} |", flush=True)
    if args.env_id.removeprefix("envs:") == "LateralControl-v0":
        bench_lateral(args)
    if args.env_id.removeprefix("envs:") == "Ballbot-v0":
        bench_ballbot(args)


def bench_ballbot(args: Envs) -> None:
    """A plain loop over one robot, as the published environment steps (RK4, observation and reward in Python), beside
    the largest batch."""
    vec = envs.make_vec(args.env_id, 1, training=True, **{**args.env_kwargs, "action_repeat": 1})
    model = vec.models[0]
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_RK4
    policy, plain, batched = make_policy(args.policy, vec), [], []
    for repeat in range(args.repeats):
        vec.reset(seed=repeat)
        if hasattr(policy, "reset"):
            policy.reset(np.arange(1), vec)
        plain.append(plain_ballbot(vec, model, policy, args.seconds))
        batched.append(steps_per_second(args, max(args.num_envs))[1])
    ours, theirs = statistics.median(batched), statistics.median(plain)
    print(
        f"\nsteps/s: {max(args.num_envs)} robots {ours:,.0f}, one robot in a plain loop with RK4 {theirs:,.0f}", end=""
    )
    print(f": {ours / theirs:.1f} times as many")


def plain_ballbot(vec: ballbot.Ballbot, model: mujoco.MjModel, policy: rollout.Policy, seconds: float) -> float:
    """Steps a second of one robot, without what its policy takes."""
    data, spent, steps, action = mujoco.MjData(model), 0.0, 0, np.zeros(3)
    start = vec.qpos[0].copy()
    data.qpos[:] = start
    while spent < seconds:
        begin = time.perf_counter()
        rotation = ballbot.rotation_vector(data.qpos[None, ballbot.QUATERNION])[0]
        velocities = [data.qvel[ballbot.ANGULAR_VELOCITY], data.qvel[ballbot.VELOCITY], data.qvel[ballbot.WHEELS] / 10]
        obs = np.concatenate([rotation, *velocities, action, [0]], dtype=np.float32).clip(
            ballbot.OBS_LOW, ballbot.OBS_HIGH
        )
        spent += time.perf_counter() - begin
        action = policy(obs[None])[0]
        begin = time.perf_counter()
        data.ctrl[:] = -ballbot.MAX_TORQUE * action
        mujoco.mj_step(model, data)
        data.qpos[ballbot.DRIVES] = 0
        upright = ballbot.rotation_matrix(data.qpos[None, ballbot.QUATERNION])[0, 2, 2]
        reward = data.qvel[1] / 100 - 1e-4 * np.square(action).sum() + ballbot.ALIVE_REWARD
        if upright < np.cos(np.radians(ballbot.MAX_TILT)) or not np.isfinite(reward):
            mujoco.mj_resetData(model, data)
            data.qpos[:] = start
            if hasattr(policy, "reset"):
                policy.reset(np.arange(1), vec)
        steps += 1
        spent += time.perf_counter() - begin
    return steps / spent


def bench_lateral(args: Envs) -> None:
    """Whole segments a second: the official simulator's loop, one car and all rows of a segment, and ours with 64 cars
    and the scored steps only; and the share of its time that ours spends in the ONNX model."""
    path = args.env_kwargs.get("model_path") or lateral.EMBEDDED
    vec = envs.make_vec(args.env_id, 64, training=False, split="train", threads=args.threads, **args.env_kwargs)
    whole_model = onnxruntime.InferenceSession(path, single_threaded(), providers=["CPUExecutionProvider"])
    plain, batched, share = [], [], []
    for repeat in range(args.repeats):
        begin = time.perf_counter()
        for segment in range(2):
            plain_rollout(whole_model, vec.road, segment + repeat)
        plain.append(2 / (time.perf_counter() - begin))

        vec.reset(seed=repeat)
        action, inside, begin = np.zeros((64, 1)), [], time.perf_counter()
        with patch.object(vec.sim.dynamics, "logits", timed(vec.sim.dynamics.logits, inside)):
            for _ in range(lateral.STEPS):
                vec.step(action)
        elapsed = time.perf_counter() - begin
        batched.append(64 / elapsed)
        share.append(sum(inside) / elapsed)
    ours, theirs = statistics.median(batched), statistics.median(plain)
    print(f"\nsegments/s: ours {ours:.2f}, plain loop {theirs:.2f}: {ours / theirs:.2f} times as many")
    print(f"share of the ONNX model in our time: {statistics.median(share):.0%}")


def timed(function: Callable, durations: list[float]) -> Callable:
    def call(*args: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args)
        durations.append(time.perf_counter() - begin)
        return result

    return call


def single_threaded() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def plain_rollout(
    model: onnxruntime.InferenceSession, road: lateral.Road, segment: int, rows: int = 580
) -> list[float]:
    """One car as the official simulator runs it, from row 20 to its end (ours are cut shorter: the last one repeats),
    with its PID controller. Returns the lateral accelerations."""
    rng = np.random.RandomState(lateral.noise_seed(road.names[segment]))
    row = np.minimum(np.arange(20 + rows), len(road.target[segment]) - 1)
    target, states = road.target[segment][row], np.stack([road.roll, road.v, road.a], axis=-1)[segment][row]
    lat, steer = list(target[:20]), list(road.steer[segment][:20])
    integral = previous = 0.0
    for t in range(20, 20 + rows):
        error = target[t] - lat[-1]
        integral, slope, previous = integral + error, error - previous, error
        action = 0.195 * error + 0.1 * integral - 0.053 * slope
        steer.append(float(np.clip(road.steer[segment][t] if t < lateral.FIRST else action, -2, 2)))
        context = np.column_stack([steer[-20:], states[t - 19 : t + 1]]).astype(np.float32)
        logits = model.run(None, {"states": context[None], "tokens": lateral_model.tokens_of(np.array([lat[-20:]]))})[0]
        p = lateral_model.distribution(logits[0])[-1]  # of all 20 positions, as there
        drawn = lateral_model.BINS[rng.choice(len(p), p=p)]
        lat.append(target[t] if t < lateral.FIRST else float(np.clip(drawn, lat[-1] - 0.5, lat[-1] + 0.5)))
    return lat


def bench_memory(args: Memory) -> None:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, ppo_residual.__file__, "--run-root", folder, "--total-timesteps", "20480"]
        subprocess.run(line, check=True, capture_output=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"ppo_residual.py, 20,480 steps with evaluations and export: {peak:,.0f} MB resident at most")


def main() -> None:
    with command.command_line():
        args = tyro.cli(Envs | Memory | Ppo, description=__doc__)
        benches: dict[type, Callable] = {Envs: bench_envs, Memory: bench_memory, Ppo: bench_ppo}
        benches[type(args)](args)


if __name__ == "__main__":
    main()
