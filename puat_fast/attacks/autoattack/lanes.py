"""How many runs of an attack share batches.

A lane is one run of an attack on one example: with one target class, in one restart. A `LaneRun` keeps up to
batch_size of them going at a time, each at its own iteration. Every few steps it drops those that are through or whose
example is fooled, by whichever lane, and starts the next ones, so that batches stay full. `lockstep` runs all lanes
from the first iteration to the last, as the reference implementation does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from puat_fast.attacks.autoattack.common import Victim

Lanes = dict[str, Tensor]
"""State of the lanes under way, a row each. All attacks keep `fooled` (bool) and `x_out`, the image that did it; those
whose steps converge also `late` (bool): fooled in the last quarter of them."""

State = dict[str, Any]
"""What is to be saved, so that an attack can go on: tensors, numbers, strings, and lists and dicts of them."""

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


@dataclass
class Found:
    """What the lanes of an attack found, example by example: fooled and late N on the CPU, x_out N x C x H x W.

    x_out: x where nothing fooled. late: fooled by a lane in the last quarter of its steps (of attacks that tell).
    """

    fooled: Tensor
    x_out: Tensor
    late: Tensor


def lockstep(kernel: Kernel, variant: int = 0) -> Found:
    """One variant of all examples at once, no one dropped."""
    example = torch.arange(len(kernel.x))
    variants = torch.full_like(example, variant)
    lanes = kernel.start(example, variants)
    for i in range(kernel.num_steps):
        kernel.step(lanes, torch.full_like(example, i), variants)
    return Found(lanes["fooled"].cpu(), lanes["x_out"], lanes.get("late", torch.zeros_like(lanes["fooled"])).cpu())


class LaneRun:
    """All variants of all examples, up to batch_size lanes at a time.

    Lanes start in order of variants, so that later ones of examples that the first ones fool never start. `state` is
    all that there is between two looks, and with it `load` goes on, to the bit.
    """

    def __init__(self, kernel: Kernel, victim: Victim, batch_size: int, check_every: int = CHECK_EVERY) -> None:
        self.kernel, self.victim, self.batch_size = kernel, victim, batch_size
        # all lanes begin and end at a look, as no number of steps between two of them is cut short
        self.check_every = max(n for n in range(1, check_every + 1) if kernel.num_steps % n == 0)
        nothing = torch.zeros(len(kernel.x), dtype=torch.bool)
        self.found = Found(nothing, kernel.x.clone(), nothing.clone())
        empty = torch.empty(0, dtype=torch.int64)
        self.lanes: Lanes = {}
        self.example, self.variant, self.iteration = empty, empty, empty
        self.following = 0
        """Number of the next lane to start: variant * examples + example."""

    def run(
        self,
        report: Callable[[int, int, int], None] | None = None,
        save: Callable[[Callable[[], State]], None] | None = None,
    ) -> Found:
        """To the end. report(lanes finished or dropped, lanes in all, examples fooled) and save(state) at each look."""
        total = len(self.kernel.x) * self.kernel.variants
        if len(self.example):  # loaded: a state is of just after a look, and a second one would see lanes too early
            self._advance()
        while True:
            self._drop()
            self._fill(total)
            if report is not None:
                report(self.following - len(self.example), total, int(self.found.fooled.sum()))
            if not len(self.example):
                return self.found
            if save is not None:
                save(self.state)
            self._advance()

    def state(self) -> State:
        """Tensors, and a dict of them, on the CPU; a copy."""
        fooled, x_out = self.found.fooled, self.found.x_out
        return copy.deepcopy({
            "lanes": {name: value.cpu() for name, value in self.lanes.items()},
            "example": self.example, "variant": self.variant, "iteration": self.iteration, "following": self.following,
            "fooled": fooled, "late": self.found.late, "x_out": x_out[fooled.to(x_out.device)].cpu(),
        })  # fmt: skip

    def load(self, state: State) -> None:
        """Go on from a state of the same attack on the same examples, which stays as it is."""
        state, device = copy.deepcopy(state), self.kernel.x.device
        self.lanes = {name: value.to(device) for name, value in state["lanes"].items()}
        self.example, self.variant, self.iteration = (state[name] for name in ("example", "variant", "iteration"))
        self.following, fooled = state["following"], state["fooled"]
        self.found.fooled, self.found.late = fooled, state["late"]
        self.found.x_out[fooled.to(device)] = state["x_out"].to(device)

    def _advance(self) -> None:
        for _ in range(self.check_every):
            self.kernel.step(self.lanes, self.iteration, self.variant)
            self.iteration = self.iteration + 1

    def _drop(self) -> None:
        """Note what the lanes have fooled, and let go of those that are through or whose example is fooled."""
        if not len(self.example):
            return
        self.victim.check()
        _collect(self.lanes, self.example, self.found)
        keep = (self.iteration < self.kernel.num_steps) & ~self.found.fooled[self.example]
        self.lanes = _select(self.lanes, keep)
        self.example, self.variant, self.iteration = self.example[keep], self.variant[keep], self.iteration[keep]

    def _fill(self, total: int) -> None:
        free, examples = self.batch_size - len(self.example), len(self.kernel.x)
        if len(self.example) and free < max(1, self.batch_size // 8):
            return
        new, self.following = _next_lanes(self.following, free, self.found.fooled, total)
        if len(new):
            self.lanes = _join(self.lanes, self.kernel.start(new % examples, new // examples))
            self.example = torch.cat([self.example, new % examples])
            self.variant = torch.cat([self.variant, new // examples])
            self.iteration = torch.cat([self.iteration, torch.zeros_like(new)])


def _collect(lanes: Lanes, example: Tensor, found: Found) -> None:
    """Note what the lanes have fooled; of several lanes of one example, the first counts."""
    rows = []
    for row in lanes["fooled"].nonzero().flatten().tolist():
        if not found.fooled[example[row]]:
            found.fooled[example[row]] = True
            rows.append(row)
    if rows:
        found.x_out[example[rows].to(found.x_out.device)] = lanes["x_out"][rows]
        if "late" in lanes:
            found.late[example[rows]] = lanes["late"][rows].cpu()


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
