"""The sampler against the official batches (golden 14), its statistics, and going on from a saved state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from puat_fast.data import LabelledSampler, SemiSupervisedSampler, ShardedSampler

LABELLED, UNLABELLED = np.arange(100, 110), np.arange(200, 260)


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def make(kind, seed=5):
    if kind == "labelled":
        return LabelledSampler(LABELLED, 4, seed)
    return SemiSupervisedSampler(LABELLED, UNLABELLED if kind == "semi" else UNLABELLED[:0], 4, seed)


def test_golden(golden_data):
    golden = golden_data["sampler_batches"]
    labelled, unlabelled = golden_data["sampler_sup"], golden_data["sampler_unsup"]
    sampler = SemiSupervisedSampler(labelled, unlabelled, golden.shape[1] // 2, int(golden_data["sampler_seed"]))
    np.testing.assert_array_equal([batch.indices for batch in take(sampler, len(golden))], golden)


def test_global_generators_are_left_alone():
    def states():
        _, keys, position, *_ = np.random.get_state()  # noqa: NPY002 (the global generator is what is looked at)
        return torch.get_rng_state().tolist(), keys.tolist(), position

    before = states()
    take(make("semi"), 9)
    assert states() == before


def test_halves_keep_the_shuffled_order():
    for batch in take(make("semi"), 20):
        assert len(batch.indices) == 8 and len(batch.labelled) == len(batch.unlabelled) == 4
        np.testing.assert_array_equal(batch.indices[batch.indices < 200], batch.labelled)
        np.testing.assert_array_equal(batch.indices[batch.indices >= 200], batch.unlabelled)
        assert batch.indices.dtype == batch.labelled.dtype == batch.unlabelled.dtype == np.int64


@pytest.mark.parametrize("kind", ["semi", "labelled"])
def test_labelled_images_come_once_per_permutation_and_the_last_chunk_is_filled_from_the_earlier(kind):
    batches = [set(batch.labelled) for batch in take(make(kind), 300)]
    fills = []
    for a, b, c in zip(batches[::3], batches[1::3], batches[2::3], strict=True):
        assert len(a) == len(b) == 4 and not a & b
        assert a | b | c == set(LABELLED)  # 10 = 4 + 4 + 2: the third holds the two that are left, and two more
        fills.append(c & (a | b))
    assert {len(fill) for fill in fills} == {1, 2}  # with replacement: sometimes the same image twice


def test_unlabelled_draws_are_uniform_with_replacement():
    drawn = np.concatenate([batch.unlabelled for batch in take(make("semi"), 3000)])
    counts = np.bincount(drawn - 200, minlength=60)
    expected = len(drawn) / 60
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 59 degrees of freedom: p < 1e-4
    assert any(len(set(batch.unlabelled)) < 4 for batch in take(make("semi"), 200))


def test_positions_are_mixed():
    places = np.array([batch.indices < 200 for batch in take(make("semi"), 2000)]).mean(axis=0)
    assert places.shape == (8,) and np.abs(places - 0.5).max() < 0.06


def test_without_unlabelled_data_the_batch_is_labelled_throughout():
    for batch in take(make("none"), 10):
        assert len(batch.indices) == len(batch.labelled) == 8 and len(batch.unlabelled) == 0
        assert set(batch.indices) <= set(LABELLED)


def test_labelled_only():
    for batch in take(make("labelled"), 10):
        assert len(batch.indices) == len(batch.labelled) == 4 and len(batch.unlabelled) == 0


def test_a_batch_larger_than_the_labelled_set():
    for batch in take(SemiSupervisedSampler(LABELLED[:3], UNLABELLED, 8, 1), 10):
        assert len(batch.labelled) == 8 and set(batch.labelled) == set(LABELLED[:3])


@pytest.mark.parametrize("kind", ["semi", "none", "labelled"])
@pytest.mark.parametrize("stop", range(8))
def test_resume_at_any_batch(kind, stop, tmp_path):
    straight = [batch.indices for batch in take(make(kind), stop + 400)][stop:]
    first = make(kind)
    take(first, stop)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    take(first, 5)  # the saved state must not move with the sampler
    second = make(kind, seed=99)
    take(second, 2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal([batch.indices for batch in take(second, 400)], straight)


def test_state_does_not_alias_the_sampler():
    sampler = make("semi")
    take(sampler, 1)
    state = sampler.state_dict()
    saved = {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
    other = make("semi")
    other.load_state_dict(state)
    take(sampler, 50), take(other, 50)
    for key, value in saved.items():
        assert torch.equal(value, state[key]) if torch.is_tensor(value) else value == state[key]


def test_state_of_another_split_is_refused():
    with pytest.raises(ValueError, match=r"sampler state: its .* sizes are \[10, 60, 4, 4\]"):
        SemiSupervisedSampler(LABELLED[:9], UNLABELLED, 4, 5).load_state_dict(make("semi").state_dict())


@pytest.mark.parametrize(
    "labelled, unlabelled, batch_size, message",
    [
        (LABELLED, UNLABELLED, 0, "batch_size: 0"),
        (LABELLED[:0], UNLABELLED, 4, "labelled: no labelled image"),
        (LABELLED, np.arange(105, 120), 4, "unlabelled: 5 images are labelled too, the first is 105"),
    ],
)
def test_refusals(labelled, unlabelled, batch_size, message):
    with pytest.raises(ValueError, match=message):
        SemiSupervisedSampler(labelled, unlabelled, batch_size, 1)


@pytest.mark.parametrize("kind", ["semi", "labelled", "no unlabelled"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_parts_of_a_batch_are_the_batch(kind, world_size):
    parts = zip(*(take(ShardedSampler(make(kind), rank, world_size), 30) for rank in range(world_size)), strict=True)
    for whole, ranks in zip(take(make(kind), 30), parts, strict=True):
        for half in ("labelled", "unlabelled"):
            drawn, shares = getattr(whole, half), [getattr(batch, half) for batch in ranks]
            assert {len(share) for share in shares} == {len(drawn) // world_size}
            assert sorted(np.concatenate(shares)) == sorted(drawn)  # nothing twice, nothing left out
            for k in range(len(shares[0])):  # and the first k of every part are the first of the batch
                firsts = np.concatenate([share[:k] for share in shares])
                assert sorted(firsts) == sorted(drawn[: k * world_size])


def test_a_part_goes_on_from_the_state_of_any_other():
    first, second = (ShardedSampler(make("semi"), rank, 2) for rank in (0, 1))
    take(first, 7), take(second, 7)
    straight = [batch.indices for batch in take(second, 20)]
    other = ShardedSampler(make("semi", seed=6), 1, 2)
    other.load_state_dict(first.state_dict())
    np.testing.assert_array_equal([batch.indices for batch in take(other, 20)], straight)


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="4 labelled and 4 unlabelled images cannot be shared out among 3 processes"):
        ShardedSampler(make("semi"), 0, 3)
