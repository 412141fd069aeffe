"""The algorithm of the PPO scripts: its formulas against plain reimplementations, its policy files, its failures."""

import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

import envs
import ppo_continuous
import ppo_residual as ppo
from envs import command, rollout, run, so101
from envs.batch_env import BatchEnv

quick = settings(max_examples=40, deadline=None)
EASY = {"frame_margin": 0.1}  # a wide frame, so that episodes are short
TINY = {
    "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 2, "total_timesteps": 192,
    "eval_episodes": 2, "eval_every": 0, "checkpoint_every": 64, "env_kwargs": EASY, "run_name": "run",
}  # fmt: skip


def make_agent(obs_dim=5, act_dim=2, seed=0, **kwargs):
    """An agent whose normaliser and log_std are not the initial ones, so that nothing cancels by chance."""
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
    """obs, action, old_logprob, advantage, target, old_value of a batch that an older policy has collected."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=agent.log_std.dtype)

    obs, action = 3 + 2 * normal(n, len(agent.log_std) + 3), normal(n, len(agent.log_std))
    with torch.no_grad():
        logprob, _, value = agent.evaluate_actions(obs, action)
    return obs, action, logprob + 0.2 * normal(n), 5 * normal(n), value + normal(n), value + 0.3 * normal(n)


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
def test_gae_is_the_weighted_sum_of_k_step_advantages(seed, steps, rows, gamma, lam, often):
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, steps, rows))
    terminated, truncated = rng.random((2, steps, rows)) < often / 2  # both at once is among them
    done = terminated | truncated
    next_value[:-1] = np.where(done[:-1], next_value[:-1], value[1:])  # an action leads to the next observation
    ours = ppo.gae(*(torch.as_tensor(x) for x in (reward, value, next_value, terminated, done)), gamma, lam).numpy()
    for i in range(rows):
        columns = (x[:, i] for x in (reward, value, next_value, terminated, done))
        np.testing.assert_allclose(ours[:, i], brute_force_gae(*columns, gamma, lam), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("terminated", "expected"), [(True, 1 - 2), (False, 1 + 0.5 * 10 - 2)])
def test_gae_bootstraps_at_time_limits_only(terminated, expected):
    column = [torch.tensor([[x], [y]]) for x, y in ((1.0, 100.0), (2.0, 0.0), (10.0, 0.0))]
    ends = torch.tensor([[terminated], [False]]), torch.tensor([[True], [False]])
    advantage = ppo.gae(*column, *ends, gamma=0.5, gae_lambda=0.9)
    assert advantage[:, 0].tolist() == pytest.approx([expected, 100])


def test_group_mean_by_hand():
    advantage = torch.tensor([[1.0, 3.0, 10.0, 20.0], [0.0, -2.0, 5.0, 5.0]])
    assert ppo.group_mean(advantage, 2).tolist() == [[2, 2, 15, 15], [-1, -1, 5, 5]]
    assert ppo.group_mean(advantage, 4).tolist() == [[8.5] * 4, [2] * 4]
    assert torch.equal(ppo.group_mean(advantage, 1), advantage)


def test_groups_change_the_advantage_but_not_the_targets(monkeypatch):
    """What learn hands to the update: the same but for the advantage, from which the mean of each pair is taken."""
    given = []

    def update(agent, optimizer, gradient, args, critic_only, data):
        given.append(data)
        return torch.zeros(len(ppo.STATS))

    monkeypatch.setattr(ppo, "update", update)
    torch.manual_seed(0)
    fields = [torch.randn(5, 4, 5), torch.randn(5, 4, 2), torch.randn(5, 4, 5), torch.randn(5, 4)]
    batch = ppo.Transitions(*fields, torch.rand(5, 4) < 0.2, torch.rand(5, 4) < 0.2)
    for group_size in (1, 2):
        args, agent = ppo.Args(group_size=group_size), make_agent()
        ppo.learn(agent, make_optimizer(agent, args), ppo.compute_gradient, args, batch, False)
    plain, grouped = given
    for k in (0, 1, 2, 4, 5):
        assert torch.equal(plain[k], grouped[k])
    pairs = plain[3].reshape(5, 2, 2)
    torch.testing.assert_close(grouped[3].reshape(5, 2, 2), pairs - pairs.mean(2, keepdim=True))
    assert grouped[3].abs().max() > 0.1


RATIOS = torch.tensor([1.0, 1.5, 0.5, 1.1], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 2.0, -1.0, -3.0], dtype=torch.float64)
VALUES = torch.tensor([1.0, 2.0, 0.1, -1.0], dtype=torch.float64)
OLD_VALUES = torch.tensor([1.0, 1.0, 0.0, -1.1], dtype=torch.float64)
TARGETS = torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64)


def loss_of(critic_only=False, **kwargs):
    """ppo_loss for the four transitions above, with an entropy of 0.7."""
    output = RATIOS.log(), torch.tensor(0.7, dtype=torch.float64), VALUES
    agent = SimpleNamespace(evaluate_actions=lambda obs, action: output)
    args = ppo.Args(
        **{"norm_adv": False, "clip_value": False, "clip_coef": 0.2, "ent_coef": 0.1, "vf_coef": 0.5, **kwargs}
    )
    loss, stats = ppo.ppo_loss(
        agent, args, critic_only, None, None, torch.zeros(4).double(), ADVANTAGES, TARGETS, OLD_VALUES
    )
    return loss.item(), dict(zip(ppo.STATS, stats.tolist(), strict=True))


def test_policy_loss_by_hand():
    # r A = 1, 3, -0.5, -3.3; with r clipped to [0.8, 1.2]: 1, 2.4, -0.8, -3.3
    assert loss_of()[1]["policy_gradient_loss"] == pytest.approx(-(1 + 2.4 - 0.8 - 3.3) / 4)
    assert loss_of(clip_coef=9.0)[1]["policy_gradient_loss"] == pytest.approx(-(1 + 3 - 0.5 - 3.3) / 4)


def test_policy_loss_with_normalised_advantages_by_hand():
    deviation = math.sqrt((1.25**2 + 2.25**2 + 0.75**2 + 2.75**2) / 3)  # of 1, 2, -1, -3 about -0.25
    expected = -(1.25 + 1.2 * 2.25 - 0.8 * 0.75 - 1.1 * 2.75) / deviation / 4
    assert loss_of(norm_adv=True)[1]["policy_gradient_loss"] == pytest.approx(expected)


def test_value_loss_by_hand():
    # errors 4, 0, 0.81, 4; the clipped values are 1, 1.2, 0.1, -1 with errors 4, 0.64, 0.81, 4
    assert loss_of()[1]["value_loss"] == pytest.approx(0.5 * (4 + 0 + 0.81 + 4) / 4)
    assert loss_of(clip_value=True)[1]["value_loss"] == pytest.approx(0.5 * (4 + 0.64 + 0.81 + 4) / 4)


def test_loss_adds_up_and_statistics_by_hand():
    loss, stats = loss_of()
    kl = sum(ratio - 1 - math.log(ratio) for ratio in (1, 1.5, 0.5, 1.1)) / 4
    assert stats["approx_kl"] == pytest.approx(kl)
    assert stats["clip_fraction"] == pytest.approx(0.5)
    assert stats["entropy_loss"] == pytest.approx(-0.7)
    assert loss == pytest.approx(stats["policy_gradient_loss"] + 0.5 * stats["value_loss"] - 0.1 * 0.7)
    critic_loss, critic_stats = loss_of(critic_only=True)
    assert critic_loss == pytest.approx(0.5 * stats["value_loss"])
    assert critic_stats == stats


def reference_update(agent, args, data):
    """PPO's update with stock parts: Normal, Adam, clip_grad_norm_. Data and permutations as in ppo.update."""
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, foreach=False)
    for _ in range(args.update_epochs):
        order = torch.randperm(len(data[0]))
        for start in range(0, len(order), args.minibatch_size):
            obs, action, logprob, adv, target, value = (x[order[start : start + args.minibatch_size]] for x in data)
            mean, var = agent.normalizer.mean, agent.normalizer.var
            obs = ((obs - mean) / (var + 1e-8).sqrt()).clip(-10, 10)
            policy = Normal(agent.actor(obs), agent.log_std.exp())
            ratio = (policy.log_prob(action).sum(1) - logprob).exp()
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            new_value = agent.critic(obs)[:, 0]
            clipped = value + (new_value - value).clip(-args.clip_coef, args.clip_coef)
            value_loss = 0.5 * torch.maximum((new_value - target) ** 2, (clipped - target) ** 2).mean()
            gain = torch.minimum(ratio * adv, ratio.clip(1 - args.clip_coef, 1 + args.clip_coef) * adv).mean()
            entropy = policy.entropy().sum(1).mean()
            optimizer.zero_grad()
            (args.vf_coef * value_loss - gain - args.ent_coef * entropy).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()


