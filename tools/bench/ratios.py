"""Medians of paired ratios with exact intervals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """A median with its interval.

    Attributes:
        median: of the ratios of all pairs.
        low, high: bounds of the interval.
        coverage: how often such an interval holds the true median, whatever the distribution.
    """

    median: float
    low: float
    high: float
    coverage: float


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def paired_ratio(above: Sequence[float], below: Sequence[float], *, level: float = 0.95) -> Ratio:
    """The median of above[i] / below[i], with the distribution-free interval between two order statistics.

    The k-th smallest and the k-th largest of n values miss the median with probability 2·P(Bin(n, ½) < k); k is the
    largest that keeps to `level`. Fewer than six pairs cannot reach 95 %: then smallest and largest are given, with the
    coverage they have. Source: Conover, Practical Nonparametric Statistics, quantile test.

    Args:
        above, below: seconds (or anything positive) of the same pairs.
        level: coverage asked for, a fraction.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    if not above or len(above) != len(below):
        raise ValueError(f"ratios need pairs, got {len(above)} and {len(below)} values")
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    n = len(ratios)
    coverages = [1 - 2 * sum(math.comb(n, j) for j in range(k)) / 2**n for k in range(1, (n + 1) // 2 + 1)]
    k = max([i for i, coverage in enumerate(coverages) if coverage >= level], default=0)
    return Ratio(median(ratios), ratios[k], ratios[n - 1 - k], coverages[k])
