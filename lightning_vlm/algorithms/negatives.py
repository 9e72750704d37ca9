"""Rejected answers: the data set's, the policy's own mistakes, or its most likely ones; in any proportion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from lightning_vlm.algorithms.micro import Item
from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.base import hash_unit
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.models.batch import Row
from lightning_vlm.rollouts import Completion, PolicyEngine, Sampling, completion_row, prompt_of

KINDS = ("data", "on_policy", "beam")


@dataclass(kw_only=True)
class Negatives:
    """Where the rejected side of a pair comes from. Shares need not sum to one.

    Args:
        data: share of pairs whose negative is the data set's.
        on_policy: share whose negative the current policy samples, judged worse than the chosen answer by `rule`.
        beam: share whose negative is the most likely wrong answer of a beam search.
        rule: how answers are judged: a grading rule by name, such as `world/exact` or `geometry3k/freeform`.
        refresh: optimizer steps that negatives are generated for at once, by the policy as it is then.
        draws: answers sampled per prompt; the first wrong one that ends is taken.
        temperature: of the samples.
        beams: width of the beam search.
        max_new_tokens: longest generated answer, in tokens.

    Raises:
        ValueError: a number out of range, no share at all, an unknown rule, or none where answers must be judged.
    """

    data: float = 1.0
    on_policy: float = 0.0
    beam: float = 0.0
    rule: str | None = None
    refresh: int = 1
    draws: int = 4
    temperature: float = 1.0
    beams: int = 4
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if min(self.data, self.on_policy, self.beam) < 0 or not self.total > 0:
            raise ValueError(
                "model.negatives: shares cannot be negative and one must be positive, got "
                f"data {self.data}, on_policy {self.on_policy}, beam {self.beam}"
            )
        if min(self.refresh, self.draws, self.beams, self.max_new_tokens) < 1 or self.temperature <= 0:
            raise ValueError(
                "model.negatives: refresh, draws, beams, max_new_tokens must be at least 1 and temperature positive"
            )
        if self.rule is not None and self.rule not in RULES:
            raise ValueError(f"model.negatives: unknown rule {self.rule!r}{one_of(self.rule, RULES)}")
        if self.rule is not None and RULES[self.rule].of_a_set:
            raise ValueError(
                f"model.negatives: rule {self.rule!r} scores a set of captions, not single answers; take another, "
                "such as world/exact or answer/short"
            )
        if self.generated and self.rule is None:
            raise ValueError(
                "model.negatives: generated answers must be judged; set model.negatives.rule, for example world/exact"
            )
        needs = {"draws": "on_policy", "temperature": "on_policy", "beams": "beam"}
        for setting in fields(self):
            kind = needs.get(setting.name)
            idle = not (getattr(self, kind) if kind else self.generated) and setting.name not in KINDS
            if idle and getattr(self, setting.name) != setting.default:
                raise ValueError(
                    f"model.negatives.{setting.name} has no effect where {kind or 'on_policy and beam'} has no share: "
                    "leave it out"
                )

    @property
    def total(self) -> float:
        """Sum of the shares."""
        return self.data + self.on_policy + self.beam

    @property
    def generated(self) -> bool:
        """Whether the policy has to write some of them."""
        return self.on_policy + self.beam > 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that have a share."""
        return tuple(kind for kind in KINDS if getattr(self, kind) > 0)

    def kind_of(self, seed: int, step: int, id: str) -> str:
        """Which kind a sample gets: a draw keyed by (seed, step, id), so that neither rank nor order matters."""
        at = hash_unit(seed, f"negative/{step}/{id}") * self.total
        for kind in self.kinds:
            at -= getattr(self, kind)
            if at < 0:
                return kind
        return self.kinds[-1]


def generate(
    negatives: Negatives,
    engine: PolicyEngine,
    items: Sequence[Item],
    samples: Sequence[Sample],
    *,
    seed: int,
    step: int,
) -> tuple[list[Item], dict[str, float]]:
    """Items whose rejected rows are of the kind that their sample drew.

    Where no generated answer is wrong, the data set's negative stands in; where there is none, the chosen row is alone.

    Args:
        negatives: shares and settings. engine: samples from the policy as it is now.
        items: [chosen, rejected] or [chosen] rows per sample. samples: the samples, for the rule.
        seed, step: key of the draws.

    Returns:
        The items, in order, and counts: `wanted` and `found` per generated kind, and `missing` negatives.
    """
    kinds = [negatives.kind_of(seed, step, sample.id) for sample in samples]
    counts: dict[str, float] = {}
    found: dict[int, Row] = {}
    for kind in (kind for kind in negatives.kinds if kind != "data"):
        chosen = [i for i, drawn in enumerate(kinds) if drawn == kind]
        answers = _answers(negatives, engine, kind, [prompt_of(items[i][0]) for i in chosen], (seed, step))
        for i, drawn in zip(chosen, answers, strict=True):
            row = _first_wrong(negatives, kind, items[i][0], samples[i], drawn)
            if row is not None:
                found[i] = row
        counts[f"wanted/{kind}"] = float(len(chosen))
        counts[f"found/{kind}"] = float(sum(i in found for i in chosen))
    out = [[item[0], found[i]] if i in found else list(item) for i, item in enumerate(items)]
    return out, counts | {"missing": float(sum(len(item) < 2 for item in out))}


def _answers(
    negatives: Negatives, engine: PolicyEngine, kind: str, prompts: list[Row], keys: tuple[int, int]
) -> list[list[Completion]]:
    if not prompts:
        return []
    if kind == "beam":
        return engine.beams(prompts, beams=negatives.beams, n=negatives.beams, max_new_tokens=negatives.max_new_tokens)
    sampling = Sampling(temperature=negatives.temperature, max_new_tokens=negatives.max_new_tokens)
    return engine.generate(prompts, n=negatives.draws, sampling=sampling, keys=keys)


def _first_wrong(
    negatives: Negatives, kind: str, chosen: Row, sample: Sample, answers: Sequence[Completion]
) -> Row | None:
    """The first answer that ends and scores less than the chosen one."""
    whole = [answer for answer in answers if answer.finished and answer.text.strip()]
    rule = RULES[negatives.rule]
    texts = [sample.chosen() or "", *(answer.text for answer in whole)]
    best, *scores = (record["score"] for record in grade_all(rule, [(text, sample) for text in texts]))
    wrong = next((answer for answer, score in zip(whole, scores, strict=True) if score < best), None)
    if wrong is None:
        return None
    row = completion_row(prompt_of(chosen), wrong)
    row.name, row.info = "rejected", {"negative": kind, "generated": True, "source": chosen.info.get("source", "")}
    return row
