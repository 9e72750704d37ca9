"""The family table: where each architecture keeps its parts, and how its image tensors are merged and cut.

Everything that depends on the architecture stands here. Shape suffixes: I images, P patches or tiles of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .batch import ImageInput

Pixels = dict[str, Tensor]

PARTS = ("vision", "projector", "language", "head")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Module and parameter paths are written from the top Hugging Face model (`...ForConditionalGeneration`).

    Attributes:
        name: the family's name.
        model_types: `config.model_type` values it covers.
        vision: paths of the vision tower. A projector that lives inside the tower belongs to `projector`.
        projector: paths of what maps vision features to the language model's width.
        language: paths of the language model, embeddings included (and so a head tied to them).
        head: paths of the output projection.
        merge: tensors of distinct images → what the family's `get_image_features` takes.
        slice: (merged tensors, placeholder ids of each image) → tensors of each image; inverse of `merge`, and also for
            a batch that the family's own processor made from several images per sample.
        off_graph: names of the parameters no gradient can ever reach, such as vision layers behind the feature layer.
        patch_rows: Qwen-VL's way: the patches of all images stand in one row beside `image_grid_thw`, attention within
            an image goes by cumulative lengths, and positions are three-dimensional (M-RoPE).
    """

    name: str
    model_types: tuple[str, ...]
    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    head: tuple[str, ...]
    merge: Callable[[Sequence[ImageInput]], Pixels]
    slice: Callable[[Pixels, Sequence[int]], list[Pixels]]
    off_graph: Callable[[PreTrainedModel], list[str]]
    patch_rows: bool = False

    def paths(self) -> dict[str, tuple[str, ...]]:
        """{part: its paths} for the four parts."""
        return {part: getattr(self, part) for part in PARTS}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated transformer blocks of every part, {module path: block}: the units of sharding and checkpointing."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


# --- merging and cutting ---------------------------------------------------------------------------------------------


def _gather(images: Sequence[ImageInput], *names: str) -> list[list[Tensor]]:
    """The named tensors of every image, one list per name; any other tensor, or a missing one, is an error."""
    for image in images:
        if set(image.tensors) != set(names):
            raise ValueError(
                f"image {image.key} has tensors {sorted(image.tensors)}, this model takes {sorted(names)}: "
                "was it processed for another family?"
            )
    return [[image.tensors[name] for image in images] for name in names]


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shapes = {tuple(n for i, n in enumerate(t.shape) if i != dim) for t in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"images of one batch have different shapes {sorted(shapes)}: this model takes one image or tile size; "
            "fix the size in its image processor"
        )
    return torch.cat(tensors, dim)


