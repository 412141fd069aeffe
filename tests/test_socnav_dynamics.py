import math

import numpy as np
import pytest
import torch

from envs.socnav import dynamics
from envs.socnav.crowd import Crowd
from envs.socnav.dynamics import DT, drive, make_robot
from envs.socnav.scenarios import Scenario, Single, Stream, load_scenarios
from envs.socnav.starts import LOOP, RESPAWN, ROLES, World

pytestmark = pytest.mark.usefixtures("smaller_training_world")

RADIUS = 0.6  # m, of the robot


def vector(*xy):
    return torch.tensor(xy, dtype=torch.float64)[:, None]


def near(found, expected, tolerance=2e-6):
    np.testing.assert_allclose(np.squeeze(found), expected, atol=tolerance)


# The forces, one by one


@pytest.mark.parametrize(
    ("to_goal", "velocity", "expected"),
    [
        ((3.0, 4.0), (0.1, -0.2), (0.58, 1.44)),
        ((0.1, 0.1), (0.3, -0.4), (-0.6, 0.8)),  # within 0.2 m it only slows down
        ((0.21, 0.0), (0.3, -0.4), (0.7, 0.8)),
        ((0.0, 0.0), (0.3, -0.4), (-0.6, 0.8)),
    ],
)
def test_desired_force(to_goal, velocity, expected):
    near(dynamics.desired_force(vector(*to_goal), vector(*velocity), torch.tensor([0.65])), expected)


A170, A190 = math.radians(170), math.radians(190)
ACROSS = tuple(0.4 * f(A190) - 0.5 * f(A170) for f in (math.cos, math.sin))  # so that D is 0.8 m long at -170 degrees


@pytest.mark.parametrize(
    ("apart", "relative", "expected"),
    [
        ((1.0, 0.0), (0.0, 0.0), (0.292906, -0.292906)),  # at rest: theta is 0, and its sign counts as +1
        ((-2.0, 0.0), (-1.3, 0.0), (-1.042831, 1.042831)),  # head-on: D = (-3.6, 0), B = 1.26
        ((0.1, 0.0), (-0.6, 0.0), (-0.790903, 1.007251)),  # D = (-0.2, 0) opposes n: theta is +pi
        ((0.0, 1.5), (0.5, -0.25), (-0.005068, 0.055703)),  # D = (1, 0.5), theta = -1.10715
        ((0.0, 1.5), (-0.5, -0.25), (0.005068, 0.055703)),
        ((0.4 * math.cos(A170), 0.4 * math.sin(A170)), ACROSS, (-1.308771, 0.963775)),  # +20 degrees, not -340
        ((0.5, 0.0), (-0.5, 0.0), (0.0, 0.0)),  # D is zero, and so is its reach
    ],
)
def test_pedestrian_force(apart, relative, expected):
    near(dynamics.pedestrian_force(vector(*apart), vector(*relative)), expected)
    near(dynamics.pedestrian_force(vector(*apart).float(), vector(*relative).float()), expected, 1e-4)


def rectangles(*boxes):
    return torch.tensor(boxes, dtype=torch.float64).T[:, None, :]


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(2, -1, 3, 1)], (-0.589116, 0.0)),  # 10 / 2.57^3
        ([(-1, 1, 1, 2)], (0.0, -2.584051)),  # 10 / 1.57^3
        ([(2, -1, 3, 1), (-1, 1, 1, 2)], (-0.589116, -2.584051)),
        ([(3, 4, 9, 9)], (-0.034720, -0.046294)),  # its corner: 10 / 5.57^3 * (0.6, 0.8)
        ([(-1, -1, 1, 1)], (0.0, 0.0)),  # inside
        ([(-1, -1, 1, 1), (2, -1, 3, 1)], (-0.589116, 0.0)),
    ],
)
def test_obstacle_force(boxes, expected):
    near(dynamics.obstacle_force(vector(0, 0), rectangles(*boxes)), expected)


