"""`lightning-vlm overlap TRAIN BENCHMARK`: what of a benchmark is in the training data."""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.cli import schema
from lightning_vlm.cli.arguments import Parser
from lightning_vlm.config.files import TOP_LEVEL, find_config, load, parse_yaml
from lightning_vlm.config.tree import Config, KeyPath
from lightning_vlm.data import pages
from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources import KINDS, SourceSpec, open_source
from lightning_vlm.data.sources.tables import open_table, read_json

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_vlm.data.overlap import Fingerprints, Match, Overlap

DESCRIPTION = """\
Find the samples of a benchmark whose picture or question is in the training data.

TRAIN and BENCHMARK are each one of
  KIND=PATH         any data kind: geometry3k=hiyouga/geometry3k, mathvista=DIR, sharegpt=chats.json
  KIND=PATH@SPLIT   one split of it: geometry3k=hiyouga/geometry3k@train
  PATH              the same without its kind, where the columns or files tell it
  FILE.yaml         named sources (NAME: {kind: ..., path: ...}), or the configuration of a run: what it trains on
                    for TRAIN; its benchmarks, or else what it predicts, for BENCHMARK
"""
EPILOG = """\
Pictures match pixel by pixel (image_exact), or by a perceptual hash that survives scaling, recompression and narrow
crops (image_perceptual); questions match when a user's turn holds the benchmark's (text), unless they say too little
to be told apart, such as "Find x.". For questions alone name the source in a YAML file with columns: {image: null}.
"""
# What a table must have to be taken for a kind.
_COLUMNS = {
    "mathvista": {"question", "question_type", "answer_type", "precision"},
    "mathvision": {"question", "options", "answer", "subject"},
    "preference": {"chosen", "rejected"},
    "sharegpt": {"conversations"},
    "messages": {"messages"},
    "geometry3k": {"problem", "answer", "images"},
}
_PAGE_ROWS, _PAGE_TEXT, _PAGE_SIDE = 200, 600, 240  # pairs, characters, pixels


