"""bn_silu: batch normalisation, SiLU, the residual addition before them and the padding after them, together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._layout import capsules, check_dtype, check_like
from puat_fast.ops._library import INTERPRETED, Impl, register, takes_reference
from puat_fast.ops._native import _C

Pad = tuple[int, int, int, int]


class BnSilu(NamedTuple):
    """What bn_silu gives. mean and var: groups x C, in train mode; None in eval mode."""

    out: Tensor
    h: Tensor | None  # None where it was not asked for
    mean: Tensor | None
    var: Tensor | None  # unbiased, as running statistics take it


def bn_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float | Tensor = 0.01,
    eps: float = 1e-5,
    groups: int = 1,
    residual: Tensor | None = None,
    pad: Pad = (0, 0, 0, 0),
    give_h: bool = True,
    impl: Impl = "auto",
) -> BnSilu:
    """Normalise h = x + residual per channel, then scale, shift, SiLU and pad; h itself is given out too.

        out = pad(SiLU((h - mean) / sqrt(var + eps) * weight + bias)),    SiLU(y) = y / (1 + exp(-y))

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1, and Elfwing et al. 2017 (arXiv:1702.03118).

    In train mode, mean and (biased) var are those of h over the pixels of a group: group g is the images
    [g N / groups, (g + 1) N / groups). The running statistics become (1 - momentum) running + momentum batch in place,
    with the unbiased variance, one group after the other; where they are None they are left alone, and
    `update_running_stats` may do it later from the result's mean and var. In eval mode the running statistics
    normalise, and `groups` says nothing.

    float32 and bfloat16 are computed in float32: on a GPU by the Triton kernels, on the CPU, where x is channels_last,
    by the C++ kernels. residual and the gradients, on a GPU x too, are made channels_last where they are not; out and h
    are channels_last. All else takes the reference.

    Args:
        x: N x C x H x W; float32, bfloat16 or float64.
        weight, bias, running_mean, running_var: C, contiguous; float64 for float64 x, else float32.
        training: by the batch's statistics (true) or by the running ones.
        momentum: a number, or a 0-d tensor on x's device, of any floating dtype.
        eps: finite, > 0.
        groups: divides N.
        residual: like x; None stands for zero.
        pad: columns left, right and rows top, bottom of zeros around out, as in torch.nn.functional.pad.
        give_h: whether h is read by anybody else. Where it is not, say so: a compiled backward would else make zeros
            for its gradient, and add them.
        impl: "auto", or "reference" for plain torch.

    Returns:
        BnSilu(out, h, mean, var). Gradients flow from out and h to x, residual, weight and bias; not twice.

    Raises:
        ValueError: an argument is not as said; train mode with one value per channel and group; impl unknown.
    """
    _check(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, groups, pad)
    if takes_reference(impl) or not _has_kernel(x):
        plain = _reference(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, groups, pad)
        return plain if give_h else plain._replace(h=None)
    x = _channels_last(x)
    residual = None if residual is None else _channels_last(residual)
    out, stats, *h = _BnSilu.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, groups, pad, give_h
    )
    mean, var = (stats[0], stats[2]) if training else (None, None)
    return BnSilu(out, h[0] if h else None, mean, var)


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float | Tensor
) -> None:
    """The update that `bn_silu` spared: running = (1 - momentum) running + momentum batch, in place, group by group.

    Args:
        running_mean, running_var: C.
        mean, var: groups x C, from bn_silu.
        momentum: a number, or a 0-d tensor on their device.
    """
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, var)):
            for of_group in batch:
                running.copy_((1 - momentum) * running + momentum * of_group)


def _reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float | Tensor, eps: float, groups: int, pad: Pad,
) -> BnSilu:  # fmt: skip
    h = x if residual is None else x + residual
    wide = h.float() if x.dtype == torch.bfloat16 else h
    mean = var = None
    if training:
        # with momentum 1, F.batch_norm leaves the batch's own statistics in these
        mean, var = (torch.zeros(groups, h.shape[1], dtype=wide.dtype, device=h.device) for _ in range(2))
        y = torch.cat([
            F.batch_norm(part, mean[g], var[g], weight, bias, training=True, momentum=1.0, eps=eps)
            for g, part in enumerate(wide.chunk(groups))
        ]) if groups > 1 else F.batch_norm(wide, mean[0], var[0], weight, bias, True, 1.0, eps)  # fmt: skip
        if running_mean is not None and running_var is not None and x.numel():
            update_running_stats(running_mean, running_var, mean, var, momentum)
    else:
        y = F.batch_norm(wide, running_mean, running_var, weight, bias, eps=eps)
    out = F.silu(y).to(x.dtype)
    return BnSilu(F.pad(out, pad) if any(pad) else out, h, mean, var)


def _check(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float | Tensor, eps: float, groups: int, pad: Pad,
) -> None:  # fmt: skip
    check_dtype("x", x, torch.float32, torch.bfloat16, torch.float64)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape N x C x H x W, got {tuple(x.shape)}")
    if residual is not None:
        check_like(x, residual=residual)
    _check_vectors(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if running_mean is None and not training:
        raise ValueError("running_mean: expected a tensor in eval mode, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_var: expected a tensor, or None, as running_mean is")
    if isinstance(momentum, Tensor):
        if momentum.dim() or not momentum.is_floating_point() or momentum.device != x.device:
            got = f"shape {tuple(momentum.shape)}, {momentum.dtype}, on {momentum.device}"
            raise ValueError(f"momentum: expected a number or a 0-d floating tensor on {x.device}, got {got}")
    elif not math.isfinite(momentum):
        raise ValueError(f"momentum: expected a finite number, got {momentum}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps: expected a finite number > 0, got {eps}")
    if groups < 1 or x.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of N = {x.shape[0]}, got {groups}")
    if len(pad) != 4 or min(pad) < 0:
        raise ValueError(f"pad: expected four numbers >= 0 (left, right, top, bottom), got {pad}")
    if training and x.shape[0] // groups * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"x: expected more than 1 value per channel and group in train mode, got shape {tuple(x.shape)}"
        )


def _check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    expected = (x.shape[1],), torch.float64 if x.dtype == torch.float64 else torch.float32, x.device, True
    for name, vector in vectors.items():
        if vector is None:
            continue
        got = tuple(vector.shape), vector.dtype, vector.device, vector.is_contiguous()
        for what, a, b in zip(("shape", "dtype", "device", "contiguous:"), expected, got, strict=True):
            if a != b:
                raise ValueError(f"{name}: expected {what} {a}, got {b}")


def _has_kernel(x: Tensor) -> bool:
    if x.numel() == 0 or x.dtype == torch.float64:
        return False
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return x.is_cuda or INTERPRETED or is_channels_last


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class _BnSilu(torch.autograd.Function):
    """Gradients by the backward op. Its tensors are channels_last."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
        running_var: Tensor | None, training: bool, momentum: float | Tensor, eps: float, groups: int, pad: Pad,
        give_h: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
        out, h, stats = torch.ops.puat_fast.bn_silu_forward(
            x, residual, weight, bias, running_mean, running_var, training, number, tensor, eps, groups, pad
        )
        h = x if residual is None else h
        statistics = stats[:2] if training else (running_mean, running_var)
        ctx.save_for_backward(h, weight, bias, *statistics)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.training, ctx.eps, ctx.pad = training, eps, pad
        return (out, stats, h) if give_h else (out, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: None, grad_h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, bias, mean, var = ctx.saved_tensors
        if not ctx.training:
            mean, var = mean[None], var[None]
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        grad_x, grad_weight, grad_bias = grad_h, None, None  # where nothing came to out
        if grad_out is not None:
            grad_x, grad_weight, grad_bias = torch.ops.puat_fast.bn_silu_backward(
                _channels_last(grad_out), None if grad_h is None else _channels_last(grad_h), h, mean, var, weight,
                bias, ctx.eps, ctx.pad, ctx.training, need_x or need_residual, need_weight or need_bias,
            )  # fmt: skip
        needed = (grad_x, need_x), (grad_x, need_residual), (grad_weight, need_weight), (grad_bias, need_bias)
        return *(grad if need else None for grad, need in needed), *(None,) * 8


def _forward_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, momentum_tensor: Tensor | None, eps: float,
    groups: int, pad: Pad,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from puat_fast.kernels.batch_stats import batch_stats
    from puat_fast.kernels.bn_silu import apply

    with torch.cuda.device_of(x):
        if training:
            m = momentum if momentum_tensor is None else momentum_tensor
            h, stats = batch_stats(x, residual, groups, running_mean, running_var, m)
            _bump_versions(running_mean, running_var)
            out, _ = apply(h, None, stats[0], stats[1], weight, bias, eps, pad)
        else:
            assert running_mean is not None and running_var is not None
            out, h = apply(x, residual, running_mean[None], running_var[None], weight, bias, eps, pad)
            stats = x.new_empty(0, dtype=torch.float32)
    return out, x.new_empty(0) if residual is None else h, stats


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, momentum_tensor: Tensor | None, eps: float,
    groups: int, pad: Pad,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, h, stats = _forward_fake(
        x, residual, weight, bias, running_mean, running_var, training, momentum, momentum_tensor, eps, groups, pad
    )
    threads, summed = torch.get_num_threads(), x if residual is None else h
    if training:
        m = momentum if momentum_tensor is None else float(momentum_tensor)
        mean, var, unbiased = stats
        rstd = torch.empty_like(mean)
        optional = _capsules(None if residual is None else h, x, residual, running_mean, running_var)
        _C.bn_silu_stats_cpu(*capsules(mean, var, rstd), *optional, m, eps, groups, threads)
        _bump_versions(running_mean, running_var)
        pixels = x.numel() // (groups * x.shape[1])
        torch.mul(var, pixels / (pixels - 1), out=unbiased)
    else:
        assert running_mean is not None and running_var is not None
        mean, rstd = running_mean[None], _rstd(running_var[None], eps)
        if residual is not None:
            torch.add(x, residual, out=h)
    _C.bn_silu_apply_cpu(*capsules(out, summed, mean, rstd, weight, bias), *pad, threads)
    return out, h, stats


def _rstd(var: Tensor, eps: float) -> Tensor:
    return (var + eps).rsqrt_()


def _capsules(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else capsules(tensor)[0] for tensor in tensors]


def _bump_versions(*buffers: Tensor | None) -> None:
    """Autograd must see that what it saved of the running statistics is gone."""
    for buffer in buffers:
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, momentum_tensor: Tensor | None, eps: float,
    groups: int, pad: Pad,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, channels, height, width = x.shape
    left, right, top, bottom = pad
    shape = (n, channels, height + top + bottom, width + left + right)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.channels_last)
    return out, h, x.new_empty((3, groups, channels) if training else 0, dtype=torch.float32)


