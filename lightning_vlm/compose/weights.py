"""Safetensors files read and written tensor by tensor: a model of any size passes through the memory of one tensor."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Buffers that older releases wrote beside the weights; models make them anew.
_BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias)$")


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: its shape and dtype are known before it is read.

    Attributes:
        shape, dtype: of what `read` returns.
        read: reads or makes the tensor, anew at each call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> Piece:
        """The same tensor in another dtype, if it is a floating one; None leaves it as it is."""
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return Piece(self.shape, dtype, lambda: self.read().to(dtype))


@dataclass(frozen=True)
class Weights:
    """The tensors of a model directory.

    Attributes:
        directory: where they are.
        pieces: every tensor by the name it has in the files.
    """

    directory: Path
    pieces: dict[str, Piece]

    def unclaimed(self, claimed: Iterable[str]) -> list[str]:
        """Names that none of `claimed` covers, buffers left out."""
        return sorted(n for n in self.pieces.keys() - set(claimed) if not _BUFFERS.search(n))


def read_weights(directory: Path) -> Weights:
    """The tensors of a directory; only the headers of its files are read.

    Raises:
        ValueError: no safetensors files, a file of the index that is absent, or a broken one.
    """
    pieces: dict[str, Piece] = {}
    for file in _files(directory):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    part = opened.get_slice(name)
                    pieces[name] = _stored(file, name, part.get_shape(), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): fetch or copy it again") from error
    return Weights(directory, pieces)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ValueError(
                f"{directory} lacks {len(absent)} of {len(files)} weight files ({absent[0]}): copy them too"
            )
        return files
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ValueError(f"{directory} has {len(files)} safetensors files but no {INDEX}, which says what is where")
    if old := sorted(directory.glob("*.bin")):
        raise ValueError(
            f"{directory} has its weights in {old[0].name} only, a pickle that can neither be streamed nor trusted: "
            "give a directory with safetensors (load it with transformers and save_pretrained it)"
        )
    raise ValueError(f"{directory} has no *.safetensors files")


def _stored(file: Path, name: str, shape: list[int], code: str) -> Piece:
    if code not in _DTYPES:
        raise ValueError(f"{file}: tensor {name!r} is of type {code}, as quantised models have: give the full weights")

    def read() -> Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    return Piece(tuple(shape), _DTYPES[code], read)


@dataclass
class Found:
    """Where a part's tensors are.

    Attributes:
        pieces: by the part's own names, as the source spells them (transformers reads all its spellings).
        missing: names of the part that the source lacks.
        names: what the tensors are called in the files.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def find_part(weights: Weights, spellings: list[dict[str, tuple[int, ...]]], what: str) -> Found:
    """A part's tensors, under whatever prefix they have in the files.

    Args:
        weights: of the directory.
        spellings: {name: shape} of all the part's tensors, once for each way of writing them.
        what: the part, for errors.

    Raises:
        ValueError: none of the part's tensors there, two copies of it, or a tensor of another shape.
    """
    best: tuple[int, str, dict[str, tuple[int, ...]]] | None = None
    whole: set[str] = set()
    for spelling in spellings:
        for prefix in _prefixes(weights, spelling):
            share = sum(prefix + name in weights.pieces for name in spelling)
            if share == len(spelling):
                whole.add(prefix)
            if best is None or share > best[0]:
                best = (share, prefix, spelling)
    if best is None or best[0] == 0:
        wanted = next(iter(spellings[0]))
        raise ValueError(f"{weights.directory} holds no {what}: no tensor of it is called ...{wanted}")
    if len(whole) > 1:
        raise ValueError(f"{weights.directory} holds more than one {what}: under {', '.join(map(repr, sorted(whole)))}")
    _, prefix, spelling = best
    found = Found()
    for name, shape in spelling.items():
        piece = weights.pieces.get(prefix + name)
        if piece is None:
            found.missing.append(name)
        elif piece.shape != shape:
            raise ValueError(
                f"{weights.directory}: tensor {prefix + name!r} is {list(piece.shape)}, config.json implies "
                f"{list(shape)}: is config.json another model's?"
            )
        else:
            found.pieces[name] = piece
            found.names.append(prefix + name)
    return found


def _prefixes(weights: Weights, spelling: Mapping[str, Any]) -> set[str]:
    names = list(spelling)
    anchors = {names[0], names[len(names) // 2], names[-1]}
    ends = [(key, name) for key in weights.pieces for name in anchors if key.endswith(name)]
    prefixes = {key.removesuffix(name) for key, name in ends}
    return {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}


def check_whole(found: Found, directory: Path, what: str) -> None:
    """Refuses a part of which tensors are missing.

    Raises:
        ValueError: how many, and three of them.
    """
    if found.missing:
        raise ValueError(
            f"{directory}: {len(found.missing)} of {len(found.missing) + len(found.pieces)} tensors of the {what} are "
            f"missing ({', '.join(found.missing[:3])}): config.json asks for them; was the directory copied whole?"
        )


def parse_size(text: str) -> int:
    """Bytes of a size such as `4GB`, `500MB`, `1.5GiB`.

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or found[1].count(".") > 1 or not found[1].strip("."):
        raise ValueError(f"max_shard_size {text!r} is no size: write it like 4GB or 500MB")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 1:
        raise ValueError(f"max_shard_size {text!r} leaves no room for a tensor: write it like 4GB")
    return size


def check_space(out: Path, pieces: Mapping[str, Piece]) -> None:
    """Refuses what does not fit the disk, before anything is written.

    Raises:
        ValueError: bytes needed and free.
    """
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    need, free = sum(piece.nbytes for piece in pieces.values()), shutil.disk_usage(place).free
    if need + 2**26 > free:  # 64 MiB for tokenizer and configuration
        raise ValueError(
            f"{out} needs {need / 2**30:.2f} GiB, {place} has {free / 2**30:.2f} GiB free: free some space, or choose "
            "another --out"
        )


def write_weights(pieces: Mapping[str, Piece], out: Path, *, max_shard_size: int = 4 * 10**9) -> None:
    """Write tensors as safetensors, holding one tensor at a time.

    Args:
        pieces: by the names they get.
        out: a directory.
        max_shard_size: bytes of one file's tensors; a larger tensor has a file of its own. More than one file gets an
            index, as transformers writes it.

    Raises:
        OSError: the disk is full.
    """
    shards: list[dict[str, Piece]] = [{}]
    size = 0
    for name, piece in pieces.items():
        if shards[-1] and size + piece.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = piece
        size += piece.nbytes
    count = len(shards)
    files = [
        f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(1, count + 1)
    ]
    total = sum(piece.nbytes for piece in pieces.values())
    with _progress(f"writing {out.name.strip('.').removesuffix('.tmp')}", total) as advance:
        for file, shard in zip(files, shards, strict=True):
            _write_file(out / file, shard, advance)
    if count > 1:
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, pieces: Mapping[str, Piece], advance: Callable[[int], None]) -> None:
    # Wide types first, so that every tensor starts at a multiple of its item's size.
    ordered = sorted(pieces.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, piece in ordered:
        place = [at, at + piece.nbytes]
        header[name] = {"dtype": _CODES[piece.dtype], "shape": list(piece.shape), "data_offsets": place}
        at += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, piece in ordered:
            tensor = piece.read()
            if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
                raise AssertionError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {piece}")
            if piece.nbytes:
                stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            advance(piece.nbytes)


@contextmanager
def _progress(what: str, total: int):
    """A bar over bytes on a terminal; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
