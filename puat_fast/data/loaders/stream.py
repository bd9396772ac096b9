"""Images that stay in host memory or in their file; a thread brings those of the next steps to the device."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puat_fast.data.loaders.base import PrefetchingLoader
from puat_fast.data.loaders.plan import Draws, Plan, send
from puat_fast.ops import augment

Sent = tuple[Tensor, list[Any], torch.cuda.Event | None]
"""uint8 images, the small tensors beside them, and the event after which both are on the device."""


class StreamLoader(PrefetchingLoader):
    """For sets larger than the GPU's free memory: a step's uint8 rows are gathered and copied while another trains.

    Arguments: BaseLoader's. On a GPU the rows go through pinned memory on a stream of their own.
    """

    kind = "stream"

    def __init__(self, images: npt.NDArray[np.uint8], *args: Any, **options: Any) -> None:
        super().__init__(images, *args, **options)
        self._images = np.ascontiguousarray(images)  # a memmap stays one; np.take would copy any other layout each time
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._thread: ThreadPoolExecutor | None = None
        self._sent: deque[Future[Sent]] = deque()

    def _start(self) -> None:
        self._thread = ThreadPoolExecutor(1, "puat-fast-stream")
        for _ in range(self.DEPTH):
            self._submit()

    def _submit(self) -> None:
        assert self._thread is not None
        self._sent.append(self._thread.submit(self._send, self._next_plan()))

    def _send(self, plan: Plan) -> Sent:
        """In the thread: gather the rows and start their way to the device."""
        d = plan.draws or Draws(0)
        # Pinned memory comes from torch's cache, which gives a block out again only after the copies from it.
        rows = torch.empty((len(plan.indices), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=self._cuda)
        # clip: indices are in range, and for mode "raise" numpy would buffer the result
        np.take(self._images, plan.indices, axis=0, out=rows.numpy(), mode="clip")
        with torch.cuda.stream(self._stream):  # of None: nothing
            small = send(self.device, plan.labels, d.top_left, d.cos_sin(), d.flip)
            images = rows.to(self.device, non_blocking=True)
            return images, small, None if self._stream is None else self._stream.record_event()

    def _fetch(self) -> tuple[Tensor, Tensor]:
        images, small, event = self._sent.popleft().result()
        self._submit()
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in (images, *small):
                if tensor is not None:
                    tensor.record_stream(stream)  # made on the other stream: not to be given out again before its use
        y, top_left, cos_sin, flip = small
        pad = self._ahead[0][0].draws.pad if self._ahead[0][0].draws else 0
        x = augment(images, top_left=top_left, flip=flip, cos_sin=cos_sin, pad=pad, dtype=self.dtype)
        return x, y

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._sent.clear()
