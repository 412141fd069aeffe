"""Rendering: sizes, what changes from step to step, and that it changes nothing."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

import envs

SIZES = {"LateralControl-v0": (480, 720, 3), "SocNavGrid-v0": (520, 900, 3)}
# MuJoCo chooses its OpenGL library when it is imported
ROBOTS = """
import numpy as np, envs
for env_id in ("SO101Paper-v0", "Ballbot-v0"):
    vec = envs.make_vec(env_id, 2, 1, render_mode="rgb_array")
    first = vec.render()
    for _ in range(60):
        vec.step(np.full((2, vec.single_action_space.shape[0]), 0.04, np.float32))
    image = vec.render()
    assert image.shape == (480, 640, 3) and image.dtype == np.uint8 and image.std() > 10
    assert (image != first).any()
"""


@pytest.mark.parametrize("env_id", SIZES)
def test_charts_and_maps(env_id):
    env = gym.make(f"envs:{env_id}", render_mode="rgb_array", training=False)
    env.reset(seed=1)
    images = []
    for _ in range(3):
        images.append(env.render())
        for _ in range(10):
            env.step(np.zeros(env.action_space.shape, np.float32) + 0.5)
    assert [(image.shape, image.dtype) for image in images] == [(SIZES[env_id], np.uint8)] * 3
    assert (images[0] != images[1]).any()
    assert (images[1] != images[2]).any()


def test_rendering_changes_nothing_and_shows_environment_0():
    drawn, plain = (envs.make_vec("SocNavGrid-v0", n, 3, render_mode="rgb_array", training=False) for n in (2, 1))
    action = np.full((2, 2), 0.5, np.float32)
    for _ in range(20):
        np.testing.assert_array_equal(drawn.render(), plain.render())
        obs, expected = drawn.step(action)[0], plain.step(action[:1])[0]
    np.testing.assert_array_equal(obs["robot"][0], expected["robot"][0])


def test_robots(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    done = subprocess.run([sys.executable, "-c", ROBOTS], capture_output=True, text=True)
    if "MuJoCo cannot render here" in done.stderr:
        pytest.skip("no OpenGL")
    assert done.returncode == 0, done.stderr
