from typing import ClassVar, Literal

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs import UserError, make_vec, run
from envs.batch_env import SPLITS, BatchEnv, GymVec, SingleEnv
from envs.evaluation import episode_result, rollout, selection_key

LIMIT = 6
PUSH = np.array([[1.0], [0.0], [0.5]], np.float32)  # row 0 reaches the end, row 1 never, row 2 in between


class Toy(BatchEnv):
    """A point starts in [0, 1), moves by its action and a little noise, and has arrived beyond 2.5."""

    def __init__(
        self,
        num_envs: int = 1,
        training: bool = True,
        split: str = "train",
        render_mode: str | None = None,
        device: str | None = None,
        as_dict: bool = False,
        limit: int = LIMIT,
        weather: Literal["calm", "windy"] = "calm",
    ):
        box = gym.spaces.Box(-20, 20, (2,), np.float32)
        space = gym.spaces.Dict({"point": box, "clock": gym.spaces.Box(0, 100, (1,), np.float32)}) if as_dict else box
        action = gym.spaces.Box(-1, 1, (1,), np.float32)
        super().__init__(num_envs, space, action, limit, training, split, render_mode, device)
        self.device, self.as_dict = device, as_dict
        self.point, self.clock = self.array(np.zeros(num_envs)), self.array(np.zeros(num_envs, np.float32))

    def array(self, x):
        return np.array(x) if self.device is None else torch.as_tensor(np.array(x), device=self.device)

    def start(self, rows):
        for i in rows:
            self.point[i] = self.rngs[i].uniform()
        self.clock[rows] = 0

    def advance(self, action):
        self.point += action[:, 0] + self.array([rng.normal(0, 0.01) for rng in self.rngs])
        self.clock += 1
        arrived = self.point > 2.5
        return -abs(self.point - 2.5), arrived, {"is_success": arrived, "overshoot": self.point - 2.5}

    def observe(self, rows):
        stack = np.stack if self.device is None else torch.stack
        point = stack([self.point[rows], -self.point[rows]], 1)
        point = point.astype(np.float32) if self.device is None else point.float()
        return {"point": point, "clock": self.clock[rows][:, None]} if self.as_dict else point

    def state(self):
        return {"point": self.point, "clock": self.clock}


class ToyEnv(SingleEnv):
    batch_env = Toy


gym.register("Toy-v0", f"{__name__}:ToyEnv", vector_entry_point=f"{__name__}:Toy")


@pytest.fixture(params=[None, "cpu"], ids=["numpy", "torch"])
def device(request):
    return request.param


def actions(vec, value):
    return vec.array(np.broadcast_to(np.asarray(value, np.float32), (vec.num_envs, 1)).copy())


def plain(x):
    """With numpy arrays for tensors, and copied."""
    return {name: plain(value) for name, value in x.items()} if isinstance(x, dict) else np.asarray(x).copy()


def play(vec, value, steps):
    return [[plain(x) for x in vec.step(actions(vec, value))] for _ in range(steps)]


