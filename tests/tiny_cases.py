"""Tiny configurations, engines, batches and datasets for the tests of methods, engine and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from puat_fast.config import Config, merge
from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.data.formats import Dataset, ImageSet
from puat_fast.engine.step import Engine
from puat_fast.methods import Scalars
from puat_fast.networks import Networks
from puat_fast.noise import Noise

K, B = 3, 4
LATE = {"lr": 0.05, "momentum": 0.9, "bn_momentum": 0.01, "ema_decay": 0.5, "adv_ramp": 0.5, "consistency_weight": 50.0}
"""Scalars of some later step, in which every term counts."""


def tiny_config(preset: str = "paper", **overrides: Any) -> Config:
    """A preset with networks of a few thousand weights, no augmentation, one D update and three PGD steps."""
    values: dict[str, Any] = {
        "dataset": "cifar10",
        "device": "cpu",
        "classifier": {"depth": 10, "width": 1},
        "gan": {"width": 8, "z_dim": 8},
        "data": {"mix_frac": 0.5},
        "attack": {"num_steps": 3},
        "augment": {"crop_pad": 0, "flip": False},
        "schedule": {"batch_size": B, "n_disc": 1},
    }
    merge(values, overrides)
    return Config.preset(preset, **values)


def tiny_engine(config: Config, noise: Noise | None = None, steps_per_epoch: int = 2, stage: int = 2) -> Engine:
    """An engine on freshly seeded networks; stage 2 is begun unless told otherwise."""
    noise = noise or Noise(7)
    engine = Engine(config, Networks.build(config, K, noise), noise, steps_per_epoch)
    if stage == 2 and engine.stage == 1:
        engine.begin_stage2()
    return engine


def tiny_batch(
    n_disc: int = 1, seed: int = 0, unlabelled: bool = True, dtype: torch.dtype = torch.float32
) -> StepBatch:
    """Random images and labels for one step."""
    g = torch.Generator().manual_seed(seed)
    n = B if unlabelled else 2 * B

    def images(present: bool = True) -> Any:
        return torch.rand(n, 3, 32, 32, generator=g, dtype=dtype) if present else None

    def labels() -> Tensor:
        return torch.randint(K, (n,), generator=g)

    disc = [DiscBatch(images(), labels(), images(unlabelled), images(unlabelled)) for _ in range(n_disc)]
    return StepBatch(D=disc, C=SemiBatch(images(), labels(), images(unlabelled)))


def run_phase(engine: Engine, net: str, batch: StepBatch, **scalars: float) -> dict[str, float]:
    """One update of one network through the engine; returns its terms."""
    s = Scalars(**(LATE | scalars))
    phase = next(phase for phase in engine.next_phases() if phase.net == net)
    engine.on_step = lambda terms: None
    engine._terms = {}
    engine._update(phase, batch, s, 0)
    return {name: float(values[-1]) for name, values in engine._terms.items()}


class Watch:
    """Records every forward of a module: its input tensors, its output, its mode."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[tuple[Tensor, ...]] = []
        self.outputs: list[Tensor] = []
        self.training: list[bool] = []
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """The hook."""
        self.inputs.append(tuple(x.detach().clone() for x in inputs if isinstance(x, Tensor)))
        self.outputs.append(output.detach().clone())
        self.training.append(module.training)


def parameters(module: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in module.parameters()]


def equal_state(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two nested state dicts are equal, tensors bit for bit."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal_state(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


# -- runs -----------------------------------------------------------------------------------------------------------


def image_set(count: int, num_classes: int, seed: int) -> ImageSet:
    """Noisy images, bright in the stripe of their class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    images = rng.integers(0, 120, (count, 3, 32, 32))
    for i, k in enumerate(labels):
        images[i, :, k * 3 : k * 3 + 3] += 120
    return ImageSet(images.astype(np.uint8), labels.astype(np.int64))


def tiny_dataset(num_classes: int = 2, train: int = 40, test: int = 12, name: str = "cifar10") -> Dataset:
    """A dataset in memory."""
    names = tuple(f"class{k}" for k in range(num_classes))
    return Dataset(name, names, image_set(train, num_classes, 0), image_set(test, num_classes, 1))


def run_config(out: Path, preset: str = "paper", **overrides: Any) -> Config:
    """Two epochs of three steps in each stage, D and G from the second epoch on, every augmentation on."""
    values: dict[str, Any] = {
        "out": str(out),
        "data": {"n_labelled": 12, "val_fraction": 0.34},
        "attack": {"num_steps": 1},
        "augment": {"crop_pad": 2, "flip": True},
        "schedule": {"epochs": 2, "steps_per_epoch": 3, "adv_end": 1},
        "pretrain": {"epochs": 2, "gan_start": 2, "consistency_ramp": 1},
        "val": {"attack": "ce-pgd-20", "final_images": 4},
        "ema": {"warmup_images": 8},
        "log": {"sample_every": 0, "interval": 2},
    }
    merge(values, overrides)
    return tiny_config(preset, **values)


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Runs without what takes long and is tested elsewhere: pictures, disk syncs, versions, long attacks."""
    from puat_fast import runlog
    from puat_fast.engine import trainer

    def touch(path: Path, *args: Any) -> None:
        Path(path).touch()

    pgd = trainer.pgd
    patch.setattr(trainer.plots, "save_curves", touch)
    patch.setattr(trainer.plots, "save_grid", touch)
    patch.setattr(trainer, "pgd", lambda *a, **k: pgd(*a, **(k | {"num_steps": 2})))
    patch.setattr(runlog, "_environment", lambda path: {})
    patch.setattr(os, "fsync", lambda handle: None)
