r"""The five families of the embedded world: what is drawn, what is asked about it, and how the answer is derived.

Every family is a function `(rng, split, questions) -> (Scene, list[Question])`. A question's derivation is a
function of what has to be read off the picture, so a wrong derivation is the right one applied to a misreading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from random import Random
from typing import Any

from lightning_vlm.data.world.captions import captions
from lightning_vlm.data.world.scene import GRID, MAX_VALUE, TRIANGLES, Bar, Figure, Label, Scene, side_cells
from lightning_vlm.models.embedded import COLOURS, PLURALS, SHAPES

ANGLES = tuple(range(20, 100, 5))
# Tens: their sums are easily learned, so that what counts is reading all three numbers.
SIDES = tuple(t for t in combinations_with_replacement((20, 30, 40, 50, 60, 80), 3) if t[0] + t[1] > t[2])
# Never shown in the in-domain splits; every colour, shape and digit still is.
HELD_OUT_PAIRS = tuple(
    (COLOURS.index(colour), SHAPES.index(shape))
    for colour, shape in (("red", "cross"), ("blue", "triangle"), ("yellow", "circle"))
)
HELD_OUT_ANGLES = (35, 70)
HELD_OUT_SIDES = SIDES[3::7]

_PAIRS = tuple((c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)) if (c, s) not in HELD_OUT_PAIRS)
_SEEN_ANGLES = tuple(a for a in ANGLES if a not in HELD_OUT_ANGLES)
_SEEN_SIDES = tuple(s for s in SIDES if s not in HELD_OUT_SIDES)

Values = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: what is asked within the family (`colour`, `sum`, `exterior`, ...).
        text: the question.
        values: what has to be read off the picture to answer it.
        solve: values → (derivation without the box, answer).
        misread: (rng, values) → other values that give another answer.
    """

    kind: str
    text: str
    values: Values
    solve: Callable[[Values], tuple[str, int]]
    misread: Callable[[Random, Values], Values]


def caption(rng: Random, split: str, questions: int) -> tuple[Scene, list[Question]]:
    """One to four figures to describe; the questions' `values` are the captions, the first the target."""
    count = rng.randint(1, 4)
    pairs = [rng.choice(_PAIRS) for _ in range(count)]
    if split == "ood_pairs":
        pairs[rng.randrange(count)] = rng.choice(HELD_OUT_PAIRS)
    scene = _figures(rng, pairs)
    five = captions(scene.figures)
    shift = rng.randrange(len(five))
    rotated = [five[r:] + five[:r] for r in ((shift + 2 * q) % len(five) for q in range(questions))]
    return scene, [
        Question("caption", "describe the image.", tuple(texts), _no_answer, _no_misreading) for texts in rotated
    ]


