"""Comparisons of chosen pairs, of numbers that exist once per seed, and of what greater means."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from lightning_vlm.metrics.statistics import paired_bootstrap
from lightning_vlm.studies.compare import compare, compare_values, difference
from lightning_vlm.studies.per_example import Run, read_evaluation
from lightning_vlm.studies.wording import Unit

from .compare_kit import folder_of_its_own, share, write  # noqa: F401


def runs_of(**arms) -> list[Run]:
    """arm=(right of 20, ...): a run per seed; where it started from is not known."""
    return [
        Run(arm, seed, read_evaluation(Path(write(f"{arm}-{seed}.jsonl", share(n)))))
        for arm, counts in arms.items()
        for seed, n in enumerate(counts)
    ]


def test_only_the_pairs_that_are_asked_for_are_tested():
    """Holm over the two: the same p, but twice the smaller one instead of three times."""
    runs = runs_of(a=(10, 12, 11), b=(15, 18, 16), c=(12, 13, 14))
    every, two = compare(runs), compare(runs, pairs=[("c", "a"), ("a", "b")])
    assert [(pair.a, pair.b) for pair in every.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(pair.a, pair.b) for pair in two.pairs] == [("c", "a"), ("a", "b")] and (every.tested, two.tested) == (3, 2)
    p = every.pairs[0].result.p
    assert two.pairs[1].result == every.pairs[0].result
    assert (every.pairs[0].p_adjusted, two.pairs[1].p_adjusted) == pytest.approx((3 * p, 2 * p))
    assert [arm.name for arm in two.arms] == ["a", "b", "c"]
    alone = compare(runs_of(a=(10, 12, 11)), pairs=[])
    assert (alone.pairs, alone.tested, alone.arms[0].mean) == ([], 0, pytest.approx(0.55))


def test_a_difference_outside_the_family_has_an_interval_and_no_verdict():
    runs = runs_of(a=(10, 12, 11), b=(15, 18, 16), c=(12, 13, 14))
    every, one = compare(runs), compare(runs, pairs=[("a", "b")])
    outside = difference(one, "b", "c")
    assert outside.result == every.pairs[2].result and outside.test == "Welch's t"
    assert outside.verdict == "no verdict" and not outside.found and math.isnan(outside.p_adjusted)
    assert difference(one, "a", "b") is one.pairs[0]


def test_pairs_that_are_none():
    runs = runs_of(alpha=(10,), beta=(12,))
    for pairs, text in (
        ([("alpha", "bta")], "names no arm 'bta'; did you mean 'beta'"),
        ([("alpha", "alpha")], "an arm and itself"),
        ([("alpha", "beta"), ("beta", "alpha")], "named twice"),
    ):
        with pytest.raises(ValueError, match=text):
            compare(runs, pairs=pairs)


def test_verdicts_in_a_few_words():
    recipes = compare(runs_of(OPD=(15, 18, 16), none=(10, 12, 11), SFT=(11, 10, 11)), pairs=[("none", "OPD")])
    assert recipes.pairs[0].short() == "OPD > none by 26.7 points [11.1, 42.3], 3 seeds"
    assert recipes.to_json()["pairs"][0]["short"] == recipes.pairs[0].short()
    (pair,) = compare(runs_of(OPD=(15, 18, 16, 16), none=(15, 16, 14))).pairs
    low, high = (f"{100 * bound:.1f}".replace("-", "−") for bound in pair.result[1:3])
    assert pair.short() == (
        f"OPD − none: not distinguishable (6.2 points [{low}, {high}], 4 + 3 seeds); needs about {pair.required} seeds"
    )
    (pair,) = compare(runs_of(b=(5,), a=(15,))).pairs
    low, high = (f"{-100 * bound:.1f}" for bound in (pair.result.high, pair.result.low))
    assert pair.short() == f"a > b by 50.0 points [{low}, {high}], these checkpoints"
    (pair,) = compare(runs_of(a=(15, 16), b=(12,))).pairs
    assert pair.short().startswith("a − b: no verdict (17.5 points; b has one training seed")


def test_seeds_are_counted_in_the_order_of_the_names():
    (pair,) = compare(runs_of(none=(10, 11, 10), OPD=(18, 18, 19, 18))).pairs
    assert pair.short().startswith("OPD > none by") and pair.short().endswith("], 4 + 3 seeds")


def test_an_interval_without_0_is_explained_in_a_few_words_too():
    """p is .031 alone and .094 of three: the interval is not Holm's."""
    pair = compare(runs_of(a=(16,), b=(10,), c=(13,))).pairs[0]
    assert pair.result.low > 0
    assert ", these checkpoints, p = .094 by Holm over 3 pairs); needs about " in pair.short()
    assert pair.short().endswith(" problems")
    pair = compare(runs_of(a=(10,), b=(5,))).pairs[0]  # p = 2/32, while a bootstrap rarely misses all five
    assert pair.result.low > 0 and ", these checkpoints, p = .062 by McNemar's exact test); needs" in pair.short()


