"""Draws a simulation with MuJoCo: as images, or in a window."""

import math
import threading
import time
import warnings

import mujoco
import numpy as np

from envs import UserError
from envs.batch_env import FASTEST_FILM


class View:
    """What render() of our MuJoCo environments shows, opened when it is first needed.

    Args:
        camera: name of the model's camera that takes the images.
        fps: pace of the window, in calls a second; a window draws no more than 60 of them.
    """

    def __init__(self, camera: str, fps: float):
        self.camera = camera
        self.every, self.calls = math.ceil(fps / FASTEST_FILM), 0
        self.fps = fps / self.every
        self.renderer = self.viewer = None
        self.stale = False

    def image(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
        """(480, 640, 3) uint8.

        Raises:
            UserError: there is no OpenGL.
        """
        if self.renderer is not None and self.stale:
            self.renderer.close()
            self.renderer = None
        if self.renderer is None:
            try:
                with warnings.catch_warnings(action="ignore"):
                    self.renderer = mujoco.Renderer(model, 480, 640)
            except Exception as error:  # each OpenGL backend has its own
                raise UserError("MuJoCo found no OpenGL; on a machine without a screen set MUJOCO_GL=egl") from error
        self.stale = False
        self.renderer.update_scene(data, camera=self.camera)
        return self.renderer.render()

    def window(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """Show the state in MuJoCo's viewer.

        Raises:
            UserError: there is no display.
        """
        self.calls += 1
        if self.calls % self.every:
            return
        if self.viewer is None:
            self.viewed = data
            self._open(model)
        if self.stale:
            for i in range(model.nhfield):
                self.viewer.update_hfield(i)
        self.stale = False
        self.viewed.qpos[:] = data.qpos
        mujoco.mj_forward(model, self.viewed)
        self.viewer.sync()
        time.sleep(1 / self.fps)

    def _open(self, model: mujoco.MjModel) -> None:
        """MuJoCo's viewer draws in threads of its own."""
        import glfw
        from mujoco import viewer

        with warnings.catch_warnings(action="ignore"):
            if not glfw.init():
                raise UserError("no display for a window; to record a film with MUJOCO_GL=egl needs none")
        before = set(threading.enumerate())
        self.viewer = viewer.launch_passive(model, self.viewed)
        self.threads = set(threading.enumerate()) - before

    def changed(self) -> None:
        """The model has another height field now, which OpenGL must be told."""
        self.stale = True

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
        if self.viewer is not None:
            self.viewer.close()
            for thread in self.threads:  # close() only asks them to end, and Python may not end before them
                thread.join(timeout=5)
        self.renderer = self.viewer = None
