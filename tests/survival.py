"""Runs the scripts in processes that can be killed a hundred times: forked from one that has imported them all, which
makes a start a matter of milliseconds. What a child is doing it notes in memory that it shares with the test."""

import copy
import functools
import importlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bc_pretrain
import ppo_continuous
import ppo_grid_socnav
import ppo_residual
from envs import demonstrations, rollout, run
from envs.socnav import environment

SCRIPTS = {module.__name__: module for module in (ppo_continuous, ppo_residual, ppo_grid_socnav, bc_pretrain)}
# What a child can be doing: {name: where the function is that does it}
PHASES = {
    "opening": (run.Run, "__init__"),
    "rollout": "collect",
    "update": "learn",
    "epoch": "fit_epoch",
    "evaluation": (rollout, "evaluate"),
    "playing": (rollout, "rollout"),
    "saving": (run, "save"),
    "logging": (run.Run, "log"),
    "json": (run, "write_json"),
    "export": (run, "export_onnx"),
    "packing": (demonstrations.Writer, "finish"),
    "closing": (run.Run, "__exit__"),
}
NAMES = ["starting", "between", *PHASES]
SHARED = multiprocessing.get_context("forkserver")
SERVER = "SURVIVAL_SERVER"  # set in the process that children are forked from, to whether they export policies
ROOT = Path(__file__).parents[1]


def start_server(export: bool) -> None:
    """It imports this module before it forks the first child. Without `export` a file that says nothing takes the place
    of an exported policy, for which a tiny run needs longer than for all else."""
    SHARED.set_forkserver_preload(["survival"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(SERVER, "export" if export else "placeholder")
        forkserver.ensure_running()


def noted(function: Callable, number: int, phase: Any) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before, phase.value = phase.value, number
        try:
            return function(*args, **kwargs)
        finally:
            phase.value = before

    return call


def short_world(*args: Any, **kwargs: Any) -> Any:
    """Episodes of 25 steps."""
    world = copy.copy(load_world(*args, **kwargs))
    world.limit = world.limit.clamp(max=25)
    return world


def placeholder(agent: Any, obs: Any, path: Path, *about: Any) -> None:
    run.write_whole(path, b"onnx")


load_world = environment.load_world
if SERVER in os.environ:
    torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())  # the first optimiser imports a compiler
if os.environ.get(SERVER) == "export":  # a first one imports what all others then have
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # or the export begins a thread
    bound = np.ones(1, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        agent = ppo_continuous.Agent(2, -bound, bound, ppo_continuous.Args())
        run.export_onnx(agent, 2, Path(folder) / "policy.onnx", "policy", {})
    assert len(os.listdir("/proc/self/task")) == 1, "only a process without threads can be forked"


def play(script: str, argv: list[str], log: str, phase: Any) -> None:
    """What the child does: the script's main()."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.argv, environment.load_world = [f"{script}.py", *argv], short_world
    module = importlib.import_module(script)
    if os.environ[SERVER] == "placeholder":
        run.export_onnx = placeholder
    for name, place in PHASES.items():
        owner, attribute = (module, place) if isinstance(place, str) else place
        if hasattr(owner, attribute) and (script, name) != ("bc_pretrain", "rollout"):
            setattr(owner, attribute, noted(getattr(owner, attribute), NAMES.index(name), phase))
    phase.value = NAMES.index("between")
    sys.exit(module.main())


class Child:
    """A script that runs in a process of its own. log: where its output goes."""

    def __init__(self, script: str, argv: list[str], log: Path):
        self.phase, self.log = SHARED.RawValue("i", 0), log
        log.unlink(missing_ok=True)
        self.process = SHARED.Process(target=play, args=(script, argv, str(log), self.phase))
        self.process.start()

    def doing(self) -> str:
        return NAMES[self.phase.value]

    def alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = 60) -> int:
        """Its status, as a shell has it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{' '.join(self.text())}: did not end while it was {self.doing()}")
        code = self.process.exitcode
        return code if code >= 0 else 128 - code

    def text(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line] if self.log.exists() else []

    def strike(self, signum: int, rng: random.Random, phases: list[str]) -> tuple[str, float] | None:
        """Send a signal at a random moment of a random phase. What it was doing and when that was; None if it ended
        before."""
        target, times, delay = rng.choice(phases), rng.choice((1, 1, 1, 2, 3, 5)), rng.choice((0.0, 0.002, 0.02, 0.3))
        aim, inside = NAMES.index(target), False
        while self.alive() and times > 0:
            now = self.phase.value == aim
            times -= now and not inside
            inside = now
            time.sleep(0.0002)
        time.sleep(delay * rng.random())
        if not self.alive():
            return None
        doing, moment = self.doing(), time.monotonic()
        os.kill(self.process.pid, signum)
        if signum == signal.SIGKILL and self.wait() == 0:  # it ended just then
            return None
        return doing, moment


def settings(script: str, root: Path, name: str) -> Any:
    """Settings of a run of a second; their networks and rollouts are tiny, and checkpoints frequent."""
    common = {
        "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 2, "hidden_sizes": (16, 16),
        "total_timesteps": 384, "eval_every": 128, "eval_episodes": 2, "checkpoint_every": 64, "eval_first": 1,
        "run_root": str(root), "run_name": name,
    }  # fmt: skip
    if script == "ppo_residual":
        return ppo_residual.Args(**{**common, "norm_reward": True, "env_kwargs": {"frame_margin": 0.12}})
    if script == "ppo_continuous":
        own = {"num_envs": 4, "num_steps": 16, "group_size": 2, "critic_warmup": 1, "final_log_std": -3.0}
        return ppo_continuous.Args.tuned("LateralControl-v0", **{**common, **own, "init_log_std": -1.0})
    if script == "ppo_grid_socnav":
        place = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
        own = {"num_envs": 4, "num_steps": 16, "set_units": 8, "threads": 1, "norm_obs": True, "norm_reward": True}
        return ppo_grid_socnav.Args(**{**common, **own, "env_kwargs": place})
    small = {"epochs": 12, "hidden_sizes": (8,), "minibatch_size": 256, "eval_episodes": 2}
    return bc_pretrain.Args("demos", **small, run_root=str(root), run_name=name)


def begin(script: str, root: Path, name: str) -> list[str]:
    """The command line that begins this run."""
    args = settings(script, root, name)
    if script == "bc_pretrain":
        line = ["train", "--dataset", args.dataset, "--epochs", str(args.epochs), "--hidden-sizes", "8"]
        line += ["--minibatch-size", str(args.minibatch_size), "--eval-episodes", "2"]
        return [*line, "--run-root", str(root), "--run-name", name]
    config = root / f"{script}.json"
    if not config.exists():
        run.write_json(config, asdict(args))
    return ["--config", str(config), "--run-root", str(root), "--run-name", name]


# python -c SMALL SCRIPT ...: a process as any other, but for the short episodes
SMALL = """import importlib, sys
import survival
from envs.socnav import environment
environment.load_world, script = survival.short_world, sys.argv.pop(1)
importlib.import_module(script).main()"""
