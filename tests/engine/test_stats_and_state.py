"""Loss statistics that wait for nothing, and the engine's state: saved in the middle, continued bit for bit."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from tiny_cases import LATE, equal_state, run_phase, tiny_batch, tiny_config, tiny_engine
from torch.utils._python_dispatch import TorchDispatchMode

from puat_fast.engine import ema
from puat_fast.engine.stats import NonFiniteError, Stats
from puat_fast.methods import Scalars
from puat_fast.noise import Noise
from puat_fast.testing import StepRecorder, step_terms

# -- statistics -----------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a value: .item(), float(), bool(), nonzero, copies to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_means_since_the_last_reset():
    stats = Stats()
    for value in (1.0, 2.0, 6.0):
        stats.report("C/loss", torch.tensor(value))
    stats.report("G/loss", torch.tensor(-1.0, dtype=torch.float64))
    assert stats.read() == {"C/loss": 3, "G/loss": -1} == stats.read()
    stats.reset()
    assert stats.read() == {}
    stats.report("C/loss", torch.tensor(5.0))
    assert stats.read() == {"C/loss": 5}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_is_told_with_phase_term_and_first_step(bad):
    stats = Stats()
    for step in range(1, 8):
        stats.step = step
        for name in ("D/loss", "C/uae", "C/rae"):
            stats.report(
                name, torch.tensor(bad if (name, step) in {("C/rae", 4), ("C/rae", 6), ("D/loss", 5)} else 1.0)
            )
    with pytest.raises(NonFiniteError, match=r"C/rae is not finite in phase C at step 4 of the stage"):
        stats.read()
    with pytest.raises(NonFiniteError):  # reading again tells it again: it is not forgotten
        stats.read()


def test_a_bad_value_survives_the_checkpoint():
    stats, loaded = Stats(), Stats()
    stats.step = 3
    stats.report("A/loss", torch.tensor(float("nan")))
    loaded.load_state_dict(stats.state_dict(), torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=r"A/loss .* step 3"):
        loaded.read()


def test_the_culprit_is_named_and_not_the_sum():
    """When only the UAE term is bad, the message says so, instead of C/loss which holds every term."""
    engine = tiny_engine(tiny_config())
    forwards = itertools.count()
    engine.nets.C.register_forward_hook(lambda m, x, out: out * float("nan") if next(forwards) == 0 else out)
    run_phase(engine, "C", tiny_batch())
    with pytest.raises(NonFiniteError, match=r"^C/uae "):
        engine.stats.read()


def test_report_reads_nothing():
    stats = Stats()
    with Reads() as reads:
        for _ in range(3):
            stats.report("C/loss", torch.tensor(1.0))
    assert reads.names == []
    with Reads() as reads:
        stats.read()
    assert reads.names == []  # one copy of the whole table, no value by value


@pytest.mark.parametrize("preset", ["paper", "official-v1"])
@pytest.mark.parametrize("net", ["D", "G", "A", "C"])
def test_no_phase_waits_for_the_device(preset, net):
    """Loss, backward and report of every phase without a single .item() or data-dependent shape."""
    engine = tiny_engine(tiny_config(preset, augment={"crop_pad": 4, "flip": True, "rotate_deg": 5}))
    phase = next(p for p in engine.next_phases() if p.net == net)
    batch = tiny_batch()
    with Reads() as reads, engine.nets.training_only(net):
        for part in phase.loss(batch, Scalars(**LATE), 0):
            part.backward()
    assert reads.names == []


# -- state ----------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def engine_for(preset: str, stage: int, seed: int = 7):
    config = tiny_config(preset, augment={"crop_pad": 4, "flip": True}, pretrain={"gan_start": 1})
    return tiny_engine(config, Noise(seed), steps_per_epoch=3, stage=stage)


def go(engine, steps: range) -> list[dict]:
    terms = []
    for t in steps:
        terms.append(step_terms(engine, tiny_batch(seed=t)))
        if engine.step_in_stage % engine.steps_per_epoch == 0:
            engine.end_epoch()
    return terms


@pytest.mark.parametrize("preset", ["paper", "official-v1"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("at", [1, 3, 4], ids=["mid-epoch", "epoch-end", "mid-epoch-2"])
def test_continued_is_uninterrupted(preset, stage, at):
    whole = engine_for(preset, stage)
    expected = go(whole, range(5))

    first = engine_for(preset, stage)
    go(first, range(at))
    state = through_a_file(first.state_dict())
    second = engine_for(preset, 1, seed=99)  # as a new process makes it, but with another noise
    second.load_state_dict(state)
    assert second.stage == stage
    terms = go(second, range(at, 5))

    assert terms == expected[at:]
    assert equal_state(second.state_dict(), whole.state_dict())
    shared = preset == "official-v1"
    assert ema.bn_is_shared(second.nets.C_ema, second.nets.C) is shared


def test_shared_buffers_are_one_tensor_again():
    first = engine_for("official-v1", 2)
    go(first, range(3))
    second = engine_for("official-v1", 1)
    second.load_state_dict(through_a_file(first.state_dict()))
    C, C_ema = second.nets.C, second.nets.C_ema
    C.batchnorm.running_mean.fill_(42)
    assert (C_ema.batchnorm.running_mean == 42).all()
    assert C.state_dict()["batchnorm.running_mean"].data_ptr() == C_ema.batchnorm.running_mean.data_ptr()


def test_state_can_be_loaded_into_an_engine_that_has_run_on():
    """Rolling back: the state of stage 1, buffers apart, into an engine in stage 2 with shared ones."""
    engine = engine_for("official-v1", 1)
    go(engine, range(2))
    state = copy.deepcopy(engine.state_dict())
    expected = go(engine, range(2, 4))
    engine.begin_stage2()
    go(engine, range(3))
    engine.load_state_dict(state)
    assert engine.stage == 1
    assert go(engine, range(2, 4)) == expected


def test_layouts_and_optimiser_state_survive():
    first = engine_for("paper", 2)
    go(first, range(2))
    second = engine_for("paper", 1)
    second.load_state_dict(through_a_file(first.state_dict()))
    for name in "GDAC":
        a, b = (e.optimizers[name].state_dict() for e in (first, second))
        assert equal_state(a, b), name
    for p, q in zip(first.nets.C.parameters(), second.nets.C.parameters(), strict=True):
        assert p.stride() == q.stride()


def test_a_failed_step_does_not_leak_terms_into_the_next():
    engine = engine_for("paper", 2)
    bad = tiny_batch()
    bad.C.x_l = bad.C.x_l[:, :, :16]
    with pytest.raises(ValueError, match="x: shape"):
        step_terms(engine, bad)
    assert all(len(v) == 1 for v in step_terms(engine, tiny_batch()).values())


def test_on_step_gets_the_terms_of_each_step():
    engine, recorder = engine_for("paper", 2), StepRecorder()
    engine.on_step = recorder
    engine.step(tiny_batch())
    engine.step(tiny_batch(seed=1))
    assert len(recorder.steps) == 2
    assert set(recorder.steps[0]) == set(recorder.steps[1]) >= {"D/loss", "G/loss", "A/loss", "C/loss", "C/rae"}
    mean = sum(s["C/loss"][0] for s in recorder.steps) / 2
    assert engine.stats.read()["C/loss"] == pytest.approx(mean, rel=1e-6)


def test_terms_of_five_d_updates():
    engine, recorder = tiny_engine(tiny_config(schedule={"n_disc": 5})), StepRecorder()
    engine.on_step = recorder
    engine.step(tiny_batch(5))
    assert [len(recorder.steps[0][n]) for n in ("D/loss", "D/real", "G/loss", "C/loss")] == [5, 5, 1, 1]
