"""Composing from what does not fit: one line that says what is wrong and how to mend it, and nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, LlamaConfig

from lightning_vlm.compose import compose, put_encoder, swap_language, take_encoder, take_language

from .compose_kit import WIDTH, edit_json, make_encoder, make_language, stored

LAST = "encoder.layers.2."


@pytest.fixture
def clip(tmp_path):
    return make_encoder("clip", tmp_path / "clip")


@pytest.fixture
def qwen2(tmp_path):
    return make_language("qwen2", tmp_path / "qwen2")


@pytest.fixture
def refuse(tmp_path):
    """Composing must fail with this text, in one line, and leave nothing."""

    def check(said, command=compose, *args, **settings):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=said) as caught:
            command(*args, out=out, **settings)
        assert "\n" not in str(caught.value)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    return check


def rewrite(directory, keep=lambda name: True, **more):
    """The directory's weights without some tensors, and with others."""
    tensors = {name: tensor for name, tensor in stored(directory).items() if keep(name)} | more
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model"])
def test_naflex_names_the_inputs_that_are_missing(kind, clip, qwen2, refuse):
    edit_json(clip / "config.json", model_type=kind)
    refuse("NaFlex .*pixel_attention_mask and spatial_shapes", vision=clip, language=qwen2)


@pytest.mark.parametrize("kind", ["vit", "aimv2_vision_model", "qwen3_vl_vision"])
def test_other_encoders_are_refused_by_name(kind, clip, qwen2, refuse):
    edit_json(clip / "config.json", model_type=kind)
    refuse(f"model_type '{kind}', no encoder that can be composed; known: clip, ", vision=clip, language=qwen2)


def test_qwens_tower_stays_in_its_class(tmp_path, clip, qwen2, refuse):
    tower = make_encoder("qwen2_5_vl", tmp_path / "tower")
    for kind in ("qwen3", "llama"):
        language = make_language(kind, tmp_path / kind)
        refuse(
            f"is a {kind}: Qwen2.5-VL's class holds a Qwen2 or Qwen2.5 decoder only", vision=tower, language=language
        )
    refuse("takes the qwen2_5_vl form, not llava: .*image_grid_thw", vision=tower, language=qwen2, form="llava")
    refuse("takes the llava form, not qwen2_5_vl: .*its own tower only", vision=clip, language=qwen2, form="qwen2_5_vl")
    refuse("takes the llava form, not internvl", vision=clip, language=qwen2, form="internvl")
    refuse("reads the tower's last layer", vision=tower, language=qwen2, vision_feature_layer=-2)
    vlm = compose(vision=clip, language=qwen2, out=tmp_path / "vlm")
    refuse("takes the qwen2_5_vl form, .* has the llava form", put_encoder, vlm, encoder=tower)
    own = compose(vision=tower, language=qwen2, out=tmp_path / "own")
    refuse("is a llama: Qwen2.5-VL's class", swap_language, own, language=tmp_path / "llama")


def test_dropped_output_layers(tmp_path, clip, qwen2, refuse):
    """An encoder cut to its -2 features can be read there, not at the end."""
    wholly = compose(vision=clip, language=qwen2, out=tmp_path / "whole")
    rewrite(clip, lambda name: LAST not in name and "post_layernorm" not in name)
    said = "reads the output of layer 3, but .* holds only 2 of its 3 layers, .*--vision_feature_layer -2"
    refuse(said, vision=clip, language=qwen2, vision_feature_layer=-1)
    short = compose(vision=clip, language=qwen2, out=tmp_path / "short")
    a, b = (AutoModelForImageTextToText.from_pretrained(d) for d in (wholly, short))
    assert (b.config.vision_feature_layer, b.config.vision_config.num_hidden_layers) == (-1, 2)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(*(m.get_image_features(pixels).pooler_output[0] for m in (a, b)))
    # The whole encoder's VLM reads two layers of three: a shorter encoder would be read one layer too early.
    taken = take_encoder(short, out=tmp_path / "taken")
    refuse("features of layers 3, .* has 2", put_encoder, wholly, encoder=taken, projector="keep")


def test_feature_layer_that_is_not_there(clip, qwen2, refuse):
    refuse(
        "vision_feature_layer -5 asks for more layers than the 3", vision=clip, language=qwen2, vision_feature_layer=-5
    )
    refuse("vision_feature_layer 4 asks", vision=clip, language=qwen2, vision_feature_layer=4)


def test_missing_and_odd_tensors_of_an_encoder(tmp_path, clip, qwen2, refuse):
    rewrite(clip, lambda name: "layers.1.mlp.fc1.bias" not in name)
    refuse(
        "1 of 55 tensors of the clip_vision_model tower are missing .*layers.1.mlp.fc1.bias",
        vision=clip,
        language=qwen2,
    )
    other = make_encoder("clip", tmp_path / "other")
    rewrite(other, surplus=torch.zeros(2))
    refuse(r"holds 1 tensors that a clip_vision_model tower does not have \(surplus\)", vision=other, language=qwen2)
    edit_json(other / "config.json", hidden_size=48)
    refuse(r"is \[24\], config.json implies \[48\]|is \[", vision=other, language=qwen2)
    siglip = make_encoder("siglip", tmp_path / "siglip")
    rewrite(siglip, lambda name: not name.startswith("head."))
    refuse("lacks the pooling head .*set vision_use_head to false", vision=siglip, language=qwen2)
    edit_json(siglip / "config.json", vision_use_head=False)
    compose(vision=siglip, language=qwen2, out=tmp_path / "fine")


