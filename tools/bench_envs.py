"""Our environments' speed, beside plain loops over one robot or car as the published environments step."""

import statistics
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mujoco
import numpy as np
import onnxruntime
import torch
from bench_results import Row, measured, number, place, spread, table

from envs import UserError, ballbot, check_flat_box, lateral, lateral_model, make_vec, so101
from envs.evaluation import Policy, load_script, make_scripted_policy, read_policy
from envs.run import SET_BY_SCRIPT
from envs.socnav.dynamics import rotate
from envs.socnav.environment import SocNavGrid
from envs.socnav.grid import OccupancyGrid


@dataclass
class Envs:
    env_id: str = "SO101Paper-v0"
    """environment to measure"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..."""
    policy: str = "runs/reference/so101"
    """policy that acts while it is measured, a file, a run or a scripted controller"""
    num_envs: tuple[int, ...] = (8, 16, 64, 256)
    """sizes of the batch"""
    threads: int = 1
    """CPU threads of the simulator"""
    seconds: float = 4.0
    """how long each measurement lasts"""
    repeats: int = 3
    """measurements of each size, of which the median counts"""
    out: str = "runs/bench"
    """folder with one JSON file a measurement; what is there is not measured again"""


def make_policy(name: str, vec) -> Policy:
    """A scripted controller, or the policy in a file with its base."""
    if not (name.endswith(".pt") or Path(name).is_dir()):
        return make_scripted_policy(name, vec)
    policy = read_policy(name)
    if isinstance(vec, SocNavGrid):
        return SocNavPolicy(policy, vec)
    return load_script(policy["script"]).load_policy(policy, vec)


class SocNavPolicy:
    """A trained policy beside an environment whose grid may have other channels than its own: it gets its own one."""

    def __init__(self, policy: dict, vec: SocNavGrid):
        own = make_vec(policy["env_id"], 1, training=False, split="test", **policy["env_kwargs"])
        self.policy, self.vec = load_script(policy["script"]).load_policy(policy, own), vec
        self.grid = OccupancyGrid(vec.world, vec.num_envs, own.grid.channels, own.grid.size, own.grid.resolution)

    def __call__(self, obs: dict) -> np.ndarray:
        position = self.vec.crowd.position - self.vec.pose[:2, :, None]
        position = rotate(position, torch.cos(self.vec.pose[2])[:, None], -torch.sin(self.vec.pose[2])[:, None])
        return self.policy({**obs, "grid": self.grid(self.vec.place.maps, self.vec.pose, position).numpy()})


def steps_per_second(args: Envs, num_envs: int) -> tuple[float, float]:
    """Wall clock over base policy, observation, reward, autoreset and physics; and the same without the policy."""
    vec = make_vec(args.env_id, num_envs, threads=args.threads, training=True, **args.env_kwargs)
    policy = make_policy(args.policy, vec)
    obs, _ = vec.reset(seed=0)
    if hasattr(policy, "reset"):
        policy.reset(np.arange(num_envs), vec)
    for _ in range(50):  # past the start, where nothing touches yet
        obs, *_ = vec.step(policy(obs))
    steps, stepping, begin = 0, 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < args.seconds:
        action = policy(obs)
        before = time.perf_counter()
        obs, *_ = vec.step(action)
        stepping += time.perf_counter() - before
        steps += num_envs * vec.action_repeat
    return steps / elapsed, steps / stepping


