"""What the tests of the losses among the ops share: inputs in all shapes and strides, and the checks for each loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from op_checks import CUDA, assert_close, assert_same_bits, check_captured, check_repeats
from torch import Tensor
from triton_compile import ARCHS, assert_fits, compiling, kernels_of

from puat_fast.ops._library import INTERPRETED

# One element, odd primes, one row over a program's tile, many programs, empty, one row per program. N x K.
SHAPES = [(1, 1), (1, 2), (5, 3), (7, 10), (257, 10), (131, 100), (5, 1000), (2, 4096), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16]
UPSTREAM = 0.7  # the gradient that comes from above

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_kernel = pytest.mark.parametrize(
    "device", [*([pytest.param("cpu", marks=pytest.mark.interpret, id="interpret")] if INTERPRETED else []), CUDA]
)
"""Where the Triton kernel runs, and nowhere else."""
each_arch = pytest.mark.parametrize("arch", ARCHS)
compiles_kernels = pytest.mark.skipif(INTERPRETED, reason="what is defined for the interpreter cannot be compiled")


@dataclass(frozen=True)
class Loss:
    """public(*inputs, impl=...) and the op beneath it; the gradient goes to the inputs at the positions `grad_of`."""

    public: Callable[..., Tensor]
    through_op: Callable[..., Tensor]
    grad_of: tuple[int, ...] = (0,)


def value_and_grads(fn: Callable[..., Tensor], inputs: Sequence[Tensor], grad_of: Sequence[int]) -> list[Tensor]:
    """fn's value, and UPSTREAM times its gradients."""
    given = [t.detach() for t in inputs]
    wanted = [given[i].requires_grad_() for i in grad_of]
    with torch.enable_grad():
        value = fn(*given)
        grads = torch.autograd.grad(value, wanted, torch.full_like(value, UPSTREAM))
    return [value.detach(), *grads]


def random_rows(shape: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two N x K of scores about 0.5, the first of them with some beyond a hinge and some exactly on it."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator) * 2 + 0.5 for _ in range(2))
    first.flatten()[::5] = 1
    first.flatten()[3::5] = -1
    return first.to(device, dtype), second.to(device, dtype)


def labels(shape: tuple[int, int], device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape[1], shape[:1], generator=generator).to(device)


def strided(t: Tensor) -> dict[str, Tensor]:
    """A matrix in other strides; what lies between its elements is far off."""
    n, k = t.shape
    wide = torch.full((2 * n, 2 * k + 3), 77.0, dtype=t.dtype, device=t.device)
    return {
        "rows of a wider one": wide.clone()[:n, 3 : k + 3].copy_(t),
        "every other row": wide.clone()[::2, :k].copy_(t),
        "every other column": wide.clone()[:n, : 2 * k : 2].copy_(t),
        "transposed": t.t().contiguous().t(),
    }


each_strides = pytest.mark.parametrize("strides", list(strided(torch.zeros(1, 1))))


def check_values(loss: Loss, inputs: Sequence[Tensor], scale: float = 4.0) -> None:
    """The op's value and gradients are those of the reference in float64, and leave the inputs as they are."""
    before = [t.clone() for t in inputs]
    actual = value_and_grads(loss.through_op, inputs, loss.grad_of)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    expected = value_and_grads(partial(loss.public, impl="reference"), exact, loss.grad_of)
    assert actual[0].dtype == torch.float32 and actual[0].shape == ()
    if torch.isfinite(expected[0]):
        assert_close(actual[0], expected[0], torch.float32, scale)
    else:
        torch.testing.assert_close(actual[0].double(), expected[0], equal_nan=True)
    for i, grad, other in zip(loss.grad_of, actual[1:], expected[1:], strict=True):
        assert grad.dtype == inputs[i].dtype and grad.is_contiguous()
        assert_close(grad, other, grad.dtype, scale if grad.dtype == torch.float32 else 1.0)
    for t, copy in zip(inputs, before, strict=True):
        assert_same_bits(t, copy)


def check_route(loss: Loss, inputs: Sequence[Tensor], kernel: bool, impl: str = "auto") -> None:
    """The public function calls the op, or leaves the work and the gradient to plain torch."""
    given = [t.detach() for t in inputs]
    given[loss.grad_of[0]].requires_grad_()
    of_op, value = loss.through_op(*given), loss.public(*given, impl=impl)
    assert (value.grad_fn.name() == of_op.grad_fn.name()) == kernel  # both alive: torch 2.11 forgets names


def check_routes(
    loss: Loss, make_inputs: Callable[[tuple[int, int], torch.dtype, str], list[Tensor]], device: str
) -> None:
    """Kernels serve the GPU and the interpreter, up to 4096 classes and float32."""
    served = INTERPRETED or device == "cuda"
    for dtype in DTYPES:
        check_route(loss, make_inputs((3, 4), dtype, device), served)
    check_route(loss, make_inputs((3, 4), torch.float32, device), False, impl="reference")
    for dtype in (torch.float16, torch.float64):
        check_route(loss, make_inputs((3, 4), dtype, device), False)


def check_no_double_backward(loss: Loss, inputs: Sequence[Tensor]) -> None:
    given = [t.detach() for t in inputs]
    leaf = given[loss.grad_of[0]].requires_grad_()
    value = loss.through_op(*given)
    (grad,) = torch.autograd.grad(value, leaf, torch.ones_like(value).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def check_kernels_compile(module: ModuleType, launch: Callable[[torch.dtype, int], None], arch: int) -> None:
    """launch(dtype, k) launches every kernel of the module: each fits the GPU, for few classes and for many."""
    for dtype, k in ((torch.float32, 10), (torch.bfloat16, 10), (torch.float32, 1000)):
        with compiling(arch) as done:
            launch(dtype, k)
        assert_fits(done, arch)
        assert {kernel.name for kernel in done} == kernels_of(module)


def check_on_gpu(loss: Loss, make_inputs: Callable[[int], list[Any]]) -> None:
    """Value and gradients in a captured graph, 100 times over, and on a side stream."""

    def step(*inputs: Tensor) -> list[Tensor]:
        return value_and_grads(loss.through_op, inputs, loss.grad_of)

    check_captured(step, make_inputs)
    inputs = make_inputs(0)
    check_repeats(lambda: step(*inputs))
    expected, late = step(*inputs), [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a launch on another stream would read the zeros
        for t, value in zip(late, inputs, strict=True):
            t.copy_(value)
        actual = step(*late)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
