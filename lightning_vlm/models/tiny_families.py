"""What the tiny model directories are made of: configs, special tokens and chat templates of every supported family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The families' own names of their special tokens.
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN = [*_CHATML, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
_GRID = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
_SPLIT = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *_GRID]
_LLAMA = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]

_PARTS = (
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
)


def _chatml_template(image: str, system: str | None = None) -> str:
    """`<|im_start|>role\\n…<|im_end|>\\n` turns; `system` is the text put first where the conversation has none."""
    first = (
        f"{{% if loop.first and message['role'] != 'system' %}}{{{{ '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}"
        "{% endif %}"
    )
    return (
        "{% for message in messages %}"
        + (first if system else "")
        + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + _PARTS.format(image=image)
        + "{{ '<|im_end|>\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


# `USER: <image>\ntext ASSISTANT: text `: no end of turn, and a generation prompt without its trailing space.
_VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
    + _PARTS.format(image="<image>\\n")
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _utterance_template(start: str) -> str:
    """`User:<image>text<end_of_utterance>\\n` turns; no space after the colon before an image."""
    return (
        f"{{{{ '{start}' }}}}"
        "{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}"
        "{% endif %}"
        + _PARTS.format(image="<image>")
        + "{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


@dataclass(frozen=True)
class Sizes:
    """Widths and depths asked for, with the tokenizer's ids by token."""

    hidden: int
    layers: int
    heads: int
    vision_hidden: int
    vision_layers: int
    patch: int
    image: int
    vocab: int
    std: float
    tied: bool
    ids: Callable[[str], int]

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image // self.patch

    def text(self, model_type: str, *, bos: str | None, eos: str, pad: str, **more: Any) -> dict[str, Any]:
        """A language model's config."""
        return {
            "model_type": model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(self.heads // 2, 1),
            "max_position_embeddings": 8192,
            "initializer_range": self.std,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.ids(bos) if bos else None,
            "eos_token_id": self.ids(eos),
            "pad_token_id": self.ids(pad),
            **more,
        }

    def vit(self, model_type: str, **more: Any) -> dict[str, Any]:
        """A CLIP-like tower's config."""
        return {
            "model_type": model_type,
            "hidden_size": self.vision_hidden,
            "intermediate_size": 2 * self.vision_hidden,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": 2,
            "image_size": self.image,
            "patch_size": self.patch,
            "initializer_range": self.std,
            **more,
        }

    @property
    def pixels(self) -> dict[str, int]:
        """A square of the tower's size."""
        return {"height": self.image, "width": self.image}


_Files = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # config, preprocessor_config, processor_config


def _qwen(generation: str, processor: str) -> Callable[[Sizes], _Files]:
    def build(s: Sizes) -> _Files:
        half = s.hidden // s.heads // 2  # rotary pairs of one head, shared out to time, height, width
        time = half - 2 * (3 * half // 8)
        rope = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [time, (half - time) // 2, (half - time) // 2],
        }
        text = s.text(f"{generation}_text", bos="<|endoftext|>", eos="<|im_end|>", pad="<|endoftext|>")
        vision: dict[str, Any] = {
            "model_type": f"{generation}_vision",
            "depth": s.vision_layers,
            "hidden_size": s.vision_hidden,
            "num_heads": 2,
            "patch_size": s.patch,
            "initializer_range": s.std,
        }
        if generation == "qwen2_vl":
            vision |= {"embed_dim": s.vision_hidden, "hidden_size": s.hidden, "mlp_ratio": 2}
        else:
            vision |= {"intermediate_size": 2 * s.vision_hidden, "out_hidden_size": s.hidden}
        if generation == "qwen2_5_vl":  # windows smaller than the image, and one block of full attention
            vision |= {"window_size": 2 * s.patch * 2, "fullatt_block_indexes": [s.vision_layers - 1]}
        if generation == "qwen3_vl":
            vision |= {"num_position_embeddings": s.grid**2, "deepstack_visual_indexes": [0]}
            text |= {"head_dim": s.hidden // s.heads}
            rope |= {"mrope_interleaved": True}
        config = {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": vision,
            "image_token_id": s.ids("<|image_pad|>"),
            "video_token_id": s.ids("<|video_pad|>"),
            "vision_start_token_id": s.ids("<|vision_start|>"),
            "vision_end_token_id": s.ids("<|vision_end|>"),
        }
        images = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": (2 * s.patch) ** 2, "longest_edge": s.image**2},
            "patch_size": s.patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
        }
        return config, images, {"processor_class": processor}

    return build


def _llava_clip_qwen2(s: Sizes) -> _Files:
    config = {
        "text_config": s.text("qwen2", bos=None, eos="<|im_end|>", pad="<|endoftext|>"),
        "vision_config": s.vit("clip_vision_model", projection_dim=s.vision_hidden),
        "image_token_index": s.ids("<image>"),
        "image_seq_length": s.grid**2,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
    }
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": s.image}, "crop_size": s.pixels}
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": s.patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" drops again
    }
    return config, images, processor


def _llava_siglip_llama(s: Sizes) -> _Files:
    config = {
        "text_config": s.text("llama", bos="<s>", eos="</s>", pad="<pad>"),
        "vision_config": s.vit("siglip_vision_model", vision_use_head=False),
        "image_token_index": s.ids("<image>"),
        "image_seq_length": s.grid**2,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }
    images = {"image_processor_type": "SiglipImageProcessor", "size": s.pixels}
    processor = {"processor_class": "LlavaProcessor", "patch_size": s.patch, "vision_feature_select_strategy": "full"}
    return config, images, processor


def _llava_onevision(s: Sizes) -> _Files:
    pinpoints = [[s.image * a, s.image * b] for a in (1, 2) for b in (1, 2)]
    config = {
        "text_config": s.text("qwen2", bos=None, eos="<|im_end|>", pad="<|endoftext|>"),
        "vision_config": s.vit("siglip_vision_model", vision_use_head=False),
        "image_token_index": s.ids("<image>"),
        "video_token_index": s.ids("<video>"),
        "image_grid_pinpoints": pinpoints,
    }
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": s.pixels,
        "image_grid_pinpoints": pinpoints,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": s.grid**2,
        "vision_feature_select_strategy": "full",
    }
    return config, images, processor


