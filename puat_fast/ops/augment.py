"""augment: gather, crop, flip and rotation of a batch of images as one map of pixels, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._layout import capsules, check_dtype, stream_of
from puat_fast.ops._library import Impl, register, takes_reference
from puat_fast.ops._native import _C

_FLOATS = (torch.float32, torch.bfloat16, torch.float64)
_MAX_SIZE = 16384
_UNIT_TOLERANCE = 1e-5


def augment(
    x: Tensor,
    *,
    index: Tensor | None = None,
    top_left: Tensor | None = None,
    flip: Tensor | None = None,
    cos_sin: Tensor | None = None,
    pad: int = 0,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Images of a store or a batch, each zero-padded and cropped, then flipped, then rotated; nearest pixels, fill 0.

        out[n, c, i, j] = x[index[n], c, y + top - pad, x + left - pad],  x -> W - 1 - x before if flip,
        y = rint( sin (j - w) + cos (i - h) + h),    h = (H - 1) / 2
        x = rint( cos (j - w) - sin (i - h) + w),    w = (W - 1) / 2

    and 0 where (y, x), or what of x it leads to, lies outside of H x W. rint rounds halves to even. The coordinates are
    rounded after each operation, in the same order everywhere: the map is the same, bit for bit, in the reference and
    in the kernels. It is F.affine_grid and F.grid_sample(mode="nearest", align_corners=False) but for coordinates half
    way between two pixels; where H differs from W it is still a rotation, of pixels and not of [-1, 1]^2.

    Source: crop and flip of He et al. 2016 (arXiv:1512.03385), 4.2; rotation as torchvision's, PUAT's for CIFAR-100.

    Draws have one row per image, or a single one that all images share. None leaves a part out.

    float32 and bfloat16 results, of inputs of any strides, come from the compiled kernels and equal the reference's bit
    for bit; float64, in or out, takes the reference. A batch gets a gradient, accumulated in float32 and in the same
    order each time; uint8 images and draws get none.

    Args:
        x: uint8 images, M x C x H x W, of which the result is u/255 exactly; or a batch of float32, bfloat16 or
            float64, which keeps its values. H and W up to 16384.
        index: int64, N; which of the uint8 images, 0 to M - 1. None: all of them, in order.
        top_left: int64, N x 2 or 1 x 2; corner of the crop window in the padded image, 0 to 2 pad.
        flip: bool, N or 1.
        cos_sin: float32 or float64, N x 2 or 1 x 2; of the angle by which the pixels' coordinates are turned. Used in
            float32, or in float64 where x or the result is.
        pad: pixels of zeros on each side, 0 to 16384; top_left is (pad, pad) where nothing moves.
        dtype: of the result, a float dtype; None: x's, or float32 of uint8 images.
        channels_last: memory format of the result, else contiguous. The gradient has x's.
        impl: "auto", or "reference" for plain torch.

    Returns:
        N x C x H x W, a new tensor.

    Raises:
        ValueError: an argument's dtype, shape or device is not as above; on the CPU, also its values. Nothing is waited
            for on a GPU: there the kernel fills an image with NaN where its index is none, and takes the nearest
            top_left; cos_sin that is of no angle gives a wrong gradient.
    """
    _check(x, index, dtype, pad, top_left=top_left, flip=flip, cos_sin=cos_sin)
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.float32)
    in_float64 = torch.float64 in (x.dtype, dtype)
    if cos_sin is not None:
        cos_sin = cos_sin.detach().to(torch.float64 if in_float64 else torch.float32)
    draws = (top_left, flip, cos_sin, pad)
    if takes_reference(impl) or in_float64:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_values(x, index, *draws)
        return _reference(x, index, dtype, channels_last, *draws)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Augment.apply(x, dtype, channels_last, *draws)  # type: ignore[no-untyped-call]
    result: Tensor = torch.ops.puat_fast.augment(x.detach(), index, dtype, channels_last, *draws)
    return result


