"""A whole step as one CUDA graph: static buffers, a few steps as they are, one capture, then replays.

The graph holds everything: 5 D updates, G, A, C with PGD, optimisers, teacher, random draws, BatchNorm's and spectral
norm's buffers. What it may not hold is checked on the CPU by tests/engine/test_capture.py: a step must neither read a
value on the host, nor copy from host memory, nor change a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.methods import Scalars

Terms = dict[str, list[Tensor]]
Run = Callable[[StepBatch], Terms]
"""Runs a step on a batch and returns the reported terms by name."""

WARMUP = 3
"""Steps of a kind before it is captured: optimiser states are made, kernels compiled, libraries initialised."""


class CaptureError(RuntimeError):
    """A step cannot be recorded: the reason, in one line. The step has not run."""


class DeviceScalars(Scalars):
    """Scalars as 0-d views of one tensor on the device, so that one copy tells a captured step all that is new."""

    step: Tensor  # of the stage, from 1

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._names = [f.name for f in fields(Scalars)]
        self._values = torch.zeros(len(self._names) + 1, device=device, dtype=dtype)
        for name, view in zip((*self._names, "step"), self._values.unbind(), strict=True):
            object.__setattr__(self, name, view)

    def write(self, s: Scalars, step: int) -> None:
        """Take over the numbers of a step. The device is not waited for."""
        self._host = s
        values = torch.tensor([*(getattr(s, name) for name in self._names), step], dtype=self._values.dtype)
        if self._values.is_cuda:
            values = values.pin_memory()
        self._values.copy_(values, non_blocking=True)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # of a frozen dataclass: the views stay, what is in them changes

    @property
    def adversarial(self) -> bool:
        """Whether r(t) > 0, known to the host."""
        return self._host.adversarial

    @property
    def consistent(self) -> bool:
        """Whether a(t) > 0, known to the host."""
        return self._host.consistent


class Recorder(Protocol):
    """How a step is recorded. CudaRecorder is the real one; a test takes one that runs the step again."""

    def aside(self, run: Run, batch: StepBatch) -> Terms:
        """Run the step where captures will be made."""
        ...

    def record(self, run: Run, batch: StepBatch) -> tuple[Callable[[], None], Terms]:
        """Record the step without running it: (replay, the terms that every replay writes)."""
        ...


class CudaRecorder:
    """Records by torch.cuda.CUDAGraph, all graphs in one memory pool; `generator` is drawn from anew in each replay."""

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self.generator = generator
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, run: Run, batch: StepBatch) -> Terms:
        """Run the step on the stream of the captures, so that what it leaves behind belongs there."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            terms = run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return terms

    def record(self, run: Run, batch: StepBatch) -> tuple[Callable[[], None], Terms]:
        """Capture the step."""
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its generators in capture: the next draw would raise "Offset increment outside
        # graph capture". The one that torch captures by itself is nobody's here, but of the same process.
        generators = [self.generator, torch.cuda.default_generators[self.stream.device.index]]
        before = [generator.clone_state() for generator in generators]
        graph.register_generator_state(self.generator)
        try:
            # thread_local: what other threads do meanwhile, as a loader's copies, is none of the capture's business
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                terms = run(batch)
        except BaseException:
            for generator, state in zip(generators, before, strict=True):
                generator.graphsafe_set_state(state)
            raise
        return graph.replay, terms


@dataclass
class _Slot:
    """One kind of step: its static batch, how often it ran, and its recording."""

    batch: StepBatch
    runs: int = 0
    replay: Callable[[], None] | None = None
    terms: Terms | None = None


class StepGraphs:
    """Runs steps by recordings, one for each `key`: whatever changes what a step does must be part of the key."""

    def __init__(self, recorder: Recorder, warmup: int = WARMUP) -> None:
        self.recorder, self.warmup = recorder, warmup
        self._slots: dict[Hashable, _Slot] = {}

    def __call__(self, key: Hashable, batch: StepBatch, run: Run) -> Terms:
        """One step on `batch`, which is copied into its kind's static one; the terms live until the next step."""
        key = (key, tuple(None if x is None else x.shape for x in tensors_of(batch)))
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(_map(batch, torch.clone))
        else:
            for static, x in zip(tensors_of(slot.batch), tensors_of(batch), strict=True):
                if static is not None and x is not None:
                    static.copy_(x, non_blocking=True)
        if slot.replay is None and slot.runs < self.warmup:
            slot.runs += 1
            return self.recorder.aside(run, slot.batch)
        if slot.replay is None:
            try:
                slot.replay, slot.terms = self.recorder.record(run, slot.batch)
            except RuntimeError as error:
                raise CaptureError(" ".join(str(error).split())[:200]) from error
        slot.replay()
        assert slot.terms is not None
        return slot.terms

    def reset(self) -> None:
        """Forget all recordings: the memory that they read and write is no longer what it was."""
        self._slots.clear()


def tensors_of(batch: StepBatch) -> list[Tensor | None]:
    """The tensors of a batch, in a fixed order."""
    return [t for b in (*batch.D, batch.C) for t in vars(b).values()]


def _map(batch: StepBatch, f: Callable[[Tensor], Tensor]) -> StepBatch:
    def of(b: SemiBatch) -> dict[str, Any]:
        return {name: None if t is None else f(t) for name, t in vars(b).items()}

    return StepBatch(D=[DiscBatch(**of(b)) for b in batch.D], C=SemiBatch(**of(batch.C)))
