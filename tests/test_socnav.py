import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs import UserError
from envs.evaluation import make_scripted_policy, rollout
from envs.socnav import GOAL_RANGE, PEDESTRIAN_RANGE, environment, metrics
from envs.socnav.controllers import Pursuit
from envs.socnav.environment import SocNavGrid
from envs.socnav.scenarios import TRAINING_VARIANTS, VALIDATION_VARIANTS, Scenario, Stream, choose, load_scenarios

pytestmark = pytest.mark.usefixtures("smaller_training_world")

TINY = {"grid_size": 2, "grid_channels": "obstacles"}  # where nobody looks at the grid
CORRIDOR = {"split": "train", "scenario": "francis2023_frontal_approach"}
ROBOTS = [
    {},
    {"robot": "bicycle"},
    {"robot": "bicycle", "allow_backwards": True},
    {"allow_backwards": True, "robot_radius": 1.0},
]


def wandering(vec, steps, seed=0):
    """Actions (T, N, 2) that drive about, forwards more than backwards; those of a row depend on its number alone."""
    low, high = vec.single_action_space.low, vec.single_action_space.high
    noise = np.stack([np.random.default_rng([seed, i]).normal(0, 0.3, (steps, 2)) for i in range(vec.num_envs)], 1)
    actions, last = [], np.zeros((vec.num_envs, 2))
    for step in noise:
        last = np.clip(0.9 * last + step + [0.06, 0], -1, 1)
        actions.append((last * high).astype(np.float32))
    assert (np.abs(low) == high).all()
    return np.stack(actions)


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], name)


def row(obs, i):
    return {name: x[i] for name, x in obs.items()}


# What the contract's test leaves open


def test_workers_of_an_async_vector_env_step():
    """They are forks of a process whose PyTorch has begun threads, which a fork does not have."""
    script = """
import gymnasium as gym, torch
torch.set_num_threads(2)
(torch.rand(10**6) + 1).exp()
kwargs = {"scenario": "francis2023_frontal_approach", "grid_size": 2, "grid_channels": "obstacles"}
vec = gym.make_vec("envs:SocNavGrid-v0", 2, vectorization_mode="async", **kwargs)
vec.reset(seed=1)
for _ in range(3):
    obs = vec.step(vec.action_space.sample())[0]
assert vec.observation_space.contains(obs)
vec.close()
"""
    folder = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder, start_new_session=True) as process:
        try:
            assert process.wait(60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):  # ends the workers too
                os.killpg(process.pid, signal.SIGKILL)


@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(ROBOTS),
    st.sampled_from(["obstacles", "near,combined", "pedestrians,obstacles,near", "combined,pedestrians"]),
    st.sampled_from([(64, 0.5), (8, 2.0), (32, 0.1), (2, 0.25)]),
    st.sampled_from([("train", True), ("test", False)]),
)
def test_observations_stay_inside_their_space(seed, robot, channels, grid, split):
    grid = {"grid_channels": channels, "grid_size": grid[0], "grid_resolution": grid[1]}
    vec = SocNavGrid(3, split=split[0], training=split[1], **robot, **grid)
    obs, _ = vec.reset(seed=seed)
    for action in wandering(vec, 40, seed):
        assert vec.observation_space.contains(obs)
        obs, reward, *_, info = vec.step(10 * action)  # clipped to its bounds
        assert np.isfinite(reward).all()
        if info:
            assert vec.observation_space.contains(info["final_obs"])


def test_rows_do_not_depend_on_their_neighbours():
    """The sizes of everything differ, and with them where vectors end."""
    seeds = [[7, i] for i in range(23)]
    vec = SocNavGrid(23, grid_size=16)
    vec.reset(seed=seeds)
    actions = wandering(vec, 80)
    played = [vec.step(action)[0] for action in actions]
    for some in ([4], [0, 9, 22], [*range(11, 18)]):
        fewer = SocNavGrid(len(some), grid_size=16)
        fewer.reset(seed=[seeds[i] for i in some])
        for action, obs in zip(actions, played):
            assert_equal(fewer.step(action[some])[0], row(obs, some))


def test_a_snapshot_of_other_scenarios_is_refused():
    state = SocNavGrid(1, **CORRIDOR, **TINY).state_dict()
    with pytest.raises(UserError, match="other scenarios"):
        SocNavGrid(1, split="train", scenario="francis2023_down_path", **TINY).load_state_dict(state)


# Which episodes


def test_splits_never_share_a_start():
    seen = set()
    for split, training in (("train", True), ("train", False), ("validation", False), ("test", False)):
        world = environment.load_world(split, training, None, True, None, "cpu")
        ends = torch.cat([world.waypoints[:, :, 0], world.waypoints[:, :, -1]], 1)
        points = {tuple(x) for x in ends.T.tolist()}
        assert len(points) == 2 * len(world.names) * world.starts_each
        assert not seen & points
        seen |= points


