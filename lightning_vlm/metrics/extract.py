"""Where an output says its answer: `\\boxed{…}` and `<answer>…</answer>`. Pure string functions that never guess."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\boxed\s*\{")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{…}`, braces balanced, or None.

    A box that is never closed (a truncated output) does not count, an earlier complete one does. Escaped braces `\{`
    and `\}` do not nest. A box that holds nothing but a box is unwrapped: `\boxed{\boxed{5}}` gives `5`.
    """
    answer, start = None, 0
    while match := _BOX.search(text, start):
        end = _closing_brace(text, match.end())
        if end is None:  # not closed: boxes inside it may still be complete
            start = match.end()
            continue
        answer, start = text[match.end() : end].strip(), end + 1
    if answer is not None and (inner := _BOX.match(answer)) and _closing_brace(answer, inner.end()) == len(answer) - 1:
        return boxed(answer)
    return answer


def answer_tag(text: str) -> str | None:
    """Content of the last complete `<answer>…</answer>`, stripped, or None."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def explicit_answer(text: str) -> str | None:
    r"""The answer the output marks as such: the last `\boxed{…}`, else the last `<answer>…</answer>`, else None."""
    answer = boxed(text)
    return answer if answer is not None else answer_tag(text)


def marked_or_whole(text: str) -> str:
    """The marked answer, or the whole output where nothing is marked: for tasks that also allow direct answers."""
    answer = explicit_answer(text)
    return text.strip() if answer is None else answer


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`; None if there is none."""
    depth, position = 1, start
    while position < len(text):
        if text[position] == "\\":  # skips \{ and \}, and the second backslash of a line break
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
        position += 1
    return None
