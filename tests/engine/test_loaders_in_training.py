"""Runs with each loader: the same losses, one told in the first line, one after another in a resumed run."""

from __future__ import annotations

import json
import multiprocessing
import threading

import pytest
from loader_cases import KINDS
from tiny_cases import run_config, tiny_dataset

from puat_fast.engine import distributed
from puat_fast.engine.trainer import Loader, Trainer
from puat_fast.networks import build_classifier
from puat_fast.noise import Noise

pytestmark = pytest.mark.usefixtures("quick")
AUGMENT = {"where": "loader", "rotate_deg": 0}


def rows(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s")} for row in found]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Rows of a run with the resident loader."""
    patch = pytest.MonkeyPatch()
    from tiny_cases import quicken

    quicken(patch)
    path = tmp_path_factory.mktemp("straight") / "run"
    Trainer(run_config(path, augment=AUGMENT, loader="resident"), dataset=tiny_dataset()).fit()
    patch.undo()
    return rows(path)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_each_loader_gives_the_same_losses(kind, straight, tmp_path, capsys):
    trainer = Trainer(run_config(tmp_path, augment=AUGMENT, loader=kind), dataset=tiny_dataset(), resume="auto")
    trainer.fit()
    assert rows(tmp_path) == straight
    assert capsys.readouterr().out.splitlines()[0].endswith(f"; loader: {kind}")
    assert not multiprocessing.active_children()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("puat-fast")]


@pytest.mark.parametrize(("first", "second"), [("stream", "resident"), ("torch", "dali"), ("dali", "stream")])
def test_a_run_goes_on_with_another_loader(first, second, straight, tmp_path):
    steps = []

    def fail(terms):
        steps.append(terms)
        if len(steps) == 8:
            raise RuntimeError("power cut")

    data, options = tiny_dataset(), {"augment": AUGMENT}
    with pytest.raises(RuntimeError, match="power cut"):
        Trainer(run_config(tmp_path, loader=first, **options), dataset=data, on_step=fail, resume="auto").fit()
    assert not multiprocessing.active_children()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("puat-fast")]
    Trainer(run_config(tmp_path, loader=second, **options), dataset=data, resume="auto").fit()
    assert rows(tmp_path) == straight


def test_who_augments(tmp_path, monkeypatch):
    for where in ("classifier", "loader"):
        config = run_config(tmp_path / where, augment={"where": where})
        assert (build_classifier(config, 2, Noise(0)).augment is None) == (where == "loader")
        trainer = Trainer(config, dataset=tiny_dataset())
        assert (trainer.nets.C_ema.augment is None) == (where == "loader")
        assert (trainer.loader.augmentation is None) == (where == "classifier")
    seeds = set()
    for trainer.engine.stage in (1, 2):
        seeds.add(trainer._make_loader().augmentation.seed)
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # each process draws for its own part
    seeds.add(trainer._augmentation(2).seed)
    assert len(seeds) == 3
    assert (
        Trainer(
            run_config(tmp_path / "none", augment={"where": "loader", "crop_pad": 0, "flip": False}),
            dataset=tiny_dataset(),
        ).loader.augmentation
        is None
    )


def test_loader_is_still_a_name_of_the_trainer():
    from puat_fast.data.loaders.base import Loader as base

    assert Loader is base
