"""The settings: their help texts, their ranges, and the order in which preset, file and flags override one another."""

import dataclasses
import importlib
import json
import re

import pytest

import ppo_continuous
import ppo_residual as ppo
from envs import UserError, cli, run

PPO = ["ppo_continuous", "ppo_residual", "ppo_grid_socnav"]
COMMON = [
    "seed", "total_timesteps", "num_envs", "num_steps", "minibatch_size", "update_epochs", "learning_rate",
    "anneal_lr", "gamma", "gae_lambda", "clip_coef", "clip_vloss", "ent_coef", "vf_coef", "max_grad_norm",
    "target_kl", "norm_reward", "norm_adv", "init_log_std", "final_log_std", "hidden_sizes", "weight_decay",
    "critic_warmup_updates", "device", "threads", "compile", "deterministic", "eval_every", "eval_episodes",
    "eval_seed", "checkpoint_every", "best_metric", "stop_at_convergence", "preset", "config", "resume", "pretrained",
    "run_root", "run_name", "track", "capture_video", "dry_run", "env_id", "env_kwargs", "eval_env_kwargs",
]  # fmt: skip


def args_class(script):
    return importlib.import_module(script).Args


def parse(*argv, script="ppo_residual"):
    return cli.parse(args_class(script), list(argv))


