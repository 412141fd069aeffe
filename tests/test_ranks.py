"""Several processes (ranks) train one policy: together they compute what one would, and what ends one loses nothing.

`torchrun test_ranks.py checks FOLDER` runs what the tests look at in two ranks; `torchrun test_ranks.py train FLAGS` is
ppo_grid_socnav.py with short episodes and without export."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import lines, make_quick, rows, same_runs

import envs
import ppo_grid_socnav as ppo
from envs import UserError, cli, run
from envs import distributed as dist
from envs.evaluation import read_pt

ROOT = Path(__file__).parents[1]
PLACE = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
BATCH, FULL = 128, 512  # steps


def tiny(folder, **kwargs):
    """Settings of a run of four iterations."""
    settings = {
        "env_kwargs": PLACE, "num_envs": 8, "num_steps": 16, "minibatch_size": 64, "update_epochs": 2,
        "hidden_sizes": (16,), "pedestrian_hidden": 8, "threads": 1, "total_timesteps": FULL, "eval_every": 256,
        "eval_episodes": 2, "checkpoint_every": BATCH, "run_root": str(folder.parent), "run_name": folder.name,
    }  # fmt: skip
    return ppo.Args(**{**settings, **kwargs})


def torchrun(*line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, *line]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# What two ranks compute

GRADIENTS = {
    "default": {}, "entropy": {"ent_coef": 0.1, "max_grad_norm": 1e9}, "raw": {"norm_adv": False, "clip_vloss": True},
    "critic": {"critic_only": True}, "fixed": {"fixed": True},
}  # fmt: skip


def gradient(critic_only=False, fixed=False, **change):
    """{parameter: gradient} and the statistics, of one process, or of two that have a half of the minibatch each."""
    args = ppo.Args(num_envs=8, hidden_sizes=(16,), **change)
    torch.manual_seed(0)
    vec = envs.make_vec("SocNavGrid-v0", 1, **PLACE)
    agent = ppo.make_grid_agent(vec, args)
    agent.log_std.requires_grad_(not fixed)
    size, features = 64, agent.encode_obs(ppo.to_tensors(vec.reset(seed=0)[0], torch.device("cpu"))).shape[1]
    obs = torch.rand(size, features)
    logprob = agent.evaluate_actions(obs, torch.zeros(size, 2))[0].detach() + 0.2 * torch.randn(size)
    advantage = 3 * torch.randn(size) + torch.linspace(-5, 5, size)  # the halves have different moments
    minibatch = {
        "obs": obs, "action": torch.randn(size, 2), "logprob": logprob, "advantage": advantage,
        "returns": 10 * torch.randn(size), "value": torch.randn(size),
    }  # fmt: skip
    backward = ppo.backward
    if dist.world_size() > 1:
        minibatch = {name: dist.local_shard(x) for name, x in minibatch.items()}
        backward = partial(ppo.all_reduce_backward, backward)
    stats = backward(agent, list(agent.parameters()), minibatch, args, critic_only)
    return {name: p.grad for name, p in agent.named_parameters()}, stats


def train_and_look(args):
    """The summary; the first observations; rewards of the first rollout, as they were and as they are learned from."""
    seen, rewards, scaled = [], [], []
    encode_obs, collect_rollout, make_batch = ppo.GridAgent.encode_obs, ppo.collect_rollout, ppo.make_batch

    def collect(*args):
        rollout, *others = collect_rollout(*args)
        rewards.append(rollout.reward)
        return rollout, *others

    def make(agent, rollout, args):
        scaled.append(rollout.reward)
        return make_batch(agent, rollout, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.GridAgent, "encode_obs", lambda self, obs: seen.append(encode_obs(self, obs)) or seen[-1])
        patch.setattr(ppo, "collect_rollout", collect)
        patch.setattr(ppo, "make_batch", make)
        summary = ppo.train(args)
    return {"summary": summary["status"], "obs": seen[0], "reward": rewards[0], "scaled": scaled[0]}


def signal_at_call(patch, number):
    """SIGTERM to rank 0 before the number-th update."""
    ppo_update, calls = ppo.ppo_update, []

    def update(*args):
        calls.append(1)
        if len(calls) == number and dist.rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        return ppo_update(*args)

    patch.setattr(ppo, "ppo_update", update)


def checks(folder):
    """In each rank: the gradients, a run, and the same run stopped by a signal to rank 0 and resumed."""
    args = tiny(folder / "whole")
    dist.init_process_group(args)
    gradients = {name: gradient(**change) for name, change in GRADIENTS.items()}
    result = {"gradients": gradients, **train_and_look(args)}
    with pytest.MonkeyPatch.context() as patch:
        signal_at_call(patch, 2)
        result["stopped"] = ppo.train(replace(args, run_name="resumed"))
    dist.all_gather_object(None)  # rank 0 has written interrupted.pt
    ppo.train(replace(args, resume=str(folder / "resumed"), run_name=None))
    torch.save(result, folder / f"rank{dist.rank()}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The directory of the checks, and what each rank returned."""
    folder = tmp_path_factory.mktemp("ranks")
    process = torchrun("checks", str(folder))
    try:
        text, _ = process.communicate(timeout=200)
    finally:
        process.terminate()
    assert process.returncode == 0, text
    return folder, [torch.load(folder / f"rank{i}.pt") for i in range(2)]


