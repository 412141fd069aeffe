"""tools/ablate.py: what its file may say, the table, and an ablation from end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import ablate

from envs.files import UserError, lock

ROOT = Path(__file__).parents[1]
ABLATION = """
script = "ppo_continuous"
seeds = [1, 2]
eval_episodes = 3

[args]
env_id = "Pendulum-v1"
total_timesteps = 128
num_envs = 2
num_steps = 64
minibatch_size = 64
eval_episodes = 1

[variants]
"as it comes" = {}
"narrow & fast" = { learning_rate = 1e-2, hidden_sizes = [8] }
"""


def write(folder, text=ABLATION):
    (folder / "pendulum.toml").write_text(text)
    return str(folder / "pendulum.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"ppo_continuous"', '"bc_pretrain"', "script cannot be 'bc_pretrain'"),
        ('script = "ppo_continuous"', "", "script is missing"),
        ("seeds =", "seed =", "unknown 'seed'; there are script, variants, seeds"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds must be one or more, and all different"),
        ("seeds = [1, 2]", "seeds = []", "seeds must be one or more, and all different"),
        ("eval_episodes = 3", "eval_episodes = 0", "eval_episodes must be at least 1, not 0"),
        ('"as it comes" = {}', "", "variants must be two or more"),
        ('"as it comes"', '"narrow + fast"', "two variants would share their directories"),
        ('"as it comes" = {}', '"as it comes" = 1', "variants cannot be"),
        ("learning_rate", "learning_speed", "learning_speed is no setting of ppo_continuous"),
        ("learning_rate = 1e-2", "seed = 2", "seed is no setting of ppo_continuous for a variant"),
        ("learning_rate = 1e-2", 'resume = "runs/x"', "resume is no setting of ppo_continuous for a variant"),
        ("[8]", '["8"]', r"hidden_sizes cannot be \['8'\]"),
        ("minibatch_size = 64", "env_kwargs = 3", "env_kwargs cannot be 3"),
        ("[variants]", "[variants", "not TOML"),
    ],
)
def test_what_an_ablation_may_not_say(tmp_path, old, new, message):
    assert old in ABLATION
    with pytest.raises(UserError, match=message):
        ablate.load_ablation(write(tmp_path, ABLATION.replace(old, new)))


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "ablations").glob("*.toml")), ids=lambda path: path.stem)
def test_the_ablations_of_the_project_say_what_can_be_done(path):
    ablation = ablate.load_ablation(str(path))
    assert next(iter(ablation.variants.values())) == {}
    assert len(ablation.seeds) >= 3


def test_arguments_of_the_environment_add_to_those_there_already(tmp_path):
    text = ABLATION.replace("num_envs = 2", 'num_envs = 2\nenv_kwargs = { g = 9.8, render_mode = "rgb_array" }')
    ablation = ablate.load_ablation(write(tmp_path, text + '"heavy" = { num_envs = 4, env_kwargs = { g = 20.0 } }\n'))
    settings = ablate.settings_of(ablation, ablation.variants["heavy"])
    assert settings == {**ablation.args, "num_envs": 4, "env_kwargs": {"g": 20.0, "render_mode": "rgb_array"}}
    assert ablate.settings_of(ablation, {}) == ablation.args


def played(*success, base=None):
    result = {
        "success_rate": float(np.mean(success)),
        "mean_return": 0.0,
        "per_episode": [{"success": bool(x), "return": 0.0} for x in success],
    }
    return result if base is None else {**result, "base": {"success_rate": base, "mean_return": 0.0}}


def test_a_difference_is_of_the_same_episodes_and_its_interval_of_the_seeds():
    """Gains .5, .25 and 0 of three seeds: their standard deviation is .25, and t of 2 degrees of freedom 4.3027."""
    reference = [played(1, 0, 0, 0), played(1, 1, 0, 0), played(1, 1, 1, 0)]
    ours = [played(1, 1, 1, 0), played(1, 0, 1, 1), played(0, 1, 1, 1)]
    middle, half = ablate.difference(ours, reference)
    assert middle == pytest.approx(0.25)
    assert half == pytest.approx(4.3027 * 0.25 / np.sqrt(3), rel=1e-4)
    assert ablate.difference(ours[:1], reference[:1]) == (0.5, np.inf)


def test_the_table():
    ablation = ablate.Ablation(script="ppo_residual", variants={"a": {}, "b": {}}, seeds=(1, 2))
    tests = {
        "a": [played(1, 0, base=0.5), played(1, 0, base=0.0)],
        "b": [played(1, 1, base=0.5), played(1, 1, base=0.25)],
    }
    assert ablate.report(ablation, tests).splitlines() == [
        "| settings | success, seed 1 | 2 | mean | base alone | difference, 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 0.500 | 0.500 | 0.500 | 0.250 |  |",
        "| b | 1.000 | 1.000 | 1.000 | 0.375 | +0.500 (+0.500 to +0.500) |",
    ]


def test_an_ablation_from_end_to_end(tmp_path, capfd):
    """All runs of all variants, each evaluated; what is there is not made again, and never of other settings."""
    args = ablate.Args(write(tmp_path), jobs=2, run_root=str(tmp_path / "runs"))
    table = ablate.ablate(args)
    folder = tmp_path / "runs" / "ablations" / "pendulum"
    assert table == (folder / "summary.md").read_text()
    names = [f"{variant}__seed{seed}" for variant in ("as_it_comes", "narrow_fast") for seed in (1, 2)]
    assert sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) == names
    for name in names:
        config = json.loads((folder / name / "config.json").read_text())["args"]
        assert (config["seed"], config["num_envs"]) == (int(name[-1]), 2)
        assert config["hidden_sizes"] == ([8] if "narrow" in name else [64, 64])
        test = json.loads((folder / name / "test.json").read_text())
        assert (test["seed"], test["episodes"], len(test["per_episode"])) == (900_000 + config["seed"], 3, 3)
        assert f"{test['mean_return']:.4g}" in table

    capfd.readouterr()
    stamps = {name: (folder / name / "summary.json").stat().st_mtime_ns for name in names}
    (folder / names[0] / "test.json").unlink()
    unfinished = folder / names[1] / "summary.json"
    unfinished.write_text(json.dumps({**json.loads(unfinished.read_text()), "status": "interrupted"}))
    assert ablate.ablate(args) == table
    again = capfd.readouterr().err
    assert again.count("trained") == 1
    assert again.count("evaluated") == 2
    for name in names:
        assert ((folder / name / "summary.json").stat().st_mtime_ns == stamps[name]) == (name != names[1])

    with pytest.raises(UserError, match=r"narrow_fast__seed1: is of other settings"):
        ablate.ablate(ablate.Args(write(tmp_path, ABLATION.replace("1e-2", "1e-3")), run_root=args.run_root))
    with pytest.raises(UserError, match=r"test\.json: is of other episodes"):
        ablate.ablate(ablate.Args(write(tmp_path, ABLATION.replace("= 3", "= 4")), run_root=args.run_root))


def test_a_script_that_refuses_its_settings_ends_the_ablation(tmp_path):
    path = write(tmp_path, ABLATION.replace("minibatch_size = 64", "minibatch_size = 100"))
    with pytest.raises(UserError, match=r"--minibatch-size must be .* not 100"):
        ablate.ablate(ablate.Args(path, run_root=str(tmp_path / "runs")))
    held = lock(tmp_path / "runs" / "ablations" / "pendulum" / ".lock", "busy")
    with held, pytest.raises(UserError, match="another process trains there"):
        ablate.ablate(ablate.Args(path, run_root=str(tmp_path / "runs")))
    with pytest.raises(UserError, match="--jobs must be at least 1, not 0"):
        ablate.ablate(ablate.Args(path, jobs=0, run_root=str(tmp_path / "runs")))
