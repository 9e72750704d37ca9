"""What a grading rule is, and what the records it makes add up to.

A rule's name stands beside every number it makes. `grade` maps one output and its sample to fields of that example's
record; the same function serves as a reward. Evaluation that fails raises: no error becomes a 0.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics.exact import normalise_text
from lightning_vlm.metrics.pass_at_k import diversity, majority, pass_at_k, powers_of_two, vote_share
from lightning_vlm.metrics.statistics import bootstrap_interval

if TYPE_CHECKING:
    from lightning_vlm.metrics.captions import CaptionScores

Record = dict[str, Any]
Groups = dict[str, str | list[str]]


@dataclass(frozen=True)
class Summary:
    """What an evaluation's records add up to.

    Attributes:
        metrics: name → value; shares are fractions.
        columns: name → one value per problem, for each metric that is their mean.
        captions: the corpus scores behind the caption metrics, where there are any.
        breakdown: key (task, level, …) → value → {"accuracy", "n"}, n being the problems.
    """

    metrics: dict[str, float]
    columns: dict[str, Sequence[float]] = field(default_factory=dict)
    captions: CaptionScores | None = None
    breakdown: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % intervals by bootstrap over problems, of every metric that has one."""
        found = {name: bootstrap_interval(values, seed=seed) for name, values in self.columns.items()}
        return found if self.captions is None else found | self.captions.intervals(seed=seed)


def no_groups(sample: Sample) -> Groups:
    """For benchmarks that are not broken down."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How answers of one benchmark are graded.

    Attributes:
        name: `benchmark/variant`, to stand beside every number.
        grade: (output, sample) → `extraction` (None where nothing was extracted), `score`, and what else is of use.
        groups: sample → the values it is broken down by; a list where it belongs to several of a kind.
        tracked: keys of `groups` that are also metrics, `level/3`.
        vote: extraction → what answers are compared by in maj@k and diversity.
        summarise: (rule, records) → summary; may complete the records.
        names: metrics of `summarise` where finding them by a dry run would be dear.
        symbolic: whether grading waits for a worker process, so that several are worth having.
    """

    name: str
    grade: Callable[[str, Sample], Record]
    groups: Callable[[Sample], Groups] = no_groups
    tracked: tuple[str, ...] = ()
    vote: Callable[[str], str] = normalise_text
    summarise: Callable[[Rule, list[Record]], Summary] | None = None
    names: tuple[str, ...] = ()
    symbolic: bool = False

    @property
    def of_a_set(self) -> bool:
        """Whether answers are scored together, by `summarise`, so that `grade` says nothing of a single one."""
        return bool(self.names)

    def record(self, output: str, sample: Sample) -> Record:
        """All fields this rule adds to the record of one answer."""
        groups = self.groups(sample)
        return self.grade(output, sample) | ({"groups": groups} if groups else {})

    def summary(self, records: list[Record]) -> Summary:
        """What distinct records add up to.

        Args:
            records: `id`, `sample` (index of the draw), maybe `finished`, and the fields of `record`.

        Raises:
            ValueError: no records.
        """
        if not records:
            raise ValueError(f"{self.name}: there is nothing to score")
        return (self.summarise or mean_summary)(self, records)


def mean_summary(rule: Rule, records: list[Record]) -> Summary:
    """Means over problems of per-problem means over draws.

    `accuracy`, `n` (problems), the shares of outputs cut at the length limit (`unfinished`), without an extracted
    answer (`not_extracted`) and whose grading was cut off (`timed_out`). With several draws per problem: `pass_at_k`
    for k = 1, 2, 4, … up to the number of draws, `maj_at_n` (the majority's answer, ties by first occurrence),
    `diversity` (distinct answers / draws) and `vote_ece` (calibration of the majority's share of the votes, 15 bins).
    """
    problems = by_problem(records)
    columns = {"accuracy": [fmean(r["score"] for r in draws) for draws in problems]}
    columns |= shares(problems)
    metrics = {"n": float(len(problems))}
    if max(map(len, problems)) > 1:
        more, error = _several_draws(rule, problems)
        columns |= more
        metrics |= error
    breakdown = broken_down(problems)
    columns |= tracked_columns(rule, problems)
    return Summary({name: fmean(values) for name, values in columns.items()} | metrics, columns, None, breakdown)


