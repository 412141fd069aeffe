"""bc_pretrain.py: what it records is what the expert meant where it was; its clones are policies like any others."""

import hashlib
import json
import re
import signal
import zipfile
from copy import deepcopy
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bc_pretrain as bc
import envs
import ppo_continuous
import ppo_grid_socnav
import ppo_residual
from envs import command, demonstrations, rollout, run
from envs.batch_env import BatchEnv
from envs.files import UserError
from envs.lateral import FeedForward, LateralControl


class Straight:
    """Goes home as fast as it can."""

    def __call__(self, obs):
        return np.clip(-obs[:, :1], -0.05, 0.15).astype(np.float32)


class Home(BatchEnv):
    """A point in [-1, 1] moves by its action; each step costs its distance from 0, where it has arrived; 30 steps."""

    controllers = {"straight": Straight}  # noqa: RUF012

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


@pytest.fixture(scope="module", autouse=True)
def home():
    gym.register("CloneHome-v0", vector_entry_point=Home)
    yield
    del gym.registry["CloneHome-v0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory of runs with demonstrations of both tasks."""
    root = str(tmp_path_factory.mktemp("runs"))
    bc.collect(bc.CollectArgs("lateral", episodes=5, seeds=(3, 4), run_root=root))
    bc.collect(collect_home(root))
    return root


def collect_home(root, **changes):
    settings = {"dataset": "home", "policy": "straight", "env_id": "CloneHome-v0", "episodes": 80, "seeds": (3, 4)}
    return bc.CollectArgs(**{**settings, "action_noise": 0.25, "run_root": root, **changes})


def arrays_of(file):
    with np.load(file, allow_pickle=False) as content:
        return dict(content)


def rewrite(file, arrays):
    """Other arrays, and a manifest that says that these are the ones."""
    np.savez(file, **arrays)
    manifest = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**manifest, "sha256": run.sha256(file)}))


def read(root, name):
    arrays = arrays_of(run.dataset_file(bc.Args(name, run_root=root)))
    episodes = [slice(*ends) for ends in zip(arrays["start"], arrays["start"][1:])]
    return arrays, episodes


def settings_of(root, **changes):
    """A short training run on the home task."""
    settings = {"dataset": "home", "epochs": 3, "hidden_sizes": (16,), "minibatch_size": 32, "eval_episodes": 4}
    return bc.Args(**{**settings, "run_root": root, "run_name": "run", **changes})


@pytest.fixture
def fake_onnx(monkeypatch):
    """The export takes longer than a tiny run; where it is not the subject it writes a placeholder."""
    monkeypatch.setattr(run, "export_onnx", lambda agent, obs_dim, path, *about: path.write_bytes(b"onnx"))


# Recording


def test_the_recorded_actions_lead_through_the_recorded_observations(root):
    """Observation, action and reward of one index are those of one step."""
    arrays, episodes = read(root, "lateral")
    assert arrays["obs"].shape == (2000, 46)
    assert arrays["action"].shape == (2000, 1)
    assert arrays["start"].tolist() == [0, 400, 800, 1200, 1600, 2000]
    vec = LateralControl(5, training=False)
    obs, _ = vec.reset(seed=[[0, k] for k in range(5)])
    for t in range(400):
        now = arrays["start"][:-1] + t
        assert np.array_equal(obs, arrays["obs"][now])
        obs, reward, *_ = vec.step(arrays["action"][now])
        assert np.array_equal(reward.astype(np.float32), arrays["reward"][now])
    assert vec.sim.t.tolist() == [100] * 5
    for k, episode in enumerate(episodes):
        assert arrays["reward"][episode].sum() == pytest.approx(arrays["returns"][k], rel=1e-5)
    assert len(set(arrays["returns"])) == 5
    assert not arrays["successes"].any()


def test_the_recorded_actions_are_the_experts(root):
    arrays, _ = read(root, "lateral")
    expert, vec = FeedForward(), LateralControl(5, training=False)
    vec.reset(seed=0)
    expert.reset(np.arange(5), vec)
    for t in range(50):
        now = arrays["start"][:-1] + t
        action = expert(arrays["obs"][now])
        assert np.array_equal(action, arrays["action"][now])
        vec.step(action)


def test_episodes_go_on_counting_from_seed_to_seed(root):
    """40 of the 80 episodes have seed 3, the others seed 4; episode i starts from SeedSequence([seed, i])."""
    arrays, episodes = read(root, "home")
    assert len(episodes) == 80
    for k, episode in enumerate(episodes):
        rng = np.random.default_rng(np.random.SeedSequence([3 if k < 40 else 4, k]))
        assert arrays["obs"][episode.start, 0] == np.float32(rng.uniform(-1, 1))
        assert arrays["reward"][episode].sum() == pytest.approx(arrays["returns"][k], rel=1e-5)
    assert len({episode.stop - episode.start for episode in episodes}) > 3


