"""The main job on the embedded default: `make demo`.

A small VLM with random weights learns the embedded world: its eyes first, then supervised fine-tuning on questions
with chains of thought; then the model directory that came out is evaluated, in domain and out of domain. Everything is
done by `lightning-vlm` commands, printed before they run; a demo that was cut off goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
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


def table(evaluations: Path) -> Table:
    """Accuracy by split and family, in per cent, from the files that the evaluation left."""
    out = Table(
        title="Greedy accuracy, % (world/exact), of the model directory",
        caption="95 % intervals by bootstrap over questions",
    )
    for column, justify in (("split", "left"), ("all [95 %]", "right"), *((f, "right") for f in FAMILIES)):
        out.add_column(column, justify=justify)
    out.add_column("captions", justify="right")
    out.add_column("n", justify="right")
    for split, meaning in SPLITS.items():
        (file,) = (evaluations / split).glob("step-*/scores.json")
        scores = json.loads(file.read_text())
        low, high = scores["intervals"]["accuracy"]
        cells = [f"{100 * scores['accuracy']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"]
        for name in (*FAMILIES, "caption"):
            share = scores.get(f"family/{name}")
            cells.append("" if share is None else f"{100 * share:.0f}")
        out.add_row(f"{split}: {meaning}", *cells, str(scores["n"]))
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
    evaluations = run / "test" / "evaluations"
    print()
    Console(width=None if sys.stdout.isatty() else 150).print(table(evaluations))
    print(f"model directory   {run / 'sft' / 'model'}")
    print(f"answers, pictures {evaluations}")
    print("curves            mlflow ui --backend-store-uri sqlite:///mlflow.db")


if __name__ == "__main__":
    main()
