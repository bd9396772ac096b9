import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from op_checks import check_side_stream
from torch import Tensor

from puat_fast.ops import pgd_step, pgd_step_
from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

EPS, STEP = 8 / 255, 2 / 255
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
# One element, odd primes, not a multiple of any block, empty, more than one block and more than one thread's share.
SHAPES = [(1,), (7,), (3, 5, 7, 11), (0, 3, 32, 32), (), (257, 31), (2, 3, 128, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """x partly outside the ball and outside [0,1], grad with exact zeros, x0 in [0,1]."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator)
    x = x0 + 2 * EPS * torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    grad = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros(()), grad)
    return [t.to(device, dtype) for t in (x, grad, x0)]


def formula(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float) -> Tensor:
    """Elementwise in Python floats: shares no code with the op."""
    values = []
    for a, g, c in zip(*(t.double().flatten().tolist() for t in (x, grad, x0)), strict=True):
        moved = a + step_size * ((g > 0) - (g < 0))
        values.append(min(max(min(max(moved, c - eps), c + eps), 0.0), 1.0))
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = BITS[expected.dtype]
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def both(*args: object) -> tuple[Tensor, Tensor]:
    return pgd_step(*args), pgd_step(*args, impl="reference")


@each_dtype
def test_reference_is_the_formula(dtype: torch.dtype) -> None:
    args = operands((3, 5, 7), dtype, "cpu")
    expected = formula(*args, EPS, STEP)
    tolerance = {torch.float64: 0.0, torch.float32: 2**-23, torch.bfloat16: 2**-8}[dtype]
    actual = pgd_step(*args, EPS, STEP, impl="reference").double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_bitwise(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    args = operands(shape, dtype, device)
    before = [t.clone() for t in args]
    assert_same_bits(*both(*args, EPS, STEP))
    for arg, copy in zip(args, before, strict=True):
        assert_same_bits(arg, copy)
    actual = pgd_step_(*args, EPS, STEP)
    assert actual is args[0]
    assert_same_bits(actual, pgd_step(*before, EPS, STEP, impl="reference"))


@each_device
@pytest.mark.parametrize(("eps", "step_size"), [(0.0, STEP), (EPS, 0.0), (2.0, 3.0), (1e-30, 1e30)])
def test_extreme_radii(eps: float, step_size: float, device: str) -> None:
    assert_same_bits(*both(*operands((13, 17), torch.float32, device), eps, step_size))


@each_device
def test_bfloat16_ties_round_to_even(device: str) -> None:
    x = torch.arange(128, 256, device=device).div(256).bfloat16()  # neighbours in bfloat16
    for sign in (-1.0, 1.0):
        actual, expected = both(x, torch.full_like(x, sign), x, 1.0, 2**-9)  # half way to the next
        assert_same_bits(actual, expected)


def layouts(t: Tensor) -> dict[str, Tensor]:
    n, c, h, w = t.shape
    wide = torch.zeros(n, c, h, 2 * w, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return {
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "permuted": t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": wide[..., ::2],
    }


@each_device
@each_dtype
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("mixed", [False, True])
def test_layouts(layout: str, mixed: bool, dtype: torch.dtype, device: str) -> None:
    plain = operands((3, 5, 7, 11), dtype, device)
    expected = pgd_step(*plain, EPS, STEP, impl="reference")
    x, grad, x0 = (layouts(t)[layout] for t in plain)
    if mixed:
        grad = plain[1]
    actual = pgd_step(x, grad, x0, EPS, STEP)
    assert_same_bits(actual, expected)
    assert actual.stride() == torch.empty_like(x).stride()
    assert_same_bits(pgd_step_(x, grad, x0, EPS, STEP), expected)


def test_broadcast_centre() -> None:
    x, grad, x0 = operands((4, 6), torch.float32, "cpu")
    row = x0[:1].expand(4, 6)
    assert_same_bits(pgd_step(x, grad, row, EPS, STEP), pgd_step(x, grad, row.contiguous(), EPS, STEP))


@each_device
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_writes_nothing_around_its_tensor(offset: int, dtype: torch.dtype, device: str) -> None:
    plain = operands((3, 7, 11), dtype, device)
    size = plain[0].numel()
    buffers = [torch.full((size + 2 * 64,), -5.0, dtype=dtype, device=device) for _ in plain]
    inner = [b[offset : offset + size].view(3, 7, 11).copy_(t) for b, t in zip(buffers, plain, strict=True)]
    pgd_step_(*inner, EPS, STEP)
    assert_same_bits(inner[0], pgd_step(*plain, EPS, STEP, impl="reference"))
    for buffer, value in zip(buffers, inner, strict=True):
        value.fill_(-5.0)
        assert (buffer == -5.0).all()


@each_device
@pytest.mark.parametrize("which", [1, 2], ids=["grad", "x0"])
def test_x_may_be_another_argument(which: int, device: str) -> None:
    args = operands((5, 7), torch.float32, device)
    args[which] = args[0]
    expected = pgd_step(*[t.clone() for t in args], EPS, STEP, impl="reference")
    assert_same_bits(pgd_step(*args, EPS, STEP), expected)
    assert_same_bits(pgd_step_(*args, EPS, STEP), expected)


def test_partial_overlap_is_refused() -> None:
    buffer = torch.rand(11)
    with pytest.raises(ValueError, match="grad: expected memory apart from that of out"):
        pgd_step_(buffer[:10], buffer[1:], torch.rand(10), EPS, STEP)


@each_device
def test_not_a_number(device: str) -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([0.5, nan, 0.5, 0.5, inf, -inf], device=device)
    grad = torch.tensor([nan, 1.0, 1.0, inf, -1.0, -inf], device=device)
    x0 = torch.tensor([0.5, 0.5, nan, 0.5, 0.5, 0.5], device=device)
    actual, expected = both(x, grad, x0, 0.25, 0.125)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    wanted = torch.tensor([0.5, nan, nan, 0.625, 0.75, 0.25], device=device)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_no_gradient_but_a_version() -> None:
    x, grad, x0 = operands((3, 4), torch.float32, "cpu")
    leaf = x.clone().requires_grad_()
    assert not pgd_step(leaf, grad, x0, EPS, STEP).requires_grad
    saved = leaf * 1.0
    loss = (saved**2).sum()
    pgd_step_(saved, grad, x0, EPS, STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        args = operands((3, 4), torch.float32, "cpu")
        expected = pgd_step(*args, EPS, STEP, impl="reference")
        assert_same_bits(pgd_step_(*args, EPS, STEP), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.float16)}, "x: expected dtype .*float32.*, got torch.float16"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x: expected dtype .*, got torch.int64"),
        ({"grad": torch.zeros(3, 2)}, r"grad: expected shape \(2, 3\) \(as x\), got \(3, 2\)"),
        ({"x0": torch.zeros(3)}, r"x0: expected shape \(2, 3\) \(as x\), got \(3,\)"),
        ({"x0": torch.zeros(2, 3).bfloat16()}, r"x0: expected dtype torch.float32 \(as x\), got torch.bfloat16"),
        ({"grad": torch.zeros(2, 3, device="meta")}, r"grad: expected device cpu \(as x\), got meta"),
        ({"eps": -0.1}, "eps: expected a finite number >= 0, got -0.1"),
        ({"eps": math.nan}, "eps: .*got nan"),
        ({"step_size": -1}, "step_size: expected a finite number >= 0, got -1"),
        ({"step_size": math.inf}, "step_size: .*got inf"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
@pytest.mark.parametrize("function", [pgd_step, pgd_step_])
def test_mistakes_are_named(function, change: dict[str, object], message: str) -> None:
    zeros = torch.zeros(2, 3)
    arguments = {"x": zeros, "grad": zeros, "x0": zeros, "eps": EPS, "step_size": STEP, "impl": "auto"}
    with pytest.raises(ValueError, match=message):
        function(**(arguments | change))


@pytest.mark.parametrize(
    ("which", "bad", "message"),
    [
        (0, torch.zeros(4, 3), r"out: expected shape \(3, 4\) \(as x\), got \(4, 3\)"),
        (1, torch.zeros(3, 4, dtype=torch.float64), "x: expected float32 or bfloat16, got float64"),
        (1, torch.zeros(3, 8)[:, ::2], r"x: expected a tensor without gaps or overlap, got strides \(8, 2\)"),
        (2, torch.zeros(3, 4).bfloat16(), r"grad: expected float32 \(as x\), got bfloat16"),
        (3, torch.zeros(4, 3).t(), r"x0: expected strides \(4, 1\) \(as x\), got \(1, 3\)"),
    ],
)
def test_extension_trusts_nobody(which: int, bad: Tensor, message: str) -> None:
    tensors = [torch.zeros(3, 4) for _ in range(4)]
    tensors[which] = bad
    with pytest.raises(ValueError, match=message):
        _C.pgd_step_cpu(*capsules(*tensors), EPS, STEP, 1)


def test_consumed_capsule_is_refused() -> None:
    tensors = [torch.zeros(3) for _ in range(4)]
    handed_over = capsules(*tensors)
    torch.utils.dlpack.from_dlpack(handed_over[2])
    with pytest.raises(ValueError, match="grad: expected a DLPack capsule named 'dltensor', got 'used_dltensor'"):
        _C.pgd_step_cpu(*handed_over, EPS, STEP, 1)


@each_device
@pytest.mark.parametrize("op", ["pgd_step", "pgd_step_"])
def test_opcheck(op: str, device: str) -> None:
    for args in (
        operands((3, 5), torch.float32, device),
        [layouts(t)["channels_last"] for t in operands((2, 3, 5, 7), torch.bfloat16, device)],
    ):
        torch.library.opcheck(getattr(torch.ops.puat_fast, op).default, (*args, EPS, STEP))


@each_device
def test_compiles_without_graph_break(device: str) -> None:
    def two_steps(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        moved = pgd_step(x * 1.0, grad, x0, EPS, STEP)
        return pgd_step_(moved, grad, x0, EPS, STEP) + 1.0

    args = operands((3, 4), torch.float32, device)
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")  # inductor adds seconds, and no op
    assert_same_bits(compiled(*args), two_steps(*args))


def test_thread_count_changes_nothing() -> None:
    args = operands((1_000_003,), torch.float32, "cpu")
    expected = pgd_step(*args, EPS, STEP, impl="reference")
    for threads in (1, 2, 5):
        out = torch.empty_like(args[0])
        _C.pgd_step_cpu(*capsules(out, *args), EPS, STEP, threads)
        assert_same_bits(out, expected)


def test_thread_pool_after_fork() -> None:
    args = operands((200_003,), torch.float32, "cpu")
    out, in_child = torch.empty_like(args[0]), torch.empty_like(args[0])
    _C.pgd_step_cpu(*capsules(out, *args), EPS, STEP, 2)  # the parent has its workers now
    handed_over, expected = capsules(in_child, *args), out.numpy().tobytes()
    child = os.fork()
    if child == 0:  # no torch op here: its own OpenMP threads did not survive either
        _C.pgd_step_cpu(*handed_over, EPS, STEP, 2)
        same, threads = in_child.numpy().tobytes() == expected, len(os.listdir("/proc/self/task"))
        os._exit(0 if same and threads == 2 else 1)  # a fork copies one thread; the other is the new pool's worker
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    def test_kernel_is_built(self) -> None:
        assert hasattr(_C, "pgd_step_cuda"), "a CUDA device, but puat_fast was built without a CUDA compiler"

    def test_captured_graph(self) -> None:
        x, grad, x0 = operands((8, 3, 33, 31), torch.float32, "cuda")
        static, target = [t.clone() for t in (x, grad, x0)], x.clone()
        pgd_step(*static, EPS, STEP)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = pgd_step(*static, EPS, STEP)
            pgd_step_(target, *static[1:], EPS, STEP)
        for seed in (1, 2):
            fresh = operands((8, 3, 33, 31), torch.float32, "cuda", seed)
            for buffer, value in zip(static, fresh, strict=True):
                buffer.copy_(value)
            target.copy_(fresh[0])
            graph.replay()
            expected = pgd_step(*fresh, EPS, STEP, impl="reference")
            assert_same_bits(out, expected)
            assert_same_bits(target, expected)

    def test_side_stream(self) -> None:
        args = operands((64, 3, 128, 129), torch.float32, "cuda")
        check_side_stream(lambda *t: pgd_step(*t, EPS, STEP), args)

    def test_hundred_repeats(self) -> None:
        args = operands((16, 3, 127, 129), torch.bfloat16, "cuda")
        first = pgd_step(*args, EPS, STEP)
        for _ in range(100):
            assert_same_bits(pgd_step(*args, EPS, STEP), first)


def test_kernels_run_on_torchs_threads() -> None:
    """No thread is made for them where torch has loaded an OpenMP runtime: its own are awake."""
    script = """
import os, torch
from puat_fast.ops import pgd_step
torch.set_num_threads(2)
x = torch.rand(1 << 21)
x.sin()  # torch's threads are there from here on
before = len(os.listdir("/proc/self/task"))
ours = pgd_step(x, x - 0.5, x, 0.1, 0.05)
print(before, len(os.listdir("/proc/self/task")))
torch.set_num_threads(1)
assert torch.equal(ours, pgd_step(x, x - 0.5, x, 0.1, 0.05))
names = ("libgomp", "libiomp5", "libomp")
print(any("/torch" in line and any(name in line for name in names) for line in open("/proc/self/maps")))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    counts, has_runtime = done.stdout.splitlines()
    before, after = counts.split()
    if has_runtime != "True":
        pytest.skip("this torch brings no OpenMP runtime")
    assert int(before) >= 2 and after == before
