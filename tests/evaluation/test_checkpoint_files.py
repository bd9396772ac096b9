"""Checkpoints and classifiers that are missing, broken, foreign or hostile: told by name, never run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import puat_fast
from puat_fast import checkpoint, files
from puat_fast.checkpoint import CheckpointError
from puat_fast.networks.classifier import Classifier


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def small() -> Classifier:
    return Classifier(3, 10, 1, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("part", [0, 1, 100, 0.3, 0.9, 0.999])
def test_truncated(run, tmp_path, part):
    whole = (run / "checkpoints" / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: part if isinstance(part, int) else int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=r"last\.pt: broken, or not a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("how", ["pickle", "torch", "torch-legacy"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, how):
    file, trace = tmp_path / "last.pt", tmp_path / "trace"
    state = {"engine": Evil(trace)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"last\.pt: broken, or not a checkpoint"):
        checkpoint.load(file)
    assert not trace.exists()


def test_garbage_is_told_whatever_it_looks_like(tmp_path):
    """Random bytes, some behind the first bytes of a pickle or a zip file: CheckpointError, nothing else."""
    rng, file = random.Random(0), tmp_path / "last.pt"
    for _ in range(80):
        head = rng.choice([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00"])
        file.write_bytes(head + rng.randbytes(rng.randrange(1, 60)))
        with pytest.raises(CheckpointError):
            checkpoint.load(file)


@pytest.mark.parametrize("state", [{"weights": torch.zeros(2)}, [1, 2], torch.zeros(3)])
def test_somebody_elses_checkpoint(tmp_path, state):
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of puat-fast"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path)


def test_save_is_whole_or_not_at_all(tmp_path):
    file = tmp_path / "last.pt"
    checkpoint.save(file, {"engine": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save(file, {"engine": 2, "bad": lambda: None})
    assert checkpoint.load(file) == {"engine": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


# -- classifiers ----------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    torch.manual_seed(0)
    C = small().to(memory_format=torch.channels_last)
    C(torch.rand(4, 3, 32, 32))
    file = tmp_path / "c.safetensors"
    checkpoint.save_classifier(file, C, "digits", ["a", "b", "c"], {"epoch": 3, "val_robust_acc": None})
    loaded, x = checkpoint.load_classifier(file), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), C.eval()(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.normalisation == C.normalisation and loaded.augment is None
    metadata = checkpoint.read_metadata(file)
    assert metadata["dataset"] == "digits" and metadata["class_names"] == ["a", "b", "c"]
    assert metadata["facts"] == {"epoch": 3, "val_robust_acc": None}
    again = tmp_path / "again.safetensors"
    checkpoint.save_classifier(again, C, "digits", ["a", "b", "c"], {"epoch": 3, "val_robust_acc": None})
    assert again.read_bytes() == file.read_bytes()  # equal runs write equal files
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_load_from_a_run_and_from_python(run):
    C = puat_fast.load_classifier(run)
    assert C(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_missing_classifier(tmp_path):
    with pytest.raises(CheckpointError, match="no such classifier; a run writes it"):
        checkpoint.load_classifier(tmp_path)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: no such classifier$"):
        checkpoint.load_classifier(tmp_path / "c.safetensors")


@pytest.mark.parametrize("part", [0, 5, 0.5, 0.99])
def test_truncated_classifier(run, tmp_path, part):
    whole = (run / "classifier.safetensors").read_bytes()
    file = tmp_path / "c.safetensors"
    file.write_bytes(whole[: part if isinstance(part, int) else int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=r"c\.safetensors: "):
        checkpoint.load_classifier(file)


def test_a_pickle_in_place_of_a_classifier_is_not_run(tmp_path):
    file, trace = tmp_path / "c.safetensors", tmp_path / "trace"
    torch.save({"engine": Evil(trace)}, file)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load_classifier(file)
    assert not trace.exists()


@pytest.mark.parametrize("metadata, says", [
    (None, "no init_conv.weight in it, .*; it holds: weight$"), ({"format": "pt"}, "no init_conv.weight in it"),
    ({checkpoint.FORMAT: "not json"}, "broken metadata"),
])  # fmt: skip
def test_foreign_safetensors(tmp_path, metadata, says):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "c.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"c\.safetensors: {says}"):
        checkpoint.load_classifier(tmp_path / "c.safetensors")


def rewritten(run: Path, file: Path, tensors: dict | None = None, **about: Any) -> Path:
    source = run / "classifier.safetensors"
    metadata = {checkpoint.FORMAT: json.dumps(checkpoint.read_metadata(source) | about)}
    safetensors.torch.save_file(tensors or safetensors.torch.load_file(source), file, metadata)
    return file


def test_weights_that_do_not_fit(run, tmp_path):
    file = rewritten(run, tmp_path / "c.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="weights do not fit"):
        checkpoint.load_classifier(file)


@pytest.mark.parametrize(
    "metadata",
    [
        {"arch": {}},
        {"arch": "a text"},
        {"arch": {"name": "wrn-swish", "depth": 11, "width": 1, "num_classes": 10}},
        {"arch": {"name": "resnet", "depth": 10, "width": 1, "num_classes": 10}},
        {"mean": [1, 2]},
        {"std": None},
        {"dataset": 3},
    ],
    ids=str,
)
def test_broken_metadata(run, tmp_path, metadata):
    """A file that says it is ours and is not: a CheckpointError that names it, no KeyError out of the loader."""
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        checkpoint.load_classifier(rewritten(run, tmp_path / "c.safetensors", **metadata))


def test_loading_leaves_the_global_generator_alone(run):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    checkpoint.load_classifier(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupted_write_leaves_the_classifier(run, tmp_path, monkeypatch):
    copy = tmp_path / "c.safetensors"
    shutil.copy(run / "classifier.safetensors", copy)
    before = copy.read_bytes()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_classifier(copy, small(), "digits", ["a", "b", "c"], {})
    assert copy.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
