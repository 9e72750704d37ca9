"""Vision encoders: what a directory holds, whether it can be put into a VLM, and which layer is read by custom."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lightning_vlm.compose.internvit import ORIGINAL, converted, internvit_config
from lightning_vlm.compose.shells import Shapes, load_config, model_directory, spellings
from lightning_vlm.compose.weights import Found, Piece, check_whole, find_part, read_weights
from lightning_vlm.export.provenance import recorded
from lightning_vlm.models.processor import read_json

MERGER = "merger."  # Qwen2.5-VL keeps its projector inside the tower


@dataclass(frozen=True)
class Custom:
    """How a kind of tower is used: form of the VLM, feature layer, selection strategy, tokens beside the patches."""

    form: str
    layer: int
    select: str
    extra: int


# LLaVA reads CLIP's last layer but one without the class token, SigLIP's last with all patches; DINOv2 as in Prismatic
# VLMs. Registers, where a DINOv2 has them, stay among the image tokens: LLaVA's code drops one token only.
CUSTOMS = {
    "clip_vision_model": Custom("llava", -2, "default", 1),
    "siglip_vision_model": Custom("llava", -1, "full", 0),
    "dinov2": Custom("llava", -2, "default", 1),
    "dinov2_with_registers": Custom("llava", -2, "default", 1),
    "internvl_vision": Custom("internvl", -1, "default", 1),
    "qwen2_5_vl_vision": Custom("qwen2_5_vl", -1, "full", 0),
}
_DUAL = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# What stands beside the vision half in a directory and is no part of it.
_BESIDE = re.compile(
    r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias|classifier|head\.(weight|bias)$|"
    r"(.*\.)?mask_token$)"
)
_LAYER = re.compile(r"^(?:vision_model\.)?encoder\.layers?\.(\d+)\.")
_NORM = re.compile(r"^(post_layernorm|layernorm)\.(weight|bias)$")
_NAFLEX = ("siglip2", "siglip2_vision_model")


@dataclass
class Encoder:
    """A vision tower.

    Attributes:
        path: the directory it comes from.
        config: the bare tower's.
        pieces: its tensors, by names within the tower.
        images: settings of its image processor.
        present: layers whose tensors are there; fewer than the config's where the output layers were dropped.
        unnormed: the final norm's tensors are absent.
        reads: feature layer and selection strategy it was trained with, where its directory tells.
    """

    path: Path
    config: PreTrainedConfig
    pieces: dict[str, Piece]
    images: dict[str, Any]
    present: int
    unnormed: Shapes = field(default_factory=dict)
    reads: tuple[int, str] | None = None

    @property
    def kind(self) -> str:
        """`config.model_type`."""
        return self.config.model_type

    @property
    def custom(self) -> Custom:
        """The field's way with towers of this kind."""
        return CUSTOMS[self.kind]

    @property
    def depth(self) -> int:
        """Layers that the config names."""
        return self.config.depth if self.kind == "qwen2_5_vl_vision" else self.config.num_hidden_layers

    @property
    def extra(self) -> int:
        """Tokens beside the patches: class token and registers."""
        return self.custom.extra + getattr(self.config, "num_register_tokens", 0)

    @property
    def patch(self) -> int:
        """Pixels along a patch."""
        size = self.config.patch_size
        return size if isinstance(size, int) else size[0]


def read_encoder(path: str | Path, *, role: str = "--vision") -> Encoder:
    """The encoder in a directory: a bare tower, the vision half of a dual encoder, or one that take-encoder wrote.

    Args:
        path: its directory.
        role: the argument's name, for errors.

    Raises:
        ValueError: no encoder that can be composed, missing or odd tensors, no image settings.
    """
    directory, raw = model_directory(path, role)
    kind = raw["model_type"]
    refuse_kind(kind, directory, role)
    weights = read_weights(directory)
    if kind == ORIGINAL:
        config, weights = internvit_config(raw, directory), converted(weights)
        config.dtype = next(iter(weights.pieces.values())).dtype
    else:
        config = load_config(directory)
        config = config.vision_config if kind in _DUAL else config
    qwen = config.model_type == "qwen2_5_vl_vision"
    found = find_part(weights, spellings(config, without=MERGER if qwen else None), f"{config.model_type} tower")
    mergers = [name for name in weights.pieces if qwen and MERGER in name]
    if odd := [name for name in weights.unclaimed([*found.names, *mergers]) if not _BESIDE.match(name)]:
        raise ValueError(
            f"{directory} holds {len(odd)} tensors that a {config.model_type} tower does not have "
            f"({', '.join(odd[:3])}): "
            "is config.json another model's?"
        )
    record = recorded(directory).get("reads")
    return make_encoder(directory, config, found, read_images(directory), tuple(record) if record else None)


def refuse_kind(kind: str, directory: Path, role: str) -> None:
    """Refuses what is no encoder that can be composed.

    Raises:
        ValueError: why not.
    """
    if kind in _NAFLEX:
        raise ValueError(
            f"{role} {directory} is a SigLIP2-NaFlex ({kind}): its tower needs pixel_attention_mask and spatial_shapes "
            "beside pixel_values, which neither LLaVA's nor InternVL's class passes on; take a fixed-size SigLIP2 "
            "(such as siglip2-so400m-patch14-384)"
        )
    if kind in ("llava", "internvl", "qwen2_5_vl"):
        raise ValueError(
            f"{role} {directory} is a whole VLM ({kind}): `lightning-vlm take-encoder` takes its encoder out"
        )
    if kind not in CUSTOMS and kind not in _DUAL and kind != ORIGINAL:
        known = ", ".join(sorted({*CUSTOMS, *_DUAL, ORIGINAL}))
        raise ValueError(f"{role} {directory} has model_type {kind!r}, no encoder that can be composed; known: {known}")


