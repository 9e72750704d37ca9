"""Algorithms that learn from what the policy itself has just written: rollouts, rewards, and how they make a step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.generation import Generation
from lightning_vlm.algorithms.grading import Grader, with_rules
from lightning_vlm.algorithms.micro import Item
from lightning_vlm.algorithms.reference import score_rows
from lightning_vlm.algorithms.rollout import (
    CORRECTION,
    ENGINE,
    ENTROPIES,
    OLD,
    SAMPLING,
    Rollout,
    Together,
    items_of,
    keep_first,
)
from lightning_vlm.algorithms.totals import StepTotals
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.losses.policy_gradient import Correction, correction_factors
from lightning_vlm.models.batch import Row
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Completion, RolloutSampling, prompt_of
from lightning_vlm.strategies.sync import gather_over_ranks, max_over_ranks, sum_over_ranks

_GAPS = {
    "float64": 1e-6,
    "float32": 1e-3,
}  # nats per token between engine and trainer; rounding of other dtypes is more
_ROUGH_GAP = 0.1


class OnPolicy(Algorithm):
    r"""Base of the algorithms that learn from rollouts of the policy.

    `data.batch_size` counts prompts of one optimizer step. The engine's log-probs are held against the trainer's in the
    first step after every rollout (`train/logprob_gap`).

    Args:
        rewards: the reward's parts by name; none takes the accuracy by the training data's own grading rule, where an
            algorithm needs a reward.
        group_size: completions per prompt.
        rollout: how completions are drawn; temperature 1 and at most 256 tokens by default. Log-probs are scored at its
            temperature.
        steps_per_rollout: optimizer steps whose prompts are answered together, by the policy as it is then.
        epochs: how often each completion is learned from.
        mask_truncated: leave out completions that were cut at the length limit; advantages of the others still know
            them.
        old_logprobs: where the log-probs before the first update come from if a rollout feeds several: `engine` takes
            the engine's, `recompute` runs the trainer's forward once more; None takes the engine's where it runs in
            the policy's own precision.
        correction: for what the engine draws otherwise than the policy would (`rollout_dtype`, top-p, a server):
            `truncate` weighs tokens by min(π/π_engine, cap), `mask` drops completions whose mean ratio lies outside of
            [1/cap, cap], `none` trusts the engine.
        correction_cap: see `correction`.
        rollout_batch_size: sequences generated together on one rank; changes speed and memory, not what is drawn.
        rollout_dtype: generate with a copy of the policy in this dtype, such as `bfloat16`; None with the policy.
        server: address of a vLLM server that generates, such as http://localhost:8000, started as docs/rollouts.md
            says; None generates in this process.
        reward_workers: processes per rank for rewards that are functions of yours.
        answer_marks: texts with whose last occurrence the answer begins, in order of preference; for the split of
            entropies into thinking and answer.
        max_gap: nats per token by which engine and trainer may differ on average; None takes 0.001 in float32.
        **kwargs: see `Algorithm`.

    Raises:
        ValueError: a number out of range, or a setting without effect.
    """

    encoding = "prompt"

    def __init__(
        self,
        *,
        rewards: dict[str, Reward] | None = None,
        group_size: int = 8,
        rollout: RolloutSampling | None = None,
        steps_per_rollout: int = 1,
        epochs: int = 1,
        mask_truncated: bool = False,
        old_logprobs: Literal["engine", "recompute"] | None = None,
        correction: Correction = "none",
        correction_cap: float = 2.0,
        rollout_batch_size: int = 64,
        rollout_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        server: str | None = None,
        reward_workers: int = 2,
        answer_marks: list[str] | None = None,
        max_gap: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("group_size", group_size),
            ("steps_per_rollout", steps_per_rollout),
            ("epochs", epochs),
            ("rollout_batch_size", rollout_batch_size),
            ("reward_workers", reward_workers),
            ("correction_cap", correction_cap),
        ):
            if value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
        if max_gap is not None and max_gap <= 0:
            raise ValueError(f"model.max_gap must be positive, got {max_gap}; leave it out for the default")
        self.rollout = rollout or RolloutSampling()
        if self.rollout.greedy:
            raise ValueError(
                "model.rollout.temperature is 0: greedy completions of one prompt are all the same and nothing can be "
                "learned from comparing them; set it to 1.0"
            )
        if correction not in ("none", "truncate", "mask"):
            raise ValueError(f"model.correction is {correction!r}; choose none, truncate or mask")
        if old_logprobs not in (None, "engine", "recompute"):
            raise ValueError(f"model.old_logprobs is {old_logprobs!r}; choose engine or recompute")
        if server is not None and rollout_dtype is not None:
            raise ValueError(
                "model.rollout_dtype has no effect with model.server: the server has its own; leave it out"
            )
        self.rewards = rewards or {}
        self.group_size, self.temperature = group_size, self.rollout.temperature
        self.steps_loaded, self.steps_per_batch = steps_per_rollout, steps_per_rollout * epochs
        self.epochs, self.mask_truncated, self.old_logprobs = epochs, mask_truncated, old_logprobs
        self.correction, self.correction_cap = correction, correction_cap
        self.reward_workers, self.max_gap = reward_workers, max_gap
        self.answer_marks = ["</think>", "<answer>", "\\boxed{"] if answer_marks is None else answer_marks
        if old_logprobs is not None and self.steps_per_batch == 1 and correction == "none":
            raise ValueError(
                "model.old_logprobs has no effect where a rollout feeds one optimizer step: the old log-probs are the "
                "present ones; leave it out"
            )
        self.generation = Generation(self, batch_size=rollout_batch_size, dtype=rollout_dtype, server=server)
        self.needs_pictures = server is not None
        self.refills = 0  # how many batches of further prompts were drawn so far
        self.last_rollouts: list[Rollout] = []
        self._fresh: dict[str, float] = {}
        self._updates = 0  # since the rollout
        self.grader: Grader | None = None

    # --- what a subclass says ---------------------------------------------------------------------------------------

    needs_rewards: bool = True
    tries: int = 0  # how often groups without spread are replaced

    @property
    def judged(self) -> str | None:
        """The part of the reward that says what is right; None without rewards."""
        return next(iter(self.rewards), None)

    def advise(self, rollouts: list[Rollout]) -> None:
        """Give every row its advantages."""
        raise NotImplementedError(f"{type(self).__name__} must define advise()")

    def learns(self, row: Row) -> bool:
        """Whether a completion can have a gradient; those that cannot are counted, but not run."""
        return True

    def annotate(self, items: list[Item]) -> None:
        """What else a row must know before the first update, such as log-probs of other models."""

    def usable(self, rollout: Rollout) -> bool:
        """Whether a group is worth learning from, when groups without spread are replaced."""
        return True

    # --- life -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Where no reward is named, what grades the training data in evaluation is one."""
        super().setup(stage)
        if stage == "fit":
            named = self.rewards or ({"accuracy": Reward(kind="accuracy")} if self.needs_rewards else {})
            self.rewards = with_rules(named, self.trainer.datamodule.train_specs)

    def extend_policy(self) -> None:
        """Whoever generates is made while the policy is whole."""
        if self.trainer.state.fn == "fit":
            self.generation.prepare()

    def on_fit_start(self) -> None:
        """Rewards and generation are ready before the first step, so that what is wrong shows at once."""
        super().on_fit_start()
        self.generation.start()
        self.grader = Grader(
            self.rewards,
            judged=self.judged,
            group_size=self.group_size,
            max_new_tokens=self.rollout.max_new_tokens,
            workers=self.reward_workers,
            processor=self.processor,
            marks=self.answer_marks,
            device=self.device,
        )
        self._together = Together.of(self.policy, self.group_size if self.share_prompts else 1)

    def teardown(self, stage: str) -> None:
        """End the reward's processes."""
        if self.grader is not None:
            self.grader.close()
        super().teardown(stage)

    # --- rollout ----------------------------------------------------------------------------------------------------

    def generate(self, rows: list[Row], keys: tuple[int, int]) -> list[list[Completion]]:
        """`group_size` completions of each prompt by the policy as it is; all ranks call this together."""
        return self.generation.generate(rows, n=self.group_size, sampling=self.rollout, keys=keys)

    def optimizer_batches(self, batch: StepBatch) -> Iterable[list[Item]]:
        """Rollouts for all steps this batch feeds, then the items of each step, `epochs` times."""
        steps = self._collect(batch)
        self.last_rollouts = [rollout for rollouts in steps for rollout in rollouts]
        for rollout in self.last_rollouts:
            rollout.make_rows(truncated=not self.mask_truncated)
        self.advise(self.last_rollouts)
        items = [items_of(rollouts, self._together) for rollouts in steps]
        everything = [item for own in items for item in own]
        self._old_logprobs(everything)
        self.annotate(everything)
        self._updates = 0
        for _ in range(self.epochs):
            for own in items:
                if self._total_steps and self.clock >= self._total_steps:
                    return
                yield own
                self._updates += 1

    def _collect(self, batch: StepBatch) -> list[list[Rollout]]:
        """The rollouts of each optimizer step; groups without spread are replaced where that is wanted."""
        found = self.answered(batch, attempt=0)
        wanted = int(sum_over_ranks([float(len(found))], self.device)[0])
        if not self.tries:
            rounds = int(max_over_ranks([max(batch.steps, default=0) + 1.0], self.device)[0])
            return [[r for r in found if r.place[1] == step] for step in range(min(rounds, self.steps_loaded))]
        kept = [rollout for rollout in found if self.usable(rollout)]
        first, tried = sum_over_ranks([float(len(kept))], self.device)[0], 0
        while int(sum_over_ranks([float(len(kept))], self.device)[0]) < wanted and tried < self.tries:
            tried += 1
            more = self.trainer.datamodule.more_prompts(self.refills)
            self.refills += 1
            kept += [rollout for rollout in self.answered(more, attempt=tried) if self.usable(rollout)]
        numbers = keep_first(gather_over_ranks([rollout.place for rollout in kept]), wanted)
        self._fresh |= {"refills": float(tried), "groups": float(len(numbers)), "groups_usable": first / max(wanted, 1)}
        size = -(-wanted // self.steps_loaded)
        steps: list[list[Rollout]] = [[] for _ in range(self.steps_loaded)]
        for rollout in kept:
            if rollout.place in numbers:
                steps[numbers[rollout.place] // size].append(rollout)
        return steps

    def answered(self, batch: StepBatch, *, attempt: int) -> list[Rollout]:
        """Completions and rewards of the batch's prompts; what the first attempt finds is reported."""
        start = time.perf_counter()
        # Further prompts may repeat earlier ones; their draws must not.
        keys = (self.seed, self.clock + attempt * 2**40)
        # Where the data's answers come along, prompts end before them.
        prompts = [prompt_of(item[0]) if self.encoding == "answer" else item[0] for item in batch.items]
        completions = self.generate(prompts, keys)
        seconds = time.perf_counter() - start
        world, rank = self.trainer.world_size, self.global_rank
        rows = zip(batch.items, prompts, batch.samples, completions, batch.steps, batch.places, strict=True)
        rollouts = [
            Rollout(prompt, item[1:], sample, own, (attempt, step, place * world + rank))
            for item, prompt, sample, own, step, place in rows
        ]
        graded = self.grader.grade(rollouts)
        if attempt == 0:
            self._fresh = self.grader.report(rollouts, seconds) | graded
        return rollouts

    def _old_logprobs(self, items: list[Item]) -> None:
        """Log-probs before the first update, where a rollout feeds several or its draws are to be corrected for."""
        if self.steps_per_batch == 1 and self.correction == "none":
            return
        source = self.old_logprobs or ("engine" if self.generation.exact else "recompute")
        rows = [row for item in items for row in item]
        if source == "engine":
            for row in rows:
                row.info[OLD] = row.info[ENGINE]
        else:
            score_rows(self, self.policy, items, OLD)
        if self.correction == "none":
            return
        for row in rows:
            index = torch.zeros(row.scored, dtype=torch.long)
            row.info[CORRECTION] = correction_factors(
                row.info[OLD].double(), row.info[SAMPLING], index, 1, self.correction, self.correction_cap
            )

    # --- the step ---------------------------------------------------------------------------------------------------

    def gradient(self, items: list[Item]) -> tuple[dict[str, float], dict[str, float], StepTotals]:
        """Rows that can have no gradient are counted, but not run."""
        active = [rows for item in items if (rows := [row for row in item if self.learns(row)])]
        counts, report, step = self.accumulate(active, self.losses, self.counts(items))
        rows = [row for item in items for row in item]
        self.idle = not report["tokens"]  # rows may be dummies
        # Exact, of every token that was sampled: the engine has seen them all.
        known = [row.info[ENTROPIES] for row in rows if ENTROPIES in row.info]
        self._entropies = torch.cat(known) if known else None
        if self._updates == 0:
            self._check_gap(report)
        report |= self._fresh
        self._fresh = {}
        return counts, report, step

    def _check_gap(self, report: dict[str, float]) -> None:
        limit = self.max_gap or (_GAPS.get(self.backbone.dtype, _ROUGH_GAP) if self.generation.exact else _ROUGH_GAP)
        gap = report.get("logprob_gap", 0.0)
        if gap <= limit or not report["tokens"]:
            return
        message = (
            f"engine and trainer differ by {gap:.3g} nats per token at optimizer step {self.clock}, more than "
            f"{limit:g}: what is learned from is not what the policy would write. Dropout in the model, other weights "
            "on the server, or a low precision do this; set model.correction, or model.max_gap if you know why"
        )
        if self.clock == 0:
            raise ValueError(message)
        rank_zero_warn(message)

    def gap(self, logprobs: torch.Tensor, rows: list[Row]) -> dict[str, tuple[torch.Tensor, float]]:
        """The metric that holds the engine's log-probs against the trainer's, before the first update only."""
        if self._updates:
            return {}
        own = [row.info[ENGINE] for row in rows if row.scored]
        if not own:  # a rank with nothing to run tells the same names
            return {"logprob_gap": (logprobs.new_zeros(()), 0.0)}
        gaps = (logprobs.detach() - torch.cat(own).to(logprobs)).abs()
        known = ~gaps.isnan()
        return {"logprob_gap": (gaps[known].sum(), float(known.sum()))}

    def _report(self, report, norms, rates, step: StepTotals) -> None:
        report["update_tokens_per_second"] = report["tokens"] / report["seconds"]
        super()._report(report, norms, rates, step)
        if self._entropies is not None:
            self.last_step["entropies"] = self._entropies

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the place among further prompts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lightning_vlm"]["refills"] = self.refills

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.refills = checkpoint["lightning_vlm"]["refills"]
