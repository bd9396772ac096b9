"""Which training images keep their labels, which lose them, and which are held out (spec 1.8)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from puat_fast.config import ConfigError, DataConfig
from puat_fast.data.formats import DataError, Dataset, ImageSet, load_generated

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indices into the training set, int64, class by class. labelled_all = labelled and validation together."""

    labelled: IntArray
    unlabelled: IntArray
    validation: IntArray
    labelled_all: IntArray  # what stage 1 trains on where it does not leave out the validation images


def split_indices(labels: IntArray, num_classes: int, n_labelled: int, seed: int, val_fraction: float) -> Split:
    """Class-balanced split of a training set, the same for a seed as in the official code (spec 1.8).

    The indices of each class are shuffled by one generator that runs on across the classes; the first
    n_labelled / num_classes are labelled, the rest unlabelled; the first int(val_fraction * n_labelled / num_classes)
    labelled ones are the validation images. Raises ConfigError (data.n_labelled, data.val_fraction), DataError.
    """
    if n_labelled < 1 or n_labelled % num_classes:
        raise ConfigError(f"data.n_labelled: {n_labelled} is not a positive multiple of the {num_classes} classes")
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"data.val_fraction: {val_fraction} is out of range, accepted: 0 to 1, 1 excluded")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f"labels: {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    per_class = n_labelled // num_classes
    n_val = int((val_fraction * n_labelled) / num_classes)
    rng = np.random.default_rng(seed)
    labelled, unlabelled = [], []
    for c in range(num_classes):
        indices = np.flatnonzero(labels == c).astype(np.int64)
        if not len(indices):
            raise DataError(f"labels: class {c} has no training image, expected some of each of {num_classes} classes")
        if len(indices) < per_class:
            raise ConfigError(
                f"data.n_labelled: {n_labelled} asks for {per_class} labelled images per class, "
                f"but class {c} has only {len(indices)} training images"
            )
        rng.shuffle(indices)
        labelled.append(indices[:per_class])
        unlabelled.append(indices[per_class:])
    return Split(
        labelled=np.concatenate([indices[n_val:] for indices in labelled]),
        unlabelled=np.concatenate(unlabelled),
        validation=np.concatenate([indices[:n_val] for indices in labelled]),
        labelled_all=np.concatenate(labelled),
    )


def training_set(dataset: Dataset, config: DataConfig, seed: int) -> tuple[ImageSet, Split]:
    """The training images and their split, as configured; a file of more unlabelled images comes behind the others.

    Of that file only the images are used: its labels are -1 here. Raises ConfigError, DataError.
    """
    train = dataset.train
    split = split_indices(train.labels, dataset.num_classes, config.n_labelled, seed, config.val_fraction)
    if config.extra_unlabelled is None:
        return train, split
    extra = load_generated(config.extra_unlabelled)
    n = len(train)
    images = np.concatenate([train.images, extra.images])
    labels = np.concatenate([train.labels, np.full(len(extra), -1, np.int64)])
    more = np.arange(n, n + len(extra), dtype=np.int64)
    return ImageSet(images, labels), replace(split, unlabelled=np.concatenate([split.unlabelled, more]))
