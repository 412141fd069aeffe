"""Data-parallel training with torchrun. Every rank calls the same functions in the same order. Without torchrun there
is one rank, and they do nothing."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from envs import UserError
from envs.run import StopSignal, read_checkpoint, set_rng_state


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process. Rank 0 evaluates and writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def init_process_group(args: Any) -> None:
    """Join the other ranks if torchrun started this process. WORLD_SIZE alone, as some clusters set it, is ignored.

    Raises:
        UserError: the environments or minibatches cannot be divided among the ranks.
    """
    if not dist.is_torchelastic_launched():
        return
    size = int(os.environ["WORLD_SIZE"])
    for name, minimum in {"num_envs": 1, "minibatch_size": 2}.items():
        value = getattr(args, name)
        if value % size or value // size < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value} cannot be divided among {size} processes")
    use_gpu = args.device != "cpu" and torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if size > 1 and not dist.is_initialized():
        run(dist.init_process_group, "cpu:gloo,cuda:nccl" if use_gpu else "gloo")


def local_args(args: Any) -> Any:
    """The settings with this rank's number of environments and minibatch size."""
    return replace(args, num_envs=args.num_envs // world_size(), minibatch_size=args.minibatch_size // world_size())


def local_seeds(args: Any) -> list[list[int]]:
    """Seeds of this rank's environments: the same as if all environments were in one process."""
    count = args.num_envs // world_size()
    return [[args.seed, i] for i in range(rank() * count, (rank() + 1) * count)]


def seed_rank(seed: int) -> None:
    """Give every rank above 0 its own random numbers."""
    if rank() > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]))


def same_checkpoint(args: Any) -> Any:
    """Let all ranks resume from the checkpoint that rank 0 finds."""
    if not args.resume or world_size() == 1:
        return args
    return replace(args, resume=broadcast_from_rank0(lambda: read_checkpoint(args.resume)["file"]))


def restore_local(checkpoint: dict) -> dict:
    """Restore the random generators of this rank. Returns the state of its environments.

    Raises:
        UserError: another number of ranks saved the checkpoint.
    """
    states = [checkpoint, *checkpoint["other_ranks"]]
    if len(states) != world_size():
        advice = f"start {len(states)} with torchrun"
        raise UserError(f"--resume: {len(states)} processes trained it, not {world_size()}; {advice}")
    set_rng_state(states[rank()]["rng"])
    return states[rank()]["envs"]


def broadcast_from_rank0(function: Callable, *args: Any) -> Any:
    """Call a function on rank 0 and return its result on all ranks."""
    result = [function(*args) if rank() == 0 else None]
    if world_size() > 1:
        run(dist.broadcast_object_list, result)
    return result[0]


def all_gather_object(x: Any) -> list:
    """The objects of all ranks, in the order of the ranks. CUDA tensors arrive on the CPU."""
    objects = [x] * world_size()
    if world_size() > 1:
        run(dist.all_gather_object, objects, to_cpu(x))
    return objects


def to_cpu(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: to_cpu(value) for name, value in x.items()}
    if isinstance(x, list):
        return [to_cpu(value) for value in x]
    return x.cpu() if isinstance(x, Tensor) else x


def all_gather(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the tensors of all ranks, which have the same shape."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    run(dist.all_gather, parts, x.contiguous())
    return torch.cat(parts, dim)


def local_shard(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's part of what all_gather concatenated."""
    return x.chunk(world_size(), dim)[rank()]


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over the ranks, equal to the last bit on all of them. For small vectors gloo's all_reduce takes three times
    as long as all_gather."""
    return all_gather(x[None]).mean(0)


def run(collective: Callable, *args: Any) -> None:
    """Raises UserError if another rank has ended."""
    try:
        collective(*args)
    except RuntimeError as error:
        raise UserError(f"another process of this run has ended ({error}); continue with --resume") from error


class NullRun(StopSignal):
    """The run of a rank above 0, which writes nothing."""

    latest_due = converged = False

    def save(self, *args: Any) -> None: ...

    def log(self, *args: Any) -> None: ...

    def evaluate(self, *args: Any) -> dict: ...

    def is_best(self, *args: Any) -> bool: ...

    def interrupted(self, checkpoint: dict) -> dict:
        return {"status": "interrupted", "signal": int(self.signum or signal.SIGTERM)}

    def finish(self, *args: Any) -> dict:
        return {"status": "completed"}
