"""What bad input gets: through the command line, one line that says what, where and how to mend; no traceback."""

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks.checkpoint import last_checkpoint
from lightning_vlm.cli.main import main
from lightning_vlm.export import read_checkpoint
from lightning_vlm.models.tiny import make_tiny

from .conftest import run_scenarios
from .runs.commands import BASE, HELD_OUT, enter, workplace, write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A working directory with good data, bad data and a model, made once."""
    folder = tmp_path_factory.mktemp("bad_input")
    workplace(folder)
    write(folder / "none.jsonl")
    write(folder / "pairs.jsonl", {"id": 1, "prompt": "what ?", "chosen": "a"})
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "bare").mkdir()
    make_tiny("qwen2_5_vl", folder / "model")
    return folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    enter(files, monkeypatch)


# --- settings --------------------------------------------------------------------------------------------------------

LORA = ["--model.parts.language.lora_rank", "2"]
FROZEN = ["--model.parts.vision.freeze", "true", "--model.parts.projector.freeze", "true"]
SETTINGS = {
    "model path": (["--backbone.path", "./nope"], ["backbone.path './nope' does not exist", "embedded:NAME"]),
    "model path without config": (["--backbone.path", "./bare"], ["bare' is no model directory", "config.json"]),
    "model path a file": (["--backbone.path", "red.png"], ["'red.png' is a file", "model directory"]),
    "model on no hub": (["--backbone.path", "no/such"], ["backbone.path 'no/such'", "not to be had from the hub"]),
    "embedded model": (["--backbone.path", "embedded:gpt"], ["backbone.path", "'gpt'", "llava-tiny"]),
    "chat template": (["--backbone.chat_template", "no.jinja"], ["backbone.chat_template 'no.jinja': no such file"]),
    "attention": (["--backbone.attention", "flash_attention_2"], ["flash-attn is not installed", "'sdpa'"]),
    "data path": (
        ["--data.train.toy.path", "god.jsonl"],
        ["data.train.toy", "'god.jsonl'", "did you mean 'good.jsonl'"],
    ),
    "data kind": (["--data.train.toy.kind", "mesages"], ["data.train.toy", "did you mean 'messages'"]),
    "column": (
        ["--data.train.toy.path", "pairs.jsonl"],
        ["data.train.toy: pairs.jsonl", "'messages'", "it has: id, prompt"],
    ),
    "rejected": (
        ["--data.train.toy.path", "pairs.jsonl", "--data.train.toy.kind", "preference"],
        [
            "pairs.jsonl has no column 'rejected'",
            "lightning-vlm predict -c FILE --out",
            "columns: {rejected: THEIR_NAME}",
        ],
    ),
    "empty data": (
        ["--data.train.toy.path", "none.jsonl"],
        ["data.train.toy: none.jsonl is empty", "leave the source out"],
    ),
    "no data": (["--data.train", "null"], ["nothing to train on: give data.train"]),
    "MathVista": (
        ["--data.train.toy.kind", "mathvista", "--data.train.toy.path", "AI4Math/MathVista"],
        ["data.train.toy: MathVista", "CC BY-SA 4.0", "training on it is prohibited"],
    ),
    "MathVista by its path": (
        ["--data.train.toy.kind", "qa", "--data.train.toy.path", "copies/MathVista/test.json"],
        ["CC BY-SA 4.0", "training on it is prohibited"],
    ),
    "unknown part": (
        ["--model.parts.visoin.freeze", "true"],
        ["unknown part 'visoin' in parts", "did you mean 'vision'"],
    ),
    "rate of a frozen part": (
        ["--model.parts.vision.freeze", "true", "--model.parts.vision.lr", "1e-3"],
        ["parts.vision.lr is 0.001 but parts.vision.freeze is true", "drop one"],
    ),
    "all frozen": ([*FROZEN, "--model.parts.language.freeze", "true"], ["every part is frozen", "parts.<part>.freeze"]),
    "negative rate": (["--model.lr", "-1"], ["model.lr must be positive"]),
    "no rate": (["--model.lr", "fast"], ["model.init_args.lr: expected float, got 'fast'", "command line"]),
    "bool": (["--model.parts.vision.freeze", "maybe"], ["parts.vision.freeze: expected bool, got 'maybe'"]),
    "tuple": (["--model.betas", "[0.9]"], ["model.init_args.betas: expected a list of 2 values, got [0.9]"]),
    "choice": (["--model.optimizer", "adam"], ["model.init_args.optimizer", "'adamw', 'muon'", "'adam'"]),
    "batch size": (["--data.batch_size", "0"], ["error: data.batch_size must be at least 1, got 0"]),
    "workers": (["--data.workers", "-1"], ["error: data.workers must be at least 0, got -1"]),
    "unknown key": (["--trianer.max_steps", "3"], ["unknown option --trianer.max_steps", "did you mean 'trainer'"]),
    "unknown argument": (["--data.train.toy.pth", "x"], ["data.init_args.train.toy.pth", "did you mean 'path'"]),
    "unknown callback": (
        ["--callbacks.EntropyMoniter.every", "2"],
        ["EntropyMoniter", "did you mean 'EntropyMonitor'"],
    ),
    "argument of a callback": (
        ["--callbacks.EntropyMonitor.evry", "2"],
        ["EntropyMonitor.evry", "did you mean 'every'"],
    ),
    "algorithm": (["--model", "STF"], ["model.class_path", "did you mean 'SFT'"]),
    "accumulation": (
        ["--trainer.accumulate_grad_batches", "2"],
        ["a batch is one optimizer step", "micro_batch_tokens"],
    ),
    "clipping": (["--trainer.gradient_clip_val", "1"], ["trainer.gradient_clip_val", "model.init_args.clip_norm"]),
    "validation interval": (["--trainer.val_check_interval", "5"], ["trainer.val_check_interval", "set `every`"]),
    "part of a benchmark": (["--trainer.limit_val_batches", "2"], ["trainer.limit_val_batches", "set `limit`"]),
    "trainer callbacks": (["--trainer.callbacks", "[]"], ["trainer.callbacks", "top-level `callbacks:`"]),
    "root folder": (["--trainer.default_root_dir", "x"], ["trainer.default_root_dir", "`run_dir`"]),
    "no end": (["--trainer.max_steps", "-1"], ["no end to the training", "trainer.max_steps", "trainer.max_epochs"]),
    "no end, nothing said": (
        ["--trainer.max_steps-", "null", "--trainer.max_epochs-", "null"],
        ["no end to the training"],
    ),
    "no step": (["--trainer.max_steps", "0"], ["trainer.max_steps"]),
    "checkpoint by nothing": (
        ["--callbacks.Checkpoint.monitor", "val/world/accuracy"],
        ["Checkpoint: nothing will log monitor 'val/world/accuracy'", "none is configured"],
    ),
    "stop by nothing": (
        ["--callbacks.TaskEarlyStopping.monitor", "val/world/accuracy"],
        ["TaskEarlyStopping: nothing will log monitor 'val/world/accuracy'", "none is configured"],
    ),
    "resume from nothing": (["--resume", "gone.ckpt"], ["no checkpoint 'gone.ckpt'", "run_dir/checkpoints"]),
    "run_dir a file": (["--run_dir", "red.png"], ["run_dir: 'red.png' is a file"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(refused, name):
    argv, parts = SETTINGS[name]
    line = refused(*argv)
    assert all(part in line for part in parts), line


def test_arguments_that_a_changed_class_would_drop(refused):
    Path("other.yaml").write_text("model: {class_path: tests.test_cli.OtherLine}\n")
    line = refused(config=(BASE, "other.yaml"))
    assert (
        "schedule: set for SFT in base.yaml:4, but OtherLine takes no such argument" in line and "`schedule-:`" in line
    )


def test_two_evaluations_of_one_name(refused):
    world = "{source: {kind: world, split: val, options: {size: 2}}}"
    Path("two.yaml").write_text(f"callbacks: {{Benchmarks: {{benchmarks: {{toy: {world}}}}}}}\n")
    assert "two evaluations are named 'toy'" in refused(config=(BASE, HELD_OUT, "two.yaml"))


@pytest.mark.parametrize("name", ["Checkpoint", "TaskEarlyStopping"])
def test_a_monitor_that_its_benchmark_does_not_log(refused, name):
    line = refused(f"--callbacks.{name}.monitor", "val/toy/nl", config=(BASE, HELD_OUT))
    assert f"{name}: nothing will log monitor 'val/toy/nl'" in line and "did you mean 'val/toy/nll'" in line


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_of_nothing(refused, command):
    assert "nothing to evaluate: name benchmarks under `callbacks`" in refused(command=command)


def test_prediction_on_nothing(refused):
    assert "nothing to predict on: give data.predict" in refused(command="predict")


def test_a_failed_start_leaves_the_folder_free(refused, tmp_path):
    """A run that never made a step is none: the same command, mended, runs in the same folder."""
    run = ["--run_dir", str(tmp_path / "run")]
    assert "god.jsonl" in refused("--data.train.toy.path", "god.jsonl")
    assert main(["fit", "-c", BASE, *run, "--trainer.max_steps", "1"]) == 0
    assert "holds a run already: add --resume" in refused()


# --- files of models, checkpoints, adapters --------------------------------------------------------------------------


def model_with(change) -> str:
    shutil.rmtree("changed", ignore_errors=True)
    shutil.copytree("model", "changed")
    change(Path("changed"))
    return "changed"


def more_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{n}>" for n in range(500)])
    tokenizer.save_pretrained(folder)


def other_placeholder(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def nan_weights(folder):
    weights = load_file(folder / "model.safetensors")
    next(tensor for name, tensor in weights.items() if "norm" in name)[:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (more_tokens, ["the tokenizer has 908 ids, the model changed embeds 408", "put the tokenizer"]),
        (other_placeholder, ["image placeholder is id 406, that of the model changed 5", "put the processor"]),
        (cut_weights, ["backbone.path 'changed' has no weights that can be loaded"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["changed has no tokenizer", "copy the model's own"]),
    ],
)
def test_models(refused, change, parts):
    line = refused("--backbone.path", model_with(change))
    assert all(part in line for part in parts), line


def test_checkpoints(refused, tmp_path):
    Path("junk.ckpt").write_bytes(b"junk")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    run = ["--run_dir", str(tmp_path / "whole")]
    assert main(["fit", "-c", BASE, *run, *LORA]) == 0
    whole = str(last_checkpoint(tmp_path / "whole"))
    Path("cut.ckpt").write_bytes(Path(whole).read_bytes()[:-2000])
    expected = {"gone": "no checkpoint 'gone.ckpt'; a run keeps its own in run_dir/checkpoints"}
    expected |= {
        "junk": "'junk.ckpt' is not a checkpoint, or was cut off",
        "cut": "is not a checkpoint, or was cut off",
    }
    expected |= {"foreign": "was not written by this package"}
    for name, message in expected.items():
        assert message in refused("--ckpt", f"{name}.ckpt", command="validate", config=(BASE, HELD_OUT))
        assert message in refused("--resume", f"{name}.ckpt")
        assert message in refused(f"{name}.ckpt", "--out", "out", command="export")
    assert "--backbone.path model" in refused("--ckpt", "model", command="predict")
    line = refused("--resume", whole)  # trained with LoRA
    assert "does not fit the configured backbone and parts" in line and "more)" in line
    line = refused("--resume", whole, *LORA, "--backbone.path", "embedded:qwen2_5_vl-student")
    assert "does not fit the configured backbone and parts" in line


def test_adapters(refused, tmp_path):
    """Only LoRA and projector make an adapter; it starts a run of the same settings, and no other."""
    lora, projector, full = (tmp_path / name for name in ("lora", "projector", "full"))
    assert main(["fit", "-c", BASE, "--run_dir", str(lora), *FROZEN, *LORA]) == 0
    parts = [*FROZEN[:2], "--model.parts.language.freeze", "true"]
    assert main(["fit", "-c", BASE, "--run_dir", str(projector), *parts]) == 0
    assert main(["fit", "-c", BASE, "--run_dir", str(full), *LORA]) == 0
    line = refused(str(last_checkpoint(full)), "--adapter", "--out", str(full / "out"), command="export")
    assert "part vision is trained in full" in line and "without --adapter" in line
    assert sorted(p.name for p in full.iterdir() if "out" in p.name) == []
    for run in (lora, projector):
        argv = ["export", str(last_checkpoint(run)), "--adapter", "--out", str(run / "adapter")]
        assert main(argv) == 0
        assert "is there already" in refused(*argv[1:], command="export")
    start = ["--backbone.adapter", str(lora / "adapter")]
    for argv, message in [
        ([], "was trained with parts.language.lora_rank 2, but here it is 0: set it to the same"),
        ([*FROZEN, *LORA[:1], "4"], "was trained with parts.language.lora_rank 2, but here it is 4"),
        ([*FROZEN, *LORA, "--model.parts.language.lora_alpha", "3"], "lora_alpha 4, but here it is 3"),
        ([*LORA, "--backbone.path", "embedded:llava-tiny"], "is for a qwen2_5_vl model, backbone.path is a llava"),
        ([*LORA, "--backbone.path", "embedded:qwen2_5_vl-student"], "or for a model of another width"),
    ]:
        line = refused(*start, *argv)
        assert "backbone.adapter" in line and message in line, line
    wide = ["--backbone.path", "embedded:qwen2_5_vl-student", "--backbone.adapter", str(projector / "adapter")]
    assert "is [32], the model's is [64]" in refused(*wide)
    assert "no such file; `lightning-vlm export CKPT --adapter` writes one" in refused("--backbone.adapter", "gone")
    assert "is no safetensors file" in refused("--backbone.adapter", "red.png")


def test_chat(refused):
    ask = ["--prompt", "what ?"]
    assert "backbone.path './nope' does not exist" in refused("./nope", *ask, command="chat")
    assert "no image 'nope.png'" in refused("embedded:llava-tiny", "--image", "nope.png", *ask, command="chat")
    line = refused("embedded:llava-tiny", "--image", "broken.png", *ask, command="chat")
    assert "image 'broken.png' cannot be decoded" in line
    assert "arguments are required: model; see lightning-vlm chat --help" in refused(command="chat")


# --- numbers and disks -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_leaves_the_ids(refused, tmp_path):
    line = refused("--model.lr", "1e30", "--trainer.max_steps", "4")
    file = tmp_path / "run" / "nonfinite_step1_rank0.json"
    assert "loss is nan at optimizer step 1" in line and str(file) in line and "Lower model.lr" in line
    assert json.loads(file.read_text()) == {
        "step": 1,
        "values": {"loss": "nan", "entropy": "nan"},
        "ids": ["toy/good0", "toy/good1", "toy/good2"],
    }
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_not_finite(refused, tmp_path):
    line = refused("--backbone.path", model_with(nan_weights))
    assert "loss is nan at optimizer step 0" in line and "nonfinite_step0_rank0.json" in line


def test_a_full_disk_by_name(refused, tmp_path, monkeypatch):
    """The second checkpoint finds no space: the first survives, loads, and the run goes on from it."""
    from lightning.fabric.plugins.io import torch_io

    real, written = torch_io._atomic_save, []

    def save(content, path):
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(content, path)

    monkeypatch.setattr(torch_io, "_atomic_save", save)
    line = refused("--callbacks.Checkpoint.every", "1")
    first = tmp_path / "run" / "checkpoints" / "step-00000001.ckpt"
    assert "could not write checkpoint" in line and "No space left on device" in line
    assert f"the previous checkpoint {first} is whole" in line and "--resume" in line
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    assert read_checkpoint(first)["lightning_vlm"]["step"] == 1
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume"]) == 0
    assert last_checkpoint(tmp_path / "run").name == "step-00000002.ckpt"


@pytest.fixture
def disk():
    """Makes small disks; skips where mounting is not allowed."""
    mounted = []

    def make(folder, size):
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("needs to mount a small disk")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(refused, disk, tmp_path):
    """The same on real small disks: one and a half checkpoints, one and no model directory, nothing at all."""
    assert main(["fit", "-c", BASE, "--run_dir", str(tmp_path / "run")]) == 0
    checkpoint = last_checkpoint(tmp_path / "run")
    size = checkpoint.stat().st_size
    small = disk(tmp_path / "small", int(size * 1.5))
    line = refused("--callbacks.Checkpoint.every", "1", "--run_dir", str(small / "run"))
    assert "No space left on device" in line and "step-00000001.ckpt is whole" in line
    assert read_checkpoint(last_checkpoint(small / "run"))["lightning_vlm"]["step"] == 1
    smaller = disk(tmp_path / "smaller", int(size * 1.1))
    line = refused("--callbacks.SaveModel.source", "last", "--run_dir", str(smaller / "run"))
    assert f"could not write {smaller}/run/model" in line and "No space left" in line
    assert "`lightning-vlm export` makes it from a checkpoint" in line
    assert read_checkpoint(last_checkpoint(smaller / "run"))["lightning_vlm"]["step"] == 2
    line = refused(str(checkpoint), "--out", str(smaller / "out"), command="export")
    assert f"could not write {smaller}/out" in line and sorted(p.name for p in smaller.iterdir()) == ["run"]
    tiny = disk(tmp_path / "tiny", "4k")
    line = refused("--run_dir", str(tiny / "run"))
    assert f"the disk of {tiny}/run is full: free some space" in line


def test_a_disk_that_is_full_under_sharding(disk, tmp_path):
    """Two ranks, each with a part of every checkpoint; the disk holds one and a half."""
    small = disk(tmp_path / "small", 2_600_000)
    spec = {"name": "run", "model": "embedded:qwen2_5_vl-tiny", "world": {"size": 13}, "dtype": "float32"}
    spec |= {"strategy": "fsdp2", "steps": 2, "batch_size": 4, "checkpoint": True, "run_dir": str(small / "run")}
    done = run_scenarios([spec], tmp_path / "scenario", processes=2)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert "OSError: could not write checkpoint" in done.stderr and "step-00000001.ckpt is whole" in done.stderr
    assert [p.name for p in (small / "run" / "checkpoints").iterdir()] == ["step-00000001.ckpt"]
    kept = shutil.copytree(small / "run" / "checkpoints" / "step-00000001.ckpt", tmp_path / "kept")
    assert read_checkpoint(kept)["lightning_vlm"]["step"] == 1
