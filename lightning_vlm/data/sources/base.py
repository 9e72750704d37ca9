"""Sources of rows: ids, length and access; images found but never decoded."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources.spec import SourceSpec
from lightning_vlm.data.sources.tables import Row, Table

_ROWS_LOOKED_AT = 16  # at opening, for image folders that are missing as a whole


class Source(Sequence[Sample]):
    """Samples by index; `draw(index, epoch)` is what an epoch sees, which differs only where a source `varies`."""

    label: str
    varies: bool = False

    def sample_id(self, index: int) -> str:
        """The id of the sample at `index`, without building the sample."""
        raise NotImplementedError

    def draw(self, index: int, epoch: int) -> Sample:
        """The sample at `index` as the `epoch`-th walk through the source sees it."""
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.draw(_checked(index, len(self)), 0)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


class RowSource(Source):
    """One sample per row of a table.

    Args:
        table: the rows.
        build: (row, sample id) → sample.
        label: name of the source, first part of every id.
        id_columns: where ids are read, first found; rows are numbered where there is none.

    Raises:
        ValueError: a row without id, two rows of one id, or an image folder that does not exist.
    """

    def __init__(
        self,
        table: Table,
        build: Callable[[Row, str], Sample],
        *,
        label: str,
        id_columns: tuple[str, ...] = ("id",),
    ) -> None:
        self.table, self.build, self.label = table, build, label
        column = next((c for c in id_columns if c in table.columns), None)
        self._ids = None if column is None else checked_ids(table.column(column), f"{table.where}, column {column!r}")
        _check_image_folders(self, table)

    def __len__(self) -> int:
        return len(self.table)

    def sample_id(self, index: int) -> str:
        return f"{self.label}/{index if self._ids is None else self._ids[index]}"

    def draw(self, index: int, epoch: int) -> Sample:
        return self.build(self.table.row(index), self.sample_id(index))


class Subset(Source):
    """A view of some elements of a source.

    Args:
        source: any sequence of samples. indices: which of its elements, in this order.
    """

    def __init__(self, source: Sequence[Sample], indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.label, self.varies = getattr(source, "label", ""), getattr(source, "varies", False)

    def __len__(self) -> int:
        return len(self.indices)

    def sample_id(self, index: int) -> str:
        return id_at(self.source, self.indices[index])

    def draw(self, index: int, epoch: int) -> Sample:
        return draw(self.source, self.indices[index], epoch)


class Relabelled(Source):
    """A sequence of samples under a source's name.

    Args:
        source: any sequence of samples. label: its name in reports. prefix_ids: whether ids begin with the name too.
    """

    def __init__(self, source: Sequence[Sample], label: str, *, prefix_ids: bool) -> None:
        self.source, self.label, self.prefix_ids = source, label, prefix_ids
        self.varies = getattr(source, "varies", False)

    def __len__(self) -> int:
        return len(self.source)

    def sample_id(self, index: int) -> str:
        return self._id(id_at(self.source, index))

    def draw(self, index: int, epoch: int) -> Sample:
        sample = draw(self.source, index, epoch)
        return replace(sample, id=self._id(sample.id), source=self.label)

    def _id(self, id: str) -> str:
        return f"{self.label}/{id}" if self.prefix_ids else id


class Part:
    """A share of a source that does not change when samples are added or reordered.

    A sample belongs to it by a hash of its id alone. The source's label in it does not count, so that two stages may
    call their data by different names; nor does what stands behind a `#`, so that samples of one image stay together.
    Parts whose bounds do not overlap share no sample.

    Args:
        low, high: bounds in [0, 1], the first included; 0 to .75 is three quarters of the samples.
        seed: another seed is another division.

    Raises:
        ValueError: bounds that are none.
    """

    def __init__(self, low: float, high: float, *, seed: int = 0) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"part: bounds must satisfy 0 <= low < high <= 1, got [{low}, {high}]")
        self.low, self.high, self.seed = low, high, seed

    def of(self, source: Sequence[Sample]) -> Subset:
        """The part of a source.

        Raises:
            ValueError: no sample of it.
        """
        prefix = f"{getattr(source, 'label', '')}/"
        ids = (id_at(source, i).removeprefix(prefix).split("#")[0] for i in range(len(source)))
        indices = [i for i, id in enumerate(ids) if self.low <= hash_unit(self.seed, id) < self.high]
        if not indices:
            name = getattr(source, "label", "") or "the source"
            raise ValueError(f"{name} has {len(source)} samples, none of them in part [{self.low}, {self.high}]")
        return Subset(source, indices)


def hash_unit(seed: int, text: str) -> float:
    """A number in [0, 1) that follows from seed and text."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def id_at(source: Sequence[Sample], index: int) -> str:
    """The id of a sample, without building it where the source can tell."""
    return source.sample_id(index) if isinstance(source, Source) else source[index].id


