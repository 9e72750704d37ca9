"""`lightning-vlm score BENCHMARK FILE…`: scores of answers made elsewhere, with intervals."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.offline import OFFLINE, Given, Options
from lightning_vlm.benchmarks.report import scores_of, write_evaluation
from lightning_vlm.benchmarks.rule import Record, Rule, Summary
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.cli.arguments import Parser
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.metrics.statistics import DRAWS

_EXAMPLE = """examples:
  lightning-vlm score coco results.json --references dataset_coco.json --split test --out scores/coco
  lightning-vlm score mathvista output_bard.json --rule official-2023
  lightning-vlm score mathvision Qwen-VL-Max.jsonl --questions test.jsonl
  lightning-vlm score geometry3k predictions.jsonl --rule freeform
"""


def parser(command: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    forms = "\n".join(f"  {name:<11}{kind.help}; rules: {', '.join(kind.rules)}" for name, kind in OFFLINE.items())
    made = Parser(
        command,
        description="Score answers that were made elsewhere, with 95 % intervals.\n\nbenchmarks and their files "
        f"(JSON or JSONL; the first rule is the default):\n{forms}",
        epilog=_EXAMPLE,
    )
    made.add_argument("benchmark", help=f"one of {', '.join(OFFLINE)}")
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="answers; each file is scored by itself")
    made.add_argument("--rule", help="how answers are graded; every rule is another measure")
    made.add_argument(
        "--from",
        dest="column",
        choices=("response", "extraction"),
        help="mathvista: text that is graded (default: extraction for the official rules, response for `rules`)",
    )
    made.add_argument("--questions", type=Path, metavar="FILE", help="mathvision, mathvista: the gold answers")
    made.add_argument("--references", type=Path, metavar="FILE", help="coco: captions_*.json or dataset_coco.json")
    made.add_argument("--split", help="coco: split of Karpathy's references (default test)")
    made.add_argument("--subset", action="store_true", help="score what is there, though questions lack an answer")
    made.add_argument("--allow_empty", action="store_true", help="take empty outputs for answers (that are wrong)")
    made.add_argument("--by", nargs="+", metavar="KEY", help="print the breakdown by these keys, or `all`")
    made.add_argument("--out", type=Path, metavar="DIR", help="write scores.json, per_example.jsonl and so on there")
    made.add_argument("--jobs", type=int, help="processes that compare symbolically (default: cores, at most 8)")
    made.add_argument("--seed", type=int, default=0, help=f"of the bootstrap, {DRAWS:,} draws (default 0)")
    return made


def main(command: str, argv: list[str]) -> int:
    """Score every file, print the table, write what --out asks for."""
    args = parser(command).parse_args(argv)
    if args.benchmark not in OFFLINE:
        raise ValueError(f"unknown benchmark {args.benchmark!r}{one_of(args.benchmark, OFFLINE)}")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    rule = _rule(args)
    options = Options(
        column=_column(args, rule),
        questions=args.questions,
        references=args.references,
        split=args.split,
        subset=args.subset,
        allow_empty=args.allow_empty,
    )
    folders = _folders(args.out, args.files)
    read = [OFFLINE[args.benchmark].read(file, options) for file in args.files]  # all, before any is scored
    for file, given, folder in zip(args.files, read, folders, strict=True):
        records, summary = _score(rule, given, args)
        scores = scores_of(summary, rule.name, seed=args.seed)
        _print(file, rule, records, summary, scores, args)
        if folder is not None:
            conditions = {
                "benchmark": args.benchmark,
                "rule": rule.name,
                "file": str(file),
                "seed": args.seed,
            }
            _write(folder, records, summary, scores, conditions)
            print(f"written: {folder}")
    return 0


def _rule(args: argparse.Namespace) -> Rule:
    rules = OFFLINE[args.benchmark].rules
    chosen = next(iter(rules)) if args.rule is None else args.rule.removeprefix(f"{args.benchmark}/")
    if chosen not in rules:
        raise ValueError(f"--rule {args.rule}: {args.benchmark} has no such rule{one_of(chosen, rules)}")
    return RULES[rules[chosen]]


def _column(args: argparse.Namespace, rule: Rule) -> str:
    """The column that is graded, after what has no effect or no meaning is refused."""
    for name, given, benchmarks in (
        ("--from", args.column, ("mathvista",)),
        ("--questions", args.questions, ("mathvista", "mathvision")),
        ("--references", args.references, ("coco",)),
        ("--split", args.split, ("coco",)),
    ):
        if given and args.benchmark not in benchmarks:
            raise ValueError(f"{name} has no meaning for {args.benchmark}; it is for {' and '.join(benchmarks)}")
    official = rule.name.startswith("mathvista/official")
    if official and args.column == "response":
        raise ValueError(
            f"--rule {rule.name} --from response: the official rules grade an extraction that a judge made of the "
            "response; use --from extraction, or --rule rules for responses"
        )
    return args.column or ("extraction" if official else "response")


def _folders(out: Path | None, files: list[Path]) -> list[Path | None]:
    """Where each file's scores go: `out` itself for one file, a folder by its name for several."""
    if out is None:
        return [None] * len(files)
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a directory")
    if len(files) == 1:
        return [out]
    names = [file.stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"several files are named {name!r}: score them into different --out folders, one by one")
    return [out / name for name in names]


