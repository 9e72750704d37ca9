"""`lightning-vlm distill`: a model's own chains of thought, as long as each question is worth."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.cli.arguments import Parser
from lightning_vlm.cli.overlap import named_specs
from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.data.sources.base import id_at
from lightning_vlm.data.sources.spec import one_of

if TYPE_CHECKING:
    from lightning_vlm.distill.chains import Distiller
    from lightning_vlm.distill.files import RecordFile
    from lightning_vlm.distill.judge import Judge
    from lightning_vlm.distill.model import Model
    from lightning_vlm.distill.scorers import Scorer, Scores

DESCRIPTION = """\
Let a model write its own chain of thought for each sample, under a repetition penalty of 1 (much is asked: long) to 2
(little: short) that follows from scores of picture and question; keep the right ones, rewrite the wrong ones, and score
all of them from 0 to 5.

DATA is world:SPLIT or world:SPLIT:N for N samples of the embedded world (gold texts with chains), KIND=PATH,
KIND=PATH@SPLIT, a file of questions or conversations, or FILE.yaml with named sources NAME: {kind: ..., path: ...}.
The output is read by the data kinds `messages` (to learn the chains) and `qa` (question and answer).
"""
EPILOG = """\
An interrupted command goes on where it was when given again. Beside NAME.jsonl stand NAME_images/ (pictures that are no
files), NAME_lengths.png and NAME_scores.png.

examples:
  lightning-vlm distill --data world:train:2000 --model DIR --out chains.jsonl
  lightning-vlm distill --data geometry3k=hiyouga/geometry3k@train --model DIR --rewrite samples --out chains.jsonl
  lightning-vlm distill --data world:train --model DIR --scorers.necessity ablation --judge JUDGE_DIR --out chains.jsonl
