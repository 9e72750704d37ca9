"""Tiny model directories: plain transformers loads each, its forward takes what the family's processor makes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny
from tools.make_tiny import main


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_directory_loads_and_tokenizer_is_lossless(family, tmp_path):
    directory = make_tiny(family, tmp_path)
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for token_id, token in ((model.config.image_token_id, None), (tokenizer.pad_token_id, tokenizer.pad_token)):
        name = tokenizer.convert_ids_to_tokens(token_id)
        assert name.startswith("<") and (token is None or name == token)
    # Byte-level: any text survives, also characters the little corpus never had.
    text = "Zwölf α≤β\n\t{x}² 数  two  spaces"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_weights_are_a_function_of_the_seed(tmp_path):
    before = torch.random.get_rng_state()
    a, b, c = (
        make_tiny("llava_clip_qwen2", tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [(d / "model.safetensors").read_bytes() for d in (a, b, c)]
    assert weights[0] == weights[1] != weights[2]


def test_sizes_reach_the_model(tmp_path):
    make_tiny(
        "qwen2_5_vl", tmp_path, hidden=64, layers=3, vision_hidden=48, vision_layers=4, image_size=112,
        vocab_size=512, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert (text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]) == (64, 3, 512)
    assert (vision["hidden_size"], vision["depth"], vision["out_hidden_size"]) == (48, 4, 64)
    assert sum(text["rope_parameters"]["mrope_section"]) == 64 // 2 // 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 112**2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "qwen9"}, "unknown family 'qwen9'"),
        ({"hidden": 30}, "hidden is 30"),
        ({"image_size": 50}, "image_size is 50"),
        ({"vocab_size": 10}, "vocab_size is 10, but the tokenizer has"),
        ({"vision_layers": 1}, "vision_layers is 1"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"tokenizer_dir": "/nowhere"}, "is not a directory"),
    ],
)
def test_refusals(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_tiny(**{"family": "qwen2_vl", "out_dir": tmp_path, **arguments})


def test_command_line(tmp_path, capsys):
    main(["--family", "qwen2_vl", "--out", str(tmp_path), "--hidden", "48", "--tie-word-embeddings"])
    assert capsys.readouterr().out.strip() == str(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 48 and config["tie_word_embeddings"]
    with pytest.raises(SystemExit):
        main(["--family", "qwen2_vl", "--out", str(tmp_path), "--hidden", "5"])
    assert "hidden is 5" in capsys.readouterr().err


def test_command_line_help_describes_every_option():
    out = subprocess.run(
        [sys.executable, "-m", "tools.make_tiny", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for flag in ("--family", "--tokenizer", "--hidden", "--image-size", "--dtype"):
        assert flag in out
