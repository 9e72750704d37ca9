"""The benchmarks known by name: ready by their path alone, evaluated in a real run, refused at the start if wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest

import callbacks
from callbacks import (
    Answers,
    Checkpoint,
    CocoCaptions,
    EvaluationRecord,
    Geometry3K,
    MathVision,
    MathVista,
    Mmvp,
    TaskEarlyStopping,
)
from lightning_vlm.algorithms import SFT
from lightning_vlm.data.module import VLMData
from lightning_vlm.data.sources import SourceSpec
from lightning_vlm.models.spec import Backbone
from tests.sources_kit import picture, write

BACKBONE = Backbone(path="embedded:qwen2_5_vl-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """A few questions of every benchmark, in the form it is released in; five each, so that two ranks are uneven."""
    root, five = tmp_path_factory.mktemp("data"), range(1, 6)
    for n in five:
        for folder in ("vista/images", "vision/images", "coco/val2014", "qa"):
            picture(root / folder / f"{n}.png")
    for n in range(1, 7):
        request = {"query": "<img src='x'> Is it red ? Options: (a) yes (b) no", "images": ["1.png"]}
        write(root / f"mmvp/{n}/request.json", request | {"answer": "(a)" if n % 2 else "(b)"})
        picture(root / f"mmvp/{n}/1.png")
    meta = {"task": "figure question answering", "skills": ["statistical reasoning", "arithmetic reasoning"]}
    vista = {
        str(n): {
            "pid": str(n), "question": "how many ?", "image": f"images/{n}.png", "choices": None, "unit": None,
            "precision": None, "answer": str(n), "question_type": "free_form", "answer_type": "integer",
            "metadata": meta,
        }
        for n in five
    }  # fmt: skip
    write(root / "vista/testmini.json", vista)
    vision = [
        {"id": str(n), "question": "which ? <image1>", "options": ["A", "B"], "answer": "B", "level": n % 2 + 1,
         "subject": "counting", "image": f"images/{n}.png"}
        for n in five
    ]  # fmt: skip
    write(root / "vision/testmini.jsonl", vision)
    questions = [{"id": n, "question": "how many ?", "answer": str(n), "level": n} for n in five]
    write(root / "qa/test.jsonl", questions)
    geometry = [{"problem": "<image>find x", "answer": str(n), "images": [f"../qa/{n}.png"]} for n in five]
    write(root / "geometry/test.jsonl", geometry)
    write(root / "geometry/train.jsonl", geometry)
    images = [
        {"cocoid": n, "filename": f"{n}.png", "filepath": "val2014", "split": "test" if n < 5 else "val",
         "sentences": [{"raw": "a red square"}, {"raw": "one red circle"}]}
        for n in five
    ]  # fmt: skip
    write(root / "coco/dataset_coco.json", {"images": images})
    places = {"CocoCaptions": "coco/dataset_coco.json", "Geometry3K": "geometry", "MathVision": "vision"}
    places |= {"MathVista": "vista", "Mmvp": "mmvp", "Answers": "qa"}
    return {name: str(root / place) for name, place in places.items()}


NAMES = {
    "CocoCaptions": "coco",
    "Geometry3K": "geometry3k",
    "MathVision": "mathvision",
    "MathVista": "mathvista",
    "Mmvp": "mmvp",
    "Answers": "answers",
}


def named(which: str, data: dict[str, str], **more):
    more = {"rule": "coco/python"} | more if which == "CocoCaptions" else more
    return getattr(callbacks, which)(path=data[which], **more)


def trainer(folder: Path, *observers, **settings) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, callbacks=list(observers), default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in observers), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def module_and_data(**more) -> tuple[SFT, VLMData]:
    train = {"world": SourceSpec(kind="world", split="train", options={"size": 20})}
    return SFT(backbone=BACKBONE, **more), VLMData(backbone=BACKBONE, train=train, batch_size=4, workers=0)


@pytest.fixture(scope="module")
def validated(data, tmp_path_factory):
    """All six in one validation, three of them with several answers."""
    folder = tmp_path_factory.mktemp("validated")
    observers = [named(name, data, max_new_tokens=4, n=2 if name in ("Mmvp", "Answers", "CocoCaptions") else 1)
                 for name in NAMES]  # fmt: skip
    (metrics,) = [trainer(folder, *observers, EvaluationRecord(count=1)).validate(*module_and_data())[-1:]]
    merged = {k: v for result in metrics for k, v in result.items()}
    return folder, observers, merged


def test_a_path_alone_is_enough(validated):
    """Each logs under its own name, the counts are those of the data, and every announced metric comes."""
    _, observers, metrics = validated
    counts = {name: metrics[f"val/{name}/n"] for name in NAMES.values()}
    assert counts == {"coco": 4, "geometry3k": 5, "mathvision": 5, "mathvista": 5, "mmvp": 6, "answers": 5}
    assert {"val/mathvista/task/figure question answering", "val/mathvista/skills/arithmetic reasoning"} <= set(metrics)
    assert {"val/mathvision/level/1", "val/mathvision/level/2", "val/mmvp/pairs", "val/coco/CIDEr"} <= set(metrics)
    assert {"val/answers/pass_at_2", "val/mmvp/maj_at_2", "val/coco/CIDEr_oracle"} <= set(metrics)
    for callback in observers:
        (evaluation,) = callback._open
        logged = {k.removeprefix(f"val/{evaluation.name}/") for k in metrics if k.startswith(f"val/{evaluation.name}/")}
        assert logged == evaluation.metric_names


def test_every_evaluation_leaves_its_files(validated):
    folder, _, metrics = validated
    for name in NAMES.values():
        place = folder / "evaluations" / name / "step-00000000"
        lines = [json.loads(line) for line in (place / "per_example.jsonl").read_text().splitlines()]
        scores = json.loads((place / "scores.json").read_text())
        assert len({line["id"] for line in lines}) == scores["n"] == metrics[f"val/{name}/n"]
        assert all(
            {"id", "output", "extraction", "gold", "score", "rule", "prompt_id"} <= line.keys() for line in lines
        )
        assert scores["rule"] == lines[0]["rule"] and scores["intervals"]
        assert (place / "table.html").is_file()


@pytest.mark.parametrize(
    ("callback", "rule", "prompt"),
    [
        (Geometry3K(path="x"), None, "freeform"),
        (Geometry3K(path="x", prompt="mcq"), None, "mcq"),
        (MathVista(), None, None),
        (MathVision(), None, None),
        (Mmvp(path="x", swap_pairs=True), None, None),
        (CocoCaptions(path="x"), "coco/ptb", None),
        (Answers(path="x", prompt="direct"), None, "direct"),
    ],
)
def test_what_a_name_stands_for(callback, rule, prompt):
    (spec,) = callback.specs.values()
    assert (spec.rule, spec.source.prompt, spec.every, spec.n, spec.temperature) == (rule, prompt, 100, 1, 0.0)
    if isinstance(callback, Mmvp):
        assert spec.source.options == {"swap_pairs": True}


def test_several_answers_are_drawn_unless_said_otherwise(data):
    (spec,) = Answers(path="x", n=8).specs.values()
    assert (spec.n, spec.temperature) == (8, 1.0)
    assert next(iter(Answers(path="x", n=8, temperature=0.6).specs.values())).temperature == 0.6


def test_a_benchmark_drives_early_stopping_and_the_choice_of_a_checkpoint(data, tmp_path):
    """A score that cannot improve stops the run at the patience; the best checkpoint is the first."""
    stopper = TaskEarlyStopping(monitor="val/quiz/accuracy", patience=2)
    best = Checkpoint(monitor="val/quiz/accuracy")
    quiz = Answers(path=data["Answers"], name="quiz", every=2, max_new_tokens=1)
    run = trainer(tmp_path, quiz, stopper, best, max_steps=50)
    module, given = module_and_data(lr=1e-9)
    run.fit(module, given)
    assert module.clock == 6 and stopper.best_step == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best-00000002.ckpt", "step-00000006.ckpt"]


def test_each_has_its_own_interval(data, tmp_path):
    observers = [
        named("Answers", data, every=2, max_new_tokens=1),
        named("MathVision", data, every=3, max_new_tokens=1),
    ]
    trainer(tmp_path, *observers, EvaluationRecord(count=0), max_steps=6).fit(*module_and_data())
    steps = {
        n: sorted(int(p.name[5:]) for p in (tmp_path / "evaluations" / n).iterdir()) for n in ("answers", "mathvision")
    }
    assert steps == {"answers": [2, 4, 6], "mathvision": [3, 6]}


# --- refused at the start --------------------------------------------------------------------------------------------


def test_a_foreign_data_module(data):
    with pytest.raises(ValueError, match="Answers needs a data module that evaluates, such as VLMData"):
        named("Answers", data).setup(SimpleNamespace(datamodule=L.LightningDataModule()), None, "fit")


def test_two_of_one_name(data, tmp_path):
    observers = [named("Answers", data), named("MathVision", data, name="answers")]
    with pytest.raises(ValueError, match="two evaluations are named 'answers'"):
        trainer(tmp_path, *observers, max_steps=1).fit(*module_and_data())


@pytest.mark.parametrize("monitor", ["val/answers/acuracy", "val/answer/accuracy", "val/answers/level/9"])
@pytest.mark.parametrize("observer", [Checkpoint, TaskEarlyStopping])
def test_a_monitor_that_nothing_logs(data, tmp_path, observer, monitor):
    module, given = module_and_data()
    with pytest.raises(ValueError, match=f"nothing will log monitor '{monitor}'"):
        trainer(tmp_path, named("Answers", data), observer(monitor=monitor), max_steps=1).fit(module, given)
    assert module.clock == 0


def test_a_question_without_gold(tmp_path):
    path = write(
        tmp_path / "q.jsonl", [{"question": "how many ?", "answer": "1"}, {"question": "why ?", "answer": " "}]
    )
    module, given = module_and_data()
    with pytest.raises(ValueError, match="sample qa/1 has no gold answer"):
        trainer(tmp_path, Answers(path=path), max_steps=1).fit(module, given)
    assert module.clock == 0


def test_a_benchmark_of_another_shape(data, tmp_path):
    with pytest.raises(ValueError, match="no column 'options'"):
        trainer(tmp_path, MathVision(path=data["Answers"])).validate(*module_and_data())


def test_captions_without_java(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"no `java` on PATH.*coco/python"):
        trainer(tmp_path, CocoCaptions(path=data["CocoCaptions"]), max_steps=1).fit(*module_and_data())
