"""The files that the authors of each dataset published, by name, MD5, size and address.

Sources: torchvision's dataset modules (CIFAR, SVHN); the repositories that train on them (Tiny ImageNet, ImageNet32).
The readers do not ask this: other files of the same layout are welcome. Downloads and `verify` do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownFile:
    """A published file. `name` is that of the file alone, without folders."""

    name: str
    md5: tuple[str, ...] = ()  # one for each published version, lower case; empty: not known
    size: int | None = None  # bytes; None: not known
    url: str | None = None  # None: not to be had by a plain request


def _named(**md5: str) -> tuple[KnownFile, ...]:
    return tuple(KnownFile(name, (digest,)) for name, digest in md5.items())


def _imagenet32(suffix: str, train: tuple[str, ...], val: str) -> tuple[KnownFile, ...]:
    names = (*(f"train_data_batch_{k}{suffix}" for k in range(1, 11)), f"val_data{suffix}")
    return tuple(KnownFile(name, (digest,)) for name, digest in zip(names, (*train, val), strict=True))


_KRIZ = "https://www.cs.toronto.edu/~kriz/"
_HOUSENUMBERS = "http://ufldl.stanford.edu/housenumbers/"

# What a user downloads. What has an address here is what `download.fetch` gets.
ARCHIVES: dict[str, tuple[KnownFile, ...]] = {
    "cifar10": (
        KnownFile(
            "cifar-10-python.tar.gz",
            ("c58f30108f718f92721af3b95e74349a",),
            170498071,
            _KRIZ + "cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": (
        KnownFile(
            "cifar-100-python.tar.gz",
            ("eb9058c3a382ffc7106e4002c42a8d85",),
            169001437,
            _KRIZ + "cifar-100-python.tar.gz",
        ),
    ),
    "svhn": (
        KnownFile(
            "train_32x32.mat",
            ("e26dedcc434d2e4c54c9b2d4a06d8373",),
            182040794,
            _HOUSENUMBERS + "train_32x32.mat",
        ),
        KnownFile(
            "test_32x32.mat",
            ("eb5a983be6a315427106f1b164d9cef3",),
            64275384,
            _HOUSENUMBERS + "test_32x32.mat",
        ),
        KnownFile("extra_32x32.mat", ("a93ce644f1a588dc4d68dda5feec44a7",), 1329278602),  # the paper does not use it
    ),
    "tiny-imagenet": (
        KnownFile(
            "tiny-imagenet-200.zip",
            ("90528d7ca1a48142e341f4ef8d21d0de",),
            248100043,
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        ),
    ),
    "imagenet32": (  # image-net.org wants an account
        KnownFile("Imagenet32_train.zip"),
        KnownFile("Imagenet32_val.zip"),
        KnownFile(
            "Imagenet32_train_npz.zip",
            ("b0d308fb0016e41348a90f0ae772ee38", "3e3d1b7ddb901d59d1fbcba69b3676fa"),
        ),
        KnownFile("Imagenet32_val_npz.zip", ("0300f7a8c5de0c82fb6fc6092b4858ed",)),
    ),
}

# What lies in the dataset's folder after unpacking.
FILES: dict[str, tuple[KnownFile, ...]] = {
    "cifar10": (
        *_named(
            data_batch_1="c99cafc152244af753f735de768cd75f",
            data_batch_2="d4bba439e000b95fd0a9bffe97cbabec",
            data_batch_3="54ebc095f3ab1f0389bbae665268c751",
            data_batch_4="634d18415352ddfa80567beed471001a",
            data_batch_5="482c414d41f54cd18b22e5b47cb7c3cb",
            test_batch="40351d587109b95175f43aff81a1287e",
        ),
        KnownFile("batches.meta", ("5ff9c542aee3614f3951f8cda6e48888",)),
    ),
    "cifar100": _named(
        train="16019d7e3df5f24257cddd939b257f8d",
        test="f0ef6b0ae62326f3e7ffdfab6717acfc",
        meta="7973b15100ade9c7d40fb424638fde48",
    ),
    "svhn": ARCHIVES["svhn"],  # nothing to unpack
    "tiny-imagenet": (  # the repack by the authors of DM-Improves-AT; of the JPEG files in the .zip none is listed
        KnownFile("train.npz", ("db414016436353892fdf00cb30b9ee57",)),
        KnownFile("val.npz", ("7762694b6217fec8ba1a7be3c20ef218",)),
    ),
    "imagenet32": (
        *_imagenet32(
            "",
            (
                "6c4495e65cd24a8c3019857ef9b758ee",
                "3dd727de4155836807dfc19f98c9fe70",
                "03d3dc4e850e23e1d526f268a0196296",
                "876f7e6d6ddb1f52ecb654ffdc8293f6",
                "c789bcdd1feed34a9bc58598a1a1bf7d",
                "8ce5344cb1e11f31bc507cae4c856083",
                "32ecc8ad6c55b1c9cb6cf79a2cc46094",
                "bdeb6da3d05771121992b48c59c69439",
                "58417149b5ce31688f805341e7f57b4f",
                "46ad60a1144aaf97a143914453b0dabb",
            ),
            "06c02b8b4c8de8b3a36b07859a49de6f",
        ),
        *_imagenet32(
            ".npz",
            (
                "464fde20de6eb44c28cc1a8c11544bb1",
                "bdb56e71882c3fd91619d789d5dd7c79",
                "83ff36d76ea26867491a281ea6e1d03b",
                "98ff184fe109d5c2a0f6da63843880c7",
                "62b8803e13c3e6de9498da7aaaae57c8",
                "e0b06665f890b029f1d8d0a0db26e119",
                "9731f469aac1622477813c132c5a847a",
                "60aed934b9d26b7ee83a1a83bdcfbe0f",
                "b96328e6affd718660c2561a6fe8c14c",
                "1dc618d544c554220dd118f72975470c",
            ),
            "a8c04a389f2649841fb7a01720da9dd9",
        ),
    ),
}


def known(dataset: str, file_name: str) -> KnownFile | None:
    """What is known of a file of this name (no folders), archive or content; None for any other name or dataset."""
    files = ARCHIVES.get(dataset, ()) + FILES.get(dataset, ())
    return next((file for file in files if file.name == file_name), None)


def md5_of(path: str | Path) -> str:
    """MD5 of a file's content as 32 lower-case hex digits, read piece by piece. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
