"""What cached vision features save: optimizer steps with the cache and without, side by side in one run.

    python -m tools.bench_vision_cache --work benchmark --rounds 5

Each round is two processes, one after the other, that train the projector alone (SFT, or DPO with its online
reference) on the same samples through Lightning's Trainer. Where nothing is cached, the time within the tower is
measured inside the very steps, and step / (step − tower) says what leaving the tower out can save at best. Times are
CPU seconds of an optimizer step: collation, forward, backward, update; not of reading and resizing pictures, which the
loader's workers do in either case. Medians over steps, then over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

from tools.bench.material import SIZES, Size, make_material

EPOCH = 3  # optimizer steps in which every picture is seen once; the first epoch fills the cache and warms up
WORKS: dict[str, Size] = {
    # The model of `tools.bench` at 336 pixels (144 image tokens of 576 patches).
    "benchmark": replace(SIZES["small"], image=336),
    # A tower larger than its language model, as encoders of billions are in front of small ones.
    "vit-heavy": replace(SIZES["small"], image=336, vision_hidden=320, vision_layers=12),
    "tiny": SIZES["tiny"],
}


def measure(folder: Path, *, cached: bool, algorithm: str, batch: int, steps: int) -> dict[str, Any]:
    """Train in this process; CPU seconds per step of the epochs behind the first, and of the tower within them."""
    import warnings

    import lightning as L
    import torch

    from lightning_vlm import algorithms
    from lightning_vlm.data.module import VLMData
    from lightning_vlm.data.sources import SourceSpec
    from lightning_vlm.models.spec import Backbone
    from lightning_vlm.models.vision import tower_of

    class Watch(L.Callback):
        """Seconds of every step, and within the tower but not its merger, which is the projector."""

        def __init__(self) -> None:
            self.steps: list[float] = []
            self.towers: list[float] = []
            self.losses: list[float] = []
            self.inside = 0.0

        def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            tower = tower_of(module.policy.model, module.policy.family)
            for part, sign in ((tower, 1), (tower.merger, -1)):
                part.forward = self.timed(part.forward, sign)
            module.optimize = self.step(module.optimize)

        def step(self, optimize: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> None:
                self.inside, start = 0.0, process_time()
                optimize(*args, **kwargs)
                self.steps.append(process_time() - start)
                self.towers.append(self.inside)

            return call

        def timed(self, forward: Any, sign: int) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = process_time()
                out = forward(*args, **kwargs)
                self.inside += sign * (process_time() - start)
                return out

            return call

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            self.losses.append(module.last_step["metrics"]["train/loss"])

    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    backbone = Backbone(path=str(folder / "model"))
    settings: dict[str, Any] = {"lr": 1e-4, "schedule": "constant", "adapter_only": True, "vision_cache": cached}
    settings |= {"reference": "online"} if algorithm == "DPO" else {}
    module = getattr(algorithms, algorithm)(backbone=backbone, **settings)
    train = {"pairs": SourceSpec(kind="preference", path=str(folder / "preference.jsonl"))}
    data = VLMData(backbone=backbone, train=train, batch_size=batch, shuffle=False, workers=0)
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=EPOCH + steps,
        logger=False,
        callbacks=[watch],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    cache = module.policy.vision_cache
    images = EPOCH * batch
    return {
        "step": statistics.median(watch.steps[EPOCH:]),
        "tower": statistics.median(watch.towers[EPOCH:]),
        "best": statistics.median(
            step / (step - tower) for step, tower in zip(watch.steps[EPOCH:], watch.towers[EPOCH:], strict=True)
        ),
        "losses": watch.losses,
        "bytes": sum(f.stat().st_size for f in cache.store.folder.glob("*.bin")) / images if cached else 0,
    }


def main() -> None:
    """Alternate, and print ratios with their range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=list(WORKS), default="benchmark", help="sizes (default benchmark)")
    parser.add_argument("--algorithm", choices=["SFT", "DPO"], default="SFT", help="default SFT")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes (default 5)")
    parser.add_argument("--steps", type=int, default=6, help="steps measured in each (default 6)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--one", choices=["plain", "cached"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = WORKS[args.work]
    if args.one:
        figures = measure(
            args.folder, cached=args.one == "cached", algorithm=args.algorithm, batch=size.batch, steps=args.steps
        )
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_material(folder, size, steps=EPOCH).parameters
        print(
            f"{args.work}: {parameters / 1e6:.1f}M parameters, {size.image} pixels, {size.image_tokens} image tokens, "
            f"{size.batch} samples a step, {args.algorithm} of the projector alone, float32, {args.threads} thread(s), "
            f"{args.rounds} rounds of {args.steps} steps, seed 0"
        )
        result = report([pair(args, folder / str(n)) for n in range(args.rounds)])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def pair(args: argparse.Namespace, stores: Path) -> dict[str, dict[str, Any]]:
    """One process without the cache and one with it."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "LVLM_CACHE": str(stores)}
    own = ["--work", args.work, "--algorithm", args.algorithm, "--steps", str(args.steps)]
    found = {}
    for kind in ("plain", "cached"):
        command = [
            sys.executable,
            "-m",
            "tools.bench_vision_cache",
            "--one",
            kind,
            *own,
            "--folder",
            str(stores.parent),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(f"the {kind} run failed:\n{done.stderr}")
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Print medians and ranges over rounds, and give them."""
    figures = {
        "step without the cache, s": [r["plain"]["step"] for r in rounds],
        "of it in the tower, s": [r["plain"]["tower"] for r in rounds],
        "step with the cache, s": [r["cached"]["step"] for r in rounds],
        "step / (step − tower)": [r["plain"]["best"] for r in rounds],
        "measured speed-up": [r["plain"]["step"] / r["cached"]["step"] for r in rounds],
    }
    for name, values in figures.items():
        print(f"  {name:<28}{statistics.median(values):8.3f}  [{min(values):.3f}, {max(values):.3f}]")
    best, measured = (statistics.median(figures[name]) for name in ("step / (step − tower)", "measured speed-up"))
    same = all(r["plain"]["losses"] == r["cached"]["losses"] for r in rounds)
    size = rounds[0]["cached"]["bytes"]
    print(f"  measured / best             {measured / best:8.3f}")
    print(f"  disk per image              {size / 1024:8.0f} KiB")
    print(f"  losses of all steps equal bit for bit: {'yes' if same else 'NO'}")
    return {**figures, "bytes_per_image": size, "losses_equal": same}


if __name__ == "__main__":
    main()
