"""Mean and variance per channel of a channels_last batch: partial ones of row chunks, then their combination."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements that a program computes on at a time: 8 a thread of 4 warps, and about 72 registers, so that ...
PROGRAMS = 7 * 132  # ... seven programs share a multiprocessor: what an H200 holds at once
MAX_CHUNKS = 256  # what combine_stats_kernel holds in registers


class Tiling(NamedTuple):
    """How a matrix of rows x channels is dealt out: program (i, j) walks through chunk j in tiles of rows x cols."""

    rows: int  # of a tile
    cols: int  # of a tile
    chunk: int  # rows of a chunk
    chunks: int
    grid: tuple[int, int, int]  # column blocks, which lie side by side in memory, then chunks, then groups


def tiling(rows: int, channels: int, groups: int) -> Tiling:
    """The tiling of `groups` matrices of rows x channels, rows > 0.

    A tile is as wide as the largest power of two that divides the channels: no lane idles (32 of C's 160, 64 of 320,
    128 of 640; five blocks each), and a row of it is 64 bytes or more of bfloat16. Where that is under 16 (3, 17
    channels), the last block is masked. The rows are dealt out so that all programs run at once, and each as long as
    the others: a reduction then has few partial results, and an elementwise pass loads its parameters once.
    """
    cols = min(channels & -channels, 128)
    if cols < 16:
        cols = min(max(triton.next_power_of_2(channels), 16), 64)
    tile_rows = TILE // cols
    blocks, tiles = triton.cdiv(channels, cols), triton.cdiv(rows, tile_rows)
    chunks = min(triton.cdiv(PROGRAMS, blocks * groups), MAX_CHUNKS)
    chunk = triton.cdiv(tiles, chunks) * tile_rows
    chunks = triton.cdiv(rows, chunk)
    return Tiling(tile_rows, cols, chunk, chunks, (blocks, chunks, groups))


@triton.jit
def partial_stats_kernel(
    x, residual, h, partial, rows, channels, chunk, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Mean, and sum of squared deviations from it, of one chunk's columns; h = x + residual on the way."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * chunk
    count = tl.minimum(rows - first, chunk)
    group = tl.program_id(2).to(tl.int64)
    total = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    shift = tl.zeros([COLS], tl.float32)
    # num_stages: the next two tiles are on their way while one is computed on
    for start in tl.range(0, count, ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (cols < channels)[None, :]
        offsets = (group * rows + first + row)[:, None] * channels + cols[None, :]
        value = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + offsets, mask, other=0.0).to(tl.float32)
            stored = value.to(h.dtype.element_ty)
            tl.store(h + offsets, stored, mask)
            value = stored.to(tl.float32)  # the statistics are those of what is stored
        if start == 0:
            # Sums are taken about the first tile's mean: squares then cancel at most by the number of tiles.
            shift = tl.sum(value, 0) / tl.minimum(count, ROWS)
        deviation = tl.where(mask, value - shift[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    offset = tl.sum(total, 0) / count
    m2 = tl.maximum(tl.sum(squares, 0) - offset * offset * count, 0.0)
    index = (group * tl.num_programs(1) + tl.program_id(1)) * channels + cols
    size = tl.num_programs(2) * tl.num_programs(1) * channels
    tl.store(partial + index, shift + offset, cols < channels)
    tl.store(partial + size + index, m2, cols < channels)


@triton.jit
def combine_stats_kernel(
    partial, stats, running_mean, running_var, momentum, rows, channels, chunk, chunks, groups,
    UPDATES: tl.constexpr, MOMENTUM_IS_TENSOR: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Statistics of each group from those of its chunks (Chan et al. 1979), then the running ones, group by group."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_channels = cols < channels
    chunk_index = tl.arange(0, CHUNKS)
    count = tl.minimum(tl.maximum(rows - chunk_index * chunk, 0), chunk).to(tl.float32)[:, None]
    mask = (chunk_index < chunks)[:, None] & in_channels[None, :]
    if UPDATES:
        average = tl.load(running_mean + cols, in_channels, other=0.0)
        average_var = tl.load(running_var + cols, in_channels, other=0.0)
        m = tl.load(momentum).to(tl.float32) if MOMENTUM_IS_TENSOR else momentum
    for group in range(groups):
        offsets = (group * chunks + chunk_index)[:, None] * channels + cols[None, :]
        means = tl.load(partial + offsets, mask, other=0.0)
        m2 = tl.load(partial + groups * chunks * channels + offsets, mask, other=0.0)
        shift = tl.load(partial + group * chunks * channels + cols, in_channels, other=0.0)
        mean = shift + tl.sum(count * (means - shift[None, :]), 0) / rows
        deviation = means - mean[None, :]
        m2_total = tl.sum(m2 + count * deviation * deviation, 0)
        unbiased = m2_total / (rows - 1)
        index = group * channels + cols
        tl.store(stats + index, mean, in_channels)
        tl.store(stats + groups * channels + index, m2_total / rows, in_channels)
        tl.store(stats + 2 * groups * channels + index, unbiased, in_channels)
        if UPDATES:
            average = (1 - m) * average + m * mean
            average_var = (1 - m) * average_var + m * unbiased
    if UPDATES:
        tl.store(running_mean + cols, average, in_channels)
        tl.store(running_var + cols, average_var, in_channels)


def batch_stats(
    x: Tensor,
    residual: Tensor | None = None,
    groups: int = 1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | Tensor = 0.1,
) -> tuple[Tensor, Tensor]:
    """(h, stats): h = x + residual, rounded to x's dtype, or x itself; stats float32, 3 x groups x C.

    stats[0] is the mean of h per group and channel, stats[1] the biased variance, by which a batch is normalised,
    stats[2] the unbiased one, which running statistics take over; 1 / sqrt(stats[1] + eps) is the user's to take. Good
    for means far larger than the deviation. Bitwise repeatable.

    Args:
        x: N x C x H x W, dense in channels_last order, float32 or bfloat16; N H W > groups; not checked here.
        residual: like x, or None.
        groups: group g is the images [g N / groups, (g + 1) N / groups).
        running_mean, running_var: float32, C; become (1 - m) running + m batch in place, one group after the other.
            None: left alone.
        momentum: m, a number or a 0-d tensor on x's device.
    """
    n, channels, height, width = x.shape
    rows = n // groups * height * width
    t = tiling(rows, channels, groups)
    partial = torch.empty(2, groups, t.chunks, channels, dtype=torch.float32, device=x.device)
    stats = torch.empty(3, groups, channels, dtype=torch.float32, device=x.device)
    h = x if residual is None else torch.empty_like(x, memory_format=torch.channels_last)
    partial_stats_kernel[t.grid](
        x, residual, h, partial, rows, channels, t.chunk, HAS_RESIDUAL=residual is not None, ROWS=t.rows, COLS=t.cols
    )
    combine_stats_kernel[(triton.cdiv(channels, 16),)](
        partial, stats, running_mean, running_var, momentum, rows, channels, t.chunk, t.chunks, groups,
        UPDATES=running_mean is not None, MOMENTUM_IS_TENSOR=isinstance(momentum, Tensor),
        CHUNKS=triton.next_power_of_2(t.chunks), COLS=16,
    )  # fmt: skip
    return h, stats
