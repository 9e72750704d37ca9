"""`lightning-vlm distill`: what it writes, that it goes on, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.cli import distill as command
from lightning_vlm.cli.distill import main
from lightning_vlm.data.images import load_image
from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.data.world import WorldSource
from lightning_vlm.distill import Distiller, Model, Weights, penalty

from .runs.commands import enter

TINY = "embedded:qwen2_5_vl-tiny"


@pytest.fixture
def place(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    return tmp_path


def distill(*argv: str, data: Sequence[str] = ("world:train:30",), out: str = "chains.jsonl", model: str = TINY):
    """The rows that the command writes."""
    assert main("distill", ["--data", *data, "--model", model, "--out", out, "--max_new_tokens", "24", *argv]) == 0
    return read(out)


def read(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_the_command_on_the_world(place, capsys):
    rows = distill()
    source = WorldSource(size=30, direct_fraction=0.0)
    assert [row["id"] for row in rows] == [sample.id for sample in source]
    for row, sample in zip(rows, source, strict=True):
        assert row["answer"] == sample.answer and row["family"] == sample.info["family"]
        assert (row["rewritten"], row["messages"][-1]["content"][0]["text"]) == ("gold", sample.chosen())
        assert row["score"] == (5 if row["tokens"] <= 24 else 4.5) and 0 < row["own_tokens"] <= 24
        assert load_image(row["images"][0]).tobytes() == load_image(sample.images[0]).tobytes()
        assert load_image(row["images"][0]).size == (64, 64)
        parts = [row[f"{name}_score"] for name in ("vision", "text", "integration")]
        assert row["penalty"] == penalty(*parts, Weights()) and set(row["scores"]) == set(row["raw_scores"])
    for name in rows[0]["scores"]:
        values = [row["scores"][name] for row in rows]
        assert (min(values), max(values)) == (0, 1)
    assert {p.name for p in place.iterdir()} == {
        "chains.jsonl", "chains_images", "chains_lengths.png", "chains_scores.png"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "chains.jsonl: 30 of 30 samples, judged by world/exact" in said and "texts: 30 gold text" in said
    assert "low P" in said and "angle" in said and "scores: 19 × 5, 11 × 4.5" in said


def test_data_kinds_read_what_is_written(place):
    rows = distill()
    chats = open_source(SourceSpec(kind="messages", path="chains.jsonl"), for_training=True)
    source = WorldSource(size=30, direct_fraction=0.0)
    for row, chat, sample in zip(rows, chats, source, strict=True):
        assert chat.messages == sample.messages and chat.id == f"messages/{sample.id}"
        assert chat.info["penalty"] == row["penalty"] and chat.info["family"] == sample.info["family"]
        assert load_image(chat.images[0]).tobytes() == load_image(sample.images[0]).tobytes()
    asked = [row for row in rows if row["answer"] is not None]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    questions = open_source(SourceSpec(kind="qa", path="asked.jsonl"), for_training=True)
    wanted = [sample for sample in source if sample.answer is not None]
    for found, sample in zip(questions, wanted, strict=True):
        assert found.prompt() == sample.prompt() and found.answer == sample.answer
        assert RULES["world/exact"].record(sample.chosen(), found)["score"] == 1
    # what was distilled can be distilled again, and keeps its gold
    again = distill("--judge", "exact", data=("asked.jsonl",), out="again.jsonl")
    assert [row["answer"] for row in again] == [row["answer"] for row in asked]


def test_an_interrupted_command_goes_on(place, monkeypatch):
    monkeypatch.setattr(command, "_CHUNK", 8)
    whole = distill("--temperature", "1", out="whole.jsonl")
    written, chains = [], Distiller.chains

    def interrupted(self, samples, scores_):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append([sample.id for sample in samples])
        return chains(self, samples, scores_)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "chains", interrupted)
        distill("--temperature", "1")
    assert not Path("chains.jsonl").exists() and len(read("chains.jsonl.tmp")) == 17
    with Path("chains.jsonl.tmp").open("a") as stream:
        stream.write('{"id": "half a li')
    with pytest.raises(ValueError, match=r"begun with other settings \(alpha\)"):
        distill("--temperature", "1", "--alpha", "0.5")
    again: list[str] = []
    monkeypatch.setattr(
        Distiller, "chains", lambda self, some, s: (again.extend(x.id for x in some), chains(self, some, s))[1]
    )
    rows = distill("--temperature", "1")
    assert len(again) == 14 and not set(again) & {id for ids in written for id in ids}
    strip = [{**row, "images": [Path(p).name for p in row["images"]]} for row in whole]
    assert [{**row, "images": [Path(p).name for p in row["images"]]} for row in rows] == strip
    assert sorted(p.name for p in Path("whole_images").iterdir()) == sorted(
        p.name for p in Path("chains_images").iterdir()
    )
    assert not Path("chains.jsonl.tmp").exists() and not Path("chains_images.tmp").exists()


def test_penalties_are_those_of_the_rows(place, monkeypatch):
    """What the model is given for each sample is what its record says; alpha 0 is no penalty."""
    seen = []
    write = Model.write
    monkeypatch.setattr(
        Model, "write", lambda self, samples, **how: (seen.extend(how["penalties"]), write(self, samples, **how))[1]
    )
    rows = distill()
    assert seen == [row["penalty"] for row in rows] and len({round(p, 3) for p in seen}) > 5
    assert {row["penalty"] for row in distill("--alpha", "0", "--overwrite")} == {1.0}


def test_scorers_judges_and_rewriters_are_chosen(place):
    rows = distill("--scorers.demand", f"{__name__}:one", "--scorers.necessity", "ablation")
    assert {row["scores"]["demand"] for row in rows} == {0.5} and {row["raw_scores"]["demand"] for row in rows} == {1.0}
    assert len({row["raw_scores"]["necessity"] for row in rows}) > 20
    # an untrained judge says nothing that can be read: no verdict, no score, and all is told
    rows = distill("--judge", TINY, "--reward", TINY, out="judged.jsonl", data=("world:train:6",))
    assert {(row["right"], row["score"], row["rewritten"]) for row in rows} == {(None, None, "gold")}
    assert all(isinstance(row["judge_said"], str) and row["judge"] == TINY for row in rows)


def one(sample: Sample, pictures) -> float:
    return 1.0


def test_parts_and_bad_samples(place):
    low = distill("--part", "0,0.5", out="low.jsonl")
    high = distill("--part", "0.5,1", out="high.jsonl")
    ids = [{row["id"] for row in rows} for rows in (low, high)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 30
    Image.new("RGB", (64, 64), "red").save("red.png")
    rows = [{"id": n, "image": f"{name}.png", "question": "what is 2 plus 3?", "answer": "5"} for n, name in
            enumerate(["red", "absent"])]  # fmt: skip
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"sample qa/1: .*does not exist.*--skip_bad"):
        distill(data=("qa=questions.jsonl",), out="bad.jsonl")
    with pytest.raises(ValueError, match=r"no sample is left .*1 unusable .missing_image.*nothing is written"):
        distill("--skip_bad", data=("qa=questions.jsonl",), out="bad.jsonl")  # an untrained model is never right
    assert not list(Path().glob("bad*"))


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--part", "0.5"], "--part '0.5' must be two numbers"),
        (["--judge", "world/exac"], "did you mean 'world/exact'"),
        (["--judge", "world/captions"], "scores a set"),
        (["--rewrite", "again"], "--rewrite 'again': choose auto"),
        (["--reward", "nothing"], "--reward 'nothing': give rules"),
        (["--scorers.demand", "necesity"], "--scorers.demand: unknown scorer"),
        (["--shortest", "30"], "--shortest must lie in 1 to --longest 24"),
        (["--alpha", "-1"], "alpha must be a number of at least 0"),
        (["--data", "world:train:x"], "'x' is no number of samples"),
        (["--data", "world:nowhere"], "no split 'nowhere'"),
        (["--out", "chains.json"], "name it chains.jsonl"),
        (["--max_new_tokens", "600"], "more than the 512 that the model can see"),
    ],
)
def test_refused_in_one_line(place, argv, said):
    with pytest.raises(ValueError, match=said) as error:
        distill(*argv)
    assert "\n" not in str(error.value) and not list(place.iterdir())


def test_what_is_there_is_not_replaced(place):
    Path("chains.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        distill()
    assert Path("chains.jsonl").read_text() == "mine"
    assert len(distill("--overwrite")) == 30
