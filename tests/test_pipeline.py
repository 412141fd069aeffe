"""The pipeline from end to end: expert, demonstrations, clone, fine-tuning, comparison; clones that look at grids."""

import json
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import lines
from test_bc import Home

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import compare_runs

import bc_pretrain as bc
import ppo_continuous
import ppo_grid_socnav
from envs import rollout, run
from envs.files import UserError


@pytest.fixture(scope="module", autouse=True)
def home():
    gym.register("CloneHome-v0", vector_entry_point=Home)
    yield
    del gym.registry["CloneHome-v0"]


@pytest.fixture
def do(monkeypatch, tmp_path):
    """Runs a command line of a script in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "export_onnx", lambda agent, obs, path, *about: path.write_bytes(b"onnx"))
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def do(script, line):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
        script.main()

    yield do
    for s, handler in before.items():
        signal.signal(s, handler)


PPO = (
    "--env-id CloneHome-v0 --num-envs 8 --num-steps 64 --minibatch-size 64 --eval-every 512 --eval-episodes 20"
    " --learning-rate 1e-3"
)


def test_a_checkpoint_is_a_policy_for_whoever_has_other_settings(do, tmp_path):
    """Of what resuming needs, such as the returns of so many environments, an expert and a fine-tuned run take none."""
    do(ppo_continuous, f"{PPO} --total-timesteps 1024 --checkpoint-every 512 --run-name expert")
    checkpoint = "runs/expert/checkpoints/step_000000512.pt"
    do(bc, f"collect --policy {checkpoint} --dataset home --episodes 4 --action-noise 0.1")
    assert json.loads((tmp_path / "runs/datasets/home.json").read_text())["parents"][checkpoint]["steps"] == 512
    do(ppo_continuous, f"{PPO} --total-timesteps 512 --num-envs 4 --pretrained {checkpoint} --run-name tuned")
    assert json.loads((tmp_path / "runs/tuned/summary.json").read_text())["status"] == "completed"


def test_five_commands_lead_from_an_expert_to_a_comparison(do, capsys):
    do(ppo_continuous, f"{PPO} --total-timesteps 8192 --run-name expert")
    do(bc, "collect --policy runs/expert --dataset home --episodes 30 --seeds 3 4 --action-noise 0.1")
    do(bc, "validate home")
    do(bc, "train --dataset home --run-name clone --epochs 20 --learning-rate 3e-3")
    do(ppo_continuous, f"{PPO} --total-timesteps 8192 --run-name scratch --seed 2")
    do(ppo_continuous, f"{PPO} --total-timesteps 8192 --pretrained runs/clone --critic-warmup 1 --run-name tuned")
    capsys.readouterr()
    criterion = "--criterion mean_return -20 --window 1"
    do(compare_runs, f"--baseline runs/scratch --pretrained runs/tuned {criterion}")
    assert "fine-tuning alone" in capsys.readouterr().out

    # the lineage, from the fine-tuned run back to the expert
    config = json.loads(Path("runs/tuned/config.json").read_text())
    clone = config["parents"]["runs/clone/best.pt"]
    dataset = clone["config"]["parents"]["runs/datasets/home.npz"]
    expert = dataset["config"]["parents"]["runs/expert/best.pt"]
    assert [one["sha256"] for one in (clone, dataset, expert)] == [
        run.sha256(Path(path)) for path in ("runs/clone/best.pt", "runs/datasets/home.npz", "runs/expert/best.pt")
    ]
    steps = json.loads(Path("runs/datasets/home.json").read_text())["played"]["env_steps"]
    assert compare_runs.charges(compare_runs.read_run("runs/tuned")) == (steps, 8192)


def test_evaluations_before_each_of_the_first_updates_change_nothing(do):
    line = f"{PPO} --total-timesteps 4096 --eval-every 2048"
    do(ppo_continuous, f"{line} --eval-first 3 --run-name looked")
    do(ppo_continuous, f"{line} --run-name plain")
    assert [one["step"] for one in lines(Path("runs/looked/first_evaluations.jsonl"))] == [0, 512, 1024]
    looked, plain = (lines(Path(f"runs/{name}/evaluations.jsonl")) for name in ("looked", "plain"))
    assert looked == plain
    assert [one["step"] for one in plain] == [2048, 4096]
    assert not Path("runs/plain/first_evaluations.jsonl").exists()


def test_a_run_that_resumes_looks_once_at_each(do):
    line = f"{PPO} --eval-first 3 --checkpoint-every 512 --no-anneal-lr --run-name run"
    do(ppo_continuous, f"{line} --total-timesteps 1024")
    do(ppo_continuous, "--resume runs/run --total-timesteps 2048")
    assert [one["step"] for one in lines(Path("runs/run/first_evaluations.jsonl"))] == [0, 512, 1024]


# Clones that look at a grid

PLACE = {"scenario": "classic_head_on_corridor_medium", "grid_channels": "near", "grid_size": 16}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Demonstrations of a scripted controller in one corridor: the directory of runs that holds them."""
    root = str(tmp_path_factory.mktemp("runs"))
    collected = {"policy": "pursuit", "env_id": "SocNavGrid-v0", "env_kwargs": PLACE, "episodes": 4, "run_root": root}
    bc.collect(bc.CollectArgs("corridor", **collected))
    return root


