"""The PIVOT study: its plan, the order and settings of its commands, what is skipped, its tables by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tools.pivot_probes
import tools.pivot_study
from lightning_vlm.config.files import load
from tools.pivot_probes import PROBED
from tools.pivot_report import (
    FAMILIES,
    SIZES_OF_SPLITS,
    Results,
    adjusted,
    answers,
    families,
    gap,
    report,
    shown_gap,
    slope,
)
from tools.pivot_study import Cell, Rates, Recipe, Steps, plan


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


class Pretended:
    """Stands for the commands: writes down what was asked for, and makes what they would make."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, words: list[str], log: Path) -> int:
        self.commands.append(words)
        run = option(words, "--run_dir")
        if words[0] == "fit":
            (Path(run) / "model").mkdir(parents=True)
        elif words[0] == "test":
            Path(run).mkdir(parents=True)
            (Path(run) / "test.json").write_text("{}")
        else:
            Path(option(words, "--out")).mkdir(parents=True)
        return 0


@pytest.fixture
def probed(monkeypatch) -> list[dict[str, Path]]:
    asked: list[dict[str, Path]] = []

    def probe(**paths: Path) -> None:
        asked.append(paths)
        paths["out"].write_text("{}")

    monkeypatch.setattr(tools.pivot_study, "probe_cell", probe)
    return asked


def test_the_plan_is_a_cross_with_equal_triples_for_both_arms():
    """Six places of the cross, both arms at each, the second size at its centre, one untouched model per size."""
    cells = plan()
    places = {arm: sorted((c.size, c.amount, c.share) for c in cells if c.arm == arm) for arm in ("sft", "dpo")}
    cross = [(0.25, 0.4), (0.5, 0.4), (1.0, 0.0), (1.0, 0.4), (1.0, 0.8), (2.0, 0.4)]
    assert places["sft"] == places["dpo"] == [("small", 1.0, 0.4), *(("student", *p) for p in cross)]
    assert [c.size for c in cells if c.arm == "untouched"] == ["student", "small"]
    assert len({c.name for c in cells}) == len(cells) == 16


@pytest.mark.parametrize(("amount", "share", "near", "new"), [(1, 0, 640, 0), (1, 0.4, 385, 85), (2, 0.4, 767, 171)])
def test_triples_add_up(amount, share, near, new):
    """Of 640 triples a share of .4 is 256, three kinds of 85 each; what rounding leaves is of the old distribution."""
    assert Cell("dpo", amount, share).triples == (near, new)
    assert near + 3 * new == 640 * amount


def test_a_cells_stages_in_order(tmp_path, probed):
    """Encoder and languages first, stage 1, stage 2 on triples, encoder out, new model, answers, probes."""
    run = Pretended()
    recipe = Recipe(tmp_path, steps=Steps(fresh=7), rates=Rates(dpo=0.5), own_start=True, run=run)
    recipe.cell(Cell("dpo", 1.0, 0.4), 3)
    words = [w if w[0] not in ("fit", "test") else [Path(option(w, "--run_dir")).name, *w] for w in run.commands]
    assert [w[0] for w in words] == [
        *("language-student", "take-language", "warmup", "take-encoder", "compose", "projector", "all"),
        *("post", "post-test", "take-encoder", "language-fresh", "take-language"),
        *("compose", "projector", "fresh", "fresh-test"),
    ]
    post, fresh = words[7], words[14]
    assert option(post, "--model.lr") == "0.5" and option(post, "--backbone.path").endswith("stage-1-student/all/model")
    assert (option(post, "--vars.near"), option(post, "--vars.new")) == ("385", "85")
    assert [w for w in post if w.startswith(("experiment/", "data/"))] == [
        "experiment/world-pivot-dpo",
        "data/world-pivot-new",
    ]
    assert option(post, "--seed_everything") == "103" and option(words[6], "--seed_everything") == "3"
    assert option(words[12], "--vision").endswith("dpo-1-0.4-student/encoder")
    assert option(words[12], "--language").endswith("language-fresh-alone")
    assert option(fresh, "--trainer.max_steps") == "7"
    (asked,) = probed
    assert asked["vlm"].parts[-2:] == ("post", "model") and asked["before"].parts[-2:] == ("all", "model")


def test_both_arms_learn_from_the_same_triples(tmp_path, probed):
    run = Pretended()
    recipe = Recipe(tmp_path, run=run)
    for arm in ("sft", "dpo"):
        recipe.cell(Cell(arm, 2.0, 0.4), 0)
    sft, dpo = (w for w in run.commands if "--vars.near" in w)
    for key in ("--vars.near", "--vars.new", "--seed_everything", "--backbone.path"):
        assert option(sft, key) == option(dpo, key)
    trees = []
    for name in ("sft", "dpo"):
        tree = load([f"experiment/world-pivot-{name}", "data/world-pivot-new"]).tree
        trees.append({key: tree[key] for key in ("data", "trainer", "backbone")})
    assert trees[0] == trees[1]


