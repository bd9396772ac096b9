"""Image trees: of any dataset that people keep as class folders, and of images of their own."""

from __future__ import annotations

import zipfile

import layouts
import numpy as np
import pytest
from layouts import error_of, put, put_zip, tree_files, under
from PIL import Image

from puat_fast.data import load_dataset, split_indices
from puat_fast.data.formats import BrokenFiles, cifar10, cifar100

ABC = ("apple", "bee", "cat")


def read(folder, name="folder"):
    return load_dataset(name, folder)


def check(dataset, files, classes, splits=("train", "test")):
    for found, split in zip((dataset.train, dataset.test), splits, strict=True):
        names = [sorted(name for name in files if name.startswith(f"{split}/{folder}/")) for folder in classes]
        images = [layouts.decode(files[name]) for of_class in names for name in of_class]
        np.testing.assert_array_equal(found.images, np.stack(images))
        assert found.labels.tolist() == [k for k, of_class in enumerate(names) for _ in of_class]


@pytest.mark.parametrize(
    "splits", [("train", "test"), ("train", "val"), ("training", "validation"), ("train", "valid")]
)
@pytest.mark.parametrize("kind, size", [("PNG", 32), ("JPEG", 32), ("PNG", 64), ("PNG", 28), ("BMP", 40), ("WEBP", 64)])
def test_splits_kinds_and_sizes(tmp_path, splits, kind, size):
    files = tree_files(ABC, splits, size, kind)
    dataset = read(put(tmp_path, files))
    check(dataset, files, ABC, splits)
    assert dataset.class_names == ABC and dataset.name == "folder"


def test_lossless_pixels_are_exact(tmp_path):
    images = layouts.pixels(6, seed=9)
    files = {f"{s}/{c}/a.png": layouts.encode(images[i])
             for i, (s, c) in enumerate((s, c) for s in ("train", "test") for c in ABC)}  # fmt: skip
    dataset = read(put(tmp_path, files))
    np.testing.assert_array_equal(np.concatenate([dataset.train.images, dataset.test.images]), layouts.chw(images))


@pytest.mark.parametrize("size", [32, 64])
def test_modes(tmp_path, size):
    files = tree_files(ABC, size=size, modes=layouts.MODES, counts=(10, 5))
    check(read(put(tmp_path, files)), files, ABC)


@pytest.mark.parametrize(
    "size, box", [((30, 40), (5, 0, 35, 30)), ((40, 30), (0, 5, 30, 35)), ((32, 64), (16, 0, 48, 32))]
)
def test_longer_side_is_cropped_at_the_centre(tmp_path, size, box):
    files = tree_files(ABC, size=size)
    image = Image.fromarray(layouts.pixels(1, size, 1)[0])
    files["train/apple/img0.png"] = layouts.encode(image)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, box)).transpose(2, 0, 1)
    np.testing.assert_array_equal(read(put(tmp_path, files)).train.images[0], expected)


@pytest.mark.parametrize("count", [10, 12])
def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path, count):
    names = [str(k) for k in range(count)]
    files = tree_files(names, counts=(1, 1))
    dataset = read(put(tmp_path, files))
    check(dataset, files, names)
    assert dataset.class_names == tuple(names)


@pytest.mark.parametrize("name, classes", [
    ("cifar10", cifar10.LAYOUT.class_names), ("cifar10", [*map(str, range(10))]),
    ("cifar100", cifar100.LAYOUT.class_names), ("cifar100", [*map(str, range(100))]), ("svhn", [*map(str, range(10))]),
])  # fmt: skip
@pytest.mark.parametrize("where", [".", "own folder", "zip", "zip itself"])
def test_known_sets_as_trees(tmp_path, name, classes, where):
    files = tree_files(classes, counts=(1, 1))
    if "zip" in where:
        place = put_zip(tmp_path / "a.zip", under(name, files))
        given = place if where == "zip itself" else None
    else:
        given = put(tmp_path, under(name, files) if where == "own folder" else files)
    if given is None:  # only the archive itself is taken: which of the .zip files in a folder would it be?
        assert f"{tmp_path}: no" in error_of(lambda: read(tmp_path, name))
        return
    dataset = read(given, name)
    check(dataset, files, classes)
    assert dataset.name == name and dataset.num_classes == len(classes)
    assert dataset.class_names[0] in ("airplane", "apple", "0")


def test_cifar_order_is_that_of_the_standard_names_not_of_the_alphabet(tmp_path):
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    dataset = read(put(tmp_path, tree_files(names, counts=(1, 1))), "cifar10")
    assert dataset.class_names == names and dataset.train.labels.tolist() == list(range(10))


def test_litter_and_other_files_are_passed_over(tmp_path):
    files = tree_files(ABC)
    more = {"train/apple/readme.txt": b"", "train/notes.txt": b"", "train/.cache/x.png": b"", "extra/x/y.png": b""}
    check(read(put(tmp_path, layouts.littered(files) | more)), files, ABC)


def test_images_in_an_inner_folder(tmp_path):
    files = tree_files(ABC)
    moved = {name.replace("/img", "/images/img"): content for name, content in files.items()}
    check(read(put(tmp_path, moved)), files, ABC)


@pytest.mark.parametrize("directories", [True, False])
def test_zip(tmp_path, directories):
    files = tree_files(ABC, size=64, kind="JPEG")
    check(read(put_zip(tmp_path / "a.zip", layouts.littered(files), directories)), files, ABC)


def test_the_datasets_own_files_come_before_an_unrelated_tree(write):
    folder = put(write("cifar10"), tree_files(ABC))
    assert read(folder, "cifar10").class_names[0] == "class_0"
    assert read(folder).class_names == ABC


