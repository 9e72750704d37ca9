"""An endpoint for readers: the answer in a sentence, arms with their intervals, pairs with their verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_vlm.studies.report.arms import Arms, group_title
from lightning_vlm.studies.report.marks import axis_mark, interval_mark
from lightning_vlm.studies.report.scale import Scale, scale_of
from lightning_vlm.studies.report.text import NOTHING, listed, plural
from lightning_vlm.studies.wording import p_value, required, short

if TYPE_CHECKING:
    from lightning_vlm.studies.comparison import Arm, Comparison, Pair
    from lightning_vlm.studies.results import Measured

WIDE = 1.5  # ranges of the means that intervals may add to either side of a scale
FEW = 10  # pairs of a group that are all shown
DIRECTIONS = {"better": "higher is better", "worse": "lower is better", "neither": "neither direction is better"}


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """An arm in the table of an endpoint; texts, and its drawing."""

    label: str
    name: str
    seeds: int
    mean: str
    interval: str
    spread: str
    over: str
    look: int
    mark: str


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """A pair of arms; `short` is the verdict in words, `sentence` the whole of it.

    `main` are those that are shown at once: the ones told apart, those of the best arm, all if there are few.
    """

    a: str
    b: str
    verdict: str
    short: str
    sentence: str
    difference: str
    interval: str
    p: str
    test: str
    needed: str
    mark: str
    main: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    """One value of the `within` axes: the answer there, its arms, its pairs."""

    title: str
    answer: str
    arms: list[ArmRow]
    pairs: list[PairRow]


@dataclass(frozen=True, kw_only=True)
class EndpointView:
    """An endpoint as shown; with `missing` there is nothing but its name."""

    name: str
    missing: str
    about: str
    of_scores: str = ""
    of_differences: str = ""
    groups: tuple[Group, ...] = ()
    arm_axis: str = ""
    pair_axis: str = ""
    notes: tuple[str, ...] = ()


def endpoint_view(measured: Measured, arms: Arms) -> EndpointView:
    """What is shown of an endpoint.

    Args:
        measured: the endpoint and its comparison, or why there is none. arms: of the study.
    """
    endpoint, result = measured.endpoint, measured.comparison
    told, absent = _about(measured), _absent(measured, arms)
    if result is None:
        missing = measured.missing or "it was not measured"
        return EndpointView(name=endpoint.name, missing=missing, about=told)
    factor = result.unit.scale
    values = [float(v) * factor for arm in result.arms for v in [arm.mean, *_seed_means(arm)]]
    arm_scale = scale_of(values, [b * factor for arm in result.arms for b in (arm.low, arm.high)], count=4, reach=WIDE)
    shown = [pair for pair in result.pairs if _is_shown(pair)]
    drawn = [(-1 if pair.greater == pair.b else 1) * factor * v for pair in shown for v in pair.result[:3]]
    pair_scale = scale_of([0.0, *drawn[::3]], drawn, count=4, reach=WIDE)
    groups = [_group(g, measured, arms, shown, arm_scale, pair_scale) for g in arms.groups]
    # An arm that is of no group is still shown.
    placed = {row.label for group in groups for row in group.arms}
    left = [arm.name for arm in result.arms if arm.name not in placed]
    if left:
        rest = replace(groups[0], title="other", answer="", pairs=[], arms=_arm_rows(left, result, arms, arm_scale))
        groups.append(rest)
    return EndpointView(
        name=endpoint.name,
        missing=measured.missing or absent,
        about=told,
        of_scores=result.unit.of_scores,
        of_differences=result.unit.of_differences,
        groups=tuple(group for group in groups if group.arms),
        arm_axis=axis_mark(arm_scale),
        pair_axis=axis_mark(pair_scale),
        notes=tuple(result.notes),
    )


def _about(measured: Measured) -> str:
    """Where the numbers come from: stage, benchmark or curve or file, direction, problems."""
    endpoint, result = measured.endpoint, measured.comparison
    source = [f"stage {endpoint.stage}"]
    if endpoint.curve:
        source.append(f"{endpoint.curve} at its {endpoint.at}")
    elif endpoint.file:
        source.append(f"{endpoint.key} of {endpoint.file}")
    else:
        source += [f"benchmark {endpoint.benchmark}"] if endpoint.benchmark else []
        source.append(f"metric {endpoint.metric}")
    if endpoint.minus:
        source.append(f"minus the same at stage {endpoint.minus}")
    if result is not None:
        source += [plural(result.problems, "problem")] if result.problems else []
        source += [f"rule {', '.join(result.rules)}"] if result.rules else []
    return ", ".join([*source, DIRECTIONS[endpoint.higher]])


def _absent(measured: Measured, arms: Arms) -> str:
    """The study's arms of which there is no number."""
    if measured.comparison is None:
        return ""
    there = [arms.at(arm.name).items() for arm in measured.comparison.arms]
    names = {arm.name for arm in measured.comparison.arms}
    lost = [
        label for label in arms.labels if label not in names and not any(p <= arms.at(label).items() for p in there)
    ]
    return f"no number of {listed(lost)}" if lost else ""


