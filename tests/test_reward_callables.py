"""Users' reward functions: those of TRL, verl and EasyR1 unchanged, and signatures that are refused."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch

from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.rewards import Group, Reward, RewardError, Rewards

from .test_rewards import asked, group, said, scored, values, write

NAN = math.nan


@pytest.fixture
def written(tmp_path):
    """Writes a file of functions and gives the setting for one of them."""
    return partial(write, tmp_path)


def same(found: list[float], wanted: list[float]) -> bool:
    return torch.tensor(found).allclose(torch.tensor(wanted, dtype=torch.float32), equal_nan=True)


# --- TRL --------------------------------------------------------------------------------------------------------------

TRL = """
def lengths(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]

def plain(prompts, completions, completion_ids, answer):
    assert prompts == ["What is 2 + 3?"] * len(completions)
    return [len(ids) + (text == gold) for text, ids, gold in zip(completions, completion_ids, answer, strict=True)]

def everything(prompts, completions, completion_ids, **columns):
    assert completions[0] == [{"role": "assistant", "content": "5"}], completions
    assert prompts[0] == [{"role": "user", "content": "What is 2 + 3?"}], prompts
    assert completion_ids[0] == [0, 1, 2]
    logs = {name: columns.pop(name) for name in ("log_extra", "log_metric")}
    assert columns == {
        "id": ["s1"] * 2, "answer": ["5"] * 2, "source": ["sums"] * 2, "solution": ["5"] * 2,
        "level": [3] * 2, "choices": [["4", "5"]] * 2, "scale": 7,
    }, columns
    return [columns["scale"]] * 2

def sometimes(completions, **kwargs):
    return [1.0 if completion[0]["content"] == "5" else None for completion in completions]

async def slow(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [2.0 for _ in completions]

def logs(completions, log_extra=None, log_metric=None, **kwargs):
    log_extra("text", [c[0]["content"] for c in completions])
    log_extra("size", [len(c[0]["content"]) for c in completions])
    log_metric("n", len(completions))
    return [0.5] * len(completions)

class Scorer:
    def __call__(self, completion_ids, **kwargs):
        return [len(ids) for ids in completion_ids]

scorer = Scorer()

def tensors(completions, **kwargs):
    import torch
    return torch.arange(len(completions)) / 2

def pictures(prompts, completions, masks=None, patch_labels=None):
    assert masks is None  # a callable is no column
    assert prompts[0][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}], prompts
    return [float(patch_labels[0].sum())] * len(completions)
"""


def test_trl_functions_by_hand(written):
    assert values(written(TRL, "lengths"), group("a", "bcd"), group("")) == [1, 3, 0]
    assert values(written(TRL, "plain", completions="text"), group("5", "6")) == [4, 3]
    assert values(written(TRL, "scorer"), group("5", "6")) == [3, 3]
    assert values(written(TRL, "slow"), group("5", "6")) == [2, 2]
    assert values(written(TRL, "tensors"), group("5", "6", "7")) == [0, 0.5, 1]
    settings = {"options": {"scale": 7}, "columns": {"solution": "answer"}}
    found = values(written(TRL, "everything", **settings), group("5", "6", sample=asked(level=3, choices=["4", "5"])))
    assert found == [7, 7]


def test_pictures_stay_here_and_prompts_say_where_they_are(written):
    import numpy as np

    info = {"masks": lambda: 1 / 0, "patch_labels": np.array([[1, 2]], dtype=np.uint8)}
    sample = Sample("p", [message("user", image(), text("What?"))], images=[None], info=info)
    assert values(written(TRL, "pictures"), group("x", sample=sample)) == [3]


def test_none_does_not_apply(written):
    """NaN in the table, left out of the total; where nothing applies there is no reward."""
    rewards = {"part": written(TRL, "sometimes", weight=2.0), "length": Reward(kind="length", target=6)}
    with Rewards(rewards) as both:
        table = both.score([group("5", "6")])
    assert same(table.values[:, 0].tolist(), [1, NAN]) and table.totals.tolist() == [1.5, -0.5]
    with pytest.raises(RewardError, match="every part returned None") as error:
        values(written(TRL, "sometimes"), group("5", "6"))
    assert "'6'" in str(error.value) and "s1" in str(error.value)


def test_what_trl_functions_log_is_kept_where_it_is_a_number(written):
    table = scored(written(TRL, "logs"), group("abc", "d"), group("ef"))
    assert sorted(table.details) == ["part/n", "part/size"]
    assert table.details["part/n"].tolist() == [2, 2, 1]
    assert table.details["part/size"].tolist() == [3, 1, 2]


def test_trls_own_functions_run_unchanged(written):
    """By module name, and made by a line of one's own file; against TRL called as its trainer calls."""
    trl = pytest.importorskip("trl.rewards")
    texts = ["<think>a</think>b", "<think>a", "b", r"so \boxed{5}", r"\boxed{\frac{10}{2}}", r"\boxed{6}"]
    completions = [[{"role": "assistant", "content": content}] for content in texts]
    think = Reward(kind="python", function="trl.rewards:think_format_reward")
    assert values(think, group(*texts)) == trl.think_format_reward(completions) == [1, 0, 0, 0, 0, 0]
    code = "from trl.rewards import get_soft_overlong_punishment\nscore = get_soft_overlong_punishment(10, 4)\n"
    long = Group(asked(), [said("x", tokens) for tokens in (6, 7, 10, 11)])
    assert values(written(code, "score"), long) == [0, -0.25, -1, -1]
    right = Reward(kind="python", function="trl.rewards:accuracy_reward", columns={"solution": "answer"}, seconds=60)
    sample = asked(answer="$5$")
    wanted = trl.accuracy_reward(completions, ["$5$"] * len(texts))
    assert values(right, group(*texts, sample=sample)) == wanted == [0, 0, 0, 1, 1, 0]


