"""pgd_step: one step of projected sign-gradient ascent, in one pass over memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puat_fast.ops._layout import capsules, check_dtype, check_like, dense_alike, stream_of
from puat_fast.ops._library import Impl, register, takes_reference
from puat_fast.ops._native import _C

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def pgd_step(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, *, impl: Impl = "auto") -> Tensor:
    """Move along the sign of the gradient, back into the L-inf ball around x0, and into the image range.

        clip(min(max(x + step_size * sign(grad), x0 - eps), x0 + eps), 0, 1)

    Source: Madry et al. 2018 (arXiv:1706.06083), eq. 2 of section 2.1; the projection P_eps of PUAT.

    sign(0) = 0, and sign(NaN) = 0 as in torch.sign: where the gradient is NaN, x is only projected. NaN in x or x0
    gives NaN. Below float32 the arithmetic is float32, rounded once, at the end.

    float32 and bfloat16 tensors that are dense and share one layout (contiguous, channels_last, any permutation) take
    the compiled kernel, whose result equals the reference's bit for bit. float64 and other layouts (slices,
    broadcasts) take the reference.

    Args:
        x: current point; float32, bfloat16 or float64, any shape.
        grad: gradient of the loss to be raised; shape, dtype and device of x.
        x0: centre of the ball, likewise.
        eps: radius, in units of x; finite, >= 0.
        step_size: finite, >= 0.
        impl: "auto", or "reference" for plain torch.

    Returns:
        A new tensor like x, with the strides of torch.empty_like(x). No gradient flows: the inputs count as detached.

    Raises:
        ValueError: shape, dtype or device of an argument differ from x's; a dtype other than the above; eps or
            step_size negative or not finite; impl unknown.
    """
    _check(x, grad, x0, eps, step_size)
    x, grad, x0 = x.detach(), grad.detach(), x0.detach()
    if takes_reference(impl):
        return torch.empty_like(x).copy_(_reference(x, grad, x0, eps, step_size))
    result: Tensor = torch.ops.puat_fast.pgd_step(x, grad, x0, eps, step_size)
    return result


def pgd_step_(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, *, impl: Impl = "auto") -> Tensor:
    """`pgd_step` that writes into x, of any layout, and returns it. x may be grad or x0 itself.

    Raises:
        ValueError: as `pgd_step`; or grad or x0 shares part of x's memory without being x.
    """
    _check(x, grad, x0, eps, step_size)
    target, grad, x0 = x.detach(), grad.detach(), x0.detach()
    if takes_reference(impl):
        target.copy_(_reference(target, grad, x0, eps, step_size))
    else:
        torch.ops.puat_fast.pgd_step_(target, grad, x0, eps, step_size)
    return x


def _reference(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    if x.dtype == torch.bfloat16:
        return _reference(x.float(), grad.float(), x0.float(), eps, step_size).to(x.dtype)
    moved = x + step_size * torch.sign(grad)
    return torch.minimum(torch.maximum(moved, x0 - eps), x0 + eps).clamp(0, 1)


def _check(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> None:
    check_dtype("x", x, *_KERNEL_DTYPES, torch.float64)
    check_like(x, grad=grad, x0=x0)
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def _run(out: Tensor, x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> None:
    has_kernel = not x.is_cuda or hasattr(_C, "pgd_step_cuda")
    if not (has_kernel and x.dtype in _KERNEL_DTYPES and dense_alike(x, grad, x0, out)):
        out.copy_(_reference(x, grad, x0, eps, step_size))
    elif x.is_cuda:
        _C.pgd_step_cuda(*capsules(out, x, grad, x0), eps, step_size, stream_of(x))
    else:
        _C.pgd_step_cpu(*capsules(out, x, grad, x0), eps, step_size, torch.get_num_threads())


def _pgd_step(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    out = torch.empty_like(x)
    _run(out, x, grad, x0, eps, step_size)
    return out


def _pgd_step_(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> None:
    _run(x, x, grad, x0, eps, step_size)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # autograd must see that what it saved of x is gone


def _pgd_step_fake(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    return torch.empty_like(x)


def _pgd_step_fake_(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> None:
    pass


register(
    "pgd_step(Tensor x, Tensor grad, Tensor x0, float eps, float step_size) -> Tensor",
    cpu=_pgd_step,
    cuda=_pgd_step,
    fake=_pgd_step_fake,
)
register(
    "pgd_step_(Tensor(a!) x, Tensor grad, Tensor x0, float eps, float step_size) -> ()",
    cpu=_pgd_step_,
    cuda=_pgd_step_,
    fake=_pgd_step_fake_,
)
