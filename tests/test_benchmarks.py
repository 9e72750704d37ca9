"""Benchmarks: grading rules on hand-made outputs, results from records, specs that are refused."""

from __future__ import annotations

import random

import pytest

from lightning_vlm.benchmarks import RULES, Benchmark, BenchmarkSpec, open_benchmark
from lightning_vlm.data.schema import Sample, message, text
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.data.world import WorldSource


def asked(answer: str | None, **info) -> Sample:
    return Sample("s", [message("user", text("?"))], answer=answer, info=info)


def graded(rule: str, output: str, sample: Sample) -> dict:
    return RULES[rule].record(output, sample)


def test_the_worlds_own_answers_are_right_and_others_wrong():
    """Every family: the trained text scores 1; another sample's text scores 1 only if the answers agree."""
    source = WorldSource(split="val", size=80)
    samples = list(source)
    for sample in samples:
        assert graded("world/exact", sample.chosen(), sample)["score"] == 1.0
    for sample, other in zip(samples, samples[10:], strict=False):  # ten on: the same family
        assert sample.info["family"] == other.info["family"]
        if sample.info["family"] == "caption":
            same = other.chosen() in sample.info["references"]
        else:
            same = sample.answer == other.answer
        assert graded("world/exact", other.chosen(), sample)["score"] == float(same)


@pytest.mark.parametrize(
    ("output", "score", "direct", "extraction"),
    [
        (r"3 + 4 = 7. \boxed{7}", 1.0, False, "7"),
        (r"\boxed{7}", 1.0, True, "7"),
        ("7", 1.0, True, "7"),
        (r"\boxed{8}", 0.0, True, "8"),
        (r"7 is it \boxed{", 0.0, True, r"7 is it \boxed{"),
        ("", 0.0, True, ""),
    ],
)
def test_world_answers(output, score, direct, extraction):
    record = graded("world/exact", output, asked("7", family="bars", split="val"))
    assert (record["score"], record["direct"], record["extraction"]) == (score, direct, extraction)
    assert record["groups"] == {"family": "bars", "split": "val"}


def test_freeform_needs_the_box():
    sample, rule = asked(r"8 \sqrt { 2 }"), "geometry3k/freeform"
    assert graded(rule, r"so \boxed{\sqrt{128}}", sample) == {"extraction": r"\sqrt{128}", "score": 1.0}
    assert graded(rule, r"\boxed{11.3}", sample)["score"] == 0.0
    assert graded(rule, r"so \sqrt{128}", sample) == {"extraction": None, "score": 0.0}
    assert graded(rule, r"\boxed{65^\circ}", asked("65"))["score"] == 1.0


@pytest.mark.parametrize(
    ("output", "gold", "right"),
    [
        (r"\boxed{65}", "65°", True),
        ("The angle is 65°.", "65", True),
        ("<answer>65</answer>", "65", False),  # it finds no number that touches a tag
        (r"\boxed{\sqrt{128}}", r"8 \sqrt { 2 }", True),  # bare LaTeX is read as LaTeX
        (r"\boxed{75.4}", r"24 \pi", False),
        (r"\boxed{8.3}", "8.33", False),
        ("10.0", "10√{2}", True),  # math-verify reads 10: the released verdicts say so
        ("", "5", False),
        ("no number", "5", False),
    ],
)
def test_math_verify_reads_the_whole_output(output, gold, right):
    assert graded("geometry3k/math-verify", output, asked(gold))["score"] == float(right)


def test_options():
    """A letter, however it is written, or the option's text; two letters choose nothing."""
    sample = asked("(b)", choices=["Open", "Closed"])
    assert graded("option", "(b)", sample) == {"extraction": "B", "score": 1.0}
    assert graded("option", r"\boxed{B}", sample)["score"] == 1.0
    assert graded("option", "Closed", sample)["score"] == 1.0
    assert graded("option", "Open", sample) == {"extraction": "A", "score": 0.0}
    assert graded("option", "(a) or (b)", sample) == {"extraction": None, "score": 0.0}
    assert graded("geometry3k/mcq", r"\boxed{C}", asked("C", choices=["1", "2", "3", "4"]))["score"] == 1.0
    assert graded("option", "J", asked("J"))["score"] == 1.0
    with pytest.raises(ValueError, match="names no option"):
        graded("option", "(b)", asked("Ajar", choices=["Open", "Closed"]))


