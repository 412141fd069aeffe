"""PPO learns: a point that must come home, in seconds; and, marked slow, the arm, the car and the ballbot."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

import envs
import ppo_continuous
import ppo_residual as ppo
from envs import rollout, run
from envs.batch_env import BatchEnv


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
def home():
    gym.register("Home-v0", vector_entry_point=Home)
    yield "Home-v0"
    del gym.registry["Home-v0"]


def test_a_point_learns_to_come_home(home, tmp_path):
    """At least 90 % of the way from doing nothing to the best policy there is, on unseen starts."""
    args = ppo.Args(
        env_id=home,
        base_policy="zero",
        alpha=1.0,
        act_scale=0.1,
        residual_penalty=0.0,
        total_timesteps=12_288,
        num_steps=64,
        minibatch_size=64,
        learning_rate=1e-3,
        eval_every=0,
        checkpoint_every=0,
        run_root=str(tmp_path),
    )
    summary = ppo.train(args)
    args.eval_episodes = 200
    vec = envs.make_vec(home, 1)
    agent = ppo.residual_agent(vec, args)
    run.load_agent(agent, run.load_policy(summary["run"]), args, "")
    learned = ppo.Corrected(agent, rollout.Zero(1), args, vec.single_action_space)
    returns = [rollout.evaluate(p, args)["mean_return"] for p in (rollout.Zero(1), learned, straight_home)]
    nothing, ours, best = returns
    assert nothing + 0.9 * (best - nothing) < ours <= best + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_residual_brings_the_sheet_into_the_frame(tmp_path, seed):
    """50,000 steps from the defaults: the base alone fails on four of ten starts, with the residual few are left."""
    args = ppo.Args(seed=seed, run_root=str(tmp_path), checkpoint_every=0)
    summary = ppo.train(args)
    result = ppo.evaluate(ppo.Args(evaluate=summary["run"], compare_base=True, eval_episodes=200, eval_seed=31))
    assert result["success_rate"] >= 0.9
    assert 0.45 <= result["base"]["success_rate"] <= 0.65
    assert result["gain"]["gain"] >= 0.3
    assert result["metrics"]["yaw_error"] < result["base"]["metrics"]["yaw_error"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_tight_frame_wants_short_training_episodes(tmp_path, seed):
    """10 mm a side, where the base alone fails on three of four starts."""
    tight = {"frame_margin": 0.01, "training_steps": 150}
    args = ppo.Args(seed=seed, env_kwargs=tight, run_root=str(tmp_path), checkpoint_every=0)
    summary = ppo.train(args)
    args = replace(args, evaluate=summary["run"], compare_base=True, eval_episodes=200, eval_seed=31)
    result = ppo.evaluate(args)
    assert result["success_rate"] >= 0.8
    assert result["base"]["success_rate"] <= 0.35


@pytest.mark.slow
def test_the_arm_learns_without_a_base(tmp_path):
    """500,000 steps with the settings for zero, which alone never touches the sheet; two seeds, for they scatter."""
    success = []
    for seed in (1, 2):
        args = ppo.Args.tuned("zero", seed=seed, run_root=str(tmp_path), checkpoint_every=0)
        summary = ppo.train(args)
        args = replace(args, evaluate=summary["run"], compare_base=True, eval_episodes=200, eval_seed=31)
        result = ppo.evaluate(args)
        assert result["base"]["success_rate"] == 0
        success.append(result["success_rate"])
    assert np.mean(success) >= 0.85, success


def test_plain_ppo_brings_the_point_home_too(home, tmp_path):
    """The same task without a base policy, its action bounds taken from the environment."""
    args = ppo_continuous.Args(
        env_id=home,
        total_timesteps=20_480,
        num_steps=64,
        learning_rate=1e-3,
        init_log_std=-0.5,
        eval_every=0,
        checkpoint_every=0,
        eval_episodes=200,
        run_root=str(tmp_path),
    )
    learned = ppo_continuous.train(args)["best"]["mean_return"]
    nothing, best = (rollout.evaluate(p, args, "validation")["mean_return"] for p in (rollout.Zero(1), straight_home))
    assert nothing + 0.9 * (best - nothing) < learned <= best + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steering_from_scratch_costs_less_than_half_of_pid(tmp_path, seed):
    """The default command: at most 45 % of the official controller's cost on the 200 segments of the test split."""
    args = ppo_continuous.Args.tuned(seed=seed, run_root=str(tmp_path), checkpoint_every=0, eval_every=0)
    learned = ppo_continuous.evaluate(ppo_continuous.Args.tuned(evaluate=ppo_continuous.train(args)["run"]))
    pid = ppo_continuous.evaluate(ppo_continuous.Args.tuned(evaluate="pid"))
    assert 95 <= pid["metrics"]["total_cost"] <= 115
    assert learned["metrics"]["total_cost"] <= 0.45 * pid["metrics"]["total_cost"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_ballbot_stands_and_drives_on_ground_that_it_never_met(tmp_path, seed):
    """Standing still for all 8 s returns 80, random actions about 7. The tuned row, cut short to a million steps."""
    args = ppo_continuous.Args.tuned("Ballbot-v0", seed=seed, total_timesteps=1_000_000, run_root=str(tmp_path))
    run_folder = ppo_continuous.train(args)["run"]
    measured = ppo_continuous.Args.tuned("Ballbot-v0", evaluate=run_folder, eval_seed=31)
    result = ppo_continuous.evaluate(measured)
    assert result["success_rate"] >= 0.95
    assert result["mean_return"] >= 84
    assert result["metrics"]["distance"] >= 0.8  # m towards the goal
