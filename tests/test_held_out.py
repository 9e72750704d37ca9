"""The held-out loss against a naive full-logits loss over the same conversations."""

import lightning as L
import pytest
import torch

from callbacks import HeldOutLoss
from lightning_vlm.algorithms import SFT
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.spec import Backbone


def test_held_out_loss_is_the_token_mean_of_the_naive_loss(tmp_path):
    backbone = Backbone(path="embedded:llava-tiny", dtype="float64")
    module = SFT(backbone=backbone, micro_batch_tokens=150)
    data = VLMData(backbone=backbone, eval_batch_size=4, workers=0)
    source = SourceSpec(kind="world", split="val", options={"size": 10})
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[HeldOutLoss(source=source, name="mine")],
    )
    (logged,) = trainer.validate(module, data)
    model, nll, entropy, right, tokens = module.policy.model.eval(), 0.0, 0.0, 0, 0
    with torch.no_grad():
        for sample in data.evaluations["mine"].samples:
            row = data.encoder.encode(sample)
            ids, mask = row.input_ids[None], row.loss_mask[1:]
            logits = model(input_ids=ids, pixel_values=row.images[0].tensors["pixel_values"]).logits[0, :-1][mask]
            logp, labels = logits.double().log_softmax(-1), row.input_ids[1:][mask]
            nll -= logp.gather(1, labels[:, None]).sum().item()
            entropy -= (logp.exp() * logp).sum().item()
            right += (logp.argmax(-1) == labels).sum().item()
            tokens += len(labels)
    assert logged["val/mine/tokens"] == tokens and logged["val/mine/n"] == 10
    assert logged["val/mine/nll"] == pytest.approx(nll / tokens, rel=1e-6)
    assert logged["val/mine/entropy"] == pytest.approx(entropy / tokens, rel=1e-6)
    assert logged["val/mine/token_accuracy"] == pytest.approx(right / tokens)
