"""Accuracy under the unrestricted attacks GPGD and USong, which search an AC-GAN's latent space (spec 3)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puat_fast.attacks.acgan import told_class
from puat_fast.attacks.acgan_file import AcGan, load_acgan
from puat_fast.attacks.gpgd import Compat, LatentExamples, Start, gpgd
from puat_fast.attacks.precision import searching
from puat_fast.attacks.usong import usong
from puat_fast.config import ConfigError, SearchPrecision
from puat_fast.evaluation.names import AttackSpec
from puat_fast.evaluation.record import State
from puat_fast.evaluation.tally import Progress, Save, Tally, counts
from puat_fast.networks.layers import uncompiled
from puat_fast.noise import Noise

COLUMNS = ("right", "generated", "agreement", "agreement_adv")


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
    precision: SearchPrecision = "fp32",
    compat: Compat = "none",
    start: Start | None = None,
    antialias: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy of any classifier under one latent attack: `summary` of `measure`."""
    state = measure(
        model, acgan, labels, spec, batch_size=batch_size, seed=seed, precision=precision, compat=compat, start=start,
        antialias=antialias, progress=progress,
    )  # fmt: skip
    return summary(spec, state, precision) | {"compat": compat, "start": start, "antialias": antialias}


def measure(
    model: nn.Module,
    acgan: AcGan,
    labels: Tensor,
    spec: AttackSpec,
    *,
    batch_size: int = 256,
    seed: int = 0,
    precision: SearchPrecision = "fp32",
    compat: Compat = "none",
    start: Start | None = None,
    antialias: bool = False,
    progress: Progress | None = None,
    saved: State | None = None,
    save: Save | None = None,
) -> State:
    """The verdicts of a classifier on what an AC-GAN makes of labels, `spec.draws` images of each, after the attack.

    labels: int64 N, the test set's. Latents are drawn on the CPU, in order, from `seed`. compat, start, antialias: see
    `attacks.gpgd`; with `official-v1` the AC-GAN is in train mode, as published, and gets its running statistics back
    in the end.
    precision, saved, save: as in `evaluate.measure`.

    Returns a state whose columns are bool N * draws, the draws of a label together: right, after the attack; generated,
    before it; agreement and agreement_adv, whether the AC-GAN's label head tells the class before and after it.
    """
    y_all, networks = labels.repeat_interleave(spec.draws), (acgan.G, acgan.D)
    device, how = next(model.parameters()).device, {"compat": compat, "start": start, "antialias": antialias}
    tally = Tally(spec.name, COLUMNS, len(y_all), Noise(seed, "cpu"), saved, save, progress)
    as_loaded = _buffers(networks)
    _set_buffers(networks, tally.extra)
    try:
        for first in range(tally.done, len(y_all), batch_size):
            y = y_all[first : first + batch_size].to(device)
            for network in networks:  # in eval mode, but for the official script's attack
                network.train(compat == "official-v1")
            # a last batch of another size is not worth compiling for
            with nullcontext() if len(y) == batch_size else uncompiled(model):
                with searching(model, precision, device):
                    found = _attack(model, acgan, y, spec, tally.noise, how)
                acgan.D.eval()  # a judge
                with searching(model, "fp32", device):
                    told = _told(model, acgan, found)
            x = (found.x_nat, found.x_adv)
            tally.examples.add(first, y, told["generated"], told["right"], *x)
            extra = _buffers(networks) if compat == "official-v1" else None
            tally.add({name: classes == y for name, classes in told.items()}, extra)
    finally:
        for network in networks:
            network.eval()
        _set_buffers(networks, as_loaded)
    return tally.state() | {"extra": {}}


def summary(spec: AttackSpec, state: State, precision: SearchPrecision = "fp32") -> dict[str, Any]:
    """What a finished state comes to.

    accuracy: part with model(x_adv) == y. Nothing ensures that x_adv still shows y, nor that Gen(z, y) is as hard as a
    test image: generated_acc is the accuracy before the attack, agreement and agreement_adv the parts of images, before
    and after it, whose class the AC-GAN's label head still tells. worst_of_draws, where there are several: the part of
    labels that are right in all of them.
    """
    columns = state["columns"]
    draws = columns["right"].view(-1, spec.draws)
    parts = {name: columns[name].double().mean().item() for name in COLUMNS[1:]}
    worst = {"worst_of_draws": draws.all(1).double().mean().item()} if spec.draws > 1 else {}
    return {
        **counts(columns["right"]), "generated_acc": parts["generated"], "agreement": parts["agreement"],
        "agreement_adv": parts["agreement_adv"], **worst, "eps": spec.eps, "step_size": spec.step_size,
        "num_steps": spec.num_steps, "draws": spec.draws, "precision": precision,
        "seconds": round(state["seconds"], 3),
    }  # fmt: skip


def _attack(
    model: nn.Module, acgan: AcGan, y: Tensor, spec: AttackSpec, noise: Noise, how: dict[str, Any]
) -> LatentExamples:
    numbers: dict[str, Any] = {"eps": spec.eps, "step_size": spec.step_size, "num_steps": spec.num_steps}
    numbers |= {"noise": noise, **how}
    if spec.kind == "gpgd":
        return gpgd(model, acgan.G, y, **numbers)
    return usong(model, acgan.G, acgan.D, y, **numbers)


@torch.no_grad()
def _told(model: nn.Module, acgan: AcGan, found: LatentExamples) -> dict[str, Tensor]:
    """The class that each judge tells, by column."""
    told = (
        model(found.x_adv).argmax(1), model(found.x_nat).argmax(1),
        told_class(acgan.D(found.generated_nat)[1]), told_class(acgan.D(found.generated_adv)[1]),
    )  # fmt: skip
    return dict(zip(COLUMNS, told, strict=True))


def _buffers(networks: tuple[nn.Module, ...]) -> State:
    """Running statistics, which train mode moves."""
    return {f"{i}.{name}": b.clone() for i, network in enumerate(networks) for name, b in network.named_buffers()}


def _set_buffers(networks: tuple[nn.Module, ...], buffers: State) -> None:
    for i, network in enumerate(networks):
        for name, buffer in network.named_buffers():
            if f"{i}.{name}" in buffers:
                buffer.copy_(buffers[f"{i}.{name}"])
