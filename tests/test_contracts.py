"""Contracts of every exported algorithm: kill −9 and resume bit for bit, on one and on two processes; the export
reloads; the same gradient however the step is cut.

With $LVLM_CONTRACTS, dotted paths with commas between, of those algorithms instead, wherever they are defined.
"""

import os
import signal
from functools import cache

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lightning_vlm import algorithms
from lightning_vlm.export import export_checkpoint

from .conftest import run_scenarios

STEPS = 6
FLOAT32 = 1e-5  # relative rounding of a loss that is computed in float32 whatever the weights are
OUTSIDE = {path.rpartition(".")[2]: path for path in os.environ.get("LVLM_CONTRACTS", "").split(",") if path}
EXPORTED = OUTSIDE or {name: name for name in sorted(algorithms.__all__) if name != "Algorithm"}
GENERATED = {"data": 0.5, "on_policy": 0.3, "beam": 0.2, "rule": "world/exact", "refresh": 2}
GENERATED |= {"draws": 2, "beams": 2, "max_new_tokens": 12}
# A stop text of one letter makes completions, and so rewards, differ.
ROLLOUT = {"group_size": 2, "rollout": {"temperature": 1.0, "max_new_tokens": 6, "stop": ["e"]}}
LENGTH = ROLLOUT | {"rewards": {"length": {"kind": "length", "target": 4}}}
SETTINGS = {
    # Running means, a random share of negatives, and batches that feed two optimizer steps.
    "CW-DPO": {"algorithm": "DPO", "weighting": "cooling", "ell_floor": "mean", "bco_weight": 0.2},
    "CW-DPO, generated": {"algorithm": "DPO", "weighting": "cooling", "ell_floor": "mean", "negatives": GENERATED},
    # A reference of its own; several steps from one rollout, and groups that are replaced.
    "GRPO": {"algorithm": "GRPO", "kl_beta": 0.1} | LENGTH,
    "GRPO, refilled": {"algorithm": "GRPO", "steps_per_rollout": 2, "epochs": 2, "dynamic_sampling": 2} | LENGTH,
    "OPD": {"algorithm": "OPD", "teacher": "embedded:qwen2_5_vl-small"} | ROLLOUT,
    # Checkpoints of the projector alone, features from a store.
    "SFT, adapter only": {"algorithm": "SFT", "adapter_only": True, "vision_cache": True},
    "SFT-C, lazy": {"algorithm": "SFTC", "threshold": 4.3, "lazy": 2, "negative_fraction": 0.7},
}
CASES = {name: {"algorithm": path} for name, path in EXPORTED.items()} | ({} if OUTSIDE else SETTINGS)


def spec_of(case: str, strategy: str, kill_at: int) -> dict:
    own = dict(CASES[case])
    # Muon on sharded matrices is slow in two small processes: once is enough.
    optimizer = "adamw" if strategy == "fsdp2" and case != "SFT" else "muon"
    settings = {"lr": 1e-2, "micro_batch_tokens": 200, "warmup_steps": 2, "optimizer": optimizer}
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
    """Batches that feed two steps, or four, are done at every second one, or fourth."""
    return 4 if "generated" in case or "refilled" in case else kill_at


