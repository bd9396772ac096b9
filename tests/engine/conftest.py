"""Runs that are quick."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Runs without what takes long and is tested elsewhere: pictures, disk syncs, versions, long attacks."""
    from puat_fast import runlog
    from puat_fast.engine import trainer

    def touch(path: Path, *args: Any) -> None:
        Path(path).touch()

    pgd = trainer.pgd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.plots, "save_curves", touch)
        patch.setattr(trainer.plots, "save_grid", touch)
        patch.setattr(trainer, "pgd", lambda *a, **k: pgd(*a, **(k | {"num_steps": 2})))
        patch.setattr(runlog, "_environment", lambda path: {})
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks by one thread: as fast, and not slowed down by what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
