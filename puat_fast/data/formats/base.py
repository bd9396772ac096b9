"""What every dataset becomes once it is read: uint8 images and int64 labels in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IMAGE_SHAPE = (3, 32, 32)


class DataError(ValueError):
    """A user's mistake or a broken file: names the file, what was found and what is expected."""


class NotHere(DataError):
    """The dataset's own files are not at this place; it may lie there in another layout."""


class BrokenFiles(DataError):
    """Files of a dataset that cannot be read. `files`: "name: reason" of each; the message shows the first few."""

    def __init__(self, place: str, files: list[str]) -> None:
        shown = "; ".join(files[:5]) + (f"; and {len(files) - 5} more" if len(files) > 5 else "")
        super().__init__(f"{place}: {len(files)} {'file' if len(files) == 1 else 'files'} cannot be read: {shown}")
        self.files = files


@dataclass(frozen=True)
class ImageSet:
    """N images and their labels. Raises DataError where the arrays are not as stated here."""

    images: npt.NDArray[np.uint8]  # N x 3 x 32 x 32, RGB, C-contiguous
    labels: npt.NDArray[np.int64]  # N, 0 .. K-1

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if x.dtype != np.uint8 or x.shape[1:] != IMAGE_SHAPE or not x.flags.c_contiguous:
            raise DataError(f"images: {describe(x)}, expected C-contiguous N x 3 x 32 x 32 uint8")
        if y.dtype != np.int64 or y.shape != x.shape[:1]:
            raise DataError(f"labels: {describe(y)}, expected {len(x)} int64")

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """A named dataset with its training and test images."""

    name: str
    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    source: str = ""  # where it was read from, for messages

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)


def check_labels(labels: npt.NDArray[Any], first: int, last: int, file: str) -> npt.NDArray[np.int64]:
    """Labels as int64, after a look that each is a whole number from `first` to `last`. Raises DataError."""
    flat = np.asarray(labels)
    if flat.ndim == 2 and 1 in flat.shape:  # MATLAB's columns
        flat = flat.reshape(-1)
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise DataError(f"{file}: labels are {describe(flat)}, expected one whole number for each image")
    wrong = flat[(flat < first) | (flat > last)]
    if len(wrong):
        raise DataError(f"{file}: label {wrong[0]}, expected {first} to {last}")
    return flat.astype(np.int64)


def reason(error: Exception) -> str:
    """What an exception tells, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def describe(value: Any) -> str:
    """Shape and dtype of an array, or the type of anything else, for error messages."""
    if isinstance(value, np.ndarray):
        return f"{' x '.join(map(str, value.shape)) or 'scalar'} {value.dtype}"
    return type(value).__name__
