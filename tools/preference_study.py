"""The experiments on preference learning that docs/preference-learning.md reports, on captions of the embedded world.

    python -m tools.preference_study --groups cooling,floor --seeds 0,1,2 --jobs 2

Every run is a `lightning-vlm fit` command in runs/preference/ARM-SEED, printed before it starts; what is there already
is not run again. A group's table stands in runs/preference/GROUP.md: means over the seeds with 95 % t-intervals.

Groups: stage1 (SFT against SFT-C), cooling (DPO against CW-DPO), floor (ℓ_floor), ablations, negatives, width, text.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lightning_vlm.metrics.statistics import mean_interval
from tools.commands import run_logged

RULE = ("--model.negatives.rule", "world/exact", "--model.negatives.max_new_tokens", "32")


@dataclass(frozen=True)
class Arm:
    """One recipe.

    Attributes:
        experiment: configuration that it runs. start: arm whose model it starts from; None starts from random weights.
        settings: overrides on the command line.
    """

    experiment: str
    start: str | None
    settings: tuple[str, ...] = field(default=())

    def but(self, *settings: str, start: str | None = None) -> Arm:
        """The same with other settings, or from another start."""
        return Arm(self.experiment, start or self.start, (*self.settings, *settings))


SMALL, LARGE = ("-c", "model/qwen2_5_vl-small"), ("-c", "model/qwen2_5_vl-teacher")
WORDS = tuple(
    word
    for place in (
        "data.train.captions.options",
        "callbacks.Benchmarks.benchmarks.captions.source.options",
        "callbacks.Benchmarks.benchmarks.final.source.options",
        "callbacks.Benchmarks.benchmarks.top5.source.options",
        "callbacks.LearningDynamics.source.options",
    )
    for word in (f"--{place}.text_only", "true")
)
SFT, SFT_C = Arm("world-captions", "warmup"), Arm("world-sft-c", "warmup")
DPO, CW = Arm("world-dpo", "sft"), Arm("world-cw-dpo", "sft")
EDITS = ("--data.train.captions.options.easy_pairs", "0")
SOURCES = {
    "edits": EDITS,
    "on-policy": (*RULE, "--model.negatives.data", "0", "--model.negatives.on_policy", "1"),
    "beam": (*RULE, "--model.negatives.data", "0", "--model.negatives.beam", "1"),
    **{
        f"{share} % on-policy": (
            *(*EDITS, *RULE, "--model.negatives.data", str(1 - share / 100)),
            *("--model.negatives.on_policy", str(share / 100), "--model.negatives.refresh", "4"),
        )
        for share in (25, 50, 75)
    },
}
# Sweeps are shorter: half the steps, evaluated at their end on fewer pictures.
SHORT = (
    *("--trainer.max_steps", "100", "--callbacks.Benchmarks.benchmarks.captions.every", "100"),
    *("--callbacks.Benchmarks.benchmarks.top5.source.options.size", "64"),
)
SHORT_DPO, SHORT_CW = DPO.but(*SHORT), CW.but(*SHORT)
SHORT_SFT_C = SFT_C.but(*SHORT, *("--model.lr", "3.0e-4", "--model.optimizer", "adamw"), start="sft")

ARMS: dict[str, Arm] = {
    "warmup": Arm("world-warmup", None),
    "sft": SFT,
    "sft-c": SFT_C,
    "sft-c lazy 8": SFT_C.but("--model.lazy", "8"),
    "sft-c fraction .25": SFT_C.but("--model.negative_fraction", "0.25"),
    "sft-c smooth": SFT_C.but("--model.mode", "smooth"),
    "dpo": DPO,
    "cw-dpo": CW,
    "floor -5": CW.but("--model.ell_floor", "-5.0"),
    "floor -2": CW.but("--model.ell_floor", "-2.0"),
    "floor mean": CW.but("--model.ell_floor", "mean"),
    "dpo, 100 steps": SHORT_DPO,
    "cw-dpo, 100 steps": SHORT_CW,
    "focal-dpo": SHORT_DPO.but("--model.weighting", "focal"),
    "constant weight .5": SHORT_CW.but("--model.tau", "1.0e6"),
    "weight not detached": SHORT_CW.but("--model.detach_weight", "false"),
    "dpo, hopeless < -5 left out": SHORT_DPO.but("--model.hopeless_below", "-5.0"),
    "cw-dpo, hopeless < -5 left out": SHORT_CW.but("--model.hopeless_below", "-5.0"),
    "sft-c after sft": SHORT_SFT_C,
    "dpo after sft-c": SHORT_DPO.but(start="sft-c after sft"),
    "cw-dpo after sft-c": SHORT_CW.but(start="sft-c after sft"),
    **{f"cw-dpo, {name}": SHORT_CW.but(*settings) for name, settings in SOURCES.items()},
    **{f"dpo, {name}": SHORT_DPO.but(*SOURCES[name]) for name in ("edits", "on-policy")},
    **{
        f"{arm} {size}": ARM.but(*model, start=None if ARM.start is None else f"{ARM.start} {size}")
        for size, model in ((".1M", SMALL), ("1.6M", LARGE))
        for arm, ARM in (
            ("warmup", Arm("world-warmup", None)),
            ("sft", SFT),
            ("dpo, 100 steps", SHORT_DPO),
            ("cw-dpo, 100 steps", SHORT_CW),
        )
    },
    "sft text": Arm("world-captions", None, WORDS),
    "dpo text": SHORT_DPO.but(*WORDS, start="sft text"),
    "cw-dpo text": SHORT_CW.but(*WORDS, start="sft text"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "stage1": ("sft", "sft-c", "sft-c lazy 8", "sft-c fraction .25", "sft-c smooth"),
    "cooling": ("sft", "dpo", "cw-dpo"),
    "floor": ("sft", "floor -5", "cw-dpo", "floor -2", "floor mean"),
    "ablations": (
        *("dpo, 100 steps", "focal-dpo", "cw-dpo, 100 steps", "constant weight .5", "weight not detached"),
        *("dpo, hopeless < -5 left out", "cw-dpo, hopeless < -5 left out"),
        *("sft-c after sft", "dpo after sft-c", "cw-dpo after sft-c"),
    ),
    "negatives": (
        *("dpo, 100 steps", "dpo, edits", "dpo, on-policy", "cw-dpo, 100 steps"),
        *(f"cw-dpo, {name}" for name in SOURCES),
    ),
    "width": tuple(
        f"{arm}{size}" for size in (" .1M", "", " 1.6M") for arm in ("sft", "dpo, 100 steps", "cw-dpo, 100 steps")
    ),
    "text": ("sft text", "dpo text", "cw-dpo text"),
}


def folder(root: Path, arm: str, seed: int) -> Path:
    """Where a run lives."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in arm)
    return root / f"{name}-{seed}"