def make_optimizer(agent, args):
    return torch.optim.AdamW(
        agent.parameters(), args.learning_rate, eps=1e-5, weight_decay=args.weight_decay, fused=True
    )


def test_update_is_adam_on_the_clipped_gradient():
    args = ppo.Args(learning_rate=1e-3, minibatch_size=16, update_epochs=3, norm_adv=True, clip_value=True)
    ours, theirs = make_agent().double(), make_agent().double()
    data = make_data(ours)
    torch.manual_seed(3)
    ppo.update(ours, make_optimizer(ours, args), ppo.compute_gradient, args, False, data)
    torch.manual_seed(3)
    reference_update(theirs, args, data)
    for (name, x), y, before in zip(
        ours.named_parameters(), theirs.parameters(), make_agent().double().parameters(), strict=True
    ):
        assert (x - before).abs().max() > 1e-4, name
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_weights_are_the_parameters_of_every_copy():
    agent = make_agent()
    for twin in (agent, copy.deepcopy(agent), copy.deepcopy(agent).double(), copy.deepcopy(agent).double().float()):
        assert [id(x) for x in twin.weights] == [id(x) for x in twin.parameters()]
    agent.load_state_dict(make_agent(seed=1).state_dict())
    assert [id(x) for x in agent.weights] == [id(x) for x in agent.parameters()]


