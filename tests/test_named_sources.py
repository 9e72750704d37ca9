"""Sources: the named data sets on tiny files, and the real data where it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lightning_vlm.data.schema import BadSample
from lightning_vlm.data.sources import SourceSpec

from .sources_kit import REAL, opened, picture, real_data, refused, types, words, write

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
