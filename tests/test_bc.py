"""bc_pretrain.py: each recorded pair is the expert's action in its state; clones are trained and saved as specified."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import lines, placeholder_export

import bc_pretrain as bc
import ppo_continuous
import ppo_grid_socnav
import ppo_residual
from envs import UserError, demonstrations, evaluation, make_vec, run
from envs.batch_env import BatchEnv
from envs.lateral import FeedForward, LateralControl

SCRIPT = bc


class StraightHome:
    def __call__(self, obs):
        return np.clip(-obs[:, :1], -0.05, 0.15).astype(np.float32)


class Home(BatchEnv):
    """A point at x in [-1, 1] moves by its action; each step costs its distance from 0, the goal; 30 steps."""

    controllers = {"straight": StraightHome}  # noqa: RUF012

    def __init__(self, num_envs=1, training=True, split="train", render_mode=None):
        box, action = gym.spaces.Box(-20, 20, (1,), np.float32), gym.spaces.Box(-0.05, 0.15, (1,), np.float32)
        super().__init__(num_envs, box, action, 30, training, split, render_mode)
        self.x = np.zeros(num_envs)

    def start(self, rows):
        for i in rows:
            self.x[i] = self.rngs[i].uniform(-1, 1)

    def advance(self, action):
        self.x += np.clip(action[:, 0], -0.05, 0.15)
        arrived = np.abs(self.x) < 0.02
        return -np.abs(self.x), arrived, {"is_success": arrived}

    def observe(self, rows):
        return self.x[rows, None].astype(np.float32)

    def state(self):
        return {"x": self.x}

    def render(self):
        return self.x.copy()


@pytest.fixture(scope="module", autouse=True)
def home():
    gym.register("CloneHome-v0", vector_entry_point=Home)
    yield
    del gym.registry["CloneHome-v0"]


@pytest.fixture(scope="module")
def originals(home, tmp_path_factory):
    """runs/datasets/home, demonstrations with noise, and runs/clone, which has an ONNX file."""
    root = str(tmp_path_factory.mktemp("originals"))
    collect("home", run_root=root)
    bc.train(train_args(epochs=5, learning_rate=1e-2, run_root=root, run_name="clone"))
    return Path(root)


@pytest.fixture(autouse=True)
def place(originals, tmp_path, monkeypatch):
    """Every test works in its own copy and exports a placeholder."""
    shutil.copytree(originals, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "export_onnx", placeholder_export)


def collect(dataset, **settings):
    """Collect a dataset of the home task and return it."""
    defaults = {"policy": "straight", "env_id": "CloneHome-v0", "episodes": 80, "seeds": (3, 4), "action_noise": 0.25}
    bc.collect(bc.CollectArgs(dataset=dataset, **defaults | settings))
    return read(dataset, **{k: x for k, x in settings.items() if k == "run_root"})


def read(dataset, **settings):
    return demonstrations.read_dataset(bc.ValidateArgs(dataset=dataset, **settings))


def train_args(**settings):
    defaults = {"dataset": "home", "epochs": 3, "hidden_sizes": (16,), "minibatch_size": 32, "eval_episodes": 4}
    return bc.Args(**defaults | {"run_name": "run"} | settings)


def episodes_of(dataset):
    return [dataset.steps(i) for i in range(len(dataset))]


# Recording


def test_a_plain_loop_gives_the_same_episodes():
    """Observation, action, reward and end of one index belong to one step; episode i begins with (seed, i)."""
    dataset = read("home")
    assert dataset["seed"].tolist() == [[3 if i < 40 else 4, i] for i in range(80)]
    for i, steps in enumerate(episodes_of(dataset)):
        x = np.float64(np.random.default_rng(np.random.SeedSequence(dataset["seed"][i].tolist())).uniform(-1, 1))
        for t in range(steps.start, steps.stop):
            assert dataset["obs"][t] == np.float32(x)
            assert dataset["action"][t] == np.clip(-np.float32(x), np.float32(-0.05), np.float32(0.15))
            x += np.clip(dataset["executed_action"][t, 0], -0.05, 0.15)
            assert dataset["reward"][t] == np.float32(-abs(x))
            assert (abs(x) < 0.02) <= (t == steps.stop - 1)
        assert dataset["terminated"][i] == dataset["successes"][i] == (abs(x) < 0.02)
        assert dataset["terminated"][i] or steps.stop - steps.start == 30
        assert dataset["returns"][i] == pytest.approx(dataset["reward"][steps].sum(), rel=1e-5)


def test_noise_perturbs_the_executed_action_alone():
    dataset = read("home")
    noise = dataset["executed_action"][:, 0] - dataset["action"][:, 0]
    assert np.std(noise) == pytest.approx(0.25 * 0.1, rel=0.1)  # half the action range is 0.1
    assert abs(np.mean(noise)) < 0.003
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.15
    again, other = collect("again"), collect("other", seeds=(3, 5))
    assert all(np.array_equal(again[name], x) for name, x in dataset.arrays.items())
    end = dataset["episode_starts"][40]
    assert np.array_equal(other["executed_action"][:end], dataset["executed_action"][:end])
    assert not np.array_equal(other["obs"], dataset["obs"])


def test_an_expert_with_state_is_reset_and_episodes_do_not_depend_on_the_number_of_environments(monkeypatch):
    """Three episodes in two environments equal three with one environment and one controller each."""
    monkeypatch.setattr(bc.evaluation, "EVAL_ENVS", 2)
    dataset = collect("lateral", policy="feedforward", env_id="LateralControl-v0", episodes=3, action_noise=0.0)
    assert np.array_equal(dataset["action"], dataset["executed_action"])
    for i, steps in enumerate(episodes_of(dataset)):
        expert, envs = FeedForward(), LateralControl(1, training=False)
        obs, _ = envs.reset(seed=[dataset["seed"][i].tolist()])
        expert.reset(np.arange(1), envs)
        for t in range(steps.start, steps.stop):
            assert np.array_equal(dataset["obs"][t], obs[0])
            action = expert(obs)
            assert np.array_equal(dataset["action"][t], action[0])
            obs, reward, *_ = envs.step(action)
            assert dataset["reward"][t] == np.float32(reward[0])


def test_with_dagger_the_clone_acts_in_every_other_environment_and_the_expert_labels():
    dataset = collect("dagger", dagger_policy="runs/clone", action_noise=0.0, episodes=24, seeds=(3,))
    clone = load_clone("runs/clone")
    assert np.array_equal(dataset["action"], StraightHome()(dataset["obs"]))
    for i, steps in enumerate(episodes_of(dataset)):  # 24 episodes in as many environments
        expected = clone(dataset["obs"][steps]) if i % 2 else dataset["action"][steps]
        assert np.array_equal(dataset["executed_action"][steps], expected)
    (path, parent), *others = dataset.metadata["parents"].items()
    assert others == []
    assert (path, parent["sha256"], parent["steps"]) == ("runs/clone/best.pt", evaluation.sha256(path), 5)
    assert parent["config"]["script"] == "bc_pretrain"


# Checks


def edited(name, index, value):
    def edit(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return edit


def shifted(*names):
    """These arrays are one step late, as pairs that are off by one."""
    return lambda arrays: arrays.update({name: np.roll(arrays[name], 1, axis=0) for name in names})


def rewrite(edit, keep_hash=False):
    """Edit the arrays of the dataset. Unless keep_hash, the metadata has the hash of the new file."""
    file = Path("runs/datasets/home.npz")
    with np.load(file) as content:
        arrays = dict(content)
    edit(arrays)
    np.savez(file, **arrays)
    if not keep_hash:
        edit_metadata(sha256=evaluation.sha256(file))


def edit_metadata(**changes):
    file = Path("runs/datasets/home.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REPLAY = "episodes replay from their seeds"
NOISE = "executed actions differ by the noise"
CORRUPTED = {
    "wide": (
        lambda arrays: arrays.update(obs=arrays["obs"].repeat(2, 1)),
        "shapes fit the environment: they are .*, not .*",
    ),
    "nan": (edited("obs", 7, np.nan), "numbers are finite: not in obs"),
    "inf": (edited("action", 7, np.inf), "numbers are finite: not in action"),
    "above": (edited("action", 7, 0.2), "actions are within their bounds: 1 are not"),
    "shifted action": (shifted("action"), rf"{NOISE}: by 0\.\d+, not 0\.250"),
    "shifted pairs": (shifted("action", "executed_action"), f"{REPLAY}: the reward differs in episode 0, step 0"),
    "shifted obs": (shifted("obs"), f"{REPLAY}: obs differs in episode 0, step 0"),
    "reward": (edited("reward", 2, -0.5), f"{REPLAY}: the reward differs in episode 0, step 2"),
    "seed": (edited("seed", 2, 9), f"{REPLAY}: obs differs in episode 2, step 0"),
    "returns": (edited("returns", 50, 0), "rewards add up to the returns: not in episode 50"),
    "duplicated": (edited("seed", 70, [3, 0]), r"seeds are unique: \[3, 0\] is not"),
}


@pytest.mark.parametrize("name", CORRUPTED)
def test_the_checks_find_what_is_wrong(capsys, name):
    edit, message = CORRUPTED[name]
    rewrite(edit)
    assert not demonstrations.validate(bc.ValidateArgs(dataset="home"))
    assert re.search(f"^FAILED +{message}$", capsys.readouterr().out, re.MULTILINE)
    assert read("home").metadata["quality"] == "quarantined"


# Formulas


def test_split_keeps_episodes_whole():
    rng = np.random.default_rng(0)
    for seed in range(100):
        lengths = rng.integers(1, 10, size=rng.integers(2, 30))
        fraction = rng.uniform(0.01, 0.99)
        train_idx, val_idx = bc.split_episodes(np.cumsum([0, *lengths]), fraction, seed)
        assert sorted([*train_idx, *val_idx]) == list(range(lengths.sum()))
        episode = np.repeat(np.arange(len(lengths)), lengths)
        held_out = set(episode[val_idx])
        assert held_out.isdisjoint(episode[train_idx])
        assert 1 <= len(held_out) < len(lengths)
        assert abs(len(held_out) - fraction * len(lengths)) <= 1


def test_returns_to_go_are_discounted_sums():
    """A truncated episode goes on for ever with its mean reward, a terminated one with zeros."""
    rng, gamma, starts, terminated = np.random.default_rng(0), 0.9, np.array([0, 4, 5, 12]), np.array([1, 0, 0], bool)
    reward = rng.normal(size=12)
    returns = bc.returns_to_go(reward, starts, terminated, gamma)
    for start, end, is_terminal in zip(starts, starts[1:], terminated):
        tail = np.full(500, 0.0 if is_terminal else reward[start:end].mean())
        for t in range(start, end):
            rewards = np.append(reward[t:end], tail)
            assert returns[t] == pytest.approx(np.sum(gamma ** np.arange(len(rewards)) * rewards))


def toy_problem(loss="mse", **settings):
    """Actions linear in the observations with noise of standard deviation 0.1, and returns linear in them."""
    torch.manual_seed(0)
    args = bc.Args(dataset="none", loss=loss, norm_obs=True, hidden_sizes=(32,), minibatch_size=60, **settings)
    agent = bc.Agent(3, -np.ones(2, np.float32), np.ones(2, np.float32), args)
    obs = 5 + 2 * torch.randn(512, 3)
    mean = 0.2 * (obs - 5) @ torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 1.0]])
    agent.normalizer.update(obs)
    returns = (obs - 5) @ torch.tensor([0.2, 0.1, -0.1])
    return agent, args, {"obs": obs, "action": mean + 0.1 * torch.randn(512, 2), "returns": returns}


@torch.no_grad()
def test_losses_by_hand():
    agent, args, data = toy_problem()
    mean = agent.actor((data["obs"] - data["obs"].mean(0)) / data["obs"].std(0, correction=0))
    assert bc.bc_loss(agent, data, args) == pytest.approx(((mean - data["action"]) ** 2).sum(1).mean().item(), rel=1e-4)
    normal = torch.distributions.Normal(mean, agent.log_std.exp())
    expected = -normal.log_prob(data["action"]).sum(1).mean().item()
    assert bc.bc_loss(agent, data, replace(args, loss="nll")) == pytest.approx(expected, rel=1e-4)


# Training


def load_clone(path, env_id="CloneHome-v0"):
    checkpoint = evaluation.read_policy(path)
    return evaluation.load_script(checkpoint["script"]).load_policy(checkpoint, make_vec(env_id, 1))


def test_a_clone_acts_like_its_expert():
    """At least 90 % of the way from doing nothing to the expert, on unseen starts."""
    bc.train(train_args(epochs=50, patience=50, learning_rate=1e-2))
    clone, expert = load_clone("runs/run"), StraightHome()
    args = train_args(eval_episodes=100, env_id="CloneHome-v0")
    nothing, ours, best = (
        evaluation.evaluate(policy, args)["mean_return"] for policy in (evaluation.ZeroPolicy(1), clone, expert)
    )
    assert nothing + 0.9 * (best - nothing) < ours <= best + 0.1
    obs = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    assert np.abs(clone(obs) - expert(obs)).max() < 0.05


def test_early_stopping_keeps_the_best_epoch(monkeypatch):
    """Every epoch is worse than the one before, but for the second."""
    epochs = []

    def worse(agent, optimizer, data, args):
        epochs.append(len(epochs) + 1)
        with torch.no_grad():
            agent.actor[-1].bias.fill_({1: 0.3, 2: 0.2}.get(len(epochs), 0.1 * len(epochs) + 0.1))
        return 1.0

    monkeypatch.setattr(bc, "train_epoch", worse)
    summary, best = bc.train(train_args(epochs=20, patience=3)), evaluation.read_pt("runs/run/best.pt")
    assert epochs == [1, 2, 3, 4, 5]
    assert (summary["steps"], summary["best"]["step"], best["step"]) == (5, 2, 2)
    assert best["agent"]["actor.2.bias"].item() == pytest.approx(0.2)
    ((epoch, mean_return),) = [(one["step"], one["mean_return"]) for one in lines(Path("runs/run/evaluations.jsonl"))]
    expected = evaluation.evaluate(load_clone("runs/run"), train_args(env_id="CloneHome-v0"), "validation")
    assert (epoch, mean_return) == (5, expected["mean_return"])  # of the best epoch, at the end


def test_evaluations_select_the_best_epoch_and_end_the_run(monkeypatch):
    evaluate, returns = bc.Run.evaluate, {2: 1.0, 4: 5.0, 6: 4.5, 8: 4.1}

    def scored(self, policy, epoch):
        evaluation = evaluate(self, policy, epoch)
        evaluation["mean_return"] = returns[epoch]
        return evaluation

    monkeypatch.setattr(bc.Run, "evaluate", scored)
    settings = {"eval_every": 2, "best_metric": "mean_return", "stop_at_convergence": {"mean_return": 4.0}}
    summary = bc.train(train_args(epochs=20, patience=20, **settings))
    assert (summary["steps"], summary["best"]["step"], summary["converged_at_step"]) == (8, 4, 4)
    assert evaluation.read_pt("runs/run/best.pt")["step"] == 4
    with pytest.raises(UserError, match="--stop-at-convergence needs --eval-every"):
        bc.train(train_args(**settings | {"eval_every": 0}))


@pytest.mark.parametrize(
    ("episodes", "success", "quality"),
    [
        (200, 0.5, "validated"), (200, None, "validated"), (199, 0.9, "draft (fewer than 200 episodes)"),
        (200, 0.4, "draft (success 0.40 is below 0.5)"),
    ],
)  # fmt: skip
def test_quality(episodes, success, quality, monkeypatch):
    dataset = read("home")
    dataset.metadata["success_rate"] = success
    monkeypatch.setattr(demonstrations.Dataset, "__len__", lambda self: episodes)
    assert demonstrations.write_quality(dataset, {}) == quality


def test_a_signal_makes_the_epoch_the_last_one(command, monkeypatch):
    """Cloning cannot be resumed, so the run is completed with its best epoch."""
    train_epoch, epochs = bc.train_epoch, []

    def interrupted(*args):
        epochs.append(len(epochs) + 1)
        if len(epochs) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train_epoch(*args)

    monkeypatch.setattr(bc, "train_epoch", interrupted)
    status, _ = command("train --dataset home --epochs 20 --eval-episodes 2 --run-name run")
    assert (status, epochs) == (0, [1, 2])
    assert_complete(Path("runs/run"), steps=2)
    assert not Path("runs/run/interrupted.pt").exists()


def assert_complete(folder, steps):
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "summary.json", "progress.csv", "evaluations.jsonl", "best.pt", "policy.onnx"}
    summary, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config"))
    assert (summary["status"], summary["steps"]) == ("completed", steps)
    assert summary["best"]["mean_return"] == lines(folder / "evaluations.jsonl")[-1]["mean_return"]
    assert len((folder / "progress.csv").read_text().splitlines()) == steps + 1
    assert set(evaluation.read_pt(folder / "best.pt")) == set(run.POLICY_KEYS)
    ((path, dataset),) = config["parents"].items()
    assert dataset["sha256"] == evaluation.sha256(path)
    assert dataset["config"]["totals"]["env_steps"] > 0


def test_config_and_dry_run(command):
    """Flags override the file, and the file the defaults of the environment."""
    Path("mine.json").write_text(json.dumps({"dataset": "home", "hidden_sizes": [8], "gamma": 0.5, "epochs": 7}))
    line = "train --config mine.json --gamma 0.6 --run-name"
    assert command(f"{line} tried --dry-run")[0] == 0
    assert_complete(Path("runs/tried"), steps=1)
    args = json.loads(Path("runs/tried/config.json").read_text())["args"]
    assert (args["hidden_sizes"], args["gamma"], args["norm_obs"], args["epochs"]) == ([8], 0.6, True, 1)
    assert command("train --config runs/tried/config.json --epochs 2 --run-name run")[0] == 0
    assert_complete(Path("runs/run"), steps=2)


@pytest.mark.parametrize("env_id", [*bc.DEFAULTS, "Pendulum-v1", "HalfCheetah-v5", "SO101Paper-v0"])
def test_defaults_are_those_of_ppo(env_id):
    """So that PPO can start from a clone without further flags."""
    script = {"SocNavGrid-v0": ppo_grid_socnav, "SO101Paper-v0": ppo_residual}.get(env_id, ppo_continuous)
    theirs = script.Args.from_preset(**{} if script is ppo_grid_socnav else {"env_id": env_id})
    ours = bc.OTHER_DEFAULTS | bc.DEFAULTS.get(env_id, {})
    if script is ppo_grid_socnav:
        names = ("grid_encoder", "num_rays", "cnn_channels", "num_pedestrians", "pedestrian_hidden")
        assert [getattr(bc.Args(dataset="x"), name) for name in names] == [getattr(theirs, name) for name in names]
    for name in {"norm_obs", "hidden_sizes", "gamma"} - ({"gamma"} if "-v5" in env_id else set()):
        assert ours[name] == getattr(theirs, name, False), name
