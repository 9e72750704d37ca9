"""What rollouts earn, and what is told of them: rewards and reports over all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lightning_vlm.algorithms.rollout import Rollout
from lightning_vlm.algorithms.rollout_report import answer_finder, rollout_sums
from lightning_vlm.benchmarks.benchmark import own_rule
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.processor import Processor
from lightning_vlm.rewards import Reward, Rewards
from lightning_vlm.strategies.sync import max_over_ranks, sum_over_ranks


def with_rules(rewards: Mapping[str, Reward], specs: Mapping[str, SourceSpec]) -> dict[str, Reward]:
    """Rewards whose accuracy names its rule: where none is named, what grades the training data in evaluation.

    Raises:
        ValueError: the training data have no such rule, or several.
    """
    out = dict(rewards)
    for name, reward in rewards.items():
        if reward.kind == "accuracy" and reward.rule is None:
            try:
                out[name] = replace(reward, rule=own_rule(specs))
            except ValueError as error:
                raise ValueError(f"model.rewards.{name}: {error}; set its rule, or name another reward") from error
    return out


class Grader:
    """Rewards of one rank's rollouts, and metrics of all ranks'.

    Args:
        rewards: parts by name, maybe none.
        judged: the part that says what is right; None without rewards.
        group_size: completions of a prompt.
        max_new_tokens: of a completion.
        workers: processes for rewards that are functions.
        processor: decodes.
        marks: with what an answer begins (`rollout_report.answer_finder`).
        device: that ranks exchange numbers on.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        *,
        judged: str | None,
        group_size: int,
        max_new_tokens: int,
        workers: int,
        processor: Processor,
        marks: Sequence[str],
        device: torch.device,
    ) -> None:
        self.judged, self.group_size, self.device = judged, group_size, device
        self.scorer = None
        if rewards:
            self.scorer = Rewards(rewards, workers=workers, max_new_tokens=max_new_tokens, device=str(device))

        def decoded(ids: Sequence[int]) -> str:
            return processor.tokenizer.decode(ids, skip_special_tokens=True)

        self.answer_start = answer_finder(decoded, marks)

    def close(self) -> None:
        """End the reward's processes."""
        if self.scorer is not None:
            self.scorer.close()

    def grade(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Fill in `values` and `totals`; how many completions were cut off, by part, and how long it took."""
        if self.scorer is None:
            return {}
        start, size = time.perf_counter(), self.group_size
        table = self.scorer.score([rollout.group for rollout in rollouts])
        for place, rollout in enumerate(rollouts):
            own = slice(place * size, (place + 1) * size)
            rollout.values, rollout.totals = table.values[own], table.totals[own]
        late = sum_over_ranks([float(table.timed_out[name]) for name in table.names], self.device)
        told = {f"timed_out/{name}": n for name, n in zip(table.names, late, strict=True)}
        return told | {"reward_seconds": time.perf_counter() - start}

    def report(self, rollouts: Sequence[Rollout], seconds: float) -> dict[str, float]:
        """Metrics of graded rollouts (`rollout_report.rollout_sums`), and the speed of generating.

        Args:
            rollouts: of this rank. seconds: that this rank took to generate them.
        """
        sums = rollout_sums(
            rollouts,
            names=self.scorer.names if self.scorer else (),
            judged=self.judged if self.scorer else None,
            group_size=self.group_size,
            answer_start=self.answer_start,
        )
        flat = sum_over_ranks([value for pair in sums.values() for value in pair], self.device)
        pairs = dict(zip(sums, zip(flat[::2], flat[1::2], strict=True), strict=True))
        longest = max_over_ranks([seconds], self.device)[0]
        told = {name: total / count for name, (total, count) in pairs.items() if count}
        tokens = pairs["completion_length"][0]
        return told | {"rollout_seconds": longest, "rollout_tokens_per_second": tokens / longest}
