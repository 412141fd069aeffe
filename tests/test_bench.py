"""tools/bench.py: both sides train with the same settings, are measured alike, and the statistics are right."""

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch

import ppo_continuous
import ppo_residual
from envs import UserError, lateral, make_vec, run
from envs.batch_env import BatchEnv
from envs.evaluation import evaluate, figures, make_base_policy, make_scripted_policy
from envs.run import make_envs, write_json

sb3 = pytest.importorskip("stable_baselines3")
BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench.py"
sys.path.insert(0, str(BENCH.parent))
import bench  # noqa: E402
import bench_envs  # noqa: E402
import bench_ppo  # noqa: E402
import bench_results  # noqa: E402
import bench_runs  # noqa: E402
import bench_sb3  # noqa: E402
from bench_ppo import COMPILED, OURS, SB3, TUNED, settings  # noqa: E402
from bench_sb3 import NativeVecEnv  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

OTHER = {  # every setting another than SETTINGS has
    "num_envs": 2, "num_steps": 24, "minibatch_size": 12, "update_epochs": 3, "learning_rate": 1e-3, "gamma": 0.9,
    "gae_lambda": 0.8, "clip_coef": 0.3, "clip_vloss": False, "ent_coef": 0.1, "vf_coef": 0.7, "max_grad_norm": 0.6,
    "target_kl": 0.4, "norm_obs": False, "norm_reward": False, "norm_adv": False, "init_log_std": -1.0,
    "hidden_sizes": (8, 9), "anneal_lr": True, "total_timesteps": 480,
}  # fmt: skip
ALL = ("SO101Paper-v0", "LateralControl-v0", "Ballbot-v0", "Hopper-v5")


# The adapter


class Two(BatchEnv):
    """x grows by the action, in [-1, 3]; it ends at 2, or after three steps, or both at once. Costs x."""

    def __init__(self, num_envs=1, training=True, split="train", render_mode=None):
        box, action = gym.spaces.Box(-9, 9, (1,), np.float32), gym.spaces.Box(-1, 3, (1,), np.float32)
        super().__init__(num_envs, box, action, 3, training, split, render_mode)
        self.x = np.zeros(num_envs)

    def start(self, rows):
        self.x[rows] = 0

    def advance(self, action):
        self.x += action[:, 0]
        return -self.x.copy(), self.x >= 2, {}

    def observe(self, rows):
        return self.x[rows, None].astype(np.float32)

    def state(self):
        return {"x": self.x}


def adapter(env_id, contender=OURS, **changes):
    """The adapter for a task, its native twin at the same start, and what they show there."""
    args = replace(settings(env_id, contender, seed=5), num_envs=3, **changes)
    vec, twin = (make_envs(args) for _ in range(2))
    native = NativeVecEnv(vec, bench_sb3.unit_actions(vec, args), getattr(args, "residual_penalty", 0.0))
    native.seed(5)
    return args, native, twin, native.reset(), twin.reset(seed=5)[0]


@pytest.mark.parametrize("env_id", ["LateralControl-v0", "Ballbot-v0"])
def test_the_adapter_steps_as_the_native_environment(env_id):
    """Bit for bit, with the actions that our agent would send for the same draw, beyond the bounds too."""
    args, native, twin, obs, expected = adapter(env_id)
    np.testing.assert_array_equal(obs, expected)
    agent, rng = ppo_continuous.make_agent(twin, args), np.random.default_rng(0)
    low, high = native.action_space.low, native.action_space.high
    assert (low == -1).all()
    assert (high == 1).all()
    ended = 0
    for _ in range(450):
        action = rng.normal(size=(3, len(low))).astype(np.float32)
        obs, reward, done, infos = native.step(action)
        expected = twin.step(agent.scale_action(torch.as_tensor(action)).numpy())
        np.testing.assert_array_equal(obs, expected[0])
        np.testing.assert_array_equal(reward, expected[1])
        np.testing.assert_array_equal(done, expected[2] | expected[3])
        for i, info in enumerate(infos):
            assert set(info) == ({"terminal_observation", "TimeLimit.truncated", "episode"} if done[i] else set())
            if done[i]:
                ended += 1
                np.testing.assert_array_equal(info["terminal_observation"], expected[4]["final_obs"][i])
                assert info["TimeLimit.truncated"] == expected[3][i]
                assert info["episode"]["r"] == expected[4]["episode"]["r"][i]
                assert info["episode"]["l"] == expected[4]["episode"]["l"][i]
    assert ended >= 3


