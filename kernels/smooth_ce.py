"""Kernels of smooth_ce and cw_margin: partial sums of the loss, one per program, and the gradient to the logits.

A label that is no class makes the loss and its row of the gradient NaN: a GPU cannot raise without being waited for.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # of the logits, what one program holds; a power of two


@triton.jit
def _load(rows, stride, row, column, n, k, other):
    """Elements of N x K rows in float32: 0 beyond the last row, `other` beyond the last column."""
    inside = (row < n)[:, None] & (column < k)[None, :]
    x = tl.load(rows + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where((column < k)[None, :], x, other)


@triton.jit
def _store(rows, value, row, column, n, k):
    inside = (row < n)[:, None] & (column < k)[None, :]
    at = rows + row[:, None] * k + column[None, :]
    tl.store(at, value.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def smooth_ce_kernel(
    partials, logits, y, stride, smoothing, scale, n, k,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    label = tl.load(y + row, mask=row < n, other=0)
    x = _load(logits, stride, row, column, n, k, float("-inf"))
    x -= tl.max(x, 1)[:, None]
    log_sum = tl.log(tl.sum(tl.exp(x), 1))
    loss = log_sum - tl.sum(tl.where(column[None, :] == label[:, None], x, 0.0), 1)
    if SMOOTH:
        uniform = log_sum - tl.sum(tl.where((column < k)[None, :], x, 0.0), 1) / k
        loss = (1 - smoothing) * loss + smoothing * uniform
    loss = tl.where((label >= 0) & (label < k), loss, float("nan"))
    tl.store(partials + tl.program_id(0), scale * tl.sum(tl.where(row < n, loss, 0.0), 0))


@triton.jit
def smooth_ce_backward_kernel(
    grad_logits, grad, logits, y, stride, smoothing, scale, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    label = tl.load(y + row, mask=row < n, other=0)
    x = _load(logits, stride, row, column, n, k, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    target = tl.where(column[None, :] == label[:, None], 1 - smoothing, 0.0) + smoothing / k
    off = e / tl.sum(e, 1)[:, None] - target
    known = (label >= 0) & (label < k)
    weight = tl.where(known, scale * tl.load(grad).to(tl.float32), float("nan"))
    _store(grad_logits, weight[:, None] * off, row, column, n, k)


@triton.jit
def _margin(x, label, column, k):
    """(l_y - max_{k != y} l_k, NaN where a logit is or where y is no class; that maximum; the other logits)."""
    of_label = column[None, :] == label[:, None]
    others = tl.where(of_label, float("-inf"), x)
    highest = tl.max(others, 1)
    margin = tl.sum(tl.where(of_label, x, 0.0), 1) - highest
    nans = tl.sum(tl.where(x == x, 0.0, 1.0), 1)  # max passes over them
    return tl.where((label >= 0) & (label < k) & (nans == 0), margin, float("nan")), highest, others


@triton.jit
def cw_margin_kernel(partials, logits, y, stride, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    label = tl.load(y + row, mask=row < n, other=0)
    margin, _, _ = _margin(_load(logits, stride, row, column, n, k, float("-inf")), label, column, k)
    margin = tl.where(margin < 0, 0.0, margin)
    tl.store(partials + tl.program_id(0), -tl.sum(tl.where(row < n, margin, 0.0), 0))


@triton.jit
def cw_margin_backward_kernel(grad_logits, grad, logits, y, stride, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    label = tl.load(y + row, mask=row < n, other=0)
    margin, highest, others = _margin(_load(logits, stride, row, column, n, k, float("-inf")), label, column, k)
    highest_too = ((others == highest[:, None]) & (column < k)[None, :]).to(tl.float32)
    share = highest_too / tl.sum(highest_too, 1)[:, None]
    direction = tl.where(column[None, :] == label[:, None], -1.0, share)
    weight = tl.where(margin >= 0, tl.load(grad).to(tl.float32), tl.where(margin < 0, 0.0, float("nan")))
    _store(grad_logits, weight[:, None] * direction, row, column, n, k)


def smooth_ce(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """The partial sums of the mean cross-entropy, float32; logits: N x K, y: int64 N."""
    logits, y = _dense_rows(logits), y.contiguous()
    n, k = logits.shape
    rows, columns = _tile(k)
    partials = logits.new_empty(_programs(n, rows), dtype=torch.float32)
    smooth_ce_kernel[partials.shape](
        partials, logits, y, logits.stride(0), label_smoothing, _reciprocal(n), n, k,
        label_smoothing != 0, rows, columns, num_warps=8,
    )  # fmt: skip
    return partials


def smooth_ce_backward(out: Tensor, grad: Tensor, logits: Tensor, y: Tensor, label_smoothing: float) -> None:
    """The gradient to the logits into `out`, contiguous N x K; grad: that of the mean."""
    logits, y = _dense_rows(logits), y.contiguous()
    n, k = logits.shape
    rows, columns = _tile(k)
    smooth_ce_backward_kernel[(_programs(n, rows),)](
        out, grad, logits, y, logits.stride(0), label_smoothing, _reciprocal(n), n, k, rows, columns, num_warps=8
    )


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The partial sums of -sum max(l_y - max_{k != y} l_k, 0), float32; logits: N x K, y: int64 N."""
    logits, y = _dense_rows(logits), y.contiguous()
    n, k = logits.shape
    rows, columns = _tile(k)
    partials = logits.new_empty(_programs(n, rows), dtype=torch.float32)
    cw_margin_kernel[partials.shape](partials, logits, y, logits.stride(0), n, k, rows, columns, num_warps=8)
    return partials


def cw_margin_backward(out: Tensor, grad: Tensor, logits: Tensor, y: Tensor) -> None:
    """The gradient to the logits into `out`, contiguous N x K; grad: that of the sum."""
    logits, y = _dense_rows(logits), y.contiguous()
    n, k = logits.shape
    rows, columns = _tile(k)
    cw_margin_backward_kernel[(_programs(n, rows),)](
        out, grad, logits, y, logits.stride(0), n, k, rows, columns, num_warps=8
    )


def _tile(k: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two: whole rows, at least one."""
    columns = triton.next_power_of_2(k)
    return max(1, TILE // columns), columns


def _programs(size: int, block: int) -> int:
    return max(1, triton.cdiv(size, block))  # of nothing too there is a sum


def _reciprocal(size: int) -> float:
    return 1 / size if size else math.nan  # the mean of nothing, as torch has it


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()
