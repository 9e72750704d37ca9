"""Intervals and tests: values by hand, oracles (scipy, enumeration, power tables), and coverage in simulation.

The simulation is the reason for the rule that recipes are compared over training seeds: a bootstrap over problems knows
nothing of the spread between seeds.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lightning_vlm.metrics.statistics import (
    bootstrap_interval,
    holm,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap,
    paired_t,
    required_problems,
    required_seeds,
    welch,
)

# ---------------------------------------------------------------------------------------------- over problems


def test_bootstrap_interval_of_a_proportion():
    """300 of 1,000: the normal interval is .3 ± 1.96 · √(.3 · .7 / 1000) = .3 ± .0284."""
    low, high = bootstrap_interval([1.0] * 300 + [0.0] * 700)
    assert low == pytest.approx(0.3 - 0.0284, abs=0.0015) and high == pytest.approx(0.3 + 0.0284, abs=0.0015)


def test_bootstrap_interval_against_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=80)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(expected.low, abs=0.02) and high == pytest.approx(expected.high, abs=0.02)
    narrow_low, narrow_high = bootstrap_interval(values, level=0.5)
    assert low < narrow_low < values.mean() < narrow_high < high


def test_bootstrap_interval_follows_from_its_seed():
    values = np.random.default_rng(0).random(50)
    assert (
        bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    )


def test_bootstrap_interval_without_spread():
    """All right: Clopper-Pearson, whose bound for 20 of 20 is .025^(1/20) = .8316; other equal scores have no width."""
    exact = stats.binomtest(20, 20).proportion_ci(method="exact")
    assert bootstrap_interval([1.0] * 20) == (pytest.approx(exact.low), 1.0)
    assert bootstrap_interval([1] * 20)[0] == pytest.approx(0.8316, abs=5e-5)
    assert bootstrap_interval([0.0] * 20) == (0.0, pytest.approx(1 - exact.low))
    assert bootstrap_interval([0.5] * 20) == (0.5, 0.5)
    assert bootstrap_interval([1.0], level=0.9) == (pytest.approx(0.05), 1.0)


def test_paired_bootstrap_against_all_resamples():
    """Five problems have 5⁵ equally likely resamples: their quantiles and tail are the bootstrap without chance."""
    a, b = np.array([1.0, 0.5, 1.0, 0.25, 0.75]), np.array([0.5, 0.75, 0.25, 0.0, 0.25])
    means = np.array([np.mean(draw) for draw in itertools.product(a - b, repeat=5)])
    found = paired_bootstrap(a, b, draws=100_000)
    assert found.diff == pytest.approx(0.35)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.051)  # one step of the means
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.051)
    assert found.p == pytest.approx(2 * np.mean(means <= 0), abs=0.002)


def test_paired_bootstrap_p_is_one_minus_the_largest_level_that_excludes_0():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.2, 1, 60), rng.normal(0, 1, 60)
    p = paired_bootstrap(a, b).p
    assert 0.01 < p < 0.9
    assert paired_bootstrap(a, b, level=1 - 1.02 * p).low > 0 > paired_bootstrap(a, b, level=1 - 0.98 * p).low
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (back.diff, back.p) == pytest.approx((-there.diff, there.p))
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_paired_bootstrap_without_spread():
    """Nobody differs on 10 problems: the chance to differ may still be 1 − .025^(1/10) = .3085."""
    same = paired_bootstrap([1, 0] * 5, [1, 0] * 5)
    assert same[:4] == (0.0, pytest.approx(-0.3085, abs=5e-5), pytest.approx(0.3085, abs=5e-5), 1.0)
    opposite = paired_bootstrap([1] * 10, [0] * 10)
    assert opposite[:3] == (1.0, pytest.approx(1 - 2 * 0.3085, abs=1e-4), 1.0) and math.isnan(opposite.p)
    assert paired_bootstrap([0] * 10, [1] * 10)[:3] == (-1.0, -1.0, pytest.approx(-opposite.low))
    shifted = paired_bootstrap([0.5, 1.5], [0.25, 1.25])
    assert shifted[:3] == (0.25, 0.25, 0.25) and math.isnan(shifted.p)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(8, 2, 2 * (1 + 10 + 45) / 1024), (0, 5, 2 / 32), (3, 3, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    a = [1] * only_a + [0] * only_b + [1, 1, 0]
    b = [0] * only_a + [1] * only_b + [1, 1, 0]
    assert mcnemar_exact(a, b) == (only_a, only_b, pytest.approx(p))
    assert mcnemar_exact(b, a) == (only_b, only_a, pytest.approx(p))


def test_required_problems_by_hand():
    """20 of 100 for a, 10 for b: d = .1, s² = (30 − 100 · .01)/99; (1.95996 + .84162)² · .29293/.01 = 229.9."""
    a, b = [1] * 20 + [0] * 80, [0] * 20 + [1] * 10 + [0] * 70
    assert required_problems(a, b) == required_problems(b, a) == 230
    assert required_problems(a, b, power=0.9) > 230 < required_problems(a, b, alpha=0.01)
    assert required_problems(a, a) is None
    assert required_problems([1, 1], [0, 0]) == 2


# ------------------------------------------------------------------------------------------------- over seeds


def test_welch_by_hand_and_scipy():
    """a = 1 2 3, b = 2 4 6: v = 1/3 and 4/3, df = (5/3)² / (1/18 + 8/9) = 50/17."""
    a, b = [1, 2, 3], [2, 4, 6]
    found, oracle = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert found.diff == -2 and found.df == pytest.approx(50 / 17)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    wider = oracle.confidence_interval(0.99)
    assert welch(a, b, level=0.99)[1:3] == (pytest.approx(wider.low), pytest.approx(wider.high))
    uneven = [0.5, 0.52, 0.55, 0.49, 0.51]
    assert welch(uneven, a).p == pytest.approx(stats.ttest_ind(uneven, a, equal_var=False).pvalue)


def test_paired_t_by_hand():
    """d = 1 0 2: mean 1, s 1, t = √3 with 2 df, whose two-sided p is 1 − t/√(2 + t²) = 1 − √(3/5)."""
    found = paired_t([1, 2, 3], [0, 2, 1])
    reach = 4.302653 / math.sqrt(3)
    assert found == pytest.approx((1, 1 - reach, 1 + reach, 1 - math.sqrt(3 / 5), 2))
    assert paired_t([3, 1, 2], [1, 0, 2]).p == pytest.approx(found.p)


def test_mean_interval_by_hand():
    assert mean_interval([0.50, 0.52, 0.54]) == pytest.approx(
        (0.52 - 4.302653 * 0.02 / 3**0.5, 0.52 + 4.302653 * 0.02 / 3**0.5)
    )


def test_no_spread_gives_no_p():
    for found in (welch([0.5, 0.5], [0.6, 0.6]), welch([0.5, 0.5], [0.5, 0.5]), paired_t([0.1, 0.2], [0.3, 0.4])):
        assert all(map(math.isnan, (found.low, found.high, found.p, found.df)))
    assert welch([0.5, 0.5], [0.6, 0.6]).diff == pytest.approx(-0.1)
    assert all(map(math.isnan, mean_interval([0.3, 0.1 + 0.2])))  # equal up to rounding
    assert math.isnan(paired_t([0.1 + 0.2, 0.5], [0.3, 0.5]).p)  # the same
    one_sided = welch([0.5, 0.5, 0.5], [0.6, 0.62, 0.64])
    assert one_sided.df == pytest.approx(2) and 0 < one_sided.p < 1


def test_holm_by_hand():
    """.01 · 3, .03 · 2, and .04 · 1 raised to what is before it."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []
    adjusted = holm([0.02, math.nan, 0.01])
    assert math.isnan(adjusted[1]) and [adjusted[0], adjusted[2]] == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize(("effect", "n"), [(0.5, 64), (0.8, 26), (1.0, 17), (1.5, 9)])
