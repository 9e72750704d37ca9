"""Contracts of every exported algorithm: kill −9 and resume bit for bit, on one and on two processes."""

import signal

import pytest
import torch

from lightning_vlm import algorithms

from .conftest import run_scenarios

EXPORTED = sorted(name for name in algorithms.__all__ if name != "Algorithm")
STEPS = 6


@pytest.mark.parametrize(
    "processes, strategy, kill_at", [(1, "auto", 3), (1, "auto", 4), (2, "ddp", 3), (2, "fsdp2", 3)]
)
@pytest.mark.parametrize("algorithm", EXPORTED)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, algorithm, processes, strategy, kill_at):
    """Losses and weights are equal to the last bit; of 13 samples, 4 a step, step 4 is an epoch's edge."""
    folder = tmp_path
    name = f"{algorithm}-{strategy}-{kill_at}"
    spec = {
        "model": "embedded:qwen2_5_vl-tiny",
        "world": {"size": 13, "pairs": True},
        "algorithm": algorithm,
        "strategy": strategy,
        "dtype": "float32",
        "steps": STEPS,
        "batch_size": 4,
        # A killed process leaves its worker behind for some seconds: once is enough.
        "workers": 1 if (algorithm, processes, kill_at) == ("SFT", 1, 3) else 0,
        "checkpoint": True,
        "settings": {"lr": 1e-2, "micro_batch_tokens": 200, "warmup_steps": 2, "optimizer": "muon"},
    }
    whole = spec | {"name": "whole", "run_dir": str(folder / f"{name}-whole")}
    cut = spec | {"name": "cut", "run_dir": str(folder / f"{name}-cut")}
    done = run_scenarios([whole], folder / f"{name}-a", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = run_scenarios([cut | {"kill_at": kill_at}], folder / f"{name}-b", processes=processes)
    assert killed.returncode == -signal.SIGKILL
    resumed = run_scenarios([cut | {"resume": "last"}], folder / f"{name}-c", processes=processes)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    want = torch.load(folder / f"{name}-a" / "records.pt")["whole"]
    got = torch.load(folder / f"{name}-c" / "records.pt")["cut"]
    assert got["losses"] == want["losses"][kill_at:] and len(want["losses"]) == STEPS
    assert want["weights"].keys() == got["weights"].keys()
    different = [n for n, w in want["weights"].items() if not torch.equal(w, got["weights"][n])]
    assert different == []
