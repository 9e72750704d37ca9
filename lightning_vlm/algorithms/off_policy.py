"""Completions that the student did not write: the data's answers, or the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning_vlm.algorithms.rollout import Rollout
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.data.sources.base import hash_unit
from lightning_vlm.models.batch import Row
from lightning_vlm.rollouts import Completion, PolicyEngine, prompt_of
from lightning_vlm.strategies.sync import unsharded

if TYPE_CHECKING:
    from lightning_vlm.algorithms.opd import OPD


class OffPolicy:
    """A share of prompts is answered by somebody else (GKD, Agarwal et al. 2024, algorithm 1).

    Args:
        module: the algorithm.
        share: of prompts, drawn by (seed, step, id), so that neither rank nor order matters.
        writer: who answers them.
    """

    def __init__(self, module: OPD, share: float, writer: Literal["data", "teacher"]) -> None:
        self.module, self.share, self.writer = module, share, writer

    def split(self, batch: StepBatch) -> tuple[StepBatch, StepBatch]:
        """What the student answers, and what others do."""
        module = self.module
        parts = StepBatch([], [], list(batch.skipped)), StepBatch([], [])
        rows = zip(batch.items, batch.samples, batch.steps, batch.places, strict=True)
        for item, sample, step, place in rows:
            other = hash_unit(module.seed, f"off-policy/{module.clock}/{sample.id}") < self.share
            parts[other].items.append(item)
            parts[other].samples.append(sample)
            parts[other].steps.append(step)
            parts[other].places.append(place)
        return parts

    def rollouts(self, batch: StepBatch, attempt: int) -> list[Rollout]:
        """The answers of others; all ranks call this together where the teacher writes."""
        if not self.share:
            return []
        if self.writer == "data":
            completions = [[self._answer(item[0])] for item in batch.items]
            prompts = [prompt_of(item[0]) for item in batch.items]
        else:
            prompts = [item[0] for item in batch.items]
            completions = self._teachers([item[-1] for item in batch.items])
        rows = zip(batch.items, prompts, batch.samples, completions, batch.steps, batch.places, strict=True)
        return [
            Rollout(prompt, item[1:], sample, own, (attempt, step, place), writer=self.writer)
            for item, prompt, sample, own, step, place in rows
        ]

    def _answer(self, row: Row) -> Completion:
        ids = row.input_ids[row.loss_mask].tolist()
        text = self.module.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(ids=ids, text=text, finished=True, logprobs=[], sampling_logprobs=[])

    def _teachers(self, prompts: list[Row]) -> list[list[Completion]]:
        module = self.module
        teacher = module.teacher
        size = module.generation.batch_size
        engine = PolicyEngine(teacher.frozen["teacher"], teacher.processor, batch_size=size, context=unsharded)
        keys = (module.seed, module.clock)
        return engine.generate(prompts, n=module.group_size, sampling=module.rollout, keys=keys)
