"""Mixtures: shares, passes, purity; splits by hash."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from lightning_vlm.data.mixture import Mixture
from lightning_vlm.data.schema import Sample, message, text
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.data.sources.base import Part


def source(name: str, size: int) -> list[Sample]:
    return [Sample(f"{name}/{i}", [message("user", text(str(i)))], source=name) for i in range(size)]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.1, 0.2, 0.7], [5, 1, 1, 0.01, 2.5], [1e-6, 1.0]])
def test_every_prefix_holds_the_shares(weights):
    """After k draws a source of share p has had k·p of them, off by less than the number of sources."""
    mixture = Mixture([source(str(i), 7) for i in range(len(weights))], weights, seed=3)
    total, seen = sum(weights), Counter()
    for k in range(3000):
        seen[mixture.locate(k)[0]] += 1
        for i, weight in enumerate(weights):
            assert abs(seen[i] - (k + 1) * weight / total) < len(weights)


def test_shares_are_exact_in_the_long_run():
    mixture = Mixture([source("a", 3), source("b", 5), source("c", 2)], [0.1, 0.2, 0.7], seed=1)
    far = 10**15  # the turns of a whole period, read far out: no drift
    seen = Counter(mixture.locate(far + k)[0] for k in range(1000))
    assert all(abs(seen[i] - share) <= 3 for i, share in enumerate((100, 200, 700)))


def test_nothing_repeats_within_a_pass_and_passes_differ():
    mixture = Mixture([source("a", 10), source("b", 40)], [1, 1], seed=0)
    drawn = [mixture.locate(k) for k in range(400)]
    for which, size in ((0, 10), (1, 40)):
        walk = [(element, epoch) for s, element, epoch in drawn if s == which]
        passes = [walk[i : i + size] for i in range(0, len(walk) - size + 1, size)]
        assert len(passes) >= 4
        for number, one in enumerate(passes):
            assert sorted(e for e, _ in one) == list(range(size)) and {n for _, n in one} == {number}
        assert passes[0] != passes[1]


def test_pure_function_of_seed_and_index():
    parts = [source("a", 10), source("b", 40)]
    mixture = Mixture(parts, [2, 1], seed=5)
    forward = [mixture[i].id for i in range(90)]
    again = pickle.loads(pickle.dumps(Mixture(parts, [2, 1], seed=5)))
    assert [again[i].id for i in reversed(range(90))] == forward[::-1]
    assert [Mixture(parts, [2, 1], seed=6)[i].id for i in range(90)] != forward
    assert [Mixture(parts, [20, 10], seed=5)[i].id for i in range(90)] == forward  # weights are relative


def test_indices_past_the_end_go_on():
    """A small share is seen whole over the epochs, though one epoch shows only a part of it."""
    mixture = Mixture([source("a", 10), source("b", 40)], [9, 1], seed=0)
    assert len(mixture) == 50
    assert len({s.id for s in mixture if s.source == "b"}) < 10
    assert len({mixture[i].id for i in range(500) if mixture[i].source == "b"}) == 40


def test_one_source_passes_through():
    mixture = Mixture([source("a", 4)], [0.3], seed=9)
    assert [s.id for s in mixture] == ["a/0", "a/1", "a/2", "a/3"] and len(mixture) == 4
    assert mixture[4].id == "a/0" and mixture[-1].id == "a/3" and [s.id for s in mixture[1:3]] == ["a/1", "a/2"]


def test_without_weights_sources_follow_each_other():
    mixture = Mixture([source("a", 2), source("b", 1)], None)
    assert [s.id for s in mixture] == ["a/0", "a/1", "b/0"] and mixture.locate(5) == (1, 0, 1)


def test_length():
    mixture = Mixture([source("a", 2), source("b", 1)], [1, 1], length=12)
    assert len(mixture) == 12 and Counter(s.source for s in mixture) == {"a": 6, "b": 6}


def test_caption_of_the_draw_changes_with_the_pass(tmp_path):
    import json

    images = [
        {"filename": f"{i}.jpg", "cocoid": i, "split": "train", "sentences": [{"raw": f"{i}{c}"} for c in "abc"]}
        for i in range(4)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    coco = open_source(
        SourceSpec(kind="coco", path=str(tmp_path / "k.json"), options={"captions": "one"}), for_training=True
    )
    mixture = Mixture([coco, source("b", 4)], [1, 1])
    captions = [s.chosen() for i in range(24) if (s := mixture[i]).source == "coco"]
    assert sorted(captions) == [f"{i}{c}" for i in range(4) for c in "abc"]  # three passes, every caption once


@pytest.mark.parametrize(
    "arguments, said",
    [
        (([], []), "at least one source"),
        (([source("a", 2)], [1, 2]), "1 sources but 2 weights"),
        (([source("a", 2), []], [1, 1]), "source 1 of the mixture is empty"),
        (([source("a", 2), source("b", 2)], [1, 0]), "positive numbers, got 0"),
        (([source("a", 2), source("b", 2)], [1, float("nan")]), "positive numbers, got nan"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(ValueError, match=said):
        Mixture(*arguments)


def test_two_sources_of_one_label_are_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    spec = {"kind": "qa", "path": str(tmp_path / "d.jsonl")}
    one = open_source(SourceSpec(**spec), for_training=True)
    with pytest.raises(ValueError, match="labelled 'qa'"):
        Mixture([one, one], [1, 1])
    other = open_source(SourceSpec(**spec, label="other"), for_training=True)
    assert {s.id for s in Mixture([one, other], [1, 1])} == {"qa/0", "other/0"}


def test_parts_are_disjoint_and_stay():
    for whole in (source("a", 4000), source("b", 400)):
        one, two = ({s.id for s in Part(*bounds).of(whole)} for bounds in ((0, 0.75), (0.75, 1)))
        assert not one & two and one | two == {s.id for s in whole}
        # 4 standard deviations of a binomial
        assert abs(len(one) - 0.75 * len(whole)) < 4 * (len(whole) * 0.75 * 0.25) ** 0.5
    # what is added or reordered moves nothing
    first = [s.id for s in Part(0, 0.75).of(source("a", 4000))]
    assert set(first) <= {s.id for s in Part(0, 0.75).of(source("a", 5000)[::-1])}
    assert [s.id for s in Part(0, 0.75, seed=1).of(source("a", 4000))] != first


def test_parts_keep_samples_of_one_image_together():
    pairs = [Sample(f"c/{i}#{k}", []) for i in range(50) for k in range(5)]
    first, second = (Part(*bounds).of(pairs) for bounds in ((0, 0.5), (0.5, 1)))
    assert not {s.id.split("#")[0] for s in first} & {s.id.split("#")[0] for s in second}


def test_parts_do_not_depend_on_the_sources_name():
    """Stages may name their data as they like: disjoint stays disjoint."""
    options = {"size": 200, "families": ["caption"]}
    specs = [
        SourceSpec(kind="world", split="train", options=options, label=label, part=bounds)
        for label, bounds in (("one", (0, 0.75)), ("two", (0.75, 1)), ("two", (0, 0.75)))
    ]
    ids = [{s.id.partition("/")[2] for s in open_source(spec, for_training=True)} for spec in specs]
    assert not ids[0] & ids[1] and ids[0] == ids[2] and len(ids[0] | ids[1]) == 200


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (-0.1, 1), (0, 1.5)])
def test_parts_that_are_none(bounds):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        Part(*bounds)


def test_an_empty_part():
    with pytest.raises(ValueError, match="1 samples, none of them in part"):
        Part(0, 1e-9).of(source("a", 1))
