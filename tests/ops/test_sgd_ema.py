from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_checks import (
    NO_CUDA,
    assert_close,
    assert_same_bits,
    check_captured,
    check_compiles,
    check_repeats,
    each_device,
    guarded,
)
from torch import Tensor

from puat_fast.ops import adam_, sgd_ema_
from puat_fast.ops._native import _C

# One element, odd primes, not a multiple of any block, empty, 0-d, more than one block and one thread's share.
SHAPES = [(16, 3, 3, 3), (7,), (), (0, 3), (1,), (257, 31), (3, 5, 7, 11), (5, 8, 1, 1), (90_001,)]
STREAMS = {
    "sgd": ("params", "grads", "momentum_buffers", "emas", "copies"),
    "adam": ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "copies"),
}
Net = dict[str, list[Any]]

each_op = pytest.mark.parametrize("op", ["sgd", "adam"])


def network(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", shapes: list[Any] = SHAPES) -> Net:
    """Lists of random tensors as the two ops take them; 4-d ones in channels_last; no copy of every third tensor."""
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> list[Tensor]:
        plain = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in plain]

    names = ("params", "grads", "momentum_buffers", "emas", "exp_avgs", "exp_avg_sqs")
    net: Net = {name: tensors() for name in names}
    net["exp_avg_sqs"] = [t.square() for t in net["exp_avg_sqs"]]
    net["copies"] = [torch.zeros_like(p, dtype=torch.bfloat16) if i % 3 else None for i, p in enumerate(net["params"])]
    net["steps"] = [torch.full((), float(i), device=device) for i in range(len(shapes))]
    return net


def run(op: str, net: Net, **options: Any) -> None:
    """One step of the op."""
    if op == "adam":
        adam_(*(net[name] for name in STREAMS[op]), **({"lr": 0.01, "betas": (0.5, 0.99)} | options))
        return
    decays = [0.1 * (i % 2) for i in range(len(net["params"]))]
    defaults = {"lr": 0.05, "momentum": 0.9, "weight_decays": decays, "ema_decay": 0.75}
    sgd_ema_(*(net[name] for name in STREAMS[op]), **(defaults | options))


def assert_same_step(op: str, actual: Net, expected: Net, dtype: torch.dtype = torch.float32) -> None:
    """Bit for bit where that is promised, else to rounding."""
    for name in STREAMS[op]:
        for a, e in zip(actual[name], expected[name], strict=True):
            if a is None or e is None:
                assert a is e
            elif op == "sgd" or name in ("grads", "steps"):
                assert_same_bits(a, e)
            else:
                assert_close(a, e, torch.bfloat16 if name == "copies" else dtype)


def both(op: str, make: Callable[[], Net], **options: Any) -> tuple[Net, Net]:
    """The networks after a step of the kernel and of the reference."""
    actual, expected = make(), make()
    run(op, actual, **options)
    run(op, expected, **options, impl="reference")
    return actual, expected


