"""Arrays on disk by the content they were computed from: reference log-probs, frozen features.

A store is a folder. `manifest.json` says what all entries depend on (`facts`: weights, dtype, ...), and every writing
process appends to a shard of its own, `HOST-PID-RANDOM.bin` with `HOST-PID-RANDOM.idx` beside it. Bytes reach the disk
before the line of the index that names them, so a process killed at any moment leaves at worst a tail that nobody
reads, and writers on several hosts of a shared file system never touch each other's files. Ours.
"""

import json
import math
import os
import re
import secrets
import socket
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import torch

_ALIGNMENT = 64  # bytes: every entry starts on a cache line, whatever its dtype
_KINDS = "biufc"  # numpy's dtype kinds that are plain numbers
_MEND = "leave the setting out to compute it anew, or delete the folder"


def content_key(*parts: Any) -> str:
    """A key that two calls share exactly when their parts hold the same values in the same order.

    Type, dtype, shape and length are hashed with the values: `("ab", "c")` and `("a", "bc")`, `1`, `1.0` and `True`, a
    float32 zero and an int32 zero all differ. Lists and tuples are the same; so are mappings whatever their order.
    A tensor and a numpy array of equal values differ.

    Args:
        parts: str, bytes, int, float, bool, None, tensors of any dtype and device, numpy arrays of numbers, and
            sequences and mappings of these.

    Returns:
        32 hexadecimal digits (blake2b, 16 bytes).

    Raises:
        TypeError: A part is of another type.
    """
    return _digest(parts).hex()


def default_root() -> Path:
    """Where stores live unless a setting says otherwise: `$LVLM_CACHE`, else `~/.cache/lightning_vlm`."""
    return Path(os.environ.get("LVLM_CACHE") or "~/.cache/lightning_vlm").expanduser()


