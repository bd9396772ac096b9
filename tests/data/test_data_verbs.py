"""`puat-fast data prepare | verify | info`, through the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import put, tiny_files, under
from PIL import Image

from puat_fast import cli, data_verbs
from puat_fast.config import Config
from puat_fast.data import download, load_dataset
from puat_fast.data import verify as verify_module
from puat_fast.data.describe import KEYS


def run(capsys, *argv, code=0):
    """Standard output of `puat-fast data ...`; nothing may go to stderr."""
    found = cli.main(["data", *map(str, argv)])
    out = capsys.readouterr()
    assert (found, out.err) == (code, "")
    return out.out


def error_of(capsys, *argv, code):
    assert cli.main(["data", *map(str, argv)]) == code
    err = capsys.readouterr().err
    assert err.startswith("puat-fast: error: ") and err.count("\n") == 1, err
    return err


def documented(keys):
    """The keys that a help text documents: what stands before two blanks, or alone in its line."""
    lines = re.findall(r"^  ([a-z_]+(?:, [a-z_]+)*)(?:  .*)?$", keys, re.MULTILINE)
    return {key for line in lines for key in line.split(", ")}


@pytest.fixture
def svhn(tmp_path):
    return put(tmp_path / "raw", layouts.svhn_files())


# prepare


@pytest.mark.parametrize("name, files, counts", [
    ("svhn", layouts.svhn_files(), "20 training and 12 test images, 10 classes"),
    ("tiny-imagenet", under("tiny-imagenet-200", tiny_files()), "30 training and 20 test images, 10 classes"),
    ("imagenet32", layouts.imagenet32_files("npz"), "65 training and 10 test images, 10 classes"),
    ("folder", layouts.tree_files(("a", "b")), "6 training and 4 test images, 2 classes"),
])  # fmt: skip
def test_prepare(tmp_path, capsys, name, files, counts):
    put(tmp_path / "raw", files)
    out = run(
        capsys, "prepare", "--dataset", name, "--data-dir", tmp_path / "raw", "--out", tmp_path / "out"
    ).splitlines()
    assert out[0] == counts and [Path(line).is_file() for line in out[1:]] == [True, True] and len(out) == 3
    about = json.loads(Path(out[2]).read_text())
    assert about["filter"] == {"classes": "paper", "resize": data_resize()} and about["sources"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(Path(line).name for line in out[1:])
    assert load_dataset(name, tmp_path / "out").source == out[2]


def data_resize():
    from puat_fast.data.formats.images import RESIZE

    return RESIZE


def test_prepare_beside_the_files_and_of_all_classes(tmp_path, capsys):
    put(tmp_path, layouts.imagenet32_files())
    for classes, total in (("paper", 10), ("all", 1000)):
        out = run(capsys, "prepare", "--dataset", "imagenet32", "--data_dir", tmp_path, "--classes", classes)
        assert f", {total} classes\n" in out
        assert load_dataset("imagenet32", tmp_path, classes).source in out


def test_prepare_from_an_archive_writes_beside_it(tmp_path, capsys):
    archive = layouts.put_zip(tmp_path / "a.zip", layouts.tree_files(("a", "b")))
    written = run(capsys, "prepare", "--dataset", "folder", "--data-dir", archive).splitlines()[1:]
    assert sorted(tmp_path.iterdir()) == sorted([archive, *map(Path, written)])


def test_prepare_with_download(svhn, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "fetch", lambda *given: asked.append(given))
    run(capsys, "prepare", "--dataset", "svhn", "--data-dir", svhn, "--download")
    run(capsys, "prepare", "--dataset", "svhn", "--data-dir", svhn)
    assert asked == [("svhn", str(svhn))]


@pytest.mark.parametrize("argv, code, says", [
    (["prepare", "--dataset", "mnist", "--data-dir", "."], 2, "argument --dataset: invalid choice: 'mnist'"),
    (["prepare", "--dataset", "digits", "--data-dir", "."], 2, "digits is embedded, there is nothing to prepare"),
    (["prepare", "--dataset", "svhn"], 2, "data_dir: tell the folder that holds the dataset's files, by --data-dir"),
    (["prepare", "--dataset", "svhn", "--data-dir", "/no/where"], 1, "/no/where"),
    (["prepare", "--dataset", "svhn", "--data-dir", ".", "--classes", "half"], 2, "invalid choice: 'half'"),
    (["verify", "--dataset", "mnist", "--data-dir", "."], 2, "argument --dataset: invalid choice: 'mnist'"),
    (["verify", "--dataset", "cifar10"], 1, "cifar10 needs the folder that holds cifar-10-batches-py/"),
    (["verify", "--dataset", "tiny-imagenet"], 1, "tiny-imagenet needs the folder that holds"),
    (["verify", "--dataset", "svhn", "--data-dir", "/no/where"], 1, "/no/where"),
    (["verify", "--data-dir", "."], 2, "the following arguments are required: --dataset"),
    (["verify", "--dataset", "digits", "--json", "/no/such/x.json"], 2, "/no/such/x.json: cannot be written"),
    (["info", "--dataset", "imagenet32"], 1, "imagenet32 needs the folder that holds"),
    (["info", "--dataset", "digits", "--n-labelled", "0"], 2, "'0' is not a whole number >= 1"),
    (["info", "--dataset", "digits", "--seed", "-1"], 2, "'-1' is not a whole number >= 0"),
    (["info", "--dataset", "digits", "--grid", "a.jpg"], 2, "a.jpg does not end in .png"),
    (["info", "--dataset", "digits", "--grid", "/no/such/a.png"], 2, "cannot be written"),
    (["info", "--dataset", "digits", "--per-class", "x"], 2, "'x' is not a whole number >= 1"),
    (["info", "--dataset", "digits", "--datadir", "."], 2, "--datadir: no such option; did you mean --data-dir?"),
    ([], 2, "the following arguments are required: ACTION"),
    (["remove"], 2, "invalid choice: 'remove'"),
])  # fmt: skip
def test_mistakes(capsys, argv, code, says):
    assert says in error_of(capsys, *argv, code=code)


def test_errors_leave_nothing_half_written(svhn, tmp_path, capsys):
    (svhn / "test_32x32.mat").write_bytes(b"x" * 300)
    before = sorted(os.listdir(svhn))
    out = tmp_path / "out"
    argv = ["--dataset", "svhn", "--data-dir", svhn]
    assert "test_32x32.mat" in error_of(capsys, "prepare", *argv, code=1)
    assert "test_32x32.mat" in error_of(capsys, "prepare", *argv, "--out", out, code=1)
    targets = ["--json", tmp_path / "a.json", "--grid", tmp_path / "a.png"]
    assert "test_32x32.mat" in error_of(capsys, "info", *argv, *targets, code=1)
    assert sorted(os.listdir(svhn)) == before and sorted(os.listdir(tmp_path)) == ["raw"]


def test_prepare_where_nothing_can_be_written(svhn, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = ["prepare", "--dataset", "svhn", "--data-dir", svhn, "--out", tmp_path / "file" / "x"]
    assert f"{tmp_path}/file" in error_of(capsys, *argv, code=1)


# verify


def test_verify_tells_each_file_and_exits_by_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_module, "PER_CLASS", 3)
    put(tmp_path / "raw", tiny_files())
    argv = ["verify", "--dataset", "tiny-imagenet", "--data-dir", tmp_path / "raw", "--json", tmp_path / "a.json"]
    assert run(capsys, *argv) == f"ok        {tmp_path / 'raw'}: read: 30 training and 20 test images, 10 classes\n"
    wnid = layouts.PAPER_WNIDS[5]
    name = f"train/{wnid}/images/{wnid}_1.JPEG"
    (tmp_path / "raw" / name).unlink()
    lines = run(capsys, *argv, code=1).splitlines()
    assert lines[0] == f"missing   {tmp_path / 'raw' / name}" and len(lines) == 2
    written = json.loads((tmp_path / "a.json").read_text())
    assert set(written) == documented(data_verbs.VERIFY_KEYS)
    assert (written["dataset"], written["data_dir"], written["good"]) == ("tiny-imagenet", str(tmp_path / "raw"), False)
    assert [set(row) for row in written["files"]] == [{"file", "state", "detail"}] * 2
    assert [row["state"] for row in written["files"]] == ["missing", "ok"]


def test_verify_of_the_embedded_digits(capsys):
    assert run(capsys, "verify", "--dataset", "digits").startswith("ok        scikit-learn: read: 1437 training")


# info


def test_info(svhn, tmp_path, capsys):
    argv = ["info", "--dataset", "svhn", "--data-dir", svhn, "--n-labelled", "10", "--seed", "5"]
    out = run(capsys, *argv, "--json", tmp_path / "a.json", "--grid", tmp_path / "a.png", "--per-class", "2")
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) == documented(KEYS)
    assert found["split"] == {
        "n_labelled": 10, "val_fraction": 0.2, "seed": 5, "labelled": 10, "validation": 0, "unlabelled": 10,
    }  # fmt: skip
    labels = layouts.svhn_arrays("train", 20)[1] % 10
    assert found["train"] == {"images": 20, "per_class": np.bincount(labels, minlength=10).tolist()}
    assert found["test"]["images"] == 12 and found["class_names"] == list("0123456789")
    pixels = layouts.svhn_arrays("train", 20)[0] / 255
    np.testing.assert_allclose(found["mean"], pixels.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found["std"], pixels.std((0, 1, 2)), atol=1e-6)
    config = Config.preset("paper", dataset="svhn", data_dir="x")
    assert found["configured"] == {"mean": list(config.data.mean), "std": list(config.data.std)}
    assert str(tmp_path / "a.png") in out and "labelled: 10" in out and "training images" in out
    with Image.open(tmp_path / "a.png") as picture:
        width, height = picture.size
    from puat_fast import plots

    scale = round(plots.CELL / 32) * 32  # ten rows of two images
    assert height == plots.FONT + 5 * plots.GAP + 10 * (scale + plots.CAPTION + plots.GAP)
    assert 2 * scale < width < 3.5 * scale + 100


def test_info_takes_the_prepared_file(svhn, capsys):
    run(capsys, "prepare", "--dataset", "svhn", "--data-dir", svhn)
    assert f"source: {svhn / 'puat-svhn.json'}" in run(capsys, "info", "--dataset", "svhn", "--data-dir", svhn)


def test_info_of_a_split_that_cannot_be_made(svhn, tmp_path, capsys):
    """The preset's 1000 labels are more than there are: told, and the rest too."""
    out = run(capsys, "info", "--dataset", "svhn", "--data-dir", svhn, "--json", tmp_path / "a.json")
    split = json.loads((tmp_path / "a.json").read_text())["split"]
    assert "asks for 100 labelled images per class" in split["impossible"] and "impossible:" in out
    assert "labelled" not in split


