"""A benchmark: samples, how they are asked, and the rule that grades the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from lightning_vlm.benchmarks.rule import Record, Rule, Summary
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.rollouts.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An evaluation by generation; register it with the data module.

    Attributes:
        name: names its metrics, `val/<name>/accuracy`.
        samples: what is asked; the gold answers stand in the samples.
        rule: grades an answer and sums up the records.
        prompt_id: which prompt was asked.
        sampling: how answers are drawn. n: answers per sample.
        every: optimizer steps between evaluations.
    """

    encoding: ClassVar[str] = "prompt"

    name: str
    samples: Sequence[Sample]
    rule: Rule
    prompt_id: str
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    every: int = 1

    def summary(self, records: list[Record]) -> Summary:
        """What the distinct records of an evaluation add up to; may complete them.

        Raises:
            ValueError: no records.
        """
        return self.rule.summary(records)

    @cached_property
    def metric_names(self) -> frozenset[str]:
        """Names of all metrics an evaluation logs, found by grading empty outputs.

        Raises:
            ValueError: a sample without a gold answer to grade against.
        """
        records = [
            {"id": sample.id, "sample": draw, "finished": True} | self.rule.record("", sample)
            for sample in self.samples
            for draw in range(self.n)
        ]
        return frozenset(self.rule.names or self.summary(records).metrics)

    def conditions(self) -> dict[str, Any]:
        """What its numbers depend on: rule, prompt, size, sampling."""
        return {
            "benchmark": self.name,
            "rule": self.rule.name,
            "prompt_id": self.prompt_id,
            "samples": len(self.samples),
            "n": self.n,
            "sampling": asdict(self.sampling),
        }


@dataclass(kw_only=True)
class BenchmarkSpec:
    r"""What a configuration says about a benchmark.

    Args:
        source: the samples; `source.limit` makes a smaller benchmark of it.
        rule: how answers are graded, for example `geometry3k/freeform` (last \boxed{}, equality by math-verify),
            `mathvista/rules`, `mathvision/released`, `mmvp/option`, `coco/ptb`, `world/captions`, `world/twins`,
            `answer/short`, `option` (the option's letter or text), `exact` (normalised text). None: the source's own.
        every: optimizer steps between evaluations.
        max_new_tokens: longest answer in tokens.
        temperature: 0 answers greedily, anything else draws.
        top_p: nucleus of a drawn answer.
        n: answers drawn per sample; with several, pass_at_k, maj_at_n and diversity are reported beside their mean.
    """

    source: SourceSpec
    rule: str | None = None
    every: int = 100
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1


# What grades a kind of source: the first by default, the others on demand; `exact` and `option` grade any questions.
_RULES_OF = {
    "world": ("world/exact", "world/captions"),
    "world-twins": ("world/twins",),
    "geometry3k": ("geometry3k/freeform", "geometry3k/math-verify", "geometry3k/mcq", "answer/short"),
    "mathvista": ("mathvista/rules",),
    "mathvision": ("mathvision/released", "answer/short"),
    "mmvp": ("mmvp/option",),
    "coco": ("coco/ptb", "coco/ptb-spice", "coco/python"),
    "qa": ("answer/short",),
}
_ANY = ("exact", "option")


def own_rule(specs: Mapping[str, SourceSpec]) -> str:
    """The rule that sources are graded by where none is named.

    Args:
        specs: named sources.

    Raises:
        ValueError: a source that no single-answer rule grades by default, or sources of different rules.
    """
    found = {}
    for name, spec in specs.items():
        rule = _default_rule(spec)
        if rule is None or RULES[rule].of_a_set:
            raise ValueError(
                f"no rule says by itself what an answer to {name!r}, of source kind {spec.kind!r}, is worth"
            )
        found[name] = rule
    if len(set(found.values())) != 1:
        raise ValueError(f"the sources are graded by different rules: {found}")
    return next(iter(found.values()))


def open_benchmark(spec: BenchmarkSpec, name: str) -> Benchmark:
    """The benchmark that a spec describes.

    Raises:
        ValueError: an unknown rule, a source that no rule grades, a rule that does not fit the source, several greedy
            answers per sample, Java missing for a rule that needs it, or what the source and `Sampling` raise.
    """
    source = spec.source
    own = _RULES_OF.get(source.kind)
    if own is None:
        raise ValueError(
            f"benchmark {name!r}: no rule grades source kind {source.kind!r}; these have one: {', '.join(_RULES_OF)}"
        )
    fitting = own if source.kind in ("world", "world-twins", "coco") else (*own, *_ANY)
    rule = spec.rule or _default_rule(source)
    if rule not in fitting:
        raise ValueError(
            f"benchmark {name!r}: rule {rule!r} does not grade source kind {source.kind!r}{one_of(rule, fitting)}"
        )
    if spec.n < 1:
        raise ValueError(f"benchmark {name!r}: n must be at least 1, got {spec.n}")
    sampling = Sampling(max_new_tokens=spec.max_new_tokens, temperature=spec.temperature, top_p=spec.top_p)
    if sampling.greedy and spec.n > 1:
        raise ValueError(f"benchmark {name!r}: {spec.n} greedy answers per sample are all the same; set temperature")
    if rule.startswith("coco/ptb"):
        from lightning_vlm.metrics.captions import require_java

        require_java()
    return Benchmark(
        name=name,
        samples=open_source(source, for_training=False),
        rule=RULES[rule],
        prompt_id=_prompt_id(source),
        sampling=sampling,
        n=spec.n,
        every=spec.every,
    )


def _default_rule(source: SourceSpec) -> str | None:
    if source.kind == "geometry3k" and source.prompt == "mcq":
        return "geometry3k/mcq"
    return _RULES_OF.get(source.kind, (None,))[0]


def _prompt_id(source: SourceSpec) -> str:
    """`geometry3k/freeform`; an instruction of one's own is named by its hash."""
    parts = [source.kind, source.prompt or "default"]
    if source.instruction is not None:
        parts.append(hashlib.sha256(source.instruction.encode()).hexdigest()[:8])
    return "/".join(parts)
