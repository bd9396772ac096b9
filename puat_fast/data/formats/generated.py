"""More images than the dataset has: DMAT's generated .npz, and RST's pickle of pseudo-labelled ones.

Sources: DM-Improves-AT (Wang et al., 2023): arrays `image` N x 32 x 32 x 3 uint8 and `label`; RST (Carmon et al.,
2019), ti_500K_pseudo_labeled.pickle: `data` of the same shape and `extrapolated_targets`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from puat_fast.data.formats.base import IMAGE_SHAPE, DataError, ImageSet, check_labels, describe
from puat_fast.data.formats.images import to_32
from puat_fast.data.formats.npz import broken, read_npz, read_parts
from puat_fast.data.formats.unpickle import load_pickle

_ROWS = 16384  # of a part: 48 MiB
WANTED = ".npz with image and label, or .pickle with data and extrapolated_targets"


def load_generated(file: str | Path, num_classes: int | None = None) -> ImageSet:
    """Images with the labels that came with them, from 0, and below `num_classes` if that is given; a million are 3 GB.

    Raises DataError.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected {WANTED}")
    last = np.iinfo(np.int32).max if num_classes is None else num_classes - 1
    if file.suffix == ".npz":
        return _npz(file, last)
    if file.suffix in (".pickle", ".pkl", ".p"):
        return _pickle(file, last)
    raise DataError(f"{file}: {file.suffix or 'no suffix'}; expected {WANTED}")


def _npz(file: Path, last: int) -> ImageSet:
    try:
        with file.open("rb") as raw:
            labels = check_labels(read_npz(file, raw, ["label"])[0], 0, last, str(file))
    except OSError as error:
        raise broken(file, error) from error
    images, done = np.empty((len(labels), *IMAGE_SHAPE), np.uint8), 0
    for part in read_parts(file, "image", _ROWS):  # not all at once: in the file the channels come last
        if done + len(part) <= len(images):
            images[done : done + len(part)] = to_32(part, str(file))
        done += len(part)
    return _checked(ImageSet(images, labels), done, file)


def _pickle(file: Path, last: int) -> ImageSet:
    with file.open("rb") as raw:
        content = load_pickle(raw, str(file))
    for key in (b"data", b"extrapolated_targets"):
        if not isinstance(content.get(key), np.ndarray):
            raise DataError(f"{file}: {key!r} is {_found(content, key)}, expected an array")
    images = to_32(content[b"data"], str(file))
    labels = check_labels(content[b"extrapolated_targets"], 0, last, str(file))
    if len(labels) != len(images):
        raise DataError(f"{file}: {len(labels)} labels for {len(images)} images")
    return _checked(ImageSet(images, labels), len(images), file)


def _checked(data: ImageSet, images: int, file: Path) -> ImageSet:
    if images != len(data) or not images:
        raise DataError(f"{file}: {len(data)} labels for {images} images")
    return data


def _found(content: dict[bytes, Any], key: bytes) -> str:
    return describe(content[key]) if key in content else f"not among its keys ({', '.join(map(repr, content))})"
