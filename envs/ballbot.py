"""Ballbot-v0 and BallbotDepth-v0: a robot that balances on a ball and drives over uneven ground."""

import functools
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector.utils import batch_space
from mujoco.batch import Batch

from envs.ballbot_depth import BALL_RADIUS, CODE, FAR, DepthCameras, FrozenEncoder
from envs.ballbot_terrain import POINTS, SPACING, heights
from envs.batch_env import SPLITS, BatchEnv, SingleEnv, cpu_threads
from envs.disturbances import Disturbances, Float, Int, delayed
from envs.render import RobotRenderer

ASSET = Path(__file__).parent / "assets" / "ballbot.xml"
TIMESTEP = 0.002  # s
MAX_TORQUE = 10.0  # N m
AZIMUTHS = np.radians([-102.7, 17.3, 137.3])  # of the wheels
MAX_TILT = 20.0  # degrees
ALIVE_REWARD = 0.02  # per step of the published task
IMAGE_EVERY = 6  # steps between two depth images: 83.3 Hz
TERRAINS = 10_000  # number of terrain seeds per split
DROP = 0.03  # initial height of the ball above the highest ground under it, m
UNDER_BALL = round(BALL_RADIUS / SPACING)  # half width of the ground under the ball, grid points
LONGEST = 4800  # steps in which the robot cannot reach the end of the ground, 5 m away, at its top speed of 0.51 m/s
DRIVING_LEAN = 0.02  # set point of pid-drive, rad
GOAL = np.array([np.cos(np.pi / 2), np.sin(np.pi / 2)])  # direction of travel: +y

# qpos: base position 3, quaternion 4; drive and slip of three wheels; ball position 3, quaternion 4
BASE, QUATERNION, DRIVES, BALL = slice(0, 3), slice(3, 7), slice(7, 13, 2), slice(13, 16)
BASE_Z, BALL_Z = 2, 15
VELOCITY, ANGULAR_VELOCITY, WHEELS = slice(0, 3), slice(3, 6), slice(6, 12, 2)  # in qvel
OBS_HIGH = np.array([3.15] * 3 + [2] * 9 + [1] * 3 + [IMAGE_EVERY * TIMESTEP], np.float32)
OBS_LOW = np.append(-OBS_HIGH[:-1], np.float32(0))

cached_heights = functools.lru_cache(maxsize=128)(heights)  # every evaluation uses the same grounds


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vectors (N, 3), rad, of length at most pi, of unit quaternions (N, 4) wxyz."""
    quaternion = np.where(quaternion[:, :1] < 0, -quaternion, quaternion)
    w, axis = quaternion[:, 0], quaternion[:, 1:]
    sine = np.sqrt(np.square(axis).sum(1))
    angle = 2 * np.arctan2(sine, w)
    return axis * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2)[:, None]


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrices (N, 3, 3), body to world, of unit quaternions (N, 4) wxyz."""
    w, x, y, z = quaternion.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


class PID:
    """PID controller of the tilt: each wheel moves the ball under the side to which the robot leans.

    u = kp error + ki sum of error dt + kd rate, for roll and for pitch; the wheel at azimuth t gets
    u_roll cos(t) + u_pitch sin(t). With a set point the robot leans and therefore drives.

    The gains are twice the published ones; with them the robot stands on about three quarters of the uneven terrains
    instead of a third. Observations (N, 16 or more) -> actions (N, 3).

    Args:
        lean: set point, rad, toward +y of the world.
    """

    KP, KI, KD = 40.0, 30.0, 4.0

    def __init__(self, lean: float = 0.0):
        self.lean = lean
        self.integral = np.zeros((0, 2))

    def reset(self, indices: np.ndarray, envs: Any) -> None:
        """Called when episodes begin in these environments."""
        if len(self.integral) != envs.num_envs:
            self.integral = np.zeros((envs.num_envs, 2))
        self.integral[indices] = 0
        self.dt = TIMESTEP * envs.action_repeat

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        obs = obs.astype(np.float64)
        half = np.sqrt(np.square(obs[:, :3]).sum(1, keepdims=True)) / 2
        quaternion = np.concatenate([np.cos(half), obs[:, :3] * np.sinc(half / np.pi) / 2], axis=1)
        rotation = rotation_matrix(quaternion)
        tilt = np.stack([rotation[:, 2, 1], -rotation[:, 2, 0]], axis=1)  # roll and pitch, of small angles
        # Set point in the axes of the body: tilt the top toward +y of the world
        wanted = self.lean * np.stack([-rotation[:, 0, 0], -rotation[:, 0, 1]], axis=1)
        error = tilt - wanted
        self.integral += error * self.dt
        roll, pitch = (self.KP * error + self.KI * self.integral + self.KD * obs[:, 3:5]).T
        command = roll[:, None] * np.cos(AZIMUTHS) + pitch[:, None] * np.sin(AZIMUTHS)
        return command.clip(-1, 1).astype(np.float32)


