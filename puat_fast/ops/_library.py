"""The torch.library namespace `puat_fast`, how one op comes into it, and which implementation a call takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Impl = Literal["auto", "reference"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter is on: its kernels then run on CPU tensors, slowly. For tests."""

_LIBRARY = torch.library.Library("puat_fast", "FRAGMENT")
_reference_only = False


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


def register_triton(
    schema: str, *, reference: Callable[..., Any], triton: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """`register` an op whose GPU kernel is Triton's and whose plain-torch reference serves the CPU.

    Where Triton's interpreter is on, CPU tensors take the Triton kernel too, so that the same tests hold it. `triton`
    imports puat_fast.kernels when it is called: a CPU-only machine needs no Triton.
    """

    def launch(first: torch.Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return triton(first, *others)

    register(schema, cpu=launch if INTERPRETED else reference, cuda=launch, fake=fake)


def takes_reference(impl: Impl) -> bool:
    """Whether a call with this `impl` goes to plain torch. Raises ValueError for an unknown `impl`."""
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl: expected 'auto' or 'reference', got {impl!r}")
    return impl == "reference" or _reference_only


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, every op of puat_fast.ops runs as its plain-torch reference: to hold one against the other."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before
