"""What a study has found so far: states, costs, endpoints, claims, budgets; everything that a report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from lightning_vlm.studies.claims import Judged, check_claim, judge
from lightning_vlm.studies.comparison import Comparison
from lightning_vlm.studies.endpoints import Endpoint, RunAt, measure
from lightning_vlm.studies.graph import Graph
from lightning_vlm.studies.record import COSTS, RECORD, read_json
from lightning_vlm.studies.runs import Run
from lightning_vlm.studies.spec import SEED, Budget
from lightning_vlm.studies.state import state_of

# Differences between arms' configurations that say nothing of the recipe.
_NO_DIFFERENCE = ("logger.", "callbacks.RunRecord", "callbacks.EvaluationRecord", "run_dir")


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One run.

    Attributes:
        name: of the run. stage: its stage. label: of its arm. seed: of training, None where it depends on none.
        at: axis → value. state: as `state_of`. folder: what it left. record: stage.json. costs: costs.json.
    """

    name: str
    stage: str
    label: str
    seed: int | None
    at: dict[str, str]
    state: str
    folder: Path
    record: dict[str, Any]
    costs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An endpoint over all arms; `missing` says why there is no comparison, or which runs it lacks."""

    endpoint: Endpoint
    comparison: Comparison | None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a report shows.

    Attributes:
        name, question, about: of the study. file: its YAML, whose content is `text`. run_dir: where it ran.
        axes: axis → value names. labels: of arms. groups: places of the axes inside which arms are compared; [{}]
            where all are. seeds: of training.
        stages: every run. measured: endpoints. claims: judged.
        budget: per arm {"label", "stage", "unit", "values" by seed, "equal"}. budget_note: what to know of it.
        report: the file's `report`. environment: of the runs. differences: {"key", "values": {label: value}}.
    """

    name: str
    question: str
    about: str
    file: Path
    text: str
    run_dir: Path
    axes: dict[str, list[str]]
    labels: list[str]
    groups: list[dict[str, str]]
    seeds: list[int]
    stages: list[StageRow]
    measured: list[Measured]
    claims: list[Judged]
    budget: list[dict[str, Any]]
    budget_note: str
    report: dict[str, Any]
    environment: dict[str, Any]
    differences: list[dict[str, Any]]

    def runs(self, stage: str) -> list[StageRow]:
        """The runs of a stage."""
        return [row for row in self.stages if row.stage == stage]


def collect(graph: Graph) -> Results:
    """Read what the runs left.

    Args:
        graph: of the study; runs that are not done are left out, and said to be missing.
    """
    spec = graph.spec
    rows = [_row(graph, run) for run in graph.runs]
    groups = groups_of(graph)
    places = {endpoint.name: arms_of(graph, endpoint.stage) for endpoint in spec.endpoints}
    measured = [_measured(graph, endpoint, places[endpoint.name], groups) for endpoint in spec.endpoints]
    by_name = {found.endpoint.name: found for found in measured}
    claims = []
    for claim in spec.claims:
        found = by_name[claim.endpoint]
        if found.comparison is not None:
            claims += judge(claim, found.comparison, places[claim.endpoint], groups)
        else:
            claims.append(Judged(claim=claim, verdict="not shown", sentence=f"{found.endpoint.name}: {found.missing}"))
    labels = list(next(iter(places.values()), {})) or list(dict.fromkeys(row.label for row in rows if row.at))
    budget, note = _budget(graph, spec.budget, groups) if spec.budget else ([], "")
    return Results(
        name=spec.name,
        question=spec.question,
        about=spec.about,
        file=spec.file,
        text=spec.file.read_text(encoding="utf-8"),
        run_dir=spec.run_dir,
        axes={axis: list(values) for axis, values in spec.axes.items()},
        labels=labels,
        groups=groups,
        seeds=list(spec.axes.get(SEED, {}).values()),
        stages=rows,
        measured=measured,
        claims=claims,
        budget=budget,
        budget_note=note,
        report=spec.report,
        environment=_environment(rows),
        differences=_differences(graph, rows),
    )


