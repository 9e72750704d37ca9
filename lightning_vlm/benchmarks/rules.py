"""The grading rules, by name. One rule is one way to say what an answer is worth."""

from __future__ import annotations

import re
from functools import partial
from statistics import fmean
from typing import Any

from lightning_vlm.benchmarks.captions import (
    CAPTION_RULES,
    grade_caption,
    grade_world_caption,
    metric_names,
    summarise_captions,
    summarise_world_captions,
)
from lightning_vlm.benchmarks.rule import Groups, Record, Rule, Summary, by_problem, mean_summary
from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics.choices import choose_option
from lightning_vlm.metrics.exact import exact_match
from lightning_vlm.metrics.extract import boxed, explicit_answer, marked_or_whole
from lightning_vlm.metrics.grading_worker import GradingTimeout, grade_apart
from lightning_vlm.metrics.mathematics import normalise_math
from lightning_vlm.metrics.mathvista import extract_by_rules, official_correct, official_prediction

_LETTERS = 10  # options A to J, where a sample does not say what its options are
_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")


def gold_of(sample: Sample) -> str:
    """The gold answer.

    Raises:
        ValueError: there is none.
    """
    if sample.answer is None or not sample.answer.strip():
        raise ValueError(f"sample {sample.id} has no gold answer to grade against; name the column that holds it")
    return sample.answer


def _verdict(extraction: str | None, right: bool) -> Record:
    return {"extraction": extraction, "score": float(right)}


def _cut_off(extraction: str | None) -> Record:
    """Grading that had to be cut off counts as wrong and says so, so that such examples can be looked at."""
    return _verdict(extraction, False) | {"timed_out": True}


# --- the embedded world ----------------------------------------------------------------------------------------------


def grade_world(output: str, sample: Sample) -> Record:
    r"""The marked answer (`\boxed{}`), or the whole output where nothing is marked, equals the gold.

    A caption is right if it is one of its references, word for word. `direct` tells whether an answer came without a
    chain before it.
    """
    if sample.info["family"] == "caption":
        references = sample.info["references"]
        return _verdict(output.strip(), exact_match(output, references) == 1) | {"gold": list(references)}
    answer = marked_or_whole(output)
    direct = output.strip().startswith("\\boxed") or explicit_answer(output) is None
    return _verdict(answer, exact_match(answer, gold_of(sample)) == 1) | {"direct": direct}


def grade_twin(output: str, sample: Sample) -> Record:
    """As `grade_world`; the record names the pair of twins."""
    return grade_world(output, sample) | {"pair": sample.info["pair"]}


def twin_groups(sample: Sample) -> Groups:
    """The detail that tells the pictures of a pair apart, and the split."""
    return {"twin": sample.info["twin"], "split": sample.info["split"]}


def summarise_world(rule: Rule, records: list[Record]) -> Summary:
    """As `mean_summary`, over questions: captions stand apart as `family/caption`; `direct`: share without a chain."""
    everything = mean_summary(rule, records)
    questions = [record for record in records if record["groups"]["family"] != "caption"]
    if not questions:
        return everything
    summary = mean_summary(rule, questions)
    direct = [fmean(float(r["direct"]) for r in draws) for draws in by_problem(questions)]
    columns = {n: v for n, v in everything.columns.items() if "/" in n} | summary.columns | {"direct": direct}
    metrics = {name: fmean(values) for name, values in columns.items()}
    return Summary(summary.metrics | metrics, columns, None, everything.breakdown)


def world_groups(sample: Sample) -> Groups:
    """Family of the question and split."""
    return {"family": sample.info["family"], "split": sample.info["split"]}


# --- Geometry3K ------------------------------------------------------------------------------------------------------


def grade_freeform(output: str, sample: Sample) -> Record:
    r"""The last `\boxed{}` is mathematically equal to the gold; no box, no point."""
    gold, answer = gold_of(sample), boxed(output)
    if answer is None:
        return _verdict(None, False)
    try:
        return _verdict(answer, grade_apart("mathematics.math_equal", answer, gold))
    except GradingTimeout:
        return _cut_off(answer)


def grade_math_verify(output: str, sample: Sample) -> Record:
    """What math-verify finds anywhere in the output equals what it makes of the gold: R1-V's rule."""
    gold = gold_of(sample)
    if not output.strip():
        return _verdict(None, False)
    try:
        return _verdict(*grade_apart("geometry3k.verify_output", output, gold))
    except GradingTimeout:
        return _cut_off(None)


def geometry_groups(sample: Sample) -> Groups:
    """Goal and shape of the problem, where the source tells them."""
    names = {"goal": "problem_type_goal", "shape": "problem_type_graph"}
    return {key: _texts(sample.info[column]) for key, column in names.items() if sample.info.get(column)}


# --- options ---------------------------------------------------------------------------------------------------------


def grade_option(output: str, sample: Sample) -> Record:
    """The output chooses the gold option, by its letter or by its text, and no other.

    Raises:
        ValueError: the gold answer names no option.
    """
    options = sample.info.get("choices") or _LETTERS
    gold = gold_of(sample).strip()
    letter = _LETTER.fullmatch(gold)
    right = letter[1].upper() if letter else getattr(choose_option(gold, options), "letter", None)
    if right is None:
        raise ValueError(
            f"sample {sample.id}: gold answer {gold!r} names no option; expected a letter such as 'A' or '(a)'"
        )
    chosen = choose_option(output, options)
    return _verdict(None if chosen is None else chosen.letter, chosen is not None and chosen.letter == right)


