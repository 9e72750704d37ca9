"""SFT-C: supervised fine-tuning that keeps an eye on wrong answers."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.pairs import PairAlgorithm, chosen_only, of_rejected
from lightning_vlm.algorithms.totals import Micro, StepTotals
from lightning_vlm.data.sources.base import hash_unit
from lightning_vlm.losses.sft import sft
from lightning_vlm.losses.sft_c import awake, constraint, smooth
from lightning_vlm.models.batch import ModelBatch
from lightning_vlm.strategies.sync import sum_over_ranks

Result = tuple[dict[str, float], dict[str, float], StepTotals]


class SFTC(PairAlgorithm):
    """Constrained SFT, stage 1 of CW-DPO: NLL(y⁺) + λ·ReLU(C − NLL(y⁻)), token means over the whole optimizer step.

    The penalty acts while negatives are more likely than C nats per token allow, and is asleep otherwise. Whether it
    acts is decided on the mean over all negatives of the step, all ranks; a step costs one pass over pairs while it
    acts, and SFT's pass plus one forward over the negatives while it sleeps. `smooth` is the paper's prose instead of
    its formula: ε·NLL(y⁻) is added, gentle supervision on negatives. C, λ, ε are ours.

    Args:
        mode: `constraint` or `smooth`.
        threshold: C, nats per token.
        constraint_weight: λ; 0 is SFT, to the bit.
        smooth_weight: ε.
        label_smoothing: share of the uniform distribution in the negatives' targets; `smooth` only.
        negative_fraction: share of the samples whose negative is looked at in a step, drawn anew each step.
        lazy: while the constraint sleeps, look at the negatives every so many steps only; 1 looks at every step.
        **kwargs: see `PairAlgorithm` and `Algorithm`.

    Raises:
        ValueError: a number out of range, or a setting without effect in this mode.
    """

    def __init__(
        self,
        *,
        mode: Literal["constraint", "smooth"] = "constraint",
        threshold: float = 2.0,
        constraint_weight: float = 0.1,
        smooth_weight: float = 0.05,
        label_smoothing: float = 0.0,
        negative_fraction: float = 1.0,
        lazy: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mode not in ("constraint", "smooth"):
            raise ValueError(f"model.mode is {mode!r}; choose constraint or smooth")
        if min(constraint_weight, smooth_weight, threshold) < 0 or not 0 <= label_smoothing < 1:
            raise ValueError(
                "model.threshold, constraint_weight and smooth_weight cannot be negative, and label_smoothing must lie "
                f"in [0, 1); got {threshold}, {constraint_weight}, {smooth_weight}, {label_smoothing}"
            )
        if not 0 < negative_fraction <= 1:
            raise ValueError(f"model.negative_fraction must lie in (0, 1], got {negative_fraction}")
        if lazy < 1:
            raise ValueError(f"model.lazy must be at least 1, got {lazy}")
        other = {"threshold": 2.0, "constraint_weight": 0.1} if mode == "smooth" else {"smooth_weight": 0.05}
        given = {"threshold": threshold, "constraint_weight": constraint_weight, "smooth_weight": smooth_weight}
        for name, default in other.items():
            if given[name] != default:
                raise ValueError(f"model.{name} has no effect in mode {mode}: leave it out, or change model.mode")
        if mode == "smooth" and lazy > 1:
            raise ValueError("model.lazy has no effect in mode smooth, which learns from negatives in every step")
        if mode == "constraint" and label_smoothing:
            raise ValueError("model.label_smoothing has no effect in mode constraint: set mode to smooth, or drop it")
        self.mode, self.threshold, self.label_smoothing = mode, threshold, label_smoothing
        self.constraint_weight, self.smooth_weight = constraint_weight, smooth_weight
        self.negative_fraction, self.lazy = negative_fraction, lazy
        self.awake = True  # whether the constraint acted when it was last looked at

    def losses(self, batch: ModelBatch) -> Micro:
        """NLL of the chosen rows, and what the mode adds for the rejected ones."""
        scores = self.policy(batch, uniform=self.mode == "smooth" and self.label_smoothing > 0)
        negative = of_rejected(batch)
        terms = sft(scores.logprobs[~negative])
        found = scores.logprobs[negative]
        if self.mode == "smooth":
            uniform = None if scores.uniform_logprobs is None else scores.uniform_logprobs[negative]
            terms |= smooth(found, uniform, weight=self.smooth_weight, label_smoothing=self.label_smoothing)
        else:
            terms |= constraint(found, weight=self.constraint_weight)
        right = (scores.top_ids == batch.labels)[~negative].sum()
        metrics = {
            "token_accuracy": (right, float(len(batch.labels) - len(found))),
            "nll_rejected": (-found.detach().sum(), float(len(found))),
        }
        return Micro(terms, metrics, chosen_only(scores, batch))

    def counts(self, items: list[Item]) -> dict[str, float]:
        """Tokens of either side."""
        chosen = float(sum(item[0].scored for item in items))
        rejected = float(sum(row.scored for item in items for row in item[1:]))
        return {"nll": chosen, ("smooth" if self.mode == "smooth" else "constraint"): rejected}

    def gradient(self, items: list[Item]) -> Result:
        """One, or where the constraint has just changed its mind two, passes; see the class."""
        counts, report, step = self._gradient(self._with_some_negatives(items))
        return counts, report | self._generated, step

    def _gradient(self, items: list[Item]) -> Result:
        if (self.smooth_weight if self.mode == "smooth" else self.constraint_weight) == 0:
            return self._without_negatives(items)
        if self.mode == "smooth":
            return self.accumulate(items, self.losses, self.counts(items))
        done = found = None
        if self.awake:
            done = self.accumulate(items, self.losses, self.counts(items))
            found = done[1].pop("nll_rejected") if done[0]["constraint"] else None
        elif self.clock % self.lazy == 0:
            found = self._nll_of_negatives(items)
        if found is not None:
            self.awake = awake(found, self.threshold)
        if not self.awake:  # what was accumulated (and, where weights are sharded, reduced) is thrown away
            done = self._without_negatives(items)
        elif done is None:
            done = self.accumulate(items, self.losses, self.counts(items))
        counts, report, step = done
        return counts, self._with_penalty(report, found), step

    def _with_some_negatives(self, items: list[Item]) -> list[Item]:
        """Each item with its negative, or, by a draw keyed by (seed, step, id), without."""
        if self.negative_fraction == 1.0:
            return items
        drawn = [hash_unit(self.seed, f"fraction/{self.clock}/{item[0].id}") for item in items]
        return [item if u < self.negative_fraction else item[:1] for item, u in zip(items, drawn, strict=True)]

    def _without_negatives(self, items: list[Item]) -> Result:
        """SFT's own pass."""
        chosen = [item[:1] for item in items]
        return self.accumulate(chosen, self._sft, {"nll": self.counts(chosen)["nll"]})

    def _sft(self, batch: ModelBatch) -> Micro:
        scores = self.policy.score(batch)
        right = (scores.top_ids == batch.labels).sum()
        return Micro(sft(scores.logprobs), {"token_accuracy": (right, len(batch.labels))}, scores)

    def _nll_of_negatives(self, items: list[Item]) -> float | None:
        """Mean NLL of the step's negatives, nats per token, all ranks; None where there is none."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        with torch.no_grad():
            for batch, _ in self.micro_batches([item[1:] for item in items if len(item) > 1]):
                logprobs = self.policy.score(batch).logprobs
                total, count = total - logprobs.double().sum(), count + len(logprobs)
        total, count = sum_over_ranks([float(total), count], self.device)
        return total / count if count else None

    def _with_penalty(self, report: dict[str, float], found: float | None) -> dict[str, float]:
        """The penalty as the formula has it, λ·ReLU(C − NLL⁻), in place of the term that gives its gradient.

        Args:
            report: of the step. found: NLL⁻, nats per token; None where the step did not look at negatives or had none.
        """
        nll = report["loss"] - report.get("constraint", 0.0)
        penalty = 0.0 if found is None else self.constraint_weight * max(0.0, self.threshold - found)
        report = report | {"loss": nll + penalty, "nll": nll, "constraint": penalty, "awake": float(self.awake)}
        report.pop("nll_rejected", None)
        return report | ({} if found is None else {"nll_rejected": found})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Whether the constraint acted, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lightning_vlm"]["awake"] = self.awake

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.awake = checkpoint["lightning_vlm"]["awake"]
