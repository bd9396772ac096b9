"""The verdicts of an attack, batch by batch, and all that is needed to go on after any batch."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from puat_fast.evaluation.picture import Examples
from puat_fast.evaluation.record import State
from puat_fast.noise import Noise

Progress = Callable[[str, int, int, float], None]
"""progress(attack name, images done, images in all, accuracy so far): before the first batch and after each."""
Save = Callable[[State], None]


class Tally:
    """Counts an attack on `total` images, from the start or from a `saved` state, and says after each batch how it is.

    Args:
        name: of the attack, for `progress`
        columns: names of the verdicts; the first is the accuracy
        saved: a state that `save` got: its noise goes on in `noise`
    """

    def __init__(
        self, name: str, columns: tuple[str, ...], total: int, noise: Noise, saved: State | None,
        save: Save | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.name, self.total, self.noise = name, total, noise
        self.columns = {column: torch.empty(0, dtype=torch.bool) for column in columns}
        self.examples = Examples()
        self._save, self._progress = save, progress
        self._extra: State = {}
        before = 0.0
        if saved is not None:
            self.columns = dict(saved["columns"])
            self.examples = Examples(saved["examples"])
            self._extra = saved["extra"]
            noise.load_state_dict(saved["noise"])
            before = saved["seconds"]
        self._start = perf_counter() - before
        self._tell()

    @property
    def done(self) -> int:
        """Images that are done."""
        return len(next(iter(self.columns.values())))

    @property
    def extra(self) -> State:
        """What else the last `add` was given to keep."""
        return self._extra

    def add(self, verdicts: dict[str, Tensor], extra: State | None = None) -> None:
        """Note a batch: bool of as many images for each column; extra: what else is needed to go on."""
        self.columns = {name: torch.cat([rows, verdicts[name].cpu()]) for name, rows in self.columns.items()}
        self._extra = extra or {}
        if self._save is not None:
            self._save(self.state())
        self._tell()

    def state(self) -> State:
        """All of it; no later `add` changes it."""
        return {
            "columns": self.columns, "examples": self.examples.state_dict(), "noise": self.noise.state_dict(),
            "seconds": perf_counter() - self._start, "extra": self._extra,
        }  # fmt: skip

    def _tell(self) -> None:
        if self._progress is not None:
            right = next(iter(self.columns.values()))
            self._progress(self.name, self.done, self.total, right.double().mean().item() if self.done else 0.0)


def counts(right: Tensor) -> dict[str, Any]:
    """accuracy, correct, n of bool verdicts."""
    return {"accuracy": right.double().mean().item(), "correct": int(right.sum()), "n": right.numel()}
