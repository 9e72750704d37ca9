"""Benchmarks: grading rules on hand-made outputs, results from records, specs that are refused."""

from __future__ import annotations

import random

import pytest

from lightning_vlm.benchmarks import Benchmark, BenchmarkSpec, open_benchmark
from lightning_vlm.benchmarks.rules import mean_results, score_exact, score_freeform, score_letter, score_world
from lightning_vlm.data.schema import Sample, message, text
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.data.world import WorldSource


def asked(answer: str | None, **info) -> Sample:
    return Sample("s", [message("user", text("?"))], answer=answer, info=info)


def test_the_worlds_own_answers_are_right_and_others_wrong():
    """Every family: the trained text scores 1; another sample's text scores 1 only if the answers agree."""
    source = WorldSource(split="val", size=80)
    samples = list(source)
    for sample in samples:
        assert score_world(sample.chosen(), sample)["score"] == 1.0
    for sample, other in zip(samples, samples[10:], strict=False):  # ten on: the same family
        assert sample.info["family"] == other.info["family"]
        if sample.info["family"] == "caption":
            same = other.chosen() in sample.info["references"]
        else:
            same = sample.answer == other.answer
        assert score_world(other.chosen(), sample)["score"] == float(same)


@pytest.mark.parametrize(
    ("output", "score", "direct", "extraction"),
    [
        (r"3 + 4 = 7. \boxed{7}", 1.0, 0.0, "7"),
        (r"\boxed{7}", 1.0, 1.0, "7"),
        ("7", 1.0, 1.0, "7"),
        (r"\boxed{8}", 0.0, 1.0, "8"),
        (r"7 is it \boxed{", 0.0, 1.0, r"7 is it \boxed{"),
        ("", 0.0, 1.0, ""),
    ],
)
def test_world_answers(output, score, direct, extraction):
    record = score_world(output, asked("7", family="bars", split="val"))
    assert (record["score"], record["direct"], record["extraction"]) == (score, direct, extraction)
    assert (record["family"], record["split"]) == ("bars", "val")


def test_freeform_needs_the_box():
    sample = asked(r"8 \sqrt { 2 }")
    assert score_freeform(r"so \boxed{\sqrt{128}}", sample) == {"extraction": r"\sqrt{128}", "score": 1.0}
    assert score_freeform(r"\boxed{11.3}", sample)["score"] == 0.0
    assert score_freeform(r"so \sqrt{128}", sample) == {"extraction": None, "score": 0.0}
    assert score_freeform(r"\boxed{65^\circ}", asked("65"))["score"] == 1.0


def test_exact_and_letter():
    assert score_exact(r"\boxed{Open}", asked("open"))["score"] == 1.0
    assert score_exact("Closed", asked("open"))["score"] == 0.0
    assert score_letter("(b)", asked("(b)")) == {"extraction": "b", "score": 1.0}
    assert score_letter(r"\boxed{B}", asked("B"))["score"] == 1.0
    assert score_letter("Open", asked("(b)")) == {"extraction": None, "score": 0.0}


@pytest.mark.parametrize("rule", [score_exact, score_letter, score_freeform])
def test_a_sample_without_gold_is_an_error_never_a_zero(rule):
    with pytest.raises(ValueError, match="no gold answer"):
        rule("no box", asked(None))


def record(id: str, score: float, sample: int = 0, **more):
    return {"id": id, "sample": sample, "score": score, "finished": True, "extraction": "x"} | more


def world_benchmark(**more) -> Benchmark:
    spec = BenchmarkSpec(source=SourceSpec(kind="world", split="val", options={"size": 20}), **more)
    return open_benchmark(spec, "world")


