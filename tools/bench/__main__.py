"""Ours against TRL, side by side in one run, on a model and data that are made here.

    python -m tools.bench --suite cpu --against trl --works dpo,cw_dpo

Every contender is a process that stays alive and does one optimizer step when it is its turn: the same model directory,
data, precision (float32), threads, AdamW. Ours goes through Lightning's Trainer, the data module and the algorithm; TRL
through its own trainer. "As shipped" keeps TRL's defaults; "compacted" scores labelled positions only, as TRL does by
itself where Triton runs, recomputes no activations, and takes at most 8 rows at a time. Losses must agree before
anything is timed; where completions are sampled, both sides take the same prepared ones until then, and both rewards
are the same function of the ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tools.bench.material import SIZES, make_material
from tools.bench.report import draw, lines, processor_name, versions
from tools.bench.run import Unequal, groups, run_group, waiting
from tools.bench.works import WARM_UP, WORKS


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the process with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["cpu"], default="cpu", help="where it runs (default cpu)")
    parser.add_argument("--against", choices=["trl"], default="trl", help="the peer (default trl)")
    parser.add_argument("--works", default=",".join(WORKS), help=f"names, by commas (default {','.join(WORKS)})")
    parser.add_argument("--pairs", type=int, help="rounds that are timed (default 9)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, which give no 95 %% interval")
    parser.add_argument("--threads", type=int, default=1, help="threads of every process (default 1)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of model and data (default small, 23.9M)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--image", type=Path, help="write a picture of the ratios to this file")
    args = parser.parse_args(argv)
    args.works = [name.strip() for name in args.works.split(",") if name.strip()]
    if unknown := [name for name in args.works if name not in WORKS]:
        parser.error(f"--works: unknown {', '.join(unknown)}; valid: {', '.join(WORKS)}")
    if not args.works:
        parser.error(f"--works names nothing; valid: {', '.join(WORKS)}")
    if args.quick and args.pairs is not None:
        parser.error("--quick and --pairs both say how many rounds: give one of them")
    args.pairs = 3 if args.quick else 9 if args.pairs is None else args.pairs
    for name in ("pairs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("json", "image"):
        path = getattr(args, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name}: there is no folder {path.resolve().parent}")
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install 'lightning-vlm[trl]'")
    return args


def say(text: str) -> None:
    """Progress on stderr: one line that is overwritten on a terminal, else a line each."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:<79}", end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    args = parse(argv)
    from transformers.utils import logging

    logging.disable_progress_bar()
    results, parameters = [], 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for n, works in enumerate(groups([WORKS[name] for name in args.works])):
            say("making model and data")
            material = make_material(
                Path(folder) / str(n),
                works[0].size(SIZES[args.size]),
                steps=WARM_UP + args.pairs,
                kinds={contender.data for work in works for contender in work.timed()},
                warm_up=WARM_UP,
            )
            parameters = material.parameters
            try:
                results += run_group(works, material, pairs=args.pairs, threads=args.threads, say=say)
            except (Unequal, RuntimeError) as error:
                say("")
                print(f"error: {error}", file=sys.stderr)
                return 1
    say("")
    machine = f"{processor_name()}, {args.threads} thread(s), float32"
    model = f"{parameters / 1e6:.1f}M parameters"
    used = versions()
    print(f"{machine}; {args.pairs} rounds\n{model}\n" + ", ".join(f"{k} {v}" for k, v in used.items()))
    for result in results:
        print("\n" + "\n".join(lines(result)))
    if args.threads == 1 and (share := waiting(results)) > 0.05:
        print(f"\nwarning: {100 * share:.0f} % of the time was spent waiting for a processor: other work runs here")
    if args.json:
        report = {"suite": args.suite, "against": args.against, "machine": machine, "threads": args.threads}
        report |= {"pairs": args.pairs, "size": args.size, "model": model, "versions": used, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.image:
        draw(results, args.image, title=f"{machine}, {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
