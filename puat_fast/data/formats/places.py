"""Where a dataset lies: a folder, or a zip archive that is read in place. Nothing is ever extracted."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

from puat_fast.data.formats.base import DataError, reason

Note = Callable[[str, bytes], None]
"""note(path of a file as messages tell it, its content): told of every file that a reader reads."""


class Place(Protocol):
    """A folder or an archive. Names are relative, with / between their parts; "" is the top."""

    path: Path

    def files(self, folder: str = "") -> list[str]:
        """Names of the files right in a folder, sorted; hidden ones (.DS_Store, ._x) are none of ours."""
        ...

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right in a folder, sorted, hidden ones left out."""
        ...

    def read(self, name: str) -> bytes:
        """A file's content. Raises OSError, and DataError where an archive is broken."""
        ...


def open_place(path: Path, note: Note | None = None) -> Place:
    """The folder or zip archive at `path`. Raises DataError."""
    if path.is_dir():
        return Folder(path, note)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    return Zip(path, note)


def escapes(name: str) -> bool:
    """Whether the name of an archive's member leads out of the archive."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name


def refuse_escape(archive: Path, name: str) -> None:
    """Raises DataError for a member that would lie outside of the archive's own folder: no honest archive has one."""
    if escapes(name):
        raise DataError(f"{archive}: refused: its member {name!r} leads out of the archive; get the file anew")


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the dataset's: .DS_Store, ._x, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


class Folder:
    """A folder on disk."""

    def __init__(self, path: Path, note: Note | None = None) -> None:
        self.path, self._note = path, note

    def files(self, folder: str = "") -> list[str]:
        """Names of the files right in a folder, sorted."""
        return self._names(folder, Path.is_file)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right in a folder, sorted."""
        return self._names(folder, Path.is_dir)

    def _names(self, folder: str, kind: Callable[[Path], bool]) -> list[str]:
        here = self.path / folder
        if not here.is_dir():
            return []
        return sorted(entry.name for entry in here.iterdir() if not hidden(entry.name) and kind(entry))

    def read(self, name: str) -> bytes:
        """A file's content. Raises OSError."""
        content = (self.path / name).read_bytes()
        if self._note is not None:
            self._note(str(self.path / name), content)
        return content


class Zip:
    """A zip archive. Raises DataError where it is broken, or names what lies outside of it."""

    def __init__(self, path: Path, note: Note | None = None) -> None:
        self.path, self._note = path, note
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as error:  # a broken one raises anything: BadZipFile, NotImplementedError, struct.error ...
            raise DataError(f"{path}: cannot be read: {reason(error)}; a truncated download? get it anew") from error
        self._tree: dict[str, dict[str, bool]] = {"": {}}  # folder -> name in it -> whether that is a folder
        self._members: dict[str, zipfile.ZipInfo] = {}  # by the name as we spell it: some have ./ in front
        for info in self._zip.infolist():
            refuse_escape(path, info.filename)
            parts = PurePosixPath(info.filename).parts
            if not any(map(hidden, parts)) and not stat.S_ISLNK(info.external_attr >> 16):
                self._add(parts, info.is_dir())
                self._members["/".join(parts)] = info

    def _add(self, parts: tuple[str, ...], is_folder: bool) -> None:
        folder = ""
        for depth, part in enumerate(parts, 1):
            inner = is_folder or depth < len(parts)
            self._tree.setdefault(folder, {})[part] = inner
            folder = f"{folder}/{part}" if folder else part

    def files(self, folder: str = "") -> list[str]:
        """Names of the files right in a folder, sorted."""
        return sorted(name for name, inner in self._tree.get(folder, {}).items() if not inner)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right in a folder, sorted."""
        return sorted(name for name, inner in self._tree.get(folder, {}).items() if inner)

    def read(self, name: str) -> bytes:
        """A file's content, its checksum compared. Raises DataError."""
        if name not in self._members:
            raise DataError(f"{self.path}: {name}: No such file in the archive")
        try:
            content = self._zip.read(self._members[name])
        except Exception as error:
            raise DataError(f"{self.path}: {name} cannot be read: {reason(error)}; get the archive anew") from error
        if self._note is not None:
            self._note(f"{self.path}/{name}", content)
        return content
