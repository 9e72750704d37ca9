r"""Who says whether an answer is right, and what it is worth: a grading rule, or a model that is asked.

A model ends its reply with \boxed{1} or \boxed{0}, or with a number of 0 to 5; the prompts are below and in
docs/distillation.md. A reply that holds no verdict is `unreadable`: it counts as not right, and is said to be so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rule import Rule
from lightning_vlm.data.schema import Sample
from lightning_vlm.distill.model import Model
from lightning_vlm.distill.questions import question_text
from lightning_vlm.metrics.extract import explicit_answer
from lightning_vlm.rollouts import Sampling

VERDICT = (
    "Question: {question}\nRight answer: {gold}\nGiven answer: {answer}\n"
    "Does the given answer reach the right answer by sound reasoning? "
    "End with \\boxed{{1}} if it does, with \\boxed{{0}} if it does not."
)
SCORE = (
    "Question: {question}\nRight answer: {gold}\nGiven answer: {answer}\n"
    "Rate the given answer from 0 (useless) to 5 (right, well reasoned, clear). End with \\boxed{{N}}, N the rating."
)
REWRITE = (
    "{question}\nThe right answer is {gold}. Write the reasoning that leads to it, step by step, as if you had found "
    "it yourself, and end with \\boxed{{{gold}}}."
)
_WORDS = {"yes": True, "correct": True, "right": True, "no": False, "incorrect": False, "wrong": False}
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        right: None where the judge's reply holds no verdict.
        extraction: the answer that a rule found; None where it found none, or a model judged.
        said: a model's reply.
    """

    right: bool | None
    extraction: str | None = None
    said: str | None = None


class Judge(Protocol):
    """Judges answers; `name` stands in the records."""

    name: str

    def verdicts(self, answers: Sequence[tuple[str, Sample]]) -> list[Verdict]:
        """One verdict per (text, sample), in order."""
        ...


class RuleJudge:
    """A grading rule of a benchmark: right is a score of 1.

    Args:
        rule: grades single answers. jobs: processes, for symbolic rules.

    Raises:
        ValueError: a rule that scores sets.
    """

    def __init__(self, rule: Rule, *, jobs: int | None = None) -> None:
        if rule.of_a_set:
            raise ValueError(f"rule {rule.name!r} scores a set of captions, not single answers: take another")
        self.name, self.rule, self.jobs = rule.name, rule, jobs

    def verdicts(self, answers: Sequence[tuple[str, Sample]]) -> list[Verdict]:
        """See `Judge`.

        Raises:
            ValueError: a sample without a gold answer, or without what the rule reads.
        """
        try:
            records = list(grade_all(self.rule, answers, workers=self.jobs))
        except KeyError as error:
            raise ValueError(f"rule {self.name} does not fit the data: the samples have no {error}") from error
        return [Verdict(record["score"] >= 1, record["extraction"]) for record in records]


class ModelJudge:
    """A model that is shown the pictures, question, gold answer and the answer.

    Args:
        model: asked one answer at a time. max_new_tokens: of its reply. seed: of its draws (it is greedy).
    """

    def __init__(self, model: Model, *, max_new_tokens: int = 256, seed: int = 0) -> None:
        self.name, self.model, self.seed = model.path, model, seed
        self.sampling = Sampling(max_new_tokens=max_new_tokens)

    def verdicts(self, answers: Sequence[tuple[str, Sample]]) -> list[Verdict]:
        """See `Judge`."""
        said = [self._ask(VERDICT, answer, sample) for answer, sample in answers]
        return [Verdict(read_verdict(reply), said=reply) for reply in said]

    def scores(self, answers: Sequence[tuple[str, Sample]]) -> list[float | None]:
        """A number of 0 to 5 for each answer; None where the reply holds none."""
        return [read_score(self._ask(SCORE, answer, sample)) for answer, sample in answers]

    def _ask(self, prompt: str, answer: str, sample: Sample) -> str:
        asked = prompt.format(question=question_text(sample), gold=gold_text(sample), answer=answer)
        return self.model.answer(sample, asked, sampling=self.sampling, seed=self.seed)


def gold_text(sample: Sample) -> str:
    """The gold answer, or the sample's own last text where there is none, as for captions.

    Raises:
        ValueError: neither.
    """
    gold = sample.answer or sample.chosen()
    if not gold:
        raise ValueError(f"sample {sample.id} has neither a gold answer nor a text to judge against")
    return gold


def read_verdict(reply: str) -> bool | None:
    """The marked answer if it is 1, 0 or a word for them, else the only such word of the last line, else None."""
    marked = explicit_answer(reply)
    if marked is not None:
        word = marked.strip().strip(".").lower()
        return {"1": True, "0": False, **_WORDS}.get(word)
    lines = reply.strip().splitlines()
    found = {_WORDS[word] for word in re.findall(r"[a-z]+", lines[-1].lower()) if word in _WORDS} if lines else set()
    return found.pop() if len(found) == 1 and " not " not in f" {lines[-1].lower()} " else None


def read_score(reply: str) -> float | None:
    """The marked number, else the only number of the reply's last line; None outside 0 to 5, or where there is none."""
    marked = explicit_answer(reply)
    lines = reply.strip().splitlines()
    numbers = _NUMBER.findall(marked if marked is not None else lines[-1] if lines else "")
    value = float(numbers[0]) if len(numbers) == 1 else None
    return value if value is not None and 0 <= value <= 5 else None
