"""Summary of token entropies."""

from __future__ import annotations

import torch

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.50, "p75": 0.75, "p95": 0.95}


def entropy_summary(entropies: torch.Tensor) -> dict[str, float]:
    """Mean and quantiles of per-token entropies.

    Args:
        entropies: [N] nats, one per scored token.

    Returns:
        `{"mean": …, "p05": …, …, "p95": …}` in nats; quantiles interpolate linearly between order statistics.

    Raises:
        ValueError: no tokens.
    """
    values = entropies.detach().flatten().double().cpu()
    if values.numel() == 0:
        raise ValueError("entropy_summary got no tokens; a step without scored tokens has no entropy")
    ordered = values.sort().values
    # torch.quantile refuses more than 2^24 values, a long rollout has more.
    summary = {"mean": float(values.mean())}
    for name, q in QUANTILES.items():
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        summary[name] = float(torch.lerp(ordered[low], ordered[high], position - low))
    return summary
