"""Adapter files: the few tensors that were trained beside a frozen model, LoRA matrices or a projector."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .families import family_of
from .lora import is_lora, load_adapter
from .parts import PartPolicy, part_parameters
from .policy import Policy

ADAPTER_FILE = "adapter.safetensors"
_ROUNDING = 0.01  # the same weights in another dtype are the same weights
_FACTS = "lightning_vlm"  # the file's own metadata: by which settings it was trained


def trained_tensors(policy: Policy) -> dict[str, Tensor]:
    """{name: tensor} of what trains, where that is LoRA matrices or the projector and nothing else.

    Sharded weights are gathered, so every rank must call this.

    Raises:
        ValueError: another part is trained in full.
    """
    tensors = {}
    for part, params in part_parameters(policy, policy.family).items():
        for name, param in params:
            if not param.requires_grad:
                continue
            if part != "projector" and not is_lora(name):
                raise ValueError(
                    f"part {part} is trained in full, so there is no adapter to export: export the whole model "
                    f"(without --adapter), or train with parts.{part}.freeze or parts.{part}.lora_rank"
                )
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
            tensors[name] = whole.detach().contiguous()
    return tensors


def save_adapter(
    path: Path,
    policy: Policy,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, PartPolicy],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter file; what its tensors mean nothing without stands in it: architecture, LoRA settings, and a
    sample of the frozen weights.

    Args:
        path: file to write. policy: what they belong to. tensors: its `trained_tensors`. parts: settings they were
            trained with. dtype: of the written tensors; as trained by default.
    """
    tensors = {name: tensor.cpu().to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    lora = {part: settings for part, own in parts.items() if (settings := _lora(own))["lora_rank"]}
    beside = frozen_sample(policy.model)
    facts = {"model_type": policy.model.config.model_type, "parts": lora, "beside": beside}
    save_file(tensors, path, metadata={"format": "pt", _FACTS: json.dumps(facts)})


def load_adapter_file(model: PreTrainedModel, path: str, parts: Mapping[str, PartPolicy]) -> None:
    """Start a model, to which `parts` were applied, from an adapter file.

    Args:
        model: changed in place.
        path: the file, or the directory that holds `adapter.safetensors`; any safetensors file with tensors under the
            model's own names will do.
        parts: settings of the run.

    Raises:
        ValueError: no such file, none of safetensors, one for another architecture, width or weights, or trained with
            other LoRA settings than the run's.
    """
    file = Path(path).expanduser()
    file = file / ADAPTER_FILE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"backbone.adapter {path!r}: no such file; `lightning-vlm export CKPT --adapter` writes one")
    try:
        state = load_file(file)
        with safe_open(file, framework="pt") as content:
            facts: dict[str, Any] = json.loads((content.metadata() or {}).get(_FACTS, "{}"))
    except SafetensorError as error:
        raise ValueError(f"backbone.adapter {path!r} is no safetensors file, or was cut off: {error}") from error
    kind = model.config.model_type
    if facts.get("model_type", kind) != kind:
        raise ValueError(f"backbone.adapter {path!r} is for a {facts['model_type']} model, backbone.path is a {kind}")
    for part, trained in facts.get("parts", {}).items():
        for name, value in trained.items():
            now = _lora(parts.get(part, PartPolicy()))[name]
            if now != value:
                raise ValueError(
                    f"backbone.adapter {path!r} was trained with parts.{part}.{name} {value:g}, but here it is {now:g}:"
                    " set it to the same"
                )
    load_trained(model, state, f"backbone.adapter {path!r}")
    check_beside(model, facts.get("beside", {}), f"backbone.adapter {path!r}")


def _lora(policy: PartPolicy) -> dict[str, float]:
    """Rank and α in force, by the names of their settings."""
    return {"lora_rank": policy.lora_rank, "lora_alpha": policy.alpha}


def load_trained(model: PreTrainedModel, state: Mapping[str, Tensor], what: str) -> None:
    """Put trained tensors in their places: LoRA matrices, a projector, or both, all of either.

    Raises:
        ValueError: begins with `what`; a tensor without a place or of another shape, or one that is lacking.
    """
    owned = part_parameters(model, family_of(model))
    projector = {name for name, _ in owned.get("projector", []) if not is_lora(name)}
    given = {name for name in state if not is_lora(name)}
    if given and (odd := sorted(given ^ projector)):
        where = f"the model has no {odd[0]!r}" if odd[0] in given else f"it lacks {odd[0]!r}"
        raise ValueError(
            f"{what} holds a projector of another depth or architecture than the model's ({len(given)} tensors, the "
            f"model has {len(projector)}): {where}; start from the model it was trained in"
        )
    try:
        load_adapter(model, state)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def check_beside(model: PreTrainedModel, beside: Mapping[str, float], what: str) -> None:
    """Refuse a model whose weights are not those that `frozen_sample` was taken of.

    Raises:
        ValueError: begins with `what`, and names the first weight that differs.
    """
    own = {_plain(name): param for name, param in model.named_parameters()}
    for name, value in beside.items():
        if name in own and isinstance(own[name], DTensor):
            continue
        if name not in own or not math.isclose(_middle(own[name]), value, rel_tol=_ROUNDING, abs_tol=1e-6):
            raise ValueError(f"{what} was trained beside other weights than those of backbone.path: {name} differs")


def frozen_sample(model: PreTrainedModel, count: int = 16) -> dict[str, float]:
    """One value of some frozen matrices, by which other weights are told; of sharded or quantised ones none."""
    frozen = {
        name: param
        for name, param in model.named_parameters()
        if param.ndim > 1 and not param.requires_grad and param.is_floating_point() and not isinstance(param, DTensor)
    }
    chosen = list(frozen)[:: max(1, len(frozen) // count)]
    return {_plain(name): _middle(frozen[name]) for name in chosen}


def _middle(param: Tensor) -> float:
    return param.detach().flatten()[param.numel() // 2].item()


def _plain(name: str) -> str:
    """A parameter's name without LoRA beside it."""
    return name.replace(".base_layer.", ".")
