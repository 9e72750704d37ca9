"""The teacher of an on-policy distillation: a frozen model that reads the student's tokens.

Student and teacher share one tokenizer. Where they also process images alike and write the same chat template, the
teacher is shown the student's very rows; else the completion's ids are put behind the teacher's own encoding of the
prompt. Either way scored tokens correspond one to one. Shapes: N scored tokens, D width, V vocabulary of the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_vlm.losses.distillation import top_logprobs
from lightning_vlm.models.adapters import ADAPTER_FILE, load_adapter_file
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import check_vocabulary, load_model
from lightning_vlm.models.packing import laid_out
from lightning_vlm.models.parts import PartPolicy, apply_parts
from lightning_vlm.models.policy import HeadInput, Policy, Scores
from lightning_vlm.models.processor import Processor, load_processor
from lightning_vlm.models.spec import Backbone, Dtype
from lightning_vlm.strategies.sync import is_sharded

if TYPE_CHECKING:
    from lightning_vlm.algorithms.base import Algorithm

TEACHER_ROW = "teacher_row"  # in Row.info: the row that the teacher is shown instead


class Teacher:
    """A frozen model beside the policy, sharded like it; neither checkpoints nor the optimizer know of it.

    Make it while the policy is built (`extend_policy`), call `start` once training begins.

    A teacher whose processor is of the student's kind takes `min_pixels`, `max_pixels` and `chat_template` from
    `backbone`; one of another kind keeps its own settings.

    Attributes:
        processor: the teacher's own.
        shares_inputs: whether it is shown the student's rows.

    Args:
        module: the algorithm whose policy is the student.
        path: model directory (an exported checkpoint is one), hub id or embedded model.
        adapter: adapter file of ours that belongs on the model, LoRA settings included.
        dtype: of its weights; the student's by default.
        shares_inputs: None finds out (see `sees_the_same`); True shows it the student's rows although its own chat
            template differs; False always encodes prompts anew.

    Raises:
        ValueError: the model or adapter cannot be loaded, its tokenizer is another one, `shares_inputs` is True though
            it processes images differently, or its turns end by another token than the student's.
    """

    def __init__(
        self,
        module: Algorithm,
        path: str,
        *,
        adapter: str | None = None,
        dtype: Dtype | None = None,
        shares_inputs: bool | None = None,
    ) -> None:
        self.module = module
        backbone = replace(module.backbone, path=path, adapter=None, dtype=dtype or module.backbone.dtype)
        with _named_teacher():
            self.processor = _load_processor(backbone, module.processor)
        check_same_tokens(path, self.processor, module.processor)
        if shares_inputs and not _same_images(self.processor, module.processor):
            raise ValueError(
                f"teacher {path!r} processes images differently from backbone.path, so it cannot be shown the same "
                "rows: leave shares_inputs out, and its prompts are encoded for it"
            )
        self.shares_inputs = self.sees_the_same(module.processor) if shares_inputs is None else shares_inputs
        own, students = self.processor.end_of_turn, module.processor.end_of_turn
        if not self.shares_inputs and own != students:
            raise ValueError(
                f"teacher {path!r} ends its turns by {own[0]!r}, the student by {students[0]!r}: it would teach the "
                "student never to end; take a teacher whose chat template ends turns alike"
            )
        with _named_teacher():
            policy = _load_policy(backbone, self.processor, adapter)
        # An id from here on has no embedding or no logit of the teacher's.
        self._ids = min(policy.model.get_input_embeddings().weight.shape[0], policy.head.weight.shape[0])
        # In a dict, so that Lightning registers no submodule.
        self.frozen = {"teacher": policy}
        module.shard(policy)
        if is_sharded(policy):
            # Embeddings and head stay whole after a forward: the loss reads the head outside of it.
            policy.set_reshard_after_forward(False, recurse=False)

    def start(self) -> None:
        """Move to the device; the policy sits there already."""
        if not is_sharded(self.frozen["teacher"]):
            self.frozen["teacher"].to(self.module.device)

    def sees_the_same(self, processor: Processor) -> bool:
        """Whether rows that `processor` made are what this teacher's own processor would make of the same sample.

        That is: the same kind of processor with the same image settings, hence the same pixels and placeholders, and
        the same chat template. Equal settings that are written differently count as different, which costs a second
        encoding and changes nothing else.
        """
        return _same_images(self.processor, processor) and self.processor.chat_template == processor.chat_template

    # --- rows of its own --------------------------------------------------------------------------------------------

    def annotate(self, rows: Sequence[Row], prompt: Row) -> None:
        """Write the teacher's row into `info[TEACHER_ROW]` of the student's rows; not needed where rows are shared.

        Args:
            rows: completions of one prompt. prompt: that prompt, encoded by the teacher's processor.

        Raises:
            ValueError: as `teacher_rows`.
        """
        for row, its in zip(rows, teacher_rows(rows, [prompt] * len(rows)), strict=True):
            row.info[TEACHER_ROW] = its

    def batch(self, batch: ModelBatch) -> ModelBatch:
        """What the teacher is shown for a batch of the student's: the same, or its own rows in the same order.

        Raises:
            ValueError: a row that was not annotated, or an id that the teacher has no embedding for.
        """
        for row in batch.rows:
            if (largest := int(row.input_ids.max())) >= self._ids:
                raise ValueError(
                    f"row {row.id} has id {largest}, the teacher knows ids below {self._ids}: ban ids from there on "
                    "when the student samples"
                )
        if self.shares_inputs:
            return batch
        rows = [self._row(row) for row in batch.rows]
        module = self.module
        own = collate(
            laid_out(rows, batch.segments is not None),
            self.frozen["teacher"].family,
            self.processor.pad_id,
            share_images=module.share_images,
        )
        return own.to(module.device)

    def _row(self, row: Row) -> Row:
        if TEACHER_ROW in row.info:
            return row.info[TEACHER_ROW]
        if row.scored:
            raise ValueError(f"row {row.id} has no row of the teacher's: call Teacher.annotate before the step")
        # A row that only keeps ranks in step; the teacher's ranks must stay in step, too.
        ids, images = [self.processor.pad_id] * 2, []
        if row.images:
            picture, expanded = self.processor.image(Image.new("RGB", (64, 64)))
            ids, images = [*expanded, *ids], [picture]
        tensor = torch.tensor(ids, dtype=torch.long)
        return Row(row.id, tensor, torch.zeros_like(tensor, dtype=torch.bool), images=images)

    # --- distributions ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def head_input(self, batch: ModelBatch) -> HeadInput:
        """The teacher's distributions at the scored tokens of a batch of the student's, before the head.

        A sharded teacher's ranks must call this in step. Its head weight is valid until the teacher is resharded, which
        nothing here does.

        Returns:
            Hidden states [N, D] and head weight [V, D], without gradient.

        Raises:
            ValueError: as `batch`.
        """
        return self._forward(batch, raw=True)

    def score(self, batch: ModelBatch, *, temperature: float = 1.0) -> Scores:
        """As `Policy.score`, of the teacher; in step, as `head_input`."""
        with torch.no_grad():
            return self._forward(batch, temperature=temperature)

    def top_logprobs(self, batch: ModelBatch, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """[N, k] likeliest ids of the teacher and [N, k] their log-probs, nats, likeliest first; to be kept for texts
        that do not change."""
        return top_logprobs(*self.head_input(batch), k, temperature=temperature)

    def _forward(self, batch: ModelBatch, **how: Any) -> Any:
        policy = self.frozen["teacher"]
        with nullcontext() if is_sharded(policy) else self.module.low_precision():
            return policy(self.batch(batch), **how)


def teacher_rows(student_rows: Sequence[Row], prompts: Sequence[Row]) -> list[Row]:
    """Each completion of the student behind the teacher's own encoding of its prompt.

    Args:
        student_rows: rows whose scored tokens are one piece at the end.
        prompts: of each row, the prompt as `Encoder.encode_prompt` gives it with the teacher's processor.

    Returns:
        Rows that score the same ids in the same order.

    Raises:
        ValueError: a prompt of another sample, scored tokens that are not the row's end, or not equally many.
    """
    out = []
    for row, prompt in zip(student_rows, prompts, strict=True):
        if row.id != prompt.id:
            raise ValueError(f"row {row.id} was given the teacher's prompt of {prompt.id}: prompts go row by row")
        completion = row.input_ids[len(row) - row.scored :]
        if not bool(row.loss_mask[len(row) - row.scored :].all()):
            raise ValueError(
                f"row {row.id} scores {row.scored} tokens that are not all at its end: a teacher with rows of its own "
                "can only continue one prompt; score the last answer alone"
            )
        ids = torch.cat([prompt.input_ids, completion])
        mask = torch.arange(len(ids)) >= len(prompt)
        its = Row(row.id, ids, mask, images=prompt.images, name=row.name)
        if its.scored != row.scored:
            raise ValueError(
                f"row {row.id} scores {row.scored} tokens, the teacher's row {its.scored}: its prompt is empty"
            )
        out.append(its)
    return out


def check_same_tokens(path: str, teacher: Processor, student: Processor) -> None:
    """Refuse a teacher whose ids do not mean what the student's mean.

    Every token must have the same id on both sides. Left out are ids that one side never emits (placeholders), and
    added tokens that only one side has at an id that is free on the other, as newer releases of a tokenizer add some.
    The padding of either head does not matter.

    Args:
        path: of the teacher, for the message. teacher, student: their processors.

    Raises:
        ValueError: the tokenizers differ; names a token.
    """
    banned = teacher.banned_ids | student.banned_ids
    theirs, ours = (
        {token: id for token, id in side.tokenizer.get_vocab().items() if id not in banned}
        for side in (teacher, student)
    )
    if theirs == ours:
        return
    odd: list[tuple[int, str]] = []
    for side, mine, others in ((teacher, theirs, ours), (student, ours, theirs)):
        added = {token.content for token in side.tokenizer.added_tokens_decoder.values()}
        taken = set(others.values())
        for token, id in mine.items():
            alone = token in added and token not in others and id not in taken
            if others.get(token) != id and not alone:
                odd.append((id, token))
    if odd:
        id, token = min(odd)
        where = [f"{side.get(token, 'none')}" for side in (theirs, ours)]
        raise ValueError(
            f"teacher {path!r} has another tokenizer than backbone.path ({len(theirs)} and {len(ours)} tokens, first "
            f"difference {token!r}, id {where[0]} and {where[1]}): its distribution is over other tokens; take a "
            "teacher of the student's tokenizer"
        )


# --- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _named_teacher() -> Iterator[None]:
    """Loading speaks of `backbone.path`; what cannot be loaded here is the teacher."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("backbone.path", "model.teacher")) from error


