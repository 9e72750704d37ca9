"""`lightning-vlm compare A B ...`: which arm is better, by how much, and how sure that is."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_vlm.cli.arguments import Parser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lightning_vlm.studies import Comparison, Evaluation

WIDTH = 120
DESCRIPTION = """\
Compare runs by their per-example files: is one better, by how much, and how sure is that?

An input is a per-example file (one JSON object per line with at least `id` and `score`), a folder that holds one as
per_example.jsonl, or a run folder: then the last evaluation of --benchmark is taken. Higher scores are better.
  mlflow:NAME  a run, an experiment or a study by name or id, in $MLFLOW_TRACKING_URI or sqlite:///mlflow.db. Files come
               from the run's folder, else from its artifacts.
  study:DIR    a study by its folder.
An experiment or a study stands for all its runs that were evaluated on --benchmark; where several stages of a study
evaluate it, --stage says which. A study's arms are its own.

An arm is one recipe; its files come from different training seeds. Both are known from the conditions.json beside a
file or said by --arms (one per input, or one per file) and --seeds (one per file); where neither tells an arm, every
file is an arm of its own.
  one seed each      two checkpoints: compared problem by problem (McNemar's exact test for scores of 0 and 1, else
                     paired bootstrap). Says nothing about the recipes behind them.
  several seeds each two recipes: compared over the seeds' means (Welch's t; paired t where each seed's runs start
                     from the same model).
  one and several    no verdict.
With several pairs, p is adjusted by Holm's method."""
EXAMPLES = """\
examples:
  lightning-vlm compare runs/dpo runs/cw-dpo --benchmark geometry3k
  lightning-vlm compare runs/dpo-0 runs/dpo-1 runs/cw-0 runs/cw-1 --arms dpo dpo cw-dpo cw-dpo --seeds 0 1 0 1
  lightning-vlm compare sft.jsonl rl.jsonl --metric pass@8 --out comparison.json
  lightning-vlm compare mlflow:warm-start --stage after --benchmark sampled
  lightning-vlm compare mlflow:dpo-lr-search mlflow:cw-dpo-lr-search --arms dpo cw-dpo"""


def main(command: str, argv: list[str]) -> int:
    """Read the files, print tables and verdicts, write the JSON."""
    args = _parser(command).parse_args(argv)

    from lightning_vlm.studies import compare, group

    with tempfile.TemporaryDirectory(prefix="lvlm-compare-") as fetched:
        evaluations, arms = _read(args, Path(fetched))
    result = compare(
        group(evaluations, arms, args.seeds),
        metric=args.metric,
        pairing=args.pairing,
        common=args.common,
        across=args.across_conditions,
        alpha=args.alpha,
        seed=args.seed,
    )
    if args.out:
        _write(Path(args.out), result)
    show(result, args.where)
    if args.out:
        print(f"comparison: {args.out}")
    return 0


def _read(args: Namespace, fetched: Path) -> tuple[list[Evaluation], list[str]]:
    """All evaluations of all inputs, and the arms said for them.

    Args:
        args: of the command line. fetched: a folder for what comes from MLflow.
    """
    from lightning_vlm.studies import read_evaluation
    from lightning_vlm.studies.tracking import resolve

    where = dict(_key_value(given) for given in args.where)
    found = [resolve(given, fetched, benchmark=args.benchmark, stage=args.stage) for given in args.inputs]
    if args.stage is not None and not any(file.arm is not None for files in found for file in files):
        raise ValueError(f"--stage {args.stage}: no input is a study; leave it out")
    arms = list(args.arms)
    if len(arms) == len(found):
        arms = [arm for arm, files in zip(arms, found, strict=True) for _ in files]
    evaluations = []
    for file in (file for files in found for file in files):
        known = {key: value for key, value in (("arm", file.arm), ("seed", file.seed)) if value is not None}
        evaluations.append(replace(read_evaluation(file.path, where), **known))
    return evaluations, arms


