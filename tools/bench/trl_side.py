"""The peer's contenders: TRL's trainers with their own defaults, on the same model directory and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import trl
import trl.trainer.distillation_trainer
import trl.trainer.utils
from datasets import Dataset, Image, List
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from tools.bench.material import Material
from tools.bench.worker import Gate
from tools.bench.works import Contender


class Gated(TrainerCallback):
    """Stops before the first step and after every one; a step ends with its line in the log.

    Attributes:
        loss: of the step so far, set by the trainer. lengths: of the completions sampled in it, in tokens.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.loss = torch.zeros(())
        self.lengths: Sequence[int] = ()

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Models and data are there."""
        self.gate.ready()

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs: Any) -> None:
        """An optimizer step is done and logged."""
        if "grad_norm" in logs:
            loss, self.loss = float(self.loss), torch.zeros(())
            self.gate.stepped(loss, float(logs["grad_norm"]), self.lengths)


class TellsLoss:
    """Mixin of a trainer of TRL that tells the loss before it is rounded for the log."""

    gated: Gated

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own loss, of a micro-batch; they add up to the step's."""
        loss = super().compute_loss(*args, **kwargs)
        self.gated.loss = self.gated.loss + loss.detach()
        return loss


class GatedDPO(TellsLoss, DPOTrainer):
    """TRL's DPO."""


def train(contender: Contender, material: Material, gate: Gate, *, steps: int) -> None:
    """Train `steps` optimizer steps in this process, at the gate's pace."""
    if contender.compact:
        score_labels_only()
    if contender.method != "DPO":
        from tools.bench.trl_on_policy import run

        run(contender, material, gate, steps=steps)
        return
    config = DPOConfig(**shared(contender, material, steps), train_sampling_strategy="sequential")
    gated = Gated(gate)
    trainer = GatedDPO(args=config, train_dataset=preference_data(material), **loaded(material), callbacks=[gated])
    trainer.gated = gated
    trainer.train()


def shared(contender: Contender, material: Material, steps: int) -> dict[str, Any]:
    """What the configurations of all trainers have in common, and the contender's own.

    A step is one batch. Compacted, it is cut into micro-batches of TRL's default size, which takes as long and far less
    memory.
    """
    rows = material.size.per_step(contender.data) * material.size.samples(contender.data)
    together = min(8, rows) if contender.compact else rows
    return {
        "output_dir": str(material.folder / "trl"),
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": rows // together,
        "max_steps": steps,
        "learning_rate": contender.lr,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": not contender.compact,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **contender.settings,
    }


def loaded(material: Material) -> dict[str, Any]:
    """The trainers' model, and the family's own processor without its video part, which needs torchvision."""
    processor = load_processor(Backbone(path=str(material.model))).hf
    return {"model": str(material.model), "processing_class": processor}


def score_labels_only() -> None:
    """Have TRL compute log-probs of labelled positions alone, which it does by itself only where Triton runs.

    Raises:
        ValueError: a version of TRL that decides otherwise.
    """
    for module in (trl.trainer.utils, trl.trainer.distillation_trainer):
        if not hasattr(module, "_use_triton"):
            raise ValueError(f"trl {trl.__version__} cannot be made to score labels only on a CPU: install trl 1.16")
        module._use_triton = lambda device: True


def preference_data(material: Material) -> Dataset:
    """The pairs as TRL wants them."""
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "images": row["images"],
        }
        for row in material.rows("preference")
    ]
    return with_pictures(rows)


def with_pictures(rows: list[dict[str, Any]]) -> Dataset:
    """A data set whose pictures are opened when their batch is made."""
    return Dataset.from_list(rows).cast_column("images", List(Image()))