def assert_equal(one, two):
    """Bit for bit, through dicts and lists."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        one, two = list(one.values()), [two[name] for name in one]
    if isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_equal(a, b)
    else:
        np.testing.assert_array_equal(one, two)


# BatchEnv


def test_a_finished_row_begins_anew_in_the_same_step(device):
    vec = Toy(3, device=device)
    obs = plain(vec.reset(seed=0)[0])
    assert vec.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    returns, lengths, ended = np.zeros(3), np.zeros(3, int), np.zeros(3, int)
    rngs = [np.random.default_rng(np.random.SeedSequence([0, i])) for i in range(3)]
    point = np.array([rng.uniform() for rng in rngs])
    np.testing.assert_array_equal(obs, np.stack([point, -point], 1).astype(np.float32))
    for _ in range(4 * LIMIT):
        obs, reward, terminated, truncated, info = (plain(x) for x in vec.step(actions(vec, PUSH)))
        point = point + (PUSH[:, 0] + np.array([rng.normal(0, 0.01) for rng in rngs]))
        returns, lengths = returns - abs(point - 2.5), lengths + 1
        np.testing.assert_array_equal(reward, -abs(point - 2.5))
        np.testing.assert_array_equal(terminated, point > 2.5)
        np.testing.assert_array_equal(truncated, ~terminated & (lengths == LIMIT))
        done = terminated | truncated
        if not done.any():
            assert info == {}
        else:
            names = {"final_obs", "episode", "is_success", "overshoot"}
            assert info.keys() == names | {f"_{name}" for name in names}
            for name in names:
                np.testing.assert_array_equal(info[f"_{name}"], done)
            last = np.stack([point, -point], 1).astype(np.float32)
            np.testing.assert_array_equal(info["final_obs"][done], last[done])
            np.testing.assert_allclose(info["episode"]["r"][done], returns[done], rtol=1e-12)
            np.testing.assert_array_equal(info["episode"]["l"][done], lengths[done])
            np.testing.assert_array_equal(info["is_success"][done], terminated[done])
            np.testing.assert_array_equal(info["overshoot"][done], point[done] - 2.5)
            returns[done], lengths[done] = 0, 0
            for i in np.flatnonzero(done):
                point[i] = rngs[i].uniform()
        np.testing.assert_array_equal(obs, np.stack([point, -point], 1).astype(np.float32))
        ended += done
    assert (ended >= [6, 4, 4]).all()


@pytest.mark.parametrize("as_dict", [False, True])
def test_torch_equals_numpy(as_dict):
    one, two = (Toy(3, as_dict=as_dict, device=device) for device in (None, "cpu"))
    assert_equal(plain(one.reset(seed=3)[0]), plain(two.reset(seed=3)[0]))
    assert_equal(play(one, PUSH, 20), play(two, PUSH, 20))


def test_seeds():
    """Row i of an int s has SeedSequence([s, i]); a list is taken as it is; without a seed the generators run on."""

    def draws(*sequences):
        return [np.random.default_rng(np.random.SeedSequence(s)).uniform() for s in sequences]

    vec = Toy(3)
    vec.reset(seed=7)
    np.testing.assert_array_equal(vec.point, draws([7, 0], [7, 1], [7, 2]))
    vec.reset(seed=np.int64(7))
    np.testing.assert_array_equal(vec.point, draws([7, 0], [7, 1], [7, 2]))
    vec.reset(seed=[5, [1, 2, 3], 9])
    np.testing.assert_array_equal(vec.point, draws(5, [1, 2, 3], 9))
    first = vec.point.copy()
    vec.reset()
    second = [np.random.default_rng(np.random.SeedSequence(s)).uniform(size=2)[1] for s in (5, [1, 2, 3], 9)]
    np.testing.assert_array_equal(vec.point, second)
    assert not np.isin(vec.point, first).any()


def test_splits_never_share_a_draw():
    starts = []
    for split in SPLITS:
        vec = Toy(20, split=split)
        for seed in range(3):
            vec.reset(seed=seed)
            starts += vec.point.tolist()
    assert len(set(starts)) == 3 * 3 * 20


def test_stepping_continues_bit_for_bit_from_a_snapshot(device, tmp_path):
    vec = Toy(3, device=device)
    vec.reset(seed=1)
    play(vec, PUSH, 4)
    snapshot = vec.state_dict()
    run.save_pt(tmp_path / "state.pt", snapshot)
    expected = play(vec, PUSH, 20)
    fresh = Toy(3, device=device)
    for other, state in ((vec, snapshot), (fresh, torch.load(tmp_path / "state.pt", weights_only=True))):
        other.load_state_dict(state)
        assert_equal(play(other, PUSH, 20), expected)


# SingleEnv


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_single_environment_is_a_row_of_a_batch(as_dict):
    batch = Toy(3, as_dict=as_dict)
    singles = [ToyEnv(as_dict=as_dict) for _ in range(3)]
    obs = batch.reset(seed=5)[0]
    own = [single.reset(seed=[5, i])[0] for i, single in enumerate(singles)]
    for _ in range(4 * LIMIT):
        for i in range(3):
            assert_equal(own[i], {k: v[i] for k, v in obs.items()} if as_dict else obs[i])
        obs, reward, terminated, truncated, info = batch.step(PUSH)
        for i, single in enumerate(singles):
            own[i], own_reward, own_terminated, own_truncated, own_info = single.step(PUSH[i])
            assert (own_reward, own_terminated, own_truncated) == (reward[i], terminated[i], truncated[i])
            assert type(own_reward) is float
            assert type(own_terminated) is bool
            if own_terminated or own_truncated:
                final = info["final_obs"]
                assert_equal(own[i], {k: v[i] for k, v in final.items()} if as_dict else final[i])
                assert type(own_info["overshoot"]) is float
                assert own_info == {name: info[name][i] for name in ("is_success", "overshoot")}
                own[i] = single.reset()[0]  # takes the episode that the batch began, as the row of the batch does
            else:
                assert own_info == {}


# Gymnasium's own environments


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_gym_vec_has_the_shape_of_a_batch_env(vectorization):
    """Beside ordinary environments with the seeds that it states, on two that are cut off and one that falls."""
    for env_id, push, limit in (("Pendulum-v1", 1.0, 7), ("InvertedPendulum-v5", 2.0, 20)):
        vec = make_vec(env_id, 3, vectorization=vectorization, max_episode_steps=limit)
        obs, _ = vec.reset(seed=11)
        singles = [gym.make(env_id, max_episode_steps=limit) for _ in range(3)]
        seeds = [int(np.random.SeedSequence([11, i]).generate_state(1)[0]) for i in range(3)]
        own = [single.reset(seed=seed)[0] for single, seed in zip(singles, seeds)]
        np.testing.assert_array_equal(obs, np.float32(own))  # the environment's own are float64
        assert vec.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
        action = push * np.array([[1.0], [-1.0], [0.0]], np.float32)
        returns, lengths, ended = np.zeros(3), np.zeros(3, int), np.zeros(2, int)
        for _ in range(3 * limit):
            obs, reward, terminated, truncated, info = vec.step(action)
            lengths += 1
            final = np.zeros_like(obs)
            for i, single in enumerate(singles):
                own[i], own_reward, own_terminated, own_truncated, _ = single.step(action[i])
                assert (reward[i], terminated[i], truncated[i]) == (own_reward, own_terminated, own_truncated)
                returns[i] += own_reward
                final[i] = own[i]
                if own_terminated or own_truncated:
                    own[i] = single.reset()[0]
            np.testing.assert_array_equal(obs, np.float32(own))
            done = terminated | truncated
            ended += [terminated.sum(), truncated.sum()]
            if not done.any():
                assert "episode" not in info
                continue
            np.testing.assert_array_equal(info["_episode"], done)
            np.testing.assert_array_equal(info["_final_obs"], done)
            np.testing.assert_array_equal(info["final_obs"], final)
            np.testing.assert_allclose(info["episode"]["r"][done], returns[done])
            np.testing.assert_array_equal(info["episode"]["l"][done], lengths[done])
            returns[done], lengths[done] = 0, 0
        assert ended[0 if env_id == "InvertedPendulum-v5" else 1] >= 3
        vec.close()


class Counter(gym.Env):
    """Counts to 3 and succeeds after an action above 0."""

    observation_space, action_space = gym.spaces.Box(0, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        info = {"is_success": bool(action[0] > 0)} if self.count == 3 else {}
        return np.full(1, self.count, np.float32), 1.0, self.count == 3, False, info


class CounterVec(gym.vector.SyncVectorEnv):
    """A vector environment of one's own."""

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs):
        super().__init__([Counter] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


gym.register("Counter-v0", entry_point=Counter, vector_entry_point=CounterVec)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_vector_environments_of_ones_own_are_used(vectorization):
    """With the episodes' results, and a reset of some environments."""
    vec = make_vec("Counter-v0", 2, seed=1, vectorization=vectorization)
    assert isinstance(vec.vec, CounterVec if vectorization == "sync" else gym.vector.AsyncVectorEnv)
    vec.step(np.ones((2, 1), np.float32))
    obs, _ = vec.reset(seed=2, options={"reset_mask": np.array([True, False])})
    assert obs.tolist() == [[0], [1]]
    for _ in range(2):
        obs, reward, terminated, _, info = vec.step(np.array([[-1.0], [1.0]], np.float32))
    assert (obs.tolist(), terminated.tolist(), reward.tolist()) == ([[2], [0]], [False, True], [1, 1])
    assert (info["final_obs"][1].tolist(), info["episode"]["r"][1], info["episode"]["l"][1]) == ([3], 3, 3)
    assert episode_result(info, 1)["success"] is True
    _, _, terminated, _, info = vec.step(np.array([[-1.0], [1.0]], np.float32))
    assert (terminated.tolist(), episode_result(info, 0)["success"]) == ([True, False], False)
    vec.close()


def test_gym_vec_resumes_with_episodes_not_played_before():
    vec, resumed = GymVec("Pendulum-v1", 2), GymVec("Pendulum-v1", 2)
    first, _ = vec.reset(seed=5)
    vec.step(np.ones((2, 1), np.float32))
    state = vec.state_dict()
    obs = resumed.load_state_dict(state)
    assert not np.isin(obs, first).any()
    assert resumed.state_dict() == state  # so that it can be resumed once more
    resumed.step(np.ones((2, 1), np.float32))
    assert not np.isin(vec.load_state_dict(resumed.state_dict()), obs).any()


# make_vec


@pytest.mark.parametrize(
    ("env_id", "num_envs", "arguments", "message"),
    [
        ("SO101Papre-v0", 1, {}, r"SO101Papre-v0: .*The bundled environments are .*SO101Paper-v0"),
        ("SO101Paper-v9", 1, {}, r"SO101Paper-v9: "),
        ("nowhere:Pendulum-v1", 1, {}, r"nowhere:Pendulum-v1: No module named 'nowhere'; add its folder to PYTHONPATH"),
        ("SO101Paper-v0", 1, {"margin": 0.1}, r"SO101Paper-v0: unknown argument 'margin'; it takes .*frame_margin"),
        ("SO101Paper-v0", 1, {"frame_margin": "wide"}, r"SO101Paper-v0: frame_margin must be float, not 'wide'"),
        ("SO101Paper-v0", 1, {"randomize": 1}, r"SO101Paper-v0: randomize must be bool, not 1"),
        ("SO101Paper-v0", 1, {"frame_margin": -1.0}, r"SO101Paper-v0: frame_margin must be above 0"),
        ("SO101Paper-v0", 1, {"split": "tset"}, r"SO101Paper-v0: split must be one of .*train.*, not 'tset'"),
        ("SO101Paper-v0", 1, {"copies": 2}, r"--group-size: SO101Paper-v0 cannot put several environments in one"),
    ],
)
def test_make_vec_explains_mistakes_in_one_line(env_id, num_envs, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        envs.make_vec(env_id, num_envs, **arguments)
    assert "\n" not in str(error.value)


def test_errors_of_other_environments_stay_as_they_are():
    """A mistake in somebody else's code is not the user's."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'wind'"):
        envs.make_vec("Toy-v0", 1, wind=2.0)
    with pytest.raises(TypeError, match="gravity"):
        envs.make_vec("Pendulum-v1", 1, gravity=9.8)


# rollout


def approach(obs):
    """Some episodes arrive and some run out of time."""
    return np.where(obs[:, :1] < 0.6, 0.05, 0.8).astype(np.float32)


def one_by_one(policy, episodes, seed):
    """The episodes, each played alone in an environment of its own."""
    results = []
    for i in range(episodes):
        vec, total, length, done = Toy(1), 0.0, 0, False
        obs, _ = vec.reset(seed=[[seed, i]])
        while not done:
            obs, reward, terminated, truncated, info = vec.step(policy(obs))
            total, length, done = total + reward[0], length + 1, terminated[0] or truncated[0]
        success, overshoot = bool(terminated[0]), info["overshoot"][0]
        results.append({"return": total, "length": length, "success": success, "failure": None, "overshoot": overshoot})
    return results


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), episodes=st.integers(1, 14), seed=st.integers(0, 2**31))
def test_an_episode_does_not_depend_on_its_row(rows, episodes, seed):
    assert rollout(approach, Toy(rows), episodes, seed) == one_by_one(approach, episodes, seed)


def test_an_evaluation_does_not_step_environments_that_have_finished(monkeypatch):
    """Three episodes of 200 steps in two environments; and a simulator is told which environments still run."""
    steps, pendulum = [], gym.envs.classic_control.PendulumEnv
    step = pendulum.step
    monkeypatch.setattr(pendulum, "step", lambda self, action: steps.append(1) or step(self, action))
    rollout(lambda obs: np.zeros((2, 1)), make_vec("Pendulum-v1", 2), 3, seed=0)
    assert len(steps) == 600

    running = []
    vec = Toy(2)
    monkeypatch.setattr(vec, "advance", lambda action: running.append(vec.running) or Toy.advance(vec, action))
    lengths = [result["length"] for result in rollout(lambda obs: PUSH[:2], vec, 2, seed=0)]
    assert lengths[0] < lengths[1] == LIMIT
    assert running[: lengths[0]] == [None] * lengths[0]
    assert [x.tolist() for x in running[lengths[0] :]] == [[1]] * (LIMIT - lengths[0])


def test_the_best_policy_is_chosen_by_success_then_by_the_tasks_score_or_else_return():
    def result(success, mean_return, **metrics):
        return {"success_rate": success, "mean_return": mean_return, "metrics": metrics}

    assert selection_key(result(None, -5.0)) > selection_key(result(None, -6.0))
    assert selection_key(result(0.9, -5.0)) > selection_key(result(0.8, 5.0))
    # a few extreme roads make the return worse and the score better
    assert selection_key(result(None, -60.0, score=-46.0)) > selection_key(result(None, -50.0, score=-47.0))


def test_a_policy_with_state_is_reset_as_each_episode_begins():
    class Counting:
        """Pushes harder with every step of an episode, so a count that runs on would show in the result."""

        def __init__(self, rows):
            self.count = np.zeros(rows)

        def reset(self, rows, vec):
            self.count[rows] = 0

        def __call__(self, obs):
            self.count += 1
            return (0.1 * self.count * (1 + obs[:, 0] % 1))[:, None].clip(-1, 1).astype(np.float32)

    expected = rollout(Counting(1), Toy(1), 9, seed=0)
    assert rollout(Counting(4), Toy(4), 9, seed=0) == expected
    assert len({result["length"] for result in expected}) > 1


def test_rollout_names_the_episode_of_an_action_that_is_not_finite():
    def policy(obs):
        calls.append(1)
        return np.where((len(calls) == LIMIT + 2) & (np.arange(2)[:, None] == 1), np.nan, np.zeros((2, 1)))

    calls = []
    with pytest.raises(
        FloatingPointError, match=r"action is not finite at a step of the episodes \[2, 3\] in environment 1"
    ):
        rollout(policy, Toy(2), 6, seed=0)


# Types
