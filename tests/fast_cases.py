"""Engines that take the short cuts of `engine: compiled`, and how two engines are compared, for the tests of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from tiny_cases import tiny_batch, tiny_config, tiny_engine
from torch import Tensor, nn

from puat_fast.config import Config, FastConfig, merge
from puat_fast.engine.capture import DeviceScalars
from puat_fast.engine.step import Engine
from puat_fast.noise import Noise
from puat_fast.testing import step_terms

PRESETS = ("paper", "official-v1")
SHORT_CUTS = tuple(f.name for f in fields(FastConfig) if f.name not in ("compile", "graph"))

Terms = dict[str, list[float]]


def whole_config(preset: str = "paper", **overrides: Any) -> Config:
    """Tiny, with all that a step can hold: two D updates, every augmentation, D and G from the start of stage 1 on.

    With two steps an epoch, those of stage 2 are adversarial from the third on; official-v1 puts A in eval mode in the
    fifth.
    """
    values: dict[str, Any] = {
        "attack": {"num_steps": 2},
        "augment": {"crop_pad": 4, "flip": True, "rotate_deg": 15.0},
        "schedule": {"epochs": 4, "n_disc": 2, "adv_start": 1, "adv_end": 2},
        "pretrain": {"epochs": 2, "gan_start": 1, "consistency_ramp": 1},
        "optim": {"lr": 0.01},  # batches of four: at the usual rate the losses run away
        "ema": {"warmup_images": 8},
    }
    merge(values, overrides)
    return tiny_config(preset, **values)


def compiled(config: Config, **fast: bool) -> Config:
    """The same run with `engine: compiled`; torch.compile itself is off unless asked for."""
    return Config.from_dict(config.to_dict() | {"engine": "compiled", "fast": {"compile": False} | fast})


def new_engine(config: Config, stage: int = 2, steps_per_epoch: int = 2, device: str = "cpu") -> Engine:
    """An engine on freshly seeded networks, in float64 if the precision is; `device` other than "cpu" for GPU tests."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return tiny_engine(config, Noise(7, device, dtype), steps_per_epoch, stage)


def with_device_scalars(engine: Engine) -> Engine:
    """The engine reads learning rate, ramps and all that from tensors, as compiled and captured ones do."""
    engine.device_scalars = DeviceScalars(engine.noise.device, engine.noise.dtype)
    return engine


def batch_for(engine: Engine, seed: int) -> Any:
    """A random StepBatch of the size and dtype that the engine's next step takes, on its device."""
    c = engine.config
    unlabelled = c.data.use_unlabelled and engine.method.needs_unlabelled
    batch = tiny_batch(max(engine.num_disc_batches(), 1), seed, unlabelled, engine.noise.dtype)
    for b in (*batch.D, batch.C):
        for name, t in vars(b).items():
            object.__setattr__(b, name, None if t is None else t.to(engine.noise.device))
    return batch


def run_steps(engine: Engine, steps: int, seed: int = 0) -> list[Terms]:
    """The terms of `steps` steps; an epoch ends where it ends."""
    terms = []
    for i in range(steps):
        terms.append(step_terms(engine, batch_for(engine, seed + i)))
        if engine.step_in_stage % engine.steps_per_epoch == 0:
            engine.end_epoch()
    return terms


def both_stages(engine: Engine, steps: tuple[int, int] = (2, 5)) -> list[Terms]:
    """The terms of some steps of stage 1, where the engine stands there, and of stage 2."""
    terms = []
    if engine.stage == 1:
        terms += run_steps(engine, steps[0])
        engine.begin_stage2()
    return terms + run_steps(engine, steps[1], seed=100)


def assert_same_terms(actual: list[Terms], expected: list[Terms], rel: float, abs_: float = 1e-12) -> None:
    """Every term of every update of every step."""
    assert len(actual) == len(expected)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.keys() == theirs.keys(), i
        for name, values in theirs.items():
            assert ours[name] == pytest.approx(values, rel=rel, abs=abs_), f"step {i}, {name}"


def assert_same_state(ours: Engine, theirs: Engine, tolerance: float) -> None:
    """Weights and buffers, BatchNorm's and spectral norm's, to `tolerance` of the largest entry of their tensor.

    G and A have biases whose true gradient is zero, of which Adam makes steps from the rounding: a thousand times that.
    """
    for name, net in ours.nets.items():
        assert_same_tensors(
            net.state_dict(), getattr(theirs.nets, name).state_dict(), tolerance * (1000 if name in "GA" else 1), name
        )


def assert_same_tensors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str = ""
) -> None:
    """Entry by entry, to `tolerance` of the largest entry of the tensor."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        largest = max(float(value.abs().max()), 1e-3) if value.numel() else 1.0
        error = float((actual[key] - value).abs().max()) if value.numel() else 0.0
        assert error <= tolerance * largest, f"{what}.{key}: {error} of {largest}"


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers."""
    return {name: b.clone() for name, b in module.named_buffers()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients that there are."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