def bench_envs(args: Envs) -> None:
    """Raises UserError for settings that cannot be measured."""
    if taken := [name for name in SET_BY_SCRIPT if name in args.env_kwargs]:
        raise UserError(f"{taken[0]} is not for --env-kwargs: the tool sets it; leave it out")
    if min(args.repeats, args.threads, *args.num_envs) < 1 or not args.seconds > 0:
        raise UserError("--repeats, --threads and --num-envs must be at least 1, and --seconds above 0")
    args = replace(args, env_id=args.env_id.removeprefix("envs:"))
    vec = make_vec(args.env_id, 1, **args.env_kwargs)
    if not isinstance(vec, SocNavGrid):
        check_flat_box(vec)
    make_policy(args.policy, vec)
    torch.set_num_threads(args.threads if isinstance(vec, SocNavGrid) else 1)
    asked = {name: value for name, value in vars(args).items() if name != "out"}
    file = place(args.out, "envs", f"{args.env_id}__{args.threads}_threads", asked)
    result = measured(file, asked, partial(measure, args))
    print(table(env_rows([result]), [result]))


def measure(args: Envs) -> dict[str, Any]:
    """Steps a second of each size of the batch; beside a plain loop where there is one of the environment."""
    sizes = []
    for num_envs in args.num_envs:
        with_policy, alone = zip(*(steps_per_second(args, num_envs) for _ in range(args.repeats)))
        sizes.append({"num_envs": num_envs, "with_policy": with_policy, "alone": alone})
    loops = {"LateralControl-v0": beside_lateral, "Ballbot-v0": beside_ballbot, "SO101Paper-v0": beside_so101}
    return {"sizes": sizes, "plain": loops[args.env_id](args) if args.env_id in loops else None}


def env_rows(results: list[dict]) -> list[Row]:
    """Each size of the batch, beside the smallest; and the largest beside a plain loop."""
    rows = []
    for result in results:
        kwargs = "".join(f", {name} {value}" for name, value in result["env_kwargs"].items())
        threads = f", {result['threads']} threads" if result["threads"] > 1 else ""
        first = result["sizes"][0]
        for size in result["sizes"]:
            alone, with_policy = (statistics.median(size[name]) for name in ("alone", "with_policy"))
            where = f"{result['env_id']}, {size['num_envs']} simulations{threads}{kwargs}"
            what = f"environment, steps/s (with {result['policy']})"
            beside = f"{first['num_envs']} simulations {number(statistics.median(first['alone']))}"
            ratio = f"{alone / statistics.median(first['alone']):.2f}"
            compared = (beside, ratio) if size is not first else ("", "")
            rows.append(Row(what, where, f"{number(alone)} ({number(with_policy)})", *compared))
        if result["plain"] is not None:
            plain = result["plain"]
            ours, theirs = (statistics.median(plain[name]) for name in ("ours", "theirs"))
            where = f"{result['env_id']}, {plain['where']}{threads}{kwargs}"
            figure, beside = (spread(plain[name], statistics.median) for name in ("ours", "theirs"))
            what = f"environment, {plain['unit']}"
            rows.append(Row(what, where, figure, f"{plain['loop']} {beside}", f"{ours / theirs:.2f}"))
    return rows


def beside_ballbot(args: Envs) -> dict[str, Any]:
    """A plain loop over one robot, as the published environment steps (RK4, observation and reward in Python), beside
    the largest batch."""
    vec = make_vec(args.env_id, 1, training=True, **{**args.env_kwargs, "action_repeat": 1})
    model = vec.models[0]
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_RK4
    return beside_one_robot(args, vec, partial(plain_ballbot, vec, model), "a plain loop over one robot, RK4,")


def beside_so101(args: Envs) -> dict[str, Any]:
    """A plain loop over one arm with MuJoCo's own bindings, beside the largest batch."""
    vec = make_vec(args.env_id, 1, training=True, **args.env_kwargs)
    return beside_one_robot(args, vec, partial(plain_so101, vec), "a plain loop over one arm")


def beside_one_robot(args: Envs, vec: Any, plain: Callable, loop: str) -> dict[str, Any]:
    """Both in turn, without what the policy takes."""
    policy, theirs, ours = make_policy(args.policy, vec), [], []
    for repeat in range(args.repeats):
        vec.reset(seed=repeat)
        if hasattr(policy, "reset"):
            policy.reset(np.arange(1), vec)
        theirs.append(plain(policy, args.seconds))
        ours.append(steps_per_second(args, max(args.num_envs))[1])
    where = f"{max(args.num_envs)} simulations"
    return {"unit": "steps/s", "where": where, "loop": loop, "ours": ours, "theirs": theirs}


