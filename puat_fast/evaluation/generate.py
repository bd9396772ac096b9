"""Pictures from a trained run: real images, G(z,y), UAEs, and what the teacher says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puat_fast import checkpoint, plots
from puat_fast.config import Config, ConfigError
from puat_fast.data.formats import load_dataset
from puat_fast.engine import precision
from puat_fast.engine.samples import sample_rows
from puat_fast.engine.trainer import resolve_device
from puat_fast.methods import METHODS
from puat_fast.networks import Networks
from puat_fast.noise import Noise


def generate_run(path: Path, grid: Path, per_class: int, seed: int, device: str) -> dict[str, Any]:
    """Write a grid of per_class columns for each class, from the best checkpoint of a run.

    seed: of the latents z. Returns {"grid", "num_classes", "per_class", "accuracy": {row: fraction C' gets right}}.
    Raises CheckpointError for what is not a run, ConfigError for a run without a generator.
    """
    config_file = path / "config.yaml"
    if not config_file.exists():
        raise checkpoint.CheckpointError(f"{path}: not a run directory (no config.yaml)")
    config = Config.load(config_file)
    if config.method not in METHODS or not METHODS[config.method].has_generator:
        raise ConfigError(f"{path}: a run of method {config.method} has no generator, only puat has one")
    best = path / "checkpoints" / "best.pt"
    state = checkpoint.load(best if best.exists() else path / "checkpoints" / "last.pt")
    dataset = load_dataset(config.dataset, config.data_dir, config.data.classes)
    noise = Noise(seed, resolve_device(device), precision.dtype(config.precision))
    nets = Networks.build(config, dataset.num_classes, noise)
    try:
        for name, net in nets.items():
            net.load_state_dict(state["engine"]["networks"][name])
        with_uae = state["engine"]["stage"] == 2
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{path}: its checkpoint is of another configuration than its config.yaml"
        ) from error
    images, labels = torch.tensor(dataset.test.images), torch.tensor(dataset.test.labels)
    rows = sample_rows(nets, config, images, labels, per_class=per_class, seed=seed, with_uae=with_uae)
    plots.save_grid(grid, rows, f"{config.dataset}: verdicts of C', seed {seed}")
    right = {row.label: sum(row.good or ()) / len(row.images) for row in rows}
    return {"grid": str(grid), "num_classes": dataset.num_classes, "per_class": per_class, "accuracy": right}