def _group(
    group: Mapping[str, str],
    measured: Measured,
    arms: Arms,
    pairs: Sequence[Pair],
    arm_scale: Scale,
    pair_scale: Scale,
) -> Group:
    result = measured.comparison
    assert result is not None
    labels = arms.ordered(arm.name for arm in result.arms if arms.belongs(arm.name, group))
    inside = [pair for pair in pairs if pair.a in labels and pair.b in labels]
    best = _best(labels, measured) if labels else ""
    main = [len(inside) <= FEW or pair.found or best in (pair.a, pair.b) for pair in inside]
    return Group(
        title=group_title(group),
        answer=_answer(labels, inside, measured, arms),
        arms=_arm_rows(labels, result, arms, arm_scale),
        pairs=[_pair_row(p, result, arms, pair_scale, m) for p, m in zip(inside, main, strict=True)],
    )


def _is_shown(pair: Pair) -> bool:
    """Pairs that were not to be tested have neither a test nor a reason."""
    return bool(pair.test or pair.reason or pair.sentence)


def _seed_means(arm: Arm) -> list[float]:
    return [] if arm.single else [float(value) for value in arm.seed_means]


def _arm_rows(labels: Sequence[str], result: Comparison, arms: Arms, scale: Scale) -> list[ArmRow]:
    return [_arm_row(result.arm(label), result, arms, scale) for label in labels]


def _arm_row(arm: Arm, result: Comparison, arms: Arms, scale: Scale) -> ArmRow:
    unit, factor = result.unit, result.unit.scale
    mean, *_ = unit.numbers(arm.mean, arm.low, arm.high)
    interval = unit.interval(arm.low, arm.high, arm.mean)
    spread = NOTHING if math.isnan(arm.seed_sd) else unit.numbers(arm.seed_sd)[0]
    means = _seed_means(arm)
    alt = f"{arm.name}: {mean}{unit.of_scores.replace(', ', ' ')}, 95 % interval {interval}"
    if means:
        alt += f"; seeds {', '.join(unit.numbers(*means))}"
    return ArmRow(
        label=arm.name,
        name=arms.short(arm.name),
        seeds=len(arm.runs),
        mean=mean,
        interval=interval,
        spread=spread,
        over=(arm.interval_over or NOTHING) if math.isfinite(arm.low) else NOTHING,
        look=arms.look(arm.name),
        mark=interval_mark(
            arm.mean * factor,
            arm.low * factor,
            arm.high * factor,
            scale,
            alt=alt,
            look=arms.look(arm.name),
            seeds=[value * factor for value in means],
        ),
    )


