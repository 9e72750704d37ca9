"""`lightning-vlm score`: answers made elsewhere, in every form it reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_vlm.cli.main import main
from tests.score_kit import answers, score
from tests.sources_kit import write


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a score command that must be refused, without leaving anything; gives the one line."""

    def run(*words: str) -> str:
        assert main(["score", *map(str, words), "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and "\n" not in line
        assert not (tmp_path / "out").exists()
        return line

    return run


BOXED = answers((r"\boxed{65^\circ}", "65"), (r"\boxed{8\sqrt{2}}", r"8 \sqrt { 2 }"), (r"\boxed{75.4}", r"24 \pi"))


def test_geometry3k(tmp_path):
    """Two of three right; per example id, score, extraction and gold; the interval is of a share of three."""
    scores, lines = score("geometry3k", write(tmp_path / "a.jsonl", BOXED), out=tmp_path / "out")
    assert (scores["rule"], scores["n"]) == ("geometry3k/math-verify", 3)
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["not_extracted"] == 0
    low, high = scores["intervals"]["accuracy"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert [(r["id"], r["score"], r["gold"]) for r in lines] == [
        ("0", 1.0, "65"), ("1", 1.0, r"8 \sqrt { 2 }"), ("2", 0.0, r"24 \pi"),
    ]  # fmt: skip
    assert all(r["extraction"] and r["rule"] == "geometry3k/math-verify" for r in lines)
    assert all(isinstance(value, float | int | str | dict) for value in scores.values())


def test_the_rule_is_a_choice_with_a_name(tmp_path):
    """Without a box, `freeform` gives no point and says that nothing was extracted."""
    file = write(tmp_path / "a.jsonl", answers(("It is 5.", "5"), (r"\boxed{5}", "5")))
    scores, lines = score("geometry3k", file, "--rule", "freeform", out=tmp_path / "out")
    assert (scores["rule"], scores["accuracy"], scores["not_extracted"]) == ("geometry3k/freeform", 0.5, 0.5)
    assert lines[0]["extraction"] is None
    assert score("geometry3k", file, out=tmp_path / "out")[0]["accuracy"] == 1.0


def test_our_own_predictions_are_read_as_they_are(tmp_path):
    """`predict` writes id, sample, prompt, output, gold, finished: several draws give pass@k."""
    rows = [
        {"id": "q/1", "sample": d, "prompt": "?", "output": rf"\boxed{{{d}}}", "gold": "1", "finished": d != 3}
        for d in range(4)
    ]
    scores, lines = score("geometry3k", write(tmp_path / "p.jsonl", rows), out=tmp_path / "out")
    assert len(lines) == 4 and (scores["n"], scores["accuracy"], scores["unfinished"]) == (1, 0.25, 0.25)
    assert (scores["pass_at_2"], scores["pass_at_4"], scores["diversity"]) == (0.5, 1.0, 1.0)


def test_several_outputs_in_one_row(tmp_path):
    rows = [{"id": "1", "output": [r"\boxed{1}", r"\boxed{2}"], "gold": 1}]
    assert score("geometry3k", write(tmp_path / "p.json", rows), out=tmp_path / "out")[0]["pass_at_2"] == 1.0


def test_answers_with_choices_and_breakdown(tmp_path, capsys):
    rows = [
        {"id": "1", "output": "The answer is (B).", "gold": "B", "choices": ["1", "2"], "level": 1, "subject": "x"},
        {"id": "2", "output": "so x = 7", "gold": "7", "level": 2, "subject": "x"},
        {"id": "3", "output": "It is unclear.", "gold": "7", "level": 2, "subject": "y"},
    ]
    scores, _ = score("answer", write(tmp_path / "a.jsonl", rows), "--by", "level", out=tmp_path / "out")
    assert (scores["rule"], scores["accuracy"], scores["level/2"]) == ("answer/short", pytest.approx(2 / 3), 0.5)
    assert json.loads((tmp_path / "out" / "breakdown.json").read_text())["subject"]["x"] == {"accuracy": 1.0, "n": 2}
    printed = capsys.readouterr().out
    assert "by level" in printed and "by subject" not in printed and "10,000 draws, seed 0" in printed


MATHVISTA = {
    "1": {
        "question_type": "multi_choice", "answer_type": "text", "choices": ["6cm", "7cm"], "precision": None,
        "answer": "7cm", "response": "The answer is (B).", "extraction": "B",
        "metadata": {"task": "geometry problem solving", "skills": ["algebraic reasoning"]},
    },
    "2": {
        "question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None,
        "answer": "2", "response": "It has 2 sides.", "extraction": "2.0",
        "metadata": {"task": "figure question answering", "skills": ["algebraic reasoning", "statistical reasoning"]},
    },
}  # fmt: skip


def test_mathvista_by_three_rules(tmp_path):
    file = write(tmp_path / "output.json", MATHVISTA)
    scores, lines = score("mathvista", file, out=tmp_path / "out")
    assert (scores["rule"], scores["accuracy"], scores["skills/algebraic reasoning"]) == ("mathvista/official", 1.0, 1)
    assert [r["prediction"] for r in lines] == ["7cm", "2"]
    old = score("mathvista", file, "--rule", "official-2023", out=tmp_path / "out")[0]
    assert (old["rule"], old["accuracy"]) == ("mathvista/official-2023", 0.5)
    ours = score("mathvista", file, "--rule", "rules", out=tmp_path / "out")[0]
    assert (ours["rule"], ours["accuracy"]) == ("mathvista/rules", 1.0)
    assert score("mathvista", file, "--rule", "rules", "--from", "extraction", out=tmp_path / "o")[0]["n"] == 2


@pytest.mark.parametrize(
    ("extraction", "right"), [(2, 1.0), (2.0, 1.0), ("2", 1.0), (None, 0.0), ([2], 0.0), ("", 0.0)]
)
def test_mathvista_extractions_are_read_as_text(tmp_path, extraction, right):
    """As the official rule has it, whatever a judge put into the JSON."""
    file = write(tmp_path / "o.json", {"2": MATHVISTA["2"] | {"extraction": extraction}})
    assert score("mathvista", file, out=tmp_path / "out")[0]["accuracy"] == right


def test_a_missing_extraction_is_none(tmp_path, refused):
    file = write(tmp_path / "o.json", {"2": MATHVISTA["2"] | {"extraction": float("nan")}})
    assert "'extraction' must be text, got nan" in refused("mathvista", file)


def test_mathvista_gold_from_the_annotations(tmp_path):
    bare = {pid: {k: v for k, v in row.items() if k != "answer"} for pid, row in MATHVISTA.items()}
    gold = {pid: {"pid": pid, "answer": row["answer"]} for pid, row in MATHVISTA.items()}
    arguments = (write(tmp_path / "o.json", bare), "--questions", write(tmp_path / "testmini.json", gold))
    assert score("mathvista", *arguments, out=tmp_path / "out")[0]["accuracy"] == 1.0


QUESTIONS = [
    {"id": "1", "question": "?", "options": ["A", "B"], "answer": "B", "level": 2, "subject": "arithmetic"},
    {"id": "2", "question": "?", "options": [], "answer": "4.5", "level": 3, "subject": "algebra"},
]


def test_mathvision(tmp_path):
    questions = write(tmp_path / "test.jsonl", QUESTIONS)
    rows = [{"id": "1", "response": "It is B."}, {"id": "2", "response": ""}]
    file = write(tmp_path / "system.jsonl", rows)
    scores, lines = score("mathvision", file, "--questions", questions, out=tmp_path / "out")
    assert (scores["rule"], scores["accuracy"], scores["level/2"]) == ("mathvision/released", 0.5, 1.0)
    assert [r["extraction"] for r in lines] == ["b", None]


def test_mmvp_pairs(tmp_path):
    rows = [{"id": f"mmvp/{n}", "output": "(a)", "gold": gold} for n, gold in enumerate(["(a)", "a", "(b)", "B"], 1)]
    scores, _ = score("mmvp", write(tmp_path / "a.jsonl", rows), out=tmp_path / "out")
    assert (scores["accuracy"], scores["pairs"]) == (0.5, 0.5)


RECORDS = [
    {"image_name": "1.jpg", "captions": ["a red cube", "one red cube"], "prediction": "a red cube"},
    {"image_name": "2.jpg", "captions": ["two dogs run", "dogs running"], "prediction": "two cats run"},
]


def annotations(tmp_path: Path) -> tuple[str, str]:
    """References of RECORDS as COCO and as Karpathy write them."""
    texts = [(n, r["image_name"], r["captions"]) for n, r in enumerate(RECORDS, 1)]
    coco = {
        "images": [{"id": n, "file_name": name} for n, name, _ in texts],
        "annotations": [{"id": i, "image_id": n, "caption": c} for n, _, cs in texts for i, c in enumerate(cs)],
    }
    karpathy = [
        {"cocoid": n, "filename": name, "filepath": "val2014", "split": "test", "sentences": [{"raw": c} for c in cs]}
        for n, name, cs in texts
    ]
    other = {"cocoid": 9, "filename": "9.jpg", "filepath": "x", "split": "train", "sentences": [{"raw": "a"}]}
    return (
        write(tmp_path / "captions_val2014.json", coco),
        write(tmp_path / "dataset_coco.json", {"images": [*karpathy, other]}),
    )


def test_captions_in_all_forms_score_alike(tmp_path):
    """Records that hold their references, results with COCO's annotations, results with Karpathy's test split."""
    results = write(
        tmp_path / "r.json", [{"image_id": n, "caption": r["prediction"]} for n, r in enumerate(RECORDS, 1)]
    )
    coco, karpathy = annotations(tmp_path)
    forms = [
        (write(tmp_path / "m.json", RECORDS),),
        (results, "--references", coco),
        (results, "--references", karpathy),
    ]
    all_scores = [score("coco", *form, "--rule", "python", out=tmp_path / f"o{n}")[0] for n, form in enumerate(forms)]
    assert all_scores[0] == all_scores[1] == all_scores[2]
    assert all_scores[0]["rule"] == "coco/python" and all_scores[0]["n"] == 2
    assert {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"} <= all_scores[0]["intervals"].keys()


def test_a_subset_must_be_meant(tmp_path, refused):
    results = write(tmp_path / "r.json", [{"image_id": 1, "caption": "a red cube"}])
    reference, _ = annotations(tmp_path)
    line = refused("coco", results, "--references", reference, "--rule", "python")
    assert "no answer to 1 of the 2 images" in line and "--subset" in line
    scores, _ = score("coco", results, "--references", reference, "--rule", "python", "--subset", out=tmp_path / "s")
    assert scores["n"] == 1


def test_several_files_are_scored_one_by_one(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", BOXED[:n]) for name, n in (("a", 2), ("b", 3))]
    assert main(["score", "geometry3k", *files, "--out", str(tmp_path / "out")]) == 0
    found = [json.loads((tmp_path / "out" / name / "scores.json").read_text())["n"] for name in "ab"]
    assert found == [2, 3]


def test_the_same_seed_gives_the_same_interval(tmp_path):
    file = write(tmp_path / "a.jsonl", answers(*[(str(n % 3), "1") for n in range(997)]))
    arguments = ("answer", file, "--rule", "exact", "--seed")
    seeds = [score(*arguments, s, out=tmp_path / "o")[0]["intervals"] for s in ("0", "0", "1", "2", "3")]
    assert seeds[0] == seeds[1]
    assert any(other != seeds[0] for other in seeds[2:])


def test_scoring_imports_neither_torch_nor_lightning(tmp_path):
    import subprocess
    import sys

    file = write(tmp_path / "a.jsonl", BOXED)
    code = (
        "import sys; from lightning_vlm.cli.main import main; "
        f"assert main(['score', 'geometry3k', {file!r}]) == 0; "
        "assert not {'torch', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "1", "output": "5"}], ("a.jsonl:1: no 'gold'", "id, output")),
        ([{"id": "1", "answer": "5", "gold": "5"}], ("no 'output'",)),
        ([{"output": "5", "gold": "5"}], ("no 'id'",)),
        ([{"id": "1", "output": None, "gold": "5"}], ("'output' must be text, got None",)),
        ([{"id": "1", "output": float("nan"), "gold": "5"}], ("'output' must be text, got nan",)),
        ([{"id": "1", "output": "5", "gold": float("nan")}], ("'gold' must be", "got nan")),
        ([{"id": "1", "output": "5", "gold": None}], ("'gold' must be", "got None")),
        ([{"id": "1", "output": "5", "gold": " "}], ("'gold' must be", "got ' '")),
        ([{"id": "1", "output": "5", "gold": True}], ("'gold' must be", "got True")),
        ([{"id": None, "output": "5", "gold": "5"}], ("an id must be text or a whole number, got None",)),
        ([{"id": 1.5, "output": "5", "gold": "5"}], ("an id must be",)),
        ([{"id": "1", "output": "5", "gold": "5", "sample": -1}], ("`sample` must be a whole number",)),
        ([{"id": "1", "output": "5", "gold": "5"}] * 2, ("id '1' occurs twice", "`sample`")),
        ([{"id": "1", "output": " ", "gold": "5"}], ("1 of 1 outputs are empty (1)", "--allow_empty")),
        ([], ("is empty",)),
        ([[1]], ("list, expected an object",)),
    ],
)
def test_rows_that_cannot_be_scored(tmp_path, refused, rows, words):
    line = refused("geometry3k", write(tmp_path / "a.jsonl", rows))
    assert all(word in line for word in words), line


def test_an_empty_output_is_an_answer_where_it_is_allowed(tmp_path):
    file = write(tmp_path / "a.jsonl", answers(("", "5"), (r"\boxed{5}", "5")))
    scores, _ = score("geometry3k", file, "--allow_empty", out=tmp_path / "out")
    assert (scores["accuracy"], scores["not_extracted"]) == (0.5, 0.5)


def test_files_that_are_none(tmp_path, refused):
    file = write(tmp_path / "answers.jsonl", BOXED)
    assert "no file" in refused("geometry3k", tmp_path / "answer.jsonl")
    assert "did you mean 'answers.jsonl'" in refused("geometry3k", tmp_path / "answer.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": 1\n')
    assert "bad.jsonl:1: not JSON" in refused("geometry3k", tmp_path / "bad.jsonl")
    (tmp_path / "text.json").write_text("hello")
    assert "not JSON" in refused("coco", tmp_path / "text.json")
    assert "is a file: give a directory" in _error_of(("geometry3k", file, "--out", file))


def _error_of(words) -> str:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(["score", *map(str, words)]) == 2
    return err.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("geometri3k",), "did you mean 'geometry3k'"),
        (("geometry3k", "--rule", "freefrom"), "did you mean 'freeform'"),
        (("mathvista", "--from", "response"), "the official rules grade an extraction"),
        (("mathvista", "--rule", "official-2023", "--from", "response"), "the official rules grade an extraction"),
        (("geometry3k", "--questions", "x.jsonl"), "--questions has no meaning for geometry3k"),
        (("mathvista", "--references", "x.json"), "--references has no meaning for mathvista"),
        (("geometry3k", "--jobs", "0"), "--jobs must be at least 1"),
        (("mathvision",), "give --questions test.jsonl"),
        (("geometry3k", "--by", "levle"), "--by levle"),
    ],
)
def test_arguments_without_meaning(tmp_path, refused, words, expected):
    name, *more = words
    assert expected in refused(name, write(tmp_path / "a.jsonl", BOXED), *more)


def test_another_benchmarks_file(tmp_path, refused):
    """Every benchmark's reader is given every other one's file: an error that says what is expected, never a score."""
    magic = write(tmp_path / "magic.json", RECORDS)
    vista = write(tmp_path / "vista.json", MATHVISTA)
    vision = write(tmp_path / "vision.jsonl", [{"id": "1", "response": "B"}])
    questions = write(tmp_path / "test.jsonl", QUESTIONS)
    plain = write(tmp_path / "plain.jsonl", BOXED)
    for file in (magic, vista, vision):
        assert "expected objects with `id`, `output` and `gold`" in refused("answer", file)
    for file in (magic, vision, plain):
        assert "expected MathVista's released output file" in refused("mathvista", file)
    for file in (magic, plain, questions):
        line = refused("mathvision", file, "--questions", questions)
        assert "expected `id` and `response`" in line
    assert "expected MATH-V's questions" in refused("mathvision", vision, "--questions", plain)
    coco, _ = annotations(tmp_path)
    for file in (vista, vision, plain):
        assert "expected COCO results" in refused("coco", file, "--references", coco)
    assert "holds no references" in refused("coco", plain)
    assert "give it by --references" in refused("coco", magic, coco)


def test_ids_that_do_not_match(tmp_path, refused):
    questions = write(tmp_path / "test.jsonl", QUESTIONS)
    unknown = write(tmp_path / "u.jsonl", [{"id": "7", "response": "B"}])
    assert "1 of 1 ids are no question" in refused("mathvision", unknown, "--questions", questions)
    few = write(tmp_path / "f.jsonl", [{"id": "1", "response": "B"}])
    assert "no answer to 1 of the 2 questions" in refused("mathvision", few, "--questions", questions)
    coco, _ = annotations(tmp_path)
    stranger = write(tmp_path / "r.json", [{"image_id": 77, "caption": "a"}])
    assert "1 of 1 ids are no image" in refused("coco", stranger, "--references", coco)
    twice = write(tmp_path / "t.json", [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}] * 2)
    assert "id '1' occurs twice" in refused("coco", twice, "--references", coco)


@pytest.mark.parametrize("caption", ["", "  \n", None, float("nan"), 5, ["a cube"]])
def test_captions_that_are_none(tmp_path, refused, caption):
    line = refused("coco", write(tmp_path / "m.json", [RECORDS[0] | {"prediction": caption}, RECORDS[1]]))
    assert "outputs are empty (1.jpg)" in line or "'prediction' must be text" in line


def test_captions_without_java(tmp_path, refused, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    line = refused("coco", write(tmp_path / "m.json", RECORDS))
    assert "java" in line.lower() and "coco/python" in line


def test_spice_without_its_jars(tmp_path, refused):
    line = refused("coco", write(tmp_path / "m.json", RECORDS), "--rule", "ptb-spice")
    assert "stanford-corenlp-3.6.0" in line


@pytest.mark.parametrize("hostile", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x00", "\n"])
def test_control_characters_do_not_shift_captions(tmp_path, hostile):
    """Whatever separates words, all captions after it are still their own images'."""
    clean = score("coco", write(tmp_path / "a.json", RECORDS), "--rule", "python", out=tmp_path / "a")
    rows = [RECORDS[0] | {"prediction": f"a red{hostile}cube"}, RECORDS[1]]
    dirty = score("coco", write(tmp_path / "b.json", rows), "--rule", "python", out=tmp_path / "b")
    assert dirty[0] == clean[0]
    assert [r["score"] for r in dirty[1]] == [r["score"] for r in clean[1]]