def _backward_triton(
    grad_out: Tensor, grad_h: Tensor | None, h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    eps: float, pad: Pad, training: bool, need_input: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from puat_fast.kernels.bn_silu import input_grad, reduce

    sums, grad_x, grad_weight, grad_bias = None, h.new_empty(0), weight.new_empty(0), bias.new_empty(0)
    with torch.cuda.device_of(h):
        if training or need_affine:
            sums, grad_weight, grad_bias = reduce(grad_out, h, mean, var, weight, bias, eps, pad)
        if need_input:
            of_batch = sums if training else None
            grad_x = input_grad(grad_out, grad_h, h, mean, var, weight, bias, of_batch, eps, pad)
    return grad_x, grad_weight, grad_bias


def _backward_native(
    grad_out: Tensor, grad_h: Tensor | None, h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    eps: float, pad: Pad, training: bool, need_input: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, grad_weight, grad_bias = _backward_fake(
        grad_out, grad_h, h, mean, var, weight, bias, eps, pad, training, need_input, need_affine
    )
    sums = torch.empty_like(mean), torch.empty_like(mean)
    normalisation, extent = capsules(mean, _rstd(var, eps), weight, bias), (*pad, torch.get_num_threads())
    if training and need_input:
        _C.bn_silu_backward_cpu(*_capsules(grad_x, *sums, grad_out, grad_h, h), *normalisation, *extent)
    else:
        if training or need_affine:
            _C.bn_silu_reduce_cpu(*capsules(*sums, grad_out, h), *normalisation, *extent)
        if need_input:
            given = _capsules(grad_x, grad_out, grad_h, h)
            _C.bn_silu_input_grad_cpu(*given, *normalisation, None, None, *extent)
    if training or need_affine:
        torch.sum(sums[1], 0, out=grad_weight)
        torch.sum(sums[0], 0, out=grad_bias)
    return grad_x, grad_weight, grad_bias


def _backward_fake(
    grad_out: Tensor, grad_h: Tensor | None, h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    eps: float, pad: Pad, training: bool, need_input: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = torch.empty_like(h, memory_format=torch.channels_last) if need_input else h.new_empty(0)
    reduced = training or need_affine
    grad_weight, grad_bias = (torch.empty_like(t) if reduced else t.new_empty(0) for t in (weight, bias))
    return grad_x, grad_weight, grad_bias


register(
    "bn_silu_forward(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, Tensor? momentum_tensor, float eps, int groups, "
    "int[] pad) -> (Tensor out, Tensor h, Tensor stats)",
    cpu=_forward_triton if INTERPRETED else _forward_native,
    cuda=_forward_triton,
    fake=_forward_fake,
)
register(
    "bn_silu_backward(Tensor grad_out, Tensor? grad_h, Tensor h, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
    "float eps, int[] pad, bool training, bool need_input, bool need_affine) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    cpu=_backward_triton if INTERPRETED else _backward_native,
    cuda=_backward_triton,
    fake=_backward_fake,
)
