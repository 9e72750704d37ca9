"""Rewards made of named parts: values by hand, sums, files and settings that are refused."""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.metrics.captions import DocumentFrequencies, cider_d
from lightning_vlm.rewards import Group, Reward, RewardError, Rewards, RewardTable
from lightning_vlm.rollouts import Completion

NAN = math.nan


def said(content: str, tokens: int = 3) -> Completion:
    """A completion of that text and so many tokens."""
    return Completion(list(range(tokens)), content, True, [-1.0] * tokens, [-1.0] * tokens)


def asked(id: str = "s1", answer: str | None = "5", **info) -> Sample:
    return Sample(id, [message("user", text("What is 2 + 3?"))], answer=answer, source="sums", info=info)


def group(*texts: str, sample: Sample | None = None) -> Group:
    return Group(sample or asked(), [said(content) for content in texts])


def write(folder: Path, code: str, name: str, **settings) -> Reward:
    """Writes a file of functions and gives the setting for one of them."""
    path = folder / "my_rewards.py"
    path.write_text(textwrap.dedent(code))
    return Reward(kind="python", function=f"{path}:{name}", **settings)


def scored(reward: Reward, *groups: Group, workers: int = 1, **settings) -> RewardTable:
    """The table of that part alone, `part`."""
    with Rewards({"part": reward}, workers=workers, **settings) as rewards:
        return rewards.score(groups)


def values(*arguments, **settings) -> list[float]:
    return scored(*arguments, **settings).values[:, 0].tolist()


# --- values ----------------------------------------------------------------------------------------------------------


def test_parts_are_weighed_and_summed():
    """Accuracy 1, 0; format 0, 1; 16 and 10 tokens: −1/2, 0. Totals 1 − .5·2 = 0 and .1."""
    sample = asked()
    completions = [said(r"\boxed{5}", tokens=12), said("<think>no</think><answer>6</answer>", tokens=8)]
    rewards = {
        "accuracy": Reward(kind="accuracy", rule="exact"),
        "format": Reward(kind="format", weight=0.1),
        "overlong": Reward(kind="overlong", weight=2.0, ramp=8, limit=16),
    }
    table = Rewards(rewards).score([Group(sample, completions[:1]), Group(sample, completions[1:])])
    assert table.names == ("accuracy", "format", "overlong")
    assert table.values.dtype == torch.float64 and table.values.tolist() == [[1, 0, -0.5], [0, 1, 0]]
    assert table.totals.tolist() == [0.0, 0.1]
    assert table.timed_out == {"accuracy": 0, "format": 0, "overlong": 0} and table.details == {}


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("<think>a\nb</think>\n<answer>5</answer>", 1),
        (" <think></think><answer></answer>\n", 1),
        ("<think>a</think> so <answer>5</answer>", 0),
        ("<think>a</think><answer>5</answer> indeed", 0),
        ("<think>a</think><think>b</think><answer>5</answer>", 0),
        ("<think>a<answer>5</answer></think><answer>5</answer>", 0),
        ("<answer>5</answer>", 0),
        ("", 0),
    ],
)
def test_format_wants_one_block_of_each(content, value):
    assert values(Reward(kind="format"), group(content)) == [value]


def test_format_with_a_pattern_of_ones_own_matches_the_whole_and_is_cut_when_it_hangs():
    own = Reward(kind="format", pattern=r"(a|aa)+b|x.y", seconds=0.5, on_timeout=-1.0)
    with Rewards({"form": own}) as rewards:
        table = rewards.score([group("aab", "x\ny", "xyz", "a" * 60), group("b")])
    assert table.values[:, 0].tolist() == [1, 1, 0, -1, 0]
    assert table.timed_out == {"form": 1}


@pytest.mark.parametrize(
    ("tokens", "value"), [(1, 0), (48, 0), (49, -1 / 16), (56, -0.5), (63, -15 / 16), (64, -1), (65, -1), (999, -1)]
)
def test_overlong_is_a_ramp(tokens, value):
    """DAPO: 0 up to limit − ramp = 48, (48 − n)/16 up to the limit, −1 beyond; TRL's function agrees."""
    part = Reward(kind="overlong", ramp=16, limit=64)
    assert values(part, Group(asked(), [said("x", tokens)])) == [value]
    assert values(replace(part, limit=None), Group(asked(), [said("x", tokens)]), max_new_tokens=64) == [value]
    trl = pytest.importorskip("trl.rewards")
    assert trl.get_soft_overlong_punishment(64, 16)([[0] * tokens]) == [value]


