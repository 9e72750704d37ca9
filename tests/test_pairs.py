"""`lightning-vlm pairs`, the files it writes, and pairs that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lightning_vlm.cli.main import main as run
from lightning_vlm.cli.pairs import main
from lightning_vlm.data.images import load_image

from .runs.commands import BASE, enter, workplace
from .runs.commands import write as lines
from .sources_kit import REAL, opened, png, real_data, write


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Questions 0 to 3 about pictures in a folder, in the folder where the command runs."""
    enter(tmp_path, monkeypatch)
    (tmp_path / "pictures").mkdir()
    rows = []
    for n in range(4):
        Image.new("RGB", (32 + n, 30), (60 * n, 0, 0)).save(f"pictures/{n}.png")
        rows.append({"id": n, "image": f"pictures/{n}.png", "question": f"What is {n} + {n}?", "answer": str(2 * n)})
    write(tmp_path / "questions.jsonl", rows)
    return tmp_path


def pairs(*argv: str, out: str = "pairs.jsonl") -> list[dict]:
    """The rows that the command writes."""
    assert main("pairs", [*argv, "--out", out]) == 0
    return read(out)


def read(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def says(*argv: str, out: str = "pairs.jsonl") -> str:
    """The one line with which the command refuses; nothing is left behind."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError) as error:
        main("pairs", [*argv, "--out", out])
    assert "\n" not in str(error.value) and sorted(Path().rglob("*")) == before
    return str(error.value)


def answer(n: int, output: str, draw: int = 0, **more) -> dict:
    return {"id": f"qa/{n}", "sample": draw, "output": output, "gold": str(2 * n), "finished": True, **more}


QA = ("--answers", "answers.jsonl", "--data", "qa=questions.jsonl", "--rule", "answer/short")

# --- from answers ----------------------------------------------------------------------------------------------------


def test_a_wrong_answer_is_rejected(place, capsys):
    lines(
        "answers.jsonl",
        answer(0, "The answer is 5."),  # wrong: the gold text is chosen
        answer(1, "The answer is 3."),
        answer(1, "The answer is 2.", 1),  # right: chosen
        answer(1, "The answer is 9.", 2),
        answer(2, "4"),  # never wrong
        answer(3, " "),
        answer(3, "The answer is 7 and", 1, finished=False),
    )
    rows = pairs(*QA)
    assert [(r["id"], r["chosen"], r["rejected"]) for r in rows] == [
        ("qa/0", "0", "The answer is 5."),
        ("qa/1", "The answer is 2.", "The answer is 3."),
    ]
    assert [(r["chosen_from"], r["chosen_score"], r["rejected_score"], r["rule"]) for r in rows] == [
        ("gold", 1.0, 0.0, "answer/short"),
        ("right", 1.0, 0.0, "answer/short"),
    ]
    assert rows[0]["images"] == ["pictures/0.png"] and rows[0]["negative"] == "answer"
    assert (rows[1]["chosen_sample"], rows[1]["rejected_sample"], rows[1]["rejected_extraction"]) == (1, 0, "3")
    said = capsys.readouterr().out
    assert "pairs.jsonl: 2 pairs from 4 samples" in said
    assert "without a pair: 1 no wrong answer, 1 no answer that can be used" in said
    assert "answers not used: 1 empty, 1 cut off at the length limit" in said
    assert [r["id"] for r in pairs(*QA, "--unfinished", "--overwrite")] == ["qa/0", "qa/1", "qa/3"]


def test_which_answers(place):
    lines(
        "answers.jsonl",
        answer(1, "It could be 3."),
        answer(1, "The answer is 3.", 1),
        answer(1, "The answer is 2.", 2),
        answer(1, "I do not know.", 3),
        answer(1, "Answer: 2", 4),
        answer(1, "The answer is 3.", 5),  # said before
        answer(2, "The answer is 5."),
    )

    def texts(*argv):
        return [(r["id"], r["chosen"], r["rejected"]) for r in pairs(*QA, *argv, "--overwrite")]

    assert texts("--chosen", "gold")[0] == ("qa/1", "2", "It could be 3.")
    assert texts("--chosen", "right") == [("qa/1", "The answer is 2.", "It could be 3.")]
    assert texts("--rejected", "worst")[1] == ("qa/2", "4", "The answer is 5.")
    assert texts("--rejected", "all") == [
        ("qa/1#0", "The answer is 2.", "It could be 3."),
        ("qa/1#1", "Answer: 2", "The answer is 3."),
        ("qa/1#2", "The answer is 2.", "I do not know."),
        ("qa/2", "4", "The answer is 5."),
    ]
    lines("answers.jsonl", answer(1, "The answer is 3."), answer(1, "I do not know.", 1))
    assert texts()[0][2] == "The answer is 3." and texts("--rejected", "worst")[0][2] == "I do not know."
    lines("more.jsonl", {"id": "qa/1", "output": ["The answer is 8.", "The answer is 2."]})  # no gold, two draws
    rows = pairs("--answers", "more.jsonl", "answers.jsonl", *QA[2:], "--as", "sampled", "--overwrite")
    assert (rows[0]["rejected"], rows[0]["chosen"]) == ("The answer is 8.", "The answer is 2.")
    assert rows[0]["negative"] == "sampled"


def test_a_gold_text_must_be_right_by_the_rule(place):
    """A bare gold text has no box: chosen, it would teach what the rule calls wrong."""
    lines("answers.jsonl", answer(1, r"\boxed{3}"))
    freeform = [*QA[:-1], "geometry3k/freeform"]
    assert "1 neither a right answer nor a gold text that the rule calls right" in says(*freeform)
    (place / "boxed.yaml").write_text("qa: {kind: qa, path: questions.jsonl, prompt: boxed}\n")
    rows = pairs(*QA[:3], "boxed.yaml", "--rule", "geometry3k/freeform")
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (r"\boxed{2}", r"\boxed{3}")
    assert "final answer inside" in rows[0]["prompt"][0]["content"][1]["text"]  # the prompt with its instruction


def test_what_answers_are_refused(place):
    lines("answers.jsonl", answer(1, "3"))
    assert "need a --rule" in says(*QA[:4])
    assert "did you mean 'answer/short'" in says(*QA[:-1], "answer/shrt")
    assert "scores a set of captions" in says(*QA[:-1], "coco/python")
    assert "--rule world/exact does not fit the data: the samples have no 'family'" in says(*QA[:-1], "world/exact")
    assert "1 no right answer" in says(*QA, "--chosen", "right")
    lines("answers.jsonl", answer(1, "3"), answer(1, "4"))
    assert "answers.jsonl:2: id 'qa/1' occurs twice" in says(*QA)
    lines("answers.jsonl", {"id": "mine/1", "output": "3"})
    line = says(*QA)
    assert "1 of 1 ids are not in the data, such as 'mine/1'; the data's begin as 'qa/0'" in line and "--label" in line
    assert [r["id"] for r in pairs(*QA, "--label", "mine")] == ["mine/1"]
    Path("pairs.jsonl").unlink()
    lines("answers.jsonl", {"id": "qa/1", "output": "3", "gold": "7"})
    assert "made for the gold answer '7', but the data have '2'" in says(*QA)
    for row, said in (
        ({"output": "3"}, "needs an `id`"),
        ({"id": "qa/1"}, "its text in `output` (it has: id)"),
        ({"id": "qa/1", "output": 3}, "needs its text"),
    ):
        lines("answers.jsonl", row)
        line = says(*QA)
        assert line.startswith("answers.jsonl:1: an answer needs ") and said in line
    lines("answers.jsonl")
    assert "no answers" in says(*QA)


# --- from edits ------------------------------------------------------------------------------------------------------


def karpathy(folder: Path, *captions: list[str]) -> str:
    """Karpathy's file with one picture per list of captions."""
    images = []
    for n, given in enumerate(captions):
        Image.new("RGB", (40, 30 + n), "green").save(folder / f"{n}.jpg")
        sentences = [{"raw": caption} for caption in given]
        images.append({"cocoid": n, "filename": f"{n}.jpg", "filepath": "", "split": "train", "sentences": sentences})
    return write(folder / "dataset_coco.json", {"images": images})


def test_captions_are_edited(place, capsys):
    karpathy(place, ["Two dogs on a red couch.", "A cat near it."], ["He bakes."])
    edits = ("--edits", "--data", "coco=dataset_coco.json@train")
    rows = pairs(*edits)
    assert [r["id"] for r in rows] == ["coco/0#0", "coco/0#1"]
    for row in rows:
        kind = row["negative"].removeprefix("edit/")
        assert kind in ("attribute", "count", "relation", "object") and row["images"] == ["0.jpg"]
        assert row["before"] in row["chosen"] and row["after"] in row["rejected"]
    said = capsys.readouterr().out
    assert "2 pairs from 3 samples, seed 0" in said and "without a pair: 1 nothing that can be edited" in said
    same = {s: [r["rejected"] for r in pairs(*edits, "--seed", s, "--overwrite")] for s in "0012345"}
    assert same["0"] == [r["rejected"] for r in rows] and len({tuple(r) for r in same.values()}) > 1
    drawn = [r["rejected"] for s in range(40) for r in pairs(*edits, "--seed", str(s), "--overwrite")]
    assert not any("cat" in text.lower() for text in drawn if "red" in text)  # another caption's cat
    rows = pairs(*edits, "--kinds", "attribute", "--limit", "1", "--overwrite")
    assert [r["negative"] for r in rows] == ["edit/attribute"]


def test_the_embedded_world_makes_its_own_edits(place):
    rows = pairs("--edits", "--data", "world@train", "--limit", "12")
    from lightning_vlm.data.world import WorldSource

    source = WorldSource(split="train", families=["caption"], pairs=True)
    assert [(r["id"], r["chosen"], r["rejected"]) for r in rows] == [
        (s.id, s.chosen(), s.rejected) for s in (source[n] for n in range(12))
    ]
    assert {r["negative"] for r in rows} <= {f"edit/{kind}" for kind in ("colour", "shape", "number", "relation")}
    assert len(list(Path("pairs_images").iterdir())) == 6  # two captions of each picture, which is written once
    for option in ("--kinds", "--seed"):
        assert "no effect on the embedded world" in says("--edits", "--data", "world", option, "1", out="w.jsonl")


# --- from given negatives --------------------------------------------------------------------------------------------


def test_given_negatives(place, capsys):
    karpathy(place, ["A dog runs.", "One dog is running."], ["A bus."])
    lines(
        "negatives.jsonl",
        {"id": "coco/0", "text": "One dog is running"},  # another reference
        {"id": "coco/0", "text": "A cat runs.", "sample": 1},
        {"id": "coco/0", "text": "A cow runs.", "sample": 2, "negative": "chat"},
        {"id": "coco/1#0", "text": "a bus"},
    )
    data = ("--data", "coco=dataset_coco.json@train")
    rows = pairs("--negatives", "negatives.jsonl", *data)
    assert [(r["id"], r["chosen"], r["rejected"], r["negative"]) for r in rows] == [
        ("coco/0#0", "A dog runs.", "A cat runs.", "given"),
        ("coco/0#1", "One dog is running.", "A cat runs.", "given"),
    ]
    said = capsys.readouterr().out
    assert "1 no negative that can be used" in said and "3 equal to the chosen text or a reference" in said
    rows = pairs("--negatives", "negatives.jsonl", *data, "--rejected", "all", "--overwrite")
    assert [(r["id"], r["negative"]) for r in rows[:2]] == [("coco/0#0#0", "given"), ("coco/0#0#1", "chat")]
    rows = pairs("--negatives", "negatives.jsonl", *data, "--as", "beam", "--overwrite")
    assert {r["negative"] for r in rows} == {"beam"}
    assert "negatives are not graded" in says("--negatives", "n", *data, "--rejected", "worst", out="x.jsonl")


# --- the file --------------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "Be <image> brief."},
    {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "Two dogs."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And a literal <image> tag?"}]},
    {"role": "assistant", "content": "A red bus\n\nin the snow "},
]


def test_the_round_trip(place, hub_cache):
    """What is read back is what was there: prompt with all its turns, both texts, the same pixels."""
    turns = [
        {**m, "content": m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}]}
        for m in TURNS[1:]
    ]
    rows = [{"id": "a", "images": [{"bytes": png("blue"), "path": None}] * 2, "messages": turns, "system": "<image> s"}]
    hub_cache.Dataset.from_list(rows).to_parquet("chats.parquet")
    write(place / "chats.jsonl", [{"id": "b", "images": ["pictures/1.png", "pictures/2.png"], "messages": TURNS[1:]}])
    (place / "data.yaml").write_text(
        "bytes: {kind: messages, path: chats.parquet}\nfiles: {kind: messages, path: chats.jsonl}\n"
    )
    pairs("--edits", "--data", "data.yaml", out="deep/pairs.jsonl")
    written = opened(kind="preference", path="deep/pairs.jsonl", label="p")
    sources = [
        opened(kind="messages", path=f"chats.{s}", label=n) for s, n in (("parquet", "bytes"), ("jsonl", "files"))
    ]
    for sample, source in zip(written, sources, strict=True):
        assert sample.id == f"p/{source[0].id}" and sample.messages == source[0].messages
        assert sample.rejected != sample.chosen() and sample.info["negative"].startswith("edit/")
        pixels = [[load_image(i).tobytes() for i in s.images] for s in (sample, source[0])]
        assert pixels[0] == pixels[1] and len(pixels[0]) == 2
    images = [r["images"] for r in read("deep/pairs.jsonl")]
    assert images[1] == ["../pictures/1.png", "../pictures/2.png"]
    assert images[0] == [f"pairs_images/{p.name}" for p in Path("deep/pairs_images").iterdir()] * 2
    again = pairs("--edits", "--data", "preference=deep/pairs.jsonl", "--overwrite", out="deep/pairs.jsonl")
    assert [i for r in again for i in r["images"]] == [i for row in images for i in row]  # its own pictures survive
    assert all((place / "deep" / i).is_file() for r in again for i in r["images"])


