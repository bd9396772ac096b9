"""augment reads each image once and writes it once, forward and backward; what is drawn is nothing beside that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from op_cases import BF16, F32, Case, Size
from puat_fast.ops import augment
from puat_fast.ops.augment import _reference  # impl="reference" also looks at values, which breaks a compiled graph

PAD = 4
STORED = 50_000  # images of CIFAR
BATCH = (256, 3, 32, 32)
STEP = (2176, 3, 32, 32)  # all images of a step with five D updates, as the resident loader gathers them
# what is done to bytes: gathered alone, or augmented too
BYTES: dict[Size, list[tuple[tuple[int, ...], bool, torch.dtype, bool]]] = {
    "tiny": [((8, 3, 32, 32), True, F32, False)],
    "cpu": [(STEP, False, F32, False), (BATCH, True, F32, False)],
    "gpu": [(STEP, False, F32, False), (BATCH, True, F32, False), (BATCH, True, BF16, True)],
}  # fmt: skip
# what is done to a batch, forward and backward: rotated or not, one draw per image or for all
BATCHES: dict[Size, list[tuple[tuple[int, ...], bool, bool, torch.dtype, bool]]] = {
    "tiny": [((8, 3, 32, 32), True, True, F32, False)],
    "cpu": [(BATCH, False, True, F32, False), (BATCH, True, True, F32, False), (BATCH, True, False, F32, False),
            ((257, 3, 31, 33), True, True, F32, False)],
    "gpu": [(BATCH, False, True, F32, False), (BATCH, True, True, F32, False), (BATCH, True, False, F32, False),
            (BATCH, True, True, BF16, True), ((257, 3, 31, 33), True, True, F32, False)],
}  # fmt: skip


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for shape, moves, dtype, nhwc in BYTES[size]:
        store = torch.randint(0, 256, (STORED if size != "tiny" else 64, *shape[1:]), dtype=torch.uint8, device=device)
        index = torch.randint(0, len(store), (shape[0],), device=device)
        draws = drawn(shape[0], device) if moves else (None, None)
        yield Case(
            "augment", "gather, crop, flip, scale" if moves else "gather, scale", shape, dtype,
            "NHWC" if nhwc else "NCHW", math.prod(shape) * (1 + dtype.itemsize),
            partial(_reference_of, dtype, nhwc), partial(_ours, dtype, nhwc),
            (store, index, *draws, None),
        )  # fmt: skip
    for shape, rotates, per_image, dtype, nhwc in BATCHES[size]:
        rows = shape[0] if per_image else 1
        angle = (torch.rand(rows, device=device) * 2 - 1) * math.radians(15)
        cos_sin = torch.stack([angle.cos(), angle.sin()], 1) if rotates else None
        yield Case(
            "augment", f"{'crop, flip, rotate' if rotates else 'crop, flip'} per {'image' if per_image else 'batch'}, "
            "forward+backward", shape, dtype, "NHWC" if nhwc else "NCHW", 2 * math.prod(shape) * (4 + dtype.itemsize),
            partial(_reference_of, dtype, nhwc), partial(_ours, dtype, nhwc),
            (torch.rand(shape, device=device), None, *drawn(rows, device), cos_sin), grad_of=(0,),
        )  # fmt: skip


def drawn(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """top_left, flip."""
    return torch.randint(0, 2 * PAD + 1, (rows, 2), device=device), torch.rand(rows, device=device) < 0.5


def _reference_of(dtype, nhwc, x, index, top_left, flip, cos_sin):
    return _reference(x, index, dtype, nhwc, top_left, flip, cos_sin, PAD)


def _ours(dtype, nhwc, x, index, top_left, flip, cos_sin):
    return augment(
        x, index=index, top_left=top_left, flip=flip, cos_sin=cos_sin, pad=PAD, dtype=dtype, channels_last=nhwc
    )
