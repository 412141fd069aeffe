"""Ballbot-v0 and BallbotDepth-v0: a robot on a ball drives over uneven ground."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector.utils import batch_space
from mujoco.batch import Batch

from envs.ballbot_depth import BALL_RADIUS, CODE, FAR, DepthCameras, FrozenEncoder
from envs.ballbot_terrain import POINTS, SPACING, heights
from envs.batch_env import SPLITS, BatchEnv, SingleEnv
from envs.view import View

ASSET = Path(__file__).parent / "assets" / "ballbot.xml"
TIMESTEP = 0.002  # s
MAX_TORQUE = 10.0  # N m
AZIMUTHS = np.radians([-102.7, 17.3, 137.3])  # of the wheels
MAX_TILT = 20.0  # degrees
ALIVE_REWARD = 0.02  # of the published task, a step
IMAGE_EVERY = 6  # steps between two depth images: 83.3 Hz
TERRAINS = 10_000  # seeds of uneven ground in each split
DROP = 0.03  # m: the ball starts so far above the highest ground under it ...
UNDER_BALL = round(BALL_RADIUS / SPACING)  # points: ... which is what lies no further than this from the middle
LONGEST = 4800  # steps: so long the robot stays on its ground, 5 m to each side, even at top speed, 0.51 m/s
DRIVING_LEAN = 0.02  # rad: what pid-drive keeps

# qpos: base position 3, quaternion 4; drive and slip of three wheels; ball position 3, quaternion 4
BASE, QUATERNION, DRIVES, BALL = slice(0, 3), slice(3, 7), slice(7, 13, 2), slice(13, 16)
BASE_Z, BALL_Z = 2, 15
VELOCITY, ANGULAR_VELOCITY, WHEELS = slice(0, 3), slice(3, 6), slice(6, 12, 2)  # in qvel
OBS_HIGH = np.array([3.15] * 3 + [2] * 9 + [1] * 3 + [IMAGE_EVERY * TIMESTEP], np.float32)
OBS_LOW = np.append(-OBS_HIGH[:-1], np.float32(0))


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle, (N, 3) rad, at most pi long, of unit quaternions (N, 4) wxyz."""
    quaternion = np.where(quaternion[:, :1] < 0, -quaternion, quaternion)
    w, axis = quaternion[:, 0], quaternion[:, 1:]
    sine = np.sqrt(np.square(axis).sum(1))
    angle = 2 * np.arctan2(sine, w)
    return axis * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2)[:, None]


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Body to world, (N, 3, 3), of unit quaternions (N, 4) wxyz."""
    w, x, y, z = quaternion.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


class PID:
    """Balances by its tilt alone: each wheel pushes the ball under the side to which the robot leans.

    u = kp error + ki sum of error dt + kd rate, for roll and for pitch; the wheel at azimuth t gets
    u_roll cos(t) + u_pitch sin(t). With a set-point it leans that way, and so drives there.

    Twice the published gains, with which it stands on about three quarters of uneven grounds instead of a third.

    Observations (N, 16 or more) -> actions (N, 3).

    Args:
        lean: set-point, rad, towards +y of the world.
    """

    KP, KI, KD = 40.0, 30.0, 4.0

    def __init__(self, lean: float = 0.0):
        self.lean = lean
        self.integral = np.zeros((0, 2))

    def reset(self, rows: np.ndarray, vec: Any) -> None:
        """Episodes begin in these rows of vec."""
        if len(self.integral) != vec.num_envs:
            self.integral = np.zeros((vec.num_envs, 2))
        self.integral[rows] = 0
        self.dt = TIMESTEP * vec.action_repeat

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        obs = obs.astype(np.float64)
        half = np.sqrt(np.square(obs[:, :3]).sum(1, keepdims=True)) / 2
        quaternion = np.concatenate([np.cos(half), obs[:, :3] * np.sinc(half / np.pi) / 2], axis=1)
        rotation = rotation_matrix(quaternion)
        tilt = np.stack([rotation[:, 2, 1], -rotation[:, 2, 0]], axis=1)  # roll and pitch, of small angles
        # the lean of the body that tips its top towards +y of the world: about the body's own axes, by its yaw
        wanted = self.lean * np.stack([-rotation[:, 0, 0], -rotation[:, 0, 1]], axis=1)
        error = tilt - wanted
        self.integral += error * self.dt
        roll, pitch = (self.KP * error + self.KI * self.integral + self.KD * obs[:, 3:5]).T
        command = roll[:, None] * np.cos(AZIMUTHS) + pitch[:, None] * np.sin(AZIMUTHS)
        return command.clip(-1, 1).astype(np.float32)


# {elevation: models of environments that were closed}. Every evaluation of a run has as many as the one before; what a
# model of 2 MB leaves when it is freed is filled with other things, and a run would grow by and by.
SPARE: dict[float, list[mujoco.MjModel]] = {}


def take_models(elevation: float, count: int) -> list[mujoco.MjModel]:
    """Models with a height field up to `elevation` (m; 0 for flat ground); its heights may be old ones."""
    spare, models = SPARE.setdefault(elevation, []), []
    while spare and len(models) < count:
        models.append(spare.pop())
    if len(models) < count:
        spec = mujoco.MjSpec.from_file(str(ASSET))
        spec.hfield("terrain").size[2] = elevation or 1e-3
        models += [spec.compile() for _ in range(count - len(models))]
    return models


def check(terrain_height: float, max_episode_steps: int, action_repeat: int, threads: int) -> None:
    """Raises ValueError for a value out of its range."""
    if terrain_height != 0 and not 1e-3 <= terrain_height <= 1:  # MuJoCo refuses a height field without any height
        raise ValueError(f"terrain_height must be 0, or between 0.001 and 1 m, not {terrain_height}")
    if not 1 <= max_episode_steps <= LONGEST:
        where = f"between 1 and {LONGEST}, after which the ground could end"
        raise ValueError(f"max_episode_steps must be {where}, not {max_episode_steps}")
    if action_repeat < 1 or max_episode_steps % action_repeat:
        raise ValueError(f"action_repeat must divide max_episode_steps {max_episode_steps}, not {action_repeat}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")


def check_shaping(
    goal_direction: float, alive_reward: float, fall_penalty: float, speed_limit: float | None, max_tilt: float
) -> None:
    """Raises ValueError for a value out of its range."""
    for name, value in (("alive_reward", alive_reward), ("goal_direction", goal_direction)):
        if not np.isfinite(value):
            raise ValueError(f"{name} must be finite, not {value}")
    if not 0 <= fall_penalty < np.inf:
        raise ValueError(f"fall_penalty must be 0 or more, not {fall_penalty}")
    if speed_limit is not None and not speed_limit > 0:
        raise ValueError(f"speed_limit must be above 0 m/s, not {speed_limit}")
    if not 0 < max_tilt <= 90:
        raise ValueError(f"max_tilt must be above 0 and at most 90 degrees, not {max_tilt}")


class Ballbot(BatchEnv):
    """A robot of 4 kg stands on a ball of 9 cm radius that three omniwheels turn, and is to drive over uneven ground.

    Observation (16): orientation of the base as a rotation vector 3 (rad), its angular velocity in its own frame 3
    (rad/s, cut off at +-2), its velocity in the world 3 (m/s, +-2), wheel speeds 3 (10 rad/s, +-2), last action 3, and
    the age of the newest depth images 1 (s). Action (3): torques of the wheels, where 1 is -10 N m, within +-1.

    The task (training=False): of a step of 2 ms the reward is (velocity . goal) / 100 - 1e-4 |action|^2, and 0.02
    for standing. It starts upright, at rest, 3 cm above the ground. A lean of more than 20 degrees ends the episode
    (is_failure), 4000 steps truncate it (is_success). The published simulation (arXiv 2505.18417) needs a patched
    MuJoCo for its wheels; see envs/assets/ballbot.xml for the wheels that need none.

    `action_repeat` steps are made with one action. Lengths count steps of 2 ms all the same, rewards add up, and a
    lean is noticed in the step in which it happens.

    Idealised: the wheels, of which each is a sphere with an axis free to slip; nothing touches but wheels, ball and
    ground; motors without dead time, sensors without noise.

    Args:
        num_envs, training, split, render_mode: as in BatchEnv.
        terrain: perlin for uneven ground, another in each episode, or flat.
        terrain_height: m from the lowest to the highest point of uneven ground.
        max_episode_steps: of 2 ms; a multiple of action_repeat.
        goal_direction: degrees from x to y: which way to drive.
        action_repeat: steps that an action lasts.
        alive_reward: of training only, instead of 0.02.
        fall_penalty: of training only, subtracted for a fall.
        speed_limit: of training only, m/s: the reward has 2 speed_limit - speed for what is faster, so more pays less.
        max_tilt: of training only, degrees: what counts as a fall. Below 20 the robot learns to keep a margin.
        stagger: of training only: the episode that `reset` begins is cut off after a random part of its time. Rows that
            do not fall would else stand at the same point of their episodes, and a rollout show that part alone.
        threads: CPU threads of the simulator; the result does not depend on it.

    Raises:
        ValueError: a value out of its range.
    """

    controllers: ClassVar = {"pid": PID, "pid-drive": partial(PID, lean=DRIVING_LEAN)}
    measures: ClassVar = ("distance",)

    def __init__(
        self,
        num_envs: int = 1,
        training: bool = True,
        split: str = "train",
        render_mode: str | None = None,
        terrain: Literal["perlin", "flat"] = "perlin",
        terrain_height: float = 0.1,
        max_episode_steps: int = 4000,
        goal_direction: float = 90.0,
        action_repeat: int = 1,
        alive_reward: float = ALIVE_REWARD,
        fall_penalty: float = 0.0,
        speed_limit: float | None = None,
        max_tilt: float = MAX_TILT,
        stagger: bool = False,
        threads: int = 1,
    ):
        check(terrain_height, max_episode_steps, action_repeat, threads)
        check_shaping(goal_direction, alive_reward, fall_penalty, speed_limit, max_tilt)
        observation_space = gym.spaces.Box(OBS_LOW, OBS_HIGH, dtype=np.float32)
        action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        super().__init__(num_envs, observation_space, action_space, max_episode_steps, training, split, render_mode)
        self.stagger, self.limit = stagger and training, np.full(num_envs, max_episode_steps)
        self.uneven, self.action_repeat = terrain == "perlin" and terrain_height > 0, action_repeat
        self.goal = np.array([np.cos(np.radians(goal_direction)), np.sin(np.radians(goal_direction))])
        self.alive_reward = alive_reward if training else ALIVE_REWARD
        self.fall_penalty = fall_penalty if training else 0.0
        self.speed_limit = speed_limit if training and speed_limit is not None else np.inf
        self.lowest = np.cos(np.radians(max_tilt if training else MAX_TILT))  # cosine of a lean that is a fall

        self.elevation = terrain_height if self.uneven else 0.0
        self.models = take_models(self.elevation, num_envs)  # one each: a height field belongs to a model
        self.batch = Batch(self.models[0], num_envs, threads)
        self.batch.set_models(self.models)
        self.qpos, self.qvel, self.torque = (self.batch.bind(field) for field in ("qpos", "qvel", "ctrl"))
        self.ground = np.zeros((num_envs, POINTS, POINTS), np.float32)  # m
        self.steepest = np.zeros(num_envs)  # slope
        self.terrain_seed = np.full(num_envs, -1)
        self.steps = np.zeros(num_envs, np.int64)  # of the episode
        self.action = np.zeros((num_envs, 3))
        self.distance = np.zeros(num_envs)  # m towards the goal
        self.exposed = self.qpos.copy()  # where everything was when the newest images were taken
        self.metadata = {**self.metadata, "render_fps": 1 / (TIMESTEP * action_repeat)}
        self.view = View("chase", self.metadata["render_fps"])

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[Any, dict]:
        obs, info = super().reset(seed=seed, options=options)
        if self.stagger:
            for i in self.rows_to_reset(options):
                self.limit[i] = self.rngs[i].integers(1, self.max_episode_steps + 1)
        return obs, info

    def start(self, rows: np.ndarray) -> None:
        self.limit[rows] = self.max_episode_steps
        self.batch.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE)
        for i in rows:
            if self.uneven:
                self.terrain_seed[i] = TERRAINS * SPLITS.index(self.split) + self.rngs[i].integers(TERRAINS)
                self._lay_ground(i)
        near = slice(POINTS // 2 - UNDER_BALL, POINTS // 2 + UNDER_BALL + 1)
        lift = self.ground[rows, near, near].max((1, 2)) + DROP - (self.qpos[rows, BALL_Z] - BALL_RADIUS)
        self.qpos[rows, BALL_Z] += lift
        self.qpos[rows, BASE_Z] += lift
        self.steps[rows], self.action[rows], self.distance[rows] = 0, 0, 0
        self.exposed[rows] = self.qpos[rows]
        self.look(rows)

    def _lay_ground(self, i: int) -> None:
        """Row i's ground from its seed."""
        field = heights(int(self.terrain_seed[i]))
        self.models[i].hfield_data[:] = field.ravel()
        self.ground[i] = self.elevation * field
        along_x, along_y = np.diff(self.ground[i], axis=1)[:-1], np.diff(self.ground[i], axis=0)[:, :-1]
        self.steepest[i] = np.sqrt((along_x * along_x + along_y * along_y).max()) / SPACING
        if i == 0:
            self.view.changed()

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        self.action[:] = action
        self.torque[:] = -MAX_TORQUE * np.clip(self.action, -1, 1)
        effort = 1e-4 * np.square(self.action).sum(1)
        reward, fallen = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        self.steps_made = np.zeros(self.num_envs, np.int64)  # until a fall, after which the row only waits for the rest
        exposed = np.zeros(self.num_envs, bool)
        for _ in range(self.action_repeat):
            self.batch.step()
            self.qpos[:, DRIVES] = 0  # see the asset
            going, upright = ~fallen, self._upright() > self.lowest
            forward = self.qvel[:, VELOCITY][:, :2] @ self.goal
            paid = np.minimum(forward, 2 * self.speed_limit - forward) / 100
            step_reward = paid - effort + np.where(upright, self.alive_reward, -self.fall_penalty)
            reward += np.where(going, step_reward, 0)
            self.distance += np.where(going, forward * TIMESTEP, 0)
            self.steps_made += going
            fallen |= ~upright
            self.steps += 1
            due = self.steps % IMAGE_EVERY == 0
            self.exposed[due] = self.qpos[due]
            exposed |= due
        self.look(np.flatnonzero(exposed))
        standing = ~fallen & (self.episode_length + self.action_repeat >= self.max_episode_steps)
        return reward, fallen, {"is_success": standing, "is_failure": fallen, "distance": self.distance.copy()}

    def _upright(self) -> np.ndarray:
        """Cosine of the lean, (N,)."""
        x, y = self.qpos[:, 4], self.qpos[:, 5]
        return 1 - 2 * (x * x + y * y)

    def look(self, rows: np.ndarray) -> None:
        """Draws the newest depth images of these rows; this robot has no cameras."""

    def observe(self, rows: np.ndarray) -> np.ndarray:
        qvel = self.qvel[rows]
        parts = [
            rotation_vector(self.qpos[rows, QUATERNION]),
            qvel[:, ANGULAR_VELOCITY],
            qvel[:, VELOCITY],
            qvel[:, WHEELS] / 10,
            self.action[rows],
            self.steps[rows, None] % IMAGE_EVERY * TIMESTEP,
        ]
        return np.concatenate(parts, axis=1).astype(np.float32).clip(OBS_LOW, OBS_HIGH)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "physics": self.batch.state,
            "terrain_seed": self.terrain_seed,
            "steps": self.steps,
            "limit": self.limit,
            "action": self.action,
            "distance": self.distance,
        }

    def load_state_dict(self, state: dict) -> np.ndarray:
        before = self.terrain_seed.copy()
        super().load_state_dict(state)
        for i in np.flatnonzero((self.terrain_seed != before) & (self.terrain_seed >= 0)):
            self._lay_ground(i)
        return self.observe(np.arange(self.num_envs))

    def render(self) -> np.ndarray | None:
        """Row 0, drawn by MuJoCo: an image (480, 640, 3) uint8, or in mode human a window."""
        data = self.batch.get_data(0)
        mujoco.mj_forward(self.models[0], data)
        return (self.view.window if self.render_mode == "human" else self.view.image)(self.models[0], data)

    def close_extras(self, **kwargs: Any) -> None:
        self.view.close()
        SPARE.setdefault(self.elevation, []).extend(self.models)


