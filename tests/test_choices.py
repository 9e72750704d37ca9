"""Which option an output chooses."""

from __future__ import annotations

import pytest

from lightning_vlm.metrics.choices import Choice, choose_option, matching_choices

LENGTHS = ["3 cm", "5cm", "7 cm", "9 cm"]
CHOSEN = [
    # letters alone
    ("B", "B"),
    ("(b)", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("**B**", "B"),
    ("**(B)**", "B"),
    ("Thus, the answer is:\n\n**C. 7 cm**", "C"),
    ("The final answer is $\\boxed{B}$. I hope it is correct.", "B"),
    ("Answer: D\n\nA is wrong since it is too short.", "D"),
    ("The correct answer is B, not A.", "B"),
    (r"$\boxed{\textbf{(C)}\ 7}$", "C"),
    ("[B]", "B"),
    ("A", "A"),
    # a letter with a text
    ("B: 5cm", "B"),
    ("(B) 5cm", "B"),
    ("(B) 7 cm", "B"),
    ("B. 5cm", "B"),
    ("option b", "B"),
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\mathrm{(B)}}", "B"),
    (r"The answer is \textbf{(B)}.", "B"),
    (r"\boxed{\text{(B) } 5\text{ cm}}", "B"),
    (r"\boxed{B. 5cm}", "B"),
    ("<answer>(b)</answer>", "B"),
    ("<answer>B</answer>", "B"),
    ("<think>A or C?</think>\n<answer>\nD\n</answer>", "D"),
    # markers and statements
    ("The answer is B because this is a right triangle.", "B"),
    ("The answer is A because this is a right triangle.", "A"),
    ("The correct answer is **(B)**, 5cm.", "B"),
    ("The correct answer is (B).\n\nSince AC = 5, the length is 5.", "B"),
    ("The correct option is D.", "D"),
    ("The answer is option b.", "B"),
    ("Option (b)", "B"),
    ("Answer: Option C", "C"),
    ("Answer: B) 5cm", "B"),
    ("Answer: C, 7 cm", "C"),
    ("Answer: B (5cm)", "B"),
    ("Thus, the answer is A (3 cm).", "A"),
    ("因此，答案是A（3 cm）。", "A"),
    ("故选：B", "B"),
    ("Therefore, (C) is correct.", "C"),
    ("Therefore, option C is the correct answer.", "C"),
    ("A is correct since the legs are equal, as was to be shown above.", "A"),
    ("I choose D.", "D"),
    ("I would go with option (c) here, all things considered.", "C"),
    ("The length matches option (B), as far as I can see from it.", "B"),
    ("First it seemed that (A) is correct. In the end, (D) is correct.", "D"),
    ("The answer is (B). So the length is 11 cm.", "B"),
    ("The answer is not obvious, so let us see. The answer is C.", "C"),
    ("The missing length is **(C)**.\n\nThe others, (A) and (B), are too short.", "C"),
    # lines
    ("B\n\nThe triangle is isosceles, so the two sides are the same.", "B"),
    ("The triangle is isosceles, so the two sides are the same.\n\nB", "B"),
    ("The triangle is isosceles, so the two sides are the same.\n(D)", "D"),
    ("(B) 5cm\n\nThe triangle is isosceles.", "B"),
    # texts
    ("5cm", "B"),
    ("5 cm.", "B"),
    ("5", "B"),
    ("five centimeters", "B"),
    (r"\boxed{5}", "B"),
    (r"\boxed{5\text{ cm}}", "B"),
    ("The answer is 5.0 cm.", "B"),
    ("So the length of the side is $5$ cm.", "B"),
    ("Hence AB = 5", "B"),
    ("So the third side must be this long (B).", "B"),
]
NOT_CHOSEN = [
    "",
    "E",
    "(E)",
    "The answer is (E) 11 cm.",
    "A or B",
    "(A) or (B)",
    "The answer is A or B.",
    "both (A) and (C)",
    "The answer is B, C and D.",
    "The answer is B (5cm) and C (7 cm).",
    r"\boxed{A, B}",
    "The answer is a triangle.",
    "A triangle has three sides that are of equal length.",
    "I think it is longer than that.",
    "The answer is A triangle.",
    "The answer is not B.",
    "None of the options A, B, C, D is correct.",
    "(A) 3 cm\n(B) 5cm\n(C) 7 cm\n(D) 9 cm",
    "A\n\nor perhaps, thinking about it, rather\n\nC",
    "f(a) is not g(b) in general, which is all that we know.",
    "11 cm",
    "The answer is 11 cm.",
    "I cannot tell from the figure.",
    "Angle A is the right angle, as the figure shows to everybody.",
    "AB is **5 cm** and BC is **12 cm**, and now we have to find AC from the two of them",
]


