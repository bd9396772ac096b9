"""Class-per-folder image trees: train/<class>/*.png and test/<class>/*.png, images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puat_fast.data.formats.base import DataError, Dataset, NotHere
from puat_fast.data.formats.images import image_sets, is_image
from puat_fast.data.formats.places import Note, Place, open_place

TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation")
WANTED = "train/<class>/*.png (or .jpg, ...) and test/<class>/*.png, or val/ for test/"


def load(
    name: str, data_dir: str | Path | None, class_names: Sequence[str] | None = None, note: Note | None = None
) -> Dataset:
    """Read a tree at `data_dir` or in its folder `name`, or in a zip of it; images of other sizes become 32 x 32.

    Classes are numbered in the order of `class_names`, by those names or by their numbers; without it in the order of
    the folders' names, as numbers where they are numbers. Images are in the order of their names, class by class.
    Raises NotHere, BrokenFiles, DataError.
    """
    if data_dir is None:
        raise DataError(f"data_dir: {name} needs the folder that holds {WANTED}")
    place = open_place(Path(data_dir).expanduser(), note)
    for top in ("", name):
        train = _split(place, top, TRAIN)
        test = _split(place, top, TEST)
        if train is not None and test is not None:
            return _read(name, place, train, test, class_names)
    raise NotHere(f"{place.path}: no image tree here; expected {WANTED}")


def images_of(place: Place, folder: str) -> list[str]:
    """Paths of a class's images: right in its folder, or in its `images` folder as Tiny ImageNet has them."""
    for where in (folder, f"{folder}/images"):
        found = [f"{where}/{name}" for name in place.files(where) if is_image(name)]
        if found:
            return found
    return []


def _split(place: Place, top: str, names: Sequence[str]) -> str | None:
    """The folder of a split: the first of `names` that holds class folders."""
    for split in (f"{top}/{name}" if top else name for name in names):
        if place.folders(split):
            return split
    return None


def _read(name: str, place: Place, train: str, test: str, class_names: Sequence[str] | None) -> Dataset:
    folders = place.folders(train)
    names = tuple(class_names) if class_names is not None else tuple(_numbered(folders))
    if len(names) < 2:
        raise DataError(f"{place.path}/{train}: one class folder ({names[0]}), expected two at least")
    known = class_names is not None
    files = (_files(place, train, names, known), _files(place, test, names, known))
    return Dataset(name, names, *image_sets(place, *files), str(place.path))


def _numbered(folders: list[str]) -> list[str]:
    return sorted(folders, key=int) if all(folder.isdecimal() for folder in folders) else folders


def _files(place: Place, split: str, names: tuple[str, ...], known: bool) -> list[list[str]]:
    found = set(place.folders(split))
    numbers = [str(k) for k in range(len(names))]
    folders = numbers if known and found == set(numbers) else list(names)
    missing, strange = [f for f in folders if f not in found], sorted(found - set(folders))
    if missing or strange:
        parts = [f"no folder {', '.join(missing[:8])}" * bool(missing), f"has {', '.join(strange[:8])}" * bool(strange)]
        what = "its class names or numbers" if known else "the classes of the training images"
        raise DataError(f"{place.path}/{split}: {', '.join(filter(None, parts))}; expected a folder for each of {what}")
    files = [images_of(place, f"{split}/{folder}") for folder in folders]
    empty = [folder for folder, of_class in zip(folders, files, strict=True) if not of_class]
    if empty:
        raise DataError(f"{place.path}/{split}: no image in {', '.join(empty[:8])}")
    return files