def test_what_is_recorded_is_what_the_expert_meant_and_what_is_done_is_disturbed(tmp_path, monkeypatch):
    advance, done = Home.advance, []
    monkeypatch.setattr(Home, "advance", lambda self, action: done.append(action.copy()) or advance(self, action))
    bc.collect(collect_home(str(tmp_path), episodes=24, seeds=(3,)))
    arrays, episodes = read(str(tmp_path), "home")
    assert np.array_equal(arrays["action"], Straight()(arrays["obs"]))
    done = np.stack([actions for actions in done if len(actions) == 24])  # row i begins with episode i
    noise = [done[: e.stop - e.start, i] - arrays["action"][e] for i, e in enumerate(episodes)]
    noise = np.concatenate(noise)
    assert len(noise) > 150
    assert np.std(noise) == pytest.approx(0.25 * 0.1, rel=0.15)  # half the range of the action is 0.1
    assert abs(np.mean(noise)) < 0.006
    assert np.abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.25


def test_without_noise_the_expert_drives_itself(tmp_path):
    bc.collect(collect_home(str(tmp_path), action_noise=0.0, episodes=4))
    arrays, episodes = read(str(tmp_path), "home")
    for episode in episodes:
        obs, action = arrays["obs"][episode, 0], arrays["action"][episode, 0]
        np.testing.assert_allclose(np.diff(obs), action[:-1], atol=1e-6)
    assert arrays["successes"].all()
    assert arrays["successes"].shape == arrays["returns"].shape == (4,)


def test_recording_is_repeatable_and_each_seed_has_its_noise(tmp_path):
    for name, seeds in (("a", (3, 4)), ("b", (3, 4)), ("c", (3, 5))):
        bc.collect(collect_home(str(tmp_path), dataset=name, seeds=seeds, episodes=6))
    a, b, c = (read(str(tmp_path), name)[0] for name in "abc")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["obs"][: len(c["obs"])], c["obs"][: len(a["obs"])])


def test_the_number_of_rows_does_not_matter_without_noise(tmp_path, monkeypatch):
    for name, rows in (("many", 24), ("few", 2)):
        monkeypatch.setattr(rollout, "ROWS", rows)
        bc.collect(collect_home(str(tmp_path), dataset=name, action_noise=0.0, episodes=7))
    many, few = (read(str(tmp_path), name)[0] for name in ("many", "few"))
    assert all(np.array_equal(many[name], few[name]) for name in many)


@pytest.mark.parametrize("policy", ["feedforward", "pid"])
def test_the_manifest_says_where_they_are_from(tmp_path, policy):
    args = bc.CollectArgs("x", policy=policy, episodes=2, action_noise=0.125, run_root=str(tmp_path))
    file = bc.collect(args)
    assert file == tmp_path / "datasets" / "x.npz"
    manifest = json.loads(file.with_suffix(".json").read_text())
    assert manifest["env_id"] == "LateralControl-v0"
    assert manifest["env_kwargs"] == {"action_mode": "absolute" if policy == "pid" else "delta"}
    assert manifest["collected_with"] == json.loads(json.dumps(asdict(args)))
    assert manifest["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (manifest["episodes"], manifest["steps"]) == (2, 800)
    assert manifest["metrics"]["total_cost"] > 0
    with np.load(file, allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays} == {
            "obs": "f", "action": "f", "played": "f", "reward": "f", "start": "i", "seed": "i", "returns": "f",
            "successes": "b", "terminated": "b",
        }  # fmt: skip


def test_what_was_played_is_kept_beside_what_was_meant(tmp_path):
    bc.collect(collect_home(str(tmp_path), episodes=24))
    arrays, episodes = read(str(tmp_path), "home")
    for episode in episodes:
        moved = np.clip(arrays["played"][episode, 0], -0.05, 0.15)
        np.testing.assert_allclose(np.diff(arrays["obs"][episode, 0]), moved[:-1], atol=1e-6)
    assert np.abs(arrays["played"] - arrays["action"]).mean() > 0.01


def test_only_successes_are_kept_on_demand(tmp_path):
    """Far noise makes some episodes run out of time."""
    noisy = {"action_noise": 1.0, "episodes": 40}
    bc.collect(collect_home(str(tmp_path), dataset="all", **noisy))
    bc.collect(collect_home(str(tmp_path), dataset="good", only_successes=True, **noisy))
    (every, episodes), (good, kept) = read(str(tmp_path), "all"), read(str(tmp_path), "good")
    succeeded = np.flatnonzero(every["successes"])
    assert 0 < len(succeeded) < 40
    assert good["successes"].all()
    assert good["seed"].tolist() == every["seed"][succeeded].tolist()
    for ours, theirs in zip(kept, succeeded):
        assert np.array_equal(good["obs"][ours], every["obs"][episodes[theirs]])
    manifest = json.loads((tmp_path / "datasets" / "good.json").read_text())
    assert (manifest["episodes"], manifest["success_rate"]) == (len(kept), 1.0)
    assert manifest["played"] == {"episodes": 40, "env_steps": len(every["reward"])}  # what was left out was played too


def test_an_expert_that_never_succeeds_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="zero succeeded in none of 4 episodes; leave --only-successes out"):
        bc.collect(collect_home(str(tmp_path), policy="zero", episodes=4, action_noise=0.0, only_successes=True))
    assert list((tmp_path / "datasets").iterdir()) == []


