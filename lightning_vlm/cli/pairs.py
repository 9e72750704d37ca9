"""`lightning-vlm pairs`: preference data from a model's own answers, from edited captions, or from given negatives."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_vlm.cli.arguments import Parser
from lightning_vlm.cli.overlap import named_specs
from lightning_vlm.data.edits import KINDS
from lightning_vlm.data.pair_files import Pair, PairFile
from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.data.sources.base import id_at
from lightning_vlm.data.sources.spec import one_of

if TYPE_CHECKING:
    from lightning_vlm.cli.pair_makers import Maker

DESCRIPTION = """\
Write preference pairs (a prompt, a better and a worse answer) as JSONL, which the data kind `preference` reads.

  --answers FILE ...    a model's answers (`lightning-vlm predict`, any number per question), graded by --rule: a wrong
                        one is rejected, a right one or the gold text is chosen
  --edits               captions with one attribute, count, relation or object made wrong
  --negatives FILE ...  any worse answers by id, {"id": ..., "output" or "text": ...}, which are not graded

DATA is KIND=PATH or KIND=PATH@SPLIT (geometry3k=hiyouga/geometry3k@train, coco=dataset_coco.json@train), world@train
for the embedded world, or FILE.yaml with named sources NAME: {kind: ..., path: ...}.
"""
EPILOG = """examples:
  lightning-vlm pairs --answers answers.jsonl --data geometry3k=hiyouga/geometry3k@train --rule geometry3k/freeform \\
      --out pairs.jsonl
  lightning-vlm pairs --edits --data coco=coco/dataset_coco.json@train --kinds attribute,count --out pairs.jsonl
  lightning-vlm pairs --negatives beams.jsonl --data coco=coco/dataset_coco.json@train --as beam --out pairs.jsonl
