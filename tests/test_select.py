"""`lightning-vlm select`: D = {score >= T} united with, or cut by, what a model got wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_vlm.cli.select import main
from lightning_vlm.distill import select

from .runs.commands import enter
from .runs.commands import write as lines


def scored(id: str, score: float | None, **more) -> dict:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": f"what is {id}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "2 + 3 = 5. \\boxed{5}"}]},
    ]
    return {
        "id": id, "images": [f"chains_images/{id}.png"], "messages": turns, "answer": "5", "score": score,
        "own_score": 1.0, "judge": "exact", "info": {"family": "bars"},
    } | more  # fmt: skip


def said(id: str, output: str, **more) -> dict:
    return {"id": id, "sample": 0, "output": output, "gold": "5", "finished": True} | more


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Four samples: a 5 right, b 5 wrong, c 3 wrong, d 2 right."""
    enter(tmp_path, monkeypatch)
    own = {"a": 1.0, "b": 4.0, "c": 5.0, "d": 0.0}  # in another order than the scores
    scores = {"a": 5.0, "b": 5.0, "c": 3.0, "d": 2.0}
    lines("chains.jsonl", *(scored(id, scores[id], own_score=own[id]) for id in own))
    answers = [said("a", "\\boxed{5}"), said("b", "\\boxed{6}"), said("c", "no idea"), said("d", "5")]
    lines("answers.jsonl", *answers)
    return tmp_path


def chosen(*argv: str, answers: str | None = "answers.jsonl", out: str = "out.jsonl") -> list[str]:
    more = ["--answers", answers] if answers else []
    assert main("select", ["--scored", "chains.jsonl", *more, *argv, "--out", out, "--overwrite"]) == 0
    return [json.loads(line)["id"] for line in Path(out).read_text().splitlines()]


def refused(*argv: str, answers: str | None = "answers.jsonl") -> str:
    with pytest.raises(ValueError) as error:
        chosen(*argv, answers=answers)
    assert "\n" not in str(error.value) and not Path("out.jsonl").exists()
    return str(error.value)


def test_union_and_intersection_by_hand(place, capsys):
    assert chosen("--threshold", "4") == ["a", "b", "c"]
    told = capsys.readouterr().out
    assert told.splitlines() == [
        "out.jsonl: 3 of 4 samples", "  score >= 4: 2", "  answered wrongly (exact): 2", "  both: 1", "  union: 3"
    ]  # fmt: skip
    assert chosen("--threshold", "4", "--combine", "intersection") == ["b"]
    assert chosen("--threshold", "2", "--combine", "intersection") == ["b", "c"]
    assert chosen("--threshold", "0") == ["a", "b", "c", "d"]
    assert chosen("--threshold", "2.5", "--combine", "union") == ["a", "b", "c"]


def test_score_alone(place, capsys):
    assert chosen("--min_score", "5", answers=None) == ["a", "b"]
    assert capsys.readouterr().out.splitlines() == ["out.jsonl: 2 of 4 samples", "  score >= 5: 2"]
    assert chosen("--min_score", "4", "--column", "own_score", answers=None) == ["b", "c"]
    assert chosen("--threshold", "5", "--combine", "intersection", "--column", "own_score") == ["c"]


def test_records_keep_what_they_have(place):
    chosen("--min_score", "5", answers=None, out="deeper/out.jsonl")
    rows = [json.loads(line) for line in Path("deeper/out.jsonl").read_text().splitlines()]
    told = {id: {"own_score": own, "images": [f"../chains_images/{id}.png"]} for id, own in (("a", 1.0), ("b", 4.0))}
    assert rows == [scored(id, 5.0, **more) for id, more in told.items()]


def test_answers_under_another_label_and_several_draws(place):
    lines("answers.jsonl", *(said(f"round1/{id}", "6") for id in "abcd"))
    assert chosen("--threshold", "5", "--combine", "intersection") == ["a", "b"]
    draws = [said("a", "5"), said("a", "6", sample=1), said("b", "6"), said("b", "6", sample=1)]
    draws += [said("b", "5", sample=2), said("c", "5"), said("d", "5")]
    lines("answers.jsonl", *draws)  # a: half right; b: a third
    assert chosen("--threshold", "0", "--combine", "intersection") == ["b"]


def test_the_rule_is_the_one_that_judged(place):
    assert "not judged by one rule" in _with_judge("some/model", "--threshold", "4")
    lines("chains.jsonl", scored("a", 5.0, judge="DIR"), scored("b", 1.0, judge="DIR"))
    lines("answers.jsonl", said("a", "it is 5.0"), said("b", "it is 6"))
    assert chosen("--threshold", "5", "--rule", "answer/short") == ["a", "b"]
    assert chosen("--threshold", "6e-1", "--combine", "intersection", "--rule", "answer/short") == ["b"]


