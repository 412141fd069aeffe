"""Several processes train one policy: together they do what one would, and what ends one of them loses nothing."""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, lines, same_runs
from test_ppo_grid_socnav import make_quick

import envs
import ppo_continuous
import ppo_grid_socnav as ppo
from envs import ranks, run
from envs.files import UserError

ROOT = Path(__file__).parents[1]
SCRIPT = ppo
PLACE = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
BATCH, FULL = 128, 512  # steps


def tiny(folder, **kwargs):
    """Settings of a run of four updates that lies in `folder`."""
    settings = {
        "env_kwargs": PLACE, "num_envs": 8, "num_steps": 16, "minibatch_size": 64, "update_epochs": 2,
        "hidden_sizes": (16,), "set_units": 8, "threads": 1, "total_timesteps": FULL, "eval_every": 256,
        "eval_episodes": 2, "checkpoint_every": BATCH, "norm_obs": True, "run_root": str(folder.parent),
        "run_name": folder.name,
    }  # fmt: skip
    return ppo.Args(**{**settings, **kwargs})


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def one_of_two(rank, port, function, results):
    """A process as torchrun starts it."""
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in about.items()})
    torch.set_num_threads(1)
    make_quick(pytest.MonkeyPatch())
    results.put((rank, pickle.dumps(function())))  # a tensor by itself would stay in this process's memory


