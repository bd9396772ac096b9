"""`engine: compiled` where torch.compile is not the point: how often it may compile, and what happens without it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fast_cases import both_stages, compiled, new_engine, run_steps, whole_config

from puat_fast.engine import compiling
from puat_fast.engine.step import fast_paths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces forward and backward, and generates no code: seconds instead of minutes."""
    real = torch.compile

    def traces(function: Any, *, fullgraph: bool, dynamic: bool, options: dict[str, Any]) -> Any:
        assert options == compiling.OPTIONS
        return real(function, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traces)


def test_engines_of_many_sizes(monkeypatch: pytest.MonkeyPatch, traced_only: None) -> None:
    """Dynamo's limit is of a function, whosever network it is: a sweep over sizes must not use it up."""
    monkeypatch.setattr(compiling, "MODES_OF_A_NETWORK", 1)
    monkeypatch.setattr(compiling, "_networks", itertools.count(1))
    config = whole_config(method="regular")
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for width in (1, 2, 3):
            config.classifier.width = width
            run_steps(new_engine(compiled(config, compile=True)), 1)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with the short cuts that need none, and one line that says why."""
    monkeypatch.setattr(compiling, "why_not", lambda device: "no C++ compiler: none of g++, clang++ is here")
    config = compiled(whole_config(), compile=True)
    engine = new_engine(config)
    assert engine.off["compile"] == "no C++ compiler: none of g++, clang++ is here" and not engine.fast.compile
    assert all(net.compiled is None for _, net in engine.nets.items()) and engine.fast.batch_disc
    text = engine.description
    assert "\n" not in text and "compile off: no C++ compiler: none of g++, clang++ is here" in text
    expected = run_steps(new_engine(compiled(whole_config())), 1)
    assert run_steps(engine, 1) == expected


def test_why_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def missing() -> str:
        raise RuntimeError("InvalidCxxCompiler:\n  No working C++ compiler found in " + 200 * "x")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    compiling.why_not.cache_clear()
    reason = compiling.why_not("cpu")
    compiling.why_not.cache_clear()
    assert reason is not None and reason.startswith("no C++ compiler: InvalidCxxCompiler: No working")
    assert "\n" not in reason and len(reason) < 150


def test_graphs_are_of_gpus() -> None:
    fast, off = fast_paths(compiled(whole_config(), graph=True), torch.device("cpu"))
    assert not fast.graph and off == {"graph": "CUDA graphs are of GPUs, the device is cpu"}
    assert fast_paths(compiled(whole_config(), graph=True), torch.device("cuda"))[0].graph


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto(device: str) -> None:
    """Compiled on a GPU, eager on the CPU."""
    assert fast_paths(whole_config(), torch.device(device))[0].batch_disc == (device == "cuda")


def test_an_engine_traced_gives_the_same(traced_only: None) -> None:
    """Forward and backward as autograd's tracer writes them, both stages."""
    config = whole_config(precision="fp64", pretrain={"epochs": 1}, schedule={"adv_start": 0})
    expected = both_stages(new_engine(config, stage=1), (1, 2))
    actual = both_stages(new_engine(compiled(config, compile=True), stage=1), (1, 2))
    for ours, theirs in zip(actual, expected, strict=True):
        assert {n: pytest.approx(v, rel=1e-9, abs=1e-12) for n, v in theirs.items()} == ours
