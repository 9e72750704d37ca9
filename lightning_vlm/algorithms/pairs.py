"""What algorithms on pairs share: chosen and rejected rows, where the rejected ones come from, reports by source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.negatives import Negatives, generate
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.models.batch import ModelBatch
from lightning_vlm.models.policy import Scores
from lightning_vlm.rollouts import PolicyEngine
from lightning_vlm.strategies.sync import max_over_ranks, sum_over_ranks, unsharded


class PairAlgorithm(Algorithm):
    """Base of the algorithms that learn from a better and a worse answer to the same prompt.

    Args:
        negatives: where the worse answers come from; those of the data set by default.
        **kwargs: see `Algorithm`.
    """

    encoding = "pair"

    def __init__(self, *, negatives: Negatives | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.negatives = negatives or Negatives()
        if self.negatives.generated:
            self.steps_per_batch = self.steps_loaded = self.negatives.refresh
            if not self.negatives.data:
                self.encoding = "answer"
        self._generated: dict[str, float] = {}

    def optimizer_batches(self, batch: StepBatch) -> Iterable[list[Item]]:
        """The items of each optimizer step; negatives are generated for all of them at once, by the policy as it is."""
        items, steps = list(batch.items), batch.steps or [0] * len(batch.items)
        self._generated = {}
        if self.negatives.generated:
            items, steps = self._with_negatives(batch, steps)
        rounds = int(max_over_ranks([max(steps, default=0) + 1], self.device)[0]) if self.steps_loaded > 1 else 1
        for step in range(rounds):
            if self._total_steps and self.clock >= self._total_steps:
                return
            yield self.keep([item for item, its in zip(items, steps, strict=True) if its == step])

    def keep(self, items: list[Item]) -> list[Item]:
        """The pairs that are learned from; a subclass may leave some out."""
        return items

    def _with_negatives(self, batch: StepBatch, steps: list[int]) -> tuple[list[Item], list[int]]:
        size = getattr(self.trainer.datamodule, "eval_batch_size", 64)
        with unsharded(self.policy):
            engine = PolicyEngine(self.policy, self.processor, batch_size=size)
            items, counts = generate(
                self.negatives, engine, batch.items, batch.samples, seed=self.seed, step=self.clock
            )
        counts = dict(zip(counts, sum_over_ranks(counts.values(), self.device), strict=True))
        self._generated = {f"negatives/{name}": value for name, value in counts.items()}
        step_of = {id(item[0]): step for item, step in zip(batch.items, steps, strict=True)}
        return items, [step_of[id(item[0])] for item in items]

    # --- reports ----------------------------------------------------------------------------------------------------

    def report_names(self) -> dict[str, list[str]]:
        """What reports are broken down by: data sources and kinds of negatives, where there are several."""
        specs = getattr(self.trainer.datamodule, "train_specs", {})
        sources = [spec.label or name for name, spec in specs.items()]
        groups = {"source": sources, "negative": list(self.negatives.kinds)}
        return {key: names for key, names in groups.items() if len(names) > 1}

    def by_group(self, batch: ModelBatch, values: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
        """Metrics of each group of pairs: its share, and the mean of each of the values.

        Args:
            batch: a micro-batch of pairs. values: name → [P].

        Returns:
            `share/<group>`, `<value>/<group>` as (sum, count), groups being `source/<name>` and `negative/<kind>`; the
            same names on every rank and micro-batch.
        """
        rejected = [row for row in batch.rows if row.name == "rejected"]
        out: dict[str, tuple[Tensor, float]] = {}
        for key, names in self.report_names().items():
            mine = [_kind(row.info) if key == "negative" else row.info.get("source", "") for row in rejected]
            for name in names:
                picked = torch.tensor([entry == name for entry in mine], dtype=torch.bool, device=self.device)
                count = float(sum(entry == name for entry in mine))
                out[f"share/{key}/{name}"] = picked.sum(), float(len(mine))
                out |= {f"{value}/{key}/{name}": (column[picked].sum(), count) for value, column in values.items()}
        return out


def _kind(info: dict[str, Any]) -> str:
    return info["negative"] if info.get("generated") else "data"


def chosen_only(scores: Scores, batch: ModelBatch) -> Scores:
    """The scored tokens of the chosen rows, for monitors: entropies of SFT and of pairs are then of the same texts."""
    mask = ~of_rejected(batch)
    return Scores(*(None if values is None else values[mask] for values in scores))


def of_rejected(batch: ModelBatch) -> Tensor:
    """[N] bool, which scored tokens stand in rejected rows."""
    rejected = torch.tensor([row.name == "rejected" for row in batch.rows], device=batch.row_index.device)
    return rejected[batch.row_index]


def pair_columns(values: Tensor, batch: ModelBatch) -> tuple[Tensor, Tensor]:
    """[P], [P]: per-row values of the chosen and of the rejected side; rows stand in pairs, fillers behind them."""
    pairs = sum(row.name == "rejected" for row in batch.rows)
    both = values[: 2 * pairs].view(pairs, 2)
    return both[:, 0], both[:, 1]
