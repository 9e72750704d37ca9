"""Intervals and tests. Pure functions on arrays; every draw follows from its seed.

Two questions, two kinds of spread. How good is this checkpoint? The problems are a sample: `bootstrap_interval`,
`paired_bootstrap`, `mcnemar_exact` over problems. How good is this recipe? Its training seeds are a sample, too:
`mean_interval`, `welch`, `paired_t` over seed means. An interval over problems knows nothing of other seeds and is too
narrow for a recipe.

Scores are fractions, or whatever unit they come in; differences are a − b in the same unit; levels, p and power are
fractions. NaN stands for what does not exist: a p without any spread to judge by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

DRAWS = 10_000  # bootstrap draws behind every reported interval
_CHUNK = 2_000_000  # numbers drawn at a time


class Difference(NamedTuple):
    """mean(a) − mean(b), the bounds of its interval, the two-sided p of no difference; df of a t, else NaN."""

    diff: float
    low: float
    high: float
    p: float
    df: float = math.nan


class McNemar(NamedTuple):
    """Problems that only a solves, that only b solves, and the exact two-sided p of no difference."""

    only_a: int
    only_b: int
    p: float


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


def bootstrap_interval(
    values: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Bounds of a mean over problems: its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Where all values are equal the bootstrap has no width. If they are all 0 or all 1, the exact binomial bounds
    (Clopper & Pearson 1934) stand instead: 1 − tail^(1/n) above, or tail^(1/n) below, tail = (1 − level)/2. Other equal
    values keep the interval without width.

    Args:
        values: [n] one score per problem.
        draws: bootstrap draws.
        seed: of the draws.
        level: of the interval.

    Raises:
        ValueError: no values, NaN or infinite ones.
    """
    values = _finite(values, at_least=1)
    if _equal(values):
        mean, sure = float(values.mean()), _unanimous(len(values), level)
        return sure if mean == 1 else mean, 1 - sure if mean == 0 else mean
    return percentile_interval(_bootstrap_means(values, draws, seed), level)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Difference:
    """Difference of two means over the same problems; whole problems are drawn, with both their scores.

    p is the achieved significance level of the percentile interval, 2 · min(#{draw ≤ 0} + 1, #{draw ≥ 0} + 1) / (draws
    + 1), at most 1: one minus the largest level whose interval still excludes 0 (Efron & Tibshirani 1993, ch. 15).

    Where all differences are equal the bootstrap has no width. Without any difference p is 1, otherwise NaN. Of 0/1
    scores the interval is then the conservative one that follows from exact binomial bounds: unanimity of n problems
    leaves each other outcome a probability of at most 1 − tail^(1/n).

    Args:
        a: [n] one score per problem. b: [n] scores of the same problems.
        draws: bootstrap draws.
        seed: of the draws.
        level: of the interval.

    Raises:
        ValueError: different lengths, no values, NaN or infinite ones.
    """
    a, b = _pairs(a, b, at_least=1)
    differences = a - b
    diff = _mean_difference(a, b)
    if _equal(differences):
        low = high = diff
        if is_binary(a) and is_binary(b):
            other = 1 - _unanimous(len(a), level)
            low, high = (-other, other) if diff == 0 else (max(-1, diff - 2 * other), min(1, diff + 2 * other))
        return Difference(diff, low, high, 1.0 if diff == 0 else math.nan)
    drawn = _bootstrap_means(differences, draws, seed)
    drawn[np.abs(drawn) <= 1e-12 * np.abs(differences).max()] = 0  # 0 up to rounding
    p = 2 * (min(np.sum(drawn <= 0), np.sum(drawn >= 0)) + 1) / (draws + 1)
    return Difference(diff, *percentile_interval(drawn, level), float(min(1, p)))


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> McNemar:
    """McNemar's exact test: are the problems that one of two solves as often a's as b's?

    Given the m problems on which they differ, the number that only a solves is Binomial(m, 1/2) if there is no
    difference; p is two-sided, 1 for m = 0 (McNemar 1947; exact form).

    Args:
        a: [n] 0 or 1 per problem. b: [n] 0 or 1 for the same problems.

    Raises:
        ValueError: scores other than 0 and 1, different lengths, no values.
    """
    a, b = _pairs(a, b, at_least=1)
    if not (is_binary(a) and is_binary(b)):
        raise ValueError("McNemar's test needs scores of 0 and 1; use the paired bootstrap for others")
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p)


