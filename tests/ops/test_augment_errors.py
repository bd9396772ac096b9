"""augment: every mistake is named, by the function and by the extension, which trusts nobody."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from puat_fast.ops import augment
from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

F64, U8 = torch.float64, torch.uint8
PAD = 4
BYTES = torch.zeros(4, 3, 8, 8, dtype=U8)
BATCH = torch.zeros(2, 3, 8, 8)
INDEX = torch.tensor([0, 3])
CORNERS = torch.zeros(2, 2, dtype=torch.int64)
FLIPS = torch.zeros(2, dtype=torch.bool)
TURNS = torch.tensor([[1.0, 0.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": BATCH.half()}, "x: expected dtype torch.uint8 or .*, got torch.float16"),
        ({"x": BATCH[0]}, r"x: expected N x C x H x W .*, got shape \(3, 8, 8\)"),
        ({"x": torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 16385)}, "x: .* H and W up to 16384, got"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32 or .*, got torch.float16"),
        ({"dtype": U8}, "dtype: .*, got torch.uint8"),
        ({"pad": -1}, "pad: expected 0 to 16384, got -1"),
        ({"index": INDEX}, "index: goes with uint8 images, got x of torch.float32"),
        ({"x": BYTES, "index": INDEX.int()}, "index: expected dtype torch.int64, got torch.int32"),
        ({"x": BYTES, "index": INDEX[None]}, r"index: expected 1 dimension, got shape \(1, 2\)"),
        ({"x": BYTES, "index": INDEX.to("meta")}, r"index: expected device cpu \(as x\), got meta"),
        ({"x": BYTES, "index": INDEX + 1}, "index: expected 0 to 3, got 4"),
        ({"x": BYTES, "index": INDEX - 1}, "index: expected 0 to 3, got -1"),
        ({"x": BYTES[:0], "index": INDEX}, "index: expected 0 to -1, got 0"),
        ({"x": BYTES, "top_left": CORNERS}, r"top_left: expected shape \(4, 2\) or \(1, 2\), got \(2, 2\)"),
        ({"top_left": CORNERS[0]}, r"top_left: expected shape \(2, 2\) or \(1, 2\), got \(2,\)"),
        ({"top_left": CORNERS.int()}, "top_left: expected dtype torch.int64, got torch.int32"),
        ({"top_left": CORNERS.to("meta")}, r"top_left: expected device cpu \(as x\), got meta"),
        ({"top_left": CORNERS + 9, "pad": 4}, "top_left: expected 0 to 8, got 9"),
        ({"top_left": CORNERS - 1, "pad": 4}, "top_left: expected 0 to 8, got -1"),
        ({"flip": FLIPS.byte()}, "flip: expected dtype torch.bool, got torch.uint8"),
        ({"flip": FLIPS[:, None]}, r"flip: expected shape \(2,\) or \(1,\), got \(2, 1\)"),
        ({"flip": FLIPS.to("meta")}, r"flip: expected device cpu \(as x\), got meta"),
        ({"cos_sin": TURNS.bfloat16()}, "cos_sin: expected dtype torch.float32 or torch.float64, got torch.bfloat16"),
        ({"cos_sin": TURNS.expand(3, 2)}, r"cos_sin: expected shape \(2, 2\) or \(1, 2\), got \(3, 2\)"),
        ({"cos_sin": TURNS.to("meta")}, r"cos_sin: expected device cpu \(as x\), got meta"),
        ({"cos_sin": TURNS * 1.01}, "cos_sin: expected cosine and sine of an angle, got 1.0"),
        ({"cos_sin": TURNS * math.nan}, "cos_sin: expected cosine and sine of an angle, got nan"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    for impl in ("auto", "reference"):
        arguments: dict[str, Any] = {"x": BATCH, "impl": impl} | change
        with pytest.raises(ValueError, match=message):
            augment(arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("which", "bad", "message"),
    [
        (0, torch.zeros(2, 3, 8, 8, dtype=F64), "out: expected float32 or bfloat16, got float64"),
        (0, torch.zeros(2, 3, 8, 16)[..., ::2], "out: expected a contiguous or channels_last tensor, got strides"),
        (0, torch.zeros(2, 3, 8), r"out: expected 4 dimensions, got shape \(2, 3, 8\)"),
        (0, torch.zeros(2, 3, 9, 8), r"x: expected images as those of out, of shape \(2, 3, 9, 8\), got shape"),
        (1, BATCH.double(), "x: expected uint8 or float32 or bfloat16, got float64"),
        (1, BATCH[:, :1], "x: expected images as those of out"),
        (1, torch.zeros(1, 1, 1, 1).expand(2, 3, 8, 20000), "x: expected images as those of out"),
        (2, INDEX.int(), "index: expected int64, got an unsupported dtype"),
        (2, INDEX[:1], r"index: expected 2 rows, got shape \(1\)"),
        (2, INDEX.repeat(2)[::2], r"index: expected a contiguous tensor, got strides \(2\)"),
        (2, INDEX + 7, "index: expected 0 to 3, got 7"),
        (3, CORNERS[:, :1], r"top_left: expected 2 or 1 rows of 2, got shape \(2, 1\)"),
        (3, CORNERS.t().contiguous().t(), r"top_left: expected a contiguous tensor, got strides \(1, 2\)"),
        (3, CORNERS + 99, "top_left: expected 0 to 8, got 99"),
        (4, FLIPS.float(), "flip: expected uint8, got float32"),
        (4, FLIPS.byte().repeat(2), r"flip: expected 2 or 1 rows, got shape \(4\)"),
        (5, TURNS.double(), "cos_sin: expected float32, got float64"),
        (5, TURNS + 1, "cos_sin: expected cosine and sine of an angle, got 2.0"),
    ],
)
def test_extension_trusts_nobody(which: int, bad: Tensor, message: str) -> None:
    tensors = [torch.zeros(2, 3, 8, 8), BYTES, INDEX, CORNERS, FLIPS.byte(), TURNS]
    tensors[which] = bad
    with pytest.raises(ValueError, match=message):
        _C.augment_cpu(*capsules(*tensors), PAD, 1)


def test_extension_refuses_what_cannot_be() -> None:
    out, x = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    nothing = (None, None, None)
    with pytest.raises(ValueError, match="x: expected memory apart from that of out"):
        _C.augment_cpu(*capsules(out, out), None, *nothing, 0, 1)
    both = torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match="grad: expected memory apart from that of out"):
        _C.augment_backward_cpu(*capsules(both[:2], both[1:]), *nothing, 0, 1)
    with pytest.raises(ValueError, match="pad: expected 0 to 16384, got -1"):
        _C.augment_cpu(*capsules(out, x), None, *nothing, -1, 1)
    with pytest.raises(ValueError, match="grad: expected float32 or bfloat16, got uint8"):
        _C.augment_backward_cpu(*capsules(out, BYTES[:2]), *nothing, 0, 1)
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 20000)
    with pytest.raises(ValueError, match="x: expected height and width up to 16384, got shape"):
        _C.augment_cpu(*capsules(torch.zeros(1, 1, 1, 20000), wide), None, *nothing, 0, 1)
    far = torch.empty_strided((1, 2, 1, 1), (0, 2**31, 1, 1), dtype=U8)  # 2 GiB of addresses, of which none is used
    with pytest.raises(ValueError, match=r"x: expected images of less than 2\^31 elements"):
        _C.augment_cpu(*capsules(torch.zeros(1, 2, 1, 1), far), None, *nothing, 0, 1)


@pytest.mark.parametrize("which", range(6))
def test_consumed_capsule_is_refused(which: int) -> None:
    handed_over = capsules(torch.zeros(2, 3, 8, 8), BYTES, INDEX, CORNERS, FLIPS.byte(), TURNS)
    torch.utils.dlpack.from_dlpack(handed_over[which])
    name = ("out", "x", "index", "top_left", "flip", "cos_sin")[which]
    with pytest.raises(ValueError, match=f"{name}: expected a DLPack capsule named 'dltensor', got 'used_dltensor'"):
        _C.augment_cpu(*handed_over, PAD, 1)
