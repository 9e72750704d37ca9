"""Everything that a report says, before it is HTML, Markdown, JSON or CSV."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.studies.report.arms import Arms, group_title
from lightning_vlm.studies.report.costs import Cost, per_arm, per_stage, total
from lightning_vlm.studies.report.curves import DONE, Figure, curve_figure, pass_figure, probe_figure
from lightning_vlm.studies.report.samples import Samples, sample_outputs
from lightning_vlm.studies.report.text import NOTHING, clean, flat, number, plural
from lightning_vlm.studies.report.verdicts import EndpointView, endpoint_view

if TYPE_CHECKING:
    from lightning_vlm.studies.results import Measured, Results, StageRow

LOG_LINES = 12
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A stage instance without results: its state, exit code, and the end of its log."""

    name: str
    state: str
    exit: str
    log: str


@dataclass(frozen=True, kw_only=True)
class ClaimView:
    """A claim of a source and what came of it in each group: (group, verdict, sentence)."""

    says: str
    source: str
    endpoint: str
    judged: list[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class BudgetView:
    """What the runs of an arm spent in a stage: each seed's number, and whether all arms spent the same."""

    label: str
    stage: str
    unit: str
    values: str
    equal: bool


@dataclass(kw_only=True)
class Content:
    """A report's parts, in the order in which they are read; see `gather`."""

    results: Results
    arms: Arms
    about: list[str]
    size: str
    when: str
    states: dict[str, int]
    unfinished: list[Unfinished]
    endpoints: list[EndpointView]
    claims: list[ClaimView]
    budget: list[BudgetView]
    curves: list[Figure] = field(default_factory=list)
    entropies: list[Figure] = field(default_factory=list)
    passes: Figure | None = None
    probes: list[Figure] = field(default_factory=list)
    samples: Samples | None = None
    stage_costs: list[Cost] = field(default_factory=list)
    arm_costs: list[Cost] = field(default_factory=list)
    total_cost: Cost | None = None
    differences: tuple[list[str], list[list[str]]] = ((), ())  # type: ignore[assignment]
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def unequal(self) -> list[str]:
        """Stages whose budgets are not equal over arms."""
        return list(dict.fromkeys(row.stage for row in self.budget if not row.equal))

    @property
    def figures(self) -> list[Figure]:
        """All of them."""
        return [*self.curves, *self.entropies, *([self.passes] if self.passes else []), *self.probes]


def gather(results: Results) -> Content:
    """Read what the report shows; what cannot be read is said in its place, and the rest stands."""
    arms = Arms(results)
    states: dict[str, int] = {}
    for row in results.stages:
        states[row.state] = states.get(row.state, 0) + 1
    content = Content(
        results=results,
        arms=arms,
        about=[part.strip() for part in re.split(r"\n\s*\n", results.about or "") if part.strip()],
        size=", ".join(f"{axis} ({len(values)})" for axis, values in results.axes.items()),
        when=_when(results.stages),
        states=states,
        unfinished=[_unfinished(results, row) for row in results.stages if row.state != DONE],
        endpoints=[_endpoint(results, measured, arms) for measured in results.measured],
        claims=_claims(results),
        budget=[_budget(row) for row in results.budget],
        stage_costs=per_stage(results, arms),
        arm_costs=per_arm(results, arms),
        total_cost=total(results),
        differences=_differences(results, arms),
        environment=flat(results.environment),
    )
    _draw(content)
    content.notes = _notes(content)
    return content


def _draw(content: Content) -> None:
    """The charts and samples that the study file asks for."""
    results, arms, asked = content.results, content.arms, content.results.report or {}
    for index, item in enumerate(asked.get("curves") or [], 1):
        figure = curve_figure(results, arms, item, f"curve-{index}")
        (content.entropies if "entropy" in str(item["metric"]) else content.curves).append(figure)
    if asked.get("pass_at_k"):
        content.passes = pass_figure(results, arms, asked["pass_at_k"], "pass-at-k")
    for index, item in enumerate(asked.get("probes") or [], 1):
        content.probes.append(probe_figure(results, arms, item, f"probe-{index}"))
    if asked.get("samples"):
        content.samples = sample_outputs(results, arms, asked["samples"])
    for part in [*content.figures, *([content.samples] if content.samples else [])]:
        part.missing = [line.replace(f"{results.run_dir}/", "") for line in part.missing]


def _endpoint(results: Results, measured: Measured, arms: Arms) -> EndpointView:
    view = endpoint_view(measured, arms)
    return replace(view, missing=view.missing.replace(f"{results.run_dir}/", ""))


def _when(rows: list[StageRow]) -> str:
    """First start to last end, in UTC; empty where nothing has run."""
    starts, ends = ([row.record[key] for row in rows if (row.record or {}).get(key)] for key in ("started", "ended"))
    if not (starts and ends):
        return ""
    first, last = (f"{datetime.fromtimestamp(t, UTC):%Y-%m-%d %H:%M}" for t in (min(starts), max(ends)))
    return f"{first} to {last} UTC"


def _unfinished(results: Results, row: StageRow) -> Unfinished:
    path = Path(results.run_dir) / "logs" / f"{row.name}.log"
    log = ""
    if row.state == "failed" and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-LOG_LINES:]
        log = clean(_ANSI.sub("", "\n".join(lines)), 4000)
    exit_code = (row.record or {}).get("exit")
    return Unfinished(
        name=row.name, state=row.state, exit="" if exit_code is None else f"exit code {exit_code}", log=log
    )


