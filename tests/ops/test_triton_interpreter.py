"""The tests of every Triton op again, in a process in which Triton's interpreter runs the kernels on the CPU.

A process of its own: Triton reads the variable when a kernel is defined, and what is defined so cannot be compiled.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")} - {"batch_stats"}  # which other ops launch
FILES = [*(f"tests/ops/test_{op}.py" for op in sorted(KERNELS)), "tests/engine/test_ops_in_training.py"]


def version(distribution: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(distribution).split(".")[:2])


@pytest.mark.skipif(
    version("triton") < (3, 9) and version("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6, perhaps up to 3.8, fails in loops with NumPy 2.4 and later",
)
@pytest.mark.parametrize("file", FILES)
def test_kernels_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpret", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, ROOT / file], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]  # no test selected is 5
