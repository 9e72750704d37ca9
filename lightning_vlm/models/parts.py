"""What is trained, part by part: freezing, learning rates, LoRA, activation checkpointing, and the table of it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import PreTrainedModel

from .families import PARTS, Family, blocks
from .lora import inject_lora, is_lora
from .policy import Policy


@dataclass(kw_only=True)
class PartPolicy:
    """How one part (vision, projector, language, head) is trained.

    Attributes:
        freeze: keep the part's weights as they are.
        lr: learning rate; None takes the algorithm's.
        warmup: warm-up in optimizer steps; None takes the algorithm's.
        weight_decay: decoupled weight decay; None takes the algorithm's.
        lora_rank: rank of LoRA adapters on the part's linear layers, whose own weights are then frozen; 0 trains the
            weights themselves.
        lora_alpha: LoRA's α, the update being α / rank · BA; None takes twice the rank.
        checkpoint: recompute the activations of the part's blocks in the backward instead of keeping them.
    """

    freeze: bool = False
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    checkpoint: bool = False

    @property
    def alpha(self) -> float:
        """LoRA's α in force."""
        return self.lora_alpha or 2.0 * self.lora_rank


@dataclass(frozen=True)
class PartRow:
    """One line of the part table.

    Attributes:
        part: the part's name.
        parameters: how many, adapters included.
        trainable: how many of them are trained.
        off_graph: how many no gradient can reach.
        dtype: of the weights; `mixed` where there are several.
        policy: the part's settings.
    """

    part: str
    parameters: int
    trainable: int
    off_graph: int
    dtype: str
    policy: PartPolicy


def part_of(name: str, family: Family) -> str:
    """The part a parameter of the Hugging Face model belongs to; the longest matching path decides.

    Raises:
        ValueError: a name outside the family's paths.
    """
    owners = [
        (len(path), part)
        for part, paths in family.paths().items()
        for path in paths
        if name == path or name.startswith(f"{path}.")
    ]
    if not owners:
        raise ValueError(f"parameter {name!r} belongs to no part of {family.name}")
    return max(owners)[1]


