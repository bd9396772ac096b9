"""pgd_step_normalize: the two formulas element by element, the kernels against the reference, bit for bit."""

import math

import pytest
import torch
from op_checks import (
    NO_CUDA,
    assert_same_bits,
    check_captured,
    check_compiles,
    check_repeats,
    check_side_stream,
    each_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import pgd_step, pgd_step_normalize
from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

EPS, STEP = 8 / 255, 2 / 255
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# One pixel, odd primes, one row, one column, no images, no pixels, a whole tile, more than one, two threads' shares.
SHAPES = [(1, 3, 1, 1), (5, 3, 7, 11), (3, 3, 1, 13), (3, 3, 13, 1), (0, 3, 32, 32), (2, 3, 0, 5), (2, 3, 16, 16),
          (2, 3, 17, 31), (40, 3, 32, 32)]  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
each_channels = pytest.mark.parametrize("channels", [3, 4, 5, 8, 16])


def operands(
    shape: tuple[int, ...] = (5, 3, 7, 11), device: str = "cpu", dtype: torch.dtype = F32, seed: int = 0
) -> list[Tensor]:
    """x partly outside the ball and outside [0,1], grad with exact zeros, x0 in [0,1]."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator)
    x = x0 + 2 * EPS * torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    grad = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros(()), grad)
    return [t.to(device, dtype) for t in (x, grad, x0)]


def as_input_gradient(grad: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The gradient as c_in gets it: padded with what must not be read, channels_last."""
    n, _, h, w = grad.shape
    padded = torch.full((n, channels, h, w), math.nan, dtype=dtype, device=grad.device)
    padded[:, :3] = grad
    return padded.contiguous(memory_format=torch.channels_last)


def run(x: Tensor, grad: Tensor, x0: Tensor, **options) -> tuple[Tensor, Tensor]:
    return pgd_step_normalize(x, grad, x0, EPS, STEP, MEAN, STD, **options)


def assert_both_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
        assert a.stride() == e.stride()


def assert_equals_reference(*args: Tensor, **options) -> None:
    assert_both_same(run(*args, **options), run(*args, impl="reference", **options))


@pytest.mark.parametrize(("work", "dtype"), [(F32, F32), (F32, BF16), (F64, F64), (F64, BF16)], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_is_the_formula(impl, work, dtype):
    x, grad, x0 = operands(dtype=work)
    x_adv, c_in = run(x, grad, x0, dtype=dtype, channels=5, impl=impl)
    assert x_adv.dtype == work and c_in.dtype == dtype and c_in.shape == (5, 5, 7, 11)
    assert c_in.is_contiguous(memory_format=torch.channels_last)
    for n in range(5):
        for c in range(3):
            for a, g, o, adv, given in zip(
                *(t[n, c].double().flatten().tolist() for t in (x, grad, x0, x_adv, c_in)), strict=True
            ):
                moved = a + STEP * ((g > 0) - (g < 0))
                expected = min(max(min(max(moved, o - EPS), o + EPS), 0.0), 1.0)
                assert adv == pytest.approx(expected, abs=2**-23 if work == F32 else 1e-15)
                tolerance = {F32: 1e-6, BF16: 2**-8, F64: 1e-13}[dtype]
                assert given == pytest.approx((expected - MEAN[c]) / STD[c], rel=tolerance, abs=tolerance)
    assert (c_in[:, 3:] == 0).all()


@each_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_bitwise(shape, dtype, device):
    args = operands(shape, device)
    before = [t.clone() for t in args]
    actual = run(*args, dtype=dtype)
    assert_both_same(actual, run(*args, dtype=dtype, impl="reference"))
    assert_same_bits(actual[0], pgd_step(*args, EPS, STEP))
    assert actual[1].dtype == dtype and actual[1].shape == shape
    for arg, copy in zip(args, before, strict=True):
        assert_same_bits(arg, copy)


@each_device
@each_dtype
@each_channels
@pytest.mark.parametrize("shape", [(5, 3, 7, 11), (3, 3, 1, 13), (3, 3, 13, 1), (0, 3, 4, 4), (2, 3, 16, 17)], ids=str)
def test_either_gradient_does(shape, channels, dtype, device):
    x, grad, x0 = operands(shape, device)
    expected = run(x, grad, x0, dtype=dtype, channels=channels, impl="reference")
    assert expected[1].shape[1] == channels
    for given in (
        grad,
        grad.to(dtype),
        as_input_gradient(grad, channels, dtype),
        as_input_gradient(grad, channels, F32),
    ):
        assert_both_same(run(x, given, x0, dtype=dtype, channels=channels), expected)


def test_the_gradients_themselves_agree():
    """The claim behind it: of the loss with respect to x and to c_in, one is the other by std > 0."""
    x, _, x0 = operands()
    conv = torch.nn.Conv2d(3, 4, 3, bias=False)
    _, c_in = run(x, torch.zeros_like(x), x0, dtype=F32)
    leaf, inner = x.clone().requires_grad_(), c_in.requires_grad_()
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD))
    (wrt_x,) = torch.autograd.grad(
        conv((pgd_step(x, x * 0, x0, EPS, STEP) + leaf - x - mean) / std).square().sum(), leaf
    )
    (wrt_c_in,) = torch.autograd.grad(conv(inner).square().sum(), inner)
    keen = wrt_x.abs() > 1e-3 * wrt_x.abs().max()  # elsewhere rounding decides
    assert keen.float().mean() > 0.9 and torch.equal(wrt_x.sign()[keen], wrt_c_in.sign()[keen])


