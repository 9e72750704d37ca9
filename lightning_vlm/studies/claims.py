"""Claims of others, held against what a study measured: holds, contradicted, or not shown, with the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from lightning_vlm.config.tree import nearest
from lightning_vlm.studies.compare import difference
from lightning_vlm.studies.comparison import Comparison, Pair
from lightning_vlm.studies.endpoints import Claim
from lightning_vlm.studies.wording import amount_of, p_said

Labels = Mapping[str, Mapping[str, str]]  # arm → axis → value
JOINED = " · "  # between the values in an arm's label


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a study says of a claim.

    Attributes:
        claim: the claim. group: axis → value inside which it was judged; empty where a study has no such axes.
        verdict: `holds`, `contradicted`, or `not shown`, which is neither. sentence: why, with the numbers.
    """

    claim: Claim
    group: dict[str, str] = field(default_factory=dict)
    verdict: Literal["holds", "contradicted", "not shown"]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain facts."""
        claim = self.claim
        return {
            "says": claim.says,
            "source": claim.source,
            "endpoint": claim.endpoint,
            "group": self.group,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def judge(
    claim: Claim, comparison: Comparison, labels: Labels, groups: Sequence[Mapping[str, str]] = ({},)
) -> list[Judged]:
    """Hold a claim against its endpoint, once in each group of arms.

    `greater` holds if the pair's difference has that sign and its p, after Holm over the comparison's pairs, is at most
    alpha; it is contradicted if the sign is the other one. `within` holds if the 95 % interval of every difference
    lies inside ± the bound, which takes as much certainty as an equivalence test at level 2.5 %; it is contradicted if
    one lies wholly outside.

    Args:
        claim: of the study. comparison: of the claim's endpoint.
        labels: arm → its value on each axis it depends on, for all arms of the endpoint, measured or not. An arm
            without a group's axis belongs to every group.
        groups: values of the axes inside which arms are compared. A claim names an arm by its label, or by what is
            left of it without these axes.

    Returns:
        One verdict per group that the claim is not restricted from.

    Raises:
        ValueError: as `check_claim`.
    """
    found = []
    for group, arms in check_claim(claim, labels, groups):
        measured = {arm.name for arm in comparison.arms}
        missing = [label for label in arms if label not in measured]
        judged = _greater if claim.within is None else _within
        verdict, sentence = judged(claim, comparison, arms, missing)
        found.append(Judged(claim=claim, group=group, verdict=verdict, sentence=sentence))
    return found


def check_claim(
    claim: Claim, labels: Labels, groups: Sequence[Mapping[str, str]] = ({},)
) -> list[tuple[dict[str, str], list[str]]]:
    """The arms that a claim speaks of, in each group: `greater` and `than`, or all that are to lie near each other.

    Args:
        claim: of the study. labels, groups: as `judge`.

    Raises:
        ValueError: an arm, axis or value that the claim names and the endpoint does not have; fewer than two arms.
    """
    of = f"claim '{claim.says}'"
    known: dict[str, set[str]] = {}
    for at in (*labels.values(), *groups):
        for axis, value in at.items():
            known.setdefault(axis, set()).add(str(value))
    for axis, value in claim.where.items():
        if axis not in known:
            raise ValueError(f"{of}: endpoint '{claim.endpoint}' has no axis '{axis}'{nearest(axis, known)}")
        if value not in known[axis]:
            raise ValueError(f"{of}: axis '{axis}' has no value '{value}'{nearest(value, known[axis])}")
    found = []
    for group in groups:
        if any(axis in group and str(group[axis]) != value for axis, value in claim.where.items()):
            continue
        inside = claim.where | {axis: str(value) for axis, value in group.items()}
        arms = [
            label
            for label, at in labels.items()
            if all(str(at.get(axis, value)) == value for axis, value in inside.items())
        ]
        named = [claim.greater, claim.than] if claim.within is None else claim.among
        if named:
            arms = [_arm_named(str(name), arms, labels, inside, of) for name in named]
        if len(arms) < 2:
            raise ValueError(f"{of} needs two arms{_in(group)}, there is {', '.join(arms) or 'none'}")
        found.append((dict(group), arms))
    if not found:
        raise ValueError(f"{of} is about none of the groups that are compared{_in(claim.where)}")
    return found


def _arm_named(name: str, arms: Sequence[str], labels: Labels, inside: Mapping[str, str], of: str) -> str:
    short = {label: JOINED.join(str(v) for axis, v in labels[label].items() if axis not in inside) for label in arms}
    if name in arms:
        return name
    fits = [label for label in arms if short[label] == name]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(f"{of}: '{name}' may be {' or '.join(fits)}; write the whole name")
    raise ValueError(f"{of} names no arm '{name}'{_in(inside)}{nearest(name, [*arms, *filter(None, short.values())])}")


def _in(group: Mapping[str, str]) -> str:
    return f" at {', '.join(f'{axis} = {value}' for axis, value in group.items())}" if group else ""


def _greater(claim: Claim, result: Comparison, arms: list[str], missing: list[str]) -> tuple[Any, str]:
    if missing:
        return "not shown", f"{' and '.join(missing)} {_is(missing)} not measured."
    greater, than = arms
    for pair in result.pairs:
        if {pair.a, pair.b} == {greater, than}:
            text = pair.short()
            if pair.found:
                over = f" (Holm over {result.tested} pairs)" if result.tested > 1 else ""
                text += f", {p_said(pair, result)}{over}"
            verdict = "not shown" if not pair.found else "holds" if pair.greater == greater else "contradicted"
            return verdict, text + "."
    return "not shown", f"{greater} and {than} are not among the pairs that were compared."


def _within(claim: Claim, result: Comparison, arms: list[str], missing: list[str]) -> tuple[Any, str]:
    measured = [arm for arm in arms if arm not in missing]
    pairs = [difference(result, a, b) for a, b in combinations(measured, 2)]
    bound, unit = float(claim.within or 0), result.unit
    said = f"±{bound:g}{unit.word}"
    known = [pair for pair in pairs if not math.isnan(pair.result.low)]
    outside = [pair for pair in known if _reach(pair, inner=True) * unit.scale > bound]
    over = [pair for pair in known if _reach(pair) * unit.scale > bound]
    if outside:
        worst = max(outside, key=lambda pair: _reach(pair, inner=True))
        return "contradicted", f"{_difference(worst, result)} lies wholly outside {said}{_count(outside, pairs)}."
    if missing:
        return "not shown", f"{' and '.join(missing)} {_is(missing)} not measured."
    if len(known) < len(pairs):
        unknown = next(pair for pair in pairs if math.isnan(pair.result.low))
        return "not shown", f"no interval of {unknown.a} − {unknown.b}: {unknown.reason}."
    if over:
        worst = max(over, key=_reach)
        return "not shown", f"{_difference(worst, result)} reaches beyond {said}{_count(over, pairs)}."
    widest = max(known, key=_reach)
    if len(known) == 1:
        return "holds", f"{_difference(widest, result)} lies inside {said}."
    return "holds", f"all {len(known)} differences lie inside {said}; the farthest: {_difference(widest, result)}."


def _reach(pair: Pair, *, inner: bool = False) -> float:
    """How far from 0 the interval reaches, or (`inner`) begins; negative where it has 0 inside."""
    low, high = pair.result.low, pair.result.high
    return max(low, -high) if inner else max(-low, high)


def _difference(pair: Pair, result: Comparison) -> str:
    return f"{pair.a} − {pair.b} = {amount_of(pair, result.unit)}"


def _count(some: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    return f" ({len(some)} of {len(pairs)} pairs)" if len(pairs) > 1 else ""


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
