"""Learning dynamics: what training does to the chosen answers, to their rivals, and to the distributions around."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.benchmarks import Evaluations
from lightning_vlm.algorithms.probing import StartDistributions
from lightning_vlm.benchmarks import BenchmarkSpec, open_benchmark
from lightning_vlm.benchmarks.probe import Preference, Probe
from lightning_vlm.data.module import Evaluation
from lightning_vlm.data.probe import ProbeSamples
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.metrics.calibration import Reliability

FOLDER = "probes"
RECORDS, SUMMARY, PICTURES = "records.jsonl", "summary.jsonl", "pictures"


class LearningDynamics(Evaluations):
    """Follows a held-out probe set through a stage: before its first step, every so many steps, and at its end.

    Scored are the chosen answer, the rejected one, a paraphrase, another image's answer, and the chosen words permuted;
    along the chosen answer entropy, calibration, and how far the distributions moved from the stage's start. Logged as
    `val/<name>/<quantity>` and written to run_dir/probes/<name>: `records.jsonl` (a line per probe and sample),
    `summary.jsonl` (a line per probe), `pictures/*.png`, `start.safetensors`; but for the last, these become artifacts
    of an MLflow logger. What is measured, and in which units: `docs/learning-dynamics.md`.

    Args:
        source: samples with answers, best with pairs and references; not trained on.
        name: what the metrics are called by.
        every: optimizer steps between probes.
        limit: only the first so many samples of the source; None takes all.
        beta: scale of the implied reward margin. A model with `beta`, `tau` and `ell_floor` of its own goes before.
        tau: temperature of the cooling weight, nats per token; likewise.
        ell_floor: floor of the cooling weight, nats per token; likewise.
        distributions: keep the start's hidden states and head, and measure TV and JS to them; False for models whose
            head is too large to keep.
        answer_rule: also answer greedily and grade by this rule; `own` takes the source's own. None asks nothing.
        max_new_tokens: longest greedy answer in tokens.
        draw_every: probes between pictures; they are drawn at the end in any case. 0 draws then only.
        seed: of the drawn texts.

    Raises:
        ValueError: a number out of range, a rule that cannot grade the source, or a run resumed without its start.
    """

    def __init__(
        self,
        *,
        source: SourceSpec,
        name: str = "probe",
        every: int = 50,
        limit: int | None = 128,
        beta: float = 0.1,
        tau: float = 1.0,
        ell_floor: float = -3.0,
        distributions: bool = True,
        answer_rule: str | None = None,
        max_new_tokens: int = 256,
        draw_every: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if draw_every < 0 or (limit is not None and limit < 1):
            raise ValueError(
                f"LearningDynamics: limit must be at least 1 and draw_every not negative, got {limit}, {draw_every}"
            )
        if not (beta > 0 and tau > 0):
            raise ValueError(f"LearningDynamics: beta and tau must be positive, got {beta}, {tau}")
        self.source, self.name, self.every, self.limit = source, name, every, limit
        self.constants = Preference(beta=beta, tau=tau, ell_floor=ell_floor)
        self.distributions, self.answer_rule, self.max_new_tokens = distributions, answer_rule, max_new_tokens
        self.draw_every, self.seed = draw_every, seed

    def open(self) -> list[Evaluation]:
        """The one probe."""
        limits = [limit for limit in (self.source.limit, self.limit) if limit is not None]
        source = replace(self.source, limit=min(limits, default=None))
        probe = Probe(
            name=self.name,
            samples=ProbeSamples(open_source(source, for_training=False), seed=self.seed),
            every=self.every,
            rule=self._rule(source),
            max_new_tokens=self.max_new_tokens,
            distributions=self.distributions,
        )
        return [probe]

    def _rule(self, source: SourceSpec) -> Any:
        if self.answer_rule is None:
            return None
        rule = None if self.answer_rule == "own" else self.answer_rule
        return open_benchmark(BenchmarkSpec(source=source, rule=rule), self.name).rule

    @property
    def probe(self) -> Probe:
        """What is registered with the data module."""
        return self._open[0]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register the probe for training; evaluations apart from training have no start to compare with."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)
            self.probe.forget()
            self.probe.preference = lambda: preference_of(pl_module, self.constants)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the sanity check probed is not the start."""
        self.probe.forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe before the first step; a resumed run takes up its record, and what was due when it was cut off."""
        last, folder = pl_module.evaluated_at(self.name), self._folder(trainer)
        if last is None and pl_module.clock > 0:
            raise ValueError(
                f"LearningDynamics: the run that is resumed at step {pl_module.clock} was begun without probe "
                f"{self.name!r}, so its start is unknown; take the callback out, or start a new run"
            )
        if trainer.is_global_zero:
            for name in (RECORDS, SUMMARY):
                keep_lines(folder / name, -1 if last is None else last)
        if self.distributions:
            self.probe.start = StartDistributions(keep_head=trainer.is_global_zero)
        if last is not None:
            self._take_up(trainer, folder, last)
        if trainer.datamodule.due(self.probe):
            validate_now(trainer)
        if pl_module.evaluated_at(self.name) is None:
            raise ValueError("LearningDynamics needs validation: leave trainer.limit_val_batches at 1.0")

    def _take_up(self, trainer: Trainer, folder: Path, last: int) -> None:
        """Remember the start and the last probe of the run that is resumed."""
        if self.distributions:
            self.probe.start.open(folder)
        missing = None
        if trainer.is_global_zero:
            lines = read_lines(folder / RECORDS)
            for step, kept in ((0, self.probe.first), (last, self.probe.last)):
                kept.update({line["id"]: line for line in lines if line["step"] == step})
                missing = step if missing is None and not kept else missing
        missing = trainer.strategy.broadcast(missing)  # ranks must not wait for one that gave up
        if missing is not None:
            raise ValueError(
                f"{folder / RECORDS} has no line of step {missing}, with which a resumed run compares; start a new run"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the probe that just ran."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.name not in pl_module.records:
            return
        folder, start = self._folder(trainer), self.probe.start
        if start is not None and not start.complete:
            strategy = trainer.strategy
            start.write(folder, rank=trainer.global_rank, world=trainer.world_size, barrier=strategy.barrier)
        if not trainer.is_global_zero:
            return
        step, summary = pl_module.clock, pl_module.summaries[self.name]
        folder.mkdir(parents=True, exist_ok=True)
        append_lines(folder / RECORDS, ({"step": step} | record for record in pl_module.records[self.name]))
        curves = {name: curve_of(curve) for name, curve in summary.curves.items()}
        intervals = {name: list(interval) for name, interval in summary.intervals().items()}
        line = {"step": step} | summary.metrics | {"intervals": intervals, "reliability": curves}
        append_lines(folder / SUMMARY, [line])
        if self.draw_every and (probes := len(read_lines(folder / SUMMARY))) > 1 and probes % self.draw_every == 0:
            self._draw(trainer, folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole run."""
        if trainer.is_global_zero:
            self._draw(trainer, self._folder(trainer))

    def _draw(self, trainer: Trainer, folder: Path) -> None:
        from callbacks._dynamics_plots import draw

        draw(read_lines(folder / SUMMARY), folder / PICTURES, title=self.name)
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                place = f"{FOLDER}/{self.name}"
                for name in (RECORDS, SUMMARY):
                    logger.experiment.log_artifact(logger.run_id, str(folder / name), artifact_path=place)
                pictures = f"{place}/{PICTURES}"
                logger.experiment.log_artifacts(logger.run_id, str(folder / PICTURES), artifact_path=pictures)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER / self.name