def summarise_pairs(rule: Rule, records: list[Record]) -> Summary:
    """As `mean_summary`, and `pairs`: the share of pairs of which both questions are right (MMVP's own measure)."""
    summary = mean_summary(rule, records)
    pairs: dict[Any, list[list[Record]]] = {}
    for draws in by_problem(records):
        pairs.setdefault(draws[0]["pair"], []).append(draws)
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    if not whole:  # a benchmark cut short within its only pair
        return summary
    both = [fmean(float(a["score"] == b["score"] == 1) for a, b in zip(*pair, strict=True)) for pair in whole]
    return Summary(
        summary.metrics | {"pairs": fmean(both)}, dict(summary.columns) | {"pairs": both}, None, summary.breakdown
    )


def grade_pair(output: str, sample: Sample) -> Record:
    """As `grade_option`; the record names the pair."""
    return grade_option(output, sample) | {"pair": sample.info["pair"]}


# --- MathVista, MATH-V -----------------------------------------------------------------------------------------------


def _question(sample: Sample) -> dict[str, Any]:
    return {name: sample.info[name] for name in ("question_type", "answer_type", "choices", "precision")}


def grade_official(extraction: str, sample: Sample, *, legacy_integers: bool = False) -> Record:
    """MathVista's own rule: an extraction that a judge made, normalised as the answer type asks, equals the gold."""
    gold = gold_of(sample)
    prediction = official_prediction(extraction, **_question(sample), legacy_integers=legacy_integers)
    found = extraction if isinstance(extraction, str) and extraction.strip() else None
    return _verdict(found, official_correct(prediction, gold)) | {"prediction": prediction}


def grade_mathvista(output: str, sample: Sample) -> Record:
    """The answer found by rules alone, normalised as MathVista does, equals the gold; nothing is guessed."""
    gold = gold_of(sample)
    prediction = extract_by_rules(output, **_question(sample), unit=sample.info.get("unit"))
    return _verdict(prediction, official_correct(prediction, gold))


def mathvista_groups(sample: Sample) -> Groups:
    """All that the released scores are broken down by."""
    meta = sample.info.get("metadata") or {}
    table = {"question_type": sample.info["question_type"], "answer_type": sample.info["answer_type"]}
    for key in ("language", "source", "category", "task", "context", "grade", "skills"):
        if meta.get(key):
            table[key] = _texts(meta[key])
    return table


def grade_mathvision(output: str, sample: Sample) -> Record:
    """MATH-V's released rule: the extracted answer equals the gold letter, its option, or either one as a number."""
    gold = gold_of(sample)
    if not output.strip():
        return _verdict(None, False)
    try:
        answer, right = grade_apart("mathvision.grade_response", output, gold, sample.info.get("options") or [])
    except GradingTimeout:
        return _cut_off(None)
    return _verdict(answer or None, right)


def level_groups(sample: Sample) -> Groups:
    """Subject and level, where the source tells them."""
    return {key: _texts(sample.info[key]) for key in ("level", "subject") if sample.info.get(key) not in (None, "")}


# --- short answers ---------------------------------------------------------------------------------------------------


def grade_answer(output: str, sample: Sample) -> Record:
    """A short answer: an option where the gold is one, a value where it is mathematical, else the same words."""
    gold = gold_of(sample)
    if not output.strip():
        return _verdict(None, False)
    try:
        return _verdict(*grade_apart("short_answer.grade_short_answer", output, gold, sample.info.get("choices")))
    except GradingTimeout:
        return _cut_off(None)


def grade_exact(output: str, sample: Sample) -> Record:
    """The marked answer, or the whole output, equals the gold up to case, whitespace and a closing full stop."""
    answer = marked_or_whole(output)
    return _verdict(answer, exact_match(answer, gold_of(sample)) == 1)


def _texts(value: Any) -> str | list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else str(value)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="world/exact",
            grade=grade_world,
            groups=world_groups,
            tracked=("family",),
            summarise=summarise_world,
        ),
        Rule(
            name="world/twins",
            grade=grade_twin,
            groups=twin_groups,
            tracked=("twin",),
            summarise=summarise_pairs,
        ),
        Rule(
            name="world/captions",
            grade=grade_world_caption,
            summarise=summarise_world_captions,
            names=(*metric_names("python", spice=False), "exact"),
        ),
        Rule(
            name="geometry3k/freeform",
            grade=grade_freeform,
            groups=geometry_groups,
            vote=normalise_math,
            symbolic=True,
        ),
        Rule(
            name="geometry3k/math-verify",
            grade=grade_math_verify,
            groups=geometry_groups,
            vote=normalise_math,
            symbolic=True,
        ),
        Rule(name="geometry3k/mcq", grade=grade_option, groups=geometry_groups),
        Rule(name="mathvista/rules", grade=grade_mathvista, groups=mathvista_groups, tracked=("task", "skills")),
        Rule(name="mathvista/official", grade=grade_official, groups=mathvista_groups, tracked=("task", "skills")),
        Rule(
            name="mathvista/official-2023",
            grade=partial(grade_official, legacy_integers=True),
            groups=mathvista_groups,
            tracked=("task", "skills"),
        ),
        Rule(
            name="mathvision/released",
            grade=grade_mathvision,
            groups=level_groups,
            tracked=("level", "subject"),
            symbolic=True,
        ),
        Rule(name="mmvp/option", grade=grade_pair, summarise=summarise_pairs),
        Rule(
            name="answer/short",
            grade=grade_answer,
            groups=level_groups,
            tracked=("level", "subject"),
            vote=normalise_math,
            symbolic=True,
        ),
        Rule(name="exact", grade=grade_exact, groups=level_groups),
        Rule(name="option", grade=grade_option, groups=level_groups),
        *(
            Rule(
                name=f"coco/{name}",
                grade=grade_caption,
                summarise=partial(summarise_captions, **how),
                names=metric_names(**how),
            )
            for name, how in CAPTION_RULES.items()
        ),
    )
}
