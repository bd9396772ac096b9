import math
from functools import partial

import pytest
import torch
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
    random_rows,
    strided,
    value_and_grads,
)
from op_checks import NO_CUDA, assert_same_bits, check_compiles, check_gradients, each_triton_device, guarded
from torch import Tensor

from puat_fast.ops import softmax_mse
from puat_fast.ops.softmax_mse import _SoftmaxMSE


def over_classes(reduce: str) -> Loss:
    return Loss(lambda a, b, **o: softmax_mse(a, b, reduce, **o), lambda a, b: _SoftmaxMSE.apply(a, b, reduce))


LOSSES = {"mean": over_classes("mean"), "sum": over_classes("sum")}
each_loss = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))


def operands(shape: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    return list(random_rows(shape, dtype, device, seed))


def softmax_by_hand(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_reference_is_the_formula() -> None:
    a, b = operands((7, 5), torch.float64, "cpu")
    by_row = [
        sum((p - q) ** 2 for p, q in zip(softmax_by_hand(s), softmax_by_hand(t), strict=True))
        for s, t in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert float(softmax_mse(a, b, "sum")) == pytest.approx(sum(by_row) / 7, rel=1e-12)
    assert float(softmax_mse(a, b)) == pytest.approx(sum(by_row) / 35, rel=1e-12)


def test_equals_torch_bitwise() -> None:
    inputs = operands((13, 10), torch.float32, "cpu")

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return (a.softmax(1) - b.softmax(1)).square()

    for name, mean in (("mean", lambda *ab: squared(*ab).mean()), ("sum", lambda *ab: squared(*ab).sum(1).mean())):
        actual = value_and_grads(partial(LOSSES[name].public, impl="reference"), inputs, (0,))
        for a, e in zip(actual, value_and_grads(mean, inputs, (0,)), strict=True):
            assert_same_bits(a, e)


@each_loss
def test_gradient_of_the_reference(loss: Loss) -> None:
    a, b = operands((5, 4), torch.float64, "cpu")
    check_gradients(lambda a: loss.public(a, b), [a.requires_grad_()])


@each_triton_device
def test_no_gradient_to_the_teacher(device: str) -> None:
    a, b = (t.requires_grad_() for t in operands((5, 4), torch.float32, device))
    for impl in ("auto", "reference"):
        grads = torch.autograd.grad(softmax_mse(a, b, impl=impl), [a, b], allow_unused=True)
        assert grads[0] is not None and grads[1] is None
    assert not softmax_mse(a.detach(), b).requires_grad


@each_triton_device
@each_dtype
@each_shape
@each_loss
def test_values_and_gradients(loss: Loss, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_values(loss, operands(shape, dtype, device))


@each_triton_device
@pytest.mark.parametrize("narrow", [0, 1])
def test_dtypes_may_differ(narrow: int, device: str) -> None:
    inputs = operands((7, 5), torch.float32, device)
    inputs[narrow] = inputs[narrow].bfloat16()
    check_values(LOSSES["mean"], inputs)


@each_triton_device
@each_strides
def test_strides(strides: str, device: str) -> None:
    a, b = operands((11, 7), torch.float32, device)
    check_values(LOSSES["mean"], [strided(a)[strides], b])
    check_values(LOSSES["mean"], [a, strided(b)[strides]])


@each_triton_device
def test_large_and_missing_logits(device: str) -> None:
    a, b = operands((6, 5), torch.float32, device)
    check_values(LOSSES["mean"], [300 * a, b])
    check_values(LOSSES["mean"], [a, b + 3e4], scale=2.0**10)
    a[:, 1] = -torch.inf
    check_values(LOSSES["mean"], [a, b])
    for i in range(2):
        spoilt = [t.clone() for t in (a, b)]
        spoilt[i][4, 2] = math.nan
        assert LOSSES["mean"].through_op(*spoilt).isnan()


@each_kernel
def test_kernels_stay_within_their_tensors(device: str) -> None:
    from puat_fast.kernels import softmax_mse as kernels

    a, b = operands((257, 11), torch.float32, device)
    (a_in, check_a), (b_in, check_b), (out, check_out) = guarded(a), guarded(b), guarded(torch.zeros_like(a))
    check_values(LOSSES["mean"], [a_in, b_in])
    kernels.softmax_mse_backward(out, torch.tensor(UPSTREAM, device=device), a_in, b_in, "mean")
    for check in (check_a, check_b, check_out):
        check()
    assert_same_bits(out, value_and_grads(LOSSES["mean"].through_op, [a, b], (0,))[1])


@each_triton_device
def test_routes(device: str) -> None:
    check_routes(LOSSES["mean"], operands, device)
    check_route(LOSSES["mean"], operands((2, 4097), torch.float32, device), False)


@each_kernel
def test_double_backward_is_refused(device: str) -> None:
    check_no_double_backward(LOSSES["mean"], operands((3, 4), torch.float32, device))


@each_triton_device
def test_opcheck(device: str) -> None:
    a, b = operands((5, 7), torch.bfloat16, device)
    a, grad, ops = strided(a)["every other column"], torch.tensor(UPSTREAM, device=device), torch.ops.puat_fast
    torch.library.opcheck(ops.softmax_mse.default, (a, b, "sum"))
    torch.library.opcheck(ops.softmax_mse_backward.default, (grad, a, b, "sum"))


@each_triton_device
def test_compiles_without_graph_break(device: str) -> None:
    a, b = operands((3, 4), torch.float32, device)
    for fn in (LOSSES["sum"].public, LOSSES["sum"].through_op):
        check_compiles(fn, [a.requires_grad_(), b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3, dtype=torch.int64)}, "a: expected dtype .*float32.*, got torch.int64"),
        ({"a": torch.zeros(2)}, r"a: expected shape N x K, K >= 1, got \(2,\)"),
        ({"b": torch.zeros(2, 3, dtype=torch.bool)}, "b: expected dtype .*float32.*, got torch.bool"),
        ({"b": torch.zeros(1, 3)}, r"b: expected shape \(2, 3\) \(as a\), got \(1, 3\)"),
        ({"b": torch.zeros(3, 2)}, r"b: expected shape \(2, 3\) \(as a\), got \(3, 2\)"),
        ({"b": torch.zeros(2, 3, device="meta")}, r"b: expected device cpu \(as a\), got meta"),
        ({"reduce": "none"}, "reduce: expected 'mean' or 'sum', got 'none'"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_mse(**({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)} | change))


@compiles_kernels
@each_arch
def test_kernels_fit(arch: int) -> None:
    from puat_fast.kernels import softmax_mse as kernels

    def launch(dtype: torch.dtype, k: int) -> None:
        (a, b), grad = operands((7, k), dtype, "cpu"), torch.ones(())
        kernels.softmax_mse(a, b, "mean")
        kernels.softmax_mse_backward(torch.empty_like(a), grad, a, b, "mean")

    check_kernels_compile(kernels, launch, arch)


@pytest.mark.gpu
@NO_CUDA
@each_loss
@each_dtype
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[5]], ids=str)
def test_on_gpu(loss: Loss, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_on_gpu(loss, lambda seed: operands(shape, dtype, "cuda", seed))
