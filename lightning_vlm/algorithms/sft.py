"""Supervised fine-tuning."""

from __future__ import annotations

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.totals import Micro
from lightning_vlm.losses.sft import sft
from lightning_vlm.models.batch import ModelBatch


class SFT(Algorithm):
    """Token-mean negative log-likelihood of every assistant turn and its end of turn.

    −Σ log π(y_t) / (number of response tokens of the optimizer step).
    """

    def losses(self, batch: ModelBatch) -> Micro:
        """Loss of one micro-batch, and how often the most likely token is the right one."""
        scores = self.policy.score(batch)
        right = (scores.top_ids == batch.labels).sum()
        return Micro(sft(scores.logprobs), {"token_accuracy": (right, len(scores.top_ids))}, scores)

    def counts(self, items: list[Item]) -> dict[str, float]:
        """Scored tokens."""
        return {"nll": float(sum(row.scored for item in items for row in item))}
