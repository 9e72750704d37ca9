"""Tables of rollouts: every completion with what it earned; hand-made groups, and a real run of a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from callbacks import RolloutTable
from callbacks.rollouts import records
from lightning_vlm.algorithms import GRPO, SFT
from lightning_vlm.algorithms.rollout import Rollout
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.batch import Row
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Completion, Sampling

NAMES = ["accuracy", "length"]


def rollout(name="a", totals=(1.5, 0.0, 1.5, 0.5), *, values=None, advantages=(1.0, -1.0, 1.0, -0.5), pictures=()):
    """A prompt with four completions; the third was cut and is not learned from."""
    sample = Sample(name, [message("user", image(), text("how many <b>?"))], answer="3", source="world")
    ids = torch.arange(3)
    row = Row(name, ids, torch.zeros(3, dtype=torch.bool), info={"pictures": list(pictures)} if pictures else {})
    logprobs = [-0.5, -1.5, -1.0, -1.0]
    completions = [
        Completion([5] * n, f"{n - 1} & so", n != 3, logprobs[:n], [0.0] * n, [0.25] * n) for n in range(1, 5)
    ]
    values = torch.tensor(values or [[1, 1], [0, 0], [1, 1], [0, 1]], dtype=torch.float64)
    made = Rollout(row, [], sample, completions, (0, 0, 0), values, torch.tensor(totals, dtype=torch.float64))
    made.make_rows(truncated=False)
    made.advise(torch.tensor(advantages, dtype=torch.float64))
    return made


def module(*rollouts, before=4, after=5):
    return SimpleNamespace(clock_before=before, clock=after, last_rollouts=list(rollouts), rewards=dict.fromkeys(NAMES))


def trainer(folder, *, first=True):
    return SimpleNamespace(default_root_dir=str(folder), is_global_zero=first, loggers=[])


def end(callback, folder, pl_module, **kwargs):
    callback.on_train_batch_end(trainer(folder, **kwargs), pl_module, None, None, 0)
    return sorted(p.name for p in (folder / "rollouts").iterdir()) if (folder / "rollouts").exists() else []


def lines(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_record_of_each_completion():
    """Means by hand: log-probs −.5 and −1.5 over two tokens are −1; three tokens −.5, −1.5, −1 are −1."""
    found = records(rollout(), NAMES, step=4)
    assert found[1] == {
        "id": "a", "source": "world", "step": 4, "writer": "policy", "completion": 1, "prompt": "<image>how many <b>?",
        "output": "1 & so", "finished": True, "tokens": 2, "reward": 0.0, "rewards": {"accuracy": 0.0, "length": 0.0},
        "advantage": -1.0, "logprob": -1.0, "entropy": 0.25, "gold": "3", "mark": "worst",
    }  # fmt: skip
    assert [r["mark"] for r in found] == ["best", "worst", "best", None]
    assert [r["advantage"] for r in found] == [1.0, -1.0, None, -0.5]
    assert (found[2]["finished"], found[2]["logprob"], found[0]["logprob"]) == (False, -1.0, -0.5)


def test_a_group_without_spread_has_no_best():
    assert [r["mark"] for r in records(rollout(totals=(1.0,) * 4), NAMES, step=0)] == [None] * 4


def test_what_is_not_known_is_null():
    """A part that does not apply, tokens of somebody else, and no rewards at all."""
    made = rollout(values=[[1, math.nan], [0, 0], [1, 1], [0, 1]])
    made.completions[1] = replace(made.completions[1], logprobs=[math.nan, math.nan], entropies=[])
    found = records(made, NAMES, step=0)
    assert found[0]["rewards"] == {"accuracy": 1.0, "length": None}
    assert (found[1]["logprob"], found[1]["entropy"]) == (None, None)
    bare = rollout()
    bare.values, bare.totals, bare.writer = torch.zeros(0, 0), torch.zeros(0), "teacher"
    found = records(bare, [], step=0)
    assert [(r["reward"], r["rewards"], r["mark"], r["writer"]) for r in found] == [(None, {}, None, "teacher")] * 4
    made.values, made.totals = torch.zeros(0, 0), torch.zeros(0)  # rewards are for the policy's own completions
    assert records(made, NAMES, step=0)[0]["rewards"] == {}


def test_tables_are_written_when_a_multiple_is_crossed(tmp_path):
    callback = RolloutTable(every=10)
    assert end(callback, tmp_path, module(rollout(), before=4, after=8)) == []
    assert end(callback, tmp_path, module(rollout(), before=8, after=12)) == ["step-00000012"]
    assert end(callback, tmp_path, module(rollout(), before=12, after=16)) == ["step-00000012"]
    assert end(callback, tmp_path, module(rollout(), before=16, after=20)) == ["step-00000012", "step-00000020"]
    assert lines(tmp_path / "rollouts" / "step-00000012")[0]["step"] == 8


def test_only_rank_zero_writes(tmp_path):
    assert end(RolloutTable(every=1), tmp_path, module(rollout()), first=False) == []


def test_the_first_prompts_are_written_with_all_their_completions(tmp_path):
    end(RolloutTable(every=1, count=2), tmp_path, module(*(rollout(name) for name in "cab")))
    found = lines(tmp_path / "rollouts" / "step-00000005")
    assert [(r["id"], r["completion"]) for r in found] == [(name, n) for name in "ca" for n in range(4)]


def test_the_page_marks_best_and_worst_and_escapes_texts(tmp_path):
    end(RolloutTable(every=1), tmp_path, module(rollout(), rollout("b", (1.0,) * 4)))
    page = (tmp_path / "rollouts" / "step-00000005" / "table.html").read_text(encoding="utf-8")
    assert page.count('<tr class="right"') == 2 and page.count('<tr class="wrong"') == 1
    assert page.count("<tr class") == 8 and page.count("&lt;image&gt;how many &lt;b&gt;?") == 2
    assert "1 &amp; so" in page and "3 (cut)" in page and "0 (worst)" in page and "<img" not in page
    # (1.5 + 0 + 1.5 + .5 + 4) / 8
    assert "2 of the 2 prompts of this rank, 8 completions, mean reward 0.9375" in page
    assert "after 4 optimizer steps" in page


def test_pictures_are_shown_where_prompts_carry_them(tmp_path):
    picture = Image.new("RGB", (64, 32), "red")
    end(RolloutTable(every=1, size=16), tmp_path, module(rollout(pictures=[picture, picture])))
    page = (tmp_path / "rollouts" / "step-00000005" / "table.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 and picture.size == (64, 32)


def test_a_step_repeated_after_a_restart_replaces_the_folder(tmp_path):
    folder = tmp_path / "rollouts" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "stale").touch()
    half = tmp_path / "rollouts" / "step-00000005.tmp"
    half.mkdir()
    (half / "half").touch()
    assert end(RolloutTable(every=1), tmp_path, module(rollout())) == ["step-00000005"]
    assert sorted(p.name for p in folder.iterdir()) == ["rollouts.jsonl", "table.html"]


@pytest.mark.parametrize("wrong", ["every", "count", "size"])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match=f"RolloutTable: {wrong} must be at least 1, got 0"):
        RolloutTable(**{wrong: 0})


def test_algorithms_without_rollouts_are_refused():
    with pytest.raises(ValueError, match="RolloutTable: SFT has no rollouts to write down"):
        RolloutTable().on_fit_start(None, SFT(backbone=Backbone(path="embedded:qwen2_5_vl-tiny")))


def test_a_real_run_leaves_tables_and_artifacts(tmp_path):
    """Three steps of GRPO, tables at 2; rewards and advantages are those of the run."""
    kept = {}

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept[pl_module.clock] = (pl_module.last_rollouts, pl_module.last_step["metrics"])

    mlflow = MLFlowLogger(
        experiment_name="t", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "stored")
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=mlflow, callbacks=[Note(), RolloutTable(every=2, count=3)],
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=False,
    )  # fmt: skip
    backbone = Backbone(path="embedded:qwen2_5_vl-tiny")
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 12})}
    rewards = {
        "accuracy": Reward(kind="accuracy", rule="world/exact"), "length": Reward(kind="length", target=3, weight=0.5),
    }  # fmt: skip
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    learner = GRPO(backbone=backbone, rewards=rewards, group_size=3, rollout=sampling, lr=1e-3)
    trainer.fit(learner, VLMData(backbone=backbone, train=train, batch_size=3, workers=0))

    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step-00000002"]
    found = lines(tmp_path / "rollouts" / "step-00000002")
    rollouts, metrics = kept[2]
    assert [r["id"] for r in found] == [rollout.sample.id for rollout in rollouts for _ in range(3)]
    assert [r["output"] for r in found] == [c.text for rollout in rollouts for c in rollout.completions]
    for record in found:
        parts = record["rewards"]
        assert record["reward"] == pytest.approx(parts["accuracy"] + 0.5 * parts["length"])
        assert parts["length"] == pytest.approx(max(-1.0, -abs(record["tokens"] - 3) / 3))
    assert sum(r["reward"] for r in found) / 9 == pytest.approx(metrics["train/reward"])
    tokens = sum(r["tokens"] for r in found)
    assert sum(r["entropy"] * r["tokens"] for r in found) / tokens == pytest.approx(metrics["train/entropy"], rel=1e-5)
    for start in range(0, 9, 3):  # within a group advantages sum to 0
        assert sum(r["advantage"] for r in found[start : start + 3]) == pytest.approx(0.0, abs=1e-6)
    base = "rollouts/step-00000002"
    artifacts = {a.path for a in mlflow.experiment.list_artifacts(mlflow.run_id, base)}
    assert artifacts == {f"{base}/rollouts.jsonl", f"{base}/table.html"}
