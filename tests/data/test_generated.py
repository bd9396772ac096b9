"""Files of more unlabelled images: DMAT's .npz, RST's pickle; and what a split makes of them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import chw, error_of, npz, pixels, rst_pickle

from puat_fast.config import Config
from puat_fast.data import Dataset, ImageSet
from puat_fast.data.formats import generated, load_generated
from puat_fast.data.splits import training_set

X, Y = pixels(20), np.arange(20) % 10


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


FILES = {
    "a.npz": npz(image=X, label=Y),
    "b.npz": npz(True, image=X, label=Y.astype(np.uint8)),
    "c.npz": npz(True, image=X, label=Y.reshape(-1, 1)),
    "chw.npz": npz(image=chw(X), label=Y),
    "ti_500K_pseudo_labeled.pickle": rst_pickle(X, Y),
    "a.pkl": rst_pickle(X, Y, 2),
    "a.p": rst_pickle(X, Y, 5),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rows", [7, 20, 1000])
def test_is_read_whole(tmp_path, monkeypatch, name, rows):
    monkeypatch.setattr(generated, "_ROWS", rows)
    data = load_generated(str(put(tmp_path, name, FILES[name])), 10)
    np.testing.assert_array_equal(data.images, chw(X))
    assert data.labels.tolist() == Y.tolist() and data.images.flags.c_contiguous


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "a.pkl"])
def test_damaged_files(tmp_path, name):
    file = put(tmp_path, name, FILES[name])
    layouts.check_cuts(file, lambda: load_generated(file))
    layouts.check_flips(file, lambda: load_generated(file), count=120)


@pytest.mark.parametrize("name", ["a.npz", "b.npz"])
def test_changed_pixels_do_not_pass(tmp_path, name):
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 4
    assert name in error_of(lambda: load_generated(put(tmp_path, name, bytes(content))))


@pytest.mark.parametrize("name, content, says", [
    ("a.npz", npz(image=X, label=Y[:19]), "19 labels for 20 images"),
    ("a.npz", npz(image=X[:19], label=Y), "20 labels for 19 images"),
    ("a.npz", npz(image=X), "no 'label' among its arrays (image)"),
    ("a.npz", npz(label=Y), "no 'image' among its arrays"),
    ("a.npz", npz(image=X / 255, label=Y), "images are 20 x 32 x 32 x 3 float64, expected N x H x W x 3"),
    ("a.npz", npz(image=X[:, 0], label=Y), "images are 20 x 32 x 3 uint8"),
    ("a.npz", npz(image=np.asfortranarray(X), label=Y), "'image' is not a plain array in C order"),
    ("a.npz", npz(image=np.array([None] * 20), label=Y), "'image' is not a plain array in C order"),
    ("a.npz", npz(image=X, label=np.array([None] * 20)), "Object arrays cannot be loaded"),
    ("a.npz", npz(image=X, label=Y - 1), "label -1, expected 0 to 9"),
    ("a.npz", npz(image=X, label=Y + 1), "label 10, expected 0 to 9"),
    ("a.npz", npz(image=X, label=Y + 0.0), "labels are 20 float64"),
    ("a.npz", npz(image=X[:0], label=Y[:0]), "0 labels for 0 images"),
    ("a.pkl", rst_pickle(X, Y[:3]), "3 labels for 20 images"),
    ("a.pkl", rst_pickle(X, Y + 1), "label 10, expected 0 to 9"),
    ("a.pkl", rst_pickle(X / 255, Y), "images are 20 x 32 x 32 x 3 float64"),
    ("a.pkl", rst_pickle(X, list(Y.tolist())), "b'extrapolated_targets' is list, expected an array"),
    ("a.pkl", pickle.dumps({"data": X}), "b'extrapolated_targets' is not among its keys (b'data')"),
    ("a.pkl", pickle.dumps([X]), "holds list, expected a pickled dict"),
    ("a.bin", b"", ".bin; expected .npz with image and label, or .pickle with data and extrapolated_targets"),
    ("a", b"", "no suffix; expected .npz"),
])  # fmt: skip
def test_wrong_content(tmp_path, name, content, says):
    message = error_of(lambda: load_generated(put(tmp_path, name, content), 10))
    assert message.startswith(f"{tmp_path}/{name}: ") and says in message


def test_no_such_file(tmp_path):
    assert error_of(lambda: load_generated(tmp_path / "x.npz")).startswith(f"{tmp_path}/x.npz: no such file; expected")
    assert "no such file" in error_of(lambda: load_generated(tmp_path))


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_that_names_code_is_refused(tmp_path):
    content = pickle.dumps({"data": X, "extrapolated_targets": Evil(f"touch {tmp_path}/ran")})
    message = error_of(lambda: load_generated(put(tmp_path, "a.pickle", content)))
    assert "a.pickle: refuses to run code: the pickle names" in message and not (tmp_path / "ran").exists()


def dataset(per_class: int = 4, num_classes: int = 10) -> Dataset:
    labels = np.repeat(np.arange(num_classes), per_class)
    images = ImageSet(np.ascontiguousarray(chw(pixels(len(labels), seed=8))), labels)
    return Dataset("cifar10", tuple(map(str, range(num_classes))), images, images)


@pytest.mark.parametrize("name", ["a.npz", "a.pkl"])
def test_extra_images_are_unlabelled_and_their_labels_are_not_used(tmp_path, name):
    """Labels of 4711 are of no class here: whoever took one would fail."""
    labels = np.full(20, 4711)
    content = npz(image=X, label=labels) if name == "a.npz" else rst_pickle(X, labels)
    config = Config.preset("paper", dataset="cifar10", data={
        "n_labelled": 20, "val_fraction": 0.5, "extra_unlabelled": str(put(tmp_path, name, content))})  # fmt: skip
    data, split = training_set(dataset(), config.data, 1)
    assert (len(data), len(split.labelled), len(split.validation), len(split.unlabelled)) == (60, 10, 10, 40)
    np.testing.assert_array_equal(data.images[40:], chw(X))
    assert set(data.labels[40:]) == {-1} and set(split.unlabelled[-20:]) == set(range(40, 60))
    assert max(split.labelled_all) < 40 and max(split.validation) < 40
