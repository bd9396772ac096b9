"""smooth_ce and cw_margin: the losses of labelled logits, each one pass over them, and one for the gradient.

The backward pass computes softmax or margin anew instead of scaling a gradient kept from the forward pass: as many
launches, no buffer of the logits' size, one rounding below float32, and nothing wasted where no gradient is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._library import Impl, register_triton
from puat_fast.ops._losses import check_labels, check_rows, takes_kernel, total, widened

_NO_LABEL = -(2**31)  # torch would leave out rows of label -100: here that is a mistake like any other


def smooth_ce(logits: Tensor, y: Tensor, label_smoothing: float = 0.0, *, impl: Impl = "auto") -> Tensor:
    """Cross-entropy with label smoothing s, mean over the batch.

        mean_b[(1 - s) (-log p_y) + s mean_k(-log p_k)],  p = softmax(logits)

    Source: torch.nn.functional.cross_entropy; Szegedy et al. 2016 (arXiv:1512.00567), section 7.

    Arithmetic and result are float32, float64 for float64 logits. An empty batch gives NaN. float32 and bfloat16
    logits on a GPU take the Triton kernel, up to 4096 classes; everything else takes plain torch.

    Args:
        logits: N x K, K >= 1; float32, bfloat16, float16 or float64, of any strides.
        y: int64 N, labels in [0, K).
        label_smoothing: s in [0, 1].
        impl: "auto", or "reference" for plain torch.

    Returns:
        A scalar. The gradient flows to the logits, once.

    Raises:
        ValueError: a dtype, shape or device other than the above; label_smoothing out of range; impl unknown.
        IndexError: on the CPU, a label outside [0, K), -100 included. On a GPU no value is waited for: there such a
            label makes the loss, and its row of the gradient, NaN.
    """
    check_rows("logits", logits)
    check_labels(logits, y)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if takes_kernel(impl, logits, classes=logits.shape[1]):
        return _SmoothCE.apply(logits, y, label_smoothing)  # type: ignore[no-untyped-call]
    return _smooth_ce_reference(logits, y, label_smoothing)


def cw_margin(logits: Tensor, y: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The CW attack's objective, to be maximised: minus the margin of the label, where it is ahead.

        -sum_b max(l_y - max_{k != y} l_k, 0)

    Source: Carlini & Wagner 2017 (arXiv:1608.04644), f_6 with kappa = 0.

    Subgradients are torch's: where several classes share the maximum, each gets an equal part; a margin of exactly 0
    counts as positive. NaN logits make the sum NaN, and their rows of the gradient are of no use.

    Args, dtypes and Raises: as smooth_ce (but on the CPU a label outside [0, K) is a RuntimeError). An empty batch
    gives 0.
    """
    check_rows("logits", logits)
    check_labels(logits, y)
    if takes_kernel(impl, logits, classes=logits.shape[1]):
        return _CWMargin.apply(logits, y)  # type: ignore[no-untyped-call]
    return _cw_margin_reference(logits, y)


class _SmoothCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, y)
        ctx.label_smoothing = label_smoothing
        return torch.ops.puat_fast.smooth_ce(logits, y, label_smoothing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.puat_fast.smooth_ce_backward(grad, *ctx.saved_tensors, ctx.label_smoothing), None, None


class _CWMargin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(logits, y)
        return torch.ops.puat_fast.cw_margin(logits, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.puat_fast.cw_margin_backward(grad, *ctx.saved_tensors), None


def _smooth_ce_reference(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(widened(logits), y, label_smoothing=label_smoothing, ignore_index=_NO_LABEL)


def _smooth_ce_backward_reference(grad: Tensor, logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    n, k = logits.shape
    target = F.one_hot(y, k) * (1 - label_smoothing) + label_smoothing / k
    return (grad / n * (widened(logits).softmax(1) - target)).to(logits.dtype)


def _cw_margin_reference(logits: Tensor, y: Tensor) -> Tensor:
    logits = widened(logits)
    l_y = logits.gather(1, y[:, None])[:, 0]
    l_other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return -(l_y - l_other).clamp_min(0).sum()


def _cw_margin_backward_reference(grad: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    x, index = widened(logits), y[:, None]
    others = x.scatter(1, index, -torch.inf)
    highest = others.amax(1, keepdim=True)
    shared = (others == highest).to(x.dtype)
    direction = (shared / shared.sum(1, keepdim=True)).scatter(1, index, -1.0)
    return (grad * torch.where(x.gather(1, index) >= highest, direction, 0)).to(logits.dtype)


def _smooth_ce_triton(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    from puat_fast.kernels import smooth_ce as kernels

    return total(kernels.smooth_ce(logits, y, label_smoothing))


def _smooth_ce_backward_triton(grad: Tensor, logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    from puat_fast.kernels import smooth_ce as kernels

    out = logits.new_empty(logits.shape)
    kernels.smooth_ce_backward(out, grad, logits, y, label_smoothing)
    return out


def _cw_margin_triton(logits: Tensor, y: Tensor) -> Tensor:
    from puat_fast.kernels import smooth_ce as kernels

    return total(kernels.cw_margin(logits, y))


def _cw_margin_backward_triton(grad: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    from puat_fast.kernels import smooth_ce as kernels

    out = logits.new_empty(logits.shape)
    kernels.cw_margin_backward(out, grad, logits, y)
    return out


def _loss_fake(logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _gradient_fake(grad: Tensor, logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty(logits.shape)


register_triton(
    "smooth_ce(Tensor logits, Tensor y, float label_smoothing) -> Tensor",
    reference=_smooth_ce_reference,
    triton=_smooth_ce_triton,
    fake=_loss_fake,
)
register_triton(
    "smooth_ce_backward(Tensor grad, Tensor logits, Tensor y, float label_smoothing) -> Tensor",
    reference=_smooth_ce_backward_reference,
    triton=_smooth_ce_backward_triton,
    fake=_gradient_fake,
)
register_triton(
    "cw_margin(Tensor logits, Tensor y) -> Tensor",
    reference=_cw_margin_reference,
    triton=_cw_margin_triton,
    fake=_loss_fake,
)
register_triton(
    "cw_margin_backward(Tensor grad, Tensor logits, Tensor y) -> Tensor",
    reference=_cw_margin_backward_reference,
    triton=_cw_margin_backward_triton,
    fake=_gradient_fake,
)
