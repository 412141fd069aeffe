"""tools/bench.py: both sides train with the same settings, are measured alike, and the statistics are right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import envs
import ppo_continuous
from envs import lateral, rollout, run
from envs.batch_env import GymVec

sb3 = pytest.importorskip("stable_baselines3")
BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench.py"
sys.path.insert(0, str(BENCH.parent))
import bench  # noqa: E402

OTHER = {  # every setting another than SETTINGS has
    "num_envs": 2, "num_steps": 24, "minibatch_size": 12, "update_epochs": 3, "learning_rate": 1e-3, "gamma": 0.9,
    "gae_lambda": 0.8, "clip_coef": 0.3, "clip_value": False, "ent_coef": 0.1, "vf_coef": 0.7, "max_grad_norm": 0.6,
    "target_kl": 0.4, "norm_obs": False, "norm_reward": False, "norm_adv": False, "init_log_std": -1.0,
    "hidden_sizes": (8, 9),
}  # fmt: skip


class Stop(Exception):  # noqa: N818
    pass


def sb3_model(monkeypatch, settings):
    """The model that bench.py makes of these settings."""
    made = []

    def learn(self, *args, **kwargs):
        made.append(self)
        raise Stop

    monkeypatch.setattr(sb3.PPO, "learn", learn)
    with pytest.raises(Stop):
        bench.train_sb3(ppo_continuous.Args(env_id="Pendulum-v1", total_timesteps=100, **settings))
    return made[0]


def sb3_settings(model):
    """What Stable-Baselines3 really uses, under our names."""
    policy, vec = model.policy, model.get_vec_normalize_env()
    optimizer = policy.optimizer.param_groups[0]
    assert model.device.type == "cpu"
    assert (optimizer["eps"], optimizer["betas"]) == (1e-5, (0.9, 0.999))
    assert vec.gamma == model.gamma
    assert (vec.clip_obs, vec.clip_reward, vec.epsilon) == (10, 10, 1e-8)
    assert {model.lr_schedule(1.0), model.lr_schedule(0.1)} == {optimizer["lr"]}  # not annealed
    value_clip = None if model.clip_range_vf is None else model.clip_range_vf(1.0)
    assert value_clip in (None, model.clip_range(1.0))
    widths = [
        tuple(layer.out_features for layer in net if hasattr(layer, "out_features"))
        for net in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net)
    ]
    assert widths[0] == widths[1]
    return {
        "num_envs": model.n_envs, "num_steps": model.n_steps, "minibatch_size": model.batch_size,
        "update_epochs": model.n_epochs, "learning_rate": optimizer["lr"], "anneal_lr": False,
        "weight_decay": optimizer["weight_decay"], "gamma": model.gamma, "gae_lambda": model.gae_lambda,
        "clip_coef": model.clip_range(1.0), "clip_value": value_clip is not None, "ent_coef": model.ent_coef,
        "vf_coef": model.vf_coef, "max_grad_norm": model.max_grad_norm, "target_kl": model.target_kl,
        "norm_obs": vec.norm_obs, "norm_reward": vec.norm_reward, "norm_adv": model.normalize_advantage,
        "init_log_std": policy.log_std[0].item(), "hidden_sizes": widths[0],
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["as benchmarked", "all others"])
def test_stable_baselines_gets_the_same_settings(monkeypatch, changes):
    settings = {**bench.SETTINGS, **changes}
    assert sb3_settings(sb3_model(monkeypatch, settings)) == settings
    fixed = {"anneal_lr", "weight_decay"}  # what SB3's PPO does not vary
    assert {name for name in settings if settings[name] != bench.SETTINGS[name]} == set(changes)
    assert not changes or set(changes) | fixed == set(bench.SETTINGS)


@pytest.mark.parametrize("contender", [bench.OURS, bench.SB3])
def test_both_sides_are_measured_alike(contender, monkeypatch):
    """Pendulum: episodes of 200 steps, each step costs up to 16.3, so a normalised return would show."""
    monkeypatch.setattr(run, "export_onnx", lambda agent, obs_dim, path, *about: path.write_bytes(b"onnx"))
    monkeypatch.setattr(bench, "SETTINGS", {**bench.SETTINGS, "update_epochs": 1})
    result = bench.train(contender, "Pendulum-v1", seed=3, total=2 * bench.BATCH)
    cpu, wall = np.array(result["marks"]).T
    assert len(cpu) == 2
    assert 0 < cpu[1] - cpu[0] < 1.5 * (wall[1] - wall[0])
    steps, returns, lengths = np.array(result["episodes"]).T
    assert steps.tolist() == [1600.0] * 8 + [3200.0] * 8
    assert (lengths == 200).all()
    assert -16.3 * 200 < returns.min() < returns.max() < -500
    assert -16.3 * 200 < result["evaluation"] < -100


def test_evaluation_starts_from_the_same_states(monkeypatch):
    """A policy that does nothing scores the same on both sides."""
    args = ppo_continuous.Args(env_id="Pendulum-v1", total_timesteps=bench.BATCH, **bench.SETTINGS)
    monkeypatch.setattr(sb3.PPO, "learn", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(sb3.PPO, "predict", lambda self, obs, deterministic: (np.zeros((len(obs), 1)), None))
    results = rollout.rollout(rollout.Zero(1), GymVec("Pendulum-v1", 5, "validation"), episodes=10, seed=1)
    expected = np.mean([result["return"] for result in results])
    assert bench.train_sb3(args)["evaluation"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),  # R: qt(p, df)
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 9, 2.26216), (0.95, 18, 1.73406), (0.975, 1e4, 1.96020)],
)
def test_student_t(p, freedom, expected):
    assert bench.student_t(p, freedom) == pytest.approx(expected, rel=2e-4)


def test_welch_by_hand():
    # means 3 and 8, variances of the means 2.5 / 5 and 40 / 5, freedom 8.5^2 / (0.5^2 / 4 + 8^2 / 4) = 4.498
    low, high = bench.welch([1, 2, 3, 4, 5], [0, 4, 8, 12, 16])
    half = bench.student_t(0.975, 4.498) * 8.5**0.5
    assert (low, high) == pytest.approx((-5 - half, -5 + half), rel=1e-3)


def write_result(folder, contender, seed, returns, total=300_000):
    name = f"Hopper-v5__{'sb3' if contender == bench.SB3 else 'ours'}__seed{seed}.json"
    episodes = [[1000 * (i + 1), value, 20] for i, value in enumerate(returns)]
    asked = {"contender": contender, "env_id": "Hopper-v5", "seed": seed, "total_timesteps": total, "about": "here"}
    run.write_json(folder / name, {**asked, "episodes": episodes, "evaluation": 2.0 * returns[-1]})


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Results of two seeds; training anything would be a mistake."""
    monkeypatch.setattr(bench, "learn_one", None)
    for seed, ours, theirs in ((1000, 500.0, 300.0), (2000, 700.0, 500.0)):
        write_result(tmp_path, bench.OURS, seed, [0.0] * 50 + [ours] * 100)  # the first 50 no longer count
        write_result(tmp_path, bench.SB3, seed, [theirs] * 10)
    return bench.Ppo(env_id=("Hopper-v5",), learn=True, seeds=2, out=str(tmp_path))


