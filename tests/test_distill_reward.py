"""The reward score of 0 to 5: statements that hold, loops, chains, points."""

from __future__ import annotations

import math

import pytest

from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.schema import Sample, message, text
from lightning_vlm.data.world import WorldSource
from lightning_vlm.distill.arithmetic import statements, value
from lightning_vlm.distill.reward import chain_of, loops, score_answer, score_gold


def question(answer: str | None, target: str | None = None) -> Sample:
    turns = [message("user", text("?")), *([message("assistant", text(target))] if target else [])]
    return Sample("q", turns, answer=answer, info={"family": "angle" if answer else "caption"})


@pytest.mark.parametrize(
    "content, found",
    [
        (r"20 + 45 = 65, 180 - 65 = 115. \boxed{115}", [("20 + 45 = 65", True), ("180 - 65 = 115", True)]),
        ("20 + 30 + 40 = 90, 90 * 3 = 271", [("20 + 30 + 40 = 90", True), ("90 * 3 = 271", False)]),
        ("red = 7, blue = 3, 7 + 3 = 11", [("7 + 3 = 11", False)]),  # red = 7 calculates nothing
        ("perimeter = 3 + 4 = 7", [("3 + 4 = 7", True)]),
        ("2x + 3 = 7, f(2) = 4, 3 + 4 = 7x, (3 + 4) * 2 = 14, 2^3 + 1 = 9, 50% + 20% = 70%", []),
        (r"$180^\circ - 65^\circ = 115^\circ$", [("180- 65 = 115", True)]),
        ("10 / 3 = 3.33 but 10/3 = 3.34", [("10 / 3 = 3.33", True), ("10/3 = 3.34", False)]),
        ("1,000 + 234 = 1,234", [("1000 + 234 = 1234", True)]),
        (r"2 \times 3 + 4 = 10 and 10 ÷ 4 = 2.5", [("2 * 3 + 4 = 10", True), ("10 / 4 = 2.5", True)]),
        ("3 + 4 = 7 + 1 = 8", [("3 + 4 = 7 + 1", False), ("7 + 1 = 8", True)]),
        ("4 / 0 = 0", [("4 / 0 = 0", False)]),
        ("-3 + 5 = 2, 5 - -2 = 7, 3 * -2 = -6", [("-3 + 5 = 2", True), ("5 - -2 = 7", True), ("3 * -2 = -6", True)]),
    ],
)
def test_statements(content, found):
    assert [(s.text, s.holds) for s in statements(content)] == found


def test_values():
    assert value("20 + 3 * 4 - 6 / 2") == 29 and value("-2 * 3") == -6 and value("8 / 2 / 2") == 2
    assert math.isnan(value("1 / 0"))


def test_all_chains_of_the_world_hold_and_score_five():
    """The derivations of the world are right by construction; a wrong sum is found in each that has one."""
    source = WorldSource(size=100, direct_fraction=0.0)
    found = 0
    for sample in source:
        assert score_gold(sample, RULES["world/exact"]).score == 5, sample.chosen()
        said = list(statements(sample.chosen()))
        assert all(s.holds for s in said)
        found += len(said)
    assert found > 80


def test_chains():
    assert chain_of(r"a + b = c. \boxed{5}", "5") == "a + b = c." and chain_of(r"\boxed{5}", "5") == ""
    assert chain_of("5.", "5") == "" and chain_of("it is 5", "5") == "it is 5"
    assert chain_of("<think>so</think><answer>5</answer>", "5") == "<think>so</think>"
    assert chain_of("a red circle.", None) == "a red circle."


def test_loops():
    assert loops("so so so so") and not loops("so so so")
    assert loops("a b c " * 4) and not loops("a b c " * 3)
    assert not loops("1 circle, 2 circle, 3 circle, 4 circle, 5 circle")
    assert loops(" ".join(f"then we see that {n % 2}" for n in range(12)))
    assert not loops(" ".join(str(n) for n in range(200)))


@pytest.mark.parametrize(
    "content, right, score",
    [
        (r"2 + 3 = 5. \boxed{5}", True, 5),
        (r"2 + 3 = 6. \boxed{5}", True, 4),  # a statement fails
        (r"\boxed{5}", True, 3.5),  # no chain: neither its half point nor the whole one for its statements
        ("2 + 3 = 5, so 5", True, 4.5),  # not marked
        (r"2 + 3 = 5. \boxed{5}", False, 3),
        (r"so so so so. \boxed{5}", True, 5),  # "so." is another word
        (r"so so so so and \boxed{5}", True, 4.5),
    ],
)
def test_points_by_hand(content, right, score):
    assert score_answer(content, question("5"), right=right).score == score


def test_length_and_end():
    asked = question("5")
    whole = {"text": r"2 + 3 = 5. \boxed{5}", "sample": asked, "right": True}
    assert score_answer(**whole, finished=False).score == 4.5
    assert score_answer(**whole, tokens=9, longest=9).score == 5
    assert score_answer(**whole, tokens=10, longest=9).score == 4.5
    assert score_answer(**whole, tokens=3, shortest=4).parts["length"] == 0
    assert score_answer("", asked, right=False).score == 0.5  # no loop; nothing else


def test_captions_have_nothing_to_mark():
    assert score_answer("a red circle.", question(None), right=True).score == 5
    assert score_answer("a red circle.", question(None), right=False).score == 3


def test_gold_that_was_not_distilled():
    sample = question("5", r"2 + 3 = 5. \boxed{5}")
    assert score_gold(sample, RULES["answer/short"]).score == 5
    assert score_gold(sample, RULES["answer/short"], tokens=20, longest=10).score == 4.5
    with pytest.raises(ValueError, match="no assistant text"):
        score_gold(question("5"), RULES["answer/short"])
    with pytest.raises(ValueError, match="scores a set"):
        score_gold(sample, RULES["coco/python"])
