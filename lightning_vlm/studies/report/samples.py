"""Sample outputs: the same problems answered by every arm, with their pictures."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_vlm.studies.endpoints import evaluation_of
from lightning_vlm.studies.report.arms import Arms, group_title
from lightning_vlm.studies.report.curves import finished
from lightning_vlm.studies.report.text import clean, plural

if TYPE_CHECKING:
    from lightning_vlm.studies.results import Results

COUNT = 6
LARGEST = 400_000  # bytes of a picture that is put into the page
_PNG = b"\x89PNG\r\n\x1a\n"

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one arm said: its first seed's first draw, and how all its seeds did.

    Attributes:
        label: of the arm. seed: whose answer it is. output, extraction: cleaned texts.
        verdict: `right`, `wrong` or `score 0.42`. kind: `right`, `wrong` or `part`. others: over all seeds and draws.
        missing: why there is no answer; the rest is empty then.
    """

    label: str
    look: int
    seed: str = ""
    output: str = ""
    extraction: str = ""
    verdict: str = ""
    kind: str = ""
    others: str = ""
    missing: str = ""

    @property
    def details(self) -> str:
        """What was extracted where that is not the whole output, whose answer it is, how the others did."""
        extracted = f"extracted: {self.extraction}" if self.extraction not in ("", self.output) else ""
        return "; ".join(filter(None, [extracted, self.seed, self.others]))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A problem: id, prompt, gold answer, pictures as data URIs, an answer per arm.

    `title` names the groups it is of, where arms answered different problems.
    """

    title: str
    id: str
    prompt: str
    gold: str
    pictures: list[str]
    answers: list[Answer]


@dataclass(kw_only=True)
class Samples:
    """All that are shown; `missing` says what could not be."""

    about: str
    samples: list[Sample] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One evaluation: its arm and seed, its records by id, the folder with its pictures."""

    label: str
    seed: int | None
    records: dict[str, list[Record]]
    folder: Path


def sample_outputs(results: Results, arms: Arms, item: Mapping[str, Any]) -> Samples:
    """The first problems of a benchmark with every arm's answers.

    Arms that answered other problems under the same ids, as under other conditions of the data, are kept apart.

    Args:
        item: of the study's `report: samples:`, `{stage, benchmark, count}`.
    """
    stage, benchmark, count = str(item["stage"]), item.get("benchmark"), int(item.get("count", COUNT))
    shown = Samples(about=f"stage {stage}" + (f", benchmark {benchmark}" if benchmark else ""))
    runs = []
    for row in finished(results, stage, shown.missing):
        try:
            file = evaluation_of(row.folder, benchmark)
        except (OSError, ValueError) as err:
            shown.missing.append(str(err))
            continue
        runs.append(_Run(label=row.label, seed=row.seed, records=_records(file), folder=file.parent))
    kinds = _alike(runs)
    for kind in kinds:
        title = _groups_of(kind, arms) if len(kinds) > 1 else ""
        shown.samples += _of_kind(kind, title, count, arms, shown.missing)
    return shown


