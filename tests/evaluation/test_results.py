"""What an evaluation tells and writes beside the accuracies: example by example, worst case, picture, paper."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_cases import OnDigits, digits, small_acgan
from PIL import Image
from safetensors.torch import load_file, save_file

from puat_fast import checkpoint, plots
from puat_fast.attacks.acgan_file import save_acgan
from puat_fast.checkpoint import CheckpointError
from puat_fast.config import ConfigError
from puat_fast.evaluation import evaluate, latent
from puat_fast.evaluation import run as run_module
from puat_fast.evaluation.names import AttackSpec, parse_attack, parse_attacks, parse_precision
from puat_fast.evaluation.picture import COLUMNS, Examples, image_rows, save_picture
from puat_fast.evaluation.run import Options, evaluate_run, verdicts_of

# -- example by example, and the worst case ---------------------------------------------------------------------------


def state(*right: int, **more: Any) -> dict[str, Any]:
    return {"columns": {"right": torch.tensor(right, dtype=torch.bool)}, **more}


def test_worst_case_by_hand() -> None:
    specs = [*parse_attacks("clean,pgd-8,aa"), AttackSpec(name="usong", kind="usong", draws=2)]
    states = {
        "clean": state(1, 1, 1, 0),
        "pgd-8": state(1, 0, 1, 1),  # the last is wrong on the clean image: no attack makes up for it
        "aa": state(1, 1, 0, 0, found={"broken_by": [None, None, "apgd-t", "clean"]}),
        "usong": state(0, 1, 1, 1, 0, 0, 1, 0),  # on other images: not part of it
    }
    found = verdicts_of(torch.tensor([3, 1, 4, 1]), specs, states)
    assert found["worst_case"].tolist() == [True, False, False, False]
    assert found["label"].tolist() == [3, 1, 4, 1]
    assert found["usong"].tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]  # draws x labels
    assert found["aa.broken_by"].tolist() == ["", "", "apgd-t", "clean"]
    assert "worst_case" not in verdicts_of(torch.arange(4), specs[:1], states)
    assert "worst_case" not in verdicts_of(torch.arange(4), [specs[0], specs[3]], states)
    assert latent.summary(specs[3], states["usong"] | {
        "columns": dict.fromkeys(latent.COLUMNS, states["usong"]["columns"]["right"]), "seconds": 1.0,
    })["worst_of_draws"] == 0.25  # fmt: skip


def test_each_autoattack_tells_what_broke_its_images() -> None:
    states = {
        name: state(1, 0, found={"broken_by": [None, who]}) for name, who in (("aa", "fab-t"), ("aa-10it", "square"))
    }
    found = verdicts_of(torch.arange(2), parse_attacks("aa,aa-10it"), states)
    assert found["aa.broken_by"].tolist() == ["", "fab-t"] and found["aa-10it.broken_by"].tolist() == ["", "square"]


def test_files_of_a_run(run: Path, tmp_path: Path) -> None:
    save_acgan(tmp_path / "acgan.safetensors", small_acgan())
    settings = Options(n=10, device="cpu", acgan=tmp_path)
    found = evaluate_run(run, ["clean", "pgd-2", "gpgd-0.1"], settings)
    found.write(tmp_path / "out", "name")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["name.json", "name.npz", "name.png"]
    result = json.loads((tmp_path / "out" / "name.json").read_text())
    assert result == found.result
    with np.load(tmp_path / "out" / "name.npz") as arrays:  # without pickles
        kept = {key: arrays[key] for key in arrays.files}
    assert {key: (a.dtype, a.shape) for key, a in kept.items()} == {
        "label": (np.int64, (10,)), "clean": (np.bool_, (10,)), "pgd-2": (np.bool_, (10,)),
        "gpgd-0.1": (np.bool_, (1, 10)), "worst_case": (np.bool_, (10,)),
    }  # fmt: skip
    for name, told in {**result["attacks"], "worst_case": result["worst_case"]}.items():
        assert told["correct"] == kept[name].sum() and told["n"] == 10 and len(told["wilson95"]) == 2
    assert result["worst_case"]["correct"] == (kept["clean"] & kept["pgd-2"]).sum()
    assert set(result["worst_case"]) == {"accuracy", "correct", "n", "wilson95"}
    assert result["paper"] == {"clean": None, "pgd-2": None, "gpgd-0.1": None} and result["notes"] == []
    assert (result["n_test"], result["engine"]) == (360, "eager")
    weights = checkpoint.fingerprint(checkpoint.load_classifier(run))
    known = {"arch": "WRN-10-1", "method": "puat", "preset": "paper", "n_labelled": 20}
    assert result["model"] == known | {"weights": weights}


def test_the_papers_value_stands_beside_ours(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_cases import tiny_dataset

    monkeypatch.setattr(run_module, "load_dataset", lambda *args: tiny_dataset(10, test=20))
    options = Options(n=4, device="cpu", dataset="cifar10")
    assert evaluate_run(run, ["clean"], options).result["paper"]["clean"] is None  # trained on other images
    about = checkpoint.about
    monkeypatch.setattr(checkpoint, "about", lambda path: dataclasses.replace(about(path), dataset="cifar10"))
    result = evaluate_run(run, ["clean"], options).result
    assert result["paper"]["clean"] == run_module.paper_cell("cifar10", "puat", "clean")
    assert len(result["notes"]) == 3  # network, labels, part of the images


# -- files that do not tell -------------------------------------------------------------------------------------------


def test_plain_weights_need_a_dataset_and_a_normalisation(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file(load_file(run / "classifier.safetensors"), file)
    triples = {"mean": (0.305,) * 3, "std": (0.364,) * 3}
    with pytest.raises(ConfigError, match=r"dataset: .*plain.safetensors does not tell .* name it by --dataset"):
        evaluate_run(file, ["clean"], Options(device="cpu", **triples))
    with pytest.raises(CheckpointError, match="mean is not in it"):
        evaluate_run(file, ["clean"], Options(device="cpu", dataset="digits"))
    plain = evaluate_run(file, ["clean"], Options(device="cpu", dataset="digits", **triples)).result
    ours = evaluate_run(run, ["clean"], Options(device="cpu")).result
    assert plain["attacks"]["clean"]["correct"] == ours["attacks"]["clean"]["correct"]
    unknown = {"arch": "WRN-10-1", "method": None, "preset": None, "n_labelled": None}
    assert plain["model"] == unknown | {"weights": ours["model"]["weights"]}


# -- precision --------------------------------------------------------------------------------------------------------


def test_precisions_by_name() -> None:
    specs = parse_attacks("clean,pgd-8,aa")
    assert parse_precision("bf16", specs) == {"clean": "fp32", "pgd-8": "bf16", "aa": "bf16"}
    assert parse_precision("fp32,aa=bf16, pgd-8.0=tf32", specs) == {"clean": "fp32", "pgd-8": "tf32", "aa": "bf16"}
    assert parse_precision("aa=bf16,fp32", specs) == dict.fromkeys(("clean", "pgd-8", "aa"), "fp32")  # the last wins
    for text, says in {
        "fp16": "'fp16' is not fp32, tf32, bf16", "": "'' is not", "aa=": "'aa=' is not",
        "pgd-4=bf16": "pgd-4 is not one of --attacks clean,pgd-8,aa", "adg=bf16": "attacks: 'adg' is not one of",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=says):
            parse_precision(text, specs)


def test_what_was_found_in_bf16_is_judged_in_float32(run: Path) -> None:
    import puat_fast

    C, (images, labels) = puat_fast.load_classifier(run), digits(30)
    found = evaluate.measure(C, images, labels, parse_attack("pgd-8"), precision="bf16")
    kept = Examples(found["examples"])
    assert C.conv_dtype is None
    assert torch.equal(C(kept["x_adv"]).argmax(1), kept["after"]) and torch.equal(
        C(kept["x"]).argmax(1), kept["before"]
    )
    whole = evaluate.measure(C, images, labels, parse_attack("pgd-8"))
    assert not torch.equal(whole["examples"]["x_adv"], found["examples"]["x_adv"])  # it was another search
    with pytest.raises(ValueError, match="precision: tf32 is of GPUs"):
        evaluate_run(run, ["pgd-8"], Options(device="cpu", precision="tf32"))


# -- picture ----------------------------------------------------------------------------------------------------------


def added(examples: Examples, first: int, broken: list[bool]) -> None:
    n = len(broken)
    x = torch.linspace(0, 1, n).view(n, 1, 1, 1).expand(n, 3, 32, 32)
    y = torch.zeros(n, dtype=torch.int64)
    examples.add(first, y, y, torch.tensor(broken).long(), x, (x + 0.02).clamp(0, 1))


def test_broken_ones_come_first_whatever_the_batches() -> None:
    broken = [i % 3 == 2 for i in range(24)]  # 8 of them
    whole, parts = Examples(), Examples()
    added(whole, 0, broken)
    for first in range(0, 24, 5):
        added(parts, first, broken[first : first + 5])
    assert whole["index"].tolist() == parts["index"].tolist() == [2, 5, 8, 11, 14, 17, 20, 23, 0, 1]
    assert not parts.full
    added(parts, 24, [True] * 2)
    assert parts.full and parts["index"].tolist()[-2:] == [24, 25]


def test_wrong_from_the_start_is_not_broken() -> None:
    examples, y, x = Examples(), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 32, 32)
    examples.add(0, y, torch.tensor([5, 0]), torch.tensor([5, 6]), x, x)
    assert examples["index"].tolist() == [1, 0]


def test_three_rows_for_each_attack() -> None:
    found = Examples(evaluate.measure(OnDigits(), *digits(40), parse_attack("pgd-30"))["examples"])
    class_names = ["zero", "one", "two", "a class of a long name", *"456789"]
    before, after, difference = image_rows("pgd-30", found, class_names)
    assert [len(row.images) for row in (before, after, difference)] == [COLUMNS] * 3
    truth = found["label"].tolist()
    assert before.captions is not None and before.good is not None and after.good is not None
    assert before.captions[0] == (class_names[truth[0]] if truth[0] != 3 else "a class o..")
    assert before.good[0] and not after.good[0]  # a broken one
    assert np.allclose(difference.images, np.clip(0.5 + 10 * (after.images - before.images), 0, 1), atol=1e-6)
    assert 0.5 < abs(difference.images - 0.5).max() + 1e-6 and abs(after.images - before.images).max() < 31 / 255


def test_the_picture_has_all_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Examples()
    added(examples, 0, [True, False, True])
    seen: list[Any] = []
    save = plots.save_grid
    monkeypatch.setattr("puat_fast.evaluation.picture.save_grid", lambda *a: (seen.append(a), save(*a)))
    save_picture(tmp_path / "p.png", {"pgd-8": examples, "clean": Examples(), "aa": examples}, list("0123456789"), "t")
    ((_, rows, _),) = seen
    assert [row.label for row in rows] == [
        "pgd-8: before", "after", "difference x 10", "aa: before", "after", "difference x 10",
    ]  # fmt: skip
    with Image.open(tmp_path / "p.png") as picture:
        cell = 32 * 3 + plots.CAPTION + plots.GAP
        assert picture.height // cell == 6 and picture.width > 3 * 96
    save_picture(tmp_path / "none.png", {"clean": Examples()}, [], "t")
    assert not (tmp_path / "none.png").exists()


def test_a_kept_record_still_has_its_picture(run: Path, tmp_path: Path) -> None:
    settings = Options(n=6, device="cpu", out=tmp_path)
    for name in ("a", "b"):
        evaluate_run(run, ["pgd-8"], settings).write(tmp_path, name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
