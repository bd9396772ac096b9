import math

import pytest
import torch
import torch.nn.functional as F
from loss_checks import (
    SHAPES,
    UPSTREAM,
    Loss,
    check_kernels_compile,
    check_no_double_backward,
    check_on_gpu,
    check_route,
    check_routes,
    check_values,
    compiles_kernels,
    each_arch,
    each_dtype,
    each_kernel,
    each_shape,
    each_strides,
    labels,
    random_rows,
    strided,
    value_and_grads,
)
from op_checks import (
    NO_CUDA,
    assert_close,
    assert_same_bits,
    check_compiles,
    check_gradients,
    each_triton_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import cw_margin, smooth_ce
from puat_fast.ops.smooth_ce import _CWMargin, _SmoothCE


def cross_entropy(s: float) -> Loss:
    return Loss(lambda x, y, **o: smooth_ce(x, y, s, **o), lambda x, y: _SmoothCE.apply(x, y, s))


LOSSES = {"ce": cross_entropy(0.0), "ce_0.1": cross_entropy(0.1), "cw": Loss(cw_margin, _CWMargin.apply)}
each_loss = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))


def operands(shape: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    return [random_rows(shape, dtype, device, seed)[1], labels(shape, device, seed)]


def by_hand(logits: Tensor, y: Tensor, s: float) -> float:
    """Cross-entropy in Python floats, the target a distribution: shares no code with the op."""
    rows = []
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        target = [s / len(row) + (1 - s) * (k == label) for k in range(len(row))]
        rows.append(sum(q * (log_sum - x) for q, x in zip(target, row, strict=True)))
    return sum(rows) / len(rows)


def margin_by_hand(logits: Tensor, y: Tensor) -> float:
    rows = [(row.pop(label), row) for row, label in zip(logits.tolist(), y.tolist(), strict=True)]
    return -sum(max(l_y - max(others), 0.0) for l_y, others in rows)


@pytest.mark.parametrize("s", [0.0, 0.1, 1.0])
def test_reference_is_the_formula(s: float) -> None:
    x, y = operands((7, 5), torch.float64, "cpu")
    assert float(smooth_ce(x, y, s)) == pytest.approx(by_hand(x, y, s), rel=1e-12)
    assert float(cw_margin(x, y)) == pytest.approx(margin_by_hand(x, y), rel=1e-12) and float(cw_margin(x, y)) < 0


@pytest.mark.parametrize("s", [0.0, 0.1])
def test_equals_torch_bitwise(s: float) -> None:
    inputs = operands((13, 10), torch.float32, "cpu")
    actual = value_and_grads(lambda x, y: smooth_ce(x, y, s, impl="reference"), inputs, (0,))
    expected = value_and_grads(lambda x, y: F.cross_entropy(x, y, label_smoothing=s), inputs, (0,))
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@each_loss
def test_gradients_of_the_reference(loss: Loss) -> None:
    x, y = operands((5, 4), torch.float64, "cpu")
    check_gradients(lambda x: loss.public(x, y), [x.requires_grad_()])


@each_triton_device
@each_dtype
@each_shape
@each_loss
def test_values_and_gradients(loss: Loss, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_values(loss, operands(shape, dtype, device))


@each_triton_device
@each_loss
@each_strides
def test_strides(strides: str, loss: Loss, device: str) -> None:
    x, y = operands((11, 7), torch.float32, device)
    y_of_every_other = torch.stack([y, y + 99], 1).flatten()[::2]
    check_values(loss, [strided(x)[strides], y_of_every_other])


@each_triton_device
@each_loss
def test_large_logits(loss: Loss, device: str) -> None:
    x, y = operands((6, 5), torch.float32, device)
    check_values(loss, [300 * x, y])
    check_values(loss, [x - 3e4, y], scale=2.0**10)
    x[:, 1] = -torch.inf
    check_values(loss if loss is not LOSSES["ce_0.1"] else LOSSES["ce"], [x, torch.full_like(y, 3)])


@each_triton_device
def test_not_a_number(device: str) -> None:
    x, y = operands((4, 3), torch.float32, device)
    for k in range(3):
        spoilt = x.clone()
        spoilt[2, k] = math.nan
        for loss in LOSSES.values():
            assert loss.through_op(spoilt, y).isnan()


@each_triton_device
def test_ties_of_the_margin_are_shared(device: str) -> None:
    x = torch.tensor([[3, 1, 1, 0], [1, 1, 0, 1], [2, 2, 2, 2], [0, 1, 2, 2], [-math.inf, 1, -math.inf, -math.inf]],
                     device=device)  # fmt: skip
    y = torch.tensor([0, 0, 1, 0, 1], device=device)
    third = 1 / 3
    expected = [[-1, 0.5, 0.5, 0], [-1, 0.5, 0, 0.5], [third, -1, third, third], [0, 0, 0, 0]]
    for fn in (_CWMargin.apply, cw_margin, lambda x, y: cw_margin(x, y, impl="reference")):
        value, grad = value_and_grads(fn, [x[:4], y[:4]], (0,))
        assert float(value) == -2
        assert_close(grad, UPSTREAM * torch.tensor(expected, device=device), torch.float32)
    check_values(LOSSES["cw"], [x, y])


@each_kernel
@pytest.mark.parametrize("label", [-1, -100, 3, 1 << 40])
def test_kernel_makes_a_label_out_of_range_not_a_number(label: int, device: str) -> None:
    x, _ = operands((4, 3), torch.float32, device)
    y = torch.tensor([0, label, 2, 1], device=device)
    for name, loss in LOSSES.items():
        value, grad = value_and_grads(loss.public, [x, y], (0,))
        assert value.isnan() and grad[1].isnan().all(), name
        assert grad[[0, 2, 3]].isfinite().all(), name


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_cpu_refuses_a_label_out_of_range(label: int) -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, label])
    with pytest.raises(IndexError, match="out of bounds"):
        smooth_ce(x, y, 0.1, impl="reference")
    with pytest.raises(RuntimeError, match="out of bounds"):
        cw_margin(x, y, impl="reference")