# -- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_reference_is_the_formula(nesterov: bool) -> None:
    net = network(dtype=torch.float64, shapes=[(5,), (2, 3)])
    rows = [[t.flatten().tolist() for t in (net[name][i] for name in STREAMS["sgd"][:4])] for i in range(2)]
    run("sgd", net, nesterov=nesterov)
    for i, columns in enumerate(rows):
        for k, (p, g, b, e) in enumerate(zip(*columns, strict=True)):
            g += 0.1 * i * p
            b = 0.9 * b + g
            p -= 0.05 * (g + 0.9 * b if nesterov else b)
            e = 0.75 * e + 0.25 * p
            after = [net[name][i].flatten()[k].item() for name in ("params", "momentum_buffers", "emas")]
            assert after == pytest.approx([p, b, e], rel=1e-13)


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_adam_reference_is_the_formula(betas: tuple[float, float]) -> None:
    net = network(dtype=torch.float64, shapes=[(5,), (2, 3)])
    rows = [[t.flatten().tolist() for t in (net[name][i] for name in STREAMS["adam"][:4])] for i in range(2)]
    run("adam", net, betas=betas, eps=0.125)
    for i, columns in enumerate(rows):
        for k, (p, g, m, v) in enumerate(zip(*columns, strict=True)):
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
            m_hat, v_hat = m / (1 - betas[0] ** (i + 1)), v / (1 - betas[1] ** (i + 1))
            p -= 0.01 * m_hat / (math.sqrt(v_hat) + 0.125)
            after = [net[name][i].flatten()[k].item() for name in ("params", "exp_avgs", "exp_avg_sqs")]
            assert after == pytest.approx([p, m, v], rel=1e-13)
    assert [step.item() for step in net["steps"]] == [1, 2]


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_is_the_sgd_of_torch(nesterov: bool, dtype: torch.dtype, device: str) -> None:
    """From the first step on, whose buffer torch takes from the gradient; with the average that used to follow."""
    net = network(dtype=dtype, device=device)
    params = [p.clone() for p in net["params"]]
    emas = [e.clone() for e in net["emas"]]
    groups = [{"params": params[0::2], "weight_decay": 0.0}, {"params": params[1::2], "weight_decay": 0.1}]
    theirs = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=nesterov)
    for buffer in net["momentum_buffers"]:
        buffer.zero_()
    for seed in range(3):
        net["grads"] = network(seed, dtype, device)["grads"]
        for p, grad in zip(params, net["grads"], strict=True):
            p.grad = grad.clone()
        theirs.step()
        for ema, p in zip(emas, params, strict=True):
            ema.mul_(0.75).add_(p, alpha=0.25)
        run("sgd", net, nesterov=nesterov)
    for ours, expected in ((net["params"], params), (net["emas"], emas)):
        for a, e in zip(ours, expected, strict=True):
            assert_close(a, e, dtype)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_is_the_adam_of_torch(betas: tuple[float, float], dtype: torch.dtype, device: str) -> None:
    net = network(dtype=dtype, device=device)
    for t in (*net["exp_avgs"], *net["exp_avg_sqs"], *net["steps"]):
        t.zero_()
    params = [p.clone() for p in net["params"]]
    theirs = torch.optim.Adam(params, lr=0.01, betas=betas, eps=1e-8)
    for seed in range(4):
        net["grads"] = network(seed, dtype, device)["grads"]
        for p, grad in zip(params, net["grads"], strict=True):
            p.grad = grad.clone()
        theirs.step()
        run("adam", net, betas=betas)
    for a, e in zip(net["params"], params, strict=True):
        assert_close(a, e, dtype)
    assert {step.item() for step in net["steps"]} == {4}


# -- the kernels ----------------------------------------------------------------------------------------------------


@each_device
@each_op
def test_equals_reference(op: str, device: str) -> None:
    assert_same_step(op, *both(op, lambda: network(device=device)))


@each_device
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("without", ["emas", "copies"])
def test_sgd_without(without: str, nesterov: bool, device: str) -> None:
    actual, expected = both("sgd", lambda: network(device=device) | {without: None}, nesterov=nesterov)
    actual[without] = expected[without] = []
    assert_same_step("sgd", actual, expected)


@each_device
def test_adam_without_copies(device: str) -> None:
    actual, expected = both("adam", lambda: network(device=device) | {"copies": None})
    actual["copies"] = expected["copies"] = []
    assert_same_step("adam", actual, expected)


@each_device
@each_op
def test_copies_are_rounded_params(op: str, device: str) -> None:
    net = network(device=device)
    run(op, net)
    pairs = [(c, p) for c, p in zip(net["copies"], net["params"], strict=True) if c is not None]
    assert len(pairs) == 6
    for copy, p in pairs:
        assert_same_bits(copy, p.bfloat16())


@each_device
@pytest.mark.parametrize("step", [0, 1, 30, 10**6])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.9999)])
def test_adam_corrections(step: int, betas: tuple[float, float], device: str) -> None:
    """From exactly representable numbers, against Python's: at the first steps, where 1 - beta^t cancels, and late."""
    p, g, m, v = (torch.full((33,), x, device=device) for x in (0.0, 0.5, 0.25, 0.125))
    adam_([p], [g], [m], [v], [torch.tensor(float(step), device=device)], lr=1.0, betas=betas)
    m64, v64 = betas[0] * 0.25 + (1 - betas[0]) * 0.5, betas[1] * 0.125 + (1 - betas[1]) * 0.25
    m_hat, v_hat = m64 / (1 - betas[0] ** (step + 1)), v64 / (1 - betas[1] ** (step + 1))
    assert p.tolist() == pytest.approx([-m_hat / (math.sqrt(v_hat) + 1e-8)] * 33, rel=5e-7)


@each_device
@each_op
def test_more_tensors_than_a_launch_takes(op: str, device: str) -> None:
    shapes = [(1 + i % 5,) for i in range(300)]
    assert_same_step(op, *both(op, lambda: network(device=device, shapes=shapes)))


@each_device
@each_op
@pytest.mark.parametrize("margin", [64, 61, 3])
def test_writes_nothing_around_its_tensors(op: str, margin: int, device: str) -> None:
    """Margins also misalign the tensors."""
    checks = []

    def guard(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        inner, check = guarded(t, margin)
        checks.append(check)
        return inner

    plain = network(device=device)
    net = {name: [guard(t) for t in tensors] for name, tensors in plain.items()}
    grads = [g.clone() for g in net["grads"]]
    run(op, net)
    run(op, plain, impl="reference")
    assert_same_step(op, net, plain)
    for check in checks:
        check()
    for after, before in zip(net["grads"], grads, strict=True):
        assert_same_bits(after, before)


def sliced(t: Tensor) -> Tensor:
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": sliced,
}


