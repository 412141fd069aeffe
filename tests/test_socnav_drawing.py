"""The picture of SocNavGrid-v0: what stands where, trails, the robot's grid, and the two ways to see it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs.socnav import environment
from envs.socnav.drawing import (
    DRIVEN,
    HEIGHT,
    INSET,
    MARGIN,
    PERSON,
    ROBOT,
    WALL,
    WIDTH,
    Plan,
    faded,
    seen_from_above,
)
from envs.socnav.environment import SocNavGrid

ROOM = "classic_doorway_low"  # 44 x 28 m, a wall across it, three pedestrians
FASTER = np.array([[1.0, 0.0]], np.float32)


def make(num_envs: int = 1, scenario: str = ROOM, seed: int = 0, **kwargs) -> SocNavGrid:
    vec = SocNavGrid(num_envs, training=False, scenario=scenario, render_mode="rgb_array", **kwargs)
    vec.reset(seed=seed)
    return vec


def plan_of(vec: SocNavGrid) -> Plan:
    return Plan.of(*vec.world.size[:, vec.place.maps[0]].tolist())


def on_map(frame: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns (K, 2) of the map's pixels of this colour."""
    return np.argwhere((frame[:, : WIDTH - INSET - 2 * MARGIN] == colour).all(-1))


def in_inset(frame: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Up and right of the robot (K, 2), in px, of the pixels of this colour in the upper grid."""
    left = WIDTH - INSET - MARGIN
    rows, columns = np.argwhere((frame[30 : 30 + INSET, left : left + INSET] == colour).all(-1)).T
    return np.stack([INSET / 2 - rows - 0.5, columns + 0.5 - INSET / 2], -1)


def pixel(frame: np.ndarray, at: np.ndarray) -> tuple[int, ...]:
    column, row = at.astype(int)
    return tuple(frame[row, column].tolist())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"grid_channels": "obstacles,near", "robot": "bicycle"},
        {"grid_channels": "combined", "grid_size": 10, "grid_resolution": 0.25},
        {"grid_channels": "near", "pedestrians": False},
        {"scenario": "classic_station_platform_medium"},
        pytest.param({"device": "cuda"}, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_a_frame_is_an_array_of_one_size(kwargs):
    frame = make(2, **kwargs).render()
    assert frame.shape == (HEIGHT, WIDTH, 3)
    assert frame.dtype == np.uint8
    assert len(on_map(frame, ROBOT))


@pytest.mark.parametrize("scenario", [ROOM, "francis2023_narrow_hallway", "classic_urban_crossing_medium"])
def test_the_robot_is_drawn_where_it_is_and_as_large(scenario):
    vec = make(scenario=scenario, pedestrians=False)
    scale, frame = plan_of(vec).scale, vec.render()
    x, y, heading = vec.pose[:, 0].tolist()
    behind = np.array([x - 0.3 * np.cos(heading), y - 0.3 * np.sin(heading)])  # the mark of its heading lies ahead
    assert pixel(frame, plan_of(vec)(behind)) == ROBOT
    before = on_map(frame, ROBOT)
    assert len(before) == pytest.approx(np.pi * (0.6 * scale) ** 2, rel=0.5)  # less the mark and the edge

    vec.pose[0] += 2
    vec.pose[1] += 1  # up in the world is up in the picture
    row, column = on_map(vec.render(), ROBOT).mean(0) - before.mean(0)
    assert (row, column) == pytest.approx((-scale, 2 * scale), abs=0.6)


def test_the_mark_shows_where_the_robot_looks():
    vec = make(scenario="francis2023_narrow_hallway", pedestrians=False)
    for heading, (rows, columns) in {0.0: (0, 1), np.pi / 2: (-1, 0), np.pi: (0, -1)}.items():
        vec.pose[2] = heading
        disc = on_map(vec.render(), ROBOT)
        off = disc.mean(0) - (disc.min(0) + disc.max(0)) / 2  # the disc's centre of mass lies away from the mark
        assert off @ [rows, columns] < -0.3


def test_walls_are_where_the_map_has_them():
    vec = make(pedestrians=False)
    frame, plan = vec.render(), plan_of(vec)
    for x0, y0, x1, y1 in vec.place.rectangles[:, 0].T.tolist():
        assert pixel(frame, plan(np.array([(x0 + x1) / 2, (y0 + y1) / 2]))) == WALL
    x0, y0, _, y1 = vec.place.rectangles[:, 0, -1].tolist()
    assert pixel(frame, plan(np.array([x0 - 1.0, (y0 + y1) / 2]))) != WALL


def test_a_pedestrian_is_a_disc_of_its_size():
    vec = make(scenario="francis2023_narrow_hallway")
    vec.crowd.velocity.zero_()
    vec.crowd.position[:, 0, 0] = torch.tensor([15.0, 3.0])
    frame, plan = vec.render(), plan_of(vec)
    assert pixel(frame, plan(np.array([15.0, 2.8]))) == PERSON
    across = np.ptp(on_map(frame, PERSON), axis=0) + 1 + 2  # with its outline
    assert across == pytest.approx([0.8 * plan.scale] * 2, abs=1.5)


def test_trails_grow_and_start_anew_with_a_new_episode():
    vec = make(pedestrians=False)
    first = vec.render()
    for _ in range(20):
        vec.step(FASTER)
        frame = vec.render()
    assert [step for step, _ in vec.drawing.trail] == list(range(21))
    assert len(on_map(frame, DRIVEN)) > 10

    vec.reset(seed=0)
    assert (vec.render() == first).all()
    for _ in range(3):
        vec.step(FASTER)
    vec.reset(seed=1)  # another start
    vec.step(FASTER)
    vec.render()
    assert [step for step, _ in vec.drawing.trail] == [1]


def test_trails_start_anew_when_an_episode_ends_by_itself():
    vec = make(pedestrians=False)
    vec.pose[:, 0] = torch.tensor([2.0, 14.0, np.pi])  # 0.4 m before the wall
    done = np.array([False])
    while not done[0]:
        vec.render()
        _, _, done, _, _ = vec.step(FASTER)
    assert len(vec.drawing.trail) > 3
    vec.render()
    assert [step for step, _ in vec.drawing.trail] == [0]


def test_trails_of_a_future_that_was_taken_back_are_forgotten():
    vec = make()
    for _ in range(5):
        vec.step(FASTER)
        vec.render()
    snapshot, frame = vec.state_dict(), vec.render()
    for _ in range(5):
        vec.step(FASTER)
        vec.render()
    vec.load_state_dict(snapshot)
    assert (vec.render() == frame).all()


def test_no_trail_leads_to_where_a_pedestrian_appears_again():
    vec = make(scenario="francis2023_narrow_hallway")
    old = [faded(PERSON, share) for share in (0.4, 0.5, 0.6)]
    vec.crowd.velocity.zero_()
    for step, x in enumerate((10.0, 10.5, 11.0, 25.0)):
        vec.episode_length[0] = step
        vec.crowd.position[:, 0, 0] = torch.tensor([x, 3.0])
        frame = vec.render()
        assert any(len(on_map(frame, colour)) for colour in old) == (x in (10.5, 11.0))


def test_the_inset_shows_blocked_cells_with_forward_up():
    grid = np.zeros((6, 6), np.uint8)
    grid[5, 4] = 1  # far to the left, a little ahead
    picture = seen_from_above({"obstacles": grid})
    assert np.argwhere((picture == WALL).all(-1)).tolist() == [[1, 0]]

    vec = make(scenario="francis2023_narrow_hallway")
    vec.pose[:, 0] = torch.tensor([15.0, 3.0, np.pi / 2])  # looking at the upper wall, 2 m ahead
    vec.crowd.position[:, 0, 0] = torch.tensor([10.0, 4.0])  # 1 m ahead, 5 m to the left
    frame, cell = vec.render(), INSET / 64
    up, right = in_inset(frame, PERSON).mean(0) / cell * 0.5
    assert (up, right) == pytest.approx((1, -5), abs=0.4)
    beside = in_inset(frame, WALL) / cell * 0.5
    ahead = beside[(np.abs(beside[:, 1]) < 1) & (beside[:, 0] > 0)]
    assert ahead[:, 0].min() == pytest.approx(2, abs=0.5)


def test_drawing_changes_nothing_and_row_0_does_not_depend_on_the_others():
    watched, alone, unseen = make(3, seed=4), make(1, seed=4), make(3, seed=4)
    for _ in range(5):
        assert (watched.render() == alone.render()).all()
        action = np.array([[1.0, 0.3]] * 3, np.float32)
        seen, _, _, _, _ = watched.step(action)
        obs, _, _, _, _ = unseen.step(action)
        alone.step(action[:1])
        assert all((seen[name] == obs[name]).all() for name in obs)


def test_rgb_array_through_gymnasium():
    env = gym.make("envs:SocNavGrid-v0", render_mode="rgb_array", scenario=ROOM)
    env.reset(seed=0)
    before = env.render()
    for _ in range(10):
        env.step(FASTER[0])
    assert env.render().shape == (HEIGHT, WIDTH, 3)
    assert (env.render() != before).any()
    env.close()


def test_a_window_shows_every_step_and_closes(monkeypatch):
    shown = []

    class Window:
        def __init__(self, title):
            assert title == "SocNavGrid-v0"

        def show(self, frame):
            shown.append(frame)

        def close(self):
            shown.append("closed")

    monkeypatch.setattr(environment, "Window", Window)
    vec = SocNavGrid(2, training=False, scenario=ROOM, render_mode="human")
    vec.reset(seed=0)
    for _ in range(3):
        vec.step(np.zeros((2, 2), np.float32))
    assert vec.render() is None
    vec.close()
    assert [isinstance(frame, np.ndarray) for frame in shown] == [True] * 4 + [False]
