r"""Questions with a gold answer: Geometry3K, MATH-V, MMVP, and any table of questions.

A sample ends with the gold answer as the assistant's text, for supervised training; `sample.prompt()` leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources.base import ImageFinder, RowSource
from lightning_vlm.data.sources.conversations import question, row_images, row_info, value_of
from lightning_vlm.data.sources.spec import SourceSpec, choose
from lightning_vlm.data.sources.tables import (
    JsonTable,
    RenamedTable,
    Row,
    existing_path,
    open_table,
    read_json,
    require,
)

FREEFORM = r"Work out the answer step by step and write only the final answer inside \boxed{}."
LETTER = r"Work out the answer step by step and write only the letter of the right choice inside \boxed{}."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_INTERGPS_FILES = {"data.json": "img_diagram.png", "ex.json": "image.png"}  # InterGPS, VisualSketchpad
_MMVP_QUERY = re.compile(r"\s*<img src='[^']*'>\s*(.+?)\s*Options:\s*\(a\)\s*(.+?)\s*\(b\)\s*(.+?)\s*", re.DOTALL)


def boxed(answer: str) -> str:
    r"""`\boxed{answer}`."""
    return rf"\boxed{{{answer}}}"


def with_choices(problem: str, choices: list[str]) -> str:
    """The problem and its choices, one to a line; choices that are mere letters, as on the picture, in one line."""
    if choices == list(_LETTERS[: len(choices)]):
        return f"{problem}\nChoices: {', '.join(choices)}"
    return "\n".join([problem, *(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))])


@dataclass(frozen=True)
class QuestionRow:
    r"""Builds a sample from a row with a question and its answer.

    Args:
        label: name of the source. problem: the question's column. mode: `boxed` or `direct` (the bare answer).
        instruction: text after the question. find: opens images.
    """

    label: str
    problem: str
    mode: str
    instruction: str
    find: ImageFinder

    def __call__(self, row: Row, id: str) -> Sample:
        answer = str(value_of(row, "answer", id)).strip()
        problem, choices = value_of(row, self.problem, id), row.get("choices")
        return question(
            id,
            self.label,
            with_choices(problem, choices) if choices else problem,
            row_images(row, self.find),
            instruction=self.instruction,
            target=boxed(answer) if self.mode == "boxed" and answer else answer,
            answer=answer,
            info=row_info(row, (self.problem, "answer")) | ({"choices": choices} if choices else {}),
        )


@dataclass(frozen=True)
class ChoiceRow:
    r"""Builds a sample from a Geometry3K row with choices and the letter of the right one.

    `freeform` shows no choices and its gold is the text of the right one; `mcq` shows them and its gold is the letter.

    Args:
        label: name of the source. mode: `freeform` or `mcq`. instruction: text after the question. find: opens images.
    """

    label: str
    mode: str
    instruction: str
    find: ImageFinder

    def __call__(self, row: Row, id: str) -> Sample:
        problem, choices = value_of(row, "problem", id), value_of(row, "choices", id)
        letter = str(value_of(row, "answer", id)).strip()
        position = _LETTERS.find(letter) if len(letter) == 1 else -1
        if not 0 <= position < len(choices):
            raise BadSample(id, "malformed", f"answer {letter!r} is no letter of its {len(choices)} choices")
        answer = letter if self.mode == "mcq" else str(choices[position])
        return question(
            id,
            self.label,
            with_choices(problem, choices) if self.mode == "mcq" else problem,
            row_images(row, self.find),
            instruction=self.instruction,
            target=boxed(answer),
            answer=answer,
            info={
                "letter": letter,
                **{k: v for k, v in row.items() if k not in ("problem", "answer", "image", "images")},
            },
        )


def open_geometry3k(spec: SourceSpec, label: str, *, for_training: bool) -> RowSource:
    """Geometry3K from a table (`images, problem, answer`) or from a folder with one folder per problem.

    Args:
        spec, label: of the source. for_training: else `test` is taken where no split is named.

    Raises:
        ValueError: as `open_table`; no problem of the split; `mcq` of a table without `choices`.
    """
    mode = choose(spec.prompt, ("freeform", "mcq"), "prompt")
    instruction = spec.instruction if spec.instruction is not None else (LETTER if mode == "mcq" else FREEFORM)
    folder = Path(spec.path).expanduser() if spec.path else None
    folders = [folder / spec.split, folder] if folder is not None and spec.split else [folder]
    for place in folders:
        if place is not None and place.is_dir() and (files := _problem_files(place)):
            table = RenamedTable(_problem_table(files, place, spec.split if place == folder else None), spec.columns)
            build = ChoiceRow(label, mode, instruction, ImageFinder.of(spec, place))
            return RowSource(table, build, label=label)
    table = open_table(spec, default_split=None if for_training else "test")
    problem = require(table, "problem")
    require(table, "answer")
    find = ImageFinder.of(spec, table.root)
    if mode == "mcq":
        require(table, "choices", remedy="the tables on the hub hold none: use the original folders, or ")
        return RowSource(table, ChoiceRow(label, mode, instruction, find), label=label)
    return RowSource(table, QuestionRow(label, problem, "boxed", instruction, find), label=label)


def open_questions(spec: SourceSpec, label: str, *, for_training: bool) -> RowSource:
    """Any table with a question, its answer, and maybe options and images.

    Args:
        spec, label: of the source. for_training: else `test` is taken where no split is named.

    Raises:
        ValueError: as `open_table`; no column for question or answer.
    """
    mode = choose(spec.prompt, ("direct", "boxed"), "prompt")
    table = open_table(spec, default_split=None if for_training else "test")
    problem = require(table, "question", "problem")
    require(table, "answer")
    instruction = spec.instruction if spec.instruction is not None else (FREEFORM if mode == "boxed" else "")
    find = ImageFinder.of(spec, table.root)
    return RowSource(table, QuestionRow(label, problem, mode, instruction, find), label=label)


@dataclass(frozen=True)
class MathVisionRow:
    """Builds a sample from a MATH-V row.

    All marks `<imageN>` mean its one picture, which stands where the question has the first; the others stay as text.

    Args:
        label: name of the source. instruction: in place of the kind's own two, where given. find: opens images.
    """

    label: str
    instruction: str | None
    find: ImageFinder

    def __call__(self, row: Row, id: str) -> Sample:
        problem = re.sub(r"<image\d+>", "<image>", value_of(row, "question", id), count=1)
        choices, answer = row.get("options") or [], str(value_of(row, "answer", id))
        own = LETTER if choices else FREEFORM
        picture = row.get("decoded_image") or row.get("image")
        level = row.get("level")
        return question(
            id,
            self.label,
            with_choices(problem, choices) if choices else problem,
            self.find.all(picture),
            instruction=own if self.instruction is None else self.instruction,
            target=boxed(answer),
            answer=answer,
            info={
                **{k: v for k, v in row.items() if k not in ("answer", "image", "decoded_image")},
                "level": int(level) if level is not None else None,
            },
        )


def open_mathvision(spec: SourceSpec, label: str) -> RowSource:
    """MATH-V from `test.jsonl` / `testmini.jsonl` beside `images/`, or from the hub.

    Raises:
        ValueError: as `open_table`; a missing column.
    """
    table = open_table(spec, default_split="testmini")
    for column in ("question", "options", "answer"):
        require(table, column)
    return RowSource(table, MathVisionRow(label, spec.instruction, ImageFinder.of(spec, table.root)), label=label)


@dataclass(frozen=True)
class MmvpRow:
    """Builds a sample from an MMVP request; its gold is `(a)` or `(b)`.

    Args:
        label: name of the source. instruction: text after the options.
    """

    label: str
    instruction: str

    def __call__(self, row: Row, id: str) -> Sample:
        match = _MMVP_QUERY.fullmatch(value_of(row, "query", id))
        answer = value_of(row, "answer", id)
        if match is None or answer not in ("(a)", "(b)"):
            raise BadSample(id, "malformed", f"expected a question with options (a) and (b), found {row!r}")
        asked, *choices = match.groups()
        return question(
            id,
            self.label,
            f"{asked}\n(a) {choices[0]}\n(b) {choices[1]}",
            [row["image"]],
            instruction=self.instruction,
            target=answer,
            answer=answer,
            info={"id": row["id"], "question": asked, "choices": choices, "pair": _pair(row)},
        )


def open_mmvp(spec: SourceSpec, label: str) -> RowSource:
    """MMVP from a folder `N/request.json` with its picture, or the folder above `processed/`.

    `options: {swap_pairs: true}` shows each question with the picture of its pair's other question: a model that looks
    at the picture gets those wrong that it gets right otherwise.

    Raises:
        ValueError: no such folder, no request in it, a request without a picture's name, or one without the other of
            its pair where pairs are swapped.
    """
    swap = spec.options.get("swap_pairs", False)
    if not isinstance(swap, bool):
        raise ValueError(f"options: swap_pairs is true or false, got {swap!r}")
    folder = existing_path(spec)
    if (folder / "processed").is_dir():
        folder = folder / "processed"
    files = sorted(
        (f for f in folder.glob("*/request.json") if f.parent.name.isdigit()), key=lambda f: int(f.parent.name)
    )
    rows = []
    for file in files:
        row = read_json(file, rows=False)
        if not isinstance(row, dict) or not row.get("images"):
            raise ValueError(f"{file}: expected an object with `query`, `images` and `answer`")
        # the stored paths start from another folder; the picture lies beside its request
        rows.append({**row, "id": file.parent.name, "image": str(file.parent / Path(row["images"][0]).name)})
    if not rows:
        raise ValueError(f"{folder} is empty: it has no N/request.json")
    if swap:
        rows = _with_swapped_pictures(rows, folder)
    instruction = "Answer with (a) or (b)." if spec.instruction is None else spec.instruction
    return RowSource(JsonTable(rows, str(folder), folder), MmvpRow(label, instruction), label=label)


def _pair(row: Row) -> int:
    """2k−1 and 2k are pair k: one question, two pictures that differ in the answer."""
    return (int(row["id"]) + 1) // 2


def _with_swapped_pictures(rows: list[Row], folder: Path) -> list[Row]:
    """The rows of MMVP, each with the picture of the other one of its pair."""
    pairs: dict[int, list[Row]] = {}
    for row in rows:
        pairs.setdefault(_pair(row), []).append(row)
    for pair in pairs.values():
        if len(pair) != 2:
            raise ValueError(f"{folder}: swap_pairs needs both questions of a pair, and {pair[0]['id']} is alone")
    return [{**row, "image": other["image"]} for a, b in pairs.values() for row, other in ((a, b), (b, a))]


def _problem_files(folder: Path) -> list[Path]:
    """`data.json` or `ex.json` of every problem's folder, in order of their numbers."""
    files = (f for name in _INTERGPS_FILES for f in folder.glob(f"*/{name}"))
    return sorted(files, key=lambda f: (len(f.parent.name), f.parent.name))


def _problem_table(files: Iterable[Path], folder: Path, split: str | None) -> JsonTable:
    """Rows of one folder per problem; `split` selects by the problems' own `data_type`."""
    rows, splits = [], set()
    for file in files:
        row = read_json(file, rows=False)
        if not isinstance(row, dict):
            raise ValueError(f"{file}: expected an object")
        missing = [c for c in ("problem_text", "choices", "answer") if c not in row]
        if missing:
            raise ValueError(f"{file}: no {missing[0]!r} (it has: {', '.join(row)})")
        splits.add(row.get("data_type"))
        if split is None or row.get("data_type") == split:
            image = str(file.parent.relative_to(folder) / _INTERGPS_FILES[file.name])
            for extra in ("logic_form", "code", "image_path_code"):  # larger than all the rest together
                row.pop(extra, None)
            rows.append({"id": file.parent.name, **row, "problem": row["problem_text"], "image": image})
    if not rows:
        raise ValueError(f"no problem of split {split!r} in {folder}; it has {', '.join(sorted(map(str, splits)))}")
    return JsonTable(rows, str(folder), folder)
