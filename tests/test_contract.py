"""What every vector environment promises. `pytest tests/test_contract.py --env-id MODULE:ID` asks it of another one."""

import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import same

import envs
from envs import run
from envs.batch_env import SPLITS, BatchEnv

ROWS = 3
CALLS = 2000  # of step() at most, until an episode ends in every row


def pytest_generate_tests(metafunc):
    other = metafunc.config.getoption("env_id")
    metafunc.parametrize("env_id", [other] if other else envs.BUNDLED)


def make(env_id, rows=ROWS, split="test", training=False):
    vec = envs.make_vec(env_id, rows, training=training, split=split)
    assert isinstance(vec, BatchEnv)
    return vec


def random_actions(vec, calls=CALLS, seed=0):
    """A generator of (rows, actions), all over the bounds and each held for a while, lest nothing happens."""
    rng, space = np.random.default_rng(seed), vec.single_action_space
    for call in range(calls):
        if call % 10 == 0:
            action = rng.uniform(space.low, space.high, (ROWS, *space.shape)).astype(space.dtype)
        yield action


def played(vec, calls=CALLS):
    """The steps until an episode has ended in every row, as (action, what step() returned, a copy of it)."""
    steps, ended = [], np.zeros(ROWS, bool)
    for action in random_actions(vec, calls):
        step = vec.step(action)
        steps.append((action, step, deepcopy(step)))
        ended |= step[2] | step[3]
        if ended.all():
            return steps
    raise AssertionError(f"no episode ended in one of {ROWS} rows within {calls} calls")


def row(obs, i):
    """The observation of environment i."""
    return {name: np.asarray(x[i]) for name, x in obs.items()} if isinstance(obs, dict) else np.asarray(obs[i])


def assert_same(one, two):
    """Bit for bit, through dicts and tuples."""
    same(tensors(one), tensors(two))


def tensors(x):
    """With tensors for arrays of numbers, and lists for others."""
    if isinstance(x, dict):
        return {name: tensors(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return [tensors(value) for value in x]
    x = np.asarray(x)
    return torch.as_tensor(x) if x.dtype.kind in "bfiu" else x.tolist()


@pytest.mark.parametrize("training", [False, True])
def test_an_environment_alone_equals_its_row(env_id, training, smaller_training_world):
    """Up to the end of an episode: which one follows may depend on how many are played side by side."""
    vec = make(env_id, training=training)
    obs, _ = vec.reset(seed=[[7, i] for i in range(ROWS)])
    steps = played(vec)
    for i in range(ROWS):
        alone = make(env_id, 1, training=training)
        first, _ = alone.reset(seed=[[7, i]])
        assert_same(row(first, 0), row(obs, i))
        for action, _, (new, reward, terminated, truncated, info) in steps:
            own, *of_step, own_info = alone.step(action[i : i + 1])
            assert_same([x[0] for x in of_step], [x[i] for x in (reward, terminated, truncated)])
            if terminated[i] or truncated[i]:
                assert own_info.keys() == info.keys()
                assert_same(*(row(given["final_obs"], k) for given, k in ((own_info, 0), (info, i))))
                names = [name for name in info if f"_{name}" in info and name not in ("final_obs", "episode")]
                assert [own_info[name][0].item() for name in names] == [info[name][i].item() for name in names]
                break
            assert_same(row(own, 0), row(new, i))


def test_steps_keep_to_the_spaces_and_tell_how_an_episode_ended(env_id):
    vec = make(env_id)
    assert vec.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    obs, _ = vec.reset(seed=1)
    assert vec.observation_space.contains(obs)
    returns, lengths = np.zeros(ROWS), np.zeros(ROWS, int)
    for _, _, (obs, reward, terminated, truncated, info) in played(vec):
        assert vec.observation_space.contains(obs)
        assert np.isfinite(reward).all()
        assert not (terminated & truncated).any()
        returns, lengths, done = returns + np.asarray(reward), lengths + 1, np.asarray(terminated | truncated)
        if not done.any():
            assert info == {}
            continue
        assert vec.observation_space.contains(info["final_obs"])
        for i in np.flatnonzero(done):  # where it ended, not where the next one begins
            assert str(row(info["final_obs"], i)) != str(row(obs, i))
        np.testing.assert_array_equal(info["episode"]["l"][done], lengths[done])
        np.testing.assert_allclose(info["episode"]["r"][done], returns[done])
        for name in {name for name in info if not name.startswith("_")}:
            np.testing.assert_array_equal(info[f"_{name}"], done)
        returns[done], lengths[done] = 0, 0


def test_what_a_step_returned_does_not_change_later(env_id):
    vec = make(env_id)
    vec.reset(seed=2)
    for _, live, copy in played(vec):
        assert_same(live, copy)


@pytest.mark.parametrize("training", [False, True])
def test_stepping_continues_bit_for_bit_from_a_snapshot(env_id, training, smaller_training_world, tmp_path):
    """Through the end of an episode in every row, so that the next ones are drawn alike too."""
    vec, other = (make(env_id, training=training) for _ in range(2))
    vec.reset(seed=3)
    for action in random_actions(vec, 20):
        vec.step(action)
    run.save_pt(tmp_path / "snapshot.pt", vec.state_dict())
    expected = played(vec)
    other.reset(seed=4)
    other.load_state_dict(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    for action, _, step in expected:
        assert_same(other.step(action), step)


def test_a_reset_of_some_rows_leaves_the_others_alone(env_id):
    vec, untouched, fresh = make(env_id), make(env_id), make(env_id)
    for each, seed in ((vec, 5), (untouched, 5), (fresh, 6)):
        each.reset(seed=seed)
    actions = list(random_actions(vec, 12))
    for action in actions[:6]:
        vec.step(action)
        before, *_ = untouched.step(action)
    after, _ = vec.reset(seed=6, options={"reset_mask": np.arange(ROWS) == 1})
    assert_same(row(after, 0), row(before, 0))
    for action in actions[6:]:
        (mixed, *_), (old, *_), (new, *_) = (each.step(action) for each in (vec, untouched, fresh))
        for i in range(ROWS):
            assert_same(row(mixed, i), row(new if i == 1 else old, i))


def test_splits_hold_different_episodes(env_id):
    starts = []
    for split in SPLITS:
        vec = make(env_id, split=split)
        vec.reset(seed=7)
        starts.append(str(tensors(vec.state())))
    assert len(set(starts)) == len(SPLITS)


def test_gymnasium_finds_nothing_to_complain_about(env_id):
    module, _, name = env_id.rpartition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(f"{module or 'envs'}:{name}", training=False).unwrapped, skip_render_check=True)
