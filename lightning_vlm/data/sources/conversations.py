"""Conversations: ShareGPT turns, OpenAI/Qwen messages, and questions with one answer.

In text, `<image>` and `<video>` stand for a picture or a film; in a message given as a list of parts only the parts
count and text is literal. Text is kept as it is. Where there are pictures but no place for them, they go before the
first user text. Numbers of places and pictures that differ are kept, for the encoder to report; so are videos.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightning_vlm.data.schema import BadSample, Message, Part, Sample, image, message, text
from lightning_vlm.data.sources.base import ImageFinder, RowSource
from lightning_vlm.data.sources.spec import SourceSpec
from lightning_vlm.data.sources.tables import Row, open_table, require

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
IMAGE_COLUMNS = ("images", "image")
VIDEO_COLUMNS = ("videos", "video")
_TAG = re.compile(r"(<image>|<video>)")


def split_tags(content: str) -> list[Part]:
    """Parts of a text with `<image>` and `<video>` tags."""
    pieces = [p for p in _TAG.split(content) if p]
    return [{"type": p[1:-1]} if _TAG.fullmatch(p) else text(p) for p in pieces]


def to_messages(turns: Any, id: str, find: ImageFinder, images: list[Any]) -> tuple[list[Message], list[Any]]:
    """Turns of either form as messages, with the images in the order of their places.

    Args:
        turns: a list of {"from", "value"} or {"role", "content"}; one such dict; or the text of one user turn.
        id: the sample's id. find: opens images named inside parts.
        images: images of the row's own column; they fill the image places that name no image themselves.

    Raises:
        BadSample: another shape, an unknown role or part.
    """
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list) or not turns:
        raise BadSample(id, "malformed", f"expected a list of messages, found {turns!r}")
    waiting, ordered, messages = list(images), [], []
    for turn in turns:
        role, content = _turn(turn, id)
        parts: list[Part] = []
        for part, own in _parts(content, id):
            if part["type"] == "image":
                if own is not None:
                    ordered.append(find(own))
                elif waiting:
                    ordered.append(waiting.pop(0))
            parts.append(part)
        messages.append(message(role, *parts))
    return messages, ordered + waiting


def place_unplaced(messages: list[Message], *, images: int, videos: int) -> None:
    """Put pictures and films that have no place anywhere before the first user text."""
    for kind, count in (("video", videos), ("image", images)):
        if count and not any(p["type"] == kind for m in messages for p in m["content"]):
            first = next((m for m in messages if m["role"] == "user"), messages[0])
            first["content"][:0] = [{"type": kind} for _ in range(count)]


def row_images(row: Row, find: ImageFinder) -> list[Any]:
    """Images of a row's `images` and `image` columns."""
    return find.all(*(row.get(c) for c in IMAGE_COLUMNS))


def row_videos(row: Row) -> int:
    """Number of videos of a row's `videos` and `video` columns."""
    values = [row.get(c) for c in VIDEO_COLUMNS]
    return sum(len(v) if isinstance(v, list) else int(v is not None) for v in values)


def row_info(row: Row, used: tuple[str, ...]) -> dict[str, Any]:
    """Plain values of the columns that are used for nothing else."""
    used = (*used, *IMAGE_COLUMNS, *VIDEO_COLUMNS)
    return {k: v for k, v in row.items() if k not in used and isinstance(v, (str, int, float, bool))}


def value_of(row: Row, column: str, id: str) -> Any:
    """A value that must be there.

    Raises:
        BadSample: it is not.
    """
    if row.get(column) is None:
        raise BadSample(id, "missing_column", f"the row has no {column!r}; give it one or leave the row out")
    return row[column]


@dataclass(frozen=True)
class ConversationRow:
    """Builds a sample from a row that holds a conversation.

    Args:
        label: name of the source. column: where the turns are. find: opens images.
    """

    label: str
    column: str
    find: ImageFinder

    def __call__(self, row: Row, id: str) -> Sample:
        turns = value_of(row, self.column, id)
        messages, images = to_messages(turns, id, self.find, row_images(row, self.find))
        if row.get("system"):
            messages.insert(0, message("system", text(row["system"])))
        place_unplaced(messages, images=len(images), videos=row_videos(row))
        gold = row.get("answer")  # beside the conversation, for rules and rewards
        return Sample(
            id,
            messages,
            images,
            answer=str(gold) if isinstance(gold, str | int | float) else None,
            source=self.label,
            info=row_info(row, (self.column, "system")),
        )


def open_conversations(spec: SourceSpec, label: str) -> RowSource:
    """ShareGPT (`conversations`) or `messages` rows.

    Raises:
        ValueError: as `open_table`; no such column.
    """
    table = open_table(spec)
    column = require(table, "conversations" if spec.kind == "sharegpt" else "messages")
    return RowSource(table, ConversationRow(label, column, ImageFinder.of(spec, table.root)), label=label)


def question(
    id: str,
    label: str,
    problem: str,
    images: list[Any],
    *,
    instruction: str = "",
    target: str | None = None,
    answer: str | None = None,
    info: dict[str, Any] | None = None,
) -> Sample:
    """One user turn and, where there is a target, the assistant's.

    Args:
        id, label: of the sample. problem: its text, with or without `<image>` tags. images: its pictures.
        instruction: added in a line of its own. target: what the assistant should write.
        answer: gold answer for grading. info: everything else.
    """
    messages = [message("user", *split_tags(f"{problem}\n{instruction}" if instruction else problem))]
    place_unplaced(messages, images=len(images), videos=0)
    if target is not None:
        messages.append(message("assistant", text(target)))
    return Sample(id, messages, images, answer=answer, source=label, info=info or {})


def _turn(turn: Any, id: str) -> tuple[str, Any]:
    if not isinstance(turn, dict) or not ({"role", "from"} & turn.keys()):
        raise BadSample(id, "malformed", f"a turn needs role/content or from/value, found {turn!r}")
    role = turn.get("role") or turn.get("from")
    if role not in ROLES:
        raise BadSample(id, "malformed", f"unknown role {role!r}; known: {', '.join(ROLES)}")
    return ROLES[role], turn["content"] if turn.get("content") is not None else turn.get("value")


def _parts(content: Any, id: str) -> list[tuple[Part, Any]]:
    """(part, the image it names itself or None)."""
    if content is None:
        return []
    if isinstance(content, str):
        return [(part, None) for part in split_tags(content)]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadSample(id, "malformed", f"content must be text or a list of parts, found {content!r}")
    return [_part(part, id) for part in content]


def _part(part: Any, id: str) -> tuple[Part, Any]:
    if isinstance(part, str):
        return text(part), None
    if not isinstance(part, dict):
        raise BadSample(id, "malformed", f"a part must be text or an object, found {part!r}")
    kind = part.get("type") or next((k for k in ("text", "image", "video") if part.get(k) is not None), None)
    if kind == "text":
        return text(part.get("text") or ""), None
    if kind in ("video", "video_url"):
        return {"type": "video"}, None
    if kind == "image":
        return image(), next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
    if kind == "image_url":
        url = part.get("image_url")
        return image(), url.get("url") if isinstance(url, dict) else url
    raise BadSample(id, "malformed", f"unknown part type {kind!r}; known: text, image, image_url, video")
