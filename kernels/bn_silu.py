"""BatchNorm + SiLU, channels_last: all of it but the batch's statistics, forward and backward.

Tensors of N x C x H x W are matrices here, of a row per pixel and a column per channel; a group is a row of images.
mean and var: float32, groups x C. rstd = 1 / sqrt(var + eps) is taken by each program: cheaper than one more launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puat_fast.kernels.batch_stats import tiling

Pad = tuple[int, int, int, int]  # left, right, top, bottom, as torch.nn.functional.pad has them


@triton.jit
def _channel_parameters(mean, var, weight, bias, eps, group, cols, channels):
    """mean, rstd, weight and bias of the columns, one row each."""
    mask = cols < channels
    mean = tl.load(mean + group * channels + cols, mask, other=0.0)
    rstd = 1 / tl.sqrt(tl.load(var + group * channels + cols, mask, other=1.0) + eps)
    weight = tl.load(weight + cols, mask, other=0.0)
    bias = tl.load(bias + cols, mask, other=0.0)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def _padded_offsets(group, rows, row, cols, channels, height, width, left, right, top, bottom):
    """Where, in the padded matrix, the pixels stand that are rows `row` of a group of the unpadded one."""
    line = row // width
    image = group * (rows // (height * width)) + line // height
    padded = (image * (height + top + bottom) + line % height + top) * (width + left + right) + row % width + left
    return padded[:, None] * channels + cols[None, :]


@triton.jit
def _y_gradient(grad_out, h, mean, rstd, weight, bias):
    """(dL/dy, xhat) for y = xhat weight + bias and dL/dSiLU(y) = grad_out."""
    xhat = (h - mean) * rstd
    y = xhat * weight + bias
    s = 1 / (1 + tl.exp(-y))
    return grad_out * s * (1 + y * (1 - s)), xhat


@triton.jit
def apply_kernel(
    x, residual, h, out, mean, var, weight, bias, eps, rows, channels, chunk, height, width, left, right, top, bottom,
    HAS_RESIDUAL: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = pad(SiLU((h - mean) rstd weight + bias)), and h = x + residual on the way; `rows` are those of out."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * chunk
    count = tl.minimum(rows - first, chunk)
    group = tl.program_id(2).to(tl.int64)
    mean, rstd, weight, bias = _channel_parameters(mean, var, weight, bias, eps, group, cols, channels)
    for start in tl.range(0, count, ROWS, num_stages=3):
        tile_row = start + tl.arange(0, ROWS)
        row = first + tile_row
        mask = (tile_row < count)[:, None] & (cols < channels)[None, :]
        inside = mask
        source = group * rows + row
        if PADDED:
            line, j = row // (width + left + right), row % (width + left + right) - left
            image, i = line // (height + top + bottom), line % (height + top + bottom) - top
            inside = mask & ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None]
            images = rows // ((width + left + right) * (height + top + bottom))
            source = ((group * images + image) * height + i) * width + j
        offsets = source[:, None] * channels + cols[None, :]
        value = tl.load(x + offsets, inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + offsets, inside, other=0.0).to(tl.float32)
            stored = value.to(h.dtype.element_ty)
            tl.store(h + offsets, stored, inside)
            value = stored.to(tl.float32)
        y = (value - mean) * rstd * weight + bias
        result = tl.where(inside, y / (1 + tl.exp(-y)), 0.0)
        target = (group * rows + row)[:, None] * channels + cols[None, :]
        tl.store(out + target, result.to(out.dtype.element_ty), mask)


@triton.jit
def partial_sums_kernel(
    grad_out, h, mean, var, weight, bias, partial, eps, rows, channels, chunk, height, width, left, right, top, bottom,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy xhat over one chunk's columns; `rows` are those of h."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * chunk
    count = tl.minimum(rows - first, chunk)
    group = tl.program_id(2).to(tl.int64)
    mean, rstd, weight, bias = _channel_parameters(mean, var, weight, bias, eps, group, cols, channels)
    sum_dy = tl.zeros([ROWS, COLS], tl.float32)
    sum_dy_xhat = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=3):
        tile_row = start + tl.arange(0, ROWS)
        row = first + tile_row
        mask = (tile_row < count)[:, None] & (cols < channels)[None, :]
        offsets = (group * rows + row)[:, None] * channels + cols[None, :]
        source = offsets
        if PADDED:
            source = _padded_offsets(group, rows, row, cols, channels, height, width, left, right, top, bottom)
        g = tl.load(grad_out + source, mask, other=0.0).to(tl.float32)
        dy, xhat = _y_gradient(g, tl.load(h + offsets, mask, other=0.0).to(tl.float32), mean, rstd, weight, bias)
        sum_dy += dy  # 0 where masked, as the gradient is
        sum_dy_xhat += dy * xhat
    index = (group * tl.num_programs(1) + tl.program_id(1)) * channels + cols
    size = tl.num_programs(2) * tl.num_programs(1) * channels
    tl.store(partial + index, tl.sum(sum_dy, 0), cols < channels)
    tl.store(partial + size + index, tl.sum(sum_dy_xhat, 0), cols < channels)


@triton.jit
def combine_sums_kernel(
    partial, sums, grad_weight, grad_bias, channels, chunks, groups, CHUNKS: tl.constexpr, COLS: tl.constexpr
):
    """Sums of each group from those of its chunks, and the gradients of weight and bias from those of all groups."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_channels = cols < channels
    index = tl.arange(0, CHUNKS)
    mask = (index < chunks)[:, None] & in_channels[None, :]
    total_dy = tl.zeros([COLS], tl.float32)
    total_dy_xhat = tl.zeros([COLS], tl.float32)
    for group in range(groups):
        offsets = (group * chunks + index)[:, None] * channels + cols[None, :]
        dy = tl.sum(tl.load(partial + offsets, mask, other=0.0), 0)
        dy_xhat = tl.sum(tl.load(partial + groups * chunks * channels + offsets, mask, other=0.0), 0)
        tl.store(sums + group * channels + cols, dy, in_channels)
        tl.store(sums + (groups + group) * channels + cols, dy_xhat, in_channels)
        total_dy += dy
        total_dy_xhat += dy_xhat
    tl.store(grad_weight + cols, total_dy_xhat, in_channels)
    tl.store(grad_bias + cols, total_dy, in_channels)


