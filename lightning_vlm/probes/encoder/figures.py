"""Pictures of what probes found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten, wrap
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_vlm.data.images import load_image

from .alignment import AlignmentResult
from .data import ProbeData
from .gradients import GradientMaps
from .linear import LinearResult
from .segmentation import SegmentationResult
from .updates import Update

_PARTS = {"vision": "#3b6ea8", "projector": "#d98032", "language": "#4f8f4f", "head": "#8a5aa8"}
_NUMBERED = 30  # classes up to which a confusion matrix names them


def gradient_figure(columns: Mapping[str, GradientMaps], *, rows: int = 8) -> Figure:
    """Pictures with their gradient maps side by side, a column per model.

    The objects that are asked about are outlined in every map; maps of one row share their colours, each map scaled to
    a sum of one, so that they show where rather than how much.

    Args:
        columns: name of each model → its maps of the same samples. rows: most samples shown, taken evenly.

    Raises:
        ValueError: no maps, or maps of different samples.
    """
    names = list(columns)
    if not names or any(
        [s.id for s in maps.samples] != [s.id for s in columns[names[0]].samples] for maps in columns.values()
    ):
        raise ValueError("a picture of gradient maps needs maps of the same samples in each column")
    first = columns[names[0]]
    shown = np.unique(np.linspace(0, len(first.samples) - 1, min(rows, len(first.samples))).round().astype(int))
    across = 1 + len(names)
    figure = Figure(figsize=(2.1 * across + 2.6, 2.2 * len(shown) + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(len(shown), across, squeeze=False)
    for row, n in zip(axes, shown, strict=True):
        sample = first.samples[n]
        picture = load_image(sample.images[0])
        row[0].imshow(picture, interpolation="nearest")
        question = " ".join(part.get("text", "") for part in sample.prompt()[-1]["content"]).strip()
        words = f"{_lines(question)}\n→ {_lines(sample.chosen() or '')}"
        row[0].set_ylabel(words, rotation=0, ha="right", va="center", fontsize=7, labelpad=6)
        values = [_unit(columns[name].maps[n].numpy()) for name in names]
        top = max(float(v.max()) for v in values)
        for axis, name, value in zip(row[1:], names, values, strict=True):
            axis.imshow(value, cmap="magma", vmin=0, vmax=top, interpolation="nearest", extent=(0, 1, 1, 0))
            inside = columns[name].inside[n]
            energy = columns[name].energy[n]
            if inside is not None:
                _outline(axis, inside.numpy())
                axis.set_xlabel(f"{100 * energy:.0f} % inside", fontsize=8, labelpad=2)
            axis.set_aspect(picture.height / picture.width)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_title("picture", fontsize=9)
    for axis, name in zip(axes[0, 1:], names, strict=True):
        mean = columns[name].summary()["energy"]
        told = "" if mean is None else f"\n{100 * mean[0]:.0f} % inside, mean of all"
        axis.set_title(f"{shorten(name, 28)}{told}", fontsize=9)
    figure.suptitle("Where the answer's loss has its gradient (patches asked about outlined)", fontsize=10)
    return figure


def updates_figure(updates: Sequence[Update]) -> Figure:
    """‖after − before‖ / ‖before‖ of every part and block, as bars."""
    rows = [u for u in updates if np.isfinite(u.relative)]
    figure = Figure(figsize=(7, 1.2 + 0.21 * len(rows)), layout="constrained", dpi=110)
    axis = figure.subplots()
    for place, update in enumerate(rows):
        whole = update.block is None
        axis.barh(place, update.relative, color=_PARTS[update.part], alpha=1 if whole else 0.5, height=0.8)
        axis.text(update.relative, place, f" {update.relative:.2g}", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [name_of(u) for u in rows], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("‖after − before‖ / ‖before‖", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def name_of(update: Update) -> str:
    """`vision`, `vision block 3`, `vision, outside its blocks`."""
    if update.block is None:
        return update.part
    return f"{update.part}, outside its blocks" if update.block < 0 else f"{update.part} block {update.block}"


def linear_figure(result: LinearResult, name: str) -> Figure:
    """Confusion matrix of a linear probe: rows the true class, each summing to one."""
    place = {label: n for n, label in enumerate(result.classes)}
    counts = np.zeros((len(place), len(place)))
    for gold, said in zip(result.gold, result.predicted, strict=True):
        counts[place[gold], place[said]] += 1
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.6 + 0.2 * min(len(place), _NUMBERED)
    figure = Figure(figsize=(size + 1, size), layout="constrained", dpi=110)
    axis = figure.subplots()
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(place) <= _NUMBERED:
        axis.set_xticks(range(len(place)), result.classes, rotation=90, fontsize=7)
        axis.set_yticks(range(len(place)), result.classes, fontsize=7)
    axis.set_xlabel("told", fontsize=9)
    axis.set_ylabel("true class", fontsize=9)
    axis.set_title(f"{name}: {100 * result.accuracy:.1f} % right", fontsize=9)
    bar = figure.colorbar(shown, ax=axis, shrink=0.8)
    bar.set_label("share of a class's pictures", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def segmentation_figure(result: SegmentationResult, data: ProbeData, *, rows: int = 6) -> Figure:
    """Test pictures beside the labels their patches have and those the first probe gives them.

    Of several labels of a patch the probe's likeliest is shown, and of true ones the first.
    """
    ends = np.cumsum([h * w for h, w in result.data.grids])
    some = [n for n, end in enumerate(ends) if bool(result.data.present[end - 1].any())]
    shown = [some[int(n)] for n in np.unique(np.linspace(0, len(some) - 1, min(rows, len(some))).round())]
    figure = Figure(figsize=(8.2, 2.0 * len(shown) + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, n in zip(axes, shown, strict=True):
        h, w = result.data.grids[n]
        own = slice(ends[n] - h * w, ends[n])
        present = result.data.present[own]
        logits = result.logits[own].masked_fill(~present, -np.inf)
        gold = np.where(result.data.labels[own].any(1), result.data.labels[own].int().argmax(1), -1)
        said = np.where((logits > 0).any(1), logits.argmax(1), -1)
        there = np.flatnonzero(present[0].numpy())
        code = {-1: 0, **{int(c): 1 + i for i, c in enumerate(there)}}
        picture = load_image(data.test[n].image)
        row[0].imshow(picture, interpolation="nearest")
        for axis, labels in zip(row[1:], (gold, said), strict=True):
            values = np.vectorize(code.get)(labels).reshape(h, w)
            axis.imshow(values, cmap=_labels(len(code)), vmin=0, vmax=len(code) - 1, interpolation="nearest")
            axis.set_aspect(picture.height / picture.width * w / h)
        colours = _labels(len(code))
        keys = [Patch(color=colours(code[int(c)]), label=shorten(result.classes[c], 18)) for c in there]
        row[2].legend(handles=keys, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7, frameon=False)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ("picture", "labels of its patches", "what the probe says"), strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def alignment_figure(result: AlignmentResult) -> Figure:
    """How many samples share how many neighbours, and what chance would give."""
    figure = Figure(figsize=(5.2, 3), layout="constrained", dpi=110)
    axis = figure.subplots()
    counts = np.bincount((result.shares * result.k).round().astype(int), minlength=result.k + 1)
    axis.bar(range(result.k + 1), counts, color=_PARTS["vision"], width=0.8)
    for value, label, colour in ((result.score, "mean", "black"), (result.chance, "chance", _PARTS["projector"])):
        axis.axvline(value * result.k, color=colour, lw=1.2, ls="--", label=f"{label} {value * result.k:.2g}")
    axis.set_xlabel(f"common neighbours of {result.k}", fontsize=9)
    axis.set_ylabel(f"samples of {result.n}", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _labels(count: int) -> ListedColormap:
    """Colours of `count` values, the first a light grey for nothing."""
    own = [colormaps["tab20"]((n % 20) / 19.5) for n in range(count - 1)]
    return ListedColormap([(0.93, 0.93, 0.93, 1.0), *own])


def _unit(values: np.ndarray) -> np.ndarray:
    return values / max(float(values.sum()), 1e-300)


def _lines(text: str, width: int = 28) -> str:
    """At most three lines of a text."""
    lines = wrap(" ".join(text.split()), width) or [""]
    return "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")


def _outline(axis: Any, inside: np.ndarray) -> None:
    """The edges between patches inside and outside, in axes of the picture's unit square."""
    h, w = inside.shape
    padded = np.pad(inside, 1)
    for y, x in np.argwhere(inside):
        left, right, top, bottom = x / w, (x + 1) / w, y / h, (y + 1) / h
        for neighbour, xs, ys in (
            (padded[y, x + 1], (left, right), (top, top)),
            (padded[y + 2, x + 1], (left, right), (bottom, bottom)),
            (padded[y + 1, x], (left, left), (top, bottom)),
            (padded[y + 1, x + 2], (right, right), (top, bottom)),
        ):
            if not neighbour:
                axis.plot(xs, ys, color="#4fe0ff", lw=1.4, solid_capstyle="butt", clip_on=False)
