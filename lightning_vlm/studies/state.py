"""What is on the disk of a run: done, interrupted, failed, or made from inputs that have changed since."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from lightning_vlm.studies.record import RECORD, is_locked, is_there, model_hash, read_json, write_json
from lightning_vlm.studies.runs import Run

REPLACED = "replaced"  # beside the runs: what was made from inputs that have changed since
State = Literal["done", "running", "interrupted", "failed", "changed", "waiting"]


def state_of(run: Run) -> State:
    """What there is of a run; `waiting` where there is nothing."""
    record = read_json(run.folder / RECORD)
    if not record:
        return "waiting"
    if record.get("fingerprint") != run.fingerprint:
        return "changed"
    if record.get("state") == "done":
        return "done" if is_there(run.folder, run.output) else "interrupted"
    if record.get("state") == "failed":
        return "failed"
    return "running" if is_locked(run.folder) else "interrupted"


def prepare(run: Run) -> bool:
    """Make a run's folder ready for a start; whether the command is to go on where it stood.

    What was made from other inputs is put aside, and what was put aside earlier for these inputs is taken back.
    """
    record = read_json(run.folder / RECORD)
    if record and record.get("fingerprint") != run.fingerprint:
        aside = _aside(run, record.get("fingerprint", "unknown"))
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        run.folder.rename(aside)
    if not run.folder.exists() and (back := _aside(run, run.fingerprint)).exists():
        back.rename(run.folder)
        if state_of(run) == "done":
            return False
    if run.folder.exists() and run.command != "fit":
        shutil.rmtree(run.folder)  # half of what the command writes in minutes, and would refuse to write over
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, content in run.writes.items():
        file = run.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    return run.command == "fit" and (run.folder / "config.yaml").exists()


def _aside(run: Run, fingerprint: str) -> Path:
    return run.folder.parent / REPLACED / f"{run.folder.name}-{fingerprint}"


def start_record(run: Run, words: list[str]) -> dict[str, Any]:
    """Write and return the record of a run that starts; what earlier attempts cost is kept."""
    before = read_json(run.folder / RECORD)
    record = {
        "name": run.name,
        "stage": run.stage,
        "at": run.at,
        "fingerprint": run.fingerprint,
        "state": "running",
        "words": words,
        "threads": run.threads,
        "processes": run.processes,
        "started": before.get("started") or time.time(),
        "attempts": before.get("attempts", 0) + 1,
        "seconds": before.get("seconds", 0.0),
        "cpu_seconds": before.get("cpu_seconds", 0.0),
        "peak_gib": before.get("peak_gib", 0.0),
        "inputs": {
            use.key or "checkpoint": {
                "instance": use.run.name,
                "path": str(use.path),
                "fingerprint": use.run.fingerprint,
                "hash": model_hash(use.path),
            }
            for use in run.uses
        },
    }
    write_json(run.folder / RECORD, record)
    return record
