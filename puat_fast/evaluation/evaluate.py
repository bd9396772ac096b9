"""Accuracy of a trained classifier under named attacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puat_fast import checkpoint
from puat_fast.attacks import accuracy
from puat_fast.attacks.autoattack import autoattack
from puat_fast.attacks.gpgd import Compat
from puat_fast.attacks.pgd import pgd
from puat_fast.config import Config, ConfigError
from puat_fast.data.formats import load_dataset
from puat_fast.engine import compiling
from puat_fast.engine.step import resolve_engine
from puat_fast.engine.trainer import resolve_device
from puat_fast.evaluation import latent
from puat_fast.evaluation.names import AttackSpec, parse_attack
from puat_fast.noise import Noise

Progress = Callable[[str, int, int, float], None]
"""progress(attack name, images done, images in all, accuracy so far)."""


def evaluate_run(
    path: Path,
    attacks: list[str],
    *,
    n: int | None,
    batch_size: int,
    seed: int,
    device: str,
    dataset: str | None,
    data_dir: str | None,
    progress: Progress | None,
    engine: str = "auto",
    acgan: Path | None = None,
    compat: Compat = "none",
) -> dict[str, Any]:
    """Evaluate the classifier of a run directory or file on the first n test images (None: all).

    dataset and data_dir default to the run's own. engine: eager | compiled (torch.compile, BatchNorm folded; the same
    to rounding) | auto, which is compiled on a GPU. acgan: the run directory or file of the AC-GAN that gpgd and usong
    search; compat: of theirs. Returns run, dataset, n, seed and, per attack, accuracy, correct, n, eps, step_size,
    num_steps, seconds; for aa also what `evaluate` says, for gpgd and usong what `latent.evaluate` does. Raises
    ConfigError, DataError, CheckpointError.
    """
    specs = [parse_attack(name) for name in attacks]
    metadata = checkpoint.read_metadata(checkpoint.classifier_file(path))
    C = checkpoint.load_classifier(path, resolve_device(device))
    used = next(C.parameters()).device
    gan = None
    if any(spec.latent for spec in specs):
        gan = latent.load_acgan_for(acgan, used, C.num_classes)
    if resolve_engine(engine, used) == "compiled" and compiling.why_not(used.type) is None:
        C.set_fold_bn(True)
        compiling.compile_network(C)
    config_file = path / "config.yaml"
    classes = "paper"
    if config_file.exists():
        config = Config.load(config_file)
        data_dir, classes = data_dir or config.data_dir, config.data.classes
    data = load_dataset(dataset or metadata["dataset"], data_dir, classes)
    if data.num_classes != C.num_classes:
        raise ConfigError(f"dataset: {data.name} has {data.num_classes} classes, the classifier {C.num_classes}")
    images, labels = torch.tensor(data.test.images)[:n], torch.tensor(data.test.labels)[:n]
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    results = {
        spec.name: evaluate(C, images, labels, spec, **settings)
        if gan is None or not spec.latent
        else latent.evaluate(C, gan, labels, spec, compat=compat, **settings)
        for spec in specs
    }
    return {"run": str(path), "dataset": data.name, "n": len(labels), "seed": seed, "attacks": results}


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy of any classifier under one attack.

    images: uint8 N x 3 x 32 x 32, labels: int64 N; model: images in [0,1] -> logits. For AutoAttack the result holds
    also `after`: accuracy before and after each of its attacks; `broken_by`: for each image the attack that broke it,
    "clean" or None; `attack_seconds`; `warnings`: why not to trust it.
    """
    if spec.kind == "aa":
        return _evaluate_autoattack(model, images, labels, spec, batch_size, seed, progress)
    step_size = spec.step_size
    assert step_size is not None

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return pgd(model, x, y, eps=spec.eps, step_size=step_size, num_steps=spec.num_steps, noise=noise)

    start = time.perf_counter()
    right = accuracy.correct(
        model,
        images,
        labels,
        None if spec.kind == "clean" else attack,
        batch_size=batch_size,
        seed=seed,
        progress=None if progress is None else partial(progress, spec.name),
    )
    return {
        "accuracy": right.double().mean().item(),
        "correct": int(right.sum()),
        "n": len(right),
        "eps": spec.eps,
        "step_size": spec.step_size,
        "num_steps": spec.num_steps,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _evaluate_autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    n = len(labels)

    def tell(attack: str, done: int, total: int, accuracy_so_far: float) -> None:
        if progress is not None:  # of runs against target classes, as images
            progress(f"{spec.name} {attack}", n * done // max(total, 1), n, accuracy_so_far)

    found = autoattack(
        model, images.float().div(255), labels, spec.eps, iterations=spec.num_steps, batch_size=batch_size, seed=seed,
        progress=tell,
    )  # fmt: skip
    return {
        "accuracy": found.robust_acc,
        "correct": int(found.robust.sum()),
        "n": n,
        "eps": spec.eps,
        "step_size": spec.step_size,
        "num_steps": spec.num_steps,
        "seconds": round(time.perf_counter() - start, 3),
        "after": found.accuracy,
        "broken_by": list(found.broken_by),
        "attack_seconds": {name: round(seconds, 3) for name, seconds in found.seconds.items()},
        "warnings": list(found.warnings),
    }
