"""Pictures of a learning-dynamics record: one per quantity, over optimizer steps, with 95 % bands over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Line = dict[str, Any]

# Colours of Okabe & Ito, which colour-blind readers can tell apart; dashes and markers say the same once more.
_STYLES: dict[str, tuple[str, str, str, str]] = {
    "chosen": ("chosen", "#0072B2", "-", "o"),
    "rejected": ("rejected", "#D55E00", "-", "s"),
    "paraphrase": ("paraphrase of the chosen", "#009E73", "--", "^"),
    "irrelevant": ("another image's chosen", "#E69F00", "--", "v"),
    "permutation": ("chosen words permuted", "#CC79A7", ":", "D"),
    "argmax": ("most likely token at each place", "#000000", "-.", "x"),
    "tv": ("total variation (0 to 1)", "#0072B2", "-", "o"),
    "js": ("Jensen–Shannon (nats, at most ln 2)", "#D55E00", "--", "s"),
    "ece": ("tokens", "#0072B2", "-", "o"),
    "answer_ece": ("greedy answers", "#D55E00", "--", "s"),
    "preference": ("mean preference a", "#0072B2", "-", "o"),
    "vulnerable": ("share of pairs with a in [.8, .99]", "#D55E00", "--", "s"),
}
_TEXTS = ("chosen", "rejected", "paraphrase", "irrelevant", "permutation", "argmax")
_PLAIN = ("", "#0072B2", "-", "o")
_GREY = "#777777"


def draw(lines: Sequence[Line], folder: Path, *, title: str) -> list[Path]:
    """Draw what the lines hold.

    Args:
        lines: of `summary.jsonl`, in order of their steps. folder: gets the files, created where it is missing.
        title: name of the probe.

    Returns:
        The PNG files.
    """
    if not lines:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Figure], None]] = {
        "logprobs": lambda figure: _logprobs(figure, lines),
        "squeezing": lambda figure: _squeezing(figure, lines),
        "entropy": lambda figure: _single(figure, lines, "entropy", "entropy along the chosen", "nats per token"),
        "top1": lambda figure: _single(figure, lines, "top1", "top-1 probability along the chosen", "probability"),
    }
    if "tv" in lines[0]:
        pictures["divergence"] = lambda figure: _divergence(figure, lines)
    pictures["calibration"] = lambda figure: _calibration(figure, lines)
    if "reward_margin" in lines[0]:
        pictures["preference"] = lambda figure: _preference(figure, lines)
    paths = []
    for name, fill in pictures.items():
        figure = Figure(layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        fill(figure)
        figure.suptitle(f"{title}: {figure.get_suptitle()}", fontsize=12)
        paths.append(folder / f"{name}.png")
        temporary = folder / f".{name}.tmp.png"
        figure.savefig(temporary)
        temporary.replace(paths[-1])
    return paths


def _logprobs(figure: Figure, lines: Sequence[Line]) -> None:
    figure.set_size_inches(11.5, 5.2)
    figure.suptitle("mean log-probability per token")
    left, right = figure.subplots(1, 2)
    names = [name for name in _TEXTS if name in lines[0]]
    for name in names:
        _curve(left, lines, name, name)
        _curve(right, lines, f"{name}_since_start", name)
    _axis(left, "value", "nats per token")
    _axis(right, "change since the start of the stage", "nats per token")
    right.axhline(0, color=_GREY, linewidth=0.8, zorder=0)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _squeezing(figure: Figure, lines: Sequence[Line]) -> None:
    """The two curves that part under squeezing, on a scale of their own."""
    figure.set_size_inches(6.4, 4.8)
    figure.suptitle("chosen against most likely tokens")
    axes = figure.subplots()
    for name in ("argmax", "chosen"):
        _curve(axes, lines, name, name)
    steps = [line["step"] for line in lines]
    bounds = ([line[name] for line in lines] for name in ("chosen", "argmax"))
    axes.fill_between(steps, *bounds, facecolor="none", edgecolor=_GREY, hatch="///", alpha=0.25, linewidth=0)
    _axis(axes, "squeezing: the chosen fall, the most likely tokens do not", "nats per token")
    axes.set_ylim(top=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _single(figure: Figure, lines: Sequence[Line], name: str, title: str, unit: str) -> None:
    figure.set_size_inches(6.4, 4.2)
    figure.suptitle(title)
    axes = figure.subplots()
    _curve(axes, lines, name, None)
    _axis(axes, "", unit)
    _from_zero(axes)


def _divergence(figure: Figure, lines: Sequence[Line]) -> None:
    figure.set_size_inches(6.4, 4.6)
    figure.suptitle("distance of next-token distributions from the start")
    axes = figure.subplots()
    for name in ("tv", "js"):
        _curve(axes, lines, name, name)
    _axis(axes, "token mean along the chosen", "TV, and JS in nats")
    _from_zero(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _calibration(figure: Figure, lines: Sequence[Line]) -> None:
    kinds = [kind for kind in ("tokens", "answers") if kind in lines[0]["reliability"]]
    figure.set_size_inches(5.2 * (1 + len(kinds)), 4.8)
    figure.suptitle("calibration")
    over_steps, *diagrams = figure.subplots(1, 1 + len(kinds))
    for name in ("ece", "answer_ece"):
        if name in lines[0]:
            _curve(over_steps, lines, name, name)
    _axis(over_steps, "expected calibration error, 15 bins", "fraction")
    _from_zero(over_steps)
    if len(kinds) > 1:
        over_steps.legend(framealpha=0.7, edgecolor="none")
    words = {"tokens": "top token along the chosen", "answers": "greedy answer"}
    for axes, kind in zip(diagrams, kinds, strict=True):
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, label="perfect calibration")
        ends = [(lines[0], "#0072B2", "-", "o"), (lines[-1], "#D55E00", "--", "s")][: len(lines)]
        for line, colour, dash, marker in ends:
            curve = line["reliability"][kind]
            # Area says how many tokens or answers a bin holds; thin bins wobble.
            total = sum(curve["count"])
            areas = [12 + 160 * count / total for count in curve["count"]]
            axes.plot(curve["confidence"], curve["accuracy"], dash, color=colour, linewidth=1.2)
            axes.scatter(curve["confidence"], curve["accuracy"], areas, colour, marker, alpha=0.7)
            axes.plot([], [], dash, color=colour, marker=marker, label=f"step {line['step']}")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="confidence", ylabel="share that is right")
        axes.set_title(f"{words[kind]} (area: how many)", fontsize=10)
        axes.grid(alpha=0.25)
    handles, labels = diagrams[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, frameon=False)


def _preference(figure: Figure, lines: Sequence[Line]) -> None:
    known = [line for line in lines if "cooling_weight" in line]
    figure.set_size_inches(15 if known else 10.5, 4.6)
    figure.suptitle("pairs of chosen and rejected, against the start of the stage")
    margin, preference, *cooling = figure.subplots(1, 3 if known else 2)
    _curve(margin, lines, "reward_margin", None)
    margin.axhline(0, color=_GREY, linewidth=0.8, zorder=0)
    _axis(margin, "implied reward margin β(Δ chosen − Δ rejected)", "β · nats")
    for name in ("preference", "vulnerable"):
        _curve(preference, lines, name, name)
    preference.axhline(0.5, color=_GREY, linewidth=0.8, zorder=0)
    _axis(preference, "preference a = σ(margin), and the vulnerable zone", "fraction")
    preference.set_ylim(-0.03, 1.03)
    preference.legend(framealpha=0.7, edgecolor="none", loc="upper left")
    for axes in cooling:
        _curve(axes, known, "cooling_weight", None)
        _axis(axes, "mean cooling weight of the rejected", "weight (1: full gradient, 0: none)")
        axes.set_ylim(-0.03, 1.03)


def _curve(axes: Axes, lines: Sequence[Line], name: str, style: str | None) -> None:
    """Values over steps, with their intervals as a band."""
    label, colour, dash, marker = _PLAIN if style is None else _STYLES[style]
    steps, values = [line["step"] for line in lines], [line[name] for line in lines]
    every = max(1, math.ceil(len(lines) / 12))
    axes.plot(steps, values, dash, color=colour, marker=marker, markersize=4.5, markevery=every, label=label or None)
    bounds = [line["intervals"].get(name) for line in lines]
    if all(bounds):
        low, high = zip(*bounds, strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)


def _axis(axes: Axes, title: str, unit: str) -> None:
    axes.set(xlabel="optimizer step", ylabel=unit)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def _from_zero(axes: Axes) -> None:
    """Quantities with a natural zero are shown from it, so that small changes look small."""
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
