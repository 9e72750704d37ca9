"""Callbacks: what they log, when they stop, what they write. A real tiny run, and hand-made steps for the logic."""

from __future__ import annotations

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from PIL import Image

from callbacks._clock import crossed
from callbacks.benchmarks import Benchmarks
from callbacks.early_stopping import TaskEarlyStopping
from callbacks.entropy import EntropyMonitor
from callbacks.evaluation_record import EvaluationRecord
from lightning_vlm.benchmarks import BenchmarkSpec
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.metrics.entropy import entropy_summary


@pytest.mark.parametrize(
    ("before", "after", "every", "fires"),
    [(0, 1, 1, True), (9, 10, 10, True), (10, 11, 10, False), (8, 12, 10, True), (3, 3, 1, False), (0, 9, 0, False)],
)
def test_crossed(before, after, every, fires):
    assert crossed(before, after, every) is fires


# --- entropy ---------------------------------------------------------------------------------------------------------


class Module:
    """What callbacks read of an algorithm."""

    def __init__(self):
        self.clock = self.clock_before = 0
        self.fresh_metrics: set[str] = set()
        self.logged: list[dict[str, float]] = []

    def step(self, entropies, steps=1):
        self.clock_before, self.clock = self.clock, self.clock + steps
        self.last_step = {"entropies": torch.tensor(entropies)}

    def log_dict(self, metrics, batch_size):
        self.logged.append(metrics)


def look(monitor, module, trainer, entropies, steps=1):
    module.step(entropies, steps)
    monitor.on_train_batch_end(trainer, module, None, None, 0)


def test_entropy_is_logged_on_the_clock():
    module, trainer = Module(), SimpleNamespace(should_stop=False)
    monitor = EntropyMonitor(every=4)
    for _ in range(3):
        look(monitor, module, trainer, [1.0, 3.0], steps=2)  # clock 2, 4, 6: crosses 4 once
    assert module.logged == [{f"train/entropy_{k}": v for k, v in entropy_summary(torch.tensor([1.0, 3.0])).items()}]
    assert module.logged[0]["train/entropy_mean"] == 2.0
    look(monitor, module, trainer, [], steps=2)
    assert len(module.logged) == 1


def test_entropy_collapse_stops_and_says_why():
    """Three looks in a row below the floor; a look above starts the count again, and a resumed run goes on counting."""
    module, trainer = Module(), SimpleNamespace(should_stop=False)
    monitor = EntropyMonitor(every=1, floor=0.1, patience=3, action="stop")
    for mean in (0.05, 0.05, 0.2, 0.05, 0.05):
        look(monitor, module, trainer, [mean])
        assert not trainer.should_stop
    resumed = EntropyMonitor(every=1, floor=0.1, patience=3, action="stop")
    resumed.load_state_dict(monitor.state_dict())
    with pytest.warns(UserWarning, match=r"step 6: mean token entropy 0.0500 nats.*model.lr.*EntropyMonitor.floor"):
        look(resumed, module, trainer, [0.05])
    assert trainer.should_stop


def test_entropy_warning_comes_once(recwarn):
    module, trainer = Module(), SimpleNamespace(should_stop=False)
    monitor = EntropyMonitor(every=1, floor=0.1, patience=1, action="warn")
    for _ in range(3):
        look(monitor, module, trainer, [0.0])
    assert not trainer.should_stop
    assert len([w for w in recwarn if "entropy collapse" in str(w.message)]) == 1


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 0}, {"floor": -1.0}, {"action": "halt"}])
def test_impossible_entropy_settings(wrong):
    with pytest.raises(ValueError, match="EntropyMonitor"):
        EntropyMonitor(**wrong)


# --- early stopping --------------------------------------------------------------------------------------------------

MONITOR = "val/world/accuracy"


def fitting(**metrics):
    return SimpleNamespace(
        should_stop=False,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        callback_metrics={k: torch.tensor(v) for k, v in metrics.items()},
        datamodule=SimpleNamespace(
            evaluations={name: SimpleNamespace(metric_names={"accuracy", "n"}) for name in ("world", "ood")}
        ),
    )


