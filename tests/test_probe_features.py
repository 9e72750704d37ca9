"""Features on their grid: right places in every family, towers alone, and what is refused; how far weights moved."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.parts import part_parameters
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny
from lightning_vlm.probes.encoder import load_encoder, part_updates
from lightning_vlm.probes.encoder.updates import saved_part

# What brings other patches' values to a patch.
_MIXING = re.compile(r"(attn\.proj|out_proj|projection_layer|o_proj|attention\.output\.dense)\.(weight|bias)$")
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT = {**_SMALL, "image_size": 56, "patch_size": 14}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Family → its tiny model directory."""
    root = tmp_path_factory.mktemp("tiny")
    return lambda name: root / name if (root / name).is_dir() else make_tiny(name, root / name)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(90, 160, (height, width, 3), np.uint8))


def unmixed(encoder):
    """The encoder with patches that do not see each other."""
    with torch.no_grad():
        hits = [p.zero_() for name, p in encoder.tower.named_parameters() if _MIXING.search(name)]
    assert hits
    return encoder


@pytest.mark.parametrize("name", ["embedded:llava-tiny", "embedded:qwen2_5_vl-tiny", *TINY_FAMILIES])
def test_a_patch_stands_where_it_is_in_the_picture(tiny, name):
    """Without attention, changing the pixels of one patch changes the feature at its place alone."""
    encoder = unmixed(load_encoder(name if ":" in name else tiny(name)))
    p = encoder.patch
    h, w = (4, 4) if encoder.side else (2, 6)
    if ":" in name and not encoder.side:
        h, w = 4, 16  # the embedded model's picture always has so many pixels
    clean = picture(w * p, h * p)
    for y, x in ((0, 1), (1, 0), (h - 1, w - 2)):
        changed = clean.copy()
        changed.paste("red", (x * p, y * p, (x + 1) * p, (y + 1) * p))
        for layer in (None, 1, -1):
            shown = load_encoder(encoder.path, layer=layer) if layer else encoder
            a, b = unmixed(shown).features([clean, changed])
            assert a.shape[:2] == (h, w)
            moved = (a - b).abs().sum(-1)
            assert divmod(int(moved.argmax()), w) == (y, x)
            if "smol" not in name and "idefics" not in name:  # these scale the picture up and down again
                assert int((moved > 1e-4).sum()) == 1


def test_pictures_are_squeezed_whole_and_batches_change_nothing(tiny):
    """A wide picture is seen from edge to edge; one at a time gives what a batch gives."""
    encoder = unmixed(load_encoder(tiny("llava_clip_qwen2")))
    wide = Image.new("RGB", (300, 60), "grey")
    marked = wide.copy()
    marked.paste("red", (0, 0, 10, 60))
    a, b = encoder.features([wide, marked])
    assert (a - b).abs().sum(-1).gt(1e-3).nonzero()[:, 1].unique().tolist() == [0]
    shown = [picture(64, 64, n) for n in range(5)]
    whole = torch.stack(list(encoder.features(shown)))
    torch.testing.assert_close(torch.stack(list(encoder.features(shown, batch_size=2))), whole)
    torch.testing.assert_close(encoder.pooled(shown), whole.mean((1, 2)))


def test_a_tower_alone_has_the_models_features(tiny, tmp_path):
    """Qwen2.5-VL's windows are undone; LLaVA's tower by the layer that LLaVA reads."""
    shown = [picture(84, 56), picture(28, 28, 1)]
    for family, layer in (("qwen2_5_vl", None), ("llava_clip_qwen2", -2), ("internvl", None)):
        source, folder = tiny(family), tmp_path / family
        model = load_model(Backbone(path=str(source)))
        model.get_submodule(family_of(model).vision[0]).save_pretrained(folder)
        shutil.copy(source / "preprocessor_config.json", folder)
        alone, whole = load_encoder(folder, layer=layer), load_encoder(source)
        assert alone.policy is None and whole.policy is not None
        for a, b in zip(alone.features(shown), whole.features(shown), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dinov2", "dual", "siglip"])
def test_towers_without_a_model(tmp_path, kind):
    """Class tokens go, DINOv2's centre crop too; of a dual encoder the vision half is taken."""
    t = transformers
    if kind == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(**_VIT))
        images = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 64},
            "crop_size": {"height": 56, "width": 56},
        }
        wanted = model
    elif kind == "dual":
        text = {**_SMALL, "vocab_size": 50, "eos_token_id": 2}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=_VIT))
        images = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
        }
        wanted = model.vision_model
    else:
        model = wanted = t.SiglipVisionModel(t.SiglipVisionConfig(**_VIT))
        images = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    encoder, shown = load_encoder(tmp_path), picture(56, 56)
    assert encoder.side == 56
    pixels = encoder.prepare(encoder.view(shown))["pixel_values"]
    with torch.no_grad():
        tokens = wanted.eval()(pixels).last_hidden_state[0]
    (found,) = encoder.features([shown])
    assert found.shape == (4, 4, 32)
    torch.testing.assert_close(found.flatten(0, 1), tokens[-16:])
    if kind == "dinov2":
        encoder = unmixed(encoder)
        marked = shown.copy()
        marked.paste("red", (0, 0, 2, 2))  # a corner that the crop would have cut off
        a, b = encoder.features([shown, marked])
        assert (a - b).abs().sum(-1).gt(1e-4).nonzero().tolist() == [[0, 0]]


