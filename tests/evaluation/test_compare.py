"""Intervals, the paper's cells, notes and tables: without torch."""

from __future__ import annotations

import csv
import importlib.resources
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from puat_fast.evaluation import compare
from puat_fast.evaluation.compare import paper_cell, wilson_interval

SHARED = Path(__file__).parents[3] / "shared" / "paper" / "tables_3_to_7.csv"


@pytest.mark.parametrize("correct, n", [(90, 100), (1, 3), (5000, 10000), (0, 10), (10, 10)])
def test_wilson_interval_ends_where_the_score_test_is_at_its_limit(correct: int, n: int) -> None:
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high + 1e-12 <= 1 + 1e-12
    for p in (low, high):
        assert n * (correct / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p), rel=1e-5, abs=1e-12)


def test_wilson_interval_of_nothing() -> None:
    assert wilson_interval(0, 0) == [0, 1]


# -- the paper --------------------------------------------------------------------------------------------------------


def paper_text() -> str:
    return importlib.resources.files("puat_fast.evaluation").joinpath("paper/tables_3_to_7.csv").read_text()


def test_the_table_is_installed_and_is_the_shared_one() -> None:
    assert len(paper_text().splitlines()) == 193
    if SHARED.exists():
        assert paper_text() == SHARED.read_text()


def test_every_cell_of_the_table_is_found_by_our_names() -> None:
    metrics = {"natural": "clean", "AA": "aa", "USong": "usong", "GPGD-0.01": "gpgd-0.01", "GPGD-0.1": "gpgd-0.1"}
    metrics |= {f"PGD-{e}/255": f"pgd-{e}" for e in (2, 4, 8)}
    datasets, methods = ({value: key for key, value in names.items()} for names in (compare.DATASETS, compare.METHODS))
    empty = 0
    for row in csv.DictReader(paper_text().splitlines()):
        cell = paper_cell(datasets[row["dataset"]], methods[row["method"]], metrics[row["metric"]], 10)
        if row["mean"] == "NA":
            empty += 1
            assert cell is None
        else:
            assert cell is not None
            assert (f"{100 * cell['mean']:.2f}", f"{100 * cell['std']:.2f}") == (row["mean"], row["std"])
    assert empty == 12


@pytest.mark.parametrize("dataset, method, attack, classes", [
    ("digits", "puat", "clean", 10), ("folder", "puat", "clean", 10), ("cifar10", None, "clean", 10),
    ("cifar10", "acgan", "clean", 10), ("cifar10", "puat", "pgd-3", 10), ("cifar10", "puat", "gpgd-1", 10),
    ("tiny-imagenet", "puat", "clean", 200), ("imagenet32", "puat", "clean", 1000), ("imagenet32", "dmat", "clean", 10),
])  # fmt: skip
def test_there_is_no_cell(dataset: str, method: str | None, attack: str, classes: int) -> None:
    assert paper_cell(dataset, method, attack, classes) is None


def test_puat_on_cifar10_as_printed() -> None:
    """Spot values, as spec 3 quotes them."""
    assert paper_cell("cifar10", "puat", "clean") == pytest.approx({"mean": 0.830, "std": 0}, abs=0.01)
    usong = paper_cell("cifar10", "puat", "usong")
    assert usong is not None and usong["mean"] == pytest.approx(0.926, abs=0.001)


# -- notes and tables -------------------------------------------------------------------------------------------------


def attack_result(correct: int, n: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "accuracy": correct / n, "correct": correct, "n": n, "wilson95": wilson_interval(correct, n), "seconds": 1.5,
        "measured": "2026-11-24T20:10:30+00:00", "kept": False, "precision": "fp32", **more,
    }  # fmt: skip


def result(dataset: str = "cifar10", method: str | None = "puat", n: int = 100, **attacks: Any) -> dict[str, Any]:
    found = {"clean": attack_result(90), "aa": attack_result(40, warnings=["masked"])} | attacks
    model = {"arch": "WRN-28-10", "method": method, "preset": "paper", "n_labelled": 4000}
    paper = {name: paper_cell(dataset, method, name) for name in found}
    whole = {"run": "a", "dataset": dataset, "n": n, "n_test": 10000, "model": model, "attacks": found, "paper": paper}
    return whole | {"notes": compare.paper_notes(whole)}


def test_notes_tell_where_it_is_not_the_papers_setting() -> None:
    whole = result(n=10000)
    (aa,) = compare.paper_notes(whole)
    assert "torchattacks' with 10 iterations" in aa
    assert paper_cell("cifar10", "puat", "aa-10it") == paper_cell("cifar10", "puat", "aa") is not None
    assert paper_cell("cifar10", "puat", "aa-20it") is None
    small = result()
    small["model"] |= {"arch": "WRN-10-2", "n_labelled": 1000}
    text = "\n".join(compare.paper_notes(small))
    for part in ("WRN-28-10, this one WRN-10-2", "4000 labelled images, this one on 1000", "100 of 10000 test images"):
        assert part in text
    small["model"]["n_labelled"] = None
    assert "this file does not tell" in "\n".join(compare.paper_notes(small))
    assert compare.paper_notes(result("digits")) == []


def test_table_of_one() -> None:
    columns, rows = compare.table_of_one(result())
    assert columns == ["attack", "accuracy %", "95 % interval", "n", "seconds", "paper %"]
    assert rows[0][:5] == ["clean", "90.00", "82.56 - 94.48", "100", "1.5"]
    cell = paper_cell("cifar10", "puat", "clean")
    assert cell and rows[0][5] == f"{100 * cell['mean']:.2f} +- {100 * cell['std']:.2f}"
    columns, rows = compare.table_of_one(result("digits") | {"worst_case": attack_result(40)})
    assert len(columns) == 5 and rows[-1][:2] == ["worst case", "40.00"]


def test_table_of_several() -> None:
    pgd = attack_result(50)
    runs = [
        result() | {"worst_case": attack_result(39)}, result(**{"pgd-8": pgd}), result(method="trades"),
        result("digits"), result(method=None),
    ]  # fmt: skip
    columns, rows = compare.table_of_several(runs, ["a", "b", "c", "d", "e"])
    assert columns == ["attack", "a", "b", "c", "d", "e", "paper: PUAT, CIFAR10", "paper: TRADES, CIFAR10"]
    assert [row[0] for row in rows] == ["clean", "aa", "pgd-8", "worst case"]
    assert rows[0][1] == "90.00 (82.56 - 94.48)" and rows[3][1].startswith("39.00") and rows[3][2:] == [""] * 6
    assert rows[2][1] == "" and rows[2][2].startswith("50.00 (") and rows[2][6] and not rows[2][7]
    assert all(len(row) == len(columns) for row in rows)
    assert [rows[0][i] for i in (6, 7)] == [compare._paper_text(paper_cell("cifar10", m, "clean")) for m in
                                            ("puat", "trades")]  # fmt: skip


def test_lines_below_the_table() -> None:
    text = compare.notes(result(clean=attack_result(90, kept=True)))
    assert text[0] == "measured before, and kept (UTC): clean 2026-11-24 20:10; --fresh measures anew"
    assert text[1] == "aa: masked"
    assert compare.notes(result("digits", aa=attack_result(1))) == []
    (line,) = compare.notes(result("digits", aa=attack_result(1, precision="bf16")))
    assert line.startswith("aa: searched in bf16, judged in fp32")


def test_names_of_runs() -> None:
    assert compare.labels_of(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]


def test_it_imports_no_torch() -> None:
    code = "import sys; import puat_fast.evaluation.compare, puat_fast.evaluation.names; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
