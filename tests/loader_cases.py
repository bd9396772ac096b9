"""Small sets, samplers and loaders of every kind, for the tests of the loaders."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puat_fast.data import Augmentation, LabelledSampler, SemiSupervisedSampler, ShardedSampler, make_loader

KINDS = ["resident", "stream", "dali", "torch"]
PREFETCHING = KINDS[1:]
N, B = 90, 4
rng = np.random.default_rng(0)
IMAGES, LABELS = rng.integers(0, 256, (N, 3, 32, 32), dtype=np.uint8), rng.integers(0, 3, N)
LABELLED, UNLABELLED = np.arange(0, 30), np.arange(30, 80)


def sampler(kind: str = "semi", seed: int = 7, rank: int | None = None) -> Any:
    """kind: semi, none (2 B labelled images), labelled (B)."""
    if kind == "labelled":
        return LabelledSampler(LABELLED, B, seed)
    made = SemiSupervisedSampler(LABELLED, UNLABELLED if kind == "semi" else UNLABELLED[:0], B, seed)
    return made if rank is None else ShardedSampler(made, rank, 2)


def augmentation(scope: str | None, rotate_deg: float = 0.0, seed: int = 3) -> Augmentation | None:
    return None if scope is None else Augmentation(4, True, rotate_deg, scope, seed)


@contextmanager
def loader(kind: str, samples: Any = None, augment: Augmentation | None = None, images: Any = IMAGES) -> Any:
    """A loader on the CPU that is closed at the end."""
    made = make_loader(kind, images, LABELS[: len(images)], samples or sampler(), "cpu", torch.float32, augment)
    try:
        yield made
    finally:
        made.close()


def tensors(step: Any) -> dict[str, Any]:
    """Every tensor of a StepBatch by name, None where there is none."""
    found = {f"{k}.{name}": value for k, batch in enumerate(step.D) for name, value in vars(batch).items()}
    return found | {f"C.{name}": value for name, value in vars(step.C).items()}


def assert_same(a: Any, b: Any) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value is None and b[name] is None) or torch.equal(value, b[name]), name


def running() -> int:
    """Threads of this process, of whatever library, and its children."""
    children = Path("/proc/self/task").glob("*/children")
    return len(list(Path("/proc/self/task").iterdir())) + sum(len(path.read_text().split()) for path in children)
