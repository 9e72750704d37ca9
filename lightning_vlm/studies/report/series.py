"""Curves over seeds: read from metrics.csv, from a probe's summary or from answers, then averaged with an interval."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from lightning_vlm.metrics.pass_at_k import pass_at_k
from lightning_vlm.metrics.statistics import is_binary, mean_interval
from lightning_vlm.studies.endpoints import evaluation_of
from lightning_vlm.studies.numbers import read_curve
from lightning_vlm.studies.per_example import read_evaluation

LEVEL = 0.95
POINTS = 150  # of a line; more are averaged in equal runs of steps


@dataclass(frozen=True, kw_only=True)
class Series:
    """One arm's curve.

    Attributes:
        label: of the arm.
        x: steps (or k) that all seeds have. mean, low, high: over seeds; the bounds are NaN for one seed and where the
            seeds have no spread.
        seeds: each seed's own points (x, y), also those that other seeds lack.
        pooled: logged values behind each point.
    """

    label: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: dict[int | None, tuple[list[float], list[float]]] = field(repr=False)
    pooled: int = 1

    @property
    def single(self) -> bool:
        """Whether there is only one seed, which has no interval."""
        return len(self.seeds) == 1


def over_seeds(label: str, runs: Mapping[int | None, Mapping[float, float]]) -> Series:
    """The mean over seeds at the steps that all of them have, with its t interval.

    Args:
        label: of the arm. runs: seed → {step: value}.

    Raises:
        ValueError: seeds that share no step.
    """
    if any(not run for run in runs.values()):
        raise ValueError(f"a seed of '{label}' has no finite value")
    shared = sorted(set.intersection(*(set(run) for run in runs.values())))
    if not shared:
        raise ValueError(f"the seeds of '{label}' have no step in common; log them at the same steps")
    pooled = -(-len(shared) // POINTS)
    blocks = [shared[i : i + pooled] for i in range(0, len(shared), pooled)]
    x = [fmean(block) for block in blocks]
    table = [[fmean(run[step] for step in block) for block in blocks] for run in runs.values()]
    columns = [list(column) for column in zip(*table, strict=True)]
    bounds = [mean_interval(c, level=LEVEL) if len(c) > 1 else (math.nan, math.nan) for c in columns]
    return Series(
        label=label,
        x=x,
        mean=[fmean(column) for column in columns],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
        seeds={seed: _own(run, pooled) for seed, run in runs.items()},
        pooled=pooled,
    )


def _own(run: Mapping[float, float], pooled: int) -> tuple[list[float], list[float]]:
    steps = sorted(run)
    blocks = [steps[i : i + pooled] for i in range(0, len(steps), pooled)]
    return [fmean(block) for block in blocks], [fmean(run[step] for step in block) for block in blocks]


def logged(folder: Path, metric: str) -> dict[float, float]:
    """What a run logged under a name: step → value, without NaN.

    Raises:
        FileNotFoundError: the run has no metrics. ValueError: none of that name.
    """
    return {float(step): value for step, value in read_curve(folder, metric).items() if math.isfinite(value)}


def probed(folder: Path, probe: str, metric: str) -> dict[float, float]:
    """A quantity of a learning-dynamics probe: step → mean over the probe's samples.

    Raises:
        FileNotFoundError: the run has no such probe. ValueError: the probe has no such quantity.
    """
    path = folder / "probes" / probe / "summary.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.parent.name for p in folder.glob("probes/*/summary.jsonl"))) or "none"
        raise FileNotFoundError(f"{folder.name} has no probe '{probe}'; it has: {there}")
    whole = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    lines = [json.loads(line) for line in whole]
    values = {float(line["step"]): line[metric] for line in lines if isinstance(line.get(metric), int | float)}
    if not values:
        known = ", ".join(sorted({k for line in lines for k, v in line.items() if isinstance(v, int | float)}))
        raise ValueError(f"probe '{probe}' of {folder.name} has no '{metric}'; it has: {known or 'nothing'}")
    return values


def pass_curve(folder: Path, benchmark: str | None) -> dict[float, float]:
    """pass@k of an evaluation for k = 1 … n, each the mean over problems of the unbiased estimate.

    Raises:
        FileNotFoundError, ValueError: no such evaluation, scores other than 0 and 1.
    """
    scores = read_evaluation(evaluation_of(folder, benchmark)).scores
    for name, draws in scores.items():
        if not is_binary(draws):
            raise ValueError(f"pass@k needs scores of 0 and 1; id '{name}' of {folder.name} has {max(draws)}")
    n = len(next(iter(scores.values())))
    right = Counter(int(sum(draws)) for draws in scores.values())  # problems by their number of right answers
    return {float(k): sum(pass_at_k(n, c, k) * m for c, m in right.items()) / len(scores) for k in range(1, n + 1)}
