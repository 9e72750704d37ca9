"""Composing: every encoder with every language model; parts bit for bit, text as the language model's own."""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from lightning_vlm.compose import compose, put_encoder, swap_language, take_encoder, take_language
from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.export.provenance import recorded, weights_hash
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import check_vocabulary, load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

from .compose_kit import CHATML, LANGUAGES, R1, WIDTH, make_encoder, make_language, picture, stored

IDS = torch.tensor([[5, 80, 33, 7, 120, 201, 64, 9, 255, 18, 3]])
LLAVA = ("clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers")
CELLS = [(vision, llm) for vision in (*LLAVA, "internvl", "intern_vit_6b") for llm in LANGUAGES] + [
    ("qwen2_5_vl", "qwen2")
]
INDENTED = "  {% for message in messages %}\n{{ message.content }}\n{% endfor %}"
# 4 × 4 patches, 2 × 2 where they are shuffled or merged; class tokens are dropped, two registers stay.
TOKENS = {"dinov2_with_registers": 18, "internvl": 4, "intern_vit_6b": 4, "qwen2_5_vl": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Directories of every encoder and language model, made when asked for."""
    root, made = tmp_path_factory.mktemp("parts"), {}

    def part(name):
        if name not in made:
            make = make_language if name in LANGUAGES else make_encoder
            made[name] = make(name, root / name)
        return made[name]

    return part


@pytest.fixture(scope="module", params=CELLS, ids="-".join)
def cell(request, parts, tmp_path_factory):
    """One cell of the matrix: names of both parts, and the VLM."""
    vision, llm = request.param
    out = tmp_path_factory.mktemp("vlm") / f"{vision}-{llm}"
    return vision, llm, compose(vision=parts(vision), language=parts(llm), out=out, seed=3)


@functools.lru_cache(maxsize=6)
def whole(directory, auto=AutoModelForImageTextToText):
    """The model of a directory as plain transformers loads it; nobody changes it."""
    model, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def assert_equal(module, other):
    state, wanted = module.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name]), name


def test_parts_are_bit_equal_to_their_sources(cell, parts):
    vision, llm, directory = cell
    model = whole(directory)
    family = family_of(model)
    language = whole(parts(llm), AutoModelForCausalLM)
    rows = language.get_input_embeddings().weight.shape[0]
    state = model.model.language_model.state_dict()
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(state[name][: len(tensor)], tensor), name
    assert torch.equal(model.lm_head.weight[:rows], language.lm_head.weight)
    tower = model.get_submodule(family.vision[0])
    if vision == "intern_vit_6b":
        source, mine = stored(parts(vision)), tower.state_dict()
        for i in range(3):
            fused = torch.cat([mine[f"encoder.layer.{i}.attention.{c}_proj.weight"] for c in "qkv"])
            assert torch.equal(fused, source[f"encoder.layers.{i}.attn.qkv.weight"])
            assert torch.equal(mine[f"encoder.layer.{i}.lambda_2"], source[f"encoder.layers.{i}.ls2"])
            norms = f"encoder.layer.{i}.attention.q_norm.weight", f"encoder.layers.{i}.attn.q_norm.weight"
            assert torch.equal(mine[norms[0]], source[norms[1]])
        assert torch.equal(mine["embeddings.position_embeddings"], source["embeddings.position_embedding"])
        assert len(mine) == len(source) + 2 * 3
    else:
        wanted, mine = whole(parts(vision), AutoModel).state_dict(), tower.state_dict()
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(mine[name], tensor) or name.startswith("merger."), name


def test_text_only_logits_are_the_language_models(cell, parts):
    _, llm, directory = cell
    language, model = whole(parts(llm), AutoModelForCausalLM), whole(directory)
    with torch.no_grad():
        wanted, got = language(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert torch.equal(got[..., : wanted.shape[-1]], wanted)


def test_plain_transformers_loads_and_generates_with_a_picture(cell):
    vision, _, directory = cell
    # Plain InternVL and Qwen processors have a video part, which asks for torchvision.
    plain = vision in LLAVA or importlib.util.find_spec("torchvision")
    processor = AutoProcessor.from_pretrained(directory) if plain else load_processor(Backbone(path=str(directory))).hf
    model = whole(directory)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a question"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[picture(size=(28, 28))], text=prompt, return_tensors="pt")
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert tokens == TOKENS.get(vision, 16)
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= inputs["input_ids"].shape[1] + 3
    # The picture is read: another one gives other logits.
    other = processor(images=[picture(1, (28, 28))], text=prompt, return_tensors="pt")
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits[:, -1], model(**other).logits[:, -1])
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    for config in (model.config, model.config.text_config, model.generation_config):
        assert config.pad_token_id == processor.tokenizer.pad_token_id


def test_policy_scores_a_row_and_frozen_layers_are_known(cell):
    _, _, directory = cell
    backbone = Backbone(path=str(directory))
    model, processor = load_model(backbone), load_processor(backbone)
    check_vocabulary(model, processor)
    policy = Policy(model, family_of(model))
    talk = [message("user", image(), text("a question")), message("assistant", text("12 shapes"))]
    row = Encoder(processor).encode(Sample("a", talk, [picture()]))
    assert processor.tokenizer.decode(row.input_ids[row.loss_mask]) == "12 shapes<|im_end|>"
    scores = policy.score(collate([row], policy.family, processor.pad_id))
    assert scores.logprobs.shape == (row.scored,) and (scores.logprobs < 0).all()
    scores.logprobs.sum().backward()
    none = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert none == set(policy.family.off_graph(model))


def test_provenance_says_what_came_from_where(cell, parts):
    vision, llm, directory = cell
    facts = recorded(directory)
    assert facts["made_by"] == "compose" and facts["hash"] == weights_hash(directory)
    assert facts["parts"]["vision"] == {"path": str(parts(vision)), "hash": weights_hash(parts(vision))}
    assert facts["parts"]["language"]["hash"] == weights_hash(parts(llm))
    assert facts["parts"]["projector"] == {"made": "mlp2x_gelu", "seed": 3}


def test_same_language_behind_the_projector_gives_the_same_model(cell, parts, tmp_path):
    """Take both parts out, put them in again: nothing has changed."""
    vision, llm, directory = cell
    encoder, language = take_encoder(directory, out=tmp_path / "e"), take_language(directory, out=tmp_path / "l")
    model = whole(directory)
    assert_equal(whole(encoder, AutoModel), model.get_submodule(family_of(model).vision[0]))
    with torch.no_grad():
        mine, own = (whole(d, AutoModelForCausalLM)(input_ids=IDS).logits for d in (language, parts(llm)))
    assert torch.equal(mine[..., : own.shape[-1]], own)
    for again in (
        swap_language(directory, language=language, out=tmp_path / "s"),
        put_encoder(directory, encoder=encoder, out=tmp_path / "k", projector="keep"),
    ):
        assert_equal(whole(again), whole(directory))
        assert (again / "chat_template.jinja").read_text() == (directory / "chat_template.jinja").read_text()
        for file in ("processor_config.json", "preprocessor_config.json"):
            assert json.loads((again / file).read_text()) == json.loads((directory / file).read_text())
        before, after = (json.loads((d / "config.json").read_text()) for d in (directory, again))
        assert before == after
    fresh = put_encoder(directory, encoder=encoder, out=tmp_path / "f", seed=3)
    if vision != "qwen2_5_vl":
        assert_equal(whole(fresh), whole(directory))  # the same seed draws the same projector
    other = put_encoder(directory, encoder=encoder, out=tmp_path / "g", seed=4)
    assert_equal(whole(other).model.language_model, whole(directory).model.language_model)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_half_of_a_dual_encoder(kind, parts, tmp_path):
    dual = make_encoder(kind, tmp_path / "dual", dual=True)
    model = whole(compose(vision=dual, language=parts("qwen2"), out=tmp_path / "vlm"))
    assert_equal(model.model.vision_tower, whole(dual, AutoModel).vision_model)


@pytest.mark.parametrize("prefix", ["vision_model.", "vision_tower.vision_model."])
def test_tower_under_an_older_prefix(prefix, parts, tmp_path):
    """Released files of CLIP say vision_model.*; what is found is the same."""
    encoder = make_encoder("clip", tmp_path / "clip")
    save_file({prefix + name: tensor for name, tensor in stored(encoder).items()}, encoder / "model.safetensors")
    a, b = (
        compose(vision=v, language=parts("qwen2"), out=tmp_path / n) for v, n in ((encoder, "a"), (parts("clip"), "b"))
    )
    assert_equal(whole(a), whole(b))


def test_projector_is_drawn_by_fan_in_from_the_seed(parts, tmp_path):
    made = [
        whole(compose(vision=parts("internvl"), language=parts("qwen2"), out=tmp_path / str(i), seed=seed))
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (model.model.multi_modal_projector for model in made)
    assert_equal(first, again)
    assert not torch.equal(first.linear_1.weight, other.linear_1.weight)
    # 24 · 96 and 24 · 24 draws: the standard deviation is known to a few per cent.
    assert first.linear_1.weight.std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert first.linear_2.weight.std().item() == pytest.approx(WIDTH**-0.5, rel=0.15)
    assert not first.linear_1.bias.any() and not first.layer_norm.bias.any() and (first.layer_norm.weight == 1).all()


def test_feature_layers_are_the_fields_own_unless_set(parts, tmp_path):
    reads = {}
    for vision in ("clip", "siglip", "dinov2"):
        config = whole(compose(vision=parts(vision), language=parts("llama"), out=tmp_path / vision)).config
        reads[vision] = (config.vision_feature_layer, config.vision_feature_select_strategy)
    assert reads == {"clip": (-2, "default"), "siglip": (-1, "full"), "dinov2": (-2, "default")}
    full = compose(
        vision=parts("clip"),
        language=parts("llama"),
        out=tmp_path / "x",
        vision_feature_layer=-1,
        vision_feature_select="full",
    )
    assert whole(full).config.image_seq_length == 17  # the class token with 4 × 4 patches
    taken = take_encoder(full, out=tmp_path / "taken")
    config = whole(compose(vision=taken, language=parts("qwen2"), out=tmp_path / "y")).config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")  # as it was trained


def test_qwen_sections_share_out_half_a_head(parts, tmp_path):
    language = make_language("qwen2", tmp_path / "llm", width=256)  # two heads of 128: the released models' 16, 24, 24
    model = whole(compose(vision=parts("qwen2_5_vl"), language=language, out=tmp_path / "vlm"))
    assert model.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert model.config.vision_config.out_hidden_size == 256


def talks():
    user, answer = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "no</think>yes"}
    return [[user], [user, answer, user], [{"role": "system", "content": "be brief"}, user, answer]]


@pytest.mark.parametrize(
    "template", [CHATML, R1, "  {% for message in messages %}\n{{ message.content }}\n{% endfor %}"]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_wrapped_template_writes_text_as_before(template, prompt, parts, tmp_path):
    language = make_language("llama", tmp_path / "llm", template=template, eos="<|im_end|>")
    vlm = compose(vision=parts("clip"), language=language, out=tmp_path / "vlm")
    processor = load_processor(Backbone(path=str(vlm)))
    own = whole_tokenizer(language)
    for talk in talks():
        wanted = own.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert processor.render(talk, prompt) == wanted
        lists = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in talk]
        assert processor.render(lists, prompt) == wanted
    picture_first = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    plain = [{"role": "user", "content": "<image>\nwhat?"}]
    wanted = own.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
    assert processor.render(picture_first, prompt) == wanted
    taken = take_language(vlm, out=tmp_path / "taken")
    assert (taken / "chat_template.jinja").read_text() == template.lstrip(" ")


def whole_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("specials", "image_token"),
    [((), "<image>"), (("<IMG_CONTEXT>",), "<IMG_CONTEXT>"), (("<|image_pad|>",), "<|image_pad|>")],
)
def test_placeholder_is_one_the_tokenizer_has(specials, image_token, parts, tmp_path):
    language = make_language("qwen2", tmp_path / "llm", specials=specials, padding=0)
    rows = len(whole_tokenizer(language))
    vlm = compose(vision=parts("siglip"), language=language, out=tmp_path / "vlm")
    processor, model = AutoProcessor.from_pretrained(vlm), whole(vlm)
    assert processor.image_token == image_token
    assert processor.tokenizer.convert_tokens_to_ids(image_token) == model.config.image_token_id
    assert recorded(vlm)["tokens"]["added"] == ([] if specials else ["<image>"])
    assert model.get_input_embeddings().weight.shape[0] == rows + (not specials)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("llm", LANGUAGES)
def test_rows_are_added_only_where_none_is_free(llm, tied, parts, tmp_path):
    for padding in (0, 1, 5):
        language = make_language(llm, tmp_path / f"llm{padding}", tied=tied, padding=padding)
        model = whole(compose(vision=parts("clip"), language=language, out=tmp_path / f"vlm{padding}"))
        source = whole(language, AutoModelForCausalLM)
        rows = source.lm_head.weight.shape[0]
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == (rows if padding else rows + 1)
        for mine, own in (
            (model.lm_head.weight, source.lm_head.weight),
            (model.get_input_embeddings().weight, source.get_input_embeddings().weight),
        ):
            assert torch.equal(mine[:rows], own)
            if not padding:
                torch.testing.assert_close(mine[rows], own.mean(0), rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits[..., :rows], source(input_ids=IDS).logits)


def test_dtypes_stay_unless_one_is_asked_for(parts, tmp_path):
    language = make_language("qwen2", tmp_path / "llm", dtype=torch.bfloat16)
    for dtype, tower in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        vlm = compose(vision=parts("clip"), language=language, out=tmp_path / str(dtype), dtype=dtype)
        tensors = stored(vlm)
        assert tensors["model.language_model.norm.weight"].dtype == torch.bfloat16
        assert tensors["model.multi_modal_projector.linear_1.weight"].dtype == torch.bfloat16
        assert tensors["model.vision_tower.post_layernorm.weight"].dtype == tower
        assert json.loads((vlm / "config.json").read_text())["dtype"] == "bfloat16"
        assert {parameter.dtype for parameter in whole(vlm).parameters()} == {torch.bfloat16}  # one in memory


def original_internvit(tensors, pixels, heads):
    """InternViT's forward written out on the tensors that OpenGVLab stores."""
    x = F.conv2d(pixels, tensors["embeddings.patch_embedding.weight"], tensors["embeddings.patch_embedding.bias"], 7)
    x = torch.cat([tensors["embeddings.class_embedding"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + tensors["embeddings.position_embedding"]

    def rms(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    for i in range(3):
        t = {name.removeprefix(f"encoder.layers.{i}."): tensor for name, tensor in tensors.items()}
        q, k, v = (rms(x, t["norm1.weight"]) @ t["attn.qkv.weight"].T).chunk(3, -1)
        q, k = rms(q, t["attn.q_norm.weight"]), rms(k, t["attn.k_norm.weight"])
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + t["ls1"] * (mixed.transpose(1, 2).flatten(2) @ t["attn.proj.weight"].T + t["attn.proj.bias"])
        y = F.gelu(rms(x, t["norm2.weight"]) @ t["mlp.fc1.weight"].T + t["mlp.fc1.bias"])
        x = x + t["ls2"] * (y @ t["mlp.fc2.weight"].T + t["mlp.fc2.bias"])
    return x


def test_converted_internvit_computes_what_the_original_does(parts, tmp_path):
    tower = whole(
        compose(vision=parts("intern_vit_6b"), language=parts("qwen2"), out=tmp_path / "v")
    ).model.vision_tower
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = tower(pixels).last_hidden_state
    torch.testing.assert_close(got, original_internvit(stored(parts("intern_vit_6b")), pixels, 2), rtol=1e-4, atol=1e-5)


def test_dinov2_with_gated_layers_and_current_names(parts, tmp_path):
    """DINOv2-giant's fused gate, and files that name tensors as the modules are named now."""
    giant = make_encoder("dinov2", tmp_path / "giant", use_swiglu_ffn=True)
    model = whole(compose(vision=giant, language=parts("qwen2"), out=tmp_path / "a"))
    assert_equal(model.model.vision_tower, whole(giant, AutoModel))
    save_file(whole(giant, AutoModel).state_dict(), giant / "model.safetensors", metadata={"format": "pt"})
    assert_equal(whole(compose(vision=giant, language=parts("qwen2"), out=tmp_path / "b")), model)
