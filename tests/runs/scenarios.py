"""Training scenarios in a process of their own: `python -m tests.runs.scenarios SPEC OUT`, alone or under torchrun.

SPEC is a JSON list of scenarios (see `run`); rank 0 writes {scenario name: record} to OUT with torch.save.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_vlm.losses.kernel as kernel
from callbacks.alarms import EntropyFloor
from callbacks.bad_samples import BadSamples
from callbacks.benchmarks import Benchmarks
from callbacks.checkpoint import Checkpoint, last_checkpoint
from callbacks.dynamics import LearningDynamics
from lightning_vlm import algorithms
from lightning_vlm.algorithms import GRPO, SFT
from lightning_vlm.algorithms.negatives import Negatives
from lightning_vlm.algorithms.on_policy import OnPolicy
from lightning_vlm.algorithms.totals import Micro
from lightning_vlm.benchmarks import Benchmark, BenchmarkSpec
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.losses.terms import Term
from lightning_vlm.models.parts import PartPolicy
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import RolloutSampling, decode
from lightning_vlm.strategies import FSDP2


class TwoTerms(SFT):
    """A toy objective: a mean over tokens plus half a mean over rows, each with its own count."""

    def losses(self, batch):
        scores = self.policy.score(batch)
        per_row = scores.per_row(scores.logprobs, len(batch.rows))
        real = torch.tensor([float(row.scored > 0) for row in batch.rows], dtype=per_row.dtype)
        terms = {"tokens": Term(-scores.logprobs.sum()), "rows": Term((per_row.square() * real).sum(), 0.5)}
        return Micro(terms, {}, scores)

    def counts(self, items):
        rows = [row for item in items for row in item]
        return {"tokens": float(sum(r.scored for r in rows)), "rows": float(sum(r.scored > 0 for r in rows))}


class Exchanges(TorchDispatchMode):
    """Counts collective calls of this rank."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


class CountedExchanges(GRPO):
    """Reports how often ranks talk to each other while they generate."""

    def generate(self, rows, keys):
        with Exchanges() as exchanges:
            completions = super().generate(rows, keys)
        self.exchanges = float(exchanges.count)
        return completions

    def annotate(self, items):
        self._fresh["exchanges"] = self.exchanges


def algorithm_class(name: str) -> type:
    """A class exported by the package, one of this file, or one at a dotted path."""
    module, _, own = name.rpartition(".")
    return getattr(import_module(module), own) if module else globals().get(name) or getattr(algorithms, name)


class Record(L.Callback):
    """What each optimizer step reported and learned from; the first and the last step's gradients, whole."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.steps: list[dict[str, float]] = []
        self.rows: list[list[tuple]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.last_gradients: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer, module) -> None:
        accumulate, apply_gradients, report = module.accumulate, module._apply_gradients, module._report

        def note_rows(items, *args):
            if len(self.rows) == len(self.steps):  # a step may make a second pass
                self.rows.append([facts(row) for item in items for row in item])
            return accumulate(items, *args)

        def note_gradients(optimizer):
            norms = apply_gradients(optimizer)
            if not self.gradients or module.clock == trainer.max_steps - 1:
                work, named = optimizer.optimizer.work, module.policy.model.named_parameters()
                self.last_gradients = {name: whole(work[p].grad).clone() for name, p in named if p in work}
                self.gradients = self.gradients or self.last_gradients
            return norms

        def note_report(*args):
            report(*args)
            self.steps.append(module.last_step["metrics"])

        module.accumulate, module._apply_gradients, module._report = note_rows, note_gradients, note_report

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.kill_at is None or module.clock != self.kill_at:
            return
        if not isinstance(module, OnPolicy):
            os.kill(os.getpid(), signal.SIGKILL)
        # In the middle of a rollout: prompts have run, the first tokens are about to be drawn.
        decode.draw_tokens = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def facts(row) -> tuple:
    """Id, name, kind of a generated negative, scored ids, and the reference's log-prob of them."""
    ids = tuple(row.input_ids[row.loss_mask].tolist())
    return row.id, row.name, row.info.get("negative"), ids, row.info.get("reference_logprob")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, a plain one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def over_ranks(value: Any) -> list[Any]:
    """What each rank has."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def sources(spec: dict[str, Any]) -> dict[str, SourceSpec]:
    """The scenario's JSONL, or the embedded world, once or under several names."""
    worlds = spec.get("worlds", {"train": spec["world"]} if "world" in spec else {})
    named = {name: SourceSpec(kind="world", split="train", options=options) for name, options in worlds.items()}
    return named or {"train": SourceSpec(kind="messages", path=spec["data"])}


def benchmark(options: dict[str, Any]) -> BenchmarkSpec:
    """World questions answered by sampling, so that draws, too, must not depend on ranks."""
    options = dict(options)
    every = options.pop("every", 1)
    world = SourceSpec(kind="world", split="val", options=options)
    return BenchmarkSpec(source=world, every=every, temperature=1.0, n=2, max_new_tokens=6)


