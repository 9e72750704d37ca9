"""`lightning-vlm probe`: numbers of the file are the library's, a table and a picture, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_vlm.cli import main as cli
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import make_tiny
from lightning_vlm.probes.encoder import (
    alignment,
    gradient_maps,
    linear_probe,
    load_encoder,
    world_classes,
    world_questions,
)
from tests.runs.commands import workplace

TINY, OTHER = "embedded:llava-tiny", "embedded:qwen2_5_vl-tiny"


@pytest.fixture
def place(tmp_path, monkeypatch):
    workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(cli.COMMANDS, "probe", ("lightning_vlm.cli.probe", ""))
    return tmp_path


def run(kind: str, *words: str) -> dict:
    """The JSON of a command that must succeed, whose picture is a picture."""
    assert cli.main(["probe", words[0], "--probe", kind, *words[1:]]) == 0
    picture = np.asarray(Image.open(f"probe-{kind}.png").convert("RGB"))
    assert min(picture.shape[:2]) > 100 and picture.std() > 5
    return json.loads(Path(f"probe-{kind}.json").read_text())


def test_linear(place, capsys):
    found = run("linear", TINY, "--limit", "96", "--seed", "2", "--task", "shape", "--noise", "0")
    wanted = linear_probe(load_encoder(TINY), world_classes("shape", train=96, test=96, noise=0, seed=2), seed=2)
    for name in ("accuracy", "C", "low", "high", "predicted", "seed"):
        assert found[name] == getattr(wanted, name)
    out = capsys.readouterr().out
    assert f"{100 * wanted.accuracy:.1f} %" in out and "seed 2" in out and "probe-linear.png" in out
    assert found["arguments"]["limit"] == 96 and found["arguments"]["model"] == TINY


def test_segmentation(place, capsys):
    found = run("segmentation", TINY, "--limit", "40", "--seeds", "2", "--layer", "1", "--data", "world:ood_pairs")
    assert found["seeds"] == [0, 1] and len(found["per_seed"]) == 2 and found["train"] == 40 and found["test"] == 20
    assert found["recall"] == pytest.approx(np.mean(found["per_seed"])) and found["data"] == "world:ood_pairs"
    assert "intersection over union" in capsys.readouterr().out


def test_gradients_before_and_after(place, capsys):
    found = run("gradients", TINY, "--before", OTHER, "--limit", "20", "--rows", "3")
    maps = {
        name: gradient_maps(load_encoder(path), world_questions(size=20))
        for name, path in (("before", OTHER), ("after", TINY))
    }
    for name, own in maps.items():
        assert found[name]["energy"] == pytest.approx(list(own.summary()["energy"]), rel=1e-4)
        told = [np.nan if s[name] is None else s[name] for s in found["per_sample"]]
        np.testing.assert_allclose(told, own.energy, rtol=1e-4)
    assert found["change"]["diff"] == pytest.approx(
        found["after"]["energy"][0] - found["before"]["energy"][0], abs=1e-6
    )
    assert "share inside, after - before" in capsys.readouterr().out


def test_gradients_of_pictures_whose_objects_nobody_knows(place, capsys):
    found = run("gradients", TINY, "--data", "good.jsonl")
    assert found["model"]["energy"] is None
    assert "not known: the data have no masks of objects" in capsys.readouterr().out


def test_alignment(place, capsys):
    found = run("alignment", TINY, "--limit", "30", "--k", "4", "--language", OTHER)
    own = run("alignment", TINY, "--limit", "30", "--k", "4")
    wanted = alignment(load_encoder(TINY), world_questions(families=("caption",), size=30), k=4)
    assert own["score"] == wanted.score and own["chance"] == pytest.approx(4 / 29)
    assert found["language"] == OTHER
    assert "chance, k/(n - 1)" in capsys.readouterr().out


def test_updates(place, capsys):
    make_tiny("qwen2_5_vl", "a")
    make_tiny("qwen2_5_vl", "b", seed=1)
    found = run("updates", "b", "--before", "a")
    whole = {u["part"]: u for u in found["updates"] if u["block"] is None}
    assert set(whole) == {"vision", "projector", "language", "head"}
    assert all(0.5 < u["relative"] < 1.6 for u in whole.values())  # independent draws: about the square root of 2
    out = capsys.readouterr().out
    assert "vision block 1" in out and "language block 0" in out


def test_a_tower_alone(place, capsys):
    source = make_tiny("llava_siglip_llama", "vlm")
    model = load_model(Backbone(path=str(source)))
    model.get_submodule(family_of(model).vision[0]).save_pretrained("tower")
    shutil.copy(source / "preprocessor_config.json", "tower")
    assert run("linear", "tower", "--limit", "48")["test"] == 48
    assert run("alignment", "tower", "--limit", "12", "--k", "2", "--language", "vlm")["n"] == 12
    for kind, said in (
        ("gradients", "tower is a vision encoder alone: a gradient of the answer's loss needs the model around it"),
        ("alignment", "tower is a vision encoder alone: alignment with its own language model needs the model"),
    ):
        capsys.readouterr()
        assert cli.main(["probe", "tower", "--probe", kind, "--limit", "12"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("./gone --probe linear", "'./gone' does not exist"),
        (f"{TINY} --probe liner", "invalid choice: 'liner'"),
        (f"{TINY}", "the following arguments are required: --probe"),
        (f"{TINY} --probe linear --data nowhere", "data folder 'nowhere' does not exist"),
        (f"{TINY} --probe linear --data one", "has 1 classes with pictures to fit on"),
        (f"{TINY} --probe linear --data one --task shape", "--task is for pictures of the embedded world"),
        (f"{TINY} --probe segmentation --data one", "has no masks as this probe reads them"),
        (f"{TINY} --probe segmentation --data world:moon", "the world has no split 'moon'"),
        (f"{TINY} --probe segmentation --data world:val", "split is 'val': the probe is fitted on it"),
        (f"{TINY} --probe gradients --data god.jsonl", "'god.jsonl' does not exist; did you mean"),
        (f"{TINY} --probe updates", "--probe updates needs --before DIR"),
        (f"{TINY} --probe updates --before {OTHER}", "is no directory here"),
        (
            f"{TINY} --probe linear --before {OTHER}",
            "--before has no effect on --probe linear: leave it out (it is for",
        ),
        (f"{TINY} --probe linear --k 3", "--k has no effect on --probe linear"),
        (f"{TINY} --probe alignment --limit 10", "k is 10 with 10 samples"),
        (f"{TINY} --probe linear --limit 0", "--limit must be at least 1, got 0"),
        (f"{TINY} --probe linear --layer 9", "layer is 9: the tower of embedded:llava-tiny has 2 blocks"),
        (f"{TINY} --probe linear --image x.gif", "must end in .png, .pdf or .svg"),
        (f"{TINY} --probe linear --out .", "--out . is a directory"),
        (f"{TINY} --probe linear --noise -3", "noise is -3: it must be at least 0"),
        (f"{TINY} --probe segmentation --cover 2", "cover is 2.0: it must be above 0 and at most 1"),
    ],
)
def test_what_the_command_refuses(place, capsys, words, said):
    for name in ("0", "1"):
        Path("one/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(f"one/a/{name}.png")
    assert cli.main(["probe", *words.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and "(from " not in line
    assert not list(Path().glob("probe-*"))
