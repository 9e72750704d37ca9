"""Contracts of every exported algorithm: kill −9 and resume bit for bit, on one and on two processes."""

import signal

import pytest
import torch

from lightning_vlm import algorithms
from lightning_vlm.models.tiny import make_tiny

from .conftest import run_scenarios
from .test_step import write_data

EXPORTED = sorted(name for name in algorithms.__all__ if name != "Algorithm")
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and thirteen samples, four a step: the end comes in the second epoch."""
    folder = tmp_path_factory.mktemp("contracts")
    model = str(make_tiny("qwen2_5_vl", folder / "model"))
    return folder, {"model": model, "data": write_data(folder, "mixed", lambda i: i % 3 > 0)}


@pytest.mark.parametrize(
    "processes, strategy, kill_at", [(1, "auto", 3), (1, "auto", 4), (2, "ddp", 3), (2, "fsdp2", 3)]
)
@pytest.mark.parametrize("algorithm", EXPORTED)
def test_killed_and_resumed_equals_uninterrupted(inputs, algorithm, processes, strategy, kill_at):
    """Losses and weights are equal to the last bit; step 4 is an epoch's edge."""
    folder, base = inputs
    name = f"{algorithm}-{strategy}-{kill_at}"
    spec = base | {
        "algorithm": algorithm,
        "strategy": strategy,
        "dtype": "float32",
        "steps": STEPS,
        "batch_size": 4,
        "workers": 1 if processes == 1 else 0,
        "checkpoint": True,
        "settings": {"lr": 1e-2, "micro_batch_tokens": 200, "warmup_steps": 2, "optimizer": "muon"},
    }
    whole = spec | {"name": "whole", "run_dir": str(folder / f"{name}-whole")}
    cut = spec | {"name": "cut", "run_dir": str(folder / f"{name}-cut")}
    done = run_scenarios([whole], folder / f"{name}-a", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = run_scenarios([cut | {"kill_at": kill_at}], folder / f"{name}-b", processes=processes)
    assert killed.returncode == (-signal.SIGKILL if processes == 1 else 1)
    resumed = run_scenarios([cut | {"resume": "last"}], folder / f"{name}-c", processes=processes)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    want = torch.load(folder / f"{name}-a" / "records.pt")["whole"]
    got = torch.load(folder / f"{name}-c" / "records.pt")["cut"]
    assert got["losses"] == want["losses"][kill_at:] and len(want["losses"]) == STEPS
    assert want["weights"].keys() == got["weights"].keys()
    different = [n for n, w in want["weights"].items() if not torch.equal(w, got["weights"][n])]
    assert different == []
