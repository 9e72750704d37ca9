"""Exports: what plain transformers loads must be what was trained."""

import errno
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from lightning_vlm.cli.main import main
from lightning_vlm.export import export_checkpoint, make_provenance, parent_of, read_checkpoint, save_model_directory
from lightning_vlm.export.provenance import git_state, weights_hash
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.parts import PartPolicy, apply_parts
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

NAMES = ["qwen2_5_vl-tiny", "llava-tiny"]


def make(name: str, parts: dict[str, PartPolicy] | None = None):
    backbone = Backbone(path=f"embedded:{name}", seed=3)
    model = load_model(backbone).eval()
    family = family_of(model)
    apply_parts(model, family, parts or {})
    return backbone, Policy(model, family), load_processor(backbone)


def logits(model, processor) -> torch.Tensor:
    """Logits on a picture and two words."""
    picture, ids = processor.image(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))
    words = processor.tokenizer("the image shows", add_special_tokens=False)["input_ids"]
    input_ids = torch.tensor([[*ids, *words]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **picture.tensors}
    if "image_grid_thw" in picture.tensors:
        inputs["mm_token_type_ids"] = (input_ids == processor.image_token_id).int()
    with torch.no_grad():
        return model(**inputs).logits


def checkpoint_of(path: Path, backbone: Backbone, policy: Policy, parts: dict[str, PartPolicy], step: int = 7) -> Path:
    """A checkpoint as training writes it."""
    state = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    facts = {"backbone": vars(backbone), "parts": {k: vars(v) for k, v in parts.items()}, "step": step}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "lightning_vlm": facts}, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_reloads_with_equal_logits(tmp_path, name):
    backbone, policy, processor = make(name)
    provenance = make_provenance(backbone.path, step=5)
    out = save_model_directory(policy, processor, tmp_path / "model", provenance)
    plain = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert torch.equal(logits(plain, processor), logits(policy.model, processor))
    again = load_processor(Backbone(path=str(out)))
    assert again.fingerprint() == processor.fingerprint()
    assert set(plain.generation_config.eos_token_id) == processor.eos_ids
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["parent"] == {"path": backbone.path, "hash": None} and facts["step"] == 5
    assert facts["hash"] == weights_hash(out) == parent_of(str(out))["hash"]
    assert "attn" not in (out / "config.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # nothing temporary is left


@pytest.mark.parametrize("name", NAMES)
def test_lora_is_merged_on_a_copy(tmp_path, name):
    parts = {"vision": PartPolicy(freeze=True), "language": PartPolicy(lora_rank=2, lora_alpha=3.0)}
    _, policy, processor = make(name, parts)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.1)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    out = save_model_directory(policy, processor, tmp_path / "model", {})
    plain = AutoModelForImageTextToText.from_pretrained(out).eval()
    expected = logits(policy.model, processor)
    assert torch.allclose(logits(plain, processor), expected, atol=1e-5)
    assert not torch.allclose(logits(make(name)[1].model, processor), expected, atol=1e-2)  # the adapters did something
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoint_to_directory_by_the_command(tmp_path, capsys, lora):
    """`lightning-vlm export` of changed weights, as another dtype; a second time it refuses to overwrite."""
    parts = {"language": PartPolicy(lora_rank=2)} if lora else {}
    backbone, policy, processor = make(NAMES[0], parts)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    ckpt = checkpoint_of(tmp_path / "checkpoints" / "step-00000007.ckpt", backbone, policy, parts)
    argv = ["export", str(ckpt), "--out", str(tmp_path / "model")]
    assert main(argv) == 0
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(logits(plain, processor), logits(policy.model, processor), atol=1e-5 if lora else 0)
    facts = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert facts["step"] == 7 and facts["checkpoint"] == str(ckpt) and len(facts["config_hash"]) == 64
    assert main(argv) == 2
    assert "is there already" in capsys.readouterr().err
    export_checkpoint(ckpt, tmp_path / "half", dtype=torch.bfloat16)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_full_disk_leaves_the_old_directory(tmp_path, monkeypatch):
    _, policy, processor = make(NAMES[0])
    out = save_model_directory(policy, processor, tmp_path / "model", {"step": 1})
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(processor, "save", full)
    with pytest.raises(OSError, match=r"could not write .*model: .*No space left"):
        save_model_directory(policy, processor, out, {"step": 2})
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="is not a checkpoint, or was cut off"):
        read_checkpoint(cut)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="was not written by this package"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a model directory already"):
        read_checkpoint(tmp_path / "hf")
    policy = make(NAMES[0])[1]
    other = checkpoint_of(tmp_path / "other.ckpt", Backbone(path=f"embedded:{NAMES[1]}"), policy, {})
    with pytest.raises(ValueError, match="does not fit embedded:llava-tiny"):
        export_checkpoint(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_git_state_and_parents(tmp_path):
    assert git_state(tmp_path) == {"commit": None, "branch": None, "dirty_bytes": None}
    (tmp_path / "config.json").write_text("{}")
    first = parent_of(str(tmp_path))["hash"]
    (tmp_path / "config.json").write_text("{ }")
    assert first != parent_of(str(tmp_path))["hash"]
    assert parent_of("Qwen/Qwen2.5-VL-3B-Instruct") == {"path": "Qwen/Qwen2.5-VL-3B-Instruct", "hash": None}


def test_chat_answers(tmp_path, capsys, monkeypatch):
    _, policy, processor = make(NAMES[1])
    out = save_model_directory(policy, processor, tmp_path / "model", {})
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    argv = ["chat", str(out), "--image", str(tmp_path / "red.png"), "--max_new_tokens", "4"]
    assert main([*argv, "--prompt", "what is there ?"]) == 0
    once = capsys.readouterr().out
    lines = iter(["what is there ?", "how many ?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(argv) == 0
    answers = capsys.readouterr().out
    assert answers.startswith(once) and len(answers) > len(once)
    assert main(["chat", str(out), "--image", "nope.png"]) == 2
