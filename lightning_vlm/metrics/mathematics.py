"""Equality of mathematical answers by math-verify.

No signal-based timeouts are used (they fail outside the main thread and score everything 0 there): a caller that grades
untrusted output guards against a hang with a worker process.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from lightning_vlm.metrics.numbers import DEGREE, plain_latex

_UNIT_WORDS = (
    r"(?:sq(?:uare|\.)?\s*|cubic\s*|cu\.?\s*)?"
    r"(?:units?|millimet(?:er|re)s?|centimet(?:er|re)s?|kilomet(?:er|re)s?|met(?:er|re)s?|inch(?:es)?|feet|foot|yards?|miles?"
    r"|mm|cm|km|dm|ft|yd|mi|in|m)"
)
_UNIT = re.compile(
    rf"(?<=[\d\}}\)\sπi])\s*{_UNIT_WORDS}\s*\.?\s*(?:(?:\^\s*\{{?\s*[23]\s*\}}?)|[²³])?\s*$", re.IGNORECASE
)
_NUMERIC_COMMANDS = re.compile(r"\\(?:[dtc]?frac|sqrt|pi|cdot|times|div|pm)")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FUNCTION = re.compile(
    r"(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|gcd|lcm|max|min|mod|det|deg|sqrt|pi|or|and|infty|[pbv]?matrix",
    re.IGNORECASE,
)
_TIME_OR_RATIO = re.compile(r"[0-9] ?[ap]\.? ?m\b|[0-9] ?: ?[0-9]", re.IGNORECASE)


def normalise_math(text: str) -> str:
    r"""A bare LaTeX or plain answer without what does not change its value.

    Dropped: `$`, `\(`, degree and percent signs in every spelling, spacing commands, a closing full stop, and a length
    or area unit at the end of an otherwise numeric answer (`8\text{ cm}^2`, `12 square units`). `√` and `π` become
    LaTeX. A percent sign is a unit: `50\%` is 50, never 0.5 (see `numbers`).
    """
    text = plain_latex(text)
    text = re.sub(r"√ ?\{", r"\\sqrt{", text)
    text = re.sub(r"√ ?(\d+(?:\.\d+)?|\w)", r"\\sqrt{\1}", text)
    text = text.replace("π", r"\pi ").replace("×", r"\times ").replace("∞", r"\infty ")
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", DEGREE.sub("", text))
    text = re.sub(r"(?<=[\d}]) ?(?:%|\bpercent\b)", "", text)
    text = re.sub(r"(?<=[\d\s}])\.\s*$", "", text).strip()
    without_unit = _UNIT.sub("", text).strip()
    if without_unit and not re.search(r"[A-Za-z]", _NUMERIC_COMMANDS.sub("", without_unit)):
        text = without_unit
    return " ".join(text.split())


def is_mathematical(text: str) -> bool:
    r"""Whether a text is one formula: digits, operators, LaTeX or a single letter, and no words but functions.

    `June 20`, `11:15`, `2:3` and `\text{Evelyn}` are not; `x \in [-2,7]`, `6x^2+3` and `12 cm` are.
    """
    text = normalise_math(text)
    if _TIME_OR_RATIO.search(text):
        return False
    words = re.findall(r"[^\W\d_]{2,}", _COMMAND.sub(" ", text))
    if any((len(word) > 2 or not word.isascii()) and not _FUNCTION.fullmatch(word) for word in words):
        return False
    return bool(re.search(r"[\d\\+*/^=<>|∞∅≤≥√]|-.", text)) or len(text.strip("().")) == 1


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


def parses(text: str) -> bool:
    """Whether math-verify makes an expression of the text."""
    return bool(_parse(normalise_math(text)))


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple:
    """math-verify's parse of a normalised answer, wrapped so that bare LaTeX is read as LaTeX."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # math-verify warns once per process that the timeout is off; that is what we want here.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    wrapped = f"${text}$"
    return tuple(parse(wrapped, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))
