"""SO101Paper-v0: an SO-101 arm drags a sheet of paper into a taped frame."""

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from mujoco.batch import Batch

from envs.batch_env import BatchEnv, SingleEnv, cpu_threads
from envs.disturbances import Disturbances, Float, Int, delayed
from envs.render import RobotRenderer

ASSET = Path(__file__).parent / "assets" / "so101_paper.xml"
SUBSTEPS = 12  # of 1/360 s: the policy acts at 30 Hz
MAX_EPISODE_STEPS = 400
MAX_DELTA = 0.04  # rad per step: bound of the action
LEASH = 0.06  # rad, largest difference between the target and the position of a joint
READY = np.array([0, -0.108, 0.492, 0.866, 0, 0])  # rad: gripper over the frame, fingertips 3 cm above the table

GOAL = np.array([0.25, 0.0])  # m, center of the frame
HALF_SHEET = np.array([0.074, 0.105])  # m: A5
MAX_OFFSET = np.array([0.07, 0.12])  # m, largest initial offset of the sheet from the goal ...
MIN_OFFSET = 0.06  # m, ... and smallest distance
MAX_YAW = 0.3  # rad
TABLE_FRICTION, TIP_FRICTION = 0.6, 1.3  # of the sheet on the table, of a fingertip on the sheet
TABLE_RANGE, TIP_RANGE = (0.8, 1.2), (0.85, 1.15)  # factors by which both are randomized
SUCCESS_REWARD = 10.0
HOLD_STEPS = 5  # consecutive steps inside the frame for a success

ARM, SHEET = slice(0, 6), slice(6, 9)  # in qpos: pan, lift, elbow, wrist flex, wrist roll, gripper; sheet x, y, yaw
OBS_HIGH = np.array([3.2] * 6 + [20] * 6 + [1] * 13, np.float32)


class IK:
    """Base policy: differential inverse kinematics that hovers over the sheet, presses on it and drags it to the goal.

    Each step moves the end effector toward a point by damped least squares with the Jacobian J of the arm,

        dq = J^T (J J^T + damping^2 I)^-1 v,        v = velocity of the end effector and of the gripper's pitch,

    (Nakamura & Hanafusa 1986). It ignores the sheet's yaw, which is left to the residual. Observation (N, 25) -> action
    (N, 6), rad.
    """

    GAIN = 0.5  # fraction of the remaining distance per step ...
    MAX_STEP = 0.012  # m: ... and its bound
    HOVER, PRESS = 0.03, -0.003  # m, target heights above the sheet and when pressing on it
    CONTACT = 0.014  # m; below it the fingertips are assumed to press
    NEAR_ABOVE, NEAR_PRESSING = 0.015, 0.05  # m from the center of the sheet: to move down, to keep pressing
    PITCH = 1.2  # rad; gripper down, both fingertips at the same height
    PITCH_WEIGHT = 0.1  # m/rad, weight of pitch errors relative to position errors
    DAMPING = 0.02

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_path(str(ASSET))
        self.gripper = self.model.body("gripper").id
        self.batch = Batch(self.model, 1, 1)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        obs = obs.astype(np.float64)
        joints, sheet, goal, tip = obs[:, 0:6], obs[:, 12:14], obs[:, 19:21], obs[:, 22:25]

        low = tip[:, 2] < self.CONTACT
        distance = np.hypot(*(sheet - tip[:, :2]).T)
        over = distance < np.where(low, self.NEAR_PRESSING, self.NEAR_ABOVE)
        xy = np.where((over & low)[:, None], tip[:, :2] + goal, sheet)  # drag the sheet, or move above it ...
        xy = np.where((~over & low)[:, None], tip[:, :2], xy)  # ... but rise first, so that the sheet is not pushed
        target = np.column_stack([xy, np.where(over, self.PRESS, self.HOVER)])

        step = self.GAIN * (target - tip)
        length = np.sqrt(np.square(step).sum(1, keepdims=True))
        step *= np.minimum(1, self.MAX_STEP / np.maximum(length, 1e-9))
        turn = np.clip(self.GAIN * (self.PITCH - joints[:, 1:4].sum(1)), -0.05, 0.05)
        velocity = np.column_stack([step, self.PITCH_WEIGHT * turn])

        jacobian = np.empty((len(obs), 4, 4))  # (N, x y z pitch, pan lift elbow wrist)
        jacobian[:, :3] = self._jacobian(joints, tip)
        jacobian[:, 3] = self.PITCH_WEIGHT * np.array([0, 1, 1, 1])
        transpose = jacobian.transpose(0, 2, 1)
        damped = jacobian @ transpose + self.DAMPING**2 * np.eye(4)
        dq = (transpose @ np.linalg.solve(damped, velocity[:, :, None]))[:, :, 0]
        dq *= np.minimum(1, MAX_DELTA / np.abs(dq).max(1, keepdims=True).clip(1e-9))  # slower, in the same direction

        action = np.zeros((len(obs), 6), np.float32)
        action[:, :4] = dq
        action[:, 4] = action[:, 0]  # the wrist compensates the pan, so that dragging does not turn the sheet
        return action

    def _jacobian(self, joints: np.ndarray, tip: np.ndarray) -> np.ndarray:
        """d tip / d (pan, lift, elbow, wrist) (N, 3, 4) of the arm's model."""
        if self.batch.nsim != len(joints):
            self.batch = Batch(self.model, len(joints), 1)
        self.batch.qpos[:, ARM] = joints
        return self.batch.jac(self.gripper, tip)[0][:, :, :4]


