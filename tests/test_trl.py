"""Ours against TRL on the very same tokens: loss and every gradient of DPO."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
from torch import Tensor

from lightning_vlm.algorithms import DPO
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.spec import Backbone
from tools.bench.material import SIZES, Material, make_material, make_model

pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")

BETA = 0.3


class Outcome(NamedTuple):
    """Of one batch: token ids of all rows in order chosen…, rejected…; loss; gradient of every parameter by name."""

    ids: list[list[int]]
    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    """One batch of pairs with pictures, answers of different lengths, and another model to refer to."""
    folder = tmp_path_factory.mktemp("trl")
    material = make_material(folder, SIZES["tiny"], steps=1)
    make_model(folder / "reference", SIZES["tiny"], seed=1)
    data = material.data("preference")
    # Of different lengths, so that padding counts.
    data.write_text(data.read_text().replace('"rejected": "', '"rejected": "a longer answer, '))
    return material


def theirs(material: Material, monkeypatch, *, compact: bool) -> Outcome:
    """TRL's loss and gradients, by its trainer's own collator and `compute_loss`."""
    import trl.trainer.utils
    from transformers import AutoModelForImageTextToText
    from trl import DPOConfig, DPOTrainer

    from lightning_vlm.models.processor import load_processor
    from tools.bench.trl_side import preference_data

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: compact)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = DPOConfig(
        str(material.folder / "out"),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
    )
    data = preference_data(material)
    trainer = DPOTrainer(
        str(material.model),
        ref_model=AutoModelForImageTextToText.from_pretrained(material.folder / "reference"),
        args=config,
        train_dataset=data,
        processing_class=load_processor(Backbone(path=str(material.model))).hf,
    )
    batch = trainer.data_collator([dict(row) for row in data])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return Outcome(ids, loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()})


class Rows(L.Callback):
    """Keeps the ids that the step sees."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        both = zip(*([row.input_ids.tolist() for row in item] for item in batch.items), strict=True)
        self.ids = [ids for side in both for ids in side]


def ours(material: Material, tmp_path: Path, **settings) -> Outcome:
    """Our loss and gradients, from one real optimizer step behind the real data loader."""
    backbone = Backbone(path=str(material.model))
    reference = str(material.folder / "reference")
    module = DPO(backbone=backbone, beta=BETA, reference="online", reference_model=reference, clip_norm=0.0, **settings)
    source = SourceSpec(kind="preference", path=str(material.data("preference")))
    data = VLMData(backbone=backbone, train={"pairs": source}, batch_size=2, shuffle=False, workers=0)
    rows = Rows()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        callbacks=[rows],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    gradients = {name: p.grad for name, p in module.policy.model.named_parameters()}
    return Outcome(rows.ids, module.last_step["metrics"]["train/loss"], gradients)


@pytest.mark.parametrize("compact", [False, True], ids=["as shipped", "compacted"])
@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "none"},
        {"weighting": "cooling", "ell_floor": -1e6},  # the cooling weight is 1: CW-DPO is DPO
        {"micro_batch_tokens": 1},  # a pair at a time
        {"share_prompts": False},
    ],
    ids=["dpo", "cw_dpo, weight 1", "micro-batches", "rows apart"],
)
def test_dpo_equals_trl(material, monkeypatch, tmp_path, settings, compact):
    peer = theirs(material, monkeypatch, compact=compact)
    mine = ours(material, tmp_path, **settings)
    assert mine.ids == peer.ids
    assert len({len(ids) for ids in mine.ids}) > 1
    assert abs(peer.loss - 0.6931) > 1e-3, "policy and reference must differ, or the loss says nothing"
    assert mine.loss == pytest.approx(peer.loss, rel=1e-5)
    assert mine.gradients.keys() == peer.gradients.keys()
    for name, gradient in peer.gradients.items():
        assert gradient.abs().max() > 0, name
        gap = (mine.gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert gap < 1e-4, name
