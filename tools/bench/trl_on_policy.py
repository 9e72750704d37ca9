"""The peer's contenders that sample: GRPO, on-policy distillation, and sampling alone."""

from __future__ import annotations

from itertools import chain
from typing import Any

from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from tools.bench.material import Material
from tools.bench.scores import checksum, reward
from tools.bench.trl_side import Gated, TellsLoss, loaded, shared, with_pictures
from tools.bench.worker import Gate
from tools.bench.works import WARM_UP, Contender

Completions = list[list[int]]


class Prepared(TellsLoss):
    """Mixin of a trainer of TRL that takes prepared completions in the first steps, and samples after them.

    Attributes:
        prepared: the completions of each of those steps, all samples of a prompt side by side.
    """

    prepared: list[Completions]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own sampling, or what was prepared in its stead."""
        if self.state.global_step < len(self.prepared):
            ids = self.prepared[self.state.global_step]
            out = self.as_generated(ids)
        else:
            out = super()._generate_single_turn(*args, **kwargs)
            ids = out[0] if isinstance(out, tuple) else out
        self.gated.lengths = [len(completion) for completion in ids]
        return out

    def as_generated(self, ids: Completions) -> Any:
        """Completions in the form in which the trainer samples them."""
        return ids


class GatedGRPO(Prepared, GRPOTrainer):
    """TRL's GRPO."""

    def as_generated(self, ids: Completions) -> tuple[Completions, None]:
        """With the place of log-probs, which are not kept."""
        return ids, None


class GatedDistillation(Prepared, DistillationTrainer):
    """TRL's on-policy distillation."""


def run(contender: Contender, material: Material, gate: Gate, *, steps: int) -> None:
    """Do `steps` steps in this process, at the gate's pace."""
    if contender.method == "Rollout":
        roll(contender, material, gate, steps=steps)
        return
    make = {"GRPO": make_grpo, "OPD": make_distillation}[contender.method]
    trainer = make(contender, material, gate, steps=steps)
    trainer.prepared = [list(chain(*step)) for step in material.prepared[contender.data]]
    trainer.train()


def make_grpo(contender: Contender, material: Material, gate: Gate, *, steps: int) -> GatedGRPO:
    """TRL's defaults where they are not named: scaled by the group's deviation, a token mean over the whole step."""
    config = GRPOConfig(
        **shared(contender, material, steps),
        num_generations=material.size.group,
        max_completion_length=material.size.completion,
        shuffle_dataset=False,
        loss_type="dapo",
    )
    return gated(
        GatedGRPO,
        gate,
        args=config,
        train_dataset=prompts(contender, material),
        reward_funcs=reward,
        **loaded(material),
    )


def make_distillation(contender: Contender, material: Material, gate: Gate, *, steps: int) -> GatedDistillation:
    """TRL's distillation with the divergence KL(student, teacher)."""
    config = DistillationConfig(
        **shared(contender, material, steps),
        max_completion_length=material.size.completion,
        shuffle_dataset=False,
        beta=1.0,
    )
    data = prompts(contender, material)
    teacher = str(material.teacher)
    return gated(GatedDistillation, gate, args=config, train_dataset=data, teacher_model=teacher, **loaded(material))


def gated(trainer: type, gate: Gate, **arguments: Any) -> Any:
    """A trainer that stops at the gate."""
    callback = Gated(gate)
    made = trainer(**arguments, callbacks=[callback])
    made.gated = callback
    return made


def prompts(contender: Contender, material: Material) -> Any:
    """Prompts as TRL wants them."""
    rows = material.rows(contender.data)
    return with_pictures([{"prompt": row["prompt"], "images": row["images"]} for row in rows])


def roll(contender: Contender, material: Material, gate: Gate, *, steps: int) -> None:
    """Sample as TRL's GRPO does, from opening the pictures to the decoded texts; greedily in the warm-up."""
    trainer = make_grpo(contender, material, gate, steps=steps)
    trainer.prepared = []
    trainer.model.train()
    rows, size = trainer.train_dataset, material.size
    gate.ready()
    for step in range(steps):
        trainer.generation_config.do_sample = step >= WARM_UP
        some = (rows[n] for n in range(step * size.prompts, (step + 1) * size.prompts))
        asked = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in some]
        ids = trainer._generate([prompt for prompt in asked for _ in range(size.group)])[1]
        lengths = [len(completion) for completion in ids]
        gate.stepped(checksum(list(chain(*ids))), sum(lengths), lengths)
