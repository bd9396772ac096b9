"""Resuming = never having stopped: signals, crashes, every place of both stages, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_cases import equal_state, run_config, tiny_dataset

from puat_fast import checkpoint
from puat_fast.engine.trainer import Trainer
from puat_fast.runlog import RunError, read_metrics

PRESETS = ["paper", "official-v1"]
TIMING = ("seconds", "images_per_s")


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: Any, quick: None) -> dict[str, Path]:
    """One whole run per preset."""
    folder = tmp_path_factory.mktemp("whole")
    return {p: Trainer(run_config(folder / p, p), dataset=tiny_dataset()).fit().path for p in PRESETS}


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(path)]


def assert_same_run(path: Path, whole: Path) -> None:
    assert rows(path) == rows(whole)
    for name in ("last", "best"):
        a, b = (checkpoint.load(p / "checkpoints" / f"{name}.pt") for p in (path, whole))
        assert equal_state(a, b), name
    classifiers = [checkpoint.load_classifier(p).state_dict() for p in (path, whole)]
    assert equal_state(*classifiers)


def stop_at(step: int, how: signal.Signals | type[Exception]):
    """An on_step that stops the run in its step-th step, counted over both stages."""
    done = []

    def on_step(terms: Any) -> None:
        done.append(1)
        if len(done) == step:
            if isinstance(how, signal.Signals):
                signal.raise_signal(how)
            else:
                raise how

    return on_step


PLACES = {1: "stage 1 first step", 3: "stage 1 epoch end", 5: "stage 1 mid-epoch", 6: "stage 1 end",
          7: "stage 2 first step", 9: "stage 2 epoch end", 11: "stage 2 mid-epoch", 12: "last step"}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "step"),
    [
        pytest.param(preset, step, id=f"{preset}-{place.replace(' ', '-')}")
        for preset, steps in (("paper", PLACES), ("official-v1", (3, 5, 6, 11)))
        for step, place in PLACES.items()
        if step in steps
    ],
)
def test_stopped_by_a_signal_and_resumed(tmp_path, uninterrupted, preset, step):
    config = run_config(tmp_path / "run", preset)
    how = signal.SIGTERM if step % 2 else signal.SIGINT
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"stopped by {how.name}, saved"):
        Trainer(config, dataset=tiny_dataset(), on_step=stop_at(step, how)).fit()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["engine"]
    assert (saved["stage"], saved["step_in_stage"]) == ((1, step) if step <= 6 else (2, step - 6))
    Trainer(config, resume="auto", dataset=tiny_dataset()).fit()
    assert_same_run(tmp_path / "run", uninterrupted[preset])


@pytest.mark.parametrize("step", [2, 5, 11])
def test_killed_without_a_word_and_resumed(tmp_path, uninterrupted, step):
    """From the last epoch's checkpoint, or from the start."""

    class KilledError(Exception):
        pass

    config = run_config(tmp_path / "run")
    with pytest.raises(KilledError):
        Trainer(config, dataset=tiny_dataset(), on_step=stop_at(step, KilledError)).fit()
    Trainer(config, resume="auto", dataset=tiny_dataset()).fit()
    assert_same_run(tmp_path / "run", uninterrupted["paper"])


@pytest.mark.parametrize("during", ["_save_classifier", "_save_samples"])
def test_killed_at_the_end_of_an_epoch_and_resumed(tmp_path, uninterrupted, monkeypatch, during):
    """Between the metrics row and the checkpoint: the row must not stand twice."""

    class KilledError(Exception):
        pass

    config, calls = run_config(tmp_path / "run", log={"sample_every": 1}), []
    trainer = Trainer(config, dataset=tiny_dataset())
    original = getattr(trainer, during)

    def killed(*a: Any) -> None:
        calls.append(1)
        if trainer.engine.stage == 2:
            raise KilledError
        original(*a)

    setattr(trainer, during, killed)
    with pytest.raises(KilledError):
        trainer.fit()
    Trainer(config, resume="auto", dataset=tiny_dataset()).fit()
    assert_same_run(tmp_path / "run", uninterrupted["paper"])


