"""What model to start from: the one setting typed once and linked into module and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float64"]
Attention = Literal["sdpa", "flash_attention_2", "eager"]

EMBEDDED = "embedded:"


@dataclass(kw_only=True)
class Backbone:
    """The model a run starts from.

    Attributes:
        path: Hugging Face hub id, local directory, or `embedded:NAME` (for example `embedded:qwen2_5_vl-student`).
        dtype: dtype of the weights in memory.
        attention: attention backend; `flash_attention_2` needs the `gpu` extra and computes in half precision.
        seed: seed of the random weights of an embedded model; without effect on models that are loaded.
        trust_remote_code: run code that comes with the model's files.
        max_pixels: upper bound on an image's pixels where the image processor has one; None keeps the model's own.
        min_pixels: lower bound, likewise.
        chat_template: path of a jinja file that replaces the model's chat template.
        quantize: `4bit` (NF4) or `8bit` keeps the linear layers of a frozen language model in so many bits, by
            bitsandbytes (the `quantize` extra); None keeps them in `dtype`.
        adapter: adapter file (or its directory) to start from, LoRA matrices or a projector, as `lightning-vlm export
            CKPT --adapter` writes it; the parts need the LoRA settings it was trained with.

    Raises:
        ValueError: an empty path, or an unknown dtype or attention backend.
    """

    path: str
    dtype: Dtype = "float32"
    attention: Attention = "sdpa"
    seed: int = 0
    trust_remote_code: bool = False
    max_pixels: int | None = None
    min_pixels: int | None = None
    chat_template: str | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("backbone.path is empty: give a hub id, a local model directory, or embedded:NAME")
        bits = (None, "4bit", "8bit")
        choices = (("dtype", get_args(Dtype)), ("attention", get_args(Attention)), ("quantize", bits))
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"backbone.{name} is {value!r}; choose one of {', '.join(map(str, allowed))}")

    @property
    def embedded(self) -> str | None:
        """NAME of `embedded:NAME`, None for a hub id or a directory."""
        return self.path.removeprefix(EMBEDDED) if self.path.startswith(EMBEDDED) else None
