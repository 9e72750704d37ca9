"""InternViT as OpenGVLab releases it (`intern_vit_6b`, which needs remote code) read as transformers' own class."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import InternVLVisionConfig

from lightning_vlm.compose.weights import Piece, Weights

ORIGINAL = "intern_vit_6b"
_RENAMED = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk])_norm\.", r".attention.\1_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls1$", ".lambda_1"),
    (r"\.ls2$", ".lambda_2"),
)
_FUSED = re.compile(r"^(.*)\.attn\.qkv\.(weight|bias)$")


def internvit_config(original: dict[str, Any], where: Path) -> InternVLVisionConfig:
    """transformers' configuration of an `intern_vit_6b` one.

    Args:
        original: content of its config.json.
        where: its directory, for errors.

    Raises:
        ValueError: a setting without which the sizes are unknown.
    """
    needed = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    if absent := [name for name in needed if name not in original]:
        raise ValueError(f"{where}/config.json does not set {', '.join(absent)}: copy the encoder's own config.json")
    return InternVLVisionConfig(
        **{name: original[name] for name in needed},
        attention_bias=original.get("qkv_bias", False),
        use_qk_norm=original.get("qk_normalization", True),
        hidden_act=original.get("hidden_act", "gelu"),
        norm_type=original.get("norm_type", "rms_norm"),
        layer_norm_eps=original.get("layer_norm_eps", 1e-6),
        layer_scale_init_value=original.get("initializer_factor", 0.1),
        initializer_range=original.get("initializer_range", 0.02),
        attention_dropout=original.get("attention_dropout", 0.0),
        hidden_dropout_prob=original.get("dropout", 0.0),
        num_channels=original.get("num_channels", 3),
        use_mask_token=False,
        use_mean_pooling=True,  # this model has no final norm
    )


def converted(weights: Weights) -> Weights:
    """The same tensors under transformers' names; a fused query-key-value matrix becomes three.

    Raises:
        ValueError: a fused matrix whose rows are no multiple of three.
    """
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights.pieces) else ""
    pieces: dict[str, Piece] = {}
    for stored, piece in weights.pieces.items():
        name = stored.removeprefix(prefix)
        if fused := _FUSED.match(name):
            rows, rest = divmod(piece.shape[0], 3)
            if rest:
                raise ValueError(f"{weights.directory}: {stored!r} is {list(piece.shape)}, no stack of three matrices")
            layer = re.sub(_RENAMED[3][0], _RENAMED[3][1], fused[1] + ".").removesuffix(".")
            for i, letter in enumerate("qkv"):
                pieces[f"{layer}.attention.{letter}_proj.{fused[2]}"] = _rows(piece, i * rows, rows)
            continue
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        pieces[name] = piece
    return Weights(weights.directory, pieces)


def _rows(piece: Piece, start: int, count: int) -> Piece:
    return replace(piece, shape=(count, *piece.shape[1:]), read=lambda: piece.read()[start : start + count].clone())


def internvl_images(given: dict[str, Any], side: tuple[int, int]) -> dict[str, Any]:
    """Image settings of the InternVL form: the encoder's normalisation, InternVL's tiles.

    Args:
        given: the encoder's preprocessor settings, kept whole if they are InternVL's already.
        side: height and width of the encoder's image in pixels.
    """
    if str(given.get("image_processor_type", "")).startswith("GotOcr2"):
        return given
    kept = {name: given[name] for name in ("image_mean", "image_std", "resample", "rescale_factor") if name in given}
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": side[0], "width": side[1]},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        **kept,
    }
