"""Everything that changes with time: ramps, learning rate, momentum, teacher decay (spec 1.4, 1.7)."""

from __future__ import annotations

import math


def sigmoid_ramp(t: float, start: float, end: float) -> float:
    """s(t; start, end) = exp(-5 (1 - clip((t - start) / (end - start), 0, 1))^2).

    0 for t < start; 1 from start on if start >= end.
    """
    if t < start:
        return 0.0
    if start >= end:
        return 1.0
    phase = 1 - min(max((t - start) / (end - start), 0.0), 1.0)
    return math.exp(-5 * phase * phase)


def _cosine(a: float, b: float, r: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * r)) / 2


def one_cycle(epoch: int, epochs: int, low: float, high: float, last: float, pct_start: float) -> float:
    """One-cycle value of a 1-based epoch: cosine low -> high in the first pct_start of epochs, then high -> last.

    With t = epoch - 1, s1 = pct_start * epochs - 1, s2 = epochs - 1: f(low, high, t / s1) for t <= s1, else
    f(high, last, (t - s1) / (s2 - s1)), f the cosine. As in torch, s1 may be negative in a short run: then the first
    phase is empty. A run of one epoch stays at `high`, where the formula would give `last`.
    """
    t, s1, s2 = epoch - 1, pct_start * epochs - 1, epochs - 1
    if s2 == 0 or t == s1:
        return high
    return _cosine(low, high, t / s1) if t < s1 else _cosine(high, last, (t - s1) / (s2 - s1))


def learning_rate(epoch: int, epochs: int, max_lr: float, pct_start: float) -> float:
    """lr of C in a 1-based epoch: max/25 -> max -> max/25e4."""
    return one_cycle(epoch, epochs, max_lr / 25, max_lr, max_lr / 25 / 1e4, pct_start)


def momentum(epoch: int, epochs: int, pct_start: float) -> float:
    """Cycled momentum of C in a 1-based epoch: 0.95 -> 0.85 -> 0.95."""
    return one_cycle(epoch, epochs, 0.95, 0.85, 0.95, pct_start)


def cosine_learning_rate(epoch: int, epochs: int, max_lr: float) -> float:
    """RST's schedule: max (1 + cos(pi (epoch - 1) / epochs)) / 2."""
    return max_lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def ema_decay(t: int, warmup: float, tau: float) -> float:
    """d(t) = 0 if t < warmup else min(tau, (1 + t - warmup) / (10 + t - warmup)); t counts steps from 1."""
    if t < warmup:
        return 0.0
    return min(tau, (1 + t - warmup) / (10 + t - warmup))
