"""Where an output says its answer, and that every reader of model text takes whatever a model writes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.metrics.choices import Choice, choose_option
from lightning_vlm.metrics.extract import Extraction, answer_tag, boxed, final_answer, stated_answer, trim
from lightning_vlm.metrics.mathvista import extract_by_rules, official_prediction
from lightning_vlm.metrics.numbers import last_number, parse_number
from lightning_vlm.metrics.short_answer import same_answer

LENGTHS = ["3 cm", "5cm", "7 cm", "9 cm"]

STATED = [
    # boxes
    (r"so $x = \boxed{5}$.", "5", "boxed"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}", "boxed"),
    (r"\boxed{5} or rather \boxed{6}", "6", "boxed"),
    (r"\boxed{5}, and then \boxed{\frac{1}{", "5", "boxed"),
    (r"\boxed{5}. In short: \boxed{}", "5", "boxed"),
    (r"\boxed{\boxed{\boxed{7}}}", "7", "boxed"),
    (r"\boxed{ \{1, 2\} }", r"\{1, 2\}", "boxed"),
    (r"\fbox{12 cm}", "12 cm", "boxed"),
    (r"The answer is \boxed{3}. Answer: 4", "3", "boxed"),
    (r"<answer>4</answer> \boxed{3}", "3", "boxed"),
    ("\\boxed{\n42\n}", "42", "boxed"),
    # tags
    ("<think>2 + 2</think><answer> 4 </answer>", "4", "tag"),
    ("<answer>4</answer> no, <ANSWER>5</ANSWER>", "5", "tag"),
    ("<answer>4</answer> I put it in <answer></answer> tags.", "4", "tag"),
    (r"<answer>$\boxed{12}$</answer>", "12", "boxed"),
    ("<answer>The area is 12 cm.</answer>", "The area is 12 cm", "tag"),
    ("<answer>4</answer> <answer>5", "4", "tag"),
    # markers
    ("The answer is 5.", "5", "marker"),
    ("So the final answer is: 42", "42", "marker"),
    ("**Answer:** 12", "12", "marker"),
    ("**Answer: 12**", "12", "marker"),
    ("**Answer**: 12", "12", "marker"),
    ("Answer:\n\n42", "42", "marker"),
    ("ANSWER: 7", "7", "marker"),
    ("Answer：7", "7", "marker"),
    ("Ans: 7", "7", "marker"),
    ("Answer = 7", "7", "marker"),
    ("### Final Answer\n\n12 cm", "12 cm", "marker"),
    ("**Final Answer**\n12 cm", "12 cm", "marker"),
    ("Final answer 42", "42", "marker"),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "$5$", "marker"),
    ("The answer is $\\frac{1}{2}$, which is 0.5.", "$\\frac{1}{2}$", "marker"),
    ("The answer is 12 - 7 = 5.", "12 - 7 = 5", "marker"),
    ("She has 3 + 4 = 7 apples.\n#### 7", "7", "marker"),
    ("The answer to the question is 5 cm.", "5 cm", "marker"),
    ("The answer, rounded to one decimal, is 5.8.", "5.8", "marker"),
    ("The correct answer is **5.5** cm.", "**5.5** cm", "marker"),
    ("The correct option is D.", "D", "marker"),
    ("the correct choice would be (B)", "(B)", "marker"),
    ("My answer should be 12", "12", "marker"),
    ("The answer is therefore 12.", "12", "marker"),
    ("The answer is probably 12.", "12", "marker"),
    ("Answer: 11:15 a.m.", "11:15 a.m.", "marker"),
    ("The answer is 11:15 p.m. on Monday.", "11:15 p.m. on Monday", "marker"),
    ("The answer is 5 sq. units. It is the area.", "5 sq. units", "marker"),
    (r"The answer is $x = 5. 2$ cm. Done.", "$x = 5. 2$ cm", "marker"),
    ("The answer is\n\\[\n\\frac{1}{2}\n\\]", "\\[\n\\frac{1}{2}\n\\]", "marker"),
    (r"Answer: \(3, 4\) since both fit.", r"\(3, 4\)", "marker"),
    ("The answer is 5 because 2 + 3 = 5.", "5", "marker"),
    ("The answer is B because this is a right triangle.", "B", "marker"),
    ("The answer is B, as angle C is 90°.", "B", "marker"),
    ("The answer is east, because the sun rises there.", "east", "marker"),
    ("Answer: 5 or 6", "5 or 6", "marker"),
    ("Answer: 3, 5, 7", "3, 5, 7", "marker"),
    ("The answer is 5. No wait, the answer is 6.", "6", "marker"),
    ("Answer: 5\n\nAnswer:", "5", "marker"),
    ("The answer is 5<|im_end|>", "5", "marker"),
    ("因此，答案是：12。", "12", "marker"),
    ('The answer is "east".', "east", "marker"),
    ("The answer is `42`.", "42", "marker"),
    ("The answer is 5.\nThis is correct.", "5", "marker"),
    ("Answer: Evelyn\n\nExplanation: she is the fastest.", "Evelyn", "marker"),
    # the only number in bold
    ("The median is **4**.\n\nThe other values are 2 and 6.", "4", "emphasis"),
    ("There are **3 dots** per group. In all 9, so 9 divided by 3 works, as you see", "3 dots", "emphasis"),
    # conclusions
    ("AC is twice AB. So the length of AC is 5.5 cm.", "5.5 cm", "conclusion"),
    ("Adding up, x equals 12.", "12", "conclusion"),
    ("Hence $x = 2y = \\frac{3}{4}$.", r"\frac{3}{4}", "conclusion"),
    ("So d = 0.013 m = 1.3 cm", "1.3 cm", "conclusion"),
    ("Therefore the area is $24\\pi$ cm.", "$24\\pi$ cm", "conclusion"),
    ("Thus the angle is approximately 36.9°.", "approximately 36.9°", "conclusion"),
    ("The ratio is thus equal to 2.5.", "2.5", "conclusion"),
    ("Therefore, the sum is\n\\[\n3 + 4 = 7\n\\]", "7", "conclusion"),
    ("Therefore the difference is 7.8% (11.2% - 3.4%).", "7.8%", "conclusion"),
    (
        "So the range is 8 miles.\n\nI hope this helps! Let me know if you have any other questions.",
        "8 miles",
        "conclusion",
    ),
    ("Some go. Therefore, there are 3 potential maskers in Fig. 1.", "3", "conclusion"),
    ("There are twelve bars with values smaller than 6.", "twelve", "conclusion"),
    ('The word is "east".', "east", "conclusion"),
    ("We add 3 and 4. Then the sum would be 7.", "7", "conclusion"),
    ("If we add both, the result we get is 7.", "7", "conclusion"),
    # answers alone
    ("42", "42", "alone"),
    (" 5.5 cm \n", "5.5 cm", "alone"),
    ("**B**", "B", "alone"),
    (r"$\frac{3}{4}$", r"$\frac{3}{4}$", "alone"),
    ("East", "East", "alone"),
    ("the red circle", "the red circle", "alone"),
    ("Adding 3 and 4 gives the number of cats.\n\n7 cats", "7 cats", "alone"),
    ("We solve for the angle, as follows.\n\\[\\frac{\\pi}{4}\\]", "\\[\\frac{\\pi}{4}\\]", "alone"),
    ("It must be north of the equator, so:\n(C)", "(C)", "alone"),
    # reasoning
    (r"<think>\boxed{3}</think> The answer is 4.", "4", "marker"),
    (r"<think>maybe \boxed{3}</think>", "3", "boxed"),
    ("<think>The answer is 3.</think> I do think so, on the whole, yes.", "3", "marker"),
    ("<think>a</think> 5 <think>The answer is 3</think> 7", "7", "alone"),
    (r"<think>so far \boxed{3} and", "3", "boxed"),
]

NOT_STATED = [
    "",
    " \n ",
    "...",
    r"\boxed{",
    r"\boxed{}",
    "<answer></answer>",
    "<answer>5",
    "Answer:",
    "The answer is",
    "I don't know the answer.",
    "I do not know.",
    "The answer is unknown.",
    "The answer is not 5 but 6.",
    "The answer isn't 5.",
    "The answer could be 5.",
    "The answer may be either of the two, which are all right with me.",
    "Answer: N/A",
    r"\boxed{unknown}",
    "The answer cannot be determined from the figure.",
    "I'm sorry, but I can't help with images of people yet.",
    "Sorry, I can't see the image.",
    "What is the answer to all of this, then?",
    "The slope is to be found at x = 5.",
    "Let us assume that the side is 5.",
    "It is not true that x = 5.",
    "The perimeter would differ if x = 5.",
    "Is the length of the side 5?",
    "For example, if there are 3 blocks, the answer would be 3.",
    "The sky above the port is blue and there is nothing else to it.",
    "<think>Perhaps x = 5.</think>",
    "#### Step 1: find the area of the triangle and then double it, as above",
    "Here is how I got the answer:\n1. Add the two numbers that are given.\n2. Halve the sum of them.",
]


@pytest.mark.parametrize(("output", "text", "how"), STATED)
def test_final_answer(output, text, how):
    assert final_answer(output) == Extraction(text, how)


@pytest.mark.parametrize("output", NOT_STATED)
def test_no_answer_is_none(output):
    assert final_answer(output) is None


def test_a_denied_answer_ends_the_search_but_for_what_follows_it():
    assert final_answer("The answer is 5. No, the answer is not 5.") is None
    assert final_answer("The answer is not obvious. Adding up, x = 7.").text == "7"
    assert stated_answer("The answer is: cannot be determined").text == "cannot be determined"
    assert stated_answer("The answer is not 5 but 6.").text == "not 5 but 6"


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        (" **5** ", "5"),
        ("**5** cm", "**5** cm"),
        ("5**", "5"),
        ("* 5", "5"),
        ("“east”.", "east"),
        ("11:15 a.m.", "11:15 a.m."),
        ("(5, 6).", "(5, 6)"),
        (r"5\,", r"5\,"),
        ("2*3", "2*3"),
        ("...", ""),
    ],
)
def test_trim(text, trimmed):
    assert trim(text) == trimmed


# --- whatever a model writes -----------------------------------------------------------------------------------------

PIECES = [
    *(
        r"\boxed{",
        "}",
        "{",
        "\\",
        "$",
        "$$",
        r"\(",
        r"\]",
        r"\frac{1}{2}",
        r"\text{",
        "<think>",
        "</think>",
        "<answer>",
    ),
    *(
        "</answer>",
        "The answer is ",
        "Answer: ",
        "#### ",
        "答案：",
        "not ",
        " or ",
        " because ",
        "if ",
        "there are ",
        " is ",
    ),
    *("5", "12.5 cm", "B", "(A)", "A", "I", "a", "x = ", "twelve ", "10", "[1, 2]", "Yes, ", "π", "√", "½", "°", "%"),
    *(". ", ",", ":", "\n", "\n\n", "**", "`", "*", "_", "^", "|", "```", "- ", "1. ", "e", "…", "\x00", "\ud800"),
]
hostile = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
stable = settings(derandomize=True, max_examples=250, deadline=None)


@stable
@given(hostile)
def test_nothing_raises_and_answers_come_from_the_output(text):
    found = final_answer(text)
    assert found is None or (found.text and found.text in text)
    for piece in (boxed(text), answer_tag(text)):
        assert piece is None or piece in text
    for options in (LENGTHS, ["A", "5"], 4):
        chosen = choose_option(text, options)
        assert chosen is None or chosen.letter in "ABCD"
    for number in (parse_number(text), last_number(text)):
        assert number is None or isinstance(number, Fraction)
    assert last_number(text, integer=True) is None or last_number(text, integer=True).denominator == 1
    question = {"choices": LENGTHS, "precision": 1}
    for answer_type in ("integer", "float", "list"):
        extract_by_rules(text, question_type="free_form", answer_type=answer_type, unit="years", **question)
        official_prediction(text, question_type="free_form", answer_type=answer_type, **question)
    assert extract_by_rules(text, question_type="multi_choice", answer_type="text", **question) in [None, *LENGTHS]
    assert official_prediction(text, question_type="multi_choice", answer_type="text", **question) in LENGTHS


@stable
@given(hostile)
def test_a_box_at_the_end_wins(text):
    r"""Whatever comes before it, unclosed braces and boxes included: `\boxed{42}` on a line of its own is complete."""
    assert final_answer(text + "\n\\boxed{42}") == Extraction("42", "boxed")
    assert choose_option(text + "\n\\boxed{C}", LENGTHS) == Choice("C", "boxed")


@stable
@given(hostile.filter(lambda text: "boxed{" not in text and "fbox{" not in text and "answer>" not in text))
def test_a_marker_at_the_end_wins(text):
    """Where nothing is boxed or tagged, a sentence of its own that says the answer is 42 decides."""
    assert final_answer(text + ".\n\nThe answer is 42.") == Extraction("42", "marker")


@pytest.mark.parametrize(("output", "text", "how"), STATED)
def test_whitespace_around_does_not_matter(output, text, how):
    assert final_answer(f"\n\n  {output} \n\n") == Extraction(text, how)


@stable
@given(hostile)
def test_normalisation_is_idempotent(text):
    assert trim(trim(text)) == trim(text)


@pytest.mark.parametrize(
    "pattern", [r"\boxed{", "answer: ", "**a**", "1,", "(A) or ", "\n", r"\text{", "<answer>", "$", "there are ", "if "]
)
def test_long_outputs_are_read(pattern):
    """Time grows in step with length; what would grow faster does not end here."""
    text = pattern * (100_000 // len(pattern))
    assert final_answer(text + "\n\\boxed{42}").text == "42"
    choose_option(text, LENGTHS)
    last_number(text)
    assert not same_answer(text, "June 20")
