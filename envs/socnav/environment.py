"""SocNavGrid-v0: a robot drives to its goal through crowds, doorways and corridors without contact.

All environments are stepped together in PyTorch, on the CPU or a GPU. dynamics.py and crowd.py contain the motion of
robots and pedestrians, scenarios.py and starts.py the maps, grid.py the occupancy grid, metrics.py metrics and rewards.
"""

import functools
import multiprocessing
import zlib
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from envs import UserError
from envs.batch_env import Array, BatchEnv, SingleEnv, env_seeds
from envs.socnav import GOAL_RANGE, PEDESTRIAN_RANGE, PEDESTRIAN_SPEED, controllers, metrics
from envs.socnav.crowd import Crowd
from envs.socnav.drawing import Drawing
from envs.socnav.dynamics import DT, PEDESTRIAN_RADIUS, drive, from_rectangles, length, make_robot, rotate
from envs.socnav.grid import CHANNELS, OccupancyGrid
from envs.socnav.scenarios import FILE, choose
from envs.socnav.starts import World

GOAL_RADIUS = 1.0  # m beyond the robot's own, within which a waypoint counts as reached
LOOK_AHEAD = 3.0  # m along the route
WINDOW = (
    3.0  # m; the position on the route changes by less in a step, so that it cannot jump where a route meets itself
)
NEAREST = 64  # pedestrians in an observation
REMAINING_RANGE = 100.0  # m of remaining route that the observation scales to 1
STARTS = {"train": 10, "validation": 64, "test": 256}  # per scenario or variant of a scenario


@functools.lru_cache(maxsize=8)
def load_world(
    split: str, training: bool, scenario: str | None, file: str, pedestrians: bool, density: float | None, device: str
) -> World:
    """The starts of a split. They are cached, because every evaluation needs them."""
    chosen = choose(split, training, scenario, file)
    if density is not None:
        chosen = [replace(one, crowds=tuple(replace(c, density=density) for c in one.crowds)) for one in chosen]
    return World(chosen, STARTS[split], pedestrians, training, f"{split} {training}", device)


def limited(vector: Tensor, reach: float) -> Tensor:
    """A vector (2, ...) in units of `reach`, shortened to length 1 where it is longer."""
    return vector / length(vector).clamp(min=reach)


class Place(NamedTuple):
    """The entries of the world for n environments."""

    waypoints: Tensor  # (2, n, K + 1) m, of the route
    along: Tensor  # (2, n, K) m, from each waypoint to the next
    leg: Tensor  # (n, K) m, its length
    arc: Tensor  # (n, K + 1) m, of the route up to each waypoint
    rectangles: Tensor  # (4, n, R) m, obstacles
    maps: Tensor  # (n,)
    limit: Tensor  # (n,) steps
    people: Tensor  # (n,) number of pedestrians


def place_of(world: World, start: Tensor) -> Place:
    maps = world.map.index_select(0, start)
    return Place(
        world.waypoints.index_select(1, start),
        world.along.index_select(1, start),
        world.leg_length.index_select(0, start),
        world.arc.index_select(0, start),
        world.rectangles.index_select(1, maps),
        maps,
        world.limit.index_select(0, start),
        world.count.index_select(0, start),
    )