def make_encoder(
    directory: Path, config: PreTrainedConfig, found: Found, images: dict[str, Any], reads: tuple[int, str] | None
) -> Encoder:
    """An encoder of the tensors found; dropped output layers are noted, any other gap is an error.

    Raises:
        ValueError: missing tensors.
    """
    encoder = Encoder(directory, config, found.pieces, images, 0, reads=reads)
    encoder.present = encoder.depth
    layers = {int(hit[1]) for name in found.missing if (hit := _LAYER.match(name))}
    first = min(layers, default=encoder.depth)
    norms = [name for name in found.missing if _NORM.match(name)]
    rest = [n for n in found.missing if not _LAYER.match(n) and n not in norms and not n.startswith("head.")]
    partly = [name for name in found.pieces if (hit := _LAYER.match(name)) and int(hit[1]) >= first]
    if layers and not rest and not partly and layers == set(range(first, encoder.depth)):
        encoder.present = first
        encoder.unnormed = dict.fromkeys(norms, (config.hidden_size,))
        if any(name.startswith("head.") for name in found.missing):
            config.vision_use_head = False
        return encoder
    heads = [name for name in found.missing if name.startswith("head.")]
    if heads and heads == found.missing:
        raise ValueError(
            f"{directory} lacks the pooling head ({heads[0]}, ...) that config.json asks for: set vision_use_head to "
            "false in it, no VLM reads that head"
        )
    check_whole(found, directory, f"{config.model_type} tower")
    return encoder


def norm_pieces(encoder: Encoder, dtype: torch.dtype) -> dict[str, Piece]:
    """An identity in place of a final norm that was dropped with the output layers; no feature passes through it."""
    made = {}
    for name, shape in encoder.unnormed.items():
        value = 1.0 if name.endswith("weight") else 0.0
        made[name] = Piece(shape, dtype, lambda s=shape, v=value: torch.full(s, v, dtype=dtype))
    return made


def feature_layer(encoder: Encoder, layer: int) -> int:
    """The layer as the composed model writes it: from the end of the layers that are there.

    Args:
        encoder: the tower.
        layer: index into embeddings and all layers' outputs of the whole encoder; −1 is the last layer's output.

    Raises:
        ValueError: there is no such layer, or it was dropped.
    """
    depth, present = encoder.depth, encoder.present
    index = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= index <= depth:
        raise ValueError(f"vision_feature_layer {layer} asks for more layers than the {depth} of {encoder.path}")
    if index > present:
        raise ValueError(
            f"vision_feature_layer {layer} reads the output of layer {index}, but {encoder.path} holds only "
            f"{present} of "
            f"its {depth} layers, the output layers were dropped: give the whole encoder, or "
            f"--vision_feature_layer {present - depth - 1}"
        )
    return index - (present + 1) if present < depth else layer


def read_images(directory: Path) -> dict[str, Any]:
    """The image processor's settings of a directory, which class they are for included.

    Raises:
        ValueError: none there.
    """
    images = read_json(directory / "preprocessor_config.json")
    images = images or read_json(directory / "processor_config.json").get("image_processor") or {}
    kind = images.get("image_processor_type") or images.get("feature_extractor_type")
    if not kind:
        raise ValueError(
            f"{directory} has no preprocessor_config.json that names an image processor: copy the encoder's"
        )
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    dropped = ("feature_extractor_type", "processor_class", "auto_map")
    return {**{k: v for k, v in images.items() if k not in dropped}, "image_processor_type": kind}


def image_side(encoder: Encoder) -> tuple[int, int]:
    """Height and width in pixels of what the image processor gives the tower.

    Raises:
        ValueError: no fixed size, one that the tower does not take, or one that its patches do not fill.
    """
    images, path = encoder.images, encoder.path
    crop = images.get("crop_size") if images.get("do_center_crop", True) else None
    sizes = [_both(crop), _both(images.get("size"))]
    if images["image_processor_type"].startswith("GotOcr2"):
        sizes = [_both(images.get("size"))]
    side = next((size for size in sizes if size), None)
    if side is None:
        raise ValueError(f"{path}/preprocessor_config.json sets no size with height and width, nor a crop_size")
    own = _both(encoder.config.image_size)
    if not encoder.kind.startswith("dinov2") and side != own:  # DINOv2 interpolates its positions
        raise ValueError(
            f"{path}: the image processor makes {side[0]} × {side[1]} pixels, the tower takes {own[0]} × {own[1]}: "
            "make "
            "preprocessor_config.json and config.json agree"
        )
    if side[0] % encoder.patch or side[1] % encoder.patch:
        raise ValueError(f"{path}: images of {side[0]} × {side[1]} pixels are no whole patches of {encoder.patch}")
    return side


def _both(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        return (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None
    return tuple(size) if size else None
