"""The data that flows into a model: images, rows, padded batches.

Shape suffixes: B physical rows, T padded length, R rows, N scored tokens, L a row's own length, I distinct images,
O image occurrences.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch


@dataclass(slots=True)
class ImageInput:
    """One image as its processor made it.

    Attributes:
        key: hash of the processed tensors; equal keys mean equal pixels, and are encoded once.
        tensors: the image processor's outputs for this image alone, leading dimension kept
            (Qwen2.5-VL: `pixel_values` [patches, dim], `image_grid_thw` [1, 3]; LLaVA: `pixel_values` [1, 3, H, W]).
        tokens: how many placeholder ids (`image_token_id`) this image fills in the row.
    """

    key: str
    tensors: dict[str, torch.Tensor]
    tokens: int


@dataclass(slots=True)
class Row:
    """One token sequence with the images it shows.

    Attributes:
        id: the sample's id.
        input_ids: [L] int64, placeholders already expanded.
        loss_mask: [L] bool, True on tokens that are scored (assistant text and its end of turn).
        images: in the order of their placeholders.
        name: which text of the sample this is (`chosen`, `rejected`, `completion`).
        info: anything an algorithm, callback or report needs (gold answer, prompt text, family, ...).
    """

    id: str
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    images: list[ImageInput] = field(default_factory=list)
    name: str = "chosen"
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def scored(self) -> int:
        """Number of tokens that are scored (the first token has no prediction and is never counted)."""
        return int(self.loss_mask[1:].sum())


@dataclass(slots=True)
class ModelBatch:
    """Rows laid out for a forward, images merged; what `Policy.forward` takes.

    R rows stand in B physical rows: each alone, or several behind one prompt (`packing.Pack`).

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 0 on padding.
        predictors: [N] int64, flat places b·T + t whose hidden states predict the scored tokens, by row.
        labels: [N] int64, ids of the scored tokens.
        row_index: [N] int64, row of each scored token, an index into `rows`.
        pixels: merged tensors of the I distinct images, as the family's forward takes them; empty without images.
        image_index: [O] int64, for each placeholder run in row-major order the distinct image it shows.
        image_tokens: length-I list, placeholder ids of each distinct image.
        rows: the R rows themselves, for ids and info.
        image_keys: length-I list, `ImageInput.key` of each distinct image.
        expected: length-B list, placeholder ids that each physical row must have.
        segments: [B, T] int64, 0 on a prompt, k on its k-th continuation, −1 on padding; None where none is shared.
        shifts: [B, T] int64, how far a token stands behind its place in its own row; None likewise.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predictors: torch.Tensor
    labels: torch.Tensor
    row_index: torch.Tensor
    pixels: dict[str, torch.Tensor]
    image_index: torch.Tensor
    image_tokens: list[int]
    image_keys: list[str]
    rows: list[Row]
    expected: list[int]
    segments: torch.Tensor | None = None
    shifts: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> ModelBatch:
        """The same batch on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return ModelBatch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})