def test_critic_warmup_leaves_the_actor_as_it_is():
    args = ppo.Args(minibatch_size=16, update_epochs=2, weight_decay=0.1)
    agent, before = make_agent(), make_agent()
    ppo.update(agent, make_optimizer(agent, args), ppo.compute_gradient, args, True, make_data(agent))
    changed = {
        name
        for (name, x), y in zip(agent.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(x, y)
    }
    assert changed == {name for name, _ in agent.named_parameters() if name.startswith("critic")}


def test_target_kl_stops_before_the_step_that_exceeds_it():
    agent, calls = make_agent(), []
    args = ppo.Args(minibatch_size=16, update_epochs=3, target_kl=0.5)
    kls = iter([0.1, 0.2, 0.9, 0.0])

    def gradient(agent, args, critic_only, *minibatch):
        calls.append(len(minibatch[0]))
        agent.log_std.grad = torch.ones_like(agent.log_std)
        return torch.tensor([0.0, 0.0, 0.0, next(kls), 0.0])

    optimizer = make_optimizer(agent, args)
    stats = ppo.update(agent, optimizer, gradient, args, False, make_data(agent))
    assert calls == [16, 16, 16]
    assert optimizer.state[agent.log_std]["step"] == 2
    assert stats[3] == pytest.approx((0.1 + 0.2 + 0.9) / 3)


def test_update_visits_every_transition_once_an_epoch():
    agent, seen = make_agent(), []
    args = ppo.Args(minibatch_size=16, update_epochs=2)

    def gradient(agent, args, critic_only, obs, *others):
        seen.append(obs[:, 0])
        return torch.zeros(5)

    data = make_data(agent)
    ppo.update(agent, make_optimizer(agent, args), gradient, args, False, data)
    first, second = torch.cat(seen).split(64)
    assert torch.equal(first.sort().values, data[0][:, 0].sort().values)
    assert torch.equal(second.sort().values, data[0][:, 0].sort().values)
    assert not torch.equal(first, second)


@quick
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_normalizer_is_the_mean_and_variance_of_all_batches(seed, sizes):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(rng.normal(scale=5), rng.uniform(0.1, 3), size=(n, 3)) for n in sizes]
    normalizer, everything = ppo.Normalizer((3,)).double(), np.concatenate(batches)
    for batch in batches:
        normalizer.update(torch.as_tensor(batch))
    assert normalizer.count == len(everything)
    np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(normalizer.var, everything.var(0), rtol=1e-9, atol=1e-9)


