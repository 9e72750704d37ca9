"""`lightning-vlm probe DIR --probe KIND`: what a vision encoder's features tell, and how training changed it."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.cli.arguments import Parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_vlm.data.schema import Sample
    from lightning_vlm.probes.encoder import ProbeData, VisionEncoder

    Found = tuple[dict[str, Any], list[tuple[str, ...]], Figure]

DESCRIPTION = """\
Probe the vision encoder of a model: any VLM, embedded:NAME, or a tower alone with its image processor.

  linear        which class a picture's mean feature tells (logistic regression)
  segmentation  which objects a patch shows (two-layer network on single patches)
  gradients     where the loss of the gold answer has its gradient, and how much of it lies on the objects asked about
  alignment     mutual k-nearest neighbours of pictures and of their captions in a language model
  updates       ||after - before|| / ||before|| of each part and block: needs --before

DATA is world (single figures, scenes or questions of the embedded world, as the probe needs), world:SPLIT, or
  linear        a folder train/CLASS/*, val/CLASS/*, or CLASS/*
  segmentation  a folder images/{training,validation}/*, annotations/{training,validation}/*.png (ADE20K's layout)
  gradients     a JSONL file of conversations with one picture (no objects known: pictures, no shares)
  alignment     a JSONL file of conversations with one picture, the last answer its caption
"""
PROBES = ("linear", "segmentation", "gradients", "alignment", "updates")
LIMITS = {"linear": 1200, "segmentation": 600, "gradients": 200, "alignment": 500, "updates": None}
# Probes that an option is for; elsewhere it is refused.
_USED = {
    "data": ("linear", "segmentation", "gradients", "alignment"),
    "before": ("gradients", "updates"),
    "limit": ("linear", "segmentation", "gradients", "alignment"),
    "seeds": ("segmentation",),
    "task": ("linear",),
    "noise": ("linear", "segmentation"),
    "cover": ("segmentation", "gradients"),
    "language": ("alignment",),
    "k": ("alignment",),
    "layer": ("linear", "segmentation", "alignment"),
    "rows": ("gradients", "segmentation"),
    "max_pixels": ("linear", "segmentation", "gradients", "alignment"),
    "batch_size": ("linear", "segmentation", "gradients", "alignment"),
}
_DEFAULTS = {"data": "world", "seeds": 3, "task": "pair", "k": 10, "cover": 0.05, "rows": 8, "batch_size": 32}


def main(command: str, argv: list[str]) -> int:
    """Probe, print the table, write the JSON and the picture."""
    args = _parser(command).parse_args(argv)
    _check(args)
    run = {
        "linear": _linear,
        "segmentation": _segmentation,
        "gradients": _gradients,
        "alignment": _alignment,
        "updates": _updates,
    }[args.probe]
    numbers, table, figure = run(args)
    arguments = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    text = json.dumps({"arguments": arguments, **_plain(numbers)}, indent=2, ensure_ascii=False) + "\n"
    _write(args.out, lambda file: file.write_text(text, encoding="utf-8"))
    _write(args.image, lambda file: figure.savefig(file))
    _show(table, args)
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(command, description=DESCRIPTION)
    add = parser.add_argument
    add("model", help="model directory, hub id or embedded:NAME")
    add("--probe", required=True, choices=PROBES, help="what to find out")
    add("--data", metavar="DATA", help="pictures, see above (default world)")
    add("--before", metavar="DIR", help="the model before training, to compare with (gradients, updates)")
    add("--limit", type=int, metavar="N", help="pictures to fit on, and as many (segmentation: half) to judge by")
    add("--seed", type=int, default=0, help="of what is drawn, split and resampled (default 0)")
    add("--seeds", type=int, metavar="N", help="fits of the segmentation probe, from other weights (default 3)")
    add("--task", choices=("pair", "colour", "shape"), help="classes of world's single figures (default pair)")
    add("--noise", type=float, metavar="S", help="grey noise on world pictures, of 255 levels (default 60)")
    add("--cover", type=float, metavar="X", help="share of a patch an object must cover to be its label (default 0.05)")
    add(
        "--layer", type=int, metavar="L", help="block to probe, 1 first, -1 last (default: what the projector is given)"
    )
    add("--language", metavar="DIR", help="language model of the captions (default: the model's own)")
    add("--k", type=int, metavar="K", help="neighbours (default 10)")
    add("--rows", type=int, metavar="N", help="samples shown in the picture (default 8)")
    add("--max_pixels", type=int, metavar="N", help="bound of a picture, for towers that take any size")
    add("--batch_size", type=int, metavar="N", help="pictures at a time (default 32)")
    add("--out", type=Path, metavar="FILE", help="JSON (default probe-KIND.json)")
    add("--image", type=Path, metavar="FILE", help="png, pdf or svg (default probe-KIND.png)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, probes in _USED.items():
        if getattr(args, name) is not None and args.probe not in probes:
            raise ValueError(f"--{name} has no effect on --probe {args.probe}: leave it out (it is for {_and(probes)})")
    given_limit = args.limit
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None and args.probe in _USED[name]:
            setattr(args, name, value)
    if args.limit is None:
        args.limit = LIMITS[args.probe]
    if args.probe == "updates" and args.before is None:
        raise ValueError("--probe updates needs --before DIR, the model before training")
    for name in ("limit", "seeds", "k", "rows", "batch_size", "max_pixels"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.data is not None and not args.data.startswith("world"):
        for name in ("task", "noise"):
            if getattr(args, name) not in (None, _DEFAULTS.get(name)):
                raise ValueError(f"--{name} is for pictures of the embedded world, --data is {args.data}")
        args.limit = given_limit or (LIMITS[args.probe] if args.probe != "linear" else None)
    args.out = args.out or Path(f"probe-{args.probe}.json")
    args.image = args.image or Path(f"probe-{args.probe}.png")
    if args.image.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--image {args.image} must end in .png, .pdf or .svg")
    for name in ("out", "image"):
        if getattr(args, name).is_dir():
            raise ValueError(f"--{name} {getattr(args, name)} is a directory: give a file in it")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the probes ------------------------------------------------------------------------------------------------------


def _encoder(args: argparse.Namespace, path: str) -> VisionEncoder:
    from lightning_vlm.probes.encoder import load_encoder

    return load_encoder(path, layer=args.layer, max_pixels=args.max_pixels)


def _split(data: str) -> str | None:
    """SPLIT of world:SPLIT, `test` of world, None of anything else."""
    return "test" if data == "world" else data.removeprefix("world:") if data.startswith("world:") else None


def _linear(args: argparse.Namespace) -> Found:
    from lightning_vlm.probes.encoder import image_folder, linear_probe, world_classes
    from lightning_vlm.probes.encoder.data import HELD_OUT, NOISE
    from lightning_vlm.probes.encoder.figures import linear_figure

    data: ProbeData
    if _split(args.data):
        if args.data != "world":
            raise ValueError(f"--data {args.data}: single figures have no splits, give --data world")
        noise = NOISE if args.noise is None else args.noise
        data = world_classes(args.task, train=args.limit, test=args.limit, noise=noise, seed=args.seed)
    else:
        data = image_folder(args.data, train=args.limit, test=args.limit, seed=args.seed)
    found = linear_probe(_encoder(args, args.model), data, seed=args.seed, batch_size=args.batch_size, track=_track())
    table = [
        ("accuracy", _percent(found.accuracy, found.low, found.high)),
        ("most frequent class", _percent(found.chance)),
        ("classes", str(len(found.classes))),
        ("pictures", f"{found.train} to fit on, {found.test} to judge by"),
        ("C", f"{found.C:g}, chosen on a fifth of those to fit on" + ("" if found.converged else "; not converged")),
    ]
    held = [value for name, value in found.by_class.items() if name in HELD_OUT]
    if args.data == "world" and held:
        table.insert(1, ("pairs the world's training never shows", _percent(sum(held) / len(held))))
    return {"data": data.name, **vars(found)}, table, linear_figure(found, data.name)


def _segmentation(args: argparse.Namespace) -> Found:
    from lightning_vlm.probes.encoder import segment_folder, segmentation_probe, world_segments
    from lightning_vlm.probes.encoder.data import NOISE
    from lightning_vlm.probes.encoder.figures import segmentation_figure

    sizes = {"train": args.limit, "test": max(1, args.limit // 2), "seed": args.seed}
    if split := _split(args.data):
        data = world_segments(split=split, noise=NOISE if args.noise is None else args.noise, **sizes)
    else:
        data = segment_folder(args.data, **sizes)
    found = segmentation_probe(
        _encoder(args, args.model),
        data,
        seeds=range(args.seed, args.seed + args.seeds),
        cover=args.cover,
        batch_size=args.batch_size,
        track=_track(),
    )
    table = [
        ("recall, mean over classes", _percent(found.recall, found.low, found.high)),
        ("recall, all patches alike", _percent(found.recall_patches)),
        ("precision", _percent(found.precision)),
        ("intersection over union", _percent(found.iou)),
        ("accuracy", _percent(found.accuracy)),
        ("labels that are there (precision of always yes)", _percent(found.positives)),
        ("classes", str(len(found.classes))),
        (
            "pictures",
            f"{found.train} to fit on, {found.test} to judge by, {found.patches[0]} x {found.patches[1]} patches",
        ),
        (
            "recall by seed",
            ", ".join(f"{seed}: {100 * r:.1f}" for seed, r in zip(found.seeds, found.per_seed, strict=True)),
        ),
    ]
    numbers = {name: value for name, value in vars(found).items() if name not in ("logits", "data")}
    return {"data": data.name, **numbers}, table, segmentation_figure(found, data, rows=args.rows)


def _gradients(args: argparse.Namespace) -> Found:
    from lightning_vlm.probes.encoder import compare_energy, gradient_maps
    from lightning_vlm.probes.encoder.figures import gradient_figure

    samples = _samples(args)
    columns = {}
    for name, path in (("before", args.before), ("after" if args.before else "model", args.model)):
        if path is not None:
            columns[name] = gradient_maps(
                _encoder(args, path),
                samples,
                seed=args.seed,
                cover=args.cover,
                batch_size=args.batch_size,
                track=_track(),
            )
    table, numbers = [], {}
    for name, maps in columns.items():
        own = numbers[name] = maps.summary()
        lead = f"{name}: " if args.before else ""
        table.append((f"{lead}loss of the gold answer", f"{own['loss']:.3f} nats"))
        if own["energy"] is None:
            table.append((f"{lead}share of the gradient inside", "not known: the data have no masks of objects"))
            continue
        table += [
            (f"{lead}share of the gradient on patches asked about", _percent(*own["energy"])),
            (f"{lead}share of the patches that these are", _percent(*own["area"])),
            (f"{lead}difference of the two", _percent(*own["lift"])),
            (f"{lead}largest patch among them", _percent(*own["pointing"])),
            (f"{lead}samples", f"{own['samples']}, {own['scored']} with objects asked about"),
        ]
    if args.before and numbers["after"]["energy"] is not None:
        change = compare_energy(columns["before"], columns["after"])
        numbers["change"] = change._asdict()
        table.append(("share inside, after - before", f"{_percent(*change[:3])}, p = {change.p:.2g}"))
    numbers["per_sample"] = [
        {"id": s.id, **{name: float(maps.energy[n]) for name, maps in columns.items()}} for n, s in enumerate(samples)
    ]
    return numbers, table, gradient_figure(columns, rows=args.rows)


def _alignment(args: argparse.Namespace) -> Found:
    from lightning_vlm.probes.encoder import alignment, load_language
    from lightning_vlm.probes.encoder.figures import alignment_figure

    samples = _samples(args, families=("caption",))
    found = alignment(
        _encoder(args, args.model),
        samples,
        language=load_language(args.language) if args.language else None,
        k=args.k,
        seed=args.seed,
        batch_size=args.batch_size,
        track=_track(),
    )
    table = [
        (f"common neighbours of {found.k}", _percent(found.score, found.low, found.high)),
        ("chance, k/(n - 1)", _percent(found.chance)),
        ("pictures with captions", str(found.n)),
        ("captions read by", found.language),
    ]
    return {n: v for n, v in vars(found).items() if n != "shares"}, table, alignment_figure(found)


def _updates(args: argparse.Namespace) -> Found:
    from lightning_vlm.probes.encoder import part_updates
    from lightning_vlm.probes.encoder.figures import name_of, updates_figure

    found = part_updates(args.before, args.model, track=_track())
    table = [
        (name_of(u), f"{u.relative:.3e}   (moved {u.moved:.4g} of {u.norm:.4g}, {u.weights:,} weights)") for u in found
    ]
    return {"updates": [{**vars(u), "relative": u.relative} for u in found]}, table, updates_figure(found)


def _samples(args: argparse.Namespace, families: tuple[str, ...] | None = None) -> list[Sample]:
    from lightning_vlm.data.sources import SourceSpec, open_source
    from lightning_vlm.data.sources.tables import open_table
    from lightning_vlm.probes.encoder import world_questions

    if split := _split(args.data):
        return world_questions(split=split, size=args.limit, families=families, seed=args.seed)
    columns = set(open_table(SourceSpec(kind="messages", path=args.data)).columns)
    kind = "messages" if "messages" in columns else "sharegpt"
    return list(open_source(SourceSpec(kind=kind, path=args.data, limit=args.limit), for_training=False))


# --- output ----------------------------------------------------------------------------------------------------------


def _percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    told = f"{100 * value:.1f} %"
    return told if math.isnan(low) else f"{told}  [{100 * low:.1f}, {100 * high:.1f}]"


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null, keys strings."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Written under another name and renamed, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    write(temporary)
    os.replace(temporary, path)


def _track() -> Callable[[Sequence[Any], str], Iterable[Any]]:
    from rich.console import Console
    from rich.progress import track

    bar = Console(file=sys.stderr)
    return lambda items, what: track(items, what, len(items), console=bar, transient=True, disable=not bar.is_terminal)


def _show(rows: list[tuple[str, ...]], args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))
    seed = "" if args.probe == "updates" else f", seed {args.seed}; brackets: 95 % intervals"
    console.print(f"{args.probe} probe of {args.model}{seed}\n")
    console.print(table)
    console.print(f"\nnumbers: {args.out}; picture: {args.image}")
