r"""The embedded models: small randomly initialised VLMs of two released architectures, and their word-level tokenizer.

They belong to the embedded world (`lightning_vlm.data.world`): 64 × 64 pixel images seen as 16 image tokens, a closed
vocabulary of lower-case words, single digits, `\boxed{` and `}`. Names are `ARCHITECTURE-SIZE`:

| | vision | language | parameters |
|---|---|---|---|
| `student` | width 64, 3 blocks | width 96, 3 blocks, 4 heads, 2 key/value heads | .5 M |
| `teacher` | width 96, 4 blocks | width 160, 4 blocks, 4 heads, 2 key/value heads | 1.6 M |
| `small` | width 32, 2 blocks | width 48, 2 blocks, 4 heads, 2 key/value heads | .1 M |
| `tiny` (for tests) | width 32, 2 blocks | width 32, 2 blocks, 2 heads, 1 key/value head | .05 M |

for the architectures `qwen2_5_vl` (8-pixel patches, merged 2 × 2) and `llava` (CLIP tower with 16-pixel patches,
two-layer projector, Qwen2 language model). All share one vocabulary, so any can teach any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

IMAGE_SIZE = 64  # pixels, both sides
IMAGE_TOKENS = 16
INITIALIZER_RANGE = 0.1  # .02, the usual value for wide models, leaves narrow ones with almost no signal
IMAGE_MEAN, IMAGE_STD = 0.93, 0.2  # the background of the world becomes about 0

PAD, UNKNOWN, TURN_START, TURN_END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
LLAVA_IMAGE = "<image>"
SPECIAL_TOKENS = (
    PAD, UNKNOWN, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, LLAVA_IMAGE,
)  # fmt: skip

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = ("circles", "squares", "triangles", "crosses")
NUMBER_WORDS = ("one", "two", "three", "four")
WORDS = (
    *"0123456789", r"\boxed{", "}", ".", ",", "?", ":", "+", "-", "*", "=",
    *COLOURS, *SHAPES, *PLURALS, *NUMBER_WORDS,
    "system", "user", "assistant", "a", "the", "image", "shows", "there", "is", "are", "how", "many", "what", "of",
    "at", "and", "with", "as", "none", "shape", "shapes", "describe", "above", "below", "left", "right", "top",
    "bottom", "bar", "value", "plus", "minus", "angle", "x", "exterior", "perimeter", "similar", "times", "large",
)  # fmt: skip

_WORD = r"\\boxed\{|[0-9]|[A-Za-z]+|[^\sA-Za-z0-9]"
# Where decoding puts no space: inside numbers, before punctuation, within the box.
_GLUE = r"(?<=[0-9]) (?=[0-9])| (?=[.,?:}])|(?<=\\boxed\{) "

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}PLACEHOLDER"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class _Size:
    """Widths, depths, heads; `mrope` divides half a head's rotary dimensions over time, height and width."""

    vision_width: int
    vision_depth: int
    vision_heads: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    ffn: int
    mrope: tuple[int, int, int]


SIZES = {
    "student": _Size(64, 3, 4, 96, 3, 4, 2, 240, (3, 4, 5)),
    "teacher": _Size(96, 4, 4, 160, 4, 4, 2, 400, (6, 7, 7)),
    "small": _Size(32, 2, 2, 48, 2, 4, 2, 120, (2, 2, 2)),
    "tiny": _Size(32, 2, 2, 32, 2, 2, 1, 64, (2, 3, 3)),
}
ARCHITECTURES = ("qwen2_5_vl", "llava")
NAMES = tuple(f"{architecture}-{size}" for architecture in ARCHITECTURES for size in SIZES)


def _split(name: str) -> tuple[str, _Size]:
    if name not in NAMES:
        raise ValueError(f"backbone.path: no embedded model is named {name!r}; choose one of {', '.join(NAMES)}")
    architecture, size = name.rsplit("-", 1)
    return architecture, SIZES[size]


