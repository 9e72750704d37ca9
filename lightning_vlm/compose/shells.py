"""What tensors a configuration asks for, found by building the model without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from lightning_vlm.models.processor import read_json

Shapes = dict[str, tuple[int, ...]]


def model_directory(path: str | Path, role: str) -> tuple[Path, dict[str, Any]]:
    """A model directory and its config.json.

    Args:
        path: a local directory.
        role: the argument's name, for errors.

    Raises:
        ValueError: no such directory, no config.json in it, or one without `model_type`, or quantised weights.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{role} {str(path)!r} is no directory: give a local model directory (fetch hub models first)")
    config = read_json(directory / "config.json")
    if not config.get("model_type"):
        raise ValueError(f"{role} {str(path)!r} is no model directory: it has no config.json that says its model_type")
    if config.get("quantization_config"):
        raise ValueError(
            f"{role} {str(path)!r} is quantised ({config['quantization_config'].get('quant_method')}): give the full "
            "weights; quantise what comes out if you must"
        )
    return directory, config


def load_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a directory, without remote code.

    Raises:
        ValueError: transformers cannot make one of config.json.
    """
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{directory}/config.json cannot be used: {str(error).strip().splitlines()[0]}") from error


def copied(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same settings, without what was chosen at run time or says where they came from."""
    values = config.to_dict()
    for name in ("_name_or_path", "architectures", "transformers_version"):
        values.pop(name, None)
    copy = type(config).from_dict(values)
    copy.name_or_path = ""
    return copy


def meta_model(config: PreTrainedConfig, auto: type = AutoModel) -> nn.Module:
    """The model of `config` without memory for its weights."""
    with torch.device("meta"):
        return auto.from_config(copied(config))  # building a model may set run-time choices


def spellings(config: PreTrainedConfig, *, without: str | None = None) -> list[Shapes]:
    """{name: shape} of the bare model of `config`: as its modules are named, and as released files name them.

    Args:
        config: of the part.
        without: leave out tensors under this prefix.
    """
    model = meta_model(config)
    state = dict(model.state_dict())
    both = [shapes_of(state, without), shapes_of(revert_weight_conversion(model, state), without)]
    return both[:1] if both[0] == both[1] else both


def shapes_of(state: dict[str, Any], without: str | None = None) -> Shapes:
    """{name: shape} of a state dict."""
    kept = {n: t for n, t in state.items() if without is None or not n.startswith(without)}
    return {name: tuple(tensor.shape) for name, tensor in kept.items()}


def vlm_shapes(config: PreTrainedConfig) -> tuple[Shapes, str]:
    """{name: shape} of a whole VLM by module names, and the name of its class."""
    model = meta_model(config, AutoModelForImageTextToText)
    return shapes_of(model.state_dict()), type(model).__name__


def under(shapes: Shapes, path: str) -> Shapes:
    """The entries under a module path, named from there."""
    return {name.removeprefix(f"{path}."): shape for name, shape in shapes.items() if name.startswith(f"{path}.")}
