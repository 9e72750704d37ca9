"""A benchmark: samples, how they are asked, and how the answers are graded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.rollouts.sampling import Sampling

from .rules import (
    Record,
    Score,
    mean_results,
    score_exact,
    score_freeform,
    score_letter,
    score_world,
    world_results,
)

Kind = Literal["world", "geometry3k", "exact", "letter"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An evaluation by generation; register it with the data module.

    Attributes:
        name: names its metrics, `val/<name>/accuracy`.
        samples: what is asked; the gold answers stand in the samples.
        score: (output, sample) → fields of that example's record, among them `extraction` and `score` in [0, 1].
        summarise: records → metrics.
        rule: name of the grading rule, to stand beside every number.
        prompt_id: which prompt was asked.
        sampling: how answers are drawn. n: answers per sample.
        every: optimizer steps between evaluations.
    """

    encoding: ClassVar[str] = "prompt"

    name: str
    samples: Sequence[Sample]
    score: Score
    summarise: Callable[[Sequence[Record]], dict[str, float]]
    rule: str
    prompt_id: str
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    every: int = 1

    def results(self, records: Sequence[Record]) -> dict[str, float]:
        """Metrics of an evaluation; an example that came twice (a sampler filling up its last batch) counts once.

        Args:
            records: `id`, `sample` (index of the draw), `finished` and the fields of `score`.

        Raises:
            ValueError: no records, or an example graded twice with different outcomes.
        """
        distinct: dict[tuple[str, int], Record] = {}
        for record in records:
            key = (record["id"], record["sample"])
            if distinct.setdefault(key, record)["score"] != record["score"]:
                raise ValueError(
                    f"benchmark {self.name!r} has two different scores for sample {key[0]!r}, draw {key[1]}: are there "
                    "two samples of that id? Give mixed sources different labels"
                )
        if not distinct:
            raise ValueError(f"benchmark {self.name!r} was evaluated without any records")
        return self.summarise(list(distinct.values()))

    def conditions(self) -> dict[str, Any]:
        """What its numbers depend on: rule, prompt, size, sampling."""
        return {
            "benchmark": self.name,
            "rule": self.rule,
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
        kind: grading rule. `world`: marked or direct answer, exact, captions apart. `geometry3k`: last \boxed{},
            equality by math-verify. `letter`: the option's letter. `exact`: normalised text. None takes the source's
            own.
        every: optimizer steps between evaluations.
        max_new_tokens: longest answer in tokens.
        temperature: 0 answers greedily, anything else draws.
        top_p: nucleus of a drawn answer.
        n: answers drawn per sample, averaged.
    """

    source: SourceSpec
    kind: Kind | None = None
    every: int = 100
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1


# What a source is graded by if nothing else is said.
_OWN_KIND: dict[str, Kind] = {"world": "world", "geometry3k": "geometry3k", "mmvp": "letter", "qa": "exact"}


def open_benchmark(spec: BenchmarkSpec, name: str) -> Benchmark:
    """The benchmark that a spec describes.

    Raises:
        ValueError: an unknown kind, a source without a rule of its own, a rule that does not fit the source, several
            greedy answers per sample, or what the source and `Sampling` raise.
    """
    kind = spec.kind or _OWN_KIND.get(spec.source.kind)
    if kind is None:
        raise ValueError(
            f"benchmark {name!r}: source kind {spec.source.kind!r} has no grading rule of its own; "
            f"set `kind` to one of {', '.join(get_args(Kind))}"
        )
    if kind not in get_args(Kind):
        raise ValueError(f"benchmark {name!r}: unknown kind {kind!r}; choose one of {', '.join(get_args(Kind))}")
    if (kind == "world") != (spec.source.kind == "world"):
        raise ValueError(f"benchmark {name!r}: kind {kind!r} does not grade source kind {spec.source.kind!r}")
    if spec.n < 1:
        raise ValueError(f"benchmark {name!r}: n must be at least 1, got {spec.n}")
    sampling = Sampling(max_new_tokens=spec.max_new_tokens, temperature=spec.temperature, top_p=spec.top_p)
    if sampling.greedy and spec.n > 1:
        raise ValueError(f"benchmark {name!r}: {spec.n} greedy answers per sample are all the same; set temperature")
    score, rule = {
        "world": (score_world, "world/exact"),
        "geometry3k": (score_freeform, "geometry3k/freeform"),
        "letter": (score_letter, "letter"),
        "exact": (score_exact, "exact"),
    }[kind]
    if kind == "geometry3k" and spec.source.prompt == "mcq":
        score, rule = score_letter, "geometry3k/mcq"
    return Benchmark(
        name=name,
        samples=open_source(spec.source, for_training=False),
        score=score,
        summarise=world_results if kind == "world" else mean_results,
        rule=rule,
        prompt_id=_prompt_id(spec.source),
        sampling=sampling,
        n=spec.n,
        every=spec.every,
    )


def _prompt_id(source: SourceSpec) -> str:
    """`geometry3k/freeform`; an instruction of one's own is named by its hash."""
    parts = [source.kind, source.prompt or "default"]
    if source.instruction is not None:
        parts.append(hashlib.sha256(source.instruction.encode()).hexdigest()[:8])
    return "/".join(parts)
