"""Data sources: what a `SourceSpec` names, opened as a sequence of samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.base import Part, Relabelled, Source, Subset, draw, id_at
from lightning_vlm.data.sources.coco import open_coco
from lightning_vlm.data.sources.conversations import open_conversations
from lightning_vlm.data.sources.mathvista import open_mathvista, refuse_training
from lightning_vlm.data.sources.preferences import open_preferences
from lightning_vlm.data.sources.questions import open_geometry3k, open_mathvision, open_mmvp, open_questions
from lightning_vlm.data.sources.spec import SourceSpec, one_of

_ALWAYS = ("kind", "label", "part", "limit", "weight")
_TABLE = ("path", "split", "name", "images_root", "images_prefix", "columns")
_IMAGES = ("image", "images", "id")
_BY_PURPOSE = ("coco", "geometry3k", "qa")  # kinds that take another split, or show captions otherwise, in training
_TURNS = (*_IMAGES, "video", "videos", "system")


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        open: (spec, label) → samples. uses: the fields of a spec that it reads. columns: the columns that it reads and
            that `columns` can rename. options: the keys of `options` that it reads; None leaves the check to it.
    """

    open: Callable[..., Sequence[Sample]]
    uses: tuple[str, ...]
    columns: tuple[str, ...] = ()
    options: tuple[str, ...] | None = ()


def open_world(spec: SourceSpec, label: str) -> Sequence[Sample]:
    """The embedded world; `options` are its arguments.

    Raises:
        ValueError: an option that it does not have.
    """
    from lightning_vlm.data.world import WorldSource

    return _of_world(WorldSource, "the embedded world has", spec, label)


def open_world_twins(spec: SourceSpec, label: str) -> Sequence[Sample]:
    """Pairs of pictures of the embedded world that differ in one detail; `options` are its arguments.

    Raises:
        ValueError: an option that it does not have.
    """
    from lightning_vlm.data.world.twins import TwinSource

    return _of_world(TwinSource, "the embedded world's twins have", spec, label)


def _of_world(source: Callable[..., Sequence[Sample]], whose: str, spec: SourceSpec, label: str) -> Sequence[Sample]:
    valid = [p for p in inspect.signature(source).parameters if p != "split"]
    for option in spec.options:
        if option not in valid:
            raise ValueError(f"{whose} no option {option!r}{one_of(option, valid)}")
    split = {} if spec.split is None else {"split": spec.split}
    return Relabelled(source(**spec.options, **split), label, prefix_ids=spec.label is not None)


KINDS = {
    "geometry3k": Kind(open_geometry3k, (*_TABLE, "prompt", "instruction"), ("problem", "answer", "choices", *_IMAGES)),
    "mathvista": Kind(
        open_mathvista,
        (*_TABLE, "instruction"),
        (
            *(
                "question",
                "query",
                "choices",
                "unit",
                "precision",
                "answer",
                "question_type",
                "answer_type",
                "metadata",
            ),
            *("decoded_image", "pid", *_IMAGES),
        ),
    ),
    "mathvision": Kind(
        open_mathvision,
        (*_TABLE, "instruction"),
        ("question", "options", "answer", "level", "subject", "decoded_image", *_IMAGES),
    ),
    "mmvp": Kind(open_mmvp, ("path", "instruction"), (), ("swap_pairs",)),
    "coco": Kind(open_coco, ("path", "split", "images_root", "images_prefix", "instruction"), (), ("captions",)),
    "sharegpt": Kind(open_conversations, _TABLE, ("conversations", *_TURNS)),
    "messages": Kind(open_conversations, _TABLE, ("messages", *_TURNS)),
    "preference": Kind(
        open_preferences, _TABLE, ("prompt", "question", "conversations", "chosen", "rejected", *_TURNS)
    ),
    "qa": Kind(
        open_questions, (*_TABLE, "prompt", "instruction"), ("question", "problem", "answer", "choices", *_IMAGES)
    ),
    "world": Kind(open_world, ("split",), (), None),
    "world-twins": Kind(open_world_twins, ("split",), (), None),
}


def open_source(spec: SourceSpec, *, for_training: bool) -> Sequence[Sample]:
    """Open the samples that a spec names; images are found but not decoded.

    Args:
        spec: what to open. for_training: whether something learns from them; test-only data are refused then.

    Raises:
        ValueError: in one line what is wrong with the spec or the data, and how to mend it. Single samples that cannot
            be used are `BadSample`s, raised when they are drawn or encoded.
    """
    if spec.kind not in KINDS:
        raise ValueError(f"unknown data kind {spec.kind!r}{one_of(str(spec.kind), KINDS)}")
    kind = KINDS[spec.kind]
    _check(spec, kind)
    if for_training:
        refuse_training(spec)
    label = spec.label or spec.kind
    extra = {"for_training": for_training} if spec.kind in _BY_PURPOSE else {}
    source = kind.open(spec, label, **extra)
    if len(source) == 0:
        raise ValueError(f"data source {label!r} is empty; choose another split or file, or leave it out")
    if spec.part is not None:
        source = Part(*spec.part).of(source)
    if spec.limit is not None and spec.limit < len(source):
        return Subset(source, range(spec.limit))
    return source


def _check(spec: SourceSpec, kind: Kind) -> None:
    """Refuse what has no effect or no meaning."""
    used = (*kind.uses, *(("options",) if kind.options != () else ()))
    for name, value in vars(spec).items():
        if name not in (*_ALWAYS, *used) and value not in (None, {}):
            raise ValueError(f"data kind {spec.kind!r} does not use `{name}`; it uses: {', '.join(used)}")
    for column in spec.columns:
        if column not in kind.columns:
            raise ValueError(
                f"columns: data kind {spec.kind!r} reads no column {column!r}{one_of(column, kind.columns)} "
                "(columns maps our name to theirs)"
            )
    for option in spec.options:
        if kind.options is not None and option not in kind.options:
            raise ValueError(f"data kind {spec.kind!r} has no option {option!r}{one_of(option, kind.options)}")
    if spec.limit is not None and spec.limit < 1:
        raise ValueError(f"limit must be at least 1, got {spec.limit}")
    if not (math.isfinite(spec.weight) and spec.weight > 0):
        raise ValueError(f"weight must be a positive number, got {spec.weight}; leave a source out that has no share")