def test_nothing_is_overwritten_or_left_half_done(place, monkeypatch):
    karpathy(place, ["A dog."])
    edits = ("--edits", "--data", "coco=dataset_coco.json@train")
    pairs(*edits)
    assert "pairs.jsonl is there already" in says(*edits)
    assert "name it pairs.jsonl" in says(*edits, out="pairs.json")
    (place / "x_images").mkdir()
    (place / "x_images" / "mine.png").write_bytes(b"")
    assert "x_images is there already" in says(*edits, out="x.jsonl")
    assert "x_images, where pictures are written, holds other files" in says(*edits, "--overwrite", out="x.jsonl")
    before = Path("pairs.jsonl").read_text()
    (place / "0.jpg").unlink()
    line = says(*edits, "--overwrite")
    assert (
        "sample coco/0#0: image './0.jpg' does not exist (mend it, or go on without such samples by --skip_bad)" in line
    )
    assert Path("pairs.jsonl").read_text() == before and not Path("pairs.jsonl.tmp").exists()
    assert "1 unusable (missing_image)): nothing is written" in says(*edits, "--overwrite", "--skip_bad")


def test_options_without_effect_are_refused(place):
    data = ("--data", "qa=questions.jsonl")
    for argv in (["--rule", "exact"], ["--chosen", "gold"], ["--jobs", "2"], ["--unfinished"], ["--as", "x"]):
        assert f"{argv[0]} has no effect with --edits" in says("--edits", *data, *argv)
    assert "--kinds has no effect with --answers; it is for --edits" in says(*QA, "--kinds", "count")
    assert "--limit must be at least 1, got 0" in says("--edits", *data, "--limit", "0")
    assert "did you mean 'count'" in says("--edits", *data, "--kinds", "cuont")
    assert "one of the arguments --answers --edits --negatives is required" in says(*data)
    assert "two sources are named 'qa'" in says("--edits", *data, "qa=questions.jsonl")
    assert "MathVista" in says("--edits", "--data", "mathvista=MathVista")
    assert "4 nothing that can be edited" in says("--edits", *data)


