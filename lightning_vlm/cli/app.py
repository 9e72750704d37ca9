"""Builds a stage from its configuration on LightningCLI and runs it."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import callbacks
from callbacks.checkpoint import SaveModel
from callbacks.record import MLFLOW_RUN_FILE
from lightning_vlm.cli import schema
from lightning_vlm.cli.run_dir import checkpoint_to_load, choose_run_dir
from lightning_vlm.config.tree import Config, nearest

LOGGERS = {"MLFlow": "MLFlowLogger", "TensorBoard": "TensorBoardLogger", "WandB": "WandbLogger", "CSV": "CSVLogger"}
EXPERIMENT = "lightning-vlm"
ALWAYS = (
    "Progress",
    "RunRecord",
    "Costs",
    "BadSamples",
    "EvaluationRecord",
    "SaveModel",
    "Checkpoint",
)  # in every run, unless a configuration says `NAME: null`
TRAINER_DEFAULTS = {"enable_model_summary": False, "use_distributed_sampler": False}


class StageCLI(LightningCLI):
    """LightningCLI over an already merged and checked configuration.

    Args:
        tree: trainer, model and data, as plain values.
        observers: callbacks, handed to the Trainer.
        loggers: handed to the Trainer; none is fine.
        run_dir: the Trainer's root folder.
    """

    def __init__(self, tree: dict[str, Any], observers: list[Callback], loggers: list[Logger], run_dir: Path) -> None:
        self.extra = {
            "callbacks": list(observers),
            "logger": loggers or False,
            "default_root_dir": str(run_dir),
            "enable_progress_bar": any(type(c).__name__ == "Progress" for c in observers),
            "enable_checkpointing": any(type(c).__name__ == "Checkpoint" for c in observers),
        }
        super().__init__(
            run=False,
            args=tree,
            save_config_callback=None,
            auto_configure_optimizers=False,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"exit_on_error": False},
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Take the configuration as it is: the command line was read before."""
        try:
            self.config = parser.parse_object(copy.deepcopy(args))
        except ArgumentError as err:
            cause: BaseException = err
            while cause.__cause__ is not None:  # each wrapping repeats the whole configuration
                cause = cause.__cause__
            raise ValueError(str(cause)) from err

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with the run's callbacks, loggers and folder."""
        return super().instantiate_trainer(**self.extra, **kwargs)


def run(command: str, config: Config, options: dict[str, Any]) -> int:
    """Build and run one stage.

    Args:
        command: fit, validate, test or predict.
        config: merged and resolved.
        options: `resume`, `ckpt`, `out` as given.

    Returns:
        The exit code.

    Raises:
        ValueError, FileNotFoundError: what the user can mend, in one line.
    """
    sys.path.append(os.getcwd())  # classes of the user's own, by dotted path
    _quiet()
    limit_threads(config)
    classes = resolve_classes(config)
    tree = linked(config, classes)
    run_dir = choose_run_dir(command, config)
    config_file = run_dir / ("config.yaml" if command == "fit" else f"{command}.yaml")
    defaults = run_defaults(run_dir, config_file, resuming="resume" in options)
    check(config, tree, classes, defaults)
    if command == "fit" and all(tree["trainer"].get(key) in (None, -1) for key in ("max_steps", "max_epochs")):
        raise ValueError("no end to the training: set trainer.max_steps (optimizer steps) or trainer.max_epochs")
    ckpt = checkpoint_to_load(command, run_dir, options)
    if "resume" in options:
        say(f"resuming from {ckpt}" if ckpt else f"nothing to resume in {run_dir}: starting from step 0")

    loggers = build_loggers(config, classes, defaults)
    observers = build_callbacks(config, defaults)
    if command == "predict":
        from lightning_vlm.cli.predict import PredictionWriter

        observers.append(PredictionWriter(out=Path(options.get("out") or run_dir / "predictions.jsonl")))
    cli = StageCLI(tree, observers, loggers, run_dir)
    say(f"run_dir: {run_dir}")
    write_config(cli, config, config_file)

    try:
        results = _run_stage(cli, command, ckpt)
    except BaseException as err:
        if command == "fit" and ckpt is None and not getattr(cli.model, "clock", 1):
            config_file.unlink(missing_ok=True)  # no run yet: what was wrong can be mended and tried again
        if isinstance(err, OSError) and err.errno == errno.ENOSPC:
            raise OSError(f"the disk of {run_dir} is full: free some space and start again ({err})") from err
        raise
    if command == "fit":
        _say_what_next(cli.trainer, config_file)
    elif command != "predict":
        _write_results(run_dir / f"{command}.json", results, getattr(cli.model, "summaries", {}))
    return 0


