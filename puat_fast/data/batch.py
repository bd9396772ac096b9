"""What one training step consumes: every image of the step, on the device, with static shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class SemiBatch:
    """One half-labelled batch. x: float in [0,1], N x 3 x 32 x 32; y: int64, N."""

    x_l: Tensor  # B labelled images
    y_l: Tensor  # their labels, 0 .. K-1
    x_u: Tensor | None  # B unlabelled images; None: there is no unlabelled data


@dataclass
class DiscBatch(SemiBatch):
    """The two batches of one D update: a SemiBatch, and the unlabelled half of a second one."""

    x_ud: Tensor | None  # B unlabelled images that D sees as real, with C's labels


@dataclass
class StepBatch:
    """The batches of one step, in the order in which they are drawn: n_disc D updates, then the C update."""

    D: list[DiscBatch]  # empty in a step that trains only C
    C: SemiBatch
