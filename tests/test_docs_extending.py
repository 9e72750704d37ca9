"""docs/extending.md: its files are written out, run by the commands it prints, and held to the contracts."""

import json
import math
import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from lightning_vlm.cli.main import main
from lightning_vlm.data.sources import SourceSpec, open_source

from .docs_kit import REPOSITORY, SMALL, blocks, column, commands, fit, page, reader, write

PAGE = page("extending.md")
SIMPO = ("my_algorithms/simpo.py", "simpo.yaml", "test_simpo.py")
COLOURS = ("red", "green", "blue", "black")
QUESTION = "What colour is it?"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The reader's: the page's files, the small settings, and the data that the page speaks of."""
    write(blocks(PAGE), tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{colour}.png")
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": colour}]
        rows.append({"id": colour, "image": f"{colour}.png", "messages": turns, "answer": colour})
    (tmp_path / "flags.tsv").write_text("".join(f"{colour}.png\t{colour}\n" for colour in COLOURS))
    (tmp_path / "flags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with reader(tmp_path, monkeypatch):
        yield tmp_path


def command(beginning: str) -> list[str]:
    """The words of the one command of the page that contains a text."""
    (found,) = [line for line in commands(PAGE) if beginning in line]
    return shlex.split(found)


def python(words: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run `python …` in a process of its own, as a reader would who is not inside of a test."""
    assert words[0] == "python"
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    own |= {"OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *words[1:]], cwd=folder, env=own, capture_output=True, text=True)


# --- the algorithm ---------------------------------------------------------------------------------------------------


def test_simpo_takes_less_than_80_lines():
    """Loss, module, YAML and test; comments and empty lines count."""
    lines = {block.file: block.text.count("\n") for block in blocks(PAGE) if block.file in SIMPO}
    assert set(lines) == set(SIMPO) and sum(lines.values()) < 80


def test_its_own_test_passes(folder):
    done = python(command("pytest test_simpo.py"), folder)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("beta", [None, 1e-9])
def test_the_command_trains_it(folder, beta):
    """With β near 0 the first loss is −log σ(−γ) = ln(1 + e), whatever the model says."""
    _, _, *words = command("-c simpo.yaml")
    words[words.index("--backbone.path") + 1] = "embedded:qwen2_5_vl-tiny"
    more = [] if beta is None else ["--model.beta", str(beta)]
    small = [*more, "-c", "small.yaml", "--logger.MLFlow", "null", "--callbacks.LearningDynamics", "null"]
    small += ["--callbacks.Benchmarks", "null", "--callbacks.SqueezingStop", "null"]
    losses = column(fit(*words, *small, run_dir="run"), "train/loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if beta is not None:
        assert losses == pytest.approx([math.log(1 + math.e)] * 2, abs=1e-6)
    AutoModelForImageTextToText.from_pretrained("run/model")


def test_a_setting_out_of_range_is_one_line(folder, capsys):
    words = ["-c", "experiment/world-dpo", "-c", "simpo.yaml", "-c", "small.yaml", "--logger.MLFlow", "null"]
    for more, said in (
        (["--model.gamma", "-1"], "model.beta must be positive and model.gamma not negative; got 2.0, -1"),
        (["--model.gama", "1"], "SimPO takes no such argument; did you mean 'gamma'?"),
    ):
        assert main(["fit", *words, "--run_dir", "run", *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert said in line


def test_the_contracts_hold(folder):
    """The command of the page: every contract test that runs on an exported algorithm."""
    setting, *words = command("LVLM_CONTRACTS=")
    name, _, value = setting.partition("=")
    done = python([*words, "-v"], REPOSITORY, **{name: value, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout[-4000:]
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    for contract, times in (("uninterrupted", 4), ("export_reloads", 1), ("how_the_step_is_cut", 2)):
        assert sum(contract in line and "SimPO" in line for line in passed) == times


def test_the_contracts_catch_a_mean(folder):
    """The first thing that the page forbids."""
    path = folder / SIMPO[0]
    path.write_text(path.read_text().replace("Term(loss.sum())", "Term(loss.mean())"))
    words = ["python", "-m", "pytest", "tests/test_contracts.py", "-k", "how_the_step_is_cut"]
    done = python(words, REPOSITORY, LVLM_CONTRACTS="my_algorithms.simpo.SimPO", PYTHONPATH=str(folder))
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout[-2000:]


# --- the other four --------------------------------------------------------------------------------------------------


def test_a_callback(folder):
    """Of the probabilities .5, .001, .02, .009 half are below one in a hundred; the second step is not looked at."""
    logged = {}
    module = SimpleNamespace(clock=2, last_step={"logprobs": torch.tensor([0.5, 0.001, 0.02, 0.009]).log()})
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    watcher = import_module("my_callbacks").SurpriseShare(every=2)
    watcher.on_train_batch_end(None, module, None, None, 0)
    assert logged == {"train/surprise": 0.5}
    rows = fit("-c", "algorithm/sft", "-c", "data/world", "-c", "callbacks.yaml", "-c", "small.yaml", run_dir="run")
    assert len(column(rows, "train/surprise")) == 2


def test_a_reward(folder):
    brief = import_module("my_rewards").brief
    texts = [[{"role": "assistant", "content": text}] for text in ("it is 7", "7" + "." * 40, "8")]
    assert brief(texts, ["7", "7", "7"]) == [1.0, 0.0, 0.0]
    small = ["--model.group_size", "2", "--model.rollout.max_new_tokens", "4", "-c", "small.yaml"]
    rows = fit("-c", "algorithm/grpo", "-c", "data/world-questions", "-c", "rewards.yaml", *small, run_dir="run")
    part, total = column(rows, "train/reward/brief"), column(rows, "train/reward")
    assert total == pytest.approx([0.5 * value for value in part]) and len(part) == 2


def test_a_benchmark(folder):
    benchmarks = import_module("my_benchmarks")
    for output, score, extraction in ((" red, I think", 1.0, "red,"), ("I think red", 0.0, "I"), ("", 0.0, None)):
        verdict = benchmarks.grade(output, SimpleNamespace(answer="red"))
        assert verdict == {"extraction": extraction, "score": score}
    rows = fit("-c", "algorithm/sft", "-c", "data/world", "-c", "benchmarks.yaml", "-c", "small.yaml", run_dir="run")
    assert column(rows, "val/openings/n") == [len(COLOURS)] and 0 <= column(rows, "val/openings/accuracy")[0] <= 1
    assert Path("run/checkpoints/best-00000002.ckpt").exists()
    assert (Path("run/evaluations/openings/step-00000002/per_example.jsonl")).exists()


def test_a_source(folder):
    rows = fit("-c", "algorithm/sft", "-c", "data.yaml", "-c", "small.yaml", run_dir="run")
    assert column(rows, "train/rows") == [4, 4] and column(rows, "train/skipped") == [0, 0]
    flags = open_source(SourceSpec(kind="flags", path="flags.tsv"), for_training=True)
    assert [(sample.id, sample.answer, sample.images) for sample in flags] == [
        (f"flags/{colour}.png", colour, [f"{colour}.png"]) for colour in COLOURS
    ]
    assert flags[0].chosen() == "red" and flags[0].prompt()[0]["content"][1]["text"] == QUESTION