def test_what_is_learnt_from_is_not_what_is_measured_on():
    train, validation, test = (
        {one.name for one in choose(split, False, None)} for split in ("train", "validation", "test")
    )
    training = {one.name for one in choose("train", True, None)}
    assert (len(train), len(test), len(training)) == (39, 9, 468)
    assert not train & validation
    assert not training & (validation | test)
    assert not test & (train | validation)
    assert not {*TRAINING_VARIANTS} & {*VALIDATION_VARIANTS}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("training", [True, False])
def test_the_hold_outs_are_for_the_test_split_alone(split, training):
    for name, scenario in load_scenarios().items():
        if scenario.split == "test":
            with pytest.raises(UserError, match=f"{name} is kept for the test split"):
                envs.make_vec("SocNavGrid-v0", 1, split=split, training=training, scenario=name)
    assert envs.make_vec("SocNavGrid-v0", 1, split="test", training=False, scenario=name).world.names == [name]


def test_evaluation_plays_the_scenarios_in_turn_whatever_the_rows():
    results = []
    for rows in (3, 7):
        vec = SocNavGrid(rows, training=False, split="test", **TINY)
        results.append(rollout(make_scripted_policy("pursuit", vec), vec, 13, seed=5))
    assert results[0] == results[1]
    names = vec.world.names
    assert [result["scenario"] for result in results[0]] == [names[i % 9] for i in range(13)]
    assert len({result["return"] for result in results[0]}) > 9  # another start each time
    assert {result["success"] for result in results[0]} == {True, False}


def test_a_row_goes_on_with_the_scenario_whose_turn_it_is():
    vec = SocNavGrid(4, training=False, split="test", **TINY)
    vec.reset(seed=0)
    for turn in range(4):
        playing = vec.world.map[vec.crowd.start].tolist()
        assert playing == [(4 * turn + i) % 9 for i in range(4)]
        vec.episode_length[:] = 10_000  # the next step is the last
        *_, truncated, info = vec.step(np.zeros((4, 2), np.float32))
        assert truncated.all()
        assert info["scenario"].tolist() == [vec.world.names[m] for m in playing]


def test_training_draws_scenarios_at_random():
    vec = SocNavGrid(64, **TINY)
    maps = []
    for seed in range(4):
        vec.reset(seed=seed)
        maps += vec.world.map[vec.crowd.start].tolist()
    assert len({*maps}) > 80  # of 94
    vec.reset(seed=0)
    assert vec.world.map[vec.crowd.start].tolist() == maps[:64]


# One step on a stage: a route, walls and people that a test chooses

FAR_WALL = (900.0, 900.0, 901.0, 901.0)


def on_stage(vec, pose, speed=(0.0, 0.0), route=((10, 5), (30, 5)), walls=(), people=(), felt=0.0, limit=400):
    """Row 0 at this pose and speed; people stand where they are told after the step."""
    route = torch.tensor(route, dtype=torch.float32).T[:, None]
    along = route[:, :, 1:] - route[:, :, :-1]
    leg = along.square().sum(0).sqrt()
    arc = torch.cat([torch.zeros(1, 1), leg.cumsum(1)], 1)
    boxes = torch.tensor([*walls, FAR_WALL], dtype=torch.float32).T[:, None]
    count = torch.tensor([max(len(people), 1)])
    vec.place = vec.place._replace(
        waypoints=route, along=along, leg=leg, arc=arc, rectangles=boxes, limit=torch.tensor([limit]), people=count
    )
    vec.limit = np.array([limit])
    vec.pose[:, 0], vec.speed[:, 0] = torch.tensor(pose), torch.tensor(speed)
    vec.arc[:] = vec._arc()

    def step(pose):
        vec.crowd.position[:] = 1e4
        for k, person in enumerate(people):
            vec.crowd.position[:, 0, k] = torch.tensor(person)
        return torch.tensor([float(felt)])

    vec.crowd.step = step
    step(None)


def staged(**how):
    vec = SocNavGrid(1, training=False, split="train", scenario="classic_head_on_corridor_medium", **TINY)
    vec.reset(seed=0)
    on_stage(vec, **how)
    return vec


def act(vec, *action):
    _, reward, terminated, truncated, info = vec.step(np.array([action], np.float32))
    flags = {name: bool(info[name][0]) for name in ("is_success", "is_failure") if info}
    what = {name: info[name][0] for name in ("pedestrian_collision", "obstacle_collision", "timeout") if info}
    return reward[0], terminated[0], truncated[0], flags, what, info


def test_success_is_to_come_near_the_goal():
    vec = staged(pose=(28.0, 5.0, 0.0), speed=(1.5, 0.0))
    total = 0
    for step in range(3):  # 0.15 m each, to 1.6 m from the goal
        reward, terminated, truncated, flags, what, info = act(vec, 0.0, 0.0)
        total += reward
        assert terminated == (step == 2)
    assert not truncated
    assert flags == {"is_success": True, "is_failure": False}
    assert set(what.values()) == {0}
    assert total == pytest.approx(1 - 0.1 * 3 / 400, abs=1e-6)
    assert info["episode"]["r"][0] == pytest.approx(total)
    assert info["episode"]["l"][0] == 3


