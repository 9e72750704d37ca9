"""Clipped policy-gradient losses on groups of completions: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, SAPO.

Shapes: P prompts, G completions of each, R completions of a batch, N their tokens, flat by completion. Log-probs are in
nats. Sources: GRPO (Shao et al. 2024, eq. 3 and 4), Dr. GRPO (Liu et al. 2025), DAPO (Yu et al. 2025, eq. 8 to 12),
GSPO (Zheng et al. 2025, eq. 5 to 7), CISPO (MiniMax-M1 2025, eq. 4 and 5), SAPO (Gao et al. 2025), dual clip (Ye et al.
2020), k3 (Schulman 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]
Importance = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo", "sapo"]
Correction = Literal["none", "truncate", "mask"]

SAPO_TEMPERATURES = (1.0, 1.05)  # of advantages above 0, and of the others (the paper's)
STD_FLOOR = 1e-4  # added to the spread of a group
SPREAD = 1e-6  # rewards closer to each other than this are one and the same


def group_advantages(rewards_PG: Tensor, *, std: bool = True) -> Tensor:
    """[P, G] A = (r − mean)/(std + 1e-4), sample standard deviation (n − 1); without `std` A = r − mean (Dr. GRPO).

    Groups without spread get exactly 0.

    Args:
        rewards_PG: [P, G], G at least 2.
        std: divide by the spread of the group.
    """
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    centred = centred.masked_fill(~has_spread(rewards_PG)[:, None], 0.0)
    return centred / (rewards_PG.std(1, keepdim=True) + STD_FLOOR) if std else centred


def has_spread(rewards_PG: Tensor) -> Tensor:
    """[P] bool, whether the rewards of a group differ."""
    return rewards_PG.amax(1) - rewards_PG.amin(1) > SPREAD


class Tokens(NamedTuple):
    """What is known of N completion tokens before the policy is asked.

    Attributes:
        advantages: [N].
        weights: [N] share of each token in the sum: 1, or 1/|y| of its completion.
        rows: [N] completion of each token, 0 … count − 1.
        count: completions.
        old: [N] log-probs under the policy that the surrogate's ratio is measured from; None: the present one.
        reference: [N] log-probs under the reference; None where no KL is asked for.
        correction: [N] factors for tokens that another distribution than `old` has drawn; None: 1.
        teacher: [N] log-probs under a teacher, where one gives advantages.
    """

    advantages: Tensor
    weights: Tensor
    rows: Tensor
    count: int
    old: Tensor | None = None
    reference: Tensor | None = None
    correction: Tensor | None = None
    teacher: Tensor | None = None

    def part(self, where: slice) -> Tokens:
        """Some of the tokens."""
        cut = {name: value[where] for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**cut)


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Settings of a surrogate; calling it gives each token's share of the loss.

    Args:
        surrogate: `clip` is PPO's pessimistic minimum; `cispo` clips and detaches the ratio and keeps every token's
            gradient; `sapo` fades it out by a sigmoid of the ratio, and reads neither clips nor dual_clip.
        importance: ratio per `token`, or per `sequence` (GSPO: the geometric mean of its tokens' ratios).
        clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high].
        dual_clip: largest ratio that counts where the advantage is negative; None leaves it open.
        kl_beta: weight of k3 = exp(ref − logp) − (ref − logp) − 1.
    """

    surrogate: Surrogate = "clip"
    importance: Importance = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_beta: float = 0.0

    @property
    def by_token(self) -> bool:
        """Whether a token's loss depends on its own log-prob alone."""
        return self.importance == "token"

    def __call__(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """[N] losses of tokens, weighted.

        Args:
            logprobs: [N] log π of the tokens, differentiable.
            tokens: what is known of them.
        """
        ratio = torch.exp(self.log_ratio(logprobs, tokens))
        advantages, low, high = tokens.advantages, 1 - self.clip_low, 1 + self.clip_high
        if self.surrogate == "cispo":
            loss = -ratio.detach().clamp(low, high) * advantages * logprobs
        elif self.surrogate == "sapo":
            above, below = SAPO_TEMPERATURES
            temperatures = torch.full_like(advantages, below).masked_fill(advantages > 0, above)
            loss = -torch.sigmoid(temperatures * (ratio - 1)) * 4 / temperatures * advantages
        else:
            bounded = ratio if self.dual_clip is None else ratio.clamp(max=self.dual_clip)
            # max(−ρA, −clip(ρ)A); a bound on ρ bears on A < 0 alone, for it lies above the clip.
            loss = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
        if tokens.correction is not None:
            loss = loss * tokens.correction
        if self.kl_beta:
            loss = loss + self.kl_beta * k3(logprobs, tokens.reference)
        return loss * tokens.weights

    def log_ratio(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """[N] log of the importance ratio that each token is weighed by, differentiable."""
        log_ratio = logprobs - (logprobs.detach() if tokens.old is None else tokens.old)
        if self.importance == "token":
            return log_ratio
        return _row_means(log_ratio, tokens)

    def clipped(self, logprobs: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[N], [N] bool: tokens whose gradient the lower, or the upper, clip has stopped."""
        ratio = torch.exp(self.log_ratio(logprobs.detach(), tokens))
        if self.surrogate == "cispo":
            return ratio < 1 - self.clip_low, ratio > 1 + self.clip_high
        below = (ratio < 1 - self.clip_low) & (tokens.advantages < 0)
        return below, (ratio > 1 + self.clip_high) & (tokens.advantages > 0)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[N] unbiased, never negative estimate of KL(π‖π_ref) at a token that π has drawn.

    Args:
        logprobs: [N] under π. reference: [N] under π_ref.
    """
    gap = reference - logprobs
    return torch.exp(gap) - gap - 1


def correction_factors(old: Tensor, sampling: Tensor, rows: Tensor, count: int, how: Correction, cap: float) -> Tensor:
    """[N] factors that make up for tokens drawn from another distribution than the policy's own.

    `truncate` weighs each token by min(π_old/π_sampling, cap) (truncated importance sampling, Yao et al. 2025); `mask`
    keeps a completion whole (1) where the geometric mean of its ratios lies in [1/cap, cap], else drops it (0).

    Args:
        old: [N] log-probs under the policy. sampling: [N] log-probs under what has drawn.
        rows: [N] completion of each token. count: completions. how: see above. cap: at least 1.
    """
    log_ratio = old - sampling
    if how == "truncate":
        return log_ratio.exp().clamp(max=cap)
    lengths = torch.bincount(rows, minlength=count).clamp(min=1)
    means = torch.zeros(count, dtype=old.dtype, device=old.device).index_add(0, rows, log_ratio) / lengths
    return (means.abs() <= math.log(cap)).to(old.dtype)[rows]


def _row_means(values: Tensor, tokens: Tokens) -> Tensor:
    """[N] each token's mean over its completion, differentiable through all of its tokens."""
    lengths = torch.bincount(tokens.rows, minlength=tokens.count).clamp(min=1)
    sums = values.new_zeros(tokens.count).index_add(0, tokens.rows, values)
    return (sums / lengths)[tokens.rows]
