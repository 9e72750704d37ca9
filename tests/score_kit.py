"""What the tests of `lightning-vlm score` share."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_vlm.cli.main import main


def score(*words: str, out: Path) -> tuple[dict, list[dict]]:
    """`scores.json` and `per_example.jsonl` of a command that must succeed."""
    assert main(["score", *map(str, words), "--out", str(out)]) == 0
    lines = (out / "per_example.jsonl").read_text().splitlines()
    return json.loads((out / "scores.json").read_text()), [json.loads(line) for line in lines]


def answers(*rows: tuple) -> list[dict]:
    """Rows of `id, output, gold` from (output, gold)."""
    return [{"id": str(n), "output": output, "gold": gold} for n, (output, gold) in enumerate(rows)]
