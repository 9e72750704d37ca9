"""Adapter-only training: one setting of every algorithm, checkpoints of the projector alone."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForImageTextToText

from lightning_vlm import algorithms
from lightning_vlm.cli.main import main
from lightning_vlm.models.embedded import build_model
from lightning_vlm.models.parts import PartPolicy, projector_alone
from lightning_vlm.models.tiny import make_tiny

from .conftest import run_scenarios
from .runs.commands import enter, workplace

GRPO = {"group_size": 2, "rollout": {"temperature": 1.0, "max_new_tokens": 6, "stop": ["e"]}}
GRPO |= {"rewards": {"length": {"kind": "length", "target": 4}}}
CASES = {
    "SFT": {},
    "SFTC": {},
    "DPO": {},
    "GRPO": GRPO,
    "OPD": {k: v for k, v in GRPO.items() if k != "rewards"} | {"teacher": "embedded:qwen2_5_vl-small"},
}


def test_every_algorithm_is_tried():
    others = {"Algorithm", "VisualWarmup"}  # the template; and what trains the tower by its nature
    assert set(CASES) == set(algorithms.__all__) - others


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter_only")
    base = {"dtype": "float32", "world": {"size": 8, "pairs": True}, "steps": 2, "batch_size": 4}
    specs = [
        base
        | {"name": f"{name} {size}", "algorithm": name, "model": f"embedded:{size}-tiny"}
        | {"run_dir": str(folder / name / size), "settings": {"lr": 1e-2, "adapter_only": True} | settings}
        for name, settings in CASES.items()
        for size in ("qwen2_5_vl", "llava")
    ]
    done = run_scenarios(specs, folder / "runs")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "runs" / "records.pt")


@pytest.mark.parametrize("size", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("algorithm", CASES)
def test_the_projector_moves_and_nothing_else(trained, algorithm, size):
    before = dict(build_model(f"{size}-tiny").named_parameters())
    after = trained[f"{algorithm} {size}"]["weights"]
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    projector = "model.visual.merger" if size == "qwen2_5_vl" else "model.multi_modal_projector"
    assert moved == {name for name in before if name.startswith(projector)}


@pytest.mark.parametrize(
    "parts, said",
    [
        ({"language": PartPolicy(lr=1e-4)}, r"parts\.language\.lr is 0\.0001"),
        ({"vision": PartPolicy(lora_rank=4)}, r"parts\.vision\.lora_rank is 4"),
        ({"projector": PartPolicy(freeze=True)}, r"parts\.projector\.freeze is True"),
    ],
)
def test_settings_that_contradict_it(parts, said):
    with pytest.raises(ValueError, match=rf"model\.adapter_only trains the projector and nothing else, but {said}"):
        projector_alone(parts)


def test_settings_that_go_with_it():
    parts = {"projector": PartPolicy(lr=1e-3), "language": PartPolicy(checkpoint=True)}
    assert projector_alone(parts) == {
        "vision": PartPolicy(freeze=True),
        "projector": PartPolicy(lr=1e-3),
        "language": PartPolicy(freeze=True, checkpoint=True),
        "head": PartPolicy(freeze=True),
    }


# --- by command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model directory, and a configuration that trains its projector."""
    workplace(tmp_path)
    enter(tmp_path, monkeypatch)
    make_tiny("llava_clip_qwen2", tmp_path / "start")
    config = yaml.safe_load((tmp_path / "base.yaml").read_text())
    config["backbone"] = {"path": str(tmp_path / "start")}
    config["model"]["init_args"] |= {"adapter_only": True, "lr": 1e-2}
    config["trainer"]["max_steps"] = 4
    config["callbacks"] = {"Checkpoint": {"every": 2}}
    (tmp_path / "adapter.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def weights(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_checkpoints_hold_the_projector_and_become_model_directories(place, capfd):
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "run"]) == 0
    (file,) = (place / "run" / "checkpoints").glob("*.ckpt")
    content = torch.load(file, weights_only=True)
    layers = [f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    assert sorted(content["state_dict"]) == sorted(f"policy.model.model.multi_modal_projector.{x}" for x in layers)
    assert file.stat().st_size < sum(f.stat().st_size for f in (place / "start").glob("*.safetensors"))

    assert main(["export", str(file), "--out", "exported"]) == 0
    start, model, exported = weights(place / "start"), weights(place / "run" / "model"), weights(place / "exported")
    for name, tensor in start.items():
        assert torch.equal(model[name], exported[name])
        assert torch.equal(model[name], tensor) == ("projector" not in name)


def test_a_sharded_runs_checkpoint_holds_the_projector_and_becomes_a_model_directory(tmp_path, capfd):
    spec = {
        "name": "sharded",
        "model": "embedded:qwen2_5_vl-tiny",
        "world": {"size": 8},
        "strategy": "fsdp2",
        "steps": 2,
    }
    spec |= {"dtype": "float32", "batch_size": 4, "checkpoint": True, "run_dir": str(tmp_path / "run")}
    spec["settings"] = {"lr": 1e-2, "adapter_only": True}
    done = run_scenarios([spec], tmp_path / "runs", processes=2)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    names = {
        name for name in FileSystemReader(folder).read_metadata().state_dict_metadata if "state_dict.policy" in name
    }
    assert names and all("visual.merger" in name for name in names)
    assert main(["export", str(folder), "--out", str(tmp_path / "model")]) == 0
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for name, weight in torch.load(tmp_path / "runs" / "records.pt")["sharded"]["weights"].items():
        assert torch.equal(weight, exported.get_parameter(name))


def test_stopped_and_resumed_is_the_whole_run(place, capfd):
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "whole"]) == 0
    config = yaml.safe_load((place / "adapter.yaml").read_text())
    config["model"]["init_args"]["schedule"] = "constant"
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "cut", "--trainer.max_steps", "2"]) == 0
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "cut", "--resume"]) == 0
    whole, cut = weights(place / "whole" / "model"), weights(place / "cut" / "model")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_an_adapter_directory_in_place_of_the_model(place, capfd):
    saving = ["--callbacks.SaveModel.form", "adapter"]
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "run", *saving]) == 0
    assert not (place / "run" / "model").exists()
    facts = json.loads((place / "run" / "adapter" / "provenance.json").read_text())
    assert facts["step"] == 4 and facts["parent"]["path"] == str(place / "start")
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "whole"]) == 0
    file = load_file(place / "run" / "adapter" / "adapter.safetensors")
    model = {
        "model." + name.removeprefix("model."): tensor for name, tensor in weights(place / "whole" / "model").items()
    }
    assert file and all(torch.equal(tensor, model[name]) for name, tensor in file.items())
    again = ["--backbone.adapter", "run/adapter", "--trainer.max_steps", "1"]
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "next", *again]) == 0


