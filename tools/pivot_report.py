"""What study/world-pivot leaves, summed up over questions and over places of its cross; beside the study's own report.

    python -m tools.pivot_report [study/world-pivot] [--run_dir DIR] [--seeds 0 1 2]

The study's report compares arms at each place, by family of questions. Here families are put together by what they ask
for (`ANSWERS`), and DPO − SFT is followed over amounts and shares of triples: the tables of docs/pivot.md. They go to
run_dir/report/pivot.md, figures to pivot.json, DPO − SFT as a picture to pivot-gaps.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lightning_vlm.data.world import WorldSource
from lightning_vlm.metrics.statistics import holm, mean_interval, paired_t
from lightning_vlm.studies.graph import Graph, Run
from lightning_vlm.studies.spec import read_spec
from lightning_vlm.studies.state import state_of

SIZES_OF_SPLITS = {"test": 1280, "ood_pairs": 192, "ood_numbers": 192, "ood_two_attributes": 192}
READING = {"count", "caption", "bars value"}  # what is seen is the answer; the rest calculates with what is seen
FAMILIES = ("count", "caption", "bars value", "bars sum", "angle", "perimeter")
ANSWERS = {
    "seeing": "count, captions, one bar's value: mean of the three, %",
    "calculating": "sums and differences of bars, angles, perimeters: mean of the three, %",
    "seeing, new": "the new distribution: captions and counts of held-out pairs, counts by two attributes, %",
    "calculating, new": "the new distribution: angles and perimeters with held-out numbers, %",
    "twins": "pairs of twins of which both are right, %",
}


def family_of(question: str, family: str) -> str:
    """Bars apart by what is asked: reading one, or calculating."""
    return family if family != "bars" else "bars value" if question == "value" else "bars sum"


@lru_cache
def families(split: str) -> tuple[str, ...]:
    """Family of each question of a split's evaluation, bars apart."""
    source = WorldSource(split=split, size=SIZES_OF_SPLITS[split])
    return tuple(family_of(sample.info["question"], sample.info["family"]) for sample in source)


def answers(folder: Path) -> dict[str, float]:
    """Figures of one evaluation by `experiment/world-pivot-test`, %: of `ANSWERS`, and of `FAMILIES` in domain."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for split in SIZES_OF_SPLITS:
        for line in next((folder / "evaluations" / split).glob("step-*/per_example.jsonl")).read_text().splitlines():
            record = json.loads(line)
            family = families(split)[int(record["id"].rpartition("-")[2])]
            scores[split][family].append(100 * record["score"])
    means = {split: {family: statistics.fmean(v) for family, v in found.items()} for split, found in scores.items()}
    inside = means["test"]
    twins = json.loads(next((folder / "evaluations" / "twins").glob("step-*/scores.json")).read_text())
    new = [means["ood_pairs"]["caption"], means["ood_pairs"]["count"], means["ood_two_attributes"]["count"]]
    return {
        "seeing": statistics.fmean(inside[f] for f in FAMILIES if f in READING),
        "calculating": statistics.fmean(inside[f] for f in FAMILIES if f not in READING),
        "seeing, new": statistics.fmean(new),
        "calculating, new": statistics.fmean(means["ood_numbers"].values()),
        "twins": 100 * twins["pairs"],
        **{family: inside[family] for family in FAMILIES},
    }


@dataclass(frozen=True)
class Gap:
    """DPO − SFT, seed by seed.

    Attributes:
        values: one difference per seed. mean, low, high: over seeds, low and high NaN where there are fewer than two
            seeds or no spread. p: of no difference, two-sided; NaN as the interval.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float


