"""pgd_step reads x, grad and x0 and writes x: four passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import pgd_step, pgd_step_
from puat_fast.ops.pgd_step import _reference  # impl="reference" copies once more, to fix the result's strides

EPS, STEP = 8 / 255, 2 / 255
BATCH = (256, 3, 32, 32)  # what one PGD step of training sees
TINY = [((8, 3, 32, 32), F32, "NCHW")]
CPU = [((1, 3, 32, 32), F32, "NCHW"), (BATCH, F32, "NCHW"), (BATCH, F32, "NHWC"), (BATCH, BF16, "NCHW"),
       ((512, 3, 32, 32), F32, "NCHW"), ((257, 3, 31, 33), F32, "NCHW"), ((4096, 3, 32, 32), F32, "NCHW")]  # fmt: skip
GPU = [(BATCH, F32, "NCHW"), (BATCH, F32, "NHWC"), ((512, 3, 32, 32), BF16, "NHWC"), ((257, 3, 31, 33), F32, "NCHW"),
       ((65536, 3, 32, 32), F32, "NCHW"), ((65536, 3, 32, 32), BF16, "NCHW")]  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, dtype, layout in {"tiny": TINY, "cpu": CPU, "gpu": GPU}[size]:
        x0 = torch.rand(shape, device=device)
        x, grad = (x0 + torch.empty_like(x0).uniform_(-EPS, EPS)).clamp(0, 1), torch.randn_like(x0)
        memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        x, grad, x0 = (t.to(dtype).contiguous(memory_format=memory) for t in (x, grad, x0))
        own_x = x.clone()
        yield Case(
            "pgd_step", "forward", shape, dtype, layout, 4 * x.numel() * x.element_size(), _reference, pgd_step,
            (x, grad, x0, EPS, STEP),
            ours_in_place=lambda x=own_x, g=grad, x0=x0: pgd_step_(x, g, x0, EPS, STEP),
        )  # fmt: skip