def test_normalizer_stands_still_and_clips():
    normalizer = ppo.Normalizer((2,))
    normalizer.update(torch.tensor([[1.0, -1], [3, 3]]))
    before = [buffer.clone() for buffer in normalizer.buffers()]
    out = normalizer(torch.tensor([[3.0, 1.0], [1e6, -1e6]]))
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.0], [10.0, -10.0]]))
    assert all(torch.equal(x, y) for x, y in zip(before, normalizer.buffers(), strict=True))


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_reward_scaler_is_a_plain_loop(seed, rows):
    rng = np.random.default_rng(seed)
    scaler, running, seen = ppo.RewardScaler(rows, 0.9).double(), np.zeros(rows), []
    for _ in range(3):
        reward, done = rng.normal(1, 3, size=(8, rows)), rng.random((8, rows)) < 0.3
        ours = scaler(torch.as_tensor(reward), torch.as_tensor(done)).numpy()
        for t in range(8):
            for i in range(rows):
                running[i] = 0.9 * running[i] + reward[t, i]
                seen.append(running[i])
                running[i] = 0.0 if done[t, i] else running[i]
        expected = np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(scaler.returns, running, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_obs", [True, False])
def test_agent_is_a_normal_distribution(norm_obs):
    agent = make_agent(norm_obs=norm_obs).double()
    obs, action = make_data(agent)[:2]
    policy = Normal(agent.actor(agent.normalizer(obs)), agent.log_std.exp())
    logprob, entropy, value = agent.evaluate_actions(obs, action)
    torch.testing.assert_close(logprob, policy.log_prob(action).sum(1))
    torch.testing.assert_close(entropy, policy.entropy().sum(1)[0])
    torch.testing.assert_close(value, agent.value(obs))
    torch.testing.assert_close(agent(obs), policy.mean.clamp(-1, 1))
    assert agent(obs).abs().max() == 1  # some are clipped, so the line above says something


def test_the_list_of_weights_is_that_of_the_parameters_also_in_copies():
    agent = make_agent()
    for one in (agent, copy.deepcopy(agent), agent.double(), copy.deepcopy(agent).float()):
        assert [id(x) for x in one.weights] == [id(x) for x in one.parameters()]


def test_agent_samples_its_distribution():
    agent = make_agent().double()
    obs = make_data(agent)[0][:1]
    with torch.no_grad():
        mean, samples = agent.actor(agent.normalizer(obs))[0], agent.sample(obs.expand(40_000, -1))
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(samples.std(0), agent.log_std.detach().exp(), rtol=0.03, atol=0)


def test_correct_by_hand():
    space = gym.spaces.Box(np.float32([-1, -1, -0.1]), np.float32([1, 1, 0.1]))
    base = np.array([[0.5, -0.9, 0.0]], np.float32)
    args = ppo.Args(alpha=0.5, act_scale=0.4)
    corrected = ppo.correct(base, np.array([[0.5, -3.0, 1.0]], np.float32), args, space)
    np.testing.assert_allclose(corrected, [[0.6, -1.0, 0.1]], atol=1e-6)  # -0.9 - 0.2 and 0.2 leave the space
    corrected = ppo.correct(base, np.array([[-9.0, 9.0, 0.1]], np.float32), args, space)
    np.testing.assert_allclose(corrected, [[0.3, -0.7, 0.02]], atol=1e-6)  # the residual counts as -1 and 1
    np.testing.assert_array_equal(ppo.correct(base, np.ones((1, 3)), ppo.Args(alpha=0.0), space), base)


class Toy:
    """Three environments with written-down episodes: observations count the steps, final ones are negative."""

    num_envs = 3
    action_repeat = 1
    single_action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, wrong=None, value=np.nan):
        self.t, self.actions, self.wrong, self.value = 0, [], wrong, value

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


class Wide(Toy):
    """With actions from -2 to 6."""

    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
    single_action_space = gym.spaces.Box(-2, 6, (2,), np.float32)


def test_actions_are_scaled_to_the_bounds_of_the_environment():
    """The Gaussian's [-1, 1] is the environment's [-2, 6]; what is stored is what was drawn."""
    torch.manual_seed(0)
    args = ppo_continuous.Args(num_envs=3, num_steps=40, norm_obs=False, init_log_std=0.0)
    vec = Wide()
    agent = ppo_continuous.make_agent(vec, args)
    assert agent.center.tolist() == [2, 2]
    assert agent.scale.tolist() == [4, 4]
    device = torch.device("cpu")
    batch, _, _ = ppo_continuous.collect(agent, vec, args, vec.observation(), 0, device)
    drawn, played = batch.action.numpy(), np.stack(vec.actions)
    assert np.abs(drawn).max() > 1.5
    np.testing.assert_allclose(played, np.clip(2 + 4 * drawn, -2, 6), atol=1e-6)
    assert played.min() == -2
    assert played.max() == 6
    with torch.no_grad():
        agent.actor[-1].weight.mul_(1000)
        obs = torch.randn(200, 5)
        action = agent(obs)
        torch.testing.assert_close(action, 2 + 4 * agent.actor(obs).clamp(-1, 1))
        assert action.min() == -2
        assert action.max() == 6


def collect(vec, agent=None, start=90, **kwargs):
    args = ppo.Args(num_envs=3, num_steps=4, alpha=0.5, act_scale=0.4, residual_penalty=0.25, **kwargs)

    def base(obs):
        return np.full((len(obs), 2), 0.1, np.float32)

    agent = make_agent(seed=1) if agent is None else agent
    return ppo.collect(agent, vec, base, args, vec.observation(), start, torch.device("cpu"))


