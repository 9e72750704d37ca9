"""Answers made elsewhere: the files that `lightning-vlm score` reads, each turned into samples with outputs.

What is missing, doubled, of another type or of another shape is an error that names it; no answer is dropped silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.coco import read_captions
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.data.sources.tables import jsonl_rows, read_json

Row = dict[str, Any]
_MATHVISTA = "MathVista's released output file, an object of problems by pid"
_MAGIC = "records with `image_name`, `captions` (the references) and `prediction`"


@dataclass(frozen=True)
class Given:
    """One answer.

    Attributes:
        sample: the question, as far as grading needs it. output: the answer's text. draw: index among the question's
            answers.
    """

    sample: Sample
    output: str
    draw: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How files are read.

    Attributes:
        column: column that holds the text to grade (mathvista).
        questions: file with the questions and gold answers, where the outputs do not hold them.
        references: file with the reference captions (coco). split: of Karpathy's references.
        subset: whether questions or images without an answer may be left out.
        allow_empty: whether empty outputs are answers (that are wrong).
    """

    column: str = "response"
    questions: Path | None = None
    references: Path | None = None
    split: str | None = None
    subset: bool = False
    allow_empty: bool = False


def read_questions_and_answers(file: Path, options: Options) -> list[Given]:
    """JSONL or JSON with `id, output, gold`; `output` may be a list, or `sample` may number several answers of an id.

    Other columns (`choices`, `level`, `subject`, `finished`, …) are kept for rules and breakdowns.
    """
    given = []
    for where, row in _rows(file):
        _require(row, ("id", "output", "gold"), where, "objects with `id`, `output` and `gold`")
        sample = Sample(_id(row["id"], where), [], answer=_gold(row["gold"], where), info=_rest(row))
        outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
        first = _draw(row.get("sample", 0), where)
        given += [Given(sample, _text(o, "output", where), first + n) for n, o in enumerate(outputs)]
    return _checked(given, file, options)


