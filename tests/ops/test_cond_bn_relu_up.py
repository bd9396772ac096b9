import math

import pytest
import torch
import torch.nn.functional as F
from cond_bn_relu_up_cases import CLASSES, above, assert_all_close, doubled, forward_backward, operands
from op_checks import (
    CUDA,
    assert_close,
    assert_same_bits,
    check_compiles,
    check_gradients,
    each_triton_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import cond_bn_relu_up
from puat_fast.ops._library import INTERPRETED

# One pixel, odd primes, one row, one column, and more than one tile in every direction: 64 channels, 16 pixels.
SHAPES = [(5, 3, 1, 1), (2, 1, 1, 3), (3, 17, 3, 5), (3, 16, 7, 1), (2, 66, 5, 4)]
OPS = torch.ops.puat_fast

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
each_upsample = pytest.mark.parametrize("upsample", [True, False], ids=["x2", "x1"])
each_kernel_device = pytest.mark.parametrize(  # for what only the kernels do
    "device", [*([pytest.param("cpu", marks=pytest.mark.interpret, id="interpret")] if INTERPRETED else []), CUDA]
)


def bilinear(size: int) -> Tensor:
    """The 2 size x size matrix of U in one direction."""
    U = torch.zeros(2 * size, size, dtype=torch.float64)
    for i in range(size):
        for row, neighbour in ((2 * i, max(i - 1, 0)), (2 * i + 1, min(i + 1, size - 1))):
            U[row, i] += 0.75
            U[row, neighbour] += 0.25
    return U


def formula(args: list[Tensor], training: bool, upsample: bool) -> Tensor:
    """Image by image and channel by channel, with U as two matrices: shares no code with the op."""
    x, y, gain, bias, mean, var = args
    n, c, h, w = x.shape
    down, across = (bilinear(h), bilinear(w)) if upsample else (torch.eye(h).double(), torch.eye(w).double())
    out = torch.empty(n, c, len(down), len(across), dtype=torch.float64)
    for j in range(c):
        values = x[:, j].flatten()
        m, v = (values.mean(), values.var(correction=0)) if training else (mean[j], var[j])
        for i in range(n):
            k = int(y[i])
            r = torch.clamp(gain[k, j] * (x[i, j] - m) / math.sqrt(v + 1e-5) + bias[k, j], min=0)
            out[i, j] = down @ r @ across.T
    return out


@each_mode
@each_upsample
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_formula(shape: tuple[int, ...], upsample: bool, training: bool) -> None:
    args = operands(shape, torch.float64)
    expected = formula(args, training, upsample)
    for impl in ("reference", "auto"):  # float64 takes the reference either way
        actual = cond_bn_relu_up(*args, training=training, stats="leave", upsample=upsample, impl=impl)
        assert_close(actual, expected, torch.float64)


@each_mode
@each_upsample
def test_gradients_of_the_reference(upsample: bool, training: bool) -> None:
    x, y, gain, bias, mean, var = operands((3, 2, 3, 2), torch.float64)

    def fn(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return cond_bn_relu_up(x, y, gain, bias, mean, var, training=training, stats="leave", upsample=upsample)

    check_gradients(fn, [t.requires_grad_() for t in (x, gain, bias)])


@each_mode
@each_upsample
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_of_the_cpu_is_the_gradient(shape: tuple[int, ...], upsample: bool, training: bool) -> None:
    """In float64, where only tests take it: the formula itself, without rounding."""
    args = operands(shape, torch.float64)
    out, dx, dgain, dbias, *_ = forward_backward(args, training=training, stats="leave", upsample=upsample)
    x, *_, mean, var = args
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    actual = OPS.cond_bn_relu_up_backward(
        above(out), *args[:4], mean, var, 1e-5, training, upsample, True, True
    )  # fmt: skip
    for a, e in zip(actual, (dx, dgain, dbias), strict=True):
        assert_close(a, e, torch.float64, 4)


@each_triton_device
@each_mode
@each_upsample
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, torch.float32) for s in SHAPES), ((3, 17, 3, 5), torch.bfloat16)], ids=str
)
def test_equals_the_reference_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, upsample: bool, training: bool, device: str
) -> None:
    args = operands(shape, dtype, device)
    actual = forward_backward(args, training=training, upsample=upsample)
    expected = forward_backward(doubled(args), training=training, upsample=upsample)
    assert_all_close(actual, expected, dtype)
    assert actual[0].dtype == actual[1].dtype == dtype and actual[2].dtype == torch.float32
    for image in actual[:2]:
        assert image.is_contiguous(memory_format=torch.channels_last)


