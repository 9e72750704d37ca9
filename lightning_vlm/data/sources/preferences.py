"""Preference pairs: a prompt with images, a better and a worse answer.

`prompt` (or `question`, or a `conversations` list) with `chosen` and `rejected`, each as text or as messages; or whole
conversations in `chosen` and `rejected` that differ in their last message only, and no `prompt`. Both are answers to
the same images: rows whose sides bring different ones are refused. `negative` says where the rejected answer is from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_vlm.data.schema import BadSample, Message, Sample, message, text
from lightning_vlm.data.sources.base import ImageFinder, RowSource
from lightning_vlm.data.sources.conversations import (
    place_unplaced,
    row_images,
    row_info,
    row_videos,
    to_messages,
    value_of,
)
from lightning_vlm.data.sources.spec import SourceSpec
from lightning_vlm.data.sources.tables import Row, open_table, require

_PROMPTS = ("prompt", "question", "conversations")
_IMAGES_OF = {"chosen": "chosen_images", "rejected": "rejected_images"}  # columns with which a side brings its own
_REMEDY = (
    "make it from a model's own answers (`lightning-vlm predict -c FILE --out answers.jsonl`, then "
    "`lightning-vlm pairs --answers answers.jsonl`) or from captions (`lightning-vlm pairs --edits`), or "
)


@dataclass(frozen=True)
class PreferenceRow:
    """Builds a sample from a row with a chosen and a rejected answer.

    Args:
        label: name of the source. prompt: the prompt's column; None where chosen and rejected are whole conversations.
        find: opens images.
    """

    label: str
    prompt: str | None
    find: ImageFinder

    def __call__(self, row: Row, id: str) -> Sample:
        chosen, rejected = value_of(row, "chosen", id), value_of(row, "rejected", id)
        images = self._images(row, id)
        if self.prompt is None:
            messages, shown = to_messages(chosen, id, self.find, images)
            others, shown_others = to_messages(rejected, id, self.find, images)
            if messages[:-1] != others[:-1]:
                raise BadSample(id, "malformed", "chosen and rejected differ before their last message")
            _same_images(shown, shown_others, id)
            answers = [_answer(m[-1:], id, which) for m, which in ((messages, "chosen"), (others, "rejected"))]
            messages, images = messages[:-1], shown
        else:
            messages, images = to_messages(value_of(row, self.prompt, id), id, self.find, images)
            answers = [self._completion(v, id, w) for v, w in ((chosen, "chosen"), (rejected, "rejected"))]
        if row.get("system"):
            messages.insert(0, message("system", text(row["system"])))
        place_unplaced(messages, images=len(images), videos=row_videos(row))
        used = ("chosen", "rejected", "system", *_IMAGES_OF.values(), *_PROMPTS)
        return Sample(
            id,
            [*messages, message("assistant", text(answers[0]))],
            images,
            rejected=answers[1],
            source=self.label,
            info={"negative": "data"} | row_info(row, used),
        )

    def _images(self, row: Row, id: str) -> list[Any]:
        """The images of both sides: those of the row, or those that each side brings, which must be the same."""
        images = row_images(row, self.find)
        for column in _IMAGES_OF.values():
            own = self.find.all(row.get(column))
            if own and images:
                _same_images(images, own, id)
            images = images or own
        return images

    def _completion(self, value, id: str, which: str) -> str:
        return value if isinstance(value, str) else _answer(to_messages(value, id, self.find, [])[0], id, which)


def open_preferences(spec: SourceSpec, label: str) -> RowSource:
    """Rows of preference pairs.

    Raises:
        ValueError: as `open_table`; no `chosen` or `rejected` column, or nothing that says the prompt.
    """
    table = open_table(spec)
    require(table, "chosen")
    require(table, "rejected", remedy=_REMEDY)
    prompt = next((c for c in _PROMPTS if c in table.columns), None)
    if prompt is None and isinstance(table.row(0).get("chosen"), str):
        require(table, *_PROMPTS)
    return RowSource(table, PreferenceRow(label, prompt, ImageFinder.of(spec, table.root)), label=label)


def _same_images(images: list[Any], others: list[Any], id: str) -> None:
    if list(map(_key, images)) != list(map(_key, others)):
        raise BadSample(
            id,
            "malformed",
            f"chosen and rejected show different images ({_named(images)}; {_named(others)}): a pair is two answers to "
            "the same images",
        )


def _key(image: Any) -> Any:
    """What two equal images are equal by; callables of data URIs are compared by what they would decode."""
    return (image.func, image.args) if isinstance(image, partial) else image


def _named(images: list[Any]) -> str:
    shown = [os.path.basename(i) if isinstance(i, str) else "one without a name" for i in images]
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "") if shown else "none"


def _answer(messages: list[Message], id: str, which: str) -> str:
    """The text of a completion, which must be one assistant message of text."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadSample(id, "malformed", f"{which!r} must end in one assistant message, found {messages!r}")
    if any(p["type"] != "text" for p in messages[0]["content"]):
        raise BadSample(id, "malformed", f"{which!r} holds an image or a video; answers are text")
    return "".join(p["text"] for p in messages[0]["content"])
