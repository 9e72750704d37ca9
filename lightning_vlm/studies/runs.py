"""A run of a study: one stage at one place of its axes, what it uses, and the words that start it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Use:
    """What a run takes from another.

    Attributes:
        key: the option that gets its path; `model` of commands with a model as their argument.
        run: it comes from. path: of the model directory or file.
    """

    key: str
    run: Run
    path: Path


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Which checkpoint of a run is meant: the one of a step, or the best by a metric.

    Attributes:
        of: the training run. step: of the checkpoint; None picks by `metric`, as `val/BENCHMARK/METRIC`.
        mode: whether the best is the `max` or the `min`.
    """

    of: Run
    step: int | None = None
    metric: str | None = None
    mode: str = "max"

    def checkpoint(self) -> Path:
        """The file; known once the run is done.

        Raises:
            FileNotFoundError: there is no checkpoint of that step, or none that was evaluated.
        """
        folder = self.of.folder / "checkpoints"
        found = {int(p.stem.rpartition("-")[2]): p for p in sorted(folder.glob("*-*.ckpt"))}
        if self.step is not None:
            if self.step not in found:
                raise FileNotFoundError(f"{folder} has no checkpoint of step {self.step}; it has {sorted(found)}")
            return found[self.step]
        _, benchmark, metric = (self.metric or "").split("/", 2)
        scores: dict[int, float] = {}
        for step in found:
            file = self.of.folder / "evaluations" / benchmark / f"step-{step:08d}" / "scores.json"
            if file.is_file() and metric in (read := json.loads(file.read_text())):
                scores[step] = read[metric]
        if not scores:
            raise FileNotFoundError(f"no checkpoint of {folder} has an evaluation with {self.metric}")
        best = (max if self.mode == "max" else min)(scores.values())
        return found[min(step for step, score in scores.items() if score == best)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One stage at one place of the axes.

    Attributes:
        stage: its stage; `STAGE@PICK` where a checkpoint becomes a model directory. at: the axes it depends on.
        name: for people, and of its folder. folder: what the command writes into. command: of lightning-vlm.
        options: the words behind the command, without what a start decides (resuming, loggers' tags).
        writes: files put into the folder before it starts. uses: what it takes from other runs.
        fingerprint: of everything that shapes the result. output: what others take from it.
        pick: of which checkpoint, for runs that only export one.
    """

    stage: str
    at: dict[str, str]
    name: str
    folder: Path
    command: str
    options: tuple[str, ...] = field(repr=False)
    writes: dict[str, Any] = field(repr=False, default_factory=dict)
    uses: tuple[Use, ...] = field(repr=False, default=())
    fingerprint: str = ""
    output: str | None = None
    pick: Pick | None = None
    threads: int = 1
    processes: int = 1
    devices: int = 0
    seed: int | None = None

    @property
    def log(self) -> Path:
        """Output of the command."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    def words(self) -> list[str]:
        """The words behind `lightning-vlm`; of a pick only once its run is done."""
        if self.pick is not None:
            return [self.command, str(self.pick.checkpoint()), *self.options]
        return [self.command, *self.options]

    def label(self, axes: list[str]) -> str:
        """Name of the arm: values of these axes, as far as the run depends on them."""
        return " · ".join(self.at[axis] for axis in axes if axis in self.at) or self.stage
