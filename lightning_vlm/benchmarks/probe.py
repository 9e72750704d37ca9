"""What a learning-dynamics probe is: its samples, and what the records of its texts add up to.

Quantities, per sample (log-probabilities in nats per token, means over the tokens of a text, end of turn included):

    ℓ̄(y) = log π(y|x)/|y| of each text; argmax: (1/|w|) Σ_t max_v log π(v|x, w_<t) along the chosen text w
    entropy, top1 = max_v π(v), TV = ½ Σ|p − q|, JS = ½ KL(p‖m) + ½ KL(q‖m) to the stage's start q: along w, token means
    Δ_y = log π(y|x) − log π_0(y|x) (sums); reward_margin = β(Δ_w − Δ_l); preference a = σ(reward_margin)
    vulnerable: a ∈ [.8, .99]; cooling_weight w_c = σ((ℓ̄(l) − ℓ_floor)/τ)

An evaluation's value is the mean over samples. Calibration pools what it judges over all samples: top tokens along w by
their probability (`ece`), greedy answers by exp(log π(answer)) (`answer_ece`). Sources: Ren & Sutherland, Learning
Dynamics of LLM Finetuning (texts); CW-DPO (a, its vulnerable zone, w_c); all means are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import torch

from lightning_vlm.benchmarks.rule import Record, Rule, Summary
from lightning_vlm.data.probe import ProbeSamples
from lightning_vlm.data.schema import Sample
from lightning_vlm.losses.preference import VULNERABLE
from lightning_vlm.metrics.calibration import Reliability, reliability
from lightning_vlm.rollouts.sampling import Sampling

_ALONG = ("entropy", "top1")
_DIVERGENCES = ("tv", "js")
_SHARES = ("vulnerable", "answer_accuracy")
_PAIR = ("reward_margin", "preference", "vulnerable", "cooling_weight")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Constants of the preference quantities.

    Attributes:
        beta: scale of the implied reward. tau: temperature of the cooling weight.
        ell_floor: nats per token around which it sets in; None while it is not known yet.
    """

    beta: float = 0.1
    tau: float = 1.0
    ell_floor: float | None = -3.0


