"""Adapter files: what was trained beside a frozen model, and nothing else, starts another run where this one ended."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lightning_vlm.algorithms import SFT
from lightning_vlm.cli.main import main
from lightning_vlm.export.provenance import file_hash
from lightning_vlm.models.lora import is_lora
from lightning_vlm.models.parts import PartPolicy

from .test_export import NAMES, checkpoint_of, logits, make

FROZEN = PartPolicy(freeze=True)
SETTINGS = {
    "lora": {"vision": FROZEN, "projector": FROZEN, "language": PartPolicy(lora_rank=2, lora_alpha=3.0)},
    "projector": {"vision": FROZEN, "language": FROZEN},
    "both": {"vision": PartPolicy(lora_rank=2), "language": PartPolicy(lora_rank=4)},
}


def trained(name, parts):
    """A model whose trainable weights have moved."""
    backbone, policy, processor = make(name, parts)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    return backbone, policy, processor


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_the_adapter_starts_at_the_exported_model(tmp_path, name, settings, capsys):
    parts = SETTINGS[settings]
    backbone, policy, processor = trained(name, parts)
    ckpt = checkpoint_of(tmp_path / "checkpoints" / "step-00000007.ckpt", backbone, policy, parts)
    assert main(["export", str(ckpt), "--adapter", "--out", str(tmp_path / "adapter")]) == 0
    assert main(["export", str(ckpt), "--out", str(tmp_path / "model")]) == 0
    file = tmp_path / "adapter" / "adapter.safetensors"
    assert f"adapter: {file}" in capsys.readouterr().out

    written = load_file(file)
    assert set(written) == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(is_lora(n) for n in written) == (settings == "lora")
    facts = json.loads((file.parent / "provenance.json").read_text())
    assert (facts["step"], facts["checkpoint"], facts["hash"]) == (7, str(ckpt), file_hash([file]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "checkpoints", "model"]

    module = SFT(backbone=replace(backbone, adapter=str(file.parent)), parts=parts)
    module.processor = processor
    module.configure_model()
    started = logits(module.policy.model.eval(), processor)
    assert torch.equal(started, logits(policy.model, processor))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(started, logits(plain, processor), atol=1e-5)
    assert not torch.allclose(started, logits(make(name)[1].model, processor), atol=1e-2)


def test_an_adapter_in_another_dtype(tmp_path):
    backbone, policy, _ = trained(NAMES[0], SETTINGS["lora"])
    ckpt = checkpoint_of(tmp_path / "step-00000007.ckpt", backbone, policy, SETTINGS["lora"])
    assert main(["export", str(ckpt), "--adapter", "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter.safetensors").values()} == {torch.bfloat16}


def test_provenance_of_what_started_from_an_adapter_names_it(tmp_path):
    backbone, policy, _ = trained(NAMES[0], SETTINGS["lora"])
    backbone.adapter = "runs/first/adapter"
    ckpt = checkpoint_of(tmp_path / "step-00000007.ckpt", backbone, policy, SETTINGS["lora"])
    assert main(["export", str(ckpt), "--out", str(tmp_path / "model")]) == 0
    facts = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert facts["adapter"] == "runs/first/adapter" and facts["parent"]["path"] == backbone.path


def test_an_adapter_fits_the_weights_it_was_trained_beside(tmp_path):
    """In whatever dtype they are; a model of the same sizes with other weights is refused."""
    backbone, policy, processor = trained(NAMES[0], SETTINGS["lora"])
    ckpt = checkpoint_of(tmp_path / "step-00000007.ckpt", backbone, policy, SETTINGS["lora"])
    assert main(["export", str(ckpt), "--adapter", "--out", str(tmp_path / "out")]) == 0
    for change, fits in (({"dtype": "bfloat16"}, True), ({"seed": backbone.seed + 1}, False)):
        module = SFT(backbone=replace(backbone, adapter=str(tmp_path / "out"), **change), parts=SETTINGS["lora"])
        module.processor = processor
        if fits:
            module.configure_model()
            continue
        with pytest.raises(ValueError, match=r"adapter .*out' was trained beside other weights than those of backbone"):
            module.configure_model()
