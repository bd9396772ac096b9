"""Image files and arrays of images of any size -> uint8, 3 x 32 x 32."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from puat_fast.data.formats.base import IMAGE_SHAPE, BrokenFiles, DataError, ImageSet, reason
from puat_fast.data.formats.places import Place

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
RESIZE = "bilinear, antialiased (Pillow), the longer side cropped at the centre first"
"""How images of another size become 32 x 32: what torchvision's Resize(32) does with a square PIL image."""


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(SUFFIXES)


def read_images(place: Place, names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Decode image files to N x 3 x 32 x 32, in order, on all cores; grey becomes RGB, transparency is dropped.

    Raises BrokenFiles with each file that is missing or cannot be decoded.
    """
    images = np.empty((len(names), *IMAGE_SHAPE), np.uint8)

    def decode(i: int) -> str | None:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(place.read(names[i]))) as image:
                images[i] = _to_32(image.convert("RGB"))
        # Pillow tells a broken file by OSError, SyntaxError, ValueError, struct.error, DecompressionBombError ...
        except Exception as error:
            told = "no image of a known kind" if isinstance(error, UnidentifiedImageError) else reason(error)
            return f"{names[i]}: {told}"
        return None

    broken = [told for told in _on_all_cores(decode, len(names)) if told is not None]
    if broken:
        raise BrokenFiles(str(place.path), broken)
    return images


def image_sets(place: Place, train: list[list[str]], test: list[list[str]]) -> tuple[ImageSet, ImageSet]:
    """Images of both splits out of their files, class by class. Raises BrokenFiles, which names those of both."""
    names = [[name for of_class in split for name in of_class] for split in (train, test)]
    labels = [np.repeat(np.arange(len(split), dtype=np.int64), [*map(len, split)]) for split in (train, test)]
    images, n = read_images(place, names[0] + names[1]), len(names[0])
    return ImageSet(images[:n], labels[0]), ImageSet(images[n:], labels[1])


def to_32(images: npt.NDArray[np.uint8], file: str) -> npt.NDArray[np.uint8]:
    """Arrays N x H x W x 3 or N x 3 x H x W, uint8, to C-contiguous N x 3 x 32 x 32. Raises DataError naming `file`."""
    whole = images.ndim == 4 and images.dtype == np.uint8 and 0 not in images.shape[1:]
    if not whole or 3 not in (images.shape[1], images.shape[3]):
        found = " x ".join(map(str, images.shape)) + f" {images.dtype}"
        raise DataError(f"{file}: images are {found}, expected N x H x W x 3 or N x 3 x H x W uint8")
    if images.shape[1:] == IMAGE_SHAPE:
        return np.ascontiguousarray(images)
    if images.shape[3] != 3:
        images = images.transpose(0, 2, 3, 1)
    if images.shape[1:3] == IMAGE_SHAPE[1:]:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    out = np.empty((len(images), *IMAGE_SHAPE), np.uint8)

    def resize(i: int) -> None:
        from PIL import Image

        out[i] = _to_32(Image.fromarray(np.ascontiguousarray(images[i])))

    _on_all_cores(resize, len(images))
    return out


def _to_32(image: Image.Image) -> npt.NDArray[np.uint8]:
    """One RGB image -> 3 x 32 x 32."""
    from PIL import Image, ImageOps

    size = (IMAGE_SHAPE[2], IMAGE_SHAPE[1])
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _on_all_cores(work: Callable[[int], T], count: int) -> list[T]:
    # Threads: Pillow decodes and resizes without holding the interpreter's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, range(count)))