@real_data
def test_real_photographs_and_problems(place):
    """COCO's photographs with their captions; Geometry3K's problems with answers that are off by one letter."""
    records = json.loads((REAL / "coco" / "magic_result.json").read_text())
    there = {p.name for p in (REAL / "coco" / "images").iterdir()}
    images = [
        {"cocoid": n, "filename": r["image_name"], "filepath": "", "split": "test", "sentences": captions}
        for n, r in enumerate(records)
        if r["image_name"] in there and (captions := [{"raw": c} for c in r["captions"]])
    ]
    write(place / "dataset_coco.json", {"images": images})
    (place / "coco.yaml").write_text(
        f"coco: {{kind: coco, path: dataset_coco.json, split: test, images_root: {REAL / 'coco' / 'images'}}}\n"
    )
    rows = pairs("--edits", "--data", "coco.yaml")
    assert len(rows) > 0.9 * sum(len(i["sentences"]) for i in images) > 80
    sample = opened(kind="preference", path="pairs.jsonl")[0]
    assert load_image(sample.images[0]).size == Image.open(REAL / "coco" / "images" / images[0]["filename"]).size

    geometry = str(REAL / "geometry3k" / "intergps_examples")
    problems = opened(kind="geometry3k", path=geometry, prompt="mcq")
    write(
        place / "answers.jsonl",
        [{"id": p.id, "output": rf"\boxed{{{'B' if p.answer == 'A' else 'A'}}}", "gold": p.answer} for p in problems],
    )
    (place / "g.yaml").write_text(f"geometry3k: {{kind: geometry3k, path: {geometry}, prompt: mcq}}\n")
    rows = pairs("--answers", "answers.jsonl", "--data", "g.yaml", "--rule", "geometry3k/mcq", out="g.jsonl")
    assert len(rows) == 10 and all(r["chosen"] == rf"\boxed{{{r['gold']}}}" for r in rows)


