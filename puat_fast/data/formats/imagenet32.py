"""Down-sampled ImageNet, 32 x 32: train_data_batch_1 .. 10 and val_data, pickled or .npz, in folders or the .zip files.

Source: Chrabaszcz et al., 2017 (arXiv:1707.08819). Labels are 1 to 1000 in that release's own order of the classes,
which is that of ILSVRC's development kit. The paper takes the labels 1 to 10 (spec 1.8).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from puat_fast.data.formats.base import (
    IMAGE_SHAPE,
    DataError,
    Dataset,
    ImageSet,
    NotHere,
    check_labels,
    describe,
    reason,
)
from puat_fast.data.formats.npz import read_npz
from puat_fast.data.formats.places import Folder, Note, Place, open_place
from puat_fast.data.formats.unpickle import load_pickle

NUM_CLASSES = 1000
PAPER_CLASSES = (  # labels 1 to 10
    "kit_fox", "English_setter", "Siberian_husky", "Australian_terrier", "English_springer", "grey_whale",
    "lesser_panda", "Egyptian_cat", "ibex", "Persian_cat",
)  # fmt: skip
TRAIN = tuple(f"train_data_batch_{k}" for k in range(1, 11))
TEST = ("val_data",)
WANTED = (
    "train_data_batch_1 .. train_data_batch_10 and val_data, pickled or as .npz, in this folder or in folders of it, "
    "or Imagenet32_train.zip and Imagenet32_val.zip (or Imagenet32_train_npz.zip and Imagenet32_val_npz.zip)"
)
_ZIP = re.compile(r"imagenet32_(train|val)(_npz)?\.zip", re.IGNORECASE)
_PIXELS = int(np.prod(IMAGE_SHAPE))


def load(data_dir: str | Path | None, classes: str = "paper", note: Note | None = None) -> Dataset:
    """The paper's 10 classes (12850 training and 500 test images), or `all` 1000 (1281167 and 50000, 4 GB).

    Test images are the validation set, as in the paper. Raises DataError.
    """
    if data_dir is None:
        raise DataError(f"data_dir: imagenet32 needs the folder that holds {WANTED}")
    path = Path(data_dir).expanduser()
    found = locate(path, note)
    last = len(PAPER_CLASSES) if classes == "paper" else NUM_CLASSES
    names = PAPER_CLASSES if classes == "paper" else tuple(f"label_{k}" for k in range(1, last + 1))
    return Dataset("imagenet32", names, _read(found, TRAIN, last), _read(found, TEST, last), source=str(path))


def locate(path: Path, note: Note | None = None) -> dict[str, tuple[Place, str]]:
    """What `find` finds, with none of the eleven files missing. Raises NotHere, DataError."""
    found = find(path, note)
    missing = [stem for stem in (*TRAIN, *TEST) if stem not in found]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing; expected {WANTED}")
    return found


def find(path: Path, note: Note | None = None) -> dict[str, tuple[Place, str]]:
    """For each of the files that are there the place that holds it, and its name there. Raises NotHere."""
    found: dict[str, tuple[Place, str]] = {}
    for place, name in _files(path, note):
        stem = name.rpartition("/")[2].removesuffix(".npz")
        if stem in TRAIN or stem in TEST:
            found.setdefault(stem, (place, name))
        if len(found) == len(TRAIN) + len(TEST):  # an archive that is half of a download is no harm beside the files
            break
    if not found:
        raise NotHere(f"{path}: no ImageNet32 here; expected {WANTED}")
    return found


def _files(path: Path, note: Note | None) -> Iterator[tuple[Place, str]]:
    """Files here, then in folders of this one and in theirs, then in the archives: what is unpacked comes first."""
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected a folder that holds {WANTED}")
    top = Folder(path, note)
    folders = ["", *(name for name in top.folders())]
    folders += [f"{name}/{inner}" for name in folders[1:] for inner in top.folders(name)]
    archives = []
    for folder in folders:
        for name in top.files(folder):
            full = f"{folder}/{name}" if folder else name
            yield top, full
            archives += [path / full] if _ZIP.fullmatch(name) else []
    for archive in archives:
        place = open_place(archive, note)
        for folder in ("", *place.folders()):
            yield from ((place, f"{folder}/{name}" if folder else name) for name in place.files(folder))


def _read(found: dict[str, tuple[Place, str]], stems: tuple[str, ...], last: int) -> ImageSet:
    """Images of the labels 1 to `last`, in the order of the files, relabelled from 0."""
    images, labels = [], []
    for stem in stems:
        place, name = found[stem]
        file = f"{place.path}/{name}"
        pixels, of_file = _batch(place.read(name), name, file)
        kept = of_file <= last
        images.append(pixels[kept])  # a copy: the rest of the file is let go of
        labels.append(of_file[kept] - 1)
    if not sum(map(len, labels)):
        raise DataError(f"{file}: no image with a label of 1 to {last} in {', '.join(stems)}")
    return ImageSet(np.concatenate(images).reshape(-1, *IMAGE_SHAPE), np.concatenate(labels))


def _batch(raw: bytes, name: str, file: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """One file -> N x 3072 uint8, N int64 in 1 .. 1000."""
    if name.endswith(".npz"):
        pixels, labels = read_npz(file, io.BytesIO(raw), ("data", "labels"))
    else:
        content = load_pickle(raw, file)
        missing = [key for key in (b"data", b"labels") if key not in content]
        if missing:
            raise DataError(f"{file}: no {missing[0]!r} among its keys; expected a batch of ImageNet32")
        pixels = content[b"data"]
        try:
            labels = np.asarray(content[b"labels"])
        except ValueError as error:  # lists of unequal lengths
            raise DataError(f"{file}: labels: {reason(error)}") from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise DataError(f"{file}: data is {describe(pixels)}, expected N x {_PIXELS} uint8")
    labels = check_labels(labels, 1, NUM_CLASSES, file)
    if len(labels) != len(pixels):
        raise DataError(f"{file}: {len(labels)} labels for {len(pixels)} images")
    return pixels, labels
