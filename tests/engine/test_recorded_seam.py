"""The seam of puat_fast.testing: record a normal run's batches and draws, replay them, get the same terms."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from tiny_cases import run_config, tiny_batch, tiny_config, tiny_dataset, tiny_engine

from puat_fast.engine.trainer import Trainer
from puat_fast.noise import Noise
from puat_fast.testing import RecordedLoader, RecordedNoise, StepRecorder, step_terms

pytestmark = pytest.mark.usefixtures("quick")


class RecordingNoise(Noise):
    """Keeps every draw by name."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.draws: dict[str, list[torch.Tensor]] = defaultdict(list)

    def normal(self, name, shape):
        """Draw and keep."""
        self.draws[name].append(super().normal(name, shape))
        return self.draws[name][-1].clone()

    def uniform(self, name, shape):
        """Draw and keep."""
        self.draws[name].append(super().uniform(name, shape))
        return self.draws[name][-1].clone()


@pytest.mark.parametrize(("preset", "init"), [("paper", "uniform"), ("official-v1", "gauss")])
def test_a_replayed_run_has_the_terms_of_the_recorded_one(tmp_path, preset, init):
    noise, recorded, batches = RecordingNoise(5), StepRecorder(), []
    options = {"rae": {"init": init}}
    trainer = Trainer(
        run_config(tmp_path / "a", preset, **options), dataset=tiny_dataset(), noise=noise, on_step=recorded
    )
    make_loader = trainer._make_loader

    def recording() -> Any:
        loader = make_loader()
        next_step = loader.next_step

        def kept(n_disc: int) -> Any:
            batches.append(next_step(n_disc))
            return copy.deepcopy(batches[-1])

        loader.next_step = kept
        return loader

    trainer._make_loader, trainer.loader = recording, recording()
    first = trainer.fit()
    assert len(batches) == len(recorded.steps) == 12
    assert {"z", "rae", "augment/top", "augment/left", "augment/flip"} == set(noise.draws)

    replayed = StepRecorder()
    replay = RecordedNoise(noise.draws)
    config = run_config(tmp_path / "b", preset, **options)
    loader = RecordedLoader(batches)
    second = Trainer(config, dataset=tiny_dataset(), loader=loader, noise=replay, on_step=replayed).fit()
    assert replayed.steps == recorded.steps
    assert second.summary == first.summary
    assert all(next(draws, None) is None for draws in replay.draws.values())  # nothing was left over


def test_draws_of_one_step_in_the_documented_order():
    class Names(Noise):
        def normal(self, name, shape):
            names.append((name, tuple(shape)))
            return super().normal(name, shape)

    names: list = []
    engine = tiny_engine(tiny_config(schedule={"n_disc": 2}), Names(0))
    engine.step(tiny_batch(2))
    z = ("z", (4, 8))
    assert names == [z, z, z, z, z, ("rae", (4, 3, 32, 32))]  # D, D, G, A, C's UAEs, RAE start


def test_a_used_up_loader_is_told(tmp_path):
    trainer = Trainer(run_config(tmp_path / "run", pretrain={"epochs": 0}), dataset=tiny_dataset(3),
                      loader=RecordedLoader([tiny_batch()]))  # fmt: skip
    with pytest.raises(LookupError, match="no recorded StepBatch is left"):
        trainer.fit()


def test_too_few_d_batches_are_told():
    with pytest.raises(LookupError, match="has 1 D batches, the step asks 2"):
        RecordedLoader([tiny_batch(1)]).next_step(2)


def test_used_up_and_misshapen_draws_are_told():
    noise = RecordedNoise({"z": [torch.zeros(2, 8)]})
    with pytest.raises(LookupError, match=r"'z' has shape \(2, 8\), the step asks \(4, 8\)"):
        noise.normal("z", (4, 8))
    with pytest.raises(LookupError, match="no recorded draw is left under the name 'z'"):
        noise.normal("z", (2, 8))
    with pytest.raises(LookupError, match="'rae'"):
        noise.uniform("rae", (1,))


def test_a_step_that_runs_out_of_draws_stops():
    engine = tiny_engine(tiny_config(), RecordedNoise({"z": [torch.zeros(4, 8)] * 3}))
    with pytest.raises(LookupError, match="'z'"):
        step_terms(engine, tiny_batch())
