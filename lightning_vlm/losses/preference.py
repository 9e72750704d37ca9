"""Preference losses: DPO, CW-DPO, Focal-DPO, and MPO's mixture with BCO and the winner's likelihood.

Shapes: P pairs. Log-probs are sums over a response's tokens, in nats; Δ = log π − log π_ref. Sources: DPO (Rafailov et
al. 2023, eq. 7); CW-DPO (Learning Dynamics of VLM Finetuning, arXiv 2510.11978, stage 2); BCO (Jung et al. 2024) and
MPO (Wang et al. 2024) in the form of Skywork R1V2. The CW-DPO paper names Focal-DPO without a formula: ours is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_vlm.losses.terms import Term

Weighting = Literal["none", "cooling", "focal"]
VULNERABLE = (0.8, 0.99)  # of a = σ(β(Δ_w − Δ_l)): nearly decided pairs, whose losers are still pushed (CW-DPO paper)


class Pairs(NamedTuple):
    """What policy and reference say of P pairs.

    Attributes:
        chosen, rejected: [P] log π of each side, nats, differentiable.
        reference_chosen, reference_rejected: [P] log π_ref of each side, nats.
        chosen_tokens, rejected_tokens: [P] tokens of each side.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def delta_chosen(self) -> Tensor:
        """[P] Δ_w."""
        return self.chosen - self.reference_chosen

    @property
    def delta_rejected(self) -> Tensor:
        """[P] Δ_l."""
        return self.rejected - self.reference_rejected


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """Settings of a preference loss; calling it gives its terms.

    Args:
        beta: β, inverse temperature of the implied reward.
        weighting: of the loser: `none` (DPO), `cooling` (CW-DPO), `focal` (Focal-DPO).
        tau: τ, width of the cooling weight in nats per token.
        gamma: γ, exponent of the focal modulator.
        detach_weight: hold w_c constant in the gradient, as the paper derives it.
        dpo_weight, bco_weight, nll_weight: MPO's w₁, w₂, w₃; a term of weight 0 is left out.
    """

    beta: float = 0.1
    weighting: Weighting = "none"
    tau: float = 1.0
    gamma: float = 2.0
    detach_weight: bool = True
    dpo_weight: float = 1.0
    bco_weight: float = 0.0
    nll_weight: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms; each is counted in pairs."""
        weights = {"preference": self.dpo_weight, "bco": self.bco_weight, "chosen_nll": self.nll_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def __call__(self, pairs: Pairs, *, weights: Tensor, shift: float) -> tuple[dict[str, Term], Tensor]:
        """Terms, summed over the pairs.

        Args:
            pairs: P pairs.
            weights: [P] w_c of each pair (`cooling_weight`); 1 for the other weightings.
            shift: δ, the mean reward that BCO measures from.

        Returns:
            Terms by name, and [P] the loss of each pair with all weights in, without gradient.
        """
        each: dict[str, tuple[Tensor, float]] = {}
        if self.dpo_weight:
            margin = self.beta * (pairs.delta_chosen - weights * pairs.delta_rejected)
            loss = -logsigmoid(margin)
            if self.weighting == "focal":
                loss = focal_modulator(margin, self.gamma) * loss
            each["preference"] = loss, self.dpo_weight
        if self.bco_weight:
            each["bco"] = bco(self.beta * pairs.delta_chosen, self.beta * pairs.delta_rejected, shift), self.bco_weight
        if self.nll_weight:
            each["chosen_nll"] = -pairs.chosen / pairs.chosen_tokens, self.nll_weight
        total = sum(loss.detach() * weight for loss, weight in each.values())
        return {name: Term(loss.sum(), weight) for name, (loss, weight) in each.items()}, total

    def cooling(self, pairs: Pairs, floor: float | None) -> Tensor:
        """[P] w_c of the pairs under these settings; 1 where the weighting is another.

        Args:
            pairs: P pairs. floor: ℓ_floor, nats per token; None before there is one, which gives ½.
        """
        if self.weighting != "cooling":
            return torch.ones_like(pairs.rejected.detach())
        mean = pairs.rejected / pairs.rejected_tokens
        weight = cooling_weight(mean, mean.detach() if floor is None else floor, self.tau)
        return weight.detach() if self.detach_weight else weight


def cooling_weight(mean_logprob: Tensor, floor: float | Tensor, tau: float) -> Tensor:
    """w_c = σ((ℓ̄ − ℓ_floor)/τ): near 1 for a loser the model still finds likely, near 0 for one it has long dismissed.

    Args:
        mean_logprob: [P] ℓ̄ of the losers, nats per token.
        floor: ℓ_floor, nats per token. tau: τ, nats per token.
    """
    return torch.sigmoid((mean_logprob - floor) / tau)


def focal_modulator(margin: Tensor, gamma: float) -> Tensor:
    """(1 − p)^γ with p = σ(margin), held constant in the gradient; ours, after Lin et al. 2017.

    Args:
        margin: [P] β(Δ_w − Δ_l). gamma: γ.
    """
    return torch.sigmoid(-margin.detach()).pow(gamma)


def bco(reward_chosen: Tensor, reward_rejected: Tensor, shift: float) -> Tensor:
    """−log σ(r_w − δ) − log σ(−(r_l − δ)): is each side better or worse than the mean?

    Args:
        reward_chosen: [P] βΔ_w. reward_rejected: [P] βΔ_l. shift: δ.
    """
    return -logsigmoid(reward_chosen - shift) - logsigmoid(-(reward_rejected - shift))


def vulnerable(pairs: Pairs, beta: float) -> Tensor:
    """[P] whether a = σ(β(Δ_w − Δ_l)) lies in the zone where easy losers do the most harm, [.8, .99].

    Args:
        pairs: P pairs. beta: β.
    """
    decided = torch.sigmoid(beta * (pairs.delta_chosen - pairs.delta_rejected).detach())
    return (decided >= VULNERABLE[0]) & (decided <= VULNERABLE[1])
