"""How far training moved each part of a model: ‖after − before‖ / ‖before‖, tensor by tensor from the files.

Norms are Frobenius norms over all weights of a part or block together. Only one tensor of each side is in memory at a
time, and nothing is built.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lightning_vlm.models.families import FAMILIES, Family
from lightning_vlm.models.load import check_path
from lightning_vlm.probes.influence import Track, untracked

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|blocks)\.(\d+)\.")
_ORDER = ("vision", "projector", "language", "head")


@dataclass(frozen=True)
class Update:
    """The update of a part, or of one block of it.

    Attributes:
        part: vision, projector, language or head. block: number of the block from 0; None for a part as a whole, −1
            for what of a part lies outside its blocks.
        weights: how many. moved: ‖after − before‖. norm: ‖before‖.
    """

    part: str
    block: int | None
    weights: int
    moved: float
    norm: float

    @property
    def relative(self) -> float:
        """‖after − before‖ / ‖before‖; 0 if nothing moved, infinite if only the norm before is 0."""
        if self.norm:
            return self.moved / self.norm
        return math.inf if self.moved else 0.0


def part_updates(before: str | Path, after: str | Path, *, track: Track = untracked) -> list[Update]:
    """The updates of every part, each followed by those of its blocks.

    Args:
        before, after: directories of one model or tower, with safetensors files.
        track: wraps (names of tensors, what is done), to show progress.

    Returns:
        In the order vision, projector, language, head; a part without blocks has one update. Tied weights count once,
        where they are stored.

    Raises:
        ValueError: a missing directory or file, other weights or shapes on one side, a name of no part.
    """
    old, new = _Weights(before), _Weights(after)
    if odd := sorted(old.files.keys() ^ new.files.keys()):
        side = before if odd[0] in old.files else after
        raise ValueError(
            f"{before} and {after} hold different weights: {len(odd)} are on one side only, {odd[0]} in {side}; give "
            "two directories of one model"
        )
    sums: dict[tuple[str, int], list[float]] = {}
    for name in track(sorted(old.files), "weights"):
        a, b = old.tensor(name), new.tensor(name)
        if a.shape != b.shape:
            raise ValueError(f"{name} is {list(a.shape)} in {before} and {list(b.shape)} in {after}: other models")
        if not (a.is_floating_point() and b.is_floating_point()):
            continue
        found = _BLOCK.search(name)
        own = sums.setdefault((old.part(name), int(found[1]) if found else -1), [0, 0.0, 0.0])
        a, b = a.double(), b.double()
        own[0] += a.numel()
        own[1] += float((b - a).square().sum())
        own[2] += float(a.square().sum())
    updates = []
    for part in _ORDER:
        blocks = sorted((block, values) for (owner, block), values in sums.items() if owner == part)
        if blocks:
            updates.append(_update(part, None, [values for _, values in blocks]))
            if len(blocks) > 1:
                updates += [_update(part, block, [values]) for block, values in blocks]
    return updates


def _update(part: str, block: int | None, sums: Sequence[Sequence[float]]) -> Update:
    weights, moved, norm = (sum(column) for column in zip(*sums, strict=True))
    return Update(part, block, int(weights), math.sqrt(moved), math.sqrt(norm))


class _Weights:
    """The safetensors files of a model directory, and which part each name in them belongs to."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        if not self.directory.is_dir():
            raise ValueError(f"{str(directory)!r} is no directory here: updates are read from two model directories")
        check_path(str(directory))
        kind = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        self.family = next((f for f in FAMILIES.values() if kind.get("model_type") in f.model_types), None)
        self.text = "vocab_size" in kind
        files = sorted(self.directory.glob("*.safetensors"))
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            files = [
                self.directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
        if not files:
            raise ValueError(f"{directory} has no safetensors files: export the model, updates are read from them")
        self.files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as content:
                    self.files |= dict.fromkeys(content.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its file."""
        with safe_open(self.files[name], framework="pt") as content:
            return content.get_tensor(name)

    def part(self, name: str) -> str:
        """The part that a name in the files belongs to."""
        if self.family is None:
            if "lm_head" in name.split("."):
                return "head"
            return "language" if self.text else "vision"
        return saved_part(name, self.family)


def saved_part(name: str, family: Family) -> str:
    """The part of a weight by its name in the files, which older releases of a family write without `model.`.

    Raises:
        ValueError: a name of no part.
    """
    if "lm_head" in name.split("."):
        return "head"
    short = name.removeprefix("model.")
    owners = [
        (len(path), part)
        for part, paths in family.paths().items()
        for path in (p.removeprefix("model.") for p in paths)
        if short == path or short.startswith(f"{path}.")
    ]
    if owners:
        return max(owners)[1]
    if short.split(".")[0] in ("layers", "embed_tokens", "norm"):  # Qwen2-VL's language model
        return "language"
    raise ValueError(f"weight {name!r} belongs to no part of {family.name}")
