"""A short run and its evaluation on the files of each dataset: nothing but the real readers in between."""

from __future__ import annotations

import json

import layouts
import numpy as np
import pytest
import tiny_cases
from layouts import put

from puat_fast import cli
from puat_fast.data import DataError
from puat_fast.data.formats import prepared, read_dataset
from puat_fast.engine.trainer import Trainer

FILES = {
    "svhn": (layouts.svhn_files(train=40), 10),
    "tiny-imagenet": (layouts.under("tiny-imagenet-200", layouts.tiny_files(per_class=4)), 10),
    "imagenet32": (layouts.imagenet32_files(), 10),
    "folder": (layouts.tree_files(("a", "b"), counts=(8, 4), size=40), 2),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny_cases.quicken(monkeypatch)


def config_of(tmp_path, name, num_classes, **data):
    values = {"n_labelled": 2 * num_classes, "val_fraction": 0.5, **data}
    return tiny_cases.run_config(
        tmp_path / "run", dataset=name, data_dir=str(tmp_path / "data"), data=values,
        pretrain={"epochs": 0}, schedule={"epochs": 1, "steps_per_epoch": 2, "adv_end": 1},
    )  # fmt: skip


@pytest.mark.parametrize("name, ready", [
    ("svhn", True), ("tiny-imagenet", False), ("imagenet32", True), ("folder", False),
])  # fmt: skip
def test_train_and_eval(tmp_path, capsys, name, ready):
    files, num_classes = FILES[name]
    put(tmp_path / "data", files)
    dataset = read_dataset(name, tmp_path / "data")
    if ready:
        prepared.write(dataset, tmp_path / "data", "paper", {}, [])
    trainer = Trainer(config_of(tmp_path, name, num_classes))
    assert isinstance(trainer.dataset.train.images, np.memmap) == ready
    assert trainer.dataset.num_classes == num_classes and len(trainer.split.validation) == num_classes
    run = trainer.fit().path
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    out = tmp_path / "eval.json"
    code = cli.main(["eval", str(run), "--attacks", "clean", "--device", "cpu", "--json", str(out)])
    assert (code, capsys.readouterr().err) == (0, "")
    found = json.loads(out.read_text())
    assert (found["dataset"], found["n"]) == (name, len(dataset.test))
    np.testing.assert_array_equal(np.asarray(trainer.dataset.train.images), dataset.train.images)  # nobody wrote there


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_extra_unlabelled_images(tmp_path, kind):
    """Their labels are of no class: whoever took one would fail, or raise."""
    put(tmp_path / "data", FILES["svhn"][0])
    images, labels = layouts.pixels(9, seed=4), np.full(9, 4711)
    file = tmp_path / f"extra.{kind}"
    file.write_bytes(layouts.npz(image=images, label=labels) if kind == "npz" else layouts.rst_pickle(images, labels))
    trainer = Trainer(config_of(tmp_path, "svhn", 10, extra_unlabelled=str(file)))
    assert len(trainer.train) == 49 and trainer.split.unlabelled[-9:].tolist() == list(range(40, 49))
    np.testing.assert_array_equal(trainer.train.images[40:], layouts.chw(images))
    assert set(trainer.train.labels[40:]) == {-1}
    if kind == "npz":  # what comes after reading is the same
        assert trainer.fit().summary


def test_extra_file_that_is_not_there(tmp_path):
    put(tmp_path / "data", FILES["svhn"][0])
    with pytest.raises(DataError, match=r"extra\.npz: no such file; expected \.npz with image and label"):
        Trainer(config_of(tmp_path, "svhn", 10, extra_unlabelled=str(tmp_path / "extra.npz")))
    assert not (tmp_path / "run").exists()