def gap(dpo: Sequence[float], sft: Sequence[float]) -> Gap:
    """The difference of two arms whose runs come in pairs, seed by seed."""
    values = tuple(a - b for a, b in zip(dpo, sft, strict=True))
    if len(values) < 2:
        return Gap(values, values[0], math.nan, math.nan, math.nan)
    found = paired_t(dpo, sft)
    return Gap(values, found.diff, found.low, found.high, found.p)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x."""
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


@dataclass(frozen=True)
class Cell:
    """An arm at a place of the cross.

    Attributes:
        arm: `untouched`, `SFT` or `DPO`.
        amount: triples of stage 2, as a multiple of 640. share: of them that are of the new distribution.
    """

    arm: str
    amount: float = 0.0
    share: float = 0.0

    @classmethod
    def of(cls, run: Run) -> Cell:
        """The cell of a run, `1/2x, 40% new` read as half the triples and a share of .4."""
        if "triples" not in run.at:
            return cls(run.at["arm"])
        amount, share = run.at["triples"].removesuffix(" new").split(", ")
        top, _, bottom = amount.removesuffix("x").partition("/")
        part = 0.0 if share == "none" else float(share.rstrip("%")) / 100
        return cls(run.at["arm"], int(top) / int(bottom or 1), part)


class Results:
    """What the runs of a study say.

    Args:
        graph: of the study; runs that are not done are left out.

    Attributes:
        values: kind (`new model`, `vlm`) → cell → seed → figures by column. cells: in order of the study.
    """

    def __init__(self, graph: Graph) -> None:
        self.values: dict[str, dict[Cell, dict[int, dict[str, float]]]] = {}
        seeds = list(graph.spec.axes["seed"].values())
        for kind, stage in (("new model", "test-fresh"), ("vlm", "test-post")):
            for run in graph.at(stage):
                if state_of(run) == "done":
                    found = answers(run.folder)
                    # An untouched model of stage 2 has no seed: it stands beside each of the others'.
                    for seed in seeds if run.seed is None else [run.seed]:
                        self.values.setdefault(kind, {}).setdefault(Cell.of(run), {})[seed] = found
        self.cells = list(dict.fromkeys(Cell.of(run) for run in graph.at("test-fresh")))

    def seeds(self, kind: str, *cells: Cell) -> list[int]:
        """Seeds that have all these cells."""
        found = [set(self.values.get(kind, {}).get(cell, {})) for cell in cells]
        return sorted(set.intersection(*found)) if found else []

    def of(self, kind: str, cell: Cell, column: str, seeds: Sequence[int]) -> list[float]:
        """A column of a cell, seed by seed."""
        return [self.values[kind][cell][seed][column] for seed in seeds]

    def pairs(self, kind: str) -> list[tuple[Cell, Cell]]:
        """(DPO, SFT) cells of the same triples with a seed in common, by share and amount."""
        by_arm = {arm: {(c.amount, c.share): c for c in self.cells if c.arm == arm} for arm in ("DPO", "SFT")}
        at = sorted(by_arm["DPO"], key=lambda place: (place[1], place[0]))
        both = [(by_arm["DPO"][place], by_arm["SFT"][place]) for place in at]
        return [pair for pair in both if self.seeds(kind, *pair)]


def shown(values: Sequence[float]) -> str:
    """Mean and half the 95 % t-interval over seeds."""
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 1 else 2
    if len(values) < 2 or min(values) == max(values):
        return f"{mean:.{digits}f}"
    low, high = mean_interval(values)
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def shown_gap(found: Gap, adjusted: float) -> str:
    """`+1.2 [−3.0, 5.4] n.d.`; bold where it is told apart from 0 after Holm's adjustment."""
    digits = 2 if 0 < max(map(abs, found.values)) < 1 else 1
    text = f"{found.mean:+.{digits}f}"
    if math.isnan(found.low):
        return text
    text += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if adjusted <= 0.05 else f"{text} n.d."


def adjusted(gaps: Sequence[Gap]) -> list[float]:
    """Holm's adjusted p over all comparisons of a column; NaN where there is no test."""
    known = [g.p for g in gaps if not math.isnan(g.p)]
    found = iter(holm(known)) if known else iter(())
    return [math.nan if math.isnan(g.p) else next(found) for g in gaps]


def means_table(results: Results, kind: str, columns: Sequence[str]) -> str:
    """Markdown: one row per cell."""
    lines = ["| arm | triples | share new | " + " | ".join(columns) + " | seeds |", "|---" * (len(columns) + 4) + "|"]
    for cell in results.cells:
        if seeds := results.seeds(kind, cell):
            told = ("", "") if cell.arm == "untouched" else (f"{cell.amount:g}×", f"{cell.share:g}")
            cells = [shown(results.of(kind, cell, column, seeds)) for column in columns]
            lines.append("| " + " | ".join((cell.arm, *told, *cells, str(len(seeds)))) + " |")
    return "\n".join(lines) + "\n"


def gaps_table(
    results: Results, kind: str, columns: Sequence[str], rows: Sequence[tuple[str, Cell, Cell]]
) -> list[str]:
    """Markdown lines: (label, a, b) → a − b over the seeds that both have, p adjusted over the rows of a column."""
    found = {column: [between(results, kind, a, b, column) for _, a, b in rows] for column in columns}
    corrected = {column: adjusted(gaps) for column, gaps in found.items()}
    return [
        f"| {label} | " + " | ".join(shown_gap(found[c][i], corrected[c][i]) for c in columns) + " |"
        for i, (label, _, _) in enumerate(rows)
    ]


def between(results: Results, kind: str, a: Cell, b: Cell, column: str) -> Gap:
    """a − b of a column over the seeds that both have."""
    seeds = results.seeds(kind, a, b)
    return gap(*(results.of(kind, cell, column, seeds) for cell in (a, b)))


