"""The whole training set as uint8 on the device, and one gather per step: 32 x 32 sets fit with room to spare."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from puat_fast.data.batch import StepBatch
from puat_fast.data.loaders.base import BaseLoader
from puat_fast.data.loaders.plan import Draws, assemble, send
from puat_fast.ops import augment


class ResidentLoader(BaseLoader):
    """Every image that a step needs, as one StepBatch on the device (spec 1.5). Arguments: BaseLoader's.

    On the CPU images that may be written to, as those of an np.memmap of mode "c", stay where they are.
    """

    kind = "resident"

    def __init__(self, images: npt.NDArray[np.uint8], *args: Any, **options: Any) -> None:
        super().__init__(images, *args, **options)
        self._images = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device)

    def next_step(self, n_disc: int) -> StepBatch:
        """The batches of a step with n_disc D updates (0: C only); x_u and x_ud are None without unlabelled data.

        The images are views of one gathered tensor. One copy to the device, one gather.
        """
        plan = self._plan(n_disc)
        d = plan.draws or Draws(0)
        indices, y, top_left, cos_sin, flip = send(
            self.device, plan.indices, plan.labels, d.top_left, d.cos_sin(), d.flip
        )
        x = augment(
            self._images, index=indices, top_left=top_left, flip=flip, cos_sin=cos_sin, pad=d.pad, dtype=self.dtype
        )
        return assemble(plan, x, y)
