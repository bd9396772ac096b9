"""`puat-fast eval`: options, what the screen shows, what is written and where, progress."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puat_fast import cli, eval_verb
from puat_fast.evaluation.compare import paper_cell, wilson_interval
from puat_fast.runlog import ProgressLine


class Options(dict[str, Any]):
    """Stands for run.Options."""

    def __init__(self, **given: Any) -> None:
        super().__init__(given)
        self.out = given["out"]


class Evaluation:
    """Stands for run.Evaluation: notes what is written."""

    def __init__(self, result: dict[str, Any], log: list[Any]) -> None:
        self.result, self.log = result, log

    def write(self, folder: Path, name: str, grid: Path | None) -> None:
        self.log.append((folder, name, grid))

    def draw(self, grid: Path) -> None:
        self.log.append(grid)


class Evaluated:
    """Stands for puat_fast.evaluation.run: remembers what it got."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[str], Options]] = []
        self.written: list[Any] = []
        self.found: list[Any] = []
        self.dataset, self.more = "digits", dict[str, Any]()
        self.act: Callable[[], None] = lambda: None

    def find(self, path: Path, options: Options) -> Path:
        self.found.append(path)
        if path.name == "broken":
            raise ValueError(f"{path}: broken")
        return path

    def evaluate_run(
        self, subject: Path, attacks: list[str], options: Options, *, progress: Any, tell: Any
    ) -> Evaluation:
        self.calls.append((subject, attacks, options))
        self.act()
        progress("clean", 50, 100, 0.9)
        one = {
            "accuracy": 0.9, "correct": 90, "n": 100, "wilson95": wilson_interval(90, 100), "seconds": 1.25,
            "kept": False, "measured": "2026-11-24T20:00:00+00:00", "precision": "fp32",
        }  # fmt: skip
        paper = {name: paper_cell(self.dataset, "puat", name) for name in attacks}
        model = {"method": "puat"}
        result = {"run": str(subject), "dataset": self.dataset, "n": 100, "model": model, "notes": [], "paper": paper}
        return Evaluation(result | {"attacks": {name: one | self.more for name in attacks}}, self.written)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Evaluated:
    """What was evaluated; in tmp_path there are the run directories `run` and `other`."""
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    fake = Evaluated()
    module = types.ModuleType("puat_fast.evaluation.run")
    vars(module).update(Options=Options, find=fake.find, evaluate_run=fake.evaluate_run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert cli.main(["eval", *argv]) == code
    err = capsys.readouterr().err
    assert err.startswith("puat-fast: ") and err.count("\n") == 1, err
    return err


# -- options ----------------------------------------------------------------------------------------------------------


def test_defaults(evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out.json"
    assert cli.main(["eval", str(run), "--attacks", "clean,pgd-8", "--json", str(out)]) == 0
    ((subject, attacks, options),) = evaluated.calls
    assert (subject, attacks) == (run, ["clean", "pgd-8"])
    assert options == {
        "n": None, "batch_size": 256, "seed": 0, "device": "auto", "engine": "auto", "precision": "fp32",
        "dataset": None, "data_dir": None, "mean": None, "std": None, "acgan": None, "compat": "none",
        "start": None, "antialias": False, "out": run / "eval", "fresh": False,
    }  # fmt: skip
    assert evaluated.written == [(run / "eval", "clean_pgd-8", None)]
    written = json.loads(out.read_text())
    assert written["run"] == str(run) and list(written["attacks"]) == ["clean", "pgd-8"]
    text = " ".join(capsys.readouterr().out.split())
    assert "pgd-8 90.00 82.56 - 94.48 100 1.2" in text and "paper" not in text


def test_all_options_arrive(evaluated: Evaluated, tmp_path: Path) -> None:
    argv = ["--attacks", "pgd-8", "--n", "50", "--dataset", "cifar10", "--data_dir", "d", "--batch_size", "8"]
    argv += ["--mean", "0.1,1/5,.3", "--std", "1,1,1", "--seed", "3", "--fresh", "--precision", "bf16", "--acgan", "g"]
    argv += ["--uae-compat", "official-v1", "--engine", "eager", "--device", "cpu", "--uae-start", "ball"]
    argv += ["--uae-antialias"]
    argv += ["--out", str(tmp_path / "new"), "--grid", str(tmp_path / "g.png")]
    assert cli.main(["eval", str(tmp_path / "run"), *argv]) == 0
    ((_, _, options),) = evaluated.calls
    assert options == {
        "n": 50, "batch_size": 8, "seed": 3, "device": "cpu", "engine": "eager", "precision": "bf16",
        "dataset": "cifar10", "data_dir": "d", "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "acgan": Path("g"),
        "compat": "official-v1", "start": "ball", "antialias": True, "out": tmp_path / "new", "fresh": True,
    }  # fmt: skip
    # a look at a part of the images, or another way, has a name of its own
    assert evaluated.written == [(tmp_path / "new", "pgd-8-bf16_n50_s3_cifar10", tmp_path / "g.png")]
    assert cli.main(["eval", str(tmp_path / "run"), "--attacks", "usong", "--uae-compat", "official-v1"]) == 0
    assert evaluated.written[-1][1] == "usong_official-v1"
    argv = ["--attacks", "usong,aa-10it", "--uae-start", "image", "--uae-antialias"]
    assert cli.main(["eval", str(tmp_path / "run"), *argv]) == 0
    assert evaluated.written[-1][1] == "usong_aa-10it_image_antialias"


def test_a_file_gets_a_folder_beside_it(evaluated: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").touch()
    assert cli.main(["eval", str(tmp_path / "c.safetensors")]) == 0
    assert evaluated.written == [(tmp_path / "c.eval", "clean_pgd-2_pgd-4_pgd-8", None)]


def test_a_folder_that_export_wrote_stays_as_it_is(evaluated: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "run" / "model_info.json").touch()
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    assert [folder for folder, _, _ in evaluated.written] == [tmp_path / "run.eval"]


@pytest.mark.parametrize("argv, code, says", [
    (["--attacks", "pgd-8,agd-4"], 2, "attacks: 'agd-4' is not one of clean, pgd-E"),
    (["--n", "0"], 2, "argument --n: '0' is not a whole number >= 1"),
    (["--seed", "-1"], 2, "argument --seed: '-1' is not a whole number >= 0"),
    (["--seed", "9" * 20], 2, "seed: 99999999999999999999, accepted: 0 to 2**63 - 1"),
    (["--attacks", "clean", "--grid", "x.png"], 2, "grid: shows what attacks change, and clean is none"),
    (["--json", "/no/such/folder/x.json"], 2, "cannot be written"),
    (["--dataset", "mnist"], 2, "argument --dataset: invalid choice: 'mnist'"),
    (["--precision", "fp16"], 2, "precision: 'fp16' is not fp32, tf32, bf16"),
    (["--precision", "aa=bf16"], 2, "precision: 'aa=bf16': aa is not one of --attacks clean"),
    (["--mean", "1,2"], 2, "argument --mean: '1,2' is not 3 numbers"),
    (["--std", "1,2,x"], 2, "argument --std: '1,2,x' is not 3 numbers"),
    (["--mean", "1,2,3"], 2, "mean, std: give both or none"),
    (["--grid", "x.jpg"], 2, "grid: x.jpg does not end in .png"),
    (["--grid", "/no/such/folder/x.png"], 2, "cannot be written"),
    (["/no/other"], 1, "/no/other: no such run directory or file"),
])  # fmt: skip
def test_it_refuses_before_it_works(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, says: str
) -> None:
    assert says in error_of(capsys, str(tmp_path / "run"), *argv, code=code)
    assert evaluated.found == []


def test_folders_and_files_are_told_apart(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = str(tmp_path / "run"), tmp_path / "file"
    file.touch()
    assert f"out: {file} is a file" in error_of(capsys, run, "--out", str(file))
    assert "grid: is for one run" in error_of(capsys, run, run, "--grid", str(tmp_path / "g.png"))
    assert evaluated.found == []


# -- several runs -----------------------------------------------------------------------------------------------------


def test_several_runs_give_one_table(evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated.dataset = "cifar10"
    run, other, out = tmp_path / "run", tmp_path / "other", tmp_path / "o.json"
    argv = [str(run), str(other), "--attacks", "clean,pgd-8", "--json", str(out)]
    assert cli.main(["eval", *argv]) == 0
    assert [folder for folder, _, _ in evaluated.written] == [run / "eval", other / "eval"]
    runs = json.loads(out.read_text())
    assert list(runs) == ["runs"] and [found["run"] for found in runs["runs"]] == [str(run), str(other)]
    text = " ".join(capsys.readouterr().out.split())
    cell = paper_cell("cifar10", "puat", "pgd-8")
    assert cell and f"{100 * cell['mean']:.2f} +- {100 * cell['std']:.2f}" in text
    assert text.count("90.00 (82.56 - 94.48)") == 4 and "paper: PUAT, CIFAR10" in text


def test_several_runs_do_not_overwrite_each_other(evaluated: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "x" / "run").mkdir(parents=True)
    paths = [str(tmp_path / "run"), str(tmp_path / "x" / "run")]
    assert cli.main(["eval", *paths, "--out", str(tmp_path / "new")]) == 0
    assert [folder for folder, _, _ in evaluated.written] == [tmp_path / "new" / "run", tmp_path / "new" / "run-2"]


def test_a_run_is_called_by_its_folder(evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "run" / "below")
    assert cli.main(["eval", ".", "..", "--out", str(tmp_path / "new")]) == 0
    assert [folder for folder, _, _ in evaluated.written] == [tmp_path / "new" / "below", tmp_path / "new" / "run"]


def test_all_are_found_before_the_first_is_measured(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    assert "broken: broken" in error_of(capsys, str(tmp_path / "run"), str(tmp_path / "broken"))
    assert evaluated.calls == []


# -- what is kept, and what is told -----------------------------------------------------------------------------------


def test_where_nothing_can_be_written_it_says_so(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "eval").touch()  # a file where the folder should be: root too is refused
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("puat-fast: nothing is kept of this evaluation (--out DIR would)") and err.count("\n") == 1
    assert evaluated.calls[0][2].out is None and evaluated.written == []
    assert cli.main(["eval", str(tmp_path / "run"), "--grid", str(tmp_path / "g.png")]) == 0
    assert evaluated.written == [tmp_path / "g.png"]


def test_kept_results_and_warnings_stand_below(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated.more = {"kept": True, "warnings": ["the gradients are masked"]}
    assert cli.main(["eval", str(tmp_path / "run"), "--attacks", "aa"]) == 0
    *_, kept, warning = capsys.readouterr().out.splitlines()
    assert kept == "measured before, and kept (UTC): aa 2026-11-24 20:00; --fresh measures anew"
    assert warning == "aa: the gradients are masked"


def test_help_tells_keys_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("worst_case", "worst_of_draws", "broken_by", "wilson95", "ATTACKS.npz", "attacks/", "--fresh", "runs"):
        assert word in text


# -- progress ---------------------------------------------------------------------------------------------------------


def test_progress_tells_images_accuracy_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(eval_verb, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ProgressLine, "due", lambda self: True)
    with eval_verb._Progress() as progress:
        progress._line = ProgressLine(Console(file=out, width=200))
        progress.begin("a")
        progress("clean", 0, 400, 0.0)
        progress("pgd-8", 100, 400, 0.5)  # goes on at image 100
        now[0] = 10.0
        progress("pgd-8", 200, 400, 0.625)
        now[0] = 20.0
        progress("pgd-8", 400, 400, 0.6)
        progress("aa apgd-t", 0, 400, 0.6)
        now[0] = 24.0
        progress("aa apgd-t", 100, 400, 0.5)
    assert out.getvalue().splitlines() == [
        "a  clean  0/400 images",
        "a  pgd-8  100/400 images  accuracy so far 50.00 %",
        "a  pgd-8  200/400 images  accuracy so far 62.50 %  0:00:20 left",
        "a  pgd-8  400/400 images  accuracy so far 60.00 %",
        "a  aa apgd-t  0/400 images  accuracy so far 60.00 %",
        "a  aa apgd-t  100/400 images  accuracy so far 50.00 %  0:00:12 left",
    ]


# -- for real ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    from puat_fast import checkpoint
    from puat_fast.config import Config
    from puat_fast.networks import build_classifier

    C = build_classifier(Config.preset("paper", classifier={"depth": 10, "width": 1}), 10).eval()
    checkpoint.save_classifier(tmp_path / "c.safetensors", C, "digits", tuple("0123456789"), {"method": "puat"})
    return tmp_path / "c.safetensors"


def test_interrupted_and_started_again(
    classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, name: str, done: int, total: int, accuracy: float) -> None:
        if done:
            os.kill(os.getpid(), signal.SIGINT)

    argv = ["eval", str(classifier), "--attacks", "clean,pgd-8", "--n", "12", "--batch-size", "6", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(eval_verb._Progress, "__call__", stop)
        assert cli.main(argv) == 130
        message = "puat-fast: interrupted, and saved; the same command, without --fresh, goes on\n"
        assert capsys.readouterr().err == message
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert "measured before" not in first and "worst case" in first
    names = sorted(file.name for file in classifier.with_name("c.eval").iterdir())
    assert names == ["attacks", "clean_pgd-8_n12.json", "clean_pgd-8_n12.npz", "clean_pgd-8_n12.png"]
    assert cli.main(argv) == 0
    again = capsys.readouterr().out
    assert "measured before, and kept (UTC): clean 20" in again
    assert again.splitlines()[: len(first.splitlines())] == first.splitlines()  # seconds too
