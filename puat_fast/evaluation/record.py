"""What is known of an attack on a model, kept in a file, so that an evaluation that was killed goes on where it was.

A record's name holds a key, the sha256 of all that determines the numbers: with other weights, images, seeds or
settings it is another record, so what is found under a key may be taken as it is.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from puat_fast import files

State = dict[str, Any]
"""Of an attack, done or under way: tensors, numbers, texts, None, lists and dicts of them."""

FORMAT = "puat-fast-record-1"
SAVE_SECONDS = 10.0  # at least, between two writes
STALE_SECONDS = 3600.0
WRITING = 0.05  # part of the time that may go to writing


def digest(*parts: Any) -> str:
    """sha256 of modules (structure, weights, buffers), of tensors (dtype, shape, bytes) and of JSON values."""
    sha = hashlib.sha256()
    for part in parts:
        text, tensors = part, dict[str, Tensor]()
        if isinstance(part, nn.Module):  # mean and std are buffers that the state dict leaves out
            text, tensors = repr(part), {**dict(part.named_parameters()), **dict(part.named_buffers())}
        elif isinstance(part, Tensor):
            text, tensors = "tensor", {"": part}
        sha.update(json.dumps(text, sort_keys=True).encode() + b"\n")
        for name, tensor in sorted(tensors.items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Store:
    """The records of a folder, which need not be there yet.

    Args:
        folder: None: nothing is kept
        fresh: take no record that is there, and write over it
        tell: gets a line for each thing that the user should know: a folder that cannot be written, a broken record
    """

    def __init__(
        self, folder: Path | None, fresh: bool = False, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder, self._fresh, self._tell = folder, fresh, tell
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._remove_stale(folder)
            except OSError as error:
                self.give_up(error)

    @staticmethod
    def _remove_stale(folder: Path) -> None:
        for beside in folder.glob(".*.pt.*.tmp"):  # of a process that was killed as it wrote; not of one at work
            if time.time() - beside.stat().st_mtime > STALE_SECONDS:
                beside.unlink(missing_ok=True)

    def give_up(self, error: OSError) -> None:
        """Keep nothing from now on, and say so."""
        self._tell(f"nothing is kept of this evaluation: {error.filename or self.folder}: {error.strerror or error}")
        self.folder = None

    def open(self, attack: str, key: str) -> Record:
        """The record of an attack under a key, with what is there of it."""
        record = Record(self, f"{attack}-{key[:16]}.pt", key)
        if self.folder is not None and not self._fresh:
            self._read(self.folder / record.file, record)
        return record

    def _read(self, path: Path, record: Record) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):
                found = torch.load(path, map_location="cpu", weights_only=True)
            if found["format"] != FORMAT or found["key"] != record.key:
                raise ValueError("of another kind")
            record.state, record.complete, record.measured = found["state"], found["complete"], found["measured"]
        except FileNotFoundError:
            pass
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            self._tell(f"{path}: broken, measured anew ({type(error).__name__})")


class Record:
    """What is known of one attack: `state` (None: nothing), whether it is `complete`, and when it was `measured`."""

    def __init__(self, store: Store, file: str, key: str) -> None:
        self._store, self.file, self.key = store, file, key
        self.state: State | None = None
        self.complete, self.measured = False, ""
        self._written, self._pause = perf_counter(), SAVE_SECONDS

    @property
    def on_disk(self) -> bool:
        """Whether what was to be written was written."""
        return self._store.folder is not None

    def save(self, state: State, complete: bool = False, now: bool = False) -> None:
        """Keep a state: on disk if it is complete, or asked for `now`, or the last write was some time ago."""
        self.state, self.complete = state, complete
        self.measured = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if self._store.folder is not None and (complete or now or perf_counter() - self._written >= self._pause):
            self._write(self._store.folder / self.file)

    def _write(self, path: Path) -> None:
        start = perf_counter()
        content = {"format": FORMAT, "key": self.key, "measured": self.measured, "complete": self.complete}
        try:
            with files.atomic_write(path) as beside:
                torch.save(content | {"state": self.state}, beside)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's words for a full disk
            self._store.give_up(error if isinstance(error, OSError) else OSError(0, "is the disk full?", str(path)))
        self._written = perf_counter()
        self._pause = max(SAVE_SECONDS, (self._written - start) / WRITING)