def _internvl(s: Sizes) -> _Files:
    tokens = s.grid**2 // 4
    config = {
        "text_config": s.text("qwen2", bos=None, eos="<|im_end|>", pad="<|endoftext|>"),
        "vision_config": s.vit("internvl_vision", attention_bias=True),
        "image_token_id": s.ids("<IMG_CONTEXT>"),
        "image_seq_length": tokens,
    }
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": s.pixels,
        "crop_to_patches": True,
        "max_patches": 4,
    }
    return config, images, {"processor_class": "InternVLProcessor", "image_seq_length": tokens}


def _idefics(model_type: str, name: str, bos: str, pad: str) -> Callable[[Sizes], _Files]:
    def build(s: Sizes) -> _Files:
        config = {
            "text_config": s.text("llama", bos=bos, eos="<end_of_utterance>", pad=pad),
            "vision_config": s.vit(f"{model_type}_vision"),
            "image_token_id": s.ids("<image>"),
            "pad_token_id": s.ids(pad),
            "scale_factor": 2,
        }
        images = {
            "image_processor_type": f"{name}ImageProcessor",
            "size": {"longest_edge": 2 * s.image},
            "max_image_size": {"longest_edge": s.image},
        }
        return config, images, {"processor_class": f"{name}Processor", "image_seq_len": s.grid**2 // 4}

    return build


@dataclass(frozen=True)
class TinyFamily:
    """What a family's directory is made of."""

    model_type: str
    specials: list[str]
    roles: dict[str, str]  # the tokenizer's bos/eos/pad and the names processors look special tokens up by
    template: str
    files: Callable[[Sizes], _Files]
    patch: int = 14
    adds_bos: bool = False


_CHATML_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_IMG_ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_QWEN_TEMPLATE = _chatml_template("<|vision_start|><|image_pad|><|vision_end|>", "You are a helpful assistant.")

FAMILIES: dict[str, TinyFamily] = {
    "qwen2_vl": TinyFamily("qwen2_vl", _QWEN, _CHATML_ROLES, _QWEN_TEMPLATE, _qwen("qwen2_vl", "Qwen2VLProcessor")),
    "qwen2_5_vl": TinyFamily(
        "qwen2_5_vl", _QWEN, _CHATML_ROLES, _QWEN_TEMPLATE, _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor")
    ),
    "qwen3_vl": TinyFamily(
        "qwen3_vl",
        _QWEN,
        _CHATML_ROLES,
        _chatml_template("<|vision_start|><|image_pad|><|vision_end|>"),
        _qwen("qwen3_vl", "Qwen3VLProcessor"),
        patch=16,
    ),
    "llava_clip_qwen2": TinyFamily(
        "llava", [*_CHATML, "<image>"], _CHATML_ROLES, _chatml_template("<image>\\n"), _llava_clip_qwen2
    ),
    "llava_siglip_llama": TinyFamily(
        "llava",
        _LLAMA,
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        _VICUNA_TEMPLATE,
        _llava_siglip_llama,
        adds_bos=True,
    ),
    "llava_onevision": TinyFamily(
        "llava_onevision",
        [*_CHATML, "<image>", "<video>"],
        _CHATML_ROLES,
        _chatml_template("<image>\\n"),
        _llava_onevision,
    ),
    "internvl": TinyFamily(
        "internvl",
        [*_CHATML, *_IMG_ROLES.values()],
        {**_CHATML_ROLES, **_IMG_ROLES},
        _chatml_template("<IMG_CONTEXT>\\n"),
        _internvl,
    ),
    "smolvlm": TinyFamily(
        "smolvlm",
        [*_CHATML, *_SPLIT],
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"},
        _utterance_template("<|im_start|>"),
        _idefics("smolvlm", "SmolVLM", "<|im_start|>", "<|im_end|>"),
    ),
    "idefics3": TinyFamily(
        "idefics3",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", *_SPLIT],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", "pad_token": "<|pad|>"},
        _utterance_template("<|begin_of_text|>"),
        _idefics("idefics3", "Idefics3", "<|begin_of_text|>", "<|pad|>"),
        adds_bos=True,
    ),
}
