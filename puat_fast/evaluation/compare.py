"""Accuracies beside each other: intervals, the worst case, what the paper has, tables. Imports no torch.

A result is what `evaluation.run.evaluate_run` gives, and `eval --json` writes.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import Any

from puat_fast.config import Config, ConfigError

Cell = dict[str, float]
"""mean and std over the paper's runs, as parts of 1."""

PAPER_TABLE = "paper/tables_3_to_7.csv"
PAPER_ARCH = "WRN-28-10"
WORST = "worst case"
DATASETS = {
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "tiny-imagenet": "Tiny ImageNet",
    "imagenet32": "ImageNet32",
}  # fmt: skip
METHODS = {"puat": "PUAT", "regular": "Regular", "trades": "TRADES", "dmat": "DMAT", "rst": "RST"}
CLASSES_OF_THE_PAPER = {"tiny-imagenet": 10, "imagenet32": 10}


def wilson_interval(correct: int, n: int) -> list[float]:
    """95 % confidence interval [low, high] of a proportion: E. B. Wilson, 1927. [0, 1] where n is 0."""
    if n == 0:
        return [0.0, 1.0]
    z = 1.959963984540054
    p, shrink = correct / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return [max(0.0, middle - half), min(1.0, middle + half)]


@functools.cache
def _paper() -> dict[tuple[str, str, str], Cell]:
    text = importlib.resources.files("puat_fast.evaluation").joinpath(PAPER_TABLE).read_text(encoding="utf-8")
    return {
        (row["dataset"], row["method"], row["metric"]): {
            "mean": float(row["mean"]) / 100,
            "std": float(row["std"]) / 100,
        }
        for row in csv.DictReader(text.splitlines())
        if row["mean"] != "NA"
    }


def paper_cell(dataset: str, method: str | None, attack: str, num_classes: int | None = None) -> Cell | None:
    """The paper's value (tables III to VII) for a dataset, a method and an attack, by our names; None: it has none.

    num_classes tells the paper's ten classes of Tiny ImageNet and ImageNet32 from all of them.
    """
    if num_classes is not None and CLASSES_OF_THE_PAPER.get(dataset, num_classes) != num_classes:
        return None
    metric = {"clean": "natural", "aa": "AA", "aa-10it": "AA", "usong": "USong"}.get(attack)
    metric = metric or attack.replace("gpgd-", "GPGD-")
    if attack.startswith("pgd-"):
        metric = f"PGD-{attack.removeprefix('pgd-')}/255"
    return _paper().get((DATASETS.get(dataset, ""), METHODS.get(method or "", ""), metric))


def paper_notes(result: Mapping[str, Any]) -> list[str]:
    """Where a result is not what the paper measured, a line each; none where the paper has no value beside it."""
    if not any(result["paper"].values()):
        return []
    model, notes = result["model"], []
    if model["arch"] != PAPER_ARCH:
        notes.append(f"the paper's classifier is {PAPER_ARCH}, this one {model['arch']}")
    usual = _paper_labels(result["dataset"], model["method"])
    if usual is not None and model["n_labelled"] not in (None, usual):
        notes.append(f"the paper trains on {usual} labelled images, this one on {model['n_labelled']}")
    if model["n_labelled"] is None:
        notes.append(f"the paper trains on {usual or 'its own number of'} labelled images, this file does not tell")
    if result["n"] < result["n_test"]:
        notes.append(f"the first {result['n']} of {result['n_test']} test images")
    if result["paper"].get("aa") or result["paper"].get("aa-10it"):
        notes.append("the paper's AA was likely torchattacks' with 10 iterations, a weaker attack than aa with its 100")
    return notes


def _paper_labels(dataset: str, method: str | None) -> int | None:
    try:
        values = Config.preset_values("paper", dataset, method or "puat")
    except ConfigError:  # a method of the paper that this package has not
        values = Config.preset_values("paper", dataset, "puat")
    return Config.from_dict(values).data.n_labelled


def percent(value: float) -> str:
    """2 decimals, as the paper's."""
    return f"{100 * value:.2f}"


def _interval(found: Mapping[str, Any]) -> str:
    return " - ".join(map(percent, found["wilson95"]))


def _paper_text(cell: Cell | None) -> str:
    return "" if cell is None else f"{percent(cell['mean'])} +- {percent(cell['std'])}"


def rows_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """All that has an accuracy, by the name of its row: attacks, then the worst case, if there is one."""
    worst = {WORST: result["worst_case"]} if "worst_case" in result else {}
    return {**result["attacks"], **worst}


def table_of_one(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of a result."""
    columns = ["attack", "accuracy %", "95 % interval", "n", "seconds"]
    with_paper = any(result["paper"].values())
    rows = []
    for name, found in rows_of(result).items():
        seconds = f"{found['seconds']:.1f}" if "seconds" in found else ""
        row = [name, percent(found["accuracy"]), _interval(found), str(found["n"]), seconds]
        rows.append(row + [_paper_text(result["paper"].get(name))] * with_paper)
    return columns + ["paper %"] * with_paper, rows


def table_of_several(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one table: a row per attack, a column for each result, and for each of the paper's cells."""
    found = [rows_of(result) for result in results]
    attacks = [name for name in dict.fromkeys(name for rows in found for name in rows) if name != WORST]
    attacks += [WORST] if any(WORST in rows for rows in found) else []
    papers: dict[str, Mapping[str, Any]] = {}
    for result in results:
        if any(result["paper"].values()):
            title = f"paper: {METHODS[result['model']['method']]}, {DATASETS[result['dataset']]}"
            papers[title] = {**papers.get(title, {}), **result["paper"]}
    rows = []
    for attack in attacks:
        cells = [rows[attack] if attack in rows else None for rows in found]
        ours = [f"{percent(cell['accuracy'])} ({_interval(cell)})" if cell else "" for cell in cells]
        rows.append([attack, *ours, *(_paper_text(cells.get(attack)) for cells in papers.values())])
    return ["attack", *names, *papers], rows


def latent_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Beside each accuracy on generated images what puts it into proportion; no rows where there is none."""
    shown = {
        "accuracy": "accuracy %", "generated_acc": "before the attack %", "agreement": "label head agrees %",
        "agreement_adv": "and after %",
    }  # fmt: skip
    latent = {name: found for name, found in result["attacks"].items() if "generated_acc" in found}
    if any("worst_of_draws" in found for found in latent.values()):
        shown["worst_of_draws"] = "right in all draws %"
    rows = [[name, *(percent(found[key]) if key in found else "" for key in shown)] for name, found in latent.items()]
    return ["", *shown.values()], rows


def notes(result: Mapping[str, Any]) -> list[str]:
    """Lines to stand below the table of a result."""
    kept = [f"{name} {_minute(found['measured'])}" for name, found in result["attacks"].items() if found["kept"]]
    lines = [f"measured before, and kept (UTC): {', '.join(kept)}; --fresh measures anew"] if kept else []
    lines += [f"{name}: {text}" for name, found in result["attacks"].items() for text in found.get("warnings", ())]
    for name, found in result["attacks"].items():
        if found["precision"] != "fp32":
            lines.append(f"{name}: searched in {found['precision']}, judged in fp32; fp32 may find more")
    return lines + list(result["notes"])


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def labels_of(names: Sequence[str]) -> list[str]:
    """A name for each run, none twice: numbered where they are alike."""
    found: list[str] = []
    for name in names:
        number, label = 1, name
        while label in found:
            number += 1
            label = f"{name}-{number}"
        found.append(label)
    return found