@pytest.mark.parametrize(
    ("to_goal", "to_centroid", "size", "expected"),
    [
        # coherence 3 * 2 * (1 + tanh(1)) / 2 = 5.284782, the others' centroid 3 m ahead: gaze 4 * 0.6 * 3 / 5 = 1.44
        ((3.0, 4.0), (2.0, 0.0), 3, (5.284782 + 0.864, 1.152)),
        # coherence 3 * 0.25 * (1 + tanh(-0.25)) / 2 = 0.283156, the other 0.5 m behind: gaze 4 * -1 * 0.5 / 2 = -1
        ((0.0, -2.0), (0.0, 0.25), 2, (0.0, 0.283156 + 1.0)),
        ((3.0, 4.0), (2.0, 0.0), 1, (0.0, 0.0)),  # a group of one
        ((3.0, 4.0), (0.0, 0.0), 1, (0.0, 0.0)),
    ],
)
def test_group_force(to_goal, to_centroid, size, expected):
    x = vector(7.0, -5.0)
    near(dynamics.group_force(x, vector(*to_goal), x + vector(*to_centroid), torch.tensor([size])), expected)


@pytest.mark.parametrize(
    ("apart", "radius", "expected"),
    [
        ((0.0, -2.0), 0.6, (0.0, -1.25)),
        ((2.9, 0.0), 0.6, (0.410021, 0.0)),
        ((2.96, 0.0), 0.6, (0.0, 0.0)),
        ((-3.3, 0.0), 1.0, (-0.278265, 0.0)),
        ((-3.36, 0.0), 1.0, (0.0, 0.0)),
    ],
)
def test_robot_force(apart, radius, expected):
    near(dynamics.robot_force(vector(*apart), radius), expected)


# The robots


def driven(name, pose, speed, action, backwards=False):
    pose, speed = drive(make_robot(name), vector(*pose), vector(*speed), vector(*action))
    return [*pose.flatten().tolist(), *speed.flatten().tolist()]


@pytest.mark.parametrize(
    ("pose", "speed", "action", "expected"),
    [
        # 0.105 m along a heading of pi / 2 + 0.0225
        ((1, 2, math.pi / 2), (1, 0.5), (1, -1), (0.997638, 2.104973, 1.615796, 1.1, 0.4)),
        ((0, 0, 0), (1.95, 0.95), (1, 1), (0.197265, 0.009624, 0.0975, 2.0, 1.0)),  # no faster than this
        ((0, 0, 0), (1, 0.5), (9, -9), (0.104973, 0.002362, 0.045, 1.1, 0.4)),  # the action is clipped
        ((0, 0, 0), (0.05, -0.95), (-1, -1), (0.002497, -0.000122, -0.0975, 0.0, -1.0)),
        ((0, 0, math.pi - 0.01), (0, 1), (0, 0), (0, 0, -math.pi + 0.09, 0, 1)),
    ],
)
def test_a_differential_drive_steps_by_the_trapezoidal_rule(pose, speed, action, expected):
    near(driven("differential", pose, speed, action), expected)


@pytest.mark.parametrize(
    ("pose", "speed", "action", "expected"),
    [
        # 0.2 m along the old heading; turn rate 2.05 tan(0.3) = 0.634139
        ((0, 0, 1), (2, 9), (0.5, 0.3), (0.108060, 0.168294, 1.063414, 2.05, 0.634139)),
        ((0, 0, 0), (2.95, 0), (1, 2), (0.295, 0, 0.296778, 3.0, 2.967785)),
        ((0, 0, 0), (0.05, 0), (-1, -0.3), (0.005, 0, 0, 0, 0)),
        ((0, 0, math.pi - 0.01), (1, 0), (0, math.atan(0.5)), (-0.099995, 0.001, -math.pi + 0.04, 1, 0.5)),
    ],
)
def test_a_bicycle_steps_with_its_old_speed_and_heading(pose, speed, action, expected):
    near(driven("bicycle", pose, speed, action), expected)


# A crowd, against a plain loop


class Reference:
    """The pedestrians of one start, in numpy and one after the other."""

    def __init__(self, world, start, scenario, radius=RADIUS, obstacles=True, repulsion=True):
        self.radius, self.obstacles, self.repulsion = radius, obstacles, repulsion
        self.count = int(world.count[start])
        people = {name: np.moveaxis(x.numpy(), 0, -1)[start] if name in ("position", "respawn", "offset", "path")
                  else x.numpy()[start] for name, x in world.pedestrians.items()}  # fmt: skip
        self.walls = scenario.rectangles()
        self.respawn, self.offset = people["respawn"].astype(float), people["offset"].astype(float)
        self.path = [people["path"][i, : people["last"][i] + 1].astype(float) for i in range(self.count)]
        self.pauses, self.speed, self.arrives = people["pauses"], people["speed"].astype(float), people["arrives"]
        self.end, self.group, self.role = people["end"], people["group"], [ROLES[k] for k in people["role"]]

    def restart(self, crowd, row):
        """From what the batch holds now."""
        at = slice(self.count)
        self.x = crowd.position[:, row, at].T.numpy().astype(float)
        self.v = crowd.velocity[:, row, at].T.numpy().astype(float)
        self.way, self.pause = crowd.way[row, at].numpy().copy(), crowd.pause[row, at].numpy().copy()  # float32
        self.member = crowd.member[row, at].numpy().copy()

    def mates(self, i, member):
        """All members of i's group, i among them."""
        return [k for k in range(self.count) if self.group[k] == self.group[i] and member[k]] if member[i] else [i]

    def step(self, pose):
        """Returns |F| of everybody."""
        everybody, robot = range(self.count), np.array(pose[:2], float)
        standing = self.pause > 0
        member = [standing[i] if self.role[i] == "leave" else self.member[i] for i in everybody]
        escorts = [role in ("follow", "lead", "accompany") for role in self.role]
        centroid = [self.x[self.mates(i, member)].mean(0) for i in everybody]
        x, way, goals = self.x.copy(), self.way.copy(), self.x.copy()
        for i in everybody:
            waiting = np.float32(0)
            if len(self.path[i]) and not escorts[i]:
                way_here, last = self.way[i], len(self.path[i]) - 1
                arrived = not standing[i] and np.hypot(*(centroid[i] - self.path[i][way_here])) < self.arrives[i]
                leads_back = self.respawn[[k for k in everybody if self.group[k] == self.group[i]]]
                clear = np.hypot(*(leads_back - robot).T).min() > 3
                if arrived and way_here < last:
                    way[i], waiting = way_here + 1, self.pauses[i][way_here + 1]
                elif arrived and (self.end[i] == LOOP or (self.end[i] == RESPAWN and clear)):
                    way[i], waiting = 0, self.pauses[i][way_here + 1]
                    if self.end[i] == RESPAWN:
                        x[i] = self.respawn[i]
                if arrived and way_here == last and self.role[i] == "join":
                    self.member[i] = True
                goals[i] = self.path[i][way[i]]
            elif escorts[i]:
                c, s = np.cos(pose[2]), np.sin(pose[2])
                forward, left = self.offset[i]
                goals[i] = robot + np.array([c * forward - s * left, s * forward + c * left])
            else:
                goals[i] = x[i]
            if standing[i]:
                goals[i] = x[i]
            self.pause[i] = max(np.float32(self.pause[i] + waiting) - np.float32(DT), 0)
        self.x, self.way = x, way
        self.v[standing] = 0
        forces = np.array([self.force(i, goals[i], robot, self.mates(i, member)) for i in everybody]).reshape(-1, 2)
        for i in everybody:
            v = self.v[i] + 0.1 * forces[i]
            speed = np.hypot(*v)
            if speed > self.speed[i]:
                v *= self.speed[i] / speed
            self.v[i] = 0 if standing[i] else v
        self.x = self.x + 0.1 * self.v
        return np.hypot(*forces.T)

    def force(self, i, goal, robot, mates):
        x, v = self.x[i], self.v[i]
        to_goal, distance = goal - x, np.hypot(*(goal - x))
        total = -v / 0.5
        if distance > 0.2:
            total = total + self.speed[i] * to_goal / distance / 0.5
        for k in range(self.count):
            if k != i:
                total = total + self.interaction(x - self.x[k], self.v[k] - v)
        if self.obstacles:
            for x0, y0, x1, y1 in self.walls:
                away = x - [min(max(x[0], x0), x1), min(max(x[1], y0), y1)]
                d = np.hypot(*away)
                if d > 0:
                    total = total + 10 / (d + 0.57) ** 3 * away / d
        n = len(mates)
        if n > 1:
            to_centroid = self.x[mates].mean(0) - x
            stretched = np.hypot(*to_centroid) - (n - 1) / 2
            total = total + 3 * to_centroid * (np.tanh(stretched) + 1) / 2
            to_others = self.x[[k for k in mates if k != i]].mean(0) - x
            ahead = to_goal / max(distance, 1e-9)
            total = total + 4 * ahead * (ahead @ to_others) / max(distance, 0.2)
            for k in mates:
                if np.hypot(*(x - self.x[k])) < 0.55:
                    total = total + x - self.x[k]
        away = x - robot
        d = np.hypot(*away)
        if self.repulsion and d <= 2.35 + self.radius:
            total = total + 10 * away / d**4
        return total

    @staticmethod
    def interaction(apart, relative):
        d = math.hypot(*apart)
        n = apart / d
        x, y = 2 * relative + n
        norm = math.hypot(x, y)
        theta = math.atan2(y, x) - math.atan2(n[1], n[0])
        theta = (theta + math.pi) % (2 * math.pi) - math.pi
        reach, sign = 0.35 * norm, 1 if theta >= 0 or theta == -math.pi else -1
        braking = math.exp(-d / reach - (3 * reach * theta) ** 2)
        turning = math.exp(-d / reach - (2 * reach * theta) ** 2)
        return 5.1 / norm * np.array([x * braking + sign * y * turning, y * braking - sign * x * turning])


