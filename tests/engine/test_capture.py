"""capture.py without a GPU: a step is safe to be captured, and recordings change no number and no order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import (
    CaptureLint,
    CaptureViolation,
    FailingRecorder,
    StrictRecorder,
    assert_same_calls,
    meta_engine,
    traced,
)
from fast_cases import PRESETS, Terms, batch_for, compiled, new_engine, run_steps, whole_config, with_device_scalars
from tiny_cases import equal_state, tiny_batch
from torch import Tensor

from puat_fast.data.batch import StepBatch
from puat_fast.engine import capture
from puat_fast.engine.capture import CaptureError, DeviceScalars, StepGraphs, tensors_of
from puat_fast.engine.step import Engine
from puat_fast.methods import Scalars

pytestmark = pytest.mark.usefixtures("one_thread")

# -- the lint, and the calls of a step ------------------------------------------------------------------------------


def calls_of(engine: Engine, seed: int, lint: CaptureLint | None = None) -> list[tuple[str, Any]]:
    """The calls of the next step, under the lint if there is one; not those that write the device scalars."""
    run, calls = engine._run, list[tuple[str, Any]]()

    def watched(*args: Any) -> Any:
        with nullcontext() if lint is None else lint:
            calls.extend(traced(engine, lambda: run(*args)))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_run", watched)
        engine.step(batch_for(engine, seed))
    return calls


RAMP = {"schedule": {"adv_start": 0, "adv_end": 1}}
AVERAGED = {"ema": {"bn": "average"}, "rae": {"init": "uniform", "bn": "eval"}, "pseudo": {"forward": "eval"}}
NO_UNLABELLED = {"data": {"use_unlabelled": False}, "rae": {"source": "labelled"}, "uae": {"share_z": True}}


@pytest.mark.parametrize(
    ("preset", "stage", "overrides"),
    [
        ("paper", 1, {}),
        ("paper", 2, {}),
        ("official-v1", 1, {}),
        ("official-v1", 2, {}),
        ("paper", 2, AVERAGED),
        ("paper", 2, NO_UNLABELLED),
        ("paper", 2, {"method": "regular"}),
    ],
)
def test_a_step_can_be_captured(preset: str, stage: int, overrides: dict[str, Any]) -> None:
    """Steps 2 and 3 pass the lint, and are the same calls of the same shapes, strides and numbers of the host.

    Although rates and ramps are others. The first step makes states and tables: warm-up steps are there for that.
    """
    engine = meta_engine(preset, stage, **RAMP | overrides)
    calls_of(engine, 0)
    second, s = calls_of(engine, 1, CaptureLint("meta")), engine.last_scalars
    assert_same_calls(calls_of(engine, 2, CaptureLint("meta")), second)
    assert engine.last_scalars != s and len(second) > 50


def test_numbers_of_the_host_would_be_seen() -> None:
    """Without device scalars the teacher's decay is a constant of the graph: the test above can fail."""
    engine = meta_engine("paper", method="regular")
    engine.device_scalars = None
    calls_of(engine, 0)
    second = calls_of(engine, 1)
    with pytest.raises(AssertionError, match="was recorded"):
        assert_same_calls(calls_of(engine, 2), second)


@pytest.fixture(scope="module")
def regular() -> Engine:
    """An engine on the meta device past its first step; of the method whose steps are short."""
    engine = meta_engine("paper", method="regular")
    engine.step(batch_for(engine, 0))
    return engine


