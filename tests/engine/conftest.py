"""Runs that are quick."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_cases import quicken


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """`quicken`, for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks by one thread: as fast, and not slowed down by what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