def make_world(scenarios, starts_each):
    return World(scenarios, starts_each, pedestrians=True, varied=False, stream="test", device="cpu")


def strolling(world, step):
    """Robots that leave their starts at 1 m/s in wide bends, through walls if need be: pose (3, N)."""
    pose = world.pose.clone()
    for t in range(step):
        pose[:2] += 0.1 * torch.stack([torch.cos(pose[2]), torch.sin(pose[2])])
        pose[2] += 0.02 * math.sin(t / 30)
    return pose


def begun(world, obstacles=True, repulsion=True):
    """A crowd that plays every start of a world."""
    rows = torch.arange(len(world.map))
    crowd = Crowd(world, len(rows), RADIUS, obstacles, repulsion)
    crowd.begin(rows, rows)
    return crowd


def compare(scenario, starts, steps, horizon=10, **switches):
    """Steps a batch of starts of one or more scenarios, and a plain loop that begins anew from the batch's state every
    `horizon` steps: in single precision each step adds some 1e-6 m, and neighbours multiply it.

    Returns all states of the batch: positions (T, 2, N, P), ways, pauses and who is a member (T, N, P)."""
    scenarios = scenario if isinstance(scenario, list) else [scenario]
    world = make_world(scenarios, starts)
    crowd = begun(world, **switches)
    plain = [Reference(world, i, scenarios[m], **switches) for i, m in enumerate(world.map)]
    history = []
    for t in range(steps):
        if t % horizon == 0:
            for i, reference in enumerate(plain):
                reference.restart(crowd, i)
        pose, tolerance = strolling(world, t), 1e-5 if t % horizon == 0 else 1e-4
        felt = crowd.step(pose)
        for i, reference in enumerate(plain):
            at, force = slice(reference.count), reference.step(pose[:, i].tolist())
            message = f"start {i}, step {t}"
            np.testing.assert_array_equal(crowd.way[i, at], reference.way, message)
            np.testing.assert_array_equal(crowd.pause[i, at], reference.pause, message)
            np.testing.assert_array_equal(crowd.member[i, at], reference.member, message)
            np.testing.assert_allclose(crowd.position[:, i, at].T, reference.x, atol=tolerance, err_msg=message)
            np.testing.assert_allclose(crowd.velocity[:, i, at].T, reference.v, atol=tolerance, err_msg=message)
            if not (np.abs(force - 2) < 1e-3).any():
                assert felt[i] == (force > 2).sum(), message
        history.append((crowd.position.clone(), crowd.way.clone(), crowd.pause.clone(), crowd.member.clone()))
    return [torch.stack(x).numpy() for x in zip(*history)]