def settings_of(root, **changes):
    settings = {"dataset": "corridor", "epochs": 3, "minibatch_size": 32, "hidden_sizes": (16,), "eval_episodes": 2}
    return bc.Args(**{**settings, "run_root": root, "run_name": "clone", **changes})


def test_grids_are_recorded_as_bytes(dataset):
    with np.load(Path(dataset) / "datasets" / "corridor.npz") as arrays:
        n = arrays["start"][-1]
        assert (arrays["obs_grid"].dtype, arrays["obs_grid"].shape) == (np.uint8, (n, 1, 16, 16))
        assert arrays["obs_pedestrians"].shape == (n, 64, 4)
        assert set(arrays["scenario"]) == {PLACE["scenario"]}
    assert bc.validate(bc.ValidateArgs("corridor", run_root=dataset))


@pytest.mark.parametrize("encoder", ["rays", "cnn"])
def test_a_clone_that_looks_at_a_grid_is_one_that_ppo_goes_on_from(dataset, tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(run, "export_onnx", lambda agent, obs, path, *about: path.write_bytes(b"onnx"))
    summary = bc.train(settings_of(dataset, grid_encoder=encoder, run_root=dataset, run_name=f"clone_{encoder}"))
    losses = [float(row["validation/loss"]) for row in run.read_progress(Path(summary["run"]) / "progress.csv")]
    assert losses[-1] < losses[0]
    policy = run.load_policy(summary["run"], kind="policy")
    found = bc.Demonstrations(Path(dataset) / "datasets" / "corridor.npz")
    clone, _ = bc.trained(summary["run"])

    seen, learn = [], ppo_grid_socnav.learn

    def spy(agent, *args, **kwargs):
        seen.append(rollout.Deployed(agent))
        return learn(agent, *args, **kwargs)

    monkeypatch.setattr(ppo_grid_socnav, "learn", spy)
    settings = {"env_kwargs": PLACE, "num_envs": 2, "num_steps": 8, "minibatch_size": 16, "hidden_sizes": (16,)}
    settings |= {
        "threads": 1,
        "dry_run": True,
        "pretrained": summary["run"],
        "run_root": str(tmp_path),
        "run_name": "tuned",
    }
    ppo_grid_socnav.train(ppo_grid_socnav.Args.tuned(encoder, **settings))
    obs = next(found.chunks(8))
    assert np.array_equal(seen[0](obs), clone(obs))
    assert policy["args"]["grid_encoder"] == encoder


def test_critic_warmup_leaves_a_grid_policy_as_it_is(dataset, tmp_path, monkeypatch):
    """Its encoders are the actor's own and the critic's own."""
    monkeypatch.setattr(run, "export_onnx", lambda agent, obs, path, *about: path.write_bytes(b"onnx"))
    settings = {"env_kwargs": PLACE, "num_envs": 4, "num_steps": 16, "minibatch_size": 32, "hidden_sizes": (16,)}
    settings |= {
        "threads": 1,
        "total_timesteps": 192,
        "critic_warmup": 2,
        "eval_episodes": 1,
        "run_root": str(tmp_path),
    }
    settings |= {"final_log_std": None, "eval_every": 0, "checkpoint_every": 64, "run_name": "run"}
    ppo_grid_socnav.train(ppo_grid_socnav.Args.tuned(**settings))
    first, second, third = (
        run.load(tmp_path / "run" / "checkpoints" / f"step_{step:09d}.pt")["agent"] for step in (64, 128, 192)
    )
    actor = [name for name in first if name.startswith("actor") or name == "log_std"]
    critic = [name for name in first if name.startswith("critic")]
    assert all(torch.equal(first[name], second[name]) for name in actor)
    assert any(not torch.equal(second[name], third[name]) for name in actor)
    assert any(not torch.equal(first[name], second[name]) for name in critic)


def test_demonstrations_of_another_grid_are_refused(dataset):
    with pytest.raises(UserError, match=r"corridor\.npz: is for grid_size 16, not 32; change --env-kwargs"):
        bc.train(settings_of(dataset, env_kwargs={"grid_size": 32}))
