"""Supervised fine-tuning: −Σ log π(y_t) over the response tokens."""

from __future__ import annotations

from torch import Tensor

from lightning_vlm.losses.terms import Term


def sft(logprobs: Tensor) -> dict[str, Term]:
    """Negative log-likelihood, one unit per scored token.

    Args:
        logprobs: [N] log π of the scored tokens, nats.

    Returns:
        {"nll": Term(−Σ logprobs)}; its count is the number of scored tokens of the step.
    """
    return {"nll": Term(-logprobs.sum())}
