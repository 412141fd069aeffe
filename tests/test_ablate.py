"""tools/ablate.py: what its file may say, the table, and an ablation from end to end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import ablate

from envs import UserError

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
        ("eval_episodes = 3", "eval_episodes = -1", "eval_episodes must be 0, for all there are, or more, not -1"),
        ("seeds = [1, 2]", "seeds = [2147483000]", "below 2\\*\\*31: not 2147483000"),
        ("learning_rate = 1e-2", 'env_id = "Ballbot-v0"', "env_id is no setting of ppo_continuous for a variant"),
        ("learning_rate = 1e-2", "num_envs = { x = 1 }", "num_envs cannot be"),
        ("num_envs = 2", f"num_envs = {'1' * 5000}", "not TOML that can be read"),
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
        "mean_return": 10 * float(np.mean(success)),
        "per_episode": [{"success": bool(x), "return": 10.0 * x} for x in success],
    }
    return result if base is None else {**result, "base": {"success_rate": base, "mean_return": 10 * base}}


def test_a_difference_has_the_interval_of_the_seeds():
    """Gains .5, .25 and 0 of three seeds: their standard deviation is .25, and t of 2 degrees of freedom 4.3027."""
    reference = [played(1, 0, 0, 0), played(1, 1, 0, 0), played(1, 1, 1, 0)]
    ours = [played(1, 1, 1, 0), played(1, 0, 1, 1), played(0, 1, 1, 1)]
    middle, half = ablate.difference(ours, reference)
    assert middle == pytest.approx(0.25)
    assert half == pytest.approx(4.3027 * 0.25 / np.sqrt(3), rel=1e-4)
    assert ablate.difference(ours[:1], reference[:1]) == (0.5, np.inf)
    with pytest.raises(ValueError, match="longer"):  # of other episodes
        ablate.difference([played(1, 0)], [played(1, 0, 1)])


def test_the_table():
    """Gains of b .25 and .5: .375 +- 12.706 * .17678 / sqrt(2); of c none, and twice less."""
    tests = {
        "a": [played(1, 0, 1, 0, base=0.5), played(1, 0, 0, 0, base=0.0)],
        "b": [played(1, 1, 1, 0, base=0.5), played(1, 1, 1, 0, base=0.25)],
        "c": [played(1, 0, 1, 0, base=0.5), played(0, 0, 0, 0, base=0.0)],
    }
    assert ablate.report([1, 2], tests).splitlines() == [
        "| settings | success, seed 1 | 2 | mean | base alone | difference, 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 0.500 | 0.250 | 0.375 | 0.250 |  |",
        "| b | 0.750 | 0.750 | 0.750 | 0.375 | +0.375 (-1.213 to +1.963) |",
        "| c | 0.500 | 0.000 | 0.250 | 0.250 | -0.125 (-1.713 to +1.463) |",
    ]
    one = {variant: [{**those[0], "success_rate": None}] for variant, those in tests.items()}
    for test in (test for those in one.values() for test in those):
        del test["base"]
    assert ablate.report([1], one).splitlines()[2:4] == ["| a | 5 | 5 |  |", "| b | 7.5 | 7.5 | +2.5 |"]


def test_an_ablation_from_end_to_end(tmp_path, capfd):
    """Each variant trained and evaluated; what is there is not made again, and never of other settings."""
    text = ABLATION.replace("seeds = [1, 2]", "seeds = [7]")
    args = ablate.Args(write(tmp_path, text), jobs=2, run_root=str(tmp_path / "runs"))
    table = ablate.ablate(args)
    folder = tmp_path / "runs" / "ablations" / "pendulum"
    assert table == (folder / "summary.md").read_text()
    plain, narrow = folder / "as_it_comes__seed7", folder / "narrow_fast__seed7"
    assert sorted(entry for entry in folder.iterdir() if entry.is_dir()) == [plain, narrow]
    returns = []
    for run in (plain, narrow):
        config = json.loads((run / "config.json").read_text())["args"]
        assert (config["seed"], config["num_envs"]) == (7, 2)
        assert config["hidden_sizes"] == ([64, 64] if run == plain else [8])
        test = json.loads((run / "test.json").read_text())
        assert (test["seed"], test["episodes"], len(test["per_episode"])) == (900_007, 3, 3)
        returns.append(test["mean_return"])
    one, other = (f"{x:.4g}" for x in returns)
    rows = table.splitlines()[2:4]
    assert rows[0] == f"| as it comes | {one} | {one} |  |"
    assert rows[1] == f"| narrow & fast | {other} | {other} | {returns[1] - returns[0]:+.4g} |"
    assert "\n3 episodes each; commit " in table

    # A test.json of another policy, and a run that was stopped
    capfd.readouterr()
    stamp = (plain / "summary.json").stat().st_mtime_ns
    (plain / "test.json").write_text(json.dumps({**json.loads((plain / "test.json").read_text()), "sha256": "0" * 64}))
    summary = json.loads((narrow / "summary.json").read_text())
    (narrow / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    assert ablate.ablate(args) == table
    again = capfd.readouterr().err
    assert (again.count("trained"), again.count("evaluated")) == (1, 2)
    assert (plain / "summary.json").stat().st_mtime_ns == stamp
    assert len(json.loads((narrow / "config.json").read_text())["resumed"]) == 1  # it went on from its checkpoint

    def refused(old, new, message):
        with pytest.raises(UserError, match=message):
            ablate.ablate(ablate.Args(write(tmp_path, text.replace(old, new)), run_root=args.run_root))

    refused("1e-2", "1e-3", r"narrow_fast__seed7: is of other settings \(learning_rate 0\.01\)")
    refused("total_timesteps = 128", "total_timesteps = 256", r"as_it_comes__seed7: is of other settings \(total_time")
    with ablate.lock(folder / ".lock", "busy"):
        refused("", "", "another process trains there")
    (plain / "summary.json").unlink()
    with ablate.lock(plain / ".lock", "busy"):
        refused("", "", "as_it_comes__seed7: still being trained")


def test_one_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    path = write(tmp_path, ABLATION.replace("seeds = [1, 2]", "seeds = [1]"))
    start = ablate.Job.start

    def broken(job, line):
        start(
            job,
            [sys.executable, "-c", "import sys; sys.exit('error: no luck')"] if "as_it" in str(job.folder) else line,
        )

    monkeypatch.setattr(ablate.Job, "start", broken)
    with pytest.raises(UserError, match=r"as_it_comes__seed1: no luck \(see .*as_it_comes__seed1\.log\)"):
        ablate.ablate(ablate.Args(path, run_root=str(tmp_path / "runs")))
    folder = tmp_path / "runs" / "ablations" / "pendulum"
    assert (folder / "narrow_fast__seed1" / "test.json").exists()
    assert (folder / "summary.md").read_text() == ""  # no seed has all


def test_settings_that_cannot_work_are_refused_before_anything_runs(tmp_path):
    path = write(tmp_path, ABLATION.replace("hidden_sizes = [8]", "minibatch_size = 100"))
    with pytest.raises(UserError, match=r"narrow & fast: --minibatch-size must be .* divide num_envs"):
        ablate.ablate(ablate.Args(path, run_root=str(tmp_path / "runs")))
    with pytest.raises(UserError, match="--jobs must be at least 1, not 0"):
        ablate.ablate(ablate.Args(path, jobs=0, run_root=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_signal_stops_all_runs_which_then_go_on(tmp_path):
    """Both processes, each in the middle of its training, and the tool itself, which says so."""
    path = write(tmp_path, ABLATION.replace("total_timesteps = 128", "total_timesteps = 2_000_000"))
    line = [sys.executable, str(ROOT / "tools/ablate.py"), path, "--jobs", "2", "--run-root", str(tmp_path / "runs")]
    folder = tmp_path / "runs" / "ablations" / "pendulum"
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    begun = [folder / f"{variant}__seed1" / "progress.csv" for variant in ("as_it_comes", "narrow_fast")]
    while not all(file.exists() for file in begun):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    for file in begun:
        assert json.loads((file.parent / "summary.json").read_text())["status"] == "interrupted"
    job = ablate.Job(ablate.load_ablation(path), "as it comes", 1, folder)
    assert job.next_command()[-2:] == ["--resume", str(begun[0].parent)]
