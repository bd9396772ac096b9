"""Accuracies beside each other: intervals, and what the paper has. Imports no torch."""

from __future__ import annotations

import math


def wilson_interval(correct: int, n: int) -> list[float]:
    """95 % confidence interval [low, high] of a proportion: E. B. Wilson, 1927. [0, 1] where n is 0."""
    if n == 0:
        return [0.0, 1.0]
    z = 1.959963984540054
    p, shrink = correct / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return [max(0.0, middle - half), min(1.0, middle + half)]
