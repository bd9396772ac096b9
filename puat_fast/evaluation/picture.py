"""A few examples of each attack, and the picture of them: before, after, and what was changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puat_fast.evaluation.record import State
from puat_fast.plots import ImageRow, save_grid

COLUMNS = 10
GAIN = 10
"""Times that a difference is enlarged."""
CAPTION = 11  # letters of a class name that fit below an image
_KEYS = ("index", "label", "before", "after", "x", "x_adv")


class Examples:
    """The first `COLUMNS` images that an attack broke, filled up with the first others.

    index: of the images, in the order of the test set; label; before, after: what the classifier says; x, x_adv:
    N x 3 x H x W float32. Those that were broken come first.
    """

    def __init__(self, state: State | None = None) -> None:
        self._rows: dict[str, Tensor] = dict(state or {})

    def __len__(self) -> int:
        return len(self._rows["index"]) if self._rows else 0

    def __getitem__(self, key: str) -> Tensor:
        return self._rows[key]

    @property
    def full(self) -> bool:
        """Whether further images change nothing."""
        return len(self) == COLUMNS and bool(_broken(self._rows).all())

    def add(self, first: int, label: Tensor, before: Tensor, after: Tensor, x: Tensor, x_adv: Tensor) -> None:
        """Look at the images from number `first` on, N of each."""
        index = torch.arange(first, first + len(label))
        new = dict(zip(_KEYS, (index, label.cpu(), before.cpu(), after.cpu(), x, x_adv), strict=True))
        picked = _first(new)
        new = {name: rows[picked.to(rows.device)].cpu() for name, rows in new.items()}
        new |= {name: new[name].float() for name in ("x", "x_adv")}
        if self._rows:
            new = {name: torch.cat([rows, new[name]]) for name, rows in self._rows.items()}
        picked = _first(new)
        self._rows = {name: rows[picked] for name, rows in new.items()}

    def state_dict(self) -> State:
        """Tensors by name; no later `add` changes them."""
        return dict(self._rows)


def _broken(rows: Mapping[str, Tensor]) -> Tensor:
    return (rows["before"] == rows["label"]) & (rows["after"] != rows["label"])


def _first(rows: Mapping[str, Tensor]) -> Tensor:
    """Numbers of the rows to keep: broken ones, then others, each in their order."""
    return torch.argsort((~_broken(rows)).int(), stable=True)[:COLUMNS]


def image_rows(attack: str, examples: Examples, class_names: Sequence[str]) -> list[ImageRow]:
    """Three rows of a grid: clean, adversarial, 1/2 + GAIN (x_adv - x)."""
    truth = examples["label"].tolist()
    difference = (0.5 + GAIN * (examples["x_adv"] - examples["x"])).clamp(0, 1)
    rows = []
    for label, images, told in (
        (f"{attack}: before", examples["x"], examples["before"].tolist()),
        ("after", examples["x_adv"], examples["after"].tolist()),
    ):
        rows.append(
            ImageRow(
                label=label, images=images.numpy(), captions=[_short(class_names, k) for k in told],
                good=[k == y for k, y in zip(told, truth, strict=True)],
            )
        )  # fmt: skip
    return [*rows, ImageRow(label=f"difference x {GAIN}", images=difference.numpy())]


def _short(class_names: Sequence[str], k: int) -> str:
    name = class_names[k] if k < len(class_names) else str(k)
    return name if len(name) <= CAPTION else f"{name[: CAPTION - 2]}.."


def save_picture(path: Path, examples: Mapping[str, Examples], class_names: Sequence[str], title: str) -> None:
    """Write the picture of some attacks, by name, as a PNG; of none, nothing. Raises OSError."""
    rows: list[Any] = []
    for attack, found in examples.items():
        if len(found):
            rows += image_rows(attack, found, class_names)
    if rows:
        save_grid(path, rows, title)
