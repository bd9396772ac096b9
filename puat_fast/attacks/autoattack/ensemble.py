"""The ensemble of AutoAttack: one attack after the other, each on the images that withstood those before."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puat_fast.attacks.autoattack.common import Progress, Settings, Victim, attacking, check_images
from puat_fast.attacks.autoattack.single import run_attack
from puat_fast.ops.pgd_step import Norm

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of the standard version, in their order."""

SUSPICIOUS = 0.002
"""Robust accuracy that Square may take from what is left by attacks with gradients, before one is warned."""


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack found; all tensors on the device of the images.

    x_adv: of x's shape; x where nothing fooled the model. y_adv: its class there, N. broken_by, for each image: the
    attack that broke it, "clean" where the model was wrong before, None where it withstood all. accuracy: the part of
    all images that is still right, before ("clean") and after each attack, in order. seconds: of each attack. warnings:
    texts of the `AttackWarning`s. standard: whether attacks and settings were those of the standard version, but for
    more restarts.
    """

    x_adv: Tensor
    y_adv: Tensor
    broken_by: tuple[str | None, ...]
    accuracy: dict[str, float]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    standard: bool

    @property
    def robust(self) -> Tensor:
        """Whether an image withstood all attacks: bool N, on the CPU."""
        return torch.tensor([name is None for name in self.broken_by], dtype=torch.bool)

    @property
    def robust_acc(self) -> float:
        """The part of all images that withstood all attacks; NaN of no images."""
        return self.robust.double().mean().item()


def check_attacks(attacks: Sequence[str]) -> tuple[str, ...]:
    """The names, if all are known. Raises ValueError, with a suggestion for one that is not."""
    names = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    for name in names:
        if name not in STANDARD:
            close = difflib.get_close_matches(str(name), STANDARD, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"attacks: {name!r} is not one of {', '.join(STANDARD)}{hint}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks: {', '.join(names) or 'none given'}; accepted: {', '.join(STANDARD)}, each once")
    return names


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    *,
    norm: Norm = "linf",
    attacks: Sequence[str] = STANDARD,
    iterations: int = 100,
    num_queries: int = 5000,
    num_targets: int = 9,
    restarts: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    faithful: bool = False,
    progress: Progress | None = None,
) -> AutoAttackResult:
    """AutoAttack, standard version by default: robust is what is right after APGD-CE, APGD-T, FAB-T and Square.

    model: any nn.Module, images in [0,1] -> logits N x K; it comes back in its own mode, no weight collects a gradient.
    x: N x C x H x W, float32 or float64 in [0,1]; y: N class indices. eps: radius in `norm` (linf or l2), in units of
    the range [0,1]; 0 attacks nothing. attacks: any of `STANDARD`, run in the order given. iterations: steps of APGD
    and FAB; 10 is what torchattacks >= 3.3 takes, a weaker protocol that should not be reported as AutoAttack.
    num_queries: of Square. num_targets: of APGD-T and FAB-T, K - 1 if that is less. restarts: of each attack.

    faithful: pyautoattack's order, batches and random numbers, see `apgd_ce`; x_adv of APGD and Square are then equal
    to its own bit for bit (CPU, float32, same batch_size and seed), FAB-T's to rounding. Else the fast way. Whatever an
    attack claims is checked by one more pass. progress: see `Progress`; with `faithful` once for each attack.

    Source: Croce & Hein 2020 (arXiv:2003.01690). Raises ValueError naming the argument and what is accepted. Warns
    `AttackWarning` for outputs that look like probabilities, two passes that differ, zero gradients, less than 4
    classes, and where Square breaks images that withstood the attacks with gradients: then the gradients are masked.
    """
    names = check_attacks(attacks)
    if not (isinstance(iterations, int) and iterations >= 1):
        raise ValueError(f"iterations: {iterations!r}, accepted: integers >= 1")
    settings = Settings(
        eps=eps, norm=norm, num_steps=iterations, num_queries=num_queries, num_targets=num_targets, restarts=restarts,
        batch_size=batch_size, seed=seed, faithful=faithful,
    )  # fmt: skip
    usual = Settings(eps=eps, norm=norm, restarts=restarts, batch_size=batch_size, seed=seed, faithful=faithful)
    standard = names == STANDARD and settings == usual
    check_images(x, y)
    if not len(x):
        return AutoAttackResult(x.clone(), y.clone(), (), {}, {}, (), standard)
    with attacking(model, x, settings) as victim:
        images, labels = x.detach().clone().to(victim.device), y.to(victim.device, torch.int64)
        run = _Run(victim, images, labels, settings, progress)
        for name in names if eps > 0 else ():
            run.attack(name)
    return AutoAttackResult(
        run.x_adv.to(x.device), run.y_adv.to(y.device), tuple(run.broken_by), run.accuracy, run.seconds,
        tuple(victim.warnings), standard,
    )  # fmt: skip


class _Run:
    """An evaluation under way."""

    def __init__(self, victim: Victim, x: Tensor, y: Tensor, settings: Settings, progress: Progress | None) -> None:
        self.victim, self.x, self.y, self.settings, self.progress = victim, x, y, settings, progress
        self.x_adv, self.y_adv = x.clone(), victim.look(x, y).argmax(1)
        self.robust = self.y_adv == y
        self.broken_by: list[str | None] = [None if right else "clean" for right in self.robust.tolist()]
        self.accuracy = {"clean": self.robust.double().mean().item()}
        self.seconds: dict[str, float] = {}

    def attack(self, name: str) -> None:
        """Run an attack on what is robust so far."""
        start, victim, before = time.perf_counter(), self.victim, list(self.accuracy)
        rows = self.robust.nonzero().flatten()
        if name == "apgd-t" and victim.num_classes < 4:
            victim.warn(f"apgd-t: the DLR loss needs 4 classes, of {victim.num_classes} the loss is z_t - z_y")

        def report(done: int, total: int, fooled: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total, (len(rows) - fooled) / len(self.x))

        if len(rows):
            x_adv = run_attack(name, victim, self.x[rows], self.y[rows], self.settings, report)
            classes = victim.all_logits(x_adv).argmax(1)
            hit = classes != self.y[rows]
            self.x_adv[rows[hit]], self.y_adv[rows[hit]] = x_adv[hit], classes[hit]
            self.robust[rows[hit]] = False
            for row in rows[hit].tolist():
                self.broken_by[row] = name
        self.accuracy[name] = self.robust.double().mean().item()
        self.seconds[name] = time.perf_counter() - start
        if self.progress is not None:
            self.progress(name, len(rows), len(rows), self.accuracy[name])
        victim.warn_of_zero_gradients(name)
        lost = self.accuracy[before[-1]] - self.accuracy[name]
        if name == "square" and len(before) > 1 and lost > SUSPICIOUS:
            victim.warn(
                f"square took {lost:.1%} of robust accuracy that {', '.join(before[1:])} had left: the gradients of "
                "this model are masked, and its robust accuracy is likely to be lower still"
            )
