"""FAB with targets: the closest image across the boundary, found from its linearisation (Croce & Hein 2020).

arXiv:1907.02044. The projections onto the boundary are solved by Newton's method on one number, not by sorting.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from puat_fast.attacks.autoattack.common import (
    Settings,
    Victim,
    column,
    lane_noise,
    length,
    normalized,
    seed_global,
)
from puat_fast.attacks.autoattack.lanes import Lanes, lockstep
from puat_fast.ops.pgd_step import Norm

ALPHA_MAX, OVERSHOOT, BACKWARD = 0.1, 1.05, 0.9
"""alpha_max, eta and beta of the paper: pull towards x, step beyond the plane, and back towards x once across."""

STREAM = 2**41
"""Key of FAB's draws."""

NEWTON_STEPS = 40
"""At most; each passes at least one kink of a concave function, and a handful is usual."""


def to_plane(point: Tensor, w: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """The shortest delta in `norm` with <w, point + delta> on the plane and point + delta in [0,1].

        min |delta|  such that  <w, delta> = -offset,  0 <= point + delta <= 1;  offset = <w, point> - b

    All N x D but offset, N. Where the plane misses the box: the corner of the box towards it. In the direction s_i that
    approaches the plane delta_i = s_i min(t u_i, room_i), with u = 1 for linf and |w| for l2, room_i the way to the
    box's side, and t the solution of sum |w_i| min(t u_i, room_i) = |offset|: concave, piecewise linear and rising in
    t, so that Newton's method from t = 0 never steps beyond it.
    """
    largest = w.abs().amax(1, keepdim=True)
    w = w / torch.where(largest > 0, largest, 1)  # so that small numbers do not vanish in the squares
    need = offset.abs() / torch.where(largest > 0, largest, 1).squeeze(1)
    direction = -torch.where(offset >= 0, 1.0, -1.0).to(w)[:, None] * w.sign()
    weight = w.abs()
    room = torch.where(direction > 0, 1 - point, point)
    unit = torch.ones_like(w) if norm == "linf" else weight
    t = torch.zeros_like(need)
    for _ in range(NEWTON_STEPS):
        step = t[:, None] * unit
        slope = (weight * unit * (step < room)).sum(1)
        missing = need - (weight * torch.min(step, room)).sum(1)
        # a slope of zero: all is at the sides of the box
        advance = torch.where((slope > 0) & (missing > 0), missing / slope.clamp(min=1e-30), 0.0)
        t = t + advance
        if bool((advance <= 1e-7 * t).all()):
            break
    delta = direction * torch.min(t[:, None] * unit, room)
    beyond = need >= (weight * room).sum(1)
    return torch.where(beyond[:, None], direction * room, delta)


class Fab:
    """FAB as a kernel of lanes. targets: N x T, each lane looks for the boundary between y and one of them.

    With f = z_t - z_y, linear around x_i, and d(p) the way from p to f = 0 (`to_plane`):
    x_(i+1) = (1 - a)(x_i + 1.05 d(x_i)) + a (x + 1.05 d(x)), a = min(|d(x_i)| / (|d(x_i)| + |d(x)|), 0.1). Where that
    is misclassified, the closest such image is kept, and it goes on from x + 0.9 (x_(i+1) - x).
    """

    def __init__(self, victim: Victim, x: Tensor, y: Tensor, targets: Tensor, settings: Settings) -> None:
        self.victim, self.x, self.y, self.targets, self.settings = victim, x, y, targets, settings
        self.num_steps, self.variants = settings.num_steps, settings.restarts * targets.shape[1]

    def start(self, example: Tensor, variant: Tensor) -> Lanes:
        """At x; from the second restart on at x + eps / 2 times a random direction of norm 1."""
        rows, restart = example.to(self.x.device), variant % self.settings.restarts
        x, y = self.x[rows], self.y[rows]
        target = self.targets[rows, (variant // self.settings.restarts).to(rows)]
        point = x
        if bool((restart > 0).any()):
            away = 0.5 * self.settings.eps * normalized(self._directions(x, example, variant), self.settings.norm)
            point = torch.where(column(restart > 0, x).to(x.device), (x + away).clamp(0, 1), x)
        return {
            "x": x, "y": y, "target": target, "point": point, "x_out": x,
            "distance": torch.full_like(x[:, 0, 0, 0], torch.inf), "fooled": torch.zeros_like(y, dtype=torch.bool),
        }  # fmt: skip

    def step(self, lanes: Lanes, iteration: Tensor, variant: Tensor) -> None:
        """To the plane, and if that is across the boundary, note it and step back."""
        x, y, norm = lanes["x"], lanes["y"], self.settings.norm
        point = self._move(x, y, lanes["target"], lanes["point"])
        across = self.victim.logits(point).max(1).indices != y
        distance = length(point - x, norm)
        closer = across & (distance < lanes["distance"])
        lanes["distance"] = torch.where(closer, distance, lanes["distance"])
        lanes["x_out"] = torch.where(column(closer, x), point, lanes["x_out"])
        lanes["point"] = torch.where(column(across, x), x + (point - x) * BACKWARD, point)
        lanes["fooled"] = lanes["distance"] <= self.settings.eps

    def _move(self, x: Tensor, y: Tensor, target: Tensor, point: Tensor) -> Tensor:
        norm, lanes = self.settings.norm, torch.arange(len(x), device=x.device)
        _, f, w = self.victim.loss_and_grad(point, lambda z: z[lanes, target] - z[lanes, y])
        offset = f + (w * (x - point)).flatten(1).sum(1)  # of x from the same plane
        both = to_plane(
            torch.cat([point, x]).flatten(1), torch.cat([w, w]).flatten(1), torch.cat([f, offset]), norm
        ).view(2, *x.shape)
        reach = [length(d, norm).clamp(min=1e-8) for d in both]
        a = column((reach[0] / (reach[0] + reach[1])).clamp(max=ALPHA_MAX), x)
        return ((point + OVERSHOOT * both[0]) * (1 - a) + (x + OVERSHOOT * both[1]) * a).clamp(0, 1)

    def _directions(self, x: Tensor, example: Tensor, variant: Tensor) -> Tensor:
        uniform = self.settings.norm == "linf"
        if self.settings.faithful:
            drawn = (torch.rand(x.shape) if uniform else torch.randn(x.shape)).to(x)
        else:
            keys = [(self.settings.seed, STREAM, *key) for key in zip(example.tolist(), variant.tolist(), strict=True)]
            drawn = lane_noise("rand" if uniform else "randn", x.shape[1:], keys, x)
        return 2 * drawn - 1 if uniform else drawn


def faithful_fab(num_targets: int, victim: Victim, x: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """The reference's schedule on one batch: target by target, restart by restart, on what is not fooled yet."""
    x_adv = x.clone()
    robust = victim.logits(x).max(1).indices == y
    seed_global(settings.seed, victim.device)
    for rank in range(num_targets):
        for restart in range(settings.restarts):
            rows = robust.nonzero().flatten()
            if not len(rows):
                return x_adv
            targets = victim.logits(x[rows]).sort(dim=1).indices[:, -2 - rank, None]
            kernel = Fab(victim, x[rows], y[rows], targets, replace(settings, restarts=restart + 1))
            found = lockstep(kernel, variant=restart)
            hit = found.fooled.to(x.device)
            robust[rows[hit]] = False
            x_adv[rows[hit]] = found.x_out[hit]
    victim.check()
    return x_adv
