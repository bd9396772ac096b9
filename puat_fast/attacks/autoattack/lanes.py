"""How many runs of an attack share batches.

A lane is one run of an attack on one example: with one target class, in one restart. `run_lanes` keeps up to
batch_size of them going at a time, each at its own iteration. Every few steps it drops those that are through or whose
example is fooled, by whichever lane, and starts the next ones, so that batches stay full. `lockstep` runs all lanes
from the first iteration to the last, as the reference implementation does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from puat_fast.attacks.autoattack.common import Victim

Lanes = dict[str, Tensor]
"""State of the lanes under way, a row each. All attacks keep `fooled` (bool) and `x_out`, the image that did it."""

CHECK_EVERY = 5
"""Steps between two looks at what is fooled: each costs a sync with the device, and a copy where lanes go."""


class Kernel(Protocol):
    """An attack, lane by lane: it may look at no other lane of a batch."""

    x: Tensor
    num_steps: int
    variants: int
    """Lanes of each example: targets x restarts."""

    def start(self, example: Tensor, variant: Tensor) -> Lanes:
        """Lanes of these examples and variants (both int64, on the CPU), before their first step."""

    def step(self, lanes: Lanes, iteration: Tensor, variant: Tensor) -> None:
        """One iteration of each lane, which has `iteration` (int64, on the CPU) of them behind it. Changes `lanes`."""


def lockstep(kernel: Kernel, variant: int = 0) -> tuple[Tensor, Tensor]:
    """One variant of all examples at once, no one dropped: (fooled N on the CPU, x_out)."""
    example = torch.arange(len(kernel.x))
    variants = torch.full_like(example, variant)
    lanes = kernel.start(example, variants)
    for i in range(kernel.num_steps):
        kernel.step(lanes, torch.full_like(example, i), variants)
    return lanes["fooled"].cpu(), lanes["x_out"]


def run_lanes(
    kernel: Kernel,
    victim: Victim,
    batch_size: int,
    *,
    check_every: int = CHECK_EVERY,
    report: Callable[[int, int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """All variants of all examples: (fooled N on the CPU, x_out; x where nothing fooled).

    Lanes start in order of variants, so that later ones of examples that the first ones fool never start.
    report(lanes finished or dropped, lanes in all, examples fooled), each few steps.
    """
    # all lanes begin and end at a look, as no number of steps between two of them is cut short
    check_every = max(n for n in range(1, check_every + 1) if kernel.num_steps % n == 0)
    num_examples, total = len(kernel.x), len(kernel.x) * kernel.variants
    fooled, x_out = torch.zeros(num_examples, dtype=torch.bool), kernel.x.clone()
    empty = torch.empty(0, dtype=torch.int64)
    lanes: Lanes = {}
    example, variant, iteration, following = empty, empty, empty, 0
    while True:
        if len(example):
            victim.check()
            _collect(lanes, example, fooled, x_out)
            keep = (iteration < kernel.num_steps) & ~fooled[example]
            lanes = _select(lanes, keep)
            example, variant, iteration = example[keep], variant[keep], iteration[keep]
        free = batch_size - len(example)
        if not len(example) or free >= max(1, batch_size // 8):
            new, following = _next_lanes(following, free, fooled, total)
            if len(new):
                lanes = _join(lanes, kernel.start(new % num_examples, new // num_examples))
                example = torch.cat([example, new % num_examples])
                variant = torch.cat([variant, new // num_examples])
                iteration = torch.cat([iteration, torch.zeros_like(new)])
        if report is not None:
            report(following - len(example), total, int(fooled.sum()))
        if not len(example):
            return fooled, x_out
        for _ in range(check_every):
            kernel.step(lanes, iteration, variant)
            iteration = iteration + 1


def _collect(lanes: Lanes, example: Tensor, fooled: Tensor, x_out: Tensor) -> None:
    """Note what the lanes have fooled; of several lanes of one example, the first counts."""
    rows = []
    for row in lanes["fooled"].nonzero().flatten().tolist():
        if not fooled[example[row]]:
            fooled[example[row]] = True
            rows.append(row)
    if rows:
        x_out[example[rows].to(x_out.device)] = lanes["x_out"][rows]


def _select(lanes: Lanes, keep: Tensor) -> Lanes:
    if bool(keep.all()):
        return lanes
    if not bool(keep.any()):
        return {}
    rows = keep.nonzero().flatten().to(lanes["x_out"].device)
    return {name: value[rows] for name, value in lanes.items()}


def _join(lanes: Lanes, new: Lanes) -> Lanes:
    return {name: torch.cat([lanes[name], value]) for name, value in new.items()} if lanes else new


def _next_lanes(following: int, count: int, fooled: Tensor, total: int) -> tuple[Tensor, int]:
    """Up to `count` numbers of lanes from `following` on whose example is not fooled, and where to go on."""
    rest = torch.arange(following, total)
    rest = rest[~fooled[rest % len(fooled)]][:count] if len(fooled) else rest
    if len(rest) < count:
        return rest, total
    return rest, int(rest[-1]) + 1
