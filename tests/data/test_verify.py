"""What `verify` says of every file: ok, missing, truncated, altered, broken, unknown."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import PAPER_WNIDS, error_of, put, put_zip, tiny_files, under

from puat_fast.data import known
from puat_fast.data import verify as module
from puat_fast.data.formats import prepared, read_dataset
from puat_fast.data.verify import verify


def publish(monkeypatch, dataset, files):
    """As if the small files were the published ones."""
    table = tuple(
        known.KnownFile(name.rpartition("/")[2], (hashlib.md5(content).hexdigest(),), len(content))
        for name, content in files.items()
    )
    monkeypatch.setitem(known.ARCHIVES, dataset, ())
    monkeypatch.setitem(known.FILES, dataset, table)


def states(dataset, folder, classes="paper"):
    """{path below the folder: state}, of each file once."""
    findings = verify(dataset, folder, classes)
    names = [finding.file.removeprefix(f"{folder}/") for finding in findings]
    assert len(set(names)) == len(names)
    return dict(zip(names, (finding.state for finding in findings), strict=True))


@pytest.fixture
def cifar(write, monkeypatch):
    """A folder with CIFAR-10, and its files' contents."""
    folder = write("cifar10")
    files = {file.name: file.read_bytes() for file in (folder / "cifar-10-batches-py").iterdir()}
    publish(monkeypatch, "cifar10", files)
    return folder


