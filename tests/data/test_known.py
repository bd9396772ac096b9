"""The table of published files, and the datasets that have none to fetch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from puat_fast.data import download, known
from puat_fast.data.formats.base import DataError

NAME = "cifar-10-python.tar.gz"
CONTENT = bytes(range(256)) * 1200  # 307200 bytes


def test_known_files_are_well_formed() -> None:
    assert list(known.ARCHIVES) == list(known.FILES)
    for table in (known.ARCHIVES, known.FILES):
        for files in table.values():
            names = [file.name for file in files]
            assert len(set(names)) == len(names)
            assert all(re.fullmatch(r"[0-9a-f]{32}", md5) for file in files for md5 in file.md5)
    sums = [md5 for files in known.FILES.values() for file in files for md5 in file.md5]
    assert len(set(sums)) == len(sums)  # none pasted twice


def test_what_has_an_address_can_be_checked() -> None:
    offered = {name: [file for file in files if file.url] for name, files in known.ARCHIVES.items()}
    assert {name: len(files) for name, files in offered.items()} == {
        "cifar10": 1, "cifar100": 1, "svhn": 2, "tiny-imagenet": 1, "imagenet32": 0,
    }  # fmt: skip
    for file in (file for files in offered.values() for file in files):
        address = urlsplit(file.url)
        assert address.scheme in ("http", "https") and address.path.endswith(f"/{file.name}")
        assert len(file.md5) == 1 and file.size


def test_known_finds_archives_and_contents() -> None:
    archive = known.known("cifar10", NAME)
    assert archive is not None and archive.size == 170498071
    batch = known.known("imagenet32", "train_data_batch_10.npz")
    assert batch is not None and batch.md5 == ("1dc618d544c554220dd118f72975470c",)
    assert known.known("cifar100", NAME) is None and known.known("digits", NAME) is None


def test_md5_of_known_values(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert known.md5_of(tmp_path / "a") == "d41d8cd98f00b204e9800998ecf8427e"
    (tmp_path / "a").write_bytes(CONTENT)
    assert known.md5_of(tmp_path / "a") == hashlib.md5(CONTENT).hexdigest()


def test_datasets_that_cannot_be_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with pytest.raises(
        DataError, match=r"account at image-net\.org.*Imagenet32_train\.zip.*train_data_batch_1"
    ) as caught:
        download.fetch("imagenet32", folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(DataError, match="digits: comes with the package"):
        download.fetch("digits", folder)
    with pytest.raises(DataError, match="'mnist' is not one of cifar10, cifar100, svhn, tiny-imagenet, imagenet32"):
        download.fetch("mnist", folder)
    assert not folder.exists()