def probe(options: dict[str, Any]) -> LearningDynamics:
    """Pairs of the world, followed every second step; answers to its questions graded."""
    world = SourceSpec(kind="world", split="val", options={**options, "pairs": True})
    return LearningDynamics(source=world, every=2, draw_every=0, answer_rule="own", max_new_tokens=4)


def unscorable(benchmark: Benchmark, records: list[dict[str, Any]]):
    """What a benchmark does whose scorer fails."""
    raise ValueError("the scorer is not installed")


def run(spec: dict[str, Any], world: int) -> dict[str, Any]:
    """One scenario.

    Keys: `model`, `data` JSONL, `world` options or `worlds` (options by name), `dtype`, `algorithm` class name,
    `strategy` (auto | ddp | fsdp2), `mixed_precision`, `precision`, `steps`, `batch_size`, `settings` of the algorithm,
    `chunk_bytes`, `shuffle`, `run_dir`, `checkpoint`, `resume` ("last"), `kill_at` step, `workers`, `on_bad_sample`,
    `benchmark` (options of the world it asks about), `unscorable` (its scoring fails), `probe` (options of the world it
    follows), `alarm` (lowers the learning rate at the first probe), `cache` (folder of stores), `refused` (the record
    is a ValueError).
    """
    os.environ["LVLM_CACHE"] = spec.get("cache", os.environ["LVLM_CACHE"])
    kernel.CHUNK_BYTES = spec.get("chunk_bytes", kernel.CHUNK_BYTES)
    backbone = Backbone(path=spec["model"], dtype=spec.get("dtype", "float64"))
    settings = dict(spec.get("settings", {}))
    settings["parts"] = {part: PartPolicy(**policy) for part, policy in settings.get("parts", {}).items()}
    if "negatives" in settings:
        settings["negatives"] = Negatives(**settings["negatives"])
    if "rewards" in settings:
        settings["rewards"] = {name: Reward(**reward) for name, reward in settings["rewards"].items()}
    if "rollout" in settings:
        settings["rollout"] = RolloutSampling(**settings["rollout"])
    module = algorithm_class(spec.get("algorithm", "SFT"))(backbone=backbone, **settings)
    data = VLMData(
        backbone=backbone,
        train=sources(spec),
        batch_size=spec.get("batch_size", 8),
        workers=spec.get("workers", 0),
        shuffle=spec.get("shuffle", True),
        on_bad_sample=spec.get("on_bad_sample", "error"),
    )
    run_dir = Path(spec["run_dir"])
    record = Record(spec.get("kill_at"))
    callbacks: list[L.Callback] = [record, BadSamples()]
    if spec.get("checkpoint", False):
        callbacks.append(Checkpoint(every=1))
    if "benchmark" in spec:
        callbacks.append(Benchmarks(benchmarks={"world": benchmark(spec["benchmark"])}))
    if "probe" in spec:
        callbacks.append(probe(spec["probe"]))
    if spec.get("alarm", False):
        callbacks.append(EntropyFloor(floor=100.0, patience=1, action="lower_lr", factor=0.5))
    if spec.get("unscorable", False):
        Benchmark.summary = unscorable
    strategy = spec.get("strategy", "auto")
    if strategy == "fsdp2":
        strategy = FSDP2(mixed_precision=spec.get("mixed_precision", "none"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision=spec.get("precision", "32-true"),
        max_steps=spec.get("steps", 1),
        logger=False,
        callbacks=callbacks,
        default_root_dir=run_dir,
        enable_checkpointing=bool(spec.get("checkpoint", False)),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    resume = last_checkpoint(run_dir) if spec.get("resume") == "last" else None
    trainer.fit(module, data, ckpt_path=resume)
    weights = {name: whole(p.data).clone() for name, p in module.policy.model.named_parameters()}
    return {
        "records": module.records,
        "losses": [step["train/loss"] for step in record.steps],
        "steps": record.steps,
        "rows": over_ranks(record.rows),
        "computed": sum(over_ranks(getattr(getattr(module, "reference", None), "computed", 0))),
        "gradients": record.gradients,
        "last_gradients": record.last_gradients,
        "weights": weights,
        "metrics": module.last_step["metrics"],
        "evaluated": over_ranks({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}),
    }


def attempt(spec: dict[str, Any], world: int) -> dict[str, Any]:
    """`run`, or what it was refused for, where that is expected."""
    cache = os.environ["LVLM_CACHE"]
    try:
        return run(spec, world)
    except Exception as error:
        if spec.get("refused", False) and isinstance(error, ValueError):
            return {"error": str(error)}
        error.add_note(f"in scenario {spec['name']}")
        raise
    finally:
        os.environ["LVLM_CACHE"] = cache


def main(spec_file: str, out: str) -> None:
    """Run all scenarios of a spec file; rank 0 writes their records."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    records = {spec["name"]: attempt(spec, world) for spec in json.loads(Path(spec_file).read_text())}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(records, out)


def in_process(spec_file: str, out: str, env: dict[str, str], log: str) -> None:
    """`main` in a freshly forked process, its output in `log`."""
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    main(spec_file, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