def preference_of(pl_module: LightningModule, default: Preference) -> Preference:
    """The constants of the preference quantities: the model's own if it has all of them, else the default.

    Args:
        pl_module: may have `beta`, `tau` and `ell_floor`; where that is `mean`, the mean so far is `ell_floor_value`.
        default: of the callback.
    """
    if not all(hasattr(pl_module, name) for name in ("beta", "tau", "ell_floor")):
        return default
    floor = pl_module.ell_floor_value if pl_module.ell_floor == "mean" else pl_module.ell_floor
    return Preference(beta=pl_module.beta, tau=pl_module.tau, ell_floor=None if floor is None else float(floor))


def validate_now(trainer: Trainer) -> None:
    """A validation in between, of what is due; random states stay as they were.

    Args:
        trainer: in training, between two batches.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first_iteration = connector._first_loop_iter
    loop.restarting = False
    with isolate_rng():
        trainer.validating = True
        loop.run()
        trainer.training = True
    connector._first_loop_iter = first_iteration


def curve_of(curve: Reliability) -> dict[str, list[float]]:
    """A reliability curve as plain lists."""
    return {name: getattr(curve, name).tolist() for name in ("confidence", "accuracy", "count")}


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines, safe on disk when this returns."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All JSON lines of a file; what a killed run left half-written at its end is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            lines.append(json.loads(line))
    return lines


def keep_lines(path: Path, last: int) -> None:
    """Drop the lines of steps after `last`; the file is replaced as a whole."""
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    append_lines(temporary, (line for line in read_lines(path) if line["step"] <= last))
    temporary.replace(path)
