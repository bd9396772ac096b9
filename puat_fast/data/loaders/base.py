"""What a loader is, and what all of them share: checks, hidden labels, the plan of a step, and where the run stands.

All loaders give the same StepBatches, bit for bit, for the same seed and step, so that any of them can go on where
another one stopped: what is random is drawn here, and a loader only says how the bytes get to the device.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puat_fast.data.batch import StepBatch
from puat_fast.data.loaders.plan import Augmentation, Plan, assemble
from puat_fast.data.sampler import BatchSampler, ShardedSampler


class Loader(Protocol):
    """What the trainer takes its images from."""

    kind: str
    """Its name, as in `Config.loader`."""

    def next_step(self, n_disc: int) -> StepBatch:
        """The batches of one step with n_disc D updates."""
        ...

    def images_per_step(self, n_disc: int) -> int:
        """How many images `next_step(n_disc)` holds, for the progress line."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, after the last step handed out, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...

    def close(self) -> None:
        """End threads and processes. May be called twice."""
        ...


class BaseLoader:
    """The plans of the steps, and their state.

    images: uint8, N x 3 x H x W, an array or np.memmap; labels: int64, N, of which only those of `sampler.labelled` are
    ever read (spec 5.2, 16); dtype: of the images in [0,1], exactly u/255; augment: what is done to C's images, and
    None leaves that to C. Raises ValueError.
    """

    kind: str

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        sampler: BatchSampler | ShardedSampler,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        augment: Augmentation | None = None,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images: {images.shape} {images.dtype}, expected N x 3 x 32 x 32 uint8")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: {labels.shape} for {len(images)} images")
        used = np.concatenate([sampler.labelled, sampler.unlabelled])
        if used.min() < 0 or used.max() >= len(images):
            raise ValueError(f"sampler: indices {used.min()} to {used.max()}, there are {len(images)} images")
        self.sampler, self.augmentation = sampler, augment
        self.device = torch.device(device)
        self.dtype = dtype
        # The true labels of unlabelled and validation images end here: training has nothing to read them from.
        self._labels = np.full(len(images), -1, np.int64)
        self._labels[sampler.labelled] = labels[sampler.labelled]
        self._step = 0

    def images_per_step(self, n_disc: int) -> int:
        """How many images `next_step(n_disc)` puts into its StepBatch."""
        n_l, n_u = self.sampler.n_labelled, self.sampler.n_unlabelled
        return n_disc * (n_l + 2 * n_u) + n_l + n_u

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state and the number of the step, which is the state of the augmentation's draws."""
        return self._position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the step after which `state` was taken, by a loader of any kind. Raises ValueError."""
        self._go_to(state)

    def close(self) -> None:
        """Nothing runs beside."""

    def _plan(self, n_disc: int) -> Plan:
        """Draw the next step.

        A D update takes two batches of the sampler, of the second only the unlabelled half; without unlabelled data
        it takes one.
        """
        drawn = []  # the indices of each part of the step, in order
        for _ in range(n_disc):
            a = next(self.sampler)
            b = next(self.sampler) if self.sampler.n_unlabelled else a
            drawn += [a.labelled, a.unlabelled, b.unlabelled]
        c = next(self.sampler)
        drawn += [c.labelled, c.unlabelled]
        labels = self._labels[np.concatenate([*drawn[0:-2:3], c.labelled])]
        if labels.min() < 0:
            raise RuntimeError("loader: the sampler gave an image without a label as a labelled one")
        sizes = tuple(map(len, drawn))
        draws = None if self.augmentation is None else self.augmentation.draw(self._step, sizes)
        self._step += 1
        return Plan(np.concatenate(drawn), sizes, labels, draws)

    def _position(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "step": self._step}

    def _go_to(self, position: dict[str, Any]) -> None:
        self.sampler.load_state_dict(position["sampler"])
        self._step = position["step"]


class PrefetchingLoader(BaseLoader):
    """A loader that works on later steps while one trains.

    Plans are drawn ahead, for as long as n_disc stays; where it changes, what was prefetched is thrown away and the
    draws go back to just after the last step handed out. A kind adds `_start`, `_fetch` and `_stop`. After an error,
    and after `close`, nothing runs any more, and `next_step` would begin anew where it stood.
    """

    DEPTH: ClassVar[int] = 2
    """Steps ahead."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._n_disc: int | None = None  # of the steps that are prefetched; None: nothing runs
        self._ahead: deque[tuple[Plan, dict[str, Any]]] = deque()  # plans drawn, and where each left the draws
        self._handed_out = self._position()

    def next_step(self, n_disc: int) -> StepBatch:
        """The batches of a step with n_disc D updates (0: C only); x_u and x_ud are None without unlabelled data.

        The images are views of one tensor of their own. Raises what a thread or process beside has raised.
        """
        try:
            if self._n_disc != n_disc:
                self.close()
                self._n_disc = n_disc
                self._start()
            x, y = self._fetch()
        except BaseException:
            self.close()
            raise
        plan, self._handed_out = self._ahead.popleft()
        return assemble(plan, x, y)

    def state_dict(self) -> dict[str, Any]:
        """Where the last step handed out left sampler and draws, whatever was drawn since."""
        return self._handed_out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the step after which `state` was taken, by a loader of any kind. Raises ValueError."""
        self.close()
        self._go_to(state)
        self._handed_out = self._position()

    def close(self) -> None:
        """End threads and processes, and go back to just after the last step handed out."""
        if self._n_disc is not None:
            self._n_disc = None
            self._stop()
            self._ahead.clear()
            self._go_to(self._handed_out)

    def _next_plan(self) -> Plan:
        """Draw one step more ahead. In the thread of `next_step` only: there is one sampler."""
        assert self._n_disc is not None
        plan = self._plan(self._n_disc)
        self._ahead.append((plan, self._position()))
        return plan

    def _start(self) -> None:
        """Begin to prefetch: plans come from `_next_plan`."""
        raise NotImplementedError

    def _fetch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the oldest plan, on the device, in memory of their own."""
        raise NotImplementedError

    def _stop(self) -> None:
        """End what `_start` began. Also where `_start` failed half-way."""
        raise NotImplementedError
