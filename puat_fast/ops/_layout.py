"""What the ops ask of their tensors, and how they hand them to `_C`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but re-exported without saying so


def check_like(x: Tensor, **others: Tensor) -> None:
    """Raise ValueError, naming the argument, unless all `others` have the shape, dtype and device of `x`."""
    for name, other in others.items():
        for what, expected, got in (
            ("shape", tuple(x.shape), tuple(other.shape)),
            ("dtype", x.dtype, other.dtype),
            ("device", x.device, other.device),
        ):
            if expected != got:
                raise ValueError(f"{name}: expected {what} {expected} (as x), got {got}")


def check_dtype(name: str, tensor: Tensor, *accepted: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has one of the `accepted` dtypes."""
    if tensor.dtype not in accepted:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, accepted))}, got {tensor.dtype}")


def dense_alike(first: Tensor, *others: Tensor) -> bool:
    """True if the tensors, of one shape, fill their memory without gap or overlap and in the same order.

    Element i of the storage is then the same element in each of them: an elementwise kernel needs no strides.
    """
    dims = [d for d, size in enumerate(first.shape) if size != 1]  # elsewhere a stride carries no meaning
    if first.numel() == 0:
        return True
    stride = 1
    for d in sorted(dims, key=first.stride):
        if first.stride(d) != stride:
            return False
        stride *= first.shape[d]
    return all(other.stride(d) == first.stride(d) for other in others for d in dims)


def capsules(*tensors: Tensor) -> list[Any]:
    """DLPack capsules for `_C`. The caller keeps the tensors alive while `_C` reads the capsules."""
    return [to_dlpack(tensor) for tensor in tensors]


def stream_of(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device, as `_C` takes it."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
