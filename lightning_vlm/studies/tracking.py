"""Evaluations found by name: runs, experiments and studies of MLflow, and studies on the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_vlm.benchmarks.report import CONDITIONS, EVALUATIONS, PER_EXAMPLE
from lightning_vlm.config.tree import nearest
from lightning_vlm.studies.lineage import (
    AXES,
    AXIS,
    PARENT,
    STAGE,
    connect,
    hurried,
    run_id_in,
    tracking_uri,
)
from lightning_vlm.studies.per_example import find_file
from lightning_vlm.studies.record import RECORD, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

MLFLOW, ON_DISK = "mlflow:", "study:"
SEED = "seed"


class Found(NamedTuple):
    """A per-example file; `arm` and `seed` where a study says which, else None."""

    path: Path
    arm: str | None = None
    seed: int | None = None


class _Candidate(NamedTuple):
    """A run that may have evaluations; of a study, with its stage and place on the axes."""

    name: str
    evaluations: dict[str, Any]  # benchmark → what `_fetch` takes
    fetch: Any
    stage: str | None = None
    arm: str | None = None
    seed: int | None = None


def resolve(given: str, into: Path, *, benchmark: str | None = None, stage: str | None = None) -> list[Found]:
    """The files that an argument means.

    Args:
        given: `mlflow:NAME`, the id or name of a run, an experiment or a study; `study:DIR`, a study's folder; else as
            `find_file`. into: a folder for what must be fetched from MLflow. benchmark: of what has several. stage: of
            a study in which several stages are evaluated.

    Raises:
        ValueError: nothing of that name, or more than one; nothing evaluated; a benchmark or stage to choose.
        FileNotFoundError: no such file, folder or database.
    """
    if given.startswith(MLFLOW):
        with hurried():
            return _in_mlflow(given, into, benchmark, stage)
    if given.startswith(ON_DISK):
        return _chosen(given, _on_disk(given), benchmark, stage, whole=True)
    return [Found(find_file(given, benchmark))]


def _chosen(
    given: str, candidates: Sequence[_Candidate], benchmark: str | None, stage: str | None, *, whole: bool
) -> list[Found]:
    """The last evaluation of each candidate that has one.

    Args:
        given: what the user wrote. candidates: what it stands for. whole: whether that is all runs of something.
    """
    names = sorted({name for c in candidates for name in c.evaluations})
    if not names:
        said = f"none of its {len(candidates)} runs has been evaluated" if whole else "it has no evaluation"
        raise ValueError(f"'{given}': {said} ({EVALUATIONS}/BENCHMARK/step-N/{PER_EXAMPLE}, on disk or as artifacts)")
    if benchmark is None and len(names) > 1:
        raise ValueError(
            f"'{given}' was evaluated on several benchmarks: choose one by --benchmark: {', '.join(names)}"
        )
    if benchmark is not None and benchmark not in names:
        raise ValueError(f"'{given}' has no evaluation on '{benchmark}'; it has: {', '.join(names)}")
    benchmark = benchmark or names[0]
    kept = [c for c in candidates if benchmark in c.evaluations]
    stages = sorted({c.stage for c in kept if c.stage is not None})
    if stage is not None and stages:
        if stage not in stages:
            raise ValueError(f"'{given}': no stage '{stage}' evaluates {benchmark}{nearest(stage, stages)}")
        kept = [c for c in kept if c.stage == stage]
    elif len(stages) > 1 and any(c.arm is not None for c in kept):
        raise ValueError(f"'{given}': several stages evaluate {benchmark}: choose one by --stage: {', '.join(stages)}")
    return [Found(c.fetch(c.evaluations[benchmark]), c.arm, c.seed) for c in kept]


def label_of(stage: str, at: Mapping[str, str], axes: Iterable[str]) -> tuple[str, int | None]:
    """Arm and seed of a study's run: the values of its axes but the seed's, in order; the stage's name without any."""
    arm = " · ".join(at[axis] for axis in axes if axis != SEED and axis in at)
    return arm or stage, int(at[SEED]) if SEED in at else None