@pytest.fixture(scope="module")
def home_clone(root):
    """The run of a clone on the home task, without its ONNX file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "export_onnx", lambda agent, obs_dim, path, *about: path.write_bytes(b"onnx"))
        return bc.train(settings_of(root, epochs=5, learning_rate=1e-2, run_name="home_clone"))["run"]


def test_a_policy_file_is_an_expert_and_a_parent(home_clone, tmp_path):
    args = collect_home(str(tmp_path), policy=home_clone, env_id=None, action_noise=0.0, episodes=6)
    manifest = json.loads(bc.collect(args).with_suffix(".json").read_text())
    arrays, _ = read(str(tmp_path), "home")
    clone, _ = bc.trained(home_clone)
    assert manifest["env_id"] == "CloneHome-v0"
    assert np.array_equal(arrays["action"], clone(arrays["obs"]))
    file = run.Path(home_clone) / "best.pt"
    (path, parent), *more = manifest["parents"].items()
    assert more == []
    assert (path, parent["sha256"]) == (str(file), run.sha256(file))
    assert parent["config"]["script"] == "bc_pretrain"
    assert parent["steps"] == 5


def test_with_dagger_the_clone_drives_every_other_row_and_the_expert_labels(home_clone, tmp_path):
    bc.collect(collect_home(str(tmp_path), dagger=home_clone, action_noise=0.0, episodes=24, seeds=(3,)))
    arrays, episodes = read(str(tmp_path), "home")
    clone, _ = bc.trained(home_clone)
    assert np.array_equal(arrays["action"], Straight()(arrays["obs"]))
    for k, episode in enumerate(episodes):  # 24 episodes in as many rows
        expected = clone(arrays["obs"][episode]) if k % 2 else arrays["action"][episode]
        assert np.array_equal(arrays["played"][episode], expected)
    manifest = json.loads((tmp_path / "datasets" / "home.json").read_text())
    assert list(manifest["parents"]) == [str(run.Path(home_clone) / "best.pt")]


def test_an_existing_name_is_refused(root):
    before = run.dataset_file(settings_of(root)).read_bytes()
    with pytest.raises(UserError, match=r"home\.npz exists; choose another --dataset"):
        bc.collect(collect_home(root))
    assert run.dataset_file(settings_of(root)).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 1}, "--episodes must be 2 or more"),
        ({"action_noise": -0.1}, "--action-noise 0 or more"),
        ({"action_noise": float("nan")}, "--action-noise"),
        ({"threads": 0}, "--threads 1 or more"),
        ({"seeds": ()}, "--seeds not empty"),
        ({"seeds": (-1,)}, "--seeds"),
        ({"seeds": (3, 3)}, "--seeds must differ"),
        ({"policy": "runs/none.pt"}, r"runs/none\.pt: no such file"),
        ({"dagger": "runs/none.pt"}, r"runs/none\.pt: no such file"),
        ({"policy": "ik"}, "unknown policy 'ik': choose zero, straight"),
        ({"policy": "missing.onnx"}, r"missing\.onnx: no such file"),
        ({"env_id": "Homes-v0"}, "unknown environment 'Homes-v0'"),
        ({"env_id": "CartPole-v1"}, "flat, bounded Box"),
        ({"env_kwargs": {"colour": "red"}}, "no argument 'colour'"),
        ({"env_kwargs": {"split": "test"}}, "split is not for --env-kwargs"),
        ({"env_kwargs": {"training": True}}, "training is not for --env-kwargs"),
        ({"env_id": "LateralControl-v0", "policy": "pid", "episodes": 700}, "of the train split, which has 600"),
        (
            {"env_id": "LateralControl-v0", "policy": "pid", "env_kwargs": {"action_mode": "delta"}},
            "pid: is for action_mode absolute, not delta",
        ),
    ],
)
def test_recording_what_cannot_be_recorded(tmp_path, changes, message, monkeypatch):
    """It is said before anything is played."""
    step, calls = BatchEnv.step, []
    monkeypatch.setattr(BatchEnv, "step", lambda self, action: calls.append(1) or step(self, action))
    with pytest.raises(UserError, match=message) as error:
        bc.collect(collect_home(str(tmp_path), **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert calls == []


def test_a_residual_is_no_expert(tmp_path, home_clone):
    policy = run.load(run.Path(home_clone) / "best.pt")
    run.save(tmp_path / "residual.pt", {**policy, "kind": "residual"})
    with pytest.raises(UserError, match="holds a residual, where a policy is needed"):
        bc.collect(collect_home(str(tmp_path), policy=str(tmp_path / "residual.pt"), env_id=None))


def test_an_expert_of_another_environment(tmp_path, home_clone):
    with pytest.raises(UserError, match="a policy for CloneHome-v0, not Pendulum-v1; leave --env-id out"):
        bc.collect(collect_home(str(tmp_path), policy=home_clone, env_id="Pendulum-v1"))
    with pytest.raises(UserError, match="a policy for CloneHome-v0, not LateralControl-v0; give another"):
        bc.collect(bc.CollectArgs("x", dagger=home_clone, episodes=2, run_root=str(tmp_path)))


@given(total=st.integers(0, 1000), parts=st.integers(1, 20))
def test_shares_are_equal_and_add_up(total, parts):
    shares = bc.shared_out(total, parts)
    assert len(shares) == parts
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


# Damaged demonstrations


def damage(file, how):
    """Leaves the demonstrations in a state that cannot be trained on."""
    arrays, manifest = arrays_of(file), json.loads(file.with_suffix(".json").read_text())
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif how == "a byte changed":
        with zipfile.ZipFile(file) as archive:
            begin = archive.getinfo("action.npy").header_offset + 200
        file.write_bytes(content[:begin] + bytes([content[begin] ^ 255]) + content[begin + 1 :])
    elif how == "text":
        file.write_text("not an archive")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "objects":
        np.savez(file, **{**arrays, "obs": np.array([{"a": 1}, None], dtype=object)})
    elif how == "no action":
        rewrite(file, {name: array for name, array in arrays.items() if name != "action"})
    elif how == "too few actions":
        rewrite(file, {**arrays, "action": arrays["action"][:-1]})
    elif how == "flat observations":
        rewrite(file, {**arrays, "obs": arrays["obs"][:, 0]})
    elif how == "starts not in order":
        rewrite(file, {**arrays, "start": arrays["start"][[0, 2, 1, *range(3, len(arrays["start"]))]]})
    elif how == "starts beyond the end":
        rewrite(file, {**arrays, "start": arrays["start"] + 1})
    elif how == "nan":
        arrays["obs"][7] = np.nan
        rewrite(file, arrays)
    elif how == "infinite action":
        arrays["action"][7] = np.inf
        rewrite(file, arrays)
    elif how == "another recording":
        np.savez(file, **{**arrays, "action": arrays["action"] / 2})
    elif how == "quarantined":
        file.with_suffix(".json").write_text(json.dumps({**manifest, "quality": "quarantined"}))
    elif how == "one episode":
        end = arrays["start"][1]
        steps = {name: arrays[name][:end] for name in ("obs", "action", "played", "reward")}
        episodes = {name: arrays[name][:1] for name in ("seed", "returns", "successes", "terminated")}
        rewrite(file, {**steps, **episodes, "start": arrays["start"][:2]})
    elif how == "empty episodes":
        rewrite(file, {name: array[:0] for name, array in arrays.items()} | {"start": np.zeros(1, int)})
    elif how == "no manifest":
        file.with_suffix(".json").unlink()
    elif how == "manifest not json":
        file.with_suffix(".json").write_text("{")
    elif how == "manifest a list":
        file.with_suffix(".json").write_text("[]")
    elif how == "another manifest":
        file.with_suffix(".json").write_text(json.dumps({"args": {}}))
    else:
        file.with_suffix(".json").write_text(json.dumps({**manifest, "env_id": "Pendulum-v1", "env_kwargs": {}}))


DAMAGES = {
    "missing": r"home\.npz: no such demonstrations; record them",
    "cut short": r"home\.npz: damaged .*; record it anew",
    "a byte changed": r"home\.npz: damaged .*; record it anew",
    "text": r"home\.npz: damaged .*; record it anew",
    "empty": r"home\.npz: damaged .*; record it anew",
    "objects": r"home\.npz: damaged .*; record it anew",
    "no action": r"home\.npz: not demonstrations of this project; record them anew",
    "too few actions": r"home\.npz: its arrays do not fit together",
    "flat observations": r"home\.npz: its arrays do not fit together",
    "starts not in order": r"home\.npz: its arrays do not fit together",
    "starts beyond the end": r"home\.npz: its arrays do not fit together",
    "another recording": r"home\.npz: something is wrong with it, and validate says what; record it anew",
    "quarantined": r"home\.npz: something is wrong with it, and validate says what",
    "one episode": r"home\.npz: one episode is too few",
    "empty episodes": r"home\.npz: its arrays do not fit together",
    "nan": r"home\.npz: something is wrong with it, and validate says what",
    "infinite action": r"home\.npz: something is wrong with it, and validate says what",
    "no manifest": r"home\.json, which says what it is, is missing",
    "manifest not json": r"home\.json: not JSON",
    "manifest a list": r"home\.json: must hold one JSON object",
    "another manifest": r"home\.npz: not demonstrations of this project",
    "of another environment": r"--dataset home: Pendulum-v1 now has other observations or actions; record it anew",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_demonstrations(root, tmp_path, how):
    (tmp_path / "datasets").mkdir()
    for suffix in (".npz", ".json"):
        file = run.dataset_file(settings_of(root)).with_suffix(suffix)
        (tmp_path / "datasets" / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "datasets" / "home.npz", how)
    with pytest.raises(UserError, match=DAMAGES[how]) as error:
        bc.train(settings_of(str(tmp_path)))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs is out of range"),
        ({"patience": 0}, "--patience is out of range"),
        ({"minibatch_size": 0}, "--minibatch.size is out of range"),
        ({"threads": 0}, "--threads is out of range"),
        ({"learning_rate": 0.0}, "--learning.rate"),
        ({"learning_rate": float("nan")}, "--learning.rate"),
        ({"validation_share": 0.0}, "--validation.share"),
        ({"validation_share": 1.0}, "--validation.share"),
        ({"weight_decay": -1.0}, "--weight.decay"),
        ({"hidden_sizes": (0,)}, "--hidden.sizes"),
        ({"rays": 3}, "--rays"),
        ({"gamma": 1.5}, "--gamma"),
        ({"seed": -1}, "--seed"),
        ({"eval_episodes": -1}, "--eval.episodes"),
        ({"eval_episodes": 0}, "--eval-episodes 0 means all there are"),
        ({"seed": 2**32}, "--seed"),
        ({"init_log_std": float("nan")}, "--init.log.std"),
        ({"env_id": "CartPole-v1", "env_kwargs": {}}, "flat, bounded Box|no argument"),
        ({"env_id": "SO101Paper-v0"}, "SO101Paper-v0 now has other observations or actions"),
        ({"env_kwargs": {"colour": "red"}}, "no argument 'colour'"),
        ({"cnn_channels": (8, 8)}, "--cnn.channels"),
        ({"dataset": "lateral", "env_kwargs": {"action_mode": "absolute"}}, "is for action_mode delta, not absolute"),
        ({"env_kwargs": {"split": "test"}}, "split is not for --env-kwargs"),
        ({"eval_env_kwargs": {"split": "test"}}, "split is not for --env-kwargs"),
        ({"eval_env_kwargs": {"colour": "red"}}, "no argument 'colour'"),
        ({"dataset": "other"}, r"other\.npz: no such demonstrations"),
    ],
)
def test_training_that_cannot_work(root, tmp_path, changes, message):
    settings = {"run_name": f"bad_{tmp_path.name}", **changes}
    with pytest.raises(UserError, match=message) as error:
        bc.train(settings_of(root, **settings))
    assert "\n" not in str(error.value)
    assert not (run.Path(root) / settings["run_name"]).exists()


# Looking at demonstrations


@pytest.fixture
def copied(root, tmp_path):
    """Demonstrations of the home task that a test may damage: their file."""
    (tmp_path / "datasets").mkdir()
    for suffix in (".npz", ".json"):
        file = run.dataset_file(settings_of(root)).with_suffix(suffix)
        (tmp_path / "datasets" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "datasets" / "home.npz"


def validate(file):
    return bc.validate(bc.ValidateArgs(file.stem, run_root=str(file.parents[1])))


def test_sound_demonstrations_have_no_problem(copied, capsys):
    assert validate(copied)
    said = capsys.readouterr().out
    assert "WRONG" not in said
    assert said.count("ok ") == 10
    assert "80 episodes of CloneHome-v0" in said
    assert said.rstrip().endswith("draft")


def shifted(*names):
    """These arrays one step late, as in a pairing that is off by one."""

    def shift(arrays):
        return {**arrays, **{name: np.roll(arrays[name], 1, axis=0) for name in names}}

    return shift


def changed(name, index, value):
    def change(arrays):
        array = arrays[name].copy()
        array[index] = value
        return {**arrays, name: array}

    return change


def twice(arrays):
    """The first episode again at the end."""
    end = arrays["start"][1]
    steps = {name: np.concatenate([arrays[name], arrays[name][:end]]) for name in ("obs", "action", "played", "reward")}
    names = ("seed", "returns", "successes", "terminated")
    episodes = {name: np.concatenate([arrays[name], arrays[name][:1]]) for name in names}
    return {**steps, **episodes, "start": np.append(arrays["start"], arrays["start"][-1] + end)}


@pytest.mark.parametrize(
    ("change", "check", "wrong"),
    [
        (changed("obs", 7, np.nan), "observations are finite", "not so in step 7"),
        (changed("action", 7, np.inf), "actions and rewards are finite", "action is not in step 7"),
        (changed("reward", 7, np.nan), "actions and rewards are finite", "reward is not in step 7"),
        (changed("action", 7, 0.2), "actions lie inside their bounds", "1 of "),
        (changed("action", 7, -0.2), "actions lie inside their bounds", "1 of "),
        (changed("reward", 7, -5.0), "rewards add up to the returns", "not in episode 1"),
        (changed("successes", slice(None), False), "the manifest's figures", "it is 0.000"),
        (shifted("action"), "actions differ from what was played by the noise alone", "of half the range, not 0.250"),
        (
            shifted("action", "played"),
            "episodes are played again as they were",
            "not in episode 0: another reward in step 0",
        ),
        (shifted("obs"), "episodes are played again as they were", "other observations from step 0 on"),
        (changed("reward", 2, -0.5), "episodes are played again as they were", "another reward in step 2"),
        (twice, "no episode is there twice", "1 seeds appear more than once, such as \\[3, 0\\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_wrong_is_found_and_noted(copied, capsys, change, check, wrong):
    rewrite(copied, change(arrays_of(copied)))
    assert not validate(copied)
    said = capsys.readouterr().out
    assert re.search(f"WRONG  {check}.*: .*{wrong}", said), said
    assert json.loads(copied.with_suffix(".json").read_text())["quality"] == "quarantined"


def test_a_file_that_was_replaced_is_found(copied, capsys):
    np.savez(copied, **arrays_of(copied))
    assert not validate(copied)
    assert "WRONG  the file is the one that the manifest describes: its sha256 is not" in capsys.readouterr().out


def test_enough_episodes_without_problems_are_validated(tmp_path):
    manifest = json.loads(bc.collect(collect_home(str(tmp_path), episodes=200)).with_suffix(".json").read_text())
    assert manifest["quality"] == "validated"


def test_an_episode_is_shown_again_as_it_was(root, monkeypatch, capsys):
    """Its actions, noise and all, from its seed."""
    rewards = []

    class Film:
        def __init__(self, vec, path):
            assert path == run.Path(root) / "datasets" / "home_50.mp4"

        def __call__(self, playing, reward, terminated, done):
            rewards.append(reward[0])

    monkeypatch.setattr(demonstrations, "Film", Film)
    monkeypatch.setattr(command, "require_extras", lambda given: None)
    arrays, episodes = read(root, "home")
    bc.inspect(bc.InspectArgs("home", episode=50, video=True, run_root=root))
    assert np.array_equal(np.float32(rewards), arrays["reward"][episodes[50]])
    assert f"episode 50: {len(rewards)} steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode": 80}, "--episode must be from 0 to 79, not 80"),
        ({"video": True}, "--video and --render show one episode"),
        ({"episode": 1, "video": True, "render": "human"}, "--render human and --video exclude each other"),
        ({"dataset": "none"}, r"none\.npz: no such demonstrations; record them with collect"),
    ],
)
def test_looking_at_what_is_not_there(root, changes, message):
    with pytest.raises(UserError, match=message):
        bc.inspect(bc.InspectArgs(**{"dataset": "home", "run_root": root, **changes}))


def test_statistics_are_those_of_the_arrays(root, capsys):
    bc.inspect(bc.InspectArgs("home", run_root=root))
    said, (arrays, _) = capsys.readouterr().out, read(root, "home")
    assert f"{arrays['successes'].sum()} successes" in said
    assert f"action 0: mean {arrays['action'].mean():.3f}" in said


@settings(deadline=None)
@given(data=st.data())
def test_episodes_come_out_as_they_went_in(tmp_path_factory, data):
    """Whatever their lengths, the order in which they end, and the size of the pieces that they are read in."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    order = data.draw(st.permutations(range(len(lengths))))
    left_out = data.draw(st.sets(st.sampled_from(range(len(lengths)))))
    episodes = [
        {
            "obs_a": np.random.default_rng(k).normal(size=(n, 3)).astype(np.float32),
            "obs_b": np.full((n, 2, 2), k, np.uint8),
            **{name: np.full((n, 1), k, np.float32) for name in ("action", "played")},
            "reward": np.arange(n, dtype=np.float32),
        }
        for k, n in enumerate(lengths)
    ]
    kept = [episode for k, episode in enumerate(episodes) if k not in left_out]
    if not kept:
        return
    file = tmp_path_factory.mktemp("written") / "x.npz"
    with demonstrations.Writer(file) as writer:
        for k in order:
            writer.add(k, None if k in left_out else episodes[k])
        m = len(kept)
        ended = {name: np.zeros(m, bool) for name in ("successes", "terminated")}
        writer.finish(seed=np.zeros((m, 2), int), returns=np.zeros(m), **ended)
    assert [path.name for path in file.parent.iterdir()] == ["x.npz"]
    run.write_json(file.with_suffix(".json"), {"env_id": "", "env_kwargs": {}, "sha256": ""})
    found = demonstrations.Demonstrations(file)
    assert np.array_equal(found.start, np.cumsum([0, *(len(e["reward"]) for e in kept)]))
    assert np.array_equal(found.action, np.concatenate([e["action"] for e in kept]))
    chunks = list(found.chunks(data.draw(st.integers(1, 9))))
    for name in ("a", "b"):
        whole = np.concatenate([chunk[name] for chunk in chunks])
        assert np.array_equal(whole, np.concatenate([e[f"obs_{name}"] for e in kept]))


