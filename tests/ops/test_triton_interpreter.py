"""The tests of every Triton op again, in a process in which Triton's interpreter runs the kernels on the CPU.

A process of its own: Triton reads the variable when a kernel is defined, and what is defined so cannot be compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = sorted(p.stem for p in (TESTS.parents[1] / "kernels").glob("[!_]*.py"))
HELPERS = {"batch_stats"}  # kernels that other ops launch, without an op of their own


@pytest.mark.parametrize("op", [op for op in KERNELS if op not in HELPERS])
def test_kernels_interpreted(op: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpret", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, TESTS / f"test_{op}.py"], env=environment, capture_output=True, text=True, cwd=TESTS.parents[1]
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]  # no test selected is 5
