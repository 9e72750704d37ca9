"""A VLM directory taken apart: tower, projector, language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from lightning_vlm.compose.encoder import MERGER, Encoder, make_encoder, read_images
from lightning_vlm.compose.language import Language, find_language
from lightning_vlm.compose.shells import load_config, model_directory, spellings, under, vlm_shapes
from lightning_vlm.compose.weights import Piece, check_whole, find_part, read_weights
from lightning_vlm.models.families import Family, family_of

FORMS = ("llava", "internvl", "qwen2_5_vl")


@dataclass
class Vlm:
    """A vision-language model.

    Attributes:
        path: its directory.
        config: of the whole.
        family: its row of the family table.
        encoder: the tower, without a projector that lives inside it.
        projector: tensors by the names they have within the projector.
        language: the LLM.
    """

    path: Path
    config: PreTrainedConfig
    family: Family
    encoder: Encoder
    projector: dict[str, Piece]
    language: Language

    @property
    def reads(self) -> tuple[int, str]:
        """Feature layer and selection strategy."""
        if self.family.name == "qwen2_5_vl":
            return self.encoder.custom.layer, self.encoder.custom.select
        return self.config.vision_feature_layer, self.config.vision_feature_select_strategy


def read_vlm(path: str | Path, *, role: str = "VLM") -> Vlm:
    """The parts of a VLM directory.

    Args:
        path: a directory in LLaVA, InternVL or Qwen2.5-VL form.
        role: the argument's name, for errors.

    Raises:
        ValueError: another model, missing or odd tensors.
    """
    directory, raw = model_directory(path, role)
    if raw["model_type"] not in FORMS:
        raise ValueError(
            f"{role} {directory} has model_type {raw['model_type']!r}; VLMs are taken apart in these forms: "
            f"{', '.join(FORMS)}"
        )
    config = load_config(directory)
    if not isinstance(getattr(config, "vision_feature_layer", -1), int):
        raise ValueError(
            f"{role} {directory} reads several feature layers {list(config.vision_feature_layer)}; "
            "parts are joined at one"
        )
    family, weights = family_of(config), read_weights(directory)
    tower = find_part(
        weights,
        spellings(config.vision_config, without=MERGER if family.name == "qwen2_5_vl" else None),
        f"{config.vision_config.model_type} tower",
    )
    check_whole(tower, directory, "vision tower")
    shapes, _ = vlm_shapes(config)
    place = projector_path(family)
    last = place.rpartition(".")[2]
    named = {f"{last}.{name}": shape for name, shape in under(shapes, place).items()}
    projector = find_part(weights, [named], "projector")
    check_whole(projector, directory, "projector")
    tied = bool(getattr(config, "tie_word_embeddings", False))
    language, names = find_language(weights, config.text_config, tied=tied)
    if odd := weights.unclaimed([*tower.names, *projector.names, *names]):
        raise ValueError(f"{directory} holds {len(odd)} tensors of no part ({', '.join(odd[:3])})")
    encoder = make_encoder(directory, config.vision_config, tower, read_images(directory), None)
    pieces = {name.removeprefix(f"{last}."): piece for name, piece in projector.pieces.items()}
    vlm = Vlm(directory, config, family, encoder, pieces, language)
    encoder.reads = vlm.reads
    return vlm


def projector_path(family: Family) -> str:
    """Module path of the projector."""
    return family.projector[0]


def projector_out(pieces: dict[str, Piece]) -> int:
    """The width that a projector writes: the rows of its last matrix."""
    matrices = [name for name, piece in pieces.items() if len(piece.shape) == 2]
    return pieces[max(matrices)].shape[0]
