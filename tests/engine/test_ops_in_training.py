"""The trainer takes the ops where they are exact: with and without them a run has the same losses, to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_cases import tiny_batch, tiny_config, tiny_engine
from torch.utils._python_dispatch import TorchDispatchMode

from puat_fast.engine.step import Engine
from puat_fast.ops import reference_only
from puat_fast.ops._library import INTERPRETED
from puat_fast.testing import step_terms

STEPS = 50
CONFIG = {
    "augment": {"crop_pad": 4, "flip": True, "rotate_deg": 15.0},
    "schedule": {"adv_start": 0, "adv_end": 1},
    "optim": {"lr": 0.01},  # batches of four: at the usual rate the losses run away
}


def engines(preset: str, **overrides: object) -> tuple[Engine, Engine]:
    """Two engines of the same weights, noise and counters."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(tiny_engine(tiny_config(preset, **(CONFIG | overrides)), steps_per_epoch=10))
    return pair[0], pair[1]


def assert_same_weights(ours: Engine, reference: Engine) -> None:
    """Those of C, its teacher and D within a thousandth of the largest of their tensor.

    G and A have biases whose true gradient is zero, of which Adam makes steps in the direction of the rounding.
    """
    for name in ("C", "C_ema", "D"):
        theirs = getattr(reference.nets, name).state_dict()
        for key, value in getattr(ours.nets, name).state_dict().items():
            largest = max(float(theirs[key].abs().max()), 1e-3)
            assert float((value - theirs[key]).abs().max()) <= 1e-3 * largest, f"{name}.{key}"


def assert_same_steps(preset: str, steps: int, **overrides: object) -> None:
    """Step by step from the same state, along our trajectory: no step can hide in the chaos of the next ones."""
    ours, reference = engines(preset, **overrides)
    for i in range(steps):
        reference.load_state_dict(copy.deepcopy(ours.state_dict()))  # optimisers would keep the tensors themselves
        batch = tiny_batch(n_disc=ours.num_disc_batches(), seed=i)
        with reference_only():
            expected = step_terms(reference, batch)
        assert all(abs(v) < 500 for values in expected.values() for v in values)
        assert step_terms(ours, batch) == {name: pytest.approx(v, rel=1e-4, abs=1e-5) for name, v in expected.items()}
        assert_same_weights(ours, reference)


@pytest.mark.parametrize("preset", ["paper", "official-v1"])
def test_fifty_steps_with_and_without(preset: str) -> None:
    assert_same_steps(preset, STEPS)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="tests/ops/test_triton_interpreter.py runs it, in Triton's interpreter")
def test_step_with_interpreted_kernels() -> None:
    """All of Triton's kernels at their places in training."""
    assert_same_steps("paper", 1, attack={"num_steps": 1})  # interpreted, a forward of C takes seconds


class CallsOfOurOps(TorchDispatchMode):
    """The names of the registered ops of ours that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "puat_fast":
            self.names.add(func._schema.name.removeprefix("puat_fast::"))
        return func(*args, **(kwargs or {}))


def test_a_step_takes_the_ops() -> None:
    ours, reference = engines("official-v1")
    batch = tiny_batch(n_disc=ours.num_disc_batches())
    with CallsOfOurOps() as calls:
        ours.step(batch)
    on_the_cpu = {"adam_", "augment", "augment_backward", "pgd_step", "sgd_ema_"}
    assert on_the_cpu <= calls.names
    for op in ("bn_silu", "spectral_norm"):
        assert any(name.startswith(op) for name in calls.names), calls.names
    with CallsOfOurOps() as calls, reference_only():
        reference.step(batch)
    assert calls.names == set()
