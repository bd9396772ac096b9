"""pgd_step: one step of projected gradient ascent, in L-inf or L2, in one pass over memory."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from puat_fast.ops._layout import capsules, check_dtype, check_like, dense_alike, stream_of
from puat_fast.ops._library import Impl, register, takes_reference
from puat_fast.ops._native import _C

Norm = Literal["linf", "l2"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_KERNELS = {"linf": "pgd_step", "l2": "pgd_step_l2"}
_NO_DIRECTION = 2.0**-126  # the least normal float32: below it the length of a gradient has no inverse


def pgd_step(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, *, norm: Norm = "linf", impl: Impl = "auto"
) -> Tensor:
    """Move along the gradient, back into the ball around x0, and into the image range.

        linf:  clip(min(max(x + step_size * sign(grad), x0 - eps), x0 + eps), 0, 1)
        l2:    clip(x0 + min(1, eps / |x' - x0|) * (x' - x0), 0, 1),  x' = x + step_size * grad / |grad|

    In l2, dim 0 counts the samples, and |.| is the L2 norm of a sample over all other dims.

    Source: Madry et al. 2018 (arXiv:1706.06083), eq. 2 of section 2.1; linf is the projection P_eps of PUAT. l2 as in
    their library (MadryLab/robustness, attack_steps.py, L2Step), but with no constant added to |grad|.

    linf: sign(0) = 0, and sign(NaN) = 0 as in torch.sign: where the gradient is NaN, x is only projected. NaN in x or
    x0 gives NaN.
    l2: a sample whose gradient has no direction is only projected: |grad| < 2^-126, or a NaN or infinity in it. What is
    in the ball already is not rounded. NaN in x or x0 makes the whole sample NaN.

    Below float32 the arithmetic is float32, rounded once, at the end; norms are accumulated in float64.

    float32 and bfloat16 tensors that are dense and share one layout (contiguous, channels_last, any permutation that,
    for l2, leaves dim 0 outermost) take the compiled kernel. Its result equals the reference's bit for bit in linf, and
    up to the order of sums and fused multiply-adds in l2; it never depends on the number of threads. float64 and other
    layouts (slices, broadcasts) take the reference.

    Args:
        x: current point; float32, bfloat16 or float64, any shape; l2: at least one dim.
        grad: gradient of the loss to be raised; shape, dtype and device of x.
        x0: centre of the ball, likewise.
        eps: radius in the norm, in units of x; finite, >= 0.
        step_size: finite, >= 0.
        norm: "linf" or "l2".
        impl: "auto", or "reference" for plain torch.

    Returns:
        A new tensor like x, with the strides of torch.empty_like(x). No gradient flows: the inputs count as detached.

    Raises:
        ValueError: shape, dtype or device of an argument differ from x's; a dtype other than the above; eps or
            step_size negative or not finite; norm or impl unknown; l2 of a tensor without dims.
    """
    _check(x, grad, x0, eps, step_size, norm)
    x, grad, x0 = x.detach(), grad.detach(), x0.detach()
    if takes_reference(impl):
        return torch.empty_like(x).copy_(_reference(x, grad, x0, eps, step_size, norm))
    result: Tensor = torch.ops.puat_fast.pgd_step(x, grad, x0, eps, step_size, norm)
    return result


def pgd_step_(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, *, norm: Norm = "linf", impl: Impl = "auto"
) -> Tensor:
    """`pgd_step` that writes into x, of any layout, and returns it. x may be grad or x0 itself.

    Raises:
        ValueError: as `pgd_step`; or grad or x0 shares part of x's memory without being x.
    """
    _check(x, grad, x0, eps, step_size, norm)
    target, grad, x0 = x.detach(), grad.detach(), x0.detach()
    if takes_reference(impl):
        target.copy_(_reference(target, grad, x0, eps, step_size, norm))
    else:
        torch.ops.puat_fast.pgd_step_(target, grad, x0, eps, step_size, norm)
    return x


def _reference(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str = "linf") -> Tensor:
    if x.dtype == torch.bfloat16:
        return _reference(x.float(), grad.float(), x0.float(), eps, step_size, norm).to(x.dtype)
    if norm == "l2":
        return _reference_l2(x, grad, x0, eps, step_size)
    moved = x + step_size * torch.sign(grad)
    return torch.minimum(torch.maximum(moved, x0 - eps), x0 + eps).clamp(0, 1)


def _reference_l2(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    length = _lengths(grad)
    directed = (length >= _NO_DIRECTION) & (length < math.inf)
    moved = torch.where(directed, x + step_size * (grad * (1 / length).to(x.dtype)), x)
    offset = moved - x0
    length = _lengths(offset)
    shrink = torch.where(length <= eps, 1.0, eps / length).to(x.dtype)
    return torch.where(shrink == 1, moved, x0 + shrink * offset).clamp(0, 1)


def _lengths(t: Tensor) -> Tensor:
    """The float64 L2 norm of each sample, to be broadcast over it."""
    dims = tuple(range(1, t.ndim + 1))  # one more than there are: no dims would mean all
    return torch.linalg.vector_norm(t.unsqueeze(-1), dim=dims, keepdim=True, dtype=torch.float64).squeeze(-1)


def check_step(eps: float, step_size: float) -> None:
    """Raise ValueError, naming the argument, unless both are finite and not negative."""
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def _check(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"norm: expected {' or '.join(map(repr, get_args(Norm)))}, got {norm!r}")
    check_dtype("x", x, *_KERNEL_DTYPES, torch.float64)
    check_like(x, grad=grad, x0=x0)
    if norm == "l2" and x.ndim == 0:
        raise ValueError("x: expected a batch, dim 0, for norm 'l2', got shape ()")
    check_step(eps, step_size)


def _run(out: Tensor, x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str) -> None:
    kernel = getattr(_C, f"{_KERNELS[norm]}_{x.device.type}", None)  # CUDA's may not be built
    if kernel is None or x.dtype not in _KERNEL_DTYPES or not _has_layout(norm, x, grad, x0, out):
        out.copy_(_reference(x, grad, x0, eps, step_size, norm))
    else:
        kernel(*capsules(out, x, grad, x0), eps, step_size, stream_of(x) if x.is_cuda else torch.get_num_threads())


def _has_layout(norm: str, x: Tensor, *others: Tensor) -> bool:
    samples_apart = norm == "linf" or len(x) <= 1 or x.stride(0) * len(x) == x.numel()
    return dense_alike(x, *others) and (samples_apart or x.numel() == 0)


def _pgd_step(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str = "linf") -> Tensor:
    out = torch.empty_like(x)
    _run(out, x, grad, x0, eps, step_size, norm)
    return out


def _pgd_step_(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str = "linf") -> None:
    _run(x, x, grad, x0, eps, step_size, norm)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # autograd must see that what it saved of x is gone


def _pgd_step_fake(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str = "linf") -> Tensor:
    return torch.empty_like(x)


def _pgd_step_fake_(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float, norm: str = "linf") -> None:
    pass


register(
    'pgd_step(Tensor x, Tensor grad, Tensor x0, float eps, float step_size, str norm="linf") -> Tensor',
    cpu=_pgd_step,
    cuda=_pgd_step,
    fake=_pgd_step_fake,
)
register(
    'pgd_step_(Tensor(a!) x, Tensor grad, Tensor x0, float eps, float step_size, str norm="linf") -> ()',
    cpu=_pgd_step_,
    cuda=_pgd_step_,
    fake=_pgd_step_fake_,
)
