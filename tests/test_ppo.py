"""The algorithm of the PPO scripts: its formulas against plain reimplementations, its schedules, its policy files."""

import functools
import importlib
import json
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from helpers import lines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

import envs
import ppo_continuous
import ppo_residual as ppo
from envs import evaluation, run, so101
from envs.batch_env import BatchEnv

quick = settings(max_examples=40, deadline=None)
EASY = {"frame_margin": 0.1}  # a wide frame, so that episodes are short
TINY = {
    "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 2, "total_timesteps": 192,
    "eval_episodes": 2, "eval_every": 0, "checkpoint_every": 64, "env_kwargs": EASY, "run_name": "run",
}  # fmt: skip
PENDULUM = {
    "env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 2,
    "total_timesteps": 128, "eval_episodes": 1, "eval_every": 0, "checkpoint_every": 0, "hidden_sizes": (8,),
    "run_name": "run",
}  # fmt: skip


@pytest.fixture
def fake_onnx(monkeypatch):
    """The export takes longer than a tiny run; where it is not the subject it writes a placeholder."""
    monkeypatch.setattr(run, "export_onnx", lambda agent, envs, policy, path: path.write_bytes(b"onnx"))


def make_agent(obs_dim=5, act_dim=2, seed=0, **kwargs):
    """An agent whose normalizer and log_std are not the initial ones, so that nothing cancels by chance."""
    torch.manual_seed(seed)
    bound = np.ones(act_dim, np.float32)
    agent = ppo.Agent(obs_dim, -bound, bound, ppo.Args(hidden_sizes=(16, 16), **kwargs))
    with torch.no_grad():
        agent.log_std.copy_(0.5 * torch.randn(act_dim))
        agent.actor[-1].weight.mul_(150)
    if isinstance(agent.normalizer, ppo.Normalizer):
        agent.normalizer.update(3 + 2 * torch.randn(50, obs_dim))
    return agent