def test_from_predictions_to_a_run(tmp_path, monkeypatch):
    """predict, pairs, fit: what one writes the next reads."""
    enter(tmp_path, monkeypatch)
    workplace(tmp_path)
    asked = [{"id": n, "image": "red.png", "question": f"what is {n} ?", "answer": "red"} for n in range(3)]
    write(tmp_path / "questions.jsonl", asked)
    toy = ["--data.predict.toy.kind", "qa", "--data.predict.toy.path", "questions.jsonl"]
    sampled = ["--model.samples", "2", "--model.sampling.max_new_tokens", "3", "--model.sampling.temperature", "1.0"]
    assert run(["predict", "-c", BASE, "--run_dir", "run", "--out", "answers.jsonl", *toy, *sampled]) == 0
    assert len(read("answers.jsonl")) == 6
    answers = ("--answers", "answers.jsonl", "--data", "qa=questions.jsonl", "--label", "toy", "--rule", "exact")
    rows = pairs(*answers, "--unfinished", "--rejected", "all")
    assert len(rows) > 3 and {r["chosen"] for r in rows} == {"red"} and {r["gold"] for r in rows} == {"red"}
    learn = ["--data.train.toy.kind", "preference", "--data.train.toy.path", "pairs.jsonl", "--model", "DPO"]
    assert run(["fit", "-c", BASE, "--run_dir", "dpo", *learn, "--data.on_bad_sample", "skip"]) == 0
