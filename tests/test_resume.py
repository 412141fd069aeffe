"""A run that was stopped and resumed equals one that was not, bit for bit; and what a run leaves in its directory.

The scripts train in this process. test_survival.py starts processes."""

import csv
import errno
import hashlib
import importlib.machinery
import json
import os
import shutil
import signal
import sys
import threading
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import assert_refused, lines, make_quick, rows, same, same_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_continuous
import ppo_grid_socnav
import ppo_residual as ppo
from envs import UserError, cli, run, so101
from envs.evaluation import read_pt
from envs.run import read_checkpoint

SCRIPT = ppo
BATCH, HALF, FULL = 64, 192, 384  # steps
SCALARS = {
    "rollout/ep_reward", "rollout/ep_length", "rollout/success_rate_100", "train/approx_kl", "train/clip_fraction",
    "train/entropy_loss", "train/policy_gradient_loss", "train/value_loss", "train/explained_variance",
    "train/learning_rate", "train/residual_magnitude", "eval/mean_reward", "eval/mean_ep_length", "eval/success_rate",
    "time/sps",
}  # fmt: skip
COMMON = {
    "minibatch_size": 32, "update_epochs": 2, "hidden_sizes": (16,), "total_timesteps": FULL, "eval_every": 128,
    "eval_episodes": 2, "checkpoint_every": BATCH,
}  # fmt: skip


def residual(folder, **kwargs):
    """Settings of a run of six iterations; a wide frame makes episodes short."""
    own = {"num_envs": 2, "num_steps": 32, "norm_reward": True, "env_kwargs": {"frame_margin": 0.12}}
    return ppo.Args(**{**COMMON, **own, "run_root": str(folder.parent), "run_name": folder.name, **kwargs})


def lateral(folder, **kwargs):
    own = {"num_envs": 4, "num_steps": 16, "group_size": 2, "critic_warmup_updates": 1, "eval_every": 0}
    args = {**COMMON, **own, "run_root": str(folder.parent), "run_name": folder.name, **kwargs}
    return ppo_continuous.Args.from_preset("LateralControl-v0", **args)


def grid(folder, **kwargs):
    place = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
    own = {"num_envs": 4, "num_steps": 16, "pedestrian_hidden": 8, "threads": 1, "final_log_std": -2.0}
    args = {**COMMON, **own, "env_kwargs": place, "run_root": str(folder.parent), "run_name": folder.name}
    return ppo_grid_socnav.Args(**args | kwargs)


SETTINGS = {ppo: residual, ppo_continuous: lateral, ppo_grid_socnav: grid}


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "real_export" not in request.fixturenames:
        make_quick(monkeypatch)


@pytest.fixture
def real_export():
    """Requested by tests that need the exported policy."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(script): the directory of a run that nothing stops. Each is made once."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def folder_of(script=ppo):
        if script not in folders:
            folders[script] = root / script.__name__
            script.train(SETTINGS[script](folders[script]))
        return folders[script]

    return folder_of


@pytest.fixture
def whole(uninterrupted):
    return uninterrupted()


def cut(whole, folder):
    """The directory as a crash in the iteration after HALF would leave it, with logs that run ahead."""
    shutil.copytree(whole, folder)
    for file in [folder / "final.pt", folder / "summary.json", *folder.glob("checkpoints/*.pt")]:
        if file.parent == folder or int(file.stem.split("_")[1]) > HALF:
            file.unlink()
    return folder


def scalars(folder):
    """{name: [(step, value)]} that TensorBoard shows, without what depends on the machine. Sorted, because it reads the
    files of one process and second in the order of their names."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name != "time/sps"]
    return {name: sorted((event.step, event.value) for event in events.Scalars(name)) for name in names}


def at_call(patch, owner, name, number, action, counts=lambda *args: True):
    """Call `action` before the number-th call (of those that count) of a function."""
    function, calls = getattr(owner, name), 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += counts(*args)
        if calls == number:
            calls += 10**9
            action()
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


def send(signum):
    return lambda: signal.raise_signal(signum)


