"""The DPO family: DPO, CW-DPO, Focal-DPO and MPO are settings of one module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.pairs import PairAlgorithm, chosen_only, pair_columns
from lightning_vlm.algorithms.reference import LOGPROB, Kind, Reference, make_reference
from lightning_vlm.algorithms.totals import Micro, StepTotals
from lightning_vlm.losses.preference import Pairs, PreferenceLoss, Weighting, vulnerable
from lightning_vlm.models.batch import ModelBatch
from lightning_vlm.strategies.sync import sum_over_ranks

# Nats per token by which a reference may differ from the policy it is a copy of: rounding of another batch layout.
_ROUNDING = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 0.2}


class DPO(PairAlgorithm):
    """Preference learning from a better and a worse answer, against the stage's start as reference.

    −log σ(β(Δ_w − w_c·Δ_l)), Δ = log π − log π_ref. `weighting: none` is DPO (w_c = 1); `cooling` is CW-DPO, where
    w_c = σ((ℓ̄(y_l) − ℓ_floor)/τ) takes the push off losers that the model has long dismissed; `focal` is Focal-DPO,
    −(1 − p)^γ log p. MPO adds BCO and the winner's likelihood by `bco_weight` and `nll_weight`. See
    `losses.preference` for sources.

    Args:
        beta: β, inverse temperature of the implied reward.
        weighting: `none`, `cooling` or `focal`.
        ell_floor: ℓ_floor of the cooling weight, nats per token; `mean` takes the running mean of ℓ̄(y_l), over all
            ranks, updated after each step (the paper sweeps −5, −3, −2).
        tau: τ of the cooling weight, nats per token; ours.
        gamma: γ of the focal modulator; ours.
        detach_weight: hold w_c constant in the gradient, as the paper derives it. Otherwise the loser is raised once
            Δ_l per token falls below −τ/(1 − w_c): an ablation.
        dpo_weight: w₁, weight of the DPO term.
        bco_weight: w₂, weight of −log σ(βΔ_w − δ) − log σ(−(βΔ_l − δ)), δ the running mean of the rewards.
        nll_weight: w₃, weight of −log π(y_w)/|y_w|.
        reference: `cache` computes log π_ref once and keeps it on disk, `online` holds a second model, `adapters_off`
            switches LoRA off. None takes `adapters_off` where LoRA is all that trains, else `online` if negatives are
            generated (`cache` loads the reference anew for each step's, which saves its memory), else `cache`.
        reference_model: model directory or hub id of another reference than the stage's start; the tokenizer must be
            the same.
        reference_cache: folder of reference log-probs made elsewhere, refused unless it is of the same weights; None
            uses the common store in `$LVLM_CACHE` (default ~/.cache/lightning_vlm).
        hopeless_below: pairs whose rejected answer has fewer nats per token than this under the reference are left
            out; None keeps all.
        **kwargs: see `PairAlgorithm` and `Algorithm`.

    Raises:
        ValueError: a number out of range, or a setting without effect.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        weighting: Weighting = "none",
        ell_floor: float | Literal["mean"] = -3.0,
        tau: float = 1.0,
        gamma: float = 2.0,
        detach_weight: bool = True,
        dpo_weight: float = 1.0,
        bco_weight: float = 0.0,
        nll_weight: float = 0.0,
        reference: Kind | None = None,
        reference_model: str | None = None,
        reference_cache: str | None = None,
        hopeless_below: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (beta > 0 and tau > 0 and gamma >= 0):
            raise ValueError(f"model.beta and tau must be positive and gamma not negative; got {beta}, {tau}, {gamma}")
        if weighting not in ("none", "cooling", "focal"):
            raise ValueError(f"model.weighting is {weighting!r}; choose none, cooling or focal")
        if min(dpo_weight, bco_weight, nll_weight) < 0 or dpo_weight + bco_weight + nll_weight == 0:
            raise ValueError(
                "model.dpo_weight, bco_weight and nll_weight cannot be negative, and one must be positive; got "
                f"{dpo_weight}, {bco_weight}, {nll_weight}"
            )
        if weighting != "none" and not dpo_weight:
            raise ValueError(f"model.weighting {weighting!r} has no effect with model.dpo_weight 0: set it to none")
        if reference not in (None, "cache", "online", "adapters_off"):
            raise ValueError(f"model.reference is {reference!r}; choose cache, online or adapters_off")
        if isinstance(ell_floor, str) and ell_floor != "mean":
            raise ValueError(f"model.ell_floor is {ell_floor!r}; give nats per token, such as -3.0, or `mean`")
        for name, value in (("ell_floor", ell_floor), ("hopeless_below", hopeless_below)):
            if isinstance(value, int | float) and value >= 0:
                raise ValueError(f"model.{name} is {value}; log-probabilities per token are negative: give e.g. -5.0")
        if gamma != 2.0 and weighting != "focal":
            raise ValueError(f"model.gamma {gamma} has an effect with model.weighting focal only: leave it out")
        if not detach_weight and weighting != "cooling":
            raise ValueError("model.detach_weight false has an effect with model.weighting cooling only")
        self.beta, self.tau, self.ell_floor, self.weighting = beta, tau, ell_floor, weighting
        self.loss = PreferenceLoss(
            beta=beta,
            weighting=weighting,
            tau=tau,
            gamma=gamma,
            detach_weight=detach_weight,
            dpo_weight=dpo_weight,
            bco_weight=bco_weight,
            nll_weight=nll_weight,
        )
        self.reference_kind, self.reference_model, self.reference_cache = reference, reference_model, reference_cache
        self.hopeless_below = hopeless_below
        self.reference: Reference | None = None
        self._floor = self._shift = (0.0, 0.0)  # running (sum, count) of ℓ̄(y_l) and of the rewards
        self._dropped = 0.0
        self._warned = False

    # --- reference --------------------------------------------------------------------------------------------------

    def extend_policy(self) -> None:
        """Make the reference while the policy is whole."""
        if self.trainer.state.fn == "fit":
            self.reference = make_reference(
                self,
                self.reference_kind,
                model=self.reference_model,
                folder=self.reference_cache,
                generated=self.negatives.generated,
            )

    def on_fit_start(self) -> None:
        """The reference joins the policy on its device."""
        super().on_fit_start()
        self.reference.start()

    def keep(self, items: list[Item]) -> list[Item]:
        """Pairs with reference log-probs; what has no negative, or a hopeless one, is left out."""
        items = [item for item in items if len(item) == 2]
        self.reference.annotate(items)
        if self.hopeless_below is None:
            return items
        kept = [item for item in items if item[1].info[LOGPROB] / item[1].scored >= self.hopeless_below]
        dropped, total = sum_over_ranks([float(len(items) - len(kept)), float(len(items))], self.device)
        self._dropped = dropped / total if total else 0.0
        return kept

    # --- the step ---------------------------------------------------------------------------------------------------

    @property
    def ell_floor_value(self) -> float | None:
        """ℓ_floor as it is now, nats per token; None before the first step with `mean`."""
        if self.ell_floor != "mean":
            return self.ell_floor
        total, count = self._floor
        return total / count if count else None

    def losses(self, batch: ModelBatch) -> Micro:
        """The preference terms of a micro-batch of pairs, and what its rewards and weights are."""
        scores = self.policy.score(batch)
        sums = scores.per_row(scores.logprobs, len(batch.rows))
        known = [row.info.get(LOGPROB, 0.0) for row in batch.rows]
        lengths = [max(row.scored, 1) for row in batch.rows]
        columns = (sums, sums.new_tensor(known), sums.new_tensor(lengths))
        (chosen, rejected), (ref_w, ref_l), (n_w, n_l) = (pair_columns(column, batch) for column in columns)
        pairs = Pairs(chosen, rejected, ref_w, ref_l, n_w, n_l)
        weights = self.loss.cooling(pairs, self.ell_floor_value)
        shift = self._shift[0] / self._shift[1] if self._shift[1] else 0.0
        terms, each = self.loss(pairs, weights=weights, shift=shift)
        return Micro(terms, self._metrics(batch, pairs, weights.detach(), each), chosen_only(scores, batch))

    def _metrics(self, batch: ModelBatch, pairs: Pairs, weights: torch.Tensor, each: torch.Tensor) -> dict:
        count = float(len(each))
        tokens = [float(sum(row.scored for row in batch.rows if row.name == name)) for name in ("chosen", "rejected")]
        delta_w, delta_l = pairs.delta_chosen.detach(), pairs.delta_rejected.detach()
        mean_l = (pairs.rejected / pairs.rejected_tokens).detach()
        metrics = {
            "accuracy": ((delta_w > delta_l).sum(), count),
            "reward_chosen": (self.beta * delta_w.sum(), count),
            "reward_rejected": (self.beta * delta_l.sum(), count),
            "reward_margin": (self.beta * (delta_w - delta_l).sum(), count),
            "logprob_chosen": (pairs.chosen.detach().sum(), tokens[0]),
            "logprob_rejected": (pairs.rejected.detach().sum(), tokens[1]),
            "vulnerable": (vulnerable(pairs, self.beta).sum(), count),
            "_ell_rejected": (mean_l.sum(), count),
            "_gap": ((delta_w.abs() / pairs.chosen_tokens + delta_l.abs() / pairs.rejected_tokens).sum(), 2 * count),
        }
        columns = {"loss": each, "logprob_rejected": mean_l}
        if self.weighting == "cooling":
            metrics["w_c"] = weights.sum(), count
            columns["w_c"] = weights
        return metrics | self.by_group(batch, columns)

    def counts(self, items: list[Item]) -> dict[str, float]:
        """Pairs, for every term."""
        return {name: float(len(items)) for name in self.loss.names}

    def gradient(self, items: list[Item]) -> tuple[dict[str, float], dict[str, float], StepTotals]:
        """One pass; then the running means move on, and the first step shows whether the reference is the start."""
        counts, report, step = super().gradient(items)
        pairs = counts[self.loss.names[0]]
        gap, mean = report.pop("_gap"), report.pop("_ell_rejected")
        if not pairs and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"optimizer step {self.clock}: no pair to learn from: all were left out (train/hopeless, "
                "train/negatives/missing tell); raise model.hopeless_below's distance from 0, or give "
                "model.negatives.data a share"
            )
        if self.clock == 0 and pairs and self.reference_model is None:
            self._check_start(gap)
        self._floor = self._floor[0] + mean * pairs, self._floor[1] + pairs
        rewards = report["reward_chosen"] + report["reward_rejected"]
        self._shift = self._shift[0] + rewards * pairs, self._shift[1] + 2 * pairs
        report |= self._generated | ({} if self.hopeless_below is None else {"hopeless": self._dropped})
        if self.weighting == "cooling" and self.ell_floor == "mean" and self._floor[1]:
            report["ell_floor"] = self._floor[0] / self._floor[1]
        return counts, with_loss_shares(report), step

    def _check_start(self, gap: float) -> None:
        precise = str(self.trainer.precision).startswith(("32", "64"))
        mixed = getattr(self.trainer.strategy, "mixed_precision", "none") != "none"
        allowed = _ROUNDING[self.backbone.dtype if precise and not mixed else "bfloat16"]
        if gap > allowed:
            raise ValueError(
                f"the reference differs from the policy by {gap:.3g} nats per token before the first step, where both "
                f"are the same model: {self.reference.suspicion()}"
            )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The running means, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lightning_vlm"]["preference"] = {"floor": list(self._floor), "shift": list(self._shift)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running means."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["lightning_vlm"]["preference"]
        self._floor, self._shift = tuple(state["floor"]), tuple(state["shift"])


def with_loss_shares(report: dict[str, float]) -> dict[str, float]:
    """The report with `loss_share/<group>`, the part of the summed loss that each group of pairs has."""
    groups = [name.removeprefix("share/") for name in report if name.startswith("share/")]
    parts = {group: report[f"share/{group}"] * report[f"loss/{group}"] for group in groups}
    for group, part in parts.items():
        whole = sum(other for name, other in parts.items() if name.split("/")[0] == group.split("/")[0])
        report[f"loss_share/{group}"] = part / whole if whole else 0.0
    return report