def test_collect_keeps_where_each_action_led():
    vec = Toy()
    batch, obs, _ = collect(vec)
    assert batch.obs[:, :, 0].tolist() == [[t, 100 + t, 200 + t] for t in range(4)]
    led_to = np.array([[t, 100 + t, 200 + t] for t in range(1, 5)])
    led_to[1, 1] *= -1
    led_to[2, 0] *= -1
    assert batch.next_obs[:, :, 0].tolist() == led_to.tolist()
    assert obs[:, 0].tolist() == [4, 104, 204]
    assert batch.terminated.nonzero().tolist() == [[1, 1]]
    assert batch.done.nonzero().tolist() == [[1, 1], [2, 0]]


def test_collect_stores_the_residual_as_drawn_and_plays_the_corrected_action():
    vec = Toy()
    batch, _, _ = collect(vec)
    residual = batch.action.numpy()
    assert (np.abs(residual) > 1).any()
    played = 0.1 + 0.5 * 0.4 * np.clip(residual, -1, 1)
    np.testing.assert_allclose(np.stack(vec.actions), played, atol=1e-6)
    penalty = 0.25 * np.square(np.clip(residual, -1, 1)).sum(2)
    np.testing.assert_allclose(batch.reward, np.array([1, 2, 3]) - penalty, atol=1e-6)


def test_collect_lists_the_episodes_that_ended():
    _, _, episodes = collect(Toy())
    common = {"failure": None}
    assert episodes == [
        {"step": 96, "return": 4.0, "length": 2, "success": True, "error": 51.0, **common},
        {"step": 99, "return": 3.0, "length": 3, "success": False, "error": 1.5, **common},
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["observation", "reward", "final"])
def test_collect_names_step_and_environment_of_what_is_not_finite(what, value):
    with pytest.raises(FloatingPointError, match=r"step 99 in environment 0"):
        collect(Toy(what, value))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_collect_checks_the_observation_that_it_ends_with(value):
    vec = Toy("observation", value)
    vec.t = -1  # so that the last of the four steps is the wrong one
    with pytest.raises(FloatingPointError, match=r"step 102 in environment 0"):
        collect(vec)


def test_float64_observations_train_like_any_others():
    vec, agent = Toy(), make_agent(seed=1)
    single = vec.observation
    vec.observation = lambda: single().astype(np.float64)
    args = ppo.Args(num_envs=3, num_steps=4, minibatch_size=6, update_epochs=1)
    batch, _, _ = collect(vec, agent)
    scalars = ppo.learn(agent, make_optimizer(agent, args), ppo.compute_gradient, args, batch, False)
    assert all(np.isfinite(value) for value in scalars.values())


def test_learn_gives_the_statistics_of_the_batch():
    vec, agent = Toy(), make_agent(seed=1)
    args = ppo.Args(num_envs=3, num_steps=4, minibatch_size=12, update_epochs=1, learning_rate=0.125)
    batch, _, _ = collect(vec, agent)
    count = agent.normalizer.count.item()
    scalars = ppo.learn(agent, make_optimizer(agent, args), ppo.compute_gradient, args, batch, False)
    assert {f"train/{name}" for name in ppo.STATS} < scalars.keys()
    assert scalars["train/learning_rate"] == 0.125
    assert scalars["train/approx_kl"] == pytest.approx(0, abs=1e-6)  # the first minibatch comes before any step
    assert agent.normalizer.count == count + 12


@pytest.fixture
def fake_onnx(monkeypatch):
    """The export takes longer than a tiny run; where it is not the subject it writes a placeholder."""
    monkeypatch.setattr(run, "export_onnx", lambda agent, obs_dim, path, *about: path.write_bytes(b"onnx"))


@pytest.fixture
def seen(monkeypatch):
    """What ppo_continuous.learn was given and left behind in each iteration: (agent before, agent after)."""
    learn, seen = ppo_continuous.learn, []

    def spy(agent, *args, **kwargs):
        before = {name: x.clone() for name, x in agent.state_dict().items()}
        scalars = learn(agent, *args, **kwargs)
        seen.append((before, {name: x.clone() for name, x in agent.state_dict().items()}, scalars))
        return scalars

    monkeypatch.setattr(ppo_continuous, "learn", spy)
    return seen


PENDULUM = {
    "env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 2,
    "total_timesteps": 128, "eval_episodes": 1, "eval_every": 0, "checkpoint_every": 0, "hidden_sizes": (8,),
    "run_name": "run",
}  # fmt: skip


