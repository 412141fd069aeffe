import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from envs import UserError
from envs.evaluation import make_scripted_policy, rollout
from envs.socnav import metrics
from envs.socnav.environment import SocNavGrid
from envs.socnav.scenarios import load_scenarios

pytestmark = pytest.mark.usefixtures("smaller_training_world")

TINY = {"grid_size": 2, "grid_channels": "obstacles"}  # where nobody looks at the grid
CORRIDOR = {"split": "train", "scenario": "francis2023_frontal_approach"}


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


# Which episodes


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
    "action_change": 0.583095, "action_change_squared": 0.34, "stagnation": 0,
}  # fmt: skip


def a_step(vec):
    """From 1 m/s on, at 0.5 m/s^2 after 0.2 m/s^2, 0.2 m beside one of four pedestrians and 0.15 m beside a wall."""
    people = [(20.1025, 6.2), (3, 3), (4, 3), (5, 3)]
    on_stage(vec, (20.0, 5.0, 0.0), (1.0, 0.0), walls=[(15, 4, 25, 4.25)], people=people, felt=3)
    vec.action[:, 0] = torch.tensor([0.2, 0.5])
    return vec.step(np.array([[0.5, 0.0]], np.float32))[1][0]


@pytest.fixture(scope="module")
def in_training():
    vec = SocNavGrid(1, scenario="classic_head_on_corridor_medium", **TINY)
    vec.reset(seed=0)
    return vec


def test_the_terms_of_rewards(in_training):
    vec = in_training
    assert EXPECTED.keys() == metrics.TERMS.keys()
    for name, value in EXPECTED.items():
        vec.weights = {name: 1.0}
        assert a_step(vec) == pytest.approx(value, abs=1e-5), name


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


def test_terms_of_the_snqi_in_each_step():
    expected = {"near_misses": 1, "force_exceed": 3, "comfort_exposure": 0.75, "jerk": 0.583095}
    env = gym.make("SocNavGrid-v0", reward="snqi_step", scenario="classic_head_on_corridor_medium", **TINY)
    env = env.unwrapped
    env.reset(seed=0)
    a_step(env.batch)
    assert {name: x[0] for name, x in env.batch.terms.items()} == pytest.approx(expected, abs=1e-5)
    info = env.step(np.zeros(2, np.float32))[4]
    assert info["snqi_step"].keys() == expected.keys()
    assert info["snqi_step"]["near_misses"] is True


def test_weights_from_a_file(tmp_path):
    weights = {**dict.fromkeys(metrics.REWARDS["simple"], 0), "near_wall": -2.0, "step": 0.25}
    file = write_json(tmp_path / "weights.json", weights)
    arguments = {"scenario": "classic_head_on_corridor_medium", "reward": "simple", "reward_weights": file, **TINY}
    vec = SocNavGrid(1, **arguments)
    vec.reset(seed=0)
    assert a_step(vec) == pytest.approx(0.25 - 2 * 0.5, abs=1e-5)
    for change, message in (({"speed": 1.0}, "no term speed; choose from step, time, progress"),):
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


def test_the_robot_as_it_is_seen():
    vec = staged(pose=(12.0, 6.0, 1.0), speed=(1.0, -0.5))
    vec.action[:, 0] = torch.tensor([0.25, -1.0])
    np.testing.assert_allclose(seen(vec)["robot"], [0.5, -0.5, 0.25, -1], atol=1e-6)
    bicycle = SocNavGrid(1, robot="bicycle", **CORRIDOR, **TINY)
    bicycle.reset(seed=0)
    bicycle.speed[:, 0] = torch.tensor([1.5, 2.967785 / 4])
    np.testing.assert_allclose(seen(bicycle)["robot"], [0.5, 0.25, 0, 0], atol=1e-6)
    obs = bicycle.step(np.array([[0.5, -0.39]], np.float32))[0]
    np.testing.assert_allclose(obs["robot"][0], [1.55 / 3, -1.55 * math.tan(0.39) / 2.967785, 0.5, -0.5], atol=1e-5)


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


# Mistakes


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