def _pair_row(pair: Pair, result: Comparison, arms: Arms, scale: Scale, main: bool) -> PairRow:
    unit, factor = result.unit, result.unit.scale
    # As the words have it: what was found is drawn as greater minus lesser.
    turned = pair.greater == pair.b
    a, b = (pair.b, pair.a) if turned else (pair.a, pair.b)
    diff, low, high = (-pair.result.diff, -pair.result.high, -pair.result.low) if turned else pair.result[:3]
    difference, *_ = unit.numbers(diff, low, high)
    interval = unit.interval(low, high, diff)
    return PairRow(
        a=arms.short(a),
        b=arms.short(b),
        verdict=pair.verdict,
        short=short_verdict(pair, result, arms),
        sentence=pair.sentence,
        difference=difference,
        interval=interval,
        p=p_value(pair.p_adjusted, result.alpha),
        test=pair.test or "none",
        needed=required(pair) or NOTHING,
        main=main,
        mark=interval_mark(
            diff * factor,
            low * factor,
            high * factor,
            scale,
            alt=f"{arms.short(a)} − {arms.short(b)}: {difference}{unit.word} {interval}",
            zero=True,
            strong=pair.found,
        ),
    )


def short_verdict(pair: Pair, result: Comparison, arms: Arms) -> str:
    """The verdict in a few words; inside a group arms go by their short names."""
    a, b = arms.short(pair.a), arms.short(pair.b)
    if (a, b) == (pair.a, pair.b):
        return pair.short() or pair.sentence
    first, second = replace(result.arm(pair.a), name=a), replace(result.arm(pair.b), name=b)
    return short(replace(pair, a=a, b=b), first, second, result)


def _answer(labels: Sequence[str], pairs: Sequence[Pair], measured: Measured, arms: Arms) -> str:
    """What the arms of a group show, in a few sentences that claim no more than their tests."""
    result, higher = measured.comparison, measured.endpoint.higher
    assert result is not None
    if len(labels) < 2:
        return ""
    if not pairs:
        return "No pair of these arms was compared."
    told = [pair for pair in pairs if pair.found]
    if higher == "neither":
        return _counted(told, pairs)
    best = _best(labels, measured)
    shown, *_ = result.unit.numbers(result.arm(best).mean)
    percent = " %" if result.unit.percent else result.unit.word
    parts = [
        f"{_quoted(arms.short(best))} has the {'lowest' if higher == 'worse' else 'highest'} mean, {shown}{percent}."
    ]
    rivals: dict[str, list[str]] = {"beaten": [], "open": [], "none": []}
    for pair in pairs:
        if best in (pair.a, pair.b):
            rival = arms.short(pair.b if pair.a == best else pair.a)
            kind = "beaten" if pair.better == best else "none" if pair.verdict == "no verdict" else "open"
            rivals[kind].append(rival)
    others = len(labels) - 1
    for kind, text in (("beaten", "It is better than"), ("open", "It is not distinguishable from")):
        if rivals[kind]:
            parts.append(f"{text} {_named(rivals[kind], others)}.")
    if rivals["none"]:
        parts.append(f"There is no verdict on it and {_named(rivals['none'], others)}.")
    compared = {name for pair in pairs for name in (pair.a, pair.b)}
    if best not in compared:
        parts.append("It was compared with none of the others.")
    if not told:
        parts.append("No arm is shown to be better than another.")
    if any(pair.about == "checkpoints" for pair in pairs):
        parts.append("This is of checkpoints with one seed, not of recipes.")
    return " ".join(parts)


def _named(names: Sequence[str], others: int) -> str:
    return f"all {others} others" if len(names) == others > 2 else listed([_quoted(name) for name in names])


def _quoted(name: str) -> str:
    """Arms may be called `none`, or have commas."""
    return f"“{name}”"


def _best(labels: Sequence[str], measured: Measured) -> str:
    """The arm with the best mean, the first of equals; the highest where no direction is better."""
    assert measured.comparison is not None
    means = {arm.name: arm.mean for arm in measured.comparison.arms}
    return (min if measured.endpoint.higher == "worse" else max)(labels, key=lambda label: means[label])


def _counted(told: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    if all(pair.verdict == "no verdict" for pair in pairs):
        return "There is no verdict on any pair of these arms."
    if not told:
        return "No two of these arms are told apart."
    return f"{len(told)} of {plural(len(pairs), 'pair')} {'is' if len(pairs) == 1 else 'are'} told apart."
