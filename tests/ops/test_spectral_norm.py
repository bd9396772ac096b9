from __future__ import annotations

import importlib
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from op_checks import (
    NO_CUDA,
    assert_close,
    assert_same_bits,
    check_captured,
    check_compiles,
    check_gradients,
    check_repeats,
    each_device,
    guarded,
)
from torch import Tensor, nn

from puat_fast.ops import spectral_norm
from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

module = importlib.import_module("puat_fast.ops.spectral_norm")
ops = torch.ops.puat_fast
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# One element, one row, one column, odd primes, not a multiple of a tile of 32 columns or of a block's 8 rows.
SHAPES = [(1, 1), (1, 70), (37, 1), (5, 3, 3, 3), (37, 5, 3, 3), (13, 11, 1, 1), (64, 64), (4, 33), (3, 2, 5)]
ITERATIONS = [1, 1, 1, 1, 2, 0, 1, 4, 3]
PER_ROW = [False] * 7 + [True, False]
N = len(SHAPES)
# D's layers (spec 1.2), width 256, 10 classes
OF_D = [(256, 3, 3, 3), *[(256, 256, 3, 3)] * 7, (256, 3, 1, 1), *[(256, 256, 1, 1)] * 3, (1, 256), (10, 256)]

Layers = tuple[list[Tensor], list[Tensor], list[Tensor]]


