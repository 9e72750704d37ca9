"""Whole studies with real processes: nothing done twice, nothing lost, the same numbers whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

STUDY = {
    "question": "Is a larger learning rate better?",
    "axes": {"arm": {"slow": {"lr": 1.0e-4}, "fast": {"lr": 1.0e-2}}, "seed": [0, 1]},
    "common": {"config": "logger/csv", "set": {"data.workers": 0}},
    "stages": {
        "start": {
            "config": "experiment/world-sft-questions",
            "set": {
                "backbone.path": "embedded:qwen2_5_vl-tiny",
                "data.batch_size": 2,
                "trainer.max_steps": 2,
                "callbacks.Benchmarks": None,
                "callbacks.Checkpoint": {"every": 1, "keep": 0, "monitor": None},
            },
        },
        "train": {
            "config": "experiment/world-sft-questions",
            "uses": {"backbone.path": {"stage": "start", "model": 1}},
            "set": {
                "model.lr": "${arm.lr}",
                "seed_everything": "${seed}",
                "data.batch_size": 2,
                "trainer.max_steps": 6,
                "trainer.log_every_n_steps": 1,
                "callbacks.Benchmarks.benchmarks": {
                    "greedy": {"every": 3, "max_new_tokens": 4, "source": {"options": {"size": 8}}},
                    "sampled": None,
                },
                "callbacks.Checkpoint": {"every": 1, "keep": 1, "monitor": None},
            },
        },
        "test": {
            "run": "test",
            "config": "experiment/world-samples-test",
            "uses": {"backbone.path": "train"},
            "set": {
                "callbacks.Benchmarks.benchmarks": {
                    "greedy": {"max_new_tokens": 4, "source": {"options": {"size": 16}}},
                    "sampled": {"max_new_tokens": 4, "n": 2, "source": {"options": {"size": 8}}},
                    "ood": None,
                    "ood_pairs": None,
                }
            },
        },
    },
    "endpoints": {
        "accuracy": {"stage": "test", "benchmark": "greedy"},
        "loss": {"stage": "train", "curve": "train/loss", "higher": "worse", "unit": "nats"},
    },
    "claims": [
        {"says": "Fast learns more.", "endpoint": "loss", "expect": {"greater": "slow", "than": "fast"}},
    ],
    "budget": {"stages": ["train"], "unit": "tokens", "tolerance": 0.5},
    "report": {
        "curves": [{"stage": "train", "metric": "train/loss"}],
        "samples": {"stage": "test", "benchmark": "greedy"},
    },
}
RUNS = 1 + 1 + 4 + 4  # start, its checkpoint as a model, train and test of two arms and two seeds


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "lightning_vlm.cli.main", "study", *words]


def study(folder: Path, *words: str, code: int = 0) -> str:
    """Run a study command in a folder; what it prints."""
    done = subprocess.run(command(folder, *words), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write(folder: Path, change=None) -> Path:
    """The study's file."""
    tree = json.loads(json.dumps(STUDY))
    if change is not None:
        change(tree)
    folder.mkdir(exist_ok=True)
    (folder / "mini.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "runs" / "mini"


def numbers(runs: Path) -> dict[str, object]:
    """What every run computed: scores and per-step losses."""
    found: dict[str, object] = {}
    for file in sorted(runs.glob("*/evaluations/*/*/per_example.jsonl")):
        found[str(file.relative_to(runs))] = file.read_text()
    for folder in sorted(runs.glob("train-*")):
        rows: dict[str, str] = {}
        for file in sorted(folder.glob("csv*/metrics.csv")):
            head, *lines = file.read_text().splitlines()
            column = head.split(",").index("train/loss")
            for line in lines:
                cells = line.split(",")
                if cells[column]:
                    rows[cells[head.split(",").index("step")]] = cells[column]
        found[folder.name] = rows
    return found


def started(runs: Path) -> dict[str, tuple[float, int]]:
    """When each run was started first, and how often."""
    records = [json.loads(file.read_text()) for file in runs.glob("*/stage.json")]
    return {record["name"]: (record["started"], record["attempts"]) for record in records}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study that ran through with one job, and its folder."""
    folder = tmp_path_factory.mktemp("studies") / "finished"
    write(folder)
    said = study(folder, "run", "mini.yaml", "--no_mlflow")
    assert f"{RUNS} runs, {RUNS} to do, 1 at once" in said
    assert f"[{RUNS}/{RUNS}]" in said
    return folder


def test_a_second_start_runs_nothing(finished):
    before = started(finished / "runs" / "mini")
    assert len(before) == RUNS
    assert {attempts for _, attempts in before.values()} == {1}
    said = study(finished, "run", "mini.yaml", "--no_mlflow")
    assert f"{RUNS} runs, 0 to do" in said
    assert started(finished / "runs" / "mini") == before


def test_threads_costs_and_inputs_are_written_down(finished):
    runs = finished / "runs" / "mini"
    record = json.loads((runs / "train-fast-1" / "stage.json").read_text())
    assert (record["state"], record["threads"], record["at"]) == ("done", 1, {"arm": "fast", "seed": "1"})
    assert record["seconds"] > 0 and record["cpu_seconds"] > 0 and record["peak_gib"] > 0
    used = record["inputs"]["backbone.path"]
    assert (used["instance"], used["path"]) == ("start@step-1", "runs/mini/start@step-1/model")
    assert used["hash"] == json.loads((runs / "start@step-1/model/provenance.json").read_text())["hash"]
    assert json.loads((runs / "train-fast-1" / "environment.json").read_text())["threads"] == 1
    costs = json.loads((runs / "train-fast-1" / "costs.json").read_text())
    assert (costs["steps"], costs["max_steps"], costs["samples"]) == (6, 6, 12)  # two samples a step
    losses = numbers(runs)["train-fast-1"]
    assert len(losses) == 6
    # The checkpoint that was handed over is the first step's, not the last's.
    first = json.loads((runs / "start@step-1/model/provenance.json").read_text())
    assert first["step"] == 1


def test_the_report_tells_endpoints_claims_and_budgets(finished):
    report = finished / "runs" / "mini" / "report"
    told = json.loads((report / "report.json").read_text())
    (loss,) = (found for found in told["endpoints"] if found["endpoint"]["name"] == "loss")
    arms = {arm["name"]: arm["seed_means"] for arm in loss["comparison"]["arms"]}
    losses = numbers(finished / "runs" / "mini")
    for arm in ("slow", "fast"):  # the last tenth of six steps is the last one
        assert arms[arm] == [float(losses[f"train-{arm}-{seed}"]["6"]) for seed in (0, 1)]
    assert told["claims"][0]["verdict"] in ("holds", "contradicted", "not shown")
    assert {row["label"]: len(row["values"]) for row in told["budget"]} == {"slow": 2, "fast": 2}
    assert all(row["unit"] == "tokens" and min(row["values"]) > 0 for row in told["budget"])
    assert "Fast learns more." in (report / "report.html").read_text()
    assert "Fast learns more." in (report / "report.md").read_text()


def test_two_jobs_give_the_numbers_of_one(finished, tmp_path):
    runs = write(tmp_path / "two")
    study(tmp_path / "two", "run", "mini.yaml", "--no_mlflow", "--no_report", "--jobs", "2")
    assert numbers(runs) == numbers(finished / "runs" / "mini")


def test_killed_and_started_again_it_ends_with_the_same_numbers(finished, tmp_path):
    runs = write(tmp_path / "killed")
    words = command(tmp_path / "killed", "run", "mini.yaml", "--no_mlflow", "--no_report", "--jobs", "2")
    kept: dict[str, tuple[float, int]] = {}
    for moment in ("start", "train-slow-0", "test-*"):
        process = subprocess.Popen(words, cwd=tmp_path / "killed", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 240
        while not list(runs.glob(f"{moment}/stage.json")) and time.monotonic() < until:
            time.sleep(0.1)
        assert list(runs.glob(f"{moment}/stage.json")), f"{moment} never started"
        time.sleep(1.0)  # in the middle of it
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.5)  # what it had started ends with it
        done = {
            name: when
            for name, when in started(runs).items()
            if json.loads((runs / name / "stage.json").read_text())["state"] == "done"
        }
        assert kept.items() <= done.items(), "a run that was done was run again"
        kept = done
    said = study(tmp_path / "killed", "run", "mini.yaml", "--no_mlflow", "--no_report", "--jobs", "2")
    assert f"{RUNS - len(kept)} to do" in said
    assert kept.items() <= started(runs).items()
    assert numbers(runs) == numbers(finished / "runs" / "mini")


def test_a_changed_input_runs_what_depends_on_it_and_back_again_nothing(tmp_path):
    folder = tmp_path / "changed"

    def one_seed(tree):
        tree["axes"]["seed"] = [0]

    def changed(tree):
        one_seed(tree)
        tree["axes"]["arm"]["fast"]["lr"] = 2.0e-2

    runs = write(folder, one_seed)
    study(folder, "run", "mini.yaml", "--no_mlflow", "--no_report", "--jobs", "2")
    before, losses = started(runs), numbers(runs)
    write(folder, changed)
    assert "train-fast-0  changed" in " ".join(study(folder, "status", "mini.yaml").split(" ")).replace(
        "   ", "  "
    ) or ("its inputs have changed since" in study(folder, "status", "mini.yaml"))
    assert "6 runs, 2 to do" in study(folder, "run", "mini.yaml", "--no_mlflow", "--no_report")
    after = started(runs)
    assert {name for name in before if after[name] != before[name]} == {"train-fast-0", "test-fast-0"}
    assert numbers(runs)["train-fast-0"] != losses["train-fast-0"]
    assert numbers(runs)["train-slow-0"] == losses["train-slow-0"]

    write(folder, one_seed)  # what was put aside is taken back
    study(folder, "run", "mini.yaml", "--no_mlflow", "--no_report")
    assert started(runs) == before
    assert numbers(runs) == losses
    assert "would remove runs/mini/replaced" in study(folder, "clean", "mini.yaml")
    assert (runs / "replaced").is_dir()
    study(folder, "clean", "mini.yaml", "--yes", "--checkpoints")
    assert not (runs / "replaced").exists()
    assert not (runs / "train-fast-0" / "checkpoints").exists()
    assert "6 of 6 runs are done" in study(folder, "status", "mini.yaml")


def test_a_failure_is_shown_and_costs_only_what_is_behind_it(tmp_path):
    folder = tmp_path / "failing"

    def failing(tree):
        tree["axes"]["seed"] = [0]
        tree["axes"]["arm"]["fast"]["lr"] = 1.0e30  # the loss is not finite after a step

    runs = write(folder, failing)
    said = study(folder, "run", "mini.yaml", "--no_mlflow", "--jobs", "2", code=2)
    assert "train-fast-0 failed with code" in said
    assert "the end of runs/mini/logs/train-fast-0.log" in said
    assert "error: 1 runs failed (train-fast-0), 1 wait behind them" in said
    assert json.loads((runs / "test-slow-0" / "stage.json").read_text())["state"] == "done"
    status = study(folder, "status", "mini.yaml")
    assert "behind train-fast-0" in status
    assert (runs / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda t: t["endpoints"]["accuracy"].update(metric="acuracy"),
            "has no metric 'acuracy'; did you mean 'accuracy'?",
        ),
        (
            lambda t: t["endpoints"]["accuracy"].update(benchmark="gredy"),
            "evaluates no 'gredy'; did you mean 'greedy'?",
        ),
        (lambda t: t["endpoints"]["accuracy"].update(metric="pass@4", benchmark="sampled"), "draws 2"),
        (lambda t: t["stages"]["train"]["set"].update({"model.lrr": 1}), "stage 'train'"),
        (lambda t: t["stages"]["train"]["uses"]["backbone.path"].update(model=7), "that checkpoint is not kept"),
        (lambda t: t["claims"][0]["expect"].update(than="quick"), "names no arm 'quick'"),
        (lambda t: t["report"]["curves"][0].update(metric="val/greedy/acc"), "no metric 'acc'"),
    ],
)
def test_refused_before_anything_runs(tmp_path, change, error, monkeypatch, capsys):
    from lightning_vlm.cli.main import main

    write(tmp_path, change)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "check", "mini.yaml"]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert len(said.strip().splitlines()) == 1


def test_check_finds_nothing_wrong_with_what_runs(tmp_path, monkeypatch, capsys):
    from lightning_vlm.cli.main import main

    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "check", "mini.yaml"]) == 0
    assert f"3 stages, {RUNS} runs: nothing wrong is seen" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_torchrun_inside_a_stage_gives_the_weights_of_one_process(tmp_path):
    """Four samples a step over two processes: the same gradient, so the same losses up to rounding."""
    folder = tmp_path / "ranks"
    one = {
        "config": "experiment/world-sft-questions",
        "set": {
            "backbone.path": "embedded:qwen2_5_vl-tiny",
            "data.batch_size": 4,
            "data.workers": 0,
            "trainer.max_steps": 2,
            "trainer.log_every_n_steps": 1,
            "callbacks.Benchmarks": None,
            "callbacks.Checkpoint": {"every": 0, "monitor": None},
        },
    }
    two = {**one, "processes": 2, "set": {**one["set"], "trainer.devices": 2, "trainer.strategy": "ddp"}}
    folder.mkdir()
    tree = {"common": {"config": "logger/csv"}, "stages": {"train-one": one, "train-two": two}}
    (folder / "mini.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    study(folder, "run", "mini.yaml", "--no_mlflow", "--no_report", "--jobs", "2")
    runs = folder / "runs" / "mini"
    environments = [json.loads((runs / name / "environment.json").read_text()) for name in ("train-one", "train-two")]
    assert [facts["world_size"] for facts in environments] == [1, 2]
    losses = [[float(value) for value in numbers(runs)[name].values()] for name in ("train-one", "train-two")]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
