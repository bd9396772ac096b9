"""What a step computes, counted: no gradient that nobody reads, one pass of D and of C where calls are batched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fast_cases import PRESETS, batch_for, compiled, new_engine, whole_config
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from puat_fast.engine.step import Engine
from puat_fast.methods import Phase
from puat_fast.networks.layers import Compiled

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten


class Work(TorchDispatchMode):
    """Convolutions by phase: forwards, and the gradients to input and weight that were asked for."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.phase, self.counts = "other", Counter[tuple[str, str]]()
        update = engine._update

        def in_phase(phase: Phase, *args: Any) -> None:
            self.phase = phase.net
            update(phase, *args)
            self.phase = "other"

        engine._update = in_phase  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func: Any, args: Any) -> None:
        if func is aten.convolution.default:
            self.counts[self.phase, "forward"] += 1
        if func is aten.convolution_backward.default:
            for kind, wanted in zip(("input", "weight"), args[-1], strict=False):
                self.counts[self.phase, kind] += wanted


class Graphs:
    """A backend that runs the graphs that a generator of code is given, and counts what is in them when they run."""

    def __init__(self) -> None:
        self.work: Work | None = None
        self.backend = aot_autograd(fw_compiler=self.compiler, bw_compiler=self.compiler)

    def compiler(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            for node in graph.graph.nodes if self.work is not None else ():
                self.work.count(node.target, node.args)
            return graph.forward(*args)

        return make_boxed_func(run)


def convolutions(net: nn.Module) -> int:
    return sum(p.dim() == 4 for p in net.parameters())


class Maker:
    """Engines of stage 2 in which all terms count; kind "traced": forward and backward as torch.compile cuts them."""

    def __init__(self, kind: str, patch: pytest.MonkeyPatch) -> None:
        self.kind, self.graphs, real = kind, Graphs(), torch.compile
        torch._dynamo.reset()
        patch.setattr(
            torch,
            "compile",
            lambda f, fullgraph, dynamic, options: real(
                f, fullgraph=fullgraph, dynamic=dynamic, backend=self.graphs.backend
            ),
        )

    def engine(self, preset: str, **fast: bool) -> Engine:
        config = whole_config(preset, schedule={"adv_start": 0}, attack={"num_steps": 2})
        return new_engine(
            config if self.kind == "eager" else compiled(config, **fast | {"compile": self.kind == "traced"})
        )

    def work_of(self, engine: Engine) -> Counter[tuple[str, str]]:
        """Of the second step: the first one compiles."""
        engine.step(batch_for(engine, 0))
        batch, self.graphs.work = batch_for(engine, 1), Work(engine)
        with nullcontext() if self.kind == "traced" else self.graphs.work:
            engine.step(batch)
        return self.graphs.work.counts


@pytest.fixture(params=["eager", "short cuts", "traced"])
def maker(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    yield Maker(request.param, monkeypatch)
    torch._dynamo.reset()


@pytest.mark.parametrize("preset", PRESETS)
def test_weight_gradients(preset: str, maker: Maker) -> None:
    """Those of the network that is trained, once for each forward with a graph; PGD and all others: none."""
    if maker.kind == "traced" and preset != "paper":
        pytest.skip("the same graphs")
    engine = maker.engine(preset)
    counts, nets = maker.work_of(engine), engine.nets
    of_c = convolutions(nets.C)
    batched = maker.kind != "eager"
    assert counts["D", "weight"] == 2 * convolutions(nets.D) * (1 if batched else 3)  # two updates of three calls
    assert counts["G", "weight"] == convolutions(nets.G)
    assert counts["A", "weight"] == convolutions(nets.A)
    assert counts["C", "weight"] == 4 * of_c  # x_uae, x_l, x_u, x_rae
    # beyond them, gradients that pass through: two steps of PGD in C; through C and G in A; through D in G
    assert counts["C", "input"] - 4 * (of_c - 1) == 2 * of_c
    assert counts["A", "input"] >= of_c + convolutions(nets.G)


def test_the_official_waste_is_counted(maker: Maker) -> None:
    """Without the short cut the same counter sees the gradients of C, G and D that A's and G's updates throw away."""
    if maker.kind != "short cuts":
        pytest.skip("the eager engine always spares them, and traced ones are above")
    engine = maker.engine("paper", skip_weight_grads=False)
    counts, nets = maker.work_of(engine), engine.nets
    assert counts["A", "weight"] == sum(convolutions(net) for net in (nets.A, nets.G, nets.C))
    assert counts["G", "weight"] == convolutions(nets.G) + convolutions(nets.D)


class Passes:
    """How often each network's core runs, with how many images, by phase."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str, int]] = []
        names, phase = {id(net): name for name, net in engine.nets.items()}, ["other"]
        core, update = Compiled.core, engine._update

        def watched(net: Compiled, *inputs: torch.Tensor) -> torch.Tensor:
            self.seen.append((phase[0], names[id(net)], len(inputs[0])))
            return core(net, *inputs)

        def in_phase(given: Phase, *args: Any) -> None:
            phase[0] = given.net
            update(given, *args)

        patch.setattr(Compiled, "core", watched)
        patch.setattr(engine, "_update", in_phase)

    def of(self, phase: str, net: str) -> list[int]:
        return [n for p, name, n in self.seen if (p, name) == (phase, net)]


@pytest.mark.parametrize("batch_labels", [True, False])
@pytest.mark.parametrize("batch_disc", [True, False])
def test_passes(batch_disc: bool, batch_labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four, half of them unlabelled for D, two D updates."""
    config = compiled(whole_config(schedule={"adv_start": 0}), batch_disc=batch_disc, batch_labels=batch_labels)
    engine = new_engine(config)
    passes = Passes(engine, monkeypatch)
    engine.step(batch_for(engine, 0))
    assert passes.of("D", "D") == ([12, 12] if batch_disc else [4] * 6)
    assert passes.of("D", "C") == ([12] if batch_labels else [2, 4, 2, 4])
    assert passes.of("G", "D") == passes.of("C", "D") == [4]
    assert passes.of("A", "C") == [4] and len(passes.of("C", "C")) == 4 + config.attack.num_steps