def test_other_forms_and_models_are_refused(place, refused, capfd):
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "run"]) == 0
    (file,) = (place / "run" / "checkpoints").glob("*.ckpt")
    refused.run_dir = place / "run"
    config = ("adapter.yaml",)
    line = refused(
        "--ckpt", str(file), "--model.adapter_only", "false", command="validate", config=(*config, "held_out.yaml")
    )
    assert (
        "the checkpoint holds the projector alone, this run keeps all weights: set model.adapter_only to true" in line
    )

    content = torch.load(file, weights_only=True)
    del content["state_dict"]["policy.model.model.multi_modal_projector.linear_2.bias"]
    torch.save(content, place / "shallow.ckpt")
    line = refused("--ckpt", "shallow.ckpt", command="validate", config=(*config, "held_out.yaml"))
    assert "the checkpoint's projector has another depth" in line and "linear_2.bias' (the checkpoint lacks it)" in line

    make_tiny("llava_clip_qwen2", place / "other", seed=1)
    other = ["--ckpt", str(file), "--backbone.path", "other"]
    line = refused(*other, command="validate", config=(*config, "held_out.yaml"))
    assert "the checkpoint was trained beside other weights than those of backbone.path" in line


@pytest.mark.parametrize("change, said", [("more", "the model has no"), ("less", "it lacks")])
def test_an_adapter_of_another_depth(place, refused, change, said, capfd):
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "run", "--callbacks.SaveModel.form", "adapter"]) == 0
    file = place / "run" / "adapter" / "adapter.safetensors"
    tensors = load_file(file)
    name = "model.multi_modal_projector.linear_2.weight"
    if change == "more":
        tensors[name.replace("2", "3")] = tensors[name].clone()
    else:
        del tensors[name]
    save_file(tensors, file)
    refused.run_dir = place / "next"
    line = refused("--backbone.adapter", "run/adapter", config=("adapter.yaml",))
    assert "holds a projector of another depth or architecture than the model's" in line and said in line


def test_saving_an_adapter_of_what_trains_whole_is_refused_before_training(place, refused):
    line = refused("--callbacks.SaveModel.form", "adapter", "--model.adapter_only", "false", config=("adapter.yaml",))
    assert "part vision is trained in full, so there is no adapter to export" in line


def test_text_without_pictures_teaches_a_projector_nothing(place, capfd):
    """A micro-batch of it has no gradient, and a step of it moves nothing."""
    rows = [
        {"id": f"t{n}", "messages": [{"role": r, "content": "red"} for r in ("user", "assistant")]} for n in range(3)
    ]
    (place / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "run", "--trainer.max_steps", "2"]) == 0
    start, model = weights(place / "start"), weights(place / "run" / "model")
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.items())


# --- in a few bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_frozen_language_model_in_a_few_bits(place, bits, capfd):
    pytest.importorskip("bitsandbytes", reason="the quantize extra is not installed")
    quantized = ["--backbone.quantize", bits, "--callbacks.SaveModel.form", "adapter"]
    assert main(["fit", "-c", "adapter.yaml", "--run_dir", "run", *quantized]) == 0
    moved = load_file(place / "run" / "adapter" / "adapter.safetensors")
    start = {"model." + name.removeprefix("model."): tensor for name, tensor in weights(place / "start").items()}
    assert len(moved) == 4 and not any(torch.equal(tensor, start[name]) for name, tensor in moved.items())


def test_what_cannot_be_quantized(place, refused):
    pytest.importorskip("bitsandbytes", reason="the quantize extra is not installed")
    line = refused("--backbone.quantize", "4bit", config=("adapter.yaml",))
    assert "SaveModel: weights of backbone.quantize 4bit are not those of the model directory" in line
    whole = ["--backbone.quantize", "4bit", "--model.adapter_only", "false", "--callbacks.SaveModel", "null"]
    line = refused(*whole, config=("adapter.yaml",))
    assert "backbone.quantize 4bit needs a frozen language model" in line
    line = refused("--backbone.quantize", "3bit", config=("adapter.yaml",))
    assert "3bit" in line
    line = refused(
        "--backbone.path",
        "embedded:llava-tiny",
        "--backbone.quantize",
        "4bit",
        "--callbacks.SaveModel.form",
        "adapter",
        config=("adapter.yaml",),
    )
    assert "backbone.quantize has no effect on embedded:llava-tiny" in line
