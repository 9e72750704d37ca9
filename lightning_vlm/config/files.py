"""Configuration files: where they are found, how they are read, how they and the command line become one `Config`."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lightning_vlm.config.tree import Config, KeyPath, nearest, nearest_only

REPOSITORY_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOP_LEVEL = {
    "include": "list of files merged before this one, relative to it",
    "vars": "your own variables, for ${vars.name} references",
    "seed_everything": "the run's seed",
    "threads": "CPU threads of each process (default: torch's choice); 1 is fastest for tiny models",
    "run_dir": "where the run writes (default runs/<experiment>-<time>)",
    "backbone": "the model to start from; handed to model and data",
    "model": "the algorithm: class_path and init_args",
    "data": "the data: class_path and init_args",
    "trainer": "arguments of Lightning's Trainer",
    "callbacks": "NAME: {arguments}; null removes one",
    "logger": "NAME: {arguments}, NAME one of MLFlow, TensorBoard, WandB, CSV; null removes one",
}
REFUSED_TRAINER_KEYS = {
    "accumulate_grad_batches": "a batch is one optimizer step: set model.init_args.micro_batch_tokens",
    "gradient_clip_val": "clipping belongs to the algorithm: set model.init_args.clip_norm",
    "gradient_clip_algorithm": "clipping belongs to the algorithm: set model.init_args.clip_norm",
    "callbacks": "use the top-level `callbacks:` mapping (NAME: {arguments})",
    "logger": "use the top-level `logger:` mapping (NAME: {arguments})",
    "val_check_interval": "set `every`, in optimizer steps, of the callback that evaluates",
    "check_val_every_n_epoch": "set `every`, in optimizer steps, of the callback that evaluates",
    "limit_train_batches": "the loader has no end: set trainer.max_steps, or `limit` of a source",
    "limit_val_batches": "a part of a benchmark is another benchmark: set `limit` of its source",
    "limit_test_batches": "a part of a benchmark is another benchmark: set `limit` of its source",
    "limit_predict_batches": "set `limit` of the sources in data.predict",
    "overfit_batches": "set `limit` of the sources in data.train",
    "fast_dev_run": "set trainer.max_steps, and `limit` of the benchmarks' sources",
    "default_root_dir": "set the top-level `run_dir`",
    "enable_progress_bar": "remove the bar by `callbacks: {Progress: null}`",
    "enable_checkpointing": "remove checkpoints by `callbacks: {Checkpoint: null}`",
}


class _Loader(yaml.SafeLoader):
    """YAML as people write it in configurations: `1e-3` is a number, a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:timestamp",)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """Parse YAML; also give each key's place as `name:line`.

    Raises:
        ValueError: not YAML, a key given twice, or a key that is not text.
    """
    loader = _Loader(text)
    origins: dict[KeyPath, str] = {}

    def build(node: yaml.Node, path: KeyPath) -> Any:
        origins.setdefault(path, f"{name}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, str(i))) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node, deep=True)
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise ValueError(
                    f"{name}:{line}: key '{key_node.value}' is given twice (first in line {seen[key_node.value]})"
                )
            seen[str(key_node.value)] = line
        loader.flatten_mapping(node)
        out: dict[str, Any] = {}
        for key_node, child in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ValueError(
                    f"{name}:{key_node.start_mark.line + 1}: key {key_node.value!r} must be text; quote it"
                )
            origins[(*path, str(key))] = f"{name}:{key_node.start_mark.line + 1}"
            out[str(key)] = build(child, (*path, str(key)))
        return out

    try:
        root = loader.get_single_node()
        value = None if root is None else build(root, ())
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ValueError(f"{where}: not valid YAML: {getattr(err, 'problem', None) or err}") from err
    finally:
        loader.dispose()
    origins.pop((), None)
    return value, origins


@functools.lru_cache(maxsize=512)
def _parsed(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """`parse_yaml`, once for each file that many configurations share."""
    return parse_yaml(text, name)


def find_config(name: str, base: Path | None = None) -> Path:
    """The file meant by `name`: relative to `base` (or the working directory), or a short name such as
    `experiment/world-sft` in a `configs` folder (the working directory's, then the repository's).

    Raises:
        FileNotFoundError: none there; names the nearest configuration.
    """
    roots = [base or Path.cwd(), Path.cwd() / "configs", REPOSITORY_CONFIGS]
    for root in roots:
        for candidate in (root / name, root / f"{name}.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    known = [str(p.relative_to(r).with_suffix("")) for r in roots[1:] if r.is_dir() for p in r.rglob("*.yaml")]
    near = nearest_only(name, known) or nearest_only(Path(name).stem, [Path(k).name for k in known])
    raise FileNotFoundError(f"no configuration file '{name}'{near}")


def load(files: Iterable[str], overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Merge `files` with what they include, then `overrides`, and resolve references.

    Args:
        files: paths or short names; later ones win.
        overrides: (dotted key, value) pairs from the command line.

    Raises:
        FileNotFoundError: a file or an included file is missing.
        ValueError: cyclic includes, duplicate or unknown top-level keys, unresolvable references.
    """
    config = merged(files, overrides)
    check_top_level(config)
    config.tree.setdefault("seed_everything", 0)
    config.resolve()
    return config


