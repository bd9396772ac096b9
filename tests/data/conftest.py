"""Small CIFAR files in each true on-disk layout, as fixtures: they work in every import mode of pytest."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests: `import layouts`

REPOSITORY = Path(__file__).resolve().parents[2]
CIFAR10 = {f"data_batch_{k}": 20 for k in range(1, 6)} | {"test_batch": 10}
CIFAR100 = {"train": 200, "test": 100}


class Python2Pickler(pickle._Pickler):
    """Writes what cPickle of Python 2 wrote: byte strings by their own opcodes, numpy by its old module name."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write((b"U" + struct.pack("<B", len(value)) if short else b"T" + struct.pack("<i", len(value))) + value)
        self.memoize(value)

    def save_text(self, value: str) -> None:
        self.save_bytes(value.encode("latin1"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text


def dump(value: Any, protocol: int = 2) -> bytes:
    """`value` as Python 2 pickled it (protocol 2), or as Python 3 does."""
    if protocol != 2:
        return pickle.dumps(value, protocol=protocol)
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(name: str, count: int, key: bytes, num_classes: int) -> dict[bytes, Any]:
    """One batch; its pixels depend on its name alone, so tests can state what must be read."""
    rng = np.random.default_rng(list(name.encode()))
    content = {
        b"batch_label": name.encode(),
        b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        key: [i % num_classes for i in range(count)],
        b"filenames": [f"image_{i}.png".encode() for i in range(count)],
    }
    return content | ({b"coarse_labels": [0] * count} if key == b"fine_labels" else {})


def cifar10_files() -> dict[str, dict[bytes, Any]]:
    files = {name: batch(name, count, b"labels", 10) for name, count in CIFAR10.items()}
    names = [f"class_{k}".encode() for k in range(10)]
    return files | {"batches.meta": {b"num_cases_per_batch": 10000, b"label_names": names, b"num_vis": 3072}}


def cifar100_files() -> dict[str, dict[bytes, Any]]:
    files = {name: batch(name, count, b"fine_labels", 100) for name, count in CIFAR100.items()}
    names = [f"fine_{k}".encode() for k in range(100)]
    return files | {"meta": {b"fine_label_names": names, b"coarse_label_names": []}}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("cifar10" | "cifar100", change=files -> None, archive=False, raw={name: bytes}) -> the parent folder."""

    def writer(
        name: str,
        change: Callable[[dict[str, Any]], None] = lambda files: None,
        archive: bool = False,
        raw: dict[str, bytes] | None = None,
        protocol: int = 2,
    ) -> Path:
        files = cifar10_files() if name == "cifar10" else cifar100_files()
        folder, packed = {
            "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
            "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
        }[name]
        change(files)
        contents = {key: dump(value, protocol) for key, value in files.items()} | (raw or {})
        if archive:
            with tarfile.open(tmp_path / packed, "w:gz") as tar:
                for key, value in contents.items():
                    add_member(tar, f"{folder}/{key}", value)
        else:
            (tmp_path / folder).mkdir()
            for key, value in contents.items():
                (tmp_path / folder / key).write_bytes(value)
        return tmp_path

    return writer


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def files_of() -> Callable[[str], dict[str, Any]]:
    """files_of("cifar10" | "cifar100") -> what `write` writes, as dicts."""
    return lambda name: cifar10_files() if name == "cifar10" else cifar100_files()


@pytest.fixture
def add() -> Callable[[tarfile.TarFile, str, bytes], None]:
    """add(tar, name, content): put a file into an open archive."""
    return add_member


@pytest.fixture
def pickled() -> Callable[..., bytes]:
    """pickled(value, protocol=2) -> bytes; protocol 2 as Python 2 wrote it."""
    return dump


@pytest.fixture(scope="session")
def golden_data() -> dict[str, np.ndarray]:
    """golden/14_data.npz: the official split and sampler (shared folder where it is there, else our copy)."""
    for folder in (REPOSITORY.parent / "shared" / "golden", REPOSITORY / "tests" / "golden"):
        if (folder / "14_data.npz").is_file():
            with np.load(folder / "14_data.npz") as pack:
                return dict(pack)
    pytest.fail("14_data.npz is neither in ../shared/golden nor in tests/golden")
