"""Runs what is missing of a study: each run when what it uses is done, so many at once, whatever fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_vlm.studies.graph import Graph
from lightning_vlm.studies.launch import Handle, Job, Launcher
from lightning_vlm.studies.record import RECORD, finish_record, read_json
from lightning_vlm.studies.runs import Run
from lightning_vlm.studies.spec import CONFIGURED
from lightning_vlm.studies.state import State, prepare, start_record, state_of

if TYPE_CHECKING:
    from lightning_vlm.studies.lineage import Lineage

POLL_SECONDS = 0.2
LOG_LINES = 15  # of a failed run, shown


class Runner:
    """The scheduler of one study on one launcher.

    Args:
        graph: the study's runs. launcher: starts them. jobs: at once. gpus: visible devices, shared out among jobs;
            None leaves that to the launcher.
        lineage: of MLflow; None keeps no records there.
        watch: called with (run, state) whenever a state changes, and with nothing new every now and then.

    Attributes:
        states: of every run, by name.
    """

    def __init__(
        self,
        graph: Graph,
        launcher: Launcher,
        *,
        jobs: int = 1,
        gpus: tuple[str, ...] | None = (),
        lineage: Lineage | None = None,
        watch: Callable[[Run | None, State | None], None] = lambda run, state: None,
    ) -> None:
        self.graph, self.launcher, self.jobs, self.lineage, self.watch = graph, launcher, jobs, lineage, watch
        self.free_gpus = None if gpus is None else list(gpus)
        self.states: dict[str, State] = {run.name: state_of(run) for run in graph.runs}
        seeds = {run.seed: i for i, run in reversed(list(enumerate(graph.runs)))}
        # All arms of the first seed before the second: what is there when time is up can be compared.
        self.order = sorted(graph.runs, key=lambda run: (run.seed is not None, seeds[run.seed]))
        self._going: dict[str, tuple[Run, Handle, list[str]]] = {}

    def run(self) -> bool:
        """Run everything that is not done; whether all of it is done in the end."""
        waiting = [run for run in self.order if self.states[run.name] != "done"]
        try:
            while waiting or self._going:
                self._collect()
                waiting = [run for run in waiting if not self._started(run)]
                if not self._going and waiting:
                    break  # behind something that failed
                self.watch(None, None)
                time.sleep(POLL_SECONDS)
        finally:
            for _, handle, _ in self._going.values():
                handle.stop()
        return all(state == "done" for state in self.states.values())

    def _started(self, run: Run) -> bool:
        """Start a run if it may start now."""
        if len(self._going) >= self.jobs or (self.free_gpus is not None and len(self.free_gpus) < run.devices):
            return False
        if any(self.states[use.run.name] != "done" for use in run.uses):
            return False
        if (handle := self.launcher.find(run.name, run.folder, run.fingerprint)) is not None:
            self._going[run.name] = (run, handle, [])
            self._change(run, "running")
            return True
        resume = prepare(run)
        if state_of(run) == "done":  # taken back from what was put aside
            self._change(run, "done")
            return True
        try:
            words = run.words()
        except FileNotFoundError as err:
            start_record(run, [])
            run.log.parent.mkdir(parents=True, exist_ok=True)
            run.log.write_text(f"error: {err}\n")
            finish_record(run.folder, 2, run.output, (0.0, 0.0, 0.0))
            self._change(run, "failed")
            return True
        start_record(run, words)
        words = [*words, *(["--resume"] if resume else []), *self._tracking(run)]
        gpus: list[str] = []
        if self.free_gpus is not None:
            gpus, self.free_gpus = self.free_gpus[: run.devices], self.free_gpus[run.devices :]
        env = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        job = Job(run.name, words, run.folder, run.log, run.threads, run.processes, run.devices, env, run.output)
        self._going[run.name] = (run, self.launcher.submit(job), gpus)
        self._change(run, "running")
        return True

    def _tracking(self, run: Run) -> list[str]:
        """The words that put a run under the study in MLflow."""
        if run.command not in CONFIGURED:
            return []
        if self.lineage is None:
            return ["--logger.MLFlow", "null"]
        return self.lineage.words_for(run)

    def _collect(self) -> None:
        for name, (run, handle, gpus) in list(self._going.items()):
            code = handle.poll()
            if code is None:
                continue
            del self._going[name]
            if self.free_gpus is not None:
                self.free_gpus += gpus
            if read_json(run.folder / RECORD).get("state") == "running":  # it was killed: nobody wrote how it ended
                finish_record(run.folder, code or 1, run.output, (0.0, 0.0, 0.0))
            self._change(run, state_of(run))
            if self.lineage is not None:
                self.lineage.record(run)

    def _change(self, run: Run, state: State) -> None:
        self.states[run.name] = state
        self.watch(run, state)


def blocked_by(run: Run, states: dict[str, State]) -> list[str]:
    """Names of the failed runs that a run waits for."""
    found: dict[str, None] = {}
    for use in run.uses:
        if states[use.run.name] == "failed":
            found[use.run.name] = None
        found |= dict.fromkeys(blocked_by(use.run, states))
    return list(found)


def log_end(log: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a log; an empty list where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 20_000))
            return stream.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
