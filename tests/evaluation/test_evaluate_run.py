"""Measuring a finished run: from its directory or its file, in any batch size, and its pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import puat_fast
from puat_fast import checkpoint
from puat_fast.config import Config, ConfigError, merge
from puat_fast.data.formats import load_dataset
from puat_fast.evaluation.evaluate import evaluate
from puat_fast.evaluation.generate import generate_run
from puat_fast.evaluation.names import parse_attack
from puat_fast.evaluation.run import Options, evaluate_run


def measure(path: Path, attacks: list[str], progress: Any = None, **options: Any) -> dict[str, Any]:
    settings = Options(**({"n": 24, "device": "cpu"} | options))
    return evaluate_run(path, attacks, settings, progress=progress).result


def verdict(result: dict[str, Any], attack: str) -> tuple[int, int]:
    return result["attacks"][attack]["correct"], result["attacks"][attack]["n"]


def test_run_directory_and_file_agree(run):
    a, b = (measure(p, ["clean", "pgd-8"]) for p in (run, run / "classifier.safetensors"))
    for attack in ("clean", "pgd-8"):
        assert verdict(a, attack) == verdict(b, attack)
    assert list(a["attacks"]) == ["clean", "pgd-8"]
    json.dumps(a, allow_nan=False)
    pgd8 = a["attacks"]["pgd-8"]
    assert (pgd8["eps"], pgd8["step_size"], pgd8["num_steps"]) == (8 / 255, 1 / 255, 20)
    assert pgd8["accuracy"] == pgd8["correct"] / 24


def test_it_measures_what_the_loaded_classifier_says(run):
    C, data = puat_fast.load_classifier(run), load_dataset("digits", None).test
    x, y = torch.tensor(data.images[:50]).float() / 255, torch.tensor(data.labels[:50])
    right = int((C(x).argmax(1) == y).sum())
    assert verdict(measure(run, ["clean"], n=50), "clean") == (right, 50)


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (7, 7), (None, 360), (10_000, 360)])
def test_n_takes_the_first_images(run, n, expected):
    result = measure(run, ["clean"], n=n)
    assert result["n"] == result["attacks"]["clean"]["n"] == expected


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_batch_size_does_not_change_the_clean_accuracy(run, batch_size):
    assert verdict(measure(run, ["clean"], batch_size=batch_size), "clean") == verdict(measure(run, ["clean"]), "clean")


class StartSensitive(nn.Module):
    """No gradient: PGD stays at its random start, and the verdict tells the sign of the start's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits N x 2."""
        drift = (x - 128 / 255).detach().mean((1, 2, 3)) + 0 * x.sum((1, 2, 3)) * self.unused
        return torch.stack([drift, -drift], 1)


def test_batch_size_does_not_change_an_attack():
    """The starting point of an image must not depend on the batch that it happens to be in."""
    images, labels = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    results = [evaluate(StartSensitive(), images, labels, parse_attack("pgd-8"), batch_size=b) for b in (40, 16, 1)]
    assert 5 < results[0]["correct"] < 35
    assert len({r["correct"] for r in results}) == 1


def test_seeds_do_not_share_starting_points():
    """Batch 1 of seed 0 must not start where batch 0 of seed 1 does: repeats over seeds are to be independent."""
    from puat_fast.attacks import accuracy

    images, labels, draws = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), []

    def attack(model, x, y, noise):
        draws.append(float(noise.uniform("rae", (1,))))
        return x

    for seed in (0, 1):
        accuracy.correct(StartSensitive(), images, labels, attack, batch_size=2, seed=seed)
    assert len(set(draws)) == 4


def test_the_seed_repeats(run):
    a, b = (measure(run, ["pgd-8"], seed=3) for _ in range(2))
    assert verdict(a, "pgd-8") == verdict(b, "pgd-8")


def test_a_model_without_parameters_can_be_measured():
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert evaluate(model, images, labels, parse_attack("clean"))["correct"] == 4


def test_progress_is_told(run):
    seen: list[Any] = []
    measure(run, ["clean"], progress=lambda *a: seen.append(a), n=6, batch_size=4)
    assert [a[:3] for a in seen] == [("clean", 0, 6), ("clean", 4, 6), ("clean", 6, 6)]


