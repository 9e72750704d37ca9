"""From samples to rows: chat template, tokens, image placeholders, and which tokens are scored.

The template is rendered once with a mark in place of every assistant text. What stands between the marks is literal
text, tokenised as the prompt a generation would see; the assistant texts are tokenised as its continuation. So what is
trained is what is generated, and scored are exactly the assistant texts and the token that ends each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2 import TemplateError

from lightning_vlm.data.images import BadImage, load_image
from lightning_vlm.data.schema import BadSample, Message, Sample, message, text
from lightning_vlm.models.batch import ImageInput, Row
from lightning_vlm.models.processor import Processor

_Images = list[tuple[ImageInput, list[int]]]


@dataclass(slots=True)
class _Turn:
    """Literal text of the template, and the assistant text that follows it (None at the end of a prompt)."""

    literal: str
    answer: str | None


@dataclass(slots=True)
class _Tokens:
    """A row in the making."""

    ids: list[int]
    answers: list[range]  # where each assistant text with its end of turn lies
    images: list[range]  # where each image's ids lie


def _content(msg: Message) -> str:
    return "".join(part.get("text", "") for part in msg["content"])


class Encoder:
    """Encodes samples for one processor.

    A template that ends assistant turns by no token gets the tokenizer's EOS after every assistant text. Whatever the
    template writes between its generation prompt and the text (LLaVA's space after `ASSISTANT:`, say) has to be
    generated, and so belongs to the answer. What it writes after the last end of turn is left out.
    """

    def __init__(
        self, processor: Processor, *, max_length: int = 4096, truncate: Literal["never", "right"] = "never"
    ) -> None:
        """Set limits.

        Args:
            processor: of the model to train or sample from.
            max_length: most tokens of a row, image tokens included.
            truncate: `never` refuses longer samples; `right` cuts the last assistant text, which then has no scored
                end. An image or a prompt is never cut.

        Raises:
            ValueError: a `max_length` below 1, or an unknown `truncate`.
        """
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: it must be at least 1")
        if truncate not in ("never", "right"):
            raise ValueError(f"truncate is {truncate!r}: choose never or right")
        self.processor, self.max_length, self.truncate = processor, max_length, truncate
        self._end, self._end_id = processor.end_of_turn
        # What the tokenizer puts before any text (BOS), as the family's own processor would.
        with_special, without = processor.tokenizer("a").input_ids, self._ids("a")
        self._lead = with_special[: len(with_special) - len(without)]
        while self._lead and with_special[len(self._lead) : len(self._lead) + len(without)] != without:
            self._lead = self._lead[:-1]  # the tokenizer also appends (EOS)

    def encode(self, sample: Sample) -> Row:
        """The whole conversation; every assistant text and its end of turn is scored.

        Raises:
            BadSample: it cannot be used as it is; says why.
        """
        self._check_answer(sample, sample.chosen())
        tokens = self._tokens(sample, sample.messages, images := self._images(sample))
        return self._row(sample, tokens, images, name="chosen", scored=tokens.answers)

    def encode_prompt(self, sample: Sample) -> Row:
        """Everything up to where the last assistant text begins; nothing is scored.

        The ids are a prefix of those that `encode` gives.

        Raises:
            BadSample: it cannot be used as it is; says why.
        """
        tokens = self._tokens(sample, sample.prompt(), images := self._images(sample))
        return self._row(sample, tokens, images, name="prompt", scored=[])

    def encode_pair(self, sample: Sample) -> list[Row]:
        """The conversation with its own last text (`chosen`) and with the rejected one; only that text is scored.

        Raises:
            BadSample: it cannot be used as it is; says why. Two texts that are the same, or of which `truncate` leaves
                the same, are `equal_answers`.
        """
        chosen, rejected = sample.chosen(), sample.rejected
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if answer is None:
                raise BadSample(sample.id, "missing_column", f"has no `{name}` text, which a preference pair needs")
        if chosen.strip() and chosen.strip() == rejected.strip():
            raise BadSample(
                sample.id,
                "equal_answers",
                f"chosen and rejected are the same text ({chosen.strip()[:40]!r}): there is no preference to learn",
            )
        rows = self.encode_answers(sample, {"chosen": chosen, "rejected": rejected})
        if rows[0].input_ids.tolist() == rows[1].input_ids.tolist():
            raise BadSample(
                sample.id,
                "equal_answers",
                f"chosen and rejected differ only behind max_length {self.max_length}, where they are cut: raise it",
            )
        return rows

    def encode_answer(self, sample: Sample) -> list[Row]:
        """The conversation with only its last assistant text scored, which negatives are yet to be found for.

        Raises:
            BadSample: it cannot be used as it is; says why.
        """
        return self.encode_answers(sample, {"chosen": sample.chosen()})

    def encode_answers(self, sample: Sample, answers: Mapping[str, str | None]) -> list[Row]:
        """The sample's prompt continued by each of several answers; only the answer is scored.

        Args:
            sample: its last assistant text is ignored.
            answers: name of the row → text of the answer.

        Raises:
            BadSample: it cannot be used as it is; says why, and which answer is empty or too long.
        """
        for name, answer in answers.items():
            self._check_answer(sample, answer, f"the {name} answer")
        images, rows = self._images(sample), []
        for name, answer in answers.items():
            tokens = self._tokens(sample, [*sample.prompt(), message("assistant", text(answer))], images)
            try:
                rows.append(self._row(sample, tokens, images, name=name, scored=tokens.answers[-1:]))
            except BadSample as bad:
                raise BadSample(bad.id, bad.reason, f"with the {name} answer: {bad.detail}") from bad
        return rows

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_answer(self, sample: Sample, answer: str | None, which: str = "the answer") -> None:
        if answer is None:
            raise BadSample(sample.id, "empty_answer", "does not end with an assistant message: nothing to learn")
        if not answer.strip():
            raise BadSample(sample.id, "empty_answer", f"{which} is empty ({answer!r})")

    def _check(self, id: str, messages: Sequence[Message], images: int) -> list[Message]:
        """The messages with each assistant text in one part; refuses what the schema or the template cannot hold."""
        checked, holes = [], 0
        for n, msg in enumerate(messages):
            kinds = [part.get("type") for part in msg["content"]]
            if "video" in kinds:
                raise BadSample(id, "video", f"message {n} has a video; only images are supported")
            if unknown := [kind for kind in kinds if kind not in ("text", "image")]:
                raise BadSample(id, "unknown_part", f"message {n} has a part of type {unknown[0]!r}; use text or image")
            holes += kinds.count("image")
            content = _content(msg)
            # A text must not turn into an image, a turn, or an end.
            if control := next((token for token in self.processor.control_tokens if token in content), None):
                raise BadSample(
                    id, "control_token", f"the text of message {n} contains the control token {control!r}: remove it"
                )
            if msg["role"] == "assistant":
                if "image" in kinds:
                    raise BadSample(id, "placeholder_mismatch", f"message {n} is the assistant's and shows an image")
                if not content.strip():
                    raise BadSample(id, "empty_answer", f"the assistant's message {n} is empty")
                msg = message("assistant", text(content))
            checked.append(msg)
        if holes != images:
            raise BadSample(id, "placeholder_mismatch", f"{holes} image placeholders for {images} images")
        return checked

    def _images(self, sample: Sample) -> _Images:
        images = []
        for n, source in enumerate(sample.images):
            try:
                images.append(self.processor.image(load_image(source)))
            except BadImage as error:
                raise BadSample(sample.id, error.reason, f"image {n}: {error}") from error
            except ValueError as error:
                raise BadSample(sample.id, "broken_image", f"image {n}: the processor refuses it: {error}") from error
        return images

    # --- template ----------------------------------------------------------------------------------------------------

    def _render(self, id: str, messages: list[Message], prompt: bool) -> str:
        try:
            return self.processor.render(messages, add_generation_prompt=prompt)
        except TemplateError as error:
            raise BadSample(id, "template", f"the chat template refuses the conversation: {error}") from error

    def _turns(self, id: str, messages: list[Message]) -> list[_Turn]:
        """Cut the rendered conversation into literals and answers, each literal ending as a generation prompt does."""
        spoken = [n for n, msg in enumerate(messages) if msg["role"] == "assistant"]
        marks = {n: f"assistant-text-{n}-b9e1c4f7" for n in spoken}
        masked = [
            message("assistant", text(marks[n])) if n in marks else msg for n, msg in enumerate(messages)
        ]  # fmt: skip
        prompting = not spoken or spoken[-1] != len(messages) - 1
        whole = self._render(id, masked, prompting)
        if any(whole.count(mark) != 1 for mark in marks.values()):
            raise BadSample(id, "template", "the chat template does not write every assistant text once")
        answers = self._answers(id, messages, marks, whole, prompting)

        turns, start = [], 0
        for n in spoken:
            at = whole.index(marks[n])
            asked = self._render(id, masked[:n], True)
            literal, answer = whole[start:at], answers[n]
            if whole[:at].startswith(asked) and len(asked) >= start:
                literal, answer = whole[start : len(asked)], whole[len(asked) : at] + answer
            elif asked.startswith(whole[:at]) and answer.startswith(extra := asked[at:]):
                literal, answer = literal + extra, answer.removeprefix(extra)
            else:
                raise BadSample(
                    id,
                    "template",
                    f"message {n} is written after {whole[start:at][-40:]!r}, but would be generated after "
                    f"{asked[-40:]!r}: with this chat template it cannot be trained as it is generated",
                )
            turns.append(_Turn(literal, answer))
            start = at + len(marks[n])
        if prompting:
            turns.append(_Turn(whole[start:], None))
        return turns

    def _answers(
        self, id: str, messages: list[Message], marks: dict[int, str], whole: str, prompting: bool
    ) -> dict[int, str]:
        """The assistant texts as the template writes them: unchanged, or stripped. Anything else is refused."""
        real = self._render(id, messages, prompting)
        texts = {n: _content(messages[n]) for n in marks}
        for answers in (texts, {n: content.strip() for n, content in texts.items()}):
            filled = whole
            for n, mark in marks.items():
                filled = filled.replace(mark, answers[n], 1)
            if filled == real:
                return answers
        raise BadSample(
            id,
            "template",
            "the chat template rewrites an assistant text (some drop the thinking of earlier turns): give the text as "
            "the template writes it, or another template with backbone.chat_template",
        )

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _ids(self, content: str) -> list[int]:
        return self.processor.tokenizer(content, add_special_tokens=False).input_ids

    def _tokens(self, sample: Sample, messages: Sequence[Message], images: _Images) -> _Tokens:
        checked = self._check(sample.id, messages, len(images))
        out, queue = _Tokens([], [], []), list(images)
        bos = self.processor.tokenizer.bos_token
        for n, turn in enumerate(self._turns(sample.id, checked)):
            context, before = turn.literal, 0
            if n > 0:  # it follows an end of turn, which some tokenizers treat what comes next by
                rest = context.lstrip()
                context = self._end + (rest.removeprefix(self._end) if rest.startswith(self._end) else context)
                before = 1
            elif not (bos and context.startswith(bos)):
                out.ids += self._lead
            ids = self._ids(context)
            for id in ids[before:]:
                if id != self.processor.image_token_id:
                    out.ids.append(id)
                    continue
                if not queue:
                    break
                expanded = queue.pop(0)[1]
                out.images.append(range(len(out.ids), len(out.ids) + len(expanded)))
                out.ids += expanded
            if turn.answer is not None:
                start = len(out.ids)
                out.ids += [*self._continuation(sample.id, context, ids, turn.answer), self._end_id]
                out.answers.append(range(start, len(out.ids)))
        found = sum(id == self.processor.image_token_id for id in out.ids)
        if queue or found != sum(image.tokens for image, _ in images):
            raise BadSample(
                sample.id,
                "placeholder_mismatch",
                f"the chat template wrote {len(out.images)} placeholders for {len(images)} images",
            )
        return out

    def _continuation(self, id: str, context: str, context_ids: list[int], answer: str) -> list[int]:
        """The ids of `answer` where `context` (with these ids) stands before it and is already tokenised."""
        ids = self._ids(context + answer)
        if ids[: len(context_ids)] == context_ids:
            return ids[len(context_ids) :]
        # A token would reach across the border (a newline on both sides, say): tokenise the answer behind something
        # that it cannot merge with, and make sure that the tokenizer added no space of its own.
        decode = self.processor.tokenizer.decode
        for anchor in (self._end, self._end + "\n"):
            head, ids = self._ids(anchor), self._ids(anchor + answer)
            if ids[: len(head)] == head and decode(ids) == decode(head) + answer:
                return ids[len(head) :]
        raise BadSample(id, "tokenizer", f"the tokenizer cannot write {answer[:20]!r} after {context[-20:]!r}")

    # --- rows --------------------------------------------------------------------------------------------------------

    def _row(self, sample: Sample, tokens: _Tokens, images: _Images, *, name: str, scored: list[range]) -> Row:
        length, limit = len(tokens.ids), self.max_length
        if length > limit:
            if any(span.stop > limit for span in tokens.images):
                raise BadSample(
                    sample.id,
                    "truncated_image",
                    f"{length} tokens, and max_length {limit} would cut an image: raise max_length or lower max_pixels",
                )
            if self.truncate == "never" or not scored or scored[-1].start >= limit:
                raise BadSample(sample.id, "too_long", f"{length} tokens, more than max_length {limit}: raise it")
        mask = torch.zeros(length, dtype=torch.bool)
        for span in scored:
            mask[span.start : span.stop] = True
        info: dict[str, Any] = {
            **sample.info,
            "answer": sample.answer,
            "source": sample.source,
            "prompt": sample.prompt(),
            "chosen": sample.chosen(),
            "rejected": sample.rejected,
        }
        return Row(
            id=sample.id,
            input_ids=torch.tensor(tokens.ids[:limit], dtype=torch.long),
            loss_mask=mask[:limit],
            images=[image for image, _ in images],
            name=name,
            info=info,
        )
