"""`lightning-vlm overlap`: what it reads, says, writes and refuses."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lightning_vlm.cli.main import main
from lightning_vlm.cli.overlap import opened_sources
from lightning_vlm.data.overlap import THRESHOLD, fingerprint, questions

from .sources_kit import opened, write
from .test_overlap import LONG, encoded, photo


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three questions to train on, and a benchmark that holds the first picture as JPEG and the second question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVLM_TRACEBACK", raising=False)
    for n in range(4):
        photo(n).save(tmp_path / f"{n}.png")
    photo(0).save(tmp_path / "copy.jpg", quality=50)
    rows = [("0.png", "What is there?"), ("1.png", LONG), ("2.png", "Find x.")]
    write(tmp_path / "train.jsonl", [{"id": i, "image": i, "question": q, "answer": "1"} for i, q in rows])
    rows = [("copy.jpg", "What is this?"), ("3.png", LONG), ("3.png", "Find $x$")]
    turns = [[{"from": "human", "value": f"<image>{q}"}, {"from": "gpt", "value": "1"}] for _, q in rows]
    write(
        tmp_path / "chats.json",
        [{"id": n, "images": [i], "conversations": t} for n, ((i, _), t) in enumerate(zip(rows, turns, strict=True))],
    )
    return tmp_path


def test_the_report(place, capsys):
    assert main(["overlap", "qa=train.jsonl", "sharegpt=chats.json", "--show", "1", "--out", "found/here"]) == 0
    said = capsys.readouterr().out
    assert "benchmark  sharegpt=chats.json: 3 samples, 2 pictures" in said
    assert re.search(r"image_perceptual +1 +33\.3 % +1\n", said) and re.search(r"any +2 +66\.7 % +2\n", said)
    assert "not counted: 1 more" in said
    assert re.search(r"sharegpt/0  =  qa/0\.png  image_perceptual \(\d+ of 256 bits\)\n\.\.\. and 1 more\n", said)
    out = place / "found" / "here"
    assert sorted(p.name for p in out.iterdir()) == ["leave_out.txt", "matches.html", "matches.jsonl", "summary.json"]
    records = [json.loads(line) for line in (out / "matches.jsonl").read_text().splitlines()]
    distance = records[0].pop("distance")
    assert 0 < distance <= THRESHOLD
    assert records == [
        {"benchmark": "sharegpt/0", "train": "qa/0.png", "kinds": ["image_perceptual"]},
        {"benchmark": "sharegpt/1", "train": "qa/1.png", "kinds": ["text"], "distance": None},
    ]
    assert (out / "leave_out.txt").read_text() == "sharegpt/0\nsharegpt/1\n"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kinds"]["any"] == {"samples": 2, "share": 2 / 3, "pairs": 2}
    assert summary["arguments"] == {"train": "qa=train.jsonl", "benchmark": "sharegpt=chats.json", "limit": None}


class Page(HTMLParser):
    """Counts the tags that must be closed and keeps pictures and words."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open, self.rows, self.pictures, self.words = [], 0, [], ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_is_whole(place):
    asked = "Is 3 < 5 & 5 > 4? " + LONG
    write(place / "b.jsonl", [{"id": "<b>", "image": "0.png", "question": asked, "answer": "1"}])
    write(place / "t.jsonl", [{"id": "t", "image": "copy.jpg", "question": asked, "answer": "1"}])
    assert main(["overlap", "t.jsonl", "b.jsonl", "--out", "out"]) == 0
    content = (place / "out" / "matches.html").read_text()
    page = Page(content)
    assert (page.open, page.rows, len(page.pictures)) == ([], 2, 2)  # one row is the head
    for picture in page.pictures:
        head, data = picture.split(",")
        assert head in ("data:image/jpeg;base64", "data:image/png;base64")
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 240
    assert page.words.count(asked) == 2 and "qa/<b>" in page.words
    assert not re.search(r"(src|href)=\"(?!data:)", content)


def test_limit_threshold_and_show(place, capsys):
    assert main(["overlap", "train.jsonl", "chats.json", "--limit", "1", "--threshold", "0", "--show", "0"]) == 0
    said = capsys.readouterr().out
    assert "chats.json: 1 samples" in said and re.search(r"any +0 +0\.0 % +0\n", said)


