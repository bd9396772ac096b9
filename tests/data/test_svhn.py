"""SVHN: the two .mat files, and one clear line for what is wrong with them."""

from __future__ import annotations

import io
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import error_of
from scipy.io import savemat

from puat_fast.data import load_dataset
from puat_fast.data.formats.base import NotHere


def read(folder):
    return load_dataset("svhn", folder)


@pytest.mark.parametrize("compressed", [True, False])
def test_is_read_whole(tmp_path, compressed):
    dataset = read(layouts.put(tmp_path, layouts.svhn_files(compressed=compressed)))
    for found, split, count in ((dataset.train, "train", 20), (dataset.test, "test", 12)):
        images, labels = layouts.svhn_arrays(split, count)
        np.testing.assert_array_equal(found.images, layouts.chw(images))
        assert found.labels.tolist() == [0 if label == 10 else label for label in labels]
        assert 0 in found.labels and found.images.flags.c_contiguous and found.images.flags.writeable
    assert dataset.class_names == tuple("0123456789") and dataset.source == str(tmp_path)


@pytest.mark.parametrize("inner, given", [
    ("svhn", "."), ("SVHN", "."), ("x", "x"), ("x", "x/train_32x32.mat"), ("x", "x/test_32x32.mat"),
])  # fmt: skip
def test_where_it_may_lie(tmp_path, inner, given):
    layouts.put(tmp_path / inner, layouts.svhn_files())
    assert len(read(str(tmp_path / given)).test) == 12


def test_extra_images_are_not_read(tmp_path):
    assert len(read(layouts.put(tmp_path, layouts.svhn_files() | {"extra_32x32.mat": b"whatever"})).train) == 20


def test_labels_may_be_a_row(tmp_path):
    images, labels = layouts.svhn_arrays("train", 20)
    file = io.BytesIO()
    savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": labels[None].astype(np.int16)}, do_compression=False)
    row = layouts.svhn_files() | {"train_32x32.mat": file.getvalue()}
    assert read(layouts.put(tmp_path, row)).train.labels.tolist() == (labels % 10).tolist()


@pytest.mark.parametrize("missing", ["train_32x32.mat", "test_32x32.mat"])
def test_missing_file(tmp_path, missing):
    (layouts.put(tmp_path, layouts.svhn_files()) / missing).unlink()
    assert error_of(lambda: read(tmp_path)).startswith(f"{tmp_path}: {missing} missing; expected train_32x32.mat and")


def test_nothing_there(tmp_path):
    message = f"{tmp_path}: no SVHN here; expected train_32x32.mat and test_32x32.mat (cropped digits, format 2)"
    assert error_of(lambda: read(tmp_path)) == message
    assert "svhn needs the folder that holds" in error_of(lambda: read(None))
    with pytest.raises(NotHere):
        read(tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_files(tmp_path: Path, compressed: bool) -> None:
    """A type code that there is not crashes scipy itself: this test then ends the whole process."""
    layouts.put(tmp_path, layouts.svhn_files(train=24, compressed=compressed))  # 24 labels: no padding at the end
    layouts.check_cuts(tmp_path / "train_32x32.mat", lambda: read(tmp_path))
    layouts.check_flips(tmp_path / "test_32x32.mat", lambda: read(tmp_path), count=600)


@pytest.mark.parametrize("place", [136, 152, 176, 184])
def test_type_codes_that_there_are_not(tmp_path: Path, place: int) -> None:
    """Of flags, shape, name and values: the tags at the start of the file."""
    content = bytearray(layouts.svhn_files(compressed=False)["train_32x32.mat"])
    for code in (0, 8, 10, 14, 15, 19, 77, 255):
        content[place] = code
        layouts.put(tmp_path, layouts.svhn_files() | {"train_32x32.mat": bytes(content)})
        assert "train_32x32.mat: truncated or no MATLAB file" in error_of(lambda: read(tmp_path))


def mat(**arrays):
    file = io.BytesIO()
    savemat(file, arrays)
    return file.getvalue()


X, Y = np.zeros((32, 32, 3, 4), np.uint8), np.array([[1], [2], [3], [10]], np.uint8)


def test_other_variables_are_passed_over(tmp_path):
    content = mat(a={"b": X}, X=X, notes="text", c=np.array([X, "x"], object), y=Y, d=X * 1j)
    dataset = read(layouts.put(tmp_path, layouts.svhn_files() | {"train_32x32.mat": content}))
    assert dataset.train.labels.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("content, says", [
    (mat(X=X, y=np.where(Y == 1, 11, Y)), "label 11, expected 1 to 10"),
    (mat(X=X, y=np.where(Y == 1, 0, Y)), "label 0, expected 1 to 10"),
    (mat(X=X, y=Y[:3]), "3 labels for 4 images"),
    (mat(X=X, y=np.ones((2, 2), np.uint8)), "labels are 2 x 2 uint8"),
    (mat(X=X, y=Y + 0.5), "labels are 4 float64, expected one whole number for each image"),
    (mat(X=X), "holds no y; expected X and y"),
    (mat(y=Y), "holds no X"),
    (mat(X=X / 255, y=Y), "X is 32 x 32 x 3 x 4 float64, expected 32 x 32 x 3 x N uint8"),
    (mat(X=X[..., 0], y=Y), "X is 32 x 32 x 3 uint8"),
    (mat(X=X.transpose(3, 0, 1, 2), y=Y), "X is 4 x 32 x 32 x 3 uint8"),
    (mat(X={"a": X}, y=Y), "no plain array of numbers"),
    (mat(X=X * 1j, y=Y), "no plain array of numbers"),
    (mat(X=X[..., :0], y=Y[:0]), "0 labels for 0 images"),
    (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x00" * 400, "train_32x32.mat: truncated or no MATLAB"),
    (b"<html>not found</html>", "no header of MATLAB 5"),
])  # fmt: skip
def test_wrong_content(tmp_path, content, says):
    message = error_of(lambda: read(layouts.put(tmp_path, layouts.svhn_files() | {"train_32x32.mat": content})))
    assert f"{tmp_path}/train_32x32.mat: " in message and says in message
