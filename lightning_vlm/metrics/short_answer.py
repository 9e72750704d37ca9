r"""Grading short answers of any kind: an option, a number, a formula or a few words. Pure functions.

The kind follows from the gold answer. Formulas are compared by math-verify, which a hostile answer can keep busy for
ever: call `grade_short_answer` in a worker process where outputs are not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from lightning_vlm.metrics.choices import choose_option, matching_choices
from lightning_vlm.metrics.extract import final_answer, stated_answer, withheld
from lightning_vlm.metrics.mathematics import is_mathematical, math_equal, normalise_math, parses
from lightning_vlm.metrics.numbers import numbers_equal, parse_number, plain_latex

_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_MOST_LETTERS = 10
_LONGEST_FORMULA = 500  # characters

_TIME = re.compile(r"(?<=\d) ?([ap])\.? ?m\b\.?")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[,;!?'\"“”‘’()\[\]{}\\-]")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def grade_short_answer(output: str, gold: str, choices: Sequence[str] | None = None) -> tuple[str | None, bool]:
    r"""What the output answers (None: it states no answer) and whether that is right.

    With options, or where the gold answer is a letter from A to J (`B`, `(B)`, `\text{(B)}`), the output must choose
    that option (see `choose_option`); the extraction is its letter. Else the stated answer (see `final_answer`) must
    be the `same_answer` as the gold.

    Args:
        output: what the model wrote.
        gold: the right answer; of a question with options its letter or its text.
        choices: the texts of the options.

    Raises:
        ValueError: the gold answer is empty, or none of the options.
    """
    if not plain_latex(gold):
        raise ValueError(f"gold answer {gold!r} is empty; drop the sample or give it an answer")
    letter = _LETTER.fullmatch(plain_latex(gold))
    if choices or letter:
        right = _gold_letters(gold, choices) if choices else {letter.group(1)}
        chosen = choose_option(output, choices or _MOST_LETTERS)
        return (None, False) if chosen is None else (chosen.letter, chosen.letter in right)
    found = stated_answer(output) if withheld(gold) else final_answer(output)
    return (None, False) if found is None else (found.text, same_answer(found.text, gold))


def same_answer(prediction: str, gold: str) -> bool:
    r"""Whether two short answers say the same.

    - Numbers by value, in digits or words, without units, percent and degree signs (see `parse_number`).
    - Formulas by `math_equal`: tuples and intervals in order, lists without brackets and sets in any order,
      `x = 5` as `5`, `x \in [-2, 7]` as `[-2, 7]`.
    - Words without regard to case, articles, punctuation and LaTeX around them. Nothing less than the whole answer
      counts: `20` is not `June 20`.
    """
    if _compact(prediction) == _compact(gold):
        return True
    (name, equals, given), (gold_name, gold_equals, wanted) = prediction.partition("="), gold.partition("=")
    if equals and gold_equals:
        if _compact(name) == _compact(gold_name):
            return same_answer(given, wanted)
        given = wanted = None  # `x = 5` is not `y = 5`
    else:
        given, wanted = parse_number(prediction), parse_number(gold)
    if wanted is not None and given is not None:
        return numbers_equal(given, wanted)
    formula = _formula(gold, wanted)
    if wanted is None and not (is_mathematical(gold) and parses(formula)):
        return _words(prediction) == _words(gold) != ""
    if len(prediction) > _LONGEST_FORMULA or (given is None and not is_mathematical(prediction)):
        return False
    return math_equal(_formula(prediction, given), formula)


def _gold_letters(gold: str, choices: Sequence[str]) -> set[str]:
    """Letters of the options that the gold answer means; several where options share its text."""
    found = matching_choices(gold, choices)
    chosen = choose_option(gold, choices)
    if chosen is not None:
        return {chosen.letter}
    if not found:
        raise ValueError(
            f"gold answer {gold!r} is none of the options {list(choices)!r}; give its letter or the text of an option"
        )
    return {chr(ord("A") + index) for index in found}


def _compact(text: str) -> str:
    """A normal form without the spaces that part no words or digits."""
    return re.sub(r" (?!\w)|(?<!\w) ", "", normalise_math(text))


def _formula(text: str, number: Fraction | None) -> str:
    """A formula as `math_equal` reads it: a number in figures, `or` and `and` as commas."""
    return str(number) if number is not None else re.sub(r",? \b(?:or|and)\b ", ", ", plain_latex(text))


def _words(text: str) -> str:
    text = _TIME.sub(r" \1m", plain_latex(text).replace("*", "").casefold())
    return " ".join(_ARTICLE.sub(" ", _PUNCTUATION.sub(" ", text.replace(" : ", ":"))).split())
