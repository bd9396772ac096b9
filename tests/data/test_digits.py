"""The embedded digits: what they are, and that they never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from puat_fast.data import load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", None)


def test_shape_count_and_type(digits):
    assert digits.num_classes == 10 and digits.class_names[7] == "seven"
    assert digits.train.images.shape == (1437, 3, 32, 32) and digits.test.images.shape == (360, 3, 32, 32)
    assert digits.train.images.dtype == np.uint8 and digits.train.labels.dtype == np.int64
    assert digits.train.images.min() == 0 and digits.train.images.max() == 255


def test_both_parts_are_balanced(digits):
    assert np.bincount(digits.test.labels).min() >= 34 and np.bincount(digits.test.labels).max() <= 37
    assert np.bincount(digits.train.labels).min() >= 139 and np.bincount(digits.train.labels).max() <= 147


def test_every_scan_is_there_once(digits):
    from sklearn.datasets import load_digits

    together = np.concatenate([digits.train.images, digits.test.images])
    different = len({x.tobytes() for x in load_digits().images})
    assert len(together) == 1797 and len({x.tobytes() for x in together}) == different
    assert np.bincount(np.concatenate([digits.train.labels, digits.test.labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_enlarged_as_torch_does(digits):
    torch = pytest.importorskip("torch")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    is_test = np.zeros(1797, bool)
    is_test[np.argsort(bunch.target, kind="stable")[::5]] = True
    scans = torch.from_numpy(bunch.images[is_test])[:, None]
    large = torch.nn.functional.interpolate(scans, size=(32, 32), mode="bilinear", align_corners=False)
    expected = large.expand(-1, 3, -1, -1) * (255 / 16)
    # Exact up to the rounding to whole numbers, whichever way a tie goes.
    assert (torch.from_numpy(digits.test.images).double() - expected).abs().max() <= 0.5
    assert digits.test.labels.tolist() == bunch.target[is_test].tolist()


def test_data_dir_is_ignored_and_the_bytes_never_change(digits):
    again = load_dataset("digits", "/nowhere")
    digest = hashlib.sha256()
    for part in (again.train.images, again.train.labels, again.test.images, again.test.labels):
        digest.update(part.tobytes())
    assert digest.hexdigest()[:12] == "ebbfa726d26f"
    np.testing.assert_array_equal(again.train.images, digits.train.images)
