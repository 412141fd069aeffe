"""Motion of robots and pedestrians in steps of 0.1 s.

Vectors are component-first: a position is (2, ...), x and y in meters, so that operations run over contiguous memory.
Angles are in rad, counterclockwise from x.

Pedestrians follow the social-force model of Helbing and Molnar (1995) with the interaction of Moussaid et al. (2009)
and the group forces of Moussaid et al. (2010). Their mass is 1, so a force is an acceleration in m/s^2.

    v' = cap(v + dt F, speed cap),    x' = x + dt v'
    F = desired + pedestrians + obstacles + group + robot

Unlike in common implementations, the angle between two directions is in (-pi, pi].
"""

from typing import NamedTuple

import torch
from torch import Tensor

DT = 0.1  # s
PEDESTRIAN_RADIUS = 0.4  # m, for contacts and in the grid

# The social forces
RELAXATION = 0.5  # s in which a pedestrian takes up its desired velocity
ARRIVED = 0.2  # m from the goal, where it only slows down
SOCIAL = 5.1  # strength of the interaction, m/s^2
VELOCITY_WEIGHT = 2.0  # how much relative velocity counts beside direction
RANGE = 0.35  # of the interaction per unit of |D|
SLOWING, TURNING = 3.0, 2.0  # how fast the braking and the sideward part fall off with the angle
OBSTACLE, OBSTACLE_OFFSET = 10.0, 0.57  # strength, and what is added to the distance, m
COHERENCE, GROUP_REPULSION, GAZE = 3.0, 1.0, 4.0
GROUP_DISTANCE = 0.55  # m, closer than which members of a group push each other away
ROBOT, ROBOT_RANGE = 10.0, 2.35  # strength; the range is beyond the robot's radius, m
TINY = 1e-5


def length(vector: Tensor) -> Tensor:
    """|vector| of (2, ...) -> (...)."""
    return torch.hypot(*vector.unbind())


def unit(vector: Tensor) -> Tensor:
    """Direction (2, ...) of a vector; zero for the zero vector."""
    return vector / length(vector).clamp(min=TINY)