"""
_CHUNK = 64  # samples whose answers are graded together


@dataclass
class _Report:
    """What was written."""

    pairs: Counter[str] = field(default_factory=Counter)  # kind of negative → pairs
    words: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, side) → words
    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    pictures: int = 0

    def add(self, pair: Pair) -> None:
        """Count a pair."""
        self.pairs[pair.negative] += 1
        for side in ("chosen", "rejected"):
            self.words[pair.negative, side] += len(getattr(pair, side).split())


def main(command: str, argv: list[str]) -> int:
    """Write the pairs and say how many of each kind there are, and how many samples have none."""
    args = _parser(command).parse_args(argv)
    _refuse_what_has_no_effect(args)
    file = PairFile(args.out, overwrite=args.overwrite)
    specs = _sources(args)
    maker = _maker(args)
    sources = [open_source(spec, for_training=True) for spec in specs]
    report = _Report()
    with file:
        for sample, pairs in _made(maker, sources, args, report):
            try:
                images = file.images(sample) if pairs else []
            except BadSample as bad:
                _bad(bad, args, report)
                continue
            for n, pair in enumerate(pairs):
                file.write(f"{sample.id}#{n}" if len(pairs) > 1 else sample.id, sample, images, pair)
                report.add(pair)
        if not report.pairs:
            file.discard()
            reasons = ", ".join(f"{count:,} {why}" for why, count in (maker.none + report.bad).items())
            raise ValueError(f"none of {report.samples:,} samples gives a pair ({reasons}): nothing is written")
        report.pictures = len(file.written)
        file.publish()
    _show(report, maker, file, args)
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(command, description=DESCRIPTION, epilog=EPILOG)
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--answers", nargs="+", type=Path, metavar="FILE", help="a model's answers, to be graded")
    form.add_argument("--edits", action="store_true", help="make captions wrong in one thing")
    form.add_argument("--negatives", nargs="+", type=Path, metavar="FILE", help="worse answers, not graded")
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DATA", help="prompts, images and gold texts")
    add("--label", metavar="NAME", help="first part of the data's ids, where the answers have another than the kind")
    add("--limit", type=int, metavar="N", help="only the first N samples of each source")
    add("--out", type=Path, required=True, metavar="FILE", help="the JSONL to write")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--skip_bad", action="store_true", help="go on after samples that cannot be used, and count them")
    add("--rule", help="answers: how they are graded, for example geometry3k/freeform")
    add(
        "--chosen",
        choices=("either", "right", "gold"),
        help="answers: a right one, the gold text, or a right one where there is one (default either)",
    )
    add(
        "--rejected",
        choices=("first", "worst", "all"),
        help="which wrong answer: the first, the one of lowest score, or a pair for each (default first)",
    )
    add("--unfinished", action="store_true", help="answers, negatives: use those that were cut off, too")
    add("--as", dest="name", metavar="NAME", help="answers, negatives: what the column `negative` says")
    add("--jobs", type=int, metavar="N", help="answers: processes that grade (default: cores, at most 8)")
    add("--kinds", metavar="KINDS", help=f"edits: some of {','.join(KINDS)} (default all)")
    add("--seed", type=int, metavar="N", help="edits: of the draws (default 0)")
    return parser


def _refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    form = "edits" if args.edits else "answers" if args.answers else "negatives"
    for name, forms in (
        ("rule", ("answers",)),
        ("chosen", ("answers",)),
        ("jobs", ("answers",)),
        ("rejected", ("answers", "negatives")),
        ("unfinished", ("answers", "negatives")),
        ("name", ("answers", "negatives")),
        ("kinds", ("edits",)),
        ("seed", ("edits",)),
    ):
        if getattr(args, name) not in (None, False) and form not in forms:
            option = "as" if name == "name" else name
            raise ValueError(f"--{option} has no effect with --{form}; it is for --{' and --'.join(forms)}")
    if args.negatives and args.rejected == "worst":
        raise ValueError("--rejected worst: negatives are not graded; choose first or all")
    for name in ("limit", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def _sources(args: argparse.Namespace) -> list[SourceSpec]:
    """The sources that --data names; the embedded world brings its own edits."""
    specs = []
    for argument in args.data:
        if argument == "world" or (argument.startswith("world@") and not Path(argument).exists()):
            argument = f"world={argument.removeprefix('world')}"
        specs += named_specs(argument, "TRAIN")
    if args.label is not None:
        if len(specs) > 1:
            raise ValueError(f"--label {args.label} is for one source, and --data names {len(specs)}")
        specs = [replace(specs[0], label=args.label)]
    labels = [spec.label or spec.kind for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two sources are named {label!r}: name them in a YAML file, NAME: {{kind: ..., path: ...}}"
            )
    if args.edits and any(spec.kind == "world" for spec in specs):
        for name in ("kinds", "seed"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} has no effect on the embedded world, which makes its own edits by the seed in its "
                    "options: leave it out"
                )
        own = {"families": ["caption"], "pairs": True}
        specs = [replace(s, options=s.options | own) if s.kind == "world" else s for s in specs]
    return specs


def _maker(args: argparse.Namespace) -> Maker:
    from lightning_vlm.benchmarks.rules import RULES
    from lightning_vlm.cli.pair_makers import Answers, Edits, Negatives

    if args.edits:
        kinds = KINDS if args.kinds is None else [kind.strip() for kind in args.kinds.split(",") if kind.strip()]
        return Edits(kinds, args.seed or 0)
    more = {"name": args.name, "unfinished": args.unfinished}
    if args.negatives:
        return Negatives(args.negatives, every=args.rejected == "all", **more)
    if args.rule is None:
        raise ValueError(f"--answers need a --rule by which they are graded: {', '.join(RULES)}")
    if args.rule not in RULES:
        raise ValueError(f"unknown rule {args.rule!r}{one_of(args.rule, RULES)}")
    chosen, rejected = args.chosen or "either", args.rejected or "first"
    return Answers(args.answers, rule=RULES[args.rule], chosen=chosen, rejected=rejected, jobs=args.jobs, **more)


def _made(
    maker: Maker, sources: Sequence[Sequence[Sample]], args: argparse.Namespace, report: _Report
) -> Iterator[tuple[Sample, list[Pair]]]:
    """Samples with their pairs, in the order of the data."""
    from rich.console import Console
    from rich.progress import track

    wanted = [[i for i in range(len(source)) if maker.wants(id_at(source, i))][: args.limit] for source in sources]
    maker.check(id_at(sources[0], 0))
    places = [(source, i) for source, indices in zip(sources, wanted, strict=True) for i in indices]
    bar = Console(stderr=True)
    waiting: list[Sample] = []
    shown = track(places, "making pairs", console=bar, transient=True, disable=not bar.is_terminal)
    for source, index in shown:
        report.samples += 1
        try:
            waiting.append(source[index])
        except BadSample as bad:
            _bad(bad, args, report)
        if len(waiting) == _CHUNK:
            yield from zip(waiting, maker.pairs(waiting), strict=True)
            waiting = []
    yield from zip(waiting, maker.pairs(waiting), strict=True)


def _bad(bad: BadSample, args: argparse.Namespace, report: _Report) -> None:
    if not args.skip_bad:
        raise ValueError(f"{bad} (mend it, or go on without such samples by --skip_bad)") from bad
    report.bad[f"unusable ({bad.reason})"] += 1


def _show(report: _Report, maker: Maker, file: PairFile, args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    seed = f", seed {args.seed or 0}" if args.edits else ""
    pairs = sum(report.pairs.values())
    console.print(f"{file.out}: {pairs:,} pairs from {report.samples:,} samples{seed}")
    if report.pictures:
        console.print(f"{file.folder}: {report.pictures:,} pictures")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("negative")
    for column in ("pairs", "words of chosen", "of rejected"):
        table.add_column(column, justify="right")
    for kind, count in sorted(report.pairs.items()):
        means = (f"{report.words[kind, side] / count:.1f}" for side in ("chosen", "rejected"))
        table.add_row(kind, f"{count:,}", *means)
    console.print("", table, "", sep="\n")
    for said, reasons in (("without a pair", maker.none + report.bad), ("answers not used", +maker.unused)):
        if reasons:
            console.print(f"{said}: " + ", ".join(f"{count:,} {why}" for why, count in reasons.most_common()))
