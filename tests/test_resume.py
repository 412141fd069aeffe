"""A run that was stopped and resumed equals one that was not, bit for bit; and what a run leaves in its directory.

The scripts train in this process. test_survival.py starts processes."""

import csv
import hashlib
import importlib.machinery
import json
import shutil
import signal
import sys
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
from envs import UserError, run, so101
from envs.evaluation import read_pt
from envs.run import read_checkpoint

SCRIPT = ppo
BATCH, HALF, FULL = 64, 192, 384  # steps
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


@pytest.mark.parametrize("script", SETTINGS)
def test_the_learning_rate_is_annealed(uninterrupted, script):
    """Update i of n uses (1 - (i - 1) / n) of it."""
    with open(uninterrupted(script) / "progress.csv", newline="") as file:
        rates = [float(row["train/learning_rate"]) for row in csv.DictReader(file)]
    initial = SETTINGS[script](Path("x/y")).learning_rate
    np.testing.assert_allclose(rates, initial * (1 - np.arange(6) / 6))


def test_a_signal_during_the_export_lets_the_run_finish(whole, tmp_path, command, monkeypatch):
    folder = tmp_path / "run"
    at_call(monkeypatch, run, "export_onnx", 1, send(signal.SIGTERM))
    assert command(command_line(residual(folder), folder))[0] == 0
    assert status(folder) == "completed"
    assert (folder / "policy.onnx").exists()
    assert not (folder / "interrupted.pt").exists()
    same_runs(folder, whole)


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


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"agent": Bomb()}, "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt: damaged or not a checkpoint"):
        read_checkpoint("bomb.pt")
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


# The run directory


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


def test_the_exported_policy_is_the_best_one(real_export, dry):
    envs = so101.SO101Paper(4)
    obs, _ = envs.reset(seed=3)
    agent = ppo.make_residual_agent(envs, residual(dry[0]))
    agent.load_state_dict(read_pt(dry[0] / "best.pt")["agent"])
    action = onnxruntime.InferenceSession(str(dry[0] / "policy.onnx")).run(["action"], {"obs": obs})[0]
    np.testing.assert_allclose(action, agent(torch.as_tensor(obs)).detach(), rtol=0, atol=1e-5)
