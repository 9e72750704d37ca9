"""A VLM's tower or language model as a model directory of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from lightning_vlm.compose.assemble import origin, write_directory
from lightning_vlm.compose.checks import check_common
from lightning_vlm.compose.encoder import norm_pieces
from lightning_vlm.compose.language import as_causal, causal_class, generation_config
from lightning_vlm.compose.shells import copied, meta_model
from lightning_vlm.compose.template import unwrap
from lightning_vlm.compose.tokens import Text, cuts_alike, load_tokenizer, template_of
from lightning_vlm.compose.vlm import projector_path, read_vlm
from lightning_vlm.compose.weights import Piece


def take_encoder(vlm: str | Path, *, out: str | Path, dtype: str | None = None, max_shard_size: str = "4GB") -> Path:
    """Write a VLM's tower as a model directory of its own, with its image processor.

    A projector that is no part of the tower's class stays behind; Qwen2.5-VL's merger is, so it is written too, and
    neither `compose` nor `put-encoder` reads it.

    Args:
        vlm: directory in LLaVA, InternVL or Qwen2.5-VL form.
        out, dtype, max_shard_size: as of `compose`.
    """
    shard, kind = check_common(out, max_shard_size, dtype)
    base = read_vlm(vlm)
    tower = base.encoder
    config = copied(tower.config)
    pieces = {**tower.pieces, **norm_pieces(tower, next(iter(tower.pieces.values())).dtype)}
    if base.family.name == "qwen2_5_vl":
        inside = projector_path(base.family).rpartition(".")[2]
        pieces |= {f"{inside}.{name}": piece for name, piece in base.projector.items()}
    config.architectures = [type(meta_model(config)).__name__]
    facts = origin("take-encoder", base.path, {"vision": base.path}, reads=tower.reads)

    def save(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps(tower.images, indent=2) + "\n")

    return _write(Path(out), config, pieces, save, facts, kind, shard)


def take_language(vlm: str | Path, *, out: str | Path, dtype: str | None = None, max_shard_size: str = "4GB") -> Path:
    """Write a VLM's language model as a causal-LM directory of its own, with tokenizer and chat template.

    Args:
        vlm: directory in LLaVA, InternVL or Qwen2.5-VL form.
        out, dtype, max_shard_size: as of `compose`.
    """
    shard, kind = check_common(out, max_shard_size, dtype)
    base = read_vlm(vlm)
    llm = base.language
    config = as_causal(llm.config)
    config.tie_word_embeddings = llm.head is None
    config.architectures = [causal_class(config)]
    pieces = {f"model.{name}": piece for name, piece in llm.pieces.items()}
    if llm.head is not None:
        pieces["lm_head.weight"] = llm.head
    tokenizer = load_tokenizer(base.path)
    template = unwrap(template_of(base.path, tokenizer))
    text = Text(tokenizer, template, {}, [], wrapped=False)
    facts = origin("take-language", base.path, {"language": base.path})

    def save(folder: Path) -> None:
        text.save(folder)
        auto = AutoTokenizer.from_pretrained(folder)
        if not cuts_alike(auto, tokenizer):
            facts["tokenizer"] = f"AutoTokenizer takes it for a {type(auto).__name__}: load PreTrainedTokenizerFast"
        generation_config(base.path).save_pretrained(folder)

    return _write(Path(out), config, pieces, save, facts, kind, shard)


def _write(
    out: Path,
    config: PreTrainedConfig,
    pieces: dict[str, Piece],
    save: Callable[[Path], None],
    facts: dict,
    dtype: torch.dtype | None,
    shard: int,
) -> Path:
    pieces = {name: piece.to(dtype) for name, piece in pieces.items()}
    config.dtype = next(iter(pieces.values())).dtype
    return write_directory(out, config, pieces, save=save, provenance=facts, max_shard_size=shard)