def _last_steps(places: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """Benchmark → the place of its last step, from (benchmark, `step-N`, place)."""
    found: dict[str, tuple[int, Any]] = {}
    for benchmark, folder, place in places:
        if (number := re.fullmatch(r"step-(\d+)", folder)) is not None:
            found[benchmark] = max(found.get(benchmark, (-1, None)), (int(number[1]), place), key=lambda pair: pair[0])
    return {benchmark: place for benchmark, (_, place) in found.items()}


def _evaluations_in(folder: Path) -> dict[str, Path]:
    files = (folder / EVALUATIONS).rglob(f"step-*/{PER_EXAMPLE}")
    root = folder / EVALUATIONS
    return _last_steps((f.parents[1].relative_to(root).as_posix(), f.parent.name, f) for f in files)


# --- a study on the disk ---------------------------------------------------------------------------------------------


def _on_disk(given: str) -> list[_Candidate]:
    folder = Path(given.removeprefix(ON_DISK))
    records = [(file.parent, read_json(file)) for file in sorted(folder.glob(f"*/{RECORD}"))]
    if not records:
        raise FileNotFoundError(f"'{given}': {folder} is no study's folder: none of its runs ({RECORD}) is there")
    found = []
    for path, record in records:
        if record.get("state") == "done":
            arm, seed = label_of(record["stage"], record["at"], record["at"])
            found.append(_Candidate(record["name"], _evaluations_in(path), Path, record["stage"], arm, seed))
    return found


# --- MLflow ----------------------------------------------------------------------------------------------------------


def _in_mlflow(given: str, into: Path, benchmark: str | None, stage: str | None) -> list[Found]:
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise FileNotFoundError(f"'{given}': no MLflow database at {uri}; set MLFLOW_TRACKING_URI to where runs are")
    try:
        store = _Store(connect(uri), into)
        name = given.removeprefix(MLFLOW)
        kind, key = store.named(name, given, uri)
        if kind == "run":
            candidates = [store.candidate(store.client.get_run(key))]
        elif kind == "study":
            candidates = store.of_study(key)
        else:
            candidates = [store.candidate(run) for run in store.runs([key])]
        return _chosen(given, candidates, benchmark, stage, whole=kind != "run")
    except (MlflowException, ImportError) as err:
        raise ValueError(f"'{given}': MLflow at {uri} does not answer: {' '.join(str(err).split())[:300]}") from err


class _Store:
    """Questions to an MLflow server or database.

    Args:
        client: of it. into: folder for what is downloaded.
    """

    def __init__(self, client: MlflowClient, into: Path) -> None:
        self.client, self.into = client, into
        self.experiments = {e.experiment_id: e.name for e in _pages(client.search_experiments)}

    def runs(self, experiments: Sequence[str], condition: str = "") -> list[MlflowRun]:
        """All runs that are not deleted, oldest first."""
        ask = self.client.search_runs
        return _pages(lambda **page: ask(experiments, condition, order_by=["attributes.start_time ASC"], **page))

    def named(self, name: str, given: str, uri: str) -> tuple[str, str]:
        """Kind and id of what has that id or name.

        Raises:
            ValueError: nothing has, or several.
        """
        found = {("experiment", key): f"experiment '{said}' (id {key})" for key, said in self.experiments.items()}
        found = {key: said for key, said in found.items() if name in (key[1], self.experiments[key[1]])}
        everywhere = list(self.experiments)
        quote = '"' if "'" in name else "'"
        runs = self.runs(everywhere, f"attributes.run_name = {quote}{name}{quote}")
        if re.fullmatch(r"[0-9a-f]{32}", name):
            runs += self.runs(everywhere, f"attributes.run_id = '{name}'")
        for run in runs:
            kind = "study" if AXES in run.data.tags else "run"
            where = run.data.tags.get("run_dir", "")
            found[kind, run.info.run_id] = f"{kind} '{run.info.run_name}' (id {run.info.run_id}, {where})"
        if len(found) > 1:
            raise ValueError(f"'{given}' is ambiguous: {'; '.join(found.values())}; give one's id")
        if not found:
            known = {run.info.run_name for run in self.runs(everywhere)} | set(self.experiments.values())
            raise ValueError(f"no run, experiment or study '{name}' in MLflow at {uri}{nearest(name, known)}")
        return next(iter(found))

    def of_study(self, run_id: str) -> list[_Candidate]:
        """The last finished run of each of a study's runs."""
        study = self.client.get_run(run_id)
        axes = list(json.loads(study.data.tags[AXES]))
        last: dict[str, MlflowRun] = {}
        for run in self.runs([study.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'"):
            if run.info.status == "FINISHED" and STAGE in run.data.tags:
                last[run.info.run_name] = run
        found = []
        for run in last.values():
            tags = run.data.tags
            at = {key.removeprefix(AXIS): value for key, value in tags.items() if key.startswith(AXIS)}
            arm, seed = label_of(tags[STAGE], at, axes)
            found.append(self.candidate(run)._replace(stage=tags[STAGE], arm=arm, seed=seed))
        return found

    def candidate(self, run: MlflowRun) -> _Candidate:
        """A run with its evaluations: in its folder while that is this run's, else its artifacts."""
        run_id, folder = run.info.run_id, Path(run.data.tags.get("run_dir", "/nowhere"))
        if run_id_in(folder) == run_id:
            here = Path.cwd()
            folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
            return _Candidate(run.info.run_name, _evaluations_in(folder), Path)
        return _Candidate(run.info.run_name, self._artifacts(run), lambda place: self._download(run, place))

    def _artifacts(self, run: MlflowRun) -> dict[str, str]:
        """Benchmark → path of its last step; benchmarks' names may have slashes."""
        places, ahead = [], [EVALUATIONS]
        while ahead:
            for entry in self.client.list_artifacts(run.info.run_id, ahead.pop()):
                if not entry.is_dir:
                    continue
                benchmark, _, folder = entry.path.removeprefix(f"{EVALUATIONS}/").rpartition("/")
                if re.fullmatch(r"step-\d+", folder):
                    places.append((benchmark, folder, entry.path))
                else:
                    ahead.append(entry.path)
        return _last_steps(places)

    def _download(self, run: MlflowRun, place: str) -> Path:
        top = self.into / re.sub(r"[^\w.-]+", "_", run.info.run_name)
        if top.exists():  # another run of that name
            top = top.with_name(f"{top.name}-{run.info.run_id[:8]}")
        folder = top / place
        folder.mkdir(parents=True, exist_ok=True)
        there = {entry.path for entry in self.client.list_artifacts(run.info.run_id, place)}
        for name in (PER_EXAMPLE, CONDITIONS):
            if f"{place}/{name}" in there:
                self.client.download_artifacts(run.info.run_id, f"{place}/{name}", str(folder))
        return folder / PER_EXAMPLE


def _pages(ask: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = ask(max_results=1000, page_token=token)
        found += page
        if not (token := page.token):
            return found
