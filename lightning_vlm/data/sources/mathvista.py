"""MathVista, for evaluation only: its licence (CC BY-SA 4.0, test purpose) does not allow training."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.base import ImageFinder, RowSource
from lightning_vlm.data.sources.conversations import question, value_of
from lightning_vlm.data.sources.spec import SourceSpec
from lightning_vlm.data.sources.tables import Row, open_table, require

_WANTED = {
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, "
    "e.g., 1.2, 1.3, 1.4",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, "
    "e.g., 1.23, 1.34, 1.45",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]",
    "choice": "and provide the correct option letter, e.g., A, B, C, D",
}


def refuse_training(spec: SourceSpec) -> None:
    """MathVista must not be trained on, under whatever kind it is opened.

    Raises:
        ValueError: names the licence.
    """
    if spec.kind == "mathvista" or "mathvista" in (spec.path or "").lower():
        raise ValueError(
            f"MathVista ({spec.path}) is licensed CC BY-SA 4.0 for testing only: training on it is prohibited; "
            "use it as a benchmark, and train on other data"
        )


def released_query(row: Row) -> str:
    """The prompt that was released with the benchmark: hint, question with unit, choices."""
    if row["question_type"] == "multi_choice":
        wanted = _WANTED["choice"]
    elif row["answer_type"] == "float":
        wanted = _WANTED[f"float{int(row['precision'])}"]
    else:
        wanted = _WANTED[row["answer_type"]]
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    asked = f"Question: {row['question']}{unit}"
    if row["question_type"] == "multi_choice":
        lines = [f"({chr(ord('A') + n)}) {choice}" for n, choice in enumerate(row["choices"])]
        asked = "\n".join([asked, "Choices:", *lines])
    return f"Hint: Please answer the question {wanted}, at the end.\n{asked}".strip()


@dataclass(frozen=True)
class MathVistaRow:
    """Builds a prompt without a target; everything the official scoring needs stays in `info`.

    Args:
        label: name of the source. instruction: text after the released query. find: opens images.
    """

    label: str
    instruction: str
    find: ImageFinder

    def __call__(self, row: Row, id: str) -> Sample:
        for column in ("question", "question_type", "answer_type"):
            value_of(row, column, id)
        query = row.get("query") or released_query(row)
        return question(
            id,
            self.label,
            query,
            self.find.all(row.get("decoded_image") or row.get("image")),
            instruction=self.instruction,
            answer=row.get("answer") or None,  # the large test split is released without answers
            info={**{k: v for k, v in row.items() if k not in ("image", "decoded_image")}, "query": query},
        )


def open_mathvista(spec: SourceSpec, label: str) -> RowSource:
    """MathVista from the released `testmini.json` with `images/` beside it, or from the hub or a table of its columns.

    Raises:
        ValueError: as `open_table`; a missing column.
    """
    table = open_table(spec, default_split="testmini")
    for column in ("question", "question_type", "answer_type", "precision", "unit", "choices"):
        require(table, column)
    build = MathVistaRow(label, spec.instruction or "", ImageFinder.of(spec, table.root))
    return RowSource(table, build, label=label, id_columns=("pid", "id"))
