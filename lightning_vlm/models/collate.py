"""Rows → one padded batch whose distinct images are merged once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .batch import ImageInput, ModelBatch, Row
from .families import Family


def collate(
    rows: Sequence[Row],
    family: Family,
    pad_id: int,
    *,
    side: Literal["right", "left"] = "right",
    share_images: bool = True,
) -> ModelBatch:
    """Pads rows to the longest and merges their images.

    Args:
        rows: at least one row, each with at least one token.
        family: says how image tensors are merged.
        pad_id: id written into the padding.
        side: where the padding goes; `left` for generation.
        share_images: images with equal keys are merged, and so encoded, once; False keeps every occurrence.

    Returns:
        The batch on the CPU. A row's first token is never scored: nothing predicts it.

    Raises:
        ValueError: no rows, an empty row, or images of one batch that the family cannot merge.
    """
    if not rows:
        raise ValueError("cannot collate an empty list of rows")
    if empty := [row.id for row in rows if not len(row)]:
        raise ValueError(f"rows without tokens: {', '.join(empty[:5])}")
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    loss_mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else length - len(row)
        where = slice(start, start + len(row))
        input_ids[i, where] = row.input_ids
        attention_mask[i, where] = 1
        loss_mask[i, where] = row.loss_mask
        loss_mask[i, start] = False

    distinct: list[ImageInput] = []
    index: list[int] = []
    seen: dict[str, int] = {}
    for image in (image for row in rows for image in row.images):
        if share_images and image.key in seen:
            index.append(seen[image.key])
            continue
        seen[image.key] = len(distinct)
        index.append(len(distinct))
        distinct.append(image)
    return ModelBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        pixels=family.merge(distinct) if distinct else {},
        image_index=torch.tensor(index, dtype=torch.long),
        image_tokens=[image.tokens for image in distinct],
        rows=list(rows),
    )
