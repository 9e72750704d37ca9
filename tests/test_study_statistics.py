"""A study's intervals and verdicts in 1,000 simulated studies of known truth, and the power formula against simulation.

What is simulated is said in `tools.simulate_studies`. Bounds are those of a binomial count over the studies that a rate
of exactly 5 % (95 %, 80 %) leaves once in a thousand times; all draws have a seed, so that results are the same always.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lightning_vlm.metrics.statistics import holm, paired_bootstrap, paired_t, required_seeds, welch
from tools import simulate_studies
from tools.simulate_studies import EFFECTS, KINDS, SEED, SPREADS, Setting, Verdicts

STUDIES = 1000


def at_least(rate: float, n: int = STUDIES) -> float:
    """What a share of n still reaches, once in a thousand times, that is `rate` in truth."""
    return float(stats.binom.ppf(0.001, n, rate)) / n


def at_most(rate: float, n: int = STUDIES) -> float:
    """What a share of n does not pass, but once in a thousand times, that is `rate` in truth."""
    return float(stats.binom.isf(0.001, n, rate)) / n


def in_order(said: Verdicts, setting: Setting) -> tuple[bool, str]:
    """Whether intervals cover and false alarms are rare, and the numbers."""
    coverage, alarms = said.coverage(setting.truth), said.false_alarms(setting.truth)
    told = f"coverage {coverage:.3f}, false alarms {alarms:.3f}, simulation seed {SEED}, {setting}"
    print(told)
    return coverage >= at_least(0.95) and alarms <= at_most(0.05), told


def test_bounds_by_hand():
    """Normal: 5 % of 1,000 is 50 ± 3.09 · 6.9, from 29 to 71; with the binomial's skew up to 73."""
    assert at_most(0.05) == pytest.approx(0.073, abs=0.001) and at_least(0.95) == 1 - at_most(0.05)


@pytest.mark.parametrize("effects", EFFECTS)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover_and_verdicts_are_rarely_false(kind, spread, effects):
    shared, pairing = KINDS[kind]
    setting = Setting(effects=EFFECTS[effects], spread=spread, shared=shared, studies=STUDIES)
    said = simulate_studies.verdicts(setting.simulate(), paired=kind == "paired t")
    good, told = in_order(said, setting)
    assert good, told
    assert said.coverage(setting.truth) <= 0.985, told  # nor wide beyond use
    if effects == "differences":
        assert said.found(setting.truth) > 0.15, told
    assert pairing == "auto" or kind.endswith("shared starts")


