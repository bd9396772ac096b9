"""hinge and hinge_by_class: every loss of a discriminator's scores, one pass over them, and one for the gradients.

The backward pass computes margins and softmax anew instead of scaling gradients kept from the forward pass: as many
launches, no buffers, one rounding below float32, and nothing wasted on an input whose gradient nobody asks for.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._library import Impl, register_triton
from puat_fast.ops._losses import check_beside, check_floating, check_rows, takes_kernel, total, widened

Form = Literal["real", "fake", "linear"]


def hinge(d: Tensor, form: Form, *, impl: Impl = "auto") -> Tensor:
    """The hinge loss of a discriminator's scores, or its linear part, which those minimise who would fool it.

        "real": mean relu(1 - d);  "fake": mean relu(1 + d);  "linear": -mean d

    Source: Lim & Ye 2017 (arXiv:1705.02894); PUAT, eqs 7 and 8.

    Arithmetic and result are float32, float64 for float64 scores. The subgradient at relu(0) is 0, as torch's. An empty
    tensor gives NaN. float32 and bfloat16 on a GPU take the Triton kernel; everything else takes plain torch.

    Args:
        d: scores; float32, bfloat16, float16 or float64, of any shape and strides.
        form: "real", "fake" or "linear".
        impl: "auto", or "reference" for plain torch.

    Returns:
        A scalar. The gradient flows to d, once.

    Raises:
        ValueError: a dtype other than the above; form or impl unknown.
    """
    check_floating("d", d)
    _check_form(form)
    return _Hinge.apply(d, form) if takes_kernel(impl, d) else _reference(d, form)  # type: ignore[no-untyped-call]


def hinge_by_class(d: Tensor, logits: Tensor, form: Form, *, impl: Impl = "auto") -> Tensor:
    """`hinge` of one score per class, weighted by a classifier's probabilities p = softmax(logits).

        mean_b sum_k p_bk f(d_bk),  f: relu(1 - d), relu(1 + d) or -d for "real", "fake", "linear"

    Source: PUAT, eqs 9, 10, 15.

    As `hinge`; the Triton kernel serves up to 4096 classes.

    Args:
        d: scores, N x K, K >= 1; float32, bfloat16, float16 or float64, of any strides.
        logits: of d's shape and device, and any of these dtypes.
        form: "real", "fake" or "linear".
        impl: "auto", or "reference" for plain torch.

    Returns:
        A scalar, float64 where an input is, else float32. Gradients flow to d and to the logits, once, each only
        where it is needed.

    Raises:
        ValueError: a dtype, shape or device other than the above; form or impl unknown.
    """
    check_rows("d", d)
    check_rows("logits", logits)
    check_beside("d", d, "logits", logits)
    _check_form(form)
    if takes_kernel(impl, d, logits, classes=d.shape[1]):
        return _HingeByClass.apply(d, logits, form)  # type: ignore[no-untyped-call]
    return _by_class(d, logits, form)


def _check_form(form: str) -> None:
    if form not in ("real", "fake", "linear"):
        raise ValueError(f"form: expected 'real', 'fake' or 'linear', got {form!r}")


class _Hinge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, d: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(d)
        ctx.form = form
        return torch.ops.puat_fast.hinge(d, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.puat_fast.hinge_backward(grad, *ctx.saved_tensors, ctx.form), None


class _HingeByClass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, d: Tensor, logits: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(d, logits)
        ctx.form = form
        return torch.ops.puat_fast.hinge_by_class(d, logits, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wanted = ctx.needs_input_grad[:2]
        grads = torch.ops.puat_fast.hinge_by_class_backward(grad, *ctx.saved_tensors, ctx.form, *wanted)
        return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None, None


def _value(d: Tensor, form: str) -> Tensor:
    d = widened(d)
    return -d if form == "linear" else F.relu(1 - d if form == "real" else 1 + d)


def _slope(d: Tensor, form: str) -> Tensor:
    d = widened(d)
    if form == "linear":
        return torch.full_like(d, -1)
    return torch.where(1 - d <= 0, 0.0, -1.0) if form == "real" else torch.where(1 + d <= 0, 0.0, 1.0)


def _reference(d: Tensor, form: str) -> Tensor:
    return _value(d, form).mean()


def _backward_reference(grad: Tensor, d: Tensor, form: str) -> Tensor:
    return (grad / max(d.numel(), 1) * _slope(d, form)).to(d.dtype).contiguous()


def _by_class(d: Tensor, logits: Tensor, form: str) -> Tensor:
    return (widened(logits).softmax(1) * _value(d, form)).sum(1).mean()


def _by_class_backward(
    grad: Tensor, d: Tensor, logits: Tensor, form: str, wants_d: bool, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    p, value = widened(logits).softmax(1), _value(d, form)
    weight = grad / max(len(d), 1) * p
    grad_d = weight * _slope(d, form) if wants_d else d.new_empty(0)
    grad_logits = weight * (value - (p * value).sum(1, keepdim=True)) if wants_logits else logits.new_empty(0)
    return grad_d.to(d.dtype).contiguous(), grad_logits.to(logits.dtype).contiguous()


def _triton(d: Tensor, form: str) -> Tensor:
    from puat_fast.kernels import hinge as kernels

    return total(kernels.hinge(d, form))


def _backward_triton(grad: Tensor, d: Tensor, form: str) -> Tensor:
    from puat_fast.kernels import hinge as kernels

    out = d.new_empty(d.shape)
    kernels.hinge_backward(out, grad, d, form)
    return out


def _by_class_triton(d: Tensor, logits: Tensor, form: str) -> Tensor:
    from puat_fast.kernels import hinge as kernels

    return total(kernels.hinge_by_class(d, logits, form))


def _by_class_backward_triton(
    grad: Tensor, d: Tensor, logits: Tensor, form: str, wants_d: bool, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    from puat_fast.kernels import hinge as kernels

    grads = _empty_gradients(d, logits, wants_d, wants_logits)
    kernels.hinge_by_class_backward(*grads, grad, d, logits, form, wants_d, wants_logits)
    return grads


def _empty_gradients(d: Tensor, logits: Tensor, wants_d: bool, wants_logits: bool) -> tuple[Tensor, Tensor]:
    return d.new_empty(d.shape if wants_d else 0), logits.new_empty(logits.shape if wants_logits else 0)


def _loss_fake(d: Tensor, *rest: object) -> Tensor:
    return d.new_empty((), dtype=torch.float32)


def _backward_fake(grad: Tensor, d: Tensor, form: str) -> Tensor:
    return d.new_empty(d.shape)


def _by_class_backward_fake(
    grad: Tensor, d: Tensor, logits: Tensor, form: str, wants_d: bool, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(d, logits, wants_d, wants_logits)


register_triton(
    "hinge(Tensor d, str form) -> Tensor",
    reference=_reference,
    triton=_triton,
    fake=_loss_fake,
)
register_triton(
    "hinge_backward(Tensor grad, Tensor d, str form) -> Tensor",
    reference=_backward_reference,
    triton=_backward_triton,
    fake=_backward_fake,
)
register_triton(
    "hinge_by_class(Tensor d, Tensor logits, str form) -> Tensor",
    reference=_by_class,
    triton=_by_class_triton,
    fake=_loss_fake,
)
register_triton(
    "hinge_by_class_backward(Tensor grad, Tensor d, Tensor logits, str form, bool wants_d, bool wants_logits)"
    " -> (Tensor, Tensor)",
    reference=_by_class_backward,
    triton=_by_class_backward_triton,
    fake=_by_class_backward_fake,
)
