"""What a distilled data set looks like: lengths by thirds of the penalty, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_vlm.distill.scorers import NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THIRDS = ("low P", "middle P", "high P")


class Lengths(NamedTuple):
    """Statistics of some records.

    Attributes:
        n: records. penalty: mean P. own: mean and own_median: median tokens of the model's first chains.
        tokens: mean tokens of what is to be learned. right: share of first chains judged right and whole.
    """

    n: int
    penalty: float
    own: float
    own_median: float
    tokens: float
    right: float


def thirds(penalties: Sequence[float]) -> list[str]:
    """The third of the records that each belongs to by its penalty; equal penalties stay together.

    Bounds are the values at ranks n/3 and 2n/3, each belonging to the third below; a third may be empty.
    """
    ordered = sorted(penalties)
    low, high = (ordered[max(0, -(-len(ordered) * k // 3) - 1)] for k in (1, 2))
    return [THIRDS[(value > low) + (value > high)] for value in penalties]


def length_table(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Lengths]:
    """(third of P, family) → statistics; family `all`, and each one that there is where there are several."""
    places = thirds([record["penalty"] for record in records])
    families = sorted({str(record.get("family", "")) for record in records} - {""})
    table = {}
    for third in THIRDS:
        own = [record for record, place in zip(records, places, strict=True) if place == third]
        for family in ("all", *(families if len(families) > 1 else ())):
            some = [record for record in own if family in ("all", record.get("family"))]
            if some:
                table[third, family] = _lengths(some)
    return table


def _lengths(records: Sequence[dict[str, Any]]) -> Lengths:
    return Lengths(
        len(records),
        fmean(record["penalty"] for record in records),
        fmean(record["own_tokens"] for record in records),
        median(record["own_tokens"] for record in records),
        fmean(record["tokens"] for record in records),
        fmean(record["rewritten"] is None for record in records),
    )


def length_picture(records: Sequence[dict[str, Any]]) -> Figure:
    """Length against penalty: the model's own chains, right and wrong, and what is learned; medians by thirds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2, sharey=True)
    places = thirds([record["penalty"] for record in records])
    kinds = (("kept", lambda r: r["rewritten"] is None, "tab:blue"), ("rewritten", lambda r: r["rewritten"], "tab:red"))
    for axis, column, title in zip(axes, ("own_tokens", "tokens"), ("the model's own", "to be learned"), strict=True):
        for name, test, colour in kinds:
            some = [record for record in records if test(record)]
            axis.scatter(
                [r["penalty"] for r in some], [r[column] for r in some], s=9, alpha=0.5, color=colour, linewidths=0,
                label=f"{name} ({len(some)})",
            )  # fmt: skip
        for third in THIRDS:
            some = [record for record, place in zip(records, places, strict=True) if place == third]
            if some:
                span = [min(r["penalty"] for r in some), max(r["penalty"] for r in some)]
                axis.plot(span, [median(r[column] for r in some)] * 2, color="black", linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("repetition penalty P", fontsize=9)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("tokens (bars: medians by thirds of P)", fontsize=9)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Length of {len(records):,} chains", fontsize=11)
    return figure


def score_picture(records: Sequence[dict[str, Any]]) -> Figure:
    """Histograms of the five scores, of P, and of the reward score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained", dpi=150)
    axes = figure.subplots(2, 4).flatten()
    shown = [(name, [record["scores"][name] for record in records], (0.0, 1.0)) for name in NAMES]
    shown.append(("P", [record["penalty"] for record in records], (1.0, 2.0)))
    rated = [record["score"] for record in records if record["score"] is not None]
    shown.append(("reward score", rated, (0.0, 5.0)))
    for axis, (name, values, span) in zip(axes, shown, strict=False):
        axis.hist(values, bins=20, range=span, color="tab:blue")
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=7)
    axes[-1].axis("off")
    axes[0].set_ylabel("samples", fontsize=9)
    figure.suptitle(f"Scores of {len(records):,} samples (the five: min-max over the data)", fontsize=11)
    return figure