# {elevation: models of closed environments}, which later evaluations use again. Freeing and allocating models of 2 MB
# would fragment the memory of a long run.
SPARE: dict[float, list[mujoco.MjModel]] = {}


def take_models(elevation: float, count: int) -> list[mujoco.MjModel]:
    """Models whose height field has this elevation (m; 0 for flat ground); its heights may be of an earlier episode."""
    spare, models = SPARE.setdefault(elevation, []), []
    while spare and len(models) < count:
        models.append(spare.pop())
    if len(models) < count:
        spec = mujoco.MjSpec.from_file(str(ASSET))
        spec.hfield("terrain").size[2] = elevation or 1e-3
        models += [spec.compile() for _ in range(count - len(models))]
    return models


def scale_mass(model: mujoco.MjModel, mass: np.ndarray, inertia: np.ndarray, factor: float) -> None:
    """Give the bodies of the robot, all but the ball, these masses and inertias times a factor."""
    factors = np.full(model.nbody, factor)
    factors[model.body("ball").id] = 1
    model.body_mass[:], model.body_inertia[:] = factors * mass, factors[:, None] * inertia
    mujoco.mj_setConst(model, mujoco.MjData(model))


class Ballbot(BatchEnv):
    """A robot of 4 kg on a ball of 9 cm radius, which three omniwheels turn, drives over uneven ground.

    Observation (16): orientation of the base as a rotation vector 3 (rad), its angular velocity in the body frame 3
    (rad/s, clipped to +-2), its velocity in the world frame 3 (m/s, +-2), wheel speeds 3 (10 rad/s, +-2), last action
    3, and age of the newest depth images 1 (s). Action (3): wheel torques in units of -10 N m, in [-1, 1].

    Task (training=False): the reward per step of 2 ms is velocity toward +y / 100 - 1e-4 |action|^2, and 0.02 for
    standing. The robot starts upright, at rest, 3 cm above the ground. A tilt of more than 20 degrees terminates the
    episode (is_failure); 4000 steps truncate it (is_success). The published simulation (arXiv 2505.18417) needs a
    patched MuJoCo for its wheels; envs/assets/ballbot.xml describes the wheels that do not.

    With action_repeat, lengths still count steps of 2 ms, rewards add up, and a fall ends the episode in its step.

    Idealizations: each wheel is a sphere with a free slip axis; only wheels, ball and ground collide; motors have no
    delay and sensors no noise, unless the arguments say otherwise.

    Args:
        num_envs, training, split, render_mode: see BatchEnv.
        terrain: perlin for uneven ground, a new one in each episode, or flat.
        terrain_height: height difference of uneven ground, m.
        max_episode_steps: time limit in steps of 2 ms; a multiple of action_repeat, at most 4800.
        action_repeat: steps per action.
        alive_reward: in training only, instead of 0.02.
        fall_penalty: in training only, subtracted for a fall.
        speed_limit: in training only, m/s; above it, speed in the reward is replaced by 2 speed_limit - speed.
        max_tilt: in training only, tilt that counts as a fall, degrees.
        stagger: in training only, truncate the episodes that reset() begins after random times, so that environments
            in which the robot does not fall are in different phases.
        mass: factor on the mass and inertia of the robot without the ball.
        motor_gain: factor on the torques.
        motor_delay: delay of the torques in steps of 2 ms.
        sensor_noise: standard deviation of the observed orientation (rad), angular velocity (rad/s), velocity (m/s)
            and wheel speeds (10 rad/s).
        sensor_bias: standard deviation of their constant error in an episode. These five may be ranges (low, high),
            from which each episode draws a value.
        threads: CPU threads of the simulator, by default one per core; the result does not depend on it.

    Raises:
        ValueError: max_episode_steps or action_repeat is out of range.
    """

    controllers: ClassVar = {"pid": PID, "pid-drive": functools.partial(PID, lean=DRIVING_LEAN)}
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
        action_repeat: int = 1,
        alive_reward: float = ALIVE_REWARD,
        fall_penalty: float = 0.0,
        speed_limit: float | None = None,
        max_tilt: float = MAX_TILT,
        stagger: bool = False,
        mass: Float = 1.0,
        motor_gain: Float = 1.0,
        motor_delay: Int = 0,
        sensor_noise: Float = 0.0,
        sensor_bias: Float = 0.0,
        threads: int | None = None,
    ):
        if not 1 <= max_episode_steps <= LONGEST:
            raise ValueError(f"max_episode_steps must be from 1 to {LONGEST}, not {max_episode_steps}")
        if action_repeat < 1 or max_episode_steps % action_repeat:
            raise ValueError(f"action_repeat must divide max_episode_steps {max_episode_steps}, not {action_repeat}")
        observation_space = gym.spaces.Box(OBS_LOW, OBS_HIGH, dtype=np.float32)
        action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        super().__init__(num_envs, observation_space, action_space, max_episode_steps, training, split, render_mode)
        self.stagger, self.limit = stagger and training, np.full(num_envs, max_episode_steps)
        self.uneven, self.action_repeat = terrain == "perlin" and terrain_height > 0, action_repeat
        self.alive_reward = alive_reward if training else ALIVE_REWARD
        self.fall_penalty = fall_penalty if training else 0.0
        self.speed_limit = speed_limit if training and speed_limit is not None else np.inf
        self.lowest = np.cos(np.radians(max_tilt if training else MAX_TILT))  # cosine of the tilt that counts as a fall

        self.elevation = terrain_height if self.uneven else 0.0
        self.models = take_models(self.elevation, num_envs)  # one per environment: a model has one height field
        self.batch = Batch(self.models[0], num_envs, threads or cpu_threads(num_envs))
        self.batch.set_models(self.models)
        self.qpos, self.qvel, self.torque = (self.batch.bind(field) for field in ("qpos", "qvel", "ctrl"))
        ranges = {"mass": mass, "motor_gain": motor_gain, "motor_delay": motor_delay}
        ranges |= {"sensor_noise": sensor_noise, "sensor_bias": sensor_bias}
        self.disturbances = Disturbances(num_envs, ranges)
        self.torques = np.zeros((num_envs, self.disturbances.highest("motor_delay") + 1, 3))  # oldest first
        self.noisy = any(self.disturbances.highest(name) for name in ("sensor_noise", "sensor_bias"))
        self.bias, self.noise = np.zeros((num_envs, 12)), np.zeros((num_envs, 12))
        self.varied_mass = mass != 1
        self.nominal_mass, self.nominal_inertia = self.models[0].body_mass.copy(), self.models[0].body_inertia.copy()
        self.ground = np.zeros((num_envs, POINTS, POINTS), np.float32)  # m
        self.steepest = np.zeros(num_envs)  # slope
        self.terrain_seed = np.full(num_envs, -1)
        self.steps = np.zeros(num_envs, np.int64)  # of the episode
        self.action = np.zeros((num_envs, 3))
        self.distance = np.zeros(num_envs)  # m toward the goal
        self.exposed = self.qpos.copy()  # positions when the newest images were taken
        self.metadata = {**self.metadata, "render_fps": 1 / (TIMESTEP * action_repeat)}
        self.renderer = RobotRenderer(render_mode, "chase", self.metadata["render_fps"])

    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[Any, dict]:
        obs, info = super().reset(seed=seed, options=options)
        if self.stagger:
            for i in self.indices_to_reset(options):
                self.limit[i] = self.rngs[i].integers(1, self.max_episode_steps + 1)
        return obs, info

    def start(self, indices: np.ndarray) -> None:
        self.limit[indices] = self.max_episode_steps
        self.batch.reset(indices, stage=mujoco.mjtStage.mjSTAGE_NONE)
        for i in indices:
            if self.uneven:
                self.terrain_seed[i] = TERRAINS * SPLITS.index(self.split) + self.rngs[i].integers(TERRAINS)
                self._lay_ground(i)
            self.disturbances.draw(i, self.rngs[i])
            if self.noisy:
                self.bias[i] = self.rngs[i].normal(0, self.disturbances["sensor_bias"][i], 12)
        self._draw_noise(indices)
        self._set_mass(indices)
        self.torques[indices] = 0
        near = slice(POINTS // 2 - UNDER_BALL, POINTS // 2 + UNDER_BALL + 1)
        lift = self.ground[indices, near, near].max((1, 2)) + DROP - (self.qpos[indices, BALL_Z] - BALL_RADIUS)
        self.qpos[indices, BALL_Z] += lift
        self.qpos[indices, BASE_Z] += lift
        self.steps[indices], self.action[indices], self.distance[indices] = 0, 0, 0
        self.exposed[indices] = self.qpos[indices]
        self.look(indices)

    def _draw_noise(self, indices: np.ndarray) -> None:
        if self.noisy:
            for i in indices:
                self.noise[i] = self.bias[i] + self.rngs[i].normal(0, self.disturbances["sensor_noise"][i], 12)

    def _set_mass(self, indices: np.ndarray) -> None:
        if self.varied_mass:
            for i in indices:
                scale_mass(self.models[i], self.nominal_mass, self.nominal_inertia, self.disturbances["mass"][i])

    def _lay_ground(self, i: int) -> None:
        """Make the ground of environment i from its seed."""
        field = (heights if self.training else cached_heights)(int(self.terrain_seed[i]))
        self.models[i].hfield_data[:] = field.ravel()
        self.ground[i] = self.elevation * field
        along_x, along_y = np.diff(self.ground[i], axis=1)[:-1], np.diff(self.ground[i], axis=0)[:, :-1]
        self.steepest[i] = np.sqrt((along_x * along_x + along_y * along_y).max()) / SPACING
        if i == 0:
            self.renderer.terrain_changed = True

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        self.action[:] = action
        torque = -MAX_TORQUE * np.clip(self.action, -1, 1) * self.disturbances["motor_gain"][:, None]
        self.torque[:] = torque
        effort = 1e-4 * np.square(self.action).sum(1)
        reward, fallen = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        self.steps_made = np.zeros(self.num_envs, np.int64)  # steps before a fall
        exposed = np.zeros(self.num_envs, bool)
        for _ in range(self.action_repeat):
            if self.torques.shape[1] > 1:
                self.torque[:] = delayed(self.torques, torque, self.disturbances["motor_delay"])
            self.batch.step(self.running)
            self.qpos[:, DRIVES] = 0  # see the asset
            going, upright = ~fallen, self._upright() > self.lowest
            forward = self.qvel[:, VELOCITY][:, :2] @ GOAL
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
        self._draw_noise(np.arange(self.num_envs))
        self.look(np.flatnonzero(exposed))
        standing = ~fallen & (self.episode_length + self.action_repeat >= self.max_episode_steps)
        return reward, fallen, {"is_success": standing, "is_failure": fallen, "distance": self.distance.copy()}

    def _upright(self) -> np.ndarray:
        """Cosine of the tilt (N,)."""
        x, y = self.qpos[:, 4], self.qpos[:, 5]
        return 1 - 2 * (x * x + y * y)

    def look(self, indices: np.ndarray) -> None:
        """Update the depth images of these environments; this robot has no cameras."""

    def observe(self, indices: np.ndarray) -> np.ndarray:
        qvel = self.qvel[indices]
        parts = [
            rotation_vector(self.qpos[indices, QUATERNION]),
            qvel[:, ANGULAR_VELOCITY],
            qvel[:, VELOCITY],
            qvel[:, WHEELS] / 10,
            self.action[indices],
            self.steps[indices, None] % IMAGE_EVERY * TIMESTEP,
        ]
        obs = np.concatenate(parts, axis=1)
        if self.noisy:
            obs[:, :12] += self.noise[indices]
        return obs.astype(np.float32).clip(OBS_LOW, OBS_HIGH)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "physics": self.batch.state,
            "terrain_seed": self.terrain_seed,
            "steps": self.steps,
            "limit": self.limit,
            "action": self.action,
            "distance": self.distance,
            **({"bias": self.bias, "noise": self.noise} if self.noisy else {}),
            **({"torques": self.torques} if self.torques.shape[1] > 1 else {}),
            **self.disturbances.state(),
        }

    def load_state_dict(self, state: dict) -> np.ndarray:
        before = self.terrain_seed.copy()
        super().load_state_dict(state)
        self._set_mass(np.arange(self.num_envs))
        for i in np.flatnonzero((self.terrain_seed != before) & (self.terrain_seed >= 0)):
            self._lay_ground(i)
        return self.observe(np.arange(self.num_envs))

    def render(self) -> np.ndarray | None:
        """Environment 0 as an image (480, 640, 3) uint8; None in human mode, which opens a window."""
        data = self.batch.get_data(0)
        mujoco.mj_forward(self.models[0], data)
        return self.renderer.render(self.models[0], data)

    def close_extras(self, **kwargs: Any) -> None:
        self.renderer.close()
        for model in self.models if self.varied_mass else ():
            scale_mass(model, self.nominal_mass, self.nominal_inertia, 1.0)
        SPARE.setdefault(self.elevation, []).extend(self.models)


