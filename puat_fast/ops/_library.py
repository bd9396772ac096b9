"""The torch.library namespace `puat_fast`, and how one op comes into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("puat_fast", "FRAGMENT")


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the op of `schema` ("name(Tensor x) -> Tensor"), callable as torch.ops.puat_fast.name from then on.

    Args:
        schema: the op's name and signature; an argument that is written to is marked Tensor(a!).
        cpu: the kernel for CPU tensors.
        cuda: the kernel for CUDA tensors; it runs on the current stream and does not wait.
        fake: returns what the kernel returns, same shape, strides and dtype, without data.

    Autograd is not registered: a differentiable op is an autograd.Function over two of these.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"puat_fast::{name}", fake, lib=_LIBRARY)
