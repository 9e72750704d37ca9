"""Does confidence mean what it says? Expected calibration error and the reliability curve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability curve over equal bins of confidence; bins without an answer are left out.

    Attributes:
        confidence: [M] mean confidence of each bin.
        accuracy: [M] share of right answers of each bin.
        count: [M] answers in each bin.
        error: expected calibration error, Σ count/N · |accuracy − confidence| (Guo et al. 2017, eq. 3).
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    error: float


def reliability(confidences: Tensor, correct: Tensor, bins: int = BINS) -> Reliability:
    """The reliability curve and its expected calibration error.

    Args:
        confidences: [N] probabilities in [0, 1]: of the top token, or of an answer.
        correct: [N] 1 where the token or answer is right, else 0.
        bins: equal bins over [0, 1]; bin i holds confidences in (i/bins, (i+1)/bins], the first one 0 too.

    Raises:
        ValueError: nothing to judge, lengths that differ, NaN, or values outside [0, 1].
    """
    confidences, correct = confidences.detach().double().flatten().cpu(), correct.detach().double().flatten().cpu()
    if len(confidences) == 0 or len(confidences) != len(correct):
        raise ValueError(f"calibration needs one verdict per confidence, got {len(confidences)} and {len(correct)}")
    for name, values in (("confidences", confidences), ("verdicts", correct)):
        outside = ~((values >= 0) & (values <= 1))  # NaN, too
        if outside.any():
            raise ValueError(f"calibration: {name} must lie in [0, 1], got {values[outside][0]}")
    index = torch.bucketize(confidences, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    count = torch.bincount(index, minlength=bins)
    filled = count > 0
    count = count[filled].double()
    mean_confidence = torch.bincount(index, confidences, bins)[filled] / count
    accuracy = torch.bincount(index, correct, bins)[filled] / count
    error = float((count / count.sum() * (accuracy - mean_confidence).abs()).sum())
    return Reliability(mean_confidence, accuracy, count.long(), error)
