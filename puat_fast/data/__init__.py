"""Data: dataset files, the labelled / unlabelled split, the batch sampler and the loaders.

Formats and splits need numpy alone; the sampler and the loaders need torch and are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from puat_fast.data.formats import DataError, Dataset, ImageSet, load_dataset
from puat_fast.data.splits import Split, split_indices

if TYPE_CHECKING:
    from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
    from puat_fast.data.loaders import Augmentation, Loader, make_loader
    from puat_fast.data.loaders.resident import ResidentLoader
    from puat_fast.data.sampler import BatchSampler, IndexBatch, LabelledSampler, SemiSupervisedSampler, ShardedSampler

__all__ = [
    "Augmentation", "BatchSampler", "DataError", "Dataset", "DiscBatch", "ImageSet", "IndexBatch", "LabelledSampler",
    "Loader", "ResidentLoader", "SemiBatch", "SemiSupervisedSampler", "ShardedSampler", "Split", "StepBatch",
    "load_dataset", "make_loader", "split_indices",
]  # fmt: skip

_NEED_TORCH = {
    "DiscBatch": "batch", "SemiBatch": "batch", "StepBatch": "batch",
    "BatchSampler": "sampler", "IndexBatch": "sampler", "LabelledSampler": "sampler",
    "SemiSupervisedSampler": "sampler", "ShardedSampler": "sampler",
    "Augmentation": "loaders", "Loader": "loaders", "make_loader": "loaders",
    "ResidentLoader": "loaders.resident",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
