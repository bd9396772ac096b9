"""A classifier in the formats of others: safetensors, ONNX, and a folder for RobustBench."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from puat_fast import __version__, checkpoint, files, ops
from puat_fast.config import Config, ConfigError
from puat_fast.networks.classifier import Classifier
from puat_fast.runlog import RunError

OPSET = 18
README_FILE = "README.md"
MEMBERS = {checkpoint.EXPORTED_FILE, checkpoint.MODEL_INFO_FILE, README_FILE}
"""Files of a folder for RobustBench."""

PAPERS = {
    "puat": {
        "link": "https://arxiv.org/abs/2301.09069",
        "name": "Provable Unrestricted Adversarial Training without Compromise with Generalizability",
        "authors": "Lilin Zhang, Ning Yang, Yanchao Sun, Philip S. Yu",
        "venue": "TPAMI 2024",
    }
}
"""What a model_info says of a method's paper."""

README = """\
# {architecture} for RobustBench

{footnote}

Images are in [0, 1], N x 3 x 32 x 32; the network normalises them itself, with the mean and std below.

```python
import torch
from robustbench.model_zoo.architectures.dm_wide_resnet import DMWideResNet

model = DMWideResNet(
    num_classes={num_classes}, depth={depth}, width={width}, activation_fn=torch.nn.SiLU,
    mean={mean}, std={std},
)
weights = torch.load("{weights}", map_location="cpu", weights_only=True)
missing, unexpected = model.load_state_dict(weights, strict=False)
assert not unexpected and set(missing) <= {{"mean", "std"}}  # buffers in some versions, set above
model.eval()
```

`robustbench.benchmark(model, dataset=..., threat_model="Linf", eps=8 / 255)` then measures it. `{model_info}` has
the fields of RobustBench's model_info (those that are null or empty are yours to fill), and behind them what rebuilds
the network. `puat_fast.load_classifier(FOLDER)` and `puat-fast eval FOLDER` take this folder too.
"""


@dataclass(frozen=True)
class Subject:
    """What is exported: the network, in eval mode on the CPU, what its file tells, and its run directory, if any."""

    C: Classifier
    info: checkpoint.ClassifierInfo
    run: Path | None


def export(
    path: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dataset: str | None = None,
    force: bool = False,
) -> Path:
    """Write a classifier in another format; returns where it is.

    Args:
        path: whatever `checkpoint.load_classifier` takes.
        format: safetensors, our file with its metadata; onnx, one graph from `images` to `logits`, N free, with the
            normalisation in it; robustbench, a folder with the state dict of DMWideResNet, model_info.json and README.
        out: the file or folder; None: see `default_out`.
        mean, std, dataset: of a classifier whose file does not tell.
        force: replace what is there. A folder is replaced only if it is such an export.

    Raises ConfigError: unknown format, or out is there already; CheckpointError; RunError: onnx is not installed;
    OSError.
    """
    if format not in WRITERS:
        raise ConfigError(f"format: {format!r} is not one of {', '.join(WRITERS)}")
    if format == "onnx":
        _need_onnx()
    file = checkpoint.classifier_file(path)
    target = default_out(path, format) if out is None else Path(out).expanduser()
    _check_target(target, format == "robustbench", force)
    info = checkpoint.about(path)
    if dataset is not None and info.dataset not in (None, dataset):
        raise ConfigError(f"dataset: {dataset!r} was given, but {file} is of {info.dataset!r}")
    C = checkpoint.load_classifier(path, mean=mean, std=std)
    run = file.parent if (file.parent / "config.yaml").is_file() else None
    if out is None:
        target.parent.mkdir(exist_ok=True)
    WRITERS[format](Subject(C, replace(info, dataset=info.dataset or dataset), run), target)
    return target


def default_out(path: str | Path, format: str) -> Path:
    """Of a folder FOLDER/export/classifier.FORMAT, of a file FILE.FORMAT beside it; the folder for RobustBench alike.

    c.pt gives c.safetensors, c.onnx and c-robustbench.
    """
    path = Path(path).expanduser()
    base = path / "export" / "classifier" if path.is_dir() else path.with_suffix("")
    return base.with_name(base.name + {"robustbench": "-robustbench"}.get(format, f".{format}"))


def _check_target(target: Path, is_folder: bool, force: bool) -> None:
    if not target.exists():
        return
    if target.is_dir() and not (is_folder and {file.name for file in target.iterdir()} <= MEMBERS):
        raise ConfigError(f"out: {target} is a folder that is not an export, and is not replaced")
    if is_folder and not target.is_dir():
        raise ConfigError(f"out: {target} is a file, not a folder")
    if not force:
        raise ConfigError(f"out: {target} is there already; --force replaces it")


