"""A reward score of 0 to 5 for an answer, by rules. Ours.

| points | for |
|---|---|
| 2 | the answer is right, by a grading rule |
| ½ | it is marked as such (`\\boxed{}`, `<answer>`); given where there is no gold answer, as for captions |
| ½ | a chain stands before it; given where there is no gold answer |
| 1 | there is a chain, and every statement `a + b = c` in the text holds |
| ½ | nothing is said over and over |
| ½ | it ended by itself, within the length range |
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lightning_vlm.benchmarks.rule import Rule
from lightning_vlm.data.schema import Sample
from lightning_vlm.distill.arithmetic import statements
from lightning_vlm.metrics.extract import answer_tag, boxed, explicit_answer

POINTS = {"right": 2.0, "marked": 0.5, "chain": 0.5, "arithmetic": 1.0, "no_loops": 0.5, "length": 0.5}
HIGHEST = sum(POINTS.values())
_LONGEST_BLOCK = 12  # words of a block that is looked for four times in a row
_TIMES = 4
_GRAMS, _FEWEST = 4, 40  # half of the 4-grams of a text of 40 words or more said before: a loop, too


@dataclass(frozen=True)
class Reward:
    """A score and what it is made of.

    Attributes:
        score: 0 to 5. parts: points of each criterion of `POINTS`.
    """

    score: float
    parts: dict[str, float]


def chain_of(text: str, answer: str | None) -> str:
    r"""What a text says beside its answer: without `\boxed{…}`, `<answer>…</answer>`, or the bare answer itself.

    Args:
        text: an answer. answer: the gold answer; None leaves the whole text a chain.
    """
    if answer is None:
        return text.strip()
    marked = [piece for piece in (boxed(text), answer_tag(text)) if piece is not None]
    if not marked:
        return "" if text.strip().strip(".").lower() == answer.strip().strip(".").lower() else text.strip()
    place = max(text.rfind(mark) for mark in ("\\boxed", "<answer>"))
    return text[:place].strip()


def loops(text: str) -> bool:
    """Whether a block of 1 to 12 words stands four times in a row, or half of a long text's 4-grams are repeated."""
    words = text.split()
    for size in range(1, _LONGEST_BLOCK + 1):
        same = 0
        for place in range(size, len(words)):
            same = same + 1 if words[place] == words[place - size] else 0
            if same == size * (_TIMES - 1):
                return True
    if len(words) < _FEWEST:
        return False
    grams = Counter(tuple(words[i : i + _GRAMS]) for i in range(len(words) - _GRAMS + 1))
    return len(grams) * 2 < grams.total()


def score_answer(
    text: str,
    sample: Sample,
    *,
    right: bool,
    tokens: int | None = None,
    finished: bool = True,
    shortest: int = 1,
    longest: int | None = None,
) -> Reward:
    """The score of one answer.

    Args:
        text: the answer. sample: its question; only whether it has a gold answer is read.
        right: what a rule or a judge says of it.
        tokens: its length; None counts words. finished: whether it ended by itself.
        shortest, longest: the length range, both included; None has no upper end.
    """
    length = len(text.split()) if tokens is None else tokens
    chain = bool(chain_of(text, sample.answer))
    got = {
        "right": right,
        "marked": sample.answer is None or explicit_answer(text) is not None,
        "chain": chain,
        "arithmetic": chain and all(statement.holds for statement in statements(text)),
        "no_loops": not loops(text),
        "length": finished and length >= shortest and (longest is None or length <= longest),
    }
    parts = {name: POINTS[name] * value for name, value in got.items()}
    return Reward(sum(parts.values()), parts)


def score_gold(sample: Sample, rule: Rule, **how: int | None) -> Reward:
    """The score of a sample's own last text, for data that were not distilled.

    Args:
        sample: ends with the assistant's text. rule: grades it.
        **how: `tokens`, `shortest`, `longest` of `score_answer`.

    Raises:
        ValueError: no text, or a rule that scores sets.
    """
    text = sample.chosen()
    if text is None:
        raise ValueError(f"sample {sample.id} has no assistant text to score: give data with answers")
    if rule.of_a_set:
        raise ValueError(f"rule {rule.name!r} scores a set of captions, not single answers: take world/exact, say")
    return score_answer(text, sample, right=rule.record(text, sample)["score"] >= 1, **how)
