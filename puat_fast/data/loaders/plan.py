"""What one step takes, before any image is touched: which images, their labels, and how each is augmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.data.sampler import IntArray


@dataclass(frozen=True)
class Draws:
    """How each image of a step is augmented, one row per image; None: nobody is. D's images stay as they are.

    top_left: int64, N x 2, corner of the crop in the padded image, 0 to 2 pad; flip: bool, N; angle: float32, N,
    degrees, as `ops.augment` turns.
    """

    pad: int
    top_left: IntArray | None = None
    flip: npt.NDArray[np.bool_] | None = None
    angle: npt.NDArray[np.float32] | None = None

    def cos_sin(self) -> npt.NDArray[np.float32] | None:
        """Of the angles, float32, N x 2, rounded from float64: the same numbers in every loader."""
        if self.angle is None:
            return None
        angle = np.deg2rad(self.angle.astype(np.float64))
        return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and rotation of C's images by the loader: options of `config.AugmentConfig`, and a seed.

    Draws are a pure function of (seed, step): Philox is a generator whose state is a counter, and the step is it. So
    the state of the draws is one number, the same in every process of a run, and going back costs nothing.
    """

    crop_pad: int
    flip: bool
    rotate_deg: float
    scope: str  # "image", or "batch": one draw for all of x_l, and one for all of x_u
    seed: int

    def draw(self, step: int, sizes: Sequence[int]) -> Draws:
        """Draws of a step; sizes: of its parts, of which the last two are C's."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        n, ours = sum(sizes), sizes[-2:]
        rows = [1, 1] if self.scope == "batch" else list(ours)

        def of_all(drawn: npt.NDArray[Any], none: float) -> npt.NDArray[Any]:
            """Rows of every image: D's, which come first, are left as they are."""
            if self.scope == "batch":
                drawn = drawn.repeat(ours, axis=0)
            return np.concatenate([np.full((n - len(drawn), *drawn.shape[1:]), none, drawn.dtype), drawn])

        top_left = rng.integers(0, 2 * self.crop_pad, (sum(rows), 2), endpoint=True)
        flip = rng.random(sum(rows)) < 0.5
        angle = ((rng.random(sum(rows)) * 2 - 1) * self.rotate_deg).astype(np.float32)
        return Draws(
            self.crop_pad,
            of_all(top_left, self.crop_pad) if self.crop_pad else None,
            of_all(flip, False) if self.flip else None,
            of_all(angle, 0) if self.rotate_deg else None,
        )


@dataclass(frozen=True)
class Plan:
    """One step: int64 indices of all its images, in order, and the int64 labels of its labelled parts, in order.

    sizes: of the parts. Of each D update x_l, x_u, x_ud, then of the C update x_l, x_u; 0 without unlabelled data.
    """

    indices: IntArray
    sizes: tuple[int, ...]
    labels: IntArray
    draws: Draws | None  # None: the loader does not augment


def assemble(plan: Plan, x: Tensor, y: Tensor) -> StepBatch:
    """The StepBatch of a plan: views of x, all its images (N x 3 x 32 x 32), and of y, all its labels."""
    images = torch.split(x, list(plan.sizes))
    labels = torch.split(y, [*plan.sizes[:-2:3], plan.sizes[-2]])
    unlabelled = [part if len(part) else None for part in images]
    disc = [
        DiscBatch(images[3 * k], labels[k], unlabelled[3 * k + 1], unlabelled[3 * k + 2])
        for k in range(len(labels) - 1)
    ]
    return StepBatch(D=disc, C=SemiBatch(images[-2], labels[-1], unlabelled[-1]))


_DTYPES = {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool}


def send(device: torch.device, *arrays: npt.NDArray[Any] | None) -> list[Any]:
    """Small int64, float32 and bool arrays as tensors on the device, in one pinned message; None stays None.

    The widest types come first: a tensor must start at a multiple of its item's size.
    """
    given = [np.ascontiguousarray(array) for array in arrays if array is not None]
    message = torch.from_numpy(np.concatenate([array.reshape(-1).view(np.uint8) for array in given]))
    if device.type == "cuda":
        message = message.pin_memory()  # so that the copy does not make the host wait for the device
    parts = message.to(device, non_blocking=True).split([array.nbytes for array in given])
    tensors = iter([part.view(_DTYPES[a.dtype.name]).view(a.shape) for part, a in zip(parts, given, strict=True)])
    return [None if array is None else next(tensors) for array in arrays]
