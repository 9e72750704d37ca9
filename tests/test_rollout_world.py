"""GRPO really learns on the embedded world: from a model that answers some questions to one that answers more."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("--vars.families", "[angle, perimeter]")
PLAIN = (
    "-c",
    "logger/csv",
    "--logger.MLFlow",
    "null",
    "--callbacks.Benchmarks",
    "null",
    "--callbacks.Progress",
    "null",
)


def fit(folder: Path, name: str, experiment: str, *words: str) -> Path:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_vlm.cli.main", "fit", "-c", f"experiment/{experiment}", *PLAIN]
    done = subprocess.run(
        [*command, "--run_dir", str(folder / name), "--callbacks.Checkpoint.monitor", "null", *words],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / name


@pytest.mark.slow
def test_more_answers_are_right_and_the_policy_is_surer(tmp_path):
    """About four minutes: warm-up, 250 steps of SFT on two families of questions, 40 of GRPO."""
    warm = fit(tmp_path, "warm", "world-warmup")
    sft = ("--model.optimizer", "muon", "--model.lr", "3e-3", "--model.schedule", "wsd", "--data.batch_size", "32")
    start = ("--backbone.path", str(warm / "model"), "--trainer.max_steps", "250")
    base = fit(tmp_path, "base", "world-sft-questions", *FAMILIES, *sft, *start)
    start = ("--backbone.path", str(base / "model"), "--trainer.max_steps", "40", "--trainer.log_every_n_steps", "1")
    run = fit(tmp_path, "grpo", "world-grpo", *FAMILIES, *start, "--callbacks.RolloutTable", "null")
    with next(run.glob("**/metrics.csv")).open() as file:
        steps = [row for row in csv.DictReader(file) if row.get("train/reward")]
    first, last = (
        {name: fmean(float(row[f"train/{name}"]) for row in part) for name in ("pass_at_1", "entropy", "reward")}
        for part in (steps[:8], steps[-8:])
    )
    assert len(steps) == 40
    assert last["pass_at_1"] > first["pass_at_1"] + 0.05, (first, last)
    assert last["entropy"] < first["entropy"], (first, last)
