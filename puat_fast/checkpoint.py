"""Checkpoints (all state, to resume) and classifiers (weights and what they need to run), safe to load."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from puat_fast import files
from puat_fast.networks.classifier import Classifier
from puat_fast.runlog import RunError

CLASSIFIER_FILE = "classifier.safetensors"
ARCH = "wrn-swish"
FORMAT = "puat-fast-classifier-1"


class CheckpointError(RunError):
    """A checkpoint or classifier file is missing, broken or of another kind: names the file and what is wrong."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    with files.atomic_write(path) as beside:
        try:
            torch.save(state, beside)
        except RuntimeError as error:  # torch's words for a full disk
            raise OSError(errno.EIO, "cannot be written, is the disk full?", str(path)) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; never runs code from it. Raises CheckpointError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it is about to refuse
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load tells a broken file in a dozen ways
        # torch's own words would advise to load it unsafely
        raise CheckpointError(f"{path}: broken, or not a checkpoint: nothing of it was run") from error
    if not isinstance(state, dict) or "engine" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of puat-fast")
    return state


def save_classifier(path: Path, C: Classifier, dataset: str, class_names: Sequence[str], facts: dict[str, Any]) -> None:
    """Write weights and buffers as safetensors, with what is needed to rebuild the network in the metadata.

    facts: whatever else is worth knowing (method, epoch, validation accuracy), as JSON values.
    """
    mean, std = C.normalisation
    about = {
        "arch": {"name": ARCH, "depth": C.depth, "width": C.width, "num_classes": C.num_classes},
        "mean": mean,
        "std": std,
        "dataset": dataset,
        "class_names": list(class_names),
        "facts": facts,
    }
    metadata = {FORMAT: json.dumps(about)}  # one key: safetensors writes several in any order
    tensors = {name: _published(tensor) for name, tensor in C.state_dict().items()}
    with files.atomic_write(path) as beside:
        safetensors.torch.save_file(tensors, beside, metadata)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read


def _published(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.cpu().clone(memory_format=torch.contiguous_format)  # what safetensors takes


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of a run directory or of a .safetensors file, in eval mode, with frozen parameters.

    Maps float images in [0,1], N x 3 x 32 x 32, to logits N x K. Raises CheckpointError.
    """
    file = classifier_file(path)
    metadata = read_metadata(file)
    try:
        arch, mean, std = (metadata[key] for key in ("arch", "mean", "std"))
        if arch["name"] != ARCH:
            raise ValueError(f"arch {arch['name']!r}, expected {ARCH!r}")
        with torch.device("meta"):  # no weights are drawn: they come from the file
            C = Classifier(arch["num_classes"], arch["depth"], arch["width"], mean, std)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: broken metadata: {error}") from error
    C.to_empty(device="cpu")
    try:
        C.load_state_dict(safetensors.torch.load_file(file))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: weights do not fit: {str(error).splitlines()[0]}") from error
    return C.to(device).eval().requires_grad_(False)


def classifier_file(path: str | Path) -> Path:
    """The classifier file of a run directory, or the file itself. Raises CheckpointError when it is not there."""
    path = Path(path).expanduser()
    file = path / CLASSIFIER_FILE if path.is_dir() else path
    if not file.is_file():
        hint = "; a run writes it with its first validation in stage 2" if path.is_dir() else ""
        raise CheckpointError(f"{file}: no such classifier{hint}")
    return file


def read_metadata(file: Path) -> dict[str, Any]:
    """What a classifier file says of itself: arch, mean, std, dataset, class_names, facts. Raises CheckpointError."""
    try:
        with safetensors.safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
    except PermissionError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from error
    try:
        about = json.loads(metadata[FORMAT])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: not a classifier of puat-fast (no such metadata)") from error
    if not isinstance(about, dict) or not isinstance(about.get("dataset"), str):
        raise CheckpointError(f"{file}: broken metadata: {about!r}")
    return about