class SocNavGrid(BatchEnv):
    """N robots among pedestrians, each in its own scenario, with steps of 0.1 s.

    Action: forward acceleration (m/s^2) and angular acceleration (rad/s^2), each in [-1, 1], of a differential drive;
    acceleration (m/s^2) in [-1, 1] and front wheel angle (rad) in [-0.78, 0.78] of a bicycle.

    Observation: a dict in the robot's frame (x forward, y left), scaled to [-1, 1]:
        robot (4,): forward speed and turn rate, relative to their maxima, and the last action.
        goal (7,): current waypoint, next waypoint (the current one again if it is the last) and the point of the route
            3 m ahead, divided by 10 m and shortened to length 1; remaining route / 100 m.
        pedestrians (64, 4): nearest first: position / 16 m, shortened to length 1, and velocity over the ground
            / 2 m/s; zeros if there are fewer.
        count (1,) uint8: number of pedestrians.
        grid (channels, size, size) uint8: see envs/socnav/grid.py.

    An episode succeeds when the robot comes within its radius + 1 m of the goal without contact before the time limit.
    Contact terminates the episode as a failure; the time limit truncates it. Idealizations: pedestrians and robot are
    discs, perception is perfect and not occluded, maps are rectangles.

    Metrics of an episode: scenario; pedestrian_collision, obstacle_collision, timeout (0 or 1); near_misses (steps with
    less than 0.5 m of clearance to a pedestrian); force_exceed (how often a force on a pedestrian exceeded 2 m/s^2);
    comfort_exposure (the same as a fraction of all steps and pedestrians); jerk (mean |change of action|);
    path_efficiency (length of the route / distance driven, at most 1); time_to_goal (s; the time limit if the goal is
    not reached); snqi.

    Args:
        training: False: the scenarios as designed, in turn (episode i is scenario i modulo their number), with the
            reward `simple`. True: random scenarios, also mirrored, scaled and with additional boxes; the robot may
            start anywhere on its route, in either direction and not aligned with it, and up to four more pedestrians
            cross its route or stand on it.
        scenarios: JSON file with other scenarios; docs/own_maps.md describes it.
        scenario: use this scenario only.
        robot: differential or bicycle.
        robot_radius: m.
        training_margin: m that are added to the robot's radius in training, so that the policy keeps clear.
        reward: name of the training reward; see metrics.REWARDS. With snqi_step, info["snqi_step"] of each step has
            near_misses (0 or 1), force_exceed (number of pedestrians), comfort_exposure (fraction) and jerk (change of
            the action), (N,) each.
        reward_weights: JSON file {term: weight} that replaces its weights; see metrics.TERMS.
        snqi: JSON file with weights and baselines of the SNQI.
        grid_resolution: size of a cell, m.
        grid_size: cells per side.
        grid_channels: names, separated by commas: obstacles, pedestrians, combined, near (obstacles, four times finer).
        pedestrians: False removes all pedestrians.
        crowd_density: pedestrians per m^2 of all crowds.
        peds_have_static_obstacle_forces, peds_have_robot_repulsion: whether these social forces act.
        device: cpu for NumPy arrays, cuda for tensors on the GPU.

    Raises:
        ValueError: an invalid argument or file.
    """

    metadata: ClassVar = {**BatchEnv.metadata, "render_fps": 10}
    controllers: ClassVar = controllers.CONTROLLERS
    measures: ClassVar = (*metrics.MEASURES, "collision_rate")

    def __init__(
        self,
        num_envs: int = 1,
        training: bool = True,
        split: str = "train",
        scenarios: str = FILE,
        scenario: str | None = None,
        robot: str = "differential",
        robot_radius: float = 0.6,
        training_margin: float = 0.0,
        reward: str = "route_completion",
        reward_weights: str | None = None,
        snqi: str | None = None,
        grid_resolution: float = 0.5,
        grid_size: int = 64,
        grid_channels: str = "obstacles,pedestrians,combined",
        pedestrians: bool = True,
        crowd_density: float | None = None,
        peds_have_static_obstacle_forces: bool = True,
        peds_have_robot_repulsion: bool = True,
        device: str = "cpu",
        render_mode: str | None = None,
    ):
        if multiprocessing.parent_process() is not None:  # such as a worker of gym.vector.AsyncVectorEnv
            torch.set_num_threads(1)  # a fork lacks the threads of its parent's OpenMP, and would wait for them forever
        self.robot, self.radius = make_robot(robot), robot_radius
        self.margin = training_margin if training else 0.0
        channels = tuple(grid_channels.split(","))
        if unknown := [name for name in channels if name not in CHANNELS]:
            raise ValueError(f"grid_channels must be some of {', '.join(CHANNELS)}, not {unknown[0]!r}")
        if grid_size < 2 or grid_size % 2 or not grid_resolution > 0:
            raise ValueError(f"grid_size must be even and grid_resolution above 0, not {grid_size}, {grid_resolution}")
        self.on_gpu = torch.device(device).type != "cpu"
        low, high = (np.array(bound, np.float32) for bound in (self.robot.low, self.robot.high))
        super().__init__(
            num_envs, observation_space(channels, grid_size), gym.spaces.Box(low, high), 1, training, split,
            render_mode, device if self.on_gpu else None,
        )  # fmt: skip
        self.device = torch.device(device)
        self.world = load_world(split, training, scenario, scenarios, pedestrians, crowd_density, device)
        self.snqi = metrics.load_snqi(snqi)
        steps = float(self.world.limit.double().mean())
        self.reward, self.weights = reward if training else "simple", metrics.REWARDS["simple"]
        if training:  # evaluating a policy does not need the file
            self.weights = metrics.reward_weights(reward, reward_weights, self.snqi, steps)
        forces = peds_have_static_obstacle_forces, peds_have_robot_repulsion
        self.crowd = Crowd(self.world, num_envs, robot_radius, *forces)
        self.grid = OccupancyGrid(self.world, num_envs, channels, grid_size, grid_resolution)
        self.upcoming = np.arange(num_envs)  # index of each environment's next episode, if training=False
        self.pose, self.speed, self.action = (torch.zeros(k, num_envs, device=self.device) for k in (3, 2, 2))
        self.arc = torch.zeros(num_envs, device=self.device)  # m along the route
        self.sums = torch.zeros(5, num_envs, device=self.device)  # near misses, forces, comfort, |action change|, m
        self.scale = torch.tensor((high - low) / 2, device=self.device)[:, None]
        self.names = np.array(self.world.names)
        self._look_up()
        self.drawing: Drawing | None = None

    def _out(self, x: Tensor) -> Array:
        """On the CPU, a NumPy array that shares the tensor's memory."""
        return x.numpy() if self.device.type == "cpu" else x

    # Episodes

    @torch.inference_mode()
    def step(self, actions: Array) -> tuple[dict, Array, Array, Array, dict]:
        *result, info = super().step(actions)
        if self.reward == "snqi_step":
            info["snqi_step"] = self.terms
        return *result, info

    @torch.inference_mode()
    def reset(self, *, seed: int | list | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            seeds = env_seeds(seed, self.num_envs)
            indices = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
            self.upcoming[indices] = np.array([np.ravel(s)[-1] for s in seeds])[indices]
        return super().reset(seed=seed, options=options)

    def start(self, indices: Array) -> None:
        indices = torch.as_tensor(indices, device=self.device)
        start, each = [], self.world.starts_each
        for i in indices.tolist():
            if self.training:
                start.append(self.rngs[i].integers(len(self.names) * each))
            else:
                start.append(self.upcoming[i] % len(self.names) * each + self.rngs[i].integers(each))
                self.upcoming[i] += self.num_envs
        start = torch.as_tensor(np.array(start, np.int64), device=self.device)
        self.crowd.begin(indices, start)
        self.pose[:, indices] = self.world.pose[:, start]
        self.speed[:, indices], self.action[:, indices], self.arc[indices], self.sums[:, indices] = 0, 0, 0, 0
        self._look_up()

    def _look_up(self) -> None:
        """Update what depends on the starts only."""
        self.place = place_of(self.world, self.crowd.start)
        self.limit = self._out(self.place.limit)

    # A step

    def advance(self, action: Array) -> tuple[Array, Array, dict[str, Array]]:
        step = self._move(torch.as_tensor(action, device=self.device).float().T / self.scale)
        reward = sum(weight * metrics.TERMS[name](step) for name, weight in self.weights.items())
        self.sums += torch.stack([step.near, step.felt, step.share, step.change, step.way])
        names = ("near_misses", "force_exceed", "comfort_exposure", "jerk")
        self.terms = {name: self._out(x) for name, x in zip(names, (step.near, step.felt, step.share, step.change))}
        done = step.goal | step.pedestrian | step.wall
        measured = self._measure(step) if (done | step.timeout).any() else {}
        return self._out(reward), self._out(done), measured

    def _move(self, action: Tensor) -> metrics.Step:
        """Step pedestrians and robots; action (2, N) in [-1, 1]."""
        action = action.clamp(-1, 1)
        felt = self.crowd.step(self.pose)
        before, arc_before = self.pose.clone(), self.arc.clone()
        pose, speed = drive(self.robot, self.pose, self.speed, action * self.scale)
        self.pose.copy_(pose), self.speed.copy_(speed), self.arc.copy_(self._arc())
        change = length(action - self.action)
        self.action.copy_(action)

        to_pedestrian, to_wall = self._clearances()
        pedestrian, wall = to_pedestrian <= 0, to_wall <= 0
        contact = pedestrian | wall
        goal = (length(self.pose[:2] - self.place.waypoints[:, :, -1]) <= self.radius + GOAL_RADIUS) & ~contact
        ended = torch.as_tensor(self.episode_length + 1 >= self.limit, device=self.device)
        return metrics.Step(
            progress=self.arc - arc_before,
            goal=goal,
            pedestrian=pedestrian,
            wall=wall,
            timeout=ended & ~goal & ~contact,
            near=(to_pedestrian < metrics.NEAR) & ~pedestrian,
            to_pedestrian=to_pedestrian,
            to_wall=to_wall,
            felt=felt,
            share=felt / self.place.people.clamp(min=1),
            change=change,
            way=length(self.pose[:2] - before[:2]),
            limit=self.place.limit,
        )

    def _arc(self) -> Tensor:
        """Position along the route (N,), m: the point nearest to the robot within WINDOW of the last one."""
        here = self.place
        x = self.pose[:2, :, None] - here.waypoints[:, :, :-1]
        share = ((x * here.along).sum(0) / here.leg.square().clamp(min=1e-9)).clamp(0, 1)
        arc = here.arc[:, :-1] + share * here.leg
        distance = length(x - share * here.along) + 1e4 * ((arc - self.arc[:, None]).abs() > WINDOW)
        return arc.gather(1, distance.argmin(1, keepdim=True)).squeeze(1)

    def _clearances(self) -> tuple[Tensor, Tensor]:
        """Distance (N,) of the robot's hull from the nearest pedestrian's and from the nearest obstacle, m."""
        distance = length(self.crowd.position - self.pose[:2, :, None]).amin(1)
        _, to_rectangle = from_rectangles(self.pose[:2], self.place.rectangles)
        hull = self.radius + self.margin
        return distance - hull - PEDESTRIAN_RADIUS, to_rectangle.amin(1) - hull

    def _measure(self, step: metrics.Step) -> dict[str, Array]:
        """The metrics of all episodes, as if they ended now."""
        steps, limit = torch.as_tensor(self.episode_length + 1, device=self.device), self.place.limit
        near, felt, comfort, change, way = self.sums
        shortest = self.place.arc[:, -1] - self.radius - GOAL_RADIUS
        found = {
            "is_success": step.goal,
            "is_failure": step.pedestrian | step.wall,
            "pedestrian_collision": step.pedestrian.float(),
            "obstacle_collision": step.wall.float(),
            "timeout": step.timeout.float(),
            "near_misses": near.clone(),
            "force_exceed": felt.clone(),
            "comfort_exposure": comfort / steps,
            "jerk": change / steps,
            "path_efficiency": (shortest / way.clamp(min=1e-6)).clamp(0, 1),
            "time_to_goal": DT * torch.where(step.goal, steps, limit),
        }
        values = {name: x.cpu().numpy().astype(float) for name, x in found.items()}
        values["success"], values["collisions"] = values["is_success"], values["is_failure"]
        values["time"] = values["time_to_goal"] / (DT * limit.cpu().numpy())
        snqi = torch.as_tensor(metrics.snqi(values, self.snqi), device=self.device)
        names = self.names[self.place.maps.cpu().numpy()]
        return {"scenario": names, **{name: self._out(x) for name, x in {**found, "snqi": snqi}.items()}}

    # Observations

    def observe(self, indices: Array) -> dict[str, Array]:
        indices = torch.as_tensor(indices, device=self.device)
        everywhere = len(indices) == self.num_envs
        here = self.place if everywhere else place_of(self.world, self.crowd.start[indices])
        pose = self.pose[:, indices]
        cos, sin = torch.cos(-pose[2]), torch.sin(-pose[2])  # from the world's frame to the robot's
        speed = self.speed[:, indices]
        robot = [speed[0] / self.robot.max_speed, speed[1] / self.robot.max_turn_rate, *self.action[:, indices]]

        points, remaining = self._points(pose, here, self.arc[indices])
        points = limited(rotate(points, cos[:, None], sin[:, None]), GOAL_RANGE)  # (2, n, 3)
        goal = torch.cat([points.permute(1, 2, 0).flatten(1), remaining[:, None]], dim=1)

        motion = self.crowd.motion[:, indices]
        both = torch.stack([motion[:2] - pose[:2, :, None], motion[2:]], dim=1)
        position, velocity = rotate(both, cos[:, None], sin[:, None]).unbind(1)
        order = position.square().sum(0).argsort(dim=1)[:, :NEAREST]
        people = torch.stack([*limited(position, PEDESTRIAN_RANGE), *(velocity / PEDESTRIAN_SPEED).clamp(-1, 1)], -1)
        count = here.people.clamp(max=NEAREST)
        people = people.gather(1, order[..., None].expand(-1, -1, 4))
        present = torch.arange(order.shape[1], device=self.device) < count[:, None]
        pedestrians = torch.zeros(len(indices), NEAREST, 4, device=self.device)
        pedestrians[:, : order.shape[1]] = people * present[..., None]

        return {
            "robot": self._out(torch.stack(robot, dim=1).clamp(-1, 1)),
            "goal": self._out(goal),
            "pedestrians": self._out(pedestrians),
            "count": self._out(count[:, None].to(torch.uint8)),
            "grid": self._out(self.grid(here.maps, pose, position)),
        }

    def _points(self, pose: Tensor, here: Place, arc: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors from the robots to the current waypoint, the next one and the point 3 m ahead (2, n, 3), and the
        remaining route (n,), scaled."""
        last, end = here.leg.shape[1], here.arc[:, -1]
        passed = (here.arc[:, 1:] <= arc[:, None] + self.radius + GOAL_RADIUS).sum(1) + 1
        current = torch.stack([passed, passed + 1], dim=1).clamp(max=last)
        seen = here.waypoints.gather(2, current.expand(2, -1, -1))
        ahead = torch.minimum(arc + LOOK_AHEAD, end)
        leg = (here.arc[:, 1:] <= ahead[:, None]).sum(1).clamp(max=last - 1)[:, None]
        share = (ahead[:, None] - here.arc.gather(1, leg)) / here.leg.gather(1, leg).clamp(min=1e-6)
        leg = leg.expand(2, -1, -1)
        point = here.waypoints.gather(2, leg) + share.clamp(0, 1) * here.along.gather(2, leg)
        points = torch.cat([seen, point], dim=2) - pose[:2, :, None]
        return points, ((end - arc) / REMAINING_RANGE).clamp(0, 1)

    # Snapshots and rendering

    def state(self) -> dict[str, Array]:
        crowd = self.crowd
        mine = {"pose": self.pose, "speed": self.speed, "action": self.action, "arc": self.arc, "sums": self.sums}
        theirs = {name: getattr(crowd, name) for name in ("start", "position", "velocity", "way", "pause", "member")}
        checksum = zlib.crc32(self.world.pose.cpu().numpy().tobytes() + " ".join(self.names).encode())
        return {
            **{name: self._out(x) for name, x in {**mine, **theirs}.items()},
            **{"upcoming": self.upcoming, "world": np.array([checksum])},
        }

    @torch.inference_mode()
    def load_state_dict(self, state: dict) -> dict:
        if int(state["arrays"]["world"][0]) != int(self.state()["world"][0]):
            raise UserError("the run used other scenarios; use the version and the arguments that it had")
        super().load_state_dict(state)
        self.crowd.index()
        self._look_up()
        return self.observe(np.arange(self.num_envs))

    def render(self) -> np.ndarray | None:
        """Environment 0 from above with the trails since the first call, uint8 (520, 900, 3); None in human mode, which
        opens a window."""
        self.drawing = self.drawing or Drawing(self.render_mode, self.radius + GOAL_RADIUS)
        return self.drawing.draw(self)

    def close_extras(self, **kwargs: Any) -> None:
        if self.drawing is not None:
            self.drawing.renderer.close()


def observation_space(channels: tuple[str, ...], size: int) -> gym.spaces.Dict:
    box = gym.spaces.Box
    return gym.spaces.Dict(
        {
            "robot": box(-1, 1, (4,), np.float32),
            "goal": box(-1, 1, (7,), np.float32),
            "pedestrians": box(-1, 1, (NEAREST, 4), np.float32),
            "count": box(0, NEAREST, (1,), np.uint8),
            "grid": box(0, 1, (len(channels), size, size), np.uint8),
        }
    )


class SocNavGridEnv(SingleEnv):
    batch_env = SocNavGrid