def in_two(function):
    """What a function, which takes nothing, returns in each of two processes."""
    spawn = multiprocessing.get_context("spawn")
    results, port = spawn.Queue(), free_port()
    processes = [spawn.Process(target=one_of_two, args=(i, port, function, results)) for i in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(timeout=20)
        assert process.exitcode == 0
    return [pickle.loads(found[0]), pickle.loads(found[1])]


# The gradient


def make_agent(args):
    vec = envs.make_vec("SocNavGrid-v0", 1, **PLACE)
    torch.manual_seed(0)
    return ppo.make_grid_agent(vec, args)


def minibatch(agent, size=64):
    """obs, action, old log-probability, advantage, target, old value of samples that differ in all of them."""
    torch.manual_seed(1)
    obs = torch.rand(size, sum(agent.sizes))
    logprob = agent.evaluate_actions(obs, torch.zeros(size, 2))[0].detach() + 0.2 * torch.randn(size)
    advantage = 3 * torch.randn(size) + torch.linspace(-5, 5, size)  # the halves have different moments
    return obs, torch.randn(size, 2), logprob, advantage, torch.randn(size), torch.randn(size)


GRADIENTS = {
    "": {}, "entropy": {"ent_coef": 0.1, "max_grad_norm": 1e9}, "raw": {"norm_adv": False, "clip_value": True},
    "critic": {"critic_only": True}, "fixed": {"fixed": True},
}  # fmt: skip


def gradient_of(change, joint):
    """{parameter: gradient} and the statistics, by one process, or by two of which each has half of the minibatch."""
    critic_only, fixed = (change.pop(name, False) for name in ("critic_only", "fixed"))
    args = ppo.Args(num_envs=8, hidden_sizes=(16,), **change)
    agent = make_agent(args)
    agent.log_std.requires_grad_(not fixed)
    data, compute = minibatch(agent), ppo.compute_gradient
    if joint:
        ranks.join(args)
        data, compute = [ranks.own(x) for x in data], partial(ppo.joint_gradient, compute)
    stats = compute(agent, args, critic_only, *data)
    return {name: p.grad for name, p in agent.named_parameters()}, stats.detach()


def all_gradients(joint):
    return {name: gradient_of(dict(change), joint) for name, change in GRADIENTS.items()}


def test_the_gradient_of_two_processes_is_that_of_one_with_both_halves():
    alone = all_gradients(joint=False)
    for of_rank in in_two(partial(all_gradients, joint=True)):
        for name, (gradient, stats) in alone.items():
            theirs, their_stats = of_rank[name]
            torch.testing.assert_close(their_stats, stats, rtol=0, atol=1e-5)
            for parameter in gradient:
                if gradient[parameter] is None:
                    assert theirs[parameter] is None
                else:
                    torch.testing.assert_close(theirs[parameter], gradient[parameter], rtol=0, atol=1e-5)
    norms = [torch.cat([g.flatten() for g in alone[name][0].values()]).norm() for name in ("", "entropy")]
    assert norms[0] == pytest.approx(0.5, abs=1e-4)  # clipped
    assert norms[1] > 0.55
    assert alone["critic"][0]["actor.1.0.weight"] is None
    assert alone["fixed"][0]["log_std"] is None


# A run


def trained(args):
    """The summary; what the process's environments saw first; rewards of its first rollout, as paid and as learned."""
    seen, paid, learned = [], [], []
    see, collect, learn = ppo.GridAgent.see, ppo.collect, ppo.learn

    def collected(*args):
        batch, *others = collect(*args)
        paid.append(batch.reward)
        return batch, *others

    def learning(agent, optimizer, gradient, args, batch, critic_only):
        learned.append(batch.reward)
        return learn(agent, optimizer, gradient, args, batch, critic_only)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.GridAgent, "see", lambda agent, obs: seen.append(see(agent, obs)) or seen[-1])
        patch.setattr(ppo, "collect", collected)
        patch.setattr(ppo, "learn", learning)
        summary = ppo.train(args)
    return summary, seen[0], paid[0], learned[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory, settings, and what each of two processes got from an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    args = tiny(folder)
    return folder, args, in_two(partial(trained, args))


def test_two_processes_make_one_run(whole):
    folder, _, ((summary, *_), (nothing, *_)) = whole
    assert (summary["status"], summary["steps"], nothing) == ("completed", FULL, {})
    assert [int(row["step"]) for row in run.read_progress(folder / "progress.csv")] == [128, 256, 384, 512]
    assert [line["step"] for line in lines(folder / "evaluations.jsonl")] == [256, 512]
    final = run.load(folder / "final.pt")
    assert final["agent"]["normalizer.count"] == FULL
    assert final["reward_scaler"]["stats.count"] == FULL
    assert final["reward_scaler"]["returns"].shape == (8,)
    one, other = final["envs"], final["other_ranks"][0]["envs"]
    assert one["arrays"]["pose"].shape == other["arrays"]["pose"].shape == (3, 4)
    assert not torch.equal(one["arrays"]["pose"], other["arrays"]["pose"])
    assert not torch.equal(final["rng"]["cpu"], final["other_ranks"][0]["rng"]["cpu"])


def test_two_processes_share_the_environments_of_one(whole):
    _, args, ((_, first, *_), (_, second, *_)) = whole
    vec = envs.make_vec("SocNavGrid-v0", 8, reward=args.reward, **PLACE)
    obs, _ = vec.reset(seed=args.seed)
    together = ppo.make_grid_agent(vec, args).see(ppo.tensors(obs, torch.device("cpu")))
    assert torch.equal(torch.cat([first, second]), together)


def test_the_first_update_learns_from_both_halves(whole):
    """The normaliser, whose statistics are those of the first rollout, has seen all eight environments."""
    folder, *_ = whole
    first = run.load(folder / f"checkpoints/step_{BATCH:09d}.pt")
    assert first["agent"]["normalizer.count"] == BATCH


def test_rewards_of_both_are_scaled_alike(whole):
    folder, _, processes = whole
    scaler = run.load(folder / f"checkpoints/step_{BATCH:09d}.pt")["reward_scaler"]
    assert scaler["stats.count"] == BATCH
    for *_, paid, learned in processes:
        torch.testing.assert_close(learned, paid * torch.rsqrt(scaler["stats.var"] + 1e-8), rtol=1e-4, atol=1e-6)
    assert not torch.equal(processes[0][2], processes[1][2])


def test_episodes_of_both_are_logged_at_the_step_of_the_run(whole):
    folder, *_ = whole
    steps = [line["step"] for line in lines(folder / "episodes.jsonl")]
    assert steps == sorted(steps)
    # all eight begin together and last 25 calls, of 8 steps each, if nothing ends them sooner
    assert len(steps) >= 16
    assert steps.count(25 * 8) > 4


def test_episodes_are_logged_in_the_order_of_their_steps(tmp_path, monkeypatch):
    make_quick(monkeypatch)
    gather = ranks.gather
    monkeypatch.setattr(ranks, "gather", lambda x: [x[::-1]] if isinstance(x, list) else gather(x))
    ppo.train(tiny(tmp_path / "run", num_steps=64))
    steps = [line["step"] for line in lines(tmp_path / "run" / "episodes.jsonl")]
    assert len({*steps}) > 1
    assert steps == sorted(steps)


def test_a_resumed_run_of_two_equals_an_uninterrupted_one(whole):
    folder, args, _ = whole
    path = folder / f"checkpoints/step_{256:09d}.pt"
    in_two(partial(trained, replace(args, resume=str(path), run_name="resumed")))
    same_runs(folder.parent / "resumed", folder)


def test_another_number_of_processes_is_refused(whole):
    folder, args, _ = whole
    half = replace(args, resume=str(folder / "checkpoints/step_000000256.pt"), run_name="alone")
    with pytest.raises(UserError, match="2 processes trained it, not 1; start 2 with torchrun"):
        ppo.train(half)
    assert not (folder.parent / "alone").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_envs": 9, "minibatch_size": 48}, "--num-envs must give each of 2 processes as much, not 9"),
        ({"num_envs": 10, "minibatch_size": 5}, "--minibatch-size must give each of 2 processes as much, not 5"),
        ({"minibatch_size": 2}, "--minibatch-size must give each"),
        ({"group_size": 8}, "--group-size 8 must divide the environments of each of 2 processes"),
    ],
)
def test_settings_that_do_not_divide(change, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        ppo.train(tiny(tmp_path / "run", **change))


def test_one_process_may_have_one_environment(tmp_path, monkeypatch):
    make_quick(monkeypatch)
    summary = ppo.train(tiny(tmp_path / "run", num_envs=1, num_steps=128))
    assert (summary["status"], summary["steps"]) == ("completed", FULL)


def test_the_other_scripts_are_for_one_process(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(*command("--dry-run", ppo_continuous), "ppo_continuous.py trains in one process.*without torchrun")
    assert_refused(*command("--evaluate pursuit"), "--evaluate .*without torchrun")


# Started again by torchrun


def test_a_process_that_starts_again_goes_on_where_the_run_ends(whole, tmp_path, monkeypatch):
    folder, args, _ = whole
    assert ranks.join(args) is args
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.join(args) == replace(args, resume=str(folder))
    elsewhere = replace(args, resume=str(folder / "checkpoints/step_000000128.pt"), run_name=None)
    assert ranks.continued(elsewhere).resume == str(folder)
    begun = tmp_path / "begun"
    assert ranks.continued(tiny(begun)) == tiny(begun)
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "config.json").write_text("{}")
    assert ranks.continued(tiny(begun)) == tiny(begun)
    assert not begun.exists()
    (aside,) = tmp_path.glob("begun.*")
    assert (aside / "config.json").exists()


def test_restarts_need_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="--max-restarts needs a --run-name"):
        ppo.train(tiny(tmp_path / "run", run_name=None))


