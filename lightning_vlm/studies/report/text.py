"""Numbers, times and foreign texts as the report shows them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

NOTHING = "–"
LONGEST = 1500  # characters of an output, prompt or gold answer that are shown


def number(value: Any) -> str:
    """Three significant digits, thousands with commas, a true minus; a dash for what does not exist."""
    if value is None or isinstance(value, str):
        return value or NOTHING
    value = float(value)
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def with_interval(mean: float, low: float, high: float) -> str:
    """`0.52 [0.48, 0.56]`; the mean alone where there is no interval."""
    if math.isnan(low):
        return number(mean)
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def duration(seconds: float | None) -> str:
    """`41 s`, `12 min 5 s`, `3 h 12 min`, `2 d 4 h`: two units, rounded to the smaller one."""
    if seconds is None or math.isnan(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    for large, small, size, unit in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        whole, rest = divmod(round(seconds / unit), size // unit)
        if whole == 0:
            return f"{rest} {small}"
        if large == "d" or whole * size < {"min": 3600, "h": 86400}[large]:
            return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
    raise AssertionError(seconds)


def clean(text: Any, longest: int = LONGEST) -> str:
    """A text from outside, safe to encode and to lay out: odd characters become U+FFFD, what is too long is cut.

    Args:
        text: any JSON value; a list (the references of a caption) gives one line per entry, None nothing.
        longest: characters that are kept.
    """
    if text is None:
        return ""
    if isinstance(text, list):
        return clean("\n".join(clean(entry, longest) for entry in text), longest)
    text = str(text).replace("\r\n", "\n").replace("\r", "\n")
    # Controls, lone surrogates and marks that turn the direction of what follows them.
    text = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cs", "Cf") and c not in "\n\t\u200c\u200d" else c for c in text
    )
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def plural(count: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def slug(text: str) -> str:
    """Letters and digits joined by hyphens, for identifiers in the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with texts; lists are joined by commas."""
    if isinstance(value, dict):
        return {key: text for name in value for key, text in flat(value[name], f"{prefix}{name}.").items()}
    key = prefix.removesuffix(".")
    if isinstance(value, list | tuple):
        return {key: ", ".join(clean(entry) for entry in value) or NOTHING}
    return {key: NOTHING if value is None else clean(value)}
