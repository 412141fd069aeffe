"""What ends processes: signals at the command line, and kill -9 at any moment."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch.utils.tensorboard  # noqa: F401 (the forked processes have it imported)
from helpers import make_quick, same_runs
from test_resume import BATCH, command_line, residual, scalars

import ppo_residual as ppo
from envs import cli
from envs.run import checkpoint_files

ROOT = Path(__file__).parents[1]


def start(args, folder):
    line = [sys.executable, "ppo_residual.py", *command_line(args, folder).split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A shell's background jobs ignore SIGINT, and so would what they start
    restore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return subprocess.Popen(
        line, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **restore
    )


def wait_for(condition, process, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)


def num_rows(folder):
    file = folder / "progress.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else 0


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    """But not one that comes within a second, as from a double press or a launcher that passes it on."""
    folder = tmp_path / "run"
    process = start(residual(folder, num_steps=100_000, total_timesteps=200_000), folder)
    try:
        assert process.stderr.readline().strip() == str(folder)
        status = Path(f"/proc/{process.pid}/status")
        mask = 1 << (signal.SIGTERM - 1)  # until then Ctrl-C ends the set-up
        wait_for(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & mask, process)
        process.send_signal(signal.SIGINT)
        lines = [process.stderr.readline() for _ in range(2)]
        assert lines == ["\n", "stopping after this iteration; press again to stop at once\n"]
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=2) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def train_in_child(line, log):
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    make_quick(pytest.MonkeyPatch())
    sys.argv = ["ppo_residual.py", *line.split()]
    cli.main(ppo.train, ppo.Args)


def test_three_kills_at_random_moments(tmp_path, monkeypatch):
    """Each run continues from its newest checkpoint, and the last one equals a run that nothing stopped."""
    context = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
    context.set_forkserver_preload([__name__])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    forkserver.ensure_running()
    rng, folder, log = random.Random(1), tmp_path / "run", tmp_path / "log"
    args = residual(folder, total_timesteps=12 * BATCH)
    begin, kills = command_line(args, folder), 0
    line = begin
    while True:
        process = context.Process(target=train_in_child, args=(line, str(log)))
        process.start()
        target = num_rows(folder) + rng.randint(0, 2)
        while kills < 3 and process.is_alive() and num_rows(folder) < target:
            time.sleep(0.001)
        if kills < 3:
            time.sleep(rng.uniform(0.0, 0.1))
            process.kill()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        kills += 1
        line = f"--resume {folder}" if checkpoint_files(folder) else begin
        if line == begin:
            shutil.rmtree(folder, ignore_errors=True)
    assert kills == 3
    make_quick(monkeypatch)
    ppo.train(residual(tmp_path / "whole", total_timesteps=12 * BATCH))
    same_runs(folder, tmp_path / "whole")
    assert scalars(folder) == scalars(tmp_path / "whole")
