"""What the tests of the sources share: opening, refusing, tiny files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from lightning_vlm.data.sources import SourceSpec, open_source

REAL = Path(os.environ.get("LVLM_REAL_DATA", "/nonexistent"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="LVLM_REAL_DATA is not set")


def opened(for_training=True, **spec):
    return open_source(SourceSpec(**spec), for_training=for_training)


def refused(*words, for_training=True, **spec):
    """The spec must be refused in one line that has all the words."""
    with pytest.raises(ValueError) as error:
        opened(for_training, **spec)
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said


def write(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return str(path)


def png(colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
    return path


def types(message) -> list[str]:
    return [part["type"] for part in message["content"]]


def words(message) -> str:
    return "".join(part.get("text", "") for part in message["content"])
