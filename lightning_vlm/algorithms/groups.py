"""Which parameter is updated how: groups by part, rule and decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lightning_vlm.algorithms.optimizer import PartOptimizer
from lightning_vlm.models.parts import PartPolicy, part_parameters
from lightning_vlm.models.policy import Policy


def build_optimizer(
    policy: Policy,
    parts: Mapping[str, PartPolicy],
    *,
    kind: Literal["adamw", "muon"],
    lr: float,
    weight_decay: float,
    warmup: int,
    **settings: Any,
) -> PartOptimizer:
    """The optimizer over everything that trains; a part's own settings win over the common ones.

    Args:
        policy: the policy; modules beside its model are the part `heads`.
        parts: settings by part. kind: update rule of hidden matrices.
        lr, weight_decay, warmup: of parts that set none.
        settings: of `PartOptimizer`.
    """
    named = part_parameters(policy.model, policy.family)
    named["heads"] = [(n, p) for n, p in policy.named_parameters() if not n.startswith("model.")]
    trainable = {part: [(n, p) for n, p in found if p.requires_grad] for part, found in named.items()}
    trainable = {part: found for part, found in trainable.items() if found}
    own = {part: parts.get(part) or PartPolicy() for part in trainable}
    tables = [module for module in policy.modules() if isinstance(module, nn.Embedding)]  # positions, too
    outer = (*tables, policy.head, getattr(policy, "heads", None))
    groups = parameter_groups(
        trainable,
        kind=kind,
        lr={part: lr if p.lr is None else p.lr for part, p in own.items()},
        weight_decay={part: weight_decay if p.weight_decay is None else p.weight_decay for part, p in own.items()},
        warmup={part: warmup if p.warmup is None else p.warmup for part, p in own.items()},
        embeddings={id(p) for module in outer if module is not None for p in module.parameters()},
    )
    return PartOptimizer(groups, **settings)


def parameter_groups(
    parts: dict[str, list[tuple[str, nn.Parameter]]],
    *,
    kind: Literal["adamw", "muon"],
    lr: dict[str, float],
    weight_decay: dict[str, float],
    warmup: dict[str, int],
    embeddings: set[int],
) -> list[dict[str, Any]]:
    """Groups by part, by update rule and by whether weight decay applies.

    Muon takes the 2-D hidden matrices; embeddings, heads, norms, biases and convolutions stay with AdamW. Vectors are
    never decayed.

    Args:
        parts: part name → its trainable (name, parameter) pairs.
        kind: update rule of hidden matrices.
        lr, weight_decay, warmup: per part name.
        embeddings: ids (`id(p)`) of embedding and head matrices.
    """
    groups = []
    for part, named in parts.items():
        buckets: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for _, p in named:
            hidden_matrix = p.ndim == 2 and id(p) not in embeddings
            key = ("muon" if kind == "muon" and hidden_matrix else "adamw", p.ndim >= 2)
            buckets.setdefault(key, []).append(p)
        for (rule, decays), params in buckets.items():
            groups.append(
                {
                    "params": params,
                    "kind": rule,
                    "part": part,
                    "base_lr": lr[part],
                    "lr": lr[part],
                    "weight_decay": weight_decay[part] if decays else 0.0,
                    "warmup": warmup[part],
                }
            )
    return groups