@pytest.mark.parametrize(("tokens", "value"), [(100, 0), (75, -0.25), (110, -0.1), (200, -1), (900, -1), (0, -1)])
def test_length_is_the_distance_from_the_target(tokens, value):
    assert values(Reward(kind="length", target=100), Group(asked(), [said("x", tokens)])) == [pytest.approx(value)]


def test_accuracy_is_the_rules_score_and_counts_what_was_cut_off(monkeypatch):
    from lightning_vlm.metrics import grading_worker

    monkeypatch.setattr(grading_worker.grade_apart, "__kwdefaults__", {"seconds": 2.0})
    rewards = Rewards({"right": Reward(kind="accuracy", rule="geometry3k/freeform")})
    table = rewards.score([group(r"\boxed{10/2}", r"\boxed{9^{9^{9^{9^9}}}}", "5", r"\boxed{5.0}")])
    assert table.values[:, 0].tolist() == [1, 0, 0, 1]
    assert table.timed_out == {"right": 1}


def test_an_answer_that_cannot_be_graded_shows_the_sample():
    rewards = Rewards({"right": Reward(kind="accuracy", rule="exact")})
    with pytest.raises(RewardError, match=r"model\.rewards\.right: rule exact") as error:
        rewards.score([group("5"), group("7", sample=asked("s2", answer=None))])
    for shown in ("s2", "no gold answer", "'7'", "What is 2 + 3?"):
        assert shown in str(error.value)


CAPTIONS = {"a": ["a red cat on a mat", "the cat sits"], "b": ["a dog runs", "a brown dog is running"], "c": ["a bus"]}


def test_cider_has_fixed_frequencies(tmp_path):
    frequencies = DocumentFrequencies.from_references(CAPTIONS, tokenizer="python")
    frequencies.save(tmp_path / "frequencies.json")
    texts = ["a red cat on a mat", "the dog", ""]
    groups = [group(*texts, sample=asked(references=CAPTIONS["a"])), group("a bus", sample=asked(references=["a bus"]))]
    found = values(Reward(kind="cider", document_frequencies=str(tmp_path / "frequencies.json")), *groups)
    references = [CAPTIONS["a"]] * 3 + [["a bus"]]
    assert found == cider_d([*texts, "a bus"], references, frequencies).tolist()
    assert found[0] > found[1] > found[2] == 0
    with pytest.raises(RewardError, match=r"sample: +s1"):
        values(Reward(kind="cider", document_frequencies=str(tmp_path / "frequencies.json")), group("a cat"))


# --- reward models ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A tiny random reward model of one label, with a padding token and a chat template."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    from lightning_vlm.models.tiny import make_tiny

    folder = tmp_path_factory.mktemp("judge")
    make_tiny("qwen2_5_vl", folder / "vlm")
    tokenizer = AutoTokenizer.from_pretrained(folder / "vlm")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, num_labels=1, **sizes)
    config.pad_token_id = tokenizer.pad_token_id
    config.max_position_embeddings = 128
    model = Qwen2ForSequenceClassification(config)
    model.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return folder / "judge"


