"""Pairs that nothing can be learned from: refused by the source or the encoder, and through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_vlm.cli.main import main
from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import BadSample, Sample, message, text
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

from .runs.commands import BASE, enter, workplace, write
from .sources_kit import opened, png

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there ?"}]}]


def said(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]


def shown(image: str) -> list[dict]:
    """A user turn that brings its own picture."""
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is there ?"}]}
    ]


def pair(**columns) -> dict:
    return {
        "id": "bad",
        "image": "red.png",
        "prompt": "<image>what is there ?",
        "chosen": "red",
        "rejected": "blue",
    } | columns


DIFFERENT = "chosen and rejected show different images (red.png; other.png)"
BAD = {  # name: row, what the message says, the reason it is counted by
    "equal": (pair(rejected=" red\n"), "chosen and rejected are the same text ('red')", "equal_answers"),
    "equal messages": (
        {"id": "bad", "image": "red.png", "chosen": [*ASKED, *said("a b")], "rejected": [*ASKED, *said("a b")]},
        "chosen and rejected are the same text ('a b')",
        "equal_answers",
    ),
    "no rejected": (pair(rejected=None), "the row has no 'rejected'", "missing_column"),
    "no chosen": (pair(chosen=None), "the row has no 'chosen'", "missing_column"),
    "empty rejected": (pair(rejected=" "), "the rejected answer is empty (' ')", "empty_answer"),
    "empty chosen": (pair(chosen=""), "the chosen answer is empty ('')", "empty_answer"),
    "both empty": (pair(chosen="", rejected=""), "the chosen answer is empty ('')", "empty_answer"),
    "own images": (
        {"id": "bad", "chosen": [*shown("red.png"), *said("a")], "rejected": [*shown("other.png"), *said("b")]},
        DIFFERENT,
        "malformed",
    ),
    "one brings an image": (
        {"id": "bad", "chosen": [*shown("red.png"), *said("a")], "rejected": [*ASKED, *said("b")]},
        "chosen and rejected show different images (red.png; none)",
        "malformed",
    ),
    "rejected_images": (pair(rejected_images=["other.png"]), DIFFERENT, "malformed"),
    "chosen_images": (
        pair(image=None, chosen_images=["red.png"], rejected_images=["other.png"]), DIFFERENT, "malformed",
    ),
    "too long": (
        pair(rejected="blue " * 250),
        "tokens, more than max_length 256: raise it",
        "too_long",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A working directory with two good pairs beside each bad one."""
    folder = tmp_path_factory.mktemp("bad_pairs")
    workplace(folder)
    (folder / "other.png").write_bytes(png("blue"))
    for name, (bad, _, _) in BAD.items():
        good = {key: pair()[key] for key in ("image", "prompt", "chosen", "rejected")}
        if "prompt" not in bad:
            good = {"image": "red.png", "chosen": [*ASKED, *said("red")], "rejected": [*ASKED, *said("blue")]}
        write(folder / f"{name}.jsonl", *({"id": f"good{n}", **good} for n in range(2)), bad)
    return folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    enter(files, monkeypatch)


@pytest.fixture(scope="module")
def processor():
    return load_processor(Backbone(path="embedded:qwen2_5_vl-tiny"))


@pytest.mark.parametrize("name", BAD)
def test_the_encoder_or_the_source_refuses(name, processor):
    source, encoder = opened(kind="preference", path=f"{name}.jsonl"), Encoder(processor, max_length=256)
    chosen, rejected = encoder.encode_pair(source[0])
    assert chosen.input_ids.tolist() != rejected.input_ids.tolist()
    with pytest.raises(BadSample) as error:
        encoder.encode_pair(source[2])
    _, words, reason = BAD[name]
    assert words in str(error.value) and error.value.reason == reason and error.value.id == "preference/bad"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD)
def test_a_run_is_refused(name, refused):
    path = ["--data.train.toy.kind", "preference", "--data.train.toy.path", f"{name}.jsonl"]
    line = refused("--model", "DPO", *path)
    assert "sample toy/bad: " in line and BAD[name][1] in line and "data.on_bad_sample: skip" in line


def test_a_bad_pair_is_left_out_and_counted(tmp_path):
    path = ["--data.train.toy.kind", "preference", "--data.train.toy.path", "equal.jsonl"]
    run = ["--run_dir", str(tmp_path / "run"), "--data.on_bad_sample", "skip"]
    assert main(["fit", "-c", BASE, "--model", "DPO", *path, *run]) == 0
    (record,) = [json.loads(line) for line in Path(tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert (record["id"], record["reason"]) == ("toy/bad", "equal_answers")


def test_which_side_is_too_long(processor):
    encoder = Encoder(processor, max_length=256)
    for side in ("chosen", "rejected"):
        write("long.jsonl", pair(**{side: "blue " * 250}))
        with pytest.raises(BadSample, match=f"with the {side} answer: .* more than max_length 256"):
            encoder.encode_pair(opened(kind="preference", path="long.jsonl")[0])


def test_what_is_cut_to_the_same_is_refused(processor):
    """With `truncate: right` two texts that differ behind the limit are one."""
    prompt = [message("user", text("what ?"))]
    sample = Sample("s", [*prompt, message("assistant", text("red " * 60 + "red"))], rejected="red " * 60 + "blue")
    length = len(Encoder(processor).encode_prompt(sample).input_ids) + 20
    with pytest.raises(BadSample, match="differ only behind max_length") as error:
        Encoder(processor, max_length=length, truncate="right").encode_pair(sample)
    assert error.value.reason == "equal_answers"
    assert len(Encoder(processor).encode_pair(sample)) == 2


def test_a_conversation_without_an_answer_has_no_chosen(processor):
    with pytest.raises(BadSample, match="has no `chosen` text") as error:
        Encoder(processor).encode_pair(Sample("s", [message("user", text("what ?"))], rejected="blue"))
    assert error.value.reason == "missing_column"


def test_the_same_images_on_both_sides_are_one_pair():
    """As ms-swift's `rejected_images`, or in both conversations, also as data URIs."""
    import base64

    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    for row in (
        pair(rejected_images=["red.png"]),
        pair(image=None, chosen_images=["red.png"], rejected_images=["red.png"]),
        {"id": 1, "chosen": [*shown("red.png"), *said("a")], "rejected": [*shown("red.png"), *said("b")]},
        {"id": 1, "chosen": [*shown(uri), *said("a")], "rejected": [*shown(uri), *said("b")]},
        {"id": 1, "image": "red.png", "chosen": [*ASKED, *said("a")], "rejected": [*ASKED, *said("b")]},
    ):
        write("same.jsonl", row)
        sample = opened(kind="preference", path="same.jsonl")[0]
        assert len(sample.images) == 1 and sample.info["negative"] == "data"
        assert not {"chosen_images", "rejected_images"} & sample.info.keys()