def status(folder):
    return json.loads((folder / "summary.json").read_text())["status"]


def command_line(args, folder):
    """Flags of a run with these settings."""
    config = folder.parent / f"{folder.name}.json"
    run.write_json(config, asdict(args))
    return f"--config {config} --run-root {folder.parent} --run-name {folder.name}"


# Resume equality


def test_the_uninterrupted_run_has_something_to_compare(whole, uninterrupted):
    assert [int(row["step"]) for row in rows(whole / "progress.csv")] == list(range(BATCH, FULL + 1, BATCH))
    assert [line["step"] for line in lines(whole / "evaluations.jsonl")] == [128, 256, 384]
    steps = [line["step"] for line in lines(whole / "episodes.jsonl")]
    assert min(steps) <= HALF < max(steps)
    first, last = (read_pt(whole / name) for name in ("checkpoints/step_000000064.pt", "final.pt"))
    assert not torch.equal(first["agent"]["actor.0.weight"], last["agent"]["actor.0.weight"])
    assert last["agent"]["normalizer.count"] == last["reward_scaler"]["stats.count"] == FULL
    assert read_pt(whole / "best.pt")["step"] == 128  # chosen before the run is stopped
    assert len(lines(uninterrupted(ppo_grid_socnav) / "episodes.jsonl")) > 4
    log_std = read_pt(uninterrupted(ppo_continuous) / "final.pt")["agent"]["log_std"]
    assert log_std.tolist() == pytest.approx([-1.0 - 2.0 * 5 / 6])  # the schedule from -1 to -3


@pytest.mark.parametrize(
    ("script", "where", "number", "signum", "step"),
    [
        (ppo, (ppo.Agent, "sample"), 70, signal.SIGTERM, HALF),
        (ppo, (ppo, "ppo_loss"), 10, signal.SIGINT, HALF),
        (ppo, (run.Run, "evaluate"), 2, signal.SIGUSR1, 256),
        (ppo_continuous, (ppo_continuous, "ppo_loss"), 10, signal.SIGTERM, HALF),
        (ppo_grid_socnav, (ppo_grid_socnav.GridAgent, "sample"), 40, signal.SIGTERM, HALF),
    ],
    ids=["rollout", "update", "evaluation", "lateral", "grid"],
)
def test_a_signal_stops_a_run_after_its_iteration_and_resuming_completes_it(
    uninterrupted, tmp_path, command, monkeypatch, script, where, number, signum, step
):
    folder, handler = tmp_path / "run", signal.getsignal(signum)
    with monkeypatch.context() as patch:
        at_call(patch, *where, number, send(signum))
        code, errors = command(command_line(SETTINGS[script](folder), folder), script)
    assert code == 128 + signum
    assert errors[-1] == f"stopped at step {step}; continue with --resume {folder}"
    assert signal.getsignal(signum) is handler
    assert status(folder) == "interrupted"
    assert read_checkpoint(str(folder))["file"] == str(folder / "interrupted.pt")
    assert read_pt(folder / "interrupted.pt")["step"] == step
    if script is ppo:  # the evaluation of this iteration was made, the next one was not
        assert [line["step"] for line in lines(folder / "evaluations.jsonl")] == [s for s in (128, 256) if s <= step]

    assert command(f"--resume {folder}", script)[0] == 0
    same_runs(folder, uninterrupted(script))
    assert scalars(folder) == scalars(uninterrupted(script))
    assert not (folder / "interrupted.pt").exists()
    config = json.loads((folder / "config.json").read_text())
    assert [part["step"] for part in config["resumed"]] == [step]


def test_a_signal_during_the_export_lets_the_run_finish(whole, tmp_path, command, monkeypatch):
    folder = tmp_path / "run"
    at_call(monkeypatch, run, "export_onnx", 1, send(signal.SIGTERM))
    assert command(command_line(residual(folder), folder))[0] == 0
    assert status(folder) == "completed"
    assert (folder / "policy.onnx").exists()
    assert not (folder / "interrupted.pt").exists()
    same_runs(folder, whole)


