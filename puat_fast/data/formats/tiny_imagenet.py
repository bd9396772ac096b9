"""Tiny ImageNet, 64 x 64: the folder tiny-imagenet-200 as unpacked, its .zip, or the repack train.npz and val.npz.

The paper takes 10 of the 200 classes (spec 1.8), by their numbers in the repack of DM-Improves-AT (Wang et al., 2023).
That repack's order is taken to be that of the sorted WordNet ids, as torchvision's ImageFolder numbers classes: the ten
are then lion, alp, espresso, teddy, king penguin, tabby, obelisk, monarch, convertible and birdhouse, as unlike one
another as ten classes chosen on purpose. Images are resized from 64 to 32 as PIL does for torchvision's Resize.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from puat_fast.data.formats.base import DataError, Dataset, ImageSet, NotHere, check_labels
from puat_fast.data.formats.images import image_sets, is_image, to_32
from puat_fast.data.formats.npz import read_npz
from puat_fast.data.formats.places import Folder, Note, Place, escapes, open_place
from puat_fast.data.formats.tree import images_of

NUM_CLASSES = 200
PAPER_CLASSES = {  # number among all 200 -> (WordNet id, name), in the paper's order: label 0 is the lion
    34: ("n02129165", "lion"), 194: ("n09193705", "alp"), 193: ("n07920052", "espresso"), 161: ("n04399382", "teddy"),
    21: ("n02056570", "king_penguin"), 30: ("n02123045", "tabby"), 124: ("n03837869", "obelisk"),
    44: ("n02279972", "monarch"), 94: ("n03100240", "convertible"), 76: ("n02843684", "birdhouse"),
}  # fmt: skip
FOLDER, ARCHIVE, NPZ = "tiny-imagenet-200", "tiny-imagenet-200.zip", ("train.npz", "val.npz")
WANTED = f"{FOLDER}/ with train/ and val/ as unpacked, or {ARCHIVE}, or {' and '.join(NPZ)}"
ANNOTATIONS = "val/val_annotations.txt"


def load(data_dir: str | Path | None, classes: str = "paper", note: Note | None = None) -> Dataset:
    """The paper's 10 classes (5000 training and 500 test images), or `all` 200 (100000 and 10000).

    Test images are the val split, the only other one with labels. Raises DataError, BrokenFiles.
    """
    if data_dir is None:
        raise DataError(f"data_dir: tiny-imagenet needs the folder that holds {WANTED}")
    place, top = locate(Path(data_dir).expanduser(), note)
    if top is None:
        return _read_npz(place, classes)
    wnids = _wnids(place, top, classes)
    names = _names(place, top, wnids, classes)
    files = ([images_of(place, f"{top}train/{wnid}") for wnid in wnids], _val_images(place, top, wnids))
    for split, of_split in zip(("train", "val"), files, strict=True):
        empty = [wnid for wnid, of_class in zip(wnids, of_split, strict=True) if not of_class]
        if empty:
            raise DataError(f"{place.path}/{top}{split}: no image of {', '.join(empty[:8])}; a truncated download?")
    return Dataset("tiny-imagenet", names, *image_sets(place, *files), str(place.path))


def locate(path: Path, note: Note | None = None) -> tuple[Place, str | None]:
    """Where it lies: a place and the folder in it that holds train/ and val/, or None for the .npz. Raises NotHere."""
    if path.is_file() and path.name in NPZ:
        path = path.parent
    for place in _places(path, note):
        if set(NPZ) <= set(place.files()):
            return place, None
        for top in ("", *(f"{name}/" for name in place.folders() if "tiny" in name.lower())):
            if place.folders(f"{top}train") and (place.folders(f"{top}val") or place.files(f"{top}val/images")):
                return place, top
    raise NotHere(f"{path}: no Tiny ImageNet here; expected {WANTED}")


def _places(path: Path, note: Note | None) -> Iterator[Place]:
    """Where to look, one after the other: an archive that is half of a download is no harm beside the folder."""
    place = open_place(path, note)
    if path.is_dir():
        # Folders of that name come first: beside them there may be somebody else's train/ and val/. People rename the
        # folder, or unpack it into itself.
        inner = sorted(place.folders(), key=lambda name: name != FOLDER)
        yield from (Folder(path / name, note) for name in inner if "tiny" in name.lower())
    yield place
    if (path / ARCHIVE).is_file():
        yield open_place(path / ARCHIVE, note)


def _wnids(place: Place, top: str, classes: str) -> list[str]:
    found = place.folders(f"{top}train")
    wanted = [wnid for wnid, _ in PAPER_CLASSES.values()] if classes == "paper" else found
    missing = [wnid for wnid in wanted if wnid not in found]
    if missing or (classes != "paper" and len(found) != NUM_CLASSES):
        what = f"no {', '.join(missing)}" if missing else f"{len(found)} class folders, expected {NUM_CLASSES}"
        raise DataError(f"{place.path}/{top}train: {what}; a truncated download? expected {WANTED}")
    return wanted


def _names(place: Place, top: str, wnids: Sequence[str], classes: str) -> tuple[str, ...]:
    if classes == "paper":
        return tuple(name for _, name in PAPER_CLASSES.values())
    if "words.txt" not in place.files(top.rstrip("/")):
        return tuple(wnids)
    rows = (line.partition("\t") for line in place.read(f"{top}words.txt").decode("utf-8", "replace").splitlines())
    words = {wnid: text.split(",")[0].strip() for wnid, _, text in rows}
    return tuple(words.get(wnid) or wnid for wnid in wnids)


def _val_images(place: Place, top: str, wnids: Sequence[str]) -> list[list[str]]:
    """Paths of each class's val images: in class folders, or in val/images and named in val_annotations.txt."""
    folders = set(place.folders(f"{top}val"))
    if set(wnids) <= folders:
        return [images_of(place, f"{top}val/{wnid}") for wnid in wnids]
    annotations = top + ANNOTATIONS
    if PurePosixPath(ANNOTATIONS).name not in place.files(f"{top}val"):
        raise DataError(f"{place.path}/{annotations}: missing, and val/ holds no folder for each class; {WANTED}")
    of_class: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    for number, line in enumerate(place.read(annotations).decode("utf-8", "replace").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 2 or not is_image(fields[0]) or escapes(fields[0]):
            raise DataError(f"{place.path}/{annotations}: line {number} is {line[:40]!r}, expected `val_0.JPEG n0...`")
        if fields[1] in of_class:
            of_class[fields[1]].append(f"{top}val/images/{fields[0]}")
    return [of_class[wnid] for wnid in wnids]


def _read_npz(place: Place, classes: str) -> Dataset:
    numbers = list(PAPER_CLASSES) if classes == "paper" else list(range(NUM_CLASSES))
    names = tuple(PAPER_CLASSES[k][1] for k in numbers) if classes == "paper" else tuple(map(str, numbers))
    sets: list[ImageSet] = []
    for name in NPZ:
        file = f"{place.path}/{name}"
        images, labels = read_npz(file, io.BytesIO(place.read(name)), ("image", "label"))
        labels = check_labels(labels, 0, NUM_CLASSES - 1, file)
        if len(labels) != len(images):
            raise DataError(f"{file}: {len(labels)} labels for {len(images)} images")
        order = [np.flatnonzero(labels == k) for k in numbers]  # class by class, as the official code has them
        empty = [k for k, rows in zip(numbers, order, strict=True) if not len(rows)]
        if empty:
            raise DataError(f"{file}: no image of class {empty[0]}, expected some of each of {len(numbers)} classes")
        relabelled = np.repeat(np.arange(len(numbers)), [len(rows) for rows in order]).astype(np.int64)
        sets.append(ImageSet(to_32(images[np.concatenate(order)], file), relabelled))
    return Dataset("tiny-imagenet", names, sets[0], sets[1], source=str(place.path))
