"""cond_bn_relu_up: class-conditional batch normalisation, ReLU and bilinear upsampling, as G and A use them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._layout import check_dtype
from puat_fast.ops._library import INTERPRETED, Impl, register_triton, takes_reference
from puat_fast.ops._upsample import upsample2

Stats = Literal["update", "leave"]


def cond_bn_relu_up(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *, training: bool,
    momentum: float | Tensor = 0.1, eps: float = 1e-5, stats: Stats = "update", upsample: bool, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Normalise each channel, scale and shift it as the image's class says, rectify, and double the size.

        U(ReLU(gain[y] * (x - mean) / sqrt(var + eps) + bias[y])),    U = bilinear x2 or the identity

    Source: conditional batch normalisation, Dumoulin et al. 2017 (arXiv:1610.07629), as G and A of PUAT have it. U is
    F.interpolate(scale_factor=2, mode="bilinear", align_corners=False).

    With `training`, mean and (biased) variance are those of x over N, H and W, through which the gradient flows; else
    they are running_mean and running_var. NaN stays NaN, and ReLU'(0) = 0. bfloat16 is computed in float32 and rounded
    at the end; in the backward of U, its gradient with respect to U's input is rounded to x's dtype too.

    On a GPU, float32 and bfloat16 take the Triton kernels, whose results are bitwise repeatable. The CPU takes plain
    torch: its BatchNorm and interpolation are vectorised for channels_last already. float64 takes plain torch anywhere.

    Args:
        x: N x C x H x W; float32, bfloat16 or float64. Other layouts than channels_last cost a copy.
        y: classes, N, int64, in [0, K). One outside gives NaN for its image on a GPU, which cannot raise without
            waiting, and on the CPU an IndexError, as F.embedding does.
        gain, bias: K x C; float32, or float64 if x is. float64 tables for float64 x only.
        running_mean, running_var: C, contiguous, in the dtype of gain. With `training` and stats="update" they become
            (1 - momentum) running + momentum batch, with the batch's unbiased variance; an empty batch changes nothing.
        training: normalise by the batch's statistics.
        momentum: in [0, 1], a number or a 0-d floating tensor on x's device.
        eps: added to the variance; finite, > 0.
        stats: "update" the running statistics, or "leave" them; without `training` they are never written.
        upsample: whether U doubles height and width.
        impl: "auto", or "reference" for plain torch.

    Returns:
        N x C x 2H x 2W, or N x C x H x W without `upsample`; x's dtype, channels_last. Gradients flow to x, gain and
        bias; to be differentiated once (twice by the reference).

    Raises:
        ValueError: an argument of another shape, dtype, device or range than the above; with `training`, a single
            value per channel; impl unknown.
    """
    _check(x, y, gain, bias, running_mean, running_var, training, momentum, eps, stats)
    update = training and stats == "update" and x.numel() > 0
    x = x.contiguous(memory_format=torch.channels_last)
    # on the CPU plain torch under its own autograd serves: it keeps xhat, which our backward would compute again
    if takes_reference(impl) or x.dtype == torch.float64 or not (x.is_cuda or INTERPRETED):
        return _reference(x, y, gain, bias, running_mean, running_var, training, momentum, eps, update, upsample)
    mean, var = running_mean, running_var
    if training:
        averages = (running_mean, running_var) if update else (None, None)
        number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (float(momentum), None)
        mean, var, _ = torch.ops.puat_fast.cond_bn_relu_up_stats(x.detach(), *averages, number, tensor).unbind()
    result: Tensor = _CondBNReLUUp.apply(x, y, gain, bias, mean, var, eps, training, upsample)  # type: ignore[no-untyped-call]
    return result


