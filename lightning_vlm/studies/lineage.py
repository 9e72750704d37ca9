"""A study in MLflow: one run for the study, below it one for each of its runs, and the models they made.

The study's run is named after the study and goes on when the study does. A run that trains or evaluates writes its own
record (`callbacks.RunRecord`) and is only told where it belongs; for other commands the record is written here.
Models are registered as STUDY.STAGE, a version for each directory and hash; their files stay where they are.

MLflow that does not answer stops a study before anything runs. Afterwards it costs a warning: results are on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.studies.record import COSTS, RECORD, model_hash, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lightning_vlm.studies.graph import Graph
    from lightning_vlm.studies.runs import Run

EXPERIMENT = "lightning-vlm"
RUN_FILE = "mlflow_run_id"  # as `callbacks.RunRecord` names it, in a run's folder; in a study's, of the study's own
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"  # MLflow's own tags
# What only the run of a study has: its axes and their values, in order, as JSON.
STUDY, STAGE, AXES, AXIS, FINGERPRINT = "study", "study.stage", "study.axes", "axis.", "fingerprint"
PARAM_LENGTH = 500
COST_KEYS = ("steps", "tokens", "samples", "seconds", "cpu_seconds", "peak_gib")


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or the sqlite file in the working directory that runs write to without it."""
    return os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")


def connect(uri: str) -> MlflowClient:
    """A client; MLflow is imported when it is first needed."""
    for name in ("alembic", "mlflow.store.db.utils"):  # a new database announces every table
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


