"""Kernels of softmax_mse: partial sums of the loss, one per program, and the gradient to the first logits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # of each input, what one program holds; a power of two


@triton.jit
def _load(rows, stride, row, column, n, k):
    """Elements of N x K rows in float32, 0 outside."""
    inside = (row < n)[:, None] & (column < k)[None, :]
    return tl.load(rows + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _softmax(x, column, k):
    x = tl.where((column < k)[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def softmax_mse_kernel(partials, a, b, stride_a, stride_b, scale, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    off = _softmax(_load(a, stride_a, row, column, n, k), column, k)
    off -= _softmax(_load(b, stride_b, row, column, n, k), column, k)
    by_row = tl.sum(off * off, 1)
    tl.store(partials + tl.program_id(0), scale * tl.sum(tl.where(row < n, by_row, 0.0), 0))


@triton.jit
def softmax_mse_backward_kernel(
    grad_a, grad, a, b, stride_a, stride_b, scale, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    p = _softmax(_load(a, stride_a, row, column, n, k), column, k)
    off = p - _softmax(_load(b, stride_b, row, column, n, k), column, k)
    out = 2 * scale * tl.load(grad).to(tl.float32) * p * (off - tl.sum(p * off, 1)[:, None])
    at = grad_a + row[:, None] * k + column[None, :]
    tl.store(at, out.to(grad_a.dtype.element_ty), mask=(row < n)[:, None] & (column < k)[None, :])


def softmax_mse(a: Tensor, b: Tensor, over_classes: str) -> Tensor:
    """The partial sums of mean_b mean_k (or "sum") of (softmax(a) - softmax(b))^2, float32; a, b: N x K."""
    a, b = _dense_rows(a), _dense_rows(b)
    n, k = a.shape
    rows, columns = _tile(k)
    partials = a.new_empty(max(1, triton.cdiv(n, rows)), dtype=torch.float32)  # of nothing too there is a sum
    softmax_mse_kernel[partials.shape](
        partials, a, b, a.stride(0), b.stride(0), _scale(n, k, over_classes), n, k, rows, columns, num_warps=8
    )
    return partials


def softmax_mse_backward(out: Tensor, grad: Tensor, a: Tensor, b: Tensor, over_classes: str) -> None:
    """The gradient to a into `out`, contiguous N x K; grad: that of the loss."""
    a, b = _dense_rows(a), _dense_rows(b)
    n, k = a.shape
    rows, columns = _tile(k)
    softmax_mse_backward_kernel[(max(1, triton.cdiv(n, rows)),)](
        out, grad, a, b, a.stride(0), b.stride(0), _scale(n, k, over_classes), n, k, rows, columns, num_warps=8
    )


def _tile(k: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two: whole rows, at least one."""
    columns = triton.next_power_of_2(k)
    return max(1, TILE // columns), columns


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _scale(n: int, k: int, over_classes: str) -> float:
    terms = n * k if over_classes == "mean" else n
    return 1 / terms if terms else math.nan  # the mean of nothing, as torch has it