def test_contact_with_a_pedestrian_is_failure():
    vec = staged(pose=(20.0, 5.0, 0.0), speed=(1.0, 0.0), people=[(21.15, 5.0), (5, 5)])
    reward, terminated, *_ = act(vec, 0.0, 0.0)  # 1.05 m apart
    assert (reward, terminated) == (pytest.approx(-0.1 / 400), False)
    reward, terminated, truncated, flags, what, info = act(vec, 0.0, 0.0)  # 0.95 m
    assert reward == pytest.approx(-5 - 0.1 / 400)
    assert (terminated, truncated) == (True, False)
    assert flags == {"is_success": False, "is_failure": True}
    assert what == {"pedestrian_collision": 1, "obstacle_collision": 0, "timeout": 0}
    assert info["near_misses"][0] == 1  # the contact is none


def test_contact_with_a_wall_is_failure():
    vec = staged(pose=(20.0, 5.0, 0.0), speed=(1.0, 0.0), walls=[(20.75, 0, 22, 10)])
    assert not act(vec, 0.0, 0.0)[1]  # 0.65 m away
    reward, terminated, truncated, flags, what, _ = act(vec, 0.0, 0.0)
    assert reward == pytest.approx(-2 - 0.1 / 400)
    assert (terminated, truncated) == (True, False)
    assert flags == {"is_success": False, "is_failure": True}
    assert what == {"pedestrian_collision": 0, "obstacle_collision": 1, "timeout": 0}


def test_contact_at_the_goal_is_no_success():
    vec = staged(pose=(28.3, 5.0, 0.0), speed=(1.5, 0.0), people=[(29.4, 5.0)], walls=[(28, 5.6, 30, 6)])
    reward, terminated, _, flags, what, _ = act(vec, 0.0, 0.0)
    assert (reward, terminated) == (pytest.approx(-7 - 0.1 / 400), True)
    assert flags == {"is_success": False, "is_failure": True}
    assert what == {"pedestrian_collision": 1, "obstacle_collision": 1, "timeout": 0}


def test_the_time_limit_truncates():
    vec = staged(pose=(20.0, 5.0, 0.0), limit=3)
    rewards = []
    for step in range(3):
        reward, terminated, truncated, flags, what, info = act(vec, 0.0, 0.0)
        rewards.append(reward)
        assert (terminated, truncated) == (False, step == 2)
    assert flags == {"is_success": False, "is_failure": False}
    assert what == {"pedestrian_collision": 0, "obstacle_collision": 0, "timeout": 1}
    assert sum(rewards) == pytest.approx(-0.1)
    assert info["time_to_goal"][0] == pytest.approx(0.3)


def test_who_arrives_in_the_last_step_has_succeeded():
    vec = staged(pose=(28.3, 5.0, 0.0), speed=(1.5, 0.0), limit=1)
    _, terminated, truncated, flags, what, _ = act(vec, 0.0, 0.0)
    assert (terminated, truncated, flags["is_success"], what["timeout"]) == (True, False, True, 0)


def test_limits_are_those_of_the_scenarios():
    vec = SocNavGrid(9, training=False, split="test", **TINY)
    vec.reset(seed=0)
    assert vec.limit.tolist() == [load_scenarios()[name].time_limit for name in vec.world.names]
    assert {*vec.limit.tolist()} == {400, 500}


OURS = {
    "weights": {"success": 1.0, "time": 0.8, "collisions": 2.0, "near_misses": 1.0, "comfort_exposure": 0.5,
                "force_exceed": 1.5, "jerk": 0.3},
    "baselines": {"collisions": {"median": 0, "p95": 1}, "near_misses": {"median": 0, "p95": 10},
                  "force_exceed": {"median": 1, "p95": 51}, "jerk": {"median": 0.5, "p95": 0.9}},
}  # fmt: skip


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


# What a step costs

EXPECTED = {  # of the step below
    "step": 1, "time": 1 / 400, "progress": 0.1025, "goal": 0, "pedestrian_contact": 0, "obstacle_contact": 0,
    "timeout": 0, "near_miss": 0.6, "near_wall": 0.5, "near_step": 1, "force_exceed": 3, "comfort": 0.75,
    "action_change": 0.583095, "action_change_squared": 0.34, "stagnation": 0, "backwards": 0,
}  # fmt: skip


def a_step(vec):
    """From 1 m/s on, at 0.5 m/s^2 after 0.2 m/s^2, 0.2 m beside one of four pedestrians and 0.15 m beside a wall."""
    people = [(20.1025, 6.2), (3, 3), (4, 3), (5, 3)]
    on_stage(vec, (20.0, 5.0, 0.0), (1.0, 0.0), walls=[(15, 4, 25, 4.25)], people=people, felt=3)
    vec.action[:, 0] = torch.tensor([0.2, 0.5])
    return vec.step(np.array([[0.5, 0.0]], np.float32))[1][0]


