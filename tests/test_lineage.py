"""What a study leaves in MLflow, on a database in the test's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from callbacks.record import MLFLOW_RUN_FILE
from lightning_vlm.cli.main import main
from lightning_vlm.studies import lineage as module
from lightning_vlm.studies.lineage import RUN_FILE, Lineage, options_in, started
from lightning_vlm.studies.runs import Run, Use

from .test_cli import BASE

AXES = {"arm": ["OPD", "none"], "seed": ["0", "1"]}


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """An empty one; making its tables takes MLflow seconds."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(autouse=True)
def uri(database, tmp_path, monkeypatch) -> str:
    """The working directory is empty but for a database, which is the one that MLflow uses by default."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"  # a path of its own: MLflow keeps connections by URI
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return uri


def a_run(name: str, stage: str, command: str, *, fingerprint: str = "f1", **more) -> Run:
    folder = Path("runs/warm") / name
    folder.mkdir(parents=True, exist_ok=True)
    return Run(
        stage=stage, name=name, folder=folder, command=command, options=(), fingerprint=fingerprint, **{"at": {}} | more
    )


def ended(run: Run, *, state: str = "done", words=(), outputs=None, costs=None) -> None:
    """What a run's process and its launcher leave in its folder."""
    record = {"state": state, "words": list(words), "started": 1000.0, "ended": 1012.5, "seconds": 12.0}
    record |= {"cpu_seconds": 11.0, "peak_gib": 0.5, "outputs": outputs or {}}
    (run.folder / "stage.json").write_text(json.dumps(record))
    if costs is not None:
        (run.folder / "costs.json").write_text(json.dumps(costs))


def a_model(folder: Path, found: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"hash": found}))
    return folder


def of_id(run_id: str):
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(run_id)


def versions() -> list[tuple[int, str, str, str]]:
    found = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).search_model_versions("name = 'warm.base'")
    return sorted((int(v.version), v.source, v.tags["hash"], v.run_id) for v in found)


def test_a_study_is_a_run_that_goes_on():
    """Named after the study, with its file; started again it is the same one, deleted it is a new one."""
    lineage = Lineage("warm", Path("runs/warm"))
    parent = lineage.start(["base", "rl-0"], axes=AXES, question="Which start?", text="stages: {}\n")
    run = of_id(parent)
    assert (run.info.run_name, run.info.status) == ("warm", "RUNNING")
    assert json.loads(run.data.tags["study.axes"]) == AXES and run.data.tags["mlflow.note.content"] == "Which start?"
    assert run.data.tags["study.runs"] == "2"
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert client.get_experiment(run.info.experiment_id).name == "lightning-vlm"
    assert Path(client.download_artifacts(parent, "study.yaml", ".")).read_text() == "stages: {}\n"
    assert Path("runs/warm", RUN_FILE).read_text() == parent + "\n" and RUN_FILE == MLFLOW_RUN_FILE

    Path("report").mkdir()
    Path("report/report.html").write_text("<p>")
    lineage.finish([Path("report/report.html")], failed=True)
    assert of_id(parent).info.status == "FAILED"
    assert [a.path for a in client.list_artifacts(parent, "report")] == ["report/report.html"]

    again = Lineage("warm", Path("runs/warm"))
    assert again.start(["base"], axes=AXES) == parent and of_id(parent).info.status == "RUNNING"
    again.finish([])
    assert of_id(parent).info.status == "FINISHED"
    client.delete_run(parent)
    assert Lineage("warm", Path("runs/warm")).start([], axes=AXES) != parent


def test_a_command_without_loggers_gets_its_record():
    """Words as parameters, inputs as tags, costs as metrics, times and outcome; written again it is the same run."""
    lineage = Lineage("warm", Path("runs/warm"), experiment="mine")
    parent = lineage.start([], axes=AXES)
    base = a_run("base", "base", "compose", output="model")
    model = a_model(base.folder / "model", "abc")
    words = ["compose", "--vision", "v", "--trainable", "a", "b", "--note=x", "--fast"]
    ended(base, words=words, outputs={"model": "abc"}, costs={"steps": 3, "metrics": {"val/score": 0.25, "text": "x"}})
    lineage.record(base)
    run_id = (base.folder / RUN_FILE).read_text().strip()
    run = of_id(run_id)
    assert run.data.params == {"vision": "v", "trainable": "a b", "note": "x", "fast": "true"}
    expected = {
        "val/score": 0.25,
        "costs/steps": 3,
        "costs/seconds": 12,
        "costs/cpu_seconds": 11,
        "costs/peak_gib": 0.5,
    }
    assert run.data.metrics == expected
    tags = {key: run.data.tags[key] for key in ("mlflow.parentRunId", "study", "study.stage", "stage", "fingerprint")}
    assert list(tags.values()) == [parent, "warm", "base", "compose", "f1"]
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1_000_000, 1_012_500)
    assert versions() == [(1, str(model.resolve()), "abc", run_id)]

    rl = a_run("rl-OPD-0", "rl", "distill", at={"arm": "OPD", "seed": "0"}, uses=(Use("backbone.path", base, model),))
    assert lineage.tags_for(rl) == {
        "mlflow.parentRunId": parent,
        "study": "warm",
        "study.stage": "rl",
        "fingerprint": "f1",
        "axis.arm": "OPD",
        "axis.seed": "0",
        "input.backbone.path": "base abc",
        "input.backbone.path.run_id": run_id,
    }
    ended(rl, state="failed")
    lineage.record(rl)
    assert of_id((rl.folder / RUN_FILE).read_text().strip()).info.status == "FAILED"

    lineage.record(base)  # nothing new
    assert (base.folder / RUN_FILE).read_text().strip() == run_id and len(versions()) == 1
    remade = a_run("base", "base", "compose", fingerprint="f2", output="model")
    ended(remade, outputs={"model": "def"})
    lineage.record(remade)  # other inputs: another run, another version of the model
    other = (base.folder / RUN_FILE).read_text().strip()
    assert other != run_id and [(v[2], v[3]) for v in versions()] == [("abc", run_id), ("def", other)]