class SO101Paper(BatchEnv):
    """An SO-101 arm drags an A5 sheet into a taped frame and turns it until all corners are inside.

    Observation (25): joint positions 6 (rad), joint velocities 6 (rad/s), sheet position 3 (m) and quaternion 4 (wxyz),
    goal vector 3 (sheet to frame center, m), end-effector position 3 (m), all in the robot's base frame, clipped to its
    bounds. Action (6): change of the joints' targets, rad, within +-0.04: pan, lift, elbow, wrist flex, wrist roll,
    gripper. Targets are integrated, so zero holds the pose; they stay within 0.06 rad of the joints.

    Task (training=False): the sheet starts up to 7 cm (x) and 12 cm (y), at least 6 cm, from the goal, turned by up to
    0.3 rad; the friction of sheet and fingertips varies. An episode succeeds when all corners have been inside for 5
    consecutive steps, with a reward of 10. Every step costs 0.01; the time limit is 400 steps of 1/30 s.

    Training adds Phi(s') - Phi(s) with Phi = -5 reach - 30 overhang - 3 |yaw|: reach is the distance from end effector
    to sheet, overhang how far the sheet extends beyond the frame. Without discounting it telescopes, but unlike
    gamma Phi' - Phi (Ng et al. 1999) it can change the optimal policy, because Phi is negative. Compare policies by
    success, not by the training return.

    Idealizations: the sheet is rigid and flat (x, y, yaw). The friction between table and sheet is that of the sheet's
    weight, independent in x, y and yaw; the load of a finger goes through the thin paper to the table, which reduces
    the friction between finger and sheet. Only the fingertips collide, and beside the sheet they slide without
    friction.

    Args:
        num_envs, training, split, render_mode: see BatchEnv.
        frame_margin: distance between sheet and tape on each side of a centered sheet, m.
        randomize: vary friction between episodes; the published task (training=False) always does.
        reach_weight, yaw_weight: in training only, weights in Phi.
        success_reward: in training only, instead of 10.
        training_steps: in training only, the time limit. It is shorter than in the task, because early episodes fail
            and shorter ones give more start states.
        paper_friction: factor on the friction between table and sheet, in addition to its variation.
        link_mass: factor on the masses and inertias of the links.
        action_delay: delay of actions in steps.
        position_noise: standard deviation of the observed positions of sheet and end effector, m.
        angle_noise: standard deviation of the observed joint positions and yaw of the sheet, rad. These five may be
            ranges (low, high), from which each episode draws a value.
        threads: CPU threads of the simulator, by default one per core; the result does not depend on it.

    Raises:
        ValueError: frame_margin is not above 0.
    """

    metadata: ClassVar = {**BatchEnv.metadata, "render_fps": 30}
    controllers: ClassVar = {"ik": IK}
    measures: ClassVar = ("yaw_error", "position_error")

    def __init__(
        self,
        num_envs: int = 1,
        training: bool = True,
        split: str = "train",
        render_mode: str | None = None,
        frame_margin: float = 0.02,
        randomize: bool = True,
        reach_weight: float = 5.0,
        yaw_weight: float = 3.0,
        success_reward: float = SUCCESS_REWARD,
        training_steps: int = 150,
        paper_friction: Float = 1.0,
        link_mass: Float = 1.0,
        action_delay: Int = 0,
        position_noise: Float = 0.0,
        angle_noise: Float = 0.0,
        threads: int | None = None,
    ):
        if not frame_margin > 0:
            raise ValueError(f"frame_margin must be above 0 m, not {frame_margin}")
        observation_space = gym.spaces.Box(-OBS_HIGH, OBS_HIGH, dtype=np.float32)
        action_space = gym.spaces.Box(-MAX_DELTA, MAX_DELTA, (6,), np.float32)
        steps = training_steps if training else MAX_EPISODE_STEPS
        super().__init__(num_envs, observation_space, action_space, steps, training, split, render_mode)
        self.reach_weight, self.yaw_weight = reach_weight, yaw_weight
        self.success_reward = success_reward if training else SUCCESS_REWARD
        self.half_frame = HALF_SHEET + frame_margin
        self.randomize = randomize or not training

        self.model = mujoco.MjModel.from_xml_path(str(ASSET))
        self._place_tape()
        ranges = {"paper_friction": paper_friction, "link_mass": link_mass, "action_delay": action_delay}
        ranges |= {"position_noise": position_noise, "angle_noise": angle_noise}
        self.disturbances = Disturbances(num_envs, ranges)
        self.joint_low, self.joint_high = self.model.jnt_range[ARM].T
        self.sheet_frictionloss = self.model.dof_frictionloss[SHEET].copy()
        self.fingertips = [self.model.geom(f"{finger}_fingertip").id for finger in ("fixed", "moving")]
        self.sag = self._gravity_torque(READY) / self.model.actuator_gainprm[:, 0]  # rad, of the links' own mass

        self.batch = Batch(self.model, num_envs, threads or cpu_threads(num_envs))
        self.qpos, self.qvel, self.target = (self.batch.bind(field) for field in ("qpos", "qvel", "ctrl"))
        self.tip = self.batch.site("end_effector").xpos
        self.frictionloss, self.friction = self.batch.expand("dof_frictionloss"), self.batch.expand("geom_friction")
        self.links = self.model.jnt_bodyid[ARM]
        fields = ("body_mass", "body_inertia")
        self.masses = None if link_mass == 1 else [self.batch.expand(field) for field in fields]
        self.steps_inside, self.potential = np.zeros(num_envs, np.int64), np.zeros(num_envs)
        self.noisy = any(self.disturbances.highest(name) for name in ("position_noise", "angle_noise"))
        self.noise = np.zeros((num_envs, 12))  # on the joints, the sheet's x, y and yaw, and the end effector
        self.actions = np.zeros((num_envs, self.disturbances.highest("action_delay") + 1, 6))  # oldest first
        self.renderer = RobotRenderer(render_mode, "table", self.metadata["render_fps"])

    def start(self, indices: np.ndarray) -> None:
        self.batch.reset(indices, stage=mujoco.mjtStage.mjSTAGE_NONE)
        for i in indices:
            rng = self.rngs[i]
            offset = rng.uniform(-MAX_OFFSET, MAX_OFFSET)
            while np.hypot(*offset) < MIN_OFFSET:
                offset = rng.uniform(-MAX_OFFSET, MAX_OFFSET)
            self.qpos[i, SHEET] = *(GOAL + offset), rng.uniform(-MAX_YAW, MAX_YAW)
            self.disturbances.draw(i, rng)
            table, tip = (rng.uniform(*TABLE_RANGE), rng.uniform(*TIP_RANGE)) if self.randomize else (1.0, 1.0)
            table *= self.disturbances["paper_friction"][i]
            self.frictionloss[i, SHEET] = table * self.sheet_frictionloss
            self.friction[i, self.fingertips, 0] = max(0, tip * TIP_FRICTION - table * TABLE_FRICTION)
        self._disturb(indices)
        self.actions[indices] = 0
        self._set_mass(indices)
        sag = self.disturbances["link_mass"][indices, None] * self.sag
        self.qpos[indices, ARM], self.target[indices] = READY, READY + sag
        self.batch.forward(indices, stage=mujoco.mjtStage.mjSTAGE_POS)
        self.steps_inside[indices] = 0
        self.potential[indices] = self._potential(self._overhang())[indices]

    def _set_mass(self, indices: np.ndarray) -> None:
        if self.masses is not None:
            mass, inertia = self.masses
            factor = self.disturbances["link_mass"][indices, None]
            mass[np.ix_(indices, self.links)] = factor * self.model.body_mass[self.links]
            inertia[np.ix_(indices, self.links)] = factor[..., None] * self.model.body_inertia[self.links]
            self.batch.set_const(indices)

    def _disturb(self, indices: np.ndarray) -> None:
        """Draw the noise of the next observation."""
        if self.noisy:
            position, angle = self.disturbances["position_noise"], self.disturbances["angle_noise"]
            for i in indices:
                deviation = np.repeat([angle[i], position[i], angle[i], position[i]], [6, 2, 1, 3])
                self.noise[i] = self.rngs[i].normal(0, deviation)

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        if self.actions.shape[1] > 1:
            action = delayed(self.actions, action, self.disturbances["action_delay"])
        joints = self.qpos[:, ARM]
        target = np.clip(self.target + action, joints - LEASH, joints + LEASH)
        self.target[:] = np.clip(target, self.joint_low, self.joint_high)
        # stage: update the positions, which mj_step leaves one substep behind
        self.batch.step(self.running, nstep=SUBSTEPS, stage=mujoco.mjtStage.mjSTAGE_POS)
        self._disturb(np.arange(self.num_envs))

        overhang = self._overhang()
        self.steps_inside[:] = np.where((overhang <= 0).all(1), self.steps_inside + 1, 0)
        success = self.steps_inside >= HOLD_STEPS
        reward = self.success_reward * success - 0.01
        if self.training:
            potential = self._potential(overhang)
            reward += potential - self.potential
            self.potential[:] = potential

        position_error = np.hypot(*(self.qpos[:, 6:8] - GOAL).T)
        metrics = {"is_success": success, "yaw_error": np.abs(self.qpos[:, 8]), "position_error": position_error}
        return reward, success, metrics

    def observe(self, indices: np.ndarray) -> np.ndarray:
        noise = self.noise[indices]
        x, y, yaw = (self.qpos[indices, SHEET] + noise[:, SHEET]).T
        z = np.zeros_like(x)
        quaternion = (np.cos(yaw / 2), z, z, np.sin(yaw / 2))
        sheet = np.stack([x, y, z, *quaternion, GOAL[0] - x, GOAL[1] - y, z], axis=1)
        joints, tip = self.qpos[indices, ARM] + noise[:, ARM], self.tip[indices] + noise[:, 9:]
        obs = np.concatenate([joints, self.qvel[indices, ARM], sheet, tip], axis=1)
        return obs.clip(-OBS_HIGH, OBS_HIGH).astype(np.float32)

    def _overhang(self) -> np.ndarray:
        """Distance of the outermost corner of the sheet beyond the tape along x and y (N, 2), m; <= 0 inside."""
        yaw = self.qpos[:, 8]
        c, s = np.abs(np.cos(yaw)), np.abs(np.sin(yaw))
        (a, b), offset = HALF_SHEET, np.abs(self.qpos[:, 6:8] - GOAL)
        return np.stack([a * c + b * s, a * s + b * c], axis=1) + offset - self.half_frame

    def _potential(self, overhang: np.ndarray) -> np.ndarray:
        """Phi of the training reward, (N,)."""
        reach = np.sqrt(np.square(self.tip[:, :2] - self.qpos[:, 6:8]).sum(1) + np.square(self.tip[:, 2]))
        overhang, yaw = np.maximum(overhang, 0).sum(1), np.abs(self.qpos[:, 8])
        return -self.reach_weight * reach - 30 * overhang - self.yaw_weight * yaw

    def _gravity_torque(self, joints: np.ndarray) -> np.ndarray:
        """Torque that holds the arm at rest (6,), N m."""
        data = mujoco.MjData(self.model)
        data.qpos[ARM] = joints
        mujoco.mj_forward(self.model, data)
        return data.qfrc_bias[ARM].copy()

    def _place_tape(self) -> None:
        """Place four strips, 1 cm wide, around the frame."""
        (x, y), width = self.half_frame, 0.005
        for name, center, half in (
            ("front", (x + width, 0), (width, y + 2 * width)),
            ("back", (-x - width, 0), (width, y + 2 * width)),
            ("left", (0, y + width), (x, width)),
            ("right", (0, -y - width), (x, width)),
        ):
            strip = self.model.geom(f"tape_{name}")
            strip.pos[:2], strip.size[:2] = GOAL + center, half

    def state(self) -> dict[str, np.ndarray]:
        return {
            "physics": self.batch.state,
            "frictionloss": self.frictionloss,
            "friction": self.friction,
            "steps_inside": self.steps_inside,
            "potential": self.potential,
            **({"noise": self.noise} if self.noisy else {}),
            **({"actions": self.actions} if self.actions.shape[1] > 1 else {}),
            **self.disturbances.state(),
        }

    def load_state_dict(self, state: dict) -> np.ndarray:
        super().load_state_dict(state)
        self._set_mass(np.arange(self.num_envs))
        self.batch.forward(stage=mujoco.mjtStage.mjSTAGE_POS)  # computes the position of the end effector
        return self.observe(np.arange(self.num_envs))

    def render(self) -> np.ndarray | None:
        """Environment 0 as an image (480, 640, 3) uint8; None in human mode, which opens a window."""
        data = self.batch.get_data(0)
        mujoco.mj_forward(self.model, data)
        return self.renderer.render(self.model, data)

    def close_extras(self, **kwargs: Any) -> None:
        self.renderer.close()


class SO101PaperEnv(SingleEnv):
    """SO101Paper as a Gymnasium environment."""

    batch_env = SO101Paper
