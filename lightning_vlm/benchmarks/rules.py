"""Grading rules: what one output is worth, and what many records add up to.

A rule's name stands beside every number it makes. `score` maps (output, sample) to the fields it adds to that example's
record; the same functions serve as rewards. Evaluation that fails raises: no error becomes a 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics.exact import choice_letter, exact_match, letter_match
from lightning_vlm.metrics.extract import boxed, explicit_answer, marked_or_whole
from lightning_vlm.metrics.math_worker import GradingTimeout, MathWorker

Record = dict[str, Any]
Score = Callable[[str, Sample], Record]

_worker = MathWorker()


def _gold(sample: Sample) -> str:
    if sample.answer is None or not sample.answer.strip():
        raise ValueError(f"sample {sample.id} has no gold answer to grade against; name the column that holds it")
    return sample.answer


def score_world(output: str, sample: Sample) -> Record:
    r"""The embedded world: the marked answer (`\boxed{}`), or the whole output where nothing is marked, equals the
    gold.

    A caption is right if it is one of its references, word for word. `direct` tells whether an answer came without a
    chain before it.
    """
    family = sample.info["family"]
    record = {"family": family, "split": sample.info["split"]}
    if family == "caption":
        return record | {"extraction": output.strip(), "score": exact_match(output, sample.info["references"])}
    answer = marked_or_whole(output)
    direct = output.strip().startswith("\\boxed") or explicit_answer(output) is None
    return record | {"extraction": answer, "score": exact_match(answer, _gold(sample)), "direct": float(direct)}


def score_freeform(output: str, sample: Sample) -> Record:
    r"""`geometry3k/freeform`: the last `\boxed{}` is mathematically equal to the gold; no box, no point.

    `extraction` is None where there is no box. A comparison that had to be cut off counts as wrong and says so by
    `timed_out`, so that such examples can be looked at.
    """
    gold, answer = _gold(sample), boxed(output)
    if answer is None:
        return {"extraction": None, "score": 0.0}
    try:
        return {"extraction": answer, "score": float(_worker.equal(answer, gold))}
    except GradingTimeout:
        return {"extraction": answer, "score": 0.0, "timed_out": 1.0}


def score_exact(output: str, sample: Sample) -> Record:
    """The marked answer, or the whole output, equals the gold up to case, whitespace and a closing full stop."""
    answer = marked_or_whole(output)
    return {"extraction": answer, "score": exact_match(answer, _gold(sample))}


def score_letter(output: str, sample: Sample) -> Record:
    """The marked answer, or the whole output, names the letter of the right option and no other."""
    answer = marked_or_whole(output)
    return {"extraction": choice_letter(answer), "score": letter_match(answer, _gold(sample))}


def world_results(records: Iterable[Record]) -> dict[str, float]:
    """`accuracy` over questions (captions apart), `accuracy_<family>`, share of `direct` answers, `caption_exact`."""
    by_family: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_family[record["family"]].append(record)
    captions = by_family.pop("caption", [])
    results = {}
    if by_family:
        questions = [record for family in by_family.values() for record in family]
        results |= mean_results(questions)
        results["direct"] = fmean(record["direct"] for record in questions)
        results |= {f"accuracy_{name}": fmean(r["score"] for r in group) for name, group in sorted(by_family.items())}
    if captions:
        results["caption_exact"] = fmean(record["score"] for record in captions)
        results["caption_n"] = float(len({record["id"] for record in captions}))
    return results


def mean_results(records: Iterable[Record]) -> dict[str, float]:
    """`accuracy` and `n` (samples); where it happens, shares of outputs cut at the length limit, without an extracted
    answer, and with a comparison that was cut off."""
    records = list(records)
    results = {
        "accuracy": fmean(record["score"] for record in records),
        "n": float(len({record["id"] for record in records})),
        "unfinished": fmean(float(not record["finished"]) for record in records),
        "not_extracted": fmean(float(record["extraction"] is None) for record in records),
    }
    if any("timed_out" in record for record in records):
        results["timed_out"] = fmean(record.get("timed_out", 0.0) for record in records)
    return results
