"""Stops when a task metric stops improving."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks._monitor import refuse_unknown


class TaskEarlyStopping(Callback):
    """Ends the run when a benchmark's metric has not improved for some of its own evaluations.

    Benchmarks have intervals of their own, so a validation need not evaluate the one that is watched; only validations
    that did count.

    Args:
        monitor: metric to watch, for example `val/world/accuracy`.
        patience: evaluations in a row without improvement before the run ends.
        min_delta: smallest change that counts as improvement, in units of the metric.
        mode: whether more (`max`) or less (`min`) is better.

    Raises:
        ValueError: a number out of range, an unknown mode, a `monitor` that nothing logs, or one that is not finite.
    """

    def __init__(
        self, *, monitor: str, patience: int = 3, min_delta: float = 0.0, mode: Literal["max", "min"] = "max"
    ) -> None:
        if patience < 1:
            raise ValueError(f"TaskEarlyStopping: patience must be at least 1, got {patience}")
        if min_delta < 0:
            raise ValueError(f"TaskEarlyStopping: min_delta cannot be negative, got {min_delta}")
        if mode not in ("max", "min"):
            raise ValueError(f"TaskEarlyStopping: mode is {mode!r}; choose max or min")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, mode
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """Best value, its step, and evaluations since."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.waited = state_dict["waited"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a monitor that nothing will log, before anything is trained."""
        refuse_unknown("TaskEarlyStopping", self.monitor, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at a fresh value."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in pl_module.fresh_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if not math.isfinite(value):
            raise ValueError(f"TaskEarlyStopping: monitor {self.monitor!r} is {value} at step {pl_module.clock}")
        if self._improved(value):
            self.best, self.best_step, self.waited = value, pl_module.clock, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.should_stop = True
            rank_zero_info(
                f"stopping at optimizer step {pl_module.clock}: {self.monitor} has not improved on "
                f"{self.best:.4g} (step {self.best_step}) for {self.waited} evaluations; "
                "TaskEarlyStopping.patience and min_delta set this"
            )

    def _improved(self, value: float) -> bool:
        if self.best is None:
            return True
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > self.min_delta
