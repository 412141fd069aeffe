"""The pipeline from end to end: expert, dataset, clone, fine-tuning, comparison. Policies of all scripts are experts,
and PPO starts from clones."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import make_quick
from test_bc import Home, read, train_args

import bc_pretrain as bc
import ppo_continuous
import ppo_grid_socnav
import ppo_residual
from envs import demonstrations, evaluation, make_vec
from tools import compare_runs

SCRIPT = bc
PPO = (
    "--env-id CloneHome-v0 --num-envs 8 --num-steps 64 --minibatch-size 64 --eval-every 512 --eval-episodes 4"
    " --checkpoint-every 512 --hidden-sizes 16"
)
# Episodes of 25 steps in one corridor
GRID = {"scenario": "classic_head_on_corridor_medium", "grid_channels": "near,combined", "grid_size": 20}
TINY_GRID = {"env_id": "SocNavGrid-v0", "env_kwargs": GRID, "hidden_sizes": (16,), "eval_episodes": 2}
TINY_PPO = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "threads": 1, "dry_run": True}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    spec = gym.envs.registration.EnvSpec("CloneHome-v0", vector_entry_point=Home)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    monkeypatch.chdir(tmp_path)
    make_quick(monkeypatch)


def collect(dataset, **settings):
    bc.collect(bc.CollectArgs(dataset=dataset, **{"episodes": 4} | settings))
    return read(dataset)


def load_policy(path):
    """The policy of a file, and the file."""
    checkpoint = evaluation.read_policy(path)
    envs = make_vec(checkpoint["env_id"], 1, **checkpoint["env_kwargs"])
    return evaluation.load_script(checkpoint["script"]).load_policy(checkpoint, envs), checkpoint


def initial_agent(monkeypatch, script, args):
    """The state_dict with which a PPO script starts its first rollout."""

    def stop(agent, *args):
        raise StopIteration(agent.state_dict())

    monkeypatch.setattr(script, "collect_rollout", stop)
    with pytest.raises(StopIteration) as started:
        script.train(args)
    return started.value.value


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_from_an_expert_to_a_comparison(command, monkeypatch):
    """The fine-tuned run is charged the steps of its demonstrations and of its expert."""

    def run_script(script, line):
        status, errors = command(line, script)
        assert status == 0, errors

    run_script(ppo_continuous, f"{PPO} --total-timesteps 1024 --run-name expert")
    expert = "runs/expert/checkpoints/step_000000512.pt"
    run_script(bc, f"collect --policy {expert} --dataset home --episodes 6 --seeds 3 4 --action-noise 0.1")
    run_script(bc, "validate home")
    run_script(bc, "train --dataset home --run-name clone --epochs 2 --hidden-sizes 16")
    run_script(ppo_continuous, f"{PPO} --total-timesteps 1024 --run-name scratch")
    tuned = f"{PPO} --total-timesteps 1024 --pretrained runs/clone --critic-warmup-updates 1 --run-name tuned"
    run_script(ppo_continuous, tuned)
    run_script(compare_runs, "--baseline runs/scratch --pretrained runs/tuned --criterion mean_return -1e6")
    assert compare_runs.charged_steps(compare_runs.read_run("runs/tuned")) == (len(read("home")["reward"]), 512)

    parents, digests = json.loads(Path("runs/tuned/config.json").read_text())["parents"], []
    for path in ("runs/clone/best.pt", "runs/datasets/home.npz", expert):  # each of them made from the next one
        assert list(parents) == [path]
        digests.append(parents[path]["sha256"] == evaluation.sha256(path))
        parents = parents[path]["config"]["parents"]
    assert digests == [True, True, True]
    assert parents == {}

    args = ppo_continuous.Args(env_id="CloneHome-v0", pretrained="runs/clone", hidden_sizes=(16,), **TINY_PPO)
    assert_equal(initial_agent(monkeypatch, ppo_continuous, args), load_policy("runs/clone")[1]["agent"])


def test_a_residual_run_is_an_expert():
    """Its actions are those of the base plus the bounded residual."""
    args = ppo_residual.Args(num_envs=2, num_steps=32, minibatch_size=32, dry_run=True, run_name="arm")
    ppo_residual.train(args)
    dataset = collect("arm", policy="runs/arm", episodes=2)
    agent = ppo_residual.make_residual_agent(make_vec("SO101Paper-v0", 1), args)
    agent.load_state_dict(evaluation.read_pt("runs/arm/best.pt")["agent"])
    with torch.no_grad():
        residual = agent.action_mean(torch.as_tensor(dataset["obs"])).clamp(-1, 1).numpy()
    envs = make_vec("SO101Paper-v0", 1)
    base, space = envs.controllers["ik"]()(dataset["obs"]), envs.single_action_space
    np.testing.assert_allclose(dataset["action"], np.clip(base + 0.02 * residual, space.low, space.high), atol=1e-6)
    assert np.abs(dataset["action"] - base).max() > 1e-6
    assert dataset.env_id == "SO101Paper-v0"
    assert list(dataset.metadata["parents"]) == ["runs/arm/best.pt"]


@pytest.fixture
def corridor():
    return collect("corridor", policy="pursuit", env_id="SocNavGrid-v0", env_kwargs=GRID)


def test_packed_grids_come_out_as_they_went_in(corridor):
    """Every part of every observation, against the environment replayed from the seed."""
    assert corridor["obs_grid"].shape[1:] == (2, 20, 3)  # 20 cells in 3 bytes
    assert set(corridor["scenario"]) == {GRID["scenario"]}
    for i in range(len(corridor)):
        envs = corridor.make_envs()
        obs, _ = envs.reset(seed=[corridor["seed"][i].tolist()])
        recorded = corridor.obs(corridor.steps(i))
        assert recorded.keys() == obs.keys()
        for t, action in enumerate(corridor["executed_action"][corridor.steps(i)]):
            for name, x in obs.items():
                assert recorded[name].dtype == x.dtype
                assert np.array_equal(recorded[name][t], x[0]), (name, t)
            obs, *_ = envs.step(action[None])
    assert corridor["obs_grid"].any()
    assert demonstrations.validate(bc.ValidateArgs(dataset="corridor"))


@pytest.mark.parametrize("encoder", ["rays", "cnn"])
def test_a_grid_clone_is_an_expert_and_starts_ppo(corridor, monkeypatch, encoder):
    bc.train(train_args(dataset="corridor", grid_encoder=encoder, eval_episodes=2, run_name="clone"))
    losses = compare_runs.read_run("runs/clone")["progress"]["validation/loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    clone, checkpoint = load_policy("runs/clone")
    dataset = collect("again", policy="runs/clone", episodes=2)
    assert np.array_equal(dataset["action"], clone(dataset.obs(slice(None))))
    args = ppo_grid_socnav.Args(grid_encoder=encoder, pretrained="runs/clone", **TINY_GRID, **TINY_PPO)
    assert_equal(initial_agent(monkeypatch, ppo_grid_socnav, args), checkpoint["agent"])
