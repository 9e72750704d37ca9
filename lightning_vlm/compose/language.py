"""Language models: what a causal-LM directory holds, and how its configuration changes inside Qwen2.5-VL's class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
)  # fmt: skip

from lightning_vlm.compose.shells import copied, load_config, meta_model, model_directory, spellings
from lightning_vlm.compose.weights import Piece, Weights, check_whole, find_part, read_weights

KINDS = ("qwen2", "qwen3", "llama")
_QWEN_TEXT = "qwen2_5_vl_text"
EMBEDDING = "embed_tokens.weight"


@dataclass
class Language:
    """A language model.

    Attributes:
        path: the directory it comes from; its tokenizer is there.
        config: of a causal LM, or `qwen2_5_vl_text` inside a VLM of that class.
        pieces: tensors of the decoder, embeddings included.
        head: the output projection; None where it is tied to the embeddings.
    """

    path: Path
    config: PreTrainedConfig
    pieces: dict[str, Piece]
    head: Piece | None

    @property
    def rows(self) -> int:
        """Embedding rows."""
        return self.pieces[EMBEDDING].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return self.pieces[EMBEDDING].dtype


def read_language(path: str | Path, *, role: str = "--language") -> Language:
    """The causal language model in a directory.

    Args:
        path: its directory.
        role: the argument's name, for errors.

    Raises:
        ValueError: no language model that can be composed, missing or odd tensors, a tied head that differs.
    """
    directory, raw = model_directory(path, role)
    kind = raw["model_type"]
    if "vision_config" in raw:
        raise ValueError(f"{role} {directory} is a whole VLM ({kind}): `lightning-vlm take-language` takes its LLM out")
    if kind not in KINDS:
        raise ValueError(
            f"{role} {directory} has model_type {kind!r}, no language model that can be composed; known: "
            f"{', '.join(KINDS)}"
        )
    config, weights = load_config(directory), read_weights(directory)
    language, names = find_language(weights, config, tied=config.tie_word_embeddings)
    if odd := weights.unclaimed(names):
        raise ValueError(
            f"{directory} holds {len(odd)} tensors that a {kind} causal LM does not have ({', '.join(odd[:3])}): is "
            "config.json another model's, or an adapter not merged?"
        )
    return language


def find_language(weights: Weights, config: PreTrainedConfig, *, tied: bool) -> tuple[Language, list[str]]:
    """Decoder and head among a directory's tensors, and the names they have there.

    Args:
        weights: of a causal LM or of a VLM.
        config: of the language model.
        tied: one matrix for embeddings and head.

    Raises:
        ValueError: missing tensors, a head where the config says it is tied and it is not.
    """
    found = find_part(weights, spellings(config), f"{config.model_type} language model")
    check_whole(found, weights.directory, "language model")
    heads = [name for name in weights.pieces if name == "lm_head.weight" or name.endswith(".lm_head.weight")]
    embedding = found.pieces[EMBEDDING]
    head = weights.pieces[heads[0]] if heads else None
    if head is None and not tied:
        raise ValueError(
            f"{weights.directory} has no lm_head.weight, and config.json does not tie it to the embeddings: copy the "
            "directory whole, or set tie_word_embeddings to true if that is how it was trained"
        )
    if head is not None and head.shape != embedding.shape:
        raise ValueError(
            f"{weights.directory}: lm_head.weight is {list(head.shape)}, the embeddings are {list(embedding.shape)}"
        )
    if head is not None and tied:
        if not torch.equal(head.read(), embedding.read()):
            raise ValueError(
                f"{weights.directory}: config.json ties the head to the embeddings, but lm_head.weight differs "
                "from them: "
                "set tie_word_embeddings to false"
            )
        head = None
    return Language(weights.directory, config, found.pieces, head), [*found.names, *heads]


def as_qwen_text(config: PreTrainedConfig, section: list[int] | None, who: Path) -> Qwen2_5_VLTextConfig:
    """A Qwen2 configuration as Qwen2.5-VL's class has it.

    Args:
        config: of a Qwen2 or Qwen2.5 language model, or one that is of that class already.
        section: rotary pairs of time, height and width; by default ¼, ⅜, ⅜ of a half head (Qwen2.5-VL), what does not
            divide goes to time. Text alone has one position for all three, so it is without effect on it.
        who: its directory, for errors.

    Raises:
        ValueError: another language model, which that class cannot hold.
    """
    if config.model_type not in ("qwen2", _QWEN_TEXT):
        raise ValueError(
            f"{who} is a {config.model_type}: Qwen2.5-VL's class holds a Qwen2 or Qwen2.5 decoder only "
            "(three-dimensional "
            "rotary positions, biased projections); take such an LLM, or a CLIP, SigLIP, DINOv2 or InternViT encoder"
        )
    values = _plain(config)
    half = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    if section is None or sum(section) != half:
        side = 3 * half // 8
        section = [half - 2 * side, side, side]
    values["rope_parameters"] = {**values["rope_parameters"], "mrope_section": section}
    return Qwen2_5_VLTextConfig(**values)


def as_causal(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration a causal LM has by itself: Qwen2 for Qwen2.5-VL's decoder, else a copy.

    Raises:
        ValueError: a decoder that is no causal LM of `KINDS`.
    """
    if config.model_type in KINDS:
        return copied(config)
    if config.model_type != _QWEN_TEXT:
        raise ValueError(
            f"a {config.model_type} decoder is no language model that can be composed; known: {', '.join(KINDS)}"
        )
    values = _plain(config)
    values["rope_parameters"].pop("mrope_section", None)
    return Qwen2Config(**values)


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings without what names the class."""
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        values.pop(name, None)
    rope = dict(values.get("rope_parameters") or {})
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    rope.pop("type", None)
    return {**values, "rope_parameters": rope}


def causal_class(config: PreTrainedConfig) -> str:
    """The name of the causal-LM class of `config`."""
    return type(meta_model(config, AutoModelForCausalLM)).__name__


def generation_config(directory: Path) -> GenerationConfig:
    """A directory's generation settings, empty where it has none.

    Raises:
        ValueError: a file that transformers refuses.
    """
    if not (directory / "generation_config.json").is_file():
        return GenerationConfig()
    try:
        settings = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{directory}/generation_config.json cannot be used: {error}") from error
    settings._from_model_config = False  # it is a file's from now on
    return settings