def test_a_scheduled_deviation_follows_its_schedule_and_is_not_learned(seen, tmp_path, fake_onnx):
    schedule = {"init_log_std": -1.0, "final_log_std": -3.0, "ent_coef": 0.1}
    ppo_continuous.train(ppo_continuous.Args(**{**PENDULUM, **schedule, "run_root": str(tmp_path)}))
    for (before, after, scalars), expected in zip(seen, (-1.0, -1.5, -2.0, -2.5), strict=True):
        assert before["log_std"].tolist() == pytest.approx([expected])
        assert torch.equal(after["log_std"], before["log_std"])
        assert scalars["train/entropy_loss"] == pytest.approx(-(expected + 0.5 * math.log(2 * math.pi * math.e)))
        assert not torch.equal(after["actor.0.weight"], before["actor.0.weight"])


def test_without_a_schedule_the_deviation_is_learned(seen, tmp_path, fake_onnx):
    ppo_continuous.train(ppo_continuous.Args(**{**PENDULUM, "run_root": str(tmp_path)}))
    assert seen[0][0]["log_std"].tolist() == [0.0]
    assert all(not torch.equal(before["log_std"], after["log_std"]) for before, after, _ in seen)


def test_while_the_critic_warms_up_the_policy_stands_still(seen, tmp_path, fake_onnx):
    """A policy that has normalised its observations before, too: with other statistics it would be another."""
    settings = {**PENDULUM, "run_root": str(tmp_path), "run_name": "first"}
    ppo_continuous.train(ppo_continuous.Args(**settings))
    settings |= {"run_name": "run", "pretrained": str(tmp_path / "first"), "critic_warmup": 2}
    seen.clear()
    ppo_continuous.train(ppo_continuous.Args(**settings))
    counts = [int(after["normalizer.count"]) for _, after, _ in seen]
    assert counts[0] == counts[1] == counts[2] - 32 == counts[3] - 64
    assert torch.equal(seen[0][0]["normalizer.mean"], seen[1][1]["normalizer.mean"])


def test_a_frozen_normalizer_stays_what_the_pretrained_policy_brought(seen, tmp_path, fake_onnx):
    settings = {**PENDULUM, "run_root": str(tmp_path), "run_name": "first"}
    ppo_continuous.train(ppo_continuous.Args(**settings))
    settings |= {"run_name": "run", "pretrained": str(tmp_path / "first"), "freeze_normalizer": True}
    seen.clear()
    ppo_continuous.train(ppo_continuous.Args(**settings))
    for name in ("mean", "var", "count"):
        assert all(torch.equal(seen[0][0][f"normalizer.{name}"], after[f"normalizer.{name}"]) for _, after, _ in seen)
    assert not torch.equal(seen[0][0]["actor.0.weight"], seen[0][1]["actor.0.weight"])  # which learns all the same
    # who plays the result need not know how it came about
    played = command.parse(ppo_continuous.Args, ppo_continuous.Args.tuned, argv=["--evaluate", str(tmp_path / "run")])
    assert not command.checked(played).freeze_normalizer


def test_the_first_batch_gives_the_statistics_for_its_own_update(seen, tmp_path, fake_onnx, monkeypatch):
    """Afterwards a batch is learned with those of the batches before, so that its log-probabilities stay what they
    were."""
    update, counts = ppo_continuous.update, []

    def spy(agent, *args, **kwargs):
        counts.append(int(agent.normalizer.count))
        return update(agent, *args, **kwargs)

    monkeypatch.setattr(ppo_continuous, "update", spy)
    ppo_continuous.train(ppo_continuous.Args(**{**PENDULUM, "run_root": str(tmp_path)}))
    assert counts == [32, 32, 64, 96]
    assert [int(after["normalizer.count"]) for _, after, _ in seen] == [32, 64, 96, 128]


def test_critic_warmup_lasts_as_many_updates_as_it_says(seen, tmp_path, fake_onnx):
    settings = {"critic_warmup": 2, "norm_obs": False, "weight_decay": 0.1}
    ppo_continuous.train(ppo_continuous.Args(**{**PENDULUM, **settings, "run_root": str(tmp_path)}))
    for k, (before, after, _) in enumerate(seen):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        critic = {name for name in before if name.startswith("critic")}
        assert changed == (critic if k < 2 else critic | {name for name in before if name.startswith(("actor", "log"))})
    assert len(seen) == 4


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
        total_timesteps=128 * 40, learning_rate=0.01, gamma=0.5, norm_obs=False, norm_reward=False, clip_value=False,
        eval_every=0, eval_episodes=1, checkpoint_every=0, run_root=str(tmp_path), run_name="run", hidden_sizes=(16,),
    )  # fmt: skip
    ppo_continuous.train(args)
    agent = ppo_continuous.make_agent(Coin(), args)
    run.load_agent(agent, run.load(tmp_path / "run" / "final.pt"), args, "")
    with torch.no_grad():
        assert agent.value(torch.tensor([[0.0], [1.0]])).tolist() == pytest.approx(expected, abs=0.1)