def validate(stopper, trainer, module, value, fresh=(MONITOR,)):
    module.clock += 10
    module.fresh_metrics = set(fresh)
    trainer.callback_metrics[MONITOR] = torch.tensor(value)
    stopper.on_validation_end(trainer, module)
    return trainer.should_stop


def test_early_stopping_waits_for_its_own_benchmark():
    """Improvement by more than min_delta resets the count; validations of other benchmarks do not count."""
    stopper, trainer, module = TaskEarlyStopping(monitor=MONITOR, patience=2, min_delta=0.05), fitting(), Module()
    stopper.on_fit_start(trainer, module)
    assert not validate(stopper, trainer, module, 0.30)
    assert not validate(stopper, trainer, module, 0.34)  # within min_delta: 1 waited
    for _ in range(5):
        assert not validate(stopper, trainer, module, 0.34, fresh=("val/ood/accuracy",))
    assert not validate(stopper, trainer, module, 0.36)  # better than .30 by more than .05
    assert (stopper.best_step, stopper.waited) == (80, 0)
    assert not validate(stopper, trainer, module, 0.36)
    resumed = TaskEarlyStopping(monitor=MONITOR, patience=2, min_delta=0.05)
    resumed.load_state_dict(stopper.state_dict())
    assert validate(resumed, trainer, module, 0.20)


def test_early_stopping_downwards():
    stopper, trainer, module = TaskEarlyStopping(monitor=MONITOR, patience=1, mode="min"), fitting(), Module()
    assert not validate(stopper, trainer, module, 2.0)
    assert not validate(stopper, trainer, module, 1.0)
    assert validate(stopper, trainer, module, 1.0)


def test_early_stopping_ignores_evaluation_outside_fit():
    stopper, trainer, module = TaskEarlyStopping(monitor=MONITOR, patience=1), fitting(), Module()
    trainer.state.fn = "validate"
    validate(stopper, trainer, module, 0.3)
    assert stopper.best is None


def test_early_stopping_refuses_what_nothing_logs():
    module = Module()
    with pytest.raises(ValueError, match=r"'val/wrold/accuracy'.*world, ood"):
        TaskEarlyStopping(monitor="val/wrold/accuracy").on_fit_start(fitting(), module)
    with pytest.raises(ValueError, match="did you mean 'val/world/accuracy'"):
        TaskEarlyStopping(monitor="val/world/acuracy").on_fit_start(fitting(), module)
    with pytest.raises(ValueError, match="is nan"):
        validate(TaskEarlyStopping(monitor=MONITOR), fitting(), module, float("nan"))


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -0.1}, {"mode": "up"}])
def test_impossible_stopping_settings(wrong):
    with pytest.raises(ValueError, match="TaskEarlyStopping"):
        TaskEarlyStopping(monitor=MONITOR, **wrong)


# --- benchmarks and sample tables in a real run ----------------------------------------------------------------------


