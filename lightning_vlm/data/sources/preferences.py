"""Preference pairs: a prompt with images, a better and a worse answer.

`prompt` (or `question`, or a `conversations` list) with `chosen` and `rejected`, each as text or as messages; or whole
conversations in `chosen` and `rejected` that differ in their last message only, and no `prompt`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
_REMEDY = "make it from a model's own answers (`lightning-vlm predict -c FILE --out answers.jsonl`, column output), or "


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
        images = row_images(row, self.find)
        if self.prompt is None:
            messages, images = to_messages(chosen, id, self.find, images)
            others, _ = to_messages(rejected, id, self.find, [])
            if messages[:-1] != others[:-1]:
                raise BadSample(id, "malformed", "chosen and rejected differ before their last message")
            answers = [_answer(m[-1:], id, which) for m, which in ((messages, "chosen"), (others, "rejected"))]
            messages = messages[:-1]
        else:
            messages, images = to_messages(value_of(row, self.prompt, id), id, self.find, images)
            answers = [self._completion(v, id, w) for v, w in ((chosen, "chosen"), (rejected, "rejected"))]
        if row.get("system"):
            messages.insert(0, message("system", text(row["system"])))
        place_unplaced(messages, images=len(images), videos=row_videos(row))
        used = ("chosen", "rejected", "system", *_PROMPTS)
        return Sample(
            id,
            [*messages, message("assistant", text(answers[0]))],
            images,
            rejected=answers[1],
            source=self.label,
            info=row_info(row, used),
        )

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


def _answer(messages: list[Message], id: str, which: str) -> str:
    """The text of a completion, which must be one assistant message of text."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadSample(id, "malformed", f"{which!r} must end in one assistant message, found {messages!r}")
    if any(p["type"] != "text" for p in messages[0]["content"]):
        raise BadSample(id, "malformed", f"{which!r} holds an image or a video; answers are text")
    return "".join(p["text"] for p in messages[0]["content"])
