"""A small run on ten classes, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run(tmp_path_factory: Any) -> Path:
    """A run directory of the digits' name and classes, trained for two steps: real G, A and C', bad ones."""
    from tiny_cases import run_config, tiny_dataset

    from puat_fast.engine.trainer import Trainer

    config = run_config(
        tmp_path_factory.mktemp("runs") / "run",
        dataset="digits",
        data={"n_labelled": 20, "val_fraction": 0.5},
        pretrain={"epochs": 0},
        schedule={"epochs": 1, "steps_per_epoch": 2},
    )
    return Trainer(config, dataset=tiny_dataset(10, name="digits")).fit().path
