"""Small copies of the datasets in each true on-disk layout.

A layout is a dict of relative path -> content, to be written as a folder or as a zip: what users do to a dataset
(rename it, nest it, move its val images into class folders) is then a function from dict to dict.
"""

from __future__ import annotations

import functools
import io
import pickle
import random
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from puat_fast.data import DataError

Files = dict[str, bytes]

# The ten of the paper in its order (spec 1.8), and four that it leaves out.
PAPER_WNIDS = (
    "n02129165", "n09193705", "n07920052", "n04399382", "n02056570", "n02123045", "n03837869", "n02279972",
    "n03100240", "n02843684",
)  # fmt: skip
PAPER_NUMBERS = (34, 194, 193, 161, 21, 30, 124, 44, 94, 76)
OTHER_WNIDS = ("n01443537", "n02124075", "n04067472", "n12267677")
WNIDS = tuple(sorted(PAPER_WNIDS + OTHER_WNIDS))


def pixels(count: int, size: int | tuple[int, int] = 32, seed: int = 0) -> np.ndarray:
    """N x H x W x 3 uint8."""
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def chw(images: np.ndarray) -> np.ndarray:
    """N x H x W x 3 -> N x 3 x H x W."""
    return images.transpose(0, 3, 1, 2)


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    """What PIL makes of an image file, at 32 x 32: 3 x 32 x 32."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    """An .npz file."""
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a layout as a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def put_zip(path: Path, files: Mapping[str, bytes], directories: bool = True, prefix: str = "") -> Path:
    """Write a layout as a zip archive; `directories`: with entries for folders, as most tools write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        if directories:
            for folder in sorted({f"{'/'.join(n.split('/')[:k])}/" for n in files for k in range(1, n.count("/") + 1)}):
                pack.writestr(prefix + folder, b"")
        for name, content in files.items():
            pack.writestr(prefix + name, content)
    return path


def under(folder: str, files: Files) -> Files:
    """The layout in a folder of that name."""
    return {f"{folder}/{name}": content for name, content in files.items()}


def littered(files: Files) -> Files:
    """With what macOS leaves in every folder, names of image files included."""
    junk = {f"{name.rpartition('/')[0]}/._{name.rpartition('/')[2]}".lstrip("/"): b"\x00\x05\x16\x07" for name in files}
    junk |= {f"{name.rpartition('/')[0]}/.DS_Store".lstrip("/"): b"Bud1" for name in files}
    junk |= {f"__MACOSX/{name}": b"\x00\x05\x16\x07" for name in files}
    return files | junk


# SVHN


def svhn_arrays(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """N x 32 x 32 x 3 images and N labels 1 .. 10 as the files have them, 10 for the digit 0."""
    seed = len(split)
    return pixels(count, seed=seed), np.array([(i * 3 + seed) % 10 + 1 for i in range(count)], np.uint8)


def svhn_mat(images: np.ndarray, labels: np.ndarray, compressed: bool = True) -> bytes:
    """X 32 x 32 x 3 x N, y N x 1, MATLAB 5."""
    file = io.BytesIO()
    savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": labels.reshape(-1, 1)}, do_compression=compressed)
    # scipy's header tells the time: without it the same arrays are the same bytes, in whatever second they are written
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]


def svhn_files(train: int = 20, test: int = 12, compressed: bool = True) -> Files:
    """The two files that are used, as downloaded."""
    return {f"{s}_32x32.mat": svhn_mat(*svhn_arrays(s, n), compressed) for s, n in (("train", train), ("test", test))}


# Tiny ImageNet


