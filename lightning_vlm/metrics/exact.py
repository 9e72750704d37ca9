"""Normalised exact match. Pure functions; scores are 0.0 or 1.0."""

from __future__ import annotations

from collections.abc import Iterable


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
