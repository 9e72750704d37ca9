"""Our contenders that sample: GRPO, on-policy distillation, and sampling alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_vlm.algorithms import GRPO, OPD
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Completion, Sampling, completion_row
from tools.bench import scores
from tools.bench.material import Material
from tools.bench.works import WARM_UP, Contender


class Prepared:
    """Mixin of an on-policy algorithm that takes prepared completions in the first steps, and samples after them.

    Attributes:
        prepared: [step][row][sample] → ids of those steps, rows in the order of the data.
        lengths: tokens of the completions of the last step.
    """

    prepared: list[list[list[list[int]]]]
    lengths: list[int]

    def generate(self, rows: list[Row], keys: tuple[int, int]) -> list[list[Completion]]:
        """The algorithm's own sampling, or what was prepared in its stead."""
        if self.clock < len(self.prepared):
            of_step = self.prepared[self.clock]
            # Prompts are numbered through all steps.
            groups = [self._as_sampled(row, of_step[int(row.id.rpartition("/")[2]) % len(of_step)]) for row in rows]
        else:
            groups = super().generate(rows, keys)
        self.lengths = [len(completion.ids) for group in groups for completion in group]
        return groups

    def _as_sampled(self, prompt: Row, group: list[list[int]]) -> list[Completion]:
        """Ids as completions of this policy, with the log-probs that sampling would have found."""
        processor, policy = self.processor, self.policy
        bare = [
            Completion(
                ids, processor.tokenizer.decode(ids, skip_special_tokens=True), ids[-1] in processor.eos_ids, [], []
            )
            for ids in group
        ]
        batch = collate([completion_row(prompt, completion) for completion in bare], policy.family, processor.pad_id)
        with torch.no_grad():
            found = policy.score(batch).logprobs.split([len(ids) for ids in group])
        return [
            replace(completion, logprobs=logprobs.tolist(), sampling_logprobs=logprobs.tolist())
            for completion, logprobs in zip(bare, found, strict=True)
        ]


class PreparedGRPO(Prepared, GRPO):
    """Our GRPO."""


class PreparedOPD(Prepared, OPD):
    """Our on-policy distillation."""


class Rollout(GRPO):
    """GRPO that stops behind the rollout; greedy in the warm-up.

    Attributes:
        lengths: tokens of the completions of the last step.
    """

    lengths: list[int]

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Sample for every prompt of the batch; nothing is learned."""
        rows = [item[0] for item in batch.items]
        if self.batches_done < WARM_UP:
            sampling = Sampling(max_new_tokens=self.rollout.max_new_tokens)
            keys = (self.seed, self.batches_done)
            groups = self.generation.generate(rows, n=self.group_size, sampling=sampling, keys=keys)
        else:
            groups = self.generate(rows, (self.seed, self.batches_done))
        self.batches_done += 1
        ids = [completion.ids for group in groups for completion in group]
        self.lengths = [len(completion) for completion in ids]
        self.last_step["metrics"] = {
            "train/loss": scores.checksum(list(chain(*ids))),
            "train/grad_norm": float(sum(self.lengths)),
        }


def build(contender: Contender, material: Material, shared: dict[str, Any]) -> L.LightningModule:
    """The algorithm of a contender.

    Args:
        contender: what is to be done. material: model and data. shared: settings that all algorithms have.
    """
    size = material.size
    settings = shared | {
        "rollout": Sampling(temperature=1.0, max_new_tokens=size.completion),
        "group_size": size.samples(contender.data),
        "rollout_batch_size": size.per_step(contender.data) * size.samples(contender.data),
        **contender.settings,
    }
    if contender.method == "OPD":
        module = PreparedOPD(teacher=str(material.teacher), objective="full", **settings)
    else:
        reward = Reward(kind="python", function=f"{Path(scores.__file__)}:reward", style="trl")
        module = {"GRPO": PreparedGRPO, "Rollout": Rollout}[contender.method](rewards={"checksum": reward}, **settings)
    module.prepared = material.prepared[contender.data]
    return module
