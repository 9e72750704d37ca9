"""On-policy distillation: the student writes, a teacher says token by token what it would have written."""

from __future__ import annotations

from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_vlm.algorithms.grpo import GRPO
from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.off_policy import OffPolicy
from lightning_vlm.algorithms.on_policy import OnPolicy
from lightning_vlm.algorithms.reference import score_rows
from lightning_vlm.algorithms.rollout import TEACHER, Rollout, tokens_of
from lightning_vlm.algorithms.teacher import Teacher
from lightning_vlm.algorithms.totals import Micro
from lightning_vlm.losses.distillation import Distilled, distill, sampled_advantages
from lightning_vlm.losses.fused import FusedScores
from lightning_vlm.losses.policy_gradient import Tokens, group_advantages
from lightning_vlm.losses.terms import Term
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.policy import HeadInput, Scores

# Settings of the surrogate, which only reads advantages.
_SURROGATE = ("surrogate", "importance", "clip_low", "clip_high", "dual_clip", "kl_beta", "entropy_coef")


class OPD(GRPO):
    """Distillation on the student's own completions (Agarwal et al. 2024; Thinking Machines 2025 for `sampled`).

    For each token the student has drawn, the divergence of its next-token distribution from the teacher's, which one
    forward pass over the same pixels and ids gives. See `losses.distillation` for the objectives.

    Args:
        teacher: model directory, hub id or embedded model; the tokenizer must be the student's. Where its processor is
            another one, it is shown its own encoding of the prompt.
        teacher_adapter: adapter file of ours that belongs on the teacher.
        teacher_dtype: of its weights; the student's by default.
        objective: `full` (reverse KL over the vocabulary), `jsd` (generalised Jensen–Shannon), `topk` (reverse KL over
            the teacher's likeliest tokens and a rest) or `sampled` (policy gradient with the advantage
            log π_teacher − log π of the drawn token).
        beta: of `jsd`: 0 is the forward KL, 1 the reverse KL.
        topk: tokens of `topk`.
        reward_weight: weight of GRPO's objective beside the distillation, with the same settings; 0 only reports
            rewards.
        off_policy: share of prompts whose completion the student does not write (GKD's 1 − λ); 0 is on-policy.
        off_policy_from: who writes those: `data` (the sample's answer) or `teacher`.
        group_size: completions per prompt; 1 by default.
        **kwargs: see `GRPO`, `OnPolicy` and `Algorithm`.

    Raises:
        ValueError: a number out of range, a teacher that does not fit, or a setting without effect.
    """

    needs_rewards = False

    def __init__(
        self,
        *,
        teacher: str,
        teacher_adapter: str | None = None,
        teacher_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        objective: Literal["full", "jsd", "topk", "sampled"] = "full",
        beta: float = 0.5,
        topk: int = 64,
        reward_weight: float = 0.0,
        off_policy: float = 0.0,
        off_policy_from: Literal["data", "teacher"] = "data",
        group_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(group_size=group_size, **kwargs)
        if objective not in ("full", "jsd", "topk", "sampled"):
            raise ValueError(f"model.objective is {objective!r}; choose full, jsd, topk or sampled")
        if not 0 <= beta <= 1:
            raise ValueError(f"model.beta must lie in [0, 1], got {beta}: 0 is the forward KL, 1 the reverse KL")
        if topk < 1 or reward_weight < 0 or not 0 <= off_policy <= 1:
            raise ValueError(
                "model.topk must be at least 1, reward_weight not negative and off_policy between 0 and 1; got "
                f"{topk}, {reward_weight}, {off_policy}"
            )
        if off_policy_from not in ("data", "teacher"):
            raise ValueError(f"model.off_policy_from is {off_policy_from!r}; choose data or teacher")
        idle = {"beta": (beta != 0.5, "jsd"), "topk": (topk != 64, "topk")}
        for name, (given, needed) in idle.items():
            if given and objective != needed:
                raise ValueError(f"model.{name} has an effect with model.objective {needed} only: leave it out")
        if reward_weight and (not self.rewards or group_size < 2):
            raise ValueError(
                f"model.reward_weight {reward_weight} needs model.rewards and a model.group_size of at least 2 to "
                f"compare completions; got {len(self.rewards)} rewards, group_size {group_size}"
            )
        if off_policy and (objective == "sampled" or reward_weight):
            raise ValueError(
                "model.off_policy does not go with model.objective sampled or model.reward_weight, which learn from "
                "the student's own draws: take objective full, jsd or topk and no reward_weight"
            )
        if objective != "sampled" and not reward_weight:
            self._refuse_idle(kwargs, _SURROGATE, "model.objective sampled or model.reward_weight")
        if objective != "sampled" and self.entropy_coef:
            raise ValueError("model.entropy_coef has an effect with model.objective sampled only: leave it out")
        if not reward_weight:
            self._refuse_idle(kwargs, ("advantage_std", "dynamic_sampling"), "model.reward_weight")
        self.objective, self.beta, self.topk, self.reward_weight = objective, beta, topk, reward_weight
        self.teacher_path, self.teacher_adapter, self.teacher_dtype = teacher, teacher_adapter, teacher_dtype
        self.off_policy = OffPolicy(self, off_policy, off_policy_from)
        if off_policy and off_policy_from == "data":
            self.encoding = "answer"
        self.teacher: Teacher | None = None

    def _refuse_idle(self, given: dict[str, Any], names: tuple[str, ...], needed: str) -> None:
        defaults = {
            name: p.default for cls in (GRPO, OnPolicy) for name, p in signature(cls.__init__).parameters.items()
        }
        for name in names:
            if name in given and given[name] != defaults[name]:
                raise ValueError(f"model.{name} has no effect without {needed}: leave it out")

    # --- teacher ----------------------------------------------------------------------------------------------------

    def extend_policy(self) -> None:
        """The teacher is made beside the policy."""
        super().extend_policy()
        if self.trainer.state.fn != "fit":
            return
        self.teacher = Teacher(self, self.teacher_path, adapter=self.teacher_adapter, dtype=self.teacher_dtype)
        if not self.teacher.shares_inputs:
            self.other_processors = (self.teacher.processor,)

    def on_fit_start(self) -> None:
        """It joins the policy on its device."""
        super().on_fit_start()
        self.teacher.start()

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def answered(self, batch, *, attempt: int) -> list[Rollout]:
        """The student's completions, and those that others write in its place."""
        mine, others = self.off_policy.split(batch)
        return super().answered(mine, attempt=attempt) + self.off_policy.rollouts(others, attempt)

    def advise(self, rollouts: list[Rollout]) -> None:
        """Group advantages, where rewards count; rows of the teacher's own, where it needs them."""
        for rollout in rollouts:
            if rollout.others:
                self.teacher.annotate(rollout.rows, rollout.others[0])
            advantages = torch.zeros(len(rollout.completions), dtype=torch.float64)
            if self.reward_weight and rollout.writer == "policy":
                advantages = group_advantages(rollout.totals[None], std=self.advantage_std)[0]
            rollout.advise(advantages)

    def annotate(self, items: list[Item]) -> None:
        """With `sampled`, also the teacher's log-probs of the drawn tokens."""
        super().annotate(items)
        if self.objective == "sampled":
            score_rows(self, self.teacher, items, TEACHER)

    def advised(self, logprobs: Tensor, tokens: Tokens) -> Tokens:
        """With `sampled`, log π_teacher − log π of each token, π as it was before the first update."""
        if tokens.teacher is None:
            return tokens
        own = logprobs.detach() if tokens.old is None else tokens.old
        distilled = sampled_advantages(own, tokens.teacher)
        return tokens._replace(advantages=distilled + self.reward_weight * tokens.advantages)

    def learns(self, row: Row) -> bool:
        """Every token has something to learn."""
        return True

    # --- the step ---------------------------------------------------------------------------------------------------

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms."""
        if self.objective == "sampled":
            return super().terms
        return ("distill", "policy") if self.reward_weight else ("distill",)

    def losses(self, batch: ModelBatch) -> Micro:
        """Distillation, and GRPO's surrogate beside it where rewards count."""
        if self.objective == "sampled":
            return super().losses(batch)
        tokens = tokens_of(batch, by_completion=self.aggregation == "sequence", device=self.device)
        teacher = self.teacher.head_input(batch)

        def both(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Distilled, FusedScores | None]:
            surrogate = self.fused(hidden, weight, labels, tokens) if self.reward_weight else None
            return self._distilled(hidden, weight, labels, teacher, tokens.weights), surrogate

        out, surrogate = self.policy(batch, head_loss=both)
        terms = {"distill": Term(out.total)}
        if surrogate is not None:
            terms["policy"] = Term(surrogate.total, self.reward_weight)
        nothing = torch.zeros_like(out.logprobs)
        scores = Scores(out.logprobs, out.entropies, nothing, nothing.long(), batch.row_index)
        if surrogate is None:
            return Micro(terms, self.gap(out.logprobs, batch.rows), scores)
        return Micro(terms, self.token_metrics(out.logprobs, tokens, batch), scores)

    def _distilled(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: HeadInput, token_weights: Tensor
    ) -> Distilled:
        return distill(
            hidden,
            weight,
            *teacher,
            token_weights=token_weights.to(hidden.device),
            labels=labels,
            objective=self.objective,
            beta=self.beta,
            k=self.topk,
            temperature=self.temperature,
        )