def limit_threads(config: Config) -> None:
    """Apply `threads`; data workers always have one.

    Raises:
        ValueError: `threads` below 1.
    """
    threads = config.tree.get("threads")
    if threads is None:
        return
    schema.check_value(threads, int, ("threads",), config)
    if threads < 1:
        raise config.error(("threads",), f"must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _run_stage(cli: StageCLI, command: str, ckpt: Path | None) -> Any:
    more = {"predict": {"return_predictions": False}, "validate": {"verbose": False}, "test": {"verbose": False}}
    path = None if ckpt is None else str(ckpt)
    try:
        return getattr(cli.trainer, command)(
            model=cli.model, datamodule=cli.datamodule, ckpt_path=path, **more.get(command, {})
        )
    except RuntimeError as err:
        if ckpt is None or "loading state_dict" not in str(err):
            raise
        raise ValueError(
            f"checkpoint {ckpt} does not fit the configured backbone and parts: give it those it was trained with "
            f"({_few_lines(err)})"
        ) from err


def _few_lines(err: Exception) -> str:
    """The first of the lines in which torch lists every tensor that does not fit."""
    first, *rest = (" ".join(line.split()) for line in str(err).splitlines()[1:] if line.strip())
    return first[:200] + (f"; {len(rest)} more" if rest else "")


def resolve_classes(config: Config) -> dict[tuple[str, ...], type]:
    """The classes of model, data, callbacks and loggers, by the path that names them."""
    found: dict[tuple[str, ...], type] = {}
    for key, package, base in (
        ("model", "lightning_vlm.algorithms", LightningModule),
        ("data", "lightning_vlm.data.module", LightningDataModule),
    ):
        name = config.at((key, "class_path"))
        if name is None:
            raise ValueError(f"no {key}: set {key}.class_path in a configuration file, or give --{key} NAME")
        place = f"{key}.class_path (set in {config.origin((key, 'class_path'))})"
        found[(key,)] = schema.resolve_class(name, package, base, place)
    for name, kwargs in (config.tree.get("callbacks") or {}).items():
        if kwargs is None and (name in callbacks.__all__ or "." in name):
            continue  # removed: nothing to import
        place = f"callbacks.{name} (set in {config.origin(('callbacks', name))})"
        found["callbacks", name] = schema.resolve_class(name, "callbacks", Callback, place)
    for name in config.tree.get("logger") or {}:
        if name not in LOGGERS and "." not in name:
            raise config.error(("logger", name), f"unknown logger{nearest(name, LOGGERS)}")
        place = f"logger.{name} (set in {config.origin(('logger', name))})"
        found["logger", name] = schema.resolve_class(
            LOGGERS.get(name, name), "lightning.pytorch.loggers", Logger, place
        )
    return found


def linked(config: Config, classes: dict[tuple[str, ...], type]) -> dict[str, Any]:
    """Trainer, model and data for LightningCLI, with the one `backbone` handed to whichever of the two takes it.

    Raises:
        ValueError: a value given at the link's target, or a backbone that nothing takes.
    """
    tree = {"seed_everything": config.tree["seed_everything"], "trainer": dict(config.tree.get("trainer") or {})}
    takers = 0
    for key in ("model", "data"):
        args = dict(config.at((key, "init_args")) or {})
        if "backbone" in args:
            raise config.error((key, "init_args", "backbone"), "comes from the top-level `backbone`; set it there")
        if "backbone" in schema.signature(classes[(key,)]).hints and "backbone" in config.tree:
            args["backbone"] = config.tree["backbone"]
            takers += 1
        cls = classes[(key,)]
        tree[key] = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": args}
    if "backbone" in config.tree and not takers:
        raise config.error(("backbone",), "neither model nor data takes a backbone")
    return tree


def check(
    config: Config,
    tree: dict[str, Any],
    classes: dict[tuple[str, ...], type],
    defaults: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Every name and type against the signatures, before anything is built; prints what class changes kept."""
    schema.check_value(config.tree["seed_everything"], int, ("seed_everything",), config)
    schema.check_arguments(Trainer, tree["trainer"], ("trainer",), config)
    for line in schema.settle_swaps(config, classes):
        say(line)
    for key in ("model", "data"):
        hints = schema.signature(classes[(key,)]).hints
        args = dict(tree[key]["init_args"])
        if "backbone" in hints:
            if "backbone" not in args:
                raise ValueError("no backbone: set backbone.path to a model directory, a hub id or embedded:NAME")
            schema.check_value(args["backbone"], hints["backbone"], ("backbone",), config)
            config.origins[key, "init_args", "backbone"] = config.origin(("backbone",))
        schema.check_arguments(classes[(key,)], args, (key, "init_args"), config)
    for group in ("callbacks", "logger"):
        for name, kwargs in (config.tree.get(group) or {}).items():
            schema.check_value(kwargs, dict | None, (group, name), config)
            if kwargs is not None:
                complete = {**defaults.get((group, name), {}), **kwargs}
                schema.check_arguments(classes[group, name], complete, (group, name), config)


def run_defaults(run_dir: Path, config_file: Path, resuming: bool) -> dict[tuple[str, str], dict[str, Any]]:
    """Arguments of callbacks and loggers that follow from the run; a resumed run goes on in the MLflow run it had."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    mlflow = {"experiment_name": EXPERIMENT, "tracking_uri": uri, "run_name": run_dir.name}
    if resuming and (run_dir / MLFLOW_RUN_FILE).is_file():
        mlflow["run_id"] = (run_dir / MLFLOW_RUN_FILE).read_text().strip()
    # The CSV logger clears its folder when it starts: what the run or another command wrote before must stay.
    csv = f"csv-{len(list(run_dir.glob('csv*'))) + 1}" if (run_dir / "csv").exists() else "csv"
    return {
        ("callbacks", "RunRecord"): {"config_file": str(config_file)},
        ("callbacks", "EvaluationRecord"): {"config_file": str(config_file)},
        ("logger", "MLFlow"): mlflow,
        ("logger", "TensorBoard"): {"save_dir": str(run_dir), "name": "", "version": "tensorboard"},
        ("logger", "CSV"): {"save_dir": str(run_dir), "name": "", "version": csv},
        ("logger", "WandB"): {"save_dir": str(run_dir), "name": run_dir.name, "project": EXPERIMENT},
    }


def build_callbacks(config: Config, defaults: dict[tuple[str, str], dict[str, Any]]) -> list[Callback]:
    """The callbacks of every run, changed and extended by the configuration's mapping."""
    wanted: dict[str, Any] = {name: {} for name in ALWAYS} | (config.tree.get("callbacks") or {})
    return [
        instantiate(
            schema.resolve_class(name, "callbacks", Callback, f"callbacks.{name}"),
            {**defaults.get(("callbacks", name), {}), **kwargs},
        )
        for name, kwargs in wanted.items()
        if kwargs is not None
    ]


def build_loggers(
    config: Config, classes: dict[tuple[str, ...], type], defaults: dict[tuple[str, str], dict[str, Any]]
) -> list[Logger]:
    """The loggers of the configuration's mapping.

    Raises:
        ValueError: a logger whose package is not installed.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new MLflow database announces every table
    loggers = []
    for name, given in (config.tree.get("logger") or {}).items():
        if given is None:
            continue
        try:
            loggers.append(instantiate(classes["logger", name], {**defaults.get(("logger", name), {}), **given}))
        except ModuleNotFoundError as err:
            raise config.error(("logger", name), f"its package is not installed: {err}") from err
    return loggers


def instantiate(cls: type, kwargs: dict[str, Any]) -> Any:
    """`cls(**kwargs)` with nested dataclasses and classes built from their mappings."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", fail_untyped=False)
    try:
        parsed = parser.parse_object({"it": copy.deepcopy(kwargs)})  # it writes into what it is given
    except ArgumentError as err:
        raise ValueError(f"{cls.__name__}: {err}") from err
    return parser.instantiate_classes(parsed).it


def write_config(cli: StageCLI, config: Config, path: Path) -> None:
    """Write the resolved configuration, defaults of model and data filled in, such that `-c` runs it again."""
    if rank_zero_only.rank != 0:
        return
    full = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False, skip_validation=True))
    out: dict[str, Any] = {"seed_everything": full["seed_everything"]}
    for key in ("model", "data"):
        backbone = full[key]["init_args"].pop("backbone", None)
        if backbone is not None:
            out["backbone"] = backbone
    out |= {"model": full["model"], "data": full["data"]}
    given = config.tree.get("trainer") or {}
    out["trainer"] = {k: full["trainer"][k] for k in given}
    out |= {k: config.tree[k] for k in ("callbacks", "logger") if config.tree.get(k)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(out, sort_keys=False, allow_unicode=True))
    os.replace(temporary, path)