def test_what_has_no_encoder_is_refused(tiny, tmp_path):
    text = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SMALL, vocab_size=50, num_key_value_heads=1))
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"text has no vision encoder: a 'qwen2' model has no patches; give a VLM"):
        load_encoder(tmp_path / "text")
    with pytest.raises(ValueError, match=r"'\./gone' does not exist"):
        load_encoder("./gone")
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_VIT))
    tower.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no preprocessor_config\.json: copy the tower's own"):
        load_encoder(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"layer is 3: the tower of .* has 2 blocks, choose 1 to 2, or -1 to -2"):
        load_encoder("embedded:llava-tiny", layer=3)
    config = {**_SMALL, "patch_size": 14, "num_patches": 16}
    naflex = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config))
    naflex.save_pretrained(tmp_path / "naflex")
    (tmp_path / "naflex/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Siglip2ImageProcessor", "patch_size": 14, "max_num_patches": 16})
    )
    with pytest.raises(ValueError, match=r"tower has no image_size, .* pixel_attention_mask and spatial_shapes"):
        load_encoder(tmp_path / "naflex")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare/model.safetensors")
    with pytest.raises(ValueError, match="do not fill the tower"):
        load_encoder(tmp_path / "bare")


# --- updates ---------------------------------------------------------------------------------------------------------


def directory(folder, tensors, kind="llava"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({name: torch.tensor(values) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def test_updates_by_hand(tmp_path):
    before = {
        "vision_tower.vision_model.encoder.layers.0.x": [3.0, 4.0],
        "vision_tower.vision_model.encoder.layers.1.x": [0.0, 12.0],
        "vision_tower.vision_model.pre.x": [0.0],
        "multi_modal_projector.linear_1.weight": [[1.0, 1.0], [1.0, 1.0]],
        "language_model.model.layers.0.y": [2.0],
        "language_model.lm_head.weight": [[5.0]],
    }
    after = {**before, "vision_tower.vision_model.encoder.layers.0.x": [3.0, 5.0]}
    after["vision_tower.vision_model.encoder.layers.1.x"] = [0.0, 9.0]
    after["multi_modal_projector.linear_1.weight"] = [[2.0, 1.0], [1.0, 1.0]]
    after["vision_tower.vision_model.pre.x"] = [0.5]
    found = part_updates(directory(tmp_path / "a", before), directory(tmp_path / "b", after))
    table = {(u.part, u.block): u for u in found}
    assert [(u.part, u.block) for u in found] == [
        ("vision", None),
        ("vision", -1),
        ("vision", 0),
        ("vision", 1),
        ("projector", None),
        ("language", None),
        ("head", None),
    ]
    assert table["vision", 0].relative == pytest.approx(1 / 5)
    assert table["vision", 1].relative == pytest.approx(3 / 12)
    assert table["vision", -1].relative == math.inf and table["vision", -1].moved == 0.5
    assert table["vision", None].relative == pytest.approx(math.sqrt(1 + 9 + 0.25) / 13)
    assert table["vision", None].weights == 5
    assert table["projector", None].relative == pytest.approx(1 / 2)
    assert table["language", None].relative == table["head", None].relative == 0

    with pytest.raises(ValueError, match=r"hold different weights: 1 are on one side only, .*pre\.x in"):
        part_updates(tmp_path / "a", directory(tmp_path / "c", {k: v for k, v in after.items() if "pre" not in k}))
    with pytest.raises(ValueError, match=r"is \[1, 1\] in .* and \[1\] in"):
        part_updates(tmp_path / "a", directory(tmp_path / "d", {**after, "language_model.lm_head.weight": [5.0]}))
    with pytest.raises(ValueError, match="is no directory here"):
        part_updates("embedded:llava-tiny", tmp_path / "a")
    (tmp_path / "e").mkdir()
    (tmp_path / "e/config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="has no safetensors files"):
        part_updates(tmp_path / "e", tmp_path / "a")


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_names_in_the_files_belong_to_the_models_parts(tiny, name):
    """As many weights in each part by the names in the files as by those of the model."""
    folder = tiny(name)
    model = load_model(Backbone(path=str(folder)))
    family = family_of(model)
    wanted = {part: sum(p.numel() for _, p in own) for part, own in part_parameters(model, family).items()}
    updates = part_updates(folder, folder)
    assert {u.part: u.weights for u in updates if u.block is None} == wanted
    assert all(u.moved == 0 for u in updates)
    assert {u.block for u in updates if u.part == "vision"} == {None, -1, 0, 1}
    with pytest.raises(ValueError, match=r"'other\.x' belongs to no part"):
        saved_part("other.x", family)