def lint_step(engine: Engine, reported: Callable[[Tensor], Any]) -> None:
    """A step under the lint in which `reported` is given every term."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.method, "report", lambda name, value: reported(value))
        calls_of(engine, 1, CaptureLint("meta"))


class Host:
    """Data of the host, made before the step."""

    vector, number = torch.zeros(2), torch.tensor(2.0)


VIOLATIONS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda v: v.item(),
    "float": float,
    "truth": lambda v: bool(v > 0),
    "nonzero": lambda v: v.view(1).nonzero(),
    "mask": lambda v: v.view(1)[v.view(1) > 0],
    "masked_select": lambda v: v.view(1).masked_select(v.view(1) > 0),
    "unique": lambda v: v.view(1).unique(),
    "equal": lambda v: torch.equal(v, v),
    "a list to the device": lambda v: torch.tensor([1.0, 2.0], device=v.device),
    "a number to the device": lambda v: torch.tensor(1.0, device=v.device),
    "a host tensor to the device": lambda v: Host.vector.to(v.device),
    "a host number to the device": lambda v: Host.number.to(v.device),
    "copied into the device's": lambda v: torch.empty(2, device=v.device).copy_(Host.vector),
    "a number copied into it": lambda v: v.clone().copy_(Host.number),
    "numpy": lambda v: torch.from_numpy(np.zeros(2)).to(v.device),
    "to the host": lambda v: v.cpu(),
    "index of the host": lambda v: v.expand(3)[torch.tensor([0, 1])],
    "vector of the host": lambda v: v + Host.vector,
    "number of the host in a product": lambda v: torch.stack([v, Host.number]),
    "dropout": lambda v: torch.nn.functional.dropout(v),
    "a draw": lambda v: torch.randn(3, device=v.device),
    "new_tensor": lambda v: v.new_tensor([1.0, 2.0]),
    "permutation": lambda v: torch.randperm(3, device=v.device),
    "synchronize": lambda v: torch.cuda.synchronize(),
    "empty_cache": lambda v: torch.cuda.empty_cache(),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_lint_finds(regular: Engine, name: str) -> None:
    with pytest.raises(CaptureViolation):
        lint_step(regular, VIOLATIONS[name])


def test_the_lint_passes_what_goes_by_value(regular: Engine) -> None:
    """Numbers in elementwise ops are arguments of a launch; what is filled on the device is not copied."""

    def harmless(v: Tensor) -> None:
        v * 2.0 + torch.tensor(0.5) * v + Host.number
        torch.full((2,), 3.0, device=v.device), v.new_zeros(3), torch.arange(4, device=v.device)
        torch.where(v > 0, v, 0.0)

    lint_step(regular, harmless)


def test_the_lint_leaves_torch_as_it_was(regular: Engine) -> None:
    before = torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.cuda.synchronize
    lint_step(regular, lambda v: None)
    assert (torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.cuda.synchronize) == before


def test_the_rate_of_c_is_read_on_the_device(regular: Engine) -> None:
    """That of Adam is a tensor of the host which goes by value: it never changes."""
    on_device = regular.optimizers["C"].on_device  # type: ignore[attr-defined]
    assert len(on_device) == 3 and all(isinstance(t, Tensor) and t.device.type == "meta" for t in on_device)


# -- StepGraphs, by itself ------------------------------------------------------------------------------------------


class Adder:
    """A recorder, and a step that adds up what it is given: counts how it was run."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.total = torch.zeros(())
        self.batches: list[StepBatch] = []

    def run(self, batch: StepBatch) -> dict[str, list[Tensor]]:
        self.batches.append(batch)
        self.total += batch.C.x_l.sum()
        return {"total": [self.total.clone()]}

    def aside(self, run: Any, batch: StepBatch) -> Any:
        self.log.append("aside")
        return run(batch)

    def record(self, run: Any, batch: StepBatch) -> Any:
        self.log.append("record")
        terms: dict[str, list[Tensor]] = {}
        return lambda: (self.log.append("replay"), terms.update(run(batch))), terms


def test_warm_up_steps_count_once() -> None:
    adder = Adder()
    graphs, expected, first = StepGraphs(adder), torch.zeros(()), tiny_batch(seed=0)
    for i in range(6):
        batch = tiny_batch(seed=i) if i else first
        expected += batch.C.x_l.sum()
        assert graphs("kind", batch, adder.run)["total"][0] == expected
    assert adder.log == ["aside"] * capture.WARMUP + ["record", "replay", "replay", "replay"]
    assert len(adder.batches) == 6 and len({id(b) for b in adder.batches}) == 1
    assert all(map(torch.equal, tensors_of(adder.batches[0]), tensors_of(batch)))  # type: ignore[arg-type]
    assert all(map(torch.equal, tensors_of(first), tensors_of(tiny_batch(seed=0))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [lambda b: ("another", b), lambda b: ("kind", tiny_batch(2)), lambda b: ("kind", tiny_batch(1, 0, False))],
    ids=["key", "D batches", "no unlabelled images"],
)
def test_another_kind_is_recorded_anew(other: Any) -> None:
    adder, batch = Adder(), tiny_batch()
    graphs = StepGraphs(adder, warmup=1)
    for key, given in [("kind", batch)] * 2 + [other(batch)] * 3 + [("kind", batch)]:
        graphs(key, given, adder.run)
    assert adder.log == ["aside", "record", "replay"] * 2 + ["replay", "replay"]


def test_reset_forgets_recordings_and_batches() -> None:
    adder = Adder()
    graphs = StepGraphs(adder, warmup=1)
    for _ in range(2):
        graphs("kind", tiny_batch(), adder.run)
    graphs.reset()
    graphs("kind", tiny_batch(), adder.run)
    assert adder.log == ["aside", "record", "replay", "aside"] and len({id(b) for b in adder.batches}) == 2


def test_no_warm_up_records_at_once() -> None:
    adder = Adder()
    StepGraphs(adder, warmup=0)("kind", tiny_batch(), adder.run)
    assert adder.log == ["record", "replay"]


def test_a_failed_recording_is_a_capture_error_of_one_line() -> None:
    def record(run: Any, batch: StepBatch) -> Any:
        raise RuntimeError("CUDA error:\n   not permitted " + 300 * "x")

    adder = Adder()
    adder.record = record  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match=r"^CUDA error: not permitted x+$") as caught:
        StepGraphs(adder, warmup=0)("kind", tiny_batch(), adder.run)
    assert len(str(caught.value)) <= 200 and adder.batches == []


