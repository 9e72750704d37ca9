"""What a sample asks for: penalties, clarity of pictures, words of questions, scorers by name."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lightning_vlm.data.schema import BadSample, Sample, image, message, text
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.distill import Weights, min_max, penalty, score_samples, scorer_of
from lightning_vlm.distill.clarity import clarity, resolved_detail
from lightning_vlm.distill.questions import (
    asked,
    demand_of,
    difficulty_of,
    integration_of,
    necessity_of,
    refers_to_picture,
)
from lightning_vlm.distill.scorers import REGISTRY, raw_scores


def sample(question: str, *images, id: str = "s") -> Sample:
    return Sample(id, [message("user", *(image() for _ in images), text(question))], images=list(images))


# --- penalty ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, weights, value",
    [
        ((0, 0, 0), Weights(), 2.0),  # exp(ln 2 · 1)
        ((1, 1, 1), Weights(), 1.0),
        ((0.5, 0.5, 0.5), Weights(), math.sqrt(2)),
        ((1, 0, 0.5), Weights(), math.sqrt(2)),  # (1 + 0 + .5) / 3 = ½
        ((1, 0, 0), Weights(beta=0, gamma=0), 1.0),  # the picture alone counts
        ((0, 1, 0), Weights(beta=2, gamma=1), math.sqrt(2)),  # (0 + 2 + 0) / 4 = ½
        ((0, 0, 0), Weights(alpha=1), 2.0),  # e, cut at 2
        ((0.5, 0.5, 0.5), Weights(alpha=1), math.exp(0.5)),
        ((0, 0, 0), Weights(alpha=0), 1.0),
    ],
)
def test_penalty_by_hand(scores, weights, value):
    assert penalty(*scores, weights) == pytest.approx(value, rel=1e-12)


def test_penalty_refuses_what_is_no_score():
    with pytest.raises(ValueError, match=r"vision score must lie in \[0, 1\], got 1.2"):
        penalty(1.2, 0, 0)
    with pytest.raises(ValueError, match="beta must be a number of at least 0, got -1"):
        Weights(beta=-1)


def test_min_max():
    assert min_max([2, 4, 3]) == [0, 1, 0.5]
    assert min_max([7, 7]) == [0.5, 0.5] and min_max([]) == []
    with pytest.raises(ValueError, match="finite, got nan"):
        min_max([1, math.nan])


# --- clarity ---------------------------------------------------------------------------------------------------------


def wave(side: int, half_cycles: int) -> Image.Image:
    """Grey waves across a square picture."""
    across = 128 + 100 * np.cos(math.pi * (np.arange(side) + 0.5) * half_cycles / side)
    return Image.fromarray(np.broadcast_to(across, (side, side)).round().astype(np.uint8)).convert("RGB")


def drawing(width: int = 320, height: int = 240) -> Image.Image:
    """A few thin lines on white."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.polygon([(40, 200), (280, 180), (120, 30)], outline="black", width=2)
    draw.text((20, 205), "A", fill="black")
    return picture


def test_detail_of_a_wave_is_its_cycles():
    """One frequency: D is the number of whole waves across the picture, whatever its pixels."""
    assert resolved_detail(wave(256, 64)) == pytest.approx(32, rel=0.01)
    assert resolved_detail(wave(512, 64)) == pytest.approx(32, rel=0.01)
    assert clarity([wave(256, 64)]) == pytest.approx(math.log2(33), rel=0.01)


def test_detail_has_no_unit_of_contrast_and_none_where_nothing_is():
    faint = drawing().point(lambda value: 155 + value * 100 // 255)
    assert resolved_detail(faint) == pytest.approx(resolved_detail(drawing()), rel=0.03)
    assert resolved_detail(Image.new("RGB", (40, 30), (9, 200, 77))) == 0
    assert clarity([]) == 0


def test_blank_margins_do_not_punish_a_line_drawing():
    """The plain variance of the Laplacian falls by the share of white; the frequency of the edges does not."""
    wide = Image.new("RGB", (640, 480), "white")
    wide.paste(drawing(), (160, 120))
    assert resolved_detail(wide) == pytest.approx(2 * resolved_detail(drawing()), rel=0.05)  # per pixel the same
    blurred_noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8))
    blurred_noise = blurred_noise.filter(ImageFilter.GaussianBlur(3))
    assert resolved_detail(drawing()) > 2 * resolved_detail(blurred_noise)


