"""Cutting one optimizer step into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlm.models.batch import Row

Item = list[Row]


def micro_batches(items: Sequence[Item], budget: int) -> list[list[Item]]:
    """Cut items into micro-batches of at most `budget` padded tokens (rows × longest row), lengths near each other.

    Items that show the same images stay side by side, so that an image is encoded once where the budget allows it. An
    item longer than the budget stands alone. Which micro-batch an item lands in never changes the gradient.

    Args:
        items: units that must not be split.
        budget: padded tokens of one micro-batch.

    Raises:
        ValueError: a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"model.micro_batch_tokens must be at least 1, got {budget}")
    groups: dict[tuple[str, ...], list[Item]] = {}
    for index, item in enumerate(items):
        images = tuple(image.key for row in item for image in row.images)
        groups.setdefault(images or (f"#{index}",), []).append(item)
    ordered = sorted(groups.values(), key=lambda group: -max(_longest(item) for item in group))
    out: list[list[Item]] = []
    rows = longest = 0
    for item in (item for group in ordered for item in group):
        width = max(longest, _longest(item))
        if out and (rows + len(item)) * width <= budget:
            out[-1].append(item)
            rows, longest = rows + len(item), width
        else:
            out.append([item])
            rows, longest = len(item), _longest(item)
    return out


def _longest(item: Item) -> int:
    return max(len(row) for row in item)
