"""COCO captions: cleaning, tokenizers, BLEU, METEOR, ROUGE-L, CIDEr-D by hand and against pycocoevalcap, errors."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter

import numpy as np
import pytest

from lightning_vlm.metrics import statistics
from lightning_vlm.metrics.captions import (
    DocumentFrequencies,
    cider_d,
    clean_caption,
    java,
    ptb_tokenize,
    python_tokenize,
    require_java,
    score_captions,
    spice,
    topk_cider,
)
from lightning_vlm.metrics.captions.cider import cider_of_tokens

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on PATH")
HOSTILE = ["\n", "\r", "\r\n", "\t", "\x00", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x7f", "\x85", "\xa0"]
HOSTILE += ["\u2028", "\u2029", "\u3000", "\ud83d"]

WORDS = [
    ("A dog's bowl; it isn't full.", "a dog 's bowl it is n't full"),
    ("I can't, won't and cannot!", "i ca n't wo n't and can not"),
    ("THEY'RE here, he'd've said", "they 're here he 'd 've said"),
    ("The boys' toys and a 'stop' sign", "the boys toys and a stop sign"),
    ('A "quoted" word, “curly” and ‘single’', "a quoted word curly and single"),
    ("a man (left) and [one] {more}", "a man -lrb- left -rrb- and -lsb- one -rsb- -lcb- more -rcb-"),
    ("A black-and-white close-up -- of a t-shirt - folded", "a black-and-white close-up of a t-shirt folded"),
    ("At 5:30 p.m. on Main St. in the U.S.A.", "at 5:30 p.m. on main st. in the u.s.a."),
    ("1,000 birds, 3.5 miles at 12:00pm for $5.", "1,000 birds 3.5 miles at 12:00 pm for $ 5"),
    ("a cat... and a dog..", "a cat and a dog"),
    ("What?! A cat?", "what ?! a cat"),
    ("and/or 50mph in the '90s at 100% & more", "and/or 50mph in the '90s at 100 % & more"),
    ("o'clock rock 'n' roll don’t", "o'clock rock 'n' roll do n't"),
    ("Café — naïve… 🙂", "café naïve"),
    ("...", ""),
    ("", ""),
]


def toy(n: int = 12, seed: int = 0) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions of few words, so that n-grams of all orders recur."""
    draw = random.Random(seed)

    def caption() -> str:
        return " ".join(draw.choices(["cat", "dog", "red", "a", "on", "mat"], k=draw.randint(1, 7)))

    ids = [f"image{i}" for i in range(n)]
    return {id: caption() for id in ids}, {id: [caption() for _ in range(draw.randint(1, 4))] for id in ids}


@pytest.fixture(scope="module")
def coco(real_data):
    records = json.loads((real_data / "coco" / "magic_result.json").read_text())
    return {r["image_name"]: r["prediction"] for r in records}, {r["image_name"]: r["captions"] for r in records}


@pytest.fixture(scope="module")
def coco_tokens(coco):
    predictions, references = coco
    groups = {id: python_tokenize(group) for id, group in references.items()}
    return dict(zip(predictions, python_tokenize(list(predictions.values())), strict=True)), groups


@pytest.fixture(scope="module")
def coco_scores(coco):
    require_java()
    return score_captions(*coco)


@pytest.mark.parametrize("blank", HOSTILE)
def test_whitespace_and_control_characters_become_one_space(blank):
    assert clean_caption(f"{blank} a{blank}{blank}cat {blank}") == "a cat"


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_python_tokenizer(text, words):
    assert python_tokenize([text]) == [words]


@needs_java
def test_ptb_tokenizer_gives_the_same_words_and_no_caption_depends_on_its_neighbours():
    texts = [text for text, _ in WORDS] + ["Plan B.", "a dog", "see No.", "5 men"]
    forward = ptb_tokenize(texts)
    assert forward[: len(WORDS)] == [words for _, words in WORDS]
    assert ptb_tokenize(texts[::-1])[::-1] == forward
    assert ptb_tokenize([]) == []


