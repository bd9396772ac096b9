"""Files that are either whole or not there: written beside their place, synced, then renamed onto it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file as a whole: `with atomic_write(path) as temp: torch.save(state, temp)`.

    Yields a path in the same folder; what the block wrote there replaces `path` when the block ends. When the block
    raises, or is interrupted, `path` is as before and the temporary file is gone. Behind a link, what it points to is
    replaced. A device or a pipe (/dev/stdout) is written to directly. Raises OSError naming `path`.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        with open(temp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException as error:
        # Where the folder itself is the trouble there is nothing to remove, and the first error is the one to tell.
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # the user knows the file, not the temporary one
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder as a whole: yields a new one beside `path`, which takes its place when the block ends.

    When the block raises, or is interrupted, `path` is as before and the new folder is gone; what stood at `path` is
    replaced with all that it holds. The files in it are the block's to write whole. Raises OSError.
    """
    path = Path(path).resolve()
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def remove_stale(folder: Path) -> None:
    """Remove what a killed process left of `atomic_write` in a folder. Raises OSError."""
    for temp in folder.glob(".*.*.tmp"):
        if temp.suffixes[-2][1:].isdigit():  # .NAME.PID.tmp: the others are not ours
            temp.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as a whole. Raises OSError."""
    with atomic_write(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON as a whole. Raises OSError, TypeError or ValueError (nan, inf) for what JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_yaml(path: str | Path, value: Any) -> None:
    """Write YAML as a whole, keys in the order given. Raises OSError."""
    write_text(path, dump_yaml(value))


def dump_yaml(value: Any) -> str:
    """YAML text of plain dicts, lists and scalars, keys in the order given."""
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=False)


def _sync_folder(folder: Path) -> None:
    # A rename is safe from a power cut only once the folder is synced. Some network file systems refuse that: the
    # file is whole there too, so it is no reason to fail.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
