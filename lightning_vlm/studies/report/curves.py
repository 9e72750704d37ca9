"""The charts of a study: learning curves, entropy, probes, pass@k before and after RL; one per group of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.studies.report.arms import SEED, Arms, group_title
from lightning_vlm.studies.report.charts import Line, line_chart
from lightning_vlm.studies.report.scale import scale_of
from lightning_vlm.studies.report.series import Series, logged, over_seeds, pass_curve, probed
from lightning_vlm.studies.report.shapes import swatch
from lightning_vlm.studies.report.text import listed, number, plural, with_interval

if TYPE_CHECKING:
    from lightning_vlm.studies.results import Results, StageRow

BEFORE_AND_AFTER = "pass@k before and after RL"
NAMED = 4  # unfinished runs that are named one by one
ROWS = 40  # of a chart's data table; more are thinned
DONE = "done"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with everything that says the same in text.

    Attributes:
        title: of the chart. legend: (swatch, name). svg: the drawing; its text alternative is in it.
        note: one more line, or nothing. heads, rows: the data table. thinned: rows that it leaves out.
    """

    title: str
    note: str
    svg: str
    legend: list[tuple[str, str]]
    heads: list[str]
    rows: list[list[str]]
    thinned: int


@dataclass(kw_only=True)
class Figure:
    """The charts of one quantity.

    Attributes:
        ident: unique in the page. title, about: for readers. charts: one per group, or one per arm.
        missing: what could not be drawn, and why. data: series by arm, for the JSON.
    """

    ident: str
    title: str
    about: str
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)


Reader = Callable[[Path], Mapping[float, float]]


def curve_figure(results: Results, arms: Arms, item: Mapping[str, Any], ident: str) -> Figure:
    """A metric of a training stage over its steps.

    Args:
        item: of the study's `report: curves:`, `{stage, metric, title}`. ident: of the figure.
    """
    metric = str(item["metric"])
    title = item.get("title") or f"{metric}, stage {item['stage']}"
    return _over_steps(results, arms, item, ident, title, metric, lambda folder: logged(folder, metric))


def probe_figure(results: Results, arms: Arms, item: Mapping[str, Any], ident: str) -> Figure:
    """A quantity of a probe over steps; `item` of `report: probes:`, `{stage, probe, metric, title}`."""
    metric, probe = str(item["metric"]), str(item.get("probe", "probe"))
    title = item.get("title") or f"{metric} of {probe}, stage {item['stage']}"
    return _over_steps(results, arms, item, ident, title, metric, lambda folder: probed(folder, probe, metric))


def _over_steps(
    results: Results, arms: Arms, item: Mapping[str, Any], ident: str, title: str, metric: str, read: Reader
) -> Figure:
    about = f"{metric} over optimizer steps, stage {item['stage']}" if item.get("title") else ""
    figure = Figure(ident=ident, title=str(title), about=about)
    series = _series(results, arms, str(item["stage"]), read, figure)
    for group, members in _grouped(arms, series):
        lines = [Line(series=s, look=arms.look(s.label)) for s in members]
        names = {s.label: arms.short(s.label) for s in members}
        _draw(figure, lines, names, list(series.values()), group, metric)
    return figure


def finished(results: Results, stage: str, missing: list[str]) -> list[StageRow]:
    """The finished runs of a stage; the others are named in `missing`, many of them by their number."""
    rows = list(results.runs(stage))
    if not rows:
        missing.append(f"the study has no stage '{stage}'")
    lost: dict[str, list[str]] = {}
    for row in rows:
        if row.state != DONE:
            lost.setdefault(row.state, []).append(row.name)
    for state, names in lost.items():
        what = listed(names) if len(names) <= NAMED else f"{len(names)} of {len(rows)} runs of {stage}"
        missing.append(f"{what}: {state}")
    return [row for row in rows if row.state == DONE]


def _series(results: Results, arms: Arms, stage: str, read: Reader, figure: Figure) -> dict[str, Series]:
    """Label → series of a stage, in the study's order."""
    runs: dict[str, dict[int | None, Mapping[float, float]]] = {}
    for row in finished(results, stage, figure.missing):
        try:
            runs.setdefault(row.label, {})[row.seed] = read(row.folder)
        except (OSError, ValueError) as err:
            figure.missing.append(f"{row.name}: {err}")
    found = {}
    for label in arms.ordered(label for label in runs if runs[label]):
        try:
            found[label] = over_seeds(label, runs[label])
        except ValueError as err:
            figure.missing.append(str(err))
    figure.data += [_plain(stage, series) for series in found.values()]
    return found


def _plain(stage: str, series: Series) -> dict[str, Any]:
    return {
        "stage": stage,
        "label": series.label,
        "x": series.x,
        "mean": series.mean,
        "low": series.low,
        "high": series.high,
        "seeds": [{"seed": seed, "x": xs, "y": ys} for seed, (xs, ys) in series.seeds.items()],
        "logged_values_per_point": series.pooled,
    }


def _grouped(arms: Arms, series: Mapping[str, Series]) -> list[tuple[str, list[Series]]]:
    """Title of each group that has series, with them; one untitled group where all belong to every group."""
    members = [
        (group_title(group), [s for label, s in series.items() if arms.belongs(label, group)]) for group in arms.groups
    ]
    members = [(title, inside) for title, inside in members if inside]
    if len(members) > 1 and all(inside == members[0][1] for _, inside in members):
        return [("", members[0][1])]
    return members


