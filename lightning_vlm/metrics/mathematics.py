"""Equality of mathematical answers by math-verify.

No signal-based timeouts are used (they fail outside the main thread and score everything 0 there): a caller that grades
untrusted output guards against a hang with a worker process, see `MathWorker`.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

_DEGREE = re.compile(
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\^\s*\{?\s*°\s*\}?|\\degree(?:s)?\b|°|\bdeg(?:ree)?s?\b\.?)", re.IGNORECASE
)
_WRAPPED_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:!]|\\ |~|\\quad\b|\\qquad\b|\\left\b|\\right\b")
_UNIT_WORDS = (
    r"(?:sq(?:uare|\.)?\s*|cubic\s*|cu\.?\s*)?"
    r"(?:units?|millimet(?:er|re)s?|centimet(?:er|re)s?|kilomet(?:er|re)s?|met(?:er|re)s?|inch(?:es)?|feet|foot|yards?|miles?"
    r"|mm|cm|km|dm|ft|yd|mi|in|m)"
)
_UNIT = re.compile(
    rf"(?<=[\d\}}\)\sπi])\s*{_UNIT_WORDS}\s*\.?\s*(?:(?:\^\s*\{{?\s*[23]\s*\}}?)|[²³])?\s*$", re.IGNORECASE
)
_NUMERIC_COMMANDS = re.compile(r"\\(?:frac|dfrac|tfrac|sqrt|pi|cdot|times|div|pm)")


def normalise_math(text: str) -> str:
    r"""A bare LaTeX or plain answer without what does not change its value.

    Dropped: `$`, `\(`, degree signs in every spelling, spacing commands, a closing full stop, and a length or area
    unit at the end of an otherwise numeric answer (`8\text{ cm}^2`, `12 square units`). `√` and `π` become LaTeX.
    """
    text = text.strip().strip("$").strip()
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip()
    text = _WRAPPED_TEXT.sub(lambda m: " " + m.group(1).strip() + " ", text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"√\s*\{", r"\\sqrt{", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|\w)", r"\\sqrt{\1}", text)
    text = text.replace("π", r"\pi ").replace("×", r"\times ").replace("−", "-")
    text = _DEGREE.sub("", text)
    text = re.sub(r"(?<=[\d\s}])\.\s*$", "", text).strip()
    without_unit = _UNIT.sub("", text).strip()
    if without_unit and not re.search(r"[A-Za-z]", _NUMERIC_COMMANDS.sub("", without_unit)):
        text = without_unit
    return " ".join(text.split())


def math_equal(prediction: str, gold: str) -> bool:
    r"""Whether two answers are mathematically equal.

    Values are compared to 6 decimals: `8 \sqrt { 2 }` equals `\sqrt{128}`, but `24 \pi` is not `75.4` and `8.33` is
    not `8.3`.

    Args:
        prediction: the extracted answer, without its `\boxed{}`.
        gold: the gold answer, bare LaTeX or plain text.

    Raises:
        ValueError: the gold answer is empty or cannot be parsed.
    """
    from math_verify import verify

    gold_text, prediction_text = normalise_math(gold), normalise_math(prediction)
    if not gold_text:
        raise ValueError(f"gold answer {gold!r} is empty; drop the sample or give it an answer")
    gold_parsed = _parse(gold_text)
    if not gold_parsed:
        raise ValueError(
            f"gold answer {gold!r} is not an expression that math-verify parses; use exact match for text answers"
        )
    if not prediction_text:
        return False
    if gold_text == prediction_text:
        return True
    return verify(list(gold_parsed), list(_parse(prediction_text)), timeout_seconds=None)


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple:
    """math-verify's parse of a normalised answer, wrapped so that bare LaTeX is read as LaTeX."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # math-verify warns once per process that the timeout is off; that is what we want here.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    wrapped = f"${text}$"
    return tuple(parse(wrapped, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))
