"""The command line: quick answers without heavy imports, errors in one line, and whole runs of a dummy module."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from lightning_vlm.cli.main import main
from lightning_vlm.models.spec import Backbone

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Nested:
    weight: float = 1.0
    kind: Literal["a", "b"] = "a"


class Line(LightningModule):
    """Fits y = 1 by plain gradient descent.

    Args:
        backbone: unused.
        lr: learning rate.
        decay: weight decay.
        parts: nested settings.
    """

    def __init__(
        self, *, backbone: Backbone, lr: float = 0.1, decay: float | None = None, parts: dict[str, Nested] | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.lr, self.parts = backbone, lr, parts
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.clock = self.clock_before = 0
        self.fresh_metrics: set[str] = set()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def training_step(self, batch, batch_idx):
        self.clock_before = self.clock
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = (self.layer(batch) - 1).pow(2).mean()
        self.manual_backward(loss)
        optimizer.step()
        self.clock += 1
        self.log("train/loss", loss)

    def validation_step(self, batch, batch_idx):
        self.log("val/toy/accuracy", self.layer.weight.item(), batch_size=1)
        self.fresh_metrics = {"val/toy/accuracy"}

    def predict_step(self, batch, batch_idx):
        return [{"id": f"item-{int(x)}", "sample": 0, "prompt": "p", "output": "é", "gold": None} for x in batch[:, 0]]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["lightning_vlm"] = {"step": self.clock}

    def on_load_checkpoint(self, checkpoint):
        self.clock = self.clock_before = checkpoint["lightning_vlm"]["step"]


class OtherLine(Line):
    """Line without decay; `rate` is its own."""

    def __init__(self, *, backbone: Backbone, lr: float = 0.1, rate: float = 1.0) -> None:
        super().__init__(backbone=backbone, lr=lr)
        self.rate = rate


class Points(LightningDataModule):
    """Points on a line."""

    def __init__(self, *, backbone: Backbone, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 1), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 1), batch_size=4)

    def predict_dataloader(self):
        return DataLoader(torch.arange(12.0).flip(0).unsqueeze(1), batch_size=self.batch_size)


class Boom(Callback):
    """Raises a bug, or an error of the user's."""

    def __init__(self, *, at: int = 0, bug: bool = False) -> None:
        self.at, self.bug = at, bug

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.clock == self.at:
            raise KeyError("a bug") if self.bug else ValueError("two\nlines")