def test_exact():
    assert graded("exact", r"\boxed{Open}", asked("open"))["score"] == 1.0
    assert graded("exact", "Closed", asked("open"))["score"] == 0.0


QUESTION = {"question_type": "multi_choice", "answer_type": "text", "precision": None, "unit": None}
CHOICES = ["6cm", "7cm", "4cm", "5cm"]


def test_mathvista_official_guesses_by_edit_distance_and_the_rules_do_not():
    sample = asked("6cm", **QUESTION, choices=CHOICES)
    assert graded("mathvista/official", "(A) 6cm", sample)["score"] == 1.0
    assert graded("mathvista/official", "8.0", sample)["prediction"] == "6cm"  # the first of the nearest
    assert graded("mathvista/rules", "8.0", sample) | {"groups": 0} == {"extraction": None, "score": 0.0, "groups": 0}
    assert graded("mathvista/rules", "The answer is A because it is long.", sample)["score"] == 1.0


def test_mathvista_integers_by_the_old_rule_and_the_new():
    sample = asked("2", question_type="free_form", answer_type="integer", choices=None, precision=None)
    assert graded("mathvista/official", "2.0", sample)["score"] == 1.0
    assert graded("mathvista/official-2023", "2.0", sample)["score"] == 0.0
    assert graded("mathvista/official", "", sample) | {"groups": 0} == {
        "extraction": None, "score": 0.0, "prediction": None, "groups": 0,
    }  # fmt: skip


def test_mathvista_is_broken_down_as_the_released_scores():
    meta = {"task": "geometry problem solving", "skills": ["algebraic reasoning", "geometry reasoning"]}
    record = graded("mathvista/rules", "(A)", asked("6cm", **QUESTION, choices=CHOICES, metadata=meta))
    assert record["groups"] == {"question_type": "multi_choice", "answer_type": "text", **meta}
    names = RULES["mathvista/rules"].summary([{"id": "1", **record}]).metrics
    assert {"task/geometry problem solving", "skills/algebraic reasoning"} <= names.keys()


def test_mathvision_by_level_and_subject():
    sample = asked("B", options=["1", r"$\frac{1}{2}$"], level=3, subject="metric geometry - area")
    record = graded("mathvision/released", r"\boxed{0.5}", sample)
    assert (record["score"], record["groups"]) == (1.0, {"level": "3", "subject": "metric geometry - area"})
    metrics = RULES["mathvision/released"].summary([{"id": "1", **record}]).metrics
    assert metrics["level/3"] == metrics["subject/metric geometry area"] == 1.0


@pytest.mark.parametrize(
    ("output", "gold", "choices", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", None, True),
        ("The answer is 1,234.", "1234", None, True),
        ("The answer is B because it is right-angled.", "B", ["1", "2", "3", "4"], True),
        ("Answer: east", "East", None, True),
        ("I do not know.", "5", None, False),
        ("", "5", None, False),
    ],
)
def test_short_answers(output, gold, choices, right):
    assert graded("answer/short", output, asked(gold, choices=choices))["score"] == float(right)


@pytest.mark.parametrize("rule", [name for name in RULES if not name.startswith(("coco", "world"))])
def test_a_sample_without_gold_is_an_error_never_a_zero(rule):
    with pytest.raises(ValueError, match="no gold answer"):
        graded(rule, "no box", asked(None, **QUESTION, choices=CHOICES, pair=1))


def record(id: str, score: float, sample: int = 0, **more):
    return {"id": id, "sample": sample, "score": score, "finished": True, "extraction": "x"} | more


def world_benchmark(**more) -> Benchmark:
    spec = BenchmarkSpec(source=SourceSpec(kind="world", split="val", options={"size": 20}), **more)
    return open_benchmark(spec, "world")


