"""The embedded world: determinism, exact gold recomputed from the picture's plan, splits that keep apart, language."""

import pickle
import re
from collections import Counter
from random import Random

import numpy as np
import pytest

from lightning_vlm.data.world import FAMILIES, LABEL_CLASSES, SPLITS, Scene, WorldSource, masks, patch_labels, render
from lightning_vlm.data.world.captions import captions, minimal_edit
from lightning_vlm.data.world.families import ANGLES, HELD_OUT_ANGLES, HELD_OUT_PAIRS, HELD_OUT_SIDES, SIDES
from lightning_vlm.data.world.scene import BACKGROUND, CELL, INK, RGB, TRIANGLES, Bar, Figure, Label, side_cells
from lightning_vlm.models.embedded import COLOURS, PLURALS, SHAPES, build_tokenizer


def scene_of(sample) -> Scene:
    return sample.images[0].args[0]


def question_of(sample) -> str:
    return sample.messages[0]["content"][1]["text"]


def gold(sample) -> int:
    """The answer, worked out from the scene and the question's words alone."""
    scene, text = scene_of(sample), question_of(sample)
    words = re.findall(r"[a-z]+|\d+", text)
    if sample.info["family"] == "count":
        colour = next((COLOURS.index(w) for w in words if w in COLOURS), None)
        shape = next((PLURALS.index(w) for w in words if w in PLURALS), None)
        return sum(colour in (None, f.colour) and shape in (None, f.shape) for f in scene.figures)
    if sample.info["family"] == "bars":
        heights = {COLOURS[bar.colour]: bar.value for bar in scene.bars}
        signs = [1, 1, -1] if "minus" in words else [1, 1]
        asked = [heights[w] for w in words if w in heights]
        return sum(sign * value for sign, value in zip(signs, asked, strict=False))
    numbers = [int(label.text) for label in scene.labels if label.text != "x"]
    if sample.info["family"] == "angle":
        return sum(numbers) if "exterior" in words else 180 - sum(numbers)
    return sum(numbers) * next((int(w) for w in words if w.isdigit()), 1)


@pytest.mark.parametrize("split", SPLITS)
def test_gold_is_what_the_scene_says(split):
    """Every gold answer equals an independent calculation, and chains and direct answers both end in it."""
    for sample in WorldSource(split=split, size=600, seed=3):
        if sample.info["family"] == "caption":
            assert sample.answer is None
            continue
        assert int(sample.answer) == gold(sample) >= 0
        assert sample.chosen().endswith(rf"\boxed{{{sample.answer}}}")
        assert (sample.info["kind"] == "direct") == sample.chosen().startswith(r"\boxed")


def test_every_equation_of_every_chain_holds():
    for sample in WorldSource(size=1000, direct_fraction=0, families=("bars", "angle", "perimeter")):
        for a, sign, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", sample.chosen()):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c)


def test_a_sample_is_a_function_of_seed_split_and_number():
    """Any order, any size, any settings of style: the same pictures and questions."""
    long, short = WorldSource(size=200), WorldSource(size=50, direct_fraction=0, pairs=True)
    for k in reversed(range(50)):
        assert scene_of(long[k]) == scene_of(short[k]) and question_of(long[k]) == question_of(short[k])
    again, k = WorldSource(size=200)[7], 7
    assert again.id == long[k].id and again.messages == long[k].messages
    assert (np.asarray(again.images[0]()) == np.asarray(long[k].images[0]())).all()
    assert scene_of(WorldSource(size=200, seed=1)[7]) != scene_of(long[7])
    assert scene_of(WorldSource(size=200, split="val")[7]) != scene_of(long[7])


def test_indexing_is_a_sequence():
    source = WorldSource(size=10)
    assert len(list(source)) == 10 and source[-1].id == source[9].id
    with pytest.raises(IndexError):
        source[10]


def test_questions_about_one_image_are_neighbours_and_differ():
    source = WorldSource(size=400)
    for k in range(0, 400, 2):
        first, second = source[k], source[k + 1]
        assert scene_of(first) == scene_of(second) and first.info["image"] == second.info["image"] == k // 2
        if first.info["family"] == "caption":
            assert first.info["references"][0] != second.info["references"][0]
            assert sorted(first.info["references"]) == sorted(second.info["references"])
        else:
            assert question_of(first) != question_of(second)
    single = WorldSource(size=20, questions_per_image=1)
    assert [s.info["image"] for s in single] == list(range(20))


def test_families_are_balanced_in_order():
    assert Counter(s.info["family"] for s in WorldSource(size=100)) == dict.fromkeys(FAMILIES, 20)


