import csv
import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from puat_fast import runlog
from puat_fast.config import Config
from puat_fast.runlog import RunError, RunLog, holds_run, read_metrics


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError


def piped() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def config(**overrides: Any) -> Config:
    return Config.preset("paper", **overrides)


def start(path: Path, *, resume: bool = False, console: Console | None = None, **overrides: Any) -> RunLog:
    return RunLog(path, config(**overrides), resume=resume, console=console or piped())


def step(log: RunLog, number: int = 1, losses: dict[str, float] | None = None) -> None:
    log.step(stage=2, epoch=3, epochs=100, step=number, steps=98, images=256, losses=losses)


def test_directory_is_made_with_config_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with start(path, seed=5):
        pass
    assert sorted(os.listdir(path)) == ["checkpoints", "config.yaml", "env.json", "eval", "samples"]
    assert Config.load(path / "config.yaml") == config(seed=5)
    env = json.loads((path / "env.json").read_text())
    assert env["command"] == sys.argv
    assert {"started", "git", "version", "python", "torch", "numpy", "platform", "cpu", "native"} <= set(env)


@pytest.mark.parametrize("what", ["config.yaml", "checkpoints"])
def test_existing_run_is_not_overwritten(tmp_path: Path, what: str) -> None:
    (tmp_path / what).mkdir() if what == "checkpoints" else (tmp_path / what).write_text("seed: 7\n")
    assert holds_run(tmp_path)
    with pytest.raises(RunError, match=r"holds a run already; --resume auto .* another --out") as caught:
        start(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == [what]


def test_folder_without_a_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    start(tmp_path).close()
    assert holds_run(tmp_path)


def test_resume_where_there_is_no_run_starts_one(tmp_path: Path) -> None:
    assert start(tmp_path / "run", resume=True).rows == []


def started(path: Path, **options: Any) -> None:
    """A run of one epoch: there is something to continue."""
    log = start(path, **options)
    log.epoch({"stage": 1, "epoch": 1})
    log.close()


def test_a_run_that_came_to_nothing_may_be_resumed_with_other_options(tmp_path: Path) -> None:
    start(tmp_path, loss={"gamma": 0.5}).close()
    start(tmp_path, resume=True, loss={"gamma": 0.1}).close()
    assert Config.load(tmp_path / "config.yaml").loss.gamma == 0.1


def test_resume_lists_the_options_that_differ(tmp_path: Path) -> None:
    started(tmp_path, loss={"gamma": 0.5})
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RunError) as caught:
        start(tmp_path, resume=True, seed=9)
    assert "seed was 1, is 9; loss.gamma was 0.5, is 0.03" in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_resume_may_change_where_things_are_and_how_often_is_logged(tmp_path: Path) -> None:
    start(tmp_path).close()
    start(tmp_path, resume=True, out="elsewhere", device="cpu", data_dir="/data", log={"interval": 3}).close()
    assert Config.load(tmp_path / "config.yaml").log.interval == 3


def test_resume_of_a_run_of_another_version_names_the_options(tmp_path: Path) -> None:
    started(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("seed: 1\n", "") + "old_option: 3\n")
    with pytest.raises(RunError, match=r"old_option was 3, is None; seed was None, is 1"):
        start(tmp_path, resume=True)
    (tmp_path / "config.yaml").write_text("[broken")
    with pytest.raises(RunError, match=r"config.yaml: not valid YAML"):
        start(tmp_path, resume=True)


