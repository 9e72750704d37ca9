"""Twins of the embedded world: two pictures that differ in one visual detail, one question, two answers (as MMVP's)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random

from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.data.world.captions import captions
from lightning_vlm.data.world.families import (
    ANGLES,
    FAMILIES,
    HELD_OUT_ANGLES,
    HELD_OUT_PAIRS,
    HELD_OUT_SIDES,
    SIDES,
    Question,
)
from lightning_vlm.data.world.scene import GRID, MAX_VALUE, Figure, Scene, masks, patch_labels, picture
from lightning_vlm.data.world.source import SPLITS
from lightning_vlm.models.embedded import COLOURS, PLURALS, SHAPES

Twin = tuple[Scene, Question]

_OPEN_SIDES = frozenset(SIDES) - frozenset(HELD_OUT_SIDES)
TWINS: dict[str, tuple[str, ...]] = {
    "colour": ("count",),
    "shape": ("count",),
    "place": ("caption",),
    "bar": ("bars",),
    "digit": ("angle", "perimeter"),
}
"""Detail that differs → the families whose questions ask for it."""
TWIN_SPLITS = ("train", "val", "test", "ood_pairs")


class TwinSource(Sequence[Sample]):
    r"""Pairs of samples, 2k and 2k + 1, whose pictures differ in one detail and whose common question tells them apart.

    The details: one figure's colour or shape (how many red shapes, how many circles), one figure's place (describe the
    image), one bar one or two units higher or lower, one digit of one label. Everything else, jitter included, is the
    same pixel for pixel. A pair counts as right if both answers are (`pairs` of rule `world/twins`): who guesses, or
    answers from the question alone, gets none.

    `Sample.info` is the world's, and `pair` (number k) and `twin` (the detail). Of `place`, the `references` are the
    captions that are true of the one picture and false of the other, and the gold answer is None.

    Args:
        split: `train`, `val`, `test`, or `ood_pairs` (both pictures show a colour and shape never seen together before;
            details `colour` and `shape`). Random streams are not those of `WorldSource`.
        size: number of samples, even.
        seed: seed of everything drawn.
        kinds: details that differ, in turn; None takes `colour`, `shape`, `bar` and `digit` where the split has them.
            `place` must be asked for: its answers are captions, which have several wordings.
        direct: the samples' own answers are the number alone; else they have a chain before it.

    Raises:
        ValueError: an unknown split or kind, a kind the split lacks, or an odd or small size.
    """

    def __init__(
        self,
        *,
        split: str = "test",
        size: int = 400,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        direct: bool = False,
    ) -> None:
        if split not in TWIN_SPLITS:
            raise ValueError(f"the world's twins have no split {split!r}; choose one of {', '.join(TWIN_SPLITS)}")
        possible = tuple(kind for kind, families in TWINS.items() if set(families) & set(SPLITS[split]))
        if kinds is None:
            kinds = [kind for kind in possible if kind != "place"]
        for kind in kinds:
            if kind not in possible:
                raise ValueError(f"split {split!r} has no twins of kind {kind!r}; choose among {', '.join(possible)}")
        if not kinds:
            raise ValueError("twins need at least one kind; leave `kinds` out for the usual ones")
        if size < 2 or size % 2:
            raise ValueError(f"size is {size}; twins come in pairs, so it must be even and at least 2")
        self.split, self.size, self.seed, self.kinds, self.direct = split, size, seed, tuple(kinds), direct

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        index = range(self.size)[index]  # negative indices, IndexError
        pair, which = divmod(index, 2)
        kind = self.kinds[pair % len(self.kinds)]
        rng = Random(f"world-twins/{self.split}/{self.seed}/{pair}/{kind}")
        families = TWINS[kind]
        family = families[pair // len(self.kinds) % len(families)]
        twins = draw_twins(rng, kind, family, self.split)
        return self._sample(index, kind, family, twins[which], twins[1 - which])

    def _sample(self, index: int, kind: str, family: str, mine: Twin, other: Twin) -> Sample:
        scene, question = mine
        info = {
            "family": family,
            "split": self.split,
            "question": question.kind,
            "kind": "caption" if family == "caption" else "direct" if self.direct else "chain",
            "image": index,
            "pair": index // 2,
            "twin": kind,
            "patch_labels": patch_labels(scene),
            "masks": partial(masks, scene),
        }
        if family == "caption":
            info["references"] = list(question.values)
            gold, target = None, question.values[0]
        else:
            steps, answer = question.solve(question.values)
            gold = str(answer)
            target = rf"\boxed{{{answer}}}" if self.direct else rf"{steps}. \boxed{{{answer}}}"
        return Sample(
            id=f"world-twins-{self.split}-{self.seed}-{index}",
            messages=[message("user", image(), text(question.text)), message("assistant", text(target))],
            images=[partial(picture, scene)],
            answer=gold,
            source="world-twins",
            info=info,
        )


def draw_twins(rng: Random, kind: str, family: str, split: str) -> tuple[Twin, Twin]:
    """Two scenes that differ in one detail, each with the question; drawn again until the answers differ, too.

    Args:
        rng: of everything. kind: of `TWINS`. family: one of its families. split: of `TWIN_SPLITS`.
    """
    while True:
        scene, (question, *_) = FAMILIES[family](rng, split, 1)
        if (other := _CHANGES[kind](rng, scene, question, split)) is None:
            continue
        if family == "caption":
            mine, theirs = set(captions(scene.figures)), set(captions(other[0].figures))
            pair = []
            for picture_, own in ((scene, mine - theirs), (other[0], theirs - mine)):
                ordered = tuple(c for c in captions(picture_.figures) if c in own)
                pair.append((picture_, replace(question, values=ordered)))
            if all(q.values for _, q in pair):
                return pair[0], pair[1]
        elif question.solve(question.values)[1] != other[1].solve(other[1].values)[1]:
            return (scene, question), other


def _figure(rng: Random, scene: Scene, question: Question, split: str, *, colour: bool) -> Twin | None:
    """One figure becomes, or ceases to be, one of those counted."""
    if not scene.figures or (question.kind == "colour") != colour:
        return None
    i = rng.randrange(len(scene.figures))
    old = scene.figures[i]
    new = replace(old, colour=rng.randrange(len(COLOURS))) if colour else replace(old, shape=rng.randrange(len(SHAPES)))
    figures = (*scene.figures[:i], new, *scene.figures[i + 1 :])
    held_out = [(f.colour, f.shape) in HELD_OUT_PAIRS for f in figures]
    if new == old or any(held_out) != (split == "ood_pairs"):
        return None
    asked = next(word for word in question.text.split() if word in (COLOURS if colour else PLURALS))
    counted = [f for f in figures if (COLOURS[f.colour] if colour else PLURALS[f.shape]) == asked]
    if len(counted) > 4:
        return None
    names = tuple(SHAPES[f.shape] if colour else COLOURS[f.colour] for f in counted)
    return replace(scene, figures=figures), replace(question, values=names)


def _place(rng: Random, scene: Scene, question: Question, split: str) -> Twin | None:
    """One figure moves to an empty cell."""
    i = rng.randrange(len(scene.figures))
    free = sorted(set(range(GRID * GRID)) - {f.cell for f in scene.figures})
    moved = replace(scene.figures[i], cell=rng.choice(free))
    figures: list[Figure] = [*scene.figures[:i], moved, *scene.figures[i + 1 :]]
    return replace(scene, figures=tuple(sorted(figures, key=lambda f: f.cell))), question


def _bar(rng: Random, scene: Scene, question: Question, split: str) -> Twin | None:
    """One bar is one or two units higher or lower."""
    i = rng.randrange(len(scene.bars))
    old = scene.bars[i]
    value = old.value + rng.choice((-2, -1, 1, 2))
    if not 1 <= value <= MAX_VALUE:
        return None
    bars = (*scene.bars[:i], replace(old, value=value), *scene.bars[i + 1 :])
    name = COLOURS[old.colour]
    values = tuple((n, value if n == name else v) for n, v in question.values)
    changed = replace(question, values=values)
    return (replace(scene, bars=bars), changed) if changed.solve(values)[1] >= 0 else None


def _digit(rng: Random, scene: Scene, question: Question, split: str) -> Twin | None:
    """One digit of one number is another, such that the numbers still are some that the family shows."""
    places = [k for k, label in enumerate(scene.labels) if label.text != "x"]
    n = rng.randrange(len(places))
    old = scene.labels[places[n]].text
    digit = rng.randrange(len(old))
    new = old[:digit] + rng.choice("0123456789") + old[digit + 1 :]
    values = (*question.values[:n], int(new), *question.values[n + 1 :])
    if len(places) == 2:
        shown = all(v in ANGLES and v not in HELD_OUT_ANGLES for v in values) and sum(values) <= 160
    else:
        shown = tuple(sorted(values[:3])) in _OPEN_SIDES
    if not shown or new == old:
        return None
    labels = list(scene.labels)
    labels[places[n]] = replace(labels[places[n]], text=new)
    return replace(scene, labels=tuple(labels)), replace(question, values=values)


_CHANGES: dict[str, Callable[[Random, Scene, Question, str], Twin | None]] = {
    "colour": partial(_figure, colour=True),
    "shape": partial(_figure, colour=False),
    "place": _place,
    "bar": _bar,
    "digit": _digit,
}
