"""Twins of the embedded world: one detail differs, gold answers recomputed from the pictures' plans, the pair rule."""

import re
from dataclasses import replace

import numpy as np
import pytest

from lightning_vlm.benchmarks.benchmark import BenchmarkSpec, open_benchmark
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.data.world import render
from lightning_vlm.data.world.captions import captions
from lightning_vlm.data.world.families import HELD_OUT_ANGLES, HELD_OUT_PAIRS, HELD_OUT_SIDES
from lightning_vlm.data.world.twins import TWINS, TwinSource
from lightning_vlm.models.embedded import COLOURS, PLURALS


def scene_of(sample):
    return sample.images[0].args[0]


def question_of(sample) -> str:
    return sample.messages[0]["content"][1]["text"]


def gold(sample) -> int:
    """The answer, worked out from the scene and the question's words alone."""
    scene, words = scene_of(sample), re.findall(r"[a-z]+|\d+", question_of(sample))
    if sample.info["family"] == "count":
        colour = next((COLOURS.index(w) for w in words if w in COLOURS), None)
        shape = next((PLURALS.index(w) for w in words if w in PLURALS), None)
        return sum(colour in (None, f.colour) and shape in (None, f.shape) for f in scene.figures)
    if sample.info["family"] == "bars":
        heights = {COLOURS[bar.colour]: bar.value for bar in scene.bars}
        asked = [heights[w] for w in words if w in heights]
        return sum(asked[:2]) - sum(asked[2:])
    numbers = [int(label.text) for label in scene.labels if label.text != "x"]
    if sample.info["family"] == "angle":
        return sum(numbers) if "exterior" in words else 180 - sum(numbers)
    return sum(numbers) * next((int(w) for w in words if w.isdigit()), 1)


def pairs(**options):
    source = TwinSource(size=400, seed=5, **options)
    return [(source[k], source[k + 1]) for k in range(0, 400, 2)]


@pytest.mark.parametrize("split", ["train", "test", "ood_pairs"])
def test_one_question_two_pictures_two_right_answers(split):
    """Every gold answer equals an independent calculation, its chain ends in it, and twins' answers differ."""
    for a, b in pairs(split=split):
        assert question_of(a) == question_of(b)
        assert a.info["pair"] == b.info["pair"] and a.id != b.id
        assert int(a.answer) == gold(a) != gold(b) == int(b.answer)
        for sample in (a, b):
            assert sample.chosen().endswith(rf"\boxed{{{sample.answer}}}") and min(gold(a), gold(b)) >= 0


def test_one_detail_differs():
    """By the plans and by the pixels: a single object, in the attribute that the kind names."""
    seen = set()
    for a, b in pairs(kinds=list(TWINS)):
        one, two, kind = scene_of(a), scene_of(b), a.info["twin"]
        seen.add((kind, a.info["family"]))
        assert one.triangle == two.triangle and (np.asarray(a.images[0]()) == render(one)).all()
        if kind == "place":
            assert len(set(one.figures) ^ set(two.figures)) == 2
            (x,), (y,) = set(one.figures) - set(two.figures), set(two.figures) - set(one.figures)
            assert x.cell != y.cell and replace(x, cell=0) == replace(y, cell=0)
            continue
        olds, news = [(*s.figures, *s.bars, *s.labels) for s in (one, two)]
        assert len(olds) == len(news)
        ((x, y),) = [(p, q) for p, q in zip(olds, news, strict=True) if p != q]
        same = {"colour": {"colour": 0}, "shape": {"shape": 0}, "bar": {"value": 0}, "digit": {"text": ""}}[kind]
        assert replace(x, **same) == replace(y, **same)
        if kind == "bar":
            assert 1 <= abs(x.value - y.value) <= 2
        if kind == "digit":
            assert sum(p != q for p, q in zip(x.text, y.text, strict=True)) == 1
    assert seen == {(kind, family) for kind, families in TWINS.items() for family in families}


def test_captions_of_moved_figures_tell_the_pictures_apart():
    """References are true of their own picture and not of the other."""
    for a, b in pairs(kinds=["place"]):
        for mine, other in ((a, b), (b, a)):
            assert mine.answer is None and mine.chosen() in mine.info["references"]
            assert set(mine.info["references"]) <= set(captions(scene_of(mine).figures))
            assert not set(mine.info["references"]) & set(captions(scene_of(other).figures))


def test_in_domain_twins_show_nothing_held_out_and_ood_pairs_always_do():
    for split in ("test", "ood_pairs"):
        for pair in pairs(split=split):
            for sample in pair:
                scene = scene_of(sample)
                held_out = any((f.colour, f.shape) in HELD_OUT_PAIRS for f in scene.figures)
                assert held_out == (split == "ood_pairs")
                numbers = [int(label.text) for label in scene.labels if label.text != "x"]
                if sample.info["family"] == "angle":
                    assert not set(numbers) & set(HELD_OUT_ANGLES)
                if sample.info["family"] == "perimeter":
                    assert tuple(sorted(numbers)) not in HELD_OUT_SIDES


def test_a_sample_is_a_function_of_seed_split_and_number():
    long, short = TwinSource(size=100), TwinSource(size=40)
    for k in reversed(range(40)):
        assert scene_of(long[k]) == scene_of(short[k]) and long[k].id == short[k].id
    assert scene_of(TwinSource(seed=1)[0]) != scene_of(long[0]) != scene_of(TwinSource(split="val")[0])


def test_a_pair_counts_only_if_both_are_right():
    """Eight answers: pair 0 both right, 1 and 2 half right, 3 wrong → accuracy 4/8, pairs 1/4."""
    source, rule = TwinSource(size=8), RULES["world/twins"]
    right = [True, True, True, False, False, True, False, False]
    records = []
    for sample, good in zip(source, right, strict=True):
        output = sample.chosen() if good else r"\boxed{999}"
        records.append({"id": sample.id, "sample": 0} | rule.record(output, sample))
    summary = rule.summary(records)
    assert summary.metrics["accuracy"] == 0.5 and summary.metrics["pairs"] == 0.25
    assert summary.metrics["twin/colour"] == 1.0 and summary.metrics["twin/digit"] == 0.0


def test_answering_from_the_question_alone_gets_no_pair():
    """Whoever gives the same answer to both pictures is right once at most."""
    source, rule = TwinSource(size=80), RULES["world/twins"]
    blind = [source[k - k % 2].chosen() for k in range(80)]
    records = [{"id": s.id, "sample": 0} | rule.record(o, s) for s, o in zip(source, blind, strict=True)]
    metrics = rule.summary(records).metrics
    assert metrics["accuracy"] == 0.5 and metrics["pairs"] == 0


def test_benchmark_and_source_by_name():
    spec = SourceSpec(kind="world-twins", split="val", options={"size": 12})
    benchmark = open_benchmark(BenchmarkSpec(source=spec), "twins")
    assert benchmark.rule.name == "world/twins" and {"accuracy", "pairs", "twin/bar"} <= benchmark.metric_names
    assert [s.source for s in open_source(spec, for_training=True)] == ["world-twins"] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "ood_numbers"}, "no split 'ood_numbers'"),
        ({"kinds": ["size"]}, "no twins of kind 'size'; choose among colour, shape, place, bar, digit"),
        ({"split": "ood_pairs", "kinds": ["bar"]}, "no twins of kind 'bar'"),
        ({"kinds": []}, "at least one kind"),
        ({"size": 7}, "size is 7; twins come in pairs"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TwinSource(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="twins have no option 'kind'; did you mean 'kinds'"):
        open_source(SourceSpec(kind="world-twins", options={"kind": ["bar"]}), for_training=False)