def plain_so101(vec: so101.SO101Paper, policy: Policy, seconds: float) -> float:
    """Steps a second of one arm, without what its policy takes: observation, reward and success in Python."""
    model = copy(vec.model)
    data = mujoco.MjData(model)
    model.dof_frictionloss[so101.SHEET] = vec.frictionloss[0, so101.SHEET]
    model.geom_friction[:] = vec.friction[0]
    start, ready = vec.qpos[0].copy(), vec.target[0].copy()
    low, high, tip = vec.joint_low, vec.joint_high, data.site("end_effector").xpos
    ended, spent, steps, potential = True, 0.0, 0, 0.0
    while spent < seconds:
        begin = time.perf_counter()
        if ended:
            mujoco.mj_resetData(model, data)
            data.qpos[:], data.ctrl[:] = start, ready
            mujoco.mj_kinematics(model, data)
            inside = length = 0
        x, y, yaw = data.qpos[so101.SHEET]
        sheet = [x, y, 0, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2), so101.GOAL[0] - x, so101.GOAL[1] - y, 0]
        obs = np.concatenate([data.qpos[so101.ARM], data.qvel[so101.ARM], sheet, tip], dtype=np.float32)
        obs = obs.clip(-so101.OBS_HIGH, so101.OBS_HIGH)
        spent += time.perf_counter() - begin
        action = policy(obs[None])[0]
        begin = time.perf_counter()
        joints = data.qpos[so101.ARM]
        data.ctrl[:] = np.clip(np.clip(data.ctrl + action, joints - so101.LEASH, joints + so101.LEASH), low, high)
        mujoco.mj_step(model, data, so101.SUBSTEPS)
        mujoco.mj_kinematics(model, data)
        x, y, yaw = data.qpos[so101.SHEET]
        c, s, (a, b) = abs(np.cos(yaw)), abs(np.sin(yaw)), so101.HALF_SHEET
        overhang = np.array([a * c + b * s, a * s + b * c]) + np.abs(data.qpos[6:8] - so101.GOAL) - vec.half_frame
        reach = np.sqrt(np.square(tip[:2] - data.qpos[6:8]).sum() + tip[2] ** 2)
        before, potential = potential, -5 * reach - 30 * np.maximum(overhang, 0).sum() - 3 * abs(yaw)
        inside, length, steps = inside + 1 if (overhang <= 0).all() else 0, length + 1, steps + 1
        success = inside >= so101.HOLD_STEPS
        reward = 10.0 * success - 0.01 + potential - before
        ended = success or length == so101.MAX_EPISODE_STEPS or not np.isfinite(reward)
        spent += time.perf_counter() - begin
    return steps / spent


def plain_ballbot(vec: ballbot.Ballbot, model: mujoco.MjModel, policy: Policy, seconds: float) -> float:
    """Steps a second of one robot, without what its policy takes."""
    data, spent, steps, action = mujoco.MjData(model), 0.0, 0, np.zeros(3)
    start = vec.qpos[0].copy()
    data.qpos[:] = start
    while spent < seconds:
        begin = time.perf_counter()
        rotation = ballbot.rotation_vector(data.qpos[None, ballbot.QUATERNION])[0]
        velocities = [data.qvel[ballbot.ANGULAR_VELOCITY], data.qvel[ballbot.VELOCITY], data.qvel[ballbot.WHEELS] / 10]
        obs = np.concatenate([rotation, *velocities, action, [0]], dtype=np.float32).clip(
            ballbot.OBS_LOW, ballbot.OBS_HIGH
        )
        spent += time.perf_counter() - begin
        action = policy(obs[None])[0]
        begin = time.perf_counter()
        data.ctrl[:] = -ballbot.MAX_TORQUE * action
        mujoco.mj_step(model, data)
        data.qpos[ballbot.DRIVES] = 0
        upright = ballbot.rotation_matrix(data.qpos[None, ballbot.QUATERNION])[0, 2, 2]
        reward = data.qvel[1] / 100 - 1e-4 * np.square(action).sum() + ballbot.ALIVE_REWARD
        if upright < np.cos(np.radians(ballbot.MAX_TILT)) or not np.isfinite(reward):
            mujoco.mj_resetData(model, data)
            data.qpos[:] = start
            if hasattr(policy, "reset"):
                policy.reset(np.arange(1), vec)
        steps += 1
        spent += time.perf_counter() - begin
    return steps / spent


