"""Constrained supervised fine-tuning (SFT-C), stage 1 of CW-DPO (Learning Dynamics of VLM Finetuning, 2510.11978).

The paper prints L = E[NLL(y⁺)] + λ·ReLU(C − E_batch[NLL(y⁻)]), a penalty while negatives are too likely (`constraint`);
its prose describes gentle supervision on them instead (`smooth`). Token means over the optimizer step, and the defaults
of C, λ and ε, are ours.
"""

from __future__ import annotations

from torch import Tensor

from lightning_vlm.losses.terms import Term


def awake(negative_nll: float, threshold: float) -> bool:
    """Whether the constraint acts: the negatives' mean NLL, nats per token over the step, is below the threshold C."""
    return negative_nll < threshold


def constraint(negative_logprobs: Tensor, *, weight: float) -> dict[str, Term]:
    """The penalty's gradient while it acts: −λ·NLL(y⁻), that is λ·Σ log π(y⁻) over the negatives' tokens.

    Args:
        negative_logprobs: [N] log π of the negatives' tokens, nats.
        weight: λ.

    Returns:
        {"constraint": Term}; its count is the negatives' tokens of the step. The constant λ·C is left out.
    """
    return {"constraint": Term(negative_logprobs.sum(), weight)}


def smooth(
    negative_logprobs: Tensor, uniform_logprobs: Tensor | None, *, weight: float, label_smoothing: float = 0.0
) -> dict[str, Term]:
    """Gentle supervision on negatives: ε·NLL(y⁻), its labels smoothed towards the uniform distribution if asked.

    Args:
        negative_logprobs: [N] log π of the negatives' tokens, nats.
        uniform_logprobs: [N] mean of log π over the vocabulary at the same places; needed for label smoothing only.
        weight: ε.
        label_smoothing: share α of the uniform distribution in the target: (1 − α)·NLL − α·mean_v log π_v.

    Returns:
        {"smooth": Term}; its count is the negatives' tokens of the step.
    """
    loss = -(1 - label_smoothing) * negative_logprobs.sum()
    if label_smoothing:
        loss = loss - label_smoothing * uniform_logprobs.sum()
    return {"smooth": Term(loss, weight)}
