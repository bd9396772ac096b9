"""Square Attack: random search with square-shaped changes, forward passes only (Andriushchenko et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from puat_fast.attacks.autoattack.common import (
    Settings,
    Victim,
    column,
    lane_noise,
    length,
    normalized,
    private_generator,
    seed_global,
)
from puat_fast.attacks.autoattack.lanes import LaneRun, Lanes

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after each of which the part of the image that a square covers is halved; p_init before the first."""

STREAM = 2**40
"""Key of the draws that all examples share; no example has that number."""


def side_of_square(query: int, height: int, width: int, p_init: float, norm: str) -> int:
    """Side of the square of a query: sqrt(p H W), rounded; for l2 odd and at least 3; never more than H or W."""
    part = p_init / 2 ** sum(query > n for n in HALVINGS)
    side = round(math.sqrt(part * height * width))
    if norm == "l2":
        side = max(side, 3)
        side += side % 2 == 0
    return min(max(side, 1), height, width)


def _pyramid(height: int, width: int) -> Tensor:
    """Rings around the pixel (height // 2, width // 2): sum over m >= the distance of 1 / (m + 1)^2, L2 norm 1."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :])
    bump = torch.zeros(height, width)
    for m in range(max(height, width) // 2 + 1):
        bump += torch.where(distance <= m, 1 / torch.tensor(m + 1.0) ** 2, 0.0)
    return bump / (bump**2).sum(dim=(0, 1)).sqrt()


def bump_pair(side: int) -> Tensor:
    """eta of the paper for l2: a pyramid upwards in the upper half and one downwards in the lower; L2 norm 1."""
    pair = torch.zeros(side, side)
    half = side // 2
    if half:
        pair[:half] = _pyramid(half, side)
    pair[half:] = -_pyramid(side - half, side)
    return pair / (pair**2).sum(dim=(0, 1)).sqrt()


class Draws:
    """Random numbers of the queries: of one query, the same for all lanes (l2, faithful: signs for each lane).

    faithful: from the forked global generator, one by one, as the reference draws. Else from a table of all queries.
    """

    def __init__(self, settings: Settings, channels: int) -> None:
        self.settings, self.channels = settings, channels
        self.places = 2 if settings.norm == "linf" else 5
        self.table: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, query: int, restart: int, lanes: int) -> tuple[Tensor, Tensor]:
        """(numbers in [0, 1): 2 for a position, l2: 4 for two and 1 for the bump's orientation; signs, rows x C)."""
        if self.settings.faithful:
            places = torch.cat([torch.rand(1) for _ in range(self.places)])
            return places, _signs(torch.rand(1 if self.places == 2 else lanes, self.channels))
        if restart not in self.table:
            generator = private_generator(self.settings.seed, STREAM, restart)
            numbers = torch.rand(self.settings.num_queries, self.places + self.channels, generator=generator)
            self.table[restart] = numbers[:, : self.places], _signs(numbers[:, self.places :])
        places, signs = self.table[restart]
        return places[query], signs[query, None]


def _signs(uniform: Tensor) -> Tensor:
    """-1 or 1."""
    return (2 * uniform - 1).sign()


class Change(NamedTuple):
    """What a query does to some lanes: x_adv[rows, :, *window] goes from `before` to `after`, where that helps."""

    rows: Tensor | slice
    window: tuple[slice, slice]
    before: Tensor
    after: Tensor


class Square:
    """Square Attack as a kernel of lanes; it lowers the margin z_y - max of the other z.

    linf: x_adv starts as vertical stripes x +- eps; a query sets a square of each channel to x +- eps, by adding
    +- 2 eps and projecting. l2: starts as a grid of bumps, together of norm eps; a query takes what the perturbation
    holds in one square away and puts as much into another, along with a bump, at the same norm. What does not lower the
    margin is undone.
    """

    def __init__(self, victim: Victim, x: Tensor, y: Tensor, settings: Settings) -> None:
        self.victim, self.x, self.y, self.settings = victim, x, y, settings
        self.num_steps, self.variants = settings.num_queries, settings.restarts
        self.draws = Draws(settings, x.shape[1])
        self.bumps: dict[int, Tensor] = {}

    def start(self, example: Tensor, variant: Tensor) -> Lanes:
        """Stripes or the grid of bumps, and the margin there."""
        rows = example.to(self.x.device)
        x, y, eps = self.x[rows], self.y[rows], self.settings.eps
        if self.settings.norm == "linf":
            stripes = _signs(self._uniform((x.shape[1], 1, x.shape[3]), example, variant, x))
            x_adv = (x + eps * stripes).clamp(0, 1)
        else:
            x_adv = (x + normalized(self._grid(x, example, variant), "l2") * eps).clamp(0, 1)
        margin, fooled = self._margin(x_adv, y)
        return {"x": x, "y": y, "x_adv": x_adv, "x_out": x_adv, "margin": margin, "fooled": fooled}

    def step(self, lanes: Lanes, iteration: Tensor, variant: Tensor) -> None:
        """One query for each lane. Lanes that began together have the same window."""
        x_adv = lanes["x_adv"]
        change = self._change_linf if self.settings.norm == "linf" else self._change_l2
        changes = []
        for rows, query, restart in _cohorts(iteration, variant):
            place = rows if isinstance(rows, slice) else rows.to(x_adv.device)
            changes.append(change(lanes["x"][place], x_adv[place], place, query, restart))
        for rows, window, _, after in changes:
            x_adv[rows, :, window[0], window[1]] = after
        margin, fooled = self._margin(x_adv, lanes["y"])
        better = margin < lanes["margin"]
        for rows, window, before, after in changes:
            x_adv[rows, :, window[0], window[1]] = torch.where(column(better[rows], after), after, before)
        lanes["x_out"] = x_adv
        lanes["margin"] = torch.where(better, margin, lanes["margin"])
        lanes["fooled"] = lanes["fooled"] | (fooled & better)

    def _change_linf(self, x: Tensor, x_adv: Tensor, rows: Tensor | slice, query: int, restart: int) -> Change:
        height, width = x.shape[2:]
        side = side_of_square(query, height, width, self.settings.p_init, "linf")
        places, signs = self.draws.of(query, restart, len(x))
        window = self._window(places[:2], side, x)
        before, center, eps = x_adv[..., *window].clone(), x[..., *window], self.settings.eps
        step = 2.0 * eps * signs.to(x)[:, :, None, None]
        after = torch.min(torch.max(before + step, center - eps), center + eps).clamp(0, 1)
        return Change(rows, window, before, after)

    def _change_l2(self, x: Tensor, x_adv: Tensor, rows: Tensor | slice, query: int, restart: int) -> Change:
        channels, height, width = x.shape[1:]
        side, eps = side_of_square(query, height, width, self.settings.p_init, "l2"), self.settings.eps
        places, signs = self.draws.of(query, restart, len(x))
        new, old = (self._window(p, side, x) for p in (places[:2], places[2:4]))
        delta = x_adv - x
        free = (x.new_tensor(eps) ** 2 - column(length(delta, "l2"), x) ** 2).clamp(min=0)  # of the norm, squared
        mask = torch.zeros(height, width, dtype=x.dtype, device=x.device)
        for window in (new, old):
            mask[window] = 1
        inside = ((delta * mask) ** 2).sum(dim=(-2, -1), keepdim=True).sqrt()
        held = delta[..., *new]
        patch = self._bump(side, float(places[4]), x) * signs.to(x)[:, :, None, None]
        patch = patch + held / (1e-12 + (held**2).sum(dim=(-2, -1), keepdim=True).sqrt())
        patch = patch / (1e-12 + (patch**2).sum(dim=(-2, -1), keepdim=True).sqrt())
        patch = patch * (free / channels + inside**2).sqrt()
        delta[..., *old] = 0
        delta[..., *new] = patch
        after = (x + normalized(delta, "l2") * eps).clamp(0, 1)
        return Change(rows, (slice(0, height), slice(0, width)), x_adv.clone(), after)

    def _window(self, places: Tensor, side: int, x: Tensor) -> tuple[slice, slice]:
        """The rows and columns of a square; places: 2 numbers in [0, 1)."""
        # as in the paper, but the reference never puts a square at the last row or column
        last = 0 if self.settings.faithful else 1
        # in float32, as the reference multiplies
        row, col = (places * torch.tensor([size - side + last for size in x.shape[2:]])).long().tolist()
        return slice(row, row + side), slice(col, col + side)

    def _margin(self, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(z_y - max of the others, whether that counts as fooled), each N."""
        logits = self.victim.logits(x_adv)
        right = logits.gather(1, y[:, None]).squeeze(1)
        margin = right - logits.scatter(1, y[:, None], -math.inf).max(1).values
        return margin, margin <= 0 if self.settings.faithful else logits.max(1).indices != y

    def _grid(self, x: Tensor, example: Tensor, variant: Tensor) -> Tensor:
        """5 x 5 bumps (for sides that 5 divides not, one or more beyond), of random orientation and signs."""
        channels, height, width = x.shape[1:]
        side = max(height // 5, 1)
        across, down = width // side, height // side
        top, left = (height - down * side) // 2, (width - across * side) // 2
        if self.settings.faithful:  # as if 5 tiles were all there is: off center, for sides such as 8
            top = left = (height - 5 * side) // 2
        delta = torch.zeros_like(x)
        if not self.settings.faithful:
            generator = private_generator(self.settings.seed, STREAM + 1)
            turns = torch.rand(down * across, generator=generator)
            all_signs = _signs(self._uniform((down * across, channels, 1, 1), example, variant, x))
        for tile in range(down * across):
            if self.settings.faithful:
                turn, signs = float(torch.rand(1)), _signs(torch.rand(len(x), channels, 1, 1)).to(x)
            else:
                turn, signs = float(turns[tile]), all_signs[:, tile]
            row, col = top + tile // across * side, left + tile % across * side
            place = delta[:, :, row : row + side, col : col + side]
            place += self._bump(side, turn, x)[: place.shape[2], : place.shape[3]] * signs
        return delta

    def _bump(self, side: int, turn: float, like: Tensor) -> Tensor:
        if side not in self.bumps:
            self.bumps[side] = bump_pair(side).to(like)
        return self.bumps[side].T.contiguous() if turn > 0.5 else self.bumps[side]

    def _uniform(self, shape: tuple[int, ...], example: Tensor, variant: Tensor, like: Tensor) -> Tensor:
        if self.settings.faithful:
            return torch.rand(len(example), *shape).to(like)
        keys = [(self.settings.seed, STREAM, *key) for key in zip(example.tolist(), variant.tolist(), strict=True)]
        return lane_noise("rand", shape, keys, like)


def _cohorts(iteration: Tensor, variant: Tensor) -> list[tuple[Tensor | slice, int, int]]:
    """(rows, query, restart) of lanes that are at the same query of the same restart."""
    kinds = sorted(set(zip(iteration.tolist(), variant.tolist(), strict=True)))
    if len(kinds) == 1:
        return [(slice(None), *kinds[0])]
    return [
        (((iteration == query) & (variant == restart)).nonzero().flatten(), query, restart) for query, restart in kinds
    ]


def faithful_square(victim: Victim, x: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """The reference's schedule on one batch: restart by restart, fooled images leave it at each query."""
    x_adv = x.clone()
    robust = victim.logits(x).max(1).indices == y
    seed_global(settings.seed, victim.device)
    for _ in range(settings.restarts):
        rows = robust.nonzero().flatten()
        if not len(rows):
            break
        kernel = Square(victim, x[rows], y[rows], replace(settings, restarts=1))
        x_out = LaneRun(kernel, victim, len(rows), check_every=1).run().x_out
        hit = victim.logits(x_out).max(1).indices != y[rows]  # margins of 0 may be right after all
        robust[rows[hit]] = False
        x_adv[rows[hit]] = x_out[hit]
    victim.check()
    return x_adv
