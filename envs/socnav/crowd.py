"""The pedestrians of all rows: where each wants to go, whom it walks with, and their common step."""

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
from envs.socnav.starts import LOOP, RESPAWN, ROLES, SPEED_CAP, World

JOIN, LEAVE = ROLES.index("join"), ROLES.index("leave")
ESCORTS = [ROLES.index(role) for role in ("follow", "lead", "accompany")]
OFFENSIVE = 2.0  # m/s^2; a force above it counts against comfort
RETURN = 3.0  # m from the robot, nearer than which nobody appears again


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
    """The pedestrians of N rows, P slots each.

    Attributes:
        start: (N,) the row of the world that each row of ours plays.
        position, velocity: (2, N, P) m, m/s, views of motion (4, N, P); an empty slot is far away.
        way: (N, P) waypoint that each walks to; pause: (N, P) s that it still stands.
        member: (N, P) whether it feels its group.
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

    def begin(self, rows: Tensor, start: Tensor) -> None:
        """Put the pedestrians of these rows where those of these starts are."""
        people = self.world.pedestrians
        self.start[rows] = start
        self.position[:, rows] = people["position"][:, start]
        self.way[rows] = people["first"][start]
        self.pause[rows] = people["pauses"][start][..., 0]
        self.member[rows] = people["member"][start]
        self.index()
        # They walk at their nominal pace already
        x, robot = pick(self.position.flatten(1), self.who), pick(self.world.pose.index_select(1, self.start), self.row)
        to_goal = self._wishes(x, pick(self.way.flatten(), self.who), robot) - x
        walking = self.speed / SPEED_CAP * (pick(self.pause.flatten(), self.who) == 0)
        velocity = torch.zeros_like(self.velocity).flatten(1).index_copy(1, self.who, unit(to_goal) * walking)
        self.velocity[:, rows] = velocity.view_as(self.velocity)[:, rows]

    def index(self) -> None:
        """List who is there, which only changes with the starts: all forces are computed for these alone.

        M pedestrians: slot n * P + p of each (who), its row, what it is; K pairs of them that share a row."""
        world, slots = self.world, self.world.slots
        count = world.count[self.start]  # of those in a row, who have its first slots
        self.row, slot = enumerated(count)
        self.who = self.row * slots + slot
        self.entry = self.start[self.row] * slots + slot  # its place in the world's tables
        people = world.pedestrians
        for name in ("speed", "arrives", "end", "last", "role"):
            setattr(self, name, pick(people[name].flatten(), self.entry))
        self.offset, self.respawn = (pick(people[name].flatten(1), self.entry) for name in ("offset", "respawn"))
        self.group = self.row * slots + pick(people["group"].flatten(), self.entry)
        self.rectangles = world.rectangles.index_select(1, world.map[self.start[self.row]])
        self.one, k = enumerated(count[self.row] - 1)  # each with all others of its row
        self.other = k + (self.one - slot[self.one])
        self.other += self.other >= self.one
        self.escorts = (self.role >= ESCORTS[0]) & (self.role <= ESCORTS[-1])
        self.walks = (self.last >= 0) & ~self.escorts
        self.has_roles = bool((self.role > 0).any())
        kin = self.group[self.one] == self.group[self.other]
        self.kin_one, self.kin_other = self.one[kin], self.other[kin]

    def _goals(self, way: Tensor) -> Tensor:
        """The waypoints (2, M) of these numbers (M,) in everybody's path; nonsense where it has none."""
        path = self.world.pedestrians["path"]
        return pick(path.flatten(1), self.entry * path.shape[-1] + way)

    def _wishes(self, x: Tensor, way: Tensor, robot: Tensor) -> Tensor:
        """Where everybody wants to go (2, M): to a waypoint, to a place beside the robot (3, M), or nowhere."""
        goal = torch.where(self.walks, self._goals(way), x)
        if self.has_roles:
            beside = robot[:2] + rotate(self.offset, torch.cos(robot[2]), torch.sin(robot[2]))
            goal = torch.where(self.escorts, beside, goal)
        return goal

    def step(self, pose: Tensor) -> Tensor:
        """One step of all, with the robots at pose (3, N). Returns how many felt an offensive force (N,)."""
        x, v = pick(self.motion.flatten(1), self.who).split(2)
        robot = pick(pose, self.row)
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
        return sum_over(self.row, offensive[None], len(self.start))[0]

    def _groups(self, x: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """Size (M,) and centroid (2, M) of everybody's group; those who belong to none are alone where they are."""
        if not len(self.kin_one):
            return torch.ones_like(x[0]), x
        values = torch.cat([x, torch.ones_like(x[:1])]) * member
        *sums, number = pick(sum_over(self.group, values, self.way.numel()), self.group)
        size = torch.where(member, number, 1.0)
        return size, torch.where(member, torch.stack(sums) / size, x)

    def _turn(self, x: Tensor, v: Tensor, centroid: Tensor, standing: Tensor, robot: Tensor) -> tuple:
        """Let those whose group has reached its waypoint turn to the next one. Returns the new x and v, where everybody
        wants to go (2, M), and who came back (M,).

        At the end of its path a pedestrian stops, begins anew, or returns to where its crowd appears."""
        way = pick(self.way.flatten(), self.who)
        arrived = (length(centroid - self._goals(way)) < self.arrives) & ~standing & self.walks
        at_end = way == self.last
        close = (length(self.respawn - robot[:2]) <= RETURN).to(x)  # nobody of a group appears beside a robot
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