def torchrun(args, *options):
    """torchrun with two processes of the script."""
    names = ["num_envs", "num_steps", "minibatch_size", "update_epochs", "set_units", "threads", "total_timesteps"]
    names += ["eval_every", "eval_episodes", "checkpoint_every", "run_root", "run_name"]
    flags = [x for name in names for x in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    flags += ["--hidden-sizes", "16", "--norm-obs", "--env-kwargs", *(str(x) for pair in PLACE.items() for x in pair)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
         "ppo_grid_socnav.py", *flags],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def worker(launcher, rank):
    """The process of that rank; None while there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):  # it has just ended
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    return None


def wait_for(condition, launcher, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert launcher.poll() is None, launcher.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def rows(folder):
    return len(run.read_progress(folder / "progress.csv"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_run_whose_workers_are_killed_completes(tmp_path):
    args = tiny(tmp_path / "killed", total_timesteps=128 * 120, eval_every=128 * 30, checkpoint_every=128 * 7)
    launcher = torchrun(args, "--max-restarts", "3")
    folder = tmp_path / "killed"
    for rank in (1, 0):
        before = rows(folder)
        wait_for(lambda before=before: rows(folder) > before + 20, launcher)
        victim = worker(launcher, rank)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda rank=rank, victim=victim: worker(launcher, rank) not in (victim, None), launcher)
    text, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, text
    assert "Traceback" not in text
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", args.total_timesteps)
    assert len(run.read_json(folder / "config.json")["resumed"]) == 2
    whole = torchrun(replace(args, run_name="whole"))
    assert whole.wait(timeout=300) == 0
    same_runs(folder, tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_run_that_can_be_resumed(tmp_path):
    args = tiny(tmp_path / "stopped", total_timesteps=128 * 60, eval_every=0, checkpoint_every=0)
    launcher, folder = torchrun(args), tmp_path / "stopped"
    wait_for(lambda: rows(folder) > 20, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=30)
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    stopped = run.load_checkpoint(folder / "interrupted.pt")
    assert 0 < stopped["step"] < args.total_timesteps
    assert len(stopped["other_ranks"]) == 1
