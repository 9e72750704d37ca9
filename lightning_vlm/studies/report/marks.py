"""Small drawings inside tables: a mean, its interval and the seeds on a scale that all rows share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_vlm.studies.report.scale import Scale
from lightning_vlm.studies.report.shapes import attribute, classes, marker

WIDTH, HEIGHT = 260, 26
_START, _END, _MIDDLE = 18, 242, 13


def interval_mark(
    mean: float,
    low: float,
    high: float,
    scale: Scale,
    *,
    alt: str,
    look: int | None = None,
    seeds: Sequence[float] = (),
    zero: bool = False,
    strong: bool = True,
) -> str:
    """An SVG: dots of seeds, a bar for the interval, a marker for the mean.

    Args:
        mean, low, high: in the scale's unit; bounds NaN where there is no interval.
        scale: of all rows. alt: text alternative. look: of the arm; None draws a difference.
        seeds: one value each. zero: draw a line at 0. strong: a filled marker; else hollow and grey.
    """
    style = classes(look) if look is not None else "found" if strong else "vague"
    parts = [f'<svg class="mark {style}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{attribute(alt)}">']
    parts += [f'<path class="grid" d="M{_x(scale, tick):.1f} 0V{HEIGHT}"/>' for tick in scale.ticks]
    if zero and scale.low <= 0 <= scale.high:
        parts.append(f'<path class="zero" d="M{_x(scale, 0):.1f} 0V{HEIGHT}"/>')
    if math.isfinite(low):
        left, right = max(low, scale.low), min(high, scale.high)
        parts.append(f'<path class="bar" d="M{_x(scale, left):.1f} {_MIDDLE}H{_x(scale, right):.1f}"/>')
        parts.append(_end(_x(scale, left), -1, cut=low < scale.low))
        parts.append(_end(_x(scale, right), 1, cut=high > scale.high))
    parts += [f'<circle class="seed" cx="{_x(scale, value):.1f}" cy="{_MIDDLE}" r="3"/>' for value in seeds]
    if math.isfinite(mean):
        parts.append(marker(look or 0, _x(scale, mean), _MIDDLE, hollow=not strong, size=1.35))
    return "".join(parts) + "</svg>"


def axis_mark(scale: Scale) -> str:
    """The scale's ticks in words, for the last row; hidden from readers of text, who have the numbers."""
    parts = [f'<svg class="mark" viewBox="0 0 {WIDTH} 20" aria-hidden="true">']
    zero = scale.ticks.index(0.0) if 0.0 in scale.ticks else 0
    for number, tick in enumerate(scale.ticks):
        x = f"{_x(scale, tick):.1f}"
        parts.append(f'<path class="axis" d="M{x} 0v4"/>')
        if (number - zero) % _apart(scale) == 0:
            parts.append(f'<text class="tick" x="{x}" y="17" text-anchor="middle">{scale.text(tick)}</text>')
    return "".join(parts) + "</svg>"


def _apart(scale: Scale) -> int:
    """Every which tick has room for its text."""
    if len(scale.ticks) < 2:
        return 1
    room = _x(scale, scale.ticks[1]) - _x(scale, scale.ticks[0])
    return math.ceil((8.2 * max(len(scale.text(tick)) for tick in scale.ticks) + 6) / room)


def _x(scale: Scale, value: float) -> float:
    return scale.at(value, _START, _END)


def _end(x: float, way: int, *, cut: bool) -> str:
    """The end of a bar: a stroke, or an arrow where the interval goes on outside the scale."""
    if cut:
        return f'<path class="bar" d="M{x + way * 2:.1f} {_MIDDLE - 5}l{way * 6} 5l{-way * 6} 5"/>'
    return f'<path class="bar" d="M{x:.1f} {_MIDDLE - 5}v10"/>'
