"""Reading labels off image patches with linear heads; the embedded world's visual warm-up. Ours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_vlm.losses.terms import Term


def patch_labels(logits: Sequence[Tensor], labels: Tensor) -> tuple[dict[str, Term], dict[str, Tensor]]:
    """Cross-entropy of every label of every patch.

    Args:
        logits: per label kind, [P, classes of the kind].
        labels: [P, kinds] int64.

    Returns:
        {"patches": Term(Σ cross-entropy, nats)}, whose count is P × kinds; and per kind "correct_i" the number of
        right answers.
    """
    losses = [F.cross_entropy(z.float(), labels[:, i], reduction="sum") for i, z in enumerate(logits)]
    right = {f"correct_{i}": (z.argmax(-1) == labels[:, i]).sum() for i, z in enumerate(logits)}
    return {"patches": Term(sum(losses))}, right
