"""Endpoints: what a study measures in each run, and the claims it is held against.

An endpoint is a number per problem (`score`, `pass@K`), or one number per run: of `scores.json`, of a curve in the
run's `metrics.csv`, or of any JSON file. `measure` reads it from the folders of the runs and compares the arms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_vlm.config.tree import nearest
from lightning_vlm.studies.compare import compare, compare_values
from lightning_vlm.studies.comparison import Comparison, Higher, Pairing
from lightning_vlm.studies.numbers import curve_at, number_of, score_of, start_of
from lightning_vlm.studies.per_example import Run, last_evaluations, read_evaluation
from lightning_vlm.studies.wording import Unit

_KEYS = ("stage", "benchmark", "metric", "curve", "at", "file", "key", "minus", "higher", "unit", "scale")
_TEXTS = ("stage", "benchmark", "metric", "curve", "at", "file", "key", "higher", "unit")
_HIGHER = ("better", "worse", "neither")
_PLACES = ("start", "end")
_PER_PROBLEM = re.compile(r"score|pass@[1-9]\d*")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What is measured in each run of a stage.

    Attributes:
        name: as the study calls it. stage: whose runs are measured.
        benchmark: of an evaluation; None for the only one there is. metric: `score`, `pass@K`, or a name in
            `scores.json`.
        curve: name of a logged metric. at: its start or end, the mean of a tenth of the logged values.
        file: a JSON file in the run's folder. key: of the number in it, as a.b.c.
        minus: another stage; its number is subtracted, seed by seed.
        higher: what a greater number means.
        unit: shown after numbers, None to find it from the scores. scale: what numbers are shown times.
    """

    name: str
    stage: str
    benchmark: str | None = None
    metric: str = "score"
    curve: str | None = None
    at: str = "end"
    file: str | None = None
    key: str | None = None
    minus: str | None = None
    higher: Higher = "better"
    unit: str | None = None
    scale: float = 1.0

    @property
    def per_problem(self) -> bool:
        """Whether every problem has a number."""
        return self.curve is None and self.file is None and _PER_PROBLEM.fullmatch(self.metric) is not None

    @property
    def measures(self) -> str:
        """What the number is: `pass@1`, `train/entropy at the start`, `summary.pointing`."""
        if self.curve is not None:
            return f"{self.curve} at the {self.at}"
        return self.metric if self.key is None else self.key


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence about an endpoint that a study may hold or contradict.

    Attributes:
        says: the sentence. source: who says it. endpoint: name of the endpoint.
        greater, than: arms, the number of the first being greater. within: differences are at most this, in shown
            units. among: the arms whose differences; empty for all. where: axis → value it is restricted to.
    """

    says: str
    source: str = ""
    endpoint: str
    greater: str | None = None
    than: str | None = None
    within: float | None = None
    among: tuple[str, ...] = ()
    where: dict[str, str] = field(default_factory=dict)


class RunAt(NamedTuple):
    """A run of an endpoint's stage: its arm, its place on all axes, its training seed (None without such an axis), its
    folder, and the folder of the run that is subtracted."""

    label: str
    at: dict[str, str]
    seed: int | None
    folder: Path
    minus: Path | None = None


def parse_endpoint(name: str, mapping: Mapping[str, Any]) -> Endpoint:
    """An endpoint as a study file says it.

    Args:
        name: of the endpoint. mapping: its keys (`Endpoint`), `minus` as the name of a stage or {stage: NAME}.

    Raises:
        ValueError: an unknown or missing key, keys that contradict each other, or a value that is none.
    """
    of = f"endpoint '{name}'"
    _check_keys(of, mapping, _KEYS, needed=("stage",))
    given = {key: value for key, value in mapping.items() if value is not None}
    if isinstance(given.get("minus"), Mapping):
        _check_keys(f"{of}: `minus`", given["minus"], ("stage",), needed=("stage",))
        given["minus"] = given["minus"]["stage"]
    for key in (*_TEXTS, "minus"):
        if key in given and not (isinstance(given[key], str) and given[key]):
            raise ValueError(f"{of}: `{key}` must be a text, got {given[key]!r}")
    sources = [key for key in ("curve", "file") if key in given]
    sources += ["benchmark"] if {"benchmark", "metric"} & given.keys() else []
    if len(sources) > 1:
        raise ValueError(
            f"{of} has {' and '.join(f'`{s}`' for s in sources)}: choose one of evaluation, curve and file"
        )
    for key, partner in (("at", "curve"), ("key", "file"), ("file", "key")):
        if key in given and partner not in given:
            raise ValueError(f"{of} has `{key}` without `{partner}`; {key} goes with {partner}")
    for key, values in (("higher", _HIGHER), ("at", _PLACES)):
        if key in given and given[key] not in values:
            raise ValueError(f"{of}: `{key}` must be one of {', '.join(values)}; got '{given[key]}'")
    if given.get("metric", "").startswith("pass@") and not _PER_PROBLEM.fullmatch(given["metric"]):
        raise ValueError(f"{of}: `metric` is '{given['metric']}'; write pass@K with a whole number K such as pass@8")
    scale = given.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{of}: `scale` must be a number above 0, got {scale!r}")
    if given.get("minus") == given["stage"]:
        raise ValueError(f"{of} is stage '{given['stage']}' minus itself; `minus` names another stage")
    return Endpoint(name=name, **given | {"scale": float(scale)})


def parse_claim(mapping: Mapping[str, Any], endpoints: Sequence[Endpoint]) -> Claim:
    """A claim as a study file says it.

    Args:
        mapping: `says`, `source`, `endpoint`, `expect` ({greater: ARM, than: ARM} or {within: NUMBER, among: [ARM,
            ...]}), `where`. endpoints: of the study.

    Raises:
        ValueError: an unknown or missing key, an unknown endpoint, or expectations that are none.
    """
    says = mapping.get("says") if isinstance(mapping, Mapping) else None
    of = f"claim '{says}'" if says else "a claim"
    _check_keys(of, mapping, ("says", "source", "endpoint", "expect", "where"), needed=("says", "endpoint", "expect"))
    for key in ("says", "source", "endpoint"):
        if not isinstance(mapping.get(key, ""), str):
            raise ValueError(f"{of}: `{key}` must be a text, got {mapping[key]!r}")
    names = [endpoint.name for endpoint in endpoints]
    if mapping["endpoint"] not in names:
        raise ValueError(f"{of}: no endpoint is named '{mapping['endpoint']}'{nearest(mapping['endpoint'], names)}")
    expect = mapping["expect"]
    _check_keys(f"{of}: `expect`", expect, ("greater", "than", "within", "among"))
    if set(expect) not in ({"greater", "than"}, {"within"}, {"within", "among"}):
        raise ValueError(
            f"{of}: `expect` is {{greater: ARM, than: ARM}} or {{within: NUMBER}}, the latter with `among: [ARM, ...]` "
            f"or without; got the keys {', '.join(expect) or '(none)'}"
        )
    arms = [expect[key] for key in ("greater", "than") if key in expect]
    among = expect.get("among", [])
    if not isinstance(among, list) or ("among" in expect and len(among) < 2):
        raise ValueError(f"{of}: `among` must list two or more arms, got {among!r}")
    for arms_named in (arms, among):
        if any(isinstance(arm, (Mapping, list)) or arm is None for arm in arms_named):
            raise ValueError(f"{of}: an arm is named by a text, got {arms_named!r}")
        if len({str(arm) for arm in arms_named}) < len(arms_named):
            raise ValueError(f"{of} names an arm twice: {', '.join(map(str, arms_named))}")
    within = expect.get("within")
    if within is not None and (isinstance(within, bool) or not isinstance(within, (int, float)) or not within > 0):
        raise ValueError(f"{of}: `within` must be a number above 0, in units as shown, got {within!r}")
    where = mapping.get("where") or {}
    if not isinstance(where, Mapping) or any(isinstance(value, (Mapping, list)) for value in where.values()):
        raise ValueError(f"{of}: `where` must be a mapping from axes to one value each, got {where!r}")
    return Claim(
        says=mapping["says"],
        source=mapping.get("source", ""),
        endpoint=mapping["endpoint"],
        greater=str(arms[0]) if arms else None,
        than=str(arms[1]) if arms else None,
        within=None if within is None else float(within),
        among=tuple(map(str, among)),
        where={str(axis): str(value) for axis, value in where.items()},
    )


def _check_keys(of: str, mapping: Any, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{of} must be a mapping with {', '.join(needed or known)}; got {mapping!r}")
    for key in mapping:
        if key not in known:
            raise ValueError(f"{of} has an unknown key '{key}'{nearest(str(key), known)}")
    for key in needed:
        if mapping.get(key) is None:
            raise ValueError(f"{of} has no `{key}`, which it needs")


def measure(
    endpoint: Endpoint,
    runs: Sequence[RunAt],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    alpha: float = 0.05,
    pairing: Pairing = "auto",
) -> Comparison:
    """Read an endpoint from finished runs and compare the arms.

    Args:
        endpoint: what to read. runs: of its stage, with the subtracted ones where it has `minus`.
        pairs: labels of the arms to compare, which Holm's adjustment is over; all by default, none of one arm.
        alpha: level of the verdicts after Holm. pairing: as `compare`; where a run starts from is read from its folder.

    Raises:
        FileNotFoundError: a file that a run should have left; names the run's folder.
        ValueError: a file without the number asked for, or arms that cannot be compared.
    """
    labels = list(dict.fromkeys(run.label for run in runs))
    if pairs is None and len(labels) == 1:
        pairs = []
    seen: set[tuple[str, int | None]] = set()
    try:
        if not runs:
            raise ValueError(f"no run of stage '{endpoint.stage}' to measure")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
        for run in runs:
            if (run.label, run.seed) in seen:
                raise ValueError(f"arm '{run.label}', seed {run.seed} comes twice: {run.folder}")
            seen.add((run.label, run.seed))
            if endpoint.minus is not None and run.minus is None:
                raise ValueError(f"{run.folder} has no run of stage '{endpoint.minus}' to subtract")
        asked: dict[str, Any] = {"pairs": pairs, "alpha": alpha, "pairing": pairing, "higher": endpoint.higher}
        return (_per_problem if endpoint.per_problem else _per_run)(endpoint, runs, asked)
    except (ValueError, FileNotFoundError) as err:
        kind = FileNotFoundError if isinstance(err, FileNotFoundError) else ValueError
        raise kind(f"endpoint '{endpoint.name}': {err}") from None


def _per_problem(endpoint: Endpoint, runs: Sequence[RunAt], asked: dict[str, Any]) -> Comparison:
    def read(folder: Path) -> Any:
        return read_evaluation(evaluation_of(folder, endpoint.benchmark))

    found = [Run(run.label, run.seed, read(run.folder), run.minus and read(run.minus)) for run in runs]
    unit = None
    if endpoint.unit is not None or endpoint.scale != 1:
        scores = [score for run in found for draws in run.evaluation.scores.values() for score in draws]
        unit = Unit.of(endpoint.unit or "", endpoint.scale, scores)
    return compare(found, metric=endpoint.metric, unit=unit, flags=False, **asked)


def _per_run(endpoint: Endpoint, runs: Sequence[RunAt], asked: dict[str, Any]) -> Comparison:
    values: dict[str, dict[int | None, float]] = {}
    starts: dict[str, dict[int | None, str | None]] = {}
    files: dict[str, dict[int | None, Path]] = {}
    read: list[float] = []
    for run in runs:
        value, file = _number(endpoint, run.folder)
        read.append(value)
        if run.minus is not None:
            read.append(_number(endpoint, run.minus)[0])
            value -= read[-1]
        values.setdefault(run.label, {})[run.seed] = value
        starts.setdefault(run.label, {})[run.seed] = start_of(run.folder, file)
        files.setdefault(run.label, {})[run.seed] = file
    unit = Unit.of(endpoint.unit or "", endpoint.scale, read)
    of_evaluation = endpoint.curve is None and endpoint.file is None
    if of_evaluation and endpoint.unit is None and endpoint.scale == 1 and all(0 <= value <= 1 for value in read):
        unit = Unit.changes if endpoint.minus else Unit.points  # shares of examples, as `compare` shows them
    return compare_values(values, starts, metric=endpoint.measures, unit=unit, files=files, **asked)


def _number(endpoint: Endpoint, folder: Path) -> tuple[float, Path]:
    """The one number of a run, and the file it is from."""
    if endpoint.curve is not None:
        return curve_at(folder, endpoint.curve, endpoint.at)
    if endpoint.file is not None and endpoint.key is not None:
        return number_of(folder / endpoint.file, endpoint.key), folder / endpoint.file
    return score_of(evaluation_of(folder, endpoint.benchmark), endpoint.metric)


def evaluation_of(folder: Path, benchmark: str | None = None) -> Path:
    """The per-example file of a run's last evaluation.

    Args:
        folder: of the run. benchmark: which; None for the only one.

    Raises:
        FileNotFoundError: the run was not evaluated, or not on this benchmark.
        ValueError: several benchmarks and none named.
    """
    found = last_evaluations(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no evaluation (evaluations/BENCHMARK/step-N); has the stage evaluated?")
    if benchmark is None:
        if len(found) > 1:
            raise ValueError(f"{folder} was evaluated on several benchmarks; name one of {', '.join(found)}")
        return next(iter(found.values()))
    if benchmark not in found:
        raise FileNotFoundError(f"{folder} was not evaluated on '{benchmark}'{nearest(benchmark, found)}")
    return found[benchmark]
