"""The report's numbers for machines: one JSON file, and CSV files of endpoints, pairs and stage runs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from lightning_vlm.studies.report.content import Content
from lightning_vlm.studies.report.costs import measured


def as_json(content: Content) -> str:
    """Everything, scores as in the files (fractions), NaN as null, paths relative to the study's folder."""
    results = content.results
    found = {
        "study": results.name,
        "question": results.question,
        "about": results.about,
        "axes": results.axes,
        "arms": [{"label": label, "at": content.arms.at(label)} for label in results.labels],
        "groups": [dict(group) for group in results.groups],
        "seeds": list(results.seeds),
        "states": content.states,
        "unfinished": [{"name": u.name, "state": u.state} for u in content.unfinished],
        "endpoints": [
            {
                "endpoint": asdict(m.endpoint),
                "comparison": None if m.comparison is None else m.comparison.to_json(),
                "missing": m.missing,
                "answers": [{"group": group.title, "answer": group.answer} for group in view.groups if group.answer],
            }
            for m, view in zip(results.measured, content.endpoints, strict=True)
        ],
        "claims": [
            {
                "says": judged.claim.says,
                "source": judged.claim.source,
                "endpoint": judged.claim.endpoint,
                "group": dict(judged.group),
                "verdict": judged.verdict,
                "sentence": judged.sentence,
            }
            for judged in results.claims
        ],
        "budget": results.budget,
        "budget_note": results.budget_note,
        "curves": [
            {"title": f.title, "about": f.about, "missing": f.missing, "series": f.data} for f in content.figures
        ],
        "costs": {
            "arms": [cost.to_json() for cost in content.arm_costs],
            "stages": [cost.to_json() for cost in content.stage_costs],
            "total": content.total_cost and content.total_cost.to_json(),
        },
        "stages": [_stage(row) for row in results.stages],
        "differences": results.differences,
        "environment": results.environment,
        "notes": content.notes,
        "file": results.text,
    }
    return json.dumps(_plain(found, f"{results.run_dir}/"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any, folder: str) -> Any:
    """JSON has no NaN, no tuples, no paths; texts lose the name of the study's folder."""
    if isinstance(value, dict):
        return {str(key): _plain(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, folder) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) or value is None else str(value).replace(folder, "")


def _stage(row: Any) -> dict[str, Any]:
    kept = ("fingerprint", "exit", "started", "ended", "inputs", "outputs", "mlflow_run_id")
    record = row.record or {}
    facts = {"name": row.name, "stage": row.stage, "label": row.label, "seed": row.seed, "state": row.state}
    costs = {name: measured(row, name) for name in ("seconds", "cpu_seconds", "steps", "tokens", "peak_gib", "threads")}
    return facts | costs | {name: record[name] for name in kept if name in record}


def endpoints_csv(content: Content) -> str:
    """A line per endpoint and arm; `seed_means` in the order of `seeds`."""
    heads = ["endpoint", "arm", "seeds", "mean", "low", "high", "interval_over", "seed_sd", "seed_means", "unit"]
    lines = []
    for result, name in _compared(content):
        for arm in result["arms"]:
            numbers = [arm[key] for key in ("mean", "low", "high", "interval_over", "seed_sd")]
            seeds = " ".join("" if seed is None else str(seed) for seed in arm["seeds"])
            means = " ".join(repr(value) for value in arm["seed_means"])
            lines.append([name, arm["name"], seeds, *numbers, means, result["unit"]])
    return _csv(heads, lines)


def pairs_csv(content: Content) -> str:
    """A line per endpoint and pair."""
    keys = ["a", "b", "verdict", "better", "diff", "low", "high", "p", "p_adjusted", "test", "required", "sentence"]
    lines = [
        [name, *(pair.get(key) for key in keys), result["unit"]]
        for result, name in _compared(content)
        for pair in result["pairs"]
    ]
    return _csv(["endpoint", *keys, "unit"], lines)


def stages_csv(content: Content) -> str:
    """A line per run of a stage."""
    heads = ["name", "stage", "label", "seed", "state", "seconds", "cpu_seconds", "steps", "tokens", "peak_gib"]
    heads += ["threads", "started", "ended", "exit", "fingerprint"]
    rows = [_stage(row) for row in content.results.stages]
    return _csv(heads, [[row.get(head) for head in heads] for row in rows])


def _compared(content: Content) -> Iterable[tuple[dict[str, Any], str]]:
    for found in content.results.measured:
        if found.comparison is not None:
            yield found.comparison.to_json(), found.endpoint.name


def _csv(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    return stream.getvalue()
