"""The whole training set as uint8 on the device, and one gather per step: 32 x 32 sets fit with room to spare."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.data.sampler import BatchSampler, ShardedSampler
from puat_fast.ops import augment


class ResidentLoader:
    """Every image that a step needs, as one StepBatch on the device (spec 1.5).

    images: uint8, N x 3 x 32 x 32; labels: int64, N, of which only those of `sampler.labelled` are ever read
    (spec 5.2, 16); dtype: of the images in [0,1], exactly u/255. Raises ValueError.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        sampler: BatchSampler | ShardedSampler,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images: {images.shape} {images.dtype}, expected N x 3 x 32 x 32 uint8")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: {labels.shape} for {len(images)} images")
        used = np.concatenate([sampler.labelled, sampler.unlabelled])
        if used.min() < 0 or used.max() >= len(images):
            raise ValueError(f"sampler: indices {used.min()} to {used.max()}, there are {len(images)} images")
        self.sampler = sampler
        self.device = torch.device(device)
        self.dtype = dtype
        # The true labels of unlabelled and validation images end here: training has nothing to read them from.
        self._labels = np.full(len(images), -1, np.int64)
        self._labels[sampler.labelled] = labels[sampler.labelled]
        self._images = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device)

    def next_step(self, n_disc: int) -> StepBatch:
        """The batches of a step with n_disc D updates (0: C only); x_u and x_ud are None without unlabelled data.

        A D update takes two batches of the sampler, of the second only the unlabelled half; without unlabelled data
        it takes one. The images are views of one gathered tensor.
        """
        drawn = []  # the indices of each tensor of the step, in order
        for _ in range(n_disc):
            a = next(self.sampler)
            b = next(self.sampler) if self.sampler.n_unlabelled else a
            drawn += [a.labelled, a.unlabelled, b.unlabelled]
        c = next(self.sampler)
        drawn += [c.labelled, c.unlabelled]
        x, y = self._gather(drawn, [*drawn[0:-2:3], c.labelled])
        disc = [DiscBatch(x[3 * k], y[k], _or_none(x[3 * k + 1]), _or_none(x[3 * k + 2])) for k in range(n_disc)]
        return StepBatch(D=disc, C=SemiBatch(x[-2], y[-1], _or_none(x[-1])))

    def images_per_step(self, n_disc: int) -> int:
        """How many images `next_step(n_disc)` puts into its StepBatch."""
        n_l, n_u = self.sampler.n_labelled, self.sampler.n_unlabelled
        return n_disc * (n_l + 2 * n_u) + n_l + n_u

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state: nothing else of the loader changes."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the step after which `state` was taken. Raises ValueError."""
        self.sampler.load_state_dict(state)

    def _gather(
        self, drawn: list[npt.NDArray[np.int64]], labelled: list[npt.NDArray[np.int64]]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images of all index lists and labels of the labelled ones: one copy to the device, one gather."""
        labels = self._labels[np.concatenate(labelled)]
        if labels.min() < 0:
            raise RuntimeError("loader: the sampler gave an image without a label as a labelled one")
        message = torch.from_numpy(np.concatenate([*drawn, labels]))
        if self.device.type == "cuda":
            message = message.pin_memory()  # so that the copy does not make the host wait for the device
        indices, y = message.to(self.device, non_blocking=True).tensor_split([len(message) - len(labels)])
        x = augment(self._images, index=indices, dtype=self.dtype)
        return torch.split(x, [len(part) for part in drawn]), torch.split(y, [len(part) for part in labelled])


def _or_none(x: Tensor) -> Tensor | None:
    return x if len(x) else None
