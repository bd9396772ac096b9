"""Auto-PGD on the cross-entropy and on the targeted DLR loss (Croce & Hein 2020, arXiv:2003.01690, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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

MOMENTUM = 0.75
"""alpha of the paper: weight of the new point against the direction of the last step."""


def checkpoints(num_steps: int) -> list[tuple[int, int]]:
    """(number of the step after which to look at the step size, steps since the last look).

    The first window is 0.22 of the steps, each further one shorter by 0.03 of them, down to 0.06; whole numbers, >= 1.
    """
    window, least, shorter = (max(int(part * num_steps), 1) for part in (0.22, 0.06, 0.03))
    found, step = [], window
    while step <= num_steps:
        found.append((step, window))
        window = max(window - shorter, least)
        step += window
    return found


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12), z_(i) the i-th largest logit; N x K -> N.

    With less than 4 classes there is no z_(4), and over z_(1) - z_(3) or z_(1) - z_(2) the loss would be constant,
    without a gradient, where y and t are the largest and the smallest. So then the loss is z_t - z_y itself: APGD does
    not mind the scale of a loss.
    """
    rows = torch.arange(len(logits), device=logits.device)
    margin = logits[rows, y] - logits[rows, target]
    if logits.shape[1] < 4:
        return -margin
    ordered = logits.sort(dim=1).values
    return -margin / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)