def test_greater_need_not_be_better():
    runs = runs_of(OPD=(15, 18, 16), none=(10, 12, 11))
    worse, neither = compare(runs, higher="worse"), compare(runs, higher="neither")
    (pair,) = worse.pairs
    assert (pair.verdict, pair.better, pair.greater, pair.found) == ("better", "none", "OPD", True)
    assert pair.sentence.startswith("none is better than OPD, lower by 26.7 points [11.1, 42.3], p = .011 (")
    (pair,) = neither.pairs
    assert (pair.verdict, pair.better, pair.greater) == ("different", None, "OPD")
    assert pair.sentence.startswith("OPD is higher than none by 26.7 points [11.1, 42.3], p = .011 (")
    assert worse.pairs[0].short() == neither.pairs[0].short() == "OPD > none by 26.7 points [11.1, 42.3], 3 seeds"


def test_numbers_that_exist_once_per_seed():
    """The same tests as over seed means; not a word of problems."""
    values = {"a": {0: 1.10, 1: 1.14, 2: 1.12}, "b": {0: 1.30, 1: 1.35, 2: 1.31}}
    found = compare_values(values, metric="CIDEr", files={"a": {0: Path("x/scores.json")}})
    oracle = stats.ttest_ind([1.10, 1.14, 1.12], [1.30, 1.35, 1.31], equal_var=False)
    (pair,) = found.pairs
    assert pair.result.p == pytest.approx(oracle.pvalue) and pair.reason.endswith("are not all known")
    assert (found.problems, pair.test, pair.about, pair.better) == (0, "Welch's t", "recipes", "b")
    assert pair.short().startswith("b > a by 0.200 [0.1") and pair.short().endswith("], 3 seeds")
    arm = found.arms[0]
    assert (arm.interval_over, arm.seeds, arm.mean) == ("seeds", [0, 1, 2], pytest.approx(1.12))
    assert arm.to_json()["files"] == ["x/scores.json", "a-1", "a-2"]
    assert "problem" not in " ".join([*found.notes, pair.sentence])
    starts = {arm: {seed: f"s{seed}" for seed in range(3)} for arm in values}
    paired = compare_values(values, starts, metric="CIDEr").pairs[0]
    oracle = stats.ttest_rel([1.10, 1.14, 1.12], [1.30, 1.35, 1.31])
    assert (paired.test, paired.result.p) == ("paired t", pytest.approx(oracle.pvalue))


