"""GRPO and on-policy distillation on real input: real tokenizer, 151,665 logits, real problems, a random model."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from .test_real_input import TINY, command, python

pytestmark = pytest.mark.real_data
CURVES = ("--logger", "{CSV: {}}", "--callbacks.Progress", "null")


@pytest.fixture(scope="module")
def folder(real_data, tmp_path_factory):
    """Student and teacher where the experiments expect them."""
    folder = tmp_path_factory.mktemp("real-rollouts")
    tokenizer = str(real_data / "qwen2_5_vl_processor")
    for seed, out in (("0", "runs/tiny-qwen"), ("1", "runs/tiny-teacher")):
        python(folder, "tools.make_tiny", "--tokenizer", tokenizer, "--out", out, "--seed", seed, *TINY)
    return folder


def curves(run) -> list[dict[str, float]]:
    with next(run.glob("**/metrics.csv")).open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("name, prompts, group", [("grpo", 4, 4), ("opd", 8, 1)])
def test_steps_on_real_problems(name, prompts, group, folder):
    """Shapes, log-probs of engine and trainer, memory, what was written; the vocabulary keeps its width."""
    run = folder / "runs" / name
    words = ("fit", "-c", f"experiment/real-geometry3k-{name}", "--run_dir", str(run), *CURVES)
    command(folder, *words, "--trainer.log_every_n_steps", "1", "--callbacks.RolloutTable.every", "5")
    steps = curves(run)
    assert len(steps) == 5
    for step in steps:
        assert step["train/logprob_gap"] < 1e-5  # float32, another layout of the same rows
        assert 0 < step["train/completion_length"] <= 24
        assert step["train/tokens"] <= prompts * group * 24
        assert 11 < step["train/entropy"] < 12  # ln 151,665 = 11.93: it knows nothing
        assert 0.3 < step["train/memory_gib"] < 8
        assert step["train/removed_mass"] < 1e-3  # placeholders are banned
    assert all(step["train/grad_norm"] > 0 for step in steps if name == "opd" or step["train/zero_spread"] < 1)
    if name == "opd":
        assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    (table,) = (run / "rollouts").glob("step-*/rollouts.jsonl")
    written = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(written) == prompts * group
    plain = AutoModelForImageTextToText.from_pretrained(run / "model")
    assert plain.get_input_embeddings().weight.shape == (151_665, 128)
    before = AutoModelForImageTextToText.from_pretrained(folder / "runs/tiny-qwen")
    assert not torch.equal(plain.lm_head.weight, before.lm_head.weight)
