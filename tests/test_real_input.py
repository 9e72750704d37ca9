"""The command line on real input: real tokenizer, chat template and vocabulary, real problems and photographs.

The model is small and random, so what it knows afterwards it learned here. Without the data these tests skip. Those
that train until the problems are known by heart take minutes and are marked slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lightning_vlm.export.checkpoint import load_policy

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.real_data

TINY = (
    *("--family", "qwen2_5_vl", "--hidden", "128", "--heads", "4", "--vision-hidden", "64"),
    *("--image-size", "168", "--tie-word-embeddings"),
)
# Nothing here looks at what a logger or a checkpoint to resume from would keep.
PLAIN = ("--logger", "{MLFlow: null}", "--callbacks.Progress", "null")


def python(folder: Path, *arguments: str) -> str:
    """Run `python -m …` in `folder` on one thread; returns its output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def command(folder: Path, *arguments: str) -> str:
    """Run `lightning-vlm …`."""
    return python(folder, "lightning_vlm.cli.main", *arguments)


def predictions(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(real_data, tmp_path_factory) -> Path:
    """A working directory with the small model at `runs/tiny-qwen`, where the experiments expect it."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = str(real_data / "qwen2_5_vl_processor")
    python(folder, "tools.make_tiny", "--tokenizer", tokenizer, "--out", "runs/tiny-qwen", *TINY)
    return folder


def plain_inputs(model_dir: Path, question: str, picture: Path) -> SimpleNamespace:
    """A prompt encoded by transformers and by hand alone: its template, its tokenizer, its image processor."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(model_dir)(
        Image.open(picture).convert("RGB"), return_tensors="pt"
    )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    tokens = int(pixels["image_grid_thw"].prod()) // 4  # one token for 2 x 2 patches
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt").input_ids
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == image_id).int()}
    return SimpleNamespace(tokenizer=tokenizer, inputs=inputs | dict(pixels))


def problem(real_data: Path, number: int) -> tuple[str, Path]:
    """Question and picture of one of the ten Geometry3K problems, as the source asks it."""
    place = real_data / "geometry3k/intergps_examples" / str(number)
    asked = json.loads((place / "data.json").read_text())["problem_text"]
    instruction = r"Work out the answer step by step and write only the final answer inside \boxed{}."
    return f"{asked}\n{instruction}", place / "img_diagram.png"


def test_a_real_vocabulary_trains_and_exports(folder, real_data, monkeypatch):
    """Three steps on the mixture of all three sources; then the model directory in plain transformers."""
    monkeypatch.chdir(folder)  # the checkpoint names the model it started from as the experiment does
    run = folder / "runs/short"
    override = ("--trainer.max_steps", "3", "--callbacks.Geometry3K", "null", *PLAIN)
    command(folder, "fit", "-c", "experiment/real-geometry3k", "--run_dir", str(run), *override)
    plain = AutoModelForImageTextToText.from_pretrained(run / "model").eval()
    assert plain.get_input_embeddings().weight.shape == (151_665, 128)

    policy, _, facts = load_policy(run / "checkpoints/step-00000003.ckpt")
    assert facts["step"] == 3
    before = AutoModelForImageTextToText.from_pretrained(folder / "runs/tiny-qwen").eval()
    for number in (11, 14):
        encoded = plain_inputs(run / "model", *problem(real_data, number))
        with torch.no_grad():
            logits = plain(**encoded.inputs).logits
            assert torch.equal(logits, policy.model.eval()(**encoded.inputs).logits)
            assert not torch.allclose(logits, before(**encoded.inputs).logits, atol=0.1)


@pytest.mark.slow
def test_ten_problems_are_learned_among_others(folder, real_data):
    """Geometry3K, MATH-V and MMVP mixed (about four minutes): the ten problems are known by heart afterwards."""
    run, model = folder / "runs/real-geometry3k", folder / "runs/real-geometry3k/model"
    command(folder, "fit", "-c", "experiment/real-geometry3k", "--run_dir", str(run), *PLAIN)
    from_export = ("-c", str(run / "config.yaml"), "--backbone.path", str(model), "--run_dir", str(run))
    command(folder, "validate", *from_export)
    assert json.loads((run / "validate.json").read_text())["val/geometry3k/accuracy"] >= 0.9

    command(folder, "predict", *from_export)
    answers = predictions(run)
    assert [a["id"] for a in answers] == [f"geometry3k/{n}" for n in range(11, 21)]
    assert sum(a["output"] == rf"\boxed{{{a['gold']}}}" for a in answers) >= 9

    plain = AutoModelForImageTextToText.from_pretrained(model).eval()
    for number, answer in zip(range(11, 21), answers, strict=True):
        encoded = plain_inputs(model, *problem(real_data, number))
        out = plain.generate(**encoded.inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=32)
        text = encoded.tokenizer.decode(out[0, encoded.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == answer["output"], number


@pytest.mark.slow
def test_pixels_reach_the_loss(folder):
    """Twenty questions with two photographs and two answers each: exchanging photographs turns the answers round."""
    run = folder / "runs/mmvp-pixels"
    command(folder, "fit", "-c", "experiment/mmvp-pixels", "--run_dir", str(run), *PLAIN)
    from_export = ("-c", str(run / "config.yaml"), "--backbone.path", str(run / "model"), "--run_dir", str(run))
    command(folder, "validate", *from_export)
    results = json.loads((run / "validate.json").read_text())
    assert results["val/right/n"] == results["val/swapped/n"] == 40
    assert results["val/right/accuracy"] >= 38 / 40
    assert results["val/swapped/accuracy"] <= 2 / 40
