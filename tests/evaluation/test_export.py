"""What `puat-fast export` writes is what others read, and gives the same logits."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dm_wide_resnet import DMWideResNet
from torch import Tensor, nn

from puat_fast import checkpoint, cli, export_verb, files
from puat_fast import export as exporting
from puat_fast.checkpoint import load_classifier
from puat_fast.config import ConfigError
from puat_fast.evaluation.run import Options, evaluate_run
from puat_fast.export import export
from puat_fast.networks.classifier import Classifier
from puat_fast.ops import _library

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
NAMES = [f"class {k}" for k in range(7)]
FACTS = {"method": "puat", "epoch": 3, "val_robust_acc": None}
ROBUSTBENCH_FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
)  # fmt: skip


@pytest.fixture(scope="module")
def C() -> Classifier:
    """WRN-16-2, so that there are blocks of each kind, with statistics and biases of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = Classifier(7, 16, 2, MEAN, STD)
        nn.init.normal_(net.logits.bias)
        net.set_bn_momentum(1.0)
        net(torch.rand(16, 3, 32, 32))
    return net.eval().requires_grad_(False)


@pytest.fixture
def file(C: Classifier, tmp_path: Path) -> Path:
    """A file of ours, in a folder that the test may write to."""
    checkpoint.save_classifier(tmp_path / "c.safetensors", C, "cifar100", NAMES, FACTS)
    return tmp_path / "c.safetensors"


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- RobustBench ----------------------------------------------------------------------------------------------------


def test_robustbench_gives_the_same_logits_in_their_network(C, x, file):
    """In float64, where both are exact: same layers, same order, same padding, same normalisation."""
    out = export(file, "robustbench")
    assert out == file.with_name("c-robustbench")
    theirs = DMWideResNet(7, 16, 2, nn.SiLU)
    theirs.load_state_dict(torch.load(out / "classifier.pt", weights_only=True))
    theirs = theirs.eval().double()
    theirs.mean, theirs.std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        ours = load_classifier(out).double()(x.double())
        torch.testing.assert_close(theirs(x.double()), ours, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(ours, DMWideResNet(7, 16, 2, nn.SiLU).eval().double()(x.double()), atol=1e-2)


def test_robustbench_state_dict_is_bare(C, file):
    state = torch.load(export(file, "robustbench") / "classifier.pt", weights_only=True)
    assert set(state) == set(DMWideResNet(7, 16, 2).state_dict()) and len(state) == 83
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    # its loader cuts these words off a key, wherever in it they are
    assert not any("module." in key or "model." in key for key in state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("persistent", [False, True], ids=["attributes", "buffers"])
def test_readme_of_the_folder_loads_it(C, x, file, monkeypatch, persistent):
    """Its code block, run as it stands, with either kind of DMWideResNet."""
    out = export(file, "robustbench")
    module = types.ModuleType("robustbench.model_zoo.architectures.dm_wide_resnet")
    module.DMWideResNet = type("DMWideResNet", (DMWideResNet,), {"persistent": persistent})
    parts = module.__name__.split(".")
    for n in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](x), C(x), rtol=1e-4, atol=1e-5)


def test_model_info_has_their_fields_and_ours(file):
    told = json.loads((export(file, "robustbench") / "model_info.json").read_text())
    assert tuple(told)[:14] == ROBUSTBENCH_FIELDS
    assert {key: told[key] for key in ("dataset", "architecture", "eps", "link", "venue", "number_forward_passes")} == {
        "dataset": "cifar100", "architecture": "WideResNet-16-2", "eps": "8/255", "venue": "TPAMI 2024",
        "link": "https://arxiv.org/abs/2301.09069", "number_forward_passes": 1,
    }  # fmt: skip
    assert {told[key] for key in ("clean_acc", "autoattack_acc", "reported", "additional_data")} == {None}
    assert {key: told[key] for key in list(told)[14:]} == {
        "depth": 16, "width": 2, "num_classes": 7, "activation": "silu", "mean": list(MEAN), "std": list(STD),
        "class_names": NAMES, "facts": FACTS,
    }  # fmt: skip