def groups_of(graph: Graph) -> list[dict[str, str]]:
    """The places of the axes inside which arms are compared; [{}] where all are."""
    within = graph.spec.compare.within
    return [dict(zip(within, values, strict=True)) for values in product(*(graph.spec.axes[axis] for axis in within))]


def arms_of(graph: Graph, stage: str) -> dict[str, dict[str, str]]:
    """Label → place on the axes, the seed's left out, of a stage's arms."""
    axes = graph.spec.arm_axes
    return {run.label(axes): {a: v for a, v in run.at.items() if a != SEED} for run in graph.at(stage)}


def check_claims(graph: Graph) -> None:
    """See that claims speak of arms that there are.

    Raises:
        ValueError: an arm that is not there, or fewer than two.
    """
    stages = {endpoint.name: endpoint.stage for endpoint in graph.spec.endpoints}
    for claim in graph.spec.claims:
        check_claim(claim, arms_of(graph, stages[claim.endpoint]), groups_of(graph))


def _row(graph: Graph, run: Run) -> StageRow:
    return StageRow(
        name=run.name,
        stage=run.stage,
        label=run.label(graph.spec.arm_axes),
        seed=run.seed,
        at=run.at,
        state=state_of(run),
        folder=run.folder,
        record=read_json(run.folder / RECORD),
        costs=read_json(run.folder / COSTS),
    )


def _measured(
    graph: Graph, endpoint: Endpoint, places: Mapping[str, dict[str, str]], groups: Sequence[Mapping[str, str]]
) -> Measured:
    axes, seeds = graph.spec.arm_axes, list(graph.spec.axes.get(SEED, {}).values())
    runs: dict[tuple[str, int | None], RunAt] = {}
    lacking, constant = [], {}
    for binding in graph.bindings:
        run = graph.run(endpoint.stage, binding)
        minus = graph.run(endpoint.minus, binding) if endpoint.minus else None
        label, seed = run.label(axes), run.seed
        if seed is None and seeds:  # one model, the same for every seed: its number is a constant beside the others'
            seed = graph.spec.axes[SEED][binding[SEED]]
            constant[label] = run.name
        if (label, seed) in runs:
            continue
        needed = [run, *([minus] if minus is not None else [])]
        if undone := [r.name for r in needed if state_of(r) != "done"]:
            lacking += [name for name in undone if name not in lacking]
            continue
        runs[label, seed] = RunAt(label, places[label], seed, run.folder, minus and minus.folder)
    missing = f"not done: {', '.join(lacking[:4])}" + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")
    missing = missing if lacking else ""
    if not runs:
        return Measured(endpoint=endpoint, comparison=None, missing=missing)
    there = {run.label: run.at for run in runs.values()}
    pairs = _pairs(there, groups, graph.spec.compare.baseline)
    try:
        result = measure(
            endpoint,
            list(runs.values()),
            pairs=pairs,
            alpha=graph.spec.compare.alpha,
            pairing=graph.spec.compare.pairing,  # type: ignore[arg-type]
        )
    except (ValueError, FileNotFoundError) as err:
        return Measured(endpoint=endpoint, comparison=None, missing=str(err))
    notes = [
        f"{label} is one model ({name}), the same beside every seed of the others: tested as a constant."
        for label, name in constant.items()
    ]
    return Measured(endpoint=endpoint, comparison=_noted(result, notes), missing=missing)


def _noted(result: Comparison, notes: list[str]) -> Comparison:
    return replace(result, conditions=[*result.conditions, *notes]) if notes else result


def _pairs(
    places: Mapping[str, Mapping[str, str]], groups: Sequence[Mapping[str, str]], baseline: str | None
) -> list[tuple[str, str]]:
    """Pairs of arms that share a group, with the baseline where there is one."""

    def inside(label: str, group: Mapping[str, str]) -> bool:
        return all(places[label].get(axis, value) == value for axis, value in group.items())

    return [
        (a, b)
        for a, b in combinations(places, 2)
        if any(inside(a, group) and inside(b, group) for group in groups)
        and (baseline is None or baseline in (*places[a].values(), *places[b].values()))
    ]