@rank_zero_only
def say(text: str) -> None:
    """Print on the first process only."""
    print(text, flush=True)


def _write_results(path: Path, results: list[dict[str, float]], summaries: dict[str, Any]) -> None:
    """Write the metrics, print them with the intervals that their summaries give."""
    if rank_zero_only.rank == 0:
        merged = {name: value for result in results for name, value in result.items()}
        path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
        intervals = {f"{name}/{m}": i for name, s in summaries.items() for m, i in s.intervals().items()}
        width = max(map(len, merged), default=0)
        for name, value in sorted(merged.items()):
            low, high = intervals.get(name.partition("/")[2], (None, None))
            if name != "step":
                say(f"{name:<{width}}  {value:<9.4g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]"))
        say(f"results: {path}")


def _say_what_next(trainer: Trainer, config_file: Path) -> None:
    saver = next((c for c in trainer.callbacks if isinstance(c, SaveModel)), None)
    if saver is None or saver.saved is None:
        return
    model = shlex.quote(str(saver.saved))
    say(f"{saver.form}: {saver.saved}")
    if saver.form == "adapter":
        say(f"  evaluate it: lightning-vlm validate -c {shlex.quote(str(config_file))} --backbone.adapter {model}")
        return
    say(f"  look at it:  lightning-vlm chat {model} --image FILE")
    say(f"  evaluate it: lightning-vlm validate -c {shlex.quote(str(config_file))} --backbone.path {model}")


def _quiet() -> None:
    """Silence Lightning where it recommends a service, warns of itself, or of what is as it should be here."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*custom batch sampler.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")  # nothing to validate
    warnings.filterwarnings("ignore", message=".*srun. command is available.*")  # wherever SLURM is installed
    # Ours say by themselves where to go on.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # evaluations are gathered before they are logged
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())
