"""pgd_step reads x, grad and x0 and writes x: four passes. In L2, what is read again is counted once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import pgd_step, pgd_step_
from puat_fast.ops.pgd_step import _reference  # impl="reference" copies once more, to fix the result's strides

EPS = 8 / 255
RADII = {"linf": (EPS, 2 / 255), "l2": (128 / 255, 15 / 255)}  # eps and step size of training
BATCH = (256, 3, 32, 32)  # what one PGD step of training sees
TINY = [((8, 3, 32, 32), F32, "NCHW")]
CPU = [((1, 3, 32, 32), F32, "NCHW"), (BATCH, F32, "NCHW"), (BATCH, F32, "NHWC"), (BATCH, BF16, "NCHW"),
       ((512, 3, 32, 32), F32, "NCHW"), ((257, 3, 31, 33), F32, "NCHW"), ((4096, 3, 32, 32), F32, "NCHW")]  # fmt: skip
L2 = {
    "tiny": [((8, 3, 32, 32), F32, "NCHW")],
    "cpu": [(BATCH, F32, "NCHW"), (BATCH, BF16, "NCHW"), ((257, 3, 31, 33), F32, "NCHW")],
    "gpu": [(BATCH, F32, "NCHW"), ((512, 3, 32, 32), BF16, "NHWC"), ((257, 3, 31, 33), F32, "NCHW"),
            ((64, 3, 224, 224), F32, "NCHW")],
}  # fmt: skip
GPU = [(BATCH, F32, "NCHW"), (BATCH, F32, "NHWC"), ((512, 3, 32, 32), BF16, "NHWC"), ((257, 3, 31, 33), F32, "NCHW"),
       ((65536, 3, 32, 32), F32, "NCHW"), ((65536, 3, 32, 32), BF16, "NCHW")]  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    wanted = [("forward", "linf", *case) for case in {"tiny": TINY, "cpu": CPU, "gpu": GPU}[size]]
    for what, norm, shape, dtype, layout in wanted + [("forward, l2", "l2", *case) for case in L2[size]]:
        x0 = torch.rand(shape, device=device)
        x, grad = (x0 + torch.empty_like(x0).uniform_(-EPS, EPS)).clamp(0, 1), torch.randn_like(x0)
        memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        x, grad, x0 = (t.to(dtype).contiguous(memory_format=memory) for t in (x, grad, x0))
        own_x, (eps, step_size) = x.clone(), RADII[norm]
        yield Case(
            "pgd_step", what, shape, dtype, layout, 4 * x.numel() * x.element_size(),
            partial(_reference, norm=norm), partial(pgd_step, norm=norm), (x, grad, x0, eps, step_size),
            ours_in_place=partial(pgd_step_, own_x, grad, x0, eps, step_size, norm=norm),
        )  # fmt: skip