@pytest.mark.parametrize("spread", SPREADS[1:])
def test_a_bootstrap_over_problems_would_fail_here(spread):
    """It takes the five seeds for all there are: intervals too narrow, and up to six times the alarms allowed."""
    setting = Setting(spread=spread, studies=STUDIES)
    said = simulate_studies.over_problems(setting.simulate())
    good, told = in_order(said, setting)
    assert not good and said.coverage(setting.truth) < at_least(0.95) and said.false_alarms([0] * 6) > at_most(0.05), (
        told
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_simulated_is_what_compare_says(kind):
    """The same numbers by `compare`, which chooses the test by itself where start models are shared or not."""
    shared, pairing = KINDS[kind]
    setting = Setting(effects=EFFECTS["differences"], spread=0.017, shared=shared, studies=20)
    scores = setting.simulate()
    fast = simulate_studies.verdicts(scores, paired=kind == "paired t")
    said = simulate_studies.by_compare(scores, shared=shared, pairing=pairing)
    for name in ("diff", "low", "high", "p"):
        np.testing.assert_allclose(getattr(fast, name), getattr(said, name), rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", ["Welch's t", "paired t"])
def test_a_thousand_studies_through_compare(kind, spread):
    shared, pairing = KINDS[kind]
    setting = Setting(spread=spread, shared=shared, studies=STUDIES)
    good, told = in_order(simulate_studies.by_compare(setting.simulate(), shared=shared, pairing=pairing), setting)
    assert good, told


def test_the_simulation_by_hand():
    """Two studies of two arms and two seeds; Holm: .01, .04, .03 → .03, .06, .06."""
    scores = Setting(effects=(0.0, 0.3), spread=0.02, seeds=4, studies=2).simulate()
    means = scores.mean(axis=3)
    for paired, test in ((False, welch), (True, paired_t)):
        said = simulate_studies.verdicts(scores, paired=paired)
        for row in range(2):
            by_hand = test(means[row, 0], means[row, 1])
            assert (said.diff[row, 0], said.low[row, 0], said.p[row, 0]) == pytest.approx(
                (by_hand.diff, by_hand.low, by_hand.p)
            )
    rows = np.array([[0.01, 0.04, 0.03], [0.5, 0.02, 0.9]])
    np.testing.assert_allclose(simulate_studies.holm_rows(rows), [[0.03, 0.06, 0.06], [1.0, 0.06, 1.0]])
    np.testing.assert_allclose(simulate_studies.holm_rows(rows), [holm(list(row)) for row in rows])
    said = simulate_studies.over_problems(scores, draws=200)
    by_hand = paired_bootstrap(scores[1, 0].mean(axis=0), scores[1, 1].mean(axis=0), draws=200)
    assert (said.diff[1, 0], said.low[1, 0], said.high[1, 0], said.p[1, 0]) == pytest.approx(by_hand[:4])


def test_rates_by_hand():
    """Pairs 0 (truth 0), 1 (truth −.1). Study 1: right. Study 2: a difference that is none, and one missed. Study 3:
    the wrong sign, both intervals beside the truth."""
    truth = np.array([0.0, -0.1])
    said = Verdicts(
        diff=np.array([[0.01, -0.12], [0.05, -0.1], [0.0, 0.1]]),
        low=np.array([[-0.1, -0.2], [0.01, -0.3], [0.01, 0.05]]),
        high=np.array([[0.1, -0.01], [0.1, 0.1], [0.02, 0.15]]),
        p=np.array([[0.9, 0.05], [0.01, 0.4], [1.0, 0.001]]),
    )
    assert said.coverage(truth) == pytest.approx(3 / 6)
    assert said.false_alarms(truth) == pytest.approx(2 / 3)
    assert said.found(truth) == pytest.approx(1 / 3) and math.isnan(said.found(np.zeros(2)))


def test_spread_of_runs_is_as_said():
    """Without any spread of the seeds runs still differ by 2.9 points: √(.2142/256) of answers alone."""
    for shared in (False, True):
        for spread, expected in ((0.0, 0.0289), (0.034, 0.0446)):
            setting = Setting(spread=spread, shared=shared, studies=400, seeds=8)
            assert setting.run_sd() == pytest.approx(expected, abs=2e-4)
            means = setting.simulate().mean(axis=3)
            assert math.sqrt(means.var(axis=2, ddof=1).mean()) == pytest.approx(expected, rel=0.03)
    starts = Setting(spread=0.2, shared=True, studies=100).simulate().mean(axis=3)
    together = np.mean([np.corrcoef(study[0], study[1])[0, 1] for study in starts])
    assert 0.3 < together < 0.7


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("spread", "effect"), [(0.0, 0.03), (0.017, 0.03), (0.017, 0.06), (0.034, 0.06)])
def test_the_seeds_that_are_needed_find_the_difference(spread, effect, shared, alpha):
    """With that many seeds 80 % of the studies find it, with one less they do not."""
    setting = Setting(spread=spread, shared=shared, studies=STUDIES)
    n = simulate_studies.seeds_needed(effect, setting, alpha=alpha)
    found = simulate_studies.found_with(n, effect, setting, alpha=alpha)
    fewer = simulate_studies.found_with(n - 1, effect, setting, alpha=alpha)
    told = f"{n} seeds: {found}, one less: {fewer}, simulation seed {SEED}"
    print(told)
    assert found >= at_least(0.8) and fewer <= at_most(0.8), told


def test_needed_seeds_by_hand():
    """Variances .0289² each and a difference of 3 points: 2 · (1.96 + .84)² · .0289²/.03² = 14.6 by the normal."""
    setting = Setting()
    half = setting.run_sd() / math.sqrt(2)
    n = simulate_studies.seeds_needed(0.03, setting)
    assert n == required_seeds([0.03 + half, 0.03 - half], [half, -half]) and n == 16
    rough = simulate_studies.named(0.03, replace(setting, studies=100))
    assert 0 < len(rough) < 100 and rough.min() > 5
