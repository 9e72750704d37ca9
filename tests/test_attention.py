"""The one attention function, its backends, and loading."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, modeling_flash_attention_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_vlm.models import attention
from lightning_vlm.models.attention import attend, use_attention
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import check_path, check_vocabulary, keep_float64, load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.spec import Backbone

from .test_families import CONFIGS, IMAGE, KINDS, PAD, mixed_rows, picture, row, tiny


def states_and_grads(model, rows, backend=None):
    family = family_of(model)
    if backend:
        use_attention(model, family, backend)
    policy = Policy(model, family)
    policy.zero_grad()
    states = policy.hidden_states(collate(rows, family, PAD))
    states.square().sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_backends_equal_transformers_own(kind, backend):
    """Ours by name against transformers' implementation of the same name, float32, values and gradients."""
    model = tiny(kind, dtype=torch.float32)
    rows = mixed_rows(model)
    model.set_attn_implementation(backend)
    want, wanted = states_and_grads(model, rows)
    got, grads = states_and_grads(model, rows, backend)
    if family_of(model).patch_rows and backend == "sdpa":
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for name in wanted:
            torch.testing.assert_close(grads[name], wanted[name], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, want)
        assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_comes_through_and_nothing_is_saved(kind, tmp_path, monkeypatch):
    """One call per layer of both towers, also in generate, and config.json knows nothing of our names."""
    model = tiny(kind, dtype=torch.float32)
    use_attention(model, family_of(model), "sdpa")
    calls = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda m, *a, **k: calls.append(m) or sdpa_attention_forward(m, *a, **k)
    )
    policy = Policy(model.eval(), family_of(model))
    batch = collate([row("r", 2, picture(model, 0), 3)], policy.family, PAD)
    policy.hidden_states(batch)
    assert len({id(module) for module in calls}) == 5, "three vision and two language layers"
    calls.clear()
    with policy.inputs(batch) as inputs:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=PAD)
    assert len({id(module) for module in calls}) == 5
    model.save_pretrained(tmp_path)
    assert "lightning_vlm" not in (tmp_path / "config.json").read_text()
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == "sdpa"


def test_windows_equal_one_call_per_window():
    """Lengths 4, 2, 4, 1, 2 in one row, values and gradients, against a loop."""
    torch.manual_seed(0)
    borders = torch.tensor([0, 4, 6, 10, 11, 13])
    module = SimpleNamespace(is_causal=False)
    q, k, v = (torch.randn(1, 3, 13, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got, _ = attend(module, q, k, v, None, backend="sdpa", cu_seq_lens_q=borders, cu_seq_lens_k=borders, scaling=0.3)
    pieces = [
        torch.softmax(q[:, :, a:b] @ k[:, :, a:b].mT * 0.3, -1) @ v[:, :, a:b] for a, b in pairwise(borders.tolist())
    ]
    want = torch.cat(pieces, 2).transpose(1, 2)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_windowed_vision_is_one_call_per_length(monkeypatch):
    """A 32×48 image of 4-pixel patches has windows of 16 pixels: six of 16 patches, one batched call per layer."""
    model = tiny("qwen2_5_vl", dtype=torch.float32)
    use_attention(model, family_of(model), "sdpa")
    batches = []
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda m, q, *a, **k: batches.append(tuple(q.shape)) or sdpa_attention_forward(m, q, *a, **k),
    )
    with torch.no_grad():
        model.model.get_image_features(**picture(model, 0, (32, 48)).tensors, return_dict=True)
    assert batches == [(6, 4, 16, 8), (1, 4, 96, 8), (6, 4, 16, 8)]


def test_flash_attention_absent_names_the_extra():
    if attention.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    model = tiny("llava")
    with pytest.raises(ValueError, match=r"flash-attn is not installed: pip install 'lightning-vlm\[gpu\]'"):
        use_attention(model, family_of(model), "flash_attention_2")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_flash_attention_path(kind, monkeypatch):
    """flash-attn's two functions replaced by slow ones of the same contract: padded rows, windows, causality, GQA."""

    def dense(q, k, v, *, causal=False, softmax_scale=None, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale
        ).transpose(1, 2)

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, **kwargs):
        cut = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
        return torch.cat([dense(q[None, a:b], k[None, a:b], v[None, a:b], **kwargs)[0] for a, b in cut])

    utils = modeling_flash_attention_utils
    monkeypatch.setattr(attention, "find_spec", lambda name: True)
    for name, value in {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": dense,
        "_flash_varlen_fn": varlen,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": lambda **k: {
            "causal": k["is_causal"] and k["query_length"] > 1,
            "softmax_scale": k["softmax_scale"],
        },
    }.items():
        monkeypatch.setattr(utils, name, value, raising=False)
    model = tiny(kind, dtype=torch.float32)
    rows = mixed_rows(model)
    want, wanted = states_and_grads(model, rows)
    got, grads = states_and_grads(model, rows, "flash_attention_2")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-3)


def test_keep_float64_changes_rounding_only():
    """Equal to transformers' values within float32 rounding, and exactly equal in float32 itself."""
    for dtype, close in ((torch.float64, 1e-5), (torch.float32, 0)):
        model = tiny("qwen2_5_vl", dtype=dtype)
        inputs = {"input_ids": torch.arange(3, 12)[None]}
        image = picture(model, 0).tensors
        before = model(**inputs).logits, model.model.get_image_features(**image, return_dict=True).last_hidden_state
        keep_float64(model)
        after = model(**inputs).logits, model.model.get_image_features(**image, return_dict=True).last_hidden_state
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "smolvlm"])
def test_load_model_gives_the_saved_weights(kind, tmp_path):
    model = tiny(kind, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = load_model(Backbone(path=str(tmp_path)))
    assert loaded.training and loaded.config._attn_implementation.endswith("sdpa")
    for (name, want), (other, got) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(want, got)
    assert load_model(Backbone(path=str(tmp_path), dtype="bfloat16")).dtype == torch.bfloat16


def test_load_model_errors_say_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def message(path):
        with pytest.raises(ValueError) as caught:
            load_model(Backbone(path=str(path)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist: give a model directory" in message(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in message(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "is a file" in message(tmp_path / "file")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert "'llama' is no image-text-to-text model" in message(tmp_path / "llama")
    CONFIGS["llava"]().save_pretrained(tmp_path / "bare")
    assert "has no weights that can be loaded" in message(tmp_path / "bare")
    assert "not to be had from the hub" in message("nobody/nothing-of-the-kind")


def test_load_model_refuses_weights_that_leave_gaps(tmp_path):
    """A config with one more layer than the weights would leave that layer random."""
    model = tiny("llava", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    config["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fill the model: .* missing keys"):
        load_model(Backbone(path=str(tmp_path)))


def test_hub_ids_pass_the_path_check():
    check_path("Qwen/Qwen2.5-VL-3B-Instruct")
    with pytest.raises(ValueError, match="does not exist: give a model directory"):
        check_path("runs/first/model")


def test_check_vocabulary():
    model = tiny("llava")
    check_vocabulary(model, SimpleNamespace(vocab_size=64, image_token_id=IMAGE))
    check_vocabulary(model, SimpleNamespace(vocab_size=62, image_token_id=IMAGE))
    with pytest.raises(ValueError, match=r"the tokenizer has 65 ids, the model .* embeds 64"):
        check_vocabulary(model, SimpleNamespace(vocab_size=65, image_token_id=IMAGE))
    with pytest.raises(ValueError, match=r"placeholder is id 59, that of the model .* 60"):
        check_vocabulary(model, SimpleNamespace(vocab_size=64, image_token_id=59))


def test_backbone_refuses_unknown_settings():
    with pytest.raises(ValueError, match=r"backbone\.dtype is 'half'"):
        Backbone(path="x", dtype="half")
    with pytest.raises(ValueError, match=r"backbone\.path is empty"):
        Backbone(path="")
    assert Backbone(path="embedded:llava-tiny").embedded == "llava-tiny"
    assert Backbone(path="x").embedded is None