def _with_judge(judge: str, *argv: str) -> str:
    rows = [json.loads(line) | {"judge": judge} for line in Path("chains.jsonl").read_text().splitlines()]
    lines("chains.jsonl", *rows)
    return refused(*argv)


def test_captions_are_judged_by_their_references(place):
    info = {"family": "caption", "split": "train", "references": ["a red circle.", "there is a red circle."]}
    own = {"answer": None, "judge": "world/exact", "info": info}
    lines("chains.jsonl", scored("a", 5.0, **own), scored("b", 5.0, **own))
    lines("answers.jsonl", said("a", "there is a red circle.", gold=None), said("b", "a blue circle.", gold=None))
    assert chosen("--threshold", "5", "--combine", "intersection") == ["b"]


def test_ids_that_do_not_match(place):
    lines("answers.jsonl", said("a", "5"), said("b", "5"))
    assert "2 of 4 samples of chains.jsonl have no answer, such as 'c'" in refused("--threshold", "4")
    lines("answers.jsonl", *(said(f"world-{id}", "5") for id in "abcd"))
    assert "4 of 4 samples" in refused("--threshold", "4")
    lines("answers.jsonl", *(said(id, "6") for id in "abcde"))
    assert "1 answers are to samples that chains.jsonl lacks, such as 'e'" in refused("--threshold", "4")
    assert chosen("--threshold", "4", "--extra_answers") == ["a", "b", "c", "d"]
    lines("answers.jsonl", *(said(id, "6", gold="7") for id in "abcd"))
    Path("out.jsonl").unlink()
    assert "was made for the gold answer '7', but chains.jsonl has '5'" in refused("--threshold", "4")


@pytest.mark.parametrize(
    "argv, answers, told",
    [
        (["--threshold", "5.5"], "answers.jsonl", "--threshold must lie in 0 to 5, got 5.5"),
        (["--min_score", "-1"], None, "--min_score must lie in 0 to 5, got -1"),
        (["--threshold", "nan"], "answers.jsonl", "--threshold must lie in 0 to 5, got nan"),
        ([], "answers.jsonl", "--answers needs --threshold"),
        ([], None, "either --answers and --threshold, or --min_score alone"),
        (["--min_score", "5"], "answers.jsonl", "either --answers and --threshold, or --min_score alone"),
        (["--min_score", "5", "--combine", "union"], None, "--combine has no effect without --answers"),
        (["--threshold", "4"], "absent.jsonl", "--answers: there is no file absent.jsonl"),
        (["--threshold", "4", "--rule", "exakt"], "answers.jsonl", "did you mean 'exact'"),
        (["--threshold", "4", "--combine", "both"], "answers.jsonl", "invalid choice: 'both'"),
    ],
)
def test_refused_in_one_line(place, argv, answers, told):
    assert told in refused(*argv, answers=answers)


def test_nothing_left_and_no_score(place):
    lines("answers.jsonl", *(said(id, "5") for id in "abcd"))
    lines("chains.jsonl", *(scored(id, 3.0) for id in "abcd"))
    said_ = refused("--threshold", "4", "--combine", "intersection")
    assert "none of 4 samples is left: 0 have score >= 4 intersection with 0 failed" in said_
    assert "none of 4 samples is left: 0 have score >= 5" in refused("--min_score", "5", answers=None)
    lines("chains.jsonl", scored("a", None))
    assert "record 'a' has no score (None)" in refused("--min_score", "5", answers=None)
    lines("chains.jsonl", scored("a", 5.0), scored("a", 5.0))
    assert "chains.jsonl:2: id 'a' occurs twice" in refused("--min_score", "5", answers=None)
    Path("chains.jsonl").write_text("")
    assert "chains.jsonl is empty" in refused("--min_score", "5", answers=None)
    lines("chains.jsonl", {"id": "a", "score": 5})
    assert "needs `id` and `messages`" in refused("--min_score", "5", answers=None)


def test_select_itself():
    records = [scored("a", 5.0), scored("b", 1.0)]
    found = select(records, {"b"}, threshold=5)
    assert ([r["id"] for r in found.records], found.good, found.failed, found.both) == (["a", "b"], 1, 1, 0)
    with pytest.raises(ValueError, match="combine is 'or'"):
        select(records, set(), threshold=5, combine="or")