class Store:
    """Arrays by key in `root/kind/HASH_OF_FACTS/`; opened where it exists, created where it does not.

    A store knows what was on disk when it was opened, what it has put itself, and what `refresh` has found since. It
    may be pickled, and used after a fork (each process writes its own shard), but not by several threads at once.

    Args:
        root: The folder of all stores, as `default_root`.
        kind: What the entries are, as "reference_logprobs".
        facts: What all entries depend on; stores of different facts lie in different folders.

    Raises:
        ValueError: The folder's manifest is missing, unreadable or of other facts; an index is damaged.
    """

    def __init__(self, root: str | Path, kind: str, facts: Mapping[str, str | int | float]):
        folder = Path(root).expanduser() / kind / content_key(dict(facts))[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").exists() and not any(folder.glob("*.idx")):
            _write_manifest(folder, kind, facts)
        self._open(folder, kind, facts)

    @classmethod
    def at(cls, folder: str | Path, kind: str, facts: Mapping[str, str | int | float]) -> Self:
        """Open the store that lies in `folder`, made elsewhere; nothing is created.

        Raises:
            ValueError: It has no manifest, an unreadable one, or one of another kind or other facts.
        """
        store = cls.__new__(cls)
        store._open(Path(folder).expanduser(), kind, facts)
        return store

    def _open(self, folder: Path, kind: str, facts: Mapping[str, str | int | float]) -> None:
        _check_manifest(folder, kind, facts)
        self.folder, self.kind, self.facts = folder, kind, dict(facts)
        self._entries: dict[str, _Entry] = {}
        self._read: dict[str, int] = {}  # shard -> bytes of its index already taken
        self._maps: dict[str, np.memmap] = {}
        self._checked: set[str] = set()
        self._writer: _Writer | None = None
        self.refresh()

    def __reduce__(self) -> tuple:
        return type(self).at, (self.folder, self.kind, self.facts)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> np.ndarray | None:
        """The array of this key, read-only and mapped from the file without a copy; None where the store has none.

        Its bytes are checked against their checksum the first time.

        Raises:
            ValueError: The entry is damaged, or of a dtype that numpy lacks (see `get_tensor`).
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.dtype.startswith("torch."):
            raise ValueError(f"entry {key} is of {entry.dtype}, which numpy lacks: read it with get_tensor")
        return np.ndarray(entry.shape, np.dtype(entry.dtype), buffer=self._bytes(key, entry))

    def get_tensor(self, key: str) -> torch.Tensor | None:
        """The entry of this key as a tensor of its own in memory (a copy: a tensor cannot be read-only), or None.

        Raises:
            ValueError: The entry is damaged.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not entry.dtype.startswith("torch."):
            return torch.from_numpy(np.array(self.get(key)))
        values = torch.empty(math.prod(entry.shape), dtype=_torch_dtype(entry.dtype))
        values.view(torch.uint8).numpy()[:] = self._bytes(key, entry)
        return values.reshape(entry.shape)

    def nbytes(self, key: str) -> int:
        """Bytes of the entry of this key on the disk."""
        return self._entries[key].size()

    def put(self, arrays: Mapping[str, np.ndarray | torch.Tensor]) -> None:
        """Append these arrays; a key that the store knows already is left as it is.

        When it returns the entries are on disk and visible to every reader that opens or refreshes the store.

        Args:
            arrays: Key to array of numbers, or to tensor of any dtype and device.

        Raises:
            TypeError: A value is not an array of numbers.
            OSError: The file system refuses (full, read-only); what was put before stays readable.
        """
        new = {key: value for key, value in arrays.items() if key not in self._entries}
        if not new:
            return
        # A forked child must not append to its parent's shard.
        if self._writer is None or self._writer.process != os.getpid():
            self._writer = None
        try:
            self._writer = self._writer or _Writer(self.folder)
            self._writer.append(new)
        except OSError as error:
            self._abandon()
            reason = f"the store cannot be written, entries put before stay readable: {error.strerror or error}"
            raise OSError(error.errno, reason, str(self.folder)) from error
        except BaseException:
            self._abandon()
            raise
        self._take(self._writer.shard)

    def refresh(self) -> None:
        """Take up what other processes have put since the store was opened or last refreshed.

        Raises:
            ValueError: A whole line of an index is no entry: the file is damaged.
        """
        for index in sorted(self.folder.glob("*.idx")):
            self._take(index.stem)

    def close(self) -> None:
        """Close the shard being written and forget the mappings; arrays handed out stay valid."""
        self._abandon()
        self._maps.clear()

    def _abandon(self) -> None:
        """Write no more to the present shard: after a failure its index may end in half a line."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _take(self, shard: str) -> None:
        """Read the index of a shard from where it was left, up to its last whole line."""
        index, start = self.folder / f"{shard}.idx", self._read.get(shard, 0)
        with index.open("rb") as file:
            file.seek(start)
            text = file.read()
        data = self.folder / f"{shard}.bin"
        size = data.stat().st_size if data.exists() else 0
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                key, *fields = json.loads(line)
                entry = _Entry(shard, *fields[:2], tuple(fields[2]), *fields[3:])
                end = entry.offset + entry.size()
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(f"{index} is damaged at byte {start}: delete it and {data.name}") from error
            if end > size:  # on a shared file system the size may lag: try again at the next refresh
                break
            self._entries.setdefault(key, entry)
            start += len(line)
        self._read[shard] = start

    def _bytes(self, key: str, entry: "_Entry") -> np.ndarray:
        """The bytes of an entry as a slice of the mapped file, [nbytes] uint8, checked once."""
        size, path = entry.size(), self.folder / f"{entry.shard}.bin"
        if not size:  # an empty file cannot be mapped
            return np.frombuffer(b"", np.uint8)
        mapped = self._maps.get(entry.shard)
        if mapped is None or len(mapped) < entry.offset + size:
            mapped = np.memmap(path, np.uint8, "r")
            self._maps[entry.shard] = mapped
        data = mapped[entry.offset : entry.offset + size]
        if key not in self._checked:
            if len(data) != size or zlib.crc32(data) != entry.crc:
                raise ValueError(f"{path} is damaged (entry {key}): delete it, and its entries are computed anew")
            self._checked.add(key)
        return data


class _Entry(NamedTuple):
    """Where one array lies."""

    shard: str
    offset: int
    dtype: str  # numpy's string, as "<f4", or torch's name where numpy has none, as "torch.bfloat16"
    shape: tuple[int, ...]
    crc: int

    def size(self) -> int:
        """Bytes of the array."""
        width = _torch_dtype(self.dtype).itemsize if self.dtype.startswith("torch.") else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * width


class _Writer:
    """The shard of one process: data first, then the lines that name them."""

    def __init__(self, folder: Path):
        self.process = os.getpid()
        host = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())
        self.shard = f"{host}-{self.process}-{secrets.token_hex(4)}"
        # Unbuffered: what a failed write left behind must not be written later, by close or by a forked child.
        self._data: IO[bytes] = (folder / f"{self.shard}.bin").open("xb", buffering=0)
        self._index: IO[bytes] = (folder / f"{self.shard}.idx").open("xb", buffering=0)
        self._end = 0

    def append(self, arrays: Mapping[str, np.ndarray | torch.Tensor]) -> None:
        """Write the arrays and wait until they are on the disk, then write their lines."""
        end, lines = self._end, []
        try:
            for key, value in arrays.items():
                dtype, shape, data = _plain(value)
                gap = -end % _ALIGNMENT
                _write(self._data, bytes(gap))
                _write(self._data, data)
                lines.append(json.dumps([key, end + gap, dtype, shape, zlib.crc32(data)]) + "\n")
                end += gap + len(data)
            os.fsync(self._data.fileno())
        except BaseException:
            with suppress(OSError):
                self._data.truncate(self._end)  # nobody can read this tail: give its space back
            raise
        self._end = end
        _write(self._index, "".join(lines).encode())
        os.fsync(self._index.fileno())

    def close(self) -> None:
        self._data.close()
        self._index.close()


def _write(file: IO[bytes], data: Any) -> None:
    """All of the bytes: one unbuffered write may take only some of them."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _plain(value: np.ndarray | torch.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    """(name of the dtype, shape, bytes [nbytes] uint8) of an array or tensor."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype)
        data = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        with suppress(TypeError):  # numpy's own name where it has the dtype
            name = torch.empty(0, dtype=value.dtype).numpy().dtype.str
        return name, tuple(value.shape), data
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _KINDS:
        return value.dtype.str, value.shape, np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    raise TypeError(
        f"not an array of numbers or a tensor: {type(value).__name__} {getattr(value, 'dtype', '')}".strip()
    )


def _torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def _digest(value: Any) -> bytes:
    """16 bytes that stand for the type and the value; containers hash the digests of what they hold."""
    # bool before int: it is a subclass.
    if value is None or isinstance(value, bool):
        return _hash("constant", str(value).encode())
    if isinstance(value, str):
        return _hash("str", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes | bytearray):
        return _hash("bytes", value)
    if isinstance(value, int):
        return _hash("int", str(int(value)).encode())
    if isinstance(value, float):
        return _hash("float", float(value).hex().encode())
    if isinstance(value, torch.Tensor):
        _, shape, data = _plain(value)
        return _hash(f"tensor {value.dtype} {shape}", data)
    if isinstance(value, np.ndarray | np.generic):
        dtype, shape, data = _plain(value)
        return _hash(f"array {dtype} {shape}", data)
    if isinstance(value, Mapping):
        return _hash("mapping", b"".join(sorted(_digest(key) + _digest(item) for key, item in value.items())))
    if isinstance(value, Sequence):
        return _hash("sequence", b"".join(map(_digest, value)))
    raise TypeError(
        f"content_key cannot hash a {type(value).__name__}: pass text, numbers, arrays or containers of them"
    )


def _hash(kind: str, data: Any) -> bytes:
    # The kind holds no zero byte, so where it ends and the data begin is never in doubt.
    digest = blake2b(kind.encode() + b"\0", digest_size=16)
    digest.update(data)
    return digest.digest()


def _write_manifest(folder: Path, kind: str, facts: Mapping[str, str | int | float]) -> None:
    for name, value in facts.items():
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"fact {name} of a store must be text or a finite number: {value!r}")
    # Written whole, then named: a reader never sees half of it, and two creators write the same.
    part = folder / f"manifest.{secrets.token_hex(4)}.part"
    part.write_text(json.dumps({"kind": kind, "facts": dict(facts)}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(folder / "manifest.json")


def _check_manifest(folder: Path, kind: str, facts: Mapping[str, str | int | float]) -> None:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        there = {"kind of entries": manifest["kind"], **manifest["facts"]}
    except FileNotFoundError:
        raise ValueError(f"{folder} is no store of {kind}, it has no manifest.json: {_MEND}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): {_MEND}") from error
    here = {"kind of entries": kind, **facts}
    for name in sorted(here.keys() | there.keys()):
        if name not in there or name not in here or content_key(there[name]) != content_key(here[name]):
            values = [repr(side[name]) if name in side else "absent" for side in (there, here)]
            raise ValueError(f"{folder} was made with {name} {values[0]}, here it is {values[1]}: {_MEND}")
