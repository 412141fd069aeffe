import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.socnav.environment import SocNavGrid
from envs.socnav.grid import OccupancyGrid
from envs.socnav.scenarios import Scenario
from envs.socnav.starts import World


def make_world(*scenarios):
    return World(list(scenarios), 1, pedestrians=False, varied=False, stream="test", device="cpu")


def a_map(size, obstacles, border=1.0):
    return Scenario("map", size, 300, (3, 3, 3, 3), (4, 4, 4, 4), obstacles=tuple(obstacles), border=border)


def draw(world, pose, channels=("obstacles",), size=32, resolution=0.5, people=(), maps=None):
    """Grids (N, channels, size, size) for robots at pose [N] (x, y, heading), with people (x, y) in the world."""
    pose = torch.tensor(pose, dtype=torch.float32).T
    maps = torch.zeros(pose.shape[1], dtype=torch.int64) if maps is None else torch.tensor(maps)
    cos, sin = torch.cos(pose[2])[:, None], torch.sin(pose[2])[:, None]
    x, y = torch.tensor(people, dtype=torch.float32).reshape(-1, 2).T[:, None] - pose[:2, :, None]
    position = torch.stack([cos * x + sin * y, cos * y - sin * x])
    return OccupancyGrid(world, pose.shape[1], tuple(channels), size, resolution)(maps, pose, position).numpy()


def cells(pose, size, resolution):
    """Row, column and the centre in the world, of every cell."""
    x, y, heading = pose
    for row in range(size):
        for column in range(size):
            ahead, left = (column + 0.5 - size / 2) * resolution, (row + 0.5 - size / 2) * resolution
            c, s = math.cos(heading), math.sin(heading)
            yield row, column, x + c * ahead - s * left, y + s * ahead + c * left


def solid_and_distance(scenario, x, y):
    """Whether a point is solid, and how far it is from the nearest edge of anything."""
    (w, h), solid, distance = scenario.size, False, []
    for x0, y0, x1, y1 in [*scenario.rectangles().tolist(), (0, 0, w, h)]:
        inside = x0 <= x <= x1 and y0 <= y <= y1
        solid |= inside != ((x0, y0, x1, y1) == (0, 0, w, h))
        outside = math.hypot(max(x0 - x, 0, x - x1), max(y0 - y, 0, y - y1))
        distance.append(min(x - x0, x1 - x, y - y0, y1 - y) if inside else outside)
    return solid, min(distance)


@st.composite
def maps_with_poses(draw):
    width, height = draw(st.floats(6, 30)), draw(st.floats(6, 30))
    obstacles = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
        obstacles.append((x, y, min(x + draw(st.floats(0.6, 8)), width), min(y + draw(st.floats(0.6, 8)), height)))
    pose = draw(st.floats(-2, width + 2)), draw(st.floats(-2, height + 2)), draw(st.floats(-4, 4))
    return a_map((width, height), obstacles, draw(st.floats(0.3, 2))), pose


@settings(max_examples=100, deadline=None)
@given(maps_with_poses(), st.sampled_from([(0.5, 0.25), (0.25, 0.25), (1.0, 0.25), (0.2, 0.1), (0.125, 0.1)]))
def test_obstacles_are_the_cells_whose_centre_is_solid(where, resolutions):
    (scenario, pose), (resolution, raster_cell) = where, resolutions
    grid = draw(make_world(scenario), [pose], size=20, resolution=resolution)[0, 0]
    compared = 0
    for row, column, x, y in cells(pose, 20, resolution):
        solid, distance = solid_and_distance(scenario, x, y)
        if distance > raster_cell:
            assert grid[row, column] == solid, (row, column)
            compared += 1
    assert grid.max() <= 1
    assert compared or resolution < 0.5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-6, 6), st.floats(-6, 6)), max_size=4),
    st.floats(-4, 4),
    st.sampled_from([(0.5, 16), (0.25, 32), (0.7, 12), (0.125, 20), (1.0, 8)]),
)
def test_pedestrians_are_the_cells_that_their_discs_touch(people, heading, shape):
    (resolution, size), pose = shape, (5.0, 5.0, heading)
    world = make_world(a_map((30, 30), []))
    grid = draw(world, [pose], ("pedestrians",), size, resolution, [(5 + x, 5 + y) for x, y in people])[0, 0]
    c, s = math.cos(heading), math.sin(heading)
    for row in range(size):
        for column in range(size):
            x0, y0 = (column - size / 2) * resolution, (row - size / 2) * resolution
            nearest = math.inf
            for x, y in people:
                x, y = c * x + s * y, c * y - s * x
                aside, above = max(x0 - x, 0, x - x0 - resolution), max(y0 - y, 0, y - y0 - resolution)
                nearest = min(nearest, math.hypot(aside, above))
            if abs(nearest - 0.4) > 1e-5:
                assert grid[row, column] == (nearest < 0.4), (row, column)


def a_busy_place(seed):
    rng = np.random.default_rng(seed)
    obstacles = [(x, y, x + 1.7, y + 2.3) for x, y in rng.uniform(2, 24, (5, 2))]
    return (
        make_world(a_map((29, 27), obstacles)),
        rng.uniform(4, 24, (9, 2)),
        (*rng.uniform(5, 22, 2), rng.uniform(-3, 3)),
    )


@pytest.mark.parametrize("resolution", [0.5, 1.0, 0.3])
def test_near_is_obstacles_four_times_as_fine(resolution):
    world, people, pose = a_busy_place(0)
    (near,) = draw(world, [pose], ("near",), resolution=resolution, people=people)[0]
    (fine,) = draw(world, [pose], ("obstacles",), resolution=resolution / 4)[0]
    np.testing.assert_array_equal(near, fine)
    (coarse,) = draw(world, [pose], ("obstacles",), resolution=resolution)[0]
    assert (near != coarse).any()


@pytest.mark.parametrize(("size", "resolution"), [(64, 0.5), (40, 0.25), (16, 1.0)])
def test_the_environment_draws_what_was_asked_for(size, resolution):
    arguments = {"training": False, "split": "test", "grid_channels": "obstacles,near,pedestrians"}
    vec = SocNavGrid(9, grid_size=size, grid_resolution=resolution, **arguments)
    obs, _ = vec.reset(seed=0)
    assert obs["grid"].shape == (9, 3, size, size)
    for i, name in enumerate(vec.world.names):
        pose, at = vec.pose[:, i].tolist(), slice(int(vec.world.count[vec.crowd.start[i]]))
        people = vec.crowd.position[:, i, at].T.tolist()
        maps = [vec.world.names.index(name)]
        expected = draw(vec.world, [pose], ("obstacles", "near", "pedestrians"), size, resolution, people, maps)[0]
        np.testing.assert_array_equal(obs["grid"][i], expected)