def _alike(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Runs that answered the same problems: same prompts and gold answers wherever they share an id."""

    def problems(run: _Run) -> dict[str, Any]:
        return {name: (draws[0].get("prompt"), draws[0].get("gold")) for name, draws in run.records.items()}

    kinds: list[tuple[dict[str, Any], list[_Run]]] = []
    for run in runs:
        own = problems(run)
        for other, members in kinds:
            if all(other[name] == own[name] for name in own.keys() & other.keys()):
                members.append(run)
                break
        else:
            kinds.append((own, [run]))
    return [members for _, members in kinds]


def _groups_of(runs: Sequence[_Run], arms: Arms) -> str:
    groups = [group for group in arms.groups if any(arms.belongs(run.label, group) for run in runs)]
    return " / ".join(filter(None, map(group_title, groups)))


def _of_kind(runs: Sequence[_Run], title: str, count: int, arms: Arms, missing: list[str]) -> list[Sample]:
    common = set.intersection(*({*run.records} for run in runs))
    pictures = next(filter(None, (_pictures(run.folder, count) for run in runs)), {})
    names = [name for name in [*pictures, *sorted(common - {*pictures})] if name in common][:count]
    if not names:
        missing.append("the arms have no problem in common")
    elif not pictures:
        missing.append("no evaluation kept pictures (EvaluationRecord with a count of 0, or texts only)")
    by_label: dict[str, list[_Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    samples = []
    for name in names:
        record = runs[0].records[name][0]
        sample = Sample(
            title=title,
            id=clean(name, 200),
            prompt=clean(record.get("prompt")).replace("<image>", "").strip(),
            gold=clean(record.get("gold")),
            pictures=pictures.get(name, []),
            answers=[
                _answer(label, title, [(run.seed, run.records[name]) for run in by_label[label]], arms)
                for label in _by_group(arms.ordered(by_label), arms)
            ],
        )
        samples.append(sample)
    return samples


def _by_group(labels: Sequence[str], arms: Arms) -> list[str]:
    """Arms of one group beside each other."""
    return sorted(labels, key=lambda label: next((i for i, g in enumerate(arms.groups) if arms.belongs(label, g)), 0))


def _records(file: Path) -> dict[str, list[Record]]:
    """Id → records, in the order of their draws."""
    found: dict[str, list[Record]] = {}
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            record = json.loads(line)
            found.setdefault(str(record["id"]), []).append(record)
    return {name: sorted(draws, key=lambda draw: draw.get("sample", 0)) for name, draws in found.items()}


def _answer(label: str, title: str, runs: Sequence[tuple[int | None, Sequence[Record]]], arms: Arms) -> Answer:
    seed, draws = runs[0]
    shown, score = draws[0], float(draws[0]["score"])
    kind = {1.0: "right", 0.0: "wrong"}.get(score, "part")
    scores = [float(draw["score"]) for _, records in runs for draw in records]
    return Answer(
        label=arms.short(label) if title and arms.at(label) else arms.shown(label),
        look=arms.look(label),
        seed="" if seed is None else f"seed {seed}",
        output=clean(shown.get("output")),
        extraction=clean(shown.get("extraction"), 200),
        verdict=kind if kind != "part" else f"score {score:.2f}",
        kind=kind,
        others=_all(scores, len(runs), len(draws)),
    )


def _all(scores: Sequence[float], seeds: int, draws: int) -> str:
    """How all answers of the arm did; empty where there is only one."""
    if len(scores) == 1:
        return ""
    of = plural(seeds, "seed") if draws == 1 else f"{plural(len(scores), 'answer')} ({seeds} × {draws})"
    if all(score in (0.0, 1.0) for score in scores):
        return f"right in {sum(scores):.0f} of {of}"
    return f"mean score {fmean(scores):.2f} over {of}"


def _pictures(folder: Path, count: int) -> dict[str, list[str]]:
    """Id → pictures of the first samples of an evaluation, as data URIs.

    `images/III-N.png` is picture N of the III-th sample; which id that has is told by the rows of `table.html`, which
    stand in the same order.
    """
    files: dict[int, list[Path]] = {}
    for path in sorted((folder / "images").glob("*.png")):
        if match := re.fullmatch(r"(\d+)-(\d+)", path.stem):
            files.setdefault(int(match[1]), []).append(path)
    table = folder / "table.html"
    if not files or not table.is_file():
        return {}
    reader = _FirstCells()
    reader.feed(table.read_text(encoding="utf-8"))
    ids = list(dict.fromkeys(reader.cells))
    if len(ids) != len(files):  # samples without pictures among others: which picture is whose is not known
        return {}
    pairs = zip(ids, sorted(files), strict=True)
    return {name: [uri for path in files[i] if (uri := _data_uri(path))] for name, i in list(pairs)[:count]}


def _data_uri(path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(_PNG) or len(content) > LARGEST:
        return ""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


class _FirstCells(HTMLParser):
    """The text of the first cell of each row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self._first = self._inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self._first = True
        elif tag == "td" and self._first:
            self._first, self._inside = False, True
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._inside = False
