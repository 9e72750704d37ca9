"""The main job on the embedded default: `make demo`.

A small VLM with random weights learns the embedded world: its eyes first, then supervised fine-tuning on questions
with chains of thought; then the model directory that came out is evaluated, in domain and out of domain. Everything is
done by `lightning-vlm` commands, printed before they run; a demo that was cut off goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

SPLITS = {
    "test": "in domain, unseen pictures",
    "ood_pairs": "colour-shape pairs never seen together",
    "ood_two_attributes": "counts by colour and shape at once",
    "ood_numbers": "angles and side lengths never seen",
}
FAMILIES = ("count", "bars", "angle", "perimeter")


def command(*words: str) -> None:
    """Print a lightning-vlm command and run it; its failure is ours."""
    print(f"\n$ lightning-vlm {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "lightning_vlm.cli.main", *words]).returncode
    if code:
        sys.exit(code)


def fit(experiment: str, run_dir: Path, *more: str) -> None:
    """Train unless it is done already; an interrupted run is resumed."""
    if (run_dir / "model").is_dir():
        print(f"\n{run_dir}/model is there already")
        return
    resume = ["--resume"] if (run_dir / "config.yaml").exists() else []
    command("fit", "-c", experiment, "--run_dir", str(run_dir), *resume, *more)


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def table(results: dict[str, float]) -> Table:
    """Accuracy by split and family, in per cent."""
    out = Table(title="Greedy accuracy, % (world/exact), of the model directory", caption="95 % intervals by Wilson")
    for column, justify in (("split", "left"), ("all [95 %]", "right"), *((f, "right") for f in FAMILIES)):
        out.add_column(column, justify=justify)
    out.add_column("captions", justify="right")
    out.add_column("n", justify="right")
    for split, meaning in SPLITS.items():
        values = {k.split("/", 2)[2]: v for k, v in results.items() if k.startswith(f"test/{split}/")}
        n = int(values["n"])
        low, high = interval(values["accuracy"], n)
        cells = [f"{100 * values['accuracy']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"]
        for name in (*(f"family/{family}" for family in FAMILIES), "family/caption"):
            cells.append(f"{100 * values[name]:.0f}" if name in values else "")
        out.add_row(f"{split}: {meaning}", *cells, str(n))
    return out


def main() -> None:
    """Warm-up, SFT, evaluation, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="where it all goes (default runs/demo)")
    parser.add_argument("--model", default="qwen2_5_vl", choices=["qwen2_5_vl", "llava"], help="architecture")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of SFT (default 500; 1000 learn more)")
    args = parser.parse_args()
    student = ("-c", f"model/{args.model}-student")
    run = args.run_dir
    fit("experiment/world-warmup", run / "warmup", *student)
    chains = 32 * int(0.7 * args.steps)  # a curriculum: chains of thought first, then 30 % direct answers
    steps = ("--trainer.max_steps", str(args.steps), "--data.train.world.options.chains_first", str(chains))
    fit("experiment/world-sft", run / "sft", "--backbone.path", str(run / "warmup" / "model"), *steps)
    model = ("--backbone.path", str(run / "sft" / "model"))
    command("test", "-c", "experiment/world-test", "--run_dir", str(run / "test"), *model)
    results = json.loads((run / "test" / "test.json").read_text())
    print()
    Console(width=None if sys.stdout.isatty() else 150).print(table(results))
    print(f"model directory   {run / 'sft' / 'model'}")
    print(f"answers, pictures {run / 'test' / 'evaluations'}")
    print("curves            mlflow ui --backend-store-uri sqlite:///mlflow.db")


if __name__ == "__main__":
    main()
