"""What all tests share: the golden files, and small networks that hold their weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported: see puat_fast/__init__.py

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests: `import golden_cases`


@pytest.fixture(scope="session")
def golden() -> Mapping[str, Mapping[str, np.ndarray]]:
    """golden["04_disc_step"]["loss"]: the reference numbers of the official code."""
    from golden_cases import Golden

    return Golden()


@pytest.fixture(params=["float64", "float32"])
def dtype(request: Any) -> torch.dtype:
    """Golden tests run in both."""
    return {"float64": torch.float64, "float32": torch.float32}[request.param]
