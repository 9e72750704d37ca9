"""Claims: parsed with errors that help, and judged by what was measured, never by more."""

from __future__ import annotations

import pytest

from lightning_vlm.metrics.statistics import welch
from lightning_vlm.studies.claims import check_claim, judge
from lightning_vlm.studies.compare import compare_values
from lightning_vlm.studies.endpoints import Claim, Endpoint, parse_claim
from lightning_vlm.studies.wording import Unit

ENDPOINTS = [Endpoint(name="pass@1", stage="after"), Endpoint(name="entropy", stage="rl", curve="train/entropy")]
SAYS = {"says": "It is so.", "endpoint": "pass@1"}


def values(**means: float) -> dict[str, dict[int | None, float]]:
    """Arm → three seeds, one percentage point apart."""
    return {arm.replace("_", " · "): {s: mean + 0.01 * (s - 1) for s in range(3)} for arm, mean in means.items()}


def compared(pairs=None, **means: float):
    return compare_values(values(**means), metric="score", unit=Unit.points, pairs=pairs)


def labels(*names: str) -> dict[str, dict[str, str]]:
    return {name: dict(zip(("arm", "condition"), name.split(" · "), strict=False)) for name in names}


def judged(claim: Claim, comparison, names=None, groups=({},)):
    names = names or [arm.name for arm in comparison.arms]
    return judge(claim, comparison, labels(*names), groups)


def greater(a: str, b: str, **more) -> Claim:
    return Claim(says="It is so.", endpoint="pass@1", greater=a, than=b, **more)


def within(bound: float, *among: str, **more) -> Claim:
    return Claim(says="It is so.", endpoint="pass@1", within=bound, among=among, **more)


# ---------------------------------------------------------------------------------------------------- parsing


def test_claims_as_a_study_says_them():
    given = {**SAYS, "source": "the article", "expect": {"within": 1.1, "among": ["OPD", 5]}, "where": {"size": 0.5}}
    expected = Claim(
        says="It is so.", source="the article", endpoint="pass@1", within=1.1, among=("OPD", "5"), where={"size": "0.5"}
    )
    assert parse_claim(given, ENDPOINTS) == expected
    assert parse_claim({**SAYS, "expect": {"greater": "a", "than": "b"}}, ENDPOINTS) == greater("a", "b")
    assert parse_claim({**SAYS, "expect": {"within": 2}}, ENDPOINTS) == within(2.0)


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (["It is so."], "a claim must be a mapping with says, endpoint, expect"),
        ({"endpoint": "pass@1", "expect": {"within": 1}}, "a claim has no `says`"),
        ({**SAYS}, "claim 'It is so.' has no `expect`"),
        ({**SAYS, "expects": {}}, "unknown key 'expects'; did you mean 'expect'"),
        ({**SAYS, "expect": {"within": 1}, "endpoint": "entrop"}, "'entrop'; did you mean 'entropy'"),
        (
            {**SAYS, "expect": {"greatr": "a", "than": "b"}},
            "`expect` has an unknown key 'greatr'; did you mean 'greater'",
        ),
        ({**SAYS, "expect": {"greater": "a"}}, "got the keys greater"),
        ({**SAYS, "expect": {"greater": "a", "than": "b", "within": 1}}, "got the keys greater, than, within"),
        ({**SAYS, "expect": {}}, "got the keys (none)"),
        ({**SAYS, "expect": {"greater": "a", "than": "a"}}, "names an arm twice: a, a"),
        ({**SAYS, "expect": {"greater": ["a"], "than": "b"}}, "an arm is named by a text, got [['a'], 'b']"),
        ({**SAYS, "expect": {"within": 1, "among": ["a"]}}, "`among` must list two or more arms, got ['a']"),
        ({**SAYS, "expect": {"within": 1, "among": "ab"}}, "`among` must list two or more arms, got 'ab'"),
        ({**SAYS, "expect": {"within": -1}}, "`within` must be a number above 0, in units as shown, got -1"),
        ({**SAYS, "expect": {"within": 1}, "where": "few"}, "`where` must be a mapping"),
        ({**SAYS, "expect": {"within": 1}, "where": {"condition": ["few"]}}, "to one value each"),
        ({**SAYS, "expect": {"within": 1}, "source": 3}, "`source` must be a text, got 3"),
    ],
)
def test_claims_that_are_refused(mapping, text):
    with pytest.raises(ValueError) as refused:
        parse_claim(mapping, ENDPOINTS)
    assert text in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------- greater


