"""MathVista: the official rule against what was published, and extraction by rules alone."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from lightning_vlm.metrics.mathvista import extract_by_rules, official_correct, official_prediction

# The system with its older reading of integers; all others fit the current one too.
SYSTEMS = {
    "bard/output_bard.json": True,
    "gpt4/output_gpt4.json": False,
    "gpt4/output_gpt4_2shot_code.json": True,
    "gpt4/output_gpt4_2shot_solution.json": False,
    "llava/output_llava_llama_2_13b.json": True,
    "random/output_frequent_guess.json": False,
    "random/output_random_guess.json": False,
}
CHOICES = ["6cm", "7cm", "4cm", "5cm"]


def multi_choice(choices=CHOICES):
    return {"question_type": "multi_choice", "answer_type": "text", "choices": choices, "precision": None}


def free_form(answer_type, precision=None):
    return {"question_type": "free_form", "answer_type": answer_type, "choices": None, "precision": precision}


def question(item):
    return {name: item[name] for name in ("question_type", "answer_type", "choices", "precision")}


def published(real_data, system):
    return json.loads((real_data / "mathvista" / "results" / system).read_text())


# --- the official rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extraction", "asked", "prediction"),
    [
        ("(B) 7cm", multi_choice(), "7cm"),
        ("B", multi_choice(), "7cm"),
        (" (b) ", multi_choice(), "7cm"),
        ("(c) or (a)", multi_choice(), "4cm"),
        ("4 cm", multi_choice(), "4cm"),
        ("(E)", multi_choice(), "6cm"),  # no such option: least edit distance, the first of several
        ("(E)", multi_choice(["Yes", "Elm"]), "Elm"),
        ("b", multi_choice(), "6cm"),  # a letter alone must be a capital
        ("", multi_choice(["No", "Yes"]), "No"),
        (None, multi_choice(["None", "Some"]), "None"),
        (4, multi_choice(["3", "4"]), "4"),
        ("5", free_form("integer"), "5"),
        ("5.9", free_form("integer"), "5"),
        ("-0.5", free_form("integer"), "0"),
        ("1e3", free_form("integer"), "1000"),
        ("five", free_form("integer"), None),
        ("1,000", free_form("integer"), None),
        ("inf", free_form("integer"), None),
        ("nan", free_form("integer"), None),
        (None, free_form("integer"), None),
        ("1.25", free_form("float", 1), "1.2"),
        ("1.2", free_form("float", 2), "1.2"),
        ("3", free_form("float", 2), "3.0"),
        ("3.14 cm", free_form("float", 2), None),
        ("3.14", free_form("float", None), None),
        ([1, 2], free_form("list"), "[1, 2]"),
        ("[1,2]", free_form("list"), "[1,2]"),
    ],
)
def test_official_prediction(extraction, asked, prediction):
    assert official_prediction(extraction, **asked) == prediction


def test_the_older_releases_read_integers_by_int():
    asked = free_form("integer")
    assert official_prediction("5", **asked, legacy_integers=True) == "5"
    assert official_prediction("5.0", **asked, legacy_integers=True) is None
    assert official_prediction("5.0", **asked) == "5"


def test_correct_is_equal_as_a_string():
    assert official_correct("1.20", "1.20")
    assert not official_correct("1.2", "1.20")
    assert not official_correct(None, "5")


def test_questions_that_cannot_be_scored_are_errors():
    with pytest.raises(ValueError, match="needs its options"):
        official_prediction("A", **multi_choice(None))
    with pytest.raises(ValueError, match="unknown answer_type 'number'"):
        official_prediction("5", **free_form("number"))


@pytest.mark.real_data
@pytest.mark.parametrize("system", SYSTEMS)
def test_published_predictions_come_out_item_for_item(real_data, system):
    items = published(real_data, system)
    assert len(items) == 1000
    for pid, item in items.items():
        legacy = {"legacy_integers": SYSTEMS[system]}
        prediction = official_prediction(item["extraction"], **question(item), **legacy)
        assert prediction == item["prediction"], pid
        assert official_correct(prediction, item["answer"]) == item["true_false"], pid


@pytest.mark.real_data
def test_which_reading_of_integers_decides_few_items(real_data):
    """How many items each reading of integers makes right otherwise than published."""
    others = {}
    for system in SYSTEMS:
        for legacy in (False, True):
            others[system, legacy] = sum(
                official_correct(
                    official_prediction(item["extraction"], **question(item), legacy_integers=legacy), item["answer"]
                )
                != item["true_false"]
                for item in published(real_data, system).values()
            )
    assert {key: count for key, count in others.items() if count} == {("gpt4/output_gpt4_2shot_code.json", False): 10}


@pytest.mark.real_data
@pytest.mark.parametrize("system", SYSTEMS)
def test_published_scores_come_out(real_data, system):
    right, total = defaultdict(int), defaultdict(int)
    for item in published(real_data, system).values():
        legacy = {"legacy_integers": SYSTEMS[system]}
        correct = official_correct(official_prediction(item["extraction"], **question(item), **legacy), item["answer"])
        groups = {("average", "")} | {(name, item[name]) for name in ("question_type", "answer_type")}
        for name, values in item["metadata"].items():
            groups |= {(name, value) for value in (values if isinstance(values, list) else [values])}
        for group in groups:
            right[group] += correct
            total[group] += 1
    scores = json.loads((real_data / "mathvista" / "results" / system.replace("output_", "scores_")).read_text())
    compared = 0
    for name, table in scores.items():
        for value, score in ({"": table} if name == "average" else table).items():
            assert (right[name, value], total[name, value]) == (score["correct"], score["total"]), (name, value)
            assert float(score["accuracy"]) == pytest.approx(100 * right[name, value] / total[name, value], abs=0.006)
            compared += 1
    assert compared > 50


# --- by rules alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "asked", "prediction"),
    [
        ("The answer is B because this is a right triangle.", multi_choice(), "7cm"),
        ("The correct answer is **(B)**, 7cm.\n\nI hope this helps!", multi_choice(), "7cm"),
        ("7 cm", multi_choice(), "7cm"),
        ("So AC is twice that.\n\nC", multi_choice(), "4cm"),
        (r"AC = 2 \cdot 3 = \boxed{6}", multi_choice(), "6cm"),
        ("It is about 6.9 cm long.", multi_choice(), None),
        ("The question does not provide enough information to answer it.", multi_choice(), None),
        ("N/A", multi_choice(["Yes", "No"]), None),
        ("18", multi_choice(["9", "12", "18", "18"]), "18"),
        ("Yes, it has been cut.", multi_choice(["Yes", "No"]), "Yes"),
        ("The answer is 5.", free_form("integer"), "5"),
        ("5", free_form("integer"), "5"),
        ("5.0", free_form("integer"), "5"),
        ("So 10 - 2 - 3 = **5 objects** are left, of the 10 objects.", free_form("integer"), "5"),
        ("There are three bars with values smaller than 6.", free_form("integer"), "3"),
        ("They add up to 1,234 miles in total, in the 2nd week.", free_form("integer"), "1234"),
        ("The sum is 7.\n\n| x | y |\n| 1 | 2 |", free_form("integer"), "7"),
        ("She had 7 of them.\n\n* 3 red ones\n* 4 blue ones", free_form("integer"), "7"),
        ("The answer is not 5.", free_form("integer"), None),
        ("Without the figure, it is impossible to find f(4) or 7.", free_form("integer"), None),
        ("The question does not provide the 3 numbers.", free_form("integer"), None),
        ("", free_form("integer"), None),
        ("So the spring is compressed by 0.26 m.", free_form("float", 1), "0.3"),
        (r"Hence $d = \frac{1}{4}$.", free_form("float", 2), "0.25"),
        (r"\boxed{1.2 \times 10^{3}}", free_form("float", 1), "1200.0"),
        ("The peaks were in [2014,2016].", free_form("list"), "[2014, 2016]"),
        (r"First [1, 2]. Then $\left[ -1, 2.5 \right]$.", free_form("list"), "[-1, 2.5]"),
        ("Between 2014 and 2016.", free_form("list"), None),
    ],
)
def test_rules(response, asked, prediction):
    assert extract_by_rules(response, **asked) == prediction


def test_a_number_with_the_unit_goes_first():
    response = "He was 10 years old when, in 1955, they met."
    assert extract_by_rules(response, **free_form("integer"), unit="years") == "10"
    assert extract_by_rules(response, **free_form("integer")) == "1955"


@pytest.mark.real_data
def test_the_rules_agree_with_the_judge_of_the_release(real_data):
    """Of the responses from which an answer is extracted, and of bare answers all."""
    agreement = {}
    for system in SYSTEMS:
        found = []
        for item in published(real_data, system).values():
            prediction = extract_by_rules(item["response"], **question(item), unit=item["unit"])
            if prediction is not None:
                found.append(official_correct(prediction, item["answer"]) == item["true_false"])
        agreement[system] = sum(found) / len(found)
    assert agreement["random/output_random_guess.json"] == agreement["random/output_frequent_guess.json"] == 1
    assert agreement["bard/output_bard.json"] > 0.99
    assert agreement["gpt4/output_gpt4.json"] > 0.99
    assert agreement["gpt4/output_gpt4_2shot_solution.json"] > 0.99
    assert agreement["llava/output_llava_llama_2_13b.json"] > 0.97
