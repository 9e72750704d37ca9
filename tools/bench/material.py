"""A model directory and data that anyone can make: what all contenders of a comparison read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# ChatML that ends with the end of turn: with the usual newline behind it, one side would score a token more.
TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS = "the picture shows a red circle and blue square there are three shapes in image left of large small triangle"


@dataclass(frozen=True)
class Size:
    """Sizes of model and data.

    Attributes:
        hidden, layers, heads, intermediate: of the language model.
        vocabulary: rows of embedding and head.
        vision_hidden, vision_layers: of the vision tower.
        image: pixels along the side of a picture; 28 × 28 of them become one token.
        prompt: tokens of the prompt, template included, image tokens apart.
        completion: tokens of a completion, its end of turn included.
        batch: pairs per optimizer step.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    image: int
    prompt: int
    completion: int
    batch: int

    @property
    def image_tokens(self) -> int:
        """Tokens that one picture fills."""
        return (self.image // 28) ** 2


SIZES = {
    "small": Size(256, 6, 4, 1024, 32_000, 128, 4, image=112, prompt=60, completion=64, batch=8),  # 23.9M parameters
    "tiny": Size(32, 2, 2, 64, 512, 32, 2, image=56, prompt=40, completion=8, batch=2),
}


@dataclass(frozen=True)
class Material:
    """Where model and data lie.

    Attributes:
        folder: holds all of it, caches included.
        model: model directory. parameters: of the model.
        size: what it was made from.
    """

    folder: Path
    model: Path
    parameters: int
    size: Size

    def data(self, kind: str) -> Path:
        """JSONL of one kind of data."""
        return self.folder / f"{kind}.jsonl"


def make_material(folder: Path, size: Size, *, steps: int, seed: int = 0) -> Material:
    """Write a random Qwen2.5-VL model directory and enough data for `steps` optimizer steps, nothing shown twice.

    Args:
        folder: where to write.
        size: of model and data.
        steps: optimizer steps of each contender.
        seed: of weights, pictures and texts.
    """
    from lightning_vlm.models.processor import load_processor
    from lightning_vlm.models.spec import Backbone

    model, parameters = make_model(folder / "model", size, seed)
    processor = load_processor(Backbone(path=str(model)))
    tokens = lambda text: len(processor.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    system = {"role": "system", "content": "You are a helpful assistant."}

    def prompt(text: str) -> list[dict]:
        return [system, {"role": "user", "content": text}]

    def prompt_tokens(text: str) -> int:
        rendered = processor.render(prompt(text), add_generation_prompt=True)
        return tokens(rendered) + 2  # a picture adds a start and an end beside its own tokens

    draw = random.Random(seed)
    rows = []
    for n in range(steps * size.batch):
        picture = folder / f"{n}.png"
        write_picture(picture, size.image, seed=seed + n)
        answers = [write_text(draw, tokens, size.completion - 1) for _ in range(2)]
        asked = prompt(write_text(draw, prompt_tokens, size.prompt))
        rows.append(
            {"id": str(n), "prompt": asked, "chosen": answers[0], "rejected": answers[1], "images": [picture.name]}
        )
    material = Material(folder, model, parameters, size)
    material.data("preference").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return material


def make_model(out: Path, size: Size, seed: int) -> tuple[Path, int]:
    """A random Qwen2.5-VL directory in float32, and how many parameters it has."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from lightning_vlm.models.tiny import make_tiny

    make_tiny(
        "qwen2_5_vl",
        out,
        hidden=size.hidden,
        layers=size.layers,
        heads=size.heads,
        vision_hidden=size.vision_hidden,
        vision_layers=size.vision_layers,
        image_size=size.image,
        vocab_size=size.vocabulary,
        initializer_range=0.02,
        seed=seed,
    )
    (out / "chat_template.jinja").write_text(TEMPLATE)
    # The proportions of released models: an MLP four times as wide, windows of 112 pixels.
    config = AutoConfig.from_pretrained(out)
    config.text_config.intermediate_size = size.intermediate
    config.text_config.num_key_value_heads = size.heads
    config.vision_config.window_size = 112
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)
    return out, sum(p.numel() for p in model.parameters())


def write_picture(path: Path, pixels: int, *, seed: int) -> None:
    """A picture of random pixels."""
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def write_text(draw: random.Random, tokens: Callable[[str], int], length: int) -> str:
    """Random words of exactly `length` tokens, as `tokens` counts them.

    Raises:
        ValueError: what surrounds the text has more tokens already, or no word fits.
    """
    text, words = "", _WORDS.split()
    have = tokens(text)
    if have > length:
        raise ValueError(f"{length} tokens are asked for, but {have} are there without any text: ask for more")
    for _ in range(100 * length):
        if have == length:
            return text
        longer = f"{text} {draw.choice(words)}".strip()
        if (count := tokens(longer)) <= length:
            text, have = longer, count
    raise ValueError(f"no text of {length} tokens goes on after {text!r}, which has {have}: ask for another length")
