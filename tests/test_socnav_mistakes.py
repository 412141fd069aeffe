"""ppo_grid_socnav.py: a user's mistake ends in one line that says what is wrong and what to do, with status 2."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from helpers import assert_refused, files

import envs
import ppo_continuous
import ppo_grid_socnav as ppo
from envs import run
from envs.socnav import metrics

SCRIPT = ppo
PLACE = {"scenario": "francis2023_frontal_approach", "grid_channels": "near"}
TINY = ppo.Args(
    env_kwargs=PLACE, num_envs=8, num_steps=16, minibatch_size=64, update_epochs=1, hidden_sizes=(16,), eval_episodes=1,
    total_timesteps=128, checkpoint_every=128, threads=1,
)  # fmt: skip
TRAIN = (
    "--num-envs 8 --num-steps 16 --minibatch-size 64 --update-epochs 1 --hidden-sizes 16 --eval-episodes 1"
    " --total-timesteps 128 --checkpoint-every 128 --threads 1 "
)
THERE = "--env-kwargs scenario francis2023_frontal_approach "
PLAY = "--eval-episodes 1 "


def policy(**settings):
    """What a policy file of these settings holds, its weights the initial ones."""
    args = ppo.with_reward(replace(TINY, **settings))
    agent = ppo.make_grid_agent(envs.make_vec(args.env_id, 1, **args.env_kwargs), args).state_dict()
    return {
        "kind": "policy", "env_id": args.env_id, "env_kwargs": args.env_kwargs, "args": asdict(args), "agent": agent,
        "step": 128,
    }  # fmt: skip


def placeholder(agent, obs, path, *about):
    path.write_bytes(b"onnx")


def in_one_place(line):
    """The command line with a scenario, so that its world is made in no time, unless it says something of that."""
    if "--env-kwargs scenario" in line:
        return line
    return line.replace("--env-kwargs ", THERE) if "--env-kwargs " in line else THERE + line


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A finished run, and files of every sort that a user may confuse with its own."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "export_onnx", placeholder)
        ppo.train(replace(TINY, run_root=str(folder), run_name="run"))
    others = {
        "channels": {"env_kwargs": {**PLACE, "grid_channels": "obstacles"}},
        "two_channels": {"env_kwargs": {**PLACE, "grid_channels": "obstacles,near"}},
        "size": {"env_kwargs": {**PLACE, "grid_size": 32}},
        "bicycle": {"env_kwargs": {**PLACE, "robot": "bicycle"}},
        "rays": {"rays": 24},
        "cnn": {"grid_encoder": "cnn", "cnn_channels": (4, 4, 4)},
        "cnn_channels": {
            "grid_encoder": "cnn", "cnn_channels": (4, 4, 4), "env_kwargs": {**PLACE, "grid_channels": "obstacles"},
        },
    }  # fmt: skip
    for name, settings in others.items():
        run.save(folder / f"{name}.pt", policy(**settings))
    args = ppo_continuous.Args(env_id="Pendulum-v1")
    agent = ppo_continuous.make_agent(envs.make_vec("Pendulum-v1", 1), args).state_dict()
    theirs = {"kind": "policy", "env_id": "Pendulum-v1", "env_kwargs": {}, "args": asdict(args), "agent": agent}
    run.save(folder / "pendulum.pt", {**theirs, "step": 0})

    simple = metrics.REWARDS["simple"]
    snqi = json.loads(metrics.FILE.read_text())
    files = {
        "good": simple,
        "lacking": {name: simple[name] for name in ("time", "obstacle_contact")},
        "unknown": {**simple, "progres": 1.0},
        "word": {**simple, "goal": "much"},
        "bool": {**simple, "goal": True},
        "null": {**simple, "goal": None},
        "nan": {**simple, "goal": float("nan")},
        "list": [1.0],
        "snqi": {**snqi, "weights": {name: w for name, w in snqi["weights"].items() if name != "jerk"}},
        "snqi_empty": {},
        "snqi_p95": {**snqi, "baselines": {**snqi["baselines"], "near_misses": {"median": 1.0}}},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "text.json").write_text("goal: 1.0")
    return folder


@pytest.fixture(autouse=True)
def place(originals, tmp_path, monkeypatch):
    """Every test works in its own copy; what is not refused need not take the time of an export."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "export_onnx", placeholder)