def command(root: Path, name: str, seed: int) -> list[str]:
    """The words after `lightning-vlm` that run an arm under a seed."""
    arm = ARMS[name]
    files = [word for i, word in enumerate(arm.settings) if word == "-c" or (i and arm.settings[i - 1] == "-c")]
    more = [word for i, word in enumerate(arm.settings) if word != "-c" and not (i and arm.settings[i - 1] == "-c")]
    words = ["fit", "-c", f"experiment/{arm.experiment}", *files, "-c", "logger/csv", "--logger.MLFlow", "null"]
    words += ["--run_dir", str(folder(root, name, seed)), "--seed_everything", str(seed), *more]
    if arm.start is not None:
        words += ["--backbone.path", str(folder(root, arm.start, seed) / "model")]
    else:
        words += ["--backbone.seed", str(seed)]
    return words


def levels(names: set[str]) -> Iterator[list[str]]:
    """The arms with all that they start from, in an order in which they can run."""
    needed = set(names)
    while more := {ARMS[name].start for name in needed} - needed - {None}:
        needed |= more
    done: set[str | None] = {None}
    while needed:
        ready = sorted((name for name in needed if ARMS[name].start in done), key=list(ARMS).index)
        yield ready
        done |= set(ready)
        needed -= set(ready)


def run(root: Path, name: str, seed: int) -> None:
    """One run, unless its model is there; an interrupted one goes on.

    Raises:
        RuntimeError: it failed; names its log.
    """
    where = folder(root, name, seed)
    if (where / "model").is_dir():
        return
    words = command(root, name, seed) + (["--resume"] if (where / "config.yaml").exists() else [])
    log = where.with_suffix(".log") if not where.suffix else where.parent / f"{where.name}.log"
    if code := run_logged(words, log):
        raise RuntimeError(f"{name}, seed {seed}: failed with code {code}; see {log}")


# --- results ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "exact": "greedy captions right, %",
    "CIDEr": "CIDEr-D of the greedy caption",
    "top-5": "mean CIDEr-D of five samples",
    "chosen": "log π(chosen), nats/token",
    "argmax": "log π of the most likely tokens",
    "entropy": "entropy, nats",
    "TV": "total variation from the start",
    "JS": "Jensen-Shannon from the start, nats",
    "ECE": "calibration error of tokens",
    "to 95 %": "steps to 95 % of the best CIDEr-D",
    "alarm": "SqueezingStop fired",
}