def test_residual_magnitude_is_the_mean_norm_of_what_was_added(tmp_path, monkeypatch, fake_onnx):
    learn, batches = ppo.learn, []

    def spy(agent, optimizer, gradient, args, batch, critic_only):
        batches.append(batch)
        return learn(agent, optimizer, gradient, args, batch, critic_only)

    monkeypatch.setattr(ppo, "learn", spy)
    ppo.train(ppo.Args(**{**TINY, "total_timesteps": 64, "run_root": str(tmp_path)}))
    (row,) = run.read_progress(tmp_path / "run" / "progress.csv")
    magnitude = np.linalg.norm(np.clip(batches[0].action.numpy(), -1, 1), axis=2).mean()
    assert float(row["train/residual_magnitude"]) == pytest.approx(magnitude, rel=1e-5)


def break_observation(monkeypatch):
    step, calls = so101.SO101Paper.step, []

    def wrong(self, action):
        obs, *others = step(self, action)
        calls.append(1)
        if self.training and len(calls) == 75:
            obs[1] = np.nan
        return obs, *others

    monkeypatch.setattr(so101.SO101Paper, "step", wrong)


def break_reward(monkeypatch):
    advance, calls = so101.SO101Paper.advance, []

    def wrong(self, action):
        reward, terminated, metrics = advance(self, action)
        calls.append(1)
        return (reward * np.nan if self.training and len(calls) == 70 else reward), terminated, metrics

    monkeypatch.setattr(so101.SO101Paper, "advance", wrong)


