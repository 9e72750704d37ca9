"""Tables of rows: JSON and JSONL in memory, parquet and hub data sets memory-mapped, images never decoded."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_vlm.data.sources.spec import SourceSpec, one_of

Row = dict[str, Any]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".jsonl", ".json", ".parquet")


class JsonTable:
    """Rows kept as one block of JSON text, parsed on access: cheap to hold, and shared by worker processes.

    Args:
        rows: the rows, as objects or as their JSON text.
        where: the file, for messages.
        root: folder that relative image paths start from.
    """

    def __init__(self, rows: Iterable[Row | bytes], where: str, root: Path | None) -> None:
        self.where, self.root = where, root
        self._blob, self._ends, columns = bytearray(), array("Q", [0]), {}
        for row in rows:
            if isinstance(row, bytes):
                text, row = row, json.loads(row)
            else:
                text = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
            columns.update(dict.fromkeys(row))
            self._blob += text
            self._ends.append(len(self._blob))
        self.columns = list(columns)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def row(self, index: int) -> Row:
        """The row at `index`."""
        return json.loads(self._blob[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass"))

    def column(self, name: str) -> list[Any]:
        """One column of all rows; None where a row lacks it."""
        return [self.row(i).get(name) for i in range(len(self))]


class ArrowTable:
    """Rows of a `datasets.Dataset`; images come as {"bytes", "path"}, as they are stored.

    Args:
        dataset: the data set. where: its name or file, for messages. root: folder that relative image paths start from.
    """

    def __init__(self, dataset: Any, where: str, root: Path | None) -> None:
        self.where, self.root, self.columns = where, root, list(dataset.column_names)
        # Arrow's own objects skip the decoding that the features would start.
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> Row:
        """The row at `index`."""
        return self._dataset[index : index + 1].to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        """One column of all rows."""
        return self._dataset.select_columns([name])[:][name].to_pylist()


class RenamedTable:
    """A table read under this project's column names.

    Args:
        table: the table as it is stored.
        columns: our name → their name; None hides a column.

    Raises:
        ValueError: a column that does not exist.
    """

    def __init__(self, table: JsonTable | ArrowTable, columns: dict[str, str | None]) -> None:
        for ours, theirs in columns.items():
            if theirs is not None and theirs not in table.columns:
                raise ValueError(
                    f"columns: {{{ours}: {theirs}}}: {table.where} has no column {theirs!r}"
                    f"{one_of(theirs, table.columns)}"
                )
        self._table, self._names, self.where, self.root = table, columns, table.where, table.root
        hidden = {ours for ours, theirs in columns.items() if theirs is None}
        self.columns = [c for c in dict.fromkeys([*table.columns, *columns]) if c not in hidden]

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Row:
        """The row at `index`, under our names."""
        row = self._table.row(index)
        return {c: row[self._names.get(c, c)] for c in self.columns if self._names.get(c, c) in row}

    def column(self, name: str) -> list[Any]:
        """One column of all rows, by our name."""
        return self._table.column(self._names.get(name) or name)


Table = JsonTable | ArrowTable | RenamedTable


def require(table: Table, name: str, *aliases: str, remedy: str = "") -> str:
    """The first of the names that is a column.

    Raises:
        ValueError: none is; names the columns there are, the nearest one, and how to name another.
    """
    for candidate in (name, *aliases):
        if candidate in table.columns:
            return candidate
    near = one_of(name, table.columns)
    near = near if "did you mean" in near else ""
    raise ValueError(
        f"{table.where} has no column {name!r} (it has: {', '.join(table.columns)}){near}; "
        f"{remedy}name another column by columns: {{{name}: THEIR_NAME}}"
    )


def read_json(file: Path, *, rows: bool = True) -> Any:
    """Parse a JSON file; with `rows`, a list of objects (or an object of objects, whose keys become `id`).

    Raises:
        ValueError: not JSON (file:line), or of another shape.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; one object per line? Name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from error
    if not rows:
        return content
    if isinstance(content, dict) and content and all(isinstance(v, dict) for v in content.values()):
        content = [{"id": key, **value} for key, value in content.items()]
    if not isinstance(content, list):
        raise ValueError(f"{file}: expected a list of objects, found {type(content).__name__}")
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: entry {number} is {type(row).__name__}, expected an object")
    return content


