"""One-line swaps: the world's data with every exported algorithm and both architectures, by changing one fragment."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_vlm import algorithms
from lightning_vlm.cli.main import main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def class_of(path):
    """The class that a fragment, or one it includes, names; None for settings that go behind any."""
    tree = yaml.safe_load(path.read_text())
    found = [class_of(path.parent / name) for name in tree.get("include", [])]
    return tree.get("model", {}).get("class_path") or next(filter(None, found), None)


FRAGMENTS = {p.stem: class_of(p) for p in sorted((CONFIGS / "algorithm").glob("*.yaml"))}


def test_every_exported_algorithm_has_a_fragment():
    assert {name for name, cls in FRAGMENTS.items() if cls is None} == {"adapter_only"}
    assert set(filter(None, FRAGMENTS.values())) == set(algorithms.__all__) - {"Algorithm"}


@pytest.mark.parametrize("algorithm", filter(FRAGMENTS.get, FRAGMENTS))
@pytest.mark.parametrize("model", ["qwen2_5_vl", "llava"])
def test_the_worlds_data_with_every_algorithm(algorithm, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [f"model/{model}-student", f"algorithm/{algorithm}", "data/world", "trainer/cpu", "logger/csv"]
    words = [word for file in files for word in ("-c", file)]
    small = ["--backbone.path", f"embedded:{model}-tiny", "--trainer.max_steps", "2", "--data.batch_size", "4"]
    if FRAGMENTS[algorithm] in ("GRPO", "OPD"):
        small += ["--model.rollout.max_new_tokens", "8", "--vars.overlong_ramp", "4"]
        small += ["--vars.teacher", f"embedded:{model}-tiny"]
    assert main(["fit", *words, *small, "--data.workers", "0", "--run_dir", "run"]) == 0
    assert (tmp_path / "run/model/model.safetensors").is_file()
    provenance = json.loads((tmp_path / "run/model/provenance.json").read_text())
    assert provenance["step"] == 2


def test_predictions_of_a_run_leave_its_curves_alone_and_draw_as_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["model/llava-student", "algorithm/sft", "data/world", "trainer/cpu", "logger/csv"]
    words = [word for file in files for word in ("-c", file)]
    words += ["--backbone.path", "embedded:llava-tiny", "--data.workers", "0", "--run_dir", "run"]
    assert main(["fit", *words, "--trainer.max_steps", "5", "--data.batch_size", "2"]) == 0
    curves = (tmp_path / "run/csv/metrics.csv").read_bytes()
    assert b"train/loss" in curves
    drawn = ["--model.samples", "3", "--model.sampling.temperature", "1.0", "--model.sampling.max_new_tokens", "4"]
    assert main(["predict", *words, *drawn, "--data.predict.world.options.size", "2", "--out", "p.jsonl"]) == 0
    assert (tmp_path / "run/csv/metrics.csv").read_bytes() == curves
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] * 2 and len({line["id"] for line in lines}) == 2
    assert len({line["output"] for line in lines}) > 2
