"""What a study cost: per stage and arm, and per arm with everything that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_vlm.studies.report.arms import SEED, Arms

if TYPE_CHECKING:
    from lightning_vlm.studies.results import Results, StageRow


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A sum over stage instances.

    Attributes:
        what: a stage or an arm. label: the arm of a stage. runs: instances that are in it, of which `unfinished` are
            not done.
        seconds: wall time of their processes. cpu_seconds: of all their threads. steps: optimizer steps. tokens: that
            losses saw. peak_gib: the largest. None where no instance tells it.
    """

    what: str
    label: str
    runs: int
    unfinished: int
    seconds: float | None
    cpu_seconds: float | None
    steps: float | None
    tokens: float | None
    peak_gib: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain facts."""
        return asdict(self)


def measured(row: StageRow, name: str) -> float | None:
    """A cost of an instance: of the whole process where the study measured it, else of the training run in it.

    Args:
        row: the instance. name: seconds, cpu_seconds, peak_gib, steps or tokens.
    """
    for source in (row.record, row.costs):
        value = (source or {}).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _sum(what: str, label: str, rows: Iterable[StageRow]) -> Cost:
    rows = list(rows)
    found = {
        name: [value for row in rows if (value := measured(row, name)) is not None]
        for name in ("seconds", "cpu_seconds", "steps", "tokens", "peak_gib")
    }
    totals = {name: (max if name == "peak_gib" else sum)(values) if values else None for name, values in found.items()}
    return Cost(what=what, label=label, runs=len(rows), unfinished=sum(r.state != "done" for r in rows), **totals)


def per_stage(results: Results, arms: Arms) -> list[Cost]:
    """A cost per stage and arm, summed over seeds, in the order of the study."""
    rows: dict[tuple[str, str], list[StageRow]] = {}
    for row in results.stages:
        rows.setdefault((row.stage, row.label), []).append(row)
    stages = list(dict.fromkeys(stage for stage, _ in rows))
    ordered = [(s, label) for s in stages for label in arms.ordered(label for stage, label in rows if stage == s)]
    return [_sum(stage, arms.shown(label), rows[stage, label]) for stage, label in ordered]


def per_arm(results: Results, arms: Arms) -> list[Cost]:
    """A cost per arm: its own stages over all seeds and all that these use; what arms share counts in full for each."""
    by_name = {row.name: row for row in results.stages}
    found = []
    for label in results.labels:
        own = [row for row in results.stages if _is_part(row, arms.at(label))]
        found.append(_sum(label, label, _with_inputs(own, by_name)))
    return found


def total(results: Results) -> Cost:
    """Everything once."""
    return _sum("whole study", "", results.stages)


def _is_part(row: StageRow, arm: Mapping[str, str]) -> bool:
    place = {axis: str(value) for axis, value in row.at.items() if axis != SEED}
    return bool(place) and place.items() <= arm.items()


def _with_inputs(rows: Iterable[StageRow], by_name: Mapping[str, StageRow]) -> list[StageRow]:
    """The rows and, through their inputs, all that they need."""
    needed: dict[str, StageRow] = {}
    open_rows = list(rows)
    while open_rows:
        row = open_rows.pop()
        if row.name in needed:
            continue
        needed[row.name] = row
        inputs = (row.record or {}).get("inputs") or {}
        names = [given.get("instance") for given in inputs.values() if isinstance(given, dict)]
        open_rows += [by_name[name] for name in names if name in by_name]
    return list(needed.values())