def help_text(capsys, *argv, script="ppo_residual"):
    with pytest.raises(SystemExit) as end:
        parse(*argv, "--help", script=script)
    assert end.value.code == 0
    return re.sub(r"[│\s]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))


@pytest.mark.parametrize("script", PPO)
def test_help_explains_every_setting(script, capsys):
    """Each flag with a text, which tyro takes from the comment on its line, before the default."""
    text = help_text(capsys, script=script)
    names = [field.name for field in dataclasses.fields(args_class(script))]
    assert set(COMMON) <= set(names)
    for name in names:
        flag = run.flag(name)
        explained = re.search(rf"{flag}(?:, --no-[\w-]+)? (?!, )(.*?)\((default|required|optional)", text)
        assert explained, name
        words = re.findall(r"[a-z]{2,}", explained[1].replace("INT", ""))
        assert len(words) >= 2, (name, explained[1])


@pytest.mark.parametrize("script", PPO)
def test_defaults_and_presets_can_train(script):
    """Presets name existing settings, and their values pass the checks."""
    module = importlib.import_module(script)
    for name in (None, *module.PRESETS):
        args = module.Args.from_preset(name)
        if args.num_envs == "auto":
            args = dataclasses.replace(args, num_envs=256)
        run.setup(args)
        batch = args.num_envs * args.num_steps
        assert (args.total_timesteps >= batch, batch % args.minibatch_size) == (True, 0)


# Order of precedence


@pytest.fixture
def presets(monkeypatch):
    rows = {
        "Hopper-v5": {"learning_rate": 0.0125, "num_envs": 4},
        "LateralControl-v0": {"gamma": 0.75},
        "named": {"gamma": 0.5, "env_kwargs": {"a": 1, "b": 2}},
    }
    monkeypatch.setattr(ppo_continuous.Args, "presets", rows)


def test_the_preset_follows_the_environment_and_a_flag_wins(presets):
    script = "ppo_continuous"
    fresh = ppo_continuous.Args
    assert parse(script=script) == fresh.from_preset() == fresh(gamma=0.75)
    args = parse("--env-id", "Hopper-v5", "--num-envs", "2", script=script)
    assert args == fresh.from_preset(env_id="Hopper-v5", num_envs=2)
    assert args == fresh(env_id="Hopper-v5", learning_rate=0.0125, num_envs=2)
    assert parse("--env-id", "Walker2d-v5", script=script) == fresh(env_id="Walker2d-v5")
    args = parse("--learning-rate", "3e-4", "--env-id=Hopper-v5", script=script)  # also one that repeats the default
    assert (args.learning_rate, args.num_envs) == (3e-4, 4)


def test_preset_replaces_the_one_of_the_environment(presets):
    script = "ppo_continuous"
    args = parse("--preset", "named", "--env-id", "Hopper-v5", "--env-kwargs", "b", "3", script=script)
    assert args == ppo_continuous.Args(preset="named", env_id="Hopper-v5", gamma=0.5, env_kwargs={"a": 1, "b": 3})
    assert dataclasses.replace(args, preset=None) == ppo_continuous.Args.from_preset(
        "named", env_id="Hopper-v5", env_kwargs={"a": 1, "b": 3}
    )
    assert parse("--preset", "named", "--gamma", "0.25", script=script).gamma == 0.25
    with pytest.raises(UserError, match=r"unknown preset 'nemed'; choose from Hopper-v5, LateralControl-v0, named"):
        parse("--preset", "nemed", script=script)


def test_a_flag_wins_over_the_config_and_the_config_over_the_preset(tmp_path, presets):
    file, script = tmp_path / "config.json", "ppo_continuous"
    file.write_text(json.dumps({"learning_rate": 0.25, "gamma": 0.5, "hidden_sizes": [8, 8], "env_id": "Hopper-v5"}))
    args = parse("--config", str(file), "--gamma", "0.875", script=script)
    assert (args.learning_rate, args.gamma, args.hidden_sizes, args.num_envs) == (0.25, 0.875, (8, 8), 4)
    assert args.clip_coef == ppo_continuous.Args().clip_coef
    args = parse("--config", str(file), "--env-id", "LateralControl-v0", script=script)  # whose preset applies then
    assert (args.env_id, args.learning_rate, args.num_envs) == ("LateralControl-v0", 0.25, 8)
    args = parse("--config", str(file), "--preset", "named", script=script)
    assert (args.gamma, args.num_envs, args.env_kwargs) == (0.5, 8, {"a": 1, "b": 2})


def test_the_config_of_a_run_gives_its_settings_but_not_its_place(tmp_path):
    file = tmp_path / "config.json"
    settings = {
        "learning_rate": 0.25, "hidden_sizes": (8, 9), "target_kl": 0.02, "seed": 9, "total_timesteps": 5000,
        "env_kwargs": {"frame_margin": 0.03, "randomize": False, "gains": (1.0, 2.0)},
        "stop_at_convergence": {"success_rate": 0.9},
    }  # fmt: skip
    place = {"run_root": "elsewhere", "run_name": "old", "resume": "x", "dry_run": True, "track": True}
    file.write_text(json.dumps({"script": "ppo_residual", "args": dataclasses.asdict(ppo.Args(**settings, **place))}))
    args = dataclasses.replace(parse("--config", str(file)), config=None)
    assert args == ppo.Args(**settings)


def test_a_toml_config(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 3\nhidden_sizes = [8, 9]\n[env_kwargs]\nframe_margin = 0.03\n")
    args = parse("--config", str(tmp_path / "a.toml"))
    assert (args.seed, args.hidden_sizes, args.env_kwargs) == (3, (8, 9), {"frame_margin": 0.03})
    (tmp_path / "a.toml").write_text("seed: 3")
    with pytest.raises(UserError, match=r"a\.toml: cannot be read as a TOML object"):
        parse("--config", str(tmp_path / "a.toml"))


def test_help_shows_the_values_in_force(capsys, tmp_path, presets):
    script = "ppo_continuous"
    assert "default: 0.0125" not in help_text(capsys, script=script)
    assert "default: 0.0125" in help_text(capsys, "--env-id", "Hopper-v5", script=script)
    assert "default: 0.5)" in help_text(capsys, "--preset", "named", script=script)
    assert "default: a 1 b 2)" in help_text(capsys, "--preset", "named", script=script)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"learning_rate": 0.0625}))
    assert "default: 0.0625" in help_text(capsys, "--config", str(file), script=script)


# Values


@pytest.mark.parametrize(
    ("text", "steps"), [("1e6", 10**6), ("5000", 5000), ("1.5e3", 1500), ("12345678901", 12345678901)]
)
def test_number_of_steps(text, steps):
    total = parse("--total-timesteps", text).total_timesteps
    assert (total, type(total)) == (steps, int)


