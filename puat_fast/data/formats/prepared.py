"""A dataset as one memory-mapped file: puat-<name>-<hash>.npy, N x 3 x 32 x 32 uint8, and puat-<name>.json beside it.

Training images come first, then the test images. The JSON holds the rest: classes, labels, the filter that was applied,
and the sha256 of the images and of every file that they were read from. It is written last and names the images by
their hash: whatever is interrupted, and whoever prepares the same set at once, a JSON never names other images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puat_fast import files
from puat_fast.data.formats.base import IMAGE_SHAPE, DataError, Dataset, ImageSet, check_labels, describe, reason

FORMAT = "puat-fast-data-1"
_ROWS = 16384  # images that are written and hashed at a time: 48 MiB
_MANY = 64  # sources beyond which they are told as one


@dataclass(frozen=True)
class Source:
    """A file that was read: its path, its size in bytes and its sha256."""

    path: str
    size: int
    sha256: str


def json_file(name: str, classes: str, folder: Path) -> Path:
    """Where the JSON of a prepared dataset lies in a folder."""
    return folder / f"puat-{name}{'' if classes == 'paper' else f'-{classes}'}.json"


def write(dataset: Dataset, folder: Path, classes: str, filter_: dict[str, Any], sources: list[Source]) -> Path:
    """Write a dataset into `folder`; returns the JSON. Raises OSError, with nothing half-written left.

    filter_: what was chosen and changed on the way, as plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = json_file(dataset.name, classes, folder)
    before = _images_named_by(file)
    sha256 = hashlib.sha256()
    for part in _parts(dataset):
        sha256.update(part)
    images = folder / f"puat-{dataset.name}-{sha256.hexdigest()[:16]}.npy"
    shape = (len(dataset.train) + len(dataset.test), *IMAGE_SHAPE)
    with files.atomic_write(images) as temp, temp.open("wb") as raw:
        # Written, not mapped: on a full disk a write is an error, a mapped page kills the process.
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(raw, header)
        for part in _parts(dataset):
            raw.write(part)
    about = {
        "format": FORMAT, "name": dataset.name, "classes": classes, "images": images.name, "sha256": sha256.hexdigest(),
        "train": len(dataset.train), "test": len(dataset.test), "class_names": list(dataset.class_names),
        "filter": filter_, "sources": [vars(source) for source in _told(sources)],
        "labels": [*dataset.train.labels.tolist(), *dataset.test.labels.tolist()],
    }  # fmt: skip
    try:
        files.write_text(file, json.dumps(about) + "\n")
    except BaseException:
        if images not in map(_images_named_by, folder.glob("puat-*.json")):
            images.unlink(missing_ok=True)
        raise
    # `paper` and `all` of a set with few classes are the same images, which two JSON files name.
    if before is not None and before not in map(_images_named_by, folder.glob("puat-*.json")):
        before.unlink(missing_ok=True)
    return file


def load(file: Path) -> Dataset:
    """The dataset of a JSON file; its images are mapped, not read: pages come in as they are used. Raises DataError."""
    about = read_json(file)
    try:
        name, names = str(about["name"]), tuple(map(str, about["class_names"]))
        images_file, n_train, n_test = file.parent / Path(about["images"]).name, int(about["train"]), int(about["test"])
        labels = check_labels(np.asarray(about["labels"]), 0, len(names) - 1, str(file))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if min(n_train, n_test) < 1 or len(labels) != n_train + n_test:
        raise _damaged(file, f"{len(labels)} labels for {n_train} + {n_test} images")
    try:
        # "c": pages that somebody writes to are copied, the file is never changed, and torch takes it as writable
        images = np.load(images_file, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # a broken header raises anything
        told = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        raise _damaged(images_file, told) from error
    if not isinstance(images, np.memmap) or not images.flags.c_contiguous:
        raise _damaged(images_file, "not one array in C order")
    if images.shape != (n_train + n_test, *IMAGE_SHAPE) or images.dtype != np.uint8:
        raise _damaged(images_file, f"{describe(images)}, expected {n_train + n_test} x 3 x 32 x 32 uint8")
    train, test = ImageSet(images[:n_train], labels[:n_train]), ImageSet(images[n_train:], labels[n_train:])
    return Dataset(name, names, train, test, source=str(file))


def check(file: Path) -> None:
    """Compare the images with their sha256, and the sources that are still there with theirs. Raises DataError."""
    dataset, about = load(file), read_json(file)
    sha256 = hashlib.sha256()
    for part in _parts(dataset):
        sha256.update(part)
    if sha256.hexdigest() != about.get("sha256"):
        raise _damaged(file.parent / about["images"], f"sha256 is {sha256.hexdigest()}, it was {about.get('sha256')}")
    try:
        sources = [(Path(source["path"]), str(source["sha256"])) for source in about["sources"]]
    except (KeyError, TypeError) as error:
        raise _damaged(file, f"sources: {type(error).__name__}: {error}") from error
    for path, was in sources:
        if path.is_file() and _sha256(path) != was:
            raise DataError(f"{file}: prepared from another {path} than the one there now; prepare it anew")


def read_json(file: Path) -> dict[str, Any]:
    """What the JSON says. Raises DataError."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, reason(error)) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _damaged(file, f"no {FORMAT} file")
    return about


def _parts(dataset: Dataset) -> Iterator[memoryview]:
    """All images in order, some at a time."""
    for data in (dataset.train, dataset.test):
        for start in range(0, len(data), _ROWS):
            yield np.ascontiguousarray(data.images[start : start + _ROWS]).data


def _told(sources: list[Source]) -> list[Source]:
    """The sources in order; very many, as those of an image tree, as one: sha256 of their `sha256sum` lines."""
    sources = sorted(sources, key=lambda source: source.path)
    if len(sources) <= _MANY:
        return sources
    lines = "".join(f"{source.sha256}  {source.path}\n" for source in sources)
    total = sum(source.size for source in sources)
    return [Source(f"{len(sources)} files", total, hashlib.sha256(lines.encode()).hexdigest())]


def _images_named_by(file: Path) -> Path | None:
    try:
        return file.parent / Path(read_json(file)["images"]).name
    except (DataError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _damaged(file: Path, told: str) -> DataError:
    return DataError(f"{file}: missing or damaged ({told}); remove it, or run `puat-fast data prepare` anew")
