"""`lightning-vlm compare` on runs, experiments and studies by name: the same tables as from their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_vlm.studies.tracking import label_of

from .compare_kit import compared, folder_of_its_own, refused, run, share  # noqa: F401
from .test_lineage import database  # noqa: F401


@pytest.fixture
def client(database, folder_of_its_own, tmp_path, monkeypatch) -> MlflowClient:  # noqa: F811
    """Of an empty database, which is the one that is asked."""
    shutil.copy(database, "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


def tracked(client, folder: str, *, experiment: str = "mine", name: str = "", artifacts: bool = False, **tags) -> str:
    """A finished run whose folder this is; with its evaluations as artifacts."""
    found = client.get_experiment_by_name(experiment)
    key = found.experiment_id if found else client.create_experiment(experiment)
    tags = {"run_dir": str(Path(folder).resolve())} | {k.replace("__", "."): v for k, v in tags.items()}
    run_id = client.create_run(key, tags=tags, run_name=name or Path(folder).name).info.run_id
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "mlflow_run_id").write_text(run_id + "\n")
    if artifacts:
        client.log_artifacts(run_id, f"{folder}/evaluations", "evaluations")
    client.set_terminated(run_id)
    return run_id


def arms(found: dict) -> list[tuple[str, list[int], float]]:
    return [(arm["name"], arm["seeds"], arm["mean"]) for arm in found["arms"]]


# ------------------------------------------------------------------------------------------------------------- runs


def test_runs_by_name_and_by_id(client, capsys):
    """From the folder while it is there, from the artifacts afterwards; the last step of the benchmark asked for."""
    for name, right in (("sft", 5), ("dpo", 15)):
        run(f"runs/{name}", share(right), step=200, arm=name, seed=0)
        run(f"runs/{name}", share(20), step=90, arm=name, seed=0)
        run(f"runs/{name}", share(2), step=300, benchmark="world/test", arm=name, seed=0)
    ids = [tracked(client, f"runs/{name}", artifacts=True) for name in ("sft", "dpo")]
    expected, text = compared(capsys, "runs/sft", "runs/dpo", "--benchmark", "geo")
    for inputs in (["mlflow:sft", "mlflow:dpo"], [f"mlflow:{key}" for key in ids], ["mlflow:sft", "runs/dpo"]):
        assert compared(capsys, *inputs, "--benchmark", "geo") == (expected, text)
    line = refused(capsys, "mlflow:sft", "mlflow:dpo")
    assert "'mlflow:sft' was evaluated on several benchmarks: choose one by --benchmark: geo, world/test" in line

    shutil.rmtree("runs")
    assert compared(capsys, "mlflow:sft", "mlflow:dpo", "--benchmark", "geo")[1] == text
    found, _ = compared(capsys, "mlflow:sft", "mlflow:dpo", "--benchmark", "world/test")
    assert arms(found) == [("sft", [0], 0.1), ("dpo", [0], 0.1)]
    assert not Path("runs").exists()  # what was fetched was not written there


def test_a_folder_that_another_run_has_now_is_not_read(client, capsys):
    """The first run's folder was used again: its evaluation is among its artifacts only."""
    run("runs/sft", share(5))
    first = tracked(client, "runs/sft", artifacts=True)
    run("runs/sft", share(15))
    second = tracked(client, "runs/sft")
    line = refused(capsys, "mlflow:sft", "runs/sft")
    assert f"'mlflow:sft' is ambiguous: run 'sft' (id {first}, " in line and f"; run 'sft' (id {second}, " in line
    assert line.endswith("give one's id\n")
    found, _ = compared(capsys, f"mlflow:{first}", f"mlflow:{second}", "--arms", "old", "new")
    assert [(arm["name"], arm["mean"]) for arm in found["arms"]] == [("old", 0.25), ("new", 0.75)]


def test_what_is_not_there_is_one_line(client, capsys, monkeypatch):
    run("runs/sft", share(5))
    tracked(client, "runs/sft")
    assert "no run, experiment or study 'sfd' in MLflow at sqlite" in (
        line := refused(capsys, "mlflow:sfd", "runs/sft")
    )
    assert "did you mean 'sft'?" in line
    tracked(client, "runs/none")
    assert "'mlflow:none': it has no evaluation (" in refused(capsys, "mlflow:none", "runs/sft")
    assert "has no evaluation on 'world'; it has: geo" in refused(
        capsys, "mlflow:sft", "runs/sft", "--benchmark", "world"
    )
    assert "--stage rl: no input is a study" in refused(capsys, "mlflow:sft", "runs/sft", "--stage", "rl")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "'mlflow:sft': MLflow at http://127.0.0.1:9 does not answer" in refused(capsys, "mlflow:sft", "runs/sft")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere.db")
    assert "no MLflow database at sqlite:///nowhere.db" in refused(capsys, "mlflow:sft", "runs/sft")
    assert not Path("nowhere.db").exists()


# ------------------------------------------------------------------------------------------------------ experiments