def test_learning_table(finished, capsys):
    pytest.importorskip("matplotlib")
    finished.png = str(Path(finished.out) / "curves.png")
    bench.bench_ppo(finished)
    lines = capsys.readouterr().out.splitlines()
    assert "| 1000 | 500 | 300 | 1,000 | 600 |" in lines
    assert "| 2000 | 700 | 500 | 1,400 | 1,000 |" in lines
    assert "| mean | 600 | 400 | 1,200 | 800 |" in lines
    half = 4.30265 * 2**0.5 * 100  # t of two degrees of freedom; both standard errors are 100
    interval = f"{200 - half:+,.0f} to {200 + half:+,.0f}"
    assert any(line.startswith(f"last 100 episodes: ours minus SB3 +200, 95 % interval {interval}") for line in lines)
    assert "trained with here" in lines
    assert Path(finished.png).stat().st_size > 10_000


def test_results_of_another_length_are_refused(finished):
    finished.total_timesteps = 400_000
    with pytest.raises(run.UserError, match=r"has 300,000 steps; give another --out"):
        bench.bench_ppo(finished)


def test_the_plain_loop_of_the_lateral_benchmark_drives_as_the_environment_does():
    vec = envs.make_vec("LateralControl-v0", 2, training=False, action_mode="absolute")
    policy = rollout.scripted("pid", vec)
    obs, _ = vec.reset(seed=0)
    policy.reset(np.arange(2), vec)
    for _ in range(399):
        obs, *_ = vec.step(policy(obs))
    model = onnxruntime.InferenceSession(
        str(lateral.EMBEDDED), bench.single_threaded(), providers=["CPUExecutionProvider"]
    )
    for segment in range(2):
        lat = bench.plain_rollout(model, vec.road, segment)
        np.testing.assert_allclose(lat[100:499], vec.lat[segment, :399], atol=1e-9)
    assert len(lat) == 600