@each_triton_device
def test_more_images_than_are_summed_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from puat_fast.kernels import cond_bn_relu_up as kernels

    monkeypatch.setattr(kernels, "SUM_ROWS", 2)
    args = operands((5, 3, 2, 1), torch.float32, device)
    actual = forward_backward(args, training=True, upsample=False)
    assert_all_close(actual, forward_backward(doubled(args), training=True, upsample=False), torch.float32)


@each_triton_device
def test_means_far_larger_than_the_deviation(device: str) -> None:
    args = operands((4, 5, 4, 4), torch.float32, device)
    args[0] += 1000
    actual = forward_backward(args, training=True, upsample=True)
    expected = forward_backward(doubled(args), training=True, upsample=True)
    for a, e in zip(actual[:4], expected[:4], strict=True):
        assert_close(a, e, torch.float32, 256)  # float32 holds x to 2^-24 of 1000


@each_triton_device
@each_dtype
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 3), (5, 4)], ids=str)
def test_upsampling_and_its_adjoint_are_exact(size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Of small whole numbers, through which nothing but U happens: every weight, also at the borders, shows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 5, (2, 3, *size), generator=generator).to(device, dtype).requires_grad_()
    grad = 4.0 * torch.randint(-2, 3, (2, 3, 2 * size[0], 2 * size[1]), generator=generator).to(device, dtype)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    one, zero = torch.ones(1, 3, device=device), torch.zeros(1, 3, device=device)
    var = 0.75 * one[0]  # and eps: exactly 1
    out = cond_bn_relu_up(x, y, one, zero, zero[0], var, training=False, eps=0.25, upsample=True)
    expected = F.interpolate(x.double(), scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.equal(out.double(), expected)
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    assert torch.equal(*torch.autograd.grad(out, x, grad), wanted)


@each_triton_device
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1, "tensor"])
def test_running_statistics_are_those_of_torch(momentum: float | str, device: str) -> None:
    args = operands((4, 5, 3, 2), torch.float32, device)
    m = torch.tensor(0.3, device=device) if momentum == "tensor" else momentum
    bn = torch.nn.BatchNorm2d(5, momentum=0.3 if momentum == "tensor" else momentum).double()
    bn.running_mean.copy_(args[4])
    bn.running_var.copy_(args[5])
    bn(args[0].double().cpu())
    cond_bn_relu_up(*args, training=True, momentum=m, upsample=False)
    assert_close(args[4].cpu(), bn.running_mean, torch.float32)
    assert_close(args[5].cpu(), bn.running_var, torch.float32)


@each_triton_device
@pytest.mark.parametrize("options", [{"training": True, "stats": "leave"}, {"training": False}], ids=str)
def test_running_statistics_left_alone(options: dict[str, object], device: str) -> None:
    args = operands((4, 5, 3, 2), torch.float32, device)
    before = [t.clone() for t in args]
    cond_bn_relu_up(*args, upsample=True, **options)
    for t, copy in zip(args, before, strict=True):
        assert_same_bits(t, copy)


@each_triton_device
@each_mode
@each_upsample
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_empty_batch(impl: str, upsample: bool, training: bool, device: str) -> None:
    args = operands((0, 5, 3, 2), torch.float32, device)
    out, dx, dgain, dbias, mean, var = forward_backward(args, training=training, upsample=upsample, impl=impl)
    assert out.shape == ((0, 5, 6, 4) if upsample else (0, 5, 3, 2)) and dx.shape == (0, 5, 3, 2)
    for grad in (dgain, dbias):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.equal(mean, args[4]) and torch.equal(var, args[5])


