"""PPO learns: a point that must come home, in seconds; and, marked slow, the arm, the car and the ballbot."""

import gymnasium as gym
import numpy as np
import pytest

import ppo_continuous
import ppo_residual as ppo
from envs import evaluation
from envs.batch_env import BatchEnv
from tools import evaluate


class Home(BatchEnv):
    """A point at x in [-1, 1] moves by at most 0.1 a step; each step costs its distance from 0; 30 steps."""

    def __init__(self, num_envs=1, training=True, split="train", render_mode=None):
        box = gym.spaces.Box(-4, 4, (1,), np.float32)
        super().__init__(num_envs, box, gym.spaces.Box(-0.1, 0.1, (1,), np.float32), 30, training, split, render_mode)
        self.x = np.zeros(num_envs)

    def start(self, rows):
        for i in rows:
            self.x[i] = self.rngs[i].uniform(-1, 1)

    def advance(self, action):
        self.x += action[:, 0]
        return -np.abs(self.x), np.zeros(self.num_envs, bool), {}

    def observe(self, rows):
        return self.x[rows, None].astype(np.float32)

    def state(self):
        return {"x": self.x}


def straight_home(obs):
    return np.clip(-obs, -0.1, 0.1)


@pytest.fixture
def home(monkeypatch):
    spec = gym.envs.registration.EnvSpec("Home-v0", vector_entry_point=Home)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    return spec.id


@pytest.mark.parametrize("script", [ppo_continuous, ppo], ids=["plain", "residual"])
def test_a_point_learns_to_come_home(script, home, tmp_path):
    """At least 90 % of the way from doing nothing to the best policy there is, on unseen starts: as plain PPO, whose
    action bounds are those of the environment, and as a residual on a base policy that does nothing."""
    settings = {"init_log_std": -0.5}
    if script is ppo:
        settings |= {"base_policy": "zero", "alpha": 1.0, "residual_scale": 0.1, "residual_penalty": 0.0}
    args = script.Args(
        env_id=home, total_timesteps=8192, num_envs=8, num_steps=64, minibatch_size=64, update_epochs=5,
        learning_rate=3e-3, eval_every=0, eval_episodes=200, checkpoint_every=0, run_root=str(tmp_path), **settings,
    )  # fmt: skip
    learned = script.train(args)["best"]["mean_return"]
    others = (evaluation.ZeroPolicy(1), straight_home)
    nothing, best = (evaluation.evaluate(policy, args, "validation")["mean_return"] for policy in others)
    assert nothing + 0.9 * (best - nothing) < learned <= best + 1e-6


def evaluate_run(args, script, **kwargs):
    """Train, and evaluate the best policy on the test split."""
    return evaluate.run(evaluate.Args(policy=script.train(args)["run"], **kwargs))


UNSEEN = {"compare_base": True, "episodes": 200, "seed": 31}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_residual_brings_the_sheet_into_the_frame(tmp_path, seed):
    """50,000 steps from the defaults: the base alone fails on four of ten starts, with the residual few are left."""
    result = evaluate_run(ppo.Args(seed=seed, run_root=str(tmp_path), checkpoint_every=0), ppo, **UNSEEN)
    assert result["success_rate"] >= 0.95
    assert 0.45 <= result["base"]["success_rate"] <= 0.65
    assert result["gain"]["gain"] >= 0.3
    assert result["metrics"]["yaw_error"] < result["base"]["metrics"]["yaw_error"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_residual_works_in_a_tight_frame(tmp_path, seed):
    """10 mm a side, where the base alone fails on three of four starts."""
    args = ppo.Args(seed=seed, env_kwargs={"frame_margin": 0.01}, run_root=str(tmp_path), checkpoint_every=0)
    result = evaluate_run(args, ppo, **UNSEEN)
    assert result["success_rate"] >= 0.8
    assert result["base"]["success_rate"] <= 0.35


@pytest.mark.slow
def test_the_arm_learns_without_a_base(tmp_path):
    """500,000 steps with the preset for zero, which alone never touches the sheet; two seeds, because they scatter."""
    success = []
    for seed in (1, 2):
        args = ppo.Args.from_preset("zero", seed=seed, run_root=str(tmp_path), checkpoint_every=0)
        result = evaluate_run(args, ppo, **UNSEEN)
        assert result["base"]["success_rate"] == 0
        success.append(result["success_rate"])
    assert np.mean(success) >= 0.85, success


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steering_from_scratch_costs_less_than_half_of_pid(tmp_path, seed):
    """The default command: at most 45 % of the official controller's cost on the 200 segments of the test split."""
    args = ppo_continuous.Args.from_preset(seed=seed, run_root=str(tmp_path), checkpoint_every=0, eval_every=0)
    learned = evaluate_run(args, ppo_continuous, episodes=0)
    pid = evaluate.run(evaluate.Args(policy="pid", env_id="LateralControl-v0", episodes=0))
    assert 95 <= pid["metrics"]["total_cost"] <= 115
    assert learned["metrics"]["total_cost"] <= 0.45 * pid["metrics"]["total_cost"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_ballbot_stands_and_drives_on_ground_that_it_never_met(tmp_path, seed):
    """Standing still for all 8 s returns 80, random actions about 7. The preset, cut short to a million steps."""
    args = ppo_continuous.Args.from_preset(
        env_id="Ballbot-v0", seed=seed, total_timesteps=1_000_000, run_root=str(tmp_path)
    )
    result = evaluate_run(args, ppo_continuous, episodes=72, seed=31)
    assert result["success_rate"] >= 0.95
    assert result["mean_return"] >= 84
    assert result["metrics"]["distance"] >= 0.8  # m towards the goal