def test_the_adapter_learns_the_residual_that_our_script_learns():
    """Observations, rewards with the penalty and episodes of ppo_residual.collect_rollout for the same draws."""
    args, native, twin, obs, first = adapter("SO101Paper-v0", num_steps=20, residual_penalty=0.5)
    rng = np.random.default_rng(0)
    draws = iter(drawn := rng.normal(size=(20, 3, 6)).astype(np.float32))

    class Drawn:
        log_std = torch.zeros(6)

        def sample(self, obs):
            return torch.as_tensor(next(draws))

    base = make_base_policy(args.base_policy, twin)
    batch, _, _ = ppo_residual.collect_rollout(Drawn(), base, twin, first, 0, args)
    for t, action in enumerate(drawn):
        np.testing.assert_array_equal(obs, batch.obs[t].numpy())
        obs, reward, done, _ = native.step(action)
        np.testing.assert_array_equal(reward.astype(np.float32), batch.reward[t].numpy())
        np.testing.assert_array_equal(done, batch.done[t].numpy())
    assert np.abs(reward).max() > 0.5  # the penalty is there


def played(actions):
    """What the adapter says of one row of Two after each of these actions in its own range."""
    native = NativeVecEnv(vec := Two(1), bench_sb3.unit_actions(vec, ppo_continuous.Args()))
    native.reset()
    return [native.step(np.array([[(a - 1) / 2]], np.float32)) for a in actions]


def test_the_end_of_an_episode_says_whether_it_was_the_time_limit():
    (*_, (obs, _, done, (info,))) = played([0.5, 0.5, 0.5])
    assert done[0]
    assert obs[0] == 0  # already the next episode
    assert info["TimeLimit.truncated"] is True
    assert info["terminal_observation"] == pytest.approx(1.5)
    assert info["episode"] == {"r": -3.0, "l": 3}
    assert played([2.5])[-1][3][0]["TimeLimit.truncated"] is False
    assert played([0.5, 0.5, 1.0])[-1][3][0]["TimeLimit.truncated"] is False  # both at once is a termination


def test_stable_baselines_bootstraps_the_time_limit_and_only_that():
    """With a value of 7 everywhere, the reward of a last step contains gamma * 7 at the time limit alone."""
    for action, bootstrapped in ((0.5, True), (2.0, False)):
        native = NativeVecEnv(vec := Two(1), bench_sb3.unit_actions(vec, ppo_continuous.Args()))
        model = sb3.PPO("MlpPolicy", native, n_steps=3, batch_size=3, n_epochs=1, gamma=0.9, device="cpu")
        sent, last = np.array([[(action - 1) / 2]], np.float32), 3 if bootstrapped else 1
        model.policy.forward = lambda obs, sent=sent: (torch.as_tensor(sent), torch.full((1, 1), 7.0), torch.zeros(1))
        model.policy.predict_values = lambda obs: torch.full((1, 1), 7.0)
        model.train = lambda: None
        model.learn(3)
        reward = model.rollout_buffer.rewards[:, 0]
        assert reward[last - 1] == pytest.approx(-action * last + (0.9 * 7 if bootstrapped else 0))


def test_an_episode_is_reported_without_normalisation():
    native = VecNormalize(NativeVecEnv(vec := Two(2), bench_sb3.unit_actions(vec, ppo_continuous.Args())))
    native.reset()
    for _ in range(3):
        _, _, done, infos = native.step(np.full((2, 1), -0.25, np.float32))
    assert done.all()
    assert infos[0]["episode"]["r"] == -3
    assert infos[0]["terminal_observation"] == pytest.approx(native.normalize_obs(np.array([1.5])), abs=1e-5)


# The settings


def sb3_model(monkeypatch, args):
    """The model that the benchmark makes of these settings, and for how many steps it is to learn."""
    made = []
    monkeypatch.setattr(sb3.PPO, "learn", lambda self, total, callback: made.extend((self, total)))
    bench_sb3.train_sb3(args)
    return made


def sb3_settings(model, total):
    """What Stable-Baselines3 really uses, under our names."""
    policy, vec = model.policy, model.get_vec_normalize_env()
    optimizer = policy.optimizer.param_groups[0]
    assert model.device.type == "cpu"
    assert (optimizer["eps"], optimizer["betas"]) == (1e-5, (0.9, 0.999))
    assert vec.gamma == model.gamma
    assert (vec.clip_obs, vec.clip_reward, vec.epsilon) == (10, 10, 1e-8)
    value_clip = None if model.clip_range_vf is None else model.clip_range_vf(1.0)
    assert value_clip in (None, model.clip_range(1.0))
    widths = [
        tuple(layer.out_features for layer in net if hasattr(layer, "out_features"))
        for net in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net)
    ]
    assert widths[0] == widths[1]
    assert isinstance(policy.mlp_extractor.policy_net[1], torch.nn.Tanh)
    return {
        "num_envs": model.n_envs, "num_steps": model.n_steps, "minibatch_size": model.batch_size,
        "update_epochs": model.n_epochs, "learning_rate": optimizer["lr"],
        "anneal_lr": model.lr_schedule(0.5) < model.lr_schedule(1.0),
        "weight_decay": optimizer["weight_decay"], "gamma": model.gamma, "gae_lambda": model.gae_lambda,
        "clip_coef": model.clip_range(1.0), "clip_vloss": value_clip is not None, "ent_coef": model.ent_coef,
        "vf_coef": 2 * model.vf_coef, "max_grad_norm": model.max_grad_norm,
        "target_kl": None if model.target_kl is None else 1.5 * model.target_kl,
        "norm_obs": vec.norm_obs, "norm_reward": vec.norm_reward, "norm_adv": model.normalize_advantage,
        "init_log_std": policy.log_std[0].item(), "hidden_sizes": widths[0], "total_timesteps": total,
    }  # fmt: skip


