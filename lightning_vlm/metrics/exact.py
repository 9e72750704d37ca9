"""Normalised exact match and letter match. Pure functions; scores are 0.0 or 1.0."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LETTER = re.compile(r"\(\s*([a-z])\s*\)", re.IGNORECASE)
_LONE_LETTER = re.compile(r"([a-z])\s*[.):]?", re.IGNORECASE)


def normalise_text(text: str) -> str:
    """Lower case, whitespace collapsed, one closing full stop dropped."""
    text = " ".join(text.split()).lower()
    return text[:-1].rstrip() if text.endswith(".") else text


def exact_match(prediction: str, gold: str | Iterable[str]) -> float:
    """1.0 if the normalised prediction equals the normalised gold (any of them, if several).

    Raises:
        ValueError: no gold given.
    """
    golds = [gold] if isinstance(gold, str) else list(gold)
    if not golds:
        raise ValueError("exact_match needs at least one gold answer, got none")
    return float(normalise_text(prediction) in {normalise_text(g) for g in golds})


def choice_letter(text: str) -> str | None:
    """The lower-case letter of an option: the `(a)` of the text, or a text that is a letter alone (`A`, `a.`, `a)`).

    None where there is no such letter, and where parenthesised letters disagree: an output that names two options has
    not chosen one.
    """
    letters = {letter.lower() for letter in _LETTER.findall(text)}
    if len(letters) == 1:
        return letters.pop()
    if letters:
        return None
    alone = _LONE_LETTER.fullmatch(text.strip())
    return alone.group(1).lower() if alone else None


def letter_match(prediction: str, gold: str) -> float:
    """1.0 if both name the same option letter.

    Raises:
        ValueError: the gold answer names no letter.
    """
    letter = choice_letter(gold)
    if letter is None:
        raise ValueError(f"gold answer {gold!r} names no option letter; expected something like '(a)' or 'A'")
    return float(choice_letter(prediction) == letter)
