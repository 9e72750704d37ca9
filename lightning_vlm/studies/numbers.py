"""Numbers in a run's folder: points of a curve, entries of JSON files, and what the run started from."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_vlm.benchmarks.report import CONDITIONS, SCORES
from lightning_vlm.config.tree import nearest

METRICS = "metrics.csv"


def read_curve(folder: Path, metric: str) -> dict[int, float]:
    """A logged metric over the steps of a run.

    A run that was interrupted and resumed has several files, csv/metrics.csv, csv-2/metrics.csv and so on. They are
    joined by step; what a later file says of a step stands.

    Args:
        folder: of the run. metric: name of the column.

    Returns:
        step → value, in order of step; NaN where that was logged.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file has the metric, or a cell is no number.
    """
    files = sorted(folder.glob(f"csv*/{METRICS}"), key=_turn)
    if not files:
        raise FileNotFoundError(f"{folder} has no csv/{METRICS}; log to CSV (config: [logger/csv])")
    values: dict[int, float] = {}
    known: set[str] = set()
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream)
            known |= {name for name in rows.fieldnames or () if name not in ("step", "epoch")}
            for row in rows:
                cell = row.get(metric)
                if not cell:
                    continue
                try:
                    values[int(row["step"])] = float(cell)
                except (TypeError, ValueError, KeyError):
                    raise ValueError(f"{file}:{rows.line_num}: no number of a step for '{metric}': {cell!r}") from None
    if not values:
        logged = "is there, but empty" if metric in known else f"is not there{nearest(metric, known)}"
        raise ValueError(f"{folder} logged no metric '{metric}': its column {logged}")
    return dict(sorted(values.items()))


def _turn(file: Path) -> tuple[int, str]:
    """csv first, then csv-1, csv-2, ..., csv-10."""
    number = re.fullmatch(r"csv-(\d+)", file.parent.name)
    return int(number[1]) if number else -1, file.parent.name


def curve_at(folder: Path, metric: str, at: str) -> tuple[float, Path]:
    """Where a curve starts or ends: the mean of the first or last tenth of the logged values, at least of one.

    Args:
        folder: of the run. metric: name of the column. at: start or end.

    Returns:
        The number, and the last file that it may be from.

    Raises:
        FileNotFoundError, ValueError: as `read_curve`; values there that are not finite.
    """
    curve = list(read_curve(folder, metric).items())
    count = max(1, len(curve) // 10)
    part = curve[:count] if at == "start" else curve[-count:]
    for step, value in part:
        if not math.isfinite(value):
            raise ValueError(f"{folder} logged {value} for '{metric}' at step {step}: no number to compare")
    return fmean(value for _, value in part), max(folder.glob(f"csv*/{METRICS}"), key=_turn)


def score_of(per_example: Path, metric: str) -> tuple[float, Path]:
    """A number of the `scores.json` beside a per-example file, and that file.

    Raises:
        FileNotFoundError: no such file. ValueError: no such metric; names those there are.
    """
    file = per_example.parent / SCORES
    scores = {name: value for name, value in _read(file).items() if _is_number(value)}
    if metric not in scores:
        names = ", ".join(["score and pass@K (per example)", *sorted(scores.keys() - {"n"})])
        close = nearest(metric, scores)
        raise ValueError(f"{file} has no '{metric}'{close if 'did you mean' in close else ''}; it has {names}")
    return _finite(scores[metric], file, metric), file


def number_of(file: Path, key: str) -> float:
    """A number in a JSON file.

    Args:
        file: its path. key: names joined by dots; a name may itself have dots, a whole number counts into a list.

    Raises:
        FileNotFoundError: no such file. ValueError: no such key, or no number there.
    """
    value: Any = _read(file)
    parts, done = key.split("."), 0
    while done < len(parts):
        ends = range(len(parts), done, -1) if isinstance(value, Mapping) else [done + 1]
        for end in ends:
            name = ".".join(parts[done:end])
            if isinstance(value, Mapping) and name in value:
                value, done = value[name], end
                break
            if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
                value, done = value[int(name)], end
                break
        else:
            within = f" within '{'.'.join(parts[:done])}'" if done else ""
            there = nearest(parts[done], value) if isinstance(value, Mapping) else f"; it is {_shown(value)}"
            raise ValueError(f"{file} has no '{'.'.join(parts[done:])}'{within}{there}")
    if not _is_number(value):
        raise ValueError(f"{file}: '{key}' is {_shown(value)}, not a number")
    return _finite(value, file, key)


def start_of(folder: Path, file: Path) -> str | None:
    """What identifies the model that a run's training started from; None where nothing tells.

    Args:
        folder: of the run; its `stage.json` has the fingerprint of the model it was given. file: the number is from;
            the `conditions.json` beside an evaluation knows what the evaluated model was trained from.
    """
    if file.name == SCORES:
        conditions = file.parent / CONDITIONS
        provenance = (_read(conditions).get("provenance") if conditions.is_file() else None) or {}
        return (provenance.get("start") or {}).get("hash")
    record = folder / "stage.json"
    inputs = (_read(record).get("inputs") if record.is_file() else None) or {}
    return (inputs.get("backbone.path") or {}).get("fingerprint")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; has the stage written it?")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{file} is not JSON ({err})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {_shown(content)}")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float, file: Path, key: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{file}: '{key}' is {value}; only finite numbers compare")
    return float(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