def test_what_is_there_is_not_made_again(tmp_path, probed):
    """A second start runs nothing; an untouched cell post-trains nothing; an interrupted run is resumed."""
    run = Pretended()
    recipe = Recipe(tmp_path, run=run)
    recipe.cell(Cell("untouched"), 0)
    assert not any("--vars.near" in words for words in run.commands)
    before = len(run.commands)
    recipe.cell(Cell("untouched"), 0)
    assert len(run.commands) == before and len(probed) == 1
    begun = tmp_path / "seed-0" / "sft-1-0-student" / "post"
    begun.mkdir(parents=True)
    (begun / "config.yaml").write_text("")
    recipe.cell(Cell("sft", 1.0, 0.0), 0)
    (post,) = (words for words in run.commands if "--vars.near" in words)
    assert post[-1] == "--resume" and "data/world-pivot-new" not in post


def test_seeds_share_one_start_unless_told_otherwise(tmp_path, probed):
    run = Pretended()
    recipe = Recipe(tmp_path, run=run)
    for seed in (1, 2):
        recipe.cell(Cell("sft", 1.0, 0.4), seed)
    assert sum("experiment/world-pivot-all" in words for words in run.commands) == 1
    posts = [words for words in run.commands if "--vars.near" in words]
    assert [option(words, "--seed_everything") for words in posts] == ["101", "102"]
    assert {option(words, "--backbone.path") for words in posts} == {str(tmp_path / "seed-0/stage-1-student/all/model")}


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"failed with code 2; see .*language-student\.log"):
        Recipe(tmp_path, run=lambda words, log: 2).cell(Cell("untouched"), 0)


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


def test_tables_by_hand(tmp_path):
    """DPO − SFT is 10 points of seeing everywhere, and 5 more per doubling of the triples; twins are equal."""
    cells = [c for c in plan() if c.size == "student"]
    base = {"count": 0.5, "caption": 0.5, "bars value": 0.5, "bars sum": 0.5, "angle": 0.5, "perimeter": 0.5}
    for seed in (0, 1):
        for cell in cells:
            more = 0.1 + 0.05 * math.log2(cell.amount) if cell.arm == "dpo" else 0.0
            right = base | dict.fromkeys(("count", "caption", "bars value"), 0.5 + more)
            for kind in ("fresh-test", "post-test"):
                write_answers(tmp_path / f"seed-{seed}" / cell.name / kind, right, twins=0.3)
    text = report(Results(tmp_path, cells, [0, 1, 2]))
    assert (tmp_path / "table.md").read_text() == text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.split("## The model of stage 2")[0].splitlines()}
    for row, gap_of_seeing in (
        ("1×, share 0, student", 10),
        ("change per doubling of triples", 5),
        ("change per .4 of share", 0),
    ):
        seeing, calculating, *_, twins = (float(c) for c in rows[row].strip("| ").split(" | ")[1:])
        assert seeing == pytest.approx(gap_of_seeing, abs=0.5) and calculating == twins == 0
    assert "mean over 6 cells with 2 seeds" in rows and rows["dpo, 1×, share 0, student"].startswith(
        "| dpo, 1×, share 0, student | +10"
    )
    kept = json.loads((tmp_path / "results.json").read_text())["new model"]["dpo-1-0-student"]
    assert set(kept) == {"0", "1"} and kept["0"]["seeing"] == pytest.approx(60, abs=0.5)


def test_probes_of_a_cell(tmp_path, monkeypatch):
    """Vision weights ten per cent larger have moved by 10 %, nothing else has; the probes speak per cent."""
    from lightning_vlm.compose import take_encoder
    from lightning_vlm.export import save_model_directory
    from lightning_vlm.models.families import family_of
    from lightning_vlm.models.load import load_model
    from lightning_vlm.models.policy import Policy
    from lightning_vlm.models.processor import load_processor
    from lightning_vlm.models.spec import Backbone
    from lightning_vlm.probes import encoder as probes

    said = {"linear_probe": {"accuracy": 0.25}, "segmentation_probe": {"recall": 0.5, "iou": 0.75}}
    for name, numbers in said.items():
        monkeypatch.setattr(probes, name, lambda *_, numbers=numbers, **__: SimpleNamespace(**numbers))
    backbone = Backbone(path="embedded:llava-tiny")
    model = load_model(backbone)
    policy, processor = Policy(model, family_of(model.config)), load_processor(backbone)
    before = save_model_directory(policy, processor, tmp_path / "before", {})
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "vision_tower" in name:
                param.mul_(1.1)
    after = save_model_directory(policy, processor, tmp_path / "after", {})
    tower = take_encoder(vlm=after, out=tmp_path / "tower")
    monkeypatch.setattr(tools.pivot_probes, "QUESTIONS", 12)
    monkeypatch.setattr(tools.pivot_probes, "CAPTIONS", 24)
    out = tmp_path / "probes.json"
    tools.pivot_probes.probe_cell(vlm=after, before=before, encoder=tower, new=after, language=before, out=out)
    found = tools.pivot_probes.read_probes(out)
    assert set(found) == set(PROBED)
    assert (found["linear"], found["segmentation"], found["IoU"]) == (25, 50, 75)
    assert found["moved: vision"] == pytest.approx(10, abs=0.01)
    assert found["moved: projector"] == found["moved: language"] == 0
    assert found["energy"] == found["energy, new model"] and 0 < found["energy"] < 100
    maps = json.loads(out.read_text())["maps"]
    assert maps["vlm"] == maps["new model"] and len(maps["vlm"]) == 4
    assert all(np.shape(grid) == (4, 4) for grid in maps["vlm"].values())
    tools.pivot_probes.draw_maps({"one": out, "two": out}, tmp_path / "maps.png")
    shown = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB"))
    assert shown.shape[1] > 200 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 20