@pytest.fixture(scope="module")
def in_training():
    vec = SocNavGrid(1, scenario="classic_head_on_corridor_medium", allow_backwards=True, **TINY)
    vec.reset(seed=0)
    return vec


def test_the_terms_of_rewards(in_training):
    vec = in_training
    assert EXPECTED.keys() == metrics.TERMS.keys()
    for name, value in EXPECTED.items():
        vec.weights = {name: 1.0}
        assert a_step(vec) == pytest.approx(value, abs=1e-5), name


def test_actions_count_as_they_are_clipped(in_training):
    vec, seen = in_training, []
    vec.weights = {"action_change": 1.0}
    for action in ((7.0, -3.0), (1.0, -1.0)):
        on_stage(vec, (20.0, 5.0, 0.0), (1.0, 0.0))
        vec.action[:] = 0
        obs, reward, *_ = vec.step(np.array([action], np.float32))
        assert reward[0] == pytest.approx(math.sqrt(2))
        seen.append(obs["robot"][0].tolist())
    assert seen[0] == seen[1] == pytest.approx([1.1 / 2, -0.1, 1, -1])


def test_the_terms_of_driving_backwards_and_of_contacts(in_training):
    vec = in_training
    where = {"pose": (20.0, 5.0, 0.0), "speed": (-0.5, 0.0), "people": [(20.0, 5.5)], "walls": [(15, 4, 25, 4.5)]}
    expected = {
        "progress": -0.05, "stagnation": 1, "backwards": 0.05, "near_step": 0, "near_miss": 1, "near_wall": 1,
        "pedestrian_contact": 1, "obstacle_contact": 1, "goal": 0, "timeout": 0,
    }  # fmt: skip
    for name, value in expected.items():
        on_stage(vec, **where)
        vec.weights = {name: 1.0}
        assert vec.step(np.zeros((1, 2), np.float32))[1][0] == pytest.approx(value, abs=1e-5), name
    for name, value in {"timeout": 1, "goal": 0, "progress": 0, "stagnation": 1, "backwards": 0}.items():
        on_stage(vec, (20.0, 5.0, 0.0), limit=1)
        vec.weights = {name: 1.0}
        assert vec.step(np.zeros((1, 2), np.float32))[1][0] == value, name
    for name, value in {"timeout": 0, "goal": 1, "progress": 0.1}.items():
        on_stage(vec, (28.35, 5.0, 0.0), (1.0, 0.0), limit=1)
        vec.weights = {name: 1.0}
        assert vec.step(np.zeros((1, 2), np.float32))[1][0] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("simple", -0.1 / 400),
        ("punish_action", -0.1 / 400 - 0.1 * 0.583095),
        ("route_completion", -0.01 + 1.0 * 0.1025 - 0.1 * 0.6 - 0.1 * 0.5 - 0.01 * 0.34),  # it does not stagnate
        # in an episode of (4 * 500 + 2 * 575) / 6 = 525 steps on average
        ("snqi_step", -0.8 / 400 - 1.0 / 10 - 0.5 * 0.75 / 525 - 1.5 * 3 / 50 - 0.3 / 0.4 * 0.583095 / 525),
    ],
)
def test_each_reward_by_hand(reward, expected, tmp_path):
    arguments = {
        "scenario": "classic_head_on_corridor_medium",
        "snqi": write_json(tmp_path / "snqi.json", OURS),
        **TINY,
    }
    vec = SocNavGrid(1, reward=reward, **arguments)
    vec.reset(seed=0)
    assert a_step(vec) == pytest.approx(expected, abs=1e-5)
    vec = SocNavGrid(1, training=False, reward=reward, **arguments)
    vec.reset(seed=0)
    assert a_step(vec) == pytest.approx(-0.1 / 400, abs=1e-7)  # the published task pays the same whatever was trained


@pytest.mark.parametrize(
    ("reward", "contact", "goal"),
    [
        ("simple", (-5, -2), 1),
        ("punish_action", (-5, -2), 1),
        ("route_completion", (-10, -10), 5),
        ("snqi_step", (-2, -2), 1),
    ],
)
def test_what_contacts_and_the_goal_are_worth(reward, contact, goal):
    weights = metrics.reward_weights(reward, None, metrics.load_snqi(None), 500)
    assert (weights["pedestrian_contact"], weights["obstacle_contact"], weights["goal"]) == (*contact, goal)
    assert weights.get("stagnation", 0) == (-0.05 if reward == "route_completion" else 0)


def test_weights_from_a_file(tmp_path):
    weights = {**dict.fromkeys(metrics.REWARDS["simple"], 0), "near_wall": -2.0, "step": 0.25}
    file = write_json(tmp_path / "weights.json", weights)
    arguments = {"scenario": "classic_head_on_corridor_medium", "reward": "simple", "reward_weights": file, **TINY}
    vec = SocNavGrid(1, **arguments)
    vec.reset(seed=0)
    assert a_step(vec) == pytest.approx(0.25 - 2 * 0.5, abs=1e-5)
    for change, message in (
        ({"goal": None}, "goal must be a number, not None"),
        ({"timeout": True}, "timeout must be a number, not True"),
        ({"speed": 1.0}, "no term speed; there are step, time, progress"),
    ):
        write_json(tmp_path / "weights.json", weights | change)
        with pytest.raises(UserError, match=message):
            envs.make_vec("SocNavGrid-v0", 1, **arguments)
    write_json(tmp_path / "weights.json", {"time": 1.0, "goal": 1.0})
    with pytest.raises(UserError, match="must have pedestrian_contact, obstacle_contact"):
        envs.make_vec("SocNavGrid-v0", 1, **arguments)


