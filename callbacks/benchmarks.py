"""Benchmarks as callbacks: they register what is to be evaluated; the module generates, grades and logs."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_vlm.benchmarks import Benchmark, BenchmarkSpec, open_benchmark
from lightning_vlm.data.sources import SourceSpec


class Benchmarks(Callback):
    """Any number of named benchmarks, each logged as `val/<name>/…` at its own interval.

    Args:
        benchmarks: name → what it is.
    """

    def __init__(self, *, benchmarks: dict[str, BenchmarkSpec]) -> None:
        self.specs = benchmarks
        self._open: dict[str, Benchmark] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the benchmarks and register them with the data module."""
        if stage == "predict":
            return
        if not hasattr(trainer.datamodule, "register"):
            raise ValueError(f"{type(self).__name__} needs a data module that evaluates, such as VLMData; set `data`")
        for name, spec in self.specs.items():
            if name not in self._open:
                self._open[name] = open_benchmark(spec, name)
            trainer.datamodule.register(self._open[name])


class Geometry3K(Benchmarks):
    r"""Geometry3K: greedy accuracy, answer in \boxed{}, graded by math-verify; logged as `val/geometry3k/…`.

    Args:
        path: folder or file with the data, or `hiyouga/geometry3k` on the hub.
        split: split to evaluate; None takes all that the path holds.
        prompt: `freeform` shows no options, `mcq` shows them and grades the letter.
        every: optimizer steps between evaluations.
        limit: only the first so many problems.
        max_new_tokens: longest answer in tokens.
    """

    def __init__(
        self,
        *,
        path: str = "hiyouga/geometry3k",
        split: str | None = "test",
        prompt: str = "freeform",
        every: int = 100,
        limit: int | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        source = SourceSpec(kind="geometry3k", path=path, split=split, prompt=prompt, limit=limit)
        super().__init__(
            benchmarks={"geometry3k": BenchmarkSpec(source=source, every=every, max_new_tokens=max_new_tokens)}
        )
