"""Trainer on a dataset in memory: what a run writes, whom it trains on, when it stops, what it refuses."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cases import equal_state, run_config, tiny_config, tiny_dataset

from puat_fast import checkpoint
from puat_fast.config import Config, ConfigError
from puat_fast.data.formats import Dataset, ImageSet
from puat_fast.engine import trainer as trainer_module
from puat_fast.engine.trainer import NonFiniteError, Run, Trainer
from puat_fast.noise import Noise
from puat_fast.runlog import RunError, read_metrics

TIMING = ("seconds", "images_per_s")
SHORT = {"pretrain": {"epochs": 0}, "schedule": {"epochs": 2, "steps_per_epoch": 2}}


pytestmark = pytest.mark.usefixtures("quick")


def rows(path: Path) -> list[dict[str, Any]]:
    """The metrics less the columns that depend on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(path)]


def train(config: Config, dataset: Dataset | None = None, **kwargs: Any) -> Run:
    return Trainer(config, dataset=dataset or tiny_dataset(), **kwargs).fit()


# -- what a run writes ----------------------------------------------------------------------------------------------


def test_run_directory(tmp_path):
    config = run_config(tmp_path / "run")
    run = train(config)
    names = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert {"config.yaml", "env.json", "metrics.csv", "metrics.jsonl", "curves.png", "classifier.safetensors",
            "checkpoints/last.pt", "checkpoints/best.pt"} <= names  # fmt: skip
    assert any(name.startswith("samples/stage2") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert Config.load(run.path / "config.yaml") == config
    metrics = read_metrics(run.path)
    assert [(r["stage"], r["epoch"], r["step"]) for r in metrics] == [(1, 1, 3), (1, 2, 6), (2, 1, 3), (2, 2, 6)]
    assert set(run.summary) == {"clean", "pgd-8"}
    assert 0 <= run.summary["pgd-8"] <= run.summary["clean"] <= 1
    with open(run.path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(r["C/loss"]) for r in table] == [r["C/loss"] for r in metrics]


def test_terms_of_each_phase_of_training(tmp_path):
    metrics = rows(train(run_config(tmp_path / "run")).path)
    assert not any(k.startswith(("D/", "G/", "A/", "C/rae")) for k in metrics[0])
    assert {"D/loss", "G/loss"} <= set(metrics[1]) and "A/loss" not in metrics[1]
    assert {"D/loss", "G/loss", "A/loss", "C/rae", "C/uae", "C/fake", "val_robust_acc"} <= set(metrics[2])
    assert "val_robust_acc" not in metrics[1]
    assert [m["lr"] for m in metrics] == [m["lr"] for m in metrics[:2]] * 2  # the schedule restarts


def test_the_saved_classifier_is_the_teacher_of_the_best_epoch(tmp_path):
    run = train(run_config(tmp_path / "run"))
    state = checkpoint.load(run.path / "checkpoints" / "best.pt")
    C = checkpoint.load_classifier(run.path)
    assert equal_state(C.state_dict(), state["engine"]["networks"]["C_ema"])
    assert not C.training
    assert state["best"]["epoch"] == max(r["epoch"] for r in rows(run.path) if r["stage"] == 2 and r["best"])


def test_a_run_is_not_overwritten(tmp_path):
    config = run_config(tmp_path / "run", **SHORT)
    train(config)
    with pytest.raises(RunError, match="holds a run already"):
        Trainer(config, dataset=tiny_dataset())


# -- what decides a run ---------------------------------------------------------------------------------------------


def test_one_seed_one_result(tmp_path):
    a, b = (train(run_config(tmp_path / name)) for name in "ab")
    assert rows(a.path) == rows(b.path) and a.summary == b.summary
    last_a, last_b = (checkpoint.load(run.path / "checkpoints" / "last.pt") for run in (a, b))
    assert equal_state(last_a, last_b)


def test_another_seed_another_result(tmp_path):
    a, b = (train(run_config(tmp_path / str(seed), seed=seed, **SHORT)) for seed in (1, 2))
    assert [r["C/loss"] for r in rows(a.path)] != [r["C/loss"] for r in rows(b.path)]


def test_the_global_generators_decide_nothing(tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    a = train(run_config(tmp_path / "a", **SHORT))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    b = train(run_config(tmp_path / "b", **SHORT))
    assert rows(a.path) == rows(b.path) and a.summary == b.summary


def poisoned(dataset: Dataset, split: Any) -> Dataset:
    labels = dataset.train.labels.copy()
    labels[split.unlabelled] = (labels[split.unlabelled] + 1) % dataset.num_classes
    return Dataset(dataset.name, dataset.class_names, ImageSet(dataset.train.images, labels), dataset.test)


@pytest.mark.parametrize("preset", ["paper", "official-v1"])
def test_labels_of_unlabelled_images_are_never_read(tmp_path, monkeypatch, preset):
    dataset, config = tiny_dataset(), run_config(tmp_path / "a", preset)
    split = Trainer(config, dataset=dataset).split
    assert len(split.unlabelled) == 28
    monkeypatch.setattr(trainer_module, "training_set", lambda dataset, *a: (dataset.train, split))
    runs = [
        train(run_config(tmp_path / name, preset), data)
        for name, data in (("true", dataset), ("poisoned", poisoned(dataset, split)))
    ]
    assert rows(runs[0].path) == rows(runs[1].path) and runs[0].summary == runs[1].summary
    weights = [checkpoint.load(run.path / "checkpoints" / "last.pt")["engine"]["networks"] for run in runs]
    assert equal_state(weights[0], weights[1])


@pytest.mark.parametrize("exclude", [True, False])
def test_stage_1_and_the_validation_images(tmp_path, exclude):
    trainer = Trainer(run_config(tmp_path / "run", pretrain={"exclude_validation": exclude}), dataset=tiny_dataset())
    sampler, split = trainer.loader.sampler, trainer.split
    assert len(split.validation) == 4
    assert bool(set(split.validation) & set(sampler.labelled)) is not exclude
    assert not set(split.validation) & set(sampler.unlabelled)
    trainer.engine.begin_stage2()
    sampler = trainer._make_loader().sampler
    assert not set(split.validation) & (set(sampler.labelled) | set(sampler.unlabelled))


def test_without_unlabelled_data(tmp_path):
    config = run_config(tmp_path / "run", data={"use_unlabelled": False, "n_labelled": 40})
    trainer = Trainer(config, dataset=tiny_dataset())
    assert not len(trainer.loader.sampler.unlabelled)
    trainer.fit()


def test_no_unlabelled_image_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.n_labelled: 40 leaves no unlabelled image.*use_unlabelled"):
        Trainer(run_config(tmp_path / "run", data={"n_labelled": 40}), dataset=tiny_dataset())


# -- validation and the best epoch ----------------------------------------------------------------------------------


def with_validation(trainer: Trainer, accuracies: list[float]) -> list[int]:
    """Runs with given robust accuracies; returns the stage-2 epochs that became the best so far."""
    results = iter(accuracies)
    trainer._accuracy = lambda data, robust=False: next(results) if robust else 0.5
    trainer.fit()
    return [r["epoch"] for r in read_metrics(trainer.path) if r["stage"] == 2 and r["best"]]


@pytest.mark.parametrize(
    ("accuracies", "best"), [([0.5, 0.5, 0.25], [1, 2]), ([0.5, 0.25, 0.5], [1, 3]), ([0.0, 0.0, 0.5], [1, 2, 3])]
)
def test_ties_go_to_the_later_epoch(tmp_path, accuracies, best):
    config = run_config(tmp_path / "run", pretrain={"epochs": 0}, schedule={"epochs": 3, "steps_per_epoch": 1})
    trainer = Trainer(config, dataset=tiny_dataset())
    assert with_validation(trainer, accuracies) == best
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert state["best"] == {"robust_acc": max(accuracies), "epoch": best[-1]}
    assert state["engine"]["step_in_stage"] == best[-1]


def test_val_every_and_the_last_epoch(tmp_path):
    config = run_config(
        tmp_path / "run", pretrain={"epochs": 0}, schedule={"epochs": 3, "steps_per_epoch": 1}, val={"every": 2}
    )
    assert with_validation(Trainer(config, dataset=tiny_dataset()), [0.5, 0.25]) == [2]
    assert ["val_robust_acc" in r and r["val_robust_acc"] is not None for r in rows(tmp_path / "run")] == [0, 1, 1]


def test_regular_keeps_the_last_epoch(tmp_path):
    config = run_config(
        tmp_path / "run", method="regular", schedule={"epochs": 3, "steps_per_epoch": 1}, pretrain={"epochs": 0}
    )
    assert with_validation(Trainer(config, dataset=tiny_dataset()), [0.9, 0.5, 0.1]) == [1, 2, 3]
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")["engine"]["step_in_stage"] == 3
    assert checkpoint.read_metadata(tmp_path / "run" / "classifier.safetensors")["facts"]["epoch"] == 3


def test_without_validation_images_the_last_epoch_is_kept(tmp_path):
    run = train(run_config(tmp_path / "run", data={"val_fraction": 0}))
    assert all("val_robust_acc" not in r for r in rows(run.path))
    best = checkpoint.load(run.path / "checkpoints" / "best.pt")
    assert best["engine"]["step_in_stage"] == 6 and best["best"]["epoch"] == 2
    assert equal_state(
        checkpoint.load_classifier(run.path).state_dict(),
        checkpoint.load(run.path / "checkpoints" / "last.pt")["engine"]["networks"]["C_ema"],
    )


@pytest.mark.parametrize(("attack", "loss", "steps"), [("cw-pgd-40", "cw", 40), ("ce-pgd-20", "ce", 20)])
def test_validation_attack(tmp_path, monkeypatch, attack, loss, steps):
    trainer = Trainer(run_config(tmp_path / "run", val={"attack": attack}), dataset=tiny_dataset())
    calls: list[dict] = []
    monkeypatch.setattr(trainer_module, "pgd", lambda model, x, y, **k: calls.append(k | {"n": len(x)}) or x)
    trainer._accuracy(trainer.val, robust=True)
    (call,) = calls
    assert (call["loss"], call["num_steps"], call["n"]) == (loss, steps, 4)
    assert (call["eps"], call["step_size"]) == (8 / 255, 2 / 255)


def test_validation_leaves_training_alone(tmp_path):
    """Fig 5: how often it is validated must not change the training."""
    runs = [
        train(run_config(tmp_path / str(every), val={"every": every}, log={"sample_every": sample}))
        for every, sample in ((1, 1), (5, 0))
    ]
    a, b = ([r["C/loss"] for r in rows(run.path)] for run in runs)
    assert a == b


# -- errors and signals ---------------------------------------------------------------------------------------------


class NoiseWithNaN(Noise):
    """NaN in one draw of z."""

    def __init__(self, at: int) -> None:
        super().__init__(3)
        self.left = at

    def normal(self, name, shape):
        """The draw."""
        draw = super().normal(name, shape)
        if name == "z":
            self.left -= 1
            if self.left == 0:
                draw[0, 0] = float("nan")
        return draw


def test_a_nan_stops_the_run_and_the_good_checkpoint_stays(tmp_path):
    """Draws per step of stage 2: D, G, A, C. The 15th is A's in step 4, the first step of the second epoch."""
    config = run_config(tmp_path / "run", pretrain={"epochs": 0}, log={"interval": 1})
    trainer = Trainer(config, dataset=tiny_dataset(), noise=NoiseWithNaN(15))
    save, saved = trainer._save, []
    trainer._save = lambda name: saved.append(name) or save(name)
    with pytest.raises(NonFiniteError, match="A/loss is not finite in phase A at step 4 of the stage"):
        trainer.fit()
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["engine"]["step_in_stage"] == 3 and saved[-1] == "last" and saved.count("last") == 1
    tensors = [t for net in state["engine"]["networks"].values() for t in net.values()]
    assert all(t.isfinite().all() for t in tensors)
    assert len(rows(tmp_path / "run")) == 1


@pytest.mark.parametrize("interval", [1, 2, 100])
def test_a_nan_is_told_with_its_step_however_seldom_it_is_read(tmp_path, interval):
    config = run_config(tmp_path / "run", pretrain={"epochs": 0}, log={"interval": interval})
    with pytest.raises(NonFiniteError, match=r"D/fake_g .* phase D at step 2 "):
        train(config, noise=NoiseWithNaN(5))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_nan_weights_from_the_start(tmp_path):
    def spoil(nets):
        nets.C.logits.weight.data[0, 0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"C/sup .* phase C at step 1 "):
        train(run_config(tmp_path / "run"), networks=spoil)


def test_a_signal_in_a_bad_step_saves_nothing(tmp_path):
    """The loss is checked before any checkpoint, also the one that a signal asks for."""
    config = run_config(tmp_path / "run", pretrain={"epochs": 0}, log={"interval": 100})
    stop = lambda terms: signal.raise_signal(signal.SIGTERM) if not terms["D/loss"][0].isfinite() else None  # noqa: E731
    with pytest.raises(NonFiniteError):
        train(config, noise=NoiseWithNaN(5), on_step=stop)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_weights_that_are_not_finite_are_never_the_last_good_checkpoint(tmp_path):
    """A finite loss with a gradient that overflows, in the last step of an epoch: last.pt must stay usable."""
    config, steps = run_config(tmp_path / "run", pretrain={"epochs": 0}, schedule={"epochs": 3}), []

    def overflow(terms):
        steps.append(1)
        if len(steps) == 6:
            trainer.nets.C.logits.weight.data[0, 0] = float("inf")

    trainer = Trainer(config, dataset=tiny_dataset(), on_step=overflow)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["engine"]["networks"]["C"]["logits.weight"].isfinite().all()
    assert state["engine"]["step_in_stage"] == 3


def test_images_of_another_precision(tmp_path):
    run = train(run_config(tmp_path / "run", precision="fp64", **SHORT))
    state = checkpoint.load(run.path / "checkpoints" / "last.pt")
    assert state["engine"]["networks"]["C"]["logits.weight"].dtype == torch.float64
    assert checkpoint.load_classifier(run.path).logits.weight.dtype == torch.float32


def test_a_cuda_device_that_is_not_there(tmp_path):
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"device: 'cuda:{count}'"):
        Trainer(Config.from_dict(tiny_config().to_dict() | {"device": f"cuda:{count}", "out": str(tmp_path / "r")}))