def part_parameters(model: Policy | PreTrainedModel, family: Family) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """{part: [(name in the Hugging Face model, parameter)]}, each parameter once; a tied head counts as language."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, param in inner_model(model).named_parameters():
        found[part_of(name, family)].append((name, param))
    return {part: params for part, params in found.items() if params}


def apply_parts(
    model: Policy | PreTrainedModel, family: Family, parts: Mapping[str, PartPolicy] | None = None, *, seed: int = 0
) -> list[str]:
    """Freezes, injects adapters and turns on checkpointing, as `parts` says; call it once, before any optimizer.

    Args:
        model: changed in place.
        family: its family.
        parts: settings of the parts that need any; the others are trained in full.
        seed: of the adapters' random halves.

    Returns:
        Names of parameters no gradient can reach, which are frozen whatever `parts` says.

    Raises:
        ValueError: unknown part, settings that contradict each other or have no effect, everything frozen.
    """
    model, parts = inner_model(model), dict(parts or {})
    owned = part_parameters(model, family)
    off_graph = family.off_graph(model)
    found = blocks(model)
    for part, policy in parts.items():
        _check(part, parts, owned)
        if policy.checkpoint and not any(part_of(name, family) == part for name in found):
            raise ValueError(f"parts.{part}.checkpoint has no effect: the part has no repeated blocks")
    ranks = {
        name: (policy.lora_rank, policy.alpha)
        for part, policy in parts.items()
        if policy.lora_rank
        for name in _linear_layers(model, family, part, set(off_graph))
    }
    if ranks:
        inject_lora(model, ranks, seed=seed)
    hidden = set(off_graph)
    for part, params in part_parameters(model, family).items():
        policy = parts.get(part, PartPolicy())
        for name, param in params:
            trained = not policy.freeze and name not in hidden and (not policy.lora_rank or is_lora(name))
            param.requires_grad_(trained)
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("every part is frozen, nothing is left to train: set parts.<part>.freeze to false for one")
    for name, block in found.items():
        block.gradient_checkpointing = parts.get(part_of(name, family), PartPolicy()).checkpoint
        # Non-reentrant: works whether or not the block's inputs need a gradient.
        block._gradient_checkpointing_func = partial(torch_checkpoint, use_reentrant=False)
    return off_graph


def projector_alone(parts: Mapping[str, PartPolicy] | None) -> dict[str, PartPolicy]:
    """The settings with all parts but the projector frozen: adapter-only training (Skywork R1V).

    Raises:
        ValueError: a setting that trains another part, or freezes the projector.
    """
    given = dict(parts or {})
    for part, policy in given.items():
        if part == "projector" or part not in PARTS:
            odd = [] if not policy.freeze else ["freeze"]
        else:
            given[part] = replace(policy, freeze=True)
            odd = [f.name for f in fields(policy) if f.name not in ("freeze", "checkpoint")]
            odd = [name for name in odd if getattr(policy, name) != getattr(PartPolicy(), name)]
        if odd:
            raise ValueError(
                f"model.adapter_only trains the projector and nothing else, but parts.{part}.{odd[0]} is "
                f"{getattr(policy, odd[0])}: leave one of them out"
            )
    return {part: PartPolicy(freeze=True) for part in PARTS if part != "projector"} | given


def part_table(
    model: Policy | PreTrainedModel, family: Family, parts: Mapping[str, PartPolicy] | None = None
) -> list[PartRow]:
    """One row per part of the model, in the order vision, projector, language, head."""
    model = inner_model(model)
    hidden, rows = set(family.off_graph(model)), []
    for part, params in part_parameters(model, family).items():
        dtypes = {str(param.dtype).removeprefix("torch.") for _, param in params}
        rows.append(
            PartRow(
                part=part,
                parameters=sum(param.numel() for _, param in params),
                trainable=sum(param.numel() for _, param in params if param.requires_grad),
                off_graph=sum(param.numel() for name, param in params if name in hidden),
                dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
                policy=(parts or {}).get(part, PartPolicy()),
            )
        )
    return rows


def render_table(rows: list[PartRow]) -> str:
    """The part table as plain text, a line for the sum at its end; columns nothing uses are left out."""
    shown = [name for name in ("lr", "warmup", "weight_decay", "lora_rank", "checkpoint") if _used(rows, name)]
    hidden = ["off graph"] if any(row.off_graph for row in rows) else []
    lines = [["part", "parameters", "trainable", *hidden, "dtype", *shown]]
    for row in rows:
        counts = [row.parameters, row.trainable, *([row.off_graph] if hidden else [])]
        settings = [getattr(row.policy, name) for name in shown]
        lines.append(
            [row.part, *(f"{n:,}" for n in counts), row.dtype, *("" if s is None else str(s) for s in settings)]
        )
    sums = [sum(row.parameters for row in rows), sum(row.trainable for row in rows)]
    lines.append(["all", *(f"{n:,}" for n in sums), *[""] * (len(lines[0]) - 3)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *text[1:]]).rstrip() for line, text in zip(lines, texts, strict=True)
    )


def _used(rows: list[PartRow], name: str) -> bool:
    return any(getattr(row.policy, name) not in (None, 0, False) for row in rows)


def inner_model(model: Policy | PreTrainedModel) -> PreTrainedModel:
    """The Hugging Face model, in whose names parts are written."""
    return model.model if isinstance(model, Policy) else model


def _check(part: str, parts: Mapping[str, PartPolicy], owned: Mapping[str, list]) -> None:
    policy = parts[part]
    if part not in PARTS:
        near = get_close_matches(part, PARTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"parts are {', '.join(PARTS)}"
        raise ValueError(f"unknown part {part!r} in parts: {hint}")
    if part not in owned:
        if part == "head" and policy == PartPolicy(freeze=True) and parts.get("language", PartPolicy()).freeze:
            return  # frozen with the embeddings
        raise ValueError(f"parts.{part} cannot be set: the head is tied to the embeddings, which belong to language")
    defaults = PartPolicy()
    if policy.freeze:
        for field in fields(policy):
            value = getattr(policy, field.name)
            # The backward still runs through a frozen language model, so checkpointing it saves memory.
            if field.name == "freeze" or (field.name == "checkpoint" and part != "vision"):
                continue
            if value != getattr(defaults, field.name):
                raise ValueError(
                    f"parts.{part}.{field.name} is {value} but parts.{part}.freeze is true: drop one of them"
                )
    for name in ("lr", "warmup", "weight_decay", "lora_rank", "lora_alpha"):
        value = getattr(policy, name)
        if value is not None and value < 0:
            raise ValueError(f"parts.{part}.{name} is {value}: it cannot be negative")
    if policy.lr == 0:
        raise ValueError(f"parts.{part}.lr is 0: use parts.{part}.freeze: true")
    if policy.lora_alpha is not None and not policy.lora_rank:
        raise ValueError(f"parts.{part}.lora_alpha has no effect without parts.{part}.lora_rank")


def _linear_layers(model: PreTrainedModel, family: Family, part: str, off_graph: set[str]) -> list[str]:
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and f"{name}.weight" not in off_graph and part_of(name, family) == part
    ]
    if not names:
        raise ValueError(f"parts.{part}.lora_rank has no effect: the part has no linear layers")
    return names