def _draw(
    figure: Figure,
    lines: Sequence[Line],
    names: Mapping[str, str],
    everything: Sequence[Series],
    title: str,
    y_label: str,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    powers: bool = False,
    note: str = "",
) -> None:
    """Add a chart; all charts of a figure share the vertical axis."""
    inner = [v for s in everything for v in [*s.mean, *(v for own in s.seeds.values() for v in own[1])]]
    outer = [v for s in everything for v in [*s.low, *s.high]]
    if inner and min(inner) >= 0:
        bounds = (max(0.0, bounds[0]), bounds[1])
    if inner and "accuracy" in y_label and max(inner) <= 1:
        bounds = (bounds[0], 1.0)
    x_label = "k, answers drawn per problem" if powers else "optimizer steps"
    alt = _alternative(f"{figure.title}{': ' if title else ''}{title}", lines, names, "k =" if powers else "step")
    svg = line_chart(
        lines,
        ident=f"{figure.ident}-{len(figure.charts) + 1}",
        alt=alt,
        y=scale_of(inner, outer, bounds=bounds, reach=0.4),
        x_label=x_label,
        y_label=y_label if len(y_label) <= 34 else y_label[:33] + "…",
        powers=powers,
    )
    heads, rows, thinned = _table(lines, names, "k" if powers else "step")
    legend = [(swatch(line.look, dashed=line.dashed), _named(line, names)) for line in lines]
    chart = Chart(title=title, note=note, svg=svg, legend=legend, heads=heads, rows=rows, thinned=thinned)
    figure.charts.append(chart)


def _named(line: Line, names: Mapping[str, str]) -> str:
    name = names[line.series.label]
    return name if line.dashed is None else f"{'before' if line.dashed else 'after'} RL"


def _alternative(title: str, lines: Sequence[Line], names: Mapping[str, str], at: str) -> str:
    """The chart in a sentence per line: first and last point with their intervals, and the seeds."""
    parts = []
    for line in lines:
        s = line.series
        ends = [f"{with_interval(s.mean[i], s.low[i], s.high[i])} at {at} {number(s.x[i])}" for i in (0, -1)]
        parts.append(f"{_named(line, names)} ({plural(len(s.seeds), 'seed')}): {', then '.join(dict.fromkeys(ends))}")
    return f"{title}. Mean [95 % interval]. {'; '.join(parts)}."


def _table(lines: Sequence[Line], names: Mapping[str, str], first: str) -> tuple[list[str], list[list[str]], int]:
    """Heads, rows and the number of rows left out; the first and the last row are always in it."""
    points = [
        {
            x: with_interval(m, low, high)
            for x, m, low, high in zip(line.series.x, line.series.mean, line.series.low, line.series.high, strict=True)
        }
        for line in lines
    ]
    steps = sorted({x for found in points for x in found})
    if len(steps) > ROWS:
        kept = sorted({round(i * (len(steps) - 1) / (ROWS - 1)) for i in range(ROWS)})
    else:
        kept = list(range(len(steps)))
    rows = [[number(steps[i]), *(found.get(steps[i], "") for found in points)] for i in kept]
    return [first, *(_named(line, names) for line in lines)], rows, len(steps) - len(kept)


def pass_figure(results: Results, arms: Arms, item: Mapping[str, Any], ident: str) -> Figure:
    """pass@k before and after RL, a chart per arm; `item` is `report: pass_at_k:`, `{before, after, benchmark}`."""
    stages = str(item["before"]), str(item["after"])
    benchmark = item.get("benchmark")
    about = f"benchmark {benchmark}, " if benchmark else ""
    about += f"before: stage {stages[0]}, after: stage {stages[1]}"
    figure = Figure(ident=ident, title=BEFORE_AND_AFTER, about=about)
    before, after = (
        _series(results, arms, stage, lambda folder: pass_curve(folder, benchmark), figure) for stage in stages
    )
    shown = {id(s): _percent(s) for s in [*before.values(), *after.values()]}
    for label, later in after.items():
        earlier = [s for start, s in before.items() if _precedes(arms.at(start), arms.at(label))][:1]
        if not earlier:
            figure.missing.append(f"no evaluation of stage {stages[0]} belongs to {label}")
        lines = [
            Line(series=shown[id(s)], look=arms.look(label), dashed=dashed)
            for s, dashed in [*((s, True) for s in earlier), (later, False)]
        ]
        names = {s.label: s.label for s in shown.values()}
        note = _change(lines) if earlier else ""
        _draw(
            figure, lines, names, list(shown.values()), label, "pass@k, %", bounds=(0.0, 100.0), powers=True, note=note
        )
    return figure


def _percent(series: Series) -> Series:
    times = {name: [100 * v for v in getattr(series, name)] for name in ("mean", "low", "high")}
    seeds = {seed: (xs, [100 * v for v in ys]) for seed, (xs, ys) in series.seeds.items()}
    return replace(series, seeds=seeds, **times)


def _change(lines: Sequence[Line]) -> str:
    """What RL did at the smallest and the largest k that both evaluations have."""
    before, after = (dict(zip(line.series.x, line.series.mean, strict=True)) for line in lines)
    shared = sorted(before.keys() & after.keys())
    ends = dict.fromkeys((shared[0], shared[-1]))
    return "; ".join(f"k = {k:.0f}: {before[k]:.1f} → {after[k]:.1f} % ({_signed(after[k] - before[k])})" for k in ends)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _precedes(start: Mapping[str, str], arm: Mapping[str, str]) -> bool:
    """Whether what is evaluated before is the start of an arm: they agree on all axes that both have."""
    return all(arm.get(axis, value) == value for axis, value in start.items() if axis != SEED)
