"""augment: one map of pixels against slices and grid_sample, kernel against reference, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_checks import (
    NO_CUDA,
    assert_same_bits,
    check_captured,
    check_compiles,
    check_gradients,
    check_repeats,
    check_side_stream,
    each_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import augment, reference_only
from puat_fast.ops._native import _C
from puat_fast.ops.augment import _capsules, _reference_backward

F32, BF16, F64, U8 = torch.float32, torch.bfloat16, torch.float64, torch.uint8
PAD = 4
# One pixel, odd primes, empty in each way, more than one patch or block an image, more than one thread's share.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (5, 1, 13, 11), (0, 3, 8, 8), (2, 0, 4, 4), (3, 3, 0, 5), (2, 3, 40, 41),
          (1, 2, 3, 1100), (64, 3, 32, 32)]  # fmt: skip
PARTS = {
    "nothing": (), "crop": ("top_left",), "flip": ("flip",), "rotation": ("cos_sin",),
    "crop and flip": ("top_left", "flip"), "all": ("top_left", "flip", "cos_sin"),
}  # fmt: skip

each_parts = pytest.mark.parametrize("parts", PARTS)
each_scope = pytest.mark.parametrize("scope", ["image", "batch"])


def turn(angles: Tensor) -> Tensor:
    """cos_sin of angles in radians."""
    return torch.stack([angles.cos(), angles.sin()], 1)


def draws(
    n: int, parts: str = "all", scope: str = "image", device: str = "cpu", dtype: torch.dtype = F32, seed: int = 0
) -> dict[str, Any]:
    """Arguments of augment; angles of every size."""
    generator = torch.Generator().manual_seed(seed)
    rows = n if scope == "image" else 1
    every = {
        "top_left": torch.randint(0, 2 * PAD + 1, (rows, 2), generator=generator),
        "flip": torch.rand(rows, generator=generator) < 0.5,
        "cos_sin": turn((torch.rand(rows, generator=generator, dtype=F64) * 2 - 1) * math.pi).to(dtype),
    }
    return {name: every[name].to(device) for name in PARTS[parts]} | {"pad": PAD}


def images(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """No value is 0, so that what is filled shows."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == U8:
        return torch.randint(1, 256, shape, generator=generator, dtype=U8).to(device)
    return (torch.rand(shape, generator=generator, dtype=F64) + 0.5).to(dtype).to(device)


def explicit(x: Tensor, pad: int, top_left: Tensor, flip: Tensor, angles: Tensor) -> Tensor:
    """Image by image: F.pad, a slice, flip, and torch's own grid_sample."""
    n, _, h, w = x.shape
    out = []
    for i in range(n):
        top, left = top_left[i].tolist()
        image = F.pad(x[i : i + 1], (pad,) * 4)[:, :, top : top + h, left : left + w]
        image = image.flip(3) if flip[i] else image
        c, s = angles[i].cos(), angles[i].sin()
        theta = torch.stack([c, -s * h / w, c * 0, s * w / h, c, c * 0]).view(1, 2, 3)  # in units of half an image
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        out.append(F.grid_sample(image, grid, mode="nearest", padding_mode="zeros", align_corners=False))
    return torch.cat(out)


@pytest.mark.parametrize("shape", [(40, 3, 32, 32), (40, 2, 9, 9), (40, 2, 8, 13), (40, 1, 12, 7)], ids=str)
@pytest.mark.parametrize("degrees", [0, 15, 180])
def test_reference_is_pad_slice_flip_and_grid_sample(shape: tuple[int, ...], degrees: float) -> None:
    x = images(shape, F64)
    given = draws(len(x), "crop and flip")
    angles = (torch.rand(len(x), dtype=F64, generator=torch.Generator().manual_seed(1)) * 2 - 1) * math.radians(degrees)
    expected = explicit(x, PAD, given["top_left"], given["flip"], angles)
    assert torch.equal(augment(x, **given, cos_sin=turn(angles)), expected)
    assert (expected == 0).any()


@each_device
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("size", [6, 7])
def test_quarter_turns(size: int, dtype: torch.dtype, device: str) -> None:
    x = images((1, 2, size, size), dtype, device)
    for k, (cos, sin) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        exact = torch.tensor([[cos, sin]], dtype=dtype, device=device)
        assert torch.equal(augment(x, cos_sin=exact), torch.rot90(x, k, (2, 3)))
        near = turn(torch.tensor([k * math.pi / 2], dtype=dtype)).to(device)
        assert torch.equal(augment(x, cos_sin=near), torch.rot90(x, k, (2, 3)))


