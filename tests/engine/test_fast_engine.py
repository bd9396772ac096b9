"""`engine: compiled` gives the numbers of `engine: eager`: every short cut alone, all together, in every setting.

In float64, and with torch.compile itself switched off: tests/engine/test_compiled.py holds what it generates.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from fast_cases import (
    PRESETS,
    SHORT_CUTS,
    Terms,
    assert_same_state,
    assert_same_terms,
    batch_for,
    both_stages,
    compiled,
    new_engine,
    whole_config,
    with_device_scalars,
)

from puat_fast.engine.stats import NonFiniteError
from puat_fast.engine.step import Engine, fast_paths

pytestmark = pytest.mark.usefixtures("one_thread")
REL = 1e-10


@cache
def eager(preset: str) -> tuple[list[Terms], Engine]:
    """What `engine: eager` makes of both stages: terms, and the engine afterwards."""
    engine = new_engine(whole_config(preset, precision="fp64"), stage=1)
    return both_stages(engine), engine


def assert_like_eager(engine: Engine, preset: str) -> None:
    terms, reference = eager(preset)
    assert_same_terms(both_stages(engine), terms, REL)
    assert_same_state(engine, reference, REL)


def fast_engine(preset: str, **fast: bool) -> Engine:
    return new_engine(compiled(whole_config(preset, precision="fp64"), **fast), stage=1)


# -- all short cuts, and one by one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_the_steps_hold_what_they_are_compared_for(preset: str) -> None:
    """Stage 1 with D and G, stage 2 with and without the adversarial terms, two D updates, epochs that end."""
    terms, engine = eager(preset)
    first, *_, last = terms
    assert len(first["D/loss"]) == len(last["D/loss"]) == 2
    assert "A/loss" not in first and "A/loss" in last
    assert ["C/rae" in t for t in terms] == [False] * 4 + [True] * 3
    assert last["C/uae"][0] > 0 and last["C/rae"][0] > 0 and last["C/fake"][0] != 0 and last["C/con"][0] > 0
    assert engine.epoch == 3 and engine.stage == 2
    assert engine.nets.A.training == (preset == "paper")  # official-v1: in eval mode after epoch 1


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
@pytest.mark.parametrize("preset", PRESETS)
def test_all_short_cuts(preset: str, scalars: str) -> None:
    engine = fast_engine(preset)
    assert all(getattr(engine.fast, name) for name in SHORT_CUTS)
    assert_like_eager(engine if scalars == "numbers" else with_device_scalars(engine), preset)


@pytest.mark.parametrize("name", SHORT_CUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_without_one(preset: str, name: str) -> None:
    """A short cut that needs another one, or hides its mistake, is found here."""
    engine = fast_engine(preset, **{name: False})
    assert [n for n in SHORT_CUTS if not getattr(engine.fast, n)] == [name]
    assert_like_eager(engine, preset)


def test_the_eager_engine_takes_none() -> None:
    """But for the weight gradients that nobody reads: it is the truth that the others are held against."""
    fast, off = fast_paths(whole_config(engine="eager"), torch.device("cuda"))
    assert {name: on for name, on in vars(fast).items() if on} == {"skip_weight_grads": True} and off == {}
    nets = new_engine(whole_config()).nets
    assert not nets.D.batched and all(net.compiled is None and net.conv_dtype is None for _, net in nets.items())
    switches = ("pool_conv", "commute", "fold_bn")
    assert not any(getattr(m, name, False) for _, net in nets.items() for m in net.modules() for name in switches)


# -- settings -------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "no unlabelled images": {"data": {"use_unlabelled": False}},
    "none of them for D": {"data": {"mix_frac": 0.0}},
    "nothing else for D": {"data": {"mix_frac": 1.0}},
    "teacher's statistics copied": {"ema": {"bn": "copy"}},
    "teacher's statistics shared": {"ema": {"bn": "shared"}},
    "teacher's statistics averaged": {"ema": {"bn": "average"}},
    "PGD in eval mode": {"rae": {"bn": "eval", "init": "uniform", "source": "labelled"}},
    "labels in eval mode": {"pseudo": {"forward": "eval"}, "uae": {"share_z": True}},
    "the paper's order": {"schedule": {"order": "DACG"}},
    "Haiku init and one D update": {"schedule": {"n_disc": 1}, "gan": {"sn_per_class_lookup": True}},
    "the official code's D": {"preset": "official-v1", "data": {"use_unlabelled": False, "mix_frac": 0.0}},
    "regular": {"method": "regular"},
    "regular, averaged": {"method": "regular", "ema": {"bn": "average"}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting: str) -> None:
    """Stage 2, three adversarial steps in two epochs."""
    overrides = {"pretrain": {"epochs": 0}, "precision": "fp64"} | SETTINGS[setting]
    overrides["schedule"] = {"adv_start": 0} | overrides.get("schedule", {})
    config = whole_config(overrides.pop("preset", "paper"), **overrides)
    reference, ours = new_engine(config), with_device_scalars(new_engine(compiled(config)))
    expected = both_stages(reference, (0, 3))
    assert_same_terms(both_stages(ours, (0, 3)), expected, REL)
    assert_same_state(ours, reference, REL)
    assert ours.stats.read() == pytest.approx(reference.stats.read(), rel=REL, abs=1e-12)


@pytest.mark.parametrize("path", ["numbers", "tensors"])
def test_what_a_metrics_row_shows_is_numbers(path: str) -> None:
    """Also where the step reads tensors, `last_scalars` and the optimiser's groups hold what is logged and saved."""
    engine = new_engine(compiled(whole_config()))
    engine = engine if path == "numbers" else with_device_scalars(engine)
    both_stages(engine, (0, 2))
    assert all(isinstance(v, float) for v in vars(engine.last_scalars).values())
    for group in engine.optimizers["C"].param_groups:
        assert group["lr"] == engine.last_scalars.lr and group["ema_decay"] == engine.last_scalars.ema_decay


@pytest.mark.parametrize("path", ["numbers", "tensors"])
def test_a_term_that_is_not_finite_is_named_with_its_step(path: str) -> None:
    engine = new_engine(compiled(whole_config()))
    engine = engine if path == "numbers" else with_device_scalars(engine)
    for i in range(4):
        batch = batch_for(engine, i)
        if i == 2:
            batch.D[1].x_u.fill_(torch.nan)
        engine.step(batch)
    with pytest.raises(NonFiniteError, match="D/fake_c is not finite in phase D at step 3 of the stage"):
        engine.stats.read()
