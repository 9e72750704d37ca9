"""The embedded models and their tokenizer: determinism, initialisation, plain transformers reloads them."""

import pytest
import torch
from PIL import Image

from lightning_vlm.models.embedded import (
    IMAGE_PAD,
    IMAGE_TOKENS,
    INITIALIZER_RANGE,
    LLAVA_IMAGE,
    NAMES,
    VISION_END,
    VISION_START,
    build_model,
    build_processor_parts,
    build_tokenizer,
)

TINY = ("qwen2_5_vl-tiny", "llava-tiny")


def inputs(name: str, text: str = "how many circles are there?", colour: int = 0) -> dict[str, torch.Tensor]:
    """What the architecture's forward takes for one image and a question."""
    tokenizer, images, template = build_processor_parts(name)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    placeholder = IMAGE_PAD if name.startswith("qwen") else LLAVA_IMAGE
    assert prompt.count(placeholder) == 1
    prompt = prompt.replace(placeholder, placeholder * IMAGE_TOKENS)
    made = dict(images(images=[Image.new("RGB", (64, 64), (colour, 0, 0))], return_tensors="pt"))
    made["input_ids"] = tokenizer(prompt, return_tensors="pt").input_ids
    if name.startswith("qwen"):
        made["mm_token_type_ids"] = (made["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int()
    return made


def test_tokenizer_known_tokens():
    tokenizer = build_tokenizer()
    text = r"40 + 65 = 105, 180 - 105 = 75. \boxed{75}"
    tokens = tokenizer.tokenize(text)
    assert tokens == [*"40+65=105,180-105=75.", r"\boxed{", "7", "5", "}"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("How many\nzebras?") == ["how", "many", tokenizer.unk_token, "?"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert 80 <= len(tokenizer) <= 100


def test_decoding_keeps_or_skips_special_tokens():
    tokenizer = build_tokenizer()
    ids = tokenizer(r"red = 7. \boxed{7}<|im_end|><|pad|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == r"red = 7. \boxed{7}"
    assert tokenizer.decode(ids).endswith("<|im_end|> <|pad|>")


def test_a_chat_prompt_is_a_prefix_of_its_conversation():
    tokenizer, _, template = build_processor_parts("llava-tiny")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the image."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a red circle."}]}
    prompt = tokenizer.apply_chat_template([user], chat_template=template, tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template([user, answer], chat_template=template, tokenize=False)
    assert full == prompt + "a red circle.<|im_end|>\n"
    assert (
        tokenizer(full).input_ids[len(tokenizer(prompt).input_ids) :] == tokenizer("a red circle.<|im_end|>").input_ids
    )


@pytest.mark.parametrize("name", NAMES)
def test_sizes_initialisation_and_tied_embeddings(name):
    """Matrices have standard deviation .1 whatever transformers' own scheme does; norms are one, biases zero."""
    model = build_model(name, seed=1)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    low, high = {"student": (0.4, 0.6), "teacher": (1.4, 1.8), "small": (0.09, 0.12), "tiny": (0.05, 0.09)}[
        name.rsplit("-")[-1]
    ]
    assert low < millions < high
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for parameter_name, p in model.named_parameters():
        if p.ndim >= 2:
            tolerance = 4 * INITIALIZER_RANGE / (2 * p.numel()) ** 0.5
            assert abs(p.std().item() - INITIALIZER_RANGE) < tolerance, parameter_name
        elif not parameter_name.endswith("class_embedding"):
            assert (p == (0.0 if parameter_name.endswith("bias") else 1.0)).all(), parameter_name


@pytest.mark.parametrize("name", TINY)
def test_weights_are_a_function_of_the_seed_and_touch_no_global_state(name):
    before = torch.random.get_rng_state()
    first = build_model(name, seed=5).state_dict()
    torch.manual_seed(99)
    again, other = build_model(name, seed=5).state_dict(), build_model(name, seed=6).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    torch.random.set_rng_state(before)
    build_model(name)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", TINY)
def test_low_precision_weights_are_the_rounded_ones_and_rotary_frequencies_stay_exact(name):
    full, half = build_model(name), build_model(name, dtype="bfloat16")
    for (k, a), b in zip(full.named_parameters(), half.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b), k
    for (k, a), b in zip(full.named_buffers(), half.buffers(), strict=True):
        assert torch.equal(a, b), k


@pytest.mark.parametrize("name", TINY)
def test_the_image_reaches_the_logits_and_every_used_weight_its_gradient(name):
    model = build_model(name)
    red, black = (model(**inputs(name, colour=c)).logits for c in (255, 0))
    assert (red[:, -1] - black[:, -1]).abs().max() > 1e-3
    red.float().logsumexp(-1).sum().backward()
    off = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all("post_layernorm" in n or "k_proj.bias" in n for n in off), (
        off
    )  # CLIP's pooler; softmax ignores key biases


@pytest.mark.parametrize("name", TINY)
def test_plain_transformers_reloads_model_tokenizer_and_image_processor(name, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    model, (tokenizer, images, template) = build_model(name, seed=2), build_processor_parts(name)
    model.save_pretrained(tmp_path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    images.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = inputs(name, colour=200)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    text = r"1 red, 2 blue. \boxed{2}"
    assert AutoTokenizer.from_pretrained(tmp_path).decode(tokenizer(text).input_ids) == text
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = Image.new("RGB", (64, 64), (237, 237, 237))
    pixels = again(images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, images(images=[picture], return_tensors="pt")["pixel_values"])
    assert pixels.abs().max() < 0.01  # the world's background is about zero


def test_images_take_sixteen_tokens():
    for name in TINY:
        model, batch = build_model(name), inputs(name)
        arguments = {k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw")}
        features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
        assert len(features) == 1 and features[0].shape == (IMAGE_TOKENS, 32)
    ids = build_tokenizer().convert_tokens_to_ids([VISION_START, IMAGE_PAD, VISION_END, LLAVA_IMAGE])
    assert len(set(ids)) == 4


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'qwen-small'.*qwen2_5_vl-student"):
        build_model("qwen-small")
    with pytest.raises(ValueError, match="choose one of"):
        build_processor_parts("llava")
