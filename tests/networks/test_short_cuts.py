"""`fast.*` in the networks: each short cut against the plain path, values, gradients and buffers, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from fast_cases import assert_same_tensors, buffers, gradients
from torch import Tensor, nn

from puat_fast.config import FastConfig
from puat_fast.networks import Networks, layers
from puat_fast.networks.classifier import Block, Classifier
from puat_fast.networks.discriminator import Call, Discriminator, DownBlock
from puat_fast.networks.generator import CBNBlock, Generator
from puat_fast.networks.layers import (
    SNConv2d,
    batch_norms,
    fits_one_pass,
    frozen_running_stats,
    normalised_per_call,
)

F64 = torch.float64
TOLERANCE = 1e-12  # of the largest entry of a tensor
K = 4

Run = Callable[[nn.Module, Sequence[Tensor]], Tensor | Sequence[Tensor]]


def double(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64, its running statistics, gains and biases away from their initial values."""
    torch.manual_seed(seed)
    module = make().to(F64).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for norm in batch_norms(module):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
            for p in norm.parameters():
                p.uniform_(0.5, 1.5)
    return module


def everything(module: nn.Module, run: Run, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs, the gradients of a fixed function of them to inputs and weights, and the buffers afterwards."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    outputs = run(module, leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator, dtype=F64)).sum() for o in outputs).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {f"grad {k}": g for k, g in gradients(module).items()} | buffers(module)


def assert_same(plain: nn.Module, switch: Callable[[nn.Module], None], run: Run, *inputs: Tensor) -> None:
    """A copy of `plain`, switched, gives the same."""
    fast = copy.deepcopy(plain)
    switch(fast)
    expected, actual = everything(plain, run, inputs), everything(fast, run, inputs)
    assert any(float(g.abs().max()) > 1e-3 for name, g in expected.items() if name.startswith("grad"))
    assert_same_tensors(actual, expected, TOLERANCE)


def images(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


# -- D: pool_conv, commute ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(8, 8), (2, 6), (5, 7)], ids=str)
def test_convolution_and_pool_as_one(size: tuple[int, int], training: bool) -> None:
    conv = double(lambda: SNConv2d(3, 5, 3, gain=1.0)).train(training)
    x = images(2, 3, *size)
    fast = copy.deepcopy(conv)
    plain = everything(conv, lambda m, xs: m.pooled(xs[0], as_one=False), [x])
    assert_same_tensors(everything(fast, lambda m, xs: m.pooled(xs[0], as_one=True), [x]), plain, TOLERANCE)
    assert plain["output 0"].shape == (2, 5, size[0] // 2, size[1] // 2)


@pytest.mark.parametrize("as_one", [False, True], ids=["two", "one"])
def test_pooled_divides_each_call_by_its_own_sigma(as_one: bool) -> None:
    conv = double(lambda: SNConv2d(3, 5, 3, gain=1.0))
    one_by_one = copy.deepcopy(conv)
    sizes = [2, 0, 3]

    def together(m: nn.Module, xs: Sequence[Tensor]) -> Tensor:
        with normalised_per_call(m, sizes, {}):
            return m.pooled(torch.cat(list(xs)), as_one)

    def apart(m: nn.Module, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.avg_pool2d(m(x), 2) for x in xs])

    xs = [images(n, 3, 8, 8, seed=n) for n in sizes]
    expected = everything(one_by_one, apart, xs)
    assert_same_tensors(everything(conv, together, xs), expected, TOLERANCE)
    assert conv._ready is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("names", [("pool_conv",), ("commute",), ("pool_conv", "commute")], ids="+".join)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_down_block(first: bool, names: Sequence[str], training: bool) -> None:
    block = double(lambda: DownBlock(4, 6, first)).train(training)
    assert_same(
        block, lambda m: [setattr(m, name, True) for name in names], lambda m, xs: m(xs[0]), images(3, 4, 8, 12)
    )


# -- D: its calls in one pass ---------------------------------------------------------------------------------------


def batched(D: nn.Module) -> None:
    D.batched = True


def y_of(n: int) -> Tensor:
    return torch.arange(n) * 7 % K


CALLS: dict[str, list[tuple[int, bool]]] = {  # images, whether for one class each
    "of a D update": [(3, True), (3, True), (3, False)],
    "unequal sizes": [(1, True), (5, False), (2, True)],
    "all classes twice": [(2, False), (3, False)],
    "one": [(3, True)],
    "one for all classes": [(3, False)],
    "one without images": [(3, True), (0, True), (0, False), (2, False)],
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("per_class", [False, True], ids=["one lookup", "K lookups"])
@pytest.mark.parametrize("calls", CALLS)
def test_scores(calls: str, per_class: bool, training: bool) -> None:
    D = double(lambda: Discriminator(K, 8, per_class)).train(training)
    kinds = CALLS[calls]

    def arguments(xs: Sequence[Tensor]) -> list[Call]:
        return [(x, y_of(n) if one else None) for x, (n, one) in zip(xs, kinds, strict=True)]

    def apart(m: nn.Module, xs: Sequence[Tensor]) -> list[Tensor]:
        return [m(x, y) for x, y in arguments(xs)]

    xs = [images(n, 3, 32, 32, seed=i).sigmoid() for i, (n, _) in enumerate(kinds)]
    fast = copy.deepcopy(D)
    batched(fast)
    before = buffers(D)
    expected = everything(D, apart, xs)
    assert_same_tensors(everything(fast, lambda m, xs: m.scores(*arguments(xs)), xs), expected, TOLERANCE)
    assert [tuple(expected[f"output {i}"].shape) for i in range(len(xs))] == [(n, 1 if one else K) for n, one in kinds]
    moved = {name for name, b in buffers(fast).items() if not torch.equal(b, before[name])}
    assert moved == (set(before) - {"linear.u"} if training else set())  # of one row: u is 1 or -1
    assert all(layer._ready is None for layer in fast.modules() if hasattr(layer, "_ready"))


def test_scores_not_batched_are_the_calls() -> None:
    D = double(lambda: Discriminator(K, 8))
    twin, xs = copy.deepcopy(D), [images(2, 3, 32, 32, seed=i) for i in range(2)]
    with torch.no_grad():
        apart = [twin(xs[0], y_of(2)), twin(xs[1])]
        for ours, theirs in zip(D.scores((xs[0], y_of(2)), (xs[1], None)), apart, strict=True):
            assert torch.equal(ours, theirs)


def test_scores_make_one_pass_when_batched() -> None:
    D, seen = double(lambda: Discriminator(K, 8)), []
    D.blocks.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    calls = [(images(n, 3, 32, 32), y_of(n)) for n in (2, 3)]
    D.scores(*calls)
    batched(D)
    D.scores(*calls)
    assert seen == [2, 3, 5]


def test_scores_without_gradients_advance_the_iterations() -> None:
    """u and v move under no_grad as well, as old-style spectral norm does."""
    D = double(lambda: Discriminator(K, 8, per_class_lookup=True))
    twin = copy.deepcopy(D)
    batched(D)
    x, y = images(2, 3, 32, 32), y_of(2)
    with torch.no_grad():
        D.scores((x, y), (x, None))
        twin(x, y), twin(x)
    assert_same_tensors(buffers(D), buffers(twin), TOLERANCE)


# -- G and A: commute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("upsample", [True, False])
def test_cbn_block(upsample: bool, training: bool) -> None:
    block = double(lambda: CBNBlock(3, 5, K, upsample)).train(training)
    assert_same(
        block, lambda m: setattr(m, "commute", True), lambda m, xs: m(xs[0], y_of(3)), images(3, 3, 4, 6)
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generator(training: bool) -> None:
    def switch(G: nn.Module) -> None:
        for block in G.blocks:
            block.commute = True

    G = double(lambda: Generator(K, z_dim=5, width=8)).train(training)
    z = torch.randn(3, 5, dtype=F64)
    fast = copy.deepcopy(G)
    switch(fast)
    run: Run = lambda m, xs: m(xs[0], y_of(3))  # noqa: E731
    expected, actual = everything(G, run, [z]), everything(fast, run, [z])
    no_scale = {f"grad blocks.{i}.{name}.bias" for i in range(3) for name in ("conv1", "conv2", "shortcut")}
    for found in (expected, actual):  # true gradient 0 in train mode: nothing to compare the rounding with
        for name in no_scale if training else ():
            assert float(found.pop(name).abs().max()) < 1e-12
    assert_same_tensors(actual, expected, TOLERANCE)


# -- C: fold_bn -----------------------------------------------------------------------------------------------------


def fold(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, Block):
            m.fold_bn = True


BLOCKS = {"stride 1": (6, 6, 1), "stride 1, shortcut": (4, 6, 1), "stride 2, shortcut": (4, 6, 2)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("shape", BLOCKS)
def test_block(shape: str, residual: bool, training: bool) -> None:
    """Gradients to x, to the residual and to every weight, those of the folded BatchNorm among them."""
    channels_in, channels_out, stride = BLOCKS[shape]
    block = double(lambda: Block(channels_in, channels_out, stride)).train(training)
    xs = [images(2, channels_in, 8, 8, seed=i) for i in range(2 if residual else 1)]
    before = buffers(block)
    assert_same(block, fold, lambda m, xs: m(*xs), *xs)
    unmoved = all(torch.equal(b, before[name]) for name, b in buffers(block).items())
    assert unmoved == (not training)


def test_a_folded_block_is_one_convolution_less_to_normalise() -> None:
    """In eval mode BN1 is not run; in train mode it is: the switch does something, and only there."""
    block, seen = double(lambda: Block(4, 6, 2)), []
    plain = block.batchnorm_1.silu
    block.batchnorm_1.silu = lambda *args: (seen.append(block.training), plain(*args))[1]
    fold(block)
    for training in (True, False):
        block.train(training)(images(2, 4, 8, 8))
    assert seen == [True]


def test_classifier_in_eval_mode() -> None:
    C = double(lambda: Classifier(K, 10, 1, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))).eval()
    before = buffers(C)
    assert_same(C, fold, lambda m, xs: m(xs[0]), images(3, 3, 32, 32).sigmoid())
    assert all(torch.equal(b, before[name]) for name, b in buffers(C).items())


@pytest.mark.parametrize("frozen", [False, True])
def test_classifier_in_train_mode_is_unaffected(frozen: bool) -> None:
    """Bit for bit: there the batch's statistics normalise, which nothing can be folded into."""
    C = double(lambda: Classifier(K, 10, 1))
    fast, x = copy.deepcopy(C), images(3, 3, 32, 32).sigmoid()
    fold(fast)

    def run(m: nn.Module, xs: Sequence[Tensor]) -> Tensor:
        if not frozen:
            return m(xs[0])
        with frozen_running_stats(m):
            return m(xs[0])

    expected = everything(C, run, [x])
    for name, value in everything(fast, run, [x]).items():
        assert torch.equal(value, expected[name]), name


def test_folding_follows_the_running_statistics() -> None:
    """They change in every train-mode step: nothing folded may be kept."""
    C = double(lambda: Classifier(K, 10, 1))
    fold(C)
    x = images(3, 3, 32, 32).sigmoid()
    first = C.eval()(x)
    C.train()(x)
    second = C.eval()(x)
    twin = double(lambda: Classifier(K, 10, 1))
    twin.load_state_dict(C.state_dict())
    torch.testing.assert_close(second, twin.eval()(x), rtol=1e-12, atol=1e-12)
    assert (first - second).abs().max() > 1e-3


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pool_conv", "commute", "fold_bn", "batch_disc", "skip_weight_grads"])
def test_use_switches_one_and_back(name: str) -> None:
    torch.manual_seed(0)
    C = Classifier(K, 10, 1)
    nets = Networks(G=Generator(K, 5, 8), D=Discriminator(K, 8), C=C, A=nn.Module(), C_ema=copy.deepcopy(C))
    nothing = dict.fromkeys((n for n in vars(FastConfig())), False)

    def switches() -> dict[str, set[bool]]:
        found = {"batch_disc": {nets.D.batched}, "skip_weight_grads": {nets.skip_weight_grads}}
        modules = [m for _, net in nets.items() for m in net.modules()]
        for kind, names in ((DownBlock, ("pool_conv", "commute")), (CBNBlock, ("commute",)), (Block, ("fold_bn",))):
            for n in names:
                found[n] = found.get(n, set()) | {getattr(m, n) for m in modules if isinstance(m, kind)}
        return found

    nets.use(FastConfig(**nothing | {name: True}), None)
    assert {n for n, on in switches().items() if on == {True}} == {name}
    assert all(on == {n == name} for n, on in switches().items())
    nets.use(FastConfig(**nothing), None)
    assert all(on == {False} for on in switches().values())


@pytest.mark.parametrize("commute", [False, True])
def test_commute_moves_the_shortcuts(commute: bool) -> None:
    """To the smaller of the two images; the values are the same, so that only this shows the switch at work."""
    for block, args in (
        (double(lambda: DownBlock(4, 6, first=False)), ()),
        (double(lambda: CBNBlock(3, 5, K, upsample=True)), (y_of(2),)),
    ):
        seen: list[int] = []
        block.commute = commute
        block.shortcut.register_forward_hook(lambda m, inputs, out, seen=seen: seen.append(inputs[0].shape[2]))
        block(images(2, 4 if not args else 3, 8, 8), *args)
        assert seen == [(4 if commute else 8) if not args else (8 if commute else 16)]


@pytest.mark.parametrize("limit", [0, 32 * 2**20])
def test_passes_that_do_not_fit_stay_apart(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """On a CPU large maps come from the system anew each time: D's calls are then made one by one."""
    monkeypatch.setattr(layers, "MAPPED_ANEW", limit)
    torch.manual_seed(0)
    D, x = Discriminator(3, 8).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    D.batched = True
    passes = []
    D._core = lambda x, core=D._core: passes.append(len(x)) or core(x)
    D.scores((x, torch.tensor([0, 1])), (x, None))
    assert passes == ([2, 2] if limit == 0 else [4])
    assert fits_one_pass(10**6, 256, torch.empty(1, device="meta"))
