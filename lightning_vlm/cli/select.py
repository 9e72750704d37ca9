"""`lightning-vlm select`: the samples of a round, by their reward score and by what the previous model got wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.cli.arguments import Parser
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.data.sources.tables import jsonl_rows

if TYPE_CHECKING:
    from lightning_vlm.distill.selection import Selection

DESCRIPTION = """\
Choose samples of a scored file (`lightning-vlm distill`): D = {score >= T} united with, or cut by, the samples that a
model's answers (`lightning-vlm predict`) get wrong. Without --answers: {score >= --min_score}.
"""
EPILOG = """\
An answer's id is that of its sample, or that behind the first part of it (the label of its data source). Of several
answers to a sample fewer than half must be right for it to be wrong. Records keep their columns; paths of pictures
follow the file.

examples:
  lightning-vlm select --scored chains.jsonl --answers answers.jsonl --threshold 3 --combine union --out round2.jsonl
  lightning-vlm select --scored chains.jsonl --min_score 5 --out grpo.jsonl
"""


def main(command: str, argv: list[str]) -> int:
    """Choose, write, and print the counts."""
    args = _parser(command).parse_args(argv)
    _check(args)

    from lightning_vlm.distill.selection import failed_ids, select

    records = _records(args.scored)
    threshold, failed, rule = args.min_score, None, None
    if args.answers is not None:
        answers = _answers(args, records)
        rule = args.rule or _rule_of(records, args.scored)
        failed = failed_ids([r for r in records if r["id"] in answers], answers, _judge(rule))
        threshold = args.threshold
    try:
        chosen = select(records, failed, threshold=threshold, combine=args.combine or "union", column=args.column)
    except ValueError as error:
        raise ValueError(f"{args.scored}: {error}") from error
    _write(args, chosen)
    _show(args, chosen, threshold, rule)
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(command, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--scored", type=Path, required=True, metavar="FILE", help="what `lightning-vlm distill` wrote")
    add("--answers", type=Path, metavar="FILE", help="what `lightning-vlm predict` wrote with the previous model")
    add("--threshold", type=float, metavar="T", help="least score, 0 to 5, beside --answers")
    add("--combine", choices=("union", "intersection"), help="of good and wrong samples (default union)")
    add("--min_score", type=float, metavar="T", help="least score, 0 to 5, without --answers")
    add("--rule", help="grades the answers (default: the rule that judged the scored file)")
    add("--extra_answers", action="store_true", help="leave aside answers to samples that the scored file lacks")
    add("--column", choices=("score", "own_score"), default="score", help="score of the kept text, or the model's own")
    add("--out", type=Path, required=True, metavar="FILE", help="the JSONL to write")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def _check(args: argparse.Namespace) -> None:
    from lightning_vlm.distill.selection import check_threshold

    if (args.answers is None) == (args.min_score is None):
        raise ValueError("give either --answers and --threshold, or --min_score alone")
    if args.answers is None:
        for name in ("threshold", "combine", "rule", "extra_answers"):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"--{name} has no effect without --answers: leave it out")
    elif args.threshold is None:
        raise ValueError("--answers needs --threshold T, the least score")
    for name in ("threshold", "min_score"):
        if getattr(args, name) is not None:
            check_threshold(getattr(args, name), f"--{name}")
    for name in ("scored", "answers"):
        file = getattr(args, name)
        if file is not None and not file.is_file():
            raise ValueError(f"--{name}: there is no file {file}")
    if args.out.suffix != ".jsonl":
        raise ValueError(f"--out {args.out}: records are written as JSONL; name it {args.out.stem}.jsonl")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} is there already: choose another --out, or replace it with --overwrite")


def _records(file: Path) -> list[dict[str, Any]]:
    """The scored records.

    Raises:
        ValueError: none, one without an id or messages, or an id twice.
    """
    records = [json.loads(line) for line in jsonl_rows(file)]
    if not records:
        raise ValueError(f"{file} is empty: there is nothing to choose from")
    seen: set[str] = set()
    for number, record in enumerate(records, 1):
        id = record.get("id")
        if not isinstance(id, str) or not isinstance(record.get("messages"), list):
            raise ValueError(f"{file}:{number}: a scored record needs `id` and `messages`; it has: {', '.join(record)}")
        if id in seen:
            raise ValueError(f"{file}:{number}: id {id!r} occurs twice")
        seen.add(id)
    return records


def _answers(args: argparse.Namespace, records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """id of the scored file → texts of its answers.

    Raises:
        ValueError: ids that do not match, an answer that was made for another gold answer.
    """
    golds = {record["id"]: record.get("answer") for record in records}
    ids = list(golds)
    rows: dict[str, list[str]] = {}
    where: dict[str, tuple[int, Any]] = {}
    for number, line in enumerate(jsonl_rows(args.answers), 1):
        row = json.loads(line)
        if not isinstance(row.get("id"), str | int) or not isinstance(row.get("output"), str):
            raise ValueError(f"{args.answers}:{number}: an answer needs `id` and `output`; it has: {', '.join(row)}")
        rows.setdefault(str(row["id"]), []).append(row["output"])
        where.setdefault(str(row["id"]), (number, row.get("gold")))
    matched, name = _matched(rows, ids)
    missing, extra = [id for id in ids if id not in matched], [id for id in rows if name(id) not in golds]
    for id, (number, gold) in where.items():
        own = golds.get(name(id))
        if gold is not None and own is not None and str(gold) != str(own):
            raise ValueError(
                f"{args.answers}:{number}: the answer to {id} was made for the gold answer {gold!r}, but {args.scored} "
                f"has {own!r}: give the answers to that data"
            )
    if missing:
        raise ValueError(
            f"{args.answers}: {len(missing):,} of {len(ids):,} samples of {args.scored} have no answer, such as "
            f"{missing[0]!r}; the answers' ids begin as {next(iter(rows), None)!r}: let the model answer that data"
        )
    if extra and not args.extra_answers:
        raise ValueError(
            f"{args.answers}: {len(extra):,} answers are to samples that {args.scored} lacks, such as {extra[0]!r}: "
            "leave them aside by --extra_answers"
        )
    return matched


def _matched(rows: Mapping[str, list[str]], ids: list[str]) -> tuple[dict[str, list[str]], Callable[[str], str]]:
    """Answers by the ids of the scored file: as they are, else without the label before the first `/`."""
    wanted = set(ids)

    def whole(id: str) -> str:
        return id

    def bare(id: str) -> str:
        return id.partition("/")[2]

    name = whole if wanted & rows.keys() else bare
    found: dict[str, list[str]] = {}
    for id, texts in rows.items():
        if name(id) in wanted:
            found.setdefault(name(id), []).extend(texts)
    return found, name


def _rule_of(records: list[dict[str, Any]], file: Path) -> str:
    from lightning_vlm.benchmarks.rules import RULES

    judges = {record.get("judge") for record in records}
    if len(judges) == 1 and (rule := judges.pop()) in RULES:
        return rule
    raise ValueError(f"{file} was not judged by one rule: name one that grades the answers by --rule")


def _judge(rule: str) -> Any:
    from lightning_vlm.benchmarks.rules import RULES
    from lightning_vlm.distill.judge import RuleJudge

    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}{one_of(rule, RULES)}")
    return RuleJudge(RULES[rule])


def _write(args: argparse.Namespace, chosen: Selection) -> None:
    """Pictures that are named from the scored file's folder are named from the new one's."""
    here, there = args.scored.resolve().parent, args.out.resolve().parent
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for record in chosen.records:
            images = record.get("images") or []
            moved = [p if here == there or os.path.isabs(p) else os.path.relpath(here / p, there) for p in images]
            stream.write(json.dumps(record | {"images": moved}, ensure_ascii=False) + "\n")
    os.replace(temporary, args.out)


def _show(args: argparse.Namespace, chosen: Selection, threshold: float, rule: str | None) -> None:
    out = sys.stdout
    print(f"{args.out}: {len(chosen.records):,} of {chosen.scored:,} samples", file=out)
    print(f"  {args.column} >= {threshold:g}: {chosen.good:,}", file=out)
    if rule is not None:
        print(f"  answered wrongly ({rule}): {chosen.failed:,}", file=out)
        print(f"  both: {chosen.both:,}", file=out)
        print(f"  {args.combine or 'union'}: {len(chosen.records):,}", file=out)