def assert_alike(found, expected):
    """Up to what float32 and a product round."""
    assert found.pop("hidden_sizes") == expected.pop("hidden_sizes")
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["as benchmarked", "all others"])
def test_stable_baselines_gets_the_same_settings(monkeypatch, changes):
    asked = {**bench_ppo.SETTINGS, **changes}
    args = ppo_continuous.Args(env_id="Pendulum-v1", **asked)
    expected = {
        **asked,
        "total_timesteps": asked["total_timesteps"] // (batch := asked["num_envs"] * asked["num_steps"]) * batch,
    }
    assert_alike(sb3_settings(*sb3_model(monkeypatch, args)), expected)
    fixed = {"weight_decay"}  # what SB3's PPO does not vary
    assert {name for name in asked if asked[name] != bench_ppo.SETTINGS[name]} == set(changes)
    assert not changes or set(changes) | fixed == set(bench_ppo.SETTINGS)


@pytest.mark.parametrize("env_id", ALL[:3])
def test_stable_baselines_gets_the_tuned_settings(monkeypatch, env_id):
    args = settings(env_id, SB3, seed=4)
    model, total = sb3_model(monkeypatch, args)
    found = sb3_settings(model, total * args.env_kwargs.get("action_repeat", 1))
    expected = {
        **{name: getattr(args, name) for name in found},
        "total_timesteps": args.num_iterations * args.steps_per_iteration,
    }
    assert_alike(found, expected)
    assert model.seed == 4
    native = model.get_vec_normalize_env().venv
    assert native.vec.training
    assert native.penalty == getattr(args, "residual_penalty", 0.0)


def test_the_learning_rate_is_annealed_alike(monkeypatch):
    """The rates with which both really update, over five rollouts."""
    changes = {**OTHER, "env_id": "Pendulum-v1", "total_timesteps": 5 * 48 + 7, "target_kl": None, "eval_episodes": 1}
    ours, theirs = [], []
    update = ppo_continuous.ppo_update

    def noted(agent, optimizer, *others):
        ours.append(optimizer.param_groups[0]["lr"])
        return update(agent, optimizer, *others)

    monkeypatch.setattr(ppo_continuous, "ppo_update", noted)
    monkeypatch.setattr(run, "export_onnx", lambda agent, envs, policy, path: path.write_bytes(b"onnx"))
    original = sb3.PPO.train
    monkeypatch.setattr(
        sb3.PPO, "train", lambda self: (original(self), theirs.append(self.policy.optimizer.param_groups[0]["lr"]))
    )
    args = ppo_continuous.Args(**changes)
    for contender in (OURS, SB3):
        bench_ppo.train(contender, args)
    assert len(ours) == 5
    assert theirs == pytest.approx(ours)
    assert ours[1] == pytest.approx(0.8 * OTHER["learning_rate"])


def test_both_sides_get_what_both_have_and_the_tuned_ones_the_rest():
    for env_id in ALL:
        ours, theirs = (settings(env_id, contender, seed=1) for contender in (OURS, SB3))
        assert ours == theirs
        assert settings(env_id, COMPILED, seed=1) == replace(ours, compile=True)
        assert (ours.final_log_std, ours.critic_warmup_updates, ours.freeze_obs_stats) == (None, 0, False)
        assert getattr(ours, "group_size", 1) == 1
        assert ours.weight_decay == 0
    changed = bench_ppo.changed(settings("LateralControl-v0", TUNED, 1), settings("LateralControl-v0", OURS, 1))
    assert set(changed) == {"group_size", "final_log_std", "eval_every", "eval_episodes"}
    tuned = ppo_continuous.Args.from_preset(env_id="LateralControl-v0", seed=1, checkpoint_every=0)
    assert settings("LateralControl-v0", TUNED, 1) == tuned
    assert [len(bench_ppo.contenders(env_id)) for env_id in ALL] == [2, 3, 2, 2]
    assert isinstance(settings("SO101Paper-v0", SB3, 1), ppo_residual.Args)


