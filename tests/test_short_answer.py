"""Reading numbers, and equality of short answers. Known answers, and round trips."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.metrics.mathematics import is_mathematical, math_equal, normalise_math
from lightning_vlm.metrics.numbers import last_number, numbers_equal, parse_number, plain_latex
from lightning_vlm.metrics.short_answer import grade_short_answer, same_answer

LENGTHS = ["3 cm", "5cm", "7 cm", "9 cm"]
stable = settings(derandomize=True, max_examples=250, deadline=None)

# --- numbers ---------------------------------------------------------------------------------------------------------

NUMBERS = [
    ("5", "5"),
    ("073", "73"),
    ("1,234", "1234"),
    ("1 234", "1234"),
    ("1\u202f234", "1234"),
    ("12,345.6", "12345.6"),
    ("10,\\!080", "10080"),
    ("22{,}000", "22000"),
    ("-3", "-3"),
    ("−3", "-3"),
    ("+4", "4"),
    (".5", "0.5"),
    ("5.", "5"),
    ("1.2e3", "1200"),
    ("1.2 × 10^{3}", "1200"),
    (r"1.2\times 10^3 N", "1200"),
    (r"2.5 \cdot 10^{-2}", "0.025"),
    ("1.5×10⁻³", "0.0015"),
    ("10^{4}", "10000"),
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    (r"\frac{3}{4}", "3/4"),
    (r"-\dfrac{3}{4}", "-3/4"),
    (r"\frac{-3}{4}", "-3/4"),
    (r"\frac34", "3/4"),
    ("1 1/2", "3/2"),
    (r"1\frac{1}{2}", "3/2"),
    ("½", "1/2"),
    ("1½ cups", "3/2"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("50 percent", "50"),
    ("65°", "65"),
    (r"65^\circ", "65"),
    ("65 degrees", "65"),
    ("20 °C", "20"),
    ("$5", "5"),
    ("-$5", "-5"),
    ("$18.90", "18.9"),
    (r"\$18.90", "18.9"),
    ("€5", "5"),
    ("5 dollars", "5"),
    ("5cm", "5"),
    ("5 cm^2", "5"),
    ("5 cm²", "5"),
    (r"5\text{ cm}^2", "5"),
    (r"864 \mbox{ inches}^2", "864"),
    ("12 square units", "12"),
    ("60 km/h", "60"),
    (r"50 \mathrm{~N} / \mathrm{m}", "50"),
    ("7 people", "7"),
    ("3 dots in each group", "3"),
    ("5厘米", "5"),
    ("x = 5", "5"),
    ("AB=5.5 cm", "5.5"),
    (r"m\angle A = 50^\circ", "50"),
    ("x = 10/2 = 5", "5"),
    ("2 + 3 = 5", "5"),
    ("≈ 3.14", "3.14"),
    (r"x \approx 3.14", "3.14"),
    ("about 5", "5"),
    ("approximately 5 cm", "5"),
    ("**5** cm", "5"),
    ("$5$ cm", "5"),
    (r"\(5\)", "5"),
    ("twelve", "12"),
    ("Thirty-five years", "35"),
    ("one hundred and five", "105"),
    ("two thousand five hundred", "2500"),
    ("ninety-nine thousand nine hundred and ninety-nine", "99999"),
    ("minus three", "-3"),
    ("half", "1/2"),
    ("a half", "1/2"),
    ("two thirds", "2/3"),
    ("three and a half", "7/2"),
    ("half a meter", "1/2"),
    ("a dozen eggs", "12"),
    ("5 million", "5000000"),
    ("2.5 million dollars", "2500000"),
]
NO_NUMBERS = [
    *("", "abc", "the 5", "1,23", "1,2345", "5 2", "A1", "5x", "5ab", "5 sin x", "2π", r"2\pi", r"\sqrt{2}", "5^2"),
    *("5 or 6", "5-6", "5, 6", "(1, 2)", r"\pm 5", "12 apples and 3 pears", "not 5", "5 but not 6", "less than 5"),
    *("x < 5", r"x \neq 5", "x = 5, y = 6", "x = 5 or x = 6", "x^2 = 4", "2x = 10", "5x - 7y = 0"),
    *("11:15", "2:3", "5 pm", "June 20", "20 June", "third", "5th", "2nd", "one of them", "five six", "twenty twelve"),
    *("1/0", r"\frac{1}{0}", "1e9999", "9" * 150),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_one_number(text, value):
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10 - 2 - 3 = 5", 5),
        ("so it is -3.", -3),
        ("between 3-5", 5),
        ("10 -3", 3),
        ("7 dots, see Fig. 2 and Q1a", 7),
        ("1. First of all,\n2. it is 9\n3) done", 9),
        ("7, as x^2 or x_2 or \\sqrt{3} show", 7),
        ("6, not 4\\pi or 5π", 6),
        ("It cost $1,234.50.", Fraction("1234.5")),
        ("There are 3 values greater than 20.0", 3),
        ("There are 3 values of at least 20", 3),
        ("f(2) was 7 for f(3)", 7),
        ("7 is a/2", 7),
        ("7, a ratio of 2:1, at 11:30", 7),
        ("It is 5cm long and 6x wide", 5),
        ("the 2nd of 5 things", 5),
        ("There are three maskers in Fig. Q1a", 3),
        ("two sides of 7 cm", 7),
        ("no one knows", None),
        ("nothing", None),
        (r"about 2.5 \times 10^{3} N", 2500),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("共5个", 5),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == value


def test_last_whole_number():
    assert last_number("There are 4 of 2.5 cm", integer=True) == 4
    assert last_number("2.5", integer=True) is None
    assert last_number("2.0", integer=True) == 2


def test_equal_numbers():
    assert numbers_equal(Fraction("0.333333"), Fraction(1, 3))
    assert not numbers_equal(Fraction("0.3333"), Fraction(1, 3))
    assert not numbers_equal(Fraction("8.33"), Fraction("8.3"))
    assert not numbers_equal(Fraction(10**9), Fraction(10**9 + 1))
    assert not numbers_equal(Fraction("1.6e-19"), Fraction("1.7e-19"))


# --- short answers ---------------------------------------------------------------------------------------------------

SAME = [
    ("(3, \\frac{\\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("-q + p", "p - q"),
    ("14/3", r"\frac{14}{3}"),
    ("4 2/3", r"\frac{14}{3}"),
    ("Evelyn.", r"\text{Evelyn}"),
    ("EVELYN", r"\text{Evelyn}"),
    ("90", r"90^\circ"),
    (r"\sqrt{117}", r"3\sqrt{13}"),
    ("3√13", r"3\sqrt{13}"),
    ("2,220", "2220"),
    ("6-5i", "6 - 5i"),
    ("5", "x=5"),
    ("x = 5", "5"),
    ("-2, 1", "1,-2"),
    (r"1\text{ and }-2", "1,-2"),
    ("1 or -2", "1,-2"),
    (r"\{3, 5, 7\}", "3, 5, 7"),
    ("7,5,3", "3, 5, 7"),
    ("52_{8}", "52_8"),
    (r"11\sqrt{2}", r"11\sqrt2"),
    ("june 20", r"\text{June 20}"),
    ("11:15 am", "11:15 a.m."),
    ("11:15AM", r"11:15 \text{ a.m.}"),
    ("The east", "east"),
    (r"[-2,7]", r"x \in [-2,7]"),
    ("3+6x^2", "6x^2+3"),
    (r"\begin{pmatrix}-1\\2\end{pmatrix}", r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}"),
    ("73", "073"),
    ("65°", "65"),
    (r"\sqrt{128}", r"8 \sqrt { 2 }"),
    ("24π", r"24 \pi"),
    ("24*pi", r"24 \pi"),
    ("twelve", "12"),
    ("12 apples", "12"),
    (r"\sqrt{144}", "12"),
    ("50%", "50"),
    ("50", r"50\%"),
    ("50%", r"50\%"),
    ("18.9", r"\$18.90"),
    ("864 in^2", r"864 \mbox{ inches}^2"),
    ("11,111,111,100", r"11,\! 111,\! 111,\! 100"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    ("2x+3", "y = 2x + 3"),
    ("5x-7y+11z+4=0", "5x - 7y + 11z + 4 = 0"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("half", r"\frac{1}{2}"),
    ("No solution.", r"\text{no solution}"),
    ("∞", r"\infty"),
    ("2 : 3", "2:3"),
]
OTHER = [
    (r"(\frac{\pi}{2},3)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("q - p", "p - q"),
    ("Carla", r"\text{Evelyn}"),
    ("20", r"\text{June 20}"),
    ("June", r"\text{June 20}"),
    ("June 2", r"\text{June 20}"),
    ("11", "11:15 a.m."),
    ("11:15 p.m.", "11:15 a.m."),
    ("1", "1,-2"),
    ("1,2", "1,-2"),
    ("3,5", "3, 5, 7"),
    ("(-2,7)", r"x \in [-2,7]"),
    ("0", "5x - 7y + 11z + 4 = 0"),
    ("5x-7y=0", "5x - 7y + 11z + 4 = 0"),
    ("y = 5", "x = 5"),
    ("75.4", r"24 \pi"),
    ("8.3", "8.33"),
    ("0.5", r"50\%"),
    ("50%", "0.5"),
    ("12 or 13", "12"),
    ("12 or 13", "13"),
    ("not 12", "12"),
    ("not 5 but 6", "6"),
    ("12 people and 3 dogs", "12"),
    ("2/15", "4:30"),
    ("2", "2:3"),
    ("no solution", "0"),
    ("9" * 5000, "9"),
]


@pytest.mark.parametrize(("prediction", "gold"), SAME)
def test_same_answer(prediction, gold):
    assert same_answer(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold"), OTHER)
def test_other_answer(prediction, gold):
    assert not same_answer(prediction, gold)


@pytest.mark.parametrize(
    ("output", "gold", "choices", "extraction", "right"),
    [
        (r"So $\boxed{073}$", "73", None, "073", True),
        ("The answer is 5 cm.", "5", None, "5 cm", True),
        ("The answer is 5 or 6.", "5", None, "5 or 6", False),
        ("The answer is not 5.", "5", None, None, False),
        ("I don't know.", "5", None, None, False),
        ("The answer is \\text{(E)}.", r"\text{(E)}", None, "E", True),
        ("The answer is B because it fits.", "(B)", None, "B", True),
        ("The answer is a triangle.", "A", None, None, False),
        ("The answer is 5cm.", "B", LENGTHS, "B", True),
        ("(B) 5cm", "5cm", LENGTHS, "B", True),
        ("C", "5 cm", LENGTHS, "C", False),
        ("(D)", "18", ["9", "12", "18", "18"], "D", True),
        ("The answer is: cannot be determined", "Cannot be determined", None, "cannot be determined", True),
        ("Answer: unknown", "5", None, None, False),
        ("**Answer:** June 20", r"\text{June 20}", None, "June 20", True),
    ],
)
def test_grade_short_answer(output, gold, choices, extraction, right):
    assert grade_short_answer(output, gold, choices) == (extraction, right)


def test_gold_answers_are_checked():
    for gold in ("", "  ", "$"):
        with pytest.raises(ValueError, match="empty"):
            grade_short_answer("5", gold)
    with pytest.raises(ValueError, match="none of the options"):
        grade_short_answer("5", "11 cm", LENGTHS)


def test_a_decided_answer_does_not_load_sympy(monkeypatch):
    """Equal texts and numbers are decided before math-verify is asked."""
    monkeypatch.setattr("lightning_vlm.metrics.short_answer.math_equal", None)
    monkeypatch.setattr("lightning_vlm.metrics.short_answer.parses", None)
    assert same_answer(r"$\frac{1}{2}$", "0.5")
    assert not same_answer("7 cm", "8")
    assert same_answer(r"\left(x + 1\right)", "(x + 1)")


def test_formulas_are_told_from_words():
    for formula in (r"x \in [-2,7]", "6x^2+3", "12 cm", r"\frac{1}{2}", "x", "(3, 4)", r"\sin x", "2, 3 or 4"):
        assert is_mathematical(formula)
    for words in ("June 20", "11:15 a.m.", r"\text{Evelyn}", "2:3", "east", "5 people", "well-known", "不能确定2"):
        assert not is_mathematical(words)


def test_percent_signs_are_units():
    assert math_equal("50%", "50")
    assert not math_equal("0.5", r"50\%")


FORMULAS = [text for pair in (*SAME, *OTHER) for text in pair] + [text for text, _ in NUMBERS]


@pytest.mark.parametrize("text", FORMULAS)
def test_normal_forms_are_their_own(text):
    for normal in (plain_latex, normalise_math):
        assert normal(normal(text)) == normal(text)


@stable
@given(st.integers(-(10**30), 10**30))
def test_whole_numbers_round_trip(number):
    for text in (str(number), f"{number:,}", f"x = {number}", f"{number} cm", f"**{number}**", f"${number}$"):
        assert parse_number(text) == number
    assert last_number(f"It is {number}.", integer=True) == number


@stable
@given(st.decimals(-(10**9), 10**9, allow_nan=False, allow_infinity=False, places=4))
def test_decimals_round_trip(number):
    for text in (str(number), f"{number:e}", f"{number:,}", f"about {number} m"):
        assert parse_number(text) == Fraction(number)


@stable
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_round_trip(over, under):
    for text in (f"{over}/{under}", rf"\frac{{{over}}}{{{under}}}", rf"$\dfrac{{{over}}}{{{under}}}$"):
        assert parse_number(text) == Fraction(over, under)
    assert same_answer(f"{over}/{under}", rf"\frac{{{over}}}{{{under}}}")


SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def in_words(number: int) -> str:
    if number < 20:
        return SMALL.split()[number]
    if number < 100:
        return TENS.split()[number // 10 - 2] + (f"-{in_words(number % 10)}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    return f"{in_words(number // size)} {name}" + (f" {in_words(number % size)}" if number % size else "")


@stable
@given(st.integers(0, 999_999))
def test_number_words_round_trip(number):
    assert parse_number(in_words(number)) == number
    assert parse_number(f"minus {in_words(number)} apples") == -number