@pytest.mark.parametrize(("output", "letter"), CHOSEN)
def test_chosen_option(output, letter):
    chosen = choose_option(output, LENGTHS)
    assert chosen is not None
    assert chosen.letter == letter


@pytest.mark.parametrize("output", NOT_CHOSEN)
def test_no_option_is_none(output):
    assert choose_option(output, LENGTHS) is None


@pytest.mark.parametrize(
    ("output", "choices", "chosen"),
    [
        ("Yes, the sandwich is cut in half.", ["Yes", "No"], Choice("A", "opening")),
        ("No", ["yes", "no"], Choice("B", "alone")),
        ("Noon is at twelve o'clock, and the sun is high.", ["Yes", "No"], None),
        ("The most affected organism is the Tilapia.", ["Tilapia", "Tadpole"], Choice("A", "conclusion")),
        ("The one with the most veins is the Mucronate leaf.", ["Acute", "Mucronate"], Choice("B", "conclusion")),
        ("It is not the Tilapia.", ["Tilapia", "Tadpole"], None),
        ("As a result, the population would also decrease.", ["increase", "decrease"], Choice("B", "conclusion")),
        ("Unable to determine.", ["Unable to determine.", "Nothing"], Choice("A", "alone")),
        ("The answer is: unable to determine", ["Nothing", "Unable to determine."], Choice("B", "marker")),
        ("18", ["9", "12", "18", "18"], None),
        ("(C) 18", ["9", "12", "18", "18"], Choice("C", "alone")),
        ("(C) 18\n\nThe sides add up.", ["9", "12", "18", "18"], Choice("C", "line")),
        ("1/2", ["0.5", "2"], Choice("A", "alone")),
        ("The answer is 30√3m", ["30m", "30√{3}m"], Choice("B", "marker")),
        (r"\boxed{30\sqrt{3}}", ["30m", "30√{3}m"], Choice("B", "boxed")),
        (r"$145^\circ$", ["135°", "145°"], Choice("B", "alone")),
        ("5 m", ["5 cm", "5 m"], Choice("B", "alone")),
        ("5", ["5 cm", "5 m"], None),
        ("50%", ["0.5", "50"], Choice("B", "alone")),
        ("1/4", ["1:2", "1:4"], Choice("B", "alone")),
        ("x", ["y", "x"], Choice("B", "alone")),
        (r"\boxed{x}", ["y", "x"], Choice("B", "boxed")),
        ("B", ["B", "A"], Choice("B", "alone")),
        ("A, b, c", ["A", "B", "C"], None),
        ("F", 6, Choice("F", "alone")),
        ("F", 5, None),
        ("The answer is I.", 9, Choice("I", "marker")),
        ("I think so.", 9, None),
    ],
)
def test_texts_of_options(output, choices, chosen):
    assert choose_option(output, choices) == chosen


@pytest.mark.parametrize("choices", [[], 0, 27])
def test_the_number_of_options_is_checked(choices):
    with pytest.raises(ValueError, match="1 to 26 options"):
        choose_option("A", choices)


def test_matching_choices():
    assert matching_choices("18", ["9", "18", "18.0", "18"]) == [1, 3]
    assert matching_choices("18.00", ["9", "18", "18.0"]) == [1, 2]
    assert matching_choices("19", ["9", "18"]) == []
    assert matching_choices("", ["", "a"]) == []


@pytest.mark.parametrize("output", [output for output, _ in CHOSEN])
def test_emphasis_and_whitespace_around_do_not_matter(output):
    assert choose_option(f" \n{output}\n ", LENGTHS).letter == choose_option(output, LENGTHS).letter
    if "\n" not in output and "*" not in output:
        assert choose_option(f"**{output}**", LENGTHS).letter == choose_option(output, LENGTHS).letter