"""
_CHUNK = 128  # samples that are written, judged and saved together
_SCORES = ("clarity", "necessity", "difficulty", "demand", "integration")
_NO_PART_OF_IT = ("out", "overwrite", "batch_size", "jobs", "skip_bad")  # of the settings that records depend on


@dataclass
class _Data:
    """The samples that can be used, by place; they are built again when they are needed."""

    places: list[tuple[Sequence[Sample], int]] = field(default_factory=list)
    raw: list[dict[str, float]] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)


def main(command: str, argv: list[str]) -> int:
    """Score, write, judge, rewrite; print the lengths."""
    args = _parser(command).parse_args(argv)
    _check(args)

    from lightning_vlm.distill.files import RecordFile
    from lightning_vlm.distill.model import Model
    from lightning_vlm.distill.penalty import Weights
    from lightning_vlm.distill.scorers import scaled_scores

    weights = Weights(alpha=args.alpha, beta=args.beta, gamma=args.gamma)
    specs = _specs(args)
    sources = [open_source(spec, for_training=True) for spec in specs]
    rule = _rule(args, specs)
    file = RecordFile(args.out, settings=_settings(args), overwrite=args.overwrite)
    model = Model(args.model, dtype=args.dtype, batch_size=args.batch_size)
    distiller = _distiller(args, model, rule)
    data = _scored(sources, _scorers(args, model), args)
    scores = scaled_scores(data.raw, weights)
    with file:
        for chunk in _chunks(data, scores, file, args):
            _distil(distiller, chunk, file, args)
        if not file.records():
            reasons = ", ".join(f"{count:,} {why}" for why, count in (file.dropped() + data.bad).items())
            file.discard()
            raise ValueError(f"no sample is left ({reasons}): nothing is written")
        file.publish()
    _pictures(file)
    _show(file, distiller, data, args)
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(command, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DATA", help="questions with gold answers")
    add("--model", required=True, metavar="DIR", help="writes its own chains: directory, hub id or embedded:NAME")
    add("--out", type=Path, required=True, metavar="FILE", help="the JSONL to write")
    add("--overwrite", action="store_true", help="replace what is there, half-written or whole")
    add("--limit", type=int, metavar="N", help="only the first N samples of each source")
    add("--part", metavar="A,B", help="only samples whose id hashes into [A, B), such as 0,0.5")
    add("--skip_bad", action="store_true", help="go on after samples that cannot be used, and count them")
    add("--alpha", type=float, default=0.6931471805599453, help="steepness of the penalty (default ln 2: 1 to 2)")
    add("--beta", type=float, default=1.0, help="weight of the text score (default 1)")
    add("--gamma", type=float, default=1.0, help="weight of the integration score (default 1)")
    for name in _SCORES:
        more = ", or ablation[:DIR]: the gold text without the picture" if name == "necessity" else ""
        add(f"--scorers.{name}", metavar="NAME", help=f"package.module:function in place of the rule{more}")
    add("--judge", metavar="RULE|DIR", help="a grading rule (default: the data's own), or a judge model")
    add(
        "--rewrite",
        default="auto",
        metavar="HOW|DIR",
        help="wrong chains: gold (the data's text), samples (more draws), auto (gold, else samples; default), none "
        "(drop), or a model that is shown the answer",
    )
    add("--samples", type=int, default=4, metavar="N", help="rewrite: most further draws (default 4)")
    add(
        "--reward",
        default="rules",
        metavar="rules|DIR",
        help="reward score of 0 to 5: rules (default) or a judge model",
    )
    add("--shortest", type=int, default=1, metavar="N", help="reward: fewest tokens in range (default 1)")
    add("--longest", type=int, metavar="N", help="reward: most tokens in range (default --max_new_tokens)")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="longest chain, in tokens (default 256)")
    add("--temperature", type=float, default=0.0, help="of the chains; 0 is greedy (default); further draws: 1 then")
    add("--seed", type=int, default=0, help="of the draws (default 0)")
    add("--batch_size", type=int, default=64, metavar="N", help="sequences generated together (default 64)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights in memory")
    add("--jobs", type=int, metavar="N", help="processes that grade (default: cores, at most 8)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("jobs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    args.longest = args.longest or args.max_new_tokens
    if not 1 <= args.shortest <= args.longest:
        raise ValueError(f"--shortest must lie in 1 to --longest {args.longest}, got {args.shortest}")


def _specs(args: argparse.Namespace) -> list[SourceSpec]:
    """The sources that --data names."""
    specs: list[SourceSpec] = []
    for argument in args.data:
        specs += [_world(argument)] if argument.startswith("world:") else named_specs(argument, "TRAIN")
    labels = [spec.label or spec.kind for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two sources are named {label!r}: name them in a YAML file, NAME: {{kind: ..., path: ...}}"
            )
    return [replace(s, limit=args.limit or s.limit, part=_part(args.part) or s.part) for s in specs]


def _world(argument: str) -> SourceSpec:
    """`world:SPLIT[:N]`; its gold texts all have chains, which wrong answers are rewritten to."""
    split, _, size = argument.removeprefix("world:").partition(":")
    if size and not (size.isdigit() and int(size) > 0):
        raise ValueError(f"--data {argument}: {size!r} is no number of samples; give world:SPLIT:N")
    options: dict[str, Any] = {"direct_fraction": 0.0} | ({"size": int(size)} if size else {})
    return SourceSpec(kind="world", split=split or None, options=options)


def _part(given: str | None) -> tuple[float, float] | None:
    if given is None:
        return None
    try:
        low, high = map(float, given.split(","))
    except ValueError:
        raise ValueError(f"--part {given!r} must be two numbers A,B in [0, 1], such as 0,0.5") from None
    return low, high


def _rule(args: argparse.Namespace, specs: Sequence[SourceSpec]) -> str | None:
    """The rule that judges; None where a model does."""
    from lightning_vlm.benchmarks.benchmark import own_rule
    from lightning_vlm.benchmarks.rules import RULES

    if args.judge is None:
        try:
            return own_rule({spec.label or spec.kind: spec for spec in specs})
        except ValueError as error:
            raise ValueError(f"{error}; name the judge by --judge RULE or --judge DIR") from None
    if args.judge in RULES:
        return args.judge
    if _is_model(args.judge):
        return None
    raise ValueError(f"--judge {args.judge!r} is neither a rule nor a model directory{one_of(args.judge, RULES)}")


def _is_model(name: str) -> bool:
    return name.startswith("embedded:") or Path(name).expanduser().is_dir()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What records depend on, models by the hash of their weights."""
    from lightning_vlm.export.provenance import parent_of

    found = {name: value for name, value in vars(args).items() if name not in _NO_PART_OF_IT}
    for name in ("model", "judge", "rewrite", "reward"):
        if found[name] is not None and _is_model(found[name]):
            found[name] = parent_of(found[name])
    return found