def layouts(t: Tensor) -> dict[str, Tensor]:
    n, c, h, w = t.shape
    wide = torch.zeros(n, c, h, 2 * w, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    tall = torch.zeros(n, 2 * c, h, w, dtype=t.dtype, device=t.device)
    tall[:, 1 : c + 1] = t
    crop = torch.zeros(n, c, h, w + 3, dtype=t.dtype, device=t.device)
    crop[..., 1 : w + 1] = t
    return {
        "contiguous": t,
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "every second pixel": wide[..., ::2],
        "some channels": tall[:, 1 : c + 1],
        "cropped": crop[..., 1 : w + 1],
        "transposed": t.transpose(2, 3).contiguous().transpose(2, 3),
    }


@each_device
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "some channels", "cropped"])
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 3, 1, 1))))
def test_layouts(layout, grad_layout, device):
    plain = operands(device=device)
    expected = run(*plain, channels=8, impl="reference")
    x, x0 = (layouts(plain[i])[layout] for i in (0, 2))
    actual = run(x, layouts(plain[1])[grad_layout], x0, channels=8)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    assert actual[0].stride() == torch.empty_like(x).stride() and actual[1].stride() == expected[1].stride()
    mixed = run(x, plain[1], plain[2], channels=8)
    assert_same_bits(mixed[0], expected[0])
    assert_same_bits(run(plain[0], plain[1], x0[:1].expand_as(x0), channels=8)[0],
                     run(plain[0], plain[1], x0[:1].repeat(5, 1, 1, 1), channels=8)[0])  # fmt: skip


@each_device
def test_a_row_and_a_column_of_wider_images(device):
    for part in ((..., slice(3, 4)), (..., slice(3, 4), slice(None))):
        args = [t[part] for t in operands(device=device)]
        expected = run(*(t.contiguous() for t in args), channels=8, impl="reference")
        for a, e in zip(run(*args, channels=8), expected, strict=True):
            assert_same_bits(a, e)


@each_device
def test_not_a_number_and_extremes(device):
    x, grad, x0 = operands(device=device)
    x[0, 0, 0, 0], x[0, 0, 0, 1], x0[1, 2, 3, 4] = math.nan, math.inf, math.nan
    grad[2, 1, 0, 0], grad[2, 1, 0, 1] = math.nan, -math.inf
    for eps, step_size, std in ((EPS, STEP, STD), (0.0, STEP, STD), (EPS, 0.0, (1e-30, 1.0, 1e30))):
        for dtype in (F32, BF16):
            actual, expected = (
                pgd_step_normalize(x, grad, x0, eps, step_size, MEAN, std, dtype=dtype, channels=4, impl=impl)
                for impl in ("auto", "reference")
            )
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    assert actual[0][0, 0, 0, 0].isnan() and actual[1][1, 2, 3, 4].isnan() and not actual[0][2, 1].isnan().any()


def test_no_gradient_flows():
    x, grad, x0 = operands()
    for out in run(x.requires_grad_(), grad, x0):
        assert not out.requires_grad
    with torch.inference_mode():
        assert_equals_reference(*operands())


