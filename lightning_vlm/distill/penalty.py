"""From scores of a sample to the repetition penalty under which its chain is written.

The more a sample asks for (a clear and needed picture, a hard question, reasoning, both sources at once), the smaller
the penalty and the longer the chain may be (Skywork R1V, adaptive-length chain-of-thought distillation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = math.log(2)  # ours: P then fills [1, 2] exactly


@dataclass(frozen=True)
class Weights:
    """What the scores are worth.

    Args:
        alpha: steepness; ln 2 makes P run from 1 to 2.
        beta: weight of the text score, gamma: of the integration score; the vision score's is 1.

    Raises:
        ValueError: a value that is negative or not finite.
    """

    alpha: float = ALPHA
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")


def penalty(vision: float, text: float, integration: float, weights: Weights = Weights()) -> float:
    """P = min(2, exp(α (1 − (S_v + β S_t + γ S_I) / (1 + β + γ)))), in [1, 2].

    Source: Skywork R1V, adaptive-length chain-of-thought distillation; α = ln 2 is ours.

    Args:
        vision: S_v. text: S_t. integration: S_I; each in [0, 1].
        weights: α, β, γ.

    Raises:
        ValueError: a score outside [0, 1].
    """
    for name, score in (("vision", vision), ("text", text), ("integration", integration)):
        if not 0 <= score <= 1:
            raise ValueError(f"the {name} score must lie in [0, 1], got {score}: bring it there by min_max")
    share = (vision + weights.beta * text + weights.gamma * integration) / (1 + weights.beta + weights.gamma)
    return min(2.0, math.exp(weights.alpha * (1 - share)))


def min_max(values: Sequence[float]) -> list[float]:
    """(x − min) / (max − min) over a data set; a column without differences becomes .5.

    Such a column says nothing of any sample. Half, and not 0 or 1, keeps it from moving all penalties to one end.

    Raises:
        ValueError: a value that is not finite.
    """
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"scores must be finite, got {value}")
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return [0.5] * len(values)
    return [(value - low) / (high - low) for value in values]
