"""A model directory and data that anyone can make: what all contenders of a comparison read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
        prompts: prompts per optimizer step of GRPO, or per rollout. group: completions of each of them.
        distilled: prompts per optimizer step of on-policy distillation, one completion each.
        mean: tokens that a sampled completion has on average; None gives a model that hardly ever ends one.
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
    prompts: int
    group: int
    distilled: int
    mean: float | None = None

    @property
    def image_tokens(self) -> int:
        """Tokens that one picture fills."""
        return (self.image // 28) ** 2

    def per_step(self, kind: str) -> int:
        """Rows of one kind of data that an optimizer step takes."""
        return {"preference": self.batch, "prompts": self.prompts, "distilled": self.distilled}[kind]

    def samples(self, kind: str) -> int:
        """Completions that are sampled for one row of this kind."""
        return self.group if kind == "prompts" else 1


SIZES = {  # small: 23.9M parameters
    "small": Size(
        *(256, 6, 4, 1024, 32_000, 128, 4),
        image=112,
        prompt=60,
        completion=64,
        batch=8,
        prompts=4,
        group=8,
        distilled=16,
    ),
    "tiny": Size(
        *(32, 2, 2, 64, 512, 32, 2), image=56, prompt=40, completion=8, batch=2, prompts=2, group=4, distilled=4
    ),
}


@dataclass(frozen=True)
class Material:
    """Where model and data lie.

    Attributes:
        folder: holds all of it, caches included.
        model: model directory. parameters: of the model.
        size: what it was made from.
        prepared: by kind of data, per step of the warm-up and per row the ids of the completions that both sides take
            instead of sampling: [step][row][sample] → ids.
    """

    folder: Path
    model: Path
    parameters: int
    size: Size
    prepared: dict[str, list[list[list[list[int]]]]]

    def data(self, kind: str) -> Path:
        """JSONL of one kind of data."""
        return self.folder / f"{kind}.jsonl"

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one kind of data, with pictures as full paths."""
        rows = [json.loads(line) for line in self.data(kind).read_text().splitlines()]
        return [row | {"images": [str(self.folder / name) for name in row["images"]]} for row in rows]

    @property
    def teacher(self) -> Path:
        """A second random model of the same size; there where `distilled` data is."""
        return self.folder / "teacher"


def make_material(
    folder: Path, size: Size, *, steps: int, kinds: Collection[str] = ("preference",), warm_up: int = 0, seed: int = 0
) -> Material:
    """Write a random Qwen2.5-VL model directory and enough data for `steps` optimizer steps, nothing shown twice.

    Args:
        folder: where to write; made if absent.
        size: of model and data.
        steps: optimizer steps of each contender.
        kinds: of data: `preference` pairs, `prompts` to sample groups from, `distilled` prompts with a teacher.
        warm_up: steps that completions are prepared for.
        seed: of weights, pictures and texts.
    """
    from lightning_vlm.models.processor import load_processor
    from lightning_vlm.models.spec import Backbone

    folder.mkdir(parents=True, exist_ok=True)
    model, parameters = make_model(folder / "model", size, seed)
    processor = load_processor(Backbone(path=str(model)))
    tokens = lambda text: len(processor.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    system = {"role": "system", "content": "You are a helpful assistant."}

    def prompt(text: str) -> list[dict]:
        return [system, {"role": "user", "content": text}]

    def prompt_tokens(text: str) -> int:
        rendered = processor.render(prompt(text), add_generation_prompt=True)
        return tokens(rendered) + 2  # a picture adds a start and an end beside its own tokens

    for n in range(steps * max(size.per_step(kind) for kind in kinds)):
        write_picture(folder / f"{n}.png", size.image, seed=seed + n)
    draw = random.Random(seed)
    material = Material(folder, model, parameters, size, {})
    for kind in sorted(kinds):
        rows = []
        for n in range(steps * size.per_step(kind)):
            row = {"id": str(n), "images": [f"{n}.png"]}
            if kind == "preference":
                answers = [write_text(draw, tokens, size.completion - 1) for _ in range(2)]
                row |= {"chosen": answers[0], "rejected": answers[1]}
            rows.append(row | {"prompt": prompt(write_text(draw, prompt_tokens, size.prompt))})
        material.data(kind).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if kind != "preference":
            words = processor.tokenizer(_WORDS, add_special_tokens=False).input_ids
            material.prepared[kind] = [
                [
                    [prepare_completion(draw, words, processor.end_of_turn[1], size) for _ in range(size.samples(kind))]
                    for _ in range(size.per_step(kind))
                ]
                for _ in range(warm_up)
            ]
    if "distilled" in kinds:
        make_model(material.teacher, size, seed + 1)
    return material


def prepare_completion(draw: random.Random, words: list[int], end: int, size: Size) -> list[int]:
    """Random ids of a random length; the longest is cut, every other one ends by the end of turn."""
    length = draw.randint(1, size.completion)
    ids = draw.choices(words, k=length)
    return ids if length == size.completion else [*ids[:-1], end]


def make_model(out: Path, size: Size, seed: int) -> tuple[Path, int]:
    """A random Qwen2.5-VL directory in float32, and how many parameters it has."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

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
        if size.mean is not None:
            ids = torch.randint(size.vocabulary, (4, size.prompt + size.completion))
            ends = GenerationConfig.from_pretrained(out).eos_token_id
            make_it_end(model, ids, end=ends, probability=ending_probability(size.mean, size.completion))
    model.save_pretrained(out)
    return out, sum(p.numel() for p in model.parameters())


def ending_probability(mean: float, most: int) -> float:
    """p with which every token must end a completion for `mean` tokens on average: (1 − (1−p)^most)/p = mean.

    Raises:
        ValueError: `mean` is not between 1 and `most`.
    """
    if not 1 < mean < most:
        raise ValueError(
            f"completions of at most {most} tokens cannot have {mean} on average: ask for between 1 and that"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** most) / p > mean else (low, p)
    return p


def make_it_end(model: torch.nn.Module, ids: torch.Tensor, *, end: int, probability: float) -> None:
    """Give every next-token distribution of a random model about this probability of the end of turn, in place.

    Coordinate 0 of the residual stream becomes a constant that no layer writes to and only the end's row of the head
    reads: in place of the bias that this head does not have.

    Args:
        model: Qwen2.5-VL. ids: [B, T] random ids, to measure on. end: id of the end of turn. probability: to reach.
    """
    import torch

    language, head = model.model.language_model, model.lm_head.weight
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        head[:, 0] = 0
        language.embed_tokens.weight[:, 0] = 0
        # Several times what all other coordinates are together, so that it varies little with them behind the norm.
        stream = []
        hook = language.norm.register_forward_pre_hook(lambda norm, args: stream.append(args[0]))
        model.model(input_ids=ids, use_cache=False)
        hook.remove()
        language.embed_tokens.weight[:, 0] = 4 * stream[0].norm(dim=-1).mean()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        others = (hidden @ head.T).index_fill(-1, torch.tensor(end), -torch.inf).logsumexp(-1).mean()
        head[end] = 0
        head[end, 0] = (math.log(probability / (1 - probability)) + others) / hidden[..., 0].mean()


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
