"""Proof that a run trains what it says: frozen weights did not move, trainable parts get gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from lightning_vlm.store import content_key

from .families import Family, family_of
from .parts import inner_model, part_of, part_parameters
from .policy import Policy

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18  # a few MiB of temporaries, which stay in the cache


def snapshot_frozen(model: Policy | PreTrainedModel) -> dict[str, int]:
    """{name: fingerprint} of the parameters that are frozen now; of this rank's shard where they are sharded."""
    frozen = {name: param for name, param in inner_model(model).named_parameters() if not param.requires_grad}
    if not frozen:
        return {}
    prints = torch.stack([_fingerprint(param) for param in frozen.values()]).tolist()
    return dict(zip(frozen, prints, strict=True))


def weights_fingerprint(model: Policy | PreTrainedModel, *, part: str | None = None) -> str:
    """Hex hash of all parameters, or those of one part, to the bit, with their names; unsharded weights only.

    Two models have one fingerprint if and only if (but for chance, 2⁻⁶⁴) they have the same weights.
    """
    model = inner_model(model)
    named = dict(model.named_parameters() if part is None else part_parameters(model, family_of(model))[part])
    prints = torch.stack([_fingerprint(param) for param in named.values()]).tolist()
    digest = hashlib.blake2b(digest_size=16)
    for (name, param), value in zip(named.items(), prints, strict=True):
        digest.update(f"{name}\0{param.dtype}\0{tuple(param.shape)}\0{value}\n".encode())
    return digest.hexdigest()


def config_fingerprint(config: PretrainedConfig) -> str:
    """Hex hash of what of a configuration a forward depends on, names of places and versions aside."""
    apart = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures")

    def shape(values: dict[str, Any]) -> dict[str, Any]:
        kept = {str(name): value for name, value in values.items() if name not in apart}
        return {name: shape(value) if isinstance(value, dict) else str(value) for name, value in kept.items()}

    return content_key(shape(config.to_dict()))


def check_frozen(model: Policy | PreTrainedModel, snapshot: Mapping[str, int], family: Family) -> None:
    """Refuses weights that moved since `snapshot_frozen`, to the bit.

    Raises:
        ValueError: names the first parameter that moved, and its part.
    """
    params = dict(inner_model(model).named_parameters())
    now = torch.stack([_fingerprint(params[name]) for name in snapshot]).tolist() if snapshot else []
    moved = [name for name, value in zip(snapshot, now, strict=True) if value != snapshot[name]]
    if moved:
        part = part_of(moved[0], family)
        raise ValueError(
            f"{len(moved)} frozen parameters moved, first {moved[0]!r} of part {part}: something outside the optimizer "
            f"writes to it, or parts.{part} was changed after the optimizer was made"
        )


def part_gradient_norms(model: Policy | PreTrainedModel, family: Family) -> dict[str, float]:
    """{part: 2-norm of its gradient} for parts with trainable parameters; 0 where nothing has a gradient."""
    norms = {}
    for part, params in part_parameters(model, family).items():
        trained = [param for _, param in params if param.requires_grad]
        if not trained:
            continue
        squares = [_norm(param.grad).double().square() for param in trained if param.grad is not None]
        norms[part] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


def check_gradients(norms: Mapping[str, float]) -> None:
    """Refuses trainable parts without gradient.

    Args:
        norms: `part_gradient_norms`, the largest over the steps watched.

    Raises:
        ValueError: names the part and the setting to change.
    """
    for part, norm in norms.items():
        if not norm > 0:
            cause = "no batch had an image, or " if part in ("vision", "projector") else ""
            raise ValueError(
                f"part {part} is trainable but its gradient norm is {norm}: {cause}the loss does not reach it; "
                f"set parts.{part}.freeze to true if it is not meant to learn"
            )


def _norm(grad: Tensor) -> Tensor:
    norm = grad.norm()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def _fingerprint(param: Tensor) -> Tensor:
    """0-d int64 over the exact bits and where they stand; any change of one value changes it."""
    local = param.to_local() if isinstance(param, DTensor) else param
    bits = local.detach().reshape(-1).view(_INTEGER[local.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for i, chunk in enumerate(bits.split(_CHUNK)):
        place = torch.arange(i * _CHUNK, i * _CHUNK + len(chunk), device=bits.device)
        # A mixing step, so that equal changes in several places do not cancel (products wrap around, exactly).
        mixed = (chunk.to(torch.int64) + place * 0x9E3779B97F4A7C1) * 0xBF58476D1CE4E5B
        total += (mixed ^ (mixed >> 29)).sum()
    return total
