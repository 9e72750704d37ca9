"""`lightning-vlm compose`, `swap-language`, `take-encoder`, `take-language`, `put-encoder`: VLMs made of parts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_vlm.cli.arguments import Parser

_DESCRIPTIONS = {
    "compose": """\
Build a VLM of a vision encoder, a fresh projector and a language model.

Encoders: CLIP, SigLIP, fixed-size SigLIP2, DINOv2 (LLaVA form), InternViT (InternVL form), Qwen2.5-VL's tower (its own
class, with a Qwen2 or Qwen2.5); language models: Qwen2, Qwen2.5, Qwen3, Llama. All are local directories with
safetensors. What comes out is a model directory that transformers loads.
""",
    "swap-language": """\
Put another language model behind a VLM's encoder and projector, which stay bit for bit.
""",
    "take-encoder": """\
Write a VLM's vision tower, with its image processor, as a directory that AutoModel loads.
""",
    "take-language": """\
Write a VLM's language model, with tokenizer and chat template, as a directory that AutoModelForCausalLM loads.
""",
    "put-encoder": """\
Put another encoder before a VLM's language model, which stays bit for bit, with a fresh or the VLM's own projector.
""",
}
_EPILOG = "All settings may stand in a YAML file instead, given by -c; the command line wins."
_HELP = {
    "vlm": ("DIR", "the VLM: a directory in LLaVA, InternVL or Qwen2.5-VL form"),
    "vision": ("DIR", "the encoder, or a dual encoder, whose vision half is taken"),
    "encoder": ("DIR", "the encoder to put in"),
    "language": ("DIR", "the language model, with its tokenizer"),
    "out": ("DIR", "the directory to make"),
    "projector": ("KIND", None),
    "form": ("FORM", "llava, internvl, qwen2_5_vl, or auto: the one that goes with the encoder (default)"),
    "vision_feature_layer": ("N", "hidden state that is read, -2 the last but one (default: the usual of the encoder)"),
    "vision_feature_select": ("S", "default drops the class token, full keeps all (default: the usual of the encoder)"),
    "seed": ("N", "of a fresh projector (default 0)"),
    "chat_template": ("FILE", "jinja file in place of the language model's own chat template"),
    "dtype": ("D", "float32, bfloat16 or float16 for all weights (default: as they are)"),
    "max_shard_size": ("SIZE", "of one weight file (default 4GB)"),
}
_PROJECTOR = {
    "compose": "mlp2x_gelu: two layers with GELU (default)",
    "put-encoder": "fresh: a new one from the seed (default); keep: the VLM's, if the features are the same",
}
_INTEGERS = ("vision_feature_layer", "seed")


def main(command: str, argv: list[str]) -> int:
    """Make one directory and say where it is; 0."""
    settings = _settings(command, argv)

    import lightning_vlm.compose as package

    made = getattr(package, command.replace("-", "_"))(**settings)
    print(f"{command}: {made}")
    for line in _summary(made):
        print(f"  {line}")
    return 0


def _settings(command: str, argv: list[str]) -> dict[str, Any]:
    """The command's settings from its arguments and its YAML file.

    Raises:
        ValueError: unknown or missing settings.
    """
    names = _names(command)
    parser = Parser(command, description=_DESCRIPTIONS[command], epilog=_EPILOG)
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="YAML file with the same settings")
    for name in names:
        metavar, text = _HELP[name]
        kind = int if name in _INTEGERS else str
        text = text or _PROJECTOR[command]
        if name == "vlm":
            parser.add_argument(name, nargs="?", metavar="VLM", help=text, default=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    file = given.pop("config")
    settings = {**(_from_yaml(file, names) if file else {}), **given}
    required = [n for n in ("vlm", "vision", "encoder", "language", "out") if n in names and settings.get(n) is None]
    if required:
        shown = ", ".join("VLM" if name == "vlm" else f"--{name}" for name in required)
        raise ValueError(f"{command} needs {shown}; see {parser.prog} --help")
    return {name: value for name, value in settings.items() if value is not None}


def _names(command: str) -> list[str]:
    """The settings of a command, as the help shows them."""
    own = {
        "compose": ("vision", "language", "out", "projector", "form", "vision_feature_layer", "vision_feature_select",
                    "seed", "chat_template"),
        "swap-language": ("vlm", "language", "out", "chat_template"),
        "take-encoder": ("vlm", "out"),
        "take-language": ("vlm", "out"),
        "put-encoder": ("vlm", "encoder", "out", "projector", "vision_feature_layer", "vision_feature_select", "seed"),
    }  # fmt: skip
    return [*own[command], "dtype", "max_shard_size"]


def _from_yaml(file: Path, names: list[str]) -> dict[str, Any]:
    from lightning_vlm.config.files import find_config, parse_yaml
    from lightning_vlm.config.tree import nearest

    tree, _ = parse_yaml(find_config(str(file)).read_text(), str(file))
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no settings: write NAME: VALUE, one a line")
    for name, value in tree.items():
        if name not in names:
            raise ValueError(f"{file}: unknown setting {name!r}{nearest(str(name), names)}; known: {', '.join(names)}")
        kind = int if name in _INTEGERS else str
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{file}: {name} is {value!r}, no {'whole number' if kind is int else 'text'}")
    return tree


def _summary(directory: Path) -> list[str]:
    """What was joined, in a few lines."""
    from lightning_vlm.export.provenance import recorded

    facts = recorded(directory)
    lines = []
    for part, where in facts["parts"].items():
        text = where["path"] if "path" in where else ", ".join(f"{key} {value}" for key, value in where.items())
        lines.append(f"{part:<10}{text}")
    if "vision_feature_layer" in facts:
        chosen = f"{facts['vision_feature_layer']}, select {facts['vision_feature_select_strategy']}"
        lines.append(f"{'reads':<10}feature layer {chosen}")
    if "tokenizer" in facts:
        lines.append(f"{'note':<10}{facts['tokenizer']}")
    if "tokens" in facts:
        rows, tokens = facts["embedding_rows"], facts["tokens"]
        added = f", added {', '.join(tokens['added'])}" if tokens["added"] else ""
        lines.append(
            f"{'image':<10}{tokens['image']}{added}; {rows['source']} embedding rows, {rows['written']} written"
        )
    return lines
