"""Visual warm-up: vision and projector learn to say what stands in each patch, before any language is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.totals import Micro
from lightning_vlm.data.world.scene import LABEL_CLASSES
from lightning_vlm.losses.patches import patch_labels
from lightning_vlm.models.batch import ModelBatch
from lightning_vlm.models.parts import part_parameters


class VisualWarmup(Algorithm):
    """Linear heads on the projected patch tokens predict each patch's labels; the heads are dropped afterwards.

    A tower with random weights learns little through a random language model; this gives it something to say first. The
    samples carry `patch_labels` ([image tokens, kinds] class ids) in their `info`, as the embedded world's do. Ours.

    Args:
        classes: number of classes of each label kind; by default the embedded world's (colour, shape, two digits, bar).
        **kwargs: see `Algorithm`.
    """

    def __init__(self, *, classes: tuple[int, ...] = LABEL_CLASSES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes

    def extend_policy(self) -> None:
        """One linear head per label kind, in the policy so that it is sharded with it; no language is learned."""
        for part in ("language", "head"):
            if part in self.parts and not self.parts[part].freeze:
                raise ValueError(f"VisualWarmup never runs the language model: set parts.{part}.freeze or leave it out")
            for _, p in part_parameters(self.policy.model, self.policy.family).get(part, []):
                p.requires_grad_(False)
        width = self.policy.model.config.get_text_config().hidden_size
        dtype = self.policy.head.weight.dtype
        generator = torch.Generator().manual_seed(self.seed)
        self.policy.heads = nn.ModuleList(nn.Linear(width, n, dtype=dtype) for n in self.classes)
        for head in self.policy.heads:
            nn.init.normal_(head.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(head.bias)

    def losses(self, batch: ModelBatch) -> Micro:
        """Cross-entropy of the labels of every image shown, and the share of right ones."""
        logits = self.policy(batch, patch_heads=True)
        known = [torch.as_tensor(row.info["patch_labels"]) for row in batch.rows if "patch_labels" in row.info]
        labels = torch.cat([torch.zeros(0, len(self.classes), dtype=torch.uint8), *known]).long().to(self.device)
        # A row that only keeps ranks in step stands last and has no labels.
        terms, right = patch_labels([z[: len(labels)] for z in logits], labels)
        return Micro(terms, {name: (count, float(len(labels))) for name, count in right.items()}, None)

    def counts(self, items: list[Item]) -> dict[str, float]:
        """Labels: patches × kinds."""
        rows = [row for item in items for row in item]
        for row in rows:
            labels = row.info.get("patch_labels")
            expected = (sum(image.tokens for image in row.images), len(self.classes))
            if labels is None or tuple(labels.shape) != expected:
                shape = None if labels is None else tuple(labels.shape)
                raise ValueError(
                    f"sample {row.id}: VisualWarmup needs info['patch_labels'] of shape {expected}, got {shape}; "
                    "train it on the embedded world, or on data that label their patches"
                )
        patches = sum(image.tokens for row in rows for image in row.images)
        return {"patches": float(patches * len(self.classes))}