# Cloning


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=30), share=st.floats(0.01, 0.99), seed=st.integers(0, 99)
)
def test_whole_episodes_train_or_validate(lengths, share, seed):
    start = np.cumsum([0, *lengths])
    trains, validates = bc.split_episodes(start, share, seed)
    assert sorted([*trains, *validates]) == list(range(sum(lengths)))
    episode = np.repeat(np.arange(len(lengths)), lengths)
    held_out = set(episode[validates])
    assert held_out.isdisjoint(episode[trains])
    assert len(held_out) >= 1
    assert len(trains) >= 1
    assert abs(len(held_out) - share * len(lengths)) <= 1


def toy_problem(norm_obs=True, loss="mse"):
    """Actions that are linear in observations, with noise of deviation .1, in the Gaussian's own units."""
    torch.manual_seed(0)
    args = bc.Args("none", loss=loss, norm_obs=norm_obs, hidden_sizes=(32,), minibatch_size=64)
    bound = np.ones(2, np.float32)
    agent = bc.Agent(3, -bound, bound, args)
    obs = 5 + 2 * torch.randn(512, 3)
    mean = 0.2 * (obs - 5) @ torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 1.0]])
    if norm_obs:
        agent.normalizer.update(obs)
    return agent, args, obs, mean + 0.1 * torch.randn(512, 2)