def test_greater_holds_is_contradicted_or_is_not_shown():
    found = compared(OPD=0.60, none=0.50, SFT=0.505)
    (said,) = judged(greater("OPD", "none"), found)
    test = welch([0.59, 0.60, 0.61], [0.49, 0.50, 0.51])
    assert said.verdict == "holds" and test.p < 0.001
    low, high = (f"{100 * bound:.1f}" for bound in test[1:3])
    assert said.sentence == f"OPD > none by 10.0 points [{low}, {high}], 3 seeds, p < .001 (Holm over 3 pairs)."
    (said,) = judged(greater("none", "OPD"), found)
    assert said.verdict == "contradicted" and said.sentence.startswith("OPD > none by 10.0 points")
    (said,) = judged(greater("SFT", "none"), found)
    assert said.verdict == "not shown" and said.sentence.startswith("none − SFT: not distinguishable (−0.5 points")
    assert said.to_json() == {
        "says": "It is so.",
        "source": "",
        "endpoint": "pass@1",
        "group": {},
        "verdict": "not shown",
        "sentence": said.sentence,
    }


def test_greater_is_judged_after_holm():
    """p = .019 alone would do; three pairs, of which it is the smallest, ask for .057."""
    alone = compared(a=0.5305, b=0.5)
    three = compared(a=0.5305, b=0.5, c=0.515)
    assert alone.pairs[0].result.p == pytest.approx(three.pairs[0].result.p)
    assert alone.pairs[0].result.p < 0.05 < three.pairs[0].p_adjusted
    assert judged(greater("a", "b"), alone)[0].verdict == "holds"
    assert judged(greater("a", "b"), three)[0].verdict == "not shown"


def test_greater_of_what_was_not_compared_or_not_measured_is_not_shown():
    found = compared(pairs=[("OPD", "none")], OPD=0.60, none=0.50, SFT=0.3)
    (said,) = judged(greater("OPD", "SFT"), found)
    assert (said.verdict, said.sentence) == ("not shown", "OPD and SFT are not among the pairs that were compared.")
    (said,) = judged(greater("OPD", "late"), found, ["OPD", "none", "SFT", "late"])
    assert (said.verdict, said.sentence) == ("not shown", "late is not measured.")


# ----------------------------------------------------------------------------------------------------- within


def test_within_needs_every_interval_inside():
    """Seeds one point apart: each interval is ± 2.27 points, by t(4) · √(2/3)."""
    found = compared(a=0.50, b=0.51, c=0.505)
    (said,) = judged(within(3.3), found)
    assert said.verdict == "holds"
    assert said.sentence == "all 3 differences lie inside ±3.3 points; the farthest: a − b = −1.0 points [−3.3, 1.3]."
    (said,) = judged(within(3.2), found)
    assert said.verdict == "not shown"
    assert said.sentence == "a − b = −1.0 points [−3.3, 1.3] reaches beyond ±3.2 points (1 of 3 pairs)."
    (said,) = judged(within(2.8, "b", "c"), found)
    assert (said.verdict, said.sentence) == ("holds", "b − c = 0.5 points [−1.8, 2.8] lies inside ±2.8 points.")


def test_within_is_contradicted_by_an_interval_wholly_outside():
    found = compared(a=0.50, b=0.54, c=0.505)
    (said,) = judged(within(1.1), found)
    assert said.verdict == "contradicted"
    assert said.sentence == "a − b = −4.0 points [−6.3, −1.7] lies wholly outside ±1.1 points (2 of 3 pairs)."
    assert judged(within(1.8), found)[0].verdict == "not shown"  # different for certain, but not by that much
    assert judged(within(1.1, "a", "c"), found)[0].verdict == "not shown"


def test_within_looks_at_pairs_outside_the_tested_ones_too():
    found = compared(pairs=[("a", "c")], a=0.50, b=0.54, c=0.505)
    assert judged(within(1.1), found)[0].sentence.startswith("a − b = −4.0 points")