# -- safetensors ----------------------------------------------------------------------------------------------------


def _write_safetensors(subject: Subject, target: Path) -> None:
    info = subject.info
    checkpoint.save_classifier(target, subject.C, info.dataset, info.class_names, info.facts)


# -- ONNX -----------------------------------------------------------------------------------------------------------


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f'format: onnx needs {" and ".join(missing)}: pip install "puat-fast[onnx]"')


def _write_onnx(subject: Subject, target: Path) -> None:
    shapes = ({0: torch.export.Dim("N")},)
    with ops.reference_only(), _quiet():  # as plain torch the graph holds standard operators, and no op of ours
        program = torch.onnx.export(
            subject.C, (torch.rand(2, 3, 32, 32),), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET,
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # line by line, the paths of this machine's sources
    info = subject.info
    about = checkpoint.record(subject.C, info.dataset, info.class_names, info.facts)
    program.model.metadata_props[checkpoint.FORMAT] = about
    with files.atomic_write(target) as beside:
        beside.write_bytes(program.model_proto.SerializeToString())  # one file, weights and all; at most 2 GB


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words about packages that this network does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


# -- RobustBench ----------------------------------------------------------------------------------------------------


def _write_robustbench(subject: Subject, target: Path) -> None:
    told = model_info(subject)
    names = {"weights": checkpoint.EXPORTED_FILE, "model_info": checkpoint.MODEL_INFO_FILE}
    normalisation = dict(zip(("mean", "std"), subject.C.normalisation, strict=True))
    with files.atomic_folder(target) as beside:
        checkpoint.save(beside / checkpoint.EXPORTED_FILE, checkpoint.published(subject.C))
        files.write_json(beside / checkpoint.MODEL_INFO_FILE, told)
        files.write_text(beside / README_FILE, README.format(**told | names | normalisation))


def model_info(subject: Subject) -> dict[str, Any]:
    """RobustBench's fields, as its model_info files have them, then what rebuilds the network.

    Accuracies are those of the run's eval/*.json, in percent, of the most test images; null where there is none of
    these weights.
    """
    C, info, run = subject.C, subject.info, subject.run
    weights = checkpoint.fingerprint(C)
    clean, aa = (_measured(run, info.dataset, weights, name) for name in ("clean", "aa"))
    paper = PAPERS.get(str(info.facts.get("method")), dict.fromkeys(("link", "name", "authors", "venue"), ""))
    extra = Config.load(run / "config.yaml").data.extra_unlabelled is not None if run else None
    return {
        "link": paper["link"], "name": paper["name"], "authors": paper["authors"],
        "additional_data": extra, "number_forward_passes": 1, "dataset": info.dataset, "venue": paper["venue"],
        "architecture": f"WideResNet-{C.depth}-{C.width}", "eps": "8/255", "clean_acc": _percent(clean),
        "reported": None, "autoattack_acc": _percent(aa), "footnote": _footnote(subject, clean, aa),
        "unreliable": bool(aa and aa.get("warnings")),
        "depth": C.depth, "width": C.width, "num_classes": C.num_classes, "activation": "silu",
        "mean": list(C.normalisation[0]), "std": list(C.normalisation[1]), "class_names": list(info.class_names),
        "facts": info.facts,
    }  # fmt: skip


def _measured(run: Path | None, dataset: str | None, weights: str, attack: str) -> dict[str, Any] | None:
    """What `puat-fast eval` has found under one attack, on the most images of the dataset; None: nothing.

    weights: those of a run that was trained on since are not the weights that were measured.
    """
    found = []
    for file in sorted((run / "eval").glob("*.json")) if run else ():
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            entry = result["attacks"][attack]
            same = result["dataset"] == dataset and result["model"]["weights"] == weights
            usual = same and entry.get("precision", "fp32") == "fp32"
            if usual and isinstance(entry["accuracy"], float) and isinstance(entry["n"], int):
                found.append(entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another file, or another attack
            continue
    return max(found, key=lambda entry: entry["n"], default=None)


def _percent(entry: dict[str, Any] | None) -> str | None:
    return None if entry is None else f"{100 * entry['accuracy']:.2f}"


def _footnote(subject: Subject, clean: dict[str, Any] | None, aa: dict[str, Any] | None) -> str:
    trained = "Trained by puat-fast, an independent implementation of the method."
    parts = [trained] if "method" in subject.info.facts else []
    parts.append(f"Exported by puat-fast {__version__}.")
    measured = (("Accuracy", clean), ("AutoAttack", aa))
    parts += [f"{name} on {entry['n']} test images." for name, entry in measured if entry]
    return " ".join(parts)


WRITERS: dict[str, Callable[[Subject, Path], None]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "robustbench": _write_robustbench,
}