def test_the_least_clear_picture_counts():
    blurred = drawing().filter(ImageFilter.GaussianBlur(3))
    assert clarity([drawing(), blurred]) == clarity([blurred]) < clarity([drawing()])


def _worse(picture: Image.Image) -> list[Image.Image]:
    half = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), Image.Resampling.LANCZOS)
    return [picture.filter(ImageFilter.GaussianBlur(1)), picture.filter(ImageFilter.GaussianBlur(3)), half]


@pytest.mark.real_data
@pytest.mark.parametrize(
    "pattern, step",
    [("mathvision/images/*.jpg", 6), ("mmvp/processed/*/*.jpg", 2), ("geometry3k/*/*/*.png", 2)],
    ids=["MATH-V", "MMVP", "Geometry3K"],
)
def test_blurred_and_smaller_copies_score_lower(real_data, pattern, step):
    """On all pictures that were tried; 99 % is asked for."""
    files = sorted(real_data.glob(pattern))[::step]
    assert len(files) >= 25
    lower = np.zeros(3)
    for file in files:
        picture = Image.open(file).convert("RGB")
        own = clarity([picture])
        lower += [clarity([copy]) < own for copy in _worse(picture)]
    assert (lower / len(files) >= 0.99).all(), lower / len(files)


@pytest.mark.real_data
def test_drawings_are_not_below_photographs(real_data):
    drawings = sorted(real_data.glob("geometry3k/*/*/*.png"))
    photographs = sorted(real_data.glob("mmvp/processed/*/*.jpg"))[::6]
    medians = [
        np.median([resolved_detail(p) / math.sqrt(p.width * p.height) for p in map(Image.open, files)])
        for files in (drawings, photographs)
    ]
    assert medians[0] > 0.8 * medians[1]


# --- questions -------------------------------------------------------------------------------------------------------


def test_questions_by_hand():
    assert refers_to_picture("In the figure, find x.") == 1 and refers_to_picture("Find x.") == 0.5
    assert refers_to_picture("What is 12 plus 30?") == 0
    assert necessity_of("Which object is shown?") == 1
    assert necessity_of("A box holds 3 balls, 4 cubes and 5 rings. How many things are in it?") == 0
    assert necessity_of("What is 12 plus 30?") == pytest.approx((1 - 2 / 3) / 2)
    assert difficulty_of("Find x.") == pytest.approx(math.log2(3) / 7 / 3)
    # 7 words: 3/7; two quantities of 6; `plus`, `times` of 4
    assert difficulty_of("What is 12 plus 30 times y?") == pytest.approx((3 / 7 + 2 / 6 + 2 / 4) / 3)
    for question, value in (
        ("Why is the sky blue?", 1), ("How does the lever move?", 0.9), ("Compute the area.", 0.7),
        ("How many dots are there?", 0.5), ("What is it?", 0.3), ("Where is the dog?", 0.1), ("Is it red?", 0.1),
        ("How many can you find?", 0.5), ("describe the image.", 0.2), ("What is shown, and why?", 1),
    ):  # fmt: skip
        assert demand_of(question) == value, question
    # both: min(1 picture, 2 numbers / 2) = 1; reasons .7
    assert integration_of("In the figure, AB = 3 and BC = 4. Find AC.") == pytest.approx((1 + 0.7) / 2)
    assert integration_of("What is shown?") == pytest.approx(0.3 / 2)


def test_why_and_how_stand_above_what_and_where():
    things = ("the pendulum", "the red bar", "this shape", "the dog in the picture", "angle ABC")
    low = [f"{word} is {thing}?" for word in ("What", "Where", "Which", "Who") for thing in things]
    high = [f"{word} {thing} so?" for word in ("Why is", "How is", "How does") for thing in things]
    for score in (demand_of, integration_of):
        assert min(map(score, high)) > max(map(score, low))


