"""Tiny random model directories of every supported family: config, weights, tokenizer, image processor, template.

They stand in for released models wherever the architecture matters and the weights do not: tests, benchmarks of the
code, and learning from scratch with a real vocabulary. The directory is what plain transformers loads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning_vlm.models.tiny_families import FAMILIES, Sizes, TinyFamily

TINY_FAMILIES: tuple[str, ...] = tuple(FAMILIES)

_PLACEHOLDERS = ("<|image_pad|>", "<image>", "<IMG_CONTEXT>")

# A few everyday lines, enough for a BPE with real merges.
_CORPUS = (
    "The picture shows a red circle and a blue square. How many shapes are there? There are three shapes in the image.",
    "Let x be the angle. The angles of a triangle add up to 180 degrees, so x = 180 - 50 - 60 = 70.",
    "You are a helpful assistant. Describe the image. What is the value of the largest bar? The answer is 42.",
    "USER: ASSISTANT: User: Assistant: system user assistant",
)


def _byte_level_tokenizer(family: TinyFamily) -> Any:
    """A byte-level BPE over `_CORPUS` (any text encodes and decodes) with the family's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    if family.adds_bos:
        bos = family.roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_roles(family))


def _roles(family: TinyFamily) -> dict[str, Any]:
    """The tokenizer's keyword arguments that name special tokens."""
    own = {
        role: token
        for role, token in family.roles.items()
        if role in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    named = {role: token for role, token in family.roles.items() if role not in own}
    return {**own, "extra_special_tokens": named} if named else own


def _given_tokenizer(family: TinyFamily, directory: Path) -> Any:
    """The tokenizer of `directory`, with those of the family's special tokens added that it lacks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, **_roles(family))
    missing = [token for token in family.specials if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def _given_template(directory: Path) -> str | None:
    """The chat template of `directory`, in either of the files processors keep it in."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text()
    if (directory / "chat_template.json").is_file():
        return json.loads((directory / "chat_template.json").read_text())["chat_template"]
    return None


def make_tiny(
    family: str,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    vision_hidden: int = 32,
    vision_layers: int = 2,
    patch_size: int | None = None,
    image_size: int | None = None,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.05,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write a complete model directory with random weights.

    Args:
        family: one of `TINY_FAMILIES`.
        out_dir: directory to write; made if absent.
        tokenizer_dir: take the tokenizer (and, if it has the family's image token, the chat template) from here;
            special tokens of the family that it lacks are added. Without it a byte-level BPE of ~400 tokens is built.
        hidden: width of the language model; a multiple of 8 · heads.
        layers: blocks of the language model.
        heads: its attention heads; half as many key/value heads.
        vision_hidden: width of the vision tower, a multiple of 8 (it has two heads).
        vision_layers: blocks of the vision tower, at least 2.
        patch_size: pixels along a patch; the family's usual 14 or 16 by default.
        image_size: pixels along the side of the tower's image (Qwen: the square root of the most pixels); four patches
            by default. Larger images are scaled down, or tiled where the family tiles.
        vocab_size: rows of the embedding; the tokenizer's size by default, more pads it as released models do.
        tie_word_embeddings: one matrix for embedding and head.
        initializer_range: standard deviation of random weights.
        seed: of the random weights.
        dtype: `float32`, `bfloat16` or `float64`.

    Returns:
        `out_dir` as a Path.

    Raises:
        ValueError: unknown family, or sizes that do not fit together.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(FAMILIES)}")
    spec, out = FAMILIES[family], Path(out_dir)
    patch = patch_size or spec.patch
    image = image_size or 4 * patch
    for name, value, unit in (
        ("hidden", hidden, 8 * heads),
        ("vision_hidden", vision_hidden, 8),
        ("image_size", image, 2 * patch),
    ):
        if value <= 0 or value % unit:
            raise ValueError(f"{name} is {value}: it must be a positive multiple of {unit}")
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"dtype is {dtype!r}: choose float32, bfloat16 or float64")
    if vision_layers < 2:
        raise ValueError(
            f"vision_layers is {vision_layers}: at least 2 are needed (features of the last but one are used)"
        )

    source = Path(tokenizer_dir) if tokenizer_dir is not None else None
    if source is not None and not source.is_dir():
        raise ValueError(f"tokenizer_dir {source} is not a directory")
    tokenizer = _given_tokenizer(spec, source) if source else _byte_level_tokenizer(spec)
    rows = vocab_size or len(tokenizer)
    if rows < len(tokenizer):
        raise ValueError(f"vocab_size is {rows}, but the tokenizer has {len(tokenizer)} tokens: give at least as many")

    sizes = Sizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        vision_hidden=vision_hidden,
        vision_layers=vision_layers,
        patch=patch,
        image=image,
        vocab=rows,
        std=initializer_range,
        tied=tie_word_embeddings,
        ids=tokenizer.convert_tokens_to_ids,
    )
    values, images, processor = spec.files(sizes)
    config = AutoConfig.for_model(spec.model_type, tie_word_embeddings=tie_word_embeddings, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    _write_processor(spec, tokenizer, source, images, processor, out)
    return out


def _write_processor(
    spec: TinyFamily, tokenizer: Any, source: Path | None, images: dict[str, Any], processor: dict[str, Any], out: Path
) -> None:
    template = _given_template(source) if source else None
    if template is None or not any(token in template for token in _PLACEHOLDERS if token in spec.specials):
        template = spec.template
    tokenizer.chat_template = None  # kept once, beside the processor
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").write_text(template)
    images = {**images, "processor_class": processor["processor_class"]}
    (out / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    if source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
