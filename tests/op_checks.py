"""What every op's tests share: devices, shapes, and the checks that all ops must pass.

The same tests hold an op in three settings: on the CPU, on a GPU (marker `gpu`), and, where the op's kernel is
Triton's, in Triton's interpreter: tests/ops/test_triton_interpreter.py runs those marked `interpret` again in a process
of its own with TRITON_INTERPRET=1, in which CPU tensors take the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from puat_fast.ops._library import INTERPRETED

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])

each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
"""For ops with a kernel of their own on the CPU, and for what does not depend on the kernel."""

each_triton_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret, id="interpret") if INTERPRETED else "cpu", CUDA]
)
"""For Triton's ops: on the CPU the test runs twice, with the reference and with the interpreted kernel."""


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits (-0 is not 0, and any NaN equals only itself)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = BITS[expected.element_size()]
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Within rounding: `expected` is the same formula in float64, `dtype` the one in which `actual` was computed.

    Tolerance, relative and absolute to the largest element: 2^-20 for float32, 2^-7 for bfloat16, times `scale`.
    """
    tolerance = {torch.float64: 2.0**-40, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}[dtype] * scale
    assert actual.shape == expected.shape
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * max(largest, 1e-30))


def guarded(t: Tensor, margin: int = 64, canary: float = -5.0) -> tuple[Tensor, Callable[[], None]]:
    """(a copy of dense `t`, of the same strides, amid canaries; a check that nobody has written on these)."""
    size, dtype = t.numel(), t.dtype
    canary = 201 if dtype == torch.uint8 else canary
    buffer = torch.full((size + 2 * margin,), canary, dtype=dtype, device=t.device)
    inner = buffer.as_strided(t.shape, t.stride(), margin)
    inner.copy_(t)

    def check() -> None:
        assert (buffer[:margin] == canary).all() and (buffer[margin + size :] == canary).all()

    return inner, check


def check_gradients(fn: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """float64 gradcheck of fn, whose float64 path is the reference."""
    assert all(t.dtype == torch.float64 for t in inputs if t.is_floating_point())
    assert torch.autograd.gradcheck(fn, tuple(inputs))


def check_compiles(fn: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """torch.compile(fullgraph=True) of fn gives what fn gives, and the same gradients.

    Backend aot_eager: inductor would add seconds, and nothing that an opaque op could break on.
    """

    def run(function: Callable[..., Any]) -> list[Tensor]:
        given = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs]
        out = function(*given)
        outs = [o for o in (out if isinstance(out, tuple | list) else [out]) if isinstance(o, Tensor)]
        leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        loss = sum((o.float() * torch.linspace(0.5, 1.5, o.numel(), device=o.device).view(o.shape)).sum()
                   for o in outs if o.requires_grad)  # fmt: skip
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
        return [o.detach() for o in outs] + list(grads) + [t.detach() for t in given if isinstance(t, Tensor)]

    torch._dynamo.reset()
    for actual, expected in zip(run(torch.compile(fn, fullgraph=True, backend="aot_eager")), run(fn), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_captured(fn: Callable[..., Any], make_inputs: Callable[[int], Sequence[Any]]) -> None:
    """GPU: fn, captured once as a CUDA graph, gives on fresh inputs bitwise what it gives eagerly.

    fn allocates its results or writes into its inputs; make_inputs(seed) gives inputs of the same shapes.
    """

    def tensors(out: Any) -> list[Tensor]:
        return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]

    def copy_into(static: Sequence[Any], fresh: Sequence[Any]) -> None:
        for buffer, value in zip(static, fresh, strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
            elif isinstance(buffer, list):
                copy_into(buffer, value)

    static = make_inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            fn(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = fn(*static)
    for seed in (1, 2):
        with torch.no_grad():
            copy_into(static, make_inputs(seed))
            graph.replay()
            fresh = make_inputs(seed)
            for actual, expected in zip(tensors(out), tensors(fn(*fresh)), strict=True):
                assert_same_bits(actual, expected)
            for buffer, value in zip(static, fresh, strict=True):
                if isinstance(buffer, Tensor):
                    assert_same_bits(buffer, value)


def check_repeats(fn: Callable[[], Any], times: int = 100) -> None:
    """fn gives the same bits every time."""

    def bits() -> list[Tensor]:
        out = fn()
        return [t.detach().clone() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]

    first = bits()
    for _ in range(times):
        for actual, expected in zip(bits(), first, strict=True):
            assert_same_bits(actual, expected)


def check_side_stream(fn: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """GPU: fn follows the current stream: there its inputs arrive late, and any other stream would read zeros."""

    def tensors(out: Any) -> list[Tensor]:
        return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]

    expected = tensors(fn(*(t.clone() for t in inputs)))
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        for t, value in zip(late, inputs, strict=True):
            t.copy_(value)
        actual = tensors(fn(*late))
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
