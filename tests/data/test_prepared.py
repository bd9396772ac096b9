"""What `puat-fast data prepare` writes, and what is taken of it: whole, mapped, and never a mixture of two."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import error_of, put

from puat_fast.data import Dataset, ImageSet, load_dataset
from puat_fast.data.formats import prepared, read_dataset

FILTER = {"classes": "paper", "resize": "none"}
LAYOUTS = {
    "svhn": layouts.svhn_files(),
    "tiny-imagenet": layouts.under("tiny-imagenet-200", layouts.tiny_files()),
    "imagenet32": layouts.imagenet32_files(),
    "folder": layouts.tree_files(("a", "b")),
    "cifar10": layouts.tree_files(map(str, range(10)), counts=(1, 1)),
    "cifar100": layouts.tree_files(map(str, range(100)), counts=(1, 1)),
}


def prepare(name: str, source: Path, out: Path, classes: str = "paper") -> Path:
    """As the verb does it."""
    sources: list[prepared.Source] = []

    def note(path: str, content: bytes) -> None:
        sources.append(prepared.Source(path, len(content), hashlib.sha256(content).hexdigest()))

    return prepared.write(read_dataset(name, source, classes, note), out, classes, FILTER, sources)


def same(a: Dataset, b: Dataset) -> None:
    assert (a.name, a.class_names) == (b.name, b.class_names)
    for part in ("train", "test"):
        for field in ("images", "labels"):
            np.testing.assert_array_equal(getattr(getattr(a, part), field), getattr(getattr(b, part), field))


def npy_of(file: Path) -> Path:
    return file.parent / json.loads(file.read_text())["images"]


@pytest.fixture
def svhn(tmp_path):
    """tmp_path / "raw": the files of SVHN; out: a prepared copy."""
    put(tmp_path / "raw", layouts.svhn_files())
    return prepare("svhn", tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip(tmp_path, name):
    put(tmp_path / "raw", LAYOUTS[name])
    file = prepare(name, tmp_path / "raw", tmp_path / "out")
    dataset = load_dataset(name, tmp_path / "out")
    same(dataset, read_dataset(name, tmp_path / "raw"))
    assert dataset.source == str(file) and file.name == f"puat-{name}.json"
    prepared.check(file)
    assert sorted(os.listdir(tmp_path / "out")) == sorted([file.name, npy_of(file).name])


@pytest.mark.parametrize("name, classes", [("imagenet32", "paper"), ("svhn", "all")])
def test_parts_of_any_size_give_the_same_file(tmp_path, monkeypatch, name, classes):
    put(tmp_path / "raw", LAYOUTS[name])
    whole = npy_of(prepare(name, tmp_path / "raw", tmp_path / "a", classes))
    monkeypatch.setattr(prepared, "_ROWS", 7)
    parts = npy_of(prepare(name, tmp_path / "raw", tmp_path / "b", classes))
    assert whole.name == parts.name and whole.read_bytes() == parts.read_bytes()
    assert np.load(parts).flags.c_contiguous


def test_images_are_mapped_and_the_file_is_never_changed(svhn):
    before = npy_of(svhn).read_bytes()
    dataset = load_dataset("svhn", svhn.parent)
    for data in (dataset.train, dataset.test):
        assert isinstance(data.images, np.memmap) and data.images.flags.writeable
        data.images[:] = 7
    assert (dataset.train.images == 7).all()
    del dataset, data
    assert npy_of(svhn).read_bytes() == before


def test_json_tells_where_it_comes_from(svhn, tmp_path):
    about = json.loads(svhn.read_text())
    images = np.load(npy_of(svhn))
    assert images.shape == (32, 3, 32, 32) and images.dtype == np.uint8
    assert about["sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
    assert about["images"] == f"puat-svhn-{about['sha256'][:16]}.npy"
    assert about["sources"] == [
        {"path": str(tmp_path / "raw" / name), "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(layouts.svhn_files().items())
    ]
    kept = {key: about[key] for key in ("format", "name", "classes", "train", "test", "class_names", "filter")}
    assert kept == {"format": "puat-fast-data-1", "name": "svhn", "classes": "paper", "train": 20, "test": 12,
                    "class_names": list("0123456789"), "filter": FILTER}  # fmt: skip
    labels = [label % 10 for split, n in (("train", 20), ("test", 12)) for label in layouts.svhn_arrays(split, n)[1]]
    assert about["labels"] == labels


def test_very_many_sources_are_told_as_one(tmp_path):
    files = layouts.tree_files(("a", "b"), counts=(30, 10))
    put(tmp_path / "raw", files)
    about = json.loads(prepare("folder", tmp_path / "raw", tmp_path / "out").read_text())
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {tmp_path / 'raw' / name}\n" for name, content in
                    sorted(files.items()))  # fmt: skip
    assert about["sources"] == [{
        "path": "80 files", "size": sum(map(len, files.values())), "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }]  # fmt: skip


def test_the_prepared_file_is_taken_where_both_are(tmp_path):
    put(tmp_path, layouts.svhn_files())
    file = prepare("svhn", tmp_path, tmp_path)
    assert load_dataset("svhn", tmp_path).source == str(file)
    assert load_dataset("svhn", tmp_path, "all").source == str(tmp_path)  # of that there is none yet
    for name in layouts.svhn_files():
        (tmp_path / name).unlink()
    assert len(load_dataset("svhn", str(tmp_path)).train) == 20


def test_paper_and_all_lie_side_by_side(tmp_path):
    put(tmp_path, LAYOUTS["imagenet32"])
    files = [prepare("imagenet32", tmp_path, tmp_path, classes) for classes in ("paper", "all")]
    assert [file.name for file in files] == ["puat-imagenet32.json", "puat-imagenet32-all.json"]
    for classes in ("paper", "all"):
        same(load_dataset("imagenet32", tmp_path, classes), read_dataset("imagenet32", tmp_path, classes))
    assert npy_of(files[0]) != npy_of(files[1])


def test_images_that_another_json_names_are_kept(tmp_path):
    """`paper` and `all` of SVHN are the same images: preparing one anew must not take them from the other."""
    put(tmp_path / "raw", layouts.svhn_files())
    old = [prepare("svhn", tmp_path / "raw", tmp_path / "out", classes) for classes in ("paper", "all")]
    first = npy_of(old[0])
    assert first == npy_of(old[1])
    put(tmp_path / "raw", layouts.svhn_files(train=15))
    prepare("svhn", tmp_path / "raw", tmp_path / "out")
    assert first.is_file() and len(load_dataset("svhn", tmp_path / "out", "all").train) == 20
    prepare("svhn", tmp_path / "raw", tmp_path / "out", "all")
    assert not first.exists() and len(load_dataset("svhn", tmp_path / "out", "all").train) == 15


def test_prepared_anew_from_other_sources(svhn, tmp_path):
    old, out = npy_of(svhn), svhn.parent
    put(tmp_path / "raw", layouts.svhn_files(train=11))
    assert f"prepared from another {tmp_path / 'raw' / 'train_32x32.mat'}" in error_of(lambda: prepared.check(svhn))
    assert prepare("svhn", tmp_path / "raw", out) == svhn
    assert not old.exists() and sorted(os.listdir(out)) == sorted([svhn.name, npy_of(svhn).name])
    same(load_dataset("svhn", out), read_dataset("svhn", tmp_path / "raw"))
    prepared.check(svhn)


def test_prepared_anew_from_the_same_sources(svhn, tmp_path):
    before = svhn.read_bytes(), npy_of(svhn).read_bytes()
    prepare("svhn", tmp_path / "raw", svhn.parent)
    assert (svhn.read_bytes(), npy_of(svhn).read_bytes()) == before


SCRIPT = """
import sys
from puat_fast.data.formats import prepared, read_dataset
dataset = read_dataset("svhn", sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    prepared.write(dataset, prepared.Path(sys.argv[2]), "paper", {}, [])
"""


def test_two_processes_at_once(tmp_path):
    """From the same sources, as two runs on one cluster do; a reader meanwhile finds a whole dataset each time."""
    put(tmp_path / "raw", layouts.svhn_files())
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "raw"), str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    expected = read_dataset("svhn", tmp_path / "raw")
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    reads = 0
    while any(process.poll() is None for process in both):
        if (out / "puat-svhn.json").exists():
            same(load_dataset("svhn", out), expected)
            reads += 1
    assert [process.communicate()[1] for process in both] == ["", ""] and reads
    prepared.check(out / "puat-svhn.json")
    assert sorted(os.listdir(out)) == sorted(["puat-svhn.json", npy_of(out / "puat-svhn.json").name])


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("what", [".npy", ".json"])
def test_full_disk(tmp_path, monkeypatch, there_before, what):
    """The disk fills up halfway: an error, and the folder as it was."""
    put(tmp_path / "raw", layouts.svhn_files())
    out = tmp_path / "out"
    out.mkdir()
    if there_before:
        prepare("svhn", tmp_path / "raw", out)
        put(tmp_path / "raw", layouts.svhn_files(train=11))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    real = Path.open if what == ".npy" else Path.write_text

    class Full:
        """A file on a disk that takes one part more."""

        def __init__(self, raw):
            self.raw, self.left = raw, 2

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.raw.close()

        def write(self, part):
            self.left -= 1
            if self.left < 0:
                self.raw.write(bytes(part)[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.raw.write(part)

    def opened(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        return Full(file) if mode == "wb" else file

    def written(self, text, *args, **kwargs):
        real(self, text[:100], *args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepared, "_ROWS", 5)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open" if what == ".npy" else "write_text", opened if what == ".npy" else written)
        with pytest.raises(OSError, match="No space left on device") as caught:
            prepare("svhn", tmp_path / "raw", out)
    assert str(caught.value.filename).endswith(what) and str(out) in str(caught.value.filename)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    if there_before:
        assert len(load_dataset("svhn", out).train) == 20


def read(file):
    return load_dataset("svhn", file.parent)


def test_damaged_npy(svhn):
    npy = npy_of(svhn)
    layouts.check_cuts(npy, lambda: read(svhn))
    content = npy.read_bytes()
    for changed in layouts.flips(content, 300, span=120):
        npy.write_bytes(changed)
        assert npy.name in error_of(lambda: prepared.check(svhn))
    npy.write_bytes(content)
    npy.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert f"{npy}: missing or damaged (sha256 is" in error_of(lambda: prepared.check(svhn))


@pytest.mark.parametrize("array, says", [
    (np.zeros((32, 3, 32, 32)), "32 x 3 x 32 x 32 float64, expected 32 x 3 x 32 x 32 uint8"),
    (np.zeros((31, 3, 32, 32), np.uint8), "31 x 3 x 32 x 32 uint8"),
    (np.zeros((32, 32, 32, 3), np.uint8), "32 x 32 x 32 x 3 uint8"),
    (np.asfortranarray(np.zeros((32, 3, 32, 32), np.uint8)), "not one array in C order"),
    (np.array([None] * 32), "truncated or damaged|Array can't be memory-mapped"),
])  # fmt: skip
def test_other_arrays_under_its_name(svhn, array, says):
    np.save(npy_of(svhn), array)
    message = error_of(lambda: read(svhn))
    assert message.startswith(f"{npy_of(svhn)}: missing or damaged") and any(s in message for s in says.split("|"))


@pytest.mark.parametrize("content", [layouts.npz(a=np.zeros(3)), b"text", b""])
def test_other_files_under_its_name(svhn, content):
    npy_of(svhn).write_bytes(content)
    assert str(npy_of(svhn)) in error_of(lambda: read(svhn))
    npy_of(svhn).unlink()
    message = error_of(lambda: read(svhn))
    assert "missing or damaged (No such file or directory); remove it, or run `puat-fast data prepare` anew" in message


def test_damaged_json(svhn):
    content, told = svhn.read_bytes(), 0
    for changed in (*layouts.cuts(content)[:-1], *layouts.flips(content, 400)):  # the last cut: a newline
        svhn.write_bytes(changed)
        try:
            read(svhn)
            prepared.check(svhn)
        except ValueError as error:
            told += 1
            assert type(error).__name__ == "DataError" and str(svhn.parent) in str(error) and "\n" not in str(error)
    assert told > 200


@pytest.mark.parametrize("key, value", [
    ("format", "puat-fast-data-2"), ("images", 5), ("images", None), ("train", 19), ("train", 0), ("train", "x"),
    ("labels", []), ("labels", [1] * 31), ("labels", [10] * 32), ("labels", [-1] * 32), ("labels", [0.5] * 32),
    ("labels", ["a"] * 32), ("labels", [[1], [1, 2]]), ("labels", [2**70] * 32),
    ("class_names", 7), ("class_names", ["a"]), ("test", 13),
])  # fmt: skip
def test_altered_json(svhn, key, value):
    svhn.write_text(json.dumps(json.loads(svhn.read_text()) | {key: value}))
    assert str(svhn.parent) in error_of(lambda: read(svhn))
    about = json.loads(svhn.read_text())
    del about[key]
    svhn.write_text(json.dumps(about))
    assert str(svhn) in error_of(lambda: read(svhn))


@pytest.mark.parametrize("key, value", [
    ("sha256", "0" * 64), ("sha256", None), ("sources", None), ("sources", [1]), ("sources", [{"path": "x"}]),
])  # fmt: skip
def test_altered_checksums(svhn, key, value):
    svhn.write_text(json.dumps(json.loads(svhn.read_text()) | {key: value}))
    assert len(read(svhn).train) == 20  # reading asks for none
    assert "missing or damaged" in error_of(lambda: prepared.check(svhn))


@pytest.mark.parametrize("content", ["[1]", "null", "[" * 100000, '{"format": "puat-fast-data-1"}', "\x00", "{}"])
def test_json_of_something_else(svhn, content):
    svhn.write_text(content)
    assert f"{svhn}: missing or damaged" in error_of(lambda: read(svhn))


def test_images_are_only_looked_for_beside_the_json(svhn, tmp_path):
    np.save(tmp_path / "other.npy", np.zeros((32, 3, 32, 32), np.uint8))
    svhn.write_text(json.dumps(json.loads(svhn.read_text()) | {"images": "../other.npy"}))
    assert f"{svhn.parent / 'other.npy'}: missing" in error_of(lambda: read(svhn))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    images = ImageSet(np.zeros((2, 3, 32, 32), np.uint8), np.arange(2))
    with pytest.raises(OSError, match="file"):
        prepared.write(Dataset("svhn", ("a", "b"), images, images), tmp_path / "file" / "x", "paper", {}, [])
