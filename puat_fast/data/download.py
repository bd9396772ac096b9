"""Fetch a dataset's archives from where their authors keep them. Nothing else in this package opens a connection.

A file is fetched into NAME.part, continued there after an interruption, and takes its name once size and MD5 are right.
Whoever writes NAME.part holds a lock on it, so that of several processes one fetches and the others wait for its file.
"""

from __future__ import annotations

import fcntl
import http.client
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from puat_fast import __version__
from puat_fast.data.formats.base import DataError
from puat_fast.data.known import ARCHIVES, KnownFile, md5_of

_TIMEOUT = 30.0  # seconds without an answer
_WAITS = (1.0, 3.0)  # seconds before the second and the third try, where the connection breaks
_SAY_EVERY = 3.0  # seconds
_CHUNK = 1 << 20  # bytes
_MB = 1e6

# What a reader takes, to tell those who have to fetch it themselves.
_EXPECTED = {
    "cifar10": "cifar-10-python.tar.gz, or the folder cifar-10-batches-py with data_batch_1 to data_batch_5 and "
    "test_batch,",
    "cifar100": "cifar-100-python.tar.gz, or the folder cifar-100-python with train and test,",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "tiny-imagenet": "tiny-imagenet-200.zip, or the folder tiny-imagenet-200, or train.npz and val.npz,",
    "imagenet32": "Imagenet32_train.zip and Imagenet32_val.zip (or Imagenet32_train_npz.zip and "
    "Imagenet32_val_npz.zip), or train_data_batch_1 to train_data_batch_10 and val_data out of them,",
}


class _NetworkError(Exception):
    """What went wrong with a connection, and whether another try may help."""

    def __init__(self, reason: str, passing: bool) -> None:
        super().__init__(reason)
        self.passing = passing


def fetch(dataset: str, data_dir: str | Path, say: Callable[[str], None] = print) -> list[Path]:
    """Download the archives of a dataset into `data_dir` (made where it is missing) and return their paths.

    A file that is there with the right MD5 is left alone; one with another MD5 is replaced, once the download is
    whole. What an interrupted download left in NAME.part is continued. `say` gets what happens, line by line. Raises
    DataError where a dataset cannot be downloaded, the server cannot be reached or sends something else, or the disk
    refuses; it names the files and the folder to put them in by hand.
    """
    folder = Path(data_dir).expanduser()
    if dataset == "digits":
        raise DataError("digits: comes with the package, there is nothing to download")
    if dataset not in ARCHIVES:
        raise DataError(f"dataset: {dataset!r} is not one of {', '.join(ARCHIVES)}")
    by_hand = f"put {_EXPECTED[dataset]} into {folder} by hand"
    files = [file for file in ARCHIVES[dataset] if file.url is not None]
    if not files:
        raise DataError(f"{dataset}: needs an account at image-net.org: log in there, and {by_hand}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made a folder: {error.strerror}; {by_hand}") from error
    return [_fetch_file(file, folder / file.name, by_hand, say) for file in files]


def _fetch_file(file: KnownFile, target: Path, by_hand: str, say: Callable[[str], None]) -> Path:
    part = target.with_name(f"{target.name}.part")
    try:
        while not (_is_there(file, target, say) or _fetch_locked(file, target, part, say)):
            pass  # another process had the lock: see what it left
    except _NetworkError as error:
        raise DataError(f"{file.url}: {error}; try again later, or {by_hand}{_kept(part)}") from error
    except BrokenPipeError:  # of `say`: who read it has left
        raise
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or error}; or {by_hand}{_kept(part)}") from error
    return target


def _kept(part: Path) -> str:
    return f"; what has arrived stays in {part} and is continued next time" if part.is_file() else ""


def _is_there(file: KnownFile, target: Path, say: Callable[[str], None]) -> bool:
    if not target.exists():
        return False
    if not target.is_file():  # known only after the download otherwise
        raise DataError(f"{target}: not a file; expected {file.name} or nothing in this place")
    fault = _fault(file, target)
    say(f"{file.name}: is there already" + (f", but is {fault}: fetched anew" if fault else ""))
    return fault is None


def _fault(file: KnownFile, path: Path) -> str | None:
    """What is wrong with a file, or None."""
    size, digest = path.stat().st_size, md5_of(path)
    if digest in file.md5 and file.size in (None, size):
        return None
    expected = "" if file.size is None else f"{file.size} bytes with "
    return f"{size} bytes with md5 {digest}, expected {expected}md5 {' or '.join(file.md5)}"