def test_required_seeds_against_the_tables_of_the_t_test(effect, n):
    """Per group at power .8, two-sided .05 (Cohen 1988): standard deviations are 1, the difference is the effect."""
    a = np.array([-1.0, 0.0, 1.0])
    assert required_seeds(a, a + effect) == n


@pytest.mark.parametrize(("effect", "n"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_required_seeds_of_pairs_against_the_tables(effect, n):
    noise, spread = np.array([0.3, 7.0, -4.0]), np.array([-1.0, 0.0, 1.0])
    assert required_seeds(noise + spread + effect, noise, paired=True) == n


def test_required_seeds_where_no_number_helps_or_any_does():
    assert required_seeds([0.5, 0.52], [0.52, 0.5]) is None
    assert required_seeds([0.5, 0.5], [0.6, 0.6]) is None
    assert required_seeds([0.1, 0.2], [0.3, 0.4], paired=True) is None
    assert required_seeds([0.5, 0.5001], [0.9, 0.9001]) == 2
    assert required_seeds([0.5, 0.6], [0.5, 0.6 + 1e-7]) > 10**9


BAD = [
    (bootstrap_interval, ([],), "1 or more"),
    (bootstrap_interval, ([0.5, math.nan],), "finite"),
    (paired_bootstrap, ([1, 0], [1]), "equal lengths, got 2 and 1"),
    (paired_bootstrap, ([1, math.inf], [1, 0]), "finite"),
    (mcnemar_exact, ([1, 0.5], [1, 0]), "0 and 1"),
    (mcnemar_exact, ([1], [1, 0]), "equal lengths"),
    (required_problems, ([1], [0]), "2 or more"),
    (mean_interval, ([0.5],), "2 or more"),
    (welch, ([0.5], [0.4, 0.5]), "2 or more"),
    (welch, ([0.5, math.nan], [0.4, 0.5]), "finite"),
    (paired_t, ([0.5, 0.6], [0.4, 0.5, 0.6]), "equal lengths"),
    (required_seeds, ([0.5], [0.4, 0.5]), "2 or more"),
]


@pytest.mark.parametrize(("function", "args", "text"), BAD, ids=lambda v: getattr(v, "__name__", None))
def test_what_is_refused(function, args, text):
    with pytest.raises(ValueError, match=text):
        function(*args)


# ------------------------------------------------------------------------------------------------- simulation

SEED = 20
N = 750  # problems
P = 0.5


def seed_scores(rng, repetitions: int, seeds: int, spread: float, difficulty=None) -> np.ndarray:
    """[repetitions, seeds, N] scores of 0 and 1; a seed's true accuracy is the recipe's + spread · normal."""
    base = np.full(N, P) if difficulty is None else difficulty
    shift = spread * rng.standard_normal((repetitions, seeds, 1), dtype=np.float32)
    return rng.random((repetitions, seeds, N), dtype=np.float32) < base.astype(np.float32) + shift


def covers(low: float, high: float, truth: float) -> bool:
    return low <= truth <= high


def rates(spread: float, seeds: int, difficulty=None, repetitions: int = 4000) -> dict[str, float]:
    """Coverage of the arm's and of Welch's interval, and false positives, for two arms that are the same recipe."""
    rng = np.random.default_rng(SEED)
    truth = P if difficulty is None else float(difficulty.mean())
    means = [seed_scores(rng, repetitions, seeds, spread, difficulty).mean(axis=2) for _ in "ab"]
    arms = [covers(*mean_interval(mean), truth) for mean in means[0]]
    tests = [welch(a, b) for a, b in zip(*means, strict=True)]
    return {
        "arm": float(np.mean(arms)),
        "difference": float(np.mean([covers(t.low, t.high, 0) for t in tests])),
        "false positives": float(np.mean([t.p <= 0.05 for t in tests])),
    }


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.017, 0.034])
def test_intervals_over_seeds_cover(spread, seeds):
    found = rates(spread, seeds)
    message = f"spread {spread}, {seeds} seeds, simulation seed {SEED}: {found}"
    assert 0.92 <= found["arm"] <= 0.99 and 0.92 <= found["difference"] <= 0.99, message
    assert found["false positives"] <= 0.065, message