def test_an_experiment_is_all_its_evaluated_runs(client, capsys):
    """Arms and seeds by conditions.json, or arms said once for each experiment."""
    folders = []
    for experiment, right in (("sft", 5), ("dpo", 15)):
        for seed in (0, 1):
            folders.append(run(f"runs/{experiment}-{seed}", share(right + seed), arm=f"{experiment}-abc", seed=seed))
            tracked(client, folders[-1], experiment=experiment)
        tracked(client, f"runs/{experiment}-unfinished", experiment=experiment)
    expected, text = compared(capsys, *folders)
    assert compared(capsys, "mlflow:sft", "mlflow:dpo") == (expected, text)
    assert arms(expected) == [("sft-abc", [0, 1], 0.275), ("dpo-abc", [0, 1], 0.775)]
    found, _ = compared(capsys, "mlflow:sft", "mlflow:dpo", "--arms", "SFT", "DPO")
    assert [arm["name"] for arm in found["arms"]] == ["SFT", "DPO"]
    found, _ = compared(capsys, "mlflow:sft", "mlflow:dpo", "--arms", *["b", "b", "a", "a"], "--seeds", *"5656")
    assert [(name, seeds) for name, seeds, _ in arms(found)] == [("b", [5, 6]), ("a", [5, 6])]
    line = refused(capsys, "mlflow:sft", "mlflow:dpo", "--arms", "x", "y", "z")
    assert "--arms names 3, but 4 inputs are given" in line
    tracked(client, "runs/sft")  # a run and an experiment of one name
    assert "'mlflow:sft' is ambiguous: experiment 'sft' (id 1); run 'sft' (id" in refused(capsys, "mlflow:sft", "x")


# ---------------------------------------------------------------------------------------------------------- studies


def study(client, *, condition: str = "few") -> None:
    """Two arms of two seeds, evaluated before and after, in folders and in MLflow."""
    axes = {"condition": [condition], "arm": ["OPD", "none"], "seed": ["0", "1"]}
    parent = tracked(client, "runs/warm", name="warm", study__axes=json.dumps(axes), study="warm")
    for arm, right in (("none", 5), ("OPD", 15)):
        for seed in (0, 1):
            for stage, more in (("before", 0), ("after", 2)):
                name = f"{stage}-{arm}-{seed}"
                folder = run(f"runs/warm/{name}", share(right + more + seed), arm="the same", seed=7)
                at = {"condition": condition, "arm": arm, "seed": str(seed)}
                record = {"name": name, "stage": stage, "at": at, "state": "done"}
                Path(folder, "stage.json").write_text(json.dumps(record))
                tags = {f"axis.{key}": value for key, value in at.items()} | {"mlflow.parentRunId": parent}
                tracked(client, folder, **tags, study__stage=stage, artifacts=True)


@pytest.mark.parametrize("given", ["mlflow:warm", "study:runs/warm"])
def test_a_study_has_its_own_arms(client, capsys, given):
    """Labels are axis values in the study's order, seeds its seeds, whatever conditions.json says."""
    study(client)
    line = refused(capsys, given)
    assert f"'{given}': several stages evaluate geo: choose one by --stage: after, before" in line
    assert "no stage 'aftr' evaluates geo; did you mean 'after'?" in refused(capsys, given, "--stage", "aftr")
    found, text = compared(capsys, given, "--stage", "after")
    assert sorted(arms(found)) == [("few · OPD", [0, 1], 0.875), ("few · none", [0, 1], 0.375)]
    assert "few · OPD" in text and "Welch" in text
    if given.startswith("mlflow:"):
        for path in Path("runs/warm").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        again, _ = compared(capsys, given, "--stage", "after")
        assert arms(again) == arms(found)


def test_a_stage_that_was_run_again_counts_once(client, capsys):
    """The last finished run of a name; one that failed or goes on does not count."""
    study(client)
    run("runs/warm/after-OPD-0", share(20), arm="the same", seed=7)
    (old,) = client.search_runs(
        [client.get_experiment_by_name("mine").experiment_id], "attributes.run_name = 'after-OPD-0'"
    )
    tags = {key: value for key, value in old.data.tags.items() if key.startswith("axis.")}
    tags |= {"mlflow.parentRunId": old.data.tags["mlflow.parentRunId"], "study__stage": "after"}
    new = tracked(client, "runs/warm/after-OPD-0", **tags)
    found, _ = compared(capsys, "mlflow:warm", "--stage", "after")
    means = {name: mean for name, _, mean in arms(found)}
    assert means["few · OPD"] == pytest.approx((20 / 20 + 18 / 20) / 2)
    client.set_terminated(new, "FAILED")
    found, _ = compared(capsys, "mlflow:warm", "--stage", "after")
    assert {name: mean for name, _, mean in arms(found)}["few · OPD"] == pytest.approx((17 / 20 + 18 / 20) / 2)


def test_a_folder_without_a_study(client, capsys):
    Path("empty").mkdir()
    assert "'study:empty': empty is no study's folder" in refused(capsys, "study:empty")


def test_labels():
    assert label_of("rl", {"seed": "3", "arm": "OPD", "size": "7B"}, ["size", "arm", "seed"]) == ("7B · OPD", 3)
    assert label_of("base", {"seed": "1"}, ["arm", "seed"]) == ("base", 1) and label_of("base", {}, []) == (
        "base",
        None,
    )
