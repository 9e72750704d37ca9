"""Where a model comes from: its parent, the code, the configuration, the step."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from lightning_vlm._version import __version__

PROVENANCE_FILE = "provenance.json"
REPOSITORY = Path(__file__).resolve().parents[2]


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
    recorded = directory / PROVENANCE_FILE
    known = json.loads(recorded.read_text()).get("hash") if recorded.is_file() else None
    return {"path": str(directory.resolve()), "hash": known or weights_hash(directory)}


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


def make_provenance(parent: str, *, step: int, config_file: Path | None = None, **more: Any) -> dict[str, Any]:
    """The content of `provenance.json`; `hash`, of the weights, is added when they are written.

    Args:
        parent: hub id, directory or `embedded:NAME` that training started from.
        step: optimizer steps done.
        config_file: the run's resolved configuration, where there is one.
        more: further plain facts (for example the checkpoint).
    """
    state = git_state()
    return {
        "parent": parent_of(parent),
        "step": step,
        "config_hash": file_hash([config_file]) if config_file and config_file.is_file() else None,
        "git_commit": state["commit"],
        "git_dirty_bytes": state["dirty_bytes"],
        "version": __version__,
        **more,
    }
