"""The embedded default: scikit-learn's 1797 real scans of hand-written digits (UCI), enlarged to 32 x 32.

Small enough to see the whole effect in minutes on a CPU; not a benchmark.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from puat_fast.data.formats.base import Dataset, ImageSet

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_EVERY = 5  # one image in five is a test image: 360 of 1797


def load(data_dir: str | Path | None = None) -> Dataset:
    """The digits with a fixed, stratified split: 1437 training and 360 test images. `data_dir` is ignored."""
    # Imported here: scikit-learn takes a second to load, which no other dataset needs.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    bunch = load_digits()
    images = _enlarge(bunch.images)
    labels = bunch.target.astype(np.int64)
    # Every fifth image of the list sorted by class: stratified, and no random generator that could change.
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::TEST_EVERY]] = True
    train, test = (ImageSet(images[part], labels[part]) for part in (~is_test, is_test))
    return Dataset("digits", CLASS_NAMES, train, test, source="scikit-learn")


def _enlarge(scans: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """N x 8 x 8, 0 .. 16 -> N x 3 x 32 x 32 uint8: bilinear, pixel centres aligned, three equal channels.

    All weights are multiples of 1/8 and 255/16 is a binary fraction: the result is exact on every machine.
    """
    source = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)  # where each of the 32 pixels lies among the 8
    weights = np.maximum(0.0, 1.0 - np.abs(source[:, None] - np.arange(8)))  # 32 x 8
    grey = np.rint(weights @ scans @ weights.T * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[:, None], 3, axis=1)