def test_svhn_files_come_before_a_tree(tmp_path):
    put(tmp_path, layouts.svhn_files() | tree_files(ABC))
    assert len(read(tmp_path, "svhn").train) == 20


def test_an_unrelated_tree_is_not_taken_for_cifar(tmp_path):
    message = error_of(lambda: read(put(tmp_path, tree_files(ABC)), "cifar10"))
    assert f"{tmp_path}/train: no folder airplane, automobile" in message and "has apple, bee;" in message
    assert "expected a folder for each of its class names or numbers" in message


def test_nothing_there(tmp_path):
    assert error_of(lambda: read(tmp_path)).startswith(f"{tmp_path}: no image tree here; expected train/<class>/*.png")
    assert "no CIFAR-10 here" in error_of(lambda: read(tmp_path, "cifar10"))  # its own files are told, not a tree
    assert "no such file or folder" in error_of(lambda: read(tmp_path / "x"))
    assert "folder needs the folder that holds train/<class>" in error_of(lambda: read(None))


def without(start, files):
    return {name: content for name, content in files.items() if not name.startswith(start)}


@pytest.mark.parametrize("files, says", [
    (without("test/", tree_files(ABC)), "no image tree here"),
    (without("test/bee/", tree_files(ABC)), "test: no folder bee; expected a folder for each of the classes"),
    (without("train/bee/", tree_files(ABC)), "test: has bee; expected a folder for each of the classes"),
    (tree_files(ABC[:1]), "train: one class folder (apple), expected two at least"),
    (without("train/bee/", tree_files(ABC)) | {"train/bee/a.txt": b""}, "train: no image in bee"),
    (without("test/bee/", tree_files(ABC)) | {"test/bee/._a.png": b""}, "test: no image in bee"),
])  # fmt: skip
def test_what_is_missing(tmp_path, files, says):
    message = error_of(lambda: read(put(tmp_path, files)))
    assert message.startswith(str(tmp_path)) and says in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_damaged_images(tmp_path, kind):
    file = put(tmp_path, tree_files(ABC, kind=kind)) / f"test/bee/img1.{kind.lower()}"
    content = file.read_bytes()
    for cut in [content[: len(content) * k // 10] for k in (0, 1, 5, 8)]:
        file.write_bytes(cut)
        assert f"1 file cannot be read: test/bee/img1.{kind.lower()}: " in error_of(lambda: read(tmp_path))
    file.write_bytes(content)
    if kind == "PNG":  # its checksums tell a changed byte; the others may be read with another pixel
        layouts.check_flips(file, lambda: read(tmp_path))


def test_every_broken_image_of_both_splits_is_named(tmp_path):
    broken = {f"{split}/{name}/img{k}.png" for split, k in (("train", 2), ("test", 0)) for name in ABC}
    put(tmp_path, tree_files(ABC) | dict.fromkeys(broken, b"\x89PNG\r\n"))
    with pytest.raises(BrokenFiles, match=r"6 files cannot be read: .*; and 1 more$") as caught:
        read(tmp_path)
    assert {told.partition(": ")[0] for told in caught.value.files} == broken


def test_huge_image_is_refused_not_decoded(tmp_path):
    """A header that tells 60000 x 60000 pixels: 10 GB if it were believed."""
    files = tree_files(ABC)
    png = bytearray(files["train/bee/img0.png"])
    png[16:24] = (60000).to_bytes(4, "big") * 2
    assert "train/bee/img0.png: " in error_of(lambda: read(put(tmp_path, files | {"train/bee/img0.png": bytes(png)})))


@pytest.mark.parametrize("name", ["../train/apple/x.png", "/train/apple/x.png", "train/apple/../../../x.png"])
def test_archive_whose_members_escape_is_refused(tmp_path, name):
    archive = put_zip(tmp_path / "a.zip", tree_files(ABC))
    with zipfile.ZipFile(archive, "a") as pack:
        pack.writestr(name, b"evil")
    assert "leads out of the archive" in error_of(lambda: read(archive))
    assert "leads out of the archive" in error_of(lambda: read(archive, "cifar10"))


def test_member_that_is_file_and_folder_at_once(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as pack:
        for name, content in tree_files(ABC).items():
            pack.writestr(name, content)
        pack.writestr("train/apple", b"")  # a file where the others have a folder
    error_of(lambda: read(archive))


@pytest.mark.parametrize("labels", [3, 6])
def test_three_images_of_three_classes(tmp_path, labels):
    """As few as there can be: all are labelled; more labels than images are refused."""
    dataset = read(put(tmp_path, tree_files(ABC, counts=(1, 1))))
    assert len(dataset.train) == len(dataset.test) == 3
    if labels == 3:
        split = split_indices(dataset.train.labels, 3, 3, 1, 0.0)
        assert sorted(split.labelled) == [0, 1, 2] and not len(split.unlabelled) and not len(split.validation)
    else:
        with pytest.raises(ValueError, match="asks for 2 labelled images per class, but class 0 has only 1"):
            split_indices(dataset.train.labels, 3, labels, 1, 0.0)


def test_labels_that_are_no_multiple_of_the_classes(tmp_path):
    dataset = read(put(tmp_path, tree_files(ABC, counts=(1, 1))))
    with pytest.raises(ValueError, match="4 is not a positive multiple of the 3 classes"):
        split_indices(dataset.train.labels, 3, 4, 1, 0.0)
    with pytest.raises(ValueError, match="class 3 has no training image"):
        split_indices(dataset.train.labels, 4, 4, 1, 0.0)
