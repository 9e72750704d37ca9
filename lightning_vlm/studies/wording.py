"""Numbers and verdicts in words. A sentence never claims more than its test."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lightning_vlm.studies.comparison import Arm, Comparison, Pair


@dataclass(frozen=True)
class Unit:
    """How numbers are shown: `points` are percentages and their differences, `plain` numbers stand as they are.

    Attributes:
        name: of the unit ("points", "nats"), or empty. scale: what numbers are shown times. decimals: usual ones.
        percent: whether numbers that are no differences are shares of all.
    """

    name: str = ""
    scale: float = 1.0
    decimals: int = 3
    percent: bool = False

    points: ClassVar[Unit]
    changes: ClassVar[Unit]  # differences of shares, which are no shares
    plain: ClassVar[Unit]

    @classmethod
    def of(cls, name: str, scale: float, values: Iterable[float]) -> Unit:
        """The unit of a number that is read from a file, with decimals that show three to four of its digits."""
        if name == "points":
            return cls(name, scale, 1)
        largest = max((abs(value * scale) for value in values), default=0.0)
        if largest == 0:
            return cls(name, scale)
        digits = math.floor(math.log10(largest))
        return cls(name, scale, min(3, max(0, 3 - digits)) if digits >= -1 else min(8, 2 - digits))

    @property
    def fractions(self) -> bool:
        """Whether numbers are fractions that are shown as points."""
        return self.name == "points" and self.scale == 100

    @property
    def of_scores(self) -> str:
        """After a mean, in a heading."""
        return ", %" if self.percent else self.of_differences

    @property
    def of_differences(self) -> str:
        """After a difference, in a heading."""
        return f", {self.name}" if self.name else ""

    @property
    def word(self) -> str:
        """After a difference, in a sentence."""
        return f" {self.name}" if self.name else ""

    def numbers(self, *values: float) -> list[str]:
        """Values that are read together, with the same decimals: enough to tell small ones from 0."""
        decimals = self.decimals
        scaled = [value * self.scale for value in values]
        if any(0 < abs(value) < 0.5 * 10**-decimals for value in scaled):
            decimals += 1
        return ["–" if math.isnan(value) else f"{value:.{decimals}f}".replace("-", "−") for value in scaled]

    def interval(self, low: float, high: float, *beside: float) -> str:
        """`[low, high]`; a dash where there is none. `beside`: other values shown with it."""
        if math.isnan(low):
            return "–"
        low_text, high_text, *_ = self.numbers(low, high, *beside)
        return f"[{low_text}, {high_text}]"


Unit.points = Unit("points", 100, 1, percent=True)
Unit.changes = Unit("points", 100, 1)
Unit.plain = Unit()


def p_value(p: float, alpha: float = 0.05) -> str:
    """`.52`, `.021`, `< .001`; more decimals where rounding would hide on which side of alpha it lies."""
    if math.isnan(p):
        return "–"
    if p < 0.001:
        return "< .001"
    decimals = 2 if p >= 0.1 else 3
    while decimals < 6 and p != alpha and round(p, decimals) == alpha:
        decimals += 1
    return f"{p:.{decimals}f}".removeprefix("0") if p < 1 else "1"


def required(pair: Pair) -> str:
    """`about 38 seeds per arm`, to two digits; empty where no number is enough."""
    if pair.required is None:
        return ""
    unit = 10 ** max(0, len(str(pair.required)) - 2)
    number = -(-pair.required // unit) * unit
    return f"about {number:,} {'problems' if pair.about == 'checkpoints' else 'seeds per arm'}"


def sentence(pair: Pair, a: Arm, b: Arm, result: Comparison) -> str:
    """The verdict on a pair."""
    unit, found = result.unit, pair.result
    (difference,) = unit.numbers(found.diff)
    if pair.verdict == "no verdict":
        return f"no verdict on {a.name} and {b.name} ({a.name} − {b.name} = {difference}{unit.word}): {pair.reason}."
    p = p_said(pair, result)
    excludes_0 = found.low > 0 or found.high < 0
    if pair.found:
        greater, lesser, amount = _by(pair, unit)
        claim = {
            "better": f"{greater} is better than {lesser} by",
            "worse": f"{lesser} is better than {greater}, lower by",
            "neither": f"{greater} is higher than {lesser} by",
        }[result.higher]
        text = f"{claim} {amount}, {p} ({_test(pair, a, b, result)})"
        if not excludes_0:
            text += "; the interval, which does not decide, includes 0"
        return text + _scope(pair) + "."
    text = f"not distinguishable: {a.name} − {b.name} = {amount_of(pair, unit)}, {p} "
    text += f"({_test(pair, a, b, result)})"
    if excludes_0 and found.p <= result.alpha:
        text += f"; the interval excludes 0, but unlike p it is not adjusted for {result.tested} pairs"
    elif excludes_0:
        text += f"; the interval excludes 0, but the test, which decides, does not reach {result.alpha:g}"
    if pair.required is not None:
        text += f"; {required(pair)} would be needed for a difference of this size"
    return text + _scope(pair) + "."


def short(pair: Pair, a: Arm, b: Arm, result: Comparison) -> str:
    """The verdict in a few words, for tables and lists; greater is not called better."""
    unit, found = result.unit, pair.result
    if pair.verdict == "no verdict":
        return f"{a.name} − {b.name}: no verdict ({unit.numbers(found.diff)[0]}{unit.word}; {pair.reason})"
    seeds = [len(arm.runs) for arm in ((b, a) if pair.greater == b.name else (a, b))]  # in the order of the names
    over = f"{seeds[0]} seeds" if seeds[0] == seeds[1] else f"{seeds[0]} + {seeds[1]} seeds"
    over = "these checkpoints" if pair.about == "checkpoints" else over
    if pair.found:
        greater, lesser, amount = _by(pair, unit)
        return f"{greater} > {lesser} by {amount}, {over}"
    text = f"{a.name} − {b.name}: not distinguishable ({amount_of(pair, unit)}, {over}"
    if found.low > 0 or found.high < 0:  # a reader would wonder
        text += f", {p_said(pair, result)}"
        text += f" by Holm over {result.tested} pairs" if result.tested > 1 else f" by {pair.test}"
    needed = required(pair).removesuffix(" per arm")
    return text + (f"); needs {needed}" if needed else ")")


def p_said(pair: Pair, result: Comparison) -> str:
    """`p = .021`, after Holm."""
    p = p_value(pair.p_adjusted, result.alpha)
    return f"p {p}" if p.startswith("<") else f"p = {p}"


def amount_of(pair: Pair, unit: Unit) -> str:
    """`0.4 points [−1.0, 1.8]`: a − b with its interval."""
    found = pair.result
    shown, *_ = unit.numbers(found.diff, found.low, found.high)
    return f"{shown}{unit.word} {unit.interval(found.low, found.high, found.diff)}"


def _by(pair: Pair, unit: Unit) -> tuple[str, str, str]:
    """The arm with the greater number, the other, and by how much, which is positive."""
    found = pair.result
    greater, lesser, sign = (pair.a, pair.b, 1) if found.diff > 0 else (pair.b, pair.a, -1)
    low, high = sorted((sign * found.low, sign * found.high))
    shown, *_ = unit.numbers(abs(found.diff), low, high)
    return greater, lesser, f"{shown}{unit.word} {unit.interval(low, high, found.diff)}"


def _scope(pair: Pair) -> str:
    return "; these checkpoints, not these recipes" if pair.about == "checkpoints" else ""


def _test(pair: Pair, a: Arm, b: Arm, result: Comparison) -> str:
    if pair.mcnemar:
        only = pair.mcnemar
        text = f"{pair.test}: of {result.problems:,} problems {only.only_a:,} solved only by {a.name}, {only.only_b:,} "
        text += f"only by {b.name}"
    elif pair.about == "checkpoints":
        text = f"{pair.test} over {result.problems:,} problems"
    elif pair.test == "paired t":
        text = f"paired t over {len(a.runs)} training seeds"
    else:
        text = f"{pair.test} over {len(a.runs)} + {len(b.runs)} training seeds"
    return text + (f", Holm over {result.tested} pairs" if result.tested > 1 else "")


def notes_on(result: Comparison) -> list[str]:
    """What a reader must know to read the numbers."""
    notes = ["Points are percentage points."] if result.unit.name == "points" else []
    if result.left_out:
        notes.append(f"{result.problems:,} problems are in all files and compared; {result.left_out:,} are left out.")
    single = any(arm.single for arm in result.arms)
    if single and not result.problems:
        notes.append("One seed: the number exists once per seed, so that one seed has no interval.")
    elif single:
        notes.append(
            f"One seed: the interval is a bootstrap over the problems ({result.draws:,} draws, seed {result.seed}). It "
            "says how the checkpoint would do on other problems of this kind, not how another training seed would do."
        )
    several = not all(arm.single for arm in result.arms)
    if several and not result.problems:
        notes.append("Several seeds: the interval is a t interval over the seeds' numbers: how other seeds would do.")
    elif several:
        notes.append(
            "Several seeds: the interval is a t interval over the seeds' means. It says how other training seeds would "
            f"do on these {result.problems:,} problems, not how the recipe would do on others."
        )
    if result.tested:
        level, adjusted = f"{result.alpha:g}", ""
        if result.tested > 1:
            level += f"/{result.tested}"
            adjusted = f" p is adjusted for {result.tested} pairs by Holm's method; intervals are not."
        notes.append(f"A difference counts if p ≤ {result.alpha:g}.{adjusted}")
        notes.append(
            f"Needed: to find a difference of the size seen with probability 0.8 at level {level}; a rough guess."
        )
    recipes_by_test: dict[tuple[str, str], list[str]] = {}
    for pair in result.pairs:
        if pair.about == "recipes" and pair.test:
            recipes_by_test.setdefault((pair.test, pair.reason), []).append(f"{pair.a} − {pair.b}")
    for (test, reason), pairs in recipes_by_test.items():
        which = f" for {', '.join(pairs)}" if len(recipes_by_test) > 1 else ""
        notes.append(f"{test[0].upper()}{test[1:]}{which}, because {reason}.")
    return notes
