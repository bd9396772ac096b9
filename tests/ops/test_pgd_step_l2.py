"""pgd_step in L2: the formula sample by sample, the kernels against the reference, and what has no direction."""

import math

import pytest
import torch
from op_checks import (
    NO_CUDA,
    assert_close,
    assert_same_bits,
    check_captured,
    check_compiles,
    check_repeats,
    check_side_stream,
    each_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import pgd_step, pgd_step_
from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

EPS, STEP = 0.5, 0.2
# One element, odd primes, ragged and whole tiles of every kernel, no samples, samples without elements, one dim, one
# sample, more samples than threads would want, more than a block takes in one go.
SHAPES = [
    (1, 1), (7, 3), (3, 5, 7, 11), (0, 3, 32, 32), (3, 0), (13,), (1, 257), (4, 256), (6, 3, 8, 8), (300, 31),
    (2, 3, 47, 53), (2, 3, 64, 64),
]  # fmt: skip
KERNEL_DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
each_kernel_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
    """x inside and outside the ball in turn, grad of very different lengths with a zero sample, x0 in [0,1]."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator)
    offset, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    for i in range(shape[0]):
        offset[i] *= (0.2, 0.9, 1.5)[i % 3] * EPS / max(float(offset[i].norm()), 1e-9)
        grad[i] *= (1.0, 1e-25, 0.0, 1e25)[i % 4]  # squares of the second and the last are no float32
    return [t.to(device, dtype) for t in (x0 + offset, grad, x0)]


def formula(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """Sample by sample in Python floats: shares no code with the op."""
    samples = []
    for a, g, c in zip(
        *(t.double().reshape(len(t), max(1, t[0].numel())).tolist() for t in (x, grad, x0)), strict=True
    ):
        length = math.hypot(*g)
        moved = [p + (step_size * q / length if length else 0.0) for p, q in zip(a, g, strict=True)]
        away = math.hypot(*(p - q for p, q in zip(moved, c, strict=True)))
        scale = min(1.0, eps / away) if away else 1.0
        samples.append([min(max(q + scale * (p - q), 0.0), 1.0) for p, q in zip(moved, c, strict=True)])
    return torch.tensor(samples, dtype=torch.float64).reshape(x.shape)


def both(*args, **kwargs) -> tuple[Tensor, Tensor]:
    return pgd_step(*args, norm="l2", **kwargs), pgd_step(*args, norm="l2", impl="reference", **kwargs)


def nan_to_two(t: Tensor) -> Tensor:
    return torch.nan_to_num(t, nan=2.0)  # no image has a 2


@each_dtype
@pytest.mark.parametrize("eps", [EPS, 0.0, 100.0])
def test_reference_is_the_formula(dtype, eps):
    args = operands((12, 5, 7), dtype)
    actual = pgd_step(*args, eps, STEP, norm="l2", impl="reference")
    assert actual.dtype == dtype
    assert_close(actual, formula(*args, eps, STEP), dtype)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, dtype, device):
    args = operands(shape, dtype, device)
    before = [t.clone() for t in args]
    actual, expected = both(*args, EPS, STEP)
    assert_close(actual, expected, dtype)
    for arg, copy in zip(args, before, strict=True):
        assert_same_bits(arg, copy)
    target = pgd_step_(*args, EPS, STEP, norm="l2")
    assert target is args[0]
    assert_same_bits(target, actual)


@each_device
@pytest.mark.parametrize(("eps", "step_size"), [(0.0, STEP), (EPS, 0.0), (2.0, 3.0), (1e-30, 1e30), (1e30, 1e-30)])
def test_extreme_radii(eps, step_size, device):
    actual, expected = both(*operands((12, 17), device=device), eps, step_size)
    assert not actual.isnan().any()
    assert_close(actual, expected, torch.float32)


@each_device
def test_each_sample_has_a_ball_and_a_step_of_its_own(device):
    x0 = torch.full((40, 3, 8, 8), 0.5, device=device)  # too far from 0 and 1 for the range to cut in
    grad = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    step = pgd_step(x0, grad, x0, EPS, STEP, norm="l2")
    torch.testing.assert_close((step - x0).flatten(1).norm(dim=1), torch.full((40,), STEP, device=device))
    assert (torch.cosine_similarity((step - x0).flatten(1), grad.flatten(1)) > 0.99999).all()
    for _ in range(4):
        step = pgd_step_(step, grad, x0, EPS, STEP, norm="l2")
    torch.testing.assert_close((step - x0).flatten(1).norm(dim=1), torch.full((40,), EPS, device=device))
    alone = torch.cat(
        [pgd_step(step[i : i + 1], grad[i : i + 1], x0[i : i + 1], EPS, STEP, norm="l2") for i in range(40)]
    )
    assert_same_bits(pgd_step(step, grad, x0, EPS, STEP, norm="l2"), alone)


@each_device
@each_dtype
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_without_a_direction_nothing_moves(impl, dtype, device):
    generator = torch.Generator().manual_seed(0)  # all inside the ball, and of all sizes: x0 + (x - x0) would round
    x, grad, x0 = (torch.rand(5, 11, 13, generator=generator).mul(0.03).to(device, dtype) for _ in range(3))
    for length in (0.0, 1e-40, math.inf, -math.inf, math.nan):
        grad.zero_()[:, 3, 5] = length
        assert_same_bits(pgd_step(x, grad, x0, EPS, STEP, norm="l2", impl=impl), x)
    grad = torch.full_like(x, 2.0**-125)  # the next best has one
    assert not torch.equal(pgd_step(x, grad, x0, EPS, STEP, norm="l2", impl=impl), x)


@each_device
@each_dtype
def test_not_a_number_stays_in_its_sample(dtype, device):
    args = operands((6, 7, 11), dtype, device)
    clean = pgd_step(*args, EPS, STEP, norm="l2", impl="reference")
    args[0][0, 2, 3], args[1][1, 0, 0], args[2][3, 6, 10] = math.nan, math.nan, math.nan
    args[0][4, 0, 0] = math.inf
    actual, expected = both(*args, EPS, STEP)
    assert_close(nan_to_two(actual), nan_to_two(expected), dtype)
    assert actual[0].isnan().all() and actual[3].isnan().all()  # x, x0
    assert not actual[1].isnan().any()  # grad: projected all the same
    for i in (2, 5):
        assert_close(actual[i], clean[i], dtype)


def layouts(t: Tensor) -> dict[str, Tensor]:
    n, c, h, w = t.shape
    wide = torch.zeros(n, c, h, 2 * w, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return {
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "samples inside": t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": wide[..., ::2],
    }


@each_device
@each_dtype
@pytest.mark.parametrize("layout", ["channels_last", "samples inside", "sliced"])
@pytest.mark.parametrize("mixed", [False, True])
def test_layouts(layout, mixed, dtype, device):
    plain = operands((3, 5, 7, 11), dtype, device)
    expected = pgd_step(*plain, EPS, STEP, norm="l2", impl="reference")
    x, grad, x0 = (layouts(t)[layout] for t in plain)
    grad = plain[1] if mixed else grad
    actual = pgd_step(x, grad, x0, EPS, STEP, norm="l2")
    assert_close(actual, expected, dtype)
    assert actual.stride() == torch.empty_like(x).stride()
    assert_close(pgd_step_(x, grad, x0, EPS, STEP, norm="l2"), expected, dtype)


@each_device
@each_kernel_dtype
@pytest.mark.parametrize("margin", [63, 64])
@pytest.mark.parametrize("shape", [(3, 7, 11), (3, 8, 32)], ids=str)
def test_writes_nothing_around_its_tensor(shape, margin, dtype, device):
    plain = operands(shape, dtype, device)
    args, checks = zip(*(guarded(t, margin) for t in plain), strict=True)
    actual = pgd_step_(*args, EPS, STEP, norm="l2")
    assert_same_bits(actual, pgd_step(*plain, EPS, STEP, norm="l2"))  # whatever the alignment
    for check in checks:
        check()


@each_device
@pytest.mark.parametrize("which", [1, 2], ids=["grad", "x0"])
def test_x_may_be_another_argument(which, device):
    args = operands((5, 700), device=device)
    args[which] = args[0]
    expected = pgd_step(*[t.clone() for t in args], EPS, STEP, norm="l2")
    assert_close(expected, pgd_step(*args, EPS, STEP, norm="l2", impl="reference"), torch.float32)
    assert_same_bits(pgd_step_(*args, EPS, STEP, norm="l2"), expected)


@pytest.mark.parametrize("function", [pgd_step, pgd_step_])
def test_mistakes_are_named(function):
    zeros, scalar = torch.zeros(2, 3), torch.zeros(())
    with pytest.raises(ValueError, match="norm: expected 'linf' or 'l2', got 'l1'"):
        function(zeros, zeros, zeros, EPS, STEP, norm="l1")
    with pytest.raises(ValueError, match=r"x: expected a batch, dim 0, for norm 'l2', got shape \(\)"):
        function(scalar, scalar, scalar, EPS, STEP, norm="l2")
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0, got -1"):
        function(zeros, zeros, zeros, -1, STEP, norm="l2")
    with pytest.raises(ValueError, match=r"grad: expected shape \(2, 3\) \(as x\), got \(3,\)"):
        function(zeros, zeros[0], zeros, EPS, STEP, norm="l2")


@pytest.mark.parametrize(
    ("which", "bad", "message"),
    [
        (0, torch.zeros(4, 3), r"out: expected shape \(3, 4\) \(as x\), got \(4, 3\)"),
        (2, torch.zeros(3, 4).bfloat16(), r"grad: expected float32 \(as x\), got bfloat16"),
        (None, torch.zeros(4, 3).t(), r"x: expected one sample after the other in memory, got strides \(1, 3\)"),
        (None, torch.zeros(()), r"x: expected a batch, dim 0, got shape \(\)"),
    ],
)
def test_extension_trusts_nobody(which, bad, message):
    tensors = [bad if which in (i, None) else torch.zeros(3, 4) for i in range(4)]
    with pytest.raises(ValueError, match=message):
        _C.pgd_step_l2_cpu(*capsules(*tensors), EPS, STEP, 1)


@each_device
@pytest.mark.parametrize("op", ["pgd_step", "pgd_step_"])
def test_opcheck(op, device):
    for args in (
        operands((3, 5), device=device),
        [layouts(t)["channels_last"] for t in operands((2, 3, 5, 7), torch.bfloat16, device)],
    ):
        torch.library.opcheck(getattr(torch.ops.puat_fast, op).default, (*args, EPS, STEP, "l2"))


@each_device
def test_compiles_without_graph_break(device):
    def two_steps(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        moved = pgd_step(x * 1.0, grad, x0, EPS, STEP, norm="l2")
        return pgd_step_(moved, grad, x0, EPS, STEP, norm="l2") + 1.0

    check_compiles(two_steps, operands((3, 4), device=device))


@each_kernel_dtype
def test_thread_count_changes_nothing(dtype):
    args = operands((97, 3, 33, 31), dtype)
    outs = [torch.empty_like(args[0]) for _ in range(3)]
    for out, threads in zip(outs, (1, 2, 5), strict=True):
        _C.pgd_step_l2_cpu(*capsules(out, *args), EPS, STEP, threads)
    assert_same_bits(outs[1], outs[0])
    assert_same_bits(outs[2], outs[0])


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    @each_kernel_dtype
    def test_equals_the_cpu(self, dtype):
        args = operands((64, 3, 33, 31), dtype)
        assert_close(pgd_step(*[t.cuda() for t in args], EPS, STEP, norm="l2").cpu(),
                     pgd_step(*args, EPS, STEP, norm="l2"), dtype)  # fmt: skip

    @each_kernel_dtype
    @pytest.mark.parametrize("in_place", [False, True])
    def test_captured_graph(self, in_place, dtype):
        def step(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
            moved = pgd_step(x, grad, x0, EPS, STEP, norm="l2")
            return pgd_step_(moved, grad, x0, EPS, STEP, norm="l2") if in_place else moved

        check_captured(step, lambda seed: operands((8, 3, 33, 31), dtype, "cuda", seed))

    def test_side_stream(self):
        args = operands((64, 3, 128, 129), device="cuda")
        check_side_stream(lambda *t: pgd_step(*t, EPS, STEP, norm="l2"), args)

    @each_kernel_dtype
    def test_hundred_repeats(self, dtype):
        args = operands((300, 3, 32, 33), dtype, "cuda")
        check_repeats(lambda: pgd_step(*args, EPS, STEP, norm="l2"))
