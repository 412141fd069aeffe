"""Somebody else's environment, with unusual but legal spaces, arguments and failures, trains, evaluates and exports."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import odd_envs
import onnxruntime
import pytest
from helpers import lines

import ppo_continuous
import ppo_residual
from envs import UserError, cli, evaluation, float32_bounds
from tools import evaluate

SCRIPT = ppo_continuous
TINY = (
    "--num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 128 --update-epochs 1 --eval-every 0"
    " --eval-episodes 2 --run-name run --hidden-sizes 8 --env-id odd_envs:"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd_envs.Base.executed.clear()


def returns_of(policy, env_id, **kwargs):
    """Returns of three episodes."""
    result = evaluate.run(evaluate.Args(policy=policy, env_id=env_id, episodes=3, **kwargs))
    return [episode["return"] for episode in result["per_episode"]]


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("IntObs", ppo_continuous),
        ("ByteObs", ppo_residual),
        ("Asymmetric", ppo_continuous),
        ("Float64", ppo_continuous),
        ("Float64", ppo_residual),
    ],
)
def test_actions_stay_in_the_space(name, script, command, monkeypatch):
    """In training with a large noise, and of a network that saturates in evaluation and from the ONNX file. The
    environment refuses an action outside its space, and both bounds are reached each time."""

    def saturate(agent, stats, step):
        if step == 128:
            agent.actor[-1].weight.data *= 1e6

    monkeypatch.setattr(script, "check_update", saturate)
    residual = " --base-policy zero --residual-scale 100" if script is ppo_residual else ""
    status, _ = command(f"{TINY}{name}-v0 --init-log-std 2{residual}", script)
    assert status == 0
    returns = []
    for file in (None, "runs/run", "runs/run/policy.onnx"):
        if file is not None:
            odd_envs.Base.executed.clear()
            returns.append(returns_of(file, f"odd_envs:{name}-v0"))
        executed, space = np.array(odd_envs.Base.executed), vars(odd_envs)[name].action_space
        np.testing.assert_allclose(executed.min(0), space.low, rtol=1e-6)
        np.testing.assert_allclose(executed.max(0), space.high, rtol=1e-6)
    assert returns[0] == pytest.approx(returns[1], rel=1e-4)
    session = onnxruntime.InferenceSession("runs/run/policy.onnx")
    assert [x.type for x in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2


def test_float32_bounds_are_rounded_inward():
    """The bounds lie inside the space, and the next float32 numbers outside."""
    rng = np.random.default_rng(0)
    low = np.concatenate([-rng.random(100), [0.0, -0.7, -1.0, 1e-50]])
    high = low + np.concatenate([rng.random(100), [5.0, 1.0, 2.0, 1.0]])
    space = gym.spaces.Box(low, high, dtype=np.float64)
    inner_low, inner_high = float32_bounds(space)
    assert inner_low.dtype == inner_high.dtype == np.float32
    assert space.contains(inner_low.astype(np.float64))
    assert space.contains(inner_high.astype(np.float64))
    assert (np.nextafter(inner_low, np.float32(-np.inf)).astype(np.float64) < low).all()
    assert (np.nextafter(inner_high, np.float32(np.inf)).astype(np.float64) > high).all()
    assert (inner_low != low.astype(np.float32)).any()  # a plain cast would leave the space


def test_tuple_arguments():
    """From the command line into the files of the run, and from there into its evaluation and continuation."""
    env_id = "odd_envs:Tuples-v0"

    def train(*argv):
        return ppo_continuous.train(cli.parse(ppo_continuous.Args, [*argv, "--env-id", env_id]))["status"]

    argv = TINY.removesuffix(" --env-id odd_envs:").split()
    assert train(*argv, "--env-kwargs", "gains", "(1.0, 2.0)") == "completed"
    assert json.loads(Path("runs/run/config.json").read_text())["args"]["env_kwargs"] == {"gains": [1.0, 2.0]}
    from_onnx = returns_of("runs/run/policy.onnx", env_id, env_kwargs={"gains": (1.0, 2.0)})
    assert returns_of("runs/run", env_id) == pytest.approx(from_onnx, rel=1e-4)
    assert train("--resume", "runs/run", "--total-timesteps", "192") == "completed"
    assert train("--config", "runs/run/config.json", "--run-name", "again") == "completed"


def test_is_success_is_counted(command):
    """The evaluation's successes are those of a plain loop over environments with the same seeds."""
    command(f"{TINY}Lucky-v0 --eval-episodes 40")
    expected = []
    for i in range(40):
        env = odd_envs.Lucky()
        env.reset(seed=int(np.random.SeedSequence([1, i], spawn_key=(1,)).generate_state(1)[0]))
        expected.append(env.lucky)
    (logged,) = lines(Path("runs/run/evaluations.jsonl"))
    assert [episode["success"] for episode in logged["per_episode"]] == expected
    assert logged["success_rate"] == pytest.approx(np.mean(expected))
    assert 0.2 < np.mean(expected) < 0.8
    assert {episode["success"] for episode in lines(Path("runs/run/episodes.jsonl"))} == {True, False}


def test_an_error_of_the_environment_keeps_its_traceback(command):
    """It is not turned into one line, although it is an OSError; the run says that it failed."""
    with pytest.raises(OSError, match="lost the connection to the robot"):
        command(f"{TINY}Raises-v0")
    summary = json.loads(Path("runs/run/summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "lost the connection to the robot")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DiscreteActions", r"actions must be a Box of floats, not Discrete\(3\); discrete actions need a categorical"),
        ("IntActions", r"actions must be a Box of floats, not of int64; declare a float Box and round inside"),
    ],
)
def test_actions_that_are_not_floats_are_refused(refused, name, message):
    refused(f"{TINY}{name}-v0", message)


def test_an_episode_that_never_ends_stops_the_evaluation(command, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 50)
    message = "did not end within 50 steps; register the environment with max_episode_steps"
    status, lines = command(f"{TINY}Endless-v0")
    assert (status, lines[-1].endswith(message)) == (2, True)
    with pytest.raises(UserError, match=message):
        returns_of("zero", "odd_envs:Endless-v0")
