"""The command line of the scripts and tools: presets, --config, --resume, and errors in one line."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Annotated, Any

import tyro

from envs import UserError
from envs.evaluation import NonFiniteError, check_env_module, read_json
from envs.run import read_checkpoint

# Settings of a file that a later run does not take over
NOT_INHERITED = ("resume", "config", "run_root", "run_name", "track", "capture_video", "dry_run")


def parse_steps(strings: list[str]) -> int:
    """1000000 or 1e6. Raises ValueError for a number with a fraction."""
    if not float(strings[0]).is_integer():
        raise ValueError(f"invalid number of steps: {strings[0]}")
    return int(strings[0]) if strings[0].isdigit() else int(float(strings[0]))


# A number of environment steps, which may be written as 1e6
Steps = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=parse_steps,
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda x: [str(x)],
    ),
]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line and status 2 for a UserError, 1 for NaN or infinity and 130 for Ctrl-C. All other exceptions
    keep their traceback; ROBOT_PPO_TRACEBACK=1 shows it for all."""
    try:
        yield
    except (UserError, NonFiniteError, KeyboardInterrupt) as error:
        if os.environ.get("ROBOT_PPO_TRACEBACK"):
            traceback.print_exc()
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(f"error: {error}".split())
        print(f"\n{message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1 if isinstance(error, NonFiniteError) else 130)


def parse(args_class: type, argv: list[str] | None = None, prog: str | None = None) -> Any:
    """The settings of the command line. A flag wins over --config or --resume, which win over the preset of the task
    or --preset, which wins over the defaults. --help shows the values in force."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = [f.name for f in fields(args_class)]
    for name in {"config", "resume", "preset", "env_id", args_class.preset_key}:
        if name in names:
            first.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    chosen = {name: x for name, x in vars(first.parse_known_args(argv)[0]).items() if x is not None}
    config, resume, preset = (chosen.pop(name, None) for name in ("config", "resume", "preset"))
    if config and resume:
        raise UserError("--resume continues with the settings of its run; leave --config out")

    values, source = {}, config or resume
    if resume:
        values = read_checkpoint(resume, quiet=True)["args"]
    elif config:
        content = read_json(config)
        values = content.get("args", content)
        if not isinstance(values, dict):
            raise UserError(f"{config}: args must be an object of settings, not {values!r}")
    if source:
        values = {name: x for name, x in values.items() if name not in NOT_INHERITED}
        values = args_class.check_values(values, source)
        check_env_module(values.get("env_id", ""), chosen.get("env_id"), source)
        preset = preset or values.get("preset")
    default = args_class.from_preset(preset, **(values | chosen))

    description = sys.modules[args_class.__module__].__doc__
    args = tyro.cli(args_class, prog=prog, default=default, args=argv, description=description)
    # Environment arguments add to those of the preset or file
    added = {name: getattr(default, name) | getattr(args, name) for name in ("env_kwargs", "eval_env_kwargs")}
    return replace(args, **added)


def main(train: Callable[[Any], dict], args_class: type) -> None:
    """Parse the command line and train. Exits with 128 + signal after an interruption."""
    with one_line_errors():
        summary = train(parse(args_class))
        if "signal" in summary:
            sys.exit(128 + summary["signal"])