LAYOUTS = {
    "svhn": layouts.svhn_files(),
    "imagenet32": layouts.imagenet32_files(),
    "imagenet32 npz": layouts.imagenet32_parts(layouts.imagenet32_files("npz"), "Imagenet32_train_npz", "val"),
    "tiny-imagenet": layouts.tiny_npz()[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ok_altered_truncated_missing(tmp_path, monkeypatch, layout):
    name, files = layout.split()[0], LAYOUTS[layout]
    publish(monkeypatch, name, files)
    put(tmp_path, files)
    found = states(name, tmp_path)
    assert {file: found[file] for file in files} == dict.fromkeys(files, "ok")
    assert len(found) == len(files) + 1 and set(found.values()) == {"ok"}  # and that all could be read
    victim = list(files)[-1]
    (tmp_path / victim).write_bytes(files[victim][:-40])
    findings = {finding.file: finding for finding in verify(name, tmp_path)}
    told = findings[str(tmp_path / victim)]
    assert (told.state, told.detail) == ("truncated", f"{len(files[victim]) - 40} of {len(files[victim])} bytes")
    assert findings[str(tmp_path)].state == "broken" and Path(victim).name in findings[str(tmp_path)].detail
    (tmp_path / victim).write_bytes(files[victim][:-1] + b"?")
    assert states(name, tmp_path)[victim] == "altered"
    (tmp_path / victim).unlink()
    found = states(name, tmp_path)
    missing = [file for file, state in found.items() if state == "missing"]
    assert [Path(file).name.removesuffix(".npz") for file in missing] == [Path(victim).name.removesuffix(".npz")]
    assert sum(state == "ok" for state in found.values()) == len(files) - 1


def test_files_of_which_nothing_was_published(tmp_path, monkeypatch):
    publish(monkeypatch, "imagenet32", {})
    findings = verify("imagenet32", layouts.put_imagenet32_zips(tmp_path, "pickle"))
    assert {finding.state for finding in findings[:-1]} == {"unknown"} and findings[-1].state == "ok"
    assert {finding.file for finding in findings[:-1]} == {
        str(tmp_path / f"Imagenet32_{s}.zip") for s in ("train", "val")
    }
    assert all(finding.good for finding in findings)


def test_svhn_by_the_path_of_a_file(tmp_path, monkeypatch):
    publish(monkeypatch, "svhn", layouts.svhn_files())
    put(tmp_path, layouts.svhn_files())
    found = verify("svhn", tmp_path / "train_32x32.mat")
    assert [finding.detail for finding in found[:2]] == ["md5 agrees"] * 2


def test_cifar(cifar):
    files = states("cifar10", cifar)
    assert set(files.values()) == {"ok"} and len(files) == 8
    (cifar / "cifar-10-batches-py" / "batches.meta").unlink()
    files = states("cifar10", cifar)
    assert files["cifar-10-batches-py/batches.meta"] == "unknown"  # not needed
    (cifar / "cifar-10-batches-py" / "data_batch_3").unlink()
    (cifar / "cifar-10-batches-py" / "test_batch").unlink()
    files = states("cifar10", cifar)
    assert [file for file, state in files.items() if state == "missing"] == [
        "cifar-10-batches-py/data_batch_3", "cifar-10-batches-py/test_batch",
    ]  # fmt: skip


def test_altered_but_readable(cifar, files_of, pickled):
    """A mirror's re-encoded copy."""
    content = files_of("cifar10")["test_batch"]
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(pickled(content | {b"data": content[b"data"] ^ 1}))
    findings = verify("cifar10", cifar)
    altered = [finding for finding in findings if not finding.good]
    assert [finding.state for finding in altered] == ["altered"] and "published" in altered[0].detail
    assert findings[-1].state == "ok"
    assert findings[-1].detail == "read: 100 training and 10 test images, 10 classes"


def test_archive(write, monkeypatch, tmp_path):
    folder = write("cifar10", archive=True)
    assert verify("cifar10", folder)[0].state == "truncated"  # smaller than the real one
    publish(monkeypatch, "cifar10", {file.name: file.read_bytes() for file in folder.glob("*.gz")})
    assert [finding.state for finding in verify("cifar10", folder)] == ["ok", "ok"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_CLASS", 3)  # of which the layout has all
    return put(tmp_path, under("tiny-imagenet-200", tiny_files()))


def test_tiny_is_whole(tiny):
    findings = verify("tiny-imagenet", tiny)
    assert [(finding.state, finding.detail) for finding in findings] == [
        ("ok", "read: 30 training and 20 test images, 10 classes")
    ]


def test_every_missing_and_every_broken_image_of_tiny_is_named(tiny):
    top, wanted = tiny / "tiny-imagenet-200", {}
    (top / f"train/{layouts.OTHER_WNIDS[0]}/images/{layouts.OTHER_WNIDS[0]}_1.JPEG").unlink()  # not of the paper's ten
    for wnid, k in ((PAPER_WNIDS[0], 0), (PAPER_WNIDS[0], 2), (PAPER_WNIDS[7], 1)):
        (top / f"train/{wnid}/images/{wnid}_{k}.JPEG").unlink()
        wanted[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = "missing"
    owners = [name for name, wnid in layouts.tiny_owners(tiny_files()).items() if wnid in PAPER_WNIDS]
    for name in owners[:8]:
        (top / "val/images" / name).unlink()
        wanted[f"val/images/{name}"] = "missing"
    for name, content, state in (
        (f"train/{PAPER_WNIDS[2]}/images/{PAPER_WNIDS[2]}_2.JPEG", b"", "broken"),
        (f"val/images/{owners[9]}", b"no image", "broken"),
        (f"val/images/{owners[10]}", (top / "val/images" / owners[10]).read_bytes()[:-50], "truncated"),
    ):
        (top / name).write_bytes(content)
        wanted[name] = state
    found = {name.removeprefix("tiny-imagenet-200/"): state for name, state in states("tiny-imagenet", tiny).items()}
    assert found == wanted


def test_missing_training_images_alone(tiny):
    (tiny / f"tiny-imagenet-200/train/{PAPER_WNIDS[1]}/images/{PAPER_WNIDS[1]}_1.JPEG").unlink()
    findings = verify("tiny-imagenet", tiny)
    assert [finding.state for finding in findings] == ["missing", "ok"] and "29 training" in findings[1].detail


def test_flat_training_folders_of_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_CLASS", 4)
    findings = verify("tiny-imagenet", put(tmp_path, layouts.train_flat(tiny_files())))
    missing = {finding.file for finding in findings if finding.state == "missing"}
    assert missing == {str(tmp_path / f"train/{wnid}/{wnid}_3.JPEG") for wnid in PAPER_WNIDS}


@pytest.mark.parametrize("change, state", [(lambda c: c, "ok"), (lambda c: c[:-9], "truncated"), (None, "altered")])
def test_zip_of_tiny(tmp_path, monkeypatch, change, state):
    archive = put_zip(tmp_path / "tiny-imagenet-200.zip", under("tiny-imagenet-200", tiny_files()))
    publish(monkeypatch, "tiny-imagenet", {archive.name: archive.read_bytes()})
    if change is None:
        put_zip(archive, under("tiny-imagenet-200", tiny_files(per_class=4)))
    else:
        archive.write_bytes(change(archive.read_bytes()))
    if state == "truncated":  # the list of members is at its end
        (finding,) = verify("tiny-imagenet", tmp_path)
        assert finding.state == "broken" and "tiny-imagenet-200.zip: cannot be read" in finding.detail
    else:
        assert [finding.state for finding in verify("tiny-imagenet", tmp_path)] == [state, "ok"]


def prepare(folder: Path) -> Path:
    return prepared.write(read_dataset("svhn", folder), folder, "paper", {}, [
        prepared.Source(str(folder / name), len(content), hashlib.sha256(content).hexdigest())
        for name, content in layouts.svhn_files().items()
    ])  # fmt: skip


def test_prepared_file_alone_and_beside_its_sources(tmp_path, monkeypatch):
    publish(monkeypatch, "svhn", layouts.svhn_files())
    file = prepare(put(tmp_path, layouts.svhn_files()))
    findings = verify("svhn", tmp_path)
    assert (findings[0].file, findings[0].detail) == (str(file), "sha256 agrees")
    assert [finding.state for finding in findings] == ["ok"] * 4
    for name in layouts.svhn_files():
        (tmp_path / name).unlink()
    assert states("svhn", tmp_path) == {file.name: "ok"}
    npy = tmp_path / json.loads(file.read_text())["images"]
    images = np.load(npy)
    images[5, 0, 0, 0] ^= 1
    np.save(npy, images)
    findings = verify("svhn", tmp_path)
    assert [finding.state for finding in findings] == ["broken"] and "sha256 is" in findings[0].detail


def test_prepared_from_other_sources(tmp_path):
    file = prepare(put(tmp_path, layouts.svhn_files()))
    put(tmp_path, layouts.svhn_files(train=11))
    finding = verify("svhn", tmp_path)[0]
    assert (finding.file, finding.state) == (str(file), "broken") and "prepared from another" in finding.detail


@pytest.mark.parametrize("name", ["folder", "cifar10", "svhn"])
def test_trees(tmp_path, name):
    put(tmp_path, layouts.tree_files([str(k) for k in range(10)], counts=(2, 1)))
    assert [finding.state for finding in verify(name, tmp_path)] == ["ok"]
    (tmp_path / "train/3/img1.png").write_bytes(b"")
    (tmp_path / "test/4/img0.png").write_bytes(b"x")
    found = states(name, tmp_path)
    assert found == {"train/3/img1.png": "broken", "test/4/img0.png": "broken"}


def test_embedded_digits():
    assert [(f.file, f.state) for f in verify("digits", None)] == [("scikit-learn", "ok")]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet32", "folder"])
def test_nothing_there(tmp_path, name):
    assert error_of(lambda: verify(name, tmp_path)).startswith(f"{tmp_path}: no ")
    assert "no such file or folder" in error_of(lambda: verify(name, tmp_path / "nowhere"))
    assert f"{name} needs the folder that holds" in error_of(lambda: verify(name, None))
