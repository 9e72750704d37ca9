"""Progress of a run on the terminal: a bar with loss, tokens per second and time left; plain lines elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from callbacks._clock import crossed

SMOOTHING = 0.9  # of the shown speed, over batches


class Progress(ProgressBar):
    """Shows optimizer steps done, loss, tokens per second (through the model, padding included) and time left.

    The metrics of each validation are printed as it ends.

    Args:
        every: optimizer steps between lines where output is not a terminal.
    """

    def __init__(self, *, every: int = 10) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"Progress: every must be at least 1, got {every}")
        self.every = every
        self._enabled = True
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._total: int | None = None
        self._start = (0.0, 0)
        self._batch_start = 0.0
        self._speed: float | None = None

    def enable(self) -> None:
        """Show (Lightning switches this off on all ranks but the first)."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.console.print(*args)
        elif self._enabled:
            print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the bar on a terminal."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()
        console = Console()
        if self._enabled and console.is_terminal and self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console
            )
            self._bar.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error is not drawn over."""
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find how many optimizer steps there will be."""
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._total = int(steps) if steps != float("inf") else None
        self._start = (time.monotonic(), pl_module.clock)
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=self._total, completed=pl_module.clock, note="")

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the batch's time."""
        self._batch_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        clock = pl_module.clock
        if "train/padded_tokens" in trainer.callback_metrics:
            tokens = float(trainer.callback_metrics["train/padded_tokens"]) * (clock - pl_module.clock_before)
            speed = tokens / max(time.monotonic() - self._batch_start, 1e-9)
            self._speed = speed if self._speed is None else SMOOTHING * self._speed + (1 - SMOOTHING) * speed
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=clock, note=self._note(trainer))
        elif self._enabled and (crossed(pl_module.clock_before, clock, self.every) or clock == self._total):
            left = "" if self._total is None else f"/{self._total}  left {self._left(clock)}"
            print(f"step {clock}{left}  {self._note(trainer)}", file=sys.stdout, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the evaluation's line."""
        self._open_evaluation("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the evaluation's line."""
        self._open_evaluation("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the evaluation's line."""
        self._open_evaluation("prediction", trainer.num_predict_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch further."""
        self._advance()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch further."""
        self._advance()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch further."""
        self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the evaluation's line; in training, say what came out (Lightning prints a table otherwise)."""
        self._close_evaluation()
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking and pl_module.fresh_metrics:
            names = sorted(name for name in pl_module.fresh_metrics if "_since_" not in name)
            metrics = {name: float(trainer.callback_metrics[name]) for name in names}
            self.print(f"step {pl_module.clock}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    def on_test_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the evaluation's line."""
        self._close_evaluation()

    def on_predict_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the evaluation's line."""
        self._close_evaluation()

    def _note(self, trainer: Trainer) -> str:
        metrics: dict[str, Any] = {}
        if "train/loss" in trainer.callback_metrics:
            metrics["loss"] = float(trainer.callback_metrics["train/loss"])
        if self._speed is not None:
            metrics["tokens/s"] = self._speed
        metrics |= {k: v for k, v in trainer.progress_bar_metrics.items() if k != "train/loss"}
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())

    def _left(self, clock: int) -> str:
        since, first = self._start
        if clock <= first or self._total is None:
            return "?"
        seconds = (time.monotonic() - since) / (clock - first) * (self._total - clock)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _open_evaluation(self, name: str, batches: int | float | list[int | float]) -> None:
        if self._bar is not None:
            total = sum(batches) if isinstance(batches, list) else batches
            self._evaluation = self._bar.add_task(name, total=total if total != float("inf") else None, note="")

    def _advance(self) -> None:
        if self._bar is not None and self._evaluation is not None:
            self._bar.advance(self._evaluation)

    def _close_evaluation(self) -> None:
        if self._bar is not None and self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = self._evaluation = None
