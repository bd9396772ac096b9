"""spectral_norm over all layers of D: forward reads every W and writes W / sigma, backward reads W and g and writes dW.

At D's size W stays in the L2 cache between the passes of one forward, so that memory sees it once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from op_cases import F32, Case, Size
from puat_fast.ops import spectral_norm

NO_CPU_KERNEL = "a few matrix-vector products for each layer, which BLAS runs as fast as memory allows"
# width, classes, layout, rows of the embedding looked up one by one
TINY = [(16, 10, "NCHW", False)]
GPU = [(256, 10, "NCHW", False), (256, 10, "NHWC", False), (256, 100, "NCHW", False), (256, 100, "NCHW", True),
       (61, 7, "NHWC", False)]  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for width, classes, layout, per_row in {"tiny": TINY, "cpu": TINY, "gpu": GPU}[size]:
        weights, us, vs = layers_of_d(width, classes, layout, device)
        n = len(weights)
        iterations = [1] * (n - 1) + [classes if per_row else 1]
        numel = sum(weight.numel() for weight in weights)
        what = " per row" if per_row else ""

        def run(*tensors: Tensor, impl: str, n: int = n, iterations: list[int] = iterations,
                rows: bool = per_row) -> tuple[Tensor, ...]:  # fmt: skip
            weights, us, vs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
            return tuple(spectral_norm(weights, us, vs, iterations=iterations, per_row=[False] * (n - 1) + [rows],
                                       impl=impl))  # fmt: skip

        def reference(*tensors: Tensor, run=run) -> tuple[Tensor, ...]:
            return run(*tensors, impl="reference")

        def ours(*tensors: Tensor, run=run) -> tuple[Tensor, ...]:
            return run(*tensors, impl="auto")

        for grad_of in ((), tuple(range(n))):
            direction = "forward+backward" if grad_of else "forward"
            yield Case(
                "spectral_norm", direction + what, (numel,), F32, layout, (5 if grad_of else 2) * 4 * numel, reference,
                ours, (*weights, *us, *vs), grad_of=grad_of,
            )  # fmt: skip


def layers_of_d(
    width: int, classes: int, layout: str, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """W, u and v of the 12 convolutions, the linear layer and the embedding."""
    shapes: list[tuple[int, ...]] = []
    for channels in (3, width, width, width):
        shapes += [(width, channels, 3, 3), (width, width, 3, 3), (width, channels, 1, 1)]
    weights = [torch.randn(shape, device=device) for shape in (*shapes, (1, width), (classes, width))]
    for w in weights:  # one singular value well above the others, to which u and v converge
        flat = w.view(w.shape[0], -1)
        flat += 4 * torch.randn_like(flat[:, :1]) * torch.randn_like(flat[:1])
    if layout == "NHWC":
        weights = [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
    us = [torch.randn(w.shape[0], device=device) for w in weights]
    vs = [torch.randn(w[0].numel(), device=device) for w in weights]
    # Every call of every candidate moves u and v on: converged, they stay, and the results can be compared.
    spectral_norm(weights, us, vs, iterations=[50] * len(weights), impl="reference")
    return weights, us, vs
