"""The four stages of bn_silu on the CPU, called as puat_fast.ops.bn_silu calls them, against float64 formulas."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_close, assert_same_bits, guarded
from torch import Tensor

from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

EPS = 1e-5
NO_PAD = (0, 0, 0, 0)  # left, right, top, bottom
# One pixel of one channel, odd primes, few and many channels, more than one block of work (of 32768 floats) per group,
# a block of one pixel, nothing at all.
SHAPES = [
    (2, 1, 1, 1),
    (2, 3, 5, 7),
    (6, 17, 3, 2),
    (4, 16, 31, 37),
    (2, 3, 101, 103),
    (2, 160, 17, 13),
    (2, 640, 8, 8),
    (2, 40000, 1, 3),
    (0, 16, 8, 8),
    (4, 16, 0, 8),
    (4, 0, 8, 8),
]
PADS = [NO_PAD, (0, 1, 0, 1), (1, 1, 1, 1), (2, 0, 3, 1)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_pad = pytest.mark.parametrize("pad", PADS, ids=str)
each_groups = pytest.mark.parametrize("groups", [1, 2])


def call(function: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    handed_over = [None if t is None else capsules(t)[0] for t in tensors]
    getattr(_C, f"bn_silu_{function}_cpu")(*handed_over, *numbers)


def images(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def table(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


class Case:
    """h with weight, bias and the gradient of the padded result; mean and rstd near h's, but not its own."""

    def __init__(self, shape: tuple[int, ...], groups: int, pad: Sequence[int] = NO_PAD, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n, c, h, w = shape
        self.groups, self.pad = groups, tuple(pad)
        self.h = images(*shape, seed=seed)
        self.weight, self.bias = torch.randn(2, c, generator=generator)
        self.mean = 0.1 * torch.randn(groups, c, generator=generator)
        self.rstd = 0.5 + torch.rand(groups, c, generator=generator)
        self.grad_out = images(n, c, h + pad[2] + pad[3], w + pad[0] + pad[1], seed=seed + 1)
        self.grad_h = images(*shape, seed=seed + 2)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.mean, self.rstd, self.weight, self.bias]

    def expand(self, values: Tensor) -> Tensor:
        """G x C to N x C x 1 x 1, in float64."""
        return values.double().repeat_interleave(len(self.h) // self.groups, 0)[:, :, None, None]

    def formula(self, h: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        xhat = (h - self.expand(mean)) * self.expand(rstd)
        y = xhat * self.weight.double()[:, None, None] + self.bias.double()[:, None, None]
        return F.pad(y * torch.sigmoid(y), self.pad)

    def sums(self) -> tuple[Tensor, Tensor]:
        """sum dy and sum dy xhat of each group and channel, in float64, from autograd: d loss / d bias, d weight."""
        weight = self.weight.double().expand(self.groups, -1).clone().requires_grad_()
        bias = self.bias.double().expand(self.groups, -1).clone().requires_grad_()
        xhat = (self.h.double() - self.expand(self.mean)) * self.expand(self.rstd)
        repeats = len(self.h) // self.groups
        spread = [t.repeat_interleave(repeats, 0)[:, :, None, None] for t in (weight, bias)]
        y = xhat * spread[0] + spread[1]
        (F.pad(y * torch.sigmoid(y), self.pad) * self.grad_out.double()).sum().backward()
        return bias.grad, weight.grad


def batch_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per group and channel, in float64."""
    rows = x.double().reshape(groups, len(x) // groups, x.shape[1], -1).transpose(1, 2).flatten(2)
    return rows.mean(2), rows.var(2, unbiased=False)


@each_shape
@each_groups
def test_stats(shape: tuple[int, ...], groups: int) -> None:
    x = images(*shape, mean=0.5)
    mean, var, rstd = (table(groups, shape[1]) for _ in range(3))
    call("stats", [mean, var, rstd, None, x, None, None, None], 0.1, EPS, groups, 1)
    if x.numel() == 0:
        assert (mean == 0).all() and (var == 0).all()
        assert_close(rstd, torch.full_like(rstd, EPS**-0.5), torch.float32)
        return
    expected_mean, expected_var = batch_statistics(x, groups)
    assert_close(mean, expected_mean, torch.float32)
    assert_close(var, expected_var, torch.float32)
    assert_close(rstd, (expected_var + EPS).rsqrt(), torch.float32)


@pytest.mark.parametrize(("mean", "std"), [(1000.0, 1.0), (-1e5, 1.0), (1.0, 1e-4), (0.0, 1e3)])
def test_stats_of_large_means(mean: float, std: float) -> None:
    x = (mean + std * images(8, 5, 31, 29).double()).float()
    expected_mean, expected_var = batch_statistics(x, 2)
    found = [table(2, 5) for _ in range(3)]
    call("stats", [*found, None, x, None, None, None], 0.1, 0.0, 2, 1)
    torch.testing.assert_close(found[0].double(), expected_mean, rtol=2**-22, atol=2**-22 * std)
    torch.testing.assert_close(found[1].double(), expected_var, rtol=2**-20, atol=0)
    torch.testing.assert_close(found[2].double(), expected_var.rsqrt(), rtol=2**-20, atol=0)


def test_stats_of_drifting_means() -> None:
    x = images(64, 3, 32, 32) + 100 * torch.arange(64.0)[:, None, None, None]  # each block of another mean
    expected_mean, expected_var = batch_statistics(x, 1)
    mean, var, rstd = (table(1, 3) for _ in range(3))
    call("stats", [mean, var, rstd, None, x, None, None, None], 0.1, EPS, 1, 1)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=2**-22, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=2**-20, atol=0)


def test_stats_of_a_constant() -> None:
    x = torch.full((2, 3, 50, 50), 0.1).contiguous(memory_format=torch.channels_last)
    mean, var, rstd = (table(1, 3) for _ in range(3))
    call("stats", [mean, var, rstd, None, x, None, None, None], 0.1, 0.25, 1, 1)
    assert (mean == x[0, 0, 0, 0]).all() and (var <= 1e-16).all() and (rstd == 2.0).all()


@each_groups
@pytest.mark.parametrize("momentum", [0.1, torch.tensor(0.25), 1.0, 0.0], ids=str)
def test_running_statistics(groups: int, momentum: float) -> None:
    x = images(4, 17, 5, 7, mean=2.0)
    running = [torch.linspace(-1, 1, 17), torch.linspace(0.5, 2, 17)]
    expected = [t.double() for t in running]
    for part in x.double().chunk(groups):
        F.batch_norm(part, *expected, training=True, momentum=float(momentum))
    call("stats", [table(groups, 17), None, table(groups, 17), None, x, None, *running], momentum, EPS, groups, 1)
    for actual, wanted in zip(running, expected, strict=True):
        assert_close(actual, wanted, torch.float32)


def test_running_statistics_of_no_images_stay() -> None:
    running = [torch.rand(3), torch.rand(3)]
    before = [t.clone() for t in running]
    call("stats", [table(1, 3), None, table(1, 3), None, images(0, 3, 8, 8), None, *running], 0.1, EPS, 1, 1)
    for actual, expected in zip(running, before, strict=True):
        assert_same_bits(actual, expected)


@each_shape
@pytest.mark.parametrize("target", ["new", "x", "residual"])
def test_residual(shape: tuple[int, ...], target: str) -> None:
    x, residual = images(*shape, seed=1), images(*shape, seed=2)
    expected = x + residual
    h = {"new": torch.full_like(x, math.nan), "x": x, "residual": residual}[target]
    found, wanted = ([table(2, shape[1]) for _ in range(3)] for _ in range(2))
    call("stats", [*found, h, x, residual, None, None], 0.1, EPS, 2, 1)
    call("stats", [*wanted, None, expected, None, None, None], 0.1, EPS, 2, 1)
    assert_same_bits(h, expected)
    for actual, value in zip(found, wanted, strict=True):
        assert_same_bits(actual, value)


@each_shape
@each_pad
@each_groups
def test_apply(shape: tuple[int, ...], pad: tuple[int, ...], groups: int) -> None:
    case = Case(shape, groups, pad)
    out = torch.full_like(case.grad_out, math.nan)
    call("apply", [out, case.h, *case.parameters], *pad, 1)
    assert_close(out, case.formula(case.h.double(), case.mean, case.rstd), torch.float32)


def assert_close_sums(actual: Tensor, expected: Tensor, case: Case) -> None:
    """To the rounding of as many terms, up to about 10, as a group has pixels: a sum may be next to 0."""
    pixels = case.h.numel() // max(1, case.h.shape[1] * case.groups)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-20, atol=2**-17 * math.sqrt(pixels))


@each_shape
@each_pad
@each_groups
def test_reduce(shape: tuple[int, ...], pad: tuple[int, ...], groups: int) -> None:
    case = Case(shape, groups, pad)
    sums = [table(groups, shape[1]), table(groups, shape[1])]
    call("reduce", [*sums, case.grad_out, case.h, *case.parameters], *pad, 1)
    for actual, expected in zip(sums, case.sums(), strict=True):
        assert_close_sums(actual, expected, case)


@each_shape
@each_pad
@each_groups
@pytest.mark.parametrize("with_grad_h", [False, True])
def test_input_grad_of_constant_statistics(
    shape: tuple[int, ...], pad: tuple[int, ...], groups: int, with_grad_h: bool
) -> None:
    case = Case(shape, groups, pad)
    h = case.h.double().requires_grad_()
    (case.formula(h, case.mean, case.rstd) * case.grad_out.double()).sum().backward()
    expected = h.grad + case.grad_h.double() if with_grad_h else h.grad
    grad_x, grad_h = torch.full_like(case.h, math.nan), case.grad_h if with_grad_h else None
    call("input_grad", [grad_x, case.grad_out, grad_h, case.h, *case.parameters, None, None], *pad, 1)
    assert_close(grad_x, expected, torch.float32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s)], ids=str)
@each_pad
@each_groups
def test_stages_in_a_row_are_batch_norm_and_silu(shape: tuple[int, ...], pad: tuple[int, ...], groups: int) -> None:
    if math.prod(shape) // shape[1] == groups:
        return  # torch refuses one value per channel
    case = Case(shape, groups, pad)
    h = case.h.double().requires_grad_()
    parameters = [case.weight.double().requires_grad_(), case.bias.double().requires_grad_()]
    parts = [F.batch_norm(part, None, None, *parameters, training=True, eps=EPS) for part in h.chunk(groups)]
    expected = F.pad(F.silu(torch.cat(parts)), pad)
    (expected * case.grad_out.double()).sum().backward()

    call("stats", [case.mean, None, case.rstd, None, case.h, None, None, None], 0.1, EPS, groups, 1)
    out, grad_x = torch.full_like(case.grad_out, math.nan), torch.full_like(case.h, math.nan)
    sums = [table(groups, shape[1]), table(groups, shape[1])]
    call("apply", [out, case.h, *case.parameters], *pad, 1)
    call("reduce", [*sums, case.grad_out, case.h, *case.parameters], *pad, 1)
    call("input_grad", [grad_x, case.grad_out, None, case.h, *case.parameters, *sums], *pad, 1)
    assert_close(out, expected.detach(), torch.float32)
    assert_close_sums(sums[0].sum(0), parameters[1].grad, case)
    assert_close_sums(sums[1].sum(0), parameters[0].grad, case)
    size = float((case.weight * case.rstd).abs().max() * case.grad_out.abs().max())  # its terms may cancel
    torch.testing.assert_close(grad_x.double(), h.grad, rtol=2**-18, atol=2**-20 * size)


def silu(y: Tensor) -> Tensor:
    h = y.reshape(-1, 1, 1, 1)
    out = torch.empty_like(h)
    zero, one = torch.zeros(1), torch.ones(1)
    call("apply", [out, h, zero[None], one[None], one, zero], *NO_PAD, 1)
    return out.flatten()


def test_silu_of_every_magnitude() -> None:
    every_256th = torch.arange(-(2**31), 2**31, 257 * 64).to(torch.int32).view(torch.float32)  # of all floats
    y = every_256th[every_256th.isfinite() & (every_256th > -88)]  # below, exp(-y) is beyond float32
    exact = y.double() * torch.sigmoid(y.double())
    size = exact.abs().float()
    units = torch.nextafter(size, torch.tensor(math.inf)) - size
    assert len(y) > 100_000
    assert ((silu(y).double() - exact).abs() / units.double()).max() < 3.0


def test_silu_of_the_extremes() -> None:
    y = torch.tensor([0.0, 100.0, -100.0, 3e38, -3e38, math.inf, -math.inf, math.nan] * 3)
    torch.testing.assert_close(silu(y), F.silu(y), rtol=0, atol=0, equal_nan=True)


def test_silu_grad_of_every_magnitude() -> None:
    y = torch.cat([torch.linspace(-110, 110, 100_003), torch.tensor([0.0, 1e30, -1e30])])
    h = y.reshape(-1, 1, 1, 1)
    grad_x, zero, one = torch.empty_like(h), torch.zeros(1), torch.ones(1)
    call("input_grad", [grad_x, torch.ones_like(h), None, h, zero[None], one[None], one, zero, None, None], *NO_PAD, 1)
    wide = y.double().requires_grad_()
    F.silu(wide).sum().backward()
    # 1 - sigmoid(y), next to 1 off by 2^-24, times y; beyond 17 it is 0
    torch.testing.assert_close(grad_x.flatten().double(), wide.grad, rtol=0, atol=17 * 2**-24 + 2**-22)


def test_not_a_number_stays_in_its_channel() -> None:
    case = Case((2, 17, 5, 7), 1)
    case.h[1, 3, 2, 2] = math.nan
    call("stats", [case.mean, None, case.rstd, None, case.h, None, None, None], 0.1, EPS, 1, 1)
    out = torch.empty_like(case.h)
    call("apply", [out, case.h, *case.parameters], *NO_PAD, 1)
    assert out[:, 3].isnan().all() and out.isnan().sum() == out[:, 3].numel()


def all_stages(case: Case, threads: int) -> list[Tensor]:
    """Every result of every stage."""
    n, c = len(case.mean), case.h.shape[1]
    mean, var, rstd, sum_dy, sum_dy_xhat = (table(n, c) for _ in range(5))
    running = [torch.zeros(c), torch.ones(c)]
    h, grad_x, out = torch.empty_like(case.h), torch.empty_like(case.h), torch.empty_like(case.grad_out)
    call("stats", [mean, var, rstd, h, case.h, case.grad_h, *running], 0.1, EPS, n, threads)
    call("apply", [out, h, mean, rstd, case.weight, case.bias], *case.pad, threads)
    arguments = [case.grad_out, h, mean, rstd, case.weight, case.bias]
    call("reduce", [sum_dy, sum_dy_xhat, *arguments], *case.pad, threads)
    sums = [sum_dy, sum_dy_xhat]
    call("input_grad", [grad_x, case.grad_out, case.grad_h, *arguments[1:], *sums], *case.pad, threads)
    again = [torch.empty_like(case.h), table(n, c), table(n, c)]
    call("backward", [*again, case.grad_out, case.grad_h, *arguments[1:]], *case.pad, threads)
    return [mean, var, rstd, *running, h, out, sum_dy, sum_dy_xhat, grad_x, *again]


@pytest.mark.parametrize("pad", PADS[:2], ids=str)
def test_thread_count_changes_nothing(pad: tuple[int, ...]) -> None:
    case = Case((6, 17, 61, 59), 2, pad)
    expected = all_stages(case, 1)
    assert not any(t.isnan().any() for t in expected)
    for threads in (2, 5):
        for actual, wanted in zip(all_stages(case, threads), expected, strict=True):
            assert_same_bits(actual, wanted)


@each_pad
def test_writes_nothing_around_its_tensors(pad: tuple[int, ...]) -> None:
    for shape in ((2, 3, 5, 7), (4, 16, 31, 37)):
        case = Case(shape, 2, pad)
        checks = []

        def guard(t: Tensor, checks: list[Any] = checks) -> Tensor:
            inner, check = guarded(t, margin=61)  # an odd margin: nothing is aligned
            checks.append(check)
            return inner

        plain = all_stages(case, 1)
        mean, var, rstd, running_mean, running_var, h, out, sum_dy, sum_dy_xhat, grad_x, *again = found = [
            guard(torch.full_like(t, math.nan)) for t in plain
        ]
        running_mean.fill_(0), running_var.fill_(1)
        x, residual, grad_out, weight, bias = map(guard, (case.h, case.grad_h, case.grad_out, case.weight, case.bias))
        call("stats", [mean, var, rstd, h, x, residual, running_mean, running_var], 0.1, EPS, 2, 1)
        call("apply", [out, h, mean, rstd, weight, bias], *pad, 1)
        call("reduce", [sum_dy, sum_dy_xhat, grad_out, h, mean, rstd, weight, bias], *pad, 1)
        arguments = [grad_x, grad_out, residual, h, mean, rstd, weight, bias, sum_dy, sum_dy_xhat]
        call("input_grad", arguments, *pad, 1)
        call("backward", [*again, *arguments[1:-2]], *pad, 1)
        for check in checks:
            check()
        for actual, expected in zip(found, plain, strict=True):
            assert_same_bits(actual, expected)
        for actual, expected in ((x, case.h), (residual, case.grad_h), (grad_out, case.grad_out)):
            assert_same_bits(actual, expected)


def test_apply_in_place() -> None:
    case = Case((2, 17, 5, 7), 1)
    expected = torch.empty_like(case.h)
    call("apply", [expected, case.h, *case.parameters], *NO_PAD, 1)
    call("apply", [case.h, case.h, *case.parameters], *NO_PAD, 1)
    assert_same_bits(case.h, expected)


@each_shape
@each_pad
@each_groups
@pytest.mark.parametrize("with_grad_h", [False, True])
def test_backward_is_reduce_and_input_grad(
    shape: tuple[int, ...], pad: tuple[int, ...], groups: int, with_grad_h: bool
) -> None:
    case = Case(shape, groups, pad)
    grad_h = case.grad_h if with_grad_h else None
    actual, expected = (
        [torch.full_like(case.h, math.nan), table(groups, shape[1]), table(groups, shape[1])] for _ in range(2)
    )
    call("backward", [*actual, case.grad_out, grad_h, case.h, *case.parameters], *pad, 1)
    call("reduce", [*expected[1:], case.grad_out, case.h, *case.parameters], *pad, 1)
    call("input_grad", [expected[0], case.grad_out, grad_h, case.h, *case.parameters, *expected[1:]], *pad, 1)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def arguments_of(function: str) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """Good ones, by name, for 4 x 3 x 5 x 7 in two groups."""
    x = [images(4, 3, 5, 7, seed=i) for i in range(4)]
    wide = images(4, 3, 6, 8)
    pad = {"left": 0, "right": 1, "top": 0, "bottom": 1, "threads": 1}
    two_groups = {"mean": torch.zeros(2, 3), "rstd": torch.ones(2, 3)}
    fixed = {"h": x[0], **two_groups, "weight": torch.ones(3), "bias": torch.zeros(3)}
    sums = {"sum_dy": torch.zeros(2, 3), "sum_dy_xhat": torch.zeros(2, 3)}
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    stats = {"mean": torch.zeros(2, 3), "var": torch.zeros(2, 3), "rstd": torch.ones(2, 3)}
    return {
        "stats": (
            {**stats, "h": x[0], "x": x[1], "residual": x[2], **running},
            {"momentum": 0.1, "eps": EPS, "groups": 2, "threads": 1},
        ),
        "apply": ({"out": wide, **fixed}, pad),
        "reduce": ({**sums, "grad_out": wide, **fixed}, pad),
        "input_grad": ({"grad_x": x[1], "grad_out": wide, "grad_h": x[2], **fixed, **sums}, pad),
        "backward": ({"grad_x": x[1], **sums, "grad_out": wide, "grad_h": x[2], **fixed}, pad),
    }[function]


FUNCTIONS = ["stats", "apply", "reduce", "input_grad", "backward"]
IMAGES = {"x", "h", "residual", "out", "grad_out", "grad_x", "grad_h"}
EACH_TENSOR = [(function, name) for function in FUNCTIONS for name in arguments_of(function)[0]]


def refuses(function: str, change: dict[str, Any], message: str) -> None:
    tensors, numbers = arguments_of(function)
    tensors |= {name: value for name, value in change.items() if name in tensors}
    numbers |= {name: value for name, value in change.items() if name in numbers}
    with pytest.raises(ValueError, match=message):
        call(function, list(tensors.values()), *numbers.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_are_taken(function: str) -> None:
    tensors, numbers = arguments_of(function)
    call(function, list(tensors.values()), *numbers.values())


@pytest.mark.parametrize(("function", "name"), EACH_TENSOR)
def test_every_tensor_is_checked(function: str, name: str) -> None:
    good = arguments_of(function)[0][name]
    accepted = "float32 or bfloat16" if name in IMAGES else "float32"
    refuses(function, {name: good.double()}, f"^{name}: expected {accepted}, got float64")
    if name == ("x" if function == "stats" else "h"):  # which tells what the other images must be
        refuses(function, {name: good.bfloat16()}, rf"^\w+: expected bfloat16 \(as {name}\), got float32")
    else:
        expected = r"float32 \(as [xh]\)" if name in IMAGES else "float32"
        refuses(function, {name: good.bfloat16()}, f"^{name}: expected {expected}, got bfloat16")
    refuses(function, {name: good[None]}, f"^{name}: expected shape")
    # x and h give the shape that the others must have, the number of groups is that of mean.
    others = {"x": "residual|h", "h": "mean|rstd|grad_x|out|grad_out" if function != "stats" else "h"}
    blamed = others.get(name, "rstd|mean" if name == "mean" else name)
    refuses(function, {name: good[..., :-1].clone(memory_format=torch.preserve_format)}, f"^({blamed}): expected shape")
    if name in IMAGES:
        refuses(function, {name: good.contiguous()}, f"^{name}: expected a dense channels_last tensor, got shape")
        sliced = torch.cat([good, good], 1).contiguous(memory_format=torch.channels_last)[:, : good.shape[1]]
        refuses(function, {name: sliced}, f"^{name}: expected a dense channels_last tensor, got shape")
    else:
        refuses(function, {name: torch.stack([good, good], -1)[..., 0]}, f"^{name}: expected a contiguous tensor")


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [
        ("stats", "mean", "rstd"),
        ("stats", "mean", "var"),
        ("stats", "running_mean", "running_var"),
        ("reduce", "sum_dy", "sum_dy_xhat"),
        ("reduce", "sum_dy", "mean"),
        ("reduce", "sum_dy_xhat", "rstd"),
        ("apply", "out", "h"),
        ("input_grad", "grad_x", "grad_out"),
        ("input_grad", "grad_x", "grad_h"),
        ("backward", "grad_x", "h"),
        ("backward", "grad_x", "grad_h"),
        ("backward", "sum_dy", "sum_dy_xhat"),
        ("backward", "sum_dy", "rstd"),
    ],
)
def test_one_memory_for_two_is_refused(function: str, first: str, second: str) -> None:
    tensors, _ = arguments_of(function)
    larger, smaller = sorted((first, second), key=lambda name: -tensors[name].numel())
    part = tensors[larger].as_strided(tensors[smaller].shape, tensors[smaller].stride())
    change = {larger: tensors[larger], smaller: part}
    refuses(function, change, f"^({first}|{second}): expected memory apart from that of ({first}|{second})")


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [("stats", "h", "x"), ("stats", "h", "residual"), ("apply", "out", "h")],
)
def test_partial_overlap_is_refused(function: str, first: str, second: str) -> None:
    buffer = images(5, 3, 5, 7)
    change = {first: buffer[:4], second: buffer[1:]}
    no_pad = {"right": 0, "bottom": 0}
    refuses(function, change | no_pad, f"^{second}: expected memory apart from that of {first}, or the same")


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("stats", {"groups": 3}, "^groups: expected a number of groups that divides the 4 images, got 3"),
        ("stats", {"groups": 0}, "^groups: expected a number .* got 0"),
        ("stats", {"h": None}, "^residual: expected h and residual both or neither"),
        ("stats", {"residual": None}, "^h: expected h and residual both or neither"),
        ("stats", {"running_mean": None}, "^running_var: expected running_mean and running_var both or neither"),
        ("input_grad", {"sum_dy": None}, "^sum_dy_xhat: expected sum_dy and sum_dy_xhat both or neither"),
        ("apply", {"mean": torch.zeros(3, 3)}, "^mean: expected a number of groups that divides the 4 images, got 3"),
        ("apply", {"left": -1, "right": 2}, r"^left, right, top, bottom: expected padding >= 0, got \(-1, 2, 0, 1\)"),
        ("apply", {"bottom": 0}, r"^out: expected shape \(4, 3, 5, 8\), got \(4, 3, 6, 8\)"),
    ],
)
def test_mistakes_are_named(function: str, change: dict[str, Any], message: str) -> None:
    refuses(function, change, message)


def test_one_value_has_no_unbiased_variance() -> None:
    tables = [table(2, 3), None, table(2, 3)]
    x, running = images(2, 3, 1, 1), [torch.zeros(3), torch.ones(3)]
    with pytest.raises(ValueError, match=r"^x: expected more than one value per channel and group"):
        call("stats", [*tables, None, x, None, *running], 0.1, EPS, 2, 1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_consumed_capsule_is_refused(function: str) -> None:
    tensors, numbers = arguments_of(function)
    handed_over = capsules(*tensors.values())
    torch.utils.dlpack.from_dlpack(handed_over[1])
    with pytest.raises(ValueError, match=f"{list(tensors)[1]}: expected a DLPack capsule named 'dltensor'"):
        getattr(_C, f"bn_silu_{function}_cpu")(*handed_over, *numbers.values())
