"""Per-example files and run folders for `lightning-vlm compare`, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_vlm.cli.main import main


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """Paths in tests and in errors are short: the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVLM_TRACEBACK", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


def write(path, scores, *, prefix="q", conditions=None, **fields) -> str:
    """A per-example file: one score per problem, or a list of draws; `conditions` goes beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, score in enumerate(scores):
        for draw, value in enumerate(score if isinstance(score, list) else [score]):
            lines.append(json.dumps({"id": f"{prefix}{index}", "sample": draw, "score": value, **fields}) + "\n")
    path.write_text("".join(lines))
    if conditions is not None:
        (path.parent / "conditions.json").write_text(json.dumps(conditions))
    return str(path)


def run(name, scores, *, arm=None, seed=None, start=None, benchmark="geo", step=100, **more) -> str:
    """A run folder with one evaluation."""
    start = None if start is None else {"path": "somewhere", "hash": start}
    conditions = {
        "benchmark": benchmark,
        "rule": "geo/exact",
        "prompt_id": "geo/plain",
        "sampling": {"temperature": 0.0, "max_new_tokens": 64},
        "n": 1,
        "provenance": {"arm": arm, "seed": seed, "start": start, "step": step, "model": None},
    } | more
    write(f"{name}/evaluations/{benchmark}/step-{step:08d}/per_example.jsonl", scores, conditions=conditions)
    return name


def share(right: int, n: int = 20) -> list[float]:
    """n scores, `right` of them 1."""
    return [1.0] * right + [0.0] * (n - right)


def compared(capsys, *argv) -> tuple[dict, str]:
    """What a comparison writes as JSON, and what it prints with all whitespace as one blank."""
    assert main(["compare", *argv, "--out", "out.json"]) == 0, capsys.readouterr().err
    return json.loads(Path("out.json").read_text()), " ".join(capsys.readouterr().out.split())


def refused(capsys, *argv) -> str:
    """The one line of a comparison that must not be made."""
    assert main(["compare", *argv]) == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("\n") == 1 and done.err.startswith("error: ")
    assert "(from " not in done.err  # said by this package, not by a library
    return done.err
