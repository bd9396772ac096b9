"""Runs that are quick."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_cases import quicken


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """`quicken`, for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield
