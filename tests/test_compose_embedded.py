"""The embedded models as directories: all five commands, from the command line too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from lightning_vlm.cli.compose import main
from lightning_vlm.compose import compose, put_encoder, swap_language, take_encoder, take_language
from lightning_vlm.export.provenance import recorded
from lightning_vlm.models.embedded import build_model
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import make_tiny

COMPOSITIONS = Path(__file__).resolve().parent.parent / "configs" / "compose"
NAMES = [f"{form}-{size}" for form in ("llava", "qwen2_5_vl") for size in ("student", "teacher", "small")]


def saved(name, out, seed=0):
    build_model(name, seed=seed).save_pretrained(out)
    load_processor(Backbone(path=f"embedded:{name}")).save(out)
    return out


def state(directory, auto=AutoModelForImageTextToText):
    model, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.state_dict()


def parts_equal(a, b, *parts):
    names = [name for name in a if name.startswith(parts)]
    assert names and all(torch.equal(a[name], b[name]) for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_taken_apart_and_put_together_again(name, tmp_path):
    vlm = saved(name, tmp_path / "vlm")
    own = state(vlm)
    encoder, language = take_encoder(vlm, out=tmp_path / "e"), take_language(vlm, out=tmp_path / "l")
    state(encoder, AutoModel), state(language, AutoModelForCausalLM)
    text = {"input_ids": torch.tensor([[1, 20, 30, 40]])}
    with torch.no_grad():
        a = AutoModelForImageTextToText.from_pretrained(vlm)(**text).logits
        b = AutoModelForCausalLM.from_pretrained(language)(**text).logits
    assert torch.equal(a, b)
    for again in (
        swap_language(vlm, language=language, out=tmp_path / "s"),
        put_encoder(vlm, encoder=encoder, out=tmp_path / "k", projector="keep"),
    ):
        new = state(again)
        assert new.keys() == own.keys() and all(torch.equal(new[key], own[key]) for key in own)
        before, after = (load_processor(Backbone(path=str(d))) for d in (vlm, again))
        assert before.fingerprint() == after.fingerprint() and before.eos_ids == after.eos_ids
    made = state(compose(vision=encoder, language=language, out=tmp_path / "c"))
    assert made.keys() == own.keys()
    projector = "model.visual.merger" if name.startswith("qwen") else "model.multi_modal_projector"
    rest = tuple(key for key in own if not key.startswith(projector))
    parts_equal(made, own, *rest)


@pytest.mark.parametrize("family", ["llava_clip_qwen2", "llava_siglip_llama", "internvl", "qwen2_5_vl"])
def test_directories_in_the_form_of_released_models(family, tmp_path):
    """Templates, placeholders and settings as released VLMs have them, not as `compose` writes them."""
    vlm = make_tiny(family, tmp_path / "vlm", hidden=32, image_size=56)
    own = state(vlm)
    encoder, language = take_encoder(vlm, out=tmp_path / "e"), take_language(vlm, out=tmp_path / "l")
    state(encoder, AutoModel), state(language, AutoModelForCausalLM)
    for again in (
        swap_language(vlm, language=language, out=tmp_path / "s"),
        put_encoder(vlm, encoder=encoder, out=tmp_path / "k", projector="keep"),
    ):
        new = state(again)
        assert new.keys() == own.keys() and all(torch.equal(new[key], own[key]) for key in own)
        before, after = (load_processor(Backbone(path=str(d))) for d in (vlm, again))
        assert before.chat_template == after.chat_template and before.image_token_id == after.image_token_id
        a, b = (p.image(Image.new("RGB", (90, 50), "teal")) for p in (before, after))
        assert a[0].key == b[0].key and a[1] == b[1]


@pytest.mark.parametrize("form", ["llava", "qwen2_5_vl"])
def test_another_language_model_of_the_same_width(form, tmp_path):
    """R1V's re-assembly: encoder and projector of one run, the language model of another."""
    vlm, other = saved(f"{form}-small", tmp_path / "a", seed=0), saved(f"{form}-small", tmp_path / "b", seed=1)
    language = take_language(other, out=tmp_path / "l")
    new, old, source = state(swap_language(vlm, language=language, out=tmp_path / "n")), state(vlm), state(other)
    parts_equal(new, source, "model.language_model", "lm_head")
    vision = "model.visual" if form == "qwen2_5_vl" else ("model.vision_tower", "model.multi_modal_projector")
    parts_equal(new, old, *([vision] if isinstance(vision, str) else vision))
    facts = recorded(tmp_path / "n")["parts"]
    assert facts["projector"]["hash"] == facts["vision"]["hash"] != facts["language"]["hash"]


@pytest.mark.parametrize("form", ["llava", "qwen2_5_vl"])
def test_encoder_before_a_larger_language_model(form, tmp_path):
    """PIVOT: the encoder of a small VLM before the language model of a larger one, through a fresh projector."""
    small, large = saved(f"{form}-small", tmp_path / "a"), saved(f"{form}-teacher", tmp_path / "b")
    encoder = take_encoder(small, out=tmp_path / "e")
    new = state(put_encoder(large, encoder=encoder, out=tmp_path / "n", seed=5))
    parts_equal(new, state(large), "model.language_model", "lm_head")
    tower = "model.visual.blocks" if form == "qwen2_5_vl" else "model.vision_tower"
    parts_equal(new, state(small), tower)
    with pytest.raises(ValueError, match=r"of width 96, .* has 32: take --projector fresh"):
        put_encoder(large, encoder=encoder, out=tmp_path / "x", projector="keep")
    with pytest.raises(ValueError, match=r"writes 160 numbers per token, .* reads 48: take an LLM of width 160"):
        swap_language(large, language=take_language(small, out=tmp_path / "l"), out=tmp_path / "y")


def test_commands(tmp_path, capsys):
    vlm = str(saved("llava-small", tmp_path / "vlm"))
    e, lm, c = (str(tmp_path / name) for name in "elc")
    assert main("take-encoder", [vlm, "--out", e]) == main("take-language", [vlm, "--out", lm]) == 0
    assert main("compose", ["--vision", e, "--language", lm, "--out", c, "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert f"compose: {c}" in out and "reads     feature layer -1, select default" in out and "seed 7" in out
    assert main("swap-language", [vlm, "--language", lm, "--out", str(tmp_path / "s")]) == 0
    assert main("put-encoder", [vlm, "--encoder", e, "--projector", "keep", "--out", str(tmp_path / "p")]) == 0
    file = tmp_path / "compose.yaml"
    file.write_text(f"vision: {e}\nlanguage: {lm}\nout: {tmp_path / 'y'}\nseed: 3\n")
    assert main("compose", ["-c", str(file), "--seed", "7"]) == 0  # the command line wins
    new, old = state(tmp_path / "y"), state(tmp_path / "c")
    assert all(torch.equal(new[key], old[key]) for key in old)


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("compose", "vison: x\n", "unknown setting 'vison'; did you mean 'vision'"),
        ("compose", "seed: three\n", "seed is 'three', no whole number"),
        ("compose", "out: x\n", "compose needs --vision, --language"),
        ("swap-language", "language: x\nout: y\n", "swap-language needs VLM"),
        ("take-encoder", "projector: keep\n", "unknown setting 'projector'"),
        ("compose", "- a\n", "holds no settings"),
    ],
)
def test_bad_settings(command, text, said, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        main(command, ["-c", str(file)])
    with pytest.raises(ValueError, match="unrecognized arguments: --vison"):
        main(command, ["--vison=x"])


@pytest.mark.parametrize("file", sorted(path.stem for path in COMPOSITIONS.glob("*.yaml")))
def test_written_compositions_ask_for_their_parts_and_nothing_else(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--vision '.*' is no directory"):
        main("compose", ["-c", f"compose/{file}", "--out", "vlm"])
