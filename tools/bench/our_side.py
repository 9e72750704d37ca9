"""Our contenders: Lightning's Trainer, the data module and the algorithm, as `lightning-vlm fit` puts them together."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L

from lightning_vlm import algorithms
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.spec import Backbone
from tools.bench.material import Material
from tools.bench.worker import Gate
from tools.bench.works import Contender


class Gated(L.Callback):
    """Stops before the first step and after every one."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Model and data are there."""
        self.gate.ready()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """An optimizer step is done and logged."""
        metrics = module.last_step["metrics"]
        self.gate.stepped(metrics["train/loss"], metrics["train/grad_norm"], getattr(module, "lengths", ()))


def train(contender: Contender, material: Material, gate: Gate, *, steps: int) -> None:
    """Train `steps` optimizer steps in this process, at the gate's pace.

    The data is loaded in this process, as the peer does by default, so that no other processor helps.
    """
    warnings.filterwarnings("ignore")
    backbone = Backbone(path=str(material.model))
    shared = {"backbone": backbone, "lr": contender.lr, "schedule": "constant", "clip_norm": 1.0}
    if contender.data == "preference":
        module = getattr(algorithms, contender.method)(**shared, **contender.settings)
    else:
        from tools.bench.our_on_policy import build

        module = build(contender, material, shared)
    data = VLMData(
        backbone=backbone,
        train={contender.data: source(contender.data, material)},
        batch_size=material.size.per_step(contender.data),
        shuffle=False,
        workers=0,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true",
        max_steps=steps,
        logger=False,
        callbacks=[Gated(gate)],
        default_root_dir=material.folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)


def source(kind: str, material: Material) -> SourceSpec:
    """Where data of this kind lies, and its form."""
    where: dict[str, Any] = {"path": str(material.data(kind))}
    if kind == "preference":
        return SourceSpec(kind=kind, **where)
    return SourceSpec(kind="messages", columns={"messages": "prompt"}, **where)