def shares(problems: list[list[Record]]) -> dict[str, list[float]]:
    """Per problem, how many of its outputs were cut at the length limit, held no answer, could not be graded in time.

    The first only where the records tell, the last only where it happened.
    """
    happened = {"not_extracted": lambda record: record["extraction"] is None}
    if any("finished" in record for draws in problems for record in draws):
        happened["unfinished"] = lambda record: not record["finished"]
    if any("timed_out" in record for draws in problems for record in draws):
        happened["timed_out"] = lambda record: "timed_out" in record
    return {
        name: [fmean(float(test(record)) for record in draws) for draws in problems] for name, test in happened.items()
    }


def by_problem(records: Iterable[Record]) -> list[list[Record]]:
    """The draws of each problem, in order of first appearance."""
    problems: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        problems[record["id"]].append(record)
    return list(problems.values())


def _several_draws(rule: Rule, problems: list[list[Record]]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Columns over problems with several draws, and the calibration of their votes.

    Raises:
        ValueError: problems with different numbers of draws.
    """
    import torch

    from lightning_vlm.metrics.calibration import reliability

    sizes = sorted({len(draws) for draws in problems})
    if len(sizes) > 1:
        few = min(problems, key=len)[0]["id"]
        raise ValueError(
            f"problems have between {sizes[0]} and {sizes[-1]} answers (fewest: {few!r}); pass@k needs equally many"
        )
    n = sizes[0]
    answers = [[None if r["extraction"] is None else rule.vote(r["extraction"]) for r in draws] for draws in problems]
    winners = [majority(given) for given in answers]
    votes = [0.0 if winner is None else draws[winner]["score"] for draws, winner in zip(problems, winners, strict=True)]
    columns = {f"maj_at_{n}": votes, "diversity": [diversity(given) for given in answers]}
    if not all(r["score"] in (0, 1) for draws in problems for r in draws):
        return columns, {}
    right = [sum(r["score"] == 1 for r in draws) for draws in problems]
    columns |= {f"pass_at_{k}": [pass_at_k(n, c, k) for c in right] for k in powers_of_two(n)}
    confidence = torch.tensor([vote_share(given) for given in answers])
    return columns, {"vote_ece": reliability(confidence, torch.tensor(votes)).error}


def broken_down(problems: list[list[Record]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean score and number of problems, by every key and value of the records' groups."""
    table = {
        key: {value: {"accuracy": fmean(scores), "n": float(len(scores))} for value, scores in values.items()}
        for key, values in _grouped(problems).items()
    }
    return {key: dict(sorted(rows.items(), key=_place)) for key, rows in table.items()}


def _place(row: tuple[str, dict[str, float]]) -> tuple[float, float]:
    """Levels stand in their order, other values best first."""
    value, scores = row
    return (float(value), 0.0) if value.isdecimal() else (float("inf"), -scores["accuracy"])


def tracked_columns(rule: Rule, problems: list[list[Record]]) -> dict[str, list[float]]:
    """`key/value` → scores of its problems, for the keys that the rule tracks."""
    grouped = _grouped(problems)
    return {
        re.sub(r"[^\w./]+", " ", f"{key}/{value}"): scores  # what a logger accepts in a name
        for key in rule.tracked
        for value, scores in sorted(grouped.get(key, {}).items())
    }


def _grouped(problems: list[list[Record]]) -> dict[str, dict[str, list[float]]]:
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for draws in problems:
        score = fmean(r["score"] for r in draws)
        for key, values in draws[0].get("groups", {}).items():
            for value in [values] if isinstance(values, str) else values:
                table[key][value].append(score)
    return table
