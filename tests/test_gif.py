"""tools/gif.py: which moments are shown, for how long, and what a GIF keeps of them."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import envs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gif  # noqa: E402
from gif import HOLD, Args, Film, encode, play  # noqa: E402

SCRIPT = gif


class Counter:
    """Draws how often it was asked to."""

    def __init__(self, fps):
        self.metadata, self.drawn = {"render_fps": fps}, 0

    def render(self):
        self.drawn += 1
        return np.full((30, 40, 3), self.drawn, np.uint8)


@pytest.mark.parametrize(
    ("steps_per_second", "speed", "fps", "every", "duration"),
    [(125, 1, 12, 10, 80), (30, 0.5, 12, 1, 70), (10, 6, 12, 5, 80), (10, 1, 12, 1, 100), (500, 1, 500, 1, 20)],
)
def test_the_pace(steps_per_second, speed, fps, every, duration):
    film = Film(Counter(steps_per_second), speed, fps, 40)
    for _ in range(2 * every + 1):
        film(None, None, None, np.array([False]))
    assert len(film.frames) == 3
    assert film.durations == [duration] * 3


def test_what_a_row_shows_after_an_episode_is_not_part_of_it():
    film = Film(Counter(30), 1, 10, 20)  # every third step
    for _ in range(2):
        for done in (False, False, False, False, True):
            film(None, None, None, np.array([done]))
    assert [frame.getpixel((0, 0))[0] for frame in film.frames] == [1, 2, 3, 4]
    assert film.vec.drawn == 4
    assert film.durations == [100, HOLD, 100, HOLD]
    assert film.frames[0].size == (20, 15)


def test_what_is_rare_keeps_its_colour():
    """A small red square that moves over many shades of green and grey."""
    ground = np.random.default_rng(0).integers(60, 180, (64, 64, 1)) + np.array([-20, 20, 0])
    frames = []
    for i in range(10):
        picture = ground.astype(np.uint8)
        picture[i : i + 4, i : i + 4] = (230, 40, 30)
        frames.append(Image.fromarray(picture))
    with Image.open(io.BytesIO(encode(frames, [50] * 10, 32))) as image:
        shown = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)]
    assert len(shown) == 10
    for i, picture in enumerate(shown):
        assert np.abs(picture[i + 1, i + 1] - (230, 40, 30)).max() < 30
        assert np.abs(picture[40:, 40:] - ground[40:, 40:]).max() < 40


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The second and third episode of the test split, by pid."""
    path = tmp_path_factory.mktemp("gif") / "road.gif"
    args = Args(policy="pid", env_id="LateralControl-v0", first=1, episodes=2, speed=20, width=360, output=str(path))
    path.write_bytes(play(args))
    return path


def last_picture(episode):
    """The chart of an episode when it was last drawn, after 392 of its 400 steps, small."""
    policy = envs.make_vec("LateralControl-v0", 1).controllers["pid"]()
    settings = {"training": False, "split": "test", "render_mode": "rgb_array", **policy.env_kwargs}
    vec = envs.make_vec("LateralControl-v0", 1, **settings)
    obs, _ = vec.reset(seed=[[901000, episode]])
    policy.reset(np.arange(1), vec)
    for _ in range(392):
        obs, *_ = vec.step(policy(obs))
    return np.asarray(Image.fromarray(vec.render()).resize((360, 240), Image.Resampling.LANCZOS), int)


def test_the_episodes_are_those_of_an_evaluation(road):
    with Image.open(road) as image:
        frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)]
    assert len(frames) == 2 * 24
    for frame, episode, other in ((frames[23], 1, 2), (frames[47], 2, 1)):
        assert np.abs(frame - last_picture(episode)).mean() < 2
        assert np.abs(frame - last_picture(other)).mean() > 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--policy pid", "needs an --env-id"),
        ("--policy nobody --env-id LateralControl-v0", "unknown policy 'nobody'"),
        (f"--policy {ROOT}/runs/reference/lateral --env-id Ballbot-v0", "not Ballbot-v0; leave --env-id out"),
        ("--policy missing.pt", "missing.pt: no such file"),
        ("--output missing/x.gif", "in an existing folder"),
        ("--output x.mp4", "ends in .gif"),
        ("--episodes 0", "--episodes must be at least 1"),
        ("--colors 257", "--colors must be at most 256"),
        ("--speed 0", "--speed and --fps above 0"),
        ("--fps nan", "--speed and --fps above 0"),
        ("--policy zero --env-id LateralControl-v0 --env-kwargs split train", "split is not for --env-kwargs"),
    ],
)
def test_mistakes(refused, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(line, message)


def test_the_command_says_how_large_the_file_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "gif.py --policy zero --env-id LateralControl-v0 --speed 100 --width 100 --output x.gif"
    monkeypatch.setattr(sys, "argv", line.split())
    gif.main()
    size = Path("x.gif").stat().st_size
    assert capsys.readouterr().out == f"x.gif: {size / 1000:.0f} kB\n"
