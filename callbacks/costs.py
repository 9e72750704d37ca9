"""What a run has cost so far, for people who watch it and for studies that compare what arms have spent."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

COSTS_FILE = "costs.json"
INTERVAL = 2.0  # seconds between writes


class Costs(Callback):
    """Writes run_dir/costs.json every few seconds and at the end; part of every run.

    `steps` of `max_steps`, `tokens` (that the loss saw, all ranks), `samples` (rows the loss saw), `seconds` and
    `cpu_seconds` (of this process, data workers left out), `peak_gib` (device memory, or resident memory on the CPU),
    and the last values of loss, entropy, reward and validation. A resumed run goes on counting.

    Args:
        tokens: stop training once the loss has seen so many; 0 sets no limit. Schedules still follow max_steps.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, *, tokens: int = 0) -> None:
        if tokens < 0:
            raise ValueError(f"Costs: tokens must be 0 (no limit) or positive, got {tokens}")
        self.limit = tokens
        self.spent = {"tokens": 0.0, "samples": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}
        self._since = (0.0, 0.0)
        self._written = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was spent up to the checkpoint."""
        return dict(self._now())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.spent = dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clocks."""
        self._since = (time.monotonic(), time.process_time())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's steps; stop where the limit is reached."""
        seen = getattr(pl_module, "seen", {})  # a module of the user's own may not count
        for name in ("tokens", "samples"):
            self.spent[name] += seen.pop(name, 0.0)
        if self.limit and self.spent["tokens"] >= self.limit:
            trainer.should_stop = True
        if time.monotonic() - self._written > INTERVAL:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The final figures."""
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The final figures."""
        self._write(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The final figures."""
        self._write(trainer, pl_module)

    def _now(self) -> dict[str, float]:
        since, cpu = self._since
        return self.spent | {
            "seconds": self.spent["seconds"] + time.monotonic() - since,
            "cpu_seconds": self.spent["cpu_seconds"] + time.process_time() - cpu,
        }

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._written = time.monotonic()
        wanted = ("train/loss", "train/entropy", "train/reward")
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k in wanted or k.startswith("val/")}
        content = {
            "steps": getattr(pl_module, "clock", 0),
            "max_steps": trainer.max_steps if trainer.state.fn == "fit" and trainer.max_steps > 0 else None,
            **self._now(),
            "peak_gib": _peak_gib(pl_module),
            "metrics": metrics,
        }
        path = Path(trainer.default_root_dir) / COSTS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content) + "\n")
        os.replace(temporary, path)


def _peak_gib(pl_module: LightningModule) -> float:
    from lightning_vlm.algorithms.totals import peak_memory

    return peak_memory(pl_module.device)