def beside_lateral(args: Envs) -> dict[str, Any]:
    """Whole segments a second: the official simulator's loop, one car and all rows of a segment, and ours with 64 cars
    and the scored steps only; and the share of its time that ours spends in the ONNX model."""
    path = args.env_kwargs.get("model_path") or lateral.EMBEDDED
    vec = make_vec(args.env_id, 64, training=False, split="train", threads=args.threads, **args.env_kwargs)
    whole_model = onnxruntime.InferenceSession(path, single_threaded(), providers=["CPUExecutionProvider"])
    theirs, ours, share = [], [], []
    for repeat in range(args.repeats):
        begin = time.perf_counter()
        for segment in range(2):
            plain_rollout(whole_model, vec.road, segment + repeat)
        theirs.append(2 / (time.perf_counter() - begin))

        vec.reset(seed=repeat)
        action, inside, begin = np.zeros((64, 1)), [], time.perf_counter()
        with patch.object(vec.sim.dynamics, "logits", timed(vec.sim.dynamics.logits, inside)):
            for _ in range(lateral.STEPS):
                vec.step(action)
        elapsed = time.perf_counter() - begin
        ours.append(64 / elapsed)
        share.append(sum(inside) / elapsed)
    where = f"64 cars, {statistics.median(share):.0%} of the time in the ONNX model"
    return {"unit": "segments/s", "where": where, "loop": "a plain loop over one car", "ours": ours, "theirs": theirs}


def timed(function: Callable, durations: list[float]) -> Callable:
    def call(*args: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args)
        durations.append(time.perf_counter() - begin)
        return result

    return call


def single_threaded() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def plain_rollout(
    model: onnxruntime.InferenceSession, road: lateral.Road, segment: int, rows: int = 580
) -> list[float]:
    """One car as the official simulator runs it, from row 20 to its end (ours are cut shorter: the last one repeats),
    with its PID controller. Returns the lateral accelerations."""
    rng = np.random.RandomState(lateral.noise_seed(road.names[segment]))
    row = np.minimum(np.arange(20 + rows), len(road.target[segment]) - 1)
    target, states = road.target[segment][row], np.stack([road.roll, road.v, road.a], axis=-1)[segment][row]
    lat, steer = list(target[:20]), list(road.steer[segment][:20])
    integral = previous = 0.0
    for t in range(20, 20 + rows):
        error = target[t] - lat[-1]
        integral, slope, previous = integral + error, error - previous, error
        action = 0.195 * error + 0.1 * integral - 0.053 * slope
        steer.append(float(np.clip(road.steer[segment][t] if t < lateral.FIRST else action, -2, 2)))
        context = np.column_stack([steer[-20:], states[t - 19 : t + 1]]).astype(np.float32)
        logits = model.run(None, {"states": context[None], "tokens": lateral_model.tokens_of(np.array([lat[-20:]]))})[0]
        p = lateral_model.distribution(logits[0])[-1]  # of all 20 positions, as there
        drawn = lateral_model.BINS[rng.choice(len(p), p=p)]
        lat.append(target[t] if t < lateral.FIRST else float(np.clip(drawn, lat[-1] - 0.5, lat[-1] + 0.5)))
    return lat
