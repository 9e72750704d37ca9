"""Captions of scenes of one to four figures: the five that are true, and minimal edits that are not."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from lightning_vlm.data.world.scene import GRID, Figure
from lightning_vlm.models.embedded import COLOURS, NUMBER_WORDS, SHAPES

_OPPOSITE = {
    "above": "below", "below": "above", "left": "right", "right": "left", "top": "bottom", "bottom": "top",
}  # fmt: skip


def captions(figures: Sequence[Figure]) -> list[str]:
    """The five true captions of one to four figures in reading order.

    Two relate the first two figures, or place the only one; one turns the relation round; two list all figures.
    """
    names = [f"a {figure.name}" for figure in figures]
    listed = _listed(names)
    count = NUMBER_WORDS[len(figures) - 1]
    lists = [f"there is {listed}.", f"{count} shape{'s' if len(figures) > 1 else ''}: {listed}."]
    first, rest = figures[0], f", with {_listed(names[2:])}." if len(names) > 2 else "."
    if len(figures) == 1:
        place = f"at the {'top' if first.cell < 8 else 'bottom'} {'left' if first.cell % GRID < 2 else 'right'}"
        return [f"{names[0]} {place}.", f"the image shows {names[0]} {place}.", f"{place} is {names[0]}.", *lists]
    if first.cell // GRID < figures[1].cell // GRID:
        there, back = "above", "below"
    else:
        there, back = "left of", "right of"
    related = f"{names[0]} {there} {names[1]}{rest}"
    return [related, f"the image shows {related}", f"{names[1]} {back} {names[0]}{rest}", *lists]


def minimal_edit(caption: str, figures: Sequence[Figure], rng: Random) -> tuple[str, str]:
    """A caption that differs from a true one in a single word and is false, and what kind of word that is.

    Kinds are `colour`, `shape`, `number` and `relation`, drawn evenly among those the caption allows. A colour or shape
    is exchanged so that the figures named are no longer those shown; a relation only where no figure of the same
    name could make its opposite true.

    Returns:
        (false caption, kind).
    """
    words = caption.replace(",", " ,").replace(".", " .").replace(":", " :").split()
    names = [figure.name for figure in figures]
    unique = all(names.count(name) == 1 for name in names[:2])
    places: dict[str, list[int]] = {"colour": [], "shape": [], "number": [], "relation": []}
    for i, word in enumerate(words):
        if word in COLOURS:
            places["colour"].append(i)
        elif word in SHAPES:
            places["shape"].append(i)
        elif word in NUMBER_WORDS:
            places["number"].append(i)
        elif word in _OPPOSITE and unique:
            places["relation"].append(i)
    kind = rng.choice([kind for kind, found in places.items() if found])
    i = rng.choice(places[kind])
    alternatives = {"colour": COLOURS, "shape": SHAPES, "number": NUMBER_WORDS}
    if kind == "relation":
        words[i] = _OPPOSITE[words[i]]
    else:
        words[i] = rng.choice([word for word in alternatives[kind] if word != words[i]])
    text = " ".join(words)
    return text.replace(" ,", ",").replace(" .", ".").replace(" :", ":"), kind


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
