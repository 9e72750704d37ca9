"""Samples that cannot be used: refused with their id, or left out, counted and reported; never changed."""

import json
from pathlib import Path

import pytest
import torch

from lightning_vlm.cli.main import main

from .conftest import run_scenarios
from .runs.commands import BASE, HELD_OUT, enter, row, workplace, write

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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A working directory with two good samples beside each bad one."""
    folder = tmp_path_factory.mktemp("bad_samples")
    workplace(folder)
    (folder / "broken.png").write_bytes(b"not a picture")
    for name, (bad, _, _) in BAD_ROWS.items():
        write(folder / f"{name}.jsonl", row("good0"), row("good1"), bad)
    return folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    enter(files, monkeypatch)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_sample_stops_the_run(refused, name):
    line = refused("--data.train.toy.path", f"{name}.jsonl")
    assert "sample toy/bad: " in line and BAD_ROWS[name][1] in line
    assert "mend the data, or set data.on_bad_sample: skip" in line


def test_a_bad_sample_found_by_a_worker_says_the_same(refused):
    line = refused("--data.train.toy.path", "empty answer.jsonl", "--data.workers", "1")
    assert "error: sample toy/bad: the answer is empty" in line and "data.on_bad_sample: skip" in line


def test_evaluation_and_prediction_leave_nothing_out(refused):
    for command, config in (("predict", (BASE,)), ("validate", (BASE, HELD_OUT))):
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
    assert main(["fit", "-c", BASE, *argv]) == 0
    _, detail, reason = BAD_ROWS[name]
    (record,) = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert (record["step"], record["id"], record["reason"]) == (1, "toy/bad", reason) and detail in record["detail"]
    out = capfd.readouterr().out
    assert (
        f"left out sample toy/bad: {record['detail']} (the first {reason}; all are in {run}/bad_samples.jsonl)" in out
    )
    assert f"left out 1 samples (1 {reason}); which and why is in {run}/bad_samples.jsonl" in out
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
    argv = ["fit", "-c", BASE, "--run_dir", str(run), "--data.train.toy.path", "two bad.jsonl"]
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
