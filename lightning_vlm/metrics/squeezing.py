"""The squeezing effect in one softmax: who gains and who loses when a token is pushed down.

One unlikelihood step on token y is gradient descent on +log π_y with respect to the logits z. With
∂ log π_k / ∂z_j = 1[k=j] − π_j, the step of size η moves the logits by

    dz_k/dη = −∂ log π_y / ∂z_k = π_k − 1[k=y],

and a log-probability by its own logit less the mean movement under π:

    d log π_k/dη = dz_k/dη − Σ_j π_j dz_j/dη = π_k − 1[k=y] − (‖π‖² − π_y) = π_k − ‖π‖² + π_y − 1[k=y].

So every token but y falls exactly where π_k < ‖π‖² − π_y, and rises above it. Where y has little mass the bound is
about ‖π‖²: nearly everything falls, and the mass goes to the most likely token. Where y is that token, π_y ≥ ‖π‖² and
all others rise. y always falls: its rate is −(1 − π_y)² − Σ_{j≠y} π_j². The effect is Ren & Sutherland's (Learning
Dynamics of LLM Finetuning); this closed form is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_TOLERANCE = 1e-3  # of a sum of probabilities: rounding of low precision passes, logits do not


def unlikelihood_rates(probs: Tensor, labels: Tensor) -> Tensor:
    """d log π_k / dη of an unlikelihood step of size η on the logits, at η = 0.

    Args:
        probs: [..., V] probabilities π, each row summing to 1.
        labels: [...] int64, the token y that each row's step pushes down.

    Returns:
        [..., V] nats per unit of η. Weighted by π they sum to 0: mass is moved, not made.

    Raises:
        ValueError: shapes that do not fit, labels outside the vocabulary, or rows that are no probabilities.
    """
    _check(probs, labels)
    chosen = one_hot(labels, probs.shape[-1]).to(probs.dtype)
    return probs - _bound(probs, labels) - chosen


def falling(probs: Tensor, labels: Tensor) -> Tensor:
    """Which tokens lose probability in an unlikelihood step on `labels`: π_k < ‖π‖² − π_y, and y itself.

    Args:
        probs: [..., V] probabilities. labels: [...] int64.

    Returns:
        [..., V] bool. A token exactly at the bound neither falls nor rises, nor does a y that has all the mass.

    Raises:
        ValueError: as `unlikelihood_rates`.
    """
    _check(probs, labels)
    chosen = one_hot(labels, probs.shape[-1]).bool()
    return torch.where(chosen, probs < 1, probs < _bound(probs, labels))


def _bound(probs: Tensor, labels: Tensor) -> Tensor:
    """[..., 1] ‖π‖² − π_y."""
    return probs.square().sum(-1, keepdim=True) - probs.gather(-1, labels[..., None])


def _check(probs: Tensor, labels: Tensor) -> None:
    if probs.ndim < 1 or probs.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected probs [..., V] and labels [...]; got {tuple(probs.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < probs.shape[-1]:
        raise ValueError(f"labels must lie in [0, {probs.shape[-1]}), got {int(labels.min())} to {int(labels.max())}")
    sums = probs.sum(-1)
    wrong = ~((sums - 1).abs() <= _TOLERANCE) | ~(probs >= 0).all(-1)  # NaN, too
    if wrong.any():
        raise ValueError(
            f"a row of probs is no probability vector (its sum is {float(sums[wrong].flatten()[0]):g}): "
            "give probabilities, such as logits.softmax(-1)"
        )