TRAINING = {
    # the task
    "--env-kwargs scenario francis2023_frontal": r"no scenario 'francis2023_frontal'; there are .*_frontal_approach",
    "--env-kwargs scenario francis2023_blind_corner": r"scenario francis2023_blind_corner is kept for the test split",
    "--eval-env-kwargs scenario nowhere": r"no scenario 'nowhere'; there are",
    "--env-kwargs robot tricycle": r"robot must be one of differential, bicycle, not 'tricycle'",
    "--env-kwargs robot 3": r"robot must be str, not 3",
    "--env-kwargs robot_radius 0": r"robot_radius must be above 0 and at most 2 m, not 0",
    "--env-kwargs wheels 3": r"no argument 'wheels'; it has .*robot",
    "--env-kwargs crowd_density 0": r"crowd_density must be above 0 .*, not 0",
    "--env-kwargs crowd_density -0.1": r"crowd_density must be above 0 .*, not -0\.1",
    "--env-kwargs crowd_density 5": r"crowd_density must be .*at most 0\.5, not 5",
    "--env-kwargs device cpu": r"device is not for --env-kwargs",
    "--env-kwargs reward simple": r"reward is not for --env-kwargs",
    "--env-kwargs split test": r"split is not for --env-kwargs: the script sets it",
    "--eval-episodes 0": r"--eval-episodes 0 means all there are, but SocNavGrid-v0 has no end of them; give a number",
    "--group-size 2": r"--group-size: SocNavGrid-v0 cannot put several environments in one situation; leave it out",
    # the grid
    "--env-kwargs grid_channels lidar": r"grid_channels must be some of obstacles, .*near, not 'lidar'",
    "--env-kwargs grid_channels near,": r"grid_channels must be some of .*, not ''",
    "--env-kwargs grid_size 63": r"grid_size must be even and at least 2, not 63",
    "--env-kwargs grid_size 0": r"grid_size must be even and at least 2, not 0",
    "--env-kwargs grid_size 8192 --num-envs 64 --total-timesteps 1024": (
        r"24 grids of 8192 x 8192 cells take .* GiB.*; choose a smaller"
    ),
    "--env-kwargs grid_resolution 0": r"grid_resolution must be above 0 m, not 0",
    "--grid-encoder cnn --env-kwargs grid_channels combined": r"grid_channels",
    # rewards and the index
    "--reward speed": r"reward must be one of simple, .*snqi_step, not 'speed'",
    "--reward simple --reward-weights missing.json": r"missing\.json: no such file",
    "--reward simple --reward-weights run": r"run: no such file",
    "--reward simple --reward-weights text.json": r"text\.json: not JSON",
    "--reward simple --reward-weights list.json": r"list\.json: must hold one JSON object",
    "--reward simple --reward-weights lacking.json": r"lacking\.json: .*must have pedestrian_contact, goal; add",
    "--reward punish_action --reward-weights good.json": r"good\.json: .*punish_action must have action_change; add",
    "--reward simple --reward-weights unknown.json": r"unknown\.json: no term 'progres'; there are .*progress",
    "--reward simple --reward-weights word.json": r"word\.json: goal must be a number, not 'much'",
    "--reward simple --reward-weights bool.json": r"bool\.json: goal must be a number, not True",
    "--reward simple --reward-weights null.json": r"null\.json: goal must be a number, not None",
    "--reward simple --reward-weights nan.json": r"nan\.json: goal must be a .*number, not nan",
    "--env-kwargs snqi snqi.json": r"snqi\.json: weights must have jerk; add what is missing",
    "--env-kwargs snqi snqi_empty.json": r"snqi_empty\.json: weights must have success, .*jerk; add what is missing",
    "--env-kwargs snqi snqi_p95.json": r"snqi_p95\.json: baselines of near_misses must have p95; add what is missing",
    "--env-kwargs snqi missing.json": r"missing\.json: no such file",
    "--best-metric sucess_rate": r"--best-metric sucess_rate: no such metric; there are success_rate, .*snqi",
    # the networks
    "--rays 0": r"--rays must be an even number, half of them on either side, not 0",
    "--rays 35": r"--rays must be an even number, half of them on either side, not 35",
    "--people 0": r"--people must be at least 1, not 0",
    "--set-units 0": r"--set-units must be at least 1, not 0",
    "--hidden-sizes 16 0": r"--hidden-sizes must be at least 1, not \(16, 0\)",
    "--grid-encoder cnn --cnn-channels": r"--cnn-channels must .*, not \(\)",
    "--grid-encoder cnn --cnn-channels 4 0 4": r"--cnn-channels must .*, not \(4, 0, 4\)",
    "--grid-encoder cnn --cnn-channels 4 4 4 4": r"--cnn-channels must .*, not \(4, 4, 4, 4\)",
    "--minibatch-size 100": r"--minibatch-size must .*divide num_envs \* num_steps = 128, not 100",
    "--num-envs auto --minibatch-size 100": r"--minibatch-size must .*divide num_envs \* num_steps = 4096, not 100",
    "--num-envs 0": r"--num-envs must be at least 1, not 0",
    # other policies
    "--pretrained bicycle.pt": r"bicycle\.pt: its actions have another range; give the --env-kwargs",
    "--pretrained two_channels.pt": r"two_channels\.pt: ",
    "--pretrained channels.pt": r"channels\.pt: .*channels",
    "--pretrained size.pt": r"size\.pt: .*grid_size",
    "--pretrained rays.pt": r"rays\.pt: .*(--rays|settings)",
    "--pretrained cnn.pt": r"cnn\.pt: .*(--grid-encoder|settings)",
    "--pretrained pendulum.pt": r"pendulum\.pt: a policy for Pendulum-v1, not SocNavGrid-v0; give its --env-id",
    "--pretrained missing.pt": r"missing\.pt: no such file",
    "--grid-encoder cnn --cnn-channels 4 4 4 --pretrained run": r"run: .*(--grid-encoder|settings)",
    "--grid-encoder cnn --cnn-channels 4 4 4 --env-kwargs grid_channels near --pretrained cnn_channels.pt": (
        r"cnn_channels\.pt: .*channels"
    ),
    "--config run/summary.json": r"unknown setting 'status'",
}


