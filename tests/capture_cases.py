"""What a captured step must be, checked without a GPU: a lint of its ops, their trace, and a strict recorder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_cases import compiled, whole_config, with_device_scalars
from tiny_cases import K
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from puat_fast.data.batch import StepBatch
from puat_fast.engine.capture import Run, Terms
from puat_fast.engine.step import Engine
from puat_fast.networks import Networks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from flops import MetaNoise

sys.path.pop()

aten = torch.ops.aten
BY_VALUE = ("puat_fast::sgd_ema_", "puat_fast::adam_")
"""Ops of ours that take a 0-d tensor of the host as a number: its value goes along with the launch."""


PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


class CaptureViolation(AssertionError):
    """A step does what a captured one cannot: the op, and why."""


def meta_engine(preset: str, stage: int = 2, **overrides: Any) -> Engine:
    """A tiny engine with every short cut and device scalars, on the meta device: what reads a number raises."""
    config, noise = compiled(whole_config(preset, **overrides)), MetaNoise()
    with torch.device("meta"):
        nets = Networks.build(config, K, noise)
    engine = Engine(config, nets, noise, steps_per_epoch=100)
    if stage == 2:
        engine.begin_stage2()
    return with_device_scalars(engine)


class CaptureLint(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold, or would freeze.

    - reading a value, or a shape that depends on one: the host waits for the device;
    - host data on its way to the device: a graph would copy from memory that is gone at the replay. A 0-d tensor of the
      host is none where its value goes along with a launch: in elementwise ops, and in the optimisers;
    - a draw that is not Noise's: nobody has registered its generator.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device).type
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.ops += 1
        for tag, why in (
            (torch.Tag.data_dependent_output, "reads a value"),
            (torch.Tag.dynamic_output_shape, "has a shape that depends on values"),
            (torch.Tag.nondeterministic_seeded, "draws without Noise"),
        ):
            if tag in func.tags:
                raise CaptureViolation(f"{func}: {why}")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in given}
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None:
            devices.add(torch.device(target).type)
        if func in (aten.copy_.default, aten._to_copy.default) and len(devices) > 1:
            raise CaptureViolation(f"{func}: copies between {' and '.join(sorted(devices))}")
        by_value = torch.Tag.pointwise in func.tags or func._schema.name in BY_VALUE or func is aten.lift_fresh.default
        for t in given:
            if t.device.type != self.device and not (t.dim() == 0 and by_value):
                raise CaptureViolation(f"{func}: takes a tensor of {t.device} with shape {tuple(t.shape)}")
        return func(*args, **kwargs)

    def __enter__(self) -> CaptureLint:
        self.patch = pytest.MonkeyPatch()
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor")):
            self.patch.setattr(owner, name, self._made_on_the_host(getattr(owner, name)))
        for name in ("synchronize", "empty_cache"):
            self.patch.setattr(torch.cuda, name, self._refused(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def _made_on_the_host(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Of torch.tensor and its kin, which copy to their device unseen by a dispatch mode."""

        def checked(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            if made.device.type == self.device:
                raise CaptureViolation(f"{make.__name__}: makes a tensor on the device of numbers of the host")
            return made

        return checked

    def _refused(self, name: str) -> Callable[..., None]:
        def refuse(*args: Any) -> None:
            raise CaptureViolation(f"torch.cuda.{name}: waits for the device")

        return refuse


class Trace(TorchDispatchMode):
    """What a captured step freezes: ops, shapes, strides, dtypes, and every number that comes from the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":
            self.calls.append((str(func), tree_map(self._frozen, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def _frozen(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x if isinstance(x, PLAIN) else type(x).__name__
        if x.device.type != self.device.type and x.dim() == 0:
            with _disable_current_modes():
                return x.item()
        return str(x.dtype), x.device.type, tuple(x.shape), x.stride() if x.numel() else None


def traced(engine: Engine, run: Callable[[], Any]) -> list[tuple[str, Any]]:
    """The calls that `run` makes."""
    with Trace(engine.noise.device) as trace:
        run()
    return trace.calls


def assert_same_calls(actual: list[tuple[str, Any]], expected: list[tuple[str, Any]]) -> None:
    """Names the first call that differs."""
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=False)):
        assert ours == theirs, f"call {i}: {ours} where {theirs} was recorded"
    assert len(actual) == len(expected)


# -- memory ---------------------------------------------------------------------------------------------------------


def lasting(engine: Engine) -> dict[str, Tensor]:
    """Every tensor that lives on from step to step, by a name: a graph holds their addresses."""
    found = {f"{name}.{k}": t for name, net in engine.nets.items() for k, t in net.state_dict(keep_vars=True).items()}
    for name, optimizer in engine.optimizers.items():
        for i, state in enumerate(optimizer.state.values()):
            found |= {f"optimizer {name}.{i}.{k}": t for k, t in state.items() if isinstance(t, Tensor)}
    if engine.stats._table is not None:
        found["stats"] = engine.stats._table
    assert engine.device_scalars is not None
    return found | {"scalars": engine.device_scalars._values}


class StrictRecorder:
    """Replays by running the step again, and fails where a CUDA graph would have gone on with what it has frozen."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.aside_runs = self.records = self.replays = 0

    def aside(self, run: Run, batch: StepBatch) -> Terms:
        self.aside_runs += 1
        return run(batch)

    def record(self, run: Run, batch: StepBatch) -> tuple[Callable[[], None], Terms]:
        self.records += 1
        terms: Terms = {}
        calls, names = list[list[tuple[str, Any]]](), list[list[str]]()
        addresses = {name: t.data_ptr() for name, t in lasting(self.engine).items()}

        def step() -> None:
            terms.clear()
            terms.update(run(batch))

        def replay() -> None:
            self.replays += 1
            assert {name: t.data_ptr() for name, t in lasting(self.engine).items()} == addresses
            calls.append(traced(self.engine, step))
            names.append(sorted(terms))
            assert_same_calls(calls[-1], calls[0])
            assert names[-1] == names[0]

        return replay, terms


class FailingRecorder(StrictRecorder):
    """Its capture fails in the middle of a step: nothing has run on the device, but the host has got that far."""

    def __init__(self, engine: Engine, after_reports: int) -> None:
        super().__init__(engine)
        self.after_reports = after_reports

    def record(self, run: Run, batch: StepBatch) -> Any:
        with nothing_happened(self.engine), pytest.MonkeyPatch.context() as patch:
            method, seen = self.engine.method, []

            def report(name: str, value: Tensor) -> None:
                if len(seen) == self.after_reports:
                    raise RuntimeError("CUDA error: operation not permitted\n  when stream is capturing")
                seen.append(name)
                self.engine._report(name, value)

            patch.setattr(method, "report", report)
            run(batch)


@contextmanager
def nothing_happened(engine: Engine) -> Iterator[None]:
    """What was written to tensors inside is taken back."""
    before = {name: t.detach().clone() for name, t in lasting(engine).items()}
    noise = engine.noise.state_dict()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, t in lasting(engine).items():
                t.copy_(before[name])
        engine.noise.load_state_dict(noise)
