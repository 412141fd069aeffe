"""A run that was stopped and continued equals one that was not, bit for bit; and what a run leaves in its directory."""

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lines, rows, same, same_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_continuous
import ppo_residual as ppo
from envs import rollout, run, so101

ROOT = Path(__file__).parents[1]
BATCH, HALF, FULL = 64, 192, 384  # steps
SCALARS = {
    "rollout/ep_reward", "rollout/ep_length", "rollout/success_rate_100", "train/approx_kl", "train/clip_fraction",
    "train/entropy_loss", "train/policy_gradient_loss", "train/value_loss", "train/explained_variance",
    "train/learning_rate", "train/residual_magnitude", "eval/mean_reward", "eval/mean_ep_length", "eval/success_rate",
    "time/sps",
}  # fmt: skip


def tiny(folder, **kwargs):
    """Settings of a run of six iterations that lies in `folder`; a wide frame makes episodes short."""
    settings = {
        "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 2, "hidden_sizes": (16, 16),
        "norm_reward": True, "total_timesteps": FULL, "eval_every": 128, "eval_episodes": 2,
        "checkpoint_every": BATCH, "env_kwargs": {"frame_margin": 0.12},
        "run_root": str(Path(folder).parent), "run_name": Path(folder).name,
    }  # fmt: skip
    return ppo.Args(**{**settings, **kwargs})


@pytest.fixture(autouse=True)
def fake_onnx(request, monkeypatch):
    """The export takes longer than a tiny run; where it is not the subject it writes a placeholder."""
    if "real_onnx" not in request.fixturenames:
        monkeypatch.setattr(run, "export_onnx", placeholder)


def placeholder(agent, obs_dim, path, *about):
    path.write_bytes(b"onnx")


