"""torch.utils.data.DataLoader, as baselines use it: an image at a time, in worker processes. The slowest loader."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from puat_fast.data.loaders.base import PrefetchingLoader
from puat_fast.data.loaders.plan import Draws, Plan, send
from puat_fast.ops import augment

Item = tuple[int, tuple[int, int] | None, bool, tuple[float, float] | None]
"""What a worker is told of an image: index, corner of the crop, flip, cosine and sine of the angle."""


class TorchLoader(PrefetchingLoader):
    """A DataLoader with num_workers processes, which augment on the CPU. Arguments: BaseLoader's, and num_workers."""

    kind = "torch"

    def __init__(self, images: npt.NDArray[np.uint8], *args: Any, num_workers: int = 2, **options: Any) -> None:
        super().__init__(images, *args, **options)
        if num_workers < 1:
            raise ValueError(f"num_workers: {num_workers}, expected at least 1")
        self._dataset = _Images(images, self.augmentation.crop_pad if self.augmentation else 0)
        self._num_workers = num_workers
        self._batches: Any = None

    def _start(self) -> None:
        # One iterator for all steps: it is the batch sampler that never ends, so the workers are started once. They are
        # forked, so that they share the images; they touch no GPU. The generator is given so that torch's global one
        # stays as it is.
        self._batches = iter(
            DataLoader(
                self._dataset,
                batch_sampler=self._items(),
                num_workers=self._num_workers,
                multiprocessing_context="fork",
                worker_init_fn=_leave_interrupts,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
            )
        )

    def _items(self) -> Iterator[list[Item]]:
        while True:
            yield _items(self._next_plan())

    def _fetch(self) -> tuple[Tensor, Tensor]:
        images = next(self._batches).to(self.device, non_blocking=True)
        (y,) = send(self.device, self._ahead[0][0].labels)
        return augment(images, dtype=self.dtype), y

    def _stop(self) -> None:
        if self._batches is not None:
            # What its __del__ does; that would come too late while the traceback of an error holds the iterator.
            self._batches._shutdown_workers()
        self._batches = None


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C is sent to workers too, but is the trainer's: it ends its step, saves, and closes the loader."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _items(plan: Plan) -> list[Item]:
    d, n = plan.draws or Draws(0), len(plan.indices)
    top_left = [None] * n if d.top_left is None else map(tuple, d.top_left.tolist())
    flip = [False] * n if d.flip is None else d.flip.tolist()
    cos_sin = d.cos_sin()
    turns = [None] * n if cos_sin is None else map(tuple, cos_sin.tolist())
    return list(zip(plan.indices.tolist(), top_left, flip, turns, strict=True))


class _Images(Dataset[npt.NDArray[np.uint8]]):
    def __init__(self, images: npt.NDArray[np.uint8], pad: int) -> None:
        self.images, self.pad = images, pad

    def __getitem__(self, item: Item) -> npt.NDArray[np.uint8]:
        """Crop, flip, rotation, in this order."""
        index, top_left, flip, cos_sin = item
        x = self.images[index]
        if top_left is not None:
            (top, left), p = top_left, self.pad
            x = np.pad(x, ((0, 0), (p, p), (p, p)))[:, top : top + x.shape[1], left : left + x.shape[2]]
        if flip:
            x = x[:, :, ::-1]
        return np.ascontiguousarray(x if cos_sin is None else _rotate(x, *cos_sin))


def _rotate(x: npt.NDArray[np.uint8], cos: float, sin: float) -> npt.NDArray[np.uint8]:
    """Nearest pixel, fill 0: the formula of `ops.augment`, in float32 and in its order, hence the same pixels."""
    c, s = np.float32(cos), np.float32(sin)
    height, width = x.shape[1:]
    h, w = np.float32((height - 1) / 2), np.float32((width - 1) / 2)
    dy, dx = np.arange(height, dtype=np.float32)[:, None] - h, np.arange(width, dtype=np.float32) - w
    rows, columns = np.rint(s * dx + c * dy + h), np.rint(c * dx - s * dy + w)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = (np.where(inside, at, 0).astype(np.int64) for at in (rows, columns))
    return np.where(inside, x[:, rows, columns], np.uint8(0))