def test_numbers_of_one_seed_get_no_verdict():
    found = compare_values({"a": {None: 1.0}, "b": {None: 2.0}}, metric="CIDEr", unit=Unit("nats"))
    (pair,) = found.pairs
    assert (pair.verdict, pair.about, pair.test, found.tested) == ("no verdict", None, None, 0)
    assert pair.short() == (
        "a − b: no verdict (−1.000 nats; one training seed each and one number per seed: no spread to judge by)"
    )
    assert found.arms[0].interval_over is None and math.isnan(found.arms[0].low)
    assert found.notes == ["One seed: the number exists once per seed, so that one seed has no interval."]
    for values, text in (
        ({"a": {0: 1.0}}, "1 arm: give at least two"),
        ({"a": {0: math.nan}, "b": {0: 1.0}}, "CIDEr of arm 'a', seed 0 is nan"),
        ({"a": {}, "b": {0: 1.0}}, "arm 'a' has no runs"),
        ({"a": {0: 1.0, None: 2.0}, "b": {0: 1.0}}, "each needs its own"),
    ):
        with pytest.raises(ValueError, match=text):
            compare_values(values, metric="CIDEr")


def test_what_is_subtracted_is_subtracted_problem_by_problem():
    """After minus before: 0, 1 and −1 per problem; there is no solving to speak of, so no McNemar."""
    before = {"a": share(4), "b": [0.0] * 16 + [1.0] * 4}
    after = {"a": share(14), "b": share(5)}
    y, x = (
        {arm: read_evaluation(Path(write(f"{when}-{arm}.jsonl", scores))) for arm, scores in given.items()}
        for when, given in (("after", after), ("before", before))
    )
    runs = [Run(arm, 0, y[arm], x[arm]) for arm in "ab"]
    found = compare(runs)
    assert [arm.mean for arm in found.arms] == pytest.approx([0.5, 0.05]) and found.unit is Unit.changes
    gains = [[one - two for one, two in zip(after[arm], before[arm], strict=True)] for arm in "ab"]
    order = sorted(range(20), key=lambda i: f"q{i}")  # draws are of the ids in order
    by_hand = paired_bootstrap(*([gain[i] for i in order] for gain in gains))
    assert found.pairs[0].result == by_hand and found.pairs[0].mcnemar is None
    by_chance = compare([runs[0], Run("c", 0, x["a"], x["a"])])  # 0 and 1 only
    assert by_chance.pairs[0].mcnemar is None and by_chance.pairs[0].test == "paired bootstrap"


def test_arms_that_nothing_compares_may_have_answered_other_problems(tmp_path):
    # Ids are the same in both conditions, golds and numbers of problems are not.
    def evaluation(name, golds, scores):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            json.dumps({"id": f"q{i}", "score": score, "gold": gold})
            for i, (gold, score) in enumerate(zip(golds, scores, strict=True))
        ]
        (folder / "per_example.jsonl").write_text("\n".join(lines) + "\n")
        return read_evaluation(folder / "per_example.jsonl")

    runs = [
        *(Run("a easy", s, evaluation(f"ae{s}", "123", (1, 1, s % 2))) for s in (0, 1)),
        *(Run("b easy", s, evaluation(f"be{s}", "123", (0, s % 2, 0))) for s in (0, 1)),
        *(Run("a hard", s, evaluation(f"ah{s}", "4567", (1, 0, 0, s % 2))) for s in (0, 1)),
        *(Run("b hard", s, evaluation(f"bh{s}", "4567", (1, 1, s % 2, 0))) for s in (0, 1)),
    ]
    result = compare(runs, pairs=[("a easy", "b easy"), ("a hard", "b hard")])
    # Means by hand: easy (2/3 + 3/3)/2 = 5/6 and (0 + 1/3)/2 = 1/6; hard (1/4 + 2/4)/2 = 3/8 and (2/4 + 3/4)/2 = 5/8.
    assert [arm.mean for arm in result.arms] == pytest.approx([5 / 6, 1 / 6, 3 / 8, 5 / 8])
    assert [pair.result.diff for pair in result.pairs] == pytest.approx([4 / 6, -2 / 8])
    assert result.tested == 2
    assert any("different numbers of problems: [3, 4]" in note for note in result.notes)
    with pytest.raises(ValueError, match=r"not (of )?the same problems"):
        compare(runs, pairs=[("a easy", "b easy"), ("a hard", "b hard"), ("a easy", "a hard")])
