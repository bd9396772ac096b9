"""Several processes as one run: torchrun starts them, each has a device and its part of every batch.

All ranks call these functions in the same order. In a run of one process they do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
# The others wait while rank 0 validates, for longer than the ten minutes that torch allows. A process that ends is
# noticed at once.
TIMEOUT = timedelta(days=1)


class RankError(RuntimeError):
    """Another process of the run failed or ended; its own message says why."""


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are one run. device: of the configuration. One alone stays alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    # On GPUs NCCL averages gradients; what the host waits for (losses, signals, rank 0) goes over gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is, from 0: the number of its GPU."""
    return dist.get_node_local_rank()


def is_main() -> bool:
    """Whether this is rank 0: the one that validates, writes and prints."""
    return rank() == 0


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors of one dtype by their means over all ranks, bitwise the same everywhere: one all-reduce."""
    if world_size() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _call(dist.all_reduce, flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def all_reduce_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of one network by their means over all ranks; parameters without one are skipped."""
    average_(param.grad for param in params if param.grad is not None)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    _call(dist.all_reduce, flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank; tensors in them are on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _call(dist.all_gather_object, values, value)
    return values


def on_main(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0; the others wait for it. Where it raises, they raise RankError."""
    if world_size() == 1:
        return action()
    done: list[Any] = [False, None]
    try:
        if is_main():
            done = [True, action()]
    finally:  # also where it failed: nobody is left waiting
        _call(dist.broadcast_object_list, done)
    if not done[0]:
        raise RankError("rank 0 failed, its message says why")
    return done[1]


def _call(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:  # gloo: the connection to a process is lost
        raise RankError("another process of this run has ended, its message says why") from error
