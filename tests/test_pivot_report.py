"""PIVOT's figures over questions and over places of the cross, by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tools.pivot_report import (
    FAMILIES,
    SIZES_OF_SPLITS,
    Cell,
    Results,
    adjusted,
    answers,
    draw_gaps,
    families,
    gap,
    report,
    shown_gap,
    slope,
)

PLACES = ("1x, 40% new", "1x, 80% new", "1x, none new", "2x, 40% new", "1/4x, 40% new")


def write_answers(folder: Path, right: dict[str, float], twins: float) -> None:
    """Evaluations in which the first `right[family]` of a split's questions of each family are right."""
    for split in SIZES_OF_SPLITS:
        by_family: dict[str, list[int]] = {}
        for index, family in enumerate(families(split)):
            by_family.setdefault(family, []).append(index)
        where = folder / "evaluations" / split / "step-0"
        where.mkdir(parents=True)
        lines = [
            json.dumps({"id": f"world-{split}-0-{index}", "score": float(n < right[family] * len(indices))})
            for family, indices in by_family.items()
            for n, index in enumerate(indices)
        ]
        (where / "per_example.jsonl").write_text("\n".join(lines) + "\n")
    where = folder / "evaluations" / "twins" / "step-0"
    where.mkdir(parents=True)
    (where / "scores.json").write_text(json.dumps({"pairs": twins}))
    (folder / "test.json").write_text("{}")


def test_answers_are_grouped_by_what_they_ask_for(tmp_path):
    """Seeing is count, captions and one bar's value; the rest calculates."""
    right = {"count": 0.5, "caption": 1.0, "bars value": 0.0, "bars sum": 0.0, "angle": 1.0, "perimeter": 0.5}
    write_answers(tmp_path, right, twins=0.25)
    found = answers(tmp_path)
    assert found["seeing"] == pytest.approx(50, abs=0.5) and found["calculating"] == pytest.approx(50, abs=0.5)
    assert found["seeing, new"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3, abs=0.5)
    assert found["calculating, new"] == pytest.approx(75, abs=0.5) and found["twins"] == 25
    assert [round(found[family] / 100, 1) for family in FAMILIES] == [right[family] for family in FAMILIES]


def test_gap_is_the_paired_t():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t(2) at 97.5 % = 4.303 → ± 2.484; p = .074."""
    found = gap([2, 4, 6], [1, 2, 3])
    assert found.values == (1, 2, 3) and found.mean == 2
    assert found.high - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert shown_gap(found, 0.0742) == "+2.0 [-0.5, +4.5] n.d." and shown_gap(found, 0.01).startswith("**")
    alone = gap([3.0], [1.0])
    assert alone.mean == 2 and math.isnan(alone.p) and shown_gap(alone, math.nan) == "+2.0"


def test_adjustment_and_slope():
    """Holm over the comparisons that have a test; least squares through (0, 1), (1, 3), (2, 5) has slope 2."""
    tested, untested = gap([2, 4, 6], [1, 2, 3]), gap([1.0], [0.0])
    assert adjusted([tested, untested])[0] == pytest.approx(tested.p) and math.isnan(adjusted([tested, untested])[1])
    assert adjusted([tested, tested])[0] == pytest.approx(2 * tested.p)
    assert slope([0, 1, 2], [1, 3, 5]) == 2


def study(root: Path) -> SimpleNamespace:
    """What stands for a graph: two seeds, but one of the untouched model of stage 2; all of it done."""
    arms = [{"arm": "untouched"}, *({"arm": arm, "triples": place} for place in PLACES for arm in ("SFT", "DPO"))]
    runs = []
    for stage in ("test-fresh", "test-post"):
        for number, at in enumerate(arms):
            for seed in (0, 1) if "triples" in at or stage == "test-fresh" else (None,):
                folder = root / f"{stage}-{number}-{seed}"
                folder.mkdir()
                (folder / "stage.json").write_text(json.dumps({"fingerprint": "f", "state": "done"}))
                runs.append(SimpleNamespace(stage=stage, at=at, seed=seed, folder=folder, fingerprint="f", output=None))
    spec = SimpleNamespace(axes={"seed": {"0": 0, "1": 1}}, run_dir=root)
    return SimpleNamespace(spec=spec, runs=runs, at=lambda stage: [run for run in runs if run.stage == stage])


def test_cells_are_read_from_places_of_the_axes():
    assert Cell.of(SimpleNamespace(at={"arm": "untouched"})) == Cell("untouched")
    assert Cell.of(SimpleNamespace(at={"arm": "DPO", "triples": "1/2x, 40% new"})) == Cell("DPO", 0.5, 0.4)
    assert Cell.of(SimpleNamespace(at={"arm": "SFT", "triples": "2x, none new"})) == Cell("SFT", 2.0, 0.0)


def test_tables_by_hand(tmp_path):
    """DPO − SFT is 10 points of seeing everywhere, and 5 more per doubling of the triples; twins are equal."""
    base = {"count": 0.5, "caption": 0.5, "bars value": 0.5, "bars sum": 0.5, "angle": 0.5, "perimeter": 0.5}
    graph = study(tmp_path)
    for run in graph.runs:
        cell = Cell.of(run)
        more = 0.1 + 0.05 * math.log2(cell.amount) if cell.arm == "DPO" else 0.0
        write_answers(run.folder, base | dict.fromkeys(("count", "caption", "bars value"), 0.5 + more), twins=0.3)
    (graph.runs[-1].folder / "stage.json").write_text("{}")  # not done: left out
    results = Results(graph)
    text = report(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.split("## The model of stage 2")[0].splitlines()}
    for row, gap_of_seeing in (
        ("1×, share 0", 10),
        ("change per doubling of triples", 5),
        ("change per .4 of share", 0),
    ):
        seeing, calculating, *_, twins = (float(c) for c in rows[row].strip("| ").split(" | ")[1:])
        assert seeing == pytest.approx(gap_of_seeing, abs=0.5) and calculating == twins == 0
    assert "mean over 5 cells with 2 seeds" in rows
    assert rows["DPO, 1×, share 0"].startswith("| DPO, 1×, share 0 | +10")
    assert results.values["new model"][Cell("DPO", 1.0, 0.0)][1]["seeing"] == pytest.approx(60, abs=0.5)
    assert results.seeds("vlm", Cell("untouched")) == [0, 1]  # one model beside both seeds
    assert results.seeds("vlm", Cell("DPO", 0.25, 0.4)) == [0]
    draw_gaps(results, tmp_path / "gaps.png")
    shown = np.asarray(Image.open(tmp_path / "gaps.png").convert("RGB"))
    assert shown.shape[1] > 500 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 20