def read_mmvp(file: Path, options: Options) -> list[Given]:
    """As `read_questions_and_answers`; questions 2k−1 and 2k, by the number at the end of the id, are pair k."""
    given = read_questions_and_answers(file, options)
    for answer in given:
        number = re.search(r"(\d+)$", answer.sample.id)
        if number is None:
            raise ValueError(
                f"{file}: id {answer.sample.id!r} does not end in a number, by which MMVP's pairs are known"
            )
        answer.sample.info.setdefault("pair", (int(number[1]) + 1) // 2)
    return given


def read_mathvista(file: Path, options: Options) -> list[Given]:
    """MathVista's released output files: an object pid → problem with its `response` and `extraction`."""
    gold = {} if options.questions is None else {_pid(row, where): row for where, row in _rows(options.questions)}
    given = []
    for where, row in _rows(file):
        pid = _pid(row, where)
        problem = gold.get(pid, {}) | row
        _require(problem, ("question_type", "answer_type", "choices", "precision", options.column), where, _MATHVISTA)
        if problem.get("answer") in (None, ""):
            raise ValueError(
                f"{where}: problem {pid} has no `answer`; give the annotations by --questions testmini.json"
            )
        value = problem[options.column]
        if options.column == "extraction" and value == value:
            value = str(value)  # a judge's JSON may hold a number or a list; the official rule reads it as text
        sample = Sample(pid, [], answer=str(problem["answer"]), info=problem)
        given.append(Given(sample, _text(value, options.column, where)))
    if gold:
        _same_ids(given, gold, file, options.questions, options, "problem")
    return _checked(given, file, options, empty=True)


def _pid(row: Row, where: str) -> str:
    if "pid" not in row and "id" not in row:
        _require(row, ("pid",), where, _MATHVISTA)
    return _id(row.get("pid", row.get("id")), where)


def read_mathvision(file: Path, options: Options) -> list[Given]:
    """MATH-V's released form, `id, response`; the questions stand in a file of their own."""
    if options.questions is None:
        raise ValueError("mathvision needs the questions with their gold answers: give --questions test.jsonl")
    questions = {}
    for where, row in _rows(options.questions):
        _require(row, ("id", "answer", "options"), where, "MATH-V's questions")
        questions[_id(row["id"], where)] = row
    given = []
    for where, row in _rows(file):
        _require(row, ("id", "response"), where, "`id` and `response`")
        number = _id(row["id"], where)
        question = questions.get(number, {})
        sample = Sample(number, [], answer=str(question.get("answer", "")), info=question)
        given.append(Given(sample, _text(row["response"], "response", where)))
    _same_ids(given, questions, file, options.questions, options, "question")
    return _checked(given, file, options, empty=True)


def read_coco(file: Path, options: Options) -> list[Given]:
    """COCO results (`image_id, caption`) with a file of references, or the MAGIC record form, which holds them.

    MAGIC's records: `image_name`, `captions` (the references), `prediction`.
    """
    rows = list(_rows(file))
    if rows and {"prediction", "captions"} <= rows[0][1].keys():
        given = [_magic(where, row) for where, row in rows]
        return _checked(given, file, options)
    if options.references is None:
        raise ValueError(
            f"{file} holds no references: give COCO's captions_*.json or Karpathy's dataset_coco.json by --references"
        )
    split = "test" if options.split is None else options.split
    images = {str(r["id"]): r for r in read_captions(options.references, split, default=options.split is None)}
    by_file = {Path(r["image"]).name: id for id, r in images.items()}
    given = []
    for where, row in rows:
        _require(row, ("image_id", "caption"), where, "COCO results with `image_id` and `caption`, or " + _MAGIC)
        image = _id(row["image_id"], where)
        image = by_file.get(image, image)
        references = images.get(image, {}).get("captions", [])
        given.append(Given(Sample(image, [], info={"references": references}), _text(row["caption"], "caption", where)))
    _same_ids(given, images, file, options.references, options, "image")
    return _checked(given, file, options)


def _magic(where: str, row: Row) -> Given:
    _require(row, ("image_name", "captions", "prediction"), where, _MAGIC)
    references = row["captions"]
    if not (isinstance(references, list) and references and all(isinstance(r, str) for r in references)):
        raise ValueError(f"{where}: `captions` must be a list of reference texts, got {_short(references)}")
    sample = Sample(_id(row["image_name"], where), [], info={"references": references})
    return Given(sample, _text(row["prediction"], "prediction", where))


@dataclass(frozen=True)
class Offline:
    """How a benchmark's foreign outputs are scored.

    Attributes:
        read: file → answers. rules: names by which `--rule` chooses, the default first. help: the form of the file.
    """

    read: Callable[[Path, Options], list[Given]]
    rules: dict[str, str]
    help: str


OFFLINE = {
    "coco": Offline(
        read_coco,
        {"ptb": "coco/ptb", "ptb-spice": "coco/ptb-spice", "python": "coco/python"},
        "COCO results (image_id, caption) with --references, or records of image_name, captions, prediction",
    ),
    "mathvista": Offline(
        read_mathvista,
        {
            "official": "mathvista/official",
            "official-2023": "mathvista/official-2023",
            "rules": "mathvista/rules",
        },
        "released output file: an object pid -> problem with response and extraction",
    ),
    "geometry3k": Offline(
        read_questions_and_answers,
        {
            "math-verify": "geometry3k/math-verify",
            "freeform": "geometry3k/freeform",
            "mcq": "geometry3k/mcq",
        },
        "JSONL of id, output, gold",
    ),
    "mathvision": Offline(
        read_mathvision, {"released": "mathvision/released"}, "JSONL of id, response; gold from --questions test.jsonl"
    ),
    "mmvp": Offline(read_mmvp, {"option": "mmvp/option"}, "JSONL of id (its number tells the pair), output, gold"),
    "answer": Offline(
        read_questions_and_answers,
        {"short": "answer/short", "exact": "exact", "option": "option"},
        "JSONL of id, output, gold, maybe choices, level, subject",
    ),
}


# --- reading and checking ---------------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterable[tuple[str, Row]]:
    """(place, object) of every row.

    Raises:
        ValueError: no such file, not JSON, or another shape.
    """
    if not file.is_file():
        near = one_of(file.name, sorted(p.name for p in file.parent.iterdir())) if file.parent.is_dir() else ""
        raise ValueError(f"no file {str(file)!r}{near if 'did you mean' in near else ''}")
    if file.suffix == ".jsonl":
        rows = [(f"{file}:{number}", json.loads(line)) for number, line in enumerate(jsonl_rows(file), 1)]
    else:
        if isinstance(content := read_json(file, rows=False), dict) and "images" in content:
            raise ValueError(f"{file} holds reference captions, no answers: give it by --references")
        rows = [(f"{file}, {_name(row, n)}", row) for n, row in enumerate(read_json(file))]
    if not rows:
        raise ValueError(f"{file} is empty: there is nothing to score")
    return rows


def _require(row: Row, columns: Iterable[str], where: str, form: str) -> None:
    for column in columns:
        if column not in row:
            raise ValueError(f"{where}: no {column!r} (it has: {', '.join(row)}); expected {form}")


def _name(row: Row, number: int) -> str:
    key = next((k for k in ("id", "pid", "image_id", "image_name") if k in row), None)
    return f"entry {number}" if key is None else f"{key} {_short(row[key])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _id(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: an id must be text or a whole number, got {_short(value)}")
    return str(value)


