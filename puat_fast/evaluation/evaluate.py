"""One attack on the images of a test set: verdicts, from the start or from where it was, and what they come to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from puat_fast.attacks import accuracy
from puat_fast.attacks.autoattack import AttackWarning, AutoAttackResult, autoattack
from puat_fast.attacks.pgd import pgd
from puat_fast.attacks.precision import searching
from puat_fast.config import SearchPrecision
from puat_fast.evaluation.names import AttackSpec
from puat_fast.evaluation.picture import Examples
from puat_fast.evaluation.record import State
from puat_fast.evaluation.tally import Progress, Save, Tally, counts
from puat_fast.noise import Noise

SAVE_EVERY = 5.0  # seconds between two states of AutoAttack; after a Ctrl-C one waits for the next


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    batch_size: int = 256,
    seed: int = 0,
    precision: SearchPrecision = "fp32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy of any classifier under one attack: `summary` of `measure`."""
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "precision": precision, "progress": progress}
    return summary(spec, measure(model, images, labels, spec, **settings), precision)


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    batch_size: int = 256,
    seed: int = 0,
    precision: SearchPrecision = "fp32",
    progress: Progress | None = None,
    saved: State | None = None,
    save: Save | None = None,
) -> State:
    """The verdicts of a classifier under one attack on images: clean, pgd or aa.

    images: uint8 N x 3 x 32 x 32, labels: int64 N; model: images in [0,1] -> logits. precision: of the search; what it
    found is judged in float32. save gets a state from time to time (pgd: after each batch); given back as `saved`, with
    all else the same, the attack goes on there and ends as if it had never stopped. What `save` raises ends it.

    Returns a state: columns["right"], bool N, whether each image is still right; examples, see `Examples`; seconds; for
    AutoAttack also "found": see `summary`.
    """
    if spec.kind == "aa":
        return _autoattack(model, images, labels, spec, batch_size, seed, precision, progress, saved, save)
    device = next(model.parameters(), images).device
    step_size = spec.step_size
    assert step_size is not None
    tally = Tally(spec.name, ("right",), len(images), Noise(seed, "cpu"), saved, save, progress)

    warned: list[str] = list(tally.extra.get("warned", ()))  # a text for each batch that pgd warns of

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with searching(model, precision, device), _attack_warnings(warned):
            return pgd(model, x, y, eps=spec.eps, step_size=step_size, num_steps=spec.num_steps, noise=noise)

    def note(batch: accuracy.Batch) -> None:
        if spec.kind != "clean" and not tally.examples.full:
            with torch.no_grad():
                before = model(batch.x).argmax(1)
            tally.examples.add(batch.first, batch.y, before, batch.told, batch.x, batch.x_adv)
        tally.add({"right": batch.right}, {"warned": list(warned)})

    with searching(model, "fp32", device):
        accuracy.walk(
            model, images, labels, None if spec.kind == "clean" else attack, note,
            noise=tally.noise, batch_size=batch_size, first=tally.done,
        )  # fmt: skip
    return tally.state() | {"extra": {}, "found": {"warnings": _first(warned)} if warned else {}}


@contextmanager
def _attack_warnings(texts: list[str]) -> Iterator[None]:
    """Inside, texts of AttackWarnings go to `texts`; other warnings are given when it ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, AttackWarning):
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _first(texts: Sequence[str]) -> list[str]:
    """One line for all batches."""
    return [texts[0] if len(texts) == 1 else f"{texts[0]} (in the first of {len(texts)} batches like this)"]


def summary(spec: AttackSpec, state: State, precision: SearchPrecision = "fp32") -> dict[str, Any]:
    """What a finished state comes to: accuracy, correct, n, eps, step_size, num_steps, precision, seconds.

    `warnings`, where there are any: why not to trust it. For AutoAttack also `after`: accuracy before and after each of
    its attacks; `broken_by`: for each image the attack that broke it, "clean" or None; `attack_seconds`.
    """
    return {
        **counts(state["columns"]["right"]), "eps": spec.eps, "step_size": spec.step_size, "num_steps": spec.num_steps,
        "precision": precision, "seconds": round(state["seconds"], 3), **state.get("found", {}),
    }  # fmt: skip


def _autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec, batch_size: int, seed: int,
    precision: SearchPrecision, progress: Progress | None, saved: State | None, save: Save | None,
) -> State:  # fmt: skip
    n = len(labels)
    start = perf_counter() - (saved["seconds"] if saved else 0.0)

    def tell(attack: str, done: int, total: int, accuracy_so_far: float) -> None:
        if progress is not None:  # of runs against target classes, as images
            progress(f"{spec.name} {attack}", n * done // max(total, 1), n, accuracy_so_far)

    def keep(state: State) -> None:
        if save is not None:
            save({"autoattack": state, "seconds": perf_counter() - start})

    x = images.float().div(255)
    found = autoattack(
        model, x, labels, spec.eps, iterations=spec.num_steps, batch_size=batch_size, seed=seed, progress=tell,
        precision=precision, saved=saved["autoattack"] if saved else None, save=None if save is None else keep,
        save_every=SAVE_EVERY,
    )  # fmt: skip
    return {
        "columns": {"right": found.robust}, "examples": _examples(found, x, labels).state_dict(),
        "seconds": perf_counter() - start,
        "found": {
            "after": found.accuracy, "broken_by": list(found.broken_by),
            "attack_seconds": {name: round(seconds, 3) for name, seconds in found.seconds.items()},
            "warnings": list(found.warnings),
        },
    }  # fmt: skip


def _examples(found: AutoAttackResult, x: Tensor, labels: Tensor) -> Examples:
    examples = Examples()
    wrong_before = torch.tensor([name == "clean" for name in found.broken_by], dtype=torch.bool)
    y, y_adv = labels.cpu(), found.y_adv.cpu()
    examples.add(0, y, torch.where(wrong_before, y_adv, y), y_adv, x, found.x_adv)
    return examples