def pictured() -> Group:
    sample = Sample("p", [message("user", image(), text("What is it?"))], images=[None])
    return Group(sample, [said("a cat"), said("a very large dog, indeed; who knows?"), said("")])


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_reward_model_reads_prompt_and_completion(judge, tmp_path, templated, padded):
    """Batched, padded and sorted, each value is the model's own logit for its text alone."""
    import shutil

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = shutil.copytree(judge, tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(place)
    if not templated:
        tokenizer.chat_template = None
        for name in ("chat_template.jinja", "chat_template.json"):
            (place / name).unlink(missing_ok=True)
    if not padded:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    if not padded:
        model.config.pad_token_id = None
        model.save_pretrained(place)
    texts = ["a cat", "a very large dog, indeed; who knows?", ""]
    wanted = []
    for completion in texts:
        read = f"[user] What is it?<|im_end|>\n[assistant] {completion}<|im_end|>\n"
        if not templated:
            read = f"What is it?\n{completion}"
        ids = tokenizer(read, return_tensors="pt").input_ids
        with torch.no_grad():
            wanted.append(model(input_ids=ids).logits.item())
    found = values(Reward(kind="model", path=str(place), batch_size=2), pictured())
    assert found == pytest.approx(wanted, abs=1e-6)
    assert len(set(wanted)) == 3


def test_a_reward_model_that_is_none_is_refused(judge, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    with pytest.raises(ValueError, match=r"model\.rewards\.judge: .* no config\.json"):
        Rewards({"judge": Reward(kind="model", path=str(tmp_path))})
    import shutil

    place = shutil.copytree(judge, tmp_path / "headless")
    weights = load_file(place / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fill the classifier: score\.weight"):
        Rewards({"judge": Reward(kind="model", path=str(place))})
    config = AutoConfig.from_pretrained(place)
    config.num_labels = 2
    config.save_pretrained(place)
    with pytest.raises(ValueError, match="2 labels"):
        Rewards({"judge": Reward(kind="model", path=str(place))})


def test_a_text_longer_than_the_reward_model_reads_is_an_error(judge):
    with pytest.raises(RewardError, match="reads 1 to 128"):
        values(Reward(kind="model", path=str(judge)), group("word " * 200))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "acuracy"}, "unknown kind 'acuracy'; did you mean 'accuracy'"),
        ({"kind": "accuracy", "rule": "world/exakt"}, "did you mean 'world/exact'"),
        ({"kind": "accuracy", "rule": "coco/python"}, "scores a set of captions"),
        ({"kind": "format", "pattern": "("}, "no regular expression"),
        ({"kind": "format", "rule": "exact"}, "does not read 'rule'"),
        ({"kind": "length", "target": 5, "seconds": 1.0}, "does not read 'seconds'"),
        ({"kind": "length", "target": 0}, "target must be at least 1"),
        ({"kind": "overlong"}, "needs 'ramp'"),
        ({"kind": "overlong", "ramp": 9, "limit": 8}, "longer than limit"),
        ({"kind": "cider"}, "needs 'document_frequencies'"),
        ({"kind": "cider", "document_frequencies": "f", "tokenizer": "bert"}, "tokenizer is 'bert'"),
        ({"kind": "model"}, "needs 'path'"),
        ({"kind": "python"}, "needs 'function'"),
        ({"kind": "python", "function": "score"}, "names no function"),
        ({"kind": "python", "function": "a:f", "style": "openrlhf"}, "style is 'openrlhf'"),
        ({"kind": "python", "function": "a:f", "seconds": 0}, "seconds must be positive"),
        ({"kind": "python", "function": "a:f", "on_timeout": NAN}, "on_timeout must be a finite"),
        ({"kind": "length", "target": 5, "weight": math.inf}, "weight must be a finite"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Reward(**settings)
    assert str(error.value).startswith("model.rewards")


def test_parts_are_checked_before_anything_runs(tmp_path):
    single = tmp_path / "single.json"
    DocumentFrequencies.from_references({"a": ["a cat"]}, tokenizer="python").save(single)
    for rewards, settings, refused in [
        ({}, {}, "is empty"),
        ({"a/b": Reward(kind="format")}, {}, "no name for a part"),
        ({"form": Reward(kind="format")}, {"workers": 0}, "workers must be at least 1"),
        ({"long": Reward(kind="overlong", ramp=4)}, {}, "needs limit"),
        ({"long": Reward(kind="overlong", ramp=40)}, {"max_new_tokens": 32}, "longer than the longest completion, 32"),
        ({"long": Reward(kind="overlong", ramp=4, limit=36)}, {"max_new_tokens": 32}, "no completion of at most 32"),
        ({"caption": Reward(kind="cider", document_frequencies="nowhere.json")}, {}, "no file nowhere.json"),
        ({"caption": Reward(kind="cider", document_frequencies=str(single))}, {}, "counts 1 images"),
    ]:
        with pytest.raises(ValueError, match=refused) as error:
            Rewards(rewards, **settings)
        assert str(error.value).startswith("model.rewards")


def test_nothing_to_score_is_an_empty_table():
    rewards = Rewards({"a": Reward(kind="format"), "b": Reward(kind="accuracy", rule="exact")})
    for groups in ([], [Group(asked(), [])]):
        table = rewards.score(groups)
        assert table.values.shape == (0, 2) and table.totals.shape == (0,)