@needs_java
def test_no_character_shifts_a_caption():
    characters = [chr(c) for c in range(0x10000)] + HOSTILE
    lines = ptb_tokenize([f"left {c} mid{c}dle {c} right" for c in characters])
    assert len(lines) == len(characters) and all(line.startswith("left ") and line.endswith(" right") for line in lines)


@pytest.mark.parametrize("blank", HOSTILE)
def test_a_hostile_caption_leaves_the_scores_of_others_alone(blank):
    predictions, references = toy()
    clean = score_captions(predictions | {"image3": "a red cat"}, references, tokenizer="python")
    dirty = score_captions(predictions | {"image3": f"a red{blank}cat{blank}"}, references, tokenizer="python")
    assert dirty.per_image == clean.per_image and dirty.corpus == clean.corpus


def test_bleu_and_rouge_by_hand():
    predictions = {"x": "a red cat", "y": "dog dog"}
    scores = score_captions(predictions, {"x": ["a red dog runs", "cat"], "y": ["dog"]}, tokenizer="python")
    assert scores.rule == "coco/python" and scores.empty == 0 and "METEOR" not in scores.corpus
    # Unigrams 3/3 and, clipped, 1/2; bigrams 1/2 and 0/1; lengths 3 + 2, closest references 4 + 1: no brevity penalty.
    assert scores.corpus["Bleu_1"] == pytest.approx(4 / 5)
    assert scores.corpus["Bleu_2"] == pytest.approx(math.sqrt(4 / 5 * 1 / 3))
    assert scores.corpus["Bleu_3"] == pytest.approx(0, abs=1e-4)
    assert scores.per_image["x"]["Bleu_1"] == pytest.approx(math.exp(1 - 4 / 3))
    # x: precision 2/3 from the first, recall 1 from the second reference; y: 1/2 and 1. F with β² = 1.44.
    x, y = 2.44 * (2 / 3) / (1 + 1.44 * 2 / 3), 2.44 * 0.5 / (1 + 1.44 * 0.5)
    assert [scores.per_image[id]["ROUGE_L"] for id in "xy"] == pytest.approx([x, y])
    assert scores.corpus["ROUGE_L"] == pytest.approx((x + y) / 2)


def test_cider_by_hand():
    # 2 images, no n-gram in both: every weight is log 2 times its count. "red cat" has the caption's two words and its
    # bigram, out of two references: orders 1 and 2 give cosine 1 with the first, 0 with the second.
    scores = score_captions(
        {"x": "red cat", "y": "a dog runs off"},
        {"x": ["red cat", "blue bird"], "y": ["a dog runs off"]},
        tokenizer="python",
    )
    assert scores.per_image["x"]["CIDEr"] == pytest.approx(10 * (1 + 1) / 4 / 2)
    assert scores.per_image["y"]["CIDEr"] == pytest.approx(10)
    # Of "cat cat" one "cat" counts: min(2, 1) · 1 / (2 · √2); the lengths are equal.
    clipped = score_captions({"x": "cat cat", "y": "dog"}, {"x": ["red cat"], "y": ["dog"]}, tokenizer="python")
    assert clipped.per_image["x"]["CIDEr"] == pytest.approx(10 / 4 / (2 * math.sqrt(2)))
    # A word in all images weighs nothing.
    assert score_captions({"x": "a", "y": "a"}, {"x": ["a"], "y": ["a"]}, tokenizer="python").corpus["CIDEr"] == 0