def test_a_run_with_a_logger_is_told_where_it_belongs(uri):
    """A real fit with the words that the study adds: its own MLflow run, below the study's, completed afterwards."""
    shutil.copy("mlflow.db", "elsewhere.db")
    elsewhere = f"sqlite:///{Path('elsewhere.db').resolve()}"
    lineage = Lineage("warm", Path("runs/warm"), uri=elsewhere, experiment="mine")
    parent = lineage.start([], axes=AXES)
    fit = a_run("rl-0", "rl", "fit", at={"arm": "SFT, over-trained", "seed": "0"})
    Path("base.yaml").write_text(BASE)
    words = ["fit", "-c", "base.yaml", "--run_dir", str(fit.folder), *lineage.words_for(fit)]
    assert main(words) == 0
    ended(fit, words=words, costs={"steps": 4, "tokens": 100, "seconds": 2.5, "metrics": {"train/loss": -1.0}})
    lineage.record(fit)
    client = MlflowClient(elsewhere)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id], f"run_id != '{parent}'")
    tags = run.data.tags
    assert (tags["mlflow.parentRunId"], tags["study.stage"], tags["stage"]) == (parent, "rl", "fit")
    assert (tags["axis.arm"], run.info.run_name, run.info.status) == ("SFT, over-trained", "rl-0", "FINISHED")
    assert run.data.params["trainer.max_steps"] == "4" and run.data.metrics["train/loss"] != -1.0  # its logger's
    assert run.data.metrics["costs/tokens"] == 100 and run.data.metrics["costs/seconds"] == 2.5
    assert [e.name for e in MlflowClient(uri).search_experiments()] == ["Default"]


def test_a_study_file_starts_its_record(uri):
    """Names, axes, question and the file come from the graph."""
    spec = SimpleNamespace(name="warm", run_dir=Path("runs/warm"), question="Which?", about="", file=Path("warm.yaml"))
    spec.axes = {"arm": {"OPD": {"start": "opd"}}, "seed": {"0": 0}}
    spec.file.write_text("question: Which?\n")
    lineage = started(SimpleNamespace(spec=spec, runs=[a_run("base", "base", "fit")]))
    tags = of_id(lineage.run_id).data.tags
    assert json.loads(tags["study.axes"]) == {"arm": ["OPD"], "seed": ["0"]}
    assert (tags["study.runs"], tags["mlflow.note.content"]) == ("1", "Which?")
    client = MlflowClient(uri)
    assert Path(client.download_artifacts(lineage.run_id, "study.yaml", ".")).read_text() == "question: Which?\n"


def test_mlflow_that_does_not_answer(uri, monkeypatch, capsys):
    """Before anything runs it is an error; afterwards a warning."""
    for wrong, said in (("http://127.0.0.1:9", "Max retries"), ("htp://x", "htp://x")):
        words = f"^MLflow at {wrong} does not answer: .*{said}.*set MLFLOW_TRACKING_URI to .*--no_mlflow$"
        with pytest.raises(ValueError, match=words):
            Lineage("warm", Path("runs/warm"), uri=wrong).start([], axes=AXES)
    assert not Path("runs").exists()
    lineage = Lineage("warm", Path("runs/warm"))
    lineage.start([], axes=AXES)
    run = a_run("base", "base", "compose")
    ended(run)

    def away(*args, **kwargs):
        raise MlflowException("gone\naway")

    monkeypatch.setattr(lineage._client, "create_run", away)
    monkeypatch.setattr(lineage._client, "set_terminated", away)
    lineage.record(run)
    lineage.finish([])
    assert capsys.readouterr().err.splitlines() == [
        f"warning: the record of base is not in MLflow at {uri}: gone away",
        f"warning: the report is not in MLflow at {uri}: gone away",
    ]


def test_a_server_that_takes_no_directories(monkeypatch):
    """Then a small file among the run's artifacts stands for the directory; nothing is copied."""
    lineage = Lineage("warm", Path("runs/warm"))
    lineage.start([], axes=AXES)
    create = lineage._client.create_model_version

    def as_a_server(name, *, source, **more):
        if source.startswith("/"):
            raise MlflowException("Invalid model version source", error_code=1000)  # INVALID_PARAMETER_VALUE
        return create(name, source, **more)

    monkeypatch.setattr(lineage._client, "create_model_version", as_a_server)
    base = a_run("base", "base", "compose", output="model")
    model = a_model(base.folder / "model", "abc")
    ended(base, outputs={"model": "abc"})
    for _ in range(2):
        lineage.record(base)
    run_id = (base.folder / RUN_FILE).read_text().strip()
    assert [v[1:] for v in versions()] == [(f"runs:/{run_id}/model", "abc", run_id)]
    pointer = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).download_artifacts(run_id, "model/directory.json", ".")
    assert json.loads(Path(pointer).read_text())["directory"] == str(model.resolve())


def test_options_as_parameters():
    words = ["probe", "DIR", "--probe", "linear", "--layers", "1", "2", "--a+b", "x", "--quick", "--k=v w"]
    assert options_in(words) == {
        "argument.0": "DIR",
        "probe": "linear",
        "layers": "1 2",
        "a_b": "x",
        "quick": "true",
        "k": "v w",
    }
    assert options_in([]) == {} and module._cut("x" * 600) == "x" * 499 + "…"
