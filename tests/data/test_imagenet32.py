"""Down-sampled ImageNet: pickled and .npz, flat, in folders and in the archives."""

from __future__ import annotations

import os
import pickle
import zipfile

import layouts
import numpy as np
import pytest
from layouts import IMAGENET32, error_of

from puat_fast.data import load_dataset
from puat_fast.data.formats.imagenet32 import PAPER_CLASSES


def read(folder, classes="paper"):
    return load_dataset("imagenet32", folder, classes)


def expected(names, last):
    """Images and labels of the files in their order, none of a label beyond `last`."""
    images, labels = [], []
    for name in names:
        data, of_file = layouts.imagenet32_arrays(name)
        images += [row.reshape(3, 32, 32) for row, label in zip(data, of_file, strict=True) if label <= last]
        labels += [label - 1 for label in of_file if label <= last]
    return np.stack(images), labels


def check(dataset, last=10):
    for found, names in ((dataset.train, IMAGENET32[:10]), (dataset.test, IMAGENET32[10:])):
        images, labels = expected(names, last)
        np.testing.assert_array_equal(found.images, images)
        assert found.labels.tolist() == labels


@pytest.mark.parametrize("kind", ["pickle", "npz"])
@pytest.mark.parametrize("where", ["flat", "folders", "deeper", "zips", "flat zips"])
def test_every_layout(tmp_path, kind, where):
    files = layouts.imagenet32_files(kind)
    if where == "flat":
        layouts.put(tmp_path, files)
    elif "zips" in where:
        layouts.put_imagenet32_zips(tmp_path, kind, inner=where == "zips")
    else:
        parts = layouts.imagenet32_parts(files, "Imagenet32_train", "Imagenet32_val")
        layouts.put(tmp_path, layouts.under("imagenet32", parts) if where == "deeper" else parts)
    dataset = read(tmp_path)
    check(dataset)
    assert dataset.class_names == PAPER_CLASSES and dataset.train.labels.max() == 9


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols_and_all_classes(tmp_path, protocol):
    dataset = read(layouts.put(tmp_path, layouts.imagenet32_files(protocol=protocol)), "all")
    check(dataset, 1000)
    assert dataset.num_classes == 1000 and dataset.class_names[999] == "label_1000"
    assert 999 in dataset.train.labels and 11 in dataset.test.labels


def test_keys_may_be_bytes_and_labels_an_array(tmp_path):
    data, labels = layouts.imagenet32_arrays("val_data")
    content = pickle.dumps({b"data": data, b"labels": np.array(labels)})
    check(read(layouts.put(tmp_path, layouts.imagenet32_files() | {"val_data": content})))


def test_data_dir_may_be_an_archive(tmp_path):
    layouts.put_imagenet32_zips(tmp_path, "npz")
    check(read(tmp_path / "Imagenet32_val_npz.zip"))


def test_what_is_unpacked_comes_before_the_archive(tmp_path):
    layouts.put_imagenet32_zips(tmp_path, "pickle")
    layouts.put(tmp_path, {"unpacked/val_data": layouts.imagenet32_content("train_data_batch_1", "pickle")})
    assert len(read(tmp_path).test) == 5  # of the file, not of Imagenet32_val.zip


def test_half_an_archive_beside_the_files_is_no_harm(tmp_path):
    (tmp_path / "Imagenet32_train.zip").write_bytes(b"half of a download")
    check(read(layouts.put(tmp_path, layouts.imagenet32_files())))
    (tmp_path / "train_data_batch_9").unlink()
    assert "Imagenet32_train.zip: cannot be read" in error_of(lambda: read(tmp_path))