@pytest.mark.parametrize("line", TRAINING)
def test_training(refused, line):
    refused(TRAIN + in_one_place(line), TRAINING[line])


@pytest.mark.parametrize("env_id", ["Ballbot-v0", "LateralControl-v0", "SO101Paper-v0", "Pendulum-v1"])
def test_training_in_an_environment_without_these_observations(refused, env_id):
    refused(TRAIN + f"--env-id {env_id}", rf"SocNavGrid-v0.* not |{env_id}.*SocNavGrid-v0")


def test_an_unknown_environment(refused):
    refused(TRAIN + "--env-id SocNavGrid-v1", r"unknown environment 'SocNavGrid-v1'; ours are .*SocNavGrid-v0")


def test_an_unknown_encoder_is_refused_by_tyro(command):
    before = files()
    status, lines = command("--grid-encoder transformer")
    assert status == 2
    text = " ".join(lines)
    assert "transformer" in text
    assert "rays" in text
    assert "cnn" in text
    assert "Traceback" not in text
    assert files() == before


RESUMING = {
    "--resume run": r"run is complete at 128 steps; give a larger --total-timesteps",
    "--resume run --total-timesteps 256 --env-kwargs grid_size 32": r"--env-kwargs was .* in run and cannot change",
    "--resume run --total-timesteps 256 --env-kwargs robot bicycle": r"--env-kwargs was .* in run and cannot change",
    "--resume run --total-timesteps 256 --reward simple": r"--(reward|env-kwargs) was .* in run and cannot change",
    "--resume run --total-timesteps 256 --grid-encoder cnn": r"--grid-encoder was 'rays' in run and cannot change",
    "--resume run --total-timesteps 8192 --num-envs auto": r"--num-envs was 8 in run and cannot change",
    "--resume cnn.pt --total-timesteps 256": r"cnn\.pt: a policy without its training state; --pretrained starts",
    "--resume run --total-timesteps 256 --best-metric speed": r"--best-metric",
}


