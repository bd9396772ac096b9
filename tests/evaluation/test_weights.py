"""State dicts of other people: found in what they save, recognised by shapes, and told apart from what does not fit."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from puat_fast import checkpoint, weights
from puat_fast.checkpoint import CheckpointError
from puat_fast.networks.classifier import Classifier

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@pytest.fixture(scope="module")
def C() -> Classifier:
    """WRN-10-1 with statistics of its own, so that no tensor is as it was initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = Classifier(10, 10, 1, MEAN, STD)
        nn.init.normal_(net.logits.bias)
        for momentum in (1.0, 0.3):
            net.set_bn_momentum(momentum)
            net(torch.rand(8, 3, 32, 32))
    return net.eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that would be noticed: of the average that is not to be taken."""
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


LAYOUTS = {
    "bare": lambda s: s,
    "ordered": OrderedDict,
    "DataParallel": lambda s: prefixed(s, "module."),
    "DMAT": lambda s: {"model_state_dict": prefixed(s, "module.0.")},
    "DMAT, averaged": lambda s: {
        "unaveraged_model_state_dict": prefixed(other(s), "module.0."), "model_state_dict": prefixed(s, "module.0."),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 400,
    },
    "RobustBench": lambda s: {"state_dict": prefixed(s, "module.model.")},
    "one of another name": lambda s: {"ema": s, "epoch": 3},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **prefixed(s, "module.")},
    "without counters": lambda s: {k: t for k, t in s.items() if not k.endswith("num_batches_tracked")},
    "float64": lambda s: {k: t.double() if t.is_floating_point() else t for k, t in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_files(C, x, tmp_path, layout):
    file = tmp_path / "c.pt"
    torch.save(LAYOUTS[layout](C.state_dict()), file)
    loaded = checkpoint.load_classifier(file, mean=MEAN, std=STD)
    assert torch.equal(loaded(x), C(x))
    assert (loaded.depth, loaded.width, loaded.num_classes, loaded.normalisation) == (10, 1, 10, (MEAN, STD))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("name", ["c.pth", "c.ckpt", "c"])
def test_any_name_and_the_old_format(C, x, tmp_path, name):
    torch.save(C.state_dict(), tmp_path / name, _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoint.load_classifier(tmp_path / name, mean=MEAN, std=list(STD))(x), C(x))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_safetensors(C, x, tmp_path, prefix):
    safetensors.torch.save_file(prefixed(C.state_dict(), prefix), tmp_path / "c.safetensors", {"format": "pt"})
    assert torch.equal(checkpoint.load_classifier(tmp_path / "c.safetensors", mean=MEAN, std=STD)(x), C(x))


def test_what_torch_itself_makes_of_wrappers(C, x, tmp_path):
    """Real DataParallel, Sequential and AveragedModel, not our idea of their keys."""
    for wrapped in (nn.DataParallel(nn.Sequential(C)), AveragedModel(C), nn.Sequential(nn.Identity(), C)):
        torch.save(wrapped.state_dict(), tmp_path / "c.pt")
        assert torch.equal(checkpoint.load_classifier(tmp_path / "c.pt", mean=MEAN, std=STD)(x), C(x))


@pytest.mark.parametrize("num_classes, depth, width, tensors", [
    (10, 28, 10, 155), (100, 70, 16, 407), (3, 16, 2, 83), (200, 10, 1, 46),
])  # fmt: skip
def test_sizes_are_those_of_the_shapes(num_classes, depth, width, tensors):
    with torch.device("meta"):
        state = Classifier(num_classes, depth, width).state_dict()
    found = weights.recognise({"state_dict": state})
    assert (found.depth, found.width, found.num_classes) == (depth, width, num_classes)
    assert len(found.state) == tensors


# -- what does not fit ----------------------------------------------------------------------------------------------


def without(key: str) -> Any:
    return lambda s: {k: t for k, t in s.items() if k != key}


def with_(**changed: Any) -> Any:
    return lambda s: s | {key.replace("__", "."): value for key, value in changed.items()}


BROKEN = {
    "another network": (lambda s: {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)},
                        "no init_conv.weight in it, .* it holds: conv1.weight, fc.bias$"),
    "a list": (lambda s: [1, 2], "no init_conv.weight in it, .* it holds: list"),
    "nothing": (lambda s: {}, "no init_conv.weight in it, .* it holds: nothing"),
    "too deep": (lambda s: {"a": {"b": s}}, "no init_conv.weight in it, .* it holds: a$"),
    "missing": (without("layer.1.block.0.conv_1.weight"), "missing layer.1.block.0.conv_1.weight, of WRN-10-1 of 10 "),
    "no blocks": (lambda s: {k: t for k, t in s.items() if "block" not in k}, "missing layer.0.block.0.conv_0.weight"),
    "no logits": (without("logits.weight"), "missing logits.weight"),
    "unexpected": (with_(layer__2__block__0__se__weight=torch.zeros(1)),
                   "unexpected layer.2.block.0.se.weight, not of WRN-10-1"),
    "another block in one group": (lambda s: s | {k.replace("block.0", "block.1"): t for k, t in s.items()
                                                  if k.startswith("layer.0")},
                                   r"missing layer.1.block.1.batchnorm_0.weight, of WRN-16-1"),
    "misshapen": (with_(init_conv__weight=torch.zeros(16, 3, 5, 5)),
                  r"init_conv.weight: shape \(16, 3, 5, 5\), expected \(16, 3, 3, 3\), of WRN-10-1"),
    "odd features": (with_(logits__weight=torch.zeros(10, 65)), r"logits.weight: shape \(10, 65\), expected K x 64"),
    "flat logits": (with_(logits__weight=torch.zeros(10)), r"logits.weight: shape \(10,\), expected K x 64 width"),
    "absurd": (with_(logits__weight=torch.zeros(1).expand(10, 64 * 10**9)), ".*"),
    "whole numbers": (with_(init_conv__weight=torch.zeros(16, 3, 3, 3, dtype=torch.int64)),
                      "init_conv.weight: torch.int64, expected torch.float32"),
    "a layer before it": (lambda s: {"0.mean": torch.zeros(3), **prefixed(s, "1.")},
                          "unexpected 0.mean, beside a network whose keys start with 1[.]$"),
    "two networks": (lambda s: prefixed(s, "a.") | prefixed(s, "b."), "several networks in it: a., b.; "),
    "two of unknown names": (lambda s: {"student": s, "teacher": s}, "several state dicts in it: student, teacher; "),
    "one of them known": (lambda s: {"state_dict": s, "ema": s}, "several state dicts in it: state_dict, ema; "),
    "one inside the other": (lambda s: {**s, "ema": s}, "several state dicts in it: its own keys, ema; "),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_does_not_fit_is_told_by_its_first_key(C, tmp_path, how):
    make, says = BROKEN[how]
    file = tmp_path / "c.pt"
    torch.save(make(C.state_dict()), file)
    with pytest.raises(CheckpointError, match=rf"c\.pt: {says}"):
        checkpoint.load_classifier(file, mean=MEAN, std=STD)


def test_a_whole_model_is_not_run(C, tmp_path):
    torch.save(C, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: broken, or it holds more than tensors: save .* state_dict\(\)"):
        checkpoint.load_classifier(tmp_path / "c.pt", mean=MEAN, std=STD)


def test_a_checkpoint_to_resume_names_the_file_to_take(run):
    with pytest.raises(CheckpointError, match=rf"best\.pt: all state of a run, .*{run}/classifier\.safetensors$"):
        checkpoint.load_classifier(run / "checkpoints" / "best.pt", mean=MEAN, std=STD)


# -- mean and std ---------------------------------------------------------------------------------------------------


def test_unknown_mean_and_std_are_asked_for(C, tmp_path):
    file = tmp_path / "c.pt"
    torch.save(C.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"c\.pt: mean is not in it, nor in a model_info\.json") as error:
        checkpoint.load_classifier(file)
    for known in ("cifar10, svhn, folder: (0.4914, 0.4822, 0.4465) and (0.2023, 0.1994, 0.201)",
                  "cifar10 in RobustBench and DMAT: (0.4914, 0.4822, 0.4465) and (0.2471, 0.2435, 0.2616)",
                  "cifar100, cifar100 in RobustBench and DMAT: (0.5071, 0.4865, 0.4409)"):  # fmt: skip
        assert known in str(error.value)
    with pytest.raises(CheckpointError, match="std is not in it"):
        checkpoint.load_classifier(file, mean=MEAN)
    assert checkpoint.about(file).mean is None


@pytest.mark.parametrize("name", ["model_info.json", "c.json"])
def test_a_model_info_beside_it_tells_them(C, x, tmp_path, name):
    file = tmp_path / "c.pt"
    torch.save(C.state_dict(), file)
    told = {"mean": MEAN, "std": STD, "dataset": "cifar10", "class_names": ["a"] * 10, "facts": {"epoch": 3}}
    (tmp_path / name).write_text(json.dumps(told))
    assert torch.equal(checkpoint.load_classifier(file)(x), C(x))
    assert torch.equal(checkpoint.load_classifier(file, mean=MEAN)(x), C(x))
    info = checkpoint.about(file)
    assert (info.dataset, info.class_names, info.facts) == ("cifar10", ("a",) * 10, {"epoch": 3})
    with pytest.raises(CheckpointError, match=r"std: \(1.0, 1.0, 1.0\) was given, but its own is \(0.2471, "):
        checkpoint.load_classifier(file, std=(1, 1, 1))


def test_a_model_info_of_robustbench_tells_the_dataset_alone(C, tmp_path):
    torch.save(C.state_dict(), tmp_path / "Wang2023Better.pt")
    (tmp_path / "Wang2023Better.json").write_text('{"dataset": "cifar10", "clean_acc": "92.44"}')
    info = checkpoint.about(tmp_path / "Wang2023Better.pt")
    assert (info.dataset, info.mean, info.class_names) == ("cifar10", None, ())


@pytest.mark.parametrize("text, says", [
    ("{", "model_info.json: broken"), ("[]", "model_info.json: broken: not a JSON object"),
    ('{"mean": [1, 2]}', r"c.pt: mean: \[1, 2\] is not a list of 3 numbers"),
    ('{"activation": "relu"}', "model_info.json: activation 'relu', expected 'silu'"),
])  # fmt: skip
def test_broken_model_info(C, tmp_path, text, says):
    torch.save(C.state_dict(), tmp_path / "c.pt")
    (tmp_path / "model_info.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load_classifier(tmp_path / "c.pt", mean=MEAN, std=STD)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_buffers_of_the_network_tell_them(C, x, tmp_path, shape):
    """As the versions of DMWideResNet do whose mean and std are buffers."""
    state = C.state_dict() | {name: torch.tensor(v).view(shape) for name, v in (("mean", MEAN), ("std", STD))}
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "c.pt")
    loaded = checkpoint.load_classifier(tmp_path / "c.pt")
    assert torch.equal(loaded(x), C(x)) and loaded.normalisation == (MEAN, STD)
    with pytest.raises(CheckpointError, match="its own is"):
        checkpoint.load_classifier(tmp_path / "c.pt", mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("given", [
    {"mean": (1, 2)}, {"mean": "abc"}, {"mean": 3}, {"std": (1, 1, 0)}, {"std": (1, 1, float("nan"))},
], ids=str)  # fmt: skip
def test_wrong_arguments(run, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}: .* is not a list of 3 numbers"):
        checkpoint.load_classifier(run, **given)


def test_arguments_for_a_file_of_ours(run):
    mean, std = checkpoint.load_classifier(run).normalisation
    assert checkpoint.load_classifier(run, mean=mean, std=std).normalisation == (mean, std)
    with pytest.raises(CheckpointError, match=r"mean: .* was given, but its own is"):
        checkpoint.load_classifier(run, mean=(0, 0, 0))


# -- about ----------------------------------------------------------------------------------------------------------


def test_about_a_run_reads_no_weights(run, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.torch, "load_file", lambda *given: pytest.fail("weights were read"))
    info = checkpoint.about(run)
    assert info.file == run / "classifier.safetensors" and info.dataset == "digits"
    assert (info.depth, info.width, info.num_classes, len(info.class_names)) == (10, 1, 10, 10)
    assert info.facts["method"] == "puat" and info.mean is not None and info.std is not None


def test_about_foreign_files(C, tmp_path):
    file: Path = tmp_path / "c.safetensors"
    safetensors.torch.save_file(C.state_dict(), file)
    info = checkpoint.about(file)
    assert info == checkpoint.ClassifierInfo(file, 10, 1, 10, None, None, None)


def test_a_run_comes_before_an_export_in_its_folder(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(run / "classifier.safetensors", copy)
    (copy / "classifier.pt").write_bytes(b"")
    assert checkpoint.about(copy).dataset == "digits"