def test_ctrl_c_during_setup(tmp_path, command, monkeypatch):
    at_call(monkeypatch, ppo, "make_envs", 1, send(signal.SIGINT))
    assert command(f"--run-root {tmp_path}") == (130, ["interrupted"])
    assert not any(tmp_path.iterdir())


def test_training_in_a_thread_installs_no_handler(whole, tmp_path, monkeypatch):
    before, seen, summary = [signal.getsignal(s) for s in run.STOP_SIGNALS], [], {}
    at_call(monkeypatch, ppo, "ppo_update", 1, lambda: seen.extend(signal.getsignal(s) for s in run.STOP_SIGNALS))
    thread = threading.Thread(target=lambda: summary.update(ppo.train(residual(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert summary["status"] == "completed"
    assert seen == before
    same_runs(tmp_path / "run", whole)


def test_a_failing_environment_costs_at_most_a_minute_and_an_iteration(whole, tmp_path, command, monkeypatch):
    now, folder = 0.0, tmp_path / "run"

    def pass_time(*args):
        nonlocal now
        now += 25
        return False

    def fail():
        raise RuntimeError("the motor is stuck")

    with monkeypatch.context() as patch:
        patch.setattr(run, "time", types.SimpleNamespace(time=time.time, monotonic=lambda: now))
        at_call(patch, ppo, "collect_rollout", -1, fail, pass_time)
        at_call(patch, so101.SO101Paper, "advance", 5 * 32 + 7, fail, lambda self, action: self.training)
        with pytest.raises(RuntimeError, match="the motor is stuck"):  # with its traceback
            command(command_line(residual(folder, checkpoint_every=0), folder))
    assert now == 150
    assert [str(file.relative_to(folder)) for file in folder.rglob("*.pt")] == ["best.pt", "checkpoints/latest.pt"]
    assert read_pt(folder / "checkpoints/latest.pt")["step"] == HALF  # at 75 s
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"], summary["steps"]) == ("failed", "the motor is stuck", 5 * BATCH)
    assert command(f"--resume {folder}")[0] == 0
    same_runs(folder, whole)
    assert not (folder / "checkpoints/latest.pt").exists()


def test_a_checkpoint_continues_in_another_directory(whole, tmp_path, monkeypatch):
    folder, new = cut(whole, tmp_path / "run"), tmp_path / "exp" / "pair"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    source = str(folder / "checkpoints/step_000000128.pt")
    with monkeypatch.context() as patch:
        at_call(patch, ppo, "ppo_update", 2, send(signal.SIGTERM))
        summary = ppo.train(residual(folder, resume=source, run_name="exp/pair"))
    assert (summary["status"], summary["resumed_from_step"], summary["steps"]) == ("interrupted", 128, 256)
    ppo.train(residual(folder, resume=str(new), run_name=None))
    same_runs(new, whole)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_standalone_checkpoint_needs_a_run_name(whole, tmp_path):
    file = tmp_path / "alone.pt"
    shutil.copy(whole / f"checkpoints/step_{HALF:09d}.pt", file)
    args = residual(tmp_path / "run", resume=str(file))
    with pytest.raises(UserError, match=r"alone\.pt: not in a run directory; give a new one with --run-name"):
        ppo.train(replace(args, run_name=None))
    ppo.train(args)
    for name in ("final.pt", "best.pt"):
        ours, theirs = read_pt(tmp_path / "run" / name), read_pt(whole / name)
        same({**ours, "args": None}, {**theirs, "args": None})
    assert [row["step"] for row in rows(tmp_path / "run/progress.csv")] == ["256", "320", "384"]


def test_an_older_checkpoint_takes_the_run_back(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    ppo.train(residual(folder, resume=str(folder / f"checkpoints/step_{BATCH:09d}.pt"), run_name=None))
    same_runs(folder, whole)


def test_torn_last_lines_are_cut(whole, tmp_path):
    folder = cut(whole, tmp_path / "run")
    for name, ahead in {
        "episodes.jsonl": '{"step": 386, "ret',
        "evaluations.jsonl": '{"st',
        "progress.csv": "44",
    }.items():
        with open(folder / name, "a") as file:
            file.write(ahead)
    ppo.train(residual(folder, resume=str(folder), run_name=None))
    same_runs(folder, whole)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:1000], lambda content: content[:3000] + b"?" + content[3001:]]
)
def test_a_damaged_checkpoint_is_skipped_and_named(whole, tmp_path, command, damage):
    folder = cut(whole, tmp_path / "run")
    newest = folder / f"checkpoints/step_{HALF:09d}.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert_refused(*command(f"--resume {newest}"), f"{newest}: damaged or not a checkpoint .*use another file")
    code, errors = command(f"--resume {folder}")
    assert code == 0
    assert [line for line in errors if "skipped" in line and newest.name in line]
    assert json.loads((folder / "summary.json").read_text())["resumed_from_step"] == HALF - BATCH
    same_runs(folder, whole)


def test_a_converged_run_that_was_stopped_trains_no_further(tmp_path, monkeypatch):
    """Three evaluations in a row meet the criterion in the iteration in which the signal comes."""
    args = residual(tmp_path / "whole", eval_every=BATCH, stop_at_convergence={"mean_return": -1e9})
    assert ppo.train(args)["converged_at_step"] == BATCH
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, ppo, "ppo_update", 3, send(signal.SIGTERM))
        assert ppo.train(replace(args, run_name="run"))["status"] == "interrupted"
    summary = ppo.train(replace(args, resume=str(folder), run_name=None))
    assert (summary["status"], summary["steps"], summary["converged_at_step"]) == ("completed", HALF, BATCH)
    same_runs(folder, tmp_path / "whole")


def test_a_completed_run_continues_with_a_larger_total_only(tmp_path):
    half = residual(tmp_path / "run", total_timesteps=HALF, anneal_lr=False, eval_every=64)
    ppo.train(half)
    resume = replace(half, resume=str(tmp_path / "run"), run_name=None)
    with pytest.raises(UserError, match="complete at 192 steps; raise --total-timesteps to go on"):
        ppo.train(resume)
    assert status(tmp_path / "run") == "completed"
    ppo.train(replace(resume, total_timesteps=FULL))
    ppo.train(replace(half, run_name="whole", total_timesteps=FULL))
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_environments_of_gymnasium_resume_with_fresh_episodes(tmp_path):
    args = residual(tmp_path / "run", env_id="Pendulum-v1", env_kwargs={}, base_policy="zero", residual_scale=2.0)
    assert "fresh" not in json.dumps(ppo.train(args))
    file = tmp_path / f"run/checkpoints/step_{HALF:09d}.pt"
    summary = ppo.train(replace(args, resume=str(file), run_name="resumed"))
    assert (summary["status"], summary["best"]["success_rate"]) == ("completed", None)
    assert [int(row["step"]) for row in rows(tmp_path / "resumed/progress.csv")] == list(range(BATCH, FULL + 1, BATCH))
    assert "fresh episodes" in summary["note"]


# What may change


def test_device_threads_cadences_evaluation_and_place_may_change(whole, tmp_path):
    """And training does not depend on them."""
    folder = cut(whole, tmp_path / "moved")
    changes = {"device": "auto", "threads": 2, "eval_every": 64, "eval_episodes": 3, "checkpoint_every": 0}
    ppo.train(residual(folder, **changes, resume=str(folder)))
    assert [line["step"] for line in lines(folder / "evaluations.jsonl")] == [128, 256, 320, 384]
    ours, theirs = read_pt(folder / "final.pt"), read_pt(whole / "final.pt")
    for name in ("agent", "optimizer", "reward_scaler", "envs", "rng"):
        same(ours[name], theirs[name], name)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"gamma": 0.5}, "--gamma was 0.99"),
        ({"seed": 2}, "--seed was 1"),
        ({"env_kwargs": {"frame_margin": 0.1}}, "--env-kwargs was"),
    ],
)
def test_nothing_else_may_change(whole, tmp_path, change, flag):
    folder = cut(whole, tmp_path / "run")
    with pytest.raises(UserError, match=f"{flag}.*cannot change to .*; --pretrained starts a new run from a policy"):
        ppo.train(residual(folder, resume=str(folder), **change))