def count(rng: Random, split: str, questions: int) -> tuple[Scene, list[Question]]:
    """How many figures have a colour or a shape (or both, in `ood_two_attributes`), 0–4 equally often."""
    pairs = _PAIRS
    if split == "ood_pairs":  # half of what is drawn; 21 of 24 pairs are not held out
        pairs = (*_PAIRS, *HELD_OUT_PAIRS * (len(_PAIRS) // len(HELD_OUT_PAIRS)))
    targets: list[tuple[int | None, int | None]] = []
    while len(targets) < questions:
        colour, shape = rng.choice(HELD_OUT_PAIRS if split == "ood_pairs" else _PAIRS)
        if split != "ood_two_attributes":
            colour, shape = (colour, None) if rng.random() < 0.5 else (None, shape)
        if (colour, shape) not in targets:
            targets.append((colour, shape))
    wanted = [rng.randint(0, 4) for _ in targets]
    shown = _planted(rng, targets, wanted, pairs)
    while split == "ood_pairs" and not any(pair in HELD_OUT_PAIRS for pair in shown):
        shown = _planted(rng, targets, wanted, pairs)
    scene = _figures(rng, shown)
    return scene, [_count_question(scene, *target) for target in targets]


def bars(rng: Random, split: str, questions: int) -> tuple[Scene, list[Question]]:
    """Three or four bars: the value of one, the sum of two, or the sum of two minus a third (never negative)."""
    number = rng.randint(3, 4)
    first = rng.randint(0, 4 - number)
    colours = rng.sample(range(len(COLOURS)), number)
    shown = [Bar(colour, rng.randint(1, MAX_VALUE), first + i) for i, colour in enumerate(colours)]
    asked = []
    for kind in rng.sample(("value", "sum", "difference"), questions):
        chosen = rng.sample(shown, {"value": 1, "sum": 2, "difference": 3}[kind])
        if kind == "difference":
            chosen.sort(key=lambda bar: bar.value)
            small = chosen.pop(0)
            rng.shuffle(chosen)
            chosen.append(small)
        names = [COLOURS[bar.colour] for bar in chosen]
        text = {
            "value": "what is the value of the {} bar?",
            "sum": "what is {} plus {}?",
            "difference": "what is {} plus {} minus {}?",
        }[kind].format(*names)
        values = tuple((name, bar.value) for name, bar in zip(names, chosen, strict=True))
        asked.append(Question(kind, text, values, _solve_bars, _misread_bars))
    return Scene(bars=tuple(shown)), asked


def angle(rng: Random, split: str, questions: int) -> tuple[Scene, list[Question]]:
    """A triangle with two angles (multiples of 5) written in: the third, or the exterior angle beside it."""
    values = (0, 0)
    while not 0 < sum(values) <= 160:
        values = (rng.choice(_SEEN_ANGLES), rng.choice(_SEEN_ANGLES))
        if split == "ood_numbers":
            values = (rng.choice(HELD_OUT_ANGLES), rng.choice(ANGLES))
            values = values if rng.random() < 0.5 else values[::-1]
    triangle = rng.randrange(len(TRIANGLES))
    texts = [str(v) for v in values]
    texts.insert(rng.randrange(3), "x")
    labels = tuple(_label(rng, t, cell) for t, cell in zip(texts, sorted(TRIANGLES[triangle]), strict=True))
    kinds = {
        "third": ("what is angle x?", _solve_third),
        "exterior": ("what is the exterior angle at x?", _solve_exterior),
    }
    return Scene(labels=labels, triangle=triangle), [
        Question(kind, kinds[kind][0], values, kinds[kind][1], _misread_angles)
        for kind in rng.sample(tuple(kinds), questions)
    ]


def perimeter(rng: Random, split: str, questions: int) -> tuple[Scene, list[Question]]:
    """A triangle with its three sides written in: its perimeter, or that of a similar one 2, 3 or 4 times as large."""
    sides = list(rng.choice(HELD_OUT_SIDES if split == "ood_numbers" else _SEEN_SIDES))
    rng.shuffle(sides)
    triangle = rng.randrange(len(TRIANGLES))
    cells = sorted(side_cells(triangle))
    labels = tuple(_label(rng, str(side), cell) for side, cell in zip(sides, cells, strict=True))
    asked = []
    for scale in rng.sample((1, 2, 3, 4), questions):
        similar = f" of a similar triangle {scale} times as large" if scale > 1 else ""
        kind = "similar" if scale > 1 else "perimeter"
        asked.append(Question(kind, f"what is the perimeter{similar}?", (*sides, scale), _solve_sides, _misread_sides))
    return Scene(labels=labels, triangle=triangle), asked


FAMILIES: dict[str, Callable[[Random, str, int], tuple[Scene, list[Question]]]] = {
    "caption": caption,
    "count": count,
    "bars": bars,
    "angle": angle,
    "perimeter": perimeter,
}


def _jitter(rng: Random) -> tuple[int, int]:
    return divmod(rng.randrange(9), 3)


def _label(rng: Random, text: str, cell: int) -> Label:
    dx, dy = _jitter(rng)
    return Label(text, cell, dx - 1, dy - 1)


def _figures(rng: Random, pairs: list[tuple[int, int]]) -> Scene:
    """The (colour, shape) pairs in random cells, in reading order."""
    pairs = rng.sample(pairs, len(pairs))
    placed = []
    for (colour, shape), cell in zip(pairs, sorted(rng.sample(range(GRID * GRID), len(pairs))), strict=True):
        dx, dy = _jitter(rng)
        placed.append(Figure(colour, shape, cell, dx - 1, dy - 1))
    return Scene(figures=tuple(placed))


def _matches(pair: tuple[int, int], target: tuple[int | None, int | None]) -> bool:
    return all(wanted is None or wanted == value for value, wanted in zip(pair, target, strict=True))


def _planted(rng: Random, targets: list, wanted: list[int], pairs: tuple) -> list[tuple[int, int]]:
    """Random pairs of which exactly `wanted[i]` match `targets[i]`, with one to four that match none."""
    shown: list[tuple[int, int]] = []
    missing, idle = list(wanted), rng.randint(1, 4)
    while idle or any(missing):
        pair = rng.choice(pairs)
        hits = [i for i, target in enumerate(targets) if _matches(pair, target)]
        if hits and all(missing[i] for i in hits):
            for i in hits:
                missing[i] -= 1
        elif hits or not idle:
            continue
        else:
            idle -= 1
        shown.append(pair)
    return shown


def _count_question(scene: Scene, colour: int | None, shape: int | None) -> Question:
    found = [f for f in scene.figures if _matches((f.colour, f.shape), (colour, shape))]
    if shape is None:
        kind, asked, listed = "colour", f"{COLOURS[colour]} shapes", [SHAPES[f.shape] for f in found]
    elif colour is None:
        kind, asked, listed = "shape", PLURALS[shape], [COLOURS[f.colour] for f in found]
    else:
        kind, asked, listed = "both", f"{COLOURS[colour]} {PLURALS[shape]}", [f.name for f in found]
    return Question(kind, f"how many {asked} are there?", tuple(listed), _solve_count, _misread_count)


def _solve_count(values: Values) -> tuple[str, int]:
    return ", ".join(f"{i} {name}" for i, name in enumerate(values, 1)) or "none", len(values)


def _misread_count(rng: Random, values: Values) -> Values:
    if not values:
        return (rng.choice(SHAPES),)
    if len(values) < 5 and rng.random() < 0.5:
        return (*values, rng.choice(values))
    drop = rng.randrange(len(values))
    return values[:drop] + values[drop + 1 :]


def _solve_bars(values: Values) -> tuple[str, int]:
    steps, total = [f"{name} = {value}" for name, value in values], values[0][1]
    for sign, (_, value) in zip("+-", values[1:], strict=False):
        result = total + value if sign == "+" else total - value
        steps.append(f"{total} {sign} {value} = {result}")
        total = result
    return ", ".join(steps), total


def _misread_bars(rng: Random, values: Values) -> Values:
    i = rng.randrange(len(values))
    name, value = values[i]
    other = rng.choice([v for v in range(max(1, value - 3), min(MAX_VALUE, value + 3) + 1) if v != value])
    wrong = (*values[:i], (name, other), *values[i + 1 :])
    return wrong if _solve_bars(wrong)[1] >= 0 else _misread_bars(rng, values)


def _solve_third(values: Values) -> tuple[str, int]:
    a, b = values
    return f"{a} + {b} = {a + b}, 180 - {a + b} = {180 - a - b}", 180 - a - b


def _solve_exterior(values: Values) -> tuple[str, int]:
    a, b = values
    return f"{a} + {b} = {a + b}", a + b


def _misread_angles(rng: Random, values: Values) -> Values:
    i = rng.randrange(2)
    other = rng.choice([a for a in _SEEN_ANGLES if a != values[i] and a + values[1 - i] <= 160])
    return (other, values[1]) if i == 0 else (values[0], other)


def _solve_sides(values: Values) -> tuple[str, int]:
    a, b, c, scale = values
    total = a + b + c
    steps = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {total}"]
    if scale > 1:
        steps.append(f"{total} * {scale} = {total * scale}")
    return ", ".join(steps), total * scale


def _misread_sides(rng: Random, values: Values) -> Values:
    i = rng.randrange(3)
    pool = sorted({side for triple in _SEEN_SIDES for side in triple} - {values[i]})
    return (*values[:i], rng.choice(pool), *values[i + 1 :])


def _no_answer(values: Values) -> tuple[str, int]:
    raise TypeError("a caption has no answer to derive")


def _no_misreading(rng: Random, values: Values) -> Values:
    raise TypeError("a caption is edited, not misread")