@pytest.mark.parametrize("line", RESUMING)
def test_resuming(refused, line):
    refused(line, RESUMING[line])


EVALUATING = {
    "--evaluate run --env-kwargs grid_size 32": r"run: .*grid_size",
    "--evaluate run --env-kwargs grid_channels obstacles": r"run: .*channels",
    "--evaluate run --env-kwargs grid_channels near,obstacles": r"run: ",
    "--evaluate run --env-kwargs robot bicycle": r"run: its actions have another range; give the --env-kwargs",
    "--evaluate run --env-kwargs scenario nowhere": r"no scenario 'nowhere'; there are",
    "--evaluate run --env-kwargs crowd_density 0": r"crowd_density must be above 0 .*, not 0",
    "--evaluate cnn.pt --env-kwargs grid_size 32": r"cnn\.pt: ",
    "--evaluate pursuit --grid-encoder cnn": r"--grid-encoder has no effect on --evaluate pursuit; leave it out",
    "--evaluate run --grid-encoder cnn": r"--grid-encoder has no effect on --evaluate run; leave it out",
    "--evaluate run --reward simple": r"--reward has no effect on --evaluate run; leave it out",
    "--evaluate run --rays 12": r"--rays has no effect on --evaluate run; leave it out",
    "--evaluate run --best-metric snqi": r"--best-metric has no effect on --evaluate run; leave it out",
    "--evaluate pendulum.pt": r"pendulum\.pt|SocNavGrid-v0",
    "--evaluate run --env-id Pendulum-v1": r"Pendulum-v1",
    "--evaluate run --env-id Ballbot-v0": r"Ballbot-v0|SocNavGrid-v0",
    "--evaluate pursuit --env-id Ballbot-v0": r"unknown policy 'pursuit': choose zero",
    "--evaluate chase": r"unknown policy 'chase': choose zero, pursuit, pursuit-stop",
    "--evaluate blend:pursuit:pursuit-stop:0.5": r"pursuit looks at more than the observation",
    "--evaluate pursuit --eval-episodes 0": r"--eval-episodes 0 means all there are, but SocNavGrid-v0 has no end",
    "--evaluate missing.onnx": r"missing\.onnx: no such file",
    "--evaluate run/policy.onnx": r"policy\.onnx: not a readable ONNX model; export it again",
    "--evaluate missing.pt": r"missing\.pt: no such file",
    "--evaluate pursuit --json nowhere/result.json": r"--json nowhere.result\.json: no file can be written there",
}


@pytest.mark.parametrize("line", EVALUATING)
def test_evaluating(refused, line):
    learned = ".pt" in line or "--env-id" in line or "--evaluate run " in line  # and so has its scenario
    refused(PLAY + (line if learned else in_one_place(line)), EVALUATING[line])


def test_as_a_process():
    """As a user sees it, and before anything is made."""
    before = files()
    line = f"{TRAIN} {THERE} --reward speed"
    done = subprocess.run([sys.executable, ppo.__file__, *line.split()], capture_output=True, text=True, timeout=60)
    assert_refused(done.returncode, [line for line in done.stderr.splitlines() if line], r"reward must be one of")
    assert files() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(refused):
    refused(TRAIN + THERE + "--device cuda", r"--device cuda: PyTorch finds no GPU here; use --device cpu")
