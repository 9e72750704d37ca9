"""MathVista's scoring (Lu et al. 2024): the official rule for given extractions, and extraction by rules alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from rapidfuzz.distance import Levenshtein

from lightning_vlm.metrics.choices import choose_option, matching_choices
from lightning_vlm.metrics.extract import final_answer, last_sentence, stated_answer, withheld
from lightning_vlm.metrics.numbers import last_number, parse_number, plain_latex

_ROUND_LETTER = re.compile(r"\(([a-zA-Z])\)")
_GIVES_UP = re.compile(
    r"\b(?:impossible|cannot|can't|unable|not (?:provided?|given|possible|enough|specific)|depends?|please provide|"
    r"without)\b",
    re.IGNORECASE,
)
_OPENING = 80  # characters
# Code, rows of tables and items of lists hold many numbers, but seldom the answer.
_NO_PROSE = re.compile(r"^(?:```[^`]*```|[^\n|]*\|[^\n]*|[ \t]*[*+•-][ \t][^\n]*)$", re.MULTILINE)
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_LIST = re.compile(rf"\[ ?{_NUMBER}(?: ?, ?{_NUMBER})* ?\]")


def official_prediction(
    extraction: object,
    *,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] | None,
    precision: int | None,
    legacy_integers: bool = False,
) -> str | None:
    """What the official scorer compares with the gold answer; None where it fails.

    An option is named by the first `(X)` or by a letter alone, else it is the text of least edit distance, the first of
    several. Integers are cut to whole numbers, floats rounded to the question's precision, lists taken as they stand.

    Args:
        extraction: the answer as a judge extracted it from the model's output.
        question_type: `multi_choice` or `free_form`.
        answer_type: `text`, `integer`, `float` or `list`.
        choices: the texts of the options of a `multi_choice` question.
        precision: decimals of a `float`.
        legacy_integers: read integers as the releases of 2023 did, by `int(x)`: `5.0` fails there.

    Raises:
        ValueError: a `multi_choice` question without options, or an unknown answer type.
    """
    if question_type == "multi_choice":
        if not choices:
            raise ValueError(f"a multi_choice question needs its options, got {choices!r}; read the column 'choices'")
        return _official_choice(str(extraction).strip(), choices)
    try:
        match answer_type:
            case "integer":
                return str(int(extraction) if legacy_integers else int(float(extraction)))
            case "float":
                return str(round(float(extraction), int(precision)))
            case "list":
                return str(extraction)
    except (TypeError, ValueError, OverflowError):
        return None
    raise ValueError(f"unknown answer_type {answer_type!r} of a free-form question; expected integer, float or list")


def official_correct(prediction: str | None, answer: str) -> bool:
    """Whether a prediction, official or by rules, is the gold answer: equal as strings."""
    return prediction == answer


def extract_by_rules(
    response: str,
    *,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] | None,
    precision: int | None,
    unit: str | None = None,
) -> str | None:
    """The prediction found in a model's response without a judge; None where there is none. Nothing is guessed.

    A `multi_choice` response must choose an option (see `choose_option`) or state the text of one. Of numbers, the one
    that the response states is taken (see `final_answer`), else the last one of its prose (see `last_number`), unless
    the response gives up ("not provided", "cannot be determined"); it is brought to the form of the gold answer by the
    official rule. A list is the last `[…]` of numbers.

    Args:
        response: what the model wrote.
        question_type: `multi_choice` or `free_form`.
        answer_type: `text`, `integer`, `float` or `list`.
        choices: the texts of the options of a `multi_choice` question.
        precision: decimals of a `float`.
        unit: unit of the answer: of the numbers in the prose, the last one that has it goes before the others.

    Raises:
        ValueError: as `official_prediction`.
    """
    question = {"question_type": question_type, "answer_type": answer_type, "choices": choices, "precision": precision}
    if question_type == "multi_choice":
        return _choice_by_rules(response, choices)
    if answer_type == "list":
        lists = _LIST.findall(plain_latex(response))
        return "[" + ", ".join(re.findall(_NUMBER, lists[-1])) + "]" if lists else None
    number = _stated_number(response)
    if number is None:
        number = _last_number(response, unit, integer=answer_type == "integer")
    return None if number is None else official_prediction(float(number), **question)


def _official_choice(extraction: str, choices: Sequence[str]) -> str:
    if letter := _ROUND_LETTER.search(extraction):
        extraction = letter.group(1).upper()
    index = ord(extraction) - ord("A") if len(extraction) == 1 else -1
    if 0 <= index < len(choices):
        return choices[index]
    return min(choices, key=lambda choice: Levenshtein.distance(extraction, choice))


def _choice_by_rules(response: str, choices: Sequence[str]) -> str | None:
    chosen = choose_option(response, choices)
    if chosen is not None:
        return choices[ord(chosen.letter) - ord("A")]
    # Options of the same text share a prediction, though no letter can be told.
    stated = stated_answer(response)
    texts = {choices[index] for index in matching_choices(stated.text, choices)} if stated else set()
    return texts.pop() if len(texts) == 1 else None


def _stated_number(response: str) -> Fraction | None:
    stated = final_answer(response)
    if stated is None:
        return None
    number = parse_number(stated.text)
    return last_number(stated.text) if number is None else number


def _last_number(response: str, unit: str | None, *, integer: bool) -> Fraction | None:
    """The last number of the prose; None where the response opens or ends by giving up, or denies its answer."""
    stated = stated_answer(response)
    if stated is not None and withheld(stated.text):
        return None
    if _GIVES_UP.search(response[:_OPENING]) or _GIVES_UP.search(last_sentence(response)):
        return None
    prose = _NO_PROSE.sub("", response)
    prose = prose if re.search(r"\d", prose) else response
    if unit:
        measured = re.findall(rf"(?<![\d.,])(-?\d[\d,.]{{0,30}}) ?{re.escape(unit.removesuffix('s'))}s?\b", prose)
        numbers = [number for number in map(parse_number, measured) if number is not None]
        if numbers:
            return numbers[-1]
    return last_number(prose, integer=integer)