def break_loss(monkeypatch):
    loss, calls = ppo.ppo_loss, []

    def wrong(*args):
        calls.append(1)
        total, stats = loss(*args)
        return (total * np.nan, stats) if len(calls) == 10 else (total, stats)

    monkeypatch.setattr(ppo, "ppo_loss", wrong)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (break_observation, "observation not finite at step 150 in environment 1"),
        (break_reward, "reward not finite at step 140 in environment 0"),
        (break_loss, "step 192; the last checkpoint"),
    ],
)
def test_a_run_that_meets_nan_fails_and_keeps_its_last_checkpoint(
    breaks, says, tmp_path, monkeypatch, capsys, fake_onnx
):
    flags = {**TINY, "run_root": str(tmp_path), "env_kwargs": {}}
    argv = ["ppo_residual.py"]
    for name, value in flags.items():
        if value != {}:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr("sys.argv", argv)
    breaks(monkeypatch)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            ppo.main()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert stopped.value.code == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert says in error[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    checkpoint = run.load_checkpoint(run.find_checkpoint(str(tmp_path / "run")))
    assert checkpoint["step"] == 128
    assert all(torch.isfinite(x).all() for x in checkpoint["agent"].values())


def corrected(base_policy=None):
    """A policy for the paper task with a residual that does something."""
    vec = envs.make_vec("SO101Paper-v0", 1)
    agent = make_agent(25, 6)
    return ppo.Corrected(agent, base_policy or rollout.scripted("ik", vec), ppo.Args(), vec.single_action_space)


def test_corrected_action_does_not_depend_on_the_batch_it_is_in():
    policy = corrected()
    rng = np.random.default_rng(0)
    vec = envs.make_vec("SO101Paper-v0", 64, seed=5)
    obs, _ = vec.reset(seed=5)
    for _ in range(10):
        obs = vec.step(rng.uniform(-0.04, 0.04, (64, 6)).astype(np.float32))[0]
    whole = policy(obs)
    assert np.array_equal(whole, np.concatenate([policy(obs[i : i + 1]) for i in range(64)]))
    assert np.array_equal(whole, np.concatenate([policy(obs[i : i + 3]) for i in range(0, 64, 3)]))
    assert np.ptp(whole - policy.base_policy(obs), axis=0).min() > 1e-3


def test_evaluation_does_not_depend_on_the_number_of_rows():
    def results(rows):
        vec = envs.make_vec("SO101Paper-v0", rows, training=False, split="validation", **EASY)
        return rollout.rollout(corrected(), vec, 7, seed=4)

    few, many = results(3), results(16)
    assert few == many
    assert len({result["length"] for result in few}) > 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    agent = make_agent(25, 6)
    path = tmp_path_factory.mktemp("onnx") / "policy.onnx"
    run.export_onnx(agent, 25, path, "residual", {})
    return agent, path


def test_onnx_equals_torch_with_the_normaliser_inside(exported):
    agent, path = exported
    session = onnxruntime.InferenceSession(str(path))
    obs = 3 + 3 * torch.randn(1000, 25, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = agent(obs).numpy()
        action = session.run(["action"], {"obs": obs.numpy()})[0]
        np.testing.assert_allclose(action, expected, rtol=0, atol=1e-5)
        for n in (1, 3, 64):
            np.testing.assert_allclose(session.run(None, {"obs": obs[:n].numpy()})[0], expected[:n], rtol=0, atol=1e-5)
        agent.normalizer.update(10 * torch.randn(100, 25, generator=torch.Generator().manual_seed(1)))
        assert np.abs(action - agent(obs).numpy()).max() > 0.1  # the statistics matter
    assert (np.abs(action) <= 1).all()


def test_onnx_says_what_it_holds(exported):
    agent, path = exported
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props}["kind"] == "residual"
    with pytest.raises(run.UserError, match="residual"):
        rollout.OnnxPolicy(str(path), 25, 6)
    assert agent.training  # exporting leaves the agent as it was
    assert all(parameter.grad is None for parameter in agent.parameters())


def test_policy_and_checkpoint_files_hold_tensors_and_plain_values_only(tmp_path, fake_onnx):
    ppo.train(ppo.Args(**{**TINY, "total_timesteps": 64, "run_root": str(tmp_path)}))
    for name in ("best.pt", "final.pt", "checkpoints/step_000000064.pt"):
        content = torch.load(tmp_path / "run" / name, weights_only=True)
        assert set(run.POLICY_KEYS) <= content.keys(), name
        assert content["kind"] == "residual"
        assert ("optimizer" in content) == (name != "best.pt")


def gradient_of(agent, gradient, args, data, critic_only=False):
    agent.zero_grad()
    stats = gradient(agent, args, critic_only, *data).clone()
    return stats, {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """Whatever is compiled here goes through this backend; the first traces only, and is quick."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))


def test_compiled_gradient_equals_eager_and_is_compiled_once(backend):
    args, agent = ppo.Args(), make_agent()
    optimizer = make_optimizer(agent, args)
    compiled = run.compiled(ppo.compute_gradient)
    gradient_of(agent, compiled, args, make_data(agent))
    with torch.compiler.set_stance("fail_on_recompile"):
        for k, learning_rate in enumerate((3e-4, 1e-4, 0.0)):
            optimizer.param_groups[0]["lr"] = learning_rate
            data = make_data(agent, seed=k)
            stats, gradients = gradient_of(agent, compiled, args, data)
            expected_stats, expected = gradient_of(agent, ppo.compute_gradient, args, data)
            torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
            assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
            optimizer.step()
            agent.normalizer.update(data[0])


def test_compiled_critic_warmup_gives_the_actor_no_gradient(backend):
    args, agent = ppo.Args(), make_agent()
    data = make_data(agent)
    _, gradients = gradient_of(agent, run.compiled(ppo.compute_gradient), args, data, critic_only=True)
    _, expected = gradient_of(agent, ppo.compute_gradient, args, data, critic_only=True)
    assert all(name.startswith("critic") for name in expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def test_compiled_run_equals_an_eager_one(backend, tmp_path, fake_onnx):
    agents = []
    torch._dynamo.utils.counters.clear()
    for name, compile_it in (("eager", False), ("compiled", True)):
        ppo.train(ppo.Args(**{**TINY, "run_root": str(tmp_path), "run_name": name, "compile": compile_it}))
        agents.append(run.load(tmp_path / name / "final.pt")["agent"])
    torch.testing.assert_close(*agents, rtol=1e-3, atol=1e-3)
    # three updates, with another learning rate and other statistics in each
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_says_which_compiler_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(run.UserError, match="there is no no-such-compiler; install it or leave --compile out"):
        run.compiled(ppo.compute_gradient)


@pytest.mark.slow
def test_a_damaged_compiler_cache_ends_in_one_line_with_the_remedy(tmp_path):
    cache = tmp_path / "cache"
    flags = ["--compile", "--dry-run", "--num-steps", "32", "--minibatch-size", "32", "--run-root", str(tmp_path)]
    line = [sys.executable, ppo.__file__, *flags]

    def train():
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        return subprocess.run(line, env=environment, capture_output=True, text=True)

    assert train().returncode == 0
    for file in cache.rglob("*.main.so"):
        file.write_bytes(b"")  # what a process leaves that is killed while it links
    damaged = train()
    assert damaged.returncode == 2
    last = damaged.stderr.splitlines()[-1]
    assert last.startswith("error: --compile failed (ImportError: ")
    assert f"file too short); delete PyTorch's cache {cache}, " in last
    assert "Traceback" not in damaged.stderr
    shutil.rmtree(cache)
    assert train().returncode == 0