def test_world_results():
    """Six questions, 3 right: count 2/3, bars 1/3; captions 1/2 apart."""
    scores = {"count": [1, 1, 0], "bars": [0, 0, 1], "caption": [1, 0]}
    records = [
        record(f"{f}{i}", float(s), groups={"family": f, "split": "val"}, direct=i == 0, finished=i != 2)
        for f, group in scores.items()
        for i, s in enumerate(group)
    ]
    random.Random(0).shuffle(records)
    summary = world_benchmark().summary(records)
    assert summary.metrics == pytest.approx(
        {
            "accuracy": 0.5,
            "n": 6,
            "unfinished": 1 / 3,
            "not_extracted": 0,
            "direct": 1 / 3,
            "family/count": 2 / 3,
            "family/bars": 1 / 3,
            "family/caption": 0.5,
        }
    )
    assert summary.breakdown["family"]["caption"] == {"accuracy": 0.5, "n": 2}


def test_several_draws_are_one_problem():
    """Two problems with two draws: mean 3/4; pass@1 the same, pass@2 1; the votes are split in one of them.

    Problem a answers x (right) and y: the first wins the tie. Problem b answers x twice: diversity (1 + 1/2) / 2; the
    votes' confidences .5 and 1 against right and right: the calibration error is (|1 − .5| + 0) / 2.
    """
    records = [record("a", 1.0), record("a", 0.0, 1, extraction="y"), record("b", 1.0), record("b", 1.0, 1)]
    metrics = RULES["exact"].summary(records).metrics
    assert metrics == pytest.approx(
        {
            "accuracy": 0.75, "pass_at_1": 0.75, "pass_at_2": 1.0, "maj_at_2": 1.0, "diversity": 0.75, "vote_ece": 0.25,
            "n": 2, "unfinished": 0, "not_extracted": 0,
        }
    )  # fmt: skip


def test_votes_are_over_normalised_answers_and_only_of_those_that_answered():
    given = [("none", None, 0.0), ("half", r"\frac{1}{2}", 0.0), ("units", "7 cm", 1.0), ("bare", "7", 1.0)]
    records = [record("a", score, n, extraction=text) for n, (_, text, score) in enumerate(given)]
    metrics = RULES["geometry3k/freeform"].summary(records).metrics
    assert (metrics["maj_at_4"], metrics["diversity"], metrics["not_extracted"]) == (1.0, 0.5, 0.25)


def test_a_problem_with_fewer_draws_is_an_error():
    with pytest.raises(ValueError, match=r"between 1 and 2 answers \(fewest: 'b'\)"):
        RULES["exact"].summary([record("a", 1.0), record("a", 1.0, 1), record("b", 1.0)])


def test_intervals_are_over_problems_not_draws():
    """Ten problems of four equal draws: the interval is that of ten values, not of forty."""
    scores = [1.0, 0.0] * 5
    one = RULES["exact"].summary([record(str(i), s) for i, s in enumerate(scores)]).intervals()
    four = RULES["exact"].summary([record(str(i), s, d) for i, s in enumerate(scores) for d in range(4)]).intervals()
    assert one["accuracy"] == four["accuracy"] == pytest.approx((0.2, 0.8))


def test_timed_out_comparisons_are_counted():
    metrics = RULES["exact"].summary([record("a", 0.0, timed_out=True), record("b", 1.0)]).metrics
    assert metrics["timed_out"] == 0.5


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="nothing to score"):
        world_benchmark().summary([])


