"""softmax_mse reads both logits, and again for the gradient to one, which it writes: five passes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import softmax_mse

NO_CPU_KERNEL = "a thousandth of a training step is spent there"
TINY = [((8, 10), F32)]
CPU = [((256, 10), F32), ((256, 100), F32), ((257, 101), F32)]
GPU = [((256, 10), F32), ((512, 10), F32), ((256, 100), F32), ((256, 200), F32), ((257, 101), F32),
       ((512, 1000), F32), ((256, 10), BF16), ((16384, 1000), F32)]  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    reference = partial(softmax_mse, impl="reference")
    for shape, dtype in {"tiny": TINY, "cpu": CPU, "gpu": GPU}[size]:
        a, b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        once = a.numel() * a.element_size()
        yield Case("softmax_mse", "forward", shape, dtype, "NK", 2 * once, reference, softmax_mse, (a, b))
        yield Case(
            "softmax_mse", "forward+backward", shape, dtype, "NK", 5 * once, reference, softmax_mse, (a, b),
            grad_of=(0,),
        )  # fmt: skip