def trends(results: Results, kind: str, columns: Sequence[str]) -> list[str]:
    """Markdown lines: mean of DPO − SFT over the cells that have all seeds, and its slopes.

    p is adjusted over all rows and columns.
    """
    pairs = results.pairs(kind)
    if not pairs:
        return []
    seeds = max((results.seeds(kind, *pair) for pair in pairs), key=len)
    pairs = [pair for pair in pairs if results.seeds(kind, *pair) == seeds]
    rows: dict[str, list[Gap]] = {}
    for column in columns:
        at = {(dpo.amount, dpo.share): between(results, kind, dpo, sft, column).values for dpo, sft in pairs}
        amounts, shares = [a for a, s in at if s == 0.4], [s for a, s in at if a == 1.0]
        doublings = [math.log2(a) for a in amounts]
        mean = [statistics.fmean(v) for v in zip(*at.values(), strict=True)]
        by_seed = {f"mean over {len(at)} cells with {len(seeds)} seeds": mean}
        if len(amounts) > 1:
            values = zip(*(at[a, 0.4] for a in amounts), strict=True)
            by_seed["change per doubling of triples"] = [slope(doublings, v) for v in values]
        if len(shares) > 1:
            values = zip(*(at[1.0, s] for s in shares), strict=True)
            by_seed["change per .4 of share"] = [0.4 * slope(shares, v) for v in values]
        for label, own in by_seed.items():
            rows.setdefault(label, []).append(gap(own, [0.0] * len(own)))
    corrected = iter(adjusted([g for gaps in rows.values() for g in gaps]))
    return [
        f"| {row} | " + " | ".join(shown_gap(g, next(corrected)) for g in gaps) + " |" for row, gaps in rows.items()
    ]


def _place(cell: Cell) -> str:
    return f"{cell.amount:g}×, share {cell.share:g}"


def report(results: Results) -> str:
    """All tables, as Markdown."""
    parts, names = [], list(ANSWERS)
    for kind, title in (
        ("new model", "The new model on the encoder of each arm"),
        ("vlm", "The model of stage 2 itself"),
    ):
        if kind not in results.values:
            continue
        pairs = [(_place(dpo), dpo, sft) for dpo, sft in results.pairs(kind)]
        base = Cell("untouched")
        start = [
            (f"{cell.arm}, {_place(cell)}", cell, base)
            for cell in results.cells
            if cell != base and results.seeds(kind, cell, base)
        ]
        rule = "|---" * (len(names) + 1) + "|"
        parts += [f"## {title}", means_table(results, kind, names)]
        lines = gaps_table(results, kind, names, pairs) + trends(results, kind, names)
        parts += ["\n".join(["| DPO − SFT | " + " | ".join(names) + " |", rule, *lines])]
        lines = gaps_table(results, kind, names, start)
        parts += ["\n".join(["| arm − untouched | " + " | ".join(names) + " |", rule, *lines])]
    parts += ["\n".join(f"- {name}: {meaning}" for name, meaning in ANSWERS.items())]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def draw_gaps(results: Results, out: Path) -> None:
    """DPO − SFT of the new model against triples and share: a panel per column, dots are seeds, bars 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ("seeing", "calculating", "seeing, new", "twins")
    main = results.pairs("new model")
    figure = Figure(figsize=(2.4 * len(columns), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), sharey="col", squeeze=False)
    for row, label in enumerate(("triples (share of new .4)", "share of new (triples 1×)")):
        pairs = [pair for pair in main if (pair[0].share == 0.4 if row == 0 else pair[0].amount == 1.0)]
        for column, ax in zip(columns, axes[row], strict=True):
            for place, (dpo, sft) in enumerate(pairs):
                found = between(results, "new model", dpo, sft, column)
                ax.plot([place] * len(found.values), found.values, ".", color="#999999", markersize=4)
                error = None if math.isnan(found.low) else [[found.mean - found.low], [found.high - found.mean]]
                ax.errorbar([place], [found.mean], yerr=error, fmt="o", color="#0072B2", markersize=5, capsize=3)
            ax.axhline(0, color="black", linewidth=0.6)
            told = [f"{dpo.amount:g}×" if row == 0 else f"{dpo.share:g}" for dpo, _ in pairs]
            ax.set_xticks(range(len(pairs)), told)
            ax.set_xlabel(label, fontsize=8)
            ax.tick_params(labelsize=7)
            if row == 0:
                ax.set_title(column, fontsize=9)
        axes[row, 0].set_ylabel("DPO − SFT, points", fontsize=8)
    figure.savefig(out, dpi=80)


def main() -> int:
    """Read the study, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="study/world-pivot", help="default study/world-pivot")
    parser.add_argument("--run_dir", help="of the study, if not its own")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the study, if not its own")
    args = parser.parse_args()
    given = {"run_dir": args.run_dir, "axes.seed": args.seeds}
    graph = Graph(read_spec(args.study, [(key, value) for key, value in given.items() if value is not None]))
    results, out = Results(graph), graph.spec.run_dir / "report"
    if not results.values:
        print(f"error: nothing of {args.study} is done in {graph.spec.run_dir}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    text = report(results)
    (out / "pivot.md").write_text(text)
    figures = {kind: [{**vars(c), "seeds": own} for c, own in found.items()] for kind, found in results.values.items()}
    (out / "pivot.json").write_text(json.dumps(figures, indent=1) + "\n")
    if results.pairs("new model"):
        draw_gaps(results, out / "pivot-gaps.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