def test_within_is_not_shown_where_something_is_missing():
    names = ["a", "b", "late"]
    assert judged(within(9), compared(a=0.5, b=0.5), names)[0].sentence == "late is not measured."
    assert judged(within(1), compared(a=0.5, b=0.6), names)[0].verdict == "contradicted"  # whatever late does
    one = compare_values({"a": {0: 0.5}, "b": {0: 0.5}}, metric="score", unit=Unit.points)
    (said,) = judged(within(9), one)
    assert said.verdict == "not shown" and said.sentence.startswith("no interval of a − b: one training seed each")


def test_bounds_are_in_units_as_shown():
    nats = compare_values(values(a=0.5, b=0.5), metric="entropy", unit=Unit("nats"))
    assert judged(within(0.023), nats)[0].verdict == "holds" and judged(within(0.022), nats)[0].verdict == "not shown"
    assert "±0.023 nats" in judged(within(0.023), nats)[0].sentence


# ----------------------------------------------------------------------------------------- groups and their arms

GROUPS = [{"condition": "few"}, {"condition": "many"}]


def test_a_claim_is_judged_in_every_group():
    found = compared(OPD_few=0.60, SFT_few=0.50, OPD_many=0.70, SFT_many=0.80)
    said = judged(greater("OPD", "SFT"), found, groups=GROUPS)
    assert [(each.group, each.verdict) for each in said] == [(GROUPS[0], "holds"), (GROUPS[1], "contradicted")]
    assert said[0].sentence.startswith("OPD · few > SFT · few by 10.0 points")
    said = judged(greater("OPD", "SFT", where={"condition": "many"}), found, groups=GROUPS)
    assert [each.group for each in said] == [GROUPS[1]]
    said = judged(greater("OPD · few", "SFT · few", where={"condition": "few"}), found, groups=GROUPS)
    assert [each.verdict for each in said] == ["holds"]
    assert [each.verdict for each in judged(within(5), found, groups=GROUPS)] == ["contradicted", "contradicted"]


def test_an_arm_without_the_axis_belongs_to_every_group():
    found = compared(OPD_few=0.60, none=0.50, OPD_many=0.50)
    said = judged(greater("OPD", "none"), found, groups=GROUPS)
    assert [each.verdict for each in said] == ["holds", "not shown"]
    claim = within(1)
    assert [arms for _, arms in check_claim(claim, labels("OPD · few", "none", "OPD · many"), GROUPS)] == [
        ["OPD · few", "none"],
        ["none", "OPD · many"],
    ]


def test_where_may_choose_arms_by_an_axis_that_makes_no_groups():
    found = compared(OPD_few=0.60, SFT_few=0.50, OPD_many=0.70, SFT_many=0.80)
    (said,) = judged(greater("SFT", "OPD", where={"condition": "many"}), found)
    assert said.verdict == "holds" and said.sentence.startswith("SFT · many > OPD · many")


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        (greater("OPD", "STF"), "names no arm 'STF' at condition = few; did you mean 'SFT'"),
        (greater("OPD", "SFT · many"), "names no arm 'SFT · many' at condition = few"),
        (within(1, where={"conditon": "few"}), "endpoint 'pass@1' has no axis 'conditon'; did you mean 'condition'"),
        (within(1, where={"condition": "fw"}), "axis 'condition' has no value 'fw'; did you mean 'few'"),
        (within(1, where={"arm": "OPD"}), "needs two arms at condition = few, there is OPD · few"),
    ],
)
def test_what_the_endpoint_does_not_have_is_refused(claim, text):
    names = labels("OPD · few", "SFT · few", "OPD · many", "SFT · many")
    with pytest.raises(ValueError) as refused:
        check_claim(claim, names, GROUPS)
    assert str(refused.value).startswith("claim 'It is so.'") and text in str(refused.value)


def test_names_that_fit_several_arms_are_refused():
    names = {
        "OPD · small": {"arm": "OPD", "size": "small"},
        "OPD · small · few": {"arm": "OPD", "size": "small", "condition": "few"},
        "SFT · small": {"arm": "SFT", "size": "small"},
    }
    claim = greater("OPD", "SFT", where={"size": "small"})
    with pytest.raises(ValueError, match="'OPD' may be OPD · small or OPD · small · few; write the whole name"):
        check_claim(claim, names, [{"condition": "few"}])
    assert check_claim(claim, names, [{"condition": "many"}])[0][1] == ["OPD · small", "SFT · small"]
