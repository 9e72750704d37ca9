"""Files of preference pairs: rows that the source kind `preference` reads back as they were."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_vlm.data.images import BadImage, load_image
from lightning_vlm.data.schema import BadSample, Sample

_PICTURE = re.compile(r"[0-9a-f]{20}\.png")


@dataclass(frozen=True)
class Pair:
    """Two answers to a sample's prompt.

    Attributes:
        chosen, rejected: their texts. negative: where the rejected one comes from. columns: what else the row says.
    """

    chosen: str
    rejected: str
    negative: str
    columns: dict[str, Any] = field(default_factory=dict)


class PairFile:
    """Writes pairs as JSONL; the file, and the folder of pictures beside it, appear when all is written.

    Images that are files are named by their path, from the folder of the JSONL; all others (bytes, pictures made on
    the fly) are written as PNG into `NAME_images/`, each picture once.

    Args:
        out: the JSONL to write. overwrite: replace what is there.

    Raises:
        ValueError: the file, or its folder of pictures, is there already; or `out` is no `.jsonl`.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out, self.folder = out, out.with_name(f"{out.stem}_images")
        if out.suffix != ".jsonl":
            raise ValueError(f"--out {out}: pairs are written as JSONL; name it {out.stem}.jsonl")
        if out.is_dir():
            raise ValueError(f"--out {out} is a directory: give a file")
        for path in (self.out, self.folder):
            if path.exists() and not overwrite:
                raise ValueError(f"{path} is there already: choose another --out, or replace it with --overwrite")
        if self.folder.exists() and not all(_PICTURE.fullmatch(p.name) for p in self.folder.iterdir()):
            raise ValueError(f"{self.folder}, where pictures are written, holds other files: choose another --out")
        self._file = out.with_name(out.name + ".tmp")
        self._pictures = self.folder.with_name(self.folder.name + ".tmp")
        self._root = Path(os.path.realpath(out.parent))
        self.written: set[str] = set()

    def __enter__(self) -> PairFile:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._pictures, ignore_errors=True)
        self._stream = self._file.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.unlink(missing_ok=True)
        shutil.rmtree(self._pictures, ignore_errors=True)

    def images(self, sample: Sample) -> list[str]:
        """The sample's images as the file names them.

        Raises:
            BadSample: an image is missing or broken, or the prompt has another number of places for them.
        """
        kinds = [part["type"] for msg in sample.prompt() for part in msg["content"]]
        if "video" in kinds:
            raise BadSample(sample.id, "video", "has a video; only images are supported")
        if kinds.count("image") != len(sample.images):
            raise BadSample(
                sample.id,
                "placeholder_mismatch",
                f"{kinds.count('image')} image placeholders for {len(sample.images)} images",
            )
        try:
            return [self._image(image) for image in sample.images]
        except BadImage as bad:
            raise BadSample(sample.id, bad.reason, str(bad)) from bad

    def write(self, id: str, sample: Sample, images: list[str], pair: Pair) -> None:
        """Add one pair."""
        row = {
            "id": id,
            "images": images,
            "prompt": sample.prompt(),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "negative": pair.negative,
            **pair.columns,
        }
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def publish(self) -> None:
        """Give file and folder their names."""
        self._stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.written:
            os.replace(self._pictures, self.folder)
        os.replace(self._file, self.out)

    def _image(self, image: Any) -> str:
        if isinstance(image, str | os.PathLike) and not str(image).startswith(("http://", "https://")):
            if not os.path.isfile(image):
                raise BadImage("missing_image", f"image {os.fspath(image)!r} does not exist")
            path = Path(os.path.realpath(os.path.dirname(image))) / os.path.basename(image)
            if path.parent != Path(os.path.realpath(self.folder)):  # which is about to be replaced
                return self._relative(path)
        picture = load_image(image)
        digest = hashlib.sha256(f"{picture.width}x{picture.height}:".encode() + picture.tobytes()).hexdigest()[:20]
        name = f"{digest}.png"
        if name not in self.written:
            self._pictures.mkdir(exist_ok=True)
            picture.save(self._pictures / name)
            self.written.add(name)
        return f"{self.folder.name}/{name}"

    def _relative(self, path: Path) -> str:
        """Relative to the file where both lie below one folder: they can then be moved together."""
        common = Path(os.path.commonpath([path, self._root]))
        return str(path) if common == Path(path.anchor) else os.path.relpath(path, self._root)
