"""What torch.compile makes of the networks: the eager engine's losses, and nothing compiled twice.

The only module that compiles with inductor: one trainer for each preset, whose networks all tests share. The second
preset's graphs are the first one's but for a few, and come from torch's cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_cases import PRESETS, assert_same_terms, batch_for, compiled, new_engine, whole_config
from tiny_cases import B, K, run_config, tiny_dataset
from torch._dynamo.utils import counters

from puat_fast.config import Config
from puat_fast.engine import compiling
from puat_fast.engine.step import Engine
from puat_fast.engine.trainer import Trainer
from puat_fast.testing import step_terms

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick"),
    pytest.mark.skipif(compiling.why_not("cpu") is not None, reason=str(compiling.why_not("cpu"))),
]

STEPS = 25  # of each stage


def training_config(out: Path, preset: str) -> Config:
    """Three epochs of two steps in each stage, with validation, whose last batch is of another size, and pictures."""
    values: dict[str, Any] = {
        "schedule": {"epochs": 3, "steps_per_epoch": 2, "adv_start": 0, "adv_end": 1},
        "pretrain": {"epochs": 3, "gan_start": 2},
        "data": {"n_labelled": 21},
        "log": {"sample_every": 1},
    }
    config = compiled(whole_config(preset), compile=True).to_dict()
    changed = run_config(out, preset, **values).to_dict()
    for group in ("out", "data", "schedule", "pretrain", "val", "log"):
        config[group] = changed[group]
    return Config.from_dict(config | {"schedule": config["schedule"] | {"n_disc": 2}})


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Callable[[str], Trainer]]:
    """trainer_of(preset): a trainer on a tiny dataset, whose networks are compiled; made once."""
    torch._dynamo.reset()

    @cache
    def made(preset: str) -> Trainer:
        config = training_config(tmp_path_factory.mktemp(preset) / "run", preset)
        return Trainer(config, dataset=tiny_dataset(K, train=60, test=9))

    yield made
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs dynamo has compiled."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_compiles_each_graph_once(preset: str, trainer_of: Callable[[str], Trainer]) -> None:
    """Whatever an epoch's end does, with modes, statistics and batches of other sizes, compiles nothing."""
    trainer = trainer_of(preset)
    assert all(net.compiled is not None for _, net in trainer.nets.items())
    counters.clear()
    by_epoch, end_epoch = list[tuple[int, int]](), trainer._end_epoch

    def counted() -> None:
        before = graphs()
        end_epoch()
        by_epoch.append((before, graphs()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_end_epoch", counted)
        trainer.fit()
    assert len(trainer.val[1]) > B and not counters["graph_break"]
    assert all(before == after for before, after in by_epoch), by_epoch
    first, second, third = (after for _, after in by_epoch[:3])  # stage 1; D and G from its second epoch on
    assert first <= second == third
    _, second, third = (after for _, after in by_epoch[3:])  # stage 2; official-v1: A in eval mode from the second on
    assert 0 < second == third <= 20, by_epoch  # graphs are shared by networks of one shape: the second preset has few


@pytest.mark.parametrize("preset", PRESETS)
def test_fifty_steps_like_the_eager_engine(preset: str, trainer_of: Callable[[str], Trainer]) -> None:
    """Stage 1, then stage 2; update by update from the same state: none can hide in the chaos of the next ones."""
    ours = trainer_of(preset).engine
    reference = new_engine(whole_config(preset, schedule={"adv_start": 0, "adv_end": 1}), stage=1, steps_per_epoch=10)
    ours.steps_per_epoch, ours.config = 10, copy.deepcopy(ours.config)
    ours.config.schedule.epochs = ours.config.pretrain.epochs = reference.config.schedule.epochs
    reference.config.pretrain.epochs, reference.config.pretrain.gan_start = reference.config.schedule.epochs, 1
    ours.config.pretrain.gan_start = ours.method.config.pretrain.gan_start = 1  # type: ignore[attr-defined]
    ours.load_state_dict(copy.deepcopy(reference.state_dict()))
    follow(reference, ours)
    for stage in (1, 2):
        for i in range(STEPS):
            reference.load_state_dict(copy.deepcopy(ours.state_dict()))
            batch = batch_for(reference, 100 * stage + i)
            actual = step_terms(ours, batch)
            assert_same_terms([actual], [step_terms(reference, batch)], rel=1e-5, abs_=1e-6)
            assert_close_weights(ours, reference)
        for engine in (ours, reference):
            engine.end_epoch()
            if stage == 1:
                engine.begin_stage2()
    del ours._update  # others use this trainer too


def follow(reference: Engine, ours: Engine) -> None:
    """Before each update, `reference` takes over the weights, buffers and optimisers that `ours` had before it.

    So that within a step too a loss shows its own rounding, and not what Adam made of that of an update before: where a
    gradient of G or A is next to nothing, its step is as long as anywhere else, in a direction of the rounding.
    """
    states: list[dict[str, Any]] = []
    own, followed = reference._update, ours._update

    def recorded(*args: Any) -> None:
        parts = {"networks": dict(ours.nets.items()), "optimizers": ours.optimizers}
        states.append(
            {name: copy.deepcopy({k: m.state_dict() for k, m in part.items()}) for name, part in parts.items()}
        )
        followed(*args)

    def taking_over(*args: Any) -> None:
        state = states.pop(0)
        for name, net in reference.nets.items():
            net.load_state_dict(state["networks"][name])
        for name, optimizer in reference.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        own(*args)

    ours._update, reference._update = recorded, taking_over  # type: ignore[method-assign]


def assert_close_weights(ours: Engine, reference: Engine) -> None:
    """Of C, C' and D; G and A have biases whose gradient is rounding alone, of which Adam makes whole steps."""
    for name in ("C", "C_ema", "D"):
        theirs = getattr(reference.nets, name).state_dict()
        for key, value in getattr(ours.nets, name).state_dict().items():
            largest = max(float(theirs[key].abs().max()), 1e-3)
            assert float((value - theirs[key]).abs().max()) <= 1e-3 * largest, f"{name}.{key}"
