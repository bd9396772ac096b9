"""How the kernels of bn_silu deal out their work, what they need of a GPU, and what they do on one."""

import pytest
import torch
from bn_silu_cases import PADS, compare, each_dtype, operands
from op_checks import NO_CUDA, check_captured, check_repeats, check_side_stream
from torch import Tensor

from puat_fast.ops import bn_silu
from puat_fast.ops._library import INTERPRETED


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 48, 160, 320, 640])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 16384, 262144, 10**7])
@pytest.mark.parametrize("groups", [1, 3])
def test_tiling_covers_every_element_once(channels: int, rows: int, groups: int) -> None:
    from puat_fast.kernels import batch_stats

    t = batch_stats.tiling(rows, channels, groups)
    assert t.rows * t.cols == batch_stats.TILE and t.chunk % t.rows == 0
    assert (t.chunks - 1) * t.chunk < rows <= t.chunks * t.chunk
    blocks = t.grid[0]
    assert t.grid == (blocks, t.chunks, groups) and (blocks - 1) * t.cols < channels <= blocks * t.cols
    assert t.chunks <= batch_stats.MAX_CHUNKS
    if channels % 16 == 0:
        assert blocks * t.cols == channels


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
@pytest.mark.parametrize("arch", [80, 90])
@each_dtype
def test_kernels_fit_the_gpu(dtype: torch.dtype, arch: int) -> None:
    from triton_compile import assert_fits, compiling, kernels_of

    from puat_fast.kernels import batch_stats
    from puat_fast.kernels import bn_silu as kernels

    with compiling(arch) as done:
        for channels, pad, full in ((160, (0, 0, 0, 0), True), (17, (0, 1, 0, 1), False)):
            x = torch.empty(4, channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
            vector, given = torch.empty(channels), x if full else None
            momentum = torch.tensor(0.1) if full else 0.1
            h, stats = batch_stats.batch_stats(x, given, 1, *((vector, vector) if full else (None, None)), momentum)
            normalisation = stats[0], stats[1], vector, vector
            out, _ = kernels.apply(x, None if full else x, *normalisation, 1e-5, pad)
            sums, _, _ = kernels.reduce(out, h, *normalisation, 1e-5, pad)
            kernels.input_grad(out, given, h, *normalisation, sums if full else None, 1e-5, pad)
    assert_fits(done, arch)
    assert {kernel.name for kernel in done} == kernels_of(batch_stats) | kernels_of(kernels)


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    @each_dtype
    @pytest.mark.parametrize("shape", [(64, 160, 16, 16), (33, 320, 9, 7), (32, 640, 8, 8), (8, 16, 33, 31)], ids=str)
    @pytest.mark.parametrize("training", [True, False])
    def test_training_shapes(self, training: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        for pad in PADS[:2]:
            compare("cuda", dtype, shape, training=training, pad=pad, scale=64.0)

    @each_dtype
    def test_captured_graph(self, dtype: torch.dtype) -> None:
        def inputs(seed: int) -> list[Tensor]:
            return [*operands((8, 160, 9, 7), dtype, "cuda", seed).values(), torch.tensor(0.1 * seed, device="cuda")]

        def step(x, residual, weight, bias, mean, var, momentum):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
                x, residual, weight, bias = leaves
                first = bn_silu(
                    x, weight, bias, mean, var, training=True, momentum=momentum, residual=residual, pad=(0, 1, 0, 1)
                )  # fmt: skip
                second = bn_silu(first.h, weight, bias, mean, var, training=False)
                out = [first.out, second.out]
                return [*out, *torch.autograd.grad(out, leaves, [t.detach() for t in out])]

        check_captured(step, inputs)

    def test_hundred_repeats(self) -> None:
        o = operands((64, 160, 17, 15), torch.bfloat16, "cuda")
        leaves = [o[k].requires_grad_() for k in ("x", "residual", "weight", "bias")]
        above = torch.randn_like(o["x"])

        def step() -> list[Tensor]:
            running = o["running_mean"].clone(), o["running_var"].clone()
            result = bn_silu(leaves[0], *leaves[2:], *running, training=True, residual=leaves[1], groups=2)
            return [*result, *running, *torch.autograd.grad([result.out, result.h], leaves, [above, above])]

        check_repeats(step)

    def test_side_stream(self) -> None:
        o = operands((64, 160, 16, 16), torch.float32, "cuda")
        check_side_stream(lambda *t: bn_silu(**dict(zip(o, t, strict=True)), training=True), list(o.values()))