@pytest.mark.parametrize("norm_obs", [True, False])
@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_either_loss_falls_and_only_nll_learns_the_deviation(loss, norm_obs):
    agent, args, obs, action = toy_problem(norm_obs, loss)
    before = bc.bc_loss(agent, args, obs, action).item()
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-3)
    for _ in range(60):
        bc.fit_epoch(agent, optimizer, args, (obs, action, torch.zeros(len(obs))))
    after = bc.bc_loss(agent, args, obs, action).item()
    with torch.no_grad():
        error = (agent.actor(agent.normalizer(obs)) - action).square().mean().sqrt()
    assert after < (0.3 * before if loss == "mse" else before - 1)
    assert error < 0.2
    if loss == "mse":
        assert agent.log_std.tolist() == [-0.5, -0.5]
    else:
        assert ((agent.log_std.exp() > 0.07) & (agent.log_std.exp() < 0.25)).all()


def test_losses_by_hand():
    agent, args, obs, action = toy_problem()
    with torch.no_grad():
        mean = agent.actor(agent.normalizer(obs))
        mse = ((mean - action) ** 2).sum(1).mean()
        normal = torch.distributions.Normal(mean, agent.log_std.exp())
        assert bc.bc_loss(agent, args, obs, action) == pytest.approx(mse.item(), rel=1e-5)
        nll = bc.bc_loss(agent, replace(args, loss="nll"), obs, action)
        assert nll == pytest.approx(-normal.log_prob(action).sum(1).mean().item(), rel=1e-5)


