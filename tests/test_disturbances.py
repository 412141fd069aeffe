"""Disturbances with ranges, and those of the ballbot and the car."""

import numpy as np
import pytest

from envs.ballbot import Ballbot
from envs.disturbances import Disturbances
from envs.lateral import LateralControl
from envs.so101 import SO101Paper

RANGES = {
    SO101Paper: {"paper_friction": (0.5, 1.5), "link_mass": (0.8, 1.2), "action_delay": (0, 3)},
    Ballbot: {"mass": (0.8, 1.2), "motor_gain": (0.8, 1.2), "motor_delay": (0, 8)},
    LateralControl: {"steering_gain": (0.8, 1.2), "steering_delay": (0, 3)},
}
OTHERS = {SO101Paper: {"randomize": False, "training": True}, Ballbot: {"action_repeat": 4}, LateralControl: {}}


@pytest.mark.parametrize("kind", RANGES)
def test_ranges_are_drawn_per_episode(kind):
    """Each environment equals one with its values as constants, also after a snapshot."""
    ranges, others, rng = RANGES[kind], {"training": False, **OTHERS[kind]}, np.random.default_rng(0)
    vec = kind(6, **ranges, **others)
    vec.reset(seed=4)
    drawn = {name: vec.disturbances[name].tolist() for name in ranges}
    for name, (low, high) in ranges.items():
        assert len(set(drawn[name])) > 2
        assert low <= min(drawn[name]) <= max(drawn[name]) <= high
        assert isinstance(low, float) or {type(x) for x in drawn[name]} == {int}
    constants = [kind(1, **{name: x[i] for name, x in drawn.items()}, **others) for i in range(6)]
    for i, one in enumerate(constants):
        one.reset(seed=[[4, i]])
    space = vec.single_action_space
    for t in range(20):
        action = rng.uniform(space.low, space.high, (6, *space.shape)).astype(np.float32)
        obs = vec.step(action)[0]
        np.testing.assert_array_equal(obs, [one.step(action[[i]])[0][0] for i, one in enumerate(constants)])
        if t == 10:
            other = kind(6, **ranges, **others)
            other.load_state_dict(vec.state_dict())
            vec = other
    vec.reset()
    name = next(iter(ranges))
    assert vec.disturbances[name].tolist() != drawn[name]
    with pytest.raises(ValueError, match=f"{name} must be a number or"):
        kind(1, **{name: (1.2, 0.8)})


def test_whole_numbers_include_both_ends():
    disturbances, rng, drawn = Disturbances(1, {"delay": (1, 3)}), np.random.default_rng(0), set()
    for _ in range(50):
        disturbances.draw(0, rng)
        drawn |= {*disturbances["delay"].tolist()}
    assert drawn == {1, 2, 3}


def test_mass_gain_and_delay_of_the_ballbot_by_hand():
    plain, heavy = Ballbot(1), Ballbot(1, mass=1.5)
    ball = plain.models[0].body("ball").id
    robot = np.delete(np.arange(1, plain.models[0].nbody), ball - 1)
    for vec in (plain, heavy):
        vec.reset(seed=0)
    masses, heavier = (vec.models[0].body_mass.copy() for vec in (plain, heavy))
    np.testing.assert_allclose(heavier[robot], 1.5 * masses[robot])
    assert heavier[ball] == masses[ball]
    heavy.close()
    again = Ballbot(1)  # which takes the model of the closed one
    again.reset(seed=0)
    np.testing.assert_array_equal(again.models[0].body_mass, masses)

    strong, late = Ballbot(1, motor_gain=0.5), Ballbot(1, motor_delay=3, action_repeat=2)
    for vec in (strong, late):
        vec.reset(seed=0)
    strong.step(np.full((1, 3), 0.4, np.float32))
    np.testing.assert_allclose(strong.torque, -10 * 0.4 * 0.5, rtol=1e-6)
    seen = []
    for action in (0.1, 0.2, 0.3):
        late.step(np.full((1, 3), action, np.float32))
        seen.append(late.torque[0, 0])  # of the second of two steps of 2 ms
    np.testing.assert_allclose(seen, [0, -1, -2], rtol=1e-6)


def test_noise_and_bias_of_the_ballbots_sensors():
    plain, noisy, biased = (Ballbot(64, **x) for x in ({}, {"sensor_noise": 0.01}, {"sensor_bias": 0.02}))
    action = np.zeros((64, 3), np.float32)
    runs = [[vec.reset(seed=1)[0], *(vec.step(action)[0] for _ in range(5))] for vec in (plain, noisy, biased)]
    flat = [np.array(run) for run in runs]
    for error, std in ((flat[1] - flat[0], 0.01), (flat[2] - flat[0], 0.02)):
        assert error[..., :12].std() == pytest.approx(std, rel=0.1)
        assert not error[..., 12:].any()
    np.testing.assert_allclose((flat[2] - flat[0])[0, :, :12], (flat[2] - flat[0])[5, :, :12], atol=1e-6)
    assert np.abs((flat[1] - flat[0])[0, :, :12] - (flat[1] - flat[0])[5, :, :12]).std() > 0.005


def test_gain_and_delay_of_the_steering():
    """With a delay of 2 the car receives the command of two steps before, and knows what it commanded."""
    plain, late = LateralControl(2, training=False), LateralControl(2, training=False, steering_delay=2)
    half, rng = LateralControl(2, training=False, steering_gain=0.5), np.random.default_rng(0)
    for vec in (plain, late, half):
        vec.reset(seed=0)
    first = late.known_steer[:, -1].copy()
    commands = [first, first]
    for _ in range(5):
        action = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
        for vec in (plain, late, half):
            vec.step(action)
        commands.append(plain.sim.steer[:, -1].copy())
        np.testing.assert_array_equal(late.known_steer[:, -1], commands[-1])
        np.testing.assert_array_equal(late.sim.steer[:, -1], commands[-3])
        np.testing.assert_allclose(half.sim.steer[:, -1], 0.5 * commands[-1])