def _key_value(given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not (key and equals and value):
        raise ValueError(f"--where takes KEY=VALUE, such as task=counting; got {given!r}")
    return key, value


def _parser(command: str) -> Parser:
    parser = Parser(
        command,
        usage=f"lightning-vlm {command} INPUT INPUT ... [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="per-example file, folder with one, run folder, mlflow:NAME, study:DIR",
    )
    add("--arms", nargs="+", default=[], metavar="NAME", help="arm of each input or file, in order")
    add("--seeds", nargs="+", default=[], type=int, metavar="N", help="training seed of each file, in order")
    add("--benchmark", metavar="NAME", help="of run folders (default: the only one there is)")
    add("--stage", metavar="NAME", help="of studies (default: the only one that evaluates the benchmark)")
    add("--where", nargs="+", default=[], metavar="KEY=VALUE", help="only examples of these groups: task=counting")
    add("--metric", default="score", help="score (default): mean over the draws of a problem; or pass@K")
    pairing = parser.add_mutually_exclusive_group()
    add_pairing = pairing.add_argument
    add_pairing("--paired", dest="pairing", action="store_const", const="paired", help="compare recipes seed by seed")
    add_pairing("--unpaired", dest="pairing", action="store_const", const="unpaired", help="compare recipes by Welch")
    parser.set_defaults(pairing="auto")
    add("--common", action="store_true", help="compare the problems that all files share, where they differ")
    add("--across_conditions", action="store_true", help="compare although prompt or sampling settings differ")
    add("--alpha", type=float, default=0.05, help="a difference counts if p is at most this (default 0.05)")
    add("--seed", type=int, default=0, help="of the bootstrap draws (default 0)")
    add("--out", metavar="FILE", help="write everything as JSON, scores as in the files")
    return parser


def show(result: Comparison, where: Sequence[str] = (), console: Console | None = None) -> None:
    """Print a comparison.

    Args:
        result: what was compared. where: groups that it is restricted to. console: where to; the terminal, at most 120
            columns wide, by default.
    """
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console(highlight=False)
        console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    told = [f"{result.problems:,} problems", *where, f"metric {result.metric}"]
    told += [f"rule {', '.join(result.rules) or 'not told'}", f"prompt {', '.join(result.prompts) or 'not told'}"]
    for block in (Text(", ".join(told)), _arms(result), _pairs(result)):
        console.print(block)
        console.print()
    for pair in result.pairs:
        text = _wrapped(pair.sentence, console.width)
        console.print(Text(text, style="bold" if pair.verdict == "better" else ""))
    console.print()
    for note in result.notes:
        text = _wrapped(f"  {note}", console.width)
        console.print(Text(text, style="dim"))


def _wrapped(text: str, width: int) -> str:
    """Lines after the first are indented further than it; names are not broken."""
    indent = " " * (2 + len(text) - len(text.lstrip()))
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _table(*columns: str) -> Table:
    """A table of numbers; the first column is text, and so are `test` and `files`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        is_text = index == 0 or column in ("test", "files")
        table.add_column(Text(column), justify="left" if is_text else "right", overflow="fold")
    return table


def _arms(result: Comparison) -> Table:
    from rich.text import Text

    from lightning_vlm.studies.per_example import short_names

    unit = result.unit
    columns = ["arm", "seeds", f"mean{unit.of_scores}", "95 % interval", f"sd of seeds{unit.of_differences}"]
    files = short_names([Path(os.path.abspath(run.evaluation.path)) for arm in result.arms for run in arm.runs])
    named = files == [arm.name for arm in result.arms]  # arms named by their files need no column for them
    table = _table(*columns, *([] if named else ["files"]))
    rest = iter(files)
    for arm in result.arms:
        mean, *_ = unit.numbers(arm.mean)
        (spread,) = unit.numbers(arm.seed_sd)
        cells = [arm.name, str(len(arm.runs)), mean, unit.interval(arm.low, arm.high), spread]
        cells += [] if named else [", ".join(islice(rest, len(arm.runs)))]
        table.add_row(*map(Text, cells))
    return table


def _pairs(result: Comparison) -> Table:
    from rich.text import Text

    from lightning_vlm.studies.wording import p_value, required

    unit, several = result.unit, result.tested > 1
    p_columns = ["p alone", "p (Holm)"] if several else ["p"]
    table = _table("difference", unit.word.strip() or "score", "95 % interval", *p_columns, "test", "needed")
    for pair in result.pairs:
        found = pair.result
        diff, *_ = unit.numbers(found.diff, found.low, found.high)
        p = p_value(pair.p_adjusted, result.alpha)
        alone = [p_value(found.p, result.alpha)] if several else []
        interval = unit.interval(found.low, found.high, found.diff)
        cells = (f"{pair.a} − {pair.b}", diff, interval, *alone, p, pair.test or "none", required(pair) or "–")
        table.add_row(*map(Text, cells))
    return table


def _write(path: Path, result: Comparison) -> None:
    """Written under another name and renamed, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