@pytest.mark.parametrize("spread", [0.0, 0.017, 0.034])
def test_intervals_over_seeds_cover_where_problems_differ_in_difficulty(spread):
    """Truth is the expected accuracy on these problems; all seeds share their difficulty (from .12 to .88)."""
    difficulty = np.clip(np.random.default_rng(1).beta(1, 1, N), 0.12, 0.88)
    found = rates(spread, 3, difficulty)
    message = f"spread {spread}, simulation seed {SEED}: {found}"
    assert 0.92 <= found["arm"] <= 0.99 and 0.92 <= found["difference"] <= 0.99, message
    assert found["false positives"] <= 0.065, message


def test_paired_t_covers_where_start_models_are_shared():
    """A seed's start model moves both arms by the same 3.4 points · normal, each run by 1 point of its own."""
    rng = np.random.default_rng(SEED)
    starts = 0.034 * rng.standard_normal((2000, 5))
    a, b = (rng.binomial(N, P + starts + 0.01 * rng.standard_normal((2000, 5))) / N for _ in "ab")
    tests = [paired_t(x, y) for x, y in zip(a, b, strict=True)]
    coverage = np.mean([covers(t.low, t.high, 0) for t in tests])
    width = np.mean([t.high - t.low for t in tests])
    width_welch = np.mean([t.high - t.low for t in (welch(x, y) for x, y in zip(a, b, strict=True))])
    assert 0.92 <= coverage <= 0.99 and width < 0.8 * width_welch, f"{coverage}, {width}, {width_welch}, seed {SEED}"