def test_autoattack_is_the_standard_version(run, monkeypatch):
    from puat_fast.evaluation import evaluate as module

    seen: list[Any] = []
    attack = module.autoattack

    def shorter(*args: Any, **options: Any) -> Any:
        assert attack(*args[:3], 0, **options).standard and options["iterations"] == 100 and "attacks" not in options
        return attack(*args, **options, num_queries=20)

    monkeypatch.setattr(module, "autoattack", shorter)
    result = measure(run, ["clean", "aa"], progress=lambda *a: seen.append(a), n=6, batch_size=4)
    json.dumps(result, allow_nan=False)
    aa = result["attacks"]["aa"]
    assert (aa["eps"], aa["step_size"], aa["num_steps"], aa["n"]) == (8 / 255, None, 100, 6)
    assert list(aa["after"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert aa["after"]["clean"] == result["attacks"]["clean"]["accuracy"] and aa["after"]["square"] == aa["accuracy"]
    assert aa["correct"] == aa["broken_by"].count(None) and len(aa["broken_by"]) == 6
    assert {a[0] for a in seen} >= {"aa apgd-ce", "aa square"} and all(a[1] <= a[2] == 6 for a in seen)


def test_mistakes(run, tmp_path):
    with pytest.raises(ValueError, match="attacks: 'pgd8'"):
        measure(run, ["clean", "pgd8"])
    with pytest.raises(checkpoint.CheckpointError, match="no such classifier"):
        measure(tmp_path, ["clean"])
    with pytest.raises(checkpoint.CheckpointError, match="no such classifier"):
        measure(tmp_path / "nothing", ["clean"])


def test_a_dataset_of_other_classes_is_refused(run, monkeypatch):
    from tiny_cases import tiny_dataset

    from puat_fast.evaluation import run as module

    monkeypatch.setattr(module, "load_dataset", lambda name, folder, classes: tiny_dataset(3))
    with pytest.raises(ConfigError, match="has 3 classes, the classifier 10"):
        measure(run, ["clean"])


# -- pictures -------------------------------------------------------------------------------------------------------


def test_generate_writes_a_grid(run, tmp_path):
    grid = tmp_path / "grid.png"
    result = generate_run(run, grid, per_class=2, seed=0, device="cpu")
    assert (result["num_classes"], result["per_class"], result["grid"]) == (10, 2, str(grid))
    assert set(result["accuracy"]) == {"real", "G(z,y)", "UAE"}
    assert all(0 <= a <= 1 for a in result["accuracy"].values())
    with Image.open(grid) as image:
        image.verify()
        assert image.format == "PNG" and image.width > 10 * 32
    again = generate_run(run, tmp_path / "again.png", per_class=2, seed=0, device="cpu")
    assert again["accuracy"] == result["accuracy"]
    assert (tmp_path / "again.png").read_bytes() == grid.read_bytes()
    generate_run(run, tmp_path / "other.png", per_class=2, seed=1, device="cpu")
    assert (tmp_path / "other.png").read_bytes() != grid.read_bytes()


def test_generate_mistakes(run, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="not a run directory"):
        generate_run(tmp_path, tmp_path / "g.png", 1, 0, "cpu")
    copy = tmp_path / "regular"
    copy.mkdir()
    shutil.copy(run / "config.yaml", copy)
    values = Config.load(copy / "config.yaml").to_dict()
    merge(values, {"method": "regular"})
    from puat_fast import files

    files.write_yaml(copy / "config.yaml", values)
    with pytest.raises(ConfigError, match="method regular has no generator"):
        generate_run(copy, tmp_path / "g.png", 1, 0, "cpu")
    shutil.copy(run / "config.yaml", copy)
    with pytest.raises(checkpoint.CheckpointError, match="no such checkpoint"):
        generate_run(copy, tmp_path / "g.png", 1, 0, "cpu")


def test_pictures_leave_training_alone(run):
    from tiny_cases import equal_state, tiny_config, tiny_dataset, tiny_engine

    from puat_fast.engine.samples import sample_rows

    engine, test = tiny_engine(tiny_config()), tiny_dataset(3).test
    engine.next_phases()
    engine.nets.A.eval()
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in engine.nets.items()}
    noise = engine.noise.generator.get_state()
    rows = sample_rows(engine.nets, engine.config, torch.tensor(test.images), torch.tensor(test.labels), per_class=2)
    assert [(row.label, row.images.shape) for row in rows] == [(n, (6, 3, 32, 32)) for n in ("real", "G(z,y)", "UAE")]
    assert all(equal_state(net.state_dict(), before[name]) for name, net in engine.nets.items())
    assert torch.equal(engine.noise.generator.get_state(), noise)
    assert not engine.nets.A.training and engine.nets.G.training and engine.nets.C_ema.training
    assert abs(rows[2].images - rows[1].images).max() <= 8 / 255 + 1e-6