def test_rare_checkpoints(tmp_path, uninterrupted):
    """checkpoint_every > 1: rows after the checkpoint are taken back and written again."""

    class KilledError(Exception):
        pass

    config = run_config(tmp_path / "run", log={"checkpoint_every": 2})
    with pytest.raises(KilledError):
        Trainer(config, dataset=tiny_dataset(), on_step=stop_at(11, KilledError)).fit()
    assert len(rows(tmp_path / "run")) == 3
    resumed = Trainer(config, resume="auto", dataset=tiny_dataset())
    resumed.fit()
    assert_same_run(tmp_path / "run", uninterrupted["paper"])


def test_stopped_again_and_again(tmp_path, uninterrupted):
    config, sessions = run_config(tmp_path / "run", "official-v1"), 0
    while True:
        sessions += 1
        try:
            Trainer(config, resume="auto", dataset=tiny_dataset(), on_step=stop_at(3, signal.SIGTERM)).fit()
            break
        except KeyboardInterrupt:
            continue
    assert sessions == 5
    assert_same_run(tmp_path / "run", uninterrupted["official-v1"])


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = run_config(tmp_path / "run")
    run = Trainer(config, dataset=tiny_dataset()).fit()
    before = rows(run.path)

    def on_step(terms: Any) -> None:
        raise AssertionError("a step was made")

    again = Trainer(config, resume="auto", dataset=tiny_dataset(), on_step=on_step).fit()
    assert again.summary == run.summary and rows(run.path) == before


def test_resume_auto_of_nothing_starts(tmp_path):
    assert Trainer(run_config(tmp_path / "run"), resume="auto", dataset=tiny_dataset()).fit().summary


def test_other_options_are_refused(tmp_path):
    config = run_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, dataset=tiny_dataset(), on_step=stop_at(1, signal.SIGINT)).fit()
    with pytest.raises(RunError, match=r"loss\.gamma was 0\.03, is 0\.5"):
        Trainer(run_config(tmp_path / "run", loss={"gamma": 0.5}), resume="auto", dataset=tiny_dataset())


def test_other_data_are_refused(tmp_path):
    config = run_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, dataset=tiny_dataset(), on_step=stop_at(1, signal.SIGINT)).fit()
    with pytest.raises(RunError, match="other data: sampler state: its labelled, unlabelled and batch sizes"):
        Trainer(config, resume="auto", dataset=tiny_dataset(train=60)).fit()


def test_a_broken_checkpoint_is_told_and_left(tmp_path):
    config = run_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, dataset=tiny_dataset(), on_step=stop_at(1, signal.SIGINT)).fit()
    file = tmp_path / "run" / "checkpoints" / "last.pt"
    os.truncate(file, file.stat().st_size // 2)
    broken = file.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt: broken, or not a checkpoint"):
        Trainer(config, resume="auto", dataset=tiny_dataset()).fit()
    assert file.read_bytes() == broken


def test_rows_without_a_checkpoint_are_not_overwritten(tmp_path):
    """A finished run whose last.pt is gone must not be trained again from step 0, over its own metrics."""
    config = run_config(tmp_path / "run")
    Trainer(config, dataset=tiny_dataset()).fit()
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"last\.pt: is missing"):
        Trainer(config, "auto", dataset=tiny_dataset()).fit()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_configuration_is_told(tmp_path):
    Trainer(run_config(tmp_path / "a"), dataset=tiny_dataset()).fit()
    Trainer(run_config(tmp_path / "b", gan={"width": 16}), dataset=tiny_dataset()).fit()
    shutil.copy(tmp_path / "b" / "checkpoints" / "last.pt", tmp_path / "a" / "checkpoints" / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt: of another configuration"):
        Trainer(run_config(tmp_path / "a"), "auto", dataset=tiny_dataset()).fit()