def _score(rule: Rule, given: list[Given], args: argparse.Namespace) -> tuple[list[Record], Summary]:
    from rich.console import Console
    from rich.progress import track

    answers = [(answer.output, answer.sample) for answer in given]
    graded = grade_all(rule, answers, workers=args.jobs)
    bar = Console(file=sys.stderr)
    shown = track(graded, f"grading {rule.name}", len(given), console=bar, transient=True, disable=not bar.is_terminal)
    records = [
        {"id": answer.sample.id, "sample": answer.draw, "output": answer.output, "gold": answer.sample.answer}
        | ({"finished": bool(answer.sample.info["finished"])} if "finished" in answer.sample.info else {})
        | record
        for answer, record in zip(given, shown, strict=True)
    ]
    return records, rule.summary(records)


def _print(
    file: Path, rule: Rule, records: list[Record], summary: Summary, scores: dict[str, Any], args: argparse.Namespace
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"\n[bold]{escape(str(file))}[/bold]: {rule.name}, n = {scores['n']:,}")
    table = Table("metric", Column("× 100", justify="right"), Column("95 % interval", justify="right"))
    for name, value in summary.metrics.items():
        if "/" in name or name == "n":
            continue
        low, high = scores["intervals"].get(name, (None, None))
        shown = f"{value:.0f} of {scores['n']:,}" if name == "empty" else f"{100 * value:.1f}"
        table.add_row(name, shown, "" if low is None else f"{100 * low:.1f} – {100 * high:.1f}")
    console.print(table)
    keys = list(rule.tracked) if args.by is None else list(summary.breakdown) if args.by == ["all"] else args.by
    for key in keys:
        if key not in summary.breakdown:
            if args.by is None:
                continue
            raise ValueError(f"--by {key}: the answers have no such key{one_of(key, summary.breakdown)}")
        rows = Table(f"by {key}", Column("accuracy, %", justify="right"), Column("n", justify="right"))
        for value, row in summary.breakdown[key].items():
            rows.add_row(value, f"{100 * row['accuracy']:.1f}", f"{row['n']:.0f}")
        console.print(rows)
    cut = sum(bool(record.get("timed_out")) for record in records)
    if cut:
        console.print(f"{cut} comparisons were cut off and count as wrong; they are marked `timed_out`.")
    console.print(f"Intervals: bootstrap over problems, {DRAWS:,} draws, seed {args.seed}.")


def _write(
    folder: Path, records: list[Record], summary: Summary, scores: dict[str, Any], conditions: dict[str, Any]
) -> None:
    """Write beside the folder first, so that what is there stays whole if something fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scores-") as temporary:
        write_evaluation(Path(temporary), records, summary, scores, conditions)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
