"""Loss terms of many steps, accumulated on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from puat_fast.engine import distributed

CAPACITY = 64  # names of one run; the methods have some twenty


class NonFiniteError(RuntimeError):
    """A loss term became infinite or not a number: names the term and the step."""


class Stats:
    """Means of reported scalars. `report` waits for nothing; `read` is the only synchronisation.

    The sums stay where they are from the first report on, so that a captured step can add to them.
    """

    def __init__(self) -> None:
        self._step: float | Tensor = 0
        self._rows: dict[str, int] = {}
        # per row: sum, count, first step at which the value was not finite (inf: none)
        self._table: Tensor | None = None
        self._pending: dict[str, Tensor] = {}
        self._indices: dict[tuple[str, ...], Tensor] = {}

    @property
    def step(self) -> float | Tensor:
        """Step of what is reported next: a number, or a 0-d tensor on the device, which a captured step reads."""
        return self._step

    @step.setter
    def step(self, step: float | Tensor) -> None:
        self.flush()
        self._step = step

    def report(self, name: str, value: Tensor) -> None:
        """Add a detached scalar of the current step."""
        if name in self._pending:
            self.flush()
        self._pending[name] = value

    @torch.no_grad()
    def flush(self) -> None:
        """Add what was reported to the sums, all of it at once."""
        if not self._pending:
            return
        values = torch.stack([value.double() for value in self._pending.values()])
        table, index = self._table_on(values.device), self._index(tuple(self._pending), values.device)
        finite = values.isfinite()
        table[:, 0].index_add_(0, index, values)  # no name twice: the order of additions is fixed
        table[:, 1].index_add_(0, index, torch.ones_like(values))
        first = torch.where(finite, torch.inf, torch.ones_like(values) * self._step)
        table[:, 2].index_copy_(0, index, torch.minimum(table[:, 2].index_select(0, index), first))
        self._pending = {}

    def _table_on(self, device: torch.device) -> Tensor:
        if self._table is None:
            self._table = torch.zeros(CAPACITY, 3, dtype=torch.float64, device=device)
            self._table[:, 2] = torch.inf
        return self._table

    def _index(self, names: tuple[str, ...], device: torch.device) -> Tensor:
        if names not in self._indices:
            for name in names:
                self._rows.setdefault(name, len(self._rows))
            if len(self._rows) > CAPACITY:
                raise RuntimeError(f"stats: more than {CAPACITY} names, the last is {names[-1]}")
            self._indices[names] = torch.tensor([self._rows[name] for name in names], device=device)
        return self._indices[names]

    def read(self) -> dict[str, float]:
        """Mean of every name since the last reset, over all ranks.

        Raises NonFiniteError naming the earliest bad term and its step, on all ranks alike.
        """
        self.flush()
        if self._table is None:
            return {}
        table = _over_ranks(self._table[: len(self._rows)].cpu()).tolist()
        bad = [(row[2], index) for index, row in enumerate(table) if row[2] != torch.inf]
        if bad:
            step, index = min(bad)
            name = list(self._rows)[index]
            raise NonFiniteError(f"{name} is not finite in phase {name[0]} at step {step:.0f} of the stage")
        return {name: total / count for name, (total, count, _) in zip(self._rows, table, strict=True) if count}

    def discard(self) -> None:
        """Forget what was reported since the last flush: it never came to be."""
        self._pending = {}

    def reset(self) -> None:
        """Forget all values: a new epoch begins."""
        self.discard()
        if self._table is not None:
            self._table.zero_()[:, 2] = torch.inf

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulators."""
        self.flush()
        return {} if self._table is None else {name: self._table[row].clone() for name, row in self._rows.items()}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from `state_dict`."""
        self.reset()
        table = self._table_on(device)
        for name, row in state.items():
            table[self._rows.setdefault(name, len(self._rows))] = row.to(device)


def _over_ranks(table: Tensor) -> Tensor:
    """Rows [sum, count, first bad step] of all ranks as one."""
    tables = torch.stack(distributed.all_gather(table))
    return torch.cat([tables[..., :2].sum(0), tables[..., 2:].amin(0)], dim=1)
