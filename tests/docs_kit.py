"""Code blocks, commands and tables of a documentation page, for tests that run what the page shows."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning_vlm.cli.main import main
from lightning_vlm.data.sources import KINDS

# What an example leaves to the reader: a small model, few samples, one process, two steps.
SMALL = """\
backbone: {path: "embedded:qwen2_5_vl-tiny", max_pixels: null}
data: {init_args: {batch_size: 4, workers: 0}}
trainer:
  {accelerator: cpu, devices: 1, strategy: auto, precision: 32-true, max_epochs: -1, max_steps: 2, log_every_n_steps: 1}
callbacks: {Progress: null}
logger: {CSV: {}, MLFlow: null, TensorBoard: null}
"""
REPOSITORY = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.\w+)\n")
_SPAN = re.compile(r"`([^`]+)`")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: after the fence. text: without the fences. file: the name that its first line gives, as a comment;
            empty where it gives none. section: the nearest heading above, without its marks.
    """

    language: str
    text: str
    file: str
    section: str


def page(name: str) -> str:
    """The text of docs/NAME."""
    return (REPOSITORY / "docs" / name).read_text()


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(text):
        headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text[: match.start()]), re.MULTILINE)
        file = _FILE.match(match[2])
        found.append(Block(match[1], match[2], file[1] if file else "", headings[-1] if headings else ""))
    return found


def write(found: Iterable[Block], folder: Path) -> dict[str, Block]:
    """Write the blocks that name a file into `folder`; by name.

    Raises:
        ValueError: two blocks name one file.
    """
    written: dict[str, Block] = {}
    for block in found:
        if not block.file:
            continue
        if block.file in written:
            raise ValueError(f"two blocks of the page name {block.file}")
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        written[block.file] = block
    return written


def commands(text: str) -> list[str]:
    """Lines of the indented blocks, without the indentation."""
    return [line.strip() for line in _FENCE.sub("", text).splitlines() if line.startswith("    ")]


def tables(text: str) -> list[tuple[str, list[dict[str, str]]]]:
    """(nearest heading, rows by column heading) of each table."""
    found: list[tuple[str, list[dict[str, str]]]] = []
    heading, lines = "", []
    for line in [*_FENCE.sub("", text).splitlines(), ""]:
        if line.startswith("|"):
            lines.append(cells(line))
        elif lines:
            names, _, *rows = lines
            found.append((heading, [dict(zip(names, row, strict=True)) for row in rows]))
            lines = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def cells(line: str) -> list[str]:
    """The cells of a table's line; `\\|` is no border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def spans(cell: str) -> list[str]:
    """What stands in backticks."""
    return _SPAN.findall(cell)


def fit(*words: str, run_dir: str) -> list[dict[str, float]]:
    """Run `lightning-vlm fit` in this process and give what it logged, one mapping per line of the CSV logger."""
    assert main(["fit", *words, "--run_dir", run_dir]) == 0
    with Path(run_dir, "csv", "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    """The values logged under a name, in order."""
    return [row[name] for row in rows if name in row]


@contextmanager
def reader(folder: Path, monkeypatch: Any) -> Iterator[None]:
    """Work in a reader's folder: its modules can be imported, and are forgotten afterwards, as is what they added."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(folder))  # the command appends the folder, too: both are undone
    before, kinds = set(sys.modules), dict(KINDS)
    yield
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", [])]
        if any(str(place).startswith(str(folder)) for place in places):
            del sys.modules[name]
    KINDS.clear()
    KINDS.update(kinds)
