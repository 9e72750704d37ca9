"""Held-out loss: what the policy thinks of texts it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_vlm.benchmarks.rule import Summary
from lightning_vlm.data.schema import Sample


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """An evaluation by scoring: token means over all assistant texts of its samples.

    Attributes:
        name: names its metrics, `val/<name>/nll`.
        samples: conversations with assistant texts.
        every: optimizer steps between evaluations.
    """

    encoding: ClassVar[str] = "conversation"
    metric_names: ClassVar[frozenset[str]] = frozenset({"nll", "entropy", "token_accuracy", "tokens", "n"})

    name: str
    samples: Sequence[Sample]
    every: int = 100

    def summary(self, records: Sequence[dict[str, Any]]) -> Summary:
        """`nll` and `entropy` in nats per token, `token_accuracy` as a fraction, `tokens`, `n`.

        Args:
            records: per sample the sums `logprob`, `entropy`, `right`, `tokens`.
        """
        tokens = sum(record["tokens"] for record in records)
        if not tokens:
            raise ValueError(f"held-out set {self.name!r} has no assistant text to score")
        sums = {name: sum(record[name] for record in records) for name in ("logprob", "entropy", "right")}
        return Summary(
            {
                "nll": -sums["logprob"] / tokens,
                "entropy": sums["entropy"] / tokens,
                "token_accuracy": sums["right"] / tokens,
                "tokens": tokens,
                "n": float(len(records)),
            }
        )