# --- verl -------------------------------------------------------------------------------------------------------------

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info["level"] == 3 and extra_info["id"] == "s1"
    return 1.0 if solution_str == ground_truth else 0.0

def dicts(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert set(kwargs) == {"strict"}
    right = solution_str == ground_truth
    return {"score": 2.0 * right - 1.0, "acc": right, "pred": solution_str}

def bare(solution_str, ground_truth, method="strict", score=1.0):
    assert method == "strict"
    return score if solution_str == ground_truth else None

def batch(data_sources, solution_strs, ground_truths, extra_infos):
    assert data_sources == ["other"] * 2 and extra_infos == [{"split": "train"}] * 2
    return [float(s == g) for s, g in zip(solution_strs, ground_truths, strict=True)]

async def awaited(solution_str, ground_truth, **kwargs):
    import asyncio
    await asyncio.sleep(0.4)
    return float(solution_str == ground_truth)
"""


def test_verl_functions(written):
    both = group("5", "6", sample=asked(level=3, score=99))
    assert values(written(VERL, "compute_score"), both) == [1, 0]
    with Rewards({"part": written(VERL, "bare", options={"score": 4}), "form": Reward(kind="format")}) as rewards:
        assert same(rewards.score([both]).values[:, 0].tolist(), [4, NAN])  # the column `score` is not its `score`
    table = scored(written(VERL, "dicts", options={"strict": True}), both)
    assert table.values[:, 0].tolist() == [1, -1]
    assert list(table.details) == ["part/acc"] and table.details["part/acc"].tolist() == [1, 0]
    own = asked(data_source="other", extra_info={"split": "train"}, ground_truth="6")
    assert values(written(VERL, "batch"), group("5", "6", sample=own)) == [0, 1]
    renamed = group("5", "6", sample=asked(level=3, gold="6"))
    assert values(written(VERL, "compute_score", columns={"ground_truth": "gold"}), renamed) == [0, 1]


def test_async_functions_of_one_completion_run_together(written):
    """Eight waits of .4 s within one call of at most 2 s."""
    found = values(written(VERL, "awaited", seconds=2.0), group(*"12345678"))
    assert found == [0, 0, 0, 0, 1, 0, 0, 0]


# --- EasyR1 -----------------------------------------------------------------------------------------------------------

EASYR1 = """
from typing import Any

def batch(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    scores = []
    for one in reward_inputs:
        right, short = float(one["response"] == one["ground_truth"]), float(one["response_length"] < 5)
        overall = (1 - format_weight) * right + format_weight * short
        scores.append({"overall": overall, "format": short, "accuracy": right})
    return scores

def sequential(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, float]:
    if not isinstance(reward_input, dict):
        raise ValueError("sequential")
    assert reward_input["problem"] == "sums"
    return {"overall": format_weight, "accuracy": float(reward_input["response"] == reward_input["ground_truth"])}

def old(predict: str, ground_truth: str, format_weight: float = 0.1) -> dict[str, float]:
    return {"overall": float(predict == ground_truth), "format": format_weight}

def old_batch(predicts: list[str], ground_truths: list[str], format_weight: float = 0.1) -> list[dict[str, float]]:
    return [{"overall": float(p == g)} for p, g in zip(predicts, ground_truths)]

def oldest(predict_str: str, ground_truth: str) -> float:
    return 1.0 if predict_str == ground_truth else 0.0
"""


def test_easyr1_functions(written):
    both = group("5", "6")
    table = scored(written(EASYR1, "batch", options={"format_weight": 0.25}), both)
    assert table.values[:, 0].tolist() == [1, 0.25]
    assert {name: column.tolist() for name, column in table.details.items()} == {
        "part/format": [1, 1],
        "part/accuracy": [1, 0],
    }
    table = scored(written(EASYR1, "sequential", columns={"problem": "source"}), both)
    assert table.values[:, 0].tolist() == [0.5, 0.5] and table.details["part/accuracy"].tolist() == [1, 0]
    for name in ("old", "old_batch", "oldest"):
        assert values(written(EASYR1, name), both) == [1, 0], name


# --- signatures and settings that are refused -------------------------------------------------------------------------

ODD = """
def unknown(output, gold):
    return 1.0

def anything(**kwargs):
    return [float(len(kwargs["answer"])) + len(kwargs.get("response", ()))] * len(kwargs["completions"])

def needs(completions, trainer_state):
    return [0.0] * len(completions)

def plain(solution_str, ground_truth):
    return 0.0

def strange(solution_str, ground_truth, tokenizer):
    return 0.0

number = 5
"""


def test_unknown_signatures_name_the_known_ones(written, tmp_path):
    for name, settings, refused in [
        ("unknown", {}, r"\(output, gold\) is no known signature; known are .*TRL.*verl.*EasyR1"),
        ("anything", {}, "no known signature"),
        ("anything", {"style": "verl"}, "no signature of style verl"),
        ("number", {}, "is no function but 5"),
        ("missing", {}, "has no 'missing'; it has unknown, anything, needs, plain, strange"),
        ("strange", {}, "needs tokenizer, which nothing gives"),
        ("needs", {"options": {"depth": 3}}, "options: it takes no 'depth'; its parameters are completions, tr"),
        ("needs", {"columns": {"solution": "answer"}}, "columns: it takes no 'solution'"),
        ("plain", {"columns": {"solution_str": "answer"}}, "columns: 'solution_str' is an argument that every call"),
        ("anything", {"style": "trl", "columns": {"a": "id"}, "options": {"a": 1}}, "in options and in columns"),
        ("anything", {"style": "trl", "options": {"completions": 3}}, "every call fills"),
    ]:
        with pytest.raises(ValueError, match=refused) as error:
            Rewards({"part": written(ODD, name, **settings)})
        assert str(error.value).startswith("model.rewards.part: function ")
    assert values(written(ODD, "anything", style="trl"), group("a", "b")) == [2, 2]
    assert values(written(ODD, "anything", style="trl", columns={"response": "id"}), group("a", "b")) == [4, 4]
    with pytest.raises(RewardError, match=r"needs trainer_state, .*columns: \{trainer_state: answer\}"):
        values(written(ODD, "needs"), group("a"))
    with pytest.raises(RewardError, match="the sample has no 'gold'; it has answer, id, source"):
        values(written(ODD, "needs", columns={"trainer_state": "gold"}), group("a"))
    for function, refused in [
        (f"{tmp_path}/nowhere.py:f", "there is no file"),
        ("nowhere_at_all:f", "No module named 'nowhere_at_all'"),
    ]:
        with pytest.raises(ValueError, match=refused):
            Rewards({"part": Reward(kind="python", function=function)})


def test_a_file_that_cannot_be_imported_shows_its_traceback(written):
    with pytest.raises(ValueError, match="ZeroDivisionError") as error:
        Rewards({"part": written("def score(completions):\n    return [1]\n\nrate = 1 / 0\n", "score")})
    assert "rate = 1 / 0" in str(error.value) and "line 4" in str(error.value)


def test_functions_of_modules_and_files_are_imported_in_the_worker_only(tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("def count(text):\n    return len(text.split())\n")
    (package / "scores.py").write_text(
        "from .words import count\n\ndef score(solution_str, ground_truth):\n    return count(solution_str)\n"
    )
    (package / "alone.py").write_text(
        "from words import count\n\ndef score(solution_str, ground_truth):\n    return -count(solution_str)\n"
    )
    monkeypatch.chdir(tmp_path)
    rewards = {
        "module": Reward(kind="python", function="my_package.scores:score"),
        "file": Reward(kind="python", function="my_package/alone.py:score"),
    }
    with Rewards(rewards) as both:
        assert both.score([group("a b c", "d")]).values.tolist() == [[3, -3], [1, -1]]
    assert not any("my_package" in name or name == "words" for name in sys.modules)
