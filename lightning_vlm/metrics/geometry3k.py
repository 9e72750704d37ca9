r"""Geometry3K's graders: equality of the boxed answer, and math-verify as it comes.

Two rules under two names, because the same outputs get different scores by them: `freeform` reads only `\boxed{}` and
compares after units, degree signs and Unicode signs are normalised; `math-verify` hands the whole output to
math-verify, as R1-V and many a training script do, and inherits what that takes for the answer and the gold.
"""

from __future__ import annotations

import logging
import re

# Written in LaTeX from end to end, but without the signs that would tell a parser so. A text with √, ° or 米 beside its
# commands is not: math-verify reads such a text as prose.
_BARE_LATEX = re.compile(r"[ -~]*\\[a-zA-Z][ -~]*")


def verify_output(output: str, gold: str) -> list[str | bool | None]:
    r"""What math-verify reads as the answer of a whole output, and whether it equals the gold.

    The gold is wrapped in `$…$` where it is bare LaTeX (`8 \sqrt { 2 }`), else taken as it stands: `10√{2}` is then 10
    to math-verify. Rule of the verdicts that R1-V released.

    Args:
        output: all of what the model wrote. gold: the gold answer.

    Returns:
        [the answer as text, or None where nothing was found; whether it is right].

    Raises:
        ValueError: the gold answer is empty.
    """
    from math_verify import parse, verify

    # math-verify warns once per process that its timeouts, which are signals, are off; that is what we want here.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not gold.strip():
        raise ValueError(f"gold answer {gold!r} is empty; drop the sample or give it an answer")
    bare = "$" not in gold and "\\boxed" not in gold and _BARE_LATEX.fullmatch(gold.strip())
    gold_parsed = parse(f"${gold}$" if bare else gold, parsing_timeout=None)
    found = parse(output, parsing_timeout=None)
    if not found:
        return [None, False]
    # The output stands where math-verify expects the gold: so did R1-V, and the two orders are not always alike.
    return [str(found[-1]), bool(verify(found, gold_parsed, timeout_seconds=None))]
