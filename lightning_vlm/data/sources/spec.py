"""What a configuration says about one data source."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SourceSpec:
    """One data source. A field that the kind has no use for is refused, not ignored.

    Args:
        kind: geometry3k, mathvista, mathvision, mmvp, coco, sharegpt, messages, preference, qa, world or world-twins.
        path: file, folder, or name of a data set on the hub (`owner/name`).
        split: split of a hub data set, of a folder of files named by split, or of Karpathy's COCO (`train+restval`).
        name: configuration of a hub data set, where it has several.
        label: name in reports and first part of every sample id; default the kind. Mixed sources need different ones.
        images_root: folder that relative image paths start from; default the folder of the data file.
        images_prefix: leading part of the image paths that is dropped before they are looked up.
        prompt: how the question is asked: freeform or mcq (geometry3k), direct or boxed (qa). Default the first.
        instruction: text after the question, in place of the kind's own.
        columns: `our name: their name` for renamed columns; `id: null` numbers the rows instead of reading ids.
        part: only the samples whose id hashes into these bounds: [0, 0.75] and [0.75, 1] share none, whatever is added.
        limit: only the first so many rows.
        weight: relative share of the samples drawn in a mixture.
        options: settings of the kind: `captions: all|one` (coco), `swap_pairs: true|false` (mmvp), the arguments of the
            embedded world and its twins (world, world-twins).
    """

    kind: str
    path: str | None = None
    split: str | None = None
    name: str | None = None
    label: str | None = None
    images_root: str | None = None
    images_prefix: str | None = None
    prompt: str | None = None
    instruction: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)
    part: tuple[float, float] | None = None
    limit: int | None = None
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def one_of(value: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a valid name is near, else `; valid: …`."""
    names = list(valid)
    close = difflib.get_close_matches(value, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; valid: {', '.join(names)}"


def choose(value: str | None, valid: tuple[str, ...], what: str) -> str:
    """`value`, or the first valid one where it is None.

    Raises:
        ValueError: not a valid one.
    """
    if value is None:
        return valid[0]
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}{one_of(str(value), valid)}")
    return value
