r"""Statements such as `20 + 45 = 65` in a text, and whether they hold. Pure functions; ours.

Numbers, `+ - * / × · ÷ −`, products before sums, no brackets and no unknowns: `2x + 3 = 7` and `f(2) = 4` state
nothing that can be checked, and are passed over. Degree signs, `$`, `\cdot`, `\times` and thousands' commas are read
through. In `a + b = c = d` each neighbouring pair is a statement.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

_NUMBER = r"\d+(?:\.\d+)?"
_TERM = rf"(?:-\s*)?{_NUMBER}"
_SUM = rf"{_TERM}(?:\s*[-+*/]\s*{_TERM})*"
_EQUALITY = re.compile(rf"{_SUM}(?:\s*=\s*{_SUM})+")
_TOKEN = re.compile(rf"{_NUMBER}|[-+*/]")
_BEFORE = re.compile(r"[\w.^_\\]$|[)}\]]\s?$|[-+*/^(\[{]\s*$")  # it began earlier, unreadably
_AFTER = re.compile(r"\s*[*/^({\[]|\s?[A-Za-z\\](?![A-Za-z])|\s*[-+]\s*[A-Za-z\\(]|\.\d|%")
_SAME = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "°": "", "$": "", "≈": "="}
_LATEX = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:,|;|!|quad\b)|(?<=\d),(?=\d{3}(?!\d))")
_OPERATORS = re.compile(r"\\(?:times|cdot)\b")
_LONGEST = 20_000  # characters that are read


@dataclass(frozen=True)
class Statement:
    """One equality.

    Attributes:
        text: as it was read. holds: whether it does, up to the rounding of its right side.
    """

    text: str
    holds: bool


def statements(text: str) -> list[Statement]:
    """The equalities of a text of which at least one side calculates, in order.

    Args:
        text: any; the first 20,000 characters are read.
    """
    text = _OPERATORS.sub("*", text[:_LONGEST]).replace("\\div", "/")
    text = _LATEX.sub("", text).translate(str.maketrans(_SAME))
    found = []
    for match in _EQUALITY.finditer(text):
        if _BEFORE.search(text[max(0, match.start() - 8) : match.start()]) or _AFTER.match(text, match.end()):
            continue
        sides = match.group().split("=")
        for left, right in pairwise(sides):
            if len(_TOKEN.findall(left.strip().lstrip("-"))) > 1 or len(_TOKEN.findall(right.strip().lstrip("-"))) > 1:
                found.append(Statement(f"{left.strip()} = {right.strip()}", _equal(left, right)))
    return found


def _equal(left: str, right: str) -> bool:
    values = value(left), value(right)
    decimals = len(right.strip().partition(".")[2]) if re.fullmatch(rf"\s*-?\s*{_NUMBER}\s*", right) else 12
    return all(map(math.isfinite, values)) and abs(values[0] - values[1]) <= 0.5 * 10.0**-decimals * (1 + 1e-9)


def value(expression: str) -> float:
    """What `20 + 3 * 4 - 6 / 2` is worth; NaN where it divides by zero."""
    total, product, sign, operator = 0.0, None, 1.0, "*"
    for token in _TOKEN.findall(expression):
        if token in "+-" and product is None:
            sign = -sign if token == "-" else sign
        elif token in "+-" and operator is None:
            total, product, sign, operator = total + product, None, -1.0 if token == "-" else 1.0, "*"
        elif token in "+-":  # 3 * -2
            sign = -1.0 if token == "-" else 1.0
        elif token in "*/":
            operator, sign = token, 1.0
        else:
            number = sign * float(token)
            if operator == "/" and number == 0:
                return math.nan
            product = number if product is None else product / number if operator == "/" else product * number
            operator = None
    return total + (product or 0.0)
