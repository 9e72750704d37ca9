"""Writes predictions as JSONL: one file, the same whatever the number of processes, there only when complete."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Collects what `predict_step` returns, a list of records, and writes them sorted by id and sample.

    Each rank appends its lines to a file of its own as they come (what a broken run had done can be read there); at the
    end rank 0 joins them, drops copies a sampler made to give all ranks equally much, and renames the result.

    Args:
        out: the JSONL to write.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._count = 0

    def _part(self, rank: int) -> Path:
        return self.out.with_name(f"{self.out.name}.part{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start this rank's file."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[dict[str, Any]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch's records, whole lines in one write."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in outputs or [])
        with self._part(trainer.global_rank).open("a", encoding="utf-8") as stream:
            stream.write(lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks' files."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        records = {(str(r["id"]), r.get("sample", 0)): r for part in parts for r in _records(part)}
        temporary = self.out.with_name(self.out.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            for key in sorted(records, key=lambda k: (_natural(k[0]), k[1])):
                stream.write(json.dumps(records[key], ensure_ascii=False) + "\n")
        os.replace(temporary, self.out)
        for part in parts:
            part.unlink()
        print(f"predictions: {self.out} ({len(records)})", flush=True)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which `item-10` comes after `item-9`."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]