BASE = f"""\
backbone: {{path: "embedded:none"}}
model:
  class_path: {__name__}.Line
  init_args: {{lr: 0.1}}
data:
  class_path: {__name__}.Points
trainer: {{max_steps: 4, accelerator: cpu, log_every_n_steps: 1}}
callbacks: {{SaveModel: null, Checkpoint: {{every: 2, keep: 0}}, Progress: {{every: 2}}}}
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A configuration that runs, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVLM_TRACEBACK", raising=False)
    (tmp_path / "base.yaml").write_text(BASE)
    return ["-c", "base.yaml", "--run_dir", "run"]


def one_error(capfd, argv) -> str:
    """The one line on stderr of a command that must exit with 2 (Lightning's own notices come before it)."""
    assert main(argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def test_quick_answers_import_nothing_heavy(tmp_path):
    """Help, version, unknown commands and missing or misspelt files are answered before torch is imported."""
    (tmp_path / "typo.yaml").write_text("trainer: {max_steps: 1}\ntrianer: {}\n")
    (tmp_path / "good.yaml").write_text("vars: {x: 1}\nmodel: {class_path: SFT, init_args: {lr: '${vars.x}'}}\n")
    code = """
import sys
from lightning_vlm.cli.main import main
for argv, rc in [(["--help"], 0), (["--version"], 0), ([], 0), (["fit", "--help"], 0), (["predict", "-h"], 0),
                 (["fti"], 2), (["fit", "-c", "nope.yaml"], 2), (["fit", "-c", "typo.yaml"], 2), (["fit"], 2),
                 (["fit", "-c", "good.yaml", "--print_config"], 0), (["fit", "-c", "good.yaml", "--rusume"], 2),
                 (["export", "nope.ckpt", "--out", "x"], 2), (["chat", "m", "--image", "nope.png"], 2)]:
    assert main(argv) == rc, argv
assert not {"torch", "lightning", "mlflow", "transformers", "PIL"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert "unknown command 'fti'; did you mean 'fit'?" in errors[0]
    assert "no configuration file 'nope.yaml'" in errors[1]
    assert "trianer" in errors[2] and "did you mean 'trainer'?" in errors[2]
    assert "nothing to fit" in errors[3]
    assert "unknown option --rusume; did you mean 'resume'?" in errors[4]
    assert "usage: lightning-vlm fit" in done.stdout and "lr: 1\n" in done.stdout


def test_fit_writes_a_run_that_runs_again(base, capfd):
    assert main(["fit", *base, "--model.lr", "0.2", "--data.batch_size=8"]) == 0
    run = Path("run")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"] == {"lr": 0.2, "decay": None, "parts": None}  # defaults are written out
    assert saved["data"]["init_args"] == {"batch_size": 8}
    assert saved["backbone"]["path"] == "embedded:none" and "run_dir" not in saved
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000002.ckpt", "step-00000004.ckpt"}
    out = capfd.readouterr()
    assert "step 2/4" in out.out and "loss" in out.out and "run_dir: run\n" in out.out

    assert main(["fit", "-c", "run/config.yaml", "--run_dir", "again"]) == 0
    assert Path("again/config.yaml").read_text() == (run / "config.yaml").read_text()
    first, second = (torch.load(f"{d}/checkpoints/step-00000004.ckpt")["state_dict"] for d in ("run", "again"))
    assert torch.equal(first["layer.weight"], second["layer.weight"])


def test_default_run_dir_is_named_after_the_experiment(base, capfd):
    assert main(["fit", "-c", "base.yaml", "--trainer.max_steps", "1"]) == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("base-") and f"run_dir: runs/{run.name}" in capfd.readouterr().out


def test_resume_goes_on_and_needs_to_be_asked(base, capfd):
    assert main(["fit", *base, "--trainer.max_steps", "8"]) == 0
    whole = torch.load("run/checkpoints/step-00000008.ckpt")["state_dict"]["layer.weight"]
    half = ["-c", "base.yaml", "--run_dir", "half"]
    Path("boom.yaml").write_text(f"callbacks: {{{__name__}.Boom: {{at: 6}}}}\n")
    assert "two lines" in one_error(capfd, ["fit", *half, "-c", "boom.yaml", "--trainer.max_steps", "8"])
    assert "half holds a run already: add --resume" in one_error(capfd, ["fit", *half])
    assert main(["fit", *half, "--trainer.max_steps", "8", "--resume"]) == 0
    assert "resuming from half/checkpoints/step-00000004.ckpt" in capfd.readouterr().out
    assert torch.equal(torch.load("half/checkpoints/step-00000008.ckpt")["state_dict"]["layer.weight"], whole)
    assert main(["fit", "--run_dir", "half", "--resume", "--trainer.max_steps", "9"]) == 0  # its own configuration
    assert Path("half/checkpoints/step-00000009.ckpt").exists()
    assert "no checkpoint 'nope'" in one_error(capfd, ["fit", *half, "--resume", "nope"])
    assert main(["fit", "-c", "base.yaml", "--run_dir", "new", "--resume"]) == 0
    assert "nothing to resume in new" in capfd.readouterr().out


def test_predict_and_validate(base, capfd):
    assert main(["fit", *base]) == 0
    ckpt = "run/checkpoints/step-00000004.ckpt"
    assert main(["predict", *base, "--ckpt", ckpt]) == 0
    records = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == [f"item-{i}" for i in range(12)]  # natural order, whatever the batches
    assert records[0]["output"] == "é"
    assert main(["predict", *base, "--ckpt", ckpt, "--out", "elsewhere/p.jsonl", "--data.batch_size", "5"]) == 0
    assert Path("elsewhere/p.jsonl").read_text() == Path("run/predictions.jsonl").read_text()
    assert [p.name for p in Path("elsewhere").iterdir()] == ["p.jsonl"]
    assert main(["validate", *base, "--ckpt", ckpt]) == 0
    weight = torch.load(ckpt)["state_dict"]["layer.weight"].item()
    assert json.loads(Path("run/validate.json").read_text())["val/toy/accuracy"] == pytest.approx(weight)
    assert "no checkpoint 'gone.ckpt'" in one_error(capfd, ["validate", *base, "--ckpt", "gone.ckpt"])
    Path("hf").mkdir()
    Path("hf/config.json").write_text("{}")
    assert "--backbone.path hf" in one_error(capfd, ["test", *base, "--ckpt", "hf"])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model.lrr", "1"], ["model.init_args.lrr", "Line takes no such argument", "'lr'", "command line"]),
        (["--model.lr", "fast"], ["model.init_args.lr", "expected float, got 'fast'"]),
        (["--model.decay", "[1]"], ["model.init_args.decay", "expected float or null, got [1]"]),
        (["--model.parts.vision.wieght", "1"], ["model.init_args.parts.vision.wieght", "'weight'"]),
        (["--model.parts.vision.kind", "c"], ["model.init_args.parts.vision.kind", "one of 'a', 'b'"]),
        (["--data.batch_sise", "1"], ["data.init_args.batch_sise", "'batch_size'"]),
        (["--trainer.max_step", "1"], ["trainer.max_step", "'max_steps'"]),
        (["--trainer.max_steps", "1.5"], ["trainer.max_steps", "expected int, got 1.5"]),
        (["--backbone.pth", "x"], ["backbone.pth", "'path'", "command line"]),
        (["--backbone.dtype", "half"], ["backbone.dtype", "'float32', 'bfloat16'", "'half'"]),
        (["--model.backbone.path", "x"], ["model.init_args.backbone", "top-level `backbone`"]),
        (["--seed_everything", "x"], ["seed_everything", "expected int"]),
        (["--callbacks.Chekpoint.every", "1"], ["callbacks.Chekpoint", "did you mean 'Checkpoint'?"]),
        (["--callbacks.Checkpoint.evry", "1"], ["callbacks.Checkpoint.evry", "'every'"]),
        (["--callbacks.Checkpoint.every", "-1"], ["cannot be negative"]),
        (["--callbacks.Checkpoint.mode", "up"], ["callbacks.Checkpoint.mode", "one of 'max', 'min'"]),
        (["--callbacks.SaveModl", "null"], ["callbacks.SaveModl", "'SaveModel'"]),
        (["--logger.MLFlwo.run_name", "x"], ["logger.MLFlwo", "'MLFlow'"]),
        (["--logger.MLFlow.trackin_uri", "x"], ["logger.MLFlow.trackin_uri", "'tracking_uri'"]),
        (["--model", "tests.test_cli.Lyne"], ["model.class_path", "'Line'"]),
        (["--model", "no_such.Module"], ["model.class_path", "no module 'no_such'"]),
        (["--model", "tests.test_cli.Points"], ["is not a LightningModule"]),
        (["--data", "null"], ["no data: set data.class_path"]),
        (["--callbacks.SaveModel.source", "best"], ["SaveModel", "Checkpoint.monitor"]),
    ],
    ids=lambda v: "_".join(v)[:40] if isinstance(v, list) else None,
)
def test_users_errors_are_one_line_before_anything_runs(base, capfd, argv, parts):
    line = one_error(capfd, ["fit", *base, *argv])
    for part in parts:
        assert part in line, line


def test_a_missing_required_argument(base, capfd):
    Path("base.yaml").write_text(BASE.replace('path: "embedded:none"', "seed: 1"))
    assert "Backbone needs 'path': set backbone.path" in one_error(capfd, ["fit", *base])
    Path("base.yaml").write_text(BASE.replace('backbone: {path: "embedded:none"}\n', ""))
    assert "no backbone: set backbone.path" in one_error(capfd, ["fit", *base])


def test_a_changed_class_leaks_nothing_silently(base, capfd):
    Path("base.yaml").write_text(BASE.replace("{lr: 0.1}", "{lr: 0.1, decay: 0.5}"))
    Path("other.yaml").write_text(f"model: {{class_path: {__name__}.OtherLine}}\n")
    line = one_error(capfd, ["fit", *base, "-c", "other.yaml"])
    assert "model.init_args.decay" in line and "Line in base.yaml:4" in line and "OtherLine" in line
    Path("other.yaml").write_text(f"model: {{class_path: {__name__}.OtherLine, init_args: {{decay-: }}}}\n")
    assert main(["fit", *base, "-c", "other.yaml", "--trainer.max_steps", "1"]) == 0
    text = capfd.readouterr().out
    assert text.count("OtherLine keeps what was set for") == 1 and "lr (base.yaml:4)" in text


def test_bugs_keep_their_traceback_and_users_errors_on_demand(base, capfd):
    Path("boom.yaml").write_text(f"callbacks: {{{__name__}.Boom: {{at: 1}}}}\n")
    argv = ["fit", *base, "-c", "boom.yaml"]
    line = one_error(capfd, argv)
    assert line.startswith("error: two lines (from test_cli.py:")  # not raised by this package: says where
    with pytest.raises(ValueError, match="two"):
        main([*argv, "--run_dir", "second", "--traceback"])
    with pytest.raises(KeyError):
        main([*argv, "--run_dir", "third", f"--callbacks.{__name__}.Boom.bug", "true"])


def test_checkpoints_and_bar_can_be_removed(base):
    assert main(["fit", *base, "--callbacks.Checkpoint", "null", "--callbacks.Progress", "null"]) == 0
    assert not Path("run/checkpoints").exists()


def test_class_help(base, capfd):
    assert main(["fit", *base, "--model.help"]) == 0
    out = capfd.readouterr().out
    assert "Fits y = 1" in out and "learning rate" in out and "default: 0.1" in out
    assert main(["fit", "--callbacks.help"]) == 0
    assert "Checkpoint" in capfd.readouterr().out
    assert main(["fit", "--callbacks.help", "Checkpoint"]) == 0
    assert "optimizer steps between checkpoints" in capfd.readouterr().out


def test_a_checkpoint_of_another_model(base, capfd):
    assert main(["fit", *base]) == 0
    content = torch.load("run/checkpoints/step-00000004.ckpt")
    content["state_dict"] = {"other.weight": torch.zeros(1)}
    torch.save(content, "other.ckpt")
    line = one_error(capfd, ["validate", *base, "--ckpt", "other.ckpt"])
    assert "other.ckpt does not fit the configured backbone" in line and "layer.weight" in line


# `compose/` and `study/` hold settings of other commands (tests/test_compose_embedded.py, tests/test_study_configs.py).
FRAGMENTS = sorted(str(p.relative_to(ROOT / "configs").with_suffix("")) for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("name", [n for n in FRAGMENTS if not n.startswith(("experiment/", "compose/", "study/"))])
def test_every_fragment_is_read_and_fits(name, monkeypatch):
    """Each fragment over the world's experiment: all names and types exist."""
    monkeypatch.chdir(ROOT)
    checked(["experiment/world-sft", "data/geometry3k", "data/world", name])


@pytest.mark.parametrize("name", [n for n in FRAGMENTS if n.startswith("experiment/")])
def test_every_experiment_is_complete_and_says_what_it_is(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LVLM_REAL_DATA", "data")
    checked([name])
    head = (ROOT / "configs" / f"{name}.yaml").read_text().split("\ninclude:")[0]
    assert re.search(f"lightning-vlm (fit|test) -c {name}", head) and "Hardware" in head


def checked(names: list[str]) -> None:
    from lightning_vlm.cli import app
    from lightning_vlm.config.files import load

    config = load(names)
    classes = app.resolve_classes(config)
    defaults = app.run_defaults(Path("run"), Path("run/config.yaml"), resuming=False)
    app.check(config, app.linked(config, classes), classes, defaults)


def test_outside_processes_need_a_run_dir(base, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "give --run_dir" in one_error(capfd, ["fit", "-c", "base.yaml"])
