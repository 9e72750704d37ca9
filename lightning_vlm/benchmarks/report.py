"""What an evaluation leaves on disk, the same for answers given here and answers made elsewhere.

`per_example.jsonl`: one line per example and draw. `scores.json`: metric → value, shares as fractions, with `n`, `rule`
and 95 % `intervals`. `breakdown.json`: by task, level and so on. `conditions.json`: what the numbers depend on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_vlm.benchmarks.rule import Record, Summary

PER_EXAMPLE, SCORES, BREAKDOWN, CONDITIONS = "per_example.jsonl", "scores.json", "breakdown.json", "conditions.json"
EVALUATIONS = "evaluations"  # in a run's folder: evaluations/BENCHMARK/step-N


def scores_of(summary: Summary, rule: str, *, seed: int = 0) -> dict[str, Any]:
    """The content of `scores.json`.

    Args:
        summary: of the evaluation. rule: its name. seed: of the bootstrap behind the intervals.
    """
    intervals = {name: list(interval) for name, interval in summary.intervals(seed=seed).items()}
    return {"rule": rule, "n": int(summary.metrics["n"])} | {
        **{name: value for name, value in summary.metrics.items() if name != "n"},
        "intervals": intervals,
    }


def write_evaluation(
    folder: Path, records: Sequence[Record], summary: Summary, scores: dict[str, Any], conditions: dict[str, Any]
) -> None:
    """Write all four files into an existing folder.

    Args:
        folder: where. records: of `per_example.jsonl`. summary: gives the breakdown. scores: of `scores_of`.
        conditions: rule, prompt, sampling, provenance.
    """
    described = {name: conditions[name] for name in ("prompt_id", "rule") if conditions.get(name) is not None}
    with (folder / PER_EXAMPLE).open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record | described) + "\n")
    _write(folder / SCORES, scores)
    _write(folder / CONDITIONS, conditions)
    if summary.breakdown:
        _write(folder / BREAKDOWN, summary.breakdown)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
