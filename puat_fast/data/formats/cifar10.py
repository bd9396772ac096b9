"""CIFAR-10: cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta} or cifar-10-python.tar.gz."""

from __future__ import annotations

from pathlib import Path

from puat_fast.data.formats import cifar
from puat_fast.data.formats.base import Dataset
from puat_fast.data.formats.places import Note

LAYOUT = cifar.Layout(
    name="cifar10",
    title="CIFAR-10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{k}" for k in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    label_key=b"labels",
    names_key=b"label_names",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)


def load(data_dir: str | Path | None, note: Note | None = None) -> Dataset:
    """50000 training and 10000 test images (fewer where the files hold fewer), 10 classes. Raises DataError."""
    return cifar.load(LAYOUT, data_dir, note)
