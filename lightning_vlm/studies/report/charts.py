"""Line charts as SVG: a mean with its band over seeds, thin lines of single seeds, every arm with its own marker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_vlm.studies.report.scale import Scale, step_scale
from lightning_vlm.studies.report.series import Series
from lightning_vlm.studies.report.shapes import attribute, classes, dash, marker

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 506, 14, 254  # of the plot; left and right give way to long ticks
_LETTER = 9.4  # width of a digit where a narrow page makes ticks larger
_MARKS = 6  # markers on a line with more points than twice this


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series as drawn.

    Attributes:
        series: the numbers. look: colour, dashes and marker. dashed: overrides the dashes where an arm is drawn twice;
            its markers are hollow then.
    """

    series: Series
    look: int
    dashed: bool | None = None


def line_chart(
    lines: Sequence[Line], *, ident: str, alt: str, y: Scale, x_label: str, y_label: str, powers: bool = False
) -> str:
    """An SVG of lines over steps, or over k.

    Args:
        lines: at least one. ident: unique in the page. alt: the text alternative, with the numbers.
        y: the vertical axis. x_label, y_label: plain text. powers: the horizontal axis is of powers of two.
    """
    x = _Horizontal(lines, powers, left=max(LEFT, 34 + _LETTER * max((len(y.text(t)) for t in y.ticks), default=0)))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{attribute(alt)}">',
        f'<defs><clipPath id="{ident}-clip"><rect x="{x.left:.1f}" y="{TOP}" width="{x.right - x.left:.1f}" '
        f'height="{BOTTOM - TOP}"/></clipPath></defs>',
        *_axes(x, y, x_label, y_label),
        f'<g clip-path="url(#{ident}-clip)">',
        *(_band(line, x, y) for line in lines),
        *(_singles(line, x, y) for line in lines if not line.series.single),
        *(_mean(line, x, y) for line in lines),
        "</g>",
        *(_markers(line, number, len(lines), x, y) for number, line in enumerate(lines)),
        "</svg>",
    ]
    return "".join(parts)


class _Horizontal:
    """The horizontal axis of all lines, from `left` to `right`."""

    def __init__(self, lines: Sequence[Line], powers: bool, left: float) -> None:
        values = [v for line in lines for own in line.series.seeds.values() for v in own[0]]
        self.powers = powers
        if powers:
            top = max(1.0, math.log2(max(values)))
            self.scale = Scale(0.0, top, tuple(float(i) for i in range(math.floor(top) + 1)), 0)
        else:
            self.scale = step_scale(min(values), max(values))
        self.left = left
        longest = max((len(self.scale.text(tick)) for tick in self.scale.ticks), default=0)
        self.right = min(RIGHT, WIDTH + 6 - _LETTER * longest / 2)

    def at(self, value: float) -> float:
        return self._place(math.log2(value) if self.powers else value)

    def _place(self, value: float) -> float:
        return self.scale.at(value, self.left + 8, self.right - 8)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts."""
        if self.powers:
            return [(self._place(t), f"{2 ** int(t):,}") for t in self.scale.ticks]
        return [(self.at(t), self.scale.text(t)) for t in self.scale.ticks]


def _axes(x: _Horizontal, y: Scale, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in y.ticks:
        place = _y(y, tick)
        parts.append(f'<path class="grid" d="M{x.left:.1f} {place:.1f}H{x.right:.1f}"/>')
        parts.append(_text("tick", f"translate({x.left - 8:.1f} {place + 4.5:.1f})", y.text(tick), "end"))
    for place, text in x.ticks:
        parts.append(f'<path class="axis" d="M{place:.1f} {BOTTOM}v5"/>')
        parts.append(_text("tick", f"translate({place:.1f} {BOTTOM + 20})", text))
    parts.append(f'<path class="axis" d="M{x.left:.1f} {BOTTOM}H{x.right:.1f}"/>')
    parts.append(_text("label", f"translate({(x.left + x.right) / 2:.1f} {HEIGHT - 6})", x_label))
    parts.append(_text("label", f"translate(17 {(TOP + BOTTOM) / 2}) rotate(-90)", y_label))
    return parts


def _text(style: str, place: str, text: str, anchor: str = "middle") -> str:
    return f'<text class="{style}" transform="{place}" text-anchor="{anchor}">{attribute(text)}</text>'


def _y(scale: Scale, value: float) -> float:
    return scale.at(value, BOTTOM, TOP)


def _points(xs: Sequence[float], ys: Sequence[float], x: _Horizontal, y: Scale) -> list[str]:
    return [f"{x.at(a):.1f} {_y(y, b):.1f}" for a, b in zip(xs, ys, strict=True)]


def _band(line: Line, x: _Horizontal, y: Scale) -> str:
    """The interval."""
    series = line.series
    if series.single or not any(map(math.isfinite, series.low)):
        return ""
    # Where all seeds agree there is no interval; the band narrows to the line.
    bounds = (
        [m if math.isnan(b) else b for m, b in zip(series.mean, s, strict=True)] for s in (series.high, series.low)
    )
    there, back = (_points(series.x, bound, x, y) for bound in bounds)
    return f'<path class="band {classes(line.look)}" d="M{"L".join([*there, *back[::-1]])}z"/>'


def _singles(line: Line, x: _Horizontal, y: Scale) -> str:
    paths = "".join(f'<path class="thin" d="M{"L".join(_points(*own, x, y))}"/>' for own in line.series.seeds.values())
    return f'<g class="{classes(line.look)}">{paths}</g>'


def _mean(line: Line, x: _Horizontal, y: Scale) -> str:
    pattern = dash(line.look) if line.dashed is None else ' stroke-dasharray="6 4"' if line.dashed else ""
    points = _points(line.series.x, line.series.mean, x, y)
    return f'<path class="line {classes(line.look)}" d="M{"L".join(points)}"{pattern}/>'


def _markers(line: Line, number: int, lines: int, x: _Horizontal, y: Scale) -> str:
    """Markers on some points, in other places for each line, and always on the last."""
    count = len(line.series.x)
    every = max(1, count // _MARKS) if count > 2 * _MARKS else 1
    shown = sorted({*range(number * every // max(1, lines), count, every), count - 1})
    if x.powers:
        shown = [i for i, k in enumerate(line.series.x) if math.log2(k).is_integer() or i == count - 1]
    marks = [
        marker(line.look, x.at(line.series.x[i]), _y(y, line.series.mean[i]), hollow=bool(line.dashed)) for i in shown
    ]
    return f'<g class="{classes(line.look)}">{"".join(marks)}</g>'