def test_the_plain_loop_of_the_ballbot_benchmark_sees_what_the_environment_shows():
    vec, seen = envs.make_vec("Ballbot-v0", 1, training=False), []

    def policy(obs):
        seen.append(obs[0].copy())
        return np.array([[0.3, -0.2, 0.1]], np.float32)

    vec.reset(seed=0)
    bench.plain_ballbot(vec, vec.models[0], policy, 0.1)
    twin = envs.make_vec("Ballbot-v0", 1, training=False)
    obs, _ = twin.reset(seed=0)
    for plain in seen[:100]:
        np.testing.assert_allclose(plain[:15], obs[0, :15], atol=1e-6)
        obs, *_ = twin.step(np.array([[0.3, -0.2, 0.1]], np.float32))


def test_ballbots_are_measured_beside_the_plain_loop(capsys):
    bench.bench_envs(bench.Envs(env_id="Ballbot-v0", policy="pid", num_envs=(2, 4), seconds=0.05, repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| simulations", "|---|---|---|", "| 2", "| 4"]
    found = re.fullmatch(
        r"steps/s: 4 robots ([\d,]+), one robot in a plain loop with RK4 ([\d,]+): ([\d.]+) times as many", lines[-1]
    )
    ours, theirs, ratio = (float(x.replace(",", "")) for x in found.groups())
    assert ratio == pytest.approx(ours / theirs, abs=0.06)


@pytest.mark.parametrize(
    "changes", [{"repeats": 0}, {"seconds": 0.0}, {"num_envs": (8, 0)}, {"env_kwargs": {"training": False}}]
)
def test_environments_that_cannot_be_measured(changes):
    with pytest.raises(run.UserError, match=r"must be at least|training is not for --env-kwargs"):
        bench.bench_envs(bench.Envs(**changes))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Nope-v0"])
def test_environments_that_cannot_be_learned_here(env_id):
    with pytest.raises(run.UserError, match=r"flat, bounded Box|unknown environment"):
        bench.bench_ppo(bench.Ppo(env_id=(env_id,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 3}, "--seeds works only with --learn"),
        ({"learn": True, "steps": 4096}, "--steps works only without --learn"),
        ({"steps": 100}, "--steps must be at least 2048, not 100"),
        ({"learn": True, "seeds": 1}, "--seeds must be at least 2, not 1"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(run.UserError, match=message):
        bench.bench_ppo(bench.Ppo(**changes))


@pytest.mark.slow
def test_speed_and_learning_from_the_command_line(tmp_path):
    def out_of(*flags):
        line = [sys.executable, str(BENCH), "ppo", "--env-id", "Pendulum-v1", *flags]
        return subprocess.run(line, check=True, capture_output=True, text=True)

    rows = [line.split(" | ") for line in out_of("--repeats", "3", "--steps", "4096").stdout.splitlines()[2:5]]
    assert [row[1] for row in rows] == [bench.SB3, bench.OURS, bench.COMPILED]
    assert float(rows[0][-1].strip(" |")) == 1
    assert float(rows[1][-1].strip(" |")) > 1
    assert float(rows[2][-1].strip(" |")) > 1.5
    learn = ("--learn", "--seeds", "2", "--total-timesteps", "4096", "--processes", "2", "--out", str(tmp_path))
    first = out_of(*learn)
    (tmp_path / "Pendulum-v1__ours__seed2000.json").unlink()
    again = out_of(*learn)
    assert len(first.stderr.split("/4: ")) == 5
    assert "1/1: " in again.stderr
    assert again.stdout == first.stdout
    assert len(json.loads((tmp_path / "Pendulum-v1__sb3__seed1000.json").read_text())["episodes"]) == 16