def build_tokenizer() -> PreTrainedTokenizerFast:
    r"""The word-level tokenizer of all embedded models.

    Whitespace separates and is dropped, text is lower-cased, each digit is a token, and so are `\boxed{` and `}`; a
    word outside the vocabulary becomes `<|unk|>`. Decoding writes numbers, punctuation and boxes as the world does, so
    `decode(encode(text)) == text` for every text of the world. `<|im_end|>` ends a turn (EOS), `<|pad|>` pads.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL_TOKENS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(_GLUE), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor_parts(name: str) -> tuple[PreTrainedTokenizerFast, BaseImageProcessor, str]:
    """Tokenizer, image processor and chat template of an embedded model.

    The image processor needs no torchvision; saved beside the model it loads in plain transformers. The template is
    ChatML with the architecture's image placeholder, one per image, still to be expanded to its 16 tokens.

    Raises:
        ValueError: `name` is none of `NAMES`.
    """
    architecture, _ = _split(name)
    normalisation = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    if architecture == "qwen2_5_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        pixels = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}
        images = Qwen2VLImageProcessorPil(
            size=pixels, patch_size=8, merge_size=2, temporal_patch_size=2, **normalisation
        )
        placeholder = VISION_START + IMAGE_PAD + VISION_END
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square, **normalisation)
        placeholder = LLAVA_IMAGE
    return build_tokenizer(), images, _CHATML.replace("PLACEHOLDER", placeholder)


def _text_settings(size: _Size, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": len(ids),
        "hidden_size": size.width,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[PAD],
    }


def build_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of an embedded model.

    Raises:
        ValueError: `name` is none of `NAMES`.
    """
    architecture, size = _split(name)
    ids = {word: i for i, word in enumerate(SPECIAL_TOKENS + WORDS)}
    text, rope = _text_settings(size, ids), {"rope_type": "default", "rope_theta": 10_000.0}
    if architecture == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig

        vision = {
            "depth": size.vision_depth,
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_heads": size.vision_heads,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": IMAGE_SIZE,
            "fullatt_block_indexes": list(range(size.vision_depth)),
            "out_hidden_size": size.width,
            "initializer_range": INITIALIZER_RANGE,
        }
        return Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": {**rope, "mrope_section": list(size.mrope)}},
            vision_config=vision,
            image_token_id=ids[IMAGE_PAD],
            video_token_id=ids[VIDEO_PAD],
            vision_start_token_id=ids[VISION_START],
            vision_end_token_id=ids[VISION_END],
            tie_word_embeddings=True,
        )
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=2 * size.vision_width,
        num_hidden_layers=size.vision_depth,
        num_attention_heads=size.vision_heads,
        image_size=IMAGE_SIZE,
        patch_size=16,
        projection_dim=size.vision_width,
        initializer_range=INITIALIZER_RANGE,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text, rope_parameters=rope),
        image_token_index=ids[LLAVA_IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # drops the class token, which leaves the 16 patches
        tie_word_embeddings=True,
    )


def build_model(name: str, seed: int = 0, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """A randomly initialised embedded model in eval mode, a function of its arguments; no global random state is used.

    Every matrix is drawn from N(0, .1²) in float32 and then rounded to `dtype`, norms start at one and biases at zero:
    CLIP's own scheme, which scales with width and depth, would leave this narrow a tower without signal.

    Args:
        name: one of `NAMES`.
        seed: seed of the weights.
        dtype: dtype of the weights, as torch has it or by name (`bfloat16`).

    Raises:
        ValueError: `name` is none of `NAMES`.
    """
    from transformers import AutoModelForImageTextToText

    config = build_config(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or parameter_name.endswith("class_embedding"):
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, INITIALIZER_RANGE, generator=generator))
            elif parameter_name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)  # scales of norms
    model.generation_config.update(
        eos_token_id=config.get_text_config().eos_token_id, pad_token_id=config.get_text_config().pad_token_id
    )
    return model.eval()