def test_model_info_takes_accuracies_from_the_run(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "samples"))
    (copy / "eval").mkdir(exist_ok=True)
    clean, aa = ({"accuracy": a, "n": n} for a, n in ((0.91234, 10000), (0.5, 1000)))
    found = {
        "a": {"dataset": "digits", "attacks": {"clean": clean | {"accuracy": 0.99, "n": 50}, "aa": aa | {"n": 10}}},
        "b": {"dataset": "digits", "attacks": {"clean": clean, "pgd-8": aa | {"n": 20000}}},
        "c": {"dataset": "digits", "attacks": {"aa": aa | {"warnings": ["Square beats white-box"]}}},
        "d": {"dataset": "svhn", "attacks": {"clean": clean | {"accuracy": 0.1, "n": 26032}}},
        "e": {"dataset": "digits", "attacks": ["clean"]},
        "f": ["something else"],
    }
    model = {"weights": checkpoint.fingerprint(load_classifier(copy))}
    found = {name: result | {"model": model} if isinstance(result, dict) else result for name, result in found.items()}
    for name, result in found.items():
        (copy / "eval" / f"{name}.json").write_text(json.dumps(result))
    (copy / "eval" / "broken.json").write_text("{")
    out = export(copy, "robustbench")
    assert out == copy / "export" / "classifier-robustbench"
    told = json.loads((out / "model_info.json").read_text())
    assert (told["clean_acc"], told["autoattack_acc"], told["unreliable"]) == ("91.23", "50.00", True)
    assert told["footnote"].startswith("Trained by puat-fast")
    assert told["footnote"].endswith(". Accuracy on 10000 test images. AutoAttack on 1000 test images.")
    assert told["additional_data"] is False and told["dataset"] == "digits"


def test_model_info_takes_no_accuracy_of_other_weights(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "samples", "eval"))
    evaluate_run(copy, ["clean"], Options(n=20, device="cpu")).write(copy / "eval", "clean_n20")
    told = json.loads((export(copy, "robustbench") / "model_info.json").read_text())
    assert told["clean_acc"] is not None
    C = load_classifier(copy)
    with torch.no_grad():  # as if it was trained on
        C.logits.bias[0] += 1e-3
    info = checkpoint.about(copy)
    checkpoint.save_classifier(copy / "classifier.safetensors", C, info.dataset, info.class_names, info.facts)
    told = json.loads((export(copy, "robustbench", force=True) / "model_info.json").read_text())
    assert told["clean_acc"] is None


# -- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["robustbench", "safetensors"])
def test_round_trip_is_exact(C, x, file, tmp_path, format):
    out = export(file, format, tmp_path / "out.safetensors")
    again = load_classifier(out)
    assert torch.equal(again(x), load_classifier(file)(x)) and again.normalisation == (MEAN, STD)
    info, before = checkpoint.about(out), checkpoint.about(file)
    assert (info.dataset, info.class_names, info.facts) == (before.dataset, before.class_names, before.facts)


def test_safetensors_of_a_run_is_the_runs_own(run, tmp_path):
    out = export(run, "safetensors", tmp_path / "c.safetensors")
    assert out.read_bytes() == (run / "classifier.safetensors").read_bytes()


def test_a_foreign_file_through_all_formats(C, x, tmp_path):
    foreign = tmp_path / "theirs.pt"
    torch.save({"model_state_dict": {f"module.0.{key}": t for key, t in C.state_dict().items()}}, foreign)
    with pytest.raises(checkpoint.CheckpointError, match="mean is not in it"):
        export(foreign, "safetensors")
    first = export(foreign, "safetensors", mean=MEAN, std=STD, dataset="cifar100")
    assert first == tmp_path / "theirs.safetensors" and checkpoint.about(first).dataset == "cifar100"
    unnamed = export(foreign, "safetensors", tmp_path / "unnamed.safetensors", mean=MEAN, std=STD)
    assert checkpoint.about(unnamed).dataset is None
    second = export(first, "robustbench")
    told = json.loads((second / "model_info.json").read_text())
    assert (told["name"], told["authors"], told["facts"]) == ("", "", {}) and "Trained" not in told["footnote"]
    third = export(second, "safetensors")
    assert third == second / "export" / "classifier.safetensors"
    assert torch.equal(load_classifier(third)(x), C(x))
    with pytest.raises(ConfigError, match=r"dataset: 'svhn' was given, but .* is of 'cifar100'"):
        export(third, "onnx", dataset="svhn")


# -- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(C, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    checkpoint.save_classifier(folder / "c.safetensors", C, "cifar100", NAMES, FACTS)
    return export(folder / "c.safetensors", "onnx")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_onnx_gives_the_same_logits(C, x, exported, n):
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": x[:n].numpy()})
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, C(x[:n]).numpy(), rtol=1e-5, atol=1e-5)


def test_onnx_graph_is_standard_and_says_what_it_is(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*model.graph.input, *model.graph.output)]  # fmt: skip
    assert shapes == [["N", 3, 32, 32], ["N", 7]]
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    told = {entry.key: entry.value for entry in model.metadata_props}
    about = json.loads(told[checkpoint.FORMAT])
    assert (about["dataset"], about["class_names"], about["mean"]) == ("cifar100", NAMES, list(MEAN))


