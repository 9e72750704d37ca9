"""Processors of every family: against the family's own Hugging Face processor, saving, and what bad directories get."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from lightning_vlm.data.schema import image, message, text
from lightning_vlm.models.processor import Processor, load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {family: make_tiny(family, root / family) for family in TINY_FAMILIES}


def picture(width: int = 100, height: int = 70, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Two images, one at a time through our processor, must be what the family's own processor makes of both together.
# LLaVA-OneVision alone treats several images of one sample otherwise (base view only), so it gets them as two samples.
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_one_image_at_a_time_equals_the_familys_own_processor(family, directories):
    processor = load_processor(Backbone(path=str(directories[family])))
    pictures = [picture(), picture(56, 120, seed=1)]
    turn = message("user", image(), text("a cat"), image(), text("?"))
    rendered = processor.render([turn], add_generation_prompt=True)
    singles = [processor.image(p) for p in pictures]

    ids = processor.tokenizer(rendered, add_special_tokens=False).input_ids
    queue = [expanded for _, expanded in singles]
    ours = [i for id in ids for i in (queue.pop(0) if id == processor.image_token_id else [id])]
    if family == "llava_onevision":
        theirs = processor.hf(images=pictures, text=[processor.image_token] * 2, return_tensors="pt", padding=True)
        assert [image.tokens for image, _ in singles] == theirs["attention_mask"].sum(1).tolist()
    else:
        theirs = processor.hf(images=pictures, text=[rendered], return_tensors="pt", add_special_tokens=False)
        assert ours == theirs["input_ids"][0].tolist()
    assert sum(image.tokens for image, _ in singles) == int((theirs["input_ids"] == processor.image_token_id).sum())
    got = torch.cat([image.tensors["pixel_values"].flatten() for image, _ in singles])
    want = theirs["pixel_values"].flatten()
    # OneVision pads tiles with zeros to the larger of the two.
    torch.testing.assert_close(got[got != 0], want[want != 0], rtol=0, atol=0)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_ids_of_special_roles(family, directories):
    processor = load_processor(Backbone(path=str(directories[family])))
    config = json.loads((directories[family] / "config.json").read_text())
    assert processor.image_token_id == config.get("image_token_id", config.get("image_token_index"))
    assert processor.image_token_id in processor.banned_ids
    assert processor.end_of_turn[1] in processor.eos_ids and not processor.eos_ids & processor.banned_ids
    assert processor.vocab_size == len(processor.tokenizer)
    assert processor.image_token in processor.control_tokens and processor.end_of_turn[0] in processor.control_tokens
    tokens = {processor.tokenizer.convert_ids_to_tokens(id) for id in processor.banned_ids}
    if family.startswith("qwen"):
        assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= tokens
    if family == "internvl":
        assert {"<IMG_CONTEXT>", "<img>", "</img>", "<video>"} == tokens
    if family == "smolvlm":
        assert {"<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"} <= tokens


def test_keys_name_content(directories):
    processor = load_processor(Backbone(path=str(directories["qwen2_5_vl"])))
    a, b = processor.image(picture())[0], processor.image(picture())[0]
    c = processor.image(picture(seed=3))[0]
    assert a.key == b.key != c.key
    # Equal bytes in another shape are another image: all-black 56x28 and 28x56.
    wide, tall = (processor.image(Image.new("RGB", size))[0] for size in ((56, 28), (28, 56)))
    assert wide.tensors["pixel_values"].shape == tall.tensors["pixel_values"].shape and wide.key != tall.key


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_saved_processor_is_the_same(family, directories, tmp_path):
    processor = load_processor(Backbone(path=str(directories[family])))
    processor.save(tmp_path)
    again = load_processor(Backbone(path=str(tmp_path)))
    assert again.fingerprint() == processor.fingerprint()
    assert again.image(picture())[0].key == processor.image(picture())[0].key
    if family.startswith(("llava_clip", "llava_siglip")):  # the others' plain classes may need torchvision
        plain = AutoProcessor.from_pretrained(tmp_path)
        turn = [message("user", image(), text("a cat"))]
        assert plain.apply_chat_template(turn) == processor.render(turn)
        out = plain(images=[picture()], text=plain.apply_chat_template(turn), return_tensors="pt")
        assert torch.equal(out["pixel_values"], processor.image(picture())[0].tensors["pixel_values"])


@pytest.mark.parametrize("name", ["qwen2_5_vl-tiny", "llava-tiny"])
def test_embedded(name, tmp_path):
    processor = load_processor(Backbone(path=f"embedded:{name}"))
    shown, ids = processor.image(picture(64, 64))
    assert shown.tokens == 16 and ids.count(processor.image_token_id) == 16
    processor.save(tmp_path)
    again = load_processor(Backbone(path=str(tmp_path)))
    assert again.image(picture(64, 64))[0].key == shown.key and again.chat_template == processor.chat_template
    with pytest.raises(ValueError, match=r"leave backbone\.max_pixels out"):
        load_processor(Backbone(path=f"embedded:{name}", max_pixels=100))


def test_overrides_apply_and_are_saved(directories, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text((directories["qwen2_5_vl"] / "chat_template.jinja").read_text().replace("helpful", "terse"))
    backbone = Backbone(path=str(directories["qwen2_5_vl"]), max_pixels=28 * 28, chat_template=str(template))
    processor = load_processor(backbone)
    assert processor.image(picture(200, 200))[0].tokens == 1
    assert "terse" in processor.render([message("user", text("hi"))])
    processor.save(tmp_path / "out")
    again = load_processor(Backbone(path=str(tmp_path / "out")))
    assert again.image(picture(200, 200))[0].tokens == 1 and again.chat_template == processor.chat_template
    assert again.fingerprint() != load_processor(Backbone(path=str(directories["qwen2_5_vl"]))).fingerprint()


def test_nested_image_settings_load_and_save(directories, tmp_path):
    """transformers itself saves the image processor inside processor_config.json."""
    source = tmp_path / "nested"
    shutil.copytree(directories["qwen2_vl"], source)
    settings = json.loads((source / "processor_config.json").read_text())
    settings["image_processor"] = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").write_text(json.dumps(settings))
    processor = load_processor(Backbone(path=str(source), max_pixels=28 * 28))
    processor.save(tmp_path / "out")
    assert load_processor(Backbone(path=str(tmp_path / "out"))).image(picture(200, 200))[0].tokens == 1


def test_pickles_for_workers(directories):
    processor = load_processor(Backbone(path=str(directories["smolvlm"])))
    again = pickle.loads(pickle.dumps(processor))
    assert isinstance(again, Processor) and again.fingerprint() == processor.fingerprint()


@pytest.mark.parametrize(
    ("family", "change", "message_"),
    [
        ("llava_clip_qwen2", {"processor_config.json": {"patch_size": None}}, "does not set patch_size"),
        ("llava_onevision", {"processor_config.json": {"num_image_tokens": None}}, "does not set num_image_tokens"),
        (
            "qwen2_vl",
            {"processor_config.json": {"processor_class": "NoSuchProcessor"}},
            "no processor 'NoSuchProcessor'",
        ),
        ("qwen2_vl", {"preprocessor_config.json": None}, "no preprocessor_config.json"),
        ("qwen2_vl", {"tokenizer.json": None}, "has no tokenizer"),
        ("qwen2_vl", {"chat_template.jinja": None}, "no chat template"),
        ("qwen2_vl", {"chat_template.jinja": "{{ messages[0]['role'] }}"}, "does not write each text once"),
        ("qwen2_vl", {"preprocessor_config.json": {"image_processor_type": "Nope"}}, "no image processor 'Nope'"),
        ("qwen2_vl", {"processor_config.json": "{"}, "no valid JSON"),
    ],
)
def test_bad_directories(family, change, message_, directories, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(directories[family], directory)
    for name, values in change.items():
        if values is None:
            (directory / name).unlink()
        elif isinstance(values, str):
            (directory / name).write_text(values)
        else:
            (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | values))
    with pytest.raises(ValueError, match=message_) as error:
        load_processor(Backbone(path=str(directory)))
    assert "\n" not in str(error.value)


def test_bad_settings(directories):
    with pytest.raises(ValueError, match="does not exist: give a model directory"):
        load_processor(Backbone(path="/no/such/place"))
    with pytest.raises(ValueError, match="CLIPImageProcessor has no max_pixels"):
        load_processor(Backbone(path=str(directories["llava_clip_qwen2"]), max_pixels=100))
    with pytest.raises(ValueError, match="chat_template '/no/file': no such file"):
        load_processor(Backbone(path=str(directories["qwen2_vl"]), chat_template="/no/file"))


def test_directory_without_processor_class_goes_by_model_type(directories, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(directories["qwen2_5_vl"], directory)
    (directory / "processor_config.json").unlink()
    images = json.loads((directory / "preprocessor_config.json").read_text())
    del images["processor_class"]
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    assert type(load_processor(Backbone(path=str(directory))).hf).__name__ == "Qwen2_5_VLProcessor"


def test_hub_id(directories, tmp_path, monkeypatch):
    """A hub id is fetched (processor files alone), and an id that cannot be fetched is one line."""
    asked = {}

    def fetch(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        if repo == "some/model":
            return str(directories["internvl"])
        raise OSError("no connection\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_processor(Backbone(path="some/model")).image_token == "<IMG_CONTEXT>"
    assert not any(pattern.endswith(("safetensors", "bin")) for pattern in asked["patterns"])
    with pytest.raises(ValueError, match=r"no directory here and not to be had from the hub: no connection$"):
        load_processor(Backbone(path="other/model"))
