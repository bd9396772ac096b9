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
    random_rows,
    strided,
    value_and_grads,
)
from op_checks import NO_CUDA, assert_same_bits, check_compiles, check_gradients, each_triton_device, guarded
from torch import Tensor

from puat_fast.ops import hinge, hinge_by_class
from puat_fast.ops.hinge import _Hinge, _HingeByClass

FORMS = ["real", "fake", "linear"]
each_form = pytest.mark.parametrize("form", FORMS)


def plain(form: str) -> Loss:
    return Loss(lambda d, **o: hinge(d, form, **o), lambda d: _Hinge.apply(d, form))


def by_class(form: str, *grad_of: int) -> Loss:
    """grad_of: 0 for d's gradient, 1 for the logits'."""
    return Loss(
        lambda d, logits, **o: hinge_by_class(d, logits, form, **o),
        lambda d, logits: _HingeByClass.apply(d, logits, form),
        grad_of or (0, 1),
    )


def operands(shape: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    return list(random_rows(shape, dtype, device, seed))


def of_one(d: float, form: str) -> float:
    return {"real": max(0.0, 1 - d), "fake": max(0.0, 1 + d), "linear": -d}[form]


@each_form
def test_reference_is_the_formula(form: str) -> None:
    d, logits = operands((7, 5), torch.float64, "cpu")
    values = [[of_one(v, form) for v in row] for row in d.tolist()]
    assert float(hinge(d, form)) == pytest.approx(sum(map(sum, values)) / 35, rel=1e-12)
    weighted = 0.0
    for row, xs in zip(values, logits.tolist(), strict=True):
        weights = [math.exp(x) for x in xs]
        weighted += sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights)
    assert float(hinge_by_class(d, logits, form)) == pytest.approx(weighted / 7, rel=1e-12)


@each_form
def test_equals_torch_bitwise(form: str) -> None:
    d, logits = operands((13, 10), torch.float32, "cpu")
    of = {"real": lambda d: F.relu(1 - d), "fake": lambda d: F.relu(1 + d), "linear": lambda d: -d}[form]
    pairs = [
        ([d], lambda d: hinge(d, form, impl="reference"), lambda d: of(d).mean()),
        ([d, logits], lambda d, x: hinge_by_class(d, x, form, impl="reference"),
         lambda d, x: (x.softmax(1) * of(d)).sum(1).mean()),
    ]  # fmt: skip
    for inputs, actual, expected in pairs:
        which = range(len(inputs))
        for a, e in zip(value_and_grads(actual, inputs, which), value_and_grads(expected, inputs, which), strict=True):
            assert_same_bits(a, e)


@each_form
def test_gradients_of_the_reference(form: str) -> None:
    logits, d = (t.requires_grad_() for t in operands((5, 4), torch.float64, "cpu"))  # the second has no ties
    check_gradients(plain(form).public, [d])
    check_gradients(by_class(form).public, [d, logits])


