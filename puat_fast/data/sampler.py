"""Endless batches of indices, half labelled and half unlabelled (spec 1.8).

Labelled: a random permutation cut into chunks; a short last chunk is filled with uniform draws, with replacement,
from the earlier part of the same permutation; then a new permutation. Unlabelled: uniform draws with replacement.
The two are shuffled together. Permutation and draws come from a torch generator, in this order: (permutation),
(fill), unlabelled; the shuffle comes from a numpy generator: the official code draws from the global generators of
both, and seeded alike this class gives its batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IndexBatch:
    """The indices of one batch, int64, in shuffled order, and their two halves in that same order."""

    indices: IntArray
    labelled: IntArray
    unlabelled: IntArray  # empty where there is no unlabelled data


class BatchSampler:
    """Infinite iterator of IndexBatch with n_labelled and n_unlabelled indices each. Raises ValueError."""

    def __init__(self, labelled: IntArray, unlabelled: IntArray, n_labelled: int, n_unlabelled: int, seed: int) -> None:
        self.labelled = np.array(labelled, np.int64)
        self.unlabelled = np.array(unlabelled, np.int64)
        self.n_labelled = n_labelled
        self.n_unlabelled = n_unlabelled
        if n_labelled < 1:
            raise ValueError(f"batch_size: {n_labelled} labelled images per batch, expected at least 1")
        if not len(self.labelled):
            raise ValueError("labelled: no labelled image to draw from")
        both = np.intersect1d(self.labelled, self.unlabelled)
        if len(both):
            raise ValueError(f"unlabelled: {len(both)} images are labelled too, the first is {both[0]}")
        self._torch_rng = torch.Generator().manual_seed(seed)
        self._numpy_rng = np.random.RandomState(seed)
        self._order = torch.empty(0, dtype=torch.int64)  # the permutation at work, as positions in self.labelled
        self._next = 0  # where in it the next chunk starts

    def __iter__(self) -> Iterator[IndexBatch]:
        return self

    def __next__(self) -> IndexBatch:
        labelled = self.labelled[self._labelled_positions().numpy()]
        drawn = np.concatenate([labelled, self.unlabelled[self._draw(len(self.unlabelled), self.n_unlabelled).numpy()]])
        order = np.arange(len(drawn))
        self._numpy_rng.shuffle(order)
        is_labelled = order < self.n_labelled
        indices = drawn[order]
        return IndexBatch(indices, indices[is_labelled], indices[~is_labelled])

    def _labelled_positions(self) -> torch.Tensor:
        if self._next >= len(self._order):
            self._order = torch.randperm(len(self.labelled), generator=self._torch_rng)
            self._next = 0
        start = self._next
        chunk = self._order[start : start + self.n_labelled]
        self._next = start + self.n_labelled
        # A first chunk that is already short (a batch larger than the labelled set) has no earlier part: draw from all.
        fill = self._draw(start or len(self._order), self.n_labelled - len(chunk))
        return torch.cat([chunk, self._order[fill]])

    def _draw(self, high: int, count: int) -> torch.Tensor:
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.randint(high, (count,), generator=self._torch_rng)

    def _sizes(self) -> list[int]:
        return [len(self.labelled), len(self.unlabelled), self.n_labelled, self.n_unlabelled]

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands: ints and tensors only, so torch.load(weights_only=True) reads it."""
        _, keys, position, *_ = self._numpy_rng.get_state(legacy=True)
        return {
            "sizes": self._sizes(),
            "torch": self._torch_rng.get_state(),
            "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "numpy_position": int(position),
            "order": self._order.clone(),
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, bit for bit. Raises ValueError where it is of other data or batch sizes."""
        sizes = self._sizes()
        if list(state["sizes"]) != sizes:
            raise ValueError(
                f"sampler state: its labelled, unlabelled and batch sizes are {state['sizes']}, "
                f"those of this sampler {sizes}"
            )
        self._torch_rng.set_state(state["torch"].cpu())
        keys = state["numpy_keys"].cpu().numpy().astype(np.uint32)
        self._numpy_rng.set_state(("MT19937", keys, state["numpy_position"], 0, 0.0))
        self._order = state["order"].cpu().clone()
        self._next = state["next"]


class SemiSupervisedSampler(BatchSampler):
    """batch_size labelled and as many unlabelled indices per batch; without unlabelled data 2 batch_size labelled."""

    def __init__(self, labelled: IntArray, unlabelled: IntArray, batch_size: int, seed: int) -> None:
        n_unlabelled = batch_size if len(unlabelled) else 0
        super().__init__(labelled, unlabelled, 2 * batch_size - n_unlabelled, n_unlabelled, seed)


class LabelledSampler(BatchSampler):
    """batch_size labelled indices per batch and no others: what the method `regular` trains on."""

    def __init__(self, labelled: IntArray, batch_size: int, seed: int) -> None:
        super().__init__(labelled, np.empty(0, np.int64), batch_size, 0, seed)


class ShardedSampler:
    """The part of one of `world_size` processes of another sampler's batches: every world_size-th index of each half.

    All processes draw the same batch and share it out, so the state is that of the other sampler, the same for all.
    n_labelled and n_unlabelled are those of the part: whatever takes a share of a batch, as int(n * mix_frac) does,
    takes it of the part, and the parts' first images together are the first of the whole batch. Raises ValueError.
    """

    def __init__(self, sampler: BatchSampler, rank: int, world_size: int) -> None:
        if sampler.n_labelled % world_size or sampler.n_unlabelled % world_size:
            sizes = f"{sampler.n_labelled} labelled and {sampler.n_unlabelled} unlabelled images"
            raise ValueError(f"batches of {sizes} cannot be shared out among {world_size} processes")
        self.labelled, self.unlabelled = sampler.labelled, sampler.unlabelled
        self.n_labelled, self.n_unlabelled = sampler.n_labelled // world_size, sampler.n_unlabelled // world_size
        self._sampler, self._part = sampler, slice(rank, None, world_size)

    def __iter__(self) -> Iterator[IndexBatch]:
        return self

    def __next__(self) -> IndexBatch:
        batch = next(self._sampler)
        labelled, unlabelled = batch.labelled[self._part], batch.unlabelled[self._part]
        return IndexBatch(np.concatenate([labelled, unlabelled]), labelled, unlabelled)

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler of the whole batches stands."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, by whichever process. Raises ValueError."""
        self._sampler.load_state_dict(state)
