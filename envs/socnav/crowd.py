"""The pedestrians of all environments: their goals, groups and steps."""

import torch
from torch import Tensor

from envs.socnav.dynamics import (
    DT,
    TINY,
    desired_force,
    group_force,
    group_repulsion,
    length,
    obstacle_force,
    pedestrian_force,
    robot_force,
    rotate,
    unit,
)
from envs.socnav.scenarios import ROLES
from envs.socnav.starts import LOOP, RESPAWN, SPEED_CAP, World

JOIN, LEAVE = ROLES.index("join"), ROLES.index("leave")
ESCORTS = [ROLES.index(role) for role in ("follow", "lead", "accompany")]
OFFENSIVE = 2.0  # m/s^2; a force above it counts against comfort
RETURN = 3.0  # m; pedestrians do not reappear closer to the robot


def sum_over(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums of the columns of values (C, K) that share an index (K,): (C, size)."""
    return values.new_zeros(len(values), size).index_add_(1, index, values)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Entries (..., K) along the last axis; several times as fast as values[..., index]."""
    return values.index_select(-1, index)


def enumerated(count: Tensor) -> tuple[Tensor, Tensor]:
    """For counts (n,) of items: of which of the n each item is, and its number there from 0: (sum(count),) each."""
    owner = torch.arange(len(count), device=count.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    return owner, torch.arange(len(owner), device=count.device) - before[owner]


class Crowd:
    """The pedestrians of N environments, with P slots each.

    Attributes:
        start: (N,) index of each environment's start in the world.
        position, velocity: (2, N, P) m, m/s, views of motion (4, N, P); an empty slot is far away.
        way: (N, P) index of each waypoint; pause: (N, P) remaining waiting time, s.
        member: (N, P) whether the group forces act.
    """

    def __init__(self, world: World, num_envs: int, robot_radius: float, obstacles: bool, repulsion: bool):
        self.world, self.robot_radius, self.obstacles, self.repulsion = world, robot_radius, obstacles, repulsion
        shape, device = (num_envs, world.slots), world.map.device
        self.start = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.motion = torch.zeros(4, *shape, device=device)
        self.position, self.velocity = self.motion[:2], self.motion[2:]
        self.way = torch.zeros(shape, dtype=torch.int64, device=device)
        self.pause = torch.zeros(shape, device=device)
        self.member = torch.zeros(shape, dtype=torch.bool, device=device)

    def begin(self, indices: Tensor, start: Tensor) -> None:
        """Place the pedestrians of these environments (n,) as in these starts (n,)."""
        people = self.world.pedestrians
        self.start[indices] = start
        self.position[:, indices] = people["position"][:, start]
        self.way[indices] = people["first"][start]
        self.pause[indices] = people["pauses"][start][..., 0]
        self.member[indices] = people["member"][start]
        self.index()
        # They begin at their nominal speed
        x, robot = pick(self.position.flatten(1), self.who), pick(self.world.pose.index_select(1, self.start), self.env)
        to_goal = self._wishes(x, pick(self.way.flatten(), self.who), robot) - x
        walking = self.speed / SPEED_CAP * (pick(self.pause.flatten(), self.who) == 0)
        velocity = torch.zeros_like(self.velocity).flatten(1).index_copy(1, self.who, unit(to_goal) * walking)
        self.velocity[:, indices] = velocity.view_as(self.velocity)[:, indices]

    def index(self) -> None:
        """List the M pedestrians of all environments and the K pairs that share an environment. Forces are computed for
        these alone. self.who is the slot n * P + p of each pedestrian, self.env its environment n."""
        world, slots = self.world, self.world.slots
        count = world.count[self.start]  # pedestrians per environment, which have the first slots
        self.env, slot = enumerated(count)
        self.who = self.env * slots + slot
        self.entry = self.start[self.env] * slots + slot  # index in the arrays of the world
        people = world.pedestrians
        for name in ("speed", "arrives", "end", "last", "role"):
            setattr(self, name, pick(people[name].flatten(), self.entry))
        self.offset, self.respawn = (pick(people[name].flatten(1), self.entry) for name in ("offset", "respawn"))
        self.group = self.env * slots + pick(people["group"].flatten(), self.entry)
        self.rectangles = world.rectangles.index_select(1, world.map[self.start[self.env]])
        self.one, k = enumerated(count[self.env] - 1)  # pairs: each with all others of its environment
        self.other = k + (self.one - slot[self.one])
        self.other += self.other >= self.one
        self.escorts = (self.role >= ESCORTS[0]) & (self.role <= ESCORTS[-1])
        self.walks = (self.last >= 0) & ~self.escorts
        self.has_roles = bool((self.role > 0).any())
        kin = self.group[self.one] == self.group[self.other]
        self.kin_one, self.kin_other = self.one[kin], self.other[kin]

    def _goals(self, way: Tensor) -> Tensor:
        """Waypoint number `way` (M,) of each path (2, M); arbitrary for pedestrians without a path."""
        path = self.world.pedestrians["path"]
        return pick(path.flatten(1), self.entry * path.shape[-1] + way)

    def _wishes(self, x: Tensor, way: Tensor, robot: Tensor) -> Tensor:
        """Goal of each pedestrian (2, M): a waypoint, a position beside its robot (3, M), or its own position."""
        goal = torch.where(self.walks, self._goals(way), x)
        if self.has_roles:
            beside = robot[:2] + rotate(self.offset, torch.cos(robot[2]), torch.sin(robot[2]))
            goal = torch.where(self.escorts, beside, goal)
        return goal

    def step(self, pose: Tensor) -> Tensor:
        """Step all pedestrians, with the robots at pose (3, N). Returns how many felt an offensive force (N,)."""
        x, v = pick(self.motion.flatten(1), self.who).split(2)
        robot = pick(pose, self.env)
        standing = pick(self.pause.flatten(), self.who) > 0
        member = torch.where(self.role == LEAVE, standing, pick(self.member.flatten(), self.who))
        size, centroid = self._groups(x, member)
        x, v, goal, returns = self._turn(x, v, centroid, standing, robot)
        if returns.any():
            size, centroid = self._groups(x, member)
        goal = torch.where(standing, x, goal)

        motion = torch.cat([x, v])
        apart, relative = (pick(motion, self.one) - pick(motion, self.other)).split(2)
        social = pedestrian_force(apart, -relative)
        force = sum_over(self.one, social, len(self.who)) + desired_force(goal - x, v, self.speed)
        if len(self.kin_one):
            force += group_force(x, goal - x, centroid, size)
            felt = member[self.kin_one] & member[self.kin_other]
            close = group_repulsion(pick(x, self.kin_one) - pick(x, self.kin_other)) * felt
            force += sum_over(self.kin_one, close, len(self.who))
        if self.obstacles:
            force += obstacle_force(x, self.rectangles)
        if self.repulsion:
            force += robot_force(x - robot[:2], self.robot_radius)

        v = v + DT * force
        v = v * (self.speed / length(v).clamp(min=TINY)).clamp(max=1) * ~standing
        x = x + DT * v
        self.motion.flatten(1).index_copy_(1, self.who, torch.cat([x, v]))
        offensive = (length(force) > OFFENSIVE).to(x)
        return sum_over(self.env, offensive[None], len(self.start))[0]

    def _groups(self, x: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """Size (M,) and centroid (2, M) of each pedestrian's group, which is 1 and its own position without a group."""
        if not len(self.kin_one):
            return torch.ones_like(x[0]), x
        values = torch.cat([x, torch.ones_like(x[:1])]) * member
        *sums, number = pick(sum_over(self.group, values, self.way.numel()), self.group)
        size = torch.where(member, number, 1.0)
        return size, torch.where(member, torch.stack(sums) / size, x)

    def _turn(self, x: Tensor, v: Tensor, centroid: Tensor, standing: Tensor, robot: Tensor) -> tuple:
        """Advance pedestrians whose group has reached its waypoint to the next one. At the end of its path a pedestrian
        stops, starts again, or is moved to where its crowd appears.

        Returns:
            The new x, v and goals (2, M), and which pedestrians were moved (M,).
        """
        way = pick(self.way.flatten(), self.who)
        arrived = (length(centroid - self._goals(way)) < self.arrives) & ~standing & self.walks
        at_end = way == self.last
        close = (length(self.respawn - robot[:2]) <= RETURN).to(x)  # a group does not reappear next to a robot
        clear = pick(sum_over(self.group, close[None], self.way.numel())[0], self.group) == 0
        goes_on = arrived & (~at_end | (self.end == LOOP) | ((self.end == RESPAWN) & clear))
        returns = goes_on & at_end & (self.end == RESPAWN)
        next_way = torch.where(goes_on, torch.where(at_end, 0, way + 1), way)
        pauses = self.world.pedestrians["pauses"]
        waiting = pick(pauses.flatten(), self.entry * pauses.shape[-1] + way + 1) * goes_on
        pause = (pick(self.pause.flatten(), self.who) + waiting - DT).clamp(min=0)
        self.way.flatten().index_copy_(0, self.who, next_way)
        self.pause.flatten().index_copy_(0, self.who, pause)

        if self.has_roles:
            self.member.flatten()[self.who] |= arrived & at_end & (self.role == JOIN)
        return torch.where(returns, self.respawn, x), v * ~standing, self._wishes(x, next_way, robot), returns