# Measuring


@pytest.mark.parametrize("contender", [OURS, SB3])
def test_both_sides_are_measured_alike(contender, monkeypatch):
    """Pendulum: episodes of 200 steps, each step costs up to 16.3, so a normalised return would show."""
    monkeypatch.setattr(run, "export_onnx", lambda agent, envs, policy, path: path.write_bytes(b"onnx"))
    args = replace(settings("Pendulum-v1", contender, seed=3, total=2 * 2048), update_epochs=1)
    kept = []
    monkeypatch.setattr(bench_ppo, "train", lambda *x, train=bench_ppo.train: kept.append(train(*x)) or kept[0])
    result = bench_ppo.learn(contender, args)
    cpu, wall = np.array(kept[0][0]).T
    assert len(cpu) == 2
    assert 0 < cpu[1] - cpu[0] < 1.5 * (wall[1] - wall[0])
    steps, returns, lengths = np.array(result["episodes"]).T
    assert steps.tolist() == [1600.0] * 8 + [3200.0] * 8
    assert (lengths == 200).all()
    assert -16.3 * 200 < returns.min() < returns.max() < -500
    assert -16.3 * 200 < result["evaluation"]["mean_return"] < -100
    assert result["steps"] == 4096


def test_speed_leaves_warm_up_and_evaluation_out(monkeypatch):
    """Rollouts of 10 and 20 s between a slow start and a slow end."""
    marks = [(100.0 * i, 200.0 * i) for i in range(4)]
    marks += [(marks[-1][0] + 10 * i, marks[-1][1] + 20 * i) for i in (1, 2)]
    marks += [(9e9, 9e9)]
    monkeypatch.setattr(bench_ppo, "train", lambda contender, args: (marks, [], None))
    args = settings("Ballbot-v0", OURS, seed=1)
    rollout_steps = 32 * 128 * 4  # four steps an action
    assert bench_ppo.speed(OURS, args) == {"cpu": rollout_steps / 10, "wall": rollout_steps / 20}


def test_steps_count_the_action_repeat(monkeypatch):
    args = replace(settings("Ballbot-v0", SB3, seed=1), num_envs=2, num_steps=8, minibatch_size=16, update_epochs=1)
    args.env_kwargs["fall_penalty"] = 0.0
    args = replace(args, total_timesteps=2 * 8 * 4 * 40, init_log_std=2.0)
    marks, episodes, _ = bench_ppo.train(SB3, args)
    assert len(marks) == 40
    assert episodes
    for step, _, length in episodes:
        assert step % 8 == 0
        assert 0 < length <= step / 2 + 4


@pytest.mark.parametrize("env_id", ALL)
def test_evaluation_starts_from_the_same_states(monkeypatch, env_id):
    """A policy that does nothing scores the same on both sides, whatever its units."""
    monkeypatch.setattr(sb3.PPO, "learn", lambda self, *args, **kwargs: None)
    dim = make_vec(env_id, 1).single_action_space.shape[0]
    monkeypatch.setattr(sb3.PPO, "predict", lambda self, obs, deterministic: (np.zeros((len(obs), dim), np.float32), 0))
    monkeypatch.setattr(bench_ppo, "EPISODES", 3)
    args = settings(env_id, SB3, seed=1)
    result = bench_ppo.learn(SB3, args)["evaluation"]
    policy = make_scripted_policy("ik" if env_id == "SO101Paper-v0" else "zero", make_vec(env_id, 1))
    expected = evaluate(policy, replace(args, eval_episodes=3, eval_seed=900_001), "test")
    assert result == pytest.approx(figures(expected))


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),  # R: qt(p, df)
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 9, 2.26216), (0.95, 18, 1.73406), (0.975, 1e4, 1.96020)],
)
def test_student_t(p, freedom, expected):
    assert bench_ppo.student_t(p, freedom) == pytest.approx(expected, rel=2e-4)


def test_welch_by_hand():
    # means 3 and 8, variances of the means 2.5 / 5 and 40 / 5, freedom 8.5^2 / (0.5^2 / 4 + 8^2 / 4) = 4.498
    low, high = bench_ppo.welch([1, 2, 3, 4, 5], [0, 4, 8, 12, 16])
    half = bench_ppo.student_t(0.975, 4.498) * 8.5**0.5
    assert (low, high) == pytest.approx((-5 - half, -5 + half), rel=1e-3)
    assert bench_ppo.welch([1.0, 1.0], [1.0, 1.0]) == (0, 0)  # where all succeed always


# Files and tables