def _scorers(args: argparse.Namespace, model: Model) -> dict[str, Scorer]:
    from lightning_vlm.distill.ablation import Ablation
    from lightning_vlm.distill.model import Model
    from lightning_vlm.distill.scorers import scorer_of

    found: dict[str, Scorer] = {}
    for name in _SCORES:
        given = getattr(args, f"scorers.{name}") or name
        kind, _, path = given.partition(":")
        try:
            if kind == "ablation" and name == "necessity":
                found[name] = Ablation(Model(path, dtype=args.dtype) if path else model)
            else:
                found[name] = scorer_of(given)
        except ValueError as error:
            raise ValueError(f"--scorers.{name}: {error}") from error
    return found


def _distiller(args: argparse.Namespace, model: Model, rule: str | None) -> Distiller:
    from lightning_vlm.benchmarks.rules import RULES
    from lightning_vlm.distill.chains import Distiller
    from lightning_vlm.distill.judge import ModelJudge, RuleJudge
    from lightning_vlm.distill.model import Model
    from lightning_vlm.rollouts import Sampling

    models: dict[str, Model] = {args.model: model}

    def loaded(path: str) -> Model:
        if path not in models:
            models[path] = Model(path, dtype=args.dtype, batch_size=args.batch_size)
        return models[path]

    asked = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    judge: Judge
    if rule is None:
        judge = ModelJudge(loaded(args.judge), **asked)
    else:
        judge = RuleJudge(RULES[rule], jobs=args.jobs)
    how, rewriter, rater = args.rewrite, None, None
    if how not in ("auto", "gold", "samples", "none"):
        if not _is_model(how):
            raise ValueError(f"--rewrite {how!r}: choose auto, gold, samples, none, or a model directory")
        how, rewriter = "model", loaded(how)
    if args.reward != "rules":
        if not _is_model(args.reward):
            raise ValueError(f"--reward {args.reward!r}: give rules, or a model directory")
        rater = ModelJudge(loaded(args.reward), **asked)
    return Distiller(
        model,
        judge=judge,
        sampling=Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature),
        rewrite=how,
        samples=args.samples,
        rewriter=rewriter,
        rater=rater,
        seed=args.seed,
        shortest=args.shortest,
        longest=args.longest,
    )


def _sample(source: Sequence[Sample], index: int) -> Sample:
    """A sample, its gold answer from the column `answer` where the kind itself reads none."""
    sample = source[index]
    if sample.answer is None and isinstance(sample.info.get("answer"), str):
        return replace(sample, answer=sample.info["answer"])
    return sample


def _scored(sources: Sequence[Sequence[Sample]], scorers: dict[str, Scorer], args: argparse.Namespace) -> _Data:
    """What the scorers say of all samples."""
    from lightning_vlm.distill.scorers import raw_scores

    data = _Data()
    for source, index in _track([(s, i) for s in sources for i in range(len(s))], "scoring"):
        try:
            data.raw.append(raw_scores(_sample(source, index), scorers))
            data.places.append((source, index))
        except BadSample as bad:
            data.bad[_bad(bad, args)] += 1
    if not data.places:
        raise ValueError(f"none of {data.bad.total():,} samples can be used: nothing is written")
    return data


def _chunks(
    data: _Data, scores: Sequence[Scores], file: RecordFile, args: argparse.Namespace
) -> Iterator[list[tuple[Sample, Scores]]]:
    """Chunks that an earlier command has not finished; their bounds are always the same."""
    starts = range(0, len(data.places), _CHUNK)
    for start in _track(starts, "writing chains"):
        places = list(zip(data.places, scores, strict=True))[start : start + _CHUNK]
        if all(id_at(*place) in file.done for place, _ in places):
            continue
        yield [(_sample(*place), score) for place, score in places]


