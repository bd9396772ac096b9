"""BatchNorm + SiLU of C, in train mode and, without gradients of weight and bias, in eval mode, as attacks run.

Passes over the activation: train 3 forward (h is read for its statistics, and again), 5 backward (h and the gradient
are read for two sums, and again); eval 2 and 3. A residual adds its reading and h's writing forward, and backward the
reading of h's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import bn_silu

TINY = [((4, 16, 8, 8), F32)]
CPU = [((64, 16, 32, 32), F32), ((64, 32, 32, 32), F32), ((64, 64, 16, 16), F32), ((64, 128, 8, 8), F32)]
GPU = [((256, 160, 32, 32), BF16), ((256, 320, 16, 16), BF16), ((256, 640, 8, 8), BF16), ((256, 160, 32, 32), F32),
       ((257, 48, 31, 33), BF16)]  # fmt: skip


def function(training: bool, with_residual: bool, impl: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op of x, residual, weight, bias, running_mean, running_var."""

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> tuple[Tensor, ...]:
        given = residual if with_residual else None
        result = bn_silu(x, weight, bias, *running, training=training, residual=given, impl=impl)
        return result[:2] if with_residual else result[:1]

    return run


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, dtype in {"tiny": TINY, "cpu": CPU, "gpu": GPU}[size]:
        x, residual = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        vectors = [torch.rand(shape[1], device=device) + 0.5 for _ in range(4)]
        pass_bytes = x.numel() * x.element_size()
        for training in (True, False):
            for with_residual in (False, True):
                run = [function(training, with_residual, impl) for impl in ("reference", "auto")]
                forward = 2 + training + 2 * with_residual
                backward = (5 if training else 3) + with_residual
                mode = f"{'train' if training else 'eval'}{', residual' if with_residual else ''}"
                wanted = (0, *((1,) if with_residual else ()), *((2, 3) if training else ()))
                for what, passes, grad_of in (
                    ("forward", forward, ()),
                    ("forward+backward", forward + backward, wanted),
                ):
                    yield Case(
                        "bn_silu", f"{mode}: {what}", shape, dtype, "NHWC", passes * pass_bytes, *run,
                        (x, residual, *vectors), grad_of=grad_of,
                    )  # fmt: skip
