"""Dataset readers: one module per dataset or layout, each with a `load` that gives a Dataset. numpy, no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from puat_fast.data.formats import cifar10, cifar100, digits, imagenet32, prepared, svhn, tiny_imagenet, tree
from puat_fast.data.formats.base import BrokenFiles, DataError, Dataset, ImageSet, NotHere
from puat_fast.data.formats.generated import load_generated
from puat_fast.data.formats.places import Note

__all__ = ["BrokenFiles", "DataError", "Dataset", "ImageSet", "load_dataset", "load_generated", "read_dataset"]

Reader = Callable[[str | Path | None, str, Note | None], Dataset]

_READERS: dict[str, Reader] = {
    "digits": lambda data_dir, classes, note: digits.load(),
    "cifar10": lambda data_dir, classes, note: cifar10.load(data_dir, note),
    "cifar100": lambda data_dir, classes, note: cifar100.load(data_dir, note),
    "svhn": lambda data_dir, classes, note: svhn.load(data_dir, note),
    "tiny-imagenet": tiny_imagenet.load,
    "imagenet32": imagenet32.load,
    "folder": lambda data_dir, classes, note: tree.load("folder", data_dir, None, note),
}
_TREE_NAMES = {  # the sets that people also keep as images in class folders, and what those are called
    "cifar10": cifar10.LAYOUT.class_names, "cifar100": cifar100.LAYOUT.class_names, "svhn": svhn.CLASS_NAMES,
}  # fmt: skip


def load_dataset(name: str, data_dir: str | Path | None, classes: str = "paper") -> Dataset:
    """A dataset by name: what `puat-fast data prepare` wrote into `data_dir`, or else the original files there.

    name: `digits` (embedded, data_dir is ignored), `cifar10`, `cifar100`, `svhn`, `tiny-imagenet`, `imagenet32`, or
    `folder`, a tree of class folders. data_dir: the folder that holds the dataset's folder, files or archive, or that
    folder or archive itself. classes: `paper`, the 10 classes that the paper takes of Tiny ImageNet and ImageNet32, or
    `all` of them; of the others both are all. Raises DataError.
    """
    _check(name, classes)
    if data_dir is not None and name != "digits":
        file = prepared.json_file(name, classes, Path(data_dir).expanduser())
        if file.is_file():
            return prepared.load(file)
    return read_dataset(name, data_dir, classes)


def read_dataset(name: str, data_dir: str | Path | None, classes: str = "paper", note: Note | None = None) -> Dataset:
    """The dataset out of the original files alone; `note` is told of each of them. Raises DataError."""
    _check(name, classes)
    try:
        return _READERS[name](data_dir, classes, note)
    except NotHere as not_here:
        if name not in _TREE_NAMES:
            raise
        try:
            return tree.load(name, data_dir, _TREE_NAMES[name], note)
        except NotHere:
            raise not_here from None


def _check(name: str, classes: str) -> None:
    for what, value, accepted in (("dataset", name, _READERS), ("data.classes", classes, ("paper", "all"))):
        if value not in accepted:
            raise DataError(f"{what}: {value!r} is not one of {', '.join(accepted)}")
