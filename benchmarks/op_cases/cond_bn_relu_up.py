"""cond_bn_relu_up: G's norms, with their upsampling (h of each block) and without (the second norm of a block).

Bytes, in passes over x (U makes four of x one of its result): training reads x for the statistics, and x again to
write the result. The backward reads x and the result's gradient for the sums, and with U keeps its adjoint; then it
reads x and that gradient of ReLU's result once more, and writes dx. In eval mode the statistics are there already.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import cond_bn_relu_up

NO_CPU_KERNEL = "torch's BatchNorm and interpolation are vectorised for channels_last, and G is a small part of a step"

CLASSES = 10
TINY = [((4, 16, 4, 4), F32, True), ((4, 16, 4, 4), F32, False)]
SHAPES = [((256, 256, 4, 4), True), ((256, 256, 8, 8), True), ((256, 256, 16, 16), True),
          ((256, 256, 8, 8), False), ((256, 256, 16, 16), False), ((256, 256, 32, 32), False),
          ((256, 16, 4, 4), False)]  # fmt: skip  # the last one is of A
RAGGED = [((255, 67, 7, 5), F32, True), ((255, 67, 7, 5), F32, False)]
GPU = [(shape, dtype, upsample) for dtype in (BF16, F32) for shape, upsample in SHAPES] + RAGGED


def plain(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, training: bool, upsample: bool
) -> Tensor:
    """As one writes it: the op's reference, which updates the running statistics apart, is slower."""
    scale, shift = (F.embedding(y, table)[:, :, None, None].to(x.dtype) for table in (gain, bias))
    out = F.relu(scale * F.batch_norm(x, mean, var, training=training) + shift)
    return F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=False) if upsample else out


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, dtype, upsample in TINY if size == "tiny" else GPU:
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        y = torch.randint(CLASSES, shape[:1], device=device)
        tables = [torch.randn(CLASSES, shape[1], device=device) for _ in range(2)]
        averages = [torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)]
        result = 4 if upsample else 1
        forward, backward = 2 + result, (1 + result + 1 + 3) if upsample else (2 + 3)
        for what, training, passes, grad_of in (
            ("forward eval", False, 1 + result, ()),
            ("forward", True, forward, ()),
            ("forward+backward", True, forward + backward, (0, 2, 3)),
        ):
            yield Case(
                "cond_bn_relu_up", what + (" x2" if upsample else ""), shape, dtype, "NHWC",
                passes * x.numel() * x.element_size(),
                partial(plain, training=training, upsample=upsample),
                partial(cond_bn_relu_up, training=training, upsample=upsample),
                (x, y, *tables, *averages), grad_of=grad_of,
            )  # fmt: skip
