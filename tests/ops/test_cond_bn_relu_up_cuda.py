"""cond_bn_relu_up's kernels compiled, and on a GPU at the sizes of training, captured, and repeated."""

import pytest
import torch
from cond_bn_relu_up_cases import above, assert_all_close, doubled, forward_backward, operands
from op_checks import NO_CUDA, assert_same_bits, check_captured, check_repeats
from torch import Tensor
from triton_compile import ARCHS, assert_fits, compiling, kernels_of

from puat_fast.ops import cond_bn_relu_up
from puat_fast.ops._library import INTERPRETED

OPS = torch.ops.puat_fast

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
each_upsample = pytest.mark.parametrize("upsample", [True, False], ids=["x2", "x1"])


@pytest.mark.skipif(INTERPRETED, reason="what is interpreted cannot be compiled")
@each_dtype
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(arch: int, dtype: torch.dtype) -> None:
    from puat_fast.kernels import cond_bn_relu_up as kernels

    with compiling(arch) as done:
        x, y, *rest = operands((64, 256, 8, 8), dtype)
        for upsample in (True, False):
            kernels.apply(x, x, y, *rest, 1e-5, upsample)  # x for every image: nothing is run
            kernels.backward(x, *rest[:2], x, x, y, *rest, 1e-5, True, upsample)
    assert_fits(done, arch)
    assert {kernel.name for kernel in done} == kernels_of(kernels)


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    SHAPE = (64, 131, 9, 7)

    @each_dtype
    @each_upsample
    @each_mode
    @pytest.mark.parametrize("shape", [SHAPE, (256, 256, 4, 4), (300, 16, 4, 4), (32, 256, 16, 16)], ids=str)
    def test_numerics_at_size(self, shape: tuple[int, ...], training: bool, upsample: bool, dtype: torch.dtype) -> None:
        args = operands(shape, dtype, "cuda")
        actual = forward_backward(args, training=training, upsample=upsample)
        assert_all_close(actual, forward_backward(doubled(args), training=training, upsample=upsample), dtype)

    @each_dtype
    @each_upsample
    @each_mode
    def test_captured_graph(self, training: bool, upsample: bool, dtype: torch.dtype) -> None:
        def make_inputs(seed: int) -> list[Tensor]:
            args = operands(self.SHAPE, dtype, "cuda", seed)
            grad = above(OPS.cond_bn_relu_up(*args, 1e-5, upsample), seed)
            return [*args, torch.tensor(0.1 * (seed + 1), device="cuda"), grad]

        def fn(*args: Tensor) -> list[Tensor]:
            *inputs, momentum, grad = args
            out = cond_bn_relu_up(*inputs, training=training, momentum=momentum, upsample=upsample)
            return [out, *OPS.cond_bn_relu_up_backward(grad, *inputs, 1e-5, training, upsample, True, True)]

        check_captured(fn, make_inputs)

    @each_dtype
    @each_upsample
    def test_hundred_repeats(self, upsample: bool, dtype: torch.dtype) -> None:
        args = operands(self.SHAPE, dtype, "cuda")
        check_repeats(lambda: forward_backward(args, training=True, upsample=upsample))

    def test_side_stream(self) -> None:
        args = operands(self.SHAPE, torch.float32, "cuda")
        expected = forward_backward(args, training=True, upsample=True)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            args[0].mul_(1.0)
            actual = forward_backward(args, training=True, upsample=True)
        stream.synchronize()
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)

    def test_waits_for_nothing(self) -> None:
        args = operands(self.SHAPE, torch.float32, "cuda")
        forward_backward(args, training=True, upsample=True)
        grad = torch.randn(64, 131, 18, 14, device="cuda")
        x = args[0].requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = cond_bn_relu_up(*args, training=True, momentum=0.2, upsample=True)
            torch.autograd.grad(out, x, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