def test_pairs_of_mmvp():
    """Pairs (right, right), (right, wrong), (wrong, wrong): accuracy 1/2, both right in 1/3; a lone one has no pair."""
    scores = [1, 1, 1, 0, 0, 0, 1]
    records = [record(str(n), float(s), pair=(n + 2) // 2) for n, s in enumerate(scores)]
    metrics = RULES["mmvp/option"].summary(records).metrics
    assert metrics["accuracy"] == pytest.approx(4 / 7) and metrics["pairs"] == pytest.approx(1 / 3)


def captions(*texts: str, id: str = "a", references=("a red cube on a table", "one red cube")) -> list[dict]:
    sample = Sample(id, [], info={"references": list(references)})
    return [{"id": id, "sample": n, **RULES["coco/python"].record(t, sample)} for n, t in enumerate(texts)]


def test_captions_are_scored_as_a_corpus():
    """The score of an example is its CIDEr-D; the metrics bear pycocoevalcap's names."""
    others = captions("two dogs run", id="b", references=["two dogs run fast", "dogs are running"])
    records = captions("a red cube on a table") + others + captions("", id="c", references=["the sea at night"])
    summary = RULES["coco/python"].summary(records)
    assert {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "n", "empty"} <= summary.metrics.keys()
    assert "METEOR" not in summary.metrics and "accuracy" not in summary.metrics
    assert (summary.metrics["n"], summary.metrics["empty"]) == (3, 1)
    scores = [r["score"] for r in records]
    assert scores[0] > scores[1] > scores[2] == 0
    assert summary.metrics["CIDEr"] == pytest.approx(sum(scores) / 3)
    assert summary.metrics.keys() <= set(RULES["coco/python"].names)
    low, high = summary.intervals()["CIDEr"]
    assert low <= summary.metrics["CIDEr"] <= high


def test_several_captions_give_mean_and_oracle():
    others = captions("the sea", "two dogs", id="b", references=["two dogs run fast", "dogs are running"])
    records = captions("a dog", "a red cube on a table") + others
    metrics = RULES["coco/python"].summary(records).metrics
    scores = [r["score"] for r in records]
    assert metrics["CIDEr_mean"] == pytest.approx(sum(scores) / 4)
    assert metrics["CIDEr_oracle"] == pytest.approx((scores[1] + scores[3]) / 2)
    assert metrics["CIDEr"] == pytest.approx((scores[0] + scores[2]) / 2)


def test_captions_of_the_world_count_exact_ones_too():
    """Two pictures, one captioned by one of its references, one not."""
    rule, pictures = RULES["world/captions"], WorldSource(size=2, families=["caption"], questions_per_image=1)
    texts = [pictures[0].info["references"][3], "a red circle."]
    records = [{"id": s.id, "sample": 0, **rule.record(t, s)} for s, t in zip(pictures, texts, strict=True)]
    summary = rule.summary(records)
    assert summary.metrics["exact"] == 0.5 and summary.metrics["CIDEr"] > 0
    assert summary.metrics.keys() <= set(rule.names) and "exact" in summary.intervals()
    with pytest.raises(ValueError, match=r"no caption: set source\.options\.families"):
        rule.record("", WorldSource(size=1, families=["count"])[0])


def test_an_image_without_references_is_an_error():
    with pytest.raises(ValueError, match="image a has no reference caption"):
        captions("a cube", references=[" "])


def test_metric_names_are_known_before_anything_is_generated():
    benchmark = world_benchmark()
    assert {"accuracy", "n", "direct", "family/count", "family/caption"} <= benchmark.metric_names
    assert {"pass_at_4", "maj_at_4", "diversity"} <= world_benchmark(n=4, temperature=1.0).metric_names


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
        "sampling": {
            **{"max_new_tokens": 40, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
            **{"repetition_penalty": 1.0, "stop": []},
        },
    }
    drawn = world_benchmark(n=4, temperature=1.0)
    assert (drawn.n, drawn.sampling.temperature) == (4, 1.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"n": 4}, "greedy answers per sample are all the same"),
        ({"n": 0}, "at least 1"),
        ({"rule": "exact"}, "does not grade"),
        ({"rule": "wrold/exact"}, "did you mean 'world/exact'"),
        ({"source": SourceSpec(kind="sharegpt", path="x")}, "no rule grades source kind 'sharegpt'"),
        ({"source": SourceSpec(kind="qa", path="x"), "rule": "world/exact"}, "does not grade"),
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
    assert benchmark.rule.name == "geometry3k/freeform" and len(benchmark.samples) == 10
    for sample in benchmark.samples:
        assert benchmark.rule.grade(sample.chosen(), sample)["score"] == 1.0
        for letter, choice in zip("ABCD", sample.info["choices"], strict=True):
            right = letter == sample.info["letter"]
            assert benchmark.rule.grade(rf"\boxed{{{choice}}}", sample)["score"] == float(right)


@pytest.mark.real_data
def test_mmvp_gold_letters_are_graded_right(real_data):
    spec = BenchmarkSpec(source=SourceSpec(kind="mmvp", path=str(real_data / "mmvp"), limit=20))
    benchmark = open_benchmark(spec, "mmvp")
    assert benchmark.rule.name == "mmvp/option"
    for sample in benchmark.samples:
        other = {"(a)": "(b)", "(b)": "(a)"}[sample.answer]
        assert benchmark.rule.grade(sample.chosen(), sample)["score"] == 1.0
        assert benchmark.rule.grade(other, sample)["score"] == 0.0
