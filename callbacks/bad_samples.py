"""Reports the samples that a run leaves out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger

from lightning_vlm.strategies.sync import world_size

FILE = "bad_samples.jsonl"
PATIENCE = 256  # samples without a single one that can be used: then the data or a setting is wrong
Skipped = tuple[str, str, str]  # id, reason, detail


class BadSamples(Callback):
    """Writes down every sample that `data.on_bad_sample: skip` leaves out of training; part of every run.

    To run_dir/bad_samples.jsonl (under MLflow also an artifact), once per sample: `step` (optimizer steps done), `id`,
    `reason`, `detail`. Logged: how many of a step by reason, `train/skipped_<reason>`. The first of each reason is
    printed when it comes, and how many there were at the end.

    Raises:
        ValueError: none of the first 256 samples, or of a whole pass over fewer, can be used.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}  # id → reason
        self.drawn = self.used = 0

    def state_dict(self) -> dict[str, Any]:
        """What was left out so far, so that a resumed run does not report it again."""
        return {"reasons": dict(self.reasons), "drawn": self.drawn, "used": self.used}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.reasons = dict(state_dict["reasons"])
        self.drawn, self.used = state_dict["drawn"], state_dict["used"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what was written after the checkpoint that this run goes on from."""
        file = self._file(trainer)
        if trainer.is_global_zero and file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if _id(line) in self.reasons]
            file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report this batch's."""
        if getattr(trainer.datamodule, "on_bad_sample", "error") != "skip":
            return
        skipped, used = _over_ranks(batch.skipped, len(batch.samples))
        self.drawn, self.used = self.drawn + len(skipped) + used, self.used + used
        counts = Counter(reason for _, reason, _ in skipped)
        for reason in sorted({*counts, *self.reasons.values()}):
            pl_module.log(f"train/skipped_{reason}", float(counts[reason]), batch_size=1)
        self._report(trainer, pl_module.clock, skipped)
        if not self.used and self.drawn >= min(PATIENCE, len(trainer.datamodule.train_samples)):
            raise ValueError(f"data.train has nothing to learn from: left out {self._summary(trainer)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many were left out."""
        if not self.reasons:
            return
        trainer.print(f"left out {self._summary(trainer)}")
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(self._file(trainer)))

    def _report(self, trainer: Trainer, step: int, skipped: list[Skipped]) -> None:
        lines = []
        for id, reason, detail in skipped:
            if id in self.reasons:
                continue
            if reason not in self.reasons.values():
                trainer.print(f"left out sample {id}: {detail} (the first {reason}; all are in {self._file(trainer)})")
            self.reasons[id] = reason
            record = {"step": step, "id": id, "reason": reason, "detail": detail}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        if lines and trainer.is_global_zero:
            self._file(trainer).parent.mkdir(parents=True, exist_ok=True)
            with self._file(trainer).open("a", encoding="utf-8") as stream:
                stream.write("".join(lines))

    def _summary(self, trainer: Trainer) -> str:
        by_reason = ", ".join(f"{count} {reason}" for reason, count in Counter(self.reasons.values()).most_common())
        return f"{len(self.reasons)} samples ({by_reason}); which and why is in {self._file(trainer)}"

    def _file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FILE


def _id(line: str) -> str | None:
    """The sample a line is about; None for a line that was cut off."""
    try:
        return json.loads(line)["id"]
    except ValueError:
        return None


def _over_ranks(skipped: list[Skipped], used: int) -> tuple[list[Skipped], int]:
    """All ranks' skipped samples, and how many samples were used."""
    if world_size() == 1:
        return skipped, used
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, (skipped, used))
    return [entry for entries, _ in parts for entry in entries], sum(count for _, count in parts)
