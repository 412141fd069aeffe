import mujoco
import numpy as np
import pytest

from envs.evaluation import rollout
from envs.so101 import ASSET, GOAL, HALF_SHEET, IK, LEASH, MAX_DELTA, READY, SO101Paper

# Joint angles of the official SO-101 model (new calibration) and what it gives there: position of the fingertip (m),
# torque that holds the arm (N m), diagonal of the joint-space inertia with armature (kg m^2).
OFFICIAL = [
    (
        [0.910148792, -1.222305554, 1.126989628, 0.298763536, 0.902580304, 0.615651325],
        [0.170627224, -0.179813588, 0.16228376],
        [0.0, -0.098921528, -0.44760189, -0.1146897, -0.003384075, 0.00230755],
        [0.032161609, 0.032725219, 0.036420828, 0.028977838, 0.028053453, 0.028016135],
    ),
    (
        [1.632337902, -0.352038841, -1.513782031, -0.144422557, -0.679631439, 0.607423047],
        [0.049192702, 0.088125642, 0.506124647],
        [0.0, 0.220190423, 0.162166386, 0.052727671, -0.001204498, -0.002642939],
        [0.028914032, 0.051651695, 0.03655212, 0.028982434, 0.028053237, 0.028016135],
    ),
    (
        [1.70358903, -0.370273093, -1.136335365, -1.445442334, -2.402895543, 0.923242552],
        [0.062113686, 0.136359396, 0.390776428],
        [0.0, 0.169265363, 0.103827064, 0.112990633, -0.003408979, 0.001216874],
        [0.028792507, 0.047549949, 0.033986977, 0.028970834, 0.028061496, 0.028016135],
    ),
    (
        [-1.30178904, 1.490796828, 1.024359159, -1.44635749, 2.488676149, 0.546256979],
        [0.075821191, 0.114929937, -0.122201042],
        [0.0, -0.19642247, 0.211358277, -0.05326697, -0.001259869, 0.000325337],
        [0.031299264, 0.035026902, 0.033984961, 0.028985024, 0.028051642, 0.028016135],
    ),
]


def noisy_ik(rows, seed=0):
    """IK with noise of its own in each row, so that rows differ and episodes end in several ways."""
    ik, rngs = IK(), [np.random.default_rng([seed, i]) for i in range(rows)]

    def policy(obs):
        noise = np.stack([rng.normal(0, 0.004, 6) for rng in rngs])
        return np.clip(ik(obs) + noise, -MAX_DELTA, MAX_DELTA).astype(np.float32)

    return policy


def still(rows):
    return np.zeros((rows, 6), np.float32)


def corners(qpos):
    """The sheet's corners relative to the goal, (N, 4, 2)."""
    local = HALF_SHEET * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    c, s = np.cos(qpos[:, 8]), np.sin(qpos[:, 8])
    rotation = np.stack([np.stack([c, -s], 1), np.stack([s, c], 1)], 1)
    return np.einsum("nij,cj->nci", rotation, local) + (qpos[:, 6:8] - GOAL)[:, None]


def potential(obs, margin=0.02):
    """Phi of the docstring, computed from an observation."""
    obs = obs.astype(np.float64)
    yaw = 2 * np.arctan2(obs[:, 18], obs[:, 15])
    qpos = np.column_stack([np.zeros((len(obs), 6)), obs[:, 12:14], yaw])
    beyond = np.abs(corners(qpos)).max(1) - (HALF_SHEET + margin)
    reach = np.linalg.norm(obs[:, 22:25] - obs[:, 12:15], axis=1)
    return -5 * reach - 30 * np.maximum(beyond, 0).sum(1) - 3 * np.abs(yaw)


# The arm


@pytest.mark.parametrize(("joints", "tip", "torque", "inertia"), OFFICIAL)
def test_the_arm_is_that_of_the_official_model(joints, tip, torque, inertia):
    model = mujoco.MjModel.from_xml_path(str(ASSET))
    data = mujoco.MjData(model)
    data.qpos[:6] = joints
    mujoco.mj_forward(model, data)
    mass = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, mass)
    np.testing.assert_allclose(data.site("end_effector").xpos, tip, atol=1e-4)
    np.testing.assert_allclose(data.qfrc_bias[:6], torque, rtol=0.01, atol=1e-6)
    np.testing.assert_allclose(mass.diagonal()[:6], inertia, rtol=0.01)