def draw(source: Sequence[Sample], index: int, epoch: int) -> Sample:
    """The sample at `index` in walk `epoch`; any sequence of samples serves."""
    return source.draw(index, epoch) if isinstance(source, Source) else source[index]


def checked_ids(ids: list[Any], where: str) -> list[str]:
    """The ids as text.

    Raises:
        ValueError: a missing or a repeated one.
    """
    seen: dict[str, int] = {}
    for number, value in enumerate(ids):
        if value is None or value == "":
            raise ValueError(
                f"{where}: row {number} has no id; give it one, or number the rows by columns: {{id: null}}"
            )
        if str(value) in seen:
            raise ValueError(
                f"{where}: id {value!r} occurs twice (rows {seen[str(value)]} and {number}); make ids unique, "
                "or number the rows by columns: {id: null}"
            )
        seen[str(value)] = number
    return list(seen)


@dataclass(frozen=True)
class ImageFinder:
    """Turns what a row says about an image into something the encoder opens in a worker.

    Args:
        root: folder that relative paths start from. prefix: leading part of the paths to drop.
    """

    root: str | None
    prefix: str | None = None

    @classmethod
    def of(cls, spec: SourceSpec, default_root: Path | None) -> ImageFinder:
        """The finder of a source.

        Raises:
            ValueError: `images_root` is no folder.
        """
        if spec.images_root is None:
            return cls(None if default_root is None else str(default_root), spec.images_prefix)
        root = Path(spec.images_root).expanduser()
        if not root.is_dir():
            raise ValueError(f"images_root {spec.images_root!r} is not a folder; give the folder that holds the images")
        return cls(str(root), spec.images_prefix)

    def all(self, *values: Any) -> list[Any]:
        """Images of the columns' values: each None, one image, or a list of images (None entries left out)."""
        entries = [e for v in values for e in (v if isinstance(v, list) else [v])]
        return [self(e) for e in entries if e is not None]

    def __call__(self, value: Any) -> Any:
        """One image: a path with its folder, encoded bytes, a data URI as a callable; other objects as they are."""
        if isinstance(value, dict):  # how `datasets` stores an image
            if value.get("bytes") is not None:
                return value["bytes"]
            value = value.get("path") or ""
        if not isinstance(value, str):
            return value
        if value.startswith("data:"):
            return partial(_data_uri_image, value)
        if value.startswith(("http://", "https://")):
            return value  # not fetched: the encoder reports it as missing
        path = value.removeprefix("file://")
        if self.prefix is not None and path.startswith(self.prefix):
            path = path[len(self.prefix) :].lstrip("/")
        return path if os.path.isabs(path) or self.root is None else os.path.join(self.root, path)


def _data_uri_image(uri: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True)))


def _check_image_folders(source: RowSource, table: Table) -> None:
    """One missing image is a bad sample; when no folder of the first images exists, the settings are wrong."""
    paths: list[str] = []
    for index in range(min(_ROWS_LOOKED_AT, len(source))):
        try:
            paths += [i for i in source[index].images if isinstance(i, str) and not i.startswith("http")]
        except BadSample:  # reported when it is drawn
            continue
    if paths and not any(os.path.isdir(os.path.dirname(p) or ".") for p in paths):
        raise ValueError(
            f"image folder {os.path.dirname(paths[0]) or '.'} does not exist (first image of {table.where}); "
            "set images_root to the folder that the image paths start from, and images_prefix to what to drop from them"
        )


def _checked(index: int, size: int) -> int:
    position = index + size if index < 0 else index
    if not 0 <= position < size:
        raise IndexError(f"sample {index} of {size}")
    return position
