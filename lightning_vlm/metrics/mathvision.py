r"""MATH-V's released rule: what counts as the answer of a response, and when it is right.

The released evaluation reads an answer out of a response by a fixed sequence of steps, normalises it in lower
case without spaces, and accepts it if it equals the gold letter or the text of the gold option, or either of them as a
number after rounding both to 2 decimals (tuples element by element). This is an implementation of those steps from
their description; published numbers on MATH-V are made by that rule, with all its quirks: a response without a marker
is taken as a whole, so long prose never scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

LETTERS = "ABCDE"
_MARKERS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_GREEDY_BOX = re.compile(r"oxed\{(.*)\}", re.DOTALL)
# In this order: a later entry sees what an earlier one left.
_DROPPED = (
    *(" ", "\\,", "\n", "\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ"),
    *("{m}^3", "m^3", "{units}", "units", "{km}", "km", "\\!", "\\$", "$", "\\%"),
)
_REWRITTEN = (("∞", r"\infty"), (r"+\infty", r"\infty"), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_UNREAD = ("\\circ", "°", "π", "\\!")  # the released evaluation finds no number in an option with these
_DECIMALS = 2


def released_answer(response: str) -> str:
    """The answer as the released evaluation reads it: lower case, without spaces; empty where nothing is left."""
    text = response.strip()
    for letter in LETTERS:
        ends, starts = (f" {letter}.", f" ({letter})."), (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith(ends) or text.startswith(starts):
            text = letter
    last = text.split("is ")[-1].rstrip(".")
    if _is_float(last):
        text = last
    if "oxed{" not in text:
        text = _behind_markers(text)
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    answer = _normalised(text)
    for letter in LETTERS.lower():
        answer = answer.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def released_correct(answer: str, gold: str, options: Sequence[str] = ()) -> bool:
    """Whether `answer` (from `released_answer`) equals the gold answer or, where options are shown, the gold option.

    Args:
        answer: as `released_answer` gives it. gold: a letter where there are options, else a value.
        options: the texts of the options in order, empty for a free-form question.

    Raises:
        ValueError: the gold answer is empty, or no letter of its options.
    """
    if not gold.strip():
        raise ValueError(f"gold answer {gold!r} is empty; drop the question or give it an answer")
    golds = [gold]
    if options:
        position = ord(gold) - ord("A") if len(gold) == 1 else -1
        if not 0 <= position < len(options):
            raise ValueError(f"gold answer {gold!r} is no letter of its {len(options)} options")
        golds.append(options[position])
    return any(_equal(answer.lower(), candidate.lower()) for candidate in golds)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _behind_markers(text: str) -> str:
    """What stands behind the last of each marker in turn, up to the end of its line or sentence."""
    for marker in _MARKERS:
        for spelling in (marker, "T" + marker[1:]):
            _, found, behind = text.rpartition(spelling)
            text = behind.strip()
            if found:
                text = text.split("\n")[0].split(". ")[0]
    return text


def _normalised(text: str) -> str:
    """The content of the box, or all of it, reduced to one bare expression."""
    text = text.lower().replace("{}", "")
    boxed = _GREEDY_BOX.findall(text)
    text = boxed[-1] if boxed else text
    closing, opening = text.find("}"), text.find("{")
    if closing != -1 and (opening == -1 or closing < opening):  # a brace that closes something cut off before
        text = text[:closing]
    text = text.split("=")[-1].split("\\approx")[-1]
    for old, new in _REWRITTEN:
        text = text.replace(old, new)
    text = text.replace("bmatrix", "pmatrix")
    for fragment in _DROPPED:
        text = text.replace(fragment, "")
    text = text.replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    if "\\sqrt" in text:
        text = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text)
        text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
        text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    fraction = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return rf"\frac{{{fraction[1]}}}{{{fraction[2]}}}" if fraction else text


def _equal(answer: str, gold: str) -> bool:
    if not answer.strip() or not gold.strip():
        return False
    if answer.strip() == gold.strip():
        return True
    answer_values, gold_values = _values(answer), _values(gold)
    return answer_values is not None and answer_values == gold_values


def _values(text: str) -> tuple | None:
    """(bracket, rounded elements) of a tuple or list, ("", value) of one expression; None where it is no number."""
    text = text.strip()
    inner = text[1:-1].split(",")
    if len(inner) > 1 and text[0] + text[-1] in ("()", "[]"):
        elements = [part.strip() if "infty" in part else _value(part) for part in inner]
        return None if None in elements else (text[0], *elements)
    value = _value(text)
    return None if value is None else ("", value)


def _up_to_stray_brace(text: str) -> str:
    """The text before a closing brace that closes nothing: what the greedy box took in beyond its own end."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return text[:position]
    return text


@lru_cache(maxsize=8192)
def _value(text: str) -> float | None:
    """The number a LaTeX expression evaluates to, rounded; None where it has free symbols or is none."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy

    text = _up_to_stray_brace(text.replace("$", "").replace(":", "/").strip())
    if any(sign in text for sign in _UNREAD):
        return None
    if _is_float(text):
        return round(float(text), _DECIMALS)
    try:
        expression = latex2sympy(text, is_real=True, normalization_config=NormalizationConfig(units=False))
        number = complex(expression.evalf())
    except Exception:  # whatever a parser of free text raises, the text is no number
        return None
    return round(number.real, _DECIMALS) if number.imag == 0 else None


def grade_response(response: str, gold: str, options: Sequence[str] = ()) -> tuple[str, bool]:
    """The released answer of a response and whether it is right; see `released_answer` and `released_correct`."""
    answer = released_answer(response)
    return answer, released_correct(answer, gold, options)
