"""Metrics: extraction, equality of answers, entropies. Known answers throughout."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_vlm.metrics.entropy import entropy_summary
from lightning_vlm.metrics.exact import exact_match
from lightning_vlm.metrics.extract import answer_tag, boxed, explicit_answer, marked_or_whole
from lightning_vlm.metrics.mathematics import math_equal, normalise_math


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{5} or rather \boxed{6}", "6"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed { 12 }", "12"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}} and more", r"\text{a \} b}"),
        (r"\boxed{5} then cut \boxed{\frac{1}{", "5"),
        (r"\boxed{cut \boxed{5}", "5"),
        (r"\boxed{", None),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxedx{5}", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


def test_answer_tags_and_what_wins():
    assert answer_tag("<think>a</think><answer> 5 </answer>") == "5"
    assert answer_tag("<answer>5</answer><ANSWER>6</ANSWER>") == "6"
    assert answer_tag("<answer>5") is None
    assert explicit_answer(r"\boxed{1} <answer>2</answer>") == "1"
    assert explicit_answer(r"<answer>2</answer>") == "2"
    assert explicit_answer("2") is None
    assert marked_or_whole(" 2 ") == "2"


EQUAL = [
    ("65", "65°"),
    (r"65^\circ", "65"),
    (r"65^{\circ}", "65"),
    ("65 degrees", "65"),
    (r"65\text{ degrees}", "65"),
    (r"\sqrt{128}", r"8 \sqrt { 2 }"),
    (r"8\sqrt{2}", r"8 \sqrt { 2 }"),
    ("8√2", r"8 \sqrt { 2 }"),
    (r"24\pi", r"24 \pi"),
    ("24π", r"24 \pi"),
    (r"\frac{8\pi}{\sqrt{3}}", r"\frac { 8 } { \sqrt 3 } \pi"),
    (r"26 + 4\sqrt{6} + 4\sqrt{3}", r"26 + 4 \sqrt { 3 } + 4 \sqrt { 6 }"),
    (r"12\text{ cm}^2", "12"),
    ("12 cm^2", "12"),
    ("12 square units", "12"),
    (r"4\pi\text{ units}", r"4 \pi"),
    ("7 in", "7"),
    ("0.5", r"\frac{1}{2}"),
    ("1/2", r"\frac{1}{2}"),
    (r"3 \frac{1}{2}", "3.5"),
    ("x = 12", "12"),
    ("1,234", "1234"),
    ("$7$", "7"),
    (r"\(7\)", "7"),
    ("2.0", "2"),
    ("12.", "12"),
]
DIFFERENT = [
    ("75.4", r"24 \pi"),
    ("8.3", "8.33"),
    ("2", r"2 \sqrt 3"),
    (r"26 + 4\sqrt{3} + 4\sqrt{7}", r"26 + 4 \sqrt { 3 } + 4 \sqrt { 6 }"),
    ("-5", "5"),
    ("13", "12"),
    ("12 or 13", "12"),
    ("twelve", "12"),
    ("", "12"),
    ("A", "B"),
]


@pytest.mark.parametrize(("prediction", "gold"), EQUAL)
def test_equal_answers(prediction, gold):
    assert math_equal(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_different_answers(prediction, gold):
    assert not math_equal(prediction, gold)


def test_units_go_only_from_numbers():
    """`m` behind a number is metres; behind a letter, or alone, it is a variable."""
    assert normalise_math("2.4 m") == "2.4"
    assert normalise_math("3x + m") == "3x + m"
    assert normalise_math("m") == "m"
    assert not math_equal("m", "n")


def test_equality_works_in_a_thread():
    """math-verify's own timeouts use signals, which score everything 0 outside the main thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(math_equal(r"\sqrt{128}", r"8\sqrt{2}")))
    thread.start()
    thread.join()
    assert results == [True]


def test_a_broken_gold_answer_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        math_equal("5", " ")


def test_exact_match():
    assert exact_match("  A red  Circle. ", "a red circle") == 1.0
    assert exact_match("a red circle", ["a blue circle", "a red circle."]) == 1.0
    assert exact_match("a red", "a red circle") == 0.0
    with pytest.raises(ValueError, match="at least one"):
        exact_match("a", [])


def test_entropy_summary():
    """Of 0, 1, …, 100 the mean is 50 and quantile q is 100 q; interpolation as torch.quantile does."""
    summary = entropy_summary(torch.arange(101.0)[torch.randperm(101)])
    assert summary == pytest.approx({"mean": 50.0, "p05": 5.0, "p25": 25.0, "p50": 50.0, "p75": 75.0, "p95": 95.0})
    values = torch.rand(17)
    assert entropy_summary(values)["p25"] == pytest.approx(values.double().quantile(0.25).item(), abs=1e-12)
    with pytest.raises(ValueError, match="no tokens"):
        entropy_summary(torch.zeros(0))