def test_image_settings_that_do_not_fit(tmp_path, clip, qwen2, refuse):
    edit_json(clip / "preprocessor_config.json", crop_size={"height": 56, "width": 56})
    refuse("makes 56 × 56 pixels, the tower takes 28 × 28", vision=clip, language=qwen2)
    edit_json(clip / "preprocessor_config.json", crop_size=None, size={"shortest_edge": 28}, do_center_crop=False)
    refuse("sets no size with height and width", vision=clip, language=qwen2)
    (clip / "preprocessor_config.json").unlink()
    refuse("has no preprocessor_config.json", vision=clip, language=qwen2)
    dino = make_encoder("dinov2", tmp_path / "dino")
    edit_json(dino / "preprocessor_config.json", crop_size={"height": 30, "width": 30})
    refuse("30 × 30 pixels are no whole patches of 7", vision=dino, language=qwen2)
    siglip = make_encoder("siglip", tmp_path / "siglip")
    refuse("siglip_vision_model has none: take full", vision=siglip, language=qwen2, vision_feature_select="default")
    odd = make_encoder("internvl", tmp_path / "odd", image_size=[21, 21])
    edit_json(odd / "preprocessor_config.json", size={"height": 21, "width": 21})
    refuse("square of an even number of patches .* gives 3 × 3", vision=odd, language=qwen2)


# --- language models -------------------------------------------------------------------------------------------------


def test_width_mismatch_names_both_numbers(tmp_path, clip, qwen2, refuse):
    vlm = compose(vision=clip, language=qwen2, out=tmp_path / "vlm")
    wide = make_language("llama", tmp_path / "wide", width=48)
    said = f"writes {WIDTH} numbers per token, .*wide reads 48: take an LLM of width {WIDTH}, or a fresh projector"
    refuse(said, swap_language, vlm, language=wide)
    tower = make_encoder("clip", tmp_path / "tower", hidden_size=48)
    said = f"features of width {24}, .*tower has 48: take --projector fresh"
    refuse(said, put_encoder, vlm, encoder=tower, projector="keep")
    fine = make_encoder("clip", tmp_path / "fine", patch_size=14)
    refuse("features of patch size 7, .* has 14", put_encoder, vlm, encoder=fine, projector="keep")


def test_other_language_models_are_refused_by_name(clip, qwen2, refuse):
    edit_json(qwen2 / "config.json", model_type="mistral")
    refuse("model_type 'mistral', no language model that can be composed; known: qwen2", vision=clip, language=qwen2)


def test_whole_vlms_are_not_parts(tmp_path, clip, qwen2, refuse):
    vlm = compose(vision=clip, language=qwen2, out=tmp_path / "vlm")
    refuse("is a whole VLM .*take-language", vision=clip, language=vlm)
    refuse("is a whole VLM .*take-encoder", vision=vlm, language=qwen2)
    refuse("has model_type 'qwen2'; VLMs are taken apart in these forms", take_language, qwen2)
    refuse("is no directory", vision=tmp_path / "nowhere", language=qwen2)
    edit_json(vlm / "config.json", vision_feature_layer=[-2, -1])
    refuse(r"reads several feature layers \[-2, -1\]", take_encoder, vlm)
    (clip / "config.json").write_text("{}")
    refuse("no config.json that says its model_type", vision=clip, language=qwen2)


def test_quantised_weights(clip, qwen2, refuse):
    edit_json(qwen2 / "config.json", quantization_config={"quant_method": "gptq"})
    refuse(r"is quantised \(gptq\)", vision=clip, language=qwen2)


def test_no_template(tmp_path, clip, refuse):
    base = make_language("qwen2", tmp_path / "base", template=None)
    refuse("has no chat template, .* give one with --chat_template FILE", vision=clip, language=base)
    refuse("no such file", vision=clip, language=base, chat_template=tmp_path / "none.jinja")
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    vlm = compose(vision=clip, language=base, out=tmp_path / "vlm", chat_template=file)
    assert "<|im_start|>{{ m.content }}" in (vlm / "chat_template.jinja").read_text()


def test_template_that_writes_images_itself_is_left_alone(tmp_path, clip, qwen2):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    vlm = compose(vision=clip, language=qwen2, out=tmp_path / "vlm", chat_template=file)
    assert (vlm / "chat_template.jinja").read_text() == file.read_text()


def test_no_eos(tmp_path, clip, refuse):
    language = make_language("qwen2", tmp_path / "l", eos=None)
    refuse("has no eos_token, .*set it in tokenizer_config.json", vision=clip, language=language)


