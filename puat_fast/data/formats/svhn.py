"""SVHN, cropped digits: train_32x32.mat and test_32x32.mat, of which label 10 is the digit 0."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from puat_fast.data.formats.base import DataError, Dataset, ImageSet, NotHere, check_labels, describe
from puat_fast.data.formats.places import Folder, Note, Place

CLASS_NAMES = tuple("0123456789")
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"
WANTED = f"{TRAIN} and {TEST}"


def load(data_dir: str | Path | None, note: Note | None = None) -> Dataset:
    """73257 training and 26032 test images (fewer where the files hold fewer), 10 classes. Raises DataError."""
    if data_dir is None:
        raise DataError(f"data_dir: svhn needs the folder that holds {WANTED}")
    place = Folder(locate(Path(data_dir).expanduser()), note)
    return Dataset("svhn", CLASS_NAMES, _read(place, TRAIN), _read(place, TEST), source=str(place.path))


def locate(path: Path) -> Path:
    """The folder of the files: `path`, its folder svhn, or that of a file. Raises NotHere."""
    folder = path.parent if path.name in (TRAIN, TEST) else path
    for here in (folder, folder / "svhn", folder / "SVHN"):
        if (here / TRAIN).is_file() or (here / TEST).is_file():
            missing = [name for name in (TRAIN, TEST) if not (here / name).is_file()]
            if missing:
                raise DataError(f"{here}: {missing[0]} missing; expected {WANTED}")
            return here
    raise NotHere(f"{path}: no SVHN here; expected {WANTED} (cropped digits, format 2)")


def _read(place: Place, name: str) -> ImageSet:
    from scipy.io import loadmat

    file = f"{place.path}/{name}"
    try:
        content = loadmat(io.BytesIO(place.read(name)), variable_names=["X", "y"])
    except Exception as error:  # scipy tells a broken file in a dozen ways
        raise DataError(f"{file}: truncated or no MATLAB file ({' '.join(str(error).split())}); get it anew") from error
    missing = [key for key in ("X", "y") if key not in content]
    if missing:
        raise DataError(f"{file}: holds no {missing[0]}; expected X and y of SVHN's cropped digits")
    x = content["X"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise DataError(f"{file}: X is {describe(x)}, expected 32 x 32 x 3 x N uint8")
    labels = check_labels(content["y"], 1, 10, file) % 10
    if len(labels) != x.shape[3] or not len(labels):
        raise DataError(f"{file}: {len(labels)} labels for {x.shape[3]} images")
    return ImageSet(np.ascontiguousarray(x.transpose(3, 2, 0, 1)), labels)
