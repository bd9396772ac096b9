"""hinge reads the scores twice and writes their gradient; hinge_by_class reads scores and logits twice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import hinge, hinge_by_class

NO_CPU_KERNEL = "a thousandth of a training step is spent there"
TINY = [((8, 10), F32)]
CPU = [((256, 10), F32), ((256, 100), F32), ((257, 101), F32)]
GPU = [((256, 10), F32), ((512, 10), F32), ((256, 100), F32), ((256, 200), F32), ((257, 101), F32),
       ((512, 1000), F32), ((256, 10), BF16), ((16384, 1000), F32)]  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, dtype in {"tiny": TINY, "cpu": CPU, "gpu": GPU}[size]:
        d, logits = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        once = d.numel() * d.element_size()
        for form, what, wanted in (("fake", "D's gradient", 0), ("linear", "C's gradient", 1)):  # eqs 11 and 15
            loss = partial(hinge_by_class, form=form)
            yield Case(
                "hinge", f"by class, forward+backward, {what}", shape, dtype, "NK", 5 * once,
                partial(loss, impl="reference"), loss, (d, logits), grad_of=(wanted,),
            )  # fmt: skip
    for n in {"tiny": [8], "cpu": [256], "gpu": [256, 1 << 20]}[size]:  # one score an image
        d = torch.randn(n, 1, device=device)
        for form in ("real", "fake", "linear"):
            loss = partial(hinge, form=form)
            yield Case(
                "hinge", f"{form}, forward+backward", (n, 1), F32, "NK", 3 * 4 * n,
                partial(loss, impl="reference"), loss, (d,), grad_of=(0,),
            )  # fmt: skip