class BallbotDepth(Ballbot):
    """The ballbot with two depth cameras that look down at the contact of ball and ground, every 6 steps (83.3 Hz).

    The observation of Ballbot (16) is followed by the newest images (2 x depth_size x depth_size, m along the view
    axis, clipped to 1 m) or, with an encoder, by their codes (2 x 20).

    Idealization: the cameras see ball and ground only, without noise.

    Args:
        depth_size: pixels per side of an image.
        encoder: file of tools/pretrain_encoder.py that encodes the images.
        kwargs: see Ballbot.

    Raises:
        ValueError: a value is out of range, or the encoder file is missing, damaged or for another depth_size.
    """

    def __init__(self, *args: Any, depth_size: int = 16, encoder: str | None = None, **kwargs: Any):
        self.encoder = FrozenEncoder(encoder, depth_size) if encoder is not None else None
        self.cameras = DepthCameras(depth_size)
        super().__init__(*args, **kwargs)
        features = 2 * (CODE if encoder is not None else depth_size**2)
        lowest, highest = (-1, 1) if encoder is not None else (0, FAR)
        low = np.concatenate([OBS_LOW, np.full(features, lowest, np.float32)])
        high = np.concatenate([OBS_HIGH, np.full(features, highest, np.float32)])
        self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.features = np.zeros((self.num_envs, features), np.float32)

    def look(self, indices: np.ndarray) -> None:
        if len(indices) == 0:
            return
        qpos = self.exposed[indices]
        position, ball, rotation = qpos[:, BASE], qpos[:, BALL], rotation_matrix(qpos[:, QUATERNION])
        images = self.cameras(position, rotation, ball, self.ground, indices, self.steepest[indices])
        self.features[indices] = images.reshape(len(indices), -1) if self.encoder is None else self.encoder(images)

    def observe(self, indices: np.ndarray) -> np.ndarray:
        return np.concatenate([super().observe(indices), self.features[indices]], axis=1)

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "features": self.features}


class BallbotEnv(SingleEnv):
    """Ballbot as a Gymnasium environment."""

    batch_env = Ballbot


class BallbotDepthEnv(SingleEnv):
    """BallbotDepth as a Gymnasium environment."""

    batch_env = BallbotDepth