@each_triton_device
@each_dtype
@each_shape
@each_form
def test_by_class(form: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_values(by_class(form), operands(shape, dtype, device), scale=32)  # value - mean value cancels


@each_triton_device
@each_dtype
@pytest.mark.parametrize("shape", [(), (1,), (257, 1), (0, 1), (1024,), (3, 5, 7, 11), (2, 0, 3)], ids=str)
@each_form
def test_any_shape(form: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    size = math.prod(shape)
    check_values(plain(form), [operands((size, 1), dtype, device)[0].view(shape)])


@each_triton_device
@each_form
def test_layouts_of_plain_scores(form: str, device: str) -> None:
    d = operands((2 * 3 * 5, 7), torch.float32, device)[0].view(2, 3, 5, 7)
    wide = torch.full((2, 3, 5, 14), 77.0, device=device)
    for view in (d.contiguous(memory_format=torch.channels_last), wide[..., ::2].copy_(d), d[:1].expand(4, 3, 5, 7)):
        check_values(plain(form), [view])


@each_triton_device
@each_strides
def test_strides_by_class(strides: str, device: str) -> None:
    d, logits = operands((11, 7), torch.float32, device)
    check_values(by_class("fake"), [strided(d)[strides], logits])
    check_values(by_class("fake"), [d, strided(logits)[strides]])


@each_triton_device
@pytest.mark.parametrize("narrow", [0, 1])
def test_dtypes_may_differ(narrow: int, device: str) -> None:
    inputs = operands((7, 5), torch.float32, device)
    inputs[narrow] = inputs[narrow].bfloat16()
    check_values(by_class("real"), inputs)


@each_triton_device
@pytest.mark.parametrize("wanted", [0, 1])
@each_form
def test_gradient_to_one_input(form: str, wanted: int, device: str) -> None:
    inputs, grad = operands((7, 5), torch.float32, device), torch.tensor(UPSTREAM, device=device)
    check_values(by_class(form, wanted), inputs)
    wants = [wanted == 0, wanted == 1]
    grads = torch.ops.puat_fast.hinge_by_class_backward(grad, *inputs, form, *wants)
    assert [g.numel() for g in grads] == [35 * want for want in wants]
    assert_same_bits(grads[wanted], value_and_grads(by_class(form).through_op, inputs, (0, 1))[1 + wanted])


@each_triton_device
@each_form
def test_not_a_number(form: str, device: str) -> None:
    d, logits = operands((4, 3), torch.float32, device)
    d[2, 1] = math.nan
    assert plain(form).through_op(d).isnan() and by_class(form).through_op(d, logits).isnan()
    assert by_class(form).through_op(logits, d).isnan()
    check_values(by_class(form), [logits, 300 * torch.nan_to_num(d)])


@each_kernel
@each_form
def test_kernels_stay_within_their_tensors(form: str, device: str) -> None:
    from puat_fast.kernels import hinge as kernels

    d, logits = operands((257, 11), torch.float32, device)
    inner, checks = zip(*(guarded(t) for t in (d, logits, torch.zeros_like(d), torch.zeros_like(d))), strict=True)
    grad = torch.tensor(UPSTREAM, device=device)
    check_values(by_class(form), inner[:2])
    kernels.hinge_by_class_backward(inner[2], inner[3], grad, *inner[:2], form, True, True)
    expected = value_and_grads(by_class(form).through_op, [d, logits], (0, 1))[1:]
    assert_same_bits(inner[2], expected[0])
    assert_same_bits(inner[3], expected[1])
    check_values(plain(form), inner[:1])
    kernels.hinge_backward(inner[2], grad, inner[0], form)
    assert_same_bits(inner[2], value_and_grads(plain(form).through_op, [d], (0,))[1])
    for check in checks:
        check()


@each_triton_device
def test_routes(device: str) -> None:
    check_routes(by_class("fake"), operands, device)
    check_route(by_class("fake"), operands((2, 4097), torch.float32, device), False)
    check_routes(plain("fake"), lambda *args: operands(*args)[:1], device)


@each_kernel
def test_double_backward_is_refused(device: str) -> None:
    check_no_double_backward(by_class("linear", 1), operands((3, 4), torch.float32, device))
    check_no_double_backward(plain("fake"), operands((3, 4), torch.float32, device)[:1])


@each_triton_device
def test_opcheck(device: str) -> None:
    d, logits = operands((5, 7), torch.bfloat16, device)
    d, grad, ops = strided(d)["every other column"], torch.tensor(UPSTREAM, device=device), torch.ops.puat_fast
    torch.library.opcheck(ops.hinge.default, (d, "real"))
    torch.library.opcheck(ops.hinge_backward.default, (grad, d, "real"))
    torch.library.opcheck(ops.hinge_by_class.default, (d, logits, "fake"))
    for wants in ((True, False), (True, True)):
        torch.library.opcheck(ops.hinge_by_class_backward.default, (grad, d, logits, "fake", *wants))


@each_triton_device
def test_compiles_without_graph_break(device: str) -> None:
    d, logits = operands((3, 4), torch.float32, device)
    for fn in (by_class("linear").public, by_class("linear").through_op):
        check_compiles(fn, [d, logits.requires_grad_()])
    for fn in (plain("real").public, plain("real").through_op):
        check_compiles(fn, [d.requires_grad_()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": torch.zeros(2, 3, dtype=torch.int64)}, "d: expected dtype .*float32.*, got torch.int64"),
        ({"form": "mean"}, "form: expected 'real', 'fake' or 'linear', got 'mean'"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"d": torch.zeros(2, 3), "form": "fake"} | change
    with pytest.raises(ValueError, match=message):
        hinge(**arguments)
    with pytest.raises(ValueError, match=message):
        hinge_by_class(**arguments, logits=torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("d", "logits", "message"),
    [
        (torch.zeros(2), torch.zeros(2), r"d: expected shape N x K, K >= 1, got \(2,\)"),
        (torch.zeros(2, 0), torch.zeros(2, 0), r"d: expected shape N x K, K >= 1, got \(2, 0\)"),
        (torch.zeros(2, 3), torch.zeros(2, 1), r"logits: expected shape \(2, 3\) \(as d\), got \(2, 1\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).to(torch.int8), "logits: expected dtype .*float32.*, got torch.int8"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), r"logits: expected device cpu \(as d\), got meta"),
    ],
)
def test_mistakes_of_pairs_are_named(d: Tensor, logits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hinge_by_class(d, logits, "fake")


@compiles_kernels
@each_arch
def test_kernels_fit(arch: int) -> None:
    from puat_fast.kernels import hinge as kernels

    def launch(dtype: torch.dtype, k: int) -> None:
        (d, logits), grad = operands((7, k), dtype, "cpu"), torch.ones(())
        for form, wants in (("real", (True, True)), ("fake", (True, False)), ("linear", (False, True))):
            kernels.hinge(d, form)
            kernels.hinge_backward(d, grad, d, form)
            kernels.hinge_by_class(d, logits, form)
            kernels.hinge_by_class_backward(d, logits, grad, d, logits, form, *wants)

    check_kernels_compile(kernels, launch, arch)


@pytest.mark.gpu
@NO_CUDA
@each_form
@each_dtype
def test_on_gpu(form: str, dtype: torch.dtype) -> None:
    for shape in (SHAPES[4], SHAPES[5]):
        check_on_gpu(by_class(form), lambda seed, shape=shape: operands(shape, dtype, "cuda", seed))
    check_on_gpu(plain(form), lambda seed: operands((2053, 1), dtype, "cuda", seed)[:1])