def layers(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype=F32, device: str = "cpu", seed: int = 0) -> Layers:
    """Weights, us and vs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    us = [F.normalize(torch.randn(w.shape[0], generator=generator), dim=0) for w in weights]
    vs = [F.normalize(torch.randn(w[0].numel(), generator=generator), dim=0) for w in weights]
    return tuple([t.to(device, dtype) for t in group] for group in (weights, us, vs))


def channels_last(weights: list[Tensor]) -> list[Tensor]:
    return [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]


def copies(groups: Sequence[list[Tensor]], dtype: torch.dtype | None = None) -> Layers:
    return tuple([t.detach().to(dtype or t.dtype, copy=True) for t in group] for group in groups)


def everything(groups: Layers, **options) -> list[list[Tensor]]:
    """Results, gradients, and u and v afterwards; for the same gradients of the results, whatever the options."""
    weights, us, vs = copies(groups)
    weights = [w.requires_grad_() for w in weights]
    options = {"iterations": ITERATIONS, "per_row": PER_ROW} | options
    results = spectral_norm(weights, us, vs, **options)
    generator = torch.Generator().manual_seed(1)
    above = [torch.randn(r.shape, generator=generator).to(BF16).to(r) for r in results]
    return [[r.detach() for r in results], list(torch.autograd.grad(results, weights, above)), us, vs]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    actual, expected = actual.detach(), expected.detach()
    shift = 3 * (expected.numel() == 1)  # results are +-1 there, the gradient is 0: no scale for its rounding
    assert_close(actual + shift, expected + shift, dtype, scale=8)


def assert_all_close(actual: list[list[Tensor]], expected: list[list[Tensor]], dtypes: Sequence[torch.dtype]) -> None:
    for group, wanted, dtype in zip(actual, expected, dtypes, strict=True):
        for a, b in zip(group, wanted, strict=True):
            assert_near(a, b, dtype)


class OldStyle:
    """torch.nn.utils.spectral_norm, a hook: shares no code with the op."""

    def __init__(self, weight: Tensor, u: Tensor, v: Tensor, iterations: int) -> None:
        self.layer = nn.Linear(1, 1)
        self.layer.weight = nn.Parameter(weight.clone())
        nn.utils.spectral_norm(self.layer, n_power_iterations=max(iterations, 1)).train(iterations > 0)
        self.layer.weight_u.copy_(u)
        self.layer.weight_v.copy_(v)

    def weight(self) -> Tensor:
        for hook in self.layer._forward_pre_hooks.values():
            hook(self.layer, None)
        return self.layer.weight


# -- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_is_torchs_old_spectral_norm(n: int, shape: tuple[int, ...], impl: str) -> None:
    dtype = F64 if impl == "reference" else F32
    (weight,), (u,), (v,) = layers([shape], dtype)
    old, weight = OldStyle(weight, u, v, n), weight.requires_grad_()
    for _ in range(3):
        (result,) = spectral_norm([weight], [u], [v], iterations=[n], impl=impl)
        expected = old.weight()
        assert_near(result, expected, dtype)
        assert_near(u, old.layer.weight_u, dtype)
        assert_near(v, old.layer.weight_v, dtype)
        above = torch.randn(shape, dtype=dtype)
        (grad,) = torch.autograd.grad(result, weight, above)
        assert_near(grad, torch.autograd.grad(expected, old.layer.weight_orig, above)[0], dtype)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(1, 5), (4, 33), (7, 3, 3, 3)], ids=str)
def test_row_by_row_is_one_lookup_after_another(shape: tuple[int, ...], impl: str) -> None:
    dtype = F64 if impl == "reference" else F32
    (weight,), (u,), (v,) = layers([shape], dtype)
    old, weight = OldStyle(weight, u, v, 1), weight.requires_grad_()
    expected = torch.stack([old.weight()[k] for k in range(shape[0])])
    (result,) = spectral_norm([weight], [u], [v], iterations=[shape[0]], per_row=[True], impl=impl)
    assert_near(result, expected, dtype)
    assert_near(u, old.layer.weight_u, dtype)
    above = torch.randn(shape, dtype=dtype)
    (grad,) = torch.autograd.grad(result, weight, above)
    assert_near(grad, torch.autograd.grad(expected, old.layer.weight_orig, above)[0], dtype)


@pytest.mark.parametrize("function", [spectral_norm, module._fused], ids=["reference", "fused"])
def test_gradcheck(function) -> None:
    weights, us, vs = layers([(4, 2, 2, 3), (3, 5)], F64)
    options = {"iterations": [0, 0], "per_row": [False, True]}  # with iterations, u and v are no constants of W
    if function is module._fused:
        options["dtype"] = None
    check_gradients(lambda *ws: tuple(function(list(ws), us, vs, **options)), [w.requires_grad_() for w in weights])


@each_device
def test_float64_is_the_reference(device: str) -> None:
    groups = layers(dtype=F64, device=device)
    for actual, expected in zip(everything(groups), everything(groups, impl="reference"), strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


# -- the fused path -------------------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("layout", [list, channels_last])
@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
def test_agrees_with_float64(dtype: torch.dtype | None, layout, device: str) -> None:
    weights, us, vs = layers(device=device)
    expected = everything(copies((weights, us, vs), F64), impl="reference")
    actual = everything((layout(weights), us, vs), dtype=dtype)
    assert all(r.dtype == (dtype or F32) for r in actual[0])
    assert_all_close(actual, expected, [dtype or F32, F32, F32, F32])


@each_device
@pytest.mark.parametrize("n", [0, 1])
def test_layers_of_the_discriminator(n: int, device: str) -> None:
    small = [tuple(16 if size == 256 else size for size in shape) for shape in OF_D]
    weights, us, vs = layers(OF_D if device == "cuda" else small, device=device)
    options = {"iterations": [n] * len(OF_D), "per_row": None}
    expected = everything(copies((weights, us, vs), F64), impl="reference", **options)
    assert_all_close(everything((channels_last(weights), us, vs), **options), expected, [F32] * 4)


@each_device
def test_strides_and_inputs(device: str) -> None:
    weights, us, vs = layers(device=device)
    for given in (weights, channels_last(weights)):
        before = copies([given])[0]
        results = spectral_norm(given, us, vs, iterations=ITERATIONS, per_row=PER_ROW)
        assert [r.stride() for r in results] == [torch.empty_like(w).stride() for w in given]
        for weight, copy in zip(given, before, strict=True):
            assert_same_bits(weight, copy)


@each_device
def test_gaps_in_any_argument(device: str) -> None:
    """Every second element of wider tensors: plain torch serves, and u and v still advance in place."""
    groups = layers(device=device)
    wide = [[torch.zeros(*t.shape[:-1], 2 * t.shape[-1], device=device) for t in group] for group in groups]
    sliced = tuple([t[..., ::2] for t in group] for group in wide)
    for group, target in zip(groups, sliced, strict=True):
        for source, t in zip(group, target, strict=True):
            t.copy_(source)
    results = spectral_norm(*sliced, iterations=ITERATIONS, per_row=PER_ROW)
    expected = everything(copies(groups, F64), impl="reference")
    assert_all_close([list(results), *sliced[1:]], [expected[0], *expected[2:]], [F32] * 3)
    for t in (t for group in wide for t in group):
        assert (t[..., 1::2] == 0).all()


@each_device
def test_gradients_in_another_layout(device: str) -> None:
    """A contiguous gradient of a channels_last result, and one that is a single number, expanded."""
    weights, us, vs = layers([(6, 5, 3, 3)] * 2, device=device)
    options = {"iterations": [1, 1], "impl": "auto"}

    def grads(weights: list[Tensor], **options) -> list[Tensor]:
        weights = [w.requires_grad_() for w in weights]
        _, u, v = copies(([], us, vs))
        first, second = spectral_norm(weights, u, v, **options)
        return list(torch.autograd.grad((first * first.detach().contiguous()).sum() + second.sum(), weights))

    expected = grads(copies([weights])[0], iterations=[1, 1], impl="reference")
    for actual, wanted in zip(grads(channels_last(copies([weights])[0]), **options), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-6)


@each_device
def test_no_iteration_leaves_u_and_v(device: str) -> None:
    weights, us, vs = layers(device=device)
    before = copies((us, vs))
    spectral_norm(weights, us, vs, iterations=[0] * N, per_row=PER_ROW)
    for actual, expected in zip(us + vs, before[0] + before[1], strict=True):
        assert_same_bits(actual, expected)


@each_device
def test_iterations_also_without_gradient(device: str) -> None:
    groups = layers(device=device)
    expected = everything(groups)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            weights, us, vs = copies(groups)
            results = spectral_norm(weights, us, vs, iterations=ITERATIONS, per_row=PER_ROW)
        assert not any(r.requires_grad for r in results)
        for actual, wanted in zip([*results, *us, *vs], expected[0] + expected[2] + expected[3], strict=True):
            assert_same_bits(actual, wanted)


@each_device
def test_later_calls_do_not_spoil_a_graph(device: str) -> None:
    weights, us, vs = layers([(5, 3, 3, 3), (4, 6)], device=device)
    weights = [w.requires_grad_() for w in weights]
    options = {"iterations": [1, 4], "per_row": [False, True]}
    alone = torch.autograd.grad(sum(r.sum() for r in spectral_norm(weights, *copies((us, vs)), **options)), weights)
    loss = sum(r.sum() for r in spectral_norm(weights, us, vs, **options))
    for _ in range(2):
        spectral_norm(weights, us, vs, **options)
    for actual, expected in zip(torch.autograd.grad(loss, weights), alone, strict=True):
        assert_same_bits(actual, expected)


@each_device
def test_gradients_of_some_layers_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = layers(device=device)
    expected = everything(groups)[1]
    weights, us, vs = copies(groups)
    weights[4].requires_grad_()
    weights[7].requires_grad_()
    results = spectral_norm(weights, us, vs, iterations=ITERATIONS, per_row=PER_ROW)
    generator = torch.Generator().manual_seed(1)
    above = [torch.randn(r.shape, generator=generator).to(BF16).to(r) for r in results]
    torch.autograd.backward([results[4], results[7]], [above[4], above[7]])
    for i, weight in enumerate(weights):
        if i in (4, 7):
            assert_same_bits(weight.grad, expected[i])
        else:
            assert weight.grad is None


@each_device
def test_more_layers_than_a_launch_takes(device: str) -> None:
    shapes = [(1 + i % 5, 2 + i % 7) for i in range(2 * module._MAX_LAYERS + 1)]
    groups = layers(shapes, device=device)
    options = {"iterations": [1 + i % 2 for i in range(len(shapes))], "per_row": None}
    assert_all_close(everything(groups, **options), everything(copies(groups, F64), **options), [F32] * 4)


def test_no_layers() -> None:
    assert list(spectral_norm([], [], [], iterations=[])) == []


@each_device
def test_a_weight_of_zeros(device: str) -> None:
    """v = u = 0 by the eps of the normalisation, sigma = 0, and 0 / 0."""
    _, us, vs = layers([(5, 7)], device=device)
    (result,) = spectral_norm([torch.zeros(5, 7, device=device)], us, vs, iterations=[2])
    assert result.isnan().all() and (us[0] == 0).all() and (vs[0] == 0).all()


@each_device
def test_tiny_weights_meet_the_eps(device: str) -> None:
    weights, us, vs = layers([(5, 7)], device=device)
    groups = [weights[0] * 1e-13], us, vs
    options = {"iterations": [2], "per_row": None}
    actual, expected = everything(groups, **options), everything(copies(groups, F64), **options)
    assert_all_close(actual, expected, [F32] * 4)
    assert 0 < actual[3][0].norm() < 0.9  # without eps it were 1


@each_device
def test_autograd_sees_the_update(device: str) -> None:
    weights, us, vs = layers([(3, 4)], device=device)
    loss = (torch.ones(3, device=device, requires_grad=True) * us[0]).sum()
    spectral_norm(weights, us, vs, iterations=[0])
    loss.backward(retain_graph=True)
    spectral_norm(weights, us, vs, iterations=[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    weights, us, vs = layers([(3, 4)])
    (result,) = spectral_norm([weights[0].requires_grad_()], us, vs, iterations=[1])
    (grad,) = torch.autograd.grad((result**2).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_device
def test_writes_nothing_around_its_tensors(device: str) -> None:
    groups = layers(device=device)
    groups = (channels_last(groups[0]), *groups[1:])
    checks = []
    for group in groups:
        for i, t in enumerate(group):
            group[i], check = guarded(t)
            checks.append(check)
    spectral_norm(*groups, iterations=ITERATIONS, per_row=PER_ROW)
    for check in checks:
        check()


# -- registration ---------------------------------------------------------------------------------------------------


def traces_of(groups: Layers, iterations: list[int]) -> list[Tensor]:
    trace = ops.spectral_norm_iterate(*groups, iterations)
    return list(trace.split([module._trace_size(w, n) for w, n in zip(groups[0], iterations, strict=True)]))


@each_device
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    weights, us, vs = layers([(5, 3, 3, 3), (4, 6)], device=device)
    weights, iterations, per_row = channels_last(weights), [1, 4], [False, True]
    traces = traces_of((weights, us, vs), iterations)
    torch.library.opcheck(ops.spectral_norm_iterate.default, (weights, us, vs, iterations))
    torch.library.opcheck(ops.spectral_norm_scale.default, (weights, traces, per_row, dtype))
    grads = [w.to(dtype) for w in weights]
    torch.library.opcheck(ops.spectral_norm_backward.default, (grads, weights, traces, per_row))


@each_device
@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
def test_compiles_without_graph_break(dtype: torch.dtype | None, device: str) -> None:
    weights, us, vs = layers([(5, 3, 3, 3), (4, 6)], device=device)

    def call(*tensors: Tensor) -> list[Tensor]:
        groups = tensors[:2], tensors[2:4], tensors[4:]
        return spectral_norm(*groups, iterations=[1, 4], per_row=[False, True], dtype=dtype)

    check_compiles(call, [*(w.requires_grad_() for w in channels_last(weights)), *us, *vs])


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.zeros(2, 3).half()] * 2}, r"weights\[0\]: expected dtype .*float32.*, got torch.float16"),
        ({"weights": [torch.zeros(2, 3), torch.zeros(3)]}, r"weights\[1\]: expected out x ... elements, got .*\(3,\)"),
        ({"weights": [torch.zeros(0, 3)] * 2}, r"weights\[0\]: expected out x ... elements, got shape \(0, 3\)"),
        ({"weights": [torch.zeros(2, 3), torch.zeros(2, 3).double()]}, r"weights\[1\]: expected dtype torch.float32"),
        ({"us": [torch.zeros(2), torch.zeros(3)]}, r"us\[1\]: expected shape \(2,\), got \(3,\)"),
        ({"us": [torch.zeros(2), torch.zeros(2).bfloat16()]}, r"us\[1\]: expected dtype torch.float32, got .*bfloat16"),
        ({"us": [torch.zeros(2)]}, r"us: expected 2 of them, one for each weight, got 1"),
        ({"vs": [torch.zeros(3), torch.zeros(1, 3)]}, r"vs\[1\]: expected shape \(3,\), got \(1, 3\)"),
        ({"vs": [torch.zeros(3), torch.zeros(3, device="meta")]}, r"vs\[1\]: expected device cpu, got meta"),
        ({"iterations": [1]}, r"iterations: expected 2 of them"),
        ({"iterations": [1, -1]}, r"iterations\[1\]: expected >= 0, got -1"),
        ({"per_row": [False, True]}, r"iterations\[1\]: expected 0 or 2 \(per_row\), got 1"),
        ({"per_row": [False]}, r"per_row: expected 2 of them"),
        ({"dtype": torch.float16}, r"dtype: expected None, torch.float32 or torch.bfloat16, got torch.float16"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"weights": [torch.zeros(2, 3) for _ in range(2)], "us": [torch.zeros(2) for _ in range(2)],
                 "vs": [torch.zeros(3) for _ in range(2)], "iterations": [1, 1]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        spectral_norm(**(arguments | change))


@pytest.mark.skipif(not hasattr(_C, "spectral_norm_iterate_cuda"), reason="built without CUDA")
def test_extension_refuses_cpu_tensors() -> None:
    weights, us, vs = layers([(3, 4)])
    trace = torch.zeros(8)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected a CUDA tensor, got cpu"):
        _C.spectral_norm_iterate_cuda(*capsules(trace, trace), capsules(*weights), capsules(*us), capsules(*vs), [1], 0)
    with pytest.raises(ValueError, match="weights: expected 1 to 32 of them, got 0"):
        _C.spectral_norm_scale_cuda([], [], [], [], 0)
    with pytest.raises(ValueError, match=f"weights: expected 1 to {module._MAX_LAYERS} of them, got 33"):
        _C.spectral_norm_scale_cuda([], capsules(*weights * 33), [], [], 0)


# -- on a GPU -------------------------------------------------------------------------------------------------------

DEVICE = "cuda"


@pytest.mark.gpu
@NO_CUDA
class TestExtension:
    """What the launchers themselves check and write."""

    def arguments(self) -> dict[str, list]:
        weights, us, vs = layers([(5, 3, 3, 3), (4, 6)], device=DEVICE)
        traces = [torch.zeros(28 + 5, device=DEVICE), torch.zeros(4 * (6 + 4 + 1), device=DEVICE)]
        out = [torch.zeros_like(w) for w in weights]
        return {"weights": weights, "us": us, "vs": vs, "traces": traces, "out": out, "per_row": [False, True]}

    def iterate(self, a: dict[str, list]) -> None:
        trace, workspace = torch.zeros(33 + 44, device=DEVICE), torch.zeros(33 + 44, device=DEVICE)
        lists = [capsules(*a[name]) for name in ("weights", "us", "vs")]
        module._C.spectral_norm_iterate_cuda(*capsules(trace, workspace), *lists, [1, 4], 0)

    def scale(self, a: dict[str, list]) -> None:
        lists = [capsules(*a[name]) for name in ("out", "weights", "traces")]
        module._C.spectral_norm_scale_cuda(*lists, a["per_row"], 0)

    def backward(self, a: dict[str, list]) -> None:
        lists = [capsules(*a[name]) for name in ("out", "weights", "weights", "traces")]
        module._C.spectral_norm_backward_cuda(*capsules(torch.zeros(9, device=DEVICE)), *lists, a["per_row"], 0)

    @pytest.mark.parametrize(
        ("launcher", "name", "bad", "message"),
        [
            ("iterate", "weights", lambda t: t.double(), r"weights\[0\]: expected float32, got float64"),
            ("scale", "weights", lambda t: t[..., ::2], r"weights\[0\]: expected a tensor without gaps"),
            ("backward", "weights", lambda t: t.transpose(0, 1), r"weights\[0\]: expected a contiguous or"),
            ("iterate", "us", lambda t: t[:3], r"us\[0\]: expected shape \(5\), got shape \(3\)"),
            ("iterate", "us", lambda t: t.repeat(2)[::2], r"us\[0\]: expected a contiguous vector, got strides \(2\)"),
            ("iterate", "vs", lambda t: t.bfloat16(), r"vs\[0\]: expected float32, got bfloat16"),
            ("iterate", "vs", lambda t: t.view(3, 9), r"vs\[0\]: expected shape \(27\), got shape \(3, 9\)"),
            ("scale", "traces", lambda t: t[:-1], r"traces\[0\]: expected shape \(33\), got shape \(32\)"),
            ("backward", "traces", lambda t: t.double(), r"traces\[0\]: expected float32, got float64"),
            ("scale", "out", lambda t: t.double(), r"out\[0\]: expected float32 or bfloat16, got float64"),
            ("scale", "out", lambda t: t[:4], r"out\[0\]: expected shape \(5, 3, 3, 3\) \(as weights\[0\]\)"),
            ("backward", "out", lambda t: t.transpose(2, 3), r"grad_weights\[0\]: expected strides"),
            ("scale", "out", lambda t: t.bfloat16(), r"out\[1\]: expected bfloat16 \(as out\[0\]\), got float32"),
        ],
    )  # fmt: skip
    def test_trusts_nobody(self, launcher: str, name: str, bad, message: str) -> None:
        arguments = self.arguments()
        arguments[name][0] = bad(arguments[name][0])
        with pytest.raises(ValueError, match=message):
            getattr(self, launcher)(arguments)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("us", [], "us: expected 2 of them, one for each weight, got 0"),
            ("per_row", [True, True], r"traces\[0\]"),
            ("vs", "us", "vs"),
        ],
    )
    def test_trusts_no_list(self, name: str, value: object, message: str) -> None:
        arguments = self.arguments()
        if name == "per_row":
            arguments["traces"][0] = torch.zeros(2 * 33, device=DEVICE)
        arguments[name] = arguments[value] if isinstance(value, str) else value
        with pytest.raises(ValueError, match=message):
            (self.scale if name == "per_row" else self.iterate)(arguments)

    def test_vectors_that_share_memory_are_refused(self) -> None:
        weights, us, vs = layers([(4, 4)] * 2, device=DEVICE)
        with pytest.raises(ValueError, match=r"us\[1\]: expected memory of its own, got that of us\[0\]"):
            spectral_norm(weights, [us[0], us[0]], vs, iterations=[1, 1])
        both = torch.ones(7, device=DEVICE)
        with pytest.raises(ValueError, match=r"vs\[1\]: expected memory apart from that of us\[0\]"):
            spectral_norm(weights, [both[:4], us[1]], [vs[0], both[3:]], iterations=[1, 1])

    def test_consumed_capsule_is_refused(self) -> None:
        weights, us, vs = layers([(3, 4)], device=DEVICE)
        handed_over = capsules(*us)
        torch.utils.dlpack.from_dlpack(handed_over[0])
        trace = capsules(*torch.zeros(2, 8, device=DEVICE))
        with pytest.raises(ValueError, match=r"us\[0\]: expected a DLPack capsule named 'dltensor'"):
            module._C.spectral_norm_iterate_cuda(*trace, capsules(*weights), handed_over, capsules(*vs), [1], 0)

    def test_writes_nothing_around_its_results(self) -> None:
        weights, us, vs = layers(device=DEVICE)
        weights = channels_last(weights)
        sizes = [module._trace_size(w, n) for w, n in zip(weights, ITERATIONS, strict=True)]
        dots, trace, workspace = (torch.zeros(n, device=DEVICE) for n in (sum(w.shape[0] for w in weights),
                                                                          sum(sizes), sum(sizes)))  # fmt: skip
        guards = [guarded(t) for t in (dots, trace, workspace)]
        (dots, _), (trace, _), (workspace, _) = guards
        outs, grads = ([guarded(torch.empty_like(w)) for w in weights] for _ in range(2))
        lists = [capsules(*tensors) for tensors in (weights, us, vs)]
        module._C.spectral_norm_iterate_cuda(*capsules(trace, workspace), *lists, ITERATIONS, 0)
        weight_list, traces = lists[0], capsules(*trace.split(sizes))
        out_list, grad_list = (capsules(*(t for t, _ in group)) for group in (outs, grads))
        module._C.spectral_norm_scale_cuda(out_list, weight_list, traces, PER_ROW, 0)
        module._C.spectral_norm_backward_cuda(
            *capsules(dots), grad_list, weight_list, weight_list, traces, PER_ROW, 0
        )  # fmt: skip
        for _, check in guards + outs + grads:
            check()


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    def test_kernels_are_built(self) -> None:
        for part in ("iterate", "scale", "backward"):
            assert hasattr(_C, f"spectral_norm_{part}_cuda"), "a CUDA device, but built without a CUDA compiler"

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_captured_graph(self, dtype: torch.dtype) -> None:
        def inputs(seed: int) -> list[Tensor]:
            weights, us, vs = layers(device="cuda", seed=seed)
            return [*channels_last(weights), *us, *vs]

        def forward_backward(*tensors: Tensor) -> list[Tensor]:
            weights, us, vs = list(tensors[:N]), list(tensors[N : 2 * N]), list(tensors[2 * N :])
            traces = traces_of((weights, us, vs), ITERATIONS)
            results = ops.spectral_norm_scale(weights, traces, PER_ROW, dtype)
            grads = [w.to(dtype) * 2 + 1 for w in weights]
            return [*traces, *results, *ops.spectral_norm_backward(grads, weights, traces, PER_ROW)]

        check_captured(forward_backward, inputs)

    def test_hundred_repeats(self) -> None:
        groups = layers(OF_D, device="cuda")
        options = {"iterations": [1] * 13 + [10], "per_row": [False] * 13 + [True]}
        check_repeats(lambda: [t for group in everything(groups, **options) for t in group])

    def test_side_stream(self) -> None:
        weights, us, vs = layers(OF_D, device="cuda")
        options = {"iterations": [1] * len(OF_D)}
        expected = spectral_norm(weights, *copies((us, vs)), **options)
        halves = [w / 2 for w in weights]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for half in halves:
                half.mul_(2)
            actual = spectral_norm(halves, us, vs, **options)
        stream.synchronize()
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