@each_device
@each_dtype
@pytest.mark.parametrize("margin", [63, 64])
@pytest.mark.parametrize("channels", [3, 8])
def test_writes_nothing_around_its_tensors(channels, margin, dtype, device):
    args = operands((3, 3, 17, 16), device)
    args[1] = as_input_gradient(args[1], channels, dtype)
    expected = run(*args, dtype=dtype, channels=channels, impl="reference")
    tensors, checks = zip(*(guarded(t, margin) for t in [torch.zeros_like(t) for t in expected] + args), strict=True)
    launch = getattr(_C, f"pgd_step_normalize_{device}")
    last = torch.cuda.current_stream().cuda_stream if device == "cuda" else 1
    launch(*capsules(*tensors), EPS, STEP, list(MEAN), list(STD), last)
    assert_both_same(tensors[:2], expected)
    for check in checks:
        check()
    for tensor, arg in zip(tensors[2:], args, strict=True):
        assert torch.equal(tensor.nan_to_num(9.0), arg.nan_to_num(9.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 5).bfloat16()}, "x: expected dtype .*float32.*, got torch.bfloat16"),
        ({"x": torch.zeros(2, 4, 4, 5)}, r"x: expected N x 3 x H x W, got \(2, 4, 4, 5\)"),
        ({"x": torch.zeros(3, 4, 5)}, r"x: expected N x 3 x H x W, got \(3, 4, 5\)"),
        ({"x0": torch.zeros(2, 3, 5, 4)}, r"x0: expected shape \(2, 3, 4, 5\) \(as x\), got \(2, 3, 5, 4\)"),
        ({"x0": torch.zeros(2, 3, 4, 5).double()}, r"x0: expected dtype torch.float32 \(as x\)"),
        ({"x0": torch.zeros(2, 3, 4, 5, device="meta")}, r"x0: expected device cpu \(as x\), got meta"),
        (
            {"grad": torch.zeros(2, 4, 4, 5)},
            r"grad: expected shape \(2, 3, 4, 5\) or \(2, 8, 4, 5\), got \(2, 4, 4, 5\)",
        ),
        ({"grad": torch.zeros(1, 3, 4, 5)}, r"grad: expected shape .*, got \(1, 3, 4, 5\)"),
        ({"grad": torch.zeros(2, 3, 4, 5).half()}, "grad: expected dtype .*, got torch.float16"),
        ({"grad": torch.zeros(2, 3, 4, 5).bfloat16(), "dtype": F32}, "grad: expected dtype .*, got torch.bfloat16"),
        ({"grad": torch.zeros(2, 3, 4, 5, device="meta")}, r"grad: expected device cpu \(as x\), got meta"),
        ({"eps": -0.1}, "eps: expected a finite number >= 0, got -0.1"),
        ({"step_size": math.nan}, "step_size: .*got nan"),
        ({"mean": (0.5, 0.5)}, r"mean: expected 3 finite numbers, got \[0.5, 0.5\]"),
        ({"mean": (0.5, 0.5, math.inf)}, "mean: expected 3 finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std: expected 3 finite numbers > 0"),
        ({"std": (0.5, -1, 0.5)}, "std: expected 3 finite numbers > 0"),
        ({"dtype": torch.float16}, "dtype: expected torch.bfloat16 or torch.float32, got torch.float16"),
        ({"dtype": F64}, "dtype: expected .*, got torch.float64"),
        ({"channels": 2}, "channels: expected 3 or more, got 2"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change, message):
    zeros = torch.zeros(2, 3, 4, 5)
    arguments = {"x": zeros, "grad": zeros, "x0": zeros, "eps": EPS, "step_size": STEP, "mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match=message):
        pgd_step_normalize(**(arguments | {"channels": 8} | change))


ZEROS = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_adv": ZEROS.double()}, "x_adv: expected float32, got float64"),
        ({"x_adv": torch.zeros(2, 3, 4, 10)[..., ::2]}, "x_adv: expected a tensor without gaps or overlap"),
        ({"c_in": torch.zeros(2, 8, 4, 5)}, r"c_in: expected channels_last, got strides \(160, 20, 5, 1\)"),
        ({"c_in": ZEROS[:, :2]}, r"c_in: expected 3 channels, else the shape of x \(2, 3, 4, 5\), got \(2, 2, 4, 5\)"),
        ({"c_in": torch.zeros(2, 3, 4, 5, dtype=torch.int64)}, "c_in: expected float32 or bfloat16, got int64"),
        ({"x": torch.zeros(3, 4, 5)}, r"x: expected 4 dimensions, got \(3, 4, 5\)"),
        ({"x": torch.zeros(2, 3, 4, 8)[..., :5]}, "x: expected rows of pixels without a gap between them"),
        ({"grad": torch.zeros(2, 4, 4, 5)}, r"grad: expected 3 or 8 channels, .* got \(2, 4, 4, 5\)"),
        ({"x0": torch.zeros(2, 3, 5, 4)}, r"x0: expected 3 channels, else the shape of x .*, got \(2, 3, 5, 4\)"),
        ({"mean": [0.5, 0.5]}, "mean: expected 3 numbers, got 2"),
        ({"std": [0.5] * 4}, "std: expected 3 numbers, got 4"),
    ],
)
def test_extension_trusts_nobody(change, message):
    arguments = {name: ZEROS.clone() for name in ("x_adv", "c_in", "x", "grad", "x0")}
    arguments["c_in"] = torch.zeros(2, 8, 4, 5).contiguous(memory_format=torch.channels_last)
    arguments |= {"eps": EPS, "step_size": STEP, "mean": list(MEAN), "std": list(STD)} | change
    arguments |= {name: capsules(t)[0] for name, t in arguments.items() if isinstance(t, Tensor)}
    with pytest.raises(ValueError, match=message):
        _C.pgd_step_normalize_cpu(**arguments, threads=1)