def test_returns_to_go_by_hand():
    reward, start = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([0, 3, 5])
    # the second one was cut off: it goes on with its mean of 12, which is worth 12 / (1 - .5)
    expected = [1 + 1 + 1, 2 + 2, 4, 8 + 0.5 * (16 + 0.5 * 24), 16 + 0.5 * 24]
    assert bc.returns_to_go(reward, start, np.array([True, False]), 0.5).tolist() == expected


@pytest.mark.parametrize("critic", [True, False])
def test_the_critic_learns_what_the_actions_led_to_and_moves_nothing_else(critic):
    """The actor's weights are the same to the last bit whether the critic learns or not."""
    agent, args, obs, action = toy_problem()
    alone = deepcopy(agent)
    target = (obs - 5) @ torch.tensor([0.2, 0.1, -0.1])
    for one, learns in ((agent, critic), (alone, False)):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(one.parameters(), lr=3e-3)
        for _ in range(40):
            bc.fit_epoch(one, optimizer, replace(args, critic=learns), (obs, action, target))
    assert all(torch.equal(x, y) for x, y in zip(agent.actor.parameters(), alone.actor.parameters()))
    with torch.no_grad():
        error = (agent.value(obs) - target).square().mean() / target.square().mean()
    assert error < 0.1 if critic else error > 0.5


