"""The command line: flags and where their values come from, what cannot work, signals, one-line errors."""

import functools
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from envs.contents import COUNT, shown
from envs.files import UserError, read_json, require
from envs.run import (
    CONFIG,
    find_checkpoint,
    is_policy_path,
    load_checkpoint,
    load_policy,
    require_same_files,
    run_folder,
)
from envs.signals import Interrupted, signals

# Settings that may differ between a run and its continuation
MAY_CHANGE = ("resume", "total_timesteps", "run_root", "run_name", "config")
# Settings that say where a run came from, where it lies and how it was watched: no later one takes them over
NOT_INHERITED = (
    *("resume", "pretrained", "freeze_normalizer", "evaluate", "config", "run_root", "run_name"),
    *("track", "capture_video", "dry_run"),
)
# Arguments of an environment that are the script's to set
SCRIPT_SETS = ("env_id", "num_envs", "seed", "training", "split", "threads", "render_mode")
# Settings that say how wide a network is, and the widest: beyond it a layer alone takes more than a gigabyte
WIDTHS, WIDEST, MOST_ENVS = ("hidden_sizes", "set_units", "cnn_channels", "rays", "people"), 2**14, 2**20
SOME, MANY = 256, 2048  # environments that --num-envs auto stands for on a CPU and on a GPU
# Settings of --evaluate: how it measures, what else it looks at, and what works with nothing but --evaluate
MEASURE = ("eval_episodes", "eval_seed", "threads")
EVALUATION_ONLY = ("compare_base", "json", "render")
USED_BY_EVALUATE = (
    *MEASURE,
    *EVALUATION_ONLY,
    "evaluate",
    "env_id",
    "env_kwargs",
    "eval_env_kwargs",
    "run_root",
    "capture_video",
)


