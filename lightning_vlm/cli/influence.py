"""`lightning-vlm influence DIR --train FILE --probe FILE`: what learning one sample does to the texts of others."""

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
    from lightning_vlm.data.sources import SourceSpec
    from lightning_vlm.models.batch import Row
    from lightning_vlm.models.policy import Policy
    from lightning_vlm.models.processor import Processor
    from lightning_vlm.models.spec import Backbone
    from lightning_vlm.probes.influence import StepCheck, Update

DESCRIPTION = """\
How much does one SGD step on a training sample alone move the log-probability of each probe text?

For every pair: the first-order prediction, eta times a dot product of two exact gradients, and the change by a real
step, which is undone. For small models: gradients of all probe texts are held in memory.

FILE is JSONL with a column `messages` (or `conversations`), or with `prompt`, `chosen` and `rejected`; or world:SPLIT
for the embedded world. Of probes the last answer is scored, as `chosen`, and `rejected` where there is one.
"""
EPILOG = """\
Everything is computed in float64. The step is on the loss of the sample's whole text, not averaged over its tokens. For
--loss dpo the model is its own reference, as it is when the stage starts, and beta is 0.1.
"""
PARAMETER_LIMIT = 50_000_000
_MISSED = 0.1  # share of the real changes; above, the first order is no explanation
_NUMBERED = 12  # training samples up to which the cells of the picture show their numbers
_SHADED = 0.98  # share of the cells that the colours tell apart
_NAME = 26  # characters of an id, its last, in table and picture