def linear_policy(path, gain):
    """An ONNX file that multiplies the first observations with a gain."""
    envs = so101.SO101Paper(1)
    sizes = [envs.single_observation_space.shape[0], envs.single_action_space.shape[0]]
    node = onnx.helper.make_node("MatMul", ["obs", "weight"], ["action"])
    weight = onnx.numpy_helper.from_array(gain * np.eye(*sizes, dtype=np.float32), "weight")
    ends = [onnx.helper.make_tensor_value_info(*end, ["batch", n]) for *end, n in zip(("obs", "action"), (1, 1), sizes)]
    graph = onnx.helper.make_graph([node], "policy", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


def test_a_base_policy_may_move_with_the_run_but_not_change(tmp_path, command, monkeypatch):
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    other.mkdir()
    monkeypatch.chdir(work)
    linear_policy("base.onnx", 0.01)
    args = residual(Path("runs/run"), base_policy="base.onnx")
    ppo.train(replace(args, run_name="whole"))
    with monkeypatch.context() as patch:
        at_call(patch, ppo, "ppo_update", 3, send(signal.SIGTERM))
        ppo.train(args)
    folder = other / "run"
    shutil.move("runs/run", folder)
    shutil.move("base.onnx", folder / "base.onnx")
    linear_policy("base.onnx", 0.02)
    monkeypatch.chdir(other)
    content = (folder / "base.onnx").read_bytes()
    linear_policy(folder / "base.onnx", 0.02)
    refused = "base.onnx is missing or not the file that .* was trained with; put it back"
    code, errors = command("--resume run")
    assert_refused(code, errors[-1:], refused)
    (folder / "base.onnx").write_bytes(content)
    assert command("--resume run")[0] == 0
    ours, theirs = read_pt(folder / "final.pt"), read_pt(work / "runs/whole/final.pt")
    same(ours["agent"], theirs["agent"])
    same(ours["envs"], theirs["envs"])


def test_resuming_does_not_need_the_policy_that_the_run_started_from(whole, tmp_path):
    source = tmp_path / "source.pt"
    shutil.copy(whole / "best.pt", source)
    args = residual(tmp_path / "run", pretrained=str(source), critic_warmup_updates=1)
    ppo.train(args)
    source.unlink()
    path = tmp_path / "run" / f"checkpoints/step_{HALF:09d}.pt"
    ppo.train(replace(args, resume=str(path), run_name="resumed"))
    same_runs(tmp_path / "resumed", tmp_path / "run")


# One directory, two runs


def test_two_runs_in_one_directory(tmp_path, whole, monkeypatch):
    args, state = residual(tmp_path / "run"), {}

    def train_there_too():
        state["rng"] = torch.get_rng_state()
        with pytest.raises(UserError, match="run exists; choose another --run-name, or continue it with --resume"):
            ppo.train(args)
        with pytest.raises(UserError, match="run: another process is training in it; wait for its end"):
            ppo.train(replace(args, resume=str(tmp_path / "run")))
        torch.set_rng_state(state["rng"])

    at_call(monkeypatch, ppo, "collect_rollout", 4, train_there_too)
    ppo.train(args)
    assert state
    same_runs(tmp_path / "run", whole)


# Full disks and unreadable files


@pytest.mark.parametrize("name", ["progress.csv", "evaluations.jsonl", "step_000000256.pt", "final.pt", "summary.json"])
def test_a_full_disk_costs_nothing_that_was_written(whole, tmp_path, command, monkeypatch, name):
    """From the fourth iteration on, a file cannot be written."""
    folder, is_full = tmp_path / "run", []

    def full_open(path, mode="r", *args, **kwargs):
        if is_full and "r" not in mode and name in Path(path).name:
            return open("/dev/full", mode, *args, **kwargs)
        return open(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "open", full_open, raising=False)
        at_call(patch, ppo, "collect_rollout", 4, lambda: is_full.append(True))
        code, errors = command(command_line(residual(folder), folder))
    assert_refused(code, errors[-1:], rf"{name} could not be written \(No space left on device\); free some space")
    assert not any("error" in line or "Traceback" in line for line in errors[:-1])
    assert not list(folder.rglob(".*.tmp"))
    assert command(f"--resume {folder}")[0] == 0
    same_runs(folder, whole)
    assert scalars(folder) == scalars(whole)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.write_file(tmp_path / "file", b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(run.os, name, fail)
            with pytest.raises(UserError, match="file could not be written"):
                run.write_file(tmp_path / "file", b"new")
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_tensorboard_on_a_full_disk(tmp_path, command, monkeypatch):
    from tensorboard.compat.tensorflow_stub.io import gfile

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_call(monkeypatch, ppo, "collect_rollout", 2, lambda: monkeypatch.setattr(gfile.LocalFileSystem, "append", fail))
    code, errors = command(command_line(residual(tmp_path / "run"), tmp_path / "run"))
    assert_refused(code, errors[-1:], r"run could not be written \(No space left on device\)")


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_config_is_refused(whole, tmp_path, content):
    folder = cut(whole, tmp_path / "run")
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: cannot be read as a JSON object"):
        ppo.train(residual(folder, resume=str(folder), run_name=None))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"agent": Bomb()}, "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt: damaged or not a checkpoint"):
        read_checkpoint("bomb.pt")
    assert not Path("canary").exists()