def _draw(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}: `sample` must be a whole number from 0, got {_short(value)}")
    return value


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {column!r} must be text, got {_short(value)}; an answer that is missing is no answer"
        )
    return value


def _gold(value: Any, where: str) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number or (isinstance(value, str) and value.strip())):
        raise ValueError(f"{where}: 'gold' must be the gold answer as text or a number, got {_short(value)}")
    return str(value)


def _rest(row: Row) -> dict[str, Any]:
    return {
        k: v for k, v in row.items() if k not in ("id", "output", "gold", "sample", "prompt", "score", "extraction")
    }


def _checked(given: list[Given], file: Path, options: Options, *, empty: bool = False) -> list[Given]:
    """Refuse answers that are there twice, and empty ones unless they are allowed."""
    seen: set[tuple[str, int]] = set()
    for answer in given:
        key = (answer.sample.id, answer.draw)
        if key in seen:
            raise ValueError(
                f"{file}: id {key[0]!r} occurs twice{f' with sample {key[1]}' if key[1] else ''}; one answer per id is "
                "scored, or number several by `sample`"
            )
        seen.add(key)
    nothing = [answer.sample.id for answer in given if not answer.output.strip()]
    if nothing and not (empty or options.allow_empty):
        raise ValueError(
            f"{file}: {len(nothing)} of {len(given)} outputs are empty ({_few(nothing)}); if the model really wrote "
            "nothing, --allow_empty scores them as they are"
        )
    return given


def _same_ids(
    given: list[Given], wanted: dict[str, Any], file: Path, questions: Path, options: Options, what: str
) -> None:
    """Refuse answers to nothing, and questions without an answer unless a subset is meant."""
    have = {answer.sample.id for answer in given}
    unknown = sorted(have - wanted.keys())
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} of {len(have)} ids are no {what} of {questions} ({_few(unknown)})")
    missing = sorted(wanted.keys() - have)
    if missing and not options.subset:
        raise ValueError(
            f"{file} has no answer to {len(missing)} of the {len(wanted)} {what}s of {questions} ({_few(missing)}); "
            f"--subset scores the {len(have)} that are there, which is another benchmark"
        )


def _few(ids: list[str]) -> str:
    return ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