@each_device
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_half_way_coordinates_go_to_the_even_pixel(impl: str, device: str) -> None:
    """By 60 degrees, cos = 1/2: every other pixel of the middle row comes from exactly half way between two columns."""
    x = images((1, 1, 11, 11), F64, device)
    cos, sin = 0.5, math.sqrt(0.75)
    places = [(round(sin * (j - 5) + 5), round(cos * (j - 5) + 5)) for j in range(11)]  # Python's halves are even, too
    expected = torch.stack([x[0, 0, r, c] if 0 <= r < 11 else x.new_zeros(()) for r, c in places])
    for dtype in (F32, F64):
        cos_sin = torch.tensor([[cos, sin]], dtype=F64, device=device)
        out = augment(x.to(dtype), cos_sin=cos_sin, impl=impl)  # type: ignore[arg-type]
        assert torch.equal(out[0, 0, 5], expected.to(dtype))


@each_device
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_every_byte_is_exactly_u_over_255(dtype: torch.dtype, device: str) -> None:
    store = torch.arange(256, dtype=U8, device=device).view(64, 1, 2, 2)
    expected = torch.from_numpy(np.arange(256, dtype=np.float64) / 255).to(F32 if dtype == BF16 else dtype).to(dtype)
    for impl in ("auto", "reference"):
        for draw in ({}, {"cos_sin": torch.tensor([[1.0, 0.0]], device=device)}):
            actual = augment(store, dtype=dtype, impl=impl, **draw)  # type: ignore[arg-type]
            assert_same_bits(actual.flatten().cpu(), expected)
    index = torch.tensor([63, 0, 7, 7], device=device)
    assert_same_bits(augment(store, index=index, dtype=dtype).cpu(), expected.view(64, 1, 2, 2)[index.cpu()])


@each_device
@each_parts
@each_scope
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_bitwise(shape: tuple[int, ...], scope: str, parts: str, device: str) -> None:
    n = shape[0]
    for dtype, out_dtype in [(U8, F32), (U8, BF16), (F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)]:
        x, given = images(shape, dtype, device), draws(n, parts, scope, device) | {"dtype": out_dtype}
        if dtype == U8 and n:
            given["index"] = torch.randint(0, n, (n,), generator=torch.Generator().manual_seed(1)).to(device)
        before = x.clone()
        for channels_last, memory_format in ((False, torch.contiguous_format), (True, torch.channels_last)):
            actual = augment(x, **given, channels_last=channels_last)
            assert_same_bits(actual, augment(x, **given, channels_last=channels_last, impl="reference"))
            assert actual.is_contiguous(memory_format=memory_format)
        assert torch.equal(x, before)


