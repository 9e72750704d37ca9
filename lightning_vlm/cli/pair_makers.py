"""How `lightning-vlm pairs` finds the worse answers to a sample's prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rule import Record, Rule
from lightning_vlm.data.edits import check_kinds, minimal_edit
from lightning_vlm.data.pair_files import Pair
from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.tables import jsonl_rows
from lightning_vlm.metrics.exact import normalise_text

NO_TEXT = "no text to choose"


class Maker:
    """Makes pairs of samples.

    Attributes:
        none: why samples have no pair → how many. unused: why answers were left aside → how many.
    """

    def __init__(self) -> None:
        self.none: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()

    def wants(self, id: str) -> bool:
        """Whether a sample of this id is looked at; called once for every id of the data."""
        return True

    def check(self, first_id: str) -> None:
        """Called when all ids have been seen.

        Args:
            first_id: of the data, for messages.
        """

    def pairs(self, samples: Sequence[Sample]) -> list[list[Pair]]:
        """The pairs of each sample; those without any are counted in `none`."""
        raise NotImplementedError(f"{type(self).__name__} must define pairs()")


class Edits(Maker):
    """Captions with one thing made wrong; samples that bring an edit of their own (the embedded world) keep it.

    Args:
        kinds: of edits. seed: of the draws, which depend on nothing else but the sample's id.
    """

    def __init__(self, kinds: Sequence[str], seed: int) -> None:
        super().__init__()
        check_kinds(kinds)
        self.kinds, self.seed = kinds, seed

    def pairs(self, samples: Sequence[Sample]) -> list[list[Pair]]:
        """As `Maker`."""
        return [self._edited(sample) for sample in samples]

    def _edited(self, sample: Sample) -> list[Pair]:
        caption = sample.chosen()
        if caption is None or not caption.strip():
            self.none[NO_TEXT] += 1
            return []
        if sample.rejected is not None and "edit" in sample.info:
            return [Pair(caption, sample.rejected, f"edit/{sample.info['edit']}")]
        others = [text for text in sample.info.get("references") or () if text.strip() != caption.strip()]
        rng = Random(f"{self.seed}/{sample.id}")
        edit = minimal_edit(caption, rng, kinds=self.kinds, others=others)
        if edit is None:
            self.none["nothing that can be edited"] += 1
            return []
        columns = {"before": edit.before, "after": edit.after}
        return [Pair(caption, edit.text, f"edit/{edit.kind}", columns)]


@dataclass(frozen=True)
class Answer:
    """One given answer.

    Attributes:
        text: of the answer. draw: its number among those of its file and id. gold: the gold answer it was made for.
        finished: whether it ended by itself. negative: what the row says of itself. where: file and line.
    """

    text: str
    draw: int
    gold: str | None
    finished: bool
    negative: str | None
    where: str


class Given(Maker):
    """Answers from files; what is empty or was cut off is left aside and counted.

    An answer whose id is that of a sample up to a `#` (COCO's captions of one image) belongs to all of these.

    Args:
        files: JSONL of objects with `id` and a text in the first of `columns`. name: what `negative` says of the
            pairs. unfinished: whether answers that were cut off are used.
    """

    columns: tuple[str, ...] = ("output",)

    def __init__(self, files: Sequence[Path], *, name: str | None, unfinished: bool) -> None:
        super().__init__()
        self.name, self.unfinished, self.files = name, unfinished, files
        self.answers: dict[str, list[Answer]] = {}
        for file in files:
            self._read(file)
        if not self.answers:
            raise ValueError(f"{', '.join(map(str, files))}: no answers; there is nothing to make pairs of")
        self._seen: set[str] = set()

    def _read(self, file: Path) -> None:
        seen: set[tuple[str, int]] = set()
        for number, line in enumerate(jsonl_rows(file), 1):
            row, where = json.loads(line), f"{file}:{number}"
            id = row.get("id")
            if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
                raise ValueError(f"{where}: an answer needs an `id`, text or a whole number, got {id!r}")
            column = next((name for name in self.columns if name in row), None)
            texts = row[column] if column and isinstance(row[column], list) else [row.get(column)]
            if not texts or not all(isinstance(text, str) for text in texts):
                wanted = " or ".join(f"`{name}`" for name in self.columns)
                raise ValueError(f"{where}: an answer needs its text in {wanted} (it has: {', '.join(row)})")
            first, gold = row.get("sample", 0), row.get("gold")
            for draw, text in enumerate(texts, first):
                if (str(id), draw) in seen:
                    raise ValueError(f"{where}: id {id!r} occurs twice; number several answers of an id by `sample`")
                seen.add((str(id), draw))
                given = Answer(
                    text,
                    draw,
                    None if gold is None else str(gold),
                    row.get("finished", True) is not False,
                    row.get("negative"),
                    where,
                )
                self.answers.setdefault(str(id), []).append(given)

    def _key(self, id: str) -> str:
        return id if id in self.answers else id.partition("#")[0]

    def wants(self, id: str) -> bool:
        """As `Maker`."""
        found = self._key(id) in self.answers
        if found:
            self._seen.add(self._key(id))
        else:
            self.none["no answer given"] += 1
        return found

    def check(self, first_id: str) -> None:
        """Refuse answers to what the data do not have.

        Raises:
            ValueError: ids of answers that are none of the data's.
        """
        unknown = [id for id in self.answers if id not in self._seen]
        if unknown:
            raise ValueError(
                f"{', '.join(map(str, self.files))}: {len(unknown)} of {len(self.answers)} ids are not in the data, "
                f"such as {unknown[0]!r}; the data's begin as {first_id!r}: give the data and split that were "
                "answered, and by --label the name they had"
            )

    def usable(self, sample: Sample) -> list[Answer]:
        """The answers to a sample that can be used at all, each text once."""
        kept: dict[str, Answer] = {}
        for answer in self.answers[self._key(sample.id)]:
            golds = {sample.answer, *(sample.info.get("references") or ())}
            if answer.gold is not None and sample.answer is not None and answer.gold not in golds:
                raise ValueError(
                    f"{answer.where}: the answer to {sample.id} was made for the gold answer {answer.gold!r}, but the "
                    f"data have {sample.answer!r}: give the data and split that were answered"
                )
            if not answer.text.strip():
                self.unused["empty"] += 1
            elif not answer.finished and not self.unfinished:
                self.unused["cut off at the length limit"] += 1
            elif answer.text.strip() in kept:
                self.unused["said before"] += 1
            else:
                kept[answer.text.strip()] = answer
        return list(kept.values())


class Negatives(Given):
    """Worse answers that somebody gives; the sample's own text is chosen.

    Args:
        files: JSONL of `id` and `output` or `text`, maybe `negative`. every: whether all are used, or the first of each
            id. **more: see `Given`.
    """

    columns = ("output", "text")

    def __init__(self, files: Sequence[Path], *, every: bool, **more: Any) -> None:
        super().__init__(files, **more)
        self.every = every

    def pairs(self, samples: Sequence[Sample]) -> list[list[Pair]]:
        """As `Maker`."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> list[Pair]:
        chosen = sample.chosen()
        if chosen is None or not chosen.strip():
            self.none[NO_TEXT] += 1
            return []
        right = {normalise_text(text) for text in (chosen, *(sample.info.get("references") or ()))}
        worse = self.usable(sample)
        usable = [answer for answer in worse if normalise_text(answer.text) not in right]
        self.unused["equal to the chosen text or a reference"] += len(worse) - len(usable)
        if not usable:
            self.none["no negative that can be used"] += 1
        return [
            Pair(chosen, answer.text, self.name or answer.negative or "given", {"rejected_sample": answer.draw})
            for answer in (usable if self.every else usable[:1])
        ]


class Answers(Given):
    """A model's own answers, graded: a wrong one is rejected, a right one or the gold text is chosen.

    Args:
        files: what `lightning-vlm predict` writes. rule: grades. jobs: processes that grade. **more: see `Given`.
        chosen: `right` (an answer), `gold` (the sample's text) or `either` (a right answer where there is one).
        rejected: the `first` wrong one, the `worst` (lowest score; among equals one that states no answer), or `all`,
            which are joined to the right ones in turn.

    Raises:
        ValueError: a rule that does not grade single answers.
    """

    def __init__(
        self, files: Sequence[Path], *, rule: Rule, chosen: str, rejected: str, jobs: int | None, **more: Any
    ) -> None:
        if rule.of_a_set:
            raise ValueError(
                f"--rule {rule.name} scores a set of captions, not single answers: give such answers by --negatives"
            )
        super().__init__(files, **more)
        self.rule, self.chosen, self.rejected, self.jobs = rule, chosen, rejected, jobs

    def pairs(self, samples: Sequence[Sample]) -> list[list[Pair]]:
        """As `Maker`."""
        answers = [self.usable(sample) for sample in samples]
        golds = [[] if self.chosen == "right" or not (sample.chosen() or "").strip() else [sample.chosen()]
                 for sample in samples]  # fmt: skip
        asked = [
            (text, sample)
            for sample, given, gold in zip(samples, answers, golds, strict=True)
            for text in (*(answer.text for answer in given), *gold)
        ]
        try:
            records = iter(list(grade_all(self.rule, asked, workers=self.jobs)))
        except KeyError as err:
            raise ValueError(f"--rule {self.rule.name} does not fit the data: the samples have no {err}") from err
        found = []
        for sample, given, gold in zip(samples, answers, golds, strict=True):
            graded = [(answer, next(records)) for answer in given]
            found.append(self._of(sample, graded, [(text, next(records)) for text in gold]))
        return found

    def _of(self, sample: Sample, graded: list[tuple[Answer, Record]], gold: list[tuple[str, Record]]) -> list[Pair]:
        judged = [(answer, record) for answer, record in graded if not record.get("timed_out")]
        self.unused["grading cut off"] += len(graded) - len(judged)
        wrong = [(answer, record) for answer, record in judged if record["score"] < 1]
        right = [
            (answer.text, record, {"chosen_from": "right", "chosen_sample": answer.draw})
            for answer, record in judged
            if record["score"] >= 1 and self.chosen != "gold"
        ]
        if not wrong:
            self.none["no wrong answer" if judged else "no answer that can be used"] += 1
            return []
        chosen = right or [(text, record, {"chosen_from": "gold"}) for text, record in gold if record["score"] >= 1]
        if not chosen:
            missing = {"right": "no right answer", "gold": "no gold text that the rule calls right"}
            self.none[missing.get(self.chosen, "neither a right answer nor a gold text that the rule calls right")] += 1
            return []
        return [
            Pair(
                text,
                answer.text,
                self.name or "answer",
                self._columns(best, record, answer) | how | {"gold": sample.answer},
            )
            for (answer, record), (text, best, how) in zip(self._worse(wrong), _in_turn(chosen), strict=False)
        ]

    def _worse(self, wrong: list[tuple[Answer, Record]]) -> list[tuple[Answer, Record]]:
        if self.rejected == "worst":
            wrong = sorted(wrong, key=lambda w: (w[1]["score"], w[1]["extraction"] is not None))
        return wrong if self.rejected == "all" else wrong[:1]

    def _columns(self, chosen: Record, rejected: Record, answer: Answer) -> dict[str, Any]:
        return {
            "rule": self.rule.name,
            "chosen_score": chosen["score"],
            "rejected_score": rejected["score"],
            "rejected_extraction": rejected["extraction"],
            "rejected_sample": answer.draw,
        }


def _in_turn(items: Sequence[Any]) -> Iterable[Any]:
    while True:
        yield from items