def results(root: Path, name: str, seed: int) -> dict[str, float]:
    """Figures of one run, by column."""
    where = folder(root, name, seed)
    curve = {
        int(path.parent.name.removeprefix("step-")): json.loads(path.read_text())
        for path in sorted((where / "evaluations" / "captions").glob("step-*/scores.json"))
    }
    final, top = (
        json.loads(next((where / "evaluations" / name).glob("step-*/scores.json")).read_text())
        for name in ("final", "top5")
    )
    probe = [json.loads(line) for line in (where / "probes" / "probe" / "summary.jsonl").read_text().splitlines()][-1]
    best = max(scores["CIDEr"] for scores in curve.values())
    log = where.parent / f"{where.name}.log"
    return {
        "exact": 100 * final["exact"],
        "CIDEr": final["CIDEr"],
        "top-5": top["CIDEr_mean"],
        "chosen": probe["chosen"],
        "argmax": probe["argmax"],
        "entropy": probe["entropy"],
        "TV": probe["tv"],
        "JS": probe["js"],
        "ECE": probe["ece"],
        "to 95 %": float(min(step for step, scores in curve.items() if scores["CIDEr"] >= 0.95 * best)),
        "alarm": float("SqueezingStop" in log.read_text()),
    }


def cell(values: list[float]) -> str:
    """Mean and half the 95 % interval over seeds."""
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 10 else 2 if abs(mean) >= 0.1 else 3
    if len(values) < 2 or min(values) == max(values):
        return f"{mean:.{digits}f}"
    low, high = mean_interval(values)
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def table(root: Path, names: tuple[str, ...], seeds: list[int]) -> str:
    """Markdown of a group."""
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in names:
        found = [results(root, name, seed) for seed in seeds]
        cells = [
            f"{sum(r['alarm'] for r in found):.0f} of {len(found)}" if c == "alarm" else cell([r[c] for r in found])
            for c in COLUMNS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- what a step costs -----------------------------------------------------------------------------------------------

BARE = tuple(
    word
    for name in ("Benchmarks", "LearningDynamics", "SqueezingStop", "EntropyMonitor", "SaveModel", "Checkpoint")
    for word in (f"--callbacks.{name}", "null")
)


def costs(root: Path, rounds: int, steps: int = 25) -> str:
    """Markdown: seconds of a step of stage 1, arms taking turns, from a model that finds negatives unlikely (the
    constraint sleeps) and from one that finds them likely (it acts)."""
    lines = ["| arm | asleep, s | ratio to SFT | acting, s | ratio to SFT |", "|---|---|---|---|---|"]
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        for start in ("warmup", "sft"):
            for name in GROUPS["stage1"]:
                arm = Arm(
                    ARMS[name].experiment, start, (*ARMS[name].settings, *BARE, "--trainer.max_steps", str(steps))
                )
                ARMS["(cost)"] = arm
                where = root / "costs"
                shutil.rmtree(where, ignore_errors=True)
                words = command(root, "(cost)", 0)
                words[words.index("--run_dir") + 1] = str(where)
                words += ["--trainer.log_every_n_steps", "1"]
                call = [sys.executable, "-m", "lightning_vlm.cli.main", *words]
                subprocess.run(call, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                with next(where.glob("**/metrics.csv")).open() as file:
                    rows = [row["train/seconds"] for row in csv.DictReader(file) if row.get("train/seconds")]
                seconds.setdefault((start, name), []).append(statistics.median(map(float, rows[5:])))
                print(f"turn {turn + 1} of {rounds}: {name} from {start}: {seconds[start, name][-1]:.3f} s", flush=True)
    for name in GROUPS["stage1"]:
        cells = []
        for start in ("warmup", "sft"):
            mine, base = seconds[start, name], seconds[start, "sft"]
            ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
            cells += [
                f"{statistics.median(mine):.3f}",
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="which experiments (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="training seeds (default 0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each (default 2)")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/preference"), help="default runs/preference")
    parser.add_argument("--costs", type=int, metavar="N", help="only time stage 1's steps, arms taking turns N times")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    chosen = args.groups.split(",")
    if unknown := [name for name in chosen if name not in GROUPS]:
        parser.error(f"no group is named {unknown[0]!r}; choose among {', '.join(GROUPS)}")
    if args.costs:
        text = costs(args.run_dir, args.costs)
        (args.run_dir / "costs.md").write_text(text)
        print(text)
        return
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = {name for group in chosen for name in GROUPS[group]}
    plan = [] if args.report else list(levels(wanted))
    total = len(seeds) * sum(map(len, plan))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("runs", total=total)
        for level in plan:
            with ThreadPoolExecutor(args.jobs) as pool:
                jobs = [pool.submit(run, args.run_dir, name, seed) for seed in seeds for name in level]
                for job in jobs:
                    job.result()
                    bar.advance(task)
    for group in chosen:
        text = table(args.run_dir, GROUPS[group], seeds)
        (args.run_dir / f"{group}.md").write_text(text)
        print(f"\n{group} (seeds {args.seeds})\n\n{text}")
    print("\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items()))


if __name__ == "__main__":
    main()