def test_environment_keeps_the_earlier_sessions(tmp_path: Path) -> None:
    for _ in range(3):
        start(tmp_path, resume=True).close()
    env = json.loads((tmp_path / "env.json").read_text())
    assert len(env["earlier"]) == 2
    assert not any("earlier" in session for session in env["earlier"])


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    start(tmp_path).close()
    (tmp_path / "checkpoints" / ".last.pt.1.tmp").touch()
    start(tmp_path, resume=True).close()
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"cannot be written|is a file") as caught:
        start(tmp_path / place)
    assert place in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_rows_with_growing_columns(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        log.epoch({"stage": 1, "epoch": 1, "images_per_s": 7, "C/loss": 2.0})
        log.epoch({"stage": 2, "epoch": 1, "A/loss": float("nan"), "C/loss": 1.0, "best": None})
    rows = read_metrics(tmp_path)
    assert [list(row) for row in rows] == [
        ["stage", "epoch", "C/loss", "seconds", "images_per_s"],
        ["stage", "epoch", "A/loss", "C/loss", "best", "seconds", "images_per_s"],
    ]
    assert (rows[0]["images_per_s"], rows[1]["A/loss"], rows[1]["C/loss"]) == (7, None, 1.0)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["stage", "epoch", "C/loss", "A/loss", "best", "seconds", "images_per_s"]
    assert (table[0]["A/loss"], table[0]["C/loss"], table[1]["C/loss"]) == ("", "2.0", "1.0")


def test_resume_goes_on_after_the_rows_of_the_checkpoint(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        for epoch in (1, 2, 3):
            log.epoch({"epoch": epoch})
    with start(tmp_path, resume=True) as log:
        assert [row["epoch"] for row in log.rows] == [1, 2, 3]
        log.rewind(2)
        assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 2]
        log.epoch({"epoch": 30})
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 2, 30]
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "30"]


def test_metrics_of_no_run_and_broken_ones(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


class Clock:
    """perf_counter that stands still until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(runlog, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_piped_progress_is_a_plain_line_every_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), piped()
    with start(tmp_path, console=console) as log:
        log.start(total_steps=1010, done_steps=1000)
        step(log, 1, {"C/loss": 1.25, "C/sup": 9.0, "G/loss": -0.5})
        for number in range(2, 7):
            clock.sleep(1)
            step(log, number)
    text = shown(console)
    assert text == (
        "stage 2  epoch 3/100  step 6/98  256 images/s  0:00:03 left  C 1.250  G -0.500\n"
    )  # 6 steps in 5 s: 0.83 s each, 4 are left; on one line, though wider than the console
    assert "\x1b" not in text


def test_time_left_follows_the_recent_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), piped()
    with start(tmp_path, console=console) as log:
        log.start(total_steps=300)
        for number in range(200):
            clock.sleep(1 if number < 100 else 6)
            step(log, number)
    assert "0:10:00 left" in shown(console).splitlines()[-1]


def test_epoch_line_and_rates_without_validation_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), piped()
    with start(tmp_path, console=console) as log:
        log.start(total_steps=4)
        for _ in range(2):
            clock.sleep(0.5)
            step(log)
        clock.sleep(3)  # validation
        assert log.images_per_s == 512
        log.epoch({"stage": 2, "epoch": 3, "C/loss": 1.5, "val_robust_acc": 0.4321, "best": 1})
        log.message("saved")
        expected = "stage 2  epoch 3/100  C 1.500  val robust 43.21 %  best  512 images/s  4.0 s\nsaved\n"
        assert shown(console) == expected
        clock.sleep(1)  # checkpoint and pictures
        step(log)
        assert log.images_per_s == 256  # the only step there is
        clock.sleep(0.5)
        step(log)
        assert log.images_per_s == 512
    assert log.rows[0]["seconds"] == 4.0 and log.rows[0]["images_per_s"] == 512


def test_live_line_on_a_terminal_leaves_the_terminal_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, legacy_windows=False, _environ={})
    with pytest.raises(KeyboardInterrupt), start(tmp_path, console=console) as log:
        log.start(total_steps=10)
        clock.sleep(1)
        step(log, 1, {"C/loss": 1.25})
        assert "\x1b[?25l" in shown(console)  # the cursor is hidden
        assert "stage 2  epoch 3/100  step 1/98" in shown(console)
        log.message("[not] markup")
        raise KeyboardInterrupt
    assert shown(console).count("\x1b[?25l") == shown(console).count("\x1b[?25h") == 1
    assert "[not] markup" in shown(console)


def test_tensorboard_scalars_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, path: str, purge_step: int) -> None:
            calls.append(("open", path, purge_step))

        def add_scalar(self, key: str, value: float, number: int) -> None:
            calls.append((key, value, number))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            calls.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with start(tmp_path) as log:
        log.epoch({"epoch": 1})
        log.epoch({"epoch": 2, "name": "text", "lr": None})
    assert [call for call in calls if call[0] in ("open", "epoch", "name", "lr", "close")] == [
        ("open", str(tmp_path), 1), ("epoch", 1, 1), ("epoch", 2, 2), ("close",),
    ]  # fmt: skip