def make_data(agent, n=64, seed=0):
    """A batch that an older policy has collected."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=agent.log_std.dtype)

    obs, action = 3 + 2 * normal(n, len(agent.log_std) + 3), normal(n, len(agent.log_std))
    with torch.no_grad():
        logprob, _, value = agent.evaluate_actions(obs, action)
    return {
        "obs": obs, "action": action, "logprob": logprob + 0.2 * normal(n), "advantage": 5 * normal(n),
        "returns": value + normal(n), "value": value + 0.3 * normal(n),
    }  # fmt: skip


def make_optimizer(agent, args):
    adam = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": args.weight_decay, "fused": True}
    return torch.optim.AdamW(agent.parameters(), **adam)


# Advantages


def brute_force_gae(reward, value, next_value, terminated, done, gamma, lam):
    """(1 - lambda) sum of lambda^(k-1) A^(k), the last term with all the remaining weight; one environment."""
    advantage = np.zeros(len(reward))
    for t in range(len(reward)):
        end = t  # the last transition that the sum may use
        while end < len(reward) - 1 and not done[end]:
            end += 1
        k_step, rewards = [], 0.0
        for k in range(1, end - t + 2):
            last = t + k - 1
            rewards += gamma ** (k - 1) * reward[last]
            bootstrap = 0.0 if terminated[last] else gamma**k * next_value[last]
            k_step.append(rewards + bootstrap - value[t])
        weights = [(1 - lam) * lam**k for k in range(len(k_step) - 1)] + [lam ** (len(k_step) - 1)]
        advantage[t] = np.dot(weights, k_step)
    return advantage


@quick
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)
)
def test_gae_is_the_weighted_sum_of_k_step_advantages(seed, steps, num_envs, gamma, lam, end_rate):
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, steps, num_envs))
    terminated, truncated = rng.random((2, steps, num_envs)) < end_rate / 2  # sometimes both at once
    done = terminated | truncated
    next_value[:-1] = np.where(done[:-1], next_value[:-1], value[1:])  # the successor is the next observation
    args = ppo.Args(gamma=gamma, gae_lambda=lam)
    ours = ppo.gae(*(torch.as_tensor(x) for x in (reward, value, next_value, terminated, done)), args).numpy()
    for i in range(num_envs):
        columns = (x[:, i] for x in (reward, value, next_value, terminated, done))
        np.testing.assert_allclose(ours[:, i], brute_force_gae(*columns, gamma, lam), rtol=0, atol=1e-9)


def test_group_mean_by_hand():
    advantage = torch.tensor([1.0, 3.0, 10.0, 20.0, 0.0, -2.0, 5.0, 5.0])  # two steps in four environments
    assert ppo_continuous.subtract_group_mean(advantage, 2).tolist() == [-1, 1, -5, 5, 1, -1, 0, 0]
    assert ppo_continuous.subtract_group_mean(advantage, 4).tolist() == [-7.5, -5.5, 1.5, 11.5, -2, -4, 3, 3]


# Loss and update

RATIOS = torch.tensor([1.0, 1.5, 0.5, 1.1], dtype=torch.float64)
MINIBATCH = {
    "obs": None,
    "action": None,
    "logprob": torch.zeros(4).double(),
    "advantage": torch.tensor([1.0, 2.0, -1.0, -3.0], dtype=torch.float64),
    "returns": torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64),
    "value": torch.tensor([1.0, 1.0, 0.0, -1.1], dtype=torch.float64),
}
VALUES = torch.tensor([1.0, 2.0, 0.1, -1.0], dtype=torch.float64)


def loss_of(critic_only=False, **kwargs):
    """ppo_loss for the four transitions above, with an entropy of 0.7."""
    output = RATIOS.log(), torch.tensor(0.7, dtype=torch.float64), VALUES
    agent = SimpleNamespace(evaluate_actions=lambda obs, action: output)
    plain = {"norm_adv": False, "clip_vloss": False, "clip_coef": 0.2, "ent_coef": 0.1, "vf_coef": 0.5}
    loss, stats = ppo.ppo_loss(agent, MINIBATCH, ppo.Args(**plain | kwargs), critic_only)
    return loss.item(), {name: x.item() for name, x in stats.items()}


def test_policy_loss_by_hand():
    # r A = 1, 3, -0.5, -3.3; with r clipped to [0.8, 1.2]: 1, 2.4, -0.8, -3.3
    assert loss_of()[1]["policy_gradient_loss"] == pytest.approx(-(1 + 2.4 - 0.8 - 3.3) / 4)
    assert loss_of(clip_coef=9.0)[1]["policy_gradient_loss"] == pytest.approx(-(1 + 3 - 0.5 - 3.3) / 4)
    deviation = math.sqrt((1.25**2 + 2.25**2 + 0.75**2 + 2.75**2) / 3)  # of 1, 2, -1, -3 about -0.25
    normalized = -(1.25 + 1.2 * 2.25 - 0.8 * 0.75 - 1.1 * 2.75) / deviation / 4
    assert loss_of(norm_adv=True)[1]["policy_gradient_loss"] == pytest.approx(normalized)


def test_value_loss_by_hand():
    # errors 4, 0, 0.81, 4; the clipped values are 1, 1.2, 0.1, -1 with errors 4, 0.64, 0.81, 4
    assert loss_of()[1]["value_loss"] == pytest.approx(0.5 * (4 + 0 + 0.81 + 4) / 4)
    assert loss_of(clip_vloss=True)[1]["value_loss"] == pytest.approx(0.5 * (4 + 0.64 + 0.81 + 4) / 4)


def test_loss_adds_up_and_statistics_by_hand():
    loss, stats = loss_of()
    assert stats["approx_kl"] == pytest.approx(sum(ratio - 1 - math.log(ratio) for ratio in (1, 1.5, 0.5, 1.1)) / 4)
    assert stats["clip_fraction"] == pytest.approx(0.5)
    assert stats["entropy_loss"] == pytest.approx(-0.7)
    assert loss == pytest.approx(stats["policy_gradient_loss"] + 0.5 * stats["value_loss"] - 0.1 * 0.7)
    assert loss_of(critic_only=True) == (pytest.approx(0.5 * stats["value_loss"]), stats)


def reference_update(agent, args, batch):
    """The update of PPO from stock parts: Normal, Adam, clip_grad_norm_. The same permutations as in ppo_update."""
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, foreach=False)
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["obs"]))
        for start in range(0, len(order), args.minibatch_size):
            b = SimpleNamespace(**{name: x[order[start : start + args.minibatch_size]] for name, x in batch.items()})
            mean, var = agent.normalizer.mean, agent.normalizer.var
            obs = ((b.obs - mean) / (var + 1e-8).sqrt()).clip(-10, 10)
            policy = Normal(agent.actor(obs), agent.log_std.exp())
            ratio = (policy.log_prob(b.action).sum(1) - b.logprob).exp()
            advantage = (b.advantage - b.advantage.mean()) / (b.advantage.std() + 1e-8)
            value = agent.critic(obs)[:, 0]
            clipped = b.value + (value - b.value).clip(-args.clip_coef, args.clip_coef)
            value_loss = 0.5 * torch.maximum((value - b.returns) ** 2, (clipped - b.returns) ** 2).mean()
            clipped_ratio = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
            gain = torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()
            entropy = policy.entropy().sum(1).mean()
            optimizer.zero_grad()
            (args.vf_coef * value_loss - gain - args.ent_coef * entropy).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()


def test_update_is_adam_on_the_clipped_gradient():
    args = ppo.Args(learning_rate=1e-3, minibatch_size=16, update_epochs=3, norm_adv=True, clip_vloss=True)
    ours, theirs = make_agent().double(), make_agent().double()
    batch = make_data(ours)
    torch.manual_seed(3)
    ppo.ppo_update(ours, make_optimizer(ours, args), ppo.backward, batch, args, False)
    torch.manual_seed(3)
    reference_update(theirs, args, batch)
    for (name, x), y, before in zip(
        ours.named_parameters(), theirs.parameters(), make_agent().double().parameters(), strict=True
    ):
        assert (x - before).abs().max() > 1e-4, name
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_target_kl_stops_before_the_step_that_exceeds_it():
    agent, sizes = make_agent(), []
    args = ppo.Args(minibatch_size=16, update_epochs=3, target_kl=0.5)
    kls = iter([0.1, 0.2, 0.9, 0.0])

    def backward(agent, parameters, minibatch, args, critic_only):
        sizes.append(len(minibatch["obs"]))
        agent.log_std.grad = torch.ones_like(agent.log_std)
        return {"approx_kl": torch.tensor(next(kls))}

    optimizer = make_optimizer(agent, args)
    stats = ppo.ppo_update(agent, optimizer, backward, make_data(agent), args, False)
    assert sizes == [16, 16, 16]
    assert optimizer.state[agent.log_std]["step"] == 2
    assert stats["approx_kl"] == pytest.approx((0.1 + 0.2 + 0.9) / 3)


# Normalizers


@quick
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_normalizer_has_the_mean_and_variance_of_all_batches(seed, sizes):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(rng.normal(scale=5), rng.uniform(0.1, 3), size=(n, 3)) for n in sizes]
    normalizer, everything = ppo.Normalizer((3,)).double(), np.concatenate(batches)
    for batch in batches:
        normalizer.update(torch.as_tensor(batch))
    assert normalizer.count == len(everything)
    np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(normalizer.var, everything.var(0), rtol=1e-9, atol=1e-9)


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_reward_scaler_equals_a_plain_loop(seed, num_envs):
    rng = np.random.default_rng(seed)
    scaler, running, seen = ppo.RewardScaler(num_envs, 0.9).double(), np.zeros(num_envs), []
    for _ in range(3):
        reward, done = rng.normal(1, 3, size=(8, num_envs)), rng.random((8, num_envs)) < 0.3
        ours = scaler(torch.as_tensor(reward), torch.as_tensor(done)).numpy()
        for t in range(8):
            for i in range(num_envs):
                running[i] = 0.9 * running[i] + reward[t, i]
                seen.append(running[i])
                running[i] = 0.0 if done[t, i] else running[i]
        expected = np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(scaler.returns, running, rtol=1e-9, atol=1e-9)


# Agent and actions


@pytest.mark.parametrize("norm_obs", [True, False])
def test_agent_is_a_normal_distribution(norm_obs):
    agent = make_agent(norm_obs=norm_obs).double()
    batch = make_data(agent)
    policy = Normal(agent.actor(agent.normalizer(batch["obs"])), agent.log_std.exp())
    logprob, entropy, value = agent.evaluate_actions(batch["obs"], batch["action"])
    torch.testing.assert_close(logprob, policy.log_prob(batch["action"]).sum(1))
    torch.testing.assert_close(entropy, policy.entropy().sum(1)[0])
    torch.testing.assert_close(value, agent.value(batch["obs"]))
    torch.testing.assert_close(agent(batch["obs"]), policy.mean.clamp(-1, 1))
    assert agent(batch["obs"]).abs().max() == 1  # some are clipped, so the line above says something
    with torch.no_grad():
        mean, samples = policy.mean[0], agent.sample(batch["obs"][:1].expand(40_000, -1))
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(samples.std(0), agent.log_std.detach().exp(), rtol=0.03, atol=0)


def test_apply_residual_by_hand():
    space = gym.spaces.Box(np.float32([-1, -1, -0.1]), np.float32([1, 1, 0.1]))
    base = np.array([[0.5, -0.9, 0.0]], np.float32)
    action = ppo.apply_residual(base, np.array([[0.5, -3.0, 1.0]], np.float32), 0.2, space)
    np.testing.assert_allclose(action, [[0.6, -1.0, 0.1]], atol=1e-6)  # -0.9 - 0.2 and 0.2 leave the space
    action = ppo.apply_residual(base, np.array([[-9.0, 9.0, 0.1]], np.float32), 0.2, space)
    np.testing.assert_allclose(action, [[0.3, -0.7, 0.02]], atol=1e-6)  # the residual counts as -1 and 1
    np.testing.assert_array_equal(ppo.apply_residual(base, np.ones((1, 3)), 0.0, space), base)


# Rollout


class Toy:
    """Three environments with written-down episodes: observations count the steps, final ones are negative."""

    num_envs = 3
    action_repeat = 1
    single_action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)

    def __init__(self, wrong=None, value=np.nan, t=0):
        self.t, self.actions, self.wrong, self.value = t, [], wrong, value

    def observation(self):
        return np.repeat(100.0 * np.arange(3)[:, None] + self.t, 5, axis=1).astype(np.float32)

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        obs, reward = self.observation(), np.array([1.0, 2.0, 3.0])
        terminated, truncated = np.array([False, self.t == 2, False]), np.array([self.t == 3, False, False])
        done, info = terminated | truncated, {}
        if done.any():
            episode = {"r": np.array([3.0, 4.0, 5.0]), "l": np.array([3, 2, 9])}
            info = {"final_obs": -obs, "episode": episode, "is_success": terminated, "error": 0.5 * obs[:, 0]}
            info |= {f"_{name}": done for name in info}
        if self.t == 3 and self.wrong is not None:
            {"observation": obs, "reward": reward, "final": info["final_obs"]}[self.wrong][0] = self.value
        return obs, reward, terminated, truncated, info


def collect(envs, **kwargs):
    args = ppo.Args(num_envs=3, num_steps=4, alpha=0.5, residual_scale=0.4, residual_penalty=0.25, **kwargs)

    def base(obs):
        return np.full((len(obs), 2), 0.1, np.float32)

    return ppo.collect_rollout(make_agent(seed=1), base, envs, envs.observation(), 90, args)


def test_actions_are_scaled_to_the_bounds_of_the_environment():
    """The Gaussian's [-1, 1] is the environment's [-2, 6]; what is stored is what was drawn."""
    torch.manual_seed(0)
    args, toy = ppo_continuous.Args(num_envs=3, num_steps=40, norm_obs=False, init_log_std=0.0), Toy()
    toy.single_action_space = gym.spaces.Box(-2, 6, (2,), np.float32)
    agent = ppo_continuous.make_agent(toy, args)
    rollout, _, _ = ppo_continuous.collect_rollout(agent, toy, toy.observation(), 0, args)
    drawn, executed = rollout.action.numpy(), np.stack(toy.actions)
    assert np.abs(drawn).max() > 1.5
    np.testing.assert_allclose(executed, np.clip(2 + 4 * drawn, -2, 6), atol=1e-6)
    assert (executed.min(), executed.max()) == (-2, 6)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(1000)
        obs = torch.randn(200, 5)
        action = agent(obs)
        torch.testing.assert_close(action, 2 + 4 * agent.actor(obs).clamp(-1, 1))
        assert (action.min(), action.max()) == (-2, 6)


def test_rollout_keeps_where_each_action_led():
    toy = Toy()
    rollout, obs, episodes = collect(toy)
    assert rollout.obs[:, :, 0].tolist() == [[t, 100 + t, 200 + t] for t in range(4)]
    led_to = np.array([[t, 100 + t, 200 + t] for t in range(1, 5)])
    led_to[1, 1] *= -1
    led_to[2, 0] *= -1
    assert rollout.next_obs[:, :, 0].tolist() == led_to.tolist()
    assert obs[:, 0].tolist() == [4, 104, 204]
    assert rollout.terminated.nonzero().tolist() == [[1, 1]]
    assert rollout.done.nonzero().tolist() == [[1, 1], [2, 0]]
    assert episodes == [
        {"step": 96, "return": 4.0, "length": 2, "success": True, "failure": None, "error": 51.0},
        {"step": 99, "return": 3.0, "length": 3, "success": False, "failure": None, "error": 1.5},
    ]


def test_rollout_stores_the_residual_as_drawn_and_executes_the_corrected_action():
    toy = Toy()
    rollout, _, _ = collect(toy)
    residual = rollout.action.numpy()
    assert (np.abs(residual) > 1).any()
    np.testing.assert_allclose(np.stack(toy.actions), 0.1 + 0.5 * 0.4 * np.clip(residual, -1, 1), atol=1e-6)
    penalty = 0.25 * np.square(np.clip(residual, -1, 1)).sum(2)
    np.testing.assert_allclose(rollout.reward, np.array([1, 2, 3]) - penalty, atol=1e-6)


def test_batch_of_a_rollout_matches_the_agent_that_collected_it():
    """Before the first gradient step the ratios are 1, and returns = advantage + value."""
    rollout, _, _ = collect(Toy())
    agent, args = make_agent(seed=1), ppo.Args(gamma=0.5, gae_lambda=0.0)
    batch = ppo.make_batch(agent, rollout, args)
    _, stats = ppo.ppo_loss(agent, batch, args, False)
    assert stats["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        bootstrap = 0.5 * agent.value(rollout.next_obs) * ~rollout.terminated
    torch.testing.assert_close(batch["returns"].view(4, 3), rollout.reward + bootstrap, rtol=0, atol=1e-5)


# Training


@pytest.fixture
def seen(monkeypatch, fake_onnx):
    """What ppo_continuous.train does in each iteration: the agent before the update, its state at the end of the
    iteration, and the statistics."""
    ppo_update, check_update, seen = ppo_continuous.ppo_update, ppo_continuous.check_update, []

    def copy(agent):
        return {name: x.clone() for name, x in agent.state_dict().items()}

    def spy_update(agent, *args):
        before = copy(agent)
        stats = ppo_update(agent, *args)
        seen.append([before, None, stats])
        return stats

    def spy_check(agent, *args):
        check_update(agent, *args)
        seen[-1][1] = copy(agent)

    monkeypatch.setattr(ppo_continuous, "ppo_update", spy_update)
    monkeypatch.setattr(ppo_continuous, "check_update", spy_check)
    return seen


def test_groups_change_the_advantage_but_not_the_returns(monkeypatch, fake_onnx, tmp_path):
    batches, ppo_update = [], ppo_continuous.ppo_update

    def spy(agent, optimizer, backward_fn, batch, args, critic_only):
        batches.append(batch)
        return ppo_update(agent, optimizer, backward_fn, batch, args, critic_only)

    monkeypatch.setattr(ppo_continuous, "ppo_update", spy)
    sizes = {"num_envs": 4, "num_steps": 16, "minibatch_size": 64, "total_timesteps": 64, "group_size": 2}
    ppo_continuous.train(ppo_continuous.Args(**sizes, eval_episodes=1, run_root=str(tmp_path)))
    (batch,) = batches
    advantage = (batch["returns"] - batch["value"]).unflatten(0, (-1, 2))
    assert advantage.mean(1).abs().max() > 0.1
    expected = (advantage - advantage.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(batch["advantage"], expected, rtol=1e-4, atol=1e-5)


def test_schedules_of_learning_rate_and_standard_deviation(seen, tmp_path):
    schedule = {"init_log_std": -1.0, "final_log_std": -3.0, "ent_coef": 0.1, "learning_rate": 0.004}
    ppo_continuous.train(ppo_continuous.Args(**{**PENDULUM, **schedule, "run_root": str(tmp_path)}))
    for (before, after, stats), log_std, lr in zip(seen, (-1.0, -1.5, -2.0, -2.5), (4, 3, 2, 1), strict=True):
        assert before["log_std"].tolist() == pytest.approx([log_std])
        assert torch.equal(after["log_std"], before["log_std"])
        assert stats["entropy_loss"] == pytest.approx(-(log_std + 0.5 * math.log(2 * math.pi * math.e)))
        assert stats["learning_rate"] == pytest.approx(lr / 1000)
        assert not torch.equal(after["actor.0.weight"], before["actor.0.weight"])


def test_the_first_rollout_initializes_the_normalizer_for_its_own_update(seen, tmp_path):
    """Later updates use the statistics of the rollouts before, so that the log-probabilities stay what they were."""
    ppo_continuous.train(ppo_continuous.Args(**{**PENDULUM, "run_root": str(tmp_path)}))
    assert [int(before["normalizer.count"]) for before, *_ in seen] == [32, 32, 64, 96]
    assert [int(after["normalizer.count"]) for _, after, _ in seen] == [32, 64, 96, 128]
    assert all(not torch.equal(before["log_std"], after["log_std"]) for before, after, _ in seen)  # it is learned


def test_critic_warmup_and_frozen_statistics_of_a_pretrained_policy(seen, tmp_path):
    """The policy stays what it was while the critic warms up: also its normalizer, and also under weight decay."""
    settings = {**PENDULUM, "run_root": str(tmp_path), "run_name": "first"}
    ppo_continuous.train(ppo_continuous.Args(**settings))
    settings |= {"pretrained": str(tmp_path / "first"), "critic_warmup_updates": 2, "weight_decay": 0.1}
    for freeze, counts in ((False, [128, 128, 160, 192]), (True, [128] * 4)):
        seen.clear()
        name = f"freeze_{freeze}"
        ppo_continuous.train(ppo_continuous.Args(**{**settings, "run_name": name, "freeze_obs_stats": freeze}))
        assert [int(after["normalizer.count"]) for _, after, _ in seen] == counts
        start = evaluation.read_pt(tmp_path / "first" / "best.pt")["agent"]
        for k, (before, after, _) in enumerate(seen):
            changed = {name.split(".")[0] for name in before if not torch.equal(start[name], after[name])}
            learned = {"critic"} if k < 2 else {"critic", "actor", "log_std"}
            assert changed == learned | (set() if freeze or k < 2 else {"normalizer"})


class Coin(BatchEnv):
    """Episodes of one step: from 0 to 1 for nothing, or from 1 to 1 for a reward of 1. They end at a time limit, or
    with `terminates` because they are over."""

    def __init__(self, num_envs=1, training=True, split="train", render_mode=None, terminates=False):
        box, action = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
        super().__init__(num_envs, box, action, 1, training, split, render_mode)
        self.x, self.terminates = np.zeros(num_envs), terminates

    def start(self, rows):
        for i in rows:
            self.x[i] = self.rngs[i].integers(2)

    def advance(self, action):
        reward = self.x.copy()
        self.x[:] = 1
        return reward, np.full(self.num_envs, self.terminates), {}

    def observe(self, rows):
        return self.x[rows, None].astype(np.float32)

    def state(self):
        return {"x": self.x}


@pytest.mark.parametrize(("terminates", "expected"), [(False, (1.0, 2.0)), (True, (0.0, 1.0))])
def test_a_time_limit_is_worth_what_would_follow_and_an_end_nothing(
    terminates, expected, tmp_path, monkeypatch, fake_onnx
):
    """Values of the two states with gamma = .5. To bootstrap from the next episode's start would give .5 and 1.5."""
    spec = gym.envs.registration.EnvSpec("Coin-v0", vector_entry_point=Coin)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    args = ppo_continuous.Args(
        env_id="Coin-v0", env_kwargs={"terminates": terminates}, num_envs=8, num_steps=16, minibatch_size=32,
        total_timesteps=128 * 40, learning_rate=0.01, gamma=0.5, norm_obs=False, norm_reward=False, clip_vloss=False,
        eval_every=0, eval_episodes=1, checkpoint_every=0, run_root=str(tmp_path), run_name="run", hidden_sizes=(16,),
    )  # fmt: skip
    ppo_continuous.train(args)
    agent = ppo_continuous.make_agent(Coin(), args)
    agent.load_state_dict(evaluation.read_pt(tmp_path / "run" / "final.pt")["agent"])
    with torch.no_grad():
        assert agent.value(torch.tensor([[0.0], [1.0]])).tolist() == pytest.approx(expected, abs=0.1)


