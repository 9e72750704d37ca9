"""Weights that pass from file to file: sharded sources and targets, and how much memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lightning_vlm.compose import compose
from lightning_vlm.compose.weights import Piece, find_part, parse_size, read_weights, write_weights

from .compose_kit import make_encoder, make_language, stored


def piece(tensor):
    return Piece(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("20kb", 20000), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "0GB", "1.2.3MB", "-1GB"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)


def test_files_are_what_safetensors_writes(tmp_path):
    """Every dtype, odd lengths, an empty tensor, a scalar, a transposed one."""
    tensors = {
        "bf": torch.randn(3).bfloat16(), "f64": torch.randn(2, 3).double(), "f32": torch.randn(5, 7).t(),
        "i64": torch.arange(3), "b": torch.tensor([True, False, True]), "f16": torch.randn(1, 1).half(),
        "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "u8": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    write_weights({name: piece(tensor) for name, tensor in tensors.items()}, tmp_path)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert [p.shape for p in read_weights(tmp_path).pieces.values()] == [
        tuple(back[n].shape) for n in read_weights(tmp_path).pieces
    ]


def test_shards_fill_up_to_their_size(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    write_weights({name: piece(tensor) for name, tensor in tensors.items()}, tmp_path, max_shard_size=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert [index["weight_map"][f"t{i}"][6:11] for i in range(5)] == ["00001", "00001", "00002", "00002", "00003"]
    assert {name: float(tensor[0]) for name, tensor in stored(tmp_path).items()} == {f"t{i}": i for i in range(5)}


def test_sharded_source_and_sharded_target(tmp_path):
    encoder = make_encoder("clip", tmp_path / "clip")
    language = make_language("qwen2", tmp_path / "llm", shard="20KB")
    assert len(list(language.glob("*.safetensors"))) > 3
    many = compose(vision=encoder, language=language, out=tmp_path / "many", max_shard_size="20KB")
    one = compose(vision=encoder, language=language, out=tmp_path / "one")
    assert len(list(many.glob("*.safetensors"))) > 3 and len(list(one.glob("*.safetensors"))) == 1
    a, b = (AutoModelForImageTextToText.from_pretrained(d).state_dict() for d in (many, one))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    source = AutoModelForCausalLM.from_pretrained(language).state_dict()
    assert torch.equal(a["model.language_model.norm.weight"], source["model.norm.weight"])


def test_part_under_two_prefixes_is_ambiguous(tmp_path):
    save_file({f"{p}.{n}": torch.zeros(2) for p in "ab" for n in ("x", "y")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds more than one tower: under 'a\.', 'b\.'"):
        find_part(read_weights(tmp_path), [{"x": (2,), "y": (2,)}], "tower")


def test_only_one_tensor_is_alive_at_a_time(tmp_path):
    """Each tensor that is read is gone before the next one is."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    def counted(size):
        def read():
            nonlocal most
            tensor = torch.zeros(size)
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

        return Piece((size,), torch.float32, read)

    write_weights({f"t{i}": counted(10) for i in range(20)}, tmp_path, max_shard_size=200)
    assert most <= 2  # the one being read, and the one just written


_MEASURE = """
import resource, sys
from lightning_vlm.compose import compose
from lightning_vlm.models.processor import load_processor
vision, small, large, out = sys.argv[1:]
compose(vision=vision, language=small, out=out + "-small", max_shard_size="10MB")  # imports and meta models
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compose(vision=vision, language=large, out=out + "-large", max_shard_size="10MB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_is_far_below_the_models_size(tmp_path):
    """160 MB of weights in 10 MB shards pass through much less memory than that."""
    encoder, small = make_encoder("clip", tmp_path / "clip"), make_language("llama", tmp_path / "small")
    large = _large(tmp_path / "large", small)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(encoder), str(small), str(large), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(done.stdout.split()[-1]) * 1024
    assert grown < size / 4, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"


def _large(out, small):
    """A language model of about 160 MB in 40 layers of 4 MB, written without ever holding it."""
    import shutil

    from transformers import AutoConfig

    from lightning_vlm.compose.shells import meta_model

    shutil.copytree(small, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(small)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 256, 1024, 40, 128
    config.save_pretrained(out)
    shapes = {name: tuple(t.shape) for name, t in meta_model(config, AutoModelForCausalLM).state_dict().items()}
    pieces = {name: Piece(s, torch.float32, lambda s=s: torch.zeros(s)) for name, s in shapes.items()}
    write_weights(pieces, out, max_shard_size=10**7)
    return out