def test_each_joint_goes_where_it_is_told():
    vec = SO101Paper(6)
    vec.reset(seed=0)
    action = np.diag([0.02, -0.02, -0.02, -0.02, 0.02, 0.02]).astype(np.float32)  # away from the table
    for step in range(30):
        vec.step(action if step < 10 else still(6))
    np.testing.assert_allclose(vec.qpos[:, :6] - READY, 10 * action, atol=0.01)


def test_the_target_stays_on_its_leash_and_in_the_joint_range():
    vec, rng = SO101Paper(32), np.random.default_rng(0)
    vec.reset(seed=0)
    low, high = vec.model.jnt_range[:6].T
    ahead = at_limit = 0
    for step in range(90):
        if step % 45 == 0:
            bias = rng.choice([-MAX_DELTA, 0, MAX_DELTA], (32, 6))
        joints = vec.qpos[:, :6].copy()
        action = np.clip(bias + rng.normal(0, 0.02, (32, 6)), -MAX_DELTA, MAX_DELTA)
        *_, terminated, _, _ = vec.step(action.astype(np.float32))
        target, joints = vec.target[~terminated], joints[~terminated]  # a row that ended is back at its start
        ahead = max(ahead, np.abs(target - joints).max())
        at_limit += ((target == low) | (target == high)).sum()
        assert (target >= low).all()
        assert (target <= high).all()
    assert LEASH == 0.06
    assert ahead == pytest.approx(LEASH, abs=1e-9)  # reached, and never passed
    assert at_limit > 100


# The task


def test_shaping_telescopes():
    """Training adds Phi(end) - Phi(start) to the return of the published task, whatever happens in between."""
    vecs = [SO101Paper(6, training=training, training_steps=400) for training in (True, False)]
    policy, seeds = noisy_ik(6), [[3, i] for i in range(6)]
    first, obs = (vec.reset(seed=seeds)[0] for vec in vecs)
    np.testing.assert_array_equal(first, obs)
    np.testing.assert_allclose(vecs[0].potential, potential(first), atol=1e-4)
    added, open_rows = np.zeros(6), np.ones(6, bool)
    for _ in range(400):
        action = policy(obs)
        (shaped_obs, shaped, *_), (obs, reward, terminated, truncated, info) = (vec.step(action) for vec in vecs)
        np.testing.assert_array_equal(shaped_obs, obs)
        np.testing.assert_allclose(vecs[0].potential, potential(obs), atol=1e-4)
        np.testing.assert_allclose(reward, np.where(terminated, 9.99, -0.01))
        added[open_rows] += (shaped - reward)[open_rows]
        ended = open_rows & (terminated | truncated)
        if ended.any():
            change = potential(info["final_obs"]) - potential(first)
            np.testing.assert_allclose(added[ended], change[ended], atol=1e-4)
            open_rows &= ~ended
    assert not open_rows.any()


def test_success_needs_every_corner_inside_for_five_steps():
    #         inside, too far in x, in y, turned too far, turned, turned and moved, moved as much without turning
    offset_x = [0.019, 0.021, 0.0, 0.0, 0.0, 0.006, 0.006]
    offset_y = [-0.019, 0.0, -0.021, 0.0, 0.0, 0.0, 0.0]
    yaw = [0.0, 0.0, 0.0, 0.3, -0.15, -0.15, 0.0]
    inside = np.array([True, False, False, False, True, False, True])
    vec = SO101Paper(7, training=False)
    vec.reset(seed=0)
    vec.qpos[:, 6:9] = np.column_stack([GOAL[0] + np.array(offset_x), GOAL[1] + np.array(offset_y), yaw])
    np.testing.assert_array_equal((np.abs(corners(vec.qpos)).max(1) <= HALF_SHEET + 0.02).all(1), inside)
    for _ in range(4):
        _, reward, terminated, truncated, info = vec.step(still(7))
        assert not terminated.any()
        assert info == {}
        np.testing.assert_allclose(reward, -0.01)
    _, reward, terminated, truncated, info = vec.step(still(7))
    np.testing.assert_array_equal(terminated, inside)
    np.testing.assert_array_equal(info["is_success"], inside)
    np.testing.assert_array_equal(info["_is_success"], inside)
    np.testing.assert_allclose(info["yaw_error"][inside], np.abs(yaw)[inside], atol=1e-4)
    np.testing.assert_allclose(info["position_error"][inside], np.hypot(offset_x, offset_y)[inside], atol=1e-4)
    np.testing.assert_allclose(reward, np.where(inside, 9.99, -0.01))
    assert not truncated.any()
    for _ in range(5):
        _, _, terminated, _, _ = vec.step(still(7))
        assert not terminated[~inside].any()


