"""The run directory, what is written into it while training, and what the user sees meanwhile. Touches no tensor."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from puat_fast import files, info
from puat_fast.config import Config, ConfigError, read_yaml

Value = int | float | str | None
PLAIN_SECONDS = 5.0  # between two progress lines where the output is not a terminal
LIVE_SECONDS = 0.1  # between two refreshes of the live line on a terminal
RATE_STEPS = 100  # the time left comes from the pace of so many steps
TIMING_KEYS = ("seconds", "images_per_s")  # last in every row: all keys before them are reproducible
# What may differ between a run and its continuation: where things are, how often something is written, and what
# changes the speed alone.
FREE_KEYS = ("out", "device", "data_dir", "log", "engine", "fast", "loader")


class RunError(RuntimeError):
    """A run cannot be started or continued: names the path and the cure."""


class ProgressLine:
    """One line of progress: live on a terminal, a plain line every few seconds where the output is piped."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._shown = perf_counter()

    def due(self) -> bool:
        """Whether it is time for `show`; so that the text is made only when it is wanted."""
        return perf_counter() - self._shown >= (LIVE_SECONDS if self._console.is_terminal else PLAIN_SECONDS)

    def show(self, text: str) -> None:
        """Show the line now."""
        self._shown = perf_counter()
        if not self._console.is_terminal:
            self.print(text)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def print(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Take the live line away. May be called twice, and used again after."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class RunLog:
    """A run directory, made or continued; use as a context manager, so that the terminal is left in order.

    Args:
        path: the run directory, parents are made
        config: the resolved configuration; of a run that is continued it must be the same, but for `FREE_KEYS`
        resume: continue the run that is at `path`, if there is one
        console: where progress is shown; None: standard output

    Raises RunError where `path` holds a run and `resume` is false, where it holds a run of another configuration, and
    where it cannot be written.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool, console: Console | None = None) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Value]] = []
        self._line = ProgressLine(console or Console())
        self._events: Any = None
        self._epochs = 0
        self._losses: dict[str, float] = {}
        self._times: deque[float] = deque(maxlen=RATE_STEPS + 1)
        self._left = 0
        self._first: tuple[int, float] | None = None  # images and time of the epoch's first step
        self._begin_epoch()
        try:
            self._open(config, resume)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self, total_steps: int, done_steps: int = 0) -> None:
        """Start the clock: `total_steps` in both stages together, `done_steps` of them in an earlier session."""
        self._left = total_steps - done_steps
        self._begin_epoch()
        self._times.clear()
        self._times.append(self._tick)

    def step(
        self, *, stage: int, epoch: int, epochs: int, step: int, steps: int, images: int,
        losses: Mapping[str, float] | None,
    ) -> None:  # fmt: skip
        """Count a step, and show progress when it is due.

        Args:
            stage, epoch, epochs, step, steps: where training is: stage 1 or 2, epoch of epochs, step of steps in it
            images: training images of this step
            losses: the losses by name ("C/loss"), in a step that read them
        """
        self._tick = perf_counter()
        self._images += images
        if self._first is None:
            self._first = (images, self._tick)
        self._times.append(self._tick)
        self._left -= 1
        self._epochs = epochs
        if losses is not None:
            self._losses = dict(losses)
        if self._line.due():
            where = f"stage {stage}  epoch {epoch}/{epochs}  step {step}/{steps}"
            pace = f"{self.images_per_s:.0f} images/s  {_clock(self._seconds_left())} left"
            self._line.show("  ".join([where, pace, *_short_losses(self._losses)]))

    def epoch(self, row: Mapping[str, Value]) -> None:
        """Add a row to metrics.jsonl and metrics.csv and print it as one line.

        Columns may come and go between rows. The timing keys are added where the row lacks them: "seconds" since
        the end of the epoch before, "images_per_s" over the steps alone.
        """
        timing: dict[str, Value] = {
            "seconds": round(perf_counter() - self._epoch_start, 3),
            "images_per_s": round(self.images_per_s, 1),
        }
        kept = {key: value for key, value in row.items() if key not in TIMING_KEYS}
        self.rows.append(kept | {key: row.get(key, timing[key]) for key in TIMING_KEYS})
        self._write_rows()
        self._write_events(self.rows[-1])
        self._line.print(_epoch_line(self.rows[-1], self._epochs))
        self._begin_epoch()

    def rewind(self, rows: int) -> None:
        """Keep only the first `rows` rows: what came after the checkpoint from which training goes on."""
        self.rows = self.rows[:rows]
        self._write_rows()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self._line.print(text)

    def close(self) -> None:
        """Take the progress line away and end the event file. May be called twice."""
        self._line.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    @property
    def images_per_s(self) -> float:
        """Training images per second over the steps of this epoch, up to now, without validation and writing."""
        # The time before the first step went to files of the epoch before, or to compiling; so that step is left out
        # where there are others.
        images, start = self._first if self._first and self._first[1] < self._tick else (0, self._epoch_start)
        span = self._tick - start
        return (self._images - images) / span if span > 0 else 0.0

    def _begin_epoch(self) -> None:
        self._epoch_start = self._tick = perf_counter()
        self._images = 0
        self._first = None

    def _open(self, config: Config, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file, not a run directory; choose another --out")
        old = holds_run(self.path)
        if old and not resume:
            raise RunError(f"{self.path}: holds a run already; --resume auto continues it, another --out starts afresh")
        self.rows = read_metrics(self.path)
        if old and (self.rows or (self.path / "checkpoints" / "last.pt").exists()):  # else there is nothing to continue
            _refuse_other_config(self.path, config)
        for name in ("checkpoints", "samples", "eval"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.path / "checkpoints", self.path / "samples"):
            files.remove_stale(folder)
        files.write_yaml(self.path / "config.yaml", config.to_dict())
        files.write_json(self.path / "env.json", _environment(self.path / "env.json"))

    def _write_rows(self) -> None:
        # Whole files, every time: a row is some hundred bytes, and a file that is always whole needs no repair.
        # JSON has no nan and no inf: they are null there, and so is what a row does not have in the table.
        rows = [{key: _finite(value) for key, value in row.items()} for row in self.rows]
        files.write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        keys = dict.fromkeys(key for row in rows for key in row if key not in TIMING_KEYS)
        table = io.StringIO()
        writer = csv.DictWriter(table, [*keys, *TIMING_KEYS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.path / "metrics.csv", table.getvalue())

    def _write_events(self, row: Mapping[str, Value]) -> None:
        if self._events is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            # purge_step hides what an interrupted session wrote after the checkpoint.
            self._events = SummaryWriter(str(self.path), purge_step=len(self.rows))
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(key, value, len(self.rows))
        self._events.flush()

    def _seconds_left(self) -> float | None:
        span = self._times[-1] - self._times[0]
        return max(self._left, 0) * span / (len(self._times) - 1) if len(self._times) > 1 else None


class MutedRunLog(RunLog):
    """What the processes of a run have beside the one with the RunLog: it counts, but writes and shows nothing."""

    def __init__(self, path: Path, config: Config) -> None:
        super().__init__(path, config, resume=True, console=Console(quiet=True, force_terminal=False))

    def _open(self, config: Config, resume: bool) -> None:
        pass

    def _write_rows(self) -> None:
        pass

    def _write_events(self, row: Mapping[str, Value]) -> None:
        pass


def holds_run(path: Path) -> bool:
    """Whether a directory holds a run."""
    return (path / "config.yaml").exists() or (path / "checkpoints").exists()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one per epoch; none where it is not there. Raises RunError when broken."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RunError(f"{path}: not a file of JSON lines: {error}") from error


def _refuse_other_config(path: Path, config: Config) -> None:
    if not (path / "config.yaml").exists():
        return
    try:
        before = _flat(read_yaml(path / "config.yaml"))
    except ConfigError as error:
        raise RunError(f"{error}; the run cannot be continued, choose another --out") from error
    now = _flat(config.to_dict())
    keys = [key for key in before | now if key.split(".")[0] not in FREE_KEYS]
    other = [f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
    if other:
        cure = "resume with the options it was started with, or choose another --out"
        raise RunError(f"{path}: holds a run of another configuration: {'; '.join(other)}; {cure}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _environment(path: Path) -> dict[str, Any]:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:  # a record, not worth refusing a run for
        earlier = {}
    sessions = [*earlier.pop("earlier", []), earlier] if earlier else []  # a continued run tells all its environments
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": now, "command": sys.argv, "git": _git_sha(), **info.collect(), "earlier": sessions}


def _git_sha() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: the repository around site-packages, if any, is not ours
        return None
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # the sha is read beside whatever git the user runs
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _short_losses(losses: Mapping[str, Value]) -> list[str]:
    named = {key.removesuffix("/loss"): value for key, value in losses.items() if key.endswith("/loss")}
    return [f"{key} {value:.3f}" for key, value in named.items() if isinstance(value, (int, float))]


def _epoch_line(row: Mapping[str, Value], epochs: int) -> str:
    of = f"/{epochs}" if epochs else ""
    parts = [f"stage {row.get('stage', '?')}  epoch {row.get('epoch', '?')}{of}", *_short_losses(row)]
    for key in ("val_clean_acc", "val_robust_acc", "test_clean_acc"):
        value, label = row.get(key), key.removesuffix("_acc").replace("_", " ")
        if isinstance(value, (int, float)):
            parts.append(f"{label} {100 * value:.2f} %")
    if row.get("best"):
        parts.append("best")
    parts += [f"{row['images_per_s']:.0f} images/s", f"{row['seconds']:.1f} s"]
    return "  ".join(parts)