def jsonl_rows(file: Path) -> Iterable[bytes]:
    """The lines of a JSONL file, each an object.

    Raises:
        ValueError: not JSON, not UTF-8, or no object (file:line).
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON: {error.msg} (column {error.colno})") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8 text (byte {error.start} of the line)") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{number}: {type(row).__name__}, expected an object")
            yield line


def existing_path(spec: SourceSpec) -> Path:
    """The local path of a source.

    Raises:
        ValueError: no path given, or nothing there; names the nearest entry of its folder.
    """
    if not spec.path:
        raise ValueError(f"source of kind {spec.kind!r} needs a `path`")
    path = Path(spec.path).expanduser()
    if not path.exists():
        here = path.parent
        while not here.exists():
            here = here.parent
        if here == path.parent and here.is_dir():
            near = one_of(path.name, sorted(p.name for p in here.iterdir()))
            hint = near if "did you mean" in near else ""
        else:
            hint = f"; its folder is missing too, {here} is the last that exists"
        raise ValueError(f"data path {spec.path!r} does not exist{hint}")
    return path


def open_table(spec: SourceSpec, *, default_split: str | None = None) -> Table:
    """The rows of a local file, a folder of files named by split, or a hub data set.

    Args:
        spec: where the data are.
        default_split: split of hub data sets and folders where the spec names none.

    Raises:
        ValueError: nothing there, several candidates, not loadable, a missing column, or no rows.
    """
    is_hub = bool(spec.path and _HUB_NAME.fullmatch(spec.path) and Path(spec.path).suffix not in _SUFFIXES)
    if is_hub and not Path(spec.path).exists() and not Path(spec.path).parent.exists():
        table: Table = _hub_table(spec, spec.split or default_split or "train")
    else:
        path = existing_path(spec)
        if spec.name is not None:
            raise ValueError(f"`name: {spec.name}` chooses a configuration of a hub data set, but {spec.path} is local")
        table = _file_table(*data_files(path, spec.split, default_split))
    if len(table) == 0:
        raise ValueError(f"{table.where} is empty: it has no rows; give a file that has some, or leave the source out")
    return RenamedTable(table, spec.columns)


def data_files(path: Path, split: str | None, default_split: str | None = None) -> tuple[list[Path], Path]:
    """The data files of a path and the folder that their image paths start from.

    A folder may hold `SPLIT.jsonl`, `SPLIT.json`, `SPLIT.parquet` or `SPLIT-*.parquet`, itself or under `data/`.

    Raises:
        ValueError: a split of a single file, no data file of that split, or several and no split named.
    """
    if path.is_file():
        if split is not None:
            raise ValueError(
                f"`split: {split}` needs a folder with one file per split, but {path} is one file; leave it out"
            )
        return [path], path.parent
    groups: dict[str, list[Path]] = {}
    for file in sorted([*path.iterdir(), *(path / "data").glob("*.parquet")]):
        if file.suffix in _SUFFIXES and file.is_file():
            groups.setdefault(re.sub(r"-\d+-of-\d+.*", "", file.stem), []).append(file)
    wanted = split or (default_split if default_split in groups else None)
    if wanted is None and len(groups) == 1:
        wanted = next(iter(groups))
    if wanted not in groups:
        found = f"it has {', '.join(groups)}" if groups else f"no {', '.join(_SUFFIXES)} file is there"
        ask = (
            f"no data of split {split!r} in {path}"
            if split
            else f"{path} is not one data set; name a `split` or a file"
        )
        raise ValueError(f"{ask} ({found})")
    files = groups[wanted]
    if len({f.suffix for f in files}) > 1:
        raise ValueError(
            f"{path} has split {wanted!r} several times ({', '.join(f.name for f in files)}); name one file"
        )
    return files, path


def _file_table(files: Sequence[Path], root: Path) -> JsonTable | ArrowTable:
    file, where = files[0], str(files[0])
    if file.suffix == ".jsonl":
        return JsonTable(jsonl_rows(file), where, root)
    if file.suffix == ".json":
        return JsonTable(read_json(file), where, root)
    if file.suffix == ".parquet":
        return ArrowTable(
            _load_dataset("parquet", where, data_files=[str(f) for f in files], split="train"), where, root
        )
    raise ValueError(f"{file}: cannot read {file.suffix or 'a file without suffix'}; supported: {', '.join(_SUFFIXES)}")


def _hub_table(spec: SourceSpec, split: str) -> ArrowTable:
    return ArrowTable(_load_dataset(spec.path, f"data set {spec.path}", name=spec.name, split=split), spec.path, None)


def _load_dataset(path: str, what: str, **arguments: Any) -> Any:
    import datasets  # seconds to import, and JSON does without it

    try:
        return datasets.load_dataset(path, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        local = "" if path == "parquet" else " (it is no local path either)"
        raise ValueError(f"cannot load {what}{local}: {reason}") from error