def test_missing_special_tokens(tmp_path, clip, refuse):
    template = "{% for m in messages %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    language = make_language("llama", tmp_path / "l", template=template)
    said = r"writes <\|eot_id\|>, <\|start_header_id\|>, special tokens that the tokenizer .* does not have"
    refuse(said, vision=clip, language=language)


def test_tokenizer_of_another_model(tmp_path, clip, qwen2, refuse):
    rows = AutoConfig.from_pretrained(qwen2).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(qwen2)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)], special_tokens=True)
    tokenizer.save_pretrained(qwen2)
    refuse(f"has {rows + 9} ids, the model embeds {rows}", vision=clip, language=qwen2)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (qwen2 / file).unlink()
    refuse("has no tokenizer .*copy tokenizer.json and tokenizer_config.json", vision=clip, language=qwen2)


def test_padding_falls_back_in_a_known_order(tmp_path, clip):
    language = make_language("llama", tmp_path / "l")
    edit_json(language / "tokenizer_config.json", pad_token=None)
    tokenizer = AutoTokenizer.from_pretrained(language)
    for id, wanted in ((None, "<|im_end|>"), (tokenizer.convert_tokens_to_ids("<|endoftext|>"), "<|endoftext|>")):
        (language / "generation_config.json").write_text(json.dumps({"pad_token_id": id, "eos_token_id": [7, 9]}))
        vlm = compose(vision=clip, language=language, out=tmp_path / f"vlm{id}")
        made = json.loads((vlm / "generation_config.json").read_text())
        assert made["pad_token_id"] == tokenizer.convert_tokens_to_ids(wanted)
        assert made["eos_token_id"] == sorted([7, 9, tokenizer.eos_token_id])


def test_head_that_is_and_is_not_tied(tmp_path, clip, refuse):
    language = make_language("qwen2", tmp_path / "l", tied=True)
    head = stored(language)["model.embed_tokens.weight"].clone()
    rewrite(language, **{"lm_head.weight": head})
    compose(vision=clip, language=language, out=tmp_path / "fine")  # written twice, but equal
    rewrite(language, **{"lm_head.weight": head + 1})
    refuse("ties the head to the embeddings, but lm_head.weight differs", vision=clip, language=language)
    untied = make_language("qwen2", tmp_path / "u")
    rewrite(untied, lambda name: name != "lm_head.weight")
    refuse("has no lm_head.weight, .*set tie_word_embeddings to true", vision=clip, language=untied)


def test_missing_and_odd_tensors_of_a_language_model(clip, qwen2, refuse):
    rewrite(qwen2, **{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1, 1)})
    refuse("holds 1 tensors that a qwen2 causal LM does not have .*lora_A", vision=clip, language=qwen2)
    rewrite(qwen2, lambda name: "lora" not in name and "layers.1.mlp" not in name)
    refuse("3 of 26 tensors of the language model are missing", vision=clip, language=qwen2)


# --- files -----------------------------------------------------------------------------------------------------------


def test_pickles_are_refused(clip, qwen2, refuse):
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    refuse("weights in pytorch_model.bin only, .*give a directory with safetensors", vision=clip, language=qwen2)
    (clip / "pytorch_model.bin").unlink()
    refuse("has no [*].safetensors files", vision=clip, language=qwen2)


def test_broken_files(tmp_path, clip, qwen2, refuse):
    file = clip / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse("is no whole safetensors file", vision=clip, language=qwen2)
    language = make_language("llama", tmp_path / "many", shard="20KB")
    next(iter(sorted(language.glob("model-00002*")))).unlink()
    refuse("lacks 1 of .* weight files .*model-00002", vision=make_encoder("clip", tmp_path / "c"), language=language)


def test_places_and_settings(tmp_path, clip, qwen2, refuse, monkeypatch):
    with pytest.raises(ValueError, match="is there already"):
        compose(vision=clip, language=qwen2, out=clip)
    refuse("max_shard_size 'big' is no size", vision=clip, language=qwen2, max_shard_size="big")
    refuse("dtype is 'int8'; choose one of float32", vision=clip, language=qwen2, dtype="int8")
    refuse("projector is 'linear'; there is mlp2x_gelu", vision=clip, language=qwen2, projector="linear")
    refuse("form is 'blip'", vision=clip, language=qwen2, form="blip")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    refuse("needs .* GiB, .* has 0.00 GiB free", vision=clip, language=qwen2)


def test_nothing_is_left_when_writing_fails(clip, qwen2, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_vlm.compose.weights._write_file", full)
    with pytest.raises(OSError, match="No space left"):
        compose(vision=clip, language=qwen2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_llama_without_a_tokenizer_class_is_read_all_the_same(tmp_path, clip):
    """A tokenizer_config that names an older class does not change how text is cut."""
    language = make_language("llama", tmp_path / "l")
    assert isinstance(AutoConfig.from_pretrained(language), LlamaConfig)
    vlm = compose(vision=clip, language=language, out=tmp_path / "vlm")
    text = "  the picture shows\n\n12 α <think>"
    a, b = (AutoTokenizer.from_pretrained(d)(text).input_ids for d in (language, vlm))
    assert a == b
