"""The family table: each architecture, tiny and random, against its own Hugging Face forward."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from lightning_vlm.models.batch import ImageInput, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import FAMILIES, blocks, family_of
from lightning_vlm.models.load import keep_float64

VOCAB, IMAGE, VIDEO, PAD = 64, 60, 61, 0
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
SPECIAL = {"image_token_id": IMAGE, "video_token_id": VIDEO}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}


def qwen_vision(**more):
    return {"depth": 3, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2} | more


def clip(**more):
    return CLIPVisionConfig(**VIT, image_size=16, **more).to_dict()


def siglip(**more):
    return SiglipVisionConfig(**VIT, image_size=16, **more).to_dict()


def llava(vision, text, **more):
    select = "default" if vision["model_type"] == "clip_vision_model" else "full"
    more = {"vision_feature_select_strategy": select, "vision_feature_layer": -2} | more
    return LlavaConfig(vision_config=vision, text_config=text(**TEXT), image_token_index=IMAGE, **more)


CONFIGS = {
    "qwen2_vl": lambda: Qwen2VLConfig(
        vision_config=qwen_vision(embed_dim=32, hidden_size=32, mlp_ratio=2), text_config=TEXT | MROPE, **SPECIAL
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        vision_config=qwen_vision(
            hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]
        ),
        text_config=TEXT | MROPE,
        **SPECIAL,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        vision_config=qwen_vision(
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config=TEXT | MROPE | {"head_dim": 8},
        **SPECIAL,
    ),
    "llava": lambda: llava(clip(), Qwen2Config),
    "llava-siglip-llama": lambda: llava(siglip(), LlamaConfig),
    "llava-siglip-last": lambda: llava(siglip(vision_use_head=False), Qwen2Config, vision_feature_layer=-1),
    "llava-clip-two-layers": lambda: llava(clip(), LlamaConfig, vision_feature_layer=[1, -3]),
    "llava_onevision": lambda: LlavaOnevisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **SPECIAL,
    ),
    "internvl": lambda: InternVLConfig(
        vision_config=VIT | {"image_size": [16, 16], "patch_size": [4, 4], "use_mask_token": True},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    ),
    "smolvlm": lambda: SmolVLMConfig(
        vision_config=VIT | {"image_size": 16}, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    ),
    "idefics3": lambda: Idefics3Config(
        vision_config=VIT | {"image_size": 16}, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    ),
}
KINDS = list(CONFIGS)


def tiny(kind, *, tied=False, dtype=torch.float64, seed=0):
    """A random model with weights large enough for images to matter."""
    config = CONFIGS[kind]()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(std=0.15)
    if dtype == torch.float64:
        keep_float64(model)
    return model.train()


def picture(model, seed, shape=(16, 16)):
    """One image of random pixels as the family's processor would hand it over; `shape` where sizes vary."""
    config, family = model.config, family_of(model).name
    generator = torch.Generator().manual_seed(seed)

    def noise(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float32)

    high, wide = shape
    if family.startswith("qwen"):
        grid = torch.tensor([[1, high // 4, wide // 4]])
        patches = int(grid.prod())
        tensors = {"pixel_values": noise(patches, 3 * 2 * 4 * 4), "image_grid_thw": grid}
        tokens = patches // 4
    elif family == "llava":
        tokens = 16
        tensors = {"pixel_values": noise(1, 3, 16, 16)}
    elif family == "llava_onevision":
        tiles = image_size_to_num_patches(list(shape), config.image_grid_pinpoints, 16)
        tensors = {"pixel_values": noise(1, tiles, 3, 16, 16), "image_sizes": torch.tensor([[high, wide]])}
        with torch.no_grad():
            tokens = len(model.model.get_image_features(**tensors, return_dict=True).pooler_output[0])
    else:
        tiles = (high // 16) * (wide // 16)
        if family == "internvl":
            tensors, tokens = {"pixel_values": noise(tiles, 3, 16, 16)}, 4 * tiles
        else:
            mask = torch.ones(1, tiles, 16, 16, dtype=torch.long)
            tensors, tokens = {"pixel_values": noise(1, tiles, 3, 16, 16), "pixel_attention_mask": mask}, 4 * tiles
    return ImageInput(key=f"{seed}-{shape}", tensors=tensors, tokens=tokens)


def shapes(model):
    """Image shapes the family takes: different ones where it can."""
    return [(16, 16)] * 3 if family_of(model).name == "llava" else [(16, 32), (32, 32), (16, 16)]


def row(name, *parts, scored=3):
    """A row of text lengths and images, the last `scored` tokens scored."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    ids, images = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, IMAGE, (part,), generator=generator).tolist()
        else:
            ids += [IMAGE] * part.tokens
            images.append(part)
    ids = torch.tensor(ids)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[-scored:] = True
    return Row(id=name, input_ids=ids, loss_mask=mask, images=images)


def mixed_rows(model):
    """One image; several images, one of them shared with the first row; text only; the shared image twice."""
    a, b, c = (picture(model, i, shape) for i, shape in enumerate(shapes(model)))
    return [
        row("one", 3, a, 5),
        row("several", 2, b, 1, a, 1, c, 4),
        row("text", 6),
        row("twice", 1, a, 2, a, 3),
    ]


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param)


def test_every_family_is_proven():
    assert {family_of(CONFIGS[kind]()).name for kind in KINDS} == set(FAMILIES)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match=r"'qwen2' is no image-text-to-text model .*qwen2_5_vl"):
        family_of(Qwen2Config())
    pixtral = LlavaConfig(vision_config={"model_type": "pixtral"}, text_config=Qwen2Config(**TEXT))
    with pytest.raises(ValueError, match="vision tower 'pixtral'"):
        family_of(pixtral)


def test_parts_cover_every_parameter_exactly_once(model):
    paths = [(part, path) for part, group in family_of(model).paths().items() for path in group]
    for name, _ in model.named_parameters():
        owners = [(part, path) for part, path in paths if name == path or name.startswith(path + ".")]
        # The one nesting allowed: a projector inside the vision tower.
        assert {part for part, _ in owners} in (
            {"vision"},
            {"projector"},
            {"language"},
            {"head"},
            {"vision", "projector"},
        )
    assert all(any(n == p or n.startswith(p + ".") for n, _ in model.named_parameters()) for _, p in paths)


def test_blocks_are_the_layers_of_both_towers(model):
    found = blocks(model)
    family = family_of(model)
    inside = {part: sum(n.startswith(f"{family.paths()[part][0]}.") for n in found) for part in ("vision", "language")}
    assert inside == {"vision": 3, "language": 2} and len(found) == 5


def test_slice_is_the_inverse_of_merge(model):
    family = family_of(model)
    images = [image for r in mixed_rows(model) for image in r.images]
    cut = family.slice(family.merge(images), [image.tokens for image in images])
    assert len(cut) == len(images) == 6
    for got, want in zip(cut, images, strict=True):
        assert got.keys() == want.tensors.keys()
        assert all(torch.equal(got[k], want.tensors[k]) for k in got)


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_slice_cuts_the_processors_own_padded_batch(kind):
    """Samples of 2 and 4 + 1 tiles, padded by the processor to 5 tiles each."""
    model = tiny(kind)
    images = [picture(model, 0, (16, 32)), picture(model, 1, (32, 32)), picture(model, 2, (16, 16))]
    tiles = [image.tensors["pixel_values"][0] for image in images]
    batch = torch.zeros(2, 5, 3, 16, 16)
    masks = torch.zeros(2, 5, 16, 16, dtype=torch.long)
    batch[0, :2], masks[0, :2] = tiles[0], 1
    batch[1], masks[1] = torch.cat(tiles[1:]), 1
    pixels = {"pixel_values": batch, "pixel_attention_mask": masks}
    for got, want in zip(family_of(model).slice(pixels, [8, 16, 4]), images, strict=True):
        assert all(torch.equal(got[k], want.tensors[k]) for k in got)


def test_merge_refuses_images_of_another_family():
    model = tiny("llava")
    image = picture(tiny("qwen2_vl"), 0)
    with pytest.raises(ValueError, match="this model takes \\['pixel_values'\\]"):
        family_of(model).merge([image])


def test_merge_refuses_images_of_different_size():
    model = tiny("llava")
    images = [picture(model, 0), picture(model, 1)]
    images[1].tensors["pixel_values"] = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="different shapes"):
        family_of(model).merge(images)


def test_off_graph_is_what_gets_no_gradient(model):
    """The reference is the model's own forward and backward with images in the batch."""
    family = family_of(model)
    rows = mixed_rows(model)[:1]
    batch = collate(rows, family, PAD)
    inputs = {"input_ids": batch.input_ids, **batch.pixels}
    if family.patch_rows:
        inputs["mm_token_type_ids"] = (batch.input_ids == IMAGE).int()
    model(**inputs).logits.square().sum().backward()
    without = {name for name, param in model.named_parameters() if param.grad is None}
    assert set(family.off_graph(model)) == without


def test_off_graph_of_llava_names_the_last_block_and_norm():
    names = family_of(model := tiny("llava")).off_graph(model)
    assert {n.split(".")[2] for n in names} == {"encoder", "post_layernorm"}
    assert {".".join(n.split(".")[2:5]) for n in names if ".encoder." in n} == {"encoder.layers.2"}


def test_collate_pads_shares_and_never_scores_the_first_token():
    model = tiny("qwen2_5_vl")
    family, rows = family_of(model), mixed_rows(model)
    rows[2].loss_mask[:] = True
    for side in ("right", "left"):
        batch = collate(rows, family, PAD, side=side)
        assert batch.image_index.tolist() == [0, 1, 0, 2, 0, 0] and len(batch.image_tokens) == 3
        assert len(batch.labels) == sum(r.scored for r in rows) == 3 * 3 + 5
        for i, r in enumerate(rows):
            assert torch.equal(batch.input_ids[i][batch.attention_mask[i].bool()], r.input_ids)
    separate = collate(rows, family, PAD, share_images=False)
    assert separate.image_index.tolist() == list(range(6))
    text = collate(rows[2:3], family, PAD)
    assert text.pixels == {} and text.image_index.shape == (0,)


def test_collate_refuses_nothing():
    with pytest.raises(ValueError, match="empty list of rows"):
        collate([], FAMILIES["llava"], PAD)
    empty = Row(id="x", input_ids=torch.zeros(0, dtype=torch.long), loss_mask=torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows without tokens: x"):
        collate([empty], FAMILIES["llava"], PAD)
