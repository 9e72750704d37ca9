"""The peer's contenders: TRL's trainers with their own defaults, on the same model directory and data."""

from __future__ import annotations

import json
from typing import Any

import torch
import trl
import trl.trainer.utils
from datasets import Dataset, Image, List
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from tools.bench.material import Material
from tools.bench.worker import Gate
from tools.bench.works import LR, Contender


class Gated(TrainerCallback):
    """Stops before the first step and after every one; a step ends with its line in the log."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.loss = torch.zeros(())

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Models and data are there."""
        self.gate.ready()

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs: Any) -> None:
        """An optimizer step is done and logged."""
        if "grad_norm" in logs:
            self.gate.stepped(float(self.loss), float(logs["grad_norm"]))


class GatedDPO(DPOTrainer):
    """TRL's trainer, which tells the loss before it is rounded for the log."""

    gated: Gated

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own loss."""
        loss = super().compute_loss(*args, **kwargs)
        self.gated.loss = loss.detach()
        return loss


def train(contender: Contender, material: Material, gate: Gate, *, steps: int) -> None:
    """Train `steps` optimizer steps in this process, at the gate's pace."""
    if contender.compact:
        score_labels_only()
    gated = Gated(gate)
    config = DPOConfig(
        str(material.folder / "trl"),
        per_device_train_batch_size=material.size.batch,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=not contender.compact,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **contender.settings,
    )
    trainer = GatedDPO(
        str(material.model),
        args=config,
        train_dataset=preference_data(material),
        # The family's own processor without its video part, which needs torchvision.
        processing_class=load_processor(Backbone(path=str(material.model))).hf,
        callbacks=[gated],
    )
    trainer.gated = gated
    trainer.train()


def score_labels_only() -> None:
    """Have TRL compute log-probs of labelled positions alone, which it does by itself only where Triton runs.

    Raises:
        ValueError: a version of TRL that decides otherwise.
    """
    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise ValueError(f"trl {trl.__version__} cannot be made to score labels only on a CPU: install trl 1.16")
    trl.trainer.utils._use_triton = lambda device: True


def preference_data(material: Material) -> Dataset:
    """The pairs as TRL wants them; pictures are opened when their batch is made."""
    rows = [json.loads(line) for line in material.data("preference").read_text().splitlines()]
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "images": [str(material.folder / name) for name in row["images"]],
        }
        for row in rows
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))