def _load_processor(backbone: Backbone, student: Processor) -> Processor:
    """The teacher's processor, with the student's settings where it is of the student's kind."""
    plain = load_processor(replace(backbone, min_pixels=None, max_pixels=None, chat_template=None))
    return load_processor(backbone) if type(plain.hf).__name__ == type(student.hf).__name__ else plain


def _same_images(one: Processor, other: Processor) -> bool:
    """The same kind of processor with the same settings, shown by the pixels and ids of one image, too."""
    if type(one.hf).__name__ != type(other.hf).__name__ or _image_settings(one) != _image_settings(other):
        return False
    picture = Image.linear_gradient("L").convert("RGB").resize((150, 90))
    (mine, my_ids), (its, its_ids) = one.image(picture), other.image(picture)
    return mine.key == its.key and my_ids == its_ids


def _image_settings(processor: Processor) -> dict[str, str]:
    """What decides an image's pixels and its number of placeholders, names of classes aside."""
    settings = {name: value for name, value in vars(processor.hf).items() if isinstance(value, str | int | float)}
    settings |= processor.hf.image_processor.to_dict()
    apart = ("chat_template", "image_processor_type", "processor_class", "feature_extractor_type")
    return {name: str(value) for name, value in settings.items() if name not in apart}


def _load_policy(backbone: Backbone, processor: Processor, adapter: str | None) -> Policy:
    """The frozen model, whole, on the CPU."""
    model = load_model(backbone)
    check_vocabulary(model, processor)
    family = family_of(model)
    if adapter is not None:
        parts = _adapter_parts(adapter)
        apply_parts(model, family, parts)
        load_adapter_file(model, adapter, parts)
    return Policy(model, family).requires_grad_(False).eval()


def _adapter_parts(adapter: str) -> dict[str, PartPolicy]:
    """The LoRA settings that an adapter file says it was trained with."""
    file = Path(adapter).expanduser()
    file = file / ADAPTER_FILE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"teacher's adapter {adapter!r}: no such file; `lightning-vlm export CKPT --adapter` writes one"
        )
    try:
        with safe_open(file, framework="pt") as content:
            facts = json.loads((content.metadata() or {}).get("lightning_vlm", "{}"))
    except SafetensorError as error:
        raise ValueError(f"teacher's adapter {adapter!r} is no safetensors file, or was cut off: {error}") from error
    return {
        part: PartPolicy(lora_rank=int(own["lora_rank"]), lora_alpha=own["lora_alpha"])
        for part, own in facts.get("parts", {}).items()
    }