def main(command: str, argv: list[str]) -> int:
    """Measure, print the table, write the JSON and the picture."""
    args = _parser(command).parse_args(argv)
    _check(args)

    from lightning_vlm.data.encode import Encoder
    from lightning_vlm.models.spec import Backbone
    from lightning_vlm.probes.influence import check_steps

    samples = {side: _samples(getattr(args, side), side, args.limit) for side in ("train", "probe")}
    backbone = Backbone(path=args.model, dtype="float64")
    policy, processor = _load(backbone, args.force)
    encoder = Encoder(processor, max_length=1 << 20)
    updates = [_update(encoder, sample, args) for sample in samples["train"]]
    probes = [row for sample in samples["probe"] for row in _probe_rows(encoder, sample)]
    found = check_steps(policy, probes, updates, eta=args.eta, track=_track())
    if not bool(found.real.isfinite().all() and found.predicted.isfinite().all()):
        raise ValueError(f"a step of eta {args.eta:g} leaves log-probabilities that are not finite: lower --eta")
    _write(args.out, lambda file: file.write_text(_json(args, policy, probes, updates, found), encoding="utf-8"))
    _write(args.image, lambda file: heat_map(probes, updates, found, eta=args.eta, loss=args.loss).savefig(file))
    _show(probes, updates, found, args)
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(command, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("model", help="model directory, hub id or embedded:NAME")
    add("--train", required=True, metavar="FILE", help="samples to take a step on, one at a time")
    add("--probe", required=True, metavar="FILE", help="samples whose texts are watched")
    add("--limit", type=int, default=8, metavar="N", help="first N samples of each file (default 8)")
    add("--eta", type=float, default=1e-4, help="step size on a sample's summed loss (default 1e-4)")
    add("--loss", choices=("sft", "dpo"), default="sft", help="of the step: sft (default) or dpo, which needs pairs")
    add("--cooling", type=float, metavar="W", help="CW-DPO's weight on dpo's rejected text, 0 to 1 (default 1: DPO)")
    add("--out", type=Path, default=Path("influence.json"), metavar="FILE", help="default influence.json")
    add("--image", type=Path, default=Path("influence.png"), metavar="FILE", help="png, pdf or svg: influence.png")
    add("--force", action="store_true", help=f"allow models above {PARAMETER_LIMIT:,} parameters")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if not (args.eta > 0 and math.isfinite(args.eta)):
        raise ValueError(f"--eta must be a positive number, got {args.eta:g}")
    if args.loss == "sft" and args.cooling is not None:
        raise ValueError("--cooling has no effect on --loss sft: leave it out, or choose --loss dpo")
    if args.image.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--image {args.image} must end in .png, .pdf or .svg")
    for name in ("out", "image"):
        if getattr(args, name).is_dir():
            raise ValueError(f"--{name} {getattr(args, name)} is a directory: give a file in it")


def _samples(given: str, side: str, limit: int) -> list[Sample]:
    from lightning_vlm.data.sources import open_source

    try:
        return list(open_source(_spec(given, limit), for_training=side == "train"))
    except ValueError as err:
        raise ValueError(f"--{side}: {err}") from err


def _spec(given: str, limit: int) -> SourceSpec:
    from lightning_vlm.data.sources import SourceSpec
    from lightning_vlm.data.sources.tables import open_table

    if given.startswith("world:"):
        return SourceSpec(kind="world", split=given.removeprefix("world:"), limit=limit, options={"pairs": True})
    columns = set(open_table(SourceSpec(kind="messages", path=given)).columns)
    for kind, needed in (
        ("preference", {"chosen", "rejected"}),
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
    ):
        if needed <= columns:
            return SourceSpec(kind=kind, path=given, limit=limit)
    has = ", ".join(sorted(columns))
    raise ValueError(f"{given} has neither `messages` nor `chosen` and `rejected` (its columns: {has})")


def _load(backbone: Backbone, force: bool) -> tuple[Policy, Processor]:
    import torch

    from lightning_vlm.models.families import family_of
    from lightning_vlm.models.load import load_model
    from lightning_vlm.models.policy import Policy
    from lightning_vlm.models.processor import load_processor

    processor = load_processor(backbone)
    if not (force or backbone.embedded):
        _refuse_large(backbone)
    model = load_model(backbone).to("cuda" if torch.cuda.is_available() else "cpu")
    return Policy(model, family_of(model)), processor


def _refuse_large(backbone: Backbone) -> None:
    """Counts parameters before any is read."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from lightning_vlm.models.families import family_of

    config = AutoConfig.from_pretrained(backbone.path)
    family_of(config)
    with torch.device("meta"):
        count = sum(param.numel() for param in AutoModelForImageTextToText.from_config(config).parameters())
    if count > PARAMETER_LIMIT:
        raise ValueError(
            f"{backbone.path} has {count:,} parameters, more than {PARAMETER_LIMIT:,}: the gradient of every probe "
            f"text would take {count * 8 / 2**30:.1f} GiB; give a smaller model, or --force"
        )


def _update(encoder: Any, sample: Sample, args: argparse.Namespace) -> Update:
    from lightning_vlm.probes.influence import dpo_update, sft_update

    if args.loss == "sft":
        return sft_update(encoder.encode(sample))
    return dpo_update(*encoder.encode_pair(sample), cooling=1.0 if args.cooling is None else args.cooling)


def _probe_rows(encoder: Any, sample: Sample) -> list[Row]:
    if sample.rejected is not None:
        return encoder.encode_pair(sample)
    return encoder.encode_answers(sample, {"chosen": sample.chosen()})


def _track() -> Callable[[Sequence[Any], str], Iterable[Any]]:
    from rich.console import Console
    from rich.progress import track

    bar = Console(file=sys.stderr)
    return lambda items, what: track(items, what, len(items), console=bar, transient=True, disable=not bar.is_terminal)


def _json(
    args: argparse.Namespace, policy: Policy, probes: Sequence[Row], updates: Sequence[Update], found: StepCheck
) -> str:
    params = list(policy.parameters())
    content = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "parameters": sum(p.numel() for p in params),
        "unit": "nats; rows are probe texts, columns training samples",
        "probes": [
            {"id": row.id, "text": row.name, "tokens": row.scored, "logprob": before}
            for row, before in zip(probes, found.before.tolist(), strict=True)
        ],
        "train": [
            {"id": update.rows[0].id, "pulls": {r.name: p for r, p in zip(update.rows, update.pulls, strict=True)}}
            for update in updates
        ],
        "predicted": found.predicted.tolist(),
        "real": found.real.tolist(),
        "predicted_by_part": {part: values.tolist() for part, values in found.parts.items()},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def heat_map(probes: Sequence[Row], updates: Sequence[Update], found: StepCheck, *, eta: float, loss: str) -> Figure:
    """Predicted and real changes side by side: probe texts down, training samples across, colours centred on 0.

    The largest fiftieth of the changes share the deepest colours.

    Args:
        probes: O probe texts. updates: U examples. found: changes of each by each, nats.
        eta: step size. loss: its loss, for the title.
    """
    import numpy as np
    from matplotlib.figure import Figure

    rows, columns = len(probes), len(updates)
    panels = {"first-order prediction": found.predicted.cpu().numpy(), "real step": found.real.cpu().numpy()}
    # A few large changes, such as a text's own, must not leave all others white.
    limit = float(np.quantile(np.abs(np.stack(list(panels.values()))), _SHADED)) or 1.0
    cell = 0.62 if columns <= _NUMBERED else 0.3
    size = 4.2 + 2 * max(2.2, cell * columns), 2.6 + max(1.5, 0.3 * rows)  # inches
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        shown = axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("training sample (one step on it alone)", fontsize=9)
        axis.set_xticks(range(columns), [_tail(u.rows[0].id) for u in updates], rotation=90, fontsize=7)
        if columns <= _NUMBERED:
            for row, column in np.ndindex(rows, columns):
                value = values[row, column]
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(column, row, f"{value:+.1e}", ha="center", va="center", fontsize=6, color=colour)
    axes[0].set_yticks(range(rows), [f"{_tail(row.id)} {row.name}" for row in probes], fontsize=7)
    axes[0].set_ylabel("probe text", fontsize=9)
    axes[1].tick_params(left=False)
    bar = figure.colorbar(shown, ax=axes, shrink=0.9, extend="both")
    bar.set_label("Δ log π of the probe text,\nnats (blue: rises)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"Influence of one {loss.upper()} step, η = {eta:g}", fontsize=11)
    return figure


def _tail(id: str) -> str:
    return id if len(id) <= _NAME else "…" + id[1 - _NAME :]


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Written under another name and renamed, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    write(temporary)
    os.replace(temporary, path)


def _show(probes: Sequence[Row], updates: Sequence[Update], found: StepCheck, args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    names = list(dict.fromkeys(row.name for row in probes))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("probe")
    table.add_column("step on")
    for name in names:
        table.add_column(f"{name}, predicted", justify="right")
        table.add_column("real", justify="right")
    for id in dict.fromkeys(row.id for row in probes):
        places = {row.name: o for o, row in enumerate(probes) if row.id == id}
        for u, update in enumerate(updates):
            cells = [
                f"{values[places[name], u]:+.3g}" if name in places else "–"
                for name in names
                for values in (found.predicted, found.real)
            ]
            table.add_row(*map(Text, (_tail(id) if u == 0 else "", _tail(update.rows[0].id), *cells)))
        table.add_section()
    console.print(f"change of log π in nats by one {args.loss} step of eta {args.eta:g} on one sample\n")
    console.print(table)
    missed = float((found.real - found.predicted).norm() / found.real.norm().clamp(min=1e-300))
    console.print(f"\nThe first order misses {100 * missed:.2g} % of the real changes (root mean square).")
    if missed > _MISSED:
        console.print(f"That is much: an --eta below {args.eta:g} makes it smaller in proportion.")
    console.print(f"influence: {args.out}; picture: {args.image}")
