"""Sources: every schema on tiny files, every refusal, and the real data where it is."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lightning_vlm.data.schema import BadSample
from lightning_vlm.data.sources import SourceSpec, open_source

REAL = Path(os.environ.get("LVLM_REAL_DATA", "/nonexistent"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="LVLM_REAL_DATA is not set")


def opened(for_training=True, **spec):
    return open_source(SourceSpec(**spec), for_training=for_training)


def refused(*words, for_training=True, **spec):
    """The spec must be refused in one line that has all the words."""
    with pytest.raises(ValueError) as error:
        opened(for_training, **spec)
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said


def write(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return str(path)


def png(colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
    return path


def types(message) -> list[str]:
    return [part["type"] for part in message["content"]]


def words(message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


# --- conversations


def test_sharegpt_tags_keep_their_place_and_text(tmp_path):
    turns = [
        {"from": "human", "value": "Is this <image> the same\nas <image>?"},
        {"from": "gpt", "value": "No."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Colour."},
    ]
    rows = [{"id": "a", "conversations": turns, "images": ["x/1.png", "x/2.png"], "level": 3}]
    (tmp_path / "x").mkdir()
    sample = opened(kind="sharegpt", path=write(tmp_path / "d.json", rows))[0]
    assert sample.id == "sharegpt/a" and sample.source == "sharegpt" and sample.info == {"id": "a", "level": 3}
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert types(sample.messages[0]) == ["text", "image", "text", "image", "text"]
    assert words(sample.messages[0]) == "Is this  the same\nas ?"
    # paths only: the pictures do not exist, and nobody looks before the encoder does
    assert sample.images == [str(tmp_path / "x/1.png"), str(tmp_path / "x/2.png")]
    assert sample.chosen() == "Colour."


def test_images_without_any_tag_go_before_the_first_user_text(tmp_path):
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}],
        "image": str(tmp_path / "1.png"),
    }
    sample = opened(kind="sharegpt", path=write(tmp_path / "d.jsonl", [row]))[0]
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant"]
    assert sample.id == "sharegpt/0"
    assert types(sample.messages[1]) == ["image", "text"] and len(sample.images) == 1


def test_mismatch_and_video_are_kept_for_the_encoder(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "<image><image>?"}], "images": ["1.png"]},
        {"conversations": [{"from": "human", "value": "<image>?"}], "images": ["1.png", "2.png"]},
        {"conversations": [{"from": "human", "value": "<video>?"}], "videos": ["1.mp4"]},
        {"conversations": [{"from": "human", "value": "?"}], "video": "1.mp4"},
    ]
    source = opened(kind="sharegpt", path=write(tmp_path / "d.json", rows))
    assert [types(s.messages[0]) for s in source] == [
        ["image", "image", "text"],
        ["image", "text"],
        ["video", "text"],
        ["video", "text"],
    ]
    assert [len(s.images) for s in source] == [1, 2, 0, 0]


def test_messages_with_parts_and_inline_images(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    content = [
        {"type": "text", "text": "Compare <image> "},
        {"type": "image", "image": "file://" + str(tmp_path / "a.png")},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image"},
        {"type": "video", "video": "v.mp4"},
    ]
    rows = [
        {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}],
            "images": ["b.png"],
        }
    ]
    sample = opened(kind="messages", path=write(tmp_path / "d.json", rows))[0]
    assert types(sample.messages[0]) == ["text", "image", "image", "image", "video"]
    assert words(sample.messages[0]) == "Compare <image> "  # literal in a list of parts
    assert sample.images[0] == str(tmp_path / "a.png") and sample.images[2] == str(tmp_path / "b.png")
    assert sample.images[1]().convert("RGB").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    "turns, said",
    [
        ([{"from": "robot", "value": "x"}], "unknown role 'robot'"),
        ([{"text": "x"}], "role/content or from/value"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "unknown part type 'audio'"),
        ([{"role": "user", "content": 3}], "content must be text"),
        ([], "list of messages"),
    ],
)
def test_malformed_rows_are_bad_samples_with_their_id(tmp_path, turns, said):
    source = opened(kind="sharegpt", path=write(tmp_path / "d.json", [{"id": 7, "conversations": turns}]))
    with pytest.raises(BadSample, match=said) as error:
        source[0]
    assert error.value.id == "sharegpt/7" and error.value.reason == "malformed"


def test_row_without_its_conversation_is_a_bad_sample(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "x"}]}, {"other": 1}]
    source = opened(kind="sharegpt", path=write(tmp_path / "d.json", rows))
    with pytest.raises(BadSample) as error:
        source[1]
    assert error.value.reason == "missing_column"


# --- tables: files, folders, hub, ids, columns


def test_parquet_images_stay_encoded_and_hub_schema_reads(tmp_path, hub_cache):
    datasets = hub_cache
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = {"images": [[{"bytes": png(), "path": None}]], "problem": ["<image>Find x."], "answer": ["2 \\sqrt { 221 }"]}
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "set/data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "set/data/train-00000-of-00001.parquet"))
    table.to_parquet(str(tmp_path / "set/data/test-00000-of-00001.parquet"))
    source = opened(kind="geometry3k", path=str(tmp_path / "set"), split="train")
    sample = pickle.loads(pickle.dumps(source))[0]  # as a worker that is spawned gets it
    assert sample.images == [png()]
    assert sample.answer == "2 \\sqrt { 221 }" and sample.chosen() == "\\boxed{2 \\sqrt { 221 }}"
    assert types(sample.messages[0]) == ["image", "text"]
    assert sample.id == "geometry3k/0"
    refused("split", "test, train", kind="geometry3k", path=str(tmp_path / "set"))
    refused("no data of split 'val'", "test, train", kind="geometry3k", path=str(tmp_path / "set"), split="val")
    refused(
        "no column 'choices'",
        "original folders",
        kind="geometry3k",
        path=str(tmp_path / "set"),
        split="test",
        prompt="mcq",
    )


def test_hub_name_goes_through_load_dataset(monkeypatch, hub_cache):
    datasets, asked = hub_cache, []

    def load_dataset(path, *, name, split):
        asked.append((path, name, split))
        if path == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nmore")
        return datasets.Dataset.from_dict(
            {"images": [[{"bytes": png(), "path": None}]], "problem": ["Find x."], "answer": ["5"]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sample = opened(kind="geometry3k", path="hiyouga/geometry3k", split="test")[0]
    assert sample.images == [png()] and types(sample.messages[0]) == ["image", "text"]
    opened(kind="geometry3k", path="hiyouga/geometry3k", name="v2")
    assert asked == [("hiyouga/geometry3k", None, "test"), ("hiyouga/geometry3k", "v2", "train")]
    refused("no/such", "no local path", "doesn't exist on the Hub", kind="qa", path="no/such")


def test_folder_of_files_by_split(tmp_path):
    write(tmp_path / "train.jsonl", [{"question": "1+1?", "answer": 2}])
    source = opened(kind="qa", path=str(tmp_path))  # the only one
    assert source[0].answer == "2" and source[0].chosen() == "2" and source[0].images == []
    write(tmp_path / "test.jsonl", [{"question": "1+2?", "answer": "3"}])
    boxed = opened(kind="qa", path=str(tmp_path), split="test", prompt="boxed")[0]
    assert boxed.chosen() == "\\boxed{3}" and "\\boxed{}" in words(boxed.messages[0])
    refused("name a `split`", "test, train", kind="qa", path=str(tmp_path))
    write(tmp_path / "test.json", [{"question": "1+2?", "answer": "3"}])
    refused("several times", kind="qa", path=str(tmp_path), split="test")
    refused("one file; leave it out", kind="qa", path=str(tmp_path / "test.json"), split="test")


def test_ids(tmp_path):
    rows = [
        {"id": 5, "uid": "b", "question": "q", "answer": "a"},
        {"id": 5, "uid": "c", "question": "q", "answer": "a"},
    ]
    path = write(tmp_path / "d.json", rows)
    refused("id 5 occurs twice (rows 0 and 1)", "columns: {id: null}", kind="qa", path=path)
    assert [s.id for s in opened(kind="qa", path=path, columns={"id": None})] == ["qa/0", "qa/1"]
    assert [s.id for s in opened(kind="qa", path=path, columns={"id": "uid"}, label="mine")] == ["mine/b", "mine/c"]
    keyed = write(
        tmp_path / "keyed.json", {"x": {"question": "q", "answer": "a"}, "y": {"question": "q", "answer": "a"}}
    )
    assert [s.id for s in opened(kind="qa", path=keyed)] == ["qa/x", "qa/y"]
    refused("row 1 has no id", kind="qa", path=write(tmp_path / "n.json", [rows[0], {"question": "q", "answer": "a"}]))


def test_columns_renamed(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": "Which?", "pic": "p.png", "a": "this"}])
    sample = opened(kind="qa", path=path, columns={"question": "q", "answer": "a", "image": "pic"})[0]
    assert sample.images == [str(tmp_path / "p.png")] and sample.chosen() == "this"
    refused("no column 'question'", "it has: q, pic, a", "columns: {question: THEIR_NAME}", kind="qa", path=path)
    refused("no column 'qq'", "did you mean 'q'", kind="qa", path=path, columns={"question": "qq"})
    refused("reads no column 'questoin'", "did you mean 'question'", kind="qa", path=path, columns={"questoin": "q"})
    typo = write(tmp_path / "t.jsonl", [{"question": "?", "anwser": "x"}])
    refused("no column 'answer'", "did you mean 'anwser'", kind="qa", path=typo)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\n\n{"question": \n')
    refused("bad.jsonl:3: not JSON", kind="qa", path=str(tmp_path / "bad.jsonl"))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    refused("list.jsonl:1: list, expected an object", kind="qa", path=str(tmp_path / "list.jsonl"))
    (tmp_path / "bad.json").write_text('[\n{"question": "q",}\n]')
    refused("bad.json:2: not JSON", kind="qa", path=str(tmp_path / "bad.json"))
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    refused("latin.jsonl:1: not UTF-8", kind="qa", path=str(tmp_path / "latin.jsonl"))
    refused("is empty", kind="qa", path=write(tmp_path / "empty.json", []))
    refused("is empty", kind="qa", path=write(tmp_path / "empty.jsonl", []))
    refused("expected a list of objects", kind="qa", path=write(tmp_path / "shape.json", {"rows": [1]}))
    refused("entry 1 is int", kind="qa", path=write(tmp_path / "entry.json", [{}, 1]))
    (tmp_path / "d.csv").write_text("a,b")
    refused("cannot read .csv", ".parquet", kind="qa", path=str(tmp_path / "d.csv"))
    (tmp_path / "d.parquet").write_text("no")
    refused("cannot load", "d.parquet", kind="qa", path=str(tmp_path / "d.parquet"))


def test_paths_that_are_not_there(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"question": "q", "answer": "a", "image": "images/1.png"}])
    refused("does not exist", "did you mean 'train.jsonl'", kind="qa", path=str(tmp_path / "trian.jsonl"))
    refused("its folder is missing too", str(tmp_path), kind="qa", path=str(tmp_path / "no/where/train.jsonl"))
    refused("needs a `path`", kind="qa")
    refused("images does not exist", "images_root", "images_prefix", kind="qa", path=path)
    refused("images_root", "is not a folder", kind="qa", path=path, images_root=str(tmp_path / "no"))
    picture(tmp_path / "pictures/2.png")
    # one missing picture of a folder that exists is for the encoder to report
    source = opened(kind="qa", path=path, images_root=str(tmp_path / "pictures"), images_prefix="images/")
    assert source[0].images == [str(tmp_path / "pictures/1.png")]


def test_specs_that_mean_nothing(tmp_path):
    path = write(tmp_path / "d.json", [{"question": "q", "answer": "a"}] * 3)
    refused("unknown data kind 'geometry'", "did you mean 'geometry3k'", kind="geometry", path=path)
    refused("does not use `prompt`", kind="sharegpt", path=path, prompt="mcq")
    refused("does not use `options`", kind="qa", path=path, options={"captions": "all"})
    refused("has no option 'caption'", "did you mean 'captions'", kind="coco", path=path, options={"caption": "all"})
    refused("unknown prompt 'boxd'", "did you mean 'boxed'", kind="qa", path=path, prompt="boxd")
    refused("limit must be at least 1", kind="qa", path=path, limit=0)
    refused("weight must be a positive number", kind="qa", path=path, weight=0.0)
    refused("configuration of a hub data set", kind="qa", path=path, name="main")
    assert len(opened(kind="qa", path=path, limit=2)) == 2 and len(opened(kind="qa", path=path, limit=9)) == 3


def test_sequence_protocol(tmp_path):
    source = opened(kind="qa", path=write(tmp_path / "d.json", [{"question": str(i), "answer": "a"} for i in range(3)]))
    assert [s.id for s in source] == [s.id for s in source[:]] == ["qa/0", "qa/1", "qa/2"]
    assert source[-1].id == "qa/2"
    with pytest.raises(IndexError):
        source[3]


# --- preference pairs

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
GOOD, BAD = (
    {"role": "assistant", "content": "A cat."},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<image>What is it?", "chosen": "A cat.", "rejected": "A dog."},
        {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
        {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
        {
            "conversations": [{"from": "human", "value": "<image>What is it?"}],
            "chosen": {"from": "gpt", "value": "A cat."},
            "rejected": {"from": "gpt", "value": "A dog."},
        },
    ],
    ids=["strings", "question", "messages", "implicit prompt", "sharegpt"],
)
def test_preference_shapes_give_the_same_sample(tmp_path, row):
    sample = opened(kind="preference", path=write(tmp_path / "d.jsonl", [{"images": ["1.png"], **row}]))[0]
    assert [m["role"] for m in sample.messages] == ["user", "assistant"]
    assert types(sample.messages[0]) == ["image", "text"] and words(sample.messages[0]) == "What is it?"
    assert sample.chosen() == "A cat." and sample.rejected == "A dog."
    assert sample.images == [str(tmp_path / "1.png")]


def test_preference_parquet_messages(tmp_path, hub_cache):
    rows = [{"images": [{"bytes": png(), "path": None}], "prompt": PROMPT, "chosen": [GOOD], "rejected": [GOOD]}]
    hub_cache.Dataset.from_list(rows).to_parquet(str(tmp_path / "d.parquet"))
    sample = opened(kind="preference", path=str(tmp_path / "d.parquet"))[0]
    assert types(sample.messages[0]) == ["image", "text"] and sample.images == [png()] and sample.rejected == "A cat."


def test_preference_refusals(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "c", "reject": "r"}])
    refused(
        "no column 'rejected'", "it has: prompt, chosen, reject", "did you mean 'reject'", "lightning-vlm predict",
        kind="preference", path=path,
    )  # fmt: skip
    assert opened(kind="preference", path=path, columns={"rejected": "reject"})[0].rejected == "r"
    refused(
        "no column 'prompt'", kind="preference", path=write(tmp_path / "n.jsonl", [{"chosen": "c", "rejected": "r"}])
    )
    other = [{"role": "user", "content": "Else?"}]
    for row in (
        {"chosen": [*PROMPT, GOOD], "rejected": [*other, BAD]},
        {"prompt": "p", "chosen": [*PROMPT, GOOD], "rejected": [BAD]},
        {"prompt": "p", "chosen": [{"role": "assistant", "content": "<image>"}], "rejected": [BAD]},
    ):
        with pytest.raises(BadSample) as error:
            opened(kind="preference", path=write(tmp_path / "m.jsonl", [row]))[0]
        assert error.value.reason == "malformed"


# --- named data sets


def geometry_folder(root: Path, number: int, *, split="train", answer="C") -> None:
    problem = {"problem_text": "Find y.", "choices": ["5", "5 \\sqrt { 2 }", "5 \\sqrt { 3 }", "10"], "answer": answer}
    write(root / str(number) / "data.json", {**problem, "id": number, "data_type": split})
    picture(root / str(number) / "img_diagram.png")


def test_geometry3k_folders(tmp_path):
    for number, split in ((2, "train"), (10, "train"), (9, "test")):
        geometry_folder(tmp_path, number, split=split)
    source = opened(kind="geometry3k", path=str(tmp_path))
    assert [s.id for s in source] == ["geometry3k/2", "geometry3k/9", "geometry3k/10"]
    free = source[0]
    assert free.answer == "5 \\sqrt { 3 }" and free.chosen() == "\\boxed{5 \\sqrt { 3 }}" and free.info["letter"] == "C"
    shown = words(free.messages[0])
    assert not any(choice in shown for choice in ("sqrt", "10", "(A)"))  # freeform does not leak the options
    assert Image.open(free.images[0]).size == (4, 3)
    mcq = opened(kind="geometry3k", path=str(tmp_path), prompt="mcq", split="test")
    assert len(mcq) == 1 and mcq[0].answer == "C" and "\n(C) 5 \\sqrt { 3 }\n" in words(mcq[0].messages[0])
    short = opened(kind="geometry3k", path=str(tmp_path), instruction="")[0]
    assert words(short.messages[0]) == "Find y."
    refused("no problem of split 'val'", "test, train", kind="geometry3k", path=str(tmp_path), split="val")


def test_geometry3k_split_folders_and_wrong_letter(tmp_path):
    geometry_folder(tmp_path / "val", 1, split="val", answer="E")
    source = opened(kind="geometry3k", path=str(tmp_path), split="val")
    with pytest.raises(BadSample, match="'E' is no letter of its 4 choices"):
        source[0]
    write(tmp_path / "broken" / "3" / "data.json", {"problem_text": "?"})
    refused("3/data.json: no 'choices'", kind="geometry3k", path=str(tmp_path / "broken"))


def vista(**row) -> dict:
    base = {"question": "How long?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": None}
    return {
        **base,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"task": "t"},
        **row,
    }


def test_mathvista(tmp_path):
    released = {
        "7": vista(pid="7", unit="g"),
        "8": vista(pid="8", question_type="multi_choice", answer_type="text", choices=["up", "down"], answer="up"),
    }
    path = str(tmp_path)
    write(tmp_path / "testmini.json", released)
    refused("images does not exist", kind="mathvista", path=path, for_training=False)
    picture(tmp_path / "images/1.jpg")
    source = opened(False, kind="mathvista", path=path)
    first, second = source
    assert first.id == "mathvista/7" and first.answer == "1.2" and first.images == [str(tmp_path / "images/1.jpg")]
    assert words(first.messages[0]).endswith("e.g., 1, 2, 3, at the end.\nQuestion: How long? (Unit: g)")
    assert words(second.messages[0]).endswith("Choices:\n(A) up\n(B) down")
    assert [m["role"] for m in first.messages] == ["user"] and first.info["metadata"] == {"task": "t"}
    hub_like = write(
        tmp_path / "table.jsonl", [vista(pid="9", query="Q!", decoded_image={"bytes": None, "path": "images/1.jpg"})]
    )
    assert words(opened(False, kind="mathvista", path=hub_like)[0].messages[0]) == "Q!"


def test_mathvista_is_never_trained_on(tmp_path):
    refused("CC BY-SA 4.0", "MathVista", kind="mathvista", path=str(tmp_path))
    refused("CC BY-SA 4.0", kind="qa", path="AI4Math/MathVista")


def test_mathvision(tmp_path):
    rows = [
        {"id": "1", "question": "Which?\n<image1>\n<image2>", "options": ["A", "B"], "answer": "B", "level": 2},
        {"id": "2", "question": "Left <image1> right", "options": [], "answer": "60", "level": 1},
        {"id": "3", "question": "Pick.", "options": ["7", "<image1>"], "answer": "A", "level": 1},
    ]
    write(tmp_path / "testmini.jsonl", [{**r, "subject": "logic", "image": f"images/{r['id']}.jpg"} for r in rows])
    write(tmp_path / "test.jsonl", [])
    picture(tmp_path / "images/1.jpg")
    one, two, three = opened(kind="mathvision", path=str(tmp_path))
    assert types(one.messages[0]) == ["text", "image", "text"] and len(one.images) == 1
    assert "<image2>\nChoices: A, B\n" in words(one.messages[0]) and one.answer == "B"
    assert types(two.messages[0]) == ["text", "image", "text"] and two.chosen() == "\\boxed{60}"
    assert types(three.messages[0]) == ["image", "text"] and "(A) 7\n(B) <image1>" in words(three.messages[0])
    assert one.info["level"] == 2 and one.info["options"] == ["A", "B"]


def test_mmvp(tmp_path):
    for number, answer in ((1, "(a)"), (2, "(b)"), (10, "(b)")):
        query = f"<img src='../t/{number}.jpg'> Is it open? Options: (a) Open (b) Closed"
        request = {"query": query, "images": [f"../t/{number}.jpg"], "answer": answer}
        write(tmp_path / "processed" / str(number) / "request.json", request)
        picture(tmp_path / "processed" / str(number) / f"{number}.jpg")
    source = opened(kind="mmvp", path=str(tmp_path))
    assert [(s.id, s.answer, s.info["pair"]) for s in source] == [
        ("mmvp/1", "(a)", 1),
        ("mmvp/2", "(b)", 1),
        ("mmvp/10", "(b)", 5),
    ]
    assert words(source[0].messages[0]) == "Is it open?\n(a) Open\n(b) Closed\nAnswer with (a) or (b)."
    assert Image.open(source[2].images[0]).size == (4, 3)
    refused("is empty", kind="mmvp", path=str(tmp_path / "processed" / "1"))
    refused("both questions of a pair, and 10 is alone", kind="mmvp", path=str(tmp_path), options={"swap_pairs": True})
    refused("true or false, got 1", kind="mmvp", path=str(tmp_path), options={"swap_pairs": 1})
    refused("did you mean 'swap_pairs'", kind="mmvp", path=str(tmp_path), options={"swap_pair": True})
    shutil.rmtree(tmp_path / "processed" / "10")
    swapped = opened(kind="mmvp", path=str(tmp_path), options={"swap_pairs": True})
    assert [(s.id, s.answer, os.path.basename(s.images[0])) for s in swapped] == [
        ("mmvp/1", "(a)", "2.jpg"),
        ("mmvp/2", "(b)", "1.jpg"),
    ]


def karpathy(name: str, split: str, captions: list[str], number: int) -> dict:
    sentences = [{"raw": c} for c in captions]
    return {"filepath": "val2014", "filename": name, "cocoid": number, "split": split, "sentences": sentences}


def test_coco_karpathy(tmp_path):
    images = [
        karpathy("1.jpg", "train", ["a cat.", "one cat "], 11),
        karpathy("2.jpg", "restval", ["a dog"], 12),
        karpathy("3.jpg", "test", ["a cow", "the cow", "cow"], 13),
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    refused("several splits (restval, test, train)", "train+restval", kind="coco", path=path)
    refused("no split 'tset'", kind="coco", path=path, split="tset")
    refused("image folder", "val2014 does not exist", "images_root", kind="coco", path=path, split="test")
    picture(tmp_path / "photos/val2014/1.jpg")
    root = str(tmp_path / "photos")
    train = opened(kind="coco", path=path, split="train+restval", images_root=root)
    assert [(s.id, s.chosen()) for s in train] == [
        ("coco/11#0", "a cat."),
        ("coco/11#1", "one cat"),
        ("coco/12#0", "a dog"),
    ]
    assert train[0].images == [root + "/val2014/1.jpg"] and train[0].info["references"] == ["a cat.", "one cat "]
    one = opened(kind="coco", path=path, split="train+restval", images_root=root, options={"captions": "one"})
    assert [one.draw(0, epoch).chosen() for epoch in range(3)] == ["a cat.", "one cat", "a cat."]
    test = opened(False, kind="coco", path=path, split="test", images_root=root)
    assert len(test) == 1 and len(test[0].info["references"]) == 3 and test[0].info["image_id"] == 13
    refused("unknown captions 'al'", kind="coco", path=path, split="test", options={"captions": "al"})


def test_coco_flat_folder_and_annotations(tmp_path):
    picture(tmp_path / "1.jpg")
    path = write(tmp_path / "dataset_coco.json", {"images": [karpathy("1.jpg", "test", ["a"], 1)]})
    assert opened(kind="coco", path=path)[0].images == [str(tmp_path / "1.jpg")]
    notes = [{"id": 1, "image_id": 5, "caption": "x"}, {"id": 2, "image_id": 5, "caption": "y"}]
    images = [{"id": 5, "file_name": "1.jpg"}, {"id": 6, "file_name": "1.jpg"}]
    path = write(tmp_path / "captions_val2014.json", {"images": images, "annotations": notes})
    source = opened(kind="coco", path=path)
    assert [s.chosen() for s in source] == ["x", "y"] and source[0].info["references"] == ["x", "y"]
    with pytest.raises(BadSample, match="no caption"):
        opened(False, kind="coco", path=path)[1]
    refused("`split: val` has no meaning", kind="coco", path=path, split="val")
    boxes = {"images": images, "annotations": [{"id": 1, "image_id": 5, "bbox": []}]}
    refused("annotation 1 has no caption", kind="coco", path=write(tmp_path / "instances.json", boxes))
    refused("expected an object with `images`", kind="coco", path=write(tmp_path / "l.json", []))


def test_world(tmp_path):
    source = opened(kind="world", split="test", options={"size": 4})
    assert len(source) == 4 and callable(source[0].images[0]) and source[0].source == "world"
    mine = opened(kind="world", label="mine", options={"size": 4})
    assert mine[0].id.startswith("mine/world") and mine.sample_id(1) == mine[1].id
    refused("no option 'sizes'", "did you mean 'size'", kind="world", options={"sizes": 4})
    refused("does not use `path`", kind="world", path="x")


# --- real data


@real_data
@pytest.mark.real_data
def test_real_geometry3k():
    ten = opened(kind="geometry3k", path=str(REAL / "geometry3k/intergps_examples"))
    assert len(ten) == 10 and ten[4].id == "geometry3k/15" and ten[4].answer == "5 \\sqrt { 3 }"
    assert ten[8].chosen() == "\\boxed{\\frac { 2 \\sqrt { 2 } } { 5 }}"
    for sample in ten:
        assert Image.open(sample.images[0]).size == (sample.info["img_width"], sample.info["img_height"])
    sketch = opened(kind="geometry3k", path=str(REAL / "geometry3k/visualsketchpad"), prompt="mcq")
    assert len(sketch) == 48 and sum(os.path.exists(s.images[0]) for s in sketch) == 47
    assert {s.answer for s in sketch} <= set("ABCD")
    assert len(opened(kind="geometry3k", path=str(REAL / "geometry3k/visualsketchpad"), split="val")) == 2


@real_data
@pytest.mark.real_data
def test_real_mathvision_and_mathvista():
    mini = opened(kind="mathvision", path=str(REAL / "mathvision"))
    assert len(mini) == 304 and all(os.path.exists(s.images[0]) for s in mini)
    assert all(sum(p["type"] == "image" for p in s.messages[0]["content"]) == 1 for s in mini)
    assert mini[0].id == "mathvision/4" and mini[0].answer == "6" and mini[0].info["subject"] == "counting"
    assert len(opened(kind="mathvision", path=str(REAL / "mathvision"), split="test")) == 3040
    from lightning_vlm.data.sources.mathvista import released_query

    rows = json.loads((REAL / "mathvista/testmini.json").read_text())
    queries = json.loads((REAL / "mathvista/query.json").read_text())
    assert len(rows) == 1000 and all(released_query(row) == queries[pid] for pid, row in rows.items())
    refused("images does not exist", kind="mathvista", path=str(REAL / "mathvista"), for_training=False)


@real_data
@pytest.mark.real_data
def test_real_mmvp():
    source = opened(kind="mmvp", path=str(REAL / "mmvp"))
    assert len(source) == 300 and all(os.path.exists(s.images[0]) for s in source)
    for first, second in zip(source[:40:2], source[1:40:2], strict=True):
        assert first.info["pair"] == second.info["pair"] and {first.answer, second.answer} == {"(a)", "(b)"}
        assert first.prompt()[0] == second.prompt()[0] and first.images != second.images


@real_data
@pytest.mark.real_data
def test_real_conversations():
    demo = opened(kind="messages", path=str(REAL / "vlm_demos/llamafactory/mllm_demo.json"))
    assert len(demo) == 6 and [len(s.images) for s in demo] == [2, 1, 1, 2, 1, 1]
    assert types(demo[0].messages[2]) == ["text", "image"] and all(os.path.exists(i) for s in demo for i in s.images)
    path = str(REAL / "vlm_demos/qwen_vl_finetune/single_images.json")
    refused("demo/images does not exist", "images_prefix", kind="sharegpt", path=path)
    qwen = opened(kind="sharegpt", path=path, images_prefix="demo/")
    assert [s.chosen() for s in qwen] == ["Yes", "6", "2014"] and all(os.path.exists(s.images[0]) for s in qwen)
    assert types(qwen[0].messages[0]) == ["text", "image"]


@real_data
@pytest.mark.real_data
def test_real_coco_photographs(tmp_path):
    """The Karpathy schema around the 19 photographs, with their references."""
    results = {r["image_name"]: r["captions"] for r in json.loads((REAL / "coco/magic_result.json").read_text())}
    names = sorted(p.name for p in (REAL / "coco/images").iterdir())
    images = [karpathy(n, "test", results[n], int(n[-16:-4])) for n in names if n in results]
    path = write(tmp_path / "dataset_coco.json", {"images": images})
    source = opened(False, kind="coco", path=path, images_root=str(REAL / "coco/images"))
    assert len(source) == len(images) > 0 and all(os.path.exists(s.images[0]) for s in source)
    assert all(len(s.info["references"]) == 5 for s in source)


def test_examples_of_the_documentation_are_valid_specs():
    from omegaconf import OmegaConf

    from lightning_vlm.data.sources import KINDS, _check

    blocks = (Path(__file__).parents[1] / "docs/data.md").read_text().split("```yaml\n")[2:]
    for block in blocks:
        text = block.split("```")[0].replace("\ngeometry:", "\nagain:", 1)  # one name shows two ways
        for spec in OmegaConf.to_container(OmegaConf.create(text)).values():
            _check(SourceSpec(**spec), KINDS[spec["kind"]])
