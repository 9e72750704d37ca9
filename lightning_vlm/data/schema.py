"""The one conversation schema every source yields and every algorithm reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Part = dict[str, str]  # {"type": "text", "text": ...} or {"type": "image"}
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": list[Part]}


class BadSample(ValueError):
    """A sample that cannot be used as it is: says the sample's id, what is wrong, and how to mend it.

    Attributes:
        id: the sample's id.
        reason: short machine-readable kind by which skipped samples are counted: `missing_image`, `broken_image`,
            `placeholder_mismatch`, `truncated_image`, `video`, `unknown_part`, `control_token`, `template`,
            `tokenizer`, `empty_answer`, `equal_answers`, `too_long`, `missing_column`, `malformed`.
    """

    def __init__(self, id: str, reason: str, detail: str) -> None:
        super().__init__(f"sample {id}: {detail}")
        self.id, self.reason, self.detail = id, reason, detail

    def __reduce__(self):
        return (type(self), (self.id, self.reason, self.detail))


@dataclass(slots=True)
class Sample:
    """One conversation.

    Attributes:
        id: unique within its data set and stable between runs; every random draw is keyed by it.
        messages: roles with ordered parts; the images of `images` fill the image parts in order. A sample to learn from
            ends with an assistant message; a prompt to sample from need not.
        images: paths, encoded bytes, PIL images, or zero-argument callables returning a PIL image; decoded in workers.
        rejected: a worse last assistant text for the same prompt, where there is one.
        answer: gold answer for grading, where there is one.
        source: name of the data set, for per-source reports.
        info: everything else a benchmark or report wants (task, level, choices, patch labels, ...).
    """

    id: str
    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    rejected: str | None = None
    answer: str | None = None
    source: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> list[Message]:
        """The messages before the last assistant message (all of them if the last is not the assistant's)."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[:-1]
        return self.messages

    def chosen(self) -> str | None:
        """Text of the last assistant message, or None."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return "".join(p.get("text", "") for p in self.messages[-1]["content"])
        return None


def text(content: str) -> Part:
    """A text part."""
    return {"type": "text", "text": content}


def image() -> Part:
    """An image part; the n-th one of a conversation shows `images[n]`."""
    return {"type": "image"}


def message(role: Literal["system", "user", "assistant"], *parts: Part) -> Message:
    """A message made of parts."""
    return {"role": role, "content": list(parts)}
