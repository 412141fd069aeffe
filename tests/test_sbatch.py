"""tools/train.sbatch, with commands in place of Slurm's and of the training that only write down what they are told."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# Trains until it is told to stop, if it is to be slow; what it leaves says how it ended
TRAINING = """#!/bin/bash
echo "$(basename "$0") $*" >> called
[[ $* == *evaluate.py* ]] && exit 0
run=$(sed -E 's/.*(--run-name|--resume) ([^ ]*).*/\\2/' <<< "$*")
run=runs/$(basename "$run")
mkdir -p "$run"
if [ -e slow ]; then
    trap 'touch "$run/interrupted.pt"; exit '"$STATUS"'' TERM
    touch started
    for i in {1..200}; do sleep 0.05; done
fi
[ -e broken ] && exit 1
echo '{"status": "completed"}' > "$run/summary.json"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> called
[[ $1 == show ]] && printf 'node7\\nnode8\\n'
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with the commands; runs the job of seed 1000 in it."""
    fakes = {"srun": SRUN, "python": TRAINING, "torchrun": TRAINING, "scontrol": SCONTROL}
    (tmp_path / "bin").mkdir()
    for name, text in fakes.items():
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "tools" / "train.sbatch", tmp_path)

    def job(*arguments, status=143, **variables):
        slurm = {"SLURM_ARRAY_TASK_ID": "1000", "SLURM_JOB_ID": "4711", "STATUS": str(status), **variables}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "train.sbatch", *arguments], cwd=tmp_path, env={**os.environ, "PATH": path, **slurm}
        )

    return job


def called(folder):
    lines = (folder / "called").read_text().splitlines()
    (folder / "called").unlink()
    return lines


EVALUATED = (
    "python tools/evaluate.py runs/socnav_seed1000 --episodes 270 --seed 901000 --json runs/socnav_seed1000/test.json"
)


def test_a_seed_is_trained_and_measured(cluster, tmp_path):
    assert cluster("--gamma", "0.9").wait(timeout=20) == 0
    training = "python ppo_grid_socnav.py --seed 1000 --run-name socnav_seed1000 --gamma 0.9"
    assert called(tmp_path) == [training, EVALUATED]
    assert cluster("--gamma", "0.9").wait(timeout=20) == 0  # queued again while it was measured
    assert called(tmp_path) == [EVALUATED]


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("processes", "status", "runner"), [("1", 143, "python"), ("4", 1, "torchrun")])
def test_a_run_that_is_asked_to_stop_is_queued_again_and_resumed(cluster, tmp_path, signum, processes, status, runner):
    (tmp_path / "slow").touch()
    job = cluster(status=status, PROCESSES=processes)
    until = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signum)
    assert job.wait(timeout=20) == status
    *_, training, requeued = called(tmp_path)
    assert training.startswith(runner)
    assert requeued == "scontrol requeue 4711"
    (tmp_path / "slow").unlink()
    assert cluster(PROCESSES=processes).wait(timeout=20) == 0
    *_, training, evaluated = called(tmp_path)
    assert training.startswith(runner)
    assert training.endswith("ppo_grid_socnav.py --resume runs/socnav_seed1000")
    assert evaluated == EVALUATED