ABOUT = {"hardware": "here", "versions": "these", "commit": "c0ffee"}


def write_learned(folder, contender, seed, returns, env_id="Hopper-v5", total=None, **evaluation):
    """A finished run, where bench.py looks for it."""
    one = settings(env_id, contender, seed, total)
    asked = {"env_id": env_id, "contender": contender, "seed": seed, "args": asdict(one)}
    file = bench_results.place(str(folder), "learn", f"{env_id}__{contender}__seed{seed}", asked)
    file.parent.mkdir(exist_ok=True)
    episodes = [[1000 * (i + 1), value, 20] for i, value in enumerate(returns)]
    figures = {"steps": 299_008, "evaluation": {"mean_return": 2.0 * returns[-1], **evaluation}, "episodes": episodes}
    write_json(file, {**asked, "about": ABOUT, **figures})


@pytest.fixture
def learned(tmp_path, monkeypatch):
    """Results of two seeds; training anything would be a mistake."""

    class Nobody:
        def submit(self, *how):
            raise RuntimeError("would be trained")

    monkeypatch.setattr(bench_ppo, "workers", lambda processes: contextlib.nullcontext(Nobody()))
    for seed, ours, theirs in ((1000, 500.0, 300.0), (2000, 700.0, 500.0)):
        write_learned(tmp_path, OURS, seed, [0.0] * 50 + [ours] * 100)  # the first 50 no longer count
        write_learned(tmp_path, SB3, seed, [theirs] * 10)
    return bench_ppo.Ppo(env_id=("Hopper-v5",), learn=True, seeds=2, out=str(tmp_path))


def test_learning_table(learned, capsys):
    pytest.importorskip("matplotlib")
    learned.png = str(Path(learned.out) / "curves.png")
    bench_ppo.bench_ppo(learned)
    lines = capsys.readouterr().out.splitlines()
    names = [f"{who}, {name}" for name in (bench_ppo.LAST_100, "mean_return") for who in (OURS, SB3)]
    assert f"| Hopper-v5, seed | {' | '.join(names)} |" in lines
    assert "| 1000 | 500 | 300 | 1,000 | 600 |" in lines
    assert "| 2000 | 700 | 500 | 1,400 | 1,000 |" in lines
    assert "| mean | 600 | 400 | 1,200 | 800 |" in lines
    half = 4.30265 * 2**0.5 * 100  # t of two degrees of freedom; both standard errors are 100
    row = f"600 (500 to 700) | {SB3} 400 (300 to 500) | +200 ({200 - half:+,.0f} to {200 + half:+,.0f})"
    assert f"| {bench_ppo.LAST_100} after 299,008 steps | Hopper-v5, ours, mean of 2 | {row} |" in lines
    assert lines[-5:] == ["Hardware: here.", "", "Versions: these.", "", "Commit: c0ffee."]
    assert Path(learned.png).stat().st_size > 10_000


def test_runs_with_other_settings_are_run_anew(learned):
    learned.total_timesteps = 400_000
    with pytest.raises(RuntimeError, match="would be trained"):
        bench_ppo.bench_ppo(learned)


def test_the_task_decides_what_counts(tmp_path):
    for contender, success in ((OURS, 1.0), (SB3, 0.75)):
        write_learned(tmp_path, contender, 1000, [5.0], "SO101Paper-v0", success_rate=success, mean_length=40.0)
    rows = bench_ppo.learn_rows(bench_results.finished(str(tmp_path), "learn"))
    assert [row.what.split()[0] for row in rows] == ["success_rate", "mean_return"]
    assert rows[0][2:] == ("1.000", f"{SB3} 0.750", "+0.250")


def test_what_was_measured_is_not_measured_again(tmp_path, capsys):
    asked, count = {"x": 1}, []
    file = bench_results.place(str(tmp_path), "kind", "a/b:c d", asked)
    assert re.fullmatch(r"a_b_c_d__[0-9a-f]{8}\.json", file.name)
    for _ in range(2):
        result = bench_results.measured(file, asked, lambda: count.append(1) or {"y": 2})
    assert (result["x"], result["y"], len(count)) == (1, 2, 1)
    assert result["about"] == bench_results.about()
    assert "measured before" in capsys.readouterr().err
    assert bench_results.place(str(tmp_path), "kind", "a", {"x": 2}) != bench_results.place(
        str(tmp_path), "kind", "a", asked
    )
    assert bench_results.finished(str(tmp_path), "kind") == [result]


