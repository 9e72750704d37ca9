"""Rows that continue one prompt, laid out in one physical row, so that prompt and images are computed once.

    [prompt][continuation 1][continuation 2] …

Each continuation attends to the prompt and to itself, and its positions go on where the prompt ends; so every token
sees exactly what it sees when its row stands alone, and gradients are exact. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Row

PROMPT, PADDING = 0, -1  # segments of a physical row; continuations are numbered from 1


@dataclass(slots=True, frozen=True)
class Pack:
    """Rows with their common beginning.

    Attributes:
        rows: at least one; all show the same images.
        prefix: leading tokens that all rows share and none is scored on, except by predicting what comes next.
    """

    rows: list[Row]
    prefix: int

    def __len__(self) -> int:
        """Tokens of the physical row."""
        return self.prefix + sum(len(row) - self.prefix for row in self.rows)

    def starts(self) -> list[int]:
        """Where each continuation begins in the physical row."""
        starts, at = [], self.prefix
        for row in self.rows:
            starts.append(at)
            at += len(row) - self.prefix
        return starts

    def input_ids(self) -> Tensor:
        """[L] ids of the physical row."""
        first, *others = self.rows
        return torch.cat([first.input_ids, *(row.input_ids[self.prefix :] for row in others)])

    def segments(self) -> Tensor:
        """[L] 0 on the prompt, k on the k-th continuation."""
        lengths = [self.prefix, *(len(row) - self.prefix for row in self.rows)]
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def shifts(self) -> Tensor:
        """[L] how far each token stands behind the place it has in its own row."""
        moved = torch.tensor([0, *(start - self.prefix for start in self.starts())])
        return moved[self.segments()]

    def scored(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per row, of its scored tokens: places in the physical row that predict them, and their ids."""
        places, labels = [], []
        for row, start in zip(self.rows, self.starts(), strict=True):
            mask = row.loss_mask.clone()
            mask[0] = False  # nothing predicts a first token
            tokens = mask.nonzero()[:, 0]
            before = tokens - 1
            places.append(torch.where(before < self.prefix, before, before + (start - self.prefix)))
            labels.append(row.input_ids[tokens])
        return places, labels


def alone(row: Row) -> Pack:
    """A row by itself."""
    return Pack([row], len(row))


def packs(rows: Sequence[Row]) -> list[Pack]:
    """Rows in order, neighbours of one prompt packed together.

    Two rows have one prompt if they agree in all tokens before the first that either is scored on, and in their images.
    """
    out: list[list[Row]] = []
    for row in rows:
        if out and _same_prompt(out[-1][0], row):
            out[-1].append(row)
        else:
            out.append([row])
    return [Pack(group, _first_scored(group[0])) if len(group) > 1 else alone(group[0]) for group in out]


def laid_out(rows: Sequence[Row], share_prompts: bool) -> Sequence[Row | Pack]:
    """Physical rows: one per prompt where prompts are shared, else each row by itself."""
    return packs(rows) if share_prompts else rows


def _first_scored(row: Row) -> int:
    return int(row.loss_mask.int().argmax()) if bool(row.loss_mask.any()) else len(row)


def _same_prompt(one: Row, other: Row) -> bool:
    prefix = _first_scored(one)
    return (
        0 < prefix == _first_scored(other) < min(len(one), len(other))
        and [image.key for image in one.images] == [image.key for image in other.images]
        and torch.equal(one.input_ids[:prefix], other.input_ids[:prefix])
    )
