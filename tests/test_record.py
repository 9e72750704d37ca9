"""What a run leaves behind: checkpoints that are whole or absent, MLflow's record, the progress lines."""

import json
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks.checkpoint import Checkpoint, last_checkpoint
from callbacks.progress import Progress
from callbacks.record import MLFLOW_PARAM_LENGTH, _cut, flatten
from lightning_vlm.cli.main import main
from tests.test_cli import BASE


class Clocked(LightningModule):
    """`steps` optimizer steps per batch; validation logs the scores it is given, None for "not due"."""

    def __init__(self, steps: int = 1, scores=(), size: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.steps, self.scores = steps, list(scores)
        self.clock = self.clock_before = 0
        self.fresh_metrics: set[str] = set()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.clock_before = self.clock
        for _ in range(self.steps):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward((self.weight - 1).pow(2).sum())
            optimizer.step()
            self.clock += 1

    def validation_step(self, batch, batch_idx):
        self.fresh_metrics = set()
        score = self.scores.pop(0)
        if score is not None:
            self.log("val/toy/accuracy", float(score), batch_size=1)
            self.fresh_metrics = {"val/toy/accuracy"}


class Numbers(LightningDataModule):
    """So many batches, and a benchmark that logs `val/toy/accuracy`."""

    def __init__(self, batches: int, evaluates: bool) -> None:
        super().__init__()
        self.evaluations = {"toy": SimpleNamespace(metric_names={"accuracy"})}
        self.batches, self.evaluates = batches, evaluates

    def train_dataloader(self):
        return DataLoader(torch.ones(self.batches, 1))

    def val_dataloader(self):
        return DataLoader(torch.ones(1, 1)) if self.evaluates else []


def train(tmp_path, module, *, batches: int, callback: Checkpoint, every_val: int | None = None) -> Trainer:
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        limit_train_batches=batches,
        val_check_interval=every_val,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, datamodule=Numbers(batches, evaluates=every_val is not None))
    return trainer


def names(tmp_path) -> set[str]:
    return {p.name for p in (tmp_path / "checkpoints").iterdir()}


def test_saves_when_a_multiple_is_crossed(tmp_path):
    """Three steps per batch, every 4: crossed by 6 (4), 9 (8), 12 (12), 18 (16); the end, 18, is saved once."""
    train(tmp_path, Clocked(steps=3), batches=6, callback=Checkpoint(every=4, keep=0))
    assert names(tmp_path) == {f"step-{n:08d}.ckpt" for n in (6, 9, 12, 18)}
    assert last_checkpoint(tmp_path).name == "step-00000018.ckpt"
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("keep", "kept"), [(1, {5}), (2, {4, 5}), (0, {2, 4, 5})])
def test_keeps_the_newest(tmp_path, keep, kept):
    train(tmp_path, Clocked(), batches=5, callback=Checkpoint(every=2, keep=keep))
    assert names(tmp_path) == {f"step-{n:08d}.ckpt" for n in kept}


@pytest.mark.parametrize(("mode", "best", "score"), [("max", 2, 0.9), ("min", 3, 0.1)])
def test_best_by_task_metric(tmp_path, mode, best, score):
    """Scores after steps 1-5: .5 .9 .1 (not due) .9; an equal score does not replace the best."""
    callback = Checkpoint(monitor="val/toy/accuracy", mode=mode)
    train(tmp_path, Clocked(scores=[0.5, 0.9, 0.1, None, 0.9]), batches=5, callback=callback, every_val=1)
    assert names(tmp_path) == {f"best-{best:08d}.ckpt", "step-00000005.ckpt"}
    assert callback.best_score == pytest.approx(score)
    weight = torch.load(tmp_path / "checkpoints" / f"best-{best:08d}.ckpt")["state_dict"]["weight"]
    assert torch.allclose(weight, torch.tensor([1 - 0.8**best]))  # SGD on (w - 1)², rate .1, from 0
    state = torch.load(tmp_path / "checkpoints/step-00000005.ckpt")["callbacks"]
    restored = Checkpoint(monitor="val/toy/accuracy", mode=mode)
    restored.load_state_dict(next(iter(state.values())))
    assert restored.best_path == callback.best_path


def test_a_monitor_that_nothing_logs_is_an_error_before_the_first_step(tmp_path):
    for monitor, hint in (("val/toy/acuracy", "did you mean 'val/toy/accuracy'"), ("val/other/accuracy", "toy")):
        module = Clocked(scores=[0.5] * 3)
        with pytest.raises(ValueError, match=f"nothing will log monitor '{monitor}'.*{hint}"):
            train(tmp_path, module, batches=3, callback=Checkpoint(monitor=monitor), every_val=1)
        assert module.clock == 0 and not (tmp_path / "checkpoints").exists()


