"""Loading what is probed: a VLM, a dual encoder's vision half, or a tower alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from lightning_vlm.models.families import FAMILIES, Family, Pixels, family_of
from lightning_vlm.models.load import check_path, load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import Processor, load_image_processor, load_processor
from lightning_vlm.models.spec import Backbone, Dtype

from .features import BareTower, VisionEncoder

_TILES, _PATCH_ROWS = FAMILIES["llava"], FAMILIES["qwen2_5_vl"]
_TILING = ("crop_to_patches", "do_image_splitting")
_MODEL_TYPES = frozenset(kind for family in FAMILIES.values() for kind in family.model_types)


def load_encoder(
    path: str | Path,
    *,
    layer: int | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    max_pixels: int | None = None,
    device: str | torch.device | None = None,
) -> VisionEncoder:
    """The vision encoder of a model directory, and the model around it where there is one.

    Args:
        path: directory or hub id of a VLM of the family table, of a dual encoder (its vision half is taken) or of a
            tower alone with its image processor; or `embedded:NAME`.
        layer: the block whose output is probed: 1 is the first, −1 the last, −2 what LLaVA's projector is given. By
            default what the model's projector is given, and of a tower alone the last hidden state.
        dtype: of the weights.
        seed: of an embedded model's random weights.
        max_pixels: upper bound of a picture's pixels, where the image processor has one.
        device: where it runs; a GPU if there is one by default.

    Raises:
        ValueError: no such directory, one without a vision encoder or image processor, a tower that takes more than
            pixels, weights that do not fill it, or a layer it does not have.
    """
    path = str(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = None if path.startswith("embedded:") else _config(path)
    if config is None or config.model_type in _MODEL_TYPES:
        backbone = Backbone(path=path, dtype=dtype, seed=seed, max_pixels=max_pixels)
        return _of_model(backbone, layer, device)
    return _of_tower(path, config, layer, getattr(torch, dtype), max_pixels, device)


def _config(path: str) -> PretrainedConfig:
    check_path(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} has no config.json that can be used: {first}") from error


# --- a VLM -----------------------------------------------------------------------------------------------------------


def _of_model(backbone: Backbone, layer: int | None, device: Any) -> VisionEncoder:
    processor = load_processor(backbone)
    model = load_model(backbone).to(device).eval().requires_grad_(False)
    family = family_of(model)
    patch = _first(model.config.vision_config.patch_size)

    def prepare(picture: Image.Image) -> Pixels:
        return processor.image(picture)[0].tensors

    side = _whole(processor.hf.image_processor, family, model.config.vision_config, prepare)
    return VisionEncoder(
        path=backbone.path,
        model=model,
        family=family,
        prepare=prepare,
        patch=patch,
        side=side,
        policy=Policy(model, family),
        processor=processor,
        layer=layer,
    )


def _whole(images: Any, family: Family, config: PretrainedConfig, prepare: Any) -> int | None:
    """Makes an image processor show every square picture whole and once; gives the tower's side in pixels."""
    if family.patch_rows:
        return None
    for name in _TILING:
        if getattr(images, name, False):
            setattr(images, name, False)
    given = _first(config.image_size)
    side = prepare(Image.new("RGB", (given, given), "grey"))["pixel_values"].shape[-1]
    if getattr(images, "do_center_crop", False):  # pictures come in the size that is left of them
        images.do_center_crop = images.do_resize = False
    return side


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


# --- a tower alone ---------------------------------------------------------------------------------------------------


def _of_tower(
    path: str, config: PretrainedConfig, layer: int | None, dtype: torch.dtype, max_pixels: int | None, device: Any
) -> VisionEncoder:
    own = getattr(config, "vision_config", config)
    rows = hasattr(own, "spatial_merge_size")
    if not hasattr(own, "patch_size"):
        raise ValueError(
            f"{path} has no vision encoder: a {config.model_type!r} model has no patches; give a VLM, or a tower such "
            "as CLIP, SigLIP, DINOv2 or InternViT with its image processor"
        )
    if getattr(own, "image_size", None) is None and not rows:
        raise ValueError(
            f"{path}: a {own.model_type!r} tower has no image_size, it takes patches with pixel_attention_mask and "
            "spatial_shapes, which probes do not give; of SigLIP2 the fixed-size models will do"
        )
    tower = _tower(path, config, dtype).to(device).eval().requires_grad_(False)
    images = _images(path, max_pixels)
    family = _PATCH_ROWS if rows else _TILES
    wanted = {"pixel_values", "image_grid_thw"} if rows else {"pixel_values"}

    def prepare(picture: Image.Image) -> Pixels:
        found = dict(images(images=[picture], return_tensors="pt"))
        if odd := sorted(found.keys() - wanted - {"num_patches"}):
            raise ValueError(f"{path} also takes {', '.join(odd)}: probes know towers that take pixels of one size")
        return {name: found[name] for name in wanted}

    side = _whole(images, family, own, prepare)
    return VisionEncoder(
        path=path,
        model=BareTower(tower, family),
        family=family,
        prepare=prepare,
        patch=_first(own.patch_size),
        side=side,
        layer=layer,
    )


def _tower(path: str, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    try:
        model, report = AutoModel.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} has no weights that can be loaded: {first}") from error
    except ValueError as error:
        raise ValueError(f"{path} holds a {config.model_type!r} model, which AutoModel does not load") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[kind]):
            raise ValueError(
                f"weights of {path} do not fill the tower: {len(names)} {kind.replace('_', ' ')} "
                f"({', '.join(names[:3])}); is config.json another model's?"
            )
    return getattr(model, "vision_model", model) if hasattr(config, "vision_config") else model


def _images(path: str, max_pixels: int | None) -> Any:
    """The image processor of a directory or hub id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, allow_patterns=["*.json"]))
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "image_processor" not in settings and not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"{path} has no preprocessor_config.json: copy the tower's own, it says how pictures are seen")
    bounds = {} if max_pixels is None else {"max_pixels": max_pixels}
    return load_image_processor(folder, settings, bounds)


def model_of(encoder: VisionEncoder, what: str) -> tuple[Policy, Processor]:
    """The model around an encoder.

    Raises:
        ValueError: there is none.
    """
    if encoder.policy is None or encoder.processor is None:
        raise ValueError(f"{encoder.path} is a vision encoder alone: {what} needs the model around it")
    return encoder.policy, encoder.processor
