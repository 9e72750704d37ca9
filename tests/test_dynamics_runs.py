"""Probes over ranks, cuts and resumes: the same files whatever happens, and training as it was without them."""

from __future__ import annotations

import shutil
import signal

import lightning as L
import pytest
import torch

from callbacks import LearningDynamics
from callbacks.dynamics import read_lines
from lightning_vlm.algorithms import SFT
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.spec import Backbone

from .conftest import run_scenarios

SPEC = {
    "model": "embedded:qwen2_5_vl-tiny", "world": {"size": 13, "pairs": True}, "probe": {"size": 7}, "batch_size": 4,
    "steps": 5, "settings": {"lr": 1e-2, "micro_batch_tokens": 300},
}  # fmt: skip


def files(run_dir):
    return [run_dir / "probes" / "probe" / name for name in ("records.jsonl", "summary.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of one process: float64 for ranks, float32 with an alarm for resumes."""
    folder = tmp_path_factory.mktemp("whole")
    specs = [
        SPEC | {"name": "exact", "run_dir": str(folder / "exact")},
        SPEC | {"name": "cut", "run_dir": str(folder / "cut"), "dtype": "float32", "checkpoint": True, "alarm": True},
    ]
    done = run_scenarios(specs, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_give_the_records_of_one(whole, tmp_path):
    """Seven samples on two ranks, sharded and replicated; steps 0, 2, 4 and the last one."""
    specs = [SPEC | {"name": s, "strategy": s, "run_dir": str(tmp_path / s)} for s in ("ddp", "fsdp2")]
    done = run_scenarios(specs, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    want = read_lines(files(whole / "exact")[0])
    assert [line["step"] for line in want] == [0] * 7 + [2] * 7 + [4] * 7 + [5] * 7
    for strategy in ("ddp", "fsdp2"):
        got = read_lines(files(tmp_path / strategy)[0])
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            texts = ("id", "output")
            assert [a.get(k) for k in texts] == [b.get(k) for k in texts] and a.keys() == b.keys()
            numbers = {k: v for k, v in b.items() if k not in texts}
            assert {k: a[k] for k in numbers} == pytest.approx(numbers, abs=1e-7)


@pytest.mark.parametrize("kill_at", [0, 3, 4])
def test_killed_and_resumed_gives_the_same_files(whole, tmp_path, kill_at):
    """Killed before the first step, between probes, and right after a probe that its checkpoint does not know."""
    spec = SPEC | {"name": "cut", "run_dir": str(tmp_path / "run"), "dtype": "float32"}
    spec |= {"checkpoint": True, "alarm": True}
    assert run_scenarios([spec | {"kill_at": kill_at}], tmp_path / "a").returncode == -signal.SIGKILL
    with files(tmp_path / "run")[0].open("a") as stream:
        stream.write('{"step": 4, "id": "half')  # cut off while it was written
    done = run_scenarios([spec | {"resume": "last"}], tmp_path / "b")
    assert done.returncode == 0, done.stderr
    for got, want in zip(files(tmp_path / "run"), files(whole / "cut"), strict=True):
        assert got.read_text() == want.read_text()


def test_sharded_run_killed_and_resumed(tmp_path):
    """The lowered learning rates and the alarm that lowered them come back, too: weights are equal to the last bit."""
    base = SPEC | {"dtype": "float32", "checkpoint": True, "alarm": True, "strategy": "fsdp2", "steps": 3}
    specs = {name: base | {"name": name, "run_dir": str(tmp_path / name)} for name in ("uncut", "cut")}
    done = run_scenarios([specs["uncut"]], tmp_path / "a", processes=2)
    assert done.returncode == 0, done.stderr
    killed = run_scenarios([specs["cut"] | {"kill_at": 2}], tmp_path / "b", processes=2)
    assert killed.returncode == -signal.SIGKILL
    done = run_scenarios([specs["cut"] | {"resume": "last"}], tmp_path / "c", processes=2)
    assert done.returncode == 0, done.stderr
    for got, want in zip(files(tmp_path / "cut"), files(tmp_path / "uncut"), strict=True):
        assert got.read_text() == want.read_text()
    want = torch.load(tmp_path / "a" / "records.pt")["uncut"]
    got = torch.load(tmp_path / "c" / "records.pt")["cut"]
    assert all(torch.equal(weight, got["weights"][name]) for name, weight in want["weights"].items())


def test_probing_leaves_training_as_it_is(whole, tmp_path):
    spec = {k: v for k, v in SPEC.items() if k != "probe"} | {"name": "bare", "run_dir": str(tmp_path / "bare")}
    done = run_scenarios([spec], tmp_path)
    assert done.returncode == 0, done.stderr
    bare, probed = torch.load(tmp_path / "records.pt")["bare"], torch.load(whole / "records.pt")["exact"]
    assert bare["losses"] == probed["losses"]
    assert all(torch.equal(weight, probed["weights"][name]) for name, weight in bare["weights"].items())


def resumed(tmp_path, probe):
    """A run of one step without a probe, resumed with one."""
    from callbacks.checkpoint import Checkpoint, last_checkpoint

    backbone = Backbone(path="embedded:qwen2_5_vl-tiny")
    for steps, more in ((1, []), (2, [probe])):
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, callbacks=[Checkpoint(), *more],
            default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        train = {"world": SourceSpec(kind="world", split="train", options={"size": 8})}
        data = VLMData(backbone=backbone, train=train, batch_size=2, workers=0)
        trainer.fit(SFT(backbone=backbone), data, ckpt_path=last_checkpoint(tmp_path))


def test_a_probe_cannot_join_a_run_that_began_without_it(tmp_path):
    probe = LearningDynamics(
        source=SourceSpec(kind="world", split="val", options={"size": 3, "pairs": True}), distributions=False
    )
    with pytest.raises(ValueError, match="resumed at step 1 was begun without probe 'probe'"):
        resumed(tmp_path, probe)


class StopAt(L.Callback):
    """Ends a run early."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = pl_module.clock == 3


@pytest.mark.parametrize(
    ("name", "wrong"), [("records.jsonl", "no line of step 0"), ("start.safetensors", "start.safetensors is missing")]
)
def test_a_run_cannot_be_resumed_without_its_start(whole, tmp_path, name, wrong):
    shutil.copytree(whole / "cut", tmp_path / "run")
    (tmp_path / "run" / "probes" / "probe" / name).unlink()
    spec = SPEC | {"name": "cut", "run_dir": str(tmp_path / "run"), "dtype": "float32", "checkpoint": True}
    done = run_scenarios([spec | {"resume": "last", "steps": 6}], tmp_path)
    assert done.returncode == 1 and wrong in done.stderr


def test_without_distributions_nothing_is_kept(tmp_path):
    """Nor are pairs needed. And a run that something else stops at step 3 of 50 is probed where it ends."""
    spec = SourceSpec(kind="world", split="val", options={"size": 3, "families": ["caption"]})
    probe = LearningDynamics(source=spec, distributions=False, name="mine", every=20)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=50, logger=False, callbacks=[probe, StopAt()], default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    backbone = Backbone(path="embedded:llava-tiny")
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 8})}
    trainer.fit(SFT(backbone=backbone), VLMData(backbone=backbone, train=train, batch_size=2, workers=0))
    folder = tmp_path / "probes" / "mine"
    assert {p.name for p in folder.iterdir()} == {"records.jsonl", "summary.jsonl", "pictures"}
    drawn = {"logprobs", "squeezing", "entropy", "top1", "calibration"}
    assert {p.stem for p in (folder / "pictures").iterdir()} == drawn
    lines = read_lines(folder / "summary.jsonl")
    assert [line["step"] for line in lines] == [0, 3]
    assert not {"tv", "js", "rejected", "reward_margin", "answer_ece"} & lines[-1].keys()