def _budget(graph: Graph, budget: Budget, groups: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, Any]], str]:
    """What each arm has spent in the budget's stages, seed by seed."""
    axes = graph.spec.arm_axes
    spent: dict[str, dict[str, float]] = {}
    at: dict[str, dict[str, str]] = {}
    for binding in graph.bindings:
        runs = [graph.run(stage, binding) for stage in budget.stages]
        if any(state_of(run) != "done" for run in runs):
            continue
        names = [axis for axis in axes if any(axis in run.at for run in runs)]
        label = " · ".join(binding[axis] for axis in names) or runs[-1].stage
        costs = [read_json(run.folder / COSTS) for run in runs]
        spent.setdefault(label, {})[binding.get(SEED, "")] = sum(cost.get(budget.unit, 0.0) for cost in costs)
        at[label] = {axis: binding[axis] for axis in names}
    rows = []
    for label, values in spent.items():
        beside = [
            fmean(found.values())
            for other, found in spent.items()
            if any(all(at[x].get(a, v) == v for x in (label, other) for a, v in group.items()) for group in groups)
        ]
        equal = max(beside) - min(beside) <= budget.tolerance * max(beside)
        rows.append(
            {
                "label": label,
                "stage": ", ".join(budget.stages),
                "unit": budget.unit,
                "values": list(values.values()),
                "equal": equal,
            }
        )
    unequal = [row["label"] for row in rows if not row["equal"]]
    note = f"Budgets are {budget.unit}, measured, in {', '.join(budget.stages)}."
    if not budget.exact:
        note += " Seconds are not exact: another machine, or a busier one, gives others."
    if unequal:
        note += f" NOT EQUAL between arms that are compared (tolerance {budget.tolerance:.0%}): {', '.join(unequal)}."
    return rows, note


def _environment(rows: Sequence[StageRow]) -> dict[str, Any]:
    """Versions and devices of the first run that tells, and every commit of the code that runs were made by."""
    found: dict[str, Any] = {}
    commits: dict[str, None] = {}
    for row in rows:
        facts = read_json(row.folder / "environment.json")
        found = found or {key: facts[key] for key in facts if key not in ("git", "stage")}
        if commit := (facts.get("git") or {}).get("commit"):
            commits[commit] = None
    return found | {"commits": list(commits)} if found else {}


def _differences(graph: Graph, rows: Sequence[StageRow]) -> list[dict[str, Any]]:
    """Settings of one stage that are not the same in all arms, and the way that each arm takes."""
    spec, out = graph.spec, []
    ends = [e.stage for e in spec.endpoints[:1]] or list(spec.stages)[-1:]
    ways: dict[str, str] = {}
    for run in graph.at(ends[0]) if ends else ():
        ways.setdefault(run.label(spec.arm_axes), _way(run))
    if len(set(ways.values())) > 1:
        out.append({"key": "stages", "values": ways})
    for stage in spec.stages:
        configs: dict[str, dict[str, Any]] = {}
        for row in rows:
            file = row.folder / "config.yaml"
            if row.stage == stage and row.label not in configs and file.is_file():
                configs[row.label] = _flat(yaml.safe_load(file.read_text()))
        keys = dict.fromkeys(key for config in configs.values() for key in config)
        for key in keys:
            values = {label: config.get(key) for label, config in configs.items()}
            if key.startswith(_NO_DIFFERENCE) or len({json.dumps(v, default=str) for v in values.values()}) < 2:
                continue
            shown = {label: _shown(value, spec.run_dir) for label, value in values.items()}
            out.append({"key": f"{stage}: {key}", "values": shown})
    return out


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {at: value}
    return {key: v for name, sub in value.items() for key, v in _flat(sub, f"{at}.{name}" if at else str(name)).items()}


def _way(run: Run) -> str:
    """`warmup → base → opd → rl`, along the models that training started from."""
    start = next((use.run for use in run.uses if use.key in ("backbone.path", "", "model", "vision")), None)
    return run.stage if start is None else f"{_way(start)} → {run.stage}"


def _shown(value: Any, run_dir: Path) -> str:
    return str(value).replace(f"{run_dir}/", "")