def test_onnx_leaves_the_kernels_on(exported):
    assert not _library._reference_only and not logging.root.manager.disable


def test_onnx_is_one_file_without_paths_of_this_machine(exported):
    assert {file.name for file in exported.parent.iterdir()} == {"c.onnx", "c.safetensors"}
    content = exported.read_bytes()
    assert b"classifier.py" not in content and str(Path.cwd()).encode() not in content


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_onnx_without_its_extra(file, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["export", str(file), "--format", "onnx"]) == 1
    assert capsys.readouterr().err == (
        f'puat-fast: error: format: onnx needs {missing}: pip install "puat-fast[onnx]"\n'
    )  # fmt: skip
    assert [path.name for path in file.parent.iterdir()] == ["c.safetensors"]


# -- targets --------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_told(C, x, file):
    target = file.with_name("out")
    target.write_text("mine")
    with pytest.raises(ConfigError, match=r"out: .*/out is there already; --force replaces it"):
        export(file, "safetensors", target)
    assert target.read_text() == "mine"
    export(file, "safetensors", target, force=True)
    assert target.read_bytes() == file.read_bytes()
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        export(file, "robustbench", target, force=True)
    with pytest.raises(ConfigError, match="is there already"):  # onto itself, by the default of --out
        export(file, "safetensors")


def test_a_folder_is_replaced_only_if_it_is_an_export(file):
    out = export(file, "robustbench")
    with pytest.raises(ConfigError, match="is there already"):
        export(file, "robustbench")
    (out / "README.md").write_text("old")
    export(file, "robustbench", force=True)
    assert (out / "README.md").read_text() != "old"
    (out / "thesis.tex").touch()
    for format in ("robustbench", "safetensors"):
        with pytest.raises(ConfigError, match="is a folder that is not an export, and is not replaced"):
            export(file, format, out, force=True)
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_export_leaves_nothing_half_written(file, monkeypatch, old):
    out = file.with_name("c-robustbench")
    if old:
        export(file, "robustbench")
    before = {path.name: path.read_bytes() for path in out.iterdir()} if old else None

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(file, "robustbench", force=True)
    assert {path.name for path in file.parent.iterdir()} == {"c.safetensors"} | ({out.name} if old else set())
    assert before is None or {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_unknown_format(file):
    with pytest.raises(ConfigError, match="format: 'tflite' is not one of safetensors, onnx, robustbench"):
        export(file, "tflite")


# -- the verb -------------------------------------------------------------------------------------------------------


def test_verb_offers_what_there_is():
    assert export_verb.FORMATS == tuple(exporting.WRITERS)


@pytest.mark.parametrize("format, name", [
    ("onnx", "c.onnx"), ("robustbench", "c-robustbench"),
])  # fmt: skip
def test_verb_writes_and_says_where_and_nothing_else(C, tmp_path, format, name):
    torch.save(C.state_dict(), tmp_path / "c.pt")
    numbers = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    command = ["puat_fast", "export", str(tmp_path / "c.pt"), "--format", format, *numbers]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)  # as pytest catches logs
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / name}\n", "")
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("argv, code, says", [
    (["--format", "onnx", "--mean", "1,2"], 2, "argument --mean: '1,2' is not 3 numbers, such as 0.4914,0.4822"),
    (["--format", "onnx", "--std", "a,b,c"], 2, "argument --std: 'a,b,c' is not 3 numbers"),
    (["--format", "onnx", "--std", "1,0,1"], 2, "std: (1.0, 0.0, 1.0) is not a list of 3 numbers, each above 0"),
    (["--format", "coreml"], 2, "argument --format: invalid choice: 'coreml'"),
    ([], 2, "the following arguments are required: --format"),
    (["--format", "onnx", "--out", "/no/such/x.onnx"], 2, "/no/such/x.onnx: cannot be written"),
    (["--format", "safetensors", "--mean", "0,0,0"], 1, "mean: (0.0, 0.0, 0.0) was given, but its own is (0.5071, "),
    (["--format", "safetensors", "--dataset", "svhn", "--out", "new"], 2, "dataset: 'svhn' was given"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")  # fmt: skip
def test_verb_refuses_in_one_line(file, capsys, monkeypatch, argv, code, says):
    monkeypatch.chdir(file.parent)
    given = [*argv, *(["--out", "out"] if "--out" not in argv else [])]
    assert cli.main(["export", str(file), *given]) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert [path.name for path in file.parent.iterdir()] == ["c.safetensors"]


def test_verb_of_a_run_that_is_not_there(capsys):
    assert cli.main(["export", "/no/run", "--format", "onnx"]) == 1
    assert capsys.readouterr().err == "puat-fast: error: /no/run: no such run directory or file\n"