def rotate(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(2, ...) turned counterclockwise by the angle with this cosine and sine (...)."""
    x, y = vector.unbind()
    return torch.stack([cos * x - sin * y, sin * x + cos * y])


# Social forces


def desired_force(to_goal: Tensor, velocity: Tensor, speed: Tensor) -> Tensor:
    """Towards the goal at the own pace: (speed e - v) / 0.5 s; within 0.2 m of the goal, -v / 0.5 s.

    to_goal, velocity (2, M), speed (M,) -> (2, M)."""
    distance = length(to_goal)
    wanted = to_goal / distance.clamp(min=TINY) * (speed * (distance > ARRIVED))
    return (wanted - velocity) / RELAXATION


def pedestrian_force(apart: Tensor, relative_velocity: Tensor) -> Tensor:
    """What one pedestrian feels of another, for K pairs.

    With n the direction from the other, D = 2 (v_other - v) + n and theta the angle from n to D:

        f = 5.1 [D/|D| exp(-d/B - (3 B theta)^2) - sign(theta) left(D)/|D| exp(-d/B - (2 B theta)^2)],   B = 0.35 |D|

    apart: position minus the other's (2, K); relative_velocity: the other's velocity minus one's own (2, K)."""
    distance = length(apart).clamp(min=TINY)
    direction = apart / distance
    nx, ny = direction.unbind()
    x, y = (VELOCITY_WEIGHT * relative_velocity + direction).unbind()
    norm = torch.hypot(x, y).clamp(min=TINY)
    # |theta| by the half-angle form of atan2, which is the same in every lane of a vector unit, as atan2 is not
    cross, dot = nx * y - ny * x, nx * x + ny * y
    theta = 2 * torch.atan(cross.abs() / (norm + dot.abs()))
    theta = torch.where(dot < 0, torch.pi - theta, theta)
    reach = RANGE * norm
    braking = torch.exp(-distance / reach - (SLOWING * reach * theta).square())
    turning = torch.exp(-distance / reach - (TURNING * reach * theta).square())
    turning = torch.where(cross < 0, turning, -turning)
    return SOCIAL / norm * torch.stack([x * braking - y * turning, y * braking + x * turning])


def from_rectangles(position: Tensor, rectangles: Tensor) -> tuple[Tensor, Tensor]:
    """Vector (2, M, R) and distance (M, R) from the nearest point of each rectangle; zero inside it.

    position (2, M); rectangles (4, M, R): x0, y0, x1, y1, those of the map that each of the M is on."""
    apart = position.unsqueeze(-1) - position.unsqueeze(-1).clamp(rectangles[:2], rectangles[2:])
    return apart, length(apart)


def obstacle_force(position: Tensor, rectangles: Tensor) -> Tensor:
    """10 / (d + 0.57)^3 away from the nearest point of each rectangle, summed: (2, M), (4, M, R) -> (2, M)."""
    apart, distance = from_rectangles(position, rectangles)
    strength = OBSTACLE / (distance + OBSTACLE_OFFSET) ** 3 / distance.clamp(min=TINY)
    return (apart * strength).sum(-1)


def group_force(position: Tensor, to_goal: Tensor, centroid: Tensor, size: Tensor) -> Tensor:
    """Coherence and gaze: staying near the group's centroid, and keeping the others in view.

        coherence = 3 (c - x) (tanh(|c - x| - (n - 1) / 2) + 1) / 2
        gaze = 4 e_goal (e_goal . e_others) |others - x| / |goal - x|

    position, to_goal, centroid (2, M), size n (M,); zero where a pedestrian is alone."""
    to_centroid = centroid - position
    stretched = length(to_centroid) - (size - 1) / 2
    coherence = COHERENCE * to_centroid * (torch.tanh(stretched) + 1) / 2
    to_others = to_centroid * (size / (size - 1).clamp(min=1))  # the centroid of the others, without oneself
    towards_goal = unit(to_goal)
    # e_others |others - x| is the vector to them
    ahead = (towards_goal * to_others).sum(0)
    gaze = GAZE * towards_goal * ahead / length(to_goal).clamp(min=ARRIVED)
    return (coherence + gaze) * (size > 1)


def group_repulsion(apart: Tensor) -> Tensor:
    """x_i - x_j for a pair of the same group that is closer than 0.55 m: (2, K) -> (2, K)."""
    return GROUP_REPULSION * apart * (length(apart) < GROUP_DISTANCE)


def robot_force(apart: Tensor, robot_radius: float) -> Tensor:
    """10 / d^3 away from the robot's centre, up to 2.35 m from its hull: pedestrian minus robot (2, M) -> (2, M)."""
    distance = length(apart).clamp(min=TINY)
    return ROBOT * apart / distance.square().square() * (distance <= ROBOT_RANGE + robot_radius)


# Robots


class Robot(NamedTuple):
    """The limits of a robot. Differential drives are steered by accelerations (m/s^2, rad/s^2), a bicycle by its
    acceleration (m/s^2) and the angle of its front wheel (rad)."""

    name: str
    max_speed: float  # m/s
    max_turn_rate: float  # rad/s
    low: tuple[float, float]  # bounds of the action
    high: tuple[float, float]


WHEELBASE = 1.0  # m, of the bicycle
ROBOTS = ("differential", "bicycle")


def make_robot(name: str) -> Robot:
    """Raises ValueError for another name than differential or bicycle."""
    if name == "differential":
        return Robot(name, 2.0, 1.0, (-1.0, -1.0), (1.0, 1.0))
    if name == "bicycle":
        steer = 0.78
        turn = 3.0 * torch.tan(torch.tensor(steer)).item() / WHEELBASE
        return Robot(name, 3.0, turn, (-1.0, -steer), (1.0, steer))
    raise ValueError(f"robot must be one of {', '.join(ROBOTS)}, not {name!r}")


def drive(robot: Robot, pose: Tensor, speed: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """One step of N robots.

    Args:
        pose: (3, N) x, y (m) and heading (rad).
        speed: (2, N) forward speed (m/s) and turn rate (rad/s).
        action: (2, N), clipped to the robot's bounds.

    Returns:
        The next pose and speed.
    """
    x, y, heading = pose.unbind()
    first, second = action[0].clamp(robot.low[0], robot.high[0]), action[1].clamp(robot.low[1], robot.high[1])
    v = (speed[0] + DT * first).clamp(0.0, robot.max_speed)
    if robot.name == "differential":  # trapezoidal: mean speeds, along the heading in the middle of the step
        turn_rate = (speed[1] + DT * second).clamp(-robot.max_turn_rate, robot.max_turn_rate)
        distance, turn = DT * (speed[0] + v) / 2, DT * (speed[1] + turn_rate) / 2
        along = heading + turn / 2
    else:  # the published bicycle: old speed and old heading
        turn_rate = v * torch.tan(second) / WHEELBASE
        distance, turn, along = DT * speed[0], DT * turn_rate, heading
    new = torch.stack([x + distance * torch.cos(along), y + distance * torch.sin(along), wrap(heading + turn)])
    return new, torch.stack([v, turn_rate])


def wrap(angle: Tensor) -> Tensor:
    """To [-pi, pi)."""
    return torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