@triton.jit
def input_grad_kernel(
    grad_out, grad_h, h, grad_x, mean, var, weight, bias, sums, eps, rows, channels, chunk, height, width,
    left, right, top, bottom,
    HAS_GRAD_H: tl.constexpr, TRAINING: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """grad_x = weight rstd (dy - mean(dy) - xhat mean(dy xhat)) + grad_h; in eval mode without the two means."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * chunk
    count = tl.minimum(rows - first, chunk)
    group = tl.program_id(2).to(tl.int64)
    mean, rstd, weight, bias = _channel_parameters(mean, var, weight, bias, eps, group, cols, channels)
    if TRAINING:
        index = group * channels + cols
        mean_dy = tl.load(sums + index, cols < channels, other=0.0)[None, :] / rows
        index += tl.num_programs(2) * channels
        mean_dy_xhat = tl.load(sums + index, cols < channels, other=0.0)[None, :] / rows
    for start in tl.range(0, count, ROWS, num_stages=3):
        tile_row = start + tl.arange(0, ROWS)
        row = first + tile_row
        mask = (tile_row < count)[:, None] & (cols < channels)[None, :]
        offsets = (group * rows + row)[:, None] * channels + cols[None, :]
        source = offsets
        if PADDED:
            source = _padded_offsets(group, rows, row, cols, channels, height, width, left, right, top, bottom)
        g = tl.load(grad_out + source, mask, other=0.0).to(tl.float32)
        dy, xhat = _y_gradient(g, tl.load(h + offsets, mask, other=0.0).to(tl.float32), mean, rstd, weight, bias)
        if TRAINING:
            dy -= mean_dy + xhat * mean_dy_xhat
        result = weight * rstd * dy
        if HAS_GRAD_H:
            result += tl.load(grad_h + offsets, mask, other=0.0).to(tl.float32)
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask)


def apply(
    x: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, pad: Pad
) -> tuple[Tensor, Tensor]:
    """(out, h): h = x + residual, or x itself; out = pad(SiLU((h - mean) rstd weight + bias)), zeros in the pad."""
    n, channels, height, width = x.shape
    left, right, top, bottom = pad
    shape = (n, channels, height + top + bottom, width + left + right)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    h = x if residual is None else torch.empty_like(x, memory_format=torch.channels_last)
    groups = mean.shape[0]
    rows = n // groups * shape[2] * shape[3]
    t = tiling(rows, channels, groups)
    apply_kernel[t.grid](
        x, residual, h, out, mean, var, weight, bias, eps, rows, channels, t.chunk, height, width, *pad,
        HAS_RESIDUAL=residual is not None, PADDED=any(pad), ROWS=t.rows, COLS=t.cols,
    )  # fmt: skip
    return out, h


def reduce(
    grad_out: Tensor, h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, pad: Pad
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums, grad_weight, grad_bias): sums, 2 x groups x C, of dy and of dy xhat, dy being the gradient before SiLU."""
    n, channels, height, width = h.shape
    groups = mean.shape[0]
    rows = n // groups * height * width
    t = tiling(rows, channels, groups)
    partial = torch.empty(2, groups, t.chunks, channels, dtype=torch.float32, device=h.device)
    sums = torch.empty(2, groups, channels, dtype=torch.float32, device=h.device)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    partial_sums_kernel[t.grid](
        grad_out, h, mean, var, weight, bias, partial, eps, rows, channels, t.chunk, height, width, *pad,
        PADDED=any(pad), ROWS=t.rows, COLS=t.cols,
    )  # fmt: skip
    combine_sums_kernel[(triton.cdiv(channels, 16),)](
        partial, sums, grad_weight, grad_bias, channels, t.chunks, groups,
        CHUNKS=triton.next_power_of_2(t.chunks), COLS=16,
    )  # fmt: skip
    return sums, grad_weight, grad_bias


def input_grad(
    grad_out: Tensor, grad_h: Tensor | None, h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    sums: Tensor | None, eps: float, pad: Pad,
) -> Tensor:  # fmt: skip
    """The gradient at x and at residual; grad_h is what comes to h beside. sums: None in eval mode."""
    n, channels, height, width = h.shape
    groups = mean.shape[0]
    rows = n // groups * height * width
    t = tiling(rows, channels, groups)
    grad_x = torch.empty_like(h, memory_format=torch.channels_last)
    input_grad_kernel[t.grid](
        grad_out, grad_h, h, grad_x, mean, var, weight, bias, sums, eps, rows, channels, t.chunk, height, width, *pad,
        HAS_GRAD_H=grad_h is not None, TRAINING=sums is not None, PADDED=any(pad), ROWS=t.rows, COLS=t.cols,
    )  # fmt: skip
    return grad_x