def _fetch_locked(file: KnownFile, target: Path, part: Path, say: Callable[[str], None]) -> bool:
    """Fetch a file into `part` and rename it; False where another process came first, with or without success."""
    with open(part, "ab", buffering=0) as handle:
        _lock(handle, file, say)
        # The lock is on what was opened. Whoever held it before may have renamed or removed that.
        if not part.exists() or not os.path.samestat(os.fstat(handle.fileno()), part.stat()):
            return False
        try:
            if target.exists() and _fault(file, target) is None:  # finished between our look and our lock
                return False
            _fill(file, handle, part, say)
            os.fsync(handle.fileno())
            os.replace(part, target)
        finally:
            if not _size(handle):
                part.unlink(missing_ok=True)
    say(f"{file.name}: {target.stat().st_size / _MB:.1f} MB, md5 is right")
    return True


def _lock(handle: io.FileIO, file: KnownFile, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"{file.name}: another process is fetching it; waiting")
        fcntl.flock(handle, fcntl.LOCK_EX)


def _size(handle: io.FileIO) -> int:
    return os.fstat(handle.fileno()).st_size


def _fill(file: KnownFile, handle: io.FileIO, part: Path, say: Callable[[str], None]) -> None:
    """Download until `part` is right. What an earlier run left may have gone bad: then once more, from nothing."""
    continued = _size(handle) > 0
    _Transfer(file, handle, say).run()
    fault = _fault(file, part)
    if fault and continued:
        say(f"{file.name}: {fault}; starting anew")
        handle.truncate(0)
        _Transfer(file, handle, say).run()
        fault = _fault(file, part)
    if fault:
        part.unlink()
        raise DataError(f"{file.name}: {file.url} sent {fault}")


@dataclass
class _Transfer:
    """A file on its way from its address to the end of an open, locked file."""

    file: KnownFile
    handle: io.FileIO
    say: Callable[[str], None]
    begun: bool = False  # the server has answered once

    def run(self) -> None:
        """Receive what is missing; continue where the connection breaks. Raises _NetworkError, OSError of the disk."""
        for wait in (*_WAITS, None):
            try:
                return self._try()
            except _NetworkError as error:
                if wait is None or not error.passing:
                    raise
                self.say(f"{self.file.name}: {error}; trying again in {wait:g} s")
                time.sleep(wait)

    def _try(self) -> None:
        offset = _size(self.handle)
        response = self._open(offset)
        if response is None:
            return
        with response:
            announced = response.length
            if response.status != 206:  # the whole file, asked for or not
                if announced is not None and self.file.size not in (None, announced):
                    reason = f"offers {announced} bytes, expected {self.file.size}"  # a login page, a moved file
                    raise _NetworkError(reason, passing=False)
                self.handle.truncate(0)
                offset = 0
            total = self.file.size
            if total is None and announced is not None:
                total = offset + announced
            self._receive(response, offset, total)

    def _open(self, offset: int) -> http.client.HTTPResponse | None:
        """The answer to a request for what follows `offset`; None where nothing follows."""
        headers = {"User-Agent": f"puat-fast/{__version__}"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            response: http.client.HTTPResponse = _opener().open(
                urllib.request.Request(self.file.url or "", headers=headers), timeout=_TIMEOUT
            )
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and offset:
                return None
            raise _NetworkError(f"HTTP {error.code} {error.reason}", passing=False) from error
        except (OSError, http.client.HTTPException) as error:
            raise _NetworkError(_reason(error), passing=self.begun) from error
        self.begun = True
        return response

    def _receive(self, response: http.client.HTTPResponse, offset: int, total: int | None) -> None:
        start = said = time.monotonic()
        done = offset
        # Up to `total`, not to the end of the stream: some servers leave the connection open.
        while total is None or done < total:
            try:
                chunk = response.read1(_CHUNK)  # read1: what has arrived is written, also if the next read fails
            except (OSError, http.client.HTTPException) as error:
                raise _NetworkError(f"{_reason(error)} after {done} bytes", passing=True) from error
            if not chunk:
                break
            _write(self.handle, chunk)
            done += len(chunk)
            now = time.monotonic()
            if now - said >= _SAY_EVERY:
                said = now
                of = "" if total is None else f" of {total / _MB:.1f}"
                speed = (done - offset) / _MB / max(now - start, 1e-9)
                self.say(f"{self.file.name}: {done / _MB:.1f}{of} MB, {speed:.1f} MB/s")
        if total is not None and done < total:
            raise _NetworkError(f"connection broke after {done} of {total} bytes", passing=True)


def _write(handle: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:  # unbuffered: a full disk takes a part, and refuses the rest
        view = view[handle.write(view) :]


def _opener() -> urllib.request.OpenerDirector:
    """http and https, also where redirected to, and the proxies of the environment. No file:, ftp: or data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return " ".join(text.split())