@each_kernel
@each_loss
def test_kernels_stay_within_their_tensors(loss: Loss, device: str) -> None:
    from puat_fast.kernels import smooth_ce as kernels

    x, y = operands((257, 11), torch.float32, device)
    (x_in, check_x), (y_in, check_y), (out, check_out) = guarded(x), guarded(y), guarded(torch.zeros_like(x))
    check_values(loss, [x_in, y_in])
    grad = torch.tensor(UPSTREAM, device=device)
    if loss is LOSSES["cw"]:
        kernels.cw_margin_backward(out, grad, x_in, y_in)
    else:
        kernels.smooth_ce_backward(out, grad, x_in, y_in, 0.1 if loss is LOSSES["ce_0.1"] else 0.0)
    for check in (check_x, check_y, check_out):
        check()
    assert_same_bits(out, value_and_grads(loss.through_op, [x, y], (0,))[1])


@each_triton_device
@each_loss
def test_routes(loss: Loss, device: str) -> None:
    check_routes(loss, operands, device)
    check_route(loss, operands((2, 4097), torch.float32, device), False)


@each_kernel
@each_loss
def test_double_backward_is_refused(loss: Loss, device: str) -> None:
    check_no_double_backward(loss, operands((3, 4), torch.float32, device))


@each_triton_device
def test_opcheck(device: str) -> None:
    x, y = operands((5, 7), torch.bfloat16, device)
    x, grad, ops = strided(x)["every other column"], torch.tensor(UPSTREAM, device=device), torch.ops.puat_fast
    torch.library.opcheck(ops.smooth_ce.default, (x, y, 0.1))
    torch.library.opcheck(ops.smooth_ce_backward.default, (grad, x, y, 0.1))
    torch.library.opcheck(ops.cw_margin.default, (x, y))
    torch.library.opcheck(ops.cw_margin_backward.default, (grad, x, y))


@each_triton_device
@pytest.mark.parametrize("name", ["ce_0.1", "cw"])
def test_compiles_without_graph_break(name: str, device: str) -> None:
    x, y = operands((3, 4), torch.float32, device)
    for fn in (LOSSES[name].public, LOSSES[name].through_op):
        check_compiles(fn, [x.requires_grad_(), y])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits: expected dtype .*float32.*, got torch.int64"),
        ({"logits": torch.zeros(2)}, r"logits: expected shape N x K, K >= 1, got \(2,\)"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected shape N x K, K >= 1, got \(2, 0\)"),
        ({"logits": torch.zeros(2, 3, 4)}, r"logits: expected shape N x K, K >= 1, got \(2, 3, 4\)"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"y: expected shape \(2,\) \(rows of logits\), got \(3,\)"),
        ({"y": torch.zeros(2, 1, dtype=torch.int64)}, r"y: expected shape \(2,\) \(rows of logits\), got \(2, 1\)"),
        ({"y": torch.zeros(2, dtype=torch.int32)}, "y: expected dtype torch.int64, got torch.int32"),
        ({"y": torch.zeros(2, dtype=torch.int64, device="meta")}, r"y: expected device cpu \(as logits\), got meta"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
@pytest.mark.parametrize("function", [smooth_ce, cw_margin])
def test_mistakes_are_named(function, change: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), "y": torch.zeros(2, dtype=torch.int64), "impl": "auto"}
    with pytest.raises(ValueError, match=message):
        function(**(arguments | change))


@pytest.mark.parametrize("s", [-0.1, 1.1, math.nan])
def test_smoothing_out_of_range(s: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 1\], got"):
        smooth_ce(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), s)


@compiles_kernels
@each_arch
def test_kernels_fit(arch: int) -> None:
    from puat_fast.kernels import smooth_ce as kernels

    def launch(dtype: torch.dtype, k: int) -> None:
        (x, y), grad = operands((7, k), dtype, "cpu"), torch.ones(())
        out = torch.empty_like(x)
        kernels.smooth_ce(x, y, 0.0)
        kernels.smooth_ce(x, y, 0.1)
        kernels.smooth_ce_backward(out, grad, x, y, 0.1)
        kernels.cw_margin(x, y)
        kernels.cw_margin_backward(out, grad, x, y)

    check_kernels_compile(kernels, launch, arch)


@pytest.mark.gpu
@NO_CUDA
@each_loss
@each_dtype
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[5]], ids=str)
def test_on_gpu(loss: Loss, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_on_gpu(loss, lambda seed: operands(shape, dtype, "cuda", seed))
