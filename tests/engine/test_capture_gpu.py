"""A whole step as one CUDA graph, on a GPU: the graphs' numbers are those of the same engine without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import lasting
from fast_cases import Terms, assert_same_terms, batch_for, compiled, new_engine, run_steps, whole_config
from op_checks import NO_CUDA
from tiny_cases import equal_state, run_config, tiny_dataset
from torch import Tensor

from puat_fast.engine import capture
from puat_fast.engine.step import Engine
from puat_fast.engine.trainer import Trainer
from puat_fast.runlog import read_metrics
from puat_fast.testing import step_terms

pytestmark = [pytest.mark.gpu, NO_CUDA]

STEPS = 10  # of each stage; ten an epoch, so that the ramps move slowly


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """torch's own kernels in an order that does not vary: bilinear upsampling's backward, cuDNN's choices."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.benchmark, cudnn.deterministic = before[1:]


def engine_on_gpu(
    graph: bool, stage: int = 1, preset: str = "paper", generated: bool = False, **overrides: Any
) -> Engine:
    """generated: by torch.compile, which takes long; what a graph holds and how it is run does not depend on it."""
    values = {"precision": "fp32", "schedule": {"adv_start": 0, "adv_end": 1}} | overrides
    config = compiled(whole_config(preset, **values), compile=generated, graph=graph)
    engine = new_engine(config, stage, steps_per_epoch=STEPS, device="cuda")
    assert (engine.graphs is not None) == graph and engine.off == {}
    return engine


def recordings(engine: Engine) -> int:
    assert engine.graphs is not None, engine.off
    return sum(slot.replay is not None for slot in engine.graphs._slots.values())


def take_over(ours: Engine, theirs: Engine) -> None:
    """The state of `theirs`, written into the memory of `ours`, which its graphs hold on to."""
    with torch.no_grad():
        source = lasting(theirs)
        for name, t in lasting(ours).items():
            t.copy_(source[name])
    ours.noise.load_state_dict(theirs.noise.state_dict())


@pytest.mark.parametrize(("preset", "generated"), [("paper", True), ("official-v1", False)])
def test_captured_and_not(preset: str, generated: bool) -> None:
    """Twenty steps, both stages, each from the same state: no step can hide in the chaos of the next ones."""
    plain, ours = (engine_on_gpu(graph, preset=preset, generated=generated) for graph in (False, True))
    for stage in (1, 2):
        for i in range(STEPS):
            if i:
                take_over(ours, plain)
            batch = batch_for(plain, 100 * stage + i)
            expected = step_terms(plain, copy.deepcopy(batch))
            assert_same_terms([step_terms(ours, batch)], [expected], rel=1e-4, abs_=1e-6)
        assert recordings(ours) == stage
        for engine in (plain, ours):
            engine.end_epoch()
            if stage == 1:
                engine.begin_stage2()


def test_each_replay_draws_anew() -> None:
    """The same weights and images, and another z each time: the stream goes on, as without graphs."""
    plain, ours = (engine_on_gpu(graph, stage=2, optim={"lr": 0.0}, gan={"lr": 0.0}) for graph in (False, True))
    seen: list[Terms] = []
    batch = batch_for(ours, 0)
    for _ in range(capture.WARMUP + 3):
        seen.append(step_terms(ours, copy.deepcopy(batch)))
        step_terms(plain, copy.deepcopy(batch))
        assert torch.equal(ours.noise.generator.get_state(), plain.noise.generator.get_state())
    assert recordings(ours) == 1
    fakes = [value for terms in seen for value in terms["D/fake_g"]]
    assert len(set(fakes)) == len(fakes)


def test_resumed_midway(tmp_path: Path) -> None:
    """The same bits as never having stopped, although the steps after it are warm-up steps there and replays here."""
    whole, first = engine_on_gpu(True, stage=2), engine_on_gpu(True, stage=2)
    run_steps(whole, STEPS)
    run_steps(first, 5)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = engine_on_gpu(True, stage=2)
    run_steps(second, 4, seed=50)  # recordings of its own, of memory that is given up
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run_steps(second, 5, seed=5)
    assert recordings(whole) == recordings(second) == 1
    assert equal_state(second.state_dict(), whole.state_dict())


def test_replays_wait_for_nothing() -> None:
    """torch's own check: no operation of a step, replayed or not, makes the host wait."""
    engine = engine_on_gpu(True, stage=2)
    for i in range(capture.WARMUP + 2):
        engine.step(batch_for(engine, i))
    batch = batch_for(engine, 0)
    assert recordings(engine) == 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_failed_capture_goes_on_without() -> None:
    """The draws go on too: a capture that failed leaves torch's generators in capture."""
    plain, ours = (engine_on_gpu(graph, stage=2) for graph in (False, True))
    said: list[str] = []
    ours.say, report = said.append, ours.method.report  # type: ignore[attr-defined]

    def reads(name: str, value: Tensor) -> None:
        if name == "G/loss" and torch.cuda.is_current_stream_capturing():
            value.item()
        report(name, value)

    ours.method.report = reads  # type: ignore[attr-defined]
    expected = run_steps(plain, capture.WARMUP + 3)
    assert_same_terms(run_steps(ours, capture.WARMUP + 3), expected, rel=1e-3, abs_=1e-5)
    assert ours.graphs is None and len(said) == 1 and said[0].startswith("CUDA graph off: ")
    torch.rand(3, device="cuda")  # the default generator is free as well


def test_two_epochs(tmp_path: Path) -> None:
    """The trainer as users start it: `engine: auto` is compiled, bf16 and captured, and the losses are finite."""
    config = run_config(tmp_path / "run", device="cuda", schedule={"epochs": 2, "steps_per_epoch": 8})
    trainer = Trainer(config, dataset=tiny_dataset())
    run = trainer.fit()
    assert trainer.engine.off == {} and recordings(trainer.engine) >= 2
    assert trainer.engine.description.startswith("engine: compiled, bf16, ")
    assert [(r["stage"], r["epoch"]) for r in read_metrics(run.path)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