def test_the_gradient_of_two_ranks_is_that_of_one_process(two):
    alone = {name: gradient(**change) for name, change in GRADIENTS.items()}
    for rank in two[1]:
        for name, (gradients, stats) in alone.items():
            theirs, their_stats = rank["gradients"][name]
            torch.testing.assert_close(their_stats, stats, rtol=0, atol=1e-5)
            for parameter, expected in gradients.items():
                if expected is None:
                    assert theirs[parameter] is None
                else:
                    torch.testing.assert_close(theirs[parameter], expected, rtol=0, atol=1e-5)
    norms = [torch.cat([g.flatten() for g in alone[name][0].values()]).norm() for name in ("default", "entropy")]
    assert norms[0] == pytest.approx(0.5, abs=1e-4)  # clipped
    assert norms[1] > 0.55
    assert alone["critic"][0]["actor.1.0.weight"] is None
    assert alone["fixed"][0]["log_std"] is None


def test_two_ranks_make_one_run(two):
    folder, ranks = two[0] / "whole", two[1]
    assert [rank["summary"] for rank in ranks] == ["completed"] * 2
    assert [int(row["step"]) for row in rows(folder / "progress.csv")] == [128, 256, 384, 512]
    assert [line["step"] for line in lines(folder / "evaluations.jsonl")] == [256, 512]
    final = read_pt(folder / "final.pt")
    assert final["reward_scaler"]["stats.count"] == FULL
    assert final["reward_scaler"]["returns"].shape == (8,)
    (other,) = final["other_ranks"]
    assert final["envs"]["arrays"]["pose"].shape == other["envs"]["arrays"]["pose"].shape == (3, 4)
    assert not torch.equal(final["envs"]["arrays"]["pose"], other["envs"]["arrays"]["pose"])
    assert not torch.equal(final["rng"]["cpu"], other["rng"]["cpu"])


def test_a_signal_to_rank_0_stops_both_and_the_resumed_run_equals_an_uninterrupted_one(two):
    folder, ranks = two
    for rank in ranks:
        assert (rank["stopped"]["status"], rank["stopped"]["signal"]) == ("interrupted", signal.SIGTERM)
    assert ranks[0]["stopped"]["steps"] == 256
    assert json.loads((folder / "resumed/summary.json").read_text())["resumed_from_step"] == 256
    same_runs(folder / "resumed", folder / "whole")


def test_another_number_of_ranks_is_refused(two):
    source = two[0] / "whole/checkpoints/step_000000256.pt"
    with pytest.raises(UserError, match="2 processes trained it, not 1; start 2 with torchrun"):
        ppo.train(tiny(two[0] / "alone", resume=str(source)))
    assert not (two[0] / "alone").exists()


# What ends them


def workers(launcher):
    """{rank: process id} of the processes that torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):  # it has just ended
            continue
        if parent == launcher.pid:
            found |= {i: int(folder.name) for i in range(2) if f"RANK={i}".encode() in environment}
    return found


def wait_for_rows(folder, count, launcher):
    until = time.monotonic() + 120
    while not (folder / "progress.csv").exists() or len(rows(folder / "progress.csv")) < count:
        assert launcher.poll() is None, launcher.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_ends_when_a_worker_is_killed(tmp_path):
    """SIGTERM leaves interrupted.pt; the resumed run loses a worker, which ends the job; the next one completes it."""
    folder = tmp_path / "run"
    args = tiny(folder, total_timesteps=40 * BATCH, eval_every=0, checkpoint_every=BATCH)
    run.write_json(tmp_path / "config.json", asdict(args))
    flags = ["--config", str(tmp_path / "config.json"), "--run-root", str(tmp_path)]

    launcher = torchrun("train", *flags, "--run-name", "run")
    wait_for_rows(folder, 3, launcher)
    launcher.send_signal(signal.SIGTERM)
    text, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "stopped at step" in text
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    stopped = read_pt(folder / "interrupted.pt")
    assert 3 * BATCH <= stopped["step"] < args.total_timesteps
    assert len(stopped["other_ranks"]) == 1

    launcher = torchrun("train", "--resume", str(folder))
    wait_for_rows(folder, stopped["step"] // BATCH + 3, launcher)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    text, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0, text
    assert not (folder / "final.pt").exists()

    for line in (["--resume", str(folder)], [*flags, "--run-name", "whole"]):
        launcher = torchrun("train", *line)
        text, _ = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, text
    same_runs(folder, tmp_path / "whole")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_quick(pytest.MonkeyPatch())
    what, *sys.argv[1:] = sys.argv[1:]
    if what == "checks":
        checks(Path(sys.argv[1]))
    else:
        cli.main(ppo.train, ppo.Args)