class _CondBNReLUUp(torch.autograd.Function):
    """Mean and variance count as constants of the forward; that they depend on x, the backward knows by `training`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
        training: bool, upsample: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, y, gain, bias, mean, var)
        ctx.eps, ctx.training, ctx.upsample = eps, training, upsample
        out: Tensor = torch.ops.puat_fast.cond_bn_relu_up(x, y, gain, bias, mean, var, eps, upsample)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_gain, needs_bias, *_ = ctx.needs_input_grad
        dx, dgain, dbias = torch.ops.puat_fast.cond_bn_relu_up_backward(
            grad_out, *ctx.saved_tensors, ctx.eps, ctx.training, ctx.upsample, needs_x, needs_gain or needs_bias
        )
        grads = (dx if needs_x else None, None, dgain if needs_gain else None, dbias if needs_bias else None)
        return *grads, None, None, None, None, None


def _check(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, training: bool,
    momentum: float | Tensor, eps: float, stats: str,
) -> None:  # fmt: skip
    check_dtype("x", x, torch.float32, torch.bfloat16, torch.float64)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape N x C x H x W, of which only N may be 0, got {tuple(x.shape)}")
    images, channels, height, width = x.shape
    if training and images * height * width == 1:
        raise ValueError(f"x: expected more than 1 value per channel when training, got shape {tuple(x.shape)}")
    if gain.dim() != 2 or len(gain) == 0:
        raise ValueError(f"gain: expected shape K x {channels}, K > 0, got {tuple(gain.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor, shape, dtype in (
        ("y", y, (images,), torch.int64),
        ("gain", gain, (len(gain), channels), wide),
        ("bias", bias, (len(gain), channels), wide),
        ("running_mean", running_mean, (channels,), wide),
        ("running_var", running_var, (channels,), wide),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        check_dtype(name, tensor, dtype)
        _check_device(name, tensor, x)
    for name, average in (("running_mean", running_mean), ("running_var", running_var)):
        if not average.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {average.stride()}")
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(f"momentum: expected a 0-d floating tensor, got {momentum.dim()}-d {momentum.dtype}")
        _check_device("momentum", momentum, x)
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps: expected a finite number > 0, got {eps}")
    if stats not in ("update", "leave"):
        raise ValueError(f"stats: expected 'update' or 'leave', got {stats!r}")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (as x), got {tensor.device}")


# -- plain torch ------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, training: bool,
    momentum: float | Tensor, eps: float, update: bool, upsample: bool,
) -> Tensor:  # fmt: skip
    if not training:
        return _apply(x, y, gain, bias, running_mean, running_var, eps, upsample)
    wide = x.to(gain.dtype)
    mean, unbiased = wide.new_zeros(2, x.shape[1]).unbind() if update else (None, None)
    xhat = F.batch_norm(wide, mean, unbiased, training=True, momentum=1.0, eps=eps)  # momentum 1 fills both
    if mean is not None and unbiased is not None:
        _follow(running_mean, running_var, mean, unbiased, momentum)
    return _scaled(xhat, y, gain, bias, upsample).to(x.dtype)


def _follow(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) running + momentum batch, in place."""
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * var)


def _batch_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance per channel; running statistics, if given, follow."""
    mean, unbiased = x.new_zeros(2, x.shape[1]).unbind()
    F.batch_norm(x, mean, unbiased, training=True, momentum=1.0)  # fills both; torch.var_mean takes five times as long
    count = x.numel() // x.shape[1]
    if running_mean is not None and running_var is not None:
        _follow(running_mean, running_var, mean, unbiased, momentum)
    return mean, unbiased * (max(count - 1, 0) / max(count, 1)), unbiased


def _apply(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, upsample: bool
) -> Tensor:
    xhat = F.batch_norm(x.to(gain.dtype), mean, var, eps=eps)
    return _scaled(xhat, y, gain, bias, upsample).to(x.dtype)


def _scaled(xhat: Tensor, y: Tensor, gain: Tensor, bias: Tensor, upsample: bool) -> Tensor:
    """U(ReLU(gain[y] * xhat + bias[y]))."""
    out = F.relu(torch.addcmul(_per_image(bias, y), _per_image(gain, y), xhat))
    if upsample:
        out = upsample2(out)
    return out.contiguous(memory_format=torch.channels_last)


def _per_image(table: Tensor, y: Tensor) -> Tensor:
    return F.embedding(y, table)[:, :, None, None]


def _backward(
    grad_out: Tensor, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    training: bool, upsample: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, gain and bias, by what torch has for the parts."""
    if x.numel() == 0:  # torch's backward of BatchNorm divides by the number of values
        return torch.empty_like(x), torch.zeros_like(gain), torch.zeros_like(bias)
    wide, dy, scale = x.to(gain.dtype), grad_out.to(gain.dtype), _per_image(gain, y)
    xhat = F.batch_norm(wide, mean, var, eps=eps)
    if upsample:
        size = list(grad_out.shape[2:])
        dy = torch.ops.aten.upsample_bilinear2d_backward(dy, size, list(x.shape), False, 2.0, 2.0)
    dy = torch.ops.aten.threshold_backward(dy, torch.addcmul(_per_image(bias, y), scale, xhat), 0)
    dgain = torch.zeros_like(gain).index_add_(0, y, (dy * xhat).sum((2, 3)))
    dbias = torch.zeros_like(bias).index_add_(0, y, dy.sum((2, 3)))
    dx, _, _ = torch.ops.aten.native_batch_norm_backward(
        scale * dy, wide, None, mean, var, mean, (var + eps).rsqrt(), training, eps, [True, False, False]
    )
    return dx.to(x.dtype).contiguous(memory_format=torch.channels_last), dgain, dbias


