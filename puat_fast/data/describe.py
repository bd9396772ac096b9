"""What a dataset holds: counts, split, mean and standard deviation of its pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from puat_fast.config import Config
from puat_fast.data.formats import Dataset, ImageSet
from puat_fast.data.splits import training_set

KEYS = """\
keys of the JSON file:
  dataset, source     its name, and where it was read from
  num_classes, class_names
  train, test         images: number of them; per_class: number of each class
  split               n_labelled, val_fraction, seed that were asked for -> labelled, validation, unlabelled images;
                      impossible: why there is none
  mean, std           of the training images' pixels in [0, 1], by channel: red, green, blue
  configured          mean, std with which C normalises, by the preset"""
_ROWS = 16384


def describe(dataset: Dataset, config: Config) -> dict[str, Any]:
    """As plain values; `KEYS` documents them."""
    data = config.data
    asked = {"n_labelled": data.n_labelled, "val_fraction": data.val_fraction, "seed": config.seed}
    try:
        _, split = training_set(dataset, data, config.seed)
        parts: dict[str, Any] = {name: len(getattr(split, name)) for name in ("labelled", "validation", "unlabelled")}
    except ValueError as error:  # too many labels asked for, or a class that is empty: the rest can be told
        parts = {"impossible": str(error)}
    mean, std = statistics(dataset.train)
    return {
        "dataset": dataset.name,
        "source": dataset.source,
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "train": _counts(dataset.train, dataset.num_classes),
        "test": _counts(dataset.test, dataset.num_classes),
        "split": asked | parts,
        "mean": mean, "std": std,
        "configured": {"mean": list(data.mean), "std": list(data.std)},
    }  # fmt: skip


def statistics(data: ImageSet) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in [0, 1] by channel, exact: sums of whole numbers."""
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for start in range(0, len(data), _ROWS):
        part = data.images[start : start + _ROWS]
        total += part.sum((0, 2, 3), dtype=np.int64)
        squares += np.square(part, dtype=np.int32).sum((0, 2, 3), dtype=np.int64)
    n = len(data) * data.images[0, 0].size
    mean = total / n
    return (mean / 255).round(6).tolist(), (np.sqrt(squares / n - mean * mean) / 255).round(6).tolist()


def grid_images(data: ImageSet, num_classes: int, per_class: int) -> list[np.ndarray[Any, Any]]:
    """The first images of each class, N x 3 x 32 x 32 uint8 each."""
    return [np.asarray(data.images[np.flatnonzero(data.labels == k)[:per_class]]) for k in range(num_classes)]


def _counts(data: ImageSet, num_classes: int) -> dict[str, Any]:
    return {"images": len(data), "per_class": np.bincount(data.labels, minlength=num_classes).tolist()}
