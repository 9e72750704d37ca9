"""What a run was: parameters, configuration, code, environment, parts, lineage; in its folder and its loggers."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger

from lightning_vlm._version import __version__
from lightning_vlm.export.provenance import git_state, parent_of

MLFLOW_PARAM_LENGTH = 500  # characters; what is cut here is whole in the configuration's artifact
MLFLOW_TAG_LENGTH = 5000
PACKAGES = ("torch", "transformers", "lightning", "peft", "datasets", "torchmetrics", "flash-attn")
MLFLOW_RUN_FILE = "mlflow_run_id"


def flatten(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys: {"a": {"b": [1]}} gives {"a.b.0": 1}; empty ones keep their key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {at: value} if at else {}
    flat: dict[str, Any] = {}
    for key, sub in items:
        flat |= flatten(sub, f"{at}.{key}" if at else str(key))
    return flat


def environment(trainer: Trainer) -> dict[str, Any]:
    """Versions, devices and processes."""
    versions = {"python": platform.python_version(), "lightning_vlm": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
        "threads": torch.get_num_threads(),
    }


class RunRecord(Callback):
    """Writes down what a run is, once, when it starts; part of every run.

    To run_dir: `environment.json`, `parts.txt`. To MLflow also: parameters, the resolved configuration and those files
    as artifacts, and tags for code and lineage (`parent.path`, `parent.hash`, `git.commit`, `git.dirty_bytes`,
    `run_dir`, `stage`). Other loggers get the parameters. A resumed run goes on in its MLflow run; parameters changed
    since are tags `resumed.*`.

    Args:
        config_file: the resolved configuration.
    """

    def __init__(self, *, config_file: str) -> None:
        self.config_file = Path(config_file)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a training run."""
        self._record(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the cache of vision features saved and cost."""
        cache = getattr(getattr(pl_module, "policy", None), "vision_cache", None)
        if cache is not None and trainer.is_global_zero:
            print(cache, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record an evaluation that is a run of its own."""
        if trainer.state.fn == "validate":
            self._record(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a test run."""
        self._record(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a prediction run."""
        self._record(trainer, pl_module, "predict")

    def _record(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        run_dir = Path(trainer.default_root_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        config = yaml.safe_load(self.config_file.read_text())
        git = git_state()
        facts = {"stage": stage, "git": git, **environment(trainer)}
        files = {"environment.json": json.dumps(facts, indent=2) + "\n"}
        table = _part_table(pl_module)
        if table is not None:
            files["parts.txt"] = table + "\n"
        for name, content in files.items():
            (run_dir / name).write_text(content)
        if table is not None and stage == "fit":
            print(table, flush=True)
        tags = {"stage": stage, "run_dir": str(run_dir.resolve())}
        tags |= {f"git.{name}": value for name, value in git.items() if value is not None}
        if config.get("backbone"):
            parent = parent_of(config["backbone"]["path"])
            tags |= {f"parent.{name}": value for name, value in parent.items() if value is not None}
        params = flatten(config)
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                paths = [self.config_file, *(run_dir / name for name in files)]
                _record_mlflow(logger, params, tags, paths, run_dir)
            else:
                logger.log_hyperparams(params)


def _part_table(pl_module: LightningModule) -> str | None:
    """The table of parts; None for a module without a policy."""
    policy = getattr(pl_module, "policy", None)
    if policy is None:
        return None
    from lightning_vlm.models.parts import part_table, render_table

    return render_table(part_table(policy.model, policy.family, pl_module.parts))


def _record_mlflow(
    logger: Logger, params: dict[str, Any], tags: dict[str, Any], paths: list[Path], run_dir: Path
) -> None:
    from mlflow.entities import Param, RunTag

    client, run_id = logger.experiment, logger.run_id
    known = client.get_run(run_id).data.params
    shown = {name: _cut(value, MLFLOW_PARAM_LENGTH) for name, value in params.items()}
    new = {name: value for name, value in shown.items() if name not in known}
    changed = {name: value for name, value in shown.items() if known.get(name, value) != value}
    tags = tags | {f"resumed.{name}": value for name, value in changed.items()}
    entries = [Param(name, value) for name, value in new.items()]
    for start in range(0, len(entries), 100):  # MLflow takes a hundred at a time
        client.log_batch(run_id, params=entries[start : start + 100])
    client.log_batch(run_id, tags=[RunTag(name, _cut(value, MLFLOW_TAG_LENGTH)) for name, value in tags.items()])
    for path in paths:
        client.log_artifact(run_id, str(path))
    (run_dir / MLFLOW_RUN_FILE).write_text(run_id + "\n")


def _cut(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
