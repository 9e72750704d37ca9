"""Group relative policy optimisation; Dr. GRPO, DAPO, GSPO, CISPO and SAPO are settings of one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.on_policy import OnPolicy
from lightning_vlm.algorithms.reference import TOKENS, Kind, Reference, make_reference
from lightning_vlm.algorithms.rollout import ADVANTAGES, ENGINE, Rollout, tokens_of
from lightning_vlm.algorithms.totals import Micro
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.losses.fused import FusedScores, fused_token_loss
from lightning_vlm.losses.policy_gradient import (
    Aggregation,
    Importance,
    PolicyLoss,
    Surrogate,
    Tokens,
    group_advantages,
    has_spread,
    k3,
)
from lightning_vlm.losses.terms import Term
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.policy import Scores
from lightning_vlm.strategies.sync import sum_over_ranks


class GRPO(OnPolicy):
    """Policy gradient with advantages relative to the other completions of the same prompt.

    −min(ρA, clip(ρ)A) + β·k3 per token, A = (r − mean)/(std + 1e-4) within a group. See `losses.policy_gradient` for
    variants and sources.

    Args:
        aggregation: `token`: mean over all tokens of the step (DAPO); `sequence`: mean over completions of token means
            (the GRPO paper); `constant`: sum over completions × `rollout.max_new_tokens` (Dr. GRPO).
        advantage_std: divide by the spread of the group; Dr. GRPO does not.
        surrogate: `clip`, `cispo` or `sapo`.
        importance: ratio per `token` or per `sequence` (GSPO, with sequence aggregation).
        clip_low: the ratio is clipped to [1 − clip_low, 1 + clip_high]; GSPO's are .0003 and .0004.
        clip_high: see `clip_low`; DAPO's clip-higher is .28.
        dual_clip: largest ratio that counts where the advantage is negative; None leaves it open.
        kl_beta: β, weight of the KL estimate k3 against the reference; 0 needs no reference.
        kl_every: optimizer steps between measurements of the KL to the start of the run (`train/kl_start`), which need
            the reference, too; 0 measures none. With `kl_beta` it is measured at every step.
        entropy_coef: weight of the exact entropy as a bonus, nats per token; `EntropyCollapse` may adapt it.
        filter_on: the part of the reward that says what is right: groups are filtered and pass@k is counted on it. None
            takes the first.
        dynamic_sampling: tries at replacing groups whose completions all got the same from `filter_on`, by completions
            of further prompts, until the batch is full (DAPO); 0 keeps all groups.
        reference: `online` holds a second model, `adapters_off` switches LoRA off; None takes `adapters_off` where LoRA
            is all that trains.
        reference_model: model directory or hub id of another reference than the run's start.
        **kwargs: see `OnPolicy` and `Algorithm`.

    Raises:
        ValueError: a number out of range, or a setting without effect.
    """

    def __init__(
        self,
        *,
        aggregation: Aggregation = "token",
        advantage_std: bool = True,
        surrogate: Surrogate = "clip",
        importance: Importance = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = 3.0,
        kl_beta: float = 0.0,
        kl_every: int = 0,
        entropy_coef: float = 0.0,
        filter_on: str | None = None,
        dynamic_sampling: int = 0,
        reference: Kind | None = None,
        reference_model: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, valid in (
            ("aggregation", aggregation, ("token", "sequence", "constant")),
            ("surrogate", surrogate, ("clip", "cispo", "sapo")),
            ("importance", importance, ("token", "sequence")),
        ):
            if value not in valid:
                raise ValueError(f"model.{name} is {value!r}; choose {', '.join(valid)}")
        numbers = {"clip_low": clip_low, "clip_high": clip_high, "kl_beta": kl_beta, "kl_every": kl_every}
        numbers |= {"entropy_coef": entropy_coef, "dynamic_sampling": dynamic_sampling}
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"model.{name} cannot be negative, got {value}")
        if dual_clip is not None and surrogate == "clip" and dual_clip <= 1 + clip_high:
            raise ValueError(f"model.dual_clip must lie above 1 + clip_high = {1 + clip_high:g}, got {dual_clip}")
        if surrogate == "sapo" and (clip_low, clip_high) != (0.2, 0.2):
            raise ValueError("model.clip_low and clip_high have no effect with model.surrogate sapo: leave them out")
        if importance == "sequence" and surrogate == "cispo":
            raise ValueError("model.importance sequence does not go with model.surrogate cispo: set it to token")
        if not (kl_beta or kl_every) and (reference or reference_model):
            raise ValueError("model.reference has no effect without model.kl_beta or model.kl_every: leave it out")
        if reference == "cache":
            raise ValueError(
                "model.reference cannot be cache: what the policy writes is not known beforehand; take online, or "
                "adapters_off with LoRA"
            )
        if self.group_size < 2 and self.needs_rewards:
            raise ValueError(f"model.group_size must be at least 2 to compare completions, got {self.group_size}")
        if filter_on is not None and filter_on not in self.rewards:
            raise ValueError(
                f"model.filter_on names no part of the reward: {filter_on!r}{one_of(filter_on, self.rewards)}"
            )
        self.loss = PolicyLoss(
            surrogate=surrogate,
            importance=importance,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            kl_beta=kl_beta,
        )
        self.aggregation, self.advantage_std, self.entropy_coef = aggregation, advantage_std, entropy_coef
        self.kl_every, self.tries = kl_every, dynamic_sampling
        self.filter_on = filter_on
        self.reference_kind, self.reference_model = reference, reference_model
        self.reference: Reference | None = None

    @property
    def judged(self) -> str | None:
        """The part of the reward that says what is right."""
        return self.filter_on or next(iter(self.rewards), None)

    # --- reference --------------------------------------------------------------------------------------------------

    def extend_policy(self) -> None:
        """Make the reference while the policy is whole, where one is needed."""
        super().extend_policy()
        if self.trainer.state.fn == "fit" and (self.loss.kl_beta or self.kl_every):
            kind, model = self.reference_kind, self.reference_model
            self.reference = make_reference(self, kind, model=model, generated=True)

    def on_fit_start(self) -> None:
        """The reference joins the policy on its device."""
        super().on_fit_start()
        if self.reference is not None:
            self.reference.start()

    def annotate(self, items: list[Item]) -> None:
        """Log-probs of the reference, where they are needed now, and how far the policy has moved from it."""
        due = self.loss.kl_beta or (self.kl_every and self.clock % self.kl_every < self.steps_per_batch)
        if self.reference is None or not due:
            return
        self.reference.annotate(items)
        rows = [row for item in items for row in item]
        self._fresh |= self.kl_to_start(rows)

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def usable(self, rollout: Rollout) -> bool:
        """Whether the completions did not all get the same from the part that is filtered on."""
        values = rollout.values[:, list(self.rewards).index(self.judged)]
        return bool(has_spread(values.nan_to_num(0.0)[None])[0])

    def advise(self, rollouts: list[Rollout]) -> None:
        """Advantages within each group."""
        for rollout in rollouts:
            rollout.advise(group_advantages(rollout.totals[None], std=self.advantage_std)[0])

    def learns(self, row: Row) -> bool:
        """Without advantage there is no gradient, unless KL or entropy have one."""
        return bool(self.loss.kl_beta or self.entropy_coef or row.info[ADVANTAGES].any())

    # --- the step ---------------------------------------------------------------------------------------------------

    def counts(self, items: list[Item]) -> dict[str, float]:
        """Units by the aggregation: tokens, completions, or completions × longest completion."""
        rows = [row for item in items for row in item]
        units = {
            "token": sum(row.scored for row in rows),
            "sequence": len(rows),
            "constant": len(rows) * self.rollout.max_new_tokens,
        }
        return {name: float(units[self.aggregation]) for name in self.terms}

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms."""
        return ("policy", "entropy_bonus") if self.entropy_coef else ("policy",)

    def losses(self, batch: ModelBatch) -> Micro:
        """The surrogate, in one pass over the head where each token stands by itself."""
        tokens = tokens_of(batch, by_completion=self.aggregation == "sequence", device=self.device)
        if self.loss.by_token and not self.entropy_coef:
            out = self.policy(batch, head_loss=lambda *head: self.fused(*head, tokens))
            scores = Scores(*out[1:], batch.row_index)
            terms = {"policy": Term(out.total)}
        else:
            scores = self.policy.score(batch, temperature=self.temperature)
            terms = {"policy": Term(self.loss(scores.logprobs, self.advised(scores.logprobs, tokens)).sum())}
            if self.entropy_coef:
                terms["entropy_bonus"] = Term(-(scores.entropies * tokens.weights).sum(), self.entropy_coef)
        return Micro(terms, self.token_metrics(scores.logprobs.detach(), tokens, batch), scores)

    def advised(self, logprobs: Tensor, tokens: Tokens) -> Tokens:
        """Tokens with the advantages that the surrogate reads, given the policy's log-probs of them [N]."""
        return tokens

    def fused(self, hidden: Tensor, weight: Tensor, labels: Tensor, tokens: Tokens) -> FusedScores:
        """The surrogate's sum and its gradient in one pass over the head, inside the policy's forward."""

        def loss(logprobs: Tensor, where: slice) -> Tensor:
            return self.loss(logprobs, self.advised(logprobs, tokens.part(where)))

        return fused_token_loss(hidden, weight, labels, loss, temperature=self.temperature)

    def token_metrics(self, logprobs: Tensor, tokens: Tokens, batch: ModelBatch) -> dict:
        """Shares of clipped tokens, mean ratio, KL to the reference, gap to the engine."""
        count = float(len(logprobs))
        low, high = self.loss.clipped(logprobs, self.advised(logprobs, tokens))
        ratio = self.loss.log_ratio(logprobs, tokens).exp()
        metrics = {"clip_low": (low.sum(), count), "clip_high": (high.sum(), count), "ratio": (ratio.sum(), count)}
        if self.loss.kl_beta:
            known = logprobs if tokens.reference is None else tokens.reference
            metrics["kl"] = k3(logprobs, known).sum(), count
        if self.correction != "none":  # the same names on every rank, whether it has tokens or not
            factors = ratio.new_zeros(0) if tokens.correction is None else tokens.correction
            metrics["correction"] = factors.sum(), count
        return metrics | self.gap(logprobs, batch.rows)

    def kl_to_start(self, rows: list[Row]) -> dict[str, float]:
        """`kl_start`: mean k3 over the tokens of rows that know the reference's log-probs, all ranks."""
        known = [k3(row.info[ENGINE], row.info[TOKENS].double()) for row in rows if TOKENS in row.info]
        flat = torch.cat(known) if known else torch.zeros(0)
        total, count = sum_over_ranks([float(flat.sum()), float(len(flat))], self.device)
        return {"kl_start": total / count} if count else {}
