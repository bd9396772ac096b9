"""What bench_ops.py measures: a module per op, named as the op, with `cases(size, device)` giving its Cases.

size: "tiny" (one or two small cases, to prove that it runs), "cpu" or "gpu" (the shapes of training, which are the
target, and a ragged one). A module whose op has no kernel of its own on the CPU says why in `NO_CPU_KERNEL`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Size = Literal["tiny", "cpu", "gpu"]
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One op on one input.

    `reference` and `ours` take `inputs` and give a tensor or a tuple of them. With `grad_of`, the positions of the
    inputs whose gradients are wanted, the case is measured as forward + backward, for a fixed gradient of the result.
    """

    op: str
    what: str  # "forward", "forward+backward", or what else tells two cases of an op apart
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    bytes_moved: int  # the fewest: each input read once, each output written once, in each pass that cannot be spared
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: tuple[Any, ...]
    ours_in_place: Callable[[], Any] | None = None
    grad_of: tuple[int, ...] = ()


def runnable(case: Case, fn: Callable[..., Any]) -> Callable[[], Any]:
    """A function without arguments that does all the work of the case once: fn's results, or the wanted gradients."""
    if not case.grad_of:
        return lambda: fn(*case.inputs)
    given = list(case.inputs)
    for i in case.grad_of:
        given[i] = given[i].detach().requires_grad_()
    wanted = [given[i] for i in case.grad_of]
    with torch.enable_grad():
        results = [t for t in tensors(fn(*given)) if t.requires_grad]
    generator = torch.Generator().manual_seed(0)  # the same for every candidate
    above = [torch.randn(t.shape, generator=generator).to(t) for t in results]

    def forward_backward() -> tuple[Tensor, ...]:
        out = [t for t in tensors(fn(*given)) if t.requires_grad]
        return torch.autograd.grad(out, wanted, above)

    return forward_backward


def tensors(out: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