class Apgd:
    """APGD as a kernel of lanes. targets: N x T classes to go for, or None for the cross-entropy of y.

    x_1 = P(x_0 + s sign(grad)); x_(i+1) = P(x_i + 0.75 (P(x_i + s sign(grad)) - x_i) + 0.25 (x_i - x_(i-1))), P onto
    the ball and [0,1]; for l2, grad / |grad|_2 for its sign. s starts at 2 eps. At a checkpoint a lane whose loss rose
    in no more than rho of the steps since the last one, or that had s left alone there and found no larger loss since,
    goes back to its best point and halves s.
    """

    def __init__(self, victim: Victim, x: Tensor, y: Tensor, targets: Tensor | None, settings: Settings) -> None:
        self.victim, self.x, self.y, self.targets, self.settings = victim, x, y, targets, settings
        self.num_steps = settings.num_steps
        self.variants = settings.restarts * (1 if targets is None else targets.shape[1])
        # after step i: a lane whose loss rose that often or less oscillates; -1: no checkpoint
        self.threshold = torch.full((self.num_steps,), -1.0)
        for step, window in checkpoints(self.num_steps):
            self.threshold[step - 1] = window * settings.rho

    def start(self, example: Tensor, variant: Tensor) -> Lanes:
        """Random points: x + eps t / |t|, t uniform on [-1, 1] for linf, normal for l2."""
        rows = example.to(self.x.device)
        x, y = self.x[rows], self.y[rows]
        target = y if self.targets is None else self.targets[rows, (variant // self.settings.restarts).to(rows)]
        direction = self._directions(x, example, variant)
        x_adv = (x + self.settings.eps * normalized(direction, self.settings.norm)).clamp(0, 1)
        logits, loss, grad = self.victim.loss_and_grad(x_adv, self._loss(y, target))
        self.victim.note_gradients(grad)
        return {
            "x": x, "y": y, "target": target, "x_adv": x_adv, "x_before": x_adv, "grad": grad,
            "x_best": x_adv, "grad_best": grad, "loss_best": loss, "loss_best_checked": loss,
            # the reference compares the first loss with 0
            "loss": torch.zeros_like(loss), "rises": torch.zeros_like(loss),
            "step_size": torch.full_like(loss, 2.0 * self.settings.eps),
            "halved": torch.ones_like(y, dtype=torch.bool),
            "x_out": x_adv, "fooled": logits.max(1).indices != y, "late": torch.zeros_like(y, dtype=torch.bool),
        }  # fmt: skip

    def step(self, lanes: Lanes, iteration: Tensor, variant: Tensor) -> None:
        """Move, look at loss and gradient there, and at a checkpoint at the step size."""
        x_adv = self._move(lanes, iteration)
        lanes["x_before"], lanes["x_adv"] = lanes["x_adv"], x_adv
        logits, loss, lanes["grad"] = self.victim.loss_and_grad(x_adv, self._loss(lanes["y"], lanes["target"]))
        wrong = logits.max(1).indices != lanes["y"]
        late = (iteration >= 0.75 * self.num_steps).to(wrong.device)
        lanes["late"] = lanes["late"] | (late & wrong & ~lanes["fooled"])
        lanes["fooled"] = lanes["fooled"] | wrong
        lanes["x_out"] = torch.where(column(wrong, x_adv), x_adv, lanes["x_out"])
        better = loss > lanes["loss_best"]
        lanes["loss_best"] = torch.where(better, loss, lanes["loss_best"])
        for best, now in (("x_best", "x_adv"), ("grad_best", "grad")):
            lanes[best] = torch.where(column(better, x_adv), lanes[now], lanes[best])
        lanes["rises"] = lanes["rises"] + (loss > lanes["loss"])
        lanes["loss"] = loss
        threshold = self.threshold[iteration]
        if bool((threshold >= 0).any()):
            self._checkpoint(lanes, threshold.to(loss))

    def _move(self, lanes: Lanes, iteration: Tensor) -> Tensor:
        x_adv, size, grad = lanes["x_adv"], column(lanes["step_size"], lanes["x"]), lanes["grad"]
        direction = grad.sign() if self.settings.norm == "linf" else normalized(grad, "l2")
        new = self._project(x_adv + size * direction, lanes["x"])
        first = iteration == 0
        a = column(torch.where(first, 1.0, MOMENTUM).to(x_adv), x_adv)  # the first step has none before it
        return self._project(x_adv + (new - x_adv) * a + (x_adv - lanes["x_before"]) * (1 - a), lanes["x"])

    def _checkpoint(self, lanes: Lanes, threshold: Tensor) -> None:
        due = threshold >= 0
        stuck = ~lanes["halved"] & (lanes["loss_best_checked"] >= lanes["loss_best"])
        halve = due & ((lanes["rises"] <= threshold) | stuck)
        lanes["halved"] = torch.where(due, halve, lanes["halved"])
        lanes["loss_best_checked"] = torch.where(due, lanes["loss_best"], lanes["loss_best_checked"])
        lanes["rises"] = lanes["rises"].masked_fill(due, 0)
        lanes["step_size"] = torch.where(halve, lanes["step_size"] / 2, lanes["step_size"])
        back = column(halve, lanes["x"])
        for now, best in (("x_adv", "x_best"), ("grad", "grad_best")):
            lanes[now] = torch.where(back, lanes[best], lanes[now])

    def _project(self, point: Tensor, x: Tensor) -> Tensor:
        eps = self.settings.eps
        if self.settings.norm == "linf":
            return torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)
        delta = point - x
        return (x + normalized(delta, "l2") * column(length(delta, "l2"), x).clamp(max=eps)).clamp(0, 1)

    def _loss(self, y: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        if self.targets is None:
            return lambda logits: F.cross_entropy(logits, y, reduction="none")
        return lambda logits: dlr_targeted(logits, y, target)

    def _directions(self, x: Tensor, example: Tensor, variant: Tensor) -> Tensor:
        uniform = self.settings.norm == "linf"
        if self.settings.faithful:  # from the forked global generator, as the reference draws
            drawn = (torch.rand(x.shape) if uniform else torch.randn(x.shape)).to(x)
        else:
            keys = [(self.settings.seed, *key) for key in zip(example.tolist(), variant.tolist(), strict=True)]
            drawn = lane_noise("rand" if uniform else "randn", x.shape[1:], keys, x)
        return 2 * drawn - 1 if uniform else drawn


def faithful_apgd(kernel_targets: int, victim: Victim, x: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """The reference's schedule on one batch: target by target, restart by restart, on what is not fooled yet.

    kernel_targets: number of target classes, 0 for the cross-entropy. Returns x_adv; x where nothing fooled.
    """
    x_adv = x.clone()
    robust = victim.logits(x).max(1).indices == y
    seed_global(settings.seed, victim.device)
    for rank in range(max(kernel_targets, 1)):
        for _ in range(settings.restarts):
            rows = robust.nonzero().flatten()
            if not len(rows):
                return x_adv
            targets = None
            if kernel_targets:
                targets = victim.logits(x[rows]).sort(dim=1).indices[:, -2 - rank, None]
            found = lockstep(Apgd(victim, x[rows], y[rows], targets, settings))
            victim.late += int((found.late & found.fooled).sum())
            hit = found.fooled.to(x.device)
            robust[rows[hit]] = False
            x_adv[rows[hit]] = found.x_out[hit]
    victim.check()
    return x_adv
