"""smooth_ce reads the logits, and again for the gradient, which it writes: three passes. cw_margin likewise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import cw_margin, smooth_ce

NO_CPU_KERNEL = "torch's own cross-entropy is fused there already, and the margin is no part of training"
TINY = [((8, 10), F32)]
CPU = [((256, 10), F32), ((256, 100), F32), ((257, 101), F32)]
GPU = [((256, 10), F32), ((512, 10), F32), ((256, 100), F32), ((256, 200), F32), ((257, 101), F32),
       ((512, 1000), F32), ((256, 10), BF16), ((16384, 1000), F32)]  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, dtype in {"tiny": TINY, "cpu": CPU, "gpu": GPU}[size]:
        logits = torch.randn(shape, device=device).to(dtype)
        y = torch.randint(shape[1], shape[:1], device=device)
        once = logits.numel() * logits.element_size()
        losses = (
            ("smooth_ce", partial(smooth_ce, label_smoothing=0.1)),
            ("smooth_ce unsmoothed", smooth_ce),
            ("cw_margin", cw_margin),
        )
        for what, loss in losses:
            reference = partial(loss, impl="reference")
            yield Case("smooth_ce", what + " forward", shape, dtype, "NK", once, reference, loss, (logits, y))
            yield Case(
                "smooth_ce", what + " forward+backward", shape, dtype, "NK", 3 * once, reference, loss, (logits, y),
                grad_of=(0,),
            )  # fmt: skip
