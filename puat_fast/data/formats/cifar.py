"""The reader that CIFAR-10 and CIFAR-100 share: pickled batches in a folder, or in the .tar.gz read in place.

Sources: the layout of the original distribution (cs.toronto.edu/~kriz/cifar.html). Checksums are not compared here, but
by `puat-fast data verify`: re-encoded mirrors and smaller files of the same layout are welcome.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from puat_fast.data.formats.base import IMAGE_SHAPE, DataError, Dataset, ImageSet, NotHere, describe
from puat_fast.data.formats.places import Note, refuse_escape
from puat_fast.data.formats.unpickle import load_pickle

_PIXELS = int(np.prod(IMAGE_SHAPE))
_TELLTALES = {  # names that tell which dataset it is
    "cifar-10-batches-py": "cifar10", "cifar-10-python.tar.gz": "cifar10", "data_batch_1": "cifar10",
    "cifar-100-python": "cifar100", "cifar-100-python.tar.gz": "cifar100", "meta": "cifar100",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where a dataset of the CIFAR family keeps what."""

    name: str
    title: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str  # may be missing
    label_key: bytes
    names_key: bytes
    class_names: tuple[str, ...]  # used where meta is missing

    @property
    def required(self) -> tuple[str, ...]:
        """The files without which there is no dataset."""
        return self.train + self.test

    @property
    def wanted(self) -> str:
        """What a user has to put in place, for error messages."""
        return f"{self.folder}/ with {', '.join(self.required)}, or {self.archive}"


def load(layout: Layout, data_dir: str | Path | None, note: Note | None = None) -> Dataset:
    """Read a dataset from the parent folder, its own folder, or its archive. Raises NotHere, DataError."""
    if data_dir is None:
        raise DataError(f"data_dir: {layout.name} needs the folder that holds {layout.wanted}")
    place = locate(layout, Path(data_dir).expanduser())
    try:
        files = _read_folder(layout, place) if place.is_dir() else _read_archive(layout, place)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{place}: cannot be read: {' '.join(str(error).split())}; expected {layout.wanted}") from error
    missing = [name for name in layout.required if name not in files]
    if missing:
        found = _found(layout, place)
        raise DataError(f"{place}: {', '.join(missing)} missing: {found}; expected {layout.wanted}")
    if note is not None:
        for name, content in files.items():
            note(f"{place}/{name}", content)
    return Dataset(
        layout.name,
        _class_names(layout, files.get(layout.meta), f"{place}/{layout.meta}"),
        _image_set(layout, files, layout.train, place),
        _image_set(layout, files, layout.test, place),
        source=str(place),
    )


def locate(layout: Layout, path: Path) -> Path:
    """The dataset's folder or archive, at or directly below `path`. Raises NotHere, DataError."""
    if path.is_file() and not zipfile.is_zipfile(path):  # a .zip may hold an image tree
        return path
    if path.is_file():
        raise NotHere(f"{path}: no {layout.title} here; expected {layout.wanted}")
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected a folder that holds {layout.wanted}")
    if (path / layout.folder).is_dir():
        return path / layout.folder
    if path.name == layout.folder or any((path / name).is_file() for name in layout.required):
        return path
    if (path / layout.archive).is_file():
        return path / layout.archive
    raise NotHere(f"{path}: no {layout.title} here: {_found(layout, path)}; expected {layout.wanted}")


def _found(layout: Layout, place: Path) -> str:
    """What a folder or archive holds instead, and whose it is where that can be told."""
    if place.is_dir():
        names = sorted(entry.name for entry in place.iterdir())
    else:
        with tarfile.open(place, "r:*") as tar:
            names = sorted({part for name in tar.getnames() for part in PurePosixPath(name).parts})
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    kinds = (_TELLTALES.get(name, layout.name) for name in names)
    other = next((kind for kind in kinds if kind != layout.name), None)
    return f"found {shown or 'nothing'}" + (f" (that is {other}: set dataset to {other})" if other else "")


def _read_folder(layout: Layout, folder: Path) -> dict[str, bytes]:
    names = (*layout.required, layout.meta)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _read_archive(layout: Layout, archive: Path) -> dict[str, bytes]:
    """The dataset's files out of the archive, nothing extracted; links are passed over, names that escape refused."""
    files, wanted = dict[str, bytes](), (*layout.required, layout.meta)
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            refuse_escape(archive, member.name)
            path = PurePosixPath(member.name)
            if member.isreg() and path.parent.name in ("", layout.folder) and path.name in wanted:
                content = tar.extractfile(member)
                if content is not None:
                    files[path.name] = content.read()
    return files


def _image_set(layout: Layout, files: dict[str, bytes], names: tuple[str, ...], place: Path) -> ImageSet:
    batches = [_batch(layout, files.pop(name), f"{place}/{name}") for name in names]  # pop: let go of the raw bytes
    images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, *IMAGE_SHAPE)
    if not len(images):
        raise DataError(f"{place}: {', '.join(names)} hold no images")
    return ImageSet(images, np.concatenate([labels for _, labels in batches]))


def _batch(layout: Layout, raw: bytes, file: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """One batch file -> N x 3072 uint8, N int64."""
    content = load_pickle(raw, file)
    for key in (b"data", layout.label_key):
        if key not in content:
            keys = ", ".join(sorted(repr(k) for k in content)) or "none"
            raise DataError(f"{file}: no {key!r} among its keys ({keys}); expected a batch of {layout.title}")
    pixels = content[b"data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise DataError(f"{file}: b'data' is {describe(pixels)}, expected N x {_PIXELS} uint8")
    return pixels, _labels(content[layout.label_key], len(pixels), layout, file)


def _labels(value: Any, count: int, layout: Layout, file: str) -> npt.NDArray[np.int64]:
    key, num_classes = layout.label_key, len(layout.class_names)
    entries = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(entries, list):
        raise DataError(f"{file}: {key!r} is {describe(value)}, expected a list of whole numbers")
    strange = next((entry for entry in entries if type(entry) is not int), None)
    if strange is not None:
        raise DataError(f"{file}: {key!r} holds {type(strange).__name__}, expected whole numbers")
    if len(entries) != count:
        raise DataError(f"{file}: {len(entries)} {key!r} for {count} images")
    wrong = next((entry for entry in entries if not 0 <= entry < num_classes), None)
    if wrong is not None:
        raise DataError(f"{file}: label {wrong} in {key!r}, expected 0 to {num_classes - 1}")
    return np.array(entries, np.int64)


def _class_names(layout: Layout, raw: bytes | None, file: str) -> tuple[str, ...]:
    if raw is None:
        return layout.class_names
    names = load_pickle(raw, file).get(layout.names_key)
    count = len(layout.class_names)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(n, (bytes, str)) for n in names):
        raise DataError(f"{file}: {layout.names_key!r} is not a list of {count} names")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)
