"""`stage.json`, what a study writes down of each run, and the lock of the folder it lies in."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

RECORD, COSTS, LOCK = "stage.json", "costs.json", ".lock"


def read_json(path: Path) -> dict[str, Any]:
    """The content; empty where there is no such file, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written under another name and renamed, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def is_locked(folder: Path) -> bool:
    """Whether a process works in this folder."""
    try:
        with (folder / LOCK).open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_there(folder: Path, output: str | None) -> bool:
    """Whether what a command makes for others is in its folder; training may leave an adapter in place of a model."""
    return output is None or (folder / output).exists() or (folder / "adapter").exists()


def finish_record(folder: Path, code: int, output: str | None, costs: tuple[float, float, float]) -> None:
    """Write down how a run ended; an exit code of 0 without what was to be made is a failure.

    Args:
        folder: of the run. code: its exit code. output: what it must have made.
        costs: seconds and CPU seconds to add, peak memory in GiB.
    """
    if not (record := read_json(folder / RECORD)):
        return  # no run of a study, but something it asks by the way
    whole = code == 0 and is_there(folder, output)
    record |= {"state": "done" if whole else "failed", "exit": code, "ended": time.time()}
    record["seconds"] = record.get("seconds", 0.0) + costs[0]
    record["cpu_seconds"] = record.get("cpu_seconds", 0.0) + costs[1]
    record["peak_gib"] = max(record.get("peak_gib", 0.0), costs[2])
    if whole and output is not None:
        record["outputs"] = {output: model_hash(folder / output)}
    if (folder / "mlflow_run_id").is_file():
        record["mlflow_run_id"] = (folder / "mlflow_run_id").read_text().strip()
    write_json(folder / RECORD, record)


def model_hash(directory: Path) -> str | None:
    """Of a model directory, as its provenance has it; None for anything else."""
    return read_json(directory / "provenance.json").get("hash")
