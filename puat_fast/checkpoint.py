"""Checkpoints (all state, to resume) and classifiers (weights and what they need to run), safe to load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from puat_fast import files, weights
from puat_fast.networks.classifier import Classifier
from puat_fast.runlog import RunError

CLASSIFIER_FILE = "classifier.safetensors"
EXPORTED_FILE = "classifier.pt"  # in a folder that `export` wrote, with a
MODEL_INFO_FILE = "model_info.json"
ARCH = "wrn-swish"
FORMAT = "puat-fast-classifier-1"


class CheckpointError(RunError):
    """A checkpoint or classifier file is missing, broken or of another kind: names the file and what is wrong."""


@dataclass(frozen=True)
class ClassifierInfo:
    """What is known of a classifier file. mean and std are None where neither it nor a model_info beside it tells."""

    file: Path
    depth: int
    width: int
    num_classes: int
    mean: weights.Triple | None
    std: weights.Triple | None
    dataset: str | None
    class_names: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


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


def save_classifier(
    path: Path, C: Classifier, dataset: str | None, class_names: Sequence[str], facts: dict[str, Any]
) -> None:
    """Write weights and buffers as safetensors, with what is needed to rebuild the network in the metadata.

    facts: whatever else is worth knowing (method, epoch, validation accuracy), as JSON values.
    """
    metadata = {FORMAT: record(C, dataset, class_names, facts)}  # one key: safetensors writes several in any order
    tensors = published(C)
    with files.atomic_write(path) as beside:
        safetensors.torch.save_file(tensors, beside, metadata)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read


def record(C: Classifier, dataset: str | None, class_names: Sequence[str], facts: dict[str, Any]) -> str:
    """What is needed to rebuild a network, beside its weights, as JSON."""
    mean, std = C.normalisation
    about = {
        "arch": {"name": ARCH, "depth": C.depth, "width": C.width, "num_classes": C.num_classes},
        "mean": mean,
        "std": std,
        "dataset": dataset,
        "class_names": list(class_names),
        "facts": facts,
    }
    return json.dumps(about)


def published(C: Classifier) -> dict[str, torch.Tensor]:
    """The state dict in float32 on the CPU, each tensor contiguous and with memory of its own: what files take."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in C.state_dict().items()}
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def fingerprint(C: Classifier) -> str:
    """sha256, its first 16 digits, of weights, buffers, mean and std: whether a number was measured on this network."""
    sha = hashlib.sha256(json.dumps(C.normalisation).encode())
    for name, tensor in published(C).items():
        sha.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


