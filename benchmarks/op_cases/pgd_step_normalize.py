"""pgd_step_normalize reads x, grad and x0 and writes x and the network's input, once each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import pgd_step_normalize
from puat_fast.ops.pgd_step_normalize import _reference

EPS, STEP = 8 / 255, 2 / 255
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
BATCH = (256, 3, 32, 32)  # what one PGD step of training sees
# Shape, dtype of the network's input, its channels. The gradient is that of the input: its dtype, layout and channels.
CASES = {
    "tiny": [((8, 3, 32, 32), BF16, 8)],
    "cpu": [(BATCH, F32, 3), (BATCH, BF16, 8), ((257, 3, 31, 33), F32, 3)],
    "gpu": [(BATCH, BF16, 8), (BATCH, BF16, 3), (BATCH, F32, 3), ((512, 3, 32, 32), BF16, 8),
            ((257, 3, 31, 33), BF16, 8), ((65536, 3, 32, 32), BF16, 8)],
}  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, dtype, channels in CASES[size]:
        x0 = torch.rand(shape, device=device)
        x = (x0 + torch.empty_like(x0).uniform_(-EPS, EPS)).clamp(0, 1)
        n, _, h, w = shape
        grad = torch.randn(n, channels, h, w, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        moved = 3 * x.numel() * x.element_size() + 2 * grad.numel() * grad.element_size()

        def ours(*args, dtype=dtype, channels=channels):
            return pgd_step_normalize(*args, dtype=dtype, channels=channels)

        def reference(*args, dtype=dtype, channels=channels):
            return _reference(*args, dtype, channels)

        yield Case(
            "pgd_step_normalize", "forward", shape, dtype, f"NCHW to NHWC, {channels} channels", moved,
            reference, ours, (x, grad, x0, EPS, STEP, MEAN, STD),
        )  # fmt: skip