def required_problems(a: ArrayLike, b: ArrayLike, *, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Problems at which a difference of the size seen is found with probability `power` by a two-sided paired test.

    ⌈((z_{1−α/2} + z_power) · s / d)²⌉ with mean d and standard deviation s of the paired differences, at least 2; None
    where d is 0.

    Args:
        a: [n] one score per problem. b: [n] scores of the same problems.
        power: probability of finding it.
        alpha: level of the test.

    Raises:
        ValueError: different lengths, fewer than two values, NaN or infinite ones.
    """
    a, b = _pairs(a, b, at_least=2)
    return _required(_mean_difference(a, b), float((a - b).var(ddof=1)), power, alpha)


def mean_interval(seed_means: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a recipe's mean over training seeds: the one-sample t interval; NaN where all seeds scored the same.

    Args:
        seed_means: [seeds] the mean score of each seed.
        level: of the interval.

    Raises:
        ValueError: fewer than two seeds, NaN or infinite means.
    """
    values = _finite(seed_means, at_least=2)
    found = _t_test(float(values.mean()), _variance(values) / len(values), len(values) - 1, level)
    return found.low, found.high


def welch(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Welch's t test and interval for two recipes with their own training seeds (Welch 1947).

    With the variances v of the mean, s²/n per arm: t = (mean(a) − mean(b)) / √(v_a + v_b), df = (v_a + v_b)² /
    (v_a²/(n_a − 1) + v_b²/(n_b − 1)). Bounds, p and df are NaN where neither arm has any spread.

    Args:
        a: [seeds of a] seed means. b: [seeds of b] seed means.
        level: of the interval.

    Raises:
        ValueError: an arm with fewer than two seeds, NaN or infinite means.
    """
    a, b = _finite(a, at_least=2), _finite(b, at_least=2)
    v_a, v_b = _variance(a) / len(a), _variance(b) / len(b)
    weight = v_a**2 / (len(a) - 1) + v_b**2 / (len(b) - 1)
    df = (v_a + v_b) ** 2 / weight if weight else math.nan
    return _t_test(_mean_difference(a, b), v_a + v_b, df, level)


def paired_t(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Paired t test and interval for two recipes whose runs come in pairs, seed by seed.

    Bounds, p and df are NaN where the difference is the same for every seed.

    Args:
        a: [seeds] seed means. b: [seeds] seed means in the same order of seeds.
        level: of the interval.

    Raises:
        ValueError: different lengths, fewer than two seeds, NaN or infinite means.
    """
    a, b = _pairs(a, b, at_least=2)
    return _t_test(_mean_difference(a, b), _variance(a - b, _scale(a, b)) / len(a), len(a) - 1, level)


def required_seeds(
    a: ArrayLike, b: ArrayLike, *, paired: bool = False, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Training seeds per arm at which a difference of the size seen is found with probability `power`.

    The smallest n ≥ 2 for which the two-sided t test (Welch's with n seeds per arm, or the paired one) has that power
    by the noncentral t distribution, difference and variances being those seen. None where the difference or the
    spread is 0. Variances from a few seeds are rough, and so is n.

    Args:
        a: [seeds of a] seed means. b: [seeds of b] seed means.
        paired: whether seeds are compared pair by pair.
        power: probability of finding it.
        alpha: level of the test.

    Raises:
        ValueError: as `welch` and `paired_t`.
    """
    if paired:
        a, b = _pairs(a, b, at_least=2)
        variances = [_variance(a - b, _scale(a, b))]
    else:
        a, b = _finite(a, at_least=2), _finite(b, at_least=2)
        variances = [_variance(a), _variance(b)]
    diff, variance = abs(_mean_difference(a, b)), sum(variances)
    n = _required(diff, variance, power, alpha)
    if n is None or variance == 0:
        return None
    df_per_seed = variance**2 / sum(v**2 for v in variances)

    def reached(n: int) -> float:
        df = df_per_seed * (n - 1)
        return float(stats.nct.sf(stats.t.isf(alpha / 2, df), df, diff / math.sqrt(variance / n)))

    while n < 1000 and reached(n) < power:  # the normal approximation falls short by a few
        n += 1
    return n


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): the i-th smallest of m times m − i + 1, made monotone, at most 1.

    Rejecting what is at most α keeps the probability of any false rejection at α. A NaN is no test: it stays NaN and
    does not count among the m.
    """
    tested = sorted((p, index) for index, p in enumerate(ps) if not math.isnan(p))
    adjusted, running = [math.nan] * len(ps), 0.0
    for rank, (p, index) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - rank)))
        adjusted[index] = running
    return adjusted


def is_binary(values: ArrayLike) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(np.isin(values, (0, 1)).all())


def _finite(values: ArrayLike, *, at_least: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"expected a list of {at_least} or more scores, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"scores must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _pairs(a: ArrayLike, b: ArrayLike, *, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite(a, at_least=at_least), _finite(b, at_least=at_least)
    if len(a) != len(b):
        raise ValueError(f"paired scores need equal lengths, got {len(a)} and {len(b)}")
    return a, b


def _bootstrap_means(values: np.ndarray, draws: int, seed: int) -> np.ndarray:
    counts = resample_counts(len(values), draws=draws, seed=seed)
    return np.concatenate([chunk @ values for chunk in counts]) / len(values)


def _scale(a: np.ndarray, b: np.ndarray) -> float:
    return float(max(np.abs(a).max(), np.abs(b).max()))


def _mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    diff = float(a.mean() - b.mean())
    return 0.0 if abs(diff) <= 1e-12 * _scale(a, b) else diff  # rounding is no difference


def _equal(values: np.ndarray, scale: float = 0.0) -> bool:
    """Whether all values are the same up to rounding of numbers as large as they or `scale`."""
    return bool(np.ptp(values) <= 1e-12 * max(scale, float(np.abs(values).max())))


def _variance(values: np.ndarray, scale: float = 0.0) -> float:
    return 0.0 if _equal(values, scale) else float(values.var(ddof=1))


def _unanimous(n: int, level: float) -> float:
    """Exact lower bound of the probability of an outcome that all n of n problems had."""
    return float(((1 - level) / 2) ** (1 / n))


def _t_test(diff: float, variance: float, df: float, level: float) -> Difference:
    """`variance` is the one of `diff`."""
    if variance == 0:
        return Difference(diff, math.nan, math.nan, math.nan)
    error = math.sqrt(variance)
    reach = float(stats.t.isf((1 - level) / 2, df)) * error
    return Difference(diff, diff - reach, diff + reach, float(2 * stats.t.sf(abs(diff) / error, df)), float(df))


def _required(diff: float, variance: float, power: float, alpha: float) -> int | None:
    """By the normal approximation."""
    if diff == 0:
        return None
    z = stats.norm.isf(alpha / 2) + stats.norm.ppf(power)
    return max(2, math.ceil(z**2 * variance / diff**2))