def test_world_results():
    """Six questions, 3 right: count 2/3, bars 1/3; captions 1/2 apart; a repeated record counts once."""
    scores = {"count": [1, 1, 0], "bars": [0, 0, 1], "caption": [1, 0]}
    records = [
        record(f"{family}{i}", float(s), family=family, split="val", direct=float(i == 0), finished=i != 2)
        for family, group in scores.items()
        for i, s in enumerate(group)
    ]
    records.append(dict(records[0]))
    random.Random(0).shuffle(records)
    assert world_benchmark().results(records) == pytest.approx(
        {
            "accuracy": 0.5,
            "n": 6,
            "unfinished": 1 / 3,
            "not_extracted": 0,
            "direct": 1 / 3,
            "accuracy_count": 2 / 3,
            "accuracy_bars": 1 / 3,
            "caption_exact": 0.5,
            "caption_n": 2,
        }
    )


def test_results_over_several_draws():
    """Draws of one sample are different records: (1 + 0 + 1 + 1) / 4 over two samples."""
    records = [record("a", 1.0), record("a", 0.0, 1), record("b", 1.0), record("b", 1.0, 1)]
    results = mean_results(records)
    assert (results["accuracy"], results["n"]) == (0.75, 2)
    assert mean_results([record("a", 0.0, timed_out=1.0), record("b", 1.0)])["timed_out"] == 0.5


def test_contradicting_or_missing_records_are_errors():
    benchmark = world_benchmark()
    with pytest.raises(ValueError, match="two different scores for sample 'a'"):
        benchmark.results([record("a", 1.0, family="bars", direct=0.0), record("a", 0.0, family="bars", direct=0.0)])
    with pytest.raises(ValueError, match="without any records"):
        benchmark.results([])


def test_opening_a_benchmark():
    benchmark = world_benchmark(every=50, max_new_tokens=40)
    assert (benchmark.name, benchmark.every, benchmark.encoding, len(benchmark.samples)) == ("world", 50, "prompt", 20)
    assert benchmark.sampling.greedy
    assert benchmark.conditions() == {
        "benchmark": "world",
        "rule": "world/exact",
        "prompt_id": "world/default",
        "samples": 20,
        "n": 1,
        "sampling": {"max_new_tokens": 40, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    }
    drawn = world_benchmark(n=4, temperature=1.0)
    assert (drawn.n, drawn.sampling.temperature) == (4, 1.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"n": 4}, "greedy answers per sample are all the same"),
        ({"n": 0}, "at least 1"),
        ({"kind": "exact"}, "does not grade"),
        ({"kind": "wrold"}, "choose one of"),
        ({"source": SourceSpec(kind="sharegpt", path="x")}, "no grading rule of its own"),
        ({"source": SourceSpec(kind="qa", path="x"), "kind": "world"}, "does not grade"),
    ],
)
def test_impossible_benchmarks_are_refused(more, message):
    spec = BenchmarkSpec(**({"source": SourceSpec(kind="world", split="val")} | more))
    with pytest.raises(ValueError, match=message):
        open_benchmark(spec, "world")


@pytest.mark.real_data
def test_geometry3k_gold_texts_are_graded_right(real_data):
    """The ten original problems: the target text of training scores 1, every other choice 0."""
    path = str(real_data / "geometry3k" / "intergps_examples")
    benchmark = open_benchmark(BenchmarkSpec(source=SourceSpec(kind="geometry3k", path=path)), "geometry3k")
    assert benchmark.rule == "geometry3k/freeform" and len(benchmark.samples) == 10
    for sample in benchmark.samples:
        assert benchmark.score(sample.chosen(), sample)["score"] == 1.0
        for letter, choice in zip("ABCD", sample.info["choices"], strict=True):
            right = letter == sample.info["letter"]
            assert benchmark.score(rf"\boxed{{{choice}}}", sample)["score"] == float(right)


@pytest.mark.real_data
def test_mmvp_gold_letters_are_graded_right(real_data):
    spec = BenchmarkSpec(source=SourceSpec(kind="mmvp", path=str(real_data / "mmvp"), limit=20))
    benchmark = open_benchmark(spec, "mmvp")
    assert benchmark.rule == "letter"
    for sample in benchmark.samples:
        other = {"(a)": "(b)", "(b)": "(a)"}[sample.answer]
        assert benchmark.score(sample.chosen(), sample)["score"] == 1.0
        assert benchmark.score(other, sample)["score"] == 0.0
