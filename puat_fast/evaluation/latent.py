"""Accuracy under the unrestricted attacks GPGD and USong, which search an AC-GAN's latent space (spec 3)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puat_fast.attacks.acgan import told_class
from puat_fast.attacks.acgan_file import AcGan, load_acgan
from puat_fast.attacks.gpgd import Compat, LatentExamples, gpgd
from puat_fast.attacks.usong import usong
from puat_fast.config import ConfigError
from puat_fast.evaluation.names import AttackSpec
from puat_fast.noise import Noise


def load_acgan_for(path: Path | None, device: torch.device, num_classes: int) -> AcGan:
    """The AC-GAN that the attacks search. Raises ConfigError where none was named or it has other classes."""
    if path is None:
        raise ConfigError(
            "acgan: gpgd and usong search an AC-GAN's latent space; name its run or file, which "
            "`puat-fast train --method acgan` makes of the same dataset"
        )
    acgan = load_acgan(path, device)
    if acgan.G.num_classes != num_classes:
        raise ConfigError(f"acgan: {path} makes {acgan.G.num_classes} classes, the classifier knows {num_classes}")
    return acgan


def evaluate(
    model: nn.Module,
    acgan: AcGan,
    labels: Tensor,
    spec: AttackSpec,
    *,
    batch_size: int = 256,
    seed: int = 0,
    compat: Compat = "none",
    progress: Callable[[str, int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Accuracy of a classifier on what an AC-GAN makes of labels, `spec.draws` images of each, after the attack.

    labels: int64 N, the test set's. accuracy: part with model(x_adv) == y. Nothing ensures that x_adv still shows y,
    nor that Gen(z, y) is as hard as a test image: generated_acc is the accuracy before the attack, agreement and
    agreement_adv the parts of images, before and after it, whose class the AC-GAN's label head still tells. Latents
    are drawn on the CPU, in order, from `seed`. compat: see `attacks.gpgd`; with `official-v1` the AC-GAN is in train
    mode, as published.
    """
    start, y_all = time.perf_counter(), labels.repeat_interleave(spec.draws)
    noise, device = Noise(seed, "cpu"), next(model.parameters()).device
    networks = (acgan.G, acgan.D)  # in eval mode, but for the official script's attack
    sums = torch.zeros(4, dtype=torch.float64)  # right after, right before, agreeing before, agreeing after the attack
    try:
        for first in range(0, len(y_all), batch_size):
            y = y_all[first : first + batch_size].to(device)
            for network in networks:
                network.train(compat == "official-v1")
            found = _attack(model, acgan, y, spec, noise, compat)
            acgan.D.eval()  # a judge
            sums += _counts(model, acgan, y, found)
            done = first + len(y)
            if progress is not None:
                progress(spec.name, done, len(y_all), sums[0].item() / done)
    finally:
        for network in networks:
            network.eval()
    right, generated, agreement, agreement_adv = (sums / len(y_all)).tolist()
    return {
        "accuracy": right, "correct": int(sums[0]), "n": len(y_all),
        "generated_acc": generated, "agreement": agreement, "agreement_adv": agreement_adv,
        "eps": spec.eps, "step_size": spec.step_size, "num_steps": spec.num_steps, "draws": spec.draws,
        "compat": compat, "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _attack(
    model: nn.Module, acgan: AcGan, y: Tensor, spec: AttackSpec, noise: Noise, compat: Compat
) -> LatentExamples:
    numbers: dict[str, Any] = {"eps": spec.eps, "step_size": spec.step_size, "num_steps": spec.num_steps}
    numbers |= {"noise": noise, "compat": compat}
    if spec.kind == "gpgd":
        return gpgd(model, acgan.G, y, **numbers)
    return usong(model, acgan.G, acgan.D, y, **numbers)


@torch.no_grad()
def _counts(model: nn.Module, acgan: AcGan, y: Tensor, found: LatentExamples) -> Tensor:
    told = [
        model(found.x_adv).argmax(1), model(found.x_nat).argmax(1),
        told_class(acgan.D(found.generated_nat)[1]), told_class(acgan.D(found.generated_adv)[1]),
    ]  # fmt: skip
    return torch.stack([(classes == y).sum() for classes in told]).double().cpu()