def strided(t: Tensor) -> Tensor:
    """The same values with gaps in every dimension."""
    wide = torch.full([2 * size for size in t.shape], -7, dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


@each_triton_device
@pytest.mark.parametrize("layout", ["NCHW", "permuted", "sliced", "expanded"])
def test_layouts(layout: str, device: str) -> None:
    args = operands((3, 5, 3, 2), torch.float32, device)
    if layout == "expanded":
        args[0] = args[0][:1].contiguous(memory_format=torch.channels_last).expand(3, 5, 3, 2)
    expected = forward_backward([t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in args],
                                training=True, upsample=True)  # fmt: skip
    change = {
        "NCHW": torch.Tensor.contiguous,
        "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": strided,
        "expanded": lambda t: t,
    }[layout]
    x, y, gain, bias = change(args[0]), strided(args[1]), strided(args[2]), args[3].t().contiguous().t()
    mean, var = args[4:]
    x, gain, bias = (t.detach().requires_grad_() for t in (x, gain, bias))
    out = cond_bn_relu_up(x, y, gain, bias, mean, var, training=True, upsample=True)
    actual = [out.detach(), *torch.autograd.grad(out, [x, gain, bias], strided(above(out))), mean, var]
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@each_triton_device
def test_gradient_of_a_broadcast(device: str) -> None:
    args = operands((3, 5, 3, 2), torch.float32, device)
    x = args[0].requires_grad_()
    out = cond_bn_relu_up(*args, training=False, upsample=True)
    (expanded,) = torch.autograd.grad(out.sum(), x, retain_graph=True)  # strides 0
    (dense,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(expanded, dense)


@each_triton_device
@each_upsample
def test_gradients_only_where_wanted(upsample: bool, device: str) -> None:
    args = operands((2, 3, 2, 1), torch.float32, device)
    _, *all_of_them, _, _ = forward_backward(args, training=True, stats="leave", upsample=upsample)
    for i, expected in zip((0, 2, 3), all_of_them, strict=True):
        given = [t.detach().clone() for t in args]
        given[i].requires_grad_()
        out = cond_bn_relu_up(*given, training=True, stats="leave", upsample=upsample)
        out.backward(above(out))
        assert torch.equal(given[i].grad, expected)
        assert all(t.grad is None for j, t in enumerate(given) if j != i)
    assert not cond_bn_relu_up(*args, training=True, upsample=upsample).requires_grad


@each_kernel_device
def test_double_backward_is_refused(device: str) -> None:
    args = operands((2, 3, 2, 2), torch.float32, device)
    x = args[0].requires_grad_()
    (grad,) = torch.autograd.grad(
        cond_bn_relu_up(*args, training=True, upsample=True).square().sum(), x, create_graph=True
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_triton_device
def test_statistics_that_have_moved_on(device: str) -> None:
    """The backward in eval mode needs the running statistics that its forward saw, or an error."""
    args = operands((3, 5, 3, 2), torch.float32, device)
    out = cond_bn_relu_up(args[0].detach().requires_grad_(), *args[1:], training=False, upsample=True)
    cond_bn_relu_up(*args, training=True, upsample=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        args = operands((3, 5, 3, 2), torch.float32)
        again = [t.clone() for t in args]
        out = cond_bn_relu_up(*args, training=True, upsample=True)
        assert_close(out, cond_bn_relu_up(*doubled(again), training=True, upsample=True), torch.float32)


@each_triton_device
@each_upsample
def test_no_gradient_at_zero(upsample: bool, device: str) -> None:
    args = operands((2, 3, 3, 2), torch.float32, device)
    args[2].zero_()
    args[3].zero_()
    out, *grads, _, _ = forward_backward(args, training=True, upsample=upsample)
    for t in (out, *grads):
        assert torch.equal(t, torch.zeros_like(t))


@each_triton_device
@each_upsample
def test_not_a_number_stays(upsample: bool, device: str) -> None:
    args = operands((3, 2, 3, 3), torch.float32, device)
    args[0][1, 0, 1, 1] = math.nan
    out, dx, *_ = forward_backward(args, training=False, upsample=upsample)
    assert out[1, 0].isnan().any() and not out[1, 1].isnan().any() and not out[[0, 2]].isnan().any()
    out, dx, *_, mean, var = forward_backward(args, training=True, upsample=upsample)
    for t in (out, dx):
        assert t[:, 0].isnan().all() and not t[:, 1].isnan().any()
    assert mean.isnan().tolist() == var.isnan().tolist() == [True, False]


@each_kernel_device
@pytest.mark.parametrize("bad", [-1, CLASSES, 2**40])
def test_classes_out_of_range_give_nan(bad: int, device: str) -> None:
    args = operands((3, 2, 3, 2), torch.float32, device)
    expected = forward_backward(args, training=False, upsample=False)
    args[1][1] = bad
    actual = forward_backward(args, training=False, upsample=False)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert a[1].isnan().all() and torch.equal(a[[0, 2]], e[[0, 2]])
    assert not actual[2].isnan().any()  # of no class
    assert forward_backward(args, training=True, upsample=False)[1].isnan().all()


def test_classes_out_of_range_on_the_cpu() -> None:
    args = operands((3, 5, 3, 2), torch.float32)
    for bad in (-1, CLASSES):
        args[1][1] = bad
        with pytest.raises(IndexError):
            cond_bn_relu_up(*args, training=True, upsample=True)


@each_kernel_device
@each_dtype
@each_upsample
@pytest.mark.parametrize("shape", [(2, 19, 3, 3), (2, 3, 1, 1)], ids=str)
def test_writes_nothing_around_its_tensors(
    shape: tuple[int, ...], upsample: bool, dtype: torch.dtype, device: str
) -> None:
    from puat_fast.kernels import cond_bn_relu_up as kernels

    args = operands(shape, dtype, device)
    statistics = OPS.cond_bn_relu_up_stats(args[0], None, None, 0.1, None)
    inputs = [*args[:4], statistics[0], statistics[1]]
    out = OPS.cond_bn_relu_up(*inputs, 1e-5, upsample)
    expected = [out, *OPS.cond_bn_relu_up_backward(above(out), *inputs, 1e-5, True, upsample, True, True)]
    results, checks = zip(*(guarded(torch.zeros_like(t)) for t in expected), strict=True)
    # What lies around the inputs is NaN: whatever is read there, and used, shows.
    inputs = [guarded(t, canary=math.nan)[0] if t.is_floating_point() else t for t in inputs]
    kernels.apply(results[0], *inputs, 1e-5, upsample)
    grad_out, _ = guarded(above(out).contiguous(memory_format=torch.channels_last), canary=math.nan)
    kernels.backward(*results[1:], grad_out, *inputs, 1e-5, True, upsample)
    for actual, wanted, check in zip(results, expected, checks, strict=True):
        assert_same_bits(actual, wanted)
        check()


@each_triton_device
def test_running_statistics_between_canaries(device: str) -> None:
    args = operands((2, 19, 3, 3), torch.float32, device)
    (mean, check_mean), (var, check_var) = guarded(args[4]), guarded(args[5])
    cond_bn_relu_up(*args[:4], mean, var, training=True, upsample=False)
    cond_bn_relu_up(*args, training=True, upsample=False)
    assert_same_bits(mean, args[4])
    assert_same_bits(var, args[5])
    check_mean()
    check_var()


@each_triton_device
def test_opcheck(device: str) -> None:
    x, y, gain, bias, mean, var = operands((2, 3, 1, 2), torch.bfloat16, device)
    momentum = torch.tensor(0.3, device=device)
    torch.library.opcheck(OPS.cond_bn_relu_up_stats.default, (x, mean, var, 0.0, momentum))
    torch.library.opcheck(OPS.cond_bn_relu_up_stats.default, (x, None, None, 0.1, None))
    shared = (x, y, gain, bias, mean, var, 1e-5)
    torch.library.opcheck(OPS.cond_bn_relu_up.default, (*shared, True))
    grad_out = above(OPS.cond_bn_relu_up(*shared, True))
    torch.library.opcheck(OPS.cond_bn_relu_up_backward.default, (grad_out, *shared, True, True, True, True))
    torch.library.opcheck(OPS.cond_bn_relu_up_backward.default, (x, *shared, False, False, True, False))


@each_kernel_device
@each_mode
def test_compiles_without_graph_break(training: bool, device: str) -> None:
    x, y, gain, bias, mean, var = operands((2, 3, 3, 2), torch.float32, device)

    def block(x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        h = cond_bn_relu_up(x * 1.0, y, gain, bias, mean, var, training=training, upsample=True)
        return cond_bn_relu_up(h, y, gain, bias, mean, var, training=training, stats="leave", upsample=False) + 1.0

    check_compiles(block, [x.requires_grad_(), gain.requires_grad_(), bias.requires_grad_(), mean, var])
