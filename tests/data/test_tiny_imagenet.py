"""Tiny ImageNet: as downloaded, as users rearrange it, zipped, and as the .npz repack."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import OTHER_WNIDS, PAPER_NUMBERS, PAPER_WNIDS, error_of, put, put_zip, tiny_files, under
from PIL import Image

from puat_fast.data import load_dataset
from puat_fast.data.formats import BrokenFiles

FOLDER = "tiny-imagenet-200"
NAMES = ("lion", "alp", "espresso", "teddy", "king_penguin", "tabby", "obelisk", "monarch", "convertible", "birdhouse")


def read(folder, classes="paper"):
    return load_dataset("tiny-imagenet", folder, classes)


def check(dataset, files, wnids=PAPER_WNIDS):
    """Images and labels of both splits; within a class in any order that the layout gives."""
    for found, (images, labels) in zip(
        (dataset.train, dataset.test), layouts.tiny_expected(files, wnids).values(), strict=True
    ):
        assert found.labels.tolist() == labels.tolist()
        for label in range(len(wnids)):
            mine, theirs = (sorted(x.tobytes() for x in part) for part in (
                found.images[found.labels == label], images[labels == label]))  # fmt: skip
            assert mine == theirs


def test_as_downloaded(tmp_path):
    files = tiny_files()
    dataset = read(put(tmp_path, under(FOLDER, files)))
    check(dataset, files)
    # and the very order: training images by their number, test images as val_annotations.txt has them
    for found, (images, _) in zip(
        (dataset.train, dataset.test), layouts.tiny_expected(files, PAPER_WNIDS).values(), strict=True
    ):
        np.testing.assert_array_equal(found.images, images)
    assert dataset.class_names == NAMES and (len(dataset.train), len(dataset.test)) == (30, 20)


def test_grey_files_are_among_them(tmp_path):
    images = read(put(tmp_path, tiny_files())).train.images
    grey = [bool((image[0] == image[1]).all() and (image[1] == image[2]).all()) for image in images]
    assert 0 < sum(grey) < len(grey)


REARRANGED = {
    "val/<wnid>/*": layouts.val_in_folders,
    "val/<wnid>/images/*": lambda files: layouts.val_in_folders(files, "images/"),
    "train/<wnid>/*": layouts.train_flat,
    "both": lambda files: layouts.train_flat(layouts.val_in_folders(files)),
    "only what is needed": lambda files: {n: c for n, c in files.items() if n.split("/")[0] in ("train", "val")},
    "littered": layouts.littered,
    "blank lines": lambda files: (
        files | {"val/val_annotations.txt": files["val/val_annotations.txt"].replace(b"\n", b"\r\n") + b"\n  \n"}
    ),
}


@pytest.mark.parametrize("change", REARRANGED.values(), ids=REARRANGED)
@pytest.mark.parametrize("zipped", [False, True])
def test_rearranged(tmp_path, change, zipped):
    files = tiny_files()
    changed = under(FOLDER, change(files))
    check(read(put_zip(tmp_path / f"{FOLDER}.zip", changed) if zipped else put(tmp_path, changed)), files)


@pytest.mark.parametrize("folder, given", [
    (FOLDER, "."), (FOLDER, FOLDER), ("TinyImageNet", "."), ("tiny_imagenet", "."), ("tiny-imagenet", "."),
    (f"{FOLDER}/{FOLDER}", "."), (f"{FOLDER}/{FOLDER}", FOLDER), (f"{FOLDER}/{FOLDER}", f"{FOLDER}/{FOLDER}"),
    ("renamed", "renamed"), (".", "."),
])  # fmt: skip
def test_where_it_may_lie(tmp_path, folder, given):
    put(tmp_path / folder, tiny_files(per_class=1, val_per_class=1))
    dataset = read(str(tmp_path / given))
    assert (len(dataset.train), len(dataset.test)) == (10, 10)


@pytest.mark.parametrize("directories", [True, False])
@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("change", [dict, layouts.littered])
def test_zip(tmp_path, directories, prefix, change):
    files = tiny_files()
    archive = put_zip(tmp_path / f"{FOLDER}.zip", change(under(FOLDER, files)), directories, prefix)
    for given in (archive, tmp_path):
        check(read(given), files)


def test_zip_without_its_folder(tmp_path):
    files = tiny_files()
    check(read(put_zip(tmp_path / "mine.zip", files)), files)


def test_folder_comes_before_the_archive(tmp_path):
    (tmp_path / f"{FOLDER}.zip").write_bytes(b"half of a download")
    assert len(read(put(tmp_path / FOLDER, tiny_files()).parent).train) == 30


def two_hundred() -> list[str]:
    """Ids whose sorted order has the paper's ten at the paper's numbers, as that of the real ones has."""
    ids, at = [], dict(zip(PAPER_NUMBERS, PAPER_WNIDS, strict=True))
    for number in range(200):
        ids.append(at[number] if number in at else f"n{int(ids[-1][1:]) + 1 if ids else 1440764:08d}")
    assert ids == sorted(ids)
    return ids


def test_all_classes_are_numbered_by_sorted_name_and_the_papers_are_ten_of_them(tmp_path):
    files = tiny_files(two_hundred(), 1, 1)
    put(tmp_path, under(FOLDER, files))
    everything, ten = read(tmp_path, "all"), read(tmp_path)
    assert everything.num_classes == 200 and everything.train.labels.tolist() == list(range(200))
    check(everything, files, two_hundred())
    assert everything.class_names[34] == "name of n02129165"
    for found, of_all in ((ten.train, everything.train), (ten.test, everything.test)):
        np.testing.assert_array_equal(found.images, of_all.images[list(PAPER_NUMBERS)])
        assert found.labels.tolist() == list(range(10))
    (tmp_path / FOLDER / "words.txt").unlink()
    assert read(tmp_path, "all").class_names == tuple(two_hundred())


@pytest.mark.parametrize("where", [".", "tiny-imagenet"])
@pytest.mark.parametrize("column, compressed", [(False, False), (True, True)])
def test_npz(tmp_path, column, compressed, where):
    files, arrays = layouts.tiny_npz(column, compressed)
    dataset = read(put(tmp_path / where, files).parent if where != "." else put(tmp_path, files))
    for found, split in ((dataset.train, "train"), (dataset.test, "val")):
        images, labels = arrays[split]
        rows = [row for number in PAPER_NUMBERS for row in np.flatnonzero(labels == number)]
        resized = [np.asarray(Image.fromarray(images[r]).resize((32, 32), Image.Resampling.BILINEAR)) for r in rows]
        np.testing.assert_array_equal(found.images, layouts.chw(np.stack(resized)))
        assert found.labels.tolist() == [PAPER_NUMBERS.index(labels[row]) for row in rows]
    assert dataset.class_names == NAMES
    everything = read(tmp_path, "all")
    assert everything.num_classes == 200 and np.bincount(everything.train.labels).tolist() == [2] * 200


def test_npz_and_jpeg_files_agree(tmp_path):
    """The repack of the same images, in the order of the sorted names, gives the same ten classes."""
    files, ids = tiny_files(two_hundred(), 1, 1), two_hundred()
    owners = layouts.tiny_owners(files)
    jpeg = {"train": [files[f"train/{wnid}/images/{wnid}_0.JPEG"] for wnid in ids],
            "val": [files[f"val/images/{k}"] for wnid in ids for k, of in owners.items() if of == wnid]}  # fmt: skip
    for split, contents in jpeg.items():
        np.savez(tmp_path / f"{split}.npz", image=np.stack([decoded(c) for c in contents]), label=np.arange(200))
    a, b = read(tmp_path), read(put(tmp_path / "x" / FOLDER, files))
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(a, part).images, getattr(b, part).images)
        np.testing.assert_array_equal(getattr(a, part).labels, getattr(b, part).labels)


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def npz_with(**changed):
    arrays = {"image": np.zeros((200, 8, 8, 3), np.uint8), "label": np.arange(200)} | changed
    return layouts.npz(**{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize("content, says", [
    (npz_with(label=np.arange(1, 201)), "label 200, expected 0 to 199"),
    (npz_with(label=np.arange(200) - 1), "label -1, expected 0 to 199"),
    (npz_with(label=np.arange(200.0)), "labels are 200 float64"),
    (npz_with(label=np.arange(199)), "199 labels for 200 images"),
    (npz_with(label=np.where(np.arange(200) == 124, 0, np.arange(200))), "no image of class 124"),
    (npz_with(label=np.array([None] * 200)), "Object arrays cannot be loaded"),
    (npz_with(image=np.zeros((200, 8, 8, 3))), "images are 10 x 8 x 8 x 3 float64, expected N x H x W x 3"),
    (npz_with(image=np.zeros((200, 8, 8), np.uint8)), "images are 10 x 8 x 8 uint8"),
    (npz_with(image=np.zeros((200, 0, 0, 3), np.uint8)), "images are 10 x 0 x 0 x 3 uint8"),
    (npz_with(image=None), "no 'image' among its arrays (label)"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["train.npz", "val.npz"])
def test_wrong_npz(tmp_path, name, content, says):
    message = error_of(lambda: read(put(tmp_path, {"train.npz": npz_with(), "val.npz": npz_with(), name: content})))
    assert message.startswith(f"{tmp_path}/{name}: ") and says in message


def test_damaged_npz(tmp_path):
    put(tmp_path, {"train.npz": npz_with(), "val.npz": npz_with()})
    layouts.check_cuts(tmp_path / "val.npz", lambda: read(tmp_path))
    layouts.check_flips(tmp_path / "val.npz", lambda: read(tmp_path), count=80)


def test_damaged_zip(tmp_path):
    archive = put_zip(tmp_path / f"{FOLDER}.zip", under(FOLDER, tiny_files(per_class=1, val_per_class=1)))
    layouts.check_cuts(archive, lambda: read(tmp_path))
    layouts.check_flips(archive, lambda: read(tmp_path))


def test_damaged_image(tmp_path):
    put(tmp_path, tiny_files(per_class=1, val_per_class=1))
    file = tmp_path / f"train/{PAPER_WNIDS[3]}/images/{PAPER_WNIDS[3]}_0.JPEG"
    layouts.check_cuts(file, lambda: read(tmp_path))
    layouts.check_flips(file, lambda: read(tmp_path), count=40)


def test_every_broken_and_missing_image_is_named(tmp_path):
    """Also those of the other split, and in one go."""
    top, wanted = put(tmp_path, tiny_files()), set()
    for k, wnid in enumerate(PAPER_WNIDS):
        name = f"train/{wnid}/images/{wnid}_{k % 3}.JPEG"
        (top / name).write_bytes([b"", b"no image", (top / name).read_bytes()[:-20]][k % 3])
        wanted.add(name)
    for name in [f"val/images/{n}" for n, wnid in layouts.tiny_owners(tiny_files()).items() if wnid in PAPER_WNIDS][:4]:
        (top / name).unlink()
        wanted.add(name)
    with pytest.raises(BrokenFiles, match=r"14 files cannot be read: .*; and 9 more$") as caught:
        read(tmp_path)
    assert {told.partition(":")[0] for told in caught.value.files} == wanted
    reasons = " ".join(caught.value.files)
    assert "no image of a known kind" in reasons and "truncated" in reasons and "No such file" in reasons
    assert " at 0x" not in reasons  # no addresses of objects


def test_broken_images_of_other_classes_are_not_looked_at(tmp_path):
    top = put(tmp_path, tiny_files())
    (top / f"train/{OTHER_WNIDS[0]}/images/{OTHER_WNIDS[0]}_0.JPEG").write_bytes(b"")
    assert len(read(tmp_path).train) == 30


@pytest.mark.parametrize("zipped", [False, True])
def test_missing_val_images_of_the_annotations(tmp_path, zipped):
    files = tiny_files()
    gone = [f"val/images/{name}" for name, wnid in layouts.tiny_owners(files).items() if wnid == PAPER_WNIDS[0]]
    files = {name: content for name, content in files.items() if name not in gone}
    with pytest.raises(BrokenFiles) as caught:
        read(put_zip(tmp_path / "a.zip", files) if zipped else put(tmp_path, files))
    assert [told.partition(":")[0] for told in caught.value.files] == gone
    assert all("No such file" in told for told in caught.value.files)


def without(start):
    return lambda files: {name: content for name, content in files.items() if not name.startswith(start)}


def annotated(line):
    return lambda files: files | {"val/val_annotations.txt": files["val/val_annotations.txt"] + line}


@pytest.mark.parametrize("change, says", [
    (without(f"train/{PAPER_WNIDS[4]}/"), f"train: no {PAPER_WNIDS[4]}; a truncated download?"),
    (without(f"train/{PAPER_WNIDS[4]}/images"), f"train: no image of {PAPER_WNIDS[4]}; a truncated download?"),
    (without("val/val_annotations.txt"), "val/val_annotations.txt: missing, and val/ holds no folder for each class"),
    (without("val/"), "no Tiny ImageNet here; expected tiny-imagenet-200/ with train/ and val/"),
    (without("train/"), "no Tiny ImageNet here"),
    (annotated(b"val_9.JPEG"), "val/val_annotations.txt: line 29 is 'val_9.JPEG', expected `val_0.JPEG n0...`"),
    (annotated(b"val_9.txt\tn02129165\n"), "val/val_annotations.txt: line 29 is"),
    (annotated(b"../../../x.JPEG\tn02129165\n"), "val/val_annotations.txt: line 29 is"),
    (annotated(b"/etc/x.png\tn02129165\n"), "val/val_annotations.txt: line 29 is"),
    (lambda files: files | {"val/val_annotations.txt": b""}, "val: no image of n02129165, n09193705"),
    (lambda files: without(f"val/{PAPER_WNIDS[0]}/")(layouts.val_in_folders(files)), "val_annotations.txt: missing"),
])  # fmt: skip
def test_what_is_missing(tmp_path, change, says):
    message = error_of(lambda: read(put(tmp_path, change(tiny_files()))))
    assert str(tmp_path) in message and says in message


def test_all_needs_all(tmp_path):
    put(tmp_path, tiny_files())
    assert "train: 14 class folders, expected 200; a truncated download?" in error_of(lambda: read(tmp_path, "all"))


def test_empty_class_folder(tmp_path):
    put(tmp_path, without(f"train/{PAPER_WNIDS[4]}/")(tiny_files()))
    (tmp_path / f"train/{PAPER_WNIDS[4]}").mkdir()
    assert f"train: no image of {PAPER_WNIDS[4]}" in error_of(lambda: read(tmp_path))


@pytest.mark.parametrize("name", [f"../{FOLDER}/val/images/val_0.JPEG", "/val_0.JPEG", "a\\b.JPEG"])
def test_archive_whose_members_escape_is_refused(tmp_path, name):
    archive = put_zip(tmp_path / f"{FOLDER}.zip", under(FOLDER, tiny_files()))
    with zipfile.ZipFile(archive, "a") as pack:
        pack.writestr(name, b"evil")
    assert f"{archive}: refused: its member {name!r} leads out of the archive" in error_of(lambda: read(tmp_path))


def test_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    files = tiny_files()
    name, outside = f"{FOLDER}/train/{PAPER_WNIDS[0]}/images/{PAPER_WNIDS[0]}_9.JPEG", tmp_path / "outside.JPEG"
    outside.write_bytes(next(content for n, content in files.items() if n.endswith("JPEG")))
    link = zipfile.ZipInfo(name)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(put_zip(tmp_path / "a" / f"{FOLDER}.zip", under(FOLDER, files)), "a") as pack:
        pack.writestr(link, str(outside))
    assert len(read(tmp_path / "a").train) == 30
