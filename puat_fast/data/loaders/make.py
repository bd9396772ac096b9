"""A loader by its name, and what `auto` is."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from puat_fast.config import ConfigError
from puat_fast.data.loaders.base import Loader
from puat_fast.data.loaders.plan import Augmentation
from puat_fast.data.sampler import BatchSampler, ShardedSampler

KINDS = {"resident": "ResidentLoader", "stream": "StreamLoader", "dali": "DaliLoader", "torch": "TorchLoader"}
"""Name, which is that of its module too -> class."""

SHARE = 0.25
"""Part of a GPU's free memory that the images may take: a step's activations want the rest."""


def choose(
    nbytes: int,
    device: torch.device,
    memory: Callable[[torch.device], tuple[int, int]] = torch.cuda.mem_get_info,
) -> str:
    """What `auto` is: resident, which is the fastest, or stream where nbytes of images leave a GPU too little room.

    memory: bytes of the device, (free, total).
    """
    return "stream" if device.type == "cuda" and nbytes > SHARE * memory(device)[0] else "resident"


def make_loader(
    kind: str,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    sampler: BatchSampler | ShardedSampler,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    augment: Augmentation | None = None,
) -> Loader:
    """A loader by its name, or `auto`; arguments as BaseLoader's. Raises ConfigError, ValueError."""
    if kind == "auto":
        kind = choose(images.nbytes, torch.device(device))
    if kind not in KINDS:
        raise ConfigError(f"loader: {kind!r} is not one of auto, {', '.join(KINDS)}")
    module = importlib.import_module(f"puat_fast.data.loaders.{kind}")
    loader: Loader = getattr(module, KINDS[kind])(images, labels, sampler, device, dtype, augment)
    return loader
