"""Scenes of the embedded world and their rendering: 64 × 64 pixel pictures whose content is aligned with 16 patches.

A scene is plain data (picklable, a few hundred bytes); picture, object masks and patch labels are functions of it.
Cells are the 4 × 4 patches of 16 pixels, numbered 0–15 in reading order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from lightning_vlm.models.embedded import COLOURS, IMAGE_SIZE, SHAPES

CELL = 16  # pixels
GRID = IMAGE_SIZE // CELL
BACKGROUND, INK, LINE = 237, 20, 150  # grey levels
UNIT = 6  # pixels of bar height per unit of value
MAX_VALUE = 10
RGB = np.array([(220, 40, 40), (30, 150, 60), (40, 80, 220), (240, 205, 20), (140, 50, 180), (30, 200, 215)], np.uint8)

# Three columns of five rows for each character, as rows of bits.
_FONT = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7), "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 1, 1, 1), "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7),
    "x": (0, 5, 2, 5, 0),
}  # fmt: skip

# Vertices (as cells) of the triangles that angles and sides are written on: apex, then the two ends of the base.
TRIANGLES = (
    (1, 12, 15), (2, 12, 15), (13, 0, 3), (14, 0, 3), (4, 3, 15), (8, 3, 15), (7, 0, 12), (11, 0, 12),
)  # fmt: skip

LABELS = ("colour", "shape", "tens", "units", "bar")
LABEL_CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), 11, 12, 1 + MAX_VALUE)


@dataclass(frozen=True, slots=True)
class Figure:
    """A coloured shape in a cell: indices into `COLOURS` and `SHAPES`, and an offset of −1, 0 or 1 pixels."""

    colour: int
    shape: int
    cell: int
    dx: int = 0
    dy: int = 0

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True, slots=True)
class Bar:
    """A coloured bar in a column of cells, `value` units high, standing on the lower edge."""

    colour: int
    value: int
    column: int


@dataclass(frozen=True, slots=True)
class Label:
    """One or two characters written in a cell, with an offset of −1, 0 or 1 pixels."""

    text: str
    cell: int
    dx: int = 0
    dy: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything a picture shows.

    Attributes:
        triangle: index into `TRIANGLES`, whose outline lies behind the labels, or None.
    """

    figures: tuple[Figure, ...] = ()
    bars: tuple[Bar, ...] = ()
    labels: tuple[Label, ...] = ()
    triangle: int | None = None


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: [64, 64, 3] uint8."""
    picture = _canvas(scene.triangle).copy()
    for figure in scene.figures:
        block = _cell(picture, figure.cell)
        block[_shape_mask(figure.shape, figure.dx, figure.dy)] = RGB[figure.colour]
    for bar in scene.bars:
        x = bar.column * CELL
        picture[IMAGE_SIZE - UNIT * bar.value :, x + 3 : x + 13] = RGB[bar.colour]
    for label in scene.labels:
        block = _cell(picture, label.cell)
        block[:] = BACKGROUND  # the outline does not run through what is written
        block[_text_mask(label.text, label.dx, label.dy)] = INK
    return picture


def picture(scene: Scene) -> Image.Image:
    """The picture of a scene as a PIL image."""
    return Image.fromarray(render(scene))


def masks(scene: Scene) -> tuple[list[str], np.ndarray]:
    """Class name and pixels of every object: names such as `red circle`, `blue bar`, `label`; [objects, 64, 64] bool.

    Objects never overlap; they come in the scene's order, figures, bars, then labels.
    """
    names: list[str] = []
    stack = np.zeros((len(scene.figures) + len(scene.bars) + len(scene.labels), IMAGE_SIZE, IMAGE_SIZE), bool)
    for figure in scene.figures:
        _cell(stack[len(names)], figure.cell)[:] = _shape_mask(figure.shape, figure.dx, figure.dy)
        names.append(figure.name)
    for bar in scene.bars:
        x = bar.column * CELL
        stack[len(names), IMAGE_SIZE - UNIT * bar.value :, x + 3 : x + 13] = True
        names.append(f"{COLOURS[bar.colour]} bar")
    for label in scene.labels:
        _cell(stack[len(names)], label.cell)[:] = _text_mask(label.text, label.dx, label.dy)
        names.append("label")
    return names, stack


def patch_labels(scene: Scene) -> np.ndarray:
    """What each patch shows, for the visual warm-up: [16, 5] uint8, columns as `LABELS`, classes as `LABEL_CLASSES`.

    0 means nothing of the kind. Colours and shapes count from 1 in their lists' order; digits are 1 + digit, and 11 in
    the units' place is the letter x; a bar has its colour in every patch it reaches, its value in the topmost.
    """
    labels = np.zeros((GRID * GRID, len(LABELS)), np.uint8)
    for figure in scene.figures:
        labels[figure.cell, :2] = 1 + figure.colour, 1 + figure.shape
    for bar in scene.bars:
        rows = -(-UNIT * bar.value // CELL)
        cells = np.arange(GRID - rows, GRID) * GRID + bar.column
        labels[cells, 0], labels[cells[0], 4] = 1 + bar.colour, bar.value
    for label in scene.labels:
        tens, units = label.text[:-1], label.text[-1]
        labels[label.cell, 2] = 1 + int(tens) if tens else 0
        labels[label.cell, 3] = 11 if units == "x" else 1 + int(units)
    return labels


def side_cells(triangle: int) -> tuple[int, int, int]:
    """Where a triangle's sides are labelled: the middles of two, the foot of the altitude on the base.

    No two lie side by side, so that numbers do not run together.
    """
    apex, left, right = (divmod(cell, GRID) for cell in TRIANGLES[triangle])
    foot = (left[0], apex[1]) if left[0] == right[0] else (apex[0], left[1])
    middles = [tuple(_between(p, q) for p, q in zip(apex, end, strict=True)) for end in (left, right)]
    first, second, third = (row * GRID + column for row, column in (*middles, foot))
    return first, second, third


def _between(i: int, j: int) -> int:
    """The middle of two rows or columns, on a tie the outer one."""
    return (i + j + 1) // 2 if i + j >= GRID - 1 else (i + j) // 2


def _cell(array: np.ndarray, cell: int) -> np.ndarray:
    """The view of one cell's pixels."""
    y, x = divmod(cell, GRID)
    return array[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]