def layouts(t: Tensor) -> dict[str, Tensor]:
    n, c, h, w = t.shape
    wide = torch.zeros(n, c, h, 2 * w, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return {
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "permuted": t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": wide[..., ::2],
        "expanded": t[:1, :1].expand(n, c, h, w),
    }


@each_device
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("parts", ["nothing", "crop and flip", "all"])
@pytest.mark.parametrize("dtype", [U8, F32, F64], ids=str)
def test_layouts(dtype: torch.dtype, parts: str, layout: str, device: str) -> None:
    x = layouts(images((3, 5, 7, 11), dtype, device))[layout]
    given = draws(3, parts, device=device)
    expected = augment(x.contiguous(), **given, impl="reference")
    for channels_last in (False, True):
        for impl in ("auto", "reference"):
            actual = augment(x, **given, channels_last=channels_last, impl=impl)  # type: ignore[arg-type]
            assert_same_bits(actual, expected)
            assert actual.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            assert actual.data_ptr() != x.data_ptr()


def test_draws_of_any_strides() -> None:
    x, given = images((3, 2, 5, 5), F32), draws(3)
    odd = {name: torch.stack([t, t], -1)[..., 0] if isinstance(t, Tensor) else t for name, t in given.items()}
    assert not odd["flip"].is_contiguous() and not odd["cos_sin"].is_contiguous()
    assert_same_bits(augment(x, **odd), augment(x, **given))


def gradient(x: Tensor, above: Tensor, **arguments: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(augment(leaf, **arguments), leaf, above)
    return grad


@each_device
@each_parts
@each_scope
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_equals_that_of_the_reference(shape: tuple[int, ...], scope: str, parts: str, device: str) -> None:
    given = draws(shape[0], parts, scope, device)
    for dtype, out_dtype in [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32)]:
        x, above = images(shape, dtype, device), images(shape, out_dtype, device, 1)
        expected = gradient(x.float(), above.float(), **given, impl="reference").to(dtype)
        assert_same_bits(gradient(x, above, **given, dtype=out_dtype), expected)
        x = x.contiguous(memory_format=torch.channels_last)
        above = layouts(above)["permuted"] if x.numel() else above
        actual = gradient(x, above, **given, dtype=out_dtype, channels_last=True)
        assert_same_bits(actual, expected)
        assert actual.is_contiguous(memory_format=torch.channels_last) or not x.numel()


@each_device
@pytest.mark.parametrize("shape", [(1, 31, 32), (1, 33, 33), (1, 9, 400), (1, 2000, 3)], ids=str)
def test_gradient_finds_every_output_at_any_angle(shape: tuple[int, ...], device: str) -> None:
    """Against the reference's scatter, which searches nothing: quarter turns, 60 degrees and many angles between."""
    between = torch.rand(100 if max(shape) < 100 else 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    angles = torch.cat([torch.arange(0, 360, 30) / 360, between]) * 2 * math.pi
    n = len(angles)
    draw = draws(n, "crop and flip", device=device) | {"cos_sin": turn(angles).float().to(device)}
    x, above = images((n, *shape), F32, device), torch.ones((n, *shape), device=device)
    actual = gradient(x, above, **draw)
    assert_same_bits(actual, gradient(x, above, **draw, impl="reference"))
    assert (actual == 2).any() and actual.sum() == (augment(x, **draw) != 0).sum()


@each_device
@each_parts
@each_scope
def test_reference_backward_is_the_gradient_of_the_reference(scope: str, parts: str, device: str) -> None:
    """What serves a GPU where the extension has no CUDA kernels."""
    x, given = images((5, 3, 9, 7), F32, device), draws(5, parts, scope, device)
    above = images((5, 3, 9, 7), F32, device, 1)
    tensors = [given.get(name) for name in ("top_left", "flip", "cos_sin")]
    for channels_last in (False, True):
        actual = _reference_backward(above, F32, channels_last, *tensors, PAD)
        assert_same_bits(actual, gradient(x, above, **given, impl="reference"))


@each_parts
@each_scope
def test_gradcheck(scope: str, parts: str) -> None:
    given = draws(3, parts, scope, dtype=F64)
    check_gradients(lambda x: augment(x, **given), [images((3, 2, 5, 4), F64).requires_grad_()])


def test_what_gets_a_gradient() -> None:
    given = draws(3)
    x = images((3, 2, 5, 5), F32)
    assert not augment(x, **given).requires_grad
    assert not augment(images((3, 2, 5, 5), U8), **given).requires_grad
    angles = given["cos_sin"].clone().requires_grad_()
    assert not augment(x, **given | {"cos_sin": angles}).requires_grad
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not augment(leaf, **given).requires_grad
    (grad,) = torch.autograd.grad(augment(leaf, **given).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with torch.inference_mode():
        assert_same_bits(augment(x, **given), augment(leaf.detach(), **given))


def run_c(name: str, out: Tensor, x: Tensor, *small: Tensor | None, threads: int = 1) -> None:
    """_C's launcher itself, on the device of `out`."""
    if out.is_cuda:
        getattr(_C, name + "_cuda")(*_capsules(out, x, *small), PAD, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(_C, name + "_cpu")(*_capsules(out, x, *small), PAD, threads)


@each_device
@pytest.mark.parametrize("margin", [61, 64])
@pytest.mark.parametrize("shape", [(3, 3, 7, 11), (2, 3, 8, 8), (1, 3, 40, 41)], ids=str)
def test_touches_nothing_around_its_tensors(shape: tuple[int, ...], margin: int, device: str) -> None:
    for parts in ("crop and flip", "all"):
        given = draws(shape[0], parts, device=device)
        small = [given.get(name) for name in ("top_left", "flip", "cos_sin")]
        for dtype in (F32, BF16):
            plain = images(shape, dtype, device)
            x, x_intact = guarded(plain, margin)
            out, out_intact = guarded(torch.empty_like(plain), margin)
            run_c("augment", out, x, None, *small)
            assert_same_bits(out, augment(plain, **given, impl="reference"))
            run_c("augment_backward", out, x, *small)
            assert_same_bits(out, gradient(plain, plain, **given, impl="reference"))
            x_intact(), out_intact()


@pytest.mark.parametrize("parts", ["crop and flip", "all"])
@each_scope
def test_thread_count_changes_nothing(scope: str, parts: str) -> None:
    x = images((101, 3, 31, 33), F32)
    given = draws(len(x), parts, scope)
    small = [given.get(name) for name in ("top_left", "flip", "cos_sin")]
    forward, backward = augment(x, **given, impl="reference"), gradient(x, x, **given, impl="reference")
    for threads in (1, 2, 5):
        out = torch.empty_like(x)
        run_c("augment", out, x, None, *small, threads=threads)
        assert_same_bits(out, forward)
        run_c("augment_backward", out, x, *small, threads=threads)
        assert_same_bits(out, backward)


def test_reference_only() -> None:
    x, given = images((3, 2, 5, 5), F32), draws(3)
    with reference_only():
        inside = augment(x, **given)
    assert_same_bits(inside, augment(x, **given))


@each_device
def test_opcheck(device: str) -> None:
    given = draws(3, device=device)
    small = [given[name] for name in PARTS["all"]]
    store, index = images((5, 3, 6, 7), U8, device), torch.tensor([4, 0, 4], device=device)
    x = layouts(images((3, 3, 6, 7), BF16, device))["channels_last"]
    ops = torch.ops.puat_fast
    torch.library.opcheck(ops.augment.default, (store, index, F32, False, *small, PAD))
    torch.library.opcheck(ops.augment.default, (x, None, F32, True, None, None, None, 0))
    torch.library.opcheck(ops.augment_backward.default, (x, F32, True, *small, PAD))


@each_device
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_compiles_without_graph_break(dtype: torch.dtype, device: str) -> None:
    def step(store: Tensor, x: Tensor, index: Tensor, top_left: Tensor, flip: Tensor, cos_sin: Tensor) -> Any:
        drawn: dict[str, Any] = {"top_left": top_left, "flip": flip, "cos_sin": cos_sin, "pad": PAD}
        return augment(x * 1.5, **drawn) + 1.0, augment(store, index=index, **drawn)

    given = draws(3, dtype=dtype, device=device)
    x = images((3, 2, 6, 7), dtype, device).requires_grad_()
    small = [given[name] for name in ("top_left", "flip", "cos_sin")]
    index = torch.tensor([4, 0, 4], device=device)
    check_compiles(step, [images((5, 2, 6, 7), U8, device), x, index, *small])


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    def test_kernel_is_built(self) -> None:
        assert hasattr(_C, "augment_cuda"), "a CUDA device, but puat_fast was built without a CUDA compiler"

    def test_nothing_raises_and_nothing_is_read_elsewhere(self) -> None:
        store = images((5, 3, 8, 8), U8, "cuda")
        index = torch.tensor([0, -1, 5, 4, 2**62, -(2**62)], device="cuda")
        out = augment(store, index=index)
        assert_same_bits(out[[0, 3]], augment(store, index=index[[0, 3]]))
        assert out[[1, 2, 4, 5]].isnan().all()
        corners = torch.tensor([[-1, 9], [2**62, -(2**62)], [3, 4]], device="cuda")
        x = images((3, 3, 8, 8), F32, "cuda")
        assert_same_bits(augment(x, top_left=corners, pad=PAD), augment(x, top_left=corners.clamp(0, 2 * PAD), pad=PAD))
        nan = augment(x, cos_sin=torch.full((1, 2), math.nan, device="cuda"))
        assert (nan == 0).all()

    @pytest.mark.parametrize("parts", ["crop and flip", "all"])
    @each_scope
    def test_captured_graph(self, scope: str, parts: str) -> None:
        check_captured(self.step(parts), lambda seed: self.inputs(parts, scope, seed))

    def test_hundred_repeats(self) -> None:
        step, inputs = self.step("all"), self.inputs("all", "image", 0)
        check_repeats(lambda: step(*inputs))

    def test_side_stream(self) -> None:
        check_side_stream(self.step("all"), self.inputs("all", "image", 0))

    @staticmethod
    def step(parts: str) -> Callable[..., tuple[Tensor, ...]]:
        """Gather and augmentation of bytes, augmentation of a batch, and its gradient."""

        def run(store: Tensor, x: Tensor, index: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
            given: dict[str, Any] = dict(zip(PARTS[parts], drawn, strict=True)) | {"pad": PAD}
            gathered = augment(store, index=index, **given, dtype=BF16, channels_last=True)
            out = augment(x, **given)
            small = [given.get(name) for name in ("top_left", "flip", "cos_sin")]
            return gathered, out, torch.ops.puat_fast.augment_backward(out, F32, False, *small, PAD)

        return run

    @staticmethod
    def inputs(parts: str, scope: str, seed: int) -> list[Tensor]:
        given = draws(16, parts, scope, "cuda", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(0, 50, (16,), generator=generator).cuda()
        store, x = images((50, 3, 33, 31), U8, "cuda", seed), images((16, 3, 33, 31), F32, "cuda", seed)
        return [store, x, index, *(given[name] for name in PARTS[parts])]