def _claims(results: Results) -> list[ClaimView]:
    found: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for judged in results.claims:
        claim = judged.claim
        place = found.setdefault((claim.says, claim.source or "", claim.endpoint), [])
        place.append((group_title(judged.group), judged.verdict, judged.sentence))
    return [ClaimView(says=says, source=s, endpoint=e, judged=judged) for (says, s, e), judged in found.items()]


def _budget(row: dict[str, Any]) -> BudgetView:
    values = [number(value) for value in row["values"]]
    if len(set(values)) == 1 and len(values) > 1:
        shown = f"{values[0]} for each of {plural(len(values), 'seed')}"
    else:
        shown = ", ".join(values) or NOTHING
    equal = bool(row["equal"])
    return BudgetView(label=row["label"], stage=row["stage"], unit=row["unit"], values=shown, equal=equal)


def _differences(results: Results, arms: Arms) -> tuple[list[str], list[list[str]]]:
    """Labels and rows of the settings in which arms differ.

    A stage that does not depend on all axes has its own labels: its values stand at all arms that share its place.
    """

    def value(values: dict[str, Any], label: str) -> str:
        place = arms.at(label).items()
        kin = [other for other in values if arms.at(other) and arms.at(other).items() <= place]
        return clean(values[label if label in values else kin[0]], 200) if label in values or kin else NOTHING

    labels = arms.labels
    rows = [[row["key"], *(value(row["values"], label) for label in labels)] for row in results.differences]
    # What differs between starts of which no arm has two would show nothing.
    return labels, [row for row in rows if len(set(row[1:])) > 1]


def _notes(content: Content) -> list[str]:
    """How numbers were made; each said once."""
    notes = [note for view in content.endpoints for note in view.notes]
    if content.curves or content.entropies or content.probes:
        notes.append(
            "Curves: the line is the mean over seeds at the steps that all of them have, the band its 95 % t interval, "
            "each thin line a seed. One seed has no band. Bands that a chart cannot hold are cut at its edge."
        )
    pooled = max((series["logged_values_per_point"] for f in content.figures for series in f.data), default=1)
    if pooled > 1:
        notes.append(f"Long curves: each point is the mean of up to {pooled} logged values.")
    if content.passes:
        notes.append(
            "pass@k: 1 − C(n − c, k)/C(n, k) for a problem with c right answers of n, mean over problems; the band is "
            "a 95 % t interval over seeds."
        )
    return list(dict.fromkeys(notes))