def test_an_epoch_sees_every_pair_once(monkeypatch):
    agent, args, obs, action = toy_problem()
    seen = []

    def loss(agent, args, obs, action):
        seen.append(torch.cat([obs, action], dim=1))
        return agent.log_std.sum()

    monkeypatch.setattr(bc, "bc_loss", loss)
    bc.fit_epoch(agent, torch.optim.AdamW(agent.parameters()), args, (obs, action, torch.zeros(len(obs))))
    pairs = torch.cat([obs, action], dim=1)
    assert {len(part) for part in seen} == {64}
    assert sorted(torch.cat(seen).tolist()) == sorted(pairs.tolist())
    assert not torch.equal(torch.cat(seen), pairs)


def play(policy, root):
    args = replace(settings_of(root, eval_episodes=100), env_id="CloneHome-v0")
    return rollout.evaluate(policy, args, "test")["mean_return"]


def test_a_clone_does_as_its_expert(root, fake_onnx):
    """At least 90 % of the way from doing nothing to the expert, on unseen starts."""
    args = settings_of(root, epochs=50, patience=50, learning_rate=1e-2, run_name="long")
    summary = bc.train(args)
    policy = run.load_policy(summary["run"], kind="policy")
    vec = envs.make_vec("CloneHome-v0", 1)
    agent = bc.make_agent(vec, replace(args, norm_obs=True))
    run.load_agent(agent, policy, replace(args, env_id="CloneHome-v0"), "")
    clone = rollout.Deployed(agent)
    nothing, ours, expert = (play(p, root) for p in (rollout.Zero(1), clone, Straight()))
    assert nothing + 0.9 * (expert - nothing) < ours <= expert + 0.1
    obs = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    assert np.abs(clone(obs) - Straight()(obs)).max() < 0.05
    rows = run.read_progress(run.run_folder(summary["run"]) / "progress.csv")
    assert float(rows[-1]["validation/loss"]) < 0.1 * float(rows[0]["validation/loss"])


def test_the_normaliser_is_that_of_the_training_episodes_and_is_saved(root, tmp_path, fake_onnx):
    name = f"normal_{tmp_path.name}"
    bc.train(settings_of(root, run_name=name))
    arrays, _ = read(root, "home")
    trains, _ = bc.split_episodes(arrays["start"], 0.1, 1)
    agent = run.load(run.Path(root) / name / "best.pt")["agent"]
    assert agent["normalizer.count"] == len(trains)
    assert agent["normalizer.mean"].numpy() == pytest.approx(arrays["obs"][trains].mean(0), rel=1e-4)
    assert agent["normalizer.var"].numpy() == pytest.approx(arrays["obs"][trains].var(0), rel=1e-4)
    assert arrays["obs"].mean(0) != pytest.approx(arrays["obs"][trains].mean(0), rel=1e-4)
    without = f"plain_{tmp_path.name}"
    bc.train(settings_of(root, run_name=without, norm_obs=False))
    assert not any("normalizer" in key for key in run.load(run.Path(root) / without / "best.pt")["agent"])


def test_the_best_epoch_is_kept_and_patience_ends_the_rest(root, tmp_path, monkeypatch, fake_onnx):
    """An epoch that makes things worse each time, but for the second."""
    epochs = []

    def worse(agent, optimizer, args, data):
        epochs.append(len(epochs) + 1)
        with torch.no_grad():
            agent.actor[-1].bias.fill_({1: 3.0, 2: 2.0}.get(len(epochs), 1.0 + len(epochs)))
        return 1.0

    monkeypatch.setattr(bc, "fit_epoch", worse)
    folder = run.Path(root) / f"patience_{tmp_path.name}"
    summary = bc.train(settings_of(root, run_name=folder.name, epochs=20, patience=3))
    assert epochs == [1, 2, 3, 4, 5]
    assert summary["best"]["step"] == 2
    best = run.load(folder / "best.pt")
    assert best["step"] == 2
    assert best["agent"]["actor.2.bias"].tolist() == [2.0]
    assert len(run.read_progress(folder / "progress.csv")) == 5