def naive_cider(caption: str, group: list[str], everything: list[list[str]]) -> float:
    """Straight from the definition, counting anew wherever it needs a count."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def tfidf(text, n):
        df = {g: sum(any(g in grams(t, n) for t in refs) for refs in everything) for g in grams(text, n)}
        return {g: c * (math.log(len(everything)) - math.log(max(1, df[g]))) for g, c in grams(text, n).items()}

    total = 0.0
    for n in (1, 2, 3, 4):
        for text in group:
            own, other = tfidf(caption, n), tfidf(text, n)
            norms = math.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in other.values()))
            dot = sum(min(own[g], other[g]) * other[g] for g in own if g in other)
            gap = sum(grams(caption, 2).values()) - sum(grams(text, 2).values())
            total += math.exp(-(gap**2) / 72) * (dot / norms if norms else 0)
    return 10 * total / 4 / len(group)


def test_cider_against_the_definition_and_the_package():
    from pycocoevalcap.cider.cider import Cider

    predictions, references = toy(20)
    scores = score_captions(predictions, references, tokenizer="python")
    own = [scores.per_image[id]["CIDEr"] for id in predictions]
    naive = [naive_cider(predictions[id], references[id], list(references.values())) for id in predictions]
    package = Cider().compute_score(references, {id: [text] for id, text in predictions.items()})[1]
    assert np.abs(np.subtract(own, naive)).max() < 1e-9 and np.abs(own - package).max() < 1e-9
    fixed = DocumentFrequencies.from_references(references, tokenizer="python")
    assert cider_d(list(predictions.values()), list(references.values()), fixed).tolist() == own


def test_rewards_do_not_depend_on_the_batch():
    predictions, references = toy(20)
    fixed = DocumentFrequencies.from_references(references, tokenizer="python")
    texts, groups = [*predictions.values(), ""], [*references.values(), ["cat"]]
    together = cider_d(texts, groups, fixed)
    assert [cider_d([t], [g], fixed)[0] for t, g in zip(texts, groups, strict=True)] == together.tolist()
    assert together[-1] == 0
    assert cider_d(texts[::-1], groups[::-1], fixed)[::-1].tolist() == together.tolist()


def test_document_frequencies_travel(tmp_path):
    _, references = toy()
    fixed = DocumentFrequencies.from_references({"x": ["a cat", "a dog"], "y": ["a cat"]}, tokenizer="python")
    assert fixed.images == 2 and fixed.counts == {("a",): 2, ("cat",): 2, ("a", "cat"): 2}
    fixed = DocumentFrequencies.from_references(references, tokenizer="python")
    fixed.save(tmp_path / "df.json")
    assert DocumentFrequencies.load(tmp_path / "df.json", tokenizer="python") == fixed
    with pytest.raises(ValueError, match=r"counted with tokenizer 'python', not 'ptb'"):
        DocumentFrequencies.load(tmp_path / "df.json")
    (tmp_path / "df.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no document frequencies"):
        DocumentFrequencies.load(tmp_path / "df.json")
    with pytest.raises(ValueError, match="of 1 image"):
        cider_d(["a"], [["a"]], DocumentFrequencies.from_references({"x": ["a"]}, tokenizer="python"))


def test_oracle_and_mean_of_k():
    predictions, references = toy()
    worse = {id: [text, "mat mat mat"] for id, text in predictions.items()}
    sets = [{id: texts[i] for id, texts in worse.items()} for i in (0, 1)]
    parts = [score_captions(texts, references, tokenizer="python").per_image.values() for texts in sets]
    columns = [[row["CIDEr"] for row in part] for part in parts]
    found = topk_cider(worse, references, tokenizer="python")
    assert found == pytest.approx(np.array(columns).T)
    with pytest.raises(ValueError, match="from 1 to 2 captions"):
        topk_cider(worse | {"image0": ["a"]}, references, tokenizer="python")
    with pytest.raises(ValueError, match=r"images 1 \('image0'\): expected a non-empty list of captions"):
        topk_cider(worse | {"image0": "a cat"}, references, tokenizer="python")


def test_intervals_agree_with_a_bootstrap_of_whole_sets():
    from pycocoevalcap.bleu.bleu import Bleu

    predictions, references = toy(8)
    scores = score_captions(predictions, references, tokenizer="python")
    ids, drawn = list(predictions), []
    for counts in np.concatenate(list(statistics.resample_counts(8, draws=200, seed=3))):
        picked = [id for id, n in zip(ids, counts, strict=True) for _ in range(int(n))]
        groups = {str(i): references[id] for i, id in enumerate(picked)}
        bleu, _ = Bleu(4).compute_score(groups, {str(i): [predictions[id]] for i, id in enumerate(picked)}, verbose=0)
        drawn.append([*bleu, *(np.mean([scores.per_image[id][m] for id in picked]) for m in ("ROUGE_L", "CIDEr"))])
    intervals = scores.intervals(draws=200, seed=3)
    for i, name in enumerate(["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]):
        assert intervals[name] == pytest.approx(statistics.percentile_interval([row[i] for row in drawn]), abs=1e-12)
        assert intervals[name][0] < scores.corpus[name] < intervals[name][1]
    assert scores.intervals(draws=50) == scores.intervals(draws=50) != scores.intervals(draws=50, seed=1)


@needs_java
def test_meteor_by_hand_with_empty_captions_in_between():
    predictions = {"same": "A man rides a horse.", "none": " \r", "half": "dog piano", "dots": "...", "far": "zebra"}
    references = {"same": ["A man rides a horse"], "none": ["a cat"], "half": ["dog window", "tree"]}
    references |= {"dots": ["a bird"], "far": ["a cat"]}
    scores = score_captions(predictions, references, allow_empty=True)
    assert scores.rule == "coco/ptb" and scores.empty == 1
    # half: of two content words one matches: P = R = F = 1/2; one chunk of one word: the penalty is .6.
    expected = {"same": 1.0, "none": 0.0, "half": 0.5 * 0.4, "dots": 0.0, "far": 0.0}
    assert {id: row["METEOR"] for id, row in scores.per_image.items()} == pytest.approx(expected)
    assert scores.per_image["same"]["Bleu_4"] == pytest.approx(1)
    assert all(abs(value) < 1e-4 for id in ("none", "dots", "far") for value in scores.per_image[id].values())


@pytest.mark.parametrize(
    ("predictions", "references", "says"),
    [
        ({}, {"x": ["a"]}, "no predictions to score"),
        ({"x": "a", "y": "b"}, {"x": ["a"]}, r"predictions without references: 1 \('y'\)\. Score the same"),
        (
            {"x": "a"},
            {"x": ["a"], **{f"i{n}": ["a"] for n in range(5)}},
            r"references without a prediction: 5 \('i0', 'i1', 'i2', …\)\. Score",
        ),
        (
            {"x": "a", "y": "b"},
            {"x": ["a"], "z": ["a"]},
            r"without references: 1 \('y'\); references without a prediction",
        ),
        ({"x": "a"}, {"x": []}, r"images 1 \('x'\): expected a non-empty list of reference captions, got \[\]"),
        ({"x": "a"}, {"x": "a cat"}, r"expected a non-empty list of reference captions, got 'a cat'"),
        ({"x": "a"}, {"x": ["a", " \r"]}, r"images 1 \('x'\): a reference is empty or no string"),
        ({"x": "a"}, {"x": ["a", 5]}, "a reference is empty or no string"),
        ({"x": None}, {"x": ["a"]}, r"images 1 \('x'\): the prediction is no string but None"),
        ({"x": math.nan}, {"x": ["a"]}, "no string but nan"),
        ({"x": ["a"]}, {"x": ["a"]}, r"no string but \['a'\]"),
        (
            {"x": "\u2028 ", "y": "a"},
            {"x": ["a"], "y": ["a"]},
            r"images 1 \('x'\): the prediction is empty; allow_empty",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(predictions, references, says):
    with pytest.raises(ValueError, match=says) as err:
        score_captions(predictions, references, tokenizer="python")
    assert "\n" not in str(err.value)


def test_other_refusals():
    with pytest.raises(ValueError, match="unknown tokenizer 'PTB'"):
        score_captions({"x": "a"}, {"x": ["a"]}, tokenizer="PTB")
    fixed = DocumentFrequencies.from_references(toy()[1], tokenizer="python")
    for captions, references, says in (
        (["a", "b"], [["a"]], "2 captions but 1 lists of references"),
        (["a"], ["a cat"], "expected a non-empty list of reference captions"),
        ([None], [["a cat"]], "the first is None"),
    ):
        with pytest.raises(ValueError, match=says):
            cider_d(captions, references, fixed)


def test_without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (require_java, lambda: score_captions({"x": "a"}, {"x": ["a"]}), lambda: ptb_tokenize(["a"])):
        with pytest.raises(ValueError, match=r"no `java` on PATH.*default-jre-headless.*coco/python") as err:
            call()
        assert "\n" not in str(err.value)
    assert score_captions({"x": "a"}, {"x": ["a"]}, tokenizer="python").rule == "coco/python"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo 'Picked up JAVA_TOOL_OPTIONS' >&2; echo 'Error: no memory' >&2; exit 3",
            "exit code 3: Error: no memory",
        ),
        ("exec /bin/sleep 60", "no answer within"),
        ("echo a; echo A", "gave 2 lines for 4: captions would be mixed up"),
        ("echo a; echo b; echo c; echo d", "mixed up"),
    ],
)
def test_a_java_that_fails(monkeypatch, tmp_path, script, says):
    (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if "sleep" in script:
        monkeypatch.setattr(java, "_START", 0.5)
    with pytest.raises(RuntimeError, match=says):
        ptb_tokenize(["a cat", "a dog"])


def test_spice_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(spice, "package_file", lambda *parts: tmp_path)
    (tmp_path / "stanford-corenlp-3.6.0.jar").touch()
    with pytest.raises(ValueError, match=r"SPICE needs stanford-corenlp-3\.6\.0-models\.jar, .* Java below 16") as err:
        score_captions({"x": "a"}, {"x": ["a"]}, tokenizer="python", spice=True)
    assert str(tmp_path) in str(err.value) and "\n" not in str(err.value)


@pytest.mark.real_data
@needs_java
def test_real_captions_score_as_published(coco_scores):
    expected = {"Bleu_1": 0.568, "Bleu_2": 0.358, "Bleu_3": 0.214, "Bleu_4": 0.129}
    expected |= {"METEOR": 0.174, "ROUGE_L": 0.399, "CIDEr": 0.493}
    assert {name: round(value, 3) for name, value in coco_scores.corpus.items()} == expected
    assert list(coco_scores.corpus) == list(expected) and len(coco_scores.per_image) == 4982
    intervals = coco_scores.intervals(draws=1000)
    assert all(low < coco_scores.corpus[name] < high for name, (low, high) in intervals.items())


@pytest.mark.real_data
@needs_java
def test_both_tokenizers_agree_on_real_captions(coco, coco_tokens):
    predictions, references = coco
    assert ptb_tokenize(list(predictions.values())) == list(coco_tokens[0].values())
    texts = [text for group in references.values() for text in group]
    assert ptb_tokenize(texts) == [text for group in coco_tokens[1].values() for text in group]


@pytest.mark.real_data
@needs_java
def test_every_metric_equals_the_package_on_real_captions(coco_scores, coco_tokens):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    captions, groups = coco_tokens
    wrapped = {id: [text] for id, text in captions.items()}
    bleu, by_image = Bleu(4).compute_score(groups, wrapped, verbose=0)
    columns = dict(zip([f"Bleu_{n}" for n in range(1, 5)], zip(bleu, by_image, strict=True), strict=True))
    columns |= {"ROUGE_L": Rouge().compute_score(groups, wrapped), "CIDEr": Cider().compute_score(groups, wrapped)}
    for name, (corpus, rows) in columns.items():
        assert coco_scores.corpus[name] == pytest.approx(corpus, abs=1e-12)
        own = [row[name] for row in coco_scores.per_image.values()]
        assert np.abs(np.subtract(own, rows)).max() < 1e-9

    some = list(captions)[:300]
    corpus, rows = Meteor().compute_score({id: groups[id] for id in some}, {id: wrapped[id] for id in some})
    assert [coco_scores.per_image[id]["METEOR"] for id in some] == pytest.approx(rows, abs=1e-12)
    assert java.meteor_score(coco_scores._sums["METEOR"][:300].sum(axis=0)) == pytest.approx(corpus, abs=1e-12)


@pytest.mark.real_data
def test_cider_depends_on_the_set_and_the_tokenizer(coco, coco_tokens):
    def cider(captions, groups, ids):
        refs = [groups[id] for id in ids]
        frequencies = DocumentFrequencies.of_tokens(refs, "python")
        return round(cider_of_tokens([captions[id] for id in ids], refs, frequencies).mean(), 3)

    ids = list(coco[0])
    subsets = {n: cider(*coco_tokens, random.Random(0).sample(ids, n)) for n in (10, 100, 500, len(ids))}
    assert subsets == {10: 0.888, 100: 0.637, 500: 0.526, 4982: 0.493}
    assert cider(*coco, ids) == 0.342  # words as they stand between spaces
