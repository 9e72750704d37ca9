"""Benchmarks as callbacks: they register what is to be evaluated; the module generates, grades and logs."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_vlm.benchmarks import BenchmarkSpec, HeldOut, open_benchmark
from lightning_vlm.data.module import Evaluation
from lightning_vlm.data.sources import SourceSpec, open_source


class Evaluations(Callback):
    """Base: opens evaluations at the start and registers them with the data module."""

    def __init__(self) -> None:
        self._open: list[Evaluation] = []

    def open(self) -> list[Evaluation]:
        """What is to be registered."""
        raise NotImplementedError(f"{type(self).__name__} must define open()")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the evaluations and register them with the data module.

        Raises:
            ValueError: the data module does not evaluate, another evaluation has the name, or a sample has no gold
                answer: said now, not after hours of training.
        """
        if stage == "predict":
            return
        if not hasattr(trainer.datamodule, "register"):
            raise ValueError(f"{type(self).__name__} needs a data module that evaluates, such as VLMData; set `data`")
        if not self._open:
            self._open = self.open()
            for evaluation in self._open:
                _ = evaluation.metric_names  # grades empty answers: a sample without gold shows here
        for evaluation in self._open:
            trainer.datamodule.register(evaluation)


class Benchmarks(Evaluations):
    """Any number of named benchmarks, each logged as `val/<name>/…` at its own interval.

    Args:
        benchmarks: name → what it is; null removes one that another file configured.
    """

    def __init__(self, *, benchmarks: dict[str, BenchmarkSpec | None]) -> None:
        super().__init__()
        self.specs = {name: spec for name, spec in benchmarks.items() if spec is not None}

    def open(self) -> list[Evaluation]:
        """The benchmarks of the specs."""
        return [open_benchmark(spec, name) for name, spec in self.specs.items()]


class HeldOutLoss(Evaluations):
    """Loss, entropy and token accuracy on texts that are not trained on; logged as `val/<name>/nll` and so on.

    Args:
        source: conversations with assistant texts.
        name: what the metrics are called by.
        every: optimizer steps between evaluations.
    """

    def __init__(self, *, source: SourceSpec, name: str = "held_out", every: int = 100) -> None:
        super().__init__()
        self.source, self.name, self.every = source, name, every

    def open(self) -> list[Evaluation]:
        """The one held-out set."""
        samples = open_source(self.source, for_training=False)
        return [HeldOut(name=self.name, samples=samples, every=self.every)]
