"""Kernels of hinge and hinge_by_class: partial sums of a mean, one per program, and the mean's gradient.

A form of the loss is a static argument: "real" is relu(1 - d), "fake" relu(1 + d), "linear" -d.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # scores that one program takes
TILE = 4096  # of each input of hinge_by_class, what one program holds; a power of two


@triton.jit
def _value(d, FORM: tl.constexpr):
    if FORM == "linear":
        value = -d
    else:
        margin = 1 - d if FORM == "real" else 1 + d
        value = tl.where(margin <= 0, 0.0, margin)  # NaN stays NaN, as in torch.relu
    return value


@triton.jit
def _slope(d, FORM: tl.constexpr):
    if FORM == "linear":
        slope = tl.zeros_like(d) - 1
    elif FORM == "real":
        slope = tl.where(1 - d <= 0, 0.0, -1.0)
    else:
        slope = tl.where(1 + d <= 0, 0.0, 1.0)
    return slope


@triton.jit
def _load(rows, stride, row, column, n, k):
    """Elements of N x K rows in float32, 0 outside."""
    inside = (row < n)[:, None] & (column < k)[None, :]
    return tl.load(rows + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(rows, value, row, column, n, k):
    inside = (row < n)[:, None] & (column < k)[None, :]
    at = rows + row[:, None] * k + column[None, :]
    tl.store(at, value.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _softmax(x, column, k):
    x = tl.where((column < k)[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def hinge_kernel(partials, d, scale, size, FORM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = _value(tl.load(d + i, mask=i < size, other=0.0).to(tl.float32), FORM)
    tl.store(partials + tl.program_id(0), scale * tl.sum(tl.where(i < size, value, 0.0), 0))


@triton.jit
def hinge_backward_kernel(grad_d, grad, d, scale, size, FORM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slope = _slope(tl.load(d + i, mask=i < size, other=0.0).to(tl.float32), FORM)
    out = scale * tl.load(grad).to(tl.float32) * slope
    tl.store(grad_d + i, out.to(grad_d.dtype.element_ty), mask=i < size)


@triton.jit
def hinge_by_class_kernel(
    partials, d, logits, stride_d, stride_logits, scale, n, k,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    p = _softmax(_load(logits, stride_logits, row, column, n, k), column, k)
    scores = _load(d, stride_d, row, column, n, k)
    by_row = tl.sum(p * _value(scores, FORM), 1)
    tl.store(partials + tl.program_id(0), scale * tl.sum(tl.where(row < n, by_row, 0.0), 0))


@triton.jit
def hinge_by_class_backward_kernel(
    grad_d, grad_logits, grad, d, logits, stride_d, stride_logits, scale, n, k,
    FORM: tl.constexpr, WANTS_D: tl.constexpr, WANTS_LOGITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    p = _softmax(_load(logits, stride_logits, row, column, n, k), column, k)
    scores = _load(d, stride_d, row, column, n, k)
    weight = scale * tl.load(grad).to(tl.float32) * p
    if WANTS_D:
        _store(grad_d, weight * _slope(scores, FORM), row, column, n, k)
    if WANTS_LOGITS:
        value = _value(scores, FORM)
        _store(grad_logits, weight * (value - tl.sum(p * value, 1)[:, None]), row, column, n, k)


def hinge(d: Tensor, form: str) -> Tensor:
    """The partial sums of mean(form(d)), float32."""
    d, size = d.contiguous(), d.numel()
    partials = d.new_empty(_programs(size, BLOCK), dtype=torch.float32)
    hinge_kernel[partials.shape](partials, d, _reciprocal(size), size, form, BLOCK)
    return partials


def hinge_backward(out: Tensor, grad: Tensor, d: Tensor, form: str) -> None:
    """The gradient to d into `out`, contiguous, of d's shape; grad: that of the mean."""
    d, size = d.contiguous(), d.numel()
    hinge_backward_kernel[(_programs(size, BLOCK),)](out, grad, d, _reciprocal(size), size, form, BLOCK)


def hinge_by_class(d: Tensor, logits: Tensor, form: str) -> Tensor:
    """The partial sums of mean_b sum_k softmax(logits)_bk form(d_bk), float32; d, logits: N x K."""
    d, logits = _dense_rows(d), _dense_rows(logits)
    n, k = d.shape
    rows, columns = _tile(k)
    partials = d.new_empty(_programs(n, rows), dtype=torch.float32)
    hinge_by_class_kernel[partials.shape](
        partials, d, logits, d.stride(0), logits.stride(0), _reciprocal(n), n, k, form, rows, columns, num_warps=8
    )
    return partials


def hinge_by_class_backward(
    grad_d: Tensor, grad_logits: Tensor, grad: Tensor, d: Tensor, logits: Tensor, form: str,
    wants_d: bool, wants_logits: bool,
) -> None:  # fmt: skip
    """The gradients to d and to logits into `grad_d` and `grad_logits`, contiguous N x K, those that are wanted."""
    d, logits = _dense_rows(d), _dense_rows(logits)
    n, k = d.shape
    rows, columns = _tile(k)
    hinge_by_class_backward_kernel[(_programs(n, rows),)](
        grad_d, grad_logits, grad, d, logits, d.stride(0), logits.stride(0), _reciprocal(n), n, k,
        form, wants_d, wants_logits, rows, columns, num_warps=8,
    )  # fmt: skip


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