@pytest.fixture
def small_files():
    """No file may grow past 20 kB: what a full disk looks like to a writer."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else old[0], old[1]))

    yield limit
    limit(False)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, small_files):
    class Fills(Clocked):
        def training_step(self, batch, batch_idx):
            small_files(self.clock == 3)
            super().training_step(batch, batch_idx)

    with pytest.raises(OSError, match=r"could not write checkpoint .*step-00000004.*step-00000002.ckpt is whole"):
        train(tmp_path, Fills(size=50_000), batches=8, callback=Checkpoint(every=2))
    small_files(False)
    assert names(tmp_path) == {"step-00000002.ckpt"}
    assert torch.load(last_checkpoint(tmp_path))["state_dict"]["weight"].shape == (50_000,)


def test_a_broken_write_is_no_checkpoint(tmp_path):
    """What a killed process leaves under a temporary name is not found, and the next write clears it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step-00000002.ckpt.tmp").write_text("half")
    assert last_checkpoint(tmp_path) is None
    train(tmp_path, Clocked(), batches=2, callback=Checkpoint())
    assert names(tmp_path) == {"step-00000002.ckpt"}


def test_flatten_and_cut():
    nested = {"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}
    assert flatten(nested) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": {}, "e": None}
    assert _cut("x" * 600, MLFLOW_PARAM_LENGTH) == "x" * 499 + "…"
    assert _cut(1.5, 10) == "1.5"


def test_plain_progress_lines(capsys):
    bar = Progress(every=4)
    trainer = SimpleNamespace(
        is_global_zero=True,
        max_steps=10,
        callback_metrics={"train/loss": torch.tensor(1.25), "train/padded_tokens": torch.tensor(100.0)},
        progress_bar_metrics={},
    )
    module = SimpleNamespace(clock=0, clock_before=0)
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    for clock in (3, 6, 9, 10):  # three steps per batch
        module.clock, module.clock_before = clock, module.clock
        bar.on_train_batch_start()
        bar._batch_start -= 3  # each batch took three seconds or a little more
        bar.on_train_batch_end(trainer, module, None, None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["6/10", "9/10", "10/10"]
    assert "left 0:00:00  loss 1.25  tokens/s" in lines[0]
    assert float(lines[0].split()[-1]) == pytest.approx(100, rel=0.01)  # 3 steps × 100 tokens in 3 s


def test_mlflow_record_and_resume(tmp_path, monkeypatch):
    """Parameters, artifacts, tags and metrics of a run on sqlite; resumed, it goes on in the same MLflow run."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "provenance.json").write_text('{"hash": "abc"}')
    long = "x" * 2000
    Path("base.yaml").write_text(BASE.replace("embedded:none", str(parent)))
    argv = [
        "fit",
        "-c",
        "base.yaml",
        "--run_dir",
        "run",
        "--logger.MLFlow.experiment_name",
        "tests",
        "--logger.CSV",
        "{}",
    ]
    assert main([*argv, f"--backbone.chat_template={long}"]) == 0

    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("tests").experiment_id
    (run,) = client.search_runs([experiment])
    params, tags = run.data.params, run.data.tags
    assert params["model.init_args.lr"] == "0.1" and params["trainer.max_steps"] == "4"
    assert len(params["backbone.chat_template"]) == MLFLOW_PARAM_LENGTH
    assert (tags["parent.path"], tags["parent.hash"]) == (str(parent), "abc")
    assert tags["mlflow.runName"] == "run" and tags["stage"] == "fit" and tags["run_dir"] == str(tmp_path / "run")
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "environment.json"}
    saved = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert yaml.safe_load(Path(saved).read_text())["backbone"]["chat_template"] == long  # the artifact is whole
    assert "train/loss" in run.data.metrics and run.info.status == "FINISHED"
    assert json.loads(Path("run/environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert "train/loss" in Path("run/csv/metrics.csv").read_text()

    assert main([*argv, "--resume", "--trainer.max_steps", "6"]) == 0
    (run,) = client.search_runs([experiment])
    assert run.data.params["trainer.max_steps"] == "4" and run.data.tags["resumed.trainer.max_steps"] == "6"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 6
    assert len(Path("run/csv/metrics.csv").read_text().splitlines()) > 4  # what was written before stays
    assert Path("run/csv-2/metrics.csv").exists()