def _tiles_of(tokens: Sequence[int], total: int) -> list[int]:
    """How many tiles each image has: every tile fills the same number of placeholder ids."""
    per_tile, rest = divmod(sum(tokens), total) if total else (0, 0)
    if rest or per_tile == 0 or any(n % per_tile for n in tokens):
        raise ValueError(f"{total} tiles do not fit images of {list(tokens)} placeholder ids")
    return [n // per_tile for n in tokens]


def _merge_patches(images: Sequence[ImageInput]) -> Pixels:
    pixels, grids = _gather(images, "pixel_values", "image_grid_thw")
    return {"pixel_values": _cat(pixels), "image_grid_thw": _cat(grids)}


def _slice_patches(pixels: Pixels, tokens: Sequence[int]) -> list[Pixels]:
    grids = pixels["image_grid_thw"]
    rows = pixels["pixel_values"].split(grids.prod(-1).tolist())
    return [{"pixel_values": row, "image_grid_thw": grid} for row, grid in zip(rows, grids.split(1), strict=True)]


def _merge_single(images: Sequence[ImageInput]) -> Pixels:
    return {"pixel_values": _cat(_gather(images, "pixel_values")[0])}


def _slice_single(pixels: Pixels, tokens: Sequence[int]) -> list[Pixels]:
    return [{"pixel_values": image} for image in pixels["pixel_values"].split(1)]


def _merge_anyres(images: Sequence[ImageInput]) -> Pixels:
    """[1, P, 3, H, W] each → [I, max P, 3, H, W]; the model drops the zero patches by `image_sizes`."""
    pixels, sizes = _gather(images, "pixel_values", "image_sizes")
    most = max(p.shape[1] for p in pixels)
    padded = [F.pad(p, (0, 0) * 3 + (0, most - p.shape[1])) for p in pixels]
    return {"pixel_values": _cat(padded), "image_sizes": _cat(sizes)}


def _slice_anyres(pixels: Pixels, tokens: Sequence[int]) -> list[Pixels]:
    images = []
    for patches, size in zip(pixels["pixel_values"], pixels["image_sizes"].split(1), strict=True):
        filled = patches.flatten(1).ne(0).any(1).nonzero()
        count = int(filled.max()) + 1 if len(filled) else 1
        images.append({"pixel_values": patches[None, :count], "image_sizes": size})
    return images


def _slice_tiles(pixels: Pixels, tokens: Sequence[int]) -> list[Pixels]:
    tiles = pixels["pixel_values"]
    return [{"pixel_values": part} for part in tiles.split(_tiles_of(tokens, len(tiles)))]


def _merge_masked_tiles(images: Sequence[ImageInput]) -> Pixels:
    """[1, P, 3, H, W] each → [1, ΣP, 3, H, W]: all tiles of the batch as one sample, so that nothing is padded."""
    pixels, masks = _gather(images, "pixel_values", "pixel_attention_mask")
    return {"pixel_values": _cat(pixels, 1), "pixel_attention_mask": _cat(masks, 1)}


def _slice_masked_tiles(pixels: Pixels, tokens: Sequence[int]) -> list[Pixels]:
    tiles, masks = pixels["pixel_values"].flatten(0, 1), pixels["pixel_attention_mask"].flatten(0, 1)
    # A batch made by the family's processor pads samples with fewer tiles by zero tiles.
    real = tiles.flatten(1).ne(0).any(1)
    counts = _tiles_of(tokens, int(real.sum()))
    return [
        {"pixel_values": tile[None], "pixel_attention_mask": mask[None]}
        for tile, mask in zip(tiles[real].split(counts), masks[real].split(counts), strict=True)
    ]


# --- parameters off the graph ----------------------------------------------------------------------------------------


def _all_on_graph(model: PreTrainedModel) -> list[str]:
    return []


def _behind_feature_layer(model: PreTrainedModel) -> list[str]:
    """Vision layers behind the last one whose output is read, the final norm unless read, and a pooling head."""
    config, tower = model.config, model.model.vision_tower
    depth = config.vision_config.num_hidden_layers
    layer = config.vision_feature_layer
    wanted = [layer] if isinstance(layer, int) else list(layer)
    # hidden_states holds depth + 1 entries: the embeddings, then each layer's output before the final norm.
    last = max(i if i >= 0 else depth + 1 + i for i in wanted)
    # InternVL alone reads the normed last_hidden_state, and that only for the layer written -1.
    normed = config.model_type == "internvl" and layer == -1
    unread = [f"{name}." for name in ("post_layernorm", "layernorm") if not normed] + ["head."]
    vision_blocks = list(blocks(tower))
    unread += [f"{name}." for name in vision_blocks[last:]]
    names = [name for name, _ in tower.named_parameters()]
    # A mask token serves masked pre-training only.
    return [
        f"model.vision_tower.{name}" for name in names if name.startswith(tuple(unread)) or name.endswith("mask_token")
    ]


# --- the table -------------------------------------------------------------------------------------------------------

_QWEN = {
    "vision": ("model.visual",),
    "language": ("model.language_model",),
    "head": ("lm_head",),
    "merge": _merge_patches,
    "slice": _slice_patches,
    "off_graph": _all_on_graph,
    "patch_rows": True,
}
_TOWER = {
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language": ("model.language_model",),
    "head": ("lm_head",),
    "off_graph": _behind_feature_layer,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="qwen2_vl", model_types=("qwen2_vl",), projector=("model.visual.merger",), **_QWEN),
        Family(name="qwen2_5_vl", model_types=("qwen2_5_vl",), projector=("model.visual.merger",), **_QWEN),
        Family(
            name="qwen3_vl",
            model_types=("qwen3_vl",),
            projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
            **_QWEN,
        ),
        Family(name="llava", model_types=("llava",), merge=_merge_single, slice=_slice_single, **_TOWER),
        Family(
            name="llava_onevision",
            model_types=("llava_onevision",),
            merge=_merge_anyres,
            slice=_slice_anyres,
            **(_TOWER | {"projector": ("model.multi_modal_projector", "model.image_newline")}),
        ),
        Family(name="internvl", model_types=("internvl",), merge=_merge_single, slice=_slice_tiles, **_TOWER),
        Family(
            name="smolvlm",
            model_types=("smolvlm", "idefics3"),
            vision=("model.vision_model",),
            projector=("model.connector",),
            language=("model.text_model",),
            head=("lm_head",),
            merge=_merge_masked_tiles,
            slice=_slice_masked_tiles,
            off_graph=_all_on_graph,
        ),
    )
}

_TOWERS = {"llava": ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")}


def family_of(model_or_config: PreTrainedModel | PretrainedConfig) -> Family:
    """The family of a model or its config.

    Raises:
        ValueError: a `model_type`, or a vision tower, that no family covers.
    """
    config = getattr(model_or_config, "config", model_or_config)
    kind = config.model_type
    for family in FAMILIES.values():
        if kind in family.model_types:
            tower = config.vision_config.model_type
            if tower not in _TOWERS.get(family.name, (tower,)):
                known = ", ".join(_TOWERS[family.name])
                raise ValueError(f"{family.name} with vision tower {tower!r} is not supported; supported: {known}")
            return family
    known = ", ".join(sorted(t for family in FAMILIES.values() for t in family.model_types))
    raise ValueError(f"model_type {kind!r} is no image-text-to-text model of the family table; supported: {known}")