def friction_factors(vec):
    """The factors by which table and fingertip friction differ from 0.6 and 1.3, (N,) each."""
    models = [vec.batch.get_model(i) for i in range(vec.num_envs)]
    sheet = np.array([model.dof_frictionloss[6:9] for model in models]) / [0.0147, 0.0147, 0.0010]
    table = sheet[:, 0]
    np.testing.assert_allclose(sheet, table[:, None].repeat(3, 1))
    fixed, moving = (
        np.array([m.geom(f"{name}_fingertip").friction[0] for m in models]) for name in ("fixed", "moving")
    )
    np.testing.assert_array_equal(fixed, moving)
    return table, (fixed + table * 0.6) / 1.3


@pytest.mark.parametrize("split", ["train", "test"])
def test_starts(split):
    """Uniform over the documented ranges, which 400 draws nearly fill."""
    vec = SO101Paper(400, split=split)
    vec.reset(seed=0)
    x, y, yaw = np.column_stack([vec.qpos[:, 6:8] - GOAL, vec.qpos[:, 8]]).T
    table, tip = friction_factors(vec)
    for values, low, high in (
        (x, -0.07, 0.07),
        (y, -0.12, 0.12),
        (yaw, -0.3, 0.3),
        (table, 0.8, 1.2),
        (tip, 0.85, 1.15),
    ):
        edge = 0.05 * (high - low)
        assert low <= values.min() < low + edge
        assert high - edge < values.max() <= high
    distance = np.hypot(x, y)
    assert 0.06 <= distance.min() < 0.065
    assert np.abs(np.corrcoef([x, y, yaw, table, tip]) - np.eye(5)).max() < 0.2
    np.testing.assert_array_equal(vec.qpos[:, :6], np.tile(READY, (400, 1)))
    assert not vec.qvel.any()


def test_layout_of_the_observation():
    vec = SO101Paper(3)
    obs, _ = vec.reset(seed=0)
    policy = noisy_ik(3)
    for step in range(40):
        if step % 10 == 0:
            for i in range(3):
                data = vec.batch.get_data(i)
                mujoco.mj_forward(vec.batch.get_model(i), data)
                x, y, yaw = data.qpos[6:9]
                quaternion = np.zeros(4)
                mujoco.mju_axisAngle2Quat(quaternion, [0, 0, 1], yaw)
                tip = data.site("end_effector").xpos
                goal = [0.25 - x, -y, 0]
                expected = np.concatenate([data.qpos[:6], data.qvel[:6], [x, y, 0], quaternion, goal, tip])
                np.testing.assert_allclose(obs[i], expected, atol=1e-6)
                np.testing.assert_array_equal(vec.qpos[i], data.qpos)
            np.testing.assert_allclose(np.linalg.norm(obs[:, 15:19], axis=1), 1, atol=1e-6)
        obs, *_ = vec.step(policy(obs))


# Randomness and state


# Disturbances