def test_direct_fraction_and_the_chains_first_curriculum():
    source = WorldSource(size=4000, direct_fraction=0.3, chains_first=1000, families=("count", "angle"))
    kinds = [s.info["kind"] for s in source]
    assert set(kinds[:1000]) == {"chain"}
    assert abs(kinds[1000:].count("direct") / 3000 - 0.3) < 0.03  # 3.6 standard deviations
    assert {s.info["kind"] for s in WorldSource(size=60, direct_fraction=0)} == {"chain", "caption"}


def test_count_targets_are_uniform():
    """Prior of a guess: 20 %. χ² with 4 degrees of freedom stays under 18.5 (p = .001)."""
    for split in ("train", "ood_pairs", "ood_two_attributes"):
        counts = Counter(s.answer for s in WorldSource(split=split, size=2000, families=["count"]))
        assert sum((counts[str(n)] - 400) ** 2 / 400 for n in range(5)) < 18.5


def test_held_out_pairs_angles_and_sides_appear_only_out_of_domain():
    def held_out(sample):
        scene = scene_of(sample)
        numbers = tuple(int(label.text) for label in scene.labels if label.text != "x")
        return (
            any((f.colour, f.shape) in HELD_OUT_PAIRS for f in scene.figures)
            or (sample.info["family"] == "angle" and any(n in HELD_OUT_ANGLES for n in numbers))
            or (sample.info["family"] == "perimeter" and tuple(sorted(numbers)) in HELD_OUT_SIDES)
        )

    for split in SPLITS:
        samples = WorldSource(split=split, size=600)
        expected = {"ood_pairs": 600, "ood_numbers": 600}.get(split, 0)
        assert sum(map(held_out, samples)) == expected, split
    assert len(HELD_OUT_PAIRS) == 3 and len(ANGLES) == 16 and (len(SIDES), len(HELD_OUT_SIDES)) == (40, 6)
    pairs = {(c, s) for c in range(6) for s in range(4)} - set(HELD_OUT_PAIRS)
    assert {c for c, _ in pairs} == set(range(6)) and {s for _, s in pairs} == set(range(4))
    asked = [question_of(s) for s in WorldSource(split="ood_two_attributes", size=100)]
    assert all(any(c in q for c in COLOURS) and any(p in q for p in PLURALS) for q in asked)


def test_known_pictures():
    """Hand-checked pixels: a jittered square, a bar of 5 units, a 7 in the units' half of a cell."""
    square = render(Scene(figures=(Figure(COLOURS.index("blue"), SHAPES.index("square"), 6, dx=1, dy=-1),)))
    ys, xs = np.nonzero((square == RGB[2]).all(-1))
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (17, 28, 35, 46) and len(ys) == 144
    bar = render(Scene(bars=(Bar(0, 5, 3),)))
    ys, xs = np.nonzero((bar == RGB[0]).all(-1))
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (34, 63, 51, 60)
    seven = (render(Scene(labels=(Label("7", 0),)))[:CELL, :CELL, 0] == INK)[3:13:2, 9:15:2]
    assert seven.astype(int).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]


def test_digits_and_shapes_are_told_apart():
    glyphs = [render(Scene(labels=(Label(c, 0),))).tobytes() for c in "0123456789x"]
    shapes = [render(Scene(figures=(Figure(0, s, 0),))).tobytes() for s in range(4)]
    assert len(set(glyphs)) == 11 and len(set(shapes)) == 4


def test_masks_cover_exactly_what_is_drawn():
    """Outside all masks only background and outline are left; masks never overlap; each has one colour."""
    for sample in WorldSource(size=200, questions_per_image=1):
        scene = scene_of(sample)
        names, stack = sample.info["masks"]()
        picture = render(scene)
        assert len(names) == len(stack) == len(scene.figures) + len(scene.bars) + len(scene.labels)
        assert stack.sum(0).max() <= 1
        for name, mask in zip(names, stack, strict=True):
            expected = np.full(3, INK) if name == "label" else RGB[COLOURS.index(name.split()[0])]
            assert mask.any() and (picture[mask] == expected).all()
        rest = picture[~stack.any(0)]
        assert (rest.min(-1) == rest.max(-1)).all()
        assert scene.triangle is not None or (rest == BACKGROUND).all()


def test_patch_labels_of_a_known_scene():
    scene = Scene(
        figures=(Figure(1, 2, 0),), bars=(Bar(4, 7, 3),), labels=(Label("40", 5), Label("x", 6), Label("7", 9))
    )
    labels = patch_labels(scene)
    assert labels[0].tolist() == [2, 3, 0, 0, 0]
    # 7 units of 6 pixels fill rows 3 and 2 and reach into row 1
    assert labels[7].tolist() == [5, 0, 0, 0, 7]
    assert labels[11].tolist() == labels[15].tolist() == [5, 0, 0, 0, 0] and labels[3].sum() == 0
    assert labels[5].tolist() == [0, 0, 5, 1, 0]
    assert labels[6].tolist() == [0, 0, 0, 11, 0] and labels[9].tolist() == [0, 0, 0, 8, 0]
    for sample in WorldSource(size=300):
        assert (sample.info["patch_labels"] < LABEL_CLASSES).all()