def test_a_clone_that_is_interrupted_says_so_and_does_not_offer_to_resume(root, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise run.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(bc, "fit_epoch", interrupted)
    folder = run.Path(root) / f"interrupted_{tmp_path.name}"
    with pytest.raises(run.Interrupted):
        bc.train(settings_of(root, run_name=folder.name))
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert "--resume" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def clone(root):
    """The directory of a clone for LateralControl-v0, ONNX file and all."""
    args = bc.Args("lateral", epochs=2, hidden_sizes=(8,), eval_episodes=2, run_root=root, run_name="clone")
    return args, bc.train(args)


def test_a_clone_leaves_a_whole_run(clone):
    args, summary = clone
    folder = run.Path(summary["run"])
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("events")}
    assert names >= {"config.json", "summary.json", "progress.csv", "evaluations.jsonl", "best.pt", "policy.onnx"}
    assert summary["status"] == "completed"
    assert summary["best"]["metrics"]["total_cost"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["env_id"] == "LateralControl-v0"
    file = run.dataset_file(args)
    assert config["parents"][str(file)]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    best = run.load_policy(str(folder), kind="policy")
    assert set(best) == set(run.POLICY_KEYS)
    assert best["env_kwargs"] == {"action_mode": "delta"}


def test_the_exported_clone_is_the_best_one(clone, root):
    folder = run.Path(clone[1]["run"])
    obs = read(root, "lateral")[0]["obs"][:64]
    args = replace(clone[0], env_id="LateralControl-v0", norm_obs=False)
    agent = bc.make_agent(LateralControl(), args)
    run.load_agent(agent, run.load(folder / "best.pt"), args, "")
    action = onnxruntime.InferenceSession(str(folder / "policy.onnx")).run(["action"], {"obs": obs})[0]
    np.testing.assert_allclose(action, agent(torch.as_tensor(obs)).detach(), rtol=0, atol=1e-5)


def test_ppo_goes_on_from_a_clone(clone, tmp_path, fake_onnx, monkeypatch):
    """With nothing but --pretrained and the sizes of its layers: all else that must match is tuned to."""
    seen, learn = [], ppo_continuous.learn

    def spy(agent, *args, **kwargs):
        seen.append({name: x.clone() for name, x in agent.state_dict().items()})
        return learn(agent, *args, **kwargs)

    monkeypatch.setattr(ppo_continuous, "learn", spy)
    settings = {"pretrained": clone[1]["run"], "hidden_sizes": (8,), "dry_run": True, "num_envs": 8, "num_steps": 8}
    settings |= {"minibatch_size": 64, "group_size": 1, "run_root": str(tmp_path), "run_name": "run"}
    summary = ppo_continuous.train(ppo_continuous.Args.tuned("LateralControl-v0", **settings))
    assert summary["status"] == "completed"
    theirs = run.load_policy(clone[1]["run"])["agent"]
    assert all(torch.equal(seen[0][name], x) for name, x in theirs.items() if name != "log_std")


def test_ppo_evaluates_a_clone(clone, root):
    policy = clone[1]["run"]
    settings = run.load_policy(policy)["args"]
    settings = {name: settings[name] for name in ("env_id", "env_kwargs", "norm_obs", "init_log_std", "hidden_sizes")}
    settings["hidden_sizes"] = tuple(settings["hidden_sizes"])
    args = ppo_continuous.Args(**{**settings, "evaluate": policy, "eval_episodes": 2})
    result = ppo_continuous.evaluate(args)
    assert result["episodes"] == 2
    assert result["metrics"]["total_cost"] == pytest.approx(-result["mean_return"])


def test_the_command_line_evaluates_a_clone_with_nothing_but_its_name(clone, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ppo_continuous.py", "--evaluate", clone[1]["run"], "--eval-episodes", "2"])
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        ppo_continuous.main()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert "2 episodes" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", [*bc.TUNED, *ppo_continuous.TUNED, "SO101Paper-v0"])
def test_a_clone_has_the_network_of_its_ppo_run(env_id):
    if env_id == "SocNavGrid-v0":
        theirs = ppo_grid_socnav.Args.tuned()
    else:
        theirs = ppo_residual.Args.tuned() if env_id == "SO101Paper-v0" else ppo_continuous.Args.tuned(env_id)
    ours = {**bc.UNTUNED, **bc.TUNED.get(env_id, {})}
    names = ("norm_obs", "hidden_sizes") if "-v5" in env_id else ("norm_obs", "hidden_sizes", "gamma")
    assert {name: ours[name] for name in names} == {name: getattr(theirs, name) for name in names}
    assert {name: getattr(bc.Args("x"), name) for name in bc.SIGHT} == {
        name: getattr(ppo_grid_socnav.Args.tuned(), name) for name in bc.SIGHT
    }


def test_a_mistake_ends_in_one_line(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bc_pretrain.py", "train", "--dataset", "none", "--run-root", root])
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            bc.main()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "no such demonstrations" in lines[0]
