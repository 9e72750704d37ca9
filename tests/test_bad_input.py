"""What bad input gets: through the command line, one line that says what, where and how to mend; no traceback."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from callbacks.checkpoint import last_checkpoint
from lightning_vlm.cli.main import main
from lightning_vlm.export import read_checkpoint
from lightning_vlm.models.tiny import make_tiny

from .conftest import run_scenarios

BASE = """\
backbone: {path: "embedded:qwen2_5_vl-tiny"}
model:
  class_path: SFT
  init_args: {lr: 1.0e-3, schedule: constant}
data:
  class_path: VLMData
  init_args:
    train:
      toy: {kind: messages, path: good.jsonl}
    batch_size: 3
    workers: 0
    max_length: 256
trainer: {max_steps: 2, max_epochs: -1, accelerator: cpu, log_every_n_steps: 1}
callbacks: {SaveModel: null}
logger: {CSV: {}}
"""
HELD_OUT = "callbacks: {HeldOutLoss: {source: {kind: messages, path: good.jsonl}, name: toy, every: 1}}\n"


def row(id, question="<image>what is there ?", answer="red", image="red.png", **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "messages": turns, **more}


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A working directory with good data, bad data and models, made once."""
    folder = tmp_path_factory.mktemp("bad_input")
    here = Path.cwd()
    os.chdir(folder)
    try:
        Image.new("RGB", (64, 64), "red").save("red.png")
        Path("broken.png").write_bytes(b"\x89PNG no")
        Path("base.yaml").write_text(BASE)
        Path("held_out.yaml").write_text(HELD_OUT)
        write("good.jsonl", *(row(f"good{n}") for n in range(3)))
        write("none.jsonl")
        write("pairs.jsonl", {"id": 1, "prompt": "what ?", "chosen": "a"})
        for name, bad in BAD_ROWS.items():
            write(f"{name}.jsonl", row("good0"), row("good1"), bad[0])
        Path("bare").mkdir()
        make_tiny("qwen2_5_vl", "model")
        yield folder
    finally:
        os.chdir(here)


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LVLM_TRACEBACK", raising=False)


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs a command that must fail; its one line."""

    def run(*argv, command="fit", config=("base.yaml",)):
        given = [word for file in config for word in ("-c", file)]
        stage = command in ("fit", "validate", "test", "predict")
        return error_of(
            capfd, [command, *given, "--run_dir", str(tmp_path / "run"), *argv] if stage else [command, *argv]
        )

    return run


def error_of(capfd, argv) -> str:
    """The last line on stderr, the only one that is an error."""
    capfd.readouterr()
    assert main(argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in "".join(lines) and len(lines[-1]) < 700
    return lines[-1]


# --- settings --------------------------------------------------------------------------------------------------------

LORA = ["--model.parts.language.lora_rank", "2"]
FROZEN = ["--model.parts.vision.freeze", "true", "--model.parts.projector.freeze", "true"]
SETTINGS = {
    "model path": (["--backbone.path", "./nope"], ["backbone.path './nope' does not exist", "embedded:NAME"]),
    "model path without config": (["--backbone.path", "./bare"], ["'./bare' is no model directory", "config.json"]),
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
        ["--trainer.max_steps", "null", "--trainer.max_epochs", "null"],
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
    line = refused(config=("base.yaml", "other.yaml"))
    assert (
        "schedule: set for SFT in base.yaml:4, but OtherLine takes no such argument" in line and "`schedule-:`" in line
    )


def test_two_evaluations_of_one_name(refused):
    world = "{source: {kind: world, split: val, options: {size: 2}}}"
    Path("two.yaml").write_text(f"callbacks: {{Benchmarks: {{benchmarks: {{toy: {world}}}}}}}\n")
    assert "two evaluations are named 'toy'" in refused(config=("base.yaml", "held_out.yaml", "two.yaml"))


@pytest.mark.parametrize("name", ["Checkpoint", "TaskEarlyStopping"])
def test_a_monitor_that_its_benchmark_does_not_log(refused, name):
    line = refused(f"--callbacks.{name}.monitor", "val/toy/nl", config=("base.yaml", "held_out.yaml"))
    assert f"{name}: nothing logs monitor 'val/toy/nl'" in line and "did you mean 'val/toy/nll'" in line


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_of_nothing(refused, command):
    assert "nothing to evaluate: name benchmarks under `callbacks`" in refused(command=command)


def test_prediction_on_nothing(refused):
    assert "nothing to predict on: give data.predict" in refused(command="predict")


def test_a_failed_start_leaves_the_folder_free(refused, tmp_path):
    """A run that never made a step is none: the same command, mended, runs in the same folder."""
    run = ["--run_dir", str(tmp_path / "run")]
    assert "god.jsonl" in refused("--data.train.toy.path", "god.jsonl")
    assert main(["fit", "-c", "base.yaml", *run, "--trainer.max_steps", "1"]) == 0
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
    assert main(["fit", "-c", "base.yaml", *run, *LORA]) == 0
    whole = str(last_checkpoint(tmp_path / "whole"))
    Path("cut.ckpt").write_bytes(Path(whole).read_bytes()[:-2000])
    expected = {"gone": "no checkpoint 'gone.ckpt'; a run keeps its own in run_dir/checkpoints"}
    expected |= {
        "junk": "'junk.ckpt' is not a checkpoint, or was cut off",
        "cut": "is not a checkpoint, or was cut off",
    }
    expected |= {"foreign": "was not written by this package"}
    for name, message in expected.items():
        assert message in refused("--ckpt", f"{name}.ckpt", command="validate", config=("base.yaml", "held_out.yaml"))
        assert message in refused("--resume", f"{name}.ckpt")
        assert message in refused(f"{name}.ckpt", "--out", "out", command="export")
    assert "--backbone.path model" in refused("--ckpt", "model", command="predict")
    line = refused("--resume", whole)  # trained with LoRA
    assert "does not fit the configured backbone and parts" in line and "more)" in line
    line = refused("--resume", whole, *LORA, "--backbone.path", "embedded:qwen2_5_vl-student")
    assert "does not fit the configured backbone and parts" in line


def test_adapters(refused, tmp_path, capfd):
    """Only LoRA and projector make an adapter; it starts a run of the same settings, and no other."""
    lora, projector, full = (tmp_path / name for name in ("lora", "projector", "full"))
    assert main(["fit", "-c", "base.yaml", "--run_dir", str(lora), *FROZEN, *LORA]) == 0
    parts = [*FROZEN[:2], "--model.parts.language.freeze", "true"]
    assert main(["fit", "-c", "base.yaml", "--run_dir", str(projector), *parts]) == 0
    assert main(["fit", "-c", "base.yaml", "--run_dir", str(full), *LORA]) == 0
    line = refused(str(last_checkpoint(full)), "--adapter", "--out", str(full / "out"), command="export")
    assert "part vision is trained in full" in line and "without --adapter" in line
    assert sorted(p.name for p in full.iterdir() if "out" in p.name) == []
    for run in (lora, projector):
        argv = ["export", str(last_checkpoint(run)), "--adapter", "--out", str(run / "adapter")]
        assert main(argv) == 0
        assert "is there already" in error_of(capfd, argv)
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


# --- samples ---------------------------------------------------------------------------------------------------------

BAD_ROWS = {  # name: row, what the message says, the reason it is counted by
    "broken image": (row("bad", image="broken.png"), "image './broken.png' cannot be decoded", "broken_image"),
    "missing image": (row("bad", image="nope.png"), "image './nope.png' does not exist", "missing_image"),
    "video": (row("bad", video="film.mp4"), "message 0 has a video; only images are supported", "video"),
    "truncated": (
        row("bad", image=["red.png"] * 30, question="<image>" * 30 + "what ?"),
        "549 tokens, and max_length 256 would cut an image: raise max_length or lower max_pixels",
        "truncated_image",
    ),
    "too long": (row("bad", question="<image>" + "what is ? " * 200), "more than max_length 256: raise it", "too_long"),
    "count": (row("bad", question="<image><image>what ?"), "2 image placeholders for 1 images", "placeholder_mismatch"),
    "empty answer": (row("bad", answer="  "), "the answer is empty", "empty_answer"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_sample_stops_the_run(refused, name):
    line = refused("--data.train.toy.path", f"{name}.jsonl")
    assert "sample toy/bad: " in line and BAD_ROWS[name][1] in line
    assert "mend the data, or set data.on_bad_sample: skip" in line


def test_a_bad_sample_found_by_a_worker_says_the_same(refused):
    line = refused("--data.train.toy.path", "empty answer.jsonl", "--data.workers", "1")
    assert "error: sample toy/bad: the answer is empty" in line and "data.on_bad_sample: skip" in line


def test_evaluation_and_prediction_leave_nothing_out(refused):
    for command, config in (("predict", ("base.yaml",)), ("validate", ("base.yaml", "held_out.yaml"))):
        paths = {"predict": "data.predict.toy.path", "validate": "callbacks.HeldOutLoss.source.path"}
        argv = [f"--{paths[command]}", "broken image.jsonl", "--data.on_bad_sample", "skip"]
        more = ["--data.predict.toy.kind", "messages"] if command == "predict" else []
        line = refused(*argv, *more, command=command, config=config)
        assert "/bad: image 0: image './broken.png'" in line and "leave out nothing" in line, line


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_sample_is_skipped_counted_and_reported(tmp_path, name, capfd):
    """Once in the file however often it is drawn; counted in every step; said when it comes and at the end."""
    run = tmp_path / "run"
    argv = ["--data.train.toy.path", f"{name}.jsonl", "--data.on_bad_sample", "skip", "--run_dir", str(run)]
    assert main(["fit", "-c", "base.yaml", *argv]) == 0
    _, detail, reason = BAD_ROWS[name]
    (record,) = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert (record["step"], record["id"], record["reason"]) == (1, "toy/bad", reason) and detail in record["detail"]
    err = capfd.readouterr().err
    assert (
        f"left out sample toy/bad: {record['detail']} (the first {reason}; all are in {run}/bad_samples.jsonl)" in err
    )
    assert f"left out 1 samples (1 {reason}); which and why is in {run}/bad_samples.jsonl" in err
    header, *rows = [line.split(",") for line in (run / "csv" / "metrics.csv").read_text().splitlines()]
    for column in ("train/skipped", f"train/skipped_{reason}"):
        assert [float(values[header.index(column)]) for values in rows] == [1.0, 1.0]
    assert [float(values[header.index("train/rows")]) for values in rows] == [2.0, 2.0]


def test_skipping_equals_data_without_the_bad_sample(tmp_path):
    """The good two of three samples train as they would alone, on one process and on two, and are counted over both."""
    bad = [row("bad0", answer=""), row("bad1", image="nope.png")]
    absolute = [
        {**r, "image": str(Path(r["image"]).resolve())} for r in [row("good0"), row("good1", answer="blue"), *bad]
    ]
    write("mixed.jsonl", *absolute)
    write("clean.jsonl", *absolute[:2])
    spec = {
        "name": "run",
        "model": "embedded:qwen2_5_vl-tiny",
        "shuffle": False,
        "on_bad_sample": "skip",
        "batch_size": 4,
    }
    records = []
    for name, processes in (("clean", 1), ("mixed", 1), ("mixed", 2)):
        folder = tmp_path / f"{name}{processes}"
        more = {"data": str(Path(f"{name}.jsonl").resolve()), "run_dir": str(folder / "run")}
        strategy = "ddp" if processes == 2 else "auto"
        done = run_scenarios([spec | more | {"strategy": strategy}], folder, processes=processes)
        assert done.returncode == 0, done.stderr
        records.append(torch.load(folder / "records.pt")["run"])
        if name == "mixed":
            assert records[-1]["metrics"]["train/skipped"] == 2.0
            lines = [json.loads(line) for line in (folder / "run" / "bad_samples.jsonl").read_text().splitlines()]
            assert sorted((r["id"], r["reason"]) for r in lines) == [
                ("train/bad0", "empty_answer"),
                ("train/bad1", "missing_image"),
            ]
    for other in records[1:]:
        for name, weight in records[0]["weights"].items():
            assert torch.allclose(weight, other["weights"][name], rtol=1e-9, atol=1e-12)


def test_a_resumed_run_reports_each_bad_sample_once(tmp_path):
    run = tmp_path / "run"
    write("two bad.jsonl", row("good"), row("bad0", answer=""), row("bad1", answer=""), row("good1"))
    argv = ["fit", "-c", "base.yaml", "--run_dir", str(run), "--data.train.toy.path", "two bad.jsonl"]
    argv += ["--data.on_bad_sample", "skip", "--data.shuffle", "false", "--data.batch_size", "2"]
    assert main([*argv, "--trainer.max_steps", "1"]) == 0
    file = run / "bad_samples.jsonl"
    with file.open("a") as stream:  # written after the checkpoint, by the part of a run that is done again
        stream.write('{"step": 2, "id": "toy/bad1", "reason": "empty_answer", "detail": "x"}\n{"step": 3, "id"')
    assert main([*argv, "--trainer.max_steps", "4", "--resume"]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["step"], r["id"]) for r in found] == [(1, "toy/bad0"), (2, "toy/bad1")]


def test_data_in_which_nothing_can_be_used(refused):
    write("all bad.jsonl", *(row(f"bad{n}", answer="") for n in range(9)))
    line = refused("--data.train.toy.path", "all bad.jsonl", "--data.on_bad_sample", "skip", "--trainer.max_steps", "9")
    assert "data.train has nothing to learn from: left out 9 samples (9 empty_answer)" in line


# --- numbers and disks -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_leaves_the_ids(refused, tmp_path):
    line = refused("--model.lr", "1e30", "--trainer.max_steps", "4")
    file = tmp_path / "run" / "nonfinite_step1_rank0.json"
    assert "loss is nan at optimizer step 1" in line and str(file) in line and "Lower model.lr" in line
    assert json.loads(file.read_text()) == {
        "step": 1,
        "values": {"loss": "nan"},
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


def test_a_disk_that_is_full(refused, disk, tmp_path, capfd):
    """The same on real small disks: one and a half checkpoints, one and no model directory, nothing at all."""
    assert main(["fit", "-c", "base.yaml", "--run_dir", str(tmp_path / "run")]) == 0
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
    line = error_of(capfd, ["export", str(checkpoint), "--out", str(smaller / "out")])
    assert f"could not write {smaller}/out" in line and sorted(p.name for p in smaller.iterdir()) == ["run"]
    tiny = disk(tmp_path / "tiny", "4k")
    line = refused("--run_dir", str(tiny / "run"))
    assert f"the disk of {tiny}/run is full: free some space" in line
