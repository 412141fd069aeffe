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
import ppo_residual
from envs import run

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
PLAY = "--eval-episodes 2 "


class DictObservations(gym.Env):
    observation_space = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (2,))})
    action_space = gym.spaces.Box(-1, 1, (1,))


class UnboundedActions(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


def write_onnx(path: Path, weight: np.ndarray, batch: str | int = "batch", dtype: int = TensorProto.FLOAT) -> None:
    """A linear policy without bias; weight: (observations, actions)."""
    weight = numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(dtype)), "weight")
    inputs = [helper.make_tensor_value_info("obs", dtype, [batch, weight.dims[0]])]
    outputs = [helper.make_tensor_value_info("action", dtype, [batch, weight.dims[1]])]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["obs", "weight"], ["action"])], "policy", inputs, outputs, [weight]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A finished run of the paper task, and files of every sort that a user may confuse with its own."""
    folder = tmp_path_factory.mktemp("originals")
    ppo_residual.train(replace(TINY, run_root=str(folder), run_name="run"))
    final = run.load(folder / "run" / "final.pt")

    (folder / "empty.pt").write_bytes(b"")
    content = (folder / "run" / "final.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(content[: len(content) * 3 // 4])
    weight = content.index(final["agent"]["actor.0.weight"].numpy().tobytes())
    (folder / "zeros.pt").write_bytes(content[:weight] + bytes(512) + content[weight + 512 :])
    (folder / "text.pt").write_text("not a checkpoint\n")
    (folder / "dots.pt").write_text("...")
    torch.save({"weight": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save({**final, "kind": "policy"}, folder / "kind.pt")
    vec = envs.make_vec(TINY.env_id, 1)
    small = ppo_residual.residual_agent(vec, replace(TINY, hidden_sizes=(8,))).state_dict()
    torch.save({**final, "agent": small}, folder / "sizes.pt")
    pendulum = {"env_id": "Pendulum-v1", "base_policy": "zero"}
    agent = ppo_residual.residual_agent(envs.make_vec("Pendulum-v1", 1), TINY).state_dict()
    other = {"env_id": "Pendulum-v1", "agent": agent, "args": {**final["args"], **pendulum}}
    torch.save({**final, **other}, folder / "pendulum.pt")
    vec = envs.make_vec("Pendulum-v1", 1)
    agent = ppo_continuous.make_agent(vec, ppo_continuous.Args())
    agent.scale.mul_(2)
    theirs = {"kind": "policy", "env_id": "Pendulum-v1", "env_kwargs": {}, "agent": agent.state_dict(), "step": 0}
    torch.save({**theirs, "args": {}}, folder / "range.pt")

    write_onnx(folder / "shapes.onnx", np.zeros((4, 6)))
    write_onnx(folder / "nan.onnx", np.full((25, 6), np.nan))
    write_onnx(folder / "batch_of_1.onnx", np.zeros((25, 6)), batch=1)
    write_onnx(folder / "float64.onnx", np.zeros((25, 6)), dtype=TensorProto.DOUBLE)
    (folder / "corrupt.onnx").write_bytes((folder / "nan.onnx").read_bytes()[:-50])

    configs = {
        "list": "[0.001]",
        "not_json": "learning_rate: 0.001",
        "unknown": '{"learning_rat": 0.001}',
        "wrong_type": '{"learning_rate": "high"}',
        "wrong_item": '{"hidden_sizes": [64, "wide"]}',
        "wrong_args": '{"args": [0.001]}',
        "good": '{"learning_rate": 0.001}',
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
    return tmp_path


FILES = {
    "missing.pt": r"missing\.pt: no such file; .+",
    "empty.pt": r"empty\.pt: .*damaged.*; use another",
    "truncated.pt": r"truncated\.pt: .*damaged.*; use another",
    "zeros.pt": r"zeros\.pt: .*damaged.*; use another",
    "text.pt": r"text\.pt: .*not a file of this project; use another",
    "dots.pt": r"dots\.pt: .*not a file of this project; use another",
    "module.pt": r"module\.pt: .*not a file of this project; use another",
    "foreign.pt": r"foreign\.pt: not a policy of this project; give best\.pt",
    "kind.pt": r"kind\.pt: holds a policy, where a residual is needed; use the script that trained it",
    "sizes.pt": r"sizes\.pt: actor\.0\.weight is \(8, 25\) there and \(64, 25\) here; use",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flag", ["--evaluate", "--pretrained", "--resume"])
def test_policy_file(refused, flag, name):
    line = {"--evaluate": PLAY, "--pretrained": TRAIN, "--resume": "--total-timesteps 512 "}[flag]
    lone = flag == "--resume" and name == "sizes.pt"  # readable, but a run goes on in its directory only
    refused(line + f"{flag} {name}", r"sizes\.pt: no run directory .*--pretrained" if lone else FILES[name])


def test_resuming_with_other_network_sizes(refused):
    shutil.copy("sizes.pt", "run/checkpoints/step_000000256.pt")
    line = "--total-timesteps 512 --resume run/checkpoints/step_000000256.pt"
    refused(line, r"actor\.0\.weight is \(8, 25\) there and \(64, 25\) here; use")


def test_another_run_root_without_a_name(refused):
    refused("--total-timesteps 512 --resume run --run-root elsewhere", r"give a --run-name too")


@pytest.mark.parametrize(
    "line",
    [
        PLAY + "--evaluate pendulum.pt --env-id SO101Paper-v0 --base-policy ik",
        TRAIN + "--pretrained pendulum.pt",
    ],
)
def test_policy_of_another_task(refused, line):
    refused(line, r"pendulum\.pt: a policy for Pendulum-v1, not SO101Paper-v0; .*(--env-id|another)")


@pytest.mark.parametrize("part", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_file_cut_short(part):
    """Wherever it ends, a file cut short is a damaged file and nothing else."""
    content = Path("run/final.pt").read_bytes()
    Path("cut.pt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(run.UserError, match=r"cut\.pt: .*damaged.*; use another"):
        run.load(Path("cut.pt"))


TRAINING = {
    "--base-policy missing.onnx": r"missing\.onnx: no such file; a base policy is zero,",
    "--base-policy corrupt.onnx": r"corrupt\.onnx: not a readable ONNX model; export it again",
    "--base-policy empty.pt": r"unknown policy 'empty\.pt': choose zero, ik, PATH\.onnx or blend",
    "--base-policy shapes.onnx": r"shapes\.onnx: maps .*4.* needs \(N, 25\) -> \(N, 6\)",
    "--base-policy batch_of_1.onnx": r"batch_of_1\.onnx: .*batch",
    "--base-policy float64.onnx": r"float64\.onnx: .*float",
    "--base-policy run/policy.onnx": r"policy\.onnx: holds a residual.*; give a whole policy",
    "--base-policy PID": r"unknown policy 'PID': choose zero, ik, PATH\.onnx or blend",
    "--base-policy blend:ik:zero": r"blend:A:B:w, such as blend:ik:zero:0\.5",
    "--base-policy blend:ik:zero:half": r"blend:A:B:w, such as blend:ik:zero:0\.5",
    "--base-policy blend:ik:zero:1.5": r"weight w of A between 0 and 1",
    "--base-policy blend:ik:zero:0.5:1": r"blend:A:B:w with two policies",
    "--base-policy blend:ik:PID:0.5": r"unknown policy 'PID': choose zero, ik",
    "--base-policy blend:ik:missing.onnx:0.5": r"missing\.onnx: no such file; a base policy is",
    "--env-id SO101Papper-v0": r"unknown environment 'SO101Papper-v0'; ours are .*SO101Paper-v0",
    "--env-id SO101Paper-v7": r"unknown environment 'SO101Paper-v7'; ours are .*SO101Paper-v0",
    "--env-id no_such_module:Env-v0": r"No module named 'no_such_module'; MODULE:ID takes a module that Python finds",
    "--env-id HalfCheetah-v3 --base-policy zero": r"HalfCheetah-v3: .*moved to",
    "--env-id CartPole-v1": r"actions must be a flat, bounded Box, not Discrete\(2\)",
    "--env-id Blackjack-v1": r"observations must be a flat Box, not Tuple.*; flatten",
    "--env-id DictObservations-v0": r"observations must be a flat Box, not Dict.*; flatten",
    "--env-id UnboundedActions-v0": r"actions must be a flat, bounded Box, not Box\(-inf",
    "--env-id Pendulum-v1 --base-policy zero --env-kwargs frame_margin 0.03": r"Pendulum-v1: .*frame_margin",
    "--env-kwargs margin 0.03": r"no argument 'margin'; it has .*frame_margin",
    "--eval-env-kwargs margin 0.03": r"no argument 'margin'; it has .*frame_margin",
    "--env-kwargs frame_margin wide": r"frame_margin must be float, not 'wide'",
    "--env-kwargs randomize 2": r"randomize must be bool, not 2",
    "--env-kwargs frame_margin 0": r"frame_margin must be above 0.*, not 0",
    "--env-kwargs frame_margin -0.01": r"frame_margin must be above 0.*, not -0\.01",
    "--env-kwargs training False": r"training is not for --env-kwargs: the script sets it",
    "--env-kwargs split test": r"split is not for --env-kwargs: the script sets it",
    "--eval-env-kwargs split train": r"split is not for --(eval-)?env-kwargs: the script sets it",
    "--env-kwargs render_mode human": r"render_mode is not for --env-kwargs: the script sets it",
    "--env-kwargs num_envs 3": r"num_envs is not for --env-kwargs: the script sets it",
    "--env-kwargs env_id Pendulum-v1": r"env_id is not for --env-kwargs: the script sets it",
    "--env-kwargs seed 3": r"seed is not for --env-kwargs: the script sets it",
    "--minibatch-size 100": r"--minibatch-size must .*divide num_envs \* num_steps = 128, not 100",
    "--minibatch-size 0": r"--minibatch-size must be at least 2 .*, not 0",
    "--num-envs 0": r"--num-envs must be at least 1, not 0",
    "--num-steps 0": r"--num-steps must be at least 1, not 0",
    "--threads 0": r"--threads must be at least 1, not 0",
    "--eval-episodes 0": r"--eval-episodes 0 means all there are, but SO101Paper-v0 has no end of them; give a number",
    "--group-size 2": r"--group-size.*SO101Paper-v0",
    "--group-size 3": r"--group-size must be a divisor of --num-envs 2, not 3",
    "--env-id LateralControl-v0 --base-policy feedforward": r"feedforward",
    "--env-id LateralControl-v0 --base-policy blend:pid:zero:0.5": r"pid",
    "--hidden-sizes 64 0": r"--hidden-sizes must be at least 1, not \(64, 0\)",
    "--total-timesteps 127": r"--total-timesteps must be at least one rollout, 128 steps, not 127",
    "--gamma 1.01": r"--gamma must be between 0 and 1, not 1\.01",
    "--gae-lambda -0.1": r"--gae-lambda must be between 0 and 1, not -0\.1",
    "--learning-rate 0": r"--learning-rate must be above 0, not 0",
    "--learning-rate nan": r"--learning-rate must be a finite number, not nan",
    "--target-kl 0": r"--target-kl must be above 0, not 0",
    "--alpha nan": r"--alpha must .*not nan",
    "--checkpoint-every -1": r"--checkpoint-every must be 0 or more",
    "--run-root empty.pt": r"empty\.pt.* cannot be made \(Not a directory\); choose another --run-root",
    "--run-root . --run-name run": r"run exists; choose another --run-name, or continue it with --resume",
    "--run-root . --run-name notes": r"notes exists; choose another --run-name",
    "--config missing.json": r"missing\.json: no such file; give a JSON file",
    "--config not_json.json": r"not_json\.json: not JSON",
    "--config run/best.pt": r"best\.pt: not JSON",
    "--config list.json": r"list\.json: must hold one JSON object, such as",
    "--config wrong_args.json": r"wrong_args\.json: must hold one JSON object of settings, such as",
    "--config unknown.json": r"unknown\.json: unknown setting 'learning_rat'; --help lists",
    "--config wrong_type.json": r"wrong_type\.json: learning_rate cannot be 'high'; --help says",
    "--config wrong_item.json": r"wrong_item\.json: hidden_sizes cannot be .*wide.*; --help says",
    "--json result.json": r"--json works only with --evaluate",
    "--compare-base": r"--compare-base works only with --evaluate",
    "--render human": r"--render works only with --evaluate",
    "--pretrained empty": r"empty.best\.pt: no such file; .+",
}


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.parametrize("line", TRAINING)
def test_training(refused, line, monkeypatch):
    for env in (DictObservations, UnboundedActions):
        spec = gym.envs.registration.EnvSpec(f"{env.__name__}-v0", env)
        monkeypatch.setitem(gym.registry, spec.id, spec)
    refused(TRAIN + line, TRAINING[line])


RESUMING = {
    "--resume run": r"run is complete at 256 steps; give a larger --total-timesteps",
    "--resume run --total-timesteps 128": r"run is complete at 256 steps; give a larger --total-timesteps",
    "--resume run/final.pt": r"final\.pt is complete at 256 steps; give a larger --total-timesteps",
    "--resume run --total-timesteps 512 --gamma 0.9": r"--gamma was 0\.99 in run and cannot change; --pretrained",
    "--resume run --total-timesteps 512 --env-id Pendulum-v1": r"--env-id was 'SO101Paper-v0' in run and cannot change",
    "--resume run --total-timesteps 512 --env-kwargs frame_margin 0.03": r"--env-kwargs was {} in run and cannot",
    "--resume run --total-timesteps 512 --base-policy zero": r"--base-policy was 'ik' in run and cannot change",
    "--resume run --total-timesteps 512 --config good.json": r"--config",
    "--resume run --total-timesteps 512 --run-root . --run-name notes": r"notes exists; choose another --run-name",
    "--resume pendulum.pt --total-timesteps 512 --env-id SO101Paper-v0": r"--env-id was 'Pendulum-v1' .* cannot change",
    "--resume run/best.pt": r"best\.pt: a policy without its training state; --pretrained starts from one",
    "--resume empty": r"empty: no readable checkpoint in this directory; --resume takes",
    "--resume missing": r"missing: no such file; .+",
}


@pytest.mark.parametrize("line", RESUMING)
def test_resuming(refused, line):
    refused(line, RESUMING[line])


EVALUATING = {
    "--evaluate PID": r"unknown policy 'PID': choose zero, ik, PATH\.onnx or blend",
    "--evaluate empty": r"empty.best\.pt: no such file; .+",
    "--evaluate missing.onnx": r"missing\.onnx: no such file; a base policy is",
    "--evaluate run/policy.onnx": r"policy\.onnx: holds a residual.*; give a whole policy",
    "--evaluate nan.onnx": r"nan\.onnx: returned NaN or infinity.*; export a working policy",
    "--evaluate run --base-policy nan.onnx": r"nan\.onnx: returned NaN or infinity.*; export a working policy",
    "--evaluate run --base-policy shapes.onnx": r"shapes\.onnx: maps .*4.* needs \(N, 25\) -> \(N, 6\)",
    "--evaluate ik --compare-base": r"--compare-base needs a policy file or a run, and ik has no base; leave it out",
    "--evaluate run --learning-rate 0.01": r"--learning-rate has no effect on --evaluate run; leave it out",
    "--evaluate ik --alpha 0.1": r"--alpha has no effect on --evaluate ik; leave it out",
    "--evaluate ik --base-policy zero": r"--base-policy has no effect on --evaluate ik; leave it out",
    "--evaluate run --resume run": r"--resume has no effect on --evaluate run; leave it out",
    "--evaluate run --config good.json": r"--config has no effect on --evaluate run; leave it out",
    "--evaluate ik --eval-episodes 0": r"--eval-episodes 0 means all there are, but SO101Paper-v0 has no end of them",
    "--evaluate ik --env-kwargs split train": r"split is not for --env-kwargs: the script sets it",
    "--evaluate ik --json missing/result.json": r"--json missing.result\.json: no file can be written there",
    "--evaluate run --env-id Pendulum-v1 --base-policy zero": r"a policy for SO101Paper-v0, not Pendulum-v1; .+",
}


@pytest.mark.parametrize("line", EVALUATING)
def test_evaluating(refused, line):
    refused(PLAY + line, EVALUATING[line])


CONTINUOUS = {
    "--env-id LateralControl-v7": r"unknown environment 'LateralControl-v7'; ours are Ballbot-v0, BallbotDepth-v0, Lat",
    "--env-id CartPole-v1": r"actions must be a flat, bounded Box, not Discrete\(2\)",
    "--env-id DictObservations-v0": r"observations must be a flat Box, not Dict.*; flatten",
    "--env-id UnboundedActions-v0": r"actions must be a flat, bounded Box, not Box\(-inf",
    "--env-kwargs model_path missing.onnx": r"missing\.onnx: no such file; model_path is",
    "--env-kwargs model_path corrupt.onnx": r"corrupt\.onnx: not a readable ONNX model; model_path is",
    "--env-kwargs model_path shapes.onnx": r"shapes\.onnx: takes .* instead of .*; model_path is",
    "--env-kwargs data_path empty": r"empty: no CSV file in this folder",
    "--env-kwargs action_mode sideways": r"action_mode must be delta or absolute, not 'sideways'",
    "--env-kwargs copies 0": r"copies must be at least 1, not 0",
    "--env-kwargs copies 2 --group-size 2": r"(--group-size|copies).*",
    "--eval-env-kwargs model_path missing.onnx": r"missing\.onnx: no such file; model_path is",
    "--group-size 3": r"--group-size must be a divisor of --num-envs 2, not 3",
    "--group-size 0": r"--group-size must be at least 1, not 0",
    "--env-id HalfCheetah-v5 --group-size 2": r"--group-size.*HalfCheetah-v5",
    "--env-id Pendulum-v1 --pretrained range.pt": r"range\.pt: its actions have another range; give the --env-kwargs",
    "--env-id Pendulum-v1 --pretrained range.pt --init-log-std -3": r"brings its own log-std; .* --final-log-std",
    "--pretrained run": r"best\.pt: holds a residual, where a policy is needed; use the script that trained it",
    "--pretrained sizes.pt": r"sizes\.pt: holds a residual, where a policy is needed; use the script that trained it",
    "--pretrained kind.pt": r"kind\.pt: a policy for SO101Paper-v0, not LateralControl-v0; give its --env-id",
    "--eval-episodes 101": r"101.* the validation split has only 100; --eval-episodes 0 plays all",
    "--env-id Pendulum-v1 --eval-episodes 0": r"--eval-episodes 0 means all there are, but Pendulum-v1 has no end of",
    "--resume run --total-timesteps 512": r"holds a residual, where a policy is needed|unknown setting|--env-id",
    "--config run/config.json": r"run/config\.json: unknown setting 'base_policy'",
    "--base-policy ik": r"--base-policy",
}


@pytest.mark.parametrize("line", CONTINUOUS)
def test_training_with_ppo_continuous(command, line, monkeypatch):
    for env in (DictObservations, UnboundedActions):
        spec = gym.envs.registration.EnvSpec(f"{env.__name__}-v0", env)
        monkeypatch.setitem(gym.registry, spec.id, spec)
    before = files()
    start = "" if line.startswith("--resume") else TRAIN + ("" if "--group-size" in line else "--group-size 1 ")
    status, lines = command(start + line, ppo_continuous)
    assert status == 2, lines
    assert files() == before
    if line != "--base-policy ik":  # which tyro rejects in its own words
        assert_refused(status, lines, CONTINUOUS[line])


PLAYING = {
    "--evaluate ik": r"unknown policy 'ik': choose zero, pid, velocity-pid, feedforward, PATH\.onnx",
    "--evaluate run": r"holds a residual, where a policy is needed; use the script that trained it|unknown setting",
    "--evaluate shapes.onnx": r"shapes\.onnx: maps .*4.* needs \(N, 46\) -> \(N, 1\)",
    "--evaluate pid --eval-episodes 201": r"201.* the test split has only 200; --eval-episodes 0 plays all",
    "--evaluate pid --env-kwargs test_path empty": r"empty: no CSV file in this folder",
    "--evaluate pid --env-kwargs action_mode delta": r"plays with action_mode absolute, not delta; leave",
    "--evaluate pid --json notes": r"--json notes: no file can be written there; give a file's name",
    "--evaluate pid --env-kwargs data_path empty": r"test_path too|empty: no CSV file",
    "--evaluate pid --learning-rate 0.1": r"--learning-rate has no effect on --evaluate pid; leave it out",
    "--evaluate blend:pid:feedforward:0.5": r"pid",
}


@pytest.mark.parametrize("line", PLAYING)
def test_evaluating_with_ppo_continuous(refused, line):
    refused(PLAY + line if "--eval-episodes" not in line else line, PLAYING[line], ppo_continuous)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(refused):
    refused(TRAIN + "--device cuda", r"--device cuda: PyTorch finds no GPU here; use --device cpu")


@pytest.mark.parametrize(
    ("line", "module", "message"),
    [
        (TRAIN + "--track", "wandb", r"--track needs wandb: pip install"),
        (TRAIN + "--capture-video", "moviepy", r"--capture-video needs moviepy: pip install"),
        (PLAY + "--evaluate ik --capture-video", "moviepy", r"--capture-video needs moviepy: pip install"),
    ],
)
def test_extra_not_installed(refused, monkeypatch, line, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    refused(line, message)


def test_environment_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.bipedal_walker", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    refused(TRAIN + "--env-id BipedalWalker-v3 --base-policy zero", r"BipedalWalker-v3: .*pip install")


def test_base_returns_nan(command):
    """It shows only while the run plays, so there is a run, which says that it failed and holds no weights."""
    before = files()
    status, lines = command(TRAIN + "--run-name nan --base-policy nan.onnx")
    assert_refused(status, lines[-1:], r"nan\.onnx: returned NaN.*; export a")
    after = files()
    assert {path: after[path] for path in before} == before
    summary = json.loads(Path("runs/nan/summary.json").read_text())
    assert summary["status"] == "failed"
    assert "nan.onnx" in summary["error"]
    assert summary["sha256"] == {}


def test_flag_that_tyro_refuses(command):
    before = files()
    status, lines = command("--num-envs abc")
    assert status == 2
    assert any("--num-envs" in line for line in lines)
    assert not any("Traceback" in line for line in lines)
    assert files() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PLAY + "--evaluate missing.pt", r"missing\.pt: no such file"),
        (TRAIN + "--base-policy corrupt.onnx", r"corrupt\.onnx: not a readable ONNX model; export it again"),
        ("--resume run", r"run is complete at 256 steps; give a larger --total-timesteps"),
    ],
)
def test_as_a_process(line, message):
    before = files()
    script = [sys.executable, ppo_residual.__file__]
    done = subprocess.run([*script, *line.split()], capture_output=True, text=True, timeout=60)
    assert_refused(done.returncode, [line for line in done.stderr.splitlines() if line], message)
    assert files() == before


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
        ("best.pt", "step_000000256.pt"),
        ("checkpoints/step_000000256.pt", "final.pt"),
        ("final.pt", "policy.onnx"),
    ],
)
def test_full_disk(command, disk, last, name):
    folder = Path("runs/full")
    disk(folder / last)
    status, lines = command(TRAIN + "--run-name full")
    assert_refused(status, lines[-1:], rf"{name} could not be written \(No space left on device\); .*intact")
    assert not any(line.startswith("error: ") for line in lines[:-1])
    left = {path.name for path in folder.rglob("*")}
    assert name not in left
    assert not [other for other in left if other.endswith(".tmp")]
    for path in folder.rglob("*.pt"):
        run.load(path)
    if "step_000000128.pt" in left:
        assert run.load_checkpoint(run.find_checkpoint(str(folder)))["step"] in (128, 256)


def test_full_disk_over_an_older_file(command, disk):
    """A run that goes on, in its own directory, on a disk that is full: what it replaces stays as it was."""
    before = files()
    disk(Path("run/checkpoints/step_000000384.pt"))
    status, lines = command("--resume run --total-timesteps 384")
    assert_refused(status, lines[-1:], r"could not be written \(No space left on device\); .*intact")
    after = files()
    assert not [path for path in after if path.name.endswith(".tmp")]
    weights = [path for path in before if path.suffix in (".pt", ".onnx") and path.name != "best.pt"]
    assert {path: after[path] for path in weights} == {path: before[path] for path in weights}
    run.load(Path("run/best.pt"))
    run.load_checkpoint(Path("run/checkpoints/step_000000384.pt"))


def test_full_disk_from_the_start(refused, disk):
    disk(Path("run"))
    refused("--resume run --total-timesteps 512", r"could not be written \(No space left on device\); .*intact")


def test_full_disk_for_a_result(refused, disk):
    Path("result.json").write_text("{}")
    disk(Path())
    refused(PLAY + "--evaluate zero --json result.json", r"result\.json could not be written \(No space left.*intact")


@pytest.mark.parametrize("file", ["truncated.pt", "zeros.pt", "empty.pt"])
def test_newest_checkpoint_damaged(command, file):
    """The one before continues; each damaged file is named once."""
    damaged = ["run/final.pt", "run/checkpoints/step_000000256.pt"]
    for name in damaged:
        shutil.copy(file, name)
    status, lines = command("--resume run --total-timesteps 256")
    assert status == 0, lines
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["status"], summary["resumed_from_step"], summary["steps"]) == ("completed", 128, 256)
    skipped = [line for line in lines if line.startswith("skipped: ")]
    assert sorted(line.split(": ")[1] for line in skipped) == sorted(damaged)
    assert all("damaged" in line for line in skipped)


def test_every_checkpoint_damaged(command):
    for path in Path("run").rglob("*.pt"):
        shutil.copy("truncated.pt", path)
    before = files()
    status, lines = command("--resume run --total-timesteps 512")
    assert_refused(status, lines[-1:], r"run: no readable checkpoint in this directory; --resume takes")
    assert sorted(line.split(": ")[1] for line in lines[:-1]) == [
        "run/checkpoints/step_000000128.pt",
        "run/checkpoints/step_000000256.pt",
        "run/final.pt",
    ]
    assert files() == before