@functools.cache
def _tiny(wnids: tuple[str, ...], per_class: int, val_per_class: int) -> Files:
    rng, images = np.random.default_rng(5), dict[str, bytes]()

    def jpeg() -> bytes:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64))
        # Some of the real ones are grey-scale files of one channel.
        return encode(coarse.convert("L") if len(images) % 4 == 1 else coarse, "JPEG", quality=90)

    shuffled = sorted(wnids, key=lambda wnid: wnid[::-1])
    texts = {
        "wnids.txt": "\n".join(shuffled),
        "words.txt": "\n".join(f"{wnid}\tname of {wnid}, another name" for wnid in (*shuffled, "n00001740")),
    }
    for wnid in wnids:
        names = [f"{wnid}_{k}.JPEG" for k in range(per_class)]
        images |= {f"train/{wnid}/images/{name}": jpeg() for name in names}
        texts[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(f"{name}\t0\t10\t63\t58\n" for name in names)
    owners = list(wnids) * val_per_class
    random.Random(3).shuffle(owners)
    images |= {f"val/images/val_{k}.JPEG": jpeg() for k in range(len(owners))}
    rows = (f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62\n" for k, wnid in enumerate(owners))
    texts["val/val_annotations.txt"] = "".join(rows)
    images |= {f"test/images/test_{k}.JPEG": jpeg() for k in range(2)}
    return {name: text.encode() for name, text in texts.items()} | images


def tiny_files(wnids: Iterable[str] = WNIDS, per_class: int = 3, val_per_class: int = 2) -> Files:
    """tiny-imagenet-200 as downloaded, without its own folder's name."""
    return dict(_tiny(tuple(wnids), per_class, val_per_class))


def tiny_owners(files: Files) -> dict[str, str]:
    """val_<k>.JPEG -> its class."""
    rows = (line.split("\t") for line in files["val/val_annotations.txt"].decode().splitlines())
    return {row[0]: row[1] for row in rows}


def tiny_expected(files: Files, wnids: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """train, val -> images and labels as they must be read: class by class, in the order of the sorted names."""
    found = {}
    owners = tiny_owners(files)
    for split in ("train", "val"):
        images, labels = [], []
        for label, wnid in enumerate(wnids):
            # by number within a class: val in the order of the annotations, train by name (one digit each here)
            if split == "train":
                names = sorted(name for name in files if name.startswith(f"train/{wnid}/images/"))
            else:
                names = [f"val/images/{name}" for name, owner in owners.items() if owner == wnid]
            images += [decode(files[name]) for name in names]
            labels += [label] * len(names)
        found[split] = np.stack(images), np.array(labels)
    return found


def val_in_folders(files: Files, inner: str = "") -> Files:
    """val/<wnid>/*.JPEG, or with inner="images/" val/<wnid>/images/*.JPEG, as many scripts rearrange it."""
    owners = tiny_owners(files)
    moved = {}
    for name, content in files.items():
        file = name.rpartition("/")[2]
        if name.startswith("val/images/"):
            moved[f"val/{owners[file]}/{inner}{file}"] = content
        elif name != "val/val_annotations.txt":
            moved[name] = content
    return moved


def train_flat(files: Files) -> Files:
    """train/<wnid>/*.JPEG, without the boxes."""
    return {name.replace("/images/", "/") if name.startswith("train/") else name: content
            for name, content in files.items() if not name.endswith("_boxes.txt")}  # fmt: skip


def tiny_npz(column: bool = False, compressed: bool = False) -> tuple[Files, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The repack train.npz and val.npz, and its images (N x 64 x 64 x 3) and labels 0 .. 199."""
    arrays, files = {}, {}
    for split, repeat in (("train", 2), ("val", 1)):
        labels = np.random.default_rng(2).permutation(np.repeat(np.arange(200), repeat))
        arrays[split] = pixels(len(labels), 64, seed=repeat), labels
        images, labels = arrays[split]
        files[f"{split}.npz"] = npz(compressed, image=images, label=labels.reshape(-1, 1) if column else labels)
    return files, arrays


# ImageNet32

IMAGENET32 = (*(f"train_data_batch_{k}" for k in range(1, 11)), "val_data")


def imagenet32_arrays(name: str) -> tuple[np.ndarray, list[int]]:
    """N x 3072 pixels and labels 1 .. 1000 of a file, some of every batch among the paper's 1 .. 10."""
    k = IMAGENET32.index(name)
    labels = [1 + (k + i) % 10 for i in range(5)] + [11, 1000, 500 + k] + ([10, 3, 1] if k % 2 else [])
    if name == "val_data":
        labels = list(range(12, 0, -1))
    return pixels(len(labels), seed=100 + k).reshape(len(labels), -1), labels


def imagenet32_content(name: str, kind: str, protocol: int = 3) -> bytes:
    """One file. kind: pickle | npz."""
    data, labels = imagenet32_arrays(name)
    mean = data.mean(0)  # float64, as in the real ones
    if kind == "npz":
        return npz(data=data, labels=np.array(labels), **({} if name == "val_data" else {"mean": mean}))
    content: dict[str, Any] = {"data": data, "labels": labels}
    return pickle.dumps(content if name == "val_data" else content | {"mean": mean}, protocol)


def imagenet32_files(kind: str = "pickle", protocol: int = 3) -> Files:
    """The eleven files, flat."""
    end = ".npz" if kind == "npz" else ""
    return {name + end: imagenet32_content(name, kind, protocol) for name in IMAGENET32}


def imagenet32_parts(files: Files, train: str, val: str) -> Files:
    """train/train_data_batch_*, val/val_data."""
    return {f"{val if name.startswith('val') else train}/{name}": content for name, content in files.items()}


def put_imagenet32_zips(folder: Path, kind: str, inner: bool = True) -> Path:
    """Imagenet32_train.zip and Imagenet32_val.zip, or the _npz ones; inner: in a folder of the archive's name."""
    end = "_npz" if kind == "npz" else ""
    for split in ("train", "val"):
        files = {name: content for name, content in imagenet32_files(kind).items() if name.startswith(split)}
        stem = f"Imagenet32_{split}{end}"
        put_zip(folder / f"{stem}.zip", under(stem, files) if inner else files)
    return folder


# Image trees

MODES = ("RGB", "L", "P", "RGBA", "LA")


def tree_files(
    classes: Iterable[str], splits: tuple[str, str] = ("train", "test"), size: int | tuple[int, int] = 32,
    kind: str = "PNG", counts: tuple[int, int] = (3, 2), modes: tuple[str, ...] = ("RGB",),
) -> Files:  # fmt: skip
    """<split>/<class>/img<k>.<kind>, the modes of PIL in turn."""
    files, seed, classes = dict[str, bytes](), 0, list(classes)
    for split, count in zip(splits, counts, strict=True):
        for name in classes:
            for k in range(count):
                seed += 1
                image = Image.fromarray(pixels(1, size, seed)[0]).convert(modes[seed % len(modes)])
                files[f"{split}/{name}/img{k}.{kind.lower()}"] = encode(image, kind)
    return files


# Generated images


def rst_pickle(images: np.ndarray, labels: np.ndarray, protocol: int = 4) -> bytes:
    """RST's pseudo-labelled images."""
    content = {
        "data": images,
        "extrapolated_targets": labels,
        "prediction_model": "x.ckpt",
        "prediction_model_epoch": 9,
    }
    return pickle.dumps(content, protocol)


# Damage


def cuts(content: bytes) -> list[bytes]:
    """The file, cut off at several places."""
    n = len(content)
    return [content[:k] for k in sorted({0, 1, 4, 30, 130, n // 4, n // 2, n * 9 // 10, n - 30, n - 1}) if k < n]


def flips(content: bytes, count: int, seed: int = 0, span: int | None = None) -> Iterable[bytes]:
    """The file with some byte changed, among the first and last `span` bytes where it is given, or anywhere."""
    rng = random.Random(seed)
    for _ in range(count):
        place = rng.randrange(len(content) if span is None else min(2 * span, len(content)))
        if span is not None and place >= span:
            place = len(content) - 1 - (place - span) % len(content)
        changed = bytearray(content)
        changed[place % len(content)] ^= rng.randrange(1, 256)
        yield bytes(changed)


def error_of(read: Callable[[], Any]) -> str:
    """The one line of a DataError that must come."""
    with pytest.raises(DataError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_cuts(file: Path, read: Callable[[], Any], name: str = "") -> None:
    """A file that is cut off, wherever, is told by name (`name`, or its own)."""
    content = file.read_bytes()
    for cut in cuts(content):
        file.write_bytes(cut)
        assert (name or file.name) in error_of(read), len(cut)
    file.write_bytes(content)


def check_flips(file: Path, read: Callable[[], Any], count: int = 60, span: int = 300) -> None:
    """A file with a changed byte is read, or told by name; nothing else may happen. Some must be told."""
    content, told = file.read_bytes(), 0
    for changed in (*flips(content, count, span=span), *flips(content, count // 2, seed=1)):
        file.write_bytes(changed)
        try:
            read()
        except DataError as error:
            told += 1
            assert file.name in str(error) and "\n" not in str(error)
    file.write_bytes(content)
    assert told
