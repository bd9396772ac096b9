import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bn_silu_cases import PADS, SHAPES, compare, each_dtype, formula, operands
from op_checks import (
    assert_close,
    assert_same_bits,
    check_compiles,
    check_gradients,
    each_device,
    each_triton_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import bn_silu, reference_only, update_running_stats
from puat_fast.ops._library import INTERPRETED


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs, yet several tiles to a program and several programs to a column, as in training."""
    if INTERPRETED:
        from puat_fast.kernels import batch_stats

        monkeypatch.setattr(batch_stats, "TILE", 512)
        monkeypatch.setattr(batch_stats, "PROGRAMS", 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pad", PADS, ids=str)
def test_reference_is_the_formula(pad: tuple[int, ...], training: bool) -> None:
    shape, groups = (4, 3, 5, 7), 2 if training else 1
    compare("cpu", torch.float64, shape, training=training, pad=pad, groups=groups, momentum=0.3)
    with reference_only():
        compare("cpu", torch.float32, shape, training=training, pad=pad, with_residual=False)
        compare("cpu", torch.bfloat16, shape, training=training, pad=pad, frozen=training)


@pytest.mark.parametrize("training", [True, False])
def test_reference_gradcheck(training: bool) -> None:
    o = operands((4, 2, 2, 3), torch.float64)
    given = [o[name].requires_grad_() for name in ("x", "residual", "weight", "bias")]

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        running, options = (o["running_mean"].clone(), o["running_var"].clone()), {"pad": (0, 1, 0, 1), "groups": 2}
        return bn_silu(x, weight, bias, *running, training=training, residual=residual, **options)[:2]

    check_gradients(function, given)


@each_triton_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_train_mode(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    pad = PADS[SHAPES.index(shape) % len(PADS)]
    compare(device, dtype, shape, training=True, pad=pad, momentum=0.3, with_residual=shape[1] != 5)


@each_triton_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
def test_eval_mode(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    pad = PADS[-SHAPES.index(shape) % len(PADS)]
    compare(device, dtype, shape, training=False, pad=pad, with_residual=shape[1] != 160)


@each_triton_device
@pytest.mark.parametrize("pad", PADS[:2], ids=str)
@pytest.mark.parametrize("use", ["out", "h"])
@pytest.mark.parametrize("training", [True, False])
def test_groups_and_what_is_used(training: bool, use: str, pad: tuple[int, ...], device: str) -> None:
    groups = 3 if training else 1
    compare(device, torch.float32, (6, 5, 3, 7), training=training, use=use, pad=pad, groups=groups, momentum=0.3)


@each_triton_device
def test_frozen(device: str) -> None:
    compare(device, torch.float32, (2, 3, 5, 7), training=True, frozen=True)


@each_triton_device
@pytest.mark.parametrize("shape", [(2, 3, 13, 17), (1, 1, 1, 3)], ids=str)
def test_mean_far_larger_than_the_deviation(shape: tuple[int, ...], device: str) -> None:
    o = operands(shape, torch.float32, device, mean=3000.0)
    result = bn_silu(o["x"], o["weight"], o["bias"], None, None, training=True)
    expected, (mean, var) = formula(
        o["x"].double(), o["weight"].double(), o["bias"].double(), None, None, training=True
    )
    assert_close(result.mean, mean, torch.float32)
    assert_close(result.var, var, torch.float32, 64.0)
    torch.testing.assert_close(result.out.double(), expected, rtol=0, atol=1e-3)  # x itself is good to 1e-4


@each_triton_device
def test_deferred_update_is_the_update(device: str) -> None:
    o = operands((6, 3, 5, 7), torch.float32, device)
    updated = [o["running_mean"].clone(), o["running_var"].clone()]
    momentum = torch.tensor(0.3, device=device)
    bn_silu(o["x"], o["weight"], o["bias"], *updated, training=True, momentum=momentum, groups=3)
    result = bn_silu(o["x"], o["weight"], o["bias"], None, None, training=True, groups=3)
    for m in (0.3, momentum):
        later = [o["running_mean"].clone(), o["running_var"].clone()]
        update_running_stats(*later, result.mean, result.var, m)
        for actual, expected in zip(later, updated, strict=True):
            assert_close(actual, expected, torch.float32, 2.0)


@each_triton_device
@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_may_be_a_tensor(momentum: float, device: str) -> None:
    o = operands((2, 3, 5, 7), torch.float32, device)
    kept = []
    for m in (momentum, torch.tensor(momentum, device=device), torch.tensor(momentum, device=device).double()):
        running = [o["running_mean"].clone(), o["running_var"].clone()]
        result = bn_silu(o["x"], o["weight"], o["bias"], *running, training=True, momentum=m)
        kept.append(torch.stack(running))
        if momentum in (0.0, 1.0):
            batch = [o["running_mean"], o["running_var"]] if momentum == 0 else [result.mean[0], result.var[0]]
            assert_same_bits(kept[-1], torch.stack(batch))
    assert_same_bits(kept[0], kept[1])
    assert_same_bits(kept[0], kept[2])


@each_triton_device
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight",), ("bias", "x"), ()], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_only_where_needed(training: bool, wanted: tuple[str, ...], device: str) -> None:
    o = operands((2, 3, 3, 5), torch.float32, device)
    every, some = [], []
    for names, grads in ((("x", "residual", "weight", "bias"), every), (wanted, some)):
        given = {k: v.clone().requires_grad_(k in names) for k, v in o.items()}
        result = bn_silu(**given, training=training)
        if names:
            (result.out * torch.arange(result.out.numel(), device=device).view(result.out.shape)).sum().backward()
        assert result.out.requires_grad == bool(names)
        grads += [v.grad for k, v in given.items() if k in wanted]
        assert all(v.grad is None for k, v in given.items() if k not in names)
    for a, b in zip(some, every, strict=True):
        assert_same_bits(a, b)


@each_triton_device
def test_extreme_activations_are_those_of_torch(device: str) -> None:
    y = torch.tensor([0.0, -0.0, 1e-30, 20, -20, 88, -88, 100, -100, 1e30, -1e30, math.inf, -math.inf, math.nan])
    x = y.view(1, 1, 1, -1).to(device).requires_grad_()
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    out = bn_silu(x, one, zero, zero, one - 1e-5, training=False).out
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected = F.silu(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
    finite = x.isfinite()
    torch.testing.assert_close(grad[finite], expected_grad[finite], rtol=1e-5, atol=1e-30)


def layouts(t: Tensor) -> dict[str, Tensor]:
    n, c, h, w = t.shape
    wide = torch.zeros(n, c, h, 2 * w, dtype=t.dtype, device=t.device).contiguous(memory_format=torch.channels_last)
    wide[..., ::2] = t
    return {"contiguous": t.contiguous(), "permuted": t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
            "sliced": wide[..., ::2], "expanded": t[:, :1].expand(t.shape)}  # fmt: skip


@each_triton_device
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("which", ["x", "residual", "gradients"])
def test_layouts(which: str, layout: str, device: str) -> None:
    o = operands((3, 5, 2, 7), torch.float32, device)
    above = operands((3, 5, 2, 7), torch.float32, device, seed=1)
    results = []
    for plain in (True, False):
        given = {k: layouts(v)[layout] if k == which else v for k, v in o.items()}
        grads = [layouts(above[k])[layout] if which == "gradients" else above[k] for k in ("x", "residual")]
        if plain:  # the same values
            given, grads = {k: dense(v) for k, v in given.items()}, [dense(g) for g in grads]
        leaves = [given[k].detach().requires_grad_() for k in ("x", "residual", "weight", "bias")]
        given |= dict(zip(("x", "residual", "weight", "bias"), leaves, strict=True))
        given |= {k: o[k].clone() for k in ("running_mean", "running_var")}
        out = bn_silu(**given, training=True)[:2]
        results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, torch.float32, 8.0)


def dense(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.channels_last) if t.dim() == 4 else t


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
@each_device
def test_empty(shape: tuple[int, ...], training: bool, device: str) -> None:
    o = operands(shape, torch.float32, device)
    x, before = o["x"].requires_grad_(), (o["running_mean"].clone(), o["running_var"].clone())
    result = bn_silu(
        x, o["weight"], o["bias"], o["running_mean"], o["running_var"], training=training, pad=(0, 1, 0, 1)
    )
    assert result.out.shape == (shape[0], shape[1], shape[2] + 1, shape[3] + 1) and not result.out.any()
    assert torch.autograd.grad(result.out.sum(), x)[0].shape == shape
    for a, b in zip((o["running_mean"], o["running_var"]), before, strict=True):
        assert_same_bits(a, b)


@pytest.mark.skipif(INTERPRETED, reason="the C++ kernels")
@pytest.mark.parametrize("pad", [PADS[0], PADS[3]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_on_the_cpu_is_float32_rounded_once(training: bool, pad: tuple[int, ...]) -> None:
    o = operands((4, 19, 6, 5), torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = o["x"].to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (o[name].clone().requires_grad_() for name in ("weight", "bias"))
        running = [o["running_mean"].clone(), o["running_var"].clone()]
        result = bn_silu(x, weight, bias, *running, training=training, groups=2 if training else 1, pad=pad)
        g = torch.Generator().manual_seed(0)
        grads = (torch.randn(t.shape, generator=g).bfloat16().to(dtype) for t in (result.out, result.h))
        given = torch.autograd.grad([result.out, result.h], [x, weight, bias], list(grads))
        results.append([result.out, *given, *running])
    half, single = results
    for a, b in zip(half, single, strict=True):
        if a.dtype == torch.float32:  # sums and statistics
            assert_close(a, b.double(), torch.float32, 4.0)
        else:  # the compiler may multiply and add at once in the one and not in the other
            rounded = b.bfloat16()
            torch.testing.assert_close(a, rounded, rtol=2**-7, atol=0)
            assert (a == rounded).float().mean() > 0.99


@pytest.mark.skipif(not INTERPRETED, reason="buffers of the Triton launchers")
@pytest.mark.interpret
@pytest.mark.parametrize("pad", [PADS[0], PADS[3]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_writes_nothing_around_its_tensors(training: bool, pad: tuple[int, ...], monkeypatch) -> None:
    from puat_fast.kernels import batch_stats
    from puat_fast.kernels import bn_silu as kernels

    checks = []

    class Guarding:
        """torch, whose new tensors stand amid canaries."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *args: Any, **kwargs: Any) -> Tensor:
            tensor, check = guarded(torch.empty(*args, **kwargs))
            checks.append(check)
            return tensor

        def empty_like(self, *args: Any, **kwargs: Any) -> Tensor:
            tensor, check = guarded(torch.empty_like(*args, **kwargs))
            checks.append(check)
            return tensor

    monkeypatch.setattr(batch_stats, "torch", Guarding())
    monkeypatch.setattr(kernels, "torch", Guarding())
    given = {}
    for name, t in operands((4, 19, 3, 5)).items():
        given[name], check = guarded(t)
        checks.append(check)
    leaves = [given[k].requires_grad_() for k in ("x", "residual", "weight", "bias")]
    result = bn_silu(**given, training=training, groups=2 if training else 1, pad=pad)
    torch.autograd.grad([result.out.sum(), result.h.sum()], leaves)
    assert len(checks) >= 6 + 6
    for check in checks:
        check()


def test_changed_running_statistics_are_noticed() -> None:
    """Eval mode's backward needs them as they were."""
    o = operands((2, 3, 4, 5))
    x = o.pop("x").requires_grad_()
    out = bn_silu(x, **o, training=False).out
    bn_silu(x.detach(), **o, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_device
def test_no_second_derivative(device: str) -> None:
    o = operands((2, 3, 4, 5), torch.float32, device)
    x = o.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(bn_silu(x, **o, training=True).out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inference_mode() -> None:
    o = operands((2, 3, 4, 5))
    expected = bn_silu(**{k: v.clone() for k, v in o.items()}, training=True)
    with torch.inference_mode():
        given = {k: v.clone() for k, v in o.items()}
        assert_same_bits(bn_silu(**given, training=True).out, expected.out)


ZEROS, VECTOR = torch.zeros(2, 3, 4, 5), torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ZEROS.half()}, "x: expected dtype .*float32.*, got torch.float16"),
        ({"x": ZEROS[0]}, r"x: expected shape N x C x H x W, got \(3, 4, 5\)"),
        ({"residual": ZEROS[:1]}, r"residual: expected shape \(2, 3, 4, 5\) \(as x\), got \(1, 3, 4, 5\)"),
        ({"residual": ZEROS.bfloat16()}, r"residual: expected dtype torch.float32 \(as x\), got torch.bfloat16"),
        ({"residual": ZEROS.to("meta")}, r"residual: expected device cpu \(as x\), got meta"),
        ({"weight": torch.ones(4)}, r"weight: expected shape \(3,\), got \(4,\)"),
        ({"weight": torch.ones(6)[::2]}, "weight: expected contiguous: True, got False"),
        ({"bias": VECTOR.double()}, "bias: expected dtype torch.float32, got torch.float64"),
        ({"bias": VECTOR.to("meta")}, "bias: expected device cpu, got meta"),
        ({"running_mean": VECTOR.bfloat16()}, "running_mean: expected dtype torch.float32, got torch.bfloat16"),
        ({"running_mean": None}, "running_var: expected a tensor, or None, as running_mean is"),
        ({"running_var": None}, "running_var: expected a tensor, or None, as running_mean is"),
        ({"running_var": torch.ones(1)}, r"running_var: expected shape \(3,\), got \(1,\)"),
        ({"running_mean": None, "running_var": None, "training": False}, "running_mean: expected .* in eval mode"),
        ({"momentum": math.nan}, "momentum: expected a finite number, got nan"),
        ({"momentum": torch.ones(1)}, r"momentum: expected a number or a 0-d .* tensor on cpu, got shape \(1,\)"),
        ({"momentum": torch.tensor(1)}, "momentum: expected .*, got shape .*, torch.int64"),
        ({"momentum": torch.tensor(1.0, device="meta")}, "momentum: expected .* on cpu, got .* on meta"),
        ({"eps": 0.0}, "eps: expected a finite number > 0, got 0.0"),
        ({"groups": 0}, "groups: expected a divisor of N = 2, got 0"),
        ({"groups": 3}, "groups: expected a divisor of N = 2, got 3"),
        ({"pad": (0, 1)}, "pad: expected four numbers >= 0"),
        ({"pad": (0, 1, 0, -1)}, r"pad: expected four numbers >= 0 .*, got \(0, 1, 0, -1\)"),
        ({"x": torch.zeros(2, 3, 1, 1), "groups": 2}, "x: expected more than 1 value per channel and group"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    given = {"x": ZEROS, "weight": VECTOR, "bias": VECTOR, "running_mean": VECTOR, "running_var": VECTOR}
    with pytest.raises(ValueError, match=message):
        bn_silu(**({"training": True} | given | change))


@each_triton_device
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool, device: str) -> None:
    o = operands((4, 3, 2, 5), torch.float32, device)
    statistics = o["running_mean"], o["running_var"]
    ops = torch.ops.puat_fast
    residual, pad, tensor = (o["residual"], (0, 1, 0, 1), None) if training else (None, (0, 0, 0, 0), torch.ones(()))
    tensor = tensor if tensor is None else tensor.to(device)
    args = (o["x"], residual, o["weight"], o["bias"], *statistics, training, 0.1, tensor, 1e-5, 2, pad)
    torch.library.opcheck(ops.bn_silu_forward.default, args)
    grad_out = operands((4, 3, 2 + pad[3], 5 + pad[1]), torch.float32, device)["x"]
    tables = [t[None].expand(2, 3).contiguous() if training else t[None] for t in statistics]
    args = (grad_out, residual, o["x"], *tables, o["weight"], o["bias"], 1e-5, pad, training, True, training)
    torch.library.opcheck(ops.bn_silu_backward.default, args)


@each_triton_device
def test_compiles_without_graph_break(device: str) -> None:
    def block(x, residual, weight, bias, running_mean, running_var, momentum):
        first = bn_silu(
            x * 1.0, weight, bias, running_mean, running_var, training=True, momentum=momentum, residual=residual,
            pad=(0, 1, 0, 1), groups=2,
        )  # fmt: skip
        second = bn_silu(first.h, weight, bias, running_mean, running_var, training=False)
        third = bn_silu(second.out * 2.0, weight, bias, None, None, training=True)
        return first.out, first.mean, first.var, third.out, third.h

    o = operands((2, 3, 4, 5), torch.float32, device)
    leaves = [o[k].requires_grad_() for k in ("x", "residual", "weight", "bias")]
    for momentum in (0.25, torch.tensor(0.25, device=device)):
        check_compiles(block, [*leaves, o["running_mean"], o["running_var"], momentum])
