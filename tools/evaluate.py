"""Evaluate a policy on the published task.

    python tools/evaluate.py runs/<run>                                    best.pt of a run on 100 test episodes
    python tools/evaluate.py runs/<run> --compare-base                     a residual policy and its base policy
    python tools/evaluate.py runs/<run>/policy.onnx --json result.json     also of a residual run: the base is added
    python tools/evaluate.py pid --env-id LateralControl-v0                a scripted controller
    python tools/evaluate.py runs/<run> --episodes 1 --video episode.gif   a video of the first episode (.mp4 or .gif)
    python tools/evaluate.py pursuit --env-id SocNavGrid-v0 --split train --snqi-baseline snqi.json

Episode i of a seed begins in the same way for every policy, so policies can be compared episode by episode.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError, evaluation, make_vec
from envs.cli import one_line_errors
from envs.evaluation import Policy, describe, evaluate
from envs.run import BaseArgs, EnvKwargs, check_args, write_json
from envs.socnav import metrics


@dataclass
class Args:
    policy: tyro.conf.Positional[str]  # run directory (its best.pt), .pt or .onnx file, or scripted controller
    env_id: str | None = None  # environment; a policy file names its own
    env_kwargs: EnvKwargs = field(default_factory=dict)  # keyword arguments for the environment, added to the policy's
    episodes: int = 100  # number of episodes; 0 = every episode of a finite split
    seed: int = 1  # seed of the episodes
    split: Literal["train", "validation", "test"] = "test"  # split that the episodes come from
    compare_base: bool = False  # also evaluate the base policy of a residual policy, on the same episodes
    json: str | None = None  # write the result to this file
    snqi_baseline: str | None = None  # SocNavGrid-v0: write medians and 95th percentiles of the SNQI here
    video: str | None = None  # record the first episode in this file, .mp4 or .gif
    render: Literal["human"] | None = None  # show the episodes in a window
    threads: int | None = None  # CPU threads of the bundled simulators; None = one per core with MuJoCo, else one


def check(args: Args) -> None:
    """Raises UserError for a setting that cannot work, before anything is evaluated."""
    if args.episodes < 0:
        raise UserError(f"--episodes must be 0 or more, not {args.episodes}")
    for file in filter(None, (args.json, args.snqi_baseline)):
        if Path(file).is_dir() or not Path(file).parent.is_dir():
            raise UserError(f"{file}: no file can be written there; give a file name in an existing folder")
    if args.video and (args.render or Path(args.video).suffix not in (".mp4", ".gif")):
        raise UserError(f"--video {args.video}: must end in .mp4 or .gif, and excludes --render")
    if (args.video or "").endswith(".mp4") and find_spec("imageio_ffmpeg") is None:
        raise UserError("--video FILE.mp4 needs imageio-ffmpeg: pip install -e '.[video]'")


def load(args: Args) -> tuple[Policy, BaseArgs]:
    """The policy, and the environment and episodes to evaluate it in. Raises UserError if they do not fit."""
    check_args(BaseArgs(env_kwargs=args.env_kwargs, seed=args.seed, threads=args.threads))
    policy, env_id, env_kwargs, _ = evaluation.resolve_policy(args.policy, args.env_id, args.env_kwargs, args.split)
    rendering = {"render_mode": "rgb_array"} if args.video else {}
    envs = make_vec(env_id, 1, args.seed, training=False, split=args.split, **env_kwargs, **rendering)
    if args.video and envs.render() is None:
        raise UserError(f"--video: {env_id} does not render images")
    envs.close()
    task = BaseArgs(env_id=env_id, env_kwargs=env_kwargs, seed=args.seed, threads=args.threads)
    return policy, replace(task, eval_episodes=args.episodes or envs.num_episodes or 0, eval_seed=args.seed)


def progress(total: int) -> Callable[[int, dict], None]:
    """Shows the number of finished episodes on a terminal, at most twice a second."""
    finished, shown_at = 0, time.monotonic()

    def on_episode(index: int, result: dict) -> None:
        nonlocal finished, shown_at
        finished += 1
        if sys.stderr.isatty() and (finished == total or time.monotonic() > shown_at + 0.5):
            clear_line = "\r\033[K" if finished == total else ""
            print(f"\r{finished}/{total} episodes", end=clear_line, file=sys.stderr, flush=True)
            shown_at = time.monotonic()

    return on_episode


def run(args: Args) -> dict:
    """Evaluate a policy. Returns the contents of --json."""
    check(args)
    torch.set_num_threads(1)  # faster for small networks
    policy, task = load(args)
    if args.snqi_baseline and task.env_id != "SocNavGrid-v0":
        raise UserError(f"--snqi-baseline is for SocNavGrid-v0, not {task.env_id}")
    if args.compare_base and not hasattr(policy, "base_policy"):
        raise UserError(f"--compare-base: {args.policy} is not a residual policy; leave it out")
    file = Path(args.policy) / "best.pt" if Path(args.policy).is_dir() else Path(args.policy)
    result = {"policy": args.policy, **({"sha256": evaluation.sha256(file)} if file.is_file() else {})}
    video = Path(args.video) if args.video else None
    result |= evaluate(policy, task, args.split, video, args.render, progress(task.eval_episodes))
    if args.compare_base:
        result["base"] = evaluate(policy.base_policy, task, args.split, on_episode=progress(task.eval_episodes))
        result["gain"] = evaluation.paired_gain(result, result["base"])
    return result


def report(result: dict) -> None:
    print(f"{result['policy']}: {describe(result)}")
    for name, row in result.get("per_scenario", {}).items():
        rates = f"success {row['success_rate']:.3f}, failure {row['failure_rate']:.3f}"
        print(f"  {name:45} {row['episodes']:4} episodes, {rates}")
    if "base" in result:
        gain, low, high = (result["gain"][name] for name in ("gain", "low", "high"))
        interval = "" if low is None else f", 95 % interval {low:+.3f} to {high:+.3f}"
        print(f"base policy: {describe(result['base'])}")
        print(f"paired gain in {result['gain']['of']}: {gain:+.3f}{interval}")


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        result = run(args)
        if args.json:  # before the report, which fails if it is piped into head
            write_json(Path(args.json), result)
        if args.snqi_baseline:
            weights = metrics.load_snqi(result["env_kwargs"].get("snqi"))["weights"]
            write_json(Path(args.snqi_baseline), metrics.snqi_baseline(result["per_episode"], weights))
        report(result)


if __name__ == "__main__":
    main()