def main(command: str, argv: list[str]) -> int:
    """Compare, print what was found, and write what --out asks for; 0 whatever is found."""
    args = _parser(command).parse_args(argv)
    for name, least in (("threshold", 0), ("jobs", 1), ("limit", 1), ("show", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if args.out is not None and args.out.exists():
        raise ValueError(f"--out {args.out} is there already: choose another directory, or remove it")

    from lightning_vlm.data.overlap import THRESHOLD, find_overlap

    opened = [
        opened_sources(argument, side=side, limit=args.limit)
        for side, argument in (("BENCHMARK", args.benchmark), ("TRAIN", args.train))
    ]
    benchmark = _read(opened[0], "BENCHMARK", args)
    train = _read(opened[1], "TRAIN", args)
    threshold = THRESHOLD if args.threshold is None else args.threshold
    overlap = find_overlap(train, benchmark, threshold=threshold)
    if args.out is not None:
        _write(args.out, overlap, {"train": args.train, "benchmark": args.benchmark, "limit": args.limit})
    _show(overlap, args)
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(command, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("train", metavar="TRAIN", help="what is trained on")
    add("benchmark", metavar="BENCHMARK", help="what must not be in it")
    add("--out", type=Path, metavar="DIR", help="write matches.jsonl, leave_out.txt, summary.json and matches.html")
    add("--threshold", type=int, metavar="N", help="largest distance of two copies in bits of 256 (default 32)")
    add("--show", type=int, default=5, metavar="N", help="matches to print (default 5)")
    add("--limit", type=int, metavar="N", help="only the first N samples of each source")
    add("--jobs", type=int, metavar="N", help="threads that decode pictures (default: the number of processors)")
    add("--skip_bad", action="store_true", help="go on after what cannot be read, and list it")
    return parser


def opened_sources(argument: str, *, side: str, limit: int | None = None) -> list[Any]:
    """The sources that an argument of the command names.

    Args:
        argument: in one of the forms of the help text. side: `TRAIN`, where test-only data are refused, or `BENCHMARK`.
        limit: only the first so many samples of each source.

    Raises:
        ValueError: in one line what is wrong with it, and how to mend it.
    """
    sources = []
    try:
        for spec in named_specs(argument, side):
            if spec.kind in KINDS and "instruction" in KINDS[spec.kind].uses:
                spec = replace(spec, instruction="")  # it is the same for all samples, and no part of the question
            if limit is not None:
                spec = replace(spec, limit=min(limit, spec.limit or limit))
            sources.append(open_source(spec, for_training=side == "TRAIN"))
    except ValueError as err:
        raise ValueError(f"{side}: {err}") from err
    return sources


def named_specs(argument: str, side: str) -> list[SourceSpec]:
    if argument.endswith((".yaml", ".yml")):
        return _from_yaml(argument, side)
    kind, given, rest = argument.partition("=")
    if not given or Path(argument).exists():
        kind, given, rest = "", "", argument
    path, split = rest, None
    if "@" in rest and not Path(rest).exists():
        path, _, split = rest.rpartition("@")
    if given:
        return [SourceSpec(kind=kind, path=path or None, split=split)]
    if Path(path).exists():
        return [SourceSpec(kind=_kind_of(Path(path), split), path=path, split=split)]
    raise ValueError(f"no file or folder {path!r}; {_say_kind(path)}")


def _say_kind(path: str) -> str:
    return f"give a data set of the hub, or what a path holds, as KIND={path}, KIND one of {', '.join(KINDS)}"


def _kind_of(path: Path, split: str | None) -> str:
    """The kind of a path without one, by its files or its columns.

    Raises:
        ValueError: nothing known, or several.
    """
    if path.is_dir():
        folder = path / split if split and (path / split).is_dir() else path
        if any(any(folder.glob(name)) for name in ("*/data.json", "*/ex.json")):
            return "geometry3k"
        if any(any(path.glob(name)) for name in ("*/request.json", "processed/*/request.json")):
            return "mmvp"
    elif path.suffix == ".json":
        content = read_json(path, rows=False)
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            return "coco"
    columns = open_table(SourceSpec(kind="qa", path=str(path), split=split), default_split="testmini").columns
    kinds = [kind for kind, needed in _COLUMNS.items() if needed <= set(columns)]
    if not kinds and "answer" in columns and {"question", "problem"} & set(columns):
        kinds = ["qa"]
    if len(kinds) != 1:
        found = f"may be {' or '.join(kinds)}" if kinds else "is of no kind that is known by its columns"
        raise ValueError(f"{path} {found} (it has: {', '.join(columns)}); {_say_kind(str(path))}")
    return kinds[0]


def _from_yaml(name: str, side: str) -> list[SourceSpec]:
    """The sources of a file of named ones, or of a run's configuration."""
    file = find_config(name)
    tree, origins = parse_yaml(file.read_text(), name)
    if isinstance(tree, dict) and tree and not tree.keys() & TOP_LEVEL.keys():
        config = Config()
        config.merge(tree, origins)
        config.resolve()
        return _named(config, ())
    config = load([name])
    if side == "TRAIN":
        specs = _named(config, ("data", "init_args", "train"))
    else:
        specs = _benchmarks(config) or _named(config, ("data", "init_args", "predict"))
    if not specs:
        wanted = "data.init_args.train" if side == "TRAIN" else "callbacks that evaluate, or data.init_args.predict"
        raise ValueError(f"{name} names no data for {side}: it needs {wanted}, or named sources NAME: {{kind: ...}}")
    return specs


def _named(config: Config, at: KeyPath) -> list[SourceSpec]:
    """Named sources; one without a label takes its name, as in a run."""
    specs = []
    for name, given in (config.at(at) or {}).items() if at else config.tree.items():
        if not isinstance(given, dict):
            raise config.error((*at, name), f"expected a source, {{kind: ..., path: ...}}, got {given!r}")
        schema.check_arguments(SourceSpec, given, (*at, name), config)
        specs.append(SourceSpec(**{**given, "label": given.get("label") or name}))
    return specs


def _benchmarks(config: Config) -> list[SourceSpec]:
    """The sources of the callbacks that evaluate, labelled as the run labels them."""
    named = {name: given for name, given in (config.tree.get("callbacks") or {}).items() if given is not None}
    if not named:
        return []
    # Only the callbacks know what they evaluate; they bring Lightning along.
    from lightning.pytorch import Callback

    from callbacks.benchmarks import Benchmarks, HeldOutLoss
    from lightning_vlm.cli.app import instantiate

    specs = []
    for name, given in named.items():
        place = ("callbacks", name)
        cls = schema.resolve_class(name, "callbacks", Callback, f"callbacks.{name} (set in {config.origin(place)})")
        if issubclass(cls, Benchmarks | HeldOutLoss):
            schema.check_arguments(cls, given, place, config)
            callback = instantiate(cls, given)
            specs += (
                [callback.source] if isinstance(callback, HeldOutLoss) else [s.source for s in callback.specs.values()]
            )
    return specs


def _read(sources: list[Any], side: str, args: argparse.Namespace) -> Fingerprints:
    from rich.console import Console
    from rich.progress import track

    from lightning_vlm.data.overlap import fingerprint

    bar = Console(stderr=True)

    def shown(items: Iterable[Any], total: int) -> Iterable[Any]:
        return track(items, f"reading {side}", total, console=bar, transient=True, disable=not bar.is_terminal)

    try:
        return fingerprint(sources, jobs=args.jobs, skip_bad=args.skip_bad, track=shown)
    except BadSample as bad:
        raise ValueError(f"{side}: {bad} (mend it, or go on without such samples by --skip_bad)") from bad


def _show(overlap: Overlap, args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    found = overlap.summary()
    for side, argument in (("benchmark", args.benchmark), ("train", args.train)):
        console.print(
            f"{side:<10} {argument}: {found[side]['samples']:,} samples, {found[side]['pictures']:,} pictures"
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("match")
    for column in ("samples of the benchmark", "share", "pairs"):
        table.add_column(column, justify="right")
    for kind, count in found["kinds"].items():
        table.add_row(kind, f"{count['samples']:,}", f"{100 * count['share']:.1f} %", f"{count['pairs']:,}")
    console.print("", table, "", sep="\n")
    if overlap.general:
        said = "sample shares" if len(overlap.general) == 1 else "samples share"
        console.print(
            f"not counted: {len(overlap.general):,} more {said} only a question that says too little by itself"
        )
    _show_bad(console, overlap)
    for match in overlap.matches[: args.show]:
        console.print(f"{overlap.benchmark.ids[match.benchmark]}  =  {overlap.train.ids[match.train]}  {_how(match)}")
    rest = len(overlap.matches) - args.show
    if rest > 0:
        console.print(f"... and {rest:,} more" + ("" if args.out else "; --out DIR writes all of them"))
    if args.out:
        console.print(f"all matches: {args.out / 'matches.jsonl'}; to look at: {args.out / 'matches.html'}")
        console.print(f"ids to leave out of the benchmark: {args.out / 'leave_out.txt'}")


def _show_bad(console: Console, overlap: Overlap) -> None:
    for side, given in (("BENCHMARK", overlap.benchmark), ("TRAIN", overlap.train)):
        if given.bad:
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(b.reason for b in given.bad).items())
            ids = ", ".join(b.id for b in given.bad[:5]) + (", ..." if len(given.bad) > 5 else "")
            console.print(f"not read: {len(given.bad)} of {side} ({reasons}): {ids}")


def _how(match: Match) -> str:
    kinds = ", ".join(match.kinds)
    return kinds.replace("image_perceptual", f"image_perceptual ({match.distance} of 256 bits)")


def _write(out: Path, overlap: Overlap, given: dict[str, Any]) -> None:
    """Written under another name and renamed, so that a folder that is there is whole."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in overlap.records())
    (temporary / "matches.jsonl").write_text(lines, encoding="utf-8")
    (temporary / "leave_out.txt").write_text("".join(f"{id}\n" for id in overlap.leave_out()), encoding="utf-8")
    summary = json.dumps({"arguments": given} | overlap.summary(), indent=2, ensure_ascii=False)
    (temporary / "summary.json").write_text(summary + "\n", encoding="utf-8")
    (temporary / "matches.html").write_text(_page(overlap, given), encoding="utf-8")
    os.replace(temporary, out)


def _page(overlap: Overlap, given: dict[str, Any]) -> str:
    """The pairs side by side, those first that most need a person's judgement."""
    doubtful = sorted(overlap.matches, key=lambda m: (m.exact, -(m.distance or 0), m.text))
    rows = [
        pages.row([_how(m), _cell(overlap.benchmark, m.benchmark), _cell(overlap.train, m.train)])
        for m in doubtful[:_PAGE_ROWS]
    ]
    any_ = overlap.summary()["kinds"]["any"]
    said = f"{any_['samples']:,} samples of the benchmark ({100 * any_['share']:.1f} %) in {any_['pairs']:,} pairs"
    said += f"; shown are {len(rows):,}, the most doubtful first. Pictures match within {overlap.threshold} bits."
    return pages.page(f"{given['benchmark']} in {given['train']}", said, ("match", "benchmark", "training data"), rows)


def _cell(given: Fingerprints, position: int) -> str:
    source, index = given.origins[position]
    sample: Sample = source[index]
    text = "\n".join(
        "".join(p["text"] for p in m["content"] if p["type"] == "text") for m in sample.prompt() if m["role"] == "user"
    )
    text = text if len(text) <= _PAGE_TEXT else text[:_PAGE_TEXT] + " ..."
    pictures = "".join(_thumbnail(image) for image in sample.images)
    return f"{html.escape(sample.id)}<br>{pictures}<pre>{html.escape(text.strip())}</pre>"


def _thumbnail(image: Any) -> str:
    from lightning_vlm.data.images import BadImage, load_image

    try:
        picture = load_image(image)
    except BadImage as bad:
        return f"<p>{html.escape(str(bad))}</p>"
    picture.thumbnail((_PAGE_SIDE, _PAGE_SIDE))
    return pages.inline(picture)