# 20 x 14 m with a pillar. Those on the route come back after 6 m, three in the middle get company, one waits twice.
EVERYBODY = Scenario(
    name="everybody", split="train", size=(20.0, 14.0), time_limit=300,
    start=(2, 2, 2.5, 2.5), goal=(18, 3, 18.5, 3.5),
    obstacles=((9.0, 6.0, 11.0, 8.0),),
    crowds=(
        Stream(0.17, route=((4.0, 11.0), (7.0, 11.0), (10.0, 11.5)), start=(3.5, 10.5, 4.5, 11.5), spread=True),
        Stream(0.12, zone=(12.0, 2.0, 18.0, 8.0)),
    ),
    pedestrians=(
        Single(((3.0, 8.0), (4.0, 8.0), (6.0, 8.0)), wait=((1, 1.0),), delay=1.0),
        Single(((4.5, 2.5),), role="lead", offset=(2.0, 0.5)),
        Single(((2.5, 5.0),), role="follow", offset=(-1.5, 0.0)),
        Single(((5.0, 4.0),), role="accompany", offset=(0.0, 1.0)),
        Single(((9.0, 3.5),), role="wait", group="talk"),
        Single(((9.9, 3.5),), role="wait", group="talk"),
        Single(((9.5, 5.0),), role="join", group="talk", speed=0.8),
        Single(((9.5, 2.6), (13.0, 1.8)), role="leave", group="talk", delay=4.0),
    ),
)  # fmt: skip


def test_everybody_moves_as_in_a_plain_loop():
    position, way, pause, member = compare(EVERYBODY, 2, 110)
    jumps = np.linalg.norm(np.diff(position, axis=0), axis=1) > 1
    assert jumps.sum() >= 3  # some came back,
    assert (way.max(0) > way[0]).sum() >= 3  # turned to another waypoint,
    assert ((pause[1:] > pause[:-1]) & (pause[1:] > 0)).sum() >= 2  # stopped to wait,
    assert (member[-1] & ~member[0]).sum() == 2  # and joined


@pytest.mark.parametrize(
    ("name", "starts", "steps"),
    [
        ("classic_station_platform_medium", 1, 60),
        ("classic_realworld_double_bottleneck_high", 1, 60),
        ("classic_group_crossing_low", 2, 60),
        ("classic_doorway_high", 1, 60),
        ("francis2023_intersection_wait", 2, 120),
        ("francis2023_crowd_navigation", 1, 60),
        ("francis2023_circular_crossing", 2, 60),
        ("francis2023_robot_crowding", 1, 40),
        ("francis2023_leave_group", 2, 100),
    ],
)
def test_the_scenarios_move_as_in_a_plain_loop(name, starts, steps):
    compare(load_scenarios()[name], starts, steps)
