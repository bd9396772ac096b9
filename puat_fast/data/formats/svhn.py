"""SVHN, cropped digits: train_32x32.mat and test_32x32.mat, of which label 10 is the digit 0."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np

from puat_fast.data.formats.base import DataError, Dataset, ImageSet, NotHere, check_labels, describe, reason
from puat_fast.data.formats.places import Folder, Note, Place

CLASS_NAMES = tuple("0123456789")
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"
_COMPRESSED, _TYPES, _HEAD = 15, frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18}), 1024
_PLAIN = {bytes([kind, flags]) for kind in range(6, 16) for flags in (0, 2)}  # double .. uint64; logical; not complex
WANTED = f"{TRAIN} and {TEST}"


def load(data_dir: str | Path | None, note: Note | None = None) -> Dataset:
    """73257 training and 26032 test images (fewer where the files hold fewer), 10 classes. Raises DataError."""
    if data_dir is None:
        raise DataError(f"data_dir: svhn needs the folder that holds {WANTED}")
    place = Folder(locate(Path(data_dir).expanduser()), note)
    return Dataset("svhn", CLASS_NAMES, _read(place, TRAIN), _read(place, TEST), source=str(place.path))


def locate(path: Path) -> Path:
    """The folder of the files: `path`, its folder svhn, or that of a file. Raises NotHere."""
    here = find(path)
    if here is None:
        raise NotHere(f"{path}: no SVHN here; expected {WANTED} (cropped digits, format 2)")
    missing = [name for name in (TRAIN, TEST) if not (here / name).is_file()]
    if missing:
        raise DataError(f"{here}: {missing[0]} missing; expected {WANTED}")
    return here


def find(path: Path) -> Path | None:
    """The folder that holds one of the files at least."""
    folder = path.parent if path.name in (TRAIN, TEST) else path
    places = (folder, folder / "svhn", folder / "SVHN")
    return next((here for here in places if (here / TRAIN).is_file() or (here / TEST).is_file()), None)


def _refuse_bad_types(raw: bytes) -> None:
    """scipy crashes, with no exception, where a damaged file names a type of numbers that there is not.

    So look first: a MATLAB 5 file is 128 bytes and then elements, each a tag (type, size) and content; that of an array
    starts with flags, shape, name and values, elements too. Raises ValueError, struct.error, zlib.error.
    """
    order = {b"IM": "<", b"MI": ">"}.get(raw[126:128])
    if order is None or 0 in raw[:4]:
        raise ValueError("no header of MATLAB 5")
    place = 128
    while place < len(raw):
        kind, size = struct.unpack_from(order + "II", raw, place)
        head = raw[place : place + _HEAD]
        if kind == _COMPRESSED:
            head = zlib.decompressobj().decompress(head[8:], _HEAD)
        place += 8 + size
        at = 8
        for part in range(4):
            word, length = struct.unpack_from(order + "II", head, at)
            small = word >> 16  # up to four bytes of content stand in the tag itself
            if (word & 0xFFFF if small else word) not in _TYPES:
                raise ValueError(f"type {word}")
            if part == 0:
                plain = head[at + 8 : at + 12][:: 1 if order == "<" else -1][:2] in _PLAIN
            elif part == 2:
                name = head[at + 4 : at + 4 + small] if small else head[at + 8 : at + 8 + length]
                if name not in (b"X", b"y"):  # whatever else a user keeps in the file is passed over
                    break
            elif part == 3 and not plain:
                raise ValueError("no plain array of numbers")
            at += 8 if small else 8 + -(-length // 8) * 8


def _read(place: Place, name: str) -> ImageSet:
    from scipy.io import loadmat

    file = f"{place.path}/{name}"
    raw = place.read(name)
    try:
        _refuse_bad_types(raw)
        content = loadmat(io.BytesIO(raw), variable_names=["X", "y"])
    except Exception as error:  # scipy tells a broken file in a dozen ways
        raise DataError(f"{file}: truncated or no MATLAB file ({reason(error)}); get it anew") from error
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