@dataclass(frozen=True)
class ProbeSummary(Summary):
    """A summary with reliability curves.

    Attributes:
        curves: `tokens`, and `answers` where answers are graded.
    """

    curves: dict[str, Reliability] = field(default_factory=dict)

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % intervals by bootstrap over samples; means of equal values that are no shares have no width."""
        exact = {name: (v[0], v[0]) for name, v in self.columns.items() if name not in _SHARES and len({*v}) == 1}
        return super().intervals(seed) | exact


@dataclass(kw_only=True)
class Probe:
    """An evaluation that scores given texts; it remembers its first and its last records to compare with.

    Attributes:
        name: names its metrics, `val/<name>/chosen`.
        samples: with their texts.
        every: optimizer steps between evaluations; the first one is before any step.
        preference: gives the constants that hold now.
        rule: grades greedy answers; None asks for none.
        max_new_tokens: longest greedy answer.
        distributions: whether TV and JS to the start are measured.
        start: where the start's distributions are collected and kept; None until training begins.
        first: sample id → record at the start, on the first rank. last: likewise, of the probe before.
    """

    encoding: ClassVar[str] = "probe"
    at_start: ClassVar[bool] = True

    name: str
    samples: ProbeSamples
    every: int
    preference: Callable[[], Preference] = Preference
    rule: Rule | None = None
    max_new_tokens: int = 256
    distributions: bool = True
    start: Any = None
    first: dict[str, Record] = field(default_factory=dict)
    last: dict[str, Record] = field(default_factory=dict)

    @property
    def sampling(self) -> Sampling:
        """Greedy."""
        return Sampling(max_new_tokens=self.max_new_tokens)

    @property
    def followed(self) -> tuple[str, ...]:
        """What is compared with the start and with the probe before: log-probabilities, entropy, top-1 probability."""
        return (*self.samples.texts, "argmax", *_ALONG)

    @cached_property
    def metric_names(self) -> frozenset[str]:
        """Names of all metrics an evaluation logs.

        Raises:
            ValueError: a sample that the rule cannot grade, or a rule that scores sets of answers only.
        """
        names = {*self.followed, "ece", "tokens", "n"}
        names |= {f"{name}_{since}" for name in self.followed for since in ("since_start", "since_last")}
        names |= {*_DIVERGENCES} if self.distributions else set()
        names |= {*_PAIR} if "rejected" in self.samples.texts else set()
        if self.rule is None:
            return frozenset(names)
        if self.rule.names:
            raise ValueError(
                f"probe {self.name!r}: rule {self.rule.name!r} scores sets of answers; take one that scores single ones"
            )
        for sample in self.asked():
            self.rule.record("", sample)
        return frozenset(names | {"answer_accuracy", "answer_ece"})

    def asked(self) -> Sequence[Sample]:
        """The samples whose greedy answers are graded: those with a gold answer or references.

        Raises:
            ValueError: there is none.
        """
        found = [sample for sample in self.samples if has_gold(sample)]
        if not found:
            raise ValueError(f"probe {self.name!r}: no sample has a gold answer; leave out answer_rule")
        return found

    def forget(self) -> None:
        """Begin anew."""
        self.start, self.first, self.last = None, {}, {}

    def summary(self, records: Sequence[Record]) -> ProbeSummary:
        """Complete the records by what compares with earlier ones, and sum up; the first call sets the start.

        Args:
            records: per sample `id`, mean log-probabilities by name of the text with their `<text>_tokens`, `argmax`,
                `entropy`, `top1`, maybe `tv` and `js`; per token `confidences` and `correct`, which are taken out;
                where an answer was asked `score` and `confidence`.

        Raises:
            ValueError: no records, a value that is not finite, or a sample that the start does not have.
        """
        if not records:
            raise ValueError(f"probe {self.name!r} has nothing to score")
        confidences = [value for record in records for value in record.pop("confidences")]
        correct = [value for record in records for value in record.pop("correct")]
        first = self.first or {record["id"]: record for record in records}
        last, preference = self.last or first, self.preference()
        for record in records:
            self._compare(record, first, last)
            if "rejected" in record:
                record |= preference_quantities(record, preference)
            if wrong := [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]:
                raise ValueError(f"probe {self.name!r}: {wrong[0]} of sample {record['id']} is {record[wrong[0]]}")
        self.first, self.last = first, {record["id"]: record for record in records}
        columns = {name: values for name in sorted(self.metric_names) if (values := _column(records, name))}
        curves = {"tokens": _reliability(confidences, correct)}
        metrics = {name: fmean(values) for name, values in columns.items()}
        columns = {
            name: values for name, values in columns.items() if not name.endswith("_since_last")
        }  # for intervals
        metrics |= {"ece": curves["tokens"].error, "n": float(len(records)), "tokens": float(len(confidences))}
        if asked := [record for record in records if "score" in record]:
            columns["answer_accuracy"] = _column(asked, "score")
            curves["answers"] = _reliability(_column(asked, "confidence"), columns["answer_accuracy"])
            metrics |= {"answer_accuracy": fmean(columns["answer_accuracy"]), "answer_ece": curves["answers"].error}
        return ProbeSummary(metrics, columns, curves=curves)

    def _compare(self, record: Record, first: dict[str, Record], last: dict[str, Record]) -> None:
        id = record["id"]
        if id not in first or id not in last:
            raise ValueError(f"probe {self.name!r}: sample {id} was not there at the start; keep its source as it was")
        for name in self.followed:
            if name in record:
                record[f"{name}_since_start"] = record[name] - first[id][name]
                record[f"{name}_since_last"] = record[name] - last[id][name]


def preference_quantities(record: Record, preference: Preference) -> dict[str, float]:
    """Implied reward margin, preference, vulnerable or not, and cooling weight of one pair.

    Args:
        record: `chosen_since_start`, `rejected_since_start`, `rejected` (nats per token) and the texts' `_tokens`.
        preference: the constants; without a floor there is no cooling weight.
    """
    chosen, rejected = (record[f"{text}_since_start"] * record[f"{text}_tokens"] for text in ("chosen", "rejected"))
    margin = preference.beta * (chosen - rejected)
    a = _sigmoid(margin)
    found = {"reward_margin": margin, "preference": a, "vulnerable": float(VULNERABLE[0] <= a <= VULNERABLE[1])}
    if preference.ell_floor is not None:
        found["cooling_weight"] = _sigmoid((record["rejected"] - preference.ell_floor) / preference.tau)
    return found


def has_gold(sample: Sample) -> bool:
    """Whether an answer to the sample can be graded."""
    return sample.answer is not None or bool(sample.info.get("references"))


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if name in record]


def _reliability(confidences: Sequence[float], correct: Sequence[float]) -> Reliability:
    return reliability(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct, dtype=torch.float64))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