@pytest.mark.parametrize("triangle", range(len(TRIANGLES)))
def test_labels_of_a_triangle_never_run_together(triangle):
    for cells in (TRIANGLES[triangle], side_cells(triangle)):
        assert len(set(cells)) == 3
        for a in cells:
            assert a % 4 == 3 or a + 1 not in cells


def test_five_captions_of_a_known_scene():
    figures = (Figure(0, 0, 1), Figure(2, 1, 2), Figure(1, 3, 9))
    assert captions(figures) == [
        "a red circle left of a blue square, with a green cross.",
        "the image shows a red circle left of a blue square, with a green cross.",
        "a blue square right of a red circle, with a green cross.",
        "there is a red circle, a blue square and a green cross.",
        "three shapes: a red circle, a blue square and a green cross.",
    ]
    assert captions(figures[:1])[0] == "a red circle at the top left."
    assert captions((figures[0], figures[2]))[2] == "a green cross below a red circle."


def test_captions_of_the_source_are_five_different_references():
    for sample in WorldSource(size=300, families=["caption"]):
        assert len(set(sample.info["references"])) == 5 and sample.chosen() in sample.info["references"]


def test_minimal_edits_change_one_word_and_are_false():
    """One word differs; no true caption reads so; twins are never told apart by their relation."""
    tokens = re.compile(r"[a-z]+")
    kinds = Counter()
    for sample in WorldSource(size=1000, families=["caption"], pairs=True):
        good, bad = tokens.findall(sample.chosen()), tokens.findall(sample.rejected)
        assert len(good) == len(bad) and sum(a != b for a, b in zip(good, bad, strict=True)) == 1
        assert sample.rejected not in sample.info["references"]
        kinds[sample.info["edit"]] += 1
    assert set(kinds) == {"colour", "shape", "number", "relation"}
    twins = (Figure(0, 0, 1), Figure(0, 0, 2))
    edits = {minimal_edit(captions(twins)[0], twins, Random(i))[1] for i in range(50)}
    assert edits == {"colour", "shape"}


def test_rejected_answers_are_wrong_and_consistent():
    """A misreading gives another answer by a chain whose equations still hold."""
    for sample in WorldSource(size=1000, families=("count", "bars", "angle", "perimeter"), pairs=True):
        answer = re.search(r"\\boxed\{(\d+)\}$", sample.rejected).group(1)
        assert answer != sample.answer
        assert sample.rejected.startswith(r"\boxed") == (sample.info["kind"] == "direct")
        for a, sign, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", sample.rejected):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c)


@pytest.mark.parametrize("family", FAMILIES)
def test_easy_pairs_are_about_another_picture(family):
    """Half are; none is right about this one, and pictures and chosen answers stay what they were."""
    settings = {"size": 400, "families": (family,), "pairs": True}
    plain, easy = WorldSource(**settings), WorldSource(**settings, easy_pairs=0.5)
    others = [sample for sample in easy if sample.info["edit"] == "another picture"]
    assert 150 < len(others) < 250
    for before, after in zip(plain, easy, strict=True):
        assert before.chosen() == after.chosen() and scene_of(before) == scene_of(after)
        if after.info["edit"] != "another picture":
            assert before.rejected == after.rejected
        elif family == "caption":
            assert after.rejected not in after.info["references"]
        else:
            assert re.search(r"\\boxed\{(\d+)\}$", after.rejected).group(1) != after.answer


def test_every_text_is_in_the_vocabulary_and_decodes_to_itself():
    tokenizer = build_tokenizer()
    for split in SPLITS:
        for sample in WorldSource(split=split, size=600, pairs=True):
            for text in (question_of(sample), sample.chosen(), sample.rejected):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_samples_travel_to_workers():
    sample = pickle.loads(pickle.dumps(WorldSource(size=10, pairs=True)[4]))
    picture = sample.images[0]()
    assert picture.size == (64, 64) and picture.mode == "RGB"
    assert sample.info["masks"]()[1].shape[1:] == (64, 64) and len(masks(Scene())[0]) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "dev"}, "no split 'dev'"),
        ({"split": "ood_pairs", "families": ["angle"]}, "no family 'angle'"),
        ({"families": []}, "at least one family"),
        ({"size": 0}, "size is 0"),
        ({"direct_fraction": 1.5}, "direct_fraction is 1.5"),
        ({"questions_per_image": 3}, "questions_per_image is 3"),
        ({"chains_first": -1}, "chains_first is -1"),
        ({"easy_pairs": 0.5}, "needs pairs: true"),
        ({"easy_pairs": 2.0, "pairs": True}, "easy_pairs is 2.0"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        WorldSource(**settings)
