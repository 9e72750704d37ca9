"""Where a model comes from: its parent, the code, the configuration, the step."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from lightning_vlm._version import __version__

PROVENANCE_FILE = "provenance.json"
REPOSITORY = Path(__file__).resolve().parents[2]
# What may differ between runs of one recipe: seeds, and settings that change speed and memory only.
_NOT_THE_RECIPE = frozenset(
    {"seed", "workers", "eval_batch_size", "predict", "micro_batch_tokens", "share_images", "sampling", "samples"}
)


def file_hash(paths: list[Path]) -> str:
    """SHA-256 over the names and bytes of files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 22), b""):
                digest.update(block)
    return digest.hexdigest()


def weights_hash(directory: Path) -> str:
    """SHA-256 over a model directory's weight files and configuration."""
    files = [*directory.glob("*.safetensors"), *directory.glob("*.bin"), directory / "config.json"]
    return file_hash([f for f in files if f.is_file()])


def parent_of(path: str) -> dict[str, Any]:
    """What a run starts from: `path` and `hash`.

    The hash is the one in the directory's own provenance where it has one, else computed from its files; it is None for
    hub ids and embedded models, whose name says it all.
    """
    directory = Path(path)
    if path.startswith("embedded:") or not directory.is_dir():
        return {"path": path, "hash": None}
    return {"path": str(directory.resolve()), "hash": recorded(directory).get("hash") or weights_hash(directory)}


def git_state(repository: Path = REPOSITORY) -> dict[str, Any]:
    """The commit of the code and how many bytes of it are changed since; all None outside a repository."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(repository), *args], capture_output=True, text=True, timeout=20)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    difference = git("diff", "HEAD") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "branch": (git("rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None,
        "dirty_bytes": None if difference is None else len(difference.encode()),
    }


def recorded(directory: str | Path) -> dict[str, Any]:
    """The `provenance.json` of a model directory; empty where there is none."""
    file = Path(directory) / PROVENANCE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def recipe_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a run repeats under another seed, as far as its configuration tells.

    Args:
        config: a run's resolved configuration; None comes of one that names no model to start from, or no algorithm.

    Returns:
        `arm`: the algorithm and a hash of all settings that shape the result, those of the models it started from
        included; equal for runs that differ in their seeds alone. `seed`: the run's. `start`: path and hash of the
        model it started from.
    """
    if not (config.get("backbone") and config.get("model")):
        return None
    start = parent_of(config["backbone"]["path"])
    if start["hash"] is None:  # the name says it all, together with the seed random weights are drawn from
        start["hash"] = f"{start['path']}#{config['backbone'].get('seed', 0)}"
    trainer = config.get("trainer") or {}
    shape = {
        "backbone": {k: _arm_behind(v) if k in ("path", "adapter") else v for k, v in config["backbone"].items()},
        "model": config["model"],
        "data": config.get("data"),
        "trainer": {k: trainer.get(k) for k in ("max_steps", "max_epochs", "precision")},
    }
    digest = hashlib.sha256(json.dumps(_without_seeds(shape), sort_keys=True, default=str).encode()).hexdigest()
    name = config["model"]["class_path"].rpartition(".")[2]
    return {"arm": f"{name}-{digest[:8]}", "seed": config.get("seed_everything"), "start": start}


def _arm_behind(path: str | None) -> str | None:
    """The recipe that made a model directory or an adapter; the path itself where nothing tells."""
    if path is None:
        return None
    directory = Path(path).parent if Path(path).is_file() else Path(path)
    return (recorded(directory).get("recipe") or {}).get("arm") or path


def evaluated(
    config: dict[str, Any], *, step: int | None = None, checkpoint: str | Path | None = None
) -> dict[str, Any]:
    """What an evaluation was of, for comparisons: `arm`, `seed`, `start`, `step`, `model`; None where nothing tells.

    Args:
        config: resolved configuration of the run that evaluates.
        step: optimizer steps done, where the run that evaluates is the run that trains.
        checkpoint: the checkpoint that is evaluated, where it is one.
    """
    unknown = {"arm": None, "seed": None, "start": None, "step": step}
    if checkpoint is not None:
        trained_by = Path(checkpoint).resolve().parent.parent / "config.yaml"
        known = recipe_of(yaml.safe_load(trained_by.read_text())) if trained_by.is_file() else None
        return unknown | (known or {}) | {"model": {"path": str(checkpoint), "hash": None}}
    if step is not None:
        return unknown | (recipe_of(config) or {}) | {"model": None}
    path = config["backbone"]["path"]
    record = recorded(path)
    return unknown | (record.get("recipe") or {}) | {"step": record.get("step"), "model": parent_of(path)}


def _without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seeds(v) for k, v in value.items() if k not in _NOT_THE_RECIPE}
    return [_without_seeds(v) for v in value] if isinstance(value, list) else value


def make_provenance(parent: str, *, step: int, config_file: Path | None = None, **more: Any) -> dict[str, Any]:
    """The content of `provenance.json`; `hash`, of the weights, is added when they are written.

    Args:
        parent: hub id, directory or `embedded:NAME` that training started from.
        step: optimizer steps done.
        config_file: the run's resolved configuration, where there is one.
        more: further plain facts (for example the checkpoint).
    """
    state = git_state()
    config = config_file if config_file and config_file.is_file() else None
    return {
        "parent": parent_of(parent),
        "step": step,
        "recipe": recipe_of(yaml.safe_load(config.read_text())) if config else None,
        "config_hash": file_hash([config]) if config else None,
        "git_commit": state["commit"],
        "git_dirty_bytes": state["dirty_bytes"],
        "version": __version__,
        **more,
    }
