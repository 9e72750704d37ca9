"""Contracts of every exported algorithm: kill −9 and resume bit for bit, on one and on two processes."""

import signal

import pytest
import torch

from lightning_vlm import algorithms

from .conftest import run_scenarios

STEPS = 6
GENERATED = {"data": 0.5, "on_policy": 0.3, "beam": 0.2, "rule": "world/exact", "refresh": 2}
GENERATED |= {"draws": 2, "beams": 2, "max_new_tokens": 12}
CASES = {name: {"algorithm": name} for name in sorted(algorithms.__all__) if name != "Algorithm"} | {
    # Running means, a random share of negatives, and batches that feed two optimizer steps.
    "CW-DPO": {"algorithm": "DPO", "weighting": "cooling", "ell_floor": "mean", "bco_weight": 0.2},
    "CW-DPO, generated": {"algorithm": "DPO", "weighting": "cooling", "ell_floor": "mean", "negatives": GENERATED},
    "SFT-C, lazy": {"algorithm": "SFTC", "threshold": 4.3, "lazy": 2, "negative_fraction": 0.7},
}


def spec_of(case: str, strategy: str, kill_at: int) -> dict:
    own = dict(CASES[case])
    settings = {"lr": 1e-2, "micro_batch_tokens": 200, "warmup_steps": 2, "optimizer": "muon"}
    return {
        "model": "embedded:qwen2_5_vl-tiny",
        "world": {"size": 13, "pairs": True},
        "algorithm": own.pop("algorithm"),
        "strategy": strategy,
        "dtype": "float32",
        "steps": STEPS,
        "batch_size": 4,
        # A killed process leaves its worker behind for some seconds: once is enough.
        "workers": 1 if (case, strategy, kill_at) == ("SFT", "auto", 3) else 0,
        "checkpoint": True,
        "settings": settings | own,
    }


def killed_at(case: str, kill_at: int) -> int:
    """Batches that feed two steps are done at every other one."""
    return 4 if "generated" in case else kill_at


@pytest.fixture(scope="module", params=[(1, "auto", 3), (1, "auto", 4), (2, "ddp", 3), (2, "fsdp2", 3)], ids=str)
def runs(request, tmp_path_factory):
    """Per case: when it was killed, the record of a whole run, and that of the rest of a run that was killed."""
    processes, strategy, kill_at = request.param
    folder = tmp_path_factory.mktemp("contracts")
    cases = [case for case in CASES if kill_at == 3 or "-" not in case]  # the variants once per strategy
    specs = {case: spec_of(case, strategy, kill_at) for case in cases}

    def run(name, changes):
        all_of_them = [s | {"name": case, "run_dir": str(folder / name / case)} | changes for case, s in specs.items()]
        done = run_scenarios(all_of_them, folder / f"{name}-runs", processes=processes)
        assert done.returncode == 0, done.stderr
        return torch.load(folder / f"{name}-runs" / "records.pt")

    whole = run("whole", {})
    for case, spec in specs.items():
        cut = spec | {"name": case, "run_dir": str(folder / "cut" / case), "kill_at": killed_at(case, kill_at)}
        assert run_scenarios([cut], folder / f"kill-{case}", processes=processes).returncode == -signal.SIGKILL
    resumed = run("cut", {"resume": "last"})
    return {case: (killed_at(case, kill_at), whole[case], resumed[case]) for case in cases}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(runs, case):
    """Losses and weights are equal to the last bit; of 13 samples, 4 a step, step 4 is an epoch's edge."""
    if case not in runs:
        pytest.skip("killed at another step")
    kill_at, want, got = runs[case]
    assert got["losses"] == want["losses"][kill_at:] and len(want["losses"]) == STEPS
    assert [step[kill_at:] for step in want["rows"]] == got["rows"]
    assert want["weights"].keys() == got["weights"].keys()
    different = [n for n, w in want["weights"].items() if not torch.equal(w, got["weights"][n])]
    assert different == []
