"""Rows → one padded batch whose distinct images are merged once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .batch import ImageInput, ModelBatch, Row
from .families import Family
from .packing import PADDING, Pack, alone


def collate(
    rows: Sequence[Row | Pack],
    family: Family,
    pad_id: int,
    *,
    side: Literal["right", "left"] = "right",
    share_images: bool = True,
) -> ModelBatch:
    """Pads rows to the longest and merges their images.

    Args:
        rows: at least one; a row stands alone, a pack of rows shares its prompt.
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
    physical = [alone(row) if isinstance(row, Row) else row for row in rows]
    if empty := [row.id for pack in physical for row in pack.rows if not len(row)]:
        raise ValueError(f"rows without tokens: {', '.join(empty[:5])}")
    length = max(len(pack) for pack in physical)
    shape = (len(physical), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    shared = any(len(pack.rows) > 1 for pack in physical)
    segments = torch.full(shape, PADDING, dtype=torch.long) if shared else None
    shifts = torch.zeros(shape, dtype=torch.long) if shared else None
    predictors, labels = [], []
    for i, pack in enumerate(physical):
        start = 0 if side == "right" else length - len(pack)
        where = slice(start, start + len(pack))
        input_ids[i, where] = pack.input_ids()
        attention_mask[i, where] = 1
        if shared:
            segments[i, where] = pack.segments()
            shifts[i, where] = pack.shifts()
        places, ids = pack.scored()
        predictors += [i * length + start + place for place in places]
        labels += ids

    distinct: list[ImageInput] = []
    index: list[int] = []
    seen: dict[str, int] = {}
    for image in (image for pack in physical for image in pack.rows[0].images):
        if share_images and image.key in seen:
            index.append(seen[image.key])
            continue
        seen[image.key] = len(distinct)
        index.append(len(distinct))
        distinct.append(image)
    return ModelBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        predictors=torch.cat(predictors),
        labels=torch.cat(labels),
        row_index=torch.arange(len(labels)).repeat_interleave(torch.tensor([len(ids) for ids in labels])),
        pixels=family.merge(distinct) if distinct else {},
        image_index=torch.tensor(index, dtype=torch.long),
        image_tokens=[image.tokens for image in distinct],
        image_keys=[image.key for image in distinct],
        rows=[row for pack in physical for row in pack.rows],
        expected=[sum(image.tokens for image in pack.rows[0].images) for pack in physical],
        segments=segments,
        shifts=shifts,
    )