def load_classifier(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A classifier in eval mode, with frozen parameters: float images in [0,1], N x 3 x 32 x 32, to logits N x K.

    Args:
        path: a run directory; a folder that `puat-fast export --format robustbench` wrote; a .safetensors file, ours
            or a plain one; or a torch file. The latter two hold a state dict of our WRN, whose names are those of
            RobustBench's DMWideResNet, as `weights.recognise` finds it. Its activation is taken to be SiLU: weights
            do not tell. Code in a file is never run.
        device: where it goes.
        mean, std: what (x - mean) / std takes where the file does not know: a model_info.json beside it may.

    Raises CheckpointError: no such file, broken, another network, or mean and std unknown or other than the file's;
    ValueError: mean or std is not three numbers.
    """
    file = classifier_file(path)
    given = {"mean": mean, "std": std}
    wanted = {name: None if values is None else weights.triple(name, values) for name, values in given.items()}
    metadata = _metadata(file)
    info, state = _foreign(file) if metadata is None else (_info(file, metadata), None)
    used = {name: _settled(info, name, given) for name, given in wanted.items()}
    try:
        with torch.device("meta"):  # no weights are drawn: they come from the file
            C = Classifier(info.num_classes, info.depth, info.width, used["mean"], used["std"])
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: broken metadata: {error}") from error
    C.to_empty(device="cpu")
    try:
        C.load_state_dict(safetensors.torch.load_file(file) if state is None else state)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: weights do not fit: {str(error).splitlines()[0]}") from error
    return C.to(device).eval().requires_grad_(False)


def about(path: str | Path) -> ClassifierInfo:
    """What is known of a classifier, of any kind that `load_classifier` takes; of ours no weights are read.

    Raises CheckpointError.
    """
    file = classifier_file(path)
    metadata = _metadata(file)
    return _foreign(file)[0] if metadata is None else _info(file, metadata)


def classifier_file(path: str | Path) -> Path:
    """The classifier file of a run directory or an exported folder, or the file itself. Raises CheckpointError."""
    path = Path(path).expanduser()
    if path.is_dir():
        file = path / CLASSIFIER_FILE
        file = path / EXPORTED_FILE if not file.is_file() and (path / EXPORTED_FILE).is_file() else file
    else:
        file = path
    if not file.is_file():
        hint = "; a run writes it with its first validation in stage 2" if path.is_dir() else ""
        raise CheckpointError(f"{file}: no such classifier{hint}")
    return file


def read_metadata(file: Path) -> dict[str, Any]:
    """What a classifier file of ours says of itself: arch, mean, std, dataset, class_names, facts.

    Raises CheckpointError.
    """
    metadata = _metadata(file)
    if metadata is None:
        raise CheckpointError(f"{file}: not a classifier of puat-fast (no such metadata)")
    return metadata


def _metadata(file: Path) -> dict[str, Any] | None:
    """The metadata of a .safetensors file, if it is ours; None for any other file."""
    if file.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
    except PermissionError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from error
    if FORMAT not in metadata:
        return None
    try:
        found = json.loads(metadata[FORMAT])
    except ValueError as error:
        raise CheckpointError(f"{file}: broken metadata: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("dataset"), str | None):
        raise CheckpointError(f"{file}: broken metadata: {found!r}")
    return found


def _info(file: Path, metadata: dict[str, Any]) -> ClassifierInfo:
    """Of a file of ours."""
    try:
        arch = metadata["arch"]
        if arch["name"] != ARCH:
            raise ValueError(f"arch {arch['name']!r}, expected {ARCH!r}")
        depth, width, num_classes = (int(arch[key]) for key in ("depth", "width", "num_classes"))
        mean, std = (weights.triple(name, metadata[name]) for name in ("mean", "std"))
        names, facts = tuple(map(str, metadata.get("class_names", ()))), dict(metadata.get("facts", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: broken metadata: {error}") from error
    return ClassifierInfo(file, depth, width, num_classes, mean, std, metadata["dataset"], names, facts)


def _foreign(file: Path) -> tuple[ClassifierInfo, dict[str, torch.Tensor]]:
    """Of a file without our metadata: what its tensors, and a model_info beside it, tell; and the state dict."""
    content = _content(file)
    if isinstance(content, dict) and "engine" in content:
        run = file.absolute().parent.parent
        raise CheckpointError(f"{file}: all state of a run, to resume it; its classifier is {run / CLASSIFIER_FILE}")
    model_info = _model_info(file)
    try:
        found = weights.recognise(content)
        said = {name: weights.triple(name, model_info[name]) for name in ("mean", "std") if name in model_info}
    except (ValueError, RuntimeError) as error:  # the latter: sizes that no tensor can have
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error
    dataset, names, facts = (model_info.get(key) for key in ("dataset", "class_names", "facts"))
    info = ClassifierInfo(
        file, found.depth, found.width, found.num_classes, found.mean or said.get("mean"), found.std or said.get("std"),
        dataset if isinstance(dataset, str) else None, tuple(map(str, names)) if isinstance(names, list) else (),
        facts if isinstance(facts, dict) else {},
    )  # fmt: skip
    return info, found.state


def _content(file: Path) -> Any:
    """What a .safetensors or a torch file holds. Raises CheckpointError."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with warnings.catch_warnings(action="ignore"):  # of what it is about to refuse
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load tells a broken file in a dozen ways
        cure = "save the model's state_dict() alone; nothing of it was run"
        raise CheckpointError(f"{file}: broken, or it holds more than tensors: {cure}") from error


def _model_info(file: Path) -> dict[str, Any]:
    """model_info.json, or the JSON file of the same name, beside a file; empty where there is none."""
    for candidate in (file.with_name(MODEL_INFO_FILE), file.with_suffix(".json")):
        if candidate.is_file():
            try:
                found = json.loads(candidate.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{candidate}: broken: {error}") from error
            if not isinstance(found, dict):
                raise CheckpointError(f"{candidate}: broken: not a JSON object")
            if found.get("activation", "silu") not in ("silu", "swish"):
                raise CheckpointError(f"{candidate}: activation {found['activation']!r}, expected 'silu'")
            return found
    return {}


def _settled(info: ClassifierInfo, name: str, given: weights.Triple | None) -> weights.Triple:
    """mean or std: the file's own, else the one given. Raises CheckpointError where there is none, or they differ."""
    own: weights.Triple | None = getattr(info, name)
    if own is None and given is None:
        hint = f"give mean and std, those that it was trained with. In use are {weights.usual_constants()}"
        raise CheckpointError(f"{info.file}: {name} is not in it, nor in a {MODEL_INFO_FILE} beside it: {hint}")
    if own is not None and given is not None and max(abs(a - b) for a, b in zip(own, given, strict=True)) > 1e-6:
        raise CheckpointError(f"{info.file}: {name}: {given} was given, but its own is {own}")
    return own or given  # type: ignore[return-value]  # one of them is there