def test_benchmarks_need_a_data_module_that_evaluates():
    with pytest.raises(ValueError, match="needs a data module"):
        Benchmarks(benchmarks={}).setup(SimpleNamespace(datamodule=None), None, "fit")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Four steps of SFT on the embedded world; two benchmarks, every second step and at the end."""
    from lightning_vlm.algorithms import SFT
    from lightning_vlm.data.module import VLMData
    from lightning_vlm.models.spec import Backbone

    folder = tmp_path_factory.mktemp("run")
    backbone = Backbone(path="embedded:qwen2_5_vl-tiny")

    def world(split, every, **more):
        source = SourceSpec(kind="world", split=split, options={"size": 20})
        return BenchmarkSpec(source=source, every=every, max_new_tokens=6, **more)

    callbacks = [
        EntropyMonitor(every=1),
        EvaluationRecord(count=4, size=32),
        TaskEarlyStopping(monitor=MONITOR, patience=50),
        Benchmarks(benchmarks={"world": world("val", 2), "ood": world("ood_pairs", 4, n=2, temperature=1.0)}),
    ]
    csv = CSVLogger(folder, name="", version="csv")
    mlflow = MLFlowLogger(
        experiment_name="t", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "artifacts")
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, logger=[csv, mlflow], callbacks=callbacks, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=1,
    )  # fmt: skip
    module = SFT(backbone=backbone, lr=1e-3)
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 100})}
    trainer.fit(module, VLMData(backbone=backbone, train=train, batch_size=4, workers=0))
    return SimpleNamespace(folder=folder, trainer=trainer, module=module, callbacks=callbacks, mlflow=mlflow)


def test_a_run_logs_entropy_and_benchmarks(finished_run):
    metrics = finished_run.trainer.logged_metrics
    assert metrics["train/entropy_mean"] == pytest.approx(float(metrics["train/entropy"]), rel=1e-4)
    assert metrics["train/entropy_p05"] <= metrics["train/entropy_p50"] <= metrics["train/entropy_p95"]
    assert 0 <= metrics[MONITOR] <= 1
    assert metrics["val/world/n"] == 16 and 0 <= metrics["val/world/family/caption"] <= 1
    drawn = {name for name in metrics if name.startswith("val/ood/")}
    assert {"val/ood/pass_at_1", "val/ood/pass_at_2", "val/ood/maj_at_2", "val/ood/diversity"} <= drawn


def test_a_run_leaves_records_and_tables(finished_run):
    folder = finished_run.folder / "evaluations"
    steps = {name: sorted(p.name for p in (folder / name).iterdir()) for name in ("world", "ood")}
    assert steps == {"world": ["step-00000002", "step-00000004"], "ood": ["step-00000004"]}
    last = folder / "world" / "step-00000004"
    records = [json.loads(line) for line in (last / "per_example.jsonl").read_text().splitlines()]
    assert len(records) == 20 and len({r["id"] for r in records}) == 20
    keys = {
        "id",
        "sample",
        "prompt",
        "prompt_id",
        "rule",
        "output",
        "extraction",
        "gold",
        "score",
        "finished",
        "groups",
    }
    assert all(keys <= set(r) for r in records)
    conditions, scores, breakdown = (
        json.loads((last / f"{name}.json").read_text()) for name in ("conditions", "scores", "breakdown")
    )
    answers = [r["score"] for r in records if r["groups"]["family"] != "caption"]
    assert scores["accuracy"] == pytest.approx(sum(answers) / len(answers))
    low, high = scores["intervals"]["accuracy"]
    assert low <= scores["accuracy"] <= high and (scores["n"], scores["rule"]) == (16, "world/exact")
    assert breakdown["family"]["caption"]["n"] == 4
    assert (conditions["rule"], conditions["step"], conditions["stage"]) == ("world/exact", 4, "val")
    pictures = sorted((last / "images").iterdir())
    assert len(pictures) == 4 and Image.open(pictures[0]).size == (32, 32)
    page = (last / "table.html").read_text()
    assert page.count("<tr class") == 4 and page.count("data:image/") == 4 and "&lt;image&gt;" in page
    drawn = folder / "ood" / "step-00000004"
    assert len((drawn / "per_example.jsonl").read_text().splitlines()) == 40
    assert not list(folder.rglob("*.tmp"))


def test_a_run_sends_tables_to_mlflow(finished_run):
    client, run_id = finished_run.mlflow.experiment, finished_run.mlflow.run_id
    names = {a.path for a in client.list_artifacts(run_id, "evaluations/world/step-00000004")}
    base = "evaluations/world/step-00000004"
    assert names == {
        f"{base}/{n}"
        for n in ("per_example.jsonl", "scores.json", "breakdown.json", "conditions.json", "table.html", "images")
    }


def test_impossible_table_settings():
    with pytest.raises(ValueError, match="EvaluationRecord"):
        EvaluationRecord(count=-1)