def break_observation(monkeypatch):
    step, calls = so101.SO101Paper.step, []

    def wrong(self, action):
        obs, *others = step(self, action)
        calls.append(1)
        if self.training and len(calls) == 75:
            obs[1] = np.nan
        return obs, *others

    monkeypatch.setattr(so101.SO101Paper, "step", wrong)


def break_loss(monkeypatch):
    loss, calls = ppo.ppo_loss, []

    def wrong(*args):
        calls.append(1)
        total, stats = loss(*args)
        return (total * np.nan, stats) if len(calls) == 10 else (total, stats)

    monkeypatch.setattr(ppo, "ppo_loss", wrong)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [(break_observation, "observation is not finite at step 150 in environment 1"), (break_loss, "after step 192")],
)
def test_a_run_that_meets_nan_fails_and_keeps_its_last_checkpoint(breaks, message, tmp_path, monkeypatch, fake_onnx):
    breaks(monkeypatch)
    with pytest.raises(evaluation.NonFiniteError, match=message):
        ppo.train(ppo.Args(**{**TINY, "run_root": str(tmp_path), "env_kwargs": {}}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert message in summary["error"]
    checkpoint = run.read_checkpoint(str(tmp_path / "run"))
    assert checkpoint["step"] == 128
    assert all(torch.isfinite(x).all() for x in checkpoint["agent"].values())


SCRIPTS = {
    "ppo_continuous": {**PENDULUM, "total_timesteps": 256, "eval_every": 32},
    "ppo_residual": {**TINY, "total_timesteps": 512, "eval_every": 64},
    "ppo_grid_socnav": {
        "num_envs": 2, "num_steps": 4, "minibatch_size": 8, "total_timesteps": 64, "eval_every": 8, "eval_episodes": 1,
        "checkpoint_every": 0, "run_name": "run", "threads": 1, "update_epochs": 1, "hidden_sizes": (8,),
        "env_kwargs": {"scenario": "francis2023_frontal_approach", "grid_channels": "near"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_best_metric_and_convergence(name, tmp_path, monkeypatch, fake_onnx):
    """best.pt has the best metric, and three evaluations in a row that meet the criterion end the run."""
    script = importlib.import_module(name)
    returns, failures = [1, 9, 3, 4, 6, 7, 8, 8], [0.3, 0.04, 0.2, 0.05, 0.04, 0.01, 0.0, 0.0]
    numbers = iter(zip(returns, failures))

    def evaluate(policy, *args):
        mean_return, failure_rate = next(numbers)
        rates = {"success_rate": 0.5, "failure_rate": failure_rate}
        return {"mean_return": mean_return, "mean_length": 5.0, "metrics": {}, **rates}

    monkeypatch.setattr(run, "evaluate", evaluate)
    args = script.Args(
        **SCRIPTS[name],
        run_root=str(tmp_path),
        best_metric="failure_rate",
        stop_at_convergence={"failure_rate": 0.05, "mean_return": 4.0},
    )
    heard = []
    summary = script.train(args, on_evaluation=lambda step, evaluation: heard.append(step))
    size = args.steps_per_iteration
    assert heard == [size * k for k in range(1, 7)]
    assert (summary["steps"], summary["converged_at_step"], summary["best"]["step"]) == (6 * size, 4 * size, 6 * size)
    assert summary["status"] == "completed"
    assert evaluation.read_pt(tmp_path / "run" / "best.pt")["step"] == 6 * size
    # By default success rate and then return decide; a callback that returns True ends a run
    numbers = iter(zip(returns, failures))
    args = script.Args(**{**SCRIPTS[name], "run_name": "auto"}, run_root=str(tmp_path))
    summary = script.train(args, on_evaluation=lambda step, evaluation: step == 3 * size)
    assert (summary["steps"], summary["best"]["step"]) == (3 * size, 2 * size)


def test_files_of_a_run(tmp_path, monkeypatch):
    """Tensors and plain values only, strict JSON, no colon in the default name, and the logged residual magnitude."""
    ppo_update, batches = ppo.ppo_update, []

    def spy(agent, optimizer, backward_fn, batch, args, critic_only):
        batches.append(batch)
        stats = ppo_update(agent, optimizer, backward_fn, batch, args, critic_only)
        return stats | {"explained_variance": math.nan}

    evaluate = run.evaluate
    monkeypatch.setattr(ppo, "ppo_update", spy)
    monkeypatch.setattr(
        run, "evaluate", lambda *args: evaluate(*args) | {"std_return": math.nan, "std_length": math.inf}
    )
    settings = {**TINY, "run_name": None, "total_timesteps": 64, "env_id": "envs:SO101Paper-v0"}
    folder = tmp_path / ppo.train(ppo.Args(**{**settings, "run_root": str(tmp_path)}))["run"]
    assert folder.name.startswith("ppo_residual__envs-SO101Paper-v0__seed1__")
    assert ":" not in folder.name
    for name in ("best.pt", "final.pt", "checkpoints/step_000000064.pt"):
        content = torch.load(folder / name, weights_only=True)
        assert set(run.POLICY_KEYS) <= content.keys(), name
        assert content["policy_type"] == "residual"
        assert ("optimizer" in content) == (name != "best.pt")
    for name in ("config.json", "summary.json", "episodes.jsonl", "evaluations.jsonl"):
        for line in (folder / name).read_text().splitlines() if name.endswith("l") else [(folder / name).read_text()]:
            json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity
    (logged,) = lines(folder / "evaluations.jsonl")
    assert (logged["std_return"], logged["std_length"]) == (None, None)
    header, row = (line.split(",") for line in (folder / "progress.csv").read_text().splitlines())
    magnitude = np.linalg.norm(np.clip(batches[0]["action"].numpy(), -1, 1), axis=1).mean()
    assert float(dict(zip(header, row))["train/residual_magnitude"]) == pytest.approx(magnitude, rel=1e-5)
    assert sum(episode["length"] for episode in lines(folder / "episodes.jsonl")) <= 64


# Evaluation


def make_residual_policy(base_policy="ik"):
    """A policy for the paper task with a residual that does something."""
    vec = envs.make_vec("SO101Paper-v0", 1)
    base = evaluation.make_base_policy(base_policy, vec)
    agent = evaluation.DeterministicPolicy(make_agent(25, 6))
    return ppo.ResidualPolicy(agent, base, 0.014, vec.single_action_space)


def test_action_does_not_depend_on_the_batch_it_is_in():
    policy = make_residual_policy()
    rng = np.random.default_rng(0)
    vec = envs.make_vec("SO101Paper-v0", 64, seed=5)
    for _ in range(10):
        obs = vec.step(rng.uniform(-0.04, 0.04, (64, 6)).astype(np.float32))[0]
    whole = policy(obs)
    assert np.array_equal(whole, np.concatenate([policy(obs[i : i + 1]) for i in range(64)]))
    assert np.array_equal(whole, np.concatenate([policy(obs[i : i + 3]) for i in range(0, 64, 3)]))
    assert np.ptp(whole - policy.base_policy(obs), axis=0).min() > 1e-3


def test_onnx_equals_torch_with_the_normalizer_inside(tmp_path):
    agent, path = make_agent(25, 6), tmp_path / "policy.onnx"
    policy = {"policy_type": "policy", "script": "ppo_continuous", "env_id": "SO101Paper-v0", "env_kwargs": {}}
    vec = envs.make_vec("SO101Paper-v0", 1)
    run.export_onnx(agent, vec, policy, path)
    assert agent.training  # exporting leaves the agent as it was
    session = onnxruntime.InferenceSession(str(path))
    obs = 3 + 3 * torch.randn(1000, 25, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = agent(obs).numpy()
        for n in (1, 3, 1000):
            (action,) = session.run(["action"], {"obs": obs[:n].numpy()})
            np.testing.assert_allclose(action, expected[:n], rtol=0, atol=1e-5)
        agent.normalizer.update(10 * torch.randn(100, 25, generator=torch.Generator().manual_seed(1)))
        assert np.abs(action - agent(obs).numpy()).max() > 0.1  # the statistics matter
    assert (np.abs(action) <= 1).all()
    np.testing.assert_array_equal(evaluation.make_scripted_policy(str(path), vec)(obs.numpy()), action)


# --compile


def gradient_of(agent, backward, args, minibatch, critic_only=False):
    agent.zero_grad()
    stats = backward(agent, list(agent.parameters()), minibatch, args, critic_only)
    return dict(stats), {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """What is compiled goes through this backend; the first traces only, and is quick."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))


def test_compiled_gradient_equals_eager_and_is_compiled_once(backend):
    args, agent = ppo.Args(), make_agent()
    optimizer = make_optimizer(agent, args)
    compiled = run.compile_fn(ppo.backward)
    _, gradients = gradient_of(agent, compiled, args, make_data(agent), critic_only=True)
    _, expected = gradient_of(agent, ppo.backward, args, make_data(agent), critic_only=True)
    assert all(name.startswith("critic") for name in expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    gradient_of(agent, compiled, args, make_data(agent))
    with torch.compiler.set_stance("fail_on_recompile"):
        for k, learning_rate in enumerate((3e-4, 1e-4, 0.0)):
            optimizer.param_groups[0]["lr"] = learning_rate
            minibatch = make_data(agent, seed=k)
            stats, gradients = gradient_of(agent, compiled, args, minibatch)
            expected_stats, expected = gradient_of(agent, ppo.backward, args, minibatch)
            torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
            assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
            optimizer.step()
            agent.normalizer.update(minibatch["obs"])