class BallbotDepth(Ballbot):
    """The ballbot with two depth cameras that look down at where ball and ground meet, every 6 steps (83.3 Hz).

    Its observation goes on, after the 16 numbers of Ballbot, with the newest images (2 x depth_size x depth_size
    pixels, m along the view axis, cut off at 1 m), or with their codes (2 x 20) if there is an encoder.

    Idealised: the cameras see ball and ground only, without noise.

    Args:
        depth_size: pixels along each side of an image.
        encoder: file of tools/pretrain_encoder.py, which encodes the images.
        others: those of Ballbot.

    Raises:
        ValueError: a value out of its range.
        ValueError: the encoder's file is missing, damaged, or made for another size.
    """

    def __init__(self, *args: Any, depth_size: int = 16, encoder: str | None = None, **others: Any):
        if not 1 <= depth_size <= 256:
            raise ValueError(f"depth_size must be between 1 and 256, not {depth_size}")
        self.encoder = FrozenEncoder(encoder, depth_size) if encoder is not None else None
        self.cameras = DepthCameras(depth_size)
        super().__init__(*args, **others)
        features = 2 * (CODE if encoder is not None else depth_size**2)
        lowest, highest = (-1, 1) if encoder is not None else (0, FAR)
        low = np.concatenate([OBS_LOW, np.full(features, lowest, np.float32)])
        high = np.concatenate([OBS_HIGH, np.full(features, highest, np.float32)])
        self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.features = np.zeros((self.num_envs, features), np.float32)

    def look(self, rows: np.ndarray) -> None:
        if len(rows) == 0:
            return
        qpos = self.exposed[rows]
        position, ball, rotation = qpos[:, BASE], qpos[:, BALL], rotation_matrix(qpos[:, QUATERNION])
        images = self.cameras(position, rotation, ball, self.ground, rows, self.steepest[rows])
        self.features[rows] = images.reshape(len(rows), -1) if self.encoder is None else self.encoder(images)

    def observe(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([super().observe(rows), self.features[rows]], axis=1)

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "features": self.features}


class BallbotEnv(SingleEnv):
    """One Ballbot as an ordinary Gymnasium environment."""

    batch_env = Ballbot


class BallbotDepthEnv(SingleEnv):
    """One BallbotDepth as an ordinary Gymnasium environment."""

    batch_env = BallbotDepth
