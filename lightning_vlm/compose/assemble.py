"""Puts parts together: configuration, tensors under their new names, processor, the directory they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, InternVLConfig, LlavaConfig, PreTrainedConfig, Qwen2_5_VLConfig

from lightning_vlm.compose.encoder import Encoder, feature_layer, image_side, norm_pieces
from lightning_vlm.compose.internvit import internvl_images
from lightning_vlm.compose.language import Language, as_qwen_text
from lightning_vlm.compose.shells import Shapes, copied, spellings, under, vlm_shapes
from lightning_vlm.compose.tokens import Text, cuts_alike, load_tokenizer
from lightning_vlm.compose.vlm import Vlm, projector_path
from lightning_vlm.compose.weights import Piece, check_space, write_weights
from lightning_vlm.export.directory import whole_directory
from lightning_vlm.export.provenance import PROVENANCE_FILE, make_provenance, parent_of, weights_hash
from lightning_vlm.models.families import family_of
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

_SHUFFLE = 2  # InternVL's pixel shuffle: one image token of 2 × 2 patches
_CONFIGS = {"llava": LlavaConfig, "internvl": InternVLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}
_PROCESSORS = {"llava": "LlavaProcessor", "internvl": "InternVLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}


@dataclass
class Plan:
    """A VLM that is to be written.

    Attributes:
        config: of the whole.
        images: settings of the image processor.
        processor: settings of the processor around it.
        shapes: {module path: shape} of all its tensors.
    """

    config: PreTrainedConfig
    images: dict[str, Any]
    processor: dict[str, Any]
    shapes: Shapes = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes, name = vlm_shapes(self.config)
        self.config.architectures = [name]

    @property
    def projector(self) -> Shapes:
        """{name within the projector: shape}."""
        return under(self.shapes, projector_path(family_of(self.config)))


def plan(
    form: str,
    encoder: Encoder,
    language: Language,
    ids: dict[str, int],
    *,
    layer: int | None = None,
    select: str | None = None,
    base: Vlm | None = None,
    image_token: str,
) -> Plan:
    """Configuration and processor settings of `encoder` and `language` in one VLM.

    Args:
        form: `llava`, `internvl` or `qwen2_5_vl`.
        encoder: the tower.
        language: the LLM, its rows extended already.
        ids: `image`, `eos`, `pad`, and for Qwen2.5-VL `video`, `start`, `end`.
        layer: feature layer; by default the one the encoder was trained with, or else the field's usual one.
        select: `default` drops the class token, `full` keeps all; likewise.
        base: the VLM whose other settings stay (activation, biases, downsampling, rotary sections).
        image_token: the placeholder.

    Raises:
        ValueError: layer, strategy or image size that do not fit the tower.
    """
    if form == "qwen2_5_vl":
        return _plan_qwen(encoder, language, ids, base)
    recorded = encoder.reads or (encoder.custom.layer, encoder.custom.select)
    layer, select = recorded[0] if layer is None else layer, select or recorded[1]
    if select == "default" and not encoder.custom.extra:
        raise ValueError(
            f"vision_feature_select default drops the class token, but a {encoder.kind} has none: take full"
        )
    depth = feature_layer(encoder, layer)
    tower = copied(encoder.config)
    tower.num_hidden_layers = encoder.present
    height, width = image_side(encoder)
    grid = (height // encoder.patch, width // encoder.patch)
    settings: dict[str, Any] = {
        "vision_config": tower,
        "text_config": _with_ends(language.config, ids),
        "vision_feature_layer": depth,
        "vision_feature_select_strategy": select,
        "tie_word_embeddings": language.head is None,
    }
    processor: dict[str, Any] = {"processor_class": _PROCESSORS[form]}
    images = encoder.images
    if form == "internvl":
        if grid[0] != grid[1] or grid[0] % _SHUFFLE or select != "default":
            raise ValueError(
                "InternVL's pixel shuffle takes a square of an even number of patches without class token; "
                f"{encoder.path} "
                f"gives {grid[0]} × {grid[1]} with vision_feature_select {select}"
            )
        tokens = grid[0] * grid[1] // _SHUFFLE**2
        settings |= {"image_token_id": ids["image"], "image_seq_length": tokens, "downsample_ratio": 1 / _SHUFFLE}
        settings |= _kept(base, "projector_hidden_act")
        processor["image_seq_length"] = tokens
        images = internvl_images(images, (height, width))
    else:
        tokens = grid[0] * grid[1] + encoder.extra - (select == "default")
        settings |= {"image_token_index": ids["image"], "image_seq_length": tokens}
        settings |= _kept(base, "projector_hidden_act", "multimodal_projector_bias")
        processor |= {
            "patch_size": encoder.patch,
            "vision_feature_select_strategy": select,
            "num_additional_image_tokens": encoder.extra,
            "image_token": image_token,
        }
    return _planned(form, settings, language, ids, images, processor)


def _plan_qwen(encoder: Encoder, language: Language, ids: dict[str, int], base: Vlm | None) -> Plan:
    own = dict(base.config.text_config.rope_parameters).get("mrope_section") if base else None
    section = own or dict(getattr(language.config, "rope_parameters", None) or {}).get("mrope_section")
    tower = copied(encoder.config)
    tower.out_hidden_size = language.config.hidden_size
    settings = {
        "vision_config": tower,
        "text_config": _with_ends(as_qwen_text(language.config, section, language.path), ids),
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["start"],
        "vision_end_token_id": ids["end"],
        "tie_word_embeddings": language.head is None,
    }
    for name, own_name in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        if encoder.images.get(name, getattr(tower, own_name)) != getattr(tower, own_name):
            raise ValueError(
                f"{encoder.path}: preprocessor_config.json has {name} {encoder.images[name]}, config.json "
                f"{getattr(tower, own_name)}: make them agree"
            )
    return _planned(
        "qwen2_5_vl", settings, language, ids, encoder.images, {"processor_class": _PROCESSORS["qwen2_5_vl"]}
    )


def _planned(
    form: str, settings: dict[str, Any], language: Language, ids: dict[str, int], images: dict[str, Any],
    processor: dict[str, Any],
) -> Plan:  # fmt: skip
    config = _CONFIGS[form](**settings)
    config.eos_token_id, config.pad_token_id = ids["eos"], ids["pad"]
    config.bos_token_id = getattr(language.config, "bos_token_id", None)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = language.head is None
    return Plan(config, {**images, "processor_class": processor["processor_class"]}, processor)


def _with_ends(config: PreTrainedConfig, ids: dict[str, int]) -> PreTrainedConfig:
    copy = copied(config)
    copy.eos_token_id, copy.pad_token_id = ids["eos"], ids["pad"]
    return copy


def _kept(base: Vlm | None, *names: str) -> dict[str, Any]:
    return {name: getattr(base.config, name) for name in names} if base else {}


def ids_of(text: Text, form: str) -> dict[str, int]:
    """The ids that a configuration names."""
    ids = {"image": text.tokenizer.convert_tokens_to_ids(text.image)}
    ids |= {"eos": text.tokenizer.eos_token_id, "pad": text.tokenizer.pad_token_id}
    if form == "qwen2_5_vl":
        ids |= {
            "video": text.id("video_token"),
            "start": text.id("vision_bos_token"),
            "end": text.id("vision_eos_token"),
        }
    return ids


def placed(planned: Plan, encoder: Encoder, projector: dict[str, Piece], language: Language) -> dict[str, Piece]:
    """All tensors of a VLM under module paths, in order of its parts.

    Raises:
        AssertionError: what is placed is not what the configuration asks for.
    """
    family = family_of(planned.config)
    tower, text, head = family.vision[0], family.language[0], family.head[0]
    layers = encoder.pieces | norm_pieces(encoder, next(iter(encoder.pieces.values())).dtype)
    own = planned.config.vision_config
    known = [set(s) for s in spellings(own, without="merger." if family.name == "qwen2_5_vl" else None)]
    if set(layers) not in known:
        odd = sorted(min((set(layers) ^ names for names in known), key=len))
        raise AssertionError(f"tower and configuration disagree: {odd[:5]}")
    pieces = {f"{tower}.{name}": piece for name, piece in layers.items()}
    pieces |= {f"{projector_path(family)}.{name}": piece for name, piece in projector.items()}
    pieces |= {f"{text}.{name}": piece for name, piece in language.pieces.items()}
    if language.head is not None:
        pieces[f"{head}.weight"] = language.head
    for name, piece in pieces.items():
        if name in planned.shapes and planned.shapes[name] != piece.shape:
            raise AssertionError(f"{name} is {piece.shape}, the configuration asks for {planned.shapes[name]}")
    return pieces


def write_vlm(
    out: Path,
    planned: Plan,
    pieces: dict[str, Piece],
    *,
    save_text: Callable[[Path], None],
    generation: GenerationConfig,
    provenance: dict[str, Any],
    dtype: torch.dtype | None,
    weights_dtype: torch.dtype,
    max_shard_size: int,
) -> Path:
    """Write a VLM directory, whole or not at all.

    Args:
        out: directory to make.
        planned: configuration and processor.
        pieces: all tensors by module path.
        save_text: writes tokenizer and chat template into a directory.
        generation: the LLM's generation settings; EOS and padding are bound to the processor's.
        provenance: what came from where.
        dtype: of the written tensors; each as it is by default.
        weights_dtype: what config.json calls the dtype of the whole.
        max_shard_size: bytes of one weight file.

    Raises:
        ValueError: no room on the disk, or a processor that cannot be loaded again.
        OSError: writing failed; nothing is left behind.
    """
    config = planned.config
    # One dtype for all in memory: a tower and a projector of different ones cannot be joined by the VLM classes.
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype or weights_dtype

    def save(folder: Path) -> None:
        save_text(folder)
        for file, values in (("preprocessor_config", planned.images), ("processor_config", planned.processor)):
            (folder / f"{file}.json").write_text(json.dumps(values, indent=2) + "\n")
        processor = load_processor(Backbone(path=str(folder)))
        if processor.image_token_id != config.image_token_id:
            raise AssertionError(f"placeholder {processor.image_token_id}, config {config.image_token_id}")
        if not cuts_alike(processor.tokenizer, load_tokenizer(folder)):
            raise ValueError(
                f"transformers reads the tokenizer of {out} as a {type(processor.tokenizer).__name__}, "
                "which cuts text otherwise than its tokenizer.json: give a directory of the language model's own files"
            )
        before = generation.eos_token_id
        before = set(before if isinstance(before, list) else [] if before is None else [before])
        generation.eos_token_id = sorted(before | processor.eos_ids)
        generation.pad_token_id = config.pad_token_id
        generation.save_pretrained(folder)

    pieces = {name: piece.to(dtype) for name, piece in pieces.items()}
    return write_directory(out, config, pieces, save=save, provenance=provenance, max_shard_size=max_shard_size)


def write_directory(
    out: Path,
    config: PreTrainedConfig,
    pieces: dict[str, Piece],
    *,
    save: Callable[[Path], None],
    provenance: dict[str, Any],
    max_shard_size: int,
) -> Path:
    """Write a model directory, whole or not at all.

    Args:
        out: directory to make. config: of the model. pieces: its tensors under the names they are stored by.
        save: writes everything else into a directory; `provenance` is read after it.
        provenance: of `origin`; the hash of the weights is added.
        max_shard_size: bytes of one weight file.

    Raises:
        ValueError: no room on the disk, or what `save` refuses.
        OSError: writing failed; nothing is left behind.
    """
    check_space(out, pieces)
    with whole_directory(out) as temporary:
        config.save_pretrained(temporary)
        save(temporary)
        write_weights(pieces, temporary, max_shard_size=max_shard_size)
        facts = {**provenance, "hash": weights_hash(temporary)}
        (temporary / PROVENANCE_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return out


def origin(command: str, parent: Path, parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The content of provenance.json: the parts' directories with their hashes, and how they were joined.

    Args:
        command: what made it.
        parent: the model it is nearest to: the VLM that was changed, or the LLM.
        parts: {part: its directory, or a fact about it}.
        more: further facts.
    """
    hashed = {part: parent_of(str(where)) if isinstance(where, Path) else where for part, where in parts.items()}
    return make_provenance(str(parent), step=0, made_by=command, parts=hashed, **more)
