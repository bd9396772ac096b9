"""What the losses among the ops share: the inputs they take, and when their kernels serve."""

from __future__ import annotations

import torch
from torch import Tensor

from puat_fast.ops._layout import check_dtype
from puat_fast.ops._library import INTERPRETED, Impl, takes_reference

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
MAX_CLASSES = 4096  # a kernel holds whole rows in registers


def takes_kernel(impl: Impl, *inputs: Tensor, classes: int = 1) -> bool:
    """Whether the registered op is called, or plain torch under its own autograd.

    Plain torch serves float64, float16, rows too wide for a kernel, and the CPU: the op would run the same, for more.
    """
    if takes_reference(impl) or (inputs[0].device.type == "cpu" and not INTERPRETED):
        return False
    return classes <= MAX_CLASSES and all(t.dtype in KERNEL_DTYPES for t in inputs)


def widened(t: Tensor) -> Tensor:
    """float32 for what is narrower: the losses' arithmetic."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def total(partials: Tensor) -> Tensor:
    """Their sum, 0-d; of a single one, itself: then the loss is one launch."""
    return partials.sum() if len(partials) > 1 else partials.reshape(())


def check_floating(name: str, t: Tensor) -> None:
    """Raise ValueError, naming the argument, for a dtype that the losses do not take."""
    check_dtype(name, t, *KERNEL_DTYPES, torch.float16, torch.float64)


def check_rows(name: str, t: Tensor) -> None:
    """Raise ValueError, naming the argument, unless `t` is floating point N x K, K >= 1."""
    check_floating(name, t)
    if t.dim() != 2 or t.shape[1] == 0:
        raise ValueError(f"{name}: expected shape N x K, K >= 1, got {tuple(t.shape)}")


def check_beside(first_name: str, first: Tensor, name: str, t: Tensor) -> None:
    """Raise ValueError, naming the argument, unless `t` has the shape and device of `first`."""
    for what, expected, got in (
        ("shape", tuple(first.shape), tuple(t.shape)),
        ("device", first.device, t.device),
    ):
        if expected != got:
            raise ValueError(f"{name}: expected {what} {expected} (as {first_name}), got {got}")


def check_labels(logits: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y is int64, one label per row of the logits, on their device. Values are not read."""
    check_dtype("y", y, torch.int64)
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y: expected shape {tuple(logits.shape[:1])} (rows of logits), got {tuple(y.shape)}")
    if y.device != logits.device:
        raise ValueError(f"y: expected device {logits.device} (as logits), got {y.device}")