@each_device
@each_op
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("odd", [None, "grads", "params", "copies"])
def test_layouts(op: str, layout: str, odd: str | None, device: str) -> None:
    """All streams in one layout, or one of them contiguous; beside them an entry that any layout suits."""
    shapes = [(4, 5, 3, 7), (3, 2, 5, 1), (11,)]

    def made() -> Net:
        net = network(device=device, shapes=shapes)
        net["copies"][0] = torch.zeros(shapes[0], dtype=torch.bfloat16, device=device)
        for name, tensors in net.items():
            change = LAYOUTS["contiguous" if name == odd else layout]
            net[name] = [change(t) if t is not None and t.dim() == 4 else t for t in tensors]
        return net

    contiguous = network(device=device, shapes=shapes)
    contiguous["copies"][0] = torch.zeros(shapes[0], dtype=torch.bfloat16, device=device)
    actual = made()
    strides = {name: [t.stride() for t in tensors if t is not None] for name, tensors in actual.items()}
    run(op, actual)
    run(op, contiguous, impl="reference")
    assert_same_step(op, actual, contiguous)
    assert strides == {name: [t.stride() for t in tensors if t is not None] for name, tensors in actual.items()}


@each_device
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_decay_0_copies_and_decay_1_keeps(impl: str, device: str) -> None:
    for decay, source in ((0.0, "params"), (1.0, "emas")):
        net = network(device=device)
        if decay == 0:
            for i, ema in enumerate(net["emas"]):
                ema.fill_([math.nan, math.inf][i % 2])
        before = [e.clone() for e in net["emas"]]
        run("sgd", net, ema_decay=decay, impl=impl)
        for ema, old, p in zip(net["emas"], before, net["params"], strict=True):
            assert torch.equal(ema, p if source == "params" else old)


@each_device
@each_op
def test_entries_without_gradient_are_left_alone(op: str, device: str) -> None:
    def made() -> Net:
        net = network(device=device)
        net["grads"][1] = net["grads"][5] = None
        return net

    before, (actual, expected) = made(), both(op, made)
    assert_same_step(op, actual, expected)
    for name in STREAMS[op]:
        for i in (1, 5):
            if name != "grads" and before[name][i] is not None:
                assert_same_bits(actual[name][i], before[name][i])
    without = network(device=device) | {"grads": [None] * len(SHAPES)}
    run(op, without)
    assert all(torch.equal(a, b) for a, b in zip(without["params"], network(device=device)["params"], strict=True))


@each_op
def test_no_tensors_at_all(op: str) -> None:
    run(op, {name: [] for name in STREAMS[op]})


@each_device
@each_op
def test_numbers_as_tensors(op: str, device: str) -> None:
    numbers = {"lr": 0.03} | ({"momentum": 0.8, "ema_decay": 0.6} if op == "sgd" else {})
    for impl in ("auto", "reference"):
        actual, expected = network(device=device), network(device=device)
        run(op, actual, impl=impl, **{name: torch.tensor(value, device=device) for name, value in numbers.items()})
        run(op, expected, impl=impl, **numbers)
        for name in STREAMS[op]:
            for a, e in zip(actual[name], expected[name], strict=True):
                assert a is e is None or torch.equal(a, e)


@each_device
@each_op
def test_not_a_number_stays_where_it_is(op: str, device: str) -> None:
    def made() -> Net:
        net = network(device=device, shapes=[(70,)])
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            net["grads"][0][i] = value
        return net

    actual, expected = both(op, made)
    for name in ("params", "emas", "momentum_buffers", "exp_avgs", "exp_avg_sqs"):
        a, e = actual[name][0], expected[name][0]
        torch.testing.assert_close(a, e, rtol=2**-20, atol=2**-20, equal_nan=True)
        assert a[3:].isfinite().all()
    assert not actual["params"][0][:3].isfinite().any()