def _reference(x: Tensor, index: Tensor | None, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
    """draws, here and below: top_left, flip, cos_sin, pad."""
    given = x
    if index is not None:
        x = x.index_select(0, index)
    if not x.is_floating_point():
        x = x.to(torch.promote_types(dtype, torch.float32))
        x = x / x.new_full((), 255)  # a tensor: by a number, CUDA multiplies with the rounded 1/255, which is not u/255
    if any(draw is not None for draw in draws[:3]):
        place, inside = _map(x, *draws)
        picked = x.flatten(2).gather(2, place.expand(*x.shape[:2], -1))
        x = torch.where(inside, picked, 0).view(x.shape)
    out = x.to(dtype).contiguous(memory_format=_format(channels_last))
    return out.clone() if out is given else out


def _reference_backward(grad: Tensor, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
    place, inside = _map(grad, *draws)
    kept = torch.where(inside, grad.flatten(2).float(), 0)
    out = torch.zeros_like(kept).scatter_add_(2, place.expand_as(kept), kept).view(grad.shape)
    return out.to(dtype).contiguous(memory_format=_format(channels_last))


def _map(
    x: Tensor, top_left: Tensor | None, flip: Tensor | None, cos_sin: Tensor | None, pad: int
) -> tuple[Tensor, Tensor]:
    """For each pixel of the result, row by row: its place among those of the source, and whether it has one."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    inside = torch.ones((1, 1, 1), dtype=torch.bool, device=x.device)
    if cos_sin is not None:
        cos, sin = cos_sin[:, :, None, None].unbind(1)
        h, w = (height - 1) / 2, (width - 1) / 2
        dy, dx = rows.to(cos.dtype) - h, columns.to(cos.dtype) - w
        y, x_ = (sin * dx + cos * dy + h).round(), (cos * dx - sin * dy + w).round()
        inside = (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
        rows, columns = (torch.where(inside, at, 0).long() for at in (y, x_))
    if flip is not None:
        columns = torch.where(flip[:, None, None], width - 1 - columns, columns)
    if top_left is not None:
        offset = top_left[:, :, None, None] - pad
        rows, columns = rows + offset[:, 0], columns + offset[:, 1]
        inside = inside & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    place = torch.where(inside, rows * width + columns, 0)
    return place.flatten(1)[:, None], inside.expand_as(place).flatten(1)[:, None]


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


_DRAWN: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
    "top_left": ((2,), (torch.int64,)),
    "flip": ((), (torch.bool,)),
    "cos_sin": ((2,), (torch.float32, torch.float64)),
}


def _check(x: Tensor, index: Tensor | None, dtype: torch.dtype | None, pad: int, **draws: Tensor | None) -> None:
    check_dtype("x", x, torch.uint8, *_FLOATS)
    if x.ndim != 4 or max(x.shape[2:]) > _MAX_SIZE:
        raise ValueError(f"x: expected N x C x H x W with H and W up to {_MAX_SIZE}, got shape {tuple(x.shape)}")
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"dtype: expected {' or '.join(map(str, _FLOATS))}, got {dtype}")
    if not 0 <= pad <= _MAX_SIZE:
        raise ValueError(f"pad: expected 0 to {_MAX_SIZE}, got {pad}")
    if index is not None:
        if x.is_floating_point():
            raise ValueError(f"index: goes with uint8 images, got x of {x.dtype}")
        check_dtype("index", index, torch.int64)
        if index.ndim != 1:
            raise ValueError(f"index: expected 1 dimension, got shape {tuple(index.shape)}")
    n = len(x if index is None else index)
    for name, draw in draws.items():
        row, dtypes = _DRAWN[name]
        if draw is None:
            continue
        check_dtype(name, draw, *dtypes)
        if draw.shape not in ((n, *row), (1, *row)):
            raise ValueError(f"{name}: expected shape {(n, *row)} or {(1, *row)}, got {tuple(draw.shape)}")
    for name, tensor in {"index": index, **draws}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {tensor.device}")


def _check_values(
    x: Tensor, index: Tensor | None, top_left: Tensor | None, flip: Tensor | None, cos_sin: Tensor | None, pad: int
) -> None:
    """What the CPU kernel checks by itself."""
    for name, tensor, last in (("index", index, len(x) - 1), ("top_left", top_left, 2 * pad)):
        for value in [] if tensor is None else tensor[(tensor < 0) | (tensor > last)].tolist():
            raise ValueError(f"{name}: expected 0 to {last}, got {value}")
    for cos, sin in [] if cos_sin is None else cos_sin.tolist():
        if not abs(cos * cos + sin * sin - 1) <= _UNIT_TOLERANCE:
            raise ValueError(f"cos_sin: expected cosine and sine of an angle, got {cos}, {sin}")


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
        *tensors, ctx.pad = draws
        ctx.save_for_backward(*tensors)
        ctx.dtype, ctx.channels_last = x.dtype, _is_channels_last(x)
        result: Tensor = torch.ops.puat_fast.augment(x.detach(), None, dtype, channels_last, *draws)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        draws = (*ctx.saved_tensors, ctx.pad)
        grad_x = torch.ops.puat_fast.augment_backward(grad, ctx.dtype, ctx.channels_last, *draws)
        return (grad_x, *[None] * 6)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _capsules(out: Tensor, x: Tensor, *small: Tensor | None) -> list[Any]:
    """What `_C` takes: index and draws dense, bool as bytes, None as None."""
    given = [None if t is None else t.contiguous() for t in small]
    bytes_ = [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in given]
    return [*capsules(out, x), *(None if t is None else capsules(t)[0] for t in bytes_)]


def _augment(x: Tensor, index: Tensor | None, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
    if x.is_cuda and not hasattr(_C, "augment_cuda"):
        return _reference(x, index, dtype, channels_last, *draws)
    out = _augment_fake(x, index, dtype, channels_last, *draws)
    *tensors, pad = draws
    if x.is_cuda:
        _C.augment_cuda(*_capsules(out, x, index, *tensors), pad, stream_of(x))
    else:
        _C.augment_cpu(*_capsules(out, x, index, *tensors), pad, torch.get_num_threads())
    return out


def _augment_backward(grad: Tensor, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
    if grad.is_cuda and not hasattr(_C, "augment_backward_cuda"):
        return _reference_backward(grad, dtype, channels_last, *draws)
    out = _augment_backward_fake(grad, dtype, channels_last, *draws)
    *tensors, pad = draws
    if grad.is_cuda:
        _C.augment_backward_cuda(*_capsules(out, grad, *tensors), pad, stream_of(grad))
    else:
        _C.augment_backward_cpu(*_capsules(out, grad, *tensors), pad, torch.get_num_threads())
    return out


def _augment_fake(x: Tensor, index: Tensor | None, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
    shape = (len(x if index is None else index), *x.shape[1:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(channels_last))


def _augment_backward_fake(grad: Tensor, dtype: torch.dtype, channels_last: bool, *draws: Any) -> Tensor:
    return torch.empty(grad.shape, dtype=dtype, device=grad.device, memory_format=_format(channels_last))


_DRAWS = "Tensor? top_left, Tensor? flip, Tensor? cos_sin, int pad"
register(
    f"augment(Tensor x, Tensor? index, ScalarType dtype, bool channels_last, {_DRAWS}) -> Tensor",
    cpu=_augment,
    cuda=_augment,
    fake=_augment_fake,
)
register(
    f"augment_backward(Tensor grad, ScalarType dtype, bool channels_last, {_DRAWS}) -> Tensor",
    cpu=_augment_backward,
    cuda=_augment_backward,
    fake=_augment_backward_fake,
)