def test_speed_rows_compare_medians():
    rates = {OURS: (30, 60, 40), SB3: (10, 20, 90), COMPILED: (80,)}
    results = [
        {"env_id": "Hopper-v5", "rollouts": 30, "contender": who, "cpu": float(x), "wall": float(2 * x + (who == SB3))}
        for who, values in rates.items()
        for x in values
    ]
    rows = bench_ppo.speed_rows(results)
    assert rows[0][1:] == (
        "Hopper-v5, ours, 30 rollouts, median of 3",
        "40.0 (30.0 to 60.0)",
        f"{SB3} 20.0 (10.0 to 90.0)",
        "2.00 (wall clock 1.95)",
    )
    assert rows[1][4] == "4.00 (wall clock 3.90)"
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("x", "sign", "text"),
    [(12345.6, "", "12,346"), (99.94, "", "99.9"), (2.345, "", "2.35"), (0.9876, "", "0.988"), (-0.5, "+", "-0.500")],
)
def test_numbers(x, sign, text):
    assert bench_results.number(x, sign) == text


def test_report_gathers_all_kinds(tmp_path, capsys):
    with pytest.raises(UserError, match="no measurements there"):
        bench.bench_report(bench.Report(out=str(tmp_path)))
    samples = [(x, 100.0) for x in (1.0, 61.0, 62.0)]
    kinds = {
        "memory": {"script": "a", "line": "a.py", "minutes": 30.0, **bench_runs.flatness(samples)},
        "scaling": {"num_envs": 64, "ranks": 0, "rollouts": 5, "repeat": 0, "wall": 5.0},
        "speed": {"env_id": "Hopper-v5", "rollouts": 3, "contender": OURS, "cpu": 5.0, "wall": 5.0},
        "envs": {
            **{"env_id": "E", "env_kwargs": {"k": 1}, "threads": 2, "policy": "zero", "plain": None},
            "sizes": [{"num_envs": 8, "alone": [5.0], "with_policy": [4.0]}],
        },
    }
    for i, (kind, result) in enumerate(kinds.items()):
        (tmp_path / kind).mkdir()
        write_json(tmp_path / kind / "x.json", {**result, "about": {**ABOUT, "commit": f"c{i % 2}"}})
    write_json(tmp_path / "speed" / "y.json", {**kinds["speed"], "contender": SB3, "about": ABOUT})
    write_learned(tmp_path, OURS, 1000, [1.0])
    write_learned(tmp_path, SB3, 1000, [1.0])
    bench.bench_report(bench.Report(out=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| what | where | figure | beside it | ratio or difference |"
    assert "| environment, steps/s (with zero) | E, 8 simulations, 2 threads, k 1 | 5.00 (4.00) |  |  |" in lines
    assert [line.split(",")[0].split(" after")[0] for line in lines[2:-6]] == [
        *("| environment", "| training", f"| {bench_ppo.LAST_100}", "| mean_return", "| training"),
        "| resident memory",
    ]
    assert lines[-1] == "Commit: c0; c0ffee; c1."
    assert all(line.count("|") == 6 for line in lines[:-6])


# Scripts as they run


def test_flatness_by_hand():
    """Twenty settled samples: tenths are of two."""
    settled = [400.0, 404.0, *[500.0] * 8, *[300.0] * 8, 420.0, 424.0]
    samples = [(0.5, 900.0), (59.9, 50.0), *((60.0 + i, x) for i, x in enumerate(settled))]
    expected = {"peak": 900, "low": 300, "high": 500, "last": 424, "first_tenth": 402, "last_tenth": 422}
    assert bench_runs.flatness(samples) == pytest.approx({**expected, "drift": 100 * 20 / 402})
    assert bench_runs.flatness(samples[:3])["drift"] == 0


def test_resident_memory_is_that_of_the_process():
    block = 200 << 20
    code = f"import sys; x = bytearray({block}); x[::4096] = b'1' * len(x[::4096]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 200 < bench_runs.resident(process.pid) < 260
        process.communicate(b"\n")


def test_memory_of_a_training_script(monkeypatch):
    monkeypatch.setattr(bench_runs, "SETTLING", 4.0)
    result = bench_runs.memory("ppo_residual.py --num-steps 32 --minibatch-size 32 --eval-every 0", 7 / 60)
    times, megabytes = np.array(result["samples"]).T
    assert 5 <= len(times) <= 8
    assert 50 < megabytes.max() < 1500
    assert result["peak"] == megabytes.max()


def test_a_script_that_ends_is_no_measurement(monkeypatch):
    with pytest.raises(UserError, match=r"ended with status 2: error: .*--gamma"):
        bench_runs.memory("ppo_residual.py --gamma 7", 1.0)


def test_steady_rate_leaves_start_and_evaluation_out():
    seconds = [100, 102, 104, 106, 108, 500]
    progress = [{"step": str(10 * (i + 1)), "time/sps": str(10 * (i + 1) / s)} for i, s in enumerate(seconds)]
    assert bench_runs.steady_rate(progress) == pytest.approx(5)


def test_ranks_are_started_by_torchrun(monkeypatch):
    """A process that writes such a run stands for the training."""
    lines, rows = [], [{"step": 2048 * (i + 1), "time/sps": 1024.0} for i in range(6)]
    started = bench_runs.started

    def stand_in(arguments, folder):
        lines.append(arguments)
        (Path(folder) / "bench").mkdir()
        lines_of_csv = ["step,time/sps", *(f"{row['step']},{row['time/sps']}" for row in rows)]
        (Path(folder) / "bench" / "progress.csv").write_text("\n".join(lines_of_csv))
        return started(["-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '1'"], folder)

    monkeypatch.setattr(bench_runs, "started", stand_in)
    assert bench_runs.scaling(64, 2, rollouts=2)["wall"] == pytest.approx(1024)
    assert bench_runs.scaling(64, 0, rollouts=2)["wall"] == pytest.approx(1024)
    torchrun, plain = ([word for word in line if "/tmp" not in word or word.endswith(".py")] for line in lines)
    assert torchrun == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *plain]
    assert Path(plain[0]).name == "ppo_grid_socnav.py"
    assert plain[plain.index("--total-timesteps") + 1] == str(6 * 64 * 32)
    assert plain[plain.index("--minibatch-size") + 1] == str(64 * 32 // 8)
    assert plain[plain.index("--threads") + 1] == "1"


def test_a_rank_that_fails_is_no_measurement(monkeypatch):
    """The script's own error is told, not the report with which torchrun follows it."""
    code = "import sys; print('error: too few'); print('====='); sys.exit(3)"
    started = bench_runs.started
    monkeypatch.setattr(bench_runs, "started", lambda arguments, folder: started(["-c", code], folder))
    with pytest.raises(UserError, match=r"on 2 ranks ended with status 3: error: too few$"):
        bench_runs.scaling(64, 2, rollouts=1)


def test_what_was_started_is_stopped(tmp_path):
    code = "import time; time.sleep(60)"
    with contextlib.suppress(KeyboardInterrupt), bench_runs.started(["-c", code], str(tmp_path)) as process:
        raise KeyboardInterrupt
    assert process.returncode == -15


def test_scaling_rows_compare_with_one_plain_process():
    results = [
        {"num_envs": 64, "rollouts": 5, "ranks": ranks, "wall": float(x)}
        for ranks, x in ((0, 10), (0, 30), (0, 20), (1, 18), (2, 36))
    ]
    rows = bench_runs.scaling_rows(results)
    assert [row.figure for row in rows] == ["20.0 (10.0 to 30.0)", "18.0", "36.0"]
    assert [row.ratio for row in rows] == ["", "0.90", "1.80"]


# Environments


def test_the_plain_loop_of_the_lateral_benchmark_drives_as_the_environment_does():
    vec = make_vec("LateralControl-v0", 2, training=False, action_mode="absolute")
    policy = make_scripted_policy("pid", vec)
    obs, _ = vec.reset(seed=0)
    policy.reset(np.arange(2), vec)
    for _ in range(399):
        obs, *_ = vec.step(policy(obs))
    model = onnxruntime.InferenceSession(
        str(lateral.EMBEDDED), bench_envs.single_threaded(), providers=["CPUExecutionProvider"]
    )
    for segment in range(2):
        lat = bench_envs.plain_rollout(model, vec.road, segment)
        np.testing.assert_allclose(lat[100:499], vec.lat[segment, :399], atol=1e-9)
    assert len(lat) == 600


def test_the_plain_loop_of_the_ballbot_benchmark_sees_what_the_environment_shows():
    vec, seen = make_vec("Ballbot-v0", 1, training=False), []

    def policy(obs):
        seen.append(obs[0].copy())
        return np.array([[0.3, -0.2, 0.1]], np.float32)

    vec.reset(seed=0)
    bench_envs.plain_ballbot(vec, vec.models[0], policy, 0.1)
    twin = make_vec("Ballbot-v0", 1, training=False)
    obs, _ = twin.reset(seed=0)
    for plain in seen[:100]:
        np.testing.assert_allclose(plain[:15], obs[0, :15], atol=1e-6)
        obs, *_ = twin.step(np.array([[0.3, -0.2, 0.1]], np.float32))


def test_the_plain_loop_of_the_arm_benchmark_sees_what_the_environment_shows():
    """A whole episode of the base policy, and the start of the next."""
    vec = make_vec("SO101Paper-v0", 1)
    vec.reset(seed=3)
    base, seen = make_scripted_policy("ik", vec), []

    class Enough(Exception):  # noqa: N818
        pass

    def policy(obs):
        seen.append(obs[0].copy())
        if len(seen) > 1 and np.array_equal(seen[0], seen[-1]):
            raise Enough
        return base(obs)

    twin = make_vec("SO101Paper-v0", 1)
    obs, _ = twin.reset(seed=3)
    with pytest.raises(Enough):
        bench_envs.plain_so101(vec, policy, 60.0)
    for plain in seen[:-1]:
        np.testing.assert_allclose(plain, obs[0], atol=1e-4)
        obs, _, terminated, truncated, _ = twin.step(base(obs))
    assert terminated[0] | truncated[0]


@pytest.mark.parametrize(
    ("env_id", "policy", "unit"),
    [("Ballbot-v0", "pid", "steps/s"), ("SO101Paper-v0", "ik", "steps/s"), ("LateralControl-v0", "zero", "segments/s")],
)
def test_environments_are_measured_beside_the_plain_loop(env_id, policy, unit, tmp_path, capsys):
    args = bench_envs.Envs(
        env_id=f"envs:{env_id}", policy=policy, num_envs=(2, 4), seconds=0.05, repeats=1, out=str(tmp_path)
    )
    bench_envs.bench_envs(args)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [row[1].split(",")[1] for row in rows[:2]] == [" 2 simulations", " 4 simulations"]
    assert rows[2][0] == f"environment, {unit}"
    assert "plain loop over one" in rows[2][3]
    ours, theirs = (float(row.split()[-1].replace(",", "")) for row in rows[2][2:4])
    assert float(rows[2][4]) == pytest.approx(ours / theirs, rel=0.05)
    (result,) = bench_results.finished(str(tmp_path), "envs")
    assert (result["env_id"], result["policy"], result["repeats"]) == (env_id, policy, 1)
    assert result["plain"]["ours"] != result["plain"]["theirs"]


# Mistakes


@pytest.mark.parametrize(
    "changes", [{"repeats": 0}, {"seconds": 0.0}, {"num_envs": (8, 0)}, {"env_kwargs": {"training": False}}]
)
def test_environments_that_cannot_be_measured(changes):
    with pytest.raises(UserError, match=r"must be at least|training is not for --env-kwargs"):
        bench_envs.bench_envs(bench_envs.Envs(**changes))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Nope-v0"])
def test_environments_that_cannot_be_learned_here(env_id):
    with pytest.raises(UserError, match=r"Box of floats|bundled environments"):
        bench_ppo.bench_ppo(bench_ppo.Ppo(env_id=(env_id,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 4}, "--seeds works only with --learn"),
        ({"learn": True, "rollouts": 2}, "--rollouts works only without --learn"),
        ({"rollouts": 0}, "--rollouts must be at least 1, not 0"),
        ({"learn": True, "seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"learn": True, "total_timesteps": 100}, "--total-timesteps must be at least one rollout, 2048 steps"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        bench_ppo.bench_ppo(bench_ppo.Ppo(**changes))


def test_memory_and_scaling_that_cannot_be_measured():
    for args, message in (
        (bench_runs.Memory(scripts=("ppo",)), "--scripts ppo: choose ppo_residual, ppo_continuous"),
        (bench_runs.Memory(minutes=1.0), "--minutes must be more than 1"),
        (bench_runs.Scaling(num_envs=(65,)), "--num-envs 65 cannot be shared out over 2 ranks"),
        (bench_runs.Scaling(ranks=(0,)), "must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            (bench_runs.bench_memory if isinstance(args, bench_runs.Memory) else bench_runs.bench_scaling)(args)


@pytest.mark.slow
def test_speed_and_learning_from_the_command_line(tmp_path):
    def out_of(*flags):
        line = [sys.executable, str(BENCH), *flags, "--out", str(tmp_path)]
        return subprocess.run(line, check=True, capture_output=True, text=True)

    out_of("ppo", "--env-id", "Pendulum-v1", "--repeats", "3", "--rollouts", "2")
    results = bench_results.finished(str(tmp_path), "speed")
    cpu = {who: np.median([result["cpu"] for result in results if result["contender"] == who]) for who in (OURS, SB3)}
    assert len(results) == 9
    assert cpu[OURS] > cpu[SB3]
    learn = ("ppo", "--env-id", "Pendulum-v1", "--learn", "--total-timesteps", "4096", "--processes", "2")
    first = out_of(*learn)
    (file,) = (tmp_path / "learn").glob("Pendulum-v1__ours__seed2000__*.json")
    file.unlink()
    again = out_of(*learn)
    assert len(first.stderr.split("/6: ")) == 7
    assert "1/1: " in again.stderr
    assert again.stdout == first.stdout
    assert len(json.loads(file.read_text())["episodes"]) == 16
    report = out_of("report").stdout.splitlines()
    assert set(first.stdout.splitlines()[-9:]) <= set(report)
