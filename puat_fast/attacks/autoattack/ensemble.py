"""The ensemble of AutoAttack: one attack after the other, each on the images that withstood those before."""

from __future__ import annotations

import difflib
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puat_fast.attacks.autoattack.common import Progress, Settings, Victim, attacking, check_images
from puat_fast.attacks.autoattack.lanes import State
from puat_fast.attacks.autoattack.single import run_attack
from puat_fast.config import SearchPrecision
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
    precision: SearchPrecision = "fp32",
    progress: Progress | None = None,
    save: Callable[[State], None] | None = None,
    save_every: float = 60.0,
    saved: State | None = None,
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

    precision: what the model works in while it is searched, see `attacks.precision`; all that is found is judged in
    float32, and what fails there is attacked again in float32. With bf16 fewer images may be found than with fp32.
    save: called with all that there is, every save_every seconds and after each attack (with `faithful` only then):
    tensors on the CPU, numbers, strings, and lists and dicts of them. saved: such a state, of the same call, to go on
    from: with the same model the end is the same, to the bit.

    Source: Croce & Hein 2020 (arXiv:2003.01690). Raises ValueError naming the argument and what is accepted. Warns
    `AttackWarning` for outputs that look like probabilities, two passes that differ, zero gradients, steps that have
    not converged, less than 4 classes, and where Square breaks images that withstood the attacks with gradients: then
    the gradients are masked.
    """
    names = check_attacks(attacks)
    if not (isinstance(iterations, int) and iterations >= 1):
        raise ValueError(f"iterations: {iterations!r}, accepted: integers >= 1")
    settings = Settings(
        eps=eps, norm=norm, num_steps=iterations, num_queries=num_queries, num_targets=num_targets, restarts=restarts,
        batch_size=batch_size, seed=seed, faithful=faithful, precision=precision,
    )  # fmt: skip
    usual = Settings(eps=eps, norm=norm, restarts=restarts, batch_size=batch_size, seed=seed, faithful=faithful)
    standard = names == STANDARD and settings == usual
    check_images(x, y)
    if not len(x):
        return AutoAttackResult(x.clone(), y.clone(), (), {}, {}, (), standard)
    with attacking(model, x, settings) as victim:
        images, labels = x.detach().clone().to(victim.device), y.to(victim.device, torch.int64)
        run = _Run(victim, images, labels, settings, names, progress, save, save_every)
        if saved is not None:
            run.load(saved)
        for name in names if eps > 0 else ():
            if name not in run.seconds:
                run.attack(name)
    return AutoAttackResult(
        run.x_adv.to(x.device), run.y_adv.to(y.device), tuple(run.broken_by), run.accuracy, run.seconds,
        tuple(victim.warnings), standard,
    )  # fmt: skip


class _Run:
    """An evaluation under way."""

    def __init__(
        self,
        victim: Victim,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        names: Sequence[str],
        progress: Progress | None,
        save: Callable[[State], None] | None,
        save_every: float,
    ) -> None:
        self.victim, self.x, self.y, self.settings, self.names = victim, x, y, settings, names
        self.x_adv, self.y_adv = x.clone(), victim.look(x, y).argmax(1)
        self.robust = self.y_adv == y
        self.broken_by: list[str | None] = [None if right else "clean" for right in self.robust.tolist()]
        self.accuracy = {"clean": self.robust.double().mean().item()}
        self.seconds: dict[str, float] = {}
        self.progress, self.save, self.save_every, self.saved_at = progress, save, save_every, time.perf_counter()
        self.unfinished: State | None = None
        """Where the next attack goes on: seconds so far, counts of its gradients, lanes."""

    def attack(self, name: str) -> None:
        """Run an attack on what is robust so far, or what is left of it."""
        start, victim, before = time.perf_counter(), self.victim, list(self.accuracy)
        rows = self.robust.nonzero().flatten()
        if name == "apgd-t" and victim.num_classes < 4 and self.unfinished is None:
            victim.warn(f"apgd-t: the DLR loss needs 4 classes, of {victim.num_classes} the loss is z_t - z_y")
        lanes = None
        if self.unfinished is not None:
            start -= self.unfinished["seconds"]
            victim.restore_counts(self.unfinished["counts"])
            lanes, self.unfinished = self.unfinished["lanes"], None

        def report(done: int, total: int, fooled: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total, (len(rows) - fooled) / len(self.x))

        def save(lanes: Callable[[], State]) -> None:
            if self.save is not None and time.perf_counter() >= self.saved_at + self.save_every:
                spent = time.perf_counter() - start
                under_way = {"seconds": spent, "counts": victim.counts(), "lanes": lanes()}
                self.save(self.state() | {"unfinished": under_way})
                self.saved_at = time.perf_counter()

        if len(rows):
            self._note(
                name, rows, run_attack(name, victim, self.x[rows], self.y[rows], self.settings, report, save, lanes)
            )
        self.accuracy[name] = self.robust.double().mean().item()
        self.seconds[name] = time.perf_counter() - start
        if self.progress is not None:
            self.progress(name, len(rows), len(rows), self.accuracy[name])
        self._warn(name, before)
        if self.save is not None:
            self.save(self.state())

    def _note(self, name: str, rows: Tensor, x_adv: Tensor) -> None:
        classes = self.victim.all_logits(x_adv).argmax(1)
        hit = classes != self.y[rows]
        self.x_adv[rows[hit]], self.y_adv[rows[hit]] = x_adv[hit], classes[hit]
        self.robust[rows[hit]] = False
        for row in rows[hit].tolist():
            self.broken_by[row] = name

    def _warn(self, name: str, before: list[str]) -> None:
        """before: clean, and the attacks so far."""
        self.victim.warn_of_gradients(name, len(self.x))
        lost = self.accuracy[before[-1]] - self.accuracy[name]
        if name == "square" and len(before) > 1 and lost > SUSPICIOUS:
            self.victim.warn(
                f"square took {lost:.1%} of robust accuracy that {', '.join(before[1:])} had left: the gradients of "
                "this model are masked, and its robust accuracy is likely to be lower still"
            )

    def state(self) -> State:
        """All but an attack under way; a copy."""
        broken = ~self.robust
        return {
            "of": self._fingerprint, "robust": self.robust.cpu().clone(), "x_adv": self.x_adv[broken].cpu(),
            "y_adv": self.y_adv.cpu().clone(), "broken_by": [name or "" for name in self.broken_by],
            "accuracy": dict(self.accuracy), "seconds": dict(self.seconds), "warnings": list(self.victim.warnings),
            "unfinished": None,
        }  # fmt: skip

    def load(self, state: State) -> None:
        """Go on from there. Raises ValueError if it is of other images, labels, attacks or settings."""
        if state.get("of") != self._fingerprint:
            raise ValueError("saved: the state of another call: images, labels, attacks and settings must be the same")
        # copies: they are written to, and the state is the caller's
        self.robust, self.y_adv = (state[name].to(self.x.device, copy=True) for name in ("robust", "y_adv"))
        self.x_adv[~self.robust] = state["x_adv"].to(self.x.device)
        self.broken_by = [name or None for name in state["broken_by"]]
        self.accuracy, self.seconds = dict(state["accuracy"]), dict(state["seconds"])
        self.victim.warnings = list(state["warnings"])
        self.unfinished = state["unfinished"]

    @functools.cached_property
    def _fingerprint(self) -> str:
        told = hashlib.sha256(repr((self.names, self.settings)).encode())
        for tensor in (self.x, self.y):
            told.update(tensor.cpu().numpy().tobytes())
        return told.hexdigest()
