"""Regular: cross-entropy on the labelled images, in the engine of PUAT (spec 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from puat_fast import objectives as L
from puat_fast.config import Config, FastConfig
from puat_fast.data.batch import StepBatch
from puat_fast.methods.phase import Phase, Report, Scalars
from puat_fast.networks import Networks
from puat_fast.noise import Noise


class Regular:
    """Standard training of C; one stage, the last epoch is evaluated."""

    stages: tuple[int, ...] = (2,)
    needs_unlabelled: ClassVar[bool] = False
    early_stopping: ClassVar[bool] = False
    has_generator: ClassVar[bool] = False

    def __init__(self, config: Config, nets: Networks, noise: Noise, report: Report) -> None:
        self.config, self.C, self.C_ema, self.report = config, nets.C, nets.C_ema, report

    def use(self, fast: FastConfig) -> None:
        """There is nothing to cut short but what the networks do by themselves."""

    def phases(self, stage: int, epoch: int) -> list[Phase]:
        """C alone."""
        self.C.train()
        self.C_ema.train()
        return [Phase("C", self.classifier)]

    def classifier(self, batch: StepBatch, s: Scalars, k: int) -> Iterator[Tensor]:
        """CE_ls(C(x_l), y_l)."""
        logits = self.C(batch.C.x_l)
        loss = L.cross_entropy(logits, batch.C.y_l, self.config.loss.label_smoothing)
        yield loss
        self.report("C/loss", loss.detach())
        self.report("C/clean_acc", L.accuracy(logits, batch.C.y_l))
