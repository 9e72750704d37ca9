"""Which scored samples the next round learns from: D_t = {score ≥ τ} ∪ or ∩ {what the previous model got wrong}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from lightning_vlm.data.schema import Sample
from lightning_vlm.distill.judge import Judge
from lightning_vlm.distill.reward import HIGHEST

Combine = Literal["union", "intersection"]


@dataclass(frozen=True)
class Selection:
    """A choice.

    Attributes:
        records: what is chosen, in the order of the file.
        scored: how many there were. good: how many of them reach the threshold. failed: how many the model got wrong.
        both: how many are good and failed.
    """

    records: list[dict[str, Any]]
    scored: int
    good: int
    failed: int
    both: int


def check_threshold(value: float, name: str = "threshold") -> None:
    """Refuse a threshold that is no score.

    Raises:
        ValueError: outside 0 to 5.
    """
    if not 0 <= value <= HIGHEST:
        raise ValueError(f"{name} must lie in 0 to {HIGHEST:g}, got {value:g}: reward scores do")


def select(
    records: Sequence[dict[str, Any]],
    failed: set[str] | None,
    *,
    threshold: float,
    combine: Combine = "union",
    column: str = "score",
) -> Selection:
    """Choose records by score and by failure.

    Source: Skywork R1V, iterative SFT: the paper's text says union, summaries of it intersection.

    Args:
        records: with `id` and `score`. failed: ids that the previous model got wrong; None chooses by score alone.
        threshold: τ, the least score. combine: `union` or `intersection` of the two sets.
        column: `score` of the text to be learned, or `own_score` of the model's own first chain.

    Raises:
        ValueError: a threshold outside 0 to 5, an unknown `combine`, a record without a score, an empty result.
    """
    check_threshold(threshold)
    if combine not in ("union", "intersection"):
        raise ValueError(f"combine is {combine!r}: choose union or intersection")
    for record in records:
        value = record.get(column)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"record {record.get('id')!r} has no {column} ({value!r}): score it, or leave it out")
    good = {record["id"] for record in records if record[column] >= threshold}
    wrong = good if failed is None else {record["id"] for record in records if record["id"] in failed}
    chosen = good & wrong if combine == "intersection" else good | wrong
    if not chosen:
        what = "" if failed is None else f" {combine} with {len(wrong)} failed"
        raise ValueError(f"none of {len(records)} samples is left: {len(good)} have {column} >= {threshold:g}{what}")
    kept = [record for record in records if record["id"] in chosen]
    return Selection(kept, len(records), len(good), 0 if failed is None else len(wrong), len(good & wrong))


def sample_of(record: Mapping[str, Any]) -> Sample:
    """The sample that a scored record was made of, without its pictures; a rule can grade answers to it."""
    info = {name: value for name, value in record.items() if isinstance(value, str | int | float | bool)}
    return Sample(record["id"], record["messages"], answer=record.get("answer"), info=info | (record.get("info") or {}))


def failed_ids(records: Sequence[dict[str, Any]], answers: Mapping[str, Sequence[str]], judge: Judge) -> set[str]:
    """Ids of the records whose answers are wrong: less than half of an id's answers are right.

    Args:
        records: scored ones. answers: id → what the previous model said, one text per draw. judge: says what is right.
    """
    samples = {record["id"]: sample_of(record) for record in records}
    asked = [(text, samples[id]) for id, texts in answers.items() for text in texts]
    verdicts = iter(judge.verdicts(asked))
    return {id for id, texts in answers.items() if fmean(bool(next(verdicts).right) for _ in texts) < 0.5}
