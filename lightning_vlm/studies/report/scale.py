"""Axes: round ticks, and a range that data fill although intervals of few seeds are very wide."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Scale(NamedTuple):
    """A range in the data's unit, the ticks in it, and decimals that tell the ticks apart."""

    low: float
    high: float
    ticks: tuple[float, ...]
    decimals: int

    def at(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two places of a drawing; outside the range if it is outside."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)

    def text(self, tick: float) -> str:
        """A tick in words."""
        return f"{tick:,.{self.decimals}f}".replace("-", "−")


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> tuple[tuple[float, ...], int]:
    """About `count` round numbers inside a range, and their decimals.

    Args:
        low, high: the range; low < high. count: wanted. whole: whole numbers only.
    """
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * m for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs((high - low) / step - count))
    if whole:
        step = max(1.0, float(round(step)))
    first = math.ceil(low / step - 1e-9)
    found = tuple(i * step + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1))
    decimals = next(d for d in range(20) if abs(round(step, d) - step) < step * 1e-6)
    return found, decimals


def scale_of(
    inner: Iterable[float],
    outer: Iterable[float] = (),
    *,
    count: int = 5,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    reach: float = 0.6,
) -> Scale:
    """A range with all inner values, and outer ones as far as they leave the inner ones room.

    The t interval of two seeds is nine times as wide as their distance: shown whole, it would flatten every line.

    Args:
        inner: must be inside. outer: bounds of intervals. NaN is left out of both.
        count: ticks wanted.
        bounds: what no value can pass (a share: 0 and 1).
        reach: how far outer values may widen the range to either side, in ranges of the inner ones.
    """
    inner = [value for value in inner if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(inner), max(inner)
    outer = [value for value in outer if math.isfinite(value)]
    span = high - low or (max(outer) - min(outer) if outer else 0.0) or abs(high) * 0.1 or 1.0
    wide_low, wide_high = min([low, *outer]), max([high, *outer])
    low, high = max(wide_low, low - reach * span), min(wide_high, high + reach * span)
    margin = 0.05 * (high - low or span)
    low, high = max(low - margin, bounds[0]), min(high + margin, bounds[1])
    found, decimals = ticks(low, high, count)
    return Scale(low, high, found, decimals)


def step_scale(low: float, high: float, count: int = 6) -> Scale:
    """A range of steps, from the first to the last."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    found, _ = ticks(low, high, count, whole=True)
    return Scale(low, high, found, 0)
