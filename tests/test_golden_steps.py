"""Golden files 04, 05, 06, 08, 09: one update of D, G, A and C; losses, gradients, weights and buffers after it.

By the eager engine, and by the short cuts of `engine: compiled`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import golden_cases
import numpy as np
import pytest
import torch
from golden_cases import arrays_of, close, disc_batch, semi_batch

from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.engine.step import Engine
from puat_fast.methods import Scalars
from puat_fast.testing import StepRecorder

ADAM_LR, SGD_LR = 1e-4, 0.05


@pytest.fixture(params=["eager", "compiled"])
def tiny_engine(request: Any) -> Callable[..., Engine]:
    """golden_cases.tiny_engine, of either engine."""
    return partial(golden_cases.tiny_engine, engine=request.param)


def run_phase(engine: Engine, net: str, batch: StepBatch, **scalars: float) -> dict[str, float]:
    """One update of one network through the engine; returns its terms. Gradients stay on the parameters."""
    values = {"lr": SGD_LR, "momentum": 0.9, "bn_momentum": 0.01, "ema_decay": 0, "adv_ramp": 0.5}
    s = Scalars(**(values | {"consistency_weight": 50} | scalars))
    phase = next(phase for phase in engine.next_phases() if phase.net == net)
    for group in engine.optimizers["C"].param_groups:
        group["lr"], group["momentum"] = s.lr, s.momentum
    recorder = StepRecorder()
    engine.on_step = lambda terms: None
    engine._update(phase, batch, s, 0)
    recorder(engine._terms)
    return {name: values[0] for name, values in recorder.steps[0].items()}


def step_batch(case: Mapping[str, np.ndarray], dtype: torch.dtype) -> StepBatch:
    return StepBatch(D=[disc_batch(case, dtype)], C=semi_batch(case, dtype))


def assert_after(
    engine: Engine, net: str, case: Mapping[str, np.ndarray], prefix: str, dtype: torch.dtype, lr: float
) -> None:
    """State after the update; float32 weights may be off by two optimiser steps."""
    state, expected = getattr(engine.nets, net).state_dict(), arrays_of(net, case, prefix)
    assert expected
    for name, array in expected.items():
        if name == "bn.running_mean" and net == "G" and dtype == torch.float32:
            continue  # drifts with the biases whose gradient is round-off (tests/golden/README.md)
        close(state[name], array, dtype, rtol32=1e-4, atol32=2 * lr)


def assert_grads(engine: Engine, net: str, case: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
    grads = {name: p.grad for name, p in getattr(engine.nets, net).named_parameters()}
    expected = arrays_of(net, case, f"grad{net}.")
    assert expected
    for name, array in expected.items():
        scale = float(array.abs().max())
        close(grads[name], array, dtype, rtol32=1e-2, atol32=1e-3 * scale + 1e-7)


def test_discriminator_step(tiny_engine, golden, dtype):
    g = golden["04_disc_step"]
    engine = tiny_engine(dtype, {"z": [g["z"]]})
    b = disc_batch(g, dtype)
    terms = run_phase(engine, "D", step_batch(g, dtype))
    close(terms["D/loss"], g["loss"], dtype)
    for name in ("real", "fake_c", "fake_g"):
        close(terms[f"D/{name}"], g[f"d_{name}_mean"], dtype)
    n_l = int(g["n_labelled_for_d"])
    engine.nets.C.eval()
    method: Any = engine.method
    x_r, y_r = method._real_for_d(b, engine.nets.C(method._x_ud(b)))
    close(x_r, torch.cat([b.x_l[:n_l], b.x_ud[: len(b.x_l) - n_l]]), dtype)
    assert y_r[n_l:].tolist() == g["pseudo_hard"][: len(b.x_l) - n_l].tolist()
    close(engine.nets.C(b.x_u).softmax(1), g["soft"], dtype)
    assert_grads(engine, "D", g, dtype)
    assert_after(engine, "D", g, "D_after.", dtype, ADAM_LR)
    assert_after(engine, "G", g, "G_after.", dtype, 1e-5)


def labels_only(g: Mapping[str, np.ndarray], dtype: torch.dtype) -> StepBatch:
    """For the G and A updates, which read nothing but y_l of the last D batch."""
    empty, y = torch.empty(0, 3, 32, 32, dtype=dtype), torch.from_numpy(g["y_l"])
    return StepBatch(D=[DiscBatch(x_l=empty, y_l=y, x_u=None, x_ud=None)], C=SemiBatch(x_l=empty, y_l=y, x_u=None))


def test_generator_step(tiny_engine, golden, dtype):
    g = golden["05_gen_step"]
    engine = tiny_engine(dtype, {"z": [g["z"]]})
    terms = run_phase(engine, "G", labels_only(g, dtype))
    close(terms["G/loss"], g["loss"], dtype)
    assert_grads(engine, "G", g, dtype)
    assert_after(engine, "G", g, "G_after.", dtype, ADAM_LR)


def test_attacker_step(tiny_engine, golden, dtype):
    g = golden["06_att_step"]
    engine = tiny_engine(dtype, {"z": [g["z"]]})
    terms = run_phase(engine, "A", labels_only(g, dtype))
    close(terms["A/loss"], g["loss"], dtype)
    assert_grads(engine, "A", g, dtype)
    assert_after(engine, "A", g, "A_after.", dtype, ADAM_LR)
    assert_after(engine, "G", g, "G_after.", dtype, 1e-5)


def test_uae(tiny_engine, golden, dtype):
    g = golden["06_att_step"]
    engine = tiny_engine(dtype, {})
    z, y = torch.from_numpy(g["z"]).to(dtype), torch.from_numpy(g["y_l"])
    engine.next_phases()
    with torch.no_grad():
        close(engine.nets.A(z, y), g["z_a"], dtype)
        engine = tiny_engine(dtype, {})
        engine.next_phases()
        x_uae = engine.method._uae(z, y)  # type: ignore[attr-defined]
    close(x_uae, g["x_uae"], dtype, atol32=1e-5)


def test_classifier_step(tiny_engine, golden, dtype):
    g = golden["08_cls_step_adv"]
    engine = tiny_engine(dtype, {"z": [g["z"]], "rae": [g["noise"]]})
    with torch.no_grad():
        for p_ema, p in zip(engine.nets.C_ema.parameters(), engine.nets.C.parameters(), strict=True):
            p_ema.copy_(0.9 * p)
    terms = run_phase(engine, "C", step_batch(g, dtype))
    for name, key in (("sup", "c_sup"), ("con", "c_con"), ("fake", "c_fake"), ("uae", "c_uae"), ("rae", "c_rae")):
        close(terms[f"C/{name}"], g[key], dtype, atol32=1e-5)
    close(terms["C/loss"] - terms["C/fake"], g["loss"], dtype)  # the official log leaves the D term out
    for name, key in (("clean", "clean_acc"), ("rae", "adversarial_acc_rae"), ("uae", "adversarial_acc_uae")):
        assert terms[f"C/{name}_acc"] == pytest.approx(float(g[f"metric.{key}"]), abs=1e-6)
    assert_grads(engine, "C", g, dtype)
    for net, prefix in (("C", "C_after."), ("C_ema", "T_after.")):
        state = getattr(engine.nets, net).state_dict()
        for name, array in arrays_of("C", g, prefix).items():
            close(state[name], array, dtype, atol32=2 * SGD_LR)
    for net in ("G", "A", "D"):
        assert_after(engine, net, g, f"{net}_after.", dtype, 1e-5)


def test_additive_rae_weight_is_a_tenth_of_it(tiny_engine, golden):
    g, dtype = golden["08_cls_step_adv"], torch.float64
    engine = tiny_engine(dtype, {"z": [g["z"]], "rae": [g["noise"]]}, loss={"rae_weight_mode": "additive"})
    terms = run_phase(engine, "C", step_batch(g, dtype))
    close(terms["C/rae"], g["c_rae"] / 10, dtype)


def test_classifier_pretraining_step(tiny_engine, golden, dtype):
    g = golden["09_cls_step_pre"]
    engine = tiny_engine(dtype, {})
    with torch.no_grad():
        for p_ema, p in zip(engine.nets.C_ema.parameters(), engine.nets.C.parameters(), strict=True):
            p_ema.copy_(0.9 * p)
    engine.stage = 1
    terms = run_phase(engine, "C", step_batch(g, dtype), adv_ramp=0, consistency_weight=float(g["cons"]))
    close(terms["C/sup"], g["c_sup"], dtype)
    close(terms["C/con"], g["c_con"], dtype, rtol32=1e-3, atol32=1e-7)
    close(terms["C/loss"], g["loss"], dtype)
    assert terms["C/clean_acc"] == pytest.approx(float(g["metric.clean_acc"]), abs=1e-6)
    assert_grads(engine, "C", g, dtype)
    for net, prefix in (("C", "C_after."), ("C_ema", "T_after.")):
        state = getattr(engine.nets, net).state_dict()
        for name, array in arrays_of("C", g, prefix).items():
            close(state[name], array, dtype, atol32=1e-4)
    assert "C/rae" not in terms and "C/uae" not in terms


def test_gradients_of_others_stay_none(tiny_engine, golden):
    """A phase computes no gradient that nobody reads."""
    g, dtype = golden["06_att_step"], torch.float32
    engine = tiny_engine(dtype, {"z": [g["z"]]})
    run_phase(engine, "A", labels_only(g, dtype))
    for name in ("C", "G", "D"):
        assert all(p.grad is None for p in getattr(engine.nets, name).parameters())
