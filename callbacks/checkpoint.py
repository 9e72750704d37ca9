"""Checkpoints that are whole or absent, on the clock of optimizer steps; and the model directory at the end."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase
from torch.distributed.checkpoint import CheckpointException

from callbacks._clock import crossed
from callbacks._monitor import refuse_unknown
from lightning_vlm.export import export_adapter, export_checkpoint, make_provenance, save_model_directory
from lightning_vlm.export.directory import replace_directory, save_adapter_directory
from lightning_vlm.models.adapters import trained_tensors

FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d+)\.ckpt")


def last_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint to resume from in `run_dir`, or None."""
    found = [(int(m[1]), p) for p in Path(run_dir, FOLDER).glob("step-*.ckpt") if (m := _STEP.fullmatch(p.name))]
    return max(found)[1] if found else None


class Checkpoint(CheckpointBase):
    """Saves run_dir/checkpoints/step-N.ckpt every so many optimizer steps and at the end, best-N.ckpt by a metric.

    A checkpoint is written under a temporary name and renamed when complete; only then older ones go. A full disk stops
    the run with an error, and the previous checkpoint stays.

    Args:
        every: optimizer steps between checkpoints, counted when a multiple is crossed; 0 saves at the end only.
        keep: how many of the newest stay; 0 keeps all.
        monitor: logged metric the best checkpoint is chosen by, for example `val/world/accuracy`; None keeps no best.
        mode: whether more (`max`) or less (`min`) of it is better.

    Raises:
        ValueError: a negative number, or a `monitor` that nothing logs.
        OSError: the checkpoint could not be written.
    """

    def __init__(
        self,
        *,
        every: int = 0,
        keep: int = 1,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if every < 0 or keep < 0:
            raise ValueError(f"Checkpoint: every and keep cannot be negative, got every={every}, keep={keep}")
        self.every, self.keep, self.monitor, self.mode = every, keep, monitor, mode
        self.best_score: float | None = None
        self.best_path: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Best so far, so that a resumed run does not forget it."""
        return {"best_score": self.best_score, "best_path": self.best_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.best_score, self.best_path = state_dict["best_score"], state_dict["best_path"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a monitor that nothing will log, before anything is trained."""
        if self.monitor is not None:
            refuse_unknown("Checkpoint", self.monitor, trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the clock crossed a multiple of `every` in this batch."""
        if crossed(pl_module.clock_before, pl_module.clock, self.every):
            self._save_step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best when the monitored metric got better."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in pl_module.fresh_metrics:
            return
        score = float(trainer.callback_metrics[self.monitor])
        better = self.best_score is None or (score > self.best_score if self.mode == "max" else score < self.best_score)
        if better:
            previous = self.best_path
            path = self._folder(trainer) / f"best-{pl_module.clock:08d}.ckpt"
            # The state of this callback is part of the checkpoint: it must say what this file is.
            self.best_score, self.best_path = score, str(path)
            self._write(trainer, path)
            if previous and previous != str(path):
                self._remove(trainer, Path(previous))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state."""
        self._save_step(trainer, pl_module)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER

    def _save_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._folder(trainer) / f"step-{pl_module.clock:08d}.ckpt"
        if trainer.strategy.broadcast(path.exists()):
            return
        self._write(trainer, path)
        steps = sorted(p for p in path.parent.glob("step-*.ckpt") if _STEP.fullmatch(p.name))
        for old in steps[: -self.keep] if self.keep else []:
            self._remove(trainer, old)

    def _write(self, trainer: Trainer, path: Path) -> None:
        """Write all ranks' state to a temporary name, then rename."""
        temporary = path.with_name(f".{path.name}.tmp")
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            _delete(temporary)
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(temporary, weights_only=False)
        except (OSError, CheckpointException) as err:
            self._remove(trainer, temporary)
            free = shutil.disk_usage(path.parent).free / 2**30
            by_way = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
            last = last_checkpoint(trainer.default_root_dir)
            kept = f"the previous checkpoint {last} is whole" if last else "there is no earlier checkpoint"
            raise OSError(
                f"could not write checkpoint {path}: {_first_failure(err)} ({free:.1f} GiB free there, {by_way:.1f} in "
                f"{tempfile.gettempdir()}); {kept}; free some space and go on with "
                f"--run_dir {trainer.default_root_dir} --resume"
            ) from err
        if trainer.is_global_zero:
            if temporary.is_dir():
                replace_directory(temporary, path)
            else:
                os.replace(temporary, path)
        trainer.strategy.barrier()

    def _remove(self, trainer: Trainer, path: Path) -> None:
        if trainer.is_global_zero:
            _delete(path)


class SaveModel(Callback):
    """Writes run_dir/model, a Hugging Face model directory, at the end of training; or run_dir/adapter.

    Args:
        form: `model`, or `adapter`: only what was trained beside frozen weights (projector, LoRA), which
            `backbone.adapter` starts from. Of a large frozen model that is a thousandth of the disk.
        source: `last`, the weights training ended with, or `best`, those of the best checkpoint.
        dtype: of the written weights; as trained by default.

    Attributes:
        saved: the directory, once written.

    Raises:
        ValueError: `best` without a Checkpoint that monitors a metric.
    """

    def __init__(
        self,
        *,
        form: Literal["model", "adapter"] = "model",
        source: Literal["last", "best"] = "last",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        self.form, self.source, self.dtype = form, source, None if dtype is None else getattr(torch, dtype)
        self.saved: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse `best` when no best is kept, before training and not after."""
        if stage == "fit" and self.source == "best" and not any(c.monitor for c in _checkpoints(trainer)):
            raise ValueError("SaveModel: source 'best' needs callbacks.Checkpoint.monitor to name a metric")
        quantize = getattr(getattr(pl_module, "backbone", None), "quantize", None)
        if stage == "fit" and self.form == "model" and quantize:
            raise ValueError(
                f"SaveModel: weights of backbone.quantize {quantize} are not those of the model directory: set "
                "callbacks.SaveModel.form to adapter"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an adapter where other parts train, before training and not after."""
        if self.form == "adapter":
            trained_tensors(pl_module.policy)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model directory; after `on_train_end`, in which the last checkpoint is made safe."""
        out = Path(trainer.default_root_dir) / self.form
        best = next((c.best_path for c in _checkpoints(trainer) if c.best_path), None)
        if self.source == "best":
            if best is None:
                raise ValueError(f"SaveModel: no best checkpoint: validation never ran in {pl_module.clock} steps")
            if trainer.is_global_zero:
                (export_adapter if self.form == "adapter" else export_checkpoint)(best, out, dtype=self.dtype)
        else:
            config = Path(trainer.default_root_dir) / "config.yaml"
            more = {"adapter": pl_module.backbone.adapter} if pl_module.backbone.adapter else {}
            provenance = make_provenance(pl_module.backbone.path, step=pl_module.clock, config_file=config, **more)
            policy = pl_module.policy
            if self.form == "adapter":
                save_adapter_directory(policy, pl_module.parts, out, provenance, dtype=self.dtype)
            else:
                save_model_directory(policy, pl_module.processor, out, provenance, dtype=self.dtype)
        trainer.strategy.barrier()
        self.saved = out


def _checkpoints(trainer: Trainer) -> list[Checkpoint]:
    return [c for c in trainer.callbacks if isinstance(c, Checkpoint)]


def _first_failure(err: BaseException) -> BaseException:
    """What went wrong on the first rank where something did."""
    return next(iter(err.failures.values()))[0] if isinstance(err, CheckpointException) else err


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
