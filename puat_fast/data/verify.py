"""Are a dataset's files all there, whole, and the published ones?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from puat_fast.data import known
from puat_fast.data.formats import (
    BrokenFiles,
    DataError,
    cifar,
    cifar10,
    cifar100,
    imagenet32,
    prepared,
    read_dataset,
    svhn,
    tiny_imagenet,
)
from puat_fast.data.formats.base import NotHere
from puat_fast.data.formats.places import Place
from puat_fast.data.formats.tree import images_of

PER_CLASS = 500  # training images of each class of Tiny ImageNet, <wnid>_0.JPEG to <wnid>_499.JPEG


@dataclass(frozen=True)
class Finding:
    """What is to be said of a file. state: ok | missing | truncated | altered | broken | unknown."""

    file: str
    state: str
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it; `unknown`: readable, but no checksum of it was ever published."""
        return self.state in ("ok", "unknown")


def verify(name: str, data_dir: str | Path | None, classes: str = "paper") -> list[Finding]:
    """Every file of a dataset: checksums where they are known, and then whether all of it can be read.

    A re-encoded copy is `altered`, and may be read all the same. Raises DataError where there is none.
    """
    findings: list[Finding] = []
    path = None if data_dir is None else Path(data_dir).expanduser()
    if path is not None and (file := prepared.json_file(name, classes, path)).is_file():
        findings.append(_prepared(file))
    try:
        findings += [_compared(name, file) for file in ([] if path is None else _published(name, path, classes))]
    except NotHere:
        if not findings:
            raise
    except DataError as error:  # an archive that cannot be opened
        if path is None or not path.exists():
            raise
        return [*findings, Finding(str(path), "broken", str(error))]
    try:
        dataset = read_dataset(name, data_dir, classes)
    except NotHere:
        if not findings:
            raise
        return findings  # the prepared file is all that there is
    except BrokenFiles as error:
        return findings + [Finding(*_named(told)) for told in error.files]
    except DataError as error:
        if not findings and (path is None or not path.exists()):
            raise
        if any(finding.state == "missing" for finding in findings):  # which is why
            return findings
        return [*findings, Finding(str(data_dir), "broken", str(error))]
    counts = f"{len(dataset.train)} training and {len(dataset.test)} test images, {dataset.num_classes} classes"
    return [*findings, Finding(dataset.source or name, "ok", f"read: {counts}")]


def _named(told: str) -> tuple[str, str, str]:
    file, _, reason = told.partition(": ")
    missing = "No such file" in reason
    return file, "missing" if missing else "truncated" if "truncated" in reason else "broken", reason


def _prepared(file: Path) -> Finding:
    try:
        prepared.check(file)
    except DataError as error:
        return Finding(str(file), "broken", str(error))
    return Finding(str(file), "ok", "sha256 agrees")


def _published(name: str, path: Path, classes: str) -> Iterator[Path]:
    """The files that make up the dataset in the layout that it has at `path`, there or not. Raises NotHere."""
    if name in ("cifar10", "cifar100"):
        layout = {"cifar10": cifar10.LAYOUT, "cifar100": cifar100.LAYOUT}[name]
        try:
            place = cifar.locate(layout, path)
        except NotHere:  # it may be an image tree, of which nothing is published
            return
        yield from [place / file for file in (*layout.required, layout.meta)] if place.is_dir() else [place]
    elif name == "svhn":
        folder = svhn.find(path)
        if folder is not None:
            yield from (folder / file for file in (svhn.TRAIN, svhn.TEST))
    elif name == "imagenet32":
        found = imagenet32.find(path)
        for stem in (*imagenet32.TRAIN, *imagenet32.TEST):
            if stem not in found:
                yield path / stem
                continue
            where, file = found[stem]
            yield where.path if where.path.is_file() else where.path / file
    elif name == "tiny-imagenet":
        half = [file for file in tiny_imagenet.NPZ if (path / file).is_file()]
        if len(half) == 1:  # of the two: no dataset, but surely meant as one
            yield from (path / file for file in tiny_imagenet.NPZ)
            return
        tiny, top = tiny_imagenet.locate(path)
        if top is None:
            yield from (tiny.path / file for file in tiny_imagenet.NPZ)
        elif tiny.path.is_file():
            yield tiny.path
        else:
            yield from _absent(tiny, top, classes)


def _absent(tiny: Place, top: str, classes: str) -> Iterator[Path]:
    """Training images of Tiny ImageNet that are not in their folder: their names are numbered."""
    papers = [wnid for wnid, _ in tiny_imagenet.PAPER_CLASSES.values()]
    for wnid in papers if classes == "paper" else tiny.folders(f"{top}train"):
        there = images_of(tiny, f"{top}train/{wnid}")
        folder = there[0].rpartition("/")[0] if there else f"{top}train/{wnid}/images"
        names = {image.rpartition("/")[2].rpartition(".")[0] for image in there}  # some keep them as .png
        wanted = [f"{wnid}_{k}" for k in range(PER_CLASS)]
        yield from (tiny.path / folder / f"{name}.JPEG" for name in wanted if name not in names)


def _compared(dataset: str, file: Path) -> Finding:
    published = known.known(dataset, file.name)
    if not file.is_file():
        optional = file.name in ("batches.meta", "meta")
        return Finding(str(file), "unknown" if optional else "missing", "not there; not needed" if optional else "")
    if published is None or not published.md5:
        return Finding(str(file), "unknown", "no published checksum")
    size = file.stat().st_size
    if published.size is not None and size < published.size:
        return Finding(str(file), "truncated", f"{size} of {published.size} bytes")
    md5 = known.md5_of(file)
    if md5 in published.md5:
        return Finding(str(file), "ok", "md5 agrees")
    return Finding(str(file), "altered", f"md5 {md5}, published {' or '.join(published.md5)}")