# -- registered ops ---------------------------------------------------------------------------------------------------


def _stats_cpu(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, momentum_tensor: Tensor | None
) -> Tensor:
    m = momentum if momentum_tensor is None else momentum_tensor
    return torch.stack(_batch_stats(x.to(_stats_dtype(x)), running_mean, running_var, m))


def _stats_triton(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, momentum_tensor: Tensor | None
) -> Tensor:
    from puat_fast.kernels.batch_stats import batch_stats

    if x.numel() == 0:
        return _stats_fake(x, running_mean, running_var, momentum, momentum_tensor).zero_()
    x = x.contiguous(memory_format=torch.channels_last)
    m = momentum if momentum_tensor is None else momentum_tensor
    _, stats = batch_stats(x, running_mean=running_mean, running_var=running_var, momentum=m)
    for average in (running_mean, running_var):
        if average is not None and not average.is_inference():
            torch.autograd.graph.increment_version(average)  # autograd must see that what it saved of it is gone
    return stats.view(3, -1)


def _stats_fake(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, momentum_tensor: Tensor | None
) -> Tensor:
    return torch.empty(3, x.shape[1], dtype=_stats_dtype(x), device=x.device)


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _apply_triton(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, upsample: bool
) -> Tensor:
    from puat_fast.kernels import cond_bn_relu_up as kernels

    x = x.contiguous(memory_format=torch.channels_last)
    out = _apply_fake(x, y, gain, bias, mean, var, eps, upsample)
    if x.numel() > 0:
        kernels.apply(out, x, *_contiguous(y, gain, bias, mean, var), eps, upsample)
    return out


def _apply_fake(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, upsample: bool
) -> Tensor:
    images, channels, height, width = x.shape
    size = (images, channels, 2 * height, 2 * width) if upsample else x.shape
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _backward_cpu(
    grad_out: Tensor, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    training: bool, upsample: bool, needs_x: bool, needs_tables: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _backward(grad_out, x, y, gain, bias, mean, var, eps, training, upsample)
    dx, dgain, dbias = (
        t if needed else t.new_empty(0) for t, needed in zip(grads, (needs_x, needs_tables, needs_tables), strict=True)
    )
    return dx, dgain, dbias


def _backward_triton(
    grad_out: Tensor, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    training: bool, upsample: bool, needs_x: bool, needs_tables: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from puat_fast.kernels import cond_bn_relu_up as kernels

    dx, dgain, dbias = _backward_fake(
        grad_out, x, y, gain, bias, mean, var, eps, training, upsample, needs_x, needs_tables
    )  # fmt: skip
    if x.numel() == 0:
        return dx, dgain.zero_(), dbias.zero_()
    grad_out, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad_out, x))
    tables = (dgain, dbias) if needs_tables else (None, None)
    kernels.backward(
        dx if needs_x else None, *tables, grad_out, x, *_contiguous(y, gain, bias, mean, var), eps, training, upsample
    )
    return dx, dgain, dbias


def _backward_fake(
    grad_out: Tensor, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    training: bool, upsample: bool, needs_x: bool, needs_tables: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, gain and bias; of no elements where not wanted."""
    dx = torch.empty_like(x, memory_format=torch.channels_last) if needs_x else x.new_empty(0)
    shape = gain.shape if needs_tables else (0,)
    return dx, gain.new_empty(shape), gain.new_empty(shape)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


register_triton(
    "cond_bn_relu_up_stats(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    "Tensor? momentum_tensor) -> Tensor",
    reference=_stats_cpu,
    triton=_stats_triton,
    fake=_stats_fake,
)
register_triton(
    "cond_bn_relu_up(Tensor x, Tensor y, Tensor gain, Tensor bias, Tensor mean, Tensor var, float eps, bool upsample) "
    "-> Tensor",
    reference=_apply,
    triton=_apply_triton,
    fake=_apply_fake,
)
register_triton(
    "cond_bn_relu_up_backward(Tensor grad_out, Tensor x, Tensor y, Tensor gain, Tensor bias, Tensor mean, Tensor var, "
    "float eps, bool training, bool upsample, bool needs_x, bool needs_tables) -> (Tensor, Tensor, Tensor)",
    reference=_backward_cpu,
    triton=_backward_triton,
    fake=_backward_fake,
)
