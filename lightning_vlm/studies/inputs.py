"""What a configuration names on the disk, by content: part of a run's fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class Files:
    """Replaces paths in a configuration by hashes of what stands there; every file is read once."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def content(self, value: Any) -> Any:
        """The value with every path in it replaced."""
        if isinstance(value, dict):
            return {key: self.content(sub) for key, sub in value.items()}
        if isinstance(value, list | tuple):
            return [self.content(sub) for sub in value]
        if isinstance(value, str) and ("/" in value or "." in value) and not value.startswith(("<", "embedded:")):
            if value not in self._known:
                self._known[value] = on_disk(value)
            return self._known[value]
        return value

    def __repr__(self) -> str:
        return f"Files({len(self._known)} known)"


def on_disk(text: str) -> Any:
    """A hash of the file or model directory that a text names; of other folders names and sizes count.

    A text that names nothing comes back as it is.
    """
    path = Path(text)
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return {"file": hashlib.file_digest(stream, "sha256").hexdigest()}
        if (path / "config.json").is_file():
            from lightning_vlm.export.provenance import parent_of

            return {"model": parent_of(text)["hash"]}
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            return {"folder": digest([[str(p.relative_to(path)), p.stat().st_size] for p in files])}
    except OSError:
        pass  # a text that is no path here, such as one that is too long
    return text


def digest(facts: Any) -> str:
    """16 hexadecimal digits that stand for plain facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