def test_info_of_all_classes(tmp_path, capsys):
    put(tmp_path, layouts.imagenet32_files())
    argv = ["info", "--dataset", "imagenet32", "--data-dir", tmp_path, "--json", tmp_path / "a.json"]
    run(capsys, *argv, "--classes", "all")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["num_classes"] == 1000 and sum(found["train"]["per_class"]) == found["train"]["images"]
    assert "has no training image" in found["split"]["impossible"] or "multiple" in found["split"]["impossible"]
    run(capsys, *argv, "--grid", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_grid_with_a_class_that_has_no_image(tmp_path, capsys):
    """Its row is empty, the others are drawn."""
    images, labels = layouts.svhn_arrays("train", 20)
    put(
        tmp_path, layouts.svhn_files() | {"train_32x32.mat": layouts.svhn_mat(images[labels != 4], labels[labels != 4])}
    )
    run(capsys, "info", "--dataset", "svhn", "--data-dir", tmp_path, "--grid", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[1] > 1000


# all


@pytest.mark.parametrize("action, says", [
    ("prepare", ["--out DIR", "--download", "puat-NAME.json"]),
    ("verify", ["--json FILE", "truncated", "Exit code 0"]),
    ("info", ["--grid FILE.png", "--n-labelled N", "per_class"]),
])  # fmt: skip
def test_help(capsys, action, says):
    out = run(capsys, action, "--help")
    assert out.startswith(f"usage: puat-fast data {action} --dataset NAME --data-dir DIR [options]")
    for text in (*says, "--dataset", "--data-dir DIR", "--classes {paper,all}"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 120


def test_help_of_the_verb(capsys):
    out = run(capsys, "--help")
    assert all(f"\n    {action} " in out for action in ("prepare", "verify", "info"))


def test_no_verb_imports_torch(svhn):
    script = """
import sys
sys.modules["torch"] = None  # an import of it is an ImportError
from puat_fast.cli import main
folder = sys.argv[1]
for argv in (["prepare"], ["verify"], ["info", "--grid", folder + "/a.png"]):
    code = main(["data", *argv, "--dataset", "svhn", "--data-dir", folder])
    assert code == (1 if argv == ["verify"] else 0), argv  # small files are truncated ones
"""
    done = subprocess.run([sys.executable, "-c", script, str(svhn)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "unpack_cifar10.py").is_file(), reason="no ../shared/data: CIFAR-10 (JPEG) is there")
def test_cifar10_jpeg(tmp_path, capsys):
    """Real images: a re-encoded mirror is altered, can be prepared, and has CIFAR-10's statistics."""
    command = [sys.executable, SHARED / "unpack_cifar10.py", tmp_path, "--train", "1000", "--test", "200"]
    subprocess.run(command, check=True, capture_output=True)
    argv = ["--dataset", "cifar10", "--data-dir", tmp_path]
    assert "1000 training and 200 test images, 10 classes" in run(capsys, "prepare", *argv)
    rows = run(capsys, "verify", *argv, code=1).splitlines()
    states = [row.split()[0] for row in rows]
    assert states[0] == "ok" and states[-1] == "ok" and states.count("altered") >= 6
    run(capsys, "info", *argv, "--n-labelled", "400", "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["split"]["labelled"] == 320 and found["class_names"][9] == "truck"
    np.testing.assert_allclose(found["mean"], [0.4914, 0.4822, 0.4465], atol=0.02)
    assert found["source"] == str(tmp_path / "puat-cifar10.json")
