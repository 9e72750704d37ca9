"""A study's progress: a table that lives on the terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_vlm.studies.graph import Graph
from lightning_vlm.studies.record import COSTS, RECORD, read_json
from lightning_vlm.studies.runner import blocked_by, log_end
from lightning_vlm.studies.runs import Run
from lightning_vlm.studies.state import State

LINE_SECONDS = 30.0  # between lines on running stages where output is no terminal
STYLES = {"done": "green", "running": "bold", "failed": "bold red", "interrupted": "yellow", "changed": "yellow"}
SHOWN = ("val/", "train/reward", "train/entropy", "train/loss")  # the first of these that a run has


class Watcher:
    """Shows states as they change.

    Args:
        graph: the study's runs. states: of every run by name, kept up to date by the runner. console: where to.
    """

    def __init__(self, graph: Graph, states: dict[str, State], console: Console | None = None) -> None:
        self.graph, self.states, self.console = graph, states, console or Console(highlight=False)
        self._live: Live | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Watcher:
        if self.console.is_terminal:
            self._live = Live(self.table(), console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self.table())
            self._live.stop()

    def __call__(self, run: Run | None, state: State | None) -> None:
        """One change, or just a moment later."""
        if run is not None and state == "failed":
            self._print(failure(run))
        if self._live is not None:
            if run is not None or time.monotonic() - self._last > 1:
                self._last = time.monotonic()
                self._live.update(self.table())
        elif run is not None:
            done = sum(s == "done" for s in self.states.values())
            self._print(f"[{done}/{len(self.states)}] {run.name}: {state}{_took(run) if state == 'done' else ''}")
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            for going in self._running():
                self._print("  " + "  ".join([going.name, *progress(going)]))

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _running(self) -> list[Run]:
        return [run for run in self.graph.runs if self.states[run.name] == "running"]

    def table(self) -> Group:
        """Counts by stage, and every run that is going or has failed."""
        counts = Table(box=None, pad_edge=False)
        for column in ("stage", "done", "running", "waiting", "failed"):
            counts.add_column(column, justify="left" if column == "stage" else "right")
        for stage in dict.fromkeys(run.stage for run in self.graph.runs):
            found = Counter(self.states[run.name] for run in self.graph.at(stage))
            total = sum(found.values())
            rest = total - found["done"] - found["running"] - found["failed"]
            cells = (f"{found['done']}/{total}", *(str(n) if n else "" for n in (found["running"], rest)))
            counts.add_row(stage, *cells, Text(str(found["failed"] or ""), style="bold red"))
        going = Table(box=None, pad_edge=False)
        for column in ("running", "step", "metric", "time left"):
            going.add_column(column)
        for run in self._running():
            going.add_row(run.name, *progress(run))
        return Group(counts, Text(""), going) if self._running() else Group(counts)


def overview(graph: Graph, states: dict[str, State]) -> Table:
    """Every run with its state."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (("run", "left"), ("state", "left"), ("step", "right"), ("seconds", "right"), ("", "left")):
        table.add_column(column, justify=justify, overflow="fold")
    for run in graph.runs:
        state = states[run.name]
        record = read_json(run.folder / RECORD)
        step, metric, left = progress(run) if state in ("running", "done", "interrupted", "failed") else ("", "", "")
        note = {"running": f"{metric}  {left}", "done": metric, "failed": str(run.log)}.get(state, "")
        if state == "waiting" and (behind := blocked_by(run, states)):
            note = f"behind {', '.join(behind)}"
        if state == "changed":
            note = "its inputs have changed since: it will run again"
        seconds = f"{record['seconds']:.0f}" if record.get("seconds") else ""
        table.add_row(run.name, Text(state, style=STYLES.get(state, "")), step, seconds, note)
    return table


def progress(run: Run) -> tuple[str, str, str]:
    """Step, a metric and the time left of a run; empty texts where nothing tells."""
    costs = read_json(run.folder / COSTS)
    if not costs:
        return "", "", ""
    steps, total = costs["steps"], costs.get("max_steps")
    metrics = costs.get("metrics", {})
    name = next((n for start in SHOWN for n in sorted(metrics) if n.startswith(start) and not n.endswith("/n")), None)
    metric = f"{name} {metrics[name]:.3g}" if name else ""
    left = ""
    if total and 0 < steps < total:
        left = str(datetime.timedelta(seconds=round(costs["seconds"] / steps * (total - steps))))
    return (f"{steps}/{total}" if total else ""), metric, left


def failure(run: Run) -> str:
    """The end of a failed run's log."""
    code = read_json(run.folder / RECORD).get("exit")
    lines = [f"{run.name} failed with code {code}; the end of {run.log}:"]
    return "\n".join([*lines, *(f"    {line}" for line in log_end(run.log))])


def _took(run: Run) -> str:
    seconds = read_json(run.folder / RECORD).get("seconds")
    return f" ({seconds:.0f} s)" if seconds else ""
