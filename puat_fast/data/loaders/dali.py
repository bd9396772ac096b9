"""NVIDIA DALI, pipeline mode: its threads, or its GPU kernels, crop, flip and rotate. `pip install "puat-fast[dali]"`.

DALI draws nothing. Positions, mirrors and angles are arguments of each image, taken from the plan: so its images are
those of the other loaders, bit for bit but for rotation, where a checkpoint is the sampler's state and a step number,
and throwing prefetched steps away cannot disturb any stream. (Its own draws would have to be kept by DALI's
checkpoints, after the step handed out, not after those prefetched; and a crop position drawn from a continuous range
is rounded, which makes the two ends half as likely as the others. Ours are from the discrete set {i / (2 pad)}.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puat_fast.config import ConfigError
from puat_fast.data.loaders.base import PrefetchingLoader
from puat_fast.data.loaders.plan import Draws, send
from puat_fast.ops import augment


class DaliLoader(PrefetchingLoader):
    """A DALI pipeline fed with uint8 rows; on the CPU where the device is. Arguments: BaseLoader's, and num_threads.

    With a crop the images are padded once, in host memory, and a crop is then a slice. The pipeline gives uint8, and
    `ops.augment` makes u/255 of it on the device: DALI would multiply by the rounded 1/255. Raises ConfigError where
    DALI is not installed.
    """

    kind = "dali"

    def __init__(self, images: npt.NDArray[np.uint8], *args: Any, num_threads: int = 2, **options: Any) -> None:
        super().__init__(images, *args, **options)
        if num_threads < 1:
            raise ValueError(f"num_threads: {num_threads}, expected at least 1")
        self._dali = _import_dali()
        self._num_threads, self._shape = num_threads, images.shape[1:]
        p = self.augmentation.crop_pad if self.augmentation else 0
        self._images = np.pad(images, ((0, 0), (0, 0), (p, p), (p, p))) if p else images
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pipeline: Any = None

    def _start(self) -> None:
        assert self._n_disc is not None
        dali = self._dali
        on_gpu = self._stream is not None
        device_id = (
            (self.device.index if self.device.index is not None else torch.cuda.current_device()) if on_gpu else None
        )
        self._pipeline = dali.Pipeline(
            batch_size=self.images_per_step(self._n_disc),
            num_threads=self._num_threads,
            device_id=device_id,
            prefetch_queue_depth=self.DEPTH,
        )
        with self._pipeline:
            self._pipeline.set_outputs(self._graph(on_gpu))
        self._pipeline.build()
        self._pipeline.schedule_run()  # the first call fills the queue

    def _graph(self, on_gpu: bool) -> Any:
        fn, types, a = self._dali.fn, self._dali.types, self.augmentation
        crop, flip, turn = (False, False, False) if a is None else (a.crop_pad > 0, a.flip, a.rotate_deg > 0)
        names = ["image"] + ["top", "left"] * crop + ["flip"] * flip + ["angle"] * turn
        outputs = fn.external_source(
            source=self._rows,
            num_outputs=len(names),
            dtype=[
                types.UINT8 if name == "image" else types.INT32 if name == "flip" else types.FLOAT for name in names
            ],
            ndim=[3 if name == "image" else 0 for name in names],
            layout=["CHW" if name == "image" else "" for name in names],
        )
        given = dict(zip(names, outputs, strict=True))
        x = given["image"].gpu() if on_gpu else given["image"]
        if crop or flip or turn:
            draws = {"crop_pos_y": given["top"], "crop_pos_x": given["left"]} if crop else {}
            draws |= {"mirror": given["flip"]} if flip else {}
            layout = "HWC" if turn else "CHW"  # rotate wants channels last
            x = fn.crop_mirror_normalize(x, crop=self._shape[1:], dtype=types.UINT8, output_layout=layout, **draws)
        if turn:
            x = fn.rotate(x, angle=given["angle"], interp_type=types.INTERP_NN, fill_value=0, keep_size=True)
            x = fn.transpose(x, perm=[2, 0, 1])
        return x

    def _rows(self) -> list[npt.NDArray[Any]]:
        """What a run of the pipeline is fed with; DALI calls it in the thread of `next_step`."""
        plan = self._next_plan()
        d = plan.draws or Draws(0)
        rows: list[npt.NDArray[Any]] = [self._images[plan.indices]]
        if d.top_left is not None:
            rows += [(offset / (2 * d.pad)).astype(np.float32) for offset in d.top_left.T]
        if d.flip is not None:
            rows.append(d.flip.astype(np.int32))
        if d.angle is not None:
            rows.append(d.angle)
        return rows

    def _fetch(self) -> tuple[Tensor, Tensor]:
        (output,) = self._pipeline.share_outputs()
        plan = self._ahead[0][0]
        with torch.cuda.stream(self._stream):  # of None: nothing
            images = torch.empty((len(plan.indices), *self._shape), dtype=torch.uint8, device=self.device)
            # A copy, for which the host waits: on a stream of its own, not behind the step that is training.
            self._dali.feed_ndarray(output.as_tensor(), images, cuda_stream=self._stream)
        self._pipeline.release_outputs()
        self._pipeline.schedule_run()
        if self._stream is not None:
            images.record_stream(torch.cuda.current_stream(self.device))
        (y,) = send(self.device, plan.labels)
        return augment(images, dtype=self.dtype), y

    def _stop(self) -> None:
        if self._pipeline is not None:
            # What its __del__ does; that would come too late while the traceback of an error holds the pipeline.
            self._pipeline._shutdown()
        self._pipeline = None


class _Dali:
    """The parts of DALI that are used."""

    def __init__(self) -> None:
        from nvidia import dali
        from nvidia.dali import fn, types
        from nvidia.dali.plugin import pytorch

        self.Pipeline: Any = dali.Pipeline
        self.fn: Any = fn
        self.types: Any = types
        self.feed_ndarray: Any = pytorch.feed_ndarray


def _import_dali() -> _Dali:
    try:
        return _Dali()
    except ImportError as error:
        raise ConfigError(
            f"loader: 'dali' needs NVIDIA DALI, which cannot be imported ({error}); accepted: "
            'auto, resident, stream, torch, or after pip install "puat-fast[dali]" also dali'
        ) from error