@pytest.mark.parametrize(("spread", "ceiling"), [(0.017, 0.90), (0.034, 0.75)])
def test_a_bootstrap_over_problems_does_not_cover_a_recipe(spread, ceiling):
    """Of the seeds' mean per problem, as one would do it: most of the uncertainty is between seeds."""
    rng, repetitions = np.random.default_rng(SEED), 300
    a, b = (seed_scores(rng, repetitions, 3, spread).mean(axis=1) for _ in "ab")
    arm = np.mean([covers(*bootstrap_interval(x, draws=300), P) for x in a])
    both = np.mean([covers(*paired_bootstrap(x, y, draws=300)[1:3], 0) for x, y in zip(a, b, strict=True)])
    assert arm < ceiling and both < ceiling, f"arm {arm}, difference {both}, simulation seed {SEED}"


def test_a_bootstrap_over_problems_covers_a_checkpoint():
    """What it is for: one checkpoint's accuracy on problems of this kind, and a difference of two."""
    rng, repetitions = np.random.default_rng(SEED), 400
    a, b = (seed_scores(rng, repetitions, 1, 0.0)[:, 0] for _ in "ab")
    arm = np.mean([covers(*bootstrap_interval(x, draws=400), P) for x in a])
    tests = [paired_bootstrap(x, y, draws=400) for x, y in zip(a, b, strict=True)]
    both = np.mean([covers(t.low, t.high, 0) for t in tests])
    exact = np.mean([mcnemar_exact(x, y).p <= 0.05 for x, y in zip(a, b, strict=True)])
    message = f"arm {arm}, difference {both}, McNemar {exact}, simulation seed {SEED}"
    assert 0.92 <= arm <= 0.99 and 0.92 <= both <= 0.99 and exact <= 0.065, message


def test_holm_keeps_the_error_of_a_whole_family():
    """Three arms that are the same recipe: how often is any of the three pairs called different?"""
    rng = np.random.default_rng(SEED)
    means = rng.binomial(N, P + 0.017 * rng.standard_normal((1500, 3, 3))) / N
    families = [[welch(x, y).p for x, y in itertools.combinations(arms, 2)] for arms in means]
    alone = np.mean([min(ps) <= 0.05 for ps in families])
    adjusted = np.mean([min(holm(ps)) <= 0.05 for ps in families])
    assert adjusted <= 0.065 < alone, f"unadjusted {alone}, Holm {adjusted}, simulation seed {SEED}"
