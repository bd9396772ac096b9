"""Class-conditional BatchNorm, ReLU and bilinear x2 of channels_last images: one pass forward, two backward.

Every program belongs to one image, so its class, and with it gain and bias, is the same for all that it computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements a program holds at a time: 8 a thread of 4 warps, 16 bytes of bfloat16; U's taps need the rest
SUM_ROWS, SUM_COLS = 128, 16  # images x channels that a program sums at a time


def tiling(positions: int, channels: int) -> tuple[int, int, int, int]:
    """(rows, cols, tiles, blocks): tiles of rows positions x cols channels, so many for each image.

    64 channels are 128 bytes of bfloat16, a whole line of the cache, and leave programs enough: 1024 of them, eight a
    multiprocessor, for 256 images of 256 channels even where one program walks through all positions of its image.
    """
    cols = min(max(triton.next_power_of_2(channels), 16), 64)
    rows = min(triton.next_power_of_2(positions), TILE // cols)
    return rows, cols, triton.cdiv(positions, rows), triton.cdiv(channels, cols)


@triton.jit
def load_affine(mean, var, gain, bias, y, n, num_classes, channels, cols, eps):
    """mean, 1 / sqrt(var + eps), gain[y[n]] and bias[y[n]] of some channels; NaN where y[n] is no class."""
    mask = cols < channels
    k = tl.load(y + n) + tl.zeros_like(cols)  # one a column: the interpreter cannot combine a scalar mask with others
    known = mask & (k >= 0) & (k < num_classes)
    scale = tl.load(gain + k * channels + cols, known, other=float("nan"))
    shift = tl.load(bias + k * channels + cols, known, other=float("nan"))
    rstd = 1.0 / tl.sqrt(tl.load(var + cols, mask, other=1.0) + eps)
    return tl.load(mean + cols, mask, other=0.0), rstd, scale, shift


@triton.jit
def activated(x, offsets, mask, mean, rstd, scale, shift):
    """ReLU(scale * xhat + shift); NaN stays NaN."""
    value = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
    value = scale[None, :] * ((value - mean[None, :]) * rstd[None, :]) + shift[None, :]
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def apply_kernel(
    out, x, y, gain, bias, mean, var, eps, num_classes, channels, pixels, tiles, blocks,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = ReLU(gain[y] * xhat + bias[y])."""
    program = tl.program_id(0)
    n = (program // (tiles * blocks)).to(tl.int64)
    pixel = program // blocks % tiles * ROWS + tl.arange(0, ROWS)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    m, rstd, scale, shift = load_affine(mean, var, gain, bias, y, n, num_classes, channels, cols, eps)
    offsets = n * pixels * channels + (pixel[:, None] * channels + cols[None, :])
    mask = (pixel < pixels)[:, None] & (cols < channels)[None, :]
    tl.store(out + offsets, activated(x, offsets, mask, m, rstd, scale, shift).to(out.dtype.element_ty), mask)


@triton.jit
def apply_up_kernel(
    out, x, y, gain, bias, mean, var, eps, num_classes, channels, height, width, tiles, blocks,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = U(ReLU(gain[y] * xhat + bias[y])).

    Four neighbouring inputs determine the four outputs between them, so a program computes such cells. Cell (i, j),
    of (height + 1) x (width + 1), lies below input row i - 1 and right of column j - 1; at the borders, where there
    is no neighbour, U takes the border itself.
    """
    program = tl.program_id(0)
    n = (program // (tiles * blocks)).to(tl.int64)
    cell = program // blocks % tiles * ROWS + tl.arange(0, ROWS)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    m, rstd, scale, shift = load_affine(mean, var, gain, bias, y, n, num_classes, channels, cols, eps)
    i, j = cell // (width + 1), cell % (width + 1)
    top, bottom = tl.maximum(i - 1, 0), tl.minimum(i, height - 1)
    left, right = tl.maximum(j - 1, 0), tl.minimum(j, width - 1)
    inside = (cell < (height + 1) * (width + 1))[:, None] & (cols < channels)[None, :]

    x += n * height * width * channels
    top_left = activated(x, (top * width + left)[:, None] * channels + cols, inside, m, rstd, scale, shift)
    top_right = activated(x, (top * width + right)[:, None] * channels + cols, inside, m, rstd, scale, shift)
    bottom_left = activated(x, (bottom * width + left)[:, None] * channels + cols, inside, m, rstd, scale, shift)
    bottom_right = activated(x, (bottom * width + right)[:, None] * channels + cols, inside, m, rstd, scale, shift)

    out += n * 4 * height * width * channels
    above, below = (i > 0)[:, None] & inside, (i < height)[:, None] & inside
    for side in tl.static_range(2):  # output columns 2j - 1 and 2j
        near = 0.25 if side else 0.75
        upper = near * top_left + (1.0 - near) * top_right
        lower = near * bottom_left + (1.0 - near) * bottom_right
        column = 2 * j - 1 + side
        exists = ((column >= 0) & (column < 2 * width))[:, None]
        offsets = ((2 * i - 1) * (2 * width) + column)[:, None] * channels + cols[None, :]
        tl.store(out + offsets, (0.75 * upper + 0.25 * lower).to(out.dtype.element_ty), above & exists)
        offsets += 2 * width * channels
        tl.store(out + offsets, (0.25 * upper + 0.75 * lower).to(out.dtype.element_ty), below & exists)


@triton.jit
def upsampled_grad(grad_out, i, j, cols, mask, height, width, channels):
    """The adjoint of U at input pixels (i, j): a weighted sum of 4 x 4 outputs.

    Of the outputs in rows 2i - 1 ... 2i + 2, input row i makes 1/4, 3/4, 3/4, 1/4. At a border the row outside does
    not exist, and the row at the border takes its share, as the clamped index does.
    """
    total = tl.zeros(mask.shape, tl.float32)
    for a in tl.static_range(4):
        row = tl.minimum(tl.maximum(2 * i - 1 + a, 0), 2 * height - 1)
        for b in tl.static_range(4):
            column = tl.minimum(tl.maximum(2 * j - 1 + b, 0), 2 * width - 1)
            offsets = (row * (2 * width) + column)[:, None] * channels + cols[None, :]
            weight = (0.25 if a % 3 == 0 else 0.75) * (0.25 if b % 3 == 0 else 0.75)
            total += weight * tl.load(grad_out + offsets, mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def image_sums_kernel(
    dy, sums, grad_out, x, y, gain, bias, mean, var, eps, num_classes, channels, height, width, images, blocks,
    UPSAMPLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums over each image of dy and dy * xhat, where dy is the gradient at gain * xhat + bias.

    With U, dy is stored for input_grad_kernel, which would have to gather it once more.
    """
    n = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    m, rstd, scale, shift = load_affine(mean, var, gain, bias, y, n, num_classes, channels, cols, eps)
    pixels = height * width
    grad_out += n * pixels * channels * (4 if UPSAMPLE else 1)
    total = tl.zeros([ROWS, COLS], tl.float32)
    total_xhat = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, pixels, ROWS):
        pixel = start + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & (cols < channels)[None, :]
        offsets = pixel[:, None] * channels + cols[None, :]
        if UPSAMPLE:
            grad = upsampled_grad(grad_out, pixel // width, pixel % width, cols, mask, height, width, channels)
        else:
            grad = tl.load(grad_out + offsets, mask, other=0.0).to(tl.float32)
        offsets += n * pixels * channels
        xhat = (tl.load(x + offsets, mask, other=0.0).to(tl.float32) - m[None, :]) * rstd[None, :]
        grad = tl.where(scale[None, :] * xhat + shift[None, :] <= 0.0, 0.0, grad)
        if UPSAMPLE:
            tl.store(dy + offsets, grad.to(dy.dtype.element_ty), mask)
        total += grad
        total_xhat += grad * xhat
    offsets = n * channels + cols
    tl.store(sums + offsets, tl.sum(total, 0), cols < channels)
    tl.store(sums + images * channels + offsets, tl.sum(total_xhat, 0), cols < channels)


@triton.jit
def class_sums_kernel(dgain, dbias, sums, y, images, channels, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dbias[k] and dgain[k]: the sums of the images of class k, in a fixed order."""
    k = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    total_xhat = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, images, ROWS):
        n = start + tl.arange(0, ROWS)
        chosen = (tl.load(y + n, n < images, other=-1) == k)[:, None] & (cols < channels)[None, :]
        offsets = n[:, None] * channels + cols[None, :]
        total += tl.load(sums + offsets, chosen, other=0.0)
        total_xhat += tl.load(sums + images * channels + offsets, chosen, other=0.0)
    tl.store(dbias + k * channels + cols, tl.sum(total, 0), cols < channels)
    tl.store(dgain + k * channels + cols, tl.sum(total_xhat, 0), cols < channels)


@triton.jit
def batch_means_kernel(
    means, sums, y, gain, count, num_classes, images, channels, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Means over the batch's `count` pixels of gain[y] * dy and gain[y] * dy * xhat, in a fixed order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    total_xhat = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, images, ROWS):
        n = start + tl.arange(0, ROWS)
        k = tl.load(y + n, n < images, other=0)
        mask = (n < images)[:, None] & (cols < channels)[None, :]
        known = ((k >= 0) & (k < num_classes))[:, None] & mask
        scale = tl.load(gain + k[:, None] * channels + cols[None, :], known, other=float("nan"))
        scale = tl.where(mask, scale, 0.0)
        offsets = n[:, None] * channels + cols[None, :]
        total += scale * tl.load(sums + offsets, mask, other=0.0)
        total_xhat += scale * tl.load(sums + images * channels + offsets, mask, other=0.0)
    tl.store(means + cols, tl.sum(total, 0) / count, cols < channels)
    tl.store(means + channels + cols, tl.sum(total_xhat, 0) / count, cols < channels)


@triton.jit
def input_grad_kernel(
    dx, grad, means, x, y, gain, bias, mean, var, eps, num_classes, channels, pixels, tiles, blocks,
    TRAINING: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gain * dy - means[0] - xhat * means[1]), without the means where mean and var are constants.

    grad: the gradient of ReLU's output, or dy already, which it may overwrite: dy is masked again, to no effect.
    """
    program = tl.program_id(0)
    n = (program // (tiles * blocks)).to(tl.int64)
    pixel = program // blocks % tiles * ROWS + tl.arange(0, ROWS)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    m, rstd, scale, shift = load_affine(mean, var, gain, bias, y, n, num_classes, channels, cols, eps)
    offsets = n * pixels * channels + (pixel[:, None] * channels + cols[None, :])
    mask = (pixel < pixels)[:, None] & (cols < channels)[None, :]
    xhat = (tl.load(x + offsets, mask, other=0.0).to(tl.float32) - m[None, :]) * rstd[None, :]
    dy = tl.load(grad + offsets, mask, other=0.0).to(tl.float32)
    dy = tl.where(scale[None, :] * xhat + shift[None, :] <= 0.0, 0.0, dy)
    result = scale[None, :] * dy
    if TRAINING:
        result -= tl.load(means + cols, cols < channels, other=0.0)[None, :]
        result -= xhat * tl.load(means + channels + cols, cols < channels, other=0.0)[None, :]
    tl.store(dx + offsets, (rstd[None, :] * result).to(dx.dtype.element_ty), mask)


def apply(
    out: Tensor, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, upsample: bool
) -> None:
    """out = U(ReLU(gain[y] * (x - mean) / sqrt(var + eps) + bias[y])), U = bilinear x2 or nothing.

    x: N x C x H x W, not empty, dense in channels_last order, float32 or bfloat16; out likewise; y: N int64; gain and
    bias: K x C, mean and var: C, float32, contiguous. Nothing is checked here.
    """
    images, channels, height, width = x.shape
    if upsample:
        rows, cols, tiles, blocks = tiling((height + 1) * (width + 1), channels)
        apply_up_kernel[(images * tiles * blocks,)](
            out, x, y, gain, bias, mean, var, eps, len(gain), channels, height, width, tiles, blocks,
            ROWS=rows, COLS=cols,
        )  # fmt: skip
    else:
        rows, cols, tiles, blocks = tiling(height * width, channels)
        apply_kernel[(images * tiles * blocks,)](
            out, x, y, gain, bias, mean, var, eps, len(gain), channels, height * width, tiles, blocks,
            ROWS=rows, COLS=cols,
        )  # fmt: skip


def backward(
    dx: Tensor | None, dgain: Tensor | None, dbias: Tensor | None, grad_out: Tensor, x: Tensor, y: Tensor, gain: Tensor,
    bias: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool, upsample: bool,
) -> None:  # fmt: skip
    """Gradients of `apply`; `training`: mean and var are those of x. dx None: not wanted; dgain and dbias likewise."""
    images, channels, height, width = x.shape
    num_classes, pixels = len(gain), height * width
    rows, cols, tiles, blocks = tiling(pixels, channels)
    sums = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
    dy = torch.empty_like(x) if dx is None else dx
    if upsample or training or dgain is not None:
        image_sums_kernel[(images * blocks,)](
            dy, sums, grad_out, x, y, gain, bias, mean, var, eps, num_classes, channels, height, width, images, blocks,
            UPSAMPLE=upsample, ROWS=rows, COLS=cols,
        )  # fmt: skip
    sum_blocks = triton.cdiv(channels, SUM_COLS)
    if dgain is not None:
        class_sums_kernel[(num_classes * sum_blocks,)](
            dgain, dbias, sums, y, images, channels, sum_blocks, ROWS=SUM_ROWS, COLS=SUM_COLS
        )
    if dx is None:
        return
    means = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    if training:
        batch_means_kernel[(sum_blocks,)](
            means, sums, y, gain, float(images * pixels), num_classes, images, channels, ROWS=SUM_ROWS, COLS=SUM_COLS
        )
    input_grad_kernel[(images * tiles * blocks,)](
        dx, dy if upsample else grad_out, means, x, y, gain, bias, mean, var, eps, num_classes, channels, pixels,
        tiles, blocks, TRAINING=training, ROWS=rows, COLS=cols,
    )  # fmt: skip
