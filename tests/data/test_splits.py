"""The split against the official one (golden 14), and its refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from puat_fast.config import ConfigError
from puat_fast.data import DataError, split_indices


def test_golden(golden_data):
    split = split_indices(golden_data["targets"], 3, int(golden_data["take_amount"]), int(golden_data["seed"]), 0.2)
    np.testing.assert_array_equal(split.labelled_all, golden_data["sup_all"])
    np.testing.assert_array_equal(split.unlabelled, golden_data["unsup"])
    np.testing.assert_array_equal(split.validation, golden_data["val"])
    np.testing.assert_array_equal(split.labelled, golden_data["sup_train"])


@pytest.mark.parametrize("num_classes, n_labelled, n_val", [(10, 4000, 800), (100, 10000, 2000)])
def test_cifar_sizes(num_classes, n_labelled, n_val):
    labels = np.random.default_rng(0).permutation(np.arange(50_000) % num_classes)
    split = split_indices(labels, num_classes, n_labelled, 1, 0.2)
    assert len(split.validation) == n_val and len(split.labelled) == n_labelled - n_val
    assert len(split.unlabelled) == 50_000 - n_labelled
    parts = np.concatenate([split.labelled, split.validation, split.unlabelled])
    np.testing.assert_array_equal(np.sort(parts), np.arange(50_000))
    np.testing.assert_array_equal(np.sort(split.labelled_all), np.sort(np.r_[split.labelled, split.validation]))
    for part, size in ((split.labelled, n_labelled - n_val), (split.validation, n_val)):
        assert part.dtype == np.int64
        np.testing.assert_array_equal(np.bincount(labels[part]), np.full(num_classes, size // num_classes))


def test_seed_decides():
    labels = np.arange(300) % 3
    a, b, c = (split_indices(labels, 3, 30, seed, 0.2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.labelled, b.labelled)
    assert set(a.labelled) != set(c.labelled)


def test_all_labelled_and_no_validation():
    split = split_indices(np.arange(30) % 3, 3, 30, 1, 0.0)
    assert len(split.unlabelled) == len(split.validation) == 0 and len(split.labelled) == 30
    assert split.unlabelled.dtype == split.validation.dtype == np.int64


@pytest.mark.parametrize("n_labelled", [0, -3, 4, 31])
def test_not_a_multiple(n_labelled):
    with pytest.raises(ConfigError, match=f"data.n_labelled: {n_labelled} is not a positive multiple of the 3 classes"):
        split_indices(np.arange(90) % 3, 3, n_labelled, 1, 0.2)


def test_more_than_there_are():
    labels = np.array([0] * 20 + [1] * 9 + [2] * 20)
    with pytest.raises(ConfigError, match=r"data\.n_labelled: 30 asks for 10 .* class 1 has only 9 training images"):
        split_indices(labels, 3, 30, 1, 0.2)


def test_class_without_images():
    with pytest.raises(DataError, match="class 1 has no training image"):
        split_indices(np.array([0, 2, 0, 2]), 3, 3, 1, 0.2)


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1]])
def test_labels_out_of_range(labels):
    with pytest.raises(DataError, match="expected 0 to 2"):
        split_indices(np.array(labels), 3, 3, 1, 0.2)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_validation_out_of_range(fraction):
    with pytest.raises(ConfigError, match=r"data\.val_fraction: .* is out of range"):
        split_indices(np.arange(90) % 3, 3, 30, 1, fraction)


def test_formats_and_splits_do_not_need_torch():
    code = "import sys; sys.modules['torch'] = None\nfrom puat_fast.data import load_dataset, split_indices"
    subprocess.run([sys.executable, "-c", code], check=True)