@pytest.fixture
def real_onnx():
    """Asked for by tests that need the exported policy."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "export_onnx", placeholder)
        ppo.train(tiny(folder))
    return folder


def cut(whole, folder):
    """The directory as a crash in the iteration after HALF would have left it, but for logs that run ahead."""
    shutil.copytree(whole, folder)
    for file in [folder / "final.pt", folder / "summary.json", *folder.glob("checkpoints/*.pt")]:
        if file.name == "final.pt" or file.name == "summary.json" or int(file.stem.split("_")[1]) > HALF:
            file.unlink()
    return folder


def test_the_uninterrupted_run_has_something_to_compare(whole):
    assert [int(row["step"]) for row in rows(whole / "progress.csv")] == list(range(BATCH, FULL + 1, BATCH))
    assert [line["step"] for line in lines(whole / "evaluations.jsonl")] == [128, 256, 384]
    steps = [line["step"] for line in lines(whole / "episodes.jsonl")]
    assert min(steps) <= HALF < max(steps)
    first, last = (run.load(whole / name) for name in ("checkpoints/step_000000064.pt", "final.pt"))
    assert not torch.equal(first["agent"]["actor.0.weight"], last["agent"]["actor.0.weight"])
    assert last["agent"]["normalizer.count"] == FULL
    assert last["reward_scaler"]["stats.count"] == FULL


@pytest.mark.parametrize("name", [None, "other"])
@pytest.mark.parametrize("source", ["directory", "file"])
def test_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, source, name):
    folder = cut(whole, tmp_path / "run")
    path = folder if source == "directory" else folder / f"checkpoints/step_{HALF:09d}.pt"
    before = (folder / "progress.csv").read_bytes()
    summary = ppo.train(replace(tiny(folder), resume=str(path), run_name=name))
    assert (summary["status"], summary["resumed_from_step"]) == ("completed", HALF)
    same_runs(tmp_path / (name or "run"), whole)
    if name == "other":
        assert (folder / "progress.csv").read_bytes() == before


def test_an_older_checkpoint_file_takes_the_run_back(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    ppo.train(replace(tiny(folder), resume=str(folder / f"checkpoints/step_{BATCH:09d}.pt"), run_name=None))
    same_runs(folder, whole)


class Countdown:
    """Wraps a function: its k-th call (that counts) is interrupted by a signal."""

    def __init__(self, function, k, counts=lambda *args: True):
        self.function, self.left, self.counts = function, k, counts

    def __get__(self, instance, owner):
        return lambda *args: self(instance, *args)

    def __call__(self, *args, **kwargs):
        self.left -= self.counts(*args)
        if self.left == 0:
            self.left = -1
            raise run.Interrupted(signal.SIGTERM)
        return self.function(*args, **kwargs)


def in_rollout(patch):
    env = so101.SO101Paper
    patch.setattr(env, "advance", Countdown(env.advance, 32 * 3 + 5, lambda self, action: self.training))


def in_evaluation(patch):
    patch.setattr(ppo.Corrected, "__call__", Countdown(ppo.Corrected.__call__, 3))


def in_update(patch):
    patch.setattr(ppo, "ppo_loss", Countdown(ppo.ppo_loss, 3 * 4 + 2))


def before_logging(patch):
    patch.setattr(run.Run, "log", Countdown(run.Run.log, 4))


def after_logging(patch):
    patch.setattr(run.Run, "save", Countdown(run.Run.save, 6, lambda self, name, content: name != "interrupted.pt"))


@pytest.mark.parametrize("where", [in_rollout, in_update, in_evaluation, before_logging, after_logging])
def test_interrupted_run_continues_as_if_nothing_had_been(whole, tmp_path, where):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        where(patch)
        with pytest.raises(run.Interrupted):
            ppo.train(tiny(folder))
    summary = json.loads((folder / "summary.json").read_text())
    snapshot = run.load_checkpoint(folder / "interrupted.pt")
    assert summary["status"] == "interrupted"
    assert summary["steps"] == snapshot["step"] > 0
    assert not (folder / "final.pt").exists()
    assert run.find_checkpoint(str(folder)).name in ("interrupted.pt", f"step_{snapshot['step']:09d}.pt")
    ppo.train(replace(tiny(folder), resume=str(folder / "interrupted.pt"), run_name=None))
    same_runs(folder, whole)


def test_ppo_continuous_with_copies_and_a_schedule_continues_as_if_nothing_had_been(tmp_path):
    args = ppo_continuous.Args.tuned(
        "LateralControl-v0", num_envs=4, num_steps=16, minibatch_size=32, update_epochs=2, group_size=2,
        critic_warmup=1, hidden_sizes=(8,), init_log_std=-1.0, final_log_std=-3.0, total_timesteps=FULL,
        eval_every=0, eval_episodes=2, checkpoint_every=BATCH, run_root=str(tmp_path), run_name="whole",
    )  # fmt: skip
    ppo_continuous.train(args)
    folder = cut(tmp_path / "whole", tmp_path / "run")
    summary = ppo_continuous.train(replace(args, resume=str(folder), run_name=None))
    assert (summary["status"], summary["resumed_from_step"]) == ("completed", HALF)
    same_runs(folder, tmp_path / "whole")
    first, last = (run.load(folder / name)["agent"] for name in ("checkpoints/step_000000064.pt", "final.pt"))
    assert first["log_std"].tolist() == [-1.0]
    assert last["log_std"].tolist() == pytest.approx([-1.0 - 2.0 * 5 / 6])
    assert not torch.equal(first["actor.0.weight"], last["actor.0.weight"])


def test_best_policy_follows_a_run_into_another_directory(tmp_path, monkeypatch):
    evaluate, calls = rollout.evaluate, []

    def worse_each_time(*args, **kwargs):
        calls.append(1)
        return {**evaluate(*args, **kwargs), "success_rate": 0.0, "mean_return": -float(len(calls))}

    monkeypatch.setattr(rollout, "evaluate", worse_each_time)
    first = tmp_path / "first"
    ppo.train(tiny(first))
    assert run.load(first / "best.pt")["step"] == 128
    for name in ("best.pt", "final.pt"):
        (first / name).unlink()
    path = first / f"checkpoints/step_{HALF:09d}.pt"
    ppo.train(replace(tiny(tmp_path / "second"), resume=str(path)))
    best = run.load(tmp_path / "second" / "best.pt")
    same(best["agent"], run.load(first / "checkpoints/step_000000128.pt")["agent"])
    assert best["step"] == 128


def test_sigterm_ends_a_run_that_can_be_resumed(tmp_path):
    args = tiny(tmp_path / "run", total_timesteps=64 * 60, eval_every=0, checkpoint_every=640)
    flags = ["num_envs", "num_steps", "minibatch_size", "update_epochs", "total_timesteps", "eval_every"]
    flags += ["eval_episodes", "checkpoint_every", "run_root", "run_name"]
    argv = [x for name in flags for x in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    argv += ["--norm-reward", "--hidden-sizes", "16", "16", "--env-kwargs", "frame_margin", "0.12"]
    process = subprocess.Popen(
        [sys.executable, "ppo_residual.py", *argv], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while len(run.read_progress(tmp_path / "run/progress.csv")) < 3 and time.monotonic() < until:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "Traceback" not in errors
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert 0 < run.load_checkpoint(folder / "interrupted.pt")["step"] < args.total_timesteps
    ppo.train(replace(args, resume=str(folder), run_name=None))
    ppo.train(replace(args, run_name="whole"))
    same_runs(folder, tmp_path / "whole")


def test_a_signal_during_the_export_leaves_a_run_that_can_be_finished(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "export_onnx", raising(run.Interrupted(signal.SIGTERM)))
        with pytest.raises(run.Interrupted):
            ppo.train(tiny(tmp_path / "run"))
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    ppo.train(replace(tiny(folder), resume=str(folder), run_name=None))
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    same_runs(folder, whole)


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_a_changed_base_policy_is_refused(whole, tmp_path):
    folder = cut(whole, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    base = tmp_path / "base.onnx"
    base.write_bytes(b"now")
    then = {"sha256": hashlib.sha256(b"then").hexdigest(), "config": None}
    (folder / "config.json").write_text(json.dumps({**config, "parents": {str(base): then}}))
    with pytest.raises(run.UserError, match="no longer the file"):
        ppo.train(replace(tiny(folder), resume=str(folder), run_name=None))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_config_is_refused(whole, tmp_path, content):
    folder = cut(whole, tmp_path / "run")
    (folder / "config.json").write_text(content)
    with pytest.raises(run.UserError, match=r"config\.json: (not JSON|must hold one JSON object)"):
        ppo.train(replace(tiny(folder), resume=str(folder), run_name=None))


def test_config_tells_how_a_run_began_and_went_on(whole, tmp_path):
    folder = cut(whole, tmp_path / "run")
    before = json.loads((folder / "config.json").read_text())
    ppo.train(replace(tiny(folder), resume=str(folder), run_name=None))
    after = json.loads((folder / "config.json").read_text())
    assert after["start_time"] == before["start_time"]
    assert [part["step"] for part in after["resumed"]] == [HALF]


def test_torn_last_lines_are_cut(whole, tmp_path):
    folder = cut(whole, tmp_path / "run")
    for name, ahead in (
        ("episodes.jsonl", '{"step": 386, "ret'),
        ("evaluations.jsonl", '{"st'),
        ("progress.csv", "44"),
    ):
        with open(folder / name, "a") as file:
            file.write(ahead)
    ppo.train(replace(tiny(folder), resume=str(folder), run_name=None))
    same_runs(folder, whole)


def test_a_finished_run_goes_on_with_a_larger_total_only(tmp_path):
    half = tiny(tmp_path / "run", total_timesteps=HALF, anneal_lr=False, eval_every=64)
    ppo.train(half)
    with pytest.raises(run.UserError, match="complete"):
        ppo.train(replace(half, resume=str(tmp_path / "run"), run_name=None))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"
    ppo.train(replace(half, resume=str(tmp_path / "run"), run_name=None, total_timesteps=FULL))
    ppo.train(replace(half, run_name="whole", total_timesteps=FULL))
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_nothing_else_may_change_on_resume(whole):
    with pytest.raises(run.UserError, match="--gamma"):
        ppo.train(replace(tiny(whole), resume=str(whole), gamma=0.5, total_timesteps=2 * FULL))


def test_a_damaged_checkpoint_is_skipped_and_named(whole, tmp_path, capsys):
    folder = cut(whole, tmp_path / "run")
    newest = folder / f"checkpoints/step_{HALF:09d}.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert ppo.train(replace(tiny(folder), resume=str(folder), run_name=None))["resumed_from_step"] == HALF - BATCH
    assert newest.name in capsys.readouterr().err
    same_runs(folder, whole)


def test_environments_of_gymnasium_resume_with_a_fresh_episode(tmp_path):
    args = tiny(
        tmp_path / "run", env_id="Pendulum-v1", env_kwargs={}, base_policy="zero", act_scale=2.0, checkpoint_every=BATCH
    )
    assert "fresh" not in json.dumps(ppo.train(args))
    summary = ppo.train(
        replace(args, resume=str(tmp_path / "run" / f"checkpoints/step_{HALF:09d}.pt"), run_name="resumed")
    )
    assert summary["status"] == "completed"
    assert summary["best"]["success_rate"] is None
    assert [int(row["step"]) for row in rows(tmp_path / "resumed/progress.csv")] == list(range(BATCH, FULL + 1, BATCH))
    assert "fresh" in json.dumps(json.loads((tmp_path / "resumed/summary.json").read_text()))


def test_the_seed_decides_everything(tmp_path):
    def parameters(name, **kwargs):
        ppo.train(tiny(tmp_path / name, total_timesteps=128, **kwargs))
        return run.load(tmp_path / name / "final.pt")["agent"]

    first = parameters("first")
    same(first, parameters("again"))
    other = parameters("other", seed=2)
    assert not torch.equal(first["actor.0.weight"], other["actor.0.weight"])
    assert not torch.equal(first["normalizer.mean"], other["normalizer.mean"])


def test_training_does_not_depend_on_how_it_is_watched(whole, tmp_path):
    ppo.train(tiny(tmp_path / "run", eval_every=64, eval_episodes=3, checkpoint_every=0, eval_seed=7))
    ours, theirs = run.load(tmp_path / "run/final.pt"), run.load(whole / "final.pt")
    for name in ("agent", "optimizer", "reward_scaler", "envs", "rng"):
        same(ours[name], theirs[name], name)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The directory of a --dry-run and its summary, export included."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    args = tiny(folder, dry_run=True, num_steps=64, total_timesteps=50_000, eval_episodes=100)
    return folder, ppo.train(args)


def test_dry_run_writes_all_files(real_onnx, dry):
    folder, summary = dry
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    expected = {"config.json", "progress.csv", "best.pt", "final.pt", "policy.onnx", "summary.json"}
    assert names - events >= expected | {"evaluations.jsonl", "episodes.jsonl"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert summary["steps"] == 128
    assert lines(folder / "evaluations.jsonl")[0]["episodes"] == 2


def test_tensorboard_and_progress_carry_the_same_scalars(real_onnx, dry):
    events = EventAccumulator(str(dry[0]))
    events.Reload()
    assert set(events.Tags()["scalars"]) == SCALARS
    table = list(csv.DictReader((dry[0] / "progress.csv").open(newline="")))
    assert set(table[0]) == SCALARS | {"step"}
    for name in SCALARS:
        (event,) = events.Scalars(name)
        assert event.step == 128
        assert event.value == pytest.approx(float(table[0][name]), rel=1e-6)


def test_config_says_what_ran(real_onnx, dry):
    config = json.loads((dry[0] / "config.json").read_text())
    assert config["args"]["num_steps"] == 64
    assert config["env_id"] == "SO101Paper-v0"
    assert {"git_commit", "packages", "start_time"} <= config.keys()
    assert {"torch", "gymnasium", "mujoco", "numpy"} <= config["packages"].keys()
    assert "device" in config


def test_summary_has_the_right_checksums(real_onnx, dry):
    folder, summary = dry
    assert summary == json.loads((folder / "summary.json").read_text())
    files = {str(file.relative_to(folder)): file for file in [*folder.rglob("*.pt"), folder / "policy.onnx"]}
    assert summary["sha256"] == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert summary["sha256"].keys() >= {"best.pt", "final.pt", "policy.onnx"}
    assert summary["status"] == "completed"


def test_exported_policy_is_the_best_one(real_onnx, dry):
    import onnxruntime

    vec = so101.SO101Paper(4)
    obs, _ = vec.reset(seed=3)
    agent = ppo.residual_agent(vec, tiny(dry[0]))
    agent.load_state_dict(run.load(dry[0] / "best.pt")["agent"])
    action = onnxruntime.InferenceSession(str(dry[0] / "policy.onnx")).run(["action"], {"obs": obs})[0]
    np.testing.assert_allclose(action, agent(torch.as_tensor(obs)).detach(), rtol=0, atol=1e-5)


class StopHereError(Exception):
    pass


def test_pretrained_is_the_policy_with_a_fresh_optimiser(whole, tmp_path, monkeypatch):
    seen = {}

    def look(agent, optimizer, *args, **kwargs):
        seen.update(agent=agent.state_dict(), optimizer=optimizer.state_dict())
        raise StopHereError

    monkeypatch.setattr(ppo, "learn", look)
    with pytest.raises(StopHereError):
        ppo.train(tiny(tmp_path / "run", pretrained=str(whole), seed=5))
    best = run.load(whole / "best.pt")
    same(dict(seen["agent"]), dict(best["agent"]))
    assert seen["agent"]["normalizer.count"] == best["step"]
    assert seen["optimizer"]["state"] == {}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (
        config["parents"][str(whole / "best.pt")]["sha256"]
        == hashlib.sha256((whole / "best.pt").read_bytes()).hexdigest()
    )


def test_resuming_does_not_need_the_policy_that_the_run_started_from(whole, tmp_path):
    source = tmp_path / "source.pt"
    shutil.copy(whole / "best.pt", source)
    args = tiny(tmp_path / "run", pretrained=str(source), critic_warmup=1)
    ppo.train(args)
    source.unlink()
    path = tmp_path / "run" / f"checkpoints/step_{HALF:09d}.pt"
    ppo.train(replace(args, resume=str(path), run_name="resumed"))
    same_runs(tmp_path / "resumed", tmp_path / "run")