def merged(files: Iterable[str], overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Merge `files` with what they include, then `overrides`; nothing is resolved, keys may be any.

    Args:
        files: paths or short names; later ones win.
        overrides: (dotted key, value) pairs from the command line.

    Raises:
        FileNotFoundError: a file or an included file is missing.
        ValueError: cyclic includes, duplicate keys, not YAML.
    """
    config = Config()
    for name in files:
        _load_file(config, find_config(name), ())
    for key, value in overrides:
        config.override(key, value)
    config.tree.pop("include", None)
    return config


def _load_file(config: Config, path: Path, parents: tuple[Path, ...]) -> None:
    if path in parents:
        chain = " -> ".join(p.name for p in (*parents[parents.index(path) :], path))
        raise ValueError(f"{_shown(path)}: includes itself: {chain}")
    if parents and path in config.files:
        return  # a fragment reached twice is merged once, at its first mention, lest it undo what came between
    layer, origins = copy.deepcopy(_parsed(path.read_text(), _shown(path)))
    layer = {} if layer is None else layer
    if not isinstance(layer, dict):
        raise ValueError(f"{_shown(path)}: a configuration is a mapping, got a {type(layer).__name__}")
    includes = layer.pop("include", None) or []
    if not isinstance(includes, list) or not all(isinstance(i, str) for i in includes):
        raise ValueError(f"{_shown(path)}: include takes a list of files, got {includes!r}")
    for name in includes:
        try:
            target = find_config(name, path.parent)
        except FileNotFoundError as err:
            raise FileNotFoundError(f"{_shown(path)}: include: {err}") from err
        _load_file(config, target, (*parents, path))
    config.files.append(path)
    config.merge(layer, origins)


def _shown(path: Path) -> str:
    for root in (Path.cwd(), REPOSITORY_CONFIGS.parent):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def check_top_level(config: Config) -> None:
    """Refuse unknown top-level keys and trainer settings that belong elsewhere."""
    for key in config.tree:
        if key not in TOP_LEVEL:
            raise config.error((key,), f"unknown key{nearest(key, TOP_LEVEL)}")
    for key in ("backbone", "model", "data", "trainer", "callbacks", "logger", "vars"):
        value = config.tree.get(key)
        if value is not None and not isinstance(value, dict):
            raise config.error((key,), f"expected a mapping, got {value!r}")
    for key in ("model", "data"):
        for sub in config.tree.get(key) or {}:
            if sub not in ("class_path", "init_args"):
                hint = f"; arguments of the class go under {key}.init_args"
                raise config.error((key, sub), f"unknown key{nearest_only(sub, ['class_path', 'init_args']) or hint}")
    for key in config.tree.get("trainer") or {}:
        if key in REFUSED_TRAINER_KEYS:
            raise config.error(("trainer", key), f"not used here: {REFUSED_TRAINER_KEYS[key]}")
