"""Who imports whom (design.md 2): top to bottom, never upward. And what may not be imported at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "puat_fast"

# A part may import itself and parts of a lower rank, nothing else of ours.
RANKS = {
    "config": 0, "files": 0, "noise": 0, "kernels": 0, "_C": 0,
    "ops": 1,
    "info": 2, "bench": 2,
    "options": 3, "runlog": 3, "plots": 3, "objectives": 3, "data": 3,
    "networks": 4,
    "attacks": 5, "weights": 5,
    "methods": 6, "checkpoint": 6,
    "engine": 7, "export": 7,
    "evaluation": 8, "testing": 8,
    "terminal": 4, "data_verbs": 5, "export_verb": 8, "eval_verb": 9,
    "cli": 10,
    "__main__": 11,
}  # fmt: skip


def modules() -> list[Path]:
    """All but the package's own __init__, which offers names of every layer, lazily."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def our_imports(path: Path) -> Iterator[str]:
    """Dotted names below puat_fast that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("puat_fast.") for name in names if name.startswith("puat_fast."))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_rank():
    assert {part(path) for path in modules()} <= set(RANKS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    importer = part(path)
    for name in our_imports(path):
        imported = name.split(".")[0]
        if imported in (importer, "__version__"):
            continue
        assert RANKS[imported] < RANKS[importer], f"{path.name} ({importer}) may not import {name}"


def test_ops_know_no_networks_and_objectives_no_optimisers():
    for path in modules():
        text = path.read_text(encoding="utf-8")
        if part(path) == "ops":
            assert "torch.nn.Module" not in text and "nn.Module" not in text, path
        if part(path) in ("objectives", "attacks", "networks", "ops"):
            assert "optim" not in text and ".backward()" not in text, path


def test_nobody_imports_the_source_folder_of_the_kernels():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name == "kernels" or name.startswith("kernels.") for name in names), path
