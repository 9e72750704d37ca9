"""`--model.help NAME` and its like: the arguments of a class with their types, defaults and docstrings."""

from __future__ import annotations

import importlib
import inspect

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from lightning_vlm.cli import schema
from lightning_vlm.cli.app import LOGGERS
from lightning_vlm.config.tree import Config

GROUPS = {
    "model": ("lightning_vlm.algorithms", LightningModule),
    "data": ("lightning_vlm.data.module", LightningDataModule),
    "callbacks": ("callbacks", Callback),
    "logger": ("lightning.pytorch.loggers", Logger),
}


def describe(group: str, name: str, config: Config) -> str:
    """Help text for one class, or the names there are when none is given and the configuration names none.

    Args:
        group: model, data, callbacks, logger, trainer or backbone.
        name: the class; for model and data the configuration's own by default.
        config: merged; used for the default name.
    """
    if group == "trainer":
        return _arguments(Trainer)
    if group == "backbone":
        from lightning_vlm.models.spec import Backbone

        return _arguments(Backbone)
    package, base = GROUPS[group]
    wanted = name or config.at((group, "class_path"))
    if not wanted:
        names = list(LOGGERS) if group == "logger" else schema.public_classes(importlib.import_module(package), base)
        return f"{group}: " + ", ".join(names) + f"\narguments of one: --{group}.help NAME"
    wanted = LOGGERS.get(wanted, wanted) if group == "logger" else wanted
    return _arguments(schema.resolve_class(wanted, package, base, f"--{group}.help"))


def _arguments(cls: type) -> str:
    parser = ArgumentParser(prog=cls.__name__, usage=f"{cls.__name__}: {(inspect.getdoc(cls) or '').splitlines()[0]}")
    parser.add_class_arguments(cls, fail_untyped=False)
    return parser.format_help()
