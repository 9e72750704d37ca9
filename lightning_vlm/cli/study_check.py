"""What can be said of a study before anything runs: configurations against signatures, metrics against benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lightning_vlm.cli import app
from lightning_vlm.cli.stage import load_config, parse_argv
from lightning_vlm.config.tree import Config, nearest
from lightning_vlm.studies.graph import Graph
from lightning_vlm.studies.results import check_claims
from lightning_vlm.studies.runs import Run
from lightning_vlm.studies.spec import CONFIGURED, SEED


def check_study(graph: Graph) -> None:
    """Check the arms of claims, every configuration, every checkpoint that is picked, every metric that is asked for.

    Raises:
        ValueError: in one line, naming the stage.
    """
    check_claims(graph)
    built: dict[str, Stage] = {}  # runs that differ in their seed alone are alike
    for run in graph.runs:
        alike = _place(run)
        if run.command in CONFIGURED and alike not in built:
            built[alike] = _placed(run, lambda run=run: Stage(run))
    stages = {stage.run.stage: stage for stage in reversed(built.values())}
    for run in graph.runs:
        if run.pick is not None:
            _check_pick(run, stages[run.pick.of.stage])
    for name, place, metric in _asked(graph):
        if name in stages:
            stages[name].require(place, metric)
    _check_budget(graph, built)


def _check_budget(graph: Graph, built: dict[str, Stage]) -> None:
    """Budgets in steps are equal in what is configured, or nothing needs to run to know that they are not."""
    budget = graph.spec.budget
    if budget is None or budget.unit != "steps" or budget.tolerance:
        return
    planned: dict[int, Run] = {}
    for binding in graph.bindings:
        runs = [graph.run(stage, binding) for stage in budget.stages]
        steps = [
            (built[run.name].config.tree.get("trainer") or {}).get("max_steps") for run in runs if run.name in built
        ]
        if None not in steps:
            planned.setdefault(sum(steps), runs[-1])
    if len(planned) > 1 and not graph.spec.compare.within:
        (a, one), (b, other), *_ = planned.items()
        raise ValueError(
            f"budget: {', '.join(budget.stages)} take {a} steps in {one.name} and {b} in {other.name}: make them "
            "equal, or give budget.tolerance"
        )


def _place(run: Run) -> str:
    return repr((run.stage, [(axis, value) for axis, value in run.at.items() if axis != SEED]))


def _placed(run: Run, make: Any) -> Any:
    try:
        return make()
    except (ValueError, FileNotFoundError) as err:
        raise ValueError(f"stage '{run.stage}' {run.at or ''}: {err}".replace(" : ", ": ")) from err


class Stage:
    """The configuration of a stage, built as far as it can be without data and weights.

    Args:
        run: one of its runs.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        call = parse_argv(run.command, list(run.options))
        self.config: Config = load_config(call)
        classes = app.resolve_classes(self.config)
        tree = app.linked(self.config, classes)
        defaults = app.run_defaults(run.folder, run.folder / "config.yaml", False)
        app.check(self.config, tree, classes, defaults)
        ends = tree["trainer"].get("max_steps"), tree["trainer"].get("max_epochs")
        if run.command == "fit" and all(end in (None, -1) for end in ends):
            raise ValueError("no end to the training: set trainer.max_steps")
        self.classes, self.defaults = classes, defaults

    def evaluations(self) -> dict[str, Any]:
        """Name → the callback that registers it, of all that the stage evaluates; nothing is opened."""
        found: dict[str, Any] = {}
        for name, kwargs in (self.config.tree.get("callbacks") or {}).items():
            cls = self.classes.get(("callbacks", name))
            if kwargs is None or not any(base.__name__ == "Evaluations" for base in getattr(cls, "__mro__", ())):
                continue
            callback = app.instantiate(cls, {**self.defaults.get(("callbacks", name), {}), **kwargs})
            found |= dict.fromkeys(getattr(callback, "specs", None) or [callback.name], callback)
        return found

    def require(self, place: str, metric: str) -> None:
        """See that `BENCHMARK/METRIC` will be measured; `BENCHMARK/` asks for the benchmark alone.

        Raises:
            ValueError: it will not.
        """
        benchmark, _, name = metric.partition("/")
        found, stage = self.evaluations(), f"stage '{self.run.stage}'"
        if benchmark not in found:
            raise ValueError(f"{place}: {stage} evaluates no '{benchmark}'{nearest(benchmark, found)}")
        if k := re.fullmatch(r"pass@(\d+)", name):
            n = getattr(found[benchmark], "specs", {})[benchmark].n
            if int(k[1]) > n:
                raise ValueError(f"{place}: {name} needs {k[1]} answers per problem, '{benchmark}' draws {n}")
        elif name and name != "score":
            (evaluation,) = (e for e in found[benchmark].open() if e.name == benchmark)
            if name not in evaluation.metric_names:
                known = ["score", "pass@K", *evaluation.metric_names]
                raise ValueError(f"{place}: '{benchmark}' of {stage} has no metric '{name}'{nearest(name, known)}")


def _check_pick(run: Run, stage: Stage) -> None:
    """A checkpoint that is picked must be kept."""
    pick = run.pick
    assert pick is not None
    kept = {"every": 0, "keep": 1, "monitor": None} | (
        (stage.config.tree.get("callbacks") or {}).get("Checkpoint") or {}
    )
    last = (stage.config.tree.get("trainer") or {}).get("max_steps")
    place = f"stage '{pick.of.stage}', model {pick.step or 'best'}"
    if pick.metric is not None:
        stage.require(place, pick.metric.removeprefix("val/"))
    if pick.step is not None and last and pick.step >= last:
        if pick.step > last:
            raise ValueError(f"{place}: that checkpoint is not kept: training ends after {last} steps")
        return
    if pick.metric is not None and kept["monitor"] == pick.metric:
        return
    if kept["keep"] != 0 or not kept["every"] or (pick.step or 0) % kept["every"]:
        wanted = f"every: {pick.step}" if pick.step else "every: N"
        raise ValueError(
            f"{place}: that checkpoint is not kept; set callbacks.Checkpoint to {{{wanted}, keep: 0}} there"
        )


def _asked(graph: Graph) -> Iterable[tuple[str, str, str]]:
    """(stage, where it is asked for, BENCHMARK/METRIC) of everything the file wants to see."""
    spec = graph.spec
    for endpoint in spec.endpoints:
        if endpoint.benchmark:
            for stage in filter(None, (endpoint.stage, endpoint.minus)):
                yield stage, f"endpoint '{endpoint.name}'", f"{endpoint.benchmark}/{endpoint.metric}"
        elif endpoint.curve and endpoint.curve.startswith("val/"):
            yield endpoint.stage, f"endpoint '{endpoint.name}'", endpoint.curve.removeprefix("val/")
    for curve in spec.report.get("curves", []):
        if curve.get("metric", "").startswith("val/"):
            yield curve["stage"], f"curve {curve['metric']}", curve["metric"].removeprefix("val/")
    shown = spec.report.get("pass_at_k", {})
    for stage in {shown.get("before"), shown.get("after")} - {None}:
        yield stage, "report.pass_at_k", f"{shown.get('benchmark', '')}/"
    if samples := spec.report.get("samples"):
        yield samples["stage"], "report.samples", f"{samples.get('benchmark', '')}/"
