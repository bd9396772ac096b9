"""Dataset readers: one module per dataset, each with `load(data_dir) -> Dataset`. numpy only."""

from __future__ import annotations

from pathlib import Path

from puat_fast.data.formats import cifar10, cifar100, digits
from puat_fast.data.formats.base import DataError, Dataset, ImageSet

__all__ = ["DataError", "Dataset", "ImageSet", "load_dataset"]

_LOADERS = {"digits": digits.load, "cifar10": cifar10.load, "cifar100": cifar100.load}


def load_dataset(name: str, data_dir: str | Path | None) -> Dataset:
    """Read a dataset by name: `digits` (embedded, data_dir is ignored), `cifar10` or `cifar100`.

    `data_dir` is the folder that holds the standard folder or .tar.gz archive, the folder itself, or the archive.
    Raises DataError.
    """
    if name not in _LOADERS:
        raise DataError(f"dataset: {name!r} is not one of {', '.join(_LOADERS)}")
    return _LOADERS[name](data_dir)
