"""Tiny encoders and language models as released ones are stored, for the tests of composing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)  # fmt: skip

SIDE, PATCH, WIDTH, VISION_WIDTH = 28, 7, 32, 24
ENCODERS = ("clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "internvl", "intern_vit_6b", "qwen2_5_vl")
LANGUAGES = ("qwen2", "qwen3", "llama")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As DeepSeek-R1's: bos, turns by special tokens, chains of thought of earlier turns cut away.
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<｜User｜>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_CORPUS = ["the picture shows a red circle and a blue square", "how many shapes are there? there are 12", "a question"]


def _vit(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": VISION_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.1,
        **more,
    }


def _text(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, **more}


def vision_config(kind: str, **more: Any) -> Any:
    if kind == "qwen2_5_vl":
        return AutoConfig.for_model(
            "qwen2_5_vl_vision", depth=2, hidden_size=VISION_WIDTH, intermediate_size=48, num_heads=2, patch_size=PATCH,
            out_hidden_size=40, window_size=2 * 2 * PATCH, fullatt_block_indexes=[1], **more,
        )  # fmt: skip
    names = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip_vision_model"}
    names |= {"internvl": "internvl_vision"}
    own: dict[str, Any] = {} if kind.startswith("dinov2") else {"intermediate_size": 48}
    if kind.startswith("dinov2"):
        own |= {"mlp_ratio": 2, "layerscale_value": 0.5}
        own |= {"num_register_tokens": 2} if "registers" in kind else {}
    if kind == "internvl":
        own |= {"attention_bias": True}
    return AutoConfig.for_model(names.get(kind, kind), **_vit(**own, **more))


def _images(kind: str) -> dict[str, Any]:
    square = {"height": SIDE, "width": SIDE}
    if kind == "qwen2_5_vl":
        pixels = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": SIDE * SIDE}
        kinds = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
        return {"image_processor_type": "Qwen2VLImageProcessor", "size": pixels, **kinds}
    if kind.startswith("siglip"):
        return {"image_processor_type": "SiglipImageProcessor", "size": square}
    if kind == "internvl":
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": square,
            "crop_to_patches": True,
            "max_patches": 4,
        }
    name = "BitImageProcessor" if kind.startswith("dinov2") else "CLIPImageProcessor"
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": square, "do_center_crop": True}
    return {"image_processor_type": name, **crop, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def random_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter from N(0, .1²), norms and biases too, so that no tensor equals another by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    return model.eval()


def make_encoder(kind: str, out: Path, *, seed: int = 1, dual: bool = False, **more: Any) -> Path:
    """An encoder directory; `dual` makes CLIP's or SigLIP's two halves."""
    config = vision_config("internvl" if kind == "intern_vit_6b" else kind, **more)
    if kind == "intern_vit_6b":
        config.attention_bias, config.use_qk_norm, config.norm_type = False, True, "rms_norm"
    with torch.random.fork_rng():
        if dual:
            halves = {"text_config": _text(), "vision_config": config.to_dict()}
            model = CLIPModel(CLIPConfig(**halves)) if kind == "clip" else SiglipModel(SiglipConfig(**halves))
        else:
            model = AutoModel.from_config(config)
    random_weights(model, seed).save_pretrained(out)
    if kind == "intern_vit_6b":
        to_original(out, config)
    (out / "preprocessor_config.json").write_text(json.dumps(_images(kind)))
    return out


def to_original(out: Path, config: Any) -> None:
    """Rewrites transformers' InternViT as OpenGVLab stores it: other names, query, key and value in one matrix."""
    state = load_file(out / "model.safetensors")
    made = {}
    for name, tensor in state.items():
        for new, old in (
            ("embeddings.cls_token", "embeddings.class_embedding"),
            ("embeddings.position_embeddings", "embeddings.position_embedding"),
            ("patch_embeddings.projection", "patch_embedding"),
            ("encoder.layer.", "encoder.layers."),
            ("attention.projection_layer", "attn.proj"),
            ("attention.q_norm", "attn.q_norm"),
            ("attention.k_norm", "attn.k_norm"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("lambda_1", "ls1"),
            ("lambda_2", "ls2"),
        ):
            name = name.replace(new, old)
        if "q_proj" in name:
            parts = [state[key.replace("q_proj", f"{c}_proj")] for c in "qkv" for key in [_undo(name)]]
            made[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            made[name] = tensor
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "qkv_bias": False,
        "qk_normalization": True, "norm_type": "rms_norm", "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "image_size": SIDE, "patch_size": PATCH,
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
    }  # fmt: skip
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        facts[name] = getattr(config, name)
    (out / "config.json").write_text(json.dumps(facts))


def _undo(name: str) -> str:
    return name.replace("encoder.layers.", "encoder.layer.")


def make_tokenizer(specials: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def make_language(
    kind: str,
    out: Path,
    *,
    width: int = WIDTH,
    tied: bool = False,
    padding: int = 0,
    specials: tuple[str, ...] = (),
    template: str | None = CHATML,
    eos: str | None = "<|im_end|>",
    seed: int = 2,
    shard: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Path:
    """A causal-LM directory; `padding` rows of the embedding have no token."""
    named = {"bos_token": "<|begin|>", "pad_token": "<|endoftext|>"} | ({"eos_token": eos} if eos else {})
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<｜User｜>", "<｜Assistant｜>"]
    tokenizer = make_tokenizer([*controls, *specials], **named)
    tokenizer.chat_template = template
    rows = len(tokenizer) + padding
    head = {"head_dim": width // 2} if kind == "qwen3" else {}
    config = AutoConfig.for_model(
        kind, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=rows, max_position_embeddings=512,
        tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=None, **head, **more,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    random_weights(model, seed).save_pretrained(out, max_shard_size=shard)
    tokenizer.save_pretrained(out)
    return out


def picture(seed: int = 0, size: tuple[int, int] = (40, 33)) -> Image.Image:
    """An RGB picture of noise."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory by the names in its files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_json(path: Path, **values: Any) -> None:
    """Sets top-level entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
