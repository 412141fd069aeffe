"""tools/bench.py: ratios and rates by hand, and small measurements."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench

from envs import UserError


def test_ratios_by_hand():
    """Round by round 2, 1 and 3 times as fast, although the medians are equal."""
    a, b = bench.ratios({"a": [20.0, 10.0, 60.0], "b": [10.0, 10.0, 20.0]}, "b")
    assert (a["steps/s"], a["ratio to b"], a["first quartile"], a["third quartile"]) == (20, 2, 1.5, 2.5)
    assert (b["steps/s"], b["ratio to b"]) == (10, 1)


def test_steady_rate_leaves_out_warm_up_and_the_last_iteration(tmp_path):
    """100 steps per rollout: 10 s each in the warm-up, then 2 s, and 50 s with the evaluation."""
    seconds = [10, 20, 30, 32, 34, 84]
    rows = [f"{100 * (i + 1)},{100 * (i + 1) / s}" for i, s in enumerate(seconds)]
    (tmp_path / "progress.csv").write_text("\n".join(["step,time/sps", *rows]))
    assert bench.steady_rate(tmp_path) == pytest.approx(50)


def test_environments_from_the_command_line(tmp_path, monkeypatch, capsys):
    flags = f"envs --policy zero --num-envs 1 2 --steps 20 --json {tmp_path / 'a.json'}"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    bench.main()
    first, second = (json.loads(line) for line in (tmp_path / "a.json").read_text().splitlines())
    assert (first["num_envs"], second["num_envs"]) == (1, 2)
    assert min(first["steps/s"], second["steps/s"], second["loop steps/s"]) > 0
    assert first["hardware"]
    assert "| SO101Paper-v0 | 2 |" in capsys.readouterr().out


@pytest.mark.slow
def test_seconds_until_an_evaluation_meets_a_threshold(monkeypatch):
    command = "ppo_residual.py --total-timesteps 4096 --eval-every 2048"
    tasks = {"at once": (command, {"success_rate": 0}), "never": (command, {"success_rate": 2})}
    monkeypatch.setattr(bench, "SPEEDRUNS", tasks)
    at_once, never = bench.bench_speedrun(bench.Speedrun(tasks=("at once", "never"), seeds=(1,)))
    assert 0 < at_once["median, s"] < 60
    assert math.isnan(never["median, s"])


@pytest.mark.slow
def test_training_and_memory():
    contenders = ("eager", "compile")
    results = bench.bench_ppo(bench.Ppo(env_id="Pendulum-v1", contenders=contenders, rounds=1, rollouts=2))
    assert [result["contender"] for result in results] == ["eager", "compile"]
    assert all(result["steps/s"] > 0 for result in results)
    (memory,) = bench.bench_memory(bench.Memory(command=("ppo_residual.py",), minutes=0.2))
    assert 50 < memory["largest, MB"] < 5000
    with pytest.raises(UserError, match=r"ppo_residual\.py .* failed: error: --num-envs must be from 1"):
        bench.bench_memory(bench.Memory(command=("ppo_residual.py", "--num-envs", "0"), minutes=0.2))
