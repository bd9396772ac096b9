"""Downloads from a server on this machine, which can misbehave in every way that real ones do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from puat_fast import __version__
from puat_fast.data import download, known
from puat_fast.data.formats.base import DataError

CONTENT = bytes(range(256)) * 1200  # 307200 bytes
NAME = "cifar-10-python.tar.gz"
HALF = len(CONTENT) // 2


class Server(ThreadingHTTPServer):
    """Serves `content` at /file; each request is noted with its Range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True  # False: Range is ignored
        self.status: int | None = None  # answer this to everything
        self.drop_after: list[int] = []  # bytes sent before the connection breaks, one entry for each request
        self.redirect: str | None = None  # /moved leads there
        self.hold: threading.Event | None = None  # waited for halfway
        self.length = True  # False: the size is not announced
        self.pause = 0.0  # seconds between pieces
        self.requests: list[str | None] = []
        self.agents: list[str] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        if self.path == "/moved" and server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        server.requests.append(asked)
        server.agents.append(self.headers["User-Agent"])
        offset = int(asked[len("bytes=") : -1]) if asked and server.ranges else 0
        if server.status is not None or offset >= len(server.content):
            self.send_error(server.status or 416)
            return
        body = server.content[offset:]
        self.send_response(206 if offset else 200)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send_body(body)

    def send_body(self, body: bytes) -> None:
        server = self.server
        end = server.drop_after.pop(0) if server.drop_after else len(body)
        step = max(len(body) // 8, 1)
        for start in range(0, end, step):
            if server.hold is not None and start >= len(body) // 2:
                server.hold.wait(10)
            piece = body[start : min(start + step, end)]
            try:
                self.wfile.write(piece)
            except OSError:  # the client left
                return
            server.sent += len(piece)
            time.sleep(server.pause)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        publish(monkeypatch, server.url)
        yield server
        server.shutdown()


def publish(monkeypatch: pytest.MonkeyPatch, url: str, size: int | None = len(CONTENT)) -> None:
    file = known.KnownFile(NAME, (hashlib.md5(CONTENT).hexdigest(),), size, url)
    monkeypatch.setitem(known.ARCHIVES, "cifar10", (file, known.KnownFile("optional.bin")))


def fails(folder: Path) -> str:
    """The one line of a fetch that must fail."""
    with pytest.raises(DataError) as caught:
        download.fetch("cifar10", folder, lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_whole(folder: Path) -> None:
    assert os.listdir(folder) == [NAME]
    assert (folder / NAME).read_bytes() == CONTENT


def test_fresh_download(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    assert download.fetch("cifar10", tmp_path / "a" / "b", said.append) == [tmp_path / "a" / "b" / NAME]
    assert_whole(tmp_path / "a" / "b")
    assert server.requests == [None] and server.agents == [f"puat-fast/{__version__}"]
    assert said == [f"{NAME}: 0.3 MB, md5 is right"]  # a fast download has no progress to tell


def test_what_is_there_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    said: list[str] = []
    assert download.fetch("cifar10", tmp_path, said.append) == [tmp_path / NAME]
    assert server.requests == [] and said == [f"{NAME}: is there already"]


def test_what_is_there_but_wrong_is_replaced_by_a_whole_file_only(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"other")
    server.status = 404
    fails(tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"other"
    server.status = None
    said: list[str] = []
    download.fetch("cifar10", tmp_path, said.append)
    assert_whole(tmp_path)
    assert hashlib.md5(b"other").hexdigest() in said[0]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_resume_asks_for_the_rest_only(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    publish(monkeypatch, server.url, size)
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests == ["bytes=1000-"] and server.sent == len(CONTENT) - 1000


def test_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests == ["bytes=1000-"]


def test_whole_part_is_taken_as_it_is(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.sent == 0


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(CONTENT), CONTENT + b"x"])
def test_bad_part_is_fetched_anew_once(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(part)
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests == [f"bytes={len(part)}-", None]


@pytest.mark.parametrize("part", [b"", b"x" * 1000])
def test_wrong_content_leaves_nothing(server: Server, tmp_path: Path, part: bytes) -> None:
    server.content = CONTENT[::-1]
    if part:
        (tmp_path / f"{NAME}.part").write_bytes(part)
    message = fails(tmp_path)
    assert os.listdir(tmp_path) == []
    for text in (NAME, hashlib.md5(CONTENT).hexdigest(), hashlib.md5(CONTENT[::-1]).hexdigest()):
        assert text in message
    assert len(server.requests) == (2 if part else 1)


def test_another_size_is_refused_before_anything_is_lost(server: Server, tmp_path: Path) -> None:
    server.content, server.ranges = b"<html>please log in</html>", False
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:HALF])
    assert f"offers 26 bytes, expected {len(CONTENT)}" in fails(tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:HALF]


@pytest.mark.parametrize("length", [True, False])
def test_broken_connection_is_continued(server: Server, tmp_path: Path, length: bool) -> None:
    server.drop_after, server.length = [HALF, 1000], length
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]


def test_broken_connection_ends_after_three_tries_and_can_be_continued(server: Server, tmp_path: Path) -> None:
    server.drop_after = [1000, 1000, 1000]
    message = fails(tmp_path)
    assert len(server.requests) == 3
    assert f"connection broke after 3000 of {len(CONTENT)} bytes" in message and f"{NAME}.part" in message
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests[3] == "bytes=3000-"


def test_silent_server_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    server.hold = threading.Event()
    message = fails(tmp_path)
    server.hold.set()
    assert "timed out" in message and len(server.requests) == 3


def test_progress_is_told_at_intervals(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_SAY_EVERY", 0.1)
    server.pause = 0.05
    said: list[str] = []
    download.fetch("cifar10", tmp_path, said.append)
    assert 2 <= len(said) <= 5  # 8 pieces in 0.4 s: every second or third, and the end
    assert all(re.fullmatch(rf"{NAME}: 0\.\d of 0\.3 MB, \d+\.\d MB/s", line) for line in said[:-1])


def test_redirect(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    server.redirect = server.url
    publish(monkeypatch, server.url.replace("/file", "/moved"))
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests == ["bytes=1000-"]


@pytest.mark.parametrize("scheme", ["file", "ftp"])
def test_redirect_to_another_kind_of_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    (tmp_path / "secret").write_bytes(CONTENT)
    server.redirect = f"{scheme}://{tmp_path}/secret"
    publish(monkeypatch, server.url.replace("/file", "/moved"))
    assert scheme in fails(tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_address_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    publish(monkeypatch, f"{scheme}:///etc/hostname")
    assert f"unknown url type: {scheme}" in fails(tmp_path)


@pytest.mark.parametrize("status", [404, 503])
def test_refusal_by_the_server(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    message = fails(tmp_path)
    for text in (server.url, f"HTTP {status}", NAME, "cifar-10-batches-py", "data_batch_1", str(tmp_path)):
        assert text in message
    assert len(server.requests) == 1 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("dataset", [name for name in known.ARCHIVES if name != "imagenet32"])
def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        name = known.ARCHIVES[dataset][0].name
        monkeypatch.setitem(known.ARCHIVES, dataset, (known.KnownFile(name, ("0" * 32,), 1, url + name),))
        with pytest.raises(DataError) as caught:
            download.fetch(dataset, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{url}{name}: Connection refused; ") and "\n" not in message
    assert f"put {name}" in message and f"into {tmp_path} by hand" in message
    assert os.listdir(tmp_path) == []


def test_two_at_once(server: Server, tmp_path: Path) -> None:
    """This process holds the lock, halfway, while another one comes, waits, and finds the file."""
    server.hold = threading.Event()
    first = threading.Thread(target=download.fetch, args=("cifar10", tmp_path, lambda line: None))
    first.start()
    while not server.sent:
        time.sleep(0.01)
    script = (
        "import sys; from puat_fast.data import download, known\n"
        "file = known.KnownFile(sys.argv[1], (sys.argv[2],), int(sys.argv[3]), sys.argv[4])\n"
        "known.ARCHIVES['cifar10'] = (file,)\n"
        "download.fetch('cifar10', sys.argv[5], lambda line: print(line, flush=True))\n"
    )
    arguments = [NAME, hashlib.md5(CONTENT).hexdigest(), str(len(CONTENT)), server.url, str(tmp_path)]
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout is not None
        waiting = second.stdout.readline()
        server.hold.set()
        rest = second.stdout.read()
    first.join()
    assert waiting == f"{NAME}: another process is fetching it; waiting\n"
    assert rest == f"{NAME}: is there already\n" and second.returncode == 0
    assert_whole(tmp_path)
    assert server.requests == [None]


@pytest.mark.parametrize("ending", ["before the part was opened", "before the lock", "without success"])
def test_another_process_ends_just_before_our_lock(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    part, real, calls = tmp_path / f"{NAME}.part", fcntl.flock, []

    def flock(handle: object, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # what the other process does meanwhile
            if ending == "before the lock":
                part.write_bytes(CONTENT)
                part.rename(tmp_path / NAME)
            elif ending == "without success":
                part.unlink()
            else:
                (tmp_path / NAME).write_bytes(CONTENT)
        real(handle, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests == ([None] if ending == "without success" else [])


def test_full_disk_keeps_what_arrived(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = download._write

    def write(handle: object, data: bytes) -> None:
        if (tmp_path / f"{NAME}.part").stat().st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, data[:1000])  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(download, "_write", write)
        message = fails(tmp_path)
    assert "No space left on device" in message and f"{NAME}.part and is continued" in message
    assert len(server.requests) == 1  # another try would not help
    download.fetch("cifar10", tmp_path, lambda line: None)
    assert_whole(tmp_path)
    assert server.requests[1:] == ["bytes=1000-"]


def test_disk_that_takes_nothing_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(handle: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "_write", write)
    message = fails(tmp_path)
    assert "No space left on device" in message and ".part" not in message
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = fails(tmp_path / "file" / "data")
    assert "Not a directory" in message and str(tmp_path / "file" / "data") in message
    (tmp_path / f"{NAME}.part").mkdir()
    assert "Is a directory" in fails(tmp_path)
    assert server.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_the_right_to_write(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o500)
    assert "Permission denied" in fails(tmp_path / "data")
    assert server.requests == []


def test_folder_in_the_files_place(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert "not a file" in fails(tmp_path)
    assert server.requests == []


def test_reader_that_left_is_no_fault_of_the_disk(server: Server, tmp_path: Path) -> None:
    def say(line: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        download.fetch("cifar10", tmp_path, say)
