"""What tells arms apart in drawings, besides colour: eight dash patterns and eight markers.

Colours are CSS variables, `--s0` to `--s7` (`style.py`), so that a drawing follows the page into dark mode and print.
"""

from __future__ import annotations

from html import escape

COLOURS = 8
_DASHES = ("", "8 3", "10 3 2 3", "3 2.5", "14 4", "6 2 2 2 2 2", "5 5", "1.5 2.5")
# Around (0, 0), about 9 wide; `x` and `plus` are strokes.
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.7 -3.7h7.4v7.4h-7.4z",
    "M0 -4.8L4.6 3.4H-4.6z",
    "M0 -5L4.4 0L0 5L-4.4 0z",
    "M0 4.8L4.6 -3.4H-4.6z",
    "M-3.6 -3.6L3.6 3.6M-3.6 3.6L3.6 -3.6",
    "M-4.6 0H4.6M0 -4.6V4.6",
    "M-4.6 0L-2.3 -4H2.3L4.6 0L2.3 4H-2.3z",
)
_STROKES = (5, 6)


def classes(look: int) -> str:
    """CSS class of the colour."""
    return f"s{look % COLOURS}"


def dash(look: int) -> str:
    """The dash pattern as an attribute, or nothing; arms beyond the eighth share a colour, but not the dashes."""
    pattern = _DASHES[(look + look // COLOURS) % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def marker(look: int, x: float, y: float, *, hollow: bool = False, size: float = 1.0) -> str:
    """The arm's marker at a place of the drawing."""
    kind = look % COLOURS
    style = "mx" if kind in _STROKES else "mh" if hollow else "m"
    scaled = "" if size == 1 else f" scale({size:g})"
    return f'<path class="{style}" d="{_MARKERS[kind]}" transform="translate({x:.1f} {y:.1f}){scaled}"/>'


def swatch(look: int, *, dashed: bool | None = None) -> str:
    """A short piece of the arm's line, for legends.

    Args:
        look: of the arm. dashed: overrides the arm's own dashes where a chart shows one arm twice.
    """
    pattern = dash(look) if dashed is None else ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<svg class="swatch {classes(look)}" viewBox="0 0 38 14" width="38" height="14" aria-hidden="true">'
        f'<path class="line" d="M2 7H36"{pattern}/>{marker(look, 19, 7, hollow=bool(dashed))}</svg>'
    )


def attribute(text: str) -> str:
    """A text as the value of an attribute."""
    return escape(text, quote=True)
