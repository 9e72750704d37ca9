"""MATH-V's released rule: its steps on small responses, and the verdicts that were released."""

from __future__ import annotations

import json

import pytest

from lightning_vlm.metrics.mathvision import grade_response, released_answer, released_correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("60", "60"),
        ("It is B.", "b"),
        ("We choose (C).", "c"),
        ("D\nBecause of the angle.", "d"),
        ("(E) E\nas shown", "e"),
        ("The length is 5.", "5"),
        (r"So $\boxed{41}$.", "41"),
        (r"first \boxed{1}, then \boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{(B)}", "b"),
        (r"\boxed{\text{A}}", "a"),
        (r"$\boxed{x = 12^{\circ}}$", "12"),
        ("The final answer is 3/4. I am sure.", r"\frac{3}{4}"),
        ("the answer is 1.5 km\nbecause", "1.5"),
        ("the correct answer is .5", "0.5"),
        (r"\boxed{\sqrt2}", r"\sqrt{2}"),
        ("Long prose without any marker", "longprosewithoutanymarker"),
        (r"\boxed{7}. The answer is: 8}", "7"),
        (r"\boxed{\frac{9}{2}}. So {4.5}", r"\frac{9}{2}}.so{4.5"),  # the box is greedy: the released quirk
        ("", ""),
    ],
)
def test_released_answers(response, answer):
    assert released_answer(response) == answer


OPTIONS = ["$1: 4$", r"$\frac{1}{2}$", "7", r"$36^{\circ}$", r"$2\sqrt{3}$"]


@pytest.mark.parametrize(
    ("answer", "gold", "options", "right"),
    [
        ("b", "B", OPTIONS, True),
        ("a", "B", OPTIONS, False),
        (r"\frac{1}{4}", "A", OPTIONS, True),  # a ratio is a quotient
        ("0.5", "B", OPTIONS, True),
        (r"\frac{2}{4}", "B", OPTIONS, True),
        ("7", "C", OPTIONS, True),
        ("36", "D", OPTIONS, False),  # an option with a degree sign is no number to the released rule
        ("3.46", "E", OPTIONS, True),  # 2 decimals
        ("3.4", "E", OPTIONS, False),
        ("4.5", "4.5", (), True),
        (r"\frac{9}{2}", "4.5", (), True),
        (r"\frac{9}{2}}.theansweris:5", "4.5", (), True),
        ("(1,2.001)", "(1,2)", (), True),
        ("(1,2)", "[1,2]", (), False),
        ("(2,1)", "(1,2)", (), False),
        ("x", "x", (), True),
        ("x", "y", (), False),
        ("", "5", (), False),
        ("{{{", "5", (), False),
    ],
)
def test_released_verdicts(answer, gold, options, right):
    assert released_correct(answer, gold, options) is right


def test_a_gold_answer_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="is empty"):
        released_correct("5", " ")
    with pytest.raises(ValueError, match="no letter of its 5 options"):
        released_correct("5", "F", OPTIONS)


@pytest.mark.real_data
@pytest.mark.parametrize("system", ["Qwen-VL-Max", "InternLM-XComposer2-VL-CoT"])
def test_the_released_verdicts_come_out(real_data, system):
    """From the raw responses, all 3,040 of each system; 98 % would do for the rule's name."""
    folder = real_data / "mathvision"
    questions = {q["id"]: q for q in map(json.loads, (folder / "test.jsonl").read_text().splitlines())}
    given = [json.loads(line) for line in (folder / "outputs" / f"{system}.jsonl").read_text().splitlines()]
    agree = 0
    for row in given:
        question = questions[row["id"]]
        agree += grade_response(row["response"], question["answer"], question["options"])[1] == row["correct"]
    assert len(given) == 3040 and agree == 3040