def test_arguments_of_the_environment_are_typed_and_add_to_those_that_are_there(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"env_kwargs": {"action_mode": "absolute", "data_path": "a"}}))
    line = ("--config", str(config), "--env-kwargs", "data_path", "b", "model_path", "c")
    args = parse(*line, script="ppo_continuous")
    assert args.env_kwargs == {"action_mode": "absolute", "data_path": "b", "model_path": "c"}
    assert parse(*line[:2], script="ppo_continuous").env_kwargs == {"action_mode": "absolute", "data_path": "a"}
    line = ["--env-kwargs", "a", "2", "b", "0.5", "c", "False", "d", "x.onnx", "gains", "(1.0, 2.0)", "e", "[1, -2]"]
    args = parse("--env-id", "Pendulum-v1", *line, script="ppo_continuous")
    assert args.env_kwargs == {"a": 2, "b": 0.5, "c": False, "d": "x.onnx", "gains": (1.0, 2.0), "e": (1, -2)}
    assert [type(x) for x in args.env_kwargs.values()] == [int, float, bool, str, tuple, tuple]
    args = parse("--stop-at-convergence", "success_rate", "0.9", "failure_rate", "0.05")
    assert args.stop_at_convergence == {"success_rate": 0.9, "failure_rate": 0.05}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_envs": 0}, "--num-envs must be from 1 to "),
        ({"num_steps": 0}, "--num-steps must be from 1 to "),
        ({"threads": 0}, "--threads must be from 1 to "),
        ({"minibatch_size": 1}, "--minibatch-size must be at least 2 and divide num_envs"),
        ({"minibatch_size": 100}, "--minibatch-size must be at least 2 and divide num_envs"),
        ({"total_timesteps": 31}, "--total-timesteps must be at least one rollout, "),
        ({"gamma": 1.5}, "--gamma must be from 0 to 1, not 1.5"),
        ({"gae_lambda": NAN}, "--gae-lambda must be from 0 to 1, not nan"),
        ({"learning_rate": 0.0}, "--learning-rate must be from 1e-12 to 1e+09, not 0.0"),
        ({"learning_rate": INF}, "--learning-rate .* not inf"),
        ({"clip_coef": 0.0}, "--clip-coef"),
        ({"ent_coef": NAN}, "--ent-coef"),
        ({"init_log_std": NAN}, "--init-log-std"),
        ({"final_log_std": NAN}, "--final-log-std"),
        ({"target_kl": -0.1}, "--target-kl"),
        ({"hidden_sizes": (64, 0)}, "--hidden-sizes must be from 1 to 16384, not 0"),
        ({"eval_every": -1}, "--eval-every must be from 0 to inf, not -1"),
        ({"eval_episodes": -1}, "--eval-episodes"),
        ({"seed": 2**32}, "--seed"),
        ({"critic_warmup_updates": -1}, "--critic-warmup-updates"),
        ({"env_kwargs": {"split": "test"}}, "--env-kwargs split: the script sets it"),
        ({"eval_env_kwargs": {"training": True}}, "--env-kwargs training: the script sets it"),
        ({"env_kwargs": {"action_repeat": 0}}, "--env-kwargs action_repeat must be a whole number from 1"),
        ({"stop_at_convergence": {}}, "--stop-at-convergence needs METRIC THRESHOLD pairs"),
    ],
)
@pytest.mark.parametrize("script", PPO)
def test_values_that_cannot_work_are_refused_by_name(script, change, message):
    sizes = {"num_envs": 8, "num_steps": 256, "minibatch_size": 64}
    with pytest.raises(UserError, match=re.compile(message.replace("+", "\\+"))):
        run.setup(args_class(script)(**sizes | change))


def test_settings_of_one_script_that_cannot_work_are_refused_by_name():
    for args in ({"norm_obs": True}, {"norm_obs": False, "pretrained": "runs/clone"}):
        with pytest.raises(UserError, match="--freeze-obs-stats needs --norm-obs and --pretrained"):
            run.setup(ppo.Args(freeze_obs_stats=True, **args))