def test_instructions_and_options_are_not_the_question():
    asked_ = sample("How many dots?\n(A) 3\n(B) 4\nWork out the answer step by step and write only \\boxed{}.")
    assert asked(asked_) == "How many dots?"


NUMBERS = re.compile(r"\d+")


@pytest.mark.real_data
def test_what_can_be_answered_without_the_picture_needs_it_less(real_data):
    """MATH-V's and Geometry3K's questions against arithmetic on the same numbers, and against all facts in words."""
    mathv = open_source(
        SourceSpec(kind="mathvision", path=str(real_data / "mathvision/testmini.jsonl")), for_training=False
    )
    questions = [q for q in map(asked, mathv) if refers_to_picture(q) == 1]
    assert len(questions) > 200
    pairs = []
    for question in questions:
        a, b, *_ = [*NUMBERS.findall(question), "12", "35"]
        pairs.append((question, f"A shop has {a} apples and gets {b} more. How many apples does it have?"))
    lower = np.mean([necessity_of(alone) < necessity_of(pictured) for pictured, alone in pairs])
    assert lower >= 0.95, lower

    geometry = open_source(
        SourceSpec(kind="geometry3k", path=str(real_data / "geometry3k/visualsketchpad")), for_training=False
    )
    facts = "A triangle has sides of length 5, 12 and 13, and an angle of 90 degrees."
    asked_ = [asked(s) for s in geometry]
    lower = np.mean([necessity_of(f"{facts} {q}") < necessity_of(q) for q in asked_])
    assert lower >= 0.9, lower  # those that give three numbers themselves are not lower, but equal
    assert all(necessity_of(f"{facts} {q}") <= necessity_of(q) for q in asked_)


# --- scorers ---------------------------------------------------------------------------------------------------------


def constant(sample: Sample, pictures) -> float:
    return float(len(pictures))


def broken(sample: Sample, pictures) -> float:
    raise RuntimeError("no model")


def test_scorers_by_name_and_by_path():
    assert scorer_of("demand") is REGISTRY["demand"]
    found = scorer_of(f"{__name__}:constant")
    assert found(sample("?", drawing()), [drawing()]) == 1
    for name, said in (
        ("clarty", "did you mean 'clarity'"),
        ("no.such.module:f", "cannot be imported"),
        (f"{__name__}:absent", "has no function 'absent'"),
    ):
        with pytest.raises(ValueError, match=said):
            scorer_of(name)
    with pytest.raises(ValueError, match=r"scorer of demand, sample s: raised RuntimeError: no model"):
        raw_scores(sample("?"), {"demand": broken})
    with pytest.raises(ValueError, match="returned nan"):
        raw_scores(sample("?"), {"demand": lambda *_: math.nan})
    with pytest.raises(BadSample, match="does not exist"):
        raw_scores(sample("?", "none.png"), {"demand": constant})


def test_scores_of_a_data_set():
    blurred = drawing().filter(ImageFilter.GaussianBlur(3))
    samples = [
        sample("Why does the figure show 3 cm and 4 cm?", drawing(), id="much"),
        sample("Is it open?", blurred, id="little"),
        sample("Is it 3?", id="no picture"),
    ]
    much, little, none = score_samples(samples)
    assert much.scaled == dict.fromkeys(REGISTRY, 1.0) | {"necessity": much.scaled["necessity"]}
    assert much.raw["necessity"] == pytest.approx((2 - 2 / 3) / 2) and none.raw["necessity"] == none.raw["clarity"] == 0
    assert much.vision == (1 + much.scaled["necessity"]) / 2 and much.text == much.integration == 1
    assert much.penalty == penalty(much.vision, 1, 1) < little.penalty < none.penalty <= 2
    assert none.vision == 0
    (replaced, *_) = score_samples(samples, {"demand": constant}, Weights(alpha=0))
    assert replaced.raw["demand"] == 1 and replaced.penalty == 1