CELLS = [(1, "auto", 3), (1, "auto", 4), (2, "ddp", 3), (2, "fsdp2", 3)]  # processes, strategy, killed at step
PAIRS = [(*cell, case) for cell in CELLS for case in CASES if cell[2] == 3 or case in EXPORTED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(processes, strategy, killed at) → case → step, record of a whole run, of the rest of a run that was killed,
    folder of the whole run."""

    @cache
    def of_cell(processes: int, strategy: str, kill_at: int) -> dict[str, tuple]:
        folder = tmp_path_factory.mktemp("contracts")
        specs = {
            case: spec_of(case, strategy, kill_at) for *cell, case in PAIRS if cell == [processes, strategy, kill_at]
        }

        def run(name, changes):
            own = [s | {"name": case, "run_dir": str(folder / name / case)} | changes for case, s in specs.items()]
            done = run_scenarios(own, folder / f"{name}-runs", processes=processes)
            assert done.returncode == 0, done.stderr
            return torch.load(folder / f"{name}-runs" / "records.pt")

        whole = run("whole", {})
        for case, spec in specs.items():
            cut = spec | {"name": case, "run_dir": str(folder / "cut" / case), "kill_at": killed_at(case, kill_at)}
            killed = run_scenarios([cut], folder / f"kill-{case}", processes=processes)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        resumed = run("cut", {"resume": "last"})
        return {case: (killed_at(case, kill_at), whole[case], resumed[case], folder / "whole" / case) for case in specs}

    return of_cell


@pytest.mark.parametrize("processes, strategy, kill_at, case", PAIRS)
def test_killed_and_resumed_equals_uninterrupted(runs, processes, strategy, kill_at, case):
    """Losses and weights are equal to the last bit; of 13 samples, 4 a step, step 4 is an epoch's edge."""
    kill_at, want, got, _ = runs(processes, strategy, kill_at)[case]
    assert got["losses"] == want["losses"][kill_at:] and len(want["losses"]) == STEPS
    assert [step[kill_at:] for step in want["rows"]] == got["rows"]
    assert want["weights"].keys() == got["weights"].keys()
    different = [n for n, w in want["weights"].items() if not torch.equal(w, got["weights"][n])]
    assert different == []


@pytest.mark.skipif("GRPO, refilled" not in CASES, reason="only the algorithms of $LVLM_CONTRACTS")
def test_groups_are_replaced_before_the_kill_and_after_it(runs):
    """Or a place among further prompts that is lost would not be missed."""
    kill_at, whole, resumed, _ = runs(1, "auto", 3)["GRPO, refilled"]
    refills = [step.get("train/refills", 0.0) for step in whole["steps"]]
    assert min(refills[0], refills[kill_at]) > 0 and refills[kill_at] == resumed["steps"][0]["train/refills"]


@pytest.mark.parametrize("case", EXPORTED)
def test_the_export_reloads(runs, tmp_path, case):
    """Plain transformers loads what the checkpoint becomes, with the weights that training ended with."""
    _, whole, _, folder = runs(1, "auto", 3)[case]
    export_checkpoint(folder / "checkpoints" / f"step-{STEPS:08d}.ckpt", tmp_path / "model")
    plain = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "model").named_parameters())
    assert plain.keys() <= whole["weights"].keys()  # the rest, where there is one, is the algorithm's own
    assert [name for name, value in plain.items() if not torch.equal(value.data, whole["weights"][name])] == []


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """(case, how) → record of one step in fp64: as one micro-batch, as many, in two processes."""
    folder, records = tmp_path_factory.mktemp("cuts"), {}
    for processes, hows in ((1, {"whole": 10**6, "cut": 1}), (2, {"ddp": 10**6})):
        specs = []
        for case in EXPORTED:
            for how, budget in hows.items():
                spec = spec_of(case, "auto" if processes == 1 else "ddp", 0) | {"name": f"{case}/{how}", "steps": 1}
                spec |= {"dtype": "float64", "batch_size": 5, "checkpoint": False, "run_dir": str(folder / case / how)}
                spec["settings"] |= {"micro_batch_tokens": budget, "clip_norm": 0.0}
                specs.append(spec)
        done = run_scenarios(specs, folder / f"p{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        records |= torch.load(folder / f"p{processes}" / "records.pt")
    return records


@pytest.mark.parametrize("how", ["cut", "ddp"])
@pytest.mark.parametrize("case", EXPORTED)
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(cuts, case, how):
    """One micro-batch or one for each item, one process or two with three and two samples; fp64."""
    whole, other = cuts[f"{case}/whole"], cuts[f"{case}/{how}"]
    assert whole["metrics"]["train/micro_batches"] == 1 < other["metrics"]["train/micro_batches"]
    allowed = FLOAT32 if case == "VisualWarmup" else 1e-9
    assert other["losses"] == pytest.approx(whole["losses"], rel=allowed)
    assert whole["gradients"].keys() == other["gradients"].keys()
    scale = max(float(value.abs().max()) for value in whole["gradients"].values())
    gaps = {name: float((value - other["gradients"][name]).abs().max()) for name, value in whole["gradients"].items()}
    assert scale > 0 and max(gaps.values()) < allowed * scale
