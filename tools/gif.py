"""A policy at work as an animated GIF, small enough for a web page.

    python tools/gif.py --policy runs/<run> --output run.gif
    python tools/gif.py --policy feedforward --env-id LateralControl-v0 --speed 6 --output road.gif

It plays the episodes that `--evaluate` plays with the same seed, from the first on, on the published task's test split.
MuJoCo's environments need OpenGL for it: MUJOCO_GL=egl on a machine without a screen.
"""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_envs import make_policy

import envs
from envs import command, rollout, run
from envs.files import UserError


@dataclass
class Args:
    policy: str = "runs/reference/so101"
    """what plays: a policy file, a run (its best.pt) or a scripted controller of the environment"""
    output: str = "episode.gif"
    """the file to write"""
    env_id: str | None = None
    """environment; a policy file knows its own"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the environment, KEY VALUE ..., on top of those that the policy was trained with"""
    episodes: int = 1
    """episodes, one after the other"""
    first: int = 0
    """number of the first of them"""
    eval_seed: int = 901000
    """seed of the episodes"""
    speed: float = 1.0
    """how many times as fast as in reality"""
    fps: float = 12.0
    """most pictures a second; an environment that makes fewer steps a second has fewer"""
    width: int = 400
    """width of the picture, px"""
    colors: int = 64
    """colours of the picture; fewer make a smaller file"""


HOLD = 1000  # ms that the last picture of an episode stays


class Film:
    """Keeps pictures of row 0 at an even pace; called after each step of a rollout.

    Args:
        vec: the vector environment, with render_mode rgb_array.
        speed, fps, width: see Args.
    """

    def __init__(self, vec: Any, speed: float, fps: float, width: int):
        steps_per_second = vec.metadata.get("render_fps", 30) * speed
        self.every = max(1, round(steps_per_second / fps))
        self.duration = 10 * max(2, round(100 * self.every / steps_per_second))  # ms; browsers slow down below 20
        self.vec, self.width, self.steps = vec, width, 0
        self.frames: list[Image.Image] = []
        self.durations: list[int] = []  # ms

    def __call__(self, playing: np.ndarray, reward: np.ndarray, terminated: np.ndarray, done: np.ndarray) -> None:
        if done[0]:  # the row already shows the next episode
            self.steps = 0
            if self.durations:
                self.durations[-1] = HOLD
            return
        if self.steps % self.every == 0:
            image = Image.fromarray(self.vec.render())
            size = (self.width, round(self.width * image.height / image.width))
            self.frames.append(image.resize(size, Image.Resampling.LANCZOS))
            self.durations.append(self.duration)
        self.steps += 1


def encode(frames: list[Image.Image], durations: list[int], colors: int) -> bytes:
    """A GIF that repeats for ever. All frames share one palette and none is dithered, so what stands still is stored
    once.

    Args:
        frames: of one size.
        durations: of each frame, ms.
    """
    some = frames[:: max(1, len(frames) // 8)]
    sheet = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        sheet.paste(frame, (0, i * frame.height))
    palette = sheet.quantize(colors, Image.Quantize.FASTOCTREE)  # others lose what is small: a red ball, blue tape
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def task_of(args: Args) -> tuple[str, dict]:
    """The environment that the policy plays in, and its arguments.

    Raises:
        UserError: there is no such policy or environment, or they do not go together.
    """
    if run.is_policy_path(args.policy):
        policy = run.load_policy(args.policy)
        if args.env_id not in (None, policy["env_id"]):
            raise UserError(f"{args.policy}: a policy for {policy['env_id']}, not {args.env_id}; leave --env-id out")
        return policy["env_id"], {**policy["env_kwargs"], **args.env_kwargs}
    if args.env_id is None:
        raise UserError(f"{args.policy} needs an --env-id, such as SO101Paper-v0; the file of a policy knows its own")
    controller = rollout.scripted(args.policy, envs.make_vec(args.env_id, 1))
    return args.env_id, {**getattr(controller, "env_kwargs", {}), **args.env_kwargs}


def play(args: Args) -> bytes:
    """The GIF of the episodes that args ask for.

    Raises:
        UserError: a setting cannot work, or nothing can be drawn.
    """
    for name, least in (("episodes", 1), ("first", 0), ("width", 16), ("colors", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.colors > 256 or not (args.speed > 0 and args.fps > 0):
        raise UserError("--colors must be at most 256, --speed and --fps above 0")
    command.check_env_kwargs(args.env_kwargs)
    env_id, settings = task_of(args)
    vec = envs.make_vec(env_id, 1, training=False, split="test", render_mode="rgb_array", **settings)
    try:
        film = Film(vec, args.speed, args.fps, args.width)
        rollout.rollout(make_policy(args.policy, vec), vec, args.episodes, args.eval_seed, film, args.first)
    finally:
        vec.close()
    return encode(film.frames, film.durations, args.colors)


@command.command_line()
def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    path = Path(args.output)
    if path.suffix != ".gif" or not path.parent.is_dir():
        raise UserError(f"--output {path}: give a file's name that ends in .gif, in an existing folder")
    content = play(args)
    run.write_whole(path, content)
    print(f"{path}: {len(content) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
