"""Intervals and tests. Pure functions on arrays; every draw follows from its seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000  # bootstrap draws behind every reported interval
_CHUNK = 2_000_000  # numbers drawn at a time


def resample_counts(n: int, *, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n problems is in each bootstrap draw, in chunks of draws.

    Any statistic that is a function of sums over problems is bootstrapped by one product: `counts @ values`.

    Args:
        n: number of problems.
        draws: bootstrap draws in all.
        seed: of the draws.

    Yields:
        [chunk, n] float64; every row is one draw with replacement and sums to n.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = generator.integers(0, n, size=(size, n)) + np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def percentile_interval(draws: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The central `level` of bootstrap draws."""
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)