# What an episode is judged by


def test_metrics_of_a_short_episode_by_hand(tmp_path):
    arguments = {
        "scenario": "classic_head_on_corridor_medium",
        "snqi": write_json(tmp_path / "snqi.json", OURS),
        **TINY,
    }
    vec = SocNavGrid(1, training=False, **arguments)
    vec.reset(seed=0)
    steps = [  # action, where it leads, where the first of two pedestrians stands beside the robot, how many feel it
        ((0.0, 0.0), 8.1, 1.6, 1),  # 0.6 m of clearance
        ((1.0, 0.0), 8.205, 1.4, 0),
        ((1.0, 0.0), 8.32, -1.3, 2),
        ((-1.0, 1.0), 8.435, 9.0, 1),  # 1.565 m from the goal
    ]
    pose, speed = (8.0, 5.0, 0.0), (1.0, 0.0)
    for action, x, beside, felt in steps:
        on_stage(vec, pose, speed, ((8, 5), (10, 5)), people=[(x, 5 + beside), (3.0, 3.0)], felt=felt)
        _, terminated, _, _, _, info = act(vec, *action)
        pose, speed = vec.pose[:, 0].tolist(), vec.speed[:, 0].tolist()
        assert terminated == (x == 8.435)
    names = [name for name in info if not name.startswith("_") and name not in ("final_obs", "episode", "scenario")]
    assert {name: info[name][0] for name in names} == pytest.approx(
        {
            "is_success": 1, "is_failure": 0, "pedestrian_collision": 0, "obstacle_collision": 0, "timeout": 0,
            "near_misses": 2, "force_exceed": 4, "comfort_exposure": 0.5, "jerk": 0.809017,  # (0 + 1 + 0 + sqrt(5)) / 4
            "path_efficiency": 0.4 / 0.435, "time_to_goal": 0.4,
            "snqi": 1 - 0.8 * 4 / 400 - 0.2 - 0.5 * 0.5 - 1.5 * 3 / 50 - 0.3 * 0.309017 / 0.4,
        },
        abs=2e-5,
    )  # fmt: skip
    assert info["scenario"][0] == "classic_head_on_corridor_medium"


def test_sums_begin_anew_with_every_episode():
    vec = staged(pose=(20.0, 5.0, 0.0), speed=(1.0, 0.0), people=[(20.3, 6.3)], felt=1, limit=3)
    for _ in range(3):
        *_, info = act(vec, 1.0, 0.0)
    assert (info["near_misses"][0], info["force_exceed"][0]) == (3, 3)
    on_stage(vec, (20.0, 5.0, 0.0), limit=2)
    for _ in range(2):
        *_, info = act(vec, 0.0, 0.0)
    assert [info[name][0] for name in ("near_misses", "force_exceed", "comfort_exposure", "jerk")] == [0, 0, 0, 0]
    assert info["episode"]["l"][0] == 2


def test_snqi_by_hand():
    values = {
        "success": [1, 0, 1], "time": [0.5, 1, 0.25], "collisions": [0, 1, 0], "near_misses": [4, 30, 0],
        "comfort_exposure": [0.1, 0.4, 0], "force_exceed": [26, 0, 1], "jerk": [0.7, 2.0, 0.1],
    }  # fmt: skip
    found = metrics.snqi({name: np.array(x) for name, x in values.items()}, OURS)
    expected = [
        1 - 0.8 * 0.5 - 0.4 - 0.5 * 0.1 - 1.5 * 0.5 - 0.3 * 0.5,
        -0.8 - 2 - 1 - 0.5 * 0.4 - 0.3,
        1 - 0.8 * 0.25,
    ]
    np.testing.assert_allclose(found, expected)


def test_our_own_snqi_has_the_published_weights():
    ours = metrics.load_snqi(None)
    assert ours["weights"] == OURS["weights"]
    assert ours["baselines"]["collisions"] == {"median": 0, "p95": 1}
    assert all(metrics.span(baseline) > 0 for baseline in ours["baselines"].values())


def test_equal_median_and_95th_percentile_count_as_one_apart():
    same = {"weights": OURS["weights"], "baselines": {name: {"median": 2, "p95": 2} for name in OURS["baselines"]}}
    values = {name: np.array([2.5]) if name != "success" else np.array([1]) for name in OURS["weights"]}
    assert metrics.snqi(values, same)[0] == pytest.approx(1 - 0.8 * 2.5 - 0.5 * 2.5 - (2 + 1 + 1.5 + 0.3) * 0.5)


