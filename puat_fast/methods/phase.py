"""What an update is: the vocabulary that methods and engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from puat_fast.config import FastConfig
from puat_fast.data.batch import StepBatch

Report = Callable[[str, Tensor], None]
"""report(name, value): takes a detached scalar of the current step, e.g. ("C/uae", ...), and never waits for it."""


@dataclass(frozen=True)
class Scalars:
    """What changes with the step, computed once per step: numbers, or 0-d tensors where a captured step reads them."""

    lr: float | Tensor  # of C
    momentum: float | Tensor  # of C
    bn_momentum: float | Tensor  # of C's running statistics: 1 in the first step of a stage
    ema_decay: float | Tensor
    adv_ramp: float | Tensor  # r(t) of spec 1.4
    consistency_weight: float | Tensor  # a(t) of spec 1.4

    @property
    def adversarial(self) -> bool:
        """Whether r(t) > 0: which terms there are is known to the host."""
        return bool(self.adv_ramp != 0)

    @property
    def consistent(self) -> bool:
        """Whether a(t) > 0."""
        return bool(self.consistency_weight != 0)


Loss = Callable[[StepBatch, Scalars, int], Iterator[Tensor]]
"""loss(batch, scalars, k), k = 0 .. repeat-1: yields parts; each is backpropagated at once, so its graph is freed."""


@dataclass(frozen=True)
class Phase:
    """One update: the network it trains, its loss, how often per step."""

    net: str  # D, G, A or C
    loss: Loss
    repeat: int = 1


class Method(Protocol):
    """What the engine runs."""

    stages: tuple[int, ...]  # 1 = pretraining, 2 = training
    needs_unlabelled: ClassVar[bool]  # its batches have an unlabelled half
    early_stopping: ClassVar[bool]  # keeps the epoch of the best validation, else the last one
    has_generator: ClassVar[bool]  # there are pictures to show

    def use(self, fast: FastConfig) -> None:
        """Take the exact short cuts that `fast` names."""
        ...

    def phases(self, stage: int, epoch: int) -> list[Phase]:
        """The updates of one step, in order; sets the networks' modes for the step."""
        ...