def test_extension_refuses_overlap_and_consumed_capsules():
    buffer, free = torch.zeros(200), [torch.zeros(2, 3, 4, 5) for _ in range(3)]
    c_in = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    x_adv, x = (buffer[i : i + 120].view(2, 3, 4, 5) for i in (0, 80))
    rest = (EPS, STEP, list(MEAN), list(STD), 1)
    for inputs, name in (((x, *free[:2]), "x"), ((free[0], x, free[1]), "grad"), ((*free[:2], x_adv), "x0")):
        with pytest.raises(ValueError, match=f"{name}: expected memory apart from that of x_adv"):
            _C.pgd_step_normalize_cpu(*capsules(x_adv, c_in, *inputs), *rest)
    handed_over = capsules(x_adv, c_in, *free)
    torch.utils.dlpack.from_dlpack(handed_over[1])
    with pytest.raises(ValueError, match="c_in: expected a DLPack capsule named 'dltensor', got 'used_dltensor'"):
        _C.pgd_step_normalize_cpu(*handed_over, *rest)


def op_arguments(shape: tuple[int, ...], device: str, channels: int, dtype: torch.dtype) -> tuple:
    x, grad, x0 = operands(shape, device)
    return (x, as_input_gradient(grad, channels, dtype), x0, EPS, STEP, list(MEAN), list(STD), dtype, channels)


@each_device
def test_opcheck(device):
    for channels, dtype in ((3, F32), (8, BF16)):
        arguments = op_arguments((2, 3, 5, 7), device, channels, dtype)
        arguments[1].nan_to_num_(0.0)
        torch.library.opcheck(torch.ops.puat_fast.pgd_step_normalize.default, arguments)


@each_device
def test_compiles_without_graph_break(device):
    def step(x: Tensor, grad: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        x_adv, c_in = run(x * 1.0, grad, x0, channels=8)
        return run(x_adv, c_in, x0, channels=8)

    check_compiles(step, operands(device=device))


def test_thread_count_changes_nothing():
    args = operands((61, 3, 33, 31))
    expected = run(*args, channels=8, impl="reference")
    for threads in (1, 2, 5):
        outs = [torch.empty_like(t) for t in expected]
        _C.pgd_step_normalize_cpu(*capsules(*outs, *args), EPS, STEP, list(MEAN), list(STD), threads)
        assert_both_same(tuple(outs), expected)


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    @each_dtype
    @each_channels
    def test_equals_the_cpu_bitwise(self, channels, dtype):
        x, grad, x0 = operands((7, 3, 33, 31))
        grad = as_input_gradient(grad, channels, dtype)
        actual = run(*(t.cuda() for t in (x, grad, x0)), dtype=dtype, channels=channels)
        assert_both_same(tuple(t.cpu() for t in actual), run(x, grad, x0, dtype=dtype, channels=channels))

    @each_dtype
    def test_captured_graph(self, dtype):
        def two_steps(x: Tensor, grad: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
            x_adv, c_in = run(x, grad, x0, dtype=dtype, channels=8)
            return run(x_adv, c_in, x0, dtype=dtype, channels=8)

        check_captured(two_steps, lambda seed: operands((8, 3, 33, 31), "cuda", seed=seed))

    def test_a_crop_is_captured_too(self):
        def crop(x: Tensor, grad: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
            return run(*(t[..., 1:-1] for t in (x, grad, x0)), channels=8)

        check_captured(crop, lambda seed: operands((8, 3, 33, 31), "cuda", seed=seed))

    def test_side_stream(self):
        check_side_stream(lambda *t: run(*t, channels=8), operands((64, 3, 128, 129), "cuda"))

    @each_dtype
    def test_hundred_repeats(self, dtype):
        args = operands((64, 3, 32, 33), "cuda")
        check_repeats(lambda: run(*args, dtype=dtype, channels=8))
