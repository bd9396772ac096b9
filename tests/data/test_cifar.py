"""CIFAR-10 and CIFAR-100: every accepted layout, and one clear line for every broken one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from puat_fast.data import DataError, load_dataset

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def check_against(dataset, files, train_names, key):
    for images, names in ((dataset.train, train_names), (dataset.test, [n for n in files if n.startswith("test")])):
        pixels = np.concatenate([files[name][b"data"] for name in names]).reshape(-1, 3, 32, 32)
        assert images.images.dtype == np.uint8 and images.images.flags.c_contiguous and images.images.flags.writeable
        np.testing.assert_array_equal(images.images, pixels)
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == [label for name in names for label in files[name][key]]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("archive", [False, True])
def test_cifar10_is_read_whole(write, files_of, archive, protocol):
    dataset = load_dataset("cifar10", write("cifar10", archive=archive, protocol=protocol))
    check_against(dataset, files_of("cifar10"), [f"data_batch_{k}" for k in range(1, 6)], b"labels")
    assert dataset.name == "cifar10" and dataset.num_classes == 10 and dataset.class_names[3] == "class_3"


@pytest.mark.parametrize("archive", [False, True])
def test_cifar100_is_read_with_fine_labels(write, files_of, archive):
    dataset = load_dataset("cifar100", write("cifar100", archive=archive))
    check_against(dataset, files_of("cifar100"), ["train"], b"fine_labels")
    assert dataset.num_classes == 100 and dataset.class_names[99] == "fine_99"
    assert dataset.train.labels.max() == 99


@pytest.mark.parametrize("below", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_data_dir_may_be_the_folder_or_the_archive_itself(write, below):
    parent = write("cifar10", archive=below.endswith("gz"))
    assert len(load_dataset("cifar10", parent / below).train) == 100


def test_data_dir_may_be_a_renamed_folder_and_a_text(write):
    parent = write("cifar10")
    (parent / "cifar-10-batches-py").rename(parent / "renamed")
    assert len(load_dataset("cifar10", str(parent / "renamed")).test) == 10


def test_home_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", str(write("cifar10")))
    assert len(load_dataset("cifar10", "~").train) == 100


@pytest.mark.parametrize("name, meta, first", [("cifar10", "batches.meta", "airplane"), ("cifar100", "meta", "apple")])
def test_without_meta_the_standard_names_hold(write, name, meta, first):
    names = load_dataset(name, write(name, lambda files: files.pop(meta))).class_names
    assert names[0] == first and len(set(names)) == len(names) == {"cifar10": 10, "cifar100": 100}[name]
    assert list(names) == sorted(names)  # both sets number their classes alphabetically


def test_labels_may_be_an_array(write, files_of):
    def change(files):
        files["test_batch"][b"labels"] = np.array(files["test_batch"][b"labels"])

    labels = load_dataset("cifar10", write("cifar10", change)).test.labels
    assert labels.dtype == np.int64 and labels.tolist() == files_of("cifar10")["test_batch"][b"labels"]


def error(name, data_dir):
    with pytest.raises(DataError) as caught:
        load_dataset(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_dataset():
    assert "'cifar11' is not one of digits, cifar10, cifar100" in error("cifar11", None)


def test_no_data_dir():
    assert "cifar10 needs the folder that holds cifar-10-batches-py/" in error("cifar10", None)


def test_no_such_folder(tmp_path):
    message = error("cifar10", tmp_path / "nowhere")
    assert message.startswith(f"{tmp_path / 'nowhere'}: no such file or folder") and "cifar-10-python.tar.gz" in message


def test_empty_folder(tmp_path):
    message = error("cifar100", tmp_path)
    assert message.startswith(f"{tmp_path}: no CIFAR-100 here: found nothing")
    assert "cifar-100-python/ with train, test, or cifar-100-python.tar.gz" in message


@pytest.mark.parametrize("archive", [False, True])
def test_missing_files_are_listed(write, archive):
    def change(files):
        del files["data_batch_2"], files["test_batch"]

    message = error("cifar10", write("cifar10", change, archive=archive))
    assert "data_batch_2, test_batch missing" in message and "data_batch_1" in message
    assert ("cifar-10-python.tar.gz:" if archive else "cifar-10-batches-py:") in message


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("asked, given", [("cifar10", "cifar100"), ("cifar100", "cifar10")])
@pytest.mark.parametrize("inside", [False, True])
def test_another_dataset_is_named(write, asked, given, archive, inside):
    data_dir = write(given, archive=archive)
    message = error(asked, next(data_dir.iterdir()) if inside else data_dir)
    assert f"that is {given}: set dataset to {given}" in message


def test_files_of_another_dataset_in_the_right_folder(write):
    parent = write("cifar100")
    (parent / "cifar-100-python").rename(parent / "cifar-10-batches-py")
    assert "that is cifar100" in error("cifar10", parent)


def test_batch_of_another_dataset_under_the_right_name(write, files_of, pickled):
    message = error("cifar10", write("cifar10", raw={"test_batch": pickled(files_of("cifar100")["test"])}))
    assert "test_batch: no b'labels' among its keys" in message and "b'fine_labels'" in message


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_pickle(write, files_of, pickled, cut):
    raw = pickled(files_of("cifar10")["data_batch_3"])[:cut]
    message = error("cifar10", write("cifar10", raw={"data_batch_3": raw}))
    assert "data_batch_3: truncated or not a dataset pickle" in message


@pytest.mark.parametrize("raw", [b"<html>not found</html>", b"\x00" * 50, b"\x80\x02}q\x00(U\x04datah\x09u."])
def test_garbage_pickle(write, raw):
    message = error("cifar10", write("cifar10", raw={"test_batch": raw}))
    assert "test_batch: truncated or not a dataset pickle" in message


def test_pickle_of_something_else(write, pickled):
    assert "test_batch: holds list" in error("cifar10", write("cifar10", raw={"test_batch": pickled([1, 2])}))


def test_truncated_archive(write):
    archive = write("cifar10", archive=True) / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:100_000])
    assert f"{archive}: cannot be read" in error("cifar10", archive)


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "cifar.zip").write_bytes(b"PK not really")
    assert "cifar.zip: cannot be read" in error("cifar10", tmp_path / "cifar.zip")


@pytest.mark.parametrize(
    "key, value, expected",
    [
        (b"data", np.zeros((10, 3071), np.uint8), "b'data' is 10 x 3071 uint8, expected N x 3072 uint8"),
        (b"data", np.zeros((10, 3072), np.int64), "b'data' is 10 x 3072 int64, expected N x 3072 uint8"),
        (b"data", np.zeros(30720, np.uint8), "b'data' is 30720 uint8"),
        (b"data", [[0] * 3072] * 10, "b'data' is list"),
        (b"data", np.zeros((10, 3072), np.float64), "b'data' is 10 x 3072 float64, expected N x 3072 uint8"),
        (b"data", np.zeros((10, 3072), np.float16), "an array of type 'f2'"),
        (b"labels", [0] * 9, "9 b'labels' for 10 images"),
        (b"labels", [0] * 9 + [10], "label 10 in b'labels', expected 0 to 9"),
        (b"labels", [0] * 9 + [-1], "label -1 in b'labels', expected 0 to 9"),
        (b"labels", [0] * 9 + [1.5], "b'labels' holds float, expected whole numbers"),
        (b"labels", np.zeros((10, 1), np.int64), "b'labels' holds list, expected whole numbers"),
        (b"labels", 7, "b'labels' is int, expected a list of whole numbers"),
    ],
)
def test_wrong_content(write, key, value, expected):
    message = error("cifar10", write("cifar10", lambda files: files["test_batch"].update({key: value})))
    assert "test_batch: " in message and expected in message


@pytest.mark.parametrize("key", [b"data", b"labels"])
def test_missing_key(write, key):
    message = error("cifar10", write("cifar10", lambda files: files["data_batch_5"].pop(key)))
    assert f"data_batch_5: no {key!r} among its keys" in message


def test_no_images_at_all(write):
    empty = {b"data": np.zeros((0, 3072), np.uint8), b"labels": []}
    message = error("cifar10", write("cifar10", lambda files: files.update(test_batch=empty)))
    assert "test_batch hold no images" in message


@pytest.mark.parametrize("names", [None, [b"only one"], "ten"])
def test_broken_meta(write, names):
    message = error("cifar10", write("cifar10", lambda files: files["batches.meta"].update({b"label_names": names})))
    assert "batches.meta: b'label_names' is not a list of 10 names" in message


@pytest.mark.parametrize("name", ["cifar-10-batches-py/../../cifar-10-batches-py/data_batch_1", "/data_batch_1"])
def test_an_archive_whose_members_escape_is_refused(write, pickled, add, name):
    archive = write("cifar10", archive=True) / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add(tar, name, b"evil")
    assert f"refused: its member {name!r} leads out of the archive" in error("cifar10", archive)


def test_archive_members_elsewhere_and_links_are_not_read(write, files_of, pickled, add, tmp_path):
    archive = write("cifar10", archive=True) / "cifar-10-python.tar.gz"
    good = {name: pickled(content) for name, content in files_of("cifar10").items()}
    evil = pickled(files_of("cifar10")["data_batch_1"] | {b"labels": [9] * 20})
    (tmp_path / "outside").write_bytes(evil)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in good.items():
            add(tar, f"./cifar-10-batches-py/{name}", content)
        add(tar, "cifar-10-batches-py/elsewhere/data_batch_1", evil)
        add(tar, "cifar-10-batches-py/._data_batch_1", b"resource fork")
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    dataset = load_dataset("cifar10", archive)
    assert dataset.train.labels[:20].tolist() == files_of("cifar10")["data_batch_1"][b"labels"]
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted


def test_archive_of_links_alone_is_missing_its_files(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.LNKTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "test_batch missing" in error("cifar10", tmp_path)


def test_real_images_unpacked_from_the_jpeg_mirror(tmp_path):
    if not (SHARED_DATA / "cifar10_jpeg.npz").is_file():
        pytest.skip("../shared/data/cifar10_jpeg.npz is not here")
    if importlib.util.find_spec("PIL") is None:
        pytest.skip("Pillow is not installed: the mirror's JPEGs cannot be decoded")
    command = [sys.executable, SHARED_DATA / "unpack_cifar10.py", tmp_path, "--train", "500", "--test", "100"]
    subprocess.run(command, check=True, capture_output=True)
    dataset = load_dataset("cifar10", tmp_path)
    assert len(dataset.train) == 500 and len(dataset.test) == 100
    assert dataset.class_names[0] == "airplane" and dataset.class_names[9] == "truck"
    with np.load(SHARED_DATA / "cifar10_jpeg.npz") as pack:
        assert dataset.train.labels.tolist() == pack["train_labels"][:500].tolist()
    # Photographs, in the right axis order: neighbouring pixels are alike, and channels follow each other.
    x = dataset.train.images.astype(float)
    assert np.abs(np.diff(x, axis=3)).mean() < 20 and np.abs(np.diff(x, axis=2)).mean() < 20
    assert 100 < x.mean() < 140
