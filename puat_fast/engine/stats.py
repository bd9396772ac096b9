"""Loss terms of many steps, accumulated on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from puat_fast.engine import distributed


class NonFiniteError(RuntimeError):
    """A loss term became infinite or not a number: names the term and the step."""


class Stats:
    """Means of reported scalars. `report` waits for nothing; `read` is the only synchronisation."""

    def __init__(self) -> None:
        # per name: [sum, count, first step at which the value was not finite (inf: none)]
        self.sums: dict[str, Tensor] = {}
        self.step = 0

    def report(self, name: str, value: Tensor) -> None:
        """Add a detached scalar of the current step."""
        if name not in self.sums:
            self.sums[name] = torch.tensor([0.0, 0.0, torch.inf], device=value.device, dtype=torch.float64)
        row = self.sums[name]
        row[0] += value
        row[1] += 1
        row[2] = torch.where(value.isfinite(), row[2], row[2].clamp_max(self.step))

    def read(self) -> dict[str, float]:
        """Mean of every name since the last reset, over all ranks.

        Raises NonFiniteError naming the earliest bad term and its step, on all ranks alike.
        """
        if not self.sums:
            return {}
        table = _over_ranks(torch.stack(list(self.sums.values())).cpu()).tolist()
        bad = [(row[2], index) for index, row in enumerate(table) if row[2] != torch.inf]
        if bad:
            step, index = min(bad)
            name = list(self.sums)[index]
            raise NonFiniteError(f"{name} is not finite in phase {name[0]} at step {step:.0f} of the stage")
        return {name: row[0] / row[1] for name, row in zip(self.sums, table, strict=True)}

    def reset(self) -> None:
        """Forget everything: a new epoch begins."""
        self.sums.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulators."""
        return {name: row.clone() for name, row in self.sums.items()}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from `state_dict`."""
        self.sums = {name: row.to(device) for name, row in state.items()}


def _over_ranks(table: Tensor) -> Tensor:
    """Rows [sum, count, first bad step] of all ranks as one."""
    tables = torch.stack(distributed.all_gather(table))
    return torch.cat([tables[..., :2].sum(0), tables[..., 2:].amin(0)], dim=1)
