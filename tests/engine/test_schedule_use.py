"""What the engine makes of the schedules: warm-up, learning rate, momentum, BN momentum, stages (spec 1.4-1.7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_cases import equal_state, parameters, tiny_batch, tiny_config, tiny_engine

from puat_fast.config import Config, merge
from puat_fast.data.splits import Split
from puat_fast.engine import ema
from puat_fast.engine.step import Engine
from puat_fast.engine.trainer import steps_per_epoch
from puat_fast.networks import Networks
from puat_fast.networks.layers import batch_norms
from puat_fast.noise import Noise


def engine_of(config: Config, E: int, stage: int = 2) -> Engine:
    noise = Noise(0)
    small = {"classifier": {"depth": 10, "width": 1}, "gan": {"width": 8, "z_dim": 8}}  # and the sizes of the paper:
    small |= {"schedule.epochs": 100, "schedule.batch_size": 256, "pretrain.epochs": 100, "optim.pct_start": 0.025}
    config = _with(config, small)
    engine = Engine(config, Networks.build(config, 3, noise), noise, E)
    if stage == 2 and engine.stage == 1:
        engine.begin_stage2()
    return engine


def _with(config: Config, changes: dict) -> Config:
    values = config.to_dict()
    merge(values, changes)
    return Config.from_dict(values)


def decay_at(engine: Engine, t: int) -> float:
    """Decay of the teacher in the t-th step of the stage."""
    engine.step_in_stage = t - 1
    return engine.scalars().ema_decay


# -- the teacher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "dataset", "E", "warmup", "W"),
    [
        ("official-v1", "cifar10", 196, None, 245),
        ("official-v1", "cifar100", 196, None, 245),
        ("official-v1", "digits", 6, None, 360),  # as SVHN and ImageNet32: 73257 images
        ("official-v1", "cifar10", 20, 100_000, 490),  # Tiny ImageNet
        ("paper", "cifar10", 196, None, 490),  # the real steps per epoch, as in v2
        ("paper", "cifar10", 98, None, 245),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_warm_up_of_the_teacher(preset, dataset, E, warmup, W, stage):
    overrides = {"ema": {"warmup_images": warmup}} if warmup else {}
    engine = engine_of(Config.preset(preset, dataset=dataset, **overrides), E, stage)
    assert decay_at(engine, 1) == 0 and decay_at(engine, W - 1) == 0
    assert decay_at(engine, W) == pytest.approx(0.1)
    assert decay_at(engine, W + 1) == pytest.approx(2 / 11)


def test_decay_reaches_tau():
    engine = engine_of(Config.preset("official-v1", dataset="cifar10"), 196)
    assert decay_at(engine, 245 + 1789) < 0.995
    assert decay_at(engine, 245 + 1790) == decay_at(engine, 19600) == 0.995
    engine = engine_of(Config.preset("official-v1", dataset="cifar10"), 196, stage=1)
    assert decay_at(engine, 30 * 196) == 0.99
    assert 0.99 < decay_at(engine, 30 * 196 + 1) < 0.999
    assert decay_at(engine, 245 + 8990) == 0.999


def test_the_teacher_is_overwritten_at_the_start_of_stage_2():
    engine = tiny_engine(tiny_config(ema={"warmup_images": 10_000}))
    with torch.no_grad():
        for p in engine.nets.C_ema.parameters():
            p.fill_(float("nan"))  # not even NaN survives
    config = engine.config
    config.loss.consistency_weight = 0
    engine.step(tiny_batch())
    assert equal_state(parameters(engine.nets.C_ema), parameters(engine.nets.C))


def test_without_the_reset_the_teacher_goes_on():
    engine = tiny_engine(tiny_config(ema={"warmup_images": 10_000, "reset_on_stage2": False}))
    assert decay_at(engine, 1) == 0.995
    engine = tiny_engine(tiny_config(ema={"warmup_images": 10_000, "reset_on_stage2": False}), stage=1)
    assert decay_at(engine, 1) == 0  # stage 1 warms up as ever
    alone = tiny_config(ema={"warmup_images": 10_000, "reset_on_stage2": False}, pretrain={"epochs": 0})
    assert decay_at(tiny_engine(alone), 1) == 0  # and so does a stage 2 that nothing preceded


def test_the_teacher_is_the_moving_average():
    engine = tiny_engine(tiny_config())
    engine.step_in_stage = 40
    d = engine.scalars().ema_decay
    assert 0 < d < 0.995
    with torch.no_grad():
        for p in engine.nets.C_ema.parameters():
            p.mul_(0.7)
    before = parameters(engine.nets.C_ema)
    engine.step(tiny_batch())
    for p_ema, old, p in zip(engine.nets.C_ema.parameters(), before, engine.nets.C.parameters(), strict=True):
        torch.testing.assert_close(p_ema, d * old + (1 - d) * p)


def statistics(C: torch.nn.Module) -> list[torch.Tensor]:
    return [t.clone() for norm in batch_norms(C) for t in (norm.running_mean, norm.running_var)]


@pytest.mark.parametrize("bn", ["copy", "shared", "average"])
def test_teacher_statistics(bn):
    engine = tiny_engine(tiny_config(ema={"bn": bn}, optim={"pct_start": 0}))  # no warm-up: decay 0.1 and more
    C, C_ema = engine.nets.C, engine.nets.C_ema
    engine.step(tiny_batch())
    assert not ema.bn_is_shared(C_ema, C)  # only from the first epoch's end on
    engine.step(tiny_batch(seed=1))
    before = statistics(C_ema)
    engine.end_epoch()
    assert ema.bn_is_shared(C_ema, C) is (bn == "shared")
    assert equal_state(statistics(C_ema), statistics(C)) is (bn != "average")
    assert equal_state(statistics(C_ema), before) is (bn == "average")
    engine.step(tiny_batch(seed=2))
    assert equal_state(statistics(C_ema), statistics(C)) is (bn == "shared")
    expected = {"copy": 4, "shared": 5, "average": 4}[bn]  # forwards that moved C's: shared, the teacher's too
    assert int(C.batchnorm.num_batches_tracked) == 2 * 4 + expected


def test_averaged_statistics_are_the_moving_average_of_the_students():
    """ema.bn=average: "the running statistics follow C's by the same moving average as the parameters"."""
    engine = tiny_engine(tiny_config(ema={"bn": "average"}))
    engine.step(tiny_batch())
    engine.step_in_stage = 40
    d, before = engine.scalars().ema_decay, statistics(engine.nets.C_ema)
    engine.step(tiny_batch(seed=1))
    for ours, old, student in zip(statistics(engine.nets.C_ema), before, statistics(engine.nets.C), strict=True):
        torch.testing.assert_close(ours, d * old + (1 - d) * student)


# -- classifier's optimiser -----------------------------------------------------------------------------------------


def groups(engine: Engine) -> set[tuple[float, float]]:
    return {(round(g["lr"], 9), round(g["momentum"], 9)) for g in engine.optimizers["C"].param_groups}


def test_learning_rate_and_momentum_arrive_at_the_optimiser():
    """spec 1.7 for 100 epochs: 0.008, 0.152, 0.199987; momentum 0.95, 0.875, 0.85; constant within an epoch."""
    engine = tiny_engine(tiny_config(schedule={"epochs": 100}), steps_per_epoch=2)
    seen = []
    for _ in range(6):
        engine.step(tiny_batch())
        assert len(groups(engine)) == 1
        seen.append(groups(engine).pop())
    assert seen[0::2] == seen[1::2]
    assert [lr for lr, _ in seen[::2]] == pytest.approx([0.008, 0.152, 0.199987], abs=1e-6)
    assert [m for _, m in seen[::2]] == pytest.approx([0.95, 0.875, 0.85], abs=1e-4)
    engine.step_in_stage = 2 * 99
    engine.step(tiny_batch())
    assert engine.optimizers["C"].param_groups[0]["lr"] == pytest.approx(8e-7)


def test_momentum_that_is_not_cycled():
    engine = tiny_engine(tiny_config(optim={"cycle_momentum": False, "momentum": 0.8}))
    for _ in range(4):
        engine.step(tiny_batch())
        assert {m for _, m in groups(engine)} == {0.8}


def test_no_momentum_at_all():
    engine = tiny_engine(tiny_config(optim={"cycle_momentum": False, "momentum": 0}))
    engine.step(tiny_batch())
    assert {m for _, m in groups(engine)} == {0}


def test_pct_start_moves_the_peak():
    peak = {}
    for pct in (0.05, 0.5):
        engine = tiny_engine(tiny_config(optim={"pct_start": pct}, schedule={"epochs": 20}), steps_per_epoch=1)
        rates = []
        for t in range(20):
            engine.step_in_stage = t
            rates.append(engine.scalars().lr)
        peak[pct] = int(np.argmax(rates)) + 1
    assert peak == {0.05: 1, 0.5: 10}


def test_decay_groups():
    engine = tiny_engine(tiny_config())
    C = engine.nets.C
    decayed, spared = engine.optimizers["C"].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0)
    names = {id(p): name for name, p in C.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {n for n in names.values() if "batchnorm" in n}
    assert {names[id(p)] for p in decayed["params"]} == {n for n in names.values() if "batchnorm" not in n}
    assert "logits.bias" in {names[id(p)] for p in decayed["params"]}
    assert all(g["nesterov"] for g in (decayed, spared))


def test_adams():
    engine = tiny_engine(tiny_config())
    for name in "GDA":
        (group,) = engine.optimizers[name].param_groups
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (1e-4, (0, 0.99), 1e-8, 0)


@pytest.mark.parametrize("stage", [1, 2])
def test_bn_momentum_is_1_in_the_first_step_of_each_stage(stage):
    engine = tiny_engine(tiny_config(), stage=1)
    if stage == 2:
        engine.step(tiny_batch())
        engine.begin_stage2()
    seen = []
    for t in range(3):
        engine.step(tiny_batch(seed=t))
        seen.append({norm.momentum for norm in batch_norms(engine.nets.C)})
    assert seen == [{1.0}, {0.01}, {0.01}]


# -- stages ---------------------------------------------------------------------------------------------------------


def test_stage_2_starts_from_stage_1():
    """C, C', G, D and the Adam states of G and D go on; SGD and A start afresh; the clock restarts."""
    engine = tiny_engine(tiny_config(pretrain={"gan_start": 1}), stage=1)
    fresh_a = parameters(engine.nets.A)
    for t in range(3):
        engine.step(tiny_batch(seed=t))
    weights = {name: parameters(net) for name, net in engine.nets.items()}
    adams = {n: {k: v.clone() for k, v in s.items()} for n in "GD" for s in engine.optimizers[n].state.values()}
    old = {name: engine.optimizers[name] for name in "GDAC"}
    assert old["C"].state
    engine.begin_stage2()
    assert (engine.stage, engine.step_in_stage, engine.epoch) == (2, 0, 1)
    assert {name: parameters(net) for name, net in engine.nets.items()}.keys() == weights.keys()
    assert all(equal_state(parameters(net), weights[name]) for name, net in engine.nets.items())
    assert equal_state(parameters(engine.nets.A), fresh_a) and not engine.optimizers["A"].state
    assert engine.optimizers["G"] is old["G"] and engine.optimizers["D"] is old["D"]
    for n in "GD":
        assert {int(s["step"]) for s in engine.optimizers[n].state.values()} == {3}
        assert equal_state(list(engine.optimizers[n].state.values())[-1], adams[n])
    assert engine.optimizers["C"] is not old["C"] and not engine.optimizers["C"].state