@each_op
def test_thread_count_changes_nothing(op: str) -> None:
    shapes = [(300_007,), (3,), (5, 7), (0,), (100_003,)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(network(shapes=shapes))
            run(op, results[-1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in STREAMS[op]:
            for a, e in zip(other[name], results[0][name], strict=True):
                assert a is e is None or torch.equal(a, e)


# -- in torch's company ---------------------------------------------------------------------------------------------


@each_op
def test_weights_that_require_gradients(op: str) -> None:
    """They stay leaves, no graph is recorded, and autograd sees that what it saved is gone."""
    net = network(shapes=[(3, 4)])
    expected = network(shapes=[(3, 4)])
    p = net["params"][0].requires_grad_()
    loss = (p**2).sum()
    run(op, net)
    run(op, expected)
    assert p.is_leaf and p.requires_grad and torch.equal(p, expected["params"][0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_op
def test_inference_mode(op: str) -> None:
    with torch.inference_mode():
        assert_same_step(op, *both(op, network))


def op_arguments(op: str, device: str) -> tuple[Any, ...]:
    net = network(device=device, shapes=[(3, 5), (2, 3, 5, 7), (4,)])
    copies = [c for c in net["copies"] if c is not None]
    if op == "adam":
        streams = (net[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"))
        return *streams, copies, [1, 2], net["steps"], torch.tensor(0.01), 0.5, 0.99, 1e-8
    streams = (net[name] for name in ("params", "grads", "momentum_buffers", "emas"))
    numbers = [torch.tensor(x) for x in (0.05, 0.9, 0.75)]
    return *streams, copies, [1, 2], [0.1, 0.0, 0.1], *numbers, True


@each_device
@each_op
def test_opcheck(op: str, device: str) -> None:
    registered = {"sgd": torch.ops.puat_fast.sgd_ema_, "adam": torch.ops.puat_fast.adam_}[op]
    torch.library.opcheck(registered.default, op_arguments(op, device))


@each_device
@each_op
def test_compiles_without_graph_break(op: str, device: str) -> None:
    net = network(device=device, shapes=[(3, 4)])
    names = [name for name in STREAMS[op] if name != "copies"]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        run(op, {name: [t * 1.0] for name, t in zip(names, tensors, strict=True)} | {"copies": None})
        lists = {name: [t] for name, t in zip(names, tensors, strict=True)}
        run(op, lists | {"copies": None})
        return tuple(t + 1.0 for t in tensors)

    check_compiles(step, [net[name][0] for name in names])


# -- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    def test_kernels_are_built(self) -> None:
        assert hasattr(_C, "sgd_ema_cuda") and hasattr(_C, "adam_cuda"), "puat_fast was built without a CUDA compiler"

    @each_op
    def test_one_launch(self, op: str) -> None:
        """For 120 tensors; what counts Adam's steps is torch's."""
        net = network(device="cuda", shapes=[(5, 7)] * 120)
        run(op, net)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            run(op, net)
            torch.cuda.synchronize()
        kernels = [e.name for e in prof.events() if "update_kernel" in e.name]
        assert len(kernels) == 1, [e.name for e in prof.events()]

    @each_op
    def test_captured_graph(self, op: str) -> None:
        """Numbers that stand on the device may change from replay to replay."""
        numbers = {"sgd": ("lr", "momentum", "ema_decay"), "adam": ("lr",)}[op]

        def inputs(seed: int) -> list[Any]:
            net = network(seed, device="cuda")
            net["copies"] = [torch.zeros_like(p, dtype=torch.bfloat16) for p in net["params"]]
            values = [torch.tensor(0.1 * (seed + 1 + i), device="cuda") for i in range(len(numbers))]
            return [net[name] for name in STREAMS[op]] + values

        def step(*given: Any) -> list[Tensor]:
            lists = given[: -len(numbers)]
            values = dict(zip(numbers, given[-len(numbers) :], strict=True))
            run(op, dict(zip(STREAMS[op], lists, strict=True)), **values)
            return [t for tensors in lists for t in tensors]

        check_captured(step, inputs)

    @each_op
    def test_hundred_repeats(self, op: str) -> None:
        def step() -> list[Tensor]:
            net = network(device="cuda")
            run(op, net)
            return [t for name in STREAMS[op] for t in net[name] if t is not None]

        check_repeats(step)

    @each_op
    def test_side_stream(self, op: str) -> None:
        net, expected = network(device="cuda"), network(device="cuda")
        fresh = network(seed=1, device="cuda")["grads"]
        run(op, expected | {"grads": fresh})
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for grad, value in zip(net["grads"], fresh, strict=True):
                grad.copy_(value)
            run(op, net)
        stream.synchronize()
        for a, e in zip(net["params"], expected["params"], strict=True):
            assert_same_bits(a, e)

    @each_op
    def test_mixed_devices_are_named(self, op: str) -> None:
        net = network(device="cuda", shapes=[(3,), (4,)])
        net["grads"][1] = net["grads"][1].cpu()
        with pytest.raises(ValueError, match=r"grads\[1\]: expected .*on cuda:0 .*on cpu"):
            run(op, net)
        with pytest.raises(ValueError, match=r"lr: expected a 0-d tensor, torch.float32, on cuda:0, got .*on cpu"):
            run(op, network(device="cuda"), lr=torch.tensor(0.1))
