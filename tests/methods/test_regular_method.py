"""Regular: cross-entropy on labelled images in the engine of PUAT."""

from __future__ import annotations

import pytest
import torch
from tiny_cases import Watch, equal_state, parameters, tiny_batch, tiny_config, tiny_engine

from puat_fast import objectives as L
from puat_fast.data.batch import SemiBatch, StepBatch


def test_one_stage_one_phase_one_forward():
    engine = tiny_engine(tiny_config("paper", method="regular"))
    assert engine.method.stages == (2,) and engine.num_disc_batches() == 0
    b = tiny_batch().C
    before = {name: parameters(net) for name, net in engine.nets.items()}
    C, others = Watch(engine.nets.C), [Watch(engine.nets.G), Watch(engine.nets.D), Watch(engine.nets.C_ema)]
    engine.step(StepBatch(D=[], C=SemiBatch(b.x_l, b.y_l, None)))
    assert engine.stats.read()["C/loss"] == pytest.approx(float(L.cross_entropy(C.outputs[0], b.y_l, 0.1)), rel=1e-6)
    assert len(C.inputs) == 1 and C.training == [True] and not any(w.inputs for w in others)
    changed = {name for name, net in engine.nets.items() if not equal_state(parameters(net), before[name])}
    assert changed == {"C", "C_ema"}


def test_it_learns():
    engine = tiny_engine(tiny_config("paper", method="regular", schedule={"epochs": 10}), steps_per_epoch=4)
    b = tiny_batch().C
    batch = StepBatch(D=[], C=SemiBatch(b.x_l, b.y_l, None))
    for _ in range(40):
        engine.step(batch)
    with torch.no_grad():
        assert (engine.nets.C.eval()(b.x_l).argmax(1) == b.y_l).all()