def test_teacher_buffers_are_its_own_again_in_stage_2():
    engine = tiny_engine(tiny_config("official-v1"), stage=1)
    engine.step(tiny_batch())
    engine.end_epoch()
    assert ema.bn_is_shared(engine.nets.C_ema, engine.nets.C)
    engine.begin_stage2()
    assert not ema.bn_is_shared(engine.nets.C_ema, engine.nets.C)
    assert equal_state(statistics(engine.nets.C_ema), statistics(engine.nets.C))


def test_ramps_restart_with_the_stage():
    engine = tiny_engine(tiny_config(pretrain={"consistency_ramp": 4}, schedule={"adv_end": 10}), stage=1)
    assert engine.scalars().adv_ramp == 0
    assert engine.scalars().consistency_weight == pytest.approx(50 * np.exp(-5))
    engine.step_in_stage = 8
    assert engine.scalars().consistency_weight == 50
    engine.begin_stage2()
    assert engine.scalars().adv_ramp == pytest.approx(0.00674, abs=1e-5)
    assert engine.scalars().consistency_weight == 50
    engine.step_in_stage = 20
    assert engine.scalars().adv_ramp == 1


# -- steps per epoch ------------------------------------------------------------------------------------------------


def split_of(labelled: int, unlabelled: int) -> Split:
    index = np.arange(labelled + unlabelled)
    n_val = labelled // 5
    return Split(index[n_val:labelled], index[labelled:], index[:n_val], index[:labelled])


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "options", "E"),
    [
        (4000, 46000, {}, 196),
        (10000, 40000, {}, 196),
        (4000, 46000, {"schedule": {"epoch_multiplier": 1}}, 98),
        (1000, 72257, {}, 288),
        (1000, 4000, {}, 20),
        (1000, 11850, {}, 52),
        (4000, 46000, {"data": {"use_unlabelled": False}}, 16),
        (4000, 46000, {"schedule": {"steps_per_epoch": 7}}, 7),
    ],
)
def test_steps_per_epoch(labelled, unlabelled, options, E):
    config = Config.preset("paper", dataset="cifar10", **options)
    assert steps_per_epoch(config, split_of(labelled, unlabelled)) == E
