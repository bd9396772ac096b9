"""The trainer takes the ops where they are exact: with and without them a run has the same losses, to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_cases import tiny_batch, tiny_config, tiny_engine

from puat_fast.engine.step import Engine
from puat_fast.ops import reference_only
from puat_fast.testing import step_terms

STEPS = 50
CONFIG = {"augment": {"crop_pad": 4, "flip": True, "rotate_deg": 15.0}, "schedule": {"adv_start": 0, "adv_end": 1}}


def engines(preset: str, **overrides: object) -> tuple[Engine, Engine]:
    """Two engines of the same weights, noise and counters."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(tiny_engine(tiny_config(preset, **(CONFIG | overrides)), steps_per_epoch=10))
    return pair[0], pair[1]


def assert_same_weights(ours: Engine, reference: Engine, tolerance: float) -> None:
    """Every weight and buffer within `tolerance` of the largest of its tensor."""
    for name, net in ours.nets.items():
        theirs = dict(reference.nets)[name].state_dict()
        for key, value in net.state_dict().items():
            largest = max(float(theirs[key].abs().max()), 1e-3)
            assert float((value - theirs[key]).abs().max()) <= tolerance * largest, f"{name}.{key}"


@pytest.mark.parametrize("preset", ["paper", "official-v1"])
def test_fifty_steps_with_and_without(preset: str) -> None:
    """Step by step from the same state: what one step turns into, no step may hide in the chaos of the next ones."""
    ours, reference = engines(preset)
    for i in range(STEPS):
        reference.load_state_dict(copy.deepcopy(ours.state_dict()))  # optimisers would keep the tensors themselves
        batch = tiny_batch(n_disc=ours.num_disc_batches(), seed=i)
        with reference_only():
            expected = step_terms(reference, batch)
        assert step_terms(ours, batch) == {name: pytest.approx(v, rel=1e-4, abs=1e-5) for name, v in expected.items()}
