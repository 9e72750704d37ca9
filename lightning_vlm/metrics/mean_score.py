"""Mean of per-sample scores that is right under several ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class MeanScore(Metric):
    """Mean score over distinct samples.

    Distributed samplers repeat samples so that all ranks have equally many; a plain mean of sums counts those twice.
    Here every score carries its sample's id, and after the gather each id counts once. `compute` is NaN when nothing
    was scored.

    Example:
        >>> mean = MeanScore()
        >>> mean.update(["a", "b", "b"], [1.0, 0.0, 0.0])
        >>> mean.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, ids: Sequence[str], scores: Sequence[float] | torch.Tensor) -> None:
        """Adds scores.

        Args:
            ids: one per score; for several draws of one sample make them distinct (`f"{id}#{draw}"`).
            scores: [N] fractions.

        Raises:
            ValueError: lengths differ.
        """
        scores = torch.as_tensor(scores, dtype=torch.float64, device=self.device).flatten()
        if len(ids) != len(scores):
            raise ValueError(f"MeanScore got {len(ids)} ids and {len(scores)} scores; one score per id is needed")
        self.keys.append(torch.tensor([_key(i) for i in ids], dtype=torch.int64, device=self.device))
        self.scores.append(scores)

    def sync(self, *args, **kwargs) -> None:
        """Gathers over ranks; a rank without scores takes part with empty tensors of the right types."""
        if not self.keys:
            self.update([], [])
        super().sync(*args, **kwargs)

    def compute(self) -> torch.Tensor:
        """Mean over distinct ids, float64 scalar."""
        if len(self.keys) == 0:
            return torch.tensor(float("nan"), dtype=torch.float64)
        keys, scores = dim_zero_cat(self.keys), dim_zero_cat(self.scores)
        _, index = torch.unique(keys, return_inverse=True)
        first = torch.full((int(index.max()) + 1 if len(index) else 0,), len(keys), device=keys.device)
        first = first.scatter_reduce(0, index, torch.arange(len(keys), device=keys.device), reduce="amin")
        return scores[first].mean()


def _key(id: str) -> int:
    """64-bit hash of an id, the same in every process."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)
