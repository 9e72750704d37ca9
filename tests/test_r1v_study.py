"""The R1V study: order and settings of its commands, what is skipped, its check of frozen parts, its table by hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools.commands import run_forked
from tools.r1v_study import METRICS, ROWS, Recipe, Steps, cell, folders, scores, table


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


class Pretended:
    """Stands for the commands: writes down what was asked for, and makes what they would make.

    Args:
        trains: name of a run whose language model changes, though it should not.
    """

    def __init__(self, trains: str = "") -> None:
        self.commands: list[list[str]] = []
        self.trains = trains

    def __call__(self, words: list[str], log: Path) -> int:
        self.commands.append(words)
        out = option(words, "--out")
        if words[0] == "fit":
            run = Path(option(words, "--run_dir"))
            self._model(run / "model", run.name)
        elif words[0] == "test":
            (Path(option(words, "--run_dir")) / "evaluations" / "ood").mkdir(parents=True)
        elif words[0] == "swap-language":
            self._model(Path(out), "swap")
        elif str(out).endswith(".jsonl"):
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).write_text("{}\n")
        else:
            Path(out).mkdir(parents=True)
        return 0

    def _model(self, where: Path, name: str) -> None:
        reasons = name == "reasoning" or name == "swap" or name.startswith(("stage", "round", "grpo"))
        language = 9.0 if name == self.trains else 1.0 + reasons
        where.mkdir(parents=True)
        tensors = {
            "vision_tower.weight": torch.ones(2),
            "language_model.model.weight": torch.full((2,), language),
            "multi_modal_projector.weight": torch.randn(2),
        }
        if name == "swap":  # as transformers 5 calls them
            tensors = {f"model.{name.replace('.model.', '.')}": value for name, value in tensors.items()}
        save_file(tensors, where / "model.safetensors")


def test_the_recipe_is_r1vs(tmp_path):
    """Three passes before the swap, chains distilled before stage 1 and each round, τ = 2, 3, 4, 5, GRPO on score 5."""
    run = Pretended()
    recipe = Recipe(tmp_path, combine="intersection", run=run, pool=64, steps=Steps(grpo=7))
    recipe.prepare()
    recipe.seed(3)
    asked = [words for words in run.commands if words[0] != "test"]
    names = [w[0] if w[0] != "fit" else Path(option(w, "--run_dir")).name for w in asked]
    round_ = ["distill", "predict", "select"]
    assert names == [
        *("warmup", "vlm", "take-encoder", "substitute", "take-language", "reasoning", "take-language"),
        *(
            "compose",
            "init-1",
            "distill",
            "select",
            "init-2",
            "select",
            "init-3",
            "swap-language",
            "distill",
            "stage-1",
        ),
        *(name for t in range(1, 5) for name in (*round_, f"round-{t}-intersection")),
        *("select", "grpo-intersection"),
    ]
    selected = [w for w in asked if w[0] == "select"]
    assert [option(w, "--threshold") for w in selected if "--answers" in w] == ["2", "3", "4", "5"]
    assert {option(w, "--combine") for w in selected if "--answers" in w} == {"intersection"}
    assert [option(w, "--min_score") for w in selected if "--answers" not in w] == ["4", "5", "5"]
    starts = {n: option(w, "--backbone.path") for n, w in zip(names, asked, strict=True) if "-" in n or n == "grpo"}
    root = tmp_path / "seed-3"
    assert starts["init-1"] == str(root / "composed") and starts["stage-1"] == str(root / "swap")
    assert starts["round-1-intersection"] == str(root / "stage-1" / "model")
    assert starts["grpo-intersection"] == str(root / "round-4-intersection" / "model")
    writers = [option(w, "--model") for w in asked if w[0] == "distill"]
    chain = ["init-1/model", "swap", "stage-1/model", *(f"round-{t}-intersection/model" for t in (1, 2, 3))]
    assert writers == [str(root / name) for name in chain]
    rates = {name: option(w, "--model.lr") for name, w in zip(names, asked, strict=True) if w[0] == "fit"}
    assert (rates["stage-1"], rates["round-4-intersection"]) == ("5.0e-3", "1.0e-3")  # 1e-4 and 2e-5, times fifty
    grpo = asked[-1]
    assert option(grpo, "--trainer.max_steps") == "7" and option(grpo, "--seed_everything") == "3"
    pool = json.loads((root / "round-2-intersection-data" / "pool.yaml").read_text())["world"]["options"]
    assert (pool["size"], pool["seed"], pool["direct_fraction"]) == (64, 103, 0.0) and "caption" not in pool["families"]
    tested = {Path(option(w, "--run_dir")).name for w in run.commands if w[0] == "test"}
    assert {f"{name}-test" for name in folders("intersection").values()} | {"vlm-test"} == tested


def test_a_second_start_runs_only_what_is_missing(tmp_path):
    Recipe(tmp_path, run=Pretended()).prepare()
    again = Pretended()
    (tmp_path / "common" / "substitute-llm").rmdir()
    Recipe(tmp_path, run=again).prepare()
    assert [words[0] for words in again.commands] == ["take-language"]


def test_both_rules_share_what_comes_before_the_rounds(tmp_path):
    first, second = Pretended(), Pretended()
    Recipe(tmp_path, run=first).prepare()
    Recipe(tmp_path, run=first).seed(0)
    Recipe(tmp_path, combine="intersection", run=second).seed(0)
    assert [w[0] for w in second.commands] == ["distill", "predict", "select", "fit", "test"] * 4 + [
        "select",
        "fit",
        "test",
    ]
    assert set(folders("union")) == set(folders("union").values()) == set(ROWS)


def test_frozen_parts_are_compared(tmp_path):
    """A run that changed the language model is named."""
    recipe = Recipe(tmp_path, run=Pretended(trains="round-2"))
    recipe.prepare()
    with pytest.raises(RuntimeError, match=r"language_model\.weight of .*round-2"):
        recipe.seed(0)


def test_what_failed_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"code 3; see .*warmup\.log"):
        Recipe(tmp_path, run=lambda words, log: 3).prepare()
    with pytest.raises(RuntimeError, match="was not made"):
        Recipe(tmp_path, run=lambda words, log: 0).prepare()


def test_a_fork_writes_its_log_and_returns_its_code(tmp_path):
    log, here = tmp_path / "logs" / "a.log", os.getpid()
    assert run_forked(["--version"], log) == 0 and log.read_text().startswith("lightning-vlm ")
    assert run_forked(["nonsense"], log) == 2 and "unknown command 'nonsense'" in log.read_text()
    assert os.getpid() == here


def test_cells_and_table_by_hand():
    """Two seeds, 40 and 44 %: t = 12.706 with one degree of freedom, so the half interval is 12.706 · 2 = 25.4."""
    assert cell([40.0, 44.0]) == "42.0 ± 25.4" and cell([7.0]) == "7.0" and cell([5.0, 5.0]) == "5.0"
    first = [dict.fromkeys(METRICS, 40.0), dict.fromkeys(METRICS, 44.0)]
    then = [dict.fromkeys(METRICS, 50.0), dict.fromkeys(METRICS, 54.0)]
    lines = table({"swap": first, "stage-1": then}).splitlines()
    assert lines[2].startswith("| after the swap of language models | 42.0 ± 25.4 |") and lines[2].endswith("|  |")
    assert lines[3].startswith("| stage 1 | 52.0 ± 25.4 |") and lines[3].endswith("| 10.0 |")  # both seeds gain 10


def test_scores_are_read_as_percentages(tmp_path):
    for benchmark in ("test", "ood"):
        where = tmp_path / "evaluations" / benchmark / "step-0"
        where.mkdir(parents=True)
        own = {"accuracy": 0.5, "direct": 0.25, **{f"family/{n}": 0.1 for n in ("count", "bars", "angle", "perimeter")}}
        (where / "scores.json").write_text(json.dumps(own if benchmark == "test" else {"accuracy": 0.125}))
    found = scores(tmp_path)
    assert found["accuracy"] == 50 and found["direct"] == 25 and found["bars"] == 10 and found["out of domain"] == 12.5
