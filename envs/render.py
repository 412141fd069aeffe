"""Rendering: charts and maps with matplotlib, robots with Gymnasium's MuJoCo renderer."""

import math
import time
import warnings
from typing import Any

import mujoco
import numpy as np

from envs import UserError
from envs.batch_env import MAX_FPS


class FigureRenderer:
    """A matplotlib figure that is shown in a window (human) or returned as an image (rgb_array).

    Args:
        render_mode: human or rgb_array.
        width, height: size in pixels.

    Raises:
        UserError: matplotlib is missing.
    """

    def __init__(self, render_mode: str, width: int, height: int):
        try:
            from matplotlib import pyplot as plt
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise UserError("rendering needs matplotlib: pip install -e '.[plots]'") from None
        size = {"figsize": (width / 100, height / 100), "dpi": 100}
        self.plt = plt if render_mode == "human" else None
        self.figure = plt.figure(**size) if self.plt else Figure(**size)
        self.canvas = self.figure.canvas if self.plt else FigureCanvasAgg(self.figure)

    def show(self) -> np.ndarray | None:
        """Update the window, or return the figure as uint8 (height, width, 3)."""
        if self.plt:
            self.plt.pause(0.001)
            return None
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def close(self) -> None:
        if self.plt:
            self.plt.close(self.figure)


class RobotRenderer:
    """Shows a MuJoCo simulation in a window (human) or returns images (480, 640, 3) uint8 (rgb_array).

    Args:
        render_mode: human or rgb_array.
        camera: name of the camera that takes the images.
        fps: calls per second of simulated time, which the window follows.
    """

    def __init__(self, render_mode: str | None, camera: str, fps: float):
        self.render_mode, self.camera, self.fps = render_mode, camera, fps
        self.calls, self.terrain_changed, self.renderer = 0, False, None

    def render(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray | None:
        """Render a state. Raises UserError if there is no OpenGL or no display."""
        every = math.ceil(self.fps / MAX_FPS) if self.render_mode == "human" else 1
        self.calls += 1
        if self.calls % every:
            return None
        if self.renderer is None:
            self.data = mujoco.MjData(model)
            self.renderer = self._open(model)
        viewer = self.renderer.viewer
        viewer.make_context_current()
        for i in range(model.nhfield if self.terrain_changed else 0):
            mujoco.mjr_uploadHField(model, viewer.con, i)
        self.terrain_changed = False
        self.data.qpos[:] = data.qpos
        mujoco.mj_forward(model, self.data)
        if self.render_mode == "human":
            time.sleep(every / self.fps)
        return self.renderer.render(self.render_mode)

    def _open(self, model: mujoco.MjModel) -> Any:
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        try:
            with warnings.catch_warnings(action="ignore"):
                renderer = MujocoRenderer(model, self.data, None, 640, 480, camera_name=self.camera)
                renderer.render(self.render_mode)
        except Exception as error:  # each OpenGL backend has its own
            advice = "without a display set MUJOCO_GL=egl, which can record videos"
            raise UserError(f"MuJoCo cannot render here ({error}); {advice}") from error
        return renderer

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
        self.renderer = None
