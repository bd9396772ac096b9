"""softmax_mse: the mean-teacher consistency term, one pass over both logits, and one for the gradient.

The backward pass computes the softmaxes anew: no buffer of the logits' size, and one rounding below float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._library import Impl, register_triton
from puat_fast.ops._losses import check_beside, check_rows, takes_kernel, total, widened


def softmax_mse(a: Tensor, b: Tensor, reduce: str = "mean", *, impl: Impl = "auto") -> Tensor:
    """Squared distance of two softmaxes: mean over the batch, and mean or sum over the classes.

        mean_b mean_k (softmax(a)_bk - softmax(b)_bk)^2;  "sum": mean_b sum_k

    Source: Tarvainen & Valpola 2017 (arXiv:1703.01780); PUAT, eq 13.

    Arithmetic and result are float32, float64 where an input is. An empty batch gives NaN. float32 and bfloat16
    logits on a GPU take the Triton kernel, up to 4096 classes; everything else takes plain torch.

    Args:
        a: logits, N x K, K >= 1; float32, bfloat16, float16 or float64, of any strides.
        b: the teacher's logits, of a's shape and device, and any of these dtypes.
        reduce: "mean" or "sum", over the classes.
        impl: "auto", or "reference" for plain torch.

    Returns:
        A scalar. The gradient flows to a, once; b counts as detached.

    Raises:
        ValueError: a dtype, shape or device other than the above; reduce or impl unknown.
    """
    check_rows("a", a)
    check_rows("b", b)
    check_beside("a", a, "b", b)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected 'mean' or 'sum', got {reduce!r}")
    b = b.detach()
    if takes_kernel(impl, a, b, classes=a.shape[1]):
        return _SoftmaxMSE.apply(a, b, reduce)  # type: ignore[no-untyped-call]
    return _reference(a, b, reduce)


class _SoftmaxMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, reduce: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.reduce = reduce
        return torch.ops.puat_fast.softmax_mse(a, b, reduce)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.puat_fast.softmax_mse_backward(grad, *ctx.saved_tensors, ctx.reduce), None, None


def _reference(a: Tensor, b: Tensor, reduce: str) -> Tensor:
    squared = (widened(a).softmax(1) - widened(b).softmax(1)).square()
    return squared.mean() if reduce == "mean" else squared.sum(1).mean()


def _backward_reference(grad: Tensor, a: Tensor, b: Tensor, reduce: str) -> Tensor:
    n, k = a.shape
    p = widened(a).softmax(1)
    off = p - widened(b).softmax(1)
    along = p * (off - (p * off).sum(1, keepdim=True))
    return (2 * grad / (n * k if reduce == "mean" else n) * along).to(a.dtype)


def _triton(a: Tensor, b: Tensor, reduce: str) -> Tensor:
    from puat_fast.kernels import softmax_mse as kernels

    return total(kernels.softmax_mse(a, b, reduce))


def _backward_triton(grad: Tensor, a: Tensor, b: Tensor, reduce: str) -> Tensor:
    from puat_fast.kernels import softmax_mse as kernels

    out = a.new_empty(a.shape)
    kernels.softmax_mse_backward(out, grad, a, b, reduce)
    return out


def _fake(a: Tensor, b: Tensor, reduce: str) -> Tensor:
    return a.new_empty((), dtype=torch.float32)


def _backward_fake(grad: Tensor, a: Tensor, b: Tensor, reduce: str) -> Tensor:
    return a.new_empty(a.shape)


register_triton(
    "softmax_mse(Tensor a, Tensor b, str reduce) -> Tensor",
    reference=_reference,
    triton=_triton,
    fake=_fake,
)
register_triton(
    "softmax_mse_backward(Tensor grad, Tensor a, Tensor b, str reduce) -> Tensor",
    reference=_backward_reference,
    triton=_backward_triton,
    fake=_backward_fake,
)