def test_friction_of_the_paper_by_hand():
    plain, rough = (SO101Paper(4, training=False, paper_friction=x) for x in (1.0, 1.5))
    for vec in (plain, rough):
        vec.reset(seed=3)
    np.testing.assert_allclose(rough.frictionloss[:, 6:9], 1.5 * plain.frictionloss[:, 6:9])
    (table, tip), fingers = friction_factors(plain), rough.friction[:, rough.fingertips, 0]
    np.testing.assert_allclose(fingers, np.repeat((1.3 * tip - 1.5 * 0.6 * table)[:, None], 2, axis=1))
    slippery = SO101Paper(4, training=False, paper_friction=5.0)  # the table would hold more than a finger can move
    slippery.reset(seed=3)
    assert (slippery.friction[:, slippery.fingertips, 0] == 0).all()


def test_heavier_links_weigh_more_and_still_rest_in_the_pose():
    plain, heavy = SO101Paper(1), SO101Paper(1, link_mass=1.5)
    heavy.reset(seed=0)
    mass, paper = heavy.masses[0][0], plain.model.body("paper").id
    np.testing.assert_allclose(mass[heavy.links], 1.5 * plain.model.body_mass[heavy.links])
    assert mass[paper] == plain.model.body_mass[paper]
    for _ in range(60):
        heavy.step(still(1))
    assert np.abs(heavy.qpos[:, :6] - READY).max() < 1e-4


def test_a_delayed_action_is_the_action_of_steps_before():
    actions = np.random.default_rng(0).uniform(-0.01, 0.01, (20, 2, 6)).astype(np.float32)
    plain, late = SO101Paper(2), SO101Paper(2, action_delay=2)
    for vec in (plain, late):
        vec.reset(seed=1)
    for t, action in enumerate(actions):
        obs = plain.step(actions[t - 2] if t >= 2 else still(2))[0]
        np.testing.assert_array_equal(late.step(action)[0], obs)
    assert late.actions.any()
    late.reset(options={"reset_mask": np.array([True, False])})
    assert [row.any() for row in late.actions] == [False, True]


def test_noise_is_on_what_is_observed_alone():
    plain, noisy = SO101Paper(64), SO101Paper(64, position_noise=0.001, angle_noise=0.01)
    first = [vec.reset(seed=1)[0] for vec in (plain, noisy)]
    second = [vec.step(still(64))[0] for vec in (plain, noisy)]
    np.testing.assert_array_equal(noisy.qpos, plain.qpos)
    for without, with_noise in (first, second):
        error = with_noise.astype(float) - without
        assert error[:, :6].std() == pytest.approx(0.01, rel=0.15)
        assert error[:, [12, 13, 22, 23, 24]].std() == pytest.approx(0.001, rel=0.15)
        yaw = 2 * np.arctan2(with_noise[:, 18], with_noise[:, 15]) - 2 * np.arctan2(without[:, 18], without[:, 15])
        assert yaw.std() == pytest.approx(0.01, rel=0.3)
        np.testing.assert_allclose(error[:, 19:21], -error[:, 12:14], atol=1e-7)  # the goal as seen from the sheet
        assert not error[:, [*range(6, 12), 14, 16, 17, 21]].any()
    assert np.abs(second[1] - first[1])[:, :6].min() > 0  # drawn anew


# The base policy


def test_ik_knows_the_jacobian_of_the_arm():
    model = mujoco.MjModel.from_xml_path(str(ASSET))
    data = mujoco.MjData(model)

    def tip(joints):
        data.qpos[:6] = joints
        mujoco.mj_kinematics(model, data)
        return data.site("end_effector").xpos.copy()

    joints = np.random.default_rng(0).uniform(-1, 1, (5, 6))
    jacobian = IK()._jacobian(joints, np.array([tip(q) for q in joints]))
    for q, ours in zip(joints, jacobian, strict=True):
        for k in range(4):
            nudge = np.eye(6)[k] * 1e-6
            np.testing.assert_allclose(ours[:, k], (tip(q + nudge) - tip(q - nudge)) / 2e-6, atol=1e-7)


def test_ik_alone_succeeds_about_half_the_time():
    results = rollout(IK(), SO101Paper(64, training=False, split="test"), 200, seed=1)
    success = [result["success"] for result in results]
    assert 0.45 < np.mean(success) < 0.65
    assert all((result["length"] < 400) or not result["success"] for result in results)


# Arguments and rendering