def test_without_matches_it_ends_well(place, capsys):
    write(place / "other.jsonl", [{"image": "3.png", "question": "Why?", "answer": "1"}])
    assert main(["overlap", "train.jsonl", "other.jsonl", "--out", "out"]) == 0
    assert re.search(r"any +0 +0\.0 % +0\n", capsys.readouterr().out)
    assert (place / "out" / "leave_out.txt").read_text() == (place / "out" / "matches.jsonl").read_text() == ""


def test_bad_pictures(place, capsys):
    (place / "1.png").write_bytes(b"broken")
    assert main(["overlap", "train.jsonl", "chats.json"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: TRAIN: sample qa/1.png: image ") and said.count("\n") == 1 and "--skip_bad" in said
    assert main(["overlap", "train.jsonl", "chats.json", "--skip_bad", "--out", "out"]) == 0
    assert "not read: 1 of TRAIN (1 broken_image): qa/1.png" in capsys.readouterr().out
    (bad,) = json.loads((place / "out" / "summary.json").read_text())["train"]["bad"]
    assert (bad["id"], bad["reason"]) == ("qa/1.png", "broken_image")


def ids(argument: str, side="BENCHMARK", **settings) -> list[str]:
    return [source[0].id for source in opened_sources(argument, side=side, **settings)]


def test_kinds_are_recognised(place):
    request = {"query": "<img src='x'> Open? Options: (a) yes (b) no", "images": ["p.jpg"], "answer": "(a)"}
    write(place / "mmvp" / "1" / "request.json", request)
    problem = {"problem_text": "Find x.", "choices": ["1", "2"], "answer": "A", "data_type": "train"}
    write(place / "geo" / "7" / "data.json", problem)
    write(place / "hub" / "train.jsonl", [{"images": ["p"], "problem": "Find x.", "answer": "1"}])
    write(place / "messages.jsonl", [{"messages": [{"role": "user", "content": "Why?"}]}])
    write(place / "pairs.jsonl", [{"prompt": "Why?", "chosen": "So", "rejected": "No"}])
    write(
        place / "coco.json", {"images": [{"id": 1, "file_name": "p"}], "annotations": [{"image_id": 1, "caption": "c"}]}
    )
    vista = dict.fromkeys(("choices", "unit", "precision")) | {"question_type": "free_form", "answer_type": "integer"}
    write(place / "vista" / "testmini.json", {"5": {"question": "Why?", "pid": "5", **vista}})
    write(place / "vista" / "other.json", [])
    vision = {"question": "Why?", "options": [], "answer": "1", "subject": "logic", "level": 1}
    write(place / "vision" / "testmini.jsonl", [vision])
    for path, id in {
        "mmvp": "mmvp/1",
        "geo": "geometry3k/7",
        "geo@train": "geometry3k/7",
        "messages.jsonl": "messages/0",
        "pairs.jsonl": "preference/0",
        "vista": "mathvista/5",
        "vision": "mathvision/0",
        "train.jsonl": "qa/0.png",
        "chats.json": "sharegpt/0",
    }.items():
        assert ids(path) == [id], path
    (place / "p").write_bytes(encoded(photo(1)))
    (place / "hub" / "p").write_bytes(encoded(photo(1)))
    assert ids("hub") == ids("hub@train") == ids("geometry3k=hub@train") == ["geometry3k/0"]
    assert ids("coco.json") == ["coco/1"]
    write(place / "a=b" / "t@1.jsonl", [{"question": "Why?", "answer": "1"}])
    assert ids("a=b/t@1.jsonl") == ids("qa=a=b/t@1.jsonl") == ["qa/0"]
    assert ids("world=@test", limit=2) == [opened(False, kind="world", split="test")[0].id]


def test_a_table_is_read_by_several_threads(place, hub_cache):
    columns = {"images": [[encoded(photo(n))] for n in range(20)], "problem": ["Find x."] * 20, "answer": ["1"] * 20}
    pq.write_table(pa.table(columns), place / "train.parquet")
    one, several = (fingerprint(opened_sources("train.parquet", side="TRAIN"), jobs=jobs) for jobs in (1, 4))
    assert one.pictures == several.pictures == [(n,) for n in range(20)]
    assert one.digests == several.digests


def test_named_sources_in_a_file(place, monkeypatch):
    monkeypatch.setenv("HERE", str(place))
    (place / "s.yaml").write_text(
        "one: {kind: qa, path: '${oc.env:HERE}/train.jsonl', limit: 2}\n"
        "two: {kind: qa, path: train.jsonl, columns: {image: null}, label: second}\n"
    )
    assert ids("s.yaml") == ["one/0.png", "second/0.png"]
    assert [len(s) for s in opened_sources("s.yaml", side="TRAIN", limit=2)] == [2, 2]
    assert fingerprint(opened_sources("s.yaml", side="TRAIN")).pictures == [(0,), (1,), (), (), ()]


def test_a_runs_configuration(place):
    (place / "base.yaml").write_text("vars: {file: train.jsonl}\n")
    (place / "run.yaml").write_text(
        "include: [base.yaml]\n"
        "data: {class_path: VLMData, init_args: {train: {mine: {kind: qa, path: '${vars.file}'}},"
        " predict: {asked: {kind: sharegpt, path: chats.json}}}}\n"
    )
    assert (ids("run.yaml", "TRAIN"), ids("run.yaml")) == (["mine/0.png"], ["asked/0"])
    (place / "evaluated.yaml").write_text(
        "include: [run.yaml]\n"
        "callbacks:\n"
        "  Benchmarks: {benchmarks: {short: {source: {kind: qa, path: train.jsonl, label: b, instruction: Briefly}}}}\n"
        "  HeldOutLoss: {source: {kind: sharegpt, path: chats.json}, name: held}\n"
        "  Geometry3K: null\n"
        "  SaveModel: {}\n"
    )
    assert ids("evaluated.yaml", "TRAIN") == ["mine/0.png"]
    assert ids("evaluated.yaml") == ["b/0.png", "sharegpt/0"]
    assert questions(opened_sources("evaluated.yaml", side="BENCHMARK")[0][0]) == ("whatisthere",)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("nowhere.jsonl", ["no file or folder 'nowhere.jsonl'", "KIND=nowhere.jsonl", "geometry3k, mathvista"]),
        ("owner/data@test", ["no file or folder 'owner/data'", "KIND=owner/data"]),
        ("geometry3=x", ["unknown data kind 'geometry3'; did you mean 'geometry3k'?"]),
        ("qa=nowhere.jsonl", ["data path 'nowhere.jsonl' does not exist"]),
        ("odd.jsonl", ["odd.jsonl is of no kind that is known by its columns (it has: a, b)", "KIND=odd.jsonl"]),
        ("both.jsonl", ["may be sharegpt or messages", "KIND=both.jsonl"]),
        ("two", ["name a `split` or a file"]),
        ("none.yaml", ["no configuration file 'none.yaml'"]),
        ("empty.yaml", ["names no data for BENCHMARK", "data.init_args.predict"]),
        ("wrong.yaml", ["one.pth", "did you mean 'path'?", "wrong.yaml:1"]),
        ("text.yaml", ["one: expected a source"]),
    ],
)
def test_what_is_refused(place, capsys, argument, words):
    write(place / "odd.jsonl", [{"a": 1, "b": 2}])
    write(place / "both.jsonl", [{"conversations": [], "messages": []}])
    for name in ("x", "y"):
        write(place / "two" / f"{name}.jsonl", [{"question": "Why?", "answer": "1"}])
    (place / "empty.yaml").write_text("vars: {a: 1}\n")
    (place / "wrong.yaml").write_text("one: {kind: qa, pth: train.jsonl}\n")
    (place / "text.yaml").write_text("one: train.jsonl\n")
    assert main(["overlap", "train.jsonl", argument]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: BENCHMARK: ") or "none.yaml" in said
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "more, word",
    [
        (["--threshold", "-1"], "--threshold must be at least 0"),
        (["--threshold", "200"], "0 to 127"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--out", "there"], "--out there is there already"),
        (["--deep"], "unrecognized arguments: --deep"),
    ],
)
def test_settings_that_are_refused(place, capsys, more, word):
    (place / "there").mkdir()
    assert main(["overlap", "train.jsonl", "chats.json", *more]) == 2
    assert word in capsys.readouterr().err


def test_mathvista_is_no_training_data_here_either(place, capsys):
    row = {"question": "Why?", "question_type": "free_form", "answer_type": "text", "precision": 0, "pid": "1"}
    write(place / "vista.jsonl", [row | {"unit": None, "choices": None}])
    for argument in ("vista.jsonl", "mathvista=vista.jsonl", "qa=AI4Math/MathVista"):
        assert main(["overlap", argument, "train.jsonl"]) == 2
        said = capsys.readouterr().err
        assert "training on it is prohibited" in said and said.startswith("error: TRAIN: ")


def test_the_command_is_quick_to_start(place):
    code = (
        "import sys; from lightning_vlm.cli.main import main; "
        "assert main(['overlap', 'train.jsonl', 'chats.json']) == 0; "
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
