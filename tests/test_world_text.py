"""The embedded world in words: what is said is what the picture shows, and gold follows from the words alone."""

import re

import pytest

from lightning_vlm.data.world import SPLITS, Scene, WorldSource
from lightning_vlm.data.world.scene import Bar, Figure, Label
from lightning_vlm.data.world.source import _in_words
from lightning_vlm.models.embedded import COLOURS, PLURALS, SHAPES, build_tokenizer


def told_as(sample) -> str:
    (part,) = sample.messages[0]["content"]
    assert part["type"] == "text" and not sample.images
    return part["text"]


def gold(text: str) -> int:
    """The answer, read off the words; `None` matches every colour and shape."""
    scene, question = text.split(". ", 1)
    words = re.findall(r"[a-z]+|\d+", question)
    if question.startswith("how many"):
        colour = next((w for w in words if w in COLOURS), None)
        shape = next((SHAPES[PLURALS.index(w)] for w in words if w in PLURALS), None)
        figures = re.findall(r"(\w+) (\w+) at \d: \d", scene)
        return sum(colour in (None, c) and shape in (None, s) for c, s in figures)
    if " bar at " in scene:
        heights = {c: int(value) for c, value in re.findall(r"(\w+) bar at \d = (\d+)", scene)}
        asked = [heights[w] for w in words if w in heights]
        return sum(sign * v for sign, v in zip([1, 1, -1 if "minus" in words else 1], asked, strict=False))
    numbers = [int(n) for n in re.findall(r"(\d+) at \d: \d", scene)]
    if "angle" in words:
        return sum(numbers) if "exterior" in words else 180 - sum(numbers)
    return sum(numbers) * next((int(w) for w in words if w.isdigit()), 1)


def test_known_scenes_in_words():
    assert _in_words(Scene(figures=(Figure(0, 0, 2), Figure(2, 1, 13)))) == "red circle at 0: 2, blue square at 3: 1."
    assert _in_words(Scene(bars=(Bar(0, 7, 1), Bar(2, 10, 2)))) == "red bar at 1 = 7, blue bar at 2 = 10."
    labels = (Label("40", 1), Label("x", 12), Label("65", 15))
    expected = "a triangle with 40 at 0: 1, x at 3: 0, 65 at 3: 3."
    assert _in_words(Scene(labels=labels, triangle=0)) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_gold_follows_from_the_words_alone(split):
    for sample in WorldSource(split=split, size=400, seed=5, text_only=True):
        if sample.info["family"] != "caption":
            assert int(sample.answer) == gold(told_as(sample))


def test_only_the_picture_is_replaced():
    """Ids, questions, answers and rejected answers stay; the question comes behind the words."""
    settings = {"size": 200, "pairs": True}
    for shown, told in zip(WorldSource(**settings), WorldSource(**settings, text_only=True), strict=True):
        assert (shown.id, shown.answer, shown.rejected) == (told.id, told.answer, told.rejected)
        assert shown.chosen() == told.chosen() and shown.info["question"] == told.info["question"]
        assert told_as(told).endswith(f". {shown.messages[0]['content'][1]['text']}")


def test_all_words_are_in_the_closed_vocabulary():
    tokenizer = build_tokenizer()
    for sample in WorldSource(size=600, text_only=True):
        ids = tokenizer(told_as(sample), add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == told_as(sample)