@lru_cache
def _canvas(triangle: int | None) -> np.ndarray:
    """The background, with a triangle's outline 2 pixels wide."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.uint8)
    if triangle is not None:
        a, b, c = (divmod(cell, GRID) for cell in TRIANGLES[triangle])
        for start, end in ((a, b), (a, c), (b, c)):
            for t in np.linspace(0, 1, 2 * IMAGE_SIZE):
                y, x = (round(CELL * (s + t * (e - s) + 0.5)) for s, e in zip(start, end, strict=True))
                canvas[y - 1 : y + 1, x - 1 : x + 1] = LINE
    return canvas


@lru_cache
def _shape_mask(shape: int, dx: int, dy: int) -> np.ndarray:
    """[16, 16] bool of a shape 12 pixels across."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    y, x = y - dy, x - dx
    inside = (abs(x) < 6) & (abs(y) < 6)
    name = SHAPES[shape]
    if name == "circle":
        return x * x + y * y < 36
    if name == "triangle":
        return inside & (abs(x) <= (y + 6.5) / 2)
    if name == "cross":
        return inside & ((abs(x) < 2) | (abs(y) < 2))
    return inside  # square


@lru_cache(maxsize=2048)
def _text_mask(text: str, dx: int, dy: int) -> np.ndarray:
    """[16, 16] bool of at most two characters, each 6 × 10 pixels in its own half; one alone takes the right half."""
    mask = np.zeros((CELL, CELL), bool)
    for character, x in zip(reversed(text), (9, 1), strict=False):
        bits = np.array([[row >> (2 - i) & 1 for i in range(3)] for row in _FONT[character]], bool)
        glyph = bits.repeat(2, axis=0).repeat(2, axis=1)
        mask[3 + dy : 13 + dy, x + dx : x + dx + 6] = glyph
    return mask
