"""Cutting one optimizer step into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlm.models.batch import Row
from lightning_vlm.models.packing import laid_out

Item = list[Row]


def micro_batches(items: Sequence[Item], budget: int, *, share_prompts: bool = False) -> list[list[Item]]:
    """Cut items into micro-batches of at most `budget` padded tokens (rows × longest row), lengths near each other.

    Items that show the same images stay side by side, so that an image is encoded once where the budget allows it. An
    item longer than the budget stands alone. Which micro-batch an item lands in never changes the gradient.

    Args:
        items: units that must not be split.
        budget: padded tokens of one micro-batch.
        share_prompts: count rows of one prompt as the one physical row they are laid out in.

    Raises:
        ValueError: a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"model.micro_batch_tokens must be at least 1, got {budget}")
    groups: dict[tuple[str, ...], list[tuple[Item, list[int]]]] = {}
    for index, item in enumerate(items):
        images = tuple(image.key for row in item for image in row.images)
        lengths = [len(row) for row in laid_out(item, share_prompts)]
        groups.setdefault(images or (f"#{index}",), []).append((item, lengths))
    ordered = sorted(groups.values(), key=lambda group: -max(max(lengths) for _, lengths in group))
    out: list[list[Item]] = []
    rows = longest = 0
    for item, lengths in (entry for group in ordered for entry in group):
        width = max(longest, *lengths)
        if out and (rows + len(lengths)) * width <= budget:
            out[-1].append(item)
            rows, longest = rows + len(lengths), width
        else:
            out.append([item])
            rows, longest = len(lengths), max(lengths)
    return out
