"""Sources: conversations, tables, preference pairs on tiny files, and every refusal."""

from __future__ import annotations

import base64
import pickle

import pytest

from lightning_vlm.data.schema import BadSample

from .sources_kit import opened, picture, png, refused, types, words, write

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


def test_a_gold_answer_beside_the_conversation(tmp_path):
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "two"}]
    rows = [{"id": "a", "messages": turns, "answer": "2"}, {"id": "b", "messages": turns, "answer": 3}]
    rows.append({"id": "c", "messages": turns})
    samples = opened(kind="messages", path=write(tmp_path / "d.json", rows))
    assert [sample.answer for sample in samples] == ["2", "3", None]


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
    assert opened(False, kind="qa", path=str(tmp_path))[0].answer == "3"  # what is evaluated is the test split
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
