"""Watches the entropy of the policy."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors

from callbacks._clock import crossed
from lightning_vlm.metrics.entropy import entropy_summary


class EntropyMonitor(Callback):
    """Logs mean and quantiles of the exact token entropies of a step, and raises an alarm when they collapse.

    The entropies are those the step itself computed on its scored tokens (nats, full distribution, all ranks); the
    model is not run again. Logged: `train/entropy_mean`, `train/entropy_p05` … `p95`.

    Args:
        every: optimizer steps between looks.
        floor: mean entropy in nats below which the policy counts as collapsed; 0 watches without alarm.
        patience: looks in a row below the floor before the alarm.
        action: at the alarm `stop` ends the run (the last checkpoint is saved), `warn` says so once and goes on.

    Raises:
        ValueError: a number out of range, or an unknown action.
    """

    def __init__(
        self, *, every: int = 10, floor: float = 0.0, patience: int = 3, action: Literal["stop", "warn"] = "warn"
    ) -> None:
        if every < 1 or patience < 1:
            raise ValueError(f"EntropyMonitor: every and patience must be at least 1, got {every}, {patience}")
        if floor < 0:
            raise ValueError(f"EntropyMonitor: floor must be 0 (off) or positive nats, got {floor}")
        if action not in ("stop", "warn"):
            raise ValueError(f"EntropyMonitor: action is {action!r}; choose stop or warn")
        self.every, self.floor, self.patience, self.action = every, floor, patience, action
        self.below = 0
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        """Looks below the floor so far, so that a resumed run goes on counting."""
        return {"below": self.below, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.below, self.warned = state_dict["below"], state_dict["warned"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and count looks below the floor."""
        if not crossed(pl_module.clock_before, pl_module.clock, self.every):
            return
        entropies = _over_ranks(pl_module.last_step["entropies"].detach().float().flatten())
        if entropies.numel() == 0:  # a step in which nothing was scored
            return
        summary = entropy_summary(entropies)
        pl_module.log_dict({f"train/entropy_{name}": value for name, value in summary.items()}, batch_size=1)
        self._watch(trainer, pl_module.clock, summary["mean"])

    def _watch(self, trainer: Trainer, step: int, mean: float) -> None:
        self.below = self.below + 1 if mean < self.floor else 0
        if self.below < self.patience or (self.action == "warn" and self.warned):
            return
        verdict = "stopping" if self.action == "stop" else "going on"
        rank_zero_warn(
            f"entropy collapse at optimizer step {step}: mean token entropy {mean:.4f} nats, below the floor of "
            f"{self.floor} for {self.below} looks in a row; {verdict}. Lower model.lr or train fewer steps; "
            "EntropyMonitor.floor, patience and action set this alarm"
        )
        self.warned = True
        if self.action == "stop":
            trainer.should_stop = True


def _over_ranks(values: torch.Tensor) -> torch.Tensor:
    """[N] of every rank joined; N may differ."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    return torch.cat(gather_all_tensors(values))