@contextmanager
def hurried() -> Iterator[None]:
    """Requests to a server are given up after seconds, not after MLflow's minutes, unless the user set a time.

    Nothing is printed: no progress bars, no addresses.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    wanted |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class Lineage:
    """The record of one study.

    Args:
        study: its name. run_dir: its folder, which keeps the id of its MLflow run.
        uri: of the tracking server or database; $MLFLOW_TRACKING_URI or sqlite:///mlflow.db by default.
        experiment: in which everything is; $MLFLOW_EXPERIMENT_NAME or lightning-vlm by default.

    Attributes:
        run_id: of the study's own run, once started.
    """

    def __init__(self, study: str, run_dir: Path, *, uri: str | None = None, experiment: str | None = None) -> None:
        self.study, self.run_dir, self.uri = study, Path(run_dir), uri or tracking_uri()
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self.run_id = ""
        self._client: MlflowClient | None = None

    def start(
        self, names: Sequence[str], *, axes: Mapping[str, Sequence[str]], question: str = "", text: str = ""
    ) -> str:
        """Begin or go on with the study's run; its id.

        Args:
            names: of the runs that the study consists of. axes: name → values, in order. question: what it asks, shown
                as the run's description. text: the study file, kept as an artifact.

        Raises:
            ValueError: MLflow does not answer.
        """
        from mlflow.exceptions import MlflowException

        tags = {
            STUDY: self.study,
            AXES: json.dumps({name: list(values) for name, values in axes.items()}, ensure_ascii=False),
            "study.runs": str(len(names)),
            "run_dir": str(self.run_dir.resolve()),
            NOTE: question,
        }
        try:
            with hurried():
                self._client = connect(self.uri)
                self.run_id = self._continued() or self._created(tags)
                for key, value in tags.items():
                    self._client.set_tag(self.run_id, key, value)
                if text:
                    self._client.log_text(self.run_id, text, "study.yaml")
        except (MlflowException, OSError, ImportError) as err:
            raise ValueError(
                f"MLflow at {self.uri} does not answer: {_one_line(err)}; start it, set MLFLOW_TRACKING_URI to another "
                "(sqlite:///mlflow.db needs no server), or keep no records: --no_mlflow"
            ) from err
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / RUN_FILE).write_text(self.run_id + "\n")
        return self.run_id

    def _continued(self) -> str | None:
        """The run that an earlier start made, if this MLflow has it."""
        from mlflow.exceptions import MlflowException

        if not (known := run_id_in(self.run_dir)):
            return None
        try:
            if self._client.get_run(known).info.lifecycle_stage != "active":
                return None
        except MlflowException as err:
            if err.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        self._client.update_run(known, status="RUNNING")
        return known

    def _created(self, tags: dict[str, str]) -> str:
        return self._client.create_run(self._experiment_id(), tags=tags, run_name=self.study).info.run_id

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "active":
            return found.experiment_id
        return self._client.create_experiment(self.experiment)

    def tags_for(self, run: Run) -> dict[str, str]:
        """What says where a run belongs and where its inputs come from; for its logger (`--logger.MLFlow.tags`).

        `input.KEY` is the name and the hash of what a run takes from another (of the model; else of all that shaped
        it); `input.KEY.run_id` its run in MLflow.
        """
        tags = {PARENT: self.run_id, STUDY: self.study, STAGE: run.stage, FINGERPRINT: run.fingerprint}
        tags |= {AXIS + name: str(value) for name, value in run.at.items()}
        for use in run.uses:
            key = f"input.{use.key or 'checkpoint'}"
            tags[key] = f"{use.run.name} {model_hash(use.path) or use.run.fingerprint}"
            if known := run_id_in(use.run.folder):
                tags[f"{key}.run_id"] = known
        return {_key(name): value for name, value in tags.items()}

    def words_for(self, run: Run) -> list[str]:
        """Words for a command that has loggers."""
        given = {"tags": json.dumps(self.tags_for(run)), "experiment_name": self.experiment, "tracking_uri": self.uri}
        return [word for key, value in given.items() for word in (f"--logger.MLFlow.{key}", value)]

    def record(self, run: Run) -> None:
        """Write down a run that ended: costs, outcome and model; for a command without loggers all of it."""
        self._tried(f"the record of {run.name}", lambda: self._record(run))

    def _record(self, run: Run) -> None:
        from mlflow.entities import Metric, Param

        record, costs = read_json(run.folder / RECORD), read_json(run.folder / COSTS)
        ended = int(1000 * record.get("ended", 0)) or None
        run_id = self._own(run)
        if run_id is None:
            started = int(1000 * record.get("started", 0)) or None
            tags = self.tags_for(run) | {"stage": run.command, "run_dir": str(run.folder.resolve())}
            run_id = self._client.create_run(
                self._experiment_id(), start_time=started, tags=tags, run_name=run.name
            ).info.run_id
            (run.folder / RUN_FILE).write_text(run_id + "\n")
            params = options_in(record.get("words", []))
            self._client.log_batch(run_id, params=[Param(k, _cut(v)) for k, v in list(params.items())[:100]])
            numbers = dict(costs.get("metrics") or {})
        else:
            numbers = {}  # its own logger has them
        numbers |= {
            f"costs/{key}": value for key in COST_KEYS if (value := costs.get(key, record.get(key))) is not None
        }
        metrics = [Metric(_key(k), float(v), ended or 0, 0) for k, v in numbers.items() if isinstance(v, int | float)]
        self._client.log_batch(run_id, metrics=metrics)
        done = record.get("state") == "done"
        for output, found in (record.get("outputs") or {}).items() if done else ():
            if found and (run.folder / output).is_dir():
                self._register(run.stage, run.folder / output, found, instance=run.name, run_id=run_id)
        self._client.set_terminated(run_id, "FINISHED" if done else "FAILED", end_time=ended)

    def _own(self, run: Run) -> str | None:
        """The MLflow run that this run wrote to, not one of an earlier run in the same folder."""
        if not (known := run_id_in(run.folder)):
            return None
        tags = self._client.get_run(known).data.tags
        return known if (tags.get(PARENT), tags.get(FINGERPRINT)) == (self.run_id, run.fingerprint) else None

    def register(self, stage: str, directory: Path, found: str, *, instance: str, run_id: str | None = None) -> None:
        """Register a model directory, once for each directory and hash.

        Args:
            stage: that makes such models; names the registered model together with the study. directory: of the model.
            found: hash of its weights. instance: the run that made it. run_id: its MLflow run.
        """
        self._tried(
            f"the model of {instance}",
            lambda: self._register(stage, directory, found, instance=instance, run_id=run_id),
        )

    def _register(self, stage: str, directory: Path, found: str, *, instance: str, run_id: str | None) -> None:
        from mlflow.exceptions import MlflowException

        name, path = re.sub(r"[/:]", "_", f"{self.study}.{stage}"), str(directory.resolve())
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name, description=f"Models that stage {stage} of {self.study} makes.")
        for version in self._client.search_model_versions(f"name = '{name}' and tag.hash = '{found}'"):
            if version.tags.get("directory") == path:
                return
        tags = {"hash": found, "directory": path, "instance": instance, "study": self.study}
        try:
            self._client.create_model_version(name, source=path, run_id=run_id, tags=tags, await_creation_for=0)
        except MlflowException as err:
            # Servers take no directory of this machine as a source: then a file in the run's artifacts stands for it.
            if err.error_code != "INVALID_PARAMETER_VALUE" or run_id is None:
                raise
            self._client.log_dict(run_id, tags, "model/directory.json")
            source = f"runs:/{run_id}/model"
            self._client.create_model_version(name, source=source, run_id=run_id, tags=tags, await_creation_for=0)

    def finish(self, files: Sequence[Path], *, failed: bool = False) -> None:
        """End the study's run.

        Args:
            files: of its report, which become artifacts under report/. failed: whether some of its runs did.
        """

        def end() -> None:
            for file in files:
                self._client.log_artifact(self.run_id, str(file), artifact_path="report")
            self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")

        self._tried("the report", end)

    def _tried(self, what: str, act: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException

        if self._client is None:
            raise RuntimeError("start() comes first")
        try:
            with hurried():
                act()
        except (MlflowException, OSError) as err:
            print(f"warning: {what} is not in MLflow at {self.uri}: {_one_line(err)}", file=sys.stderr, flush=True)


def started(graph: Graph) -> Lineage:
    """The record of a study that starts or goes on.

    Raises:
        ValueError: MLflow does not answer.
    """
    spec = graph.spec
    lineage = Lineage(spec.name, spec.run_dir)
    lineage.start(
        [run.name for run in graph.runs],
        axes={name: list(values) for name, values in spec.axes.items()},
        question="\n\n".join(filter(None, (spec.question, spec.about))),
        text=spec.file.read_text(encoding="utf-8"),
    )
    return lineage


def run_id_in(folder: Path) -> str | None:
    """The MLflow run whose record a folder is; None where there is none."""
    file = Path(folder) / RUN_FILE
    return file.read_text().strip() or None if file.is_file() else None


def options_in(words: Sequence[str]) -> dict[str, str]:
    """A command line as parameters: `--key value`, `--key=value`, flags as true, what stands alone as `argument.N`."""
    params: dict[str, str] = {}
    key, alone = "", 0
    for word in words[1:]:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            params[_key(key)] = value if equals else "true"
            key = "" if equals else key
        elif key:
            name = _key(key)
            params[name] = word if params[name] == "true" else f"{params[name]} {word}"
        else:
            params[f"argument.{alone}"] = word
            alone += 1
    return params


def _key(name: str) -> str:
    """Without what MLflow forbids in names."""
    return re.sub(r"[^\w/. :-]", "_", name)


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"


def _one_line(err: Any) -> str:
    text: Any = " ".join(str(err).split())
    return text if len(text) <= 200 else text[:199] + "…"