def without(content, *path):
    content = json.loads(json.dumps(content))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return content


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("weights",), "weights must have success, time, collisions"),
        (("weights", "jerk"), "weights must have jerk"),
        (("baselines",), "baselines must have collisions, near_misses"),
        (("baselines", "near_misses"), "baselines must have near_misses"),
        (("baselines", "jerk", "p95"), "baselines of jerk must have p95"),
    ],
)
def test_an_snqi_file_must_be_complete(path, message, tmp_path):
    file = write_json(tmp_path / "snqi.json", without(OURS, *path))
    with pytest.raises(UserError, match=message) as error:
        envs.make_vec("SocNavGrid-v0", 1, snqi=file, **CORRIDOR)
    assert "\n" not in str(error.value)


# What the robot sees


def seen(vec):
    return row(vec.observe(np.arange(1)), 0)


ELL = ((10, 5), (20, 5), (20, 15))


@pytest.mark.parametrize(
    ("arc", "expected"),
    [
        # current waypoint (20, 5), next (20, 15), ahead (15, 5); seen from (12, 6), looking along y
        (2.0, (-0.1, -0.8, 9 / math.hypot(8, 9), -8 / math.hypot(8, 9), -0.1, -0.3, 0.18)),
        # the first waypoint is within 1.6 m: the last is the current one and the next; ahead (20, 6.5)
        (8.5, (9 / math.hypot(8, 9), -8 / math.hypot(8, 9)) * 2 + (0.05, -0.8, 0.115)),
        (8.3, (-0.1, -0.8, 9 / math.hypot(8, 9), -8 / math.hypot(8, 9), 0.03, -0.8, 0.117)),
        (19.0, (9 / math.hypot(8, 9), -8 / math.hypot(8, 9)) * 3 + (0.01,)),  # ahead is the goal itself
    ],
)
def test_the_goal_as_it_is_seen(arc, expected):
    vec = staged(pose=(12.0, 6.0, math.pi / 2), route=ELL)
    vec.arc[:] = arc
    np.testing.assert_allclose(seen(vec)["goal"], expected, atol=1e-6)


def test_the_place_on_the_route_is_the_nearest():
    for pose, arc in (((12.0, 6.0), 2), ((9.0, 5.0), 0), ((19.0, 6.5), 11.5), ((19.0, 5.5), 9), ((20.0, 17.0), 20)):
        vec = staged(pose=(*pose, 0.0), route=ELL)
        vec.arc[:] = arc + 1.0  # not far from where it was
        assert vec._arc()[0] == pytest.approx(arc, abs=1e-5)
    vec = staged(pose=(10.0, 6.0, 0.0), route=((10, 5), (20, 5), (20, 7), (10, 7)))  # where the route comes by again
    for before, arc in ((1.0, 0.0), (21.0, 22.0)):
        vec.arc[:] = before
        assert vec._arc()[0] == arc


def test_the_robot_as_it_is_seen():
    vec = staged(pose=(12.0, 6.0, 1.0), speed=(1.0, -0.5))
    vec.action[:, 0] = torch.tensor([0.25, -1.0])
    np.testing.assert_allclose(seen(vec)["robot"], [0.5, -0.5, 0.25, -1], atol=1e-6)
    bicycle = SocNavGrid(1, robot="bicycle", allow_backwards=True, **CORRIDOR, **TINY)
    bicycle.reset(seed=0)
    bicycle.speed[:, 0] = torch.tensor([-1.5, 2.967785 / 4])
    np.testing.assert_allclose(seen(bicycle)["robot"], [-0.5, 0.25, 0, 0], atol=1e-6)
    obs = bicycle.step(np.array([[0.5, -0.39]], np.float32))[0]
    np.testing.assert_allclose(obs["robot"][0], [-1.45 / 3, 1.45 * math.tan(0.39) / 2.967785, 0.5, -0.5], atol=1e-5)


def test_pedestrians_as_they_are_seen():
    """From (12, 6), looking along y, the nearest first: one to the right, one ahead, one too far away."""
    vec = staged(pose=(12.0, 6.0, math.pi / 2), people=[(12.0, 9.0), (13.0, 6.0), (12.0, 30.0)])
    vec.crowd.velocity[:, 0] = 0
    vec.crowd.velocity[:, 0, :3] = torch.tensor([[0.5, 0.0, -5.0], [0.0, 0.65, 0.0]])
    obs = seen(vec)
    expected = [[0, -1 / 16, 0.325, 0], [3 / 16, 0, 0, -0.25], [1, 0, 0, 1]]
    np.testing.assert_allclose(obs["pedestrians"][:3], expected, atol=1e-6)
    assert (obs["pedestrians"][3:] == 0).all()
    assert obs["count"].tolist() == [3]


