"""Several processes that train one policy, as torchrun starts them: who they are, and what they tell each other.

Each of them, a rank, calls the same functions in the same order. A process alone may call them too: it is rank 0 of 1.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from envs.command import started_together
from envs.files import UserError
from envs.run import checkpoints_in, run_folder
from envs.signals import Interrupted, signals


def count() -> int:
    """How many processes have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 evaluates and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(args: Any) -> Any:
    """Meet the others, if there are any. Returns the settings, which say --resume if torchrun has started the processes
    again because one had ended.

    Raises:
        UserError: settings that several processes cannot work with.
    """
    together = started_together()
    for name, least in {"num_envs": 1, "minibatch_size": 2}.items():
        value = getattr(args, name)
        if value % together or value // together < least:
            raise UserError(f"--{name.replace('_', '-')} must give each of {together} processes as much, not {value}")
    if args.num_envs // together % args.group_size:
        raise UserError(f"--group-size {args.group_size} must divide the environments of each of {together} processes")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and args.run_name is None and args.resume is None:
        raise UserError("--max-restarts needs a --run-name, by which a process that starts again finds its run")
    if together > 1 and not dist.is_initialized():
        meet(gpu=args.device != "cpu" and torch.cuda.is_available())
    # A node whose own process went on until another's ended does not count that as an attempt: ask them all
    attempts = gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return once(continued, args) if any(attempts) else args


def meet(gpu: bool) -> None:
    """Begin torch.distributed: tensors on GPUs go through nccl, those on the CPU and what is no tensor through gloo.

    Raises:
        UserError: processes on several machines could not meet a second time.
    """
    torchrun = os.environ
    store, number, together = next(dist.rendezvous("env://"))
    if torchrun.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store still holds the addresses of processes that have ended. On one machine the number of the
        # attempt keeps them apart; several machines may count differently.
        if torchrun["LOCAL_WORLD_SIZE"] != torchrun["WORLD_SIZE"] and torchrun["TORCHELASTIC_MAX_RESTARTS"] != "0":
            raise UserError(
                "--max-restarts on several nodes: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each first"
            )
        store = dist.PrefixStore(torchrun["TORCHELASTIC_RESTART_COUNT"], store)
    if gpu:
        torch.cuda.set_device(int(torchrun["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is to be saved yet, and the call may wait for long
    exchange(partial(dist.init_process_group, backend, store=store, rank=number, world_size=together))
    signal.signal(signal.SIGTERM, before)


def continued(args: Any) -> Any:
    """The settings with which to go on where the run's directory ends, or to begin, if it holds nothing yet."""
    folder = Path(args.run_root) / args.run_name if args.run_name is not None else run_folder(args.resume)
    if checkpoints_in(folder):
        return replace(args, resume=str(folder))
    if folder.exists():  # nothing to go on from: out of the way, not deleted
        folder.rename(f"{folder}.{datetime.now():%Y%m%d-%H%M%S}")
    return args


def own_part(args: Any) -> Any:
    """The settings with this process's number of environments and of samples in a minibatch."""
    return replace(args, num_envs=args.num_envs // count(), minibatch_size=args.minibatch_size // count())


def seeds(args: Any) -> list[list[int]]:
    """Of this process's environments: those that they would have if all were in one process."""
    share = args.num_envs // count()
    return [[args.seed, i] for i in range(rank() * share, (rank() + 1) * share)]


def draw_apart(seed: int) -> None:
    """From here on each process draws its own random numbers; rank 0 those of a process alone."""
    if rank() > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]))


def own_state(checkpoint: dict, source: str) -> dict:
    """This process's environments and random generators in a checkpoint.

    Raises:
        UserError: another number of processes wrote it.
    """
    states = [checkpoint, *checkpoint.get("other_ranks", [])]
    if len(states) != count():
        advice = f"start {len(states)} with torchrun, or begin a new run with --pretrained"
        raise UserError(f"{source}: {len(states)} processes trained it, not {count()}; {advice}")
    return states[rank()]


def once(function: Callable, *args: Any) -> Any:
    """Rank 0 calls the function, and all get what it returns."""
    result = [function(*args) if rank() == 0 else None]
    if count() > 1:
        exchange(dist.broadcast_object_list, result)
    return result[0]


def gather(x: Any) -> list:
    """What each process has, in the order of ranks."""
    everything = [x] * count()
    if count() > 1:
        exchange(dist.all_gather_object, everything, on_cpu(x))
    return everything


def on_cpu(x: Any) -> Any:
    """The same without a GPU's tensors, which another process could only take in on that GPU."""
    if isinstance(x, dict):
        return {name: on_cpu(value) for name, value in x.items()}
    if isinstance(x, list):
        return [on_cpu(value) for value in x]
    return x.cpu() if isinstance(x, Tensor) else x


def joined(x: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes, which have one shape, side by side."""
    parts = [torch.empty_like(x) for _ in range(count())]
    if count() > 1:
        exchange(dist.all_gather, parts, x.contiguous())
    return torch.cat(parts, dim) if count() > 1 else x


def own(x: Tensor, dim: int = 0) -> Tensor:
    """This process's part of what `joined` has put side by side."""
    return x.chunk(count(), dim)[rank()]


def mean(x: Tensor) -> Tensor:
    """The mean over the processes, the same to the last bit in all of them. With the small vectors of these networks
    what counts is how often processes wait for each other: gloo's all_reduce takes three times as long."""
    return joined(x[None]).mean(0)


def exchange(collective: Callable, *args: Any) -> None:
    """Raises Interrupted if another process has gone: what this one still has is saved as if a signal had come, which
    torchrun is about to send."""
    try:
        collective(*args)
    except RuntimeError as error:
        print(f"\nanother process of this run has ended: {str(error).splitlines()[0]}", file=sys.stderr)
        signals.came = signals.came or signal.SIGTERM  # the one that follows is this same one
        raise Interrupted(signals.came) from error


class Unwritten:
    """What Run is to the script, in the processes that write nothing."""

    snapshot: dict | None = None

    def __enter__(self) -> "Unwritten":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def save(self, name: str, content: dict) -> None:
        pass

    save_policy = save

    def look(self, step: int, evaluation: dict) -> None:
        pass

    def log(self, *told: Any) -> None:
        pass

    def video(self, step: int) -> Path | None:
        return None
