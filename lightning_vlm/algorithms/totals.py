"""What one optimizer step adds up to."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vlm.losses.terms import Term
from lightning_vlm.models.batch import ModelBatch
from lightning_vlm.models.policy import Scores
from lightning_vlm.strategies.sync import sum_over_ranks


def peak_memory(device: torch.device) -> float:
    """Highest memory so far, GiB: of the device that is trained on, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Micro(NamedTuple):
    """What a subclass returns for one micro-batch.

    Attributes:
        terms: summed loss terms with gradient.
        metrics: name → (sum, count) to be averaged over the step, without gradient.
        scores: the scored tokens, for monitors; None where no token is scored.
    """

    terms: dict[str, Term]
    metrics: dict[str, tuple[Tensor, float]]
    scores: Scores | None


class StepTotals:
    """Sums over the micro-batches of a step, kept on the device until the step ends."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.metrics: dict[str, list] = {}
        self.scores: list[Scores] = []
        self.rows = self.padded = self.micro_batches = 0

    def add(self, micro: Micro, batch: ModelBatch) -> None:
        for name, term in micro.terms.items():
            value = (term.sum * term.weight).detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        for name, (total, count) in micro.metrics.items():
            entry = self.metrics.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + total.detach().double(), entry[1] + count
        if micro.scores is not None:
            self.scores.append(Scores(*(None if t is None else t.detach() for t in micro.scores)))
        self.micro_batches += 1
        self.rows += len(batch.rows)
        self.padded += batch.input_ids.numel()

    def over_ranks(self, counts: dict[str, float], device: torch.device) -> dict[str, float]:
        """Loss, each term and each metric over all ranks, and token counts; one exchange."""
        entropies = self._flat("entropies").double()
        sums = [*self.sums.values(), *(m[0] for m in self.metrics.values()), entropies.sum()]
        flat = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device) for s in sums]).tolist()
        host = [*(m[1] for m in self.metrics.values()), len(entropies), self.rows, self.padded, self.micro_batches]
        flat = sum_over_ranks([*flat, *host], device)
        n, m = len(self.sums), len(self.metrics)
        terms = {name: s / counts[name] if counts[name] else 0.0 for name, s in zip(self.sums, flat, strict=False)}
        tail = flat[n + m :]
        means = {
            name: s / c if c else 0.0 for name, s, c in zip(self.metrics, flat[n : n + m], tail[1 : 1 + m], strict=True)
        }
        tokens, rows, padded, micro = tail[1 + m :]
        report = {"loss": sum(terms.values()), **(terms if n > 1 else {}), **means}
        report |= {"entropy": tail[0] / tokens if tokens else 0.0, "tokens": tokens, "rows": rows}
        return report | {"padded_tokens": padded, "micro_batches": micro}

    def tokens(self) -> dict[str, Tensor]:
        """Per-token quantities of this rank's step, for monitors."""
        return {name: self._flat(name) for name in ("logprobs", "entropies", "top_logprobs")}

    def _flat(self, name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in self.scores]) if self.scores else torch.zeros(0)