def _distil(
    distiller: Distiller, chunk: list[tuple[Sample, Scores]], file: RecordFile, args: argparse.Namespace
) -> None:
    """Write the records of a chunk."""
    from lightning_vlm.distill.files import record_of

    made: dict[str, dict[str, Any] | str] = {}
    usable: list[tuple[Sample, Scores]] = []
    for sample, score in chunk:
        try:
            distiller.model.encoder.encode_prompt(sample)
            usable.append((sample, score))
        except BadSample as bad:
            made[sample.id] = _bad(bad, args)
    chains = distiller.chains([s for s, _ in usable], [score for _, score in usable]) if usable else []
    for (sample, score), chain in zip(usable, chains, strict=True):
        made[sample.id] = (
            chain
            if isinstance(chain, str)
            else record_of(sample, file.images(sample), score, chain, distiller.judge.name)
        )
    file.add(made.items())


def _bad(bad: BadSample, args: argparse.Namespace) -> str:
    """Why a sample that cannot be used is dropped.

    Raises:
        ValueError: unless such samples are to be skipped.
    """
    if not args.skip_bad:
        raise ValueError(f"{bad} (mend it, or go on without such samples by --skip_bad)") from bad
    return f"unusable ({bad.reason})"


def _track(items: Sequence[Any], what: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    bar = Console(stderr=True)
    return track(items, what, len(items), console=bar, transient=True, disable=not bar.is_terminal)


def _pictures(file: RecordFile) -> None:
    """Both pictures, each whole once it has its name."""
    import os

    from lightning_vlm.distill.report import length_picture, score_picture

    makers: dict[str, Callable[[Sequence[dict[str, Any]]], Any]] = {"lengths": length_picture, "scores": score_picture}
    for name, make in makers.items():
        path = file.out.with_name(f"{file.out.stem}_{name}.png")
        temporary = path.with_name(f".tmp-{path.name}")
        make(file.records()).savefig(temporary)
        os.replace(temporary, path)


def _show(file: RecordFile, distiller: Distiller, data: _Data, args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lightning_vlm.distill.report import length_table

    records = file.records()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"{file.out}: {len(records):,} of {len(data.places):,} samples, judged by {distiller.judge.name}")
    if file.written:
        console.print(f"{file.folder}: {len(file.written):,} pictures")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("third")
    table.add_column("family")
    for column in ("n", "mean P", "own tokens", "median", "tokens to learn", "right at first"):
        table.add_column(column, justify="right")
    for (third, family), found in length_table(records).items():
        cells = (f"{found.n:,}", f"{found.penalty:.2f}", f"{found.own:.1f}", f"{found.own_median:.0f}")
        table.add_row(third, family, *cells, f"{found.tokens:.1f}", f"{100 * found.right:.0f} %")
    console.print("", table, "", sep="\n")
    kept = Counter(record["rewritten"] or "own chain" for record in records)
    kinds = {"gold": "gold text", "samples": "further sample", "model": "rewritten by a model"}
    console.print("texts: " + ", ".join(f"{count:,} {kinds.get(how, how)}" for how, count in kept.most_common()))
    rated = Counter(record["score"] for record in records)
    unrated = rated.pop(None, 0)
    console.print("scores: " + ", ".join(f"{rated[score]:,} × {score:g}" for score in sorted(rated, reverse=True)))
    unreadable = sum(record["right"] is None for record in records)
    for count, what in ((unrated, "without a readable score"), (unreadable, "verdicts that were unreadable")):
        if count:
            console.print(f"{what}: {count:,}")
    if lost := file.dropped() + data.bad:
        console.print("dropped: " + ", ".join(f"{count:,} {why}" for why, count in lost.most_common()))
    stem = file.out.with_suffix("")
    console.print(f"pictures of it: {stem}_lengths.png, {stem}_scores.png")