def test_of_many_pedestrians_the_64_nearest_are_seen():
    vec = SocNavGrid(1, training=False, split="train", scenario="francis2023_robot_crowding", crowd_density=0.4, **TINY)
    obs = row(vec.reset(seed=0)[0], 0)
    distance = np.hypot(*(vec.crowd.position[:, 0] - vec.pose[:2]).numpy())
    assert len(distance) == math.ceil(14 * 14 * 0.4) == 79
    assert obs["count"].tolist() == [64]
    found = PEDESTRIAN_RANGE * np.hypot(*obs["pedestrians"][:, :2].T)
    np.testing.assert_allclose(found, np.sort(distance)[:64], rtol=1e-4)


def test_an_empty_map_shows_nobody():
    vec = SocNavGrid(9, training=False, split="test", pedestrians=False)
    obs, _ = vec.reset(seed=0)
    assert not obs["pedestrians"].any()
    assert not obs["count"].any()
    assert not obs["grid"][:, 1].any()
    np.testing.assert_array_equal(obs["grid"][:, 0], obs["grid"][:, 2])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scenario": "francis2023_nowhere"}, "no scenario 'francis2023_nowhere'; there are classic_"),
        ({"scenario": "francis2023_blind_corner"}, "francis2023_blind_corner is kept for the test split"),
        ({"reward": "fast"}, "reward must be one of simple, punish_action, .*, not 'fast'"),
        ({"reward_weights": "nowhere.json"}, "nowhere.json: .*No such file"),
        ({"snqi": "nowhere.json"}, "nowhere.json: .*No such file"),
        ({"robot": "tank"}, "robot must be one of differential, bicycle, not 'tank'"),
        ({"robot_radius": 0.0}, "robot_radius must be above 0"),
        ({"grid_channels": "obstacles,walls"}, "grid_channels must be some of .*, not 'walls'"),
        ({"grid_size": 31}, "grid_size must be even and at least 2, not 31"),
        ({"grid_size": 4096}, "24 grids of 4096 x 4096 cells take .* GiB in each step; choose a smaller grid_size"),
        ({"grid_resolution": 0.0}, "grid_resolution must be above 0"),
        ({"crowd_density": 0.0}, "crowd_density must be above 0 .*pedestrians False empties a map"),
        ({"crowd_density": 0.9}, "crowd_density must be above 0 and at most 0.5"),
        ({"device": "gpu"}, "device"),
        pytest.param(
            {"device": "cuda"},
            "device cuda: PyTorch finds no GPU here; use device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        envs.make_vec("SocNavGrid-v0", 1, **arguments)
    assert "\n" not in str(error.value)


def test_a_crowd_that_does_not_fit_is_refused(monkeypatch):
    room = {"size": (22.0, 14.0), "border": 6.0, "start": (15, 7, 15, 7), "goal": (15, 7, 15, 7)}
    crowds = (Stream(0.5, zone=(6.6, 6.6, 7.8, 7.4)),) * 40
    tiny = Scenario("tiny", "train", time_limit=300, obstacles=((8.6, 6, 16, 8),), crowds=crowds, **room)
    monkeypatch.setattr(environment, "choose", lambda *_: [tiny])
    with pytest.raises(UserError, match="the crowd is too dense") as error:
        envs.make_vec("SocNavGrid-v0", 1, training=False, crowd_density=0.5)
    assert "\n" not in str(error.value)


# Drivers


@pytest.mark.parametrize(
    ("name", "robot", "split"),
    [
        *(("pursuit", "differential", split) for split in ("train", "validation", "test")),
        ("pursuit", "bicycle", "validation"),
        ("pursuit-stop", "bicycle", "test"),
    ],
)
def test_without_pedestrians_pursuit_always_arrives(name, robot, split):
    vec = SocNavGrid(40, training=False, split=split, pedestrians=False, robot=robot, **TINY)
    results = rollout(make_scripted_policy(name, vec), vec, len(vec.world.names), seed=1)
    assert [result["scenario"] for result in results] == vec.world.names
    assert [result["scenario"] for result in results if not result["success"]] == []


def test_pursuit_by_hand():
    """The point ahead is 60 degrees to the right: a quarter of 1.5 m/s, turning as fast as it can; then 0.02 rad."""
    vec = staged(pose=(20.0, 5.0, math.radians(60)), speed=(0.35, -0.95))
    pursuit = make_scripted_policy("pursuit", vec)
    pursuit.reset(np.arange(1), vec)
    np.testing.assert_allclose(pursuit(vec.observe(np.arange(1))), [[0.25, -0.5]], atol=1e-4)
    on_stage(vec, (20.0, 5.0, 0.02), (1.6, 0.0))
    np.testing.assert_allclose(pursuit(vec.observe(np.arange(1))), [[-1, -0.4]], atol=1e-4)
    bicycle = SocNavGrid(1, robot="bicycle", **CORRIDOR, **TINY)
    bicycle.reset(seed=0)
    on_stage(bicycle, (20.0, 5.0, 0.02), (1.45, 0.0))
    pursuit.reset(np.arange(1), bicycle)
    expected = [(1.5 * math.cos(0.02) ** 2 - 1.45) / 0.1, -math.atan(0.04 / 1.45)]
    np.testing.assert_allclose(pursuit(bicycle.observe(np.arange(1))), [expected], atol=1e-4)


def test_pursuit_stop_waits_for_who_is_in_front():
    vec = staged(pose=(20.0, 5.0, 0.0), speed=(1.0, 0.0), people=[(23.9, 6.9)])
    moving, stopping = (make_scripted_policy(name, vec) for name in ("pursuit", "pursuit-stop"))
    for policy in (moving, stopping):
        policy.reset(np.arange(1), vec)
    obs = vec.observe(np.arange(1))
    assert moving(obs)[0, 0] == 1
    assert stopping(obs)[0, 0] == -1
    for place in ((24.1, 5.0), (23.0, 7.1), (19.9, 5.0)):  # too far ahead, aside, behind
        on_stage(vec, (20.0, 5.0, 0.0), (1.0, 0.0), people=[place])
        assert stopping(vec.observe(np.arange(1)))[0, 0] == 1


class Careful(Pursuit):
    """Drives beside its route, and slowly up to whoever is in front, until they give way."""

    def __init__(self, beside=0.0, cruise=1.5, slow=0.6, gap=1.8):
        self.beside, self.cruise, self.slow, self.gap = beside, cruise, slow, gap

    def __call__(self, obs):
        goal = obs["goal"].astype(float)
        ahead = goal[:, 4:6]
        right = np.stack([ahead[:, 1], -ahead[:, 0]], 1) / np.maximum(np.hypot(*ahead.T), 1e-6)[:, None]
        goal[:, 4:6] = ahead + self.beside / GOAL_RANGE * right
        return super().__call__({**obs, "goal": goal})

    def speed(self, obs, bearing):
        x, y = np.moveaxis(obs["pedestrians"][..., :2] * PEDESTRIAN_RANGE, -1, 0)
        in_front = (np.arange(x.shape[1]) < obs["count"]) & (x > 0) & (np.abs(y) < 1.5)
        distance = np.where(in_front, np.hypot(x, y), 99).min(1)
        brake = np.sqrt(np.maximum(1.6 * (distance - self.gap), 0))
        limit = np.maximum(np.where(distance < 1.25, 0, self.slow), brake)
        return np.minimum(self.cruise * np.clip(np.cos(bearing), 0.1, 1) ** 2, limit)


class Lure(Pursuit):
    """Turns on the spot for four seconds, so that who leads it walks aside, and drives off fast."""

    def reset(self, rows, vec):
        super().reset(rows, vec)
        self.steps = 0

    def __call__(self, obs):
        action, v, turn = super().__call__(obs), 2 * obs["robot"][:, 0], obs["robot"][:, 1]
        self.steps += 1
        spin = np.stack([-v, 1 - turn], 1) / 0.1
        return np.clip(spin, -1, 1).astype(np.float32) if self.steps <= 40 else action

    def speed(self, obs, bearing):
        return 1.9 * np.clip(np.cos(bearing), 0.1, 1)


DRIVERS = (Careful(), Careful(0.8, slow=0.35, gap=2.4), Careful(2.5, slow=0.5), Careful(2.5, 1.9, 0.5), Lure())


def succeeds(vec, driver, scenarios, seed):
    """Whether the first episode of each row arrives, where row i plays scenarios[i]."""
    obs, _ = vec.reset(seed=[[seed, i, scenario] for i, scenario in enumerate(scenarios)])
    driver.reset(np.arange(vec.num_envs), vec)
    playing, success = np.ones(vec.num_envs, bool), np.zeros(vec.num_envs, bool)
    while playing.any():
        obs, _, terminated, truncated, info = vec.step(driver(obs))
        ended = playing & (terminated | truncated)
        if ended.any():
            success[ended] = info["is_success"][ended]
        playing &= ~ended
    return success


@pytest.mark.parametrize("split", ["test", *(pytest.param(x, marks=pytest.mark.slow) for x in ("train", "validation"))])
def test_every_scenario_can_be_driven_among_its_pedestrians(split):
    number = len(SocNavGrid(1, training=False, split=split, **TINY).world.names)
    vec = SocNavGrid(number, training=False, split=split, **TINY)
    missing = np.flatnonzero(~succeeds(vec, DRIVERS[0], range(number), 1))
    vec = SocNavGrid(20, training=False, split=split, **TINY)
    for driver in DRIVERS:
        missing = [one for one in missing if not succeeds(vec, driver, [one] * 20, 2).any()]
    assert [vec.world.names[one] for one in missing] == []


@pytest.mark.slow
def test_the_test_split_is_neither_easy_nor_hopeless_for_scripts():
    rates = {}
    for name in ("pursuit", "pursuit-stop"):
        vec = SocNavGrid(18, training=False, split="test", **TINY)
        results = rollout(make_scripted_policy(name, vec), vec, 90, seed=1)
        rates[name] = [np.mean([result[what] for result in results]) for what in ("success", "failure")]
    assert 0.2 <= rates["pursuit-stop"][0] <= 0.6
    assert rates["pursuit-stop"][1] <= 0.05
    assert rates["pursuit"][1] >= 0.35