def test_an_error_of_a_step_is_not_one_of_the_capture() -> None:
    def run(batch: StepBatch) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        StepGraphs(Adder())("kind", tiny_batch(), run)
    assert not isinstance(caught.value, CaptureError)


# -- DeviceScalars --------------------------------------------------------------------------------------------------


def test_device_scalars_are_the_numbers_in_place() -> None:
    scalars = DeviceScalars(torch.device("cpu"), torch.float64)
    views = dict(vars(scalars))
    for k in range(1, 3):
        s = Scalars(
            lr=0.1 * k, momentum=0.9, bn_momentum=1.0 / k, ema_decay=0.5, adv_ramp=k - 1.0, consistency_weight=7.0
        )
        scalars.write(s, k)
        assert {name: float(getattr(scalars, name)) for name in vars(s)} == vars(s) and float(scalars.step) == k
        assert all(getattr(scalars, name) is views[name] for name in (*vars(s), "step"))
        assert scalars.adversarial is s.adversarial is (k == 2) and scalars.consistent is True


# -- the engine with recordings -------------------------------------------------------------------------------------


def pair(preset: str, stage: int = 1, warmup: int = 1, **overrides: Any) -> tuple[Engine, Engine, StrictRecorder]:
    """An engine with device scalars, and its twin that runs by recordings."""
    config = compiled(whole_config(preset, **overrides))
    plain, ours = (with_device_scalars(new_engine(config, stage)) for _ in range(2))
    recorder = StrictRecorder(ours)
    ours.graphs = StepGraphs(recorder, warmup)
    return plain, ours, recorder


def assert_bitwise(ours: Engine, plain: Engine, steps: int, seed: int = 0) -> None:
    expected: list[Terms] = run_steps(plain, steps, seed)
    assert run_steps(ours, steps, seed) == expected
    assert equal_state(ours.state_dict(), plain.state_dict())
    assert ours.stats.read() == plain.stats.read()


@pytest.mark.parametrize("preset", PRESETS)
def test_recordings_change_nothing(preset: str) -> None:
    """Both stages, epochs that end, ramps: whatever changes the calls or the memory of a step has its own recording.

    By epochs of two steps. Stage 1: twice the same, but official-v1 lets C' share the statistics of C from the second
    on. Stage 2: D, G and C; A too; with adversarial terms; official-v1: A in eval mode.
    """
    plain, ours, recorder = pair(preset, schedule={"adv_start": 2, "adv_end": 3})
    assert_bitwise(ours, plain, 4)
    for engine in (plain, ours):
        engine.begin_stage2()
    assert_bitwise(ours, plain, 8, seed=10)
    assert recorder.records == {"paper": 4, "official-v1": 6}[preset]
    assert recorder.aside_runs + recorder.replays == 12
    assert recorder.aside_runs == recorder.records


def test_whether_terms_are_kept_is_a_kind_of_its_own() -> None:
    """`on_step` may come and go: a recording that reported nothing has no terms to give."""
    plain, ours, recorder = pair("paper", stage=2)
    for engine in (plain, ours):
        engine.on_step = None
        for i in range(2):
            engine.step(batch_for(engine, i))
    assert_bitwise(ours, plain, 2, seed=2)
    assert recorder.aside_runs >= 2


def test_the_static_batch_is_not_the_loaders() -> None:
    """A replay reads the batch of its own step, whatever has become of the tensors of the first one."""
    plain, ours, recorder = pair("paper", stage=2)
    for i in range(2):
        batch = batch_for(ours, i)
        plain.step(copy.deepcopy(batch))
        ours.step(batch)
        for t in tensors_of(batch):
            t.zero_()  # type: ignore[union-attr]
    assert recorder.replays == 1 and equal_state(ours.state_dict(), plain.state_dict())


def test_loading_a_state_starts_anew() -> None:
    """The optimisers' states are other tensors then: the strict recorder would see it."""
    plain, ours, recorder = pair("paper", stage=2, schedule={"adv_start": 0, "adv_end": 1})
    assert_bitwise(ours, plain, 3)
    state = copy.deepcopy(plain.state_dict())
    for engine in (plain, ours):
        engine.load_state_dict(copy.deepcopy(state))
    before = recorder.records
    assert_bitwise(ours, plain, 3, seed=5)
    assert before == 1 and recorder.records == 2


@pytest.mark.parametrize("after_reports", [0, 3, 6, 14])
def test_a_failed_capture_loses_nothing(after_reports: int) -> None:
    """In the first D update, the second one, A's, C's: the step runs as it is, and one line says so."""
    plain, ours, _ = pair("paper", stage=2, schedule={"adv_start": 0, "adv_end": 1})
    ours.graphs, said = StepGraphs(FailingRecorder(ours, after_reports), 2), []
    ours.say = said.append
    assert_bitwise(ours, plain, 5)
    assert ours.graphs is None and ours.off["graph"] == "CUDA error: operation not permitted when stream is capturing"
    assert said == ["CUDA graph off: CUDA error: operation not permitted when stream is capturing"]
    assert ours.description.endswith(f"graph off: {ours.off['graph']}")