def test_missing_files(tmp_path):
    files = layouts.imagenet32_files("npz")
    del files["train_data_batch_2.npz"], files["val_data.npz"]
    layouts.put(tmp_path, files)
    assert error_of(lambda: read(tmp_path)).startswith(f"{tmp_path}: train_data_batch_2, val_data missing; expected")
    assert "no ImageNet32 here" in error_of(lambda: read(layouts.put(tmp_path / "other", {"a.txt": b""})))
    assert "no such file or folder" in error_of(lambda: read(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind, name", [("pickle", "val_data"), ("npz", "val_data.npz")])
def test_damaged_files(tmp_path, kind, name):
    layouts.put(tmp_path, layouts.imagenet32_files(kind))
    layouts.check_cuts(tmp_path / name, lambda: read(tmp_path))
    layouts.check_flips(tmp_path / name, lambda: read(tmp_path), count=250)


def test_damaged_archive(tmp_path):
    layouts.put_imagenet32_zips(tmp_path, "pickle")
    layouts.check_cuts(tmp_path / "Imagenet32_val.zip", lambda: read(tmp_path))
    layouts.check_flips(tmp_path / "Imagenet32_val.zip", lambda: read(tmp_path))


def test_changed_pixels_of_an_npz_do_not_pass(tmp_path):
    layouts.put(tmp_path, layouts.imagenet32_files("npz"))
    content = bytearray((tmp_path / "val_data.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "val_data.npz").write_bytes(content)
    assert "val_data.npz: truncated or not an .npz file (Bad CRC-32" in error_of(lambda: read(tmp_path))


DATA = np.zeros((3, 3072), np.uint8)


@pytest.mark.parametrize("content, says", [
    ({"data": DATA, "labels": [1, 0, 2]}, "label 0, expected 1 to 1000"),
    ({"data": DATA, "labels": [1, 1001, 2]}, "label 1001, expected 1 to 1000"),
    ({"data": DATA, "labels": [1, 2]}, "2 labels for 3 images"),
    ({"data": DATA, "labels": [1.0, 2.5, 3.0]}, "labels are 3 float64"),
    ({"data": DATA, "labels": [[1], [2, 3], [4]]}, "labels: setting an array element"),
    ({"data": DATA, "labels": None}, "expected one whole number for each image"),
    ({"data": DATA.astype(np.float64), "labels": [1, 2, 3]}, "data is 3 x 3072 float64, expected N x 3072 uint8"),
    ({"data": DATA.reshape(3, 3, 32, 32), "labels": [1, 2, 3]}, "data is 3 x 3 x 32 x 32 uint8"),
    ({"data": DATA[:, :768], "labels": [1, 2, 3]}, "data is 3 x 768 uint8"),
    ({"data": [[0] * 3072] * 3, "labels": [1, 2, 3]}, "data is list"),
    ({"labels": [1, 2, 3]}, "no b'data' among its keys; expected a batch of ImageNet32"),
    ({"data": DATA}, "no b'labels' among its keys"),
    ([1, 2], "holds list, expected a pickled dict"),
])  # fmt: skip
def test_wrong_content(tmp_path, content, says):
    layouts.put(tmp_path, layouts.imagenet32_files() | {"train_data_batch_7": pickle.dumps(content)})
    message = error_of(lambda: read(tmp_path))
    assert message.startswith(f"{tmp_path}/train_data_batch_7: ") and says in message


@pytest.mark.parametrize("content, says", [
    (layouts.npz(data=DATA), "no 'labels' among its arrays (data)"),
    (layouts.npz(data=DATA, labels=np.array([1, 2, None])), "Object arrays cannot be loaded"),
    (layouts.npz(data=DATA, labels=np.array([1, 2, 2000])), "label 2000, expected 1 to 1000"),
    (layouts.npz(data=DATA / 255, labels=np.array([1, 2, 3])), "data is 3 x 3072 float64"),
    (b"", "truncated or not an .npz file"),
])  # fmt: skip
def test_wrong_npz(tmp_path, content, says):
    layouts.put(tmp_path, layouts.imagenet32_files("npz") | {"train_data_batch_7.npz": content})
    message = error_of(lambda: read(tmp_path))
    assert "train_data_batch_7.npz: " in message and says in message


def test_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", DATA)
    files = layouts.imagenet32_files("npz") | {"val_data.npz": (tmp_path / "a.npy").read_bytes()}
    assert "val_data.npz: holds one array, expected an .npz" in error_of(lambda: read(layouts.put(tmp_path, files)))


def test_none_of_the_papers_classes(tmp_path):
    content = pickle.dumps({"data": DATA, "labels": [11, 12, 13]})
    layouts.put(tmp_path, layouts.imagenet32_files() | {"val_data": content})
    assert "val_data: no image with a label of 1 to 10" in error_of(lambda: read(tmp_path))
    assert len(read(tmp_path, "all").test) == 3


class Evil:
    """Pickled as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_that_names_code_is_refused(tmp_path):
    content = pickle.dumps({"data": Evil(f"touch {tmp_path}/ran"), "labels": [1]})
    layouts.put(tmp_path, layouts.imagenet32_files() | {"val_data": content})
    message = error_of(lambda: read(tmp_path))
    assert "val_data: refuses to run code: the pickle names" in message and message.endswith("system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../val_data", "/val_data", "Imagenet32_val/../../val_data", "a\\val_data"])
def test_archive_whose_members_escape_is_refused(tmp_path, name):
    layouts.put_imagenet32_zips(tmp_path, "pickle")
    with zipfile.ZipFile(tmp_path / "Imagenet32_val.zip", "a") as pack:
        pack.writestr(name, b"evil")
    assert f"refused: its member {name!r} leads out of the archive" in error_of(lambda: read(tmp_path))


def test_link_in_an_archive_is_not_followed(tmp_path):
    layouts.put_imagenet32_zips(tmp_path, "pickle")
    layouts.put(tmp_path / "outside", {"val_data": layouts.imagenet32_content("val_data", "pickle")})
    link = zipfile.ZipInfo("val_data")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "Imagenet32_val.zip", "w") as pack:
        pack.writestr(link, str(tmp_path / "outside" / "val_data"))
    (tmp_path / "outside").rename(tmp_path.parent / f"{tmp_path.name}-outside")
    assert "val_data missing" in error_of(lambda: read(tmp_path))