@pytest.mark.parametrize("flag", ["--config", "--resume"])
def test_a_file_cannot_import_a_module(whole, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("dangerous.py").write_text("from pathlib import Path\nPath('canary').touch()\n")
    if flag == "--config":
        file = "config.json"
        run.write_json(Path(file), {"env_id": "dangerous:Env-v0"})
    else:
        file = "checkpoint.pt"
        checkpoint = read_pt(whole / "final.pt")
        run.save_pt(Path(file), checkpoint | {"args": {**checkpoint["args"], "env_id": "dangerous:Env-v0"}})
    with pytest.raises(
        UserError, match="would import the module dangerous; if you trust it, give --env-id dangerous:Env"
    ):
        cli.parse(ppo.Args, [flag, file])
    assert cli.parse(ppo.Args, [flag, file, "--env-id", "dangerous:Env-v0"]).env_id == "dangerous:Env-v0"
    assert not Path("canary").exists()


# Trackers and callbacks


def test_weights_and_biases_continues_a_resumed_run(tmp_path, monkeypatch):
    class FakeWandb(types.ModuleType):
        Settings = dict

        def init(self, **kwargs):
            self.runs.append((kwargs["name"], kwargs["id"], kwargs["resume"], []))
            return self

        def log(self, scalars, step):
            assert scalars.keys() >= {"train/value_loss", "time/sps"}
            self.runs[-1][-1].append(step)

        def login(self, prompt):
            return False

        def finish(self):
            pass

    wandb = FakeWandb("wandb")
    wandb.runs, wandb.__spec__ = [], importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = residual(tmp_path / "run", track=True, total_timesteps=4 * BATCH)
    with monkeypatch.context() as patch:
        at_call(patch, ppo, "ppo_update", 2, send(signal.SIGTERM))
        ppo.train(args)
    ppo.train(replace(args, resume=str(tmp_path / "run"), run_name="other"))
    ppo.train(replace(args, resume=str(tmp_path / "run"), run_name=None))
    names, ids, resume, steps = zip(*wandb.runs)
    assert names == ("run", "other", "run")
    assert ids[0] == ids[2] != ids[1]
    assert resume == ("allow",) * 3
    assert steps == ([64, 128], [192, 256], [192, 256])


def test_a_callback_ends_the_run(tmp_path):
    seen = []

    def on_evaluation(step, evaluation):
        seen.append((step, evaluation["episodes"]))
        return step == 256

    summary = ppo.train(residual(tmp_path / "run"), on_evaluation)
    assert seen == [(128, 2), (256, 2)]
    assert (summary["status"], summary["steps"]) == ("completed", 256)
    assert read_pt(tmp_path / "run/final.pt")["step"] == 256


# The run directory


def test_the_seed_decides_everything(tmp_path):
    def parameters(name, **kwargs):
        ppo.train(residual(tmp_path / name, total_timesteps=128, **kwargs))
        return read_pt(tmp_path / name / "final.pt")["agent"]

    first = parameters("first")
    same(first, parameters("again"))
    other = parameters("other", seed=2)
    assert not torch.equal(first["actor.0.weight"], other["actor.0.weight"])
    assert not torch.equal(first["normalizer.mean"], other["normalizer.mean"])


def test_pretrained_is_the_policy_with_a_fresh_optimizer(whole, tmp_path, monkeypatch):
    class StopHereError(Exception):
        pass

    def look(agent, optimizer, *args):
        same(dict(agent.state_dict()), dict(best["agent"]))
        assert optimizer.state_dict()["state"] == {}
        raise StopHereError

    best = read_pt(whole / "best.pt")
    monkeypatch.setattr(ppo, "ppo_update", look)
    with pytest.raises(StopHereError):
        ppo.train(residual(tmp_path / "run", pretrained=str(whole), seed=5))
    parent = json.loads((tmp_path / "run/config.json").read_text())["parents"][str(whole / "best.pt")]
    assert parent["sha256"] == hashlib.sha256((whole / "best.pt").read_bytes()).hexdigest()
    assert parent["steps"] == FULL


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The directory of a --dry-run and its summary, export included."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    return folder, ppo.train(residual(folder, dry_run=True, num_steps=64, total_timesteps=50_000, eval_episodes=100))


def test_a_dry_run_writes_all_files(real_export, dry):
    folder, summary = dry
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.json", "progress.csv", "evaluations.jsonl", "episodes.jsonl", "summary.json", "best.pt", "final.pt",
        "checkpoints/step_000000128.pt", "policy.onnx", ".lock",
    }  # fmt: skip
    assert (summary["status"], summary["steps"]) == ("completed", 128)
    assert summary == json.loads((folder / "summary.json").read_text())
    files = {str(file.relative_to(folder)): file for file in [*folder.rglob("*.pt"), folder / "policy.onnx"]}
    assert summary["sha256"] == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert lines(folder / "evaluations.jsonl")[0]["episodes"] == 2
    config = json.loads((folder / "config.json").read_text())
    assert (config["args"]["num_steps"], config["env_id"]) == (64, "SO101Paper-v0")
    assert config["packages"].keys() >= {"torch", "gymnasium", "mujoco", "numpy"}
    assert config.keys() >= {"git_commit", "hardware", "start_time", "device"}


def test_tensorboard_and_progress_hold_the_same_scalars(real_export, dry):
    events = EventAccumulator(str(dry[0]))
    events.Reload()
    table = list(csv.DictReader((dry[0] / "progress.csv").open(newline="")))
    assert set(table[0]) == SCALARS | {"step"}
    assert set(events.Tags()["scalars"]) >= SCALARS
    for name in SCALARS:
        (event,) = events.Scalars(name)
        assert event.step == 128
        assert event.value == pytest.approx(float(table[0][name]), rel=1e-6)


def test_the_exported_policy_is_the_best_one(real_export, dry):
    envs = so101.SO101Paper(4)
    obs, _ = envs.reset(seed=3)
    agent = ppo.make_residual_agent(envs, residual(dry[0]))
    agent.load_state_dict(read_pt(dry[0] / "best.pt")["agent"])
    action = onnxruntime.InferenceSession(str(dry[0] / "policy.onnx")).run(["action"], {"obs": obs})[0]
    np.testing.assert_allclose(action, agent(torch.as_tensor(obs)).detach(), rtol=0, atol=1e-5)