def command_line(processes: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for main(). SIGINT, SIGTERM and SIGUSR1 raise Interrupted and exit with 130, 143 and 138; a user's
    mistake ends in one line and status 2, numbers that are not finite in one line and status 1.

    processes: whether torchrun may start several of this script.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        # No context manager: a signal that comes when its __exit__ is called would be outside of all that handles it
        @functools.wraps(main)
        def guarded(*args: Any) -> None:
            signals.catch()
            try:
                signals.let()
                if started_together() > 1 and not processes:
                    raise UserError(f"{Path(sys.argv[0]).name} trains in one process; start it without torchrun")
                main(*args)
                signals.let()
            except (UserError, OSError, FloatingPointError) as error:
                signals.held = True  # the program is on its way out
                print(f"\nerror: {error}", file=sys.stderr)
                sys.exit(1 if isinstance(error, FloatingPointError) else 2)
            except Interrupted as interrupted:
                signals.held = True
                print(f"{interrupted}: stopped", file=sys.stderr)
                sys.exit(128 + interrupted.signum)
            except Exception:
                if signals.came is None:  # or else a library made an error of its own out of Interrupted
                    raise
                sys.exit(128 + signals.came)
            finally:
                signals.held = True
                signals.leave()

        return guarded

    return decorate


def started_together() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parse(
    args_class: type, tuned: Callable[..., Any], with_policy: tuple[str, ...] = (), argv: list[str] | None = None
) -> Any:
    """The command line as an Args. What it leaves out comes from the run to resume, the policy to evaluate or the
    --config file, or else from the settings tuned for the chosen task; --help shows the values in force.

    tuned: Args.tuned; its parameters are the settings that choose the row.
    with_policy: settings of this script that also matter when a policy file is evaluated.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = tyro.cli(args_class, args=[arg for arg in argv if arg not in ("-h", "--help")])
    playing, fresh = chosen.evaluate is not None, args_class()
    if playing and started_together() > 1:
        raise UserError("--evaluate plays in one process; start it without torchrun")
    if chosen.resume is not None:
        source, values = chosen.resume, load_checkpoint(find_checkpoint(chosen.resume, say=False))["args"]
        forget = ("config", "run_root", "run_name")
    elif playing and is_policy_path(chosen.evaluate):
        source, values, forget = chosen.evaluate, load_policy(chosen.evaluate)["args"], (*NOT_INHERITED, *MEASURE)
    elif chosen.config is not None:
        source, values, forget = chosen.config, load_config(chosen.config), NOT_INHERITED
    else:
        # A scripted controller plays the task as it is, without the arguments that are tuned for learning
        source, values, forget = "tuned settings", {}, (*NOT_INHERITED, *(["env_kwargs"] if playing else []))
    values = {name: getattr(args_from(args_class, values, source), name) for name in values}
    require_named(values.get("env_id", ""), chosen.env_id, source)
    choice = [name for name, p in inspect.signature(tuned).parameters.items() if p.kind != p.VAR_KEYWORD]
    if playing and not is_policy_path(chosen.evaluate):  # what it does not use is refused below
        choice = [name for name in choice if name in USED_BY_EVALUATE]
    row = tuned(**{name: values.get(name, getattr(chosen, name)) for name in choice})
    values = {**asdict(row), **values}
    forgotten = {name: getattr(row if name in MEASURE else fresh, name) for name in forget}
    defaults = replace(args_from(args_class, values, source), **forgotten)
    # Arguments of the environment add to those that are there already
    kwargs = {name: getattr(defaults, name) for name in ("env_kwargs", "eval_env_kwargs")}
    default = replace(defaults, **{name: {} for name in kwargs})
    args = tyro.cli(args_class, default=default, args=argv, description=sys.modules[args_class.__module__].__doc__)
    args = replace(args, **{name: {**before, **getattr(args, name)} for name, before in kwargs.items()})

    used = USED_BY_EVALUATE + (with_policy if playing and is_policy_path(args.evaluate) else ())
    if args.resume is not None and args.config is not None:
        raise UserError("--resume goes on with the settings of its run; leave --config out")
    if args.resume is not None and args.run_name is None and args.run_root != defaults.run_root:
        raise UserError("--resume stays in its directory; to go on in another --run-root, give a --run-name too")
    for name in changed(args, defaults):
        flag = f"--{name.replace('_', '-')}"
        if playing and name not in used:
            raise UserError(f"{flag} has no effect on --evaluate {args.evaluate}; leave it out")
        if not playing and name in EVALUATION_ONLY:
            raise UserError(f"{flag} works only with --evaluate")
        if name == "init_log_std" and args.pretrained is not None and getattr(args, "final_log_std", None) is None:
            raise UserError("--pretrained brings its own log-std; to set another, give --final-log-std as well")
    return args


def require_named(env_id: str, given: str | None, source: str) -> None:
    """Raises UserError if a file asks for an environment of a module, which would run it, and the user did not."""
    module = env_id.rpartition(":")[0]
    if module and env_id != given and module not in sys.modules:
        asks = f"{source}: its environment {env_id} would run the module {module}, which no file may ask for"
        raise UserError(f"{asks}; if you trust it, give --env-id {env_id}, or import it first")


def changed(args: Any, other: Any) -> list[str]:
    """Names of the fields in which two Args differ."""
    return [field.name for field in fields(args) if getattr(args, field.name) != getattr(other, field.name)]


def checked(args: Any) -> Any:
    """What all training scripts ask of their settings. Returns them, without auto, cut short for a dry run.

    Raises:
        UserError: a value that cannot work, or a package that is missing.
    """

    def refuse(wrong: bool, name: str, must: str) -> None:
        if wrong:
            raise UserError(f"--{name.replace('_', '-')} must be {must}, not {getattr(args, name)}")

    if args.num_envs == "auto":
        args = replace(args, num_envs=MANY if args.device != "cpu" and torch.cuda.is_available() else SOME)
    if args.dry_run:
        step = steps_per_rollout(args)
        args = replace(args, total_timesteps=step, checkpoint_every=step, eval_episodes=2)
    for name in ("num_envs", "num_steps", "update_epochs", "threads", "hidden_sizes", "group_size"):
        refuse(np.min(getattr(args, name), initial=1) < 1, name, "at least 1")
    refuse(args.num_envs > MOST_ENVS, "num_envs", f"at most {MOST_ENVS}")
    for field in fields(args):
        value = getattr(args, field.name)
        refuse(no_width(field.name, value), field.name, f"from 1 to {WIDEST}")
        refuse(isinstance(value, float) and not np.isfinite(value), field.name, "a finite number")
    for name in (
        "eval_every",
        "eval_first",
        "eval_episodes",
        "checkpoint_every",
        "critic_warmup",
        "seed",
        "eval_seed",
        "ent_coef",
        "vf_coef",
    ):
        refuse(getattr(args, name) < 0, name, "0 or more")
    for name in ("learning_rate", "clip_coef", "max_grad_norm", "target_kl"):
        refuse(getattr(args, name) is not None and getattr(args, name) <= 0, name, "above 0")
    for name in ("seed", "eval_seed"):  # numpy takes a larger one as two, and streams would coincide
        refuse(getattr(args, name) >= 2**32, name, "below 2**32")
    refuse(args.weight_decay < 0, "weight_decay", "0 or more")
    for name in ("gamma", "gae_lambda"):
        refuse(not 0 <= getattr(args, name) <= 1, name, "between 0 and 1")
    batch = args.num_envs * args.num_steps
    divides = args.minibatch_size >= 2 and batch % args.minibatch_size == 0
    refuse(not divides, "minibatch_size", f"at least 2 and divide num_envs * num_steps = {batch}")
    refuse(args.num_envs % args.group_size != 0, "group_size", f"a divisor of --num-envs {args.num_envs}")
    least = steps_per_rollout(args)
    refuse(args.total_timesteps < least, "total_timesteps", f"at least one rollout, {least} steps")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu, or install PyTorch with CUDA")
    check_env_kwargs(args.env_kwargs, args.eval_env_kwargs)
    if args.freeze_normalizer and not (args.norm_obs and args.pretrained is not None):
        raise UserError("--freeze-normalizer keeps what --norm-obs and --pretrained bring; leave it out without them")
    if args.render is not None and args.capture_video:
        raise UserError("--render human and --capture-video exclude each other; leave one out")
    require_extras({"--track": args.track, "--capture-video": args.capture_video})
    return args


PACKAGE_OF = {"--track": ("wandb", "track"), "--capture-video": ("moviepy", "video"), "--video": ("moviepy", "video")}


def require_extras(given: dict[str, bool]) -> None:
    """{flag: whether it is given}. Raises UserError if one is whose package is missing."""
    for flag, is_given in given.items():
        package, extra = PACKAGE_OF[flag]
        if is_given and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs {package}: pip install -e '.[{extra}]'")


def steps_per_rollout(args: Any) -> int:
    """Environment steps between two updates, over all environments; an action repeat makes several with one action."""
    repeat = args.env_kwargs.get("action_repeat", 1)
    return args.num_envs * args.num_steps * (max(repeat, 1) if isinstance(repeat, int) else 1)


def check_env_kwargs(*dicts: dict) -> None:
    """Raises UserError for an argument of the environment that is the script's to set."""
    for name in SCRIPT_SETS:
        if any(name in kwargs for kwargs in dicts):
            raise UserError(f"{name} is not for --env-kwargs: the script sets it; leave it out")


def args_from(args_class: type, values: dict, source: str) -> Any:
    """An Args from a dict read from `source`.

    Raises:
        UserError: a name that Args does not have, or a value of another type.
    """
    types_of = {field.name: field.type for field in fields(args_class)}
    for name, value in values.items():
        if name not in types_of:
            raise UserError(f"{source}: unknown setting {shown(name)}; --help lists the settings")
        if isinstance(value, list):
            value = tuple(value)  # JSON knows no tuples
        if not fits(value, types_of[name]):
            raise UserError(f"{source}: {name} cannot be {shown(value)}; --help says what it takes")
        if no_width(name, value):
            raise UserError(
                f"{source}: {name} must be from 1 to {WIDEST}, not {shown(value)}; --help says what it takes"
            )
        values = {**values, name: value}
    return args_class(**values)


def no_width(name: str, value: Any) -> bool:
    """Whether a setting asks for a network of a width that none can have."""
    return (
        name in WIDTHS and value is not None and not 1 <= np.min(value, initial=1) <= np.max(value, initial=1) <= WIDEST
    )


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the annotated type; an int will do where a float is meant."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if isinstance(value, bool):  # which to Python is an int
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def load_config(path: str) -> dict:
    """The settings in a JSON file: a run's config.json, or one written by hand such as {"learning_rate": 0.001}."""
    content = read_json(Path(path))
    settings = content.get("args", content)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold one JSON object of settings, such as {{'learning_rate': 0.001}}")
    return settings


def load_to_resume(args: Any, last_step: int, kind: str) -> dict | None:
    """The checkpoint that args.resume names, or None without one; args must continue its run, up to last_step.

    Raises:
        UserError: args differ in more than the total and the place, or the run is complete.
    """
    if last_step < args.total_timesteps:
        rollout = f"whole rollouts of {steps_per_rollout(args):,}"
        print(f"{last_step:,} of {args.total_timesteps:,} steps: {rollout}", file=sys.stderr)
    if args.resume is None:
        return None
    checkpoint = load_checkpoint(find_checkpoint(args.resume), kind)
    before = args_from(type(args), checkpoint["args"], args.resume)
    for name in changed(args, before):
        if name not in MAY_CHANGE:
            was = f"--{name.replace('_', '-')} was {getattr(before, name)!r} in {args.resume} and cannot change"
            raise UserError(f"{was}; --pretrained starts a new run from a policy")
    folder = run_folder(args.resume)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{args.resume}: no run directory (it has no config.json); --pretrained starts from a lone file"
        )
    # a run may have been stopped after its last step, before all its files were written
    require(read_json(folder / "config.json"), CONFIG, folder / "config.json", "restore it")
    summary = folder / "summary.json"
    end = read_json(summary) if summary.exists() else {}
    require(end, {"steps?": COUNT}, summary, "restore it, or remove it")
    last = [last_step, *([end.get("steps")] if args.total_timesteps <= before.total_timesteps else [])]
    if checkpoint["step"] > last_step or (end.get("status") == "completed" and checkpoint["step"] in last):
        done = f"{args.resume} is complete at {checkpoint['step']:,} steps"
        raise UserError(f"{done}; give a larger --total-timesteps to go on")
    require_same_files(args.resume, before.env_kwargs)
    return checkpoint
