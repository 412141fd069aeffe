"""A user's mistake ends in one line that says what is wrong and what to do, with status 2, and nothing is lost."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnx
import pytest
import torch
from helpers import assert_refused, files
from onnx import TensorProto, helper, numpy_helper

import envs
import ppo_continuous
import ppo_grid_socnav
import ppo_residual
from envs import distributed, evaluation, run

SCRIPT = ppo_residual
TINY = ppo_residual.Args(
    num_envs=2,
    num_steps=64,
    minibatch_size=64,
    total_timesteps=256,
    update_epochs=1,
    eval_episodes=2,
    checkpoint_every=128,
)
TRAIN = (
    "--num-envs 2 --num-steps 64 --minibatch-size 64 --total-timesteps 256 --update-epochs 1 --eval-episodes 2"
    " --checkpoint-every 128 "
)


class DictObservations(gym.Env):
    observation_space = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (2,))})
    action_space = gym.spaces.Box(-1, 1, (1,))


class UnboundedActions(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


def write_onnx(path: Path, weight: np.ndarray, **metadata: str) -> None:
    """A linear policy without bias; weight: (observations, actions)."""
    weight = numpy_helper.from_array(weight.astype(np.float32), "weight")
    inputs = [helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["batch", weight.dims[0]])]
    outputs = [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", weight.dims[1]])]
    node = helper.make_node("MatMul", ["obs", "weight"], ["action"])
    graph = helper.make_graph([node], "policy", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A finished run of the paper task, and files of every sort that a user may confuse with its own."""
    folder = tmp_path_factory.mktemp("originals")
    ppo_residual.train(replace(TINY, run_root=str(folder), run_name="run"))
    final = evaluation.read_pt(folder / "run" / "final.pt")

    content = (folder / "run" / "final.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(content[: len(content) * 3 // 4])
    weight = content.index(final["agent"]["actor.0.weight"].numpy().tobytes())
    (folder / "zeros.pt").write_bytes(content[:weight] + bytes(512) + content[weight + 512 :])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("not a checkpoint\n")
    torch.save({"weight": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save({**final, "policy_type": "policy"}, folder / "policy.pt")
    torch.save({**final, "kind": "residual"}, folder / "first_edition.pt")
    small = ppo_residual.make_residual_agent(envs.make_vec(TINY.env_id, 1), replace(TINY, hidden_sizes=(8,)))
    torch.save({**final, "agent": small.state_dict()}, folder / "sizes.pt")
    torch.save({**final, "env_id": "Pendulum-v1"}, folder / "pendulum.pt")
    other_module = {"env_id": "spy:Env-v0", "args": {**final["args"], "env_id": "spy:Env-v0"}}
    torch.save({**final, **other_module}, folder / "module_id.pt")
    (folder / "spy.py").write_text("raise AssertionError('a file had this imported')")
    vec = envs.make_vec("Pendulum-v1", 1)
    agent = ppo_continuous.make_agent(vec, ppo_continuous.Args())
    agent.action_high.mul_(2)
    theirs = {"policy_type": "policy", "script": "ppo_continuous", "env_id": "Pendulum-v1", "env_kwargs": {}}
    torch.save({**theirs, "agent": agent.state_dict(), "step": 0, "args": {}, "files": {}}, folder / "range.pt")

    write_onnx(folder / "shapes.onnx", np.zeros((4, 6)))
    write_onnx(folder / "nan.onnx", np.full((25, 6), np.nan))
    write_onnx(folder / "first_edition.onnx", np.zeros((25, 6)), kind="policy")
    (folder / "corrupt.onnx").write_bytes((folder / "nan.onnx").read_bytes()[:-50])

    configs = {
        "list": "[0.001]",
        "not_json": "learning_rate: 0.001",
        "unknown": '{"learning_rat": 0.001}',
        "wrong_type": '{"learning_rate": "high"}',
        "wrong_item": '{"hidden_sizes": [64, "wide"]}',
        "wrong_args": '{"args": [0.001]}',
        "good": '{"learning_rate": 0.001}',
        "module_id": '{"env_id": "spy:Env-v0"}',
    }
    for name, text in configs.items():
        (folder / f"{name}.json").write_text(text)
    for name in ("notes", "empty"):
        (folder / name).mkdir()
    (folder / "notes" / "config.json").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def place(originals, tmp_path, monkeypatch):
    """Every test works in its own copy."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for env in (DictObservations, UnboundedActions):
        spec = gym.envs.registration.EnvSpec(f"{env.__name__}-v0", env)
        monkeypatch.setitem(gym.registry, spec.id, spec)


FILES = {
    "missing.pt": r"missing\.pt: no such file; give a \.pt file",
    "empty": r"no such file; give a \.pt file|empty: no readable checkpoint; --resume takes",
    "empty.pt": r"empty\.pt: damaged or not a checkpoint .*; use another file",
    "truncated.pt": r"truncated\.pt: damaged or not a checkpoint .*; use another file",
    "zeros.pt": r"zeros\.pt: damaged or not a checkpoint \(the checksum .*; use another file",
    "text.pt": r"text\.pt: damaged or not a checkpoint .*; use another file",
    "module.pt": r"module\.pt: damaged or not a checkpoint .*; use another file",
    "foreign.pt": r"foreign\.pt: not a policy file; give best\.pt, final\.pt or a checkpoint of a run",
    "first_edition.pt": r"first_edition\.pt: made by the first edition; train again",
    "policy.pt": r"policy\.pt: holds a policy, but a residual is needed",
    "sizes.pt": r"sizes\.pt: does not fit this agent .*actor\.0\.weight.*\[8, 25\].*\[64, 25\].*; use the settings",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
def test_policy_file(refused, flag, name):
    refused((TRAIN if flag == "--pretrained" else "--total-timesteps 512 ") + f"{flag} {name}", FILES[name])


RESIDUAL = {
    "--base-policy missing.onnx": r"missing\.onnx: no such file; give a policy\.onnx",
    "--base-policy corrupt.onnx": r"corrupt\.onnx: cannot be read as an ONNX file",
    "--base-policy shapes.onnx": r"shapes\.onnx: does not run on observations of this environment",
    "--base-policy first_edition.onnx": r"first_edition\.onnx: made by the first edition; train again",
    "--base-policy run/policy.onnx": r"policy\.onnx is a residual policy; clone it with bc_pretrain\.py",
    "--base-policy PID": r"unknown policy 'PID'; choose zero, ik, PATH\.onnx or blend:A:B:w",
    "--base-policy blend:ik:zero": r"unknown policy 'blend:ik:zero'.* such as blend:ik:zero:0\.5",
    "--base-policy blend:ik:zero:1.5": r"blend:ik:zero:1\.5: the weight must be from 0 to 1",
    "--base-policy blend:ik:zero:0.5.5": r"unknown policy 'blend:ik:zero:0\.5\.5'",
    "--base-policy blend:ik:missing.onnx:0.5": r"missing\.onnx: no such file",
    "--env-id LateralControl-v0 --base-policy feedforward": r"feedforward needs more than the observation; clone it",
    "--env-id SO101Papper-v0": r"SO101Papper-v0: .* The bundled environments are .*SO101Paper-v0",
    "--env-id no_such_module:Env-v0": r"No module named 'no_such_module'; add its folder to PYTHONPATH",
    "--env-id CartPole-v1 --base-policy zero": r"actions must be a Box of floats, not Discrete\(2\); discrete actions",
    "--env-id Blackjack-v1 --base-policy zero": r"observations must be a flat Box, not Tuple.*; flatten",
    "--env-id DictObservations-v0 --base-policy zero": r"observations must be a flat Box, not Dict.*; flatten",
    "--env-id UnboundedActions-v0 --base-policy zero": r"actions must be a flat, bounded Box, not Box\(-inf.*; flatten",
    "--env-kwargs margin 0.03": r"SO101Paper-v0: unknown argument 'margin'; it takes .*frame_margin",
    "--eval-env-kwargs margin 0.03": r"SO101Paper-v0: unknown argument 'margin'; it takes .*frame_margin",
    "--env-kwargs frame_margin wide": r"SO101Paper-v0: frame_margin must be float, not 'wide'",
    "--env-kwargs frame_margin -0.01": r"SO101Paper-v0: frame_margin must be above 0.*, not -0\.01",
    "--env-kwargs split test": r"--env-kwargs split: the script sets it",
    "--minibatch-size 100": r"--minibatch-size must be at least 2 and divide num_envs \* num_steps = 128",
    "--num-envs 0": r"--num-envs must be from 1 to .*, not 0",
    "--total-timesteps 127": r"--total-timesteps must be at least one rollout, 128 steps",
    "--eval-episodes 0": r"0 evaluation episodes means all, but SO101Paper-v0 has an unlimited number; give a number",
    "--best-metric speed": r"speed is not a metric of SO101Paper-v0; choose from success_rate, .*yaw_error",
    "--stop-at-convergence speed 0.9": r"speed is not a metric of SO101Paper-v0; choose from success_rate, .*yaw_error",
    "--preset tuned": r"unknown preset 'tuned'; choose from zero",
    "--run-root empty.pt": r"empty\.pt.* could not be written \(Not a directory\)",
    "--run-root . --run-name run": r"run exists; choose another --run-name, or continue it with --resume",
    "--run-root . --run-name notes": r"notes exists; choose another --run-name$",
    "--config missing.json": r"missing\.json: cannot be read as a JSON object \(.*No such file",
    "--config not_json.json": r"not_json\.json: cannot be read as a JSON object",
    "--config run/best.pt": r"best\.pt: cannot be read as a JSON object",
    "--config list.json": r"list\.json: cannot be read as a JSON object",
    "--config wrong_args.json": r"wrong_args\.json: args must be an object of settings, not \[0\.001\]",
    "--config unknown.json": r"unknown\.json: unknown setting 'learning_rat'; --help lists the settings",
    "--config wrong_type.json": r"wrong_type\.json: learning_rate cannot be 'high'; --help says what it takes",
    "--config wrong_item.json": r"wrong_item\.json: hidden_sizes cannot be .*wide.*; --help says what it takes",
    "--config module_id.json": r"module_id\.json: would import the module spy; if you trust it, give --env-id spy:Env",
    "--pretrained pendulum.pt": r"pendulum\.pt: a policy for Pendulum-v1, not SO101Paper-v0; give its --env-id",
}
CONTINUOUS = {
    "--env-id HalfCheetah-v5 --group-size 2": r"--group-size: HalfCheetah-v5 cannot put several environments in one",
    "--group-size 3": r"--group-size must divide --num-envs 2",
    "--env-id Pendulum-v1 --pretrained range.pt": r"range\.pt: its actions have another range; give the --env-kwargs",
    "--group-size 1 --pretrained run": r"best\.pt: holds a residual, but a policy is needed",
    "--group-size 1 --eval-episodes 101": r"101 evaluation episodes: the validation split has 100; 0 evaluates all",
    "--group-size 1 --config run/config.json": r"run/config\.json: unknown setting 'base_policy'",
    "--group-size 1 --env-kwargs model_path missing.onnx": r"LateralControl-v0: .*missing\.onnx",
    "--preset cleanrll": r"unknown preset 'cleanrll'; choose from .*cleanrl",
}
GRID = {
    "--num-rays 7": r"--num-rays must be even",
    "--env-id SO101Paper-v0": r"SO101Paper-v0: unknown argument|must be those of SocNavGrid-v0",
    "--preset ray": r"unknown preset 'ray'; choose from rays, cnn",
}
RESUMING = {
    "--resume run": r"run is complete at 256 steps; raise --total-timesteps to go on",
    "--resume run --total-timesteps 128": r"run is complete at 256 steps; raise --total-timesteps to go on",
    "--resume run/final.pt": r"final\.pt is complete at 256 steps; raise --total-timesteps to go on",
    "--resume run --total-timesteps 512 --gamma 0.9": r"--gamma was 0\.99 in run and cannot change to 0\.9; --pre",
    "--resume run --total-timesteps 512 --env-id Pendulum-v1 --base-policy zero": r"--env-id was 'SO101Paper-v0'",
    "--resume run --total-timesteps 512 --env-kwargs frame_margin 0.03": r"--env-kwargs was {} in run and cannot",
    "--resume run --total-timesteps 512 --base-policy zero": r"--base-policy was 'ik' in run and cannot change",
    "--resume run --total-timesteps 512 --config good.json": r"continues with the settings of its run; leave --config",
    "--resume run --total-timesteps 512 --run-root . --run-name notes": r"notes exists; choose another --run-name",
    "--resume run/best.pt": r"best\.pt: a policy without training state; start from it with --pretrained",
    "--resume run/policy.onnx": r"policy\.onnx: damaged or not a checkpoint",
    "--resume truncated.pt --run-name new": r"truncated\.pt: damaged or not a checkpoint",
    "--resume module_id.pt": r"module_id\.pt: would import the module spy; if you trust it, give --env-id spy:Env-v0",
}
MISTAKES = [
    *((ppo_residual, TRAIN + line, message) for line, message in RESIDUAL.items()),
    *((ppo_continuous, TRAIN + line, message) for line, message in CONTINUOUS.items()),
    *((ppo_grid_socnav, TRAIN + line, message) for line, message in GRID.items()),
    *((ppo_residual, line, message) for line, message in RESUMING.items()),
]


@pytest.mark.parametrize(
    ("script", "line", "message"), MISTAKES, ids=lambda x: x.removeprefix(TRAIN) if isinstance(x, str) else x.__name__
)
def test_mistake(refused, script, line, message):
    refused(line, message, script)


def test_as_a_process(command, monkeypatch):
    """One line and status 2; ROBOT_PPO_TRACEBACK=1 shows the traceback before it."""
    before, flags, message = files(), TRAIN + "--base-policy corrupt.onnx", r"corrupt\.onnx: cannot be read"
    script = [sys.executable, ppo_residual.__file__]
    done = subprocess.run([*script, *flags.split()], capture_output=True, text=True, timeout=120)
    assert_refused(done.returncode, [line for line in done.stderr.splitlines() if line], message)
    monkeypatch.setenv("ROBOT_PPO_TRACEBACK", "1")
    status, lines = command(flags)
    assert_refused(status, lines[-1:], message)
    assert any(line.startswith("Traceback") for line in lines)
    assert files() == before


def test_nan_and_interruption_during_set_up(command, monkeypatch):
    """Status 1 for a base policy that returns NaN, which only the run shows; status 130 for Ctrl-C before the loop."""
    before = files()
    status, lines = command(TRAIN + "--run-name nan --base-policy nan.onnx")
    assert (status, lines[-1]) == (1, "error: base action is not finite at step 0 in environment 0")
    after = files()
    assert {path: after[path] for path in before} == before
    summary = json.loads(Path("runs/nan/summary.json").read_text())
    assert (summary["status"], summary["sha256"]) == ("failed", {})

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo_residual, "make_envs", interrupt)
    assert command(TRAIN) == (130, ["interrupted"])


def test_world_size_outside_torchrun_is_ignored(monkeypatch):
    """As some clusters set it. Under torchrun, sizes that do not divide are refused."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    args = ppo_grid_socnav.Args(num_envs=6, minibatch_size=64)
    distributed.init_process_group(args)
    assert (distributed.world_size(), distributed.rank(), distributed.local_args(args)) == (1, 0, args)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(envs.UserError, match="--num-envs 6 cannot be divided among 4 processes"):
        distributed.init_process_group(args)


@pytest.fixture
def disk(monkeypatch):
    """disk(path): a disk that is full as soon as that file exists."""

    def full_from(path: Path) -> None:
        def fsync(descriptor: int) -> None:
            if path.exists():
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(run.os, "fsync", fsync)

    return full_from


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ("config.json", "step_000000128.pt"),
        ("checkpoints/step_000000128.pt", "best.pt"),
        ("checkpoints/step_000000256.pt", "final.pt"),
        ("final.pt", "policy.onnx"),
    ],
)
def test_full_disk(command, disk, last, name):
    folder = Path("runs/full")
    disk(folder / last)
    status, lines = command(TRAIN + "--run-name full")
    assert_refused(status, lines[-1:], rf"{name} could not be written \(No space left on device\); free some space")
    assert not any(line.startswith("error: ") for line in lines[:-1])
    left = {path.name for path in folder.rglob("*")}
    assert name not in left
    for path in folder.rglob("*.pt"):
        evaluation.read_pt(path)
    if "step_000000128.pt" in left:
        assert run.read_checkpoint(str(folder))["step"] in (128, 256)


def test_newest_checkpoint_damaged(command):
    """The one before continues; each damaged file is named once."""
    damaged = ["run/final.pt", "run/checkpoints/step_000000256.pt"]
    for name in damaged:
        shutil.copy("zeros.pt", name)
    status, lines = command("--resume run --total-timesteps 256")
    assert status == 0, lines
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["status"], summary["resumed_from_step"], summary["steps"]) == ("completed", 128, 256)
    skipped = [line for line in lines if line.startswith("skipped ")]
    assert sorted(line.split()[1].rstrip(":") for line in skipped) == sorted(damaged)
    assert all("damaged" in line for line in skipped)
